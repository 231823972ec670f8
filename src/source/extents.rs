//! Contents as extents: what the previous backup has of a database or dump, which of it is used again, and new pieces gathered into
//! chunks.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::repository::entry::{Content, GATHER_BYTES, Texture};
use crate::repository::{ChunkId, EntrySink, Extent, Segment, SinkError};

/// Above this multiple of the database's size a restore would read too much, so the sparsest chunks are written anew …
const MOST_READ: u64 = 2;
const MOST_READ_SPARE: u64 = 8 << 20;
/// … until this many halves of it are left.
const LEAST_HALVES: u64 = 3;
/// Of chunks that are fetched again to hash their pages.
const FETCHED_BYTES: usize = 12 << 20;

/// How much of a chunk the previous content uses.
struct Use {
    /// None: the repository does not have it any more.
    len: Option<u32>,
    live: u64,
}

/// The chunks of the previous content.
pub struct Chunks {
    used: HashMap<ChunkId, Use>,
    /// All extents lie within their chunks.
    sound: bool,
}

impl Chunks {
    pub fn of(content: &Content, sink: &mut dyn EntrySink) -> Result<Self, SinkError> {
        let mut chunks = Self { used: HashMap::new(), sound: true };
        for segment in &content.segments {
            let Segment::Data(extent) = segment else { continue };
            let chunk = match chunks.used.entry(extent.chunk) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::hash_map::Entry::Vacant(entry) => entry.insert(Use { len: sink.chunk_len(&extent.chunk)?, live: 0 }),
            };
            chunk.live += u64::from(extent.len);
            let end = u64::from(extent.offset) + u64::from(extent.len);
            chunks.sound &= chunk.len.is_none_or(|len| end <= u64::from(len));
        }
        Ok(chunks)
    }

    /// Everything the previous content needs is there.
    pub fn are_complete(&self) -> bool {
        self.sound && self.used.values().all(|chunk| chunk.len.is_some())
    }

    /// The bytes that a restore of the previous content reads.
    fn bytes(&self) -> u64 {
        self.used.values().filter_map(|chunk| chunk.len).map(u64::from).sum()
    }

    /// Whether a database of `bytes` of which `expected` are stored anew would be in too many pieces.
    pub fn are_too_sparse(&self, bytes: u64, expected: u64) -> bool {
        self.bytes().saturating_add(expected) > bytes.saturating_mul(MOST_READ).saturating_add(MOST_READ_SPARE)
    }

    /// The chunks that are not to be used again.
    pub fn condemn(&self, bytes: u64, expected: u64) -> HashSet<ChunkId> {
        if !self.sound {
            return self.used.keys().copied().collect();
        }
        let gone = self.used.iter().filter(|(_, chunk)| chunk.len.is_none());
        let mut condemned: HashSet<ChunkId> = gone.map(|(id, _)| *id).collect();
        if self.are_too_sparse(bytes, expected) {
            let mut present: Vec<(ChunkId, u64, u64)> =
                self.used.iter().filter_map(|(id, chunk)| Some((*id, u64::from(chunk.len?), chunk.live))).collect();
            // live/len ascending, without dividing; the id makes the choice the same every time.
            present.sort_by(|a, b| (a.2 * b.1).cmp(&(b.2 * a.1)).then(a.0.cmp(&b.0)));
            let mut total = self.bytes().saturating_add(expected);
            for (id, len, live) in present {
                if total.saturating_mul(2) <= bytes.saturating_mul(LEAST_HALVES) || live >= len {
                    break;
                }
                total = total - len + live;
                condemned.insert(id);
            }
        }
        condemned
    }
}

/// Walks the previous content in step with the pages.
pub struct Cursor<'a> {
    segments: std::slice::Iter<'a, Segment>,
    rest: Option<Segment>,
}

impl<'a> Cursor<'a> {
    pub fn new(content: &'a Content) -> Self {
        Self { segments: content.segments.iter(), rest: None }
    }

    /// The next `len` bytes' segments into `taken`; false when the content ends before.
    pub fn take(&mut self, mut len: u64, taken: &mut Vec<Segment>) -> bool {
        taken.clear();
        while len > 0 {
            let Some(segment) = self.rest.take().or_else(|| self.segments.next().copied()) else { return false };
            let here = segment.len().min(len);
            let (head, tail) = split(segment, here);
            if !head.is_empty() {
                taken.push(head);
            }
            self.rest = (!tail.is_empty()).then_some(tail);
            len -= here;
        }
        true
    }
}

