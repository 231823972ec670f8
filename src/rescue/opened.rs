//! A repository opened for a rescue, with the list of its backups.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressStyle};
use keepd_protocol::model::{Backup, BackupDetail};
use tokio_util::sync::CancellationToken;

use super::arguments::{Of, Place};
use super::{Failure, Result, keys, place, tell_some};
use crate::archive::pour::What;
use crate::archive::{ArchiveName, Archives};
use crate::config::Compression;
use crate::ledger::Ledger;
use crate::portable::Packing;
use crate::repository::{Manifest, OpenOptions, Repository};
use crate::run::archived::{self, stage};
use crate::run::backup::unhex;
use crate::run::catalogue;
use crate::storage::Storage;

/// What buffers may hold, in bytes.
const MEMORY: u64 = 256 << 20;
/// What the catalogue calls the place.
const NAME: &str = "rescue";

pub struct Opened {
    pub repository: Arc<Repository>,
    /// Where the destination keeps archives: they are read into the repository, which lies in the scratch directory then.
    pub archives: Option<Archives>,
    pub ledger: Ledger,
    /// What of the index or of the list of backups is damaged; the rest is there.
    pub problems: Vec<String>,
    pub cancel: CancellationToken,
    /// For what does not fit into memory.
    pub scratch: PathBuf,
    /// The directory that the destination is, without links.
    root: Option<PathBuf>,
    /// Gone when this is dropped.
    _temporary: Option<tempfile::TempDir>,
    _runtime: tokio::runtime::Runtime,
}

impl Opened {
    /// Signals end what it does from now on.
    pub fn open(arguments: &Place) -> Result<Self> {
        let (cancel, leavings) = (CancellationToken::new(), Leavings::default());
        cancel_by_signals(&cancel, leavings.clone())?;
        Self::open_with(arguments, cancel, leavings)
    }

    /// The same without looking after signals.
    pub fn open_with(arguments: &Place, cancel: CancellationToken, leavings: Leavings) -> Result<Self> {
        let (destination, only) = match place::archive(&arguments.destination) {
            Some((directory, file)) => (place::destination(directory.as_os_str(), None)?, Some(file)),
            None => (place::destination(&arguments.destination, arguments.name.as_deref())?, None),
        };
        // Where one archive is named, its directory is anybody's.
        let root = destination.directory().filter(|_| only.is_none()).map(Path::new).map(resolved);
        let temporary_place = std::env::temp_dir();
        outside(root.as_deref(), arguments.cache.as_deref().unwrap_or(&temporary_place), "the cache (--cache DIR)")?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.map_err(|e| Failure::failed(format!("cannot start the async runtime: {e}")))?;
        let storage = Storage::open(&destination, runtime.handle().clone()).map_err(Failure::failed)?;
        let (profile, lent) = keys::keys(arguments, &storage)?;
        let (scratch, temporary) = scratch(arguments.cache.as_deref())?;
        *leavings.lock().unwrap_or_else(PoisonError::into_inner) = temporary.as_ref().map(|t| t.path().to_owned());
        if only.is_some() || has_archives(&storage)? {
            let made = |e: std::io::Error| Failure::failed(format!("cannot make a directory in {}: {e}", scratch.display()));
            // Gone with the temporary directory, or with this process' memory: its key is there alone.
            let temporary = match temporary {
                Some(temporary) => temporary,
                None => tempfile::Builder::new().prefix("archives-").tempdir_in(&scratch).map_err(made)?,
            };
            let scratch = temporary.path().to_owned();
            *leavings.lock().unwrap_or_else(PoisonError::into_inner) = Some(scratch.clone());
            let repository = stage::fresh(runtime.handle(), MEMORY, &scratch.join("staged"))?;
            let (packing, private_keys) = (Packing::None, lent.keys().to_vec());
            let archives = Archives { storage, name: NAME.to_owned(), profile, packing, private_keys, work_dir: scratch.clone(), only };
            let ledger = Ledger::open(&scratch).map_err(Failure::failed)?;
            let problems = archived::catalogue::sync(&archives, &ledger, &cancel)?;
            let archives = Some(archives);
            return Ok(Self {
                repository,
                archives,
                ledger,
                problems,
                cancel,
                scratch,
                root,
                _temporary: Some(temporary),
                _runtime: runtime,
            });
        }
        let options = OpenOptions {
            profile: profile.as_ref(),
            compression: Compression::Zstd,
            cache_root: &scratch,
            known_id: None,
            create: false,
            memory: MEMORY,
        };
        let repository = Repository::open(storage, &options)?;
        repository.lend(&lent);
        let mut problems = repository.sync_index()?;
        let ledger = Ledger::open(repository.cache_dir()).map_err(Failure::failed)?;
        problems.extend(catalogue::sync(&repository, NAME, &ledger)?);
        if cancel.is_cancelled() {
            return Err(Failure::failed("cancelled"));
        }
        Ok(Self { repository, archives: None, ledger, problems, cancel, scratch, root, _temporary: temporary, _runtime: runtime })
    }

