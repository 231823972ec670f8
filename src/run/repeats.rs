//! Contents of small files that a stream needs again: files with the same contents share them in a repository, wherever they stand, and a stream in path order
//! would read a whole chunk once more for each that stands far from the first. They are kept from their first use to their last, as far as there is memory for them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use tokio_util::sync::CancellationToken;

use super::selection::{Selection, is_at_or_below};
use crate::repository::entry::{Extent, SMALL_FILE_BYTES, path_order};
use crate::repository::{Kind, Repository, RepositoryError, Segment, SourceReader};

/// So much is kept at once at most, in bytes.
const KEPT_BYTES: usize = 12 << 20;
/// Among so many small files it is looked which have the same contents (8 bytes each).
const LOOKED_AT: usize = 1 << 20;

/// Which contents a selection needs more than once, and how often.
#[derive(Clone)]
pub struct Repeated(HashMap<u64, u32>);

impl Repeated {
    /// Reads the entries alone.
    pub fn of(repository: &Arc<Repository>, selection: &Selection<'_>, cancel: &CancellationToken) -> Result<Self, RepositoryError> {
        let mut keys = Vec::new();
        for selected in &selection.sources {
            for path in &selected.paths {
                let mut reader = SourceReader::starting_at(repository.clone(), selected.shown.source, path);
                while let Some(paged) = reader.next_paged()? {
                    let entry = &paged.entry;
                    if !is_at_or_below(&entry.path, path) {
                        match path_order(&entry.path, path).is_gt() {
                            true => break,
                            false => continue,
                        }
                    }
                    if let (Kind::File, [Segment::Data(extent)]) = (entry.kind, entry.content.segments.as_slice())
                        && u64::from(extent.len) <= SMALL_FILE_BYTES
                        && keys.len() < LOOKED_AT
                    {
                        keys.push(key(extent));
                    }
                    if cancel.is_cancelled() {
                        return Err(RepositoryError::Cancelled);
                    }
                }
            }
        }
        keys.sort_unstable();
        let uses = keys.chunk_by(|a, b| a == b).filter(|same| same.len() > 1);
        Ok(Self(uses.filter_map(|same| Some((*same.first()?, same.len() as u32))).collect()))
    }
}

/// Ids of chunks are as good as random; two extents with the same key are kept for too long, or not at all.
fn key(extent: &Extent) -> u64 {
    let id = extent.chunk.0.first_chunk().map_or(0, |id| u64::from_le_bytes(*id));
    id.wrapping_add(u64::from(extent.offset).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// What is kept while a stream is planned.
pub struct Repeats {
    /// Uses that are still to come.
    uses: HashMap<u64, u32>,
    kept: HashMap<Extent, Arc<Kept>>,
    held: Arc<AtomicUsize>,
}

/// Contents that are used again. Whoever reads them first puts them here.
pub struct Kept {
    bytes: OnceLock<Vec<u8>>,
    len: usize,
    held: Arc<AtomicUsize>,
}

/// The next use of contents.
pub enum Use {
    /// Nothing else needs them, or there is no memory to keep them.
    Once,
    /// They are to be put here.
    First(Arc<Kept>),
    /// They will be here.
    Again(Arc<Kept>),
}

impl Repeats {
    pub fn new(repeated: Repeated) -> Self {
        Self { uses: repeated.0, kept: HashMap::new(), held: Arc::default() }
    }

    /// To be called for each use, in their order.
    pub fn next(&mut self, extent: &Extent) -> Use {
        let Some(uses) = self.uses.get_mut(&key(extent)) else { return Use::Once };
        *uses -= 1;
        let is_last = *uses == 0;
        if is_last {
            self.uses.remove(&key(extent));
        }
        let kept = if is_last { self.kept.remove(extent) } else { self.kept.get(extent).cloned() };
        if let Some(kept) = kept {
            return Use::Again(kept);
        }
        let len = extent.len as usize;
        if is_last || self.held.load(Ordering::Relaxed) + len > KEPT_BYTES {
            return Use::Once;
        }
        self.held.fetch_add(len, Ordering::Relaxed);
        let kept = Arc::new(Kept { bytes: OnceLock::new(), len, held: self.held.clone() });
        self.kept.insert(*extent, kept.clone());
        Use::First(kept)
    }

    /// A use that is passed over.
    pub fn pass(&mut self, extent: &Extent) {
        if let Some(uses) = self.uses.get_mut(&key(extent)) {
            *uses -= 1;
            if *uses == 0 {
                self.uses.remove(&key(extent));
                self.kept.remove(extent);
            }
        }
    }
}

impl Kept {
    pub fn put(&self, bytes: &[u8]) {
        self.bytes.get_or_init(|| bytes.to_vec());
    }

    pub fn get(&self) -> Option<&[u8]> {
        self.bytes.get().map(Vec::as_slice)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.held.fetch_sub(self.len, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::ChunkId;

    fn extent(chunk: u8, offset: u32, len: u32) -> Extent {
        Extent { chunk: ChunkId([chunk; 32]), offset, len }
    }

    fn repeats(uses: &[(Extent, u32)]) -> Repeats {
        Repeats::new(Repeated(uses.iter().map(|(extent, uses)| (key(extent), *uses)).collect()))
    }

    #[test]
    fn contents_are_kept_from_the_first_use_to_the_last() {
        let (often, other) = (extent(1, 10, 3), extent(1, 13, 3));
        let mut repeats = repeats(&[(often, 3)]);
        let Use::First(first) = repeats.next(&often) else { panic!() };
        first.put(b"abc");
        assert!(matches!(repeats.next(&other), Use::Once));
        for _ in 0..2 {
            let Use::Again(again) = repeats.next(&often) else { panic!() };
            assert_eq!(again.get(), Some(&b"abc"[..]));
        }
        assert!(repeats.kept.is_empty() && repeats.uses.is_empty());
        drop(first);
        assert_eq!(repeats.held.load(Ordering::Relaxed), 0);
        assert!(matches!(repeats.next(&often), Use::Once));
    }

    #[test]
    fn no_more_is_kept_than_there_is_memory_for() {
        let (long, short) = (extent(1, 0, KEPT_BYTES as u32), extent(2, 0, 1));
        let mut repeats = repeats(&[(long, 2), (short, 3)]);
        let Use::First(kept) = repeats.next(&long) else { panic!() };
        assert!(matches!(repeats.next(&short), Use::Once));
        assert!(matches!(repeats.next(&long), Use::Again(_)));
        drop(kept);
        assert!(matches!(repeats.next(&short), Use::First(_)), "room came");
        repeats.pass(&short);
        assert!(repeats.kept.is_empty(), "nothing needs it any more");
    }
}
