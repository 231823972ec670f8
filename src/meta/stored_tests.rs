//! Stored configurations: their names, what lies beside them, and which of them go.

use std::collections::BTreeMap;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::stored::*;
use crate::config::{Destination, Retention};
use crate::storage::{Storage, StorageError};

struct World {
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

impl World {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), runtime: tokio::runtime::Runtime::new().unwrap() }
    }

    fn storage(&self, append_only: bool) -> Storage {
        let root = self.dir.path().to_str().unwrap().into();
        let destination = Destination { append_only, ..Destination::plain("local", "fs", BTreeMap::from([("root".to_owned(), root)])) };
        Storage::open(&destination, self.runtime.handle().clone()).unwrap()
    }
}

fn t(text: &str) -> Timestamp {
    text.parse().unwrap()
}

#[test]
fn names_say_when_and_a_taken_one_gets_the_next_second() {
    let world = World::new();
    let storage = world.storage(false);
    assert_eq!(newest(&storage).unwrap(), None);
    let now = t("2026-11-22T03:45:00.9Z");
    let first = write(&storage, now, true, b"one", |_| Ok::<_, StorageError>(())).unwrap();
    assert_eq!((first.name.as_str(), first.bytes), ("config/config_backup_20261122T034500Z.json.gz.enc", 3));
    let second = write(&storage, now, true, b"two", |_| Ok::<_, StorageError>(())).unwrap();
    assert_eq!(second.name, "config/config_backup_20261122T034501Z.json.gz.enc");
    assert_eq!(second.time, t("2026-11-22T03:45:01Z"));
    let open = write(&storage, t("2026-01-01T00:00:00Z"), false, b"open", |_| Ok::<_, StorageError>(())).unwrap();
    assert_eq!(open.name, "config/config_backup_20260101T000000Z.json.gz");
    for foreign in
        ["config_backup_20261322T034500Z.json.gz", "config_backup_2026.json.gz", "notes.txt", "old/config_backup_20261122T034500Z.json.gz"]
    {
        storage.put_new(&format!("config/{foreign}"), b"x".to_vec()).unwrap();
    }
    let there = look(&storage).unwrap();
    assert_eq!(there.stored, [open, first, second.clone()]);
    assert_eq!(there.foreign.len(), 4);
    assert_eq!(newest(&storage).unwrap().unwrap(), second);
    assert_eq!(&*fetch(&storage, &second.name).unwrap(), b"two");
}

#[test]
fn rules_remove_the_old_and_never_the_newest() {
    let world = World::new();
    let storage = world.storage(false);
    let days = ["2026-11-18", "2026-11-19", "2026-11-20", "2026-11-21"];
    for day in days {
        write(&storage, t(&format!("{day}T02:00:00Z")), true, b"x", |_| Ok::<_, StorageError>(())).unwrap();
    }
    storage.put_new("config/notes.txt", b"x".to_vec()).unwrap();
    let (now, zone) = (t("2026-11-22T00:00:00Z"), TimeZone::UTC);
    let rules = Retention { keep_last: Some(2), ..Retention::default() };
    let there = look(&storage).unwrap();
    let falling = |rules: &Retention, spared: &str, now: Timestamp| falling(&there.stored, rules, spared, now, &zone);
    assert_eq!(falling(&Retention::default(), "", now), [""; 0], "no rules");
    let (first, second) = (name(t("2026-11-18T02:00:00Z"), true), name(t("2026-11-19T02:00:00Z"), true));
    assert_eq!(falling(&rules, &first, now), std::slice::from_ref(&second));
    assert_eq!(falling(&rules, "", now), [first, second]);
    let years = Retention { keep_within: Some(std::time::Duration::from_secs(1)), ..Retention::default() };
    let all_but_the_newest = falling(&years, "", t("2036-01-01T00:00:00Z"));
    assert_eq!((all_but_the_newest.len(), there.foreign.len()), (3, 1), "the newest stays");
    assert!(!all_but_the_newest.contains(&name(t("2026-11-21T02:00:00Z"), true)));
}
