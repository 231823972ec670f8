//! A restore into a server, or through a command: the dump of a database source is loaded into a scratch database, checked, and put in place.

use std::time::Duration;

use keepd_protocol::model::Level;
use rustix::event::{PollFd, PollFlags, poll};

use super::backup::Environment;
use super::live::{Failure, Finish, LiveRun};
use super::restore::{Another, Place};
use super::set::told;
use super::{contents, hooks, quiesce};
use crate::config::{Databases, Job, ServerSource, Source, SourceKind};
use crate::process::Pipes;
use crate::repository::Entry;
use crate::source::load::{Loader, PATIENCE, Wanted, scratch_name};
use crate::source::{Facts, command, mysql, postgres};

/// What is to be brought back.
#[derive(Debug, Clone, Default)]
pub struct LoadRequest {
    pub source: Option<String>,
    /// Of several in the source.
    pub database: Option<String>,
    /// None: under its own name, in place of what is there.
    pub target: Option<String>,
    pub tables: Vec<String>,
    pub replace: bool,
    pub owners: bool,
}

impl LoadRequest {
    /// The source that is meant, and the file in it. The error says what to give.
    pub fn find<'j>(&self, job: &'j Job) -> Result<(&'j Source, String), String> {
        let can = |s: &&Source| matches!(s.kind, SourceKind::Postgres(_) | SourceKind::Mysql(_) | SourceKind::Command(_));
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
                        return Err(format!("job {} has no database or command source; restore its files with --to DIR", job.name));
                    }
                    _ => return Err(format!("job {} has several; give --source, one of {}", job.name, list())),
                }
            }
        };
        match &source.kind {
            SourceKind::Postgres(server) => Ok((source, postgres::file_of(&self.database_of(server, source)?))),
            SourceKind::Mysql(server) => Ok((source, mysql::file_of(&self.database_of(server, source)?))),
            SourceKind::Command(command) if command.restore.is_some() => {
                if self.target.is_some() || self.database.is_some() || !self.tables.is_empty() {
                    return Err(format!("source {} is a command: it takes neither names of databases nor of tables", source.name));
                }
                Ok((source, command.file.clone()))
            }
            SourceKind::Command(_) => Err(format!("source {} has no restore_command; restore it with --to DIR", source.name)),
            other => Err(format!(
                "source {} is of {}, which this version of keepd restores to a directory only: --to DIR",
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
    pub another: Another<'a>,
    /// `<source>/<file>`
    pub path: Vec<u8>,
    pub entry: Entry,
    /// Facts of the source.
    pub facts: Facts,
}

/// Brings a dump back, between the job's hooks.
pub fn load(env: &Environment, job: &Job, request: &LoadRequest, dump: Dump<'_>, live: &LiveRun) -> Result<Finish, Failure> {
    let (source, _) = request.find(job).map_err(Failure::Failed)?;
    live.set_total(dump.entry.size);
    hooks::around_restore(job, live, || {
        match &source.kind {
            SourceKind::Postgres(server) => {
                let client = postgres::Client::new(server).map_err(|e| told(source, e))?;
                into_server(env, job, source, &client, &wanted(request, server, source, &dump, live)?, dump, live)?;
            }
            SourceKind::Mysql(server) => {
                let client = mysql::Client::new(server, &live.cancel).map_err(|e| told(source, e))?;
                into_server(env, job, source, &client, &wanted(request, server, source, &dump, live)?, dump, live)?;
            }
            SourceKind::Command(command) => {
                let held = match job.services.is_empty() {
                    true => None,
                    false => Some(quiesce::stop_services(job, &env.config.daemon.state_dir, live)?),
                };
                let restored = through_command(job, source, command, dump, live);
                both(restored, held.map_or(Ok(()), quiesce::Quiesced::end), live)?;
            }
            _ => return Err(Failure::Failed(format!("source {} is no database", source.name))),
        }
        Ok(Finish::Good)
    })
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

fn wanted(request: &LoadRequest, server: &ServerSource, source: &Source, dump: &Dump<'_>, live: &LiveRun) -> Result<Wanted, Failure> {
    let database = request.database_of(server, source).map_err(Failure::Failed)?;
    let target = request.target.clone().unwrap_or_else(|| database.clone());
    // Only what every server takes in a name.
    let run: String = live.id().chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_lowercase();
    let short: String = target.chars().take(24).collect();
    Ok(Wanted {
        database,
        tables: request.tables.clone(),
        replace: request.replace || request.target.is_none(),
        owners: request.owners,
        stops: false,
        facts: dump.facts.clone(),
        scratch: scratch_name(&run),
        aside: format!("{short}_before_{run}"),
        target,
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
        let published = server.publish(wanted, &live.cancel).map_err(|e| told(source, e));
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

fn load_and_check(source: &Source, server: &dyn Loader, wanted: &Wanted, dump: Dump<'_>, live: &LiveRun) -> Result<(), Failure> {
    live.step(&format!("loading {} into {}", wanted.database, wanted.scratch));
    let running = server.begin(wanted, &live.cancel).map_err(|e| told(source, e))?;
    feed(source, running, dump, PATIENCE, live)?;
    live.step("checking");
    let found = server.verify(wanted, &live.cancel).map_err(|e| told(source, e))?;
    live.message(Level::Info, format!("source {}: {found}", source.name));
    Ok(())
}

/// Whether nobody reads the other end of a pipe any more.
fn is_hung_up(pipe: &std::os::fd::OwnedFd) -> bool {
    let mut fds = [PollFd::new(pipe, PollFlags::OUT)];
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    let _ = poll(&mut fds, Some(&now));
    fds.iter().any(|fd| fd.revents().contains(PollFlags::ERR))
}

/// Feeds a dump to a program; what the program says of it counts more than that it took no more.
fn feed(source: &Source, mut running: crate::process::Running, dump: Dump<'_>, patience: Duration, live: &LiveRun) -> Result<(), Failure> {
    let input = running.take_input().ok_or_else(|| Failure::Failed("the program has no input; this is a bug".into()))?;
    let open = input.try_clone().map_err(|e| Failure::Failed(format!("source {}: cannot feed a program: {e}", source.name)))?;
    let fed = contents::write(dump.place, dump.another, &dump.path, &dump.entry, (input, patience), live);
    if fed.is_err() {
        // Half of it must not look like all: whoever waits for more is ended before its input is.
        let went_by_itself = !live.cancel.is_cancelled() && is_hung_up(&open) && running.has_ended_within(Duration::from_secs(10));
        if !went_by_itself {
            drop(running);
            drop(open);
            return fed.map(drop);
        }
    }
    drop(open);
    let ended = running.finish(patience, &live.cancel)?;
    ended.good().map_err(|e| e.about(&format!("source {}", source.name)))?;
    // A program that is content with less may not have put back what it should.
    fed.map_err(|e| match e {
        Failure::Failed(text) | Failure::Damaged(text) => {
            Failure::Failed(format!("source {}: {} ended well, but did not take all of it: {text}", source.name, ended.name()))
        }
        other => other,
    })?;
    if !ended.said.is_empty() {
        live.message(Level::Info, ended.said);
    }
    Ok(())
}

fn through_command(job: &Job, source: &Source, kind: &crate::config::CommandSource, dump: Dump<'_>, live: &LiveRun) -> Result<(), Failure> {
    let program = kind.restore.as_ref().ok_or_else(|| Failure::Failed(format!("source {} has no restore_command", source.name)))?;
    live.step(&format!("restoring through {}", program.command.first().map(String::as_str).unwrap_or_default()));
    let size = dump.entry.size.to_string();
    let environment = vec![("KEEPD_JOB", job.name.as_str().into()), ("KEEPD_RUN", live.id().into()), ("KEEPD_BYTES", size.into())];
    let running = command::job(program, environment).start(Pipes::Input)?;
    feed(source, running, dump, program.timeout, live)
}
