//! The catalogue of the ledger, brought up to date with a repository's manifests.

use std::collections::{BTreeMap, HashSet};

use data_encoding::HEXLOWER;
use keepd_protocol::model::{Backup, BackupDetail, BackupType, Level, Mark as Said, Message, Outcome, SourceInfo};

use super::backup::{Environment, short, unhex};
use super::live::Failure;
use super::{archived, destination};
use crate::config::Destination;
use crate::ledger::{KnownMark, Ledger};
use crate::repository::{Manifest, Mark, Repository, RepositoryError};

/// Adds backups and marks that came, removes those that went; returns what could not be read.
pub fn sync(repository: &Repository, destination: &str, ledger: &Ledger) -> Result<Vec<String>, Failure> {
    // What is known comes first: what comes meanwhile cannot be missed in the listing then.
    let known = ledger.objects(destination)?;
    let listed = repository.listed_backups()?;
    let (mut problems, mut touched) = (Vec::new(), HashSet::new());
    let mut unreadable = Vec::new();
    // In the order of their ids, as those that are known: mostly they are the same.
    let mut encoded = [0; 64];
    let as_known = listed.len() == known.len()
        && listed.iter().zip(known.keys()).all(|(id, hex)| {
            HEXLOWER.encode_mut(id, &mut encoded);
            hex.as_bytes() == encoded
        });
    let mut present = HashSet::new();
    for id in listed.iter().filter(|_| !as_known) {
        let hex = HEXLOWER.encode(id);
        if !known.contains_key(&hex) {
            match repository.read_manifest(id) {
                Ok(manifest) if manifest.started.parse::<jiff::Timestamp>().is_err() => {
                    problems.push(format!("{}: backups/{hex}: its time is none", repository.location()));
                    unreadable.push(hex.clone());
                }
                Ok(manifest) => {
                    let detail = detail(&hex, &manifest);
                    ledger.put_backup(destination, &detail)?;
                    touched.insert(detail.backup.id);
                }
                Err(e @ RepositoryError::Storage(_)) => return Err(e.into()),
                Err(e) => {
                    problems.push(e.to_string());
                    unreadable.push(hex.clone());
                }
            }
        }
        present.insert(hex);
    }
    set_unreadable(destination, &unreadable, ledger)?;
    // One that was sealed anew is here under another name.
    let is_gone = |(object, id): &(&String, &String)| !as_known && !present.contains(*object) && !touched.contains(*id);
    // What another run removed meanwhile is no longer known.
    let still = if known.iter().any(|k| is_gone(&k)) { ledger.objects(destination)? } else { BTreeMap::new() };
    let gone: Vec<(&String, &String)> = known.iter().filter(|k| is_gone(k) && still.contains_key(k.0)).collect();
    repository.storage().are_gone("backups/", gone.iter().map(|(object, _)| format!("backups/{object}"))).map_err(RepositoryError::from)?;
    let known: BTreeMap<String, String> = ledger.marks(destination, None)?.into_iter().map(|m| (m.id, m.backup)).collect();
    let (mut present, mut came) = (HashSet::new(), Vec::new());
    for id in repository.listed_marks()? {
        let hex = HEXLOWER.encode(&id);
        if !known.contains_key(&hex) {
            match repository.read_mark(&id) {
                Ok(mark) => came.push((id, mark)),
                Err(e @ RepositoryError::Storage(_)) => return Err(e.into()),
                Err(e) => problems.push(e.to_string()),
            }
        }
        present.insert(hex);
    }
    let gone_marks = || known.iter().filter(|(id, _)| !present.contains(*id));
    repository.storage().are_gone("marks/", gone_marks().map(|(id, _)| format!("marks/{id}"))).map_err(RepositoryError::from)?;
    // Nothing is asked of the storage any more: that it does not answer takes no word of what is forgotten here away.
    let gone: Vec<&String> = gone.into_iter().map(|(_, id)| id).collect();
    if !gone.is_empty() {
        problems.extend(set_back(destination, &gone, ledger)?);
    }
    for gone in gone {
        ledger.remove_backup(destination, gone)?;
    }
    for (id, mark) in came {
        touched.insert(put_mark(destination, ledger, &id, &mark)?);
    }
    for (gone, backup) in gone_marks() {
        ledger.remove_mark(destination, gone)?;
        touched.insert(backup.clone());
    }
    for backup in &touched {
        apply_marks(destination, backup, ledger)?;
    }
    Ok(problems)
}

