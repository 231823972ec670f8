//! Check, prune and delete as runs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use std::time::Duration;

use jiff::Timestamp;
use keepd_protocol::model::Level;

use super::backup::{Environment, ReaderGate, Writing, short, unhex};
use super::copy::{self, Reading};
use super::live::{Failure, Finish, LiveRun};
use super::{archived, catalogue, config_backup, destination, housekeeping};
use crate::config::Destination;
use crate::repository::condemned::Now;
use crate::repository::lease::Lease;
use crate::repository::prune::{self, Amount, PruneOptions, PruneReport};
use crate::repository::{Repository, RepositoryError, check};

/// Problems told one by one.
const MAX_TOLD: usize = 100;

/// What is to be checked.
#[derive(Debug, Clone, Copy)]
pub enum Wanted {
    /// The structure, and so many percent of the packs.
    Percent(u32),
    /// The next packs of a rolling check with this period.
    Rolling(Duration),
}

/// Checks a destination; damage that cannot be repaired from other destinations makes the run fail. `hurt_jobs` gets the jobs whose
/// backups are hurt.
pub fn check_destination(
    env: &Environment,
    target: &Destination,
    wanted: Wanted,
    live: &LiveRun,
    writing: Writing<'_>,
    reading: Reading<'_>,
    hurt_jobs: &mut BTreeSet<String>,
) -> Result<Finish, Failure> {
    let checked = match config_backup::are_all(env, target)? {
        true => Ok(Finish::Good),
        false => check_backups(env, target, wanted, live, writing, reading, hurt_jobs),
    };
    match checked {
        Err(Failure::Cancelled | Failure::Storage(_)) => checked,
        _ if matches!(wanted, Wanted::Rolling(_)) => checked,
        checked => match config_backup::check(env, target, live) {
            Ok(damaged) => with_configurations(checked, &damaged, live),
            Err(e) => checked.and(Err(e)),
        },
    }
}

fn check_backups(
    env: &Environment,
    target: &Destination,
    wanted: Wanted,
    live: &LiveRun,
    writing: Writing<'_>,
    reading: Reading<'_>,
    hurt_jobs: &mut BTreeSet<String>,
) -> Result<Finish, Failure> {
    if archived::is(target) {
        let percent = match wanted {
            Wanted::Percent(percent) => percent,
            Wanted::Rolling(_) => 0,
        };
        return archived::upkeep::check(env, target, percent, live, hurt_jobs);
    }
    live.step("opening the repository");
    let repository = destination::open(env, target, false)?;
    let what = match wanted {
        Wanted::Percent(percent) => check::Reading::Percent(percent),
        Wanted::Rolling(period) => {
            let due = period.saturating_sub(housekeeping::pause(period));
            let before = Timestamp::now().as_second().saturating_sub_unsigned(due.as_secs());
            check::Reading::Next { before, now: Timestamp::now().as_second(), share: housekeeping::share(period) }
        }
    };
    live.step(match wanted {
        Wanted::Percent(0) => "reading the structure",
        Wanted::Percent(_) => "reading packs and structure",
        Wanted::Rolling(_) => "reading the next packs",
    });
    let seen = AtomicU64::new(0);
    let progress = |done: usize, all: usize, bytes: u64| {
        let before = seen.swap(bytes, Ordering::Relaxed);
        live.report.bytes(bytes.saturating_sub(before));
        live.report.entry();
        if all > 0 {
            live.update(|run| run.progress.percent = Some((done * 1000 / all) as f64 / 10.0));
        }
    };
    let report = check::check(&repository, what, &progress, &live.cancel)?;
    let lost = missing_from_storage(env, &repository, &target.name)?;
    for problem in report.problems.iter().chain(&lost).take(MAX_TOLD) {
        live.message(Level::Error, problem.clone());
    }
    let ids = env.ledger.objects(&target.name)?;
    for (object, paths) in report.hurt.iter().take(MAX_TOLD) {
        let id = ids.get(object).unwrap_or(object);
        let detail = env.ledger.backup_detail(id)?;
        hurt_jobs.extend(detail.as_ref().map(|d| d.backup.job.clone()));
        let job = detail.map(|d| format!(" of job {} from {}", d.backup.job, d.started)).unwrap_or_default();
        live.message(Level::Error, format!("backup {}{job} is hurt: {}", short(id), paths.join(", ")));
    }
    for problem in catalogue::sync(&repository, &target.name, &env.ledger)? {
        if !report.problems.contains(&problem) {
            live.message(Level::Error, problem);
        }
    }
    let read = format!("{} of {} packs read, {} bytes", report.packs_read, report.packs, report.bytes_read);
    if report.packs_closed > 0 {
        let text = format!(
            "{} packs could only be compared with their names (SHA-256): what is in them opens with a private key alone, 'keepctl check {} \
             --read-data --key FILE' reads it too",
            report.packs_closed, target.name
        );
        live.message(Level::Info, text);
    }
    if report.problems.is_empty() && report.hurt.is_empty() && lost.is_empty() {
        let backups = if matches!(wanted, Wanted::Rolling(_)) { String::new() } else { format!("{} backups, ", report.backups) };
        live.message(Level::Info, format!("no damage found: {backups}{read}"));
        return Ok(Finish::Good);
    }
    if !report.hurt.is_empty() && lost.is_empty() {
        let repaired = copy::repair(env, target, &repository, report.hurt.keys(), live, writing, reading)?;
        if repaired == report.hurt.len() {
            live.message(
                Level::Warning,
                format!("all {repaired} hurt backups were repaired from other destinations, and that was verified"),
            );
            return Ok(Finish::Partial);
        }
    }
    if report.hurt.is_empty() && lost.is_empty() && report.replaceable == report.problems.len() && !target.append_only {
        let text = format!(
            "{} damaged or missing objects, and no backup lacks anything by them; 'keepctl prune {}' replaces them ({read})",
            report.problems.len(),
            target.name
        );
        live.message(Level::Warning, text);
        return Ok(Finish::Partial);
    }
    let problems = report.problems.len() + lost.len();
    Err(Failure::Failed(format!(
        "{problems} damaged or missing objects, {} of {} backups hurt ({read})",
        report.hurt.len(),
        report.backups
    )))
}

