//! What the interface talks about. Times are RFC 3339 in UTC, sizes are bytes, durations are seconds.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A path that need not be UTF-8. `path` is what people see (lossy when the bytes are not UTF-8); `bytes`, in base64, is
/// given exactly then and is what counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BytesPath {
    pub path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
}

macro_rules! word_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$va:meta])* $v:ident = $w:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        pub enum $name { $($(#[$va])* #[serde(rename = $w)] $v),* }
        impl $name {
            pub const ALL: &[$name] = &[$($name::$v),*];
            /// The word as it stands on the wire and in tables.
            pub fn as_str(self) -> &'static str { match self { $($name::$v => $w),* } }
        }
        impl std::fmt::Display for $name { fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.pad(self.as_str()) } }
        /// From a text alone: serde's own would also take `{"word": null}`.
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
        impl std::str::FromStr for $name {
            type Err = String;
            fn from_str(s: &str) -> Result<Self, String> {
                match s { $($w => Ok($name::$v),)* _ => Err(format!("'{s}' is none of {}", [$($w),*].join(", "))) }
            }
        }
    };
}
pub(crate) use word_enum;

word_enum!(/// Why a backup was made.
    BackupType { #[default] Manual = "manual", Scheduled = "scheduled", PreUpdate = "pre-update", PreRestore = "pre-restore", Imported = "imported" });
word_enum!(/// What a backup is worth.
    Outcome { #[default] Good = "good", Suspect = "suspect" });
word_enum!(/// What a run does.
    RunKind { #[default] Backup = "backup", Restore = "restore", Cat = "cat", Check = "check", Prune = "prune", Delete = "delete", Retention = "retention", Copy = "copy", Compare = "compare", Coverage = "coverage", Drill = "drill", Key = "key", ReEncrypt = "re-encrypt", Export = "export", Import = "import", ConfigBackup = "config-backup" });
word_enum!(/// Where an import is. `timeout`: it was not started by its deadline.
    ImportState { #[default] Pending = "pending", Uploading = "uploading", Processing = "processing", Completed = "completed", Failed = "failed", Timeout = "timeout" });
word_enum!(/// What is done when a backup of the same id is at the destination already.
    OnConflict { #[default] Skip = "skip", Rename = "rename", Replace = "replace" });
word_enum!(/// What is uploaded of an import: the archive, or a key that it opens with.
    ImportPart { #[default] Archive = "archive", Key = "key" });
word_enum!(/// How a portable archive is compressed.
    ArchiveCompression { #[default] None = "none", Gzip = "gzip", Zstd = "zstd" });
word_enum!(/// Whether a profile's keys open a slot: the one that is configured, or one of before.
    KeyOpens { #[default] No = "no", Current = "current", Retired = "retired" });
word_enum!(/// Of a rotation: the new key's slots are added, or the old one's removed.
    KeyStep { #[default] Add = "add", Remove = "remove" });
word_enum!(/// What is said of a backup.
    Mark { #[default] Pin = "pin", Unpin = "unpin", Accept = "accept" });
word_enum!(/// Where a run is. `partial`: done, but something was left out and is listed in the messages.
    RunState { #[default] Queued = "queued", Running = "running", Good = "good", Partial = "partial", Suspect = "suspect", Failed = "failed", Cancelled = "cancelled" });
word_enum!(Level { #[default] Info = "info", Warning = "warning", Error = "error" });
word_enum!(EntryKind { #[default] File = "file", Directory = "directory", Symlink = "symlink", Hardlink = "hardlink" });
word_enum!(ChangeKind { #[default] Added = "added", Removed = "removed", Modified = "modified", Metadata = "metadata" });
word_enum!(EventKind { #[default] RunQueued = "run-queued", RunStarted = "run-started", RunStep = "run-step", RunMessage = "run-message", RunFinished = "run-finished", ConfigReloaded = "config-reloaded", ReloadFailed = "reload-failed", ScheduleChanged = "schedule-changed", ImportCompleted = "import_completed" });

word_enum!(/// What a scan of the machine finds.
    CoverageKind { #[default] Sqlite = "sqlite", Database = "database", DataDirectory = "data-directory", Mount = "mount" });
word_enum!(/// What became of an item since gaps were last acknowledged: a gap that was not there, or one that was covered.
    Drift { #[default] New = "new", Uncovered = "uncovered" });

impl ImportState {
    pub fn is_finished(self) -> bool {
        matches!(self, ImportState::Completed | ImportState::Failed | ImportState::Timeout)
    }
}

impl RunState {
    pub fn is_finished(self) -> bool {
        !matches!(self, RunState::Queued | RunState::Running)
    }
}

/// The daemon at a glance.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub started: String,
    pub state_dir: String,
    pub config: String,
    pub jobs: Vec<JobStatus>,
    pub running: Vec<Run>,
    pub destinations: Vec<DestinationStatus>,
    /// Of the last scan for what is in no job; None before the first one.
    #[serde(default)]
    pub coverage: Option<CoverageCounts>,
    /// Of the configuration itself; None where `[config_backup]` is not configured.
    #[serde(default)]
    pub config_backup: Option<ConfigBackupStatus>,
}

/// How the configuration itself is kept.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ConfigBackupStatus {
    pub destination: String,
    /// In words of the configuration: `30 2 * * *`, `every 6h`, or empty for by hand (or after changes alone).
    pub schedule: String,
    pub next: Option<String>,
    pub last_run: Option<String>,
    pub last_outcome: Option<RunState>,
    /// End of the newest run that stored it.
    pub last_good: Option<String>,
}

/// A job's schedule state.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct JobStatus {
    pub name: String,
    pub enabled: bool,
    /// The schedule in words of the configuration: `30 2 * * *`, `every 6h`, `at 2026-12-24T18:00`, or empty for by hand.
    pub schedule: String,
    pub next: Option<String>,
    pub last_start: Option<String>,
    pub last_outcome: Option<RunState>,
    pub last_run: Option<String>,
    /// End of the newest good backup.
    pub last_good: Option<String>,
    pub last_proven: Option<String>,
    pub overdue: bool,
    pub max_age_seconds: Option<u64>,
    pub running: Option<String>,
    pub runs_good: u64,
    pub runs_failed: u64,
    /// How long restoring and checking took with the newest proven backup.
    #[serde(default)]
    pub recovery_seconds: Option<u64>,
    /// The schedule does not start it before; None when it is not paused, or no longer.
    #[serde(default)]
    pub paused_until: Option<String>,
    /// When it runs beside its schedule, once each.
    #[serde(default)]
    pub once: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DestinationStatus {
    pub name: String,
    pub service: String,
    /// Where it is, without any secret.
    pub location: String,
    pub encryption: String,
    /// Of the profile's key: two keys may have one name. None where there is none, or it is not known without asking a token.
    #[serde(default)]
    pub fingerprint: Option<String>,
    pub compression: String,
    pub backups: u64,
    pub last_good: Option<String>,
    /// Empty when the last contact went well.
    pub error: Option<String>,
    /// Backups that should be here and are not yet, by job.
    #[serde(default)]
    pub missing: BTreeMap<String, u64>,
    /// Jobs whose newest good backup here is older than the destination's `max_age`.
    #[serde(default)]
    pub overdue: Vec<String>,
    #[serde(default)]
    pub traffic: Traffic,
}

/// An encryption profile as configured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct KeyProfile {
    pub name: String,
    /// `key_file`, `credential`, `passphrase`, `pkcs11`.
    pub kind: String,
    /// The file's path, or the name of the credential, the variable or the token.
    pub place: String,
    /// None for a passphrase, and when the key cannot be had.
    pub fingerprint: Option<String>,
    /// The fingerprint of the public key that contents are written for.
    pub public_key: Option<String>,
    pub retired: Vec<RetiredKey>,
    /// The destinations that name it.
    pub destinations: Vec<String>,
    /// Why the keys cannot be had.
    pub error: Option<String>,
}

/// A key file of before.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RetiredKey {
    pub file: String,
    pub fingerprint: Option<String>,
}

/// The key slots of a destination.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DestinationKeys {
    pub destination: String,
    /// The configured profile; None when nothing is encrypted.
    pub profile: Option<String>,
    /// The repository's id; None where nothing was backed up to yet.
    pub repository: Option<String>,
    pub slots: Vec<KeySlot>,
    /// Why they cannot be listed.
    pub error: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct KeySlot {
    pub id: String,
    /// What it was called when it was made: a profile's name, or where the key came from.
    pub profile: String,
    /// `key-file`, `passphrase`, `pkcs11`, `none`.
    pub method: String,
    pub fingerprint: String,
    /// With the keys of the configured profile.
    pub opens: KeyOpens,
    /// What is wrong with it.
    pub problem: Option<String>,
}

/// What a destination was used for since the daemon started. Bytes, and operations.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    pub sent: u64,
    pub received: u64,
    pub operations: u64,
    pub retries: u64,
    /// Operations that failed for good.
    pub errors: u64,
}

/// What a test of a destination found out, step by step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// reach, rights, write …
    pub step: String,
    /// `ok`, `warning`, `failed`, `skipped`.
    pub verdict: String,
    /// In words and numbers.
    pub text: String,
}

/// A job as configured, with its state.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct JobDetail {
    pub status: JobStatus,
    pub timezone: Option<String>,
    pub destinations: Vec<String>,
    pub sources: Vec<SourceInfo>,
    /// Retention rules by name, e.g. `keep_last` → 3.
    pub retention: BTreeMap<String, u64>,
    pub retry_attempts: u32,
    pub retry_backoff_seconds: u64,
}

/// A source as configured or as captured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceInfo {
    pub name: String,
    /// `sqlite`, `files`, `postgres`, `mysql`, `command`.
    pub kind: String,
    pub path: String,
    /// Entries captured, with their bytes; 0 for a source only configured.
    #[serde(default)]
    pub entries: u64,
    #[serde(default)]
    pub bytes: u64,
    /// Facts found while capturing: page size, tables and rows of a database and the like.
    #[serde(default)]
    pub facts: BTreeMap<String, serde_json::Value>,
}

/// A backup as `list` shows it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Backup {
    pub id: String,
    pub job: String,
    pub time: String,
    pub r#type: BackupType,
    pub outcome: Outcome,
    pub proven: Option<String>,
    pub pinned: bool,
    pub destinations: Vec<BackupPlace>,
    pub sources: Vec<String>,
    /// Bytes of the contents as captured.
    pub bytes: u64,
    /// Bytes this backup added to the repository, compressed and sealed.
    pub added_bytes: u64,
    pub labels: BTreeMap<String, String>,
    pub name: Option<String>,
    #[serde(default)]
    pub description: Option<String>,
    /// Of the application when it was captured, and of its data.
    #[serde(default)]
    pub version: Option<String>,
    #[serde(default)]
    pub schema_version: Option<String>,
    /// True when something was left out (unreadable files); the run and `show` list it.
    pub partial: bool,
}

impl Backup {
    /// Whether it lies at a destination that is configured.
    pub fn is_at_hand(&self) -> bool {
        self.destinations.iter().any(BackupPlace::is_configured)
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BackupPlace {
    pub name: String,
    /// `present`, or `unconfigured`: it was there when the configuration still had that destination.
    pub status: String,
}

impl BackupPlace {
    pub const UNCONFIGURED: &str = "unconfigured";

    pub fn is_configured(&self) -> bool {
        self.status != Self::UNCONFIGURED
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BackupDetail {
    pub backup: Backup,
    pub started: String,
    pub finished: String,
    pub run: String,
    pub host: String,
    pub keepd_version: String,
    pub sequence: u64,
    pub predecessor: Option<String>,
    pub sources: Vec<SourceInfo>,
    pub files: u64,
    pub directories: u64,
    pub messages: Vec<Message>,
    /// The backup it was built upon; None when everything was read.
    #[serde(default)]
    pub parent: Option<String>,
    /// Bytes of the contents that were new, before they were compressed.
    #[serde(default)]
    pub new_bytes: Option<u64>,
    /// Of a copy: its id in the destination's repository, which is not the backup's own.
    #[serde(default)]
    pub object: Option<String>,
    /// How long restoring and checking took when it was proven.
    #[serde(default)]
    pub proven_seconds: Option<u64>,
    /// What a drill said against it, and nobody accepted since.
    #[serde(default)]
    pub suspect: Vec<String>,
}

impl BackupDetail {
    /// The id that the destination's repository knows it by.
    pub fn object(&self) -> &str {
        self.object.as_deref().unwrap_or(&self.backup.id)
    }
}

/// What retention makes of a job's backups at a destination.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RetentionPlan {
    pub job: String,
    pub destination: String,
    /// Rules by name, `keep_within` in seconds: those that were looked at, and those that were in force last.
    pub policy: BTreeMap<String, u64>,
    pub in_force: BTreeMap<String, u64>,
    /// The policy came with the call.
    pub simulated: bool,
    /// Backups that the policy would remove now.
    pub removes: u64,
    /// Of these, the ones that stay until the changed policy is confirmed.
    pub held_back: u64,
    /// Newest first.
    pub verdicts: Vec<RetentionVerdict>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RetentionVerdict {
    pub id: String,
    pub time: String,
    pub outcome: Outcome,
    pub pinned: bool,
    pub proven: Option<String>,
    pub keep: bool,
    /// It stays and counts for nothing.
    pub quarantined: bool,
    pub reasons: Vec<String>,
    /// When it will fall if the job makes a good backup each time it is due; None for never, or too far away to be foreseen.
    pub falls: Option<String>,
}

/// Something worth telling about a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    pub time: String,
    pub level: Level,
    pub text: String,
}

/// A run with its progress.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    pub id: String,
    pub kind: RunKind,
    pub state: RunState,
    pub job: Option<String>,
    pub destination: Option<String>,
    pub backup: Option<String>,
    pub queued: String,
    pub started: Option<String>,
    pub finished: Option<String>,
    pub attempt: u32,
    /// The step that runs (or ran last), and all of them in order.
    pub step: String,
    pub steps: Vec<Step>,
    pub progress: Progress,
    /// The newest messages, at most 200; `messages_total` counts all.
    pub messages: Vec<Message>,
    pub messages_total: u64,
    /// Why it failed, in one text.
    pub error: Option<String>,
    /// Who started it: `schedule` or a user's name.
    pub by: String,
    /// The runs that bring this one's backup to the job's other destinations; several backups may share one.
    #[serde(default)]
    pub copies: Vec<String>,
    /// Of a restore in place: what it changes.
    #[serde(default)]
    pub plan: Option<RestorePlan>,
    /// Of a restore in place: the backup of what was there before.
    #[serde(default)]
    pub safety: Option<String>,
}

/// What a restore in place changes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RestorePlan {
    pub backup: String,
    pub job: String,
    /// Of the backup.
    pub time: String,
    /// Only these were wanted: `<source>/<path>` each; empty for all of the sources.
    pub paths: Vec<BytesPath>,
    /// Of a server's databases only this one was wanted.
    #[serde(default)]
    pub database: Option<String>,
    /// Of a database of SQLite only these tables were wanted.
    #[serde(default)]
    pub tables: Vec<String>,
    pub sources: Vec<PlannedSource>,
    /// The job's services, which are stopped if they run.
    pub services: Vec<PlannedService>,
    /// The application's version in the backup, and now.
    pub version: Option<String>,
    pub version_now: Option<String>,
    pub file_systems: Vec<PlannedSpace>,
    /// Why it cannot be done. With any of them nothing is begun.
    pub problems: Vec<String>,
    /// What should be known.
    pub notes: Vec<String>,
}

/// What becomes of a source.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PlannedSource {
    pub name: String,
    pub kind: String,
    /// The path, database or program that is restored to.
    pub target: String,
    /// Files and directories that are written, removed, or given other owners, modes and times.
    pub written: u64,
    pub removed: u64,
    pub described: u64,
    /// Bytes that are written.
    pub bytes: u64,
    /// The first changes.
    pub changes: Vec<Change>,
    /// In words, where there is more to say.
    pub text: String,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PlannedService {
    pub name: String,
    pub running: bool,
}

/// What a file system must hold besides what is on it, until the restore has ended.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PlannedSpace {
    pub path: String,
    pub needed: u64,
    pub free: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Step {
    pub name: String,
    pub started: String,
    pub seconds: Option<f64>,
}

/// Numbers of a run. `percent` and `eta_seconds` are absent while the total is not known.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub entries: u64,
    pub bytes: u64,
    pub total_bytes: Option<u64>,
    pub percent: Option<f64>,
    pub eta_seconds: Option<u64>,
    /// Bytes newly stored (sealed).
    pub added_bytes: u64,
}

/// One entry of a backup. `path` is `<source>` or `<source>/<path>`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EntryInfo {
    pub path: BytesPath,
    pub kind: EntryKind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub user: Option<String>,
    pub group: Option<String>,
    pub size: u64,
    pub mtime: String,
    /// Target of a symlink, or the first name of a hard-linked file.
    pub target: Option<BytesPath>,
    /// The file changed while it was read; its content may be torn.
    pub changed_while_read: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Change {
    pub change: ChangeKind,
    pub path: BytesPath,
    pub kind: EntryKind,
    pub size_before: Option<u64>,
    pub size_after: Option<u64>,
}

/// One thing that differs between a backup (before) and what is live (after): a path, a table, a whole database, or (with none of these) a source.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    pub source: String,
    pub change: ChangeKind,
    /// `<source>/<path>`, with its kind and the sizes of a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<BytesPath>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<EntryKind>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_before: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_after: Option<u64>,
    /// Of a server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_before: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_after: Option<u64>,
    /// The statements differ that the table, its indexes and its triggers are made with.
    #[serde(default)]
    pub schema: bool,
    /// Rows that came, went and changed, where contents were compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_added: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_removed: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_changed: Option<u64>,
}

/// What a comparison found, at its end.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CompareSummary {
    /// Paths by their change.
    pub added: u64,
    pub removed: u64,
    pub modified: u64,
    pub metadata: u64,
    /// Paths that do not differ.
    pub equal: u64,
    /// Tables and databases that differ.
    pub tables: u64,
    /// Paths of the backup at which something is that its source leaves out now.
    pub excluded: u64,
    /// Sources that could not be compared, or not as a whole; the run's messages say why.
    pub not_compared: Vec<String>,
}

/// A line of the stream of a comparison; the last one has the summary.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CompareLine {
    Difference(Difference),
    Summary(CompareSummary),
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub time: String,
    pub kind: EventKind,
    pub job: Option<String>,
    pub run: Option<String>,
    pub state: Option<RunState>,
    pub text: String,
    /// Of an import that ended: how.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub import: Option<Import>,
}

/// An archive on its way in.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Import {
    pub id: String,
    pub state: ImportState,
    /// Who began it.
    pub by: String,
    pub created: String,
    /// Until then it must be started.
    pub deadline: String,
    pub finished: Option<String>,
    pub destination: String,
    /// The job that the backup belongs to here; None: that of the archive, which is not read yet.
    pub job: Option<String>,
    pub validate_only: bool,
    /// Of the run, while it works, or where it ended.
    pub step: String,
    pub percent: Option<f64>,
    /// Bytes of the archive that came, or were read of a descriptor.
    pub uploaded: u64,
    /// Bytes of the whole archive, where they are known.
    pub size: Option<u64>,
    /// Keys that were uploaded and are held in memory.
    pub keys: u64,
    pub run: Option<String>,
    /// The backup that it became, or would have become.
    pub backup: Option<String>,
    pub counts: ImportCounts,
    pub error: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportCounts {
    /// Stored.
    pub backups: u64,
    /// Not stored, for they are there already.
    pub skipped: u64,
    pub entries: u64,
    pub files: u64,
    pub directories: u64,
    /// Of contents.
    pub bytes: u64,
}

/// What a scan of the machine found, in numbers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CoverageCounts {
    /// When it was begun.
    pub time: String,
    /// Gaps that nobody acknowledged.
    pub gaps: u64,
    /// Of these, the ones that were no gaps when gaps were last acknowledged.
    pub new_gaps: u64,
    /// Gaps that were acknowledged.
    pub acknowledged: u64,
    pub covered: u64,
    /// When gaps were last acknowledged.
    pub since: Option<String>,
}

/// What a scan of the machine found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Coverage {
    pub counts: CoverageCounts,
    pub run: String,
    /// Caches and the like were looked at, too.
    pub all: bool,
    /// Gaps before what is covered; in several replies, each has some of them.
    pub items: Vec<CoverageItem>,
    /// Items that are not in the list: it is bounded.
    pub cut: u64,
    /// Gaps of the last acknowledgement that are gone from the machine.
    pub vanished: Vec<String>,
    /// What was left out on purpose, and how often.
    pub skipped: BTreeMap<String, u64>,
    /// What could not be looked at, and why: whatever is there is not in the list.
    pub notes: Vec<String>,
    /// Files and directories that were looked at.
    pub looked_at: u64,
    /// Directories and files that could not be read; the notes name the first.
    pub unreadable: u64,
}

/// Something that holds data.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CoverageItem {
    pub kind: CoverageKind,
    /// A path, or `postgres shop`. Bytes that are not UTF-8 as \xNN.
    pub what: String,
    /// The unit, the server, the device.
    pub r#where: String,
    /// How much it is, as far as that is known.
    pub bytes: Option<u64>,
    /// When it was last written to.
    pub modified: Option<String>,
    /// `JOB/SOURCE` of what holds it.
    pub covered_by: Vec<String>,
    /// It is in no job, or not in a way that can be relied on.
    pub gap: bool,
    /// In words.
    pub reason: String,
    #[serde(default)]
    pub drift: Option<Drift>,
    /// When somebody said that this gap is meant.
    #[serde(default)]
    pub acknowledged: Option<String>,
    /// What would cover it, as TOML.
    #[serde(default)]
    pub suggestion: Option<String>,
}

/// Nothing in a name may move the cursor, change colours or hide what follows.
pub fn escape(text: &str) -> String {
    let bad = |c: char| c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    match text.chars().any(bad) {
        false => text.to_owned(),
        true => text.chars().map(|c| if bad(c) { c.escape_default().to_string() } else { c.to_string() }).collect(),
    }
}

impl BytesPath {
    /// From a path's bytes.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(s) => Self { path: s.to_owned(), base64: None },
            Err(_) => Self { path: String::from_utf8_lossy(bytes).into_owned(), base64: Some(data_encoding::BASE64.encode(bytes)) },
        }
    }

    /// The path's bytes; an error when `base64` is not base64, or is another path than the one that people see.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        match &self.base64 {
            None => Ok(self.path.clone().into_bytes()),
            Some(b) => {
                let bytes = data_encoding::BASE64.decode(b.as_bytes()).map_err(|e| format!("the path's base64 does not decode: {e}"))?;
                match String::from_utf8_lossy(&bytes) == self.path {
                    true => Ok(bytes),
                    false => Err("the path's base64 is another path than the one given beside it".into()),
                }
            }
        }
    }
}

impl From<&str> for BytesPath {
    fn from(path: &str) -> Self {
        Self { path: path.to_owned(), base64: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_a_text() {
        assert_eq!(serde_json::from_str::<Mark>("\"unpin\"").unwrap(), Mark::Unpin);
        for other in ["{\"unpin\":null}", "[\"unpin\"]", "\"Unpin\"", "1", "null"] {
            assert!(serde_json::from_str::<Mark>(other).is_err(), "{other}");
        }
    }

    #[test]
    fn a_path_is_the_one_that_people_see() {
        for bytes in [b"a/b".as_slice(), b"a\xff\xfe/b", b"\xe2\x82"] {
            assert_eq!(BytesPath::from_bytes(bytes).to_bytes().unwrap(), bytes);
        }
        let other = BytesPath { path: "files/harmless".into(), base64: BytesPath::from_bytes(b"files/\xff").base64 };
        assert!(other.to_bytes().unwrap_err().contains("another path"));
    }
}
