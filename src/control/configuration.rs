//! The methods about the configuration itself.

use std::fs::File;
use std::os::fd::OwnedFd;

use keepd_protocol::configuration::ConfigBackupInfo;
use keepd_protocol::methods::*;

use super::handlers::Result;
use super::passed::{descriptor, writable};
use super::service::Control;
use super::transport::Fault;
use crate::access::By;
use crate::meta::stored::Stored;

/// Names in one call.
const MAX_NAMES: usize = 10_000;

impl Control {
    pub(super) async fn show_config(&self, p: show_config::In) -> Result<show_config::Out> {
        let config = self.ask_runs(move |runs| runs.show_config(&p.items)).await?;
        Ok(show_config::Out { config })
    }

    pub(super) async fn check_config(&self, _: check_config::In) -> Result<check_config::Out> {
        let found = self.ask_runs(|runs| runs.check_config()).await?;
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Ok(check_config::Out {
            errors: found.errors,
            warnings: found.warnings,
            jobs: count(found.jobs),
            destinations: count(found.destinations),
        })
    }

    pub(super) async fn preview_config(&self, p: preview_config::In) -> Result<preview_config::Out> {
        let (items, profiles) = self.ask_runs(move |runs| runs.preview_config(&p.types)).await?;
        Ok(preview_config::Out { items, instance: crate::run::host(), profiles })
    }

    pub(super) async fn export_config(&self, p: export_config::In, fds: Vec<OwnedFd>) -> Result<export_config::Out> {
        let out = writable(fds)?;
        self.ask_runs(move |runs| runs.export_config(&p, out)).await
    }

    pub(super) async fn import_config(&self, p: import_config::In, fds: Vec<OwnedFd>, by: By) -> Result<import_config::Out> {
        if p.only.len() > MAX_NAMES || p.answers.len() > MAX_NAMES {
            return Err(Fault::invalid_parameter("only"));
        }
        let mut files = fds.into_iter().map(File::from);
        let file = files.next().ok_or_else(|| descriptor("the call wants the file to import passed along, open for reading"))?;
        let keys: Vec<File> = files.collect();
        let asked = by.clone();
        let done = self.ask_runs(move |runs| runs.import_config(&p, file, keys, &asked)).await?;
        let message = match done.is_applied {
            true => self.in_force("imported", by.name()).await?,
            false => String::new(),
        };
        Ok(import_config::Out { file: done.file, plan: done.plan, applied: done.is_applied, message })
    }

    pub(super) async fn undo_config(&self, p: undo_config::In, by: By) -> Result<undo_config::Out> {
        let asked = by.clone();
        let done = self.ask_runs(move |runs| runs.undo_config(p.dry_run, p.base.as_deref(), &asked)).await?;
        let message = match done.is_applied {
            true => self.in_force("changed back", by.name()).await?,
            false => String::new(),
        };
        Ok(undo_config::Out { diff: done.diff, base: done.base, applied: done.is_applied, message })
    }

    /// Has the daemon read what was written just now.
    pub(super) async fn in_force(&self, what: &str, by: &str) -> Result<String> {
        tracing::info!(by, "the configuration was {what} by {by}");
        match (self.app.reload)().await {
            Ok((_, text)) => Ok(format!("the configuration was {what}; {text}")),
            // It was checked before: something else went in between.
            Err(text) => Err(super::handlers::failed(format!(
                "the configuration was {what}, and is not in force, since it was refused when it was read again: {text}; 'keepctl config undo' brings back the one from before"
            ))),
        }
    }

    pub(super) async fn start_config_backup(&self, _: start_config_backup::In, by: By) -> Result<start_config_backup::Out> {
        let run = self.ask_runs(move |runs| runs.start_config_backup(&by)).await?;
        Ok(start_config_backup::Out { run })
    }

    pub(super) async fn list_config_backups(&self, p: list_config_backups::In) -> Result<list_config_backups::Out> {
        let (destination, found) = self.ask_runs(move |runs| runs.config_backups(p.destination.as_deref())).await?;
        let info = |s: Stored| ConfigBackupInfo { name: s.name, time: s.time.to_string(), bytes: s.bytes };
        let backups = found.into_iter().map(info).collect();
        Ok(list_config_backups::Out { destination, backups })
    }

    pub(super) async fn fetch_config_backup(&self, p: fetch_config_backup::In, fds: Vec<OwnedFd>) -> Result<fetch_config_backup::Out> {
        let out = writable(fds)?;
        let (name, bytes) = self.ask_runs(move |runs| runs.write_config_backup(p.destination.as_deref(), p.name.as_deref(), out)).await?;
        Ok(fetch_config_backup::Out { name, bytes })
    }
}
