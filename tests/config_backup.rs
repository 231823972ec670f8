//! The configuration backed up by the daemon itself: by the calendar, after changes, into repositories and beside archives; and what check, prune and re-encryption make of it.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::*;
use serde_json::Value;

/// The configuration of the tests' daemon with a further table.
fn configure(keepd: &Keepd, config_backup: &str) {
    keepd.configure("", "");
    let path = keepd.path("keepd.toml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(path, format!("{text}\n[config_backup]\n{config_backup}\n")).unwrap();
}

fn started(config_backup: &str) -> Keepd {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 50);
    fs::write(keepd.path("files/note"), "a note").unwrap();
    configure(&keepd, config_backup);
    keepd.start();
    keepd
}

fn stored(directory: &Path) -> Vec<PathBuf> {
    let mut found = files_below(&directory.join("config"));
    found.sort();
    found
}

fn runs(keepd: &Keepd) -> Vec<Value> {
    let all = keepd.json(&["run", "list"]);
    all.as_array().unwrap().iter().filter(|r| r["kind"] == "config-backup").cloned().collect()
}

fn wait_for(keepd: &Keepd, what: &str, mut is: impl FnMut() -> bool) {
    let since = Instant::now();
    while !is() {
        assert!(since.elapsed() < Duration::from_secs(60), "{what}: {}", keepd.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn decoded(place: &Path, key: &Path) -> (bool, String) {
    let mut command = Command::new(python());
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("kit/keepd_decoder.py")).arg(place).arg("--key").arg(key).arg("config");
    let out = command.output().unwrap();
    (out.status.success(), text(&out))
}

fn opened(place: &Path, key: &Path) -> Value {
    let (good, text) = decoded(place, key);
    assert!(good, "{text}");
    serde_json::from_str(&text).unwrap()
}

#[test]
fn the_calendar_stores_it_and_rules_remove_the_old() {
    let keepd = started("every = \"1s\"\ndestination = \"local\"\ninclude_secrets = true\nretention = { keep_last = 2 }");
    let repository = keepd.path("repository");
    wait_for(&keepd, "four runs", || runs(&keepd).iter().filter(|r| r["state"] == "good").count() >= 4);
    let there = stored(&repository);
    assert!((2..=3).contains(&there.len()), "{there:?}");
    let name = there[0].file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with("config_backup_20") && name.ends_with("Z.json.gz.enc"), "{name}");
    let newest = opened(&repository, &keepd.path("main.key"));
    assert_eq!((&newest["includes_secrets"], &newest["export_type"]), (&true.into(), &"all".into()));
    let main = newest["items"].as_array().unwrap().iter().find(|i| i["type"] == "encryption").unwrap();
    assert_eq!(main["secrets"][0]["value"], fs::read_to_string(keepd.path("main.key")).unwrap());
    assert_eq!(runs(&keepd)[0]["by"], "schedule");

    // It began before any repository was there, and is in nobody's way.
    keepd.ok(&["backup", "shop"]);
    keepd.ok(&["prune", "local"]);
    assert!(keepd.ok(&["check", "local", "--read-data"]).contains("stored configurations open"));
    assert!(!stored(&repository).is_empty());
    let status = keepd.json(&["status"]);
    let kept = &status["config_backup"];
    assert_eq!((&kept["destination"], &kept["last_outcome"]), (&"local".into(), &"good".into()));
    assert!(kept["next"].is_string() && kept["last_good"].is_string(), "{kept}");
    assert!(keepd.ok(&["status"]).contains("configuration to local: good"));
}

#[test]
fn a_change_stores_it_and_what_is_damaged_is_told() {
    let mut keepd = started("on_change = true\ndestination = \"local\"");
    let repository = keepd.path("repository");
    wait_for(&keepd, "the first", || stored(&repository).len() == 1 && runs(&keepd)[0]["state"] == "good");
    let first = opened(&repository, &keepd.path("main.key"));
    assert_eq!(first["includes_secrets"], false);
    assert!(!first.to_string().contains("keepd-key-1"));
    keepd.ok(&["reload"]);
    keepd.stop();
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!((stored(&repository).len(), runs(&keepd).len()), (1, 1), "nothing changed");
    configure(&keepd, "on_change = true\ndestination = \"local\"\ntimezone = \"UTC\"");
    keepd.ok(&["reload"]);
    wait_for(&keepd, "the second", || stored(&repository).len() == 2);
    // One that vanished is stored again.
    wait_for(&keepd, "its end", || runs(&keepd).iter().all(|r| r["state"] == "good"));
    fs::remove_file(stored(&repository).pop().unwrap()).unwrap();
    keepd.ok(&["reload"]);
    wait_for(&keepd, "the second again", || stored(&repository).len() == 2 && runs(&keepd).len() == 3);
    wait_for(&keepd, "its end", || runs(&keepd).iter().all(|r| r["state"] == "good"));
    // One that is refused changes nothing.
    configure(&keepd, "on_change = true\ndestination = \"nowhere\"");
    keepd.fails(1, &["reload"]);
    assert_eq!(stored(&repository).len(), 2);

    configure(&keepd, "on_change = false\ndestination = \"local\"");
    keepd.ok(&["reload"]);
    keepd.ok(&["check", "local"]);
    let newest = stored(&repository).pop().unwrap();
    let mut bytes = fs::read(&newest).unwrap();
    let at = bytes.len() - 20;
    bytes[at] ^= 1;
    fs::write(&newest, bytes).unwrap();
    let oldest = stored(&repository).remove(0);
    let whole = fs::read(&oldest).unwrap();
    let mut bytes = whole.clone();
    let at = bytes.windows(11).position(|w| w == b"\"wrapped\":\"").unwrap() + 11;
    bytes[at] = if bytes[at] == b'0' { b'1' } else { b'0' };
    fs::write(&oldest, bytes).unwrap();
    let (good, told) = decoded(&repository, &keepd.path("main.key"));
    assert!(!good && told.contains("does not open"), "{told}");
    let out = keepd.ctl(&["check", "local"]);
    let told = text(&out);
    assert!(!out.status.success() && told.contains("2 stored configurations are damaged"), "{told}");
    for damaged in [&newest, &oldest] {
        assert!(told.contains(damaged.file_name().unwrap().to_str().unwrap()), "{told}");
    }
    fs::write(oldest, whole).unwrap();
    fs::remove_file(newest).unwrap();
    let told = text_of(&keepd, &["check", "local"]);
    assert!(
        told.contains("1 stored configurations are damaged or missing") && told.contains("is missing; keepctl config backup"),
        "{told}"
    );
    keepd.ok(&["destination", "take-over", "local"]);
    keepd.ok(&["check", "local"]);
    // Another key says nothing of it.
    fs::write(keepd.path("repository/config/holiday.jpg"), "foreign").unwrap();
    keepd.ok(&["check", "local"]);
}

#[test]
fn a_secret_that_cannot_be_read_fails_it() {
    let keepd = Keepd::prepared();
    configure(&keepd, "destination = \"plain\"\nencryption = \"main\"\ninclude_secrets = true\nevery = \"1s\"");
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let destination = format!(
        "[destination.plain]\nservice = \"fs\"\nroot = \"{d}/plain\"\nencryption = \"none\"\n[destination.s3]\nservice = \"s3\"\nbucket = \"b\"\nregion = \"r\"\nencryption = \"none\"\n\
         access_key_id = \"a\"\nsecret_access_key = {{ file = \"s3\" }}\n",
        d = keepd.dir.path().display()
    );
    fs::write(keepd.path("keepd.toml"), format!("{text}\n{destination}")).unwrap();
    let mut keepd = keepd;
    keepd.start();
    wait_for(&keepd, "a failed run", || runs(&keepd).iter().any(|r| r["state"] == "failed"));
    let failed = runs(&keepd).into_iter().find(|r| r["state"] == "failed").unwrap();
    let error = failed["error"].as_str().unwrap();
    assert!(error.contains("destination.s3: secret_access_key (file ") && error.contains("nothing was exported"), "{error}");
    assert!(stored(&keepd.path("plain")).is_empty());
    assert!(keepd.ok(&["status"]).contains("configuration to plain: failed"));
    fs::write(keepd.path("s3"), "hunter2").unwrap();
    wait_for(&keepd, "a good run", || runs(&keepd).iter().any(|r| r["state"] == "good"));
    assert!(opened(&keepd.path("plain"), &keepd.path("main.key")).to_string().contains("hunter2"));
    assert!(!keepd.log().contains("hunter2"));
    // The disk is not mounted: nothing is written into the directory below it.
    fs::rename(keepd.path("plain"), keepd.path("unmounted")).unwrap();
    fs::create_dir(keepd.path("plain")).unwrap();
    wait_for(&keepd, "a refusal", || runs(&keepd).iter().any(|r| r["error"].as_str().is_some_and(|e| e.contains("is the disk mounted?"))));
    assert!(stored(&keepd.path("plain")).is_empty());
}

#[test]
fn beside_archives_it_is_left_alone() {
    let keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 50);
    fs::write(keepd.path("files/note"), "a note").unwrap();
    configure(&keepd, "destination = \"local\"\nevery = \"1s\"\nretention = { keep_last = 1 }\nencryption = \"none\"");
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), text.replace("[destination.local]", "[destination.local]\nlayout = \"archive\"")).unwrap();
    let mut keepd = keepd;
    keepd.start();
    let directory = keepd.path("repository");
    wait_for(&keepd, "the first", || stored(&directory).len() == 1);
    keepd.ok(&["backup", "shop"]);
    keepd.ok(&["backup", "shop"]);
    assert!(stored(&directory)[0].to_str().unwrap().ends_with("Z.json.gz"));
    keepd.ok(&["prune", "local"]);
    let told = keepd.ok(&["check", "local", "--read-data"]);
    assert!(told.contains("stored configurations open") && told.contains("no damage found: 2 backups"), "{told}");
    assert_eq!(keepd.backups().len(), 2);
    assert!(!keepd.log().contains("none of keepd's"), "{}", keepd.log());
    keepd.stop();
    fs::remove_dir_all(keepd.path("state")).unwrap();
    keepd.start();
    wait_for(&keepd, "the catalogue", || keepd.backups().len() == 2);
    assert_eq!(opened(&directory, &keepd.path("main.key"))["includes_secrets"], false);
    keepd.restored("latest");
}

