//! A sink in memory, for tests.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::repository::entry::{Texture, path_order};
use crate::repository::{ChunkId, Content, Entry, EntrySink, Extent, Segment, SinkError};
use crate::source::Previous;

#[derive(Default)]
pub struct TestSink {
    pub chunks: HashMap<ChunkId, Vec<u8>>,
    pub entries: Vec<Entry>,
    pub stored_bytes: usize,
    pub large: Vec<Segment>,
    pub space: Vec<u8>,
}

impl TestSink {
    pub fn contents(&self, entry: &Entry) -> Vec<u8> {
        let mut out = Vec::new();
        for segment in &entry.content.segments {
            match segment {
                Segment::Hole(n) => out.resize(out.len() + *n as usize, 0),
                Segment::Data(x) => out.extend_from_slice(&self.chunks[&x.chunk][x.offset as usize..(x.offset + x.len) as usize]),
            }
        }
        out
    }

    pub fn by_path(&self) -> BTreeMap<String, &Entry> {
        self.entries.iter().map(|e| (String::from_utf8_lossy(&e.path).into_owned(), e)).collect()
    }

    fn add(&mut self, bytes: &[u8]) -> Segment {
        let chunk = ChunkId(*blake3::hash(bytes).as_bytes());
        if self.chunks.insert(chunk, bytes.to_vec()).is_none() {
            self.stored_bytes += bytes.len();
        }
        Segment::Data(Extent { chunk, offset: 0, len: bytes.len() as u32 })
    }
}

impl EntrySink for TestSink {
    fn push(&mut self, entry: Entry) -> Result<(), SinkError> {
        if let Some(last) = self.entries.last() {
            assert!(path_order(&last.path, &entry.path).is_lt(), "{:?} before {:?}", last.path, entry.path);
        }
        assert_eq!(entry.content.segments.iter().map(Segment::len).sum::<u64>(), entry.size);
        self.entries.push(entry);
        Ok(())
    }
    fn push_small(&mut self, mut entry: Entry, contents: &[u8]) -> Result<(), SinkError> {
        entry.size = contents.len() as u64;
        let segments = if contents.is_empty() { vec![] } else { vec![self.add(contents)] };
        entry.content = Content { hash: [1; 16], segments };
        self.push(entry)
    }
    fn large_begin(&mut self) -> Result<(), SinkError> {
        self.large.clear();
        Ok(())
    }
    fn large_space(&mut self, want: usize) -> &mut [u8] {
        self.space.resize(want, 0);
        &mut self.space
    }
    fn large_filled(&mut self, len: usize) -> Result<(), SinkError> {
        let bytes = self.space[..len].to_vec();
        let segment = self.add(&bytes);
        self.large.push(segment);
        Ok(())
    }
    fn large_hole(&mut self, len: u64) -> Result<(), SinkError> {
        self.large.push(Segment::Hole(len));
        Ok(())
    }
    fn large_finish(&mut self, mut entry: Entry) -> Result<(), SinkError> {
        entry.content = Content { hash: [2; 16], segments: std::mem::take(&mut self.large) };
        entry.size = entry.content.segments.iter().map(Segment::len).sum();
        self.push(entry)
    }
    fn store(&mut self, chunk: &[u8], _: Texture) -> Result<ChunkId, SinkError> {
        match self.add(chunk) {
            Segment::Data(x) => Ok(x.chunk),
            Segment::Hole(_) => unreachable!(),
        }
    }
    fn chunk_len(&mut self, id: &ChunkId) -> Result<Option<u32>, SinkError> {
        Ok(self.chunks.get(id).map(|c| c.len() as u32))
    }
    fn fetch(&mut self, id: &ChunkId) -> Result<Vec<u8>, SinkError> {
        self.chunks.get(id).cloned().ok_or_else(|| SinkError::Repository("no such chunk".into()))
    }
}

/// The last backup's entries, from a list.
pub struct Last(pub VecDeque<Entry>);

impl Previous for Last {
    fn next_entry(&mut self) -> Result<Option<Entry>, SinkError> {
        Ok(self.0.pop_front())
    }
}
