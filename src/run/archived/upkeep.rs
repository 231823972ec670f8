//! Retention, deletion, sweeping and checks of archives.

use std::collections::BTreeSet;
use std::io::Read;

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use keepd_protocol::model::{BackupDetail, Level};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::{catalogue, open};
use crate::archive::Archives;
use crate::archive::place::ReadError;
use crate::config::{Destination, Job};
use crate::crypto;
use crate::ledger::Ledger;
use crate::repository::Mark;
use crate::run::backup::{Environment, ReaderGate, short};
use crate::run::check::may_delete;
use crate::run::live::{Failure, Finish, LiveRun};
use crate::run::{catalogue as ledgered, retain as rules};

/// Problems told one by one.
const MAX_TOLD: usize = 100;

/// Removes what the rules remove.
pub fn retain(
    env: &Environment,
    job: &Job,
    target: &Destination,
    place: &Archives,
    live: &LiveRun,
    gate: ReaderGate<'_>,
) -> Result<(), Failure> {
    if target.append_only {
        return Ok(());
    }
    let remove = rules::decided(env, job, target, live)?;
    if remove.is_empty() {
        return Ok(());
    }
    live.step("retention");
    let Some(_alone) = gate(&target.name) else {
        live.message(Level::Info, format!("archives at {} are being read: what retention removes there goes the next time", target.name));
        return Ok(());
    };
    for id in &remove {
        if live.cancel.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        catalogue::remove(place, &env.ledger, id)?;
        live.message(Level::Info, format!("retention removed backup {} from {}", short(id), target.name));
        crate::run::registry::audit::removed(&env.ledger, &job.name, &target.name, id, &live.id());
    }
    Ok(())
}

/// The same as a run of its own.
pub fn clean_up(
    env: &Environment,
    job: &Job,
    target: &Destination,
    confirmed: bool,
    live: &LiveRun,
    gate: ReaderGate<'_>,
) -> Result<(), Failure> {
    live.step("opening the archives");
    let place = open(env, target)?;
    for problem in catalogue::sync(&place, &env.ledger, &live.cancel)? {
        live.message(Level::Warning, problem);
    }
    if confirmed {
        crate::believed::confirm(&env.ledger)?;
        rules::confirm(&env.ledger, job, target)?;
    }
    retain(env, job, target, &place, live, gate)
}

/// Removes a backup.
pub fn delete(env: &Environment, target: &Destination, id: &str, live: &LiveRun, gate: ReaderGate<'_>) -> Result<Finish, Failure> {
    may_delete(target)?;
    live.step("deleting");
    let busy = || Failure::Failed(format!("archives at {} are being read just now; delete it when that has ended", target.name));
    let _alone = gate(&target.name).ok_or_else(busy)?;
    catalogue::remove(&open(env, target)?, &env.ledger, id)?;
    live.message(Level::Info, format!("backup {} is removed from {}", short(id), target.name));
    Ok(Finish::Good)
}

/// Removes what interrupted runs left behind.
pub fn prune(env: &Environment, target: &Destination, dry_run: bool, live: &LiveRun) -> Result<Finish, Failure> {
    if dry_run {
        let text = format!("{} keeps archives: a prune only removes what interrupted runs left there", target.name);
        live.message(Level::Info, text);
        return Ok(Finish::Good);
    }
    may_delete(target)?;
    live.step("sweeping");
    let swept = open(env, target)?.sweep()?;
    live.message(Level::Info, format!("{swept} objects were removed that interrupted runs left at {}", target.name));
    Ok(Finish::Good)
}

/// Takes the archives as they are.
pub fn take_over(env: &Environment, target: &Destination) -> Result<String, Failure> {
    catalogue::accept_emptied(&env.ledger, &target.name)?;
    catalogue::accept_hosts(&env.ledger, &target.name)?;
    for problem in catalogue::sync(&open(env, target)?, &env.ledger, &CancellationToken::new())? {
        tracing::warn!(destination = %target.name, "{problem}");
    }
    Ok(format!("{} is taken as it is; archives have no writer of their own, so nobody's place is taken", target.name))
}

