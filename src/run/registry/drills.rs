//! Drills, started by hand and by the calendar.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use keepd_protocol::model::{Backup, BackupType, Outcome, RunKind};
use tokio_util::sync::CancellationToken;

use super::{Error, Result, Runs, Work, job_named, lock};
use crate::access::By;
use crate::config::Job;
use crate::crypto::{self, Lent};
use crate::run::backup::short;
use crate::run::destination;
use crate::run::drill::{self, Request};
use crate::run::readable::Reading;

/// Of so many scheduled drills one is of an older backup.
const OLDER_EVERY: u64 = 4;

/// A drill that is queued.
#[derive(Debug, Clone, PartialEq)]
pub struct DrillStarted {
    pub run: String,
    pub backup: String,
}

impl Runs {
    /// Queues a drill of a backup, or of the newest good one of a job; without either, of the only job there is. Blocks.
    pub fn start_drill(self: &Arc<Self>, backup: Option<&str>, job: Option<&str>, lent: Lent, by: &By) -> Result<DrillStarted> {
        let config = self.config.get();
        let only = || match config.jobs.keys().collect::<Vec<_>>().as_slice() {
            [one] => Ok((*one).clone()),
            jobs => {
                let jobs = jobs.iter().map(|j| j.as_str()).collect::<Vec<_>>().join(", ");
                Err(Error::Ambiguous(format!("say which backup, or which job; configured are: {jobs}")))
            }
        };
        let found = match (backup, job) {
            (Some(backup), job) => self.resolve(backup, job)?,
            (None, Some(job)) => {
                job_named(&config, job)?;
                self.resolve("latest", Some(job))?
            }
            (None, None) => self.resolve("latest", Some(&only()?))?,
        };
        self.drill(found, lent, by, None)
    }

    /// Queues a drill. `calendar`: how many the job's calendar had before this one.
    fn drill(self: &Arc<Self>, mut found: Backup, lent: Lent, by: &By, calendar: Option<u64>) -> Result<DrillStarted> {
        let env = self.environment_with(lent);
        destination::mark_unconfigured(&env.config, &mut found);
        let job = job_named(&env.config, &found.job)
            .map_err(|_| {
                let text = format!(
                    "backup {} is of job {}, which is no longer configured: what a drill may take and what must hold stands there",
                    short(&found.id),
                    found.job
                );
                Error::NotFound { what: "job", name: found.job.clone(), text }
            })?
            .clone();
        let sources = self.ledger.backup_detail(&found.id)?.map(|d| d.sources).unwrap_or_default();
        let planned = drill::plan(&job, &sources, &CancellationToken::new());
        let work = Work {
            kind: RunKind::Drill,
            job: Some(job.name.clone()),
            destinations: found.destinations.iter().find(|p| p.is_configured()).map(|p| p.name.clone()).into_iter().collect(),
            backup: Some(found.id.clone()),
            by: by.clone(),
            attempt: 1,
            // One at a time, and beside nobody who works on a server that is used.
            alone: std::iter::once("drill".to_owned()).chain(planned.iter().filter_map(|p| p.lock())).collect(),
        };
        let (runs, id, began) = (self.clone(), found.id.clone(), Timestamp::now());
        let run = self.start(work, move |live| {
            let mut tried = Vec::new();
            let reading = Reading::Contents(Vec::new());
            let open = || runs.open_beside(&env, &found, &[], &reading);
            let another = &mut || {
                if tried.is_empty() {
                    tried.extend(live.snapshot().destination);
                }
                runs.another_place(&env, &found, &mut tried, &reading)
            };
            let name = job.name.clone();
            let request = Request { job, backup: found.clone(), planned };
            let ended = drill::drill(&env, request, open, another, &|name| runs.keep_readable(name), live);
            // One that could not be tried is tried again at the next look.
            if let Some(count) = calendar.filter(|_| ended.tried) {
                env.ledger.set_note(&due_note(&name), &began.as_second().to_string())?;
                env.ledger.set_note(&count_note(&name), &(count + 1).to_string())?;
            }
            ended.result
        })?;
        Ok(DrillStarted { run, backup: id })
    }

    /// How often jobs are drilled by the calendar.
    pub fn drill_periods(&self) -> Vec<Duration> {
        self.config.get().jobs.values().filter(|j| j.enabled).filter_map(|j| j.drill.every).collect()
    }

    /// Queues a drill of every job for which the last one that could be tried is long enough ago. Blocks.
    pub fn start_due_drills(self: &Arc<Self>) -> Result<()> {
        let config = self.config.get();
        for job in config.jobs.values().filter(|j| j.enabled) {
            let Some(every) = job.drill.every else { continue };
            let works =
                |r: &keepd_protocol::model::Run| r.job.as_ref() == Some(&job.name) && matches!(r.kind, RunKind::Drill | RunKind::Backup);
            if lock(&self.live).values().any(|l| works(&l.snapshot())) || !self.is_due(&due_note(&job.name), every)? {
                continue;
            }
            let count = self.ledger.note(&count_note(&job.name))?.and_then(|n| n.parse().ok()).unwrap_or(0u64);
            let Some(backup) = self.whose_turn(job, count)? else { continue };
            // What a private key alone opens is drilled by hand (the check of the configuration says so).
            if config.are_write_only(backup.destinations.iter().map(|p| p.name.as_str())) {
                continue;
            }
            match self.drill(backup, Lent::default(), &By::schedule(), Some(count)) {
                Ok(started) => tracing::info!(job = %job.name, run = %started.run, "a drill was started by the schedule"),
                Err(Error::Busy(_)) => {}
                Err(Error::ShuttingDown) => return Ok(()),
                Err(e) => tracing::warn!(job = %job.name, "the drill could not be started: {e}"),
            }
        }
        Ok(())
    }

    /// The newest good backup, and now and then a random older one; None when there is none.
    fn whose_turn(&self, job: &Job, count: u64) -> Result<Option<Backup>> {
        let Some(newest) = self.ledger.latest(Some(&job.name), &self.config.get().places())? else { return Ok(None) };
        if count % OLDER_EVERY != OLDER_EVERY - 1 {
            return Ok(Some(newest));
        }
        let mut older = self.backups(Some(&job.name), None)?;
        older.retain(|b| {
            b.id != newest.id
                && b.outcome == Outcome::Good
                && b.is_at_hand()
                && !matches!(b.r#type, BackupType::PreRestore | BackupType::Imported)
        });
        let random: [u8; 8] = crypto::random().map_err(|e| Error::Failed(e.to_string()))?;
        let at = u64::from_le_bytes(random).checked_rem(older.len() as u64);
        Ok(Some(at.map_or(newest, |at| older.swap_remove(at as usize))))
    }
}

/// When the last drill began that could be tried, in seconds since 1970.
fn due_note(job: &str) -> String {
    format!("drill of {job}")
}

/// How many there were by the calendar.
fn count_note(job: &str) -> String {
    format!("drills of {job}")
}
