//! Envelopes: what is written comes back, and what is not one is refused.

use std::io::Write;
use std::sync::Arc;

use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::envelope::*;
use super::packing::Packing;
use super::seal::Keys;
use super::*;
use crate::crypto::{Key, Profile, ProfileKey};

fn profile() -> Profile {
    Profile::of("main", ProfileKey::Key(Arc::new(Key::generate().unwrap())))
}

fn keys(profile: &Profile) -> Keys {
    Keys { keys: profile.keys().cloned().collect(), ..Keys::default() }
}

fn envelope(items: Vec<Item>, includes_secrets: bool) -> Envelope {
    Envelope {
        format_version: VERSION,
        keepd_version: "0.1.0".into(),
        export_type: "all".into(),
        exported_at: "2026-11-22T03:45:00Z".parse().unwrap(),
        instance: "host".into(),
        item_count: items.len() as u64,
        includes_secrets,
        items,
    }
}

fn destination(secret: &str) -> Item {
    Item {
        r#type: "destination".into(),
        name: "offsite".into(),
        value: json!({"service": "s3", "bucket": "b", "secret_access_key": {"file": "s3"}, "concurrency": 8, "append_only": true}),
        secrets: vec![Secret { at: "secret_access_key".into(), kind: SecretKind::Secret, value: Zeroizing::new(secret.into()) }],
    }
}

