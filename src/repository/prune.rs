//! Prune: removes what no backup needs, and rewrites packs that are mostly dead, in two steps with a grace period between.
//!
//! The caller holds the lease. First, packs that nothing needs are condemned (see [`super::condemned`]) and leave the index; packs that are
//! mostly dead are rewritten and condemned too. A prune after the grace period deletes what is condemned for long enough and still not
//! needed; what a backup of somebody else has come to need is taken back. So a prune can run beside restores: only deleting waits for them.
//! Order: new packs, list of the condemned, new index objects (which name what they supersede), then the old index objects go, then expired
//! packs: whatever interrupts it, every backup stays whole and the next prune ends it. Nothing is condemned or deleted when a listing, a
//! manifest or a page cannot be read, for then nobody knows what is needed.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use data_encoding::HEXLOWER;
use tokio_util::sync::CancellationToken;

use super::condemned::{Now, since};
use super::entry::ChunkId;
use super::error::{RepositoryError, Result};
use super::index::{INDEX_CHUNKS, Index, IndexedPack};
use super::local::{Dead, PackUsage};
use super::needed::{Needed, refuse};
use super::open::{Repository, pack_name};
use super::pack::{ChunkOpener, PACK_TARGET_BYTES, PackBuilder, PackMemory, Prover, SealedChunk};
use super::writer;
use crate::crypto::{CryptoError, ObjectKind};
use crate::storage::StorageError;

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
    /// Backups that are here as far as anybody remembers: a listing that lacks one that is there is not believed.
    pub known: &'a [[u8; 32]],
    pub now: Now,
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
    let Some(_alone) = repository.local.pruned_alone() else {
        return Err(RepositoryError::Other(format!(
            "{}: the same repository is pruned already, as another destination; try again when that has ended",
            repository.location()
        )));
    };
    step("looking for what is in use");
    repository.sync_index()?;
    // Here a list that cannot be read is an error, for it says what is to be deleted.
    let lists = repository.condemned_lists().map_err(refuse)?;
    let known_since = since(&lists);
    let needed = Needed::by_backups(repository, options.known, cancel)?;
    let usage = &needed.usage;
    let listed = repository.listed_packs()?;
    let (now, begun) = (options.now, options.now.to_condemn(&lists));
    let can_open = |u: &PackUsage| match repository.pack_cipher(&u.id, u.kind) {
        Ok(_) => Ok(true),
        // A write-only pack waits until all of it is dead, or somebody prunes with the private key.
        Err(RepositoryError::Object { source: CryptoError::NeedsPrivateKey(_), .. }) => Ok(false),
        Err(e @ (RepositoryError::Storage(_) | RepositoryError::Cancelled)) => Err(e),
        // What is wrong with it is told when it is rewritten.
        Err(_) => Ok(true),
    };
    let mut plan = Plan::make(usage, &listed, &known_since, &needed.lost, now, options.grace, &can_open)?;
    if options.dry_run {
        if options.grace.is_zero() {
            plan.report.deleted.packs += plan.report.condemned.packs + plan.report.rewritten.packs;
            plan.report.deleted.bytes += plan.report.condemned.bytes + plan.report.rewritten.bytes;
        }
        return Ok(plan.report);
    }
    let is_expired = |id: &[u8; 32]| known_since.get(id).is_some_and(|since| now.is_over(*since, options.grace));
    prove_dead(repository, &needed, &plan, &listed, &is_expired, cancel)?;
    plan.report.temporaries_deleted = repository.storage.sweep_temporaries()?;
    if !plan.rewrite.is_empty() {
        step("rewriting packs that are mostly dead");
    }
    let rewritten = repack(repository, &needed.dead, &plan.rewrite, cancel)?;
    plan.condemn.extend(plan.rewrite.iter().map(|u| (u.id, u.size)));
    let condemned: Vec<[u8; 32]> = plan.condemn.iter().map(|(id, _)| *id).collect();
    if cancel.is_cancelled() {
        return Err(RepositoryError::Cancelled);
    }
    if !condemned.is_empty() {
        repository.condemn(begun, &condemned)?;
    }
    // The local index learns it at once: chunks that were rewritten are found in their new packs.
    let mut in_force = known_since.clone();
    for id in &condemned {
        in_force.entry(*id).or_insert(begun);
    }
    in_force.retain(|id, _| !plan.taken_back.contains(id));
    repository.local.set_condemned(&in_force)?;
    for pack in &rewritten {
        repository.local.add_unindexed(pack)?;
    }
    drop(rewritten);
    write_index(repository, usage, &listed, &in_force, step)?;
    delete_expired(repository, &mut plan, &in_force, options, step, cancel)?;
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
        now: Now,
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
                    let amount = if now.is_over(*time, grace) { &mut report.deleted } else { &mut report.waiting };
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

