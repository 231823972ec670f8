//! Writing a long file: what comes one after the other is gathered and goes past the page cache, so that a large restore does
//! not push out what the machine works with, and is on the disk as it goes along. The rest is written in the ordinary way.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// What memory, offset and length must be multiples of: enough for every disk in use.
const ALIGNMENT: u64 = 4096;
/// Gathered at the most.
const GATHER_BYTES: usize = 4 << 20;
/// Less at a time than this does not pay.
const WORTH_IT: usize = 256 << 10;
/// Shorter files are written in the ordinary way.
const MIN_BYTES: u64 = 4 << 20;

/// A file written at any offsets, mostly ascending ones.
pub struct LongFile {
    file: File,
    /// None: every piece is written as it comes.
    gathered: Option<Gathered>,
}

/// Bytes that came one after the other and are not written yet.
struct Gathered {
    memory: Vec<u8>,
    /// Where the aligned part of the memory begins.
    start: usize,
    len: usize,
    /// Of the first gathered byte in the file.
    offset: u64,
    /// Whether the file is in the mode that goes past the page cache, and whether it cannot be.
    direct: bool,
    unable: bool,
}

impl LongFile {
    pub fn new(file: File) -> Self {
        Self { file, gathered: None }
    }

    /// Gives the file its length, and decides how it is written.
    pub fn set_len(&mut self, len: u64) -> io::Result<()> {
        self.file.set_len(len)?;
        if len >= MIN_BYTES {
            let memory = vec![0; GATHER_BYTES + ALIGNMENT as usize];
            let start = memory.as_ptr().align_offset(ALIGNMENT as usize).min(ALIGNMENT as usize);
            self.gathered = Some(Gathered { memory, start, len: 0, offset: 0, direct: false, unable: false });
        }
        Ok(())
    }

    pub fn write_all_at(&mut self, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        let Some(gathered) = &mut self.gathered else { return self.file.write_all_at(bytes, offset) };
        while !bytes.is_empty() {
            if gathered.offset + gathered.len as u64 != offset {
                gathered.write(&self.file)?;
                gathered.offset = offset;
            }
            // A start between two blocks is made up for by a shorter first piece.
            let limit = GATHER_BYTES - (gathered.offset % ALIGNMENT) as usize;
            let (now, later) = bytes.split_at(bytes.len().min(limit - gathered.len));
            if let Some(place) = gathered.memory.get_mut(gathered.start + gathered.len..).and_then(|m| m.get_mut(..now.len())) {
                place.copy_from_slice(now);
            }
            gathered.len += now.len();
            offset += now.len() as u64;
            bytes = later;
            if gathered.len == limit {
                gathered.write(&self.file)?;
            }
        }
        Ok(())
    }

    /// Writes what is left; the file is then as any other.
    pub fn finish(mut self) -> io::Result<File> {
        if let Some(gathered) = &mut self.gathered {
            gathered.write(&self.file)?;
            gathered.switch(&self.file, false);
        }
        Ok(self.file)
    }
}

impl Gathered {
    fn write(&mut self, file: &File) -> io::Result<()> {
        let (len, offset) = (std::mem::take(&mut self.len), self.offset);
        self.offset += len as u64;
        let blocks = if offset.is_multiple_of(ALIGNMENT) { len - len % ALIGNMENT as usize } else { 0 };
        let mut done = 0;
        if blocks >= WORTH_IT && self.switch(file, true) {
            match file.write_all_at(self.bytes(0, blocks), offset) {
                Ok(()) => done = blocks,
                // This file system cannot, at least not here.
                Err(e) if e.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => self.unable = true,
                Err(e) => return Err(e),
            }
        }
        if done < len {
            self.switch(file, false);
            file.write_all_at(self.bytes(done, len), offset + done as u64)?;
        }
        Ok(())
    }

    fn bytes(&self, from: usize, to: usize) -> &[u8] {
        self.memory.get(self.start + from..self.start + to).unwrap_or_default()
    }

    /// Whether the file is in the wanted mode now.
    fn switch(&mut self, file: &File, direct: bool) -> bool {
        if self.direct != direct && !(direct && self.unable) {
            let flags = fcntl_getfl(file).map(|f| if direct { f.union(OFlags::DIRECT) } else { f.difference(OFlags::DIRECT) });
            match flags.and_then(|flags| fcntl_setfl(file, flags)) {
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
        let cuts: Vec<Vec<usize>> = vec![
            vec![],
            (1..13).map(|n| n << 20).collect(),
            (1..130).map(|n| n * 101_009).collect(),
            vec![1, 4097, 5000, 4 << 20, (8 << 20) + 1],
            (0..3300).map(|n| n * 4096).skip(1).collect(),
        ];
        for (n, cuts) in cuts.iter().enumerate() {
            for backwards in [false, true] {
                let path = dir.path().join(format!("{n}{backwards}"));
                let mut file = LongFile::new(File::create_new(&path).unwrap());
                file.set_len(whole.len() as u64).unwrap();
                let mut ranges: Vec<(usize, usize)> = Vec::new();
                let mut from = 0;
                for to in cuts.iter().copied().chain([whole.len()]) {
                    ranges.push((from, to));
                    from = to;
                }
                if backwards {
                    ranges.reverse();
                }
                for (from, to) in ranges {
                    file.write_all_at(&whole[from..to], from as u64).unwrap();
                }
                drop(file.finish().unwrap());
                assert!(std::fs::read(&path).unwrap() == whole, "{n} {backwards}");
            }
        }
    }
}
