//! The walk: depth first, names sorted by their bytes, which is path order.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use ignore::gitignore::Gitignore;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, Stat, statat};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::ahead::ReadAhead;
use super::{STAGING_PREFIX, is_in, open_directory, read};
use crate::repository::entry::path_order;
use crate::source::way;

pub const DIRECTORY_FLAGS: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);
pub const CACHE_TAG: &[u8] = b"CACHEDIR.TAG";
/// https://bford.info/cachedir/
const CACHE_SIGNATURE: &[u8] = b"Signature: 8a477f597d28d172789f06886806bc55";

/// What of a tree is walked.
#[derive(Clone, Copy)]
pub(super) struct Rules<'a> {
    pub excludes: &'a Gitignore,
    pub one_file_system: bool,
    pub exclude_caches: bool,
    /// Only these paths (in path order, none inside another), what is in them and the directories above.
    pub wanted: Option<&'a [Vec<u8>]>,
}

impl Rules<'_> {
    /// Whether the walk goes there: to what is wanted, and through the directories above it.
    fn is_wanted(&self, path: &[u8], directory: bool) -> bool {
        let Some(paths) = self.wanted else { return true };
        let after = paths.partition_point(|p| path_order(p, path).is_le());
        let last = after.checked_sub(1).and_then(|at| paths.get(at));
        last.is_some_and(|p| p == path || is_in(path, p)) || (directory && paths.get(after).is_some_and(|p| is_in(p, path)))
    }

    pub fn is_excluded(&self, path: &[u8], directory: bool) -> bool {
        !self.excludes.is_empty() && self.excludes.matched(Path::new(std::ffi::OsStr::from_bytes(path)), directory).is_ignore()
    }
}

/// Something the walk came to.
pub(super) struct Item {
    pub path: Vec<u8>,
    pub found: Found,
}

pub(super) enum Found {
    Directory(Directory),
    Other {
        parent: Arc<OwnedFd>,
        look: Look,
    },
    Vanished,
    /// What could not be done, and why.
    LeftOut(&'static str, Errno),
}

/// How much is known of what is not a directory.
pub(super) enum Look {
    /// The listing calls it a file.
    Listed,
    Seen(Stat),
    Opened(OwnedFd, Stat),
    Read(ReadAhead),
}

pub(super) struct Directory {
    pub fd: Arc<OwnedFd>,
    pub stat: Stat,
    /// Why nothing in it is known: half a listing would look like files that were removed.
    pub trouble: Option<Errno>,
    pub is_empty: bool,
}

/// A directory on the way down.
struct Level {
    fd: Arc<OwnedFd>,
    path: Vec<u8>,
    names: Names,
    next: usize,
}

pub(super) struct Walk<'a> {
    rules: Rules<'a>,
    root_device: u64,
    stack: Vec<Level>,
    /// Names left out by a rule since somebody asked.
    excluded: u64,
    /// What the listing calls a file need not be looked at.
    trusts_listing: bool,
    cancel: &'a CancellationToken,
}

impl<'a> Walk<'a> {
    /// From the source's own directory, which is given at once.
    pub fn begin(root: OwnedFd, rules: Rules<'a>, cancel: &'a CancellationToken) -> Result<(Self, Directory), Errno> {
        let stat = rustix::fs::fstat(&root)?;
        let mut walk = Self { rules, root_device: stat.st_dev, stack: Vec::new(), excluded: 0, trusts_listing: false, cancel };
        let directory = walk.descend(root, Vec::new(), stat);
        match directory.trouble {
            Some(e) => Err(e),
            None => Ok((walk, directory)),
        }
    }

    pub fn trust_listing(&mut self) {
        self.trusts_listing = true;
    }

    /// How many names a rule left out since this was asked last.
    pub fn take_excluded(&mut self) -> u64 {
        std::mem::take(&mut self.excluded)
    }

