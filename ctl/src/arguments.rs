//! The command line.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::access::AccessCommand;
use crate::audit::AuditCommand;
use crate::config::ConfigCommand;
use crate::destination::DestinationCommand;
use crate::export::ExportArguments;
use crate::job::JobCommand;
use crate::keys::KeyArguments;
use crate::remote::RemoteArguments;

#[derive(Parser)]
#[command(
    name = "keepctl",
    version,
    about = "Talks to keepd, the backup daemon, over its local socket, or through ssh to another machine's"
)]
#[command(
    after_help = "Exit: 0 good, 1 failed, 2 usage, 3 partly done or suspect, 4 daemon unreachable, 5 not permitted, 6 overdue (status).\nBACKUP is an id as 'keepctl list' shows it, a unique start of one, or 'latest' (with --job for one job's)."
)]
pub struct Arguments {
    /// The daemon's socket (else $KEEPD_SOCKET, else the default); with --host the socket there
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    #[command(flatten)]
    pub remote: RemoteArguments,
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

/// Where a restore goes.
#[derive(Args, Clone)]
#[group(required = true, multiple = false)]
pub struct RestoreTarget {
    /// Where DIR/<source>/… is written
    #[arg(long, value_name = "DIR")]
    pub to: Option<PathBuf>,
    /// Bring a database back as this one, into the server it came from
    #[arg(long, value_name = "NAME")]
    pub to_database: Option<String>,
    /// To where it came from, all of it or nothing: what is there is backed up first, services are stopped meanwhile
    #[arg(long)]
    pub in_place: bool,
}

#[derive(Args, Clone)]
pub struct BackupArgument {
    /// An id, a unique start of one, or 'latest'
    pub backup: String,
    /// The job whose backup is meant
    #[arg(long, value_name = "JOB")]
    pub job: Option<String>,
}

/// Retention rules by the names they have in the configuration.
#[derive(Args, Clone)]
pub struct Rules {
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_last: Option<u32>,
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_hourly: Option<u32>,
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_daily: Option<u32>,
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_weekly: Option<u32>,
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_monthly: Option<u32>,
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_yearly: Option<u32>,
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_days: Option<u32>,
    /// Such as 36h, 30d, 8w
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    pub keep_within: Option<u64>,
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub min_keep: Option<u32>,
}

impl Rules {
    /// By name, `keep_within` in seconds; None when there is none.
    pub fn numbers(&self) -> Option<BTreeMap<String, u64>> {
        let rules = [
            ("keep_last", self.keep_last),
            ("keep_hourly", self.keep_hourly),
            ("keep_daily", self.keep_daily),
            ("keep_weekly", self.keep_weekly),
            ("keep_monthly", self.keep_monthly),
            ("keep_yearly", self.keep_yearly),
            ("keep_days", self.keep_days),
            ("min_keep", self.min_keep),
        ];
        let mut numbers: BTreeMap<String, u64> =
            rules.iter().filter_map(|(name, n)| Some(((*name).to_owned(), u64::from((*n)?)))).collect();
        numbers.extend(self.keep_within.map(|s| ("keep_within".to_owned(), s)));
        (!numbers.is_empty()).then_some(numbers)
    }
}

pub fn seconds(text: &str) -> Result<u64, String> {
    const WANTED: &str = "write a number and one of s, m, h, d, w, such as 36h or 30d";
    let unit = text.chars().last().ok_or(WANTED)?;
    let factor = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        'w' => 7 * 86_400,
        _ => return Err(WANTED.into()),
    };
    let number: u64 = text.trim_end_matches(unit).parse().map_err(|_| WANTED)?;
    number.checked_mul(factor).filter(|s| *s > 0).ok_or_else(|| "it must be longer than nothing and shorter than forever".into())
}

#[derive(Args, Clone)]
pub struct CoverageArguments {
    /// Look into caches and directories of the base system, too
    #[arg(long)]
    pub all: bool,
    /// What the last scan found, without another one
    #[arg(long, conflicts_with = "all")]
    pub no_scan: bool,
    /// Show acknowledged gaps, too
    #[arg(long)]
    pub acknowledged: bool,
    /// These gaps of the last scan are meant (all of them without a name; 'DIR/' for all below it)
    #[arg(long, value_name = "WHAT", num_args = 0.., conflicts_with_all = ["all", "no_scan", "acknowledged", "forget"])]
    pub acknowledge: Option<Vec<String>>,
    /// These acknowledged gaps are gaps again
    #[arg(long, value_name = "WHAT", num_args = 1.., conflicts_with_all = ["all", "no_scan", "acknowledged"])]
    pub forget: Vec<String>,
}

