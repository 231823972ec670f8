//! Where secrets are named, and where they are not.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use super::secrets::*;
use crate::config::{ItemKind, ItemName, SecretSource};
use crate::crypto::key_file;
use crate::portable::envelope::SecretKind;

fn item(kind: ItemKind) -> ItemName {
    ItemName::new(kind, "x")
}

fn places(kind: ItemKind, value: Value) -> Vec<(String, String)> {
    let found = of(&item(kind), &value, "/etc/keepd".as_ref());
    found.into_iter().map(|named| (named.at.clone(), named.from())).collect()
}

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
}

#[test]
fn each_place_is_known_and_no_other() {
    let destination = json!({
        "service": "s3", "bucket": "b", "secret_access_key": {"file": "s3"}, "session_token": {"env": "TOKEN"}, "ca_file": "ca.pem",
        "retention": {"keep_last": 1}, "retry": {"attempts": 2}, "bandwidth": {"up": "1MiB/s"}, "object_lock_mode": "governance",
    });
    assert_eq!(
        places(ItemKind::Destination, destination),
        pairs(&[("secret_access_key", "file /etc/keepd/s3"), ("session_token", "variable TOKEN")])
    );
    let sftp = json!({"service": "sftp", "endpoint": "ssh://h", "key": "/root/.ssh/id", "user": "u"});
    assert_eq!(places(ItemKind::Destination, sftp), pairs(&[("key", "file /root/.ssh/id")]));
    let gcs = json!({"service": "gcs", "bucket": "b", "credential": {"credential": "gcs"}, "credential_path": "/a.json"});
    assert_eq!(places(ItemKind::Destination, gcs), pairs(&[("credential", "credential gcs"), ("credential_path", "file /a.json")]));
    let exec = json!({"service": "exec", "command": ["/p"], "options": {"user": "u", "pass word": {"file": "/p/w"}, "t.k": {"env": "T"}}});
    assert_eq!(places(ItemKind::Destination, exec), pairs(&[("options.\"pass word\"", "file /p/w"), ("options.\"t.k\"", "variable T")]));
    let job = json!({
        "destinations": ["x"],
        "drill": {"assert": [{"file": "x", "source": "files"}]},
        "hooks": {"before": [{"command": ["/bin/true"]}]},
        "source": [
            {"files": "/srv", "name": "files"},
            {"postgres": {"dbname": "shop", "password": {"file": "pg"}}},
            {"mysql": {"dbname": "*", "password": {"credential": "my"}}, "references": {"sql": "select 1", "under": "files"}},
            {"postgres": {"dbname": "open"}},
        ],
    });
    assert_eq!(
        places(ItemKind::Job, job),
        pairs(&[("source[1].postgres.password", "file /etc/keepd/pg"), ("source[2].mysql.password", "credential my")])
    );
    let profile = json!({"key_file": "main.key", "retired": ["old.key", "/k/older.key"], "public_key": "./read.pub"});
    assert_eq!(
        places(ItemKind::Encryption, profile),
        pairs(&[
            ("key_file", "file /etc/keepd/main.key"),
            ("public_key", "file /etc/keepd/read.pub"),
            ("retired[0]", "file /etc/keepd/old.key"),
            ("retired[1]", "file /k/older.key"),
        ])
    );
    assert_eq!(places(ItemKind::Encryption, json!({"credential": "main"})), pairs(&[("credential", "credential main")]));
    let token = json!({"pkcs11": {"module": "/m.so", "token": "t", "key": "k", "pin": {"env": "PIN"}}});
    assert_eq!(kept_by_token(&item(ItemKind::Encryption), &token).unwrap(), "key 'k' of token 't'");
    assert_eq!(places(ItemKind::Encryption, token), pairs(&[("pkcs11.pin", "variable PIN")]));
    assert_eq!(places(ItemKind::Encryption, json!({"passphrase": {"file": "p"}})), pairs(&[("passphrase", "file /etc/keepd/p")]));
}

#[test]
fn what_is_written_otherwise_names_none() {
    for value in [
        json!([]),
        json!({"service": 1, "key": "/x", "a": {"file": 1}, "b": {"file": "x", "env": "y"}, "c": {"path": "x"}, "d": {}, "options": {"p": {"file": "x"}}}),
        json!({"source": {"postgres": {"password": {"file": "x"}}}}),
        json!({"source": [1, {"postgres": 1}, {"postgres": {"password": "x"}}, {"sqlite": {"password": {"file": "x"}}}]}),
        json!({"key_file": ["x"], "retired": "x", "pkcs11": "x", "passphrase": "x", "credential": {"file": "x"}}),
    ] {
        for kind in [ItemKind::Job, ItemKind::Encryption, ItemKind::Settings, ItemKind::Schedule] {
            assert_eq!(places(kind, value.clone()), [], "{value}");
        }
    }
    let odd = json!({"service": "sftp", "key": {"file": "x"}, "options": {"p": {"file": "y"}}, "endpoint": "h"});
    assert_eq!(places(ItemKind::Destination, odd).len(), 1);
}

