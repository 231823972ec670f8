//! The checked configuration.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::value;
use crate::access::Right;

/// Everything keepd was told. All names that one table uses of another exist.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The files it was read from, in order.
    pub files: Vec<PathBuf>,
    pub daemon: Daemon,
    pub encryption: BTreeMap<String, Encryption>,
    pub destinations: BTreeMap<String, Destination>,
    pub jobs: BTreeMap<String, Job>,
    pub coverage: Coverage,
    /// None: the configuration is stored nowhere by itself.
    pub config_backup: Option<ConfigBackup>,
    pub access: Access,
    pub audit: Audit,
}

/// Who may do what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    pub admin: Vec<Member>,
    pub operator: Vec<Member>,
    pub viewer: Vec<Member>,
    /// By name.
    pub roles: Vec<AccessRole>,
    pub limits: AccessLimits,
}

/// Somebody who has a role.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Member {
    User(String),
    Group(String),
    Uid(u32),
    Gid(u32),
}

impl std::fmt::Display for Member {
    /// As it is written in the configuration.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Member::User(name) => f.write_str(name),
            Member::Group(name) => write!(f, "@{name}"),
            Member::Uid(id) => write!(f, "{id}"),
            Member::Gid(id) => write!(f, "@{id}"),
        }
    }
}

/// A role beside those that keepd has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessRole {
    pub name: String,
    pub members: Vec<Member>,
    /// In order, each once, at least one.
    pub rights: Vec<Right>,
    /// None: all jobs, and what belongs to no job.
    pub jobs: Option<Vec<String>>,
}

/// What one user may take of keepd at once; root may take all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessLimits {
    pub connections: usize,
    /// Queued or running.
    pub runs: usize,
    /// Twice as many may come at once.
    pub calls_per_second: u32,
}

impl Default for AccessLimits {
    fn default() -> Self {
        Self { connections: 32, runs: 16, calls_per_second: 50 }
    }
}

/// How long is kept who did what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Audit {
    pub keep: Duration,
}

impl Default for Audit {
    fn default() -> Self {
        Self { keep: Duration::from_secs(400 * 86_400) }
    }
}

/// How the configuration itself is kept at a destination.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfigBackup {
    /// Cron or every; None: by hand, and after a change where that is wanted.
    pub schedule: Option<Schedule>,
    /// IANA name; None is the system's zone.
    pub timezone: Option<String>,
    pub destination: String,
    /// The profile that it is sealed for, the destination's where none is said; None: it is not sealed.
    pub encryption: Option<String>,
    /// Never without a profile.
    pub include_secrets: bool,
    pub retention: Retention,
    /// After each change of the configuration, too.
    pub on_change: bool,
}

impl ConfigBackup {
    /// The zone its times are meant in, the system's where none is given.
    pub fn zone(&self) -> TimeZone {
        zone(self.timezone.as_deref())
    }
}

/// Where is looked for what is in no job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coverage {
    /// Absolute, at least one.
    pub roots: Vec<PathBuf>,
    /// gitignore patterns, relative to `/`.
    pub exclude: Vec<String>,
}

impl Default for Coverage {
    fn default() -> Self {
        Self { roots: vec![PathBuf::from("/")], exclude: Vec::new() }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Daemon {
    pub state_dir: PathBuf,
    pub socket: PathBuf,
    pub max_parallel_runs: usize,
    /// Cap in bytes for the buffers of all runs together.
    pub memory: u64,
}

impl Config {
    /// The names of all destinations.
    pub fn places(&self) -> Vec<&str> {
        self.destinations.keys().map(String::as_str).collect()
    }

    /// Whether all of these destinations that are configured are written to for a private key, which alone opens what is there.
    pub fn are_write_only<'n>(&self, destinations: impl Iterator<Item = &'n str>) -> bool {
        let profile = |name| self.destinations.get(name).and_then(|d| self.encryption.get(d.encryption.as_ref()?));
        let mut destinations = destinations.filter(|name| self.destinations.contains_key(*name)).peekable();
        destinations.peek().is_some() && destinations.all(|name| profile(name).is_some_and(|p| p.public_key.is_some()))
    }
}

/// An encryption profile.
#[derive(Debug, Clone, PartialEq)]
pub struct Encryption {
    pub name: String,
    pub key: KeySource,
    /// Key files of before, tried when the key opens nothing.
    pub retired: Vec<PathBuf>,
    /// The public key file that contents are written for: this machine cannot read them back.
    pub public_key: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum KeySource {
    /// A file made by `keepd key generate`, readable by its owner only.
    File(PathBuf),
    /// Such a file, handed over by the service manager under this name.
    Credential(String),
    Passphrase(SecretSource),
    Token(TokenSource),
}

/// An AES-256 key in a PKCS#11 token.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenSource {
    /// The library of the token's maker.
    pub module: PathBuf,
    /// Its label or serial number.
    pub token: String,
    /// The key's label.
    pub key: String,
    /// None: it needs none, or asks for it on a keypad of its own.
    pub pin: Option<SecretSource>,
}

/// What a destination's backups are kept as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Layout {
    /// Chunks and packs, shared by all backups.
    #[default]
    Repository,
    /// Each backup one file for itself (`docs/archive-layout.md`).
    Archive,
}