/// Checks the archives: each is there, as long as it was, and opens; of `percent` of them every byte is read and proven. Those that are damaged are
/// marked as suspect. `hurt_jobs` gets the jobs whose backups are hurt.
pub fn check(
    env: &Environment,
    target: &Destination,
    percent: u32,
    live: &LiveRun,
    hurt_jobs: &mut BTreeSet<String>,
) -> Result<Finish, Failure> {
    live.step("opening the archives");
    let place = open(env, target)?;
    let Examined { problems, hurt, all, read, bytes, closed, not_open, known } = examine(&place, &env.ledger, percent, live)?;
    for (detail, why) in &hurt {
        hurt_jobs.insert(detail.backup.job.clone());
        let text = format!("backup {} of job {} from {} is hurt", short(&detail.backup.id), detail.backup.job, detail.started);
        live.message(Level::Error, text);
        condemn(env, target, detail, why, live);
    }
    for problem in problems.iter().take(MAX_TOLD) {
        live.message(Level::Error, problem.clone());
    }
    for problem in catalogue::sync(&place, &env.ledger, &live.cancel)? {
        if !problems.contains(&problem) {
            live.message(Level::Warning, problem);
        }
    }
    if closed > not_open.len() {
        let closed = closed - not_open.len();
        let text = format!(
            "{closed} archives open with a private key alone: of them only what can be seen from outside was checked; 'keepctl check {} --read-data --key \
             FILE' reads them",
            target.name
        );
        live.message(Level::Info, text);
    }
    let read = format!("{read} of {all} archives read, {bytes} bytes");
    for text in not_open.iter().take(MAX_TOLD) {
        live.message(Level::Error, text.clone());
    }
    if problems.is_empty() && !not_open.is_empty() {
        return Err(Failure::NeedsKey(format!(
            "{} of {all} archives do not open with the keys of the destination's profile, and were not checked ({read}); is a key missing in 'retired'? Nothing was marked",
            not_open.len()
        )));
    }
    if problems.is_empty() {
        live.message(Level::Info, format!("no damage found: {known} backups, {read}"));
        return Ok(Finish::Good);
    }
    Err(Failure::Failed(format!("{} damaged or missing archives, {} of {known} backups hurt ({read})", problems.len(), hurt.len())))
}

/// What looking at all archives gave.
pub struct Examined {
    pub problems: Vec<String>,
    /// Backups, and why.
    pub hurt: Vec<(BackupDetail, String)>,
    pub all: usize,
    pub read: usize,
    pub bytes: u64,
    /// Archives that open with a key that is not here.
    pub closed: usize,
    /// Why those do not open that should.
    pub not_open: Vec<String>,
    pub known: usize,
}

/// Looks at all archives, and reads `percent` of them whole.
pub fn examine(place: &Archives, ledger: &Ledger, percent: u32, live: &LiveRun) -> Result<Examined, Failure> {
    let (list, known) = catalogue::listed(place, ledger)?;
    let all = list.archives.len();
    let mut found =
        Examined { problems: Vec::new(), hurt: Vec::new(), all, read: 0, bytes: 0, closed: 0, not_open: Vec::new(), known: known.len() };
    for object in known.keys().filter(|object| !list.archives.iter().any(|a| a.object == **object)) {
        found.problems.push(format!("{}: {object}: it is missing", place.storage.location()));
    }
    live.step(if percent == 0 { "reading the heads" } else { "reading the archives" });
    let wanted = (all * percent.min(100) as usize).div_ceil(100);
    let random: [u8; 8] = crypto::random().map_err(|e| Failure::Failed(e.to_string()))?;
    let first = u64::from_le_bytes(random).checked_rem(all as u64).unwrap_or(0) as usize;
    for (at, there) in list.archives.iter().enumerate() {
        if live.cancel.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        let id = known.get(&there.object);
        let detail = id.map(|id| ledger.backup_at(&place.name, id)).transpose()?.flatten();
        let whole = (at + all - first) % all < wanted;
        match look(place, &there.object, there.size, detail.as_ref(), whole, live) {
            Ok(Looked::Whole) => (found.read, found.bytes) = (found.read + 1, found.bytes + there.size),
            Ok(Looked::Head) => {}
            Ok(Looked::Closed) => found.closed += 1,
            Err(Failure::Cancelled) => return Err(Failure::Cancelled),
            Err(e @ Failure::Storage(_)) => return Err(e),
            // The key may be the wrong one: that says nothing of the archive.
            Err(Failure::NeedsKey(text)) => {
                found.closed += 1;
                found.not_open.push(text);
            }
            // Removed meanwhile, and on purpose.
            Err(_) if id.is_some_and(|id| ledger.backup_at(&place.name, id).is_ok_and(|known| known.is_none())) => {}
            Err(e) => {
                found.problems.push(e.to_string());
                found.hurt.extend(detail.map(|detail| (detail, e.to_string())));
            }
        }
        live.report.entry();
        live.update(|run| run.progress.percent = Some(((at + 1) * 1000 / all) as f64 / 10.0));
    }
    Ok(found)
}

