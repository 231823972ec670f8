//! Who did what.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// What became of what somebody asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuditResult {
    /// It was allowed and begun; how it ended stands in a later entry of the same `call`.
    #[default]
    Begun,
    /// A right was missing, or a limit reached; nothing was done.
    Refused,
    Done,
    Failed,
}

/// An entry of the audit log.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AuditEntry {
    /// From 1 on, without a gap.
    pub seq: u64,
    /// RFC 3339, UTC.
    pub time: String,
    /// The caller's name, or `keepd`.
    pub user: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Who logged in, where that is another one (by sudo).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub login: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// The caller's command line as it was when it connected; a process may give itself any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Where an ssh session came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// The method without its interface; of keepd itself `start`, `stop`, `reload`, `run`, `config_changed`, `removed`, `retention`, `bootstrap`, `log_problem`, `log_missing`.
    pub action: String,
    /// The right that it wants.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub right: Option<String>,
    /// What it was about: parameters of the call, without contents and secrets.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub on: Map<String, Value>,
    pub result: AuditResult,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// Why it was refused or failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The entry that this one ends, or a number of equal ones that it stands for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub begun: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub times: Option<u64>,
    /// SHA-256 (hexadecimal) over the hash before and the entry without this.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub hash: String,
}

/// Where the chain does not hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokenLink {
    pub seq: u64,
    pub why: String,
}

/// A head of the chain that was published, and what it says of the chain that is here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedHead {
    /// Its name, or the path of the file beside the ledger.
    pub destination: String,
    /// 0 where none was found.
    pub seq: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<String>,
    /// None: it could not be asked; `message` says why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agrees: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What a verification of the audit log found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditVerified {
    /// Of the entries that are still here.
    pub first: u64,
    pub last: u64,
    pub head: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<BrokenLink>,
    /// What keepd found wrong with the log at a start, by the entries that say so; the newest are left out where they are many.
    #[serde(default)]
    pub problems: Vec<BrokenLink>,
    pub heads: Vec<PublishedHead>,
}
