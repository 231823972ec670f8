//! The Varlink envelope: a call and its replies.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A call as it stands on the wire.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Call {
    pub method: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Value>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub oneway: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub upgrade: bool,
}

/// A reply as it stands on the wire; `error` names the error, its details stand in `parameters`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Reply {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Value>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub continues: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The errors of `io.keepd.Control`. Each carries a `message` for people that says what was tried, on what, why it
/// failed and what to do.
pub mod errors {
    /// `what` (job, backup, run, destination, path) of that name does not exist.
    pub const NOT_FOUND: &str = "io.keepd.Control.NotFound";
    /// A prefix or `latest` that fits more than one backup.
    pub const AMBIGUOUS: &str = "io.keepd.Control.Ambiguous";
    /// The peer's rights do not cover the call; `right` names the missing one.
    pub const NOT_PERMITTED: &str = "io.keepd.Control.NotPermitted";
    /// The thing is busy (a job that runs already) or a quota is reached; try later.
    pub const BUSY: &str = "io.keepd.Control.Busy";
    /// The daemon is stopping and starts nothing new.
    pub const SHUTTING_DOWN: &str = "io.keepd.Control.ShuttingDown";
    /// The configuration on disk is wrong; the old one stays in force.
    pub const CONFIG_INVALID: &str = "io.keepd.Control.ConfigInvalid";
    /// Everything else: the operation was tried and failed.
    pub const FAILED: &str = "io.keepd.Control.Failed";
    /// The call wants a file descriptor passed along and none (or an unfit one) came.
    pub const DESCRIPTOR: &str = "io.keepd.Control.Descriptor";
}
