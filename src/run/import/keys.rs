//! The keys that an archive may open with: those that were uploaded, then those of the configured profiles, the ones that cost least to try first.

use std::sync::Arc;

use super::desk::Taken;
use crate::config::{Config, KeySource};
use crate::crypto::{Key, PrivateKey, ProfileKey};
use crate::profile;

/// What is tried.
pub struct Keys {
    pub keys: Vec<ProfileKey>,
    pub private_keys: Vec<Arc<PrivateKey>>,
    /// Of profiles whose keys cannot be had: why.
    pub problems: Vec<String>,
}

impl Keys {
    /// Takes the uploaded ones out of `taken`. No token is asked for anything yet.
    pub fn gather(taken: &mut Taken, config: &Config) -> Self {
        Self::of(std::mem::take(&mut taken.keys), std::mem::take(&mut taken.private_keys), config)
    }

    /// Those that were given, before those of the configured profiles.
    pub fn of(given: Vec<Key>, private: Vec<PrivateKey>, config: &Config) -> Self {
        let mut gathered = Self {
            keys: given.into_iter().map(|key| ProfileKey::Key(Arc::new(key))).collect(),
            private_keys: private.into_iter().map(Arc::new).collect(),
            problems: Vec::new(),
        };
        let mut profiles: Vec<_> = config.encryption.values().collect();
        profiles.sort_by_key(|p| match p.key {
            KeySource::File(_) => 0,
            KeySource::Credential(_) => 1,
            KeySource::Passphrase(_) => 2,
            KeySource::Token(_) => 3,
        });
        for found in profiles {
            match profile::load(found) {
                Ok(loaded) => gathered.keys.extend(loaded.keys().cloned()),
                Err((_, e)) => gathered.problems.push(format!("encryption profile {}: {e}", found.name)),
            }
        }
        gathered
    }
}
