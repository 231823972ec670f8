//! PostgreSQL's own tools, started so that no password stands on a command line or in an environment.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::config::ServerSource;
use crate::process::{Job, Pipes, ProcessError, secret_path};
use crate::secret;
use crate::source::SourceError;
use crate::source::load::PATIENCE;

/// Questions are answered within so long.
const ANSWER_WITHIN: Duration = Duration::from_secs(600);
/// Of an answer, in bytes.
const MOST_ANSWER: usize = 256 << 20;

/// A server as configured.
pub struct Client<'s> {
    pub(super) source: &'s ServerSource,
    password: Option<Zeroizing<String>>,
}

impl<'s> Client<'s> {
    /// Reads the password, if there is one.
    pub fn new(source: &'s ServerSource) -> Result<Self, SourceError> {
        let password = source.password.as_ref().map(secret::read).transpose();
        let password = password.map_err(|e| SourceError::Failed(format!("password: {e}")))?;
        Ok(Self { source, password: password.map(Zeroizing::new) })
    }

    fn tool(&self, name: &str, arguments: &[&str]) -> Job<'s> {
        let program = match &self.source.bin_dir {
            Some(dir) => dir.join(name).into_os_string(),
            None => OsString::from(name),
        };
        let mut job = Job::new(std::iter::once(program).chain(arguments.iter().map(OsString::from)));
        job.run_as = self.source.run_as.as_deref();
        // Messages in English are understood here, too.
        let mut set = |key, value: &str| job.environment.push((key, value.into()));
        set("LC_ALL", "C.UTF-8");
        set("PGAPPNAME", "keepd");
        set("PGCONNECT_TIMEOUT", "30");
        if let Some(host) = &self.source.host {
            set("PGHOST", host);
        }
        if let Some(port) = self.source.port {
            set("PGPORT", &port.to_string());
        }
        if let Some(user) = &self.source.user {
            set("PGUSER", user);
        }
        if let Some(mode) = &self.source.sslmode {
            set("PGSSLMODE", mode);
        }
        if let Some(password) = &self.password {
            set("PGPASSFILE", &secret_path(0));
            let escaped = password.replace('\\', "\\\\").replace(':', "\\:");
            job.secrets.push(Zeroizing::new(format!("*:*:*:*:{escaped}\n").into_bytes()));
        }
        job
    }

    /// Prints a database as an archive.
    pub fn dump(&self, database: &str, exclude: &[String]) -> Job<'s> {
        let mut arguments = vec!["--format=custom".to_owned(), "--compress=0".into(), "--no-password".into()];
        arguments.extend(exclude.iter().map(|table| format!("--exclude-table={table}")));
        arguments.push(format!("--dbname={}", named(database)));
        self.tool("pg_dump", &arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Prints roles and tablespaces.
    pub fn globals(&self, database: &str, with_passwords: bool) -> Job<'s> {
        let database = format!("--dbname={}", named(database));
        let mut arguments = vec!["--globals-only", "--no-password", &database];
        if !with_passwords {
            arguments.push("--no-role-passwords");
        }
        self.tool("pg_dumpall", &arguments)
    }

    /// Reads an archive on its standard input into a database.
    pub fn load(&self, database: &str, options: &[String]) -> Job<'s> {
        let database = format!("--dbname={}", named(database));
        let mut arguments = vec!["--format=custom", "--exit-on-error", "--no-password", &database];
        arguments.extend(options.iter().map(String::as_str));
        self.tool("pg_restore", &arguments)
    }

    /// The first column of a question's rows.
    pub fn ask(&self, database: &str, sql: &str, cancel: &CancellationToken) -> Result<Vec<String>, SourceError> {
        self.ask_patiently(database, sql, ANSWER_WITHIN, cancel)
    }

    /// The same for what may take long.
    pub fn ask_patiently(
        &self,
        database: &str,
        sql: &str,
        patience: Duration,
        cancel: &CancellationToken,
    ) -> Result<Vec<String>, SourceError> {
        let output = self.psql(database, sql, patience, cancel)?;
        let rows = output.split(|b| *b == 0).filter(|r| !r.is_empty());
        let first = |row: &[u8]| String::from_utf8_lossy(row.split(|b| *b == 1).next().unwrap_or_default()).into_owned();
        Ok(rows.map(first).collect())
    }

    /// The first value of a question's first row; None when there is no row, or none but an empty text.
    pub fn first(&self, database: &str, sql: &str, cancel: &CancellationToken) -> Result<Option<String>, SourceError> {
        // What no text holds stands for NULL.
        let output = self.psql_with(database, &["--pset=null=\u{2}"], sql, PATIENCE, cancel)?;
        let row = output.split(|b| *b == 0).next().unwrap_or_default();
        let value = String::from_utf8_lossy(row.split(|b| *b == 1).next().unwrap_or_default()).into_owned();
        Ok(match value.as_str() {
            "" => None,
            "\u{2}" => Some("NULL".into()),
            _ => Some(value),
        })
    }

    /// Runs statements and goes on after one that fails; what was said of those.
    pub fn execute_on(&self, database: &str, sql: &[u8], cancel: &CancellationToken) -> Result<String, SourceError> {
        let database_argument = format!("--dbname={}", named(database));
        let arguments = ["--no-psqlrc", "--no-password", "--quiet", "--file=-", &database_argument];
        // What goes to the input must not wait for somebody to read the output.
        let mut running = self.tool("psql", &arguments).start(Pipes::Input)?;
        let input = running.take_input().map(std::fs::File::from);
        let text = Zeroizing::new(sql.to_vec());
        let feeder = std::thread::spawn(move || input.map(|mut input| input.write_all(&text)));
        let ended = running.finish(PATIENCE, cancel)?;
        let _ = feeder.join();
        Ok(ended.said)
    }

    /// Runs statements, which must all go well.
    pub fn execute(&self, database: &str, sql: &str, cancel: &CancellationToken) -> Result<(), SourceError> {
        self.psql(database, sql, PATIENCE, cancel).map(drop)
    }

    fn psql(&self, database: &str, sql: &str, patience: Duration, cancel: &CancellationToken) -> Result<Vec<u8>, SourceError> {
        self.psql_with(database, &[], sql, patience, cancel)
    }

    fn psql_with(
        &self,
        database: &str,
        options: &[&str],
        sql: &str,
        patience: Duration,
        cancel: &CancellationToken,
    ) -> Result<Vec<u8>, SourceError> {
        let database_argument = format!("--dbname={}", named(database));
        let arguments = ["--no-psqlrc", "--no-password", "--quiet", "--tuples-only", "--no-align", "--record-separator-zero"];
        let more = ["--field-separator=\u{1}", "--set=ON_ERROR_STOP=1", "--file=-", &database_argument];
        let mut job = self.tool("psql", &[&arguments[..], &more, options].concat());
        job.environment.push(("PGCLIENTENCODING", "UTF8".into()));
        let input = format!("{sql};\n");
        job.run(input.as_bytes(), MOST_ANSWER, patience, cancel).map_err(|e| self.explained(&e, database))
    }

    /// An error in words that tell what to do.
    pub fn explained(&self, error: &ProcessError, database: &str) -> SourceError {
        let ProcessError::Failed(text) = error else { return SourceError::Cancelled };
        let hint = if text.contains("server version mismatch") {
            let newer = text.lines().find(|l| l.contains("server version:")).unwrap_or_default();
            let dir = self.source.bin_dir.as_deref().unwrap_or(Path::new("PATH")).display();
            format!(
                "the server is newer than the tools in {dir} ({}); install the client package of the server's version (Debian: postgresql-client-NN) and name \
                 its directory: bin_dir = \"/usr/lib/postgresql/NN/bin\"",
                newer.get(newer.find("server version:").unwrap_or(0)..).unwrap_or_default().trim()
            )
        } else if text.contains("no password supplied") || text.contains("password authentication failed") {
            "give the source user and password = { file = \"…\" }, and check that they are right".into()
        } else if text.contains("Peer authentication failed") || text.contains("role \"root\" does not exist") {
            "the server wants the connection from its own user: run_as = \"postgres\", or a role of keepd's own (see docs/applications.md)"
                .into()
        } else {
            String::new()
        };
        let hint = if hint.is_empty() { hint } else { format!("{hint}. ") };
        SourceError::Failed(format!("database {database}: {hint}{text}"))
    }
}

