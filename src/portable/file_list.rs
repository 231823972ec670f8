//! The list of an archive's regular files with their SHA-256, in the order in which they stand; kept in an unnamed file, for it may be as long as it likes.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use data_encoding::HEXLOWER;
use keepd_protocol::model::BytesPath;
use serde::{Deserialize, Serialize};

use super::{PortableError, Result};

/// Longer names, in bytes, are refused wherever they come from.
pub const MAX_NAME_BYTES: usize = 65_536;
/// Of a record: the length of the name (u32 LE), size (u64 LE), SHA-256; the name follows.
const RECORD: usize = 4 + 8 + 32;
const BUFFER: usize = 256 << 10;

/// A regular file of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLine {
    /// `<source>/<path>`, as the member is called.
    #[serde(flatten)]
    pub path: BytesPath,
    pub size: u64,
    /// 64 hexadecimal digits.
    pub sha256: String,
}

/// A line as it is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Line {
    pub name: Vec<u8>,
    pub size: u64,
    pub sha256: [u8; 32],
}

/// Takes the lines.
pub struct FileListWriter {
    out: BufWriter<File>,
    bytes: u64,
    lines: u64,
}

impl FileListWriter {
    /// `directory`: where the unnamed file lies.
    pub fn create(directory: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(directory).map_err(|e| {
            let text = format!("a temporary file for the list of files in {}: {e}", directory.display());
            PortableError::Io(io::Error::new(e.kind(), text))
        })?;
        Ok(Self { out: BufWriter::with_capacity(BUFFER, file), bytes: 0, lines: 0 })
    }

    /// An error too for a name of more than 65,536 bytes, and for a SHA-256 that is none.
    pub fn push(&mut self, line: &FileLine) -> Result<()> {
        let name = line.path.to_bytes().map_err(PortableError::Damaged)?;
        let sha256 = HEXLOWER.decode(line.sha256.as_bytes()).ok().and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
        let sha256 = sha256.ok_or_else(|| {
            PortableError::Damaged(format!("the list of files: {}: its SHA-256 is not 64 hexadecimal digits", shown(&name)))
        })?;
        self.push_line(&Line { name, size: line.size, sha256 })
    }

    pub(super) fn push_line(&mut self, line: &Line) -> Result<()> {
        let len = u32::try_from(line.name.len()).ok().filter(|_| line.name.len() <= MAX_NAME_BYTES);
        let len = len.ok_or_else(|| {
            PortableError::TooMuch(format!("the list of files: {}: the name is longer than {MAX_NAME_BYTES} bytes", shown(&line.name)))
        })?;
        let parts: [&[u8]; 4] = [&len.to_le_bytes(), &line.size.to_le_bytes(), &line.sha256, &line.name];
        for part in parts {
            self.out.write_all(part).map_err(spooled)?;
            self.bytes += part.len() as u64;
        }
        self.lines += 1;
        Ok(())
    }

    pub fn finish(self) -> Result<FileList> {
        let file = self.out.into_inner().map_err(|e| spooled(e.into_error()))?;
        Ok(FileList { file: Arc::new(file), end: self.bytes, at: 0, lines: self.lines, buffer: Vec::new(), taken: 0 })
    }
}

/// Gives the lines again, from the first.
pub struct FileList {
    file: Arc<File>,
    end: u64,
    /// How far the file was read into the buffer.
    at: u64,
    lines: u64,
    buffer: Vec<u8>,
    taken: usize,
}

impl FileList {
    pub fn next_line(&mut self) -> Result<Option<FileLine>> {
        let line = self.next()?;
        Ok(line.map(|line| FileLine { path: BytesPath::from_bytes(&line.name), size: line.size, sha256: HEXLOWER.encode(&line.sha256) }))
    }