/// Writes new index objects in place of those that list condemned packs (and of small ones, when there are many), and of damaged
/// ones: their other packs, and what stands in none yet.
fn write_index(
    repository: &Repository,
    usage: &[PackUsage],
    listed: &BTreeMap<[u8; 32], u64>,
    condemned: &BTreeMap<[u8; 32], i64>,
    step: &dyn Fn(&str),
) -> Result<()> {
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
    old.extend(damaged_indexes(repository, usage, listed, &all)?);
    let unlisted = repository.local.unindexed()?;
    if !old.is_empty() || !unlisted.is_empty() {
        step("writing the index");
    }
    // What an interrupted prune left, or whose packs are all gone. It stays superseded as long as it is there: once nothing superseded it
    // any more it would be in force again, and name packs that were deleted since.
    let idle: Vec<[u8; 32]> = repository.local.idle_indexes()?.into_iter().filter(|id| all.contains(id)).collect();
    if unlisted.is_empty() && old.is_empty() && idle.len() < 2 {
        for id in &idle {
            repository.storage.delete(&format!("index/{}", HEXLOWER.encode(id)))?;
        }
        return repository.local.unload(&idle);
    }
    // What is in them is taken from what they replace, which is sealed, and from the packs themselves. The local index is a cache without
    // a checksum: were a byte of it wrong, it would be wrong in the repository from now on.
    let (mut next, mut chunks) = (Index::default(), 0);
    let mut add = |pack: IndexedPack| -> Result<()> {
        if chunks >= INDEX_CHUNKS {
            writer::publish(repository, &std::mem::take(&mut next))?;
            chunks = 0;
        }
        chunks += pack.chunks.len();
        next.packs.push(pack);
        Ok(())
    };
    for id in &old {
        let mut left: BTreeSet<[u8; 32]> = repository.local.listed_in(id)?.into_iter().filter(|p| !condemned.contains_key(p)).collect();
        match repository.read_index(id) {
            Ok(index) => index.packs.into_iter().filter(|pack| left.remove(&pack.id)).try_for_each(&mut add)?,
            Err(e @ (RepositoryError::Storage(_) | RepositoryError::Cancelled)) => return Err(e),
            // The packs' footers have it.
            Err(_) => {}
        }
        for pack in left {
            add(repository.pack_from_footer(&pack, listed.get(&pack).copied())?)?;
        }
    }
    for pack in unlisted {
        add(repository.pack_to_list(&pack, listed.get(&pack).copied())?)?;
    }
    old.extend(idle);
    // The one that supersedes goes last: until it is there the old ones hold, and then the new ones are complete.
    next.supersedes = old.iter().copied().collect();
    writer::publish(repository, &next)?;
    for id in &old {
        repository.storage.delete(&format!("index/{}", HEXLOWER.encode(id)))?;
    }
    repository.local.unload(&old.into_iter().collect::<Vec<_>>())
}

/// Index objects whose bytes are damaged, so that nobody can read them; none as long as there is any pack of which nobody knows what is in
/// it: somebody may find a good copy of them.
fn damaged_indexes(
    repository: &Repository,
    usage: &[PackUsage],
    listed: &BTreeMap<[u8; 32], u64>,
    all: &BTreeSet<[u8; 32]>,
) -> Result<Vec<[u8; 32]>> {
    let loaded = repository.local.loaded()?;
    let strange: Vec<&[u8; 32]> = all.iter().filter(|id| !loaded.contains(*id)).collect();
    let known: HashSet<&[u8; 32]> = if strange.is_empty() { HashSet::new() } else { usage.iter().map(|u| &u.id).collect() };
    let mut damaged = Vec::new();
    if listed.keys().all(|id| known.contains(id)) {
        for id in strange {
            if repository.is_damaged_index(id)? {
                damaged.push(*id);
            }
        }
    }
    Ok(damaged)
}

