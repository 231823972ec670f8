//! The desk: which imports there are, what was uploaded of each, and how they ended. Each has a directory of its own in the state directory with `import.json`
//! and, where it was uploaded piece by piece, the archive. Keys are in memory alone.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::{SignedDuration, Timestamp};
use keepd_protocol::methods::{initiate_import, upload_import};
use keepd_protocol::model::{Event, EventKind, Import, ImportState};
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use super::work::Done;
use crate::crypto::{Key, PrivateKey};
use crate::run::live::Failure;
use crate::run::registry::{Error, Result};

/// Imports of one user that are not finished.
const MAX_PER_USER: usize = 16;
/// Bytes of a piece.
const MAX_PIECE: usize = 512 << 10;
/// What a spooled archive leaves free of its file system.
const RESERVE: u64 = 256 << 20;
/// Ended ones are listed for so long.
const REMEMBERED: SignedDuration = SignedDuration::from_hours(24);
/// Keys of one import.
const MAX_KEYS: usize = 16;
const DEFAULT_TIMEOUT: u64 = 3600;
const LONGEST_TIMEOUT: u64 = 7 * 86_400;

/// All imports.
pub struct Desk {
    dir: PathBuf,
    events: broadcast::Sender<Event>,
    held: Mutex<BTreeMap<String, Held>>,
}

/// What survives the daemon.
#[derive(Clone, Serialize, Deserialize)]
struct Kept {
    import: Import,
    request: initiate_import::In,
    uid: u32,
    /// The spooled archive is whole.
    whole: bool,
}

struct Held {
    kept: Kept,
    archive: Archive,
    keys: Vec<Key>,
    private_keys: Vec<PrivateKey>,
    /// Cancelled when the archive is known to be whole.
    whole: CancellationToken,
    /// Bytes that the run read.
    read: Arc<AtomicU64>,
    /// Cancelled with its run, which may not have begun.
    stop: CancellationToken,
}

enum Archive {
    None,
    /// In the import's directory: bytes so far.
    Spool(u64),
    File(File),
    Stream(OwnedFd),
}

/// An archive as the run gets it.
pub enum Given {
    /// A regular file, and its length.
    File(File, u64),
    /// A pipe or a socket.
    Stream(OwnedFd),
}

/// What the run of an import works on.
pub struct Taken {
    pub request: initiate_import::In,
    pub archive: Given,
    pub keys: Vec<Key>,
    pub private_keys: Vec<PrivateKey>,
    /// Cancelled when the sender said that the archive is whole: nothing is committed before.
    pub whole: CancellationToken,
    pub read: Arc<AtomicU64>,
    /// Cancelled where it was before its run was known.
    pub stop: CancellationToken,
    /// How long a pipe may keep its reader waiting, and the sender its word, in seconds.
    pub patience: u64,
}

fn failed(what: &str, path: &Path, e: impl std::fmt::Display) -> Error {
    Error::Failed(format!("cannot {what} {}: {e}", path.display()))
}

fn absent(id: &str) -> Error {
    let text = format!("there is no import '{id}'; 'keepctl import --list' shows them");
    Error::NotFound { what: "import", name: id.to_owned(), text }
}

fn state_error(import: &Import, wanted: &str) -> Error {
    let why = import.error.as_ref().map(|e| format!(": {e}")).unwrap_or_default();
    Error::Failed(format!("import {} is {}{why}; {wanted}", import.id, import.state))
}

