//! The lease: one daemon writes to a repository at a time.
//!
//! `writer.json` names the holder and a counter that the holder raises while it works. No clocks need agree: whoever finds
//! a lease watches it on its own monotonic clock, and only when the counter stood still for the whole term is the holder
//! taken for dead. A holder's own leftover (same instance, after a crash) is taken over at once. Safety does not rest on
//! the lease (packs and manifests are never overwritten); it keeps two daemons from working against each other.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::error::{RepositoryError, Result};
use super::open::Repository;
use crate::storage::StorageError;

const NAME: &str = "writer.json";
const MAX_BYTES: u64 = 16 << 10;

/// Who writes, for messages and to know one's own leftovers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Random, kept in the state directory: a cloned machine with a cloned state directory is told apart by `host`.
    pub instance: String,
    pub host: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    format: u32,
    #[serde(flatten)]
    holder: Holder,
    pid: u32,
    run: String,
    /// Raised at every renewal.
    counter: u64,
    /// Renewed at least this often; after so long without a change the holder counts as dead.
    term_seconds: u64,
    written: String,
}

/// How long a lease lives without renewal.
pub const TERM: Duration = Duration::from_secs(60);

/// A held lease; renewed by a thread, removed on drop.
pub struct Lease {
    repository: Arc<Repository>,
    stop: Arc<(Mutex<bool>, Condvar)>,
    lost: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Lease {
    /// Takes the lease, waiting up to `term` for a holder that may be dead.
    pub fn acquire(repository: &Arc<Repository>, holder: &Holder, run: &str, term: Duration, cancel: &CancellationToken) -> Result<Self> {
        let mut record = Record {
            format: 1,
            holder: holder.clone(),
            pid: std::process::id(),
            run: run.to_owned(),
            counter: 0,
            term_seconds: term.as_secs(),
            written: jiff::Timestamp::now().to_string(),
        };
        let mut seen: Option<(Record, Instant)> = None;
        loop {
            match repository.storage.put_new(NAME, encode(&record)?) {
                Ok(()) => break,
                Err(StorageError::Exists { .. }) => {}
                Err(e) => return Err(e.into()),
            }
            let found = match read(repository)? {
                None => continue,
                Some(found) => found,
            };
            if found.holder == record.holder {
                record.counter = found.counter + 1;
                repository.storage.put(NAME, encode(&record)?)?;
                break;
            }
            match &seen {
                Some((before, since)) if *before == found => {
                    let term = Duration::from_secs(found.term_seconds.clamp(1, 3600));
                    if since.elapsed() >= term {
                        record.counter = found.counter + 1;
                        repository.storage.put(NAME, encode(&record)?)?;
                        break;
                    }
                }
                Some(_) => {
                    return Err(RepositoryError::Held {
                        location: repository.location().to_owned(),
                        text: format!(
                            "another keepd ({}, instance {}, process {}) is writing here; one repository has one writer",
                            found.holder.host, found.holder.instance, found.pid
                        ),
                    });
                }
                None => seen = Some((found, Instant::now())),
            }
            if cancel.is_cancelled() {
                return Err(RepositoryError::Cancelled);
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        Ok(Self::keep(repository.clone(), record, term))
    }

    fn keep(repository: Arc<Repository>, mut record: Record, term: Duration) -> Self {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let lost = Arc::new(AtomicBool::new(false));
        let (stop2, lost2, repository2) = (stop.clone(), lost.clone(), repository.clone());
        let thread = std::thread::Builder::new().name("lease".into()).spawn(move || {
            let mut renewed = Instant::now();
            loop {
                let guard = stop2.0.lock().unwrap_or_else(PoisonError::into_inner);
                let (guard, _) = stop2.1.wait_timeout_while(guard, term / 4, |stop| !*stop).unwrap_or_else(PoisonError::into_inner);
                if *guard {
                    return;
                }
                drop(guard);
                let ours = |r: &Record| r.holder == record.holder && r.pid == record.pid;
                let still_ours = matches!(read(&repository2), Ok(Some(found)) if ours(&found));
                record.counter += 1;
                record.written = jiff::Timestamp::now().to_string();
                let renewal = encode(&record).and_then(|bytes| Ok(repository2.storage.put(NAME, bytes)?));
                if still_ours && renewal.is_ok() {
                    renewed = Instant::now();
                } else if !still_ours || renewed.elapsed() > term {
                    // Somebody may have taken over by now: whoever holds this must stop before it commits.
                    lost2.store(true, Ordering::Release);
                }
            }
        });
        Self { repository, stop, lost, thread: thread.ok() }
    }

    /// An error once the lease could not be renewed for its whole term or somebody took it over.
    pub fn check(&self) -> Result<()> {
        if !self.lost.load(Ordering::Acquire) && self.thread.is_some() {
            return Ok(());
        }
        Err(RepositoryError::Held {
            location: self.repository.location().to_owned(),
            text: "the lease on the repository was lost while writing (the storage did not answer in time, or another keepd took over)"
                .into(),
        })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        *self.stop.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.1.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if !self.lost.load(Ordering::Acquire) {
            // Left behind it would only make another daemon wait for the term.
            let _ = self.repository.storage.delete(NAME);
        }
    }
}

fn encode(record: &Record) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(record).map_err(|e| RepositoryError::Other(e.to_string()))
}

/// The lease as it stands; one that does not parse is treated as a stranger's.
fn read(repository: &Repository) -> Result<Option<Record>> {
    let bytes = match repository.storage.get(NAME, MAX_BYTES) {
        Ok(bytes) => bytes,
        Err(StorageError::NotFound { .. }) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    Ok(Some(serde_json::from_slice(&bytes).unwrap_or_else(|_| Record {
        format: 0,
        holder: Holder { instance: "unknown".into(), host: "unknown".into() },
        pid: 0,
        run: String::new(),
        counter: 0,
        term_seconds: TERM.as_secs(),
        written: String::new(),
    })))
}
