//! One source's way into the repository: gathers small files into shared chunks, cuts large ones, writes pages of entries.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::Path;

use minicbor::bytes::ByteArray;

use super::chunker::Chunker;
use super::entry::{ChunkId, Content, Entry, EntrySink, Extent, GATHER_BYTES, Kind, SMALL_FILE_BYTES, Segment, SinkError, path_order};
use super::error::{RepositoryError, Result};
use super::manifest::{ManifestSource, PageRef};
use super::page::{BuiltPage, PageBuilder, PagedEntry, lists_of};
use super::payload::Texture;
use super::reader::{SourceReader, chunks_of};
use super::spool::{SpoolReader, SpoolWriter};
use super::writer::Writer;
use crate::crypto::ObjectKind;

/// Contents of small files that are remembered to find moved and doubled ones (about 60 bytes each).
const MAX_KNOWN_CONTENTS: usize = 1 << 20;
/// Entries that wait for the chunk being gathered (about 300 bytes each); more, and it is cut early.
const MAX_WAITING: usize = 50_000;

/// Takes one source's entries.
pub struct SourceWriter<'w> {
    writer: &'w mut Writer,
    pages: PageBuilder,
    done: ManifestSource,
    last_path: Option<Vec<u8>>,
    /// Entries behind the chunk that is being gathered, in order.
    waiting: VecDeque<Waiting>,
    gathered: Vec<u8>,
    /// Bytes of `gathered` that belong to entries; what is behind them was appended for one that has not come.
    settled: usize,
    known: KnownContents,
    chunker: Chunker,
    large: Large,
    users: HashSet<u32>,
    groups: HashSet<u32>,
    /// In a first pass entries go there instead of into pages.
    spool: Option<SpoolWriter>,
    /// The entries need not come in path order; only in a first pass.
    any_order: bool,
    /// Is told each path.
    watch: Option<Watch<'w>>,
}

/// Is told the path and the kind of each entry.
pub type Watch<'w> = Box<dyn FnMut(&[u8], Kind) -> Result<()> + 'w>;

struct Waiting {
    entry: Entry,
    /// Where its contents are, if they lie in gathered chunks.
    place: Option<Place>,
}

/// An extent whose chunk may not have its id yet.
#[derive(Clone, Copy)]
struct Place {
    chunk: u32,
    offset: u32,
    len: u32,
}

/// Contents of small files by their hash: of the last backup, and of this one so far.
#[derive(Default)]
struct KnownContents {
    by_hash: HashMap<[u8; 16], Place>,
    /// None for the chunk that is being gathered.
    chunks: Vec<Option<ChunkId>>,
    /// The last backup's entries, not read yet.
    previous: Option<SourceReader>,
}

#[derive(Default)]
struct Large {
    segments: Vec<Segment>,
    size: u64,
}

/// What a source became, and whose files it held.
pub struct WrittenSource {
    pub source: ManifestSource,
    pub users: HashSet<u32>,
    pub groups: HashSet<u32>,
}

impl<'w> SourceWriter<'w> {
    /// `previous` reads the entries of the last backup again, for moved files.
    pub fn new(writer: &'w mut Writer, name: &str, kind: &str, path: &[u8], previous: Option<SourceReader>) -> Self {
        let gear = writer.repository().keys.gear();
        Self {
            writer,
            pages: PageBuilder::default(),
            done: ManifestSource {
                name: name.to_owned(),
                kind: kind.to_owned(),
                path: path.to_vec(),
                pages: Vec::new(),
                entries: 0,
                files: 0,
                directories: 0,
                bytes: 0,
                facts: String::new(),
            },
            last_path: None,
            waiting: VecDeque::new(),
            gathered: Vec::new(),
            settled: 0,
            known: KnownContents { previous, ..KnownContents::default() },
            chunker: Chunker::new(gear),
            large: Large::default(),
            users: HashSet::new(),
            groups: HashSet::new(),
            spool: None,
            any_order: false,
            watch: None,
        }
    }

    /// Only stores contents; the entries are kept in a file without a name in `directory`, for a second pass.
    pub fn into_first_pass(mut self, directory: &Path) -> Result<Self> {
        self.spool = Some(SpoolWriter::create(directory)?);
        Ok(self)
    }

    /// Takes the entries of a first pass in any order, and gives them back so. Whoever pushes them in the second pass has sorted them.
    pub fn in_any_order(mut self) -> Self {
        self.any_order = self.spool.is_some();
        self
    }

    /// Tells each entry.
    pub fn watched(mut self, watch: Watch<'w>) -> Self {
        self.watch = Some(watch);
        self
    }

