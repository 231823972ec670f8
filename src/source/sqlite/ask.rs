//! A question to a live database, that leaves it as it is.

use std::path::Path;
use std::time::Duration;

use rusqlite::types::ValueRef;
use tokio_util::sync::CancellationToken;

use super::database::Database;
use super::snapshot;
use crate::source::SourceError;
use crate::source::ask::MOST;

const PATIENCE: Duration = Duration::from_secs(30);

/// The first column of a question's rows, NULL left out.
pub fn ask(path: &Path, sql: &str, cancel: &CancellationToken) -> Result<Vec<String>, SourceError> {
    let database = Database::find(path)?;
    let failed = |e: rusqlite::Error| match cancel.is_cancelled() {
        true => SourceError::Cancelled,
        false => database.failed("asking it", &e),
    };
    // Nobody has it open: to open it in the ordinary way would leave files beside it that belong to keepd.
    let idle = database.header()?.is_some_and(|h| snapshot::uses_wal(&h)) && !database.beside("-wal").exists();
    let connection = database.open(idle, PATIENCE, cancel).map_err(failed)?;
    let mut question = connection.prepare(sql).map_err(failed)?;
    let mut rows = question.query([]).map_err(failed)?;
    let (mut found, mut bytes) = (Vec::new(), 0);
    while let Some(row) = rows.next().map_err(failed)? {
        let text = match row.get_ref(0).map_err(failed)? {
            ValueRef::Null => continue,
            ValueRef::Integer(n) => n.to_string(),
            ValueRef::Real(n) => n.to_string(),
            ValueRef::Text(text) | ValueRef::Blob(text) => String::from_utf8_lossy(text).into_owned(),
        };
        bytes += text.len();
        if bytes > MOST {
            return Err(SourceError::Failed(format!("the answer of {} is longer than {MOST} bytes", database.shown())));
        }
        found.push(text);
    }
    Ok(found)
}
