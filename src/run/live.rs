//! A run while it lives: its state, who follows it, how to stop it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use keepd_protocol::model::{Event, EventKind, Level, Message, Run, RunState, Step};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::access::By;
use crate::crypto::CryptoError;
use crate::source::Report;

/// Messages kept with a run; all are counted.
const MAX_MESSAGES: usize = 200;

/// Shared between the thread that works and those who watch.
pub struct LiveRun {
    pub cancel: CancellationToken,
    stopped: AtomicBool,
    /// Counters and messages of the capture.
    pub report: Report,
    state: Mutex<State>,
    changed: watch::Sender<Arc<Run>>,
    events: broadcast::Sender<Event>,
    /// On whose behalf.
    pub by: By,
}

struct State {
    run: Run,
    step_started: Instant,
    started: Instant,
}

/// How a run's work ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    Good,
    /// Done, but something was left out.
    Partial,
    /// Done, but what was captured is not as it usually is.
    Suspect,
}

/// How it did not.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("cancelled")]
    Cancelled,
    #[error("{0}")]
    Failed(String),
    /// The destination's storage did not do what it was asked; another destination may.
    #[error("{0}")]
    Storage(String),
    /// What the repository holds is not what was stored in it.
    #[error("{0}")]
    Damaged(String),
    /// The repository's contents open with a private key that was not lent.
    #[error("{0}")]
    NeedsKey(String),
}

impl From<crate::repository::RepositoryError> for Failure {
    fn from(error: crate::repository::RepositoryError) -> Self {
        use crate::repository::RepositoryError as E;
        match error {
            E::Cancelled => Failure::Cancelled,
            e @ E::Storage(_) => Failure::Storage(e.to_string()),
            e @ E::Object { source: CryptoError::NeedsPrivateKey(_), .. } => Failure::NeedsKey(e.to_string()),
            e @ (E::Object { .. } | E::Payload { .. } | E::Damaged { .. }) => Failure::Damaged(e.to_string()),
            other => Failure::Failed(other.to_string()),
        }
    }
}

impl From<crate::process::ProcessError> for Failure {
    fn from(error: crate::process::ProcessError) -> Self {
        match error {
            crate::process::ProcessError::Cancelled => Failure::Cancelled,
            crate::process::ProcessError::Failed(text) => Failure::Failed(text),
        }
    }
}

impl From<crate::ledger::LedgerError> for Failure {
    fn from(error: crate::ledger::LedgerError) -> Self {
        Failure::Failed(error.to_string())
    }
}

impl LiveRun {
    pub fn new(run: Run, events: broadcast::Sender<Event>) -> Self {
        let changed = watch::Sender::new(Arc::new(run.clone()));
        let now = Instant::now();
        let live = Self {
            cancel: CancellationToken::new(),
            stopped: AtomicBool::new(false),
            report: Report::default(),
            state: Mutex::new(State { run, step_started: now, started: now }),
            changed,
            events,
            by: By::default(),
        };
        live.event(EventKind::RunQueued, String::new());
        live
    }

    /// Cancels it because keepd ends; one that somebody cancelled before stays that.
    pub fn stop(&self) {
        if !self.cancel.is_cancelled() {
            self.stopped.store(true, Ordering::Release);
        }
        self.cancel.cancel();
    }