/// Proves by the index objects in force, and by the packs' own footers, that what is to be condemned, rewritten or deleted now holds nothing
/// that is needed and nowhere else: the local index, by which it was chosen, is a cache, and a damaged one may have a chunk in another pack
/// than the one it lies in. Such a one is emptied, and the next run makes it anew.
fn prove_dead(
    repository: &Repository,
    needed: &Needed,
    plan: &Plan,
    listed: &BTreeMap<[u8; 32], u64>,
    is_expired: &dyn Fn(&[u8; 32]) -> bool,
    cancel: &CancellationToken,
) -> Result<()> {
    let go_on = || if cancel.is_cancelled() { Err(RepositoryError::Cancelled) } else { Ok(()) };
    // Whatever is needed must not be in these.
    let leaving: HashSet<[u8; 32]> = plan.condemn.iter().chain(&plan.old).map(|(id, _)| *id).collect();
    let rewritten: HashSet<[u8; 32]> = plan.rewrite.iter().map(|u| u.id).collect();
    // What waits was proven when it was condemned, and is once more before it is deleted.
    let old = plan.old.iter().map(|(id, _)| *id).filter(|id| is_expired(id));
    let going = plan.condemn.iter().map(|(id, _)| *id).chain(old).chain(rewritten.iter().copied());
    let mut going: HashSet<[u8; 32]> = going.filter(|id| listed.contains_key(id)).collect();
    let wrong = |chunk: &ChunkId, there: &[u8; 32]| {
        let what = format!("it has chunk {chunk}, which a backup needs, in {}, and that is not where it lies: it is", pack_name(there));
        repository.local.damaged(&what).unwrap_or_else(|e| e)
    };
    // Chunks that are needed and by the local index in other packs than these.
    let mut elsewhere: BTreeMap<[u8; 32], Vec<ChunkId>> = BTreeMap::new();
    let mut look_at = |pack: &IndexedPack| -> Result<()> {
        let is_rewritten = rewritten.contains(&pack.id);
        let ids: Vec<ChunkId> = pack.chunks.iter().map(|c| c.id).collect();
        for (chunk, there) in ids.iter().zip(repository.local.needed_in(&needed.dead, &ids)?) {
            match there {
                // It was in a pack that is damaged, and here it may lie whole: emptied, the local index finds it here.
                None if needed.lost_chunks.contains(chunk) && !needed.lost.contains_key(&pack.id) => return Err(wrong(chunk, &pack.id)),
                None => {}
                Some(there) if is_rewritten && there == pack.id => {}
                Some(there) if leaving.contains(&there) => return Err(wrong(chunk, &there)),
                Some(there) => elsewhere.entry(there).or_default().push(*chunk),
            }
        }
        if is_rewritten {
            // Its chunks are read where the local index has them.
            for (ordinal, chunk) in repository.local.needed_chunks(&needed.dead, &pack.id)? {
                if pack.chunks.get(ordinal as usize) != Some(&chunk) {
                    return Err(wrong(&chunk.id, &pack.id));
                }
            }
        }
        Ok(())
    };
    let indexes: BTreeSet<[u8; 32]> = needed.usage.iter().filter(|u| going.contains(&u.id)).filter_map(|u| u.listed).collect();
    for id in &indexes {
        go_on()?;
        match repository.read_index(id) {
            Ok(index) => index.packs.iter().filter(|pack| going.remove(&pack.id)).try_for_each(&mut look_at)?,
            // The local index has a wrong one.
            Err(RepositoryError::Storage(StorageError::NotFound { .. })) => {}
            Err(e @ (RepositoryError::Storage(_) | RepositoryError::Cancelled)) => return Err(e),
            Err(_) => {}
        }
    }
    for id in going {
        go_on()?;
        match repository.pack_from_footer(&id, listed.get(&id).copied()) {
            Ok(pack) => look_at(&pack)?,
            Err(e @ (RepositoryError::Storage(_) | RepositoryError::Cancelled)) => return Err(e),
            // What nobody can read holds nothing.
            Err(_) => {}
        }
    }
    for (there, chunks) in elsewhere {
        go_on()?;
        let held: HashSet<ChunkId> = match repository.pack_from_footer(&there, listed.get(&there).copied()) {
            Ok(pack) => pack.chunks.iter().map(|c| c.id).collect(),
            Err(e @ (RepositoryError::Storage(_) | RepositoryError::Cancelled)) => return Err(e),
            Err(_) => HashSet::new(),
        };
        for chunk in chunks.iter().filter(|chunk| !held.contains(*chunk)) {
            let opens = repository.lookup(chunk)?.is_some_and(|at| at.pack == there && repository.read_chunk_at(chunk, &at).is_ok());
            if !opens {
                return Err(wrong(chunk, &there));
            }
        }
    }
    Ok(())
}

fn delete_expired(
    repository: &Repository,
    plan: &mut Plan,
    in_force: &BTreeMap<[u8; 32], i64>,
    options: &PruneOptions<'_>,
    step: &dyn Fn(&str),
    cancel: &CancellationToken,
) -> Result<()> {
    // With no grace at all what was condemned just now is deleted at once.
    let is_expired = |id: &[u8; 32]| in_force.get(id).is_some_and(|since| options.now.is_over(*since, options.grace));
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

/// Seals the living chunks of packs anew into fuller ones.
fn repack(repository: &Arc<Repository>, dead: &Dead, packs: &[PackUsage], cancel: &CancellationToken) -> Result<Vec<IndexedPack>> {
    let (mut done, memory, mut prover) = (Vec::new(), PackMemory::default(), Prover::default());
    let (mut opener, mut raw) = (ChunkOpener::default(), Vec::new());
    for kind in [ObjectKind::DataPack, ObjectKind::MetaPack] {
        let mut builder: Option<PackBuilder> = None;
        for pack in packs.iter().filter(|p| p.kind == kind) {
            if cancel.is_cancelled() {
                return Err(RepositoryError::Cancelled);
            }
            let cipher = repository.pack_cipher(&pack.id, kind)?;
            let chunks = repository.local.needed_chunks(dead, &pack.id)?;
            if chunks.len() as u64 != pack.used_chunks {
                let text = format!("{} was changed in the meantime by somebody else; nothing was pruned, try again", pack_name(&pack.id));
                return Err(RepositoryError::LocalIndex { location: repository.location().to_owned(), text });
            }
            for (ordinal, c) in chunks {
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
