//! Portable archives: a backup as one tar file, whose first member says what is in it; compressed and sealed if wished.
//!
//! In: entries and their contents, in path order. Out: a stream of bytes to a file, a pipe or an object; and back again, from anybody's hands.
//! `docs/archive.md` is its byte-level description.

mod bounds;
pub mod envelope;
#[cfg(test)]
mod envelope_tests;
pub mod file_list;
pub mod head;
mod listing;
pub mod member;
mod order;
pub mod packing;
pub mod read;
pub mod seal;
#[cfg(test)]
mod tests;
mod unpack;
pub mod write;

pub use file_list::{FileLine, FileList, FileListWriter};
pub use head::{Head, Tail};
pub use packing::Packing;
pub use read::{ArchiveReader, Limits};
pub use unpack::Frame;
pub use write::{ArchiveWriter, Made};

use crate::crypto::CryptoError;

/// Why an archive could not be made or read. Each text says what was tried, on what, and why it failed.
#[derive(Debug, thiserror::Error)]
pub enum PortableError {
    /// Of the place that it is written to or read from.
    #[error("{0}")]
    Io(std::io::Error),
    /// It ends early, or does not hold what it says: damage, by whatever.
    #[error("{0}")]
    Damaged(String),
    /// Nobody who means well makes such an archive.
    #[error("{0}")]
    Hostile(String),
    /// More than was allowed: bytes, entries, names; the text says how to allow it.
    #[error("{0}")]
    TooMuch(String),
    /// It is sealed, and does not open with what was given; or is not, and a key was given.
    #[error("{0}")]
    Key(CryptoError),
    #[error("{0}")]
    NotOpen(String),
    /// Of a later version of keepd, or nothing that keepd can read.
    #[error("{0}")]
    Version(String),
    #[error("cancelled")]
    Cancelled,
}

pub type Result<T, E = PortableError> = std::result::Result<T, E>;

impl PortableError {
    /// What came through a reader or writer of std as the inside of its error.
    fn inside(e: std::io::Error) -> std::result::Result<Self, std::io::Error> {
        e.downcast::<Self>()
    }

    /// Of the place, unless it has another inside.
    fn io(e: std::io::Error) -> Self {
        Self::inside(e).unwrap_or_else(Self::Io)
    }
}
