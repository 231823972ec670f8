//! A SQLite database that is written to while it is backed up. Each transaction carries a number and a token that is made of the token before it, so
//! a copy tells which moment of the history it is of, and anything that is no such moment does not fit.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, params};

use super::dice::mix;

/// Rows that stay; older ones go.
const KEPT: i64 = 1200;
const ACCOUNTS: i64 = 40;

/// The tokens from number `base` on: that of the newest committed transaction, and perhaps of the one that is just being committed.
#[derive(Default)]
struct History {
    base: usize,
    tokens: Vec<u64>,
    /// How many of the tokens are known to be committed.
    committed: usize,
}

pub struct Live {
    pub path: PathBuf,
    wal: bool,
    history: Arc<Mutex<History>>,
    stop: Arc<AtomicBool>,
    writer: Option<JoinHandle<()>>,
}

/// The moments a backup may be of: one of these tokens, the first of them that of transaction `first`.
#[derive(Clone, Debug, Default)]
pub struct Moments {
    pub first: usize,
    pub tokens: Vec<u64>,
}

/// A newest transaction: its number and token.
pub type Moment = (usize, u64);

impl Live {
    pub fn new(path: &Path, wal: bool) -> Self {
        let db = Connection::open(path).unwrap();
        let mode = if wal { "wal" } else { "delete" };
        db.execute_batch(&format!(
            "PRAGMA journal_mode = {mode};
             CREATE TABLE pairs (n INTEGER, half TEXT, salt INTEGER, token INTEGER, filler BLOB, PRIMARY KEY (n, half));
             CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER); CREATE TABLE extra (a, b);
             CREATE INDEX by_token ON pairs (token); CREATE VIEW sum AS SELECT sum(balance) AS all_of_it FROM account; BEGIN;"
        ))
        .unwrap();
        for id in 0..ACCOUNTS {
            db.execute("INSERT INTO account VALUES (?1, 100)", [id]).unwrap();
        }
        db.execute_batch("COMMIT").unwrap();
        let history = Arc::new(Mutex::new(History { base: 0, tokens: vec![0], committed: 1 }));
        let live = Self { path: path.to_owned(), wal, history, stop: Arc::default(), writer: None };
        for n in 1..=40 {
            transaction(&db, &live.history, n);
        }
        live
    }

    pub fn start(&mut self) {
        if self.writer.is_some() {
            return;
        }
        self.stop.store(false, Ordering::Relaxed);
        let (path, stop, history, wal) = (self.path.clone(), self.stop.clone(), self.history.clone(), self.wal);
        self.writer = Some(std::thread::spawn(move || {
            let db = Connection::open(path).unwrap();
            db.busy_timeout(Duration::from_secs(60)).unwrap();
            db.execute_batch(if wal { "PRAGMA synchronous = NORMAL" } else { "PRAGMA synchronous = OFF" }).unwrap();
            let mut salt = 1;
            while !stop.load(Ordering::Relaxed) {
                salt = mix(salt + 1);
                transaction(&db, &history, salt);
                std::thread::sleep(Duration::from_millis(4));
            }
        }));
    }

    /// Nobody has it open any more.
    pub fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(writer) = self.writer.take() {
            writer.join().expect("the writer of a database failed");
        }
    }

    /// What is committed now, as the first of the moments to come.
    pub fn mark(&self) -> usize {
        let history = self.history.lock().unwrap();
        history.base + history.committed - 1
    }

    /// The moments from a mark until now.
    pub fn since(&self, mark: usize) -> Moments {
        let history = self.history.lock().unwrap();
        Moments { first: mark, tokens: history.tokens[mark - history.base..].to_vec() }
    }

    /// It was exchanged: its history goes on from that moment.
    pub fn goes_on_from(&self, (n, token): Moment) {
        *self.history.lock().unwrap() = History { base: n, tokens: vec![token], committed: 1 };
    }

    /// Other things an application does once in a while, with nobody else writing.
    pub fn rework(&self, how: usize) {
        let db = Connection::open(&self.path).unwrap();
        db.busy_timeout(Duration::from_secs(60)).unwrap();
        let _ = match how {
            0 => db.execute_batch("VACUUM"),
            1 => db.execute_batch("DROP INDEX IF EXISTS by_salt; CREATE INDEX by_salt ON pairs (salt)"),
            2 => db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)"),
            3 => db.execute_batch("INSERT INTO extra VALUES (random(), zeroblob(9000))"),
            _ => db.execute_batch("REINDEX; ANALYZE"),
        };
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

