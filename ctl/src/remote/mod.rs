//! `--host`: the daemon of another machine, through ssh to its socket there.
//!
//! ssh runs `keepctl bridge` on that machine, which connects to the daemon as the user who logged in: there are no rights but that user's. Over the one
//! line go all connections of this keepctl, and what it passes along as descriptors: files and pipes here are pipes and files in memory there (`near`,
//! `far`, `pump`, `frame`). The idea is `systemctl --host` with its systemd-stdio-bridge. [docs/remote.md] says what a user has of it.

pub mod far;
mod frame;
mod near;
mod pump;
mod ssh;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

pub use ssh::RemoteArguments;

use crate::{Exit, Failure};
use near::Link;
use ssh::Host;

/// Where this keepctl is to go, if it is another machine.
struct Wanted {
    host: Host,
    arguments: RemoteArguments,
    socket: Option<String>,
}

static WANTED: OnceLock<Wanted> = OnceLock::new();
static LINK: OnceLock<Result<Link, (Exit, String)>> = OnceLock::new();
static TROUBLE: AtomicBool = AtomicBool::new(false);

/// Looks where the arguments and the environment lead. Nothing is started yet.
pub fn choose(arguments: &RemoteArguments, socket: Option<&Path>) -> Result<(), Failure> {
    let usage = |text: String| Failure::new(Exit::Usage, text);
    let Some(host) = arguments.host().map_err(usage)? else {
        return match arguments.remote_command.is_some() || !arguments.ssh_option.is_empty() {
            true => Err(usage("--remote-command and --ssh-option are for --host".into())),
            false => Ok(()),
        };
    };
    let socket = match socket.map(Path::to_str) {
        None => None,
        Some(Some(socket)) => Some(socket.to_owned()),
        Some(None) => return Err(usage("the path of the socket there is no text".into())),
    };
    let _ = WANTED.set(Wanted { host, arguments: arguments.clone(), socket });
    Ok(())
}

/// The other machine, where one was chosen.
pub fn host() -> Option<String> {
    WANTED.get().map(|wanted| wanted.host.to_string())
}

/// A connection to the daemon of the other machine; None where none was chosen.
pub fn connect() -> Option<Result<UnixStream, Failure>> {
    let wanted = WANTED.get()?;
    let start = || Link::start(&wanted.host, &wanted.arguments, wanted.socket.clone()).map_err(|f| (f.exit, f.text));
    Some(match LINK.get_or_init(start) {
        Ok(link) => link.open(),
        Err((exit, text)) => Err(Failure::new(*exit, text)),
    })
}

fn link() -> Option<&'static Link> {
    LINK.get().and_then(|link| link.as_ref().ok())
}

/// Waits until what the daemon wrote into passed descriptors is where it belongs, and what it reads has gone. At once without another machine.
pub fn settle() -> Result<(), Failure> {
    link().map_or(Ok(()), Link::settle)
}

/// Why the line is gone, where it is.
pub fn broken() -> Option<String> {
    link().and_then(Link::broken)
}

/// Hangs up.
pub fn end() {
    if let Some(link) = link() {
        link.end();
    }
}

/// What needs this machine.
pub fn refuse(what: &str) -> Result<(), Failure> {
    match host() {
        None => Ok(()),
        Some(host) => Err(Failure::new(Exit::Usage, format!("{what}; run it on {host}"))),
    }
}

fn tell_trouble(text: &str) {
    TROUBLE.store(true, Ordering::Release);
    eprintln!("keepctl: {text}");
}

fn trouble() -> bool {
    TROUBLE.load(Ordering::Acquire)
}
