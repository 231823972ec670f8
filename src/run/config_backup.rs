//! The configuration itself as a run: collected from the disk, sealed, stored at a destination, read back and opened, the old ones removed by their rules.

use std::collections::BTreeSet;

use jiff::Timestamp;
use keepd_protocol::model::Level;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::backup::Environment;
use super::live::{Failure, Finish, LiveRun};
use super::{archived, destination};
use crate::config::{ConfigBackup, Destination, ItemKind, ItemName, Texts};
use crate::crypto::{CryptoError, Profile};
use crate::ledger::Ledger;
use crate::meta::stored::{self, Stored};
use crate::meta::{collect, secrets};
use crate::portable::envelope::{self, Envelope, Opened};
use crate::portable::seal::{self, Keys};
use crate::portable::{Packing, PortableError};
use crate::profile;
use crate::storage::{Storage, StorageError};

/// Stored ones that a check opens, the newest first: each may cost the second that a passphrase takes.
const MOST_CHECKED: usize = 100;

/// In the ledger: the newest that was stored at a destination.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Newest {
    object: String,
    /// The digest of the texts that it has.
    texts: String,
}

fn newest_note(target: &Destination) -> String {
    format!("newest configuration at {}", target.name)
}

fn newest(ledger: &Ledger, target: &Destination) -> Result<Option<Newest>, Failure> {
    Ok(ledger.note(&newest_note(target))?.and_then(|note| serde_json::from_str(&note).ok()))
}

fn own_note(target: &Destination) -> String {
    format!("own configurations at {}", target.name)
}

/// The names of those that this keepd stored at a destination: other machines store theirs there, too. After the ledger was lost there are none.
fn own(ledger: &Ledger, target: &Destination) -> Result<BTreeSet<String>, Failure> {
    Ok(ledger.note(&own_note(target))?.and_then(|note| serde_json::from_str(&note).ok()).unwrap_or_default())
}

fn set_own(ledger: &Ledger, target: &Destination, own: &BTreeSet<String>) -> Result<(), Failure> {
    Ok(ledger.set_note(&own_note(target), &serde_json::to_string(own).unwrap_or_default())?)
}

/// What is on its way: its name and the sum of its bytes. Empty when it is one of [`own`].
fn pending_note(target: &Destination) -> String {
    format!("configuration on its way to {}", target.name)
}