fn plain() -> Envelope {
    let job = Item { r#type: "job".into(), name: "shop".into(), value: json!({"destinations": ["offsite"]}), secrets: Vec::new() };
    envelope(vec![destination(""), job], false)
}

fn written(envelope: &Envelope, packing: Packing, seal: Option<&Profile>) -> Vec<u8> {
    write(envelope, Vec::new(), packing, seal).unwrap()
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![any::<bool>().prop_map(Value::from), any::<i64>().prop_map(Value::from), ".{0,20}".prop_map(Value::from)];
    leaf.prop_recursive(3, 24, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(".{0,8}", inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn item() -> impl Strategy<Value = Item> {
    let kinds = crate::config::ItemKind::ALL.map(|(_, word)| word);
    let secret =
        ("[^\\p{Cc}]{1,20}", "(?s).{0,40}", prop::sample::select(vec![SecretKind::Secret, SecretKind::KeyFile, SecretKind::PublicKey]));
    let secret = secret.prop_map(|(at, value, kind)| Secret { at, kind, value: Zeroizing::new(value) });
    let table = prop::collection::btree_map(".{0,8}", value(), 0..5).prop_map(|map| Value::Object(map.into_iter().collect()));
    (prop::sample::select(kinds.to_vec()), "[A-Za-z0-9][A-Za-z0-9._-]{0,20}", table, prop::collection::vec(secret, 0..3)).prop_map(
        |(kind, name, value, mut secrets)| {
            secrets.sort_by(|a, b| a.at.cmp(&b.at));
            secrets.dedup_by(|a, b| a.at == b.at);
            Item { r#type: kind.into(), name, value, secrets }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_is_written_comes_back(mut items in prop::collection::vec(item(), 0..8), packing in 0usize..3) {
        items.sort_by(|a, b| (&a.r#type, &a.name).cmp(&(&b.r#type, &b.name)));
        items.dedup_by(|a, b| (&a.r#type, &a.name) == (&b.r#type, &b.name));
        let packing = [Packing::None, Packing::Gzip, Packing::Zstd][packing];
        let (meant, profile) = (envelope(items, true), profile());
        let sealed = written(&meant, packing, Some(&profile));
        prop_assert_eq!(&sealed[..8], b"KEEPDENC");
        let opened = read(&*sealed, &keys(&profile)).unwrap();
        prop_assert!(opened.sealed && opened.opened_with.unwrap().contains("'main'"));
        prop_assert_eq!(&opened.envelope, &meant);
        // Unsealed only without its secrets; keys do not matter to it.
        prop_assert_eq!(write(&meant, Vec::new(), packing, None).is_err(), meant.has_secrets());
        let mut open = meant;
        open.includes_secrets = false;
        let all = open.items.iter_mut().flat_map(|i| &mut i.secrets);
        all.filter(|s| s.kind != SecretKind::PublicKey).for_each(|s| s.value = Zeroizing::default());
        let opened = read(&*written(&open, packing, None), &keys(&profile)).unwrap();
        prop_assert_eq!(opened, Opened { envelope: open, sealed: false, opened_with: None });
    }

    #[test]
    fn noise_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        prop_assert!(read(&*bytes, &Keys::default()).is_err());
        prop_assert!(read(&*[b"KEEPDENC".as_slice(), &bytes].concat(), &Keys::default()).is_err());
    }
}

#[test]
fn a_long_one_goes_through_in_blocks() {
    let text = "a long text that has to be cut ".repeat(1000);
    let item = |n: usize| Item {
        r#type: "job".into(),
        name: format!("job-{n}"),
        value: json!({"text": format!("{n}{text}")}),
        secrets: Vec::new(),
    };
    let (meant, profile) = (envelope((0..100).map(item).collect(), false), profile());
    for packing in [Packing::None, Packing::Gzip, Packing::Zstd] {
        assert_eq!(read(&*written(&meant, packing, Some(&profile)), &keys(&profile)).unwrap().envelope, meant, "{packing:?}");
    }
}

#[test]
fn every_damaged_byte_and_every_cut_is_noticed() {
    let (meant, profile) = (envelope(vec![destination("a secret")], true), profile());
    let keys = keys(&profile);
    let sealed = written(&meant, Packing::Gzip, Some(&profile));
    for at in 0..sealed.len() {
        let mut damaged = sealed.clone();
        damaged[at] ^= 0x20;
        assert!(read(&*damaged, &keys).is_err(), "byte {at} of {}", sealed.len());
        let cut = read(&sealed[..at], &keys).unwrap_err().to_string();
        assert!(!cut.contains("a secret"), "{cut}");
    }
    assert!(read(&*[sealed.as_slice(), b"x"].concat(), &keys).is_err());
    // What is not sealed cannot show who changed it, but what is cut off is no envelope.
    for packing in [Packing::None, Packing::Gzip, Packing::Zstd] {
        let open = written(&plain(), packing, None);
        for at in 0..open.len() {
            let mut damaged = open.clone();
            damaged[at] ^= 0x20;
            let _ = read(&*damaged, &keys);
            assert!(read(&open[..at], &keys).is_err(), "{packing:?}: {at} of {}", open.len());
        }
        assert!(read(&*[open.as_slice(), b"x"].concat(), &keys).is_err(), "{packing:?}");
    }
}

fn why(json: &Value) -> String {
    read(json.to_string().as_bytes(), &Keys::default()).unwrap_err().to_string()
}

#[test]
fn what_is_no_envelope_is_told() {
    let good = serde_json::to_value(plain()).unwrap();
    read(good.to_string().as_bytes(), &Keys::default()).unwrap();
    let with = |path: &str, value: Value| {
        let mut changed = good.clone();
        *changed.pointer_mut(path).unwrap() = value;
        why(&changed)
    };
    let secret = json!({"at": "x", "kind": "secret", "value": ""});
    for (told, wanted) in [
        (with("/format_version", json!(2)), "format 2, this version of keepd (0.1.0) knows 1; use a newer keepd"),
        (with("/format_version", json!(u64::MAX)), "use a newer keepd"),
        (with("/format_version", json!(0)), "of format 0, which no keepd ever wrote"),
        (with("/format_version", Value::Null), "does not say its 'format_version'"),
        (with("/format_version", json!("1")), "a value there is of another type"),
        (with("/item_count", json!(3)), "it has 2 items, and says that it has 3"),
        (with("/items/0/type", json!("jobs")), "there is no type 'jobs' of items; there are: settings, encryption"),
        (with("/items/0/name", json!("../x")), "'../x' is no name of a destination"),
        (with("/items/0/name", json!("")), "'' is no name of a destination"),
        (with("/items/0/value", json!([1])), "the value of destination.offsite is no table"),
        (with("/items/1", good["items"][0].clone()), "destination.offsite is there twice"),
        (with("/items/0/secrets", json!([secret, secret])), "the secret at 'x' of destination.offsite is there twice"),
        (with("/items/0/secrets/0/value", json!("open")), "says that it has no secrets, and destination.offsite has one"),
        (with("/items/0/secrets/0/at", json!("")), "stands at '', which is no place"),
        (with("/items/0/secrets/0/kind", json!("hunter2")), "another type"),
        (with("/instance", json!("a\u{7}")), "its instance is longer than"),
        (with("/items", json!({})), "another type"),
        (why(&json!({"hello": 1})), "does not say its 'format_version'"),
        (why(&json!([1])), "does not begin as one"),
        (why(&json!({"format_version": 1})), "missing field 'keepd_version'"),
        (why(&json!({"format_version": 1, "secrets": "hunter2"})), "unknown field 'secrets'"),
    ] {
        assert!(told.contains(wanted) && !told.contains("hunter2"), "{told}: {wanted}");
    }
    let text = |text: &str| read(text.as_bytes(), &Keys::default()).unwrap_err().to_string();
    assert!(text("").contains("empty"));
    assert!(text("{\"format_version\": 1").contains("it ends early"));
    assert!(text(&format!("{good} {{}}")).contains("something follows its end"));
    assert!(text(&format!("{{\"format_version\":1,\"a\":{}", "[".repeat(100_000))).contains("no configuration"));
}

#[test]
fn a_bomb_is_refused() {
    let zip = |len: usize, with: u8| {
        let mut gzip = GzEncoder::new(b"".to_vec(), Compression::fast());
        gzip.write_all(b"{\"format_version\":1,\"items\":[").unwrap();
        gzip.write_all(&vec![with; len]).unwrap();
        gzip.finish().unwrap()
    };
    let refused = |bytes: &[u8]| read(bytes, &Keys::default()).unwrap_err();
    assert!(matches!(refused(&zip(65 << 20, b' ')), PortableError::TooMuch(_)));
    assert!(matches!(refused(&zip(3 << 20, b'[')), PortableError::TooMuch(_)), "values");
    assert!(matches!(read(std::io::repeat(b' '), &Keys::default()), Err(PortableError::TooMuch(_))), "a file without end");
    let mut many = plain();
    many.items = (0..10_001).map(|n| Item { r#type: "job".into(), name: format!("j{n}"), value: json!({}), secrets: Vec::new() }).collect();
    many.item_count = 10_001;
    assert!(matches!(refused(&serde_json::to_vec(&many).unwrap()), PortableError::TooMuch(_)), "items");
}

#[test]
fn secrets_go_out_sealed_only_and_wrong_keys_say_what_is_wanted() {
    let (meant, profile) = (envelope(vec![destination("a secret")], true), profile());
    let refused = write(&meant, Vec::new(), Packing::Gzip, None).unwrap_err();
    assert!(refused.to_string().contains("sealed only"), "{refused}");
    let sealed = written(&meant, Packing::Gzip, Some(&profile));
    let told = read(&*sealed, &Keys::default()).unwrap_err().to_string();
    assert!(told.contains("the configuration is sealed, and no key was given") && told.contains("'main'"), "{told}");
    let told = read(&*sealed, &keys(&self::profile())).unwrap_err().to_string();
    assert!(told.contains("which does not open it"), "{told}");
    assert!(!format!("{meant:?}").contains("a secret"));
}

#[test]
fn long_keys_are_refused_wherever_they_are() {
    let with = |value: Value| {
        let mut all = plain();
        all.items[1].value = value;
        read(serde_json::to_vec(&all).unwrap().as_slice(), &Keys::default()).map(drop).map_err(|e| e.to_string())
    };
    let key = "k".repeat(257);
    for value in [json!({(key.clone()): 1}), json!({"a": [[{"b": {(key.clone()): 1}}]]})] {
        assert!(with(value).unwrap_err().contains("longer than 256 bytes"));
    }
    with(json!({"a": [{("k".repeat(256)): 1}]})).unwrap();
}