    /// Ends a first pass.
    pub fn finish_first_pass(mut self) -> Result<SpoolReader> {
        self.cut_gathered()?;
        self.write_waiting()?;
        let spool = self.spool.take().ok_or_else(|| RepositoryError::Other("no first pass was begun; this is a bug".into()))?;
        spool.finish()
    }

    /// Ends the source; `facts` is a JSON object.
    pub fn finish(mut self, facts: String) -> Result<WrittenSource> {
        self.cut_gathered()?;
        self.write_waiting()?;
        if let Some(page) = std::mem::take(&mut self.pages).finish() {
            self.store_page(page)?;
        }
        self.done.facts = facts;
        Ok(WrittenSource { source: self.done, users: self.users, groups: self.groups })
    }

    fn accept(&mut self, entry: Entry, place: Option<Place>) -> Result<()> {
        let ordered = match &self.last_path {
            Some(last) if !self.any_order => path_order(last, &entry.path).is_lt(),
            _ => true,
        };
        if !ordered {
            let path = String::from_utf8_lossy(&entry.path).into_owned();
            return Err(RepositoryError::Other(format!("the source gave '{path}' out of order; this is a bug")));
        }
        self.last_path = Some(entry.path.clone());
        self.waiting.push_back(Waiting { entry, place });
        if self.waiting.len() >= MAX_WAITING {
            self.cut_gathered()?;
        }
        if self.settled == 0 { self.write_waiting() } else { Ok(()) }
    }

    /// Writes the entries whose contents have their place.
    fn write_waiting(&mut self) -> Result<()> {
        while let Some(Waiting { mut entry, place }) = self.waiting.pop_front() {
            if let Some(place) = place {
                let chunk = self.known.chunks.get(place.chunk as usize).copied().flatten();
                let chunk = chunk.ok_or_else(|| RepositoryError::Other("contents without a chunk; this is a bug".into()))?;
                entry.content.segments = vec![Segment::Data(Extent { chunk, offset: place.offset, len: place.len })];
            }
            if let Some(spool) = &mut self.spool {
                spool.push(entry)?;
                continue;
            }
            if let Some(watch) = &mut self.watch {
                watch(&entry.path, entry.kind)?;
            }
            self.done.entries += 1;
            match entry.kind {
                Kind::File => self.done.files += 1,
                Kind::Directory => self.done.directories += 1,
                _ => {}
            }
            self.done.bytes += entry.size;
            self.users.insert(entry.uid);
            self.groups.insert(entry.gid);
            let mut lists = Vec::new();
            for list in lists_of(&entry.content.segments) {
                lists.push(self.writer.store(&list, ObjectKind::MetaPack, Texture::Mixed)?);
            }
            if !lists.is_empty() {
                entry.content.segments.clear();
            }
            if let Some(page) = self.pages.push(&PagedEntry { entry, lists }) {
                self.store_page(page)?;
            }
        }
        Ok(())
    }

    fn store_page(&mut self, page: BuiltPage) -> Result<()> {
        let chunk = self.writer.store(&page.bytes, ObjectKind::MetaPack, Texture::Mixed)?;
        self.done.pages.push(PageRef { chunk: ByteArray::from(chunk.0), first_path: page.first_path });
        Ok(())
    }

    /// Closes the gathered chunk.
    fn cut_gathered(&mut self) -> Result<()> {
        self.gathered.truncate(self.settled);
        if !self.gathered.is_empty() {
            let id = self.writer.store_gathered(&mut self.gathered, Texture::Mixed)?;
            self.settled = 0;
            if let Some(open) = self.known.chunks.last_mut() {
                *open = Some(id);
            }
        }
        Ok(())
    }

    /// Makes room behind what is gathered.
    fn open_gathered(&mut self, more: usize) -> &mut Vec<u8> {
        self.gathered.truncate(self.settled);
        self.writer.make_room(&mut self.gathered, more, GATHER_BYTES);
        &mut self.gathered
    }

    /// Takes what was appended to the gathered bytes as the contents of an entry.
    fn small(&mut self, mut entry: Entry) -> Result<()> {
        let contents = self.gathered.get(self.settled..).unwrap_or_default();
        let len = contents.len();
        entry.size = len as u64;
        if contents.is_empty() {
            entry.content = Content::default();
            return self.accept(entry, None);
        }
        let hash = self.writer.repository().content_hash(contents);
        entry.content = Content { hash, segments: Vec::new() };
        self.read_previous()?;
        if let Some(place) = self.known.by_hash.get(&hash).copied()
            && place.len as usize == len
            && self.is_there(place)?
        {
            return self.accept(entry, Some(place));
        }
        if self.settled == 0 {
            self.known.chunks.push(None);
        }
        let place = Place { chunk: self.known.chunks.len() as u32 - 1, offset: self.settled as u32, len: len as u32 };
        self.settled += len;
        if self.known.by_hash.len() < MAX_KNOWN_CONTENTS {
            self.known.by_hash.insert(hash, place);
        }
        // Where a chunk ends depends on names near it, so that one changed file does not move all the ends behind it.
        let boundary = self.settled >= GATHER_BYTES / 2 && hash[0] & 0x1f == 0;
        let full = boundary || self.settled >= GATHER_BYTES * 2 - SMALL_FILE_BYTES as usize;
        if full {
            self.cut_gathered()?;
        }
        self.accept(entry, Some(place))
    }

