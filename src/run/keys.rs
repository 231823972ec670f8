//! Keys as runs: slots of destinations are listed, added and removed, and the key of a profile is exchanged for another.
//!
//! In every moment the repositories open with the key that is configured: a new slot is proven before an old one goes, and while a key is
//! exchanged both open them.

use keepd_protocol::model::{DestinationKeys, KeyOpens, KeyProfile, KeySlot, Level, RetiredKey};
use serde::{Deserialize, Serialize};

use super::backup::Environment;
use super::destination;
use super::in_place::point;
use super::live::{Failure, Finish, LiveRun};
use crate::config::{Config, Destination, Encryption, KeySource, SecretSource};
use crate::crypto::{Profile, ProfileKey, key_file};
use crate::profile;
use crate::repository::slots::{self, Added, FoundSlot, Opens};

/// A key that shall open repositories, and what its slots are called for people.
#[derive(Clone)]
pub struct NewKey {
    pub label: String,
    pub key: ProfileKey,
}

/// The profiles as configured, with what tells their keys apart.
pub fn profiles(config: &Config) -> Vec<KeyProfile> {
    config.encryption.values().map(|p| describe(config, p)).collect()
}

fn describe(config: &Config, profile: &Encryption) -> KeyProfile {
    let (kind, place) = match &profile.key {
        KeySource::File(path) => ("key_file", path.display().to_string()),
        KeySource::Credential(name) => ("credential", name.clone()),
        KeySource::Passphrase(SecretSource::File(path)) => ("passphrase", path.display().to_string()),
        KeySource::Token(token) => ("pkcs11", format!("{}: {}", token.token, token.key)),
        KeySource::Passphrase(SecretSource::Credential(name) | SecretSource::Environment(name)) => ("passphrase", name.clone()),
    };
    let retired = profile.retired.iter().map(|path| RetiredKey {
        file: path.display().to_string(),
        fingerprint: key_file::load(path).ok().map(|key| key.fingerprint().to_string()),
    });
    let loaded = profile::load(profile);
    let public_key = profile.public_key.as_deref().and_then(|path| key_file::load_public(path).ok());
    let (fingerprint, error) = match loaded.map(|p| p.key.fingerprint()) {
        Ok(Ok(fingerprint)) => (fingerprint.map(|f| f.to_string()), None),
        Ok(Err(e)) => (None, Some(e.to_string())),
        Err((_, e)) => (None, Some(e)),
    };
    let used_by = config.destinations.values().filter(|d| d.encryption.as_deref() == Some(&profile.name));
    KeyProfile {
        name: profile.name.clone(),
        kind: kind.to_owned(),
        place,
        fingerprint,
        public_key: public_key.map(|key| key.fingerprint().to_string()),
        retired: retired.collect(),
        destinations: used_by.map(|d| d.name.clone()).collect(),
        error,
    }
}

/// The slots of a destination; what keeps them from being listed is told with it.
pub fn at_destination(env: &Environment, target: &Destination) -> DestinationKeys {
    let told = DestinationKeys { destination: target.name.clone(), profile: target.encryption.clone(), ..DestinationKeys::default() };
    if super::archived::is(target) {
        // Each archive carries its own.
        return told;
    }
    // What is wrong with the profile is told with the profile.
    let profile = destination::profile(&env.config, target).unwrap_or(None);
    let keys: Vec<Option<&ProfileKey>> = match (&profile, &target.encryption) {
        (_, None) => vec![None],
        (Some(profile), Some(_)) => profile.keys().map(Some).collect(),
        (None, Some(_)) => Vec::new(),
    };
    match slots_of(env, target, &keys) {
        Err(e) => DestinationKeys { error: Some(e.to_string()), ..told },
        Ok(None) => told,
        Ok(Some((repository, slots))) => {
            DestinationKeys { repository: Some(repository), slots: slots.into_iter().map(slot).collect(), ..told }
        }
    }
}

fn slot(found: FoundSlot) -> KeySlot {
    let opens = match found.opens {
        Opens::No => KeyOpens::No,
        Opens::With(0) => KeyOpens::Current,
        Opens::With(_) => KeyOpens::Retired,
    };
    let FoundSlot { id, profile, method, fingerprint, problem, .. } = found;
    KeySlot { id, profile, method, fingerprint, opens, problem }
}

/// The id of a destination's repository and its slots, tried with these keys; None where there is no repository yet.
fn slots_of(env: &Environment, target: &Destination, keys: &[Option<&ProfileKey>]) -> Result<Option<(String, Vec<FoundSlot>)>, Failure> {
    let Some((storage, id)) = destination::identify(env, target)? else { return Ok(None) };
    let found = slots::list(&storage, &id, keys).map_err(|e| destination::at(target, e))?;
    Ok(Some((data_encoding::HEXLOWER.encode(&id), found)))
}

