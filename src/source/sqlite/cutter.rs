//! Pages become segments: a page that is as it was keeps its old extent, the others are gathered into new chunks.

use std::collections::HashSet;
use std::path::Path;

use super::pagemap::{ContentHasher, Footer, MapReader, MapWriter, PageHash, hash_page};
use super::previous::Cursor;
use crate::repository::entry::{Content, GATHER_BYTES, Texture};
use crate::repository::{ChunkId, EntrySink, Extent, Segment, SinkError};

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
    segments: Vec<Segment>,
    /// The chunk being gathered, and the segments that lie in it.
    chunk: Vec<u8>,
    in_chunk: Vec<usize>,
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
            segments: Vec::new(),
            chunk: Vec::new(),
            in_chunk: Vec::new(),
            taken: Vec::new(),
            page_count: 0,
            stored_pages: 0,
        }
    }

    pub fn page(&mut self, page: &[u8], sink: &mut dyn EntrySink) -> Result<(), SinkError> {
        let hash = hash_page(page);
        self.hasher.update(&hash);
        if self.map.as_mut().is_some_and(|map| map.write(&hash).is_err()) {
            self.map = None;
        }
        self.page_count += 1;
        let reusable = self.was(&hash);
        if hash == self.zeros {
            self.append(Segment::Hole(page.len() as u64));
        } else if reusable {
            for i in 0..self.taken.len() {
                self.append(self.taken[i]);
            }
        } else {
            self.gather(page, sink)?;
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

    fn gather(&mut self, page: &[u8], sink: &mut dyn EntrySink) -> Result<(), SinkError> {
        if self.chunk.len() + page.len() > GATHER_BYTES {
            self.store(sink)?;
        }
        let chunk = ChunkId([0; 32]); // its name is known when it is full
        let offset = u32::try_from(self.chunk.len()).unwrap_or(u32::MAX);
        self.chunk.extend_from_slice(page);
        self.stored_pages += 1;
        let extent = Extent { chunk, offset, len: self.page_size };
        let last = self.segments.len().checked_sub(1);
        let follows = last.is_some() && self.in_chunk.last().copied() == last;
        if !(follows && self.grow_last(extent)) {
            self.in_chunk.push(self.segments.len());
            self.segments.push(Segment::Data(extent));
        }
        Ok(())
    }

    fn append(&mut self, segment: Segment) {
        let grown = match segment {
            Segment::Data(extent) => self.grow_last(extent),
            Segment::Hole(len) => match self.segments.last_mut() {
                Some(Segment::Hole(before)) => {
                    *before += len;
                    true
                }
                _ => false,
            },
        };
        if !grown {
            self.segments.push(segment);
        }
    }

    /// Makes the last segment longer when the extent goes on where it ends.
    fn grow_last(&mut self, extent: Extent) -> bool {
        if let Some(Segment::Data(last)) = self.segments.last_mut()
            && last.chunk == extent.chunk
            && last.offset.checked_add(last.len) == Some(extent.offset)
            && let Some(len) = last.len.checked_add(extent.len)
        {
            last.len = len;
            return true;
        }
        false
    }

    fn store(&mut self, sink: &mut dyn EntrySink) -> Result<(), SinkError> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let id = sink.store(&self.chunk, Texture::Pages)?;
        self.chunk.clear();
        for at in self.in_chunk.drain(..) {
            if let Some(Segment::Data(extent)) = self.segments.get_mut(at) {
                extent.chunk = id;
            }
        }
        Ok(())
    }

    pub fn finish(mut self, sink: &mut dyn EntrySink) -> Result<Cut, SinkError> {
        self.store(sink)?;
        let content = Content { hash: self.hasher.finish(), segments: self.segments };
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
