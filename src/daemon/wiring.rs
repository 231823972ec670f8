//! Where the daemon touches the configuration and the control socket: loading with all checks, and what the service is given.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use keepd_protocol::model::Event;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use super::reload;
use crate::config::{self, Config, Problem, Severity};
use crate::control::listener::Listening;
use crate::control::{App, Control, transport};
use crate::ledger::Ledger;
use crate::profile;
use crate::run::Runs;
use crate::schedule::Scheduler;

/// A configuration without a mistake in itself, and what this machine has not as it refers to it.
pub struct Loaded {
    pub config: Config,
    /// Keys that cannot be used, destinations that cannot be: some job is sure to fail.
    pub errors: Vec<Problem>,
    /// What is perhaps not meant so.
    pub warnings: Vec<Problem>,
}

/// The configuration, or all that is wrong with it, a line each.
pub fn load(path: &Path) -> Result<Loaded, String> {
    let config = config::load(path).map_err(|problems| problems.to_string())?;
    let problems = profile::check(&config).into_iter().chain(config::check_files(&config));
    let (errors, warnings) = problems.partition(|p: &Problem| p.severity == Severity::Error);
    Ok(Loaded { config, errors, warnings })
}

impl Loaded {
    /// For somebody who can mend it now: errors are as bad as mistakes.
    pub fn without_errors(self) -> Result<Self, String> {
        if self.errors.is_empty() { Ok(self) } else { Err(config::Problems(self.errors).to_string()) }
    }

    pub fn log_problems(&self) {
        self.errors.iter().for_each(|p| tracing::error!("{p}"));
        self.warnings.iter().for_each(|p| tracing::warn!("{}", p.to_string().trim_start_matches("warning: ")));
    }
}

/// What the control socket needs of the daemon.
pub struct ControlParts {
    pub config: Arc<config::Current>,
    pub ledger: Arc<Ledger>,
    pub runs: Arc<Runs>,
    pub events: broadcast::Sender<Event>,
    pub scheduler: Arc<Scheduler>,
    pub reload: reload::Handle,
    pub started: Timestamp,
    pub config_path: PathBuf,
}

/// Serves the control socket until `stop`, which ends its connections too. A socket of our own is removed then.
pub async fn serve_control(listening: Listening, parts: ControlParts, stop: CancellationToken) {
    let ControlParts { config, ledger, runs, events, scheduler, reload, started, config_path } = parts;
    let app = App {
        config,
        ledger,
        runs,
        events,
        reload: Box::new(move || {
            let reload = reload.clone();
            Box::pin(async move { reload.reload("the control socket".into()).await.map(|r| (r.jobs, r.message)) })
        }),
        job_status: Box::new(move |name| scheduler.job_status(name)),
        started,
        config_path,
    };
    let served = match listening.listener.try_clone() {
        Ok(listener) => transport::serve(listener, Arc::new(Control { app: Arc::new(app) }), stop).await,
        Err(error) => Err(error),
    };
    if let Err(error) = served {
        tracing::error!("the control socket cannot be served: {error}");
    }
}
