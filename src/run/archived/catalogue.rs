//! The catalogue of the ledger, brought up to date with the archives of a destination.
//!
//! Archives are known by their names. One that is not known is read by its head; what stands only at its end (counts, outcome) is taken from its companion
//! where that is of this very archive and reading all would take long. What was said of a backup later is in the ledger and in the companion.

use std::collections::{BTreeMap, HashSet};

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use keepd_protocol::model::BackupDetail;
use tokio_util::sync::CancellationToken;

use super::open;
use crate::archive::companion::{CompanionSource, Said};
use crate::archive::place::{List, ReadError, There};
use crate::archive::{ArchiveName, Archives, Companion, describe};
use crate::config::Destination;
use crate::crypto;
use crate::ledger::{KnownMark, Ledger};
use crate::repository::{Manifest, Mark};
use crate::run::backup::{Environment, short};
use crate::run::catalogue as ledgered;
use crate::run::live::Failure;
use crate::run::names;
use crate::storage::StorageError;

/// Up to so long, in bytes, an archive is read to its end to know what it is.
const READ_WHOLE: u64 = 64 << 20;
/// Foreign files named one by one.
const MAX_NAMED: usize = 5;

fn hosts_note(destination: &str) -> String {
    format!("hosts of {destination}")
}

/// Archives of other hosts count here, too.
pub fn accept_hosts(ledger: &Ledger, destination: &str) -> Result<(), Failure> {
    Ok(ledger.set_note(&hosts_note(destination), "all")?)
}

/// Archives that were found damaged, with their sizes and why: they are not read again as long as they have not changed.
fn damaged_note(destination: &str) -> String {
    format!("damaged archives at {destination}")
}

fn accepted_note(destination: &str) -> String {
    format!("emptied {destination}")
}

/// That nothing is left of what was here is meant so.
pub fn accept_emptied(ledger: &Ledger, destination: &str) -> Result<(), Failure> {
    Ok(ledger.set_note(&accepted_note(destination), "yes")?)
}

/// What there is, and the archives that the ledger knows, with their backups. An error where the list lacks one of them that is there: then it is old or not complete.
pub fn listed(place: &Archives, ledger: &Ledger) -> Result<(List, BTreeMap<String, String>), Failure> {
    // What comes and goes meanwhile is not looked at.
    let before = ledger.objects(&place.name)?;
    let list = place.list()?;
    let mut known = ledger.objects(&place.name)?;
    let present: HashSet<&str> = list.archives.iter().map(|a| a.object.as_str()).collect();
    known.retain(|object, _| before.contains_key(object) || present.contains(object.as_str()));
    let lacking = known.keys().filter(|object| !present.contains(object.as_str())).cloned();
    place.storage.are_gone("the archives", lacking)?;
    Ok((list, known))
}

