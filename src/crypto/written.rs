//! The keys of write-only packs that this process made, for as long as it runs: what was just captured can be copied to another destination
//! without the private key. They are of contents that this machine has anyway.

use std::collections::{HashMap, VecDeque};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use zeroize::Zeroizing;

/// Remembered at most; about a terabyte of packs and 8 MiB of memory.
const MAX: usize = 65_536;

#[derive(Default)]
struct Written {
    keys: HashMap<[u8; 32], Zeroizing<[u8; 32]>>,
    order: VecDeque<[u8; 32]>,
}

static WRITTEN: LazyLock<Mutex<Written>> = LazyLock::new(Mutex::default);

fn lock() -> MutexGuard<'static, Written> {
    WRITTEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// By the salt in the pack's header, which no other object has.
pub(super) fn remember(salt: &[u8; 32], key: &[u8; 32]) {
    let mut written = lock();
    if written.order.len() >= MAX
        && let Some(oldest) = written.order.pop_front()
    {
        written.keys.remove(&oldest);
    }
    written.order.push_back(*salt);
    written.keys.insert(*salt, Zeroizing::new(*key));
}

pub(super) fn recall(salt: &[u8; 32]) -> Option<Zeroizing<[u8; 32]>> {
    lock().keys.get(salt).cloned()
}

#[cfg(test)]
pub fn forget_all() {
    *lock() = Written::default();
}
