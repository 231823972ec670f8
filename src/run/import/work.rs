//! The run of an import: reads the archive once, from its start to its end, and commits when all of it was proven.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use keepd_protocol::methods::initiate_import;
use keepd_protocol::model::{BackupDetail, BackupType, ImportCounts, Level, OnConflict};
use keepd_protocol::restore::EntryHeader;
use minicbor::bytes::ByteArray;

use super::chosen::Wanted;
use super::commit::{check_head, is_source_name, manifest};
use super::desk::{Given, Taken};
use super::foreign;
use super::input::Input;
use super::keys::Keys;
use crate::config::Destination;
use crate::portable::head::{Contents, Source, Totals};
use crate::portable::read::OpenWith;
use crate::portable::{ArchiveReader, Frame, Head, Limits, PortableError, Tail};
use crate::repository::lease::Lease;
use crate::repository::source_writer::SourceWriter;
use crate::repository::writer::Writer;
use crate::repository::{Repository, SinkError};
use crate::run::backup::{Environment, Writing, short, unhex};
use crate::run::live::{Failure, LiveRun};
use crate::run::{archived, catalogue, destination};

/// Read at once.
const BUFFER: usize = 1 << 20;
/// Between looks for the sender's word.
const LOOK: Duration = Duration::from_millis(50);

/// What an import became.
#[derive(Debug, Clone, Default)]
pub struct Done {
    /// The backup, also where it was there already; None where nothing was to be stored.
    pub backup: Option<String>,
    pub job: String,
    pub counts: ImportCounts,
}

/// Why an archive is not imported.
fn refused(error: PortableError) -> Failure {
    match error {
        PortableError::Cancelled => Failure::Cancelled,
        other => failed(format!("the archive is not imported: {other}")),
    }
}

impl From<SinkError> for Failure {
    fn from(error: SinkError) -> Self {
        match error {
            SinkError::Cancelled => Failure::Cancelled,
            SinkError::Storage(text) => Failure::Storage(text),
            SinkError::Repository(text) => Failure::Failed(text),
        }
    }
}

pub(super) fn failed(text: impl std::fmt::Display) -> Failure {
    Failure::Failed(text.to_string())
}

/// What the parts of the work share.
pub(super) struct Work<'a> {
    pub env: &'a Environment,
    pub request: &'a initiate_import::In,
    pub live: &'a LiveRun,
    reader: Option<ArchiveReader>,
    pub counts: ImportCounts,
    pub work_dir: PathBuf,
    /// Read of the next source already.
    pub ahead: Option<EntryHeader>,
    pub buffer: Vec<u8>,
}

/// An open destination, with all that keeps others away from it.
pub(super) struct Open {
    pub target: Destination,
    pub repository: Arc<Repository>,
    pub lease: Lease,
    _alone: Box<dyn Send>,
}

