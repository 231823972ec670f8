//! Where the daemon touches the control socket: what the service is given.

use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use keepd_protocol::model::Event;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use super::reload;
use crate::config;
use crate::control::listener::Listening;
use crate::control::{App, Control, transport};
use crate::ledger::Ledger;
use crate::run::Runs;
use crate::schedule::Scheduler;

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
        job_status: {
            let scheduler = scheduler.clone();
            Box::new(move |name| scheduler.job_status(name))
        },
        schedule_once: {
            let scheduler = scheduler.clone();
            Box::new(move |job, at, cancel| scheduler.once(job, at, cancel))
        },
        config_backup_status: Box::new(move || scheduler.config_backup_status()),
        started,
        config_path,
        refusals: Arc::default(),
    };
    let (ledger, refusals) = (app.ledger.clone(), app.refusals.clone());
    let served = match listening.listener.try_clone() {
        Ok(listener) => transport::serve(listener, Arc::new(Control { app: Arc::new(app) }), stop).await,
        Err(error) => Err(error),
    };
    if let Err(error) = served {
        tracing::error!("the control socket cannot be served: {error}");
    }
    let _ = tokio::task::spawn_blocking(move || refusals.flush(&ledger)).await;
}
