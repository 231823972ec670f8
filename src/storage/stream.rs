//! Objects of any length, written and read as streams.
//!
//! What is written appears whole under its name when it is finished, or never: on `fs` it is a temporary file that is synced and renamed without replacing
//! anything; elsewhere an upload in parts that counts only when it is completed, under a temporary name first where a service shows what is being
//! written.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use rustix::fs::Advice;

use super::direct::ReadBuffer;
use super::pace::Way;
use super::remote::Upload;
use super::shared::PIECE_BYTES;
use super::{Place, Result, Storage, StorageError, fs, is_no_space, temporary_name};

/// A part of an upload, in bytes. Services take at most 10,000 of them.
const PART_BYTES: usize = 16 << 20;
/// So many parts are as long as that; later ones are longer, so that an object may be as long as a service allows.
const SHORT_PARTS: usize = 1000;
const LONG_PART_BYTES: usize = 64 << 20;
/// Bytes after which a file is synced and leaves the page cache.
const SYNC_BYTES: u64 = 32 << 20;
/// Bytes of a request for a part of an object that is read from its start to its end.
const READ_BYTES: u64 = 4 << 20;
/// So many bytes tell whose object it is that arrived in part.
const BEGINNING_BYTES: usize = 1 << 10;

/// Takes an object of any length.
pub struct ObjectWriter {
    storage: Storage,
    name: String,
    to: To,
    /// Its first bytes.
    beginning: Vec<u8>,
    len: u64,
}

enum To {
    File { file: File, temporary: PathBuf, synced: u64 },
    Upload { upload: Option<Upload>, part: Vec<u8>, parts: usize },
    Done,
}

impl Storage {
    /// Begins an object under a name that must be free. Dropped before [`ObjectWriter::finish`], nothing is there.
    pub fn writer(&self, name: &str) -> Result<ObjectWriter> {
        self.begin_operation();
        if self.exists(name)? {
            return Err(StorageError::Exists { location: self.location.clone(), name: name.to_owned() });
        }
        let to = match &self.place {
            Place::Directory(root) => {
                let temporary = temporary_name().map_err(|e| self.failed("write", name, e.to_string()))?;
                let temporary = root.join(temporary + fs::STREAM);
                let parent = temporary.parent().unwrap_or(root);
                let made = fs::make_directories(root, parent)
                    .and_then(|()| OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary));
                let file = made.map_err(|e| self.io("write", name, &e))?;
                // Says to who sweeps that somebody writes it. Where a file system cannot, its age will not say so either: it stays.
                let _ = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
                To::File { file, temporary, synced: 0 }
            }
            Place::Remote(remote) => {
                To::Upload { upload: Some(self.wait("write", name, remote.begin_upload(name))?), part: Vec::new(), parts: 0 }
            }
        };
        Ok(ObjectWriter { storage: self.clone(), name: name.to_owned(), to, beginning: Vec::new(), len: 0 })
    }

    /// Reads an object from its start to its end.
    pub fn reader(&self, name: &str) -> Result<ObjectReader> {
        let size = self.size(name)?;
        Ok(ObjectReader {
            storage: self.clone(),
            name: name.to_owned(),
            size,
            at: 0,
            buffer: ReadBuffer::default(),
            used: 0,
            problem: Problem::default(),
        })
    }

    /// The objects at the top, not those in directories, sorted by name: the complete list or an error.
    pub fn top(&self) -> Result<Vec<super::Listed>> {
        self.begin_operation();
        match &self.place {
            Place::Directory(root) => fs::top(self, root),
            Place::Remote(remote) => {
                let mut list = Vec::new();
                for super::Listed { name, size } in self.wait("list", "", remote.top())? {
                    let size = match size {
                        0 => match self.size(&name) {
                            Ok(size) => size,
                            Err(StorageError::NotFound { .. }) => continue,
                            Err(e) => return Err(e),
                        },
                        known => known,
                    };
                    list.push(super::Listed { name, size });
                }
                list.sort_by(|a, b| a.name.cmp(&b.name));
                Ok(list)
            }
        }
    }

    fn io(&self, verb: &'static str, name: &str, error: &io::Error) -> StorageError {
        match is_no_space(&error.to_string()) {
            true => StorageError::NoSpace { location: self.location.clone(), name: name.to_owned() },
            false => self.failed(verb, name, error.to_string()),
        }
    }
}

