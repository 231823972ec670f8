//! The key slots of a repository: which there are and what opens them, adding one, removing one.
//!
//! A new slot counts when it was read back and opened. One is removed only when another was just read and opened with the profile's present
//! key. So whatever is interrupted leaves what was there, or more; a repository without a slot that opens never comes of it.

use super::error::{RepositoryError, Result};
use super::open::{MAX_SLOTS, MAX_SMALL_OBJECT, Repository, slot_name, to_json};
use crate::crypto::passphrase::Cost;
use crate::crypto::slot::{METHOD_NONE, METHOD_PASSPHRASE, Slot};
use crate::crypto::{CryptoError, Keyring, ProfileKey};
use crate::storage::{Storage, StorageError};

/// Objects in `keys/` that are read at most: far more than keepd makes, so that some that somebody put there keep nobody from the others.
const MAX_READ: usize = 256;

/// What opens a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opens {
    /// None of the keys that were tried.
    No,
    /// The key at this place of those that were tried.
    With(usize),
}

/// A slot as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundSlot {
    /// What stands between `keys/` and `.json`.
    pub id: String,
    /// The object's whole name.
    pub name: String,
    /// As it says, when it says something.
    pub profile: String,
    pub method: String,
    pub fingerprint: String,
    pub opens: Opens,
    /// What is wrong with it, beside that it wants another key.
    pub problem: Option<String>,
}

/// Why nothing is known of a slot.
pub(super) enum Unreadable {
    Storage(StorageError),
    Slot(CryptoError),
}

/// All slots, each with its object's name; those that are quick to open first. One that is removed meanwhile is none.
pub(super) fn read_all(storage: &Storage) -> Result<Vec<(String, Result<Slot, Unreadable>)>> {
    let names = storage.names("keys/")?;
    if names.len() > MAX_READ {
        let text = format!(
            "{} objects are in keys/, far more than keepd makes; compare them with a copy of the repository, and delete by hand what somebody put there",
            names.len()
        );
        return Err(RepositoryError::NoRepository { location: storage.location().to_owned(), text });
    }
    let mut slots = Vec::new();
    for name in names {
        let slot = match storage.get(&name, MAX_SMALL_OBJECT) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| Unreadable::Slot(CryptoError::Slot(e.to_string()))),
            Err(StorageError::NotFound { .. }) => continue,
            Err(e) => Err(Unreadable::Storage(e)),
        };
        slots.push((name, slot));
    }
    // One that somebody made dear to open must not stand before the others.
    slots.sort_by_key(|(_, slot)| slot.as_ref().is_ok_and(is_dear));
    Ok(slots)
}

/// Which of the slots may be tried with a passphrase: opening one may cost seconds.
#[derive(Default)]
pub(super) struct Patience(usize);

impl Patience {
    pub(super) fn allows(&mut self, slot: &Slot, key: Option<&ProfileKey>) -> bool {
        if slot.method != METHOD_PASSPHRASE || !matches!(key, Some(ProfileKey::Passphrase(_))) {
            return true;
        }
        self.0 += 1;
        self.0 <= MAX_SLOTS
    }
}

/// Whether a passphrase's slot costs more than those that keepd makes.
pub(super) fn is_dear(slot: &Slot) -> bool {
    slot.method == METHOD_PASSPHRASE && slot.kdf.as_deref() != Some(Cost::USUAL.to_string().as_str())
}

/// Of a slot that is not tried.
pub(super) fn too_many() -> CryptoError {
    CryptoError::Slot(format!("it was not tried, for more than {MAX_SLOTS} slots with passphrases are there"))
}

