//! The walk: depth first, names sorted by their bytes, which is path order.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, statat};
use rustix::io::Errno;

use super::{Capture, STAGING_PREFIX, described, open_directory, read};
use crate::repository::{Entry, Kind};
use crate::source::{SourceError, way};

pub const DIRECTORY_FLAGS: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);
pub const CACHE_TAG: &[u8] = b"CACHEDIR.TAG";
/// https://bford.info/cachedir/
const CACHE_SIGNATURE: &[u8] = b"Signature: 8a477f597d28d172789f06886806bc55";

/// A directory on the way down.
struct Level {
    fd: OwnedFd,
    path: Vec<u8>,
    names: std::vec::IntoIter<Vec<u8>>,
}

pub(super) enum WalkError {
    /// The source's own directory cannot be listed.
    Root(Errno),
    Source(SourceError),
}

impl From<SourceError> for WalkError {
    fn from(error: SourceError) -> Self {
        WalkError::Source(error)
    }
}

impl Capture<'_> {
    /// Captures the directory and all below it.
    pub(super) fn tree(&mut self, root: OwnedFd) -> Result<(), WalkError> {
        let stat = rustix::fs::fstat(&root).map_err(WalkError::Root)?;
        let names = list(&root).map_err(WalkError::Root)?;
        let before = self.was_at(b"")?;
        let entry = self.directory_entry(&root, Vec::new(), &stat, before);
        let was_filled = names.is_empty() && self.wanted.is_none() && self.previous.has_more()?;
        if was_filled {
            let text = format!("{} is empty now and was not at the last backup", self.shown(b""));
            self.context.report.message(keepd_protocol::model::Level::Warning, text);
        }
        self.emit(entry)?;
        let names = self.without_cache(&root, names);
        let mut stack = vec![Level { fd: root, path: Vec::new(), names: names.into_iter() }];
        while let Some(level) = stack.last_mut() {
            if self.context.cancel.is_cancelled() {
                return Err(SourceError::Cancelled.into());
            }
            let Some(name) = level.names.next() else {
                stack.pop();
                continue;
            };
            let mut path = Vec::with_capacity(level.path.len() + name.len() + 1);
            path.extend_from_slice(&level.path);
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&name);
            let stat = match statat(&level.fd, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => {
                    self.vanished(&path)?;
                    continue;
                }
                Err(e) => {
                    self.left_out(&path, "look at", e)?;
                    continue;
                }
            };
            let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if !self.is_wanted(&path, directory) || self.is_excluded(&path, directory) {
                continue;
            }
            if !directory {
                let parent = level.fd.as_fd();
                self.other(parent, &name, path, &stat)?;
                continue;
            }
            let fd = match open_directory(level.fd.as_fd(), &name) {
                Ok(fd) => fd,
                Err(Errno::NOENT) => {
                    self.vanished(&path)?;
                    continue;
                }
                Err(e) => {
                    self.left_out(&path, "open the directory", e)?;
                    continue;
                }
            };
            if let Some(below) = self.enter(fd, path)? {
                stack.push(below);
            }
        }
        Ok(())
    }

    /// Captures a directory itself; returns what is to be walked below it.
    fn enter(&mut self, fd: OwnedFd, path: Vec<u8>) -> Result<Option<Level>, SourceError> {
        let stat = match rustix::fs::fstat(&fd) {
            Ok(stat) => stat,
            Err(e) => {
                self.left_out(&path, "look at the directory", e)?;
                return Ok(None);
            }
        };
        // By whatever name it is met: what keepd knows of itself is in no backup.
        if way::is_state_dir(stat.st_dev, stat.st_ino) {
            self.counts.excluded += 1;
            return Ok(None);
        }
        let elsewhere = self.one_file_system && stat.st_dev != self.root_device;
        let names = match if elsewhere { Ok(Vec::new()) } else { list(&fd) } {
            Ok(names) => names,
            Err(e) => {
                // Half a listing would look like files that were removed.
                self.left_out(&path, "list the directory", e)?;
                Vec::new()
            }
        };
        let before = self.was_at(&path)?;
        let entry = self.directory_entry(&fd, path.clone(), &stat, before);
        self.emit(entry)?;
        let names = self.without_cache(&fd, names);
        Ok(Some(Level { fd, path, names: names.into_iter() }))
    }

    fn directory_entry(&mut self, fd: &OwnedFd, path: Vec<u8>, stat: &rustix::fs::Stat, before: Option<Entry>) -> Entry {
        let mut entry = described(path, Kind::Directory, stat);
        entry.xattrs = match before.filter(|b| b.kind == Kind::Directory && b.ctime == entry.ctime && b.inode == entry.inode) {
            Some(before) => before.xattrs,
            None => self.xattrs_of(fd, &entry.path),
        };
        self.counts.directories += 1;
        entry
    }

    /// Of a directory tagged as a cache only the tag is kept.
    fn without_cache(&mut self, fd: &OwnedFd, names: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        if !self.exclude_caches || names.binary_search_by(|n| n.as_slice().cmp(CACHE_TAG)).is_err() || !is_cache(fd) {
            return names;
        }
        self.counts.excluded += names.len() as u64 - 1;
        vec![CACHE_TAG.to_vec()]
    }
}

/// Whether a directory carries the tag of caches.
pub fn is_cache(directory: impl AsFd) -> bool {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(tag) = rustix::fs::openat(directory, CACHE_TAG, flags, Mode::empty()) else { return false };
    let mut start = [0u8; CACHE_SIGNATURE.len()];
    read::fill(&tag, &mut start).is_ok_and(|n| n == start.len()) && start == CACHE_SIGNATURE
}

/// The names in a directory that may be backed up, sorted; the whole list or an error.
fn list(fd: &OwnedFd) -> Result<Vec<Vec<u8>>, Errno> {
    let mut buffer = Vec::with_capacity(64 << 10);
    let mut entries = RawDir::new(fd, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." && !name.starts_with(STAGING_PREFIX) {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}
