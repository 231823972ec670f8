//! The writer of a restore: frames from the daemon become files beneath one directory, with the caller's own rights.
//!
//! Every path is opened beneath that directory and through no symlink ([`open_beneath`]), symlinks and hard
//! links are made last, and nothing that exists is replaced unless told so. The reading thread makes directories and
//! hands files to a few writing threads; directories get their times at the end.

mod beneath;
mod long_file;
mod memory;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use data_encoding::BASE64;
use keepd_protocol::model::{EntryKind, escape};
use keepd_protocol::restore::{EntryHeader, Frame, FrameReader, Summary};
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

pub use crate::beneath::open_beneath;
use crate::long_file::{Block, LONG_BYTES, LongFile};
use crate::memory::Held;
pub use crate::memory::{Memory, Offer};

/// Warnings told one by one.
const MAX_WARNINGS: usize = 20;
/// Frames that wait for one writing thread, and the bytes that wait for all of them (blocks are counted by themselves).
const QUEUE: usize = 1024;
const QUEUE_BYTES: usize = 32 << 20;
/// After so many bytes what was written is sent on to the disk; a file takes whole blocks of it.
const FLUSH_BYTES: u64 = 128 << 20;
const DISK_BLOCK: u64 = 4 << 10;
/// Files that one thread writes in a row.
const ROW: usize = 64;
/// Blocks of long files' contents, 4 MiB each: what is read ahead of the disk.
const BLOCKS: u64 = 8;
/// A piece of a long file that follows nothing and is shorter is not worth a block.
const SHORT_BYTES: usize = 64 << 10;

#[derive(Default)]
pub struct Options {
    pub overwrite: bool,
    pub numeric_owner: bool,
    /// Memory that was lent to the sender.
    pub memory: Option<Memory>,
}

/// What a restore did.
#[derive(Debug, Default)]
pub struct Outcome {
    pub entries: u64,
    pub bytes: u64,
    pub warnings: Vec<String>,
    pub warnings_total: u64,
    /// What could not be written, each with why, when that was to be borne.
    pub lost: Vec<String>,
}

#[derive(Debug)]
pub struct RestoreError(pub String);

impl From<String> for RestoreError {
    fn from(text: String) -> Self {
        Self(text)
    }
}

type Result<T, E = RestoreError> = std::result::Result<T, E>;

/// What could not be done with one entry, and what the system said of it; None where it is the stream that is wrong.
struct Trouble {
    text: String,
    errno: Option<Errno>,
}

impl Trouble {
    fn of(text: String, error: &io::Error) -> Self {
        Self { text: format!("{text}: {error}"), errno: Errno::from_io_error(error) }
    }

    /// Whether the next entry would meet the same: the disk is full, or breaks, or this process has no more of something.
    fn is_of_all(&self) -> bool {
        const ALL: [Errno; 7] = [Errno::NOSPC, Errno::DQUOT, Errno::IO, Errno::ROFS, Errno::MFILE, Errno::NFILE, Errno::NOMEM];
        self.errno.is_none_or(|errno| ALL.contains(&errno))
    }
}

impl From<RestoreError> for Trouble {
    fn from(RestoreError(text): RestoreError) -> Self {
        Self { text, errno: None }
    }
}

impl From<Trouble> for RestoreError {
    fn from(trouble: Trouble) -> Self {
        Self(trouble.text)
    }
}

/// Names what the system refused.
fn refused(text: String) -> impl FnOnce(Errno) -> Trouble {
    move |errno| Trouble { text: format!("{text}: {errno}"), errno: Some(errno) }
}

/// Numbers of users or groups by name; None where this machine does not know the name.
type Ids = HashMap<String, Option<u32>>;

/// State that the threads share.
struct Shared {
    root: OwnedFd,
    options: Options,
    euid: u32,
    ids: Mutex<(Ids, Ids)>,
    warnings: Mutex<(Vec<String>, u64)>,
    /// What could not be written; None where nothing may be.
    lost: Option<Mutex<Vec<String>>>,
    error: Mutex<Option<String>>,
    stop: AtomicBool,
    /// The writing threads are done.
    written: AtomicBool,
    bytes: AtomicU64,
    /// What was written takes so much of the disk, about.
    on_disk: AtomicU64,
    /// Bytes that wait to be written; a thread that stops goes on taking them, so that nobody waits for ever.
    waiting: Mutex<usize>,
    room: Condvar,
    /// Blocks that were written, for the next contents.
    blocks: (Sender<Block>, Receiver<Block>),
    blocks_made: AtomicU64,
}

enum Work {
    Whole(Box<EntryHeader>, Vec<u8>, Vec<u8>),
    Begin(Box<EntryHeader>, Vec<u8>),
    Data {
        entry: u64,
        offset: u64,
        bytes: Vec<u8>,
    },
    /// More of it, in memory that goes back to the pool.
    Block {
        entry: u64,
        block: Block,
    },
    /// More of it, in lent memory.
    Shared {
        entry: u64,
        offset: u64,
        held: Held,
    },
    End {
        entry: u64,
    },
    Lost {
        entry: u64,
    },
}

impl Work {
    /// What it holds of the memory that [`QUEUE_BYTES`] bounds.
    fn bytes(&self) -> usize {
        match self {
            Work::Whole(_, path, contents) => path.len() + contents.len(),
            Work::Data { bytes, .. } => bytes.len(),
            Work::Begin(..) | Work::Block { .. } | Work::Shared { .. } | Work::End { .. } | Work::Lost { .. } => 0,
        }
    }
}

/// Reads the stream and writes it beneath `to`.
pub fn write(input: impl Read, to: &Path, options: Options, progress: &dyn Fn(u64, u64)) -> Result<Outcome> {
    write_to(input, to, options, false, progress)
}

/// Like [`write`], past entries that cannot be written there while others can: they are lost and named.
pub fn write_what_can_be(input: impl Read, to: &Path, options: Options, progress: &dyn Fn(u64, u64)) -> Result<Outcome> {
    write_to(input, to, options, true, progress)
}

fn write_to(input: impl Read, to: &Path, options: Options, is_patient: bool, progress: &dyn Fn(u64, u64)) -> Result<Outcome> {
    match std::fs::create_dir(to) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(format!("cannot make {}: {e}", to.display()).into()),
        _ => {}
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(to, flags, Mode::empty()).map_err(|e| format!("cannot open the directory {}: {e}", to.display()))?;
    write_all(input, root, options, is_patient, progress).map_err(|e| match e {
        RestoreError(text) if text.starts_with(UNSYNCED) => RestoreError(format!("{}: {text}", to.display())),
        other => other,
    })
}

