//! Files in place: a list of small changes beneath one directory, each of which can be made and taken back any number of times.
//!
//! What is new is staged in a directory beneath the same one, so that a rename puts it in place; what was there is renamed into that directory, too.
//! Whether a change was made can be seen: a staged file is gone from the stage, a file that was moved aside is there. Everything is opened
//! beneath the directory and never through a symlink, so that whoever owns it cannot lead a change elsewhere.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use keepd_writer::open_beneath;
use minicbor::{CborLen, Decode, Encode};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::source::files::{STAGING_PREFIX, xattrs_at};
use crate::source::way;

/// What SQLite puts beside a database.
pub const SIDECARS: [&str; 3] = ["-wal", "-shm", "-journal"];

/// A directory in which things are exchanged.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tree {
    pub source: String,
    pub root: PathBuf,
    /// The name of the stage in it.
    pub stage: String,
    /// Directories that were made for it to be there, the outermost first.
    pub made: Vec<PathBuf>,
    /// The root's time before anything was made in it: seconds and nanoseconds.
    pub was: Option<(i64, u32)>,
    /// The root's inode: whoever owns the directory above may have put another one in its place.
    pub inode: Option<u64>,
    /// Its changes are written down, and not taken back yet.
    pub planned: bool,
}

/// Owner, mode, time and attributes.
#[derive(Debug, Clone, PartialEq, Encode, Decode, CborLen)]
pub struct Described {
    #[n(0)]
    pub mode: u32,
    #[n(1)]
    pub uid: u32,
    #[n(2)]
    pub gid: u32,
    #[n(3)]
    pub seconds: i64,
    #[n(4)]
    pub nanoseconds: u32,
    #[n(5)]
    pub xattrs: Vec<Xattr>,
}

#[derive(Debug, Clone, PartialEq, Encode, Decode, CborLen)]
pub struct Xattr {
    #[cbor(n(0), with = "minicbor::bytes")]
    pub name: Vec<u8>,
    #[cbor(n(1), with = "minicbor::bytes")]
    pub value: Vec<u8>,
}

/// One change. Paths are beneath the tree's root.
#[derive(Debug, Clone, PartialEq, Encode, Decode, CborLen)]
pub enum Change {
    /// What is there, if anything is, is kept in the stage under a number.
    #[n(0)]
    Aside {
        #[cbor(n(0), with = "minicbor::bytes")]
        path: Vec<u8>,
        #[n(1)]
        number: u64,
    },
    /// A directory that holds nothing any more goes.
    #[n(1)]
    RemoveDirectory {
        #[cbor(n(0), with = "minicbor::bytes")]
        path: Vec<u8>,
        #[n(1)]
        was: Described,
    },
    /// Everything so far is on the disk before the next one.
    #[n(2)]
    Sync,
    #[n(3)]
    MakeDirectory {
        #[cbor(n(0), with = "minicbor::bytes")]
        path: Vec<u8>,
    },
    /// What was staged goes to its place, which is free.
    #[n(4)]
    Put {
        /// In the stage.
        #[cbor(n(0), with = "minicbor::bytes")]
        from: Vec<u8>,
        #[cbor(n(1), with = "minicbor::bytes")]
        path: Vec<u8>,
        /// What SQLite puts beside it belongs to it.
        #[n(2)]
        database: bool,
    },
    /// Another name of a file that is there.
    #[n(5)]
    Link {
        #[cbor(n(0), with = "minicbor::bytes")]
        first: Vec<u8>,
        #[cbor(n(1), with = "minicbor::bytes")]
        path: Vec<u8>,
    },
    /// Of a file or directory that is there, or was made.
    #[n(6)]
    Describe {
        #[cbor(n(0), with = "minicbor::bytes")]
        path: Vec<u8>,
        #[n(1)]
        was: Option<Described>,
        #[n(2)]
        to: Described,
    },
}

impl Change {
    /// Where it is made.
    fn path(&self) -> Option<&[u8]> {
        match self {
            Change::Aside { path, .. }
            | Change::RemoveDirectory { path, .. }
            | Change::MakeDirectory { path }
            | Change::Put { path, .. }
            | Change::Link { path, .. }
            | Change::Describe { path, .. } => Some(path),
            Change::Sync => None,
        }
    }
}

/// What stands in the way is not what was there before: a link or a file in the place of a directory.
fn is_elsewhere(e: Errno) -> bool {
    matches!(e, Errno::LOOP | Errno::NOTDIR)
}

