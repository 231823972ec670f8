//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

#[derive(Parser)]
#[command(name = "keepctl", version, about = "Talks to keepd, the backup daemon, over its local socket")]
#[command(
    after_help = "Exit: 0 good, 1 failed, 2 usage, 3 partly done or suspect, 4 daemon unreachable, 5 not permitted, 6 overdue (status).\nBACKUP is an id as 'keepctl list' shows it, a unique start of one, or 'latest' (with --job for one job's)."
)]
pub struct Arguments {
    /// The daemon's socket (else $KEEPD_SOCKET, else the default)
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// One JSON document on standard output and nothing else
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress bars and lines
    #[arg(long, global = true)]
    pub no_progress: bool,
    /// Errors only
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Tell more
    #[arg(short, long, global = true)]
    pub verbose: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Args, Clone)]
pub struct BackupArgument {
    /// An id, a unique start of one, or 'latest'
    pub backup: String,
    /// The job whose backup is meant
    #[arg(long, value_name = "JOB")]
    pub job: Option<String>,
}

#[derive(Subcommand)]
pub enum Command {
    /// Jobs, last good backup, next run, destinations
    Status { job: Option<String> },
    /// Back a job up now
    Backup {
        job: String,
        #[arg(long = "type", value_name = "TYPE", value_parser = ["manual", "pre-update"])]
        r#type: Option<String>,
        /// A label to find it by; may be repeated
        #[arg(long, value_name = "K=V")]
        label: Vec<String>,
        #[arg(long)]
        name: Option<String>,
        /// Return at once
        #[arg(long)]
        detach: bool,
    },
    /// Backups, newest first
    List {
        #[arg(long)]
        job: Option<String>,
        #[arg(long)]
        destination: Option<String>,
    },
    /// One backup with its facts
    Show(BackupArgument),
    /// What is in a backup
    Ls {
        #[command(flatten)]
        of: BackupArgument,
        path: Option<OsString>,
        #[arg(short = 'R', long)]
        recursive: bool,
    },
    /// A file's contents to standard output
    Cat {
        #[command(flatten)]
        of: BackupArgument,
        path: OsString,
    },
    /// What differs between two backups
    Diff {
        a: String,
        b: String,
        #[arg(long)]
        job: Option<String>,
    },
    /// Write a backup, or parts of it, to a directory
    Restore {
        #[command(flatten)]
        of: BackupArgument,
        /// Where DIR/<source>/… is written
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
        /// <source> or <source>/<path>; none means all
        paths: Vec<OsString>,
        /// Replace files that exist
        #[arg(long)]
        overwrite: bool,
        /// Owners by number, not by name
        #[arg(long)]
        numeric_owner: bool,
    },
    /// Prove that a destination's backups are whole
    Check {
        destination: String,
        /// Read the packs too, all or so many percent of them
        #[arg(long, value_name = "PERCENT", num_args = 0..=1, require_equals = true, default_missing_value = "100", value_parser = clap::value_parser!(u32).range(0..=100))]
        read_data: Option<u32>,
    },
    /// Remove what no backup needs
    Prune {
        destination: String,
        #[arg(long)]
        dry_run: bool,
    },
    /// Remove a backup
    Delete {
        #[command(flatten)]
        of: BackupArgument,
        /// Only there
        #[arg(long)]
        destination: Option<String>,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Jobs as configured
    #[command(subcommand)]
    Job(JobCommand),
    /// Runs: history, progress, cancel
    #[command(subcommand)]
    Run(RunCommand),
    /// Events as they happen
    Watch,
    /// Have the daemon read its configuration again
    Reload,
    /// The manual page, for make install
    #[command(hide = true)]
    Manual,
    /// A completion script for a shell
    Completion { shell: clap_complete::Shell },
}

#[derive(Subcommand)]
pub enum JobCommand {
    List,
    Show { job: String },
}

#[derive(Subcommand)]
pub enum RunCommand {
    List {
        #[arg(long)]
        job: Option<String>,
        /// How many, the newest first
        #[arg(short = 'n', long, default_value_t = 20)]
        limit: u32,
    },
    Show {
        run: String,
    },
    /// Progress until it ends
    Follow {
        run: String,
    },
    /// Ask it to stop at its next safe point
    Cancel {
        run: String,
    },
}
