//! Runs: one piece of work each, with steps, progress, cancel and an outcome.
//!
//! `Runs` is the registry the schedule and the control socket start work through. A run is queued, waits for its job (a
//! job never overlaps itself) and for a place (`max_parallel_runs`), works on blocking threads, and ends in the ledger.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use keepd_protocol::model::{Backup, BackupDetail, BackupType, Change, DestinationStatus, EntryInfo, Event, Run};
use tokio::sync::{broadcast, mpsc, watch};

use crate::config;
use crate::ledger::Ledger;

/// Why a run could not be started, or a question not answered. Each text says what to do.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// `what`: job, backup, run, destination, path.
    #[error("{text}")]
    NotFound { what: &'static str, name: String, text: String },
    #[error("{0}")]
    Ambiguous(String),
    #[error("{0}")]
    Busy(String),
    #[error("keepd is stopping and starts nothing new")]
    ShuttingDown,
    #[error("{0}")]
    Failed(String),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What to back up and why.
#[derive(Debug, Clone, Default)]
pub struct BackupRequest {
    pub job: String,
    pub r#type: BackupType,
    pub name: Option<String>,
    pub labels: BTreeMap<String, String>,
    /// `schedule`, or a user's name.
    pub by: String,
    /// 1 for the first, more for a retry.
    pub attempt: u32,
}

/// A restore that has begun to write into the client's pipe.
#[derive(Debug, Clone, PartialEq)]
pub struct RestoreStarted {
    pub run: String,
    pub backup: String,
    pub entries: u64,
    pub bytes: u64,
}

/// The registry of runs.
pub struct Runs {
    _config: Arc<config::Current>,
}

impl Runs {
    pub fn new(config: Arc<config::Current>, ledger: Arc<Ledger>, events: broadcast::Sender<Event>) -> Arc<Self> {
        let _ = (ledger, events);
        Arc::new(Self { _config: config })
    }

    /// Queues a backup. A job that is queued or running already is refused as busy.
    pub fn start_backup(self: &Arc<Self>, request: BackupRequest) -> Result<String> {
        let _ = request;
        Err(Error::ShuttingDown)
    }

    /// Queues a check; `read_data` is the percentage of packs to read whole.
    pub fn start_check(self: &Arc<Self>, destination: &str, read_data: u32, by: &str) -> Result<String> {
        let _ = (destination, read_data, by);
        Err(Error::ShuttingDown)
    }

    pub fn start_prune(self: &Arc<Self>, destination: &str, dry_run: bool, by: &str) -> Result<String> {
        let _ = (destination, dry_run, by);
        Err(Error::ShuttingDown)
    }

    pub fn start_delete(self: &Arc<Self>, backup: &str, job: Option<&str>, destination: Option<&str>, by: &str) -> Result<String> {
        let _ = (backup, job, destination, by);
        Err(Error::ShuttingDown)
    }

    /// Streams entries into `out` (see `keepd_protocol::restore`); `paths` are `<source>[/<path>]`, none means all.
    pub async fn start_restore(
        self: &Arc<Self>,
        backup: &str,
        job: Option<&str>,
        paths: Vec<Vec<u8>>,
        out: OwnedFd,
        by: &str,
    ) -> Result<RestoreStarted> {
        let _ = (backup, job, paths, out, by);
        Err(Error::ShuttingDown)
    }

    /// Writes one file's contents into `out`; returns the run and the size.
    pub async fn start_cat(
        self: &Arc<Self>,
        backup: &str,
        job: Option<&str>,
        path: Vec<u8>,
        out: OwnedFd,
        by: &str,
    ) -> Result<(String, u64)> {
        let _ = (backup, job, path, out, by);
        Err(Error::ShuttingDown)
    }

    /// The entries at or below a path, in batches; the receiver ends with the list, an error is its last item.
    pub fn list_entries(
        self: &Arc<Self>,
        backup: &str,
        job: Option<&str>,
        path: Option<Vec<u8>>,
        recursive: bool,
    ) -> Result<mpsc::Receiver<Result<Vec<EntryInfo>>>> {
        let _ = (backup, job, path, recursive);
        Err(Error::ShuttingDown)
    }

    /// What differs between two backups, in batches.
    pub fn diff(self: &Arc<Self>, a: &str, b: &str, job: Option<&str>) -> Result<mpsc::Receiver<Result<Vec<Change>>>> {
        let _ = (a, b, job);
        Err(Error::ShuttingDown)
    }

    /// The run as it changes; its sender is dropped some time after the run has finished. Runs that ended are in the ledger.
    pub fn follow(&self, run: &str) -> Option<watch::Receiver<Arc<Run>>> {
        let _ = run;
        None
    }

    /// Asks a run to stop at its next safe point; false when no such run is queued or running.
    pub fn cancel(&self, run: &str) -> bool {
        let _ = run;
        false
    }

    /// What is queued or running now, oldest first.
    pub fn active(&self) -> Vec<Arc<Run>> {
        Vec::new()
    }

    /// A backup by id, unique prefix, or `latest`.
    pub fn resolve(&self, backup: &str, job: Option<&str>) -> Result<Backup> {
        let _ = (backup, job);
        Err(Error::ShuttingDown)
    }

    pub fn backup_detail(&self, backup: &str, job: Option<&str>) -> Result<BackupDetail> {
        let _ = (backup, job);
        Err(Error::ShuttingDown)
    }

    pub fn destinations(&self) -> Vec<DestinationStatus> {
        Vec::new()
    }

    /// Brings the catalogue of every destination up to date with its repository, in the background, at start.
    pub fn sync_catalogue(self: &Arc<Self>) {}

    /// Starts nothing more, asks all runs to stop at a safe point, and returns when they have (or `limit` is over: false).
    pub async fn shutdown(&self, limit: std::time::Duration) -> bool {
        let _ = limit;
        true
    }
}