/// A place that holds one repository, or archives.
#[derive(Debug, Clone, PartialEq)]
pub struct Destination {
    pub name: String,
    /// OpenDAL's name of the service.
    pub service: String,
    /// OpenDAL's options of the service; those of a plugin for `exec`.
    pub options: BTreeMap<String, OptionValue>,
    /// The plugin's program and its arguments; empty unless the service is `exec`.
    pub command: Vec<String>,
    pub transfer: Transfer,
    pub layout: Layout,
    /// The encryption profile; None where the configuration says `"none"`.
    pub encryption: Option<String>,
    pub compression: Compression,
    /// Overrides the job's.
    pub retention: Option<Retention>,
    /// Between finding that nothing needs a pack and deleting it.
    pub prune_grace: Duration,
    /// Each pack is read once in this time; None: only when somebody asks.
    pub check_every: Option<Duration>,
    /// A good backup older than this makes a job overdue here.
    pub max_age: Option<Duration>,
    /// keepd never deletes here.
    pub append_only: bool,
    /// Objects cannot be deleted for so long, and the lock is renewed while something needs them (S3 object lock).
    pub object_lock: Option<Duration>,
    /// Nobody at all can take such a lock away; else who has the right to can.
    pub compliance_lock: bool,
}

impl Destination {
    /// A destination as it is where the configuration says nothing more than its service and its options.
    pub fn plain(name: &str, service: &str, options: BTreeMap<String, OptionValue>) -> Self {
        Self {
            name: name.to_owned(),
            service: service.to_owned(),
            options,
            command: Vec::new(),
            transfer: Transfer::default(),
            layout: Layout::Repository,
            encryption: None,
            compression: Compression::Zstd,
            retention: None,
            prune_grace: Duration::from_secs(86_400),
            check_every: None,
            max_age: None,
            append_only: false,
            object_lock: None,
            compliance_lock: false,
        }
    }

    /// The directory of an `fs` destination.
    pub fn directory(&self) -> Option<&str> {
        if self.service == "fs" { self.options.get("root").and_then(OptionValue::plain) } else { None }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionValue {
    Plain(String),
    Secret(SecretSource),
}

impl OptionValue {
    /// The value, unless it is a secret.
    pub fn plain(&self) -> Option<&str> {
        if let OptionValue::Plain(text) = self { Some(text) } else { None }
    }
}

impl From<&str> for OptionValue {
    fn from(text: &str) -> Self {
        OptionValue::Plain(text.to_owned())
    }
}

/// Where a secret is, which is read when it is needed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum SecretSource {
    /// The first line of a file.
    File(PathBuf),
    /// Of the service manager: a file in `$CREDENTIALS_DIRECTORY`.
    Credential(String),
    /// A variable of the daemon's environment.
    Environment(String),
}

/// How bytes travel to and from a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    pub bandwidth: Bandwidth,
    /// A transfer that does not go on for so long has failed.
    pub timeout: Duration,
    /// Of each operation.
    pub retry: Retry,
    /// Operations at once.
    pub concurrency: usize,
    /// Certificates to trust beside the system's, PEM.
    pub ca_file: Option<PathBuf>,
}

impl Default for Transfer {
    fn default() -> Self {
        Self {
            bandwidth: Bandwidth::default(),
            timeout: Duration::from_secs(60),
            retry: Retry { attempts: 6, backoff: Duration::from_millis(500) },
            concurrency: 8,
            ca_file: None,
        }
    }
}

/// Bytes a second, None without a limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    pub up: Option<u64>,
    pub down: Option<u64>,
}

/// Limits, and others in some hours of the day.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bandwidth {
    pub rates: Rates,
    /// The first that holds the time counts.
    pub hours: Vec<Hours>,
}

