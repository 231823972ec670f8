//! Writing an archive.

use std::io::Write;
use std::marker::PhantomData;
use std::path::Path;

use keepd_protocol::restore::EntryHeader;
use tokio_util::sync::CancellationToken;

use super::{FileList, Head, Packing, PortableError, Result, Tail};
use crate::crypto::Profile;

/// How an archive is written.
pub struct Options<'a> {
    pub packing: Packing,
    /// Whom it is sealed for; None: for everybody to read.
    pub seal: Option<&'a Profile>,
    /// Where unnamed files may lie.
    pub work_dir: &'a Path,
    pub cancel: CancellationToken,
}

/// What was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Made {
    /// Of the archive as it lies there.
    pub bytes: u64,
    /// SHA-256 of the archive as it lies there, 64 hexadecimal digits.
    pub sha256: String,
}

/// Writes an archive member by member, in the order given: sources in the order of the head, entries in path order.
pub struct ArchiveWriter<W> {
    out: PhantomData<W>,
}

impl<W: Write + Send + 'static> ArchiveWriter<W> {
    /// Begins it with its head. `files`: with [`super::head::Contents::First`] all regular files that will follow.
    pub fn create(_out: W, _options: &Options<'_>, _head: &Head, _files: Option<FileList>) -> Result<Self> {
        Err(PortableError::Version("not written yet".into()))
    }

    /// An entry; `header.path` is `<source>` or `<source>/<path>`. Of a regular file exactly `header.size` bytes must follow through [`Self::contents`] and
    /// [`Self::zeros`] before the next entry. (`index`, `inline` and `sparse` of the header do not matter.)
    pub fn entry(&mut self, _header: &EntryHeader) -> Result<()> {
        Ok(())
    }

    /// The next bytes of the file that came last.
    pub fn contents(&mut self, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }

    /// So many zeros: a hole.
    pub fn zeros(&mut self, _len: u64) -> Result<()> {
        Ok(())
    }

    /// Ends it; `tail` with [`super::head::Contents::Last`], and only then. The output comes back flushed, for its owner to sync or publish. Dropped without this, what was
    /// written is no archive and is not opened by any reader.
    pub fn finish(self, _tail: Option<&Tail>) -> Result<(W, Made)> {
        Err(PortableError::Version("not written yet".into()))
    }
}
