//! The walk: every directory of the local file systems once, in search of files that are SQLite databases.
//!
//! A file is opened only if it can be one: databases are whole pages long, so that a look at the length leaves out almost all other files. One that
//! a job captures is never opened (see `source::sqlite::is_database`).

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ignore::gitignore::Gitignore;
use keepd_protocol::model::{CoverageItem, CoverageKind};
use rustix::fs::{AtFlags, FileType, Mode, RawDir, Stat, openat, statat};
use rustix::io::Errno;

use super::held::Captured;
use super::mounts::Crossing;
use super::{Failure, Scan, patterns, shown, suggestion, written};
use crate::source::files::{CACHE_TAG, DIRECTORY_FLAGS, is_cache};
use crate::source::sqlite::is_database;

/// The smallest page.
const PAGE: u64 = 512;
/// What SQLite keeps beside a database; `-shm` must never be opened.
pub const COMPANIONS: [&str; 3] = ["-wal", "-shm", "-journal"];
/// Files with such names are opened whatever their length: what cut one short may have been a crash.
const ENDINGS: [&str; 6] = [".db", ".db3", ".sqlite", ".sqlite3", ".sqlitedb", ".s3db"];
/// Caches, the base system, what can be had again; looked into with `all`.
pub const CACHES: [&str; 33] = [
    "/tmp/",
    "/var/tmp/",
    "/var/cache/",
    "/usr/*/",
    "!/usr/local/",
    "/boot/",
    "/nix/store/",
    "/gnu/store/",
    "/ostree/",
    "/sysroot/",
    "/var/lib/docker/overlay2/",
    "/var/lib/docker/image/",
    "/var/lib/docker/containerd/",
    "/var/lib/containerd/",
    "**/containers/storage/overlay*/",
    "/var/lib/flatpak/",
    "/var/lib/snapd/",
    "/var/lib/systemd/coredump/",
    ".cache/",
    ".npm/",
    ".cargo/",
    ".rustup/",
    ".gradle/",
    ".m2/",
    ".git/",
    ".hg/",
    ".svn/",
    "node_modules/",
    "__pycache__/",
    ".tox/",
    ".Trash*/",
    "lost+found/",
    "**/Trash/files/",
];
/// Snapshots of file systems hold everything once more.
const SNAPSHOTS: [&str; 5] = [".snapshots/", ".snapshot/", ".zfs/", "/timeshift/", "timeshift-btrfs/"];
/// Databases of the base system, which it makes again.
const KNOWN: [&str; 14] = [
    "/var/lib/rpm/",
    "/usr/lib/sysimage/rpm/",
    "/var/lib/dnf/",
    "/usr/lib/sysimage/libdnf5/",
    "/var/lib/fwupd/",
    "/var/lib/command-not-found/",
    "/var/lib/PackageKit/",
    "/var/lib/app-info/",
    "/var/lib/swcatalog/",
    "/var/lib/colord/",
    "/var/lib/man-db/",
    "/var/lib/plocate/",
    "/var/lib/apt/",
    "/var/lib/selinux/",
];

/// What is left out while walking.
struct Rules {
    caches: Gitignore,
    snapshots: Gitignore,
    known: Gitignore,
}

/// A directory on the way down.
struct Level {
    fd: OwnedFd,
    path: PathBuf,
    device: u64,
    names: std::vec::IntoIter<Vec<u8>>,
    /// Of databases that are written to just now.
    logs: Vec<Vec<u8>>,
}

