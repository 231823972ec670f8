//! Fetching many chunks ahead of their use, in parallel, within a bound of memory.
//!
//! One thread asks for chunks in the order in which it will need them; neighbours in a pack are read in one go. A chunk's
//! bytes live as long as somebody holds its slot.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, unbounded};
use tokio_util::sync::CancellationToken;

use super::entry::{ChunkId, MAX_CHUNK_BYTES};
use super::error::{RepositoryError, Result};
use super::local::Location;
use super::lock;
use super::open::{Repository, may_be_elsewhere, pack_name};
use super::pack::{ChunkOpener, SealedChunk};
use crate::storage::direct::ReadBuffer;

/// Plaintext of neighbours read in one go.
const GROUP_BYTES: u32 = 4 << 20;
/// Chunks are seldom longer: how many are kept for another use is counted with this.
const USUAL_CHUNK_BYTES: usize = MAX_CHUNK_BYTES / 2;

/// A chunk asked for.
pub struct Slot {
    state: Mutex<State>,
    ready: Condvar,
    len: u32,
    budget: Arc<Budget>,
}

enum State {
    Waiting,
    Ready(Arc<Vec<u8>>),
    /// Its zstd frame.
    Frame(Arc<Vec<u8>>),
    Failed(RepositoryError),
}

struct Budget {
    used: Mutex<usize>,
    freed: Condvar,
    limit: usize,
    /// Memory of chunks that were used, for the next ones.
    free: Mutex<Free>,
}

/// What is free and what is used are not more than the limit together, but for what lengths that differ cost.
#[derive(Default)]
struct Free {
    memory: Vec<Vec<u8>>,
    bytes: usize,
}

impl Free {
    fn give(&mut self, memory: Vec<u8>, most: usize) {
        if self.bytes + memory.capacity() <= most {
            self.bytes += memory.capacity();
            self.memory.push(memory);
        }
    }

    /// The memory that fits best; where none is large enough, one goes, so that what is new does not come on top of it.
    fn take(&mut self, len: usize) -> Vec<u8> {
        let fitting = |(_, memory): &(usize, &Vec<u8>)| memory.capacity() >= len;
        let all = || self.memory.iter().enumerate();
        let best = all().filter(fitting).min_by_key(|(_, memory)| memory.capacity());
        let best = best.or_else(|| all().max_by_key(|(_, memory)| memory.capacity())).map(|(at, _)| at);
        let memory = best.map(|at| self.memory.swap_remove(at)).unwrap_or_default();
        self.bytes -= memory.capacity();
        if memory.capacity() >= len { memory } else { Vec::new() }
    }
}

