//! A new master key for a repository that lives: through the real binaries, beside backups, killed in the middle, and attacked with the old key.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::*;

fn slots(keepd: &Keepd) -> Vec<(String, Vec<u8>)> {
    let mut found: Vec<_> = fs::read_dir(keepd.path("repository/keys"))
        .unwrap()
        .map(|e| e.unwrap())
        .map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap()))
        .collect();
    found.sort();
    found
}

/// What the independent decoder makes of the repository.
fn decoder(repository: &Path, key: &Path, arguments: &[&str]) -> (bool, String) {
    let mut command = Command::new(python());
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("kit/keepd_decoder.py")).arg(repository).arg("--key").arg(key);
    let out = command.args(arguments).output().unwrap();
    (out.status.success(), text(&out))
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(120), "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn everything_opens_with_the_new_key_and_nothing_with_the_old() {
    let mut keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    fs::write(keepd.path("files/new"), noise(300_000, 7)).unwrap();
    keepd.ok(&["backup", "shop", "--label", "tag=second"]);
    let before = keepd.json(&["list"]);
    let ids = keepd.backups();
    keepd.ok(&["pin", &ids[1]]);
    let old_slots = slots(&keepd);
    let old_packs = keepd.packs();

    let told = keepd.ok(&["key", "re-encrypt", "local", "--yes"]);
    assert!(told.contains("new master key"), "{told}");

    assert_eq!(keepd.backups(), ids, "backups go by the ids they had");
    let after = keepd.json(&["list"]);
    for (a, b) in before.as_array().unwrap().iter().zip(after.as_array().unwrap()) {
        for key in ["id", "job", "time", "type", "outcome", "sources", "bytes", "labels"] {
            assert_eq!(a[key], b[key], "{key}");
        }
    }
    assert_eq!(after[1]["pinned"], true);
    keepd.ok(&["check", "local", "--read-data"]);
    assert!(keepd.packs().iter().all(|pack| !old_packs.contains(pack)), "no pack is as it was");
    assert_same(&keepd.path("files"), &keepd.restored("latest").join("files"));
    // The second reader agrees.
    let (good, text) = decoder(&keepd.path("repository"), &keepd.path("main.key"), &["verify"]);
    assert!(good && text.contains("whole"), "{text}");
    // Deduplication and increments go on.
    let added = keepd.packs().len();
    keepd.ok(&["backup", "shop"]);
    assert!(keepd.packs().len() <= added + 2);

    // Somebody who had the old slots, and can write to the storage, puts them back: nothing is written with the old key.
    let new_slots = slots(&keepd);
    assert_eq!(new_slots.len(), 1);
    assert_ne!(new_slots, old_slots);
    keepd.stop();
    let keys = keepd.path("repository/keys");
    fs::remove_file(keys.join(&new_slots[0].0)).unwrap();
    fs::write(keys.join(&old_slots[0].0), &old_slots[0].1).unwrap();
    let (good, text) = decoder(&keepd.path("repository"), &keepd.path("main.key"), &["list"]);
    assert!(!good && !text.contains("Traceback"), "the old key opens nothing: {text}");
    keepd.start();
    let refused = keepd.fails(1, &["backup", "shop"]);
    assert!(refused.contains("from before the end of a re-encryption"), "{refused}");
    // Both there: the newer one counts.
    fs::write(keys.join(&new_slots[0].0), &new_slots[0].1).unwrap();
    keepd.ok(&["backup", "shop"]);
    keepd.ok(&["check", "local", "--read-data"]);
}

#[test]
fn it_goes_on_beside_backups_and_after_being_killed() {
    let mut keepd = Keepd::started();
    for n in 0..12u64 {
        fs::write(keepd.path(&format!("files/large-{n}")), noise(16 << 20, n + 100)).unwrap();
    }
    keepd.ok(&["backup", "shop"]);
    let before = keepd.packs();
    keepd.ok(&["key", "re-encrypt", "local", "--yes", "--detach"]);
    let (mut kills, mut made, mut during) = (0, 1, Vec::new());
    let state = |keepd: &Keepd| -> (String, usize) {
        let runs = keepd.json(&["run", "list"]);
        let runs = runs.as_array().unwrap().clone();
        let of: Vec<_> = runs.iter().filter(|r| r["kind"] == "re-encrypt").collect();
        (of[0]["state"].as_str().unwrap().to_owned(), of.len())
    };
    while kills < 4 {
        std::thread::sleep(Duration::from_millis(150 + 170 * kills));
        if state(&keepd).0 == "good" {
            break;
        }
        keepd.kill();
        if slots(&keepd).len() == 1 {
            during = slots(&keepd);
        }
        keepd.start();
        kills += 1;
        if kills == 2 {
            // A backup has its turn before the end.
            fs::write(keepd.path("files/between"), b"between").unwrap();
            keepd.ok(&["backup", "shop"]);
            made += 1;
        }
    }
    assert!(kills > 0, "it was over before it could be killed");
    wait_until("it goes on by itself and ends", || state(&keepd).0 == "good");
    assert!(keepd.packs().iter().all(|pack| !before.contains(pack)));
    assert_eq!(slots(&keepd).len(), 1);
    assert_eq!(keepd.backups().len(), made);
    keepd.ok(&["check", "local", "--read-data"]);
    assert_same(&keepd.path("files"), &keepd.restored("latest").join("files"));
    println!("killed {kills} times");
    // A slot from then has the old key beside the new one: it revives nothing.
    let now = slots(&keepd);
    if during.is_empty() || during == now {
        return;
    }
    let keys = keepd.path("repository/keys");
    keepd.stop();
    fs::write(keys.join(&during[0].0), &during[0].1).unwrap();
    keepd.start();
    let refused = keepd.fails(1, &["backup", "shop"]);
    assert!(refused.contains("from before the end of a re-encryption"), "{refused}");
    // What is there can be had, and with that slot gone all is as it was.
    assert_same(&keepd.path("files"), &keepd.restored("latest").join("files"));
    fs::remove_file(keys.join(&during[0].0)).unwrap();
    keepd.ok(&["backup", "shop"]);
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_changed() {
    let mut keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    let before = slots(&keepd);
    keepd.fails(1, &["key", "re-encrypt", "nowhere", "--yes"]);
    // A damaged pack is found before its good copy elsewhere would be needed and gone.
    let pack = keepd.damage_a_pack();
    let told = keepd.fails(1, &["key", "re-encrypt", "local", "--yes"]);
    assert!(told.contains("check"), "{told}");
    assert!(pack.exists(), "what may be repaired stays");
    keepd.stop();
    let toml = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), toml.replace("encryption = \"main\"", "encryption = \"main\"\nappend_only = true")).unwrap();
    keepd.start();
    // The start goes on with what was begun, which may still be on its way to the same refusal.
    let since = std::time::Instant::now();
    let told = loop {
        let told = keepd.fails(1, &["key", "re-encrypt", "local", "--yes"]);
        if !told.contains("already") || since.elapsed().as_secs() > 20 {
            break told;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    assert!(told.contains("append_only"), "{told}");
    assert_eq!(before.len(), 1);
}
