//! What backups need: counted from their pages (see [`super::count`]), and then held against the local index in one go.
//!
//! Counts and index are both kept in the order of ids and read once beside each other, so nothing is looked up for each reference, and only what is dead is written down. Each id
//! that is needed is found in the index, or in no pack and told: none is passed over.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use tokio_util::sync::CancellationToken;

use super::count;
use super::entry::ChunkId;
use super::error::{RepositoryError, Result};
use super::local::{CHUNKS, Dead, Held, PackUsage};
use super::open::{Repository, manifest_name};

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
    /// Reads what came to the repository since the last time, and what it needs of what went. `known` are those that are here as far as anybody remembers: a listing that lacks one that is there is not believed.
    /// Fails when anything cannot be read, for then nobody knows what is needed.
    pub fn by_backups(repository: &Repository, known: &[[u8; 32]], cancel: &CancellationToken) -> Result<Self> {
        let listed = repository.listed_backups()?;
        let counted = repository.local.counted_backups()?.unwrap_or_default();
        let known: BTreeSet<&[u8; 32]> = known.iter().chain(&counted).filter(|id| !listed.contains(*id)).collect();
        repository.storage.are_gone("backups/", known.into_iter().map(manifest_name))?;
        let (mut located, mut is_anew) = (HashSet::new(), false);
        'again: loop {
            count::bring_up_to_date(repository, &listed, cancel)?;
            let Some(Held { usage, dead, missing }) = repository.local.held(&listed)? else {
                // What is counted anew fits together.
                if std::mem::replace(&mut is_anew, true) {
                    return Err(repository.local.damaged(CHUNKS)?);
                }
                tracing::warn!("{}: what was counted of its backups does not fit together; it is counted anew", repository.location());
                repository.local.forget_counts()?;
                continue;
            };
            let lost = repository.local.known_as_lost(&missing)?;
            let unknown: Vec<ChunkId> = missing.into_iter().filter(|id| !lost.contains(id)).collect();
            if unknown.is_empty() {
                return Ok(Self { usage, lost: repository.local.lost(&lost)?, lost_chunks: lost, dead });
            }
            // What the local index lacks may be in the repository all the same; then it has learnt it.
            for id in unknown.iter().take(MAX_LOCATED) {
                if cancel.is_cancelled() {
                    return Err(RepositoryError::Cancelled);
                }
                if repository.locate(id).is_err() {
                    // Before a backup is said to be hurt it is asked itself.
                    if !std::mem::replace(&mut is_anew, true) {
                        repository.local.forget_counts()?;
                        continue 'again;
                    }
                    return Err(refuse(repository.damaged(&format!("chunk {id}"), "no pack holds it, but a backup needs it".into())));
                }
            }
            if unknown.len() > MAX_LOCATED || unknown.into_iter().any(|id| !located.insert(id)) {
                return Err(repository.local.damaged(CHUNKS)?);
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