impl Desk {
    /// `dir`: where each import has a directory.
    pub fn new(dir: PathBuf, events: broadcast::Sender<Event>) -> Self {
        Self { dir, events, held: Mutex::default() }
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<String, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    fn spool(&self, id: &str) -> PathBuf {
        self.place(id).join("archive")
    }

    /// At start: takes up what the last daemon left. What it was importing has failed; what came by a descriptor is to be uploaded again.
    pub fn load(&self) {
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return,
            Err(e) => return tracing::error!("the imports in {} cannot be looked at: {e}", self.dir.display()),
        };
        let now = Timestamp::now();
        for entry in entries.flatten() {
            let (path, id) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            let read = std::fs::read(path.join("import.json")).map_err(|e| e.to_string());
            let kept = match read.and_then(|json| serde_json::from_slice::<Kept>(&json).map_err(|e| e.to_string())) {
                Ok(kept) if kept.import.id == id => kept,
                Ok(_) | Err(_) => {
                    tracing::warn!("{} is no import that can go on; it is removed", path.display());
                    remove(&path);
                    continue;
                }
            };
            clear_half_written(&path);
            let spooled = std::fs::metadata(path.join("archive")).map(|m| m.len()).ok();
            let mut held = Held {
                archive: spooled.map_or(Archive::None, Archive::Spool),
                whole: CancellationToken::new(),
                read: Arc::default(),
                stop: CancellationToken::new(),
                keys: Vec::new(),
                private_keys: Vec::new(),
                kept,
            };
            held.kept.import.keys = 0;
            match held.kept.import.state {
                ImportState::Processing => {
                    let text = "keepd stopped while it was imported; nothing of it is here. Upload it again";
                    self.conclude(&mut held, ImportState::Failed, Some(text.into()), now);
                }
                ImportState::Pending | ImportState::Uploading => {
                    (held.kept.import.state, held.kept.import.uploaded) = match spooled {
                        Some(len) => (ImportState::Uploading, len),
                        None => (ImportState::Pending, 0),
                    };
                    held.kept.whole &= spooled.is_some();
                    if held.kept.whole {
                        held.whole.cancel();
                    }
                }
                ImportState::Completed | ImportState::Failed | ImportState::Timeout => {}
            }
            self.held().insert(id, held);
        }
        self.expire();
    }

