//! Where the daemon touches the other rooms: every call that starts, asks or stops one of them stands here.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use keepd_protocol::model::{Event, Run};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use super::reload;
use crate::config::{self, Config, Problem, Severity};
use crate::control::{self, App, Control, listener};
use crate::crypto::key_file;
use crate::ledger::Ledger;
use crate::ledger::lock::StateLock;
use crate::run::Runs;
use crate::schedule::{Scheduler, SystemClock};

// ---- configuration and keys -------------------------------------------------------------------------------------------

/// `/etc/keepd/keepd.toml`, or the user's own.
pub fn default_config_path() -> PathBuf {
    config::default_path()
}

/// The checked configuration, or all that is wrong with it, a line each.
pub fn load_config(path: &Path) -> Result<Config, String> {
    config::load(path).map_err(|problems| problems.to_string())
}

pub fn generate_key(file: &Path) -> Result<(), String> {
    key_file::generate(file).map(drop).map_err(|error| error.to_string())
}

/// What the configuration refers to and this machine does not have as it should: keys, paths, permissions. Worth telling, but
/// no reason to stop what needs none of it.
pub fn file_problems(config: &Config) -> FileProblems {
    let (errors, warnings) = config::check_files(config).into_iter().partition(|p: &Problem| p.severity == Severity::Error);
    FileProblems { errors, warnings }
}

#[derive(Default)]
pub struct FileProblems {
    pub errors: Vec<Problem>,
    pub warnings: Vec<Problem>,
}

impl FileProblems {
    pub fn log(&self) {
        self.errors.iter().for_each(|p| tracing::error!("{p}"));
        self.warnings.iter().for_each(|p| tracing::warn!("{}", p.to_string().trim_start_matches("warning: ")));
    }
}

// ---- state ------------------------------------------------------------------------------------------------------------

/// Held as long as the daemon lives; a second daemon on the same state directory is refused.
pub struct Lock {
    _lock: StateLock,
}

pub fn lock(state_dir: &Path) -> Result<Lock, String> {
    StateLock::acquire(state_dir).map(|lock| Lock { _lock: lock }).map_err(|error| error.to_string())
}

// ---- schedule ---------------------------------------------------------------------------------------------------------

/// The scheduler as the daemon uses it.
#[derive(Clone)]
pub struct Schedule(Arc<Scheduler>);

impl Schedule {
    /// Made together with the registry of runs, which tells it of every run that ends (for retries and last good).
    pub fn new(config: Arc<config::Current>, ledger: Arc<Ledger>, runs: Arc<Runs>) -> Self {
        let scheduler = Scheduler::new(config, ledger, Arc::new(runs.clone()), Arc::new(SystemClock));
        let told = scheduler.clone();
        runs.set_on_finish(move |run| told.job_finished(run));
        Self(scheduler)
    }

    /// A run that an earlier daemon left unfinished: it counts, and is tried again where that is configured.
    pub fn interrupted(&self, run: &Run) {
        self.0.job_finished(run);
    }

    /// Starts what is due until cancelled.
    pub async fn run(self, cancel: CancellationToken) {
        self.0.run(cancel).await;
    }

    pub fn config_changed(&self) {
        self.0.config_changed();
    }

    /// Answered by the scheduler's own loop, and by nothing else: the watchdog asks this.
    pub async fn ping(&self) {
        // A loop that is gone does not answer; the watchdog's own patience ends the wait.
        if self.0.ping().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// The job that is due next, and when.
    pub fn next(&self) -> Option<(String, Timestamp)> {
        self.0.next()
    }
}

// ---- control ----------------------------------------------------------------------------------------------------------

/// What the control socket needs of the daemon.
pub struct ControlParts {
    pub config: Arc<config::Current>,
    pub ledger: Arc<Ledger>,
    pub runs: Arc<Runs>,
    pub events: broadcast::Sender<Event>,
    pub schedule: Schedule,
    pub reload: reload::Handle,
    pub started: Timestamp,
    pub config_path: PathBuf,
}

/// The listening socket: systemd's or our own.
pub struct Socket {
    listening: listener::Listening,
}

impl Socket {
    pub fn listen(path: &Path) -> Result<Self, String> {
        listener::listen(path).map(|listening| Self { listening }).map_err(|error| error.to_string())
    }

    /// Where it listens, for the log.
    pub fn describe(&self) -> String {
        match self.listening.path() {
            Some(path) => path.display().to_string(),
            None => "the socket systemd passed".into(),
        }
    }

    /// Serves until `stop`; then accepts nothing more and returns. Our own socket's file is removed.
    pub async fn serve(self, parts: ControlParts, stop: CancellationToken) {
        let ControlParts { config, ledger, runs, events, schedule, reload, started, config_path } = parts;
        let app = App {
            config,
            ledger,
            runs,
            events,
            reload: Box::new(move || {
                let reload = reload.clone();
                Box::pin(async move { reload.reload("keepctl".into()).await.map(|done| (done.jobs, done.message)) })
            }),
            job_status: Box::new(move |name| schedule.0.job_status(name)),
            started,
            config_path,
        };
        let listener = match self.listening.listener.try_clone() {
            Ok(listener) => listener,
            Err(error) => return tracing::error!("the control socket cannot be served: {error}"),
        };
        if let Err(error) = control::transport::serve(listener, Arc::new(Control { app: Arc::new(app) }), stop).await {
            tracing::error!("the control socket cannot be served: {error}");
        }
    }
}
