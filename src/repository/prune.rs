//! Prune: removes what no backup needs, and rewrites packs that are mostly dead, in two steps with a grace period between.
//!
//! The caller holds the lease. First, packs that nothing needs are condemned (see [`super::condemned`]) and leave the index; packs that are
//! mostly dead are rewritten and condemned too. A prune after the grace period deletes what is condemned for long enough and still not
//! needed; what a backup of somebody else has come to need is taken back. So a prune can run beside restores: only deleting waits for them.
//! Order: new packs, list of the condemned, new index objects (which name what they supersede), then the old index objects go, then expired
//! packs: whatever interrupts it, every backup stays whole and the next prune ends it. Nothing is condemned or deleted when a listing, a
//! manifest or a page cannot be read, for then nobody knows what is needed.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::condemned::{is_over, since};
use super::entry::ChunkId;
use super::error::{RepositoryError, Result};
use super::index::{INDEX_CHUNKS, Index, IndexedPack};
use super::local::{Mark, PackUsage};
use super::manifest::Manifest;
use super::open::{Repository, pack_name};
use super::pack::{ChunkOpener, PACK_TARGET_BYTES, PackBuilder, PackMemory, Prover, SealedChunk};
use super::page;
use crate::crypto::{CryptoError, ObjectKind};

/// A pack is rewritten when less than this share of it, in percent, is needed.
const REPACK_BELOW_PERCENT: u64 = 70;
/// Small index objects are merged when there are more of them.
const MAX_INDEX_OBJECTS: usize = 32;

/// A number of packs and their bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Amount {
    pub packs: u64,
    pub bytes: u64,
}

impl Amount {
    fn add(&mut self, bytes: u64) {
        self.packs += 1;
        self.bytes += bytes;
    }
}

/// What a prune did, or would do.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct PruneReport {
    /// All that the storage held.
    pub before: Amount,
    /// Needed by nothing, found now; the rewritten ones are not among them.
    pub condemned: Amount,
    /// Rewritten because most of them is needed by nothing, with the bytes that are saved.
    pub rewritten: Amount,
    /// Condemned before; their grace period is not over.
    pub waiting: Amount,
    /// Condemned before and needed again.
    pub taken_back: Amount,
    pub deleted: Amount,
    /// Mostly dead, but they open with a private key alone; the bytes are what is dead.
    pub closed: Amount,
    /// Their grace period is over, but a restore is reading.
    pub held: Amount,
    pub temporaries_deleted: u64,
}

/// How to prune.
pub struct PruneOptions<'a> {
    /// Only tell.
    pub dry_run: bool,
    /// Between condemning and deleting.
    pub grace: Duration,
    /// Keeps readers away while packs are deleted; None when there are some just now.
    pub alone: &'a dyn Fn() -> Option<Box<dyn Send>>,
}

