//! Who is on the other side of a connection, as the kernel says.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// From linux/socket.h of all architectures but the one below; neither rustix nor nix has it.
#[cfg(not(any(target_arch = "sparc", target_arch = "sparc64")))]
const SO_PEERGROUPS: libc::c_int = 59;
#[cfg(any(target_arch = "sparc", target_arch = "sparc64"))]
const SO_PEERGROUPS: libc::c_int = 0x3d;

/// A caller's credentials as they were when it connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    /// The supplementary ones.
    pub groups: Vec<u32>,
}

impl Caller {
    pub fn is_in(&self, gid: u32) -> bool {
        self.gid == gid || self.groups.contains(&gid)
    }
}

/// The supplementary groups of whoever connected a Unix socket: those of the process, wherever they came from (files, LDAP, SSSD, a service manager).
pub fn groups_of(socket: impl AsFd) -> io::Result<Vec<u32>> {
    let socket = socket.as_fd();
    let mut groups = vec![0u32; 64];
    loop {
        match ask(socket, &mut groups) {
            Ok(count) => {
                groups.truncate(count);
                return Ok(groups);
            }
            // Now known how many there are; a process has at most 65536.
            Err((error, count)) if error.raw_os_error() == Some(libc::ERANGE) && count > groups.len() => groups.resize(count, 0),
            Err((error, _)) => return Err(error),
        }
    }
}

/// How many groups were written; an error comes with how many there are.
#[allow(unsafe_code)]
fn ask(socket: BorrowedFd<'_>, groups: &mut [u32]) -> Result<usize, (io::Error, usize)> {
    let mut bytes = libc::socklen_t::try_from(size_of_val(groups)).map_err(|e| (io::Error::other(e), 0))?;
    // SAFETY: the pointer and `bytes` name a buffer of u32, which gid_t is, that is borrowed exclusively for the call; the kernel writes at most `bytes`
    // bytes into it and then says in `bytes` how many it wrote or needs. The descriptor is open, for it is borrowed.
    let done = unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PEERGROUPS, groups.as_mut_ptr().cast(), &raw mut bytes) };
    let count = bytes as usize / size_of::<u32>();
    if done == 0 { Ok(count.min(groups.len())) } else { Err((io::Error::last_os_error(), count)) }
}

/// Root, and the user that keepd runs as.
pub fn is_owner(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// The user's name, or `uid 1000`. May block on the directory of users.
pub fn user_name(uid: u32) -> String {
    uzers::get_user_by_uid(uid).map_or_else(|| format!("uid {uid}"), |user| user.name().to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_our_own_groups() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut told = groups_of(&one).unwrap();
        let mut own: Vec<u32> = rustix::process::getgroups().unwrap().into_iter().map(|gid| gid.as_raw()).collect();
        told.sort_unstable();
        own.sort_unstable();
        assert_eq!(told, own);
    }
}