/// The slots of a storage, by name; each is tried with the keys given (`None`: without one). A complete list or an error.
pub fn list(storage: &Storage, repository: &[u8; 16], keys: &[Option<&ProfileKey>]) -> Result<Vec<FoundSlot>> {
    let mut found = look(storage, repository, keys)?.into_iter().map(|(slot, _)| slot).collect::<Vec<_>>();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// The same with what each wraps.
fn look(storage: &Storage, repository: &[u8; 16], keys: &[Option<&ProfileKey>]) -> Result<Vec<(FoundSlot, Option<Keyring>)>> {
    let mut patience = Patience::default();
    let mut found = Vec::new();
    for (name, slot) in read_all(storage)? {
        let id = name.strip_prefix("keys/").unwrap_or(&name);
        let id = id.strip_suffix(".json").unwrap_or(id).to_owned();
        let nothing = |problem: String| FoundSlot {
            id: id.clone(),
            name: name.clone(),
            profile: String::new(),
            method: String::new(),
            fingerprint: String::new(),
            opens: Opens::No,
            problem: Some(problem),
        };
        match slot {
            Err(Unreadable::Storage(e)) => return Err(e.into()),
            Err(Unreadable::Slot(e)) => found.push((nothing(e.to_string()), None)),
            Ok(slot) => {
                let (opens, opened, problem) = try_keys(&slot, &id, repository, keys, &mut patience);
                let Slot { profile, method, fingerprint, .. } = slot;
                found.push((FoundSlot { profile, method, fingerprint, opens, problem, ..nothing(String::new()) }, opened));
            }
        }
    }
    Ok(found)
}

fn try_keys(
    slot: &Slot,
    id: &str,
    repository: &[u8; 16],
    keys: &[Option<&ProfileKey>],
    patience: &mut Patience,
) -> (Opens, Option<Keyring>, Option<String>) {
    let named_otherwise = (slot.slot != id).then(|| format!("it calls itself {}: it was copied or renamed", slot.slot.escape_default()));
    let mut problem = None;
    for (at, key) in keys.iter().enumerate() {
        if !patience.allows(slot, *key) {
            problem = Some(too_many().to_string());
            continue;
        }
        match slot.unwrap(repository, *key) {
            Ok(opened) => return (Opens::With(at), Some(opened), named_otherwise),
            // That it is for another key is nothing wrong with it.
            Err(CryptoError::WrongKey { .. } | CryptoError::OtherMethod { .. } | CryptoError::WrongPassphrase) => {}
            Err(CryptoError::OtherRepository) => problem = Some("it belongs to another repository: it was copied here".to_owned()),
            Err(CryptoError::Slot(_)) if slot.method == METHOD_NONE && key.is_some() => {
                problem = Some("it wants no key and is never used: somebody put it here".to_owned());
            }
            Err(e) => problem = Some(e.to_string()),
        }
    }
    (Opens::No, None, problem.or(named_otherwise))
}

/// What adding a slot did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Added {
    /// The new slot's id.
    New(String),
    /// The key had a slot already, this one.
    There(String),
}

impl Repository {
    /// Whether a slot's contents are the keys that this repository was opened with.
    fn is_of_these_keys(&self, opened: Option<&Keyring>) -> bool {
        opened.is_some_and(|keys| keys.is_same(&self.keys))
    }

    /// Has a further key open this repository; `label` is the profile's name, for people. Durable and proven when it returns. The caller is
    /// the writer.
    pub fn add_slot(&self, label: &str, key: &ProfileKey) -> Result<Added> {
        if self.keys.is_changing() {
            return Err(self.other("it is being re-encrypted; wait until that has ended ('keepctl run list')".to_owned()));
        }
        let there = look(&self.storage, &self.id, &[Some(key)])?;
        if let Some((slot, _)) = there.iter().find(|(_, opened)| self.is_of_these_keys(opened.as_ref())) {
            return Ok(Added::There(slot.id.clone()));
        }
        if there.len() >= MAX_SLOTS {
            return Err(self.other(format!(
                "{} key slots are there, and a repository has at most {MAX_SLOTS}; 'keepctl key remove' removes one that nobody needs",
                there.len()
            )));
        }
        self.put_slot(label, key, &self.keys).map(Added::New)
    }

