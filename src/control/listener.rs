//! The listening socket: handed over by systemd, or made here.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen as start_listening, socket_with};

/// Root and the socket's group may connect; who may do what is decided by peer credentials.
const MODE: u32 = 0o660;
const BACKLOG: i32 = 128;

#[derive(Debug, thiserror::Error)]
#[error("the control socket: {0}")]
pub struct ListenError(String);

/// A listening socket; one we made ourselves is removed on drop.
#[derive(Debug)]
pub struct Listening {
    pub listener: UnixListener,
    made: Option<PathBuf>,
}

impl Listening {
    /// The path, where we made it.
    pub fn path(&self) -> Option<&Path> {
        self.made.as_deref()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Takes the socket of systemd's socket activation, or makes one at `path`.
pub fn listen(path: &Path) -> Result<Listening, ListenError> {
    match activated()? {
        Some(listener) => Ok(Listening { listener, made: None }),
        None => Ok(Listening { listener: make(path)?, made: Some(path.to_owned()) }),
    }
}

/// The socket in LISTEN_FDS: exactly one, a listening Unix stream socket.
fn activated() -> Result<Option<UnixListener>, ListenError> {
    let fds: Vec<_> = sd_notify::listen_fds().map_err(|e| ListenError(format!("LISTEN_FDS cannot be read: {e}")))?.collect();
    let fd = match fds.as_slice() {
        [] => return Ok(None),
        [fd] => *fd,
        more => return Err(ListenError(format!("systemd passed {} sockets, one is expected", more.len()))),
    };
    let fd = adopt(fd);
    let wrong = |e: rustix::io::Errno| ListenError(format!("the descriptor systemd passed is no socket: {e}"));
    let listening = rustix::net::sockopt::socket_acceptconn(&fd).map_err(wrong)?;
    let domain = rustix::net::sockopt::socket_domain(&fd).map_err(wrong)?;
    let kind = rustix::net::sockopt::socket_type(&fd).map_err(wrong)?;
    if !listening || domain != AddressFamily::UNIX || kind != SocketType::STREAM {
        return Err(ListenError(
            "the socket systemd passed is no listening Unix stream socket (ListenStream=/run/keepd/keepd.sock)".into(),
        ));
    }
    Ok(Some(UnixListener::from(fd)))
}

/// Takes ownership of a descriptor that systemd passed.
#[allow(unsafe_code)]
fn adopt(fd: std::os::fd::RawFd) -> OwnedFd {
    // SAFETY: sd_notify checked LISTEN_PID, so systemd opened this descriptor for us, and nothing else in the process
    // refers to it: this runs once, at start.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn make(path: &Path) -> Result<UnixListener, ListenError> {
    let failed = |what: &str, e: io::Error| ListenError(format!("cannot {what} {}: {e}", path.display()));
    if let Some(parent) = path.parent().filter(|p| !p.exists()) {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(|e| failed("make the directory of", e))?;
    }
    clear_stale(path)?;
    let address = SocketAddrUnix::new(path).map_err(|e| failed("use the path (longer than 107 bytes?)", e.into()))?;
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|e| failed("make a socket for", e.into()))?;
    bind(&fd, &address).map_err(|e| failed("bind", e.into()))?;
    // Nobody can connect before listen(), so the mode is right from the first moment on.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(MODE)).map_err(|e| failed("set the mode of", e))?;
    start_listening(fd.as_fd(), BACKLOG).map_err(|e| failed("listen on", e.into()))?;
    Ok(UnixListener::from(fd))
}

/// Removes a socket that a daemon left behind; one that answers, or something else at that place, is an error.
fn clear_stale(path: &Path) -> Result<(), ListenError> {
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(ListenError(format!("cannot look at {}: {e}", path.display()))),
    };
    if !meta.file_type().is_socket() {
        return Err(ListenError(format!("{} exists and is no socket; move it away or configure another socket", path.display())));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(ListenError(format!("another keepd answers at {}; stop it, or configure another socket", path.display()))),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|e| ListenError(format!("cannot remove the stale socket {}: {e}", path.display())))
        }
        Err(e) => Err(ListenError(format!("cannot find out whether somebody answers at {}: {e}", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn stale_live_and_foreign_paths() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/keepd.sock");
        let first = listen(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, MODE);
        assert!(listen(&path).unwrap_err().to_string().contains("another keepd answers"));
        drop(first);
        assert!(!path.exists(), "our own socket is removed");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a killed daemon leaves its socket");
        drop(listen(&path).unwrap());
        std::fs::write(&path, "x").unwrap();
        assert!(listen(&path).unwrap_err().to_string().contains("no socket"));
    }
}
