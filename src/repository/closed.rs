//! Write-only packs: which private keys contents take that are to be read.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::entry::ChunkId;
use super::error::{RepositoryError, Result};
use super::open::Repository;
use crate::crypto::{CryptoError, Fingerprint, Lent, ObjectKind};

/// When so many packs do not open, it is known well enough which keys are wanted.
const ENOUGH: usize = 256;
/// Most of them wait for the storage.
const THREADS: usize = 8;

impl Repository {
    /// Takes private keys for as long as this repository is open.
    pub fn lend(&self, lent: &Lent) {
        lent.keys().iter().for_each(|key| self.keys.lend(key.clone()));
    }

    /// Whether the local index knows of any write-only pack.
    pub fn has_write_only(&self) -> Result<bool> {
        self.local.has_write_only()
    }

    /// The write-only packs among those that chunks lie in.
    pub fn write_only_packs(&self, chunks: &[ChunkId]) -> Result<HashSet<[u8; 32]>> {
        self.local.write_only_packs(chunks)
    }

    /// The private keys that some of these packs want and that were not lent; none when all of them open. What else may be wrong with a pack is
    /// told when it is read.
    pub fn keys_wanted(&self, packs: &[[u8; 32]]) -> BTreeSet<Fingerprint> {
        let (next, closed) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let wanted = Mutex::new(BTreeSet::new());
        std::thread::scope(|scope| {
            for _ in 0..THREADS.min(packs.len()) {
                scope.spawn(|| {
                    while let Some(pack) = packs.get(next.fetch_add(1, Ordering::Relaxed)) {
                        match self.pack_cipher(pack, ObjectKind::DataPack) {
                            Err(RepositoryError::Object { source: CryptoError::NeedsPrivateKey(key), .. }) => {
                                wanted.lock().unwrap_or_else(PoisonError::into_inner).insert(key);
                                if closed.fetch_add(1, Ordering::Relaxed) >= ENOUGH {
                                    return;
                                }
                            }
                            // It would not answer for the others either.
                            Err(RepositoryError::Storage(_)) => next.store(packs.len(), Ordering::Relaxed),
                            _ => {}
                        }
                    }
                });
            }
        });
        wanted.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}
