//! Pieces of a dump: where they are cut, which of them the last dump had, and the map that is kept for the next one.
//!
//! The map is a cache file: `MAGIC`, then 20 bytes for each piece (16 of its BLAKE3, its length as u32), then the trailer: average piece length
//! (u32), number of pieces (u64), content hash (16), BLAKE3 of all before (32). Little-endian. It belongs to one content, or it is not
//! used; lost, it is made again from the repository.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use keepd_protocol::model::Level;
use tempfile::NamedTempFile;
use tokio_util::sync::CancellationToken;

use super::super::extents::{Chunks, Cursor, Fetched, Gatherer};
use super::super::{Context, SourceError};
use crate::repository::chunker::{Chunker, Sizes, public_gear};
use crate::repository::entry::{Content, Texture};
use crate::repository::{ChunkId, Entry, EntrySink, Segment, SinkError};

const MAGIC: &[u8; 16] = b"keepd piecemap1\n";
const RECORD_BYTES: usize = 20;
const TRAILER_BYTES: usize = 4 + 8 + 16 + 32;
/// Pieces are so long on average, in bytes, while there are not too many of them …
const SHORTEST: u32 = 1 << 10;
/// … and longer where a dump would have more than so many (about 30 bytes of memory each).
const MOST_PIECES: u64 = 2 << 20;
/// Longer than this they are not worth having.
const LONGEST: u32 = 256 << 10;

type PieceHash = [u8; 16];

/// What became of a dump's bytes.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counts {
    pub bytes: u64,
    /// Of these, what the last dump had not.
    pub new_bytes: u64,
}

/// Takes a dump; gives its content.
pub struct PieceCutter<'a> {
    chunker: Chunker,
    old: Option<Old<'a>>,
    map: Option<MapWriter>,
    path: PathBuf,
    gatherer: Gatherer,
    hasher: blake3::Hasher,
    taken: Vec<Segment>,
    counts: Counts,
}

impl<'a> PieceCutter<'a> {
    /// `name` is the file's; its map is kept under a hash of it.
    pub fn begin(name: &str, before: Option<&'a Entry>, sink: &mut dyn EntrySink, context: &Context<'_>) -> Result<Self, SourceError> {
        let key = data_encoding::HEXLOWER.encode(&blake3::hash(name.as_bytes()).as_bytes()[..8]);
        let path = context.cache_dir.join(format!("pieces-{key}"));
        let (average, old) = match before.filter(|e| e.size > 0) {
            None => (SHORTEST, None),
            Some(entry) => match Old::find(entry, &path, sink, context) {
                Ok(found) => found,
                Err(SourceError::Sink(e @ SinkError::Repository(_))) => {
                    let text = format!("the last dump cannot be read, {name} is stored whole: {e}");
                    context.report.message(Level::Warning, text);
                    (average_for(entry.size, SHORTEST), None)
                }
                Err(e) => return Err(e),
            },
        };
        let mut hasher = blake3::Hasher::new_derive_key("keepd dump content 1");
        hasher.update(&average.to_le_bytes());
        Ok(Self {
            chunker: chunker(average),
            old,
            map: MapWriter::create(context.cache_dir, average).ok(),
            path,
            gatherer: Gatherer::new(Texture::Pages),
            hasher,
            taken: Vec::new(),
            counts: Counts::default(),
        })
    }

    /// Where the next bytes go.
    pub fn space(&mut self, want: usize) -> &mut [u8] {
        self.chunker.space(want)
    }

    /// So many came.
    pub fn filled(&mut self, len: usize, sink: &mut dyn EntrySink) -> Result<(), SinkError> {
        self.chunker.filled(len);
        self.cut(false, sink)
    }

    fn cut(&mut self, last: bool, sink: &mut dyn EntrySink) -> Result<(), SinkError> {
        while let Some(piece) = self.chunker.next_chunk(last) {
            let hash = hash_piece(piece);
            self.hasher.update(&hash);
            if self.map.as_mut().is_some_and(|map| map.write(&hash, piece.len()).is_err()) {
                self.map = None;
            }
            self.counts.bytes += piece.len() as u64;
            let found = self.old.as_mut().is_some_and(|old| old.find_piece(&hash, piece.len() as u64, &mut self.taken));
            if found {
                for segment in &self.taken {
                    self.gatherer.append(*segment);
                }
            } else {
                self.counts.new_bytes += piece.len() as u64;
                self.gatherer.gather(piece, sink)?;
            }
        }
        Ok(())
    }