#[test]
fn references_are_replaced_where_they_stand() {
    let changed = |mut value: Value, at: &str, reference: Value| replace(&mut value, at, reference).map(|()| value);
    let new = json!({"file": "secrets/x"});
    assert_eq!(
        changed(json!({"source": [{}, {"postgres": {"password": {"env": "P"}}}]}), "source[1].postgres.password", new.clone()).unwrap(),
        json!({"source": [{}, {"postgres": {"password": new}}]})
    );
    let exec = json!({"options": {"a.\"b": {"env": "P"}, "c": 1}});
    let at = of(&item(ItemKind::Destination), &json!({"service": "exec", "options": exec["options"]}), "/".as_ref()).remove(0).at;
    assert_eq!(changed(exec, &at, new.clone()).unwrap(), json!({"options": {"a.\"b": new, "c": 1}}));
    assert_eq!(changed(json!({"retired": ["a", "b"]}), "retired[1]", json!("c")).unwrap(), json!({"retired": ["a", "c"]}));
    assert_eq!(
        changed(json!({"credential": "main", "retired": []}), "credential", json!("k")).unwrap(),
        json!({"key_file": "k", "retired": []})
    );
    assert_eq!(changed(json!({"credential": {"env": "X"}}), "credential", new.clone()).unwrap(), json!({"credential": new}));
    for at in ["", ".", "a.", "[", "[x]", "source[2]", "source[1].mysql.password", "\"", "a\"b", "source[99999999999999999999]"] {
        assert!(changed(json!({"source": [{}, {"postgres": {}}], "a": 1}), at, new.clone()).is_err(), "{at}");
    }
}

#[test]
fn values_are_read_as_the_daemon_reads_them_and_errors_name_places_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let read_at = |kind, form, name: &str| {
        let named = Named { at: "x".into(), kind, form, source: SecretSource::File(path(name)) };
        read(&named).map(|text| text.to_string())
    };
    fs::write(path("word"), "hunter2\n").unwrap();
    fs::set_permissions(path("word"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(read_at(SecretKind::Secret, Form::Table, "word").unwrap(), "hunter2");
    assert_eq!(
        read_at(SecretKind::Secret, Form::AbsolutePath, "word").unwrap(),
        "hunter2\n",
        "a file that is opened by others stays as it is"
    );
    key_file::generate_pair(&path("pair")).unwrap();
    key_file::generate(&path("main.key")).unwrap();
    let key = read_at(SecretKind::KeyFile, Form::Path, "main.key").unwrap();
    assert_eq!(key, fs::read_to_string(path("main.key")).unwrap());
    // Another comment is the same key.
    let line = key.lines().last().unwrap();
    fs::write(path("bare.key"), format!("# mine\n{line}")).unwrap();
    fs::set_permissions(path("bare.key"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(read_at(SecretKind::KeyFile, Form::Path, "bare.key").unwrap(), key);
    let public = read_at(SecretKind::PublicKey, Form::Path, "pair.pub").unwrap();
    assert_eq!(public, fs::read_to_string(path("pair.pub")).unwrap());
    check(SecretKind::KeyFile, &key).unwrap();
    check(SecretKind::PublicKey, &public).unwrap();
    for (kind, text) in
        [(SecretKind::KeyFile, public.as_str()), (SecretKind::PublicKey, &key), (SecretKind::KeyFile, "hunter2"), (SecretKind::KeyFile, "")]
    {
        let told = check(kind, text).unwrap_err();
        assert!(!told.contains("hunter2") && !told.contains(line), "{told}");
    }

    fs::write(path("empty"), "\n").unwrap();
    fs::write(path("long"), "x".repeat(65 << 10)).unwrap();
    fs::write(path("open.key"), &key).unwrap();
    fs::set_permissions(path("open.key"), fs::Permissions::from_mode(0o644)).unwrap();
    for (kind, name, wanted) in [
        (SecretKind::Secret, "none", "cannot open"),
        (SecretKind::Secret, "empty", "is empty"),
        (SecretKind::Secret, "long", "longer than any secret"),
        (SecretKind::KeyFile, "word", "is not a key file"),
        (SecretKind::KeyFile, "open.key", "can be read or changed by others"),
        (SecretKind::KeyFile, "none", "there is no key file"),
        (SecretKind::PublicKey, "main.key", "is the key file"),
    ] {
        let told = read_at(kind, Form::Table, name).unwrap_err();
        let is_named = told.contains(&path(name).display().to_string()) && !told.contains("hunter2") && !told.contains(line);
        assert!(is_named && (told.contains(wanted) || kind == SecretKind::PublicKey), "{told}");
    }
    let variable =
        Named { at: "x".into(), kind: SecretKind::Secret, form: Form::Table, source: SecretSource::Environment("KEEPD_NO_SUCH".into()) };
    assert!(read(&variable).unwrap_err().contains("KEEPD_NO_SUCH"));
}
