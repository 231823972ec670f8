//! Reading one file: whole, cut or with holes; read again once when it changes meanwhile.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use keepd_protocol::model::Level;
use rustix::buffer::spare_capacity;
use rustix::fs::{FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;

use super::ahead::ReadAhead;
use super::walk::name_of;
use super::{Capture, described};
use crate::repository::entry::SMALL_FILE_BYTES;
use crate::repository::{Entry, Kind};
use crate::source::SourceError;

const READ_BYTES: usize = 1 << 20;
/// A longer value is no attribute anybody needs back.
const MAX_XATTR_BYTES: usize = 64 << 10;

/// What one pass over a file gave.
enum Pass {
    Whole,
    Failed(Errno),
}

impl Capture<'_> {
    /// Reads a new or changed file; false when it is left out or vanished.
    pub(super) fn read_file(&mut self, parent: BorrowedFd<'_>, name: Option<&[u8]>, path: Vec<u8>) -> Result<bool, SourceError> {
        let fd = match open_file(parent, name.unwrap_or(name_of(&path))) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => {
                self.vanished(&path)?;
                return Ok(false);
            }
            // A symlink or something else took its place since the directory was listed.
            Err(Errno::LOOP | Errno::NXIO) => {
                return self.exchanged(&path);
            }
            Err(e) => {
                self.left_out(&path, "open", e)?;
                return Ok(false);
            }
        };
        match rustix::fs::fstat(&fd) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => self.read_opened(fd, stat, path),
            Ok(_) => self.exchanged(&path),
            Err(e) => {
                self.left_out(&path, "look at", e)?;
                Ok(false)
            }
        }
    }

    /// Reads a file from its start that is open and is a file; `before` is what it was when it was opened.
    pub(super) fn read_opened(&mut self, fd: OwnedFd, mut before: Stat, path: Vec<u8>) -> Result<bool, SourceError> {
        for again in [false, true] {
            let size = before.st_size as u64;
            let small = size <= SMALL_FILE_BYTES;
            if !self.sink.wants(size, before.st_nlink) {
                let mut entry = described(path, Kind::File, &before);
                entry.size = size;
                entry.xattrs = self.xattrs_of(&fd, &entry.path);
                return self.emit(entry).map(|()| true);
            }
            let passed_on = !small && self.sink.passes_on();
            let mut xattrs = None;
            if passed_on {
                let mut entry = described(path.clone(), Kind::File, &before);
                entry.xattrs = self.xattrs_of(&fd, &entry.path);
                self.sink.begins(&entry, Some(size))?;
                xattrs = Some(entry.xattrs);
            }
            let pass = if small { self.read_small(&fd, size) } else { self.read_large(&fd, &before)? };
            if let Pass::Failed(e) = pass {
                if passed_on {
                    // Its beginning is on its way already.
                    let text =
                        format!("{} could not be read to its end ({e}): what is missing stands as zeros in the archive", self.shown(&path));
                    self.context.report.left_out(text);
                    let entry = described(path, Kind::File, &before);
                    return self.keep(Entry { changed_while_read: true, ..entry }, small).map(|()| true);
                }
                self.left_out(&path, "read", e)?;
                return Ok(false);
            }
            let after = match rustix::fs::fstat(&fd) {
                Ok(stat) => stat,
                Err(e) => {
                    self.left_out(&path, "look at", e)?;
                    return Ok(false);
                }
            };
            let changed = is_other(&before, &after);
            if changed && !again && !passed_on {
                before = after;
                continue;
            }
            let mut entry = described(path, Kind::File, &before);
            entry.xattrs = match xattrs {
                Some(xattrs) => xattrs,
                None => self.xattrs_of(&fd, &entry.path),
            };
            entry.changed_while_read = changed;
            if changed {
                self.counts.changed += 1;
                let times = if passed_on { "" } else { ", twice" };
                let text = format!("{} changed while it was read{times}; its contents may be of two moments", self.shown(&entry.path));
                self.context.report.message(Level::Warning, text);
            }
            return self.keep(entry, small).map(|()| true);
        }
        Ok(false)
    }

    /// Takes what was read ahead.
    pub(super) fn take_read(&mut self, path: Vec<u8>, read: ReadAhead, bytes: &[u8]) -> Result<(), SourceError> {
        let contents = bytes.get(read.contents).unwrap_or_default();
        let mut entry = described(path, Kind::File, &read.stat);
        entry.xattrs = read.xattrs;
        if !self.sink.wants(contents.len() as u64, read.stat.st_nlink) {
            entry.size = contents.len() as u64;
            return self.emit(entry);
        }
        self.context.report.entry();
        self.given += 1;
        self.context.report.bytes(contents.len() as u64);
        Ok(self.sink.push_small(entry, contents)?)
    }

    fn exchanged(&mut self, path: &[u8]) -> Result<bool, SourceError> {
        let text = format!("{} was exchanged for something else while the directory was walked", self.shown(path));
        self.context.report.message(Level::Warning, text);
        self.sink.left_out(path)?;
        Ok(false)
    }

    fn keep(&mut self, entry: Entry, small: bool) -> Result<(), SourceError> {
        self.context.report.entry();
        self.given += 1;
        if small {
            self.context.report.bytes(self.filled as u64);
            match self.in_sink {
                true => self.sink.push_small_appended(entry)?,
                false => self.sink.push_small(entry, &self.buffer)?,
            }
        } else {
            self.sink.large_finish(entry)?;
        }
        Ok(())
    }

    /// The whole file to where the sink gathers, else into the buffer; at most `size` bytes.
    fn read_small(&mut self, fd: &OwnedFd, size: u64) -> Pass {
        let memory = self.sink.small_memory(size as usize);
        self.in_sink = memory.is_some();
        let memory = memory.unwrap_or_else(|| {
            self.buffer.clear();
            &mut self.buffer
        });
        match append(fd, memory, size as usize) {
            Ok(n) => {
                self.filled = n;
                Pass::Whole
            }
            Err(e) => Pass::Failed(e),
        }
    }

    /// The file into the sink; never more than it was long when it was opened, however it grows.
    fn read_large(&mut self, fd: &OwnedFd, stat: &Stat) -> Result<Pass, SourceError> {
        let size = stat.st_size as u64;
        let sparse = (stat.st_blocks as u64).saturating_mul(512) < size;
        self.sink.large_begin()?;
        let mut at = 0u64;
        while at < size {
            let (start, end) = match if sparse { next_data(fd, at, size) } else { Ok((at, size)) } {
                Ok(range) => range,
                Err(e) => return Ok(Pass::Failed(e)),
            };
            if start > at {
                self.sink.large_hole(start - at)?;
                self.context.report.bytes(start - at);
            }
            at = start;
            if let Err(e) = rustix::fs::seek(fd, SeekFrom::Start(at)) {
                return Ok(Pass::Failed(e));
            }
            while at < end {
                if self.context.cancel.is_cancelled() {
                    return Err(SourceError::Cancelled);
                }
                let space = self.sink.large_space(READ_BYTES.min((end - at) as usize));
                let n = match rustix::io::read(fd, space) {
                    // It became shorter: what was read is what there is.
                    Ok(0) => return Ok(Pass::Whole),
                    Ok(n) => n,
                    Err(Errno::INTR) => continue,
                    Err(e) => return Ok(Pass::Failed(e)),
                };
                self.sink.large_filled(n)?;
                self.context.report.bytes(n as u64);
                at += n as u64;
                if !self.sink.large_goes_on() {
                    return Ok(Pass::Whole);
                }
            }
        }
        Ok(Pass::Whole)
    }

    /// Extended attributes; one that cannot be read is told, a file system without them has none.
    pub(super) fn xattrs_of(&mut self, fd: &OwnedFd, path: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
        let (found, errors) = xattrs_of_file(fd);
        for e in errors {
            self.context.report.left_out(format!("left out: cannot read an extended attribute of {}: {e}", self.shown(path)));
        }
        found
    }
}

