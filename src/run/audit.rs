//! The head of the audit log at destinations: published by runs that wrote there, and asked for by a verification.
//!
//! `audit/<instance>/<number>-<hash>`: a small object of JSON for everybody to read. It holds no secret, and a key would add nothing: who could write a false one has the
//! ledger and thus the key. What it is worth it has from where it lies, where this machine cannot take it back. `docs/format.md` describes it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use keepd_protocol::audit::PublishedHead;
use keepd_protocol::model::escape;
use serde::{Deserialize, Serialize};

use super::backup::Environment;
use super::live::Failure;
use super::{destination, names};
use crate::config::Destination;
use crate::ledger::Ledger;
use crate::storage::{Storage, StorageError};

/// Where they lie.
pub const DIRECTORY: &str = "audit/";
/// Of one log at a destination; older ones are removed.
const KEPT: usize = 400;
const EVERY: Duration = Duration::from_secs(3600);
const MAX_BYTES: u64 = 4096;
/// Heads of one log, and other logs, that are looked at: the newest. Whoever may write there could make any number.
const MOST_HEADS: usize = 20_000;
const MOST_LOGS: usize = 200;

/// A published head.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Published {
    /// 1
    audit_head: u32,
    instance: String,
    seq: u64,
    hash: String,
    time: String,
    host: String,
    /// Which state directory of which machine, as a hash: two logs of one place follow each other.
    place: String,
}

/// What a name says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Name {
    object: String,
    log: String,
    seq: u64,
    /// The first 16 digits.
    hash: String,
}

/// In the ledger: what was published at a destination last.
#[derive(Debug, Serialize, Deserialize)]
struct Last {
    seq: u64,
    second: i64,
}

fn note(target: &Destination) -> String {
    format!("audit head at {}", destination::location(target))
}

fn last(ledger: &Ledger, target: &Destination) -> Result<Option<Last>, Failure> {
    Ok(ledger.note(&note(target))?.and_then(|note| serde_json::from_str(&note).ok()))
}

fn place(state_dir: &Path) -> String {
    let id = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let what = [id.trim().as_bytes(), b"\0", state_dir.as_os_str().as_encoded_bytes()].concat();
    HEXLOWER.encode(&blake3::derive_key("keepd audit head place", &what)[..8])
}

fn log_name(instance: &[u8; 32]) -> String {
    HEXLOWER.encode(&instance[..4])
}

fn parse(object: &str) -> Option<Name> {
    let (log, name) = object.strip_prefix(DIRECTORY)?.split_once('/')?;
    let (seq, hash) = name.split_once('-')?;
    let is_hex = |text: &str, len: usize| text.len() == len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let is_number = seq.len() == 20 && seq.bytes().all(|b| b.is_ascii_digit());
    match is_hex(log, 8) && is_hex(hash, 16) && is_number {
        true => Some(Name { object: object.to_owned(), log: log.to_owned(), seq: seq.parse().ok()?, hash: hash.to_owned() }),
        false => None,
    }
}

/// All that lie there, by their logs, each the oldest first. What has another name is none of keepd's.
fn look(storage: &Storage) -> Result<BTreeMap<String, Vec<Name>>, StorageError> {
    let mut logs: BTreeMap<String, Vec<Name>> = BTreeMap::new();
    for name in storage.list(DIRECTORY)?.iter().filter_map(|object| parse(&object.name)) {
        logs.entry(name.log.clone()).or_default().push(name);
    }
    for names in logs.values_mut() {
        names.sort_by_key(|name| name.seq);
        names.drain(..names.len().saturating_sub(MOST_HEADS));
    }
    Ok(logs)
}

fn fetch(storage: &Storage, name: &Name) -> Result<Published, StorageError> {
    let bytes = storage.get(&name.object, MAX_BYTES)?;
    serde_json::from_slice(&bytes).map_err(|e| StorageError::Failed {
        location: storage.location().to_owned(),
        verb: "read",
        name: name.object.clone(),
        reason: format!("it is no head of an audit log: {e}"),
    })
}

/// Publishes the head where it is another one than that which was published there last, and that was an hour ago.
pub fn publish(env: &Environment, target: &Destination) -> Result<(), Failure> {
    let (instance, head) = env.ledger.audit_head()?;
    let now = Timestamp::now();
    let is_due =
        last(&env.ledger, target)?.is_none_or(|last| last.seq != head.seq && now.as_second().abs_diff(last.second) >= EVERY.as_secs());
    if head.seq == 0 || !is_due {
        return Ok(());
    }
    let storage = destination::storage(target, &env.runtime)?;
    let hash = HEXLOWER.encode(&head.hash);
    let published = Published {
        audit_head: 1,
        instance: HEXLOWER.encode(&instance),
        seq: head.seq,
        hash: hash.clone(),
        time: now.to_string(),
        host: names::host(),
        place: place(&env.config.daemon.state_dir),
    };
    let text = serde_json::to_vec(&published).map_err(|e| Failure::Failed(e.to_string()))?;
    let log = log_name(&instance);
    let object = format!("{DIRECTORY}{log}/{:020}-{}", head.seq, hash.get(..16).unwrap_or_default());
    match storage.put_new(&object, text) {
        Ok(()) | Err(StorageError::Exists { .. }) => {}
        Err(e) => return Err(e.into()),
    }
    let last = Last { seq: head.seq, second: now.as_second() };
    env.ledger.set_note(&note(target), &serde_json::to_string(&last).unwrap_or_default())?;
    if !target.append_only {
        let logs = look(&storage)?;
        let names = logs.get(&log).map(Vec::as_slice).unwrap_or_default();
        for old in names.iter().take(names.len().saturating_sub(KEPT)) {
            // It was published all the same; the next one tries again.
            if let Err(e) = storage.delete(&old.object) {
                tracing::debug!(destination = %target.name, "an old head of the audit log could not be removed: {e}");
                break;
            }
        }
    }
    Ok(())
}

