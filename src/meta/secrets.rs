//! Which places of a table name secrets, and what they are.
//!
//! Places are known one by one, never found by how they look: `{ file = "x" }` in a drill is a file of a backup. Values are read where and as the daemon reads them
//! when it needs them.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::config::{ItemKind, ItemName, SecretSource, is_common_key};
use crate::crypto::key_file;
use crate::portable::envelope::{MAX_SECRET, SecretKind};
use crate::secret;

/// Options of a service that are paths of a file with a secret in it, not the secret: a private key of ssh, an account of Google's.
const PATHS: [(&str, &str); 2] = [("sftp", "key"), ("gcs", "credential_path")];

/// How a table names a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `{ file = … }`, `{ credential = … }` or `{ env = … }`.
    Table,
    /// The path of a file, which may be relative to the configuration's directory.
    Path,
    /// The path of a file that somebody else than keepd opens: absolute. What is in it is taken as it is.
    AbsolutePath,
    /// The name of a credential; another way to give the same has another key, too.
    Credential,
}

/// A secret that a table names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// `secret_access_key`, `source[0].postgres.password`, `retired[1]`; a key that is no bare one in quotes.
    pub at: String,
    pub kind: SecretKind,
    pub source: SecretSource,
    pub form: Form,
}

impl Named {
    /// `file /etc/keepd/s3`, `credential s3-secret`, `variable S3_SECRET`.
    pub fn from(&self) -> String {
        match &self.source {
            SecretSource::File(path) => format!("file {}", path.display()),
            SecretSource::Credential(name) => format!("credential {name}"),
            SecretSource::Environment(name) => format!("variable {name}"),
        }
    }

    /// What is to stand there for it to be read from this file of the configuration's directory; for [`replace`].
    pub fn reference_to(&self, relative: &str, config_dir: &Path) -> Value {
        match self.form {
            Form::Table => json!({ "file": relative }),
            Form::Path | Form::Credential => json!(relative),
            Form::AbsolutePath => json!(config_dir.join(relative).to_string_lossy()),
        }
    }
}

/// The secrets that a table names, in a fixed order. What is not written as the configuration wants it is none.
pub fn of(item: &ItemName, value: &Value, config_dir: &Path) -> Vec<Named> {
    let Some(table) = value.as_object() else { return Vec::new() };
    let at = |at: String, kind, form, source: Option<SecretSource>| source.map(|source| Named { at, kind, form, source });
    let path = |value: Option<&Value>| value.and_then(Value::as_str).map(|text| SecretSource::File(beside(text, config_dir)));
    let secret = |place: String, value: Option<&Value>| at(place, SecretKind::Secret, Form::Table, source_of(value, config_dir));
    match item.kind {
        ItemKind::Encryption => {
            let credential = table.get("credential").and_then(Value::as_str).map(|name| SecretSource::Credential(name.to_owned()));
            let retired = table.get("retired").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            let pin = table.get("pkcs11").and_then(|token| token.get("pin"));
            [
                at("credential".into(), SecretKind::KeyFile, Form::Credential, credential),
                at("key_file".into(), SecretKind::KeyFile, Form::Path, path(table.get("key_file"))),
                secret("passphrase".into(), table.get("passphrase")),
                secret("pkcs11.pin".into(), pin),
                at("public_key".into(), SecretKind::PublicKey, Form::Path, path(table.get("public_key"))),
            ]
            .into_iter()
            .chain(
                retired.iter().enumerate().map(|(n, item)| at(format!("retired[{n}]"), SecretKind::KeyFile, Form::Path, path(Some(item)))),
            )
            .flatten()
            .collect()
        }
        ItemKind::Destination => {
            let service = table.get("service").and_then(Value::as_str).unwrap_or_default();
            if service == "exec" {
                let options = table.get("options").and_then(Value::as_object).into_iter().flatten();
                return options.filter_map(|(key, value)| secret(format!("options.{}", quoted(key)), Some(value))).collect();
            }
            let options = table.iter().filter(|(key, _)| !is_common_key(key));
            let found = options.filter_map(|(key, value)| match value.as_str() {
                Some(text) if PATHS.contains(&(service, key)) => {
                    let source = SecretSource::File(PathBuf::from(text));
                    at(quoted(key), SecretKind::Secret, Form::AbsolutePath, Some(source))
                }
                _ => secret(quoted(key), Some(value)),
            });
            found.collect()
        }
        ItemKind::Job => {
            let sources = table.get("source").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            let servers = sources.iter().enumerate().flat_map(|(n, source)| ["postgres", "mysql"].map(|kind| (n, kind, source.get(kind))));
            let passwords = servers.filter_map(|(n, kind, server)| {
                let place = format!("source[{n}].{kind}.password");
                secret(place, server?.get("password"))
            });
            passwords.collect()
        }
        ItemKind::Settings | ItemKind::Access | ItemKind::Notification | ItemKind::Schedule => Vec::new(),
    }
}

/// Whether an option of a service is the path of a file with a secret in it.
pub fn is_path(service: &str, option: &str) -> bool {
    PATHS.contains(&(service, option))
}

/// Whether a text holds a key of keepd's, which is nobody's password.
pub fn is_key(text: &str) -> bool {
    text.lines().any(|line| ["keepd-key-", "keepd-private-"].iter().any(|word| line.trim_start().starts_with(word)))
}

