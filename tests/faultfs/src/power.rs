//! Power loss: the log of a run, and the directory as it can be found when the power went out after any of its operations.
//!
//! What is assumed of a disk is what ext4 and xfs promise with their journals, and no more:
//!
//! - What fsync of a file covered is there: its data, size and attributes; not its name.
//! - What fsync of a directory covered is there: its names, and nothing of the files. The name of the directory itself is its parent's.
//! - A rename is whole or not at all, also from one directory to another, and over a name that was there.
//! - A write that no fsync covered may be there in any of its pieces, before or after what was written earlier and later; a size may be there without the data: then zeros.
//! - A name may be there without what is in the file.
//!
//! [`Loss::Ordered`] keeps the unsynced operations of a directory in their order (some first ones of them are there, as a journal commits them), and sizes of a file likewise;
//! [`Loss::Any`] keeps any subset of them, which no journal would do: what survives that asks nothing of the order.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileTimes, Permissions};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::XattrFlags;

/// What is lost of what nothing had made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Nothing: the process was killed, the machine went on.
    Nothing,
    /// All of it.
    Unsynced,
    /// A random part; what a directory's names and a file's size went through stays in order; pieces of 4 KiB.
    Ordered { seed: u64 },
    /// A random part of each operation by itself; pieces of 512 bytes.
    Any { seed: u64 },
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Attributes {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) modified: SystemTime,
}

