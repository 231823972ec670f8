//! What a database says of itself, for the manifest: page size, modes, versions, tables and their rows.

use std::time::{Duration, Instant};

use rusqlite::Connection;
use serde_json::{Map, Value, json};

use crate::config::Verify;
use crate::source::Facts;

/// Counting the rows of all tables may take this long in all; what is not counted then is null.
const BUDGET: Duration = Duration::from_millis(500);
/// Tables listed at most.
const MAX_TABLES: usize = 500;

/// Reads the facts in the connection's present snapshot.
pub fn of(db: &Connection, verify: Verify, journal: &str) -> rusqlite::Result<Facts> {
    let number = |pragma: &str| db.query_row(&format!("PRAGMA {pragma}"), [], |r| r.get::<_, i64>(0));
    let mut facts = Facts::new();
    for name in ["page_size", "page_count", "user_version", "application_id", "schema_version"] {
        facts.insert(name.into(), number(name)?.into());
    }
    let encoding: String = db.query_row("PRAGMA encoding", [], |r| r.get(0))?;
    facts.insert("encoding".into(), encoding.into());
    facts.insert("journal_mode".into(), journal.into());
    facts.insert("sqlite_version".into(), rusqlite::version().into());
    let verified = match verify {
        Verify::Quick => "quick",
        Verify::Full => "full",
        Verify::Off => "off",
    };
    facts.insert("verified".into(), verified.into());
    facts.insert("tables".into(), Value::Object(tables(db)?));
    Ok(facts)
}

fn tables(db: &Connection) -> rusqlite::Result<Map<String, Value>> {
    let sql = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' AND sql NOT LIKE 'CREATE VIRTUAL%' ORDER BY name";
    let names: Vec<String> = db.prepare(sql)?.query_map([], |r| r.get(0))?.collect::<rusqlite::Result<_>>()?;
    let since = Instant::now();
    let mut found = Map::new();
    for name in names.into_iter().take(MAX_TABLES) {
        let rows = match since.elapsed() < BUDGET {
            true => count(db, &name, BUDGET.saturating_sub(since.elapsed())),
            false => Value::Null,
        };
        found.insert(name, rows);
    }
    Ok(found)
}

/// The rows of a table, null when counting takes too long. It counts in slices of the rowid where there is one, so that
/// the time can be looked at in between.
fn count(db: &Connection, name: &str, budget: Duration) -> Value {
    let quoted = format!("\"{}\"", name.replace('"', "\"\""));
    let since = Instant::now();
    let slices = |db: &Connection| -> rusqlite::Result<Option<i64>> {
        let (mut total, mut from) = (0i64, i64::MIN);
        let mut statement = db.prepare(&format!(
            "SELECT count(*), max(rowid) FROM (SELECT rowid FROM {quoted} WHERE rowid > ?1 ORDER BY rowid LIMIT 200000)"
        ))?;
        loop {
            let (n, last): (i64, Option<i64>) = statement.query_row([from], |r| Ok((r.get(0)?, r.get(1)?)))?;
            total += n;
            match last {
                Some(last) if n == 200_000 => from = last,
                _ => return Ok(Some(total)),
            }
            if since.elapsed() > budget {
                return Ok(None);
            }
        }
    };
    match slices(db) {
        Ok(Some(n)) => json!(n),
        Ok(None) => Value::Null,
        // Without rowid.
        Err(_) => db.query_row(&format!("SELECT count(*) FROM {quoted}"), [], |r| r.get::<_, i64>(0)).map_or(Value::Null, |n| json!(n)),
    }
}
