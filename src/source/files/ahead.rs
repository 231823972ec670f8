//! The walk goes ahead of the capture: a thread of its own lists directories and looks at what is in them, some hundred names ahead.
//!
//! Where there is nothing to compare with (a first backup), small files are read ahead, too, by that thread and, while it would wait for it, by the
//! capture: reading a small file is half a dozen system calls, and for a million of them one processor is not enough. Only what went without any
//! trouble is taken from there; all else (an error, a file that changed meanwhile, several names) the capture looks at itself when it comes to it.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;

use rustix::fs::{FileType, Stat};
use tokio_util::sync::CancellationToken;

use super::read::{append, is_other, open_file, xattrs_of_file};
use super::walk::{Found, Item, Look, Walk, name_of};
use crate::source::SourceError;

/// Items that are handed over together.
const BLOCK: usize = 16;
/// Blocks ahead of the capture. Each item may hold a descriptor: at most 160 in all.
const WINDOW: usize = 8;
/// Blocks that wait to be read before the walk goes on.
const UNREAD: usize = 2;
/// A longer file is opened at most: the capture reads it to where it belongs.
const AHEAD_BYTES: u64 = 4096;
/// Files of a block that are handed over opened.
const MAX_OPENED: usize = 4;

/// A file that was read, and was the same before and after.
pub(super) struct ReadAhead {
    pub stat: Stat,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where in the block's bytes.
    pub contents: Range<usize>,
}

/// Some items, in path order.
#[derive(Default)]
pub(super) struct Block {
    pub items: Vec<Item>,
    /// Contents of files that were read.
    pub bytes: Vec<u8>,
    /// Names that a rule left out.
    pub excluded: u64,
}

enum Slot {
    Unread(Block),
    Reading,
    Done(Block),
}

/// What the two threads share.
pub(super) struct Ahead<'a> {
    /// The walk, until its thread has taken it.
    walk: Mutex<Option<Walk<'a>>>,
    reads: bool,
    cancel: &'a CancellationToken,
    state: Mutex<State>,
    /// The capture has made room.
    room: Condvar,
    /// There is something for the capture.
    ready: Condvar,
}

#[derive(Default)]
struct State {
    window: VecDeque<Slot>,
    /// The number of the window's first block.
    first: u64,
    /// The walk is through.
    ended: bool,
    /// The walk's thread will add nothing any more.
    gone: bool,
    /// The capture wants nothing any more.
    stop: bool,
    /// Who waits.
    walk_waits: bool,
    capture_waits: bool,
}

impl<'a> Ahead<'a> {
    /// `reads`: small files too, when the listing calls them files.
    pub fn new(walk: Walk<'a>, reads: bool, cancel: &'a CancellationToken) -> Self {
        let state = Mutex::default();
        Self { walk: Mutex::new(Some(walk)), reads, cancel, state, room: Condvar::new(), ready: Condvar::new() }
    }

    /// Sends the walk ahead. Without a thread of its own it goes step by step with the capture.
    pub fn start<'s>(&'s self, scope: &'s Scope<'s, '_>) -> Capturing<'s, 'a> {
        let spawned = std::thread::Builder::new().name("walk".into()).spawn_scoped(scope, || {
            let _gone = Gone(self);
            if let Some(walk) = self.take_walk() {
                self.go(walk);
            }
        });
        Capturing { ahead: self, own: if spawned.is_err() { self.take_walk() } else { None } }
    }

    fn take_walk(&self) -> Option<Walk<'a>> {
        self.walk.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn go(&self, mut walk: Walk<'_>) {
        let mut state = self.lock();
        while !state.stop && !self.cancel.is_cancelled() {
            let unread = state.window.iter().filter(|slot| matches!(slot, Slot::Unread(_))).count();
            let room = !state.ended && state.window.len() < WINDOW;
            if room && (unread < UNREAD || !self.reads) {
                drop(state);
                let (block, ended) = walk_block(&mut walk);
                state = self.lock();
                state.ended = ended && !self.cancel.is_cancelled();
                state.window.push_back(if self.reads { Slot::Unread(block) } else { Slot::Done(block) });
                self.tell_capture(&state);
            } else if self.reads && unread > 0 {
                state = self.read_next(state);
                self.tell_capture(&state);
            } else if state.ended {
                break;
            } else {
                state.walk_waits = true;
                state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.walk_waits = false;
            }
        }
    }

    fn tell_capture(&self, state: &State) {
        if state.capture_waits {
            self.ready.notify_one();
        }
    }

    /// Reads the first block that is still to be read.
    fn read_next<'s>(&'s self, mut state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        let first = state.first;
        for (number, slot) in (first..).zip(state.window.iter_mut()) {
            match std::mem::replace(slot, Slot::Reading) {
                Slot::Unread(mut block) => {
                    drop(state);
                    read_block(&mut block);
                    state = self.lock();
                    // What is being read is not taken away, and nothing before it is added.
                    let at = (number - state.first) as usize;
                    if let Some(slot) = state.window.get_mut(at) {
                        *slot = Slot::Done(block);
                    }
                    break;
                }
                other => *slot = other,
            }
        }
        state
    }

    fn next(&self) -> Result<Option<Block>, SourceError> {
        let mut state = self.lock();
        loop {
            match state.window.front() {
                Some(Slot::Reading) if state.window.iter().any(|slot| matches!(slot, Slot::Unread(_))) => {
                    state = self.read_next(state);
                    continue;
                }
                Some(Slot::Unread(_) | Slot::Done(_)) => {
                    let slot = state.window.pop_front();
                    state.first += 1;
                    if state.walk_waits && state.window.len() <= WINDOW / 2 {
                        self.room.notify_one();
                    }
                    if let Some(Slot::Unread(block) | Slot::Done(block)) = slot {
                        return Ok(Some(block));
                    }
                }
                None if state.ended => return Ok(None),
                // What is being read now is so by the walk's thread, which is gone.
                None | Some(Slot::Reading) if state.gone => {
                    return Err(match self.cancel.is_cancelled() {
                        true => SourceError::Cancelled,
                        false => SourceError::Failed("the walk ended before it was through; this is a bug".into()),
                    });
                }
                _ => {}
            }
            state.capture_waits = true;
            state = self.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.capture_waits = false;
        }
    }
}

