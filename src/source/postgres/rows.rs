//! How many rows a server's tables have now.

use globset::{Glob, GlobMatcher};
use tokio_util::sync::CancellationToken;

use super::client::Client;
use super::restore::AT_ONCE;
use crate::source::SourceError;
use crate::source::load::Counter;

/// Between a table's name as SQL has it and the one that a dump has it by, and what says that it is an extension's.
const SEPARATOR: char = '\u{2}';

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
        if !self.exists(database, cancel)? {
            return Ok(None);
        }
        // Partitions are tables of their own, and of an extension's tables a dump has those that its users fill.
        let question = "select quote_ident(n.nspname) || '.' || quote_ident(c.relname) || chr(2) || n.nspname || '.' || c.relname || chr(2) || \
             (exists (select 1 from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'e'))::text \
             from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.relkind = 'r' and c.relpersistence <> 't' \
             and n.nspname !~ '^pg_' and n.nspname <> 'information_schema' order by c.oid";
        let excluded: Vec<GlobMatcher> = self.source.exclude_tables.iter().filter_map(|pattern| matcher(pattern)).collect();
        let mut tables = Vec::new();
        for row in self.ask(database, question, cancel)? {
            let mut parts = row.split(SEPARATOR).map(str::to_owned);
            let (Some(quoted), Some(name), Some(of_extension)) = (parts.next(), parts.next(), parts.next()) else { continue };
            let is_known = known.iter().any(|(table, _)| *table == name);
            if is_known || (of_extension == "false" && !excluded.iter().any(|pattern| pattern.is_match(&name))) {
                tables.push((quoted, name));
            }
        }
        let mut counted = Vec::new();
        for tables in tables.chunks(AT_ONCE) {
            let quoted: Vec<String> = tables.iter().map(|(quoted, _)| quoted.clone()).collect();
            let rows = self.numbered(database, &quoted, |t| format!("(select count(*) from only {t})::text"), cancel)?;
            counted.extend(tables.iter().zip(rows).filter_map(|((_, name), rows)| Some((name.clone(), rows?.parse().ok()?))));
        }
        Ok(Some(counted))
    }
}

/// A pattern of pg_dump, which looks in all schemas for one without a dot, and knows `*` and `?`.
fn matcher(pattern: &str) -> Option<GlobMatcher> {
    let part = |text: &str| match text.strip_prefix('"').and_then(|t| t.strip_suffix('"')) {
        Some(quoted) => globset::escape(quoted),
        None => text.to_lowercase(),
    };
    let glob = match pattern.split_once('.') {
        Some((schema, table)) => format!("{}.{}", part(schema), part(table)),
        None => format!("*.{}", part(pattern)),
    };
    Some(Glob::new(&glob).ok()?.compile_matcher())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_mean_what_they_mean_to_pg_dump() {
        let fits = |pattern: &str, table: &str| matcher(pattern).unwrap().is_match(table);
        assert!(fits("sessions", "public.sessions") && fits("Public.Sess*", "public.sessions") && fits("*.log_?", "audit.log_1"));
        assert!(!fits("sessions", "public.old_sessions") && !fits("other.sessions", "public.sessions"));
        assert!(fits("\"A*b\"", "public.A*b") && !fits("\"A*b\"", "public.Axb"));
    }
}
