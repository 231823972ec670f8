//! The envelope that a configuration travels in: JSON with what it is, who made it and when, and the items; compressed and sealed as archives are.
//!
//! In: an envelope, or bytes from anybody's hands, of which nothing is believed before it is checked. `docs/format.md` is its byte-level description.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};

use jiff::Timestamp;
use keepd_protocol::configuration::ConfigFileInfo;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use zeroize::Zeroizing;

use super::listing::Count;
use super::packing::{self, Packing};
use super::seal::{self, Keys, Sealer};
use super::unpack::Unpacked;
use super::{PortableError, Result};
use crate::config::{ItemKind, is_name};
use crate::crypto::{Profile, random};

/// The version that is written. Older ones are migrated while they are read, newer ones refused.
pub const VERSION: u32 = 1;

/// A configuration, or a part of it, as it is exchanged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    /// Of this format.
    pub format_version: u32,
    /// That wrote it.
    pub keepd_version: String,
    /// `all`, or the kinds that it was restricted to, with commas.
    pub export_type: String,
    pub exported_at: Timestamp,
    /// The machine's name.
    pub instance: String,
    pub item_count: u64,
    /// Whether the secrets are in it; else their values are empty.
    pub includes_secrets: bool,
    /// In the order of their names.
    pub items: Vec<Item>,
}

/// One table of the configuration, or the schedule state of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Item {
    /// A word of [`crate::config::ItemKind`].
    pub r#type: String,
    pub name: String,
    /// The table as it stands in the configuration, a date as its text.
    pub value: Value,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<Secret>,
}

/// What a table only names: a secret, or a file that belongs to a key.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Secret {
    /// Where the table names it: `secret_access_key`, `source[0].postgres.password`, `key_file`, `retired[1]`.
    pub at: String,
    /// `secret`, `key-file` (a key of `keepd key generate`) or `public-key` (no secret: always in it).
    pub kind: SecretKind,
    /// Its text; empty where it is not included.
    pub value: Zeroizing<String>,
}

/// Without its text.
impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secret").field("at", &self.at).field("kind", &self.kind).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SecretKind {
    Secret,
    KeyFile,
    PublicKey,
}

/// Of the JSON, and of the file that it comes in, in bytes.
pub const MAX_BYTES: u64 = 64 << 20;
const MAX_ITEMS: usize = 10_000;
/// Values of all items together: each takes far more memory than its few bytes of JSON.
const MAX_VALUES: usize = 2_000_000;
const MAX_SECRETS: usize = 1000;
/// Of a secret, in bytes.
pub const MAX_SECRET: usize = 64 << 10;
/// Of the texts about it, in bytes.
const MAX_TEXT: usize = 1024;
/// Of a key of a table, in bytes: places are told as all the keys that lead to them.
const MAX_KEY: usize = 256;

/// An envelope that was read.
#[derive(Debug, Clone, PartialEq)]
pub struct Opened {
    pub envelope: Envelope,
    pub sealed: bool,
    /// Where it is sealed: `the key 0123456789abcdef (key-file) of encryption profile 'main'`.
    pub opened_with: Option<String>,
}

impl Item {
    pub fn kind(&self) -> Option<ItemKind> {
        // Not from_word: that takes the plural, too.
        ItemKind::ALL.into_iter().find(|(_, word)| *word == self.r#type).map(|(kind, _)| kind)
    }
}

impl Envelope {
    /// What it says of itself, and how it was found.
    pub fn info(&self, sealed: bool, opened_with: Option<String>) -> ConfigFileInfo {
        ConfigFileInfo {
            format_version: self.format_version,
            keepd_version: self.keepd_version.clone(),
            export_type: self.export_type.clone(),
            exported_at: self.exported_at.to_string(),
            instance: self.instance.clone(),
            item_count: self.item_count,
            includes_secrets: self.includes_secrets,
            sealed,
            opened_with,
        }
    }

