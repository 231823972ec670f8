//! Entries of an archive as a repository has them.

use data_encoding::BASE64;
use keepd_protocol::model::EntryKind;
use keepd_protocol::restore::EntryHeader;

use crate::repository::{Entry, Kind, Time};

/// An entry without its contents; its path is taken from `below`, a link's target is as in the header. The error says what is wrong with it.
pub fn entry(header: &EntryHeader, below: &[u8]) -> Result<Entry, String> {
    let mut xattrs = Vec::new();
    for (name, value) in &header.xattrs {
        xattrs.push((name.to_bytes()?, BASE64.decode(value.as_bytes()).map_err(|e| e.to_string())?));
    }
    xattrs.sort();
    Ok(Entry {
        path: below.to_vec(),
        kind: match header.kind {
            EntryKind::File => Kind::File,
            EntryKind::Directory => Kind::Directory,
            EntryKind::Symlink => Kind::Symlink,
            EntryKind::Hardlink => Kind::Hardlink,
        },
        mode: header.mode & 0o7777,
        uid: header.uid,
        gid: header.gid,
        mtime: Time { seconds: header.mtime_seconds, nanoseconds: header.mtime_nanoseconds.min(999_999_999) },
        target: header.target.as_ref().map(|t| t.to_bytes()).transpose()?.unwrap_or_default(),
        xattrs,
        ..Entry::default()
    })
}

/// Whether a directory stands for a source of one file, as [`crate::run::selection::Shown::made_up_directory`] makes it.
pub fn is_made_up(directory: &Entry, file: &Entry) -> bool {
    let of = |e: &Entry| (e.uid, e.gid, e.mtime);
    directory.mode == 0o700 && directory.xattrs.is_empty() && of(directory) == of(file)
}
