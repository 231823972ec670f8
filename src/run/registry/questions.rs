//! What can be asked: backups, destinations, retention.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use keepd_protocol::model::{
    Backup, BackupDetail, BackupType, Change, Coverage, CoverageCounts, DestinationStatus, EntryInfo, RetentionPlan,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Error, Result, Runs, lock};
use crate::access::By;
use crate::config::{Config, Destination, Job, Retention};
use crate::profile;
use crate::run::backup::{Environment, short};
use crate::run::live::Failure;
use crate::run::readable::{self, Reading};
use crate::run::{archived, browse, catalogue, copy, coverage, destination, restore, retain};

impl Runs {
    /// Destinations that are checked a few packs at a time, with the period.
    pub fn rolling_checks(&self) -> BTreeMap<String, Duration> {
        let config = self.config.get();
        config.destinations.iter().filter_map(|(name, d)| Some((name.clone(), d.check_every?))).collect()
    }

    /// What a job's retention, or the `policy` given, would do at each of its destinations. `next`: when the job is due after a time.
    pub fn plan_retention(
        &self,
        job: &str,
        destination: Option<&str>,
        policy: Option<&Retention>,
        next: &dyn Fn(&Job, Timestamp) -> Option<Timestamp>,
    ) -> Result<Vec<RetentionPlan>> {
        let env = self.environment();
        let (job, targets) = self.job_at(&env.config, job, destination)?;
        targets.into_iter().map(|target| Ok(retain::plan(&env.ledger, job, target, policy, &|after| next(job, after))?)).collect()
    }

    /// Where a changed retention would remove more than before and is held back, in words. What cannot be told is logged.
    pub fn held_back(&self) -> Vec<String> {
        let config = self.config.get();
        let mut notes = Vec::new();
        for job in config.jobs.values() {
            for target in job.destinations.iter().filter_map(|name| config.destinations.get(name)) {
                match retain::held_back(&self.ledger, job, target) {
                    Ok(note) => notes.extend(note),
                    Err(e) => tracing::warn!(job = %job.name, "what its retention would remove is not known: {e}"),
                }
            }
        }
        notes
    }

    /// The entries at or below a path, in batches; the receiver ends with the list, an error is its last item.
    pub fn list_entries(
        self: &Arc<Self>,
        backup: &str,
        job: Option<&str>,
        path: Option<Vec<u8>>,
        recursive: bool,
    ) -> Result<mpsc::Receiver<Result<Vec<EntryInfo>>>> {
        let found = self.resolve(backup, job)?;
        let runs = self.clone();
        Ok(self.answer(move |emit| {
            let place = runs.open_backup(&found)?;
            Ok(browse::list(&place.repository, &place.manifest, path, recursive, emit)?)
        }))
    }

    /// What differs between two backups, in batches.
    pub fn diff(self: &Arc<Self>, a: &str, b: &str, job: Option<&str>) -> Result<mpsc::Receiver<Result<Vec<Change>>>> {
        let (a, b) = (self.resolve(a, job)?, self.resolve(b, job)?);
        let runs = self.clone();
        Ok(self.answer(move |emit| {
            let (left, right) = (runs.open_backup(&a)?, runs.open_backup(&b)?);
            let left_side = browse::Side { repository: &left.repository, manifest: &left.manifest };
            let right_side = browse::Side { repository: &right.repository, manifest: &right.manifest };
            Ok(browse::diff(&left_side, &right_side, emit)?)
        }))
    }

