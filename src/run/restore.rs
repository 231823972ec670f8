//! A restore to a directory: a backup's entries as a stream into the client's pipe.
//!
//! A planner thread walks the entries and asks for chunks ahead; the run's own thread waits for each and writes. A scattered
//! file of whose chunks too many would not be at hand when they are needed again is sent in the order of its chunks, not of
//! its offsets, so that each is read once.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, bounded};
use data_encoding::BASE64;
use keepd_protocol::model::{BytesPath, EntryKind, Level};
use keepd_protocol::restore::{EntryHeader, INLINE_BYTES, Summary};
use tokio_util::sync::CancellationToken;

use super::live::{Failure, Finish, LiveRun};
use super::outlet::{Outlet, RestoreOut};
use super::patient::PATIENCE;
use super::repeats::{Kept, Repeated, Repeats, Use};
use super::reread::{Held, comes_again, read_in_order};
use super::selection::{Selection, Shown, is_at_or_below};
use crate::crypto::CryptoError;
use crate::repository::entry::{Extent, path_order};
use crate::repository::fetch::{Fetcher, Slot};
use crate::repository::reader::chunks_of;
use crate::repository::{ChunkId, Entry, Kind, Manifest, Repository, RepositoryError, Segment, SourceReader};
use crate::storage::StorageError;

/// Segments of a long file that are put into the order of their chunks at once.
const WINDOW_SEGMENTS: usize = 1 << 16;
/// So small a part of what is needed may be read again for the order of the pieces.
const REREAD_PART: u64 = 8;
/// Plaintext that is fetched ahead at most where contents come in order, in bytes.
const IN_ORDER_AHEAD: usize = 20 << 20;
/// Pieces that travel inside their entry's frame.
const INLINE_SEGMENTS: usize = 2;

/// What a stream is made of, in order.
pub enum Op {
    /// An entry; its whole contents where they travel with it.
    Entry(Box<EntryHeader>, Vec<Part>),
    Data {
        entry: u64,
        offset: u64,
        slot: Arc<Slot>,
        extent: Extent,
    },
    End {
        entry: u64,
    },
    /// What cannot be read, where that does not end the stream.
    Hurt {
        path: Vec<u8>,
        text: String,
    },
}

/// A piece of the contents that travel with an entry.
pub enum Part {
    /// Of a chunk; where it is used again, it is kept there.
    Fetched(Arc<Slot>, Extent, Option<Arc<Kept>>),
    /// Used before.
    Kept(Arc<Kept>),
}

impl Part {
    /// Waits for it, and adds it to what came before.
    pub fn append_to(&self, contents: &mut Vec<u8>) -> Result<(), Broken> {
        match self {
            Part::Fetched(slot, extent, kept) => {
                let bytes = slot.wait()?;
                let bytes = part(&bytes, extent).map_err(Broken::End)?;
                if let Some(kept) = kept {
                    kept.put(bytes);
                }
                contents.extend_from_slice(bytes);
            }
            Part::Kept(kept) => {
                let bytes =
                    kept.get().ok_or_else(|| RepositoryError::Other("contents were to be kept and were not; this is a bug".into()))?;
                contents.extend_from_slice(bytes);
            }
        }
        Ok(())
    }
}

pub type Ops = Receiver<Result<Op, RepositoryError>>;

/// A backup as one destination has it.
#[derive(Clone)]
pub struct Place {
    pub repository: Arc<Repository>,
    pub manifest: Manifest,
    pub destination: String,
    /// Keeps a prune away.
    pub _reading: Arc<dyn Send + Sync>,
}

/// Another place of the same backup, when one can no longer be read; None when there is no other.
pub type Another<'a> = &'a mut dyn FnMut() -> Option<Place>;

