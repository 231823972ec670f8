//! A new master key: everything is sealed anew, piece by piece beside running backups, and the old key opens nothing any more.
//!
//! 1. [`begin`]: every slot wraps both master keys; what is written from now on is sealed with the new one.
//! 2. [`PackSealer::some`], again and again: packs are opened and sealed anew, chunk by chunk, under the names they had.
//! 3. [`finish`]: manifests, marks and index objects, whose names change with their bytes; what was sealed with the old key is removed; then
//!    the slots forget it.
//!
//! Nothing is remembered beside the repository: which master keys are in force stands in the slots, and in which epoch an object was sealed in its
//! header. So each step may be interrupted and done again. New objects are durable before old ones go.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use minicbor::bytes::ByteArray;
use tokio_util::sync::CancellationToken;

use super::entry::ChunkId;
use super::error::{RepositoryError, Result};
use super::index::{Index, IndexedPack};
use super::lock;
use super::manifest::Manifest;
use super::mark::mark_name;
use super::open::{Repository, ids, manifest_name, pack_name};
use super::pack::{self, ChunkOpener, MAX_PACK_BYTES, PackBuilder, PackMemory, Prover, SealedChunk};
use super::slots::{self, Unreadable};
use crate::crypto::slot::METHOD_NONE;
use crate::crypto::{CryptoError, HEADER_BYTES, Keyring, ObjectHeader, Profile, ProfileKey};
use crate::storage::StorageError;
use crate::storage::direct::ReadBuffer;

/// A slot that no configured profile opens, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignSlot {
    pub slot: String,
    pub profile: String,
    pub fingerprint: String,
}

impl fmt::Display for ForeignSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (slot, profile, fingerprint) = (self.slot.escape_default(), self.profile.escape_default(), self.fingerprint.escape_default());
        write!(f, "{slot} (profile '{profile}', fingerprint {fingerprint})")
    }
}

/// How a re-encryption may begin.
#[derive(Debug, PartialEq, Eq)]
pub enum Begun {
    /// Slots wrap both keys now, or did already. With what had to be dropped.
    Now { dropped: Vec<ForeignSlot> },
    /// Nothing was changed: these slots would not open the repository any more.
    WouldDrop(Vec<ForeignSlot>),
}

/// Begins a re-encryption, or goes on with one. Nobody else may have the repository open; it must be opened anew afterwards. `profiles` are those whose
/// slots go on opening it, the destination's own first; others are dropped if `drop_others`.
pub fn begin(repository: &Repository, profiles: &[Profile], drop_others: bool) -> Result<Begun> {
    let keys = match repository.keys.is_changing() {
        true => None,
        false => Some(repository.keys.with_new_master().map_err(|e| crypto(repository, e))?),
    };
    replace_slots(repository, profiles, keys.as_ref().unwrap_or(&repository.keys), drop_others)
}

fn crypto(repository: &Repository, source: CryptoError) -> RepositoryError {
    RepositoryError::Object { location: repository.location().to_owned(), name: "keys/".into(), source }
}