#[test]
fn what_other_machines_stored_stays() {
    let keepd = started("every = \"1s\"\ndestination = \"local\"\nretention = { keep_last = 1 }");
    let repository = keepd.path("repository");
    wait_for(&keepd, "the first", || runs(&keepd).iter().any(|r| r["state"] == "good"));
    let others = repository.join("config/config_backup_20200101T000000Z.json.gz.enc");
    fs::copy(&stored(&repository)[0], &others).unwrap();
    let before = runs(&keepd).len();
    wait_for(&keepd, "three more", || runs(&keepd).iter().filter(|r| r["state"] == "good").count() >= before + 3);
    let there = stored(&repository);
    assert!(others.exists() && there.len() <= 3, "{there:?}");
}

#[test]
fn where_nothing_else_is_it_is_checked_and_taken_over() {
    let keepd = started("destination = \"local\"");
    keepd.ok(&["config", "backup"]);
    assert!(keepd.ok(&["check", "local"]).contains("1 stored configurations open"));
    fs::remove_file(&stored(&keepd.path("repository"))[0]).unwrap();
    let told = text_of(&keepd, &["check", "local"]);
    assert!(told.contains("is missing"), "{told}");
    let told = text_of(&keepd, &["config", "backup"]);
    assert!(told.contains("is the disk mounted?"), "{told}");
    keepd.ok(&["destination", "take-over", "local"]);
    // As one that was never used.
    assert!(text_of(&keepd, &["check", "local"]).contains("nothing was backed up to it yet"));
    keepd.ok(&["config", "backup"]);
    keepd.ok(&["check", "local"]);
}

