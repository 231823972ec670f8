//! `keepctl bridge`: the end of a bridge at the daemon's machine. ssh starts it as the user who logged in; it connects to the daemon's socket as that
//! user, and ends with its standard input.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use keepd_protocol::model::escape;
use keepd_protocol::{MAX_DESCRIPTORS, MAX_REQUEST_BYTES};
use rustix::fs::{MemfdFlags, Mode, SealFlags, fchmod, fcntl_add_seals, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::frame::{self, Hello, Kind, MARK, MAX_FILE, MAX_FILES, Passed, VERSION, Way};
use super::pump::{Credit, End, Entry, Inbox, Item, Mux, locked, write_all};
use crate::{Exit, Failure, client};

type Far = Arc<Mux<Pending>>;

/// A descriptor that goes with the next message.
pub enum Pending {
    Open(OwnedFd),
    File(Arc<Slot>),
}

/// A file that is on its way.
#[derive(Default)]
pub struct Slot {
    file: Mutex<Option<Result<(OwnedFd, Share), String>>>,
    changed: Condvar,
}

impl Slot {
    fn set(&self, file: Result<(OwnedFd, Share), String>) {
        *locked(&self.file) = Some(file);
        self.changed.notify_all();
    }

    fn take(&self) -> io::Result<(OwnedFd, Share)> {
        let mut file = locked(&self.file);
        loop {
            match file.take() {
                Some(file) => return file.map_err(io::Error::other),
                None => file = self.changed.wait(file).unwrap_or_else(std::sync::PoisonError::into_inner),
            }
        }
    }
}

/// What a file has of the memory for all of them, until its connection is closed.
struct Share {
    taken: Arc<AtomicU64>,
    bytes: u64,
}

impl Share {
    fn grow(&mut self, more: usize) -> io::Result<()> {
        self.bytes += more as u64;
        let all = self.taken.fetch_add(more as u64, Ordering::Relaxed) + more as u64;
        if self.bytes > MAX_FILE || all > MAX_FILES {
            let (one, all) = (MAX_FILE >> 20, MAX_FILES >> 20);
            return Err(io::Error::other(format!("files of at most {one} MiB each and {all} MiB together are held here")));
        }
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Serves one keepctl until it hangs up. `fixed` is the socket of the command line; without it there is only the usual one. The other side may say
/// which it means, and cannot choose: a key that may run this and nothing else is no way to other sockets of this machine.
pub fn run(fixed: Option<&Path>) -> Result<Exit, Failure> {
    let failed = |text: String| Failure::failed(format!("bridge: {}", escape(&text)));
    let mut first = MARK.to_vec();
    first.extend_from_slice(format!("{VERSION} {}\n", env!("CARGO_PKG_VERSION")).as_bytes());
    // Without the buffers of the standard library, which are for lines.
    let raw = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from).map_err(|e| failed(e.to_string()));
    let (input, mut out) = (raw(io::stdin().as_fd())?, raw(io::stdout().as_fd())?);
    out.write_all(&first).map_err(|e| failed(e.to_string()))?;
    // A large buffer holds whole frames; what it has is not waited for.
    let mut input = io::BufReader::with_capacity(256 << 10, input);
    let hello = match frame::read(&mut input).map_err(|e| failed(e.to_string()))? {
        None => return Ok(Exit::Good),
        Some(frame) if frame.kind == Kind::Hello => {
            serde_json::from_slice::<Hello>(&frame.payload).map_err(|e| failed(format!("the greeting is not understood: {e}")))?
        }
        Some(_) => return Err(failed("this is for 'keepctl --host', which did not greet".into())),
    };
    if hello.version != VERSION {
        return Err(failed(format!(
            "keepctl there speaks version {} of the bridge, this one {VERSION}; use the same keepctl on both machines",
            hello.version
        )));
    }
    let socket = client::socket(fixed);
    if let Some(asked) = hello.socket.map(PathBuf::from).filter(|asked| *asked != socket) {
        return Err(failed(format!("only the socket {} may be used here, and {} was asked for", socket.display(), asked.display())));
    }
    let taken = Arc::default();
    // Without a near end there is nothing to be done, whatever the standard input says.
    let mux: Far = Arc::new(Mux::new(Box::new(out), || std::process::exit(Exit::Unreachable as i32)));
    while let Some(frame) = frame::read(&mut input).map_err(|e| failed(e.to_string()))? {
        match frame.kind {
            Kind::Open => open(&mux, frame.id, socket.clone()),
            Kind::Pass => pass(&mux, frame.id, &frame.payload, &taken),
            Kind::Hello | Kind::Opened | Kind::Refused => Err(format!("{:?} came where it does not belong", frame.kind)),
            Kind::Data | Kind::Credit | Kind::End | Kind::Drop | Kind::Done => mux.take(frame),
        }
        .map_err(failed)?;
    }
    // Whatever still goes on ends with this process: the daemon sees that its caller hung up.
    Ok(Exit::Good)
}

fn open(mux: &Far, id: u32, socket: PathBuf) -> Result<(), String> {
    let (credit, inbox) = mux.add(id, Entry::channel(None))?;
    let mux = mux.clone();
    std::thread::spawn(move || {
        let halves = client::local(&socket).and_then(|stream| Ok((stream.try_clone()?, stream.try_clone()?, stream)));
        let (reader, writer, stream) = match halves {
            Ok(halves) => halves,
            Err(failure) => {
                let text = failure.text.into_bytes();
                let answer: Vec<u8> = std::iter::once(failure.exit as u8).chain(text.into_iter().take(4096)).collect();
                let _ = mux.send(Kind::Refused, id, &answer);
                mux.finished(id);
                mux.finished(id);
                return;
            }
        };
        let _ = mux.send(Kind::Opened, id, &[]);
        let from_daemon = mux.clone();
        std::thread::spawn(move || {
            let came = from_daemon.source(id, &credit, reader.into(), false);
            from_daemon.ends(id, came.is_err());
            from_daemon.finished(id);
        });
        let mut request = Request::default();
        // Both ways: it is a hang-up, and cancels the call that still runs.
        let hang_up = || stream.shutdown(std::net::Shutdown::Both);
        let _ = mux.sink(id, &inbox, |item| request.give(&writer, item).inspect_err(|_| drop(hang_up())));
        let _ = hang_up();
        mux.finished(id);
    });
    Ok(())
}

/// What comes for the daemon. It wants a request within 5 s of its first byte, and a slow line may need longer: it gets requests that are whole.
#[derive(Default)]
struct Request {
    bytes: Vec<u8>,
    /// Goes with the next one.
    waiting: Vec<Pending>,
    /// Of the files that the daemon got.
    shares: Vec<Share>,
}

impl Request {
    fn give(&mut self, stream: &UnixStream, item: Item<Pending>) -> io::Result<()> {
        match item {
            Item::Descriptors(pending) => self.waiting.extend(pending),
            Item::Bytes(bytes) => {
                // What was looked through before has no end.
                let looked = self.bytes.len();
                self.bytes.extend_from_slice(&bytes);
                let mut end = self.bytes.iter().skip(looked).position(|b| *b == 0).map(|at| looked + at + 1);
                while let Some(at) = end {
                    let rest = self.bytes.split_off(at);
                    let whole = std::mem::replace(&mut self.bytes, rest);
                    self.send(stream, &whole)?;
                    end = self.bytes.iter().position(|b| *b == 0).map(|at| at + 1);
                }
                // The daemon says what it thinks of one that is too long.
                if self.bytes.len() > MAX_REQUEST_BYTES {
                    write_all(stream, &std::mem::take(&mut self.bytes))?;
                }
            }
        }
        Ok(())
    }

    fn send(&mut self, stream: &UnixStream, bytes: &[u8]) -> io::Result<()> {
        if self.waiting.is_empty() {
            return write_all(stream, bytes);
        }
        let mut descriptors = Vec::new();
        for pending in self.waiting.drain(..) {
            match pending {
                Pending::Open(fd) => descriptors.push(fd),
                Pending::File(slot) => {
                    let (fd, share) = slot.take()?;
                    descriptors.push(fd);
                    self.shares.push(share);
                }
            }
        }
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(io::Error::other("more descriptors than one call takes"));
        }
        let sent = sendmsg(stream.as_fd(), &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
        write_all(stream, bytes.get(sent..).unwrap_or_default())
    }
}

/// Makes what the daemon is to get, and attaches it to what comes next.
fn pass(mux: &Far, channel: u32, payload: &[u8], taken: &Arc<AtomicU64>) -> Result<(), String> {
    let passed: Vec<Passed> = serde_json::from_slice(payload).map_err(|e| format!("what is passed along is not understood: {e}"))?;
    if passed.is_empty() || passed.len() > MAX_DESCRIPTORS {
        return Err(format!("{} descriptors with a call, where {MAX_DESCRIPTORS} are the most", passed.len()));
    }
    let inbox = mux.inbox(channel).ok_or("descriptors came for a channel that is not open")?;
    let pending = passed.into_iter().map(|one| make(mux, one, taken.clone())).collect::<Result<Vec<_>, String>>()?;
    match inbox.push(Item::Descriptors(pending)) {
        true => Ok(()),
        false => Err("descriptors came behind the end of a channel".into()),
    }
}

fn make(mux: &Far, Passed { id, way }: Passed, taken: Arc<AtomicU64>) -> Result<Pending, String> {
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| format!("no pipe can be made: {e}"));
    let entry = if way == Way::Written { Entry::source() } else { Entry::sink() };
    let (credit, inbox) = mux.add(id, entry)?;
    let mux = mux.clone();
    match way {
        Way::Written => {
            let (reader, writer) = pipe()?;
            // The daemon need not wait for each turn of the line.
            let _ = rustix::pipe::fcntl_setpipe_size(&writer, 1 << 20);
            std::thread::spawn(move || written(&mux, id, &credit, reader));
            Ok(Pending::Open(writer))
        }
        Way::Read => {
            let (reader, writer) = pipe()?;
            let _ = rustix::pipe::fcntl_setpipe_size(&writer, 1 << 20);
            std::thread::spawn(move || {
                let end = mux.sink(id, &inbox, |item| bytes_to(&writer, item));
                drop(writer);
                let how = match end {
                    Ok(End::Whole) => ALL,
                    // An import of what is there already reads no further.
                    Err(e) if e.kind() == io::ErrorKind::BrokenPipe => UNWANTED,
                    Ok(End::BrokenOff) | Err(_) => SHORT,
                };
                done(&mux, id, how);
            });
            Ok(Pending::Open(reader))
        }
        Way::File { mode, name } => {
            let file = memfd(&name)?;
            let slot = Arc::new(Slot::default());
            let to_fill = slot.clone();
            std::thread::spawn(move || {
                let whole = fill(&mux, id, &inbox, file, mode, Share { taken, bytes: 0 });
                let how = if whole.is_ok() { ALL } else { SHORT };
                if let Err(why) = &whole {
                    // The connection is hung up without a word.
                    eprintln!("keepctl: bridge: {}", escape(why));
                }
                to_fill.set(whole);
                done(&mux, id, how);
            });
            Ok(Pending::File(slot))
        }
    }
}

fn written(mux: &Far, id: u32, credit: &Credit, reader: OwnedFd) {
    // Forgotten when the near end has written it all.
    let came = mux.source(id, credit, reader, false);
    mux.ends(id, came.is_err());
}

/// How what came was written to where it belongs, as [`Kind::Done`] says it.
const ALL: u8 = 0;
const SHORT: u8 = 1;
const UNWANTED: u8 = 2;

fn done(mux: &Far, id: u32, how: u8) {
    let _ = mux.send(Kind::Done, id, &[how]);
    mux.finished(id);
}

fn bytes_to(to: &OwnedFd, item: Item<Pending>) -> io::Result<()> {
    match item {
        Item::Bytes(bytes) => write_all(to, &bytes),
        Item::Descriptors(_) => Err(io::Error::other("descriptors in a stream")),
    }
}

/// A file in memory: what is lent is on no disk.
fn memfd(name: &str) -> Result<OwnedFd, String> {
    let name: String = escape(name).chars().filter(|c| *c != '/').take(60).collect();
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 do not know that it is nothing to be run.
    let made = memfd_create(name.as_str(), flags | MemfdFlags::NOEXEC_SEAL).or_else(|_| memfd_create(name.as_str(), flags));
    made.map_err(|e| format!("no memory for a file can be had: {e}"))
}

fn fill(mux: &Far, id: u32, inbox: &Inbox<Pending>, file: OwnedFd, mode: u32, mut share: Share) -> Result<(OwnedFd, Share), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    // Nobody else's while it is written; then as it was at the other end, which is what the daemon judges it by.
    fchmod(&file, Mode::RUSR | Mode::WUSR).map_err(|e| text(&e))?;
    let end = mux.sink(id, inbox, |item| {
        if let Item::Bytes(bytes) = &item {
            share.grow(bytes.len())?;
        }
        bytes_to(&file, item)
    });
    match end {
        Ok(End::Whole) => {}
        Ok(End::BrokenOff) => return Err("a file was broken off".into()),
        Err(e) => return Err(text(&e)),
    }
    fchmod(&file, Mode::from_raw_mode(mode & 0o666)).map_err(|e| text(&e))?;
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW;
    fcntl_add_seals(&file, seals).map_err(|e| text(&e))?;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).map_err(|e| text(&e))?;
    Ok((file, share))
}
