//! Key slots: the keys of a repository, wrapped for one encryption profile, as a small JSON object.
//!
//! With a key file the wrapping key is HKDF-SHA256 of the profile's key with the slot's random salt, so it wraps exactly one thing and its
//! nonce may be zero; with a passphrase the profile's key comes from Argon2id; a token wraps by itself. All other fields of the slot are
//! associated data: changing one makes it not open.

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Key as AesKey, Nonce};
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::locked::Locked;
use super::master::derive;
use super::passphrase::{self, Cost};
use super::{CryptoError, Key, Keyring, ProfileKey, random};

/// How the keys are wrapped.
pub const METHOD_KEY_FILE: &str = "key-file";
pub const METHOD_PASSPHRASE: &str = "passphrase";
pub const METHOD_TOKEN: &str = "pkcs11";
/// `encryption = "none"`: the keys stand in the slot in plain; sealing then only guards against damage.
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
    /// Tells which key is wanted; of a hash of a key, so it tells nothing else.
    pub fingerprint: String,
    pub salt: String,
    /// How a passphrase becomes a key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kdf: Option<String>,
    pub wrapped: String,
}

impl Slot {
    /// Wraps the keys of a repository for a profile's key, or for nobody (`None`: encryption none).
    pub fn wrap(repository: &[u8; 16], profile: &str, key: Option<&ProfileKey>, keys: &Keyring) -> Result<Self, CryptoError> {
        let salt: [u8; 32] = random()?;
        let id: [u8; 8] = random()?;
        let (method, kdf) = match key {
            None => (METHOD_NONE, None),
            Some(ProfileKey::Key(_)) => (METHOD_KEY_FILE, None),
            Some(ProfileKey::Passphrase(_)) => (METHOD_PASSPHRASE, Some(Cost::USUAL.to_string())),
            Some(ProfileKey::Token(_)) => (METHOD_TOKEN, None),
        };
        let mut slot = Slot {
            format: 1,
            repository: HEXLOWER.encode(repository),
            slot: HEXLOWER.encode(&id),
            profile: profile.to_owned(),
            method: method.to_owned(),
            fingerprint: String::new(),
            salt: HEXLOWER.encode(&salt),
            kdf,
            wrapped: String::new(),
        };
        let keys = keys.to_bytes();
        let wrapped = match key {
            None => keys.to_vec(),
            Some(ProfileKey::Key(key)) => {
                slot.fingerprint = key.fingerprint().to_string();
                slot.seal(key, &salt, &keys)?
            }
            Some(ProfileKey::Passphrase(passphrase)) => {
                let key = Key::new(passphrase::derive(passphrase, &salt, Cost::USUAL)?);
                slot.fingerprint = key.fingerprint().to_string();
                slot.seal(&key, &salt, &keys)?
            }
            Some(ProfileKey::Token(token)) => {
                slot.fingerprint = token.fingerprint()?.to_string();
                token.wrap(&keys, &slot.aad())?
            }
        };
        slot.wrapped = HEXLOWER.encode(&wrapped);
        Ok(slot)
    }