/// From one time of the day (in the system's zone) to another, beyond midnight when that is the earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hours {
    pub from: jiff::civil::Time,
    pub to: jiff::civil::Time,
    pub rates: Rates,
}

impl Bandwidth {
    /// What holds at a time of the day.
    pub fn at(&self, time: jiff::civil::Time) -> Rates {
        let within = |h: &&Hours| match h.from <= h.to {
            true => h.from <= time && time < h.to,
            false => h.from <= time || time < h.to,
        };
        self.hours.iter().find(within).map_or(self.rates, |h| h.rates)
    }
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
    /// The schedule does not start it before; a whole second.
    pub paused_until: Option<Timestamp>,
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
    pub suspect: Suspect,
    pub retry: Retry,
    /// At least one, names unique.
    pub sources: Vec<Source>,
    /// Units of systemd that belong to the application.
    pub services: Vec<String>,
    /// What holds the application still while it is captured.
    pub quiesce: Quiesce,
    pub hooks: Hooks,
    /// What tells whether the application works after a restore in place.
    pub health: Option<Health>,
    /// How the application's version is found out, and that of its data.
    pub version: Option<VersionFrom>,
    pub schema_version: Option<VersionFrom>,
    pub drill: Drill,
}

/// How a job's backups are proven: restored into a scratch place, and checked there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drill {
    /// None: by hand only.
    pub every: Option<Duration>,
    /// Bytes that the scratch place may take; None: as many as its file system has.
    pub space: Option<u64>,
    /// Bytes of memory for each program that it starts.
    pub memory: u64,
    /// Where the scratch place is made; None: in the state directory.
    pub dir: Option<PathBuf>,
    /// Given up after so long.
    pub timeout: Duration,
    /// What must hold of what was restored, in order.
    pub assertions: Vec<Assertion>,
}

impl Default for Drill {
    fn default() -> Self {
        let timeout = Duration::from_secs(6 * 3600);
        Self { every: None, space: None, memory: 512 << 20, dir: None, timeout, assertions: Vec::new() }
    }
}

/// What must hold of a restored backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Assertion {
    /// The first value of a question to a database source is true; `database` where the source is a server.
    Sql { sql: String, source: String, database: Option<String> },
    /// A file is there, with so many bytes at least.
    File { source: String, path: String, min_size: u64 },
    /// A program ends with exit status 0.
    Command(Program),
}

/// What holds an application still while its sources are captured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Quiesce {
    /// It goes on working.
    #[default]
    No,
    /// The job's services are stopped, those that ran are started again.
    Services,
    /// A maintenance mode of its own.
    Maintenance { begin: Program, end: Program },
}

/// Somebody else's program: what is started, as whom, and for how long at the most.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Program {
    /// The program and its arguments; at least one.
    pub command: Vec<String>,
    /// Killed after so long.
    pub timeout: Duration,
    /// The user it runs as; None: the daemon's own.
    pub run_as: Option<String>,
}

/// Programs around a run, each kind in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hooks {
    pub before: Vec<Program>,
    pub after: Vec<Program>,
    pub on_failure: Vec<Program>,
    pub before_restore: Vec<Program>,
    pub after_restore: Vec<Program>,
}

