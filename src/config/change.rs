//! Making a change of the configuration's files: all of it or nothing, wherever it is cut off, and back again.
//!
//! In: a [`Draft`]. Out: files. A redo journal beside the main file holds the new texts; the moment in which it appears is the moment of the
//! change, for whoever reads the files lays it over them. What comes after (each file replaced, those that are gone removed, the journal removed)
//! is finished by anybody later. What was before is kept in a directory of its own, which the next change replaces: an undo is a change back.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, Metadata, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{
    Access, AtFlags, CWD, FlockOperation, RenameFlags, StatxAttributes, StatxFlags, XattrFlags, flock, fremovexattr, fsetxattr, getxattr,
    statx,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use super::draft::Draft;
use super::load::absolute;
use super::source_text::{read_text, reason};
use super::texts::{Texts, digest, drop_ins, is_drop_in, read_files};

/// The journal, beside the main file.
const JOURNAL: &str = ".keepd-change.json";
/// Of the journal and of what is kept for an undo.
const FORMAT: u32 = 1;
/// No change is longer, in bytes.
const LONGEST: u64 = 256 << 20;
/// What is written and not in its place yet begins so.
const TEMPORARY: &str = ".keepd-change-";
/// Of a directory with what was before.
const MANIFEST: &str = "manifest.json";
/// Where the kernel keeps who else may read a file.
const ACCESS_LIST: &str = "system.posix_acl_access";
/// The longest value of an extended attribute.
const LONGEST_ATTRIBUTE: usize = 64 << 10;

/// A change that counts, whether or not its files were written.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Journal {
    format: u32,
    /// The name of the main file that it is a change of: there may be several in a directory, and they share `conf.d`.
    #[serde(default)]
    main: Option<String>,
    /// Of what is kept for an undo.
    id: String,
    previous: PathBuf,
    files: Vec<Changed>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Changed {
    /// From the main file's directory.
    path: String,
    /// The digest of the text before; None: there was no such file.
    before: Option<String>,
    /// The text that counts; None: there is no such file.
    text: Option<String>,
    /// Of a file that comes back: the mode that it had.
    #[serde(default)]
    mode: Option<u32>,
}

/// What is kept for an undo.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    id: String,
    main: PathBuf,
    files: Vec<Kept>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    /// From the main file's directory.
    path: String,
    /// The file in the directory that has its text; None: there was no such file.
    kept: Option<String>,
    /// The digest of its text after the change; None: there was no such file any more.
    after: Option<String>,
    /// That it had.
    #[serde(default)]
    mode: Option<u32>,
}

/// Finishes a change that was begun and cut off; false when there was none.
pub fn finish_change(main: &Path) -> Result<bool, String> {
    let main = absolute(main);
    let is_there = Journal::read(&main).map_err(told)?.is_some();
    match Lock::take(&main) {
        Ok(_lock) => finish(&main, Journal::read(&main).map_err(told)?),
        // There is nothing to do but to tidy up.
        Err(_) if !is_there => Ok(false),
        Err(why) => Err(why),
    }
}

/// Where the configuration from before the last change is kept.
pub fn previous(state_dir: &Path) -> PathBuf {
    state_dir.join("previous-config")
}

/// Removes what was kept for a change that was finished, or that never began: a power cut may have brought it back. Best effort.
pub fn clear_kept(main: &Path, previous: &Path) {
    let main = absolute(main);
    if let Ok(_lock) = Lock::take(&main)
        && matches!(Journal::read(&main), Ok(None))
    {
        let _ = std::fs::remove_dir_all(beside(previous));
    }
}

/// Back to what was before the last change that keepd made. Refused when nothing was kept, or when the files were changed since.
pub fn undo(main: &Path, previous: &Path) -> Result<Draft, String> {
    finish_change(main)?;
    let failed = |why: String| format!("the last change of the configuration cannot be undone: {why}");
    let read = |name: &str| -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(previous.join(name))?.take(LONGEST).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let manifest = match read(MANIFEST) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(failed("nothing was kept; keepd made none yet".to_owned())),
        Err(e) => return Err(failed(format!("{}: {}", previous.join(MANIFEST).display(), reason(&e)))),
    };
    let damaged = |why: &dyn std::fmt::Display| failed(format!("what was kept in {} cannot be read: {why}", previous.display()));
    let manifest: Manifest = serde_json::from_slice(&manifest).map_err(|e| damaged(&e))?;
    if manifest.format != FORMAT {
        return Err(damaged(&"it is of another version of keepd"));
    }
    if manifest.main != absolute(main) {
        return Err(failed(format!("what was kept is that of {}", manifest.main.display())));
    }
    let now = Texts::read(main).map_err(|problems| failed(problems.to_string()))?;
    let after = manifest.files.iter().filter_map(|kept| Some((kept.path.clone(), kept.after.clone()?))).collect();
    let there: BTreeMap<String, String> = now.files.iter().map(|(path, text)| (now.relative(path), digest(text))).collect();
    let changed = differing(&there, &after);
    if !changed.is_empty() {
        return Err(failed(format!(
            "changed since: {}; the texts of before lie in {}, take from them what you want",
            changed.join(", "),
            previous.display()
        )));
    }
    let mut before = Texts { main: main.to_owned(), files: Vec::new() };
    for kept in &manifest.files {
        let path = place(main, &kept.path).map_err(|why| damaged(&why))?;
        let Some(name) = &kept.kept else { continue };
        if name.contains('/') {
            return Err(damaged(&format!("'{name}' is no file's name")));
        }
        let text = read(name).and_then(|bytes| String::from_utf8(bytes).map_err(io::Error::other)).map_err(|e| damaged(&e))?;
        before.put(&path, Some(text));
    }
    Ok(Draft::between(now, before))
}

