//! The write pipeline: chunks in, durable packs out.
//!
//! The thread that captures names each chunk (keyed BLAKE3) and drops what the repository has. Worker threads compress and
//! seal into the open pack; storing threads open every chunk of a full pack again, prove it, and publish the pack.
//! The queue is bounded in bytes, so memory does not depend on what is captured.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::entry::{ChunkId, MAX_CHUNK_BYTES};
use super::error::{RepositoryError, Result};
use super::index::{INDEX_CHUNKS, Index, IndexedPack};
use super::manifest::Manifest;
use super::open::{Repository, pack_name};
use super::pack::{BuiltPack, PACK_TARGET_BYTES, PackBuilder, chunk_id};
use super::payload::Compressor;
use crate::crypto::ObjectKind;

/// Chunks of this run that are remembered as stored, so that the local index is not asked again.
const MEMO_CHUNKS: usize = 200_000;

/// Writes chunks, then the index and the manifest.
pub struct Writer {
    shared: Arc<Shared>,
    jobs: Option<Sender<Job>>,
    packs: Option<Sender<BuiltPack>>,
    workers: Vec<JoinHandle<()>>,
    storers: Vec<JoinHandle<()>>,
    memo: HashMap<ChunkId, u32>,
}

struct Job {
    id: ChunkId,
    raw: Vec<u8>,
    kind: ObjectKind,
}

