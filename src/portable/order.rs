//! What is true of every archive that keepd makes: in which order its entries stand, and how many they are.

use keepd_protocol::model::EntryKind;
use keepd_protocol::restore::EntryHeader;
use std::cmp::Ordering;

use super::file_list::{MARK_LINES, shown};
use super::head::{HEAD_NAME, Head, Source, TAIL_NAME, Totals};
use super::{PortableError, Result};
use crate::repository::entry::path_order;

const MAX_SOURCES: usize = 1000;

/// Follows the entries of an archive from the first to the last.
pub struct Order {
    sources: Vec<(Vec<u8>, Totals)>,
    /// Which source is under way.
    at: usize,
    /// The entry that came last, within its source; and whether something may be below it.
    last: Option<(Vec<u8>, EntryKind)>,
    /// Of the files of this source that came each so many: its path, and where its line is in the list of files.
    marks: Vec<(Vec<u8>, u64)>,
    unmarked: usize,
}

impl Order {
    /// Refuses names of sources that are none.
    pub fn of(head: &Head) -> Result<Self> {
        if head.sources.len() > MAX_SOURCES {
            return Err(PortableError::Hostile(format!(
                "manifest.json of the archive names {} sources; {MAX_SOURCES} are the most",
                head.sources.len()
            )));
        }
        let mut seen = std::collections::HashSet::new();
        for source in &head.sources {
            let name = source.name.as_str();
            if name.is_empty()
                || name.len() > 255
                || name.contains('/')
                || name.chars().any(char::is_control)
                || [".", "..", HEAD_NAME, TAIL_NAME].contains(&name)
                || !seen.insert(name)
            {
                let text =
                    format!("manifest.json of the archive names a source {}, which is no name, or is there twice", shown(name.as_bytes()));
                return Err(PortableError::Hostile(text));
            }
        }
        let sources = head.sources.iter().map(|s| (s.name.clone().into_bytes(), Totals::default())).collect();
        Ok(Self { sources, at: 0, last: None, marks: Vec::new(), unmarked: 0 })
    }

    /// The next entry; `path` and `target` are those of the header.
    pub fn next(&mut self, header: &EntryHeader, path: &[u8], target: &[u8]) -> Result<()> {
        let wrong = |text: &str| Err(PortableError::Hostile(format!("{} in the archive {text}", shown(path))));
        let (source, rest) = split(path);
        if !is_plain(rest) || path.ends_with(b"/") {
            return wrong("is no path below a source: it is absolute, or has '.', '..' or an empty name in it");
        }
        let Some(found) = self.sources.iter().skip(self.at).position(|(name, _)| name == source) else {
            return wrong("is of a source that manifest.json does not name, or that came before");
        };
        if found > 0 {
            self.at += found;
            self.last = None;
            self.marks.clear();
        }
        if let Some((last, kind)) = &self.last {
            match path_order(last, rest) {
                Ordering::Less => {}
                Ordering::Equal => return wrong("is there twice"),
                Ordering::Greater => {
                    return wrong("does not stand where it belongs: entries of an archive are in the order of their paths");
                }
            }
            if *kind != EntryKind::Directory && is_below(rest, last) {
                return wrong("is below something that is no directory");
            }
        }
        if header.kind == EntryKind::Hardlink {
            let (of, rest_of) = split(target);
            if of != source || !is_plain(rest_of) || target.ends_with(b"/") {
                return wrong(&format!("is a hard link to {}, which is outside of its source", shown(target)));
            }
            if path_order(rest_of, rest) != Ordering::Less {
                return wrong(&format!("is a hard link to {}, which does not stand before it", shown(target)));
            }
        }
        if let Some((_, totals)) = self.sources.get_mut(self.at) {
            totals.count(header);
        }
        let mut last = self.last.take().map(|(last, _)| last).unwrap_or_default();
        last.clear();
        last.extend_from_slice(rest);
        self.last = Some((last, header.kind));
        Ok(())
    }

    /// A file came, whose line stands at this offset of the list.
    pub fn mark(&mut self, path: &[u8], offset: u64) {
        self.unmarked += 1;
        if self.marks.is_empty() || self.unmarked == MARK_LINES {
            self.marks.push((split(path).1.to_vec(), offset));
            self.unmarked = 0;
        }
    }

    /// From which offset of the list on the line of a file of this source stands, if it came.
    pub fn near(&self, path: &[u8]) -> Option<u64> {
        let rest = split(path).1;
        let after = self.marks.partition_point(|(mark, _)| path_order(mark, rest) != Ordering::Greater);
        self.marks.get(after.checked_sub(1)?).map(|(_, offset)| *offset)
    }

    pub fn totals(&self) -> Totals {
        self.sources.iter().fold(Totals::default(), |a, (_, b)| a.plus(b))
    }

    /// Compares what came with what head or tail say.
    pub fn check(&self, sources: &[Source], totals: Option<&Totals>, where_: &str) -> Result<()> {
        let wrong = |what: &str, said: &Totals, came: &Totals| {
            let text =
                |t: &Totals| format!("{} entries, {} files, {} directories and {} bytes", t.entries, t.files, t.directories, t.bytes);
            Err(PortableError::Damaged(format!(
                "the archive does not hold what {where_} says: {what} should have {}, and has {}",
                text(said),
                text(came)
            )))
        };
        if sources.len() != self.sources.len() || sources.iter().zip(&self.sources).any(|(s, (name, _))| s.name.as_bytes() != name) {
            return Err(PortableError::Damaged(format!("{where_} of the archive names other sources than manifest.json")));
        }
        for (source, (_, came)) in sources.iter().zip(&self.sources) {
            let said = Totals { entries: source.entries, files: source.files, directories: source.directories, bytes: source.bytes };
            if said != *came {
                return wrong(&format!("source {}", shown(source.name.as_bytes())), &said, came);
            }
        }
        let came = self.totals();
        match totals {
            Some(said) if *said != came => wrong("it", said, &came),
            _ => Ok(()),
        }
    }
}

/// The source and what is below it.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().position(|b| *b == b'/') {
        Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..).unwrap_or_default()),
        None => (path, &[]),
    }
}

/// Whether it is empty, or names with single slashes between them.
fn is_plain(path: &[u8]) -> bool {
    path.is_empty() || path.split(|b| *b == b'/').all(|name| !name.is_empty() && name != b"." && name != b".." && !name.contains(&0))
}

/// Whether a path is below another, or below the root, which is empty.
fn is_below(path: &[u8], other: &[u8]) -> bool {
    match path.strip_prefix(other) {
        Some(rest) => !rest.is_empty() && (other.is_empty() || rest.starts_with(b"/")),
        None => false,
    }
}