/// Has the profile another key; its old ones become retired ones.
fn give_key(keepd: &Keepd, key: &str, retired: &str) {
    keepd.generate_key(key);
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), text.replace("key_file = \"main.key\"", &format!("key_file = \"{key}\"\nretired = [{retired}]")))
        .unwrap();
    keepd.ok(&["reload"]);
}

#[test]
fn after_a_re_encryption_none_is_left_that_an_old_key_opens() {
    let keepd = started("destination = \"local\"\ninclude_secrets = true");
    let repository = keepd.path("repository");
    keepd.ok(&["backup", "shop"]);
    keepd.ok(&["config", "backup"]);
    let first = stored(&repository).remove(0);
    let others = repository.join("config/config_backup_20200101T000000Z.json.gz.enc");
    fs::copy(&first, &others).unwrap();
    give_key(&keepd, "new.key", "\"main.key\"");
    keepd.ok(&["config", "backup"]);
    let second = stored(&repository).pop().unwrap();
    let told = text_of(&keepd, &["key", "re-encrypt", "local", "--yes"]);
    assert!(told.contains("1 stored configurations that a former key opened were removed"), "{told}");
    assert!(
        told.contains("a former key opens 1 stored configurations at local") && told.contains("this keepd did not store them"),
        "{told}"
    );
    let after = stored(&repository);
    assert!(after.len() == 3 && !first.exists() && second.exists() && others.exists(), "{after:?}");
    opened(&repository, &keepd.path("new.key"));
    // Nobody says that the next one goes there.
    fs::remove_file(others).unwrap();
    configure(&keepd, "destination = \"other\"");
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let other = format!("[destination.other]\nservice = \"fs\"\nroot = \"{}/other\"\nencryption = \"main\"\n", keepd.dir.path().display());
    fs::write(keepd.path("keepd.toml"), format!("{text}\n{other}")).unwrap();
    give_key(&keepd, "third.key", "\"new.key\", \"main.key\"");
    let told = text_of(&keepd, &["key", "re-encrypt", "local", "--yes"]);
    assert!(told.contains("a former key opens 2 stored configurations at local") && told.contains("does not name local"), "{told}");
    assert_eq!(stored(&repository).len(), 2);
}

