//! Writing an archive.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use data_encoding::HEXLOWER;
use keepd_protocol::model::{BytesPath, EntryKind};
use keepd_protocol::restore::EntryHeader;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::bounds;
use super::file_list::{Line, shown};
use super::head::{Contents, HEAD_NAME, TAIL_NAME};
use super::member::{self, padding};
use super::order::Order;
use super::packing::Pipeline;
use super::{FileList, FileListWriter, Head, Packing, PortableError, Result, Tail, listing};
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

const ZEROS_AT_ONCE: u64 = 64 << 20;

/// What was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Made {
    /// Of the archive as it lies there.
    pub bytes: u64,
    /// SHA-256 of the archive as it lies there, 64 hexadecimal digits.
    pub sha256: String,
}

/// Writes an archive member by member, in the order given: sources in the order of the head, entries in path order.
///
/// What does not fit to what was said before (another order, other sizes, other contents than listed) is an error; the archive is of no use then, and no reader takes it for one.
pub struct ArchiveWriter<W> {
    out: Pipeline<W>,
    packing: Packing,
    head: Head,
    order: Order,
    files: Files,
    open: Option<Open>,
}

enum Files {
    /// Those that must come.
    First(FileList),
    /// Those that came.
    Last(FileListWriter),
}

/// A file whose contents come.
struct Open {
    name: Vec<u8>,
    size: u64,
    left: u64,
    /// None: some of it came compressed, or was proven before.
    hash: Option<Sha256>,
}

