//! Prune: removes what no backup needs, and rewrites packs that are mostly dead.
//!
//! The caller holds the lease and keeps readers away. Order: new packs, new index (which names what it supersedes), then
//! the old index objects go, then the packs: whatever interrupts it, every backup stays whole and the next prune ends it.
//! Nothing is removed when a manifest or a page cannot be read, for then nobody knows what is needed.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use data_encoding::HEXLOWER;
use tokio_util::sync::CancellationToken;

use super::entry::ChunkId;
use super::error::{RepositoryError, Result};
use super::index::{INDEX_CHUNKS, Index, IndexedPack};
use super::local::{Mark, PackUsage};
use super::manifest::Manifest;
use super::open::{Repository, pack_name};
use super::pack::{PACK_TARGET_BYTES, PackBuilder, PackMemory, Prover, chunk_id};
use super::page;
use super::payload;
use crate::crypto::{HEADER_BYTES, ObjectCipher, ObjectHeader, ObjectKind};

/// A pack is rewritten when less than this share of it, in percent, is needed.
const REPACK_BELOW_PERCENT: u64 = 70;
/// Index objects are merged when there are more.
const MAX_INDEX_OBJECTS: usize = 32;

/// What a prune did, or would do.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct PruneReport {
    pub packs: u64,
    pub packs_removed: u64,
    pub packs_rewritten: u64,
    pub bytes_before: u64,
    pub bytes_freed: u64,
    pub temporaries_removed: u64,
}

/// Removes what nothing needs; with `dry_run` only tells.
pub fn prune(repository: &Arc<Repository>, dry_run: bool, step: &dyn Fn(&str), cancel: &CancellationToken) -> Result<PruneReport> {
    step("looking for what is in use");
    repository.sync_index()?;
    let round = mark_used(repository, cancel)?;
    let usage = repository.local.usage(round)?;
    let listed = repository.listed_packs()?;
    let known: HashSet<[u8; 32]> = usage.iter().map(|u| u.id).collect();
    // Packs that no index lists and whose footer does not open: nobody can read them.
    let strange: Vec<[u8; 32]> = listed.keys().filter(|id| !known.contains(*id)).copied().collect();
    let (dead, alive): (Vec<PackUsage>, Vec<PackUsage>) = usage.into_iter().partition(|u| u.used_chunks == 0);
    let sparse: Vec<PackUsage> = alive.iter().filter(|u| u.used_bytes * 100 < u.size * REPACK_BELOW_PERCENT).cloned().collect();
    // One small pack left over is not worth rewriting by itself.
    let gain: u64 = sparse.iter().map(|u| u.size - u.used_bytes.min(u.size)).sum();
    let small = sparse.iter().all(|u| u.size < PACK_TARGET_BYTES as u64 / 8) && sparse.len() < 8;
    let rewrite = if small && gain < 1 << 20 { Vec::new() } else { sparse };
    let mut report = PruneReport {
        packs: listed.len() as u64,
        packs_removed: (dead.len() + strange.len()) as u64,
        packs_rewritten: rewrite.len() as u64,
        bytes_before: listed.values().sum(),
        bytes_freed: dead.iter().map(|u| u.size).sum::<u64>()
            + strange.iter().filter_map(|id| listed.get(id)).sum::<u64>()
            + rewrite.iter().map(|u| u.size - u.used_bytes.min(u.size)).sum::<u64>(),
        temporaries_removed: 0,
    };
    if dry_run {
        return Ok(report);
    }
    report.temporaries_removed = repository.storage.sweep_temporaries()?;
    let old_indexes: Vec<[u8; 32]> = repository.listed_indexes()?.into_iter().collect();
    let doomed: Vec<[u8; 32]> = dead.iter().chain(&rewrite).map(|u| u.id).chain(strange.iter().copied()).collect();
    if doomed.is_empty() && old_indexes.len() <= MAX_INDEX_OBJECTS {
        return Ok(report);
    }
    step("rewriting packs that are mostly dead");
    let rewritten = repack(repository, round, &rewrite, cancel)?;
    step("writing the index");
    let gone: HashSet<[u8; 32]> = doomed.iter().copied().collect();
    let kept: Vec<[u8; 32]> = repository.local.all_packs()?.into_iter().filter(|id| !gone.contains(id)).collect();
    let mut new_indexes = Vec::new();
    let mut index = Index { packs: Vec::new(), supersedes: old_indexes.clone() };
    let mut chunks = 0;
    let packs = kept.iter().map(|id| repository.whole_pack(id)).chain(rewritten.into_iter().map(Ok));
    for pack in packs {
        let pack = pack?;
        chunks += pack.chunks.len();
        index.packs.push(pack);
        if chunks >= INDEX_CHUNKS {
            new_indexes.push(std::mem::take(&mut index));
            chunks = 0;
        }
    }
    if !index.packs.is_empty() || (new_indexes.is_empty() && !old_indexes.is_empty()) {
        new_indexes.push(index);
    }
    if cancel.is_cancelled() {
        return Err(RepositoryError::Cancelled);
    }
    // The one that supersedes goes last: until it is there the old ones hold, and then the new ones are complete.
    let mut written = Vec::new();
    for index in new_indexes.into_iter().rev() {
        written.push((repository.write_index(&index)?, index));
    }
    step("removing");
    repository.local.clear()?;
    for (id, index) in &written {
        repository.local.load(id, &index.packs)?;
    }
    let kept_names: HashSet<[u8; 32]> = written.iter().map(|(id, _)| *id).collect();
    for id in old_indexes.iter().filter(|id| !kept_names.contains(*id)) {
        repository.storage.delete(&format!("index/{}", HEXLOWER.encode(id)))?;
    }
    for id in &doomed {
        if cancel.is_cancelled() {
            return Err(RepositoryError::Cancelled);
        }
        repository.storage.delete(&pack_name(id))?;
    }
    Ok(report)
}

