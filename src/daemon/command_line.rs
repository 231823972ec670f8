//! `keepd`'s command line.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::{self, Severity};
use crate::crypto::key_file;

/// The configuration is wrong (EX_CONFIG of sysexits): starting again does not help.
pub const EXIT_CONFIG: u8 = 78;

#[derive(Parser)]
#[command(
    name = "keepd",
    version,
    about = "A backup daemon for the applications on a Linux machine",
    args_conflicts_with_subcommands = true
)]
struct Arguments {
    /// The configuration file; conf.d/*.toml beside it is read too
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check the configuration and exit
    #[arg(long)]
    check: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Keys
    #[command(subcommand)]
    Key(Key),
}

#[derive(Subcommand)]
enum Key {
    /// Make a key file that only its owner can read; an existing file is never overwritten
    Generate { file: PathBuf },
}

/// Parses and hands over.
pub fn run() -> ExitCode {
    let arguments = Arguments::parse();
    // What the daemon makes is nobody else's.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    if let Some(Command::Key(Key::Generate { file })) = arguments.command {
        return generate(&file);
    }
    let path = arguments.config.unwrap_or_else(config::default_path);
    let path = std::path::absolute(&path).unwrap_or(path);
    let loaded = match config::load(&path) {
        Ok(loaded) => loaded,
        Err(problems) => {
            eprintln!("{problems}");
            return ExitCode::from(if arguments.check { 1 } else { EXIT_CONFIG });
        }
    };
    let found = config::check_files(&loaded);
    for problem in &found {
        eprintln!("{problem}");
    }
    let wrong = found.iter().any(|p| p.severity == Severity::Error);
    if arguments.check {
        if wrong {
            return ExitCode::FAILURE;
        }
        println!(
            "{} is valid: {} jobs, {} destinations, {} encryption profiles",
            path.display(),
            loaded.jobs.len(),
            loaded.destinations.len(),
            loaded.encryption.len()
        );
        return ExitCode::SUCCESS;
    }
    if wrong {
        return ExitCode::from(EXIT_CONFIG);
    }
    match super::run(path, loaded) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn generate(file: &std::path::Path) -> ExitCode {
    match key_file::generate(file) {
        Ok(fingerprint) => {
            println!("made {} (fingerprint {fingerprint}); keep a copy of it where a fire here does not reach", file.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("keepd: {error}");
            ExitCode::FAILURE
        }
    }
}
