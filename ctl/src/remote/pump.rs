//! What both ends of a bridge are made of: a source reads a descriptor and sends it as frames, as far as it has credit; a sink takes frames from its
//! inbox and gives credit for what it wrote. So what nobody takes holds up its own source alone, and all memory is bounded.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::frame::{Frame, Kind, MAX_OPEN, MAX_PAYLOAD, WINDOW, header};

/// Credit goes back in portions of this. The daemon gives up a connection that takes nothing for 5 s: also a slow line carries so much in that time.
const PORTION: usize = MAX_PAYLOAD;

pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a source may still send.
#[derive(Default)]
pub struct Credit {
    state: Mutex<CreditState>,
    changed: Condvar,
}

struct CreditState {
    left: usize,
    stopped: bool,
}

impl Default for CreditState {
    fn default() -> Self {
        Self { left: WINDOW, stopped: false }
    }
}

impl Credit {
    /// Waits until something may be sent; None when nothing may any more.
    fn wait(&self) -> Option<usize> {
        let mut state = locked(&self.state);
        while state.left == 0 && !state.stopped {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        (!state.stopped).then_some(state.left)
    }

    fn spend(&self, n: usize) {
        let mut state = locked(&self.state);
        state.left = state.left.saturating_sub(n);
    }

    fn add(&self, n: usize) -> bool {
        let mut state = locked(&self.state);
        state.left = state.left.saturating_add(n);
        self.changed.notify_all();
        state.left <= WINDOW
    }

    pub fn stop(&self) {
        locked(&self.state).stopped = true;
        self.changed.notify_all();
    }
}

/// What a sink is given.
pub enum Item<D> {
    Bytes(Vec<u8>),
    /// Goes with the bytes that come next.
    Descriptors(Vec<D>),
}

/// How an inbox ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Whole,
    BrokenOff,
}

/// What came and is not written yet.
pub struct Inbox<D> {
    state: Mutex<InboxState<D>>,
    changed: Condvar,
}

struct InboxState<D> {
    queue: VecDeque<Item<D>>,
    /// Bytes that came, less those that credit was given for.
    owed: usize,
    end: Option<End>,
    /// Nobody takes it any more.
    refused: bool,
}