impl Scan<'_> {
    /// Looks through all roots; returns the directories of containers' volumes.
    pub fn walk(&mut self) -> Result<Vec<PathBuf>, Failure> {
        self.configured();
        let rules = Rules { caches: patterns(CACHES)?, snapshots: patterns(SNAPSHOTS)?, known: patterns(KNOWN)? };
        let mut captured = Captured::new();
        let mut volumes = Vec::new();
        for root in self.roots.clone() {
            let opened = rustix::fs::open(&root, DIRECTORY_FLAGS, Mode::empty()).map_err(|e| self.found.unreadable(&root, e));
            let Ok(fd) = opened else { continue };
            // Whatever a root is, somebody named it.
            let mut stack: Vec<Level> = self.enter(fd, root, None).into_iter().collect();
            while let Some(level) = stack.last_mut() {
                let Some(name) = level.names.next() else {
                    stack.pop();
                    continue;
                };
                if self.live.cancel.is_cancelled() {
                    return Err(Failure::Cancelled);
                }
                let path = level.path.join(OsStr::from_bytes(&name));
                let stat = match statat(&level.fd, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(stat) => stat,
                    Err(Errno::NOENT) => continue,
                    Err(e) => {
                        self.found.unreadable(&path, e);
                        continue;
                    }
                };
                match FileType::from_raw_mode(stat.st_mode) {
                    FileType::RegularFile => self.file(level, &name, path, &stat, &rules, &mut captured),
                    FileType::Directory => {
                        if self.passes(&path, &rules) {
                            continue;
                        }
                        if is_volume(&path) {
                            volumes.push(path.clone());
                        }
                        let device = level.device;
                        match openat(&level.fd, name.as_slice(), DIRECTORY_FLAGS, Mode::empty()) {
                            Ok(fd) => stack.extend(self.enter(fd, path, Some(device))),
                            Err(Errno::NOENT) => {}
                            Err(e) => self.found.unreadable(&path, e),
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(volumes)
    }

    /// Whether a directory is left out, which is counted.
    fn passes(&mut self, path: &Path, rules: &Rules) -> bool {
        let what = if self.excludes.matched(path, true).is_ignore() {
            "directories excluded by the configuration"
        } else if rules.snapshots.matched(path, true).is_ignore() {
            "directories of snapshots"
        } else if !self.all && rules.caches.matched(path, true).is_ignore() {
            "caches and directories of the base system"
        } else {
            return self.mounts.crossing(path) == Crossing::Leave;
        };
        self.found.skip(what);
        true
    }

    /// What is to be looked at in a directory. `device`: of the directory above.
    fn enter(&mut self, fd: OwnedFd, path: PathBuf, device: Option<u64>) -> Option<Level> {
        let stat = rustix::fs::fstat(&fd).map_err(|e| self.found.unreadable(&path, e)).ok()?;
        if self.own.contains(&(stat.st_dev, stat.st_ino)) {
            self.found.skip("directories of keepd's own");
            return None;
        }
        // Without the table of mounts only one file system is safe.
        if self.mounts.is_empty() && device.is_some_and(|device| device != stat.st_dev) {
            self.found.skip("other file systems");
            return None;
        }
        self.found.looked_at += 1;
        self.live.report.entry();
        let names = list(&fd).map_err(|e| self.found.unreadable(&path, e)).ok()?;
        if !self.all && device.is_some() && names.iter().any(|n| n == CACHE_TAG) && is_cache(&fd) {
            self.found.skip("caches and directories of the base system");
            return None;
        }
        let logs = names.iter().filter(|n| n.ends_with(b"-wal") || n.ends_with(b"-journal")).cloned().collect();
        Some(Level { fd, path, device: stat.st_dev, names: names.into_iter(), logs })
    }

    fn file(&mut self, level: &Level, name: &[u8], path: PathBuf, stat: &Stat, rules: &Rules, captured: &mut Captured) {
        self.found.looked_at += 1;
        self.live.report.entry();
        let id = (stat.st_dev, stat.st_ino);
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let is_companion = COMPANIONS.iter().any(|end| name.ends_with(end.as_bytes()));
        if size < PAGE || is_companion || captured.has((self.current)(), &path, id) {
            return;
        }
        let has_log = level.logs.iter().any(|log| log.strip_prefix(name).is_some_and(|end| end == b"-wal" || end == b"-journal"));
        let is_named = ENDINGS.iter().any(|end| name.to_ascii_lowercase().ends_with(end.as_bytes()));
        if size % PAGE != 0 && !has_log && !is_named && !self.all {
            return;
        }
        if self.excludes.matched(&path, false).is_ignore() {
            self.found.skip("files excluded by the configuration");
            return;
        }
        match is_database(&level.fd, name) {
            Ok(true) => {}
            Ok(false) | Err(Errno::NOENT) => return,
            Err(e) => return self.found.unreadable(&path, e),
        }
        self.databases.insert(path.clone());
        if rules.known.matched_path_or_any_parents(&path, false).is_ignore() {
            self.found.skip("databases of the base system, which it makes again");
            return;
        }
        let item = self.database(&path, stat.st_mtime, size);
        self.found.item(item);
    }

    /// The databases of `sqlite` sources, wherever they are.
    fn configured(&mut self) {
        for database in &self.jobs.databases {
            self.databases.insert(database.path.clone());
            let Ok(stat) = database.path.metadata() else { continue };
            let (bytes, modified) = with_log(&database.path, stat.size(), stat.mtime());
            self.found.item(CoverageItem {
                kind: CoverageKind::Sqlite,
                what: shown(&database.path),
                bytes: Some(bytes),
                modified: written(modified),
                covered_by: self.jobs.of_database(&database.path, database.id),
                reason: "captured as a database".into(),
                ..CoverageItem::default()
            });
        }
    }

    /// A database that is no `sqlite` source.
    fn database(&self, path: &Path, modified: i64, size: u64) -> CoverageItem {
        let by = self.jobs.of_path(path, false);
        let text = path.to_string_lossy();
        let commands = self.jobs.of_words(&[text.as_ref()]);
        let still = by.captured.iter().any(|d| d.still);
        let mut covered_by: Vec<String> = by.captured.iter().map(|d| d.source.clone()).collect();
        covered_by.extend(commands.iter().cloned());
        let (gap, reason) = if still {
            (false, "captured as a plain file while its application is held still".to_owned())
        } else if !commands.is_empty() {
            (false, "a command source names it".to_owned())
        } else if let Some(directory) = by.captured.first() {
            (true, format!("captured as a plain file by {}, which can be torn; add a sqlite source", directory.source))
        } else if let Some((directory, key)) = by.left_out.first() {
            (true, format!("in no job: {} leaves it out ({key})", directory.source))
        } else {
            (true, "in no job".to_owned())
        };
        let suggested = || {
            let near = by.captured.first().copied().or_else(|| by.left_out.first().map(|(directory, _)| *directory));
            let name = path.file_name()?.to_str()?;
            let mut more = String::new();
            if near.is_some_and(|d| d.names.iter().any(|n| n == name)) {
                let parent = path.parent().and_then(Path::file_name).and_then(OsStr::to_str).unwrap_or("other");
                more = format!("name = {}\n", toml::Value::from(format!("{parent}-{name}")));
            }
            if let Some(directory) = by.captured.first() {
                more += &format!(
                    "# and leave it out of the source {}: exclude = [{}]\n",
                    directory.source,
                    toml::Value::from(format!("{name}*"))
                );
            }
            suggestion(near.map(|d| d.job.as_str()), "sqlite", path, &more)
        };
        let suggestion = if gap { suggested() } else { None };
        let (bytes, modified) = with_log(path, size, modified);
        CoverageItem {
            kind: CoverageKind::Sqlite,
            what: shown(path),
            bytes: Some(bytes),
            modified: written(modified),
            covered_by,
            gap,
            reason,
            suggestion,
            ..CoverageItem::default()
        }
    }
}

/// Size and time of a database with its write-ahead log.
fn with_log(path: &Path, size: u64, modified: i64) -> (u64, i64) {
    let mut log = path.as_os_str().to_owned();
    log.push("-wal");
    match std::fs::symlink_metadata(&log) {
        Ok(stat) if stat.is_file() => (size.saturating_add(stat.size()), modified.max(stat.mtime())),
        _ => (size, modified),
    }
}

/// Where Docker and Podman keep what a container writes to a volume.
fn is_volume(path: &Path) -> bool {
    let mut parts = path.components().rev().map(|c| c.as_os_str().as_bytes());
    let (data, _name, volumes, above) = (parts.next(), parts.next(), parts.next(), parts.next());
    data == Some(b"_data") && volumes == Some(b"volumes") && (above == Some(b"docker") || above == Some(b"storage"))
}

/// The names in a directory; the whole list or an error.
fn list(fd: &OwnedFd) -> Result<Vec<Vec<u8>>, Errno> {
    let mut buffer = Vec::with_capacity(32 << 10);
    let mut entries = RawDir::new(fd, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        // What is neither a file nor a directory is not looked at.
        let may_be = matches!(entry.file_type(), FileType::RegularFile | FileType::Directory | FileType::Unknown);
        let name = entry.file_name().to_bytes();
        if may_be && name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_leave_out_what_they_should() {
        let caches = patterns(CACHES).unwrap();
        let left_out = |path: &str| caches.matched(path, true).is_ignore();
        for path in
            ["/tmp", "/var/cache", "/usr/lib", "/home/a/.cache", "/srv/x/node_modules", "/home/a/.local/share/containers/storage/overlay"]
        {
            assert!(left_out(path), "{path}");
        }
        for path in
            ["/usr", "/usr/local", "/srv/tmp", "/var/lib", "/var/lib/docker/volumes", "/home/a/.local/share/containers/storage/volumes"]
        {
            assert!(!left_out(path), "{path}");
        }
        assert!(patterns(KNOWN).unwrap().matched_path_or_any_parents("/var/lib/rpm/rpmdb.sqlite", false).is_ignore());
        assert!(!patterns(KNOWN).unwrap().matched_path_or_any_parents("/srv/rpm/rpmdb.sqlite", false).is_ignore());
        assert!(patterns(SNAPSHOTS).unwrap().matched("/home/.snapshots", true).is_ignore());
    }

    #[test]
    fn volumes_are_known_by_their_place() {
        for path in [
            "/var/lib/docker/volumes/shop/_data",
            "/data/docker/volumes/x/_data",
            "/home/a/.local/share/containers/storage/volumes/y/_data",
        ] {
            assert!(is_volume(Path::new(path)), "{path}");
        }
        for path in ["/var/lib/docker/volumes/shop", "/srv/volumes/x/_data", "/_data", "/"] {
            assert!(!is_volume(Path::new(path)), "{path}");
        }
    }
}
