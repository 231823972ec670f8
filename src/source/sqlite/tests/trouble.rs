//! What is in the way of a capture, and what is said about it.

use super::super::*;
use super::*;

#[test]
fn what_is_no_database_is_refused() {
    let mut stage = Stage::new();
    assert!(stage.failure().contains("does not exist"));
    for junk in ["hello", &"Dear diary, ".repeat(1000)] {
        std::fs::write(&stage.path, junk).unwrap();
        let text = stage.failure();
        assert!(text.contains("not an SQLite database") && text.contains("app.db"), "{text}");
    }
    let mut junk = vec![0xa5u8; 8192];
    junk[..16].copy_from_slice(b"SQLite format 3\0");
    std::fs::write(&stage.path, &junk).unwrap();
    assert!(stage.failure().contains("app.db"));
    stage.path = stage.path.parent().unwrap().to_path_buf();
    assert!(stage.failure().contains("a directory"));
    stage.path = stage.path.join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &stage.path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(stage.failure().contains("a named pipe"));
    assert!(stage.sink.entries.is_empty());
}

#[test]
fn an_empty_file_is_an_empty_database() {
    let mut stage = Stage::new();
    std::fs::write(&stage.path, "").unwrap();
    stage.capture().unwrap();
    assert_eq!((stage.last().size, stage.last().content.segments.len()), (0, 0));
    assert!(stage.messages(Level::Warning)[0].contains("no tables"));
    // And one with a header but no table.
    stage.open().execute_batch("PRAGMA user_version = 1").unwrap();
    stage.capture().unwrap();
    assert!(stage.messages(Level::Warning)[0].contains("no tables"));
}

#[test]
fn a_damaged_database_fails_the_check() {
    for journal in ["WAL", "DELETE"] {
        let mut stage = Stage::new();
        let db = stage.open();
        db.execute_batch(&format!("PRAGMA journal_mode = {journal}")).unwrap();
        fill(&db, 5000);
        db.close().unwrap();
        let good = std::fs::read(&stage.path).unwrap();
        let mut bad = good.clone();
        bad[40 * 4096..41 * 4096].fill(0x5a);
        std::fs::write(&stage.path, &bad).unwrap();
        for verify in [Verify::Quick, Verify::Full] {
            stage.verify = verify;
            let text = stage.failure();
            assert!(text.contains("damaged") && text.contains("app.db"), "{text}");
            assert!(stage.sink.entries.is_empty());
        }
        stage.verify = Verify::Off;
        assert_eq!(stage.capture().unwrap()["verified"], "off");
        assert!(stage.contents() == bad, "as it is");
    }
}

#[test]
fn a_locked_database_is_waited_for_but_not_forever() {
    for journal in ["WAL", "DELETE"] {
        let mut stage = Stage::new();
        stage.tuning.busy = Duration::from_millis(300);
        let db = stage.open();
        db.execute_batch(&format!("PRAGMA journal_mode = {journal}; PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE")).unwrap();
        fill(&db, 100);
        db.execute_batch("COMMIT; BEGIN EXCLUSIVE").unwrap();
        let text = stage.failure();
        assert!(text.contains("locked by another program"), "{text}");
        stage.tuning.busy = Duration::from_secs(30);
        let closer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            drop(db);
        });
        stage.capture().unwrap();
        closer.join().unwrap();
        stage.restore();
    }
}

#[test]
fn a_hot_journal_is_told_and_not_touched() {
    let mut stage = Stage::new();
    let db = stage.open();
    db.execute_batch("PRAGMA journal_mode = DELETE; PRAGMA cache_size = 5").unwrap();
    fill(&db, 2000);
    // The state of the files in the middle of a transaction that spilled into the database.
    db.execute_batch("PRAGMA cache_spill = 5; BEGIN; UPDATE item SET body = randomblob(200)").unwrap();
    let names = ["app.db", "app.db-journal"];
    let data = stage.path.parent().unwrap().to_path_buf();
    let crashed: Vec<_> = names.iter().map(|name| std::fs::read(data.join(name)).unwrap()).collect();
    db.execute_batch("ROLLBACK").unwrap();
    drop(db);
    for (name, bytes) in names.iter().zip(&crashed) {
        std::fs::write(data.join(name), bytes).unwrap();
    }
    let text = stage.failure();
    assert!(text.contains("-journal"), "{text}");
    for (name, bytes) in names.iter().zip(&crashed) {
        assert!(std::fs::read(data.join(name)).unwrap() == *bytes);
    }
    stage.open().execute_batch("SELECT * FROM item").unwrap();
    stage.capture().unwrap();
    stage.restore();
}

#[test]
fn cancelling_ends_a_capture() {
    for journal in ["WAL", "DELETE"] {
        let mut stage = Stage::new();
        let db = stage.open();
        db.execute_batch(&format!("PRAGMA journal_mode = {journal}")).unwrap();
        fill(&db, 60_000);
        stage.sink.slow = Duration::from_millis(100);
        stage.verify = Verify::Full;
        let cancel = stage.cancel.clone();
        let canceller = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(150));
            cancel.cancel();
        });
        assert!(matches!(stage.capture(), Err(SourceError::Cancelled)));
        canceller.join().unwrap();
        assert!(stage.sink.entries.is_empty());
        // Nothing holds the database any more.
        db.execute_batch("PRAGMA journal_mode = DELETE").unwrap();
    }
}