/// What is imported, where keepd did not make it.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// A tar that keepd did not make, compressed or not
    Tar,
    /// A directory
    Directory,
}

#[derive(Args, Clone)]
pub struct ImportArguments {
    /// An archive that 'keepctl export' made, or what --from says; '-' for standard input
    #[arg(required_unless_present_any = ["list", "status", "cancel"])]
    pub file: Option<PathBuf>,
    /// <source> or <source>/<path>, as the archive calls them: only these
    pub paths: Vec<OsString>,
    /// A key that it opens with, tried before those of the configured profiles; may be repeated
    #[arg(long, value_name = "FILE")]
    pub key: Vec<PathBuf>,
    /// Where it goes, if there are several destinations
    #[arg(long, value_name = "NAME")]
    pub destination: Option<String>,
    /// The job here whose backup it is to be
    #[arg(long, value_name = "JOB")]
    pub job: Option<String>,
    /// Only this source; may be repeated. With --from: the source that it is of
    #[arg(long, value_name = "SOURCE")]
    pub source: Vec<String>,
    /// A source's name in the archive, and the one that it gets; may be repeated
    #[arg(long, value_name = "OLD=NEW")]
    pub rename_source: Vec<String>,
    /// When the same backup is there already
    #[arg(long, value_name = "WHAT", value_parser = ["skip", "rename", "replace"])]
    pub on_conflict: Option<String>,
    /// Read and prove all of it, and store nothing
    #[arg(long)]
    pub validate_only: bool,
    /// Read at most so much each second, such as 20MiB/s
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub bandwidth: Option<u64>,
    /// How long it may take to be started, and a pipe to go on, such as 1h
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    pub timeout: Option<u64>,
    /// Refuse contents of more than so much, such as 100GiB
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_size: Option<u64>,
    /// It was not made by keepd
    #[arg(long, value_name = "WHAT", requires = "job")]
    pub from: Option<From>,
    /// Of what keepd did not make: when it was made (RFC 3339)
    #[arg(long, value_name = "TIME")]
    pub time: Option<String>,
    #[arg(long)]
    pub name: Option<String>,
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
    /// A label to find it by; may be repeated
    #[arg(long, value_name = "K=V")]
    pub label: Vec<String>,
    /// Return at once (not with a directory)
    #[arg(long)]
    pub detach: bool,
    /// Imports that are under way, and those that ended within a day
    #[arg(long, conflicts_with = "file")]
    pub list: bool,
    /// How an import is doing
    #[arg(long, value_name = "IMPORT", conflicts_with_all = ["file", "list"])]
    pub status: Option<String>,
    /// End an import that is under way
    #[arg(long, value_name = "IMPORT", conflicts_with_all = ["file", "list"])]
    pub cancel: Option<String>,
}

/// `20MiB`, `512k`, `1G`: bytes, with units of 1024.
fn size(text: &str) -> Result<u64, String> {
    const WANTED: &str = "write a number of bytes, or one with KiB, MiB, GiB or TiB, such as 100GiB";
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(WANTED.into()),
    };
    let number: u64 = number.parse().map_err(|_| WANTED)?;
    number.checked_mul(1 << shift).filter(|n| *n > 0).ok_or_else(|| WANTED.into())
}

