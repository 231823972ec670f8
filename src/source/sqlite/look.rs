//! A look at a file that may be a database, which leaves the locks of a capture alone.

use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::alone::Alone;
use super::database::MAGIC;

/// Whether a file of a directory begins like a database. It is never opened while a capture of this process has it (then it is one), and only
/// if it is a regular file.
pub fn is_database(directory: impl AsFd, name: &[u8]) -> Result<bool, Errno> {
    // Such a descriptor opens nothing: it waits for no pipe, and closing it drops no locks.
    let handle = rustix::fs::openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let stat = rustix::fs::fstat(&handle)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(false);
    }
    let Some(_alone) = Alone::now((stat.st_dev, stat.st_ino)) else { return Ok(true) };
    let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path.as_str(), flags | OFlags::NOATIME, Mode::empty()) {
        // Only the owner may.
        Err(Errno::PERM) => rustix::fs::open(path.as_str(), flags, Mode::empty())?,
        other => other?,
    };
    let mut start = [0u8; MAGIC.len()];
    let read = rustix::io::pread(&file, &mut start, 0)?;
    Ok(read == start.len() && start == *MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_databases_are_and_nothing_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let fd = std::fs::File::open(dir.path()).unwrap();
        let look = |name: &str| is_database(&fd, name.as_bytes());
        let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        write("db", b"SQLite format 3\0and more");
        write("text", b"SQLite format 3 is what this text is about");
        write("short", b"SQLite format 3");
        write("empty", b"");
        std::os::unix::fs::symlink("db", dir.path().join("link")).unwrap();
        rustix::fs::mknodat(&fd, "pipe", FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert_eq!(look("db"), Ok(true));
        for other in ["text", "short", "empty", "link", "pipe"] {
            assert_eq!(look(other), Ok(false), "{other}");
        }
        assert_eq!(look("missing"), Err(Errno::NOENT));
        // As if it were being captured: whatever is in it is not looked at.
        use std::os::unix::fs::MetadataExt;
        let stat = dir.path().join("text").metadata().unwrap();
        let held = Alone::now((stat.dev(), stat.ino())).unwrap();
        assert_eq!(look("text"), Ok(true));
        drop(held);
        assert_eq!(look("text"), Ok(false));
    }
}
