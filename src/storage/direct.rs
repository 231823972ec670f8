//! Large objects go past the page cache: a backup must not push out what the machine's applications work with, and a copy
//! into fresh pages costs the kernel more than everything else (on a virtual machine that has to ask its host for them, ten
//! times as much). What lies in the page cache already is read from there.

use std::fs::File;
use std::io::{self, IoSliceMut, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use bytes::Bytes;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

/// What memory, offset and length must be multiples of: enough for every disk in use.
pub const ALIGNMENT: usize = 4096;
/// Shorter ones are better off in the page cache: to write, and to read.
const MIN_WRITTEN: usize = 1 << 20;
const MIN_READ: usize = 128 << 10;
/// Written at a time: a disk that was given all at once makes everybody else's fsync wait for it.
const PIECE_BYTES: usize = 1 << 20;

/// A new file with these bytes, synced; `before` is called with the length of each piece before it is written, and pieces of a large file
/// are not longer than `piece` (and no longer than a disk should be given at once).
pub fn write_new(path: &Path, bytes: &[u8], piece: usize, before: &dyn Fn(usize)) -> io::Result<()> {
    let aligned = bytes.as_ptr().align_offset(ALIGNMENT) == 0;
    if bytes.len() >= MIN_WRITTEN && aligned {
        match direct_write_new(path, bytes, piece, before) {
            // The file system does not know O_DIRECT (a few network ones, older tmpfs).
            Err(e) if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => drop(std::fs::remove_file(path)),
            other => return other,
        }
    }
    let mut file = File::create_new(path)?;
    before(bytes.len());
    file.write_all(bytes)?;
    file.sync_all()
}

fn direct_write_new(path: &Path, bytes: &[u8], piece: usize, before: &dyn Fn(usize)) -> io::Result<()> {
    let mut file = File::options().write(true).create_new(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path)?;
    let (blocks, tail) = bytes.split_at(bytes.len() - bytes.len() % ALIGNMENT);
    let piece = piece.next_multiple_of(ALIGNMENT).clamp(ALIGNMENT, PIECE_BYTES);
    blocks.chunks(piece).try_for_each(|piece| {
        before(piece.len());
        file.write_all(piece)
    })?;
    if !tail.is_empty() {
        // The last piece of a block cannot be written so.
        fcntl_setfl(&file, fcntl_getfl(&file)?.difference(OFlags::DIRECT))?;
        file.write_all(tail)?;
    }
    file.sync_all()
}

/// Memory that is read into, again and again; gives what was read last.
#[derive(Default)]
pub struct ReadBuffer {
    memory: Vec<u8>,
    first: usize,
    len: usize,
}

impl ReadBuffer {
    /// Room for `len` bytes, `skipped` bytes behind an aligned place; returns where that place is.
    fn prepare(&mut self, skipped: usize, len: usize) -> usize {
        let room = (skipped + len).next_multiple_of(ALIGNMENT) + ALIGNMENT;
        if self.memory.len() < room {
            self.memory = vec![0; room];
        }
        let start = self.memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        (self.first, self.len) = (start + skipped, len);
        start
    }

    /// Room for `len` bytes, to be filled.
    pub fn place(&mut self, len: usize) -> &mut [u8] {
        self.prepare(0, len);
        self.wanted()
    }

    fn wanted(&mut self) -> &mut [u8] {
        self.memory.get_mut(self.first..self.first + self.len).unwrap_or_default()
    }
}

impl std::ops::Deref for ReadBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.get(self.first..self.first + self.len).unwrap_or_default()
    }
}

impl From<ReadBuffer> for Bytes {
    fn from(buffer: ReadBuffer) -> Self {
        Bytes::from(buffer.memory).slice(buffer.first..buffer.first + buffer.len)
    }
}

/// Exactly `len` bytes from `offset`; the file must be that long.
pub fn read_exact_at(file: &File, offset: u64, len: usize, buffer: &mut ReadBuffer) -> io::Result<()> {
    let skipped = if len >= MIN_READ { (offset % ALIGNMENT as u64) as usize } else { 0 };
    // The bytes wanted come to stand at the same place whichever way they are read.
    let start = buffer.prepare(skipped, len);
    if len >= MIN_READ {
        let cached = |place: &mut [u8], offset| preadv2(file, &mut [IoSliceMut::new(place)], offset, ReadWriteFlags::NOWAIT);
        // One byte from the middle is asked for first: where it is not cached the kernel begins to read ahead, for a read from the
        // start as much as it ever does, and everything would be read twice.
        if cached(&mut [0], offset + len as u64 / 2) == Ok(1) && cached(buffer.wanted(), offset) == Ok(len) {
            return Ok(());
        }
        let room = (skipped + len).next_multiple_of(ALIGNMENT);
        if let Some(blocks) = buffer.memory.get_mut(start..start + room)
            && direct_read(file, offset - skipped as u64, blocks, skipped + len)
        {
            return Ok(());
        }
    }
    file.read_exact_at(buffer.wanted(), offset)
}

/// Reads blocks past the page cache, at least `needed` bytes of them; false when that is not possible here.
fn direct_read(file: &File, offset: u64, blocks: &mut [u8], needed: usize) -> bool {
    let Ok(flags) = fcntl_getfl(file) else { return false };
    if fcntl_setfl(file, flags.union(OFlags::DIRECT)).is_err() {
        return false;
    }
    let mut at = 0;
    while at < needed {
        // A read that ends within a block has met the end of the file.
        match blocks.get_mut(at..).map(|rest| file.read_at(rest, offset + at as u64)) {
            Some(Ok(n)) if n > 0 && (n % ALIGNMENT == 0 || at + n >= needed) => at += n,
            _ => break,
        }
    }
    at >= needed && fcntl_setfl(file, flags).is_ok() || {
        // Whoever reads on does so in the ordinary way.
        let _ = fcntl_setfl(file, flags);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_length_at_any_offset_comes_back() {
        // Not in /tmp, which may be a tmpfs.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let mut buffer = ReadBuffer::default();
        let memory: Vec<u8> = (0..(5 << 20) + 8192u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        for (n, (from, len)) in
            [(start, 4 << 20), (start, (4 << 20) + 1), (start, (3 << 20) + 4095), (start + 1, 2 << 20), (start, 100), (start, 0)]
                .into_iter()
                .enumerate()
        {
            let (path, bytes) = (dir.path().join(n.to_string()), &memory[from..from + len]);
            write_new(&path, bytes, 1 << 20, &|_| ()).unwrap();
            assert_eq!(write_new(&path, bytes, 1 << 20, &|_| ()).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
            let file = File::open(&path).unwrap();
            for warm in [false, true] {
                if warm {
                    assert_eq!(std::fs::read(&path).unwrap(), bytes);
                }
                for cut in [0, 1, 64, 4096, 5000] {
                    for short in [0, 1, 4095] {
                        if cut + short <= len {
                            let end = len - short;
                            read_exact_at(&file, cut as u64, end - cut, &mut buffer).unwrap();
                            assert!(buffer[..] == bytes[cut..end], "{len}: {cut}..{end}");
                        }
                    }
                }
            }
            assert!(read_exact_at(&file, 1, len.max(1), &mut buffer).is_err(), "beyond the end");
        }
    }
}
