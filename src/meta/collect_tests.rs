//! A configuration as it is collected; and the golden ones, which must open forever.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;

use super::collect::*;
use crate::config::{ItemKind, Texts};
use crate::crypto::{Profile, ProfileKey, key_file};
use crate::ledger::{Ledger, ScheduleState};
use crate::portable::Packing;
use crate::portable::envelope::{self, Envelope, SecretKind};
use crate::portable::seal::Keys;

struct World {
    dir: tempfile::TempDir,
}

const MAIN: &str = "
[daemon]
state_dir = 'DIR/state'
[encryption.main]
key_file = 'main.key'
retired = ['old.key']
[encryption.away]
key_file = 'DIR/main.key'
public_key = 'pair.pub'
[config_backup]
destination = 'offsite'
encryption = 'main'
[job.shop]
destinations = ['offsite']
at = 2026-12-24T18:00:00
[[job.shop.source]]
name = 'files'
files = '/srv/shop'
[[job.shop.source]]
postgres = { dbname = 'shop', user = 'keepd', password = { file = 'DIR/pg' } }
";

const OFFSITE: &str = "
[destination.offsite]
service = 's3'
bucket = 'b'
region = 'eu-1'
encryption = 'main'
access_key_id = 'AK'
secret_access_key = { file = 's3' }
";

