//! Sources: what on this machine is captured, as entries into the repository.

pub mod files;
pub mod sqlite;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use keepd_protocol::model::Level;
use tokio_util::sync::CancellationToken;

use crate::repository::{Entry, SinkError};

/// What every source is given besides its own configuration.
pub struct Context<'a> {
    pub cancel: &'a CancellationToken,
    pub report: &'a Report,
    /// A directory only the daemon's user can enter, on the state directory's file system, for what must be staged.
    pub work_dir: &'a Path,
    /// A directory for caches of this job and source and repository; whatever is in it may vanish between runs.
    pub cache_dir: &'a Path,
}

/// The entries of the job's last backup for this source, in path order.
pub trait Previous {
    fn next_entry(&mut self) -> Result<Option<Entry>, SinkError>;
}

/// Progress and messages of a run's capture, shared with who shows them.
#[derive(Debug, Default)]
pub struct Report {
    pub entries: AtomicU64,
    pub bytes: AtomicU64,
    left_out: AtomicU64,
    messages: Mutex<Vec<(Level, String)>>,
}

impl Report {
    pub fn entry(&self) {
        self.entries.fetch_add(1, Ordering::Relaxed);
    }

    pub fn bytes(&self, n: u64) {
        self.bytes.fetch_add(n, Ordering::Relaxed);
    }

    /// Something that is in the configuration but not in the backup: the run ends partly done.
    pub fn left_out(&self, text: String) {
        self.left_out.fetch_add(1, Ordering::Relaxed);
        self.message(Level::Warning, text);
    }

    pub fn message(&self, level: Level, text: String) {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        // More than anybody reads; the count of what was left out goes on.
        if messages.len() < 1000 {
            messages.push((level, text));
        }
    }

    /// How much was left out so far.
    pub fn left_out_count(&self) -> u64 {
        self.left_out.load(Ordering::Relaxed)
    }

    pub fn take_messages(&self) -> Vec<(Level, String)> {
        std::mem::take(&mut *self.messages.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What a source found out about itself, for the manifest.
pub type Facts = BTreeMap<String, serde_json::Value>;

#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("cancelled")]
    Cancelled,
    /// The text says what was tried, on what, why it failed and what to do.
    #[error("{0}")]
    Failed(String),
    #[error("{0}")]
    Sink(SinkError),
}

impl From<SinkError> for SourceError {
    fn from(error: SinkError) -> Self {
        match error {
            SinkError::Cancelled => SourceError::Cancelled,
            other => SourceError::Sink(other),
        }
    }
}
