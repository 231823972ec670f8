//! The server side of Varlink: one task for each connection, bounded in every direction.
//!
//! Frames are at most 1 MiB and must be whole 5 s after their first byte; a reply that nobody takes for 5 s ends the
//! connection; descriptors belong to the message whose bytes they came with; a peer that hangs up cancels its running
//! call (a half-close does not: it still wants its replies).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use keepd_protocol::call::{Call, Reply, errors};
use keepd_protocol::{MAX_REPLY_BYTES, MAX_REQUEST_BYTES};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::Value;
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::codec::Decoder;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::frames::NulFrames;
use super::origin::{self, Process};
use crate::access::{self, Caller};

const FRAME_DEADLINE: Duration = Duration::from_secs(5);
const WRITE_DEADLINE: Duration = Duration::from_secs(5);
const MAX_CONNECTIONS: usize = 1024;
/// Root always finds some of them free.
const FOR_ROOT: usize = 64;
/// No user but root gets more than half of them, whatever is configured.
const MOST_PER_USER: usize = MAX_CONNECTIONS / 2;
/// A caller that was let in before the end is still answered, when its call is here, and done, so soon after.
const LAST_CALLS: Duration = Duration::from_secs(1);
/// Whoever is refused is told why; of so many at a time, and for so long.
const FAREWELLS: usize = 32;
const FAREWELL: Duration = Duration::from_secs(1);
const MAX_DESCRIPTORS: usize = keepd_protocol::MAX_DESCRIPTORS;

/// Who is on the other side, as the kernel says; read before the first byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    pub gid: u32,
    /// The supplementary ones.
    pub groups: Vec<u32>,
    pub pid: Option<i32>,
    /// For the audit log; no right depends on it.
    pub process: Arc<Process>,
}

impl Peer {
    fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        // A kernel that cannot tell them leaves the group of the process.
        let groups = access::groups_of(stream).unwrap_or_else(|e| {
            tracing::warn!("the groups of a caller are not known: {e}");
            Vec::new()
        });
        Ok(Self { uid: credentials.uid(), gid: credentials.gid(), groups, pid: credentials.pid(), process: Arc::default() })
    }

    pub fn caller(&self) -> Caller {
        Caller { uid: self.uid, gid: self.gid, groups: self.groups.clone() }
    }
}

/// An error reply.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    pub error: String,
    pub parameters: Value,
}

impl Fault {
    pub fn new(error: &str, parameters: Value) -> Self {
        Self { error: error.into(), parameters }
    }

    pub fn invalid_parameter(name: &str) -> Self {
        Self::new("org.varlink.service.InvalidParameter", serde_json::json!({ "parameter": name }))
    }
}

/// Carries calls out. The value returned is the last reply; earlier ones go through `replies`.
pub trait Service: Send + Sync + 'static {
    fn call(
        &self,
        peer: &Peer,
        call: Call,
        descriptors: Vec<OwnedFd>,
        replies: &mut Replies<'_>,
    ) -> impl Future<Output = Result<Value, Fault>> + Send;

    /// How many connections one user but root may have open.
    fn connections_per_user(&self) -> usize;

    /// Why a user may not connect just now, when it does so too often.
    fn connects_too_often(&self, uid: u32) -> Option<String>;

    /// Whether something about a user is still worth a line in the log: one that does the same over and over must not fill it.
    fn is_logged(&self, uid: u32) -> bool;
}

/// Accepts until cancelled, and answers those that were let in until then: with a socket of the service manager's the others wait for the next daemon, so that
/// nobody sees a restart as a connection that broke. Returns when all are gone, [`LAST_CALLS`] later at the most.
pub async fn serve<S: Service>(listener: std::os::unix::net::UnixListener, service: Arc<S>, cancel: CancellationToken) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    let total = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let others = Arc::new(Semaphore::new(MAX_CONNECTIONS - FOR_ROOT));
    let farewells = Arc::new(Semaphore::new(FAREWELLS));
    let users: Arc<Mutex<HashMap<u32, usize>>> = Arc::default();
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = cancel.cancelled() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of descriptors, mostly: that must not end the service.
                tracing::warn!("a connection could not be accepted: {e}");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(peer) = Peer::of(&stream) else { continue };
        if let Some(text) = service.connects_too_often(peer.uid) {
            refuse(stream, &peer, text, &farewells, &*service);
            continue;
        }
        let most = service.connections_per_user().min(MOST_PER_USER);
        let of_others = if peer.uid == 0 { Ok(None) } else { others.clone().try_acquire_owned().map(Some) };
        let places = of_others.and_then(|others| Ok((total.clone().try_acquire_owned()?, others)));
        let (place, user) = match (places, UserPlace::take(&users, peer.uid, most)) {
            (Ok(places), Some(user)) => (places, user),
            (Ok(_), None) => {
                let text = format!(
                    "you have {most} connections to keepd open already, as many as access.limits.connections allows; close some and try again"
                );
                refuse(stream, &peer, text, &farewells, &*service);
                continue;
            }
            (Err(_), _) => {
                refuse(stream, &peer, "keepd has as many connections open as it takes; try again later".into(), &farewells, &*service);
                continue;
            }
        };
        let (service, cancel) = (service.clone(), cancel.clone());
        connections.spawn(async move {
            let _held = (place, user);
            let (held, uid, pid) = (origin::hold(&stream), peer.uid, peer.pid);
            let process = tokio::task::spawn_blocking(move || Process::of(pid, uid, held.as_ref())).await.unwrap_or_default();
            let peer = Peer { process: Arc::new(process), ..peer };
            let connection = Connection::new(&stream);
            tokio::select! {
                ended = connection.run(&*service, &peer, &cancel) => if let Err(e) = ended {
                    tracing::debug!(uid = peer.uid, "a control connection was cut: {e}");
                },
                () = async { cancel.cancelled().await; sleep(LAST_CALLS).await } => {}
            }
        });
    }
    drop(listener);
    connections.close();
    connections.wait().await;
    Ok(())
}

