//! What each method does: questions are answered from the ledger and the registry, work is started and followed.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use keepd_protocol::MAX_REPLY_BYTES;
use keepd_protocol::call::errors;
use keepd_protocol::methods::*;
use keepd_protocol::model::*;
use serde::Serialize;
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio::time::{Instant, interval, sleep, sleep_until};

use super::passed::{Passed, descriptor, lent, lent_alone, writable};
use super::service::Control;
use super::transport::{Fault, Replies};
use crate::access::{By, Jobs, Right};
use crate::config::{Config, Job, Retention};
use crate::ledger::{Ledger, LedgerError};
use crate::run::{BackupRequest, CompareRequest, Error, ExportRequest, InPlaceRequest, LoadRequest, RestoreOut, SealFor, SharedMemory};
use crate::schedule::due;

/// Those who watch for long are asked so often whether they still may.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// A follower gets at most ten states a second.
const FOLLOW_EVERY: Duration = Duration::from_millis(100);
/// Without `more` a list must fit into one reply.
const MAX_SINGLE: usize = 1 << 20;

pub(super) type Result<T, E = Fault> = std::result::Result<T, E>;

pub(super) fn failed(message: impl std::fmt::Display) -> Fault {
    Fault::new(errors::FAILED, json!({ "message": message.to_string() }))
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::NotFound { what, name, .. } => Fault::new(errors::NOT_FOUND, json!({ "message": message, "what": what, "name": name })),
            Error::Ambiguous(_) => Fault::new(errors::AMBIGUOUS, json!({ "message": message })),
            Error::NotPermitted(refusal) => refusal.into(),
            Error::Busy(_) => Fault::new(errors::BUSY, json!({ "message": message })),
            Error::ShuttingDown => Fault::new(errors::SHUTTING_DOWN, json!({ "message": message })),
            Error::Failed(_) => failed(message),
        }
    }
}

impl From<LedgerError> for Fault {
    fn from(error: LedgerError) -> Self {
        failed(error)
    }
}

impl Control {
    /// Asks the ledger on a thread that may block.
    pub(super) async fn ask<T: Send + 'static, E: Into<Fault> + Send + 'static>(
        &self,
        question: impl FnOnce(&Ledger) -> std::result::Result<T, E> + Send + 'static,
    ) -> Result<T> {
        let ledger = self.app.ledger.clone();
        tokio::task::spawn_blocking(move || question(&ledger)).await.map_err(failed)?.map_err(Into::into)
    }

