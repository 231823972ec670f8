//! A blocking Varlink client over a Unix socket, the daemon's or one that leads over a bridge to another machine.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use keepd_protocol::MAX_DESCRIPTORS;
use keepd_protocol::call::{Call, Reply, errors};
use keepd_protocol::methods::Method;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;

use crate::keys::Keys;
use crate::render::lines;
use crate::{Exit, Failure, remote};

/// A reply longer than this is no reply of keepd.
const MAX_REPLY: usize = 8 << 20;

/// A connection to the daemon.
pub struct Client {
    stream: UnixStream,
    buffer: Vec<u8>,
    /// For messages.
    place: String,
}

/// `--socket`, `$KEEPD_SOCKET`, or where the daemon of this user listens.
pub fn socket(given: Option<&Path>) -> PathBuf {
    if let Some(path) = given {
        return path.to_owned();
    }
    if let Some(path) = std::env::var_os("KEEPD_SOCKET").filter(|p| !p.is_empty()) {
        return PathBuf::from(path);
    }
    let system = PathBuf::from("/run/keepd/keepd.sock");
    if rustix::process::geteuid().is_root() {
        return system;
    }
    let directory = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let state = directory("XDG_STATE_HOME").or_else(|| directory("HOME").map(|h| h.join(".local/state")));
    let own = [directory("XDG_RUNTIME_DIR").map(|d| d.join("keepd/keepd.sock")), state.map(|d| d.join("keepd/keepd.sock"))];
    own.into_iter().flatten().find(|p| p.exists()).unwrap_or(system)
}

/// Connects to the daemon of this machine.
pub fn local(socket: &Path) -> Result<UnixStream, Failure> {
    UnixStream::connect(socket).map_err(|e| {
        let advice = match e.kind() {
            io::ErrorKind::PermissionDenied => "you may not connect to it; its group may (mostly keepd), or try with sudo",
            _ => "is keepd running? ('systemctl status keepd', or name its socket with --socket)",
        };
        let exit = if e.kind() == io::ErrorKind::PermissionDenied { Exit::NotPermitted } else { Exit::Unreachable };
        Failure::new(exit, format!("cannot reach keepd at {}: {e}; {advice}", socket.display()))
    })
}

impl Client {
    /// To the daemon of this machine, or of that which `--host` names.
    pub fn connect(socket: &Path) -> Result<Self, Failure> {
        match remote::connect() {
            None => Ok(Self { stream: local(socket)?, buffer: Vec::new(), place: socket.display().to_string() }),
            Some(stream) => Ok(Self { stream: stream?, buffer: Vec::new(), place: remote::host().unwrap_or_default() }),
        }
    }

    fn lost(&self, e: io::Error) -> Failure {
        // The thread that notices it may be a little later than we.
        if remote::host().is_some() {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        let text = remote::broken().unwrap_or_else(|| format!("the connection to keepd at {} was lost: {e}", self.place));
        Failure::new(Exit::Unreachable, text)
    }

    fn send(&mut self, method: &str, parameters: Value, more: bool, descriptors: &[BorrowedFd<'_>]) -> Result<(), Failure> {
        let call = Call { method: method.to_owned(), parameters: Some(parameters), more, oneway: false, upgrade: false };
        let mut bytes = serde_json::to_vec(&call).map_err(Failure::failed)?;
        bytes.push(0);
        let mut rest = bytes.as_slice();
        if !descriptors.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
                return Err(Failure::failed("more descriptors than one call takes"));
            }
            let sent = sendmsg(self.stream.as_fd(), &[IoSlice::new(rest)], &mut ancillary, SendFlags::NOSIGNAL)
                .map_err(|e| self.lost(e.into()))?;
            rest = rest.get(sent..).unwrap_or_default();
        }
        self.stream.write_all(rest).map_err(|e| self.lost(e))
    }