impl World {
    fn new() -> Self {
        let world = Self { dir: tempfile::tempdir().unwrap() };
        key_file::generate(&world.path("main.key")).unwrap();
        key_file::generate(&world.path("old.key")).unwrap();
        key_file::generate_pair(&world.path("pair")).unwrap();
        fs::write(world.path("s3"), "s3 secret\n").unwrap();
        fs::write(world.path("pg"), "pg secret").unwrap();
        fs::create_dir(world.path("conf.d")).unwrap();
        fs::write(world.path("keepd.toml"), MAIN.replace("DIR", world.dir.path().to_str().unwrap())).unwrap();
        fs::write(world.path("conf.d/offsite.toml"), OFFSITE).unwrap();
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn texts(&self) -> Texts {
        let texts = Texts::read(&self.path("keepd.toml")).unwrap();
        texts.load().unwrap();
        texts
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }
}

fn names(envelope: &Envelope) -> Vec<String> {
    envelope.items.iter().map(|item| format!("{}.{}", item.r#type, item.name)).collect()
}

fn secrets(envelope: &Envelope) -> Vec<(String, String)> {
    let of =
        |item: &envelope::Item| item.secrets.iter().map(|s| (format!("{} {}", item.name, s.at), s.value.to_string())).collect::<Vec<_>>();
    envelope.items.iter().flat_map(of).collect()
}

#[test]
fn all_of_it_goes_out_in_order() {
    let world = World::new();
    let ledger = Ledger::open(world.dir.path()).unwrap();
    let seen: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
    let state =
        ScheduleState { first_seen: Some(seen), last_run: Some("of this machine".into()), runs_good: 7, ..ScheduleState::default() };
    ledger.save_schedule_state("shop", &state).unwrap();
    ledger.save_schedule_state("config backup", &state).unwrap();
    let open = collect(&world.texts(), Some(&ledger), None, false).unwrap();
    assert_eq!(
        names(&open),
        [
            "settings.config_backup",
            "settings.daemon",
            "encryption.away",
            "encryption.main",
            "destination.offsite",
            "job.shop",
            "schedule.shop"
        ]
    );
    assert_eq!((open.item_count, open.export_type.as_str(), open.includes_secrets), (7, "all", false));
    let schedule = &open.items[6].value;
    assert_eq!((&schedule["runs_good"], schedule.get("last_run"), schedule.get("last_good")), (&7.into(), None, None));
    assert_eq!(open.items[5].value["at"], "2026-12-24T18:00:00");
    let none = String::new();
    assert_eq!(
        secrets(&open),
        [
            ("away key_file".into(), none.clone()),
            ("away public_key".into(), world.text("pair.pub")),
            ("main key_file".into(), none.clone()),
            ("main retired[0]".into(), none.clone()),
            ("offsite secret_access_key".into(), none.clone()),
            ("shop source[1].postgres.password".into(), none),
        ]
    );
    let whole = collect(&world.texts(), None, None, true).unwrap();
    assert_eq!(whole.item_count, 6);
    assert_eq!(
        secrets(&whole),
        [
            ("away key_file".into(), world.text("main.key")),
            ("away public_key".into(), world.text("pair.pub")),
            ("main key_file".into(), world.text("main.key")),
            ("main retired[0]".into(), world.text("old.key")),
            ("offsite secret_access_key".into(), "s3 secret".into()),
            ("shop source[1].postgres.password".into(), "pg secret".into()),
        ]
    );
    let jobs = collect(&world.texts(), Some(&ledger), Some(&BTreeSet::from([ItemKind::Job])), false).unwrap();
    assert_eq!((names(&jobs), jobs.export_type.as_str()), (vec!["job.shop".to_owned()], "job"));
    // No value stands anywhere else.
    let json = serde_json::to_string(&open).unwrap();
    assert!(!json.contains("s3 secret") && !json.contains("pg secret") && !json.contains("keepd-key-1"));
}

#[test]
fn what_cannot_be_read_fails_it_and_is_named_all_at_once() {
    let world = World::new();
    let texts = world.texts();
    fs::remove_file(world.path("s3")).unwrap();
    fs::write(world.path("old.key"), "no key").unwrap();
    let told = collect(&texts, None, None, true).unwrap_err().to_string();
    for wanted in
        ["destination.offsite: secret_access_key (file ", "encryption.main: retired[0] (file ", "nothing was exported without them"]
    {
        assert!(told.contains(wanted), "{told}");
    }
    assert!(!told.contains("pg secret"), "{told}");
    collect(&texts, None, None, false).unwrap();
    let shown = preview(&texts, None, None).unwrap();
    let offsite = shown.iter().find(|i| i.item == "destination.offsite").unwrap();
    assert!(offsite.file.ends_with("conf.d/offsite.toml"));
    assert!(offsite.toml.contains("[destination.offsite]") && offsite.toml.contains("bucket = \"b\""), "{}", offsite.toml);
    assert!(offsite.secrets[0].problem.as_ref().unwrap().contains("cannot open"));
    let shop = shown.iter().find(|i| i.item == "job.shop").unwrap();
    assert!(shop.toml.contains("[[job.shop.source]]") && !shop.toml.contains("pg secret"), "{}", shop.toml);
    assert_eq!((shop.secrets[0].from.as_str(), &shop.secrets[0].problem), (format!("file {}", world.path("pg").display()).as_str(), &None));
}

#[test]
fn a_key_in_a_token_is_told_and_stays_there() {
    let world = World::new();
    fs::write(world.path("m.so"), "").unwrap();
    let pin = "[encryption.token]\npkcs11 = { module = 'DIR/m.so', token = 't', key = 'k', pin = { file = 's3' } }\n";
    fs::write(world.path("conf.d/token.toml"), pin.replace("DIR", world.dir.path().to_str().unwrap())).unwrap();
    let whole = collect(&world.texts(), None, None, true).unwrap();
    let token = whole.items.iter().find(|i| i.name == "token").unwrap();
    assert_eq!(token.secrets.iter().map(|s| (s.at.as_str(), s.kind)).collect::<Vec<_>>(), [("pkcs11.pin", SecretKind::Secret)]);
    let shown = preview(&world.texts(), None, None).unwrap();
    let token = shown.into_iter().find(|i| i.item == "encryption.token").unwrap();
    let stays = token.secrets.iter().find(|s| s.at == "pkcs11").unwrap();
    assert!(stays.from == "key 'k' of token 't'" && stays.problem.as_ref().unwrap().contains("does not give its key away"));
}

#[test]
fn a_large_one_goes_out_quickly() {
    let world = World::new();
    let mut text = String::new();
    for n in 0..20 {
        text += &OFFSITE.replace("destination.offsite", &format!("destination.d{n}"));
    }
    for n in 0..100 {
        text += &format!("[job.j{n}]\ndestinations = ['d{}']\nschedule = '30 2 * * *'\n[[job.j{n}.source]]\nfiles = '/srv/j{n}'\n", n % 20);
    }
    fs::write(world.path("conf.d/many.toml"), text).unwrap();
    let profile = Profile::of("main", ProfileKey::Key(Arc::new(key_file::load(&world.path("main.key")).unwrap())));
    let begun = std::time::Instant::now();
    let envelope = collect(&world.texts(), None, None, true).unwrap();
    let sealed = envelope::write(&envelope, Vec::new(), Packing::Gzip, Some(&profile)).unwrap();
    let keys = Keys { keys: profile.keys().cloned().collect(), ..Keys::default() };
    assert_eq!(envelope::read(&*sealed, &keys).unwrap().envelope, envelope);
    assert_eq!(envelope.item_count, 126);
    assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden-config")
}

/// What lies in tests/golden-config was made by `make_golden_configurations` below with earlier versions; it must open forever.
#[test]
fn golden_configurations_open() {
    let golden = golden();
    let text = |name: &str| fs::read_to_string(golden.join(name)).unwrap();
    let key = Arc::new(key_file::from_text(&golden.join("seal.key"), &text("seal.key")).unwrap());
    let keys = Keys { keys: vec![ProfileKey::Key(key)], ..Keys::default() };
    let items = Texts::read(&golden.join("config/keepd.toml")).unwrap().items().unwrap();
    let mut seen = 0;
    for entry in fs::read_dir(&golden).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if !name.contains(".json") {
            continue;
        }
        let opened = envelope::read(fs::File::open(entry.path()).unwrap(), &keys).unwrap();
        let sealed = name.ends_with(".enc");
        assert_eq!((opened.sealed, opened.envelope.includes_secrets), (sealed, sealed), "{name}");
        let values: Vec<_> = opened.envelope.items.iter().filter(|i| i.r#type != "schedule").map(|i| i.value.clone()).collect();
        assert_eq!(values, items.values().map(|(_, value)| value.clone()).collect::<Vec<_>>(), "{name}");
        assert_eq!(opened.envelope.items.last().unwrap().value["runs_good"], 41, "{name}");
        let if_sealed = |text: String| if sealed { text } else { String::new() };
        assert_eq!(
            secrets(&opened.envelope),
            [
                ("away key_file".into(), if_sealed(text("config/main.key"))),
                ("away public_key".into(), text("config/pair.pub")),
                ("main key_file".into(), if_sealed(text("config/main.key"))),
                ("main retired[0]".into(), if_sealed(text("config/old.key"))),
                ("offsite secret_access_key".into(), if_sealed(text("config/s3").trim_end().into())),
                ("shop source[1].postgres.password".into(), if_sealed(text("config/pg").trim_end().into())),
            ],
            "{name}"
        );
        seen += 1;
    }
    assert!(seen >= 2, "{seen} golden configurations");
}

/// Makes new ones: `GOLDEN=DIR cargo test --lib make_golden_configurations -- --ignored`.
#[test]
#[ignore = "makes fixtures"]
fn make_golden_configurations() {
    let to = PathBuf::from(std::env::var_os("GOLDEN").expect("GOLDEN=DIR"));
    let config = to.join("config");
    fs::create_dir_all(config.join("conf.d")).unwrap();
    let there = World::new();
    for name in ["main.key", "old.key", "pair.pub", "s3", "pg", "conf.d/offsite.toml"] {
        fs::copy(there.path(name), config.join(name)).unwrap();
    }
    let main = MAIN.replace("'DIR/pg'", "'pg'").replace("'DIR/main.key'", "'main.key'").replace("DIR/state", "/var/lib/keepd");
    fs::write(config.join("keepd.toml"), main).unwrap();
    let ledger = Ledger::open(there.dir.path()).unwrap();
    let state = ScheduleState { first_seen: Some(Timestamp::UNIX_EPOCH), runs_good: 41, ..ScheduleState::default() };
    ledger.save_schedule_state("shop", &state).unwrap();
    let texts = Texts::read(&config.join("keepd.toml")).unwrap();
    key_file::generate(&to.join("seal.key")).unwrap();
    let seal = Profile::of("seal", ProfileKey::Key(Arc::new(key_file::load(&to.join("seal.key")).unwrap())));
    let write = |name: &str, secrets: bool, packing: Packing, profile: Option<&Profile>| {
        let mut envelope = collect(&texts, Some(&ledger), None, secrets).unwrap();
        envelope.instance = "golden".into();
        fs::write(to.join(name), envelope::write(&envelope, Vec::new(), packing, profile).unwrap()).unwrap();
    };
    write("1.json", false, Packing::None, None);
    write("1.json.gz", false, Packing::Gzip, None);
    write("1.json.gz.enc", true, Packing::Gzip, Some(&seal));
    write("1.json.zst.enc", true, Packing::Zstd, Some(&seal));
}