impl<W: Write + Send + 'static> ArchiveWriter<W> {
    /// Begins it with its head. `files`: with [`super::head::Contents::First`] all regular files that will follow.
    pub fn create(out: W, options: &Options<'_>, head: &Head, files: Option<FileList>) -> Result<Self> {
        let order = Order::of(head)?;
        // What no reader takes is told before anything is written.
        bounds::check_head(head)?;
        let archive = HEXLOWER.decode(head.archive.as_bytes()).ok().and_then(|id| <[u8; 16]>::try_from(id).ok());
        let archive =
            archive.ok_or_else(|| broken(format!("the name of the archive, '{}', is not 32 hexadecimal digits", head.archive)))?;
        let (files, listed) = match (head.contents, files) {
            (Contents::First, Some(files)) => (Files::First(files.again()), Some(files)),
            (Contents::Last, None) => (Files::Last(FileListWriter::create(options.work_dir)?), None),
            _ => return Err(broken("a list of files comes with a head that has its contents first, and with no other".into())),
        };
        let mut out = Pipeline::start(out, options.packing, options.seal.map(|profile| (profile, archive)), options.cancel.clone())?;
        write_listing(&mut out, HEAD_NAME, head, listed)?;
        Ok(Self { out, packing: options.packing, head: head.clone(), order, files, open: None })
    }

    /// An entry; `header.path` is `<source>` or `<source>/<path>`. Of a regular file exactly `header.size` bytes must follow through [`Self::contents`] and
    /// [`Self::zeros`] before the next entry. (`index`, `inline` and `sparse` of the header do not matter.)
    pub fn entry(&mut self, header: &EntryHeader) -> Result<()> {
        self.close()?;
        let name = header.path.to_bytes().map_err(broken)?;
        let target = header.target.as_ref().map(BytesPath::to_bytes).transpose().map_err(broken)?.unwrap_or_default();
        let blocks = member::blocks(header)?;
        self.order.next(header, &name, &target)?;
        self.out.write(&blocks)?;
        if header.kind == EntryKind::File {
            self.open = Some(Open { name, size: header.size, left: header.size, hash: Some(Sha256::new()) });
        }
        Ok(())
    }

    /// The next bytes of the file that came last.
    pub fn contents(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(hash) = &mut self.take(bytes.len() as u64)?.hash {
            hash.update(bytes);
        }
        self.out.write(bytes)
    }

    /// The whole contents of the file that came last, which are those that were read for the list: they were proven when they were read, both times. Only with a list
    /// that stands first.
    pub fn known_contents(&mut self, bytes: &[u8]) -> Result<()> {
        if !matches!(self.files, Files::First(_)) {
            return Err(broken("contents are known before only where the list of files stands first".into()));
        }
        self.take(bytes.len() as u64)?.hash = None;
        self.out.write(bytes)
    }

    /// The next bytes of the file that came last as a whole zstd frame, which has `len` bytes of plaintext. Only with [`Packing::Zstd`] and a list that stands first: the
    /// SHA-256 of such a file is not proven here a second time.
    pub fn zstd_frame(&mut self, frame: Arc<Vec<u8>>, len: u64) -> Result<()> {
        if self.packing != Packing::Zstd || !matches!(self.files, Files::First(_)) {
            return Err(broken("a zstd frame comes into an archive of zstd frames alone, whose files are listed first".into()));
        }
        self.take(len)?.hash = None;
        self.out.frame(frame)
    }

    /// So many zeros: a hole.
    pub fn zeros(&mut self, mut len: u64) -> Result<()> {
        // Between them it is looked whether the work was cancelled.
        while len > ZEROS_AT_ONCE {
            self.some_zeros(ZEROS_AT_ONCE)?;
            len -= ZEROS_AT_ONCE;
        }
        self.some_zeros(len)
    }

    fn some_zeros(&mut self, len: u64) -> Result<()> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let open = self.take(len)?;
        let mut left = if open.hash.is_some() { len } else { 0 };
        while left > 0 {
            let n = left.min(ZEROS.len() as u64);
            if let Some(hash) = &mut open.hash {
                hash.update(ZEROS.get(..n as usize).unwrap_or_default());
            }
            left -= n;
        }
        self.out.zeros(len)
    }

    fn take(&mut self, len: u64) -> Result<&mut Open> {
        let Some(open) = &mut self.open else {
            return Err(broken("contents came without a file".into()));
        };
        match open.left.checked_sub(len) {
            Some(left) => open.left = left,
            None => {
                return Err(broken(format!("{} has more contents than the {} bytes that its entry says", shown(&open.name), open.size)));
            }
        }
        Ok(open)
    }

    /// Ends the file that is open.
    fn close(&mut self) -> Result<()> {
        let Some(Open { name, size, left, hash }) = self.open.take() else { return Ok(()) };
        if left > 0 {
            return Err(broken(format!("{} has {} bytes; its entry says {size}", shown(&name), size - left)));
        }
        self.out.zeros(padding(size))?;
        let Some(hash) = hash else { return self.close_unproven(&name, size) };
        let line = Line { name, size, sha256: hash.finalize().into() };
        match &mut self.files {
            Files::Last(files) => files.push_line(&line),
            Files::First(files) => match files.next()? {
                Some(listed) if listed == line => Ok(()),
                Some(listed) if listed.name == line.name => Err(broken(format!(
                    "{} is not what the list at the start of the archive says; did it change in between?",
                    shown(&line.name)
                ))),
                _ => Err(broken(format!("{} does not stand at its place in the list at the start of the archive", shown(&line.name)))),
            },
        }
    }

    /// The next file of the list must be this one, whatever its contents are.
    fn close_unproven(&mut self, name: &[u8], size: u64) -> Result<()> {
        let listed = match &mut self.files {
            Files::First(files) => files.next()?,
            Files::Last(_) => None,
        };
        match listed.is_some_and(|listed| listed.name == name && listed.size == size) {
            true => Ok(()),
            false => Err(broken(format!("{} does not stand at its place in the list at the start of the archive", shown(name)))),
        }
    }

    /// Ends it; `tail` with [`super::head::Contents::Last`], and only then. The output comes back flushed, for its owner to sync or publish. Dropped without this, what was
    /// written is no archive and is not opened by any reader.
    pub fn finish(mut self, tail: Option<&Tail>) -> Result<(W, Made)> {
        self.close()?;
        match (self.files, tail) {
            (Files::First(mut files), None) => {
                if let Some(line) = files.next()? {
                    return Err(broken(format!("{} is in the list at the start of the archive, and did not come", shown(&line.name))));
                }
                self.order.check(&self.head.sources, self.head.totals.as_ref(), HEAD_NAME)?;
            }
            (Files::Last(files), Some(tail)) => {
                self.order.check(&tail.sources, Some(&tail.totals), TAIL_NAME)?;
                if tail.archive != self.head.archive {
                    return Err(broken("head and tail name different archives".into()));
                }
                write_listing(&mut self.out, TAIL_NAME, tail, Some(files.finish()?))?;
            }
            _ => return Err(broken("a tail comes with contents that stand last, and with no others".into())),
        }
        self.out.zeros(member::END_BYTES)?;
        self.out.finish()
    }
}

fn write_listing<W: Write + Send + 'static>(
    out: &mut Pipeline<W>,
    name: &str,
    facts: &impl serde::Serialize,
    files: Option<FileList>,
) -> Result<()> {
    let size = listing::len(facts, files.as_ref().map(FileList::again))?;
    if size > listing::MAX_LISTING_BYTES {
        return Err(PortableError::TooMuch(format!("{name} of the archive has {size} bytes; {} are the most", listing::MAX_LISTING_BYTES)));
    }
    let header = EntryHeader { path: BytesPath::from(name), kind: EntryKind::File, mode: 0o600, size, ..EntryHeader::default() };
    out.write(&member::blocks(&header)?)?;
    let mut through = Through { out, failed: None };
    let written = listing::write(&mut through, facts, files);
    if let Some(e) = through.failed.take() {
        return Err(e);
    }
    written?;
    out.zeros(padding(size))
}

/// A pipeline as a writer of std; why it failed stays here.
struct Through<'a, W> {
    out: &'a mut Pipeline<W>,
    failed: Option<PortableError>,
}

impl<W: Write + Send + 'static> Write for Through<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes).map_err(|e| {
            self.failed = Some(e);
            io::Error::other("writing the archive failed")
        })?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Of whoever calls.
fn broken(text: String) -> PortableError {
    PortableError::Damaged(text)
}
