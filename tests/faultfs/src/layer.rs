//! The file system itself: each request goes on to the directory behind, through descriptors of its inodes, after [`Control`] has had its say.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    AccessFlags, BsdFileFlags, Errno as Answer, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, Gid, Mode, OFlags, RenameFlags as HowRenamed, SeekFrom, Stat, Timespec, Timestamps, UTIME_NOW,
    UTIME_OMIT, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::control::{Control, SYNCFS};
use crate::power::{Attributes, Kind, Update};
use crate::rule::{Action, Verb};

/// Nothing is remembered by the kernel: names and attributes may be changed from behind.
const TTL: Duration = Duration::ZERO;
const ROOT: u64 = 1;

struct Node {
    /// `O_PATH`: whatever it is, it is not opened.
    fd: Arc<OwnedFd>,
    /// Where it was last seen, relative to the root.
    path: PathBuf,
    lookups: u64,
}

enum Open {
    File { file: Arc<File>, inode: u64, synced: bool },
    Directory { entries: Arc<Vec<Entry>> },
}

#[derive(Clone)]
struct Entry {
    name: OsString,
    inode: u64,
    kind: FileType,
}

#[derive(Default)]
struct Opened {
    next: u64,
    by_number: HashMap<u64, Open>,
}

pub(crate) struct Layer {
    /// Of the root; what FUSE calls 1.
    root: u64,
    nodes: Mutex<HashMap<u64, Node>>,
    opened: Mutex<Opened>,
    control: Arc<Control>,
}