/// Where changes are written down.
pub struct ChangeWriter {
    out: BufWriter<File>,
}

impl ChangeWriter {
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self { out: BufWriter::new(File::create(path)?) })
    }

    pub fn write(&mut self, change: &Change) -> io::Result<()> {
        let bytes = minicbor::to_vec(change).map_err(io::Error::other)?;
        let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        self.out.write_all(&len.to_le_bytes())?;
        self.out.write_all(&bytes)
    }

    /// On the disk when it returns.
    pub fn finish(self) -> io::Result<()> {
        self.out.into_inner().map_err(|e| e.into_error())?.sync_all()
    }
}

/// All changes, in order.
pub fn read_changes(path: &Path) -> io::Result<Vec<Change>> {
    /// Attributes are bounded by the kernel, paths too.
    const LONGEST: u32 = 16 << 20;
    let mut input = BufReader::new(File::open(path)?);
    let mut changes = Vec::new();
    loop {
        let mut len = [0u8; 4];
        match input.read(&mut len[..1])? {
            0 => return Ok(changes),
            _ => input.read_exact(&mut len[1..])?,
        }
        let len = u32::from_le_bytes(len);
        if len > LONGEST {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a change is too long"));
        }
        let mut bytes = vec![0; len as usize];
        input.read_exact(&mut bytes)?;
        changes.push(minicbor::decode(&bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?);
    }
}

/// An open tree.
pub struct Beneath<'t> {
    tree: &'t Tree,
    root: OwnedFd,
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        None => (b".", path),
        Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..).unwrap_or_default()),
    }
}

fn times(seconds: i64, nanoseconds: u32) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: i64::from(nanoseconds.min(999_999_999)) };
    Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT }, last_modification: time }
}

fn missing(e: Errno) -> Result<(), Errno> {
    if matches!(e, Errno::NOENT | Errno::NOTDIR) { Ok(()) } else { Err(e) }
}

impl<'t> Beneath<'t> {
    pub fn open(tree: &'t Tree) -> io::Result<Self> {
        // Its path had no links when it was chosen.
        let root = way::open(&tree.root, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let inode = rustix::fs::fstat(&root)?.st_ino;
        if tree.inode.is_some_and(|known| known != inode) {
            return Err(io::Error::other("another directory is in its place now, or its file system is not mounted"));
        }
        Ok(Self { tree, root })
    }

    pub fn inode(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(&self.root)?.st_ino)
    }

    /// Whether the stage is there.
    pub fn has_stage(&self) -> bool {
        matches!(self.kind(self.tree.stage.as_bytes()), Ok(Some(_)))
    }

    /// Copies a database into the stage as `new/<as>`, with owner, mode and attributes of the file of that name in the root.
    pub fn put_into_stage(&self, from: &Path, as_path: &[u8]) -> Result<(), String> {
        let path = [b"new/".as_slice(), as_path].concat();
        let above = split(&path).0.to_vec();
        for directory in ["new".as_bytes(), &above] {
            if !matches!(self.kind(&self.staged(directory)), Ok(Some(_))) {
                self.make_in_stage(&String::from_utf8_lossy(directory))?;
            }
        }
        let live = self.described(split(&path).1)?;
        let staged = self.staged(&path);
        let copy = || -> io::Result<()> {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let file = rustix::fs::openat(self.parent(&staged)?, split(&staged).1, flags, Mode::RUSR | Mode::WUSR)?;
            let mut file = File::from(file);
            io::copy(&mut File::open(from)?, &mut file)?;
            file.sync_all()
        };
        copy().map_err(|e| self.failed("write", &staged, e))?;
        match live {
            Some(live) => self.describe(&staged, &live),
            None => Ok(()),
        }
    }

    /// Makes a directory in the stage and opens it.
    pub fn make_in_stage(&self, name: &str) -> Result<OwnedFd, String> {
        let path = self.staged(name.as_bytes());
        let made = self.parent(&path).and_then(|parent| {
            rustix::fs::mkdirat(parent, split(&path).1, Mode::RWXU)?;
            open_beneath(&self.root, &path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW)
        });
        made.map_err(|e| self.failed("make the directory", &path, e))
    }

    /// A path, for messages.
    fn shown(&self, path: &[u8]) -> String {
        self.tree.root.join(std::ffi::OsStr::from_bytes(path)).to_string_lossy().escape_debug().to_string()
    }

    fn failed(&self, verb: &str, path: &[u8], e: impl std::fmt::Display) -> String {
        format!("cannot {verb} {}: {e}", self.shown(path))
    }

