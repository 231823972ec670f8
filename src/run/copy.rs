//! Copies: a job's backups brought from a destination that has them to one that has not, repository to repository.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use keepd_protocol::model::{Backup, BackupDetail, BackupType, Level, Mark as Said};
use minicbor::bytes::ByteArray;

use super::backup::{Environment, ReaderGate, Writing, short, unhex};
use super::live::{Failure, Finish, LiveRun};
use super::{archived, catalogue, destination, readable, retain};
use crate::config::{Config, Destination, Job};
use crate::ledger::Ledger;
use crate::repository::copy::copy_sources;
use crate::repository::lease::Lease;
use crate::repository::writer::{self, Writer};
use crate::repository::{self, Manifest, ManifestSource, Repository, RepositoryError, check};
use crate::retention;

/// Keeps a prune away from a destination that is read, while it lives.
pub type Reading<'a> = &'a dyn Fn(&str) -> Arc<dyn Send + Sync>;

/// The backups of a job that a destination should have and has not, oldest first: the newest good one, and those that its retention would keep.
/// What was removed there on purpose is not missing, nor what was imported elsewhere.
pub fn missing(ledger: &Ledger, config: &Config, job: &Job, target: &Destination) -> Result<Vec<Backup>, Failure> {
    if !ledger.lacks_any(&job.name, &target.name)? {
        return Ok(Vec::new());
    }
    let all = ledger.backups(Some(&job.name), None)?;
    let removed = ledger.removed(&target.name)?;
    let is_here = |b: &Backup| b.destinations.iter().any(|p| p.name == target.name);
    let can_come =
        |b: &Backup| b.r#type != BackupType::Imported && b.destinations.iter().any(|p| config.destinations.contains_key(&p.name));
    let absent: BTreeSet<&str> =
        all.iter().filter(|b| !is_here(b) && can_come(b) && !removed.contains(&b.id)).map(|b| b.id.as_str()).collect();
    if absent.is_empty() {
        return Ok(Vec::new());
    }
    let candidates = retain::candidates(all.iter().filter(|b| is_here(b) || absent.contains(b.id.as_str())))?;
    let verdicts = retention::decide(&candidates, retain::policy(job, target), Timestamp::now(), &job.zone());
    let kept: BTreeSet<&str> = verdicts.iter().filter(|v| v.keep).map(|v| v.id.as_str()).collect();
    let wanted = all.iter().rev().filter(|b| absent.contains(b.id.as_str()) && kept.contains(b.id.as_str()));
    Ok(wanted.cloned().collect())
}

/// Brings what is missing to a destination, or the one backup that is given; then retention there.
pub fn to_destination(
    env: &Environment,
    job: Option<&Job>,
    target: &Destination,
    one: Option<&str>,
    live: &LiveRun,
    gate: ReaderGate<'_>,
    reading: Reading<'_>,
) -> Result<Finish, Failure> {
    if archived::is(target) {
        return archived::copy::to_destination(env, job, target, one, live, gate, reading);
    }
    live.step("opening the repository");
    let (repository, lease) = destination::open_for_writing(env, target, live, true)?;
    for problem in repository.sync_index_in_turn()?.into_iter().chain(catalogue::sync(&repository, &target.name, &env.ledger)?) {
        live.message(Level::Warning, problem);
    }
    let wanted = wanted(env, job, target, one)?;
    let mut copier = Copier { env, target, repository: &repository, lease: &lease, live, sources: BTreeMap::new() };
    let (mut done, mut errors, mut closed) = (0, Vec::new(), 0);
    for backup in &wanted {
        match with_best(&env.config, target, backup, reading, |place, _reading| copier.copy_from(place, backup)) {
            Ok(_) => done += 1,
            Err(Failure::Cancelled) => return Err(Failure::Cancelled),
            Err(e) => {
                let advice = match &e {
                    Failure::NeedsKey(_) => {
                        closed += 1;
                        format!("; 'keepctl copy {} --to {} --key FILE' brings it there", short(&backup.id), target.name)
                    }
                    _ => String::new(),
                };
                errors.push(format!("backup {}: {e}{advice}", short(&backup.id)));
                // One that is damaged everywhere must not keep the others from being copied; a destination that is gone ends it.
                if lease.check().is_err() {
                    break;
                }
            }
        }
    }
    live.message(Level::Info, format!("{done} of {} backups copied to {}", wanted.len(), target.name));
    if !errors.is_empty() {
        let text = format!("destination {}: {}", target.name, errors.join("; "));
        return Err(if closed == errors.len() { Failure::NeedsKey(text) } else { Failure::Failed(text) });
    }
    if let Some(job) = job
        && let Err(e) = retain::apply(env, job, target, &repository, &lease, live, gate)
        && !matches!(e, Failure::Cancelled)
    {
        live.message(Level::Error, format!("the copies are made, but cleaning up after them failed: {e}"));
    }
    Ok(Finish::Good)
}