/// See [`Draft::commit`].
pub(super) fn commit(draft: &Draft, previous: &Path) -> Result<(), String> {
    let changes = draft.changes();
    if changes.is_empty() {
        return Ok(());
    }
    let failed = |why: String| format!("the configuration was not changed: {why}");
    let main = absolute(&draft.after().main);
    let directory = parent(&main);
    make_directory(directory, 0o755).map_err(failed)?;
    let _lock = Lock::take(&main).map_err(failed)?;
    // Also that of another main file here: there is one journal in a directory.
    finish(&main, Journal::read_any(&main).map_err(told).map_err(failed)?).map_err(failed)?;
    as_they_were_read(draft).map_err(failed)?;
    for (path, ..) in &changes {
        if place(&main, &draft.after().relative(path)).map_err(failed)?.file_name() != path.file_name() {
            return Err(failed(format!("the name of {} is no text; rename it", path.display())));
        }
    }

    let mut id = [0u8; 16];
    getrandom::fill(&mut id).map_err(|e| failed(e.to_string()))?;
    let id = data_encoding::HEXLOWER.encode(&id);
    let previous = absolute(previous);
    let kept = Manifest::read(&previous);
    let next = keep(draft, &main, &previous, &id).map_err(failed)?;
    let files = changes.iter().map(|(path, before, after)| {
        let path = draft.after().relative(path);
        let mode = kept.as_ref().filter(|kept| before.is_none() && kept.main == main).and_then(|kept| kept.mode_of(&path));
        Changed { path, before: before.map(digest), text: after.map(str::to_owned), mode }
    });
    let name = main.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    let journal = Journal { format: FORMAT, main: name, id, previous, files: files.collect() };
    let outcome = prepare(&main, &journal.files).and_then(|prepared| {
        // Once more, for to make it all ready took its time.
        as_they_were_read(draft)?;
        journal.write(directory)?;
        Ok(prepared)
    });
    match outcome {
        // From here on it counts; what cannot be done now is done later, unless nothing of it was done.
        Ok(prepared) => match apply(&main, &journal, prepared) {
            Err(NotApplied { is_begun: false, why }) if take_back(&main).is_ok() => {
                let _ = std::fs::remove_dir_all(next);
                Err(failed(why))
            }
            Err(NotApplied { why, .. }) => {
                tracing::warn!(
                    "the change of the configuration counts, but is not wholly written: {why}; keepd tries again when it starts"
                );
                Ok(())
            }
            Ok(()) => Ok(()),
        },
        Err(why) => {
            let _ = std::fs::remove_dir_all(next);
            Err(failed(why))
        }
    }
}

/// An error unless the files on the disk are those that the draft began with.
fn as_they_were_read(draft: &Draft) -> Result<(), String> {
    let before = draft.before();
    let mut there = BTreeMap::new();
    for (path, text) in read_files(&before.main).map_err(|problem| problem.to_string())? {
        let is_missing = path.symlink_metadata().is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
        match text {
            Ok(text) => drop(there.insert(before.relative(&path), text)),
            Err(_) if is_missing => {}
            Err(why) => return Err(format!("{} cannot be read: {why}", path.display())),
        }
    }
    let read = before.files.iter().map(|(path, text)| (before.relative(path), text.clone())).collect();
    match differing(&there, &read).as_slice() {
        [] => Ok(()),
        changed => Err(format!("somebody changed it meanwhile ({}); look at that and try again", changed.join(", "))),
    }
}

fn differing(one: &BTreeMap<String, String>, other: &BTreeMap<String, String>) -> Vec<String> {
    let mut names: Vec<&String> = one.keys().chain(other.keys()).collect();
    names.sort();
    names.dedup();
    names.into_iter().filter(|name| one.get(*name) != other.get(*name)).cloned().collect()
}

impl Journal {
    fn path(main: &Path) -> PathBuf {
        parent(main).join(JOURNAL)
    }

    /// A change that was begun and is one of this configuration; the error names the journal and says what is wrong with it.
    pub fn read(main: &Path) -> Result<Option<Self>, (PathBuf, String)> {
        let is_shared = |journal: &Self| journal.files.iter().any(|file| file.path.starts_with("conf.d/"));
        Ok(Self::read_any(main)?.filter(|journal| journal.main(main) == main || is_shared(journal)))
    }

    /// The main file that it is a change of.
    fn main(&self, main: &Path) -> PathBuf {
        let other = self.main.as_ref().filter(|name| main.file_name().is_none_or(|own| own != name.as_str()));
        other.map_or_else(|| main.to_owned(), |name| parent(main).join(name))
    }

    /// Of whichever main file in this directory.
    fn read_any(main: &Path) -> Result<Option<Self>, (PathBuf, String)> {
        let path = Self::path(main);
        match Self::read_file(&path, main) {
            Ok(journal) => Ok(journal),
            Err(why) => {
                let text = format!(
                    "a change of the configuration was begun and cannot be made out: {why}; see that the files say what you want, then remove \
                     this one"
                );
                Err((path, text))
            }
        }
    }

    fn read_file(path: &Path, main: &Path) -> Result<Option<Self>, String> {
        match path.symlink_metadata() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(reason(&e)),
            Ok(found) if !found.is_file() => return Err("it is not a regular file".to_owned()),
            Ok(_) => {}
        }
        let mut bytes = Vec::new();
        match File::open(path).and_then(|file| file.take(LONGEST).read_to_end(&mut bytes)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(reason(&e)),
            Ok(_) => {}
        }
        let journal: Self = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
        if journal.format != FORMAT {
            return Err(format!("it is of format {}, and this keepd knows {FORMAT}", journal.format));
        }
        if let Some(name) = journal.main.as_ref().filter(|name| Path::new(name.as_str()).file_name() != Some(name.as_ref())) {
            return Err(format!("'{}' is no file's name", name.escape_debug()));
        }
        let main = journal.main(main);
        journal.files.iter().try_for_each(|file| place(&main, &file.path).map(drop))?;
        Ok(Some(journal))
    }

    /// Durable when it returns, and the moment in which the change counts.
    fn write(&self, directory: &Path) -> Result<(), String> {
        let path = directory.join(JOURNAL);
        let failed = |e: io::Error| format!("{} cannot be written: {}", path.display(), reason(&e));
        let bytes = serde_json::to_vec(self).map_err(|e| failed(e.into()))?;
        step().map_err(failed)?;
        let mut file = temporary(directory).map_err(failed)?;
        file.write_all(&bytes).map_err(failed)?;
        step().map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        step().map_err(failed)?;
        file.persist(&path).map_err(|e| failed(e.error))?;
        // It is there: an error from here on would say that nothing was changed.
        if let Err(e) = step().and_then(|()| sync(directory)) {
            tracing::warn!("{} may not outlive a power failure: {}", path.display(), reason(&e));
        }
        Ok(())
    }

    /// Lays the new texts over those that were read. An error names a file that somebody changed since the change was begun.
    pub fn overlay(&self, main: &Path, found: &mut Vec<(PathBuf, Result<String, String>)>) -> Result<(), (PathBuf, String)> {
        let its = self.main(main);
        for file in &self.files {
            let path = place(&its, &file.path).map_err(|why| (Self::path(main), why))?;
            // That of another configuration is nobody's here.
            if path == its && path != main {
                continue;
            }
            let at = found.iter().position(|(p, _)| *p == path);
            let there = at.and_then(|at| found.get(at)).filter(|(_, text)| text.is_ok() || path.symlink_metadata().is_ok());
            match there.map(|(_, text)| text) {
                Some(Err(_)) => continue,
                Some(Ok(text)) => self.expected(file, Some(text)).map_err(|why| (path.clone(), why))?,
                None => self.expected(file, None).map_err(|why| (path.clone(), why))?,
            }
            found.retain(|(p, _)| *p != path);
            found.extend(file.text.clone().map(|text| (path, Ok(text))));
        }
        found.sort_by(|(a, _), (b, _)| (a != main, a).cmp(&(b != main, b)));
        Ok(())
    }

    /// An error unless a file is as it was before the change or as it is after it.
    fn expected(&self, file: &Changed, there: Option<&str>) -> Result<(), String> {
        if there == file.text.as_deref() || there.map(digest) == file.before {
            return Ok(());
        }
        Err(format!(
            "was changed while a change by keepd was only begun ({JOURNAL} beside the main file holds it); to keep this file remove that one, to \
             keep the change put this file back"
        ))
    }
}