/// Streams what is selected into `out`. When a place fails, another one goes on where it stopped: copies have the same entries and segments
/// in the same order.
/// `only`: of the entries at these paths exactly those (own paths of their source, directories above them among them).
pub fn stream(
    mut place: Place,
    another: Another<'_>,
    paths: &[Vec<u8>],
    only: Option<&HashSet<Vec<u8>>>,
    out: RestoreOut,
    live: &LiveRun,
) -> Result<Finish, Failure> {
    let mut frames = Outlet::new(out, PATIENCE, &live.cancel)?;
    let mut done = Done::default();
    let result = loop {
        match stream_from(&place, (paths, only), &mut frames, &mut done, live) {
            Ok(()) => break Ok(()),
            Err(Broken::End(failure)) => break Err(failure),
            Err(Broken::Place(e)) => match next_place(&mut place, another, &e, live) {
                true => {}
                false => break Err(unreadable(e)),
            },
        }
    };
    match result {
        Ok(()) => {
            frames.finish(&done.summary).map_err(|e| gone(&live.cancel, &e))?;
            Ok(Finish::Good)
        }
        Err(failure) => {
            // The client learns why; that it is gone itself is no second error.
            let _ = frames.error(&failure.to_string());
            Err(failure)
        }
    }
}

/// Goes on to another place that has the backup in the same shape; false when there is none.
pub(super) fn next_place(place: &mut Place, another: Another<'_>, error: &RepositoryError, live: &LiveRun) -> bool {
    let shape = |m: &Manifest| m.sources.iter().map(|s| (s.name.clone(), s.entries, s.bytes)).collect::<Vec<_>>();
    while !live.cancel.is_cancelled() {
        let Some(next) = another() else { return false };
        if shape(&next.manifest) == shape(&place.manifest) {
            live.message(Level::Warning, format!("{error}; going on with the copy at {}", next.destination));
            *place = next;
            return true;
        }
    }
    false
}

/// Why a backup could not be read where it is: an object that is gone is damage, a storage that does not answer is not.
pub(super) fn unreadable(error: RepositoryError) -> Failure {
    match error {
        e @ RepositoryError::Storage(StorageError::NotFound { .. }) => Failure::Damaged(e.to_string()),
        other => other.into(),
    }
}

/// How far a stream has come.
#[derive(Default)]
struct Done {
    ops: u64,
    trace: Trace,
    summary: Summary,
}

/// What a stream consisted of so far, in short. Copies have the same entries and segments in the same order, but not those that went through an archive: where another place would
/// go on with something else, that is noticed.
#[derive(Default, Clone)]
struct Trace(DefaultHasher);

impl Trace {
    fn entry(&mut self, index: u64, size: u64, is_inline: bool) {
        (0u8, index, size, is_inline).hash(&mut self.0);
    }

    fn data(&mut self, entry: u64, offset: u64, len: u32) {
        (1u8, entry, offset, len).hash(&mut self.0);
    }

    fn end(&mut self, entry: u64) {
        (2u8, entry).hash(&mut self.0);
    }

    fn sum(&self) -> u64 {
        self.0.finish()
    }
}

/// Why a stream from one place ended early.
pub enum Broken {
    /// It could not be read.
    Place(RepositoryError),
    End(Failure),
}

impl From<RepositoryError> for Broken {
    fn from(error: RepositoryError) -> Self {
        match error {
            RepositoryError::Cancelled => Broken::End(Failure::Cancelled),
            other => Broken::Place(other),
        }
    }
}

fn stream_from(
    place: &Place,
    (paths, only): (&[Vec<u8>], Option<&HashSet<Vec<u8>>>),
    frames: &mut Outlet,
    done: &mut Done,
    live: &LiveRun,
) -> Result<(), Broken> {
    // What is still on its way when a place fails is given up.
    let cancel = live.cancel.child_token();
    let sent = Some(done.trace.sum());
    let wanted = Wanted { paths, only, skip: done.ops, sent, is_patient: false, in_order: false, frames: false, repeated: None };
    with_ops(&place.repository, &place.manifest, &wanted, &cancel, |queue| write_out(queue, frames, done, live))
}

/// What of a backup is streamed, and how.
pub struct Wanted<'a> {
    /// `<source>[/<path>]`; none means all.
    pub paths: &'a [Vec<u8>],
    /// Of the entries at these paths exactly those.
    pub only: Option<&'a HashSet<Vec<u8>>>,
    /// Ops that another place gave already.
    pub skip: u64,
    /// The trace of these, where it is to be proven that this place has the same ones.
    pub sent: Option<u64>,
    /// Damage does not end the stream: it goes on with what is whole. Directories that were lost are made up.
    pub is_patient: bool,
    /// The contents of each file come from its start to its end, also where that means to read a chunk twice.
    pub in_order: bool,
    /// With `in_order`: what is a whole chunk comes as its zstd frame, where it has one. For what was read and proven before.
    pub frames: bool,
    /// Contents that are needed more than once, and kept meanwhile, where they are known already.
    pub repeated: Option<&'a Repeated>,
}

