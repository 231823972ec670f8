//! A dump back into a server: loaded into a scratch database, checked, and put in place; or into a program that takes it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use keepd_protocol::model::Level;
use rustix::event::{PollFd, PollFlags, poll};
use tokio_util::sync::CancellationToken;

use super::backup::Environment;
use super::live::{Failure, Finish, LiveRun};
use super::patient::PatientWriter;
use super::restore::Place;
use super::set::told;
use super::{contents, hooks, quiesce};
use crate::config::{Databases, Job, ServerSource, Source, SourceKind};
use crate::process::Pipes;
use crate::repository::Entry;
use crate::source::load::{Loader, PATIENCE, Wanted};
use crate::source::{Facts, command, mysql, postgres};

/// What is to be brought back: one database of a server, beside what is there.
#[derive(Debug, Clone, Default)]
pub struct LoadRequest {
    pub source: Option<String>,
    /// Of several in the source.
    pub database: Option<String>,
    /// What it is to be called.
    pub target: String,
    pub tables: Vec<String>,
    /// A database of that name may be there: it is kept under another name.
    pub replace: bool,
    pub owners: bool,
}

impl LoadRequest {
    /// The source that is meant, and the file in it. The error says what to give.
    pub fn find<'j>(&self, job: &'j Job) -> Result<(&'j Source, String), String> {
        let can = |s: &&Source| matches!(s.kind, SourceKind::Postgres(_) | SourceKind::Mysql(_));
        let list = || job.sources.iter().filter(can).map(|s| s.name.as_str()).collect::<Vec<_>>().join(", ");
        let source = match &self.source {
            Some(name) => job.sources.iter().find(|s| s.name == *name).ok_or_else(|| {
                format!(
                    "job {} has no source '{name}' any more; it has {}",
                    job.name,
                    job.sources.iter().map(|s| s.name.as_str()).collect::<Vec<_>>().join(", ")
                )
            })?,
            None => {
                let mut all = job.sources.iter().filter(can);
                match (all.next(), all.next()) {
                    (Some(one), None) => one,
                    (None, _) => {
                        return Err(format!("job {} has no source on a database server; restore with --in-place or --to DIR", job.name));
                    }
                    _ => return Err(format!("job {} has several; give --source, one of {}", job.name, list())),
                }
            }
        };
        match &source.kind {
            SourceKind::Postgres(server) => Ok((source, postgres::file_of(&self.database_of(server, source)?))),
            SourceKind::Mysql(server) => Ok((source, mysql::file_of(&self.database_of(server, source)?))),
            other => Err(format!(
                "source {} is of {}: only a server's database is loaded under another name; restore with --in-place or --to DIR",
                source.name,
                other.word()
            )),
        }
    }

    fn database_of(&self, server: &ServerSource, source: &Source) -> Result<String, String> {
        match (&self.database, &server.databases) {
            (Some(name), _) => Ok(name.clone()),
            (None, Databases::Named(names)) => match names.as_slice() {
                [one] => Ok(one.clone()),
                several => Err(format!("source {} has several databases; give --database, one of {}", source.name, several.join(", "))),
            },
            (None, Databases::All) => Err(format!("source {} has all databases of its server; give --database", source.name)),
        }
    }
}

/// What is read, and from where.
pub struct Dump<'a> {
    pub place: Place,
    pub another: Box<dyn FnMut() -> Option<Place> + 'a>,
    /// `<source>/<file>`
    pub path: Vec<u8>,
    pub entry: Entry,
}

impl Dump<'_> {
    /// Writes it; a reader that takes nothing for `patience` is given up.
    pub fn write(mut self, out: OwnedFd, patience: Duration, live: &LiveRun) -> Result<(), Failure> {
        contents::write(self.place, &mut *self.another, &self.path, &self.entry, (out, patience), live).map(drop)
    }
}

/// Brings a dump back, between the job's hooks. `facts`: of its source.
pub fn load(env: &Environment, job: &Job, request: &LoadRequest, dump: Dump<'_>, facts: Facts, live: &LiveRun) -> Result<Finish, Failure> {
    let (source, _) = request.find(job).map_err(Failure::Failed)?;
    live.set_total(dump.entry.size);
    hooks::around_restore(job, live, || {
        let server = loader(source, &live.cancel)?;
        into_server(env, job, source, server.as_ref(), &wanted(request, source, facts, live)?, dump, live)?;
        Ok(Finish::Good)
    })
}

/// A source's server, as something that takes dumps back.
pub fn loader<'s>(source: &'s Source, cancel: &CancellationToken) -> Result<Box<dyn Loader + 's>, Failure> {
    match &source.kind {
        SourceKind::Postgres(server) => Ok(Box::new(postgres::Client::new(server).map_err(|e| told(source, e))?)),
        SourceKind::Mysql(server) => Ok(Box::new(mysql::Client::new(server, cancel).map_err(|e| told(source, e))?)),
        _ => Err(Failure::Failed(format!("source {} is on no database server", source.name))),
    }
}

/// The first error; the second one is told.
fn both(first: Result<(), Failure>, second: Result<(), Failure>, live: &LiveRun) -> Result<(), Failure> {
    match (first, second) {
        (Err(first), Err(second)) => {
            live.message(Level::Error, second.to_string());
            Err(first)
        }
        (first, second) => first.and(second),
    }
}

fn wanted(request: &LoadRequest, source: &Source, facts: Facts, live: &LiveRun) -> Result<Wanted, Failure> {
    let (SourceKind::Postgres(server) | SourceKind::Mysql(server)) = &source.kind else {
        return Err(Failure::Failed(format!("source {} is on no database server", source.name)));
    };
    let database = request.database_of(server, source).map_err(Failure::Failed)?;
    Ok(Wanted {
        tables: request.tables.clone(),
        replace: request.replace,
        owners: request.owners,
        ..Wanted::of(&database, &request.target, facts, &live.id())
    })
}