    /// Unwraps the keys of a repository.
    pub fn unwrap(&self, repository: &[u8; 16], key: Option<&ProfileKey>) -> Result<Keyring, CryptoError> {
        if self.format != 1 {
            return Err(CryptoError::Version(self.format.to_string()));
        }
        if self.repository != HEXLOWER.encode(repository) {
            return Err(CryptoError::OtherRepository);
        }
        let wrapped = Zeroizing::new(self.hex(&self.wrapped, "wrapped key")?);
        let salt = || -> Result<[u8; 32], CryptoError> {
            self.hex(&self.salt, "salt")?.try_into().map_err(|_| self.error("its salt has another length"))
        };
        let opened = match (self.method.as_str(), key) {
            (METHOD_NONE, None) => wrapped,
            // Whoever can write to the storage could put such a slot there to have the next backups readable.
            (METHOD_NONE, Some(_)) => {
                return Err(self.error("the repository is not encrypted, but the destination names an encryption profile"));
            }
            (METHOD_KEY_FILE | METHOD_PASSPHRASE | METHOD_TOKEN, None) => {
                return Err(self.error("the repository is encrypted, but the destination says encryption = \"none\"; name the profile"));
            }
            (METHOD_KEY_FILE, Some(ProfileKey::Key(key))) => {
                let given = key.fingerprint().to_string();
                if given != self.fingerprint {
                    return Err(CryptoError::WrongKey { given, known: self.fingerprint.clone() });
                }
                self.open(key, &salt()?, &wrapped).map_err(|_| self.changed())?
            }
            (METHOD_PASSPHRASE, Some(ProfileKey::Passphrase(passphrase))) => {
                let cost = self.kdf.as_deref().ok_or_else(|| self.error("it does not say how a passphrase becomes a key"))?;
                let key = Key::new(passphrase::derive(passphrase, &salt()?, cost.parse()?)?);
                if key.fingerprint().to_string() != self.fingerprint {
                    return Err(CryptoError::WrongPassphrase);
                }
                self.open(&key, &salt()?, &wrapped).map_err(|_| self.changed())?
            }
            (METHOD_TOKEN, Some(ProfileKey::Token(token))) => {
                let given = token.fingerprint()?.to_string();
                if given != self.fingerprint {
                    return Err(CryptoError::WrongKey { given, known: self.fingerprint.clone() });
                }
                token.unwrap(&wrapped, &self.aad())?
            }
            (METHOD_KEY_FILE | METHOD_PASSPHRASE | METHOD_TOKEN, Some(other)) => {
                return Err(CryptoError::OtherMethod {
                    given: format!("{other:?}"),
                    method: self.method.clone(),
                    fingerprint: self.fingerprint.clone(),
                });
            }
            (other, _) => return Err(self.error(&format!("method '{other}' is not known to this version of keepd"))),
        };
        Keyring::from_bytes(&opened).map_err(|_| self.error("what it wraps is not the keys of a repository"))
    }

    /// It names the fingerprint of the key given, and does not open with it.
    fn changed(&self) -> CryptoError {
        self.error("it does not open: it is damaged, or somebody changed it")
    }

    fn error(&self, text: &str) -> CryptoError {
        CryptoError::Slot(format!("keys/{}.json: {text}", self.slot.escape_default()))
    }

    fn hex(&self, text: &str, what: &str) -> Result<Vec<u8>, CryptoError> {
        HEXLOWER.decode(text.as_bytes()).map_err(|_| self.error(&format!("its {what} is not hexadecimal")))
    }

    fn seal(&self, key: &Key, salt: &[u8; 32], keys: &[u8]) -> Result<Vec<u8>, CryptoError> {
        let aad = self.aad();
        Self::cipher(key.bytes(), salt).encrypt(&Nonce::default(), Payload { msg: keys, aad: &aad }).map_err(|_| CryptoError::Open)
    }

