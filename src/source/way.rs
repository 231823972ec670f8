//! The way to what is configured: which links on it are followed, and what is keepd's own.
//!
//! Whoever may write to a directory on the way to a source could put a link there that leads to what only others may read or write, and keepd may both. So
//! a link is followed only if root or keepd's own user made it, or lies where nobody else can put one. What is found is then opened without any
//! link, so that nobody can put one there afterwards.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use keepd_writer::open_beneath;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::SourceError;

/// As many links as the kernel follows.
const MOST_LINKS: usize = 40;

/// Device and inode of the state directory.
static STATE_DIR: OnceLock<(u64, u64)> = OnceLock::new();

/// From now on nothing in the state directory is a source, whatever way leads there.
pub fn keep_out(state_dir: &Path) {
    if let Ok(stat) = state_dir.metadata() {
        let _ = STATE_DIR.set((stat.dev(), stat.ino()));
    }
}

/// Whether a directory is the state directory.
pub fn is_state_dir(device: u64, inode: u64) -> bool {
    STATE_DIR.get().is_some_and(|own| *own == (device, inode))
}

/// Whether a path without links is in the state directory, or is it.
pub fn is_in_state_dir(path: &Path) -> bool {
    let is_it = |path: &Path| path.symlink_metadata().is_ok_and(|stat| is_state_dir(stat.dev(), stat.ino()));
    STATE_DIR.get().is_some() && path.ancestors().any(is_it)
}

/// Where a source's path leads, as far as it is there; an error where a link on the way is a stranger's, or where it leads to keepd's own state.
pub fn of_source(path: &Path) -> Result<PathBuf, SourceError> {
    let real = resolve(path).map_err(SourceError::Failed)?;
    match is_in_state_dir(&real) {
        true => Err(SourceError::Failed(format!(
            "{} leads to {}, in keepd's own state directory, which is in no backup and no restore",
            path.display(),
            real.display()
        ))),
        false => Ok(real),
    }
}

/// The path with all links resolved, as far as it is there; an error names a link that is not followed.
pub fn resolve(path: &Path) -> Result<PathBuf, String> {
    resolve_as(path, &|uid| uid == 0 || uid == rustix::process::geteuid().as_raw())
}

fn resolve_as(path: &Path, is_trusted: &dyn Fn(u32) -> bool) -> Result<PathBuf, String> {
    let mut left: VecDeque<OsString> = parts(path);
    let (mut real, mut links, mut is_there) = (PathBuf::from("/"), 0, true);
    while let Some(part) = left.pop_front() {
        if part == ".." {
            real.pop();
            continue;
        }
        let next = real.join(&part);
        let stat = match next.symlink_metadata() {
            _ if !is_there => None,
            Ok(stat) => Some(stat),
            // Nothing below it can be a link.
            Err(_) => None,
        };
        is_there = stat.is_some();
        let Some(link) = stat.filter(|stat| stat.file_type().is_symlink()) else {
            real = next;
            continue;
        };
        links += 1;
        let cannot = |why: &str| format!("{} leads through {}, {why}", path.display(), next.display());
        if links > MOST_LINKS {
            return Err(cannot("one link too many"));
        }
        // Where nobody else may put anything, whoever has the link was given it.
        let is_safe = || real.symlink_metadata().is_ok_and(|above| is_trusted(above.uid()) && above.mode() & 0o022 == 0);
        let to = next.read_link().map_err(|e| cannot(&format!("a link that cannot be read: {e}")))?;
        if !is_trusted(link.uid()) && !is_safe() {
            return Err(cannot(&format!(
                "which is a link made by {}: it could lead to what others may not read or change; configure the path that it leads to ({})",
                owner(link.uid()),
                to.display()
            )));
        }
        if to.is_absolute() {
            real = PathBuf::from("/");
        }
        let mut more = parts(&to);
        more.append(&mut left);
        left = more;
    }
    Ok(real)
}

fn parts(path: &Path) -> VecDeque<OsString> {
    let part = |component: Component<'_>| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().filter_map(part).collect()
}

fn owner(uid: u32) -> String {
    uzers::get_user_by_uid(uid).map_or_else(|| format!("uid {uid}"), |user| user.name().to_string_lossy().escape_debug().to_string())
}

/// Opens what [`resolve`] found, through no link at all.
pub fn open(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let inside = path.as_os_str().as_bytes();
    let inside = inside.iter().position(|b| *b != b'/').and_then(|at| inside.get(at..)).unwrap_or(b".");
    open_beneath(&root, inside, flags | OFlags::CLOEXEC)
}

/// Makes a directory that is not there, through no link.
pub fn make_directory(path: &Path, mode: Mode) -> Result<(), Errno> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(Errno::INVAL) };
    rustix::fs::mkdirat(open(parent, OFlags::PATH | OFlags::DIRECTORY)?, name, mode)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, lchown, symlink};

    use super::*;

    #[test]
    fn links_are_followed_where_they_can_be_believed() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(top.join("there/below")).unwrap();
        symlink("there", top.join("relative")).unwrap();
        symlink(top.join("relative/../there"), top.join("absolute")).unwrap();
        symlink("circle", top.join("circle")).unwrap();
        for (path, to) in [
            ("there/below", "there/below"),
            ("relative/below", "there/below"),
            ("absolute/below/../below", "there/below"),
            ("relative/not/yet", "there/not/yet"),
            ("nothing/at/all", "nothing/at/all"),
        ] {
            assert_eq!(resolve(&top.join(path)).unwrap(), top.join(to), "{path}");
        }
        assert!(resolve(&top.join("circle/x")).unwrap_err().contains("too many"));
        // A stranger's: refused, wherever on the way, unless it lies where only we may put one.
        let own = rustix::process::geteuid().as_raw();
        let stranger = |uid: u32| uid != own;
        std::fs::set_permissions(&top, std::fs::Permissions::from_mode(0o755)).unwrap();
        let refused = resolve_as(&top.join("relative/below"), &stranger).unwrap_err();
        assert!(refused.contains("/relative, which is a link made by") && refused.contains("(there)"), "{refused}");
        if own == 0 {
            lchown(top.join("relative"), Some(65534), Some(65534)).unwrap();
            assert!(resolve(&top.join("relative")).is_ok(), "root's own directory");
            std::fs::set_permissions(&top, std::fs::Permissions::from_mode(0o1777)).unwrap();
            for path in ["relative", "relative/below", "absolute"] {
                assert!(resolve(&top.join(path)).unwrap_err().contains("a link made by"), "{path}");
            }
        }
    }

    #[test]
    fn what_was_found_is_opened_through_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        std::fs::create_dir(top.join("a")).unwrap();
        std::fs::write(top.join("a/file"), "x").unwrap();
        symlink("a", top.join("b")).unwrap();
        assert!(open(&top.join("a/file"), OFlags::RDONLY).is_ok());
        assert!(open(Path::new("/"), OFlags::RDONLY | OFlags::DIRECTORY).is_ok());
        assert!(open(&top.join("b/file"), OFlags::RDONLY).is_err());
        assert!(open(&top.join("b"), OFlags::RDONLY).is_err());
        assert!(make_directory(&top.join("b/new"), Mode::RWXU).is_err() && !top.join("a/new").exists());
        make_directory(&top.join("a/new"), Mode::RWXU).unwrap();
    }
}
