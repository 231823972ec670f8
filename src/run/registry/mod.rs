//! The registry of runs: starts them, knows which live, and keeps them out of each other's way.

pub(super) mod audit;
mod config_backups;
mod configuration;
mod drills;
mod editing;
mod imports;
mod keys;
mod questions;
mod starts;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use keepd_protocol::model::{BackupType, Event, Level, Run, RunKind, RunState};
use tokio::runtime::Handle;
use tokio::sync::{OwnedRwLockWriteGuard, RwLock, Semaphore, broadcast, watch};

pub use self::drills::DrillStarted;
use super::backup::Environment;
use super::import;
use super::live::{Failure, Finish, LiveRun};
use crate::access::{By, Judge, Refusal};
use crate::config::{self, Config, Destination, Job};
use crate::crypto::{self, Lent};
use crate::ledger::Ledger;

/// Finished runs kept in the ledger.
const KEEP_RUNS: u32 = 5000;
/// Runs that may be queued or running at once, of all kinds.
const MAX_LIVE: usize = 64;
/// Of these, for all users but root together: the others stay for root, the schedule and what follows by itself.
const MAX_OF_USERS: usize = 32;

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
    #[error("{}", .0.text)]
    NotPermitted(Refusal),
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

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Error::NotPermitted(refusal)
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
    pub description: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub by: By,
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
    /// What runs want for themselves: databases, services.
    alone: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Copies have places of their own: a slow destination must not keep backups waiting.
    copy_places: Arc<Semaphore>,
    /// Jobs and destinations whose copies failed and are tried again later.
    copies_again: Mutex<HashSet<(String, String)>>,
    stopping: AtomicBool,
    counter: Mutex<(String, u32)>,
    on_finish: Mutex<Option<OnFinish>>,
    on_stopped: Mutex<Option<OnFinish>>,
    /// What was wrong with a destination last, and what kind of run saw it.
    problems: Mutex<HashMap<String, (RunKind, String)>>,
    imports: import::Desk,
    /// Held while the configuration is changed.
    config_changes: Mutex<()>,
    judge: Arc<Judge>,
    /// Who edited it last.
    last_edit: Mutex<Option<editing::LastEdit>>,
    /// There may be a nearer deadline of an import.
    deadlines: tokio::sync::Notify,
    /// Runs whose end is not in the audit log yet.
    unwritten: AtomicUsize,
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
    by: By,
    attempt: u32,
    /// What no other run may work on meanwhile: it waits.
    alone: Vec<String>,
}

impl Runs {
    /// To be called inside the async runtime.
    pub fn new(config: Arc<config::Current>, ledger: Arc<Ledger>, events: broadcast::Sender<Event>) -> Arc<Self> {
        let places = || Arc::new(Semaphore::new(config.get().daemon.max_parallel_runs.max(1)));
        let (places, copy_places) = (places(), places());
        let imports = import::Desk::new(config.get().daemon.state_dir.join("imports"), events.clone());
        let judge = Judge::new(config.clone());
        Arc::new(Self {
            config,
            judge,
            ledger,
            events,
            runtime: Handle::current(),
            live: Mutex::default(),
            locks: Mutex::default(),
            places,
            copy_places,
            copies_again: Mutex::default(),
            alone: Mutex::default(),
            stopping: AtomicBool::new(false),
            counter: Mutex::default(),
            on_finish: Mutex::default(),
            on_stopped: Mutex::default(),
            problems: Mutex::default(),
            imports,
            config_changes: Mutex::default(),
            last_edit: Mutex::default(),
            deadlines: tokio::sync::Notify::new(),
            unwritten: AtomicUsize::new(0),
        })
    }

    /// Who is told of every run that ended (the schedule).
    pub fn set_on_finish(&self, told: impl Fn(&Run) + Send + Sync + 'static) {
        *lock(&self.on_finish) = Some(Box::new(told));
    }

    /// Who is told of every run of the schedule that does not end by itself because keepd does.
    pub fn set_on_stopped(&self, told: impl Fn(&Run) + Send + Sync + 'static) {
        *lock(&self.on_stopped) = Some(Box::new(told));
    }

    /// Who may what.
    pub fn judge(&self) -> &Arc<Judge> {
        &self.judge
    }

    fn environment(&self) -> Environment {
        self.environment_with(Lent::default())
    }

