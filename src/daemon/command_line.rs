//! `keepd`'s command line: what was asked for, and the exit code that answers.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{ArgAction, CommandFactory, Parser, Subcommand};
use rustix::fs::Mode;

use crate::config;
use crate::crypto::{key_file, locked};
use crate::machine;
use crate::rescue;

/// How keepd ends. Services and scripts rely on these numbers (docs/operations.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done, or stopped as asked.
    Good,
    /// Tried and failed; the log says why.
    Failed,
    /// The configuration is wrong: starting again without mending it would not help (EX_CONFIG of sysexits.h).
    Configuration,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(match exit {
            Exit::Good => 0,
            Exit::Failed => 1,
            Exit::Configuration => 78,
        })
    }
}

/// A backup daemon for the applications on a Linux machine.
///
/// Without a subcommand it runs in the foreground until SIGTERM; SIGHUP makes it read its configuration again.
#[derive(Debug, Parser)]
#[command(name = "keepd", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    /// The configuration file; its drop-ins stand beside it in conf.d
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check the configuration, say everything that is wrong with it, and exit
    #[arg(long)]
    check: bool,
    /// Log more (twice: everything); RUST_LOG overrides it
    #[arg(long, short, action = ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The manual page, for make install
    #[command(hide = true)]
    Manual,
    /// Bring backups back with nothing but the storage and a key: no daemon, no configuration
    #[command(subcommand)]
    Rescue(Box<rescue::Command>),
    /// Make keys
    Key {
        #[command(subcommand)]
        command: KeyCommand,
    },
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Write a new random key to FILE, readable by you alone; an existing file is never overwritten
    Generate {
        file: PathBuf,
        /// A key pair for write-only backups: the private key to FILE, the public one to FILE.pub
        #[arg(long)]
        pair: bool,
    },
}

/// Parses and hands over.
pub fn run() -> ExitCode {
    let arguments = Arguments::parse();
    // Before any thread and any file: what keepd makes is its own user's alone.
    rustix::process::umask(Mode::from_raw_mode(0o077));
    locked::guard_process().iter().for_each(|text| complain(&format!("warning: {text}")));
    let exit = match arguments.command {
        Some(Command::Key { command: KeyCommand::Generate { file, pair: true } }) => generate_pair(&file),
        Some(Command::Key { command: KeyCommand::Generate { file, pair: false } }) => generate_key(&file),
        Some(Command::Manual) => manual(),
        Some(Command::Rescue(command)) => return rescue::run(&command),
        None => {
            let path = arguments.config.unwrap_or_else(config::default_path);
            // A path relative to today's directory must still be right at the next reload, and in messages.
            let path = std::path::absolute(&path).unwrap_or(path);
            if arguments.check { check(&path) } else { super::run(&path, arguments.verbose) }
        }
    };
    exit.into()
}

fn check(path: &Path) -> Exit {
    let checked = machine::load(path).and_then(|loaded| {
        loaded.warnings.iter().for_each(|problem| complain(&problem.to_string()));
        loaded.without_errors()
    });
    let loaded = match checked {
        Ok(loaded) => loaded,
        Err(problems) => {
            complain(&problems);
            return Exit::Failed;
        }
    };
    let jobs = count(loaded.config.jobs.len(), "job", "jobs");
    let destinations = count(loaded.config.destinations.len(), "destination", "destinations");
    say(&format!("configuration {} is valid: {jobs}, {destinations}", path.display()));
    Exit::Good
}

fn manual() -> Exit {
    match clap_mangen::Man::new(Arguments::command()).render(&mut std::io::stdout()) {
        Ok(()) => Exit::Good,
        Err(_) => Exit::Failed,
    }
}

fn generate_key(file: &Path) -> Exit {
    match key_file::generate(file) {
        Ok(fingerprint) => {
            say(&format!(
                "made the key {} (fingerprint {fingerprint})\nKeep a copy of it where a fire here does not reach: without it nobody, you included, can read the backups.",
                file.display()
            ));
            Exit::Good
        }
        Err(error) => {
            complain(&error.to_string());
            Exit::Failed
        }
    }
}

fn generate_pair(file: &Path) -> Exit {
    match key_file::generate_pair(file) {
        Ok((fingerprint, public)) => {
            say(&format!(
                "made the private key {} and its public key {} (fingerprint {fingerprint})\n\
                 The public key goes to the machine that is backed up: name it as public_key of an encryption profile there.\n\
                 The private key stays away from that machine. Keep copies of it where a fire does not reach them all: without it nobody, you \
                 included, can read what is in the backups. Restores are given it with 'keepctl … --key FILE'.",
                file.display(),
                public.display()
            ));
            Exit::Good
        }
        Err(error) => {
            complain(&error.to_string());
            Exit::Failed
        }
    }
}

/// `1 job`, `2 jobs`.
pub(super) fn count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

fn say(text: &str) {
    // A reader that went away is no reason to fail.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// To standard error, where nothing can be logged yet.
pub(super) fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "{}", text.trim_end());
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_subcommand_and_daemon_options_exclude_each_other() {
        assert!(Arguments::try_parse_from(["keepd", "--check", "key", "generate", "x"]).is_err());
        assert!(Arguments::try_parse_from(["keepd", "key", "generate"]).is_err());
        assert!(Arguments::try_parse_from(["keepd", "stray"]).is_err());
        let daemon = Arguments::try_parse_from(["keepd", "-vv", "--config", "a.toml"]).expect("valid");
        assert_eq!((daemon.verbose, daemon.config), (2, Some(PathBuf::from("a.toml"))));
    }
}
