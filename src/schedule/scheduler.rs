//! The loop: what is due next, started on time, once, also after a night off or a moved clock: jobs, and the backup of the configuration.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use keepd_protocol::model::{BackupType, ConfigBackupStatus, JobStatus, Run, RunKind, RunState};
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;

use super::clock::Clock;
use super::due::words;
use super::state::{AHEAD, CONFIG_BACKUP, Entry, again};
use crate::access::By;
use crate::config;
use crate::ledger::{Ledger, ScheduleState, Waiting};
use crate::run::{BackupRequest, Error};

/// Starts what is due; the registry of runs, or a stand-in of tests.
pub trait Starter: Send + Sync {
    fn start_backup(&self, request: BackupRequest) -> Result<String, Error>;
    /// Of the configuration.
    fn start_config_backup(&self, attempt: u32) -> Result<String, Error>;
    /// Whether a backup of a job, or of the configuration, is queued or running.
    fn is_running(&self, job: &str) -> bool;
}

impl Starter for Arc<crate::run::Runs> {
    fn start_backup(&self, request: BackupRequest) -> Result<String, Error> {
        crate::run::Runs::start_backup(self, request)
    }

    fn start_config_backup(&self, attempt: u32) -> Result<String, Error> {
        self.try_config_backup(&By::schedule(), attempt)
    }

    fn is_running(&self, job: &str) -> bool {
        let is_it = |run: &Arc<Run>| match run.kind {
            RunKind::Backup => run.job.as_deref() == Some(job) && !run.state.is_finished(),
            RunKind::ConfigBackup => job == CONFIG_BACKUP && !run.state.is_finished(),
            _ => false,
        };
        self.active().iter().any(is_it)
    }
}

/// Times that a job can be planned to run once at.
const MOST_ONCE: usize = 32;
/// Until one that could not be started is tried again.
const AGAIN: SignedDuration = SignedDuration::from_secs(60);
/// A start that fails again and again is tried at least this often.
const LONGEST_WAIT: SignedDuration = SignedDuration::from_hours(1);
/// Nor further ahead than ten years.
const FARTHEST: SignedDuration = SignedDuration::from_hours(24 * 3653);

pub struct Scheduler {
    config: Arc<config::Current>,
    ledger: Arc<Ledger>,
    starter: Arc<dyn Starter>,
    clock: Arc<dyn Clock>,
    wake: Notify,
    pings: Mutex<Vec<oneshot::Sender<()>>>,
    /// When the clock was looked at last.
    looked: Mutex<Option<Timestamp>>,
    /// The ledger could not be written: nothing is started before.
    blocked_until: Mutex<Option<Timestamp>>,
    machine: String,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Scheduler {
    pub fn new(config: Arc<config::Current>, ledger: Arc<Ledger>, starter: Arc<dyn Starter>, clock: Arc<dyn Clock>) -> Arc<Self> {
        let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
        let (wake, pings, looked, blocked_until) = Default::default();
        Arc::new(Self { config, ledger, starter, clock, wake, pings, looked, blocked_until, machine })
    }

    /// Starts what is due until cancelled.
    pub async fn run(&self, cancel: CancellationToken) {
        self.forget_removed();
        while !cancel.is_cancelled() {
            self.start_due();
            for ping in lock(&self.pings).drain(..) {
                let _ = ping.send(());
            }
            let next = self.wake_at();
            tokio::select! {
                () = self.clock.sleep_until(next) => {}
                () = self.wake.notified() => {}
                () = cancel.cancelled() => {}
            }
        }
    }

    /// The configuration changed: what is due may be something else now.
    pub fn config_changed(&self) {
        self.forget_removed();
        self.wake.notify_one();
    }

    /// A job that is not configured any more runs at none of the times that were planned for it, also when one of its name comes back.
    fn forget_removed(&self) {
        let config = self.config.get();
        let failed = |e| tracing::error!("the times of jobs that are gone cannot be forgotten: {e}");
        let states = match self.ledger.schedule_states() {
            Ok(states) => states,
            Err(e) => return failed(e),
        };
        let is_gone = |(job, state): &(&String, &ScheduleState)| {
            (!state.once.is_empty() || state.retry.is_some()) && Entry::all(&config).all(|entry| entry.key != job.as_str())
        };
        for (job, _) in states.iter().filter(is_gone) {
            if let Err(e) = self.ledger.change_schedule_state(job, |state| (state.once, state.retry) = Default::default()) {
                failed(e);
            }
        }
    }

    /// Has a job run at a time beside its schedule (`at`), or with `cancel` not any more (None: at none of them). Returns when it is to run.
    pub fn once(&self, job: &str, at: Option<Timestamp>, cancel: bool) -> Result<Vec<Timestamp>, Error> {
        let config = self.config.get();
        let Some(configured) = config.jobs.get(job) else {
            let known = config.jobs.keys().cloned().collect::<Vec<_>>().join(", ");
            let text = format!("there is no job '{job}'; configured are: {known}");
            return Err(Error::NotFound { what: "job", name: job.to_owned(), text });
        };
        let now = self.clock.now();
        let planned = |times: &[Timestamp]| match times {
            [] => "nothing is planned for it".to_owned(),
            times => format!("planned are {}", times.iter().map(Timestamp::to_string).collect::<Vec<_>>().join(", ")),
        };
        let failed = |why: String| Err(Error::Failed(format!("job {job} is not planned to run once: {why}")));
        match at {
            Some(at) if !cancel => {
                if !configured.enabled {
                    return failed(format!("it is disabled; 'keepctl job enable {job}' enables it"));
                }
                if at <= now {
                    return failed(format!("{at} is past; 'keepctl backup {job}' runs it now"));
                }
                if at.duration_since(now) > FARTHEST {
                    return failed(format!("{at} is more than ten years away"));
                }
            }
            None if !cancel => return failed("no time is given".into()),
            _ => {}
        }
        let entry = Entry::of_job(configured);
        let mut refused = None;
        let (_, state) = self.ledger.change_schedule_state(job, |state| {
            entry.settle(state, now);
            match at {
                Some(at) if cancel => match state.once.binary_search(&at) {
                    Ok(place) => drop(state.once.remove(place)),
                    Err(_) => refused = Some(format!("job {job} does not run once at {at}; {}", planned(&state.once))),
                },
                None => state.once.clear(),
                Some(at) => match state.once.binary_search(&at) {
                    Ok(_) => {}
                    Err(_) if state.once.len() >= MOST_ONCE => {
                        refused = Some(format!(
                            "job {job} has {MOST_ONCE} times planned already; 'keepctl job run-at {job} --cancel TIME' takes one away"
                        ));
                    }
                    Err(place) => state.once.insert(place, at),
                },
            }
        })?;
        self.wake.notify_one();
        refused.map_or(Ok(state.once), |text| Err(Error::Failed(text)))
    }

    /// Answered by the loop itself: a loop that hangs does not answer.
    pub fn ping(&self) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        lock(&self.pings).push(sender);
        self.wake.notify_one();
        receiver
    }

