//! Retention at work: what the rules would do, doing it, and asking first where a changed policy would remove more than the old one.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use keepd_protocol::model::{Backup, BackupType, Level, Outcome, RetentionPlan, RetentionVerdict};

use super::backup::{Environment, ReaderGate, short};
use super::live::{Failure, LiveRun};
use super::{catalogue, check};
use crate::believed;
use crate::config::{Destination, Job, Retention};
use crate::ledger::Ledger;
use crate::repository::Repository;
use crate::repository::condemned::is_over;
use crate::repository::lease::Lease;
use crate::retention::{self, Candidate, Verdict};

/// The rules that hold for a job at a destination.
pub fn policy<'a>(job: &'a Job, target: &'a Destination) -> &'a Retention {
    target.retention.as_ref().unwrap_or(&job.retention)
}

/// Backups as the rules see them.
pub fn candidates<'b>(backups: impl IntoIterator<Item = &'b Backup>) -> Result<Vec<Candidate>, Failure> {
    let candidate = |b: &Backup| {
        let time = b.time.parse().map_err(|e| Failure::Failed(format!("backup {}: its time does not parse: {e}", b.id)))?;
        Ok(Candidate {
            id: b.id.clone(),
            time,
            good: b.outcome == Outcome::Good,
            pinned: b.pinned,
            proven: b.proven.is_some(),
            safety: b.r#type == BackupType::PreRestore,
            imported: b.r#type == BackupType::Imported,
        })
    };
    backups.into_iter().map(candidate).collect()
}

/// The rules that were last in force here; none before there were any.
fn confirmed(ledger: &Ledger, job: &str, destination: &str) -> Result<Retention, Failure> {
    let Some(text) = ledger.note(&note(job, destination))? else { return Ok(Retention::default()) };
    let numbers: BTreeMap<String, u64> = serde_json::from_str(&text).unwrap_or_default();
    // One that is not understood removes nothing.
    Ok(Retention::from_numbers(&numbers).unwrap_or_default())
}

/// The configured rules are meant so, whatever they remove.
pub fn confirm(ledger: &Ledger, job: &Job, target: &Destination) -> Result<(), Failure> {
    let text = serde_json::to_string(&policy(job, target).numbers()).map_err(|e| Failure::Failed(e.to_string()))?;
    Ok(ledger.set_note(&note(&job.name, &target.name), &text)?)
}

fn note(job: &str, destination: &str) -> String {
    format!("retention of {job} at {destination}")
}

fn falling(verdicts: &[Verdict]) -> BTreeSet<String> {
    verdicts.iter().filter(|v| !v.keep).map(|v| v.id.clone()).collect()
}

/// When it is: by the clock, and as far as that is believed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    pub clock: Timestamp,
    pub believed: Timestamp,
}

impl Now {
    fn of(ledger: &Ledger) -> Result<Self, Failure> {
        let clock = Timestamp::now();
        Ok(Self { clock, believed: believed::at(ledger, clock)? })
    }
}

/// What is to be removed now, how many backups more a policy that nobody confirmed yet would remove, and how many more a clock that leapt.
pub(crate) struct Decision {
    verdicts: Vec<Verdict>,
    pub(crate) remove: BTreeSet<String>,
    held_back: usize,
    doubted: usize,
    /// What is to be said of the clock; None when it is believed.
    doubt: Option<String>,
}

/// Only what falls by the rules as they are and as they were confirmed, by the clock and by the time that is believed, is removed.
pub(crate) fn decision(candidates: &[Candidate], zone: &TimeZone, policy: &Retention, confirmed: &Retention, now: Now) -> Decision {
    let verdicts = retention::decide(candidates, policy, now.clock, zone);
    let wanted = falling(&verdicts);
    let agreed = match policy == confirmed {
        true => wanted.clone(),
        false => falling(&retention::decide(candidates, confirmed, now.clock, zone)),
    };
    let agreed: BTreeSet<String> = wanted.intersection(&agreed).cloned().collect();
    let doubt = believed::doubt(now.clock, now.believed);
    let remove: BTreeSet<String> = match doubt {
        None => agreed.clone(),
        Some(_) => falling(&retention::decide(candidates, policy, now.believed, zone)).intersection(&agreed).cloned().collect(),
    };
    Decision { verdicts, held_back: wanted.len() - agreed.len(), doubted: agreed.len() - remove.len(), doubt, remove }
}