impl ObjectWriter {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let missing = BEGINNING_BYTES.saturating_sub(self.beginning.len()).min(bytes.len());
        self.beginning.extend_from_slice(bytes.get(..missing).unwrap_or_default());
        match &mut self.to {
            To::File { file, synced, .. } => {
                for piece in bytes.chunks(self.storage.shared.pace.piece(Way::Up, PIECE_BYTES).max(1)) {
                    self.storage.shared.pace.wait(Way::Up, piece.len());
                    self.storage.shared.went(piece.len());
                    file.write_all(piece).map_err(|e| self.storage.io("write", &self.name, &e))?;
                    self.len += piece.len() as u64;
                }
                if self.len - *synced >= SYNC_BYTES {
                    file.sync_data().map_err(|e| self.storage.io("write", &self.name, &e))?;
                    // What is written does not push out what the applications work with. Where a file system cannot, that is so.
                    let _ = rustix::fs::fadvise(&*file, *synced, std::num::NonZeroU64::new(self.len - *synced), Advice::DontNeed);
                    *synced = self.len;
                }
                Ok(())
            }
            To::Upload { upload, part, parts } => {
                let mut left = bytes;
                while !left.is_empty() {
                    let wanted = if *parts < SHORT_PARTS { PART_BYTES } else { LONG_PART_BYTES };
                    let (now, later) = left.split_at(left.len().min(wanted - part.len().min(wanted)));
                    part.extend_from_slice(now);
                    self.len += now.len() as u64;
                    left = later;
                    if part.len() >= wanted {
                        let full = Bytes::from(std::mem::replace(part, Vec::with_capacity(wanted)));
                        *parts += 1;
                        send(&self.storage, &self.name, upload, full)?;
                    }
                }
                Ok(())
            }
            To::Done => Err(self.storage.failed("write", &self.name, "it is finished already; this is a bug".into())),
        }
    }

    /// Bytes so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether another name can be given until it is finished.
    pub fn may_be_renamed(&self) -> bool {
        matches!(self.to, To::File { .. })
    }

    /// Gives it another name, which must be free when it is finished.
    pub fn rename(&mut self, name: &str) {
        if self.may_be_renamed() {
            name.clone_into(&mut self.name);
        }
    }

    /// Publishes the object. When it returns, it is durable, and has its whole length.
    pub fn finish(mut self) -> Result<()> {
        let (storage, name) = (self.storage.clone(), self.name.clone());
        match std::mem::replace(&mut self.to, To::Done) {
            To::File { file, temporary, .. } => {
                let published = file.sync_all().map_err(|e| storage.io("write", &name, &e)).and_then(|()| {
                    let Place::Directory(root) = &storage.place else { return Ok(()) };
                    fs::publish_file(&storage, root, &temporary, &name)
                });
                if published.is_err() {
                    // Best effort: what cannot be removed now is swept later.
                    let _ = std::fs::remove_file(&temporary);
                }
                published?;
            }
            To::Upload { mut upload, part, .. } => {
                let sent = if part.is_empty() { Ok(()) } else { send(&storage, &name, &mut upload, Bytes::from(part)) };
                match (sent, upload, &storage.place) {
                    (Ok(()), Some(upload), Place::Remote(remote)) => {
                        storage.wait("write", &name, remote.finish_upload(upload, &name, self.len))?;
                    }
                    (Err(e), upload, Place::Remote(remote)) => {
                        if let Some(upload) = upload {
                            storage.runtime.block_on(remote.abort_upload(upload));
                        }
                        return Err(e);
                    }
                    (sent, ..) => sent?,
                }
            }
            To::Done => {}
        }
        match storage.size(&name)? {
            there if there == self.len => Ok(()),
            there => {
                self.remove_part(&name, there);
                Err(storage.failed("write", &name, format!("{there} of {} bytes arrived", self.len)))
            }
        }
    }

    /// Removes the beginning of an object that arrived under its name: nobody could read it, and it would stay for ever. Best effort; what is no beginning of it
    /// somebody else put there at the same time.
    fn remove_part(&self, name: &str, there: u64) {
        let len = there.min(self.beginning.len() as u64);
        let mut found = ReadBuffer::default();
        let is_ours = (1..self.len).contains(&there)
            && self.storage.range_into(name, 0, len, &mut found).is_ok()
            && self.beginning.get(..len as usize).is_some_and(|ours| *ours == found[..]);
        if is_ours && !self.storage.is_append_only() {
            let _ = self.storage.delete(name);
        }
    }
}

fn send(storage: &Storage, name: &str, upload: &mut Option<Upload>, part: Bytes) -> Result<()> {
    let (Place::Remote(remote), Some(upload)) = (&storage.place, upload.as_mut()) else {
        return Err(storage.failed("write", name, "the upload was given up".into()));
    };
    storage.wait("write", name, remote.send_part(upload, part))
}

impl Write for ObjectWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.put(bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    /// Does nothing: what is written counts when it is finished.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ObjectWriter {
    fn drop(&mut self) {
        match std::mem::replace(&mut self.to, To::Done) {
            To::File { temporary, .. } => drop(std::fs::remove_file(temporary)),
            To::Upload { upload: Some(upload), .. } => {
                if let Place::Remote(remote) = &self.storage.place {
                    self.storage.runtime.block_on(remote.abort_upload(upload));
                }
            }
            To::Upload { .. } | To::Done => {}
        }
    }
}

/// Why an object could not be read to its end, for whoever sees only what that made of its contents.
pub type Problem = Arc<OnceLock<StorageError>>;

/// Gives an object from its start to its end.
pub struct ObjectReader {
    storage: Storage,
    name: String,
    size: u64,
    at: u64,
    buffer: ReadBuffer,
    used: usize,
    problem: Problem,
}

impl ObjectReader {
    /// Of the whole object, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn problem(&self) -> Problem {
        self.problem.clone()
    }
}

impl Read for ObjectReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.used >= self.buffer.len() {
            let len = READ_BYTES.min(self.size - self.at);
            if len == 0 {
                return Ok(0);
            }
            if let Err(e) = self.storage.range_into(&self.name, self.at, len, &mut self.buffer) {
                let _ = self.problem.set(e.clone());
                return Err(io::Error::other(e));
            }
            (self.at, self.used) = (self.at + len, 0);
        }
        let rest = self.buffer.get(self.used..).unwrap_or_default();
        let len = rest.len().min(into.len());
        if let (Some(to), Some(from)) = (into.get_mut(..len), rest.get(..len)) {
            to.copy_from_slice(from);
        }
        self.used += len;
        Ok(len)
    }
}