impl<D> Default for Inbox<D> {
    fn default() -> Self {
        let state = InboxState { queue: VecDeque::new(), owed: 0, end: None, refused: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl<D> Inbox<D> {
    /// False: more came than was allowed.
    pub fn push(&self, item: Item<D>) -> bool {
        let mut state = locked(&self.state);
        if state.refused {
            return true;
        }
        if state.end.is_some() {
            return false;
        }
        if let Item::Bytes(bytes) = &item {
            state.owed += bytes.len();
        }
        // Many small ones must not weigh more than few large ones.
        match (state.queue.back_mut(), item) {
            (_, Item::Bytes(more)) if more.is_empty() => {}
            (Some(Item::Bytes(last)), Item::Bytes(more)) if last.len() + more.len() <= MAX_PAYLOAD => last.extend_from_slice(&more),
            (_, item) => state.queue.push_back(item),
        }
        self.changed.notify_all();
        state.owed <= WINDOW
    }

    pub fn end(&self, end: End) {
        locked(&self.state).end.get_or_insert(end);
        self.changed.notify_all();
    }

    /// The next; how it ended when there is none.
    fn next(&self) -> Result<Item<D>, End> {
        let mut state = locked(&self.state);
        loop {
            match (state.queue.pop_front(), state.end) {
                (Some(item), _) => return Ok(item),
                (None, Some(end)) => return Err(end),
                (None, None) => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Takes nothing any more, and waits for the end.
    fn refuse(&self) {
        let mut state = locked(&self.state);
        state.refused = true;
        state.queue.clear();
    }

    fn ended(&self) {
        let mut state = locked(&self.state);
        while state.end.is_none() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn paid(&self, n: usize) {
        let mut state = locked(&self.state);
        state.owed = state.owed.saturating_sub(n);
    }
}

/// A channel (a source and a sink) or a stream (one of them).
pub struct Entry<D> {
    pub credit: Option<Arc<Credit>>,
    pub inbox: Option<Arc<Inbox<D>>>,
    /// Who waits for the connection.
    pub opened: Option<mpsc::Sender<Result<(), (u8, String)>>>,
    pub is_stream: bool,
    /// Until it is forgotten.
    halves: u8,
}

impl<D> Entry<D> {
    pub fn channel(opened: Option<mpsc::Sender<Result<(), (u8, String)>>>) -> Self {
        Self { credit: Some(Arc::default()), inbox: Some(Arc::default()), opened, is_stream: false, halves: 2 }
    }

    /// A stream from here to there.
    pub fn source() -> Self {
        Self { credit: Some(Arc::default()), inbox: None, opened: None, is_stream: true, halves: 1 }
    }

    /// A stream from there to here.
    pub fn sink() -> Self {
        Self { credit: None, inbox: Some(Arc::default()), opened: None, is_stream: true, halves: 1 }
    }
}

struct Table<D> {
    entries: HashMap<u32, Entry<D>>,
    broken: Option<String>,
}

/// One end of a bridge.
pub struct Mux<D> {
    out: Mutex<Option<Box<dyn Write + Send>>>,
    table: Mutex<Table<D>>,
    changed: Condvar,
    /// Not all that went from here came to its place.
    short: AtomicBool,
    /// Called when nothing can be sent any more.
    lost: fn(),
}

impl<D> Mux<D> {
    pub fn new(out: Box<dyn Write + Send>, lost: fn()) -> Self {
        let table = Table { entries: HashMap::new(), broken: None };
        Self { out: Mutex::new(Some(out)), table: Mutex::new(table), changed: Condvar::new(), short: AtomicBool::new(false), lost }
    }

    pub fn send(&self, kind: Kind, id: u32, payload: &[u8]) -> io::Result<()> {
        let mut out = locked(&self.out);
        let out = out.as_mut().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))?;
        let mut bytes = Vec::with_capacity(9 + payload.len());
        bytes.extend_from_slice(&header(kind, id, payload.len()));
        bytes.extend_from_slice(payload);
        out.write_all(&bytes).and_then(|()| out.flush()).inspect_err(|_| (self.lost)())
    }

    /// Hangs up, unless something is just being sent.
    pub fn close(&self) {
        if let Ok(mut out) = self.out.try_lock() {
            drop(out.take());
        }
    }

    /// Makes it known; its two halves, where it has them.
    pub fn add(&self, id: u32, entry: Entry<D>) -> Result<(Arc<Credit>, Arc<Inbox<D>>), String> {
        let halves = (entry.credit.clone().unwrap_or_default(), entry.inbox.clone().unwrap_or_default());
        let mut table = locked(&self.table);
        if let Some(why) = &table.broken {
            return Err(why.clone());
        }
        if table.entries.len() >= MAX_OPEN {
            return Err(format!("more than {MAX_OPEN} channels and streams at once"));
        }
        if table.entries.contains_key(&id) {
            return Err(format!("{id} is open already"));
        }
        table.entries.insert(id, entry);
        Ok(halves)
    }

    /// A half of it is over.
    pub fn finished(&self, id: u32) {
        let mut table = locked(&self.table);
        if let Some(entry) = table.entries.get_mut(&id) {
            entry.halves = entry.halves.saturating_sub(1);
            if entry.halves == 0 {
                table.entries.remove(&id);
                self.changed.notify_all();
            }
        }
    }

    /// Waits until no stream is open any more, or the line is broken: then why.
    pub fn settle(&self) -> Result<(), String> {
        let mut table = locked(&self.table);
        loop {
            match &table.broken {
                Some(why) => return Err(why.clone()),
                None if !table.entries.values().any(|entry| entry.is_stream) => return Ok(()),
                None => table = self.changed.wait(table).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Whether the other side said that it got less than was sent.
    pub fn is_short(&self) -> bool {
        self.short.load(Ordering::Acquire)
    }

    pub fn broken(&self) -> Option<String> {
        locked(&self.table).broken.clone()
    }

    /// The line is gone: everything ends.
    pub fn breaks(&self, why: &str) {
        let mut table = locked(&self.table);
        table.broken.get_or_insert_with(|| why.to_owned());
        for entry in table.entries.values_mut() {
            entry.opened = None;
            if let Some(credit) = &entry.credit {
                credit.stop();
            }
            if let Some(inbox) = &entry.inbox {
                inbox.end(End::BrokenOff);
            }
        }
        self.changed.notify_all();
    }

    pub fn inbox(&self, id: u32) -> Option<Arc<Inbox<D>>> {
        locked(&self.table).entries.get(&id).and_then(|e| e.inbox.clone())
    }

    /// Takes in what both ends know; an error when the other side breaks the rules. Never waits.
    pub fn take(&self, frame: Frame) -> Result<(), String> {
        let mut table = locked(&self.table);
        let id = frame.id;
        let entry = table.entries.get_mut(&id);
        match (frame.kind, entry) {
            (Kind::Data, entry) => {
                let inbox = entry.and_then(|e| e.inbox.as_ref()).ok_or_else(|| format!("data of {id} came, which nobody asked for"))?;
                match inbox.push(Item::Bytes(frame.payload)) {
                    true => Ok(()),
                    false => Err(format!("more data of {id} came than was asked for")),
                }
            }
            (Kind::End, entry) => {
                let inbox = entry.and_then(|e| e.inbox.as_ref()).ok_or_else(|| format!("the end of {id} came, which nobody asked for"))?;
                inbox.end(if frame.payload.first() == Some(&1) { End::BrokenOff } else { End::Whole });
                Ok(())
            }
            // What is closed here may still be spoken of there.
            (Kind::Credit, entry) => {
                let Ok(n) = <[u8; 4]>::try_from(frame.payload.as_slice()).map(u32::from_be_bytes) else {
                    return Err("a credit that is no number".into());
                };
                match entry.and_then(|e| e.credit.as_ref()).is_none_or(|credit| credit.add(n as usize)) {
                    true => Ok(()),
                    false => Err(format!("more credit for {id} came than there was data")),
                }
            }
            (Kind::Drop, entry) => {
                if let Some(credit) = entry.and_then(|e| e.credit.as_ref()) {
                    credit.stop();
                }
                Ok(())
            }
            (Kind::Done, Some(entry)) if entry.inbox.is_none() => {
                if frame.payload.first() == Some(&1) {
                    self.short.store(true, Ordering::Release);
                }
                entry.halves = 0;
                table.entries.remove(&id);
                self.changed.notify_all();
                Ok(())
            }
            (Kind::Opened | Kind::Refused, Some(entry)) if entry.opened.is_some() => {
                let answer = match frame.kind {
                    Kind::Opened => Ok(()),
                    _ => {
                        let (exit, text) = frame.payload.split_first().unwrap_or((&0, &[]));
                        Err((*exit, String::from_utf8_lossy(text).into_owned()))
                    }
                };
                if let Some(opened) = entry.opened.take() {
                    let _ = opened.send(answer);
                }
                Ok(())
            }
            (kind, _) => Err(format!("{kind:?} of {id} came where it does not belong")),
        }
    }

    /// Writes what comes for `id` until its end, which it gives. On an error the source is told, and the error given when it has stopped.
    pub fn sink(&self, id: u32, inbox: &Inbox<D>, mut write: impl FnMut(Item<D>) -> io::Result<()>) -> io::Result<End> {
        let mut owed = 0;
        loop {
            let item = match inbox.next() {
                Ok(item) => item,
                Err(end) => return Ok(end),
            };
            owed += if let Item::Bytes(bytes) = &item { bytes.len() } else { 0 };
            if let Err(e) = write(item) {
                inbox.refuse();
                let _ = self.send(Kind::Drop, id, &[]);
                inbox.ended();
                return Err(e);
            }
            if owed >= PORTION {
                inbox.paid(owed);
                let _ = self.send(Kind::Credit, id, &u32::try_from(owed).unwrap_or(u32::MAX).to_be_bytes());
                owed = 0;
            }
        }
    }

    /// Sends these bytes as far as there is credit; false when nobody wants them any more.
    pub fn send_data(&self, id: u32, credit: &Credit, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let Some(most) = credit.wait() else { return false };
            let (now, later) = bytes.split_at(most.min(MAX_PAYLOAD).min(bytes.len()));
            credit.spend(now.len());
            if self.send(Kind::Data, id, now).is_err() {
                return false;
            }
            bytes = later;
        }
        true
    }

    /// Nothing comes of it any more.
    pub fn ends(&self, id: u32, is_broken_off: bool) {
        let _ = self.send(Kind::End, id, &[u8::from(is_broken_off)]);
    }

    /// Reads and sends until the end of what is read, or nobody wants it any more, and closes the descriptor. That it ends is the caller's to tell.
    pub fn source(&self, id: u32, credit: &Credit, from: OwnedFd, is_file: bool) -> io::Result<()> {
        let mut buffer = vec![0; MAX_PAYLOAD];
        let mut at = 0u64;
        loop {
            let Some(most) = credit.wait() else { return Ok(()) };
            let wanted = most.min(buffer.len());
            let Some(room) = buffer.get_mut(..wanted) else { return Ok(()) };
            let read = match is_file {
                // Wherever the descriptor stands: it may be passed along twice.
                true => rustix::io::pread(&from, &mut *room, at),
                false if !ready(&from, PollFlags::IN) => continue,
                false => rustix::io::read(&from, &mut *room),
            };
            match read {
                Ok(0) => return Ok(()),
                Ok(n) => {
                    at += n as u64;
                    credit.spend(n);
                    if self.send(Kind::Data, id, room.get(..n).unwrap_or_default()).is_err() {
                        return Ok(());
                    }
                }
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// Waits a little; whether something can be done with the descriptor, be it to learn that it is closed.
fn ready(fd: impl AsFd, flags: PollFlags) -> bool {
    let mut fds = [PollFd::new(&fd, flags)];
    let little = Timespec { tv_sec: 0, tv_nsec: 250_000_000 };
    poll(&mut fds, Some(&little)).is_ok_and(|n| n > 0)
}

/// Writes all of it, also where the descriptor does not wait by itself.
pub fn write_all(to: impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(&to, bytes) {
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => drop(ready(&to, PollFlags::OUT)),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}