/// The whole id of a slot of which the start is given; why there is none, or more than one, in words.
pub fn find_slot(env: &Environment, target: &Destination, start: &str) -> Result<Result<String, String>, Failure> {
    let found = slots_of(env, target, &[])?.map(|(_, slots)| slots).unwrap_or_default();
    let exact = found.iter().find(|s| s.id == start).map(|s| s.id.clone());
    let mut ids = found.into_iter().map(|s| s.id).filter(|id| !start.is_empty() && id.starts_with(start));
    Ok(match (exact, ids.next(), ids.next()) {
        (Some(id), _, _) | (None, Some(id), None) => Ok(id),
        (None, None, _) => {
            Err(format!("destination {0} has no key slot whose id starts with '{start}'; 'keepctl key list {0}' shows them", target.name))
        }
        (None, Some(_), Some(_)) => Err(format!("several key slots of destination {} start with '{start}'; give more of it", target.name)),
    })
}

/// A repository that is not encrypted has its keys in it for everybody: another slot keeps nothing secret.
fn is_encrypted(target: &Destination) -> Result<(), Failure> {
    super::archived::is_none(
        target,
        "each carries the slots of the keys that it was sealed for; a key that is to open the old ones stays as `retired`",
    )?;
    match target.encryption {
        Some(_) => Ok(()),
        None => Err(Failure::Failed(format!(
            "destination {} is not encrypted (encryption = \"none\"), so a key would protect nothing; begin a new destination with an \
             encryption profile and copy the backups there",
            target.name
        ))),
    }
}

/// Has a further key open a destination.
pub fn add(env: &Environment, target: &Destination, new: &NewKey, live: &LiveRun) -> Result<Finish, Failure> {
    add_to(env, target, new, live, None)?;
    Ok(Finish::Good)
}

/// The same; `old`: what it opens now is written down before, as what goes when the key of this profile is exchanged.
fn add_to(env: &Environment, target: &Destination, new: &NewKey, live: &LiveRun, old: Option<&Rotation<'_>>) -> Result<(), Failure> {
    is_encrypted(target)?;
    live.step(&format!("opening {}", target.name));
    let (repository, lease) = destination::open_for_writing(env, target, live, false)?;
    if let Some(rotation) = old {
        rotation.write_down(env, target)?;
    }
    live.step(&format!("adding a key slot at {}", target.name));
    point();
    lease.check()?;
    let added = repository.add_slot(&new.label, &new.key).map_err(|e| destination::at(target, e))?;
    point();
    // The one who took the repository over may not know of it.
    lease.check()?;
    let (slot, what) = match added {
        Added::New(slot) => (slot, "was added, read back and opened"),
        Added::There(slot) => (slot, "is there already and opens"),
    };
    live.message(Level::Info, format!("{}: key slot {slot} ({}) {what}", target.name, new.label));
    Ok(())
}

/// Removes a slot of a destination.
pub fn remove(env: &Environment, target: &Destination, slot: &str, live: &LiveRun) -> Result<Finish, Failure> {
    let profile = destination::profile(&env.config, target)?;
    remove_from(env, target, &[slot.to_owned()], profile.as_ref(), live)?;
    Ok(Finish::Good)
}

fn remove_from(env: &Environment, target: &Destination, ids: &[String], profile: Option<&Profile>, live: &LiveRun) -> Result<(), Failure> {
    live.step(&format!("opening {}", target.name));
    let (repository, lease) = destination::open_for_writing(env, target, live, false)?;
    live.step(&format!("removing key slots at {}", target.name));
    point();
    lease.check()?;
    let opening = repository.remove_slots(ids, profile.map(|p| &p.key)).map_err(|e| destination::at(target, e))?;
    point();
    let key = profile.map_or_else(|| "without a key".to_owned(), |p| format!("with the key of encryption profile {}", p.name));
    live.message(Level::Info, format!("{}: key slot {} is removed; {} opens it {key}", target.name, ids.join(", "), opening.join(", ")));
    Ok(())
}

/// Removes what a key opens there.
pub fn remove_of(env: &Environment, target: &Destination, key: &ProfileKey, live: &LiveRun) -> Result<(), Failure> {
    let found = slots_of(env, target, &[Some(key)])?.map(|(_, slots)| slots).unwrap_or_default();
    let ids: Vec<String> = found.into_iter().filter(|s| s.opens == Opens::With(0)).map(|s| s.id).collect();
    if ids.is_empty() {
        return Ok(());
    }
    let profile = destination::profile(&env.config, target)?;
    remove_from(env, target, &ids, profile.as_ref(), &live.uncancelled())
}

/// What a profile's key is exchanged from and to.
struct Rotation<'a> {
    profile: &'a Profile,
    to: String,
}

/// Which slots go at a destination when the configuration names the key `to`.
#[derive(Serialize, Deserialize)]
struct Goes {
    to: String,
    slots: Vec<String>,
}

