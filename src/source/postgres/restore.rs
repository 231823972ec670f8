//! An archive back into a server.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::client::{Client, quoted, without_commands};
use crate::process::{Pipes, Running};
use crate::source::SourceError;
use crate::source::load::{Loader, PATIENCE, Wanted, compare, used_by};

/// Where databases are made and renamed from.
const HOME: &str = "postgres";
/// For connections to end whose application was stopped.
const FAREWELL: Duration = Duration::from_secs(30);
/// Tables counted with one question.
pub(super) const AT_ONCE: usize = 100;

impl Client<'_> {
    pub(super) fn exists(&self, database: &str, cancel: &CancellationToken) -> Result<bool, SourceError> {
        let question = format!("select 1 from pg_database where datname = {}", literal(database));
        Ok(!self.ask(HOME, &question, cancel)?.is_empty())
    }

    /// Who is connected to a database.
    fn users(&self, database: &str, cancel: &CancellationToken) -> Result<Vec<String>, SourceError> {
        let question = format!(
            "select format('%s (%s, pid %s)', coalesce(nullif(application_name, ''), 'unknown'), usename, pid) from pg_stat_activity where datname = {} and pid <> \
             pg_backend_pid() and backend_type = 'client backend' order by 1",
            literal(database)
        );
        self.ask(HOME, &question, cancel)
    }

    /// One answer for each table, in their order; None where it is NULL.
    pub(super) fn numbered(
        &self,
        database: &str,
        tables: &[String],
        ask: impl Fn(&str) -> String,
        cancel: &CancellationToken,
    ) -> Result<Vec<Option<String>>, SourceError> {
        if tables.is_empty() {
            return Ok(Vec::new());
        }
        let parts: Vec<String> =
            tables.iter().enumerate().map(|(n, t)| format!("select {n}::text || '=' || coalesce({}, '')", ask(t))).collect();
        let mut answers = vec![None; tables.len()];
        for answer in self.ask_patiently(database, &parts.join(" union all "), PATIENCE, cancel)? {
            if let Some((n, value)) = answer.split_once('=')
                && let Some(slot) = n.parse::<usize>().ok().and_then(|n| answers.get_mut(n))
            {
                *slot = Some(value.to_owned()).filter(|v| !v.is_empty());
            }
        }
        Ok(answers)
    }

    fn end_connections(&self, database: &str) -> Result<(), SourceError> {
        let ends = format!(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = {} and pid <> pg_backend_pid()",
            literal(database)
        );
        self.execute(HOME, &ends, &CancellationToken::new())
    }

    fn unused(&self, database: &str, cancel: &CancellationToken) -> Result<(), SourceError> {
        used_by(database, &self.users(database, cancel)?)
    }
}