struct Shared {
    repository: Arc<Repository>,
    cancel: CancellationToken,
    queued: Mutex<usize>,
    room: Condvar,
    data: Mutex<Option<PackBuilder>>,
    meta: Mutex<Option<PackBuilder>>,
    /// Chunks on their way into a durable pack, with their lengths.
    pending: Mutex<HashMap<ChunkId, u32>>,
    error: Mutex<Option<RepositoryError>>,
    failed: AtomicBool,
    added: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Writer {
    /// Starts the threads. The caller holds the lease and has synced the index.
    pub fn new(repository: Arc<Repository>, cancel: CancellationToken) -> Result<Self> {
        let shared = Arc::new(Shared {
            repository,
            cancel,
            queued: Mutex::new(0),
            room: Condvar::new(),
            data: Mutex::new(None),
            meta: Mutex::new(None),
            pending: Mutex::new(HashMap::new()),
            error: Mutex::new(None),
            failed: AtomicBool::new(false),
            added: AtomicU64::new(0),
        });
        let (jobs, job_queue) = unbounded::<Job>();
        let (packs, pack_queue) = bounded::<BuiltPack>(1);
        let threads = std::thread::available_parallelism().map_or(2, usize::from).clamp(1, 8);
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.into())
                .spawn(work)
                .map_err(|e| RepositoryError::Other(format!("cannot start a thread: {e}")))
        };
        let mut writer = Self {
            shared: shared.clone(),
            jobs: Some(jobs),
            packs: Some(packs.clone()),
            workers: Vec::new(),
            storers: Vec::new(),
            memo: HashMap::new(),
        };
        for _ in 0..threads {
            let (shared, job_queue, packs) = (shared.clone(), job_queue.clone(), packs.clone());
            writer.workers.push(spawn("compress", Box::new(move || shared.clone().guard(|| shared.compress(&job_queue, &packs))))?);
        }
        for _ in 0..2 {
            let (shared, pack_queue) = (shared.clone(), pack_queue.clone());
            writer.storers.push(spawn("store", Box::new(move || shared.clone().guard(|| shared.store_packs(&pack_queue))))?);
        }
        Ok(writer)
    }

    /// Stores a chunk unless the repository has it; returns its id. Blocks while the queue is full.
    pub fn store(&mut self, raw: Vec<u8>, kind: ObjectKind) -> Result<ChunkId> {
        if raw.len() > MAX_CHUNK_BYTES {
            return Err(RepositoryError::Other(format!("a chunk of {} bytes is over the limit of {MAX_CHUNK_BYTES}", raw.len())));
        }
        self.shared.go_on()?;
        let id = chunk_id(&self.shared.repository.chunk_key, &raw);
        if self.has(&id)?.is_some() {
            return Ok(id);
        }
        let len = raw.len();
        lock(&self.shared.pending).insert(id, len as u32);
        self.remember(id, len as u32);
        let mut queued = lock(&self.shared.queued);
        let limit = self.shared.repository.queue_bytes();
        while *queued > 0 && *queued + len > limit {
            queued = self.shared.room.wait(queued).unwrap_or_else(PoisonError::into_inner);
            self.shared.go_on()?;
        }
        *queued += len;
        drop(queued);
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(Job { id, raw, kind }).is_ok());
        match sent {
            Some(true) => Ok(id),
            _ => Err(self.shared.take_error()),
        }
    }

    /// The plaintext length of a chunk that is stored or about to be.
    pub fn has(&mut self, id: &ChunkId) -> Result<Option<u32>> {
        if let Some(len) = self.memo.get(id) {
            return Ok(Some(*len));
        }
        let mut len = lock(&self.shared.pending).get(id).copied();
        if len.is_none() {
            len = self.shared.repository.lookup(id)?.map(|l| l.len);
        }
        if let Some(len) = len {
            self.remember(*id, len);
        }
        Ok(len)
    }

    fn remember(&mut self, id: ChunkId, len: u32) {
        if self.memo.len() >= MEMO_CHUNKS {
            self.memo.clear();
        }
        self.memo.insert(id, len);
    }

    /// The plaintext of a chunk of the repository; one of this run that is not durable yet cannot be read back.
    pub fn fetch(&mut self, id: &ChunkId) -> Result<Vec<u8>> {
        self.shared.go_on()?;
        self.shared.repository.read_chunk(id)
    }

    /// Sealed bytes stored so far.
    pub fn added_bytes(&self) -> u64 {
        self.shared.added.load(Ordering::Relaxed)
    }

    pub fn repository(&self) -> &Arc<Repository> {
        &self.shared.repository
    }

    pub fn check(&self) -> Result<()> {
        self.shared.go_on()
    }

    /// Makes everything durable: the open packs, then an index of all packs that have none.
    pub fn flush(mut self) -> Result<Flushed> {
        self.join();
        self.shared.go_on()?;
        if !lock(&self.shared.pending).is_empty() {
            return Err(RepositoryError::Other("chunks were lost on their way to the storage; this is a bug".into()));
        }
        write_missing_index(&self.shared.repository)?;
        Ok(Flushed { added_bytes: self.added_bytes() })
    }

    /// Lets the queue run empty, closes the open packs, and waits until all is stored (or has failed).
    fn join(&mut self) {
        self.jobs = None;
        for thread in self.workers.drain(..) {
            // Panics were caught inside and made the error.
            let _ = thread.join();
        }
        if let Some(packs) = self.packs.take() {
            for (slot, kind) in [(&self.shared.data, ObjectKind::DataPack), (&self.shared.meta, ObjectKind::MetaPack)] {
                match lock(slot).take().map(|pack| pack.finish(kind)) {
                    Some(Ok(pack)) => drop(packs.send(pack)),
                    Some(Err(e)) => self.shared.fail(RepositoryError::Other(format!("a pack could not be closed: {e}"))),
                    None => {}
                }
            }
        }
        for thread in self.storers.drain(..) {
            let _ = thread.join();
        }
    }
}

/// What a writer stored.
pub struct Flushed {
    pub added_bytes: u64,
}

/// Lists packs that stand in no index object in new ones.
pub fn write_missing_index(repository: &Repository) -> Result<()> {
    let mut index = Index::default();
    let mut chunks = 0;
    for id in repository.local.unindexed()? {
        let pack = repository.whole_pack(&id)?;
        chunks += pack.chunks.len();
        index.packs.push(pack);
        if chunks >= INDEX_CHUNKS {
            publish(repository, &std::mem::take(&mut index))?;
            chunks = 0;
        }
    }
    if !index.packs.is_empty() {
        publish(repository, &index)?;
    }
    Ok(())
}

fn publish(repository: &Repository, index: &Index) -> Result<()> {
    let id = repository.write_index(index)?;
    repository.local.mark_indexed(&id, &index.packs.iter().map(|p| p.id).collect::<Vec<_>>())
}

