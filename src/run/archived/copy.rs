//! Copies to a destination of archives: each is exported from a place that has the backup.

use std::sync::Arc;

use keepd_protocol::model::{Backup, Level, Mark as Said};
use minicbor::bytes::ByteArray;
use tokio_util::sync::CancellationToken;

use super::backup::read_back;
use super::{catalogue, is, open, stage, upkeep};
use crate::archive::{Archives, Companion};
use crate::config::{Destination, Job};
use crate::portable::{Head, write};
use crate::repository::{Manifest, Mark};
use crate::run::backup::{Environment, ReaderGate, short, unhex};
use crate::run::copy::{self, Reading};
use crate::run::live::{Failure, Finish, LiveRun};
use crate::run::restore::{self, Place};
use crate::run::{catalogue as ledgered, destination, export, readable};

/// Brings what is missing to a destination of archives, or the one backup that is given; then retention there.
pub fn to_destination(
    env: &Environment,
    job: Option<&Job>,
    target: &Destination,
    one: Option<&str>,
    live: &LiveRun,
    gate: ReaderGate<'_>,
    reading: Reading<'_>,
) -> Result<Finish, Failure> {
    live.step("opening the archives");
    let place = open(env, target)?;
    place.storage.prepare()?;
    for problem in catalogue::sync(&place, &env.ledger, &live.cancel)? {
        live.message(Level::Warning, problem);
    }
    let wanted = copy::wanted(env, job, target, one)?;
    let (mut done, mut errors, mut closed) = (0, Vec::new(), 0);
    for backup in &wanted {
        let copied = copy::with_best(&env.config, target, backup, reading, |from, reading| {
            export_one(env, target, &place, at(env, from, &backup.id, reading, &live.cancel)?, backup, live)
        });
        match copied {
            Ok(_) => done += 1,
            Err(Failure::Cancelled) => return Err(Failure::Cancelled),
            Err(e) => {
                closed += usize::from(matches!(e, Failure::NeedsKey(_)));
                errors.push(format!("backup {}: {e}", short(&backup.id)));
            }
        }
    }
    live.message(Level::Info, format!("{done} of {} backups copied to {}", wanted.len(), target.name));
    if !errors.is_empty() {
        let text = format!("destination {}: {}", target.name, errors.join("; "));
        return Err(if closed == errors.len() { Failure::NeedsKey(text) } else { Failure::Failed(text) });
    }
    if let Some(job) = job
        && let Err(e) = upkeep::retain(env, job, target, &place, live, gate)
        && !matches!(e, Failure::Cancelled)
    {
        live.message(Level::Error, format!("the copies are made, but cleaning up after them failed: {e}"));
    }
    Ok(Finish::Good)
}

/// A backup as a destination has it.
fn at(
    env: &Environment,
    from: &Destination,
    id: &str,
    reading: Arc<dyn Send + Sync>,
    cancel: &CancellationToken,
) -> Result<Place, Failure> {
    let all = readable::Reading::Contents(Vec::new());
    if is(from) {
        return stage::place(env, from, id, &all, reading, cancel);
    }
    let repository = destination::open(env, from, false)?;
    for problem in repository.sync_index()? {
        tracing::warn!(destination = %from.name, "{problem}");
    }
    let manifest = repository.read_manifest(&ledgered::object(&env.ledger, &from.name, id)?).map_err(restore::unreadable)?;
    readable::check(&repository, &manifest, &all, &from.name)?;
    Ok(Place { repository, manifest, destination: from.name.clone(), _reading: reading })
}

fn export_one(
    env: &Environment,
    target: &Destination,
    place: &Archives,
    from: Place,
    backup: &Backup,
    live: &LiveRun,
) -> Result<(), Failure> {
    live.step(&format!("copying backup {} from {}", short(&backup.id), from.destination));
    live.update(|run| run.backup = Some(backup.id.clone()));
    let started = from.manifest.started.parse().map_err(|e| Failure::Failed(format!("its time does not parse: {e}")))?;
    let name = place.free_name(&from.manifest.job, started)?.to_string();
    let options =
        write::Options { packing: place.packing, seal: place.profile.as_ref(), work_dir: &place.work_dir, cancel: live.cancel.clone() };
    let known = from.manifest.clone();
    let (out, made) = export::into_archive(from, &mut || None, backup, &[], place.storage.writer(&name)?, &options, live)?;
    if live.cancel.is_cancelled() {
        return Err(Failure::Cancelled);
    }
    out.finish()?;
    let newest = env.ledger.newest_in_chain(&target.name)?.map_or(0, |d| d.sequence);
    let is_it = |head: &Head| head.origin.backup == backup.id;
    if let Err(e) = read_back(place, &name, &is_it, &made, live) {
        if !target.append_only {
            place.remove(&name)?;
        }
        return Err(Failure::Storage(format!("destination {}: what was written cannot be read back: {e}", target.name)));
    }
    let manifest = Manifest {
        sequence: ledgered::next_sequence(&target.name, &env.ledger, newest)?,
        predecessor: None,
        parent: None,
        new_bytes: None,
        added_bytes: made.bytes,
        outcome: backup.outcome.as_str().into(),
        origin: unhex(&backup.id).map(ByteArray::from),
        ..known
    };
    let detail = ledgered::detail(&name, &manifest);
    env.ledger.put_backup(&target.name, &detail)?;
    let companion = Companion { sha256: made.sha256.clone(), ..catalogue::made_up(&detail, place.profile.is_some(), made.bytes) };
    if let Err(e) = place.put_companion(&companion) {
        live.message(Level::Warning, format!("the copy is made, but what stands beside it could not be written: {e}"));
    }
    live.set_added(live.snapshot().progress.added_bytes + made.bytes);
    live.report.entry();
    if backup.pinned {
        let said = Mark::new([0; 32], Said::Pin.as_str(), jiff::Timestamp::now().to_string(), live.snapshot().by);
        catalogue::mark(env, target, &backup.id, &said)?;
    }
    Ok(())
}
