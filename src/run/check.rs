//! Check, prune and delete as runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use keepd_protocol::model::Level;

use super::backup::{Environment, short, unhex};
use super::live::{Failure, Finish, LiveRun};
use super::{catalogue, destination};
use crate::config::Destination;
use crate::repository::lease::{Lease, TERM};
use crate::repository::{Repository, check, prune};

/// Problems told one by one.
const MAX_TOLD: usize = 100;

/// Checks a destination; damage makes the run fail.
pub fn check_destination(env: &Environment, target: &Destination, read_data: u32, live: &LiveRun) -> Result<Finish, Failure> {
    live.step("opening the repository");
    let repository = destination::open(&env.config, target, &env.ledger, &env.runtime, false)?;
    live.step(if read_data > 0 { "reading packs and structure" } else { "reading the structure" });
    let seen = AtomicU64::new(0);
    let progress = |done: usize, all: usize, bytes: u64| {
        let before = seen.swap(bytes, Ordering::Relaxed);
        live.report.bytes(bytes.saturating_sub(before));
        live.report.entry();
        if all > 0 {
            live.update(|run| run.progress.percent = Some((done * 1000 / all) as f64 / 10.0));
        }
    };
    let report = check::check(&repository, read_data, &progress, &live.cancel)?;
    let lost = missing_from_storage(env, &repository, &target.name)?;
    for problem in report.problems.iter().chain(&lost).take(MAX_TOLD) {
        live.message(Level::Error, problem.clone());
    }
    for (id, paths) in report.hurt.iter().take(MAX_TOLD) {
        let job = env.ledger.backup_detail(id)?.map(|d| format!(" of job {} from {}", d.backup.job, d.started)).unwrap_or_default();
        live.message(Level::Error, format!("backup {}{job} is hurt: {}", short(id), paths.join(", ")));
    }
    catalogue::sync(&repository, &target.name, &env.ledger)?;
    let read = format!("{} of {} packs read, {} bytes", report.packs_read, report.packs, report.bytes_read);
    if report.problems.is_empty() && report.hurt.is_empty() && lost.is_empty() {
        live.message(Level::Info, format!("no damage found: {} backups, {read}", report.backups));
        return Ok(Finish::Good);
    }
    let problems = report.problems.len() + lost.len();
    Err(Failure::Failed(format!(
        "{problems} damaged or missing objects, {} of {} backups hurt ({read})",
        report.hurt.len(),
        report.backups
    )))
}

/// Backups that the ledger knows here and the storage no longer has: removed by somebody else than keepd.
fn missing_from_storage(env: &Environment, repository: &Repository, name: &str) -> Result<Vec<String>, Failure> {
    let listed = repository.listed_backups()?;
    let gone = env.ledger.backup_ids(name)?.into_iter().filter(|id| !unhex(id).is_some_and(|raw| listed.contains(&raw)));
    Ok(gone.map(|id| format!("{}: backups/{id}: it is missing", repository.location())).collect())
}

/// Prunes a destination.
pub fn prune_destination(env: &Environment, target: &Destination, dry_run: bool, live: &LiveRun) -> Result<Finish, Failure> {
    live.step("opening the repository");
    let (repository, lease) = open_for_writing(env, target, live)?;
    let report = prune::prune(&repository, dry_run, &|step| live.step(step), &live.cancel)?;
    lease.check()?;
    let verb = if dry_run { "would be" } else { "were" };
    live.message(
        Level::Info,
        format!(
            "{} of {} packs {verb} removed, {} rewritten; {} of {} bytes {verb} freed",
            report.packs_removed, report.packs, report.packs_rewritten, report.bytes_freed, report.bytes_before
        ),
    );
    Ok(Finish::Good)
}

/// Removes a backup from a destination; its data goes with the next prune.
pub fn delete_backup(env: &Environment, target: &Destination, id: &str, live: &LiveRun) -> Result<Finish, Failure> {
    live.step("opening the repository");
    let (repository, lease) = open_for_writing(env, target, live)?;
    live.step("deleting");
    lease.check()?;
    catalogue::remove(&repository, &target.name, &env.ledger, id)?;
    live.message(
        Level::Info,
        format!("backup {} is removed from {}; 'keepctl prune {}' frees its space", short(id), target.name, target.name),
    );
    Ok(Finish::Good)
}

pub(super) fn open_for_writing(env: &Environment, target: &Destination, live: &LiveRun) -> Result<(Arc<Repository>, Lease), Failure> {
    let repository = destination::open(&env.config, target, &env.ledger, &env.runtime, false)?;
    let holder = destination::holder(&env.config.daemon.state_dir)?;
    let lease = Lease::acquire(&repository, &holder, &live.id(), TERM, &live.cancel)?;
    Ok((repository, lease))
}
