//! Encryption profiles, their keys read where the configuration says they are, when they are needed.

use std::path::Path;
use std::sync::Arc;

use zeroize::Zeroizing;

use crate::config::{Config, Encryption, KeySource, Problem, SecretSource, Severity, TokenSource};
use crate::crypto::token::TokenKey;
use crate::crypto::{Profile, ProfileKey, key_file};
use crate::secret;

/// No passphrase is shorter, in characters: whoever has the repository may guess for years.
const SHORTEST_PASSPHRASE: usize = 12;

/// A profile with its keys; the error names the place of the one that cannot be had, and the configuration's key for it.
pub fn load(profile: &Encryption) -> Result<Profile, (&'static str, String)> {
    let key = match &profile.key {
        KeySource::File(path) => key_file::load(path).map(file).map_err(|e| ("key_file", e.to_string()))?,
        KeySource::Credential(name) => credential(name).map_err(|text| ("credential", text))?,
        KeySource::Passphrase(source) => passphrase(secret::read(source)).map_err(|text| ("passphrase", text))?,
        KeySource::Token(source) => token(source).map_err(|text| ("pkcs11", text))?,
    };
    let retired = profile.retired.iter().map(|path| key_file::load(path).map(file).map_err(|e| ("retired", e.to_string())));
    let recipient = profile.public_key.as_deref().map(key_file::load_public).transpose().map_err(|e| ("public_key", e.to_string()))?;
    Ok(Profile { name: profile.name.clone(), key, retired: retired.collect::<Result<_, _>>()?, recipient })
}

/// The fingerprint of a profile's key, where that is quick to tell and known at all.
pub fn fingerprint(profile: &Encryption) -> Option<String> {
    let key = match &profile.key {
        KeySource::File(path) => key_file::load(path).map(file).ok()?,
        KeySource::Credential(name) => credential(name).ok()?,
        _ => return None,
    };
    key.fingerprint().ok().flatten().map(|f| f.to_string())
}

/// What is wrong with the keys of the profiles, as far as this process can tell: the check of `systemctl reload` has no credentials, the daemon that it
/// speaks for has, and refuses a configuration that wants others.
pub fn check(config: &Config) -> Vec<Problem> {
    let wrong =
        |p: &Encryption| load(p).err().map(|(key, text)| Problem::of_key(Severity::Error, format!("encryption.{}.{key}", p.name), text));
    let beside = secret::is_beside_service();
    config.encryption.values().filter(|p| !(beside && takes_credential(p))).filter_map(wrong).collect()
}

fn takes_credential(profile: &Encryption) -> bool {
    match &profile.key {
        KeySource::Credential(_) | KeySource::Passphrase(SecretSource::Credential(_)) => true,
        KeySource::Token(source) => matches!(source.pin, Some(SecretSource::Credential(_))),
        KeySource::File(_) | KeySource::Passphrase(_) => false,
    }
}

fn file(key: key_file::Key) -> ProfileKey {
    ProfileKey::Key(Arc::new(key))
}

fn credential(name: &str) -> Result<ProfileKey, String> {
    let text = Zeroizing::new(secret::read(&SecretSource::Credential(name.to_owned()))?);
    key_file::from_text(Path::new(&format!("credential {name}")), &text).map(file).map_err(|e| e.to_string())
}

fn passphrase(read: Result<String, String>) -> Result<ProfileKey, String> {
    let text = Zeroizing::new(read?);
    if text.chars().count() < SHORTEST_PASSPHRASE {
        return Err(format!(
            "the passphrase is shorter than {SHORTEST_PASSPHRASE} characters; whoever gets hold of the repository can guess it"
        ));
    }
    Ok(ProfileKey::Passphrase(Arc::new(text)))
}

/// The token itself is asked when something is opened, not before: it may be plugged in later.
fn token(source: &TokenSource) -> Result<ProfileKey, String> {
    if !source.module.is_file() {
        return Err(format!("there is no PKCS#11 module {}; install the software of the token", source.module.display()));
    }
    let pin = source.pin.as_ref().map(secret::read).transpose().map_err(|text| format!("its PIN: {text}"))?;
    let key = TokenKey::new(&source.module, &source.token, &source.key, pin.map(Zeroizing::new));
    Ok(ProfileKey::Token(Arc::new(key)))
}