    fn parent(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        open_beneath(&self.root, split(path).0, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC)
    }

    fn rename(&self, from: &[u8], to: &[u8]) -> Result<(), Errno> {
        rustix::fs::renameat(self.parent(from)?, split(from).1, self.parent(to)?, split(to).1)
    }

    fn kind(&self, path: &[u8]) -> Result<Option<rustix::fs::Stat>, Errno> {
        let parent = match self.parent(path) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            other => other?,
        };
        match rustix::fs::statat(parent, split(path).1, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn kept(&self, number: u64) -> Vec<u8> {
        format!("{}/old/{number}", self.tree.stage).into_bytes()
    }

    fn staged(&self, from: &[u8]) -> Vec<u8> {
        [self.tree.stage.as_bytes(), b"/", from].concat()
    }

    /// The root's own time, in seconds and nanoseconds.
    pub fn time(&self) -> Result<(i64, u32), String> {
        let stat = rustix::fs::fstat(&self.root).map_err(|e| self.failed("look at", b"", e))?;
        Ok((stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or_default()))
    }

    pub fn set_time(&self, (seconds, nanoseconds): (i64, u32)) -> Result<(), String> {
        rustix::fs::futimens(&self.root, &times(seconds, nanoseconds)).map_err(|e| self.failed("set the time of", b"", e))
    }

    /// After everything was taken back: the times of directories, which changed once more meanwhile.
    pub fn settle(&self, change: &Change) -> Result<(), String> {
        match change {
            change if change.path().is_some_and(|path| self.parent(path).is_err_and(is_elsewhere)) => Ok(()),
            Change::RemoveDirectory { path, was } | Change::Describe { path, was: Some(was), .. } => self.describe(path, was),
            _ => Ok(()),
        }
    }

    /// All that was done is on the disk.
    pub fn sync(&self) -> Result<(), String> {
        keepd_writer::syncfs(&self.root).map_err(|e| self.failed("sync", b"", e))
    }

    /// Makes the stage, which must not be there.
    pub fn make_stage(&self) -> Result<(), String> {
        let stage = self.tree.stage.as_bytes();
        let old = [stage, b"/old"].concat();
        for path in [stage, &old] {
            let made = self.parent(path).and_then(|parent| rustix::fs::mkdirat(parent, split(path).1, Mode::RWXU));
            made.map_err(|e| self.failed("make the directory", path, e))?;
        }
        Ok(())
    }

    /// Makes a change. One that was made already fails.
    pub fn make(&self, change: &Change) -> Result<(), String> {
        match change {
            Change::Aside { path, number } => {
                self.rename(path, &self.kept(*number)).or_else(missing).map_err(|e| self.failed("move aside", path, e))
            }
            Change::RemoveDirectory { path, .. } => {
                let removed = self.parent(path).and_then(|parent| rustix::fs::unlinkat(parent, split(path).1, AtFlags::REMOVEDIR));
                match removed {
                    // What is left out of backups stays where it is, and so does its directory.
                    Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
                    other => other.or_else(missing).map_err(|e| self.failed("remove the directory", path, e)),
                }
            }
            Change::Sync => self.sync(),
            Change::MakeDirectory { path } => {
                let made = self.parent(path).and_then(|parent| rustix::fs::mkdirat(parent, split(path).1, Mode::RWXU));
                made.map_err(|e| self.failed("make the directory", path, e))
            }
            Change::Put { from, path, .. } => {
                let put = || -> Result<(), Errno> {
                    let (from, to) = (self.staged(from), path);
                    let flags = rustix::fs::RenameFlags::NOREPLACE;
                    match rustix::fs::renameat_with(self.parent(&from)?, split(&from).1, self.parent(to)?, split(to).1, flags) {
                        // A file system that does not know the flag; what was there was moved aside.
                        Err(Errno::INVAL) => self.rename(&from, to),
                        other => other,
                    }
                };
                put().map_err(|e| self.failed("put in place", path, e))
            }
            Change::Link { first, path } => {
                let link = || -> Result<(), Errno> {
                    let first = open_beneath(&self.root, first, OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW)?;
                    let by_fd = format!("/proc/self/fd/{}", first.as_raw_fd());
                    rustix::fs::linkat(CWD, by_fd.as_str(), self.parent(path)?, split(path).1, AtFlags::SYMLINK_FOLLOW)
                };
                link().map_err(|e| self.failed("make the link", path, e))
            }
            Change::Describe { path, to, .. } => self.describe(path, to),
        }
    }

    /// Takes a change back, whether it was made or not. Where somebody has put another thing in the place of a directory above meanwhile, there is
    /// nothing to take it back to: then it is told what became of it, for nobody's waiting would mend that.
    pub fn take_back(&self, change: &Change) -> Result<Option<String>, String> {
        let elsewhere = |path: &[u8]| self.parent(path).err().filter(|e| is_elsewhere(*e));
        if let Change::Aside { path, number } = change {
            return self.put_back(path, *number, elsewhere(path));
        }
        match change.path().and_then(|path| Some((path, elsewhere(path)?))) {
            Some((path, e)) => Ok(Some(format!("{}, so it is left as it is", self.failed("go back to", path, e)))),
            None => self.take_back_there(change).map(|()| None),
        }
    }

    /// Puts what was moved aside back, or keeps it in the root under the name of the stage where it cannot go back.
    fn put_back(&self, path: &[u8], number: u64, elsewhere: Option<Errno>) -> Result<Option<String>, String> {
        let failed = |e| self.failed("put back", path, e);
        let kept = self.kept(number);
        if self.kind(&kept).map_err(failed)?.is_none() {
            return Ok(None);
        }
        let why = match elsewhere.map_or_else(|| self.rename(&kept, path), Err) {
            Ok(()) => return Ok(None),
            // A directory that somebody put there, or put something into, since.
            Err(e @ (Errno::ISDIR | Errno::NOTDIR | Errno::NOTEMPTY | Errno::EXIST)) => e,
            Err(e) if is_elsewhere(e) && elsewhere.is_some() => e,
            Err(e) => return Err(failed(e)),
        };
        let place = format!("{}.{number}", self.tree.stage.trim_start_matches('.')).into_bytes();
        self.rename(&kept, &place).map_err(failed)?;
        Ok(Some(format!("{}, so what was there is kept as {}", failed(why), self.shown(&place))))
    }

    fn take_back_there(&self, change: &Change) -> Result<(), String> {
        match change {
            // Put back before it comes here.
            Change::Aside { .. } | Change::Sync => Ok(()),
            Change::RemoveDirectory { path, was } => {
                let made = self.parent(path).and_then(|parent| rustix::fs::mkdirat(parent, split(path).1, Mode::RWXU));
                match made {
                    Err(Errno::EXIST) => Ok(()),
                    other => other.map_err(|e| self.failed("make again the directory", path, e)).and_then(|()| self.describe(path, was)),
                }
            }
            Change::MakeDirectory { path } => {
                let removed = self.parent(path).and_then(|parent| rustix::fs::unlinkat(parent, split(path).1, AtFlags::REMOVEDIR));
                match removed {
                    // Somebody put something into it since, which is not ours to remove.
                    Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
                    other => other.or_else(missing).map_err(|e| self.failed("remove the directory", path, e)),
                }
            }
            Change::Put { from, path, database } => {
                let back = || -> Result<(), Errno> {
                    let from = self.staged(from);
                    if self.kind(&from)?.is_some() || self.kind(path)?.is_none() {
                        return Ok(());
                    }
                    if *database {
                        for suffix in SIDECARS {
                            let beside = [path, suffix.as_bytes()].concat();
                            rustix::fs::unlinkat(self.parent(&beside)?, split(&beside).1, AtFlags::empty()).or_else(missing)?;
                        }
                    }
                    self.rename(path, &from)
                };
                back().map_err(|e| self.failed("take back", path, e))
            }
            Change::Link { first, path } => {
                let back = || -> Result<(), Errno> {
                    let (Some(first), Some(link)) = (self.kind(first)?, self.kind(path)?) else { return Ok(()) };
                    if (first.st_dev, first.st_ino) != (link.st_dev, link.st_ino) {
                        return Ok(());
                    }
                    rustix::fs::unlinkat(self.parent(path)?, split(path).1, AtFlags::empty()).or_else(missing)
                };
                back().map_err(|e| self.failed("remove the link", path, e))
            }
            Change::Describe { path, was, .. } => match was {
                Some(was) => self.describe(path, was),
                None => Ok(()),
            },
        }
    }

    /// What is there, as it is described; None when nothing is.
    pub fn described(&self, path: &[u8]) -> Result<Option<Described>, String> {
        let Some(stat) = self.kind(if path.is_empty() { b"." } else { path }).map_err(|e| self.failed("look at", path, e))? else {
            return Ok(None);
        };
        let fd = self.handle(path).map_err(|e| self.failed("look at", path, e))?;
        let xattrs = Self::xattrs(&fd).map_err(|e| self.failed("read the attributes of", path, e))?;
        Ok(Some(Described {
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            seconds: stat.st_mtime,
            nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or_default(),
            xattrs,
        }))
    }

    /// The same, with the time that the root had before the stage was made in it.
    pub fn as_it_was(&self, path: &[u8]) -> Result<Option<Described>, String> {
        let described = self.described(path)?;
        let was = self.tree.was.filter(|_| path.is_empty());
        Ok(described.map(|is| match was {
            Some((seconds, nanoseconds)) => Described { seconds, nanoseconds, ..is },
            None => is,
        }))
    }

    /// Names what is there without opening it: closing a database that SQLite has open would drop its locks.
    fn handle(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        open_beneath(&self.root, path, OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW)
    }

    fn xattrs(fd: &OwnedFd) -> Result<Vec<Xattr>, String> {
        match xattrs_at(&format!("/proc/self/fd/{}", fd.as_raw_fd())) {
            (found, errors) if errors.is_empty() => Ok(found.into_iter().map(|(name, value)| Xattr { name, value }).collect()),
            (_, errors) => Err(errors.join("; ")),
        }
    }

    /// Attributes, owner, mode, times, in this order.
    fn describe(&self, path: &[u8], to: &Described) -> Result<(), String> {
        let set = || -> io::Result<()> {
            let fd = match self.handle(path) {
                Err(Errno::NOENT) => return Ok(()),
                other => other?,
            };
            let stat = rustix::fs::fstat(&fd)?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
                return Ok(());
            }
            let by_fd = format!("/proc/self/fd/{}", fd.as_raw_fd());
            let now = Self::xattrs(&fd).map_err(io::Error::other)?;
            for gone in now.iter().filter(|x| !to.xattrs.iter().any(|w| w.name == x.name)) {
                // Labels of the system's own are not ours to take.
                if gone.name.starts_with(b"user.") || gone.name.starts_with(b"system.posix_acl") {
                    rustix::fs::removexattr(by_fd.as_str(), gone.name.as_slice())?;
                }
            }
            for wanted in to.xattrs.iter().filter(|w| !now.contains(w)) {
                rustix::fs::setxattr(by_fd.as_str(), wanted.name.as_slice(), &wanted.value, XattrFlags::empty())?;
            }
            if (stat.st_uid, stat.st_gid) != (to.uid, to.gid) {
                rustix::fs::chownat(fd.as_fd(), "", Some(Uid::from_raw(to.uid)), Some(Gid::from_raw(to.gid)), AtFlags::EMPTY_PATH)?;
            }
            // Only where it differs: a unit may forbid to set special bits, also those that are there. What came before may have changed it.
            if rustix::fs::fstat(&fd)?.st_mode & 0o7777 != to.mode & 0o7777 {
                rustix::fs::chmod(by_fd.as_str(), Mode::from_raw_mode(to.mode & 0o7777))?;
            }
            Ok(rustix::fs::utimensat(CWD, by_fd.as_str(), &times(to.seconds, to.nanoseconds), AtFlags::empty())?)
        };
        set().map_err(|e| self.failed("set owner, mode, times or attributes of", path, e))
    }

