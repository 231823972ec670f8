//! Stand-ins for rooms that are being built beside this one. Each has the shape `wiring` expects of the real one; the file
//! goes away with the last of them.

use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use keepd_protocol::model::Run;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::wiring::ControlParts;
use crate::config::*;
use crate::ledger::Ledger;
use crate::run::Runs;

// config::default_path, config::load
pub fn default_path() -> PathBuf {
    PathBuf::from("/etc/keepd/keepd.toml")
}

pub fn load(path: &Path) -> Result<Config, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| format!("{}: {}", path.display(), e.message()))?;
    let daemon = table.get("daemon").and_then(|d| d.as_table());
    let get = |key: &str, default: &str| PathBuf::from(daemon.and_then(|d| d.get(key)).and_then(|v| v.as_str()).unwrap_or(default));
    let jobs = table.get("job").and_then(|j| j.as_table()).into_iter().flatten().map(|(name, _)| {
        let job = Job {
            name: name.clone(),
            enabled: true,
            schedule: None,
            timezone: None,
            jitter: Default::default(),
            max_age: None,
            destinations: vec![],
            retention: Retention::default(),
            retry: Retry { attempts: 1, backoff: Default::default() },
            sources: vec![],
        };
        (name.clone(), job)
    });
    Ok(Config {
        files: vec![path.to_owned()],
        daemon: Daemon {
            state_dir: get("state_dir", "/var/lib/keepd"),
            socket: get("socket", "/run/keepd/keepd.sock"),
            max_parallel_runs: 2,
            memory: 256 << 20,
        },
        encryption: Default::default(),
        destinations: Default::default(),
        jobs: jobs.collect(),
    })
}

// crypto::key_file::generate, crypto::key_file::load
pub fn generate_key(file: &Path) -> Result<(), String> {
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .map(drop)
        .map_err(|e| format!("{}: {e}", file.display()))
}

pub fn check_key(file: &Path) -> std::io::Result<()> {
    std::fs::metadata(file).map(drop)
}

// ledger::StateLock
pub struct StateLock(#[allow(dead_code)] std::fs::File);

impl StateLock {
    pub fn acquire(dir: &Path) -> Result<Self, String> {
        let file = dir.join("lock");
        let file =
            std::fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(file).map_err(|e| e.to_string())?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| format!("another keepd uses the state directory {}", dir.display()))?;
        Ok(Self(file))
    }
}

// schedule::Scheduler
pub struct Scheduler {
    pings: mpsc::Sender<oneshot::Sender<()>>,
    inbox: tokio::sync::Mutex<mpsc::Receiver<oneshot::Sender<()>>>,
}

impl Scheduler {
    pub fn new(_: Arc<Current>, _: Arc<Ledger>, _: Arc<Runs>) -> Self {
        let (pings, inbox) = mpsc::channel(1);
        Self { pings, inbox: tokio::sync::Mutex::new(inbox) }
    }

    pub async fn run(&self, cancel: CancellationToken) {
        let mut inbox = self.inbox.lock().await;
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                Some(ping) = inbox.recv() => { let _ = ping.send(()); }
            }
        }
    }

    pub fn config_changed(&self) {}

    pub async fn ping(&self) {
        let (answer, answered) = oneshot::channel();
        let _ = self.pings.send(answer).await;
        let _ = answered.await;
    }

    pub fn next(&self) -> Option<(String, Timestamp)> {
        None
    }

    pub fn job_finished(&self, _: &Run) {}
}

// control::listener::listen, control::serve
pub struct Listener {
    socket: UnixListener,
    own: Option<PathBuf>,
}

impl Listener {
    pub fn describe(&self) -> String {
        match &self.own {
            Some(path) => path.display().to_string(),
            None => "the socket systemd passed".into(),
        }
    }
}

pub fn listen(path: &Path) -> std::io::Result<Listener> {
    if let Some(fd) = sd_notify::listen_fds()?.next() {
        #[allow(unsafe_code)]
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let socket = std::os::unix::net::UnixListener::from(fd);
        socket.set_nonblocking(true)?;
        return Ok(Listener { socket: UnixListener::from_std(socket)?, own: None });
    }
    let _ = std::fs::remove_file(path);
    let socket = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(Listener { socket, own: Some(path.to_owned()) })
}

pub async fn serve(listener: Listener, parts: ControlParts, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            _ = listener.socket.accept() => {}
        }
    }
    drop(parts);
    if let Some(path) = &listener.own {
        let _ = std::fs::remove_file(path);
    }
}