/// Has `consume` take what a backup consists of, while it is fetched.
pub fn with_ops(
    repository: &Arc<Repository>,
    manifest: &Manifest,
    wanted: &Wanted<'_>,
    cancel: &CancellationToken,
    consume: impl FnOnce(&Ops) -> Result<(), Broken>,
) -> Result<(), Broken> {
    let selection = Selection::new(manifest, wanted.paths).map_err(|text| Broken::End(Failure::Failed(text)))?;
    std::thread::scope(|scope| {
        let (ops, queue) = bounded::<Result<Op, RepositoryError>>(1024);
        let (repository, selection) = (repository.clone(), &selection);
        let for_planner = cancel.clone();
        let planner = std::thread::Builder::new().name("plan".into()).spawn_scoped(scope, move || {
            let ahead = repository.ahead_bytes().min(if wanted.in_order { IN_ORDER_AHEAD } else { usize::MAX });
            let repeated = wanted.repeated.cloned().or_else(|| repeated(&repository, selection, wanted, &for_planner));
            let mut planner = match Fetcher::new(repository.clone(), ahead, for_planner) {
                Ok(fetcher) => Planner {
                    repository,
                    manifest,
                    only: wanted.only,
                    fetcher,
                    ops: ops.clone(),
                    next: 0,
                    skip: wanted.skip,
                    sent: wanted.sent,
                    trace: Trace::default(),
                    is_patient: wanted.is_patient,
                    in_order: wanted.in_order,
                    frames: wanted.frames,
                    repeats: repeated.map(Repeats::new),
                    above: HashSet::new(),
                    open: Vec::new(),
                },
                Err(e) => return drop(ops.send(Err(e))),
            };
            if let Err(e) = planner.plan(selection).and_then(|()| planner.all_skipped()) {
                let _ = ops.send(Err(e));
            }
        });
        planner.map_err(|e| Broken::End(Failure::Failed(format!("cannot start a thread: {e}"))))?;
        let consumed = consume(&queue);
        if consumed.is_err() {
            cancel.cancel();
        }
        drop(queue);
        consumed
    })
}

/// What a stream needs more than once, where looking for that first is worth it. Entries that cannot be read are no error yet: what stands before them is streamed.
fn repeated(repository: &Arc<Repository>, selection: &Selection<'_>, wanted: &Wanted<'_>, cancel: &CancellationToken) -> Option<Repeated> {
    let is_all = || selection.sources.iter().all(|selected| selected.paths.iter().all(Vec::is_empty));
    // A stream that bears damage reads each piece where it is; of a few files from afar each request counts.
    let is_worth = !wanted.is_patient && wanted.only.is_none() && (!repository.storage().is_remote() || is_all());
    is_worth.then(|| Repeated::of(repository, selection, cancel).ok()).flatten()
}

/// Whether a stream may go on without what could not be read: it is damaged or gone, and no more than that. A storage that does not answer may do
/// so the next time; a disk of this machine that does not read something will not.
pub fn is_bearable(error: &RepositoryError, repository: &Repository) -> bool {
    match error {
        RepositoryError::Object { source: CryptoError::NeedsPrivateKey(_), .. } => false,
        RepositoryError::Object { .. } | RepositoryError::Payload { .. } | RepositoryError::Damaged { .. } => true,
        RepositoryError::Storage(StorageError::NotFound { .. }) => true,
        RepositoryError::Storage(_) => !repository.storage().is_remote(),
        _ => false,
    }
}