/// With the lock held. The error says how to get on.
fn finish(main: &Path, journal: Option<Journal>) -> Result<bool, String> {
    let Some(journal) = journal else {
        clear(main);
        return Ok(false);
    };
    finish_this(&journal.main(main), &journal).map_err(|why| {
        format!(
            "a change that was begun cannot be finished: {why}; mend that and try again, or drop the change: see that the files say what you \
             want (those of before are in {}), and remove {}",
            beside(&journal.previous).display(),
            Journal::path(main).display()
        )
    })?;
    // What the one that was cut off had written beside its places is not what was put there now.
    clear(main);
    Ok(true)
}

fn finish_this(main: &Path, journal: &Journal) -> Result<(), String> {
    for file in &journal.files {
        let path = place(main, &file.path)?;
        let there = match path.symlink_metadata() {
            Ok(_) => Some(read_text(&path).map_err(|why| format!("{} cannot be read: {why}", path.display()))?),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(format!("{} cannot be looked at: {}", path.display(), reason(&e))),
        };
        journal.expected(file, there.as_deref()).map_err(|why| format!("{}: {why}", path.display()))?;
    }
    let prepared = prepare(main, &journal.files)?;
    apply(main, journal, prepared).map_err(|failed| failed.why)
}

/// A change counts no more of which nothing was written.
fn take_back(main: &Path) -> io::Result<()> {
    std::fs::remove_file(Journal::path(main))?;
    if let Err(e) = sync(parent(main)) {
        tracing::warn!("that {} was removed may not outlive a power failure: {}", Journal::path(main).display(), reason(&e));
    }
    Ok(())
}

/// A file that takes its place by a rename, or one that goes.
struct Prepared {
    path: PathBuf,
    new: Option<NamedTempFile>,
}

/// Writes everything beside its place, so that what cannot be written is known before anything counts.
fn prepare(main: &Path, files: &[Changed]) -> Result<Vec<Prepared>, String> {
    let mut prepared = Vec::with_capacity(files.len());
    for file in files {
        let path = place(main, &file.path)?;
        let failed = |e: io::Error| format!("{} cannot be written: {}", path.display(), reason(&e));
        let Some(text) = &file.text else {
            // The link goes, not what it leads to.
            if path.symlink_metadata().is_ok() {
                let directory = parent(&path);
                rustix::fs::access(directory, Access::WRITE_OK | Access::EXEC_OK).map_err(|e| failed(e.into()))?;
                may_be_replaced(&path).map_err(failed)?;
            }
            prepared.push(Prepared { path, new: None });
            continue;
        };
        let (path, found) = match path.canonicalize() {
            Ok(target) => {
                let found = target.metadata().map_err(failed)?;
                may_be_replaced(&target).map_err(failed)?;
                (target, Some(found))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound && path.symlink_metadata().is_err() => {
                make_directory(parent(&path), 0o755)?;
                (path.clone(), None)
            }
            Err(e) => return Err(failed(e)),
        };
        step().map_err(failed)?;
        let mut new = temporary(parent(&path)).map_err(failed)?;
        new.write_all(text.as_bytes()).map_err(failed)?;
        match &found {
            Some(found) => like(new.as_file(), &path, found).map_err(failed)?,
            None => like_main(new.as_file(), main, file.mode).map_err(failed)?,
        }
        step().map_err(failed)?;
        new.as_file().sync_all().map_err(failed)?;
        prepared.push(Prepared { path, new: Some(new) });
    }
    Ok(prepared)
}

/// An error for what the kernel lets nobody rename over or remove, where that is quick to tell.
fn may_be_replaced(path: &Path) -> io::Result<()> {
    // One that does not tell is found out by trying.
    let Ok(found) = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty()) else { return Ok(()) };
    if found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        let text = "it is mounted by itself, as single files are into containers, and such a one cannot be replaced; mount its directory";
        return Err(io::Error::other(text));
    }
    if found.stx_attributes.intersects(StatxAttributes::IMMUTABLE | StatxAttributes::APPEND) {
        return Err(io::Error::other("it has been made unchangeable (chattr +i or +a); chattr -ia takes that away"));
    }
    Ok(())
}

/// Owner, mode and access list of the file that is replaced.
fn like(file: &File, path: &Path, found: &Metadata) -> io::Result<()> {
    let own = file.metadata()?;
    if (own.uid(), own.gid()) != (found.uid(), found.gid()) {
        fchown(file, Some(found.uid()), Some(found.gid())).map_err(|e| match e.kind() {
            io::ErrorKind::PermissionDenied => io::Error::other(format!(
                "it belongs to {}:{} (user:group), and keepd may not give a file to them here; let it belong to {}:{}, or for a group alone \
                 give the directory that group and the setgid bit (chgrp, chmod g+s)",
                found.uid(),
                found.gid(),
                own.uid(),
                own.gid()
            )),
            _ => e,
        })?;
    }
    let of_list = |e: Errno| {
        io::Error::other(format!(
            "its access list (ACL) cannot be read or given to what takes its place ({e}); setfacl -b takes it away, then a group can do what it did"
        ))
    };
    let mut list = vec![0; LONGEST_ATTRIBUTE];
    let list = match getxattr(path, ACCESS_LIST, &mut list[..]) {
        Ok(len) => list.get(..len),
        Err(Errno::NODATA | Errno::NOTSUP) => None,
        Err(e) => return Err(of_list(e)),
    };
    if list.is_none() {
        // One of the directory's: with the mode of now it would let others in.
        match fremovexattr(file, ACCESS_LIST) {
            Ok(()) | Err(Errno::NODATA | Errno::NOTSUP) => {}
            Err(e) => return Err(of_list(e)),
        }
    }
    // After the owner, which may take bits away.
    file.set_permissions(Permissions::from_mode(found.mode() & 0o7777))?;
    list.map_or(Ok(()), |list| fsetxattr(file, ACCESS_LIST, list, XattrFlags::empty()).map_err(of_list))
}