    /// Writes an import down; durable when this returns.
    fn save(&self, kept: &Kept) -> Result<()> {
        let dir = self.place(&kept.import.id);
        crate::durable::make_private_directories(&dir).map_err(|e| failed("make", &dir, e))?;
        let json = serde_json::to_vec(kept).map_err(|e| Error::Failed(e.to_string()))?;
        let write = || -> std::io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&dir)?;
            file.write_all(&json)?;
            file.as_file().sync_all()?;
            file.persist(dir.join("import.json")).map_err(|e| e.error)?;
            File::open(&dir)?.sync_all()
        };
        write().map_err(|e| failed("write import.json in", &dir, e))
    }

    /// Begins an import; its id and its deadline.
    pub fn initiate(&self, id: String, request: initiate_import::In, by: String, uid: u32) -> Result<Import> {
        let seconds = request.timeout_seconds.unwrap_or(DEFAULT_TIMEOUT).clamp(1, LONGEST_TIMEOUT);
        let now = Timestamp::now();
        let deadline = i64::try_from(seconds).ok().and_then(|s| now.checked_add(SignedDuration::from_secs(s)).ok()).unwrap_or(now);
        let import = Import {
            id: id.clone(),
            by,
            created: now.to_string(),
            deadline: deadline.to_string(),
            destination: request.destination.clone(),
            job: request.job.clone(),
            validate_only: request.validate_only,
            ..Import::default()
        };
        let kept = Kept { import: import.clone(), request, uid, whole: false };
        let mut all = self.held();
        let open = all.values().filter(|h| h.kept.uid == uid && !h.kept.import.state.is_finished()).count();
        if open >= MAX_PER_USER {
            return Err(Error::Busy(format!(
                "{open} imports are under way already; start or cancel some ('keepctl import --list' shows them)"
            )));
        }
        self.save(&kept)?;
        let held = Held {
            kept,
            archive: Archive::None,
            keys: Vec::new(),
            private_keys: Vec::new(),
            whole: CancellationToken::new(),
            read: Arc::default(),
            stop: CancellationToken::new(),
        };
        all.insert(id, held);
        Ok(import)
    }

    fn open_to_upload<'h>(all: &'h mut BTreeMap<String, Held>, id: &str) -> Result<&'h mut Held> {
        let held = all.get_mut(id).ok_or_else(|| absent(id))?;
        match held.kept.import.state {
            ImportState::Pending | ImportState::Uploading => Ok(held),
            _ => Err(state_error(&held.kept.import, "nothing can be uploaded to it")),
        }
    }

    /// Takes keys for an import.
    pub fn add_keys(&self, id: &str, keys: Vec<Key>, private_keys: Vec<PrivateKey>) -> Result<()> {
        let mut all = self.held();
        let held = Self::open_to_upload(&mut all, id)?;
        if held.keys.len() + held.private_keys.len() + keys.len() + private_keys.len() > MAX_KEYS {
            return Err(Error::Failed(format!("an import takes at most {MAX_KEYS} keys")));
        }
        held.keys.extend(keys);
        held.private_keys.extend(private_keys);
        held.kept.import.keys = (held.keys.len() + held.private_keys.len()) as u64;
        Ok(())
    }

    /// Takes the archive as a descriptor. `confirm`: it counts only when [`Desk::confirm`] said so.
    pub fn give(&self, id: &str, archive: Given, confirm: bool) -> Result<u64> {
        let mut all = self.held();
        let held = Self::open_to_upload(&mut all, id)?;
        if matches!(held.archive, Archive::Spool(_)) {
            let path = self.spool(id);
            std::fs::remove_file(&path).map_err(|e| failed("remove", &path, e))?;
        }
        let import = &mut held.kept.import;
        (held.archive, import.size) = match archive {
            Given::File(file, len) => (Archive::File(file), Some(len)),
            Given::Stream(fd) => (Archive::Stream(fd), None),
        };
        (import.state, import.uploaded) = (ImportState::Uploading, import.size.unwrap_or(0));
        held.kept.whole = false;
        held.whole = CancellationToken::new();
        if !confirm {
            held.whole.cancel();
        }
        // To the next daemon nothing of it is left.
        Ok(import.uploaded)
    }

    /// The sender says that all of the archive came.
    pub fn confirm(&self, id: &str) -> Result<u64> {
        let all = self.held();
        let held = all.get(id).ok_or_else(|| absent(id))?;
        if held.kept.import.state.is_finished()
            || matches!(held.archive, Archive::None) && held.kept.import.state != ImportState::Processing
        {
            return Err(state_error(&held.kept.import, "there is no archive to be confirmed"));
        }
        held.whole.cancel();
        Ok(held.kept.import.uploaded)
    }

    /// Takes a piece of the archive, or says where the next one goes on. What was taken is on the disk when this returns.
    pub fn piece(&self, p: &upload_import::In, data: &[u8]) -> Result<u64> {
        if data.len() > MAX_PIECE {
            return Err(Error::Failed(format!("a piece has at most {MAX_PIECE} bytes, and this one has {}", data.len())));
        }
        let mut all = self.held();
        let held = Self::open_to_upload(&mut all, &p.import)?;
        let len = match &held.archive {
            Archive::Spool(len) => *len,
            Archive::None => 0,
            _ => return Err(Error::Failed(format!("import {} has its archive by a descriptor already", p.import))),
        };
        // Also a piece that came before: its answer was lost.
        if p.offset != len || held.kept.whole {
            return Ok(len);
        }
        let path = self.spool(&p.import);
        let write = || -> std::io::Result<()> {
            let space = rustix::fs::statvfs(&self.dir)?;
            if space.f_bavail.saturating_mul(space.f_frsize) < RESERVE + data.len() as u64 {
                return Err(std::io::Error::other(format!("less than {} MiB of its file system are free", RESERVE >> 20)));
            }
            let mut file = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path)?;
            // What an interrupted write left behind is cut off.
            file.set_len(len)?;
            file.seek(SeekFrom::Start(len))?;
            file.write_all(data)?;
            file.sync_data()
        };
        write().map_err(|e| failed("write", &path, e))?;
        let next = len + data.len() as u64;
        held.archive = Archive::Spool(next);
        let first = held.kept.import.state == ImportState::Pending;
        (held.kept.import.state, held.kept.import.uploaded) = (ImportState::Uploading, next);
        if p.last {
            held.kept.whole = true;
            held.kept.import.size = Some(next);
            held.whole.cancel();
        }
        if first || p.last {
            self.save(&held.kept)?;
        }
        Ok(next)
    }

    /// For its run: from now on the import is processed.
    pub fn take(&self, id: &str) -> Result<Taken> {
        let mut all = self.held();
        let held = Self::open_to_upload(&mut all, id)?;
        let spooled = match held.archive {
            Archive::Spool(_) if held.kept.whole => {
                let path = self.spool(id);
                Some(File::open(&path).map_err(|e| failed("read", &path, e))?)
            }
            Archive::File(_) | Archive::Stream(_) => None,
            Archive::None | Archive::Spool(_) => {
                return Err(state_error(&held.kept.import, "upload its archive first, to its last piece"));
            }
        };
        // Until it is written down, nothing is taken away: it can be started again.
        let mut kept = held.kept.clone();
        kept.import.state = ImportState::Processing;
        self.save(&kept)?;
        held.kept = kept;
        let archive = match (std::mem::replace(&mut held.archive, Archive::None), spooled) {
            (Archive::Spool(len), Some(file)) => Given::File(file, len),
            (Archive::File(file), _) => Given::File(file, held.kept.import.size.unwrap_or(0)),
            (Archive::Stream(fd), _) => Given::Stream(fd),
            (Archive::None | Archive::Spool(_), _) => return Err(Error::Failed("there is no archive; this is a bug".into())),
        };
        Ok(Taken {
            request: held.kept.request.clone(),
            archive,
            keys: std::mem::take(&mut held.keys),
            private_keys: std::mem::take(&mut held.private_keys),
            whole: held.whole.clone(),
            read: held.read.clone(),
            stop: held.stop.clone(),
            patience: held.kept.request.timeout_seconds.unwrap_or(DEFAULT_TIMEOUT).clamp(1, LONGEST_TIMEOUT),
        })
    }

    /// Which run works on it.
    pub fn set_run(&self, id: &str, run: &str) {
        if let Some(held) = self.held().get_mut(id) {
            held.kept.import.run = Some(run.to_owned());
            if let Err(e) = self.save(&held.kept) {
                tracing::warn!(import = id, "{e}");
            }
        }
    }

    /// Its run has ended, in this step; everybody is told.
    pub fn end(&self, id: &str, step: String, result: &Result<Done, Failure>) {
        let mut all = self.held();
        let Some(held) = all.get_mut(id) else { return };
        held.kept.import.step = step;
        let (state, error) = match result {
            Ok(done) => {
                let import = &mut held.kept.import;
                (import.backup, import.counts) = (done.backup.clone(), done.counts);
                import.job = Some(done.job.clone());
                (ImportState::Completed, None)
            }
            Err(e) => (ImportState::Failed, Some(e.to_string())),
        };
        self.conclude(held, state, error, Timestamp::now());
    }

    /// The last state: only `import.json` stays, for a day.
    fn conclude(&self, held: &mut Held, state: ImportState, error: Option<String>, now: Timestamp) {
        let read = held.read.load(Ordering::Relaxed);
        let import = &mut held.kept.import;
        import.uploaded = import.uploaded.max(read);
        (import.state, import.error, import.finished, import.keys) = (state, error, Some(now.to_string()), 0);
        if state == ImportState::Completed {
            import.percent = Some(100.0);
        }
        held.archive = Archive::None;
        held.keys.clear();
        held.private_keys.clear();
        let spool = self.spool(&import.id);
        if let Err(e) = std::fs::remove_file(&spool)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::error!("{} could not be removed: {e}", spool.display());
        }
        if let Err(e) = self.save(&held.kept) {
            tracing::error!("{e}");
        }
        let import = &held.kept.import;
        let text = match (&import.error, &import.backup) {
            (Some(error), _) => error.clone(),
            (None, Some(backup)) => format!("backup {backup}: {} files, {} bytes", import.counts.files, import.counts.bytes),
            (None, None) => format!("{} files, {} bytes", import.counts.files, import.counts.bytes),
        };
        // Nobody may be listening.
        let _ = self.events.send(Event {
            time: now.to_string(),
            kind: EventKind::ImportCompleted,
            job: import.job.clone(),
            run: import.run.clone(),
            state: None,
            text,
            import: Some(import.clone()),
        });
    }

    /// Ends what was not started by its deadline, and forgets what ended long ago.
    pub fn expire(&self) {
        let now = Timestamp::now();
        let is_over = |time: &str| time.parse::<Timestamp>().is_ok_and(|time| time <= now);
        let mut all = self.held();
        for held in all.values_mut() {
            let import = &held.kept.import;
            if matches!(import.state, ImportState::Pending | ImportState::Uploading) && is_over(&import.deadline) {
                let text = format!("it was not started by its deadline, {}; what was uploaded is removed", import.deadline);
                tracing::warn!(import = %import.id, "{text}");
                self.conclude(held, ImportState::Timeout, Some(text), now);
            }
        }
        let ended = |import: &Import| import.finished.as_ref()?.parse::<Timestamp>().ok()?.checked_add(REMEMBERED).ok();
        let old: Vec<String> =
            all.iter().filter(|(_, h)| ended(&h.kept.import).is_some_and(|until| until <= now)).map(|(id, _)| id.clone()).collect();
        for id in old {
            all.remove(&id);
            remove(&self.place(&id));
        }
    }

    /// The next deadline of one that is not started.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        let waits = |h: &&Held| matches!(h.kept.import.state, ImportState::Pending | ImportState::Uploading);
        self.held().values().filter(waits).filter_map(|h| h.kept.import.deadline.parse().ok()).min()
    }

    /// Removes one that is not started; the run of one that is processed.
    pub fn cancel(&self, id: &str) -> Result<Option<String>> {
        let mut all = self.held();
        let held = all.get(id).ok_or_else(|| absent(id))?;
        match held.kept.import.state {
            ImportState::Pending | ImportState::Uploading => {
                all.remove(id);
                remove(&self.place(id));
                Ok(None)
            }
            ImportState::Processing => {
                held.stop.cancel();
                Ok(held.kept.import.run.clone())
            }
            _ => Err(state_error(&held.kept.import, "there is nothing to cancel")),
        }
    }

    pub fn get(&self, id: &str) -> Result<Import> {
        self.held().get(id).map(shown).ok_or_else(|| absent(id))
    }

    /// Who began it, and for which job.
    pub fn owner(&self, id: &str) -> Option<(u32, Option<String>)> {
        self.held().get(id).map(|held| (held.kept.uid, held.kept.request.job.clone()))
    }

    /// Of one user, or of all; newest first.
    pub fn list(&self, of: Option<u32>) -> Vec<Import> {
        let mut list: Vec<Import> = self.held().values().filter(|held| of.is_none_or(|uid| held.kept.uid == uid)).map(shown).collect();
        list.sort_by(|a, b| (&b.created, &b.id).cmp(&(&a.created, &a.id)));
        list
    }
}

