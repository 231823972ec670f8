//! The keys and secrets of an import: which of them are here already, which are written and where, and which differ from what is here.
//!
//! No secret file is ever changed: what differs gets a file of its own, and the item names that.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;

use keepd_protocol::configuration::{Allow, ItemAction};
use keepd_protocol::model::escape;
use serde_json::Value;
use zeroize::Zeroizing;

use super::needs::{hidden, is_elsewhere, place_of_server};
use super::{Here, Options};
use crate::config::{ItemKind, ItemName, SecretSource};
use crate::meta::secrets::{self, Form, Named};
use crate::portable::envelope::{Item, SecretKind};

/// Where secrets go whose own place cannot be written to.
pub const DIRECTORY: &str = "secrets";

/// Tells texts apart without holding one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(blake3::Hash);

impl Digest {
    pub fn of(text: &str) -> Self {
        Self(blake3::hash(text.as_bytes()))
    }
}

/// A secret of an item here.
#[derive(Debug, Clone)]
pub struct Held {
    pub named: Named,
    /// None: it cannot be read.
    pub text: Option<Digest>,
}

/// A secret's place in an item of the file.
#[derive(Debug, Clone)]
pub struct Offered {
    pub named: Named,
    /// What the place names gives here; None: nothing that can be read.
    pub here: Option<Digest>,
    /// Whether that is a key of keepd's.
    pub is_key: bool,
    /// Where a file can be made that gives it, below the configuration's directory: nothing is there.
    pub place: Option<String>,
}

/// A secret file that an import makes.
#[derive(Clone)]
pub struct NewFile {
    /// Below the configuration's directory.
    pub name: String,
    pub text: Zeroizing<String>,
}

/// Without its text.
impl fmt::Debug for NewFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewFile").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What the file has for a place, unless it is empty.
fn text<'i>(item: &'i Item, at: &str) -> Option<&'i str> {
    let found = item.secrets.iter().find(|secret| secret.at == at)?;
    Some(found.value.as_str()).filter(|text| !text.is_empty())
}

/// What is wrong with the secrets of an item of the file.
pub fn wrong(item: &Item, offered: &[Offered]) -> Vec<String> {
    let check = |secret: &crate::portable::envelope::Secret| {
        let at: String = escape(&secret.at).chars().take(120).collect();
        match offered.iter().find(|o| o.named.at == secret.at) {
            None => Some(format!("the file has a secret at '{at}', where its table names none")),
            Some(o) if o.named.kind != secret.kind => Some(format!("{at} is of another kind in the file than in its table")),
            Some(_) if secret.value.is_empty() => None,
            Some(_) => secrets::check(secret.kind, &secret.value).err().map(|why| format!("{at}: {why}")),
        }
    };
    item.secrets.iter().filter_map(check).collect()
}

/// The places whose secret is another one in the file than here.
pub fn differing(item: &Item, offered: &[Offered]) -> Vec<String> {
    let differs = |o: &&Offered| o.here.zip(text(item, &o.named.at)).is_some_and(|(here, text)| here != Digest::of(text));
    offered.iter().filter(differs).map(|o| escape(&o.named.at)).collect()
}

/// Whether an item that says the same here lacks a secret that the file has, and that only another reference could give.
pub fn must_be_named_anew(item: &Item, offered: &[Offered], keys_too: bool) -> bool {
    let lacks = |o: &Offered| o.here.is_none() && o.place.is_none() && text(item, &o.named.at).is_some();
    offered.iter().any(|o| lacks(o) && (keys_too || !is_of_profile(item.kind(), &o.named)))
}

/// Whether a secret is, or makes, the key of a profile.
fn is_of_profile(kind: Option<ItemKind>, named: &Named) -> bool {
    kind == Some(ItemKind::Encryption) && named.at != "pkcs11.pin"
}

