//! A backup: capture every source into one destination, commit, then retention and prune there.

use std::sync::Arc;

use jiff::Timestamp;
use keepd_protocol::model::{BackupType, Level, Outcome};
use minicbor::bytes::ByteArray;
use tokio::runtime::Handle;

use super::live::{Failure, Finish, LiveRun};
use super::registry::BackupRequest;
use super::{archived, catalogue, destination, names, outcome, retain, set};
use crate::config::{Config, Destination, Job};
use crate::crypto::Lent;
use crate::ledger::Ledger;
use crate::repository::writer::{self, Writer};
use crate::repository::{Manifest, Repository};

/// What a run of any kind needs from the daemon.
pub struct Environment {
    pub config: Arc<Config>,
    pub ledger: Arc<Ledger>,
    pub runtime: Handle,
    /// Private keys that whoever started the run lends to it; every repository it opens gets them, and they go with it.
    pub lent: Lent,
}

/// Keeps readers of a repository away while packs are removed; None when there are some just now.
pub type ReaderGate<'a> = &'a dyn Fn(&str) -> Option<Box<dyn Send>>;

/// Waits until nobody else writes to a destination, and keeps others away while it lives.
pub type Writing<'a> = &'a dyn Fn(&str) -> Result<Box<dyn Send>, Failure>;

/// Backs a job up to the first of its destinations that answers; the others get a copy of that. How it ended, and the backup's id.
pub fn backup(
    env: &Environment,
    job: &Job,
    request: &BackupRequest,
    live: &LiveRun,
    gate: ReaderGate<'_>,
    writing: Writing<'_>,
) -> Result<(Finish, String), Failure> {
    let mut errors: Vec<String> = Vec::new();
    for name in &job.destinations {
        let target = env.config.destinations.get(name).ok_or_else(|| Failure::Failed(format!("there is no destination '{name}'")))?;
        live.step(&format!("waiting for {name}"));
        let _alone = writing(name)?;
        match to_destination(env, job, target, request, live, gate) {
            Ok((outcome, id)) => {
                for text in &errors {
                    live.message(Level::Error, format!("{text}; the backup went to {name}"));
                }
                let finish = match (outcome, live.report.left_out_count()) {
                    (Outcome::Suspect, _) => Finish::Suspect,
                    (Outcome::Good, 0) => Finish::Good,
                    (Outcome::Good, _) => Finish::Partial,
                };
                return Ok((finish, id));
            }
            // The next one is asked when it is this one's fault.
            Err(Failure::Storage(text)) => errors.push(text),
            Err(other) => return Err(other),
        }
    }
    Err(Failure::Failed(errors.join("; ")))
}