    /// What is due next, and when.
    pub fn next(&self) -> Option<(String, Timestamp)> {
        let config = self.config.get();
        Entry::all(&config).filter_map(|entry| Some((entry.key.to_owned(), self.next_start(&entry)?))).min_by_key(|(_, at)| *at)
    }

    /// When the loop looks again: also at a time that was planned for a job that is disabled now; not before the ledger is tried again.
    pub(super) fn wake_at(&self) -> Option<Timestamp> {
        let config = self.config.get();
        let now = self.clock.now();
        let disabled = Entry::all(&config).filter(|e| !e.enabled).filter_map(|e| self.state(&e, now).once.first().copied()).min();
        let next = [self.next().map(|(_, at)| at), disabled].into_iter().flatten().min();
        match *lock(&self.blocked_until) {
            Some(until) => Some(next.map_or(until, |next| next.max(until))),
            None => next,
        }
    }

    /// Starts everything whose time has come.
    pub fn start_due(&self) {
        let config = self.config.get();
        let now = self.clock.now();
        *lock(&self.blocked_until) = None;
        let leapt = lock(&self.looked).replace(now).is_none_or(|last| now.duration_since(last) > AHEAD);
        for entry in Entry::all(&config) {
            if leapt {
                self.change(&entry, now, |state| entry.leapt(state, now));
            }
            if !entry.enabled {
                self.pass_over(&entry, now);
            } else if self.next_start(&entry).is_some_and(|at| at <= now) {
                self.start_entry(&entry, now);
            }
        }
    }

    fn start_entry(&self, entry: &Entry<'_>, now: Timestamp) {
        let key = entry.key;
        let due_with_jitter = |due: Timestamp| due.checked_add(self.jitter(entry)).is_ok_and(|at| at <= now);
        let attempt_of = |state: &ScheduleState| state.retry.as_ref().filter(|retry| retry.at <= now).map_or(1, |retry| retry.attempt);
        let noted = self.change(entry, now, |state| {
            // A time that was asked for does not draw the schedule's own ahead of its jitter.
            if let Some(due) = entry.missed(state, now)
                && (state.once.is_empty() || entry.next(state, now).is_some_and(due_with_jitter))
            {
                state.last_due = Some(due);
            }
            state.once.retain(|at| *at > now);
            // Should keepd end before the run is written down, the next start begins it.
            state.retry = again(now, AGAIN, attempt_of(state));
        });
        let Some((before, _)) = noted else {
            // Without it the same time would be due again and again. It is not lost: it is owed until it can be written down.
            tracing::error!(job = %key, "its time has come, and it is not started before that can be written down; it is tried again in a minute");
            return;
        };
        let attempt = attempt_of(&before);
        let asked: Vec<Timestamp> = before.once.iter().copied().filter(|at| *at <= now).collect();
        let started = self.start(key, attempt);
        let is_covered = matches!(started, Err(Error::Busy(_)));
        let noted = again(now, AGAIN, attempt);
        self.change(entry, now, |state| {
            // A run that failed meanwhile left another one.
            state.retry.take_if(|retry| Some(&*retry) == noted.as_ref());
        });
        match started {
            Ok(run) => tracing::info!(job = %key, run, attempt, "started by the schedule"),
            Err(Error::ShuttingDown) => {
                // The next start of keepd owes it.
                self.change(entry, now, |state| {
                    state.last_due = before.last_due;
                    state.retry = before.retry.clone();
                    plan(&mut state.once, &asked);
                });
            }
            // Other than the schedule's, a time that was asked for comes once.
            Err(e) if !asked.is_empty() && (!is_covered || !self.starter.is_running(key)) => {
                tracing::error!(job = %key, "it was to run once now, and could not be started: {e}; it is tried again in a minute");
                self.change(entry, now, |state| plan(&mut state.once, &now.checked_add(AGAIN).into_iter().collect::<Vec<_>>()));
            }
            Err(Error::Busy(text)) if self.starter.is_running(key) => {
                tracing::warn!(job = %key, "its time has come, but {text}; this one counts as covered");
            }
            Err(e) => {
                // Room for another run may be there at any moment; what else is wrong may last.
                let wait = match e {
                    Error::Busy(_) => AGAIN,
                    _ => longer(before.retry.as_ref(), entry.retry.backoff),
                };
                tracing::error!(job = %key, "its time has come, but it could not be started: {e}; it is tried again in {} minutes", wait.as_mins());
                self.change(entry, now, |state| state.retry = again(now, wait, attempt));
            }
        }
    }

    fn start(&self, key: &str, attempt: u32) -> Result<String, Error> {
        if key == CONFIG_BACKUP {
            return self.starter.start_config_backup(attempt);
        }
        self.starter.start_backup(BackupRequest {
            job: key.to_owned(),
            r#type: BackupType::Scheduled,
            by: By::schedule(),
            attempt,
            ..BackupRequest::default()
        })
    }

