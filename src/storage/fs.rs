//! What OpenDAL's `fs` leaves out: publishing by an atomic rename that replaces nothing, and directories synced.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags};

use super::{Result, Storage, StorageError, is_no_space};
use crate::crypto;

/// Where objects are written before they get their name.
pub(super) const TEMPORARY: &str = "tmp/";

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Publish {
    New,
    Replace,
}

/// Writes under a temporary name through the operator (which syncs the file), checks the size, renames, and syncs every
/// directory that changed.
pub(super) fn publish(storage: &Storage, root: &Path, name: &str, bytes: Vec<u8>, how: Publish) -> Result<()> {
    let random: [u8; 12] = crypto::random().map_err(|e| storage.failed("write", name, e.to_string()))?;
    let temporary = format!("{TEMPORARY}{}", data_encoding::HEXLOWER.encode(&random));
    let (from, to) = (root.join(&temporary), root.join(name));
    let len = bytes.len() as u64;
    let result = storage.write(&temporary, bytes).and_then(|()| {
        let failed = |e: io::Error| match is_no_space(&e.to_string()) {
            true => StorageError::NoSpace { location: storage.location.clone(), name: name.to_owned() },
            false => storage.failed("write", name, e.to_string()),
        };
        let written = fs::metadata(&from).map_err(failed)?.len();
        if written != len {
            return Err(storage.failed("write", name, format!("{written} of {len} bytes arrived")));
        }
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

fn rename(from: &Path, to: &Path, how: Publish) -> io::Result<()> {
    if how == Publish::Replace {
        return fs::rename(from, to);
    }
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // File systems without RENAME_NOREPLACE (some network ones) still refuse a second hard link.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        other => Ok(other?),
    }
}

/// Makes what is missing of `directory` below `root` and syncs each parent that got a new name.
fn make_directories(root: &Path, directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    if let Some(parent) = directory.parent()
        && parent.starts_with(root)
    {
        make_directories(root, parent)?;
        match fs::create_dir(directory) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => sync_directory(parent)?,
        }
    } else {
        fs::create_dir_all(directory)?;
    }
    Ok(())
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}