fn into_server(
    env: &Environment,
    job: &Job,
    source: &Source,
    server: &dyn Loader,
    wanted: &Wanted,
    dump: Dump<'_>,
    live: &LiveRun,
) -> Result<(), Failure> {
    let in_place = wanted.replace && !job.services.is_empty();
    let wanted = &Wanted { stops: in_place, ..wanted.clone() };
    live.step("looking whether it can be done");
    server.look(wanted, in_place, &live.cancel).map_err(|e| told(source, e))?;
    let loaded = load_and_check(source, server, wanted, dump, live).and_then(|()| {
        let held = if in_place { Some(quiesce::stop_services(job, &env.config.daemon.state_dir, live)?) } else { None };
        live.step(&format!("putting {} in place", wanted.target));
        let published =
            server.publish(wanted, &live.cancel).and_then(|texts| server.settle(wanted).map(|()| texts)).map_err(|e| told(source, e));
        let started = held.map_or(Ok(()), quiesce::Quiesced::end);
        let published = published.map(|texts| texts.into_iter().for_each(|text| live.message(Level::Info, text)));
        both(published, started, live)
    });
    if loaded.is_err()
        && let Err(e) = server.discard(wanted)
    {
        live.message(Level::Warning, format!("the scratch database {} could not be removed: {e}", wanted.scratch));
    }
    loaded
}

/// Loads a dump into its scratch database and compares what came with what was captured.
pub fn load_and_check(source: &Source, server: &dyn Loader, wanted: &Wanted, dump: Dump<'_>, live: &LiveRun) -> Result<(), Failure> {
    live.step(&format!("loading {} into {}", wanted.database, wanted.scratch));
    let running = server.begin(wanted, &live.cancel).map_err(|e| told(source, e))?;
    feed(source, running, PATIENCE, live, |input| dump.write(input, PATIENCE, live))?;
    live.step("checking");
    let found = server.verify(wanted, &live.cancel).map_err(|e| told(source, e))?;
    live.message(Level::Info, format!("source {}: {found}", source.name));
    Ok(())
}

/// Whether nobody reads the other end of a pipe any more.
fn is_hung_up(pipe: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pipe, PollFlags::OUT)];
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    let _ = poll(&mut fds, Some(&now));
    fds.iter().any(|fd| fd.revents().contains(PollFlags::ERR))
}

/// Feeds a dump to a program; what the program says of it counts more than that it took no more.
fn feed(
    source: &Source,
    mut running: crate::process::Running,
    patience: Duration,
    live: &LiveRun,
    write: impl FnOnce(OwnedFd) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let input = running.take_input().ok_or_else(|| Failure::Failed("the program has no input; this is a bug".into()))?;
    let open = input.try_clone().map_err(|e| Failure::Failed(format!("source {}: cannot feed a program: {e}", source.name)))?;
    let fed = write(input);
    if fed.is_err() {
        // Half of it must not look like all: whoever waits for more is ended before its input is.
        let went_by_itself = !live.cancel.is_cancelled() && is_hung_up(&open) && running.has_ended_within(Duration::from_secs(10));
        if !went_by_itself {
            drop(running);
            drop(open);
            return fed;
        }
    }
    drop(open);
    let ended = running.finish(patience, &live.cancel)?;
    ended.good().map_err(|e| e.about(&format!("source {}", source.name)))?;
    // A program that is content with less may not have put back what it should.
    fed.map_err(|e| match e {
        Failure::Failed(text) | Failure::Damaged(text) | Failure::NeedsKey(text) => {
            Failure::Failed(format!("source {}: {} ended well, but did not take all of it: {text}", source.name, ended.name()))
        }
        other => other,
    })?;
    if !ended.said.is_empty() {
        live.message(Level::Info, ended.said);
    }
    Ok(())
}

/// Feeds a dump to a command source's restore_command.
pub fn through_command(job: &Job, source: &Source, dump: Dump<'_>, live: &LiveRun) -> Result<(), Failure> {
    let size = dump.entry.size;
    into_command(job, source, size, live, |input, patience| dump.write(input, patience, live))
}

/// The same with what stands in a file.
pub fn file_through_command(job: &Job, source: &Source, mut file: File, live: &LiveRun) -> Result<(), Failure> {
    let failed = |e: io::Error| Failure::Failed(format!("source {}: what was kept of it cannot be given back: {e}", source.name));
    let size = file.metadata().map_err(failed)?.len();
    into_command(job, source, size, live, |input, patience| {
        let mut out = PatientWriter::new(input, patience, live.cancel.clone())?;
        io::copy(&mut file, &mut out).map(drop).map_err(failed)
    })
}

fn into_command(
    job: &Job,
    source: &Source,
    size: u64,
    live: &LiveRun,
    write: impl FnOnce(OwnedFd, Duration) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let program = match &source.kind {
        SourceKind::Command(command) => command.restore.as_ref(),
        _ => None,
    };
    let program = program.ok_or_else(|| Failure::Failed(format!("source {} has no restore_command", source.name)))?;
    live.step(&format!("restoring through {}", program.command.first().map(String::as_str).unwrap_or_default()));
    let size = size.to_string();
    let environment = vec![("KEEPD_JOB", job.name.as_str().into()), ("KEEPD_RUN", live.id().into()), ("KEEPD_BYTES", size.into())];
    let running = command::job(program, environment).start(Pipes::Input)?;
    feed(source, running, program.timeout, live, |input| write(input, program.timeout))
}