const UNSYNCED: &str = "what was written could not be synced to the disk";

/// Reads the stream and writes it beneath an open directory, wherever that is called by now.
pub fn write_beneath(input: impl Read, root: OwnedFd, options: Options, progress: &dyn Fn(u64, u64)) -> Result<Outcome> {
    write_all(input, root, options, false, progress)
}

fn write_all(input: impl Read, root: OwnedFd, options: Options, is_patient: bool, progress: &dyn Fn(u64, u64)) -> Result<Outcome> {
    let shared = Arc::new(Shared {
        root,
        options,
        euid: rustix::process::geteuid().as_raw(),
        ids: Mutex::default(),
        warnings: Mutex::default(),
        lost: is_patient.then(Mutex::default),
        error: Mutex::default(),
        stop: AtomicBool::new(false),
        written: AtomicBool::new(false),
        bytes: AtomicU64::new(0),
        on_disk: AtomicU64::new(0),
        waiting: Mutex::default(),
        room: Condvar::new(),
        blocks: unbounded(),
        blocks_made: AtomicU64::new(0),
    });
    let threads = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 4);
    let mut late = Late::default();
    let summary = std::thread::scope(|scope| {
        let mut queues: Vec<Sender<Work>> = Vec::new();
        let mut workers = Vec::new();
        for _ in 0..threads {
            let (sender, receiver) = bounded(QUEUE);
            let shared = shared.clone();
            workers.push(scope.spawn(move || shared.work(&receiver)));
            queues.push(sender);
        }
        let flusher = scope.spawn(|| shared.flush_along());
        let read = read_all(input, &shared, &queues, &mut late, progress);
        if read.is_err() {
            shared.stop.store(true, Ordering::Release);
        }
        drop(queues);
        for worker in workers {
            if worker.join().is_err() {
                shared.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| "a writing thread panicked".into());
            }
        }
        shared.written.store(true, Ordering::Release);
        flusher.thread().unpark();
        read
    });
    if let Some(error) = shared.error.lock().unwrap_or_else(PoisonError::into_inner).take() {
        return Err(error.into());
    }
    let (summary, entries) = summary?;
    if (summary.entries, summary.bytes) != (entries, shared.bytes.load(Ordering::Acquire)) {
        return Err(format!(
            "{entries} entries and {} bytes came, {} and {} were sent",
            shared.bytes.load(Ordering::Acquire),
            summary.entries,
            summary.bytes
        )
        .into());
    }
    late.finish(&shared)?;
    // One call for everything: what was restored is on the disk when keepctl says so.
    syncfs(&shared.root).map_err(|e| format!("{UNSYNCED}: {e}"))?;
    let (warnings, warnings_total) = std::mem::take(&mut *shared.warnings.lock().unwrap_or_else(PoisonError::into_inner));
    let lost =
        shared.lost.as_ref().map(|lost| std::mem::take(&mut *lost.lock().unwrap_or_else(PoisonError::into_inner))).unwrap_or_default();
    Ok(Outcome { entries: entries.saturating_sub(lost.len() as u64), bytes: summary.bytes, warnings, warnings_total, lost })
}

/// What is done when all files are there: links, then the times and modes of directories, the deepest first.
#[derive(Default)]
struct Late {
    links: Vec<(EntryHeader, Vec<u8>)>,
    directories: Vec<(EntryHeader, Vec<u8>)>,
}

fn read_all(
    input: impl Read,
    shared: &Arc<Shared>,
    queues: &[Sender<Work>],
    late: &mut Late,
    progress: &dyn Fn(u64, u64),
) -> Result<(Summary, u64)> {
    let mut frames = FrameReader::new(io::BufReader::with_capacity(64 << 10, input));
    let mut long: HashMap<u64, Gathered> = HashMap::new();
    let mut entries = 0u64;
    let mut tops: Vec<Vec<u8>> = Vec::new();
    let stopped = || RestoreError("the writing was stopped".into());
    let hand = |lane: usize, work: Work| {
        shared.wait_for_room(work.bytes());
        queues.get(lane).filter(|_| !shared.stop.load(Ordering::Acquire)).and_then(|q| q.send(work).ok()).ok_or_else(stopped)
    };
    // The files of one directory go to one thread, for two that make files in the same one wait for each other in the kernel; but
    // not too many in a row, for all the others would wait for that thread.
    let (mut lane, mut in_a_row, mut lane_of) = (0, 0, HashMap::new());
    let emptiest = || queues.iter().enumerate().min_by_key(|(_, q)| q.len()).map_or(0, |(at, _)| at);
    loop {
        let frame = frames.next_frame().map_err(damaged)?;
        match frame {
            None => return Err(RestoreError("the stream from keepd ended before its end; what was written so far is not whole".into())),
            Some(Frame::Error(text)) => return Err(RestoreError(text)),
            Some(Frame::Finish(summary)) => return Ok((summary, entries)),
            Some(Frame::Entry(header, contents)) => {
                entries += 1;
                let path = checked(&header)?;
                let top = path.split(|b| *b == b'/').next().unwrap_or_default();
                if !tops.iter().any(|t| t == top) {
                    shared.may_write(top)?;
                    tops.push(top.to_vec());
                }
                if header.kind == EntryKind::File {
                    in_a_row += 1;
                    if in_a_row > ROW {
                        (lane, in_a_row) = (emptiest(), 0);
                    }
                }
                match header.kind {
                    EntryKind::Directory => {
                        in_a_row = ROW;
                        if shared.bear(shared.directory(&path))?.is_some() {
                            late.directories.push((*header, path));
                        }
                    }
                    EntryKind::Symlink | EntryKind::Hardlink => late.links.push((*header, path)),
                    EntryKind::File if header.inline => hand(lane, Work::Whole(header, path, contents))?,
                    EntryKind::File => {
                        if header.size >= LONG_BYTES {
                            long.insert(header.index, Gathered::default());
                        }
                        lane_of.insert(header.index, lane);
                        hand(lane, Work::Begin(header, path))?;
                    }
                }
            }
            Some(Frame::Data { entry, offset, len }) => {
                let lane = lane_of.get(&entry).copied().ok_or_else(unannounced)?;
                match long.get_mut(&entry) {
                    Some(gathered) => gathered.take(&mut frames, offset, len, shared, &mut |work| hand(lane, work), entry)?,
                    None => {
                        let mut bytes = vec![0; len];
                        frames.data(&mut bytes).map_err(damaged)?;
                        hand(lane, Work::Data { entry, offset, bytes })?;
                    }
                }
            }
            Some(Frame::Shared { entry, offset, block, len }) => {
                let lane = lane_of.get(&entry).copied().ok_or_else(unannounced)?;
                let held = shared.options.memory.as_ref().and_then(|memory| memory.take(block, len));
                let held = held.ok_or_else(|| RestoreError(format!("{len} bytes came in block {block} of memory that was not lent")))?;
                if let Some(block) = long.get_mut(&entry).and_then(|gathered| gathered.block.take()) {
                    hand(lane, Work::Block { entry, block })?;
                }
                hand(lane, Work::Shared { entry, offset, held })?;
            }
            Some(frame @ (Frame::End { entry } | Frame::Lost { entry })) => {
                let lane = lane_of.remove(&entry).ok_or_else(unannounced)?;
                if let Some(block) = long.remove(&entry).and_then(|gathered| gathered.block) {
                    hand(lane, Work::Block { entry, block })?;
                }
                hand(lane, if matches!(frame, Frame::End { .. }) { Work::End { entry } } else { Work::Lost { entry } })?;
            }
        }
        progress(entries, shared.bytes.load(Ordering::Relaxed));
    }
}