/// Tells why a connection is not served, and closes it. What the caller sent meanwhile is read, so that it sees the reply and not an error.
fn refuse<S: Service>(stream: UnixStream, peer: &Peer, text: String, farewells: &Arc<Semaphore>, service: &S) {
    match service.is_logged(peer.uid) {
        true => tracing::warn!(uid = peer.uid, "a connection was refused: {text}"),
        false => tracing::debug!(uid = peer.uid, "a connection was refused: {text}"),
    }
    let Ok(place) = farewells.clone().try_acquire_owned() else { return };
    let parameters = Some(serde_json::json!({ "message": text }));
    let reply = Reply { parameters, continues: false, error: Some(errors::BUSY.into()) };
    tokio::spawn(async move {
        let _place = place;
        let farewell = async {
            send(&stream, &reply).await?;
            rustix::net::shutdown(&stream, rustix::net::Shutdown::Write)?;
            let mut bytes = [0u8; 4096];
            loop {
                stream.readable().await?;
                match stream.try_read(&mut bytes) {
                    Ok(0) => return Ok(()),
                    Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
                    _ => {}
                }
            }
        };
        let _: Result<io::Result<()>, _> = timeout(FAREWELL, farewell).await;
    });
}

/// A user's share of the connections; root's is not counted.
struct UserPlace {
    users: Arc<Mutex<HashMap<u32, usize>>>,
    uid: u32,
}

impl UserPlace {
    fn take(users: &Arc<Mutex<HashMap<u32, usize>>>, uid: u32, most: usize) -> Option<Self> {
        let mut map = users.lock().unwrap_or_else(PoisonError::into_inner);
        let count = map.entry(uid).or_default();
        if uid != 0 && *count >= most {
            return None;
        }
        *count += 1;
        Some(Self { users: users.clone(), uid })
    }
}

impl Drop for UserPlace {
    fn drop(&mut self) {
        let mut map = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = map.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                map.remove(&self.uid);
            }
        }
    }
}

struct Connection<'s> {
    stream: &'s UnixStream,
    buffer: BytesMut,
    frames: NulFrames,
    /// Bytes taken from the socket, and bytes given out as frames, since the connection began.
    received: u64,
    consumed: u64,
    /// Descriptors with the stream offset behind the bytes they came with.
    descriptors: VecDeque<(u64, OwnedFd)>,
    first_byte: Option<Instant>,
}