/// The backup that is given, unless it is there, or what is missing of a job.
pub fn wanted(env: &Environment, job: Option<&Job>, target: &Destination, one: Option<&str>) -> Result<Vec<Backup>, Failure> {
    match (one, job) {
        (Some(id), _) => {
            let found = env.ledger.backups_by_prefix(id, None)?;
            Ok(found.into_iter().filter(|b| !b.destinations.iter().any(|p| p.name == target.name)).collect())
        }
        (None, Some(job)) => missing(&env.ledger, &env.config, job, target),
        (None, None) => Ok(Vec::new()),
    }
}

/// Has `work` done with the first other place of a backup that gives it whole, which is kept readable meanwhile; returns that place's name.
pub fn with_best(
    config: &Config,
    target: &Destination,
    backup: &Backup,
    reading: Reading<'_>,
    mut work: impl FnMut(&Destination, Arc<dyn Send + Sync>) -> Result<(), Failure>,
) -> Result<String, Failure> {
    let (mut errors, mut closed) = (Vec::new(), 0);
    for place in destination::best_first(config, backup).into_iter().filter(|p| p.name != target.name) {
        match work(place, reading(&place.name)) {
            Ok(()) => return Ok(place.name.clone()),
            Err(Failure::Cancelled) => return Err(Failure::Cancelled),
            Err(e) => {
                closed += usize::from(matches!(e, Failure::NeedsKey(_)));
                errors.push(e.to_string());
            }
        }
    }
    Err(match errors.len() {
        0 => Failure::Failed("no configured destination has it".into()),
        all if all == closed => Failure::NeedsKey(errors.join("; ")),
        _ => Failure::Failed(errors.join("; ")),
    })
}

struct Copier<'a> {
    env: &'a Environment,
    target: &'a Destination,
    repository: &'a Arc<Repository>,
    lease: &'a Lease,
    live: &'a LiveRun,
    /// Those that were opened.
    sources: BTreeMap<String, Arc<Repository>>,
}