/// Makes everything on the file system of `root` durable. A debug build that is told to says so by looking up a name there: file systems in user space, as the
/// crash tests have one, are not told by the kernel.
pub fn syncfs(root: impl AsFd) -> rustix::io::Result<()> {
    rustix::fs::syncfs(&root)?;
    #[cfg(debug_assertions)]
    if std::env::var_os("KEEPD_TEST_TELLS_SYNCFS").is_some() {
        let _ = rustix::fs::statat(&root, ".keepd-faultfs-syncfs", AtFlags::empty());
    }
    Ok(())
}

fn damaged(e: io::Error) -> RestoreError {
    RestoreError(format!("what came from keepd is cut off or damaged: {e}"))
}

/// What came of a long file and was not handed on yet.
#[derive(Default)]
struct Gathered {
    block: Option<Block>,
    /// Where the piece that came last ended.
    end: u64,
}

impl Gathered {
    /// Takes one frame's contents. Those that follow one another are gathered; a short piece elsewhere is handed on by itself.
    fn take(
        &mut self,
        frames: &mut FrameReader<impl Read>,
        mut offset: u64,
        mut len: usize,
        shared: &Shared,
        hand: &mut dyn FnMut(Work) -> Result<()>,
        entry: u64,
    ) -> Result<()> {
        if offset != self.end {
            if let Some(block) = self.block.take() {
                hand(Work::Block { entry, block })?;
            }
            self.end = offset.saturating_add(len as u64);
            if len < SHORT_BYTES {
                let mut bytes = vec![0; len];
                frames.data(&mut bytes).map_err(damaged)?;
                return hand(Work::Data { entry, offset, bytes });
            }
        }
        self.end = offset.saturating_add(len as u64);
        while len > 0 {
            let block = match &mut self.block {
                Some(block) => block,
                None => {
                    let block = self.block.insert(shared.block()?);
                    block.begin(offset);
                    block
                }
            };
            let room = block.room();
            let now = len.min(room.len());
            frames.data(room.get_mut(..now).unwrap_or_default()).map_err(damaged)?;
            block.filled(now);
            offset = offset.saturating_add(now as u64);
            len -= now;
            if block.room().is_empty()
                && let Some(block) = self.block.take()
            {
                hand(Work::Block { entry, block })?;
            }
        }
        Ok(())
    }
}

/// A path that names something beneath, and nothing else.
fn checked(header: &EntryHeader) -> Result<Vec<u8>> {
    let path = header.path.to_bytes().map_err(RestoreError)?;
    let odd = |c: &[u8]| c.is_empty() || c == b"." || c == b".." || c.contains(&0);
    match path.split(|b| *b == b'/').any(odd) {
        true => {
            Err(format!("the stream holds the path '{}', which leads elsewhere; nothing more is written", escape(&header.path.path)).into())
        }
        false => Ok(path),
    }
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        None => (b".", path),
        Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..).unwrap_or_default()),
    }
}

fn shown(path: &[u8]) -> String {
    escape(&String::from_utf8_lossy(path))
}

fn announced(open: &mut HashMap<u64, Open>, entry: u64) -> Result<&mut Open> {
    open.get_mut(&entry).ok_or_else(unannounced)
}

fn unannounced() -> RestoreError {
    RestoreError("contents came for a file that was not announced".into())
}

/// A file being written.
struct Open {
    header: Box<EntryHeader>,
    path: Vec<u8>,
    file: LongFile,
    temporary: Option<Vec<u8>>,
    written: u64,
}

impl Shared {
    fn warn(&self, text: String) {
        let mut warnings = self.warnings.lock().unwrap_or_else(PoisonError::into_inner);
        warnings.1 += 1;
        if warnings.0.len() < MAX_WARNINGS {
            warnings.0.push(text);
        }
    }

    /// Names what is lost and goes on, where that is wanted and the rest may be written.
    fn bear<T>(&self, done: Result<T, Trouble>) -> Result<Option<T>> {
        match (done, &self.lost) {
            (Ok(done), _) => Ok(Some(done)),
            (Err(trouble), Some(lost)) if !trouble.is_of_all() => {
                lost.lock().unwrap_or_else(PoisonError::into_inner).push(trouble.text);
                Ok(None)
            }
            (Err(trouble), _) => Err(trouble.into()),
        }
    }

    /// Without --overwrite a source's place must be free or an empty directory.
    fn may_write(&self, top: &[u8]) -> Result<()> {
        if self.options.overwrite {
            return Ok(());
        }
        let refuse =
            |what: &str| RestoreError(format!("{} {what} already; nothing was written (give another --to, or --overwrite)", shown(top)));
        match rustix::fs::statat(&self.root, top, AtFlags::SYMLINK_NOFOLLOW) {
            // What is too long a name for it is not there either.
            Err(Errno::NOENT | Errno::NAMETOOLONG) => Ok(()),
            Err(e) => Err(format!("cannot look at {}: {e}", shown(top)).into()),
            Ok(stat) if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::Directory => Err(refuse("exists")),
            Ok(_) => {
                let fd = self.open_directory(top)?;
                let listed = rustix::fs::Dir::read_from(&fd).map_err(|e| format!("cannot list {}: {e}", shown(top)))?;
                let empty = listed.filter_map(|e| e.ok()).all(|e| matches!(e.file_name().to_bytes(), b"." | b".."));
                if empty { Ok(()) } else { Err(refuse("holds files")) }
            }
        }
    }