    /// Nothing is written into the storage, not even by a slip of the hand.
    pub fn may_write(&self, path: &Path, what: &str) -> Result<()> {
        outside(self.root.as_deref(), path, what)
    }

    /// Tells what of the repository is damaged before anything is done with it.
    pub fn tell_problems(&self) {
        tell_some("damaged", &self.problems);
    }

    /// The backups, newest first.
    pub fn backups(&self, job: Option<&str>) -> Result<Vec<Backup>> {
        self.ledger.backups(job, None).map_err(Failure::failed)
    }

    /// The backup that is meant, with its manifest.
    pub fn find(&self, of: &Of) -> Result<(Backup, Manifest)> {
        self.find_for(of, &What::All)
    }

    /// The same; of an archive no more is read than this.
    pub fn find_for(&self, of: &Of, what: &What<'_>) -> Result<(Backup, Manifest)> {
        let found = self.resolve(of)?;
        if let Some(archives) = &self.archives {
            let detail = self.ledger.backup_at(NAME, &found.id).map_err(Failure::failed)?;
            let object = detail.as_ref().map_or(found.id.as_str(), BackupDetail::object);
            let (manifest, _) = stage::into(archives, object, &found.id, what, &self.repository, &self.cancel)?;
            return Ok((found, manifest));
        }
        let object = catalogue::object(&self.ledger, NAME, &found.id)?;
        Ok((found, self.repository.read_manifest(&object)?))
    }

    fn resolve(&self, Of { backup, job }: &Of) -> Result<Backup> {
        if backup == "latest" {
            let of = job.as_deref().map(|j| format!(" of job {j}")).unwrap_or_default();
            let found = self.ledger.latest(job.as_deref(), &[NAME]).map_err(Failure::failed)?;
            return found
                .ok_or_else(|| Failure::failed(format!("there is no good backup{of} here; 'keepd rescue list' shows what there is")));
        }
        if backup.is_empty() || backup.len() > 64 || !backup.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(Failure::usage(format!(
                "'{backup}' is no backup: give an id as 'keepd rescue list' shows it, a unique start of one, or 'latest'"
            )));
        }
        let prefix = backup.to_ascii_lowercase();
        let mut found = self.ledger.backups_by_prefix(&prefix, job.as_deref()).map_err(Failure::failed)?;
        match found.len() {
            1 => Ok(found.remove(0)),
            0 if unhex(&prefix).is_some_and(|id| self.repository.listed_backups().is_ok_and(|all| all.contains(&id))) => {
                Err(Failure::failed(format!("backup {prefix} is there, but its manifest cannot be read")))
            }
            0 => Err(Failure::failed(format!("there is no backup whose id starts with {backup}; 'keepd rescue list' shows what there is"))),
            _ => Err(Failure::failed(format!("several backups' ids start with {backup}; give more of it"))),
        }
    }
}