/// Whether the text of a secret can have a program started or another machine asked: an account of Google's that says where its token comes from.
fn starts_something(name: &ItemName, at: &str, text: &str) -> bool {
    if name.kind != ItemKind::Destination || !at.contains("credential") {
        return false;
    }
    let decoded = data_encoding::BASE64.decode(text.trim().as_bytes()).map(Zeroizing::new);
    let bytes = decoded.as_ref().map_or(text.as_bytes(), |bytes| bytes.as_slice());
    let Ok(account) = serde_json::from_slice::<Value>(bytes) else { return false };
    let is_known = account.get("type").and_then(Value::as_str).is_some_and(|t| ["service_account", "authorized_user"].contains(&t));
    account.is_object() && (account.get("credential_source").is_some() || !is_known)
}

/// Where somebody must put it.
fn advice(named: &Named) -> String {
    let what = match named.kind {
        SecretKind::KeyFile => "the key file",
        SecretKind::PublicKey => "the public key file",
        SecretKind::Secret => "it",
    };
    escape(&match &named.source {
        SecretSource::File(path) if named.kind == SecretKind::Secret => format!("put {what} into {}", path.display()),
        SecretSource::File(path) => format!("put {what} at {}", path.display()),
        SecretSource::Credential(name) => format!("give {what} to keepd's service as the credential {name}"),
        SecretSource::Environment(name) => format!("set the variable {name} in keepd's environment"),
    })
}

/// Which secret files are made, and what is missing, for all items together.
pub struct Settled<'a> {
    here: &'a Here,
    keys_may_change: bool,
    files: Vec<NewFile>,
    placed: BTreeMap<String, Digest>,
    missing: Vec<String>,
    problems: Vec<String>,
}

impl<'a> Settled<'a> {
    pub fn new(here: &'a Here, options: &Options) -> Self {
        Self {
            here,
            keys_may_change: options.allow.contains(&Allow::KeyChange),
            files: Vec::new(),
            placed: BTreeMap::new(),
            missing: Vec::new(),
            problems: Vec::new(),
        }
    }

    /// Of an item that is written as `to`: its value names then where each secret is.
    pub fn secrets(&mut self, to: &ItemName, item: &Item, offered: &[Offered], value: &mut Value, notes: &mut Vec<String>) {
        for o in offered {
            let at = escape(&o.named.at);
            let Some(text) = text(item, &o.named.at) else {
                match (&o.here, &o.named.source) {
                    (None, _) => self.missing.push(format!("{to} {at}: {}", advice(&o.named))),
                    (Some(_), SecretSource::File(path)) if !path.starts_with(&self.here.directory) => {
                        notes.push(format!("{at} is read from {}, which is on this machine already", escape(&path.to_string_lossy())));
                    }
                    _ => {}
                }
                continue;
            };
            if o.here == Some(Digest::of(text)) || self.put(o, text) {
                continue;
            }
            let Some(name) = self.fresh(to, &o.named.at) else {
                self.problems.push(format!("{to}: no name is free in {DIRECTORY} for {at}"));
                continue;
            };
            if let Err(why) = secrets::replace(value, &o.named.at, o.named.reference_to(&name, &self.here.directory)) {
                self.problems.push(format!("{to}: {}", escape(&why)));
                continue;
            }
            notes.push(format!("{at} is read from {name} instead of {}", escape(&o.named.from())));
            self.write(&name, &o.named, text);
        }
    }

    /// Of an item that is here already: only what it lacks.
    pub fn secrets_of_same(&mut self, name: &ItemName, item: &Item, offered: &[Offered], notes: &mut Vec<String>) {
        let hidden = hidden(name, &item.value);
        for o in offered.iter().filter(|o| o.here.is_none()) {
            let at = escape(&o.named.at);
            let leads_on = |text: &str| hidden.contains(&o.named.at.as_str()) || starts_something(name, &o.named.at, text);
            match text(item, &o.named.at) {
                // Whoever has the file would have this machine seal for a key of theirs, or lead it elsewhere.
                Some(text) if !self.keys_may_change && (is_of_profile(item.kind(), &o.named) || leads_on(text)) => {
                    notes.push(format!("{at} cannot be read here; the file has it, and --allow-key-change puts it there"));
                }
                Some(text) if self.put(o, text) => {
                    notes.push(format!("{at} was missing here, and is put where it belongs"));
                    continue;
                }
                _ => {}
            }
            self.missing.push(format!("{name} {at}: {}", advice(&o.named)));
        }
    }