    /// Whether it was cancelled because keepd ends.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    pub fn on_behalf_of(self, by: By) -> Self {
        Self { by, ..self }
    }

    /// The same run for what is done however it was cancelled; nobody follows it.
    pub fn uncancelled(&self) -> Self {
        Self::new(self.snapshot(), broadcast::Sender::new(1)).on_behalf_of(self.by.clone())
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn follow(&self) -> watch::Receiver<Arc<Run>> {
        self.changed.subscribe()
    }

    /// The run as it stands.
    pub fn snapshot(&self) -> Run {
        self.state().run.clone()
    }

    pub fn id(&self) -> String {
        self.state().run.id.clone()
    }

    /// Changes the run and tells those who follow it.
    pub fn update(&self, change: impl FnOnce(&mut Run)) {
        let run = {
            let mut state = self.state();
            change(&mut state.run);
            Arc::new(state.run.clone())
        };
        self.changed.send_replace(run);
    }

    pub fn begin(&self) {
        let now = Timestamp::now().to_string();
        {
            let mut state = self.state();
            state.started = Instant::now();
            state.step_started = Instant::now();
        }
        self.update(|run| {
            run.state = RunState::Running;
            run.started = Some(now);
        });
        self.event(EventKind::RunStarted, String::new());
    }

    /// Ends the step before and begins one.
    pub fn step(&self, name: &str) {
        let started = Timestamp::now().to_string();
        {
            let mut state = self.state();
            let seconds = state.step_started.elapsed().as_secs_f64();
            if let Some(last) = state.run.steps.last_mut() {
                last.seconds.get_or_insert(seconds);
            }
            state.step_started = Instant::now();
        }
        self.update(|run| {
            run.step = name.to_owned();
            run.steps.push(Step { name: name.to_owned(), started, seconds: None });
        });
        self.event(EventKind::RunStep, name.to_owned());
    }

    pub fn message(&self, level: Level, text: String) {
        self.update(|run| {
            run.messages_total += 1;
            if run.messages.len() >= MAX_MESSAGES {
                run.messages.remove(0);
            }
            run.messages.push(Message { time: Timestamp::now().to_string(), level, text: text.clone() });
        });
        if level != Level::Info {
            self.event(EventKind::RunMessage, text);
        }
    }

    pub fn set_total(&self, bytes: u64) {
        self.update(|run| run.progress.total_bytes = Some(bytes));
    }

    pub fn set_added(&self, bytes: u64) {
        self.state().run.progress.added_bytes = bytes;
    }

    /// Takes the counters and messages over into what is shown. Called a few times a second while the run works.
    pub fn tick(&self) {
        for (level, text) in self.report.take_messages() {
            self.message(level, text);
        }
        let (entries, bytes) = (self.report.entries.load(Ordering::Relaxed), self.report.bytes.load(Ordering::Relaxed));
        let elapsed = self.state().started.elapsed();
        let before = self.snapshot().progress;
        if (before.entries, before.bytes) != (entries, bytes) {
            self.update(|run| {
                let progress = &mut run.progress;
                (progress.entries, progress.bytes) = (entries, bytes);
                if let Some(total) = progress.total_bytes.filter(|t| *t > 0) {
                    let share = (bytes as f64 / total as f64).min(1.0);
                    progress.percent = Some((share * 1000.0).round() / 10.0);
                    progress.eta_seconds = eta(share, elapsed);
                }
            });
        }
    }

    /// The last state; nobody changes it after.
    pub fn end(&self, result: Result<Finish, Failure>) -> Run {
        self.tick();
        let now = Timestamp::now().to_string();
        let seconds = self.state().step_started.elapsed().as_secs_f64();
        self.update(|run| {
            if let Some(last) = run.steps.last_mut() {
                last.seconds.get_or_insert(seconds);
            }
            run.finished = Some(now);
            run.progress.eta_seconds = None;
            match result {
                Ok(finish) => {
                    run.state = match finish {
                        Finish::Good => RunState::Good,
                        Finish::Partial => RunState::Partial,
                        Finish::Suspect => RunState::Suspect,
                    };
                    if run.progress.percent.is_some() {
                        run.progress.percent = Some(100.0);
                    }
                }
                Err(Failure::Cancelled) => run.state = RunState::Cancelled,
                Err(Failure::Failed(text) | Failure::Storage(text) | Failure::Damaged(text) | Failure::NeedsKey(text)) => {
                    run.state = RunState::Failed;
                    run.error = Some(text);
                }
            }
        });
        let run = self.snapshot();
        self.event(EventKind::RunFinished, run.error.clone().unwrap_or_default());
        run
    }

    fn event(&self, kind: EventKind, text: String) {
        let (job, run, state) = {
            let state = self.state();
            (state.run.job.clone(), state.run.id.clone(), state.run.state)
        };
        // Nobody may be listening.
        let _ = self.events.send(Event {
            time: Timestamp::now().to_string(),
            kind,
            job,
            run: Some(run),
            state: Some(state),
            text,
            import: None,
        });
    }
}

fn eta(share: f64, elapsed: Duration) -> Option<u64> {
    (share > 0.01).then(|| (elapsed.as_secs_f64() * (1.0 - share) / share).round() as u64)
}
