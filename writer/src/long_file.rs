//! Writing a long file: what comes one after the other is gathered in blocks and goes past the page cache, so that a large
//! restore does not push out what the machine works with, and is on the disk as it goes along. The rest is written in the
//! ordinary way.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// What memory, offset and length must be multiples of: enough for every disk in use.
const ALIGNMENT: usize = 4096;
/// A block's length.
const BLOCK_BYTES: usize = 4 << 20;
/// Less at a time than this does not pay.
const WORTH_IT: usize = 256 << 10;
/// Shorter files are written in the ordinary way.
pub const LONG_BYTES: u64 = 4 << 20;

/// Memory for consecutive bytes of a file, aligned so that they can go past the page cache.
pub struct Block {
    memory: Vec<u8>,
    start: usize,
    len: usize,
    /// Of the first byte in the file.
    offset: u64,
}

impl Block {
    pub fn new() -> Self {
        let memory = vec![0; BLOCK_BYTES + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { memory, start, len: 0, offset: 0 }
    }

    /// Empties it for bytes from `offset` on.
    pub fn begin(&mut self, offset: u64) {
        (self.len, self.offset) = (0, offset);
    }

    /// Where the next bytes go. Empty when it is full: at a place in the file where the next block can be aligned.
    pub fn room(&mut self) -> &mut [u8] {
        let limit = BLOCK_BYTES - (self.offset % ALIGNMENT as u64) as usize;
        self.memory.get_mut(self.start + self.len..self.start + limit).unwrap_or_default()
    }

    /// So many bytes were put into the room.
    pub fn filled(&mut self, len: usize) {
        self.len += len;
    }

    pub fn offset(&self) -> u64 {
        self.offset
    }

    pub fn bytes(&self) -> &[u8] {
        self.memory.get(self.start..self.start + self.len).unwrap_or_default()
    }
}

/// A file written at any offsets, mostly ascending ones.
pub struct LongFile {
    file: File,
    /// Whether the file is in the mode that goes past the page cache, and whether it cannot be.
    direct: bool,
    unable: bool,
}

impl LongFile {
    pub fn new(file: File) -> Self {
        Self { file, direct: false, unable: false }
    }

    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    pub fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let aligned = offset.is_multiple_of(ALIGNMENT as u64) && bytes.as_ptr().align_offset(ALIGNMENT) == 0;
        let (blocks, rest) = bytes.split_at(if aligned { bytes.len() - bytes.len() % ALIGNMENT } else { 0 });
        if blocks.len() >= WORTH_IT && self.switch(true) {
            match self.file.write_all_at(blocks, offset) {
                Ok(()) if rest.is_empty() => return Ok(()),
                Ok(()) => {
                    self.switch(false);
                    return self.file.write_all_at(rest, offset + blocks.len() as u64);
                }
                // This file system cannot, at least not here.
                Err(e) if e.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => self.unable = true,
                Err(e) => return Err(e),
            }
        }
        self.switch(false);
        self.file.write_all_at(bytes, offset)
    }

    /// The file, as any other.
    pub fn finish(mut self) -> File {
        self.switch(false);
        self.file
    }

    /// Whether the file is in the wanted mode now.
    fn switch(&mut self, direct: bool) -> bool {
        if self.direct != direct && !(direct && self.unable) {
            let flags = fcntl_getfl(&self.file).map(|f| if direct { f.union(OFlags::DIRECT) } else { f.difference(OFlags::DIRECT) });
            match flags.and_then(|flags| fcntl_setfl(&self.file, flags)) {
                Ok(()) => self.direct = direct,
                Err(_) => self.unable = true,
            }
        }
        self.direct == direct
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_at_any_offset_make_the_file() {
        // Not in /tmp, which may be a tmpfs.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let whole: Vec<u8> = (0..(13 << 20) + 777u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
        for (n, first) in [0usize, 1, 4095, 4096, 5000, 4 << 20].into_iter().enumerate() {
            let mut file = LongFile::new(File::create_new(dir.path().join(n.to_string())).unwrap());
            file.set_len(whole.len() as u64).unwrap();
            file.write_all_at(&whole[..first], 0).unwrap();
            let (mut at, mut block) = (first, Block::new());
            while at < whole.len() {
                block.begin(at as u64);
                loop {
                    let room = block.room();
                    let now = room.len().min(777_777).min(whole.len() - at);
                    if now == 0 {
                        break;
                    }
                    room[..now].copy_from_slice(&whole[at..at + now]);
                    block.filled(now);
                    at += now;
                }
                assert!(at == whole.len() || at.is_multiple_of(ALIGNMENT), "the next block can be aligned");
                file.write_all_at(block.bytes(), block.offset()).unwrap();
            }
            drop(file.finish());
            assert!(std::fs::read(dir.path().join(n.to_string())).unwrap() == whole, "{first}");
        }
    }
}