    pub(super) fn next(&mut self) -> Result<Option<Line>> {
        if self.at == self.end && self.taken == self.buffer.len() {
            return Ok(None);
        }
        let mut record = [0; RECORD];
        self.fill(&mut record)?;
        let [a, b, c, d, rest @ ..] = record;
        let mut name = vec![0; (u32::from_le_bytes([a, b, c, d]) as usize).min(MAX_NAME_BYTES)];
        self.fill(&mut name)?;
        let (size, sha256) = rest.split_first_chunk::<8>().ok_or_else(|| spooled(io::ErrorKind::UnexpectedEof.into()))?;
        let sha256 = sha256.first_chunk().copied().unwrap_or_default();
        Ok(Some(Line { name, size: u64::from_le_bytes(*size), sha256 }))
    }

    fn fill(&mut self, mut into: &mut [u8]) -> Result<()> {
        while !into.is_empty() {
            let have = self.buffer.get(self.taken..).unwrap_or_default();
            if have.is_empty() {
                let want = (self.end - self.at).min(BUFFER as u64) as usize;
                self.buffer.resize(want, 0);
                self.taken = 0;
                if want == 0 {
                    return Err(spooled(io::ErrorKind::UnexpectedEof.into()));
                }
                self.file.read_exact_at(&mut self.buffer, self.at).map_err(spooled)?;
                self.at += want as u64;
                continue;
            }
            let n = have.len().min(into.len());
            let (now, later) = into.split_at_mut(n);
            now.copy_from_slice(have.get(..n).unwrap_or_default());
            self.taken += n;
            into = later;
        }
        Ok(())
    }

    /// The same list, from its first line.
    pub fn again(&self) -> Self {
        Self { file: self.file.clone(), end: self.end, at: 0, lines: self.lines, buffer: Vec::new(), taken: 0 }
    }

    /// How many there are in all.
    pub fn len(&self) -> u64 {
        self.lines
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A name as it can be shown: nothing in it steers a terminal.
pub(super) fn shown(name: &[u8]) -> String {
    const SHOWN: usize = 300;
    let text: String = String::from_utf8_lossy(name.get(..SHOWN).unwrap_or(name)).chars().flat_map(char::escape_debug).collect();
    if name.len() > SHOWN { format!("'{text}…'") } else { format!("'{text}'") }
}

fn spooled(e: io::Error) -> PortableError {
    PortableError::Io(io::Error::new(e.kind(), format!("the temporary file with the list of files: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_back_as_often_as_they_are_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = FileListWriter::create(dir.path()).unwrap();
        let lines: Vec<FileLine> = (0..20_000u64)
            .map(|i| FileLine {
                path: BytesPath::from_bytes(&[b"files/\xff".as_slice(), i.to_string().as_bytes(), &vec![b'x'; i as usize % 300]].concat()),
                size: i << 30,
                sha256: HEXLOWER.encode(&[i as u8; 32]),
            })
            .collect();
        for line in &lines {
            writer.push(line).unwrap();
        }
        let mut list = writer.finish().unwrap();
        assert_eq!(list.len(), 20_000);
        for _ in 0..2 {
            for line in &lines {
                assert_eq!(list.next_line().unwrap().as_ref(), Some(line));
            }
            assert_eq!(list.next_line().unwrap(), None);
            list = list.again();
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing with a name");
    }

    #[test]
    fn what_is_no_line_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = FileListWriter::create(dir.path()).unwrap();
        let line = FileLine { path: "a/b".into(), size: 1, sha256: "0".repeat(64) };
        for sha256 in ["", "0", &"0".repeat(66), &"A".repeat(64), &"x".repeat(64)] {
            assert!(matches!(writer.push(&FileLine { sha256: sha256.to_owned(), ..line.clone() }), Err(PortableError::Damaged(_))));
        }
        let long = FileLine { path: BytesPath::from_bytes(&vec![b'a'; MAX_NAME_BYTES + 1]), ..line };
        assert!(matches!(writer.push(&long), Err(PortableError::TooMuch(_))));
        assert!(writer.finish().unwrap().is_empty());
    }
}