fn transaction(db: &Connection, history: &Mutex<History>, salt: u64) {
    let (n, token) = {
        let mut history = history.lock().unwrap();
        let token = next(*history.tokens.last().unwrap(), salt);
        history.tokens.push(token);
        (i64::try_from(history.base + history.tokens.len() - 1).unwrap(), token)
    };
    db.execute_batch("BEGIN IMMEDIATE").unwrap();
    for half in ["a", "b"] {
        let row = params![n, half, salt.cast_signed(), token.cast_signed(), filler(token, half)];
        db.execute("INSERT INTO pairs VALUES (?1, ?2, ?3, ?4, ?5)", row).unwrap();
    }
    db.execute("DELETE FROM pairs WHERE n <= ?1", [n - KEPT]).unwrap();
    let (from, to) = ((salt % ACCOUNTS as u64) as i64, (salt / 97 % ACCOUNTS as u64) as i64);
    db.execute("UPDATE account SET balance = balance - 3 WHERE id = ?1", [from]).unwrap();
    db.execute("UPDATE account SET balance = balance + 3 WHERE id = ?1", [to]).unwrap();
    db.execute_batch("COMMIT").unwrap();
    let mut history = history.lock().unwrap();
    history.committed = history.tokens.len();
}

fn next(token: u64, salt: u64) -> u64 {
    mix(token.rotate_left(17) ^ salt)
}

fn filler(token: u64, half: &str) -> Vec<u8> {
    let mut bytes = vec![0; 180 + (token % 200) as usize];
    let mut hash = blake3::Hasher::new();
    hash.update(&token.to_le_bytes()).update(half.as_bytes());
    hash.finalize_xof().fill(&mut bytes);
    bytes
}

/// Of which moment a database is, if it is whole.
pub fn moment(path: &Path) -> Result<Moment, String> {
    let wrong = |e: rusqlite::Error| format!("{}: {e}", path.display());
    let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE).map_err(wrong)?;
    let said: String = db.query_row("PRAGMA integrity_check", [], |r| r.get(0)).map_err(wrong)?;
    if said != "ok" {
        return Err(format!("{}: {said}", path.display()));
    }
    let sum: i64 = db.query_row("SELECT all_of_it FROM sum", [], |r| r.get(0)).map_err(wrong)?;
    if sum != ACCOUNTS * 100 {
        return Err(format!("{}: the balances are {sum}", path.display()));
    }
    let mut rows = db.prepare("SELECT n, half, salt, token, filler FROM pairs ORDER BY n, half").map_err(wrong)?;
    let mut rows = rows.query([]).map_err(wrong)?;
    let mut last: Option<(i64, u64)> = None;
    let mut count = 0;
    while let Some(row) = rows.next().map_err(wrong)? {
        let (n, half): (i64, String) = (row.get(0).map_err(wrong)?, row.get(1).map_err(wrong)?);
        let (salt, token): (i64, i64) = (row.get(2).map_err(wrong)?, row.get(3).map_err(wrong)?);
        let (salt, token) = (salt.cast_unsigned(), token.cast_unsigned());
        let fits = match (count % 2, last) {
            (0, None) => half == "a",
            (0, Some((before, known))) => half == "a" && n == before + 1 && token == next(known, salt),
            (_, known) => half == "b" && known == Some((n, token)),
        };
        if !fits || row.get::<_, Vec<u8>>(4).map_err(wrong)? != filler(token, &half) {
            return Err(format!("{}: row {n}{half} does not follow what is before it", path.display()));
        }
        last = Some((n, token));
        count += 1;
    }
    let (n, token) = last.ok_or_else(|| format!("{} is empty", path.display()))?;
    if count % 2 != 0 || (count != KEPT * 2 && n * 2 != count) {
        return Err(format!("{}: {count} rows up to {n}", path.display()));
    }
    Ok((usize::try_from(n).unwrap(), token))
}

impl Moments {
    /// Of one moment alone.
    pub fn only((n, token): Moment) -> Self {
        Self { first: n, tokens: vec![token] }
    }

    pub fn has(&self, (n, token): Moment) -> bool {
        n.checked_sub(self.first).and_then(|at| self.tokens.get(at)) == Some(&token)
    }
}