/// Extended attributes of an open file, and what could not be read.
pub(super) fn xattrs_of_file(fd: &OwnedFd) -> (Xattrs, Vec<String>) {
    collect(|list| rustix::fs::flistxattr(fd, list), |name, value| rustix::fs::fgetxattr(fd, name, value))
}

/// Extended attributes of a symlink itself, reached through its directory's descriptor.
pub(super) fn link_xattrs(parent: BorrowedFd<'_>, name: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut path = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    collect(|list| rustix::fs::llistxattr(path.as_slice(), list), |name, value| rustix::fs::lgetxattr(path.as_slice(), name, value)).0
}

/// Extended attributes of what a path leads to, sorted by name, and what could not be read.
pub fn xattrs_at(path: &str) -> (Xattrs, Vec<String>) {
    collect(|list| rustix::fs::listxattr(path, list), |name, value| rustix::fs::getxattr(path, name, value))
}

type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

fn collect(
    list: impl Fn(&mut [u8]) -> Result<usize, Errno>,
    get: impl Fn(&[u8], &mut [u8]) -> Result<usize, Errno>,
) -> (Xattrs, Vec<String>) {
    let (mut few, mut many) = ([0u8; 1024], Vec::new());
    let (mut found, mut errors) = (Vec::new(), Vec::new());
    let mut listed = list(&mut few);
    let mut names = few.as_slice();
    if listed == Err(Errno::RANGE) {
        many.resize(MAX_XATTR_BYTES, 0);
        listed = list(&mut many);
        names = &many;
    }
    match listed {
        Ok(n) => names = names.get(..n).unwrap_or_default(),
        Err(Errno::OPNOTSUPP) => return (found, errors),
        Err(e) => {
            errors.push(format!("(list) {e}"));
            return (found, errors);
        }
    }
    for name in names.split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let mut value = vec![0u8; MAX_XATTR_BYTES];
        match get(name, &mut value) {
            Ok(n) => {
                value.truncate(n);
                value.shrink_to_fit();
                found.push((name.to_vec(), value));
            }
            Err(Errno::NODATA) => {}
            Err(e) => errors.push(format!("({}) {e}", String::from_utf8_lossy(name).escape_debug())),
        }
    }
    found.sort();
    (found, errors)
}