fn write_out(queue: &Ops, frames: &mut Outlet, done: &mut Done, live: &LiveRun) -> Result<(), Broken> {
    let mut contents = Vec::new();
    for op in queue {
        let io = |e: io::Error| Broken::End(gone(&live.cancel, &e));
        let broken = Broken::End;
        match op? {
            Op::Entry(header, parts) => {
                contents.clear();
                for part in parts {
                    part.append_to(&mut contents)?;
                }
                frames.entry(&header, &contents).map_err(io)?;
                done.trace.entry(header.index, header.size, header.inline);
                done.summary.entries += 1;
                done.summary.bytes += contents.len() as u64;
                live.report.entry();
                live.report.bytes(contents.len() as u64);
            }
            Op::Data { entry, offset, slot, extent } => {
                frames.data(entry, offset, part(&slot.wait()?, &extent).map_err(broken)?).map_err(io)?;
                done.trace.data(entry, offset, extent.len);
                done.summary.bytes += u64::from(extent.len);
                live.report.bytes(u64::from(extent.len));
            }
            Op::End { entry } => {
                frames.end(entry).map_err(io)?;
                done.trace.end(entry);
            }
            Op::Hurt { text, .. } => return Err(Broken::End(Failure::Damaged(text))),
        }
        done.ops += 1;
        if live.cancel.is_cancelled() {
            return Err(Broken::End(Failure::Cancelled));
        }
    }
    Ok(())
}

pub fn part<'b>(bytes: &'b [u8], extent: &Extent) -> Result<&'b [u8], Failure> {
    let end = extent.offset as usize + extent.len as usize;
    bytes
        .get(extent.offset as usize..end)
        .ok_or_else(|| Failure::Damaged(format!("an entry refers beyond the end of chunk {}; run a check", extent.chunk)))
}

pub(super) fn gone(cancel: &CancellationToken, error: &io::Error) -> Failure {
    match (cancel.is_cancelled(), error.kind()) {
        (true, _) => Failure::Cancelled,
        (_, io::ErrorKind::BrokenPipe) => Failure::Failed("the client went away before the end".into()),
        _ => Failure::Failed(format!("cannot write to the client: {error}")),
    }
}

struct Planner<'a> {
    repository: Arc<Repository>,
    manifest: &'a Manifest,
    only: Option<&'a HashSet<Vec<u8>>>,
    fetcher: Fetcher,
    ops: Sender<Result<Op, RepositoryError>>,
    next: u64,
    /// Ops that another place gave already.
    skip: u64,
    /// The trace of these.
    sent: Option<u64>,
    trace: Trace,
    is_patient: bool,
    in_order: bool,
    frames: bool,
    repeats: Option<Repeats>,
    /// Of the source at hand: directories above what is wanted, which were sent first.
    above: HashSet<Vec<u8>>,
    /// The directories sent that the next entry may stand in, each in the one before.
    open: Vec<Vec<u8>>,
}

