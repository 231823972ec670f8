//! The list of an archive's regular files with their SHA-256, in the order in which they stand; kept in an unnamed file, for it may be as long as it likes.

use std::path::Path;

use keepd_protocol::model::BytesPath;
use serde::{Deserialize, Serialize};

use super::{PortableError, Result};

/// A regular file of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLine {
    /// `<source>/<path>`, as the member is called.
    #[serde(flatten)]
    pub path: BytesPath,
    pub size: u64,
    /// 64 hexadecimal digits.
    pub sha256: String,
}

/// Takes the lines.
pub struct FileListWriter {}

impl FileListWriter {
    /// `directory`: where the unnamed file lies.
    pub fn create(_directory: &Path) -> Result<Self> {
        Err(PortableError::Version("not written yet".into()))
    }

    pub fn push(&mut self, _line: &FileLine) -> Result<()> {
        Ok(())
    }

    pub fn finish(self) -> Result<FileList> {
        Ok(FileList {})
    }
}

/// Gives the lines again, from the first.
pub struct FileList {}

impl FileList {
    pub fn next_line(&mut self) -> Result<Option<FileLine>> {
        Ok(None)
    }

    /// How many there are in all.
    pub fn len(&self) -> u64 {
        0
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
