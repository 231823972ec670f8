//! What backups need: found by reading their pages, and then held against the local index in one go.
//!
//! The ids of all chunks that pages refer to are gathered in sorted runs, within a bound on memory, and merged with the index, which SQLite keeps in
//! the order of ids: an external merge join (Knuth, *The Art of Computer Programming*, vol. 3, 5.4). So nothing is looked up or written for each
//! reference; only what is dead is written down. Each id that is needed is found in the index, or in no pack and told: none is passed over.

use std::collections::{BTreeMap, HashSet};

use tokio_util::sync::CancellationToken;

use super::entry::ChunkId;
use super::error::{RepositoryError, Result};
use super::local::{Dead, Held, PackUsage};
use super::manifest::Manifest;
use super::open::{Repository, manifest_name};
use super::page;
use super::runs::Runs;

/// So many chunks that the local index lacks are looked for one by one: of one that lacks more, more is wrong.
const MAX_LOCATED: usize = 1000;

/// What backups need of a repository's packs.
pub struct Needed {
    /// Every pack, with how much of it is needed.
    pub usage: Vec<PackUsage>,
    /// Damaged packs, and how many of their lost chunks are needed and in no other pack of the index.
    pub lost: BTreeMap<[u8; 32], u64>,
    /// The needed ones of these chunks.
    pub lost_chunks: HashSet<ChunkId>,
    /// The chunks of the index that nothing needs.
    pub dead: Dead,
}

impl Needed {
    /// Reads every backup of the repository. `known` are those that are here as far as anybody remembers: a listing that lacks one that is there is not believed.
    /// Fails when anything cannot be read, for then nobody knows what is needed.
    pub fn by_backups(repository: &Repository, known: &[[u8; 32]], cancel: &CancellationToken) -> Result<Self> {
        let listed = repository.listed_backups()?;
        repository.storage.are_gone("backups/", known.iter().filter(|id| !listed.contains(*id)).map(manifest_name))?;
        let mut walk = Walk { repository, cancel, read: HashSet::new(), ids: Runs::within(repository.local.directory()) };
        for id in listed {
            let manifest: Manifest = repository.read_manifest(&id).map_err(refuse)?;
            for page in manifest.sources.iter().flat_map(|s| &s.pages) {
                walk.page(ChunkId(*page.chunk))?;
            }
        }
        let mut located = HashSet::new();
        loop {
            let Held { usage, dead, missing } = repository.local.hold_against(&mut walk.ids)?;
            let lost = repository.local.known_as_lost(&missing)?;
            let unknown: Vec<ChunkId> = missing.into_iter().filter(|id| !lost.contains(id)).collect();
            if unknown.is_empty() {
                return Ok(Self { usage, lost: repository.local.lost(&lost)?, lost_chunks: lost, dead });
            }
            // What the local index lacks may be in the repository all the same; then it has learnt it.
            for id in unknown.iter().take(MAX_LOCATED) {
                walk.go_on()?;
                if repository.locate(id).is_err() {
                    return Err(refuse(repository.damaged(&format!("chunk {id}"), "no pack holds it, but a backup needs it".into())));
                }
            }
            if unknown.len() > MAX_LOCATED || unknown.into_iter().any(|id| !located.insert(id)) {
                return Err(repository.local.damaged()?);
            }
        }
    }
}

/// An error from which it follows that nothing is known of what is needed.
pub fn refuse(error: RepositoryError) -> RepositoryError {
    match error {
        e @ (RepositoryError::Cancelled | RepositoryError::Storage(_)) => e,
        e => RepositoryError::Other(format!(
            "nothing was pruned, because it is not known what the backups need: {e}; 'keepctl check' names what is hurt"
        )),
    }
}

struct Walk<'r> {
    repository: &'r Repository,
    cancel: &'r CancellationToken,
    /// Pages and lists that were read.
    read: HashSet<ChunkId>,
    ids: Runs,
}

impl Walk<'_> {
    fn go_on(&self) -> Result<()> {
        if self.cancel.is_cancelled() { Err(RepositoryError::Cancelled) } else { Ok(()) }
    }

    /// Adds a page of entries with all that it refers to. What is a list of long contents is told by the page itself.
    fn page(&mut self, id: ChunkId) -> Result<()> {
        let Some(bytes) = self.read(id)? else { return Ok(()) };
        let wrong = |e: &dyn std::fmt::Display| refuse(self.repository.damaged(&format!("page {id}"), format!("it is no valid page: {e}")));
        let (table, lists) = page::references_and_lists(&bytes).map_err(|e| wrong(&e))?;
        self.add(table)?;
        lists.into_iter().try_for_each(|id| self.list(id))
    }

    fn list(&mut self, id: ChunkId) -> Result<()> {
        let Some(bytes) = self.read(id)? else { return Ok(()) };
        let table = page::references(&bytes)
            .map_err(|e| refuse(self.repository.damaged(&format!("list {id}"), format!("it is no valid list of segments: {e}"))))?;
        self.add(table)
    }

    /// A chunk that is needed, when it was not read before.
    fn read(&mut self, id: ChunkId) -> Result<Option<Vec<u8>>> {
        self.go_on()?;
        if !self.read.insert(id) {
            return Ok(None);
        }
        self.add(vec![id])?;
        self.repository.read_chunk(&id).map(Some).map_err(refuse)
    }

    fn add(&mut self, ids: Vec<ChunkId>) -> Result<()> {
        ids.into_iter().try_for_each(|id| self.ids.add(id)).map_err(|e| self.repository.local.no_room(&e))
    }
}
