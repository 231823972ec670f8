//! The end of a bridge at the machine where keepctl was called: starts ssh, and gives each `Client` a socket that seems to lead to the daemon.
//!
//! What comes over the line is believed as little as what comes from a stranger: see `frame` and `pump` for what is bounded.

use std::io::{self, BufRead, BufReader, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStderr, ChildStdout, ExitStatus};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use keepd_protocol::call::{Call, Reply, errors};
use keepd_protocol::model::escape;
use keepd_protocol::{MAX_DESCRIPTORS, MAX_REQUEST_BYTES};
use rustix::fs::{FileType, OFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use signal_hook::consts::{SIGINT, SIGQUIT};

use super::frame::{self, Hello, Kind, MARK, MAX_FILE, MAX_PAYLOAD, Passed, VERSION, Way};
use super::pump::{Credit, End, Entry, Inbox, Item, Mux, locked, write_all};
use super::ssh::{self, Host, RemoteArguments};
use crate::render::lines;
use crate::{Exit, Failure, signals};

/// What a login shell may print before the bridge begins.
const MAX_JUNK: usize = 64 << 10;
/// Of what is said on ssh's standard error.
const MAX_SAID: u64 = 1 << 20;
const MAX_LINE: u64 = 8 << 10;
/// How long ssh has to end when nothing is wanted any more.
const FAREWELL: Duration = Duration::from_secs(3);

/// A line to another machine.
pub struct Link {
    mux: Arc<Mux<()>>,
    pub host: String,
    child: Mutex<Child>,
    telling: JoinHandle<()>,
    next: Arc<AtomicU32>,
}

impl Link {
    /// Starts ssh, and returns when keepctl there has answered.
    pub fn start(host: &Host, arguments: &RemoteArguments, socket: Option<String>) -> Result<Self, Failure> {
        let mut command = arguments.command(host, socket.as_deref()).map_err(|why| Failure::new(Exit::Usage, why))?;
        ssh::is_here().map_err(|why| Failure::new(Exit::Unreachable, why))?;
        let name = host.to_string();
        // ssh hears of neither of them, and may be asking for a password with the echo off.
        let held = [signals::Held::interrupt(), signals::Held::quit()];
        let interrupted = Arc::new(AtomicUsize::new(0));
        let while_connecting = [SIGINT, SIGQUIT].map(|signal| {
            let number = usize::try_from(signal).unwrap_or_default();
            signal_hook::flag::register_usize(signal, interrupted.clone(), number)
        });
        let mut child = command.spawn().map_err(|e| Failure::new(Exit::Unreachable, format!("cannot start ssh: {e}")))?;
        let (Some(input), Some(output), Some(said)) = (child.stdin.take(), child.stdout.take(), child.stderr.take()) else {
            return Err(Failure::failed("ssh has no standard input and output"));
        };
        let telling = std::thread::spawn(move || tell(said));
        let mux = Arc::new(Mux::new(Box::new(input), || ()));
        let (sender, greeted) = mpsc::channel();
        let reading = mux.clone();
        std::thread::spawn(move || {
            let mut output = BufReader::with_capacity(256 << 10, output);
            let greeting = greeting(&mut output);
            let is_good = matches!(greeting, Ok(Ok(_)));
            let _ = sender.send(greeting);
            if is_good {
                read(&reading, output);
            }
        });
        let greeting = loop {
            match greeted.recv_timeout(Duration::from_millis(100)) {
                Ok(greeting) => break greeting,
                Err(mpsc::RecvTimeoutError::Disconnected) => break Err(io::ErrorKind::UnexpectedEof.into()),
                Err(mpsc::RecvTimeoutError::Timeout) if interrupted.load(Ordering::Relaxed) > 0 => {
                    let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM);
                    let _ = child.wait();
                    std::process::exit(128 + i32::try_from(interrupted.load(Ordering::Relaxed)).unwrap_or(SIGINT));
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
        };
        let version = match greeting {
            Ok(Ok(version)) => version,
            Ok(Err(junk)) => {
                mux.close();
                if junk.len() >= MAX_JUNK {
                    let _ = child.kill();
                }
                let status = ended(&mut child).filter(|_| junk.len() < MAX_JUNK);
                // What it said comes first.
                told(&telling);
                return Err(no_greeting(&name, status, &junk, &arguments.keepctl_there()));
            }
            Err(e) => {
                let _ = child.kill();
                return Err(Failure::new(Exit::Unreachable, format!("cannot read from ssh to {name}: {e}")));
            }
        };
        if version != VERSION {
            let _ = child.kill();
            let text = format!(
                "keepctl on {name} speaks version {} of the bridge, this one {VERSION}; use the same keepctl on both machines",
                escape(&version)
            );
            return Err(Failure::new(Exit::Unreachable, text));
        }
        let hello = serde_json::to_vec(&Hello { version: VERSION.into(), socket }).map_err(Failure::failed)?;
        if hello.len() > MAX_PAYLOAD || mux.send(Kind::Hello, 0, &hello).is_err() {
            let why = mux.broken().unwrap_or_else(|| "it was hung up at once".into());
            return Err(Failure::new(Exit::Unreachable, format!("the line to {name} was lost: {}", escape(&why))));
        }
        while_connecting.into_iter().flatten().for_each(|id| _ = signal_hook::low_level::unregister(id));
        drop(held);
        Ok(Self { mux, host: name, child: Mutex::new(child), telling, next: Arc::new(AtomicU32::new(1)) })
    }

    /// A connection to the daemon there.
    pub fn open(&self) -> Result<UnixStream, Failure> {
        let lost = |why: &str| Failure::new(Exit::Unreachable, format!("the line to {} was lost: {}", self.host, escape(why)));
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, opened) = mpsc::channel();
        let (credit, inbox) = self.mux.add(id, Entry::channel(Some(sender))).map_err(|why| lost(&why))?;
        self.mux.send(Kind::Open, id, &[]).map_err(|e| lost(&self.mux.broken().unwrap_or_else(|| e.to_string())))?;
        match opened.recv() {
            Ok(Ok(())) => {}
            Ok(Err((exit, text))) => {
                self.mux.finished(id);
                self.mux.finished(id);
                let exit = if exit == Exit::NotPermitted as u8 { Exit::NotPermitted } else { Exit::Unreachable };
                return Err(Failure::new(exit, format!("on {}: {}", self.host, lines(&text))));
            }
            Err(_) => return Err(lost(&self.mux.broken().unwrap_or_else(|| "it was hung up".into()))),
        }
        let (ours, theirs) = UnixStream::pair()?;
        let reader = theirs.try_clone()?;
        let mux = self.mux.clone();
        let channel = Channel { mux: mux.clone(), id, credit, host: self.host.clone(), next: self.next.clone() };
        std::thread::spawn(move || channel.run(reader));
        std::thread::spawn(move || {
            let _ = mux.sink(id, &inbox, |item| bytes_to(&theirs, item));
            let _ = theirs.shutdown(std::net::Shutdown::Both);
            mux.finished(id);
        });
        Ok(ours)
    }

    /// Waits until all that was passed along has come, or gone, to its end.
    pub fn settle(&self) -> Result<(), Failure> {
        let lost = |why: String| Failure::new(Exit::Unreachable, format!("the line to {} was lost: {}", self.host, escape(&why)));
        self.mux.settle().map_err(lost)?;
        match super::trouble() || self.mux.is_short() {
            true => Err(Failure::failed("not all of it came to its place")),
            false => Ok(()),
        }
    }

    pub fn broken(&self) -> Option<String> {
        self.mux.broken().map(|why| format!("the line to {} was lost: {}", self.host, escape(&why)))
    }

    /// Hangs up; ssh and the far end go.
    pub fn end(&self) {
        let mut child = locked(&self.child);
        let since = Instant::now();
        while since.elapsed() < FAREWELL {
            // Somebody may be sending just now.
            self.mux.close();
            match child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                _ => return told(&self.telling),
            }
        }
        let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM);
    }
}