impl Layer {
    pub(crate) fn new(backing: &Path, control: Arc<Control>) -> io::Result<Self> {
        let fd = rustix::fs::open(backing, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let root = rustix::fs::fstat(&fd)?.st_ino;
        let nodes = HashMap::from([(ROOT, Node { fd: Arc::new(fd), path: PathBuf::new(), lookups: 1 })]);
        Ok(Self { root, nodes: Mutex::new(nodes), opened: Mutex::default(), control })
    }

    fn nodes(&self) -> MutexGuard<'_, HashMap<u64, Node>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opened(&self) -> MutexGuard<'_, Opened> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn node(&self, inode: INodeNo) -> Result<(Arc<OwnedFd>, PathBuf), Errno> {
        self.nodes().get(&inode.0).map(|n| (n.fd.clone(), n.path.clone())).ok_or(Errno::STALE)
    }

    /// The number that the record knows it by.
    fn recorded(&self, inode: u64) -> u64 {
        if inode == ROOT { self.root } else { inode }
    }

    /// What stands under a name becomes a node that the kernel knows once more.
    fn enter(&self, dir: &OwnedFd, path: PathBuf, name: &OsStr) -> Result<FileAttr, Errno> {
        let fd = rustix::fs::openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let stat = rustix::fs::fstat(&fd)?;
        let mut nodes = self.nodes();
        let node = nodes.entry(stat.st_ino).or_insert_with(|| Node { fd: Arc::new(fd), path: PathBuf::new(), lookups: 0 });
        node.lookups += 1;
        node.path = path;
        Ok(attributes(&stat))
    }

    fn keep(&self, open: Open) -> FileHandle {
        let mut opened = self.opened();
        opened.next += 1;
        let number = opened.next;
        opened.by_number.insert(number, open);
        FileHandle(number)
    }

    fn file(&self, handle: FileHandle) -> Result<(Arc<File>, u64, bool), Errno> {
        match self.opened().by_number.get(&handle.0) {
            Some(Open::File { file, inode, synced }) => Ok((file.clone(), *inode, *synced)),
            _ => Err(Errno::BADF),
        }
    }

    fn forget_node(&self, inode: u64, times: u64) {
        let mut nodes = self.nodes();
        if inode != ROOT
            && let Some(node) = nodes.get_mut(&inode)
        {
            node.lookups = node.lookups.saturating_sub(times);
            if node.lookups == 0 {
                nodes.remove(&inode);
            }
        }
    }

    /// A path changed its name: so did all beneath it.
    fn moved(&self, from: &Path, to: &Path, exchange: bool) {
        for node in self.nodes().values_mut() {
            if let Ok(rest) = node.path.strip_prefix(from) {
                node.path = joined(to, rest);
            } else if exchange && let Ok(rest) = node.path.strip_prefix(to) {
                node.path = joined(from, rest);
            }
        }
    }

    /// Something new under a name: made by `make`, then given to whoever asked.
    fn make(
        &self,
        verb: Verb,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        kind: Kind,
        make: impl FnOnce(&OwnedFd) -> Result<Option<File>, Errno>,
    ) -> Result<(FileAttr, Option<File>), Errno> {
        let (dir, at) = self.node(parent)?;
        let path = at.join(name);
        let begun = self.control.begin(verb, &path, None)?;
        let mut entered = None;
        let result = make(&dir).and_then(|file| {
            if request.uid() != 0 || request.gid() != 0 {
                let (uid, gid) = (Uid::from_raw(request.uid()), Gid::from_raw(request.gid()));
                rustix::fs::chownat(&dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            let found = self.enter(&dir, path, name)?;
            entered = Some(found.ino.0);
            Ok((found, file))
        });
        let dir = self.recorded(parent.0);
        let result = begun.end(result, |(found, _)| {
            Some(Update::Made { dir, name: name.to_owned(), file: found.ino.0, kind, attributes: recorded(found) })
        });
        if let (Err(_), Some(inode)) = (&result, entered) {
            self.forget_node(inode, 1);
        }
        result
    }

    fn removed(&self, verb: Verb, parent: INodeNo, name: &OsStr, flags: AtFlags) -> Result<(), Errno> {
        let (dir, at) = self.node(parent)?;
        let begun = self.control.begin(verb, &at.join(name), None)?;
        let result = rustix::fs::unlinkat(&dir, name, flags);
        begun.end(result, |()| Some(Update::Removed { dir: self.recorded(parent.0), name: name.to_owned() }))
    }

    fn renamed(&self, from: (INodeNo, &OsStr), to: (INodeNo, &OsStr), flags: RenameFlags) -> Result<(), Errno> {
        let (one, one_at) = self.node(from.0)?;
        let (other, other_at) = self.node(to.0)?;
        let (one_path, other_path) = (one_at.join(from.1), other_at.join(to.1));
        let begun = self.control.begin(Verb::Rename, &one_path, Some(&other_path))?;
        let how = HowRenamed::from_bits_retain(flags.bits());
        let exchange = how.contains(HowRenamed::EXCHANGE);
        let inode = |dir: &OwnedFd, name: &OsStr| rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map(|s| s.st_ino);
        let result = inode(&one, from.1).and_then(|file| {
            let exchanged = if exchange { Some(inode(&other, to.1)?) } else { None };
            rustix::fs::renameat_with(&one, from.1, &other, to.1, how)?;
            self.moved(&one_path, &other_path, exchange);
            Ok((file, exchanged))
        });
        begun
            .end(result, |(file, exchanged)| {
                Some(Update::Renamed {
                    from: (self.recorded(from.0.0), from.1.to_owned()),
                    to: (self.recorded(to.0.0), to.1.to_owned()),
                    file: *file,
                    other: *exchanged,
                })
            })
            .map(drop)
    }

    fn written(&self, handle: FileHandle, offset: u64, data: &[u8], path: &Path) -> Result<u32, Errno> {
        let (file, inode, synced) = self.file(handle)?;
        let begun = self.control.begin(Verb::Write, path, None)?;
        let mut data = data;
        let mut then = None;
        match begun.rule.as_ref().map(|r| &r.action) {
            Some(Action::Short(len)) => data = &data[..data.len().min(*len)],
            Some(Action::Torn(errno)) => {
                data = &data[..data.len() / 2];
                then = Some(*errno);
            }
            _ => {}
        }
        let result = file.write_all_at(data, offset).map_err(|e| raw(&e)).map(|()| data.len() as u32);
        let result = begun.end(result, |_| Some(Update::Write { file: inode, offset, bytes: data.to_vec(), synced }));
        then.map_or(result, Err)
    }

    fn synced(&self, inode: INodeNo, handle: FileHandle) -> Result<(), Errno> {
        let (_, path) = self.node(inode)?;
        let (file, number, _) = self.file(handle)?;
        let begun = self.control.begin(Verb::Fsync, &path, None)?;
        // What is behind is on a disk that stays on: what counts is that it was asked for.
        let result = rustix::fs::fstat(&*file);
        begun.end(result, |stat| Some(Update::SyncFile { file: number, attributes: recorded(&attributes(stat)) })).map(drop)
    }

    fn directory_synced(&self, inode: INodeNo) -> Result<(), Errno> {
        let (_, path) = self.node(inode)?;
        let begun = self.control.begin(Verb::FsyncDir, &path, None)?;
        begun.end(Ok(()), |()| Some(Update::SyncDirectory { dir: self.recorded(inode.0) }))
    }

    /// The entries of a directory, as the rules have it.
    fn listed(&self, inode: INodeNo) -> Result<Vec<Entry>, Errno> {
        let (fd, path) = self.node(inode)?;
        let begun = self.control.begin(Verb::List, &path, None)?;
        let rule = begun.rule.clone();
        let result = read_directory(&fd);
        let mut entries = begun.end(result, |_| None)?;
        match rule.as_ref().map(|r| (&r.action, &r.omit)) {
            Some((Action::Omit(_), Some(omit))) => entries.retain(|e| !omit.is_match(Path::new(&e.name))),
            Some((Action::Stale, _)) => {
                let then = rule.as_ref().and_then(|r| r.stale.get(&path)).map_or(&[][..], Vec::as_slice);
                entries.retain(|e| is_dots(&e.name) || then.contains(&e.name));
                let gone: Vec<_> = then.iter().filter(|n| entries.iter().all(|e| e.name != **n)).cloned().collect();
                entries.extend(gone.into_iter().map(|name| Entry { name, inode: u64::MAX, kind: FileType::RegularFile }));
            }
            _ => {}
        }
        Ok(entries)
    }

    #[allow(clippy::too_many_arguments)]
    fn changed(
        &self,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
    ) -> Result<FileAttr, Errno> {
        let (fd, path) = self.node(inode)?;
        let number = self.recorded(inode.0);
        if let Some(size) = size {
            let begun = self.control.begin(Verb::Truncate, &path, None)?;
            let result = rustix::fs::open(by_fd(&fd), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
                .and_then(|file| rustix::fs::ftruncate(&file, size));
            begun.end(result, |()| Some(Update::Size { file: number, size }))?;
        }
        if mode.is_some() || uid.is_some() || gid.is_some() || atime.is_some() || mtime.is_some() {
            let begun = self.control.begin(Verb::SetAttr, &path, None)?;
            let result = set(&fd, mode, uid, gid, atime, mtime).and_then(|()| rustix::fs::fstat(&*fd));
            begun.end(result, |stat| Some(Update::Attributes { file: number, attributes: recorded(&attributes(stat)) }))?;
        }
        self.attributes(inode)
    }

    fn attributes(&self, inode: INodeNo) -> Result<FileAttr, Errno> {
        let (fd, _) = self.node(inode)?;
        let mut found = attributes(&rustix::fs::fstat(&*fd)?);
        found.ino = inode;
        Ok(found)
    }

    fn open_file(&self, inode: INodeNo, flags: i32) -> Result<FileHandle, Errno> {
        let (fd, path) = self.node(inode)?;
        self.control.begin(Verb::Open, &path, None)?.end(Ok(()), |()| None)?;
        let file = rustix::fs::open(by_fd(&fd), opening(flags), Mode::empty())?;
        Ok(self.keep(Open::File { file: Arc::new(file.into()), inode: inode.0, synced: syncs(flags) }))
    }

    fn xattr(&self, verb: Verb, inode: INodeNo, name: &OsStr, value: Option<&[u8]>, flags: i32) -> Result<(), Errno> {
        let (fd, path) = self.node(inode)?;
        let begun = self.control.begin(verb, &path, None)?;
        let result = match value {
            Some(value) => rustix::fs::setxattr(by_fd(&fd), name, value, XattrFlags::from_bits_retain(flags.cast_unsigned())),
            None => rustix::fs::removexattr(by_fd(&fd), name),
        };
        begun
            .end(result, |()| Some(Update::Xattr { file: self.recorded(inode.0), name: name.to_owned(), value: value.map(<[u8]>::to_vec) }))
    }

    fn seen(&self, parent: INodeNo, name: &OsStr) -> Result<FileAttr, Errno> {
        let (dir, at) = self.node(parent)?;
        if name == SYNCFS {
            let begun = self.control.begin(Verb::SyncFs, &at, None)?;
            begun.end(Ok(()), |()| Some(Update::SyncAll))?;
            return Err(Errno::NOENT);
        }
        let path = at.join(name);
        self.control.begin(Verb::Stat, &path, None)?.end(Ok(()), |()| None)?;
        self.enter(&dir, path, name)
    }

    fn allocated(&self, inode: INodeNo, handle: FileHandle, offset: u64, len: u64, mode: i32) -> Result<(), Errno> {
        let (_, path) = self.node(inode)?;
        let (file, number, _) = self.file(handle)?;
        let flags = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        if !(FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE).contains(flags) {
            return Err(Errno::OPNOTSUPP);
        }
        let begun = self.control.begin(Verb::Allocate, &path, None)?;
        let result = rustix::fs::fallocate(&*file, flags, offset, len).and_then(|()| rustix::fs::fstat(&*file));
        begun
            .end(result, |stat| {
                Some(if flags.contains(FallocateFlags::PUNCH_HOLE) {
                    Update::Zeros { file: number, offset, len }
                } else {
                    Update::Size { file: number, size: stat.st_size.cast_unsigned() }
                })
            })
            .map(drop)
    }
}

impl Filesystem for Layer {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.seen(parent, name) {
            Ok(found) => reply.entry(&TTL, &found, Generation(0)),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn forget(&self, _: &Request, inode: INodeNo, times: u64) {
        self.forget_node(inode.0, times);
    }

    fn getattr(&self, _: &Request, inode: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        let result = self.node(inode).and_then(|(_, path)| self.control.begin(Verb::Stat, &path, None)?.end(Ok(()), |()| None));
        let result = result.and_then(|()| match handle.and_then(|h| self.file(h).ok()) {
            Some((file, ..)) => rustix::fs::fstat(&*file).map(|stat| attributes(&stat)),
            None => self.attributes(inode),
        });
        match result {
            Ok(found) => reply.attr(&TTL, &found),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match self.changed(inode, mode, uid, gid, size, atime, mtime) {
            Ok(found) => reply.attr(&TTL, &found),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn readlink(&self, _: &Request, inode: INodeNo, reply: ReplyData) {
        match self.node(inode).and_then(|(fd, _)| rustix::fs::readlinkat(&*fd, "", Vec::new())) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn mknod(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, device: u32, reply: ReplyEntry) {
        let made = self.make(Verb::Mknod, request, parent, name, Kind::File, |dir| {
            let kind = rustix::fs::FileType::from_raw_mode(mode);
            rustix::fs::mknodat(dir, name, kind, Mode::from_raw_mode(mode), u64::from(device))?;
            rustix::fs::chmodat(dir, name, Mode::from_raw_mode(mode), AtFlags::empty())?;
            Ok(None)
        });
        match made {
            Ok((found, _)) => reply.entry(&TTL, &found, Generation(0)),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        let made = self.make(Verb::Mkdir, request, parent, name, Kind::Directory, |dir| {
            rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(mode))?;
            rustix::fs::chmodat(dir, name, Mode::from_raw_mode(mode), AtFlags::empty())?;
            Ok(None)
        });
        match made {
            Ok((found, _)) => reply.entry(&TTL, &found, Generation(0)),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(self.removed(Verb::Unlink, parent, name, AtFlags::empty()), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(self.removed(Verb::Rmdir, parent, name, AtFlags::REMOVEDIR), reply);
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let made = self.make(Verb::Symlink, request, parent, name, Kind::Symlink(target.to_owned()), |dir| {
            rustix::fs::symlinkat(target, dir, name)?;
            Ok(None)
        });
        match made {
            Ok((found, _)) => reply.entry(&TTL, &found, Generation(0)),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn rename(&self, _: &Request, parent: INodeNo, name: &OsStr, to: INodeNo, to_name: &OsStr, flags: RenameFlags, reply: ReplyEmpty) {
        empty(self.renamed((parent, name), (to, to_name), flags), reply);
    }

    fn link(&self, _: &Request, inode: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let linked = || {
            let (fd, was) = self.node(inode)?;
            let (dir, at) = self.node(parent)?;
            let path = at.join(name);
            let begun = self.control.begin(Verb::Link, &was, Some(&path))?;
            let result =
                rustix::fs::linkat(CWD, by_fd(&fd), &dir, name, AtFlags::SYMLINK_FOLLOW).and_then(|()| self.enter(&dir, path, name));
            begun.end(result, |found| Some(Update::Linked { dir: self.recorded(parent.0), name: name.to_owned(), file: found.ino.0 }))
        };
        match linked() {
            Ok(found) => reply.entry(&TTL, &found, Generation(0)),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn open(&self, _: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.open_file(inode, flags.0) {
            Ok(handle) => reply.opened(handle, FopenFlags::empty()),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn create(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, flags: i32, reply: ReplyCreate) {
        let made = self.make(Verb::Create, request, parent, name, Kind::File, |dir| {
            // The kernel asks only for what is not there; that it is not is checked once more here.
            let mode = Mode::from_raw_mode(mode);
            let file = rustix::fs::openat(dir, name, opening(flags) | OFlags::CREATE | OFlags::EXCL, mode)?;
            rustix::fs::fchmod(&file, mode)?;
            Ok(Some(file.into()))
        });
        match made {
            Ok((found, Some(file))) => {
                let handle = self.keep(Open::File { file: Arc::new(file), inode: found.ino.0, synced: syncs(flags) });
                reply.created(&TTL, &found, Generation(0), handle, FopenFlags::empty());
            }
            Ok(_) => reply.error(Answer::EIO),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = || {
            let (_, path) = self.node(inode)?;
            self.control.begin(Verb::Read, &path, None)?.end(Ok(()), |()| None)?;
            let (file, ..) = self.file(handle)?;
            let mut buffer = vec![0; size as usize];
            let mut filled = 0;
            while filled < buffer.len() {
                match file.read_at(&mut buffer[filled..], offset + filled as u64) {
                    Ok(0) => break,
                    Ok(n) => filled += n,
                    Err(e) => return Err(raw(&e)),
                }
            }
            buffer.truncate(filled);
            Ok(buffer)
        };
        match read() {
            Ok(data) => reply.data(&data),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.node(inode).and_then(|(_, path)| self.written(handle, offset, data, &path)) {
            Ok(len) => reply.written(len),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, _: Option<LockOwner>, _: bool, reply: ReplyEmpty) {
        self.opened().by_number.remove(&handle.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, inode: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(self.synced(inode, handle), reply);
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(self.keep(Open::Directory { entries: Arc::default() }), FopenFlags::empty());
    }

    fn readdir(&self, _: &Request, inode: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let mut listed = None;
        if offset == 0 {
            match self.listed(inode) {
                Ok(entries) => listed = Some(Arc::new(entries)),
                Err(e) => return reply.error(answer(e)),
            }
        }
        let mut opened = self.opened();
        let Some(Open::Directory { entries }) = opened.by_number.get_mut(&handle.0) else { return reply.error(Answer::EBADF) };
        if let Some(listed) = listed {
            *entries = listed;
        }
        let entries = entries.clone();
        drop(opened);
        for (at, entry) in entries.iter().enumerate().skip(offset as usize) {
            if reply.add(INodeNo(entry.inode), at as u64 + 1, entry.kind, &entry.name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.opened().by_number.remove(&handle.0);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, inode: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(self.directory_synced(inode), reply);
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        match self.node(INodeNo(ROOT)).and_then(|(fd, _)| rustix::fs::fstatvfs(&*fd)) {
            Ok(s) => reply.statfs(
                s.f_blocks,
                s.f_bfree,
                s.f_bavail,
                s.f_files,
                s.f_ffree,
                s.f_bsize as u32,
                s.f_namemax as u32,
                s.f_frsize as u32,
            ),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn setxattr(&self, _: &Request, inode: INodeNo, name: &OsStr, value: &[u8], flags: i32, _: u32, reply: ReplyEmpty) {
        empty(self.xattr(Verb::SetXattr, inode, name, Some(value), flags), reply);
    }

    fn removexattr(&self, _: &Request, inode: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(self.xattr(Verb::RemoveXattr, inode, name, None, 0), reply);
    }

    fn getxattr(&self, _: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let mut value = vec![0; 64 << 10];
        match self.node(inode).and_then(|(fd, _)| rustix::fs::getxattr(by_fd(&fd), name, &mut value[..])) {
            Ok(len) => sized(&value[..len], size, reply),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn listxattr(&self, _: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        let mut names = vec![0; 64 << 10];
        match self.node(inode).and_then(|(fd, _)| rustix::fs::listxattr(by_fd(&fd), &mut names[..])) {
            Ok(len) => sized(&names[..len], size, reply),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        // The kernel judges by the attributes.
        reply.ok();
    }

    fn fallocate(&self, _: &Request, inode: INodeNo, handle: FileHandle, offset: u64, len: u64, mode: i32, reply: ReplyEmpty) {
        empty(self.allocated(inode, handle, offset, len, mode), reply);
    }

    fn lseek(&self, _: &Request, _: INodeNo, handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        const SEEK_DATA: i32 = 3;
        const SEEK_HOLE: i32 = 4;
        let to = match whence {
            SEEK_DATA => SeekFrom::Data(offset.cast_unsigned()),
            SEEK_HOLE => SeekFrom::Hole(offset.cast_unsigned()),
            _ => return reply.error(Answer::EINVAL),
        };
        match self.file(handle).and_then(|(file, ..)| rustix::fs::seek(&*file, to)) {
            Ok(at) => reply.offset(at.cast_signed()),
            Err(e) => reply.error(answer(e)),
        }
    }
}

fn empty(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(answer(e)),
    }
}

fn sized(value: &[u8], size: u32, reply: ReplyXattr) {
    if size == 0 {
        reply.size(value.len() as u32);
    } else if value.len() > size as usize {
        reply.error(Answer::ERANGE);
    } else {
        reply.data(value);
    }
}

fn answer(e: Errno) -> Answer {
    Answer::from_i32(e.raw_os_error())
}

fn raw(e: &io::Error) -> Errno {
    Errno::from_io_error(e).unwrap_or(Errno::IO)
}

fn is_dots(name: &OsStr) -> bool {
    name == "." || name == ".."
}

/// `join` would end it with a slash where there is nothing to join.
fn joined(path: &Path, rest: &Path) -> PathBuf {
    if rest.as_os_str().is_empty() { path.to_owned() } else { path.join(rest) }
}

/// A name for what a descriptor stands for, also for one that opens nothing.
fn by_fd(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// The flags that the file behind is opened with: the kernel has seen to the others.
fn opening(flags: i32) -> OFlags {
    let flags = OFlags::from_bits_retain(flags.cast_unsigned());
    let read = if flags.intersection(OFlags::ACCMODE) == OFlags::WRONLY { OFlags::RDWR } else { flags.intersection(OFlags::ACCMODE) };
    read | OFlags::CLOEXEC
}

fn syncs(flags: i32) -> bool {
    OFlags::from_bits_retain(flags.cast_unsigned()).intersects(OFlags::SYNC | OFlags::DSYNC)
}

fn read_directory(fd: &OwnedFd) -> Result<Vec<Entry>, Errno> {
    let opened = rustix::fs::openat(fd, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut entries = Vec::new();
    for entry in rustix::fs::Dir::read_from(&opened)? {
        let entry = entry?;
        let name = OsString::from_vec(entry.file_name().to_bytes().to_vec());
        entries.push(Entry { name, inode: entry.ino(), kind: kind(entry.file_type()) });
    }
    Ok(entries)
}

fn set(
    fd: &OwnedFd,
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
    atime: Option<TimeOrNow>,
    mtime: Option<TimeOrNow>,
) -> Result<(), Errno> {
    if uid.is_some() || gid.is_some() {
        rustix::fs::chownat(fd, "", uid.map(Uid::from_raw), gid.map(Gid::from_raw), AtFlags::EMPTY_PATH)?;
    }
    if let Some(mode) = mode {
        rustix::fs::chmodat(CWD, by_fd(fd), Mode::from_raw_mode(mode), AtFlags::empty())?;
    }
    if atime.is_some() || mtime.is_some() {
        let times = Timestamps { last_access: time(atime), last_modification: time(mtime) };
        rustix::fs::utimensat(fd, "", &times, AtFlags::EMPTY_PATH)?;
    }
    Ok(())
}

fn time(wanted: Option<TimeOrNow>) -> Timespec {
    match wanted {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(TimeOrNow::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(TimeOrNow::SpecificTime(at)) => match at.duration_since(UNIX_EPOCH) {
            Ok(since) => Timespec { tv_sec: since.as_secs().cast_signed(), tv_nsec: i64::from(since.subsec_nanos()) },
            Err(before) => {
                let before = before.duration();
                let nanos = i64::from(before.subsec_nanos());
                let seconds = -before.as_secs().cast_signed() - i64::from(nanos > 0);
                Timespec { tv_sec: seconds, tv_nsec: if nanos > 0 { 1_000_000_000 - nanos } else { 0 } }
            }
        },
    }
}

fn moment(seconds: i64, nanos: u64) -> SystemTime {
    let nanos = Duration::from_nanos(nanos);
    if seconds >= 0 {
        UNIX_EPOCH + Duration::from_secs(seconds.cast_unsigned()) + nanos
    } else {
        UNIX_EPOCH - Duration::from_secs(seconds.unsigned_abs()) + nanos
    }
}

fn attributes(stat: &Stat) -> FileAttr {
    FileAttr {
        ino: INodeNo(stat.st_ino),
        size: stat.st_size.cast_unsigned(),
        blocks: stat.st_blocks.cast_unsigned(),
        atime: moment(stat.st_atime, stat.st_atime_nsec),
        mtime: moment(stat.st_mtime, stat.st_mtime_nsec),
        ctime: moment(stat.st_ctime, stat.st_ctime_nsec),
        crtime: UNIX_EPOCH,
        kind: kind(rustix::fs::FileType::from_raw_mode(stat.st_mode)),
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: stat.st_nlink as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: stat.st_rdev as u32,
        blksize: stat.st_blksize as u32,
        flags: 0,
    }
}

fn kind(of: rustix::fs::FileType) -> FileType {
    match of {
        rustix::fs::FileType::Directory => FileType::Directory,
        rustix::fs::FileType::Symlink => FileType::Symlink,
        rustix::fs::FileType::Fifo => FileType::NamedPipe,
        rustix::fs::FileType::Socket => FileType::Socket,
        rustix::fs::FileType::CharacterDevice => FileType::CharDevice,
        rustix::fs::FileType::BlockDevice => FileType::BlockDevice,
        _ => FileType::RegularFile,
    }
}

fn recorded(found: &FileAttr) -> Attributes {
    Attributes { mode: u32::from(found.perm), uid: found.uid, gid: found.gid, modified: found.mtime }
}