    fn open(&self, key: &Key, salt: &[u8; 32], wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, CryptoError> {
        let aad = self.aad();
        let opened = Self::cipher(key.bytes(), salt).decrypt(&Nonce::default(), Payload { msg: wrapped, aad: &aad });
        opened.map(Zeroizing::new).map_err(|_| CryptoError::Open)
    }

    fn cipher(key: &[u8; Locked::BYTES], salt: &[u8]) -> Aes256Gcm {
        Aes256Gcm::new(&AesKey::<Aes256Gcm>::from(*derive(key, salt, b"keepd/1 key slot")))
    }

    /// Every field but the wrapped keys, each with its length before it.
    fn aad(&self) -> Vec<u8> {
        let format = self.format.to_string();
        let fields = [&format, &self.repository, &self.slot, &self.profile, &self.method, &self.fingerprint, &self.salt];
        let mut aad = Vec::new();
        for field in fields.into_iter().chain(&self.kdf) {
            aad.extend_from_slice(&(field.len() as u32).to_le_bytes());
            aad.extend_from_slice(field.as_bytes());
        }
        aad
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::crypto::MasterKey;

    fn file(byte: u8) -> ProfileKey {
        ProfileKey::Key(Arc::new(Key::new(Locked::take(&mut [byte; 32]))))
    }

    fn passphrase(text: &str) -> ProfileKey {
        ProfileKey::Passphrase(Arc::new(Zeroizing::new(text.to_owned())))
    }

    fn keys() -> Keyring {
        Keyring::of(MasterKey::from_bytes([9; 32]))
    }

    #[test]
    fn only_the_right_key_and_an_unchanged_slot_open() {
        let (right, wrong) = (file(2), file(3));
        let slot = Slot::wrap(&[1; 16], "main", Some(&right), &keys()).unwrap();
        assert!(slot.unwrap(&[1; 16], Some(&right)).unwrap().is_same(&keys()));
        assert!(matches!(slot.unwrap(&[1; 16], Some(&wrong)), Err(CryptoError::WrongKey { .. })));
        assert!(matches!(slot.unwrap(&[1; 16], Some(&passphrase("x"))), Err(CryptoError::OtherMethod { .. })));
        assert!(matches!(slot.unwrap(&[3; 16], Some(&right)), Err(CryptoError::OtherRepository)));
        assert!(slot.unwrap(&[1; 16], None).is_err());
        let renamed = Slot { profile: "other".into(), ..slot.clone() };
        assert!(renamed.unwrap(&[1; 16], Some(&right)).is_err());
        let downgraded = Slot { method: METHOD_NONE.into(), ..slot.clone() };
        assert!(downgraded.unwrap(&[1; 16], Some(&right)).is_err());
        let json = serde_json::to_string(&slot).unwrap();
        assert!(!json.contains("kdf"), "slots of key files are as they always were: {json}");
        for cut in 0..json.len() {
            assert!(serde_json::from_str::<Slot>(&json[..cut]).is_err());
        }
        let none = Slot::wrap(&[1; 16], "none", None, &keys()).unwrap();
        assert!(none.unwrap(&[1; 16], None).unwrap().is_same(&keys()));
        let both = keys().with_new_master().unwrap();
        let slot = Slot::wrap(&[1; 16], "main", Some(&right), &both).unwrap();
        assert!(slot.unwrap(&[1; 16], Some(&right)).unwrap().is_same(&both));
    }

    #[test]
    fn a_passphrase_opens_its_slot_and_nothing_makes_it_cheaper() {
        let right = passphrase("correct horse battery staple");
        let slot = Slot::wrap(&[1; 16], "main", Some(&right), &keys()).unwrap();
        assert_eq!(slot.kdf.as_deref(), Some("argon2id m=65536 t=3 p=4"));
        assert!(slot.unwrap(&[1; 16], Some(&right)).unwrap().is_same(&keys()));
        assert!(matches!(slot.unwrap(&[1; 16], Some(&passphrase("correct"))), Err(CryptoError::WrongPassphrase)));
        assert!(matches!(slot.unwrap(&[1; 16], Some(&file(2))), Err(CryptoError::OtherMethod { .. })));
        for kdf in [None, Some("argon2id m=8 t=1 p=1"), Some("argon2id m=4194304 t=3 p=4"), Some("pbkdf2")] {
            let changed = Slot { kdf: kdf.map(str::to_owned), ..slot.clone() };
            assert!(matches!(changed.unwrap(&[1; 16], Some(&right)), Err(CryptoError::Slot(_))), "{kdf:?}");
        }
        let changed = Slot { kdf: Some("argon2id m=19456 t=2 p=1".into()), ..slot.clone() };
        assert!(matches!(changed.unwrap(&[1; 16], Some(&right)), Err(CryptoError::WrongPassphrase)));
        let other = Slot::wrap(&[1; 16], "main", Some(&right), &keys()).unwrap();
        assert_ne!(slot.fingerprint, other.fingerprint, "two repositories do not tell that they have the same passphrase");
    }
}