/// What the configured rules decide, beside those that were last in force. Of backups that no rule removes there may be no verdict.
fn configured(ledger: &Ledger, job: &Job, target: &Destination) -> Result<(Decision, Retention), Failure> {
    let (policy, before) = (policy(job, target), confirmed(ledger, &job.name, &target.name)?);
    // Where no rule removes anything the backups need not be looked at, whatever there are.
    let candidates = if policy.keeps_everything() { Vec::new() } else { candidates(&ledger.backups_at(&job.name, &target.name)?)? };
    Ok((decision(&candidates, &job.zone(), policy, &before, Now::of(ledger)?), before))
}

/// What a policy (the configured one, when none is given) makes of a job's backups at a destination. `next` says when the job is
/// due after a time.
pub fn plan(
    ledger: &Ledger,
    job: &Job,
    target: &Destination,
    simulated: Option<&Retention>,
    next: &dyn Fn(Timestamp) -> Option<Timestamp>,
) -> Result<RetentionPlan, Failure> {
    let policy = simulated.unwrap_or_else(|| policy(job, target));
    let confirmed = confirmed(ledger, &job.name, &target.name)?;
    let backups = ledger.backups_at(&job.name, &target.name)?;
    let candidates = candidates(&backups)?;
    let Decision { verdicts, remove, held_back, doubted, .. } = decision(&candidates, &job.zone(), policy, &confirmed, Now::of(ledger)?);
    let ticks = std::iter::successors(next(Timestamp::now()), |t| next(*t));
    let falls = retention::falls(&candidates, policy, Timestamp::now(), &job.zone(), ticks);
    let backups: BTreeMap<&str, &Backup> = backups.iter().map(|b| (b.id.as_str(), b)).collect();
    let verdict = |v: Verdict| {
        let backup = backups.get(v.id.as_str())?;
        Some(RetentionVerdict {
            falls: falls.get(&v.id).map(ToString::to_string),
            id: v.id,
            time: backup.time.clone(),
            outcome: backup.outcome,
            pinned: backup.pinned,
            proven: backup.proven.clone(),
            keep: v.keep,
            quarantined: v.quarantined,
            reasons: v.reasons,
        })
    };
    let mut verdicts: Vec<RetentionVerdict> = verdicts.into_iter().filter_map(verdict).collect();
    verdicts.extend(catalogue::unreadable(&target.name, ledger)?.into_iter().map(|id| RetentionVerdict {
        id,
        outcome: Outcome::Suspect,
        keep: true,
        quarantined: true,
        reasons: vec!["its manifest cannot be read: it may be of any job, counts for nothing and is never removed".into()],
        ..RetentionVerdict::default()
    }));
    Ok(RetentionPlan {
        job: job.name.clone(),
        destination: target.name.clone(),
        policy: policy.numbers(),
        in_force: confirmed.numbers(),
        simulated: simulated.is_some(),
        removes: (remove.len() + held_back + doubted) as u64,
        held_back: if simulated.is_some() { 0 } else { (held_back + doubted) as u64 },
        verdicts,
    })
}

/// Removes what the rules remove and, where that was something, prunes. A policy that was changed and would remove more than the one
/// before is not applied further than the one before until somebody confirmed it.
pub fn apply(
    env: &Environment,
    job: &Job,
    target: &Destination,
    repository: &std::sync::Arc<Repository>,
    lease: &Lease,
    live: &LiveRun,
    gate: ReaderGate<'_>,
) -> Result<(), Failure> {
    renew_locks(env, target, repository, live)?;
    if target.append_only {
        return Ok(());
    }
    let remove = decided(env, job, target, live)?;
    // What was condemned earlier is deleted when its time has come.
    if remove.is_empty() && !repository.has_expired(check::grace(target), believed::now(&env.ledger)?.as_second())? {
        return Ok(());
    }
    live.step("retention");
    for id in &remove {
        lease.check()?;
        if live.cancel.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        catalogue::remove(repository, &target.name, &env.ledger, id)?;
        live.message(Level::Info, format!("retention removed backup {} from {}", short(id), target.name));
        super::registry::audit::removed(&env.ledger, &job.name, &target.name, id, &live.id());
    }
    check::prune(env, target, repository, false, live, gate)
}