    /// The next thing in path order; None at the end, and when the run was cancelled.
    pub fn next(&mut self) -> Option<Item> {
        while !self.cancel.is_cancelled() {
            let level = self.stack.last_mut()?;
            let Some((name, listed)) = level.names.get(level.next) else {
                self.stack.pop();
                continue;
            };
            level.next += 1;
            let mut path = Vec::with_capacity(level.path.len() + name.len() + 1);
            path.extend_from_slice(&level.path);
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name);
            let parent = Arc::clone(&level.fd);
            let (mut kind, mut stat) = (listed, None);
            if !(kind == FileType::Directory || (kind == FileType::RegularFile && self.trusts_listing)) {
                match look_at(&parent, name) {
                    Ok(found) => (kind, stat) = (FileType::from_raw_mode(found.st_mode), Some(found)),
                    Err(e) => return Some(Item { path, found: unseen(e) }),
                }
            }
            let directory = kind == FileType::Directory;
            if !self.rules.is_wanted(&path, directory) {
                continue;
            }
            if self.rules.is_excluded(&path, directory) {
                self.excluded += 1;
                continue;
            }
            if !directory {
                let look = stat.map_or(Look::Listed, Look::Seen);
                return Some(Item { path, found: Found::Other { parent, look } });
            }
            if let Some(found) = self.enter(&parent, &path) {
                return Some(Item { path, found });
            }
        }
        None
    }

    /// Into a directory; None when it is keepd's own.
    fn enter(&mut self, parent: &Arc<OwnedFd>, path: &[u8]) -> Option<Found> {
        let fd = match open_directory(parent.as_fd(), name_of(path)) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Some(Found::Vanished),
            // Something else took its place since the listing.
            Err(Errno::NOTDIR | Errno::LOOP) => {
                return Some(match look_at(parent, name_of(path)) {
                    Ok(stat) => Found::Other { parent: Arc::clone(parent), look: Look::Seen(stat) },
                    Err(e) => unseen(e),
                });
            }
            Err(e) => return Some(Found::LeftOut("open the directory", e)),
        };
        let stat = match rustix::fs::fstat(&fd) {
            Ok(stat) => stat,
            Err(e) => return Some(Found::LeftOut("look at the directory", e)),
        };
        // By whatever name it is met: what keepd knows of itself is in no backup.
        if way::is_state_dir(stat.st_dev, stat.st_ino) {
            self.excluded += 1;
            return None;
        }
        Some(Found::Directory(self.descend(fd, path.to_vec(), stat)))
    }

    fn descend(&mut self, fd: OwnedFd, path: Vec<u8>, stat: Stat) -> Directory {
        let elsewhere = self.rules.one_file_system && stat.st_dev != self.root_device;
        let (names, trouble) = match if elsewhere { Ok(Names::default()) } else { Names::list(&fd) } {
            Ok(names) => (names, None),
            Err(e) => (Names::default(), Some(e)),
        };
        let is_empty = names.is_empty();
        let names = self.without_cache(&fd, names);
        let fd = Arc::new(fd);
        self.stack.push(Level { fd: Arc::clone(&fd), path, names, next: 0 });
        Directory { fd, stat, trouble, is_empty }
    }

    /// Of a directory tagged as a cache only the tag is kept.
    fn without_cache(&mut self, fd: &OwnedFd, mut names: Names) -> Names {
        if self.rules.exclude_caches && names.has(CACHE_TAG) && is_cache(fd) {
            self.excluded += names.len() as u64 - 1;
            names.keep_only(CACHE_TAG);
        }
        names
    }
}

/// What is at a name in a directory, not followed.
pub(super) fn look_at(parent: &OwnedFd, name: &[u8]) -> Result<Stat, Errno> {
    statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
}

/// What could not be looked at.
fn unseen(e: Errno) -> Found {
    if e == Errno::NOENT { Found::Vanished } else { Found::LeftOut("look at", e) }
}

/// The last component of a path.
pub(super) fn name_of(path: &[u8]) -> &[u8] {
    let at = path.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
    path.get(at..).unwrap_or_default()
}

/// Whether a directory carries the tag of caches.
pub fn is_cache(directory: impl AsFd) -> bool {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(tag) = rustix::fs::openat(directory, CACHE_TAG, flags, Mode::empty()) else { return false };
    let mut start = [0u8; CACHE_SIGNATURE.len()];
    read::fill(&tag, &mut start).is_ok_and(|n| n == start.len()) && start == CACHE_SIGNATURE
}

/// The names in a directory that may be backed up, sorted by their bytes, and what the listing says they are.
#[derive(Default)]
struct Names {
    bytes: Vec<u8>,
    /// Where each begins and how long it is.
    at: Vec<(usize, usize, FileType)>,
}

impl Names {
    /// The whole list or an error.
    fn list(fd: &OwnedFd) -> Result<Self, Errno> {
        let mut buffer = Vec::with_capacity(64 << 10);
        let mut entries = RawDir::new(fd, buffer.spare_capacity_mut());
        let Self { mut bytes, mut at } = Self::default();
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." && !name.starts_with(STAGING_PREFIX) {
                at.push((bytes.len(), name.len(), entry.file_type()));
                bytes.extend_from_slice(name);
            }
        }
        at.sort_unstable_by(|a, b| slice(&bytes, a).cmp(slice(&bytes, b)));
        Ok(Self { bytes, at })
    }

    fn len(&self) -> usize {
        self.at.len()
    }

    fn is_empty(&self) -> bool {
        self.at.is_empty()
    }

    fn get(&self, n: usize) -> Option<(&[u8], FileType)> {
        self.at.get(n).map(|at| (slice(&self.bytes, at), at.2))
    }

    fn has(&self, name: &[u8]) -> bool {
        self.at.binary_search_by(|at| slice(&self.bytes, at).cmp(name)).is_ok()
    }

    fn keep_only(&mut self, name: &[u8]) {
        let bytes = &self.bytes;
        self.at.retain(|at| slice(bytes, at) == name);
    }
}

fn slice<'b>(bytes: &'b [u8], at: &(usize, usize, FileType)) -> &'b [u8] {
    bytes.get(at.0..at.0 + at.1).unwrap_or_default()
}