    /// Has a key open a slot of its own that wraps `keys`; its id. Durable and proven when it returns.
    pub(super) fn put_slot(&self, label: &str, key: &ProfileKey, keys: &Keyring) -> Result<String> {
        let object = |source| RepositoryError::Object { location: self.location().to_owned(), name: "a new key slot".into(), source };
        let slot = Slot::wrap(&self.id, label, Some(key), keys).map_err(object)?;
        let name = slot_name(&slot.slot);
        self.storage.put_new(&name, to_json(&slot)?)?;
        let proven = self.proven(&name, key, keys);
        if let Err(e) = proven {
            // It opens nothing; what cannot be removed now is told as damaged by the list.
            let _ = self.storage.delete(&name);
            return Err(e);
        }
        Ok(slot.slot)
    }

    /// Reads a slot back and opens it.
    fn proven(&self, name: &str, key: &ProfileKey, keys: &Keyring) -> Result<()> {
        let bytes = self.storage.get(name, MAX_SMALL_OBJECT)?;
        let slot: Slot =
            serde_json::from_slice(&bytes).map_err(|e| self.damaged(name, format!("it was not stored as it was written: {e}")))?;
        let opened = slot.unwrap(&self.id, Some(key));
        let opened =
            opened.map_err(|source| RepositoryError::Object { location: self.location().to_owned(), name: name.to_owned(), source })?;
        match opened.is_same(keys) {
            true => Ok(()),
            false => Err(self.damaged(name, "it does not hold the keys of the repository".into())),
        }
    }

    /// Removes slots, by the ids that [`list`] gives, when another one was just read and opened with `key`: that of the profile by
    /// which the repository is opened from now on (None: of one that is not encrypted). Returns those that open it with that key. The
    /// caller is the writer.
    pub fn remove_slots(&self, ids: &[String], key: Option<&ProfileKey>) -> Result<Vec<String>> {
        if self.storage.is_append_only() {
            return Err(
                self.other("the destination is append_only: keepd deletes nothing there, so what opened it goes on opening it".into())
            );
        }
        let there = look(&self.storage, &self.id, &[key])?;
        let stays = |slot: &FoundSlot| !ids.contains(&slot.id);
        let opening = there.iter().filter(|(slot, opened)| stays(slot) && self.is_of_these_keys(opened.as_ref()));
        let opening: Vec<String> = opening.map(|(slot, _)| slot.id.clone()).collect();
        if opening.is_empty() {
            return Err(self.other(
                "no other slot opens with the profile's present key, so nothing is removed: nobody could open the repository any more"
                    .into(),
            ));
        }
        let mut goes = Vec::new();
        for id in ids {
            let Some((slot, _)) = there.iter().find(|(slot, _)| slot.id == *id) else {
                return Err(self.other(format!("there is no key slot {id}")));
            };
            goes.push(slot.name.clone());
        }
        self.delete_slots(&goes)?;
        Ok(opening)
    }

    /// Deletes slots by their objects' names, and looks that they are gone.
    pub(super) fn delete_slots(&self, names: &[String]) -> Result<()> {
        for name in names {
            self.storage.delete(name)?;
        }
        let left = self.storage.names("keys/")?;
        match left.iter().find(|name| names.contains(name)) {
            None => Ok(()),
            Some(name) => {
                Err(self.other(format!("the storage says that it deleted {name}, but it is still there: it opens what it opened")))
            }
        }
    }

    fn other(&self, text: String) -> RepositoryError {
        RepositoryError::Other(format!("{}: {text}", self.location()))
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use zeroize::Zeroizing;

    use super::*;
    use crate::crypto::{Key, Profile, locked::Locked};
    use crate::repository::test_world::{Told, World};

    fn key(byte: u8) -> ProfileKey {
        ProfileKey::Key(Arc::new(Key::new(Locked::take(&mut [byte; 32]))))
    }

    fn profile(byte: u8) -> Profile {
        Profile::of("main", key(byte))
    }

    fn slots(world: &World) -> Vec<PathBuf> {
        let directory = world.path().join("repository/keys");
        let mut found: Vec<PathBuf> = std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().path()).collect();
        found.sort();
        found
    }

    fn opens(world: &World, byte: u8) -> bool {
        world.try_open("reader", None, Some(&profile(byte))).is_ok()
    }

