//! Paths of a backup as people name them: `<source>` or `<source>/<path>`.
//!
//! A source that is one file (a database, mostly) shows as `<source>/<file name>`, so that every source is a directory.

use crate::repository::entry::path_order;
use crate::repository::{Entry, Kind, Manifest, ManifestSource};

/// A source's entries under their shown names.
pub struct Shown<'a> {
    pub source: &'a ManifestSource,
    /// The file's name, where the source is one file.
    file: Option<&'a [u8]>,
}

impl<'a> Shown<'a> {
    pub fn new(source: &'a ManifestSource) -> Self {
        let one_file = source.entries == 1 && source.files == 1;
        let name = source.path.rsplit(|b| *b == b'/').next().filter(|n| !n.is_empty()).unwrap_or(source.name.as_bytes());
        Self { source, file: one_file.then_some(name) }
    }

    pub fn is_one_file(&self) -> bool {
        self.file.is_some()
    }

    /// `<source>[/<path>]` of an entry.
    pub fn path(&self, entry: &[u8]) -> Vec<u8> {
        let mut path = self.source.name.clone().into_bytes();
        let below = if entry.is_empty() { self.file.unwrap_or_default() } else { entry };
        if !below.is_empty() {
            path.push(b'/');
            path.extend_from_slice(below);
        }
        path
    }

    /// The directory that stands for a source of one file, which the backup itself does not hold.
    pub fn made_up_directory(&self, of: &Entry) -> Entry {
        Entry { kind: Kind::Directory, mode: 0o700, uid: of.uid, gid: of.gid, mtime: of.mtime, ..Entry::default() }
    }

    /// A path below the source, in the backup's own terms; None when there can be no such entry.
    fn own_path<'p>(&self, below: &'p [u8]) -> Option<&'p [u8]> {
        match self.file {
            None => Some(below),
            Some(name) if below.is_empty() || below == name => Some(&[]),
            Some(_) => None,
        }
    }
}

/// What of a backup is wanted.
pub struct Selection<'a> {
    pub sources: Vec<Selected<'a>>,
}

pub struct Selected<'a> {
    pub shown: Shown<'a>,
    /// Wanted subtrees in path order, none inside another; the empty path is the whole source.
    pub paths: Vec<Vec<u8>>,
}

impl<'a> Selection<'a> {
    /// `paths` as people name them; none means everything. An unknown source is an error that names the known ones.
    pub fn new(manifest: &'a Manifest, paths: &[Vec<u8>]) -> Result<Self, String> {
        let mut sources: Vec<Selected<'a>> =
            manifest.sources.iter().map(|source| Selected { shown: Shown::new(source), paths: Vec::new() }).collect();
        if paths.is_empty() {
            sources.iter_mut().for_each(|s| s.paths.push(Vec::new()));
            return Ok(Self { sources });
        }
        for path in paths {
            let trimmed = trim_slashes(path);
            let (name, below) = split_first(trimmed);
            let known = || manifest.sources.iter().map(|s| s.name.as_str()).collect::<Vec<_>>().join(", ");
            let shown = String::from_utf8_lossy(path).into_owned();
            let selected = sources
                .iter_mut()
                .find(|s| s.shown.source.name.as_bytes() == name)
                .ok_or_else(|| format!("'{shown}': the backup has no source of that name; it has {}", known()))?;
            let own = selected.shown.own_path(below).ok_or_else(|| format!("'{shown}' is not in the backup"))?;
            selected.paths.push(own.to_vec());
        }
        for selected in &mut sources {
            selected.paths.sort_by(|a, b| path_order(a, b));
            let mut kept: Vec<Vec<u8>> = Vec::new();
            for path in std::mem::take(&mut selected.paths) {
                if !kept.last().is_some_and(|k| is_at_or_below(&path, k)) {
                    kept.push(path);
                }
            }
            selected.paths = kept;
        }
        sources.retain(|s| !s.paths.is_empty());
        Ok(Self { sources })
    }
}

/// Whether `path` is `top` or something in it.
pub fn is_at_or_below(path: &[u8], top: &[u8]) -> bool {
    top.is_empty() || path.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

fn trim_slashes(mut path: &[u8]) -> &[u8] {
    while let [b'/', rest @ ..] = path {
        path = rest;
    }
    while let [rest @ .., b'/'] = path {
        path = rest;
    }
    path
}

fn split_first(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().position(|b| *b == b'/') {
        None => (path, &[]),
        Some(at) => (path.get(..at).unwrap_or_default(), trim_slashes(path.get(at..).unwrap_or_default())),
    }
}
