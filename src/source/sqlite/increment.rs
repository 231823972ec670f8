//! From pages to extents: unchanged pages keep theirs, changed ones are gathered into new chunks in page order.
//!
//! A chunk of which little is used any more costs a restore as much as a full one. When the chunks that a database refers
//! to hold more than twice its size, the pages in the emptiest of them are stored anew until it is 1.5 times.

use std::collections::{HashMap, HashSet};

use super::page_map::{PageHash, PageMap, PageMapWriter, hash_page};
use super::signature::Signature;
use crate::repository::entry::GATHER_BYTES;
use crate::repository::{ChunkId, Content, Entry, EntrySink, Extent, Segment};
use crate::source::{Context, Facts, SourceError};

/// Restores read at most about this many times the database's size.
const MAX_FACTOR: u64 = 2;
/// Small databases are not worth the trouble.
const SLACK: u64 = 8 << 20;
const HASHES: usize = 1024;

/// Whether every chunk of an entry is in the repository.
pub fn is_whole(entry: &Entry, sink: &mut dyn EntrySink) -> Result<bool, SourceError> {
    let mut seen = HashSet::new();
    for segment in &entry.content.segments {
        if let Segment::Data(extent) = segment
            && seen.insert(extent.chunk)
            && sink.chunk_len(&extent.chunk)?.is_none()
        {
            return Ok(false);
        }
    }
    Ok(true)
}

pub struct Increment<'a> {
    sink: &'a mut dyn EntrySink,
    context: &'a Context<'a>,
    page_size: usize,
    page_count: u64,
    next: u64,
    old: Option<Old>,
    writer: PageMapWriter,
    hashes: Vec<PageHash>,
    content: blake3::Hasher,
    segments: Vec<Segment>,
    /// Changed pages, and the segments that wait for their chunk's id.
    gathered: Vec<u8>,
    waiting: Vec<usize>,
    changed: u64,
}

/// The last capture, page by page.
struct Old {
    map: PageMap,
    pages: u64,
    segments: std::vec::IntoIter<Segment>,
    current: Option<Extent>,
    /// Pages in these are stored anew: the chunks are gone, or nearly empty.
    renew: HashSet<ChunkId>,
}

/// Stands for the chunk that is being gathered.
const OPEN: ChunkId = ChunkId([0; 32]);

impl<'a> Increment<'a> {
    pub fn new(
        page_size: usize,
        page_count: u64,
        before: Option<Entry>,
        map: Option<PageMap>,
        sink: &'a mut dyn EntrySink,
        context: &'a Context<'a>,
    ) -> Result<Self, SourceError> {
        let io = |e: std::io::Error| SourceError::Failed(format!("the page map in {} cannot be written: {e}", context.cache_dir.display()));
        let old = match before {
            None => None,
            Some(before) => {
                let fits = |map: &PageMap| map.page_size == page_size;
                let map = match map {
                    Some(map) => Some(map).filter(fits),
                    None => rebuild(&before, page_size, sink, context)?.filter(fits),
                };
                match map {
                    None => None,
                    Some(map) => Some(Old::new(map, before, page_count * page_size as u64, sink)?),
                }
            }
        };
        let mut content = blake3::Hasher::new_derive_key("keepd sqlite content 1");
        content.update(&(page_size as u64).to_le_bytes());
        Ok(Self {
            sink,
            context,
            page_size,
            page_count,
            next: 1,
            old,
            writer: PageMapWriter::new(context.cache_dir).map_err(io)?,
            hashes: Vec::with_capacity(HASHES),
            content,
            segments: Vec::new(),
            gathered: Vec::new(),
            waiting: Vec::new(),
            changed: 0,
        })
    }