impl Copier<'_> {
    fn source(&mut self, place: &Destination) -> Result<Arc<Repository>, Failure> {
        // Its keys may have been exchanged since.
        if let Some(open) = self.sources.get(&place.name).filter(|open| destination::has_its_keys(self.env, open)) {
            return Ok(open.clone());
        }
        let open = destination::open(self.env, place, false)?;
        for problem in open.sync_index()? {
            tracing::warn!(destination = %place.name, "{problem}");
        }
        self.sources.insert(place.name.clone(), open.clone());
        Ok(open)
    }

    fn copy_from(&mut self, place: &Destination, backup: &Backup) -> Result<(), Failure> {
        let (env, target, live) = (self.env, self.target, self.live);
        live.step(&format!("copying backup {} from {}", short(&backup.id), place.name));
        live.update(|run| run.backup = Some(backup.id.clone()));
        // What is staged of an archive lives as long as it is read.
        let staged = match archived::is(place) {
            true => {
                Some(archived::stage::place(env, place, &backup.id, &readable::Reading::Contents(Vec::new()), Arc::new(()), &live.cancel)?)
            }
            false => None,
        };
        let (from, there, base) = match &staged {
            Some(staged) => (staged.repository.clone(), staged.manifest.clone(), None),
            None => {
                let from = self.source(place)?;
                let there = from.read_manifest(&catalogue::object(&env.ledger, &place.name, &backup.id)?)?;
                let base = self.base(place, &from, backup)?;
                (from, there, base)
            }
        };
        let mut writer = Writer::new(self.repository.clone(), live.cancel.clone())?;
        let progress = |bytes| live.report.bytes(bytes);
        let sources = copy_sources(&from, &there, base.as_ref().map(|(a, b)| (a, b)), &mut writer, &progress, &live.cancel)?;
        let flushed = writer.flush()?;
        let newest = env.ledger.newest_in_chain(&target.name)?;
        // The parent as it is known here, if it is.
        let parent = there.parent.and_then(|p| self.named_here(place, &p).transpose()).transpose()?;
        let origin = unhex(&backup.id).ok_or_else(|| Failure::Failed(format!("'{}' is no backup id", backup.id)))?;
        let manifest = Manifest {
            repository: ByteArray::from(self.repository.raw_id()),
            sequence: catalogue::next_sequence(&target.name, &env.ledger, newest.as_ref().map_or(0, |d| d.sequence))?,
            predecessor: newest.as_ref().and_then(|d| unhex(d.object())).map(ByteArray::from),
            outcome: backup.outcome.as_str().into(),
            sources,
            added_bytes: flushed.added_bytes,
            parent: parent.map(ByteArray::from),
            origin: Some(ByteArray::from(origin)),
            ..there
        };
        if live.cancel.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        self.lease.check()?;
        let id = writer::commit(self.repository, &manifest, &flushed)?;
        destination::remember(&env.ledger, self.repository)?;
        let detail = catalogue::detail(&data_encoding::HEXLOWER.encode(&id), &manifest);
        env.ledger.put_backup(&target.name, &detail)?;
        live.set_added(live.snapshot().progress.added_bytes + flushed.added_bytes);
        live.report.entry();
        if backup.pinned {
            let said = repository::Mark::new(id, Said::Pin.as_str(), Timestamp::now().to_string(), live.snapshot().by);
            catalogue::mark(self.repository, &target.name, &env.ledger, &said)?;
        }
        Ok(())
    }

    /// The newest backup of the job before this one that both have, as each has it. One that cannot be read costs only time.
    fn base(&self, place: &Destination, from: &Repository, backup: &Backup) -> Result<Option<(Manifest, Manifest)>, Failure> {
        let here: BTreeSet<String> = self.env.ledger.backups_at(&backup.job, &self.target.name)?.into_iter().map(|b| b.id).collect();
        let there = self.env.ledger.backups_at(&backup.job, &place.name)?;
        let Some(base) = there.iter().find(|b| b.time <= backup.time && here.contains(&b.id)) else { return Ok(None) };
        let read = || -> Result<(Manifest, Manifest), Failure> {
            let there = from.read_manifest(&catalogue::object(&self.env.ledger, &place.name, &base.id)?)?;
            let here = self.repository.read_manifest(&catalogue::object(&self.env.ledger, &self.target.name, &base.id)?)?;
            Ok((there, here))
        };
        read().map(Some).or_else(|e| {
            self.live.message(Level::Warning, format!("the last copy cannot be built upon, everything is looked at: {e}"));
            Ok(None)
        })
    }

    /// What a backup that another destination knows by `object` is known by here.
    fn named_here(&self, place: &Destination, object: &[u8; 32]) -> Result<Option<[u8; 32]>, Failure> {
        let Some(id) = self.env.ledger.id_of(&place.name, &data_encoding::HEXLOWER.encode(object))? else { return Ok(None) };
        let here = self.env.ledger.backup_at(&self.target.name, &id)?;
        Ok(here.as_ref().map(BackupDetail::object).and_then(unhex))
    }
}