impl Loader for Client<'_> {
    fn look(&self, wanted: &Wanted, stops: bool, cancel: &CancellationToken) -> Result<(), SourceError> {
        if wanted.target.is_empty() || wanted.target.len() > 63 || wanted.target.chars().any(char::is_control) {
            return Err(SourceError::Failed("a database's name has 1 to 63 bytes and no control characters".into()));
        }
        wanted.has_tables()?;
        if !self.exists(&wanted.target, cancel)? {
            return Ok(());
        }
        wanted.may_replace()?;
        if stops { Ok(()) } else { self.unused(&wanted.target, cancel) }
    }

    fn begin(&self, wanted: &Wanted, cancel: &CancellationToken) -> Result<Running, SourceError> {
        let how = wanted.fact("create").and_then(|sql| created_with(sql, &wanted.database)).unwrap_or("WITH TEMPLATE = template0");
        self.execute(HOME, &format!("CREATE DATABASE {} {how}", quoted(&wanted.scratch)), cancel)?;
        // pg_restore makes no schema for a single table.
        for (schema, _) in wanted.tables.iter().filter_map(|t| t.split_once('.')) {
            self.execute(&wanted.scratch, &format!("CREATE SCHEMA IF NOT EXISTS {}", quoted(schema)), cancel)?;
        }
        let mut options = Vec::new();
        if !wanted.owners {
            options.extend(["--no-owner".to_owned(), "--no-privileges".into()]);
        }
        for table in &wanted.tables {
            if let Some((schema, table)) = table.split_once('.') {
                options.extend([format!("--schema={schema}"), format!("--table={table}")]);
            } else {
                options.push(format!("--table={table}"));
            }
        }
        Ok(self.load(&wanted.scratch, &options).start(Pipes::Input)?)
    }

    fn verify(&self, wanted: &Wanted, cancel: &CancellationToken) -> Result<String, SourceError> {
        let expected = wanted.rows();
        let mut counted = Vec::new();
        for tables in expected.chunks(AT_ONCE) {
            let there: Vec<String> = tables
                .iter()
                .map(|(name, _)| {
                    let (schema, table) = name.split_once('.').unwrap_or(("public", name));
                    format!("{}.{}", quoted(schema), quoted(table))
                })
                .collect();
            // A question about a table that is not there would fail as a whole.
            let found = self.numbered(&wanted.scratch, &there, |t| format!("to_regclass({})::oid::text", literal(t)), cancel)?;
            let present: Vec<String> = there.iter().zip(&found).filter(|(_, oid)| oid.is_some()).map(|(t, _)| t.clone()).collect();
            let mut rows =
                self.numbered(&wanted.scratch, &present, |t| format!("(select count(*) from only {t})::text"), cancel)?.into_iter();
            counted.extend(tables.iter().zip(&found).map(|((name, _), oid)| {
                let rows = oid.as_ref().and_then(|_| rows.next().flatten()).and_then(|n| n.parse().ok());
                (name.clone(), rows)
            }));
        }
        compare(&expected, &counted)
    }

    fn publish(&self, wanted: &Wanted, cancel: &CancellationToken) -> Result<Vec<String>, SourceError> {
        let mut told = Vec::new();
        let whole = wanted.tables.is_empty();
        for what in ["properties", "grants"] {
            let Some(sql) = wanted.fact(what).filter(|_| whole && (what == "properties" || wanted.owners)) else { continue };
            let (sql, left_out) = without_commands(sql);
            if left_out > 0 {
                told.push(format!("{left_out} lines of the {what} of the database as a whole hold backslashes, and were left out"));
            }
            if let Err(e) = self.execute(HOME, &renamed(&sql, &wanted.database, &wanted.scratch), cancel) {
                told.push(format!("the {what} of the database as a whole could not be set: {e}"));
            }
        }
        if let Some(owner) = wanted.fact("owner").filter(|_| wanted.owners && whole)
            && let Err(e) = self.execute(HOME, &format!("ALTER DATABASE {} OWNER TO {}", quoted(&wanted.scratch), quoted(owner)), cancel)
        {
            told.push(format!("the database could not be given to {owner}: {e}"));
        }
        let in_place = format!("ALTER DATABASE {} RENAME TO {}", quoted(&wanted.scratch), quoted(&wanted.target));
        // From here on it goes to its end: nobody must be left to wonder whether it was renamed.
        let go_on = CancellationToken::new();
        if !self.exists(&wanted.target, cancel)? {
            self.execute(HOME, &in_place, &go_on)?;
            return Ok(told);
        }
        if !wanted.replace {
            return Err(SourceError::Failed(format!("database {} has come into being meanwhile", wanted.target)));
        }
        // Whoever was stopped just now may take a moment to be gone.
        let since = Instant::now();
        while let Err(e) = self.unused(&wanted.target, cancel) {
            if since.elapsed() > FAREWELL || !wanted.stops {
                return Err(e);
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        let aside = format!("ALTER DATABASE {} RENAME TO {}", quoted(&wanted.target), quoted(&wanted.aside));
        self.execute(HOME, &format!("BEGIN; {aside}; {in_place}; COMMIT"), &go_on)?;
        told.push(format!(
            "the database that was there is kept as {0}; when it is no longer needed: DROP DATABASE {1}",
            wanted.aside,
            quoted(&wanted.aside)
        ));
        Ok(told)
    }

    fn take_back(&self, wanted: &Wanted, there: bool) -> Result<Vec<String>, SourceError> {
        let go_on = CancellationToken::new();
        let (target, scratch, aside) = (quoted(&wanted.target), quoted(&wanted.scratch), quoted(&wanted.aside));
        // Both renames are one transaction.
        let published = !self.exists(&wanted.scratch, &go_on)?;
        if published && (self.exists(&wanted.aside, &go_on)? || !there) && self.exists(&wanted.target, &go_on)? {
            let old = if there { format!(" ALTER DATABASE {aside} RENAME TO {target};") } else { String::new() };
            let since = Instant::now();
            // Whoever is connected may come again at once.
            loop {
                self.end_connections(&wanted.target)?;
                match self.execute(HOME, &format!("BEGIN; ALTER DATABASE {target} RENAME TO {scratch};{old} COMMIT"), &go_on) {
                    Ok(()) => break,
                    Err(e) if since.elapsed() > FAREWELL => return Err(e),
                    Err(_) => std::thread::sleep(Duration::from_millis(200)),
                }
            }
        }
        self.discard(wanted)?;
        Ok(Vec::new())
    }

    fn is_there(&self, database: &str, cancel: &CancellationToken) -> Result<bool, SourceError> {
        self.exists(database, cancel)
    }

    fn discard(&self, wanted: &Wanted) -> Result<(), SourceError> {
        self.end_connections(&wanted.scratch)?;
        self.execute(HOME, &format!("DROP DATABASE IF EXISTS {}", quoted(&wanted.scratch)), &CancellationToken::new())
    }
}

fn literal(text: &str) -> String {
    // Standard strings: a backslash is only itself there, but old servers may be set otherwise.
    match text.contains('\\') {
        true => format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''")),
        false => format!("'{}'", text.replace('\'', "''")),
    }
}

/// `WITH …` of the statement that the database was created with.
fn created_with<'s>(sql: &'s str, database: &str) -> Option<&'s str> {
    let rest = sql.trim().strip_prefix("CREATE DATABASE ")?;
    let rest = rest.strip_prefix(&quoted(database)).or_else(|| rest.strip_prefix(database))?;
    Some(rest.trim().trim_end_matches(';')).filter(|r| r.starts_with("WITH ") && !r.contains(['\\', '\n', '\r', ';']))
}

