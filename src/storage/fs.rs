//! What OpenDAL's `fs` leaves out: publishing by an atomic rename that replaces nothing, and directories synced.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::SystemTime;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, RenameFlags, Stat};
use rustix::io::Errno;

use super::direct::{self, ReadBuffer};
use super::pace::Way;
use super::remembered::{self, Names};
use super::{Listed, Result, Storage, StorageError, is_no_space, temporary_name};

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// What the name of a stream's temporary file ends with.
pub(super) const STREAM: &str = ".stream";

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Publish {
    New,
    Replace,
}

/// Writes and syncs the bytes under a temporary name, renames it, and syncs every directory that changed.
pub(super) fn publish(storage: &Storage, root: &Path, name: &str, bytes: &[u8], how: Publish) -> Result<()> {
    let temporary = temporary_name().map_err(|e| storage.failed("write", name, e.to_string()))?;
    let (from, to) = (root.join(&temporary), root.join(name));
    let failed = |e: io::Error| match is_no_space(&e.to_string()) {
        true => StorageError::NoSpace { location: storage.location.clone(), name: name.to_owned() },
        false => storage.failed("write", name, e.to_string()),
    };
    let result = write(storage, root, &from, bytes).map_err(failed).and_then(|()| {
        let parent = to.parent().unwrap_or(root);
        make_directories(root, parent).map_err(failed)?;
        match rename(&from, &to, how) {
            Ok(()) => sync_directory(parent).map_err(failed),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                Err(StorageError::Exists { location: storage.location.clone(), name: name.to_owned() })
            }
            Err(e) => Err(failed(e)),
        }
    });
    if result.is_err() {
        // Best effort: what cannot be removed now is swept by the next prune.
        let _ = fs::remove_file(&from);
    }
    result
}

/// Gives a file that is whole and synced its name, which must be free, and syncs the directory.
pub(super) fn publish_file(storage: &Storage, root: &Path, from: &Path, name: &str) -> Result<()> {
    let to = root.join(name);
    let parent = to.parent().unwrap_or(root);
    match rename(from, &to, Publish::New) {
        Ok(()) => sync_directory(parent).map_err(|e| storage.failed("write", name, e.to_string())),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            Err(StorageError::Exists { location: storage.location.clone(), name: name.to_owned() })
        }
        Err(e) => Err(storage.failed("write", name, e.to_string())),
    }
}

/// Removes temporary files of streams that nobody holds a lock on, and others (of which nothing but their age tells) that are old.
pub(super) fn sweep_unlocked(storage: &Storage, root: &Path) -> Result<u64> {
    let mut swept = 0;
    for object in list(storage, root, super::TEMPORARY)? {
        let Some(file) = File::open(root.join(&object.name)).ok().filter(|_| super::is_temporary_name(&object.name)) else { continue };
        let is_left = if object.name.ends_with(STREAM) {
            rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok()
        } else {
            file.metadata().and_then(|m| m.modified()).is_ok_and(|t| t.elapsed().is_ok_and(|age| age > super::OLD))
        };
        if is_left {
            delete(storage, root, &object.name)?;
            swept += 1;
        }
    }
    Ok(swept)
}