    /// Runs a question on a blocking thread; its answers come through a bounded channel.
    fn answer<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut dyn FnMut(Vec<T>) -> bool) -> Result<()> + Send + 'static,
    ) -> mpsc::Receiver<Result<Vec<T>>> {
        let (sender, receiver) = mpsc::channel(4);
        self.runtime.spawn_blocking(move || {
            let mut emit = |batch: Vec<T>| batch.is_empty() || sender.blocking_send(Ok(batch)).is_ok();
            if let Err(e) = work(&mut emit) {
                let _ = sender.blocking_send(Err(e));
            }
        });
        receiver
    }

    /// What is known of backups, newest first, of a job or of all, and of those at a destination; also of what lies only where keepd no longer asks.
    pub fn backups(&self, job: Option<&str>, at: Option<&str>) -> Result<Vec<Backup>> {
        let config = self.config.get();
        let mut all = self.ledger.backups(job, at)?;
        all.iter_mut().for_each(|backup| destination::mark_unconfigured(&config, backup));
        Ok(all)
    }

    /// A backup by id, unique prefix, or `latest`, which lies at a destination that is configured.
    pub fn resolve(&self, backup: &str, job: Option<&str>) -> Result<Backup> {
        let absent = |text: String| Error::NotFound { what: "backup", name: backup.to_owned(), text };
        let config = self.config.get();
        let marked = |mut found: Backup| {
            destination::mark_unconfigured(&config, &mut found);
            found
        };
        if backup == "latest" {
            if let Some(found) = self.ledger.latest(job, &config.places())? {
                return Ok(marked(found));
            }
            let of = job.map(|j| format!(" of job {j}")).unwrap_or_default();
            let is_away = self.backups(job, None)?.iter().any(|b| !b.is_at_hand());
            let which = if is_away { "at a destination that is configured" } else { "yet" };
            return Err(absent(format!("there is no good backup{of} {which}")));
        }
        let hex = !backup.is_empty() && backup.len() <= 64 && backup.bytes().all(|b| b.is_ascii_hexdigit());
        if !hex {
            return Err(absent(format!(
                "'{backup}' is no backup: give an id as 'keepctl list' shows it, a unique start of one, or 'latest'"
            )));
        }
        let mut found = self.ledger.backups_by_prefix(&backup.to_ascii_lowercase(), job)?;
        match found.len() {
            0 => Err(absent(format!("there is no backup whose id starts with {backup}; 'keepctl list' shows what there is"))),
            1 => Ok(marked(found.remove(0))),
            _ => Err(Error::Ambiguous(format!("several backups' ids start with {backup}; give more of it"))),
        }
    }

    /// The same among the backups of these jobs; None: there is no such one, or it is of another job.
    pub fn resolve_among(&self, backup: &str, jobs: &[String]) -> Result<Option<Backup>> {
        let mut found: Vec<Backup> = Vec::new();
        let mut none = None;
        for job in jobs {
            match self.resolve(backup, Some(job)) {
                Ok(one) if found.iter().all(|other| other.id != one.id) => found.push(one),
                Ok(_) => {}
                Err(e @ Error::NotFound { .. }) => none = Some(e),
                Err(e) => return Err(e),
            }
        }
        if backup == "latest" {
            // As the ledger has it: an imported one where there is no other.
            let time = |b: &Backup| b.time.parse::<Timestamp>().ok();
            let newest = found.into_iter().max_by_key(|b| (b.r#type != BackupType::Imported, time(b)));
            return match (newest, none) {
                (None, Some(none)) if jobs.len() == 1 => Err(none),
                (None, _) => {
                    let text = format!("there is no good backup of {} yet", jobs.join(", "));
                    Err(Error::NotFound { what: "backup", name: backup.to_owned(), text })
                }
                (newest, _) => Ok(newest),
            };
        }
        match found.len() {
            0 | 1 => Ok(found.pop()),
            _ => Err(Error::Ambiguous(format!("several backups' ids start with {backup}; give more of it"))),
        }
    }

    pub fn backup_detail(&self, backup: &str, job: Option<&str>) -> Result<BackupDetail> {
        let found = self.resolve(backup, job)?;
        let mut detail = self.ledger.backup_detail(&found.id)?.ok_or_else(|| Error::NotFound {
            what: "backup",
            name: found.id.clone(),
            text: format!("backup {} is gone", found.id),
        })?;
        detail.backup = found;
        Ok(detail)
    }

    /// Opens a backup for what its entries say alone, without its contents.
    pub(super) fn open_backup(&self, backup: &Backup) -> Result<restore::Place> {
        Ok(self.open_beside(&self.environment(), backup, &[], &Reading::Names)?)
    }

    /// A place of a backup that was not tried yet; it is noted as tried.
    pub(super) fn another_place(
        &self,
        env: &Environment,
        backup: &Backup,
        tried: &mut Vec<String>,
        reading: &Reading,
    ) -> Option<restore::Place> {
        let opened = self.open_beside(env, backup, tried, reading);
        let place = opened.map_err(|e| tracing::warn!("no other copy can be read: {e}")).ok()?;
        tried.push(place.destination.clone());
        Some(place)
    }

    /// Opens a backup at the best place that is not among `tried` and from which all can be read that is wanted; what every place lacks is damage.
    pub(super) fn open_beside(
        &self,
        env: &Environment,
        backup: &Backup,
        tried: &[String],
        reading: &Reading,
    ) -> Result<restore::Place, Failure> {
        let (mut errors, mut is_damage, mut needs_key) = (Vec::new(), true, false);
        for target in destination::best_first(&env.config, backup).into_iter().filter(|d| !tried.contains(&d.name)) {
            // Before it is opened: its keys must not be exchanged in between.
            let _reading = self.keep_readable(&target.name);
            if archived::is(target) {
                // Questions end when they are answered; runs that are cancelled are told by what they read then.
                match archived::stage::place(env, target, &backup.id, reading, _reading, &CancellationToken::new()) {
                    Ok(place) => return Ok(place),
                    Err(e) => {
                        is_damage &= matches!(e, Failure::Damaged(_));
                        needs_key |= matches!(e, Failure::NeedsKey(_));
                        errors.push(e.to_string());
                        continue;
                    }
                }
            }
            let opened = destination::open(env, target, false).and_then(|repository| {
                for problem in repository.sync_index()? {
                    tracing::warn!("{problem}");
                }
                let object = catalogue::object(&env.ledger, &target.name, &backup.id)?;
                let manifest = repository.read_manifest(&object).map_err(restore::unreadable)?;
                readable::check(&repository, &manifest, reading, &target.name)?;
                Ok((repository, manifest))
            });
            match opened {
                Ok((repository, manifest)) => {
                    return Ok(restore::Place { repository, manifest, destination: target.name.clone(), _reading });
                }
                Err(e) => {
                    is_damage &= matches!(e, Failure::Damaged(_));
                    needs_key |= matches!(e, Failure::NeedsKey(_));
                    errors.push(e.to_string());
                }
            }
        }
        if errors.is_empty() {
            is_damage = false;
            let names = backup.destinations.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(", ");
            errors.push(match tried.is_empty() {
                true => format!("its destinations ({names}) are no longer configured"),
                false => format!("no other destination than {} has it", tried.join(", ")),
            });
        }
        let text = format!("backup {} cannot be opened: {}", short(&backup.id), errors.join("; "));
        Err(match () {
            () if needs_key => Failure::NeedsKey(text),
            () if is_damage => Failure::Damaged(text),
            () => Failure::Failed(text),
        })
    }

    /// The same from an async caller.
    pub(super) async fn open_for(self: &Arc<Self>, env: &Arc<Environment>, backup: Backup, reading: Reading) -> Result<restore::Place> {
        let (runs, env) = (self.clone(), env.clone());
        let opened = tokio::task::spawn_blocking(move || runs.open_beside(&env, &backup, &[], &reading)).await;
        Ok(opened.map_err(|e| Error::Failed(e.to_string()))??)
    }

    pub fn destinations(&self) -> Vec<DestinationStatus> {
        let config = self.config.get();
        let problems = lock(&self.problems).clone();
        let mut list = Vec::new();
        for (name, target) in &config.destinations {
            list.push(DestinationStatus {
                name: name.clone(),
                service: target.service.clone(),
                location: destination::location(target),
                encryption: target.encryption.clone().unwrap_or_else(|| "none".into()),
                fingerprint: target.encryption.as_ref().and_then(|name| profile::fingerprint(config.encryption.get(name)?)),
                compression: format!("{:?}", target.compression).to_lowercase(),
                backups: self.ledger.count_backups(name).unwrap_or_default(),
                last_good: self.ledger.last_good(None, &[name]).ok().flatten().map(|t| t.to_string()),
                error: problems.get(name).map(|(_, text)| text.clone()),
                missing: self.missing_at(&config, target),
                overdue: self.overdue_at(&config, target),
                traffic: destination::traffic(target),
            });
        }
        list
    }

    /// By job, how many backups a destination lacks.
    fn missing_at(&self, config: &Config, target: &Destination) -> BTreeMap<String, u64> {
        let jobs = config.jobs.values().filter(|job| job.destinations.contains(&target.name));
        let count = |job: &Job| copy::missing(&self.ledger, config, job, target).map_or(0, |missing| missing.len() as u64);
        jobs.map(|job| (job.name.clone(), count(job))).filter(|(_, count)| *count > 0).collect()
    }

    /// The jobs whose newest good backup at a destination is older than the destination's `max_age`.
    fn overdue_at(&self, config: &Config, target: &Destination) -> Vec<String> {
        let Some(max_age) = target.max_age else { return Vec::new() };
        let too_old = |job: &&Job| {
            let last = self.ledger.last_good(Some(&job.name), &[&target.name]).ok().flatten();
            last.is_none_or(|t| Timestamp::now().duration_since(t).unsigned_abs() > max_age)
        };
        let jobs = config.jobs.values().filter(|job| job.enabled && job.destinations.contains(&target.name));
        jobs.filter(too_old).map(|job| job.name.clone()).collect()
    }

    /// What the last scan for what is in no job found.
    pub fn coverage(&self) -> Result<Coverage> {
        coverage::last(&self.ledger)?.ok_or_else(no_scan)
    }

    /// The same in numbers; None before the first scan. What cannot be told is logged.
    pub fn coverage_counts(&self) -> Option<CoverageCounts> {
        coverage::counts(&self.ledger).map_err(|e| tracing::warn!("what the last scan for coverage found is not known: {e}")).ok()?
    }

    /// Says of gaps of the last scan that they are meant, or takes that back; none named means all. Returns how many changed.
    pub fn acknowledge_coverage(&self, named: &[String], undo: bool, by: &By) -> Result<u64> {
        by.ask_again()?;
        let changed = coverage::acknowledge(&self.ledger, named, undo).map_err(|unknown| match unknown {
            coverage::Unknown::NoScan => no_scan(),
            coverage::Unknown::Item(name) => {
                let what = if undo { "no acknowledged gap" } else { "no gap of the last scan" };
                let text = format!("'{name}' is {what}; 'keepctl coverage --no-scan --acknowledged' shows them");
                Error::NotFound { what: "item", name, text }
            }
            coverage::Unknown::Failed(e) => e.into(),
        })?;
        tracing::info!(by = by.name(), changed, undo, "gaps of the coverage were acknowledged");
        Ok(changed)
    }
}

fn no_scan() -> Error {
    let text = "nothing was looked at yet; 'keepctl coverage' does".to_owned();
    Error::NotFound { what: "coverage", name: String::new(), text }
}
