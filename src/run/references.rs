//! Files that a database names: each must be in the backup.
//!
//! The names stand in a SQLite file without a name in the work directory, for there may be millions of them; each entry of the files source ticks its own.

use std::path::Path;

use rusqlite::{Connection, params};
use tokio_util::sync::CancellationToken;

use super::live::Failure;
use crate::config::{References, Source};
use crate::repository::{Kind, RepositoryError};
use crate::source::{SourceError, ask};

/// Missing files named one by one.
const MAX_NAMED: usize = 20;

/// What one database names below one files source.
pub struct Named {
    source: String,
    pub under: String,
    /// The last part of the files source's path, with a slash: names may begin with it.
    prefix: Vec<u8>,
    db: Connection,
}

fn failed(error: rusqlite::Error) -> Failure {
    Failure::Failed(format!("the names of referenced files cannot be kept in the work directory: {error}"))
}

impl Named {
    /// Asks the database. `root` is the path of the files source.
    pub fn ask(source: &Source, references: &References, root: &Path, cancel: &CancellationToken) -> Result<Self, Failure> {
        let names = ask::ask(&source.kind, &references.sql, cancel).map_err(|e| match e {
            SourceError::Cancelled => Failure::Cancelled,
            other => Failure::Failed(format!("source {}: references: {other}", source.name)),
        })?;
        // An empty name is a private file on disk that goes with the connection.
        let mut db = Connection::open("").map_err(failed)?;
        db.execute_batch(
            "CREATE TABLE named (path BLOB PRIMARY KEY, found INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID; PRAGMA synchronous = OFF",
        )
        .map_err(failed)?;
        let whole = root.as_os_str().as_encoded_bytes();
        let tx = db.transaction().map_err(failed)?;
        for name in &names {
            let mut path = name.as_bytes();
            path = path.strip_prefix(whole).unwrap_or(path);
            while let Some(rest) = path.strip_prefix(b"./").or_else(|| path.strip_prefix(b"/")) {
                path = rest;
            }
            if !path.is_empty() {
                tx.prepare_cached("INSERT OR IGNORE INTO named (path) VALUES (?1)").and_then(|mut s| s.execute([path])).map_err(failed)?;
            }
        }
        tx.commit().map_err(failed)?;
        db.execute_batch("BEGIN").map_err(failed)?;
        let last = root.file_name().map(|n| n.as_encoded_bytes().to_vec()).unwrap_or_default();
        Ok(Self { source: source.name.clone(), under: references.under.clone(), prefix: [last, b"/".to_vec()].concat(), db })
    }

    /// An entry of the files source.
    pub fn tick(&self, path: &[u8], kind: Kind) -> Result<(), RepositoryError> {
        if kind == Kind::Directory {
            return Ok(());
        }
        let with_prefix = [self.prefix.as_slice(), path].concat();
        self.db
            .prepare_cached("UPDATE named SET found = 1 WHERE path IN (?1, ?2)")
            .and_then(|mut s| s.execute(params![path, with_prefix]))
            .map(drop)
            .map_err(|e| RepositoryError::Other(format!("the names of referenced files: {e}")))
    }

    /// Why the backup is suspect, if it is.
    pub fn verdict(&self) -> Result<Option<String>, Failure> {
        let count = |sql: &str| self.db.query_row(sql, [], |r| r.get::<_, i64>(0)).map_err(failed);
        let missing = count("SELECT count(*) FROM named WHERE NOT found")?;
        if missing == 0 {
            return Ok(None);
        }
        let all = count("SELECT count(*) FROM named")?;
        let mut list = self.db.prepare("SELECT path FROM named WHERE NOT found ORDER BY path LIMIT ?1").map_err(failed)?;
        let rows = list.query_map([MAX_NAMED as i64], |r| r.get::<_, Vec<u8>>(0)).map_err(failed)?;
        let names: Vec<String> =
            rows.map(|r| r.map(|b| String::from_utf8_lossy(&b).escape_debug().to_string())).collect::<Result<_, _>>().map_err(failed)?;
        let more = missing.saturating_sub(names.len() as i64);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        Ok(Some(format!("source {}: {missing} of {all} files it names are not in {}: {}{more}", self.source, self.under, names.join(", "))))
    }
}