/// `at` is at most the segment's length.
fn split(segment: Segment, at: u64) -> (Segment, Segment) {
    match segment {
        Segment::Hole(len) => (Segment::Hole(at), Segment::Hole(len - at)),
        Segment::Data(extent) => {
            let at = u32::try_from(at).unwrap_or(extent.len).min(extent.len);
            let head = Extent { len: at, ..extent };
            let tail = Extent { offset: extent.offset.saturating_add(at), len: extent.len - at, ..extent };
            (Segment::Data(head), Segment::Data(tail))
        }
    }
}

/// The chunks used last.
#[derive(Default)]
pub struct Fetched {
    chunks: VecDeque<(ChunkId, Vec<u8>)>,
}

impl Fetched {
    /// The bytes of these segments into `into`, in place of what is there.
    pub fn read(&mut self, segments: &[Segment], into: &mut Vec<u8>, sink: &mut dyn EntrySink) -> Result<(), SinkError> {
        into.clear();
        for segment in segments {
            match segment {
                Segment::Hole(len) => into.resize(into.len() + usize::try_from(*len).unwrap_or(0), 0),
                Segment::Data(extent) => {
                    let chunk = self.chunk(&extent.chunk, sink)?;
                    let start = extent.offset as usize;
                    into.extend_from_slice(chunk.get(start..start + extent.len as usize).unwrap_or_default());
                }
            }
        }
        Ok(())
    }

    fn chunk(&mut self, id: &ChunkId, sink: &mut dyn EntrySink) -> Result<&[u8], SinkError> {
        let chunk = match self.chunks.iter().position(|(have, _)| have == id).and_then(|at| self.chunks.remove(at)) {
            Some(chunk) => chunk,
            None => {
                let bytes = sink.fetch(id)?;
                while self.chunks.iter().map(|(_, c)| c.len()).sum::<usize>() + bytes.len() > FETCHED_BYTES {
                    if self.chunks.pop_back().is_none() {
                        break;
                    }
                }
                (*id, bytes)
            }
        };
        self.chunks.push_front(chunk);
        Ok(self.chunks.front().map(|(_, bytes)| bytes.as_slice()).unwrap_or_default())
    }
}

/// Segments in the making: old ones as they are, new pieces gathered into chunks.
pub struct Gatherer {
    texture: Texture,
    segments: Vec<Segment>,
    /// The chunk being gathered, and the segments that lie in it.
    chunk: Vec<u8>,
    in_chunk: Vec<usize>,
}

impl Gatherer {
    pub fn new(texture: Texture) -> Self {
        Self { texture, segments: Vec::new(), chunk: Vec::new(), in_chunk: Vec::new() }
    }

    /// A new piece of at most [`GATHER_BYTES`].
    pub fn gather(&mut self, piece: &[u8], sink: &mut dyn EntrySink) -> Result<(), SinkError> {
        if self.chunk.len() + piece.len() > GATHER_BYTES {
            self.store(sink)?;
        }
        let chunk = ChunkId([0; 32]); // its name is known when it is full
        let offset = u32::try_from(self.chunk.len()).unwrap_or(u32::MAX);
        self.chunk.extend_from_slice(piece);
        let extent = Extent { chunk, offset, len: u32::try_from(piece.len()).unwrap_or(u32::MAX) };
        let last = self.segments.len().checked_sub(1);
        let follows = last.is_some() && self.in_chunk.last().copied() == last;
        if !(follows && self.grow_last(extent)) {
            self.in_chunk.push(self.segments.len());
            self.segments.push(Segment::Data(extent));
        }
        Ok(())
    }

    /// A segment of chunks that are stored.
    pub fn append(&mut self, segment: Segment) {
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
        let id = sink.store(&self.chunk, self.texture)?;
        self.chunk.clear();
        for at in self.in_chunk.drain(..) {
            if let Some(Segment::Data(extent)) = self.segments.get_mut(at) {
                extent.chunk = id;
            }
        }
        Ok(())
    }

    pub fn finish(mut self, sink: &mut dyn EntrySink) -> Result<Vec<Segment>, SinkError> {
        self.store(sink)?;
        Ok(self.segments)
    }
}
