//! keepctl: talks to keepd over its local socket, or through ssh over that of another machine. Thin: arguments, progress, tables; the engine is the daemon's.

mod access;
mod arguments;
mod audit;
mod change;
mod client;
mod commands;
mod compare;
mod config;
mod coverage;
mod destination;
mod drill;
mod edit;
mod editor;
mod export;
mod follow;
mod import;
mod in_place;
mod job;
mod key;
mod keys;
#[path = "../../src/config/line_ends.rs"]
mod line_ends;
mod new_file;
mod remote;
mod render;
mod signals;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = arguments::Arguments::parse();
    let done = commands::run(&arguments);
    remote::end();
    match done {
        Ok(code) => code.into(),
        Err(failure) => {
            if !failure.text.is_empty() {
                // The daemon's words, names of files: nothing of it is to move the cursor.
                eprintln!("keepctl: {}", render::escaped(&failure.text));
            }
            failure.exit.into()
        }
    }
}

/// What keepctl's exit status says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Good = 0,
    Failed = 1,
    Usage = 2,
    /// Partly done, or suspect.
    Partial = 3,
    Unreachable = 4,
    NotPermitted = 5,
    Overdue = 6,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// An error for people, with the exit status it means.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    pub text: String,
}

impl Failure {
    pub fn new(exit: Exit, text: impl std::fmt::Display) -> Self {
        Self { exit, text: text.to_string() }
    }

    pub fn failed(text: impl std::fmt::Display) -> Self {
        Self::new(Exit::Failed, text)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        // Whoever reads our output may stop early (head, less); that is no error of ours.
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Self::new(Exit::Good, ""),
            _ => Self::failed(error),
        }
    }
}