    /// Whether it has the text of a secret.
    pub fn has_secrets(&self) -> bool {
        self.items.iter().flat_map(|item| &item.secrets).any(|s| s.kind != SecretKind::PublicKey && !s.value.is_empty())
    }
}

/// Writes it out; for people to read where it is neither compressed nor sealed. Secrets do not go out unsealed.
pub fn write<W: Write>(envelope: &Envelope, out: W, packing: Packing, seal: Option<&Profile>) -> Result<W> {
    if seal.is_none() && envelope.has_secrets() {
        return Err(PortableError::NotOpen("a configuration with its secrets is written sealed only; name an encryption profile".into()));
    }
    check(envelope)?;
    // As large as it gets, so that no copy of a secret is left behind by its growth.
    let mut counted = Count(0);
    to_json(envelope, &mut counted, packing, seal)?;
    if counted.0 > MAX_BYTES {
        return Err(too_long());
    }
    let mut json = Zeroizing::new(Vec::with_capacity(counted.0 as usize));
    to_json(envelope, &mut *json, packing, seal)?;
    match seal {
        None => pack(out, packing, &json),
        Some(profile) => {
            let name: [u8; 16] = random().map_err(PortableError::Key)?;
            let sealer = pack(Sealer::create(out, &name, profile)?, packing, &json)?;
            let mut out = sealer.finish().map_err(PortableError::io)?;
            out.flush().map_err(PortableError::Io)?;
            Ok(out)
        }
    }
}

fn to_json(envelope: &Envelope, out: impl Write, packing: Packing, seal: Option<&Profile>) -> Result<()> {
    let written = match seal.is_none() && packing == Packing::None {
        true => serde_json::to_writer_pretty(out, envelope),
        false => serde_json::to_writer(out, envelope),
    };
    written.map_err(|e| PortableError::Io(io::Error::from(e)))
}

fn pack<W: Write>(mut out: W, packing: Packing, json: &[u8]) -> Result<W> {
    let mut zstd = None;
    for block in json.chunks(packing::BLOCK_BYTES) {
        let packed = packing::pack_block(packing, &mut zstd, block).map(Zeroizing::new).map_err(PortableError::Io)?;
        out.write_all(&packed).map_err(PortableError::io)?;
    }
    out.flush().map_err(PortableError::Io)?;
    Ok(out)
}

/// Reads one to its end and checks all that can be checked without knowing where it goes. Finds out by itself whether it is sealed and how it is compressed; the keys do not
/// matter to one that is not sealed.
pub fn read(input: impl Read, keys: &Keys) -> Result<Opened> {
    let mut bytes = Vec::new();
    input.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(PortableError::Io)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(too_long());
    }
    let sealed = seal::is_sealed(&bytes);
    let keys = if sealed { keys.clone() } else { Keys::default() };
    let cancel = keys.cancel.clone();
    let mut unpacked = Unpacked::start(io::Cursor::new(bytes), keys, None, cancel).map_err(of_configuration)?;
    let json = read_json(&mut unpacked).map_err(of_configuration)?;
    let envelope = parse(&json)?;
    check(&envelope)?;
    Ok(Opened { envelope, sealed, opened_with: unpacked.opened_with().map(str::to_owned) })
}

/// What is said of archives, of which this is none.
fn of_configuration(error: PortableError) -> PortableError {
    let text = |text: String| text.replace("sealed archive", "sealed configuration").replace("the archive", "the configuration");
    match error {
        PortableError::Damaged(e) => PortableError::Damaged(text(e)),
        PortableError::Hostile(e) => PortableError::Hostile(text(e)),
        PortableError::TooMuch(e) => PortableError::TooMuch(text(e)),
        PortableError::NotOpen(e) => PortableError::NotOpen(text(e)),
        PortableError::Version(e) => PortableError::Version(text(e)),
        other => other,
    }
}

/// All of it: what is cut off is noticed at its end alone.
fn read_json(from: &mut Unpacked) -> Result<Zeroizing<Vec<u8>>> {
    let mut json = Zeroizing::new(Vec::new());
    let mut block = Zeroizing::new(vec![0; 64 << 10]);
    loop {
        let n = from.read(&mut block)?;
        if n == 0 {
            return Ok(json);
        }
        let come = block.get(..n).unwrap_or_default();
        if (json.len() + n) as u64 > MAX_BYTES {
            return Err(too_long());
        }
        if json.capacity() - json.len() < n {
            let mut larger = Zeroizing::new(Vec::with_capacity((2 * json.capacity()).max(1 << 20)));
            larger.extend_from_slice(&json);
            json = larger;
        }
        json.extend_from_slice(come);
    }
}

fn too_long() -> PortableError {
    PortableError::TooMuch(format!("it has more than {} MiB, which no configuration has", MAX_BYTES >> 20))
}

fn parse(json: &[u8]) -> Result<Envelope> {
    #[derive(Deserialize)]
    struct Probe {
        format_version: Option<u64>,
    }
    if json.iter().filter(|b| matches!(b, b',' | b'[' | b'{')).count() > MAX_VALUES {
        return Err(PortableError::TooMuch(format!("it has more than {MAX_VALUES} values, which no configuration has")));
    }
    let not_one =
        |e: serde_json::Error| PortableError::Version(format!("it is no configuration that keepd exported: {}", without_values(&e)));
    if json.iter().find(|b| !b.is_ascii_whitespace()).is_none_or(|b| *b != b'{') {
        return Err(PortableError::Version("it is no configuration that keepd exported: it does not begin as one".into()));
    }
    let probe: Probe = serde_json::from_slice(json).map_err(not_one)?;
    let Some(version) = probe.format_version else {
        return Err(PortableError::Version("it is no configuration that keepd exported: it does not say its 'format_version'".into()));
    };
    match u32::try_from(version) {
        Ok(VERSION) => serde_json::from_slice(json).map_err(not_one),
        Ok(older) if older < VERSION => {
            let value = serde_json::from_slice(json).map_err(not_one)?;
            serde_json::from_value(migrate(older, value)?).map_err(not_one)
        }
        _ => Err(PortableError::Version(format!(
            "the configuration is of format {version}, this version of keepd ({}) knows {VERSION}; use a newer keepd",
            env!("CARGO_PKG_VERSION")
        ))),
    }
}

