//! Reading an archive, by whomever it was made: what it says is checked before it is believed.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use keepd_protocol::restore::EntryHeader;
use tokio_util::sync::CancellationToken;

use super::head::Totals;
use super::{Head, PortableError, Result, Tail};
use crate::crypto::{PrivateKey, ProfileKey};

/// How much is read at most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all contents and headers, decompressed. None: 1 GiB and 250 times the bytes of the archive as they are read.
    pub bytes: Option<u64>,
    pub entries: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: None, entries: 20_000_000 }
    }
}

/// How it is opened.
pub struct OpenWith<'a> {
    /// Tried one after the other where it is sealed.
    pub keys: &'a [ProfileKey],
    /// The same where it is sealed to a public key.
    pub private_keys: &'a [Arc<PrivateKey>],
    pub limits: Limits,
    /// Where unnamed files may lie.
    pub work_dir: &'a Path,
    pub cancel: CancellationToken,
    /// A tar that keepd did not make is taken as this source; None: it is refused.
    pub foreign_source: Option<String>,
}

/// Gives the entries of an archive one after the other.
///
/// Of an archive that keepd made: in path order within each source, sources in the order of the head, each directory before what is in it, each path once, the target of a hard
/// link before it, names of the head's sources only, contents as listed. Of another: in the order of the tar, each path once, `./` and slashes at the end taken off.
/// Absolute paths, `..`, devices, fifos, links that lead out of the source (hard ones; symlinks are never followed, so they may say what they like) are refused either way.
/// Set-user-id and set-group-id bits are kept in the header as they are: it is whoever restores that decides.
pub struct ArchiveReader {}

impl ArchiveReader {
    /// Reads as far as its head. Finds out by itself whether it is sealed and how it is compressed.
    pub fn open<R: Read + Send + 'static>(_input: R, _with: &OpenWith<'_>) -> Result<Self> {
        Err(PortableError::Version("not written yet".into()))
    }

    /// None: a tar that keepd did not make.
    pub fn head(&self) -> Option<&Head> {
        None
    }

    /// The next entry; what was not read of the one before is read past (and proven, too).
    pub fn next_entry(&mut self) -> Result<Option<EntryHeader>> {
        Ok(None)
    }

    /// The next bytes of the file that came last; 0 at its end, when it was proven to be what the list says (if that stands first).
    pub fn read(&mut self, _buffer: &mut [u8]) -> Result<usize> {
        Ok(0)
    }

    /// Bytes read of the archive as it lies there, for progress.
    pub fn position(&self) -> u64 {
        0
    }

    /// After the last entry: proves that all came that the archive lists and nothing else, to its very end. The tail, where there is one.
    pub fn finish(self) -> Result<(Totals, Option<Tail>)> {
        Err(PortableError::Version("not written yet".into()))
    }
}
