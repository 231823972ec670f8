//! Pages become segments: a page that is as it was keeps its old extent, the others are gathered into new chunks.

use std::collections::HashSet;
use std::path::Path;

use super::pagemap::{ContentHasher, Footer, MapReader, MapWriter, PageHash, hash_page};
use crate::repository::entry::{Content, Texture};
use crate::repository::{ChunkId, EntrySink, Segment, SinkError};
use crate::source::extents::{Cursor, Gatherer};

/// What can be used again.
pub struct Old<'a> {
    pub hashes: &'a mut MapReader,
    pub cursor: Cursor<'a>,
    /// Chunks that are gone, or not to be used any more.
    pub condemned: HashSet<ChunkId>,
}

/// Takes pages in order; gives the content and the new page map.
pub struct Cutter<'a> {
    page_size: u32,
    old: Option<Old<'a>>,
    /// None after it could not be written: then the next capture goes without.
    map: Option<MapWriter>,
    hasher: ContentHasher,
    zeros: PageHash,
    /// Pages of zeros take no space.
    holes: bool,
    gatherer: Gatherer,
    taken: Vec<Segment>,
    page_count: u64,
    stored_pages: u64,
}

pub struct Cut {
    pub content: Content,
    pub page_count: u64,
    pub stored_pages: u64,
    pub map: Option<MapWriter>,
}

impl<'a> Cutter<'a> {
    pub fn new(page_size: u32, old: Option<Old<'a>>, cache_dir: &Path) -> Self {
        Self {
            page_size,
            old,
            map: MapWriter::create(cache_dir, page_size).ok(),
            hasher: ContentHasher::new(page_size),
            zeros: hash_page(&vec![0; page_size as usize]),
            holes: true,
            gatherer: Gatherer::new(Texture::Pages),
            taken: Vec::new(),
            page_count: 0,
            stored_pages: 0,
        }
    }

    /// From now on pages of zeros are stored like others.
    pub fn with_zeros(&mut self) {
        self.holes = false;
    }

    pub fn page(&mut self, page: &[u8], sink: &mut dyn EntrySink) -> Result<(), SinkError> {
        let hash = hash_page(page);
        self.hasher.update(&hash);
        if self.map.as_mut().is_some_and(|map| map.write(&hash).is_err()) {
            self.map = None;
        }
        self.page_count += 1;
        let reusable = self.was(&hash);
        if hash == self.zeros && self.holes {
            self.gatherer.append(Segment::Hole(page.len() as u64));
        } else if reusable {
            for segment in &self.taken {
                self.gatherer.append(*segment);
            }
        } else {
            self.stored_pages += 1;
            self.gatherer.gather(page, sink)?;
        }
        Ok(())
    }

    /// Whether the old content has the same page at this place, in chunks that are to be used; `taken` is then where.
    fn was(&mut self, hash: &PageHash) -> bool {
        let Some(old) = &mut self.old else { return false };
        let before = old.hashes.next_hash();
        if !old.cursor.take(u64::from(self.page_size), &mut self.taken) || before.is_none() {
            // The database was shorter.
            self.old = None;
            return false;
        }
        before.as_ref() == Some(hash)
            && self.taken.iter().all(|segment| match segment {
                Segment::Data(extent) => !old.condemned.contains(&extent.chunk),
                Segment::Hole(_) => true,
            })
    }

    pub fn finish(self, sink: &mut dyn EntrySink) -> Result<Cut, SinkError> {
        let content = Content { hash: self.hasher.finish(), segments: self.gatherer.finish(sink)? };
        Ok(Cut { content, page_count: self.page_count, stored_pages: self.stored_pages, map: self.map })
    }
}

impl Footer {
    /// Whether the content is that of the footer's map.
    pub fn describes(&self, content: &Content, size: u64) -> bool {
        self.content == content.hash
            && self.page_count.checked_mul(u64::from(self.page_size)) == Some(size)
            && content.segments.iter().try_fold(0u64, |sum, segment| sum.checked_add(segment.len())) == Some(size)
    }
}
