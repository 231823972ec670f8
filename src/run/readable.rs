//! Whether what is to be read of a backup opens at all: asked before anything is written, stopped or changed.
//!
//! Contents in write-only packs open with a private key alone. Which packs those are stands in the local index; which key each wants, in the pack.

use std::collections::HashSet;
use std::sync::Arc;

use super::live::Failure;
use super::restore::{find, walk};
use super::selection::{Selection, is_at_or_below};
use crate::repository::reader::chunks_of;
use crate::repository::{ChunkId, Entry, Kind, Manifest, Repository, RepositoryError};

/// Chunks looked up at once.
const BATCH: usize = 4096;

/// What of a backup is to be read.
#[derive(Debug, Clone, PartialEq)]
pub enum Reading {
    /// What there is, not what is in it, nor whether that is the same as elsewhere.
    Names,
    /// What there is, and of what is in it as much as comparing takes.
    Entries,
    /// The contents at these paths (`<source>[/<path>]`); none means all.
    Contents(Vec<Vec<u8>>),
}

/// An error that names the private keys without which it cannot all be read.
pub fn check(repository: &Arc<Repository>, manifest: &Manifest, reading: &Reading, destination: &str) -> Result<(), Failure> {
    let Reading::Contents(paths) = reading else { return Ok(()) };
    if !repository.has_write_only()? {
        return Ok(());
    }
    // Whoever reads tells that there is no such path.
    let Ok(selection) = Selection::new(manifest, paths) else { return Ok(()) };
    let mut needed = Needed { repository, batch: HashSet::new(), packs: HashSet::new() };
    for selected in &selection.sources {
        let source = selected.shown.source;
        walk(repository, &selected.shown, &selected.paths, |entry| {
            if entry.kind == Kind::Hardlink && !selected.paths.iter().any(|p| is_at_or_below(&entry.target, p)) {
                // It comes as a file of its own.
                return find(repository, source, &entry.target)?.map_or(Ok(()), |first| needed.add(&first));
            }
            needed.add(&entry)
        })?;
    }
    needed.look_up()?;
    let packs: Vec<[u8; 32]> = needed.packs.into_iter().collect();
    let keys: Vec<String> = repository.keys_wanted(&packs).iter().map(ToString::to_string).collect();
    match keys.as_slice() {
        [] => Ok(()),
        [key] => Err(Failure::NeedsKey(format!(
            "destination {destination}: what is in it opens with the private key {key} alone; give it with --key FILE"
        ))),
        keys => Err(Failure::NeedsKey(format!(
            "destination {destination}: what is in it opens with the private keys {} alone; give each with --key FILE",
            keys.join(" and ")
        ))),
    }
}

/// Gathers the write-only packs that entries need.
struct Needed<'a> {
    repository: &'a Repository,
    batch: HashSet<ChunkId>,
    packs: HashSet<[u8; 32]>,
}

impl Needed<'_> {
    fn add(&mut self, entry: &Entry) -> Result<(), RepositoryError> {
        self.batch.extend(chunks_of(&entry.content.segments));
        if self.batch.len() >= BATCH { self.look_up() } else { Ok(()) }
    }

    fn look_up(&mut self) -> Result<(), RepositoryError> {
        let chunks: Vec<ChunkId> = self.batch.drain().collect();
        self.packs.extend(self.repository.write_only_packs(&chunks)?);
        Ok(())
    }
}
