//! Opening what lies beneath a directory, and nothing elsewhere.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// Opens `path`, relative to `root`, through no symlink and no `..`. The last component may be one with `O_PATH` and `O_NOFOLLOW`, which name the
/// symlink itself.
///
/// The kernel sees to that, where it may be asked: the sandbox of a service that is forbidden to make set-user-ID files takes openat2 away. There each
/// component is opened in the one before, which nobody can exchange on the way either.
pub fn open_beneath(root: impl AsFd, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    match rustix::fs::openat2(&root, path, flags, Mode::empty(), BENEATH) {
        Err(Errno::NOSYS) => by_components(root, path, flags),
        other => other,
    }
}

fn by_components(root: impl AsFd, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    const STEP: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
    if path.first() == Some(&b'/') {
        return Err(Errno::XDEV);
    }
    let mut components = path.split(|b| *b == b'/').filter(|c| !c.is_empty() && *c != b".").peekable();
    let mut at = rustix::fs::openat(&root, ".", STEP, Mode::empty())?;
    while let Some(component) = components.next() {
        if component == b".." {
            return Err(Errno::XDEV);
        }
        if components.peek().is_none() {
            return rustix::fs::openat(&at, component, flags | OFlags::NOFOLLOW, Mode::empty());
        }
        at = rustix::fs::openat(&at, component, STEP, Mode::empty())?;
    }
    rustix::fs::openat(&at, ".", flags | OFlags::NOFOLLOW, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_open_the_same_and_nothing_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        std::fs::create_dir_all(top.join("a/b")).unwrap();
        std::fs::write(top.join("a/b/file"), "x").unwrap();
        std::fs::write(dir.path().join("secret"), "x").unwrap();
        for (link, to) in [("out", ".."), ("in", "a/b"), ("a/file", "b/file"), ("a/secret", "../../secret")] {
            std::os::unix::fs::symlink(to, top.join(link)).unwrap();
        }
        let root = std::fs::File::open(&top).unwrap();
        let cases: [(&str, bool); 14] = [
            ("a/b/file", true),
            ("a/b", true),
            (".", true),
            ("a/./b/file", true),
            ("..", false),
            ("a/../../secret", false),
            ("/etc/passwd", false),
            ("out/secret", false),
            ("in/file", false),
            ("a/file", false),
            ("a/secret", false),
            ("a/none", false),
            ("a/b/file/x", false),
            ("in", false),
        ];
        for (path, opens) in cases {
            let ways = [open_beneath(&root, path.as_bytes(), OFlags::RDONLY), by_components(&root, path.as_bytes(), OFlags::RDONLY)];
            assert!(ways.iter().all(|way| way.is_ok() == opens), "{path}: {ways:?}");
        }
        // The symlink itself.
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        for way in [open_beneath(&root, b"a/secret", flags), by_components(&root, b"a/secret", flags)] {
            let stat = rustix::fs::fstat(way.unwrap()).unwrap();
            assert_eq!(rustix::fs::FileType::from_raw_mode(stat.st_mode), rustix::fs::FileType::Symlink);
        }
    }
}
