//! Backups of the configuration: started by hand, by the calendar and by changes; and what is stored of them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use keepd_protocol::model::{RunKind, RunState};

use tokio::sync::OwnedMutexGuard;

use super::{Error, Result, Runs, Work, lock};
use crate::access::By;
use crate::config::Destination;
use crate::meta::stored::{self, Stored};
use crate::run::live::{Failure, LiveRun};
use crate::run::{config_backup, destination};

/// What a run works on that stores configurations or removes them; one at a time.
const CONFIGURATIONS: &str = "config backup";
/// Between looks whether another one is done.
const LOOK_EVERY: Duration = Duration::from_millis(200);

impl Runs {
    /// Queues a run that stores the configuration where `[config_backup]` says.
    pub fn start_config_backup(self: &Arc<Self>, by: &By) -> Result<String> {
        self.try_config_backup(by, 1)
    }

    /// The same; `attempt`: more than 1 for a retry.
    pub fn try_config_backup(self: &Arc<Self>, by: &By, attempt: u32) -> Result<String> {
        let destination = self.config.get().config_backup.as_ref().ok_or_else(none_configured)?.destination.clone();
        // One that has begun may have read the configuration from before a change.
        if let Some(other) = self.active().iter().find(|run| run.kind == RunKind::ConfigBackup && run.state == RunState::Queued) {
            return Err(Error::Busy(format!("a backup of the configuration is queued already (run {})", other.id)));
        }
        let work = Work { attempt, alone: vec![CONFIGURATIONS.into()], ..Work::on(RunKind::ConfigBackup, &destination, by) };
        let runs = self.clone();
        self.start(work, move |live| {
            // What is configured now: it may have waited.
            let env = runs.environment();
            let wanted = env.config.config_backup.clone().ok_or_else(|| Failure::Failed(none_configured().to_string()))?;
            live.update(|run| run.destination = Some(wanted.destination.clone()));
            let _reading = runs.keep_readable(&wanted.destination);
            config_backup::store(&env, &wanted, live)
        })
    }

    /// Waits until no other run stores configurations or removes them.
    pub(super) fn alone_with_configurations(&self, live: &LiveRun) -> Result<OwnedMutexGuard<()>, Failure> {
        let one = lock(&self.alone).entry(CONFIGURATIONS.into()).or_default().clone();
        loop {
            if let Ok(alone) = one.clone().try_lock_owned() {
                return Ok(alone);
            }
            if live.cancel.is_cancelled() {
                return Err(Failure::Cancelled);
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Stores the configuration where that is wanted after changes, and it is another one than lies there. In the background.
    pub fn config_may_have_changed(self: &Arc<Self>) {
        if self.config.get().config_backup.as_ref().is_none_or(|wanted| !wanted.on_change) {
            return;
        }
        let runs = self.clone();
        self.runtime.spawn_blocking(move || {
            let env = runs.environment();
            let Some(wanted) = &env.config.config_backup else { return };
            let started = match config_backup::is_stored(&env, wanted) {
                Ok(true) => return,
                Ok(false) => runs.start_config_backup(&By::schedule()).map(drop),
                Err(e) => Err(e.into()),
            };
            match started {
                Ok(()) | Err(Error::Busy(_) | Error::ShuttingDown) => {}
                Err(e) => tracing::warn!("the configuration may have changed, and could not be stored: {e}"),
            }
        });
    }

    /// The stored configurations of a destination (without one, that of `[config_backup]`), the newest first. Blocks.
    pub fn config_backups(&self, destination: Option<&str>) -> Result<(String, Vec<Stored>)> {
        let env = self.environment();
        let target = self.config_destination(destination)?;
        let mut list = stored::list(&destination::storage(&target, &env.runtime)?).map_err(|e| Error::Failed(e.to_string()))?;
        list.reverse();
        Ok((target.name, list))
    }

    /// One of them by its name, with or without its directory, or the newest; and its bytes, as they lie there. Blocks.
    pub fn fetch_config_backup(&self, destination: Option<&str>, name: Option<&str>) -> Result<(String, Bytes)> {
        let env = self.environment();
        let target = self.config_destination(destination)?;
        let storage = destination::storage(&target, &env.runtime)?;
        let list = stored::list(&storage).map_err(|e| Error::Failed(e.to_string()))?;
        let is_it = |s: &&Stored| name.is_none_or(|name| s.name == name || s.name.strip_prefix(stored::DIRECTORY) == Some(name));
        let Some(found) = list.iter().rev().find(is_it) else {
            let of_that_name = name.map(|name| format!(" '{name}'")).unwrap_or_default();
            let text = format!("there is no stored configuration{of_that_name} at {}", target.name);
            return Err(Error::NotFound { what: "path", name: name.unwrap_or_default().to_owned(), text });
        };
        let bytes = stored::fetch(&storage, &found.name).map_err(|e| Error::Failed(e.to_string()))?;
        Ok((found.name.clone(), bytes))
    }

    fn config_destination(&self, named: Option<&str>) -> Result<Destination> {
        let config = self.config.get();
        let configured = config.config_backup.as_ref().map(|wanted| wanted.destination.as_str());
        Ok(self.destination(&config, named.or(configured).ok_or_else(none_configured)?)?.clone())
    }
}

fn none_configured() -> Error {
    let text = "the configuration is stored nowhere: say where to with a table [config_backup], such as destination = \"offsite\" and schedule = \"@daily\"";
    Error::Failed(text.into())
}
