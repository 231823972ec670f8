//! The ledger: what happened, in one SQLite database of the state directory (WAL).
//!
//! Runs, the schedule's state, the catalogue of backups. The catalogue is a copy of what the repositories hold and can be
//! rebuilt from them; runs and schedule state live only here.

use std::path::Path;

use jiff::Timestamp;
use keepd_protocol::model::{Backup, BackupDetail, Run};

#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("{0}")]
    Failed(String),
}

pub type Result<T, E = LedgerError> = std::result::Result<T, E>;

/// A job's schedule state. Times are instants.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ScheduleState {
    /// The schedule this state belongs to, in words; another one resets `last_due`.
    pub schedule: String,
    /// The newest due time that was started (or found already covered); the next one is computed from it.
    pub last_due: Option<Timestamp>,
    pub last_start: Option<Timestamp>,
    /// End of the newest run that made a good backup.
    pub last_good: Option<Timestamp>,
    pub last_run: Option<String>,
    pub runs_good: u64,
    pub runs_failed: u64,
}

/// The open ledger; its methods block for a moment (a small SQLite transaction each).
#[derive(Debug)]
pub struct Ledger {}

impl Ledger {
    /// Opens or makes `ledger.sqlite` in the state directory.
    pub fn open(state_dir: &Path) -> Result<Self> {
        let _ = state_dir;
        Ok(Self {})
    }

    /// Inserts or replaces a run.
    pub fn save_run(&self, run: &Run) -> Result<()> {
        let _ = run;
        Ok(())
    }

    pub fn run(&self, id: &str) -> Result<Option<Run>> {
        let _ = id;
        Ok(None)
    }

    /// The newest first.
    pub fn runs(&self, job: Option<&str>, limit: u32) -> Result<Vec<Run>> {
        let _ = (job, limit);
        Ok(Vec::new())
    }

    /// At start: runs that an earlier daemon left queued or running become failed, with that reason. Returns them.
    pub fn close_interrupted_runs(&self, reason: &str, now: Timestamp) -> Result<Vec<Run>> {
        let _ = (reason, now);
        Ok(Vec::new())
    }

    /// Removes all but the newest `keep` finished runs.
    pub fn trim_runs(&self, keep: u32) -> Result<()> {
        let _ = keep;
        Ok(())
    }

    pub fn schedule_state(&self, job: &str) -> Result<ScheduleState> {
        let _ = job;
        Ok(ScheduleState::default())
    }

    pub fn save_schedule_state(&self, job: &str, state: &ScheduleState) -> Result<()> {
        let _ = (job, state);
        Ok(())
    }

    /// Adds a backup to the catalogue of a destination (or replaces it). `detail.backup.destinations` is not stored: it is
    /// what the catalogue itself knows.
    pub fn put_backup(&self, destination: &str, detail: &BackupDetail) -> Result<()> {
        let _ = (destination, detail);
        Ok(())
    }

    pub fn remove_backup(&self, destination: &str, id: &str) -> Result<()> {
        let _ = (destination, id);
        Ok(())
    }

    /// The ids a destination's catalogue holds.
    pub fn backup_ids(&self, destination: &str) -> Result<Vec<String>> {
        let _ = destination;
        Ok(Vec::new())
    }

    /// Newest first, one row for each id, with every destination that has it.
    pub fn backups(&self, job: Option<&str>, destination: Option<&str>) -> Result<Vec<Backup>> {
        let _ = (job, destination);
        Ok(Vec::new())
    }

    /// All backups whose id starts with `prefix` (hexadecimal), of any job or of one: at most two, enough to see ambiguity.
    pub fn backups_by_prefix(&self, prefix: &str, job: Option<&str>) -> Result<Vec<Backup>> {
        let _ = (prefix, job);
        Ok(Vec::new())
    }

    /// The newest good backup, safety copies (type pre-restore) not counted.
    pub fn latest(&self, job: Option<&str>) -> Result<Option<Backup>> {
        let _ = job;
        Ok(None)
    }

    pub fn backup_detail(&self, id: &str) -> Result<Option<BackupDetail>> {
        let _ = id;
        Ok(None)
    }

    /// A small value kept by name (for example a repository's newest sequence number as seen from here).
    pub fn note(&self, key: &str) -> Result<Option<String>> {
        let _ = key;
        Ok(None)
    }

    pub fn set_note(&self, key: &str, value: &str) -> Result<()> {
        let _ = (key, value);
        Ok(())
    }
}
