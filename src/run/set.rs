//! The sources of a job as one set: captured in an order in which they fit each other.
//!
//! While the application works on, files are looked at twice: once before the databases and once after. What came between is in the second look,
//! what vanished is kept from the first; so every file that a row names is there, whether it was uploaded just before the database was read or
//! deleted just after. An application that is held still is looked at once, its databases first.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use keepd_protocol::model::Level;
use tokio_util::sync::CancellationToken;

use super::backup::Environment;
use super::live::{Failure, LiveRun};
use super::quiesce;
use super::references::Named;
use crate::config::{Job, Source, SourceKind, VersionFrom};
use crate::repository::source_writer::{SourceWriter, WrittenSource};
use crate::repository::spool::SpoolReader;
use crate::repository::writer::Writer;
use crate::repository::{Entry, Manifest, ManifestSource, Repository, SinkError, SourceReader};
use crate::source::{Context, Facts, Previous, SourceError, ask, command, files, mysql, postgres, sqlite};

/// What a set became.
pub struct CapturedSet {
    /// As they are configured.
    pub sources: Vec<ManifestSource>,
    pub users: HashSet<u32>,
    pub groups: HashSet<u32>,
    /// Why it is suspect.
    pub reasons: Vec<String>,
    pub version: Option<String>,
    pub schema_version: Option<String>,
}

/// Captures all sources of a job; the application is held still meanwhile if it is so configured.
pub fn capture(
    env: &Environment,
    job: &Job,
    previous: Option<&Manifest>,
    repository: &Arc<Repository>,
    writer: &mut Writer,
    live: &LiveRun,
) -> Result<CapturedSet, Failure> {
    let held = quiesce::begin(job, &env.config.daemon.state_dir, live)?;
    let mut set = Set {
        env,
        job,
        previous,
        repository,
        writer,
        live,
        written: HashMap::new(),
        named: Vec::new(),
        added_before: live.snapshot().progress.added_bytes,
    };
    let (version, schema_version) =
        (version("version", job.version.as_ref(), job, live)?, version("schema_version", job.schema_version.as_ref(), job, live)?);
    let (file_sources, others): (Vec<&Source>, Vec<&Source>) = job.sources.iter().partition(|s| matches!(s.kind, SourceKind::Files(_)));
    let mut first = HashMap::new();
    if held.is_none() && !others.is_empty() {
        live.report.mute(true);
        let found: Result<_, Failure> = file_sources.iter().map(|source| Ok((source.name.clone(), set.first_pass(source)?))).collect();
        live.report.mute(false);
        first = found?;
    }
    for source in others {
        set.named.extend(named(job, source, live)?);
        set.whole(source)?;
    }
    for source in file_sources {
        match first.remove(&source.name) {
            Some((mut spool, facts)) => set.second_pass(source, &mut spool, &facts)?,
            None => set.whole(source)?,
        }
    }
    if let Some(held) = held {
        held.end()?;
    }
    let mut reasons = Vec::new();
    for named in &set.named {
        reasons.extend(named.verdict()?);
    }
    let mut captured = CapturedSet { sources: Vec::new(), users: HashSet::new(), groups: HashSet::new(), reasons, version, schema_version };
    for source in &job.sources {
        if let Some(written) = set.written.remove(&source.name) {
            captured.users.extend(written.users);
            captured.groups.extend(written.groups);
            captured.sources.push(written.source);
        }
    }
    Ok(captured)
}

struct Set<'a> {
    env: &'a Environment,
    job: &'a Job,
    previous: Option<&'a Manifest>,
    repository: &'a Arc<Repository>,
    writer: &'a mut Writer,
    live: &'a LiveRun,
    written: HashMap<String, WrittenSource>,
    named: Vec<Named>,
    added_before: u64,
}

fn failed(source: &Source, text: impl std::fmt::Display) -> Failure {
    Failure::Failed(format!("source {}: {text}", source.name))
}

/// A source's error as the run's, with the source's name.
pub fn told(source: &Source, error: SourceError) -> Failure {
    match error {
        SourceError::Cancelled | SourceError::Sink(SinkError::Cancelled) => Failure::Cancelled,
        SourceError::Failed(text) => failed(source, text),
        SourceError::Sink(SinkError::Storage(text)) => Failure::Storage(format!("source {}: {text}", source.name)),
        SourceError::Sink(e) => failed(source, e),
    }
}

