//! The catalogue of the ledger, brought up to date with a repository's manifests.

use std::collections::{BTreeMap, HashSet};

use data_encoding::HEXLOWER;
use keepd_protocol::model::{Backup, BackupDetail, BackupType, Level, Message, Outcome, SourceInfo};

use super::live::Failure;
use crate::ledger::Ledger;
use crate::repository::{Manifest, Repository};

/// Adds backups that came, removes those that went; returns what could not be read.
pub fn sync(repository: &Repository, destination: &str, ledger: &Ledger) -> Result<Vec<String>, Failure> {
    let listed = repository.listed_backups()?;
    let known: HashSet<String> = ledger.backup_ids(destination)?.into_iter().collect();
    let mut problems = Vec::new();
    let mut present = HashSet::new();
    for id in &listed {
        let hex = HEXLOWER.encode(id);
        if !known.contains(&hex) {
            match repository.read_manifest(id) {
                Ok(manifest) => ledger.put_backup(destination, &detail(&hex, &manifest))?,
                Err(e @ crate::repository::RepositoryError::Storage(_)) => return Err(e.into()),
                Err(e) => problems.push(e.to_string()),
            }
        }
        present.insert(hex);
    }
    for gone in known.difference(&present) {
        ledger.remove_backup(destination, gone)?;
    }
    Ok(problems)
}

/// A manifest as the catalogue and the control interface show it.
pub fn detail(id: &str, manifest: &Manifest) -> BackupDetail {
    let level = |word: &str| Level::ALL.iter().copied().find(|l| l.as_str() == word).unwrap_or_default();
    BackupDetail {
        backup: Backup {
            id: id.to_owned(),
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
        files: manifest.sources.iter().map(|s| s.files).sum(),
        directories: manifest.sources.iter().map(|s| s.directories).sum(),
        messages: manifest
            .messages
            .iter()
            .map(|(l, text)| Message { time: manifest.finished.clone(), level: level(l), text: text.clone() })
            .collect(),
    }
}
