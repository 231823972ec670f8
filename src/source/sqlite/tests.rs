use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rusqlite::Connection;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::source::Report;
use crate::source::files::test_sink::{Last, TestSink};

struct World {
    dir: tempfile::TempDir,
    sink: TestSink,
    last: Vec<Entry>,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("work")).unwrap();
        std::fs::create_dir(dir.path().join("cache")).unwrap();
        Self { dir, sink: TestSink::default(), last: vec![] }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("shop.db")
    }

    fn capture(&mut self, verify: Verify) -> Result<Facts, SourceError> {
        let path = self.path();
        self.capture_at(&path, verify)
    }

    fn capture_at(&mut self, path: &Path, verify: Verify) -> Result<Facts, SourceError> {
        let (cancel, report) = (CancellationToken::new(), Report::default());
        let (work, cache) = (self.dir.path().join("work"), self.dir.path().join("cache"));
        let context = Context { cancel: &cancel, report: &report, work_dir: &work, cache_dir: &cache };
        self.sink.entries.clear();
        self.sink.stored_bytes = 0;
        let source = SqliteSource { path: path.into(), verify };
        let facts = capture(&source, &mut Last(self.last.clone().into()), &mut self.sink, &context)?;
        self.last.clone_from(&self.sink.entries);
        assert_eq!(std::fs::read_dir(&work).unwrap().count(), 0, "nothing staged stays behind");
        Ok(facts)
    }

    /// The captured database, restored and opened.
    fn restored(&self) -> Connection {
        let path = self.dir.path().join("restored.db");
        for suffix in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(format!("{}{suffix}", path.display()));
        }
        std::fs::write(&path, self.sink.contents(&self.last[0])).unwrap();
        let db = Connection::open(&path).unwrap();
        let ok: String = db.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
        assert_eq!(ok, "ok");
        db
    }
}

fn make(path: &Path, journal: &str, page_size: u32, rows: usize) -> Connection {
    let db = Connection::open(path).unwrap();
    db.execute_batch(&format!("PRAGMA page_size = {page_size}; PRAGMA journal_mode = {journal}; CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL, note TEXT)")).unwrap();
    db.execute_batch("BEGIN").unwrap();
    for n in 0..rows {
        db.execute("INSERT INTO account VALUES (?1, 100, ?2)", rusqlite::params![n as i64, format!("note {n} {}", "x".repeat(150))])
            .unwrap();
    }
    db.execute_batch("COMMIT").unwrap();
    db
}

fn sum(db: &Connection) -> i64 {
    db.query_row("SELECT sum(balance) FROM account", [], |r| r.get(0)).unwrap()
}