/// Marks every chunk that a backup needs; returns the round's number.
fn mark_used(repository: &Repository, cancel: &CancellationToken) -> Result<i64> {
    let round = repository.local.begin_marks()?;
    for id in repository.listed_backups()?.into_iter() {
        let manifest: Manifest = repository.read_manifest(&id).map_err(refuse)?;
        let pages = manifest.sources.iter().flat_map(|s| s.pages.iter().map(|p| ChunkId(*p.chunk)));
        let mut todo: VecDeque<ChunkId> = VecDeque::new();
        let all: Vec<ChunkId> = pages.collect();
        mark_new(repository, round, &all, true, &mut todo)?;
        while let Some(id) = todo.pop_front() {
            if cancel.is_cancelled() {
                return Err(RepositoryError::Cancelled);
            }
            let bytes = repository.read_chunk(&id).map_err(refuse)?;
            let table = page::references(&bytes)
                .map_err(|e| refuse(repository.damaged(&format!("page {id}"), format!("it is no valid page: {e}"))))?;
            mark_new(repository, round, &table, false, &mut todo)?;
        }
    }
    Ok(round)
}

/// Marks chunks; those of metadata seen for the first time are read later.
fn mark_new(repository: &Repository, round: i64, ids: &[ChunkId], pages: bool, todo: &mut VecDeque<ChunkId>) -> Result<()> {
    let marks = repository.local.mark(round, ids)?;
    for (id, mark) in ids.iter().zip(marks) {
        match mark {
            Mark::Unknown => {
                return Err(refuse(repository.damaged(&format!("chunk {id}"), "no pack holds it, but a backup needs it".into())));
            }
            Mark::Again => {}
            // A table names data chunks and lists; the lists lie in metadata packs.
            Mark::First => {
                if pages || repository.locate(id)?.kind == ObjectKind::MetaPack {
                    todo.push_back(*id);
                }
            }
        }
    }
    Ok(())
}

fn refuse(error: RepositoryError) -> RepositoryError {
    match error {
        e @ (RepositoryError::Cancelled | RepositoryError::Storage(_)) => e,
        e => RepositoryError::Other(format!(
            "nothing was pruned, because it is not known what the backups need: {e}; 'keepctl check' names what is hurt"
        )),
    }
}

/// Seals the living chunks of packs anew into fuller ones.
fn repack(repository: &Arc<Repository>, round: i64, packs: &[PackUsage], cancel: &CancellationToken) -> Result<Vec<IndexedPack>> {
    let (mut done, memory, mut prover) = (Vec::new(), PackMemory::default(), Prover::default());
    for kind in [ObjectKind::DataPack, ObjectKind::MetaPack] {
        let mut builder: Option<PackBuilder> = None;
        for pack in packs.iter().filter(|p| p.kind == kind) {
            if cancel.is_cancelled() {
                return Err(RepositoryError::Cancelled);
            }
            let header = repository.storage.range(&pack_name(&pack.id), 0, HEADER_BYTES as u64)?;
            let header = ObjectHeader::expect(&header, &repository.id, kind).map_err(|e| repository.pack_error(&pack.id, e.into()))?;
            let cipher = ObjectCipher::new(&repository.master, &header);
            for (ordinal, c) in repository.local.marked_chunks(round, &pack.id)? {
                let sealed = repository.storage.range(&pack_name(&pack.id), u64::from(c.offset), u64::from(c.sealed_len))?;
                let error = |e: String| repository.damaged(&pack_name(&pack.id), format!("chunk {}: {e}; nothing was pruned", c.id));
                let payload = cipher.open(u64::from(ordinal), &sealed).map_err(|e| error(e.to_string()))?;
                let raw = payload::decompress(&payload, c.len as usize).map_err(|e| error(e.to_string()))?;
                if chunk_id(&repository.chunk_key, &raw) != c.id {
                    return Err(error("it is another chunk than its name says".into()));
                }
                let other =
                    |e: &dyn std::fmt::Display| RepositoryError::Other(format!("a pack could not be sealed: {e}; nothing was pruned"));
                let open = match &mut builder {
                    Some(open) => open,
                    None => builder.insert(PackBuilder::new(&repository.master, &repository.id, kind, &memory).map_err(|e| other(&e))?),
                };
                let mut place = open.reserve(c.id, payload.len(), c.len).map_err(|e| other(&e))?;
                place.seal(&payload, &raw, &mut prover).map_err(|e| other(&e))?;
                open.give(place);
                if open.len() >= PACK_TARGET_BYTES
                    && let Some(full) = builder.take()
                {
                    done.push(publish(repository, full, &memory)?);
                }
            }
        }
        if let Some(last) = builder.filter(|b| !b.is_empty()) {
            done.push(publish(repository, last, &memory)?);
        }
    }
    Ok(done)
}

fn publish(repository: &Repository, builder: PackBuilder, memory: &PackMemory) -> Result<IndexedPack> {
    let pack = builder
        .finish(&repository.master, &repository.id)
        .map_err(|e| RepositoryError::Other(format!("a pack could not be closed: {e}; nothing was pruned")))?;
    repository.store_pack(pack, memory)
}
