//! The keys a rescue is given, and what the repository wants.

use std::io::IsTerminal;
use std::sync::Arc;

use zeroize::Zeroizing;

use super::arguments::Place;
use super::{Failure, Result, tell};
use crate::config::SecretSource;
use crate::crypto::key_file::KeyFileError;
use crate::crypto::slot::{METHOD_NONE, METHOD_PASSPHRASE, Slot};
use crate::crypto::token::TokenKey;
use crate::crypto::{Lent, Profile, ProfileKey, key_file};
use crate::secret;
use crate::storage::Storage;

/// No slot is longer.
const MAX_SLOT_BYTES: u64 = 64 << 10;

/// What opens the repository (None: it is not encrypted), and private keys for write-only packs.
pub fn keys(place: &Place, storage: &Storage) -> Result<(Option<Profile>, Lent)> {
    let (mut keys, lent) = given(place)?;
    let slots = slots(storage)?;
    let is_plain = !slots.is_empty() && slots.iter().all(|slot| slot.method == METHOD_NONE);
    if keys.is_empty() && !is_plain && slots.iter().any(|slot| slot.method == METHOD_PASSPHRASE) && std::io::stdin().is_terminal() {
        let asked = rpassword::prompt_password(format!("Passphrase of the repository at {}: ", storage.location()));
        let passphrase = asked.map_err(|e| Failure::failed(format!("the passphrase cannot be read: {e}")))?;
        keys.push(ProfileKey::Passphrase(Arc::new(Zeroizing::new(passphrase))));
    }
    let mut keys = keys.into_iter();
    match keys.next() {
        // Whoever can write there could have put such a slot in place of the right one, and backups of their own beside it.
        Some(_) if is_plain => Err(Failure::failed(format!(
            "{} says that it is not encrypted, and keys were given; if it never was encrypted leave them out, else somebody exchanged its key slots",
            storage.location()
        ))),
        Some(key) => Ok((Some(Profile { retired: keys.collect(), ..Profile::of("rescue", key) }), lent)),
        // Without slots there is no repository, or none that is whole: whoever opens it tells.
        None if is_plain || slots.is_empty() => Ok((None, lent)),
        None => Err(Failure::failed(format!(
            "{} is encrypted; what opens it: {} (--key FILE, --passphrase-file FILE, --pkcs11-module FILE …)",
            storage.location(),
            slots.iter().map(described).collect::<Vec<_>>().join("; ")
        ))),
    }
}

fn described(slot: &Slot) -> String {
    match slot.method.as_str() {
        METHOD_PASSPHRASE => format!("the passphrase of profile '{}'", slot.profile),
        method => format!("the {method} of profile '{}' with the fingerprint {}", slot.profile, slot.fingerprint),
    }
}

/// The slots that can be made out.
fn slots(storage: &Storage) -> Result<Vec<Slot>> {
    let names = storage.names("keys/").map_err(Failure::failed)?;
    let mut slots = Vec::new();
    // Whoever can write there may have put many.
    for name in names.iter().take(64) {
        let bytes = storage.get(name, MAX_SLOT_BYTES).map_err(Failure::failed)?;
        slots.extend(serde_json::from_slice::<Slot>(&bytes));
    }
    Ok(slots)
}

/// What stands on the command line.
pub fn given(place: &Place) -> Result<(Vec<ProfileKey>, Lent)> {
    let (mut keys, mut private) = (Vec::new(), Vec::new());
    for path in &place.key {
        let file = key_file::open(path).map_err(Failure::failed)?;
        // A stick or a disc may know neither owners nor modes, and may be all that is left.
        let ((found, found_private), complaint) = key_file::load_all_however_kept(path, &file).map_err(Failure::failed)?;
        match complaint {
            Some(KeyFileError::OpenToOthers { mode, .. }) => {
                tell(&format!("warning: {} can be read or changed by others on this machine (mode {mode:04o})", path.display()));
            }
            Some(KeyFileError::ForeignOwner { owner, .. }) => {
                tell(&format!("warning: {} belongs to another user (uid {owner}), who can read and change it", path.display()));
            }
            _ => {}
        }
        keys.extend(found.into_iter().map(|key| ProfileKey::Key(Arc::new(key))));
        private.extend(found_private);
    }
    if let Some(path) = &place.passphrase_file {
        let text = secret::read(&SecretSource::File(path.clone())).map_err(|e| Failure::failed(format!("the passphrase: {e}")))?;
        keys.push(ProfileKey::Passphrase(Arc::new(Zeroizing::new(text))));
    }
    if let (Some(module), Some(token), Some(key)) = (&place.pkcs11_module, &place.token, &place.token_key) {
        let pin = match &place.pin_file {
            Some(path) => Some(secret::read(&SecretSource::File(path.clone())).map_err(|e| Failure::failed(format!("the PIN: {e}")))?),
            None if std::io::stdin().is_terminal() => {
                let asked = rpassword::prompt_password(format!("PIN of token '{token}': "));
                Some(asked.map_err(|e| Failure::failed(format!("the PIN cannot be read: {e}")))?)
            }
            None => None,
        };
        keys.push(ProfileKey::Token(Arc::new(TokenKey::new(module, token, key, pin.map(Zeroizing::new)))));
    }
    Ok((keys, Lent::of(private)))
}
