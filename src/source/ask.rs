//! Questions in SQL to a database source: which files it names, which version its data has.

use tokio_util::sync::CancellationToken;

use super::{SourceError, mysql, postgres, sqlite};
use crate::config::{Databases, ServerSource, SourceKind};

/// Bytes of an answer, at the most.
pub const MOST: usize = 256 << 20;

/// The first column of a question's rows, NULL left out.
pub fn ask(kind: &SourceKind, sql: &str, cancel: &CancellationToken) -> Result<Vec<String>, SourceError> {
    match kind {
        SourceKind::Sqlite(source) => sqlite::ask(&source.path, sql, cancel),
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
