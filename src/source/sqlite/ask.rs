//! A question to a live database, that leaves it as it is.

use std::path::Path;
use std::time::Duration;

use rusqlite::types::ValueRef;
use tokio_util::sync::CancellationToken;

use super::database::Database;
use super::inspect::Watch;
use super::snapshot;
use crate::source::SourceError;
use crate::source::ask::MOST;

const PATIENCE: Duration = Duration::from_secs(30);

/// The first column of a question's rows, NULL left out.
pub fn ask(path: &Path, sql: &str, cancel: &CancellationToken) -> Result<Vec<String>, SourceError> {
    let (mut found, mut bytes) = (Vec::new(), 0);
    each(&Database::find(path)?, sql, cancel, |shown, value| {
        let Some(text) = value else { return Ok(true) };
        bytes += text.len();
        if bytes > MOST {
            return Err(SourceError::Failed(format!("the answer of {shown} is longer than {MOST} bytes")));
        }
        found.push(text);
        Ok(true)
    })?;
    Ok(found)
}

/// The first value of a question's first row; None when there is no row.
pub fn first(path: &Path, sql: &str, cancel: &CancellationToken) -> Result<Option<String>, SourceError> {
    let mut found = None;
    each(&Database::of_our_own(path)?, sql, cancel, |_, value| {
        found = Some(value.unwrap_or_else(|| "NULL".into()));
        Ok(false)
    })?;
    Ok(found)
}

/// Hands over the first value of each row, None for NULL, until told to stop.
fn each(
    database: &Database,
    sql: &str,
    cancel: &CancellationToken,
    mut take: impl FnMut(&str, Option<String>) -> Result<bool, SourceError>,
) -> Result<(), SourceError> {
    let failed = |e: rusqlite::Error| match cancel.is_cancelled() {
        true => SourceError::Cancelled,
        false => database.failed("asking it", &e),
    };
    // Nobody has it open: to open it in the ordinary way would leave files beside it that belong to keepd.
    let idle = database.header()?.is_some_and(|h| snapshot::uses_wal(&h)) && !database.beside("-wal").exists();
    let connection = database.open(idle, PATIENCE, cancel).map_err(failed)?;
    let _watch = Watch::over(&connection, cancel, None);
    let mut question = connection.prepare(sql).map_err(failed)?;
    let mut rows = question.query([]).map_err(failed)?;
    while let Some(row) = rows.next().map_err(failed)? {
        let value = match row.get_ref(0).map_err(failed)? {
            ValueRef::Null => None,
            ValueRef::Integer(n) => Some(n.to_string()),
            ValueRef::Real(n) => Some(n.to_string()),
            ValueRef::Text(text) | ValueRef::Blob(text) => Some(String::from_utf8_lossy(text).into_owned()),
        };
        if !take(database.shown(), value)? {
            break;
        }
    }
    Ok(())
}