/// What is to be removed now; a policy that is held back is told, one that removes no more than the one before is in force from now on.
pub fn decided(env: &Environment, job: &Job, target: &Destination, live: &LiveRun) -> Result<BTreeSet<String>, Failure> {
    let (decision, before) = configured(&env.ledger, job, target)?;
    if let Some(text) = doubted_words(job, target, &decision) {
        live.message(Level::Warning, text);
    }
    if let Some(text) = held_back_words(job, target, decision.held_back) {
        live.message(Level::Warning, text);
    } else if before != *policy(job, target) {
        confirm(&env.ledger, job, target)?;
    }
    Ok(decision.remove)
}

/// Locks what is in use for another period, once in a quarter of it. What is condemned, or no backup any more, is not among that: its lock
/// ends.
fn renew_locks(env: &Environment, target: &Destination, repository: &std::sync::Arc<Repository>, live: &LiveRun) -> Result<(), Failure> {
    if !locks_are_due(&env.ledger, target)? {
        return Ok(());
    }
    live.step("renewing locks");
    let renewed = repository.renew_locks()?;
    let text = lock_note_text(target, Timestamp::now().as_second());
    env.ledger.set_note(&lock_note(target), &text)?;
    live.message(Level::Info, format!("{renewed} objects at {} are locked anew", target.name));
    Ok(())
}

fn lock_note(target: &Destination) -> String {
    format!("locks renewed at {}", target.name)
}

fn lock_note_text(target: &Destination, time: i64) -> String {
    format!("{time} {}", target.object_lock.unwrap_or_default().as_secs())
}

fn locks_are_due(ledger: &Ledger, target: &Destination) -> Result<bool, Failure> {
    let Some(period) = target.object_lock else { return Ok(false) };
    let note = ledger.note(&lock_note(target))?.unwrap_or_default();
    let last = note.split_once(' ').filter(|(_, p)| p.parse() == Ok(period.as_secs())).and_then(|(time, _)| time.parse::<i64>().ok());
    Ok(last.is_none_or(|last| Timestamp::now().as_second().abs_diff(last) >= period.as_secs() / 4))
}

/// What a changed policy would remove and does not until it is confirmed, in words.
pub fn held_back(ledger: &Ledger, job: &Job, target: &Destination) -> Result<Option<String>, Failure> {
    if target.append_only {
        return Ok(None);
    }
    let decision = configured(ledger, job, target)?.0;
    let words = [doubted_words(job, target, &decision), held_back_words(job, target, decision.held_back)];
    Ok(words.into_iter().flatten().reduce(|a, b| format!("{a}; {b}")))
}

/// What the rules would remove by a clock that is not believed, in words.
fn doubted_words(job: &Job, target: &Destination, Decision { doubted, doubt, .. }: &Decision) -> Option<String> {
    doubt.as_ref().filter(|_| *doubted > 0).map(|doubt| {
        format!(
            "{doubt}; {doubted} backups of job {} at {} that the rules would remove by it stay until the machine ran with it for {days} days, or {} \
             starts of it over {days} days found it there, or 'keepctl retention {} --apply' says that it is right",
            job.name,
            target.name,
            believed::STARTS,
            job.name,
            days = believed::SETTLED / 86_400
        )
    })
}

fn held_back_words(job: &Job, target: &Destination, held_back: usize) -> Option<String> {
    (held_back > 0).then(|| {
        format!(
            "retention of job {} at {} was changed and would remove {held_back} more backups than the rules before; they stay until \
             'keepctl retention {} --apply' confirms it",
            job.name, target.name, job.name
        )
    })
}

/// Whether a cleanup of a job at a destination would do anything, as far as the ledger knows.
pub fn has_work(ledger: &Ledger, job: &Job, target: &Destination) -> Result<bool, Failure> {
    if locks_are_due(ledger, target)? {
        return Ok(true);
    }
    if target.append_only {
        return Ok(false);
    }
    let now = believed::now(ledger)?.as_second();
    let condemned: Option<i64> = ledger.note(&check::condemned_note(&target.name))?.and_then(|t| t.parse().ok());
    if condemned.is_some_and(|since| is_over(since, now, check::grace(target))) {
        return Ok(true);
    }
    Ok(!configured(ledger, job, target)?.0.remove.is_empty())
}
