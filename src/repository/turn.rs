//! Whose turn it is to have its size looked at, where only some are looked at before each backup.
//!
//! Remembered for as long as this process lives: to write it down before each backup that finds nothing changed cost four waits for the disk.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

static LAST: LazyLock<Mutex<HashMap<[u8; 16], [u8; 32]>>> = LazyLock::new(Mutex::default);

/// The pack behind which to go on in a repository; anywhere at first, so that no pack waits longer because a daemon is often started.
pub fn behind(repository: &[u8; 16]) -> [u8; 32] {
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    *last.entry(*repository).or_insert_with(|| crate::crypto::random().unwrap_or_default())
}

/// The pack that was looked at last.
pub fn stopped_at(repository: &[u8; 16], pack: [u8; 32]) {
    LAST.lock().unwrap_or_else(PoisonError::into_inner).insert(*repository, pack);
}