impl<'s> Connection<'s> {
    fn new(stream: &'s UnixStream) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
            frames: NulFrames::new(MAX_REQUEST_BYTES),
            received: 0,
            consumed: 0,
            descriptors: VecDeque::new(),
            first_byte: None,
        }
    }

    /// Answers its calls; once `ending` is cancelled no more than one.
    async fn run<S: Service>(mut self, service: &S, peer: &Peer, ending: &CancellationToken) -> io::Result<()> {
        let mut is_answered = false;
        loop {
            let frame = tokio::select! {
                biased;
                () = ending.cancelled(), if is_answered => return Ok(()),
                frame = self.next_frame() => frame,
            };
            let frame = match frame {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(()),
                Err(e) => {
                    let fault =
                        Fault::new("io.keepd.Control.Failed", serde_json::json!({ "message": format!("{e}; the connection is closed") }));
                    let _ = self.reply(Err(fault)).await;
                    return Err(e);
                }
            };
            let descriptors = self.descriptors_of_frame();
            let call = match parse(&frame) {
                Ok(call) => call,
                Err(fault) => {
                    self.reply(Err(fault)).await?;
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "a message was no Varlink call"));
                }
            };
            let oneway = call.oneway;
            let mut replies = Replies { stream: self.stream, more: call.more && !oneway };
            let result = tokio::select! {
                result = service.call(peer, call, descriptors, &mut replies) => result,
                () = hung_up(self.stream) => return Ok(()),
            };
            if !oneway {
                self.reply(result).await?;
            }
            is_answered = true;
        }
    }

    async fn reply(&self, result: Result<Value, Fault>) -> io::Result<()> {
        let reply = match result {
            Ok(value) => Reply { parameters: not_empty(value), ..Reply::default() },
            Err(fault) => Reply { parameters: not_empty(fault.parameters), error: Some(fault.error), continues: false },
        };
        send(self.stream, &reply).await
    }

    /// The next whole message; None at a clean end.
    async fn next_frame(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            if let Some(frame) = self.frames.decode(&mut self.buffer)? {
                self.consumed += frame.len() as u64 + 1;
                self.first_byte = (!self.buffer.is_empty()).then(Instant::now);
                return Ok(Some(frame.freeze()));
            }
            if self.descriptors.len() > MAX_DESCRIPTORS {
                return Err(io::Error::other("too many descriptors came with one message"));
            }
            let read = match self.first_byte {
                None => self.receive().await?,
                Some(first) => timeout_at(first + FRAME_DEADLINE, self.receive())
                    .await
                    .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "a message was not whole in time"))??,
            };
            match read {
                0 if self.buffer.is_empty() => return Ok(None),
                0 => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer stopped in the middle of a message")),
                _ => {
                    self.first_byte.get_or_insert_with(Instant::now);
                }
            }
        }
    }

    async fn receive(&mut self) -> io::Result<usize> {
        let mut bytes = [0u8; 16 << 10];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        loop {
            self.stream.readable().await?;
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let read = self.stream.try_io(Interest::READABLE, || {
                let mut slices = [io::IoSliceMut::new(&mut bytes)];
                Ok(recvmsg(self.stream, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT)?)
            });
            match read {
                Ok(message) => {
                    self.received += message.bytes as u64;
                    for part in ancillary.drain() {
                        if let RecvAncillaryMessage::ScmRights(fds) = part {
                            self.descriptors.extend(fds.map(|fd| (self.received, fd)));
                        }
                    }
                    self.buffer.extend_from_slice(bytes.get(..message.bytes).unwrap_or_default());
                    return Ok(message.bytes);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The descriptors that came with the bytes of the frame just given out. One recvmsg never spans two sends with
    /// descriptors, so the offset behind its bytes tells which message they belong to.
    fn descriptors_of_frame(&mut self) -> Vec<OwnedFd> {
        let mut own = Vec::new();
        while let Some((offset, _)) = self.descriptors.front() {
            if *offset > self.consumed {
                break;
            }
            own.extend(self.descriptors.pop_front().map(|(_, fd)| fd));
        }
        own
    }
}

fn parse(frame: &[u8]) -> Result<Call, Fault> {
    let invalid = |what: &str| Fault::invalid_parameter(what);
    let value: Value = serde_json::from_slice(frame).map_err(|_| invalid("(the message is no JSON)"))?;
    if !value.is_object() || !value.get("parameters").is_none_or(|p| p.is_object() || p.is_null()) {
        return Err(invalid("parameters"));
    }
    let call: Call = serde_json::from_value(value).map_err(|_| invalid("method"))?;
    match call.upgrade {
        true => Err(Fault::new("io.keepd.Control.Failed", serde_json::json!({ "message": "upgrade is not supported" }))),
        false => Ok(call),
    }
}

/// Varlink clients take `"parameters":{}` for an unknown error's contents; empty ones are left out.
fn not_empty(value: Value) -> Option<Value> {
    match &value {
        Value::Null => None,
        Value::Object(map) if map.is_empty() => None,
        _ => Some(value),
    }
}

/// Returns when the peer has closed both directions. Looks five times a second, only while a call runs.
async fn hung_up(stream: &UnixStream) {
    loop {
        sleep(Duration::from_millis(200)).await;
        let mut fds = [PollFd::new(stream, PollFlags::empty())];
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        let found = poll(&mut fds, Some(&none)).is_ok() && fds.iter().any(|f| f.revents().intersects(PollFlags::HUP | PollFlags::ERR));
        if found {
            return;
        }
    }
}

/// Sends the replies before the last one, to a caller that asked for `more`.
pub struct Replies<'s> {
    stream: &'s UnixStream,
    more: bool,
}

impl Replies<'_> {
    /// Whether the caller takes several replies.
    pub fn more(&self) -> bool {
        self.more
    }

    /// Sends a reply that others follow; false when the connection is broken or nobody takes it in time.
    pub async fn send(&mut self, value: &impl serde::Serialize) -> bool {
        if !self.more {
            return true;
        }
        match serde_json::to_value(value) {
            Ok(parameters) => send(self.stream, &Reply { parameters: Some(parameters), continues: true, error: None }).await.is_ok(),
            Err(_) => false,
        }
    }
}

async fn send(stream: &UnixStream, reply: &Reply) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(reply)?;
    if bytes.len() > MAX_REPLY_BYTES * 16 {
        return Err(io::Error::other("a reply is too long"));
    }
    bytes.push(0);
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let written = timeout(WRITE_DEADLINE, async {
            loop {
                stream.writable().await?;
                match stream.try_write(rest) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other,
                }
            }
        });
        let n = written.await.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the peer takes no replies"))??;
        rest = rest.get(n..).unwrap_or_default();
    }
    Ok(())
}
