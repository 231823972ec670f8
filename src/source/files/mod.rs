//! Directories: a walk in path order, merged with the entries of the last backup.
//!
//! In: a directory (or one file). Out: its entries into the sink. What did not change since the last backup (size, mtime,
//! ctime and inode all as they were) is not opened. Everything is opened beneath its parent's descriptor and never
//! through a symlink, so that whoever owns the directory cannot lead the walk elsewhere.

mod ahead;
mod holder;
mod read;
#[cfg(test)]
pub mod test_sink;
#[cfg(test)]
mod tests;
mod walk;

pub use holder::{Held, Holder};
pub use read::xattrs_at;
pub use walk::{CACHE_TAG, DIRECTORY_FLAGS, is_cache};

use ahead::{Ahead, Block};
use walk::{Directory, Found, Item, Look, Walk};

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ignore::gitignore::{Gitignore, GitignoreBuilder};
use keepd_protocol::model::Level;
use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::{Context, Facts, Merge, Previous, SourceError, way};
use crate::config::FilesSource;
use crate::repository::{Entry, EntrySink, Kind, Time};

/// Names that begin so are staging areas of a restore in place: at no level are they a part of what is backed up.
pub const STAGING_PREFIX: &[u8] = b".keepd-restore-";

/// Skipped special files that are named one by one.
const MAX_NAMED_SPECIAL: u64 = 20;

/// Captures a directory (or a single file) into the sink.
pub fn capture(
    source: &FilesSource,
    previous: &mut dyn Previous,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<Facts, SourceError> {
    capture_pass(source, previous, Way::Once, sink, context)
}

/// Captures it once more: `first` gives what a first pass found, and what has vanished since stays.
pub fn capture_again(
    source: &FilesSource,
    first: &mut dyn Previous,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<Facts, SourceError> {
    capture_pass(source, first, Way::Again, sink, context)
}

/// Gives what is at or below `paths` (own paths in path order, none inside another) and the directories above them to a sink that stores nothing.
/// Files that are as `backup` has them are not opened.
pub fn look(
    source: &FilesSource,
    paths: &[Vec<u8>],
    backup: &mut dyn Previous,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<(), SourceError> {
    capture_pass(source, backup, Way::Look(paths), sink, context).map(drop)
}

/// What a walk is for.
#[derive(Clone, Copy)]
enum Way<'a> {
    Once,
    /// What a first pass had and is gone stays.
    Again,
    /// Only at and below these paths.
    Look(&'a [Vec<u8>]),
}

fn capture_pass(
    source: &FilesSource,
    previous: &mut dyn Previous,
    way: Way<'_>,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<Facts, SourceError> {
    // The configured path itself may be a link (systemd makes such for DynamicUser=); nothing below it is followed.
    let real = way::of_source(&source.path)?;
    let root = real.as_path();
    let failed = |verb: &str, e: Errno| {
        SourceError::Failed(format!(
            "cannot {verb} {}: {e}; nothing was captured, for a source that is gone must not look like an empty one",
            root.display()
        ))
    };
    let stat = rustix::fs::lstat(root).map_err(|e| failed("find", e))?;
    let excludes = excludes(source)?;
    let rules = walk::Rules {
        excludes: &excludes,
        one_file_system: source.one_file_system,
        exclude_caches: source.exclude_caches,
        wanted: if let Way::Look(paths) = way { Some(paths) } else { None },
    };
    let mut capture = Capture {
        root,
        rules,
        previous: Merge::new(previous),
        sink,
        context,
        links: HashMap::new(),
        counts: Counts::default(),
        buffer: Vec::new(),
        filled: 0,
        in_sink: false,
        kept: matches!(way, Way::Again).then(Vec::new),
        given: 0,
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let fd = way::open(root, walk::DIRECTORY_FLAGS).map_err(|e| failed("open", e))?;
            let (walk, directory) = Walk::begin(fd, rules, context.cancel).map_err(|e| failed("list", e))?;
            capture.tree(walk, directory)?;
        }
        FileType::RegularFile => {
            let parent = root.parent().unwrap_or(Path::new("/"));
            let name = root.file_name().unwrap_or_default().as_bytes();
            let fd = way::open(parent, OFlags::PATH | OFlags::DIRECTORY).map_err(|e| failed("open", e))?;
            let before = capture.was_at(b"")?;
            capture.file(At::Name(fd.as_fd(), Some(name)), Vec::new(), &stat, before)?;
            if capture.counts.files == 0 {
                return Err(SourceError::Failed(format!("{} could not be read; see the messages", root.display())));
            }
        }
        _ => {
            return Err(SourceError::Failed(format!(
                "{} is neither a directory nor a regular file; name what it leads to",
                root.display()
            )));
        }
    }
    capture.keep_vanished(None)?;
    Ok(capture.counts.facts(context))
}

fn excludes(source: &FilesSource) -> Result<Gitignore, SourceError> {
    let mut builder = GitignoreBuilder::new("/");
    for pattern in &source.exclude {
        builder.add_line(None, pattern).map_err(|e| SourceError::Failed(format!("the exclude pattern '{pattern}' is wrong: {e}")))?;
    }
    builder.build().map_err(|e| SourceError::Failed(format!("the exclude patterns are wrong: {e}")))
}

#[derive(Default)]
struct Counts {
    files: u64,
    directories: u64,
    symlinks: u64,
    hardlinks: u64,
    special: u64,
    excluded: u64,
    changed: u64,
    unchanged: u64,
    vanished: u64,
}

impl Counts {
    fn facts(&self, context: &Context<'_>) -> Facts {
        if self.special > MAX_NAMED_SPECIAL {
            context.report.message(Level::Info, format!("{} sockets, pipes and devices were skipped in all", self.special));
        }
        let numbers = [
            ("files", self.files),
            ("directories", self.directories),
            ("symlinks", self.symlinks),
            ("hardlinks", self.hardlinks),
            ("skipped_special", self.special),
            ("excluded", self.excluded),
            ("changed_while_read", self.changed),
            ("unchanged", self.unchanged),
            ("vanished_and_kept", self.vanished),
            ("left_out", context.report.left_out_count()),
        ];
        numbers.into_iter().map(|(name, n)| (name.to_owned(), n.into())).collect()
    }
}

struct Capture<'a> {
    root: &'a Path,
    rules: walk::Rules<'a>,
    previous: Merge<'a>,
    sink: &'a mut dyn EntrySink,
    context: &'a Context<'a>,
    /// Files with several names: the first one, and how many are still to come.
    links: HashMap<(u64, u64), (Vec<u8>, u64)>,
    counts: Counts,
    /// Of a small file that is read, where the sink has no memory for it.
    buffer: Vec<u8>,
    /// The small file that was read: how long it is, and whether it was read into the sink's memory.
    filled: usize,
    in_sink: bool,
    /// In a second pass: the directories that the entry given last lies in, and itself if it is one.
    kept: Option<Vec<Vec<u8>>>,
    /// Entries given to the sink.
    given: u64,
}

/// Where a file is.
enum At<'p> {
    /// In this directory; by this name, or by the last one of its path.
    Name(BorrowedFd<'p>, Option<&'p [u8]>),
    Opened(OwnedFd),
}