    fn is_there(&mut self, place: Place) -> Result<bool> {
        match self.known.chunks.get(place.chunk as usize).copied() {
            Some(Some(id)) => Ok(self.writer.has(&id)?.is_some()),
            // The chunk that is being gathered.
            Some(None) => Ok(true),
            None => Ok(false),
        }
    }

    /// On the first file that is new or changed: learns what the last backup held.
    fn read_previous(&mut self) -> Result<()> {
        let Some(mut previous) = self.known.previous.take() else { return Ok(()) };
        let mut places: HashMap<ChunkId, u32> = HashMap::new();
        loop {
            let entry = match previous.next_entry() {
                Ok(Some(entry)) => entry,
                Ok(None) => break,
                Err(RepositoryError::Cancelled) => return Err(RepositoryError::Cancelled),
                // It only says what need not be stored again.
                Err(e) => {
                    tracing::warn!("not all of the last backup's entries can be read, what moved is stored again: {e}");
                    break;
                }
            };
            if self.known.by_hash.len() >= MAX_KNOWN_CONTENTS {
                break;
            }
            if let (Kind::File, [Segment::Data(extent)]) = (entry.kind, entry.content.segments.as_slice())
                && entry.size <= SMALL_FILE_BYTES
            {
                let chunk = *places.entry(extent.chunk).or_insert_with(|| {
                    self.known.chunks.push(Some(extent.chunk));
                    self.known.chunks.len() as u32 - 1
                });
                self.known.by_hash.insert(entry.content.hash, Place { chunk, offset: extent.offset, len: extent.len });
            }
        }
        Ok(())
    }

    /// The next bytes of a large file as a chunk of their own, with a zstd frame that unpacks to them.
    pub fn large_frame(&mut self, contents: &[u8], frame: &[u8]) -> Result<()> {
        self.cut_large(true)?;
        let len = contents.len() as u32;
        let chunk = self.writer.store_frame(contents, frame)?;
        self.large.size += u64::from(len);
        self.large.segments.push(Segment::Data(Extent { chunk, offset: 0, len }));
        Ok(())
    }

    fn cut_large(&mut self, last: bool) -> Result<()> {
        while let Some(chunk) = self.chunker.next_chunk(last) {
            let len = chunk.len() as u32;
            let chunk = self.writer.store(chunk, ObjectKind::DataPack, Texture::Mixed)?;
            self.large.segments.push(Segment::Data(Extent { chunk, offset: 0, len }));
        }
        Ok(())
    }
}

/// The content hash of a large file: over where its contents lie, which is the same for the same contents cut the same way.
fn segments_hash(key: &[u8; 32], segments: &[Segment]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    for segment in segments {
        match segment {
            Segment::Hole(len) => {
                hasher.update(&[0]);
                hasher.update(&len.to_le_bytes());
            }
            Segment::Data(x) => {
                hasher.update(&[1]);
                hasher.update(&x.chunk.0);
                hasher.update(&x.offset.to_le_bytes());
                hasher.update(&x.len.to_le_bytes());
            }
        }
    }
    hasher.finalize().as_bytes().first_chunk().copied().unwrap_or_default()
}