    /// When it starts next; in the past when it should have started already.
    fn next_start(&self, entry: &Entry<'_>) -> Option<Timestamp> {
        if !entry.enabled {
            return None;
        }
        let now = self.clock.now();
        let state = self.state(entry, now);
        let retry = state.retry.as_ref().map(|retry| retry.at);
        let due = entry.next(&state, now).and_then(|due| due.checked_add(self.jitter(entry)).ok());
        [retry, due, state.once.first().copied()].into_iter().flatten().min()
    }

    /// The times that were planned for a disabled job pass.
    fn pass_over(&self, entry: &Entry<'_>, now: Timestamp) {
        if self.state(entry, now).once.first().is_some_and(|at| *at <= now) {
            tracing::warn!(job = %entry.key, "it was to run once now, and is disabled: it does not run");
            self.change(entry, now, |state| state.once.retain(|at| *at > now));
        }
    }

    /// The ledger's state, begun anew where the schedule is another one.
    fn state(&self, entry: &Entry<'_>, now: Timestamp) -> ScheduleState {
        if let Some((_, state)) = self.change(entry, now, |_| ()) {
            return state;
        }
        // What can be read and not be written down is true all the same.
        let mut state = self.ledger.schedule_state(entry.key).unwrap_or_default();
        entry.settle(&mut state, now);
        state
    }

    /// The same, changed. What it was, and what it is; None when that cannot be kept, so that nothing came of it.
    fn change(&self, entry: &Entry<'_>, now: Timestamp, change: impl FnOnce(&mut ScheduleState)) -> Option<(ScheduleState, ScheduleState)> {
        let mut before = None;
        let changed = self.ledger.change_schedule_state(entry.key, |state| {
            entry.settle(state, now);
            before = Some(state.clone());
            change(state);
        });
        match changed {
            Ok((_, state)) => Some((before.unwrap_or_default(), state)),
            Err(e) => {
                if lock(&self.blocked_until).is_none() {
                    tracing::error!(job = %entry.key, "the state of the schedule cannot be kept, and nothing is started by it until it can: {e}");
                }
                *lock(&self.blocked_until) = now.checked_add(AGAIN).ok();
                None
            }
        }
    }

    /// A fixed part of the jitter, the same in every run, another on every machine.
    fn jitter(&self, entry: &Entry<'_>) -> SignedDuration {
        let range = entry.jitter.as_secs();
        if range == 0 {
            return SignedDuration::ZERO;
        }
        let hash = blake3::hash(format!("{}\0{}", self.machine.trim(), entry.key).as_bytes());
        let number = u64::from_le_bytes(*hash.as_bytes().first_chunk().unwrap_or(&[0; 8]));
        SignedDuration::from_secs((number % range) as i64)
    }

    /// To be told of every run that ended: counts, and plans a retry.
    pub fn job_finished(&self, run: &Run) {
        let config = self.config.get();
        let Some(entry) = Entry::of_run(run, &config) else { return };
        let key = entry.key;
        let now = self.clock.now();
        let retry = (run.state == RunState::Failed && run.attempt < entry.retry.attempts).then(|| {
            let factor = 1u32 << (run.attempt.saturating_sub(1)).min(16);
            let wait = SignedDuration::try_from(entry.retry.backoff.saturating_mul(factor)).unwrap_or(SignedDuration::from_hours(1));
            again(now, wait, run.attempt + 1)
        });
        let retry = retry.flatten();
        if let Some(retry) = &retry {
            tracing::info!(job = %key, attempt = retry.attempt, "tried again at {}", retry.at);
        }
        self.change(&entry, now, |state| {
            state.last_run = Some(run.id.clone());
            state.last_start = run.started.as_ref().and_then(|s| s.parse().ok());
            match run.state {
                RunState::Good | RunState::Partial => {
                    state.runs_good += 1;
                    state.last_good = Some(now);
                    state.retry = None;
                }
                RunState::Failed => {
                    state.runs_failed += 1;
                    state.retry = retry.clone();
                }
                _ => {}
            }
        });
        self.wake.notify_one();
    }

    /// To be told of a run of the schedule that was stopped because keepd ends: the next start of keepd begins it anew.
    pub fn job_stopped(&self, run: &Run) {
        let config = self.config.get();
        let Some(entry) = Entry::of_run(run, &config) else { return };
        let now = self.clock.now();
        self.change(&entry, now, |state| state.retry = again(now, SignedDuration::ZERO, run.attempt));
    }

    /// What `keepctl status` shows of the backup of the configuration; None where none is configured.
    pub fn config_backup_status(&self) -> Option<ConfigBackupStatus> {
        let config = self.config.get();
        let entry = Entry::of_config(&config)?;
        let state = self.state(&entry, self.clock.now());
        let last_run = state.last_run.as_ref().and_then(|id| self.ledger.run(id).ok().flatten());
        Some(ConfigBackupStatus {
            destination: config.config_backup.as_ref().map(|b| b.destination.clone()).unwrap_or_default(),
            schedule: words(entry.schedule),
            next: self.next_start(&entry).map(|t| t.to_string()),
            last_outcome: last_run.as_ref().map(|r| r.state),
            last_run: state.last_run,
            last_good: state.last_good.map(|t| t.to_string()),
        })
    }

    /// What `keepctl status` shows of a job.
    pub fn job_status(&self, name: &str) -> JobStatus {
        let config = self.config.get();
        let Some(job) = config.jobs.get(name) else { return JobStatus { name: name.into(), ..JobStatus::default() } };
        let now = self.clock.now();
        let entry = Entry::of_job(job);
        let state = self.state(&entry, now);
        let last_run = state.last_run.as_ref().and_then(|id| self.ledger.run(id).ok().flatten());
        // A backup that was good when it was made may have turned out to be worthless since. Where no backup is known (its destination did not answer
        // yet), what the schedule saw counts.
        let last_good = match self.ledger.has_backups(name) {
            Ok(true) => self.ledger.last_good(Some(name), &config.places()).ok().flatten(),
            // One from the future says nothing: a clock was wrong.
            _ => state.last_good.filter(|good| good.duration_since(now) <= AHEAD),
        };
        let (last_proven, recovery_seconds) = self.ledger.last_proven(name, &config.places()).unwrap_or_default();
        let since = last_good.or(state.first_seen).unwrap_or(now);
        let overdue =
            job.max_age.is_some_and(|age| now.duration_since(since) > SignedDuration::try_from(age).unwrap_or(SignedDuration::MAX));
        JobStatus {
            name: name.to_owned(),
            enabled: job.enabled,
            schedule: words(&job.schedule),
            next: self.next_start(&entry).map(|t| t.to_string()),
            last_start: state.last_start.map(|t| t.to_string()),
            last_outcome: last_run.as_ref().map(|r| r.state),
            last_run: state.last_run,
            last_good: last_good.map(|t| t.to_string()),
            last_proven: last_proven.map(|t| t.to_string()),
            overdue,
            max_age_seconds: job.max_age.as_ref().map(Duration::as_secs),
            running: None,
            runs_good: state.runs_good,
            runs_failed: state.runs_failed,
            recovery_seconds,
            paused_until: job.paused_until.filter(|until| now < *until).map(|t| t.to_string()),
            once: state.once.iter().map(Timestamp::to_string).collect(),
        }
    }
}

