//! A sink in memory, and what tests need around a capture.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use keepd_protocol::model::Level;
use rusqlite::Connection;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::{Tuning, capture_with};
use crate::config::{SqliteSource, Verify};
use crate::repository::entry::Texture;
use crate::repository::{ChunkId, Entry, EntrySink, Segment, SinkError};
use crate::source::{Context, Facts, Previous, Report, SourceError};

#[derive(Default)]
pub struct MemorySink {
    pub chunks: HashMap<ChunkId, Vec<u8>>,
    pub entries: Vec<Entry>,
    /// Bytes given to `store`, doubled ones too.
    pub stored_bytes: u64,
    pub fetches: usize,
    /// Keep lengths only.
    pub forget: bool,
    pub lens: HashMap<ChunkId, u32>,
    /// Wait this long in every `store`.
    pub slow: Duration,
}

impl EntrySink for MemorySink {
    fn push(&mut self, entry: Entry) -> Result<(), SinkError> {
        for segment in &entry.content.segments {
            if let Segment::Data(extent) = segment {
                let len = self.lens.get(&extent.chunk).copied().expect("a chunk that is there");
                assert!(extent.len > 0 && u64::from(extent.offset) + u64::from(extent.len) <= u64::from(len));
            }
        }
        assert_eq!(entry.content.segments.iter().map(Segment::len).sum::<u64>(), entry.size);
        self.entries.push(entry);
        Ok(())
    }

    fn push_small(&mut self, _: Entry, _: &[u8]) -> Result<(), SinkError> {
        unreachable!()
    }

    fn large_begin(&mut self) -> Result<(), SinkError> {
        unreachable!()
    }

    fn large_space(&mut self, _: usize) -> &mut [u8] {
        unreachable!()
    }

    fn large_filled(&mut self, _: usize) -> Result<(), SinkError> {
        unreachable!()
    }

    fn large_hole(&mut self, _: u64) -> Result<(), SinkError> {
        unreachable!()
    }

    fn large_finish(&mut self, _: Entry) -> Result<(), SinkError> {
        unreachable!()
    }

    fn store(&mut self, chunk: &[u8], _: Texture) -> Result<ChunkId, SinkError> {
        std::thread::sleep(self.slow);
        self.stored_bytes += chunk.len() as u64;
        let id = ChunkId(*blake3::hash(chunk).as_bytes());
        self.lens.insert(id, chunk.len() as u32);
        if !self.forget {
            self.chunks.insert(id, chunk.to_vec());
        }
        Ok(id)
    }

    fn chunk_len(&mut self, id: &ChunkId) -> Result<Option<u32>, SinkError> {
        Ok(self.lens.get(id).copied())
    }

    fn fetch(&mut self, id: &ChunkId) -> Result<Vec<u8>, SinkError> {
        self.fetches += 1;
        self.chunks.get(id).cloned().ok_or_else(|| SinkError::Repository(format!("no chunk {id}")))
    }
}

struct One(Option<Entry>);

impl Previous for One {
    fn next_entry(&mut self) -> Result<Option<Entry>, SinkError> {
        Ok(self.0.take())
    }
}

/// A database's directory, a sink, and what lies between captures.
pub struct Stage {
    pub dir: TempDir,
    pub path: PathBuf,
    pub verify: Verify,
    pub sink: MemorySink,
    pub report: Report,
    pub cancel: CancellationToken,
    pub tuning: Tuning,
}

impl Stage {
    pub fn new() -> Self {
        let dir = TempDir::new().unwrap();
        std::fs::create_dir(dir.path().join("cache")).unwrap();
        std::fs::create_dir(dir.path().join("work")).unwrap();
        std::fs::create_dir(dir.path().join("data")).unwrap();
        let path = dir.path().join("data/app.db");
        Self {
            dir,
            path,
            verify: Verify::Quick,
            sink: MemorySink::default(),
            report: Report::default(),
            cancel: CancellationToken::new(),
            // Steps so small that the writers of tests come in between.
            tuning: Tuning { busy: Duration::from_secs(20), step_pages: 32, ..Tuning::default() },
        }
    }

    pub fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    pub fn work(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    pub fn open(&self) -> Connection {
        let connection = Connection::open(&self.path).unwrap();
        connection.busy_timeout(Duration::from_secs(30)).unwrap();
        connection
    }

    /// Captures on top of the last capture.
    pub fn capture(&mut self) -> Result<Facts, SourceError> {
        let mut previous = One(self.sink.entries.last().cloned());
        let source = SqliteSource { path: self.path.clone(), verify: self.verify };
        let (work, cache) = (self.work(), self.cache());
        let context = Context { cancel: &self.cancel, report: &self.report, work_dir: &work, cache_dir: &cache };
        let facts = capture_with(&self.tuning, &source, &mut previous, &mut self.sink, &context);
        assert_eq!(std::fs::read_dir(&work).unwrap().count(), 0, "something was left in the work directory");
        facts
    }

    /// The error's text of a capture that must fail.
    pub fn failure(&mut self) -> String {
        match self.capture() {
            Err(SourceError::Failed(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    pub fn last(&self) -> &Entry {
        self.sink.entries.last().unwrap()
    }

    pub fn contents(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for segment in &self.last().content.segments {
            match segment {
                Segment::Hole(len) => bytes.resize(bytes.len() + *len as usize, 0),
                Segment::Data(e) => bytes.extend_from_slice(&self.sink.chunks[&e.chunk][e.offset as usize..(e.offset + e.len) as usize]),
            }
        }
        bytes
    }

    /// The last capture as a database of its own, which is whole.
    pub fn restore(&self) -> Connection {
        let path = self.dir.path().join(format!("restored-{}.db", self.sink.entries.len()));
        std::fs::write(&path, self.contents()).unwrap();
        let connection = Connection::open(&path).unwrap();
        let check: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
        assert_eq!(check, "ok");
        connection
    }

    pub fn messages(&self, level: Level) -> Vec<String> {
        self.report.take_messages().into_iter().filter(|(l, _)| *l == level).map(|(_, text)| text).collect()
    }
}

/// The files of a directory with their bytes.
pub fn listing(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).map(|p| (p.clone(), std::fs::read(p).unwrap())).collect();
    files.sort();
    files
}

/// Content that does not compress into a few pages: `rows` rows of about 200 bytes.
pub fn fill(connection: &Connection, rows: u32) {
    connection.execute_batch("CREATE TABLE IF NOT EXISTS item (id INTEGER PRIMARY KEY, name TEXT NOT NULL, body BLOB)").unwrap();
    connection.execute_batch("CREATE INDEX IF NOT EXISTS item_name ON item (name)").unwrap();
    connection
        .execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?1)
             INSERT INTO item (name, body) SELECT 'item ' || i, randomblob(200) FROM n",
            [rows],
        )
        .unwrap();
}