impl Slot {
    /// The chunk's plaintext, when it has come.
    pub fn wait(&self) -> Result<Arc<Vec<u8>>> {
        let mut state = lock(&self.state);
        loop {
            match &*state {
                State::Ready(bytes) => return Ok(bytes.clone()),
                State::Frame(frame) => {
                    let raw = zstd::bulk::decompress(frame, self.len as usize).ok().filter(|raw| raw.len() == self.len as usize);
                    let raw = raw.ok_or_else(|| RepositoryError::Other("a chunk's zstd frame does not open; run a check".into()))?;
                    *state = State::Ready(Arc::new(raw));
                }
                State::Failed(error) => return Err(error.clone()),
                State::Waiting => state = self.ready.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// The chunk's zstd frame, where it was asked for and the chunk has one.
    pub fn wait_frame(&self) -> Result<Option<Arc<Vec<u8>>>> {
        let mut state = lock(&self.state);
        loop {
            match &*state {
                State::Frame(frame) => return Ok(Some(frame.clone())),
                State::Ready(_) => return Ok(None),
                State::Failed(error) => return Err(error.clone()),
                State::Waiting => state = self.ready.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Bytes of plaintext.
    pub fn len(&self) -> u32 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn set(&self, result: Result<State>) {
        *lock(&self.state) = result.unwrap_or_else(State::Failed);
        self.ready.notify_all();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let used = {
            let mut used = lock(&self.budget.used);
            *used -= self.len as usize;
            *used
        };
        if let State::Ready(bytes) = std::mem::replace(&mut *lock(&self.state), State::Waiting)
            && let Some(memory) = Arc::into_inner(bytes)
        {
            lock(&self.budget.free).give(memory, self.budget.limit.saturating_sub(used));
        }
        self.budget.freed.notify_all();
    }
}

type Group = Vec<Asked>;

struct Asked {
    slot: Arc<Slot>,
    id: ChunkId,
    at: Location,
    as_frame: bool,
}

impl Drop for Asked {
    /// Whoever waits for it is told when it was never read: the thread that was to do it panicked, or all of them have ended.
    fn drop(&mut self) {
        if matches!(*lock(&self.slot.state), State::Waiting) {
            self.slot.set(Err(RepositoryError::Other("a chunk was asked for and not read: a thread of keepd ended early".into())));
        }
    }
}

pub struct Fetcher {
    repository: Arc<Repository>,
    budget: Arc<Budget>,
    groups: Option<Sender<Group>>,
    group: Group,
    group_bytes: u32,
    live: HashMap<ChunkId, Weak<Slot>>,
    recent: VecDeque<Arc<Slot>>,
    recent_bytes: usize,
    threads: Vec<JoinHandle<()>>,
    cancel: CancellationToken,
}

impl Fetcher {
    /// `limit`: bytes of plaintext held at once, at least one chunk.
    pub fn new(repository: Arc<Repository>, limit: usize, cancel: CancellationToken) -> Result<Self> {
        let (groups, queue) = unbounded::<Group>();
        // More than there are processors: some of them wait for the storage.
        let count = std::thread::available_parallelism().map_or(4, |n| n.get() * 2).clamp(4, 8);
        let mut threads = Vec::new();
        for _ in 0..count {
            let (repository, queue, cancel) = (repository.clone(), queue.clone(), cancel.clone());
            let thread = std::thread::Builder::new().name("fetch".into()).spawn(move || work(&repository, &queue, &cancel));
            threads.push(thread.map_err(|e| RepositoryError::Other(format!("cannot start a thread: {e}")))?);
        }
        let budget = Arc::new(Budget { used: Mutex::new(0), freed: Condvar::new(), limit, free: Mutex::default() });
        Ok(Self {
            repository,
            budget,
            groups: Some(groups),
            group: Vec::new(),
            group_bytes: 0,
            live: HashMap::new(),
            recent: VecDeque::new(),
            recent_bytes: 0,
            threads,
            cancel,
        })
    }

    /// Asks for a chunk. Blocks while too much is held; what was asked for so far is then on its way.
    pub fn request(&mut self, id: ChunkId) -> Result<Arc<Slot>> {
        let slot = self.request_unkept(id, None)?;
        self.keep(slot.clone());
        Ok(slot)
    }

    /// The same, for who holds himself what is used again (at most [`Fetcher::may_hold`], after [`Fetcher::forget_recent`]). `frame_of`: where the chunk
    /// has so many bytes of plaintext its zstd frame is wanted; for chunks that were read and proven before.
    pub fn request_unkept(&mut self, id: ChunkId, frame_of: Option<u32>) -> Result<Arc<Slot>> {
        if let Some(slot) = self.live.get(&id).and_then(Weak::upgrade) {
            return Ok(slot);
        }
        let location = self.repository.locate(&id)?;
        self.reserve(location.len as usize)?;
        let slot =
            Arc::new(Slot { state: Mutex::new(State::Waiting), ready: Condvar::new(), len: location.len, budget: self.budget.clone() });
        let follows =
            self.group.last().is_some_and(|last| last.at.pack == location.pack && last.at.offset + last.at.sealed_len == location.offset);
        if !follows || self.group_bytes >= GROUP_BYTES {
            self.flush();
        }
        self.group_bytes += location.len;
        let as_frame = frame_of == Some(location.len);
        self.group.push(Asked { slot: slot.clone(), id, at: location, as_frame });
        if self.live.len() > 4096 {
            self.live.retain(|_, slot| slot.strong_count() > 0);
        }
        self.live.insert(id, Arc::downgrade(&slot));
        Ok(slot)
    }

    /// How many chunks (of the usual length, or shorter) are at hand for another use, when they are used one after the other.
    pub fn kept(&self) -> usize {
        (self.may_hold() / USUAL_CHUNK_BYTES).max(1)
    }

    /// Bytes of chunks that may be held for another use; the rest is what is on its way.
    pub fn may_hold(&self) -> usize {
        self.budget.limit / 2
    }

    /// Keeps nothing any more of what was asked for.
    pub fn forget_recent(&mut self) {
        self.recent.clear();
        self.recent_bytes = 0;
    }

    fn keep(&mut self, slot: Arc<Slot>) {
        if let Some(at) = self.recent.iter().position(|s| Arc::ptr_eq(s, &slot)) {
            self.recent.remove(at);
        } else {
            self.recent_bytes += slot.len as usize;
        }
        self.recent.push_back(slot);
        while self.recent_bytes > self.may_hold() {
            let Some(oldest) = self.recent.pop_front() else { break };
            self.recent_bytes -= oldest.len as usize;
        }
    }

    /// Sends what was asked for on its way; to be called before waiting for anything else.
    pub fn flush(&mut self) {
        self.group_bytes = 0;
        if !self.group.is_empty()
            && let Some(groups) = &self.groups
        {
            // The threads live as long as this sender.
            let _ = groups.send(std::mem::take(&mut self.group));
        }
    }

    fn reserve(&mut self, len: usize) -> Result<()> {
        let budget = self.budget.clone();
        let fits = |used: usize| used == 0 || used + len <= budget.limit;
        if !fits(*lock(&budget.used)) {
            // What is kept for another use is half of the budget at the most: room comes when what was asked for is used.
            self.flush();
        }
        let mut used = lock(&budget.used);
        // Full once, it waits for a quarter of it: room for single chunks only would have them read one by one.
        let room = if fits(*used) { budget.limit } else { budget.limit / 4 * 3 };
        while *used > 0 && *used + len > room {
            if self.cancel.is_cancelled() {
                return Err(RepositoryError::Cancelled);
            }
            let wait = std::time::Duration::from_millis(200);
            used = budget.freed.wait_timeout(used, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        *used += len;
        Ok(())
    }
}

impl Drop for Fetcher {
    fn drop(&mut self) {
        self.flush();
        self.groups = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn work(repository: &Repository, queue: &Receiver<Group>, cancel: &CancellationToken) {
    let (mut opener, mut sealed) = (ChunkOpener::default(), ReadBuffer::default());
    for group in queue {
        let fetched = fetch_group(repository, &group, &mut opener, &mut sealed, cancel);
        if let Err(e) = fetched {
            for asked in &group {
                if matches!(*lock(&asked.slot.state), State::Waiting) {
                    asked.slot.set(if cancel.is_cancelled() {
                        Err(RepositoryError::Cancelled)
                    } else {
                        elsewhere(repository, asked, e.clone())
                    });
                }
            }
        }
    }
}

fn fetch_group(
    repository: &Repository,
    group: &Group,
    opener: &mut ChunkOpener,
    sealed: &mut ReadBuffer,
    cancel: &CancellationToken,
) -> Result<()> {
    let (Some(Asked { at: first, .. }), Some(Asked { at: last, .. })) = (group.first(), group.last()) else { return Ok(()) };
    if cancel.is_cancelled() {
        return Err(RepositoryError::Cancelled);
    }
    let cipher = repository.pack_cipher(&first.pack, first.kind)?;
    let len = u64::from(last.offset) + u64::from(last.sealed_len) - u64::from(first.offset);
    repository.storage.range_into(&pack_name(&first.pack), u64::from(first.offset), len, sealed)?;
    for asked in group {
        let Asked { slot, id, at, as_frame } = asked;
        let start = (at.offset - first.offset) as usize;
        let section = sealed.get(start..start + at.sealed_len as usize).unwrap_or_default();
        let section = SealedChunk { ordinal: u64::from(at.ordinal), id: *id, len: at.len, bytes: section };
        // What a write-only pack holds is proven by the id of its plaintext alone.
        if *as_frame
            && !cipher.is_write_only()
            && let Ok(Some(frame)) = opener.open_frame(&cipher, &section)
        {
            slot.set(Ok(State::Frame(Arc::new(frame.to_vec()))));
            continue;
        }
        let mut raw = lock(&slot.budget.free).take(at.len as usize);
        raw.clear();
        raw.reserve_exact(at.len as usize);
        let opened = opener.open_into(&cipher, &repository.chunk_key, &section, &mut raw);
        let opened = match opened {
            Ok(()) => Ok(State::Ready(Arc::new(raw))),
            // What came damaged may lie there whole.
            Err(_) if repository.storage.is_remote() => {
                repository.forget_cipher(&at.pack);
                repository.read_chunk(id).map(|raw| State::Ready(Arc::new(raw)))
            }
            Err(e) => elsewhere(repository, asked, repository.pack_error(&at.pack, e)),
        };
        slot.set(opened);
    }
    Ok(())
}

/// A chunk that is not where the local index has it, from where the repository has it; else why it cannot be had.
fn elsewhere(repository: &Repository, asked: &Asked, error: RepositoryError) -> Result<State> {
    match may_be_elsewhere(&error).then(|| repository.second_look(&asked.id, Some(&asked.at))).flatten() {
        Some(at) => Ok(State::Ready(Arc::new(repository.read_chunk_at(&asked.id, &at)?))),
        None => Err(error),
    }
}