/// What the heads at a destination say of the log that is here.
pub fn compare(env: &Environment, target: &Destination) -> PublishedHead {
    let nothing = PublishedHead { destination: target.name.clone(), ..PublishedHead::default() };
    match compared(env, target) {
        Ok(head) => PublishedHead { destination: target.name.clone(), ..head },
        Err(e) => PublishedHead { message: Some(e.to_string()), ..nothing },
    }
}

fn compared(env: &Environment, target: &Destination) -> Result<PublishedHead, Failure> {
    let ledger = &env.ledger;
    let (instance, head) = ledger.audit_head()?;
    let noted = last(ledger, target)?;
    let storage = destination::storage(target, &env.runtime)?;
    let is_unused =
        noted.is_none() && target.directory().is_some_and(|root| !Path::new(root).exists()) && ledger.count_backups(&target.name)? == 0;
    let mut logs = if is_unused { BTreeMap::new() } else { look(&storage)? };
    let own = logs.remove(&log_name(&instance)).unwrap_or_default();
    let first = ledger.audit_page(0)?.first().map_or(head.seq.saturating_add(1), |row| row.seq);
    let mut proven = 0;
    for name in &own {
        let says = |why: String| PublishedHead {
            seq: name.seq,
            time: fetch(&storage, name).ok().map(|p| p.time),
            agrees: Some(false),
            message: Some(why),
            ..PublishedHead::default()
        };
        match ledger.audit_hash(name.seq)? {
            Some(hash) if hash.starts_with(&name.hash) => proven += 1,
            Some(_) => return Ok(says(format!("entry {} is another one than was published", name.seq))),
            None if name.seq > head.seq => {
                return Ok(says(format!("entry {} was published, and the log ends at {}: it was cut off or set back", name.seq, head.seq)));
            }
            None if name.seq < first => {}
            None => return Ok(says(format!("entry {} was published, and is missing", name.seq))),
        }
    }
    if let Some(noted) = noted.filter(|noted| own.last().is_none_or(|newest| newest.seq < noted.seq)) {
        let message = format!("head {} was published there, and is gone", noted.seq);
        return Ok(PublishedHead {
            seq: own.last().map_or(0, |n| n.seq),
            agrees: Some(false),
            message: Some(message),
            ..PublishedHead::default()
        });
    }
    let before = an_earlier_log(env, &storage, &logs)?;
    let Some(newest) = own.last() else {
        let none = "none was published there yet".to_owned();
        return Ok(PublishedHead { agrees: before.is_none().then_some(true), message: before.or(Some(none)), ..PublishedHead::default() });
    };
    let full = fetch(&storage, newest)?;
    let fits = match ledger.audit_hash(newest.seq)? {
        Some(hash) => Some(hash == full.hash && full.seq == newest.seq && full.instance == HEXLOWER.encode(&instance)),
        // Older than what is kept.
        None => None,
    };
    let message = match fits {
        Some(true) => format!("{proven} heads agree"),
        Some(false) => format!("entry {} is another one than was published", newest.seq),
        None => format!("entry {} was published, and is older than what is kept here", newest.seq),
    };
    let agrees = if before.is_some() && fits == Some(true) { None } else { fits };
    Ok(PublishedHead { seq: newest.seq, time: Some(full.time), agrees, message: before.or(Some(message)), ..PublishedHead::default() })
}

/// Words for a log of this very state directory that is not the one here, and is not older than what is kept.
fn an_earlier_log(env: &Environment, storage: &Storage, others: &BTreeMap<String, Vec<Name>>) -> Result<Option<String>, Failure> {
    let here = place(&env.config.daemon.state_dir);
    let kept = i64::try_from(env.config.audit.keep.as_secs()).unwrap_or(i64::MAX);
    for newest in others.values().filter_map(|names| names.last()).take(MOST_LOGS) {
        // What another machine wrote there says nothing of this one, whatever it is.
        let Ok(other) = fetch(storage, newest) else { continue };
        let age = other.time.parse::<Timestamp>().map_or(0, |time| Timestamp::now().as_second() - time.as_second());
        if other.place == here && age < kept {
            return Ok(Some(format!(
                "another log of this machine and state directory, {}, was published there, up to entry {} of {}: the log here was begun anew after it",
                newest.log,
                newest.seq,
                escape(&other.time)
            )));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let object = format!("{DIRECTORY}{}/{:020}-{}", log_name(&[0xab; 32]), 7, "0123456789abcdef");
        let name = parse(&object).unwrap();
        assert_eq!((name.log.as_str(), name.seq, name.hash.as_str()), ("abababab", 7, "0123456789abcdef"));
        for wrong in [
            "audit/x/1-2",
            "audit/abababab/7-0123456789abcdef",
            "config/abababab/00000000000000000007-0123456789abcdef",
            "audit/ABababab/00000000000000000007-0123456789abcdef",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