    fn open_directory(&self, path: &[u8]) -> Result<OwnedFd, Trouble> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        open_beneath(&self.root, path, flags).map_err(refused(format!("cannot open the directory {} beneath the target", shown(path))))
    }

    fn directory(&self, path: &[u8]) -> Result<(), Trouble> {
        let (parent, name) = split(path);
        let parent = self.open_directory(parent)?;
        // Ours alone until all is written; the real mode comes last.
        match rustix::fs::mkdirat(&parent, name, Mode::RWXU) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => {
                let stat = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(refused(format!("cannot look at {}", shown(path))))?;
                if rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory {
                    return Ok(());
                }
                if !self.options.overwrite {
                    return Err(Trouble { text: format!("{} exists and is no directory", shown(path)), errno: Some(Errno::EXIST) });
                }
                rustix::fs::unlinkat(&parent, name, AtFlags::empty())
                    .and_then(|()| rustix::fs::mkdirat(&parent, name, Mode::RWXU))
                    .map_err(refused(format!("cannot replace {} by a directory", shown(path))))
            }
            Err(e) => Err(refused(format!("cannot make the directory {}", shown(path)))(e)),
        }
    }

    /// One writing thread. An error stops all of them.
    fn work(&self, queue: &Receiver<Work>) {
        let mut open: HashMap<u64, Open> = HashMap::new();
        let mut skipped = HashSet::new();
        let mut parent: Option<(Vec<u8>, OwnedFd)> = None;
        for work in queue {
            let bytes = work.bytes();
            if !self.stop.load(Ordering::Acquire)
                && let Err(RestoreError(text)) = self.step(work, &mut open, &mut skipped, &mut parent)
            {
                self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(text);
                self.stop.store(true, Ordering::Release);
            }
            if bytes > 0 {
                *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) -= bytes;
                self.room.notify_one();
            }
        }
        // What is not whole is not left under its name.
        for (_, unfinished) in open {
            let _ = self.give_up(&unfinished);
        }
    }

    /// Removes what was begun of a file.
    fn give_up(&self, unfinished: &Open) -> Result<(), Trouble> {
        let parent = self.open_directory(split(&unfinished.path).0)?;
        let name = unfinished.temporary.as_deref().unwrap_or(split(&unfinished.path).1);
        rustix::fs::unlinkat(&parent, name, AtFlags::empty())
            .map_err(refused(format!("cannot remove {}, which is not whole", shown(&unfinished.path))))
    }

    /// `skipped` are the files whose contents come and cannot be written.
    fn step(
        &self,
        work: Work,
        open: &mut HashMap<u64, Open>,
        skipped: &mut HashSet<u64>,
        parent: &mut Option<(Vec<u8>, OwnedFd)>,
    ) -> Result<()> {
        match work {
            Work::Whole(header, path, contents) => {
                if contents.len() as u64 != header.size {
                    return Err(format!("{}: {} bytes came where {} were announced", shown(&path), contents.len(), header.size).into());
                }
                let written = self.create(header, path, parent).and_then(|mut file| {
                    self.begun(&mut file, |file| self.put(file, 0, &contents))?;
                    self.close(file, parent)
                });
                self.came(contents.len());
                self.bear(written).map(drop)
            }
            Work::Begin(header, path) => {
                let index = header.index;
                let begun = self.create(header, path, parent).and_then(|mut file| {
                    let set_len = |file: &mut Open| {
                        file.file.set_len(file.header.size).map_err(|e| Trouble::of(format!("cannot write {}", shown(&file.path)), &e))
                    };
                    self.begun(&mut file, set_len)?;
                    Ok(file)
                });
                match self.bear(begun)? {
                    Some(file) => drop(open.insert(index, file)),
                    None => drop(skipped.insert(index)),
                }
                Ok(())
            }
            Work::Data { entry, offset, bytes } => self.more(entry, offset, &bytes, open, skipped),
            Work::Block { entry, block } => {
                let put = self.more(entry, block.offset(), block.bytes(), open, skipped);
                // The reading thread waits for it; nobody does when it is gone.
                let _ = self.blocks.0.send(block);
                put
            }
            Work::Shared { entry, offset, held } => self.more(entry, offset, held.bytes(), open, skipped),
            Work::End { entry } | Work::Lost { entry } if skipped.remove(&entry) => Ok(()),
            Work::End { entry } => {
                let file = open.remove(&entry).ok_or_else(|| RestoreError("a file ended that was not announced".into()))?;
                if !file.header.sparse && file.written != file.header.size {
                    let text = format!("{}: {} bytes came where {} were announced", shown(&file.path), file.written, file.header.size);
                    open.insert(entry, file);
                    return Err(text.into());
                }
                self.bear(self.close(file, parent)).map(drop)
            }
            Work::Lost { entry } => {
                let file = open.remove(&entry).ok_or_else(|| RestoreError("a file ended that was not announced".into()))?;
                Ok(self.give_up(&file)?)
            }
        }
    }

    /// Contents of a file that was begun.
    fn more(&self, entry: u64, offset: u64, bytes: &[u8], open: &mut HashMap<u64, Open>, skipped: &mut HashSet<u64>) -> Result<()> {
        if !skipped.contains(&entry) {
            let file = announced(open, entry)?;
            let put = self.put(file, offset, bytes);
            if self.bear(put)?.is_none()
                && let Some(file) = open.remove(&entry)
            {
                skipped.insert(entry);
                self.give_up(&file)?;
            }
        }
        self.came(bytes.len());
        Ok(())
    }

    /// Does something with a new file, of which nothing stays when that fails.
    fn begun(&self, file: &mut Open, then: impl FnOnce(&mut Open) -> Result<(), Trouble>) -> Result<(), Trouble> {
        then(file).inspect_err(|_| drop(self.give_up(file)))
    }

    fn came(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::AcqRel);
        self.on_disk.fetch_add((bytes as u64).next_multiple_of(DISK_BLOCK).max(DISK_BLOCK), Ordering::Relaxed);
    }

    /// Counts what is about to be queued, when there is room for it.
    fn wait_for_room(&self, bytes: usize) {
        if bytes > 0 {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            while *waiting > 0 && *waiting + bytes > QUEUE_BYTES {
                waiting = self.room.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
            *waiting += bytes;
        }
    }

    /// Has what was written go to the disk while more is written, so that little is left for the end.
    fn flush_along(&self) {
        let mut flushed = 0;
        while !self.written.load(Ordering::Acquire) {
            std::thread::park_timeout(std::time::Duration::from_millis(200));
            let bytes = self.on_disk.load(Ordering::Relaxed);
            if bytes - flushed >= FLUSH_BYTES {
                flushed = bytes;
                // Whether all arrived is asked at the end.
                let _ = syncfs(&self.root);
            }
        }
    }

    /// Memory for the next contents: made anew up to a limit, then what the writing threads give back.
    fn block(&self) -> Result<Block> {
        if self.blocks_made.fetch_add(1, Ordering::Relaxed) < BLOCKS {
            return Ok(Block::new());
        }
        loop {
            match self.blocks.1.recv_timeout(std::time::Duration::from_millis(100)) {
                Ok(block) => return Ok(block),
                Err(_) if self.stop.load(Ordering::Acquire) => return Err(RestoreError("the writing was stopped".into())),
                Err(_) => {}
            }
        }
    }

    fn put(&self, file: &mut Open, offset: u64, bytes: &[u8]) -> Result<(), Trouble> {
        if offset.saturating_add(bytes.len() as u64) > file.header.size {
            return Err(RestoreError(format!("{}: contents came beyond its end", shown(&file.path))).into());
        }
        file.file.write_all_at(bytes, offset).map_err(|e| Trouble::of(format!("cannot write {}", shown(&file.path)), &e))?;
        file.written += bytes.len() as u64;
        Ok(())
    }

    /// The parent's descriptor, kept for the next file in the same directory.
    fn parent<'p>(&self, path: &[u8], kept: &'p mut Option<(Vec<u8>, OwnedFd)>) -> Result<&'p OwnedFd, Trouble> {
        let (parent, _) = split(path);
        if kept.as_ref().is_none_or(|(p, _)| p != parent) {
            *kept = None;
        }
        match kept {
            Some((_, fd)) => Ok(fd),
            None => {
                let fd = self.open_directory(parent)?;
                Ok(&kept.insert((parent.to_vec(), fd)).1)
            }
        }
    }

    /// Creates a file, never over an existing one; with --overwrite under another name first.
    fn create(&self, header: Box<EntryHeader>, path: Vec<u8>, kept: &mut Option<(Vec<u8>, OwnedFd)>) -> Result<Open, Trouble> {
        let parent = self.parent(&path, kept)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let name = split(&path).1;
        let temporary = self.options.overwrite.then(|| format!(".keepctl-{}-{}", std::process::id(), header.index).into_bytes());
        let mode = self.first_mode(&header);
        let fd = rustix::fs::openat(parent, temporary.as_deref().unwrap_or(name), flags, mode).map_err(|e| match e {
            Errno::EXIST => Trouble { text: format!("{} exists already and is not overwritten", shown(&path)), errno: Some(e) },
            e => refused(format!("cannot make {}", shown(&path)))(e),
        })?;
        Ok(Open { header, path, file: LongFile::new(File::from(fd)), temporary, written: 0 })
    }

    fn close(&self, open: Open, kept: &mut Option<(Vec<u8>, OwnedFd)>) -> Result<(), Trouble> {
        let file = open.file.finish();
        self.describe(&file, &open.header, &open.path);
        if let Some(temporary) = &open.temporary {
            let parent = self.parent(&open.path, kept)?;
            rustix::fs::renameat(parent, temporary.as_slice(), parent, split(&open.path).1).map_err(|e| {
                let _ = rustix::fs::unlinkat(parent, temporary.as_slice(), AtFlags::empty());
                refused(format!("cannot put {} into its place", shown(&open.path)))(e)
            })?;
        }
        Ok(())
    }

    /// The mode a file is to have in the end, of an owner that could be set.
    fn last_mode(&self, header: &EntryHeader) -> u32 {
        // Set-user-ID for another owner than meant would hand out rights.
        let foreign = self.euid != 0 && header.uid != self.euid;
        header.mode & if foreign { 0o1777 } else { 0o7777 }
    }

    /// The mode a file is made with: the one it is to have where whoever it belongs to makes no difference for it, else one that lets nobody in.
    fn first_mode(&self, header: &EntryHeader) -> Mode {
        let last = self.last_mode(header) & 0o777;
        let (group, all) = (last >> 3 & 7, last & 7);
        let is_for_all_alike = group == all && all & 0o2 == 0 && header.xattrs.is_empty();
        if is_for_all_alike { Mode::from_raw_mode(last) } else { Mode::RUSR | Mode::WUSR }
    }

    /// Attributes, owner, mode, times, in this order; what is not permitted is a warning. What a new file has already is not set again.
    fn describe(&self, fd: &impl AsFd, header: &EntryHeader, path: &[u8]) {
        let set_xattrs = |after_owner: bool| {
            for (name, value) in &header.xattrs {
                let value = BASE64.decode(value.as_bytes()).unwrap_or_default();
                let name = name.to_bytes().unwrap_or_default();
                // A new owner takes a file its capabilities.
                if name.starts_with(b"security.") == after_owner
                    && let Err(e) = rustix::fs::fsetxattr(fd, name.as_slice(), &value, XattrFlags::empty())
                {
                    self.warn(format!("{}: the attribute {} could not be set: {e}", shown(path), shown(&name)));
                }
            }
        };
        set_xattrs(false);
        // An access control list among the attributes has changed the mode.
        let mut now = rustix::fs::fstat(fd).ok();
        let owned = match self.owner(header) {
            Some((uid, gid)) if now.is_none_or(|now| (now.st_uid, now.st_gid) != (uid, gid)) => {
                // It may take a file its set-user-ID.
                now = None;
                rustix::fs::fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            }
            _ => Ok(()),
        };
        if let Err(e) = owned {
            self.warn(format!("{}: its owner could not be set: {e}", shown(path)));
        }
        set_xattrs(true);
        let bits = self.last_mode(header) & if owned.is_err() { 0o1777 } else { 0o7777 };
        if now.is_none_or(|now| now.st_mode & 0o7777 != bits)
            && let Err(e) = rustix::fs::fchmod(fd, Mode::from_raw_mode(bits))
        {
            self.warn(format!("{}: its mode could not be set: {e}", shown(path)));
        }
        if let Err(e) = rustix::fs::futimens(fd, &times(header)) {
            self.warn(format!("{}: its times could not be set: {e}", shown(path)));
        }
    }

    /// Whom it shall belong to: by name where this machine knows the name, else by number; only root can give files away.
    fn owner(&self, header: &EntryHeader) -> Option<(u32, u32)> {
        if self.euid != 0 {
            return None;
        }
        if self.options.numeric_owner {
            return Some((header.uid, header.gid));
        }
        fn known(ids: &mut Ids, name: &str, look: impl FnOnce(&str) -> Option<u32>) -> Option<u32> {
            match ids.get(name) {
                Some(id) => *id,
                None => *ids.entry(name.to_owned()).or_insert(look(name)),
            }
        }
        let mut ids = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        let uid = header.user.as_ref().and_then(|name| known(&mut ids.0, name, |name| uzers::get_user_by_name(name).map(|u| u.uid())));
        let gid = header.group.as_ref().and_then(|name| known(&mut ids.1, name, |name| uzers::get_group_by_name(name).map(|g| g.gid())));
        Some((uid.unwrap_or(header.uid), gid.unwrap_or(header.gid)))
    }
}

