//! `NAME.meta.json` beside an archive: what people and their programs want to know without opening it. A convenience: nothing that matters stands here
//! alone, and what stands here is believed only where the archive does not say otherwise.

use std::collections::BTreeMap;

use keepd_protocol::model::BytesPath;
use serde::{Deserialize, Serialize};

use crate::portable::{Head, Made, Tail};

/// No companion is longer, in bytes.
pub const MAX_BYTES: u64 = 4 << 20;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Companion {
    /// 1
    pub format: u32,
    /// The name of the archive's object.
    pub archive: String,
    /// Of it, in bytes, and its SHA-256 in 64 hexadecimal digits, as it lies there.
    pub size: u64,
    pub sha256: String,
    pub sealed: bool,
    pub backup: String,
    pub job: String,
    /// RFC 3339, UTC.
    pub started: String,
    pub finished: String,
    pub r#type: String,
    /// good or suspect, as it was captured.
    pub outcome: String,
    pub keepd_version: String,
    pub left_out: u64,
    pub sources: Vec<CompanionSource>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// What was said of it since, in the order of time.
    pub marks: Vec<Said>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CompanionSource {
    pub name: String,
    pub kind: String,
    pub entries: u64,
    pub files: u64,
    pub directories: u64,
    pub bytes: u64,
    /// Not of a sealed archive, as its facts are not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub place: Option<BytesPath>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub facts: BTreeMap<String, serde_json::Value>,
}

/// A mark of a backup.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Said {
    /// 64 hexadecimal digits.
    pub id: String,
    pub time: String,
    /// pin, unpin, accept, proven, suspect
    pub kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u64>,
    /// Not of a sealed archive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

impl Companion {
    /// Of an archive that was made. Of a sealed one only what may be public.
    pub fn of(archive: &str, sealed: bool, head: &Head, tail: &Tail, made: &Made) -> Self {
        let open = |text: &Option<String>| text.clone().filter(|_| !sealed);
        let source = |s: &crate::portable::head::Source| CompanionSource {
            name: s.name.clone(),
            kind: s.kind.clone(),
            entries: s.entries,
            files: s.files,
            directories: s.directories,
            bytes: s.bytes,
            place: (!sealed).then(|| s.place.clone()),
            facts: if sealed { BTreeMap::new() } else { s.facts.clone() },
        };
        Self {
            format: 1,
            archive: archive.to_owned(),
            size: made.bytes,
            sha256: made.sha256.clone(),
            sealed,
            backup: head.origin.backup.clone(),
            job: head.origin.job.clone(),
            started: head.origin.started.clone(),
            finished: tail.finished.clone(),
            r#type: head.origin.r#type.clone(),
            outcome: tail.outcome.clone(),
            keepd_version: head.origin.keepd_version.clone(),
            left_out: tail.left_out,
            sources: tail.sources.iter().map(source).collect(),
            name: open(&head.origin.name),
            description: open(&head.origin.description),
            labels: if sealed { BTreeMap::new() } else { head.origin.labels.clone() },
            host: (!sealed).then(|| head.origin.host.clone()),
            marks: Vec::new(),
        }
    }

    /// Whether it is of this archive, as that says itself.
    pub fn fits(&self, archive: &str, size: u64, head: &Head) -> bool {
        let names = |sources: &mut dyn Iterator<Item = (&str, &str)>| sources.map(|(n, k)| format!("{n} {k}")).collect::<Vec<_>>();
        self.format == 1
            && self.archive == archive
            && self.size == size
            && self.backup == head.origin.backup
            && self.job == head.origin.job
            && self.started == head.origin.started
            && self.r#type == head.origin.r#type
            && names(&mut self.sources.iter().map(|s| (s.name.as_str(), s.kind.as_str())))
                == names(&mut head.sources.iter().map(|s| (s.name.as_str(), s.kind.as_str())))
    }
}
