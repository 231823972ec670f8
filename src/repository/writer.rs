//! The write pipeline: chunks in, durable packs out.
//!
//! The thread that captures names each chunk (keyed BLAKE3) and drops what the repository has. Worker threads compress,
//! seal into the open pack, open what they sealed and compare it with what went in; storing threads publish full packs.
//! The queue is bounded in bytes, so memory does not depend on what is captured; the memory of chunks and packs is used
//! again, for clearing new pages cost the kernel as much as encrypting them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use tokio_util::sync::CancellationToken;

use super::entry::{ChunkId, MAX_CHUNK_BYTES};
use super::error::{RepositoryError, Result};
use super::index::{INDEX_CHUNKS, Index};
use super::lock;
use super::manifest::Manifest;
use super::open::{Repository, ids, pack_name};
use super::pack::{BuiltPack, PACK_TARGET_BYTES, PackBuilder, PackMemory, Place, Prover, chunk_id};
use super::page;
use super::payload::{self, Compressor, Texture};
use crate::config::Compression;
use crate::crypto::{CryptoError, ObjectKind};

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
    /// What was condemned when it began.
    condemned: BTreeMap<[u8; 32], i64>,
    /// How often something went from the local index until then.
    went: i64,
}

struct Job {
    id: ChunkId,
    raw: Vec<u8>,
    kind: ObjectKind,
    texture: Texture,
    /// Its payload, where it was compressed before.
    payload: Option<Vec<u8>>,
    /// What it takes of the queue.
    bytes: usize,
}

/// A pack that threads are filling; `closed` when nobody may reserve a place in it any more.
struct OpenPack {
    /// None when it was taken to be stored.
    builder: Option<PackBuilder>,
    closed: bool,
}

/// Memory of chunks that were compressed, for the next ones: by capacity, in steps of [`ChunkMemory::STEP`].
#[derive(Default)]
struct ChunkMemory {
    free: [Vec<Vec<u8>>; MAX_CHUNK_BYTES / ChunkMemory::STEP],
    bytes: usize,
    /// Bytes kept at most.
    most: usize,
}

impl ChunkMemory {
    const STEP: usize = 256 << 10;
    const MOST: usize = 16 << 20;

    /// `queue`: bytes of chunks that wait at most.
    fn new(queue: usize) -> Self {
        Self { most: queue.min(Self::MOST), ..Self::default() }
    }

    /// What memory for a chunk of `len` bytes takes.
    fn capacity(len: usize) -> usize {
        len.max(1).next_multiple_of(Self::STEP)
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let capacity = Self::capacity(len);
        match self.free.get_mut(capacity / Self::STEP - 1).and_then(Vec::pop) {
            Some(memory) => {
                self.bytes -= memory.capacity();
                memory
            }
            None => Vec::with_capacity(capacity),
        }
    }

    fn give(&mut self, mut memory: Vec<u8>) {
        memory.clear();
        let capacity = memory.capacity();
        if capacity.is_multiple_of(Self::STEP)
            && self.bytes + capacity <= self.most
            && let Some(free) = (capacity / Self::STEP).checked_sub(1).and_then(|class| self.free.get_mut(class))
        {
            free.push(memory);
            self.bytes += capacity;
        }
    }
}

struct Shared {
    repository: Arc<Repository>,
    cancel: CancellationToken,
    queued: Mutex<usize>,
    room: Condvar,
    data: Mutex<Option<Arc<Mutex<OpenPack>>>>,
    meta: Mutex<Option<Arc<Mutex<OpenPack>>>>,
    pack_memory: PackMemory,
    chunk_memory: Mutex<ChunkMemory>,
    /// Chunks on their way into a durable pack, with their lengths.
    pending: Mutex<HashMap<ChunkId, u32>>,
    error: Mutex<Option<RepositoryError>>,
    failed: AtomicBool,
    added: AtomicU64,
    /// Plaintext of what was new.
    new: AtomicU64,
}

