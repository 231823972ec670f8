//! Key slots: the master key of a repository, wrapped for one encryption profile, as a small JSON object.
//!
//! The wrapping key is HKDF-SHA256 of the profile's key with the slot's random salt, so it wraps exactly one thing and its
//! nonce may be zero. All other fields of the slot are associated data: changing one makes it not open.

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Key, Nonce};
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::master::derive;
use super::{CryptoError, MasterKey, random};

/// How the slot's master key is wrapped.
pub const METHOD_KEY_FILE: &str = "key-file";
/// `encryption = "none"`: the master key stands in the slot in plain; sealing then only guards against damage.
pub const METHOD_NONE: &str = "none";

/// `keys/<slot>.json` as it stands in the repository.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    pub format: u32,
    /// Hexadecimal, like all byte strings here.
    pub repository: String,
    pub slot: String,
    /// The encryption profile's name when it was made, for people.
    pub profile: String,
    pub method: String,
    /// Tells which key is wanted; 8 bytes of a hash of a random key, so it tells nothing else.
    pub fingerprint: String,
    pub salt: String,
    pub wrapped: String,
}

/// First 8 bytes of SHA-256 over a label and the key, in hexadecimal.
pub fn fingerprint(key: &[u8; 32]) -> String {
    let mut hash = Sha256::new();
    hash.update(b"keepd/1 key fingerprint");
    hash.update(key);
    HEXLOWER.encode(hash.finalize().get(..8).unwrap_or_default())
}

impl Slot {
    /// Wraps the master key for a key, or for nobody (`None`: encryption none).
    pub fn wrap(repository: &[u8; 16], profile: &str, key: Option<&[u8; 32]>, master: &MasterKey) -> Result<Self, CryptoError> {
        let salt: [u8; 32] = random()?;
        let id: [u8; 8] = random()?;
        let mut slot = Slot {
            format: 1,
            repository: HEXLOWER.encode(repository),
            slot: HEXLOWER.encode(&id),
            profile: profile.to_owned(),
            method: if key.is_some() { METHOD_KEY_FILE } else { METHOD_NONE }.to_owned(),
            fingerprint: key.map(fingerprint).unwrap_or_default(),
            salt: HEXLOWER.encode(&salt),
            wrapped: String::new(),
        };
        slot.wrapped = match key {
            None => HEXLOWER.encode(master.bytes()),
            Some(key) => {
                let aad = slot.aad();
                let payload = Payload { msg: master.bytes(), aad: &aad };
                HEXLOWER.encode(&slot.cipher(key, &salt).encrypt(&Nonce::default(), payload).map_err(|_| CryptoError::Open)?)
            }
        };
        Ok(slot)
    }

    /// Unwraps the master key.
    pub fn unwrap(&self, repository: &[u8; 16], key: Option<&[u8; 32]>) -> Result<MasterKey, CryptoError> {
        let slot_error = |text: &str| CryptoError::Slot(format!("keys/{}.json: {text}", self.slot));
        if self.format != 1 {
            return Err(CryptoError::Version(self.format.to_string()));
        }
        if self.repository != HEXLOWER.encode(repository) {
            return Err(CryptoError::OtherRepository);
        }
        let hex =
            |text: &str, what: &str| HEXLOWER.decode(text.as_bytes()).map_err(|_| slot_error(&format!("its {what} is not hexadecimal")));
        let wrapped = Zeroizing::new(hex(&self.wrapped, "wrapped key")?);
        let master = match (self.method.as_str(), key) {
            (METHOD_NONE, None) => wrapped,
            // Whoever can write to the storage could put such a slot there to have the next backups readable.
            (METHOD_NONE, Some(_)) => {
                return Err(slot_error("the repository is not encrypted, but the destination names an encryption profile"));
            }
            (METHOD_KEY_FILE, Some(key)) => {
                let salt = hex(&self.salt, "salt")?;
                let wrong = || CryptoError::WrongKey { given: fingerprint(key), known: self.fingerprint.clone() };
                if fingerprint(key) != self.fingerprint {
                    return Err(wrong());
                }
                let aad = self.aad();
                let payload = Payload { msg: &wrapped, aad: &aad };
                Zeroizing::new(self.cipher(key, &salt).decrypt(&Nonce::default(), payload).map_err(|_| wrong())?)
            }
            (METHOD_KEY_FILE, None) => {
                return Err(slot_error("the repository is encrypted, but the destination says encryption = \"none\"; name the profile"));
            }
            (other, _) => return Err(slot_error(&format!("method '{other}' is not known to this version of keepd"))),
        };
        let bytes: [u8; 32] = master.as_slice().try_into().map_err(|_| slot_error("the wrapped key has another length"))?;
        Ok(MasterKey::from_bytes(bytes))
    }

    fn cipher(&self, key: &[u8; 32], salt: &[u8]) -> Aes256Gcm {
        Aes256Gcm::new(&Key::<Aes256Gcm>::from(*derive(key, salt, b"keepd/1 key slot")))
    }

    /// Every field but the wrapped key, each with its length before it.
    fn aad(&self) -> Vec<u8> {
        let format = self.format.to_string();
        let mut aad = Vec::new();
        for field in [&format, &self.repository, &self.slot, &self.profile, &self.method, &self.fingerprint, &self.salt] {
            aad.extend_from_slice(&(field.len() as u32).to_le_bytes());
            aad.extend_from_slice(field.as_bytes());
        }
        aad
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_key_and_an_unchanged_slot_open() {
        let master = MasterKey::from_bytes([9; 32]);
        let slot = Slot::wrap(&[1; 16], "main", Some(&[2; 32]), &master).unwrap();
        assert_eq!(slot.unwrap(&[1; 16], Some(&[2; 32])).unwrap().bytes(), master.bytes());
        assert!(matches!(slot.unwrap(&[1; 16], Some(&[3; 32])), Err(CryptoError::WrongKey { .. })));
        assert!(matches!(slot.unwrap(&[3; 16], Some(&[2; 32])), Err(CryptoError::OtherRepository)));
        assert!(slot.unwrap(&[1; 16], None).is_err());
        let renamed = Slot { profile: "other".into(), ..slot.clone() };
        assert!(renamed.unwrap(&[1; 16], Some(&[2; 32])).is_err());
        let downgraded = Slot { method: METHOD_NONE.into(), ..slot.clone() };
        assert!(downgraded.unwrap(&[1; 16], Some(&[2; 32])).is_err());
        let json = serde_json::to_string(&slot).unwrap();
        for cut in 0..json.len() {
            assert!(serde_json::from_str::<Slot>(&json[..cut]).is_err());
        }
        let none = Slot::wrap(&[1; 16], "none", None, &master).unwrap();
        assert_eq!(none.unwrap(&[1; 16], None).unwrap().bytes(), master.bytes());
    }
}
