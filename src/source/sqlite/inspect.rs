//! What is checked and found out about a database at the moment that is captured.

use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::Tuning;
use super::database::Database;
use crate::config::Verify;
use crate::source::{Facts, SourceError};

/// Rows of a check that are looked at, and how many of them are told.
const CHECK_ROWS: usize = 1000;
const TOLD: usize = 5;
/// Tables whose rows are counted.
const COUNTED_TABLES: usize = 200;
/// What the check says about rows that SQLite reads all the same: made by an older version, or by constraints added later.
const ODDITIES: [&str; 3] = ["NULL value in ", "NUMERIC value in ", "TEXT value in "];

pub struct Inspection {
    pub facts: Facts,
    pub tables: u64,
    /// For the run's report; the database is captured all the same.
    pub warnings: Vec<String>,
}

/// Checks as demanded, then counts. The connection's transaction is open.
pub fn inspect(
    database: &Database,
    connection: &Connection,
    verify: Verify,
    tuning: &Tuning,
    stop: &CancellationToken,
) -> Result<Inspection, SourceError> {
    let failed = |e| database.failed("looking at it", &e);
    let mut facts = Facts::new();
    let mut warnings = Vec::new();
    for name in ["page_size", "page_count", "user_version", "application_id", "schema_version"] {
        let value: i64 = connection.pragma_query_value(None, name, |row| row.get(0)).map_err(failed)?;
        facts.insert(name.into(), value.into());
    }
    let encoding: String = connection.pragma_query_value(None, "encoding", |row| row.get(0)).map_err(failed)?;
    facts.insert("encoding".into(), encoding.into());
    facts.insert("sqlite_version".into(), rusqlite::version().into());

    let verified = {
        let _watch = Watch::over(connection, stop, None);
        check(database, connection, verify, stop, &mut warnings)?
    };
    facts.insert("verified".into(), verified.into());

    let _watch = Watch::over(connection, stop, Some(Instant::now() + tuning.count));
    let (counts, tables) = count(connection).map_err(failed)?;
    if stop.is_cancelled() {
        return Err(SourceError::Cancelled);
    }
    facts.insert("tables".into(), Value::Object(counts));
    Ok(Inspection { facts, tables, warnings })
}

/// Fails unless a database that nobody has open is whole, by its quick_check.
pub fn check_whole(path: &Path, cancel: &CancellationToken) -> Result<(), SourceError> {
    let database = Database::of_our_own(path)?;
    if database.header()?.is_none() {
        return Ok(());
    }
    let connection = database.open(true, Duration::from_secs(1), cancel).map_err(|e| database.failed("opening it", &e))?;
    let _watch = Watch::over(&connection, cancel, None);
    match complaints(&connection, "quick_check") {
        Ok(Complaints { damaged, .. }) if damaged.is_empty() => Ok(()),
        Ok(Complaints { damaged, .. }) => Err(SourceError::Failed(format!(
            "the database in the backup is damaged, its quick_check says: {}; restore another backup, or this one with --to DIR",
            told(&damaged)
        ))),
        Err(_) if cancel.is_cancelled() => Err(SourceError::Cancelled),
        // Functions of its application: see `check`.
        Err(e) if e.sqlite_error_code() == Some(ErrorCode::Unknown) => Ok(()),
        Err(e) => Err(database.failed("its quick_check", &e)),
    }
}

/// The check that was done, in the words of the configuration.
fn check(
    database: &Database,
    connection: &Connection,
    verify: Verify,
    stop: &CancellationToken,
    warnings: &mut Vec<String>,
) -> Result<&'static str, SourceError> {
    let (word, pragma) = match verify {
        Verify::Off => return Ok("off"),
        Verify::Quick => ("quick", "quick_check"),
        Verify::Full => ("full", "integrity_check"),
    };
    let Complaints { odd, damaged } = match complaints(connection, pragma) {
        Ok(found) => found,
        Err(_) if stop.is_cancelled() => return Err(SourceError::Cancelled),
        // An application's own function, collation or module in the schema: that is no damage.
        Err(e) if e.sqlite_error_code() == Some(ErrorCode::Unknown) => {
            warnings.push(format!(
                "the database {} was captured but could not be checked ({pragma}: {e}); where its schema uses functions or collations of its \
                 application, set `verify = \"off\"`",
                database.shown()
            ));
            return Ok("off");
        }
        Err(e) => return Err(database.failed(&format!("its {pragma}"), &e)),
    };
    if !damaged.is_empty() {
        return Err(SourceError::Failed(format!(
            "the database {} is damaged, its {pragma} says: {}. Nothing was kept of this run, earlier backups are as they were; restore one, or \
             capture the database as it is with `verify = \"off\"`",
            database.shown(),
            told(&damaged)
        )));
    }
    if !odd.is_empty() {
        warnings.push(format!("the database {} was captured, but its {pragma} says: {}", database.shown(), told(&odd)));
    }
    Ok(word)
}