    fn found(world: &World, byte: u8) -> Vec<FoundSlot> {
        let repository = world.try_open("reader", None, Some(&profile(byte))).unwrap();
        list(&repository.storage, &repository.id, &[Some(&key(byte))]).unwrap()
    }

    #[test]
    fn a_key_is_added_once_and_the_last_that_opens_is_not_removed() {
        let world = World::new();
        let repository = world.try_open("daemon", None, Some(&profile(1))).unwrap();
        assert!(!opens(&world, 2));
        let Added::New(second) = repository.add_slot("main", &key(2)).unwrap() else { panic!("it is new") };
        assert_eq!(repository.add_slot("main", &key(2)).unwrap(), Added::There(second.clone()));
        assert!(opens(&world, 1) && opens(&world, 2));
        let passphrase = ProfileKey::Passphrase(Arc::new(Zeroizing::new("correct horse battery".to_owned())));
        assert!(matches!(repository.add_slot("phrase", &passphrase).unwrap(), Added::New(_)));
        assert!(matches!(repository.add_slot("phrase", &passphrase).unwrap(), Added::There(_)));
        let all = found(&world, 1);
        assert_eq!(all.len(), 3);
        assert!(all.iter().all(|s| s.problem.is_none()), "{all:?}");
        let first = all.iter().find(|s| s.opens == Opens::With(0)).unwrap().id.clone();
        // A key that opens nothing proves nothing.
        assert!(repository.remove_slots(std::slice::from_ref(&first), Some(&key(3))).is_err());
        assert!(repository.remove_slots(&["0000000000000000".to_owned()], Some(&key(1))).unwrap_err().to_string().contains("no key slot"));
        assert_eq!(repository.remove_slots(std::slice::from_ref(&first), Some(&key(2))).unwrap(), std::slice::from_ref(&second));
        assert!(!opens(&world, 1) && opens(&world, 2));
        let error = repository.remove_slots(&[second], Some(&key(2))).unwrap_err().to_string();
        assert!(error.contains("no other slot opens with the profile's present key"), "{error}");
        assert!(opens(&world, 2));
    }

    #[test]
    fn whatever_lies_in_keys_is_told_and_in_nobodys_way() {
        let world = World::new();
        let repository = world.try_open("daemon", None, Some(&profile(1))).unwrap();
        let own = slots(&world).remove(0);
        let text = std::fs::read_to_string(&own).unwrap();
        let keys = own.parent().unwrap().to_owned();
        let other = World::new();
        other.try_open("daemon", None, Some(&profile(1))).unwrap();
        std::fs::copy(slots(&other).remove(0), keys.join("0000000000000001.json")).unwrap();
        std::fs::write(keys.join("0000000000000002.json"), &text[..text.len() / 2]).unwrap();
        std::fs::write(keys.join("0000000000000003.json"), [0xff, 0, 1]).unwrap();
        std::fs::write(keys.join("0000000000000004.json"), &text).unwrap();
        let none = serde_json::to_string(&Slot::wrap(&repository.id, "none", None, &Keyring::generate().unwrap()).unwrap()).unwrap();
        std::fs::write(keys.join("0000000000000005.json"), none).unwrap();
        let wrapped = text.replace("\"wrapped\": \"", "\"wrapped\": \"00");
        assert_ne!(wrapped, text);
        std::fs::write(keys.join("0000000000000006.json"), wrapped).unwrap();
        std::fs::write(keys.join("0000000000000007"), "").unwrap();
        let all = found(&world, 1);
        assert_eq!(all.len(), 8);
        let problem = |n: u32| all.iter().find(|s| s.id == format!("{n:016}")).unwrap().problem.clone().unwrap();
        assert!(problem(1).contains("another repository"));
        for n in [2, 3, 7] {
            assert!(problem(n).contains("not readable"), "{}", problem(n));
        }
        assert!(problem(4).contains("copied or renamed"));
        assert!(problem(5).contains("somebody put it here"));
        assert!(problem(6).contains("it does not open: it is damaged"), "{}", problem(6));
        assert!(opens(&world, 1) && !opens(&world, 2));
        // All of it can be removed; what opens stays.
        let odd: Vec<String> = all.iter().filter(|s| s.problem.is_some()).map(|s| s.id.clone()).collect();
        repository.remove_slots(&odd, Some(&key(1))).unwrap();
        assert_eq!(slots(&world), [own]);
        // Forty that nobody made.
        for n in 0..40 {
            std::fs::write(keys.join(format!("00000000000000{n:02}.json")), "{}").unwrap();
        }
        assert!(opens(&world, 1));
        assert_eq!(found(&world, 1).len(), 41);
        assert!(repository.add_slot("main", &key(2)).unwrap_err().to_string().contains("at most 32"));
        for n in 40..400 {
            std::fs::write(keys.join(format!("0000000000000{n:03}.json")), "{}").unwrap();
        }
        let error = world.try_open("reader", None, Some(&profile(1))).err().unwrap().to_string();
        assert!(error.contains("objects are in keys/"), "{error}");
    }