/// Stores anew what hurt backups of a destination lack, from other destinations that have them whole; returns how many are whole again.
/// `hurt`: as the destination's repository knows them.
pub fn repair<'h>(
    env: &Environment,
    target: &Destination,
    repository: &Arc<Repository>,
    hurt: impl Iterator<Item = &'h String>,
    live: &LiveRun,
    writing: Writing<'_>,
    reading: Reading<'_>,
) -> Result<usize, Failure> {
    let ids = env.ledger.objects(&target.name)?;
    let known: Vec<(&String, Backup)> = hurt
        .filter_map(|object| {
            let backup = env.ledger.backups_by_prefix(ids.get(object)?, None).ok()?.into_iter().next()?;
            (backup.destinations.len() > 1).then_some((object, backup))
        })
        .collect();
    if known.is_empty() {
        return Ok(0);
    }
    let _alone = writing(&target.name)?;
    let lease = destination::lease(env, repository, live)?;
    let mut copier = Copier { env, target, repository, lease: &lease, live, sources: BTreeMap::new() };
    let mut repaired = 0;
    for (object, backup) in known {
        live.step(&format!("repairing backup {}", short(&backup.id)));
        match with_best(&env.config, target, &backup, reading, |place, _reading| copier.repair_from(place, object, &backup)) {
            Ok(place) => {
                repaired += 1;
                live.message(Level::Warning, format!("backup {} is whole again, from the copy at {place}", short(&backup.id)));
            }
            Err(Failure::Cancelled) => return Err(Failure::Cancelled),
            Err(e) => live.message(Level::Error, format!("backup {} could not be repaired: {e}", short(&backup.id))),
        }
    }
    Ok(repaired)
}

impl Copier<'_> {
    /// Repairs one backup from its copy at `place`.
    fn repair_from(&mut self, place: &Destination, object: &str, backup: &Backup) -> Result<(), Failure> {
        archived::is_none(place, "its files are cut in other ways than a repository's, so they repair none of its chunks")?;
        let from = self.source(place)?;
        let there = from.read_manifest(&catalogue::object(&self.env.ledger, &place.name, &backup.id)?)?;
        let raw = unhex(object).ok_or_else(|| Failure::Failed(format!("'{object}' is no backup id")))?;
        let here = match self.repository.read_manifest(&raw) {
            Ok(manifest) => manifest,
            Err(e @ RepositoryError::Storage(_)) => return Err(e.into()),
            // It is made anew by a copy, and takes the place of what cannot be read.
            Err(_) => {
                self.copy_from(place, backup)?;
                return match self.repository.storage().is_append_only() {
                    true => Ok(()),
                    false => Ok(self.repository.delete_manifest(&raw)?),
                };
            }
        };
        let before: BTreeSet<[u8; 32]> = self.repository.packs()?.into_iter().map(|(id, _)| id).collect();
        let mut writer = Writer::new(self.repository.clone(), self.live.cancel.clone())?;
        let progress = |bytes| self.live.report.bytes(bytes);
        // Everything is looked at, so that pages that are lost are made again, too.
        let sources = copy_sources(&from, &there, None, &mut writer, &progress, &self.live.cancel)?;
        self.lease.check()?;
        let flushed = writer.flush()?;
        self.live.set_added(self.live.snapshot().progress.added_bytes + flushed.added_bytes);
        let pages = |sources: &[ManifestSource]| sources.iter().flat_map(|s| s.pages.iter().map(|p| *p.chunk)).collect::<Vec<_>>();
        if pages(&sources) != pages(&here.sources) {
            return Err(Failure::Failed(format!("the copy at {} is not of the same contents", place.name)));
        }
        let new: Vec<([u8; 32], u64)> = self.repository.packs()?.into_iter().filter(|(id, _)| !before.contains(id)).collect();
        let problems = check::read_these(self.repository, &new, &self.live.cancel)?;
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Failure::Failed(format!("what was stored anew is damaged again: {}", problems.join("; ")))),
        }
    }
}
