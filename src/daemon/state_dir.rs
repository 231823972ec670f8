//! The state directory: made for the daemon's user alone.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    #[error("cannot make the state directory {path}: {source}; make it, or name another one as daemon.state_dir")]
    Make { path: String, source: std::io::Error },
    #[error("cannot use the state directory {path}: {source}")]
    Use { path: String, source: std::io::Error },
    #[error("cannot clear {path} of what an interrupted run left: {source}")]
    Clear { path: String, source: std::io::Error },
    #[error("the state directory {path} is not a directory; name another one as daemon.state_dir")]
    NoDirectory { path: String },
    #[error(
        "the state directory {path} belongs to uid {owner}, but keepd runs as uid {own}: whoever owns it could exchange what is in it; change its owner or name another one as daemon.state_dir"
    )]
    Owner { path: String, owner: u32, own: u32 },
}

/// How the names of files begin that take another's place when they are whole.
const HALF_WRITTEN: [&str; 4] = ["pagemap-", "pieces-new-", ".audit-head-", ".instance-"];

/// Makes the directory with mode 0700 where it is missing, and takes away what others may do there.
pub fn prepare(dir: &Path) -> Result<(), StateDirError> {
    let path = dir.display().to_string();
    crate::durable::make_private_directories(dir)
        .or_else(|e| if e.kind() == std::io::ErrorKind::AlreadyExists { Ok(()) } else { Err(e) })
        .map_err(|source| StateDirError::Make { path: path.clone(), source })?;
    // Follows a symlink: systemd makes one where the service has a user of its own.
    let meta = std::fs::metadata(dir).map_err(|source| StateDirError::Use { path: path.clone(), source })?;
    if !meta.is_dir() {
        return Err(StateDirError::NoDirectory { path });
    }
    let own = rustix::process::geteuid().as_raw();
    if meta.uid() != own {
        return Err(StateDirError::Owner { path, owner: meta.uid(), own });
    }
    if meta.mode() & 0o077 != 0 {
        tracing::warn!("the state directory {path} was open to others (mode {:04o}); made it 0700", meta.mode() & 0o7777);
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).map_err(|source| StateDirError::Use { path, source })?;
    }
    Ok(())
}

/// Removes what a run staged and could not remove because keepd was killed. Only for who holds the directory's lock.
pub fn clear_work(dir: &Path) -> Result<(), StateDirError> {
    let work = dir.join("work");
    crate::run::clear_staged(dir);
    for problem in crate::run::clear_dead_drills(dir, None) {
        tracing::warn!("{problem}");
    }
    clear_half_written(dir);
    let removed = match crate::run::remove_tree(&work) {
        // A file system of its own is mounted there.
        Err(e) if e.kind() == std::io::ErrorKind::ResourceBusy && std::fs::read_dir(&work).is_ok_and(|mut left| left.next().is_none()) => {
            Ok(())
        }
        removed => removed,
    };
    removed.map_err(|source| StateDirError::Clear { path: work.display().to_string(), source })
}

/// Removes what was to take the place of a source's cache, or of the note of the audit's head or of the instance, and was not finished: nobody else ever looks at it. Best effort.
fn clear_half_written(dir: &Path) {
    let below = |dir: std::path::PathBuf| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let sources = below(dir.join("repositories")).flat_map(|r| below(r.join("sources"))).flat_map(below).flat_map(below);
    for file in sources.chain(below(dir.to_owned())) {
        let name = file.file_name().unwrap_or_default().as_encoded_bytes();
        if HALF_WRITTEN.iter().any(|prefix| name.starts_with(prefix.as_bytes())) {
            let _ = std::fs::remove_file(&file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_half_written_goes_and_what_it_was_to_replace_stays() {
        let temp = tempfile::tempdir().expect("tempdir");
        let cache = temp.path().join("repositories/0a/sources/shop/db");
        std::fs::create_dir_all(&cache).expect("made");
        let (kept, gone) = (["pagemap", "pieces"], ["pagemap-Ab1", "pieces-new-Ab1"]);
        for name in kept.iter().chain(&gone) {
            std::fs::write(cache.join(name), "").expect("written");
        }
        std::fs::write(temp.path().join(".audit-head-Ab1"), "").expect("written");
        std::fs::write(temp.path().join(".instance-Ab1"), "").expect("written");
        std::fs::write(temp.path().join("audit-head"), "").expect("written");
        clear_work(temp.path()).expect("cleared");
        assert!(kept.iter().all(|n| cache.join(n).exists()) && temp.path().join("audit-head").exists());
        assert!(
            !gone.iter().any(|n| cache.join(n).exists())
                && !temp.path().join(".audit-head-Ab1").exists()
                && !temp.path().join(".instance-Ab1").exists()
        );
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).expect("exists").mode() & 0o7777
    }

    #[test]
    fn it_is_made_for_us_alone_and_closed_when_open() {
        let temp = tempfile::tempdir().expect("tempdir");
        let dir = temp.path().join("a/b");
        prepare(&dir).expect("made");
        assert_eq!(mode(&dir), 0o700);
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).expect("chmod");
        prepare(&dir).expect("closed");
        assert_eq!(mode(&dir), 0o700);
    }

    #[test]
    fn a_file_in_its_place_and_a_strangers_directory_are_refused() {
        let temp = tempfile::tempdir().expect("tempdir");
        let file = temp.path().join("file");
        std::fs::write(&file, "x").expect("write");
        let error = prepare(&file).expect_err("a file");
        assert!(error.to_string().contains("daemon.state_dir"), "{error}");
        if !rustix::process::geteuid().is_root() {
            assert!(matches!(prepare(Path::new("/")), Err(StateDirError::Owner { owner: 0, .. })));
        } else {
            std::os::unix::fs::chown(temp.path(), Some(65534), None).expect("chown");
            assert!(matches!(prepare(temp.path()), Err(StateDirError::Owner { owner: 65534, own: 0, .. })));
        }
    }
}
