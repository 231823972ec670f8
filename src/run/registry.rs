//! The registry of runs: starts them, knows which live, and keeps them out of each other's way.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use keepd_protocol::model::{
    Backup, BackupDetail, BackupType, Change, DestinationStatus, EntryInfo, Event, Finding, Level, Mark, Outcome, RetentionPlan, Run,
    RunKind, RunState,
};
use minicbor::bytes::ByteArray;
use tokio::runtime::Handle;
use tokio::sync::{OwnedRwLockWriteGuard, RwLock, Semaphore, broadcast, mpsc, watch};

use super::backup::{Environment, backup};
use super::live::{Failure, Finish, LiveRun};
use super::{browse, catalogue, check, copy, destination, restore, retain};
use crate::config::{self, Config, Destination, Job, Retention};
use crate::crypto;
use crate::ledger::Ledger;
use crate::repository::{self, Manifest, Repository};
use crate::storage::Storage;
use crate::storage::probe::{self, Verdict};

/// Finished runs kept in the ledger.
const KEEP_RUNS: u32 = 5000;
/// Runs that may be queued or running at once, of all kinds.
const MAX_LIVE: usize = 64;

/// Why a run could not be started, or a question not answered. Each text says what to do.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// `what`: job, backup, run, destination, path.
    #[error("{text}")]
    NotFound { what: &'static str, name: String, text: String },
    #[error("{0}")]
    Ambiguous(String),
    #[error("{0}")]
    Busy(String),
    #[error("keepd is stopping and starts nothing new")]
    ShuttingDown,
    #[error("{0}")]
    Failed(String),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Error::Failed(failure.to_string())
    }
}

impl From<crate::ledger::LedgerError> for Error {
    fn from(error: crate::ledger::LedgerError) -> Self {
        Error::Failed(error.to_string())
    }
}

/// What to back up and why.
#[derive(Debug, Clone, Default)]
pub struct BackupRequest {
    pub job: String,
    pub r#type: BackupType,
    pub name: Option<String>,
    pub labels: BTreeMap<String, String>,
    /// `schedule`, or a user's name.
    pub by: String,
    /// 1 for the first, more for a retry.
    pub attempt: u32,
}

/// A restore that has begun to write into the client's pipe.
#[derive(Debug, Clone, PartialEq)]
pub struct RestoreStarted {
    pub run: String,
    pub backup: String,
    pub entries: u64,
    pub bytes: u64,
}

type OnFinish = Box<dyn Fn(&Run) + Send + Sync>;

/// The registry of runs.
pub struct Runs {
    config: Arc<config::Current>,
    ledger: Arc<Ledger>,
    events: broadcast::Sender<Event>,
    runtime: Handle,
    live: Mutex<BTreeMap<String, Arc<LiveRun>>>,
    locks: Mutex<HashMap<String, Locks>>,
    places: Arc<Semaphore>,
    /// Copies have places of their own: a slow destination must not keep backups waiting.
    copy_places: Arc<Semaphore>,
    stopping: AtomicBool,
    counter: Mutex<(String, u32)>,
    on_finish: Mutex<Option<OnFinish>>,
    /// What was wrong with a destination last, and what kind of run saw it.
    problems: Mutex<HashMap<String, (RunKind, String)>>,
}

/// Of one destination: who writes, and who reads what a prune would remove.
#[derive(Clone, Default)]
struct Locks {
    writer: Arc<tokio::sync::Mutex<()>>,
    readers: Arc<RwLock<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a run works on and how.
struct Work {
    kind: RunKind,
    job: Option<String>,
    destinations: Vec<String>,
    backup: Option<String>,
    by: String,
    attempt: u32,
}

impl Runs {
    /// To be called inside the async runtime.
    pub fn new(config: Arc<config::Current>, ledger: Arc<Ledger>, events: broadcast::Sender<Event>) -> Arc<Self> {
        let places = || Arc::new(Semaphore::new(config.get().daemon.max_parallel_runs.max(1)));
        let (places, copy_places) = (places(), places());
        Arc::new(Self {
            config,
            ledger,
            events,
            runtime: Handle::current(),
            live: Mutex::default(),
            locks: Mutex::default(),
            places,
            copy_places,
            stopping: AtomicBool::new(false),
            counter: Mutex::default(),
            on_finish: Mutex::default(),
            problems: Mutex::default(),
        })
    }

    /// Who is told of every run that ended (the schedule).
    pub fn set_on_finish(&self, told: impl Fn(&Run) + Send + Sync + 'static) {
        *lock(&self.on_finish) = Some(Box::new(told));
    }

    fn environment(&self) -> Environment {
        Environment { config: self.config.get(), ledger: self.ledger.clone(), runtime: self.runtime.clone() }
    }

    fn locks(&self, destination: &str) -> Locks {
        lock(&self.locks).entry(destination.to_owned()).or_default().clone()
    }

