//! Parameters and replies of every method of `io.keepd.Control`. Unknown parameters are refused by name.
//!
//! `private_keys`: which of the descriptors passed along are private key files (or recovery kits), open for reading; they are lent for the time of the
//! run.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::access::*;
use crate::audit::*;
use crate::configuration::*;
use crate::model::*;

/// A method: its name on the wire, what goes in and what comes out (of each reply, where there are several).
pub trait Method {
    const NAME: &'static str;
    type In: Serialize + for<'a> Deserialize<'a>;
    type Out: Serialize + for<'a> Deserialize<'a>;
}

macro_rules! method {
    ($(#[$doc:meta])* $name:ident { $($(#[$fa:meta])* $f:ident : $t:ty),* $(,)? } -> { $($(#[$oa:meta])* $o:ident : $ot:ty),* $(,)? }) => {
        $(#[$doc])*
        pub mod $name {
            use super::*;
            #[derive(Debug, Clone, Default, Serialize, Deserialize)]
            #[serde(deny_unknown_fields)]
            pub struct In { $($(#[$fa])* pub $f: $t,)* }
            #[derive(Debug, Clone, Default, Serialize, Deserialize)]
            pub struct Out { $($(#[$oa])* pub $o: $ot,)* }
        }
    };
}
macro_rules! names { ($($m:ident as $ty:ident = $n:literal),* $(,)?) => {
    $(#[derive(Debug)] pub enum $ty {}
      impl Method for $ty { const NAME: &'static str = concat!("io.keepd.Control.", $n); type In = $m::In; type Out = $m::Out; })*
    /// Every method's full name.
    pub const ALL: &[&str] = &[$(concat!("io.keepd.Control.", $n)),*];
}}

method!(/// Jobs, what runs, what is next, destinations.
    get_status { #[serde(default)] job: Option<String> } -> { status: Status });
method!(/// The configured jobs and their schedule state.
    list_jobs {} -> { jobs: Vec<JobStatus> });
method!(/// One job in full.
    show_job { job: String } -> { job: JobDetail });
method!(/// Starts a backup of a job and returns at once with the run's id; follow it with FollowRun.
    start_backup { job: String, #[serde(default)] r#type: Option<BackupType>, #[serde(default)] name: Option<String>, #[serde(default)] description: Option<String>, #[serde(default)] labels: BTreeMap<String, String> } -> { run: String });
method!(/// Starts a check of a destination's repository. `read_data`: percentage of the packs to read whole, 0 for the structure only. `repair`: what
    /// no other destination has is read from its sources again, and checked once more.
    start_check { destination: String, #[serde(default)] read_data: u32, #[serde(default)] repair: bool, #[serde(default)] private_keys: Vec<u32> } -> { run: String });
method!(/// Starts a prune of a destination's repository.
    start_prune { destination: String, #[serde(default)] dry_run: bool, #[serde(default)] private_keys: Vec<u32> } -> { run: String });
method!(/// Gives a destination's repository a new master key and seals everything with it, or goes on with that. `drop_slots`: key slots that no
    /// configured profile opens are dropped.
    start_re_encrypt { destination: String, #[serde(default)] drop_slots: bool, #[serde(default)] private_keys: Vec<u32> } -> { run: String });
method!(/// Starts the deletion of a backup on every destination (or the one named).
    start_delete { backup: String, #[serde(default)] job: Option<String>, #[serde(default)] destination: Option<String> } -> { run: String });
method!(/// Says something of a backup on every destination that has it: `pin` keeps it whatever the rules say, `unpin` takes that back, `accept`
    /// makes a suspect one good.
    mark_backup { backup: String, #[serde(default)] job: Option<String>, mark: Mark } -> { backup: Backup });
method!(/// What the job's retention, or the `policy` given, would do at each destination (or the one named).
    show_retention { job: String, #[serde(default)] destination: Option<String>, #[serde(default)] policy: Option<BTreeMap<String, u64>> } -> { plans: Vec<RetentionPlan> });
method!(/// Starts a run that confirms the job's configured retention and removes what it removes.
    start_retention { job: String, #[serde(default)] destination: Option<String> } -> { run: String });
method!(/// Starts a run that copies a backup to a destination.
    start_copy { backup: String, #[serde(default)] job: Option<String>, destination: String, #[serde(default)] private_keys: Vec<u32> } -> { run: String });
method!(/// Tries what a destination can do, and leaves nothing behind.
    test_destination { destination: String } -> { findings: Vec<Finding> });
method!(/// Makes this machine the writer of a destination's repository, whoever was it before.
    take_over { destination: String } -> { message: String });
method!(/// Streams a backup's entries into the write end of a pipe passed along with the call (see `restore`). `paths` are
    /// `<source>` or `<source>/<path>`; none means all. `memory`, `returned`: places of a memfd and of a pipe's read end, where the client lends memory.
    start_restore { backup: String, #[serde(default)] job: Option<String>, #[serde(default)] paths: Vec<BytesPath>, #[serde(default)] private_keys: Vec<u32>, #[serde(default)] memory: Option<u32>, #[serde(default)] returned: Option<u32> } -> { run: String, backup: String, entries: u64, bytes: u64 });
method!(/// Starts a run that loads a database into the server it came from under the name `target`, through a scratch database. `replace`: a database of
    /// that name may be there, and is kept under another. `tables`: only these. `no_owner`: objects belong to who loads them.
    start_load { backup: String, #[serde(default)] job: Option<String>, #[serde(default)] source: Option<String>, #[serde(default)] database: Option<String>, target: String, #[serde(default)] tables: Vec<String>, #[serde(default)] replace: bool, #[serde(default)] no_owner: bool, #[serde(default)] private_keys: Vec<u32> } -> { run: String });
method!(/// Starts a restore to where a job's sources are, as one transaction: what is there is backed up first, all is staged and checked beside it, the
    /// services are stopped, and all of it is exchanged or none. `sources`, `paths`, `database`, `tables` (of SQLite): only these. `dry_run`: the run ends with its plan.
    /// `no_safety`: what is there is not backed up.
    start_in_place { backup: String, #[serde(default)] job: Option<String>, #[serde(default)] sources: Vec<String>, #[serde(default)] paths: Vec<BytesPath>, #[serde(default)] database: Option<String>, #[serde(default)] tables: Vec<String>, #[serde(default)] no_owner: bool, #[serde(default)] no_safety: bool, #[serde(default)] dry_run: bool, #[serde(default)] private_keys: Vec<u32> } -> { run: String });
method!(/// Starts a restore in place of what was there before a restore in place, from its safety backup.
    start_undo { run: String, #[serde(default)] dry_run: bool, #[serde(default)] private_keys: Vec<u32> } -> { run: String, backup: String });
method!(/// Writes one file's contents into the descriptor passed along with the call.
    start_cat { backup: String, #[serde(default)] job: Option<String>, path: BytesPath, #[serde(default)] private_keys: Vec<u32> } -> { run: String, bytes: u64 });
method!(/// Writes a backup, or what is in it at `paths` (as for StartRestore), as a portable archive into the descriptor passed along with the call: sealed for a configured
    /// `profile`, or with `fresh_key` for a key made for it alone, whose key file is written into a second descriptor; else for everybody to read.
    start_export { backup: String, #[serde(default)] job: Option<String>, #[serde(default)] paths: Vec<BytesPath>, #[serde(default)] compression: ArchiveCompression, #[serde(default)] profile: Option<String>, #[serde(default)] fresh_key: bool, #[serde(default)] private_keys: Vec<u32> } -> { run: String, backup: String, bytes: u64 });
method!(/// A run's progress as `more` replies: the present state first, then each change (at most ten a second), the last
    /// one with `state` other than queued or running. Without `more`: the present state.
    follow_run { run: String } -> { run: Run });
method!(/// Asks a run to stop at its next safe point.
    cancel_run { run: String } -> {});
method!(/// The newest runs first.
    list_runs { #[serde(default)] job: Option<String>, #[serde(default)] limit: Option<u32> } -> { runs: Vec<Run> });
method!(/// One run with its steps and messages.
    show_run { run: String } -> { run: Run });
method!(/// Backups, newest first; with `more` in several replies. `labels`: only those that carry all of these.
    list_backups { #[serde(default)] job: Option<String>, #[serde(default)] destination: Option<String>, #[serde(default)] r#type: Option<BackupType>, #[serde(default)] name: Option<String>, #[serde(default)] version: Option<String>, #[serde(default)] labels: BTreeMap<String, String> } -> { backups: Vec<Backup> });
method!(/// One backup with its facts.
    show_backup { backup: String, #[serde(default)] job: Option<String> } -> { backup: BackupDetail });
method!(/// The entries at or below a path, in path order, as several `more` replies. `recursive` false lists one level.
    list_entries { backup: String, #[serde(default)] job: Option<String>, #[serde(default)] path: Option<BytesPath>, #[serde(default)] recursive: bool } -> { entries: Vec<EntryInfo> });
method!(/// What differs between two backups, as several `more` replies.
    diff_backups { a: String, b: String, #[serde(default)] job: Option<String> } -> { changes: Vec<Change> });
method!(/// Events as they happen, until the client hangs up.
    watch {} -> { event: Event });
method!(/// Compares a backup with what is live now, changing nothing, and streams what differs into the descriptor passed along with the call: one JSON
    /// object a line, `{"difference": …}`, the last one `{"summary": …}`. `paths` as for StartRestore; `deep`: also the rows of SQLite's tables.
    start_compare { backup: String, #[serde(default)] job: Option<String>, #[serde(default)] paths: Vec<BytesPath>, #[serde(default)] deep: bool, #[serde(default)] private_keys: Vec<u32> } -> { run: String, backup: String });
method!(/// Reads the configuration again; a wrong one is refused and the old one stays.
    reload {} -> { jobs: u32, message: String });
method!(/// Starts a run that looks for what on this machine is in no job. `all`: in caches and the like, too.
    start_coverage { #[serde(default)] all: bool } -> { run: String });
method!(/// What the last such run found, as several `more` replies, each with some of the items.
    get_coverage {} -> { coverage: Coverage });
method!(/// Says of gaps (all, or those named by their `what`; a path that ends with a slash means all below it) that they are meant, or with `undo` takes
    /// that back. `acknowledged`: how many changed.
    acknowledge_coverage { #[serde(default)] items: Vec<String>, #[serde(default)] all: bool, #[serde(default)] undo: bool } -> { acknowledged: u64 });

method!(/// Starts a run that restores a backup (without one the newest good of `job`, or of the only job) into a scratch place, checks it there, and marks
    /// it as proven or as suspect.
    start_drill { #[serde(default)] backup: Option<String>, #[serde(default)] job: Option<String>, #[serde(default)] private_keys: Vec<u32> } -> { run: String, backup: String });

method!(/// The key slots of destinations (of all, or those named), and the encryption profiles.
    list_keys { #[serde(default)] destinations: Vec<String> } -> { profiles: Vec<KeyProfile>, destinations: Vec<DestinationKeys> });
method!(/// Starts a run that has a further key open a destination: that of a configured `profile`, or the one in the key file passed along with the call
    /// as an open descriptor; its slot is then called `label`.
    start_key_add { destination: String, #[serde(default)] profile: Option<String>, #[serde(default)] label: Option<String> } -> { run: String, fingerprint: Option<String> });
method!(/// Starts a run that removes a key slot, named by its id or a unique start of it. Refused unless another one opens with the key of the destination's profile.
    start_key_remove { destination: String, slot: String } -> { run: String, slot: String });
method!(/// Starts a step of exchanging a profile's key, at all its destinations: `add` has the key in the key file passed along as an open descriptor open them; `remove`,
    /// when the configuration names that key, removes the slots of the one before. `file`: the same key file's path, where the daemon itself must find it.
    /// `configured`: whether the configuration names that key already.
    start_key_rotate { profile: String, file: String, step: KeyStep } -> { run: String, fingerprint: String, configured: bool });
method!(/// Writes the recovery kit of a profile into the descriptor passed along. `private_key`: a second descriptor is a private key file that goes into it.
    /// `include_secrets`: so do the passwords and access keys of the destinations. Where the profile's key cannot be written down, a new one is made that opens its destinations.
    make_kit { profile: String, #[serde(default)] include_secrets: bool, #[serde(default)] private_key: bool } -> { run: String, fingerprint: Option<String> });

method!(/// Begins the import of an archive. It must be started within `timeout_seconds` (default 3600, at most a week); as long may a pipe keep its reader waiting.
    /// `job`: the backup's job here. `sources`, `paths` (`<source>[/<path>]`), as the archive calls them: only these. `rename_sources`: by their names in the archive.
    /// `bandwidth`: bytes each second. `foreign_source`: a tar that keepd did not make is taken as this source of `job`. `max_bytes`: of contents, at most.
    /// `time` (RFC 3339) and `place`: of a foreign tar, when and where it was made.
    initiate_import { destination: String, #[serde(default)] job: Option<String>, #[serde(default)] sources: Vec<String>, #[serde(default)] paths: Vec<BytesPath>,
        #[serde(default)] rename_sources: BTreeMap<String, String>, #[serde(default)] on_conflict: OnConflict, #[serde(default)] validate_only: bool,
        #[serde(default)] bandwidth: Option<u64>, #[serde(default)] timeout_seconds: Option<u64>, #[serde(default)] foreign_source: Option<String>,
        #[serde(default)] max_bytes: Option<u64>, #[serde(default)] time: Option<String>, #[serde(default)] place: Option<String>,
        #[serde(default)] name: Option<String>, #[serde(default)] description: Option<String>, #[serde(default)] labels: BTreeMap<String, String> } -> { import: String, deadline: String });
method!(/// Gives an import its archive, or a key. Either as a descriptor passed along (a file, or for the archive also a pipe or socket, which the run reads), or as `data`
    /// (base64, at most 512 KiB of bytes) at `offset`, the one with `last` at its end. `next`: where the next piece goes on, also when this one was not at its place.
    /// `confirm`: the archive in the pipe counts only when a further call, with `last` and nothing else, says that it is whole.
    upload_import { import: String, #[serde(default)] part: ImportPart, #[serde(default)] offset: u64, #[serde(default)] data: Option<String>, #[serde(default)] last: bool,
        #[serde(default)] confirm: bool } -> { next: u64 });
method!(/// Starts an import whose archive was given, as a run.
    start_import { import: String } -> { run: String });
method!(/// One import.
    get_import { import: String } -> { import: Import });
method!(/// Imports that are under way, and those that ended within a day, newest first.
    list_imports { } -> { imports: Vec<Import> });
method!(/// Ends an import: one that was not started is removed, one that is processed is cancelled.
    cancel_import { import: String } -> { });

method!(/// The configuration on disk, table by table. `items`: only these (`job.shop`, or `job` for all jobs).
    show_config { #[serde(default)] items: Vec<String> } -> { config: Vec<ConfigItem> });
method!(/// What is wrong with the configuration as it stands on disk; nothing is changed.
    check_config {} -> { errors: Vec<String>, warnings: Vec<String>, jobs: u32, destinations: u32 });
method!(/// What an export would hold, and the secrets that it would with `include_secrets`, by name. `types`: only these kinds.
    preview_config { #[serde(default)] types: Vec<String> } -> { items: Vec<ConfigItem>, instance: String, profiles: Vec<String> });
method!(/// Writes the configuration (or the items of some `types`) into the descriptor passed along, sealed for `profile`. With `include_secrets` it must be sealed.
    export_config { #[serde(default)] types: Vec<String>, #[serde(default)] include_secrets: bool, #[serde(default)] profile: Option<String>, #[serde(default)] compression: ArchiveCompression }
        -> { items: u64, secrets: u64, bytes: u64, sha256: String });
method!(/// What an import of the file passed along as an open descriptor would do, or does. The first descriptor is the file, all others are key files that it may open with.
    /// `validate`: whether it could be imported at all, whatever conflicts. `only`: the items of mode `selective`. `answers`: what becomes of single items that conflict.
    /// `strict`: an item whose dependency is missing is a problem, not left out. `allow`: what may be changed for the worse. `base`: of the plan that was shown; where the
    /// configuration, the file or what is asked for is another one since, it is refused. With `dry_run` nothing is changed.
    import_config { #[serde(default)] validate: bool, #[serde(default)] mode: ImportMode, #[serde(default)] only: Vec<String>, #[serde(default)] on_conflict: ItemConflict,
        #[serde(default)] answers: BTreeMap<String, ItemConflict>, #[serde(default)] strict: bool, #[serde(default)] allow: Vec<Allow>, #[serde(default)] dry_run: bool,
        #[serde(default)] base: Option<String> } -> { file: ConfigFileInfo, plan: ConfigPlan, applied: bool, message: String });
method!(/// Brings back the configuration from before the last import (or undo). With `dry_run` nothing is changed; `base` as for ImportConfig.
    undo_config { #[serde(default)] dry_run: bool, #[serde(default)] base: Option<String> } -> { diff: String, base: String, applied: bool, message: String });
method!(/// Starts a run that stores the configuration where `[config_backup]` says.
    start_config_backup {} -> { run: String });
method!(/// The stored configurations at a destination (without one, that of `[config_backup]`), newest first.
    list_config_backups { #[serde(default)] destination: Option<String> } -> { destination: String, backups: Vec<ConfigBackupInfo> });
method!(/// Writes a stored configuration (the newest without a name), as it is stored, into the descriptor passed along.
    fetch_config_backup { #[serde(default)] destination: Option<String>, #[serde(default)] name: Option<String> } -> { name: String, bytes: u64 });

method!(/// What the caller may do; with `user` (a name or a number) what that one may, and with `roles` every role and who has it.
    show_access { #[serde(default)] user: Option<String>, #[serde(default)] roles: bool } -> { access: Access, #[serde(default)] roles: Vec<Role> });
method!(/// The audit log, oldest first, as several `more` replies. `after`: only what stands behind this number. `newest`: at most so many, the newest. `since`, `until`: RFC 3339.
    list_audit { #[serde(default)] after: Option<u64>, #[serde(default)] newest: Option<u64>, #[serde(default)] since: Option<String>, #[serde(default)] until: Option<String>,
        #[serde(default)] user: Option<String>, #[serde(default)] action: Option<String>, #[serde(default)] result: Option<AuditResult> } -> { entries: Vec<AuditEntry> });
method!(/// Proves the audit log's chain, and asks every destination (or none, with `offline`) for the heads that were published there.
    verify_audit { #[serde(default)] offline: bool } -> { verified: AuditVerified });

method!(/// A table of the configuration as it stands in its file, with its comments. `base`: for EditConfig.
    show_item_text { item: String } -> { file: String, text: String, base: String });
method!(/// Changes tables of the configuration, all of it or nothing, after the checks that a reload makes. `base`: of the configuration that was shown; another one by now is refused.
    /// `backups`: what becomes of the backups of jobs that are removed; `runs` delete them, and `not_deleted` says what stays and why. With `dry_run` nothing is changed.
    edit_config { edits: Vec<ConfigEdit>, #[serde(default)] base: Option<String>, #[serde(default)] backups: Option<LeftBackups>, #[serde(default)] dry_run: bool }
        -> { diff: String, base: String, warnings: Vec<String>, backups: u64, applied: bool, message: String, #[serde(default)] runs: Vec<String>,
            #[serde(default)] not_deleted: Vec<String> });
method!(/// Has a job run once at a time (RFC 3339, or a civil time in the job's zone) beside its schedule; with `cancel` not any more (without `at`: at none of them).
    schedule_once { job: String, #[serde(default)] at: Option<String>, #[serde(default)] cancel: bool } -> { once: Vec<String> });

names! {
    show_access as ShowAccess = "ShowAccess", list_audit as ListAudit = "ListAudit", verify_audit as VerifyAudit = "VerifyAudit",
    show_item_text as ShowItemText = "ShowItemText", edit_config as EditConfig = "EditConfig", schedule_once as ScheduleOnce = "ScheduleOnce",
    show_config as ShowConfig = "ShowConfig", check_config as CheckConfig = "CheckConfig", preview_config as PreviewConfig = "PreviewConfig",
    export_config as ExportConfig = "ExportConfig", import_config as ImportConfig = "ImportConfig", undo_config as UndoConfig = "UndoConfig",
    start_config_backup as StartConfigBackup = "StartConfigBackup", list_config_backups as ListConfigBackups = "ListConfigBackups",
    fetch_config_backup as FetchConfigBackup = "FetchConfigBackup",
    initiate_import as InitiateImport = "InitiateImport", upload_import as UploadImport = "UploadImport", start_import as StartImport = "StartImport",
    get_import as GetImport = "GetImport", list_imports as ListImports = "ListImports", cancel_import as CancelImport = "CancelImport",
    get_status as GetStatus = "GetStatus", list_jobs as ListJobs = "ListJobs", show_job as ShowJob = "ShowJob",
    start_backup as StartBackup = "StartBackup", start_check as StartCheck = "StartCheck", start_prune as StartPrune = "StartPrune",
    start_delete as StartDelete = "StartDelete", mark_backup as MarkBackup = "MarkBackup", show_retention as ShowRetention = "ShowRetention",
    start_retention as StartRetention = "StartRetention", start_copy as StartCopy = "StartCopy", test_destination as TestDestination = "TestDestination", take_over as TakeOver = "TakeOver", start_restore as StartRestore = "StartRestore", start_load as StartLoad = "StartLoad", start_in_place as StartInPlace = "StartInPlace", start_undo as StartUndo = "StartUndo", start_cat as StartCat = "StartCat", start_export as StartExport = "StartExport",
    follow_run as FollowRun = "FollowRun", cancel_run as CancelRun = "CancelRun", list_runs as ListRuns = "ListRuns", show_run as ShowRun = "ShowRun",
    list_backups as ListBackups = "ListBackups", show_backup as ShowBackup = "ShowBackup", list_entries as ListEntries = "ListEntries",
    diff_backups as DiffBackups = "DiffBackups", watch as Watch = "Watch", reload as Reload = "Reload",
    start_compare as StartCompare = "StartCompare",
    start_coverage as StartCoverage = "StartCoverage", get_coverage as GetCoverage = "GetCoverage", acknowledge_coverage as AcknowledgeCoverage = "AcknowledgeCoverage",
    start_drill as StartDrill = "StartDrill",
    start_re_encrypt as StartReEncrypt = "StartReEncrypt",
    list_keys as ListKeys = "ListKeys", start_key_add as StartKeyAdd = "StartKeyAdd", start_key_remove as StartKeyRemove = "StartKeyRemove",
    start_key_rotate as StartKeyRotate = "StartKeyRotate", make_kit as MakeKit = "MakeKit",
}
