//! The tools of MySQL and MariaDB, started so that no password stands on a command line or in an environment.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use super::explain;
use super::moving::Contents;
use super::options::{self, Family};

use crate::config::ServerSource;
use crate::process::{Job, ProcessError, secret_path};
use crate::secret;
use crate::source::SourceError;
use crate::source::load::PATIENCE;

/// Questions are answered within so long.
const ANSWER_WITHIN: Duration = Duration::from_secs(600);
/// Of an answer, in bytes.
const MOST_ANSWER: usize = 256 << 20;
/// A tool tells its version within so long.
const VERSION_WITHIN: Duration = Duration::from_secs(60);

const DUMP_TOOLS: [&str; 2] = ["mariadb-dump", "mysqldump"];
const CLIENTS: [&str; 2] = ["mariadb", "mysql"];

/// A tool that is there.
struct Tool {
    program: OsString,
    family: Family,
    /// The file of options, as this tool reads it.
    options: Zeroizing<Vec<u8>>,
}

/// A server as configured.
pub struct Client<'s> {
    pub source: &'s ServerSource,
    dump: Tool,
    client: Tool,
    /// What the scratch database had before its events were dropped.
    pub loaded: Mutex<Option<Contents>>,
}

impl<'s> Client<'s> {
    /// Reads the password, if there is one, and finds the tools.
    pub fn new(source: &'s ServerSource, cancel: &CancellationToken) -> Result<Self, SourceError> {
        let password = source.password.as_ref().map(secret::read).transpose();
        let password = password.map_err(|e| SourceError::Failed(format!("password: {e}")))?.map(Zeroizing::new);
        let password = password.as_deref().map(String::as_str);
        let (dump, client) = (tool(source, DUMP_TOOLS, password, cancel)?, tool(source, CLIENTS, password, cancel)?);
        let client = Self { source, dump, client, loaded: Mutex::default() };
        client.encrypts(cancel)?;
        Ok(client)
    }

    /// MariaDB's tools before 11.4 go on without encryption where the server has none, unless they verify its certificate.
    fn encrypts(&self, cancel: &CancellationToken) -> Result<(), SourceError> {
        let sure = [&self.dump, &self.client].iter().all(|tool| tool.family != Family::MariaDb);
        if sure || self.source.sslmode.as_deref() != Some("require") {
            return Ok(());
        }
        let rows = self.table("show session status like 'Ssl_cipher'", cancel)?;
        let cipher = rows.into_iter().next().and_then(|row| row.into_iter().nth(1).flatten()).unwrap_or_default();
        match cipher.is_empty() {
            true => Err(SourceError::Failed(
                "the connection is not encrypted, as sslmode = \"require\" wants it: the server has no TLS; set it up there, or change sslmode".into(),
            )),
            false => Ok(()),
        }
    }

