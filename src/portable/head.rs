//! `manifest.json`, the first member of an archive, and `contents.json`, the last one where contents were not known before they were read.

use std::collections::BTreeMap;

use keepd_protocol::model::EntryKind;
use keepd_protocol::restore::EntryHeader;
use serde::{Deserialize, Serialize};

/// The name of the first member.
pub const HEAD_NAME: &str = "manifest.json";
/// The name of the last member, where [`Head::contents`] says so.
pub const TAIL_NAME: &str = "contents.json";

/// Where the list of files stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Contents {
    /// In the head: everything was read before.
    #[default]
    First,
    /// In the tail: the archive was written while its contents were captured.
    Last,
}

/// What stands in `manifest.json`, but for the list of files (`files`, its last key, which is never held in memory).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// 1
    pub format: u32,
    /// A random name of the archive, 32 hexadecimal digits.
    pub archive: String,
    /// RFC 3339, UTC.
    pub created: String,
    /// Of keepd that made it.
    pub keepd_version: String,
    pub contents: Contents,
    pub origin: Origin,
    /// In the order in which they follow. With [`Contents::Last`] without their counts and facts.
    pub sources: Vec<Source>,
    #[serde(default)]
    pub totals: Option<Totals>,
    /// Names of the users and groups by number.
    #[serde(default)]
    pub users: BTreeMap<u32, String>,
    #[serde(default)]
    pub groups: BTreeMap<u32, String>,
    /// Level and text, as the backup had them.
    #[serde(default)]
    pub messages: Vec<(String, String)>,
    /// How many things the backup itself left out.
    #[serde(default)]
    pub left_out: u64,
    /// Only some of the backup was exported.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub selected: bool,
}

/// The backup that it is of.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// The backup's id (64 hexadecimal digits), the same wherever a copy of it lies.
    pub backup: String,
    pub job: String,
    pub run: String,
    pub host: String,
    /// Of keepd that captured it.
    pub keepd_version: String,
    /// RFC 3339
    pub started: String,
    /// With [`Contents::Last`] empty here, and in the tail.
    #[serde(default)]
    pub finished: String,
    /// manual, scheduled, pre-update, pre-restore or imported
    pub r#type: String,
    /// good or suspect; with [`Contents::Last`] the tail's counts.
    #[serde(default)]
    pub outcome: String,
    #[serde(default)]
    pub name: Option<String>,
    #[serde(default)]
    pub description: Option<String>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    #[serde(default)]
    pub version: Option<String>,
    #[serde(default)]
    pub schema_version: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Source {
    pub name: String,
    /// sqlite, files, postgres, mysql or command
    pub kind: String,
    /// Where it was captured from: a path, or a server with its databases, or a program. Bytes that are no UTF-8 as in [`keepd_protocol::model::BytesPath`].
    pub place: keepd_protocol::model::BytesPath,
    /// Counted as [`Totals::count`] does.
    #[serde(default)]
    pub entries: u64,
    #[serde(default)]
    pub files: u64,
    #[serde(default)]
    pub directories: u64,
    #[serde(default)]
    pub bytes: u64,
    #[serde(default)]
    pub facts: BTreeMap<String, serde_json::Value>,
    /// It is one file, and the directory that it stands in here is made up.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub one_file: bool,
}

impl Source {
    /// Whether the directory that it stands in is made up. Databases of SQLite are one file, also where an archive does not say so.
    pub fn is_one_file(&self) -> bool {
        self.one_file || self.kind == "sqlite"
    }

    /// What its file is called, where it is one.
    pub fn file_name(&self) -> Vec<u8> {
        let place = self.place.to_bytes().unwrap_or_default();
        let name = place.rsplit(|b| *b == b'/').next().filter(|n| !n.is_empty());
        name.unwrap_or(self.name.as_bytes()).to_vec()
    }

    pub fn totals(&self) -> Totals {
        Totals { entries: self.entries, files: self.files, directories: self.directories, bytes: self.bytes }
    }

    /// Counts an entry of it.
    pub fn count(&mut self, header: &EntryHeader) {
        let mut totals = self.totals();
        totals.count(header);
        (self.entries, self.files, self.directories, self.bytes) = (totals.entries, totals.files, totals.directories, totals.bytes);
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    pub entries: u64,
    pub files: u64,
    pub directories: u64,
    pub bytes: u64,
}

impl Totals {
    /// Of all sources.
    pub fn of(sources: &[Source]) -> Self {
        sources.iter().fold(Self::default(), |sum, source| sum.plus(&source.totals()))
    }

    /// Counts an entry: each of them as an entry, regular files (hard links are none) with their bytes, directories.
    pub fn count(&mut self, header: &EntryHeader) {
        self.entries += 1;
        match header.kind {
            EntryKind::File => {
                self.files += 1;
                self.bytes = self.bytes.saturating_add(header.size);
            }
            EntryKind::Directory => self.directories += 1,
            EntryKind::Symlink | EntryKind::Hardlink => {}
        }
    }

    pub fn plus(self, other: &Self) -> Self {
        Self {
            // Whoever made the archive can say any number.
            entries: self.entries.saturating_add(other.entries),
            files: self.files.saturating_add(other.files),
            directories: self.directories.saturating_add(other.directories),
            bytes: self.bytes.saturating_add(other.bytes),
        }
    }
}

/// What stands in `contents.json`, but for the list of files (`files`, its last key).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Tail {
    /// That of the head.
    pub archive: String,
    pub finished: String,
    pub outcome: String,
    /// With counts and facts.
    pub sources: Vec<Source>,
    pub totals: Totals,
    #[serde(default)]
    pub users: BTreeMap<u32, String>,
    #[serde(default)]
    pub groups: BTreeMap<u32, String>,
    #[serde(default)]
    pub messages: Vec<(String, String)>,
    #[serde(default)]
    pub left_out: u64,
    #[serde(default)]
    pub version: Option<String>,
    #[serde(default)]
    pub schema_version: Option<String>,
}