/// The directories a source may use.
struct Places {
    work: std::path::PathBuf,
    cache: std::path::PathBuf,
}

impl Set<'_> {
    fn begin(&self, source: &Source, what: &str) -> Result<Places, Failure> {
        self.live.step(&format!("{what} {}", source.name));
        let places = Places {
            work: self.env.config.daemon.state_dir.join("work"),
            cache: self.repository.cache_dir().join("sources").join(&self.job.name).join(&source.name),
        };
        for dir in [&places.cache, &places.work] {
            std::fs::create_dir_all(dir).map_err(|e| failed(source, format!("cannot make {}: {e}", dir.display())))?;
        }
        Ok(places)
    }

    fn before(&self, source: &Source) -> Option<&ManifestSource> {
        self.previous.and_then(|m| m.sources.iter().find(|s| s.name == source.name && s.kind == source.kind.word()))
    }

    fn reader(&self, source: &Source) -> Option<SourceReader> {
        self.before(source).map(|b| SourceReader::new(self.repository.clone(), b))
    }

    fn expect(&self, source: &Source) {
        if let Some(before) = self.before(source) {
            let done: u64 = self.live.snapshot().progress.bytes;
            self.live.set_total(done + before.bytes);
        }
    }

    fn keep(&mut self, source: &Source, written: WrittenSource) {
        self.written.insert(source.name.clone(), written);
        self.live.set_added(self.added_before + self.writer.added_bytes());
    }

    /// Captures a source in one go.
    fn whole(&mut self, source: &Source) -> Result<(), Failure> {
        let places = self.begin(source, "capturing")?;
        self.expect(source);
        let mut previous = LastBackup { reader: self.reader(source), broken: false };
        let again = self.reader(source);
        let (live, job) = (self.live, self.job);
        let context = Context { cancel: &live.cancel, report: &live.report, work_dir: &places.work, cache_dir: &places.cache };
        let named = &self.named;
        let mut sink = SourceWriter::new(self.writer, &source.name, source.kind.word(), &source.kind.place(), again);
        if matches!(source.kind, SourceKind::Files(_)) {
            sink = sink.watched(watching(named, source));
        }
        let captured = match &source.kind {
            SourceKind::Files(files) => files::capture(files, &mut previous, &mut sink, &context),
            SourceKind::Sqlite(sqlite) => sqlite::capture(sqlite, &mut previous, &mut sink, &context),
            SourceKind::Postgres(server) => postgres::capture(server, &mut previous, &mut sink, &context),
            SourceKind::Mysql(server) => mysql::capture(server, &mut previous, &mut sink, &context),
            SourceKind::Command(command) => command::capture(command, &job.name, &mut previous, &mut sink, &context),
        };
        let facts = captured.map_err(|e| told(source, e))?;
        let written = sink.finish(json(source, &facts)?)?;
        self.keep(source, written);
        Ok(())
    }

    /// Looks at files for the first time.
    fn first_pass(&mut self, source: &Source) -> Result<(SpoolReader, Facts), Failure> {
        let SourceKind::Files(files) = &source.kind else { return Err(failed(source, "is no directory; this is a bug")) };
        let places = self.begin(source, "capturing")?;
        self.expect(source);
        let mut previous = LastBackup { reader: self.reader(source), broken: false };
        let again = self.reader(source);
        let live = self.live;
        let context = Context { cancel: &live.cancel, report: &live.report, work_dir: &places.work, cache_dir: &places.cache };
        let sink = SourceWriter::new(self.writer, &source.name, source.kind.word(), &source.kind.place(), again);
        let mut sink = sink.into_first_pass(&places.work)?;
        let facts = files::capture(files, &mut previous, &mut sink, &context).map_err(|e| told(source, e))?;
        let spool = sink.finish_first_pass()?;
        self.live.set_added(self.added_before + self.writer.added_bytes());
        Ok((spool, facts))
    }

    /// And once more, when the databases are captured.
    fn second_pass(&mut self, source: &Source, spool: &mut SpoolReader, first: &Facts) -> Result<(), Failure> {
        let SourceKind::Files(files) = &source.kind else { return Err(failed(source, "is no directory; this is a bug")) };
        let places = self.begin(source, "looking again at")?;
        let report = crate::source::Report::default();
        let live = self.live;
        let context = Context { cancel: &live.cancel, report: &report, work_dir: &places.work, cache_dir: &places.cache };
        let named = &self.named;
        let sink = SourceWriter::new(self.writer, &source.name, source.kind.word(), &source.kind.place(), None);
        let mut sink = sink.watched(watching(named, source));
        let mut facts = files::capture_again(files, spool, &mut sink, &context).map_err(|e| told(source, e))?;
        // Of the contents that were read, those that the last backup had are the ones of the first look.
        facts.extend(first.get("unchanged").map(|value| ("unchanged".to_owned(), value.clone())));
        live.report.take_over(&report);
        let written = sink.finish(json(source, &facts)?)?;
        self.keep(source, written);
        Ok(())
    }
}