/// Removes what nothing needs.
pub fn prune(
    repository: &Arc<Repository>,
    options: &PruneOptions<'_>,
    step: &dyn Fn(&str),
    cancel: &CancellationToken,
) -> Result<PruneReport> {
    step("looking for what is in use");
    repository.sync_index()?;
    // Here a list that cannot be read is an error, for it says what is to be deleted.
    let lists = repository.condemned_lists().map_err(refuse)?;
    let known_since = since(&lists);
    let round = mark_used(repository, cancel)?;
    let usage = repository.local.usage(round)?;
    let listed = repository.listed_packs()?;
    let now = Timestamp::now().as_second();
    let lost = repository.local.lost(round)?;
    let can_open = |u: &PackUsage| match repository.pack_cipher(&u.id, u.kind) {
        Ok(_) => Ok(true),
        // A write-only pack waits until all of it is dead, or somebody prunes with the private key.
        Err(RepositoryError::Object { source: CryptoError::NeedsPrivateKey(_), .. }) => Ok(false),
        Err(e @ (RepositoryError::Storage(_) | RepositoryError::Cancelled)) => Err(e),
        // What is wrong with it is told when it is rewritten.
        Err(_) => Ok(true),
    };
    let mut plan = Plan::make(&usage, &listed, &known_since, &lost, now, options.grace, &can_open)?;
    if options.dry_run {
        if options.grace.is_zero() {
            plan.report.deleted.packs += plan.report.condemned.packs + plan.report.rewritten.packs;
            plan.report.deleted.bytes += plan.report.condemned.bytes + plan.report.rewritten.bytes;
        }
        return Ok(plan.report);
    }
    plan.report.temporaries_deleted = repository.storage.sweep_temporaries()?;
    if !plan.rewrite.is_empty() {
        step("rewriting packs that are mostly dead");
    }
    let rewritten = repack(repository, round, &plan.rewrite, cancel)?;
    plan.condemn.extend(plan.rewrite.iter().map(|u| (u.id, u.size)));
    let condemned: Vec<[u8; 32]> = plan.condemn.iter().map(|(id, _)| *id).collect();
    if cancel.is_cancelled() {
        return Err(RepositoryError::Cancelled);
    }
    if !condemned.is_empty() {
        repository.condemn(now, &condemned)?;
    }
    // The local index learns it at once: chunks that were rewritten are found in their new packs.
    let mut in_force = known_since.clone();
    for id in &condemned {
        in_force.entry(*id).or_insert(now);
    }
    in_force.retain(|id, _| !plan.taken_back.contains(id));
    repository.local.set_condemned(&in_force)?;
    for pack in &rewritten {
        repository.local.add_unindexed(pack)?;
    }
    write_index(repository, &usage, &in_force, step)?;
    delete_expired(repository, &mut plan, &in_force, now, options, step, cancel)?;
    in_force.retain(|id, _| !plan.gone.contains(id));
    mend_lists(repository, &in_force)?;
    repository.local.set_condemned(&in_force)?;
    Ok(plan.report)
}

/// What is to be done with which packs.
#[derive(Default)]
struct Plan {
    /// To be condemned now; with their sizes.
    condemn: Vec<([u8; 32], u64)>,
    rewrite: Vec<PackUsage>,
    taken_back: Vec<[u8; 32]>,
    /// Condemned before; with their sizes.
    old: Vec<([u8; 32], u64)>,
    /// Condemned, and no longer there.
    gone: HashSet<[u8; 32]>,
    report: PruneReport,
}

impl Plan {
    fn make(
        usage: &[PackUsage],
        listed: &BTreeMap<[u8; 32], u64>,
        known_since: &BTreeMap<[u8; 32], i64>,
        lost: &BTreeMap<[u8; 32], u64>,
        now: i64,
        grace: Duration,
        can_open: &dyn Fn(&PackUsage) -> Result<bool>,
    ) -> Result<Self> {
        let mut plan = Plan::default();
        listed.values().for_each(|size| plan.report.before.add(*size));
        let known: HashSet<[u8; 32]> = usage.iter().map(|u| u.id).collect();
        // A damaged pack whose lost chunks are needed and nowhere else stays as it is: somebody may find a good copy of it. One whose
        // lost chunks were stored anew is rewritten.
        let hopeless = |id: &[u8; 32]| lost.get(id).is_some_and(|needed| *needed > 0);
        let usage: Vec<&PackUsage> = usage.iter().filter(|u| !hopeless(&u.id)).collect();
        let (dead, alive): (Vec<&PackUsage>, Vec<&PackUsage>) = usage.into_iter().partition(|u| u.used_chunks == 0);
        // Packs that no index lists and whose footer does not open: nobody can read them.
        let strange = listed.iter().filter(|(id, _)| !known.contains(*id)).map(|(id, size)| (*id, *size));
        for (id, size) in dead.iter().map(|u| (u.id, u.size)).chain(strange) {
            match known_since.get(&id) {
                None => {
                    plan.report.condemned.add(size);
                    plan.condemn.push((id, size));
                }
                Some(time) => {
                    let report = &mut plan.report;
                    let amount = if is_over(*time, now, grace) { &mut report.deleted } else { &mut report.waiting };
                    amount.add(size);
                    plan.old.push((id, size));
                }
            }
        }
        for u in alive.iter().filter(|u| u.condemned) {
            plan.report.taken_back.add(u.size);
            plan.taken_back.push(u.id);
        }
        let damaged = |u: &PackUsage| lost.contains_key(&u.id);
        let is_sparse = |u: &&PackUsage| !u.condemned && (damaged(u) || u.used_bytes * 100 < u.size * REPACK_BELOW_PERCENT);
        let mut sparse: Vec<PackUsage> = Vec::new();
        for usage in alive.into_iter().filter(is_sparse) {
            match can_open(usage)? {
                true => sparse.push(usage.clone()),
                false => plan.report.closed.add(usage.size - usage.used_bytes.min(usage.size)),
            }
        }
        // One small pack left over is not worth rewriting by itself.
        let saved = |u: &PackUsage| u.size - u.used_bytes.min(u.size);
        let small = sparse.iter().all(|u| u.size < PACK_TARGET_BYTES as u64 / 8) && sparse.len() < 8;
        if !small || sparse.iter().any(damaged) || sparse.iter().map(saved).sum::<u64>() >= 1 << 20 {
            sparse.iter().for_each(|u| plan.report.rewritten.add(saved(u)));
            plan.rewrite = sparse;
        }
        plan.gone = known_since.keys().filter(|id| !listed.contains_key(*id)).copied().collect();
        Ok(plan)
    }
}