/// What tells that an application works: asked again and again until it does, or patience is over.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Health {
    pub check: HealthCheck,
    pub patience: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum HealthCheck {
    /// Exit status 0.
    Command(Program),
    /// A status from 200 to 399.
    Url(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VersionFrom {
    /// The first line it prints.
    Command(Program),
    /// The first value of a question to a database source of the job.
    Sql { sql: String, source: String },
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
    pub keep_hourly: Option<u32>,
    pub keep_daily: Option<u32>,
    pub keep_weekly: Option<u32>,
    pub keep_monthly: Option<u32>,
    pub keep_yearly: Option<u32>,
    /// Days.
    pub keep_days: Option<u32>,
    pub keep_within: Option<Duration>,
    /// Not a rule of its own: however the others decide, so many good ones stay.
    pub min_keep: Option<u32>,
}

/// From when on a backup is suspect that was made without an error. 0 turns a rule off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suspect {
    /// Percent less than in the last good backup.
    pub fewer_rows: u32,
    /// Percent less than usual.
    pub fewer_files: u32,
    pub smaller: u32,
    /// Times as large as usual.
    pub larger: u32,
    /// Percent of all contents that are new.
    pub changed: u32,
    /// Percent that are left of what is new when it is compressed.
    pub incompressible: u32,
}

impl Default for Suspect {
    fn default() -> Self {
        Self { fewer_rows: 50, fewer_files: 50, smaller: 50, larger: 10, changed: 80, incompressible: 95 }
    }
}

impl Job {
    /// What no two runs may work on at once: the job itself, its databases, and its services where they are stopped.
    pub fn alone(&self) -> Vec<String> {
        let services = if self.quiesce == Quiesce::Services { self.services.as_slice() } else { &[] };
        let sources = self.sources.iter().filter_map(|s| s.kind.lock());
        std::iter::once(self.lock()).chain(sources).chain(services.iter().map(|s| format!("service {s}"))).collect()
    }

    /// What a backup and a restore in place of the job must not work on at once.
    pub fn lock(&self) -> String {
        format!("job {}", self.name)
    }

    /// The zone its times are meant in, the system's where none is given.
    pub fn zone(&self) -> TimeZone {
        zone(self.timezone.as_deref())
    }
}

fn zone(name: Option<&str>) -> TimeZone {
    name.and_then(|z| TimeZone::get(z).ok()).unwrap_or_else(TimeZone::system)
}

impl Retention {
    /// The rules by their names in the configuration; `keep_within` in seconds.
    pub const RULES: [&str; 9] =
        ["keep_last", "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly", "keep_days", "keep_within", "min_keep"];

    /// The rules that are set, with their numbers; `keep_within` in seconds.
    pub fn numbers(&self) -> BTreeMap<String, u64> {
        let number = |name: &str| match name {
            "keep_last" => self.keep_last.map(u64::from),
            "keep_hourly" => self.keep_hourly.map(u64::from),
            "keep_daily" => self.keep_daily.map(u64::from),
            "keep_weekly" => self.keep_weekly.map(u64::from),
            "keep_monthly" => self.keep_monthly.map(u64::from),
            "keep_yearly" => self.keep_yearly.map(u64::from),
            "keep_days" => self.keep_days.map(u64::from),
            "keep_within" => self.keep_within.map(|d| d.as_secs()),
            _ => self.min_keep.map(u64::from),
        };
        Self::RULES.into_iter().filter_map(|name| Some((name.to_owned(), number(name)?))).collect()
    }

    /// The other way round; the error names a rule that there is not, or whose number cannot be.
    pub fn from_numbers(numbers: &BTreeMap<String, u64>) -> Result<Self, String> {
        let mut policy = Self::default();
        for (name, number) in numbers {
            if name == "keep_within" {
                policy.keep_within = Some(Duration::from_secs((*number).min(value::LONGEST_SECONDS)));
                continue;
            }
            let rule = match name.as_str() {
                "keep_last" => &mut policy.keep_last,
                "keep_hourly" => &mut policy.keep_hourly,
                "keep_daily" => &mut policy.keep_daily,
                "keep_weekly" => &mut policy.keep_weekly,
                "keep_monthly" => &mut policy.keep_monthly,
                "keep_yearly" => &mut policy.keep_yearly,
                "keep_days" => &mut policy.keep_days,
                "min_keep" => &mut policy.min_keep,
                other => return Err(format!("there is no rule '{other}'; allowed are {}", Self::RULES.join(", "))),
            };
            let number = u32::try_from(*number).ok().filter(|n| *n > 0);
            *rule = Some(number.ok_or_else(|| format!("{name} must be a whole number from 1 to {}", u32::MAX))?);
        }
        if policy.min_keep.is_some() && numbers.len() == 1 {
            return Err("min_keep removes nothing by itself; give another rule with it".into());
        }
        Ok(policy)
    }

    /// No rule: everything stays.
    pub fn keeps_everything(&self) -> bool {
        *self == Self::default()
    }
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
    /// Only of databases.
    pub references: Option<References>,
}

/// Which files a database names: each must be in the backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct References {
    /// A question whose first column is a path.
    pub sql: String,
    /// The files source of the same job that has them.
    pub under: String,
}

#[derive(Debug, Clone, PartialEq)]
pub enum SourceKind {
    Sqlite(SqliteSource),
    Files(FilesSource),
    Postgres(ServerSource),
    Mysql(ServerSource),
    Command(CommandSource),
}