#[test]
fn a_schema_that_needs_its_application_is_captured() {
    let mut stage = Stage::new();
    let db = stage.open();
    db.execute_batch("CREATE TABLE t (a TEXT NOT NULL, b INTEGER CHECK (b > 0)); INSERT INTO t VALUES ('x', 1)").unwrap();
    db.execute_batch(
        "PRAGMA writable_schema = ON;
         UPDATE sqlite_schema SET sql = 'CREATE TABLE t (a TEXT NOT NULL COLLATE klingon, b INTEGER CHECK (frobnicate(b)))';",
    )
    .unwrap();
    db.close().unwrap();
    let facts = stage.capture().unwrap();
    assert_eq!((&facts["tables"], &facts["verified"]), (&json!({ "t": 1 }), &json!("quick")));
}

#[test]
fn odd_rows_are_told_and_captured() {
    let mut stage = Stage::new();
    let db = stage.open();
    db.execute_batch("CREATE TABLE t (a TEXT); INSERT INTO t VALUES (NULL); PRAGMA writable_schema = ON").unwrap();
    db.execute_batch("UPDATE sqlite_schema SET sql = 'CREATE TABLE t (a TEXT NOT NULL)'").unwrap();
    db.close().unwrap();
    stage.capture().unwrap();
    assert!(stage.messages(Level::Warning)[0].contains("NULL value in t.a"));
}

#[test]
fn a_transaction_without_a_journal_is_waited_for() {
    // With its journal in memory nothing on disk tells that the file is in the middle of a transaction, except the lock.
    let mut stage = Stage::new();
    let db = stage.open();
    db.execute_batch("PRAGMA journal_mode = MEMORY; PRAGMA cache_size = 5; PRAGMA cache_spill = 5").unwrap();
    fill(&db, 2000);
    db.execute_batch("BEGIN; UPDATE item SET body = zeroblob(200)").unwrap();
    settle();
    stage.tuning.busy = Duration::from_millis(200);
    assert!(stage.failure().contains("locked"));
    db.execute_batch("ROLLBACK").unwrap();
    stage.capture().unwrap();
    let zeros: i64 = stage.restore().query_row("SELECT count(*) FROM item WHERE body = zeroblob(200)", [], |row| row.get(0)).unwrap();
    assert_eq!(zeros, 0);
}

const CAPTURED: &str = "KEEPD_TEST_CAPTURED";

#[test]
fn where_nothing_can_be_written_it_is_read_all_the_same() {
    let stage = Stage::new();
    let data = stage.path.parent().unwrap().to_path_buf();
    for (name, journal) in [("wal.db", "WAL"), ("empty-log.db", "WAL"), ("rollback.db", "DELETE")] {
        let db = Connection::open(data.join(name)).unwrap();
        db.execute_batch(&format!("PRAGMA journal_mode = {journal}")).unwrap();
        fill(&db, 300);
        db.close().unwrap();
    }
    std::fs::write(data.join("empty-log.db-wal"), "").unwrap();
    crashed(&stage);
    let reading = |mode| std::fs::set_permissions(&data, std::fs::Permissions::from_mode(mode)).unwrap();
    let before = listing(&data);
    settle();
    reading(0o555);
    std::fs::set_permissions(stage.dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    for (name, outcome) in
        [("wal.db", "[all is well]"), ("empty-log.db", "[all is well]"), ("rollback.db", "[all is well]"), ("app.db", "-shm")]
    {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "source::sqlite::tests::trouble::capture_process", "--ignored", "--nocapture"])
            .env(CAPTURED, data.join(name));
        command.current_dir("/");
        if rustix::process::geteuid().is_root() {
            // Root may write anywhere, so somebody else does it.
            command.uid(65534).gid(65534);
        }
        let output = match command.output() {
            Ok(output) => output,
            Err(e) => return eprintln!("not tested: this program cannot be run by another user: {e}"),
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(outcome), "{name}: {text}");
    }
    reading(0o755);
    assert_eq!(listing(&data), before);
}

#[test]
#[ignore = "the body of another user's process"]
fn capture_process() {
    let Some(path) = std::env::var_os(CAPTURED) else { return };
    let mut stage = Stage::new();
    stage.path = path.into();
    match stage.capture() {
        Ok(facts) => {
            assert_eq!(facts["tables"], json!({ "item": 300 }));
            stage.restore();
            println!("[all is well]");
        }
        Err(e) => println!("{e}"),
    }
}

#[test]
fn the_loss_of_locks_is_seen() {
    let stage = Stage::new();
    // Without another connection in this process, whose locks would be the same.
    crashed(&stage);
    let database = Database::find(&stage.path).unwrap();
    for name in ["", "-shm"] {
        let before = Signature::take(&database, &database.header().unwrap().unwrap()).unwrap();
        let snapshot = Snapshot::of_wal(&database, before, false, &stage.tuning, &stage.cancel).unwrap();
        assert!(snapshot.held(&database));
        if std::fs::read_to_string("/proc/locks").is_ok() {
            drop(std::fs::File::open(database.beside(name)).unwrap());
            assert!(!snapshot.held(&database), "app.db{name}");
        }
    }
}