    fn job(&self, tool: &Tool, arguments: &[&str]) -> Job<'s> {
        // Only as the first argument it keeps the tool from reading the machine's own options, which could change what a dump is.
        let first = format!("--defaults-file={}", secret_path(0));
        let common = ["--default-character-set=utf8mb4", "--max-allowed-packet=1G"];
        let arguments = std::iter::once(first.as_str()).chain(common).chain(arguments.iter().copied()).map(OsString::from);
        let mut job = Job::new(std::iter::once(tool.program.clone()).chain(arguments));
        job.run_as = self.source.run_as.as_deref();
        // Messages in English are understood here, too.
        job.environment.push(("LC_ALL", "C.UTF-8".into()));
        // MySQL's tools would read ~/.mylogin.cnf whatever else they are told.
        job.environment.push(("MYSQL_TEST_LOGIN_FILE", "/nonexistent/keepd".into()));
        job.secrets.push(tool.options.clone());
        job
    }

    fn printing(&self, options: &[&str], database: &str, tables: &[String]) -> Job<'s> {
        let mut arguments = vec!["--single-transaction", "--quick", "--hex-blob", "--skip-dump-date"];
        if let Family::MySql { statistics } = self.dump.family {
            arguments.extend(["--set-gtid-purged=OFF", "--no-tablespaces"]);
            arguments.extend(statistics.then_some("--column-statistics=0"));
        }
        arguments.extend(options);
        arguments.extend(["--", database]);
        arguments.extend(tables.iter().map(String::as_str));
        self.job(&self.dump, &arguments)
    }

    /// Prints a database as statements that load into any schema.
    pub fn dump(&self, database: &str) -> Job<'s> {
        let excluded: Vec<String> = self.excluded(database).map(|table| format!("--ignore-table={database}.{table}")).collect();
        let mut options = vec!["--routines", "--triggers", "--events"];
        options.extend(excluded.iter().map(String::as_str));
        self.printing(&options, database, &[])
    }

    /// The tables of a database that are left out.
    pub fn excluded<'a>(&'a self, database: &'a str) -> impl Iterator<Item = &'a str> {
        self.source.exclude_tables.iter().filter_map(move |pattern| match pattern.split_once('.') {
            Some((of, table)) => (of == database).then_some(table),
            None => Some(pattern.as_str()),
        })
    }

    /// What a database has beside its tables: its triggers, routines and events.
    pub fn print_code(&self, database: &str) -> Job<'s> {
        self.printing(&["--no-data", "--no-create-info", "--routines", "--triggers", "--events"], database, &[])
    }

    /// Views of a database.
    pub fn print_views(&self, database: &str, views: &[String]) -> Job<'s> {
        self.printing(&["--no-data", "--skip-triggers"], database, views)
    }

    /// Runs the statements on its standard input, up to the first that fails.
    pub fn load(&self, database: &str) -> Job<'s> {
        // Binary: what is in a dump is SQL and never a command to the client.
        self.job(&self.client, &["--batch", "--binary-mode", &format!("--database={database}")])
    }

    /// Prints what a dump tool has to say.
    pub fn printed(&self, job: &Job<'_>, database: &str, cancel: &CancellationToken) -> Result<Vec<u8>, SourceError> {
        job.run(b"", MOST_ANSWER, PATIENCE, cancel).map_err(|e| self.explained(&e, database))
    }

    /// The first column of a question's rows. The client prints NULL as the text `NULL`, so that neither is in the answer.
    pub fn ask(&self, database: &str, sql: &str, cancel: &CancellationToken) -> Result<Vec<String>, SourceError> {
        let output = self.answer(Some(database), sql, ANSWER_WITHIN, cancel)?;
        Ok(rows(&output).into_iter().filter_map(|row| row.into_iter().next().flatten()).collect())
    }

    /// The first value of a question's first row; None when there is no row, or none but an empty text.
    pub fn first(&self, database: &str, sql: &str, cancel: &CancellationToken) -> Result<Option<String>, SourceError> {
        let output = self.answer(Some(database), sql, PATIENCE, cancel)?;
        let line = output.split(|b| *b == b'\n').next().unwrap_or_default();
        let value = line.split(|b| *b == b'\t').next().unwrap_or_default();
        Ok((!value.is_empty()).then(|| field(value).unwrap_or_else(|| "NULL".into())))
    }

    /// Rows of a question about the server, which may take as long as it wants.
    pub fn table(&self, sql: &str, cancel: &CancellationToken) -> Result<Vec<Vec<Option<String>>>, SourceError> {
        Ok(rows(&self.answer(None, sql, PATIENCE, cancel)?))
    }

    /// Rows of a question about the server that is answered within so long.
    pub fn table_within(&self, sql: &str, limit: Duration, cancel: &CancellationToken) -> Result<Vec<Vec<Option<String>>>, SourceError> {
        Ok(rows(&self.answer(None, sql, limit, cancel)?))
    }

    /// Runs statements, which must all go well.
    pub fn execute(&self, sql: &str, cancel: &CancellationToken) -> Result<(), SourceError> {
        self.answer(None, sql, PATIENCE, cancel).map(drop)
    }

    /// Runs a text of statements in a database.
    pub fn run(&self, database: &str, sql: &[u8], cancel: &CancellationToken) -> Result<(), SourceError> {
        self.load(database).run(sql, MOST_ANSWER, PATIENCE, cancel).map(drop).map_err(|e| self.explained(&e, database))
    }

    /// The same, but goes on after a statement that fails.
    pub fn run_on(&self, database: &str, sql: &[u8], cancel: &CancellationToken) -> Result<(), SourceError> {
        let mut job = self.load(database);
        job.command.push("--force".into());
        job.run(sql, MOST_ANSWER, PATIENCE, cancel).map(drop).map_err(|e| self.explained(&e, database))
    }

    fn answer(&self, database: Option<&str>, sql: &str, limit: Duration, cancel: &CancellationToken) -> Result<Vec<u8>, SourceError> {
        let option = database.map(|d| format!("--database={d}"));
        let mut arguments = vec!["--batch", "--skip-column-names", "--binary-mode"];
        arguments.extend(option.as_deref());
        let input = format!("{}\n;\n", sql.trim_end().trim_end_matches(';'));
        let done = self.job(&self.client, &arguments).run(input.as_bytes(), MOST_ANSWER, limit, cancel);
        done.map_err(|e| match database {
            Some(database) => self.explained(&e, database),
            None => explain::told(&e, self.source),
        })
    }

    /// An error about a database in words that tell what to do.
    pub fn explained(&self, error: &ProcessError, database: &str) -> SourceError {
        match explain::told(error, self.source) {
            SourceError::Failed(text) => SourceError::Failed(format!("database {database}: {text}")),
            other => other,
        }
    }
}

