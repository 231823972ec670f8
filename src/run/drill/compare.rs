//! What lies in the scratch place beside what the backup says: kinds, sizes, modes, links, and every byte.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use keepd_protocol::model::Level;

use super::{Result, Trouble, Wrong};
use crate::repository::same::{CompareError, Same};
use crate::repository::{Entry, Kind, Manifest, Repository, SourceReader};
use crate::run::live::LiveRun;
use crate::run::restore::unreadable;
use crate::run::selection::Shown;

/// Compares a restored tree with its backup; what differs goes into `wrong`.
pub fn compare(repository: &Arc<Repository>, manifest: &Manifest, tree: &Path, wrong: &mut Wrong, live: &LiveRun) -> Result<()> {
    let mut closed = 0u64;
    for source in &manifest.sources {
        let shown = Shown::new(source);
        let mut reader = SourceReader::new(repository.clone(), source);
        loop {
            let entry = reader.next_entry().map_err(|e| Trouble::from(unreadable(e)))?;
            let Some(entry) = entry else { break };
            let path = shown.path(&entry.path);
            let told = String::from_utf8_lossy(&path).into_owned();
            let on_disk = tree.join(OsStr::from_bytes(&path));
            let first = tree.join(OsStr::from_bytes(&shown.path(&entry.target)));
            match difference(repository, &entry, &on_disk, &first, live) {
                Ok(None) => {}
                Ok(Some(text)) => wrong.add(format!("{told}: {text}")),
                Err(CompareError::File(e)) if e.kind() == io::ErrorKind::PermissionDenied => closed += 1,
                Err(CompareError::File(e)) if e.kind() == io::ErrorKind::NotFound => wrong.add(format!("{told}: it was not restored")),
                Err(CompareError::File(e)) => {
                    return Err(Trouble::untried(format!("the restored {told} cannot be read back: {e}")));
                }
                Err(CompareError::Repository(e)) => return Err(unreadable(e).into()),
            }
        }
    }
    if closed > 0 {
        let text = format!("{closed} restored files could not be read back: their modes are closed to the user keepd runs as");
        live.message(Level::Warning, text);
    }
    Ok(())
}

/// What is not as the entry says.
fn difference(
    repository: &Repository,
    entry: &Entry,
    on_disk: &Path,
    first: &Path,
    live: &LiveRun,
) -> std::result::Result<Option<String>, CompareError> {
    let stat = fs::symlink_metadata(on_disk)?;
    let kind = match () {
        () if stat.is_dir() => "a directory",
        () if stat.is_symlink() => "a symlink",
        () if stat.is_file() => "a file",
        () => "neither a file nor a directory nor a symlink",
    };
    let wanted = match entry.kind {
        Kind::Directory => "a directory",
        Kind::Symlink => "a symlink",
        Kind::File | Kind::Hardlink => "a file",
    };
    if kind != wanted {
        return Ok(Some(format!("it is {kind}, not {wanted}")));
    }
    Ok(match entry.kind {
        Kind::Directory => mode(entry, &stat),
        Kind::Symlink => {
            let target = fs::read_link(on_disk)?.into_os_string().into_vec();
            (target != entry.target).then(|| "it leads elsewhere".to_owned())
        }
        Kind::Hardlink => {
            let other = fs::symlink_metadata(first)?;
            ((stat.dev(), stat.ino()) != (other.dev(), other.ino())).then(|| format!("it is not the same file as {}", tail(first)))
        }
        Kind::File if stat.len() != entry.size => Some(format!("it has {} bytes, {} were captured", stat.len(), entry.size)),
        Kind::File => match mode(entry, &stat) {
            Some(text) => Some(text),
            None => match repository.compare(entry, &File::open(on_disk)?, &|n| live.report.bytes(n), &live.cancel)? {
                Same::Yes => None,
                Same::DiffersAt(offset) => Some(format!("it differs from what was captured, from byte {offset} on")),
            },
        },
    })
}

fn tail(path: &Path) -> String {
    path.file_name().map(PathBuf::from).unwrap_or_default().display().to_string()
}

/// Without the right to give files away, bits that act for the owner are left out of those of others.
fn mode(entry: &Entry, stat: &Metadata) -> Option<String> {
    let bits = if (stat.uid(), stat.gid()) == (entry.uid, entry.gid) { 0o7777 } else { 0o777 };
    let (now, then) = (stat.mode() & bits, entry.mode & bits);
    (now != then).then(|| format!("its mode is {now:04o}, {then:04o} was captured"))
}