    /// Runs a question to the registry that may block.
    pub(super) async fn ask_runs<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Arc<crate::run::Runs>) -> std::result::Result<T, Error> + Send + 'static,
    ) -> Result<T> {
        let runs = self.app.runs.clone();
        tokio::task::spawn_blocking(move || question(&runs)).await.map_err(failed)?.map_err(Into::into)
    }

    fn job_named(&self, name: &str) -> Result<()> {
        let config = self.app.config.get();
        match config.jobs.contains_key(name) {
            true => Ok(()),
            false => {
                let known = config.jobs.keys().cloned().collect::<Vec<_>>().join(", ");
                let message = format!("there is no job '{name}'; configured are: {known}");
                Err(Fault::new(errors::NOT_FOUND, json!({ "message": message, "what": "job", "name": name })))
            }
        }
    }

    pub(super) async fn get_status(&self, p: get_status::In, by: &By) -> Result<get_status::Out> {
        let seen = self.jobs_of(by, Right::View).await?;
        if let Some(job) = &p.job {
            self.job_named(job)?;
        }
        let config = self.app.config.get();
        let app = self.app.clone();
        let (job, only) = (p.job.clone(), seen.clone());
        let (jobs, destinations, coverage, config_backup) = tokio::task::spawn_blocking(move || {
            let is_wanted = |n: &&String| job.as_ref().is_none_or(|j| j == *n) && only.has(n);
            let jobs = config.jobs.keys().filter(is_wanted).map(|n| (app.job_status)(n)).collect();
            let destinations = destinations_seen(app.runs.destinations(), &config, &only, &app.ledger);
            let (coverage, config_backup) = match only {
                Jobs::All => (app.runs.coverage_counts(), (app.config_backup_status)()),
                Jobs::Only(_) => (None, None),
            };
            (jobs, destinations, coverage, config_backup)
        })
        .await
        .map_err(failed)?;
        let running = self.app.runs.active().iter().map(|r| (**r).clone()).filter(|r| p.job.is_none() || r.job == p.job).collect();
        let running = self.runs_seen(running, &seen, by).await?;
        let config = self.app.config.get();
        Ok(get_status::Out {
            status: Status {
                version: env!("CARGO_PKG_VERSION").into(),
                started: self.app.started.to_string(),
                state_dir: config.daemon.state_dir.display().to_string(),
                config: self.app.config_path.display().to_string(),
                jobs,
                running,
                destinations,
                coverage,
                config_backup,
            },
        })
    }

    pub(super) async fn list_jobs(&self, _: list_jobs::In, by: &By) -> Result<list_jobs::Out> {
        let status = self.get_status(get_status::In::default(), by).await?.status;
        Ok(list_jobs::Out { jobs: status.jobs })
    }

    pub(super) async fn show_job(&self, p: show_job::In, by: &By) -> Result<show_job::Out> {
        let only = get_status::In { job: Some(p.job.clone()) };
        let status = self.get_status(only, by).await?.status.jobs.into_iter().next().unwrap_or_default();
        let config = self.app.config.get();
        let Some(job) = config.jobs.get(&p.job) else { return Err(failed("the job was removed just now")) };
        let sources = job
            .sources
            .iter()
            .map(|s| SourceInfo {
                name: s.name.clone(),
                kind: s.kind.word().into(),
                path: String::from_utf8_lossy(&s.kind.place()).into_owned(),
                ..SourceInfo::default()
            })
            .collect();
        let detail = JobDetail {
            status,
            timezone: job.timezone.clone(),
            destinations: job.destinations.clone(),
            sources,
            retention: job.retention.numbers(),
            retry_attempts: job.retry.attempts,
            retry_backoff_seconds: job.retry.backoff.as_secs(),
        };
        Ok(show_job::Out { job: detail })
    }

    pub(super) async fn start_backup(&self, p: start_backup::In, by: By) -> Result<start_backup::Out> {
        let kind = p.r#type.unwrap_or_default();
        if !matches!(kind, BackupType::Manual | BackupType::PreUpdate) {
            return Err(Fault::invalid_parameter("type"));
        }
        if p.labels.len() > 64 || p.labels.iter().any(|(k, v)| k.is_empty() || k.len() > 128 || v.len() > 1024) {
            return Err(Fault::invalid_parameter("labels"));
        }
        if p.name.as_ref().is_some_and(|n| n.len() > 256) {
            return Err(Fault::invalid_parameter("name"));
        }
        if p.description.as_ref().is_some_and(|d| d.len() > 4096) {
            return Err(Fault::invalid_parameter("description"));
        }
        let request =
            BackupRequest { job: p.job, r#type: kind, name: p.name, description: p.description, labels: p.labels, by, attempt: 1 };
        let run = self.ask_runs(move |runs| runs.start_backup(request)).await?;
        Ok(start_backup::Out { run })
    }

    pub(super) async fn start_check(&self, p: start_check::In, fds: Vec<OwnedFd>, by: By) -> Result<start_check::Out> {
        if p.read_data > 100 {
            return Err(Fault::invalid_parameter("read_data"));
        }
        let lent = lent_alone(fds, &p.private_keys).await?;
        let run = self.ask_runs(move |runs| runs.start_check(&p.destination, p.read_data, p.repair, lent, &by)).await?;
        Ok(start_check::Out { run })
    }

    pub(super) async fn start_prune(&self, p: start_prune::In, fds: Vec<OwnedFd>, by: By) -> Result<start_prune::Out> {
        let lent = lent_alone(fds, &p.private_keys).await?;
        let run = self.ask_runs(move |runs| runs.start_prune(&p.destination, p.dry_run, lent, &by)).await?;
        Ok(start_prune::Out { run })
    }

    pub(super) async fn start_re_encrypt(&self, p: start_re_encrypt::In, fds: Vec<OwnedFd>, by: By) -> Result<start_re_encrypt::Out> {
        let lent = lent_alone(fds, &p.private_keys).await?;
        let run = self.ask_runs(move |runs| runs.start_reencrypt(&p.destination, p.drop_slots, lent, &by)).await?;
        Ok(start_re_encrypt::Out { run })
    }

    pub(super) async fn start_delete(&self, p: start_delete::In, by: By) -> Result<start_delete::Out> {
        let run = self.ask_runs(move |runs| runs.start_delete(&p.backup, p.job.as_deref(), p.destination.as_deref(), &by)).await?;
        Ok(start_delete::Out { run })
    }

    pub(super) async fn mark_backup(&self, p: mark_backup::In, by: By) -> Result<mark_backup::Out> {
        let backup = self.ask_runs(move |runs| runs.mark(&p.backup, p.job.as_deref(), p.mark, &by)).await?;
        Ok(mark_backup::Out { backup })
    }

    pub(super) async fn show_retention(&self, p: show_retention::In) -> Result<show_retention::Out> {
        let policy = p.policy.as_ref().map(Retention::from_numbers).transpose().map_err(failed)?;
        let next = |job: &Job, after: Timestamp| match &job.schedule {
            Some(schedule) if job.enabled => due::next_due(schedule, &job.zone(), after, after),
            // By hand: as if once a day.
            _ => after.checked_add(SignedDuration::from_hours(24)).ok(),
        };
        let plans = self.ask_runs(move |runs| runs.plan_retention(&p.job, p.destination.as_deref(), policy.as_ref(), &next)).await?;
        Ok(show_retention::Out { plans })
    }

    pub(super) async fn take_over(&self, p: take_over::In, by: By) -> Result<take_over::Out> {
        let message = self.ask_runs(move |runs| runs.take_over(&p.destination, &by)).await?;
        Ok(take_over::Out { message })
    }

    pub(super) async fn start_copy(&self, p: start_copy::In, fds: Vec<OwnedFd>, by: By) -> Result<start_copy::Out> {
        let lent = lent_alone(fds, &p.private_keys).await?;
        let run = self.ask_runs(move |runs| runs.start_copy(&p.backup, p.job.as_deref(), &p.destination, lent, &by)).await?;
        Ok(start_copy::Out { run })
    }

    pub(super) async fn test_destination(&self, p: test_destination::In) -> Result<test_destination::Out> {
        let findings = self.ask_runs(move |runs| runs.test_destination(&p.destination)).await?;
        Ok(test_destination::Out { findings })
    }

    pub(super) async fn start_retention(&self, p: start_retention::In, by: By) -> Result<start_retention::Out> {
        let run = self.ask_runs(move |runs| runs.start_retention(&p.job, p.destination.as_deref(), &by)).await?;
        Ok(start_retention::Out { run })
    }

    pub(super) async fn start_restore(&self, p: start_restore::In, fds: Vec<OwnedFd>, by: By) -> Result<start_restore::Out> {
        let mut passed = Passed::from(fds);
        let memory = match (p.memory, p.returned) {
            (None, None) => None,
            (Some(memory), Some(returned)) => {
                let (memory, returned) = (passed.take(memory, "memory")?, passed.take(returned, "returned")?);
                Some(SharedMemory::new(memory, returned).map_err(descriptor)?)
            }
            (Some(_), None) => return Err(Fault::invalid_parameter("returned")),
            (None, Some(_)) => return Err(Fault::invalid_parameter("memory")),
        };
        let (lent, left) = lent(passed, &p.private_keys).await?;
        let out = RestoreOut { frames: writable(left)?, memory };
        let paths = p.paths.iter().map(BytesPath::to_bytes).collect::<std::result::Result<Vec<_>, _>>();
        let paths = paths.map_err(|_| Fault::invalid_parameter("paths"))?;
        let started = self.app.runs.start_restore(&p.backup, p.job.as_deref(), paths, out, lent, &by).await?;
        Ok(start_restore::Out { run: started.run, backup: started.backup, entries: started.entries, bytes: started.bytes })
    }

    pub(super) async fn start_load(&self, p: start_load::In, fds: Vec<OwnedFd>, by: By) -> Result<start_load::Out> {
        let request = LoadRequest {
            source: p.source,
            database: p.database,
            target: p.target,
            tables: p.tables,
            replace: p.replace,
            owners: !p.no_owner,
        };
        let lent = lent_alone(fds, &p.private_keys).await?;
        let run = self.app.runs.start_load(&p.backup, p.job.as_deref(), request, lent, &by).await?;
        Ok(start_load::Out { run })
    }

    pub(super) async fn start_in_place(&self, p: start_in_place::In, fds: Vec<OwnedFd>, by: By) -> Result<start_in_place::Out> {
        let paths = p.paths.iter().map(BytesPath::to_bytes).collect::<std::result::Result<_, _>>();
        let request = InPlaceRequest {
            sources: p.sources,
            paths: paths.map_err(|_| Fault::invalid_parameter("paths"))?,
            database: p.database,
            tables: p.tables,
            owners: !p.no_owner,
            safety: !p.no_safety,
            dry_run: p.dry_run,
            is_undo: false,
            notes: Vec::new(),
        };
        let lent = lent_alone(fds, &p.private_keys).await?;
        let run = self.ask_runs(move |runs| runs.start_in_place(&p.backup, p.job.as_deref(), request, lent, &by)).await?;
        Ok(start_in_place::Out { run })
    }

    pub(super) async fn start_undo(&self, p: start_undo::In, fds: Vec<OwnedFd>, by: By) -> Result<start_undo::Out> {
        let lent = lent_alone(fds, &p.private_keys).await?;
        let (run, backup) = self.ask_runs(move |runs| runs.start_undo(&p.run, p.dry_run, lent, &by)).await?;
        Ok(start_undo::Out { run, backup })
    }

    pub(super) async fn start_cat(&self, p: start_cat::In, fds: Vec<OwnedFd>, by: By) -> Result<start_cat::Out> {
        let (lent, left) = lent(fds, &p.private_keys).await?;
        let out = writable(left)?;
        let path = p.path.to_bytes().map_err(|_| Fault::invalid_parameter("path"))?;
        let (run, bytes) = self.app.runs.start_cat(&p.backup, p.job.as_deref(), path, out, lent, &by).await?;
        Ok(start_cat::Out { run, bytes })
    }

    pub(super) async fn start_export(&self, p: start_export::In, fds: Vec<OwnedFd>, by: By) -> Result<start_export::Out> {
        let (lent, mut left) = lent(fds, &p.private_keys).await?;
        let wanted = 1 + usize::from(p.fresh_key);
        if left.len() != wanted {
            return Err(descriptor(
                "the call wants the file or pipe to write to passed along, and with fresh_key one for the key after it",
            ));
        }
        let key = if p.fresh_key { left.pop().map(|fd| writable(vec![fd])).transpose()? } else { None };
        let seal = match (p.profile, key) {
            (Some(_), Some(_)) => return Err(descriptor("an archive is sealed for a profile or with a fresh key, not both")),
            (Some(name), None) => SealFor::Profile(name),
            (None, Some(key)) => SealFor::Fresh(key),
            (None, None) => SealFor::Nobody,
        };
        let out = writable(left)?;
        let paths = p.paths.iter().map(BytesPath::to_bytes).collect::<std::result::Result<Vec<_>, _>>();
        let paths = paths.map_err(|_| Fault::invalid_parameter("paths"))?;
        let asked = ExportRequest { paths, compression: p.compression, seal };
        let (run, backup, bytes) = self.app.runs.start_export(&p.backup, p.job.as_deref(), asked, out, lent, &by).await?;
        Ok(start_export::Out { run, backup, bytes })
    }

    pub(super) async fn start_compare(&self, p: start_compare::In, fds: Vec<OwnedFd>, by: By) -> Result<start_compare::Out> {
        let (lent, left) = lent(fds, &p.private_keys).await?;
        let out = writable(left)?;
        let paths = p.paths.iter().map(BytesPath::to_bytes).collect::<std::result::Result<Vec<_>, _>>();
        let paths = paths.map_err(|_| Fault::invalid_parameter("paths"))?;
        let request = CompareRequest { paths, deep: p.deep };
        let (run, backup) = self.app.runs.start_compare(&p.backup, p.job.as_deref(), request, out, lent, &by).await?;
        Ok(start_compare::Out { run, backup })
    }

    pub(super) async fn follow_run(&self, p: follow_run::In, by: &By, replies: &mut Replies<'_>) -> Result<follow_run::Out> {
        let Some(mut changes) = self.app.runs.follow(&p.run) else {
            return Ok(follow_run::Out { run: self.ended_run(&p.run).await? });
        };
        loop {
            let run = (**changes.borrow_and_update()).clone();
            if run.state.is_finished() || !replies.more() {
                return Ok(follow_run::Out { run });
            }
            if !replies.send(&follow_run::Out { run }).await {
                return Err(failed("the follower went away"));
            }
            let next = Instant::now() + FOLLOW_EVERY;
            let mut gone = loop {
                tokio::select! {
                    changed = changes.changed() => break changed.is_err(),
                    () = sleep(ASK_AGAIN) => self.still(by).await?,
                }
            };
            self.still(by).await?;
            // The last state is never kept back.
            while !gone && Instant::now() < next && !changes.borrow().state.is_finished() {
                tokio::select! {
                    () = sleep_until(next) => {}
                    changed = changes.changed() => gone = changed.is_err(),
                }
            }
            if gone {
                let last = (**changes.borrow()).clone();
                let run = if last.state.is_finished() { last } else { self.ended_run(&p.run).await? };
                return Ok(follow_run::Out { run });
            }
        }
    }

    pub(super) async fn ended_run(&self, id: &str) -> Result<Run> {
        let name = id.to_owned();
        let found = self.ask(move |ledger| ledger.run(&name)).await?;
        found.ok_or_else(|| {
            let message = format!("there is no run '{id}'; 'keepctl run list' shows them");
            Fault::new(errors::NOT_FOUND, json!({ "message": message, "what": "run", "name": id }))
        })
    }

    pub(super) async fn cancel_run(&self, p: cancel_run::In) -> Result<cancel_run::Out> {
        if !self.app.runs.cancel(&p.run) {
            let run = self.ended_run(&p.run).await?;
            return Err(failed(format!("run {} has ended already ({})", run.id, run.state)));
        }
        Ok(cancel_run::Out {})
    }

    pub(super) async fn list_runs(&self, p: list_runs::In, by: &By) -> Result<list_runs::Out> {
        let limit = p.limit.unwrap_or(20).clamp(1, 1000);
        let seen = self.jobs_of(by, Right::View).await?;
        let (job, only) = (p.job.clone(), seen.clone());
        // What keepd did by itself is nobody's own.
        let own = Some(by.name().to_owned()).filter(|name| !matches!(name.as_str(), "schedule" | "keepd"));
        let mut runs = self
            .ask(move |ledger| match only {
                Jobs::All => ledger.runs(job.as_deref(), limit),
                Jobs::Only(jobs) => ledger.runs_of(&jobs, own.as_deref(), job.as_deref(), limit),
            })
            .await?;
        // What lives is newer than what the ledger has of it.
        for live in self.app.runs.active() {
            if let Some(known) = runs.iter_mut().find(|r| r.id == live.id) {
                *known = (*live).clone();
            }
        }
        let mut runs = self.runs_seen(runs, &seen, by).await?;
        runs.truncate(limit as usize);
        for run in &mut runs {
            run.messages.clear();
        }
        Ok(list_runs::Out { runs })
    }

    pub(super) async fn show_run(&self, p: show_run::In) -> Result<show_run::Out> {
        let live = self.app.runs.follow(&p.run).map(|changes| (**changes.borrow()).clone());
        let run = match live {
            Some(run) => run,
            None => self.ended_run(&p.run).await?,
        };
        Ok(show_run::Out { run })
    }

    pub(super) async fn list_backups(&self, p: list_backups::In, by: &By, replies: &mut Replies<'_>) -> Result<list_backups::Out> {
        let seen = self.jobs_of(by, Right::View).await?;
        if let Some(job) = p.job.as_ref().filter(|j| !self.app.config.get().jobs.contains_key(*j)) {
            // A job that was removed from the configuration may still have backups.
            let name = job.clone();
            if self.ask(move |ledger| ledger.backups(Some(&name), None)).await?.is_empty() {
                self.job_named(job)?;
            }
        }
        if let Some(name) = p.destination.as_ref().filter(|d| !self.app.config.get().destinations.contains_key(*d)) {
            let message = format!("there is no destination '{name}'");
            return Err(Fault::new(errors::NOT_FOUND, json!({ "message": message, "what": "destination", "name": name })));
        }
        let (job, destination) = (p.job.clone(), p.destination.clone());
        let mut all = self.ask_runs(move |runs| runs.backups(job.as_deref(), destination.as_deref())).await?;
        all.retain(|b| {
            seen.has(&b.job)
                && p.r#type.is_none_or(|t| t == b.r#type)
                && p.name.as_ref().is_none_or(|n| b.name.as_ref() == Some(n))
                && p.version.as_ref().is_none_or(|v| b.version.as_ref() == Some(v))
                && p.labels.iter().all(|(key, value)| b.labels.get(key) == Some(value))
        });
        let backups = pages(all, replies, |backups| list_backups::Out { backups }).await?;
        Ok(list_backups::Out { backups })
    }

    pub(super) async fn show_backup(&self, p: show_backup::In) -> Result<show_backup::Out> {
        let backup = self.ask_runs(move |runs| runs.backup_detail(&p.backup, p.job.as_deref())).await?;
        Ok(show_backup::Out { backup })
    }

    pub(super) async fn list_entries(&self, p: list_entries::In, replies: &mut Replies<'_>) -> Result<list_entries::Out> {
        let path = p.path.as_ref().map(BytesPath::to_bytes).transpose().map_err(|_| Fault::invalid_parameter("path"))?;
        let batches = self.ask_runs(move |runs| runs.list_entries(&p.backup, p.job.as_deref(), path, p.recursive)).await?;
        let entries = stream(batches, replies, |entries| list_entries::Out { entries }).await?;
        Ok(list_entries::Out { entries })
    }

    pub(super) async fn diff_backups(&self, p: diff_backups::In, replies: &mut Replies<'_>) -> Result<diff_backups::Out> {
        let batches = self.ask_runs(move |runs| runs.diff(&p.a, &p.b, p.job.as_deref())).await?;
        let changes = stream(batches, replies, |changes| diff_backups::Out { changes }).await?;
        Ok(diff_backups::Out { changes })
    }

    pub(super) async fn watch(&self, _: watch::In, by: &By, replies: &mut Replies<'_>) -> Result<watch::Out> {
        if !replies.more() {
            return Err(Fault::new("org.varlink.service.ExpectedMore", json!({})));
        }
        let mut events = self.app.events.subscribe();
        let mut again = interval(ASK_AGAIN);
        loop {
            let received = tokio::select! {
                received = events.recv() => received,
                // Also where nothing happens: who may watch no longer, is told so.
                _ = again.tick() => {
                    self.jobs_of(by, Right::View).await?;
                    continue;
                }
            };
            let event = match received {
                Ok(event) => event,
                Err(RecvError::Lagged(n)) => {
                    return Err(failed(format!("{n} events were missed, for they were not taken in time; watch again")));
                }
                Err(RecvError::Closed) => return Err(Fault::new(errors::SHUTTING_DOWN, json!({ "message": "keepd is stopping" }))),
            };
            let seen = self.jobs_of(by, Right::View).await?;
            if !self.event_seen(&event, &seen, by).await? {
                continue;
            }
            if !replies.send(&watch::Out { event }).await {
                return Err(failed("the watcher went away"));
            }
        }
    }

    pub(super) async fn reload(&self, _: reload::In) -> Result<reload::Out> {
        match (self.app.reload)().await {
            Ok((jobs, message)) => Ok(reload::Out { jobs, message }),
            Err(message) => Err(Fault::new(errors::CONFIG_INVALID, json!({ "message": message }))),
        }
    }

    pub(super) async fn start_coverage(&self, p: start_coverage::In, by: By) -> Result<start_coverage::Out> {
        let run = self.ask_runs(move |runs| runs.start_coverage(p.all, &by)).await?;
        Ok(start_coverage::Out { run })
    }

    pub(super) async fn get_coverage(&self, _: get_coverage::In, replies: &mut Replies<'_>) -> Result<get_coverage::Out> {
        let mut coverage = self.ask_runs(|runs| runs.coverage()).await?;
        let all = std::mem::take(&mut coverage.items);
        let page = |items| get_coverage::Out { coverage: Coverage { items, ..coverage.clone() } };
        let items = pages(all, replies, page).await?;
        Ok(get_coverage::Out { coverage: Coverage { items, ..coverage } })
    }

    pub(super) async fn acknowledge_coverage(&self, p: acknowledge_coverage::In, by: By) -> Result<acknowledge_coverage::Out> {
        if p.all != p.items.is_empty() {
            return Err(Fault::invalid_parameter("items"));
        }
        let acknowledged = self.ask_runs(move |runs| runs.acknowledge_coverage(&p.items, p.undo, &by)).await?;
        Ok(acknowledge_coverage::Out { acknowledged })
    }

    pub(super) async fn start_drill(&self, p: start_drill::In, fds: Vec<OwnedFd>, by: By) -> Result<start_drill::Out> {
        let lent = lent_alone(fds, &p.private_keys).await?;
        let started = self.ask_runs(move |runs| runs.start_drill(p.backup.as_deref(), p.job.as_deref(), lent, &by)).await?;
        Ok(start_drill::Out { run: started.run, backup: started.backup })
    }
}