/// How a check ends where stored configurations are damaged.
fn with_configurations(checked: Result<Finish, Failure>, damaged: &[String], live: &LiveRun) -> Result<Finish, Failure> {
    for problem in damaged.iter().take(MAX_TOLD) {
        live.message(Level::Error, problem.clone());
    }
    let text = format!("{} stored configurations are damaged or missing", damaged.len());
    match checked {
        checked if damaged.is_empty() => checked,
        Ok(_) => Err(Failure::Failed(text)),
        Err(Failure::Failed(also)) => Err(Failure::Failed(format!("{also}; {text}"))),
        Err(other) => Err(other),
    }
}

/// Backups that the ledger knows here and the storage no longer has: removed by somebody else than keepd.
fn missing_from_storage(env: &Environment, repository: &Repository, name: &str) -> Result<Vec<String>, Failure> {
    let known = env.ledger.objects(name)?;
    let listed = repository.listed_backups()?;
    let gone: Vec<String> = known.into_keys().filter(|id| !unhex(id).is_some_and(|raw| listed.contains(&raw))).collect();
    repository.storage().are_gone("backups/", gone.iter().map(|id| format!("backups/{id}"))).map_err(RepositoryError::from)?;
    Ok(gone.iter().map(|id| format!("{}: backups/{id}: it is missing", repository.location())).collect())
}

/// Makes this machine the writer of a destination's repository.
pub fn take_over(env: &Environment, target: &Destination) -> Result<String, Failure> {
    if config_backup::are_all(env, target)? {
        return Ok(format!("nothing but configurations was stored at {}; what is there now counts as all that there is", target.name));
    }
    if archived::is(target) {
        return archived::upkeep::take_over(env, target);
    }
    let repository = destination::open(env, target, false)?;
    let holder = destination::holder(&env.config.daemon.state_dir)?;
    let before = Lease::take_over(&repository, &holder)?;
    destination::accept_keys(env, &repository)?;
    for problem in catalogue::sync(&repository, &target.name, &env.ledger)? {
        tracing::warn!(destination = %target.name, "{problem}");
    }
    Ok(match before {
        Some(who) => format!("this machine writes to {} now; before it was {who}", target.name),
        None => format!("this machine writes to {} now; nobody did before", target.name),
    })
}

/// Between condemning a pack and deleting it: no earlier than its lock ends, which nobody renews once it is condemned.
pub fn grace(target: &Destination) -> Duration {
    target.prune_grace.max(target.object_lock.unwrap_or_default())
}

pub fn may_delete(target: &Destination) -> Result<(), Failure> {
    match target.append_only {
        true => Err(Failure::Failed(format!("destination {} is append_only: keepd deletes nothing there", target.name))),
        false => Ok(()),
    }
}

fn goes_on(live: &LiveRun) -> Result<(), Failure> {
    if live.cancel.is_cancelled() { Err(Failure::Cancelled) } else { Ok(()) }
}

