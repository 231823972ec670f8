//! The sources of a job into an archive while they are captured: databases first, then files, each once. A tar cannot take back what it has, so files
//! are not looked at a second time as in a repository: what came after the databases is in the backup, what went before them is not.

use std::io::Write;
use std::rc::Rc;

use keepd_protocol::model::BytesPath;

use crate::archive::ArchiveSink;
use crate::config::{Job, Source, SourceKind};
use crate::portable::head;
use crate::repository::{Entry, SinkError};
use crate::run::backup::Environment;
use crate::run::live::{Failure, LiveRun};
use crate::run::references::Named;
use crate::run::{quiesce, set};
use crate::source::{Context, Previous, command, files, mysql, postgres, sqlite};

/// What came of it, beside what is in the archive.
pub struct Captured {
    /// In the order of the archive, with counts and facts.
    pub sources: Vec<head::Source>,
    /// Why it is suspect.
    pub reasons: Vec<String>,
    pub version: Option<String>,
    pub schema_version: Option<String>,
}

/// The sources in the order of an archive, without counts and facts.
pub fn sources(job: &Job) -> Vec<head::Source> {
    let source = |s: &Source| head::Source {
        name: s.name.clone(),
        kind: s.kind.word().into(),
        place: BytesPath::from_bytes(&s.kind.place()),
        one_file: match &s.kind {
            SourceKind::Sqlite(_) => true,
            SourceKind::Files(files) => std::fs::metadata(&files.path).is_ok_and(|m| m.is_file()),
            _ => false,
        },
        ..head::Source::default()
    };
    in_order(job).into_iter().map(source).collect()
}

fn in_order(job: &Job) -> Vec<&Source> {
    let (files, others): (Vec<&Source>, Vec<&Source>) = job.sources.iter().partition(|s| matches!(s.kind, SourceKind::Files(_)));
    [others, files].concat()
}

/// Captures all sources of a job; the application is held still meanwhile if it is so configured.
pub fn capture<W: Write + Send + 'static>(
    env: &Environment,
    job: &Job,
    sink: &mut ArchiveSink<W>,
    live: &LiveRun,
) -> Result<Captured, Failure> {
    let state_dir = &env.config.daemon.state_dir;
    let held = quiesce::begin(job, state_dir, live)?;
    let version = set::version("version", job.version.as_ref(), job, live)?;
    let schema_version = set::version("schema_version", job.schema_version.as_ref(), job, live)?;
    let work = state_dir.join("work");
    // Nothing is remembered for the next time: each archive is whole.
    let cache = tempfile::Builder::new()
        .prefix("archive-")
        .tempdir_in(&work)
        .map_err(|e| Failure::Failed(format!("cannot make a directory in {}: {e}", work.display())))?;
    let context = Context { cancel: &live.cancel, report: &live.report, work_dir: &work, cache_dir: cache.path() };
    let (file_sources, others): (Vec<&Source>, Vec<&Source>) =
        in_order(job).into_iter().partition(|s| matches!(s.kind, SourceKind::Files(_)));
    let (mut captured, mut named) = (Vec::new(), Vec::new());
    for source in others {
        named.extend(set::named(job, source, live)?);
        live.step(&format!("capturing {}", source.name));
        captured.push(one(job, source, Vec::new().into(), sink, &context)?);
    }
    let named: Rc<[Named]> = named.into();
    for source in file_sources {
        live.step(&format!("capturing {}", source.name));
        captured.push(one(job, source, named.clone(), sink, &context)?);
    }
    if let Some(held) = held {
        held.end()?;
    }
    let mut reasons = Vec::new();
    for named in named.iter() {
        reasons.extend(named.verdict()?);
    }
    Ok(Captured { sources: captured, reasons, version, schema_version })
}

fn one<W: Write + Send + 'static>(
    job: &Job,
    source: &Source,
    named: Rc<[Named]>,
    sink: &mut ArchiveSink<W>,
    context: &Context<'_>,
) -> Result<head::Source, Failure> {
    let begun = sources(job).into_iter().find(|s| s.name == source.name).unwrap_or_default();
    let name = source.name.clone();
    sink.begin_source(
        begun,
        Box::new(move |path, kind| {
            let mut of_it = named.iter().filter(|n| n.under == name);
            Ok(of_it.try_for_each(|n| n.tick(path, kind))?)
        }),
    );
    let previous = &mut NoBackup;
    let facts = match &source.kind {
        SourceKind::Files(files) => files::capture(files, previous, sink, context),
        SourceKind::Sqlite(sqlite) => sqlite::capture(sqlite, previous, sink, context),
        SourceKind::Postgres(server) => postgres::capture(server, previous, sink, context),
        SourceKind::Mysql(server) => mysql::capture(server, previous, sink, context),
        SourceKind::Command(command) => command::capture(command, &job.name, previous, sink, context),
    };
    let facts = facts.map_err(|e| set::told(source, e))?;
    let ended = sink.end_source().map_err(|e| set::told(source, e.into()))?;
    Ok(head::Source { facts, ..ended })
}

/// Archives are not built upon others.
struct NoBackup;

impl Previous for NoBackup {
    fn next_entry(&mut self) -> Result<Option<Entry>, SinkError> {
        Ok(None)
    }
}
