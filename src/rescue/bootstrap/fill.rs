//! Secrets that the stored configuration has not, and the command line has: the kit's key, and what opens the destination.

use std::path::Path;

use serde_json::json;
use zeroize::Zeroizing;

use super::Given;
use crate::config::{Config, ItemKind, ItemName, OptionValue, SecretSource};
use crate::crypto::slot::{METHOD_KEY_FILE, METHOD_PASSPHRASE, Slot};
use crate::crypto::{ProfileKey, key_file};
use crate::meta::plan::SECRETS;
use crate::meta::secrets::{self, Form, Named};
use crate::portable::envelope::{Envelope, Item, SecretKind};
use crate::repository::{open, slots};
use crate::secret;
use crate::storage;

/// Slots of passphrases that are tried, each of which takes a second or more.
const MOST_TRIED: usize = 4;

/// Profiles whose key was given get it: those that the configuration, or the repository beside it, opened with.
pub fn from_keys(envelope: &mut Envelope, sealed_for: &([u8; 16], Vec<Slot>), given: &Given) {
    let lacks =
        |item: &Item| item.kind() == Some(ItemKind::Encryption) && item.secrets.iter().any(|s| is_main(&s.at) && s.value.is_empty());
    if !envelope.items.iter().any(lacks) {
        return;
    }
    let proven = proven(sealed_for, given);
    for item in envelope.items.iter_mut().filter(|item| item.kind() == Some(ItemKind::Encryption)) {
        for (_, key) in proven.iter().filter(|(profile, _)| *profile == item.name) {
            for secret in item.secrets.iter_mut().filter(|s| is_main(&s.at) && s.value.is_empty()) {
                match (secret.kind, key) {
                    (SecretKind::KeyFile, ProfileKey::Key(key)) => secret.value = key_file::text_of(key),
                    (SecretKind::Secret, ProfileKey::Passphrase(text)) => secret.value = (**text).clone(),
                    _ => {}
                }
            }
        }
    }
}

/// Where the key of a profile stands.
fn is_main(at: &str) -> bool {
    ["key_file", "credential", "passphrase"].contains(&at)
}

/// The given keys with the profiles whose slots they open.
fn proven(sealed_for: &([u8; 16], Vec<Slot>), given: &Given) -> Vec<(String, ProfileKey)> {
    let mut found = Vec::new();
    let (name, sealed) = sealed_for;
    let mut tried = 0;
    for slot in sealed {
        for key in &given.keys {
            let fits = match key {
                ProfileKey::Key(key) => slot.method == METHOD_KEY_FILE && slot.fingerprint == key.fingerprint().to_string(),
                ProfileKey::Passphrase(_) => slot.method == METHOD_PASSPHRASE && tried < MOST_TRIED,
                ProfileKey::Token(_) => false,
            };
            tried += usize::from(fits && slot.method == METHOD_PASSPHRASE);
            if fits && slot.unwrap(name, Some(key)).is_ok() {
                found.push((slot.profile.clone(), key.clone()));
            }
        }
    }
    // What the repository cannot tell is asked of whoever has the keys.
    let keys: Vec<Option<&ProfileKey>> = given.keys.iter().map(Some).collect();
    let id = open::identify(&given.storage, None).ok().flatten();
    let listed = id.and_then(|id| slots::list(&given.storage, &id, &keys).ok()).unwrap_or_default();
    for slot in listed {
        if let slots::Opens::With(n) = slot.opens
            && let Some(key) = given.keys.get(n)
        {
            found.push((slot.profile, key.clone()));
        }
    }
    found
}

/// The destination of that place gets the secrets that were given for it.
pub fn from_destination(envelope: &mut Envelope, config: &Config, given: &Given) {
    let place = storage::location(&given.destination);
    let same =
        |name: &str| config.destinations.get(name).is_some_and(|d| d.service == given.destination.service && storage::location(d) == place);
    for item in envelope.items.iter_mut().filter(|item| item.kind() == Some(ItemKind::Destination) && same(&item.name)) {
        for secret in item.secrets.iter_mut().filter(|s| s.value.is_empty()) {
            // Of a plugin they stand in a table of their own; what a name in quotes is called is not looked for.
            let key = secret.at.strip_prefix("options.").unwrap_or(&secret.at);
            let text = match given.destination.options.get(key) {
                Some(OptionValue::Secret(source)) => secret::read(source),
                // A file that ssh is told to use.
                Some(OptionValue::Plain(path)) if Path::new(path).is_absolute() => secret::read_whole(Path::new(path)),
                _ => continue,
            };
            secret.value = text.map(Zeroizing::new).unwrap_or_default();
        }
    }
    let directory = config.files.first().and_then(|main| main.parent()).map(Path::to_owned).unwrap_or_default();
    let_go_of_variables(envelope, &directory);
}

/// Variables are this shell's: what is known of them goes into files, where the service finds it, too.
fn let_go_of_variables(envelope: &mut Envelope, directory: &Path) {
    for item in &mut envelope.items {
        let Some(kind) = item.kind() else { continue };
        let name = ItemName::new(kind, item.name.as_str());
        for named in secrets::of(&name, &item.value, directory) {
            let is_known = item.secrets.iter().any(|s| s.at == named.at && !s.value.is_empty());
            if is_known && is_variable(&named) {
                let at: String =
                    named.at.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '_' | '-') { c } else { '.' }).collect();
                // What cannot be replaced stays as it is, and is told as missing.
                let _ = secrets::replace(&mut item.value, &named.at, json!({ "file": format!("{SECRETS}/{name}.{at}") }));
            }
        }
    }
}

fn is_variable(named: &Named) -> bool {
    named.form == Form::Table && matches!(named.source, SecretSource::Environment(_))
}

/// Variables that are set here, and that keepd's service needs as well.
pub fn variables(envelope: &Envelope, directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for item in &envelope.items {
        let Some(kind) = item.kind() else { continue };
        let name = ItemName::new(kind, item.name.as_str());
        for named in secrets::of(&name, &item.value, directory) {
            if let SecretSource::Environment(variable) = &named.source
                && secrets::read(&named).is_ok()
            {
                found.push(format!("{name} {}: the variable {variable} is set here; set it in keepd's environment, too", named.at));
            }
        }
    }
    found
}
