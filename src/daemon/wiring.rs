//! Where the daemon touches the other rooms: every call that starts, asks or stops one of them stands here.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use keepd_protocol::model::{Event, EventKind, Run};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;

use super::reload;
use super::shims;
use crate::config::{self, Config, KeySource};
use crate::ledger::Ledger;
use crate::run::Runs;

// ---- configuration and keys -------------------------------------------------------------------------------------------

/// `/etc/keepd/keepd.toml`, or the user's own.
pub fn default_config_path() -> PathBuf {
    shims::default_path()
}

/// The checked configuration, or all that is wrong with it, a line each.
pub fn load_config(path: &Path) -> Result<Config, String> {
    shims::load(path).map_err(|problems| problems.to_string())
}

pub fn generate_key(file: &Path) -> Result<(), String> {
    shims::generate_key(file).map_err(|error| error.to_string())
}

/// Keys that cannot be used now. No reason to stop what needs other keys, or none.
pub fn key_problems(config: &Config) -> Vec<String> {
    let problem = |(name, profile): (&String, &config::Encryption)| match &profile.key {
        KeySource::File(path) => shims::check_key(path).err().map(|e| format!("encryption.{name}: {e}")),
    };
    config.encryption.iter().filter_map(problem).collect()
}

// ---- state ------------------------------------------------------------------------------------------------------------

/// Held as long as the daemon lives; a second daemon on the same state directory is refused.
pub struct Lock {
    _lock: shims::StateLock,
}

pub fn lock(state_dir: &Path) -> Result<Lock, String> {
    shims::StateLock::acquire(state_dir).map(|lock| Lock { _lock: lock }).map_err(|error| error.to_string())
}

// ---- schedule ---------------------------------------------------------------------------------------------------------

/// The scheduler as the daemon uses it.
#[derive(Clone)]
pub struct Schedule(Arc<shims::Scheduler>);

impl Schedule {
    pub fn new(config: Arc<config::Current>, ledger: Arc<Ledger>, runs: Arc<Runs>) -> Self {
        Self(Arc::new(shims::Scheduler::new(config, ledger, runs)))
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
        self.0.ping().await;
    }

    /// The job that is due next, and when.
    pub fn next(&self) -> Option<(String, Timestamp)> {
        self.0.next()
    }

    /// Tells the scheduler of each run that ends (for retries and last good), until the events end.
    pub async fn follow_runs(self, ledger: Arc<Ledger>, mut events: broadcast::Receiver<Event>) {
        let mut told = Told::default();
        loop {
            match events.recv().await {
                Ok(event) if event.kind == EventKind::RunFinished => {
                    let Some(id) = event.run else { continue };
                    let (ledger, wanted) = (ledger.clone(), id.clone());
                    match blocking(move || ledger.run(&wanted)).await {
                        Ok(Some(run)) => self.tell(&mut told, &run),
                        Ok(None) => tracing::warn!(run = id, "run {id} ended but is not in the ledger"),
                        Err(error) => tracing::error!(run = id, "run {id} ended, but the schedule could not be told: {error}"),
                    }
                }
                Ok(_) => {}
                // More events came than are kept: what was missed stands in the ledger.
                Err(RecvError::Lagged(_)) => {
                    let ledger = ledger.clone();
                    match blocking(move || ledger.runs(None, Told::KEPT)).await {
                        Ok(runs) => {
                            for run in runs.iter().rev() {
                                self.tell(&mut told, run);
                            }
                        }
                        Err(error) => tracing::error!("the schedule could not be told which runs ended: {error}"),
                    }
                }
                Err(RecvError::Closed) => return,
            }
        }
    }

    fn tell(&self, told: &mut Told, run: &Run) {
        if run.job.is_some() && told.is_news(run) {
            self.0.job_finished(run);
        }
    }
}

/// The newest runs the scheduler was told of, so that none counts twice.
struct Told {
    ids: VecDeque<String>,
    /// Runs of earlier daemons were told by them.
    since: Timestamp,
}

impl Default for Told {
    fn default() -> Self {
        Self { ids: VecDeque::new(), since: Timestamp::now() }
    }
}

impl Told {
    const KEPT: u32 = 256;

    fn is_news(&mut self, run: &Run) -> bool {
        let ended = run.finished.as_ref().and_then(|t| t.parse::<Timestamp>().ok());
        if !run.state.is_finished() || ended.is_none_or(|t| t < self.since) || self.ids.contains(&run.id) {
            return false;
        }
        if self.ids.len() >= Self::KEPT as usize {
            self.ids.pop_front();
        }
        self.ids.push_back(run.id.clone());
        true
    }
}

/// The ledger's methods block for a moment, a slow disk's for longer.
async fn blocking<T: Send + 'static>(f: impl FnOnce() -> crate::ledger::Result<T> + Send + 'static) -> crate::ledger::Result<T> {
    match tokio::task::spawn_blocking(f).await {
        Ok(result) => result,
        Err(_) => Err(crate::ledger::LedgerError::Failed("the ledger's question ended in a bug of keepd, see the log".into())),
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
    listener: shims::Listener,
}

impl Socket {
    pub fn listen(path: &Path) -> Result<Self, String> {
        shims::listen(path).map(|listener| Self { listener }).map_err(|error| error.to_string())
    }

    /// Where it listens, for the log.
    pub fn describe(&self) -> String {
        self.listener.describe()
    }

    /// Serves until `stop`; then accepts nothing more and returns. Our own socket's file is removed.
    pub async fn serve(self, parts: ControlParts, stop: CancellationToken) {
        shims::serve(self.listener, parts, stop).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keepd_protocol::model::RunState;

    #[test]
    fn a_run_is_news_once_and_only_when_it_ended_in_this_daemons_life() {
        let mut told = Told::default();
        let now = Timestamp::now();
        let run = |id: &str, state, finished: Option<Timestamp>| Run {
            id: id.into(),
            state,
            finished: finished.map(|t| t.to_string()),
            ..Run::default()
        };
        assert!(told.is_news(&run("a", RunState::Good, Some(now))));
        assert!(!told.is_news(&run("a", RunState::Good, Some(now))));
        assert!(!told.is_news(&run("b", RunState::Running, None)));
        assert!(!told.is_news(&run("c", RunState::Failed, Some(now - std::time::Duration::from_secs(60)))));
        assert!(told.is_news(&run("b", RunState::Failed, Some(now))));
    }
}
