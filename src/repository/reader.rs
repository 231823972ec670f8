//! Reading backups: the entries of a source in path order, and the contents of files.

use std::collections::VecDeque;
use std::sync::Arc;

use super::entry::{ChunkId, Entry, Segment, path_order};
use super::error::Result;
use super::manifest::ManifestSource;
use super::open::Repository;
use super::page::{self, PagedEntry};

/// The entries of one source of a backup, in path order.
pub struct SourceReader {
    repository: Arc<Repository>,
    /// Pages not read yet.
    pages: VecDeque<ChunkId>,
    entries: std::vec::IntoIter<PagedEntry>,
}

impl SourceReader {
    pub fn new(repository: Arc<Repository>, source: &ManifestSource) -> Self {
        let pages = source.pages.iter().map(|p| ChunkId(*p.chunk)).collect();
        Self { repository, pages, entries: Vec::new().into_iter() }
    }

    /// Reads no pages of its own; for [`SourceReader::whole`].
    pub fn empty(repository: Arc<Repository>) -> Self {
        Self { repository, pages: VecDeque::new(), entries: Vec::new().into_iter() }
    }

    /// Starts at the page that would hold `path`; entries before it may still come first.
    pub fn starting_at(repository: Arc<Repository>, source: &ManifestSource, path: &[u8]) -> Self {
        let after = source.pages.partition_point(|p| path_order(&p.first_path, path).is_le());
        let pages = source.pages.iter().skip(after.saturating_sub(1)).map(|p| ChunkId(*p.chunk)).collect();
        Self { repository, pages, entries: Vec::new().into_iter() }
    }

    /// The next entry, its segments whole.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        match self.next_paged()? {
            None => Ok(None),
            Some(paged) => self.whole(paged).map(Some),
        }
    }

    /// The next entry as it stands in its page.
    pub fn next_paged(&mut self) -> Result<Option<PagedEntry>> {
        loop {
            if let Some(entry) = self.entries.next() {
                return Ok(Some(entry));
            }
            let Some(id) = self.pages.pop_front() else { return Ok(None) };
            let bytes = self.repository.read_chunk(&id)?;
            let entries = page::decode_page(&bytes)
                .map_err(|e| self.repository.damaged(&format!("page {id}"), format!("it is no valid page of entries: {e}")))?;
            self.entries = entries.into_iter();
        }
    }

    /// Reads the lists of long contents.
    pub fn whole(&self, mut paged: PagedEntry) -> Result<Entry> {
        for id in &paged.lists {
            let bytes = self.repository.read_chunk(id)?;
            let segments = page::decode_list(&bytes)
                .map_err(|e| self.repository.damaged(&format!("list {id}"), format!("it is no valid list of segments: {e}")))?;
            paged.entry.content.segments.extend(segments);
        }
        if !paged.lists.is_empty() {
            let sum = paged.entry.content.segments.iter().try_fold(0u64, |sum, s| sum.checked_add(s.len()));
            if sum != Some(paged.entry.size) {
                let path = String::from_utf8_lossy(&paged.entry.path).into_owned();
                return Err(self.repository.damaged(&format!("entry '{path}'"), "its segments do not sum up to its size".into()));
            }
        }
        Ok(paged.entry)
    }
}

/// The chunks an entry refers to, in order, each once in a row.
pub fn chunks_of(segments: &[Segment]) -> Vec<ChunkId> {
    let mut chunks: Vec<ChunkId> = segments.iter().filter_map(|s| if let Segment::Data(x) = s { Some(x.chunk) } else { None }).collect();
    chunks.dedup();
    chunks
}