/// Databases of a server, reached with its own tools.
#[derive(Debug, Clone, PartialEq)]
pub struct ServerSource {
    pub databases: Databases,
    /// A name, an address, or (PostgreSQL) the directory of its socket.
    pub host: Option<String>,
    pub port: Option<u16>,
    /// MySQL's socket file.
    pub socket: Option<PathBuf>,
    pub user: Option<String>,
    pub password: Option<SecretSource>,
    /// Where the server's tools are; None: in `PATH`.
    pub bin_dir: Option<PathBuf>,
    pub run_as: Option<String>,
    /// A dump that gives nothing for so long has failed.
    pub timeout: Duration,
    /// PostgreSQL: roles and tablespaces too.
    pub globals: bool,
    /// Patterns of tables that are left out, in the words of the tool.
    pub exclude_tables: Vec<String>,
    /// How the connection is encrypted, in the words of the tool.
    pub sslmode: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Databases {
    /// All but templates and system schemas.
    All,
    /// At least one, each once.
    Named(Vec<String>),
}

/// What a program prints.
#[derive(Debug, Clone, PartialEq)]
pub struct CommandSource {
    /// `timeout`: without a byte of output.
    pub program: Program,
    /// Gets it back on its standard input.
    pub restore: Option<Program>,
    /// The name of the file that a restore to a directory makes of it.
    pub file: String,
    /// Bytes; less is a failure.
    pub min_size: u64,
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
    /// `sqlite`, `files` …: the word of the configuration and of manifests.
    pub fn word(&self) -> &'static str {
        match self {
            SourceKind::Sqlite(_) => "sqlite",
            SourceKind::Files(_) => "files",
            SourceKind::Postgres(_) => "postgres",
            SourceKind::Mysql(_) => "mysql",
            SourceKind::Command(_) => "command",
        }
    }

    /// The path it reads, if it reads one.
    pub fn path(&self) -> Option<&std::path::Path> {
        match self {
            SourceKind::Sqlite(s) => Some(&s.path),
            SourceKind::Files(f) => Some(&f.path),
            _ => None,
        }
    }

    /// Where it is captured from, for people: a path, a server with its databases, a program.
    pub fn place(&self) -> Vec<u8> {
        use std::os::unix::ffi::OsStrExt;
        match self {
            SourceKind::Postgres(server) | SourceKind::Mysql(server) => server.place().into_bytes(),
            SourceKind::Command(command) => command.program.command.first().cloned().unwrap_or_default().into_bytes(),
            other => other.path().map(|p| p.as_os_str().as_bytes().to_vec()).unwrap_or_default(),
        }
    }

    /// What no two runs may work on at once.
    pub fn lock(&self) -> Option<String> {
        match self {
            SourceKind::Sqlite(s) => Some(format!("sqlite {}", s.path.display())),
            SourceKind::Files(_) => None,
            // A restore makes and renames databases, and a job may have all of them: one at a time on a server.
            SourceKind::Postgres(server) | SourceKind::Mysql(server) => Some(format!("{} {}", self.word(), server.server())),
            SourceKind::Command(command) => Some(format!("command {}", command.program.command.join("\0"))),
        }
    }
}

impl ServerSource {
    /// A server as its tools reach it where nothing is said.
    pub fn plain(databases: Databases) -> Self {
        Self {
            databases,
            host: None,
            port: None,
            socket: None,
            user: None,
            password: None,
            bin_dir: None,
            run_as: None,
            timeout: Duration::from_secs(1800),
            globals: false,
            exclude_tables: Vec::new(),
            sslmode: None,
        }
    }

    /// The server, however it is reached on this machine.
    fn server(&self) -> String {
        let host = if self.is_local() { "local" } else { self.host.as_deref().unwrap_or_default() };
        format!("{host} {}", self.port.map(|p| p.to_string()).unwrap_or_default())
    }

    /// Whether it is on this machine, as far as the way to it tells.
    pub fn is_local(&self) -> bool {
        match (&self.socket, self.host.as_deref()) {
            (Some(_), _) | (None, None | Some("localhost" | "127.0.0.1" | "::1")) => true,
            (None, Some(host)) => host.starts_with('/'),
        }
    }

    fn place(&self) -> String {
        let host = match (&self.socket, &self.host) {
            (Some(socket), _) => socket.display().to_string(),
            (None, Some(host)) => host.clone(),
            (None, None) => "local".to_owned(),
        };
        let port = self.port.map(|p| format!(":{p}")).unwrap_or_default();
        let databases = match &self.databases {
            Databases::All => "*".to_owned(),
            Databases::Named(names) => names.join(","),
        };
        format!("{host}{port} {databases}")
    }
}