impl Planner<'_> {
    /// Whether the next op was sent from another place already; `tell` adds it to the trace. An error when that place had others.
    fn skipped(&mut self, tell: impl FnOnce(&mut Trace)) -> Result<bool, RepositoryError> {
        if self.skip == 0 {
            return Ok(false);
        }
        self.skip -= 1;
        tell(&mut self.trace);
        if self.skip == 0 && self.sent.is_some_and(|sent| sent != self.trace.sum()) {
            return Err(self.laid_out_otherwise());
        }
        Ok(true)
    }

    /// An error when there were fewer ops here than the other place had sent already.
    fn all_skipped(&self) -> Result<(), RepositoryError> {
        if self.skip == 0 { Ok(()) } else { Err(self.laid_out_otherwise()) }
    }

    fn laid_out_otherwise(&self) -> RepositoryError {
        let text = "what was restored so far came from another copy, and the one here is laid out in another way, so it cannot go on where that stopped";
        RepositoryError::Other(format!("{}: {text}", self.repository.location()))
    }

    fn plan(&mut self, selection: &Selection<'_>) -> Result<(), RepositoryError> {
        for selected in &selection.sources {
            let shown = &selected.shown;
            self.above.clear();
            self.open.clear();
            match self.ancestors(shown, &selected.paths) {
                Err(e) if self.is_patient && is_bearable(&e, &self.repository) => {}
                other => other?,
            }
            for path in &selected.paths {
                self.below(shown, &selected.paths, path)?;
            }
        }
        self.fetcher.flush();
        Ok(())
    }

    /// All entries at or below one path.
    fn below(&mut self, shown: &Shown<'_>, paths: &[Vec<u8>], path: &[u8]) -> Result<(), RepositoryError> {
        let mut reader = SourceReader::starting_at(self.repository.clone(), shown.source, path);
        let mut found = path.is_empty() && shown.source.entries == 0;
        let mut last = path.to_vec();
        loop {
            let paged = match reader.next_paged() {
                Ok(Some(paged)) => paged,
                Ok(None) => break,
                Err(e) => {
                    // A page of entries is lost; the reader goes on with the next.
                    found = true;
                    let text = format!("'{}': entries behind it are lost: {e}", String::from_utf8_lossy(&shown.path(&last)));
                    self.hurt(Vec::new(), text, e)?;
                    continue;
                }
            };
            if !is_at_or_below(&paged.entry.path, path) {
                match path_order(&paged.entry.path, path).is_gt() {
                    true => break,
                    false => continue,
                }
            }
            found = true;
            last.clone_from(&paged.entry.path);
            let read = reader.whole(paged).and_then(|entry| self.one(shown, paths, entry));
            if let Err(e) = read {
                let path = shown.path(&last);
                let text = format!("'{}': {e}", String::from_utf8_lossy(&path));
                self.hurt(path, text, e)?;
            }
        }
        if found {
            return Ok(());
        }
        let path = String::from_utf8_lossy(&shown.path(path)).into_owned();
        Err(RepositoryError::Other(format!("'{path}' is not in the backup")))
    }

    fn one(&mut self, shown: &Shown<'_>, paths: &[Vec<u8>], entry: Entry) -> Result<(), RepositoryError> {
        if self.only.is_some_and(|only| !only.contains(&entry.path)) {
            return Ok(());
        }
        let entry = self.with_contents(shown, paths, entry)?;
        if self.is_patient {
            // Before anything of it is sent.
            for chunk in chunks_of(&entry.content.segments) {
                self.repository.locate(&chunk)?;
            }
            self.parents(shown, &entry)?;
        }
        if shown.is_one_file() {
            self.entry(shown, shown.source.name.clone().into_bytes(), shown.made_up_directory(&entry))?;
        }
        self.entry(shown, shown.path(&entry.path), entry)
    }

    /// Sends on that something cannot be read, or gives up for it.
    fn hurt(&mut self, path: Vec<u8>, text: String, error: RepositoryError) -> Result<(), RepositoryError> {
        match self.is_patient && is_bearable(&error, &self.repository) {
            true => self.send(Op::Hurt { path, text }),
            false => Err(error),
        }
    }

    /// Makes the directories up that an entry stands in and that were lost.
    fn parents(&mut self, shown: &Shown<'_>, entry: &Entry) -> Result<(), RepositoryError> {
        if shown.is_one_file() {
            return Ok(());
        }
        while self.open.last().is_some_and(|directory| !is_at_or_below(&entry.path, directory)) {
            self.open.pop();
        }
        let root = (!entry.path.is_empty()).then_some(0);
        let ends = root.into_iter().chain(entry.path.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(at, _)| at));
        for parent in ends.filter_map(|end| entry.path.get(..end)) {
            let known = self.open.iter().any(|d| d == parent) || self.above.contains(parent);
            if !known {
                let made_up = shown.made_up_directory(entry);
                self.entry(shown, shown.path(parent), made_up)?;
                self.open.push(parent.to_vec());
            }
        }
        if entry.kind == Kind::Directory {
            self.open.push(entry.path.clone());
        }
        Ok(())
    }

    /// The directories above what is wanted, as they were; a stream never holds an entry without its directory before it.
    fn ancestors(&mut self, shown: &Shown<'_>, paths: &[Vec<u8>]) -> Result<(), RepositoryError> {
        let mut wanted: Vec<&[u8]> = Vec::new();
        for path in paths.iter().filter(|p| !p.is_empty()) {
            wanted.push(&[]);
            wanted.extend(path.iter().enumerate().filter(|(_, b)| **b == b'/').filter_map(|(at, _)| path.get(..at)));
        }
        wanted.sort_by(|a, b| path_order(a, b));
        wanted.dedup();
        for directory in wanted {
            if let Some(entry) = find(&self.repository, shown.source, directory)? {
                self.entry(shown, shown.path(directory), entry)?;
                self.above.insert(directory.to_vec());
            }
        }
        Ok(())
    }

    /// A hard link whose first name is not wanted too comes as a file of its own.
    fn with_contents(&self, shown: &Shown<'_>, paths: &[Vec<u8>], entry: Entry) -> Result<Entry, RepositoryError> {
        let is_wanted = |first: &[u8]| paths.iter().any(|p| is_at_or_below(first, p)) && self.only.is_none_or(|only| only.contains(first));
        if entry.kind != Kind::Hardlink || is_wanted(&entry.target) {
            return Ok(entry);
        }
        match find(&self.repository, shown.source, &entry.target)? {
            Some(first) => Ok(Entry { path: entry.path, ..first }),
            None => Ok(entry),
        }
    }

    fn entry(&mut self, shown: &Shown<'_>, path: Vec<u8>, entry: Entry) -> Result<(), RepositoryError> {
        let index = self.next;
        self.next += 1;
        let mut header = self.header(shown, index, &path, &entry);
        if entry.kind == Kind::File {
            header.sparse = entry.content.segments.iter().any(|s| matches!(s, Segment::Hole(_)));
            // Many pieces would hold many chunks at once.
            header.inline = !header.sparse && entry.size <= INLINE_BYTES && entry.content.segments.len() <= INLINE_SEGMENTS;
        }
        let is_inline = header.inline;
        let is_sent = self.skipped(|trace| trace.entry(index, entry.size, is_inline))?;
        if entry.kind != Kind::File {
            return if is_sent { Ok(()) } else { self.send(Op::Entry(Box::new(header), Vec::new())) };
        }
        if is_inline {
            let mut parts = Vec::new();
            for segment in &entry.content.segments {
                match segment {
                    Segment::Data(extent) if is_sent => self.repeats.iter_mut().for_each(|repeats| repeats.pass(extent)),
                    Segment::Data(extent) => parts.push(self.part(extent)?),
                    Segment::Hole(_) => {}
                }
            }
            return if is_sent { Ok(()) } else { self.send(Op::Entry(Box::new(header), parts)) };
        }
        if !is_sent {
            self.send(Op::Entry(Box::new(header), Vec::new()))?;
        }
        let mut at = 0;
        for window in entry.content.segments.chunks(WINDOW_SEGMENTS) {
            let mut offset = at;
            at += window.iter().map(Segment::len).sum::<u64>();
            if self.in_order || self.is_fine_in_order(window) {
                let mut held = Held::new(window, self.fetcher.may_hold());
                if held.will_hold() {
                    self.fetcher.forget_recent();
                }
                for segment in window {
                    if let Segment::Data(extent) = segment {
                        if self.skipped(|trace| trace.data(index, offset, extent.len))? {
                            held.pass(&extent.chunk);
                        } else {
                            let frame = self.frames && extent.offset == 0;
                            let slot = held.next(&extent.chunk, || {
                                let slot = self.fetcher.request_unkept(extent.chunk, frame.then_some(extent.len))?;
                                let len = slot.len() as usize;
                                Ok::<_, RepositoryError>((slot, len))
                            })?;
                            self.send(Op::Data { entry: index, offset, slot, extent: *extent })?;
                        }
                    }
                    offset += segment.len();
                }
                continue;
            }
            let mut order: Vec<ChunkId> = Vec::new();
            let mut of_chunk: HashMap<ChunkId, Vec<(u64, Extent)>> = HashMap::new();
            for segment in window {
                if let Segment::Data(extent) = segment {
                    of_chunk.entry(extent.chunk).or_insert_with(|| {
                        order.push(extent.chunk);
                        Vec::new()
                    });
                    if let Some(list) = of_chunk.get_mut(&extent.chunk) {
                        list.push((offset, *extent));
                    }
                }
                offset += segment.len();
            }
            for chunk in order {
                let mut pieces = Vec::new();
                for (offset, extent) in of_chunk.remove(&chunk).unwrap_or_default() {
                    if !self.skipped(|trace| trace.data(index, offset, extent.len))? {
                        pieces.push((offset, extent));
                    }
                }
                if pieces.is_empty() {
                    continue;
                }
                let slot = self.fetcher.request(chunk)?;
                for (offset, extent) in pieces {
                    self.send(Op::Data { entry: index, offset, slot: slot.clone(), extent })?;
                }
            }
        }
        if self.skipped(|trace| trace.end(index))? { Ok(()) } else { self.send(Op::End { entry: index }) }
    }

    /// A piece that travels with its entry.
    fn part(&mut self, extent: &Extent) -> Result<Part, RepositoryError> {
        let kept = match self.repeats.as_mut().map_or(Use::Once, |repeats| repeats.next(extent)) {
            Use::Again(kept) => return Ok(Part::Kept(kept)),
            Use::First(kept) => Some(kept),
            Use::Once => None,
        };
        Ok(Part::Fetched(self.fetcher.request(extent.chunk)?, *extent, kept))
    }

    /// Whether the segments can be sent from the first to the last with hardly any chunk read twice: true for a file whose chunks are each spread over
    /// a short stretch of it, or go along with the others.
    fn is_fine_in_order(&self, segments: &[Segment]) -> bool {
        if !comes_again(segments) {
            return true;
        }
        // It is as long in each copy of a backup, which have to come to the same order.
        let len_of = |id: &ChunkId| self.repository.locate(id).ok().map(|at| at.len);
        let (read, once) = read_in_order(segments, len_of, self.fetcher.may_hold());
        read - once <= once / REREAD_PART
    }

    fn header(&self, shown: &Shown<'_>, index: u64, path: &[u8], entry: &Entry) -> EntryHeader {
        let name = |names: &[(u32, String)], id: u32| names.iter().find(|(n, _)| *n == id).map(|(_, name)| name.clone());
        let target = match entry.kind {
            Kind::Symlink => Some(BytesPath::from_bytes(&entry.target)),
            Kind::Hardlink => Some(BytesPath::from_bytes(&shown.path(&entry.target))),
            _ => None,
        };
        EntryHeader {
            index,
            path: BytesPath::from_bytes(path),
            kind: kind(entry.kind),
            // Of single entries directories are but the way to them, which needs no special bits: a unit may forbid to set those.
            mode: if self.only.is_some() && entry.kind == Kind::Directory { entry.mode & 0o1777 } else { entry.mode },
            uid: entry.uid,
            gid: entry.gid,
            user: name(&self.manifest.users, entry.uid),
            group: name(&self.manifest.groups, entry.gid),
            mtime_seconds: entry.mtime.seconds,
            mtime_nanoseconds: entry.mtime.nanoseconds,
            size: entry.size,
            sparse: false,
            inline: false,
            target,
            xattrs: entry.xattrs.iter().map(|(n, v)| (BytesPath::from_bytes(n), BASE64.encode(v))).collect(),
        }
    }

    fn send(&mut self, op: Op) -> Result<(), RepositoryError> {
        let op = match self.ops.try_send(Ok(op)) {
            Ok(()) => return Ok(()),
            Err(crossbeam_channel::TrySendError::Full(op)) => op,
            Err(crossbeam_channel::TrySendError::Disconnected(_)) => return Err(RepositoryError::Cancelled),
        };
        self.fetcher.flush();
        self.ops.send(op).map_err(|_| RepositoryError::Cancelled)
    }
}