/// Imports the archive; nothing is committed unless all of it is what it says.
pub fn import(env: &Environment, mut taken: Taken, live: &LiveRun, writing: Writing<'_>) -> Result<Done, Failure> {
    if taken.stop.is_cancelled() {
        live.cancel.cancel();
        return Err(Failure::Cancelled);
    }
    let request = taken.request.clone();
    let work_dir = env.config.daemon.state_dir.join("work");
    std::fs::create_dir_all(&work_dir).map_err(|e| failed(format!("cannot make {}: {e}", work_dir.display())))?;
    let (patience, whole) = (Duration::from_secs(taken.patience), taken.whole.clone());
    let archive = std::mem::replace(&mut taken.archive, Given::File(null()?, 0));
    let mut input = Input::new(archive, request.bandwidth, patience, live.cancel.clone(), taken.read.clone());
    let unread = |e: std::io::Error| {
        if live.cancel.is_cancelled() { Failure::Cancelled } else { failed(format!("the archive cannot be read: {e}")) }
    };
    let sealed = input.is_sealed().map_err(unread)?;
    live.step(if sealed { "Decrypting archive" } else { "Extracting archive" });
    let keys = if sealed {
        Keys::gather(&mut taken, &env.config)
    } else {
        Keys { keys: Vec::new(), private_keys: Vec::new(), problems: Vec::new() }
    };
    let given = taken.keys.len() + taken.private_keys.len();
    if !sealed && given > 0 {
        return Err(failed(
            "the archive is not imported: a key was given, and it is not sealed. It is not the archive that you mean, or somebody opened it: without the key it can be imported as it is",
        ));
    }
    let with = OpenWith {
        keys: &keys.keys,
        private_keys: &keys.private_keys,
        limits: Limits { bytes: request.max_bytes, ..Limits::default() },
        work_dir: &work_dir,
        cancel: live.cancel.clone(),
        foreign_source: request.foreign_source.clone(),
    };
    let told = |error: PortableError| match error {
        _ if live.cancel.is_cancelled() => Failure::Cancelled,
        PortableError::NotOpen(_) | PortableError::Key(_) if !keys.problems.is_empty() => {
            failed(format!("{} (and not every configured key could be tried: {})", refused(error), keys.problems.join("; ")))
        }
        other => refused(other),
    };
    let reader = ArchiveReader::open(input, &with).map_err(told)?;
    live.step("Loading metadata");
    let head = reader.head().cloned();
    let mut work = Work {
        env,
        request: &request,
        live,
        reader: Some(reader),
        counts: ImportCounts::default(),
        work_dir,
        ahead: None,
        buffer: vec![0; BUFFER],
    };
    let imported = match &head {
        Some(head) => work.archive(head, writing, &whole, patience),
        None => foreign::import(work, writing, &whole, patience),
    };
    match imported {
        Err(_) if live.cancel.is_cancelled() => Err(Failure::Cancelled),
        other => other,
    }
}

fn null() -> Result<std::fs::File, Failure> {
    std::fs::File::open("/dev/null").map_err(|e| failed(format!("cannot open /dev/null: {e}")))
}

