//! The repository, format 1: chunks in sealed packs, an index, manifests.
//!
//! In: entries and chunks of the sources. Out: objects on a storage, and back again. `docs/format.md` is its byte-level
//! description.

pub mod check;
pub mod chunker;
mod closed;
#[cfg(test)]
mod compared;
pub mod condemned;
pub mod copy;
mod count;
#[cfg(test)]
mod damaged_cache;
pub mod entry;
pub mod error;
pub mod fetch;
pub mod index;
pub mod lease;
pub mod local;
pub mod manifest;
pub mod mark;
mod needed;
pub mod open;
pub mod pack;
pub mod page;
pub mod payload;
pub mod prune;
pub mod reader;
pub mod reencrypt;
mod runs;
pub mod same;
pub mod slots;
pub mod source_writer;
pub mod spool;
#[cfg(test)]
pub(crate) mod test_world;
mod turn;
#[cfg(test)]
mod two_writers;
pub mod writer;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use entry::{ChunkId, Content, Entry, EntrySink, Extent, Kind, Segment, SinkError, Time};
pub use error::RepositoryError;
pub use manifest::{Manifest, ManifestSource};
pub use mark::Mark;
pub use open::{OpenOptions, Repository};
pub use reader::SourceReader;

/// What a thread that panicked left is looked at all the same: its error is told by whoever waits for it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