    pub fn finish(mut self, sink: &mut dyn EntrySink, context: &Context<'_>) -> Result<(Content, Counts), SinkError> {
        self.cut(true, sink)?;
        let hash = first_16(self.hasher.finalize());
        let content = Content { hash, segments: self.gatherer.finish(sink)? };
        // A cache: without it the next dump takes longer.
        let kept = self.map.ok_or_else(|| "it could not be written".to_owned());
        if let Err(e) = kept.and_then(|map| map.finish(&self.path, &hash).map_err(|e| e.to_string())) {
            context.report.message(Level::Info, format!("the map of the dump's pieces cannot be kept in {}: {e}", self.path.display()));
        }
        Ok((content, self.counts))
    }
}

fn chunker(average: u32) -> Chunker {
    let average = average as usize;
    // What lies where tells nothing that the length of the chunks does not: a table that everybody has will do.
    Chunker::with(public_gear(), Sizes { min: average / 4, average, max: average * 8 })
}

fn hash_piece(piece: &[u8]) -> PieceHash {
    first_16(blake3::hash(piece))
}

fn first_16(hash: blake3::Hash) -> PieceHash {
    hash.as_bytes().first_chunk().copied().unwrap_or_default()
}

/// The average length of pieces for a dump of so many bytes, never less than it was.
fn average_for(bytes: u64, was: u32) -> u32 {
    let mut average = was.clamp(SHORTEST, LONGEST);
    while average < LONGEST && bytes / u64::from(average) > MOST_PIECES {
        average *= 2;
    }
    average
}

/// The last dump: its pieces by their hash, and where they lie.
struct Old<'a> {
    hashes: Vec<PieceHash>,
    /// Where each piece begins, and the end of the last.
    begins: Vec<u64>,
    /// Numbers of pieces in the order of their hashes.
    order: Vec<u32>,
    segments: &'a [Segment],
    /// Where each segment begins.
    starts: Vec<u64>,
    /// Chunks that are gone, or not to be used any more.
    condemned: HashSet<ChunkId>,
    /// The piece after the one found last.
    next: usize,
}

impl<'a> Old<'a> {
    /// The last dump as far as it can be used, and how the new one is to be cut.
    fn find(entry: &'a Entry, path: &Path, sink: &mut dyn EntrySink, context: &Context<'_>) -> Result<(u32, Option<Self>), SourceError> {
        let chunks = Chunks::of(&entry.content, sink)?;
        let mut map = Map::read(path, &entry.content.hash);
        if map.is_none() && chunks.are_complete() {
            map = Some(rebuild(&entry.content, entry.size, sink, context.cancel)?);
        }
        let Some(map) = map else { return Ok((average_for(entry.size, SHORTEST), None)) };
        let average = average_for(entry.size, map.average);
        let sum = map.lens.iter().map(|l| u64::from(*l)).sum::<u64>();
        if average != map.average || sum != entry.size {
            return Ok((average, None));
        }
        let mut begins = Vec::with_capacity(map.lens.len() + 1);
        let mut at = 0;
        begins.push(at);
        for len in &map.lens {
            at += u64::from(*len);
            begins.push(at);
        }
        let mut order: Vec<u32> = (0..u32::try_from(map.hashes.len()).unwrap_or(u32::MAX)).collect();
        order.sort_unstable_by_key(|n| map.hashes.get(*n as usize).copied().unwrap_or_default());
        let mut starts = Vec::with_capacity(entry.content.segments.len());
        let mut at = 0;
        for segment in &entry.content.segments {
            starts.push(at);
            at += segment.len();
        }
        let condemned = chunks.condemn(entry.size, 0);
        Ok((average, Some(Self { hashes: map.hashes, begins, order, segments: &entry.content.segments, starts, condemned, next: 0 })))
    }