    /// Puts it where its reference looks for it, if nothing is there and nothing else goes there.
    fn put(&mut self, o: &Offered, text: &str) -> bool {
        let Some(place) = o.place.as_ref().filter(|_| o.here.is_none()) else { return false };
        match self.placed.get(place) {
            Some(other) => *other == Digest::of(text),
            None => {
                self.write(place, &o.named, text);
                true
            }
        }
    }

    fn write(&mut self, name: &str, named: &Named, text: &str) {
        self.placed.insert(name.to_owned(), Digest::of(text));
        let normal = secrets::normal(named.kind, text);
        // As large as it gets, so that no copy is left behind by its growth.
        let mut whole = Zeroizing::new(String::with_capacity(normal.len() + 1));
        whole.push_str(&normal);
        if named.kind == SecretKind::Secret && named.form != Form::AbsolutePath {
            // What reads it takes one line feed off.
            whole.push('\n');
        }
        self.files.push(NewFile { name: name.to_owned(), text: whole });
    }

    /// `secrets/destination.offsite.secret_access_key`, with a number where that is taken.
    fn fresh(&self, to: &ItemName, at: &str) -> Option<String> {
        let plain: String = at.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '_' | '-') { c } else { '.' }).collect();
        let words: Vec<&str> = plain.split('.').filter(|word| !word.is_empty()).collect();
        let base: String = format!("{to}.{}", words.join(".")).chars().take(200).collect();
        let names = std::iter::once(base.clone()).chain((2..10_000).map(|n| format!("{base}-{n}")));
        names
            .filter(|name| !self.here.taken.contains(name))
            .map(|name| format!("{DIRECTORY}/{name}"))
            .find(|name| !self.placed.contains_key(name))
    }

    /// The files, what is missing, and what is wrong.
    pub fn finish(self) -> (Vec<NewFile>, Vec<String>, Vec<String>) {
        (self.files, self.missing, self.problems)
    }
}

/// The key that a profile opens its slots with.
const MAIN: [&str; 3] = ["key_file", "credential", "passphrase"];

/// The keys and passphrases of the profiles, which no other place gets.
pub struct Guarded<'a> {
    sources: BTreeSet<&'a SecretSource>,
    texts: HashSet<Digest>,
}

impl<'a> Guarded<'a> {
    pub fn of(here: &'a Here) -> Self {
        let held = here.secrets.iter().flat_map(|(name, held)| held.iter().map(|h| (name.kind, &h.named, h.text)));
        let offered = here.offered.iter().flat_map(|(name, offered)| offered.iter().map(|o| (name.kind, &o.named, o.here)));
        let is_key = |kind, named: &Named| is_of_profile(Some(kind), named) && named.kind != SecretKind::PublicKey;
        let (mut sources, mut texts) = (BTreeSet::new(), HashSet::new());
        for (_, named, text) in held.chain(offered).filter(|(kind, named, _)| is_key(*kind, named)) {
            sources.insert(&named.source);
            texts.extend(text);
        }
        Self { sources, texts }
    }

    /// What would leave this machine with a secret of an item that is written, whoever allows what. `name` is the item's in the file.
    pub fn refused(&self, here: &Here, name: &ItemName, item: &Item, value: &Value) -> Vec<String> {
        let offered = here.offered.get(name).map(Vec::as_slice).unwrap_or_default();
        let stays = Unchanged::of(here, name, value);
        let is_given_away = |o: &&Offered| {
            let (digest, is_key) = match text(item, &o.named.at) {
                Some(text) => (Some(Digest::of(text)), secrets::is_key(text)),
                None => (o.here, o.is_key),
            };
            let is_secret = o.named.kind == SecretKind::Secret && !is_of_profile(Some(name.kind), &o.named);
            is_secret
                && (is_key || self.sources.contains(&o.named.source) || digest.is_some_and(|d| self.texts.contains(&d)))
                && !stays.is(o)
        };
        let told = |o: &Offered| {
            let (at, from) = (escape(&o.named.at), escape(&o.named.from()));
            format!("{name} {at}: it would give away {from}, which is a key of this machine; let it name a secret of its own")
        };
        offered.iter().filter(is_given_away).map(told).collect()
    }
}