impl Writer {
    /// Starts the threads. The caller holds the lease and has synced the index.
    pub fn new(repository: Arc<Repository>, cancel: CancellationToken) -> Result<Self> {
        let chunk_memory = ChunkMemory::new(repository.queue_bytes());
        let shared = Arc::new(Shared {
            repository,
            cancel,
            queued: Mutex::new(0),
            room: Condvar::new(),
            data: Mutex::new(None),
            meta: Mutex::new(None),
            pack_memory: PackMemory::default(),
            chunk_memory: Mutex::new(chunk_memory),
            pending: Mutex::new(HashMap::new()),
            error: Mutex::new(None),
            failed: AtomicBool::new(false),
            added: AtomicU64::new(0),
            new: AtomicU64::new(0),
        });
        let condemned = shared.repository.local.condemned()?;
        let went = shared.repository.local.went()?;
        let (jobs, job_queue) = unbounded::<Job>();
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
            packs: None,
            workers: Vec::new(),
            storers: Vec::new(),
            memo: HashMap::new(),
            condemned,
            went,
        };
        let ahead = shared.repository.packs_ahead();
        // Made after the writer, and so gone before it: where a thread cannot be started it waits for those that were, and these for more packs as long as anybody can send some.
        let (packs, pack_queue) = bounded::<BuiltPack>(ahead - 1);
        writer.packs = Some(packs.clone());
        for _ in 0..threads {
            let (shared, job_queue, packs) = (shared.clone(), job_queue.clone(), packs.clone());
            writer.workers.push(spawn("compress", Box::new(move || shared.clone().guard(|| shared.compress(&job_queue, &packs))))?);
        }
        // Beyond this machine most of the time goes by waiting for the other side.
        let storers = if shared.repository.storage().is_remote() { 2 * ahead } else { ahead };
        for _ in 0..storers {
            let (shared, pack_queue) = (shared.clone(), pack_queue.clone());
            writer.storers.push(spawn("store", Box::new(move || shared.clone().guard(|| shared.store_packs(&pack_queue))))?);
        }
        Ok(writer)
    }

    /// Stores a chunk unless the repository has it; returns its id. Blocks while the queue is full.
    pub fn store(&mut self, chunk: &[u8], kind: ObjectKind, texture: Texture) -> Result<ChunkId> {
        self.store_as(chunk, kind, texture, None)
    }

    /// The same with a zstd frame that unpacks to it, which is taken as it is where the repository compresses with zstd. It is proven as any payload is.
    pub fn store_frame(&mut self, chunk: &[u8], frame: &[u8]) -> Result<ChunkId> {
        let is_zstd = self.shared.repository.compression == Compression::Zstd;
        let payload = if is_zstd { payload::of_zstd_frame(frame, chunk.len()) } else { None };
        self.store_as(chunk, ObjectKind::DataPack, Texture::Mixed, payload)
    }

    fn store_as(&mut self, chunk: &[u8], kind: ObjectKind, texture: Texture, payload: Option<Vec<u8>>) -> Result<ChunkId> {
        let (id, is_new) = self.name(chunk)?;
        if is_new {
            let bytes = ChunkMemory::capacity(chunk.len());
            self.shared.wait_for_room(bytes)?;
            let mut raw = lock(&self.shared.chunk_memory).take(chunk.len());
            raw.extend_from_slice(chunk);
            self.send(Job { id, raw, kind, texture, payload, bytes })?;
        }
        Ok(id)
    }

    /// Stores a chunk of data that was gathered in memory of [`Writer::make_room`], and leaves it empty: the chunk is not copied.
    pub fn store_gathered(&mut self, chunk: &mut Vec<u8>, texture: Texture) -> Result<ChunkId> {
        let (id, is_new) = self.name(chunk)?;
        if is_new {
            let bytes = chunk.capacity();
            self.shared.wait_for_room(bytes)?;
            let raw = std::mem::take(chunk);
            self.send(Job { id, raw, kind: ObjectKind::DataPack, texture, payload: None, bytes })?;
        }
        chunk.clear();
        Ok(id)
    }

    /// Makes room for `more` bytes in a chunk that is gathered; `usual` is how long one mostly becomes.
    pub fn make_room(&self, chunk: &mut Vec<u8>, more: usize, usual: usize) {
        let len = chunk.len() + more;
        if chunk.capacity() < len {
            let mut memory = lock(&self.shared.chunk_memory);
            let mut larger = memory.take(len.max(usual));
            larger.extend_from_slice(chunk);
            memory.give(std::mem::replace(chunk, larger));
        }
    }

    /// The id of a chunk, and whether it is new; then it is noted as about to be stored.
    fn name(&mut self, chunk: &[u8]) -> Result<(ChunkId, bool)> {
        if chunk.len() > MAX_CHUNK_BYTES {
            return Err(RepositoryError::Other(format!("a chunk of {} bytes is over the limit of {MAX_CHUNK_BYTES}", chunk.len())));
        }
        self.shared.go_on()?;
        let id = chunk_id(&self.shared.repository.chunk_key, chunk);
        if self.has(&id)?.is_some() {
            return Ok((id, false));
        }
        let len = chunk.len() as u32;
        lock(&self.shared.pending).insert(id, len);
        self.shared.new.fetch_add(u64::from(len), Ordering::Relaxed);
        self.remember(id, len);
        Ok((id, true))
    }

    fn send(&self, job: Job) -> Result<()> {
        match self.jobs.as_ref().map(|jobs| jobs.send(job).is_ok()) {
            Some(true) => Ok(()),
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
            len = self.shared.repository.local.lens(std::slice::from_ref(id))?.into_iter().next().flatten();
        }
        if let Some(len) = len {
            self.remember(*id, len);
        }
        Ok(len)
    }

    /// Whether all these chunks are stored or about to be.
    pub fn has_all(&mut self, ids: &[ChunkId]) -> Result<bool> {
        let pending = lock(&self.shared.pending);
        let unknown: Vec<ChunkId> = ids.iter().filter(|id| !self.memo.contains_key(*id) && !pending.contains_key(*id)).copied().collect();
        drop(pending);
        let mut all = true;
        for (id, len) in unknown.iter().zip(self.shared.repository.local.lens(&unknown)?) {
            match len {
                Some(len) => self.remember(*id, len),
                None => all = false,
            }
        }
        Ok(all)
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
        Ok(Flushed {
            added_bytes: self.added_bytes(),
            new_bytes: self.shared.new.load(Ordering::Relaxed),
            condemned: std::mem::take(&mut self.condemned),
            went: self.went,
        })
    }

    /// Lets the queue run empty, closes the open packs, and waits until all is stored (or has failed).
    fn join(&mut self) {
        self.jobs = None;
        for thread in self.workers.drain(..) {
            // Panics were caught inside and made the error.
            let _ = thread.join();
        }
        if let Some(packs) = self.packs.take() {
            for slot in [&self.shared.data, &self.shared.meta] {
                let builder = lock(slot).take().and_then(|open| lock(&open).builder.take());
                if let Some(builder) = builder.filter(|_| !self.shared.failed.load(Ordering::Acquire)) {
                    match self.shared.close(builder) {
                        Ok(pack) => drop(packs.send(pack)),
                        Err(e) => self.shared.fail(e),
                    }
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
    /// Sealed.
    pub added_bytes: u64,
    /// Plaintext of the chunks that were new.
    pub new_bytes: u64,
    /// What was condemned when it began.
    condemned: BTreeMap<[u8; 32], i64>,
    /// [`super::local::LocalIndex::went`] then.
    went: i64,
}

/// Lists packs that stand in no index object in new ones.
pub fn write_missing_index(repository: &Repository) -> Result<()> {
    let mut index = Index::default();
    let mut chunks = 0;
    for id in repository.local.unindexed()? {
        let pack = match repository.pack_to_list(&id, None) {
            Err(e @ RepositoryError::Damaged { .. }) => {
                // What was in it is stored anew by the next run.
                repository.local.forget(&[id])?;
                return Err(e);
            }
            other => other?,
        };
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

/// Publishes an index object, and notes it in the local index.
pub(super) fn publish(repository: &Repository, index: &Index) -> Result<()> {
    let id = repository.write_index(index)?;
    repository.local.mark_indexed(&id, &index.packs.iter().map(|p| p.id).collect::<Vec<_>>())
}

/// Commits a backup: after this it is there for good.
///
/// Another writer (which should not be there) may have condemned or deleted meanwhile what this backup builds upon. Such a backup is not committed.
/// Whatever is condemned after this look is deleted a grace period later, and by then the manifest says that it is needed.
pub fn commit(repository: &Repository, manifest: &Manifest, flushed: &Flushed) -> Result<[u8; 32]> {
    repository.is_still_this()?;
    let mut problems = Vec::new();
    repository.sync_condemned(&mut problems)?;
    let mut gone = Vec::new();
    if !repository.is_as_compared()? {
        let known = repository.local.packs(true)?;
        let listed = repository.storage.list_as_it_comes("packs/", true)?;
        let there: HashSet<[u8; 32]> = ids(listed.into_iter().map(|(name, _)| name).collect());
        gone.extend(known.into_iter().map(|(id, _)| id).filter(|id| !there.contains(id)));
        repository.storage.are_gone("packs/", gone.iter().map(pack_name))?;
    }
    // What another run found gone or damaged meanwhile is not known here any more.
    let went = repository.local.went()? != flushed.went;
    if went || !gone.is_empty() || !problems.is_empty() || repository.local.condemned()? != flushed.condemned {
        repository.local.forget(&gone)?;
        needs_nothing_condemned(repository, manifest)?;
    }
    repository.write_manifest(manifest)
}

fn needs_nothing_condemned(repository: &Repository, manifest: &Manifest) -> Result<()> {
    let mut todo: Vec<ChunkId> = manifest.sources.iter().flat_map(|s| s.pages.iter().map(|p| ChunkId(*p.chunk))).collect();
    let pages = todo.len();
    let mut looked = 0;
    while looked < todo.len() {
        let ids = todo.get(looked..).unwrap_or_default().to_vec();
        if repository.local.lens(&ids)?.contains(&None) {
            return Err(RepositoryError::Other(
                "another keepd pruned the repository while this backup was made, and it would build upon what is to be deleted; nothing is \
                 lost, run it again"
                    .into(),
            ));
        }
        for (n, id) in ids.iter().enumerate() {
            // Pages name chunks and lists; lists lie in metadata packs and name chunks.
            let is_page = looked + n < pages;
            if is_page || repository.locate(id)?.kind == ObjectKind::MetaPack {
                let bytes = repository.read_chunk(id)?;
                let table =
                    page::references(&bytes).map_err(|e| repository.damaged(&format!("page {id}"), format!("it is no valid page: {e}")))?;
                todo.extend(table);
            }
        }
        looked += ids.len();
    }
    Ok(())
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
        let mut prover = Prover::default();
        for job in jobs {
            if !self.failed.load(Ordering::Acquire) {
                let payload = match &job.payload {
                    Some(payload) => payload,
                    None => compressor.compress(&job.raw, job.texture).map_err(|e| other(&e))?,
                };
                let (pack, mut place) = self.reserve(&job, payload.len()).map_err(|e| other(&e))?;
                place.seal(payload, &job.raw, &mut prover).map_err(|e| {
                    RepositoryError::Other(format!("what was sealed does not open to what went in ({e}); nothing of it was stored"))
                })?;
                if let Some(full) = give_back(&pack, place) {
                    let full = self.close(full)?;
                    // Where memory is short, no other is begun before this one is on its way.
                    let alone = (self.repository.packs_ahead() == 1).then(|| lock(&self.data));
                    let _ = packs.send(full);
                    drop(alone);
                }
            }
            self.release(job.bytes);
            lock(&self.chunk_memory).give(job.raw);
        }
        Ok(())
    }

    /// A place in the open pack for a job's payload.
    fn reserve(&self, job: &Job, payload_len: usize) -> std::result::Result<(Arc<Mutex<OpenPack>>, Place), CryptoError> {
        let mut slot = lock(if job.kind == ObjectKind::MetaPack { &self.meta } else { &self.data });
        let open = match slot.take() {
            Some(open) => open,
            None => {
                let builder = PackBuilder::new(&self.repository.keys, &self.repository.id, job.kind, &self.pack_memory)?;
                Arc::new(Mutex::new(OpenPack { builder: Some(builder), closed: false }))
            }
        };
        let mut pack = lock(&open);
        // One that stands open has its builder.
        let builder = pack.builder.as_mut().ok_or(CryptoError::Short)?;
        let place = builder.reserve(job.id, payload_len, job.raw.len() as u32)?;
        pack.closed = builder.len() >= PACK_TARGET_BYTES;
        if !pack.closed {
            *slot = Some(open.clone());
        }
        drop(pack);
        Ok((open, place))
    }

    fn close(&self, builder: PackBuilder) -> Result<BuiltPack> {
        builder
            .finish(&self.repository.keys, &self.repository.id)
            .map_err(|e| RepositoryError::Other(format!("a pack could not be closed: {e}; nothing of it was stored")))
    }

    /// Counts what is about to be queued, when there is room for it.
    fn wait_for_room(&self, bytes: usize) -> Result<()> {
        let limit = self.repository.queue_bytes();
        let mut queued = lock(&self.queued);
        while *queued > 0 && *queued + bytes > limit {
            queued = self.room.wait(queued).unwrap_or_else(PoisonError::into_inner);
            self.go_on()?;
        }
        *queued += bytes;
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

    /// Publishes a pack and takes it up into the local index.
    fn store_pack(&self, pack: BuiltPack) -> Result<()> {
        let stored = self.repository.store_pack(pack, &self.pack_memory)?;
        self.repository.local.add_unindexed(&stored)?;
        // Its chunks were proven when they were sealed.
        self.repository.local.mark_read(&[stored.id], jiff::Timestamp::now().as_second())?;
        self.added.fetch_add(stored.size, Ordering::Relaxed);
        let mut pending = lock(&self.pending);
        for c in &stored.chunks {
            pending.remove(&c.id);
        }
        Ok(())
    }
}

/// Gives a sealed place back; the pack, when this was the last one of a closed pack.
fn give_back(pack: &Mutex<OpenPack>, place: Place) -> Option<PackBuilder> {
    let mut open = lock(pack);
    let builder = open.builder.as_mut()?;
    builder.give(place);
    if builder.is_whole() && open.closed { open.builder.take() } else { None }
}
