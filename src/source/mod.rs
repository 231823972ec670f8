//! Sources: what on this machine is captured, as entries into the repository.

pub mod ask;
pub mod command;
mod dump;
mod extents;
pub mod files;
pub mod load;
pub mod mysql;
pub mod postgres;
pub mod sqlite;
pub mod survey;
pub mod way;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use keepd_protocol::model::Level;
use tokio_util::sync::CancellationToken;

use crate::repository::entry::path_order;
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

/// The last backup's entries, moved along with what is captured.
pub struct Merge<'a> {
    previous: &'a mut dyn Previous,
    next: Option<Entry>,
    ended: bool,
}

impl<'a> Merge<'a> {
    pub fn new(previous: &'a mut dyn Previous) -> Self {
        Self { previous, next: None, ended: false }
    }

    /// Whether anything is left.
    pub fn has_more(&mut self) -> Result<bool, SourceError> {
        if self.next.is_none() && !self.ended {
            self.next = self.previous.next_entry()?;
            self.ended = self.next.is_none();
        }
        Ok(self.next.is_some())
    }

    /// The next entry before a path (any, without one), if there is one.
    pub fn before(&mut self, path: Option<&[u8]>) -> Result<Option<Entry>, SourceError> {
        self.has_more()?;
        let is_before = |next: &Entry| path.is_none_or(|path| path_order(&next.path, path).is_lt());
        Ok(self.next.take_if(|next| is_before(next)))
    }

    /// The last backup's entry of this path. Paths must be asked for in path order.
    pub fn at(&mut self, path: &[u8]) -> Result<Option<Entry>, SourceError> {
        loop {
            self.has_more()?;
            let Some(next) = &self.next else { return Ok(None) };
            match path_order(&next.path, path) {
                std::cmp::Ordering::Less => self.next = None,
                std::cmp::Ordering::Equal => return Ok(self.next.take()),
                std::cmp::Ordering::Greater => return Ok(None),
            }
        }
    }
}

/// Progress and messages of a run's capture, shared with who shows them.
#[derive(Debug, Default)]
pub struct Report {
    pub entries: AtomicU64,
    pub bytes: AtomicU64,
    left_out: AtomicU64,
    muted: AtomicBool,
    messages: Mutex<Vec<(Level, String)>>,
}

impl Report {
    pub fn entry(&self) {
        self.entries.fetch_add(1, Ordering::Relaxed);
    }

    pub fn bytes(&self, n: u64) {
        self.bytes.fetch_add(n, Ordering::Relaxed);
    }

    /// Counts from the beginning again, for the next part of a run.
    pub fn restart(&self) {
        self.entries.store(0, Ordering::Relaxed);
        self.bytes.store(0, Ordering::Relaxed);
    }

    /// Says nothing of what is found (a second pass will find it again), or says it again.
    pub fn mute(&self, muted: bool) {
        self.muted.store(muted, Ordering::Relaxed);
    }

    /// Something that is in the configuration but not in the backup: the run ends partly done.
    pub fn left_out(&self, text: String) {
        if self.muted.load(Ordering::Relaxed) {
            return;
        }
        self.left_out.fetch_add(1, Ordering::Relaxed);
        self.message(Level::Warning, text);
    }

    pub fn message(&self, level: Level, text: String) {
        if self.muted.load(Ordering::Relaxed) {
            return;
        }
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

    /// Adds what another one says, but for its bytes.
    pub fn take_over(&self, other: &Report) {
        self.left_out.fetch_add(other.left_out_count(), Ordering::Relaxed);
        for (level, text) in other.take_messages() {
            self.message(level, text);
        }
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