/// What a check says, line by line.
pub struct Complaints {
    /// Of what SQLite reads all the same.
    pub odd: Vec<String>,
    pub damaged: Vec<String>,
}

/// Runs `quick_check` or `integrity_check`.
pub fn complaints(connection: &Connection, pragma: &str) -> rusqlite::Result<Complaints> {
    // Constraints may use functions that only the application has; a row that breaks one is no damage of the file.
    connection.pragma_update(None, "ignore_check_constraints", true)?;
    let mut statement = connection.prepare(&format!("PRAGMA {pragma}({CHECK_ROWS})"))?;
    let rows = statement.query_map([], |row| row.get(0))?.collect::<Result<Vec<String>, _>>()?;
    let lines = rows.iter().flat_map(|row| row.lines()).filter(|line| *line != "ok" && !line.starts_with("*** in database"));
    let (odd, damaged) = lines.map(str::to_owned).partition(|line: &String| is_oddity(line));
    Ok(Complaints { odd, damaged })
}

fn is_oddity(line: &str) -> bool {
    ODDITIES.iter().any(|start| line.starts_with(start)) || (line.starts_with("non-") && line.contains(" value in "))
}

/// The first of some lines.
pub fn told(lines: &[String]) -> String {
    let mut text = lines.iter().take(TOLD).map(String::as_str).collect::<Vec<_>>().join("; ");
    if lines.len() > TOLD {
        text.push_str(&format!(" … and {} more", lines.len() - TOLD));
    }
    text
}

/// Rows by table, null where it would have taken too long or was not possible; and the number of tables.
pub fn count(connection: &Connection) -> rusqlite::Result<(serde_json::Map<String, Value>, u64)> {
    // A virtual table has no pages of its own (its root is 0); its shadow tables are here.
    let mut statement =
        connection.prepare("SELECT CAST(name AS TEXT) FROM sqlite_schema WHERE type = 'table' AND rootpage > 0 AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name")?;
    let mut rows = statement.query([])?;
    let mut names = Vec::new();
    let mut tables = 0;
    while let Some(row) = rows.next()? {
        tables += 1;
        if names.len() < COUNTED_TABLES {
            names.push(String::from_utf8_lossy(row.get_ref(0)?.as_bytes()?).into_owned());
        }
    }
    drop(rows);
    let mut counts = serde_json::Map::new();
    let mut late = false;
    for name in names {
        let mut rows = Value::Null;
        if !late {
            match connection
                .query_row(&format!("SELECT count(*) FROM main.\"{}\"", name.replace('"', "\"\"")), [], |row| row.get::<_, i64>(0))
            {
                Ok(n) => rows = n.into(),
                Err(e) if e.sqlite_error_code() == Some(ErrorCode::OperationInterrupted) => late = true,
                // A table that needs something of its application's; the pages are captured all the same.
                Err(_) => {}
            }
        }
        counts.insert(name, rows);
    }
    Ok((counts, tables))
}

/// Interrupts what a connection does when the run is to stop, or when it is time: counting takes no part in SQLite's progress
/// handler.
pub struct Watch {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub fn over(connection: &Connection, stop: &CancellationToken, deadline: Option<Instant>) -> Self {
        let (end, ended) = mpsc::channel::<()>();
        let (handle, stop) = (connection.get_interrupt_handle(), stop.clone());
        let watch = move || {
            while ended.recv_timeout(Duration::from_millis(20)) == Err(RecvTimeoutError::Timeout) {
                if stop.is_cancelled() || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    handle.interrupt();
                }
            }
        };
        // Without a thread it takes as long as it takes.
        let thread = std::thread::Builder::new().name("sqlite-watch".into()).spawn(watch).ok();
        Self { end: Some(end), thread }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end.take();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}