/// Backups of a destination whose manifests cannot be read: nobody knows what they are, and they stay.
pub fn unreadable(destination: &str, ledger: &Ledger) -> Result<Vec<String>, Failure> {
    let text = ledger.note(&format!("unreadable at {destination}"))?.unwrap_or_default();
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

/// The manifests that are at a destination as far as anybody remembers, by their names there (hexadecimal), those that cannot be read too: a listing
/// that lacks one that is there is not to be believed.
pub fn known(destination: &str, ledger: &Ledger) -> Result<Vec<String>, Failure> {
    let mut known: Vec<String> = ledger.objects(destination)?.into_keys().collect();
    known.extend(unreadable(destination, ledger)?);
    Ok(known)
}

pub fn set_unreadable(destination: &str, ids: &[String], ledger: &Ledger) -> Result<(), Failure> {
    if unreadable(destination, ledger)? != ids {
        ledger.set_note(&format!("unreadable at {destination}"), &ids.join(" "))?;
    }
    Ok(())
}

/// Backups that were here and that keepd did not remove are gone. When the newest is among them, the storage was most likely set back to an
/// older state: what is there is whole in itself, and nothing else would tell.
fn set_back(destination: &str, gone: &[&String], ledger: &Ledger) -> Result<Option<String>, Failure> {
    let Some(newest) = ledger.newest_in_chain(destination)?.filter(|d| gone.iter().any(|id| **id == d.backup.id)) else {
        return Ok(Some(format!("{} backups were removed from {destination}, and not by this keepd: {}", gone.len(), names(gone))));
    };
    Ok(Some(format!(
        "{destination} was set back to an older state: the newest backup (number {}, of {}) is gone, and with it {} in all that this keepd did \
         not remove: {}. Somebody restored the storage from a copy, or tampers with it",
        newest.sequence,
        newest.finished,
        gone.len(),
        names(gone)
    )))
}

fn names(ids: &[&String]) -> String {
    let some = ids.iter().take(10).map(|id| short(id)).collect::<Vec<_>>().join(", ");
    if ids.len() > 10 { format!("{some} …") } else { some }
}

/// The number of the next backup: never one that was used before, also when the storage was set back.
/// `newest`: that of the newest backup there is.
pub fn next_sequence(destination: &str, ledger: &Ledger, newest: u64) -> Result<u64, Failure> {
    let note = format!("highest sequence at {destination}");
    let noted: u64 = ledger.note(&note)?.and_then(|n| n.parse().ok()).unwrap_or(0);
    let next = noted.max(newest).saturating_add(1);
    ledger.set_note(&note, &next.to_string())?;
    Ok(next)
}

/// Says something of a backup at a destination; `said` is given what the destination's repository knows it by.
pub fn say(env: &Environment, target: &Destination, id: &str, said: impl FnOnce([u8; 32]) -> Mark) -> Result<(), Failure> {
    if archived::is(target) {
        return archived::catalogue::mark(env, target, id, &said([0; 32]));
    }
    let repository = destination::open_to_mark(env, target)?;
    let object = object(&env.ledger, &target.name, id)?;
    mark(&repository, &target.name, &env.ledger, &said(object))
}

/// Says something of a backup, in the repository and in the catalogue.
pub fn mark(repository: &Repository, destination: &str, ledger: &Ledger, mark: &Mark) -> Result<(), Failure> {
    let id = repository.write_mark(mark)?;
    let backup = put_mark(destination, ledger, &id, mark)?;
    apply_marks(destination, &backup, ledger)
}

/// Removes a backup and what was said of it from a repository and the catalogue.
pub fn remove(repository: &Repository, destination: &str, ledger: &Ledger, id: &str) -> Result<(), Failure> {
    let object = object(ledger, destination, id)?;
    if repository.is_changing_keys() {
        // An interrupted re-encryption may have left it there twice.
        for twin in repository.listed_backups()?.into_iter().filter(|twin| *twin != object) {
            let manifest = repository.read_manifest(&twin)?;
            if HEXLOWER.encode(&manifest.known_as(&twin)) == id {
                repository.delete_manifest(&twin)?;
            }
        }
    }
    repository.delete_manifest(&object)?;
    for mark in ledger.marks(destination, Some(id))? {
        if let Some(raw) = unhex(&mark.id) {
            repository.delete_mark(&raw)?;
        }
    }
    ledger.set_removed(destination, id)?;
    Ok(ledger.remove_backup(destination, id)?)
}

/// What the destination's repository knows a backup by.
pub fn object(ledger: &Ledger, destination: &str, id: &str) -> Result<[u8; 32], Failure> {
    let detail = ledger.backup_at(destination, id)?;
    let object = detail.as_ref().map_or(id, BackupDetail::object);
    unhex(object).ok_or_else(|| Failure::Failed(format!("'{object}' is no backup id")))
}

/// Takes a mark up into the ledger, under the backup's own id; returns that.
fn put_mark(destination: &str, ledger: &Ledger, id: &[u8; 32], mark: &Mark) -> Result<String, Failure> {
    let object = HEXLOWER.encode(&mark.backup[..]);
    let backup = ledger.id_of(destination, &object)?.unwrap_or(object);
    let known = KnownMark {
        id: HEXLOWER.encode(id),
        backup,
        time: mark.time.clone(),
        kind: mark.kind.clone(),
        seconds: mark.seconds,
        text: mark.text.clone(),
    };
    ledger.put_mark(destination, &known)?;
    Ok(known.backup)
}

/// What the marks make of a backup, in the order of their times: the newest pin or unpin holds, and the newest proof; an acceptance makes it
/// good, a drill that it did not stand suspect, and no longer proven.
pub fn apply_marks(destination: &str, backup: &str, ledger: &Ledger) -> Result<(), Failure> {
    let Some(mut detail) = ledger.backup_at(destination, backup)? else { return Ok(()) };
    let (mut pinned, mut proven, mut seconds) = (false, None, None);
    detail.suspect.clear();
    for mark in ledger.marks(destination, Some(backup))? {
        match mark.kind.parse() {
            Ok(Said::Pin) => pinned = true,
            Ok(Said::Unpin) => pinned = false,
            Ok(Said::Accept) => {
                detail.backup.outcome = Outcome::Good;
                detail.suspect.clear();
            }
            Err(_) if mark.kind == PROVEN => (proven, seconds) = (Some(mark.time), mark.seconds),
            Err(_) if mark.kind == SUSPECT => {
                detail.backup.outcome = Outcome::Suspect;
                detail.suspect.extend(mark.text.unwrap_or_default().lines().map(str::to_owned));
                (proven, seconds) = (None, None);
            }
            // Of a later version.
            Err(_) => {}
        }
    }
    (detail.backup.pinned, detail.backup.proven, detail.proven_seconds) = (pinned, proven, seconds);
    Ok(ledger.put_backup(destination, &detail)?)
}

/// Kinds of marks that nobody says by hand.
pub const PROVEN: &str = "proven";
pub const SUSPECT: &str = "suspect";

/// A manifest, by the id its repository has it under, as the catalogue and the control interface show it. A copy goes by its original's id.
pub fn detail(object: &str, manifest: &Manifest) -> BackupDetail {
    let origin = manifest.origin.as_ref().map(|id| HEXLOWER.encode(&id[..]));
    let level = |word: &str| Level::ALL.iter().copied().find(|l| l.as_str() == word).unwrap_or_default();
    BackupDetail {
        backup: Backup {
            id: origin.clone().unwrap_or_else(|| object.to_owned()),
            job: manifest.job.clone(),
            time: manifest.started.clone(),
            r#type: manifest.r#type.parse::<BackupType>().unwrap_or_default(),
            outcome: manifest.outcome.parse::<Outcome>().unwrap_or(Outcome::Suspect),
            proven: None,
            pinned: false,
            destinations: Vec::new(),
            sources: manifest.sources.iter().map(|s| s.name.clone()).collect(),
            bytes: manifest.bytes(),
            added_bytes: manifest.added_bytes,
            labels: manifest.labels.iter().cloned().collect(),
            name: manifest.name.clone(),
            description: manifest.description.clone(),
            version: manifest.version.clone(),
            schema_version: manifest.schema_version.clone(),
            partial: manifest.left_out > 0,
        },
        started: manifest.started.clone(),
        finished: manifest.finished.clone(),
        run: manifest.run.clone(),
        host: manifest.host.clone(),
        keepd_version: manifest.keepd_version.clone(),
        sequence: manifest.sequence,
        predecessor: manifest.predecessor.as_ref().map(|p| HEXLOWER.encode(&p[..])),
        sources: manifest
            .sources
            .iter()
            .map(|s| SourceInfo {
                name: s.name.clone(),
                kind: s.kind.clone(),
                path: String::from_utf8_lossy(&s.path).into_owned(),
                entries: s.entries,
                bytes: s.bytes,
                facts: serde_json::from_str::<BTreeMap<String, serde_json::Value>>(&s.facts).unwrap_or_default(),
            })
            .collect(),
        files: manifest.sum(|s| s.files),
        directories: manifest.sum(|s| s.directories),
        messages: manifest
            .messages
            .iter()
            .map(|(l, text)| Message { time: manifest.finished.clone(), level: level(l), text: text.clone() })
            .collect(),
        parent: manifest.parent.as_ref().map(|p| HEXLOWER.encode(&p[..])),
        new_bytes: manifest.new_bytes,
        object: origin.map(|_| object.to_owned()),
        proven_seconds: None,
        suspect: Vec::new(),
    }
}