/// One connection, as its `Client` writes to it.
struct Channel {
    mux: Arc<Mux<()>>,
    id: u32,
    credit: Arc<Credit>,
    host: String,
    next: Arc<AtomicU32>,
}

impl Channel {
    /// Passes on what the client writes until it hangs up.
    fn run(&self, from: UnixStream) {
        let mut message = Vec::new();
        let mut descriptors = Vec::new();
        while let Ok(n) = receive(&from, &mut message, &mut descriptors) {
            let is_whole = message.last() == Some(&0);
            if n == 0 {
                break;
            }
            // What goes with a call is chosen by what the call is.
            if !descriptors.is_empty() && !is_whole && message.len() <= MAX_REQUEST_BYTES {
                continue;
            }
            if !descriptors.is_empty()
                && let Err(why) = self.pass(&message, std::mem::take(&mut descriptors))
            {
                // Of a line that is gone the client learns by itself.
                if self.mux.broken().is_none() {
                    refuse(&from, &why);
                }
                let _ = from.shutdown(std::net::Shutdown::Both);
                break;
            }
            if !self.mux.send_data(self.id, &self.credit, &message) {
                break;
            }
            message.clear();
        }
        let _ = self.mux.send(Kind::End, self.id, &[]);
        self.mux.finished(self.id);
    }