    /// Where the last dump has a piece like this; false when it has none that is to be used.
    fn find_piece(&mut self, hash: &PieceHash, len: u64, taken: &mut Vec<Segment>) -> bool {
        let at = if self.hashes.get(self.next) == Some(hash) {
            self.next
        } else {
            let found = self.order.partition_point(|n| self.hashes.get(*n as usize).is_some_and(|h| h < hash));
            match self.order.get(found).map(|n| *n as usize) {
                Some(n) if self.hashes.get(n) == Some(hash) => n,
                _ => return false,
            }
        };
        let (Some(begin), Some(end)) = (self.begins.get(at).copied(), self.begins.get(at + 1).copied()) else { return false };
        if end - begin != len || !self.slice(begin, end, taken) {
            return false;
        }
        self.next = at + 1;
        true
    }

    /// The segments from `begin` to `end`; false when they are not to be used.
    fn slice(&self, begin: u64, end: u64, taken: &mut Vec<Segment>) -> bool {
        taken.clear();
        let mut n = self.starts.partition_point(|s| *s <= begin).saturating_sub(1);
        let mut at = begin;
        while at < end {
            let (Some(segment), Some(start)) = (self.segments.get(n), self.starts.get(n)) else { return false };
            let Segment::Data(extent) = segment else { return false };
            if self.condemned.contains(&extent.chunk) {
                return false;
            }
            let skip = at - start;
            let here = (u64::from(extent.len) - skip).min(end - at);
            // Both are within the extent, whose offset and length are u32.
            taken.push(Segment::Data(crate::repository::Extent {
                chunk: extent.chunk,
                offset: extent.offset + skip as u32,
                len: here as u32,
            }));
            at += here;
            n += 1;
        }
        true
    }
}

/// The last dump's pieces once more, by reading it from the repository.
fn rebuild(content: &Content, size: u64, sink: &mut dyn EntrySink, cancel: &CancellationToken) -> Result<Map, SourceError> {
    const AT_ONCE: u64 = 256 << 10;
    let average = average_for(size, SHORTEST);
    let mut map = Map { average, hashes: Vec::new(), lens: Vec::new() };
    let mut chunker = chunker(average);
    let (mut cursor, mut fetched) = (Cursor::new(content), Fetched::default());
    let (mut taken, mut bytes) = (Vec::new(), Vec::new());
    let mut left = size;
    while left > 0 {
        if cancel.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        let here = left.min(AT_ONCE);
        if !cursor.take(here, &mut taken) {
            break;
        }
        fetched.read(&taken, &mut bytes, sink)?;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let space = chunker.space(rest.len());
            let n = space.len().min(rest.len());
            let (now, later) = rest.split_at(n);
            space.get_mut(..n).unwrap_or_default().copy_from_slice(now);
            rest = later;
            chunker.filled(n);
            map.take(&mut chunker, false);
        }
        left -= here;
    }
    map.take(&mut chunker, true);
    Ok(map)
}

/// The pieces of a dump in order.
struct Map {
    average: u32,
    hashes: Vec<PieceHash>,
    lens: Vec<u32>,
}

impl Map {
    fn take(&mut self, chunker: &mut Chunker, last: bool) {
        while let Some(piece) = chunker.next_chunk(last) {
            self.hashes.push(hash_piece(piece));
            self.lens.push(piece.len() as u32);
        }
    }

    /// The map of exactly this content, if it is there and whole.
    fn read(path: &Path, content: &PieceHash) -> Option<Self> {
        let mut file = File::open(path).ok()?;
        let len = usize::try_from(file.metadata().ok()?.len()).ok()?;
        let body = len.checked_sub(MAGIC.len() + TRAILER_BYTES)?;
        let mut head = [0; MAGIC.len()];
        file.read_exact(&mut head).ok()?;
        if head != *MAGIC || !body.is_multiple_of(RECORD_BYTES) {
            return None;
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&head);
        let (mut hashes, mut lens) = (Vec::with_capacity(body / RECORD_BYTES), Vec::with_capacity(body / RECORD_BYTES));
        let mut buffer = vec![0; RECORD_BYTES * 4096];
        let mut left = body;
        while left > 0 {
            let now = buffer.get_mut(..left.min(RECORD_BYTES * 4096))?;
            file.read_exact(now).ok()?;
            hasher.update(now);
            for record in now.chunks_exact(RECORD_BYTES) {
                hashes.push(*record.first_chunk::<16>()?);
                lens.push(u32::from_le_bytes(*record.last_chunk::<4>()?));
            }
            left -= now.len();
        }
        let mut trailer = [0; TRAILER_BYTES];
        file.read_exact(&mut trailer).ok()?;
        let (said, sum) = trailer.split_at(TRAILER_BYTES - 32);
        hasher.update(said);
        let average = u32::from_le_bytes(*said.first_chunk::<4>()?);
        let whole = hasher.finalize().as_bytes() == sum && said.get(12..) == Some(content.as_slice());
        (whole && (SHORTEST..=LONGEST).contains(&average)).then_some(Self { average, hashes, lens })
    }
}

