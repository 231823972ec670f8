//! Check: proves that every backup can be restored, or names what is damaged and which backups it hurts.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::entry::ChunkId;
use super::error::{RepositoryError, Result};
use super::manifest::Manifest;
use super::open::{Repository, manifest_name, pack_name};
use super::pack::{self, ChunkOpener, MAX_PACK_BYTES, PackedChunk, SealedChunk, contents};
use super::page;
use super::reader::{SourceReader, chunks_of};
use crate::crypto::{CryptoError, ObjectHeader, ObjectKind};
use crate::storage::direct::ReadBuffer;

/// What a check found.
#[derive(Debug, Default)]
pub struct CheckReport {
    pub backups: u64,
    pub packs: u64,
    pub packs_read: u64,
    /// Of those read: write-only ones that no key opened, so that they were compared with their names alone.
    pub packs_closed: u64,
    pub bytes_read: u64,
    /// Damaged or missing objects, each with what is wrong.
    pub problems: Vec<String>,
    /// How many of these are packs and index objects, which the next prune replaces when no backup is hurt.
    pub replaceable: usize,
    /// Backups that cannot be restored whole: id (hexadecimal) and the first paths hurt.
    pub hurt: BTreeMap<String, Vec<String>>,
    /// Sequence numbers that two backups carry.
    pub forked: Vec<u64>,
}

/// Tells how far it is: packs done, packs to do, bytes read.
pub type Progress<'a> = &'a (dyn Fn(usize, usize, u64) + Sync);

/// Paths named for each hurt backup.
const MAX_PATHS: usize = 20;

/// What a check reads of the packs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reading {
    /// So many percent of them (0 to 100), by chance, and the whole structure.
    Percent(u32),
    /// The next ones of a rolling check: of those not read since `before` at most this share of all packs (seconds since 1970, and `now` too).
    /// The structure is looked at only when something is wrong.
    Next { before: i64, now: i64, share: f64 },
}

/// Checks the structure, and packs byte by byte.
pub fn check(repository: &Arc<Repository>, reading: Reading, progress: Progress<'_>, cancel: &CancellationToken) -> Result<CheckReport> {
    let mut report = CheckReport { problems: repository.sync_index()?, ..CheckReport::default() };
    let packs = repository.local.packs(false)?;
    report.packs = packs.len() as u64;
    let sample = match reading {
        Reading::Percent(percent) => chosen(&packs, percent)?,
        Reading::Next { before, now, share } => repository.local.unread(before, now, (packs.len() as f64 * share).ceil() as usize)?,
    };
    let bad = read_packs(repository, &sample, progress, cancel, &mut report)?;
    if matches!(reading, Reading::Next { .. }) && bad.is_empty() && report.problems.is_empty() {
        return Ok(report);
    }
    // The local index knows what they held when they were read; here they are read again.
    for id in repository.listed_indexes()? {
        match repository.read_index(&id) {
            Err(e @ (RepositoryError::Storage(_) | RepositoryError::Cancelled)) => return Err(e),
            Err(e) => {
                // From now on it is none of those that were read, and the next prune replaces it.
                if repository.is_damaged_index(&id)? {
                    repository.local.unload(&[id])?;
                    report.replaceable += 1;
                }
                if !report.problems.contains(&e.to_string()) {
                    report.problems.push(e.to_string());
                }
            }
            Ok(_) => {}
        }
    }
    let mut manifests = Vec::new();
    for id in repository.listed_backups()? {
        match repository.read_manifest(&id) {
            Ok(manifest) => manifests.push((id, manifest)),
            Err(e @ (RepositoryError::Storage(_) | RepositoryError::Cancelled)) => return Err(e),
            Err(e) => {
                report.problems.push(e.to_string());
                report.hurt.insert(HEXLOWER.encode(&id), vec!["(the whole backup: its manifest does not open)".into()]);
            }
        }
    }
    report.backups = manifests.len() as u64 + report.hurt.len() as u64;
    // One that is just being sealed anew is there twice, under one name.
    let mut sequences: HashMap<u64, [u8; 32]> = HashMap::new();
    for (id, m) in &manifests {
        if *sequences.entry(m.sequence).or_insert_with(|| m.known_as(id)) != m.known_as(id) {
            report.forked.push(m.sequence);
        }
    }
    let mut walker = Walker { repository, bad, pages: HashMap::new(), cancel };
    for (id, manifest) in &manifests {
        let paths = walker.hurt_paths(manifest)?;
        if !paths.is_empty() {
            report.hurt.insert(HEXLOWER.encode(id), paths);
        }
    }
    for (id, _) in manifests.iter().filter(|(_, m)| report.forked.contains(&m.sequence)) {
        report.problems.push(format!("{}: {}: another backup has the same sequence number", repository.location(), manifest_name(id)));
    }
    Ok(report)
}