/// Beneath its parent, not through a link, without waiting (a pipe in its place), without touching the access time where
/// that is ours to decide.
pub(super) fn open_file(parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    match rustix::fs::openat(parent, name, flags | OFlags::NOATIME, Mode::empty()) {
        Err(Errno::PERM) => rustix::fs::openat(parent, name, flags, Mode::empty()),
        other => other,
    }
}

/// Reads until the buffer is full or the file ends.
pub(super) fn fill(fd: &impl AsFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    let mut at = 0;
    while let Some(rest) = buffer.get_mut(at..).filter(|r| !r.is_empty()) {
        match rustix::io::read(fd, rest) {
            Ok(0) => break,
            Ok(n) => at += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(at)
}

/// Appends a file from its start, wherever it was read to before: at most `most` bytes, fewer where it ends before. The memory is not cleared first.
pub(super) fn append(fd: &impl AsFd, memory: &mut Vec<u8>, most: usize) -> Result<usize, Errno> {
    let start = memory.len();
    memory.reserve(most);
    loop {
        let n = memory.len() - start;
        if n >= most {
            break;
        }
        match rustix::io::pread(fd, spare_capacity(memory), n as u64) {
            Ok(0) => break,
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    memory.truncate(start + most);
    Ok(memory.len() - start)
}

/// The next range that holds data, from `at`; the end of the file when there is none.
fn next_data(fd: &OwnedFd, at: u64, size: u64) -> Result<(u64, u64), Errno> {
    let start = match rustix::fs::seek(fd, SeekFrom::Data(at)) {
        Ok(start) => start.min(size),
        Err(Errno::NXIO) => return Ok((size, size)),
        // A file system that does not know: all is data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok((at, size)),
        Err(e) => return Err(e),
    };
    let end = rustix::fs::seek(fd, SeekFrom::Hole(start))?.min(size);
    Ok((start, end.max(start)))
}

pub(super) fn is_other(a: &Stat, b: &Stat) -> bool {
    let key = |s: &Stat| (s.st_size, s.st_mtime, s.st_mtime_nsec, s.st_ctime, s.st_ctime_nsec, s.st_ino);
    key(a) != key(b)
}