fn rotation_note(profile: &str, target: &Destination) -> String {
    format!("slots that go of profile {profile} at {}", target.name)
}

impl Rotation<'_> {
    /// The configuration may have no word for the old key later: a passphrase cannot be a retired key.
    fn write_down(&self, env: &Environment, target: &Destination) -> Result<(), Failure> {
        let found = slots_of(env, target, &[Some(&self.profile.key)])?.map(|(_, slots)| slots).unwrap_or_default();
        let slots = found.into_iter().filter(|s| s.opens == Opens::With(0)).map(|s| s.id).collect();
        let goes = serde_json::to_string(&Goes { to: self.to.clone(), slots }).map_err(|e| Failure::Failed(e.to_string()))?;
        Ok(env.ledger.set_note(&rotation_note(&self.profile.name, target), &goes)?)
    }
}

/// The first step of a rotation: the new key opens every destination of the profile. An error when it does not, at any of them.
pub fn rotate_add(env: &Environment, profile: &Profile, targets: &[Destination], new: &NewKey, live: &LiveRun) -> Result<Finish, Failure> {
    let to = fingerprint(&new.key)?;
    let is_configured = fingerprint(&profile.key)? == to && to.is_some();
    let rotation = Rotation { profile, to: to.unwrap_or_default() };
    let mut errors = Vec::new();
    for target in targets {
        let added = match destination::identify(env, target) {
            Ok(None) => {
                live.message(
                    Level::Info,
                    format!("{}: nothing was backed up to it yet; it begins with the key that is configured then", target.name),
                );
                continue;
            }
            Ok(Some(_)) => add_to(env, target, new, live, (!is_configured).then_some(&rotation)),
            Err(e) => Err(e),
        };
        match added {
            Ok(()) => {}
            Err(Failure::Cancelled) => return Err(Failure::Cancelled),
            Err(e) => errors.push(e.to_string()),
        }
    }
    match errors.is_empty() {
        true => Ok(Finish::Good),
        false => Err(Failure::Failed(format!(
            "the new key does not open every destination of encryption profile {} yet, so it stays with the old one: {}; mend that and run the \
             same command again",
            profile.name,
            errors.join("; ")
        ))),
    }
}

/// The last step: the slots of the key that was configured before go, where the present one opens.
pub fn rotate_remove(env: &Environment, profile: &Profile, targets: &[Destination], live: &LiveRun) -> Result<Finish, Failure> {
    let to = fingerprint(&profile.key)?;
    let (mut errors, mut kept) = (Vec::new(), false);
    for target in targets {
        match rotate_remove_at(env, profile, to.as_deref(), target, live) {
            Ok(gone) => kept |= !gone,
            Err(Failure::Cancelled) => return Err(Failure::Cancelled),
            Err(e) => errors.push(e.to_string()),
        }
    }
    match (errors.is_empty(), kept) {
        (true, false) => Ok(Finish::Good),
        (true, true) => Ok(Finish::Partial),
        (false, _) => Err(Failure::Failed(format!(
            "encryption profile {} has its new key, but the old one still opens some destinations: {}; mend that and run the same command again",
            profile.name,
            errors.join("; ")
        ))),
    }
}

/// Whether nothing of the old key is left there.
fn rotate_remove_at(env: &Environment, profile: &Profile, to: Option<&str>, target: &Destination, live: &LiveRun) -> Result<bool, Failure> {
    let note = rotation_note(&profile.name, target);
    let goes: Option<Goes> = env.ledger.note(&note)?.and_then(|text| serde_json::from_str(&text).ok());
    let known = goes.filter(|goes| Some(goes.to.as_str()) == to).map(|goes| goes.slots).unwrap_or_default();
    let keys: Vec<_> = profile.keys().take(2).map(Some).collect();
    let Some((_, found)) = slots_of(env, target, &keys)? else { return Ok(true) };
    let is_old = |slot: &&FoundSlot| slot.opens == Opens::With(1) || (slot.opens == Opens::No && known.contains(&slot.id));
    let old: Vec<String> = found.iter().filter(is_old).map(|slot| slot.id.clone()).collect();
    if old.is_empty() {
        live.message(Level::Info, format!("{}: no key slot of the old key is there", target.name));
    } else if target.append_only {
        let text = "it is append_only, so keepd does not remove the old key slots; the old key goes on opening it";
        live.message(Level::Warning, format!("{}: {text} (key slot {})", target.name, old.join(", ")));
        return Ok(false);
    } else {
        remove_from(env, target, &old, Some(profile), live)?;
    }
    env.ledger.set_note(&note, "")?;
    Ok(true)
}

fn fingerprint(key: &ProfileKey) -> Result<Option<String>, Failure> {
    Ok(key.fingerprint().map_err(|e| Failure::Failed(e.to_string()))?.map(|f| f.to_string()))
}
