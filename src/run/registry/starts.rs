//! What can be started: each kind of run, and what follows by itself.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use keepd_protocol::model::{Backup, BackupType, Finding, Level, Mark, Outcome, Run, RunKind, RunState};
use tokio_util::sync::CancellationToken;

use super::{BackupRequest, Error, RestoreStarted, Result, Runs, Work, is_copy_of, job_named, lock};
use crate::access::By;
use crate::config::{Destination, Job};
use crate::crypto::Lent;
use crate::durable;
use crate::repository::{self, Entry, Manifest, Repository};
use crate::run::backup::{Environment, short};
use crate::run::live::{Failure, Finish, LiveRun};
use crate::run::outlet::RestoreOut;
use crate::run::readable::Reading;
use crate::run::selection::Selection;
use crate::run::{
    CompareRequest, adopt, archived, backup, catalogue, check, compare, config_backup, contents, copy, coverage, destination, export,
    hooks, housekeeping, in_place, load, quiesce, reencrypt, restore, retain,
};
use crate::run::{ExportRequest, LoadRequest, SealFor};
use crate::storage::Storage;
use crate::storage::probe::{self, Verdict};

impl Runs {
    /// Queues a backup. A job that is queued or running already is refused as busy.
    pub fn start_backup(self: &Arc<Self>, request: BackupRequest) -> Result<String> {
        let env = self.environment();
        let job = job_named(&env.config, &request.job)?.clone();
        let work = Work {
            kind: RunKind::Backup,
            job: Some(job.name.clone()),
            destinations: job.destinations.clone(),
            backup: None,
            by: request.by.clone(),
            attempt: request.attempt.max(1),
            alone: job.alone(),
        };
        let runs = self.clone();
        self.start(work, move |live| {
            in_place::nothing_is_left(&env, &job.name, &live.id())?;
            let writing = |name: &str| runs.wait_to_write(name, live);
            let work = || backup::backup(&env, &job, &request, live, &|name| runs.readers_gone(name), &writing).map(|(finish, _)| finish);
            let finish = hooks::around_backup(&job, request.r#type.as_str(), live, work)?;
            let (copies, problems) = runs.start_missing_copies(&job.name, &request.by.following(), &|_| true);
            live.update(|run| run.copies = copies);
            let finish = if finish == Finish::Good && !problems.is_empty() { Finish::Partial } else { finish };
            problems.into_iter().for_each(|text| live.message(Level::Error, text));
            Ok(finish)
        })
    }

    /// Queues a run for each destination of a job, of those that are `meant`, that lacks backups. Returns the runs that bring them, and in words what could not be started.
    fn start_missing_copies(self: &Arc<Self>, job: &str, by: &By, meant: &dyn Fn(&str) -> bool) -> (Vec<String>, Vec<String>) {
        let config = self.config.get();
        let (mut started, mut problems) = (Vec::new(), Vec::new());
        let Some(job) = config.jobs.get(job) else { return (started, problems) };
        for target in job.destinations.iter().filter(|name| meant(name)).filter_map(|name| config.destinations.get(name)) {
            let run = match copy::missing(&self.ledger, &config, job, target) {
                Ok(missing) if missing.is_empty() => continue,
                Ok(_) => self.start_copies(&job.name, &target.name, by, 1),
                Err(e) => Err(e.into()),
            };
            match run {
                Ok(run) => started.push(run),
                Err(e) => {
                    problems.push(format!("what {} lacks could not be copied there now, which is tried again later: {e}", target.name))
                }
            }
        }
        (started, problems)
    }

    /// Queues copies of all that a destination lacks, for all jobs, unless some are under way there.
    pub fn start_all_missing_copies(self: &Arc<Self>, by: &By) {
        for job in self.config.get().jobs.keys() {
            let idle = |target: &str| !self.active().iter().any(|run| is_copy_of(run, job, target) && !run.state.is_finished());
            let (_, problems) = self.start_missing_copies(job, by, &idle);
            if !self.stopping.load(Ordering::Acquire) {
                problems.iter().for_each(|text| tracing::warn!(job = %job, "{text}"));
            }
        }
    }

    /// Queues a run that copies to a destination what it lacks of a job when it begins; one that is queued already is the same.
    fn start_copies(self: &Arc<Self>, job: &str, destination: &str, by: &By, attempt: u32) -> Result<String> {
        let config = self.config.get();
        let job = job_named(&config, job)?.name.clone();
        let destination = self.destination(&config, destination)?.name.clone();
        let work = Work { job: Some(job.clone()), attempt, ..Work::on(RunKind::Copy, &destination, by) };
        let runs = self.clone();
        self.start(work, move |live| {
            // As it is configured when it begins: backups that come until then count on it.
            let env = runs.environment();
            let gone = |e: Error| Failure::Failed(e.to_string());
            let job = job_named(&env.config, &job).map_err(gone)?.clone();
            let target = runs.destination(&env.config, &destination).map_err(gone)?.clone();
            let reading = |name: &str| runs.keep_readable(name);
            let copied = copy::to_destination(&env, Some(&job), &target, None, live, &|name| runs.readers_gone(name), &reading);
            // What wants a key that is not here would want it again: it is tried again after the next backup.
            if matches!(copied, Err(Failure::Failed(_) | Failure::Storage(_) | Failure::Damaged(_))) {
                runs.copy_again(&job, &target.name, attempt);
            }
            copied
        })
    }

    /// Queues a run that copies one backup to a destination, which need not be one of its job's.
    pub fn start_copy(self: &Arc<Self>, backup: &str, job: Option<&str>, destination: &str, lent: Lent, by: &By) -> Result<String> {
        let env = self.environment_with(lent);
        let found = self.resolve(backup, job)?;
        let target = self.destination(&env.config, destination)?.clone();
        if found.destinations.iter().any(|p| p.name == destination) {
            return Err(Error::Failed(format!("backup {} is at {destination} already", short(&found.id))));
        }
        let work = Work { backup: Some(found.id.clone()), ..Work::on(RunKind::Copy, destination, by) };
        let runs = self.clone();
        self.start(work, move |live| {
            let reading = |name: &str| runs.keep_readable(name);
            copy::to_destination(&env, None, &target, Some(&found.id), live, &|name| runs.readers_gone(name), &reading)
        })
    }

    /// Tries copies that failed again, later and later. Where that is waited for already it is not begun once more: an outage with many backups has one row of tries.
    fn copy_again(self: &Arc<Self>, job: &Job, destination: &str, attempt: u32) {
        let waits = (job.name.clone(), destination.to_owned());
        if !lock(&self.copies_again).insert(waits.clone()) {
            return;
        }
        const LONGEST: Duration = Duration::from_secs(3600);
        let pause = job.retry.backoff.max(Duration::from_secs(1)).saturating_mul(1 << attempt.saturating_sub(1).min(12)).min(LONGEST);
        let (runs, job, destination) = (self.clone(), job.name.clone(), destination.to_owned());
        self.runtime.spawn(async move {
            tokio::time::sleep(pause).await;
            lock(&runs.copies_again).remove(&waits);
            match runs.start_copies(&job, &destination, &By::schedule(), attempt + 1) {
                Ok(_) | Err(Error::Busy(_) | Error::ShuttingDown | Error::NotFound { .. }) => {}
                Err(e) => tracing::warn!(job, destination, "its copies could not be tried again: {e}"),
            }
        });
    }

    /// Queues a check; `read_data` is the percentage of packs to read whole.
    pub fn start_check(self: &Arc<Self>, destination: &str, read_data: u32, repair: bool, lent: Lent, by: &By) -> Result<String> {
        let env = self.environment_with(lent);
        let target = self.destination(&env.config, destination)?.clone();
        let runs = self.clone();
        self.start(Work::on(RunKind::Check, destination, by), move |live| {
            runs.check(&env, &target, check::Wanted::Percent(read_data), repair, live)
        })
    }

    fn check(
        self: &Arc<Self>,
        env: &Environment,
        target: &Destination,
        wanted: check::Wanted,
        repair: bool,
        live: &LiveRun,
    ) -> Result<Finish, Failure> {
        let _reading = self.keep_readable(&target.name);
        let writing = |name: &str| self.wait_to_write(name, live);
        let mut hurt_jobs = BTreeSet::new();
        let checked = check::check_destination(env, target, wanted, live, &writing, &|name| self.keep_readable(name), &mut hurt_jobs);
        if repair && matches!(checked, Err(Failure::Failed(_) | Failure::Damaged(_))) && !hurt_jobs.is_empty() {
            let jobs = hurt_jobs.iter().cloned().collect::<Vec<_>>().join(", ");
            live.message(
                Level::Info,
                format!("what the sources of {jobs} still have is stored anew by a backup now, and checked after it"),
            );
            self.read_sources_again(hurt_jobs, target.name.clone(), live.by.following());
        }
        checked
    }

    /// Backs jobs up, whose sources may have what a destination lost, and checks the destination's structure afterwards.
    fn read_sources_again(self: &Arc<Self>, jobs: BTreeSet<String>, destination: String, by: By) {
        let runs = self.clone();
        self.runtime.spawn(async move {
            for job in jobs {
                let request = BackupRequest { job: job.clone(), r#type: BackupType::Scheduled, by: by.clone(), ..BackupRequest::default() };
                match runs.start_backup(request) {
                    Ok(run) => {
                        // Its sender goes with the run.
                        if let Some(mut followed) = runs.follow(&run) {
                            while followed.changed().await.is_ok() {}
                        }
                    }
                    Err(e) => tracing::warn!(job, "what {destination} lost could not be read from its sources again: {e}"),
                }
            }
            if let Err(e) = runs.start_check(&destination, 0, false, Lent::default(), &by) {
                tracing::warn!(destination, "the repair could not be checked: {e}");
            }
        });
    }

    /// Queues the next part of a destination's rolling check, unless something works on the destination.
    pub fn start_rolling_check(self: &Arc<Self>, destination: &str) -> Result<String> {
        let env = self.environment();
        let target = self.destination(&env.config, destination)?.clone();
        let Some(period) = target.check_every else { return Err(Error::Busy("it has no rolling check".into())) };
        if lock(&self.live).values().any(|l| l.snapshot().destination.as_deref() == Some(destination)) {
            return Err(Error::Busy(format!("something works on {destination}")));
        }
        if !self.begin_if_due(&format!("rolling check of {destination}"), housekeeping::pause(period))? {
            return Err(Error::Busy("the next part is not due yet".into()));
        }
        let runs = self.clone();
        self.start(Work::on(RunKind::Check, destination, &By::schedule()), move |live| {
            runs.check(&env, &target, check::Wanted::Rolling(period), true, live)
        })
    }

    pub fn start_prune(self: &Arc<Self>, destination: &str, dry_run: bool, lent: Lent, by: &By) -> Result<String> {
        let env = self.environment_with(lent);
        let target = self.destination(&env.config, destination)?.clone();
        let runs = self.clone();
        self.start(Work::on(RunKind::Prune, destination, by), move |live| {
            check::prune_destination(&env, &target, dry_run, live, &|name| runs.readers_gone(name))
        })
    }

    /// Queues a re-encryption: a new master key, and everything sealed with it.
    pub fn start_reencrypt(self: &Arc<Self>, destination: &str, drop_slots: bool, lent: Lent, by: &By) -> Result<String> {
        let env = self.environment_with(lent);
        let target = self.destination(&env.config, destination)?.clone();
        let text =
            "each archive is sealed for itself; new ones are sealed with the key that is configured, and copies elsewhere are sealed anew";
        archived::is_none(&target, text)?;
        let is_it = |r: &Run| r.kind == RunKind::ReEncrypt && r.destination.as_deref() == Some(destination) && !r.state.is_finished();
        if let Some(other) = lock(&self.live).values().map(|l| l.snapshot()).find(is_it) {
            return Err(Error::Busy(format!("{destination} is being re-encrypted already (run {})", other.id)));
        }
        let runs = self.clone();
        self.start(Work::on(RunKind::ReEncrypt, destination, by), move |live| {
            let writing = |name: &str| runs.wait_to_write(name, live);
            match reencrypt::are_configurations_left(&env.ledger, &target.name)? {
                true => live.message(Level::Info, "the backups are sealed anew already; only stored configurations were left".into()),
                false => {
                    reencrypt::destination_anew(&env, &target, drop_slots, live, &writing, &|name| runs.readers_gone(name))?;
                }
            }
            let _alone = runs.alone_with_configurations(live)?;
            let _reading = runs.keep_readable(&target.name);
            let failed = |e: Failure| match e {
                Failure::Cancelled => Failure::Cancelled,
                e => Failure::Failed(format!(
                    "the backups at {0} are sealed anew, but an old key may still open configurations that are stored there: {e}; mend that, and run the same command again",
                    target.name
                )),
            };
            // It took its time: what is stored is sealed as is configured now.
            let finish = config_backup::anew(&runs.environment(), &target, live).map_err(failed)?;
            reencrypt::configurations_done(&env.ledger, &target.name)?;
            Ok(finish)
        })
    }

    /// Goes on with re-encryptions that the last stop interrupted.
    pub fn resume_reencryptions(self: &Arc<Self>) {
        for name in self.config.get().destinations.keys() {
            let unfinished = reencrypt::unfinished(&self.ledger, name).and_then(|unfinished| match unfinished {
                None if reencrypt::are_configurations_left(&self.ledger, name)? => Ok(Some(false)),
                unfinished => Ok(unfinished),
            });
            let started = match unfinished {
                Ok(None) => continue,
                Ok(Some(drop_slots)) => self.start_reencrypt(name, drop_slots, Lent::default(), &By::schedule()).map(drop),
                Err(e) => Err(e.into()),
            };
            match started {
                Ok(()) | Err(Error::Busy(_) | Error::ShuttingDown) => {}
                Err(e) => tracing::error!(destination = %name, "its re-encryption could not go on: {e}"),
            }
        }
    }

    pub fn start_delete(self: &Arc<Self>, backup: &str, job: Option<&str>, destination: Option<&str>, by: &By) -> Result<String> {
        let env = self.environment();
        let found = self.resolve(backup, job)?;
        let (mut targets, mut gone) = (Vec::new(), Vec::new());
        for place in found.destinations.iter().filter(|p| destination.is_none_or(|d| d == p.name)) {
            match env.config.destinations.get(&place.name) {
                Some(target) => targets.push(target.clone()),
                None => gone.push(place.name.clone()),
            }
        }
        if targets.is_empty() {
            if let Some(name) = gone.first() {
                self.destination(&env.config, name)?;
            }
            let name = destination.unwrap_or_default().to_owned();
            let text = format!("backup {} is not on destination '{name}'", found.id);
            return Err(Error::NotFound { what: "destination", name, text });
        }
        if found.pinned {
            return Err(Error::Failed(format!(
                "backup {} is pinned and not deleted; 'keepctl unpin {}' takes the pin away",
                short(&found.id),
                short(&found.id)
            )));
        }
        let work = Work {
            kind: RunKind::Delete,
            job: None,
            destinations: targets.iter().map(|t| t.name.clone()).collect(),
            backup: Some(found.id.clone()),
            by: by.clone(),
            attempt: 1,
            alone: Vec::new(),
        };
        let runs = self.clone();
        self.start(work, move |live| {
            // One that does not answer keeps it, and no other does for that.
            let mut kept = Vec::new();
            for target in &targets {
                match check::delete_backup(&env, target, &found.id, live, &|name| runs.readers_gone(name)) {
                    Ok(_) => {}
                    Err(Failure::Cancelled) => return Err(Failure::Cancelled),
                    Err(failure) if targets.len() == 1 => return Err(failure),
                    Err(failure) => kept.push(format!("{}: {failure}", target.name)),
                }
            }
            for name in &gone {
                let text = format!("backup {} stays at {name}, which is no longer configured", short(&found.id));
                live.message(Level::Warning, text);
            }
            match (kept.is_empty(), gone.is_empty()) {
                (true, true) => Ok(Finish::Good),
                (true, false) => Ok(Finish::Partial),
                _ => Err(Failure::Failed(format!("backup {} is not removed everywhere: {}", short(&found.id), kept.join("; ")))),
            }
        })
    }

    /// Says something of a backup on every destination that has it. Blocks until it is durable there.
    pub fn mark(&self, backup: &str, job: Option<&str>, mark: Mark, by: &By) -> Result<Backup> {
        let env = self.environment();
        let found = self.resolve(backup, job)?;
        let short = short(&found.id);
        if mark == Mark::Accept && found.outcome == Outcome::Good {
            return Err(Error::Failed(format!("backup {short} is good already")));
        }
        let time = Timestamp::now().to_string();
        let (mut done, mut errors) = (Vec::new(), Vec::new());
        // One that is no longer configured cannot be told, and keeps nobody from saying it where it can be.
        let places = || found.destinations.iter().filter(|p| env.config.destinations.contains_key(&p.name));
        let all = if places().next().is_none() { found.destinations.iter().collect::<Vec<_>>() } else { places().collect() };
        for place in all {
            let written = self.destination(&env.config, &place.name).map_err(|e| Failure::Failed(e.to_string())).and_then(|target| {
                let _reading = self.keep_readable(&target.name);
                // It may have waited.
                by.ask_again().map_err(|refusal| Failure::Failed(refusal.text))?;
                let said = |object| repository::Mark::new(object, mark.as_str(), time.clone(), by.name().to_owned());
                catalogue::say(&env, target, &found.id, said)
            });
            match written {
                Ok(()) => done.push(place.name.as_str()),
                Err(e) => errors.push(format!("{}: {e}", place.name)),
            }
        }
        if !errors.is_empty() {
            let where_done = if done.is_empty() { "nowhere".to_owned() } else { format!("only at {}", done.join(", ")) };
            return Err(Error::Failed(format!("{mark} of backup {short} is done {where_done}: {}; try again", errors.join("; "))));
        }
        tracing::info!(backup = %found.id, by = by.name(), "{mark}");
        self.resolve(&found.id, None)
    }

    /// Tries what a destination can do. Blocks.
    pub fn test_destination(&self, destination: &str) -> Result<Vec<Finding>> {
        let env = self.environment();
        let target = self.destination(&env.config, destination)?;
        let storage = Storage::open(target, self.runtime.clone()).map_err(|e| Error::Failed(e.to_string()))?;
        let told = |f: probe::Finding| {
            let verdict = match f.verdict {
                Verdict::Ok => "ok",
                Verdict::Warning => "warning",
                Verdict::Failed => "failed",
                Verdict::Skipped => "skipped",
            };
            Finding { step: f.step.into(), verdict: verdict.into(), text: f.text }
        };
        Ok(probe::probe(&storage).into_iter().map(told).collect())
    }

    /// Makes this machine the writer of a destination's repository; says who it was before. Blocks.
    pub fn take_over(&self, destination: &str, by: &By) -> Result<String> {
        let env = self.environment();
        let target = self.destination(&env.config, destination)?;
        by.ask_again()?;
        let message = check::take_over(&env, target)?;
        config_backup::accept_emptied(&env.ledger, target)?;
        tracing::warn!(destination, by = by.name(), "{message}");
        Ok(message)
    }

    /// Queues a run that confirms the job's retention and removes what it removes.
    pub fn start_retention(self: &Arc<Self>, job: &str, destination: Option<&str>, by: &By) -> Result<String> {
        self.start_cleanup(job, destination, by, true)
    }

    /// Starts a cleanup of every job for which the last one is longer ago than `every` and that has something to clean up.
    pub fn start_due_cleanups(self: &Arc<Self>, every: Duration) -> Result<()> {
        let env = self.environment();
        // So that what went by since is known when it is asked for.
        crate::believed::now(&self.ledger)?;
        for (name, job) in env.config.jobs.iter() {
            if !self.begin_if_due(&format!("cleanup of {name}"), every)? {
                continue;
            }
            for target in self.job_at(&env.config, name, None)?.1 {
                if retain::has_work(&env.ledger, job, target)? {
                    self.start_cleanup(name, Some(&target.name), &By::schedule(), false)?;
                }
            }
        }
        Ok(())
    }

    fn start_cleanup(self: &Arc<Self>, job: &str, destination: Option<&str>, by: &By, is_confirmed: bool) -> Result<String> {
        let env = self.environment();
        let (job, targets) = self.job_at(&env.config, job, destination)?;
        let (job, targets): (Job, Vec<Destination>) = (job.clone(), targets.into_iter().cloned().collect());
        let work = Work {
            kind: RunKind::Retention,
            job: Some(job.name.clone()),
            destinations: targets.iter().map(|t| t.name.clone()).collect(),
            backup: None,
            by: by.clone(),
            attempt: 1,
            alone: Vec::new(),
        };
        let runs = self.clone();
        self.start(work, move |live| {
            for target in &targets {
                if archived::is(target) {
                    archived::upkeep::clean_up(&env, &job, target, is_confirmed, live, &|name| runs.readers_gone(name))?;
                    continue;
                }
                live.step("opening the repository");
                let (repository, lease) = destination::open_for_writing(&env, target, live, false)?;
                for problem in catalogue::sync(&repository, &target.name, &env.ledger)? {
                    live.message(Level::Warning, problem);
                }
                if is_confirmed {
                    crate::believed::confirm(&env.ledger)?;
                    retain::confirm(&env.ledger, &job, target)?;
                }
                retain::apply(&env, &job, target, &repository, &lease, live, &|name| runs.readers_gone(name))?;
            }
            Ok(Finish::Good)
        })
    }

    /// Streams entries into `out` (see `keepd_protocol::restore`); `paths` are `<source>[/<path>]`, none means all.
    pub async fn start_restore(
        self: &Arc<Self>,
        backup: &str,
        job: Option<&str>,
        paths: Vec<Vec<u8>>,
        out: RestoreOut,
        lent: Lent,
        by: &By,
    ) -> Result<RestoreStarted> {
        let env = Arc::new(self.environment_with(lent));
        let found = self.resolve(backup, job)?;
        let reading = Reading::Contents(paths.clone());
        let place = self.open_for(&env, found.clone(), reading.clone()).await?;
        let (entries, bytes) = (place.manifest.entries(), place.manifest.bytes());
        Selection::new(&place.manifest, &paths).map_err(|text| Error::NotFound { what: "path", name: String::new(), text })?;
        let whole = paths.is_empty();
        let work = Work { backup: Some(found.id.clone()), ..Work::on(RunKind::Restore, &place.destination, by) };
        let (runs, id) = (self.clone(), found.id.clone());
        let run = self.start(work, move |live| {
            if whole {
                live.set_total(bytes);
            }
            live.step("restoring");
            let mut tried = vec![place.destination.clone()];
            restore::stream(place, &mut || runs.another_place(&env, &found, &mut tried, &reading), &paths, None, out, live)
        })?;
        Ok(RestoreStarted { run, backup: id, entries, bytes })
    }

    /// Queues a run that brings a dump back into the server it came from, or through a command.
    pub async fn start_load(
        self: &Arc<Self>,
        backup: &str,
        job: Option<&str>,
        request: LoadRequest,
        lent: Lent,
        by: &By,
    ) -> Result<String> {
        let env = Arc::new(self.environment_with(lent));
        let found = self.resolve(backup, job)?;
        let job = job_named(&env.config, &found.job)?.clone();
        let (source, file) = request.find(&job).map_err(Error::Failed)?;
        let path = [source.name.as_bytes(), b"/", file.as_bytes()].concat();
        let lock = source.kind.lock();
        let name = source.name.clone();
        let reading = Reading::Contents(vec![path.clone()]);
        let place = self.open_for(&env, found.clone(), reading.clone()).await?;
        let looked = self.look_for_file(&place.repository, &place.manifest, &path).await?;
        let facts =
            place.manifest.sources.iter().find(|s| s.name == name).and_then(|s| serde_json::from_str(&s.facts).ok()).unwrap_or_default();
        let work = Work {
            backup: Some(found.id.clone()),
            job: Some(job.name.clone()),
            alone: lock.into_iter().chain(job.services.iter().map(|s| format!("service {s}"))).collect(),
            ..Work::on(RunKind::Restore, &place.destination, by)
        };
        let runs = self.clone();
        self.start(work, move |live| {
            let mut tried = vec![place.destination.clone()];
            let another = Box::new(|| runs.another_place(&env, &found, &mut tried, &reading));
            load::load(&env, &job, &request, load::Dump { place, another, path, entry: looked }, facts, live)
        })
    }

    /// Queues a restore to where a job's sources are.
    pub fn start_in_place(
        self: &Arc<Self>,
        backup: &str,
        job: Option<&str>,
        request: in_place::Request,
        lent: Lent,
        by: &By,
    ) -> Result<String> {
        let env = self.environment_with(lent);
        let found = self.resolve(backup, job)?;
        let job = job_named(&env.config, &found.job)?.clone();
        let services = job.services.iter().map(|s| format!("service {s}"));
        // Two that share files without sharing a job must not meet.
        let locks =
            [job.lock(), "restore in place".to_owned()].into_iter().chain(job.sources.iter().filter_map(|s| s.kind.lock())).chain(services);
        let work = Work {
            kind: RunKind::Restore,
            job: Some(job.name.clone()),
            destinations: found.destinations.iter().map(|d| d.name.clone()).collect(),
            backup: Some(found.id.clone()),
            by: by.clone(),
            attempt: 1,
            alone: locks.collect(),
        };
        let (runs, by) = (self.clone(), by.clone());
        self.start(work, move |live| {
            // Of the safety backup nothing is known to be needed yet.
            let reading = |id: &str| if id == found.id { Reading::Contents(request.selected()) } else { Reading::Entries };
            let open = |id: &str| runs.open_place(&env, id, &reading(id));
            let another = |id: &str, tried: &mut Vec<String>| runs.another_place(&env, &runs.resolve(id, None).ok()?, tried, &reading(id));
            let back_up = |job: &Job| -> Result<String, Failure> {
                let request =
                    BackupRequest { job: job.name.clone(), r#type: BackupType::PreRestore, by: by.clone(), ..BackupRequest::default() };
                let writing = |name: &str| runs.wait_to_write(name, live);
                let destination = live.snapshot().destination;
                let made = backup::backup(&env, job, &request, live, &|name| runs.readers_gone(name), &writing);
                live.update(|run| run.destination = destination);
                made.map(|(_, id)| id)
            };
            let transaction = in_place::Transaction {
                env: &env,
                job: &job,
                request: &request,
                backup: &found,
                open: &open,
                another: &another,
                back_up: &back_up,
                live,
            };
            transaction.run()
        })
    }

    /// Queues a restore in place of what an earlier one replaced; the run, and the backup that is restored.
    pub fn start_undo(self: &Arc<Self>, run: &str, dry_run: bool, lent: Lent, by: &By) -> Result<(String, String)> {
        let absent = |text: String| Error::NotFound { what: "run", name: run.to_owned(), text };
        let done = self.ledger.run(run)?.ok_or_else(|| absent(format!("there is no run '{run}'; 'keepctl run list' shows them")))?;
        let plan = done.plan.ok_or_else(|| Error::Failed(format!("run {run} is no restore in place, so there is nothing to undo")))?;
        if !done.state.is_finished() || done.state == RunState::Failed || done.state == RunState::Cancelled {
            return Err(Error::Failed(format!(
                "run {run} is {}: it did not put anything in place for good; 'keepctl run show' says how it ended",
                done.state
            )));
        }
        let safety =
            done.safety.ok_or_else(|| Error::Failed(format!("run {run} made no safety backup, so what was there cannot be had back")))?;
        let found = self.resolve(&safety, None)?;
        let paths = plan.paths.iter().map(|p| p.to_bytes().map_err(Error::Failed)).collect::<Result<Vec<_>>>()?;
        // A database that was saved as plain files has its log as a source of its own.
        let of_it = |name: &String| plan.sources.iter().any(|s| s.name == *name || in_place::is_log_of(name, &s.name));
        let has_paths = |name: &String| paths.iter().any(|p| p.split(|b| *b == b'/').find(|c| !c.is_empty()) == Some(name.as_bytes()));
        let sources: Vec<String> = found.sources.iter().filter(|s| of_it(s) && !has_paths(s)).cloned().collect();
        let lacks = plan.sources.iter().filter(|s| !found.sources.contains(&s.name));
        let notes = lacks.map(|s| format!("source {} was not there before that restore; it stays as it is now", s.name)).collect();
        let request = in_place::Request {
            sources,
            paths,
            database: plan.database,
            tables: Vec::new(),
            owners: true,
            safety: true,
            dry_run,
            is_undo: true,
            notes,
        };
        Ok((self.start_in_place(&safety, None, request, lent, by)?, safety))
    }

    fn open_place(&self, env: &Environment, id: &str, reading: &Reading) -> Result<restore::Place, Failure> {
        let found = self.resolve(id, None).map_err(|e| Failure::Failed(e.to_string()))?;
        self.open_beside(env, &found, &[], reading)
    }

    /// Before anything else runs: restores in place that a keepd which died had begun are finished or undone, in the background; until then
    /// nothing else works on their jobs.
    pub fn recover(self: &Arc<Self>) {
        let env = self.environment();
        let (pending, problems) = in_place::pending(&env.config.daemon.state_dir);
        problems
            .iter()
            .for_each(|p| tracing::error!("what a restore in place had begun cannot be read, and has to be looked after by hand: {p}"));
        let held: Vec<_> = pending
            .iter()
            .filter_map(|p| lock(&self.alone).entry(format!("job {}", p.job())).or_default().clone().try_lock_owned().ok())
            .collect();
        let (runs, recovery) = (self.clone(), quiesce::Recovery::begin());
        std::thread::spawn(move || {
            let mut left: Vec<_> = pending.into_iter().filter_map(|mut p| (!runs.recover_one(&env, &mut p)).then_some(p)).collect();
            quiesce::recover(&env.config.daemon.state_dir);
            drop(recovery);
            // A server may not be up yet; meanwhile nothing works on the jobs.
            let mut pause = Duration::from_secs(5);
            while !left.is_empty() && !runs.stopping.load(std::sync::atomic::Ordering::Acquire) {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_secs(300));
                left.retain_mut(|p| !runs.recover_one(&env, p));
            }
            drop(held);
        });
    }

    /// Whether nothing is left to do.
    fn recover_one(self: &Arc<Self>, env: &Environment, pending: &mut in_place::Pending) -> bool {
        let (job, run) = (pending.job().to_owned(), pending.run().to_owned());
        tracing::warn!(job, run, "keepd died during a restore in place; it is finished or undone now");
        let known = self.ledger.run(&run).ok().flatten().unwrap_or_default();
        let live = LiveRun::new(known, tokio::sync::broadcast::Sender::new(1));
        let open = |id: &str| self.open_place(env, id, &Reading::Entries);
        let another = |id: &str, tried: &mut Vec<String>| self.another_place(env, &self.resolve(id, None).ok()?, tried, &Reading::Entries);
        let helper = in_place::Helper { env, job: env.config.jobs.get(&job), open: &open, another: &another, live: &live };
        let finished = pending.finish(&helper);
        let is_done = finished.is_ok();
        let (level, text) = match finished {
            Ok(in_place::Finished { text, stays }) => {
                tracing::warn!(job, run, "{text}");
                if stays {
                    live.update(|run| (run.state, run.error) = (RunState::Good, None));
                }
                (Level::Warning, text)
            }
            Err(e) => {
                tracing::error!(job, run, "what it had begun could not be undone: {e}");
                (Level::Error, format!("what it had begun could not be undone: {e}"))
            }
        };
        live.message(level, format!("at the next start of keepd: {text}"));
        if let Err(e) = self.ledger.save_run(&live.snapshot()) {
            tracing::error!(run, "how it ended could not be written down: {e}");
        }
        is_done
    }

    /// Finds a file of a backup.
    async fn look_for_file(&self, repository: &Arc<Repository>, manifest: &Manifest, path: &[u8]) -> Result<Entry> {
        let (repository, manifest, path) = (repository.clone(), manifest.clone(), path.to_vec());
        let name = String::from_utf8_lossy(&path).into_owned();
        let find = move || restore::find_file(&repository, &manifest, &path);
        let found = tokio::task::spawn_blocking(find).await.map_err(|e| Error::Failed(e.to_string()))?;
        found.map_err(|e| Error::NotFound { what: "path", name, text: e.to_string() })
    }

    /// Writes one file's contents into `out`; returns the run and the size.
    pub async fn start_cat(
        self: &Arc<Self>,
        backup: &str,
        job: Option<&str>,
        path: Vec<u8>,
        out: OwnedFd,
        lent: Lent,
        by: &By,
    ) -> Result<(String, u64)> {
        let env = Arc::new(self.environment_with(lent));
        let found = self.resolve(backup, job)?;
        let reading = Reading::Contents(vec![path.clone()]);
        let place = self.open_for(&env, found.clone(), reading.clone()).await?;
        let looked = self.look_for_file(&place.repository, &place.manifest, &path).await?;
        let size = looked.size;
        let work = Work { backup: Some(found.id.clone()), ..Work::on(RunKind::Cat, &place.destination, by) };
        let runs = self.clone();
        let run = self.start(work, move |live| {
            live.set_total(size);
            live.step("reading");
            let mut tried = vec![place.destination.clone()];
            let another = &mut || runs.another_place(&env, &found, &mut tried, &reading);
            contents::write(place, another, &path, &looked, (out, crate::run::patient::PATIENCE), live)
        })?;
        Ok((run, size))
    }

    /// Writes a backup as a portable archive into `out`; returns the run, the backup and how many bytes its contents have.
    pub async fn start_export(
        self: &Arc<Self>,
        backup: &str,
        job: Option<&str>,
        request: ExportRequest,
        out: OwnedFd,
        lent: Lent,
        by: &By,
    ) -> Result<(String, String, u64)> {
        let env = Arc::new(self.environment_with(lent));
        let found = self.resolve(backup, job)?;
        if let SealFor::Profile(name) = &request.seal {
            let (env, name) = (env.clone(), name.clone());
            // A token takes its time.
            let loaded = tokio::task::spawn_blocking(move || destination::profile_named(&env.config, &name).map(drop)).await;
            loaded.map_err(|e| Error::Failed(e.to_string()))??;
        }
        let reading = Reading::Contents(request.paths.clone());
        let place = self.open_for(&env, found.clone(), reading.clone()).await?;
        Selection::new(&place.manifest, &request.paths).map_err(|text| Error::NotFound { what: "path", name: String::new(), text })?;
        let (id, bytes) = (found.id.clone(), found.bytes);
        let work = Work { backup: Some(id.clone()), ..Work::on(RunKind::Export, &place.destination, by) };
        let runs = self.clone();
        let run = self.start(work, move |live| {
            live.set_total(bytes);
            let mut tried = vec![place.destination.clone()];
            let another = &mut || runs.another_place(&env, &found, &mut tried, &reading);
            export::export(&env, place, another, &found, request, out, live)
        })?;
        Ok((run, id, bytes))
    }

    /// Compares a backup with what is live, and writes what differs into `out`; returns the run and the backup.
    pub async fn start_compare(
        self: &Arc<Self>,
        backup: &str,
        job: Option<&str>,
        request: CompareRequest,
        out: OwnedFd,
        lent: Lent,
        by: &By,
    ) -> Result<(String, String)> {
        let env = Arc::new(self.environment_with(lent));
        let found = self.resolve(backup, job)?;
        let job = job_named(&env.config, &found.job)?.clone();
        // Mostly the hashes tell; contents are read where they do not.
        let place = self.open_for(&env, found.clone(), Reading::Entries).await?;
        Selection::new(&place.manifest, &request.paths).map_err(|text| Error::NotFound { what: "path", name: String::new(), text })?;
        let work =
            Work { backup: Some(found.id.clone()), job: Some(job.name.clone()), ..Work::on(RunKind::Compare, &place.destination, by) };
        let (runs, id) = (self.clone(), found.id.clone());
        let run = self.start(work, move |live| {
            let mut tried = vec![place.destination.clone()];
            let another = &mut || runs.another_place(&env, &found, &mut tried, &Reading::Entries);
            compare::compare(&env, &job, &place, another, &request, out, live)
        })?;
        Ok((run, id))
    }

    /// Brings the catalogue of every destination up to date with its repository, in the background, at start.
    pub fn sync_catalogue(self: &Arc<Self>) {
        let runs = self.clone();
        self.runtime.spawn_blocking(move || {
            let env = runs.environment();
            for (name, target) in &env.config.destinations {
                let synced = adopt::sync(&env, target, &CancellationToken::new());
                match synced {
                    Ok(problems) => problems.iter().for_each(|p| tracing::warn!(destination = %name, "{p}")),
                    // A destination that nothing was backed up to yet is no problem.
                    Err(e) if e.to_string().contains("nothing was backed up to it yet") => {}
                    Err(e) => {
                        tracing::warn!(destination = %name, "the catalogue could not be brought up to date: {e}");
                        lock(&runs.problems).insert(name.clone(), (RunKind::Backup, e.to_string()));
                    }
                }
            }
            // Each was opened, and so synced where that was to be done.
            if durable::is_sure()
                && let Ok(Some(doubted)) = env.ledger.note(durable::DOUBTED)
                && !doubted.is_empty()
                && let Err(e) = env.ledger.set_note(durable::DOUBTED, "")
            {
                tracing::warn!("that the destinations are synced is not remembered: {e}");
            }
            runs.resume_reencryptions();
            runs.start_all_missing_copies(&By::schedule());
            tracing::info!("the catalogues of the destinations were read");
        });
    }

    /// Queues a look for what on this machine is in no job; one at a time.
    pub fn start_coverage(self: &Arc<Self>, all: bool, by: &By) -> Result<String> {
        if let Some(run) = self.active().iter().find(|run| run.kind == RunKind::Coverage) {
            return Err(Error::Busy(format!("such a scan is {} already (run {})", run.state, run.id)));
        }
        let env = self.environment();
        let work = Work {
            kind: RunKind::Coverage,
            job: None,
            destinations: Vec::new(),
            backup: None,
            by: by.clone(),
            attempt: 1,
            alone: vec!["coverage".into()],
        };
        let runs = self.clone();
        self.start(work, move |live| coverage::scan(&env, &|| runs.config.get(), all, live))
    }
}