pub fn kind(kind: Kind) -> EntryKind {
    match kind {
        Kind::File => EntryKind::File,
        Kind::Directory => EntryKind::Directory,
        Kind::Symlink => EntryKind::Symlink,
        Kind::Hardlink => EntryKind::Hardlink,
    }
}

/// Calls `each` for every entry at or below one of `paths` (in path order); returns a path that is not there.
pub fn walk(
    repository: &Arc<Repository>,
    shown: &Shown<'_>,
    paths: &[Vec<u8>],
    mut each: impl FnMut(Entry) -> Result<(), RepositoryError>,
) -> Result<Option<Vec<u8>>, RepositoryError> {
    for path in paths {
        let mut reader = SourceReader::starting_at(repository.clone(), shown.source, path);
        let mut found = false;
        while let Some(paged) = reader.next_paged()? {
            if is_at_or_below(&paged.entry.path, path) {
                found = true;
                each(reader.whole(paged)?)?;
            } else if path_order(&paged.entry.path, path).is_gt() {
                break;
            }
        }
        let empty_source = path.is_empty() && shown.source.entries == 0;
        if !found && !empty_source {
            return Ok(Some(path.clone()));
        }
    }
    Ok(None)
}

/// One entry by its own path.
pub fn find(
    repository: &Arc<Repository>,
    source: &crate::repository::ManifestSource,
    path: &[u8],
) -> Result<Option<Entry>, RepositoryError> {
    let mut reader = SourceReader::starting_at(repository.clone(), source, path);
    while let Some(paged) = reader.next_paged()? {
        if paged.entry.path == path {
            return reader.whole(paged).map(Some);
        }
        if path_order(&paged.entry.path, path).is_gt() {
            break;
        }
    }
    Ok(None)
}