/// Reads these packs whole; returns what is wrong with them.
pub fn read_these(repository: &Arc<Repository>, packs: &[([u8; 32], u64)], cancel: &CancellationToken) -> Result<Vec<String>> {
    let mut report = CheckReport::default();
    read_packs(repository, packs, &|_, _, _| (), cancel, &mut report)?;
    Ok(report.problems)
}

/// So many percent of the packs, by chance.
fn chosen(packs: &[([u8; 32], u64)], percent: u32) -> Result<Vec<([u8; 32], u64)>> {
    let wanted = (packs.len() * percent.min(100) as usize).div_ceil(100);
    let mut sample: Vec<_> = packs.to_vec();
    if wanted < sample.len() {
        let salt: [u8; 8] = crate::crypto::random().map_err(|e| RepositoryError::Other(e.to_string()))?;
        sample.sort_by_cached_key(|(id, _)| *blake3::hash(&[&salt[..], id].concat()).as_bytes());
        sample.truncate(wanted);
    }
    Ok(sample)
}

/// What threads that read packs found.
#[derive(Default)]
struct Found {
    problems: Vec<String>,
    bytes: u64,
    good: Vec<[u8; 32]>,
    closed: u64,
    /// With the chunks that do not open.
    damaged: Vec<([u8; 32], Vec<ChunkId>)>,
}

/// Reads packs whole; returns the chunks that cannot be had.
fn read_packs(
    repository: &Repository,
    sample: &[([u8; 32], u64)],
    progress: Progress<'_>,
    cancel: &CancellationToken,
    report: &mut CheckReport,
) -> Result<HashSet<ChunkId>> {
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Found::default());
    let failed = Mutex::new(None::<RepositoryError>);
    // More than there are processors: some of them wait for the storage.
    let threads = std::thread::available_parallelism().map_or(4, |n| n.get() * 2).clamp(2, 4);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut tools = Tools::default();
                while let Some((id, size)) = sample.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if cancel.is_cancelled() || failed.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
                        return;
                    }
                    let mut read = read_pack(repository, id, &mut tools);
                    if matches!(read, Ok((Err(_), _))) && repository.storage.is_remote() {
                        // What came damaged, or was not found, may lie there whole.
                        repository.forget_cipher(id);
                        read = read_pack(repository, id, &mut tools);
                    }
                    match read {
                        Ok((verdict, is_closed)) => {
                            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                            match verdict {
                                Ok(()) => found.good.push(*id),
                                Err((problem, chunks)) => {
                                    found.problems.push(problem);
                                    found.damaged.push((*id, chunks));
                                }
                            }
                            found.bytes += size;
                            found.closed += u64::from(is_closed);
                            progress(found.good.len() + found.damaged.len(), sample.len(), found.bytes);
                        }
                        Err(e) => *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(e),
                    }
                }
            });
        }
    });
    if let Some(e) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(e);
    }
    if cancel.is_cancelled() {
        return Err(RepositoryError::Cancelled);
    }
    let Found { problems, bytes, good, closed, damaged } = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.packs_read = (good.len() + damaged.len()) as u64;
    report.packs_closed = closed;
    repository.local.mark_read(&good, jiff::Timestamp::now().as_second())?;
    for pack in good {
        if repository.local.unmark_lost(&pack)? {
            let whole = repository.pack_from_footer(&pack, None)?;
            repository.local.add_unindexed(&whole)?;
        }
    }
    let mut bad = Vec::new();
    for (pack, chunks) in damaged {
        repository.local.mark_lost(&pack, &chunks)?;
        bad.extend(chunks);
    }
    // What was stored anew since is not lost.
    let kinds = repository.local.kinds(&bad)?;
    report.replaceable += problems.len();
    report.problems.extend(problems);
    report.bytes_read = bytes;
    Ok(bad.into_iter().zip(kinds).filter(|(_, kind)| kind.is_none()).map(|(id, _)| id).collect())
}