/// Has one slot for each profile that could open the repository, wrapping these keys, and none else. New slots are read back and opened before
/// an old one goes.
fn replace_slots(repository: &Repository, profiles: &[Profile], keys: &Keyring, drop_others: bool) -> Result<Begun> {
    let (mut old, mut foreign, mut opening, mut ready) = (Vec::new(), Vec::new(), HashSet::new(), HashSet::new());
    // The destination's own has one in any case.
    opening.insert(0);
    for (name, slot) in slots::read_all(&repository.storage)? {
        // What is no slot, and what opens for everybody, somebody put there.
        let mut put_there = |profile: &str| {
            let slot = name.strip_prefix("keys/").unwrap_or(&name).to_owned();
            foreign.push(ForeignSlot { slot, profile: profile.to_owned(), fingerprint: String::new() });
            old.push(name.clone());
        };
        let slot = match slot {
            Ok(slot) => slot,
            Err(Unreadable::Storage(e)) => return Err(e.into()),
            Err(Unreadable::Slot(_)) => {
                put_there("no valid slot");
                continue;
            }
        };
        if slot.repository != repository.id() {
            continue;
        }
        if slot.method == METHOD_NONE {
            put_there("opens without a key");
            continue;
        }
        // Nobody but an attacker makes such ones.
        let is_dear = slots::is_dear(&slot);
        let mut found = None;
        for (n, profile) in profiles.iter().enumerate() {
            for key in profile.keys().filter(|key| !is_dear || !matches!(key, ProfileKey::Passphrase(_))) {
                match slot.unwrap(&repository.id, Some(key)) {
                    Ok(opened) => found = found.or(Some((n, opened, key.fingerprint().ok() == profile.key.fingerprint().ok()))),
                    // A token that is away could open it: that is no slot of nobody's.
                    Err(e @ CryptoError::Token(_)) => return Err(crypto(repository, e)),
                    Err(_) => {}
                }
            }
        }
        match found {
            Some((n, opened, is_current)) => {
                opening.insert(n);
                if opened.is_same(keys) && is_current && !ready.contains(&n) {
                    ready.insert(n);
                } else {
                    old.push(name);
                }
            }
            None => {
                foreign.push(ForeignSlot { slot: slot.slot, profile: slot.profile, fingerprint: slot.fingerprint });
                old.push(name);
            }
        }
    }
    if !foreign.is_empty() && !drop_others {
        return Ok(Begun::WouldDrop(foreign));
    }
    let mut opening: Vec<usize> = opening.into_iter().filter(|n| !ready.contains(n)).collect();
    opening.sort_unstable();
    for profile in opening.into_iter().filter_map(|n| profiles.get(n)) {
        repository.put_slot(&profile.name, &profile.key, keys)?;
    }
    repository.delete_slots(&old)?;
    Ok(Begun::Now { dropped: foreign })
}

/// How far the packs are, in bytes: looked at by this process, and of how many.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sealed {
    pub bytes: u64,
    pub total: u64,
}

/// Seals packs anew, some at a time.
#[derive(Default)]
pub struct PackSealer {
    /// Sealed with the new key, or gone.
    done: HashSet<[u8; 32]>,
    bytes: u64,
}

/// A pack sealed anew and what it replaces; None when it was new already, or is gone.
type Resealed = Option<IndexedPack>;

/// What threads have looked at, and its bytes.
type Found = (Vec<([u8; 32], Resealed)>, u64);

impl PackSealer {
    /// Seals packs anew for about `time`; true when all are. The repository was opened after [`begin`], and nobody else writes to it now.
    /// What is replaced is removed when `alone` keeps its readers away, else at the end.
    pub fn some(
        &mut self,
        repository: &Arc<Repository>,
        time: Duration,
        alone: &dyn Fn() -> Option<Box<dyn Send>>,
        progress: &(dyn Fn(Sealed) + Sync),
        cancel: &CancellationToken,
    ) -> Result<bool> {
        repository.sync_index()?;
        let listed = repository.listed_packs()?;
        let todo: Vec<([u8; 32], u64)> = listed.into_iter().filter(|(id, _)| !self.done.contains(id)).collect();
        let total = self.bytes + todo.iter().map(|(_, size)| size).sum::<u64>();
        let (until, next) = (Instant::now() + time, AtomicUsize::new(0));
        let found: Mutex<Found> = Mutex::default();
        let failed = Mutex::new(None::<RepositoryError>);
        // Each works on two packs' bytes.
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(2);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let mut sealer = OnePack::default();
                    while Instant::now() < until && !cancel.is_cancelled() && lock(&failed).is_none() {
                        let Some((id, size)) = todo.get(next.fetch_add(1, Ordering::Relaxed)) else { return };
                        match sealer.seal(repository, id) {
                            Ok(resealed) => {
                                let mut found = lock(&found);
                                found.1 += size;
                                found.0.push((*id, resealed));
                                progress(Sealed { bytes: self.bytes + found.1, total });
                            }
                            Err(e) => *lock(&failed) = Some(e),
                        }
                    }
                });
            }
        });
        let (found, bytes) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.bytes += bytes;
        let (old, new): (Vec<[u8; 32]>, Vec<IndexedPack>) = found.iter().filter_map(|(id, pack)| Some((*id, pack.clone()?))).unzip();
        put_in_place(repository, &old, &new)?;
        self.done.extend(found.iter().filter(|(_, pack)| pack.is_none()).map(|(id, _)| *id));
        self.done.extend(new.iter().map(|pack| pack.id));
        self.done.extend(&old);
        if let Some(e) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(e);
        }
        if cancel.is_cancelled() {
            return Err(RepositoryError::Cancelled);
        }
        if !old.is_empty()
            && let Some(_alone) = alone()
        {
            remove_packs(repository, &old)?;
        }
        Ok(next.load(Ordering::Relaxed) >= todo.len())
    }
}