    fn pass(&self, message: &[u8], descriptors: Vec<OwnedFd>) -> Result<(), String> {
        let call: Call = serde_json::from_slice(message.strip_suffix(&[0]).unwrap_or(message)).map_err(|e| e.to_string())?;
        let part = call.parameters.as_ref().and_then(|p| p.get("part")).and_then(serde_json::Value::as_str);
        // Of any length, and read once: the only one that is no file there.
        let is_archive = call.method.ends_with(".UploadImport") && part != Some("key");
        let mut passed = Vec::new();
        let mut streams = Vec::new();
        for fd in descriptors {
            let (way, is_file) = way(&fd, is_archive)?;
            let id = self.next.fetch_add(1, Ordering::Relaxed);
            let entry = if way == Way::Written { Entry::sink() } else { Entry::source() };
            let (credit, inbox) = self.mux.add(id, entry)?;
            streams.push((id, way.clone(), is_file, fd, credit, inbox));
            passed.push(Passed { id, way });
        }
        let payload = serde_json::to_vec(&passed).map_err(|e| e.to_string())?;
        self.mux.send(Kind::Pass, self.id, &payload).map_err(|e| e.to_string())?;
        for (id, way, is_file, fd, credit, inbox) in streams {
            let (mux, host) = (self.mux.clone(), self.host.clone());
            std::thread::spawn(move || match way {
                Way::Written => write(&mux, &host, id, &inbox, fd),
                Way::Read | Way::File { .. } => {
                    let sent = mux.source(id, &credit, fd, is_file);
                    // Known here before the far end hears of it, and says that it has taken all.
                    if let Err(e) = &sent {
                        super::tell_trouble(&format!("what is sent to {host} cannot be read: {e}"));
                    }
                    mux.ends(id, sent.is_err());
                }
            });
        }
        Ok(())
    }
}

/// How a descriptor goes over the line, and whether it is a file here.
fn way(fd: &OwnedFd, is_archive: bool) -> Result<(Way, bool), String> {
    let flags = rustix::fs::fcntl_getfl(fd).map_err(|e| e.to_string())?;
    let stat = rustix::fs::fstat(fd).map_err(|e| e.to_string())?;
    let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    if is_archive {
        return Ok((Way::Read, is_file));
    }
    if flags & OFlags::ACCMODE != OFlags::RDONLY {
        return Ok((Way::Written, is_file));
    }
    if !is_file {
        return Ok((Way::Read, false));
    }
    if stat.st_size < 0 || stat.st_size.unsigned_abs() > MAX_FILE {
        return Err(format!("a file of {} bytes is longer than what keepd takes here", stat.st_size));
    }
    let link = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd))).unwrap_or_default();
    let name = link.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    Ok((Way::File { mode: stat.st_mode & 0o777, name: name.chars().take(100).collect() }, true))
}

/// Writes what the daemon there wrote.
fn write(mux: &Mux<()>, host: &str, id: u32, inbox: &Inbox<()>, to: OwnedFd) {
    let end = mux.sink(id, inbox, |item| bytes_to(&to, item));
    drop(to);
    match &end {
        // Whoever read it went away: no trouble of ours.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
        Err(e) => super::tell_trouble(&format!("what comes from {host} cannot be written: {e}")),
        Ok(End::BrokenOff) if mux.broken().is_none() => super::tell_trouble(&format!("what comes from {host} was broken off")),
        Ok(_) => {}
    }
    let _ = mux.send(Kind::Done, id, &[u8::from(!matches!(end, Ok(End::Whole)))]);
    mux.finished(id);
}

fn bytes_to(to: impl AsFd, item: Item<()>) -> io::Result<()> {
    match item {
        Item::Bytes(bytes) => write_all(to, &bytes),
        Item::Descriptors(_) => Ok(()),
    }
}

/// Answers a call that cannot go over the line.
fn refuse(to: &UnixStream, why: &str) {
    let parameters = Some(serde_json::json!({ "message": format!("this cannot be passed along to another machine: {why}") }));
    let reply = Reply { parameters, error: Some(errors::DESCRIPTOR.into()), continues: false };
    if let Ok(mut bytes) = serde_json::to_vec(&reply) {
        bytes.push(0);
        let _ = write_all(to, &bytes);
    }
}