/// What a thread that proves packs uses again for each.
#[derive(Default)]
struct Tools {
    pack: ReadBuffer,
    opener: ChunkOpener,
    raw: Vec<u8>,
}

type Verdict = std::result::Result<(), (String, Vec<ChunkId>)>;

/// Proves one pack; true when no key opens it. The outer error is a storage that does not answer; the inner one damage, with the chunks lost.
fn read_pack(repository: &Repository, id: &[u8; 32], tools: &mut Tools) -> Result<(Verdict, bool)> {
    let name = pack_name(id);
    // What should be in it; empty when the local index cannot tell.
    let promised: Vec<PackedChunk> = repository.local.pack(id)?.map(|p| p.chunks).unwrap_or_default();
    let Tools { pack: buffer, opener, raw } = tools;
    match repository.storage.get_into(&name, MAX_PACK_BYTES, buffer) {
        Ok(()) => {}
        Err(crate::storage::StorageError::NotFound { .. }) => {
            let missing = format!("{}: {name}: it is missing", repository.location());
            return Ok((Err((missing, promised.iter().map(|c| c.id).collect())), false));
        }
        Err(e) => return Err(e.into()),
    }
    let bytes = &buffer[..];
    let header = ObjectHeader::parse(bytes, &repository.id);
    let found = contents(&repository.keys, &repository.id, bytes).map(|c| c.chunks).ok();
    let chunks = found.as_ref().unwrap_or(&promised);
    let mut lost = Vec::new();
    let cipher = header.and_then(|header| pack::cipher(&repository.keys, &header, bytes, chunks));
    // Without the private key the chunks cannot be opened; that the bytes are those that were written is told by their SHA-256.
    let is_closed = matches!(cipher, Err(CryptoError::NeedsPrivateKey(_))) && found.as_ref().is_some_and(|found| *found == promised);
    match cipher {
        _ if is_closed => {}
        Ok(cipher) if !chunks.is_empty() => {
            for (ordinal, c) in chunks.iter().enumerate() {
                let sealed = bytes.get(c.offset as usize..c.offset as usize + c.sealed_len as usize).unwrap_or_default();
                let sealed = SealedChunk { ordinal: ordinal as u64, id: c.id, len: c.len, bytes: sealed };
                if opener.open_into(&cipher, &repository.chunk_key, &sealed, raw).is_err() {
                    lost.push(c.id);
                }
            }
        }
        // Nobody can read it, and the local index has but some of its chunks here.
        _ if promised.is_empty() => lost.extend(repository.local.chunks_in(id)?),
        _ => lost.extend(promised.iter().map(|c| c.id)),
    }
    // Header, every chunk, footer and its place are authenticated: when all of it opened, and it is what was promised under this
    // name, then no byte is another one, and the slower SHA-256 would say nothing new.
    if !is_closed && lost.is_empty() && found.as_ref().is_some_and(|found| !found.is_empty() && *found == promised) {
        return Ok((Ok(()), is_closed));
    }
    let whole = <[u8; 32]>::from(Sha256::digest(bytes)) == *id;
    // An exchanged pack is whole in itself, but not the one that was promised here.
    if !whole {
        let present: HashSet<ChunkId> = if is_closed { HashSet::new() } else { chunks.iter().map(|c| c.id).collect() };
        lost.extend(promised.iter().map(|c| c.id).filter(|c| !present.contains(c)));
    }
    if whole && lost.is_empty() {
        return Ok((Ok(()), is_closed));
    }
    let what =
        if whole { "it holds chunks that do not open" } else { "its SHA-256 is not its name: the bytes are damaged, cut off or exchanged" };
    let problem = format!("{}: {name}: {what} ({} of {} chunks lost)", repository.location(), lost.len(), chunks.len());
    Ok((Err((problem, lost)), is_closed))
}