impl Work<'_> {
    /// An archive that keepd made.
    fn archive(
        &mut self,
        head: &Head,
        writing: Writing<'_>,
        whole: &tokio_util::sync::CancellationToken,
        patience: Duration,
    ) -> Result<Done, Failure> {
        let (request, live, env) = (self.request, self.live, self.env);
        let job = request.job.clone().unwrap_or_else(|| head.origin.job.clone());
        check_head(head, &job)?;
        let renamed = renamed(head, &request.rename_sources)?;
        let mut wanted = Wanted::new(request, head)?;
        if let Some(source) = &request.foreign_source {
            live.message(
                Level::Info,
                format!(
                    "keepd made the archive: it is imported as what it is, with its own sources, and not as a tar of source '{source}'"
                ),
            );
        }
        let id = head.origin.backup.clone();
        live.update(|run| run.job = Some(job.clone()));
        if let Some(totals) = head.totals {
            live.set_total(totals.bytes);
        }
        if request.validate_only {
            if env.ledger.backup_at(&request.destination, &id)?.is_some() {
                live.message(Level::Info, format!("backup {} is at {} already", short(&id), request.destination));
            }
            live.step("Validating archive");
            for source in &head.sources {
                self.source(source, None, wanted.sources.get_mut(&source.name))?;
            }
            self.all_found(&wanted)?;
            self.finish()?;
            self.wait_for_word(whole, patience)?;
            live.message(Level::Info, format!("the archive of backup {} is whole: {}", short(&id), told(&self.counts)));
            return Ok(Done { backup: Some(id), job, counts: ImportCounts { backups: 0, ..self.counts } });
        }
        let open = self.open(writing)?;
        let here = env.ledger.backup_at(&open.target.name, &id)?;
        let mut own_id = wanted.everything && !head.selected;
        let mut notes = Vec::new();
        let known = if here.is_some() { here.clone() } else { env.ledger.backup_detail(&id)? };
        // Both would be taken for copies of each other. One that keepd made here itself has no copies but those that keepd makes of it.
        let is_other =
            |known: BackupDetail| !is_same(&known, head, &job, &renamed) || (here.is_none() && known.backup.r#type != BackupType::Imported);
        if own_id && known.is_some_and(is_other) {
            own_id = false;
            notes.push(format!("backup {} is known here, and this may be another one: it has an id of its own", short(&id)));
        }
        if let Some(here) = here.as_ref().filter(|_| own_id) {
            match request.on_conflict {
                OnConflict::Skip => {
                    live.message(Level::Info, format!("backup {} is at {} already; nothing was imported", short(&id), open.target.name));
                    let counts = ImportCounts { skipped: 1, ..ImportCounts::default() };
                    return Ok(Done { backup: Some(id), job: here.backup.job.clone(), counts });
                }
                OnConflict::Rename => own_id = false,
                OnConflict::Replace if open.target.append_only => {
                    return Err(failed(format!(
                        "backup {} is at {} already, which is append-only: it cannot be replaced; import it under another id by --on-conflict rename",
                        short(&id),
                        open.target.name
                    )));
                }
                OnConflict::Replace => {}
            }
        }
        live.step("Importing files");
        let mut writer = Writer::new(open.repository.clone(), live.cancel.clone())?;
        let mut sources = Vec::new();
        for source in &head.sources {
            let name = renamed.get(source.name.as_str()).copied().unwrap_or(&source.name);
            match wanted.sources.get_mut(&source.name) {
                Some(paths) => {
                    let place = source.place.to_bytes().map_err(failed)?;
                    let mut sink = SourceWriter::new(&mut writer, name, &source.kind, &place, None);
                    self.source(source, Some(&mut sink), Some(paths))?;
                    sources.push(sink.finish(facts(source)?)?.source);
                }
                None => self.source(source, None, None)?,
            }
            live.set_added(writer.added_bytes());
        }
        self.all_found(&wanted)?;
        live.step("Verifying archive");
        let (totals, tail) = self.finish()?;
        self.wait_for_word(whole, patience)?;
        if wanted.everything {
            self.is_all(&totals)?;
        }
        for (source, told) in sources.iter_mut().zip(head.sources.iter().filter(|s| wanted.sources.contains_key(&s.name))) {
            if let Some(tail) = &tail
                && let Some(found) = tail.sources.iter().find(|s| s.name == told.name)
            {
                source.facts = facts(found)?;
            }
        }
        live.step("Storing");
        let flushed = writer.flush()?;
        live.set_added(flushed.added_bytes);
        if head.selected {
            notes.push(format!("the archive held only some of backup {}", short(&id)));
        }
        if !wanted.everything {
            notes.push(format!("only {} of backup {} was imported", wanted.told(), short(&id)));
        }
        let mut manifest = manifest(head, tail.as_ref(), sources, notes)?;
        manifest.job.clone_from(&job);
        if request.on_conflict == OnConflict::Rename && here.is_some() && !own_id && wanted.everything {
            manifest.name = Some(format!("{} (imported)", manifest.name.unwrap_or_else(|| short(&id).to_owned())));
        }
        if request.name.is_some() {
            manifest.name.clone_from(&request.name);
        }
        if request.description.is_some() {
            manifest.description.clone_from(&request.description);
        }
        let labels: BTreeMap<String, String> = manifest.labels.drain(..).chain(request.labels.clone()).collect();
        manifest.labels = labels.into_iter().collect();
        manifest.origin = own_id.then(|| unhex(&id)).flatten().map(ByteArray::from);
        let replaced = here.filter(|_| own_id);
        let backup = self.commit(&open, manifest, &flushed, replaced)?;
        Ok(Done { backup: Some(backup), job, counts: ImportCounts { backups: 1, ..self.counts } })
    }

    /// The reader, for its end.
    fn take_reader(&mut self) -> Result<ArchiveReader, Failure> {
        self.reader.take().ok_or_else(|| failed("the archive was read already; this is a bug"))
    }

    fn reader(&mut self) -> Result<&mut ArchiveReader, Failure> {
        self.reader.as_mut().ok_or_else(|| failed("the archive was read already; this is a bug"))
    }

    pub fn next_entry(&mut self) -> Result<Option<EntryHeader>, Failure> {
        self.reader()?.next_entry().map_err(refused)
    }

    pub fn read(&mut self, into: &mut [u8]) -> Result<usize, Failure> {
        self.reader()?.read(into).map_err(refused)
    }

    /// The next contents as a whole zstd frame, where they are one.
    pub fn frame(&mut self) -> Result<Option<Frame>, Failure> {
        self.reader()?.frame().map_err(refused)
    }

    pub fn recycle(&mut self, contents: Vec<u8>) -> Result<(), Failure> {
        self.reader()?.recycle(contents);
        Ok(())
    }

    /// Proves that all came that the archive lists.
    pub fn finish(&mut self) -> Result<(Totals, Option<Tail>), Failure> {
        self.take_reader()?.finish().map_err(refused)
    }

    /// Opens the destination when nobody else writes there.
    pub fn open(&self, writing: Writing<'_>) -> Result<Open, Failure> {
        let (env, live, name) = (self.env, self.live, &self.request.destination);
        let target = env.config.destinations.get(name).ok_or_else(|| failed(format!("there is no destination '{name}'")))?.clone();
        live.step(&format!("Waiting for {name}"));
        let alone = writing(name)?;
        let why = "an import goes into a repository; 'keepctl copy' brings it on to here. An archive that keepd made can also be put into it as it is";
        archived::is_none(&target, why)?;
        live.step("Opening the repository");
        let (repository, lease) = destination::open_for_writing(&frugal(env), &target, live, true)?;
        for problem in repository.sync_index()?.into_iter().chain(catalogue::sync(&repository, name, &env.ledger)?) {
            live.message(Level::Warning, problem);
        }
        Ok(Open { target, repository, lease, _alone: alone })
    }

    /// Until whoever sends the archive says that it is whole.
    pub fn wait_for_word(&self, whole: &tokio_util::sync::CancellationToken, patience: Duration) -> Result<(), Failure> {
        let since = Instant::now();
        if !whole.is_cancelled() {
            self.live.step("Waiting for the sender's word");
        }
        while !whole.is_cancelled() {
            if self.live.cancel.is_cancelled() {
                return Err(Failure::Cancelled);
            }
            if since.elapsed() >= patience {
                return Err(failed("the archive is not imported: who sent it did not say that it is whole"));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }
}

/// Buffers of an import beside those of its archive, in bytes: it waits for nothing that longer queues would hide.
const MEMORY: u64 = 40 << 20;

/// The same environment with less memory for a run.
fn frugal(env: &Environment) -> Environment {
    let mut config = (*env.config).clone();
    config.daemon.memory = config.daemon.memory.min(MEMORY * config.daemon.max_parallel_runs.max(1) as u64);
    Environment { config: Arc::new(config), ledger: env.ledger.clone(), runtime: env.runtime.clone(), lent: env.lent.clone() }
}

/// In words and numbers.
pub(super) fn told(counts: &ImportCounts) -> String {
    format!("{} entries, {} files, {} bytes", counts.entries, counts.files, counts.bytes)
}

fn facts(source: &Source) -> Result<String, Failure> {
    serde_json::to_string(&source.facts).map_err(|e| failed(format!("the facts of source {}: {e}", source.name)))
}

/// The new names of sources by the old ones; all names stay different.
fn renamed<'r>(head: &Head, names: &'r BTreeMap<String, String>) -> Result<BTreeMap<&'r str, &'r String>, Failure> {
    let mut seen = BTreeSet::new();
    for source in &head.sources {
        let name = names.get(&source.name).unwrap_or(&source.name);
        if !is_source_name(name) {
            return Err(failed(format!("'{name}' cannot be the name of a source: it is the name of a directory when it is restored")));
        }
        if !seen.insert(name.clone()) {
            return Err(failed(format!("two sources would be called '{name}'; rename the other one, too")));
        }
    }
    Ok(names.iter().map(|(old, new)| (old.as_str(), new)).collect())
}

/// Whether a backup of the catalogue may be the one that the archive is of.
fn is_same(known: &BackupDetail, head: &Head, job: &str, renamed: &BTreeMap<&str, &String>) -> bool {
    let name = |s: &Source| renamed.get(s.name.as_str()).map_or(s.name.clone(), |n| (*n).clone());
    let times = |a: &str, b: &str| a.parse::<Timestamp>().ok() == b.parse::<Timestamp>().ok();
    let same = |source: &Source| {
        let counted = head.contents == Contents::First;
        known.sources.iter().any(|k| k.name == name(source) && k.kind == source.kind && (!counted || k.bytes == source.bytes))
    };
    known.backup.job == job
        && known.sources.len() == head.sources.len()
        && times(&known.started, &head.origin.started)
        && head.sources.iter().all(same)
}