/// Writes new index objects in place of those that list condemned packs (and of small ones, when there are many): their other packs, the
/// rewritten ones, and what stands in none yet.
fn write_index(repository: &Repository, usage: &[PackUsage], condemned: &BTreeMap<[u8; 32], i64>, step: &dyn Fn(&str)) -> Result<()> {
    // Also one that an interrupted prune condemned and left in its index.
    let mut old: BTreeSet<[u8; 32]> = usage.iter().filter(|u| condemned.contains_key(&u.id)).filter_map(|u| u.listed).collect();
    let all = repository.listed_indexes()?;
    if all.len() > MAX_INDEX_OBJECTS {
        let sizes = repository.local.index_sizes()?;
        let small = |id: &&[u8; 32]| sizes.get(*id).is_some_and(|chunks| *chunks < INDEX_CHUNKS as u64 / 2);
        let small: Vec<[u8; 32]> = all.iter().filter(small).copied().collect();
        if small.len() > MAX_INDEX_OBJECTS {
            old.extend(small);
        }
    }
    if !old.is_empty() || !repository.local.unindexed()?.is_empty() {
        step("writing the index");
    }
    let mut packs: Vec<[u8; 32]> = Vec::new();
    for id in &old {
        packs.extend(repository.local.listed_in(id)?.into_iter().filter(|p| !condemned.contains_key(p)));
    }
    packs.extend(repository.local.unindexed()?);
    if packs.is_empty() && old.is_empty() {
        return Ok(());
    }
    let mut written: Vec<Index> = Vec::new();
    let mut index = Index { packs: Vec::new(), supersedes: old.iter().copied().collect() };
    let mut chunks = 0;
    for id in packs {
        let pack = repository.whole_pack(&id)?;
        chunks += pack.chunks.len();
        index.packs.push(pack);
        if chunks >= INDEX_CHUNKS {
            written.push(std::mem::take(&mut index));
            chunks = 0;
        }
    }
    if !index.packs.is_empty() || written.is_empty() {
        written.push(index);
    }
    // The one that supersedes goes last: until it is there the old ones hold, and then the new ones are complete.
    for index in written.into_iter().rev() {
        let id = repository.write_index(&index)?;
        repository.local.mark_indexed(&id, &index.packs.iter().map(|p| p.id).collect::<Vec<_>>())?;
    }
    for id in &old {
        repository.storage.delete(&format!("index/{}", HEXLOWER.encode(id)))?;
    }
    repository.local.unload(&old.into_iter().collect::<Vec<_>>())
}