/// Finds out which entries of a backup cannot be had. Pages that several backups share are looked at once.
struct Walker<'a> {
    repository: &'a Arc<Repository>,
    bad: HashSet<ChunkId>,
    /// Pages seen: the paths in them that are hurt (mostly none).
    pages: HashMap<ChunkId, Vec<String>>,
    cancel: &'a CancellationToken,
}

impl Walker<'_> {
    fn hurt_paths(&mut self, manifest: &Manifest) -> Result<Vec<String>> {
        let mut paths = BTreeSet::new();
        for source in &manifest.sources {
            for page in &source.pages {
                if self.cancel.is_cancelled() {
                    return Err(RepositoryError::Cancelled);
                }
                let id = ChunkId(*page.chunk);
                if !self.pages.contains_key(&id) {
                    let hurt = self.look_at(&id, &page.first_path)?;
                    self.pages.insert(id, hurt);
                }
                for path in self.pages.get(&id).into_iter().flatten() {
                    if paths.len() < MAX_PATHS {
                        paths.insert(format!("{}/{path}", source.name));
                    }
                }
            }
        }
        Ok(paths.into_iter().collect())
    }

    fn look_at(&self, id: &ChunkId, first_path: &[u8]) -> Result<Vec<String>> {
        let all = || vec![format!("{} and the entries after it", String::from_utf8_lossy(first_path))];
        let Some(bytes) = self.read(id)? else { return Ok(all()) };
        // The table tells quickly whether anything is wrong; mostly nothing is.
        let Ok(references) = page::references(&bytes) else { return Ok(all()) };
        let mut suspicious = false;
        for (chunk, kind) in references.iter().zip(self.repository.local.kinds(&references)?) {
            // A list's own references are looked at through the entry.
            suspicious |= kind != Some(ObjectKind::DataPack) || self.bad.contains(chunk);
        }
        if !suspicious {
            return Ok(Vec::new());
        }
        let Ok(entries) = page::decode_page(&bytes) else { return Ok(all()) };
        let reader = SourceReader::empty(self.repository.clone());
        let mut hurt = Vec::new();
        for paged in entries {
            let path = String::from_utf8_lossy(&paged.entry.path).into_owned();
            let entry = match reader.whole(paged) {
                Ok(entry) => entry,
                Err(e @ RepositoryError::Storage(_)) => return Err(e),
                Err(_) => {
                    hurt.push(path);
                    continue;
                }
            };
            let chunks = chunks_of(&entry.content.segments);
            let kinds = self.repository.local.kinds(&chunks)?;
            // What the local index lacks may be in the repository all the same.
            let is_there = |chunk: &ChunkId| self.repository.locate(chunk).is_ok();
            let lost = chunks.iter().zip(kinds).any(|(chunk, kind)| self.bad.contains(chunk) || kind.is_none() && !is_there(chunk));
            if lost {
                hurt.push(path);
            }
        }
        Ok(hurt)
    }

    /// A metadata chunk; None when it is damaged.
    fn read(&self, id: &ChunkId) -> Result<Option<Vec<u8>>> {
        match self.repository.read_chunk(id) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(RepositoryError::Storage(crate::storage::StorageError::NotFound { .. })) => Ok(None),
            Err(e @ RepositoryError::Storage(_)) => Err(e),
            Err(_) => Ok(None),
        }
    }
}
