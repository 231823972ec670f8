//! Looking into backups: lists of entries, and what differs between two.

use std::collections::HashSet;
use std::sync::Arc;

use jiff::Timestamp;
use keepd_protocol::model::{BytesPath, Change, ChangeKind, EntryInfo};

use super::live::Failure;
use super::restore::{kind, walk};
use super::selection::{Selection, Shown};
use crate::repository::entry::path_order;
use crate::repository::{Entry, Kind, Manifest, Repository, RepositoryError, SourceReader};

/// Entries given at once.
const BATCH: usize = 256;

/// The entries at or below `path`, or one level of them. `emit` says false when nobody listens any more.
pub fn list(
    repository: &Arc<Repository>,
    manifest: &Manifest,
    path: Option<Vec<u8>>,
    recursive: bool,
    emit: &mut dyn FnMut(Vec<EntryInfo>) -> bool,
) -> Result<(), Failure> {
    let paths: Vec<Vec<u8>> = path.into_iter().filter(|p| !p.is_empty()).collect();
    let selection = Selection::new(manifest, &paths).map_err(Failure::Failed)?;
    let mut batch = Vec::new();
    let top_level = paths.is_empty();
    for selected in &selection.sources {
        let shown = &selected.shown;
        let top = selected.paths.first().cloned().unwrap_or_default();
        let missing = walk(repository, shown, &selected.paths, |entry| {
            if shown.is_one_file() && (top_level || recursive) {
                batch.push(info(manifest, shown, shown.source.name.clone().into_bytes(), &shown.made_up_directory(&entry)));
            }
            if wanted(shown, &top, &entry, top_level, recursive) {
                batch.push(info(manifest, shown, shown.path(&entry.path), &entry));
            }
            if batch.len() >= BATCH && !emit(std::mem::take(&mut batch)) {
                return Err(RepositoryError::Cancelled);
            }
            Ok(())
        })?;
        if let Some(path) = missing {
            let path = String::from_utf8_lossy(&shown.path(&path)).into_owned();
            return Err(Failure::Failed(format!("'{path}' is not in the backup")));
        }
    }
    emit(batch);
    Ok(())
}

/// One level: the sources themselves when no path is given; what stands in a directory, or a file itself, else.
fn wanted(shown: &Shown<'_>, top: &[u8], entry: &Entry, top_level: bool, recursive: bool) -> bool {
    if recursive {
        return true;
    }
    if top_level {
        return entry.path.is_empty() && !shown.is_one_file();
    }
    let below = entry.path.get(top.len()..).unwrap_or_default();
    let below = below.strip_prefix(b"/").unwrap_or(below);
    match below.is_empty() {
        true => entry.kind != Kind::Directory,
        false => !below.contains(&b'/'),
    }
}

fn info(manifest: &Manifest, shown: &Shown<'_>, path: Vec<u8>, entry: &Entry) -> EntryInfo {
    let name = |names: &[(u32, String)], id: u32| names.iter().find(|(n, _)| *n == id).map(|(_, name)| name.clone());
    let time = Timestamp::new(entry.mtime.seconds, entry.mtime.nanoseconds as i32).unwrap_or_default();
    EntryInfo {
        path: BytesPath::from_bytes(&path),
        kind: kind(entry.kind),
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        user: name(&manifest.users, entry.uid),
        group: name(&manifest.groups, entry.gid),
        size: entry.size,
        mtime: time.to_string(),
        target: match entry.kind {
            Kind::Symlink => Some(BytesPath::from_bytes(&entry.target)),
            Kind::Hardlink => Some(BytesPath::from_bytes(&shown.path(&entry.target))),
            _ => None,
        },
        changed_while_read: entry.changed_while_read,
    }
}

/// One backup to compare.
pub struct Side<'a> {
    pub repository: &'a Arc<Repository>,
    pub manifest: &'a Manifest,
}