impl Attributes {
    fn of(found: &fs::Metadata) -> Self {
        Self {
            mode: found.mode() & 0o7777,
            uid: found.uid(),
            gid: found.gid(),
            modified: found.modified().unwrap_or(SystemTime::UNIX_EPOCH),
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Kind {
    File,
    Directory,
    Symlink(PathBuf),
}

/// One change of one thing. Files and directories by the inode number of the directory behind; the record makes ids of them, for numbers are used again.
#[derive(Clone, Debug)]
pub(crate) enum Update {
    Write {
        file: u64,
        offset: u64,
        bytes: Vec<u8>,
        synced: bool,
    },
    Zeros {
        file: u64,
        offset: u64,
        len: u64,
    },
    Size {
        file: u64,
        size: u64,
    },
    Attributes {
        file: u64,
        attributes: Attributes,
    },
    Xattr {
        file: u64,
        name: OsString,
        value: Option<Vec<u8>>,
    },
    Made {
        dir: u64,
        name: OsString,
        file: u64,
        kind: Kind,
        attributes: Attributes,
    },
    Linked {
        dir: u64,
        name: OsString,
        file: u64,
    },
    Removed {
        dir: u64,
        name: OsString,
    },
    /// `file` is what was moved, `other` what it was exchanged with.
    Renamed {
        from: (u64, OsString),
        to: (u64, OsString),
        file: u64,
        other: Option<u64>,
    },
    SyncFile {
        file: u64,
        attributes: Attributes,
    },
    SyncDirectory {
        dir: u64,
    },
    SyncAll,
}

impl Update {
    /// Changes every inode number by `f`.
    fn map(&mut self, mut f: impl FnMut(&mut u64)) {
        match self {
            Self::Write { file, .. }
            | Self::Zeros { file, .. }
            | Self::Size { file, .. }
            | Self::Attributes { file, .. }
            | Self::Xattr { file, .. }
            | Self::SyncFile { file, .. } => f(file),
            Self::Made { dir, file, .. } | Self::Linked { dir, file, .. } => {
                f(dir);
                f(file);
            }
            Self::Removed { dir, .. } | Self::SyncDirectory { dir } => f(dir),
            Self::Renamed { from, to, file, other } => {
                f(&mut from.0);
                f(&mut to.0);
                f(file);
                other.as_mut().map(f);
            }
            Self::SyncAll => {}
        }
    }

    /// The directories whose names it changes.
    fn directories(&self) -> Vec<u64> {
        match self {
            Self::Made { dir, .. } | Self::Linked { dir, .. } | Self::Removed { dir, .. } => vec![*dir],
            Self::Renamed { from, to, .. } if from.0 == to.0 => vec![from.0],
            Self::Renamed { from, to, .. } => vec![from.0, to.0],
            _ => Vec::new(),
        }
    }

    /// The file whose data, size or attributes it changes.
    fn file(&self) -> Option<u64> {
        match self {
            Self::Write { file, .. }
            | Self::Zeros { file, .. }
            | Self::Size { file, .. }
            | Self::Attributes { file, .. }
            | Self::Xattr { file, .. } => Some(*file),
            _ => None,
        }
    }
}

/// A file or directory as it is built up again.
#[derive(Clone, Debug)]
struct Node {
    kind: Kind,
    attributes: Attributes,
    /// Where its first contents are, beneath the base.
    base: Option<PathBuf>,
    names: BTreeMap<OsString, u64>,
    /// Of files that were changed.
    contents: Option<Vec<u8>>,
    xattrs: BTreeMap<OsString, Vec<u8>>,
}

/// The log of a run, over a copy of what was there before.
#[derive(Debug)]
pub struct Record {
    base: PathBuf,
    root: u64,
    first: HashMap<u64, Node>,
    ids: HashMap<u64, u64>,
    next: u64,
    updates: Vec<(u64, Update)>,
}

impl Record {
    pub(crate) fn new(backing: &Path, base: &Path) -> io::Result<Self> {
        let copied = std::process::Command::new("cp").args(["-a", "--sparse=always"]).arg(backing).arg(base).status()?;
        if !copied.success() {
            return Err(io::Error::other(format!("{} is not copied to {}", backing.display(), base.display())));
        }
        let mut record = Self { base: base.to_owned(), root: 0, first: HashMap::new(), ids: HashMap::new(), next: 0, updates: Vec::new() };
        record.root = record.scan(backing, Path::new(""))?;
        Ok(record)
    }

    fn scan(&mut self, backing: &Path, at: &Path) -> io::Result<u64> {
        let path = backing.join(at);
        let found = fs::symlink_metadata(&path)?;
        if let Some(id) = self.ids.get(&found.ino()) {
            return Ok(*id);
        }
        let id = self.next;
        self.next += 1;
        self.ids.insert(found.ino(), id);
        let mut names = BTreeMap::new();
        let kind = if found.is_dir() {
            for entry in fs::read_dir(&path)? {
                let name = entry?.file_name();
                let child = self.scan(backing, &at.join(&name))?;
                names.insert(name, child);
            }
            Kind::Directory
        } else if found.is_symlink() {
            Kind::Symlink(fs::read_link(&path)?)
        } else {
            Kind::File
        };
        let xattrs = if found.is_symlink() { BTreeMap::new() } else { xattrs(&path)? };
        let base = found.is_file().then(|| at.to_owned());
        self.first.insert(id, Node { kind, attributes: Attributes::of(&found), base, names, contents: None, xattrs });
        Ok(id)
    }

    pub(crate) fn push(&mut self, number: u64, mut update: Update) {
        if let Update::Made { file, .. } = &update {
            self.ids.insert(*file, self.next);
            self.next += 1;
        }
        let mut known = true;
        update.map(|inode| match self.ids.get(inode) {
            Some(id) => *inode = *id,
            None => known = false,
        });
        // What was made behind the layer's back belongs to no state.
        if known {
            self.updates.push((number, update));
        }
    }

    /// Up to which operation there is something to lose or keep: the number of the last one that changed anything.
    pub fn last(&self) -> u64 {
        self.updates.last().map_or(0, |u| u.0)
    }

    /// The operations after which the state differs from that before.
    pub fn points(&self) -> Vec<u64> {
        let mut numbers: Vec<_> = self.updates.iter().map(|u| u.0).collect();
        numbers.dedup();
        numbers
    }

    /// The directory as it was when nothing had happened yet; removed by whoever asked for the record.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// Builds in `to`, which does not exist yet, what is there after the power went out when operation `number` was done. The same arguments give the same.
    pub fn after_power_loss(&self, number: u64, loss: Loss, to: &Path) -> io::Result<()> {
        let updates: Vec<&Update> = self.updates.iter().take_while(|u| u.0 <= number).map(|u| &u.1).collect();
        let durable = durable(&updates);
        let mut chance = Chance::new(loss, number);
        let names = chance.names(&updates, &durable);
        let sizes = chance.sizes(&updates, &durable);
        let mut nodes = self.first.clone();
        for (at, update) in updates.iter().enumerate() {
            self.apply(&mut nodes, update, durable[at], names[at], sizes[at], &mut chance)?;
        }
        let mut made = HashMap::new();
        self.build(&nodes, self.root, to, &mut made)
    }

    fn apply(
        &self,
        nodes: &mut HashMap<u64, Node>,
        update: &Update,
        durable: bool,
        name_kept: bool,
        size_kept: bool,
        chance: &mut Chance,
    ) -> io::Result<()> {
        match update {
            Update::Write { file, offset, bytes, .. } => {
                let contents = self.contents(nodes, *file)?;
                let end = *offset as usize + bytes.len();
                if size_kept && contents.len() < end {
                    contents.resize(end, 0);
                }
                let mut at = 0;
                while at < bytes.len() {
                    // Pieces are those of the file, not of the write.
                    let start = *offset as usize + at;
                    let len = (chance.piece - start % chance.piece).min(bytes.len() - at);
                    let visible = contents.len().saturating_sub(start).min(len);
                    if (durable || chance.kept()) && visible > 0 {
                        contents[start..start + visible].copy_from_slice(&bytes[at..at + visible]);
                    }
                    at += len;
                }
            }
            Update::Zeros { file, offset, len } if durable || chance.kept() => {
                let contents = self.contents(nodes, *file)?;
                let end = contents.len().min((offset + len) as usize);
                contents[(*offset as usize).min(end)..end].fill(0);
            }
            Update::Size { file, size } if size_kept => {
                self.contents(nodes, *file)?.resize(*size as usize, 0);
            }
            Update::Zeros { .. } | Update::Size { .. } => {}
            Update::Attributes { file, attributes } | Update::SyncFile { file, attributes } => {
                if (durable || matches!(update, Update::SyncFile { .. }) || chance.kept())
                    && let Some(node) = nodes.get_mut(file)
                {
                    node.attributes = *attributes;
                }
            }
            Update::Xattr { file, name, value } => {
                if (durable || chance.kept())
                    && let Some(node) = nodes.get_mut(file)
                {
                    match value {
                        Some(value) => node.xattrs.insert(name.clone(), value.clone()),
                        None => node.xattrs.remove(name),
                    };
                }
            }
            Update::Made { dir, name, file, kind, attributes } => {
                // What it is may be made durable by itself, without its name.
                let contents = matches!(kind, Kind::File).then(Vec::new);
                let node = Node {
                    kind: kind.clone(),
                    attributes: *attributes,
                    base: None,
                    names: BTreeMap::new(),
                    contents,
                    xattrs: BTreeMap::new(),
                };
                nodes.insert(*file, node);
                if name_kept {
                    enter(nodes, *dir, name, *file);
                }
            }
            Update::Linked { dir, name, file } if name_kept => enter(nodes, *dir, name, *file),
            Update::Removed { dir, name } if name_kept => {
                nodes.get_mut(dir).and_then(|d| d.names.remove(name));
            }
            Update::Renamed { from, to, file, other } if name_kept => {
                // It is there under its new name also where its first one never was.
                if let Some(dir) = nodes.get_mut(&from.0)
                    && dir.names.get(&from.1) == Some(file)
                {
                    dir.names.remove(&from.1);
                }
                enter(nodes, to.0, &to.1, *file);
                if let Some(other) = other {
                    enter(nodes, from.0, &from.1, *other);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The contents of a file, read from the base when they are first changed.
    fn contents<'a>(&self, nodes: &'a mut HashMap<u64, Node>, file: u64) -> io::Result<&'a mut Vec<u8>> {
        let node = nodes.get_mut(&file).ok_or_else(|| io::Error::other("a file that was never made"))?;
        if node.contents.is_none() {
            node.contents = Some(match &node.base {
                Some(base) => fs::read(self.base.join(base))?,
                None => Vec::new(),
            });
        }
        node.contents.as_mut().ok_or_else(|| io::Error::other("no contents"))
    }

    fn build(&self, nodes: &HashMap<u64, Node>, id: u64, to: &Path, made: &mut HashMap<u64, PathBuf>) -> io::Result<()> {
        let Some(node) = nodes.get(&id) else { return Ok(()) };
        if let Some(earlier) = made.get(&id) {
            // A directory has one name; which of two, when a rename was half lost, nobody promises.
            return if matches!(node.kind, Kind::Directory) { Ok(()) } else { fs::hard_link(earlier, to) };
        }
        made.insert(id, to.to_owned());
        match &node.kind {
            Kind::Symlink(target) => {
                symlink(target, to)?;
                return lchown(to, Some(node.attributes.uid), Some(node.attributes.gid));
            }
            Kind::Directory => {
                fs::create_dir(to)?;
                for (name, child) in &node.names {
                    self.build(nodes, *child, &to.join(name), made)?;
                }
            }
            Kind::File => match (&node.contents, &node.base) {
                (Some(contents), _) => File::create(to)?.write_all_at(contents, 0)?,
                (None, Some(base)) => drop(fs::copy(self.base.join(base), to)?),
                (None, None) => drop(File::create(to)?),
            },
        }
        for (name, value) in &node.xattrs {
            rustix::fs::setxattr(to, name.as_os_str(), value, XattrFlags::empty())?;
        }
        lchown(to, Some(node.attributes.uid), Some(node.attributes.gid))?;
        fs::set_permissions(to, Permissions::from_mode(node.attributes.mode))?;
        File::open(to)?.set_times(FileTimes::new().set_modified(node.attributes.modified))
    }
}

fn enter(nodes: &mut HashMap<u64, Node>, dir: u64, name: &OsStr, file: u64) {
    if let Some(dir) = nodes.get_mut(&dir) {
        dir.names.insert(name.to_owned(), file);
    }
}

/// Which updates something later made durable.
fn durable(updates: &[&Update]) -> Vec<bool> {
    let mut durable = vec![false; updates.len()];
    let (mut files, mut directories) = (HashSet::new(), HashSet::new());
    let mut all = false;
    for (at, update) in updates.iter().enumerate().rev() {
        match update {
            Update::SyncAll => all = true,
            Update::SyncFile { file, .. } => drop(files.insert(*file)),
            Update::SyncDirectory { dir } => {
                directories.insert(*dir);
                files.insert(*dir);
            }
            _ => {}
        }
        // A rename that one of its two directories was synced for is there as a whole.
        durable[at] = all
            || update.file().is_some_and(|f| files.contains(&f))
            || update.directories().iter().any(|d| directories.contains(d))
            || matches!(update, Update::Write { synced: true, .. });
    }
    durable
}

/// What chance keeps of what nothing made durable.
struct Chance {
    loss: Loss,
    random: fastrand::Rng,
    share: f64,
    piece: usize,
}

impl Chance {
    fn new(loss: Loss, number: u64) -> Self {
        let (seed, piece) = match loss {
            Loss::Nothing | Loss::Unsynced => (0, usize::MAX / 2),
            Loss::Ordered { seed } => (seed, 4096),
            Loss::Any { seed } => (seed, 512),
        };
        let mut random = fastrand::Rng::with_seed(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let share = [0.1, 0.5, 0.9][random.usize(0..3)];
        Self { loss, random, share, piece }
    }

    fn kept(&mut self) -> bool {
        match self.loss {
            Loss::Nothing => true,
            Loss::Unsynced => false,
            Loss::Ordered { .. } | Loss::Any { .. } => self.random.f64() < self.share,
        }
    }

    /// Which changes of names are there.
    fn names(&mut self, updates: &[&Update], durable: &[bool]) -> Vec<bool> {
        let mut kept: Vec<bool> =
            updates.iter().zip(durable).map(|(u, durable)| !u.directories().is_empty() && (*durable || self.kept())).collect();
        if matches!(self.loss, Loss::Ordered { .. }) {
            in_order(updates, &mut kept, Update::directories);
        }
        kept
    }

    /// Which changes of a size are there.
    fn sizes(&mut self, updates: &[&Update], durable: &[bool]) -> Vec<bool> {
        let sized = |u: &Update| matches!(u, Update::Write { .. } | Update::Size { .. });
        let mut kept: Vec<bool> = updates.iter().zip(durable).map(|(u, durable)| sized(u) && (*durable || self.kept())).collect();
        if matches!(self.loss, Loss::Ordered { .. }) {
            in_order(updates, &mut kept, |u| if sized(u) { u.file().into_iter().collect() } else { Vec::new() });
        }
        kept
    }
}

/// Where something is kept, all that came before it at the same place is kept, too: what a journal has, it has from the start.
fn in_order(updates: &[&Update], kept: &mut [bool], places: impl Fn(&Update) -> Vec<u64>) {
    let mut later = HashSet::new();
    for at in (0..updates.len()).rev() {
        let places = places(updates[at]);
        if !places.is_empty() && (kept[at] || places.iter().any(|p| later.contains(p))) {
            kept[at] = true;
            later.extend(places);
        }
    }
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
    let mut names = vec![0; 64 << 10];
    let len = match rustix::fs::listxattr(path, &mut names[..]) {
        Ok(len) => len,
        Err(rustix::io::Errno::NOTSUP) => 0,
        Err(e) => return Err(e.into()),
    };
    let mut found = BTreeMap::new();
    for name in names[..len].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let mut value = vec![0; 64 << 10];
        let len = rustix::fs::getxattr(path, name, &mut value[..])?;
        value.truncate(len);
        found.insert(OsString::from_vec(name.to_vec()), value);
    }
    Ok(found)
}