/// Removes those of several backups that still are to go when it is their turn.
pub fn delete_backups(
    env: &Environment,
    target: &Destination,
    ids: &[String],
    live: &LiveRun,
    goes: &dyn Fn(&str) -> Result<bool, Failure>,
    gate: ReaderGate<'_>,
) -> Result<(), Failure> {
    if archived::is(target) {
        for id in ids {
            goes_on(live)?;
            if goes(id)? {
                archived::upkeep::delete(env, target, id, live, gate)?;
            }
        }
        return Ok(());
    }
    may_delete(target)?;
    live.step("opening the repository");
    let (repository, lease) = destination::open_for_writing(env, target, live, false)?;
    live.step("deleting");
    let mut removed = 0;
    let mut all = || {
        for id in ids {
            goes_on(live)?;
            lease.check()?;
            if goes(id)? {
                catalogue::remove(&repository, &target.name, &env.ledger, id)?;
                removed += 1;
            }
        }
        Ok(())
    };
    let done = all();
    let text = format!("{removed} backups are removed from {}; 'keepctl prune {}' frees their space", target.name, target.name);
    live.message(Level::Info, text);
    done
}

/// Prunes a destination.
pub fn prune_destination(
    env: &Environment,
    target: &Destination,
    dry_run: bool,
    live: &LiveRun,
    gate: ReaderGate<'_>,
) -> Result<Finish, Failure> {
    if archived::is(target) {
        return archived::upkeep::prune(env, target, dry_run, live);
    }
    live.step("opening the repository");
    if !dry_run {
        may_delete(target)?;
    }
    if dry_run {
        let repository = destination::open(env, target, false)?;
        prune(env, target, &repository, true, live, gate)?;
        return Ok(Finish::Good);
    }
    let (repository, lease) = destination::open_for_writing(env, target, live, false)?;
    prune(env, target, &repository, false, live, gate)?;
    lease.check()?;
    Ok(Finish::Good)
}

/// Prunes an open repository and tells what that did. The caller has the lease.
pub fn prune(
    env: &Environment,
    target: &Destination,
    repository: &Arc<Repository>,
    dry_run: bool,
    live: &LiveRun,
    gate: ReaderGate<'_>,
) -> Result<(), Failure> {
    let alone = || gate(&target.name);
    let known: Vec<[u8; 32]> = catalogue::known(&target.name, &env.ledger)?.iter().filter_map(|id| unhex(id)).collect();
    let now = Now::believing(crate::believed::now(&env.ledger)?.as_second());
    let options = PruneOptions { dry_run, grace: grace(target), known: &known, now, alone: &alone };
    let report = prune::prune(repository, &options, &|step| live.step(step), &live.cancel)?;
    tell_prune(&report, &options, live);
    let earliest = repository.earliest_condemned()?.map(|t| t.to_string()).unwrap_or_default();
    Ok(env.ledger.set_note(&condemned_note(&target.name), &earliest)?)
}

/// Since when something is condemned at a destination, in seconds since 1970; empty when nothing is.
pub fn condemned_note(destination: &str) -> String {
    format!("condemned at {destination}")
}

/// What a prune did, a message for each thing.
fn tell_prune(report: &PruneReport, options: &PruneOptions<'_>, live: &LiveRun) {
    let verb = if options.dry_run { "would be" } else { "were" };
    let tell = |amount: Amount, what: &str| {
        if amount.packs > 0 {
            live.message(Level::Info, format!("{} packs, {} bytes, {what}", amount.packs, amount.bytes));
        }
    };
    let grace = crate::config::show_duration(options.grace);
    tell(report.condemned, &format!("{verb} condemned: nothing needs them; they are deleted after {grace}"));
    tell(report.rewritten, &format!("{verb} rewritten: most of them is needed by nothing (the bytes are what that saves)"));
    if report.closed.packs > 0 {
        let Amount { packs, bytes } = report.closed;
        let text = format!("{packs} packs are dead in part, {bytes} bytes, and wait: they open with a private key alone (--key FILE)");
        live.message(Level::Info, text);
    }
    tell(report.taken_back, &format!("{verb} condemned and are needed again"));
    tell(report.waiting, &format!("are condemned and wait until {grace} are over"));
    tell(report.held, "are to be deleted when the restore that is reading has ended, by the next prune");
    live.message(
        Level::Info,
        format!(
            "{} of {} packs {verb} deleted, {} of {} bytes freed",
            report.deleted.packs, report.before.packs, report.deleted.bytes, report.before.bytes
        ),
    );
}

/// Removes a backup from a destination; its data goes with the next prune.
pub fn delete_backup(env: &Environment, target: &Destination, id: &str, live: &LiveRun, gate: ReaderGate<'_>) -> Result<Finish, Failure> {
    if archived::is(target) {
        return archived::upkeep::delete(env, target, id, live, gate);
    }
    may_delete(target)?;
    live.step("opening the repository");
    let (repository, lease) = destination::open_for_writing(env, target, live, false)?;
    live.step("deleting");
    lease.check()?;
    catalogue::remove(&repository, &target.name, &env.ledger, id)?;
    live.message(
        Level::Info,
        format!("backup {} is removed from {}; 'keepctl prune {}' frees its space", short(id), target.name, target.name),
    );
    Ok(Finish::Good)
}
