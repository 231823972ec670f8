//! The run of an import: reads the archive once, from its start to its end, and commits when all of it was proven.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use data_encoding::{BASE64, HEXLOWER};
use jiff::Timestamp;
use keepd_protocol::methods::initiate_import;
use keepd_protocol::model::{BackupDetail, EntryKind, ImportCounts, Level, Mark as Said, OnConflict, Outcome};
use keepd_protocol::restore::EntryHeader;
use minicbor::bytes::ByteArray;

use super::desk::{Given, Taken};
use super::foreign;
use super::input::Input;
use super::keys::Keys;
use crate::archive::parts;
use crate::config::Destination;
use crate::portable::head::{Contents, Source, Totals};
use crate::portable::read::OpenWith;
use crate::portable::{ArchiveReader, Head, Limits, PortableError, Tail};
use crate::repository::entry::{EntrySink, SMALL_FILE_BYTES};
use crate::repository::lease::Lease;
use crate::repository::source_writer::SourceWriter;
use crate::repository::writer::{self, Flushed, Writer};
use crate::repository::{self, Entry, Kind, Manifest, ManifestSource, Repository, SinkError, Time};
use crate::run::backup::{Environment, Writing, short, unhex};
use crate::run::live::{Failure, LiveRun};
use crate::run::selection::is_at_or_below;
use crate::run::{archived, catalogue, destination, names};

/// Read at once.
const BUFFER: usize = 1 << 20;
/// Zeros of this length, at a multiple of it, become a hole.
const HOLE: usize = 64 << 10;
/// Names that an error lists.
const NAMED: usize = 20;
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
    ahead: Option<EntryHeader>,
    buffer: Vec<u8>,
}

/// An open destination, with all that keeps others away from it.
pub(super) struct Open {
    pub target: Destination,
    pub repository: Arc<Repository>,
    lease: Lease,
    _alone: Box<dyn Send>,
}

/// Imports the archive; nothing is committed unless all of it is what it says.
pub fn import(env: &Environment, mut taken: Taken, live: &LiveRun, writing: Writing<'_>) -> Result<Done, Failure> {
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

/// What of an archive's sources is wanted: paths below each in the archive's terms, empty for all of it.
struct Wanted {
    sources: BTreeMap<String, Vec<Path>>,
    everything: bool,
}

struct Path {
    below: Vec<u8>,
    found: bool,
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().position(|b| *b == b'/') {
        None => (path, &[]),
        Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..).unwrap_or_default()),
    }
}

fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

impl Wanted {
    fn new(request: &initiate_import::In, head: &Head) -> Result<Self, Failure> {
        let known = || head.sources.iter().map(|s| s.name.as_str()).collect::<Vec<_>>().join(", ");
        let is_known = |name: &str| match head.sources.iter().any(|s| s.name == name) {
            true => Ok(()),
            false => Err(failed(format!("the archive has no source '{name}'; it has {}", known()))),
        };
        request.rename_sources.keys().try_for_each(|name| is_known(name))?;
        let mut sources: BTreeMap<String, Vec<Path>> = BTreeMap::new();
        let everything = request.sources.is_empty() && request.paths.is_empty();
        let all: Vec<String> = if everything { head.sources.iter().map(|s| s.name.clone()).collect() } else { request.sources.clone() };
        for name in all {
            is_known(&name)?;
            sources.entry(name).or_default().push(Path { below: Vec::new(), found: true });
        }
        for path in &request.paths {
            let bytes = path.to_bytes().map_err(failed)?;
            let trimmed: Vec<&[u8]> = bytes.split(|b| *b == b'/').filter(|part| !part.is_empty()).collect();
            let joined = trimmed.join(&b'/');
            let (name, below) = split(&joined);
            let name = lossy(name);
            is_known(&name)?;
            sources.entry(name).or_default().push(Path { below: below.to_vec(), found: below.is_empty() });
        }
        Ok(Self { sources, everything })
    }