fn to_destination(
    env: &Environment,
    job: &Job,
    target: &Destination,
    request: &BackupRequest,
    live: &LiveRun,
    gate: ReaderGate<'_>,
) -> Result<(Outcome, String), Failure> {
    if archived::is(target) {
        return archived::backup::backup(env, job, target, request, live, gate);
    }
    live.step("opening the repository");
    live.update(|run| run.destination = Some(target.name.clone()));
    let (repository, lease) = destination::open_for_writing(env, target, live, true)?;
    let (indexed, catalogued) =
        side_by_side(|| repository.sync_index_in_turn(), || catalogue::sync(&repository, &target.name, &env.ledger));
    // First what the catalogue says, whatever became of the index: it says only once that backups are gone.
    let catalogued = catalogued.map(|problems| problems.into_iter().for_each(|problem| live.message(Level::Warning, problem)));
    for problem in indexed? {
        live.message(Level::Warning, format!("{problem}; what it held is stored anew where it is still there"));
    }
    catalogued?;
    let newest = env.ledger.newest_in_chain(&target.name)?;
    let parent = previous_manifest(env, &repository, target, &job.name, live)?;
    let previous = parent.as_ref().map(|(_, manifest)| manifest);
    let added_before = live.snapshot().progress.added_bytes;
    let started = Timestamp::now();
    let mut writer = Writer::new(repository.clone(), live.cancel.clone())?;
    let set = set::capture(env, job, previous, &repository, &mut writer, live)?;
    live.step("storing");
    let flushed = writer.flush()?;
    live.set_added(added_before + flushed.added_bytes);
    live.tick();
    let snapshot = live.snapshot();
    let mut manifest = Manifest {
        format: 1,
        repository: ByteArray::from(repository.raw_id()),
        sequence: catalogue::next_sequence(&target.name, &env.ledger, newest.as_ref().map_or(0, |d| d.sequence))?,
        predecessor: newest.as_ref().and_then(|d| unhex(d.object())).map(ByteArray::from),
        job: job.name.clone(),
        run: snapshot.id.clone(),
        started: started.to_string(),
        finished: Timestamp::now().to_string(),
        r#type: request.r#type.as_str().into(),
        outcome: Outcome::Good.as_str().into(),
        name: request.name.clone(),
        labels: request.labels.clone().into_iter().collect(),
        host: names::host(),
        keepd_version: env!("CARGO_PKG_VERSION").into(),
        sources: set.sources,
        users: names::users(&set.users),
        groups: names::groups(&set.groups),
        messages: snapshot.messages.iter().map(|m| (m.level.as_str().to_owned(), m.text.clone())).collect(),
        left_out: live.report.left_out_count(),
        added_bytes: flushed.added_bytes,
        new_bytes: Some(flushed.new_bytes),
        parent: parent.as_ref().map(|(id, _)| ByteArray::from(*id)),
        origin: None,
        description: request.description.clone(),
        version: set.version,
        schema_version: set.schema_version,
    };
    let history = env.ledger.newest_good(&job.name, &target.name, outcome::HISTORY)?;
    let mut reasons = set.reasons;
    reasons.extend(outcome::judge(&catalogue::detail("", &manifest), &history, &job.suspect));
    if !reasons.is_empty() {
        manifest.outcome = Outcome::Suspect.as_str().into();
    }
    for reason in reasons {
        manifest.messages.push((Level::Warning.as_str().to_owned(), format!("suspect: {reason}")));
        live.message(Level::Warning, format!("suspect: {reason}"));
    }
    if live.cancel.is_cancelled() {
        return Err(Failure::Cancelled);
    }
    lease.check()?;
    live.step("committing");
    let id = data_encoding::HEXLOWER.encode(&writer::commit(&repository, &manifest, &flushed)?);
    destination::remember(&env.ledger, &repository)?;
    let detail = catalogue::detail(&id, &manifest);
    env.ledger.put_backup(&target.name, &detail)?;
    live.update(|run| {
        run.backup.get_or_insert(id.clone());
    });
    if request.r#type == BackupType::PreRestore {
        // What is about to be restored must not be removed by what is made to be safe.
        return Ok((detail.backup.outcome, id));
    }
    // The backup is committed: what comes now may fail without taking that back.
    if let Err(e) = retain::apply(env, job, target, &repository, &lease, live, gate)
        && !matches!(e, Failure::Cancelled)
    {
        live.message(Level::Error, format!("the backup is made, but cleaning up after it failed: {e}"));
    }
    Ok((detail.backup.outcome, id))
}

/// Does two things at once that wait for the same storage; one after the other where there is no thread to be had.
fn side_by_side<A, B: Send>(one: impl FnOnce() -> A, other: impl Fn() -> B + Sync) -> (A, B) {
    std::thread::scope(|scope| {
        let beside = std::thread::Builder::new().name("catalogue".into()).spawn_scoped(scope, &other);
        let one = one();
        let other = match beside {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(_) => other(),
        };
        (one, other)
    })
}

/// The job's last manifest here. One that cannot be read costs only time: the next capture is then a full one.
fn previous_manifest(
    env: &Environment,
    repository: &Repository,
    target: &Destination,
    job: &str,
    live: &LiveRun,
) -> Result<Option<([u8; 32], Manifest)>, Failure> {
    let Some(id) = env.ledger.newest_of_job(job, &target.name)?.and_then(|id| unhex(&id)) else { return Ok(None) };
    match repository.read_manifest(&id) {
        Ok(manifest) => Ok(Some((id, manifest))),
        Err(e) => {
            live.message(Level::Warning, format!("the last backup cannot be built upon, everything is read again: {e}"));
            Ok(None)
        }
    }
}

pub fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// 64 hexadecimal digits.
pub fn unhex(id: &str) -> Option<[u8; 32]> {
    data_encoding::HEXLOWER.decode(id.as_bytes()).ok()?.try_into().ok()
}