    fn receive(&mut self) -> Result<Reply, Failure> {
        let mut looked = 0;
        loop {
            if let Some(at) = self.buffer.iter().skip(looked).position(|b| *b == 0) {
                let rest = self.buffer.split_off(looked + at + 1);
                let mut frame = std::mem::replace(&mut self.buffer, rest);
                frame.pop();
                return serde_json::from_slice(&frame)
                    .map_err(|e| Failure::failed(format!("keepd answered with something that is no reply: {e}")));
            }
            looked = self.buffer.len();
            if looked > MAX_REPLY {
                return Err(Failure::failed("keepd answered with more than any reply has"));
            }
            let mut bytes = vec![0u8; 64 << 10];
            let n = self.stream.read(&mut bytes).map_err(|e| self.lost(e))?;
            if n == 0 {
                return Err(self.lost(io::ErrorKind::UnexpectedEof.into()));
            }
            self.buffer.extend_from_slice(bytes.get(..n).unwrap_or_default());
        }
    }

    /// One call, one reply.
    pub fn call<M: Method>(&mut self, parameters: &M::In) -> Result<M::Out, Failure> {
        self.call_with::<M>(parameters, &[])
    }

    /// One call with descriptors passed along, at most [`MAX_DESCRIPTORS`].
    pub fn call_with<M: Method>(&mut self, parameters: &M::In, descriptors: &[BorrowedFd<'_>]) -> Result<M::Out, Failure> {
        self.send(M::NAME, to_value(parameters)?, false, descriptors)?;
        let reply = self.receive()?;
        out::<M>(reply)
    }

    /// One call with keys lent to it, whose places stand in its parameters.
    pub fn call_lending<M: Method>(&mut self, parameters: &M::In, keys: &Keys) -> Result<M::Out, Failure> {
        self.call_with::<M>(parameters, &keys.descriptors().collect::<Vec<_>>())
    }

    /// The same with a descriptor to write into, which comes first.
    pub fn call_writing<M: Method>(&mut self, parameters: &M::In, out: BorrowedFd<'_>, keys: &Keys) -> Result<M::Out, Failure> {
        self.call_with::<M>(parameters, &std::iter::once(out).chain(keys.descriptors()).collect::<Vec<_>>())
    }

    /// One call, any number of replies; `each` gets every one.
    pub fn call_more<M: Method>(&mut self, parameters: &M::In, mut each: impl FnMut(M::Out) -> Result<(), Failure>) -> Result<(), Failure> {
        self.send(M::NAME, to_value(parameters)?, true, &[])?;
        loop {
            let reply = self.receive()?;
            let more = reply.continues;
            each(out::<M>(reply)?)?;
            if !more {
                return Ok(());
            }
        }
    }
}

fn to_value(parameters: &impl serde::Serialize) -> Result<Value, Failure> {
    serde_json::to_value(parameters).map_err(Failure::failed)
}

fn out<M: Method>(reply: Reply) -> Result<M::Out, Failure> {
    if let Some(error) = reply.error {
        return Err(failure(&error, reply.parameters.unwrap_or_default()));
    }
    let parameters = reply.parameters.unwrap_or_else(|| Value::Object(serde_json::Map::new()));
    serde_json::from_value(parameters)
        .map_err(|e| Failure::failed(format!("keepd's answer is not understood ({e}); is keepctl of another version?")))
}

/// What an error reply means.
fn failure(error: &str, parameters: Value) -> Failure {
    let text = |name: &str| parameters.get(name).and_then(Value::as_str).map(str::to_owned);
    let exit = match error {
        errors::NOT_PERMITTED | "org.varlink.service.PermissionDenied" => Exit::NotPermitted,
        errors::SHUTTING_DOWN => Exit::Unreachable,
        errors::AMBIGUOUS | "org.varlink.service.InvalidParameter" => Exit::Usage,
        _ => Exit::Failed,
    };
    let message = match error {
        "org.varlink.service.InvalidParameter" => format!("the value of '{}' is not accepted", text("parameter").unwrap_or_default()),
        "org.varlink.service.MethodNotFound" => {
            format!("keepd does not know {}; is it older than keepctl?", text("method").unwrap_or_default())
        }
        _ => text("message").unwrap_or_else(|| error.to_owned()),
    };
    Failure::new(exit, lines(&message))
}
