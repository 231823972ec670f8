//! The checked configuration.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Everything keepd was told. All names that one table uses of another exist.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The files it was read from, in order.
    pub files: Vec<PathBuf>,
    pub daemon: Daemon,
    pub encryption: BTreeMap<String, Encryption>,
    pub destinations: BTreeMap<String, Destination>,
    pub jobs: BTreeMap<String, Job>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Daemon {
    pub state_dir: PathBuf,
    pub socket: PathBuf,
    pub max_parallel_runs: usize,
    /// Cap in bytes for the buffers of all runs together.
    pub memory: u64,
}

/// An encryption profile.
#[derive(Debug, Clone, PartialEq)]
pub struct Encryption {
    pub name: String,
    pub key: KeySource,
}

#[derive(Debug, Clone, PartialEq)]
pub enum KeySource {
    /// A file made by `keepd key generate`, readable by its owner only.
    File(PathBuf),
}

/// A place that holds one repository.
#[derive(Debug, Clone, PartialEq)]
pub struct Destination {
    pub name: String,
    /// OpenDAL's name of the service.
    pub service: String,
    /// OpenDAL's options of the service.
    pub options: BTreeMap<String, String>,
    /// The encryption profile; None where the configuration says `"none"`.
    pub encryption: Option<String>,
    pub compression: Compression,
    /// Overrides the job's.
    pub retention: Option<Retention>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    Zstd,
    Gzip,
    None,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub name: String,
    pub enabled: bool,
    /// None: by hand only.
    pub schedule: Option<Schedule>,
    /// IANA name; None is the system's zone.
    pub timezone: Option<String>,
    /// A scheduled run starts up to this much later, a fixed amount for each job and machine.
    pub jitter: Duration,
    pub max_age: Option<Duration>,
    /// At least one, in order.
    pub destinations: Vec<String>,
    pub retention: Retention,
    pub retry: Retry,
    /// At least one, names unique.
    pub sources: Vec<Source>,
}

/// When a job is due.
#[derive(Debug, Clone, PartialEq)]
pub enum Schedule {
    /// A five-field expression or an @-word, checked to have an occurrence.
    Cron(String),
    /// At least one second.
    Every(Duration),
    /// A civil time in the job's zone, once.
    At(jiff::civil::DateTime),
}

/// Which backups to keep; a backup that any rule keeps stays. All None keeps everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Retention {
    pub keep_last: Option<u32>,
    pub keep_days: Option<u32>,
    pub keep_daily: Option<u32>,
    pub keep_weekly: Option<u32>,
    pub keep_monthly: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retry {
    /// Runs in all, at least 1.
    pub attempts: u32,
    /// Wait before the second attempt; doubled for each further one.
    pub backoff: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    /// Unique in the job; no slash, not `.` or `..`.
    pub name: String,
    pub kind: SourceKind,
}

#[derive(Debug, Clone, PartialEq)]
pub enum SourceKind {
    Sqlite(SqliteSource),
    Files(FilesSource),
}

#[derive(Debug, Clone, PartialEq)]
pub struct SqliteSource {
    /// Absolute.
    pub path: PathBuf,
    pub verify: Verify,
}

/// How a database is checked before it is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    /// `PRAGMA quick_check`
    Quick,
    /// `PRAGMA integrity_check`
    Full,
    Off,
}

#[derive(Debug, Clone, PartialEq)]
pub struct FilesSource {
    /// Absolute.
    pub path: PathBuf,
    /// gitignore patterns, relative to `path`.
    pub exclude: Vec<String>,
    pub one_file_system: bool,
    /// Leave out what is in a directory with a CACHEDIR.TAG (default true).
    pub exclude_caches: bool,
}

impl SourceKind {
    /// `sqlite`, `files`: the word of the configuration and of manifests.
    pub fn word(&self) -> &'static str {
        match self {
            SourceKind::Sqlite(_) => "sqlite",
            SourceKind::Files(_) => "files",
        }
    }

    pub fn path(&self) -> &std::path::Path {
        match self {
            SourceKind::Sqlite(s) => &s.path,
            SourceKind::Files(f) => &f.path,
        }
    }
}