/// A database's name in a connection string, whatever characters it has.
fn named(database: &str) -> String {
    format!("dbname='{}'", database.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// Text of a backup without the lines that hold a backslash, and how many of them say anything: psql takes what follows one, outside of quotes, for a command
/// of its own (`\\! …` runs a program, as whoever runs psql). Where a text's quotes begin and end is up to settings that the text itself may change, so
/// there must be none at all. `\\restrict`, which newer tools put around what they print, is not missed.
pub fn without_commands(text: &str) -> (String, usize) {
    let (mut kept, mut left_out) = (String::with_capacity(text.len()), 0);
    for line in text.split_inclusive('\n') {
        match line.contains('\\') {
            false => kept.push_str(line),
            true => left_out += usize::from(!line.starts_with("\\restrict ") && !line.starts_with("\\unrestrict ")),
        }
    }
    (kept, left_out)
}

/// A name as SQL has it.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_backup_is_a_command_of_psql() {
        let text = "\\restrict abc\nCREATE ROLE shop;\n\\! touch /tmp/x\nSELECT 1 \\! id\n\n-- it's\nALTER ROLE shop SET a TO E'b\\\\c';\nCREATE ROLE b;\n\\unrestrict abc\n";
        assert_eq!(without_commands(text), ("CREATE ROLE shop;\n\n-- it's\nCREATE ROLE b;\n".to_owned(), 3));
        assert_eq!(without_commands("a\r\\! id\nb"), ("b".to_owned(), 1));
    }
}
