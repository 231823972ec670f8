//! The control socket: the Varlink service `io.keepd.Control`.
//!
//! `listener` makes the socket, `transport` speaks the protocol (frames, descriptors, deadlines, limits), `service`
//! answers the standard interface and checks rights, `handlers` carries the calls out, `audit` writes down who did what (`origin`: from where). `docs/protocol.md` describes it.

mod access;
pub mod audit;
mod configuration;
mod editing;
pub mod frames;
mod handlers;
mod imports;
mod keys;
pub mod listener;
pub mod origin;
mod passed;
mod service;
pub mod transport;

pub use service::Control;

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use jiff::Timestamp;
use keepd_protocol::model::{ConfigBackupStatus, Event, JobStatus};
use tokio::sync::broadcast;

use crate::config;
use crate::ledger::Ledger;
use crate::run::Runs;

/// How a reload ended: the number of jobs and a text, or what is wrong.
pub type Reloaded = Result<(u32, String), String>;
pub type ReloadFuture = Pin<Box<dyn Future<Output = Reloaded> + Send>>;

/// A job, a time and whether it is taken back.
type ScheduleOnce = dyn Fn(&str, Option<Timestamp>, bool) -> Result<Vec<Timestamp>, crate::run::Error> + Send + Sync;

/// What the service needs of the daemon.
pub struct App {
    pub config: Arc<config::Current>,
    pub ledger: Arc<Ledger>,
    pub runs: Arc<Runs>,
    pub events: broadcast::Sender<Event>,
    /// Reads the configuration again.
    pub reload: Box<dyn Fn() -> ReloadFuture + Send + Sync>,
    /// The schedule's view of a configured job.
    pub job_status: Box<dyn Fn(&str) -> JobStatus + Send + Sync>,
    /// The same of the backup of the configuration; None where none is configured.
    pub config_backup_status: Box<dyn Fn() -> Option<ConfigBackupStatus> + Send + Sync>,
    /// Has a job run once at a time, or not any more; when it is to run then.
    pub schedule_once: Box<ScheduleOnce>,
    pub started: Timestamp,
    pub config_path: PathBuf,
    pub refusals: Arc<audit::Refusals>,
}