/// A new file belongs to whom the main file belongs to, who alone reads it; one that comes back has the mode that it had.
fn like_main(file: &File, main: &Path, before: Option<u32>) -> io::Result<()> {
    let own = file.metadata()?;
    let main = main.metadata().ok();
    if let Some(main) = main.as_ref().filter(|main| (own.uid(), own.gid()) != (main.uid(), main.gid())) {
        // Who may not give it away keeps it.
        let _ = fchown(file, Some(main.uid()), Some(main.gid()));
    }
    let usual = match main.map_or(0o600, |main| main.mode() & 0o600) {
        0 => 0o600,
        mode => mode,
    };
    file.set_permissions(Permissions::from_mode(before.map_or(usual, |mode| mode & 0o777)))
}

/// Why a change was not wholly written, and whether some of it was.
struct NotApplied {
    is_begun: bool,
    why: String,
}

/// Puts every file in its place, then what was before in its own, and removes the journal.
fn apply(main: &Path, journal: &Journal, prepared: Vec<Prepared>) -> Result<(), NotApplied> {
    let mut directories = Vec::new();
    for Prepared { path, new } in prepared {
        let is_begun = !directories.is_empty();
        let failed = |e: io::Error| NotApplied { is_begun, why: format!("{} cannot be replaced: {}", path.display(), reason(&e)) };
        step().map_err(failed)?;
        match new {
            Some(new) => drop(new.persist(&path).map_err(|e| failed(e.error))?),
            None => match std::fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
                _ => {}
            },
        }
        directories.push(parent(&path).to_owned());
    }
    settle(main, journal, directories).map_err(|why| NotApplied { is_begun: true, why })
}

/// What comes after the files are in their places, which are in `directories`.
fn settle(main: &Path, journal: &Journal, mut directories: Vec<PathBuf>) -> Result<(), String> {
    directories.sort();
    directories.dedup();
    for directory in directories {
        match step().and_then(|()| sync(&directory)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(format!("{} cannot be synced: {}", directory.display(), reason(&e)));
            }
            _ => {}
        }
    }
    adopt(&journal.previous, &journal.id)?;
    // Of an earlier attempt; nobody looks for it once the journal is gone.
    clear(main);
    let path = Journal::path(main);
    let gone = step().and_then(|()| std::fs::remove_file(&path)).and_then(|()| step()).and_then(|()| sync(parent(main)));
    gone.map_err(|e| format!("{} cannot be removed: {}", path.display(), reason(&e)))
}

/// Writes what is now into a directory beside `previous`, which takes its place once the change counts.
fn keep(draft: &Draft, main: &Path, previous: &Path, id: &str) -> Result<PathBuf, String> {
    let next = beside(previous);
    let failed = |e: io::Error| format!("what is now cannot be kept in {}: {}", next.display(), reason(&e));
    match std::fs::remove_dir_all(&next) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    make_directory(parent(previous), 0o700)?;
    let (before, after) = (draft.before(), draft.after());
    let write = || -> io::Result<()> {
        step()?;
        DirBuilder::new().mode(0o700).create(&next)?;
        let mut paths: Vec<&PathBuf> = before.files.iter().chain(&after.files).map(|(path, _)| path).collect();
        paths.sort();
        paths.dedup();
        let mut files = Vec::with_capacity(paths.len());
        for (n, path) in paths.into_iter().enumerate() {
            let kept = before.text(path).map(|text| (format!("{n}.toml"), text));
            if let Some((name, text)) = &kept {
                write_new(&next.join(name), text.as_bytes())?;
            }
            files.push(Kept {
                path: before.relative(path),
                mode: kept.as_ref().and_then(|_| Some(path.metadata().ok()?.mode() & 0o7777)),
                kept: kept.map(|(name, _)| name),
                after: after.text(path).map(digest),
            });
        }
        step()?;
        let manifest = Manifest { format: FORMAT, id: id.to_owned(), main: main.to_owned(), files };
        write_new(&next.join(MANIFEST), &serde_json::to_vec(&manifest)?)?;
        step()?;
        sync(&next)?;
        sync(parent(&next))
    };
    match write() {
        Ok(()) => Ok(next),
        Err(e) => {
            let _ = std::fs::remove_dir_all(&next);
            Err(failed(e))
        }
    }
}

impl Manifest {
    /// That of a directory, if there is one that can be read.
    fn read(directory: &Path) -> Option<Self> {
        let mut bytes = Vec::new();
        File::open(directory.join(MANIFEST)).ok()?.take(LONGEST).read_to_end(&mut bytes).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Of a file that it has and that the change removed.
    fn mode_of(&self, path: &str) -> Option<u32> {
        self.files.iter().find(|kept| kept.path == path && kept.after.is_none())?.mode
    }
}

/// Puts what was kept for this change in its place, if it is not there yet.
fn adopt(previous: &Path, id: &str) -> Result<(), String> {
    let next = beside(previous);
    let failed = |e: io::Error| format!("what was before cannot be kept in {}: {}", previous.display(), reason(&e));
    if Manifest::read(&next).is_some_and(|manifest| manifest.id == id) {
        step().map_err(failed)?;
        swap(&next, previous).map_err(failed)?;
        step().and_then(|()| sync(parent(previous))).map_err(failed)?;
    }
    match std::fs::remove_dir_all(&next) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(e)),
        _ => Ok(()),
    }
}

/// In one step where the file system can; what was there is `next` then, or gone.
fn swap(next: &Path, previous: &Path) -> io::Result<()> {
    if previous.symlink_metadata().is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
        return std::fs::rename(next, previous);
    }
    match rustix::fs::renameat_with(CWD, next, CWD, previous, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(()),
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
            std::fs::remove_dir_all(previous)?;
            std::fs::rename(next, previous)
        }
        Err(e) => Err(e.into()),
    }
}

fn beside(previous: &Path) -> PathBuf {
    let mut name = previous.file_name().unwrap_or_default().to_owned();
    name.push(".next");
    previous.with_file_name(name)
}

/// Where a file of the configuration stands; nothing else is ever written.
fn place(main: &Path, relative: &str) -> Result<PathBuf, String> {
    let drop_in = relative.strip_prefix("conf.d/").filter(|name| !name.contains('/')).map(|name| drop_ins(main).join(name));
    if main.file_name().is_some_and(|name| name.to_string_lossy() == relative) {
        return Ok(main.to_owned());
    }
    drop_in.filter(|path| is_drop_in(path)).ok_or_else(|| format!("'{relative}' is no file of this configuration"))
}