/// Which references of an item are what they are here, and sent where they are sent now.
struct Unchanged<'a> {
    held: &'a [Held],
    old: Option<&'a Value>,
    new: &'a Value,
    kind: ItemKind,
    is_elsewhere: bool,
}

impl<'a> Unchanged<'a> {
    fn of(here: &'a Here, name: &ItemName, new: &'a Value) -> Self {
        let old = here.items.get(name);
        let is_elsewhere = name.kind == ItemKind::Destination && old.is_none_or(|old| is_elsewhere(old, new));
        Self { held: here.secrets.get(name).map(Vec::as_slice).unwrap_or_default(), old, new, kind: name.kind, is_elsewhere }
    }

    /// Whether what is at a place is sent elsewhere than now.
    fn is_sent_elsewhere(&self, at: &str) -> bool {
        let Some(old) = self.old else { return true };
        match self.kind {
            ItemKind::Job => server_is_elsewhere(at, old, self.new),
            _ => self.is_elsewhere,
        }
    }

    fn is(&self, o: &Offered) -> bool {
        let is_here = self.held.iter().any(|h| h.named.at == o.named.at && h.named.source == o.named.source);
        is_here && !self.is_sent_elsewhere(&o.named.at)
    }
}

/// Which keys and secrets would be others than now, or would be told to others. `name` is the item's in the file.
pub fn needs(here: &Here, name: &ItemName, action: ItemAction, item: &Item, value: &Value) -> Vec<(Allow, String)> {
    let offered = here.offered.get(name).map(Vec::as_slice).unwrap_or_default();
    let mut found = Vec::new();
    if action == ItemAction::Add {
        for at in differing(item, offered) {
            found.push(format!("{at}: what it names holds another one here, which stays"));
        }
    }
    let unchanged = Unchanged::of(here, name, value);
    let is_ours = |o: &&Offered| o.named.kind == SecretKind::Secret && o.here.is_some() && text(item, &o.named.at).is_none();
    for o in offered.iter().filter(is_ours).filter(|o| !unchanged.is(o)) {
        let (at, from) = (escape(&o.named.at), escape(&o.named.from()));
        found.push(match name.kind {
            ItemKind::Encryption => format!("{at}: {from} of this machine would be used, which the file does not hold"),
            _ => format!("{at}: {from} of this machine would be told to another place than now"),
        });
    }
    if let Some(old) = here.items.get(name).filter(|_| matches!(action, ItemAction::Overwrite | ItemAction::Rename)) {
        let beside = Beside { held: unchanged.held, offered, item };
        if action == ItemAction::Overwrite {
            match name.kind {
                ItemKind::Encryption => beside.profile(old, value, &mut found),
                _ => beside.secrets(&mut found),
            }
        }
        beside.told_to_others(&unchanged, &mut found);
    }
    let starts = offered.iter().filter(|o| text(item, &o.named.at).is_some_and(|text| starts_something(name, &o.named.at, text)));
    let starts: Vec<_> =
        starts.map(|o| (Allow::Commands, format!("{}: it says where else its token comes from", escape(&o.named.at)))).collect();
    found.into_iter().map(|why| (Allow::KeyChange, why)).chain(starts).collect()
}

/// An item's secrets here and in the file.
struct Beside<'a> {
    held: &'a [Held],
    offered: &'a [Offered],
    item: &'a Item,
}

