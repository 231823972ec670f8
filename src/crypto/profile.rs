//! An encryption profile as it opens slots: its key, those it had before, and whom it writes for.

use std::fmt;
use std::sync::Arc;

use zeroize::Zeroizing;

use super::{CryptoError, Fingerprint, Key, PublicKey};

/// What opens slots.
#[derive(Clone)]
pub enum ProfileKey {
    /// Of a key file or a credential.
    Key(Arc<Key>),
    Passphrase(Arc<Zeroizing<String>>),
    /// A key that does not leave its token.
    Token(Arc<dyn Token>),
}

/// A key in a token, which wraps and unwraps by itself.
pub trait Token: Send + Sync {
    /// Tells keys apart without telling anything about them.
    fn fingerprint(&self) -> Result<Fingerprint, CryptoError>;
    fn wrap(&self, keys: &[u8], associated: &[u8]) -> Result<Vec<u8>, CryptoError>;
    fn unwrap(&self, wrapped: &[u8], associated: &[u8]) -> Result<Zeroizing<Vec<u8>>, CryptoError>;
}

/// The keys of a profile, loaded.
#[derive(Clone)]
pub struct Profile {
    pub name: String,
    /// New slots are made for it.
    pub key: ProfileKey,
    /// Tried when the key opens nothing.
    pub retired: Vec<ProfileKey>,
    /// Whom data packs are sealed to, if anybody.
    pub recipient: Option<PublicKey>,
}

impl Profile {
    /// A profile of one key.
    pub fn of(name: &str, key: ProfileKey) -> Self {
        Self { name: name.to_owned(), key, retired: Vec::new(), recipient: None }
    }

    /// All keys, the newest first.
    pub fn keys(&self) -> impl Iterator<Item = &ProfileKey> {
        std::iter::once(&self.key).chain(&self.retired)
    }
}

impl ProfileKey {
    /// None for a passphrase: whatever told one from another would help to guess it.
    pub fn fingerprint(&self) -> Result<Option<Fingerprint>, CryptoError> {
        match self {
            ProfileKey::Key(key) => Ok(Some(key.fingerprint())),
            ProfileKey::Passphrase(_) => Ok(None),
            ProfileKey::Token(token) => token.fingerprint().map(Some),
        }
    }
}

/// Never the key.
impl fmt::Debug for ProfileKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ProfileKey::Key(_) => "a key",
            ProfileKey::Passphrase(_) => "a passphrase",
            ProfileKey::Token(_) => "a token's key",
        })
    }
}
