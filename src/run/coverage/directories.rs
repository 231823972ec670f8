//! Directories that services write to: what in them is neither a database that is looked at by itself nor in any job.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use keepd_protocol::model::{CoverageItem, CoverageKind};

use super::mounts::Crossing;
use super::sqlite::{CACHES, COMPANIONS};
use super::{Failure, Scan, patterns, shown, suggestion, written};

/// Entries of a directory that are looked at.
const MAX_MEASURED: u64 = 200_000;
/// Too wide, passing, or the base system's: a service that names one of these says nothing of its data.
const WIDE: [&str; 24] = [
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/home",
    "/lib",
    "/media",
    "/mnt",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/sys",
    "/tmp",
    "/usr",
    "/var",
    "/var/cache",
    "/var/lib",
    "/var/log",
    "/var/run",
    "/var/spool",
    "/var/tmp",
    "/var/lib/private",
];
/// What lies below these is never a service's own data.
const NEVER: [&str; 12] = ["/bin", "/boot", "/dev", "/etc", "/lib", "/proc", "/run", "/sbin", "/sys", "/usr/lib", "/var/cache", "/var/log"];

/// What is in a directory and in no job.
#[derive(Default)]
struct Measured {
    files: u64,
    bytes: u64,
    modified: Option<i64>,
    /// Sources that hold some of it.
    by: BTreeSet<String>,
    /// There is more than was looked at.
    cut: bool,
}

impl Scan<'_> {
    /// Items for directories (with links, perhaps), each with whose it is.
    pub fn directories(&mut self, candidates: Vec<(PathBuf, String)>) -> Result<(), Failure> {
        let mut owners: BTreeMap<PathBuf, BTreeSet<String>> = BTreeMap::new();
        for (path, owner) in candidates {
            let Ok(path) = path.canonicalize() else { continue };
            let is_wide = WIDE.iter().any(|wide| path == Path::new(wide)) || NEVER.iter().any(|never| path.starts_with(never));
            if !is_wide && path.is_dir() && self.is_meant(&path, true) && !self.is_own(&path) {
                owners.entry(path).or_default().insert(owner);
            }
        }
        let all: Vec<PathBuf> = owners.keys().cloned().collect();
        for (path, owners) in owners {
            self.check()?;
            if all.iter().any(|other| *other != path && path.starts_with(other)) {
                continue;
            }
            let owners = owners.into_iter().collect::<Vec<_>>().join(", ");
            if let Some(item) = self.directory(&path, owners)? {
                self.found.item(item);
            }
        }
        Ok(())
    }

    fn is_own(&self, path: &Path) -> bool {
        let is_own = |path: &Path| path.metadata().is_ok_and(|stat| self.own.contains(&(stat.dev(), stat.ino())));
        path.ancestors().any(is_own)
    }

    /// None for one that holds nothing, or only databases.
    fn directory(&mut self, path: &Path, owners: String) -> Result<Option<CoverageItem>, Failure> {
        let item = CoverageItem { kind: CoverageKind::DataDirectory, what: shown(path), r#where: owners, ..CoverageItem::default() };
        let by = self.jobs.of_path(path, true);
        let (captured, left_out): (Vec<String>, _) = (
            by.captured.iter().map(|d| d.source.clone()).collect(),
            by.left_out.first().map(|(directory, key)| (directory.job.clone(), format!("{} leaves it out ({key})", directory.source))),
        );
        if !captured.is_empty() {
            return Ok(Some(CoverageItem { covered_by: captured, reason: "captured as files".into(), ..item }));
        }
        let measured = self.measure(path)?;
        let by: Vec<String> = measured.by.into_iter().collect();
        let at_least = if measured.cut { "at least " } else { "" };
        let reason = match (measured.files, &left_out, by.is_empty()) {
            (0, _, true) => return Ok(None),
            (0, _, false) => "all of it that is no database of its own is in jobs".to_owned(),
            (_, Some((_, text)), _) => format!("in no job: {text}"),
            (_, None, true) => "in no job".to_owned(),
            (files, None, false) => format!("{at_least}{files} files of it are in no job"),
        };
        let gap = measured.files > 0;
        let job = left_out.as_ref().map(|(job, _)| job.as_str());
        Ok(Some(CoverageItem {
            bytes: Some(measured.bytes),
            modified: measured.modified.and_then(written),
            covered_by: by,
            gap,
            reason,
            suggestion: if gap { suggestion(job, "files", path, "") } else { None },
            ..item
        }))
    }

    fn measure(&mut self, directory: &Path) -> Result<Measured, Failure> {
        let caches = patterns(CACHES)?;
        let mut measured = Measured::default();
        let mut looked = 0;
        let mut stack = vec![directory.to_owned()];
        while let Some(directory) = stack.pop() {
            if self.served.iter().any(|served| directory.starts_with(served)) {
                continue;
            }
            let entries = match std::fs::read_dir(&directory) {
                Ok(entries) => entries,
                Err(e) => {
                    self.found.unreadable(&directory, e);
                    continue;
                }
            };
            for entry in entries {
                self.check()?;
                looked += 1;
                if looked > MAX_MEASURED {
                    measured.cut = true;
                    return Ok(measured);
                }
                let stated = entry.and_then(|entry| Ok((entry.path(), entry.metadata()?)));
                let Ok((path, stat)) = stated.map_err(|e| self.found.unreadable(&directory, e)) else { continue };
                let is_directory = stat.is_dir();
                if (!is_directory && !stat.is_file()) || self.excludes.matched(&path, is_directory).is_ignore() {
                    continue;
                }
                let passed = !self.all && caches.matched(&path, true).is_ignore()
                    || self.own.contains(&(stat.dev(), stat.ino()))
                    || self.mounts.crossing(&path) == Crossing::Leave;
                if is_directory && passed || !is_directory && self.is_of_database(&path) {
                    continue;
                }
                let by = self.jobs.of_path(&path, is_directory);
                if !by.captured.is_empty() {
                    measured.by.extend(by.captured.iter().map(|d| d.source.clone()));
                } else if is_directory {
                    stack.push(path);
                } else {
                    measured.files += 1;
                    measured.bytes += stat.len();
                    measured.modified = measured.modified.max(Some(stat.mtime()));
                }
            }
        }
        Ok(measured)
    }

    /// A database that is an item of its own, or a file beside it.
    fn is_of_database(&self, path: &Path) -> bool {
        let bytes = path.as_os_str().as_bytes();
        let of = |end: &str| bytes.strip_suffix(end.as_bytes()).map(|b| Path::new(std::ffi::OsStr::from_bytes(b)));
        self.databases.contains(path) || COMPANIONS.iter().filter_map(|end| of(end)).any(|path| self.databases.contains(path))
    }
}
