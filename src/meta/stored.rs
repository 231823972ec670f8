//! The stored configurations of a destination: `config/config_backup_<UTC time>.json.gz`, `.enc` behind it where it is sealed.
//!
//! They lie beside a repository's objects or a destination's archives and belong to neither. What else lies in `config/` is left alone.

use bytes::Bytes;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use crate::config::Retention;
use crate::portable::envelope::MAX_BYTES;
use crate::retention::{self, Candidate};
use crate::storage::{Storage, StorageError};

/// Where they lie.
pub const DIRECTORY: &str = "config/";
const PREFIX: &str = "config_backup_";
const SUFFIX: &str = ".json.gz";
const SEALED: &str = ".enc";
/// `20261122T034500Z`
const TIME: &str = "%Y%m%dT%H%M%SZ";
/// Seconds that are tried where names are taken.
const MOST_TRIED: u32 = 60;

/// A stored configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// With its directory.
    pub name: String,
    /// When it was made, as its name says.
    pub time: Timestamp,
    pub bytes: u64,
}

/// What lies there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct There {
    /// The oldest first.
    pub stored: Vec<Stored>,
    /// Names that are none of these.
    pub foreign: Vec<String>,
}

/// What one of a time is called.
pub fn name(time: Timestamp, sealed: bool) -> String {
    let sealed = if sealed { SEALED } else { "" };
    format!("{DIRECTORY}{PREFIX}{}{SUFFIX}{sealed}", time.to_zoned(TimeZone::UTC).strftime(TIME))
}

/// The time in a name; None: it is none of these.
fn time_of(object: &str) -> Option<Timestamp> {
    let rest = object.strip_prefix(DIRECTORY)?.strip_prefix(PREFIX)?;
    let text = rest.strip_suffix(SEALED).unwrap_or(rest).strip_suffix(SUFFIX)?;
    let time = jiff::civil::DateTime::strptime(TIME, text).ok()?.to_zoned(TimeZone::UTC).ok()?.timestamp();
    // Only what would be called so: one time has one name.
    (name(time, rest.ends_with(SEALED)) == object).then_some(time)
}

/// All that lies there; nothing where nothing was stored yet.
pub fn look(storage: &Storage) -> Result<There, StorageError> {
    let mut there = There::default();
    for object in storage.list(DIRECTORY)? {
        match time_of(&object.name) {
            Some(time) => there.stored.push(Stored { name: object.name, time, bytes: object.size }),
            None => there.foreign.push(object.name),
        }
    }
    there.stored.sort_by(|a, b| (a.time, &a.name).cmp(&(b.time, &b.name)));
    Ok(there)
}

/// The stored ones, the oldest first.
pub fn list(storage: &Storage) -> Result<Vec<Stored>, StorageError> {
    Ok(look(storage)?.stored)
}

/// The newest.
pub fn newest(storage: &Storage) -> Result<Option<Stored>, StorageError> {
    Ok(list(storage)?.pop())
}

/// Its bytes, as they lie there.
pub fn fetch(storage: &Storage, name: &str) -> Result<Bytes, StorageError> {
    storage.get(name, MAX_BYTES)
}

/// Stores one; where a name is taken it gets that of the next second. `before` is told each name before anything has it.
pub fn write<E: From<StorageError>>(
    storage: &Storage,
    now: Timestamp,
    sealed: bool,
    bytes: &[u8],
    mut before: impl FnMut(&str) -> Result<(), E>,
) -> Result<Stored, E> {
    let mut time = Timestamp::from_second(now.as_second()).unwrap_or(now);
    let mut tried = 1;
    loop {
        let name = name(time, sealed);
        before(&name)?;
        match storage.put_new(&name, bytes.to_vec()) {
            Ok(()) => return Ok(Stored { name, time, bytes: bytes.len() as u64 }),
            Err(StorageError::Exists { .. }) if tried < MOST_TRIED => {
                time = time.checked_add(SignedDuration::from_secs(1)).unwrap_or(time);
                tried += 1;
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// Which of these, all of them this keepd's own, the rules remove, the oldest first; the newest is never among them, nor is `spared`.
pub fn falling(stored: &[Stored], rules: &Retention, spared: &str, now: Timestamp, zone: &TimeZone) -> Vec<String> {
    let newest = stored.iter().max_by_key(|s| s.time).map(|s| s.name.as_str());
    let candidate = |s: &Stored| Candidate {
        id: s.name.clone(),
        time: s.time,
        good: true,
        pinned: false,
        proven: false,
        safety: false,
        imported: false,
    };
    let candidates: Vec<Candidate> = stored.iter().map(candidate).collect();
    let verdicts = retention::decide(&candidates, rules, now, zone);
    let is_removed = |v: &retention::Verdict| !v.keep && v.id != spared && Some(v.id.as_str()) != newest;
    let mut names: Vec<String> = verdicts.into_iter().filter(is_removed).map(|v| v.id).collect();
    names.sort();
    names
}