/// Where the caches go, and the directory to be removed at the end.
fn has_archives(storage: &Storage) -> Result<bool> {
    if storage.exists("keepd.json").map_err(Failure::failed)? {
        return Ok(false);
    }
    Ok(storage.top().map_err(Failure::failed)?.iter().any(|o| ArchiveName::parse(&o.name).is_some()))
}

fn scratch(cache: Option<&Path>) -> Result<(PathBuf, Option<tempfile::TempDir>)> {
    let Some(cache) = cache else {
        let made = tempfile::Builder::new().prefix("keepd-rescue-").tempdir();
        let made = made.map_err(|e| Failure::failed(format!("cannot make a temporary directory ({e}); name one with --cache DIR")))?;
        return Ok((made.path().to_owned(), Some(made)));
    };
    std::fs::create_dir_all(cache).map_err(|e| Failure::failed(format!("cannot make {}: {e}", cache.display())))?;
    Ok((cache.to_owned(), None))
}

pub fn outside(root: Option<&Path>, path: &Path, what: &str) -> Result<()> {
    match root {
        Some(root) if resolved(path).starts_with(root) => Err(Failure::usage(format!(
            "{what} would be at {}, which lies in the destination {}: nothing is written there; name another place",
            path.display(),
            root.display()
        ))),
        _ => Ok(()),
    }
}

/// Absolute, and without links and `..` also where the end of it does not exist yet.
pub fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut found = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => drop(found.pop()),
            other => {
                found.push(other);
                found = found.canonicalize().unwrap_or(found);
            }
        }
    }
    found
}

/// The directory that is to be removed also by whoever ends the process.
pub type Leavings = Arc<Mutex<Option<PathBuf>>>;

/// Whether the one who started us had SIGHUP ignored (nohup), so that we outlive the terminal.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & (1 << (signal_hook::consts::SIGHUP - 1)) != 0)
}

/// The first signal asks for an end at the next safe point, the second one does not wait for it.
pub fn cancel_by_signals(cancel: &CancellationToken, leavings: Leavings) -> Result<()> {
    let failed = |e: std::io::Error| Failure::failed(format!("signals cannot be handled: {e}"));
    let hangup = Some(signal_hook::consts::SIGHUP).filter(|_| !ignores_hangup());
    let signals = [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM].into_iter().chain(hangup);
    let mut signals = signal_hook::iterator::Signals::new(signals).map_err(failed)?;
    let cancel = cancel.clone();
    let thread = std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            if cancel.is_cancelled() {
                // Whoever asks twice does not want to wait.
                let left = leavings.lock().unwrap_or_else(PoisonError::into_inner).take();
                // Twice where somebody makes a file there meanwhile.
                let _ = left.is_some_and(|left| (0..3).any(|_| std::fs::remove_dir_all(&left).is_ok()));
                let _ = signal_hook::low_level::emulate_default_handler(signal);
            }
            cancel.cancel();
        }
    });
    thread.map(drop).map_err(failed)
}

/// Paths as the repository's readers take them.
pub fn bytes(paths: &[OsString]) -> Vec<Vec<u8>> {
    paths.iter().map(|p| p.as_bytes().to_vec()).collect()
}

/// A bar on a terminal; nothing else.
pub fn bar(place: &Place, what: &'static str, total: u64) -> ProgressBar {
    if place.quiet || place.no_progress || place.json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{spinner} {msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    ProgressBar::new(total).with_message(what).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_the_destination_is_seen_by_any_name() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap().join("repository");
        std::fs::create_dir_all(root.join("packs")).unwrap();
        std::os::unix::fs::symlink("repository/packs", directory.path().join("link")).unwrap();
        let is_inside = |path: &str| outside(Some(&root), &directory.path().join(path), "it").is_err();
        for inside in
            ["repository", "repository/new/deep", "link/new", "none/../repository/x", "link/../x", "repository/packs/../../repository"]
        {
            assert!(is_inside(inside), "{inside}");
        }
        for elsewhere in ["", "repository-2", "repository/..", "repository/../out", "out"] {
            assert!(!is_inside(elsewhere), "{elsewhere}");
        }
        assert!(outside(None, &root, "it").is_ok());
    }
}