fn shown(held: &Held) -> Import {
    let mut import = held.kept.import.clone();
    if import.state == ImportState::Processing {
        let read = held.read.load(Ordering::Relaxed);
        import.percent = import.size.filter(|s| *s > 0).map(|size| ((read as f64 / size as f64).min(1.0) * 1000.0).round() / 10.0);
        import.uploaded = import.uploaded.max(read);
    }
    import
}

/// Removes what was to become an `import.json` and was not finished. Best effort.
fn clear_half_written(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if !["import.json", "archive"].iter().any(|known| entry.file_name() == *known) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn remove(dir: &Path) {
    if let Err(e) = std::fs::remove_dir_all(dir)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        tracing::error!("{} could not be removed: {e}", dir.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A desk in a directory, with an import whose archive is there.
    fn desk(dir: &Path) -> Desk {
        let desk = Desk::new(dir.to_path_buf(), broadcast::channel(4).0);
        desk.initiate("a".into(), initiate_import::In::default(), "somebody".into(), 0).unwrap();
        desk.give("a", Given::File(File::open("/dev/null").unwrap(), 7), false).unwrap();
        desk
    }

    #[test]
    fn what_cannot_be_written_down_can_be_started_again() {
        let dir = tempfile::tempdir().unwrap();
        let desk = desk(dir.path());
        std::fs::remove_dir_all(dir.path().join("a")).unwrap();
        std::fs::write(dir.path().join("a"), "no directory").unwrap();
        assert!(desk.take("a").is_err());
        assert_eq!(desk.get("a").unwrap().state, ImportState::Uploading);
        std::fs::remove_file(dir.path().join("a")).unwrap();
        assert!(matches!(desk.take("a").unwrap().archive, Given::File(_, 7)));
        assert_eq!(desk.get("a").unwrap().state, ImportState::Processing);
    }

    #[test]
    fn one_that_is_cancelled_before_its_run_is_known_stops() {
        let dir = tempfile::tempdir().unwrap();
        let desk = desk(dir.path());
        let taken = desk.take("a").unwrap();
        assert!(!taken.stop.is_cancelled());
        assert_eq!(desk.cancel("a").unwrap(), None);
        assert!(taken.stop.is_cancelled());
    }

    #[test]
    fn what_was_half_written_when_keepd_died_goes_and_the_import_stays() {
        let dir = tempfile::tempdir().unwrap();
        drop(desk(dir.path()));
        let half = dir.path().join("a/.tmpAb1");
        std::fs::write(&half, "{").unwrap();
        let again = Desk::new(dir.path().to_path_buf(), broadcast::channel(4).0);
        again.load();
        assert!(!half.exists());
        assert_eq!(again.get("a").unwrap().state, ImportState::Pending);
    }
}