/// Adds backups that came, removes those that went; returns what could not be read.
pub fn sync(place: &Archives, ledger: &Ledger, cancel: &CancellationToken) -> Result<Vec<String>, Failure> {
    let destination = place.name.as_str();
    let (list, known) = listed(place, ledger)?;
    let present: HashSet<&str> = list.archives.iter().map(|a| a.object.as_str()).collect();
    if list.archives.is_empty() && !known.is_empty() && ledger.note(&accepted_note(destination))?.as_deref() != Some("yes") {
        return Err(Failure::Storage(format!(
            "destination {destination}: {} archives were at {} and none is there; is the disk mounted? If they were removed on purpose: keepctl \
             destination take-over {destination}",
            known.len(),
            place.storage.location()
        )));
    }
    let all_hosts = ledger.note(&hosts_note(destination))?.as_deref() == Some("all");
    let before = ledger.note(&damaged_note(destination))?.unwrap_or_default();
    let seen: BTreeMap<String, (u64, String)> = serde_json::from_str(&before).unwrap_or_default();
    let mut damaged: BTreeMap<String, (u64, String)> = BTreeMap::new();
    let (mut problems, mut unreadable) = (Vec::new(), Vec::new());
    let mut newest = ledger.newest_in_chain(destination)?.map_or(0, |d| d.sequence);
    for there in list.archives.iter().filter(|a| !known.contains_key(&a.object)) {
        if let Some((size, why)) = seen.get(&there.object).filter(|(size, _)| *size == there.size) {
            damaged.insert(there.object.clone(), (*size, why.clone()));
            problems.push(format!("{why}; it is not counted, and stays"));
            unreadable.push(there.object.clone());
            continue;
        }
        match read(place, there, cancel) {
            Ok(manifest) if !all_hosts && manifest.host != names::host() => {
                problems.push(format!(
                    "{}: {}: it is of host {}, whose keepd may count on it: it is left alone. 'keepctl destination take-over {destination}' takes it up",
                    place.storage.location(),
                    there.object,
                    manifest.host.escape_debug()
                ));
            }
            Ok(mut manifest) => {
                let id = manifest.origin.as_ref().map(|id| HEXLOWER.encode(&id[..])).unwrap_or_default();
                let known_as = ledger.backup_at(destination, &id)?.map(|d| d.object().to_owned());
                if let Some(twin) = known_as.filter(|object| present.contains(object.as_str())) {
                    problems.push(format!(
                        "{}: {}: it is the same backup as {twin}, and not counted",
                        place.storage.location(),
                        there.object
                    ));
                    continue;
                }
                newest = ledgered::next_sequence(destination, ledger, newest)?;
                manifest.sequence = newest;
                ledger.put_backup(destination, &ledgered::detail(&there.object, &manifest))?;
                take_marks(place, &there.object, &id, ledger)?;
            }
            Err(ReadError::Cancelled) => return Err(Failure::Cancelled),
            Err(ReadError::Storage(StorageError::NotFound { .. })) => {}
            Err(e) => {
                if let ReadError::Archive(why) = &e {
                    damaged.insert(there.object.clone(), (there.size, why.clone()));
                }
                problems.push(format!("{e}; it is not counted, and stays"));
                unreadable.push(there.object.clone());
            }
        }
    }
    ledgered::set_unreadable(destination, &unreadable, ledger)?;
    let gone: Vec<(&String, &String)> = known.iter().filter(|(object, _)| !present.contains(object.as_str())).collect();
    // One that was renamed is known under its new name by now.
    let is_gone =
        |(object, id): &&(&String, &String)| ledger.backup_at(destination, id).is_ok_and(|d| d.is_some_and(|d| d.object() == **object));
    let gone: Vec<&String> = gone.iter().filter(is_gone).map(|(_, id)| *id).collect();
    if !gone.is_empty() {
        let names = gone.iter().take(10).map(|id| short(id)).collect::<Vec<_>>().join(", ");
        problems.push(format!("{} backups were removed from {destination}, and not by this keepd: {names}", gone.len()));
    }
    for id in gone {
        ledger.remove_backup(destination, id)?;
    }
    if ledger.note(&accepted_note(destination))?.is_some_and(|note| !note.is_empty()) {
        ledger.set_note(&accepted_note(destination), "")?;
    }
    let now = serde_json::to_string(&damaged).unwrap_or_default();
    if damaged != seen {
        ledger.set_note(&damaged_note(destination), &now)?;
    }
    problems.extend(foreign(place, &list.foreign, ledger)?);
    Ok(problems)
}

/// What is none of keepd's is left alone, and told once.
fn foreign(place: &Archives, names: &[String], ledger: &Ledger) -> Result<Option<String>, Failure> {
    let note = format!("foreign at {}", place.name);
    let told: Vec<String> = serde_json::from_str(&ledger.note(&note)?.unwrap_or_default()).unwrap_or_default();
    let new: Vec<&String> = names.iter().filter(|n| !told.contains(n)).collect();
    if told.len() != names.len() || !new.is_empty() {
        ledger.set_note(&note, &serde_json::to_string(names).unwrap_or_default())?;
    }
    if new.is_empty() {
        return Ok(None);
    }
    let some = new.iter().take(MAX_NAMED).map(|n| n.escape_debug().to_string()).collect::<Vec<_>>().join(", ");
    let more = if new.len() > MAX_NAMED { " …" } else { "" };
    Ok(Some(format!("{}: {} files are none of keepd's and are left alone: {some}{more}", place.storage.location(), new.len())))
}

/// What an archive is.
fn read(place: &Archives, there: &There, cancel: &CancellationToken) -> Result<Manifest, ReadError> {
    let mut opened = place.open(&there.object, cancel)?;
    let damaged = |text: &str| ReadError::Archive(format!("{}: {}: {text}", place.storage.location(), there.object));
    let head = opened.reader.head().cloned().ok_or_else(|| damaged("it was not made by keepd"))?;
    if head.origin.started.parse::<Timestamp>().is_err() || crate::run::backup::unhex(&head.origin.backup).is_none() {
        return Err(damaged("its time is none, or its id"));
    }
    if !crate::config::is_name(&head.origin.job) {
        return Err(damaged("the name of its job is none"));
    }
    if head.selected {
        return Err(damaged("it has only a part of its backup; 'keepctl import' brings it into a repository"));
    }
    if there.size > READ_WHOLE
        && let Some(companion) = place.companion(&there.object)?.filter(|c| c.fits(&there.object, there.size, &head))
    {
        return Ok(describe::manifest(&head, None, Some(&companion), there.size));
    }
    let tell = opened.teller();
    while opened.reader.next_entry().map_err(&tell)?.is_some() {}
    // To its end: one that is cut off, or still on its way, is not taken up.
    let (_, tail) = opened.reader.finish().map_err(&tell)?;
    Ok(describe::manifest(&head, tail.as_ref(), None, there.size))
}