/// Held while files are changed; one at a time.
struct Lock(File);

impl Lock {
    fn take(main: &Path) -> Result<Self, String> {
        let directory = parent(main);
        let failed = |e: io::Error| format!("{} cannot be opened: {}", directory.display(), reason(&e));
        let file = File::open(directory).map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => Err("another change of it is being made just now; try again".to_owned()),
            // Or the file system has no locks: then nothing but the look at what was read keeps two changes apart.
            _ => Ok(Self(file)),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Said, for a program that is started just now has the file too until it begins.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Removes what a change that was cut off left beside its place.
fn clear(main: &Path) {
    let mut directories = vec![parent(main).to_owned(), drop_ins(main)];
    let files = read_files(main).unwrap_or_default().into_iter().map(|(path, _)| path);
    directories.extend(files.filter(|path| path.is_symlink()).filter_map(|path| Some(parent(&path.canonicalize().ok()?).to_owned())));
    for directory in directories {
        let Ok(entries) = std::fs::read_dir(directory) else { continue };
        for entry in entries.flatten().filter(|e| e.file_name().as_encoded_bytes().starts_with(TEMPORARY.as_bytes())) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn temporary(directory: &Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new().prefix(TEMPORARY).suffix(".tmp").permissions(Permissions::from_mode(0o600)).tempfile_in(directory)
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn make_directory(directory: &Path, mode: u32) -> Result<(), String> {
    let made = DirBuilder::new().recursive(true).mode(mode).create(directory);
    made.map_err(|e| format!("{} cannot be made: {}", directory.display(), reason(&e)))
}

fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn told((path, why): (PathBuf, String)) -> String {
    format!("{}: {why}", path.display())
}

/// Between two things that a crash may come in between of: the tests stop or fail here.
#[cfg(not(test))]
fn step() -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
use tests::step;

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use serde_json::json;

    use super::super::ItemName;
    use super::*;

    /// How a process ends that was stopped at a step.
    const KILLED: i32 = 77;

    #[derive(Clone, Copy)]
    enum How {
        /// As by a power failure: nothing is tidied up.
        Kill,
        Fail,
    }

    thread_local! {
        static STOP: Cell<Option<(usize, How)>> = const { Cell::new(None) };
        static COUNT: Cell<usize> = const { Cell::new(0) };
    }

    pub(super) fn step() -> io::Result<()> {
        COUNT.set(COUNT.get() + 1);
        match STOP.get().filter(|(n, _)| *n == COUNT.get()) {
            None => Ok(()),
            Some((_, How::Kill)) => std::process::exit(KILLED),
            Some((_, How::Fail)) => Err(io::Error::other("no space left")),
        }
    }

    fn stop_at(n: usize, how: How) {
        STOP.set(Some((n, how)));
        COUNT.set(0);
    }

    fn item(text: &str) -> ItemName {
        text.parse().unwrap()
    }

    struct Bench {
        temp: tempfile::TempDir,
        main: PathBuf,
        previous: PathBuf,
    }

    const MAIN: &str = "# main\n[job.a]\nevery = \"6h\"\n";

    impl Bench {
        /// A main file, a drop-in, one that is a link, and what an earlier change kept.
        fn new() -> Self {
            let temp = tempfile::tempdir().unwrap();
            let at = |name: &str| temp.path().join(name);
            std::fs::create_dir_all(at("etc/conf.d")).unwrap();
            std::fs::create_dir(at("else")).unwrap();
            std::fs::create_dir(at("state")).unwrap();
            std::fs::write(at("etc/keepd.toml"), MAIN).unwrap();
            std::fs::write(at("etc/conf.d/gone.toml"), "[job.gone]\n").unwrap();
            std::fs::write(at("else/real"), "[job.linked]\nevery = \"1h\"\n").unwrap();
            std::os::unix::fs::symlink(at("else/real"), at("etc/conf.d/link.toml")).unwrap();
            let bench = Self { main: at("etc/keepd.toml"), previous: at("state/previous"), temp };
            let mut draft = Draft::of(bench.texts());
            draft.set(&item("settings.daemon"), &json!({"memory": 1})).unwrap();
            draft.commit(&bench.previous).unwrap();
            bench
        }

        fn texts(&self) -> Texts {
            Texts::read(&self.main).unwrap_or_else(|problems| panic!("{problems}"))
        }

        /// A change of every sort.
        fn draft(&self) -> Draft {
            let mut draft = Draft::of(self.texts());
            draft.set(&item("job.a"), &json!({"every": "7h"})).unwrap();
            draft.set(&item("job.linked"), &json!({"every": "2h"})).unwrap();
            draft.set(&item("job.new"), &json!({"every": "1d"})).unwrap();
            draft.remove(&item("job.gone")).unwrap();
            draft
        }

        /// What stands on the disk, whatever a journal says.
        fn on_disk(&self) -> Texts {
            let files = read_files(&self.main).unwrap().into_iter().map(|(path, text)| (path, text.unwrap()));
            Texts { main: self.main.clone(), files: files.collect() }
        }

        /// Nothing is left beside the files.
        fn is_tidy(&self) -> bool {
            let hidden = |directory: &str| {
                let entries = std::fs::read_dir(self.temp.path().join(directory)).unwrap();
                entries.flatten().filter(|e| e.file_name().as_encoded_bytes().starts_with(b".")).count()
            };
            let state: Vec<_> = std::fs::read_dir(self.temp.path().join("state")).unwrap().flatten().collect();
            hidden("etc") + hidden("etc/conf.d") + hidden("else") == 0 && state.len() == 1
        }

        /// Does it in a process of its own, which is killed at a step; false when it came to its end.
        fn killed(&self, what: &str, at: usize) -> bool {
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "config::change::tests::in_a_process_of_its_own", "--test-threads=1", "--quiet"])
                .env("KEEPD_TEST_DIRECTORY", self.temp.path())
                .env("KEEPD_TEST_WHAT", format!("{what} {at}"))
                .stdout(std::process::Stdio::null())
                .status()
                .unwrap();
            match status.code() {
                Some(KILLED) => true,
                Some(0) => false,
                other => panic!("{what} ended with {other:?}"),
            }
        }
    }

    #[test]
    fn what_a_power_cut_brings_back_of_a_change_goes_and_what_a_journal_needs_stays() {
        let bench = Bench::new();
        let next = beside(&bench.previous);
        std::fs::create_dir(&next).unwrap();
        std::fs::write(next.join("0.toml"), "").unwrap();
        std::fs::write(Journal::path(&bench.main), "{}").unwrap();
        clear_kept(&bench.main, &bench.previous);
        assert!(next.exists(), "a journal is there, whatever it says");
        std::fs::remove_file(Journal::path(&bench.main)).unwrap();
        clear_kept(&bench.main, &bench.previous);
        assert!(!next.exists() && bench.previous.exists() && bench.is_tidy());
    }

    /// No test by itself: what [`Bench::killed`] starts.
    #[test]
    fn in_a_process_of_its_own() {
        let (Ok(directory), Ok(what)) = (std::env::var("KEEPD_TEST_DIRECTORY"), std::env::var("KEEPD_TEST_WHAT")) else { return };
        let directory = PathBuf::from(directory);
        let main = directory.join("etc/keepd.toml");
        let (what, at) = what.split_once(' ').unwrap();
        stop_at(at.parse().unwrap(), How::Kill);
        match what {
            "finish" => assert!(finish_change(&main).unwrap()),
            "refused" => {
                let mut draft = Draft::of(Texts::read(&main).unwrap());
                draft.set(&item("job.a"), &json!({"every": "7h"})).unwrap();
                let error = draft.commit(&directory.join("state/previous")).unwrap_err();
                assert!(error.contains("was not changed") && error.contains("permission denied"), "{error}");
            }
            _ => {
                let mut draft = Draft::of(Texts::read(&main).unwrap());
                draft.set(&item("job.a"), &json!({"every": "7h"})).unwrap();
                draft.set(&item("job.linked"), &json!({"every": "2h"})).unwrap();
                draft.set(&item("job.new"), &json!({"every": "1d"})).unwrap();
                draft.remove(&item("job.gone")).unwrap();
                draft.commit(&directory.join("state/previous")).unwrap();
            }
        }
    }

    #[test]
    fn wherever_it_is_cut_off_it_is_wholly_the_old_or_wholly_the_new() {
        let (mut first_new, mut steps) = (None, 0);
        for at in 1.. {
            let bench = Bench::new();
            let (old, new) = (bench.texts(), bench.draft().after().clone());
            if !bench.killed("commit", at) {
                assert_eq!(bench.on_disk(), new);
                assert!(bench.is_tidy());
                break;
            }
            steps = at;
            let read = bench.texts();
            let counts = read == new;
            assert!(counts || (read == old && first_new.is_none()), "step {at}: {read:?}");
            if counts {
                first_new.get_or_insert(at);
                finish_change(&bench.main).unwrap();
                assert_eq!(bench.on_disk(), new, "step {at}");
                assert!(bench.is_tidy(), "step {at}");
                assert_eq!(undo(&bench.main, &bench.previous).unwrap().after(), &old, "step {at}");
            } else {
                assert!(!finish_change(&bench.main).unwrap());
                assert_eq!(bench.on_disk(), old, "step {at}");
                // What the change before kept is still there.
                assert_eq!(undo(&bench.main, &bench.previous).unwrap().after().text(&bench.main), Some(MAIN), "step {at}");
                bench.draft().commit(&bench.previous).unwrap();
                assert_eq!(bench.on_disk(), new, "step {at}");
                assert!(bench.is_tidy(), "step {at}");
            }
        }
        let first_new = first_new.expect("it counts at some step");
        assert!(first_new > 5 && steps > first_new + 5, "{first_new} of {steps}");

        // And so is finishing it.
        let mut steps = 0;
        for at in 1.. {
            let bench = Bench::new();
            let (old, new) = (bench.texts(), bench.draft().after().clone());
            assert!(bench.killed("commit", first_new));
            assert_ne!(bench.on_disk(), new);
            if !bench.killed("finish", at) {
                assert_eq!(bench.on_disk(), new);
                break;
            }
            steps = at;
            assert_eq!(bench.texts(), new, "step {at}");
            finish_change(&bench.main).unwrap();
            assert_eq!(bench.on_disk(), new, "step {at}");
            assert!(bench.is_tidy(), "step {at}");
            assert_eq!(undo(&bench.main, &bench.previous).unwrap().after(), &old, "step {at}");
        }
        assert!(steps > 5, "{steps}");
    }

    #[test]
    fn what_fails_before_it_counts_changes_nothing_and_after_that_is_done_later() {
        let (mut refused, mut later, mut not_replaced) = (0, 0, 0);
        for at in 1.. {
            let bench = Bench::new();
            let (old, new) = (bench.texts(), bench.draft().after().clone());
            let draft = bench.draft();
            stop_at(at, How::Fail);
            let outcome = draft.commit(&bench.previous);
            let is_over = COUNT.get() < at;
            STOP.set(None);
            match outcome {
                Err(error) => {
                    assert!(error.starts_with("the configuration was not changed: ") && error.contains("no space left"), "{error}");
                    assert_eq!(bench.on_disk(), old, "step {at}");
                    assert!(bench.is_tidy(), "step {at}");
                    assert!(undo(&bench.main, &bench.previous).is_ok());
                    // Also when the first of them cannot be replaced, once the change is written down.
                    not_replaced += usize::from(error.contains("cannot be replaced"));
                    assert!(!finish_change(&bench.main).unwrap());
                    refused += 1;
                }
                Ok(()) => {
                    assert_eq!(bench.texts(), new, "step {at}");
                    finish_change(&bench.main).unwrap();
                    assert_eq!(bench.on_disk(), new, "step {at}");
                    assert!(bench.is_tidy(), "step {at}");
                    assert_eq!(undo(&bench.main, &bench.previous).unwrap().after(), &old, "step {at}");
                    later += 1;
                }
            }
            if is_over {
                break;
            }
        }
        assert!(refused > 5 && later > 5 && not_replaced == 1, "{refused} {later} {not_replaced}");
    }

    #[test]
    fn what_somebody_else_did_is_never_lost() {
        let bench = Bench::new();
        let drop_in = bench.main.with_file_name("conf.d").join("other.toml");
        let error = |draft: Draft| draft.commit(&bench.previous).unwrap_err();
        let draft = bench.draft();
        std::fs::write(&bench.main, "# theirs\n").unwrap();
        assert!(error(draft).contains("somebody changed it meanwhile (keepd.toml)"));
        assert_eq!(std::fs::read_to_string(&bench.main).unwrap(), "# theirs\n");
        std::fs::write(&bench.main, MAIN).unwrap();
        let draft = bench.draft();
        std::fs::write(&drop_in, "[job.other]\n").unwrap();
        assert!(error(draft).contains("conf.d/other.toml"));
        let draft = bench.draft();
        std::fs::remove_file(&drop_in).unwrap();
        assert!(error(draft).contains("conf.d/other.toml"));
        assert!(bench.is_tidy());

        // Between a change that was cut off and its end.
        let bench = Bench::new();
        let at = (1..).find(|at| {
            let other = Bench::new();
            other.killed("commit", *at) && other.main.with_file_name(JOURNAL).exists()
        });
        assert!(bench.killed("commit", at.unwrap()));
        std::fs::write(&bench.main, "# theirs\n").unwrap();
        for error in [Texts::read(&bench.main).unwrap_err().to_string(), finish_change(&bench.main).unwrap_err()] {
            assert!(error.contains("keepd.toml: was changed while a change by keepd was only begun"), "{error}");
        }
        assert_eq!(std::fs::read_to_string(&bench.main).unwrap(), "# theirs\n");

        // Two at once.
        let bench = Bench::new();
        let lock = Lock::take(&bench.main).unwrap();
        assert!(bench.draft().commit(&bench.previous).unwrap_err().contains("another change"));
        drop(lock);
        bench.draft().commit(&bench.previous).unwrap();
    }

    #[test]
    fn who_reads_meanwhile_reads_the_old_or_the_new() {
        let bench = Bench::new();
        let (old, new) = (bench.texts(), bench.draft().after().clone());
        let is_over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 0..30 {
                    let draft = if n == 0 { bench.draft() } else { undo(&bench.main, &bench.previous).unwrap() };
                    draft.commit(&bench.previous).unwrap();
                }
                is_over.store(true, std::sync::atomic::Ordering::Relaxed);
            });
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                let read = bench.texts();
                assert!(read == old || read == new, "{read:?}");
            }
        });
    }

    #[test]
    fn an_undo_undoes_itself_and_nothing_else() {
        let bench = Bench::new();
        let (old, new) = (bench.texts(), bench.draft().after().clone());
        assert!(undo(&bench.main, &bench.temp.path().join("state/none")).unwrap_err().contains("nothing was kept"));
        bench.draft().commit(&bench.previous).unwrap();
        let undone = undo(&bench.main, &bench.previous).unwrap();
        assert!(undone.diff().contains("-every = \"7h\"\n+every = \"6h\"\n"), "{}", undone.diff());
        undone.commit(&bench.previous).unwrap();
        assert_eq!(bench.on_disk(), old);
        undo(&bench.main, &bench.previous).unwrap().commit(&bench.previous).unwrap();
        assert_eq!(bench.on_disk(), new);
        assert!(bench.is_tidy());
        std::fs::write(&bench.main, "# theirs\n").unwrap();
        std::fs::write(bench.main.with_file_name("conf.d").join("mine.toml"), "").unwrap();
        let error = undo(&bench.main, &bench.previous).unwrap_err();
        assert!(error.contains("changed since: conf.d/mine.toml, keepd.toml; the texts of before lie in "), "{error}");
        let other = bench.temp.path().join("etc/other.toml");
        std::fs::write(&other, "").unwrap();
        assert!(undo(&other, &bench.previous).unwrap_err().contains("that of "));
        std::fs::write(bench.previous.join(MANIFEST), "{").unwrap();
        assert!(undo(&bench.main, &bench.previous).unwrap_err().contains("cannot be read"));
    }

    #[test]
    fn owner_mode_and_links_stay() {
        let bench = Bench::new();
        let mode = |path: &Path| path.metadata().unwrap().mode() & 0o7777;
        let (link, real) = (bench.main.with_file_name("conf.d").join("link.toml"), bench.temp.path().join("else/real"));
        std::fs::set_permissions(&bench.main, Permissions::from_mode(0o640)).unwrap();
        std::fs::set_permissions(&real, Permissions::from_mode(0o444)).unwrap();
        let is_root = rustix::process::geteuid().is_root();
        if is_root {
            std::os::unix::fs::chown(&bench.main, Some(12), Some(34)).unwrap();
        }
        bench.draft().commit(&bench.previous).unwrap();
        assert!(link.is_symlink());
        assert_eq!(std::fs::read_to_string(&real).unwrap(), "[job.linked]\nevery = \"2h\"\n");
        let new = bench.main.with_file_name("conf.d").join("job.new.toml");
        assert_eq!((mode(&bench.main), mode(&real), mode(&new)), (0o640, 0o444, 0o600));
        if is_root {
            for path in [&bench.main, &new] {
                let found = path.metadata().unwrap();
                assert_eq!((found.uid(), found.gid()), (12, 34), "{}", path.display());
            }
        }
        assert_eq!(mode(&bench.previous), 0o700);
        assert!(std::fs::read_dir(&bench.previous).unwrap().flatten().all(|e| mode(&e.path()) == 0o600));

        std::fs::set_permissions(&bench.main, Permissions::from_mode(0o400)).unwrap();
        let mut draft = Draft::of(bench.texts());
        draft.set(&item("job.newer"), &json!({})).unwrap();
        draft.commit(&bench.previous).unwrap();
        assert_eq!(mode(&new.with_file_name("job.newer.toml")), 0o400);
    }

    #[test]
    fn what_cannot_be_replaced_is_refused_at_once() {
        let bench = Bench::new();
        let chattr = |flag: &str| Command::new("chattr").arg(flag).arg(&bench.main).output().is_ok_and(|out| out.status.success());
        // Where nobody may do that, there is nothing to see.
        if !chattr("+i") {
            return;
        }
        let (old, outcome) = (bench.texts(), bench.draft().commit(&bench.previous));
        assert!(chattr("-i"));
        let error = outcome.unwrap_err();
        assert!(error.contains("was not changed") && error.contains("chattr -ia"), "{error}");
        assert_eq!(bench.on_disk(), old);
        assert!(bench.is_tidy());
    }

    /// Version 2; the owner and user 12 may read and write, the owning group nothing, the mask is read, others nothing.
    fn access_list() -> Vec<u8> {
        let mut list = 2u32.to_le_bytes().to_vec();
        for (tag, rights, id) in [(1u16, 6u16, u32::MAX), (2, 6, 12), (4, 0, u32::MAX), (16, 4, u32::MAX), (32, 0, u32::MAX)] {
            list.extend(tag.to_le_bytes());
            list.extend(rights.to_le_bytes());
            list.extend(id.to_le_bytes());
        }
        list
    }

    #[test]
    fn an_access_list_stays_and_the_group_gets_nothing_by_it() {
        let bench = Bench::new();
        let set = rustix::fs::setxattr(&bench.main, ACCESS_LIST, &access_list(), XattrFlags::empty());
        // Not every file system has them.
        if set.is_err() {
            return;
        }
        let mode = bench.main.metadata().unwrap().mode();
        bench.draft().commit(&bench.previous).unwrap();
        let mut list = [0; 100];
        let len = getxattr(&bench.main, ACCESS_LIST, &mut list[..]).unwrap();
        assert_eq!((&list[..len], bench.main.metadata().unwrap().mode()), (&access_list()[..], mode));
    }

    #[test]
    fn what_was_removed_comes_back_with_its_mode() {
        let bench = Bench::new();
        let gone = bench.main.with_file_name("conf.d").join("gone.toml");
        std::fs::set_permissions(&gone, Permissions::from_mode(0o644)).unwrap();
        bench.draft().commit(&bench.previous).unwrap();
        assert!(!gone.exists());
        undo(&bench.main, &bench.previous).unwrap().commit(&bench.previous).unwrap();
        assert_eq!(gone.metadata().unwrap().mode() & 0o7777, 0o644);
    }

    #[test]
    fn another_main_file_of_the_directory_has_its_own_changes() {
        let bench = Bench::new();
        let other = bench.main.with_file_name("other.toml");
        std::fs::write(&other, "[job.x]\n").unwrap();
        let journal = |files: serde_json::Value| {
            let journal = json!({"format": 1, "main": "keepd.toml", "id": "x", "previous": bench.previous, "files": files});
            std::fs::write(bench.main.with_file_name(JOURNAL), journal.to_string()).unwrap();
        };
        let old = bench.on_disk().text(&bench.main).unwrap().to_owned();
        let main = json!({"path": "keepd.toml", "before": digest(&old), "text": "# new\n"});
        journal(json!([main]));
        assert_eq!(Texts::read(&other).unwrap().text(&other), Some("[job.x]\n"));
        assert!(!finish_change(&other).unwrap());
        assert_eq!(bench.texts().text(&bench.main), Some("# new\n"));
        // A change here does not lose it.
        let mut draft = Draft::of(Texts::read(&other).unwrap());
        draft.set(&item("job.x"), &json!({"every": "1h"})).unwrap();
        draft.commit(&bench.temp.path().join("state/other")).unwrap();
        assert_eq!(std::fs::read_to_string(&bench.main).unwrap(), "# new\n");
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "[job.x]\nevery = \"1h\"\n");
        // What they share is both's.
        journal(json!([{"path": "conf.d/both.toml", "before": null, "text": "# both\n"}]));
        let both = bench.main.with_file_name("conf.d").join("both.toml");
        assert_eq!(Texts::read(&other).unwrap().text(&both), Some("# both\n"));
        assert!(finish_change(&other).unwrap() && both.exists());
    }

    #[test]
    fn a_change_that_cannot_be_finished_says_how_to_get_on() {
        let bench = Bench::new();
        let journal = bench.main.with_file_name(JOURNAL);
        let text =
            json!({"format": 1, "id": "x", "previous": bench.previous, "files": [{"path": "keepd.toml", "before": "y", "text": "x"}]});
        std::fs::write(&journal, text.to_string()).unwrap();
        for error in [undo(&bench.main, &bench.previous).unwrap_err(), finish_change(&bench.main).unwrap_err()] {
            assert!(error.contains("cannot be finished") && error.contains(&format!("and remove {}", journal.display())), "{error}");
            assert!(error.contains("state/previous.next"), "{error}");
        }
        std::fs::remove_file(&journal).unwrap();
        undo(&bench.main, &bench.previous).unwrap();
    }

    #[test]
    fn where_there_is_nothing_yet_it_is_made() {
        let temp = tempfile::tempdir().unwrap();
        let main = temp.path().join("etc/keepd/keepd.toml");
        let previous = temp.path().join("state/previous");
        let mut draft = Draft::of(Texts { main: main.clone(), files: Vec::new() });
        draft.set(&item("job.a"), &json!({"every": "6h"})).unwrap();
        draft.clone().commit(&previous).unwrap();
        assert_eq!(&Texts::read(&main).unwrap(), draft.after());
        assert!(draft.commit(&previous).unwrap_err().contains("somebody changed it meanwhile"));
        undo(&main, &previous).unwrap().commit(&previous).unwrap();
        assert_eq!(Texts::read(&main).unwrap().files, [(main.clone(), String::new())]);
        let nothing = Draft::of(Texts::read(&main).unwrap());
        nothing.commit(&temp.path().join("never")).unwrap();
        assert!(!temp.path().join("never").exists());
    }

    #[test]
    fn where_it_may_not_write_it_says_so_and_changes_nothing() {
        let bench = Bench::new();
        let old = bench.texts();
        let etc = bench.main.parent().unwrap();
        for path in [bench.temp.path(), &bench.temp.path().join("state"), &bench.previous] {
            std::fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
        }
        for path in [etc, &etc.join("conf.d")] {
            std::fs::set_permissions(path, Permissions::from_mode(0o555)).unwrap();
        }
        let exe = std::env::current_exe().unwrap();
        let mut child = Command::new(exe);
        child.args(["--exact", "config::change::tests::in_a_process_of_its_own", "--test-threads=1"]);
        child.env("KEEPD_TEST_DIRECTORY", bench.temp.path()).env("KEEPD_TEST_WHAT", "refused 0");
        if rustix::process::geteuid().is_root() {
            child.uid(65534).gid(65534);
        }
        let output = child.output();
        for path in [etc, &etc.join("conf.d")] {
            std::fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
        }
        // Where nobody may start the tests, there is nothing to see.
        let Ok(output) = output else { return };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        assert_eq!(bench.on_disk(), old);
        assert!(bench.is_tidy());
    }

    #[test]
    fn a_journal_that_cannot_be_made_out_is_never_overlooked() {
        let bench = Bench::new();
        let journal = bench.main.with_file_name(JOURNAL);
        let outside = json!({"format": 1, "id": "x", "previous": "/p", "files": [{"path": "../passwd", "before": null, "text": "x"}]});
        let hidden = json!({"format": 1, "id": "x", "previous": "/p", "files": [{"path": "conf.d/.a.toml", "before": null, "text": "x"}]});
        let newer = json!({"format": 2, "id": "x", "previous": "/p", "files": []});
        for text in ["", "{", &outside.to_string(), &hidden.to_string(), &newer.to_string()] {
            std::fs::write(&journal, text).unwrap();
            let errors = [
                Texts::read(&bench.main).unwrap_err().to_string(),
                super::super::load_destinations(&bench.main).unwrap_err().to_string(),
                finish_change(&bench.main).unwrap_err(),
                undo(&bench.main, &bench.previous).unwrap_err(),
            ];
            for error in errors {
                assert!(error.contains(JOURNAL) && error.contains("cannot be made out"), "{text}: {error}");
            }
        }
        std::fs::remove_file(&journal).unwrap();
        std::fs::create_dir(&journal).unwrap();
        assert!(Texts::read(&bench.main).unwrap_err().to_string().contains("not a regular file"));
    }
}