/// The capture's end. When it is dropped the walk's thread ends.
pub(super) struct Capturing<'s, 'a> {
    ahead: &'s Ahead<'a>,
    own: Option<Walk<'a>>,
}

impl Capturing<'_, '_> {
    /// The next items; None when there are no more.
    pub fn next(&mut self) -> Result<Option<Block>, SourceError> {
        let Some(walk) = &mut self.own else { return self.ahead.next() };
        let (block, ended) = walk_block(walk);
        match ended && block.items.is_empty() && block.excluded == 0 {
            true if self.ahead.cancel.is_cancelled() => Err(SourceError::Cancelled),
            true => Ok(None),
            false => Ok(Some(block)),
        }
    }
}

impl Drop for Capturing<'_, '_> {
    fn drop(&mut self) {
        self.ahead.lock().stop = true;
        self.ahead.room.notify_one();
    }
}

/// Says at the end of the walk's thread, however it ends, that there is none any more.
struct Gone<'s, 'a>(&'s Ahead<'a>);

impl Drop for Gone<'_, '_> {
    fn drop(&mut self) {
        self.0.lock().gone = true;
        self.0.ready.notify_one();
    }
}

/// The next items of a walk, and whether they are its last.
fn walk_block(walk: &mut Walk<'_>) -> (Block, bool) {
    let mut block = Block { items: Vec::with_capacity(BLOCK), ..Block::default() };
    let mut ended = false;
    while block.items.len() < BLOCK && !ended {
        match walk.next() {
            Some(item) => block.items.push(item),
            None => ended = true,
        }
    }
    block.excluded = walk.take_excluded();
    (block, ended)
}

/// Reads what the listing calls files.
fn read_block(block: &mut Block) {
    let mut opened = 0;
    for Item { path, found } in &mut block.items {
        if let Found::Other { parent, look } = found
            && matches!(look, Look::Listed)
            && opened < MAX_OPENED
            && let Some(read) = read_file(parent, name_of(path), &mut block.bytes)
        {
            opened += usize::from(matches!(read, Look::Opened(..)));
            *look = read;
        }
    }
}