/// How long to wait after a start that failed: twice as long as the last time, at most an hour.
fn longer(before: Option<&Waiting>, backoff: Duration) -> SignedDuration {
    let first = SignedDuration::try_from(backoff).unwrap_or(LONGEST_WAIT);
    before.map_or(first, |waited| waited.at.duration_since(waited.since).saturating_mul(2)).clamp(AGAIN, LONGEST_WAIT)
}

/// Adds times to those that are planned.
fn plan(once: &mut Vec<Timestamp>, times: &[Timestamp]) {
    once.extend(times);
    once.sort_unstable();
    once.dedup();
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::config::{Config, ConfigBackup, Daemon, Destination, Job, Retention, Retry, Schedule};
    use std::path::Path;
    use std::pin::Pin;

    struct HandClock(Mutex<Timestamp>);

    impl Clock for HandClock {
        fn now(&self) -> Timestamp {
            *lock(&self.0)
        }
        fn sleep_until(&self, _: Option<Timestamp>) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
            Box::pin(std::future::pending())
        }
    }

    /// What was started; and why nothing can be, and whether the job runs.
    #[derive(Default)]
    struct Started(Mutex<Vec<(String, u32)>>, Mutex<Option<(Error, bool)>>);

    impl Starter for Started {
        fn start_backup(&self, request: BackupRequest) -> Result<String, Error> {
            if let Some((error, _)) = &*lock(&self.1) {
                return Err(error.clone());
            }
            lock(&self.0).push((request.job, request.attempt));
            Ok("run".into())
        }

        fn is_running(&self, _: &str) -> bool {
            lock(&self.1).as_ref().is_some_and(|(_, is_running)| *is_running)
        }

        fn start_config_backup(&self, attempt: u32) -> Result<String, Error> {
            lock(&self.0).push((CONFIG_BACKUP.into(), attempt));
            Ok("run".into())
        }
    }

    struct World {
        dir: tempfile::TempDir,
        clock: Arc<HandClock>,
        started: Arc<Started>,
        config: Arc<config::Current>,
        scheduler: Arc<Scheduler>,
    }

    pub(in crate::schedule) fn job(schedule: Schedule, zone: &str) -> Job {
        Job {
            name: "shop".into(),
            enabled: true,
            paused_until: None,
            schedule: Some(schedule),
            timezone: Some(zone.into()),
            jitter: Duration::ZERO,
            max_age: Some(Duration::from_secs(26 * 3600)),
            destinations: vec!["local".into()],
            retention: Retention::default(),
            suspect: Default::default(),
            retry: Retry { attempts: 3, backoff: Duration::from_secs(60) },
            sources: Vec::new(),
            services: Vec::new(),
            quiesce: Default::default(),
            hooks: Default::default(),
            health: None,
            version: None,
            schema_version: None,
            drill: Default::default(),
        }
    }

    /// With this job alone, and its state in `dir`.
    pub(in crate::schedule) fn config(job: Job, dir: &Path) -> Config {
        let daemon = Daemon { state_dir: dir.into(), socket: dir.join("s"), max_parallel_runs: 1, memory: 1 << 28 };
        let destination = Destination::plain("local", "fs", Default::default());
        Config {
            files: vec![],
            daemon,
            encryption: Default::default(),
            destinations: [("local".to_owned(), destination)].into(),
            jobs: [(job.name.clone(), job)].into(),
            coverage: Default::default(),
            config_backup: None,
            access: Default::default(),
            audit: Default::default(),
        }
    }

    fn world(job: Job, now: &str) -> World {
        let dir = tempfile::tempdir().unwrap();
        let config = Arc::new(config::Current::new(config(job, dir.path())));
        let clock = Arc::new(HandClock(Mutex::new(now.parse().unwrap())));
        let started = Arc::new(Started::default());
        let ledger = Arc::new(Ledger::open(dir.path()).unwrap());
        let scheduler = Scheduler::new(config.clone(), ledger, started.clone(), clock.clone());
        World { dir, clock, started, config, scheduler }
    }

    impl World {
        fn at(&self, time: &str) -> usize {
            self.to(time.parse().unwrap())
        }

        fn to(&self, time: Timestamp) -> usize {
            *lock(&self.clock.0) = time;
            let before = lock(&self.started.0).len();
            self.scheduler.start_due();
            lock(&self.started.0).len() - before
        }

        fn restart(&mut self) {
            let ledger = Arc::new(Ledger::open(self.dir.path()).unwrap());
            self.scheduler = Scheduler::new(self.config.clone(), ledger, self.started.clone(), self.clock.clone());
        }

        fn finish(&self, state: RunState, attempt: u32) {
            let run = Run {
                id: "run".into(),
                job: Some("shop".into()),
                state,
                attempt,
                started: Some(self.clock.now().to_string()),
                ..Run::default()
            };
            self.scheduler.job_finished(&run);
        }
    }

    #[test]
    fn due_once_caught_up_once() {
        let mut w = world(job(Schedule::Cron("30 2 * * *".into()), "UTC"), "2026-01-01T00:00:00Z");
        assert_eq!(w.at("2026-01-01T00:00:00Z"), 0);
        assert_eq!(w.at("2026-01-01T02:29:59Z"), 0);
        assert_eq!(w.at("2026-01-01T02:30:00Z"), 1);
        assert_eq!(w.at("2026-01-01T02:30:01Z"), 0);
        w.restart();
        assert_eq!(w.at("2026-01-01T12:00:00Z"), 0, "a restart repeats nothing");
        w.restart();
        assert_eq!(w.at("2026-01-09T12:00:00Z"), 1, "eight missed nights are one run");
        assert_eq!(w.at("2026-01-09T12:00:01Z"), 0);
        assert_eq!(w.scheduler.next().unwrap().1.to_string(), "2026-01-10T02:30:00Z");
    }

    #[test]
    fn a_clock_that_jumps_neither_repeats_nor_stops_the_schedule() {
        let w = world(job(Schedule::Cron("30 2 * * *".into()), "UTC"), "2026-01-01T00:00:00Z");
        assert_eq!(w.at("2026-01-01T00:00:00Z"), 0);
        assert_eq!(w.at("2026-01-01T02:31:00Z"), 1);
        assert_eq!(w.at("2026-01-01T01:45:00Z"), 0, "an hour back");
        assert_eq!(w.at("2026-01-01T02:31:00Z"), 0, "the same time again is the same run");
        assert_eq!(w.at("2036-01-01T02:31:00Z"), 1, "ten years ahead: one catch-up");
        assert_eq!(w.at("2026-01-01T03:00:00Z"), 0, "and back");
        assert_eq!(w.at("2026-01-02T02:30:00Z"), 1, "it goes on the next night");
    }

    #[test]
    fn a_clock_that_was_wrong_makes_nobody_run_twice_or_wait_for_years() {
        let mut w = world(job(Schedule::Cron("30 2 * * *".into()), "UTC"), "2026-01-01T00:00:00Z");
        assert_eq!((w.at("2026-01-01T00:00:00Z"), w.at("2026-01-01T02:30:00Z")), (0, 1));
        // No battery: 1970 at the start, then the time from the network.
        w.restart();
        assert_eq!((w.at("1970-01-01T00:00:20Z"), w.at("2026-01-01T10:00:00Z")), (0, 0), "the night's run was before");
        // Ten years ahead at a start, off for two nights, and right again: they are owed.
        w.restart();
        assert_eq!((w.at("2036-01-01T12:00:00Z"), w.at("2036-01-02T02:30:00Z")), (1, 1));
        w.restart();
        assert_eq!((w.at("2026-01-03T12:00:00Z"), w.at("2026-01-04T02:30:00Z")), (1, 1));
        // Both after each other.
        assert_eq!(w.at("2036-01-01T12:00:00Z"), 1);
        w.restart();
        assert_eq!((w.at("1970-01-01T00:00:20Z"), w.at("2026-01-04T10:00:00Z"), w.at("2026-01-05T02:30:00Z")), (0, 0, 1));
        w.finish(RunState::Good, 1);
        assert!(!w.scheduler.job_status("shop").overdue);
        // A backup that seems to be of the future keeps nobody from being overdue.
        w.at("2036-01-01T12:00:00Z");
        w.finish(RunState::Good, 1);
        w.at("2026-01-09T12:00:00Z");
        w.at("2026-01-11T12:00:00Z");
        assert!(w.scheduler.job_status("shop").overdue);
    }

    /// Whether somebody looked at the clock meanwhile or not.
    #[test]
    fn a_clock_that_is_set_back_by_hours_runs_nothing_twice() {
        for is_asleep in [true, false] {
            let w = world(job(Schedule::Cron("30 7 * * *".into()), "UTC"), "2026-01-01T00:00:00Z");
            assert_eq!((w.at("2026-01-01T00:00:00Z"), w.at("2026-01-01T07:30:00Z"), w.at("2026-01-01T23:00:00Z")), (0, 1, 0));
            if !is_asleep {
                let from: Timestamp = "2026-01-01T23:30:00Z".parse().unwrap();
                (0..17).for_each(|n| assert_eq!(w.to(from + SignedDuration::from_mins(30 * n)), usize::from(n == 16)));
            }
            assert_eq!(w.at("2026-01-02T08:00:00Z"), usize::from(is_asleep), "the night's run");
            assert_eq!(
                (w.at("2026-01-02T06:05:00Z"), w.at("2026-01-02T07:30:00Z"), w.at("2026-01-02T08:00:00Z")),
                (0, 0, 0),
                "{is_asleep}"
            );
            assert_eq!(w.at("2026-01-03T07:30:00Z"), 1);
        }
    }

    #[test]
    fn what_keepd_itself_stopped_is_begun_anew_and_a_wait_survives_a_restart() {
        let mut w = world(job(Schedule::Cron("0 2 * * *".into()), "UTC"), "2026-01-01T00:00:00Z");
        let run = |attempt| Run { id: "run".into(), job: Some("shop".into()), state: RunState::Cancelled, attempt, ..Run::default() };
        assert_eq!((w.at("2026-01-01T00:00:00Z"), w.at("2026-01-01T02:00:00Z")), (0, 1));
        w.scheduler.job_stopped(&run(1));
        w.restart();
        assert_eq!((w.at("2026-01-01T02:00:30Z"), w.at("2026-01-01T02:00:31Z")), (1, 0));
        w.finish(RunState::Failed, 1);
        w.restart();
        assert_eq!((w.at("2026-01-01T02:01:30Z"), w.at("2026-01-01T02:01:31Z")), (0, 1));
        assert_eq!(lock(&w.started.0).last().unwrap().1, 2);
        w.finish(RunState::Failed, 2);
        // The clock goes back: it waits as long as it was to, and not until it is there again.
        assert_eq!((w.at("2026-01-01T01:30:00Z"), w.at("2026-01-01T01:31:59Z"), w.at("2026-01-01T01:32:00Z")), (0, 0, 1));
        w.finish(RunState::Failed, 2);
        edit(&w, |job| job.enabled = false);
        w.at("2026-01-01T03:00:00Z");
        edit(&w, |job| job.enabled = true);
        assert_eq!(w.at("2026-01-01T04:00:00Z"), 0, "one that was disabled is not tried again");
    }

    #[test]
    fn nothing_is_started_that_cannot_be_noted_and_nothing_lost() {
        let w = world(job(Schedule::Cron("0 2 * * *".into()), "UTC"), "2026-01-01T00:00:00Z");
        assert_eq!(w.at("2026-01-01T00:00:00Z"), 0);
        let other = rusqlite::Connection::open(w.dir.path().join("ledger.sqlite")).unwrap();
        other
            .execute_batch("CREATE TRIGGER full BEFORE INSERT ON schedule BEGIN SELECT raise(FAIL, 'database or disk is full'); END")
            .unwrap();
        assert_eq!(w.at("2026-01-01T02:00:00Z"), 0);
        assert_eq!(w.scheduler.wake_at(), Some("2026-01-01T02:01:00Z".parse().unwrap()), "not at once, and again, and again");
        assert_eq!(w.at("2026-01-01T02:01:00Z"), 0);
        other.execute_batch("DROP TRIGGER full").unwrap();
        assert_eq!((w.at("2026-01-01T02:02:00Z"), w.at("2026-01-01T02:03:00Z")), (1, 0));
        // Nor is one lost that could not be started for another reason than that it runs. What lasts is tried less and less often.
        *lock(&w.started.1) = Some((Error::Busy("64 runs are queued".into()), false));
        assert_eq!(w.at("2026-01-02T02:00:00Z"), 0);
        *lock(&w.started.1) = None;
        assert_eq!((w.at("2026-01-02T02:00:59Z"), w.at("2026-01-02T02:01:00Z"), w.at("2026-01-02T02:02:00Z")), (0, 1, 0));
        *lock(&w.started.1) = Some((Error::Failed("a row of the ledger does not parse".into()), false));
        let mut now: Timestamp = "2026-01-03T02:00:00Z".parse().unwrap();
        for minutes in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(w.to(now), 0);
            let next = w.scheduler.wake_at().unwrap();
            assert_eq!(next.duration_since(now), SignedDuration::from_mins(minutes));
            now = next;
        }
        *lock(&w.started.1) = None;
        assert_eq!((w.to(now), w.at("2026-01-03T23:00:00Z")), (1, 0));
    }

    #[test]
    fn failures_are_retried_with_backoff_and_counted() {
        let w = world(job(Schedule::Cron("0 2 * * *".into()), "UTC"), "2026-01-01T00:00:00Z");
        w.at("2026-01-01T00:00:00Z");
        assert_eq!(w.at("2026-01-01T02:00:00Z"), 1);
        w.finish(RunState::Failed, 1);
        assert_eq!(w.at("2026-01-01T02:00:59Z"), 0);
        assert_eq!(w.at("2026-01-01T02:01:00Z"), 1);
        w.finish(RunState::Failed, 2);
        assert_eq!(w.at("2026-01-01T02:02:59Z"), 0, "the wait doubles");
        assert_eq!(w.at("2026-01-01T02:03:00Z"), 1);
        assert_eq!(lock(&w.started.0).last().unwrap().1, 3);
        w.finish(RunState::Failed, 3);
        assert_eq!(w.at("2026-01-01T23:00:00Z"), 0, "no fourth attempt");
        assert_eq!(w.at("2026-01-02T02:00:00Z"), 1, "the schedule is not moved by retries");
        w.finish(RunState::Good, 1);
        let status = w.scheduler.job_status("shop");
        assert_eq!((status.runs_good, status.runs_failed, status.overdue), (1, 3, false));
        w.at("2026-01-03T04:00:01Z");
        assert!(w.scheduler.job_status("shop").overdue);
        w.finish(RunState::Cancelled, 1);
        assert_eq!(w.at("2026-01-03T12:00:00Z"), 0, "a cancelled run is not tried again");
    }

    #[test]
    fn a_job_without_any_backup_becomes_overdue_and_a_disabled_one_rests() {
        let w = world(job(Schedule::Every(Duration::from_secs(3600)), "UTC"), "2026-01-01T00:00:00Z");
        assert_eq!(w.at("2026-01-01T00:30:00Z"), 0);
        assert!(!w.scheduler.job_status("shop").overdue);
        let mut config = (*w.config.get()).clone();
        config.jobs.get_mut("shop").unwrap().enabled = false;
        w.config.set(config);
        assert_eq!(w.at("2026-01-03T00:30:00Z"), 0);
        assert!(w.scheduler.job_status("shop").overdue, "nobody may forget a disabled job");
        assert_eq!(w.scheduler.next(), None);
    }

    fn with_config_backup(w: &World, schedule: Option<Schedule>) {
        let mut config = (*w.config.get()).clone();
        config.jobs.get_mut("shop").unwrap().enabled = false;
        config.config_backup = Some(ConfigBackup {
            schedule,
            timezone: Some("UTC".into()),
            destination: "local".into(),
            encryption: None,
            include_secrets: false,
            retention: Retention::default(),
            on_change: false,
        });
        w.config.set(config);
    }

    #[test]
    fn the_configuration_is_scheduled_as_jobs_are() {
        let mut w = world(job(Schedule::Cron("30 2 * * *".into()), "UTC"), "2026-01-01T00:00:00Z");
        assert_eq!((w.scheduler.config_backup_status(), w.at("2026-01-01T00:00:00Z")), (None, 0));
        with_config_backup(&w, Some(Schedule::Cron("0 3 * * *".into())));
        assert_eq!(w.at("2026-01-01T02:59:59Z"), 0);
        assert_eq!(w.scheduler.next().unwrap(), ("config backup".to_owned(), "2026-01-01T03:00:00Z".parse().unwrap()));
        assert_eq!(w.at("2026-01-01T03:00:00Z"), 1);
        assert_eq!(lock(&w.started.0).last().unwrap(), &("config backup".to_owned(), 1));
        w.restart();
        assert_eq!(w.at("2026-01-01T12:00:00Z"), 0, "a restart repeats nothing");
        w.restart();
        assert_eq!(w.at("2026-01-09T12:00:00Z"), 1, "eight missed nights are one run");
        assert_eq!(w.at("2026-01-09T11:00:00Z"), 0, "a clock that went back repeats nothing");
        w.at("2026-01-09T12:00:00Z");
        let ended = |state, attempt| {
            let started = Some(w.clock.now().to_string());
            w.scheduler.job_finished(&Run { id: "run".into(), kind: RunKind::ConfigBackup, state, attempt, started, ..Run::default() });
        };
        ended(RunState::Failed, 1);
        assert_eq!(w.at("2026-01-09T12:01:00Z"), 1);
        ended(RunState::Failed, 2);
        assert_eq!((w.at("2026-01-09T12:02:59Z"), w.at("2026-01-09T12:03:00Z")), (0, 1), "the wait doubles");
        assert_eq!(lock(&w.started.0).last().unwrap().1, 3);
        ended(RunState::Failed, 3);
        assert_eq!(w.at("2026-01-10T02:00:00Z"), 0, "no fourth attempt");
        assert_eq!(w.at("2026-01-10T03:00:00Z"), 1);
        ended(RunState::Good, 1);
        let status = w.scheduler.config_backup_status().unwrap();
        assert_eq!(status.last_good.as_deref(), Some("2026-01-10T03:00:00Z"));
        assert_eq!((status.next.as_deref(), status.schedule.as_str()), (Some("2026-01-11T03:00:00Z"), "0 3 * * *"));
        assert_eq!(w.scheduler.job_status("shop").runs_failed, 0, "a job's counts are its own");
        // Without a schedule nothing is due, but what failed is tried again.
        with_config_backup(&w, None);
        assert_eq!((w.at("2026-02-01T03:00:00Z"), w.scheduler.next()), (0, None));
        ended(RunState::Failed, 1);
        assert_eq!(w.at("2026-02-01T03:01:00Z"), 1);
        // And nothing where it is configured no more.
        ended(RunState::Failed, 1);
        let mut config = (*w.config.get()).clone();
        config.config_backup = None;
        w.config.set(config);
        assert_eq!(w.at("2026-03-01T03:00:00Z"), 0);
    }

    fn once(w: &World, at: &str) -> Result<Vec<Timestamp>, Error> {
        w.scheduler.once("shop", Some(at.parse().unwrap()), false)
    }

    #[test]
    fn a_time_that_was_asked_for_runs_once_beside_the_schedule() {
        let mut w = world(job(Schedule::Cron("0 3 * * *".into()), "UTC"), "2026-01-01T00:00:00Z");
        assert_eq!(w.at("2026-01-01T00:00:00Z"), 0);
        assert_eq!(once(&w, "2026-01-01T12:00:00Z").unwrap().len(), 1);
        assert_eq!(once(&w, "2026-01-01T12:00:00Z").unwrap().len(), 1, "the same time is one");
        once(&w, "2026-01-01T02:00:00Z").unwrap();
        assert_eq!(w.scheduler.job_status("shop").next.as_deref(), Some("2026-01-01T02:00:00Z"));
        assert_eq!((w.at("2026-01-01T02:00:00Z"), w.at("2026-01-01T02:00:01Z")), (1, 0));
        // The clock goes back: it does not come again. The schedule goes on as ever.
        assert_eq!((w.at("2026-01-01T01:59:00Z"), w.at("2026-01-01T02:00:00Z"), w.at("2026-01-01T03:00:00Z")), (0, 0, 1));
        // Missed while keepd was down, together with a due time: one run.
        w.restart();
        assert_eq!((w.at("2026-01-02T04:00:00Z"), w.at("2026-01-02T04:00:01Z")), (1, 0));
        assert!(w.scheduler.job_status("shop").once.is_empty());

        for (at, why) in [("2026-01-02T04:00:00Z", "past"), ("2037-01-01T00:00:00Z", "ten years")] {
            assert!(once(&w, at).unwrap_err().to_string().contains(why), "{at}");
        }
        once(&w, "2026-01-02T05:00:00Z").unwrap();
        once(&w, "2026-01-02T06:00:00Z").unwrap();
        let left = w.scheduler.once("shop", Some("2026-01-02T05:00:00Z".parse().unwrap()), true).unwrap();
        assert_eq!(left.len(), 1);
        assert!(w.scheduler.once("shop", Some("2026-01-02T05:00:00Z".parse().unwrap()), true).is_err());
        assert!(w.scheduler.once("shop", None, true).unwrap().is_empty());
        assert_eq!(w.at("2026-01-02T06:00:00Z"), 0);
        let from: Timestamp = "2026-01-03T12:00:00Z".parse().unwrap();
        for n in 0..32 {
            w.scheduler.once("shop", Some(from + SignedDuration::from_mins(n)), false).unwrap();
        }
        assert!(once(&w, "2026-01-05T00:00:00Z").unwrap_err().to_string().contains("32"));
        // Gone from the configuration, it is forgotten.
        let config = (*w.config.get()).clone();
        w.config.set(Config { jobs: Default::default(), ..config.clone() });
        w.scheduler.config_changed();
        w.config.set(config);
        assert!(w.scheduler.job_status("shop").once.is_empty());
        assert!(matches!(w.scheduler.once("none", Some(from), false), Err(Error::NotFound { .. })));
    }

    #[test]
    fn a_single_time_that_cannot_be_started_is_not_lost() {
        let w = world(job(Schedule::Cron("0 3 * * *".into()), "UTC"), "2026-01-01T00:00:00Z");
        let fails = |error: Error, is_running: bool| *lock(&w.started.1) = Some((error, is_running));
        once(&w, "2026-01-01T01:00:00Z").unwrap();
        fails(Error::Failed("the ledger is full".into()), false);
        assert_eq!(w.at("2026-01-01T01:00:00Z"), 0);
        assert_eq!(w.scheduler.wake_at(), Some("2026-01-01T01:01:00Z".parse().unwrap()), "not at once");
        fails(Error::Busy("64 runs are queued".into()), false);
        assert_eq!(w.at("2026-01-01T01:01:00Z"), 0);
        fails(Error::ShuttingDown, false);
        assert_eq!(w.at("2026-01-01T01:02:00Z"), 0);
        assert_eq!(w.scheduler.job_status("shop").once, ["2026-01-01T01:02:00Z"]);
        *lock(&w.started.1) = None;
        assert_eq!((w.at("2026-01-01T01:02:01Z"), w.at("2026-01-01T01:03:00Z")), (1, 0));
        // A run of the job that goes on covers it.
        once(&w, "2026-01-01T02:00:00Z").unwrap();
        fails(Error::Busy("it runs".into()), true);
        assert_eq!(w.at("2026-01-01T02:00:00Z"), 0);
        *lock(&w.started.1) = None;
        assert_eq!(w.at("2026-01-01T02:01:00Z"), 0);
    }

    #[test]
    fn a_disabled_job_is_not_planned_and_its_times_pass() {
        let w = world(job(Schedule::Cron("0 3 * * *".into()), "UTC"), "2026-01-01T00:00:00Z");
        once(&w, "2026-01-01T01:00:00Z").unwrap();
        edit(&w, |job| job.enabled = false);
        assert!(once(&w, "2026-01-01T02:00:00Z").unwrap_err().to_string().contains("job enable shop"));
        assert_eq!(w.scheduler.wake_at(), Some("2026-01-01T01:00:00Z".parse().unwrap()));
        assert_eq!(w.at("2026-01-01T01:00:00Z"), 0);
        edit(&w, |job| job.enabled = true);
        assert_eq!(w.at("2026-01-01T01:00:01Z"), 0);
    }

    fn edit(w: &World, change: impl FnOnce(&mut Job)) {
        let mut config = (*w.config.get()).clone();
        change(config.jobs.get_mut("shop").unwrap());
        w.config.set(config);
        w.scheduler.config_changed();
    }

    #[test]
    fn what_falls_due_in_a_pause_is_covered() {
        let until = |text: &str| Some(text.parse().unwrap());
        let mut w = world(job(Schedule::Cron("0 3 * * *".into()), "UTC"), "2026-01-01T00:00:00Z");
        assert_eq!((w.at("2026-01-01T00:00:00Z"), w.at("2026-01-01T03:00:00Z")), (0, 1));
        edit(&w, |job| job.paused_until = until("2026-01-05T03:00:00Z"));
        assert_eq!((w.at("2026-01-02T03:00:00Z"), w.at("2026-01-05T02:59:59Z")), (0, 0));
        let status = w.scheduler.job_status("shop");
        assert_eq!(status.paused_until.as_deref(), Some("2026-01-05T03:00:00Z"));
        assert!(status.overdue, "age is age");
        assert_eq!(status.next.as_deref(), Some("2026-01-05T03:00:00Z"), "the end is no part of the pause");
        assert_eq!((w.at("2026-01-05T03:00:00Z"), w.at("2026-01-05T04:00:00Z")), (1, 0));
        assert_eq!(w.scheduler.job_status("shop").paused_until, None);
        // A missed one after the pause is caught up as ever.
        w.restart();
        assert_eq!(w.at("2026-01-06T05:00:00Z"), 1);
        // Taken back before its end, also while keepd was down: nothing is made up, and the next time runs.
        edit(&w, |job| job.paused_until = until("2026-02-01T00:00:00Z"));
        assert_eq!(w.at("2026-01-06T06:00:00Z"), 0);
        assert_eq!(once(&w, "2026-01-07T12:00:00Z").unwrap().len(), 1);
        assert_eq!(w.at("2026-01-07T12:00:00Z"), 1, "what was asked for runs in a pause, too");
        let mut config = (*w.config.get()).clone();
        config.jobs.get_mut("shop").unwrap().paused_until = None;
        w.config.set(config);
        w.restart();
        assert_eq!((w.at("2026-01-10T10:00:00Z"), w.at("2026-01-11T03:00:00Z")), (0, 1));
        // A failed run is not tried again in a pause.
        w.finish(RunState::Failed, 1);
        edit(&w, |job| job.paused_until = until("2026-01-12T00:00:00Z"));
        assert_eq!(w.at("2026-01-11T04:00:00Z"), 0);
    }

    #[test]
    fn a_pause_does_not_move_an_interval() {
        let w = world(job(Schedule::Every(Duration::from_secs(3600)), "UTC"), "2026-01-01T00:20:00Z");
        assert_eq!((w.at("2026-01-01T00:20:00Z"), w.at("2026-01-01T01:20:00Z")), (0, 1));
        edit(&w, |job| job.paused_until = Some("2026-01-01T09:00:00Z".parse().unwrap()));
        assert_eq!((w.at("2026-01-01T04:00:00Z"), w.at("2026-01-01T09:00:00Z"), w.at("2026-01-01T09:20:00Z")), (0, 0, 1));
        edit(&w, |job| job.paused_until = Some("2026-01-02T09:00:00Z".parse().unwrap()));
        assert_eq!(w.at("2026-01-01T12:30:00Z"), 0);
        edit(&w, |job| job.paused_until = None);
        assert_eq!((w.at("2026-01-01T12:31:00Z"), w.at("2026-01-01T13:20:00Z")), (0, 1));
    }

    #[test]
    fn two_years_with_daily_restarts_run_each_night_once() {
        for zone in ["Europe/Berlin", "America/Havana", "Australia/Lord_Howe"] {
            let mut w = world(job(Schedule::Cron("30 2 * * *".into()), zone), "2027-01-01T00:00:00Z");
            let mut now: Timestamp = "2027-01-01T00:00:00Z".parse().unwrap();
            w.to(now);
            let mut runs = 0;
            let days = 731;
            for hour in 0..days * 24 {
                now += SignedDuration::from_mins(60);
                if hour % 24 == 7 {
                    w.restart();
                }
                runs += w.to(now);
            }
            assert!((days - 1..=days).contains(&runs), "{zone}: {runs} runs in {days} days");
        }
    }
}
