//! Entries between two passes over a source, in a file without a name on this machine.
//!
//! The file holds pages as the repository has them, each behind its length (u32, little-endian), with the segments of long contents inside.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use super::entry::Entry;
use super::error::{RepositoryError, Result};
use super::page::{self, BuiltPage, PageBuilder, PagedEntry};

/// Takes entries in path order.
pub struct SpoolWriter {
    file: BufWriter<File>,
    pages: PageBuilder,
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
        Ok(Self { file: BufWriter::with_capacity(256 << 10, file), pages: PageBuilder::default() })
    }

    pub fn push(&mut self, entry: Entry) -> Result<()> {
        match self.pages.push(&PagedEntry { entry, lists: Vec::new() }) {
            Some(page) => self.write(&page),
            None => Ok(()),
        }
    }

    fn write(&mut self, page: &BuiltPage) -> Result<()> {
        let len = u32::try_from(page.bytes.len()).map_err(failed)?;
        self.file.write_all(&len.to_le_bytes()).and_then(|()| self.file.write_all(&page.bytes)).map_err(failed)
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
            let mut len = [0; 4];
            match self.file.read_exact(&mut len) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(e) => return Err(failed(e)),
            }
            let mut page = vec![0; u32::from_le_bytes(len) as usize];
            self.file.read_exact(&mut page).map_err(failed)?;
            self.entries = page::decode_page(&page).map_err(failed)?.into_iter();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::ChunkId;
    use crate::repository::entry::{Content, Extent, Kind, Segment};

    #[test]
    fn entries_come_back_with_all_their_segments() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = SpoolWriter::create(directory.path()).unwrap();
        let segment = |n: u32| Segment::Data(Extent { chunk: ChunkId([n as u8; 32]), offset: n, len: 7 });
        let entry = |n: u32| Entry {
            path: format!("{n:06}").into_bytes(),
            kind: Kind::File,
            size: u64::from(n) * 7,
            content: Content { hash: [1; 16], segments: (0..n).map(segment).collect() },
            ..Entry::default()
        };
        let numbers = [1, 2, 100, 20_000, 20_001];
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