/// A text that came from elsewhere as a new file has it: of a key the key alone, whatever stood beside it.
pub fn normal(kind: SecretKind, text: &str) -> Zeroizing<String> {
    let path = Path::new("(in the export)");
    match kind {
        SecretKind::Secret => Zeroizing::new(text.to_owned()),
        SecretKind::KeyFile => key_file::from_text(path, text).map(|key| key_file::text_of(&key)).unwrap_or_default(),
        SecretKind::PublicKey => key_file::public_from_text(path, text).map(|key| key_file::text_of_public(&key)).unwrap_or_default(),
    }
}

/// What belongs to a profile and leaves its token never; None where it has no token.
pub fn kept_by_token(item: &ItemName, value: &Value) -> Option<String> {
    let token = value.get("pkcs11").filter(|_| item.kind == ItemKind::Encryption)?;
    let word = |key: &str| token.get(key).and_then(Value::as_str).unwrap_or_default();
    Some(format!("key '{}' of token '{}'", word("key"), word("token")))
}

/// `{ file = … }`, `{ credential = … }` or `{ env = … }`, and nothing else.
fn source_of(value: Option<&Value>, config_dir: &Path) -> Option<SecretSource> {
    let table = value?.as_object().filter(|table| table.len() == 1)?;
    let (way, text) = table.iter().next()?;
    let text = text.as_str()?;
    match way.as_str() {
        "file" => Some(SecretSource::File(beside(text, config_dir))),
        "credential" => Some(SecretSource::Credential(text.to_owned())),
        "env" => Some(SecretSource::Environment(text.to_owned())),
        _ => None,
    }
}

/// Relative paths are meant from the main file's directory.
fn beside(text: &str, config_dir: &Path) -> PathBuf {
    config_dir.join(text).components().collect()
}

/// A secret, as the daemon reads it. Of a key file the key alone, as a new key file has it, so that two of one key are the same text. The error says what cannot be read and why,
/// never a value.
pub fn read(named: &Named) -> Result<Zeroizing<String>, String> {
    let text = match (named.kind, &named.source) {
        (SecretKind::KeyFile, SecretSource::File(path)) => {
            key_file::load(path).map(|key| key_file::text_of(&key)).map_err(|e| e.to_string())?
        }
        (SecretKind::KeyFile, source) => {
            let text = Zeroizing::new(secret::read(source)?);
            let key = key_file::from_text(Path::new(&named.from()), &text).map_err(|e| e.to_string())?;
            key_file::text_of(&key)
        }
        (SecretKind::PublicKey, SecretSource::File(path)) => {
            key_file::load_public(path).map(|key| key_file::text_of_public(&key)).map_err(|e| e.to_string())?
        }
        (SecretKind::Secret, SecretSource::File(path)) if named.form == Form::AbsolutePath => {
            secret::read_whole(path).map(Zeroizing::new)?
        }
        (_, source) => Zeroizing::new(secret::read(source)?),
    };
    match text.len() > MAX_SECRET {
        true => Err(format!("{} is longer than any secret", named.from())),
        false => Ok(text),
    }
}

/// Whether a text that came from elsewhere is what stands at such a place; the error says what is wrong, never a value.
pub fn check(kind: SecretKind, text: &str) -> Result<(), String> {
    let path = Path::new("(in the export)");
    match kind {
        SecretKind::Secret => Ok(()),
        SecretKind::KeyFile => key_file::from_text(path, text).map(drop).map_err(|e| e.to_string()),
        SecretKind::PublicKey => key_file::public_from_text(path, text).map(drop).map_err(|e| e.to_string()),
    }
}

/// Puts another reference in the place of one. A credential that held a profile's key becomes a `key_file`.
pub fn replace(value: &mut Value, at: &str, reference: Value) -> Result<(), String> {
    let no_place = || format!("there is no '{at}' to be changed");
    let steps = steps(at).ok_or_else(no_place)?;
    if at == "credential"
        && reference.is_string()
        && let Some(table) = value.as_object_mut()
        && table.get("credential").is_some_and(Value::is_string)
    {
        table.remove("credential");
        table.insert("key_file".to_owned(), reference);
        return Ok(());
    }
    let mut place = value;
    for step in &steps {
        place = match step {
            Step::Key(key) => place.get_mut(key.as_str()),
            Step::Index(n) => place.get_mut(*n),
        }
        .ok_or_else(no_place)?;
    }
    *place = reference;
    Ok(())
}

enum Step {
    Key(String),
    Index(usize),
}

/// A key as [`Named::at`] writes it.
fn quoted(key: &str) -> String {
    let bare = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if bare { key.to_owned() } else { Value::from(key).to_string() }
}

/// None: no place is written so.
fn steps(at: &str) -> Option<Vec<Step>> {
    let mut steps = Vec::new();
    let mut rest = at;
    while !rest.is_empty() {
        if let Some(index) = rest.strip_prefix('[') {
            let (number, after) = index.split_once(']')?;
            steps.push(Step::Index(number.parse().ok()?));
            rest = after;
        } else {
            rest = if steps.is_empty() { rest } else { rest.strip_prefix('.')? };
            let (key, after) = if rest.starts_with('"') {
                let mut values = serde_json::Deserializer::from_str(rest).into_iter::<String>();
                let key = values.next()?.ok()?;
                (key, rest.get(values.byte_offset()..)?)
            } else {
                let (key, after) = rest.split_at(rest.find(['.', '[']).unwrap_or(rest.len()));
                (key.to_owned(), after)
            };
            if key.is_empty() && !rest.starts_with('"') {
                return None;
            }
            steps.push(Step::Key(key));
            rest = after;
        }
    }
    (!steps.is_empty()).then_some(steps)
}