/// Commits a backup: after this it is there for good.
pub fn commit(repository: &Repository, manifest: &Manifest) -> Result<[u8; 32]> {
    repository.write_manifest(manifest)
}

impl Drop for Writer {
    /// A run that ends early leaves its full packs to the next one.
    fn drop(&mut self) {
        self.join();
    }
}

impl Shared {
    fn go_on(&self) -> Result<()> {
        if self.failed.load(Ordering::Acquire) {
            return Err(self.take_error());
        }
        match self.cancel.is_cancelled() {
            true => Err(RepositoryError::Cancelled),
            false => Ok(()),
        }
    }

    fn take_error(&self) -> RepositoryError {
        lock(&self.error).take().unwrap_or_else(|| RepositoryError::Other("the writer failed before".into()))
    }

    fn fail(&self, error: RepositoryError) {
        let mut slot = lock(&self.error);
        if slot.is_none() && !self.failed.load(Ordering::Acquire) {
            *slot = Some(error);
        }
        self.failed.store(true, Ordering::Release);
        self.room.notify_all();
    }

    /// Runs a thread's work; a panic or an error ends the whole pipeline instead of hanging it.
    fn guard(&self, work: impl FnOnce() -> Result<()>) {
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
            Ok(Ok(())) => {}
            Ok(Err(e)) => self.fail(e),
            Err(_) => self.fail(RepositoryError::Other("a writer thread panicked".into())),
        }
    }

    fn compress(&self, jobs: &Receiver<Job>, packs: &Sender<BuiltPack>) -> Result<()> {
        let other = |e: &dyn std::fmt::Display| RepositoryError::Other(format!("a chunk could not be compressed and sealed: {e}"));
        let mut compressor = Compressor::new(self.repository.compression).map_err(|e| other(&e))?;
        for job in jobs {
            if self.failed.load(Ordering::Acquire) {
                self.release(job.raw.len());
                continue;
            }
            let payload = compressor.compress(&job.raw).map_err(|e| other(&e))?;
            let full = {
                let mut open = lock(if job.kind == ObjectKind::MetaPack { &self.meta } else { &self.data });
                if open.is_none() {
                    *open = Some(PackBuilder::new(&self.repository.master, &self.repository.id, job.kind).map_err(|e| other(&e))?);
                }
                match open.as_mut() {
                    Some(pack) => {
                        pack.add(job.id, &payload, job.raw.len() as u32).map_err(|e| other(&e))?;
                        if pack.len() >= PACK_TARGET_BYTES { open.take() } else { None }
                    }
                    None => None,
                }
            };
            self.release(job.raw.len());
            if let Some(pack) = full {
                let _ = packs.send(pack.finish(job.kind).map_err(|e| other(&e))?);
            }
        }
        Ok(())
    }

    fn release(&self, len: usize) {
        let mut queued = lock(&self.queued);
        *queued = queued.saturating_sub(len);
        drop(queued);
        self.room.notify_all();
    }

    fn store_packs(&self, packs: &Receiver<BuiltPack>) -> Result<()> {
        for pack in packs {
            if !self.failed.load(Ordering::Acquire) {
                self.store_pack(pack)?;
            }
        }
        Ok(())
    }

    /// Proves a pack by opening what is about to be stored, publishes it, and takes it up into the local index.
    fn store_pack(&self, pack: BuiltPack) -> Result<()> {
        let repository = &self.repository;
        repository.prove(&pack).map_err(|e| {
            RepositoryError::Other(format!("what was sealed does not open to what went in ({e}); nothing of it was stored"))
        })?;
        let id: [u8; 32] = Sha256::digest(&pack.bytes).into();
        let size = pack.bytes.len() as u64;
        repository.storage.put_new(&pack_name(&id), pack.bytes)?;
        repository.local.add_unindexed(&IndexedPack { id, size, kind: pack.kind, chunks: pack.chunks.clone() })?;
        self.added.fetch_add(size, Ordering::Relaxed);
        let mut pending = lock(&self.pending);
        for c in &pack.chunks {
            pending.remove(&c.id);
        }
        Ok(())
    }
}
