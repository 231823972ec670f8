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
use crate::repository::lease::Lease;
use crate::repository::reencrypt::{self, Begun, ForeignSlot, PackSealer, Sealed};
use crate::repository::{Repository, RepositoryError};

/// The repository is kept from backups for so long at a time.
const TURN: Duration = Duration::from_secs(15);
/// Between looks whether readers have gone.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// In the ledger from the beginning to the end of a re-encryption, so that the next start goes on with it.
fn note(destination: &str) -> String {
    format!("re-encryption of {destination}")
}

/// From the end of a re-encryption until the stored configurations are seen to.
fn left_note(destination: &str) -> String {
    format!("configurations of {destination} to be sealed anew")
}

/// Of [`left_note`].
const LEFT: &str = "left";

/// Whether all of a re-encryption was done but for the stored configurations.
pub fn are_configurations_left(ledger: &Ledger, destination: &str) -> Result<bool, Failure> {
    Ok(unfinished(ledger, destination)?.is_none() && ledger.note(&left_note(destination))?.as_deref() == Some(LEFT))
}

/// They were seen to.
pub fn configurations_done(ledger: &Ledger, destination: &str) -> Result<(), Failure> {
    Ok(ledger.set_note(&left_note(destination), "")?)
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
        let (_alone, repository, lease) = all_alone(env, target, live, writing, gate)?;
        opens_all(&repository, target)?;
        live.step("making a new master key");
        lease.check()?;
        // Before anything is changed: whatever ends this, the next start knows of it.
        env.ledger.set_note(&note(&target.name), if drop_slots { DROP } else { KEEP })?;
        let begun = reencrypt::begin(&repository, &profiles, drop_slots);
        if !matches!(begun, Ok(Begun::Now { .. })) && !repository.is_changing_keys() {
            let opened = destination::open(env, target, false)?;
            if !opened.is_changing_keys() {
                env.ledger.set_note(&note(&target.name), "")?;
            }
        }
        match begun? {
            Begun::Now { dropped } => {
                for slot in dropped {
                    live.message(
                        Level::Warning,
                        format!("key slot {slot} opens the repository no more; a recovery kit made of it is void"),
                    );
                }
            }
            Begun::WouldDrop(slots) => {
                return Err(Failure::Failed(format!(
                    "destination {}: no configured profile opens these key slots, and they would open the repository no more: {}; give --drop-slots if that is meant (a recovery kit of them is void then)",
                    target.name,
                    listed(&slots)
                )));
            }
        }
        drop(repository);
        destination::remember_keys(&env.ledger, &*destination::open(env, target, false)?, false)?;
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
    let (_alone, repository, lease) = all_alone(env, target, live, writing, gate)?;
    // What came meanwhile.
    while !sealer.some(&repository, TURN, &|| None, &progress, &live.cancel)? {}
    let go_on = || match live.cancel.is_cancelled() {
        true => Err(RepositoryError::Cancelled),
        false => lease.check(),
    };
    let manifests = catalogue::known(&target.name, &env.ledger)?.into_iter().map(|id| format!("backups/{id}"));
    let marks = env.ledger.marks(&target.name, None)?.into_iter().map(|mark| format!("marks/{}", mark.id));
    let known: Vec<String> = manifests.chain(marks).collect();
    match reencrypt::finish(&repository, &profiles, drop_slots, &known, &|step| live.step(step), &go_on)? {
        Begun::Now { dropped } => {
            for slot in dropped {
                live.message(Level::Warning, format!("key slot {slot}, which came meanwhile, opens the repository no more"));
            }
        }
        Begun::WouldDrop(slots) => {
            return Err(Failure::Failed(format!(
                "destination {}: these key slots came meanwhile: {}; begin again with --drop-slots",
                target.name,
                listed(&slots)
            )));
        }
    }
    destination::remember_keys(&env.ledger, &repository, true)?;
    env.ledger.set_note(&left_note(&target.name), LEFT)?;
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

fn listed(slots: &[ForeignSlot]) -> String {
    slots.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Refuses what has packs that only a private key opens which was not lent.
fn opens_all(repository: &Repository, target: &Destination) -> Result<(), Failure> {
    repository.sync_index()?;
    if !repository.has_write_only()? {
        return Ok(());
    }
    let packs: Vec<[u8; 32]> = repository.listed_packs()?.into_keys().collect();
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
type Alone = ((Box<dyn Send>, Box<dyn Send>), Arc<Repository>, Lease);

fn all_alone(
    env: &Environment,
    target: &Destination,
    live: &LiveRun,
    writing: Writing<'_>,
    gate: ReaderGate<'_>,
) -> Result<Alone, Failure> {
    // A reader may want to write before it is done (a safety backup, a repair): nobody is kept from writing while readers are waited for.
    let alone = loop {
        let writer = writing(&target.name)?;
        if let Some(readers) = gate(&target.name) {
            break (writer, readers);
        }
        drop(writer);
        if live.cancel.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        std::thread::sleep(LOOK_EVERY);
    };
    let (repository, lease) = destination::open_for_writing(env, target, live, false)?;
    Ok((alone, repository, lease))
}