/// What differs between two backups, source by source, as a merge of their entries.
pub fn diff(a: &Side<'_>, b: &Side<'_>, emit: &mut dyn FnMut(Vec<Change>) -> bool) -> Result<(), Failure> {
    let mut names: Vec<&str> = a.manifest.sources.iter().chain(&b.manifest.sources).map(|s| s.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    // Contents hashes are keyed by the repository; across two repositories only sizes and times can be compared.
    let same_repository = a.repository.raw_id() == b.repository.raw_id();
    let mut batch = Vec::new();
    for name in names {
        let mut left = Stream::new(a, name)?;
        let mut right = Stream::new(b, name)?;
        // Files with other contents: their further names have these as well. Of each path eight bytes of BLAKE3, for there may be many.
        let mut modified: HashSet<[u8; 8]> = HashSet::new();
        let digest = |path: &[u8]| blake3::hash(path).as_bytes().first_chunk().copied().unwrap_or_default();
        loop {
            let order = match (&left.entry, &right.entry) {
                (None, None) => break,
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some(l), Some(r)) => path_order(&l.path, &r.path),
            };
            let (before, after) = match order {
                std::cmp::Ordering::Less => (left.take()?, None),
                std::cmp::Ordering::Greater => (None, right.take()?),
                std::cmp::Ordering::Equal => (left.take()?, right.take()?),
            };
            let shown = if after.is_some() { &right.shown } else { &left.shown };
            let further = after.as_ref().filter(|e| e.kind == Kind::Hardlink && before.is_some());
            let is_modified =
                contents_differ(&before, &after, same_repository) || further.is_some_and(|e| modified.contains(&digest(&e.target)));
            if let Some(after) = after.as_ref().filter(|e| is_modified && e.kind == Kind::File) {
                modified.insert(digest(&after.path));
            }
            batch.extend(change(shown, before, after, is_modified));
            if batch.len() >= BATCH && !emit(std::mem::take(&mut batch)) {
                return Err(Failure::Cancelled);
            }
        }
    }
    emit(batch);
    Ok(())
}

struct Stream<'a> {
    shown: Option<Shown<'a>>,
    reader: Option<SourceReader>,
    entry: Option<Entry>,
}

impl<'a> Stream<'a> {
    fn new(side: &Side<'a>, name: &str) -> Result<Self, Failure> {
        let source = side.manifest.sources.iter().find(|s| s.name == name);
        let reader = source.map(|s| SourceReader::new(side.repository.clone(), s));
        let mut stream = Self { shown: source.map(Shown::new), reader, entry: None };
        stream.take()?;
        Ok(stream)
    }

    /// The entry it stands at; moves on.
    fn take(&mut self) -> Result<Option<Entry>, Failure> {
        let next = match &mut self.reader {
            // Lists of long contents are not needed: the contents' hash tells.
            Some(reader) => reader.next_paged()?.map(|p| p.entry),
            None => None,
        };
        Ok(std::mem::replace(&mut self.entry, next))
    }
}

/// Whether both are there and of another kind, length, target or, by their hashes, of other bytes or with holes elsewhere.
fn contents_differ(before: &Option<Entry>, after: &Option<Entry>, same_repository: bool) -> bool {
    let (Some(b), Some(a)) = (before, after) else { return false };
    // Of what was cut elsewhere and copied the hash is another one; a file that nobody touched is the same.
    let touched = |e: &Entry| (e.inode, e.mtime, e.ctime);
    let hash_differs = match same_repository {
        true => b.content.hash != a.content.hash && (a.inode == 0 || touched(b) != touched(a)),
        false => b.mtime != a.mtime,
    };
    b.kind != a.kind || b.size != a.size || b.target != a.target || (a.kind == Kind::File && hash_differs)
}

fn change(shown: &Option<Shown<'_>>, before: Option<Entry>, after: Option<Entry>, is_modified: bool) -> Option<Change> {
    let one = after.as_ref().or(before.as_ref())?;
    let path = shown.as_ref().map(|s| s.path(&one.path)).unwrap_or_default();
    let size = |e: &Option<Entry>| e.as_ref().filter(|e| e.kind == Kind::File).map(|e| e.size);
    let change = match (&before, &after) {
        (None, _) => ChangeKind::Added,
        (_, None) => ChangeKind::Removed,
        (Some(b), Some(a)) => {
            let meta = |e: &Entry| (e.mode, e.uid, e.gid, e.mtime, e.xattrs.clone());
            if is_modified {
                ChangeKind::Modified
            } else if meta(b) != meta(a) {
                ChangeKind::Metadata
            } else {
                return None;
            }
        }
    };
    Some(Change { change, path: BytesPath::from_bytes(&path), kind: kind(one.kind), size_before: size(&before), size_after: size(&after) })
}
