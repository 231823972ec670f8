//! Questions in SQL to a database source: which files it names, which version its data has.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{SourceError, mysql, postgres};
use crate::config::{Databases, ServerSource, SourceKind};

/// Bytes of an answer.
const MOST: usize = 256 << 20;

/// The first column of a question's rows, NULL left out.
pub fn ask(kind: &SourceKind, sql: &str, cancel: &CancellationToken) -> Result<Vec<String>, SourceError> {
    match kind {
        SourceKind::Sqlite(source) => sqlite(&source.path, sql, cancel),
        SourceKind::Postgres(server) => postgres::Client::new(server)?.ask(first(server, "postgres"), sql, cancel),
        SourceKind::Mysql(server) => mysql::Client::new(server, cancel)?.ask(first(server, "mysql"), sql, cancel),
        other => Err(SourceError::Failed(format!("a {} source answers no questions in SQL", other.word()))),
    }
}

fn first<'s>(server: &'s ServerSource, usual: &'s str) -> &'s str {
    match &server.databases {
        Databases::Named(names) => names.first().map_or(usual, String::as_str),
        Databases::All => usual,
    }
}

fn sqlite(path: &std::path::Path, sql: &str, cancel: &CancellationToken) -> Result<Vec<String>, SourceError> {
    use rusqlite::types::ValueRef;
    let failed = |e: rusqlite::Error| SourceError::Failed(format!("the database {} does not answer: {e}", path.display()));
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY | rusqlite::OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = rusqlite::Connection::open_with_flags(path, flags).map_err(failed)?;
    db.busy_timeout(Duration::from_secs(30)).map_err(failed)?;
    let mut question = db.prepare(sql).map_err(failed)?;
    let mut rows = question.query([]).map_err(failed)?;
    let (mut found, mut bytes) = (Vec::new(), 0);
    while let Some(row) = rows.next().map_err(failed)? {
        if cancel.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        let text = match row.get_ref(0).map_err(failed)? {
            ValueRef::Null => continue,
            ValueRef::Integer(n) => n.to_string(),
            ValueRef::Real(n) => n.to_string(),
            ValueRef::Text(text) | ValueRef::Blob(text) => String::from_utf8_lossy(text).into_owned(),
        };
        bytes += text.len();
        if bytes > MOST {
            return Err(SourceError::Failed(format!("the answer of {} is longer than {MOST} bytes", path.display())));
        }
        found.push(text);
    }
    Ok(found)
}