/// The files that a database names, where it is to be asked for them.
pub fn named(job: &Job, source: &Source, live: &LiveRun) -> Result<Option<Named>, Failure> {
    let Some(references) = &source.references else { return Ok(None) };
    live.step(&format!("asking {} for the files it names", source.name));
    let root = job.sources.iter().find(|s| s.name == references.under).and_then(|s| s.kind.path());
    let root = root.ok_or_else(|| failed(source, format!("there is no files source '{}'", references.under)))?;
    Named::ask(source, references, root, &live.cancel).map(Some)
}

/// A version that cannot be found out is told, and no reason to have no backup.
pub fn version(what: &str, from: Option<&VersionFrom>, job: &Job, live: &LiveRun) -> Result<Option<String>, Failure> {
    let Some(from) = from else { return Ok(None) };
    live.step(&format!("asking for the {}", what.replace('_', " ")));
    match ask_version(from, job, &live.cancel) {
        Ok(text) if text.is_empty() => {
            live.message(Level::Warning, format!("{what}: the answer is empty"));
            Ok(None)
        }
        Ok(text) => Ok(Some(text)),
        Err(SourceError::Cancelled) => Err(Failure::Cancelled),
        Err(e) => {
            live.message(Level::Warning, format!("{what}: {e}"));
            Ok(None)
        }
    }
}

/// What a version's program or question says now; may be empty.
pub fn ask_version(from: &VersionFrom, job: &Job, cancel: &CancellationToken) -> Result<String, SourceError> {
    let text = match from {
        VersionFrom::Command(program) => super::hooks::first_line(program, &job.name, cancel)?,
        VersionFrom::Sql { sql, source } => match job.sources.iter().find(|s| s.name == *source) {
            Some(source) => ask::ask(&source.kind, sql, cancel)?.into_iter().next().unwrap_or_default(),
            None => return Err(SourceError::Failed(format!("there is no source '{source}'"))),
        },
    };
    Ok(text.trim().to_owned())
}

/// What the first look found.
impl Previous for SpoolReader {
    fn next_entry(&mut self) -> Result<Option<Entry>, SinkError> {
        Ok(SpoolReader::next_entry(self)?)
    }
}

/// Ticks the files that databases name.
fn watching<'n>(named: &'n [Named], source: &Source) -> crate::repository::source_writer::Watch<'n> {
    let of_it: Vec<&Named> = named.iter().filter(|n| n.under == source.name).collect();
    Box::new(move |path, kind| of_it.iter().try_for_each(|named| named.tick(path, kind)))
}

fn json(source: &Source, facts: &Facts) -> Result<String, Failure> {
    serde_json::to_string(facts).map_err(|e| failed(source, e))
}

/// The entries of the last backup. When they cannot be read, the source is captured as if there were none.
struct LastBackup {
    reader: Option<SourceReader>,
    broken: bool,
}

impl Previous for LastBackup {
    fn next_entry(&mut self) -> Result<Option<Entry>, SinkError> {
        let Some(reader) = self.reader.as_mut().filter(|_| !self.broken) else { return Ok(None) };
        match reader.next_entry() {
            Ok(entry) => Ok(entry),
            Err(crate::repository::RepositoryError::Cancelled) => Err(SinkError::Cancelled),
            Err(e) => {
                self.broken = true;
                tracing::warn!("the last backup's entries cannot be read, everything is read again: {e}");
                Ok(None)
            }
        }
    }
}