/// How much of an archive was proven.
enum Looked {
    Head,
    Whole,
    /// What can be seen without its key.
    Closed,
}

fn look(place: &Archives, object: &str, size: u64, detail: Option<&BackupDetail>, whole: bool, live: &LiveRun) -> Result<Looked, Failure> {
    let damaged = |text: String| Failure::Damaged(format!("{}: {object}: {text}", place.storage.location()));
    if let Some(had) = detail.map(|d| d.backup.added_bytes).filter(|had| *had != size) {
        return Err(damaged(format!("it has {size} bytes, and had {had}")));
    }
    let mut opened = match place.open(object, &live.cancel) {
        Ok(opened) => opened,
        Err(ReadError::NotOpen(text)) => {
            if place.profile.as_ref().is_some_and(|p| p.recipient.is_some()) && place.private_keys.is_empty() {
                return if whole { hashed(place, object, live) } else { Ok(Looked::Closed) };
            }
            return Err(Failure::NeedsKey(text));
        }
        Err(e) => return Err(e.into()),
    };
    let head = opened.reader.head().ok_or_else(|| damaged("it was not made by keepd".into()))?;
    if let Some(detail) = detail.filter(|d| d.backup.id != head.origin.backup || d.backup.job != head.origin.job) {
        return Err(damaged(format!("it is another backup than {}, which was here", short(&detail.backup.id))));
    }
    if !whole {
        return Ok(Looked::Head);
    }
    let (mut last, mut told) = (None, 0);
    let tell = opened.teller();
    let failed = |e, last: &Option<String>| match (Failure::from(tell(e)), last) {
        (Failure::Damaged(text), Some(path)) => Failure::Damaged(format!("{text}; at or after {path}")),
        (Failure::Damaged(text), None) => Failure::Damaged(text),
        (other, _) => other,
    };
    let mut buffer = vec![0; 256 << 10];
    loop {
        match opened.reader.next_entry() {
            Ok(None) => break,
            Ok(Some(header)) => last = Some(header.path.path),
            Err(e) => return Err(failed(e, &last)),
        }
        loop {
            match opened.reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(_) => {
                    let at = opened.reader.position();
                    live.report.bytes(at.saturating_sub(told));
                    told = told.max(at);
                }
                Err(e) => return Err(failed(e, &last)),
            }
        }
    }
    opened.reader.finish().map_err(|e| failed(e, &None))?;
    Ok(Looked::Whole)
}

/// Of an archive that does not open here: whether it has the bytes that it was written with, as far as its companion tells.
fn hashed(place: &Archives, object: &str, live: &LiveRun) -> Result<Looked, Failure> {
    let Some(wanted) = place.companion(object)?.map(|c| c.sha256).filter(|sha| sha.len() == 64) else { return Ok(Looked::Closed) };
    let mut reader = place.storage.reader(object)?;
    let problem = reader.problem();
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        if live.cancel.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                hash.update(buffer.get(..n).unwrap_or_default());
                live.report.bytes(n as u64);
            }
            Err(e) => return Err(problem.get().cloned().map_or_else(|| Failure::Storage(e.to_string()), Failure::from)),
        }
    }
    match HEXLOWER.encode(&hash.finalize()) == wanted {
        true => Ok(Looked::Closed),
        false => Err(Failure::Damaged(format!(
            "{}: {object}: its SHA-256 is not the one that stands beside it ({wanted}): the archive or what stands beside it changed",
            place.storage.location()
        ))),
    }
}

/// A backup that is damaged does not count.
fn condemn(env: &Environment, target: &Destination, detail: &BackupDetail, why: &str, live: &LiveRun) {
    if detail.suspect.iter().any(|text| text == why) {
        return;
    }
    let said =
        Mark { text: Some(why.to_owned()), ..Mark::new([0; 32], ledgered::SUSPECT, Timestamp::now().to_string(), live.snapshot().by) };
    if let Err(e) = catalogue::mark(env, target, &detail.backup.id, &said) {
        live.message(Level::Error, format!("backup {} could not be marked as suspect: {e}", short(&detail.backup.id)));
    }
}