/// The destinations of these jobs, with what is told of them.
fn destinations_seen(all: Vec<DestinationStatus>, config: &Config, seen: &Jobs, ledger: &Ledger) -> Vec<DestinationStatus> {
    let Jobs::Only(names) = seen else { return all };
    let own: BTreeSet<&String> = names.iter().filter_map(|name| config.jobs.get(name)).flat_map(|job| &job.destinations).collect();
    let mut list: Vec<DestinationStatus> = all.into_iter().filter(|d| own.contains(&d.name)).collect();
    for destination in &mut list {
        destination.missing.retain(|job, _| names.contains(job));
        destination.overdue.retain(|job| names.contains(job));
        // Where it is and what it holds of others is theirs.
        let backups = |job: &String| ledger.backups_at(job, &destination.name).map_or(0, |backups| backups.len() as u64);
        let last_good = |job: &String| ledger.last_good(Some(job), &[&destination.name]).ok().flatten();
        (destination.backups, destination.last_good) =
            (names.iter().map(backups).sum(), names.iter().filter_map(last_good).max().map(|time| time.to_string()));
        destination.location.clear();
        destination.fingerprint = None;
        destination.traffic = Traffic::default();
        destination.error = destination.error.take().map(|_| "the last contact did not go well; an administrator sees why".into());
    }
    list
}