impl EntrySink for SourceWriter<'_> {
    fn push(&mut self, mut entry: Entry) -> Result<(), SinkError> {
        if entry.kind == Kind::File {
            let sum: u64 = entry.content.segments.iter().map(Segment::len).sum();
            if sum != entry.size {
                return Err(SinkError::Repository("an entry's segments do not sum up to its size; this is a bug".into()));
            }
            if entry.content.hash == [0; 16] && entry.size > 0 {
                entry.content.hash = segments_hash(&self.writer.repository().chunk_key, &entry.content.segments);
            }
        }
        Ok(self.accept(entry, None)?)
    }

    fn push_small(&mut self, entry: Entry, contents: &[u8]) -> Result<(), SinkError> {
        self.open_gathered(contents.len()).extend_from_slice(contents);
        Ok(self.small(entry)?)
    }

    fn small_memory(&mut self, want: usize) -> Option<&mut Vec<u8>> {
        Some(self.open_gathered(want))
    }

    fn push_small_appended(&mut self, entry: Entry) -> Result<(), SinkError> {
        Ok(self.small(entry)?)
    }

    fn large_begin(&mut self) -> Result<(), SinkError> {
        self.chunker.clear();
        self.large = Large::default();
        Ok(())
    }

    fn large_space(&mut self, want: usize) -> &mut [u8] {
        self.chunker.space(want)
    }

    fn large_filled(&mut self, len: usize) -> Result<(), SinkError> {
        self.large.size += len as u64;
        self.chunker.filled(len);
        Ok(self.cut_large(false)?)
    }

    fn large_hole(&mut self, len: u64) -> Result<(), SinkError> {
        // A hole ends the chunk before it, so that the zeros are never stored.
        self.cut_large(true)?;
        self.large.size += len;
        if len > 0 {
            self.large.segments.push(Segment::Hole(len));
        }
        Ok(())
    }

    fn large_finish(&mut self, mut entry: Entry) -> Result<(), SinkError> {
        self.cut_large(true)?;
        let Large { segments, size } = std::mem::take(&mut self.large);
        entry.size = size;
        let hash = segments_hash(&self.writer.repository().chunk_key, &segments);
        entry.content = Content { hash, segments };
        Ok(self.accept(entry, None)?)
    }

    fn store(&mut self, chunk: &[u8], texture: Texture) -> Result<ChunkId, SinkError> {
        Ok(self.writer.store(chunk, ObjectKind::DataPack, texture)?)
    }

    fn chunk_len(&mut self, id: &ChunkId) -> Result<Option<u32>, SinkError> {
        Ok(self.writer.has(id)?)
    }

    /// One question for all of them.
    fn has_all(&mut self, segments: &[Segment]) -> Result<bool, SinkError> {
        Ok(self.writer.has_all(&chunks_of(segments))?)
    }

    fn fetch(&mut self, id: &ChunkId) -> Result<Vec<u8>, SinkError> {
        Ok(self.writer.fetch(id)?)
    }
}

impl From<RepositoryError> for SinkError {
    fn from(error: RepositoryError) -> Self {
        match error {
            RepositoryError::Cancelled => SinkError::Cancelled,
            e @ RepositoryError::Storage(_) => SinkError::Storage(e.to_string()),
            other => SinkError::Repository(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::super::test_world::{World, noise};
    use super::*;

    #[test]
    fn what_is_appended_and_not_pushed_is_forgotten() {
        let world = World::new();
        let repository = world.seen_by("a", None);
        let mut writer = Writer::new(repository.clone(), CancellationToken::new()).unwrap();
        let mut sink = SourceWriter::new(&mut writer, "files", "files", b"/x", None);
        sink.push(Entry { kind: Kind::Directory, ..Entry::default() }).unwrap();
        let mut expected = Vec::new();
        for n in 0..60u64 {
            // Some contents come twice, some are empty; a long one now and then, so that chunks end in between.
            let contents = if n % 7 == 3 { Vec::new() } else { noise(if n % 5 == 0 { 120_000 } else { 900 }, n / 2) };
            let entry = |name: &str| Entry { path: format!("{n:03}{name}").into_bytes(), kind: Kind::File, ..Entry::default() };
            // A read that failed, or a file that changed meanwhile.
            sink.small_memory(50_000).unwrap().extend_from_slice(&noise(40_000, 1000 + n));
            match n % 3 {
                0 => sink.push_small(entry("a"), &contents).unwrap(),
                1 => {
                    sink.small_memory(contents.len()).unwrap().extend_from_slice(&contents);
                    sink.push_small_appended(entry("a")).unwrap();
                }
                _ => {
                    let directory = Entry { path: format!("{n:03}").into_bytes(), kind: Kind::Directory, ..Entry::default() };
                    sink.push(directory).unwrap();
                    sink.small_memory(contents.len()).unwrap().extend_from_slice(&contents);
                    sink.push_small_appended(entry("a")).unwrap();
                }
            }
            expected.push((format!("{n:03}a").into_bytes(), contents));
        }
        sink.small_memory(10).unwrap().extend_from_slice(b"never");
        let source = sink.finish("{}".into()).unwrap().source;
        writer.flush().unwrap();
        let mut reader = SourceReader::new(repository.clone(), &source);
        let mut found = Vec::new();
        while let Some(entry) = reader.next_entry().unwrap() {
            if entry.kind == Kind::File {
                let contents = entry.content.segments.iter().flat_map(|segment| match segment {
                    Segment::Data(x) => repository.read_chunk(&x.chunk).unwrap()[x.offset as usize..][..x.len as usize].to_vec(),
                    Segment::Hole(len) => vec![0; *len as usize],
                });
                let contents: Vec<u8> = contents.collect();
                assert_eq!(entry.size, contents.len() as u64);
                found.push((entry.path, contents));
            }
        }
        assert_eq!(found, expected);
    }
}