/// Marks that stand beside an archive that was not known.
fn take_marks(place: &Archives, object: &str, id: &str, ledger: &Ledger) -> Result<(), Failure> {
    // It may have been renamed with its archive.
    let companion = place.companion(object)?.filter(|c| c.backup == id);
    for said in companion
        .map(|c| c.marks)
        .unwrap_or_default()
        .into_iter()
        .filter(|s| crate::run::backup::unhex(&s.id).is_some() && s.time.parse::<Timestamp>().is_ok())
    {
        let Said { id: mark, time, kind, seconds, text } = said;
        ledger.put_mark(&place.name, &KnownMark { id: mark, backup: id.to_owned(), time, kind, seconds, text })?;
    }
    ledgered::apply_marks(&place.name, id, ledger)
}

/// Says something of a backup, in the ledger and beside its archive.
pub fn mark(env: &Environment, target: &Destination, id: &str, mark: &Mark) -> Result<(), Failure> {
    let place = open(env, target)?;
    let gone = || Failure::Failed(format!("backup {} is not at {}", short(id), target.name));
    let detail = env.ledger.backup_at(&target.name, id)?.ok_or_else(gone)?;
    let size = place.storage.size(detail.object())?;
    let random: [u8; 32] = crypto::random().map_err(|e| Failure::Failed(e.to_string()))?;
    let known = KnownMark {
        id: HEXLOWER.encode(&random),
        backup: id.to_owned(),
        time: mark.time.clone(),
        kind: mark.kind.clone(),
        seconds: mark.seconds,
        text: mark.text.clone(),
    };
    let mut marks = env.ledger.marks(&target.name, Some(id))?;
    marks.push(known.clone());
    write_companion(&place, &detail, size, &marks)?;
    env.ledger.put_mark(&target.name, &known)?;
    ledgered::apply_marks(&target.name, id, &env.ledger)
}

/// What stands beside an archive, with these marks.
fn write_companion(place: &Archives, detail: &BackupDetail, size: u64, marks: &[KnownMark]) -> Result<(), Failure> {
    let object = detail.object();
    let sealed = ArchiveName::parse(object).is_some_and(|n| n.sealed);
    let there = place.companion(object)?.filter(|c| c.archive == object && c.backup == detail.backup.id);
    let mut companion = there.unwrap_or_else(|| made_up(detail, sealed, size));
    companion.marks = marks
        .iter()
        .map(|m| Said {
            id: m.id.clone(),
            time: m.time.clone(),
            kind: m.kind.clone(),
            seconds: m.seconds,
            text: m.text.clone().filter(|_| !sealed),
        })
        .collect();
    Ok(place.put_companion(&companion)?)
}

/// A companion out of what the ledger knows.
pub fn made_up(detail: &BackupDetail, sealed: bool, size: u64) -> Companion {
    let backup = &detail.backup;
    let open = |text: &Option<String>| text.clone().filter(|_| !sealed);
    let source = |s: &keepd_protocol::model::SourceInfo| CompanionSource {
        name: s.name.clone(),
        kind: s.kind.clone(),
        entries: s.entries,
        bytes: s.bytes,
        facts: if sealed { BTreeMap::new() } else { s.facts.clone() },
        ..CompanionSource::default()
    };
    Companion {
        format: 1,
        archive: detail.object().to_owned(),
        size,
        sealed,
        backup: backup.id.clone(),
        job: backup.job.clone(),
        started: detail.started.clone(),
        finished: detail.finished.clone(),
        r#type: backup.r#type.as_str().into(),
        outcome: backup.outcome.as_str().into(),
        keepd_version: detail.keepd_version.clone(),
        left_out: u64::from(backup.partial),
        sources: detail.sources.iter().map(source).collect(),
        name: open(&backup.name),
        description: open(&backup.description),
        labels: if sealed { BTreeMap::new() } else { backup.labels.clone() },
        host: (!sealed).then(|| detail.host.clone()),
        ..Companion::default()
    }
}

/// Removes a backup's archive, and the backup from the catalogue.
pub fn remove(place: &Archives, ledger: &Ledger, id: &str) -> Result<(), Failure> {
    let destination = place.name.as_str();
    let detail = ledger.backup_at(destination, id)?;
    let object = detail.as_ref().map(BackupDetail::object).filter(|o| ArchiveName::parse(o).is_some());
    let object = object.ok_or_else(|| Failure::Failed(format!("backup {} is not at {destination}", short(id))))?;
    place.remove(object)?;
    ledger.set_removed(destination, id)?;
    Ok(ledger.remove_backup(destination, id)?)
}