    /// Removes the stage with all that is in it, and the directories that were made for it if nothing else came into them.
    pub fn clear(&self) -> Result<(), String> {
        self.clear_below(&self.root, self.tree.stage.as_bytes()).map_err(|e| self.failed("remove", self.tree.stage.as_bytes(), e))
    }

    fn clear_below(&self, parent: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
        match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(e) => return Err(e),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = open_beneath(parent, name, flags)?;
        loop {
            let names: Vec<Vec<u8>> = rustix::fs::Dir::read_from(&fd)?
                .map(|e| e.map(|e| e.file_name().to_bytes().to_vec()))
                .collect::<Result<Vec<_>, _>>()?
                .into_iter()
                .filter(|n| n != b"." && n != b"..")
                .collect();
            if names.is_empty() {
                break;
            }
            names.iter().try_for_each(|below| self.clear_below(&fd, below))?;
        }
        rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
    }
}

/// The stage's name for a run's tree.
pub fn stage_name(run: &str, number: usize) -> String {
    format!("{}{run}-{number}", String::from_utf8_lossy(STAGING_PREFIX))
}

/// Removes directories that were made for a tree and hold nothing.
pub fn unmake(tree: &Tree) {
    for directory in tree.made.iter().rev() {
        // One that holds something stays.
        let _ = std::fs::remove_dir(directory);
    }
}
