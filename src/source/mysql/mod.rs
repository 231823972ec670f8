//! Databases of a MySQL or MariaDB server.

use tokio_util::sync::CancellationToken;

use super::{Context, Facts, Previous, SourceError};
use crate::config::ServerSource;
use crate::repository::EntrySink;

pub fn capture(
    _source: &ServerSource,
    _previous: &mut dyn Previous,
    _sink: &mut dyn EntrySink,
    _context: &Context<'_>,
) -> Result<Facts, SourceError> {
    Err(SourceError::Failed("not yet".into()))
}

pub struct Client<'s> {
    _source: &'s ServerSource,
}

impl<'s> Client<'s> {
    pub fn new(source: &'s ServerSource, _cancel: &CancellationToken) -> Result<Self, SourceError> {
        Ok(Self { _source: source })
    }

    pub fn ask(&self, _database: &str, _sql: &str, _cancel: &CancellationToken) -> Result<Vec<String>, SourceError> {
        Err(SourceError::Failed("not yet".into()))
    }
}

/// The name of a database's file in the source.
pub fn file_of(database: &str) -> String {
    super::dump::file_name(database, "sql")
}

impl crate::source::load::Loader for Client<'_> {
    fn look(&self, _: &super::load::Wanted, _: bool, _: &CancellationToken) -> Result<(), SourceError> {
        Err(SourceError::Failed("not yet".into()))
    }
    fn begin(&self, _: &super::load::Wanted, _: &CancellationToken) -> Result<crate::process::Running, SourceError> {
        Err(SourceError::Failed("not yet".into()))
    }
    fn verify(&self, _: &super::load::Wanted, _: &CancellationToken) -> Result<String, SourceError> {
        Err(SourceError::Failed("not yet".into()))
    }
    fn publish(&self, _: &super::load::Wanted, _: &CancellationToken) -> Result<Vec<String>, SourceError> {
        Err(SourceError::Failed("not yet".into()))
    }
    fn discard(&self, _: &super::load::Wanted) -> Result<(), SourceError> {
        Ok(())
    }
}