    /// The next page; numbers begin at 1. A number left out (the page that holds locks) is zeros.
    pub fn page(&mut self, number: u64, data: &[u8]) -> Result<(), SourceError> {
        if data.len() != self.page_size || number < self.next || number > self.page_count {
            return Err(SourceError::Failed(format!(
                "page {number} of {} bytes came where page {} of {} was expected",
                data.len(),
                self.next,
                self.page_size
            )));
        }
        while self.next < number {
            let zeros = vec![0u8; self.page_size];
            self.add(&zeros)?;
        }
        self.add(data)
    }

    fn add(&mut self, data: &[u8]) -> Result<(), SourceError> {
        let hash = hash_page(data);
        let kept = match &mut self.old {
            Some(old) => old.next_page(self.page_size, &hash)?,
            None => None,
        };
        match kept {
            Some(extent) => self.extend(extent),
            None => {
                self.changed += 1;
                let extent = Extent { chunk: OPEN, offset: self.gathered.len() as u32, len: data.len() as u32 };
                if self.gathered.is_empty() {
                    self.gathered.reserve(GATHER_BYTES);
                }
                self.gathered.extend_from_slice(data);
                self.extend(extent);
                if self.gathered.len() + self.page_size > GATHER_BYTES {
                    self.cut()?;
                }
            }
        }
        self.hashes.push(hash);
        self.next += 1;
        if self.hashes.len() == HASHES {
            self.flush_hashes()?;
        }
        Ok(())
    }

    fn flush_hashes(&mut self) -> Result<(), SourceError> {
        if self.context.cancel.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        self.content.update(self.hashes.as_flattened());
        self.context.report.bytes(self.hashes.len() as u64 * self.page_size as u64);
        let written = self.writer.push(&self.hashes);
        self.hashes.clear();
        written.map_err(|e| SourceError::Failed(format!("the page map in {} cannot be written: {e}", self.context.cache_dir.display())))
    }

    /// Lengthens the last segment where the page follows it in the same chunk.
    fn extend(&mut self, extent: Extent) {
        if let Some(Segment::Data(last)) = self.segments.last_mut()
            && last.chunk == extent.chunk
            && last.offset + last.len == extent.offset
        {
            last.len += extent.len;
            return;
        }
        if extent.chunk == OPEN {
            self.waiting.push(self.segments.len());
        }
        self.segments.push(Segment::Data(extent));
    }

    fn cut(&mut self) -> Result<(), SourceError> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let id = self.sink.store(std::mem::take(&mut self.gathered))?;
        for at in self.waiting.drain(..) {
            if let Some(Segment::Data(extent)) = self.segments.get_mut(at) {
                extent.chunk = id;
            }
        }
        Ok(())
    }

    /// Pushes the entry, then writes the map that the next capture builds upon.
    pub fn finish(mut self, entry: Entry, signature: Option<Signature>, mut facts: Facts) -> Result<Facts, SourceError> {
        while self.next <= self.page_count {
            let zeros = vec![0u8; self.page_size];
            self.add(&zeros)?;
        }
        self.cut()?;
        self.flush_hashes()?;
        let hash: [u8; 16] = self.content.finalize().as_bytes().first_chunk().copied().unwrap_or_default();
        let size = self.page_count * self.page_size as u64;
        self.context.report.entry();
        self.sink.push(Entry { size, content: Content { hash, segments: self.segments }, ..entry })?;
        facts.insert("changed_pages".into(), self.changed.into());
        let written = self.writer.finish(self.page_size, self.page_count, &hash, signature, facts.clone());
        if let Err(e) = written {
            // Only a cache: the next capture makes it again from the repository.
            tracing::warn!("the page map in {} cannot be written: {e}", self.context.cache_dir.display());
        }
        Ok(facts)
    }
}