fn sum(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// One that was written when keepd ended, and that is this keepd's own therefore, is known as such: else no retention would ever remove it.
fn take_up_pending(env: &Environment, target: &Destination, storage: &Storage) -> Result<(), Failure> {
    let note = env.ledger.note(&pending_note(target))?.unwrap_or_default();
    let Some((name, meant)) = note.split_once(' ') else { return Ok(()) };
    match stored::fetch(storage, name) {
        Ok(bytes) if sum(&bytes) == meant => {
            let mut own = own(&env.ledger, target)?;
            own.insert(name.to_owned());
            set_own(&env.ledger, target, &own)?;
        }
        // It never came to be, or another one's has the name.
        Ok(_) | Err(StorageError::NotFound { .. }) => {}
        // Nothing new waits for one that cannot be read.
        Err(e) => {
            tracing::warn!(destination = %target.name, "whether {name} is one of this keepd's own is not known, and it is left there: {e}");
        }
    }
    Ok(env.ledger.set_note(&pending_note(target), "")?)
}

/// Whether the configuration of now is stored where `[config_backup]` says, and lies there still.
pub fn is_stored(env: &Environment, wanted: &ConfigBackup) -> Result<bool, Failure> {
    let Some(target) = env.config.destinations.get(&wanted.destination) else { return Ok(false) };
    match newest(&env.ledger, target)? {
        Some(newest) if newest.texts == texts(env)?.digest() => {
            let there = stored::list(&destination::storage(target, &env.runtime)?)?;
            Ok(there.iter().any(|stored| stored.name == newest.object))
        }
        _ => Ok(false),
    }
}

/// The configuration as it lies on the disk; one that keepd would not load is no backup of anything.
pub fn texts(env: &Environment) -> Result<Texts, Failure> {
    let main = env.config.files.first().ok_or_else(|| Failure::Failed("the configuration was read from no file".into()))?;
    let refused = |problems: String| Failure::Failed(format!("the configuration on disk is wrong, and was not stored so: {problems}"));
    let texts = Texts::read(main).map_err(|e| refused(e.to_string()))?;
    texts.load().map_err(|e| refused(e.to_string()))?;
    Ok(texts)
}

/// Stores it as `[config_backup]` says.
pub fn store(env: &Environment, wanted: &ConfigBackup, live: &LiveRun) -> Result<Finish, Failure> {
    let target = env.config.destinations.get(&wanted.destination);
    let target = target.ok_or_else(|| Failure::Failed(format!("there is no destination '{}'", wanted.destination)))?;
    let storage = open(env, target)?;
    let stored = store_at(env, wanted, target, &storage, live)?;
    match retain(env, wanted, target, &storage, &stored.name, live) {
        Ok(()) => Ok(Finish::Good),
        Err(Failure::Cancelled) => Err(Failure::Cancelled),
        Err(e) => {
            live.message(Level::Warning, format!("the configuration is stored, but old ones could not be removed: {e}"));
            Ok(Finish::Partial)
        }
    }
}

/// Collects, seals, writes and proves it.
fn store_at(env: &Environment, wanted: &ConfigBackup, target: &Destination, storage: &Storage, live: &LiveRun) -> Result<Stored, Failure> {
    live.step("reading the configuration");
    let texts = texts(env)?;
    let digest = texts.digest();
    let envelope = collect::collect(&texts, Some(&env.ledger), None, wanted.include_secrets)?;
    if wanted.include_secrets {
        tell_tokens(&envelope, live);
    }
    let profile = wanted.encryption.as_deref().map(|name| destination::profile_named(&env.config, name)).transpose()?;
    let bytes = envelope::write(&envelope, Vec::new(), Packing::Gzip, profile.as_ref())
        .map_err(|e| Failure::Failed(format!("the configuration cannot be sealed: {e}")))?;
    if live.cancel.is_cancelled() {
        return Err(Failure::Cancelled);
    }
    live.step(&format!("writing to {}", target.name));
    take_up_pending(env, target, storage)?;
    let stored = stored::write(storage, Timestamp::now(), profile.is_some(), &bytes, |name| {
        Ok::<_, Failure>(env.ledger.set_note(&pending_note(target), &format!("{name} {}", sum(&bytes)))?)
    })?;
    live.set_added(stored.bytes);
    live.step("reading it back");
    let proven = prove(storage, &stored, &bytes, &envelope, profile.as_ref(), live);
    if let Err(e) = proven {
        // The next one must not be taken for older than what is of no use.
        let left = if target.append_only { None } else { storage.delete(&stored.name).err() };
        if matches!(e, Failure::Cancelled) {
            if let Some(left) = left {
                live.message(Level::Warning, format!("{} was not proven, and could not be removed: {left}", stored.name));
            }
            return Err(Failure::Cancelled);
        }
        let left = left.map(|e| format!("; and it could not be removed: {e}")).unwrap_or_default();
        return Err(Failure::Failed(format!("{}: {e}{left}", stored.name)));
    }
    let mut own = own(&env.ledger, target)?;
    own.insert(stored.name.clone());
    set_own(&env.ledger, target, &own)?;
    env.ledger.set_note(&pending_note(target), "")?;
    let newest = Newest { object: stored.name.clone(), texts: digest };
    env.ledger.set_note(&newest_note(target), &serde_json::to_string(&newest).unwrap_or_default())?;
    env.ledger.set_note(&used_note(target), "used")?;
    let secrets = if wanted.include_secrets { "with its secrets" } else { "without secrets" };
    let sealed = profile.map_or_else(|| "not sealed".to_owned(), |p| format!("sealed for {}", p.name));
    let text = format!("{} has the configuration, {} items {secrets}, {sealed}, {} bytes", stored.name, envelope.item_count, stored.bytes);
    live.message(Level::Info, text);
    Ok(stored)
}

/// What lies there is what was meant, byte by byte, and opens.
fn prove(
    storage: &Storage,
    stored: &Stored,
    bytes: &[u8],
    meant: &Envelope,
    profile: Option<&Profile>,
    live: &LiveRun,
) -> Result<(), Failure> {
    let there = stored::fetch(storage, &stored.name)?;
    if there != bytes {
        return Err(Failure::Damaged("what was read back is not what was written".into()));
    }
    if profile.is_some_and(|p| p.recipient.is_some()) {
        live.message(Level::Info, "it opens with a private key alone: it was read back, and not opened".into());
        return Ok(());
    }
    let keys = Keys { keys: profile.iter().flat_map(|p| p.keys()).cloned().collect(), private: Vec::new(), cancel: live.cancel.clone() };
    match envelope::read(&*there, &keys) {
        Ok(Opened { envelope, .. }) if envelope == *meant => Ok(()),
        Ok(_) => Err(Failure::Damaged("what was read back opens to something else than was written".into())),
        Err(PortableError::Cancelled) => Err(Failure::Cancelled),
        Err(e) => Err(Failure::Damaged(format!("what was read back does not open: {e}"))),
    }
}

/// A key in a token stays there, also when all secrets go out.
fn tell_tokens(envelope: &Envelope, live: &LiveRun) {
    for item in envelope.items.iter().filter(|item| item.kind() == Some(ItemKind::Encryption)) {
        let name = ItemName::new(ItemKind::Encryption, item.name.clone());
        if let Some(key) = secrets::kept_by_token(&name, &item.value) {
            live.message(Level::Info, format!("{name}: the {key} does not leave its token, and is not in it"));
        }
    }
}

fn retain(
    env: &Environment,
    wanted: &ConfigBackup,
    target: &Destination,
    storage: &Storage,
    newest: &str,
    live: &LiveRun,
) -> Result<(), Failure> {
    live.step("retention");
    let there = stored::look(storage)?;
    tell_foreign(env, target, &there.foreign, live)?;
    let now = Timestamp::now();
    // Two of one second have two names, the later one's a second ahead.
    let ahead = now.checked_add(jiff::SignedDuration::from_mins(1)).unwrap_or(now);
    if let Some(later) = there.stored.iter().find(|s| s.name.as_str() > newest && s.time > ahead) {
        live.message(
            Level::Warning,
            format!("{} says that it is of a later time; a clock was wrong, and whoever looks for the newest finds that one", later.name),
        );
    }
    if target.append_only {
        return Ok(());
    }
    // Those of other machines follow their rules.
    let mut own = own(&env.ledger, target)?;
    let mine: Vec<Stored> = there.stored.into_iter().filter(|stored| own.contains(&stored.name)).collect();
    own.retain(|name| mine.iter().any(|stored| stored.name == *name));
    // A clock that leapt ahead removes no more than one that did not.
    let believed = crate::believed::at(&env.ledger, now)?;
    let by_then = stored::falling(&mine, &wanted.retention, newest, believed, &wanted.zone());
    for name in stored::falling(&mine, &wanted.retention, newest, now, &wanted.zone()).into_iter().filter(|name| by_then.contains(name)) {
        storage.delete(&name)?;
        own.remove(&name);
        live.message(Level::Info, format!("retention removed {name}"));
    }
    set_own(&env.ledger, target, &own)
}

/// What is none of keepd's is left alone, and told once.
fn tell_foreign(env: &Environment, target: &Destination, foreign: &[String], live: &LiveRun) -> Result<(), Failure> {
    let note = format!("foreign configurations at {}", target.name);
    let now = serde_json::to_string(foreign).unwrap_or_default();
    if !foreign.is_empty() && env.ledger.note(&note)?.as_deref() != Some(now.as_str()) {
        let some = foreign.iter().take(5).map(|n| n.escape_debug().to_string()).collect::<Vec<_>>().join(", ");
        live.message(Level::Warning, format!("{} objects are no stored configurations and are left alone: {some}", foreign.len()));
        env.ledger.set_note(&note, &now)?;
    }
    Ok(())
}

fn used_note(target: &Destination) -> String {
    format!("configurations at {}", target.name)
}

/// That nothing is left of what was here, or that the newest is gone, is meant so.
pub fn accept_emptied(ledger: &Ledger, target: &Destination) -> Result<(), Failure> {
    ledger.set_note(&newest_note(target), "")?;
    Ok(ledger.set_note(&used_note(target), "")?)
}

/// Whether configurations are all that was ever stored at a destination.
pub fn are_all(env: &Environment, target: &Destination) -> Result<bool, Failure> {
    if env.ledger.note(&used_note(target))?.is_none_or(|used| used.is_empty()) {
        return Ok(false);
    }
    match archived::is(target) {
        true => Ok(env.ledger.objects(&target.name)?.is_empty()),
        false => Ok(destination::identify(env, target)?.is_none()),
    }
}

/// The storage of a destination, made where nothing ever was; a disk that is not mounted is none of these.
fn open(env: &Environment, target: &Destination) -> Result<Storage, Failure> {
    let storage = destination::storage(target, &env.runtime)?;
    let is_known = match archived::is(target) {
        true if env.ledger.objects(&target.name)?.is_empty() => false,
        true if storage.top()?.is_empty() => {
            let text =
                format!("destination {}: archives were at {} and nothing is there; is the disk mounted?", target.name, storage.location());
            return Err(Failure::Storage(text));
        }
        true => true,
        false => destination::identify(env, target)?.is_some(),
    };
    if is_known {
        return Ok(storage);
    }
    if env.ledger.note(&used_note(target))?.is_none_or(|used| used.is_empty()) {
        storage.prepare()?;
    } else if stored::look(&storage).map(|there| there.stored.is_empty()).unwrap_or(true) {
        return Err(Failure::Storage(format!(
            "destination {0}: configurations were stored at {1} and none is there; is the disk mounted? If they were removed on purpose: keepctl destination take-over {0}",
            target.name,
            storage.location()
        )));
    }
    Ok(storage)
}

/// All keys that this configuration has; those that cannot be had open nothing.
pub fn keys(env: &Environment, cancel: &CancellationToken) -> Keys {
    let profiles = env.config.encryption.values().filter_map(|known| profile::load(known).ok());
    Keys {
        keys: profiles.flat_map(|p| p.keys().cloned().collect::<Vec<_>>()).collect(),
        private: env.lent.keys().to_vec(),
        cancel: cancel.clone(),
    }
}

/// Opens what is stored there; returns what is damaged or missing.
pub fn check(env: &Environment, target: &Destination, live: &LiveRun) -> Result<Vec<String>, Failure> {
    let storage = destination::storage(target, &env.runtime)?;
    let noted = newest(&env.ledger, target)?;
    let there = stored::list(&storage)?;
    let mut problems = Vec::new();
    if let Some(noted) = noted.as_ref().filter(|noted| !there.iter().any(|stored| stored.name == noted.object))
        // Not when another took its place meanwhile.
        && newest(&env.ledger, target)?.as_ref() == Some(noted)
    {
        problems.push(format!(
            "{}: {}: it is the newest stored configuration, and is missing; keepctl config backup stores one, and if it was removed on purpose: keepctl destination take-over {}",
            storage.location(),
            noted.object,
            target.name
        ));
    }
    if there.is_empty() {
        return Ok(problems);
    }
    live.step("opening the stored configurations");
    let keys = keys(env, &live.cancel);
    let (mut opened, mut closed) = (0, 0);
    for stored in there.iter().rev().take(MOST_CHECKED) {
        if live.cancel.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        let bytes = match stored::fetch(&storage, &stored.name) {
            Ok(bytes) => bytes,
            // Removed meanwhile.
            Err(StorageError::NotFound { .. }) => continue,
            Err(e) => return Err(e.into()),
        };
        let is_newest = noted.as_ref().is_some_and(|noted| noted.object == stored.name);
        match envelope::read(&*bytes, &keys) {
            Ok(_) => opened += 1,
            Err(PortableError::Cancelled) => return Err(Failure::Cancelled),
            Err(e) if wants_another_key(&e) && !(is_newest && opens_without_private_key(&bytes)) => closed += 1,
            Err(e) => problems.push(format!("{}: {}: {e}", storage.location(), stored.name)),
        }
    }
    let closed = if closed > 0 { format!(", {closed} open with keys that are not here") } else { String::new() };
    live.message(Level::Info, format!("{opened} stored configurations open{closed}"));
    Ok(problems)
}

/// Not opened, and no sign that it is damaged.
fn wants_another_key(error: &PortableError) -> bool {
    use CryptoError as E;
    match error {
        PortableError::NotOpen(_) => true,
        PortableError::Key(e) => matches!(
            e,
            E::WrongKey { .. } | E::WrongPassphrase | E::OtherMethod { .. } | E::NeedsPrivateKey(_) | E::Token(_) | E::Version(_)
        ),
        _ => false,
    }
}

/// A key of this configuration should open it: nobody's private key is wanted.
fn opens_without_private_key(sealed: &[u8]) -> bool {
    seal::slots(sealed).is_ok_and(|(_, slots)| slots.iter().all(|slot| slot.method != seal::METHOD_PUBLIC_KEY))
}

/// After a re-encryption: own ones that a former key of the destination's profile opens go, when one of now lies there. Where others are left that it
/// opens, something is left over.
pub fn anew(env: &Environment, target: &Destination, live: &LiveRun) -> Result<Finish, Failure> {
    let storage = destination::storage(target, &env.runtime)?;
    let before = stored::list(&storage)?;
    let Some(profile) = destination::profile(&env.config, target)? else { return Ok(Finish::Good) };
    let wanted = env.config.config_backup.as_ref().filter(|wanted| wanted.destination == target.name);
    if let Some(wanted) = wanted {
        store_at(env, wanted, target, &storage, live)?;
    }
    live.step("looking for configurations that former keys open");
    let mut own = own(&env.ledger, target)?;
    let (mut removed, mut left, mut unknown) = (0, 0, 0);
    for old in &before {
        if live.cancel.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        let bytes = match stored::fetch(&storage, &old.name) {
            Ok(bytes) => bytes,
            Err(StorageError::NotFound { .. }) => continue,
            Err(e) => return Err(e.into()),
        };
        if !seal::is_sealed(&bytes) {
            continue;
        }
        let of_former =
            seal::slots(&bytes).and_then(|(_, slots)| seal::is_of_former_key(&slots, &bytes, &profile).map_err(PortableError::Key));
        match of_former {
            Ok(false) => {}
            Ok(true) if wanted.is_some() && own.contains(&old.name) && !target.append_only => {
                storage.delete(&old.name)?;
                own.remove(&old.name);
                removed += 1;
            }
            Ok(true) => left += 1,
            Err(e) => {
                live.message(Level::Warning, format!("{}: whom it is sealed for cannot be made out, and it stays: {e}", old.name));
                unknown += 1;
            }
        }
    }
    set_own(&env.ledger, target, &own)?;
    if removed > 0 {
        live.message(Level::Info, format!("{removed} stored configurations that a former key opened were removed"));
    }
    if left > 0 {
        let why = match wanted {
            None => format!("[config_backup] does not name {}", target.name),
            Some(_) if target.append_only => format!("{} is append_only", target.name),
            Some(_) => "this keepd did not store them, or does not know so any more".to_owned(),
        };
        live.message(
            Level::Warning,
            format!(
                "a former key opens {left} stored configurations at {}, and keepd leaves them alone, for {why}; remove them from config/ there if they are not wanted",
                target.name
            ),
        );
    }
    Ok(if left + unknown > 0 { Finish::Partial } else { Finish::Good })
}