/// Finds the file that `path` names, for `cat`. Hard links lead to their file.
pub fn find_file(repository: &Arc<Repository>, manifest: &Manifest, path: &[u8]) -> Result<Entry, Failure> {
    let selection = Selection::new(manifest, &[path.to_vec()]).map_err(Failure::Failed)?;
    let shown_path = String::from_utf8_lossy(path).into_owned();
    let absent = || Failure::Failed(format!("'{shown_path}' is not in the backup"));
    let selected = selection.sources.first().ok_or_else(absent)?;
    let wanted = selected.paths.first().ok_or_else(absent)?;
    let entry = find(repository, selected.shown.source, wanted)?.ok_or_else(absent)?;
    let entry = match entry.kind {
        Kind::Hardlink => find(repository, selected.shown.source, &entry.target)?.ok_or_else(absent)?,
        _ => entry,
    };
    match entry.kind {
        Kind::File => Ok(entry),
        other => Err(Failure::Failed(format!("'{shown_path}' is a {}, not a file", kind(other)))),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::repository::source_writer::SourceWriter;
    use crate::repository::test_world::{World, manifest, noise};
    use crate::repository::writer::Writer;
    use crate::repository::{Entry, EntrySink};

    #[test]
    fn contents_that_many_files_share_are_read_once() {
        let (world, reads) = (World::new(), Arc::new(AtomicUsize::new(0)));
        let told = reads.clone();
        let repository = world.seen_by(
            "a",
            Some(Arc::new(move || {
                told.fetch_add(1, Ordering::Relaxed);
            })),
        );
        let mut writer = Writer::new(repository.clone(), CancellationToken::new()).unwrap();
        let mut sink = SourceWriter::new(&mut writer, "files", "files", b"/x", None);
        sink.push(Entry { kind: Kind::Directory, ..Entry::default() }).unwrap();
        let mut contents = Vec::new();
        let mut push = |bytes: Vec<u8>| {
            let path = format!("{:04}", contents.len()).into_bytes();
            sink.push_small(Entry { path, kind: Kind::File, ..Entry::default() }, &bytes).unwrap();
            contents.push(bytes);
        };
        // More than is kept of what was fetched; then the short ones again, each in another chunk than the one before.
        for n in 0..300 {
            push(noise(120_000, n));
            push(noise(500, 1000 + n));
        }
        for n in 0..300 {
            push(noise(500, 1000 + n * 101 % 300));
        }
        let source = sink.finish("{}".into()).unwrap().source;
        writer.flush().unwrap();
        let manifest = manifest(&repository, vec![source]);
        let stream = |only: Option<&HashSet<Vec<u8>>>| {
            reads.store(0, Ordering::Relaxed);
            let (mut found, cancel) = (Vec::new(), CancellationToken::new());
            let wanted =
                Wanted { paths: &[], only, skip: 0, sent: None, is_patient: false, in_order: false, frames: false, repeated: None };
            let all = with_ops(&repository, &manifest, &wanted, &cancel, |ops| {
                for op in ops {
                    if let Op::Entry(header, parts) = op?
                        && header.kind == EntryKind::File
                    {
                        let mut bytes = Vec::new();
                        parts.iter().try_for_each(|part| part.append_to(&mut bytes))?;
                        found.push(bytes);
                    }
                }
                Ok(())
            });
            assert!(all.is_ok());
            assert!(found == contents);
            reads.load(Ordering::Relaxed)
        };
        let every = (0..900).map(|n| format!("{n:04}").into_bytes()).chain([Vec::new()]).collect();
        // Of single entries it is not looked before which contents they share.
        let (looked, not_looked) = (stream(None), stream(Some(&every)));
        assert!(looked * 3 < not_looked, "{looked} reads, and {not_looked} without looking first");
    }
}
