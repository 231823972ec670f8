//! The page map: a cache file with the hash of every page of the last capture, and what else the next one can use.
//!
//! `MAGIC`, 16 bytes for each page, the footer (JSON), its length (u32, little-endian), its BLAKE3 (32 bytes). The map belongs to
//! one content: the hash over its page hashes is that of the previous entry, or it is not used. So it needs no other checksum, and it does
//! not matter whether the backup it was written for was committed. It is read and written as a stream.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use super::signature::Signature;
use crate::source::Facts;

pub const FILE_NAME: &str = "pagemap";
const MAGIC: &[u8; 16] = b"keepd page map1\n";
pub const HASH_BYTES: usize = 16;
const TAIL_BYTES: u64 = 4 + 32;
/// Facts of some hundred tables are far below.
const MAX_FOOTER_BYTES: u64 = 4 << 20;
const BUFFER_BYTES: usize = 64 << 10;

pub type PageHash = [u8; HASH_BYTES];

pub fn hash_page(page: &[u8]) -> PageHash {
    first_bytes(&blake3::hash(page))
}

fn first_bytes(hash: &blake3::Hash) -> PageHash {
    let mut first = [0; HASH_BYTES];
    first.copy_from_slice(&hash.as_bytes()[..HASH_BYTES]);
    first
}

/// The hash of a content, from those of its pages: equal for equal contents.
pub struct ContentHasher(blake3::Hasher);

impl ContentHasher {
    pub fn new(page_size: u32) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("keepd sqlite content 1");
        hasher.update(&page_size.to_le_bytes());
        Self(hasher)
    }

    pub fn update(&mut self, hashes: &[u8]) {
        self.0.update(hashes);
    }

    pub fn finish(&self) -> PageHash {
        first_bytes(&self.0.finalize())
    }
}

/// What the map says besides hashes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Footer {
    pub page_size: u32,
    pub page_count: u64,
    pub content: PageHash,
    /// Of the database as it was captured; None when it changed just then.
    pub signature: Option<Signature>,
    /// How many pages the last capture stored.
    pub stored_pages: u64,
    pub facts: Facts,
}

/// The footer alone, from which an unchanged database is told. None: there is none, or none that can be used.
pub fn read_footer(cache_dir: &Path) -> Option<Footer> {
    footer_of(&File::open(cache_dir.join(FILE_NAME)).ok()?).ok()
}

fn footer_of(mut file: &File) -> io::Result<Footer> {
    let bad = || io::Error::from(io::ErrorKind::InvalidData);
    let total = file.metadata()?.len();
    let mut tail = [0; TAIL_BYTES as usize];
    file.seek(SeekFrom::Start(total.checked_sub(TAIL_BYTES).ok_or_else(bad)?))?;
    file.read_exact(&mut tail)?;
    let (len, hash) = tail.split_at(4);
    let len = u64::from(u32::from_le_bytes(len.try_into().map_err(|_| bad())?));
    let start = total.checked_sub(TAIL_BYTES + len).filter(|_| len <= MAX_FOOTER_BYTES).ok_or_else(bad)?;
    file.seek(SeekFrom::Start(start))?;
    let mut json = vec![0; len as usize];
    file.read_exact(&mut json)?;
    if blake3::hash(&json) != *<&[u8; 32]>::try_from(hash).map_err(|_| bad())? {
        return Err(bad());
    }
    let footer: Footer = serde_json::from_slice(&json)?;
    let hashes = footer.page_count.checked_mul(HASH_BYTES as u64).ok_or_else(bad)?;
    if hashes.checked_add(MAGIC.len() as u64) != Some(start) {
        return Err(bad());
    }
    let mut magic = [0; MAGIC.len()];
    file.seek(SeekFrom::Start(0))?;
    file.read_exact(&mut magic)?;
    if &magic == MAGIC { Ok(footer) } else { Err(bad()) }
}

/// Reads the hashes of a map in page order.
pub struct MapReader {
    file: BufReader<File>,
    pub page_size: u32,
    pub page_count: u64,
    next: u64,
}

impl MapReader {
    /// The map of exactly this content, if it is there and whole.
    pub fn open(cache_dir: &Path, content: PageHash) -> Option<Self> {
        let file = File::open(cache_dir.join(FILE_NAME)).ok()?;
        let footer = footer_of(&file).ok().filter(|footer| footer.content == content)?;
        let mut reader = Self::new(file, footer.page_size, footer.page_count).ok()?;
        let mut hasher = ContentHasher::new(reader.page_size);
        let mut left = reader.page_count * HASH_BYTES as u64;
        let mut buffer = vec![0; BUFFER_BYTES];
        while left > 0 {
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            reader.file.read_exact(&mut buffer[..len]).ok()?;
            hasher.update(&buffer[..len]);
            left -= len as u64;
        }
        if hasher.finish() != content {
            return None;
        }
        reader.restart().ok()?;
        Some(reader)
    }

    fn new(file: File, page_size: u32, page_count: u64) -> io::Result<Self> {
        let mut reader = Self { file: BufReader::with_capacity(BUFFER_BYTES, file), page_size, page_count, next: 0 };
        reader.restart()?;
        Ok(reader)
    }

    /// Back to the first page.
    pub fn restart(&mut self) -> io::Result<()> {
        self.next = 0;
        self.file.seek(SeekFrom::Start(MAGIC.len() as u64)).map(drop)
    }

    /// None after the last page; an error counts as one, the pages are then stored anew.
    pub fn next_hash(&mut self) -> Option<PageHash> {
        if self.next >= self.page_count {
            return None;
        }
        let mut hash = PageHash::default();
        if self.file.read_exact(&mut hash).is_err() {
            self.page_count = self.next;
            return None;
        }
        self.next += 1;
        Some(hash)
    }
}

/// Writes a new map beside the old one.
pub struct MapWriter {
    file: BufWriter<NamedTempFile>,
    page_size: u32,
    page_count: u64,
}

impl MapWriter {
    pub fn create(cache_dir: &Path, page_size: u32) -> io::Result<Self> {
        let named = tempfile::Builder::new().prefix("pagemap-").tempfile_in(cache_dir)?;
        let mut file = BufWriter::with_capacity(BUFFER_BYTES, named);
        file.write_all(MAGIC)?;
        Ok(Self { file, page_size, page_count: 0 })
    }

    pub fn write(&mut self, hash: &PageHash) -> io::Result<()> {
        self.page_count += 1;
        self.file.write_all(hash)
    }

    /// The hashes written so far, without making them the map.
    pub fn into_reader(self) -> io::Result<MapReader> {
        let named = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        MapReader::new(named.into_file(), self.page_size, self.page_count)
    }

    /// Replaces the map. It is a cache: it is not waited for until it is on disk, a torn one is noticed.
    pub fn finish(mut self, cache_dir: &Path, footer: &Footer) -> io::Result<()> {
        let json = serde_json::to_vec(footer)?;
        self.file.write_all(&json)?;
        self.file.write_all(&u32::try_from(json.len()).map_err(io::Error::other)?.to_le_bytes())?;
        self.file.write_all(blake3::hash(&json).as_bytes())?;
        let named = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        named.persist(cache_dir.join(FILE_NAME)).map(drop).map_err(|e| e.error)
    }
}
