//! Captures of real databases, with real writers.

mod increments;
mod live;
mod measure;
mod trouble;

use std::collections::HashSet;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use keepd_protocol::model::Level;
use rusqlite::Connection;
use serde_json::json;

use super::test_sink::{Stage, fill, listing};
use super::*;
use crate::repository::Segment;

#[test]
fn every_page_size_and_journal_comes_back_byte_for_byte() {
    for journal in ["WAL", "DELETE"] {
        for page_size in [512, 4096, 65536] {
            let mut stage = Stage::new();
            let db = stage.open();
            db.execute_batch(&format!(
                "PRAGMA page_size = {page_size}; PRAGMA auto_vacuum = FULL; PRAGMA journal_mode = {journal}; PRAGMA user_version = 17; \
                 PRAGMA application_id = 99"
            ))
            .unwrap();
            fill(&db, 3000);
            db.close().unwrap();
            let before = listing(stage.path.parent().unwrap());
            let facts = stage.capture().unwrap();
            assert_eq!(listing(stage.path.parent().unwrap()), before);
            assert!(stage.contents() == before[0].1, "{journal} {page_size}");
            assert_eq!(facts["page_size"], page_size);
            assert_eq!((&facts["user_version"], &facts["application_id"], &facts["encoding"]), (&json!(17), &json!(99), &json!("UTF-8")));
            let stat = stage.path.metadata().unwrap();
            let entry = stage.last();
            assert_eq!((entry.inode, entry.size, entry.mode), (stat.ino(), stat.size(), stat.mode() & 0o7777));
            assert_eq!((entry.mtime.seconds, i64::from(entry.mtime.nanoseconds)), (stat.mtime(), stat.mtime_nsec()));
            assert_eq!(stage.report.bytes.load(Ordering::Relaxed), stat.size());
            // Once more when it is known that nobody writes.
            settle();
            stage.verify = Verify::Full;
            assert_eq!(stage.capture().unwrap()["verified"], "full");
            assert!(stage.contents() == before[0].1, "{journal} {page_size}");
            assert_eq!(listing(stage.path.parent().unwrap()), before);
        }
    }
}

/// Makes a database with something in its `-wal`, as a crash of its application leaves it.
fn crashed(stage: &Stage) {
    let original = stage.dir.path().join("data/original.db");
    let db = Connection::open(&original).unwrap();
    db.execute_batch("PRAGMA journal_mode = WAL; PRAGMA wal_autocheckpoint = 0").unwrap();
    fill(&db, 500);
    let wal = stage.path.with_file_name("app.db-wal");
    std::fs::copy(&original, &stage.path).unwrap();
    std::fs::copy(original.with_file_name("original.db-wal"), &wal).unwrap();
    drop(db);
    std::fs::remove_file(&original).unwrap();
}

#[test]
fn a_left_over_log_is_captured_and_left_alone() {
    let mut stage = Stage::new();
    crashed(&stage);
    let wal = stage.path.with_file_name("app.db-wal");
    let before = (std::fs::read(&stage.path).unwrap(), std::fs::read(&wal).unwrap());
    assert!(before.1.len() > 100_000);
    let facts = stage.capture().unwrap();
    assert_eq!(facts["tables"], json!({ "item": 500 }));
    assert_eq!((std::fs::read(&stage.path).unwrap(), std::fs::read(&wal).unwrap()), before);
    let rows: i64 = stage.restore().query_row("SELECT count(*) FROM item", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 500);
}

/// Until an equal signature means an equal database.
fn settle() {
    std::thread::sleep(Duration::from_millis(250));
}

#[test]
fn any_name_is_opened() {
    for journal in ["WAL", "DELETE"] {
        for name in [&b"what?mode=memory#1%41.db"[..], b"caf\xe9 \xff.db", b"file:x.db", b" "] {
            let mut stage = Stage::new();
            let plain = stage.open();
            plain.execute_batch(&format!("PRAGMA journal_mode = {journal}")).unwrap();
            fill(&plain, 10);
            plain.close().unwrap();
            let path = stage.path.with_file_name(std::ffi::OsStr::from_bytes(name));
            std::fs::rename(&stage.path, &path).unwrap();
            stage.path = path;
            assert_eq!(stage.capture().unwrap()["tables"], json!({ "item": 10 }));
            stage.restore();
        }
    }
}