/// One piece of what a client writes, with what it passes along.
fn receive(from: &UnixStream, bytes: &mut Vec<u8>, descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut room = [0u8; 32 << 10];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(from, &mut [io::IoSliceMut::new(&mut room)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = part {
            descriptors.extend(fds);
        }
    }
    bytes.extend_from_slice(room.get(..received.bytes).unwrap_or_default());
    Ok(received.bytes)
}

/// Reads the line to its end.
fn read(mux: &Mux<()>, mut output: BufReader<ChildStdout>) {
    let why = loop {
        match frame::read(&mut output) {
            Ok(None) => break "ssh, or keepctl there, ended".to_owned(),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => break "it ended in the middle of a message".to_owned(),
            Err(e) if e.kind() == io::ErrorKind::InvalidData => break format!("what comes is not what a bridge sends ({e})"),
            Err(e) => break e.to_string(),
            Ok(Some(frame)) if matches!(frame.kind, Kind::Hello | Kind::Open | Kind::Pass) => {
                break format!("what comes is not what a bridge sends ({:?})", frame.kind);
            }
            Ok(Some(frame)) => {
                if let Err(why) = mux.take(frame) {
                    break format!("what comes is not what a bridge sends ({why})");
                }
            }
        }
    };
    // Why comes first: whoever finds the line closed asks for it.
    mux.breaks(&why);
    mux.close();
}

/// The version in the bridge's first line, found also behind what a login shell prints; else all that came.
fn greeting(output: &mut BufReader<ChildStdout>) -> io::Result<Result<String, Vec<u8>>> {
    let mut came = Vec::new();
    let mut start = None;
    loop {
        let mut byte = [0; 1];
        match output.read(&mut byte)? {
            0 => return Ok(Err(came)),
            _ if came.len() >= MAX_JUNK => return Ok(Err(came)),
            _ => came.extend_from_slice(&byte),
        }
        match start.and_then(|start| came.get(start..)) {
            None if came.ends_with(MARK) => start = Some(came.len()),
            Some([line @ .., b'\n']) => {
                let line = String::from_utf8_lossy(line);
                return Ok(Ok(line.split(' ').next().unwrap_or_default().chars().take(20).collect()));
            }
            _ => {}
        }
    }
}

/// Waits a little until all that ssh said is shown; a process that it left behind may hold the pipe for long.
fn told(telling: &JoinHandle<()>) {
    let since = Instant::now();
    while !telling.is_finished() && since.elapsed() < FAREWELL / 6 {
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits a little for ssh to be over.
fn ended(child: &mut Child) -> Option<ExitStatus> {
    let since = Instant::now();
    while since.elapsed() < FAREWELL {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

/// Why no bridge began.
fn no_greeting(host: &str, status: Option<ExitStatus>, junk: &[u8], keepctl: &str) -> Failure {
    let keepctl = escape(keepctl);
    let what = match status.and_then(|s| s.code()) {
        Some(255) => format!("cannot reach {host} through ssh (what ssh says of it stands above); does 'ssh {host} true' work?"),
        Some(127) => {
            format!("there is no {keepctl} on {host}; install it there, or say where it is by --remote-command PATH{}", ssh::or_here())
        }
        Some(126) => format!("{keepctl} on {host} cannot be run{}", ssh::or_here()),
        Some(2) => format!("{keepctl} on {host} does not know 'bridge': it is older than this one"),
        Some(code) => format!("{keepctl} bridge on {host} ended with status {code} before it answered"),
        None => match status.and_then(|s| s.signal()) {
            Some(signal) => format!("ssh to {host} was ended by signal {signal} before {keepctl} there answered"),
            None => format!("what answers on {host} is no keepctl"),
        },
    };
    let said = String::from_utf8_lossy(junk.get(..300.min(junk.len())).unwrap_or_default()).into_owned();
    let said = said.split_ascii_whitespace().collect::<Vec<_>>().join(" ");
    let said = if said.is_empty() { said } else { format!("; it said: {}", escape(&said)) };
    Failure::new(Exit::Unreachable, format!("{what}{said}"))
}

/// Shows what ssh and the far end say, nothing of which may move the cursor.
fn tell(said: ChildStderr) {
    let mut said = BufReader::new(said.take(MAX_SAID));
    let mut line = Vec::new();
    while let Ok(n) = (&mut said).take(MAX_LINE).read_until(b'\n', &mut line) {
        if n == 0 {
            break;
        }
        let text = String::from_utf8_lossy(&line);
        eprintln!("{}", lines(text.trim_end_matches(['\r', '\n'])));
        line.clear();
    }
    // Nobody is to wait for us.
    let _ = io::copy(&mut said.into_inner().into_inner(), &mut io::sink());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_told_without_what_a_terminal_obeys() {
        let failure = no_greeting("web1", Some(ExitStatus::from_raw(127 << 8)), b"hello \x1b[2J", "keepctl");
        assert_eq!(failure.exit, Exit::Unreachable);
        assert!(failure.text.contains("--remote-command") && failure.text.contains("u{1b}[2J"), "{}", failure.text);
        assert!(!failure.text.contains('\u{1b}'));
    }
}