fn times(header: &EntryHeader) -> Timestamps {
    let time = Timespec { tv_sec: header.mtime_seconds, tv_nsec: i64::from(header.mtime_nanoseconds.min(999_999_999)) };
    Timestamps { last_access: time, last_modification: time }
}

impl Late {
    fn finish(self, shared: &Shared) -> Result<()> {
        for (header, path) in &self.links {
            shared.bear(shared.link(header, path))?;
        }
        // The deepest first, for a parent's time changes when something is made in it, not when its child's mode does.
        for (header, path) in self.directories.iter().rev() {
            if let Some(fd) = shared.bear(shared.open_directory(path))? {
                shared.describe(&fd, header, path);
            }
        }
        Ok(())
    }
}

impl Shared {
    fn link(&self, header: &EntryHeader, path: &[u8]) -> Result<(), Trouble> {
        let (parent, name) = split(path);
        let parent = self.open_directory(parent)?;
        let target = header.target.as_ref().map(|t| t.to_bytes()).transpose().map_err(RestoreError)?.unwrap_or_default();
        let make = || -> Result<(), Errno> {
            if header.kind == EntryKind::Symlink {
                return rustix::fs::symlinkat(target.as_slice(), &parent, name);
            }
            // The first name is opened beneath the target too, and linked by its descriptor.
            let first = open_beneath(&self.root, &target, OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW)?;
            let by_fd = format!("/proc/self/fd/{}", first.as_raw_fd());
            rustix::fs::linkat(CWD, by_fd.as_str(), &parent, name, AtFlags::SYMLINK_FOLLOW)
        };
        let mut made = make();
        if made == Err(Errno::EXIST) && self.options.overwrite {
            made = rustix::fs::unlinkat(&parent, name, AtFlags::empty()).and_then(|()| make());
        }
        made.map_err(refused(format!("cannot make the link {}", shown(path))))?;
        if header.kind == EntryKind::Symlink {
            if let Some((uid, gid)) = self.owner(header) {
                let _ = rustix::fs::chownat(&parent, name, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::SYMLINK_NOFOLLOW);
            }
            let _ = rustix::fs::utimensat(&parent, name, &times(header), AtFlags::SYMLINK_NOFOLLOW);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keepd_protocol::model::BytesPath;
    use keepd_protocol::restore::{BLOCK_BYTES, FrameWriter};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    fn header(index: u64, path: &str, kind: EntryKind, size: u64) -> EntryHeader {
        EntryHeader {
            index,
            path: path.into(),
            kind,
            size,
            mode: 0o640,
            mtime_seconds: 1_000_000_000,
            inline: kind == EntryKind::File,
            ..EntryHeader::default()
        }
    }

    fn directory(index: u64, path: &str) -> EntryHeader {
        EntryHeader { mode: 0o755, inline: false, ..header(index, path, EntryKind::Directory, 0) }
    }

    fn link(index: u64, path: &str, kind: EntryKind, target: &str) -> EntryHeader {
        EntryHeader { target: Some(BytesPath::from(target)), inline: false, ..header(index, path, kind, 0) }
    }

    fn options(overwrite: bool) -> Options {
        Options { overwrite, numeric_owner: true, memory: None }
    }

    fn stream(make: impl FnOnce(&mut FrameWriter<Vec<u8>>), entries: u64, bytes: u64) -> Vec<u8> {
        let mut w = FrameWriter::new(Vec::new());
        make(&mut w);
        w.finish(&Summary { entries, bytes }).unwrap()
    }

    fn run(bytes: &[u8], to: &Path, overwrite: bool) -> Result<Outcome> {
        write(bytes, to, options(overwrite), &|_, _| {})
    }

    /// Puts contents into a block of what was lent, as a sender would.
    fn put(offer: &Offer, block: u32, bytes: &[u8]) {
        let file = File::from(offer.memory.try_clone().unwrap());
        std::os::unix::fs::FileExt::write_all_at(&file, bytes, u64::from(block) * BLOCK_BYTES as u64).unwrap();
    }

    /// What was given back once the writer is gone.
    fn given_back(offer: Offer) -> Vec<u8> {
        let mut numbers = Vec::new();
        File::from(offer.returned).read_to_end(&mut numbers).unwrap();
        numbers.sort_unstable();
        numbers
    }

    #[test]
    fn contents_in_lent_memory_are_written_and_each_block_comes_back() {
        // Not in /tmp, which may be a tmpfs.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (memory, offer) = Memory::offer().unwrap();
        let (first, second) = (vec![3; BLOCK_BYTES], vec![4; 100_001]);
        put(&offer, 3, &first);
        put(&offer, 0, &second);
        let size = (BLOCK_BYTES + 100_001 + 10) as u64;
        let file = EntryHeader { inline: false, ..header(0, "a", EntryKind::File, size) };
        let bytes = stream(
            |w| {
                w.entry(&file, b"").unwrap();
                w.data(0, 0, b"0123456789").unwrap();
                w.shared(0, 10 + BLOCK_BYTES as u64, 0, 100_001).unwrap();
                w.shared(0, 10, 3, BLOCK_BYTES as u32).unwrap();
                w.end(0).unwrap();
            },
            1,
            size,
        );
        let to = dir.path().join("out");
        let options = Options { memory: Some(memory), ..options(false) };
        let outcome = write(bytes.as_slice(), &to, options, &|_, _| {}).unwrap_or_else(|e| panic!("{}", e.0));
        assert_eq!((outcome.entries, outcome.bytes), (1, size));
        assert!(std::fs::read(to.join("a")).unwrap() == [b"0123456789".as_slice(), &first, &second].concat());
        assert_eq!(given_back(offer), [0, 3]);
    }

    #[test]
    fn memory_that_was_not_lent_is_refused_and_blocks_come_back_also_where_writing_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let file = EntryHeader { inline: false, ..header(0, "a", EntryKind::File, 5 << 20) };
        let refused = |block: u32, len: u32, is_lent: bool, name: &str| {
            let bytes = stream(
                |w| {
                    w.entry(&file, b"").unwrap();
                    w.shared(0, 0, block, len).unwrap();
                },
                1,
                u64::from(len),
            );
            let memory = is_lent.then(|| Memory::offer().unwrap().0);
            let to = dir.path().join(name);
            let RestoreError(text) = write(bytes.as_slice(), &to, Options { memory, ..options(false) }, &|_, _| {}).unwrap_err();
            assert!(text.contains("that was not lent"), "{text}");
            assert!(!to.join("a").exists(), "what is not whole does not stay");
        };
        refused(0, 1, false, "none");
        refused(8, 1, true, "beyond");
        refused(8, 0, true, "beyond, and nothing");
        refused(u32::MAX, 1, true, "far beyond");
        refused(0, BLOCK_BYTES as u32 + 1, true, "too long");
        // The file ends before what comes: the sender may still wait for the block.
        let (memory, offer) = Memory::offer().unwrap();
        let bytes = stream(
            |w| {
                w.entry(&file, b"").unwrap();
                for (block, offset) in [(1, 4 << 20), (2, 0), (3, 1 << 20)] {
                    w.shared(0, offset, block, 2 << 20).unwrap();
                }
                w.end(0).unwrap();
            },
            1,
            6 << 20,
        );
        let options = Options { memory: Some(memory), ..options(false) };
        let RestoreError(text) = write(bytes.as_slice(), &dir.path().join("past"), options, &|_, _| {}).unwrap_err();
        assert!(text.contains("contents came beyond its end") || text.contains("was stopped"), "{text}");
        let back = given_back(offer);
        assert!(back.contains(&1) && back.len() <= 3, "{back:?}");
    }

    #[test]
    fn files_links_holes_and_times_come_out() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("out");
        let big = EntryHeader { inline: false, sparse: true, ..header(3, "up/big", EntryKind::File, 5 << 20) };
        let bytes = stream(
            |w| {
                w.entry(&directory(0, "up"), b"").unwrap();
                w.entry(&header(1, "up/a", EntryKind::File, 5), b"hello").unwrap();
                w.entry(&link(2, "up/b", EntryKind::Hardlink, "up/a"), b"").unwrap();
                w.entry(&big, b"").unwrap();
                w.data(3, 4 << 20, &[7; 1 << 20]).unwrap();
                w.data(3, 100, b"here").unwrap();
                w.end(3).unwrap();
                w.entry(&link(4, "up/s", EntryKind::Symlink, "/etc/passwd"), b"").unwrap();
            },
            5,
            5 + (1 << 20) + 4,
        );
        let outcome = run(&bytes, &to, false).unwrap_or_else(|e| panic!("{}", e.0));
        assert_eq!((outcome.entries, outcome.warnings_total), (5, 0));
        assert_eq!(std::fs::read(to.join("up/b")).unwrap(), b"hello");
        let meta = std::fs::metadata(to.join("up/a")).unwrap();
        assert_eq!((meta.nlink(), meta.mode() & 0o7777, meta.mtime()), (2, 0o640, 1_000_000_000));
        let big = std::fs::read(to.join("up/big")).unwrap();
        assert_eq!((&big[100..104], big[99], big[4 << 20], big.len()), (&b"here"[..], 0, 7, 5 << 20));
        assert!(std::fs::metadata(to.join("up/big")).unwrap().blocks() * 512 < 3 << 20, "the hole is a hole");
        assert_eq!(std::fs::read_link(to.join("up/s")).unwrap(), Path::new("/etc/passwd"));
        assert_eq!(std::fs::metadata(to.join("up")).unwrap().mtime(), 1_000_000_000);
        assert!(run(&bytes, &to, false).unwrap_err().0.contains("holds files already"));
        std::fs::write(to.join("up/a"), "changed").unwrap();
        std::fs::write(to.join("up/other"), "stays").unwrap();
        run(&bytes, &to, true).unwrap_or_else(|e| panic!("{}", e.0));
        assert_eq!(std::fs::read(to.join("up/a")).unwrap(), b"hello");
        assert_eq!(std::fs::read(to.join("up/other")).unwrap(), b"stays");
    }