/// The files of the root itself, sorted by name.
pub(super) fn top(storage: &Storage, root: &Path) -> Result<Vec<Listed>> {
    let failed = |e: io::Error| storage.failed("list", "the directory", e.to_string());
    let mut found = Vec::new();
    let entries = match fs::read_dir(root) {
        // Nothing was written to it yet, or it is not mounted: whoever knows what was there tells them apart.
        Err(e) if absent(&e) => return Ok(found),
        entries => entries.map_err(failed)?,
    };
    for entry in entries {
        let entry = entry.map_err(failed)?;
        // Names that are no text are none of ours.
        let Ok(name) = entry.file_name().into_string() else { continue };
        match fs::metadata(entry.path()) {
            Ok(meta) if meta.is_file() => found.push(Listed { name, size: meta.len() }),
            Ok(_) => {}
            // A link that leads nowhere is none of ours: others have their files beside archives.
            Err(e) if absent(&e) && entry.path().is_symlink() => {}
            Err(e) if absent(&e) && !is_named(&open_root(root).map_err(|e| failed(e.into()))?, &name).map_err(|e| failed(e.into()))? => {}
            Err(e) => return Err(storage.failed("list", &name, e.to_string())),
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// A new file with these bytes, synced.
fn write(storage: &Storage, root: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let before = |len| {
        storage.shared.pace.wait(Way::Up, len);
        storage.shared.went(len);
    };
    let piece = storage.shared.pace.piece(Way::Up, bytes.len());
    match direct::write_new(path, bytes, piece, &before) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            make_directories(root, path.parent().unwrap_or(root))?;
            direct::write_new(path, bytes, piece, &before)
        }
        other => other,
    }
}

/// Exactly `len` bytes from `offset`.
pub(super) fn read(storage: &Storage, root: &Path, name: &str, offset: u64, len: u64, into: &mut ReadBuffer) -> Result<()> {
    let failed = |e| absent_or(storage, "read", name, &e);
    let file = File::open(root.join(name)).map_err(failed)?;
    let there = file.metadata().map_err(failed)?.len().saturating_sub(offset);
    if there < len {
        return Err(storage.short(name, format!("it is cut off: {there} of {len} bytes at {offset} are there")));
    }
    storage.shared.came_now(len as usize);
    direct::read_exact_at(&file, offset, len as usize, into).map_err(failed)
}

pub(super) fn size(storage: &Storage, root: &Path, name: &str) -> Result<u64> {
    let meta = fs::metadata(root.join(name)).map_err(|e| absent_or(storage, "look at", name, &e))?;
    // What is no file is no object, and no listing has it.
    if meta.is_file() { Ok(meta.len()) } else { Err(absent_or(storage, "look at", name, &std::io::ErrorKind::NotFound.into())) }
}

pub(super) fn sizes_if_there(storage: &Storage, root: &Path, names: &[String]) -> Result<Vec<Option<u64>>> {
    // From the root on: its own way there is not gone anew for each.
    let top = match open_root(root) {
        Err(Errno::NOENT) => return Ok(vec![None; names.len()]),
        other => other.map_err(|e| absent_or(storage, "open", "", &e.into()))?,
    };
    let size = |name: &String| match rustix::fs::statat(&top, name.as_str(), AtFlags::empty()) {
        Ok(stat) => Ok((FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile).then_some(stat.st_size as u64)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(absent_or(storage, "look at", name, &e.into())),
    };
    names.iter().map(size).collect()
}

/// Whether a directory lies on a file system that other machines may have mounted too; true where that cannot be told.
pub(super) fn is_of_a_network(root: &Path) -> bool {
    /// NFS, SMB, CIFS, SMB 2, FUSE (sshfs, GlusterFS), Ceph, 9P, AFS, GFS2, OCFS2 and Lustre: `statfs(2)`, linux/magic.h.
    const SHARED: [u32; 11] = [
        0x6969,
        0x517B,
        0xFF53_4D42,
        0xFE53_4D42,
        0x6573_5546,
        0x00C3_6400,
        0x0102_1997,
        0x5346_414F,
        0x0116_1970,
        0x7461_636F,
        0x0BD0_0BD0,
    ];
    rustix::fs::statfs(root).map_or(true, |found| SHARED.contains(&(found.f_type as u32)))
}

/// All files below the directory `prefix`, sorted by name; what was removed meanwhile is not among them.
pub(super) fn list(storage: &Storage, root: &Path, prefix: &str) -> Result<Vec<Listed>> {
    let mut found = Vec::new();
    let names = names(storage, root, prefix, false)?;
    let top = open_root(root).map_err(|e| storage.failed("list", prefix, io::Error::from(e).to_string()))?;
    for name in names {
        match unless_gone(&top, &name, || rustix::fs::statat(&top, &name, AtFlags::empty())) {
            Ok(Some(stat)) => found.push(Listed { name, size: stat.st_size as u64 }),
            Ok(None) => {}
            Err(e) => return Err(storage.failed("list", &name, io::Error::from(e).to_string())),
        }
    }
    Ok(found)
}

fn open_root(root: &Path) -> std::result::Result<OwnedFd, Errno> {
    rustix::fs::open(root, DIRECTORY, Mode::empty())
}

/// What `ask` says of a name below `top`; None where it is not there. That is believed when its directory does not name it either: a file system that cannot
/// reach something just now (its other machine, its other disk), and a link to what is not mounted, say that it is not there of what is only out of reach.
fn unless_gone<T>(top: &OwnedFd, name: &str, ask: impl Fn() -> std::result::Result<T, Errno>) -> std::result::Result<Option<T>, Errno> {
    match ask() {
        Err(Errno::NOENT) if !is_named(top, name)? => Ok(None),
        // It may have come meanwhile.
        Err(Errno::NOENT) => ask().map(Some),
        other => other.map(Some),
    }
}

/// Whether the directory of a name below `top` has it.
fn is_named(top: &OwnedFd, name: &str) -> std::result::Result<bool, Errno> {
    let (parent, name) = name.rsplit_once('/').unwrap_or((".", name));
    let opened = match rustix::fs::openat(top, parent, DIRECTORY, Mode::empty()) {
        // Below what is out of reach nothing is known to be gone.
        Err(Errno::NOENT) => return if parent == "." { Err(Errno::NOENT) } else { is_named(top, parent) },
        other => other?,
    };
    let mut buffer = Vec::with_capacity(32 << 10);
    let mut entries = RawDir::new(&opened, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        if entry?.file_name().to_bytes() == name.as_bytes() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

/// As [`list`], the names only. `remember`: directories in which nothing came or went since they were listed last are not listed again.
pub(super) fn names(storage: &Storage, root: &Path, prefix: &str, remember: bool) -> Result<Vec<String>> {
    let prefix = prefix.trim_end_matches('/');
    let failed = |directory: &str, e: Errno| storage.failed("list", directory, io::Error::from(e).to_string());
    // A directory that was never made holds nothing; a root that is gone is an error.
    let top = open_root(root).map_err(|e| failed(prefix, e))?;
    let device = if remember { remembered::local_device(&top) } else { None };
    let (mut found, mut todo) = (Vec::new(), vec![prefix.to_owned()]);
    let mut buffer = Vec::with_capacity(32 << 10);
    while let Some(directory) = todo.pop() {
        let mut take = |names: &Names| {
            found.extend(names.files.iter().map(|name| [&directory, "/", name].concat()));
            todo.extend(names.directories.iter().rev().map(|name| [&directory, "/", name].concat()));
        };
        let at = SystemTime::now();
        // A link that leads to a directory has times of its own.
        let is_believed = |stat: &Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory && Some(stat.st_dev) == device;
        let before = device.and_then(|_| rustix::fs::statat(&top, directory.as_str(), AtFlags::SYMLINK_NOFOLLOW).ok()).filter(is_believed);
        if before.as_ref().is_some_and(|stat| remembered::with(stat, &mut take).is_some()) {
            continue;
        }
        let Some(names) = names_in(&top, &directory, &mut buffer).map_err(|(name, e)| failed(&name, e))? else { continue };
        take(&names);
        if let Some(before) = before {
            remembered::put(&before, at, names);
        }
    }
    // Mostly it is so already.
    found.sort_unstable();
    Ok(found)
}

/// What stands for the names below these prefixes, as long as it stays the same; None where not all of them are remembered and as they were.
pub(super) fn state(root: &Path, prefixes: &[&str]) -> Option<[u8; 32]> {
    let top = open_root(root).ok()?;
    let device = remembered::local_device(&top)?;
    let mut hasher = blake3::Hasher::new();
    let mut todo: Vec<String> = prefixes.iter().map(|prefix| prefix.trim_end_matches('/').to_owned()).collect();
    while let Some(directory) = todo.pop() {
        let stat = rustix::fs::statat(&top, directory.as_str(), AtFlags::SYMLINK_NOFOLLOW).ok().filter(|stat| stat.st_dev == device)?;
        remembered::with(&stat, |names| todo.extend(names.directories.iter().map(|name| [&directory, "/", name].concat())))?;
        hasher.update(&remembered::mark(&stat)).update(directory.as_bytes()).update(&[0]);
    }
    Some(*hasher.finalize().as_bytes())
}

/// The names in one directory, sorted; None where there is none.
fn names_in(top: &OwnedFd, directory: &str, buffer: &mut Vec<u8>) -> std::result::Result<Option<Names>, (String, Errno)> {
    let of_it = |e| (directory.to_owned(), e);
    let opened = unless_gone(top, directory, || rustix::fs::openat(top, directory, DIRECTORY, Mode::empty())).map_err(of_it)?;
    let Some(opened) = opened else { return Ok(None) };
    let mut names = Names { is_sure: true, ..Names::default() };
    let mut entries = RawDir::new(&opened, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = entry.map_err(of_it)?;
        // Names that are no text are none of ours.
        let Some(name) = entry.file_name().to_str().ok().filter(|name| *name != "." && *name != "..") else { continue };
        let kind = match entry.file_type() {
            // Of a link what it leads to counts; some file systems say of nothing what it is.
            FileType::Symlink | FileType::Unknown => {
                names.is_sure = false;
                match unless_gone(&opened, name, || rustix::fs::statat(&opened, name, AtFlags::empty())) {
                    Ok(Some(stat)) => FileType::from_raw_mode(stat.st_mode),
                    Ok(None) => continue,
                    Err(e) => return Err((format!("{directory}/{name}"), e)),
                }
            }
            other => other,
        };
        match kind {
            FileType::Directory => names.directories.push(name.into()),
            FileType::RegularFile => names.files.push(name.into()),
            _ => {}
        }
    }
    names.files.sort_unstable();
    names.directories.sort_unstable();
    Ok(Some(names))
}

fn absent_or(storage: &Storage, verb: &'static str, name: &str, error: &io::Error) -> StorageError {
    match error.kind() {
        io::ErrorKind::NotFound => StorageError::NotFound { location: storage.location.clone(), name: name.to_owned() },
        _ => storage.failed(verb, name, error.to_string()),
    }
}

fn rename(from: &Path, to: &Path, how: Publish) -> io::Result<()> {
    if how == Publish::Replace {
        return fs::rename(from, to);
    }
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // File systems without RENAME_NOREPLACE (some network ones) still refuse a second hard link.
        Err(Errno::INVAL | Errno::NOSYS) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        other => Ok(other?),
    }
}

/// Makes what is missing of `directory`, which is `root` or below it; when it returns, its name and those above it are on the disk.
pub(super) fn make_directories(root: &Path, directory: &Path) -> io::Result<()> {
    debug_assert!(directory.starts_with(root));
    crate::durable::make_directories(directory)
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Removes a file; one that is not there is fine. When it returns, it stays away: a manifest, an index object or a key slot that a power
/// cut brought back would refer to packs that were deleted after it, or to keys that were given up. Packs may come back, for nothing refers
/// to them any more and the next prune finds them; they are many.
pub(super) fn delete(storage: &Storage, root: &Path, name: &str) -> Result<()> {
    let path = root.join(name);
    let remove = || -> io::Result<()> {
        match fs::remove_file(&path) {
            Err(e) if !absent(&e) => return Err(e),
            _ => {}
        }
        match path.parent().filter(|_| !name.starts_with("packs/")).map_or(Ok(()), sync_directory) {
            Err(e) if absent(&e) => Ok(()),
            synced => synced,
        }
    };
    remove().map_err(|e| storage.failed("delete", name, e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_of(top: &OwnedFd, directory: &str) -> std::result::Result<Option<usize>, (String, Errno)> {
        Ok(names_in(top, directory, &mut Vec::with_capacity(1 << 10))?.map(|names| names.files.len() + names.directories.len()))
    }

    #[test]
    fn a_link_to_what_is_not_mounted_is_no_empty_directory() {
        let dir = tempfile::tempdir().unwrap();
        let top = open_root(dir.path()).unwrap();
        assert_eq!(names_of(&top, "packs"), Ok(None), "it was never made");
        assert_eq!(names_of(&top, "packs/06"), Ok(None));
        std::os::unix::fs::symlink(dir.path().join("other"), dir.path().join("packs")).unwrap();
        assert_eq!(names_of(&top, "packs"), Err(("packs".into(), Errno::NOENT)));
        assert_eq!(names_of(&top, "packs/06"), Err(("packs/06".into(), Errno::NOENT)));
        fs::create_dir(dir.path().join("other")).unwrap();
        assert_eq!(names_of(&top, "packs"), Ok(Some(0)));
        assert_eq!(names_of(&top, "packs/06"), Ok(None));
        std::os::unix::fs::symlink(dir.path().join("third"), dir.path().join("other/06")).unwrap();
        assert_eq!(names_of(&top, "packs"), Err(("packs/06".into(), Errno::NOENT)));
        fs::write(dir.path().join("third"), "").unwrap();
        assert_eq!(names_of(&top, "packs"), Ok(Some(1)));
    }

    #[test]
    fn what_came_meanwhile_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let top = open_root(dir.path()).unwrap();
        let asked = std::cell::Cell::new(0);
        let ask = || {
            asked.set(asked.get() + 1);
            let answer = rustix::fs::statat(&top, "a", AtFlags::empty()).map(drop);
            fs::write(dir.path().join("a"), "").unwrap();
            answer
        };
        assert_eq!(unless_gone(&top, "a", ask), Ok(Some(())));
        assert_eq!(asked.get(), 2);
    }
}