/// Writes a map beside the old one.
struct MapWriter {
    file: BufWriter<NamedTempFile>,
    hasher: blake3::Hasher,
    average: u32,
    count: u64,
}

impl MapWriter {
    fn create(cache_dir: &Path, average: u32) -> io::Result<Self> {
        let named = tempfile::Builder::new().prefix("pieces-new-").tempfile_in(cache_dir)?;
        let mut writer = Self { file: BufWriter::with_capacity(64 << 10, named), hasher: blake3::Hasher::new(), average, count: 0 };
        writer.put(MAGIC)?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.file.write_all(bytes)
    }

    fn write(&mut self, hash: &PieceHash, len: usize) -> io::Result<()> {
        let mut record = [0; RECORD_BYTES];
        record[..16].copy_from_slice(hash);
        record[16..].copy_from_slice(&(len as u32).to_le_bytes());
        self.count += 1;
        self.put(&record)
    }

    /// Replaces the map.
    fn finish(mut self, path: &Path, content: &PieceHash) -> io::Result<()> {
        self.put(&self.average.to_le_bytes())?;
        self.put(&self.count.to_le_bytes())?;
        self.put(content)?;
        self.file.write_all(self.hasher.finalize().as_bytes())?;
        let named = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        named.persist(path).map(drop).map_err(|e| e.error)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::source::Report;

    /// A repository in memory.
    #[derive(Default)]
    struct Chunked(HashMap<ChunkId, Vec<u8>>);

    impl EntrySink for Chunked {
        fn push(&mut self, _: Entry) -> Result<(), SinkError> {
            Ok(())
        }
        fn push_small(&mut self, _: Entry, _: &[u8]) -> Result<(), SinkError> {
            Ok(())
        }
        fn large_begin(&mut self) -> Result<(), SinkError> {
            Ok(())
        }
        fn large_space(&mut self, _: usize) -> &mut [u8] {
            &mut []
        }
        fn large_filled(&mut self, _: usize) -> Result<(), SinkError> {
            Ok(())
        }
        fn large_hole(&mut self, _: u64) -> Result<(), SinkError> {
            Ok(())
        }
        fn large_finish(&mut self, _: Entry) -> Result<(), SinkError> {
            Ok(())
        }
        fn store(&mut self, chunk: &[u8], _: Texture) -> Result<ChunkId, SinkError> {
            let id = ChunkId(*blake3::hash(chunk).as_bytes());
            self.0.insert(id, chunk.to_vec());
            Ok(id)
        }
        fn chunk_len(&mut self, id: &ChunkId) -> Result<Option<u32>, SinkError> {
            Ok(self.0.get(id).map(|c| c.len() as u32))
        }
        fn fetch(&mut self, id: &ChunkId) -> Result<Vec<u8>, SinkError> {
            Ok(self.0[id].clone())
        }
    }

    impl Chunked {
        fn contents(&self, content: &Content) -> Vec<u8> {
            let mut bytes = Vec::new();
            for segment in &content.segments {
                match segment {
                    Segment::Data(x) => bytes.extend_from_slice(&self.0[&x.chunk][x.offset as usize..][..x.len as usize]),
                    Segment::Hole(len) => bytes.resize(bytes.len() + *len as usize, 0),
                }
            }
            bytes
        }
    }

    struct World {
        dir: tempfile::TempDir,
        sink: Chunked,
    }

    impl World {
        fn new() -> Self {
            Self { dir: tempfile::tempdir().unwrap(), sink: Chunked::default() }
        }

        fn dump(&mut self, bytes: &[u8], before: Option<&Entry>) -> (Entry, Counts) {
            let (cancel, report) = (CancellationToken::new(), Report::default());
            let context = Context { cancel: &cancel, report: &report, work_dir: self.dir.path(), cache_dir: self.dir.path() };
            let mut cutter = PieceCutter::begin("d", before, &mut self.sink, &context).unwrap();
            let mut rest = bytes;
            while !rest.is_empty() {
                let space = cutter.space(rest.len().min(70_000));
                let n = space.len().min(rest.len());
                space[..n].copy_from_slice(&rest[..n]);
                rest = &rest[n..];
                cutter.filled(n, &mut self.sink).unwrap();
            }
            let (content, counts) = cutter.finish(&mut self.sink, &context).unwrap();
            assert_eq!(self.sink.contents(&content), bytes);
            assert_eq!(counts.bytes, bytes.len() as u64);
            (Entry { size: counts.bytes, content, ..Entry::default() }, counts)
        }
    }

    /// Rows of a table, each with its number and something to compress.
    fn rows(numbers: impl Iterator<Item = u32>) -> Vec<u8> {
        let row = |n: u32| format!("{n}\tcustomer {}\t{}\t2024-01-01\n", n * 7919 % 10_007, "abc ".repeat((n % 17) as usize));
        numbers.map(row).collect::<String>().into_bytes()
    }

    #[test]
    fn rows_that_change_cost_a_piece_or_two_wherever_they_go() {
        let mut world = World::new();
        let (first, counts) = world.dump(&rows(0..60_000), None);
        assert_eq!(counts.new_bytes, counts.bytes);
        let (again, counts) = world.dump(&rows(0..60_000), Some(&first));
        assert_eq!((counts.new_bytes, again.content.hash), (0, first.content.hash));
        // One row of a hundred goes from its place to the end, as an update in PostgreSQL does.
        let moved = rows((0..60_000).filter(|n| n % 100 != 7).chain((0..60_000).filter(|n| n % 100 == 7)));
        let (third, counts) = world.dump(&moved, Some(&again));
        assert!(counts.new_bytes * 2 < counts.bytes, "{counts:?}");
        // The two halves change places: nothing is new but what is at the seams.
        let (_, counts) = world.dump(&rows((30_000..60_000).chain(0..30_000)), Some(&first));
        assert!(counts.new_bytes < 30_000, "{counts:?}");
        let (_, counts) = world.dump(b"", Some(&third));
        assert_eq!(counts.bytes, 0);
    }

    #[test]
    fn a_lost_or_damaged_map_is_made_again() {
        let mut world = World::new();
        let (first, _) = world.dump(&rows(0..20_000), None);
        let map = std::fs::read_dir(world.dir.path()).unwrap().next().unwrap().unwrap().path();
        let bytes = std::fs::read(&map).unwrap();
        for at in (0..bytes.len()).step_by(bytes.len() / 40) {
            let mut other = bytes.clone();
            other[at] ^= 1;
            std::fs::write(&map, other).unwrap();
            assert_eq!(world.dump(&rows(0..20_000), Some(&first)).1.new_bytes, 0, "byte {at}");
        }
        std::fs::write(&map, &bytes[..bytes.len() / 2]).unwrap();
        assert_eq!(world.dump(&rows(0..20_000), Some(&first)).1.new_bytes, 0);
        std::fs::remove_file(&map).unwrap();
        assert_eq!(world.dump(&rows(0..20_000), Some(&first)).1.new_bytes, 0);
        // The map of another dump is not this one's.
        let (other, _) = world.dump(&rows(5..9000), None);
        assert_eq!(world.dump(&rows(0..20_000), Some(&first)).1.new_bytes, 0);
        assert_eq!(world.dump(&rows(5..9000), Some(&other)).1.new_bytes, 0);
    }

    #[test]
    fn chunks_that_are_gone_are_stored_anew() {
        let mut world = World::new();
        let (first, _) = world.dump(&rows(0..60_000), None);
        let gone: Vec<ChunkId> = world.sink.0.keys().copied().take(1).collect();
        for id in gone {
            world.sink.0.remove(&id);
        }
        let (_, counts) = world.dump(&rows(0..60_000), Some(&first));
        assert!(counts.new_bytes > 100_000 && counts.new_bytes < counts.bytes, "{counts:?}");
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(24))]
        #[test]
        fn whatever_comes_is_given_back(first in proptest::collection::vec(0u32..3000, 0..3000), second in proptest::collection::vec(0u32..3000, 0..3000)) {
            let mut world = World::new();
            let (before, _) = world.dump(&rows(first.into_iter()), None);
            world.dump(&rows(second.into_iter()), Some(&before));
        }
    }
}