/// Finds a tool by the first of its names that is there, and asks whose it is.
fn tool(source: &ServerSource, names: [&str; 2], password: Option<&str>, cancel: &CancellationToken) -> Result<Tool, SourceError> {
    let places: Vec<PathBuf> = match &source.bin_dir {
        Some(dir) => vec![dir.clone()],
        None => std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default(),
    };
    let found = names.iter().flat_map(|name| places.iter().map(move |dir| dir.join(name))).find(|path| path.is_file());
    let Some(program) = found else {
        let [first, second] = names;
        let place = source.bin_dir.as_ref().map_or("keepd's PATH".to_owned(), |dir| dir.display().to_string());
        return Err(SourceError::Failed(format!(
            "neither {first} nor {second} is in {place}; install the server's client tools (Debian: mariadb-client or default-mysql-client), or \
             name their directory: bin_dir = \"/opt/mysql/bin\""
        )));
    };
    let program = program.into_os_string();
    let mut job = Job::new([program.clone(), "--no-defaults".into(), "--version".into()]);
    job.run_as = source.run_as.as_deref();
    let version = job.run(b"", 1 << 20, VERSION_WITHIN, cancel)?;
    let family = Family::of(&String::from_utf8_lossy(&version));
    let options = options::text(source, password, family).map_err(SourceError::Failed)?;
    Ok(Tool { program, family, options })
}

/// What the client prints with `--batch`.
fn rows(output: &[u8]) -> Vec<Vec<Option<String>>> {
    let lines = output.split(|b| *b == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| line.split(|b| *b == b'\t').map(field).collect()).collect()
}

fn field(text: &[u8]) -> Option<String> {
    if text == b"NULL" {
        return None;
    }
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        match (byte, byte == &b'\\') {
            (byte, false) => out.push(*byte),
            _ => match bytes.next() {
                Some(b'n') => out.push(b'\n'),
                Some(b't') => out.push(b'\t'),
                Some(b'0') => out.push(0),
                Some(b'\\') | None => out.push(b'\\'),
                Some(other) => out.extend([b'\\', *other]),
            },
        }
    }
    Some(String::from_utf8_lossy(&out).into_owned())
}

/// A name as SQL has it.
pub fn quoted(name: &str) -> String {
    format!("`{}`", name.replace('`', "``"))
}

/// A text as SQL has it.
pub fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_as_they_were_meant() {
        let output = b"a\\tb\\nc\\\\d\\0e\tsecond\nNULL\tx\n\\q\\\n";
        let read = rows(output);
        assert_eq!(read[0], [Some("a\tb\nc\\d\0e".to_owned()), Some("second".to_owned())]);
        assert_eq!(read[1], [None, Some("x".to_owned())]);
        assert_eq!(read[2], [Some("\\q\\".to_owned())]);
        assert_eq!(quoted("a`b"), "`a``b`");
        assert_eq!(literal("a'b\\"), "'a''b\\\\'");
    }
}