    /// In words, for the backup's messages.
    fn told(&self) -> String {
        let path = |name: &String, p: &Path| if p.below.is_empty() { name.clone() } else { format!("{name}/{}", lossy(&p.below)) };
        self.sources.iter().flat_map(|(name, paths)| paths.iter().map(move |p| path(name, p))).collect::<Vec<_>>().join(", ")
    }
}

/// Whether an entry is wanted: it is at or below a path, or a directory on the way to one.
fn takes(paths: &mut [Path], below: &[u8], kind: EntryKind) -> bool {
    let mut taken = false;
    for path in paths {
        if is_at_or_below(below, &path.below) {
            (path.found, taken) = (true, true);
        } else if kind == EntryKind::Directory && is_at_or_below(&path.below, below) {
            taken = true;
        }
    }
    taken
}

/// An entry as the repository has it, without its contents; its path is taken from `below`, a link's target is as in the header.
pub(super) fn entry(header: &EntryHeader, below: &[u8]) -> Result<Entry, Failure> {
    let wrong = |text: String| failed(format!("the archive is not imported: {}: {text}", header.path.path));
    let mut xattrs = Vec::new();
    for (name, value) in &header.xattrs {
        xattrs.push((name.to_bytes().map_err(wrong)?, BASE64.decode(value.as_bytes()).map_err(|e| wrong(e.to_string()))?));
    }
    xattrs.sort();
    Ok(Entry {
        path: below.to_vec(),
        kind: match header.kind {
            EntryKind::File => Kind::File,
            EntryKind::Directory => Kind::Directory,
            EntryKind::Symlink => Kind::Symlink,
            EntryKind::Hardlink => Kind::Hardlink,
        },
        mode: header.mode & 0o7777,
        uid: header.uid,
        gid: header.gid,
        mtime: Time { seconds: header.mtime_seconds, nanoseconds: header.mtime_nanoseconds.min(999_999_999) },
        target: header.target.as_ref().map(|t| t.to_bytes()).transpose().map_err(wrong)?.unwrap_or_default(),
        xattrs,
        ..Entry::default()
    })
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
        if own_id
            && let Some(elsewhere) = env.ledger.backup_detail(&id)?.filter(|_| here.is_none())
            && !is_same(&elsewhere, head, &job, &renamed)
        {
            // Both would be taken for copies of each other.
            own_id = false;
            notes.push(format!(
                "backup {} is known, with another job, other sources or contents: this one has an id of its own",
                short(&id)
            ));
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

    fn read(&mut self, into: &mut [u8]) -> Result<usize, Failure> {
        self.reader()?.read(into).map_err(refused)
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
        let (repository, lease) = destination::open_for_writing(env, &target, live, true)?;
        for problem in repository.sync_index()?.into_iter().chain(catalogue::sync(&repository, name, &env.ledger)?) {
            live.message(Level::Warning, problem);
        }
        Ok(Open { target, repository, lease, _alone: alone })
    }

    /// The entries of one source, the next of the archive. Without a sink they are read and proven alone; without paths they are not counted either.
    fn source(
        &mut self,
        source: &Source,
        mut sink: Option<&mut SourceWriter<'_>>,
        mut paths: Option<&mut Vec<Path>>,
    ) -> Result<(), Failure> {
        let mut tops: BTreeSet<String> = BTreeSet::new();
        let mut links: HashSet<Vec<u8>> = HashSet::new();
        let chosen = paths.as_ref().is_some_and(|p| !p.iter().any(|p| p.below.is_empty()));
        // A source that is one file shows as a directory with that file in it; it is pushed when something else follows.
        let mut root: Option<Entry> = None;
        let mut next = self.next_of(source)?;
        while let Some(header) = next {
            let path = header.path.to_bytes().map_err(failed)?;
            let (_, below) = split(&path);
            if chosen && tops.len() < NAMED && !below.is_empty() && !below.contains(&b'/') {
                tops.insert(lossy(below));
            }
            let wanted = paths.as_deref_mut().is_some_and(|paths| takes(paths, below, header.kind));
            if !wanted {
                if chosen && header.kind == EntryKind::File {
                    links.insert(below.to_vec());
                }
                next = self.next_of(source)?;
                continue;
            }
            let mut entry = entry(&header, below)?;
            if entry.kind == Kind::Hardlink {
                entry.target = split(&entry.target).1.to_vec();
                if links.contains(&entry.target) {
                    let (name, path) = (&source.name, lossy(&entry.target));
                    return Err(failed(format!(
                        "'{name}/{}' is another name of '{name}/{path}', which is not chosen; choose it, too",
                        lossy(below)
                    )));
                }
            }
            self.count(&header);
            if below.is_empty() && entry.kind == Kind::Directory {
                root = Some(entry);
                next = self.next_of(source)?;
                continue;
            }
            let Some(sink) = sink.as_deref_mut() else {
                self.read_past()?;
                next = self.next_of(source)?;
                continue;
            };
            let may_be_alone = root.is_some() && entry.kind == Kind::File && below == file_name(source);
            if !may_be_alone && let Some(root) = root.take() {
                sink.push(root)?;
            }
            if entry.kind != Kind::File {
                sink.push(entry)?;
                next = self.next_of(source)?;
                continue;
            }
            let small = self.contents(sink, header.size)?;
            next = self.next_of(source)?;
            // Contents whose length was not known when they were captured stand in parts.
            if let (None, Some((file, 0))) = (&small, parts::part_of(&source.kind, below)) {
                entry.path = file.to_vec();
                let mut number = 1;
                while let Some(part) = next.take_if(|next| is_part(source, next, file, number)) {
                    self.count(&part);
                    self.more(sink, part.size)?;
                    next = self.next_of(source)?;
                    number += 1;
                }
            }
            if let Some(root) = root.take() {
                if next.is_none() && is_made_up(&root, &entry) {
                    entry.path.clear();
                    self.counts.entries -= 1;
                    self.counts.directories -= 1;
                } else {
                    sink.push(root)?;
                }
            }
            match small {
                Some(contents) => sink.push_small(entry, &contents)?,
                None => sink.large_finish(entry)?,
            }
        }
        if let (Some(root), Some(sink)) = (root, sink) {
            sink.push(root)?;
        }
        if let Some(paths) = paths
            && let Some(missing) = paths.iter().find(|p| !p.found)
        {
            let names = tops.into_iter().collect::<Vec<_>>().join(", ");
            let path = lossy(&missing.below);
            return Err(failed(format!("the archive has no '{}/{path}'; source {} has {names}", source.name, source.name)));
        }
        Ok(())
    }

    /// The next entry, if it is of this source.
    fn next_of(&mut self, source: &Source) -> Result<Option<EntryHeader>, Failure> {
        if self.ahead.is_none() {
            self.ahead = self.next_entry()?;
        }
        let is_of = |header: &EntryHeader| header.path.to_bytes().is_ok_and(|path| split(&path).0 == source.name.as_bytes());
        Ok(self.ahead.take_if(|header| is_of(header)))
    }

    pub fn count(&mut self, header: &EntryHeader) {
        self.counts.entries += 1;
        match header.kind {
            EntryKind::File => {
                self.counts.files += 1;
                self.counts.bytes += header.size;
            }
            EntryKind::Directory => self.counts.directories += 1,
            _ => {}
        }
        self.live.report.entry();
    }

    /// Reads what is not stored, so that it is proven.
    pub fn read_past(&mut self) -> Result<(), Failure> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut read = || -> Result<(), Failure> {
            loop {
                let n = self.read(&mut buffer)?;
                if n == 0 {
                    return Ok(());
                }
                self.live.report.bytes(n as u64);
            }
        };
        let done = read();
        self.buffer = buffer;
        done
    }

    /// Gives the contents of a file of `size` bytes: a small one's as a whole; those of a large one go to the sink, where they wait for their entry.
    pub fn contents(&mut self, sink: &mut SourceWriter<'_>, size: u64) -> Result<Option<Vec<u8>>, Failure> {
        if size <= SMALL_FILE_BYTES {
            let mut contents = vec![0; size as usize];
            let mut len = 0;
            loop {
                let space = contents.get_mut(len..).unwrap_or_default();
                let mut end = [0];
                let n = if space.is_empty() { self.read(&mut end)? } else { self.read(space)? };
                if n == 0 {
                    break;
                }
                len += n;
            }
            self.live.report.bytes(len as u64);
            return if len as u64 == size { Ok(Some(contents)) } else { Err(lying()) };
        }
        sink.large_begin()?;
        self.more(sink, size)?;
        Ok(None)
    }

    /// The next `size` bytes of a large file.
    fn more(&mut self, sink: &mut SourceWriter<'_>, size: u64) -> Result<(), Failure> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let done = self.large(sink, size, &mut buffer);
        self.buffer = buffer;
        done
    }

    fn large(&mut self, sink: &mut SourceWriter<'_>, size: u64, buffer: &mut [u8]) -> Result<(), Failure> {
        static ZEROS: [u8; HOLE] = [0; HOLE];
        let (mut hole, mut done) = (0u64, 0u64);
        loop {
            let mut len = 0;
            while let Some(space) = buffer.get_mut(len..).filter(|space| !space.is_empty()) {
                let n = self.read(space)?;
                if n == 0 {
                    break;
                }
                len += n;
            }
            for block in buffer.get(..len).unwrap_or_default().chunks(HOLE) {
                // The rest of a hole at the end belongs to it.
                let zeros = (block.len() == HOLE || hole > 0) && ZEROS.get(..block.len()) == Some(block);
                if zeros {
                    hole += block.len() as u64;
                    continue;
                }
                if hole > 0 {
                    sink.large_hole(std::mem::take(&mut hole))?;
                }
                let mut rest = block;
                while !rest.is_empty() {
                    let space = sink.large_space(rest.len());
                    let n = space.len().min(rest.len());
                    let (head, tail) = rest.split_at(n);
                    if let Some(space) = space.get_mut(..n) {
                        space.copy_from_slice(head);
                    }
                    sink.large_filled(n)?;
                    rest = tail;
                }
            }
            self.live.report.bytes(len as u64);
            done += len as u64;
            if len < buffer.len() {
                break;
            }
        }
        if hole > 0 {
            sink.large_hole(hole)?;
        }
        if done == size { Ok(()) } else { Err(lying()) }
    }

    fn all_found(&mut self, wanted: &Wanted) -> Result<(), Failure> {
        if self.ahead.is_some() || self.next_entry()?.is_some() {
            return Err(failed("the archive is not imported: it has entries of a source that its manifest does not name"));
        }
        match wanted.sources.values().flatten().all(|p| p.found) {
            true => Ok(()),
            false => Err(failed("the archive does not have all that was chosen")),
        }
    }

    /// What was stored is what was proven.
    fn is_all(&self, totals: &Totals) -> Result<(), Failure> {
        match totals.bytes == self.counts.bytes && totals.files == self.counts.files {
            true => Ok(()),
            false => Err(failed(format!(
                "the archive has {} files with {} bytes, and {} with {} were imported; this is a bug",
                totals.files, totals.bytes, self.counts.files, self.counts.bytes
            ))),
        }
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

    /// Commits, and removes what it replaces; the backup's id.
    pub fn commit(
        &self,
        open: &Open,
        mut manifest: Manifest,
        flushed: &Flushed,
        replaced: Option<BackupDetail>,
    ) -> Result<String, Failure> {
        let (env, live, target, repository) = (self.env, self.live, &open.target, &open.repository);
        let newest = env.ledger.newest_in_chain(&target.name)?;
        manifest.repository = ByteArray::from(repository.raw_id());
        manifest.sequence = catalogue::next_sequence(&target.name, &env.ledger, newest.as_ref().map_or(0, |d| d.sequence))?;
        manifest.predecessor = newest.as_ref().and_then(|d| unhex(d.object())).map(ByteArray::from);
        (manifest.added_bytes, manifest.new_bytes) = (flushed.added_bytes, Some(flushed.new_bytes));
        if live.cancel.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        open.lease.check()?;
        live.step("Committing");
        let raw = writer::commit(repository, &manifest, flushed)?;
        destination::remember(&env.ledger, repository)?;
        let before = match &replaced {
            Some(old) => env.ledger.marks(&target.name, Some(&old.backup.id))?,
            None => Vec::new(),
        };
        let detail = catalogue::detail(&HEXLOWER.encode(&raw), &manifest);
        env.ledger.put_backup(&target.name, &detail)?;
        let id = detail.backup.id;
        live.update(|run| run.backup = Some(id.clone()));
        if let Some(old) = replaced {
            if old.backup.pinned {
                let said = repository::Mark::new(raw, Said::Pin.as_str(), Timestamp::now().to_string(), live.snapshot().by);
                catalogue::mark(repository, &target.name, &env.ledger, &said)?;
            }
            // The new one is committed: what fails now does not take that back.
            let removed = || -> Result<(), Failure> {
                if let Some(raw) = unhex(old.object()) {
                    repository.delete_manifest(&raw)?;
                }
                for mark in before {
                    if let Some(raw) = unhex(&mark.id) {
                        repository.delete_mark(&raw)?;
                    }
                    env.ledger.remove_mark(&target.name, &mark.id)?;
                }
                Ok(())
            };
            match removed() {
                Ok(()) => live.message(Level::Info, format!("it takes the place of backup {} at {}", short(&id), target.name)),
                Err(e) => {
                    live.message(Level::Error, format!("the backup is imported, but the one that it replaces could not be removed: {e}"))
                }
            }
        }
        live.message(
            Level::Info,
            format!("backup {} of job {} imported to {}: {}", short(&id), manifest.job, target.name, told(&self.counts)),
        );
        Ok(id)
    }
}

fn lying() -> Failure {
    failed("the archive is not imported: a file does not have the size that its header says")
}

/// In words and numbers.
pub(super) fn told(counts: &ImportCounts) -> String {
    format!("{} entries, {} files, {} bytes", counts.entries, counts.files, counts.bytes)
}

fn facts(source: &Source) -> Result<String, Failure> {
    serde_json::to_string(&source.facts).map_err(|e| failed(format!("the facts of source {}: {e}", source.name)))
}

/// Whether an entry is this part of a file.
fn is_part(source: &Source, header: &EntryHeader, file: &[u8], number: u64) -> bool {
    let path = header.path.to_bytes().unwrap_or_default();
    header.kind == EntryKind::File && parts::part_of(&source.kind, split(&path).1) == Some((file, number))
}

/// The name that the file of a source which is one file shows under.
fn file_name(source: &Source) -> Vec<u8> {
    let place = source.place.to_bytes().unwrap_or_default();
    let name = place.rsplit(|b| *b == b'/').next().filter(|n| !n.is_empty());
    name.unwrap_or(source.name.as_bytes()).to_vec()
}

/// Whether a directory stands for a source of one file, as [`crate::run::selection::Shown::made_up_directory`] makes it.
fn is_made_up(directory: &Entry, file: &Entry) -> bool {
    let of = |e: &Entry| (e.uid, e.gid, e.mtime);
    directory.mode == 0o700 && directory.xattrs.is_empty() && of(directory) == of(file)
}

/// As the configuration has it.
pub fn is_source_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && name.len() <= 255 && !name.contains('/') && !name.chars().any(char::is_control)
}

