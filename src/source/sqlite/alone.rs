//! One capture of a file at a time in this process, and a look at whether its locks are still held.
//!
//! POSIX locks belong to the process: when any part of it closes a descriptor of a file, all its locks on that file are
//! gone, silently. SQLite knows that of its own connections; of a `files` source that reads the database or its `-shm` it does not, and
//! another program that closes the database would then checkpoint over what is being read.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::source::SourceError;

type FileId = (u64, u64);

static CAPTURED: Mutex<BTreeSet<FileId>> = Mutex::new(BTreeSet::new());
static ENDED: Condvar = Condvar::new();

/// While it lives no other capture in this process has the same file.
pub struct Alone(FileId);

impl Alone {
    pub fn with(stat: &Metadata, cancel: &CancellationToken) -> Result<Self, SourceError> {
        let id = (stat.dev(), stat.ino());
        let mut captured = CAPTURED.lock().unwrap_or_else(PoisonError::into_inner);
        while !captured.insert(id) {
            if cancel.is_cancelled() {
                return Err(SourceError::Cancelled);
            }
            captured = ENDED.wait_timeout(captured, Duration::from_millis(100)).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(Self(id))
    }
}

impl Alone {
    /// None while a capture has the file, by its device and inode.
    pub fn now(id: (u64, u64)) -> Option<Self> {
        let is_free = CAPTURED.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
        // Lazily: one that is made and dropped here would free what somebody else has.
        is_free.then(|| Self(id))
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        CAPTURED.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
        ENDED.notify_all();
    }
}

/// Whether this process has a POSIX lock on the file; None when the kernel does not show.
pub fn holds_lock(inode: u64) -> Option<bool> {
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let pid = std::process::id().to_string();
    // 1: POSIX  ADVISORY  READ 1234 fe:00:131077 123 123
    Some(locks.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next() == Some("POSIX")
            && fields.nth(2) == Some(&pid)
            && fields.next().and_then(|file| file.rsplit(':').next()).and_then(|n| n.parse().ok()) == Some(inode)
    }))
}
