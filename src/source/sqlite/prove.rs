//! A database file that was restored: whether it is whole, and has what was captured.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode};
use tokio_util::sync::CancellationToken;

use super::database::Database;
use super::inspect::{self, Complaints, Watch};
use crate::source::{Facts, SourceError};

/// Nobody else uses the file.
const PATIENCE: Duration = Duration::from_secs(5);
/// Facts that a restored file must have as the captured one had them.
const SAME: [&str; 5] = ["page_size", "page_count", "user_version", "application_id", "schema_version"];
/// Tables with broken references that are named.
const NAMED: usize = 10;

/// What was found.
#[derive(Debug, Default)]
pub struct Proof {
    /// What is wrong; nothing when it is good.
    pub wrong: Vec<String>,
    /// What could not be looked at.
    pub warnings: Vec<String>,
    /// What was found good, in words and numbers.
    pub good: String,
}

/// Checks a restored file against the facts of its capture. The file is not changed, and nothing is left beside it.
pub fn prove(path: &Path, facts: &Facts, cancel: &CancellationToken) -> Result<Proof, SourceError> {
    let mut proof = Proof::default();
    let database = Database::of_our_own(path)?;
    match database.header() {
        // An empty file is an empty database.
        Ok(_) => {}
        Err(SourceError::Failed(text)) => {
            proof.wrong.push(text);
            return Ok(proof);
        }
        Err(other) => return Err(other),
    }
    let failed = |e: rusqlite::Error| match cancel.is_cancelled() {
        true => SourceError::Cancelled,
        false => database.failed("checking what was restored", &e),
    };
    let connection = database.open(true, PATIENCE, cancel).map_err(failed)?;
    let _watch = Watch::over(&connection, cancel, None);
    integrity(&connection, &mut proof).map_err(failed)?;
    if !proof.wrong.is_empty() {
        return Ok(proof);
    }
    references(&connection, &mut proof).map_err(failed)?;
    for name in SAME {
        let now: i64 = connection.pragma_query_value(None, name, |row| row.get(0)).map_err(failed)?;
        if let Some(then) = facts.get(name).and_then(serde_json::Value::as_i64).filter(|then| *then != now) {
            proof.wrong.push(format!("its {name} is {now}, {then} when it was captured"));
        }
    }
    let (counts, _) = inspect::count(&connection).map_err(failed)?;
    if cancel.is_cancelled() {
        return Err(SourceError::Cancelled);
    }
    let (mut tables, mut all) = (0u64, 0i64);
    for (table, then) in facts.get("tables").and_then(|t| t.as_object()).into_iter().flatten() {
        let Some(then) = then.as_i64() else { continue };
        match counts.get(table).map(serde_json::Value::as_i64) {
            None => proof.wrong.push(format!("table {table} is not there, it had {then} rows")),
            Some(None) => proof.warnings.push(format!("the rows of table {table} could not be counted")),
            Some(Some(now)) if now != then => proof.wrong.push(format!("table {table} has {now} rows, {then} were captured")),
            Some(Some(_)) => (tables, all) = (tables + 1, all + then),
        }
    }
    proof.good = format!("integrity and references are good, {tables} tables have their {all} rows");
    Ok(proof)
}

fn integrity(connection: &Connection, proof: &mut Proof) -> rusqlite::Result<()> {
    match inspect::complaints(connection, "integrity_check") {
        Ok(Complaints { odd, damaged }) => {
            if !damaged.is_empty() {
                proof.wrong.push(format!("integrity_check says: {}", inspect::told(&damaged)));
            }
            if !odd.is_empty() {
                proof.warnings.push(format!("integrity_check says: {}", inspect::told(&odd)));
            }
            Ok(())
        }
        Err(e) if is_foreign(&e) => {
            proof.warnings.push(format!("its integrity could not be checked: {e}"));
            Ok(())
        }
        Err(e) if matches!(e.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)) => {
            proof.wrong.push(format!("it is damaged: {e}"));
            Ok(())
        }
        Err(e) => Err(e),
    }
}

/// Rows whose foreign keys lead nowhere, by table.
fn references(connection: &Connection, proof: &mut Proof) -> rusqlite::Result<()> {
    let counted = connection
        .prepare("SELECT \"table\", coalesce(parent, ''), count(*) FROM pragma_foreign_key_check GROUP BY 1, 2 ORDER BY 3 DESC, 1")
        .and_then(|mut statement| {
            let row = |r: &rusqlite::Row<'_>| Ok((r.get::<_, String>(0)?, r.get::<_, String>(1)?, r.get::<_, i64>(2)?));
            statement.query_map([], row)?.collect::<rusqlite::Result<Vec<_>>>()
        });
    match counted {
        Ok(rows) => {
            let told = |(table, parent, n): &(String, String, i64)| {
                format!("{n} rows of table {table} refer to rows of {parent} that are not there (foreign_key_check)")
            };
            proof.wrong.extend(rows.iter().take(NAMED).map(told));
            Ok(())
        }
        Err(e) if is_foreign(&e) => {
            proof.warnings.push(format!("its references could not be checked: {e}"));
            Ok(())
        }
        Err(e) => Err(e),
    }
}

/// An application's own function, collation or module in the schema: that is no damage.
fn is_foreign(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(ErrorCode::Unknown)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn proved(path: &Path, facts: serde_json::Value) -> Proof {
        prove(path, &serde_json::from_value(facts).unwrap(), &CancellationToken::new()).unwrap()
    }

    #[test]
    fn each_thing_that_is_wrong_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = Connection::open(&path).unwrap();
        db.execute_batch(
            "CREATE TABLE user (id INTEGER PRIMARY KEY); CREATE TABLE paid (id INTEGER PRIMARY KEY, user REFERENCES user (id)); \
             INSERT INTO user VALUES (1); INSERT INTO paid VALUES (1, 1);",
        )
        .unwrap();
        let facts = json!({ "page_size": 4096, "tables": { "user": 1, "paid": 1 } });
        let good = proved(&path, facts.clone());
        assert!(good.wrong.is_empty() && good.good.contains("2 tables have their 2 rows"), "{good:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");

        db.execute_batch("PRAGMA foreign_keys = OFF; INSERT INTO paid VALUES (2, 7), (3, 8)").unwrap();
        let found = proved(&path, json!({ "page_size": 512, "tables": { "user": 1, "paid": 5, "gone": 3 } })).wrong.join("\n");
        for wanted in [
            "2 rows of table paid refer to rows of user",
            "page_size is 4096, 512",
            "paid has 3 rows, 5 were",
            "gone is not there, it had 3",
        ] {
            assert!(found.contains(wanted), "{wanted}: {found}");
        }
        drop(db);
        let mut bytes = std::fs::read(&path).unwrap();
        let len = bytes.len();
        bytes[len - 4096..].fill(0xee);
        std::fs::write(&path, bytes).unwrap();
        assert!(!proved(&path, json!({})).wrong.is_empty(), "a page that is none");
        std::fs::write(
            &path,
            "no database at all, but a text of more than a hundred bytes, as long as a header of one, or so it seems to me",
        )
        .unwrap();
        assert!(proved(&path, json!({})).wrong[0].contains("not an SQLite database"));
    }
}