impl Old {
    fn new(map: PageMap, before: Entry, size: u64, sink: &mut dyn EntrySink) -> Result<Self, SourceError> {
        let mut live: HashMap<ChunkId, u64> = HashMap::new();
        for segment in &before.content.segments {
            if let Segment::Data(extent) = segment {
                *live.entry(extent.chunk).or_default() += u64::from(extent.len);
            }
        }
        let mut renew = HashSet::new();
        let (mut total, mut shares) = (0u64, Vec::with_capacity(live.len()));
        for (chunk, used) in live {
            match sink.chunk_len(&chunk)? {
                None => drop(renew.insert(chunk)),
                Some(len) => {
                    total += u64::from(len);
                    shares.push((used, u64::from(len), chunk));
                }
            }
        }
        if total > MAX_FACTOR * size + SLACK {
            shares.sort_by(|a, b| (a.0 * b.1).cmp(&(b.0 * a.1)).then(a.2.cmp(&b.2)));
            for (used, len, chunk) in shares {
                if total <= size + size / 2 {
                    break;
                }
                total = total - len + used;
                renew.insert(chunk);
            }
        }
        let pages = map.page_count;
        Ok(Self { map, pages, segments: before.content.segments.into_iter(), current: None, renew })
    }

    /// Where the next page of the last capture lies, if it is the same page and may stay there.
    fn next_page(&mut self, page_size: usize, hash: &PageHash) -> Result<Option<Extent>, SourceError> {
        if self.pages == 0 {
            return Ok(None);
        }
        self.pages -= 1;
        let old_hash = self.map.next_hash().map_err(|e| SourceError::Failed(format!("the page map cannot be read: {e}")))?;
        while self.current.is_none_or(|c| c.len == 0) {
            match self.segments.next() {
                Some(Segment::Data(extent)) => self.current = Some(extent),
                // Maps are only made for contents without holes.
                _ => {
                    self.pages = 0;
                    return Ok(None);
                }
            }
        }
        let Some(current) = self.current.as_mut().filter(|c| c.len as usize >= page_size) else {
            self.pages = 0;
            return Ok(None);
        };
        let extent = Extent { len: page_size as u32, ..*current };
        current.offset += page_size as u32;
        current.len -= page_size as u32;
        Ok((old_hash == *hash && !self.renew.contains(&extent.chunk)).then_some(extent))
    }
}

/// Makes the map of the last backup again from its contents in the repository.
fn rebuild(before: &Entry, page_size: usize, sink: &mut dyn EntrySink, context: &Context<'_>) -> Result<Option<PageMap>, SourceError> {
    let divides = |n: u64| n.is_multiple_of(page_size as u64);
    let fits = divides(before.size)
        && before
            .content
            .segments
            .iter()
            .all(|s| matches!(s, Segment::Data(x) if divides(u64::from(x.len)) && divides(u64::from(x.offset))));
    if !fits || before.size == 0 || !is_whole(before, sink)? {
        return Ok(None);
    }
    let io = |e: std::io::Error| SourceError::Failed(format!("the page map in {} cannot be written: {e}", context.cache_dir.display()));
    let mut writer = PageMapWriter::new(context.cache_dir).map_err(io)?;
    // A few chunks are kept, for fragmented contents come back to them.
    let mut kept: Vec<(ChunkId, Vec<u8>)> = Vec::new();
    for segment in &before.content.segments {
        if context.cancel.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        let Segment::Data(extent) = segment else { continue };
        if !kept.iter().any(|(id, _)| *id == extent.chunk) {
            if kept.len() >= 16 {
                kept.remove(0);
            }
            kept.push((extent.chunk, sink.fetch(&extent.chunk)?));
        }
        let bytes = kept
            .iter()
            .find(|(id, _)| *id == extent.chunk)
            .and_then(|(_, b)| b.get(extent.offset as usize..(extent.offset + extent.len) as usize));
        let Some(bytes) = bytes else { return Ok(None) };
        let hashes: Vec<PageHash> = bytes.chunks_exact(page_size).map(hash_page).collect();
        writer.push(&hashes).map_err(io)?;
    }
    let count = before.size / page_size as u64;
    writer.finish(page_size, count, &before.content.hash, None, Facts::new()).map_err(io)?;
    Ok(PageMap::load(context.cache_dir, Some(before)))
}