/// What one thread uses again for each pack.
#[derive(Default)]
struct OnePack {
    old: ReadBuffer,
    memory: PackMemory,
    prover: Prover,
    opener: ChunkOpener,
    raw: Vec<u8>,
}

impl OnePack {
    /// A damaged pack whose chunks are all elsewhere, too, is not needed.
    fn seal(&mut self, repository: &Repository, id: &[u8; 32]) -> Result<Resealed> {
        match self.seal_all(repository, id) {
            Err(RepositoryError::Damaged { .. }) if is_spare(repository, id)? => Ok(None),
            other => other,
        }
    }

    fn seal_all(&mut self, repository: &Repository, id: &[u8; 32]) -> Result<Resealed> {
        let name = pack_name(id);
        match epoch_of(repository, &name) {
            Ok(epoch) if epoch == repository.keys.epoch() => return Ok(None),
            Ok(_) => {}
            Err(RepositoryError::Storage(StorageError::NotFound { .. })) => return Ok(None),
            Err(e @ RepositoryError::Storage(_)) => return Err(e),
            Err(_) if repository.local.pack(id)?.is_none() => return Ok(None),
            Err(e) => return Err(e),
        }
        match repository.storage.get_into(&name, MAX_PACK_BYTES, &mut self.old) {
            Ok(()) => {}
            Err(StorageError::NotFound { .. }) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        let bytes = &self.old[..];
        let stop = |text: String| {
            let text = format!("{text}; nothing of it was changed: 'keepctl check --read-data --repair' first");
            repository.damaged(&name, text)
        };
        let contents = pack::contents(&repository.keys, &repository.id, bytes).map_err(|e| stop(e.to_string()))?;
        let header = contents.header;
        let cipher = pack::cipher(&repository.keys, &header, bytes, &contents.chunks).map_err(|e| match e {
            e @ CryptoError::NeedsPrivateKey(_) => repository.key_error(id, e),
            other => stop(other.to_string()),
        })?;
        let mut builder = PackBuilder::new(&repository.keys, &repository.id, header.kind, &self.memory).map_err(|e| stop(e.to_string()))?;
        for (ordinal, c) in contents.chunks.iter().enumerate() {
            let sealed = bytes.get(c.offset as usize..c.offset as usize + c.sealed_len as usize).unwrap_or_default();
            let wrong = |e: &dyn std::fmt::Display| stop(format!("chunk {}: {e}", c.id));
            let sealed = SealedChunk { ordinal: ordinal as u64, id: c.id, len: c.len, bytes: sealed };
            self.opener.open_into(&cipher, &repository.chunk_key, &sealed, &mut self.raw).map_err(|e| wrong(&e))?;
            builder.push(c.id, self.opener.payload(), &self.raw, &mut self.prover).map_err(|e| wrong(&e))?;
        }
        let built = builder.finish(&repository.keys, &repository.id).map_err(|e| stop(e.to_string()))?;
        repository.store_pack(built, &self.memory).map(Some)
    }
}

/// Whether all chunks of a pack are found in other packs.
fn is_spare(repository: &Repository, id: &[u8; 32]) -> Result<bool> {
    let Some(pack) = repository.local.pack(id)? else { return Ok(true) };
    for chunk in &pack.chunks {
        if repository.lookup(&chunk.id)?.is_none_or(|at| at.pack == *id) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// In which epoch an object was sealed, as its header says.
fn epoch_of(repository: &Repository, name: &str) -> Result<u16> {
    let header = repository.storage.range(name, 0, HEADER_BYTES as u64)?;
    let header = ObjectHeader::parse(&header, &repository.id).map_err(|e| repository.damaged(name, e.to_string()))?;
    Ok(header.epoch())
}

/// From now on chunks are found in the new packs. The old ones are condemned: backups do not build upon them, and whoever reads them still may.
fn put_in_place(repository: &Repository, old: &[[u8; 32]], new: &[IndexedPack]) -> Result<()> {
    if old.is_empty() {
        return Ok(());
    }
    let now = Timestamp::now().as_second();
    repository.condemn(now, old)?;
    let mut condemned = repository.local.condemned()?;
    condemned.extend(old.iter().map(|id| (*id, now)));
    repository.local.set_condemned(&condemned)?;
    for pack in new {
        repository.local.add_unindexed(pack)?;
    }
    let index = repository.write_index(&Index { packs: new.to_vec(), supersedes: Vec::new() })?;
    repository.local.mark_indexed(&index, &new.iter().map(|p| p.id).collect::<Vec<_>>())
}

fn remove_packs(repository: &Repository, packs: &[[u8; 32]]) -> Result<()> {
    for id in packs {
        repository.storage.delete(&pack_name(id))?;
    }
    // One that came back would stand in everybody's way: nothing opens it any more.
    repository.storage.settle()?;
    repository.local.forget(packs)
}

/// Ends a re-encryption: all packs were sealed anew, nobody reads or writes, and the repository was opened after [`begin`].
/// `known` are manifests and marks that are here as far as anybody remembers, by their names: a listing that lacks one that is there is not believed, for what it
/// hides would be sealed with a key that is forgotten. `go_on` is asked again and again: that it was cancelled, or that somebody else writes now, ends it.
pub fn finish(
    repository: &Arc<Repository>,
    profiles: &[Profile],
    drop_others: bool,
    known: &[String],
    step: &dyn Fn(&str),
    go_on: &dyn Fn() -> Result<()>,
) -> Result<Begun> {
    let epoch = repository.keys.epoch();
    step("sealing manifests and marks anew");
    let (manifests, in_order) = seal_manifests(repository, epoch, known, go_on)?;
    let marks = seal_marks(repository, epoch, &manifests, known, go_on)?;
    step("removing what was sealed with the old key");
    // Of which backup an old mark is can only be told while its old manifest is there.
    for id in marks {
        go_on()?;
        repository.storage.delete(&mark_name(&id))?;
    }
    // The newest first: what an old one refers to is there as long as it is, so that its new twin is known for what it is.
    for id in in_order.iter().rev() {
        go_on()?;
        repository.storage.delete(&manifest_name(id))?;
    }
    remove_old_packs(repository, epoch, go_on)?;
    for directory in ["index/", "condemned/"] {
        for name in repository.storage.names(directory)? {
            go_on()?;
            // What is none of ours opens with no key.
            if epoch_if_any(repository, &name)?.is_some_and(|found| found != epoch) {
                repository.storage.delete(&name)?;
            }
        }
    }
    repository.local.clear()?;
    let problems = repository.sync_index()?;
    if let Some(problem) = problems.first() {
        return Err(RepositoryError::Other(format!("the old key is still in force, as something is wrong: {problem}")));
    }
    step("looking for what the old key still opens");
    for directory in ["packs/", "index/", "backups/", "marks/", "condemned/"] {
        for object in repository.storage.list(directory)? {
            go_on()?;
            if epoch_if_any(repository, &object.name)?.is_some_and(|found| found != epoch) {
                let text = "it is still sealed with the old key, which stays in force; begin again".into();
                return Err(repository.damaged(&object.name, text));
            }
        }
    }
    step("forgetting the old key");
    replace_slots(repository, profiles, &repository.keys.newest_alone(), drop_others)
}

/// None of what has no header of this repository: no key of it opens that.
fn epoch_if_any(repository: &Repository, name: &str) -> Result<Option<u16>> {
    match epoch_of(repository, name) {
        Ok(epoch) => Ok(Some(epoch)),
        Err(e @ RepositoryError::Storage(_)) => Err(e),
        Err(_) => Ok(None),
    }
}

/// The header's epoch and what an object holds.
fn with_epoch<T>(repository: &Repository, name: &str, read: impl FnOnce() -> Result<T>) -> Result<(u16, T)> {
    Ok((epoch_of(repository, name)?, read()?))
}

/// What each old manifest is now, and the old ones in order.
type Moved = (HashMap<[u8; 32], [u8; 32]>, Vec<[u8; 32]>);

/// What is known of a manifest while all of them are sealed anew.
struct Known {
    epoch: u16,
    name: [u8; 32],
    predecessor: Option<[u8; 32]>,
    parent: Option<[u8; 32]>,
}

/// Writes manifests anew that were sealed with an old key, or refer to such ones; returns what each old one is now. Backups go on being known by the
/// ids they had. Second: the old ones in the order of their sequence.
fn seal_manifests(repository: &Repository, epoch: u16, known: &[String], go_on: &dyn Fn() -> Result<()>) -> Result<Moved> {
    let mut all: BTreeMap<(u64, [u8; 32]), Known> = BTreeMap::new();
    let listed = repository.listed_backups()?;
    is_whole(repository, "backups/", &listed.iter().map(manifest_name).collect(), known)?;
    for id in listed {
        let (epoch, manifest) = with_epoch(repository, &manifest_name(&id), || repository.read_manifest(&id))?;
        let plain = |id: &Option<ByteArray<32>>| id.as_ref().map(|id| **id);
        let known =
            Known { epoch, name: manifest.known_as(&id), predecessor: plain(&manifest.predecessor), parent: plain(&manifest.parent) };
        all.insert((manifest.sequence, id), known);
    }
    let (mut now, mut in_order): Moved = Default::default();
    for ((sequence, id), known) in &all {
        go_on()?;
        let moved = |other: Option<[u8; 32]>| other.map(|id| now.get(&id).copied().unwrap_or(id));
        let (predecessor, parent) = (moved(known.predecessor), moved(known.parent));
        if known.epoch == epoch && predecessor == known.predecessor && parent == known.parent {
            continue;
        }
        // An earlier try may have written it.
        let is_it = |k: &Known| k.epoch == epoch && k.name == known.name && k.predecessor == predecessor && k.parent == parent;
        let there = all.range((*sequence, [0; 32])..=(*sequence, [255; 32])).find(|((_, other), k)| other != id && is_it(k));
        let new = match there {
            Some(((_, other), _)) => *other,
            None => {
                let (predecessor, parent) = (predecessor.map(ByteArray::from), parent.map(ByteArray::from));
                let manifest = repository.read_manifest(id)?;
                repository.write_manifest(&Manifest { predecessor, parent, origin: Some(ByteArray::from(known.name)), ..manifest })?
            }
        };
        now.insert(*id, new);
        in_order.push(*id);
    }
    Ok((now, in_order))
}

/// Writes marks anew that were sealed with an old key, or are of a backup whose manifest was; returns the old ones.
fn seal_marks(
    repository: &Repository,
    epoch: u16,
    manifests: &HashMap<[u8; 32], [u8; 32]>,
    known: &[String],
    go_on: &dyn Fn() -> Result<()>,
) -> Result<Vec<[u8; 32]>> {
    let mut old = Vec::new();
    let listed = ids::<Vec<[u8; 32]>>(repository.storage.names("marks/")?);
    is_whole(repository, "marks/", &listed.iter().map(mark_name).collect(), known)?;
    for id in listed {
        go_on()?;
        let name = mark_name(&id);
        let (found, mut mark) = with_epoch(repository, &name, || repository.read_mark(&id))?;
        let moved = manifests.get(&*mark.backup);
        if found == epoch && moved.is_none() {
            continue;
        }
        if let Some(backup) = moved {
            mark.backup = ByteArray::from(*backup);
        }
        repository.write_mark(&mark)?;
        old.push(id);
    }
    Ok(old)
}

/// An error when a listing lacks something known that is there.
fn is_whole(repository: &Repository, directory: &str, listed: &HashSet<String>, known: &[String]) -> Result<()> {
    let missing = known.iter().filter(|name| name.starts_with(directory) && !listed.contains(*name));
    Ok(repository.storage.are_gone(directory, missing.cloned())?)
}

/// Removes packs of an old epoch: every chunk of theirs must be in another pack.
fn remove_old_packs(repository: &Repository, epoch: u16, go_on: &dyn Fn() -> Result<()>) -> Result<()> {
    let mut old = Vec::new();
    for id in repository.listed_packs()?.keys() {
        go_on()?;
        if epoch_if_any(repository, &pack_name(id))?.is_some_and(|found| found != epoch) {
            old.push(*id);
        }
    }
    let doomed: HashSet<[u8; 32]> = old.iter().copied().collect();
    for id in &old {
        let chunks: Vec<ChunkId> = repository.whole_pack(id)?.chunks.iter().map(|c| c.id).collect();
        for chunk in chunks {
            if repository.lookup(&chunk)?.is_none_or(|at| doomed.contains(&at.pack)) {
                let text = format!("its chunk {chunk} is in no pack that was sealed anew; begin again");
                return Err(repository.damaged(&pack_name(id), text));
            }
        }
    }
    remove_packs(repository, &old)
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use zeroize::Zeroizing;

    use super::super::check::{Reading, check};
    use super::super::source_writer::SourceWriter;
    use super::super::test_world::{Told, World, manifest, noise};
    use super::super::writer::{Writer, commit};
    use super::super::{Entry, EntrySink, Kind, Mark};
    use super::*;
    use crate::crypto::locked::Locked;
    use crate::crypto::{Key, ProfileKey};

    fn profile(byte: u8) -> Profile {
        Profile::of("main", ProfileKey::Key(Arc::new(Key::new(Locked::take(&mut [byte; 32])))))
    }

    fn back_up(repository: &Arc<Repository>, sequence: u64, before: Option<[u8; 32]>) -> [u8; 32] {
        repository.sync_index().unwrap();
        let mut writer = Writer::new(repository.clone(), CancellationToken::new()).unwrap();
        let mut sink = SourceWriter::new(&mut writer, "files", "files", b"/x", None);
        sink.push(Entry { kind: Kind::Directory, ..Entry::default() }).unwrap();
        for n in 0..3u64 {
            let entry = Entry { path: vec![b'a' + n as u8], kind: Kind::File, ..Entry::default() };
            // The first file is the same in all backups.
            sink.push_small(entry, &noise(30_000, if n == 0 { 0 } else { sequence * 10 + n })).unwrap();
        }
        let source = sink.finish("{}".into()).unwrap().source;
        let flushed = writer.flush().unwrap();
        let link = before.map(ByteArray::from);
        let manifest = Manifest { sequence, predecessor: link, parent: link, ..manifest(repository, vec![source]) };
        commit(repository, &manifest, &flushed).unwrap()
    }

    /// A repository of two backups, the first of them pinned.
    fn world(profile: &Profile) -> (World, [[u8; 32]; 2]) {
        let world = World::new();
        let repository = world.opened_by("a", None, Some(profile));
        let first = back_up(&repository, 1, None);
        let second = back_up(&repository, 2, Some(first));
        repository.write_mark(&Mark::new(first, "pin", "2026-01-01T00:00:00Z".into(), "root".into())).unwrap();
        (world, [first, second])
    }

    const HOUR: Duration = Duration::from_secs(3600);

    fn alone() -> Option<Box<dyn Send>> {
        Some(Box::new(()))
    }

    /// From wherever it stands to the end.
    fn whole(world: &World, profile: &Profile, told: Option<Told>) -> Result<()> {
        let repository = world.opened_by("a", told.clone(), Some(profile));
        let profiles = [profile.clone()];
        assert_eq!(begin(&repository, &profiles, false)?, Begun::Now { dropped: Vec::new() });
        let repository = world.opened_by("a", told, Some(profile));
        let mut sealer = PackSealer::default();
        while !sealer.some(&repository, HOUR, &alone, &|_| (), &CancellationToken::new())? {}
        finish(&repository, &profiles, false, &[], &|_| (), &|| Ok(()))?;
        Ok(())
    }

    /// As somebody sees it who knows nothing: both backups are whole and known by their old ids, and the pin is on the first.
    fn nothing_is_lost(world: &World, profile: &Profile, known: [[u8; 32]; 2], when: &str) -> Arc<Repository> {
        let _ = std::fs::remove_dir_all(world.path().join("c"));
        let repository = world.opened_by("c", None, Some(profile));
        let report = check(&repository, Reading::Percent(100), &|_, _, _| {}, &CancellationToken::new()).unwrap();
        assert!(report.problems.is_empty() && report.hurt.is_empty(), "{when}: {report:?}");
        let mut found = HashMap::new();
        for id in repository.listed_backups().unwrap() {
            found.insert(id, repository.read_manifest(&id).unwrap().known_as(&id));
        }
        assert_eq!(found.values().copied().collect::<HashSet<_>>(), HashSet::from(known), "{when}");
        let pins: HashSet<[u8; 32]> = repository
            .listed_marks()
            .unwrap()
            .iter()
            .filter_map(|id| found.get(&*repository.read_mark(id).unwrap().backup).copied())
            .collect();
        assert_eq!(pins, HashSet::from([known[0]]), "{when}");
        repository
    }

    #[test]
    fn afterwards_the_old_key_opens_nothing() {
        let profile = profile(1);
        let (world, known) = world(&profile);
        let old = world.opened_by("b", None, Some(&profile));
        whole(&world, &profile, None).unwrap();
        let new = nothing_is_lost(&world, &profile, known, "after it");
        assert_eq!((new.epoch(), new.is_changing_keys()), (1, false));
        for directory in ["packs/", "index/", "backups/", "marks/"] {
            let listed = new.storage.list(directory).unwrap();
            assert!(!listed.is_empty(), "{directory}");
            for object in listed {
                let header = ObjectHeader::parse(&new.storage.range(&object.name, 0, 64).unwrap(), &new.id).unwrap();
                assert!(matches!(old.keys.cipher(&header), Err(CryptoError::Epoch { found: 1, known: 0 })), "{}", object.name);
            }
        }
        // The chain is whole, and the next backup goes on from there.
        let second = new.listed_backups().unwrap().into_iter().find(|id| new.read_manifest(id).unwrap().sequence == 2).unwrap();
        let chain = new.read_manifest(&second).unwrap();
        assert_eq!(chain.predecessor, chain.parent);
        assert_eq!(new.read_manifest(&chain.predecessor.unwrap()).unwrap().sequence, 1);
        let packs = new.listed_packs().unwrap().len();
        back_up(&new, 3, Some(second));
        assert_eq!(new.listed_packs().unwrap().len(), packs + 2, "what was there is not stored again");
        // And once more.
        whole(&world, &profile, None).unwrap();
        assert_eq!(world.opened_by("d", None, Some(&profile)).epoch(), 2);
    }

    #[test]
    fn whatever_is_interrupted_goes_on() {
        let profile = profile(1);
        let mut points = 0;
        for at in 0.. {
            let (world, known) = world(&profile);
            let count = Arc::new(AtomicUsize::new(0));
            let counter = count.clone();
            let told: Told = Arc::new(move || assert!(counter.fetch_add(1, Ordering::Relaxed) != at, "killed"));
            let ended = catch_unwind(AssertUnwindSafe(|| whole(&world, &profile, Some(told))));
            if let Ok(done) = ended {
                done.unwrap();
                assert!(at > 40, "only {at} storage operations");
                break;
            }
            points += 1;
            nothing_is_lost(&world, &profile, known, &format!("killed before operation {at}"));
            // Backups go on meanwhile.
            let between = world.opened_by("a", None, Some(&profile));
            let newest = between.listed_backups().unwrap().into_iter().find(|id| between.read_manifest(id).unwrap().sequence == 2).unwrap();
            let third = back_up(&between, 3, Some(newest));
            drop(between);
            whole(&world, &profile, None).unwrap();
            let _ = std::fs::remove_dir_all(world.path().join("c"));
            let repository = world.opened_by("c", None, Some(&profile));
            let report = check(&repository, Reading::Percent(100), &|_, _, _| {}, &CancellationToken::new()).unwrap();
            assert!(report.problems.is_empty() && report.hurt.is_empty(), "killed before {at}, then ended: {report:?}");
            assert_eq!(report.backups, 3, "killed before {at}");
            let names: HashSet<[u8; 32]> =
                repository.listed_backups().unwrap().iter().map(|id| repository.read_manifest(id).unwrap().known_as(id)).collect();
            assert_eq!(names, HashSet::from([known[0], known[1], third]), "killed before {at}");
            assert!(!repository.is_changing_keys());
            let slots = repository.storage.names("keys/").unwrap();
            assert_eq!(slots.len(), 1, "{slots:?}");
        }
        println!("killed before each of {points} storage operations: nothing lost");
    }

    #[test]
    fn slots_of_nobody_are_dropped_only_when_told() {
        let (mine, other) = (profile(1), Profile { name: "other".into(), ..profile(2) });
        let (world, _) = world(&mine);
        let repository = world.opened_by("a", None, Some(&mine));
        repository.put_slot("other", &other.key, &repository.keys).unwrap();
        let Begun::WouldDrop(foreign) = begin(&repository, std::slice::from_ref(&mine), false).unwrap() else { panic!("dropped") };
        assert_eq!(foreign.iter().map(|s| s.profile.as_str()).collect::<Vec<_>>(), ["other"]);
        assert!(!world.opened_by("b", None, Some(&other)).is_changing_keys(), "nothing was changed");
        // With its key it goes on opening.
        assert_eq!(begin(&repository, &[mine.clone(), other.clone()], false).unwrap(), Begun::Now { dropped: Vec::new() });
        assert!(world.opened_by("b", None, Some(&other)).is_changing_keys());
        let repository = world.opened_by("a", None, Some(&mine));
        let Begun::Now { dropped } = begin(&repository, &[mine], true).unwrap() else { panic!("refused") };
        assert_eq!(dropped.len(), 1);
        let passphrase = ProfileKey::Passphrase(Arc::new(Zeroizing::new("not a passphrase of it".into())));
        for wrong in [other, Profile::of("main", passphrase)] {
            assert!(world.try_open("b", None, Some(&wrong)).is_err());
        }
    }
}