fn length(item: &impl Serialize) -> usize {
    serde_json::to_vec(item).map_or(0, |v| v.len() + 1)
}

/// Sends a list in replies of bounded length; returns what belongs into the last one.
async fn pages<T: Serialize, O: Serialize>(list: Vec<T>, replies: &mut Replies<'_>, wrap: impl Fn(Vec<T>) -> O) -> Result<Vec<T>> {
    let (mut page, mut bytes) = (Vec::new(), 0);
    for item in list {
        let len = length(&item);
        if bytes + len > if replies.more() { MAX_REPLY_BYTES } else { MAX_SINGLE } {
            if !replies.more() {
                return Err(too_long());
            }
            if !replies.send(&wrap(std::mem::take(&mut page))).await {
                return Err(failed("the caller went away"));
            }
            bytes = 0;
        }
        bytes += len;
        page.push(item);
    }
    Ok(page)
}

fn too_long() -> Fault {
    failed("the list is longer than one reply may be; ask with 'more'")
}

/// Passes batches on as they come.
async fn stream<T: Serialize, O: Serialize>(
    mut batches: mpsc::Receiver<std::result::Result<Vec<T>, Error>>,
    replies: &mut Replies<'_>,
    wrap: impl Fn(Vec<T>) -> O,
) -> Result<Vec<T>> {
    let (mut page, mut bytes) = (Vec::new(), 0);
    while let Some(batch) = batches.recv().await {
        for item in batch? {
            bytes += length(&item);
            page.push(item);
        }
        if bytes > MAX_REPLY_BYTES / 2 && replies.more() {
            if !replies.send(&wrap(std::mem::take(&mut page))).await {
                return Err(failed("the caller went away"));
            }
            bytes = 0;
        }
        if bytes > MAX_SINGLE {
            return Err(too_long());
        }
    }
    Ok(page)
}