impl Beside<'_> {
    /// What a place would give.
    fn becomes(&self, o: &Offered) -> Option<Digest> {
        text(self.item, &o.named.at).map(Digest::of).or(o.here)
    }

    /// Whether it stays the same for sure.
    fn stays(&self, held: &Held, o: &Offered) -> bool {
        let same_text = held.text.is_some() && held.text == self.becomes(o);
        // What cannot be read, and is looked for where it was.
        same_text || (held.named.source == o.named.source && held.text == o.here && text(self.item, &o.named.at).is_none())
    }

    fn secrets(&self, found: &mut Vec<String>) {
        for held in self.held {
            let Some(o) = self.offered.iter().find(|o| o.named.at == held.named.at) else { continue };
            if !self.stays(held, o) {
                found.push(format!("{}: another one than now, or nobody knows", escape(&held.named.at)));
            }
        }
    }

    fn profile(&self, old: &Value, new: &Value, found: &mut Vec<String>) {
        let main = |at: &str| MAIN.contains(&at);
        let now = self.held.iter().find(|h| main(&h.named.at));
        let then = self.offered.iter().find(|o| main(&o.named.at));
        let token = |value: &Value| ["token", "key"].map(|key| value.get("pkcs11").and_then(|token| token.get(key)).cloned());
        let is_same = match (now, then) {
            (Some(now), Some(then)) => self.stays(now, then),
            (None, None) => token(old) == token(new),
            _ => false,
        };
        if !is_same {
            found.push("its key would be another one than now, or nobody knows".into());
        }
        let public = |at: &str| at == "public_key";
        match (self.held.iter().find(|h| public(&h.named.at)), self.offered.iter().find(|o| public(&o.named.at))) {
            (None, Some(_)) => found.push("public_key: what is stored from then on opens with its private key only".into()),
            (Some(now), Some(then)) if !self.stays(now, then) => found.push("public_key: another one than now, or nobody knows".into()),
            _ => {}
        }
        let is_kept =
            |held: &Held| self.offered.iter().any(|o| (o.named.at.starts_with("retired[") || main(&o.named.at)) && self.stays(held, o));
        for held in self.held.iter().filter(|h| h.named.at.starts_with("retired[") && !is_kept(h)) {
            found.push(format!("{}: {} is no longer tried", held.named.at, escape(&held.named.from())));
        }
        // Whoever chose it could have made up what it opens.
        let is_known = |o: &Offered| self.held.iter().any(|h| h.named.kind == SecretKind::KeyFile && self.stays(h, o));
        for o in self.offered.iter().filter(|o| o.named.at.starts_with("retired[") && !is_known(o)) {
            found.push(format!("{}: {} would be tried, which is no key of this profile here", o.named.at, escape(&o.named.from())));
        }
        let pin = |at: &str| at == "pkcs11.pin";
        if let (Some(now), Some(then)) = (self.held.iter().find(|h| pin(&h.named.at)), self.offered.iter().find(|o| pin(&o.named.at)))
            && !self.stays(now, then)
        {
            found.push("pkcs11.pin: another one than now, or nobody knows".into());
        }
    }

    /// A secret of this machine that the file holds, too, sent to another place than now.
    fn told_to_others(&self, unchanged: &Unchanged<'_>, found: &mut Vec<String>) {
        if self.item.kind() == Some(ItemKind::Encryption) {
            return;
        }
        let is_ours = |o: &&Offered| {
            let text = text(self.item, &o.named.at).map(Digest::of);
            text.is_some() && self.held.iter().any(|h| h.text == text)
        };
        for o in self.offered.iter().filter(is_ours).filter(|o| unchanged.is_sent_elsewhere(&o.named.at)) {
            found.push(format!("{}: this machine's would be told to another place than now", escape(&o.named.at)));
        }
    }
}

/// Whether the server of `source[0].postgres.password` is another one.
fn server_is_elsewhere(at: &str, old: &Value, new: &Value) -> bool {
    let place = at.strip_prefix("source[").and_then(|rest| rest.split_once(']')).and_then(|(n, rest)| {
        let kind = rest.strip_prefix('.')?.split('.').next()?;
        Some((n.parse::<usize>().ok()?, kind))
    });
    let Some((n, kind)) = place else { return true };
    let server = |value: &'_ Value| value.get("source").and_then(|list| list.get(n)).and_then(|source| source.get(kind)).cloned();
    match server(old).zip(server(new)) {
        Some((old, new)) => place_of_server(&old) != place_of_server(&new),
        None => true,
    }
}
