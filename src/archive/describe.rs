//! An archive's head and tail as a manifest, which is what the rest of the house knows backups by.

use minicbor::bytes::ByteArray;

use super::Companion;
use crate::portable::head::{Contents, Source};
use crate::portable::{Head, Tail};
use crate::repository::{Manifest, ManifestSource};

/// The manifest of the backup that an archive holds, without pages. `tail` with [`Contents::Last`]; where it was not read, `companion` tells what it would.
/// `size`: of the archive, in bytes.
pub fn manifest(head: &Head, tail: Option<&Tail>, companion: Option<&Companion>, size: u64) -> Manifest {
    let origin = &head.origin;
    let first = head.contents == Contents::First;
    let said = companion.filter(|_| !first && tail.is_none());
    let source = |(at, s): (usize, &Source)| {
        let counted = tail.and_then(|t| t.sources.iter().find(|t| t.name == s.name)).unwrap_or(s);
        let said = said.and_then(|c| c.sources.get(at));
        let facts = said.map_or(&counted.facts, |s| &s.facts);
        ManifestSource {
            name: s.name.clone(),
            kind: s.kind.clone(),
            path: s.place.to_bytes().unwrap_or_default(),
            pages: Vec::new(),
            entries: said.map_or(counted.entries, |s| s.entries),
            files: said.map_or(counted.files, |s| s.files),
            directories: said.map_or(counted.directories, |s| s.directories),
            bytes: said.map_or(counted.bytes, |s| s.bytes),
            facts: serde_json::to_string(facts).unwrap_or_else(|_| "{}".into()),
        }
    };
    let either = |of_tail: fn(&Tail) -> &String, of_said: fn(&Companion) -> &String, of_head: &String| {
        tail.map(of_tail).or(said.map(of_said)).unwrap_or(of_head).clone()
    };
    let (users, groups) = tail.map_or((&head.users, &head.groups), |t| (&t.users, &t.groups));
    Manifest {
        format: 1,
        repository: ByteArray::from([0; 16]),
        sequence: 0,
        predecessor: None,
        job: origin.job.clone(),
        run: origin.run.clone(),
        started: origin.started.clone(),
        finished: either(|t| &t.finished, |c| &c.finished, &origin.finished),
        r#type: origin.r#type.clone(),
        outcome: either(|t| &t.outcome, |c| &c.outcome, &origin.outcome),
        name: origin.name.clone(),
        labels: origin.labels.clone().into_iter().collect(),
        host: origin.host.clone(),
        keepd_version: origin.keepd_version.clone(),
        sources: head.sources.iter().enumerate().map(source).collect(),
        users: users.clone().into_iter().collect(),
        groups: groups.clone().into_iter().collect(),
        messages: tail.map_or(&head.messages, |t| &t.messages).clone(),
        left_out: tail.map(|t| t.left_out).or(said.map(|c| c.left_out)).unwrap_or(head.left_out),
        added_bytes: size,
        new_bytes: None,
        parent: None,
        origin: data_encoding::HEXLOWER
            .decode(origin.backup.as_bytes())
            .ok()
            .and_then(|id| <[u8; 32]>::try_from(id).ok())
            .map(ByteArray::from),
        description: origin.description.clone(),
        version: tail.map_or(&origin.version, |t| &t.version).clone(),
        schema_version: tail.map_or(&origin.schema_version, |t| &t.schema_version).clone(),
    }
}
