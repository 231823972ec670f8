//! The repository, format 1: chunks in sealed packs, an index, manifests.
//!
//! In: entries and chunks of the sources. Out: objects on a storage, and back again. `docs/format.md` is its byte-level
//! description.

pub mod entry;

pub use entry::{ChunkId, Content, Entry, EntrySink, Extent, Kind, Segment, SinkError, Time};
