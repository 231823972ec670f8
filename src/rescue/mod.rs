//! `keepd rescue`: backups are listed, restored, exported and checked with nothing but the storage and a key. No daemon, no configuration, no state.
//!
//! Nothing is ever written to the storage: no lease, no lock, no temporary object, so it works beside a daemon that writes there. What it needs to
//! remember (the index, the list of backups) goes into a temporary directory. It goes on with what is whole, and names what is not. [`bootstrap`]
//! alone writes a configuration and a state, and becomes the writer of a repository where that is asked for.

mod arguments;
pub(crate) mod attacked;
mod bootstrap;
mod export;
mod keys;
mod look;
mod opened;
mod place;
mod pour;
#[path = "../../ctl/src/render.rs"]
#[allow(dead_code)]
mod render;
mod restore;

use std::io::{self, Write};
use std::process::ExitCode;

use keepd_protocol::model::escape;

pub use arguments::Command;

use crate::run::live::Failure as RunFailure;

/// What a rescue's exit status says; keepctl's are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Good = 0,
    Failed = 1,
    Usage = 2,
    /// Something could not be read, and was left out and named.
    Partial = 3,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// An error for people.
#[derive(Debug)]
struct Failure {
    exit: Exit,
    text: String,
}

type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    fn failed(text: impl std::fmt::Display) -> Self {
        Self { exit: Exit::Failed, text: text.to_string() }
    }

    fn usage(text: impl std::fmt::Display) -> Self {
        Self { exit: Exit::Usage, text: text.to_string() }
    }
}

impl From<RunFailure> for Failure {
    fn from(failure: RunFailure) -> Self {
        Self::failed(failure)
    }
}

impl From<crate::repository::RepositoryError> for Failure {
    fn from(error: crate::repository::RepositoryError) -> Self {
        Self::failed(RunFailure::from(error))
    }
}

impl From<crate::ledger::LedgerError> for Failure {
    fn from(error: crate::ledger::LedgerError) -> Self {
        Self::failed(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // Whoever reads our output may stop early (head, less); that is no error of ours.
            io::ErrorKind::BrokenPipe => Self { exit: Exit::Good, text: String::new() },
            _ => Self::failed(error),
        }
    }
}

/// Carries a command out.
pub fn run(command: &Command) -> ExitCode {
    // What storages have to say (that they try again, mostly). Where nobody reads it any more that is no reason to end: told on the same closed pipe it would be a panic.
    let _ = tracing_subscriber::fmt()
        .log_internal_errors(false)
        .with_writer(io::stderr)
        .with_max_level(tracing::Level::WARN)
        .without_time()
        .with_target(false)
        .try_init();
    let done = match command {
        Command::List { place, job } => look::list(place, job.as_deref()),
        Command::Ls { place, of, path, recursive } => look::ls(place, of, path.as_deref(), *recursive),
        Command::Restore { place, of, to, paths, overwrite, numeric_owner } => {
            let options = keepd_writer::Options { overwrite: *overwrite, numeric_owner: *numeric_owner, memory: None };
            restore::restore(place, of, to, paths, options)
        }
        Command::Export { place, of, output, paths } => export::export(place, of, output, paths),
        Command::Bootstrap { place, how } => bootstrap::bootstrap(place, how),
        Command::Check { place, read_data } => look::check(place, read_data.unwrap_or(0)),
    };
    done.unwrap_or_else(|failure| {
        if !failure.text.is_empty() {
            tell(&format!("keepd rescue: {}", failure.text));
        }
        failure.exit
    })
    .into()
}

/// To standard error, each line without control characters.
fn tell(text: &str) {
    for line in text.lines() {
        let _ = writeln!(io::stderr(), "{}", escape(line));
    }
}

/// Problems told one by one.
const MAX_TOLD: usize = 100;

fn tell_some(what: &str, problems: &[String]) {
    problems.iter().take(MAX_TOLD).for_each(|p| tell(&format!("{what}: {p}")));
    if problems.len() > MAX_TOLD {
        tell(&format!("({} more)", problems.len() - MAX_TOLD));
    }
}

fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
    writeln!(out)?;
    Ok(())
}