    /// For a run that private keys are lent to.
    fn environment_with(&self, lent: Lent) -> Environment {
        Environment { config: self.config.get(), ledger: self.ledger.clone(), runtime: self.runtime.clone(), lent }
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

    /// Keeps a prune away from a destination while it lives.
    fn keep_readable(&self, destination: &str) -> Arc<dyn Send + Sync> {
        Arc::new(self.runtime.block_on(self.locks(destination).readers.read_owned()))
    }

    /// Whether something that is done every so often, and known by a note of the ledger, is due; it counts as begun then.
    fn begin_if_due(&self, note: &str, every: Duration) -> Result<bool> {
        let is_due = self.is_due(note, every)?;
        if is_due {
            self.ledger.set_note(note, &Timestamp::now().as_second().to_string())?;
        }
        Ok(is_due)
    }

    /// The same for what counts as done only when it was.
    fn is_due(&self, note: &str, every: Duration) -> Result<bool> {
        let last: i64 = self.ledger.note(note)?.and_then(|t| t.parse().ok()).unwrap_or(0);
        // A time in the future was written by a clock that was wrong.
        Ok(Timestamp::now().as_second().abs_diff(last) >= every.as_secs())
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

    /// Keeps readers of a repository away while it lives; None when there are some just now.
    fn readers_gone(&self, destination: &str) -> Option<Box<dyn Send>> {
        let guard: OwnedRwLockWriteGuard<()> = self.locks(destination).readers.try_write_owned().ok()?;
        Some(Box::new(guard))
    }

    /// The run as it changes; its sender is dropped when the run has finished. Runs that ended are in the ledger.
    pub fn follow(&self, run: &str) -> Option<watch::Receiver<Arc<Run>>> {
        lock(&self.live).get(run).map(|live| live.follow())
    }

    /// On whose behalf a run is queued or running; None when it is neither.
    pub fn owner(&self, run: &str) -> Option<By> {
        lock(&self.live).get(run).map(|live| live.by.clone())
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

    /// Starts nothing more, asks all runs to stop at a safe point, and returns when they have (or `limit` is over: false).
    pub async fn shutdown(&self, limit: Duration) -> bool {
        self.stopping.store(true, Ordering::Release);
        lock(&self.live).values().for_each(|live| live.stop());
        let deadline = tokio::time::Instant::now() + limit;
        while !lock(&self.live).is_empty() || self.unwritten.load(Ordering::Acquire) > 0 {
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

    /// Queues a run; returns its id, or of copies of a job that of the same run where that is queued.
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
            by: work.by.name().to_owned(),
            ..Run::default()
        };
        let live = {
            let mut all = lock(&self.live);
            let is_copy = work.kind == RunKind::Copy;
            let in_its_way = |l: &LiveRun, r: &Run, job: &str| match is_copy {
                // It makes its list when it begins, so what came until then is on it. One that began may lack the newest, and this one comes after it.
                true => {
                    let is_for_it = work.destinations.first().is_some_and(|target| is_copy_of(r, job, target));
                    is_for_it && r.state == RunState::Queued && !l.cancel.is_cancelled()
                }
                // A restore waits for the backup instead; a comparison or an import is in nobody's way.
                false => {
                    let is_its = r.kind == RunKind::Backup && r.job.as_deref() == Some(job) && !r.state.is_finished();
                    is_its && !matches!(work.kind, RunKind::Restore | RunKind::Compare | RunKind::Import)
                }
            };
            if let Some(job) = &work.job
                && let Some((_, other)) = all.values().map(|l| (l, l.snapshot())).find(|(l, r)| in_its_way(l, r, job))
            {
                if is_copy {
                    return Ok(other.id);
                }
                let text = format!("job {job} is {} already (run {}); a job never overlaps itself", other.state, other.id);
                return Err(Error::Busy(text));
            }
            if all.len() >= MAX_LIVE {
                return Err(Error::Busy(format!("{MAX_LIVE} runs are queued or running already; try later")));
            }
            let is_user = |by: &By| by.uid().is_some_and(|uid| uid != 0);
            if is_user(&work.by) && all.values().filter(|live| is_user(&live.by)).count() >= MAX_OF_USERS {
                let text = format!(
                    "{MAX_OF_USERS} runs of users are queued or running already, as many as keepd takes of all but root; try again when one has ended"
                );
                return Err(Error::Busy(text));
            }
            let of_user = |uid: u32| all.values().filter(|live| live.by.uid() == Some(uid)).count();
            let most = self.config.get().access.limits.runs;
            if let Some(uid) = work.by.uid().filter(|uid| *uid != 0)
                && of_user(uid) >= most
            {
                let text = format!(
                    "{} has {most} runs queued or running already, as many as access.limits.runs allows; try again when one has ended",
                    work.by.name()
                );
                return Err(Error::Busy(text));
            }
            let live = Arc::new(LiveRun::new(run.clone(), self.events.clone()).on_behalf_of(work.by.clone()));
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
        let writes = matches!(work.kind, RunKind::Copy | RunKind::Prune | RunKind::Delete | RunKind::Retention | RunKind::Key);
        let prepare = async {
            // Always in the order of the names, so that two runs never wait for each other.
            let mut names = work.destinations.clone();
            names.sort();
            let mut alone = work.alone.clone();
            alone.sort();
            alone.dedup();
            let mut writers = Vec::new();
            for name in alone {
                let one = lock(&self.alone).entry(name).or_default().clone();
                writers.push(one.lock_owned().await);
            }
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
        let permitted = match held {
            Some(_) => still_permitted(&work.by).await,
            None => Ok(()),
        };
        let result = match (&held, permitted) {
            (None, _) => Err(Failure::Cancelled),
            (Some(_), Err(refused)) => Err(refused),
            (Some(_), Ok(())) => {
                live.begin();
                let _ = self.save(&live.snapshot()).await;
                let ticking = self.tick(live.clone());
                let (worker, runs) = (live.clone(), self.clone());
                let done = tokio::task::spawn_blocking(move || {
                    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(&worker))).unwrap_or_else(|_| {
                        Err(Failure::Failed("an internal error (a panic, see the log); nothing was committed by it".into()))
                    });
                    if result.is_ok() {
                        runs.publish_heads(&audit::written_to(&work, &worker), &worker);
                    }
                    result
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
        self.audit_end(&run);
        if run.state == RunState::Cancelled
            && live.is_stopped()
            && run.by == By::schedule().name()
            && let Some(told) = lock(&self.on_stopped).as_ref()
        {
            // Before it is gone: then keepd ends.
            told(&run);
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
        if let Some(destination) = &run.destination {
            let mut problems = lock(&self.problems);
            // Damage is forgotten when a check found none, other trouble when anything went well.
            let damaged = problems.get(destination).is_some_and(|(kind, _)| *kind == RunKind::Check);
            match (&run.error, run.state) {
                // That a key is not removed, or an archive is refused, says nothing of the destination.
                (Some(_), RunState::Failed) if matches!(run.kind, RunKind::Key | RunKind::Import) => {}
                (Some(error), RunState::Failed) if run.kind == RunKind::Check || error.contains(destination.as_str()) => {
                    drop(problems.insert(destination.clone(), (run.kind, error.clone())))
                }
                (None, RunState::Good) if !damaged || run.kind == RunKind::Check => drop(problems.remove(destination)),
                _ => {}
            }
        }
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
    }
}

/// Asks again whether what was queued may be done: it may have waited for long.
async fn still_permitted(by: &By) -> Result<(), Failure> {
    if by.uid().is_none() {
        return Ok(());
    }
    let asked = by.clone();
    let answer = tokio::task::spawn_blocking(move || asked.ask_again()).await;
    let refused = |text: String| Failure::Failed(format!("the right to it was taken away before it began, and nothing was done: {text}"));
    match answer {
        Ok(answer) => answer.map_err(|refusal| refused(refusal.text)),
        Err(e) => Err(Failure::Failed(format!("whether it is permitted could not be found out: {e}"))),
    }
}

/// Whether a run copies what a destination lacks of a job.
fn is_copy_of(run: &Run, job: &str, target: &str) -> bool {
    run.kind == RunKind::Copy && run.job.as_deref() == Some(job) && run.destination.as_deref() == Some(target)
}

fn job_named<'c>(config: &'c Config, name: &str) -> Result<&'c Job> {
    config.jobs.get(name).ok_or_else(|| {
        let known = config.jobs.keys().cloned().collect::<Vec<_>>().join(", ");
        Error::NotFound { what: "job", name: name.into(), text: format!("there is no job '{name}'; configured are: {known}") }
    })
}

impl Work {
    fn on(kind: RunKind, destination: &str, by: &By) -> Self {
        Self { kind, job: None, destinations: vec![destination.into()], backup: None, by: by.clone(), attempt: 1, alone: Vec::new() }
    }
}