fn rate(text: &str) -> Result<u64, String> {
    size(text.strip_suffix("/s").unwrap_or(text))
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
        /// What it is for, in your words
        #[arg(long, value_name = "TEXT")]
        description: Option<String>,
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
        #[arg(long = "type", value_name = "TYPE", value_parser = ["manual", "scheduled", "pre-update", "pre-restore", "imported"])]
        r#type: Option<String>,
        #[arg(long)]
        name: Option<String>,
        /// Of the application's version
        #[arg(long = "app-version", value_name = "VERSION")]
        app_version: Option<String>,
        /// With this label; may be repeated
        #[arg(long, value_name = "K=V")]
        label: Vec<String>,
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
        #[command(flatten)]
        keys: KeyArguments,
    },
    /// What differs between two backups
    Diff {
        a: String,
        b: String,
        #[arg(long)]
        job: Option<String>,
    },
    /// Write a backup, or parts of it, to a directory, or to where it came from
    Restore {
        #[command(flatten)]
        of: BackupArgument,
        #[command(flatten)]
        target: RestoreTarget,
        /// <source> or <source>/<path>; none means all
        paths: Vec<OsString>,
        /// Replace files that exist
        #[arg(long, requires = "to")]
        overwrite: bool,
        /// Owners by number, not by name
        #[arg(long, requires = "to")]
        numeric_owner: bool,
        /// Only this source; may be repeated with --in-place
        #[arg(long, value_name = "SOURCE", conflicts_with = "to")]
        source: Vec<String>,
        /// Of a source's databases, which one
        #[arg(long, value_name = "NAME", conflicts_with = "to")]
        database: Option<String>,
        /// Only this table; may be repeated (in place: of a SQLite database, where everything else stays as it is)
        #[arg(long, value_name = "TABLE", conflicts_with = "to")]
        table: Vec<String>,
        /// A database of that name may be there: it is kept under another name
        #[arg(long, requires = "to_database", conflicts_with_all = ["to", "in_place"])]
        replace: bool,
        /// Objects belong to the role that loads them
        #[arg(long, conflicts_with = "to")]
        no_owner: bool,
        /// Only show what would be changed
        #[arg(long, requires = "in_place", conflicts_with_all = ["to", "to_database"])]
        dry_run: bool,
        /// Do not back up what is there first
        #[arg(long, requires = "in_place", conflicts_with_all = ["to", "to_database"])]
        no_safety_backup: bool,
        /// Do not ask
        #[arg(long, conflicts_with = "to")]
        yes: bool,
        /// Return at once
        #[arg(long, conflicts_with = "to")]
        detach: bool,
        #[command(flatten)]
        keys: KeyArguments,
    },
    /// Bring back what a restore in place replaced
    Undo {
        /// The run of the restore, as 'keepctl run list' shows it
        run: String,
        /// Only show what would be changed
        #[arg(long)]
        dry_run: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// Return at once
        #[arg(long)]
        detach: bool,
        #[command(flatten)]
        keys: KeyArguments,
    },
    /// Write a backup as one file to take along: a tar that says what is in it
    Export(ExportArguments),
    /// Bring a backup to another destination
    Copy {
        #[command(flatten)]
        of: BackupArgument,
        #[arg(long, value_name = "DESTINATION")]
        to: String,
        #[command(flatten)]
        keys: KeyArguments,
    },
    /// Prove that a destination's backups are whole
    Check {
        destination: String,
        /// Read the packs too, all or so many percent of them
        #[arg(long, value_name = "PERCENT", num_args = 0..=1, require_equals = true, default_missing_value = "100", value_parser = clap::value_parser!(u32).range(0..=100))]
        read_data: Option<u32>,
        /// What no other destination has whole: read its sources again, and check once more
        #[arg(long)]
        repair: bool,
        #[command(flatten)]
        keys: KeyArguments,
    },
    /// Remove what no backup needs
    Prune {
        destination: String,
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        keys: KeyArguments,
    },
    /// Make a suspect backup a good one: what was told of it is all right
    Accept(BackupArgument),
    /// Keep a backup whatever retention says
    Pin(BackupArgument),
    /// Take the pin away
    Unpin(BackupArgument),
    /// What a job's retention keeps, why, and when it falls
    ///
    /// Rules given here are only tried: nothing is changed by them.
    Retention {
        job: String,
        /// Only there
        #[arg(long, value_name = "NAME")]
        destination: Option<String>,
        #[command(flatten)]
        rules: Rules,
        /// Confirm the configured rules and remove what they remove
        #[arg(long, conflicts_with = "Rules")]
        apply: bool,
        /// Do not ask
        #[arg(long, requires = "apply")]
        yes: bool,
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
    /// Destinations: shown, tried, made and changed
    #[command(subcommand)]
    Destination(DestinationCommand),
    /// Jobs: shown, made, changed, held and planned
    #[command(subcommand)]
    Job(JobCommand),
    /// Runs: history, progress, cancel
    #[command(subcommand)]
    Run(RunCommand),
    /// Events as they happen
    Watch,
    /// Have the daemon read its configuration again
    Reload,
    /// What differs now between a backup and what is live: by path, table and size; changes nothing
    Compare {
        #[command(flatten)]
        of: BackupArgument,
        /// <source> or <source>/<path>; none means all
        paths: Vec<OsString>,
        /// The contents of SQLite's tables, too: how many rows came, went and changed
        #[arg(long)]
        deep: bool,
        #[command(flatten)]
        keys: KeyArguments,
    },
    /// Make a backup of an archive: of 'keepctl export', a tar, a directory
    Import(ImportArguments),
    /// What on this machine is in no job: databases, directories of services, mounts
    ///
    /// Exit: 0 when there is no gap but acknowledged ones, 3 when there are.
    Coverage(CoverageArguments),
    /// Prove a backup: restore it into a scratch place and check it there
    Drill {
        /// An id, a unique start of one, or 'latest'; without one the newest good of the job
        backup: Option<String>,
        /// The job whose newest good backup is meant, if there are several jobs
        #[arg(long, value_name = "JOB")]
        job: Option<String>,
        /// Return at once
        #[arg(long)]
        detach: bool,
        #[command(flatten)]
        keys: KeyArguments,
    },
    /// What opens destinations: keys, their slots, recovery kits
    #[command(subcommand)]
    Key(KeyCommand),
    /// The configuration itself: checked, shown, taken along and brought back
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Who may do what
    #[command(subcommand)]
    Access(AccessCommand),
    /// Who did what
    #[command(subcommand)]
    Audit(AuditCommand),
    /// The manual page, for make install
    #[command(hide = true)]
    Manual,
    /// What --host starts on the other machine: the daemon's socket over standard input and output
    #[command(hide = true)]
    Bridge,
    /// A completion script for a shell
    Completion { shell: clap_complete::Shell },
}

