//! How many rows a server's tables have now.

use tokio_util::sync::CancellationToken;

use super::client::{Client, literal};
use crate::source::SourceError;
use crate::source::load::Counter;

impl Counter for Client<'_> {
    fn databases(&self, cancel: &CancellationToken) -> Result<Vec<String>, SourceError> {
        super::databases(self.source, self, cancel)
    }

    fn rows_now(
        &self,
        database: &str,
        known: &[(String, u64)],
        cancel: &CancellationToken,
    ) -> Result<Option<Vec<(String, u64)>>, SourceError> {
        if self.charset(database, cancel)?.is_none() {
            return Ok(None);
        }
        // Views and sequences have no rows of their own in a dump.
        let question = format!(
            "select table_name from information_schema.tables where table_schema = {} and table_type in ('BASE TABLE', 'SYSTEM VERSIONED') order by 1",
            literal(database)
        );
        let mut tables: Vec<String> = self.table(&question, cancel)?.into_iter().flatten().flatten().collect();
        tables.retain(|table| known.iter().any(|(name, _)| name == table) || !self.excluded(database).any(|t| t == table));
        let counted = self.count(database, &tables.iter().collect::<Vec<_>>(), cancel)?;
        Ok(Some(counted.into_iter().filter_map(|(table, rows)| Some((table, rows?))).collect()))
    }
}