/// What no backup can be made of is told before anything is read.
fn check_head(head: &Head, job: &str) -> Result<(), Failure> {
    let wrong = |text: String| failed(format!("the archive is not imported: its manifest is not one that keepd makes: {text}"));
    if unhex(&head.origin.backup).is_none() {
        return Err(wrong(format!("'{}' is no backup id", head.origin.backup)));
    }
    if head.origin.started.parse::<Timestamp>().is_err() {
        return Err(wrong(format!("'{}' is no time", head.origin.started)));
    }
    if !crate::config::is_name(job) {
        return Err(wrong(format!("'{job}' is no name of a job")));
    }
    if let Some(source) = head.sources.iter().find(|s| !is_source_name(&s.name)) {
        return Err(wrong(format!("'{}' is no name of a source", source.name)));
    }
    if head.sources.is_empty() {
        return Err(wrong("it names no source".into()));
    }
    Ok(())
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

fn manifest(head: &Head, tail: Option<&Tail>, sources: Vec<ManifestSource>, notes: Vec<String>) -> Result<Manifest, Failure> {
    let origin = &head.origin;
    let list = |names: &BTreeMap<u32, String>| names.iter().map(|(id, name)| (*id, name.clone())).collect::<Vec<_>>();
    let outcome = tail.map_or(&origin.outcome, |t| &t.outcome);
    // What is no word that is known was not good.
    let outcome = outcome.parse::<Outcome>().unwrap_or(Outcome::Suspect);
    let mut messages = tail.map_or(&head.messages, |t| &t.messages).clone();
    messages.push((
        Level::Info.as_str().into(),
        format!("imported at {} from archive {}, made on {} by keepd {}", Timestamp::now(), head.archive, origin.host, head.keepd_version),
    ));
    messages.extend(notes.into_iter().map(|text| (Level::Info.as_str().into(), text)));
    Ok(Manifest {
        format: 1,
        repository: ByteArray::from([0; 16]),
        sequence: 0,
        predecessor: None,
        job: origin.job.clone(),
        run: origin.run.clone(),
        started: origin.started.clone(),
        finished: tail.map_or(&origin.finished, |t| &t.finished).clone(),
        r#type: IMPORTED.into(),
        outcome: outcome.as_str().into(),
        name: origin.name.clone(),
        labels: origin.labels.clone().into_iter().collect(),
        host: origin.host.clone(),
        keepd_version: origin.keepd_version.clone(),
        sources,
        users: list(tail.map_or(&head.users, |t| &t.users)),
        groups: list(tail.map_or(&head.groups, |t| &t.groups)),
        messages,
        left_out: tail.map_or(head.left_out, |t| t.left_out),
        added_bytes: 0,
        new_bytes: None,
        parent: None,
        origin: None,
        description: origin.description.clone(),
        version: tail.map_or(&origin.version, |t| &t.version).clone(),
        schema_version: tail.map_or(&origin.schema_version, |t| &t.schema_version).clone(),
    })
}

/// The manifest of a foreign tar.
pub(super) fn foreign_manifest(
    work: &Work<'_>,
    started: String,
    source: ManifestSource,
    users: Vec<(u32, String)>,
    groups: Vec<(u32, String)>,
) -> Manifest {
    let request = work.request;
    let now = Timestamp::now().to_string();
    let place = request.place.as_ref().map(|p| format!(" from {p}")).unwrap_or_default();
    Manifest {
        format: 1,
        repository: ByteArray::from([0; 16]),
        sequence: 0,
        predecessor: None,
        job: request.job.clone().unwrap_or_default(),
        run: work.live.id(),
        started,
        finished: now.clone(),
        r#type: IMPORTED.into(),
        outcome: Outcome::Good.as_str().into(),
        name: request.name.clone(),
        labels: request.labels.clone().into_iter().collect(),
        host: names::host(),
        keepd_version: env!("CARGO_PKG_VERSION").into(),
        sources: vec![source],
        users,
        groups,
        messages: vec![(Level::Info.as_str().into(), format!("imported at {now}{place}, of a tar archive that keepd did not make"))],
        left_out: 0,
        added_bytes: 0,
        new_bytes: None,
        parent: None,
        origin: None,
        description: request.description.clone(),
        version: None,
        schema_version: None,
    }
}

const IMPORTED: &str = "imported";
