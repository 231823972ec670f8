//! What databases a server has, whether a job has them or not.

use std::path::PathBuf;
use std::time::Duration;

/// Such questions are answered within so long.
pub const WITHIN: Duration = Duration::from_secs(60);

/// A server that was asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// The same for each way to the same server.
    pub identity: String,
    pub port: Option<u16>,
    /// Where its data is, if it tells.
    pub data_dir: Option<PathBuf>,
    /// Without what belongs to the server itself, and what keepd made.
    pub databases: Vec<Surveyed>,
    /// Databases without any table that every server has.
    pub empty: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Surveyed {
    pub name: String,
    pub bytes: Option<u64>,
    /// Seconds since 1970, where the server knows.
    pub modified: Option<i64>,
}
