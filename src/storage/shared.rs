//! What all who use one destination share, run after run: its pace, its places, its counters.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use tokio::sync::Semaphore;

use super::pace::{Pace, Way};
use crate::config::Transfer;

/// Bytes handed on at a time, at the most.
pub const PIECE_BYTES: usize = 256 << 10;

/// One destination's.
#[derive(Debug)]
pub struct Shared {
    pub pace: Pace,
    /// Operations at once; by its number, so that a changed configuration gets another.
    places: Mutex<(usize, Arc<Semaphore>)>,
    sent: AtomicU64,
    received: AtomicU64,
    operations: AtomicU64,
    retries: AtomicU64,
    errors: AtomicU64,
}

/// Since the daemon started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes.
    pub sent: u64,
    /// Bytes.
    pub received: u64,
    pub operations: u64,
    pub retries: u64,
    /// Operations that failed for good.
    pub errors: u64,
}

static ALL: LazyLock<Mutex<HashMap<String, Arc<Shared>>>> = LazyLock::new(Mutex::default);

impl Shared {
    /// That of a place (as [`super::location`] gives it), with the limits as they are now.
    pub fn of(location: &str, transfer: &Transfer) -> Arc<Self> {
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = all.entry(location.to_owned()).or_insert_with(|| {
            Arc::new(Shared {
                pace: Pace::default(),
                places: Mutex::new((0, Arc::new(Semaphore::new(0)))),
                sent: AtomicU64::new(0),
                received: AtomicU64::new(0),
                operations: AtomicU64::new(0),
                retries: AtomicU64::new(0),
                errors: AtomicU64::new(0),
            })
        });
        shared.pace.set(&transfer.bandwidth);
        let mut places = shared.places.lock().unwrap_or_else(PoisonError::into_inner);
        if places.0 != transfer.concurrency {
            *places = (transfer.concurrency, Arc::new(Semaphore::new(transfer.concurrency)));
        }
        drop(places);
        shared.clone()
    }

    /// The counters of a place; nothing when it was not used yet.
    pub fn counters(location: &str) -> Counters {
        let all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(shared) = all.get(location) else { return Counters::default() };
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            sent: read(&shared.sent),
            received: read(&shared.received),
            operations: read(&shared.operations),
            retries: read(&shared.retries),
            errors: read(&shared.errors),
        }
    }

    pub fn places(&self) -> Arc<Semaphore> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    pub fn went(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Waits until the next piece of `left` bytes may go; gives its length.
    pub async fn next_piece(&self, left: usize) -> usize {
        let piece = self.pace.piece(Way::Up, left.min(PIECE_BYTES));
        tokio::time::sleep(self.pace.take(Way::Up, piece)).await;
        piece
    }

    /// Counts bytes that came, and waits until the next may.
    pub async fn came(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
        let wait = self.pace.take(Way::Down, bytes);
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// [`Shared::came`] for threads.
    pub fn came_now(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
        self.pace.wait(Way::Down, bytes);
    }

    pub fn began(&self) {
        self.operations.fetch_add(1, Ordering::Relaxed);
    }

    pub fn retried(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub fn failed(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }
}