impl Capture<'_> {
    /// Captures what a walk comes to; `root` is the source's own directory.
    fn tree(&mut self, mut walk: Walk<'_>, root: Directory) -> Result<(), SourceError> {
        let before = self.was_at(b"")?;
        let nothing_before = !self.previous.has_more()?;
        let was_filled = root.is_empty && self.rules.wanted.is_none() && !nothing_before;
        let entry = self.directory_entry(&root, Vec::new(), before);
        if was_filled {
            let text = format!("{} is empty now and was not at the last backup", self.shown(b""));
            self.context.report.message(Level::Warning, text);
        }
        self.emit(entry)?;
        // Everything has to be read: there is nothing that it could have been before.
        let reads = nothing_before && self.kept.is_none() && self.rules.wanted.is_none() && !self.sink.passes_on();
        if reads {
            walk.trust_listing();
        }
        let ahead = Ahead::new(walk, reads, self.context.cancel);
        std::thread::scope(|scope| {
            let mut capturing = ahead.start(scope);
            while let Some(Block { items, bytes, excluded }) = capturing.next()? {
                self.counts.excluded += excluded;
                for item in items {
                    if self.context.cancel.is_cancelled() {
                        return Err(SourceError::Cancelled);
                    }
                    self.item(item, &bytes)?;
                }
            }
            Ok(())
        })
    }

    fn item(&mut self, Item { path, found }: Item, bytes: &[u8]) -> Result<(), SourceError> {
        match found {
            Found::Directory(directory) => {
                if let Some(e) = directory.trouble {
                    self.left_out(&path, "list the directory", e)?;
                }
                let before = self.was_at(&path)?;
                let entry = self.directory_entry(&directory, path, before);
                self.emit(entry)
            }
            Found::Vanished => self.vanished(&path),
            Found::LeftOut(verb, e) => self.left_out(&path, verb, e),
            Found::Other { parent, look } => match look {
                Look::Seen(stat) => self.other(&parent, path, &stat),
                Look::Listed => match walk::look_at(&parent, walk::name_of(&path)) {
                    Ok(stat) => self.other(&parent, path, &stat),
                    Err(Errno::NOENT) => self.vanished(&path),
                    Err(e) => self.left_out(&path, "look at", e),
                },
                Look::Opened(fd, stat) => {
                    let before = self.was_at(&path)?;
                    self.file(At::Opened(fd), path, &stat, before)
                }
                Look::Read(read) => {
                    self.was_at(&path)?;
                    self.counts.files += 1;
                    self.take_read(path, read, bytes)
                }
            },
        }
    }

    fn directory_entry(&mut self, directory: &Directory, path: Vec<u8>, before: Option<Entry>) -> Entry {
        let mut entry = described(path, Kind::Directory, &directory.stat);
        entry.xattrs = match before.filter(|b| b.kind == Kind::Directory && b.ctime == entry.ctime && b.inode == entry.inode) {
            Some(before) => before.xattrs,
            None => self.xattrs_of(&directory.fd, &entry.path),
        };
        self.counts.directories += 1;
        entry
    }

    /// A path for messages.
    fn shown(&self, path: &[u8]) -> String {
        let full = if path.is_empty() { self.root.to_owned() } else { self.root.join(std::ffi::OsStr::from_bytes(path)) };
        full.to_string_lossy().escape_debug().to_string()
    }

    fn left_out(&mut self, path: &[u8], verb: &str, error: impl std::fmt::Display) -> Result<(), SourceError> {
        self.context.report.left_out(format!("left out: cannot {verb} {}: {error}", self.shown(path)));
        Ok(self.sink.left_out(path)?)
    }

    /// Anything but a directory. What a first pass had of it stays when it cannot be had again.
    fn other(&mut self, parent: &OwnedFd, path: Vec<u8>, stat: &Stat) -> Result<(), SourceError> {
        let before = self.was_at(&path)?;
        let is_kept = |b: &&Entry| matches!(b.kind, Kind::File | Kind::Symlink);
        let first = self.kept.as_ref().and_then(|_| before.as_ref().filter(is_kept).cloned());
        let given = self.given;
        self.other_now(parent.as_fd(), path, stat, before)?;
        match first.filter(|_| self.given == given) {
            Some(first) => {
                self.counts.vanished += u64::from(first.kind == Kind::File);
                self.emit(first)
            }
            None => Ok(()),
        }
    }

    fn other_now(&mut self, parent: BorrowedFd<'_>, path: Vec<u8>, stat: &Stat, before: Option<Entry>) -> Result<(), SourceError> {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => self.file(At::Name(parent, None), path, stat, before),
            FileType::Symlink => self.symlink(parent, path, stat, before),
            // The listing called it a file, and what is in it now is not captured.
            FileType::Directory => self.left_out(&path, "walk", "it was exchanged for a directory meanwhile"),
            kind => {
                self.counts.special += 1;
                if self.counts.special <= MAX_NAMED_SPECIAL {
                    let what = match kind {
                        FileType::Fifo => "pipe",
                        FileType::Socket => "socket",
                        _ => "device",
                    };
                    self.context.report.message(Level::Info, format!("skipped the {what} {}", self.shown(&path)));
                }
                Ok(())
            }
        }
    }

    /// Whether the first name of a hard link leads to the file that it led to, or has vanished too (then it was kept).
    fn is_still(&self, link: &Entry) -> bool {
        match rustix::fs::lstat(self.root.join(std::ffi::OsStr::from_bytes(&link.target))) {
            Ok(stat) => stat.st_ino == link.inode,
            Err(e) => e == Errno::NOENT,
        }
    }

    fn symlink(&mut self, parent: BorrowedFd<'_>, path: Vec<u8>, stat: &Stat, before: Option<Entry>) -> Result<(), SourceError> {
        let target = match rustix::fs::readlinkat(parent, walk::name_of(&path), Vec::new()) {
            Ok(target) => target.into_bytes(),
            Err(Errno::NOENT) => return self.vanished(&path),
            Err(e) => {
                return self.left_out(&path, "read the link", e);
            }
        };
        let mut entry = described(path, Kind::Symlink, stat);
        entry.target = target;
        entry.xattrs = match before.filter(|b| b.kind == Kind::Symlink && b.ctime == entry.ctime && b.inode == entry.inode) {
            Some(before) => before.xattrs,
            None => read::link_xattrs(parent, walk::name_of(&entry.path)),
        };
        self.counts.symlinks += 1;
        self.emit(entry)
    }

    fn vanished(&self, path: &[u8]) -> Result<(), SourceError> {
        self.context.report.message(Level::Info, format!("{} vanished while the directory was walked", self.shown(path)));
        Ok(())
    }

    fn emit(&mut self, entry: Entry) -> Result<(), SourceError> {
        self.context.report.entry();
        self.given += 1;
        self.comes(&entry);
        Ok(self.sink.push(entry)?)
    }

    /// Notes which directories the next entries can lie in.
    fn comes(&mut self, entry: &Entry) {
        let Some(open) = &mut self.kept else { return };
        while open.last().is_some_and(|d| !is_in(&entry.path, d)) {
            open.pop();
        }
        if entry.kind == Kind::Directory {
            open.push(entry.path.clone());
        }
    }

    /// The entry that was at a path. Paths must be asked for in path order; in a second pass what was between them and is gone stays.
    fn was_at(&mut self, path: &[u8]) -> Result<Option<Entry>, SourceError> {
        self.keep_vanished(Some(path))?;
        self.sink.arrives(path)?;
        self.previous.at(path)
    }

    /// Gives the first pass' entries before `path` again: nothing asked for them, so they vanished.
    fn keep_vanished(&mut self, path: Option<&[u8]>) -> Result<(), SourceError> {
        if self.kept.is_none() {
            return Ok(());
        }
        while let Some(entry) = self.previous.before(path)? {
            let parent = entry.path.iter().rposition(|b| *b == b'/').map_or(&[][..], |at| entry.path.get(..at).unwrap_or_default());
            let in_directory = !entry.path.is_empty() && self.kept.as_ref().is_some_and(|open| open.iter().any(|d| d == parent));
            // Another name of a file that is another one now.
            if entry.kind == Kind::Hardlink && !self.is_still(&entry) {
                self.context
                    .report
                    .left_out(format!("left out: {} vanished, and the file it was another name of was replaced", self.shown(&entry.path)));
                continue;
            }
            if !in_directory {
                continue;
            }
            if self.rules.is_excluded(&entry.path, entry.kind == Kind::Directory) {
                self.counts.excluded += 1;
                continue;
            }
            self.counts.vanished += u64::from(entry.kind == Kind::File);
            self.emit(entry)?;
        }
        Ok(())
    }

    fn file(&mut self, at: At<'_>, path: Vec<u8>, stat: &Stat, before: Option<Entry>) -> Result<(), SourceError> {
        if stat.st_nlink > 1 {
            let key = (stat.st_dev, stat.st_ino);
            if let Some((first, left)) = self.links.get_mut(&key) {
                let mut entry = described(path, Kind::Hardlink, stat);
                entry.target.clone_from(first);
                *left -= 1;
                if *left == 0 {
                    self.links.remove(&key);
                }
                self.counts.hardlinks += 1;
                return self.emit(entry);
            }
        }
        let linked = (stat.st_nlink > 1).then(|| (path.clone(), stat.st_nlink - 1));
        let captured = match before {
            Some(before) if self.is_unchanged(&before, stat)? => {
                let mut entry = described(path, Kind::File, stat);
                (entry.content, entry.xattrs, entry.size) = (before.content, before.xattrs, before.size);
                self.counts.unchanged += 1;
                self.context.report.bytes(entry.size);
                self.emit(entry)?;
                true
            }
            _ => match at {
                At::Name(parent, name) => self.read_file(parent, name, path)?,
                At::Opened(fd) => self.read_opened(fd, *stat, path)?,
            },
        };
        if captured {
            self.counts.files += 1;
            if let Some(linked) = linked {
                self.links.insert((stat.st_dev, stat.st_ino), linked);
            }
        }
        Ok(())
    }

    /// Size, mtime, ctime and inode are as they were, and the repository has the contents.
    fn is_unchanged(&mut self, before: &Entry, stat: &Stat) -> Result<bool, SourceError> {
        let now = described(Vec::new(), Kind::File, stat);
        let same = before.kind == Kind::File
            && before.size == stat.st_size as u64
            && (before.mtime, before.ctime, before.inode) == (now.mtime, now.ctime, now.inode)
            && !before.changed_while_read;
        Ok(same && self.sink.has_all(&before.content.segments)?)
    }
}

/// Whether a path lies in a directory (every path lies in the root).
fn is_in(path: &[u8], directory: &[u8]) -> bool {
    directory.is_empty() || path.strip_prefix(directory).is_some_and(|rest| rest.first() == Some(&b'/'))
}

/// An entry from what stat says, without contents, target and extended attributes.
fn described(path: Vec<u8>, kind: Kind, stat: &Stat) -> Entry {
    let time = |seconds: i64, nanoseconds: u64| Time { seconds, nanoseconds: (nanoseconds % 1_000_000_000) as u32 };
    Entry {
        path,
        kind,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        inode: stat.st_ino,
        ..Entry::default()
    }
}

/// Opens a directory beneath its parent.
fn open_directory(parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(parent, name, walk::DIRECTORY_FLAGS, Mode::empty())
}