/// Opens a file and reads it, if it is short and has one name; None where anything about it is not as expected.
fn read_file(parent: &OwnedFd, name: &[u8], bytes: &mut Vec<u8>) -> Option<Look> {
    let fd = open_file(parent.as_fd(), name).ok()?;
    let stat = rustix::fs::fstat(&fd).ok()?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return None;
    }
    if stat.st_nlink != 1 || stat.st_size as u64 > AHEAD_BYTES {
        return Some(Look::Opened(fd, stat));
    }
    let start = bytes.len();
    let whole = append(&fd, bytes, stat.st_size as usize).is_ok_and(|n| n as u64 == stat.st_size as u64);
    let same = rustix::fs::fstat(&fd).is_ok_and(|after| !is_other(&stat, &after));
    let (xattrs, errors) = xattrs_of_file(&fd);
    if whole && same && errors.is_empty() {
        return Some(Look::Read(ReadAhead { stat, xattrs, contents: start..bytes.len() }));
    }
    bytes.truncate(start);
    Some(Look::Opened(fd, stat))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use ignore::gitignore::Gitignore;
    use rustix::fs::Mode;

    use super::super::walk::{DIRECTORY_FLAGS, Rules};
    use super::*;

    /// Directories of many lengths, and more files than fit into the window.
    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (d, files) in [0, 1, 15, 16, 17, 300].into_iter().enumerate() {
            let path = dir.path().join(format!("d{d}/below"));
            fs::create_dir_all(&path).unwrap();
            for f in 0..files {
                fs::write(path.join(format!("f{f}")), vec![b'x'; f % 42 * 100]).unwrap();
            }
        }
        dir
    }

    fn walk<'a>(root: &Path, excludes: &'a Gitignore, cancel: &'a CancellationToken) -> Walk<'a> {
        let fd = rustix::fs::open(root, DIRECTORY_FLAGS, Mode::empty()).unwrap();
        let rules = Rules { excludes, one_file_system: false, exclude_caches: false, wanted: None };
        let mut walk = Walk::begin(fd, rules, cancel).map(|(walk, _)| walk).unwrap();
        walk.trust_listing();
        walk
    }

    fn paths(capturing: &mut Capturing<'_, '_>) -> Vec<(Vec<u8>, Option<usize>)> {
        let mut paths = Vec::new();
        while let Some(block) = capturing.next().unwrap() {
            for Item { path, found } in block.items {
                let read = match found {
                    Found::Other { look: Look::Read(read), .. } => {
                        assert_eq!(block.bytes[read.contents.clone()].len() as i64, read.stat.st_size);
                        Some(read.contents.len())
                    }
                    _ => None,
                };
                paths.push((path, read));
            }
        }
        paths
    }

    #[test]
    fn with_and_without_a_thread_all_comes_in_order() {
        let dir = tree();
        let (excludes, cancel) = (Gitignore::empty(), CancellationToken::new());
        let inline = Ahead::new(walk(dir.path(), &excludes, &cancel), true, &cancel);
        let mut inline = Capturing { own: inline.take_walk(), ahead: &inline };
        let names: Vec<Vec<u8>> = paths(&mut inline).into_iter().map(|(path, _)| path).collect();
        assert_eq!(names.len(), 6 * 2 + 349);
        let mut read = 0;
        for reads in [false, true] {
            let ahead = Ahead::new(walk(dir.path(), &excludes, &cancel), reads, &cancel);
            std::thread::scope(|scope| {
                let mut capturing = ahead.start(scope);
                if reads {
                    // So that the walk's thread has come as far as it may.
                    while ahead.lock().window.iter().filter(|slot| matches!(slot, Slot::Done(_))).count() < WINDOW {
                        std::thread::yield_now();
                    }
                }
                let found = paths(&mut capturing);
                assert!(found.iter().map(|(path, _)| path).eq(&names));
                read = found.iter().filter(|(_, read)| read.is_some()).count();
                assert!(found.iter().all(|(_, read)| read.is_none_or(|n| n as u64 <= AHEAD_BYTES)));
                assert!(matches!(capturing.next(), Ok(None)), "the end stays the end");
            });
            assert_eq!(read > 0, reads);
        }
        assert!(read >= 50, "what was in the window was read: {read}");
    }

    #[test]
    fn whoever_ends_early_waits_for_nobody() {
        let dir = tree();
        let (excludes, cancel) = (Gitignore::empty(), CancellationToken::new());
        for blocks in [0, 1, 3] {
            let ahead = Ahead::new(walk(dir.path(), &excludes, &cancel), true, &cancel);
            std::thread::scope(|scope| {
                let mut capturing = ahead.start(scope);
                for _ in 0..blocks {
                    assert!(capturing.next().unwrap().is_some());
                }
            });
            assert!(ahead.lock().gone);
        }
        let ahead = Ahead::new(walk(dir.path(), &excludes, &cancel), true, &cancel);
        // Its thread came to an end while it read.
        let broken = Ahead::new(walk(dir.path(), &excludes, &cancel), true, &cancel);
        *broken.lock() = State { window: [Slot::Reading].into(), gone: true, ..State::default() };
        assert!(matches!(broken.next(), Err(SourceError::Failed(_))));
        let ended = std::thread::scope(|scope| {
            let mut capturing = ahead.start(scope);
            capturing.next().unwrap();
            cancel.cancel();
            loop {
                match capturing.next() {
                    Ok(Some(_)) => {}
                    Ok(None) => return Ok(()),
                    Err(e) => return Err(e),
                }
            }
        });
        assert!(matches!(ended, Err(SourceError::Cancelled)), "half a walk is not a whole one");
    }
}