    /// Stops at an operation of the storage as if the power went, or has everything fail from there on.
    #[derive(Clone, Copy, PartialEq)]
    enum Fault {
        Stop,
        Gone,
    }

    #[test]
    fn stopped_anywhere_the_old_key_opens_or_both_do() {
        for fault in [Fault::Stop, Fault::Gone] {
            let mut outcomes = [0; 3];
            for at in 1.. {
                let world = World::new();
                world.try_open("maker", None, Some(&profile(1))).unwrap();
                let operations = Arc::new(AtomicUsize::new(usize::MAX / 2));
                let (counted, root) = (operations.clone(), world.path().join("repository"));
                let away = world.path().join("away");
                let gone = away.clone();
                let told: Told = Arc::new(move || {
                    if counted.fetch_add(1, Ordering::SeqCst) + 1 == at {
                        match fault {
                            Fault::Stop => panic!("stopped"),
                            Fault::Gone => {
                                std::fs::rename(&root, &gone).unwrap();
                                std::fs::write(&root, "no directory").unwrap();
                            }
                        }
                    }
                });
                let repository = world.try_open("daemon", Some(told), Some(&profile(1))).unwrap();
                operations.store(0, Ordering::SeqCst);
                let done = catch_unwind(AssertUnwindSafe(|| {
                    repository.add_slot("main", &key(2))?;
                    let all = list(&repository.storage, &repository.id, &[Some(&key(1))])?;
                    let old: Vec<String> = all.into_iter().filter(|s| s.opens == Opens::With(0)).map(|s| s.id).collect();
                    repository.remove_slots(&old, Some(&key(2)))
                }));
                let finished = matches!(done, Ok(Ok(_)));
                operations.store(usize::MAX / 2, Ordering::SeqCst);
                if away.exists() {
                    std::fs::remove_file(world.path().join("repository")).unwrap();
                    std::fs::rename(&away, world.path().join("repository")).unwrap();
                }
                match (opens(&world, 1), opens(&world, 2)) {
                    (true, false) => outcomes[0] += 1,
                    (true, true) => outcomes[1] += 1,
                    (false, true) => outcomes[2] += 1,
                    (false, false) => panic!("stopped at operation {at}, nothing opens it"),
                }
                if finished {
                    assert!(!opens(&world, 1) && opens(&world, 2));
                    break;
                }
                // The same once more finishes it.
                repository.add_slot("main", &key(2)).unwrap();
                let all = list(&repository.storage, &repository.id, &[Some(&key(1))]).unwrap();
                let old: Vec<String> = all.into_iter().filter(|s| s.opens == Opens::With(0)).map(|s| s.id).collect();
                if !old.is_empty() {
                    repository.remove_slots(&old, Some(&key(2))).unwrap();
                }
                assert!(!opens(&world, 1) && opens(&world, 2), "stopped at operation {at}");
                assert!(at < 100, "it never ends");
            }
            assert!(outcomes.iter().all(|n| *n > 0), "{outcomes:?}");
        }
    }
}