/// From an older format to [`VERSION`]: each version that there was gets a step here, which changes the JSON into that of the next. There was none before 1.
fn migrate(version: u32, _: Value) -> Result<Value> {
    Err(PortableError::Version(format!("the configuration is of format {version}, which no keepd ever wrote; formats begin with 1")))
}

/// Where and what is wrong, without what stands there: it may be a secret.
fn without_values(error: &serde_json::Error) -> String {
    use serde_json::error::Category;
    let place = format!("line {}, column {}", error.line(), error.column());
    match error.classify() {
        Category::Data => {
            let text = error.to_string();
            let field = ["missing field", "unknown field", "duplicate field"].into_iter().find(|what| text.starts_with(what));
            match field.and_then(|what| Some((what, text.split('`').nth(1)?))) {
                Some((what, name)) => format!("{place}: {what} '{}'", name.escape_debug().take(80).collect::<String>()),
                None => format!("{place}: a value there is of another type than it must be"),
            }
        }
        Category::Eof => format!("{place}: it ends early"),
        Category::Syntax if error.to_string().starts_with("trailing") => format!("{place}: something follows its end"),
        Category::Syntax | Category::Io => format!("{place}: it is no JSON"),
    }
}

fn wrong(text: String) -> PortableError {
    PortableError::Damaged(format!("the configuration is not one that keepd exports: {text}"))
}

fn shown(text: &str) -> String {
    format!("'{}'", text.chars().take(80).collect::<String>().escape_debug())
}

/// What must hold of every envelope, read or written.
fn check(envelope: &Envelope) -> Result<()> {
    let texts = [("keepd_version", &envelope.keepd_version), ("export_type", &envelope.export_type), ("instance", &envelope.instance)];
    if let Some((what, _)) = texts.into_iter().find(|(_, text)| text.len() > MAX_TEXT || text.chars().any(char::is_control)) {
        return Err(wrong(format!("its {what} is longer than {MAX_TEXT} bytes, or has control characters")));
    }
    if envelope.items.len() > MAX_ITEMS {
        return Err(PortableError::TooMuch(format!("it has more than {MAX_ITEMS} items, which no configuration has")));
    }
    if envelope.item_count != envelope.items.len() as u64 {
        return Err(wrong(format!("it has {} items, and says that it has {}", envelope.items.len(), envelope.item_count)));
    }
    let mut seen = BTreeSet::new();
    for item in &envelope.items {
        let Some(kind) = item.kind() else {
            let known = ItemKind::ALL.map(|(_, word)| word).join(", ");
            return Err(wrong(format!("there is no type {} of items; there are: {known}", shown(&item.r#type))));
        };
        if !is_name(&item.name) {
            return Err(wrong(format!("{} is no name of a {}", shown(&item.name), kind.word())));
        }
        let name = format!("{}.{}", item.r#type, item.name);
        if !seen.insert((kind, item.name.as_str())) {
            return Err(wrong(format!("{name} is there twice")));
        }
        if !item.value.is_object() {
            return Err(wrong(format!("the value of {name} is no table")));
        }
        if let Some(key) = long_key(&item.value) {
            return Err(wrong(format!("{name} has the key {}, which is longer than {MAX_KEY} bytes", shown(key))));
        }
        check_secrets(envelope, item, &name)?;
    }
    Ok(())
}

fn long_key(value: &Value) -> Option<&str> {
    let mut open = vec![value];
    while let Some(value) = open.pop() {
        match value {
            Value::Object(table) => {
                if let Some(key) = table.keys().find(|key| key.len() > MAX_KEY) {
                    return Some(key);
                }
                open.extend(table.values());
            }
            Value::Array(list) => open.extend(list),
            _ => {}
        }
    }
    None
}

fn check_secrets(envelope: &Envelope, item: &Item, name: &str) -> Result<()> {
    if item.secrets.len() > MAX_SECRETS {
        return Err(PortableError::TooMuch(format!("{name} has more than {MAX_SECRETS} secrets, which no item has")));
    }
    let mut seen = BTreeSet::new();
    for secret in &item.secrets {
        let at = shown(&secret.at);
        if secret.at.is_empty() || secret.at.len() > MAX_TEXT || secret.at.chars().any(char::is_control) {
            return Err(wrong(format!("a secret of {name} stands at {at}, which is no place")));
        }
        if !seen.insert(secret.at.as_str()) {
            return Err(wrong(format!("the secret at {at} of {name} is there twice")));
        }
        if secret.value.len() > MAX_SECRET {
            return Err(PortableError::TooMuch(format!("the secret at {at} of {name} is longer than any secret")));
        }
        if !envelope.includes_secrets && secret.kind != SecretKind::PublicKey && !secret.value.is_empty() {
            return Err(wrong(format!("it says that it has no secrets, and {name} has one at {at}")));
        }
    }
    Ok(())
}
