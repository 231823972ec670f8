//! Captures while another process writes.

use super::super::*;
use super::*;

const ACCOUNTS: i64 = 2000;
const WRITER: &str = "KEEPD_TEST_WRITER";

/// A process that moves money between accounts until it is dropped; the sum never changes. A process, as file locks say nothing
/// between the threads of one.
struct Writer {
    child: Child,
    commits: std::path::PathBuf,
}

impl Writer {
    fn start(stage: &Stage, journal: &str, pause: Duration) -> Self {
        let connection = stage.open();
        let _: String = connection.query_row(&format!("PRAGMA journal_mode = {journal}"), [], |row| row.get(0)).unwrap();
        connection.execute_batch("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER, pad BLOB)").unwrap();
        connection
            .execute(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?1)
                 INSERT INTO account SELECT i, 1000, randomblob(700) FROM n",
                [ACCOUNTS],
            )
            .unwrap();
        drop(connection);
        let commits = stage.dir.path().join("commits");
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "source::sqlite::tests::live::writer_process", "--ignored", "--nocapture"])
            .env(WRITER, &stage.path)
            .env("KEEPD_TEST_COMMITS", &commits)
            .env("KEEPD_TEST_JOURNAL", journal)
            .env("KEEPD_TEST_PAUSE", pause.as_millis().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let writer = Self { child, commits };
        writer.wait(1);
        writer
    }

    fn commits(&self) -> u64 {
        std::fs::metadata(&self.commits).map_or(0, |stat| stat.len())
    }

    /// Until it has gone on for so many commits.
    fn wait(&self, commits: u64) {
        let (before, since) = (self.commits(), Instant::now());
        while self.commits() < before + commits {
            assert!(since.elapsed() < Duration::from_secs(60), "the writer is stuck");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let ended = self.child.wait().unwrap();
        assert!(ended.success() || std::thread::panicking(), "the writer failed");
    }
}

#[test]
#[ignore = "the body of the writer's process"]
fn writer_process() {
    let Some(path) = std::env::var_os(WRITER) else { return };
    let setting = |name: &str| std::env::var(name).unwrap();
    let connection = Connection::open(path).unwrap();
    connection.busy_timeout(Duration::from_secs(60)).unwrap();
    let journal = setting("KEEPD_TEST_JOURNAL");
    let _: String = connection.query_row(&format!("PRAGMA journal_mode = {journal}"), [], |row| row.get(0)).unwrap();
    connection.execute_batch("PRAGMA synchronous = OFF").unwrap();
    let mut commits = std::fs::File::create(setting("KEEPD_TEST_COMMITS")).unwrap();
    let pause = Duration::from_millis(setting("KEEPD_TEST_PAUSE").parse().unwrap());
    let stopped = std::thread::spawn(|| std::io::stdin().read_to_end(&mut Vec::new()));
    let mut n = 1u64;
    while !stopped.is_finished() {
        n = n.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let (a, b) = ((n >> 33) as i64 % ACCOUNTS + 1, (n >> 20) as i64 % ACCOUNTS + 1);
        connection
            .execute_batch(&format!(
                "BEGIN IMMEDIATE; UPDATE account SET balance = balance - 7 WHERE id = {a};
                 UPDATE account SET balance = balance + 7, pad = randomblob(700) WHERE id = {b}; COMMIT"
            ))
            .unwrap();
        commits.write_all(b".").unwrap();
        std::thread::sleep(pause);
    }
}

fn sum_is_kept(stage: &Stage) {
    let sum: i64 = stage.restore().query_row("SELECT sum(balance) FROM account", [], |row| row.get(0)).unwrap();
    assert_eq!(sum, ACCOUNTS * 1000);
}

#[test]
fn captures_under_a_writer_are_moments() {
    for (journal, pause) in [("WAL", 0), ("DELETE", 2), ("TRUNCATE", 0), ("PERSIST", 1)] {
        let mut stage = Stage::new();
        let writer = Writer::start(&stage, journal, Duration::from_millis(pause));
        for round in 0..8 {
            writer.wait(5);
            // Now and then the check has to do with the connection that reads the pages.
            stage.tuning.twin_tries = if round % 4 == 3 { 0 } else { 100 };
            let facts = stage.capture().unwrap();
            assert_eq!(facts["journal_mode"], if journal == "WAL" { "wal" } else { "rollback" });
            assert_eq!(facts["verified"], "quick");
            assert_eq!(facts["tables"], json!({ "account": ACCOUNTS }));
            sum_is_kept(&stage);
        }
        assert!(writer.commits() > 30);
    }
}

#[test]
fn a_slow_sink_blocks_no_writer() {
    let mut stage = Stage::new();
    let writer = Writer::start(&stage, "WAL", Duration::ZERO);
    stage.sink.slow = Duration::from_millis(150);
    let before = writer.commits();
    stage.capture().unwrap();
    assert!(writer.commits() > before);
    sum_is_kept(&stage);
}

#[test]
fn an_idle_database_that_wakes_up_is_read_again() {
    let halves = "SELECT sum(balance) FILTER (WHERE id <= 1000), sum(balance) FILTER (WHERE id > 1000) FROM account";
    let sums = |db: &Connection| db.query_row(halves, [], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?))).unwrap();
    for journal in ["WAL", "DELETE", "PERSIST"] {
        let mut stage = Stage::new();
        drop(Writer::start(&stage, journal, Duration::ZERO));
        assert!(!Database::find(&stage.path).unwrap().beside("-wal").exists());
        settle();
        stage.sink.slow = Duration::from_millis(300);
        let path = stage.path.clone();
        let waker = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            let db = Connection::open(path).unwrap();
            for change in ["balance - 1 WHERE id <= 1000", "balance + 1 WHERE id > 1000"] {
                db.execute_batch(&format!("UPDATE account SET balance = {change}; PRAGMA wal_checkpoint(TRUNCATE)")).unwrap();
            }
        });
        stage.capture().unwrap();
        waker.join().unwrap();
        let (now, captured) = (sums(&stage.open()), sums(&stage.restore()));
        assert_eq!(now.0 + now.1, ACCOUNTS * 1000);
        // A moment after both changes, or between them: the first one came while it was read.
        assert_eq!(captured.0, now.0, "{journal}");
        assert!(captured.1 == now.1 || captured.1 + 1000 == now.1, "{journal}: {captured:?} {now:?}");
    }
}
