//! What the user says must hold of a restored backup.

use std::ffi::OsString;
use std::path::Path;

use keepd_protocol::model::{Backup, Level};

use super::servers::{Kind, Server};
use super::{Result, Trouble, Wrong, failed, only_file};
use crate::config::{Assertion, Job, Program};
use crate::process::{Job as Process, Pipes, ProcessError};
use crate::repository::Manifest;
use crate::run::live::{Failure, LiveRun};
use crate::source::{SourceError, command, sqlite};

/// Of an answer so much is told.
const TOLD_CHARS: usize = 200;

/// Checks all of them, in order; each that does not hold goes into `wrong`.
pub fn check(
    job: &Job,
    backup: &Backup,
    manifest: &Manifest,
    tree: &Path,
    servers: &[Server],
    wrong: &mut Wrong,
    live: &LiveRun,
) -> Result<()> {
    let all = job.drill.assertions.len();
    for (n, assertion) in job.drill.assertions.iter().enumerate() {
        live.step(&format!("assertion {} of {all}", n + 1));
        if let Assertion::Sql { source, .. } | Assertion::File { source, .. } = assertion
            && !manifest.sources.iter().any(|s| s.name == *source)
        {
            live.message(Level::Warning, format!("assertion {} is about source {source}, which this backup does not have", n + 1));
            continue;
        }
        let checked = match assertion {
            Assertion::Sql { sql, source, database } => question(sql, source, database.as_deref(), tree, servers, live),
            Assertion::File { source, path, min_size } => file(&tree.join(source).join(path), &format!("{source}/{path}"), *min_size),
            Assertion::Command(program) => run(program, job, backup, tree, servers, live),
        };
        wrong.take(checked)?;
    }
    Ok(())
}

fn question(sql: &str, source: &str, database: Option<&str>, tree: &Path, servers: &[Server], live: &LiveRun) -> Result<()> {
    let asked = match servers.iter().find(|s| s.source == source) {
        Some(server) => {
            // One that did not load was told already.
            let Some(name) = database.and_then(|d| server.name_of(d)) else {
                let database = database.unwrap_or_default();
                return Err(Trouble::Bad(format!("source {source}: database {database} is not there to be asked: {sql}")));
            };
            server.first(name, sql, &live.cancel)
        }
        None => {
            let file = only_file(&tree.join(source));
            let file = file.ok_or_else(|| Trouble::Bad(format!("source {source}: its database is not there to be asked: {sql}")))?;
            sqlite::first(&file, sql, &live.cancel)
        }
    };
    let value = match asked {
        Ok(value) => value,
        Err(SourceError::Failed(text)) if super::servers::is_of_surroundings(&text, true) => {
            return Err(Trouble::untried(format!("source {source}: '{sql}' could not be asked: {text}")));
        }
        Err(SourceError::Failed(text)) => return Err(Trouble::Bad(format!("source {source}: '{sql}' is not answered: {text}"))),
        Err(e) => return Err(failed(source, e)),
    };
    match value.as_deref().is_some_and(is_true) {
        true => Ok(()),
        false => {
            let value = value.map_or_else(|| "nothing (no row, or an empty text)".to_owned(), |v| v.chars().take(TOLD_CHARS).collect());
            Err(Trouble::Bad(format!("source {source}: '{sql}' should be true, and is {value}")))
        }
    }
}

/// A number other than 0, or a word for yes.
fn is_true(value: &str) -> bool {
    let value = value.trim();
    match value.parse::<f64>() {
        Ok(number) => number != 0.0 && !number.is_nan(),
        Err(_) => ["true", "t", "yes", "y", "on"].iter().any(|word| value.eq_ignore_ascii_case(word)),
    }
}

fn file(path: &Path, shown: &str, min_size: u64) -> Result<()> {
    let stat = match std::fs::symlink_metadata(path) {
        Ok(stat) => stat,
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Err(Trouble::Bad(format!("{shown} should be there, and is not in the backup")));
        }
        Err(e) => return Err(Trouble::untried(format!("{shown} cannot be looked at: {e}"))),
    };
    match stat.is_file() {
        false => Err(Trouble::Bad(format!("{shown} should be a file, and is none"))),
        true if stat.len() < min_size => {
            Err(Trouble::Bad(format!("{shown} should have {min_size} bytes at least, and has {}", stat.len())))
        }
        true => Ok(()),
    }
}

fn run(program: &Program, job: &Job, backup: &Backup, tree: &Path, servers: &[Server], live: &LiveRun) -> Result<()> {
    let shown = program.command.join(" ");
    let mut environment: Vec<(&str, OsString)> = vec![
        ("KEEPD_DRILL_DIR", tree.into()),
        ("KEEPD_JOB", job.name.as_str().into()),
        ("KEEPD_BACKUP", backup.id.as_str().into()),
        ("KEEPD_RUN", live.id().into()),
    ];
    for kind in [Kind::Postgres, Kind::Mysql] {
        environment.extend(servers.iter().find(|s| s.kind == kind).map(Server::environment).unwrap_or_default());
    }
    let process = Process { memory: Some(job.drill.memory), follows: Some("KILL"), ..command::job(program, environment) };
    let untried = |e: ProcessError| Trouble::from(Failure::from(e.about("assertion")));
    // Both of its outputs go one way, so that what it says stays in order.
    let ended = process.start(Pipes::Input).and_then(|running| running.finish(program.timeout, &live.cancel)).map_err(untried)?;
    match ended.status.success() {
        true => {
            if !ended.said.is_empty() {
                live.message(Level::Info, format!("{shown}: {}", ended.said));
            }
            Ok(())
        }
        // Of setpriv and prlimit: the program is not there, or cannot be run.
        false if matches!(ended.status.code(), Some(126 | 127)) => {
            Err(Trouble::untried(format!("the assertion '{shown}' cannot be run: {}", ended.said)))
        }
        false => Err(Trouble::Bad(format!("the assertion '{shown}' does not hold: {}", ended.told()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_meant_as_true_is() {
        for yes in ["1", "-1", "0.5", "t", "TRUE", "yes", "on", " 7 ", "1e3"] {
            assert!(is_true(yes), "{yes}");
        }
        for no in ["0", "0.0", "-0", "f", "false", "no", "off", "NULL", "", "null", "abc", "NaN"] {
            assert!(!is_true(no), "{no}");
        }
    }
}
