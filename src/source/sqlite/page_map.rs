//! The page map: a hash of each page as captured last, so that the next capture stores only pages that changed.
//!
//! A cache of this machine: `magic | 16 bytes for each page | JSON | JSON length (u32 LE) | BLAKE3 of all before`. It is
//! tied to the last backup's entry by its content hash; one that is lost, damaged or of another backup is made anew
//! from the repository.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};

use super::signature::Signature;
use crate::repository::Entry;
use crate::source::Facts;

const MAGIC: &[u8; 16] = b"keepd page map 1";
const TAIL: u64 = 4 + 32;
pub type PageHash = [u8; 16];

#[derive(Serialize, Deserialize)]
struct Description {
    page_size: usize,
    page_count: u64,
    content: String,
    signature: Option<Signature>,
    facts: Facts,
}

/// A map that belongs to the last backup.
pub struct PageMap {
    pub page_size: usize,
    pub page_count: u64,
    pub signature: Option<Signature>,
    pub facts: Facts,
    hashes: BufReader<File>,
}

pub fn hash_page(page: &[u8]) -> PageHash {
    blake3::hash(page).as_bytes().first_chunk().copied().unwrap_or_default()
}

fn file_name(dir: &Path) -> PathBuf {
    dir.join("page-map")
}

impl PageMap {
    /// The map of the last backup's entry; None when there is none that fits.
    pub fn load(dir: &Path, before: Option<&Entry>) -> Option<Self> {
        let before = before?;
        let mut file = File::open(file_name(dir)).ok()?;
        let size = file.metadata().ok()?.len();
        let body = size.checked_sub(32)?;
        // Whole and undamaged, or not at all.
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader((&mut file).take(body)).ok()?;
        let mut sum = [0u8; 32];
        file.read_exact(&mut sum).ok()?;
        if hasher.finalize() != sum {
            return None;
        }
        let mut len = [0u8; 4];
        file.seek(SeekFrom::Start(body.checked_sub(4)?)).ok()?;
        file.read_exact(&mut len).ok()?;
        let start = size.checked_sub(TAIL + u64::from(u32::from_le_bytes(len)))?;
        file.seek(SeekFrom::Start(start)).ok()?;
        let mut json = vec![0u8; u32::from_le_bytes(len) as usize];
        file.read_exact(&mut json).ok()?;
        let description: Description = serde_json::from_slice(&json).ok()?;
        let mut magic = [0u8; 16];
        file.rewind().ok()?;
        file.read_exact(&mut magic).ok()?;
        let fits = magic == *MAGIC
            && description.content == HEXLOWER.encode(&before.content.hash)
            && start == 16 + description.page_count * 16
            && description.page_count * description.page_size as u64 == before.size;
        let Description { page_size, page_count, signature, facts, .. } = description;
        fits.then(|| Self { page_size, page_count, signature, facts, hashes: BufReader::with_capacity(64 << 10, file) })
    }

    /// The next page's hash, in order.
    pub fn next_hash(&mut self) -> io::Result<PageHash> {
        let mut hash = [0u8; 16];
        self.hashes.read_exact(&mut hash)?;
        Ok(hash)
    }
}

/// Writes a new map beside the old one and puts it in its place at the end.
pub struct PageMapWriter {
    dir: PathBuf,
    out: BufWriter<File>,
    sum: blake3::Hasher,
}

impl PageMapWriter {
    pub fn new(dir: &Path) -> io::Result<Self> {
        let mut writer =
            Self { dir: dir.to_owned(), out: BufWriter::new(File::create(dir.join("page-map.new"))?), sum: blake3::Hasher::new() };
        writer.write(MAGIC)?;
        Ok(writer)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sum.update(bytes);
        self.out.write_all(bytes)
    }

    /// Adds hashes of the next pages.
    pub fn push(&mut self, hashes: &[PageHash]) -> io::Result<()> {
        self.write(hashes.as_flattened())
    }

    pub fn finish(
        mut self,
        page_size: usize,
        page_count: u64,
        content: &[u8; 16],
        signature: Option<Signature>,
        facts: Facts,
    ) -> io::Result<()> {
        let description = Description { page_size, page_count, content: HEXLOWER.encode(content), signature, facts };
        let json = serde_json::to_vec(&description)?;
        self.write(&json)?;
        self.write(&(json.len() as u32).to_le_bytes())?;
        let sum = self.sum.finalize();
        self.out.write_all(sum.as_bytes())?;
        self.out.flush()?;
        std::fs::rename(self.dir.join("page-map.new"), file_name(&self.dir))
    }
}
