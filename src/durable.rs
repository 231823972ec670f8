//! Directories whose names outlive a power cut: what is synced in a directory is lost with it where its own name was not.
//!
//! That a directory is there does not say that its name is on the disk: a process that was killed may have made it, or another thread just now. So each is taken for durable only when
//! this process has synced the one above it.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Path, device and inode: the number alone may be another directory's later.
type Found = (PathBuf, u64, u64);

/// Directories whose names were synced since they were found there.
static DURABLE: Mutex<Option<HashSet<Found>>> = Mutex::new(None);

fn durable() -> MutexGuard<'static, Option<HashSet<Found>>> {
    DURABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a directory and what is missing of those above it. When it returns, their names are on the disk.
pub fn make_directories(directory: &Path) -> io::Result<()> {
    making(directory, || fs::create_dir_all(directory))
}

/// The same, for nobody else: those that are made have the mode 0700.
pub fn make_private_directories(directory: &Path) -> io::Result<()> {
    making(directory, || fs::DirBuilder::new().recursive(true).mode(0o700).create(directory))
}

/// The same with what `make` makes of it.
fn making(directory: &Path, make: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let missing = directory.ancestors().take_while(|d| !d.is_dir()).count();
    if missing > 0 {
        make()?;
    }
    for (above, directory) in directory.ancestors().enumerate() {
        let parent = match directory.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) if directory.file_name().is_some() => parent,
            _ => break,
        };
        let found = fs::metadata(directory)?;
        let id = (directory.to_owned(), found.dev(), found.ino());
        if above < missing {
            sync(parent)?;
        } else if durable().as_ref().is_some_and(|known| known.contains(&id)) {
            // And so are those above.
            break;
        } else if fs::metadata(parent).is_ok_and(|p| p.dev() == found.dev()) {
            // Best effort: who made it, and whether the file system above can sync at all, is not known.
            let _ = sync(parent);
        } else {
            // A mount point is nobody's to be synced.
            break;
        }
        durable().get_or_insert_default().insert(id);
    }
    Ok(())
}

/// Directories in which a keepd that ended in the middle of its work may have left names that no disk has yet.
static IN_DOUBT: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// The note of the ledger that destinations are in doubt; empty when they are not any more.
pub const DOUBTED: &str = "destinations in doubt";

/// What an earlier keepd left in these directories may be gone after a power cut, as it had no time to sync it.
pub fn doubt(directories: impl IntoIterator<Item = PathBuf>) {
    IN_DOUBT.lock().unwrap_or_else(PoisonError::into_inner).extend(directories);
}

/// Before anything relies on what is in a directory: what was there when it was doubted is on the disk when this returns.
pub fn believe(directory: &Path) -> io::Result<()> {
    let in_doubt = || IN_DOUBT.lock().unwrap_or_else(PoisonError::into_inner);
    if !in_doubt().contains(directory) {
        return Ok(());
    }
    match File::open(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => keepd_writer::syncfs(opened?)?,
    }
    in_doubt().remove(directory);
    Ok(())
}

/// Whether no directory is in doubt any more.
pub fn is_sure() -> bool {
    IN_DOUBT.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
}

fn sync(directory: &Path) -> io::Result<()> {
    match File::open(directory) {
        // Who may write into a directory and not read it cannot sync it either.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        opened => opened?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_known(directory: &Path) -> bool {
        let found = fs::metadata(directory).expect("there");
        durable().as_ref().is_some_and(|known| known.contains(&(directory.to_owned(), found.dev(), found.ino())))
    }

    #[test]
    fn one_in_doubt_is_believed_once_it_is_there() {
        let temp = tempfile::tempdir().expect("tempdir");
        let directory = temp.path().join("repository");
        let is_doubted = || IN_DOUBT.lock().unwrap_or_else(PoisonError::into_inner).contains(&directory);
        doubt([directory.clone()]);
        believe(&directory).expect("not mounted yet");
        assert!(is_doubted());
        fs::create_dir(&directory).expect("made");
        believe(&directory).expect("synced");
        assert!(!is_doubted());
    }

    #[test]
    fn one_that_a_killed_process_made_is_synced_as_well() {
        let temp = tempfile::tempdir().expect("tempdir");
        let directory = temp.path().join("a/b");
        fs::create_dir_all(&directory).expect("made by somebody");
        assert!(!is_known(&directory) && !is_known(&temp.path().join("a")));
        make_directories(&directory).expect("made");
        assert!(is_known(&directory) && is_known(&temp.path().join("a")));
        let new = temp.path().join("a/c/d");
        make_directories(&new).expect("made");
        assert!(is_known(&new) && is_known(&temp.path().join("a/c")));
    }
}