    fn destination<'c>(&self, config: &'c Config, name: &str) -> Result<&'c Destination> {
        config.destinations.get(name).ok_or_else(|| {
            let known = config.destinations.keys().cloned().collect::<Vec<_>>().join(", ");
            let text = format!("there is no destination '{name}'; configured are: {known}");
            Error::NotFound { what: "destination", name: name.into(), text }
        })
    }

    /// Queues a backup. A job that is queued or running already is refused as busy.
    pub fn start_backup(self: &Arc<Self>, request: BackupRequest) -> Result<String> {
        let env = self.environment();
        let job = job_named(&env.config, &request.job)?.clone();
        let work = Work {
            kind: RunKind::Backup,
            job: Some(job.name.clone()),
            destinations: job.destinations.clone(),
            backup: None,
            by: request.by.clone(),
            attempt: request.attempt.max(1),
        };
        let runs = self.clone();
        self.start(work, move |live| {
            let writing = |name: &str| runs.wait_to_write(name, live);
            let finish = backup(&env, &job, &request, live, &|name| runs.readers_gone(name), &writing)?;
            let copies = runs.start_missing_copies(&job.name, &request.by);
            live.update(|run| run.copies = copies);
            Ok(finish)
        })
    }

    /// Waits until nobody else writes to a destination, or the run is cancelled.
    fn wait_to_write(&self, destination: &str, live: &LiveRun) -> Result<Box<dyn Send>, Failure> {
        let lock = self.locks(destination).writer.lock_owned();
        self.runtime.block_on(async {
            tokio::select! {
                guard = lock => Ok(Box::new(guard) as Box<dyn Send>),
                () = live.cancel.cancelled() => Err(Failure::Cancelled),
            }
        })
    }

    /// Queues a run for each destination of a job that lacks backups; returns the runs. What cannot be started is logged.
    pub fn start_missing_copies(self: &Arc<Self>, job: &str, by: &str) -> Vec<String> {
        let config = self.config.get();
        let Some(job) = config.jobs.get(job) else { return Vec::new() };
        let mut started = Vec::new();
        for target in job.destinations.iter().filter_map(|name| config.destinations.get(name)) {
            let run = match copy::missing(&self.ledger, &config, job, target) {
                Ok(missing) if missing.is_empty() => continue,
                Ok(_) => self.start_copies(&job.name, &target.name, by, 1),
                Err(e) => Err(e.into()),
            };
            match run {
                Ok(run) => started.push(run),
                Err(Error::Busy(_) | Error::ShuttingDown) => {}
                Err(e) => tracing::warn!(job = %job.name, destination = %target.name, "its copies could not be started: {e}"),
            }
        }
        started
    }

    /// Queues copies of all that a destination lacks, for all jobs.
    pub fn start_all_missing_copies(self: &Arc<Self>, by: &str) {
        for job in self.config.get().jobs.keys() {
            self.start_missing_copies(job, by);
        }
    }

    /// Queues a run that copies to a destination what it lacks of a job.
    fn start_copies(self: &Arc<Self>, job: &str, destination: &str, by: &str, attempt: u32) -> Result<String> {
        let env = self.environment();
        let job = job_named(&env.config, job)?.clone();
        let target = self.destination(&env.config, destination)?.clone();
        let work = Work { job: Some(job.name.clone()), attempt, ..Work::on(RunKind::Copy, destination, by) };
        let runs = self.clone();
        self.start(work, move |live| {
            let reading = |name: &str| runs.keep_readable(name);
            let copied = copy::to_destination(&env, Some(&job), &target, None, live, &|name| runs.readers_gone(name), &reading);
            if matches!(copied, Err(Failure::Failed(_) | Failure::Storage(_))) {
                runs.copy_again(&job, &target.name, attempt);
            }
            copied
        })
    }

    /// Queues a run that copies one backup to a destination, which need not be one of its job's.
    pub fn start_copy(self: &Arc<Self>, backup: &str, job: Option<&str>, destination: &str, by: &str) -> Result<String> {
        let env = self.environment();
        let found = self.resolve(backup, job)?;
        let target = self.destination(&env.config, destination)?.clone();
        if found.destinations.iter().any(|p| p.name == destination) {
            return Err(Error::Failed(format!("backup {} is at {destination} already", super::backup::short(&found.id))));
        }
        let work = Work { backup: Some(found.id.clone()), ..Work::on(RunKind::Copy, destination, by) };
        let runs = self.clone();
        self.start(work, move |live| {
            let reading = |name: &str| runs.keep_readable(name);
            copy::to_destination(&env, None, &target, Some(&found.id), live, &|name| runs.readers_gone(name), &reading)
        })
    }

    /// Tries copies that failed again, later and later.
    fn copy_again(self: &Arc<Self>, job: &Job, destination: &str, attempt: u32) {
        const LONGEST: Duration = Duration::from_secs(3600);
        let pause = job.retry.backoff.max(Duration::from_secs(1)).saturating_mul(1 << attempt.saturating_sub(1).min(12)).min(LONGEST);
        let (runs, job, destination) = (self.clone(), job.name.clone(), destination.to_owned());
        self.runtime.spawn(async move {
            tokio::time::sleep(pause).await;
            match runs.start_copies(&job, &destination, "schedule", attempt + 1) {
                Ok(_) | Err(Error::Busy(_) | Error::ShuttingDown | Error::NotFound { .. }) => {}
                Err(e) => tracing::warn!(job, destination, "its copies could not be tried again: {e}"),
            }
        });
    }

    /// Keeps a prune away from a destination while it lives.
    fn keep_readable(&self, destination: &str) -> Box<dyn Send> {
        Box::new(self.runtime.block_on(self.locks(destination).readers.read_owned()))
    }

    /// Queues a check; `read_data` is the percentage of packs to read whole.
    pub fn start_check(self: &Arc<Self>, destination: &str, read_data: u32, repair: bool, by: &str) -> Result<String> {
        let env = self.environment();
        let target = self.destination(&env.config, destination)?.clone();
        let runs = self.clone();
        self.start(Work::on(RunKind::Check, destination, by), move |live| {
            runs.check(&env, &target, check::Wanted::Percent(read_data), repair, live)
        })
    }

    fn check(
        self: &Arc<Self>,
        env: &Environment,
        target: &Destination,
        wanted: check::Wanted,
        repair: bool,
        live: &LiveRun,
    ) -> Result<Finish, Failure> {
        let _reading = self.keep_readable(&target.name);
        let writing = |name: &str| self.wait_to_write(name, live);
        let mut hurt_jobs = BTreeSet::new();
        let checked = check::check_destination(env, target, wanted, live, &writing, &|name| self.keep_readable(name), &mut hurt_jobs);
        if repair && matches!(checked, Err(Failure::Failed(_))) && !hurt_jobs.is_empty() {
            let jobs = hurt_jobs.iter().cloned().collect::<Vec<_>>().join(", ");
            live.message(
                Level::Info,
                format!("what the sources of {jobs} still have is stored anew by a backup now, and checked after it"),
            );
            self.read_sources_again(hurt_jobs, target.name.clone(), live.snapshot().by);
        }
        checked
    }

    /// Backs jobs up, whose sources may have what a destination lost, and checks the destination's structure afterwards.
    fn read_sources_again(self: &Arc<Self>, jobs: BTreeSet<String>, destination: String, by: String) {
        let runs = self.clone();
        self.runtime.spawn(async move {
            for job in jobs {
                let request = BackupRequest { job: job.clone(), r#type: BackupType::Scheduled, by: by.clone(), ..BackupRequest::default() };
                match runs.start_backup(request) {
                    Ok(run) => {
                        // Its sender goes with the run.
                        if let Some(mut followed) = runs.follow(&run) {
                            while followed.changed().await.is_ok() {}
                        }
                    }
                    Err(e) => tracing::warn!(job, "what {destination} lost could not be read from its sources again: {e}"),
                }
            }
            if let Err(e) = runs.start_check(&destination, 0, false, &by) {
                tracing::warn!(destination, "the repair could not be checked: {e}");
            }
        });
    }

    /// Destinations that are checked a few packs at a time, with the period.
    pub fn rolling_checks(&self) -> BTreeMap<String, Duration> {
        let config = self.config.get();
        config.destinations.iter().filter_map(|(name, d)| Some((name.clone(), d.check_every?))).collect()
    }

    /// Whether something that is done every so often, and known by a note of the ledger, is due; it counts as begun then.
    fn begin_if_due(&self, note: &str, every: Duration) -> Result<bool> {
        let now = Timestamp::now().as_second();
        let last: i64 = self.ledger.note(note)?.and_then(|t| t.parse().ok()).unwrap_or(0);
        // A time in the future was written by a clock that was wrong.
        if now.abs_diff(last) < every.as_secs() {
            return Ok(false);
        }
        self.ledger.set_note(note, &now.to_string())?;
        Ok(true)
    }

    /// Queues the next part of a destination's rolling check, unless something works on the destination.
    pub fn start_rolling_check(self: &Arc<Self>, destination: &str) -> Result<String> {
        let env = self.environment();
        let target = self.destination(&env.config, destination)?.clone();
        let Some(period) = target.check_every else { return Err(Error::Busy("it has no rolling check".into())) };
        if lock(&self.live).values().any(|l| l.snapshot().destination.as_deref() == Some(destination)) {
            return Err(Error::Busy(format!("something works on {destination}")));
        }
        if !self.begin_if_due(&format!("rolling check of {destination}"), super::housekeeping::pause(period))? {
            return Err(Error::Busy("the next part is not due yet".into()));
        }
        let runs = self.clone();
        self.start(Work::on(RunKind::Check, destination, "schedule"), move |live| {
            runs.check(&env, &target, check::Wanted::Rolling(period), true, live)
        })
    }

    pub fn start_prune(self: &Arc<Self>, destination: &str, dry_run: bool, by: &str) -> Result<String> {
        let env = self.environment();
        let target = self.destination(&env.config, destination)?.clone();
        let runs = self.clone();
        self.start(Work::on(RunKind::Prune, destination, by), move |live| {
            check::prune_destination(&env, &target, dry_run, live, &|name| runs.readers_gone(name))
        })
    }

    pub fn start_delete(self: &Arc<Self>, backup: &str, job: Option<&str>, destination: Option<&str>, by: &str) -> Result<String> {
        let env = self.environment();
        let found = self.resolve(backup, job)?;
        let mut targets = Vec::new();
        for place in found.destinations.iter().filter(|p| destination.is_none_or(|d| d == p.name)) {
            targets.push(self.destination(&env.config, &place.name)?.clone());
        }
        if targets.is_empty() {
            let name = destination.unwrap_or_default().to_owned();
            let text = format!("backup {} is not on destination '{name}'", found.id);
            return Err(Error::NotFound { what: "destination", name, text });
        }
        if found.pinned {
            return Err(Error::Failed(format!(
                "backup {} is pinned and not deleted; 'keepctl unpin {}' takes the pin away",
                super::backup::short(&found.id),
                super::backup::short(&found.id)
            )));
        }
        let work = Work {
            kind: RunKind::Delete,
            job: None,
            destinations: targets.iter().map(|t| t.name.clone()).collect(),
            backup: Some(found.id.clone()),
            by: by.into(),
            attempt: 1,
        };
        self.start(work, move |live| {
            for target in &targets {
                check::delete_backup(&env, target, &found.id, live)?;
            }
            Ok(Finish::Good)
        })
    }

    /// Says something of a backup on every destination that has it. Blocks until it is durable there.
    pub fn mark(&self, backup: &str, job: Option<&str>, mark: Mark, by: &str) -> Result<Backup> {
        let env = self.environment();
        let found = self.resolve(backup, job)?;
        let short = super::backup::short(&found.id);
        if mark == Mark::Accept && found.outcome == Outcome::Good {
            return Err(Error::Failed(format!("backup {short} is good already")));
        }
        let time = Timestamp::now().to_string();
        let (mut done, mut errors) = (Vec::new(), Vec::new());
        for place in &found.destinations {
            let written = self.destination(&env.config, &place.name).map_err(|e| Failure::Failed(e.to_string())).and_then(|target| {
                let repository = destination::open(&env.config, target, &env.ledger, &self.runtime, false)?;
                let said = repository::Mark {
                    format: 1,
                    backup: ByteArray::from(catalogue::object(&env.ledger, &place.name, &found.id)?),
                    kind: mark.as_str().into(),
                    time: time.clone(),
                    by: by.to_owned(),
                };
                catalogue::mark(&repository, &place.name, &env.ledger, &said)
            });
            match written {
                Ok(()) => done.push(place.name.as_str()),
                Err(e) => errors.push(format!("{}: {e}", place.name)),
            }
        }
        if !errors.is_empty() {
            let where_done = if done.is_empty() { "nowhere".to_owned() } else { format!("only at {}", done.join(", ")) };
            return Err(Error::Failed(format!("{mark} of backup {short} is done {where_done}: {}; try again", errors.join("; "))));
        }
        tracing::info!(backup = %found.id, by, "{mark}");
        self.resolve(&found.id, None)
    }

    /// Tries what a destination can do. Blocks.
    pub fn test_destination(&self, destination: &str) -> Result<Vec<Finding>> {
        let env = self.environment();
        let target = self.destination(&env.config, destination)?;
        let storage = Storage::open(target, self.runtime.clone()).map_err(|e| Error::Failed(e.to_string()))?;
        let told = |f: probe::Finding| {
            let verdict = match f.verdict {
                Verdict::Ok => "ok",
                Verdict::Warning => "warning",
                Verdict::Failed => "failed",
                Verdict::Skipped => "skipped",
            };
            Finding { step: f.step.into(), verdict: verdict.into(), text: f.text }
        };
        Ok(probe::probe(&storage).into_iter().map(told).collect())
    }

    /// Makes this machine the writer of a destination's repository; says who it was before. Blocks.
    pub fn take_over(&self, destination: &str, by: &str) -> Result<String> {
        let env = self.environment();
        let message = check::take_over(&env, self.destination(&env.config, destination)?)?;
        tracing::warn!(destination, by, "{message}");
        Ok(message)
    }

    /// The job and those of its destinations that are meant.
    fn job_at<'c>(&self, config: &'c Config, job: &str, destination: Option<&str>) -> Result<(&'c Job, Vec<&'c Destination>)> {
        let found = job_named(config, job)?;
        if let Some(name) = destination.filter(|d| !found.destinations.iter().any(|n| n == d)) {
            let text = format!("job {job} does not back up to '{name}'; its destinations are: {}", found.destinations.join(", "));
            return Err(Error::NotFound { what: "destination", name: name.into(), text });
        }
        let names = found.destinations.iter().filter(|n| destination.is_none_or(|d| d == *n));
        Ok((found, names.map(|n| self.destination(config, n)).collect::<Result<_>>()?))
    }

    /// What a job's retention, or the `policy` given, would do at each of its destinations. `next`: when the job is due after a time.
    pub fn plan_retention(
        &self,
        job: &str,
        destination: Option<&str>,
        policy: Option<&Retention>,
        next: &dyn Fn(&Job, Timestamp) -> Option<Timestamp>,
    ) -> Result<Vec<RetentionPlan>> {
        let env = self.environment();
        let (job, targets) = self.job_at(&env.config, job, destination)?;
        targets.into_iter().map(|target| Ok(retain::plan(&env.ledger, job, target, policy, &|after| next(job, after))?)).collect()
    }

    /// Queues a run that confirms the job's retention and removes what it removes.
    pub fn start_retention(self: &Arc<Self>, job: &str, destination: Option<&str>, by: &str) -> Result<String> {
        self.start_cleanup(job, destination, by, true)
    }

    /// Where a changed retention would remove more than before and is held back, in words. What cannot be told is logged.
    pub fn held_back(&self) -> Vec<String> {
        let config = self.config.get();
        let mut notes = Vec::new();
        for job in config.jobs.values() {
            for target in job.destinations.iter().filter_map(|name| config.destinations.get(name)) {
                match retain::held_back(&self.ledger, job, target) {
                    Ok(note) => notes.extend(note),
                    Err(e) => tracing::warn!(job = %job.name, "what its retention would remove is not known: {e}"),
                }
            }
        }
        notes
    }

    /// Starts a cleanup of every job for which the last one is longer ago than `every` and that has something to clean up.
    pub fn start_due_cleanups(self: &Arc<Self>, every: Duration) -> Result<()> {
        let env = self.environment();
        for (name, job) in env.config.jobs.iter() {
            if !self.begin_if_due(&format!("cleanup of {name}"), every)? {
                continue;
            }
            for target in self.job_at(&env.config, name, None)?.1 {
                if retain::has_work(&env.ledger, job, target)? {
                    self.start_cleanup(name, Some(&target.name), "schedule", false)?;
                }
            }
        }
        Ok(())
    }

    fn start_cleanup(self: &Arc<Self>, job: &str, destination: Option<&str>, by: &str, is_confirmed: bool) -> Result<String> {
        let env = self.environment();
        let (job, targets) = self.job_at(&env.config, job, destination)?;
        let (job, targets): (Job, Vec<Destination>) = (job.clone(), targets.into_iter().cloned().collect());
        let work = Work {
            kind: RunKind::Retention,
            job: Some(job.name.clone()),
            destinations: targets.iter().map(|t| t.name.clone()).collect(),
            backup: None,
            by: by.into(),
            attempt: 1,
        };
        let runs = self.clone();
        self.start(work, move |live| {
            for target in &targets {
                live.step("opening the repository");
                let (repository, lease) = check::open_for_writing(&env, target, live)?;
                for problem in catalogue::sync(&repository, &target.name, &env.ledger)? {
                    live.message(Level::Warning, problem);
                }
                if is_confirmed {
                    retain::confirm(&env.ledger, &job, target)?;
                }
                retain::apply(&env, &job, target, &repository, &lease, live, &|name| runs.readers_gone(name))?;
            }
            Ok(Finish::Good)
        })
    }

    /// Keeps readers of a repository away while it lives; None when there are some just now.
    fn readers_gone(&self, destination: &str) -> Option<Box<dyn Send>> {
        let guard: OwnedRwLockWriteGuard<()> = self.locks(destination).readers.try_write_owned().ok()?;
        Some(Box::new(guard))
    }

    /// Streams entries into `out` (see `keepd_protocol::restore`); `paths` are `<source>[/<path>]`, none means all.
    pub async fn start_restore(
        self: &Arc<Self>,
        backup: &str,
        job: Option<&str>,
        paths: Vec<Vec<u8>>,
        out: OwnedFd,
        by: &str,
    ) -> Result<RestoreStarted> {
        let found = self.resolve(backup, job)?;
        let (repository, manifest, destination) = self.open_backup_async(found.clone()).await?;
        let (entries, bytes) = (manifest.entries(), manifest.bytes());
        super::selection::Selection::new(&manifest, &paths).map_err(|text| Error::NotFound { what: "path", name: String::new(), text })?;
        let whole = paths.is_empty();
        let work = Work { backup: Some(found.id.clone()), ..Work::on(RunKind::Restore, &destination, by) };
        let (runs, id) = (self.clone(), found.id.clone());
        let run = self.start(work, move |live| {
            if whole {
                live.set_total(bytes);
            }
            live.step("restoring");
            let mut tried = vec![destination.clone()];
            let reading = runs.keep_readable(&destination);
            let place = restore::Place { repository, manifest, destination, _reading: reading };
            restore::stream(place, &mut || runs.another_place(&found, &mut tried), &paths, out, live)
        })?;
        Ok(RestoreStarted { run, backup: id, entries, bytes })
    }

    /// Writes one file's contents into `out`; returns the run and the size.
    pub async fn start_cat(
        self: &Arc<Self>,
        backup: &str,
        job: Option<&str>,
        path: Vec<u8>,
        out: OwnedFd,
        by: &str,
    ) -> Result<(String, u64)> {
        let found = self.resolve(backup, job)?;
        let (repository, manifest, destination) = self.open_backup_async(found.clone()).await?;
        let looked = {
            let (repository, manifest, path) = (repository.clone(), manifest.clone(), path.clone());
            let name = String::from_utf8_lossy(&path).into_owned();
            let find = move || restore::find_file(&repository, &manifest, &path);
            let found = tokio::task::spawn_blocking(find).await.map_err(|e| Error::Failed(e.to_string()))?;
            found.map_err(|e| Error::NotFound { what: "path", name, text: e.to_string() })?
        };
        let size = looked.size;
        let work = Work { backup: Some(found.id.clone()), ..Work::on(RunKind::Cat, &destination, by) };
        let runs = self.clone();
        let run = self.start(work, move |live| {
            live.set_total(size);
            live.step("reading");
            let mut tried = vec![destination.clone()];
            let reading = runs.keep_readable(&destination);
            let place = restore::Place { repository, manifest, destination, _reading: reading };
            restore::cat(place, &mut || runs.another_place(&found, &mut tried), &path, &looked, out, live)
        })?;
        Ok((run, size))
    }

    /// The entries at or below a path, in batches; the receiver ends with the list, an error is its last item.
    pub fn list_entries(
        self: &Arc<Self>,
        backup: &str,
        job: Option<&str>,
        path: Option<Vec<u8>>,
        recursive: bool,
    ) -> Result<mpsc::Receiver<Result<Vec<EntryInfo>>>> {
        let found = self.resolve(backup, job)?;
        let runs = self.clone();
        Ok(self.answer(move |emit| {
            let (repository, manifest, destination) = runs.open_backup(&found)?;
            let readers = runs.locks(&destination).readers;
            let _reading = readers.blocking_read();
            Ok(browse::list(&repository, &manifest, path, recursive, emit)?)
        }))
    }

    /// What differs between two backups, in batches.
    pub fn diff(self: &Arc<Self>, a: &str, b: &str, job: Option<&str>) -> Result<mpsc::Receiver<Result<Vec<Change>>>> {
        let (a, b) = (self.resolve(a, job)?, self.resolve(b, job)?);
        let runs = self.clone();
        Ok(self.answer(move |emit| {
            let (left, right) = (runs.open_backup(&a)?, runs.open_backup(&b)?);
            let left_side = browse::Side { repository: &left.0, manifest: &left.1 };
            let right_side = browse::Side { repository: &right.0, manifest: &right.1 };
            Ok(browse::diff(&left_side, &right_side, emit)?)
        }))
    }

    /// Runs a question on a blocking thread; its answers come through a bounded channel.
    fn answer<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut dyn FnMut(Vec<T>) -> bool) -> Result<()> + Send + 'static,
    ) -> mpsc::Receiver<Result<Vec<T>>> {
        let (sender, receiver) = mpsc::channel(4);
        self.runtime.spawn_blocking(move || {
            let mut emit = |batch: Vec<T>| batch.is_empty() || sender.blocking_send(Ok(batch)).is_ok();
            if let Err(e) = work(&mut emit) {
                let _ = sender.blocking_send(Err(e));
            }
        });
        receiver
    }

    /// The run as it changes; its sender is dropped when the run has finished. Runs that ended are in the ledger.
    pub fn follow(&self, run: &str) -> Option<watch::Receiver<Arc<Run>>> {
        lock(&self.live).get(run).map(|live| live.follow())
    }

    /// Asks a run to stop at its next safe point; false when no such run is queued or running.
    pub fn cancel(&self, run: &str) -> bool {
        let live = lock(&self.live).get(run).cloned();
        live.map(|live| live.cancel.cancel()).is_some()
    }

    /// What is queued or running now, oldest first.
    pub fn active(&self) -> Vec<Arc<Run>> {
        lock(&self.live).values().map(|live| Arc::new(live.snapshot())).collect()
    }

    /// A backup by id, unique prefix, or `latest`.
    pub fn resolve(&self, backup: &str, job: Option<&str>) -> Result<Backup> {
        let absent = |text: String| Error::NotFound { what: "backup", name: backup.to_owned(), text };
        if backup == "latest" {
            let of = job.map(|j| format!(" of job {j}")).unwrap_or_default();
            return self.ledger.latest(job)?.ok_or_else(|| absent(format!("there is no good backup{of} yet")));
        }
        let hex = !backup.is_empty() && backup.len() <= 64 && backup.bytes().all(|b| b.is_ascii_hexdigit());
        if !hex {
            return Err(absent(format!(
                "'{backup}' is no backup: give an id as 'keepctl list' shows it, a unique start of one, or 'latest'"
            )));
        }
        let mut found = self.ledger.backups_by_prefix(&backup.to_ascii_lowercase(), job)?;
        match found.len() {
            0 => Err(absent(format!("there is no backup whose id starts with {backup}; 'keepctl list' shows what there is"))),
            1 => Ok(found.remove(0)),
            _ => Err(Error::Ambiguous(format!("several backups' ids start with {backup}; give more of it"))),
        }
    }

    pub fn backup_detail(&self, backup: &str, job: Option<&str>) -> Result<BackupDetail> {
        let found = self.resolve(backup, job)?;
        let mut detail = self.ledger.backup_detail(&found.id)?.ok_or_else(|| Error::NotFound {
            what: "backup",
            name: found.id.clone(),
            text: format!("backup {} is gone", found.id),
        })?;
        detail.backup = found;
        Ok(detail)
    }

    fn open_backup(&self, backup: &Backup) -> Result<(Arc<Repository>, Manifest, String)> {
        self.open_backup_beside(backup, &[])
    }

    /// A place of a backup that was not tried yet; it is noted as tried.
    fn another_place(&self, backup: &Backup, tried: &mut Vec<String>) -> Option<restore::Place> {
        let opened = self.open_backup_beside(backup, tried);
        let (repository, manifest, destination) = opened.map_err(|e| tracing::warn!("no other copy can be read: {e}")).ok()?;
        tried.push(destination.clone());
        let reading = self.keep_readable(&destination);
        Some(restore::Place { repository, manifest, destination, _reading: reading })
    }

    /// Opens a backup at the best place that is not among `tried`.
    fn open_backup_beside(&self, backup: &Backup, tried: &[String]) -> Result<(Arc<Repository>, Manifest, String)> {
        let env = self.environment();
        let mut errors = Vec::new();
        for target in destination::best_first(&env.config, backup).into_iter().filter(|d| !tried.contains(&d.name)) {
            let opened = destination::open(&env.config, target, &env.ledger, &self.runtime, false).and_then(|repository| {
                for problem in repository.sync_index()? {
                    tracing::warn!("{problem}");
                }
                let manifest = repository.read_manifest(&catalogue::object(&env.ledger, &target.name, &backup.id)?)?;
                Ok((repository, manifest))
            });
            match opened {
                Ok((repository, manifest)) => return Ok((repository, manifest, target.name.clone())),
                Err(e) => errors.push(e.to_string()),
            }
        }
        if errors.is_empty() {
            let names = backup.destinations.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(", ");
            errors.push(format!("its destinations ({names}) are no longer configured"));
        }
        Err(Error::Failed(format!("backup {} cannot be opened: {}", super::backup::short(&backup.id), errors.join("; "))))
    }

    async fn open_backup_async(self: &Arc<Self>, backup: Backup) -> Result<(Arc<Repository>, Manifest, String)> {
        let runs = self.clone();
        tokio::task::spawn_blocking(move || runs.open_backup(&backup)).await.map_err(|e| Error::Failed(e.to_string()))?
    }

    pub fn destinations(&self) -> Vec<DestinationStatus> {
        let config = self.config.get();
        let problems = lock(&self.problems).clone();
        let mut list = Vec::new();
        for (name, target) in &config.destinations {
            list.push(DestinationStatus {
                name: name.clone(),
                service: target.service.clone(),
                location: destination::location(target),
                encryption: target.encryption.clone().unwrap_or_else(|| "none".into()),
                compression: format!("{:?}", target.compression).to_lowercase(),
                backups: self.ledger.count_backups(name).unwrap_or_default(),
                last_good: self.ledger.last_good(None, Some(name)).ok().flatten().map(|t| t.to_string()),
                error: problems.get(name).map(|(_, text)| text.clone()),
                missing: self.missing_at(&config, target),
                overdue: self.overdue_at(&config, target),
                traffic: destination::traffic(target),
            });
        }
        list
    }

    /// By job, how many backups a destination lacks.
    fn missing_at(&self, config: &Config, target: &Destination) -> BTreeMap<String, u64> {
        let jobs = config.jobs.values().filter(|job| job.destinations.contains(&target.name));
        let count = |job: &Job| copy::missing(&self.ledger, config, job, target).map_or(0, |missing| missing.len() as u64);
        jobs.map(|job| (job.name.clone(), count(job))).filter(|(_, count)| *count > 0).collect()
    }

    /// The jobs whose newest good backup at a destination is older than the destination's `max_age`.
    fn overdue_at(&self, config: &Config, target: &Destination) -> Vec<String> {
        let Some(max_age) = target.max_age else { return Vec::new() };
        let too_old = |job: &&Job| {
            let last = self.ledger.last_good(Some(&job.name), Some(&target.name)).ok().flatten();
            last.is_none_or(|t| Timestamp::now().duration_since(t).unsigned_abs() > max_age)
        };
        let jobs = config.jobs.values().filter(|job| job.enabled && job.destinations.contains(&target.name));
        jobs.filter(too_old).map(|job| job.name.clone()).collect()
    }

    /// Brings the catalogue of every destination up to date with its repository, in the background, at start.
    pub fn sync_catalogue(self: &Arc<Self>) {
        let runs = self.clone();
        self.runtime.spawn_blocking(move || {
            let env = runs.environment();
            for (name, target) in &env.config.destinations {
                let synced = destination::open(&env.config, target, &env.ledger, &runs.runtime, false)
                    .and_then(|repository| catalogue::sync(&repository, name, &env.ledger));
                match synced {
                    Ok(problems) => problems.iter().for_each(|p| tracing::warn!(destination = %name, "{p}")),
                    // A destination that nothing was backed up to yet is no problem.
                    Err(e) if e.to_string().contains("nothing was backed up to it yet") => {}
                    Err(e) => {
                        tracing::warn!(destination = %name, "the catalogue could not be brought up to date: {e}");
                        lock(&runs.problems).insert(name.clone(), (RunKind::Backup, e.to_string()));
                    }
                }
            }
            runs.start_all_missing_copies("schedule");
        });
    }

    /// Starts nothing more, asks all runs to stop at a safe point, and returns when they have (or `limit` is over: false).
    pub async fn shutdown(&self, limit: Duration) -> bool {
        self.stopping.store(true, Ordering::Release);
        lock(&self.live).values().for_each(|live| live.cancel.cancel());
        let deadline = tokio::time::Instant::now() + limit;
        while !lock(&self.live).is_empty() {
            if tokio::time::Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        true
    }

    /// `20261121T021500-3f9a`: time and a random part, so ids sort by time and are never used twice.
    fn next_id(&self) -> Result<String> {
        let random: [u8; 3] = crypto::random().map_err(|e| Error::Failed(e.to_string()))?;
        let time = Timestamp::now().strftime("%Y%m%dT%H%M%S").to_string();
        let mut counter = lock(&self.counter);
        counter.1 = if counter.0 == time { counter.1 + 1 } else { 0 };
        counter.0.clone_from(&time);
        Ok(format!("{time}-{:02}{}", counter.1 % 100, data_encoding::HEXLOWER.encode(&random)))
    }

    fn start(self: &Arc<Self>, work: Work, body: impl FnOnce(&LiveRun) -> Result<Finish, Failure> + Send + 'static) -> Result<String> {
        if self.stopping.load(Ordering::Acquire) {
            return Err(Error::ShuttingDown);
        }
        let run = Run {
            id: self.next_id()?,
            kind: work.kind,
            state: RunState::Queued,
            job: work.job.clone(),
            destination: work.destinations.first().cloned(),
            backup: work.backup.clone(),
            queued: Timestamp::now().to_string(),
            attempt: work.attempt,
            by: work.by.clone(),
            ..Run::default()
        };
        let live = {
            let mut all = lock(&self.live);
            let is_copy = work.kind == RunKind::Copy;
            let in_its_way = |r: &Run| match is_copy {
                true => r.kind == RunKind::Copy && r.destination.as_ref() == work.destinations.first(),
                false => r.kind == RunKind::Backup,
            };
            if let Some(job) = &work.job
                && let Some(other) =
                    all.values().map(|l| l.snapshot()).find(|r| in_its_way(r) && r.job.as_ref() == Some(job) && !r.state.is_finished())
            {
                let what = if is_copy { format!("a copy of job {job}") } else { format!("job {job}") };
                return Err(Error::Busy(format!("{what} is {} already (run {}); a job never overlaps itself", other.state, other.id)));
            }
            if all.len() >= MAX_LIVE {
                return Err(Error::Busy(format!("{MAX_LIVE} runs are queued or running already; try later")));
            }
            let live = Arc::new(LiveRun::new(run.clone(), self.events.clone()));
            all.insert(run.id.clone(), live.clone());
            live
        };
        if let Err(e) = self.ledger.save_run(&run) {
            lock(&self.live).remove(&run.id);
            return Err(e.into());
        }
        let runs = self.clone();
        self.runtime.spawn(async move { runs.carry_out(work, live, body).await });
        Ok(run.id)
    }

    async fn carry_out(
        self: Arc<Self>,
        work: Work,
        live: Arc<LiveRun>,
        body: impl FnOnce(&LiveRun) -> Result<Finish, Failure> + Send + 'static,
    ) {
        // A backup waits for the destination it goes to itself.
        let writes = matches!(work.kind, RunKind::Copy | RunKind::Prune | RunKind::Delete | RunKind::Retention);
        let prepare = async {
            // Always in the order of the names, so that two runs never wait for each other.
            let mut names = work.destinations.clone();
            names.sort();
            let mut writers = Vec::new();
            for name in names.iter().filter(|_| writes) {
                writers.push(self.locks(name).writer.lock_owned().await);
            }
            let places = match work.kind {
                RunKind::Backup => Some(self.places.clone()),
                RunKind::Copy => Some(self.copy_places.clone()),
                _ => None,
            };
            let place = match places {
                Some(places) => places.acquire_owned().await.ok(),
                None => None,
            };
            (writers, place)
        };
        let held = tokio::select! {
            held = prepare => Some(held),
            () = live.cancel.cancelled() => None,
        };
        let result = match &held {
            None => Err(Failure::Cancelled),
            Some(_) => {
                live.begin();
                let _ = self.save(&live.snapshot()).await;
                let ticking = self.tick(live.clone());
                let worker = live.clone();
                let done = tokio::task::spawn_blocking(move || {
                    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(&worker))).unwrap_or_else(|_| {
                        Err(Failure::Failed("an internal error (a panic, see the log); nothing was committed by it".into()))
                    })
                })
                .await;
                ticking.abort();
                done.unwrap_or_else(|e| Err(Failure::Failed(e.to_string())))
            }
        };
        drop(held);
        let run = live.end(result);
        self.tell(&run);
        if let Err(e) = self.save(&run).await {
            tracing::error!(run = %run.id, "the end of the run could not be written down: {e}");
        }
        lock(&self.live).remove(&run.id);
        self.runtime.spawn_blocking(super::memory::give_back);
        if let Some(told) = lock(&self.on_finish).as_ref() {
            told(&run);
        }
    }

    fn tick(self: &Arc<Self>, live: Arc<LiveRun>) -> tokio::task::JoinHandle<()> {
        self.runtime.spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(250)).await;
                live.tick();
            }
        })
    }

    async fn save(&self, run: &Run) -> Result<()> {
        let (ledger, run) = (self.ledger.clone(), run.clone());
        let saved = tokio::task::spawn_blocking(move || {
            ledger.save_run(&run)?;
            if run.state.is_finished() { ledger.trim_runs(KEEP_RUNS) } else { Ok(()) }
        });
        Ok(saved.await.map_err(|e| Error::Failed(e.to_string()))??)
    }

    fn tell(&self, run: &Run) {
        let (job, id, state) = (run.job.as_deref().unwrap_or("-"), &run.id, run.state);
        for message in run.messages.iter().filter(|m| m.level != Level::Info) {
            tracing::warn!(job, run = %id, "{}", message.text);
        }
        match &run.error {
            None => {
                tracing::info!(job, run = %id, kind = %run.kind, state = %state, bytes = run.progress.bytes, added = run.progress.added_bytes, "run finished")
            }
            Some(error) => tracing::error!(job, run = %id, kind = %run.kind, state = %state, "run failed: {error}"),
        }
        if let Some(destination) = &run.destination {
            let mut problems = lock(&self.problems);
            // Damage is forgotten when a check found none, other trouble when anything went well.
            let damaged = problems.get(destination).is_some_and(|(kind, _)| *kind == RunKind::Check);
            match (&run.error, run.state) {
                (Some(error), RunState::Failed) if run.kind == RunKind::Check || error.contains(destination.as_str()) => {
                    drop(problems.insert(destination.clone(), (run.kind, error.clone())))
                }
                (None, RunState::Good) if !damaged || run.kind == RunKind::Check => drop(problems.remove(destination)),
                _ => {}
            }
        }
    }
}

fn job_named<'c>(config: &'c Config, name: &str) -> Result<&'c Job> {
    config.jobs.get(name).ok_or_else(|| {
        let known = config.jobs.keys().cloned().collect::<Vec<_>>().join(", ");
        Error::NotFound { what: "job", name: name.into(), text: format!("there is no job '{name}'; configured are: {known}") }
    })
}

impl Work {
    fn on(kind: RunKind, destination: &str, by: &str) -> Self {
        Self { kind, job: None, destinations: vec![destination.into()], backup: None, by: by.into(), attempt: 1 }
    }
}
