//! Re-encryption of a destination as a run: in short turns, between which backups have theirs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use keepd_protocol::model::Level;

use super::backup::{Environment, ReaderGate, Writing};
use super::live::{Failure, Finish, LiveRun};
use super::{catalogue, check, destination};
use crate::config::Destination;
use crate::crypto::Profile;
use crate::ledger::Ledger;
use crate::profile;
use crate::repository::Repository;
use crate::repository::lease::Lease;
use crate::repository::reencrypt::{self, Begun, PackSealer, Sealed};

/// The repository is kept from backups for so long at a time.
const TURN: Duration = Duration::from_secs(15);
/// Between looks whether readers have gone.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// In the ledger from the beginning to the end of a re-encryption, so that the next start goes on with it.
fn note(destination: &str) -> String {
    format!("re-encryption of {destination}")
}

/// What to do about slots that no configured profile opens.
const DROP: &str = "drop";
const KEEP: &str = "keep";

/// Whether a re-encryption of a destination was begun and not finished, and then whether it drops slots of nobody's.
pub fn unfinished(ledger: &Ledger, destination: &str) -> Result<Option<bool>, Failure> {
    let note = ledger.note(&note(destination))?.unwrap_or_default();
    Ok(match note.as_str() {
        DROP => Some(true),
        KEEP => Some(false),
        _ => None,
    })
}

/// Gives a destination's repository a new master key and seals everything with it, or goes on with that.
pub fn destination_anew(
    env: &Environment,
    target: &Destination,
    drop_slots: bool,
    live: &LiveRun,
    writing: Writing<'_>,
    gate: ReaderGate<'_>,
) -> Result<Finish, Failure> {
    check::may_delete(target)?;
    if target.object_lock.is_some() {
        let text =
            "its objects are locked and cannot be removed, so that the old key would go on opening them; begin a new destination instead";
        return Err(Failure::Failed(format!("destination {}: {text}", target.name)));
    }
    let profiles = profiles(env, target)?;
    live.step("waiting until nobody else uses the repository");
    {
        let (repository, lease, _alone) = all_alone(env, target, live, writing, gate)?;
        opens_all(&repository, target)?;
        live.step("making a new master key");
        lease.check()?;
        match reencrypt::begin(&repository, &profiles, drop_slots)? {
            Begun::Now { dropped } => {
                for slot in dropped {
                    live.message(
                        Level::Warning,
                        format!("key slot {slot} opens the repository no more; a recovery kit made of it is void"),
                    );
                }
            }
            Begun::WouldDrop(slots) => {
                let slots = slots.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                return Err(Failure::Failed(format!(
                    "destination {}: no configured profile opens these key slots, and they would open the repository no more: {slots}; give --drop-slots if that is meant (a recovery kit of them is void then)",
                    target.name
                )));
            }
        }
        env.ledger.set_note(&note(&target.name), if drop_slots { DROP } else { KEEP })?;
    }
    let mut sealer = PackSealer::default();
    live.step("sealing packs anew");
    let told = AtomicU64::new(0);
    let progress = |sealed: Sealed| {
        live.report.bytes(sealed.bytes.saturating_sub(told.swap(sealed.bytes, Ordering::Relaxed)));
        live.set_total(sealed.total);
    };
    loop {
        let _alone = writing(&target.name)?;
        let (repository, lease) = destination::open_for_writing(env, target, live, false)?;
        lease.check()?;
        let is_done = sealer.some(&repository, TURN, &|| gate(&target.name), &progress, &live.cancel)?;
        lease.check()?;
        if is_done {
            break;
        }
    }
    live.step("waiting until nobody else uses the repository");
    let (repository, lease, _alone) = all_alone(env, target, live, writing, gate)?;
    // What came meanwhile.
    while !sealer.some(&repository, TURN, &|| None, &progress, &live.cancel)? {}
    lease.check()?;
    let ended = reencrypt::finish(&repository, &profiles, drop_slots, &|step| live.step(step))?;
    if let Begun::WouldDrop(slots) = ended {
        let slots = slots.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        return Err(Failure::Failed(format!(
            "destination {}: these key slots came meanwhile: {slots}; begin again with --drop-slots",
            target.name
        )));
    }
    env.ledger.set_note(&note(&target.name), "")?;
    for problem in catalogue::sync(&repository, &target.name, &env.ledger)? {
        live.message(Level::Warning, problem);
    }
    live.message(
        Level::Info,
        format!(
            "{} is sealed with a new master key (number {}); the old one opens nothing of it any more",
            target.name,
            repository.epoch()
        ),
    );
    Ok(Finish::Good)
}

/// Refuses what has packs that only a private key opens which was not lent.
fn opens_all(repository: &Repository, target: &Destination) -> Result<(), Failure> {
    repository.sync_index()?;
    if !repository.has_write_only()? {
        return Ok(());
    }
    let packs: Vec<[u8; 32]> = repository.packs()?.into_iter().map(|(id, _)| id).collect();
    let wanted: Vec<String> = repository.keys_wanted(&packs).iter().map(ToString::to_string).collect();
    match wanted.is_empty() {
        true => Ok(()),
        false => Err(Failure::NeedsKey(format!(
            "destination {}: packs of it open with the private key {} alone, and cannot be sealed anew without it; give it with --key FILE. Nothing was begun",
            target.name,
            wanted.join(" and ")
        ))),
    }
}

/// The destination's own profile, then the others.
fn profiles(env: &Environment, target: &Destination) -> Result<Vec<Profile>, Failure> {
    let Some(own) = &target.encryption else {
        return Err(Failure::Failed(format!("destination {} is not encrypted: there is no key to change", target.name)));
    };
    let mut profiles = Vec::new();
    for known in env.config.encryption.values().filter(|p| p.name == *own).chain(env.config.encryption.values().filter(|p| p.name != *own))
    {
        let loaded = profile::load(known).map_err(|(_, text)| {
            Failure::Failed(format!("encryption profile {}: {text}; nothing was begun, for its key slots might be lost", known.name))
        })?;
        profiles.push(loaded);
    }
    Ok(profiles)
}

/// The repository with nobody else using it.
type Alone = (Arc<Repository>, Lease, (Box<dyn Send>, Box<dyn Send>));

fn all_alone(
    env: &Environment,
    target: &Destination,
    live: &LiveRun,
    writing: Writing<'_>,
    gate: ReaderGate<'_>,
) -> Result<Alone, Failure> {
    let writer = writing(&target.name)?;
    let readers = loop {
        if let Some(gone) = gate(&target.name) {
            break gone;
        }
        if live.cancel.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        std::thread::sleep(LOOK_EVERY);
    };
    let (repository, lease) = destination::open_for_writing(env, target, live, false)?;
    Ok((repository, lease, (writer, readers)))
}
