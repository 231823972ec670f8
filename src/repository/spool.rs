//! Entries between two passes over a source, in a file without a name on this machine.
//!
//! The file holds pages as the repository has them, each behind its length (u32, little-endian), and after each page the lists of its long contents in the
//! same way, in order.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use super::entry::{ChunkId, Entry};
use super::error::{RepositoryError, Result};
use super::page::{self, BuiltPage, PageBuilder, PagedEntry};

/// Takes entries in path order.
pub struct SpoolWriter {
    file: BufWriter<File>,
    pages: PageBuilder,
    /// Of the page that is being built.
    lists: Vec<Vec<u8>>,
}

/// Gives them back.
pub struct SpoolReader {
    file: BufReader<File>,
    entries: std::vec::IntoIter<PagedEntry>,
}

fn failed(error: impl std::fmt::Display) -> RepositoryError {
    RepositoryError::Other(format!("the entries of the first pass cannot be kept in the work directory: {error}"))
}

impl SpoolWriter {
    pub fn create(directory: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(directory).map_err(failed)?;
        Ok(Self { file: BufWriter::with_capacity(256 << 10, file), pages: PageBuilder::default(), lists: Vec::new() })
    }

    pub fn push(&mut self, mut entry: Entry) -> Result<()> {
        let lists = page::lists_of(&entry.content.segments);
        if !lists.is_empty() {
            entry.content.segments.clear();
        }
        // Only how many there are counts.
        let ids = vec![ChunkId([0; 32]); lists.len()];
        self.lists.extend(lists);
        match self.pages.push(&PagedEntry { entry, lists: ids }) {
            Some(page) => self.write(&page),
            None => Ok(()),
        }
    }

    fn write(&mut self, page: &BuiltPage) -> Result<()> {
        for bytes in std::iter::once(&page.bytes).chain(&self.lists) {
            let len = u32::try_from(bytes.len()).map_err(failed)?;
            self.file.write_all(&len.to_le_bytes()).and_then(|()| self.file.write_all(bytes)).map_err(failed)?;
        }
        self.lists.clear();
        Ok(())
    }

    pub fn finish(mut self) -> Result<SpoolReader> {
        if let Some(page) = std::mem::take(&mut self.pages).finish() {
            self.write(&page)?;
        }
        let mut file = self.file.into_inner().map_err(failed)?;
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        Ok(SpoolReader { file: BufReader::with_capacity(256 << 10, file), entries: Vec::new().into_iter() })
    }
}

impl SpoolReader {
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        loop {
            if let Some(paged) = self.entries.next() {
                return Ok(Some(paged.entry));
            }
            let Some(page) = self.record()? else { return Ok(None) };
            let mut entries = page::decode_page(&page).map_err(failed)?;
            for paged in &mut entries {
                for _ in 0..paged.lists.len() {
                    let list = self.record()?.ok_or_else(|| failed("a list is missing"))?;
                    paged.entry.content.segments.extend(page::decode_list(&list).map_err(failed)?);
                }
            }
            self.entries = entries.into_iter();
        }
    }

    /// None at the end.
    fn record(&mut self) -> Result<Option<Vec<u8>>> {
        let mut len = [0; 4];
        match self.file.read_exact(&mut len) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(e) => return Err(failed(e)),
        }
        let mut bytes = vec![0; u32::from_le_bytes(len) as usize];
        self.file.read_exact(&mut bytes).map_err(failed)?;
        Ok(Some(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::entry::{Content, Extent, Kind, Segment};

    #[test]
    fn entries_come_back_with_all_their_segments() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = SpoolWriter::create(directory.path()).unwrap();
        let segment = |n: u32| Segment::Data(Extent { chunk: ChunkId(*blake3::hash(&n.to_le_bytes()).as_bytes()), offset: n, len: 7 });
        let entry = |n: u32| Entry {
            path: format!("{n:06}").into_bytes(),
            kind: Kind::File,
            size: u64::from(n) * 7,
            content: Content { hash: [1; 16], segments: (0..n).map(segment).collect() },
            ..Entry::default()
        };
        let numbers = [1, 2, 100, 20_000, 20_001, 200_000];
        for n in numbers {
            writer.push(entry(n)).unwrap();
        }
        let mut reader = writer.finish().unwrap();
        for n in numbers {
            assert_eq!(reader.next_entry().unwrap().unwrap(), entry(n));
        }
        assert!(reader.next_entry().unwrap().is_none());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
