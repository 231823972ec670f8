//! Marks: what was said of a backup after it was made. A manifest never changes; a mark is a small sealed object of its own, named
//! by its SHA-256 as the others are and never overwritten, so that two writers cannot take each other's back. What holds is what
//! the newest mark of a kind says.

use data_encoding::HEXLOWER;
use minicbor::bytes::ByteArray;
use minicbor::{CborLen, Decode, Encode};

use super::error::Result;
use super::open::{Repository, ids};
use crate::crypto::{CryptoError, ObjectKind};

/// No mark is longer, sealed or plain.
pub const MAX_MARK_BYTES: u64 = 64 << 10;

/// Unknown keys, and marks of an unknown kind, are left to later versions.
#[derive(Debug, Clone, PartialEq, Encode, Decode, CborLen)]
#[cbor(map)]
pub struct Mark {
    #[n(0)]
    pub format: u32,
    /// The id of the backup (the SHA-256 of its manifest).
    #[n(1)]
    pub backup: ByteArray<32>,
    /// pin, unpin, accept, proven, suspect
    #[n(2)]
    pub kind: String,
    /// RFC 3339 in UTC.
    #[n(3)]
    pub time: String,
    /// Who said it.
    #[n(4)]
    pub by: String,
    /// Of a proof: how long restoring and checking took.
    #[n(5)]
    pub seconds: Option<u64>,
    /// Why it is suspect, a reason in each line.
    #[n(6)]
    pub text: Option<String>,
}

impl Mark {
    /// A mark of a kind that says no more than that.
    pub fn new(backup: [u8; 32], kind: &str, time: String, by: String) -> Self {
        Self { format: 1, backup: ByteArray::from(backup), kind: kind.to_owned(), time, by, seconds: None, text: None }
    }
}

impl Repository {
    /// The names of all marks: a complete list or an error.
    pub fn listed_marks(&self) -> Result<Vec<[u8; 32]>> {
        Ok(ids(self.storage.names("marks/")?))
    }

    pub fn read_mark(&self, id: &[u8; 32]) -> Result<Mark> {
        let name = mark_name(id);
        let mark: Mark = self.read_record(&name, id, ObjectKind::Mark, MAX_MARK_BYTES)?;
        match mark.format {
            1 => Ok(mark),
            other => Err(self.sealed_error(&name, CryptoError::Version(other.to_string()).into())),
        }
    }

    /// Durable when it returns.
    pub fn write_mark(&self, mark: &Mark) -> Result<[u8; 32]> {
        self.write_record("marks/", ObjectKind::Mark, mark)
    }

    pub fn delete_mark(&self, id: &[u8; 32]) -> Result<()> {
        Ok(self.storage.delete(&mark_name(id))?)
    }
}

/// `marks/<id>`
pub fn mark_name(id: &[u8; 32]) -> String {
    format!("marks/{}", HEXLOWER.encode(id))
}