#[test]
fn configurations_that_a_re_encryption_left_are_seen_to_later() {
    let keepd = started("destination = \"local\"\ninclude_secrets = true");
    keepd.ok(&["backup", "shop"]);
    keepd.ok(&["config", "backup"]);
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let s3 = "[destination.s3]\nservice = \"s3\"\nbucket = \"b\"\nregion = \"r\"\nencryption = \"none\"\naccess_key_id = \"a\"\n\
              secret_access_key = { file = \"s3\" }\n";
    fs::write(keepd.path("keepd.toml"), format!("{text}\n{s3}")).unwrap();
    give_key(&keepd, "new.key", "\"main.key\"");
    let told = text_of(&keepd, &["key", "re-encrypt", "local", "--yes"]);
    assert!(told.contains("an old key may still open configurations"), "{told}");
    fs::write(keepd.path("s3"), "hunter2").unwrap();
    let told = keepd.ok(&["key", "re-encrypt", "local", "--yes"]);
    assert!(told.contains("the backups are sealed anew already") && !told.contains("new master key ("), "{told}");
    assert!(told.contains("1 stored configurations that a former key opened were removed"), "{told}");
    let told = keepd.ok(&["key", "re-encrypt", "local", "--yes"]);
    assert!(told.contains("is sealed with a new master key"), "{told}");
}

fn text_of(keepd: &Keepd, arguments: &[&str]) -> String {
    text(&keepd.ctl(arguments))
}