fn delete_expired(
    repository: &Repository,
    plan: &mut Plan,
    in_force: &BTreeMap<[u8; 32], i64>,
    now: i64,
    options: &PruneOptions<'_>,
    step: &dyn Fn(&str),
    cancel: &CancellationToken,
) -> Result<()> {
    // With no grace at all what was condemned just now is deleted at once.
    let is_expired = |id: &[u8; 32]| in_force.get(id).is_some_and(|since| is_over(*since, now, options.grace));
    let expired: Vec<([u8; 32], u64)> = plan.old.iter().chain(&plan.condemn).filter(|(id, _)| is_expired(id)).copied().collect();
    plan.report.deleted = Amount::default();
    if expired.is_empty() {
        return Ok(());
    }
    let Some(_alone) = (options.alone)() else {
        expired.iter().for_each(|(_, size)| plan.report.held.add(*size));
        return Ok(());
    };
    step("deleting");
    for (id, size) in expired {
        if cancel.is_cancelled() {
            return Err(RepositoryError::Cancelled);
        }
        repository.storage.delete(&pack_name(&id))?;
        repository.local.forget(&[id])?;
        plan.gone.insert(id);
        plan.report.deleted.add(size);
    }
    Ok(())
}

/// Lists whose packs are gone or were taken back are written anew without them, or removed.
fn mend_lists(repository: &Repository, in_force: &BTreeMap<[u8; 32], i64>) -> Result<()> {
    let mut seen = HashSet::new();
    for list in repository.condemned_lists()? {
        let left: Vec<[u8; 32]> = list.packs.iter().filter(|p| in_force.contains_key(*p) && seen.insert(**p)).copied().collect();
        if left.len() < list.packs.len() {
            repository.condemn(list.time, &left)?;
            repository.delete_condemned_list(&list.id)?;
        }
    }
    Ok(())
}

/// Marks every chunk that a backup needs; returns the round's number.
fn mark_used(repository: &Repository, cancel: &CancellationToken) -> Result<i64> {
    let round = repository.local.begin_marks()?;
    for id in repository.listed_backups()? {
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
            Mark::Lost | Mark::Again => {}
            // A table names data chunks and lists; the lists lie in metadata packs.
            Mark::First(kind) => {
                if pages || kind == ObjectKind::MetaPack {
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
    let (mut opener, mut raw) = (ChunkOpener::default(), Vec::new());
    for kind in [ObjectKind::DataPack, ObjectKind::MetaPack] {
        let mut builder: Option<PackBuilder> = None;
        for pack in packs.iter().filter(|p| p.kind == kind) {
            if cancel.is_cancelled() {
                return Err(RepositoryError::Cancelled);
            }
            let cipher = repository.pack_cipher(&pack.id, kind)?;
            for (ordinal, c) in repository.local.marked_chunks(round, &pack.id)? {
                let sealed = repository.storage.range(&pack_name(&pack.id), u64::from(c.offset), u64::from(c.sealed_len))?;
                let sealed = SealedChunk { ordinal: u64::from(ordinal), id: c.id, len: c.len, bytes: &sealed };
                opener
                    .open_into(&cipher, &repository.chunk_key, &sealed, &mut raw)
                    .map_err(|e| repository.damaged(&pack_name(&pack.id), format!("chunk {}: {e}; nothing was pruned", c.id)))?;
                let other =
                    |e: &dyn std::fmt::Display| RepositoryError::Other(format!("a pack could not be sealed: {e}; nothing was pruned"));
                let open = match &mut builder {
                    Some(open) => open,
                    None => builder.insert(PackBuilder::new(&repository.keys, &repository.id, kind, &memory).map_err(|e| other(&e))?),
                };
                open.push(c.id, opener.payload(), &raw, &mut prover).map_err(|e| other(&e))?;
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
        .finish(&repository.keys, &repository.id)
        .map_err(|e| RepositoryError::Other(format!("a pack could not be closed: {e}; nothing was pruned")))?;
    repository.store_pack(pack, memory)
}