    #[test]
    fn hostile_streams_write_nothing_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        for path in ["../outside/x", "/etc/x", "up/../../outside/x", "up//x", "up/./x", "", "up/x\0y"] {
            let bytes = stream(
                |w| {
                    w.entry(&directory(0, "up"), b"").unwrap();
                    w.entry(&header(1, path, EntryKind::File, 1), b"x").unwrap();
                },
                2,
                1,
            );
            assert!(run(&bytes, &dir.path().join(format!("a{}", path.len())), false).unwrap_err().0.contains("leads elsewhere"), "{path}");
        }
        // A symlink that the directory's owner planted, written through.
        let to = dir.path().join("planted");
        std::fs::create_dir_all(to.join("up")).unwrap();
        std::os::unix::fs::symlink(&outside, to.join("up/sub")).unwrap();
        let bytes = stream(
            |w| {
                w.entry(&directory(0, "up"), b"").unwrap();
                w.entry(&header(1, "up/sub/x", EntryKind::File, 1), b"x").unwrap();
            },
            2,
            1,
        );
        assert!(run(&bytes, &to, true).is_err());
        // A hard link to a file outside.
        std::fs::write(outside.join("secret"), "secret").unwrap();
        for target in ["../outside/secret", "up/sub/secret"] {
            let to = dir.path().join(format!("h{}", target.len()));
            std::fs::create_dir_all(to.join("up")).unwrap();
            std::os::unix::fs::symlink(&outside, to.join("up/sub")).unwrap();
            let bytes = stream(|w| w.entry(&link(0, "up/l", EntryKind::Hardlink, target), b"").unwrap(), 1, 0);
            assert!(run(&bytes, &to, true).is_err(), "{target}");
        }
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(std::fs::read(outside.join("secret")).unwrap(), b"secret");
    }

    #[test]
    fn what_is_not_whole_is_an_error_and_not_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let large = EntryHeader { inline: false, ..header(1, "up/f", EntryKind::File, 1000) };
        let make = |w: &mut FrameWriter<Vec<u8>>| {
            w.entry(&directory(0, "up"), b"").unwrap();
            w.entry(&large, b"").unwrap();
            w.data(1, 0, &[1; 500]).unwrap();
        };
        let whole = stream(
            |w| {
                make(w);
                w.end(1).unwrap();
            },
            2,
            500,
        );
        let cases: Vec<(&str, Vec<u8>)> = vec![
            ("too little", whole),
            ("never ended", {
                let mut w = FrameWriter::new(Vec::new());
                make(&mut w);
                w.error("the daemon gave up").unwrap();
                w.finish(&Summary::default()).unwrap()
            }),
            ("cut off", {
                let bytes = stream(make, 2, 500);
                bytes[..bytes.len() - 30].to_vec()
            }),
        ];
        for (n, (what, bytes)) in cases.into_iter().enumerate() {
            let to = dir.path().join(n.to_string());
            assert!(run(&bytes, &to, false).is_err(), "{what}");
            assert!(!to.join("up/f").exists(), "{what}: half a file was left");
        }
        let beyond = stream(
            |w| {
                make(w);
                w.data(1, 900, &[1; 500]).unwrap();
            },
            2,
            1000,
        );
        assert!(run(&beyond, &dir.path().join("beyond"), false).unwrap_err().0.contains("beyond its end"));
        let lying = stream(|w| w.entry(&header(0, "f", EntryKind::File, 3), b"abc").unwrap(), 1, 4);
        assert!(run(&lying, &dir.path().join("lying"), false).is_err());
    }

    #[test]
    fn set_user_id_of_others_is_dropped_for_those_who_cannot_give_files_away() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let owned = EntryHeader { mode: 0o4755, uid: 12345, gid: 12345, ..header(0, "f", EntryKind::File, 1) };
        let bytes = stream(|w| w.entry(&owned, b"x").unwrap(), 1, 1);
        run(&bytes, &dir.path().join("out"), false).unwrap_or_else(|e| panic!("{}", e.0));
        let meta = std::fs::metadata(dir.path().join("out/f")).unwrap();
        assert_eq!((meta.uid(), meta.permissions().mode() & 0o7777), (12345, 0o4755));
    }

    #[test]
    fn every_mode_and_owner_comes_back_wherever_the_file_is_made() {
        let is_root = rustix::process::geteuid().is_root();
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let modes =
            [0o000, 0o400, 0o444, 0o600, 0o604, 0o640, 0o644, 0o664, 0o666, 0o700, 0o710, 0o755, 0o777, 0o1644, 0o2755, 0o4755, 0o6711];
        let owners: &[(u32, u32)] = if is_root { &[(uid, gid), (12345, gid), (uid, 12345), (12345, 12345)] } else { &[(uid, gid)] };
        let dir = tempfile::tempdir().unwrap();
        // Whatever is made in the second directory is of another group at first.
        for place in ["plain", "of-a-group"] {
            let to = dir.path().join(place);
            std::fs::create_dir(&to).unwrap();
            if place == "of-a-group" && is_root {
                std::os::unix::fs::chown(&to, None, Some(54321)).unwrap();
                std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o2777)).unwrap();
            }
            let cases: Vec<(u32, u32, u32)> = owners.iter().flat_map(|(u, g)| modes.map(|mode| (mode, *u, *g))).collect();
            let bytes = stream(
                |w| {
                    for (n, (mode, uid, gid)) in cases.iter().enumerate() {
                        let of = |path: &str, kind, size| EntryHeader {
                            mode: *mode,
                            uid: *uid,
                            gid: *gid,
                            ..header(2 * n as u64, path, kind, size)
                        };
                        w.entry(&of(&format!("f{n}"), EntryKind::File, 1), b"x").unwrap();
                        w.entry(&EntryHeader { inline: false, ..of(&format!("d{n}"), EntryKind::Directory, 0) }, b"").unwrap();
                    }
                },
                2 * cases.len() as u64,
                cases.len() as u64,
            );
            run(&bytes, &to, false).unwrap_or_else(|e| panic!("{}", e.0));
            for (n, case) in cases.iter().enumerate() {
                for kind in ["f", "d"] {
                    let meta = std::fs::metadata(to.join(format!("{kind}{n}"))).unwrap();
                    assert_eq!((meta.permissions().mode() & 0o7777, meta.uid(), meta.gid()), *case, "{place} {kind}{n}");
                    assert_eq!(meta.mtime(), 1_000_000_000);
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_written_is_lost_alone_where_that_is_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let long = "n".repeat(300);
        let piecewise = |index, path: &str| EntryHeader { inline: false, ..header(index, path, EntryKind::File, 5) };
        let bytes = stream(
            |w| {
                w.entry(&directory(0, "up"), b"").unwrap();
                w.entry(&directory(1, &format!("up/{long}")), b"").unwrap();
                w.entry(&header(2, &format!("up/{long}/f"), EntryKind::File, 5), b"hello").unwrap();
                w.entry(&piecewise(3, &format!("up/p{long}")), b"").unwrap();
                w.data(3, 0, b"hello").unwrap();
                w.end(3).unwrap();
                w.entry(&piecewise(4, &format!("up/q{long}")), b"").unwrap();
                w.lost(4).unwrap();
                w.entry(&link(5, "up/other", EntryKind::Hardlink, &format!("up/p{long}")), b"").unwrap();
                w.entry(&header(6, "up/a", EntryKind::File, 5), b"hello").unwrap();
                w.entry(&header(7, "up/a", EntryKind::File, 5), b"again").unwrap();
                w.entry(&header(8, &format!("{long}/f"), EntryKind::File, 5), b"hello").unwrap();
            },
            9,
            25,
        );
        let to = dir.path().join("out");
        let outcome = write_what_can_be(bytes.as_slice(), &to, options(false), &|_, _| {}).unwrap_or_else(|e| panic!("{}", e.0));
        assert_eq!((outcome.entries, outcome.lost.len()), (2, 7), "{:?}", outcome.lost);
        assert!(outcome.lost.iter().any(|l| l.contains("up/a exists already")), "{:?}", outcome.lost);
        assert_eq!(std::fs::read(to.join("up/a")).unwrap(), b"hello");
        assert_eq!(std::fs::read_dir(to.join("up")).unwrap().count(), 1);
        let RestoreError(text) = run(&bytes, &dir.path().join("strict"), false).unwrap_err();
        assert!(text.contains(&long), "{text}");
    }
}