#[derive(Subcommand)]
pub enum KeyCommand {
    /// Encryption profiles and the key slots of destinations, and which of them open
    List {
        /// All without a name
        #[arg(value_name = "DESTINATION")]
        destinations: Vec<String>,
    },
    /// Have another key open a destination, too
    #[command(group = clap::ArgGroup::new("which").required(true))]
    Add {
        destination: String,
        /// The key of this encryption profile
        #[arg(long, value_name = "NAME", group = "which")]
        profile: Option<String>,
        /// The key in this key file
        #[arg(long, value_name = "FILE", group = "which")]
        key: Option<PathBuf>,
    },
    /// Remove a key slot, when another one opens with the configured key
    Remove {
        destination: String,
        /// Its id as 'keepctl key list' shows it, or a unique start of it
        slot: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Exchange the key of an encryption profile: at its destinations and in the configuration
    ///
    /// Interrupted, both keys open the destinations, and the same command once more goes on.
    Rotate {
        profile: String,
        /// The new key, made by 'keepd key generate FILE' where keepd can read it
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
        /// The old key goes on opening what it opens now
        #[arg(long)]
        keep_old: bool,
    },
    /// Write the recovery kit of an encryption profile: its key, where the backups are, and a program that reads them
    Kit {
        profile: String,
        /// A new file, or '-' for standard output
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// The private key that contents are written for goes into it, too
        #[arg(long, value_name = "FILE")]
        private_key: Option<PathBuf>,
        /// So do the passwords and access keys of the destinations
        #[arg(long)]
        include_secrets: bool,
        /// Also where the backups are
        #[arg(long)]
        yes: bool,
    },
    /// Give a destination a new master key and seal everything there anew: the old key opens nothing of it then
    ReEncrypt {
        destination: String,
        /// Also when key slots that no configured profile opens (of a recovery kit, of somebody else) open it no more
        #[arg(long)]
        drop_slots: bool,
        #[arg(long)]
        yes: bool,
        /// Return at once; the run goes on
        #[arg(long)]
        detach: bool,
        #[command(flatten)]
        keys: KeyArguments,
    },
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