#[test]
fn a_capture_under_a_live_writer_is_one_moment() {
    for journal in ["WAL", "DELETE", "TRUNCATE", "PERSIST"] {
        let mut world = World::new();
        let db = make(&world.path(), journal, 4096, 3000);
        drop(db);
        let (path, stop, transfers) = (world.path(), AtomicBool::new(false), std::sync::atomic::AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let db = Connection::open(&path).unwrap();
                db.busy_timeout(std::time::Duration::from_secs(20)).unwrap();
                db.execute_batch("PRAGMA synchronous = OFF").unwrap();
                let mut n = 7u64;
                while !stop.load(Ordering::Relaxed) {
                    n = n.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let (a, b) = ((n >> 33) % 3000, (n >> 13) % 3000);
                    // Money moves and notes grow: a torn copy has another sum, or is no database.
                    let sql = format!("BEGIN IMMEDIATE; UPDATE account SET balance = balance - 1, note = note || 'y' WHERE id = {a}; UPDATE account SET balance = balance + 1 WHERE id = {b}; COMMIT");
                    db.execute_batch(&sql).unwrap();
                    transfers.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(std::time::Duration::from_micros(500));
                }
            });
            for _ in 0..6 {
                let before = transfers.load(Ordering::Relaxed);
                world.capture(Verify::Quick).unwrap();
                assert_eq!(sum(&world.restored()), 300_000, "{journal}");
                while transfers.load(Ordering::Relaxed) < before + 20 {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}

#[test]
fn only_changed_pages_are_stored_and_an_unchanged_database_is_not_read() {
    for (page_size, journal) in [(512, "WAL"), (4096, "WAL"), (65536, "WAL"), (4096, "DELETE")] {
        let mut world = World::new();
        let db = make(&world.path(), journal, page_size, 20_000);
        world.capture(Verify::Quick).unwrap();
        let first = world.sink.stored_bytes;
        assert!(first >= 3_000_000, "{first}");
        let facts = world.capture(Verify::Quick).unwrap();
        assert_eq!((facts["unchanged"].as_bool(), world.sink.stored_bytes), (Some(true), 0));
        assert_eq!(facts["tables"]["account"].as_u64(), Some(20_000));
        db.execute_batch("UPDATE account SET balance = 200 WHERE id = 10000").unwrap();
        let facts = world.capture(Verify::Quick).unwrap();
        assert!(!facts.contains_key("unchanged"));
        assert!(facts["changed_pages"].as_u64().unwrap() <= 4, "{facts:?}");
        assert!(world.sink.stored_bytes <= 4 * page_size as usize);
        assert_eq!(sum(&world.restored()), 2_000_100);
        // The map is lost, or damaged: made again from the repository, and still only what changed is stored.
        for lose in [true, false] {
            let map = world.dir.path().join("cache/page-map");
            if lose {
                std::fs::remove_file(&map).unwrap();
            } else {
                let mut bytes = std::fs::read(&map).unwrap();
                bytes[40] ^= 1;
                std::fs::write(&map, bytes).unwrap();
            }
            db.execute_batch("UPDATE account SET balance = balance + 1 WHERE id = 5").unwrap();
            world.capture(Verify::Quick).unwrap();
            assert!(world.sink.stored_bytes <= 4 * page_size as usize, "{}", world.sink.stored_bytes);
            world.restored();
        }
        db.execute_batch("DELETE FROM account WHERE id > 9999; VACUUM").unwrap();
        world.capture(Verify::Full).unwrap();
        assert_eq!(sum(&world.restored()), 1_000_002);
    }
}

#[test]
fn what_is_still_in_the_wal_is_captured_and_the_files_are_left_alone() {
    let mut world = World::new();
    let db = make(&world.path(), "WAL", 4096, 10);
    db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE); PRAGMA wal_autocheckpoint = 0; UPDATE account SET balance = 500 WHERE id = 1")
        .unwrap();
    // The application is killed: its files stay as they are.
    let other = world.dir.path().join("killed.db");
    for suffix in ["", "-wal"] {
        std::fs::copy(format!("{}{suffix}", world.path().display()), format!("{}{suffix}", other.display())).unwrap();
    }
    drop(db);
    let files = |suffix: &str| std::fs::read(format!("{}{suffix}", other.display())).unwrap();
    let before = (files(""), files("-wal"));
    world.capture_at(&other, Verify::Quick).unwrap();
    assert_eq!(sum(&world.restored()), 1400);
    assert!((files(""), files("-wal")) == before, "the user's files were touched");
}

#[test]
fn what_is_no_sound_database_is_a_clear_error() {
    let mut world = World::new();
    let told = |world: &mut World, verify| world.capture(verify).unwrap_err().to_string();
    assert!(told(&mut world, Verify::Quick).contains("cannot be found"));
    std::fs::write(
        world.path(),
        "this is a text that somebody wrote over the database, longer than a hundred bytes, so that it has a header's length",
    )
    .unwrap();
    assert!(told(&mut world, Verify::Quick).contains("no SQLite database"));
    std::fs::write(world.path(), "").unwrap();
    world.capture(Verify::Quick).unwrap();
    assert_eq!(world.last[0].size, 0);
    std::fs::remove_file(world.path()).unwrap();
    drop(make(&world.path(), "DELETE", 4096, 5000));
    let mut bytes = std::fs::read(world.path()).unwrap();
    bytes[200_000..240_000].fill(0x55);
    std::fs::write(world.path(), bytes).unwrap();
    assert!(told(&mut world, Verify::Quick).contains("found damage"));
    std::fs::remove_file(world.path()).unwrap();
    std::fs::create_dir(world.path()).unwrap();
    assert!(told(&mut world, Verify::Quick).contains("no regular file"));
}

#[test]
fn odd_names_work() {
    let mut world = World::new();
    for name in [&b"a?b#c%20.db"[..], b"bad\xff.db", "naïve & so.db".as_bytes()] {
        let path = world.dir.path().join(std::ffi::OsStr::from_bytes(name));
        let plain = world.dir.path().join("plain.db");
        drop(make(&plain, "WAL", 4096, 10));
        std::fs::rename(plain, &path).unwrap();
        world.last.clear();
        world.capture_at(&path, Verify::Quick).unwrap();
        assert_eq!(sum(&world.restored()), 1000);
    }
}

#[test]
fn many_increments_do_not_scatter_a_database_without_bound() {
    let mut world = World::new();
    let db = make(&world.path(), "WAL", 4096, 40_000);
    let mut n = 1u64;
    for _ in 0..60 {
        for _ in 0..400 {
            n = n.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            db.execute(
                "UPDATE account SET balance = balance + 0, note = 'n' || ?1 || substr(note, 20) WHERE id = ?2",
                rusqlite::params![n as i64, ((n >> 33) % 40_000) as i64],
            )
            .unwrap();
        }
        world.capture(Verify::Off).unwrap();
    }
    let mut chunks: Vec<_> = world.last[0]
        .content
        .segments
        .iter()
        .map(|s| if let crate::repository::Segment::Data(x) = s { x.chunk } else { unreachable!() })
        .collect();
    chunks.sort();
    chunks.dedup();
    let referred: usize = chunks.iter().map(|c| world.sink.chunks[c].len()).sum();
    let size = world.last[0].size as usize;
    assert!(referred <= 2 * size + (10 << 20), "{referred} bytes of chunks for a database of {size}");
    assert_eq!(sum(&world.restored()), 4_000_000);
}

#[test]
fn a_database_that_stays_locked_is_waited_for() {
    let mut world = World::new();
    let db = make(&world.path(), "DELETE", 4096, 100);
    db.execute_batch("BEGIN EXCLUSIVE").unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_secs(2));
            db.execute_batch("COMMIT").unwrap();
            drop(db);
        });
        world.capture(Verify::Quick).unwrap();
    });
    assert_eq!(sum(&world.restored()), 10_000);
}