/// Statements about a database as a whole, with another name.
fn renamed(sql: &str, database: &str, scratch: &str) -> String {
    let new = quoted(scratch);
    let lines = sql.lines().map(|line| {
        for (before, name) in [("ALTER DATABASE ", quoted(database)), ("ALTER DATABASE ", database.to_owned())] {
            if let Some(rest) = line.strip_prefix(before).and_then(|l| l.strip_prefix(&name)).filter(|r| r.starts_with(' ')) {
                return format!("{before}{new}{rest}");
            }
        }
        // ALTER ROLE x IN DATABASE y SET …; GRANT … ON DATABASE y TO …; COMMENT ON DATABASE y IS …
        for name in [quoted(database), database.to_owned()] {
            for (starts, word) in [("ALTER ROLE ", "IN"), ("GRANT ", "ON"), ("REVOKE ", "ON"), ("COMMENT ", "ON"), ("SECURITY ", "ON")] {
                let place = format!(" {word} DATABASE {name} ");
                if line.starts_with(starts) && line.contains(&place) {
                    return line.replacen(&place, &format!(" {word} DATABASE {new} "), 1);
                }
            }
        }
        line.to_owned()
    });
    lines.collect::<Vec<_>>().join("\n").trim().trim_end_matches(';').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_created_as_it_was_under_another_name() {
        let with = "WITH TEMPLATE = template0 ENCODING = 'UTF8' LOCALE_PROVIDER = libc LOCALE = 'C.UTF-8'";
        assert_eq!(created_with(&format!("CREATE DATABASE shop {with};\n"), "shop"), Some(with));
        assert_eq!(created_with(&format!("CREATE DATABASE \"My Shop\" {with};"), "My Shop"), Some(with));
        assert_eq!(created_with(&format!("CREATE DATABASE shop2 {with};"), "shop"), None);
        assert_eq!(created_with(&format!("CREATE DATABASE shop {with} \\! id"), "shop"), None);
        let sql = "ALTER DATABASE shop SET search_path TO 'a b';\nALTER ROLE app IN DATABASE shop SET work_mem TO '1MB';\n";
        let renamed = renamed(sql, "shop", "s1");
        let grants =
            super::renamed("REVOKE CONNECT,TEMPORARY ON DATABASE shop FROM PUBLIC;\nCOMMENT ON DATABASE shop IS 'a';", "shop", "s1");
        assert_eq!(grants, "REVOKE CONNECT,TEMPORARY ON DATABASE \"s1\" FROM PUBLIC;\nCOMMENT ON DATABASE \"s1\" IS 'a'");
        assert_eq!(renamed, "ALTER DATABASE \"s1\" SET search_path TO 'a b';\nALTER ROLE app IN DATABASE \"s1\" SET work_mem TO '1MB'");
    }
}
