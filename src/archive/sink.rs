//! Entries as a source gives them, into an archive while they come: nothing is kept but what one file needs.
//!
//! A tar says how long a file is before it comes. Where a source does not know that (the output of a program), contents are gathered; those that are not
//! longer than [`PART_BYTES`] become one member, longer ones parts of that size, each a member of its own ([`super::parts`]).

use std::collections::HashSet;
use std::io::Write;

use data_encoding::BASE64;
use keepd_protocol::model::{BytesPath, EntryKind};
use keepd_protocol::restore::EntryHeader;
use tokio_util::sync::CancellationToken;

use super::parts;
use crate::portable::head::Source;
use crate::portable::{ArchiveWriter, Made, PortableError, Tail};
use crate::repository::ChunkId;
use crate::repository::entry::{Entry, EntrySink, Kind, Segment, SinkError, Texture, path_order};

/// Of a file whose length is not known before, so much is gathered, and so long are its parts, in bytes.
pub const PART_BYTES: usize = 32 << 20;

/// Is told the path and the kind of each entry.
pub type Watch = Box<dyn FnMut(&[u8], Kind) -> Result<(), SinkError>>;

/// Takes the sources of one backup, one after the other.
pub struct ArchiveSink<W: Write + Send + 'static> {
    archive: ArchiveWriter<W>,
    cancel: CancellationToken,
    source: Source,
    last_path: Option<Vec<u8>>,
    open: Open,
    space: Vec<u8>,
    chunks: u64,
    watch: Option<Watch>,
    pub users: HashSet<u32>,
    pub groups: HashSet<u32>,
}

/// What comes.
enum Open {
    Nothing,
    /// A file that was announced with its length, of which so many bytes are missing.
    Known {
        path: Vec<u8>,
        size: u64,
        left: u64,
    },
    /// One of unknown length.
    Gathered {
        entry: Box<Entry>,
        bytes: Vec<u8>,
        parts: u64,
        size: u64,
    },
}

fn bug(text: &str) -> SinkError {
    SinkError::Repository(format!("{text}; this is a bug"))
}

impl From<PortableError> for SinkError {
    fn from(error: PortableError) -> Self {
        match error {
            PortableError::Cancelled => SinkError::Cancelled,
            PortableError::Io(e) => SinkError::Storage(e.to_string()),
            other => SinkError::Repository(other.to_string()),
        }
    }
}

impl<W: Write + Send + 'static> ArchiveSink<W> {
    pub fn new(archive: ArchiveWriter<W>, cancel: CancellationToken) -> Self {
        Self {
            archive,
            cancel,
            source: Source::default(),
            last_path: None,
            open: Open::Nothing,
            space: Vec::new(),
            chunks: 0,
            watch: None,
            users: HashSet::new(),
            groups: HashSet::new(),
        }
    }

    /// The next source, in the order of the archive's head; `watch` is told its entries.
    pub fn begin_source(&mut self, source: Source, watch: Watch) {
        self.source = source;
        self.last_path = None;
        self.watch = Some(watch);
    }

    /// Ends a source; gives it with its counts.
    pub fn end_source(&mut self) -> Result<Source, SinkError> {
        if !matches!(self.open, Open::Nothing) {
            return Err(bug("a source ended within a file"));
        }
        self.watch = None;
        Ok(std::mem::take(&mut self.source))
    }

    /// Ends the archive.
    pub fn finish(self, tail: &Tail) -> Result<(W, Made), PortableError> {
        self.archive.finish(Some(tail))
    }

    /// What an entry is called in the archive.
    fn shown(&self, path: &[u8], is_root_file: bool) -> Vec<u8> {
        let mut shown = self.source.name.clone().into_bytes();
        let below = match path {
            // A source that is one file has no directory.
            [] if is_root_file => self.source.file_name(),
            path => path.to_vec(),
        };
        if !below.is_empty() {
            shown.push(b'/');
            shown.extend_from_slice(&below);
        }
        shown
    }

    fn header(&self, entry: &Entry, size: u64) -> EntryHeader {
        let target = match entry.kind {
            Kind::Symlink => Some(BytesPath::from_bytes(&entry.target)),
            Kind::Hardlink => Some(BytesPath::from_bytes(&self.shown(&entry.target, false))),
            _ => None,
        };
        EntryHeader {
            path: BytesPath::from_bytes(&self.shown(&entry.path, entry.kind == Kind::File)),
            kind: match entry.kind {
                Kind::File => EntryKind::File,
                Kind::Directory => EntryKind::Directory,
                Kind::Symlink => EntryKind::Symlink,
                Kind::Hardlink => EntryKind::Hardlink,
            },
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime_seconds: entry.mtime.seconds,
            mtime_nanoseconds: entry.mtime.nanoseconds,
            size,
            target,
            xattrs: entry.xattrs.iter().map(|(n, v)| (BytesPath::from_bytes(n), BASE64.encode(v))).collect(),
            ..EntryHeader::default()
        }
    }

    fn go_on(&self) -> Result<(), SinkError> {
        if self.cancel.is_cancelled() { Err(SinkError::Cancelled) } else { Ok(()) }
    }

    /// Notes an entry that the source gave.
    fn note(&mut self, entry: &Entry) -> Result<(), SinkError> {
        if self.last_path.as_ref().is_some_and(|last| !path_order(last, &entry.path).is_lt()) {
            return Err(bug(&format!("the source gave '{}' out of order", String::from_utf8_lossy(&entry.path))));
        }
        self.last_path = Some(entry.path.clone());
        if let Some(watch) = &mut self.watch {
            watch(&entry.path, entry.kind)?;
        }
        self.users.insert(entry.uid);
        self.groups.insert(entry.gid);
        Ok(())
    }

    /// Before a source that is one file: the directory that it lies in wherever it is restored to.
    fn directory_of(&mut self, entry: &Entry) -> Result<(), SinkError> {
        if !entry.path.is_empty() || entry.kind != Kind::File {
            return Ok(());
        }
        let made_up = Entry { kind: Kind::Directory, mode: 0o700, uid: entry.uid, gid: entry.gid, mtime: entry.mtime, ..Entry::default() };
        let header = self.header(&made_up, 0);
        self.member(&header)
    }

    /// A member of the archive.
    fn member(&mut self, header: &EntryHeader) -> Result<(), SinkError> {
        self.archive.entry(header)?;
        self.source.count(header);
        Ok(())
    }

    /// The next bytes of what is open.
    fn take(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        self.go_on()?;
        match &mut self.open {
            Open::Nothing => return Err(bug("contents came of no file")),
            Open::Known { left, .. } => {
                // What it grew by since is not in this backup.
                let len = (bytes.len() as u64).min(*left);
                *left -= len;
                self.archive.contents(bytes.get(..len as usize).unwrap_or_default())?;
            }
            Open::Gathered { .. } => {
                let mut rest = bytes;
                while !rest.is_empty() {
                    // More comes, so it is one of several.
                    if matches!(&self.open, Open::Gathered { bytes, .. } if bytes.len() >= PART_BYTES) {
                        self.write_part()?;
                    }
                    let Open::Gathered { bytes: gathered, size, .. } = &mut self.open else { break };
                    let (now, later) = rest.split_at(rest.len().min(PART_BYTES.saturating_sub(gathered.len())));
                    gathered.extend_from_slice(now);
                    *size += now.len() as u64;
                    rest = later;
                }
            }
        }
        Ok(())
    }

    /// Writes what was gathered as the next part.
    fn write_part(&mut self) -> Result<(), SinkError> {
        let Open::Gathered { entry, bytes, parts, .. } = &mut self.open else { return Err(bug("no file is gathered")) };
        let (mut contents, mut part) = (std::mem::take(bytes), (**entry).clone());
        let name = parts::name(&part.path, *parts).ok_or_else(|| {
            let text = format!("the contents of '{}' are too long for an archive", String::from_utf8_lossy(&part.path));
            SinkError::Repository(text)
        })?;
        *parts += 1;
        part.path = name;
        let header = self.header(&part, contents.len() as u64);
        self.member(&header)?;
        self.archive.contents(&contents)?;
        contents.clear();
        if let Open::Gathered { bytes, .. } = &mut self.open {
            *bytes = contents;
        }
        Ok(())
    }

    fn whole(&mut self, entry: &Entry, contents: &[u8]) -> Result<(), SinkError> {
        self.go_on()?;
        self.note(entry)?;
        self.directory_of(entry)?;
        let header = self.header(entry, contents.len() as u64);
        self.member(&header)?;
        if !contents.is_empty() {
            self.archive.contents(contents)?;
        }
        Ok(())
    }

    /// Ends the contents of a file.
    fn close(&mut self, entry: &Entry) -> Result<(), SinkError> {
        match std::mem::replace(&mut self.open, Open::Nothing) {
            Open::Known { path, left, .. } if path == entry.path => {
                // It became shorter while it was read.
                self.archive.zeros(left)?;
                self.note(entry)
            }
            Open::Gathered { entry: begun, bytes, parts, size } if begun.path == entry.path => {
                if parts == 0 {
                    return self.whole(entry, &bytes);
                }
                self.open = Open::Gathered { entry: begun, bytes, parts, size };
                self.write_part()?;
                self.open = Open::Nothing;
                self.note(entry)
            }
            _ => Err(bug(&format!("the contents of '{}' belong to another file", String::from_utf8_lossy(&entry.path)))),
        }
    }
}

impl<W: Write + Send + 'static> EntrySink for ArchiveSink<W> {
    fn push(&mut self, entry: Entry) -> Result<(), SinkError> {
        match (&self.open, entry.kind) {
            (Open::Nothing, Kind::File) if entry.size > 0 => Err(bug("a file came without its contents")),
            (Open::Nothing, _) => self.whole(&entry, &[]),
            _ => {
                let sum: u64 = entry.content.segments.iter().map(Segment::len).sum();
                let had = match &self.open {
                    Open::Known { size, left, .. } => *size - *left,
                    Open::Gathered { size, .. } => *size,
                    Open::Nothing => 0,
                };
                if sum != entry.size || had != entry.size {
                    return Err(bug(&format!("of {} bytes {had} came", entry.size)));
                }
                self.close(&entry)
            }
        }
    }

    fn push_small(&mut self, entry: Entry, contents: &[u8]) -> Result<(), SinkError> {
        self.whole(&entry, contents)
    }

    fn passes_on(&self) -> bool {
        true
    }

    fn begins(&mut self, entry: &Entry, size: Option<u64>) -> Result<(), SinkError> {
        self.go_on()?;
        if !matches!(self.open, Open::Nothing) {
            return Err(SinkError::Repository(format!(
                "'{}' of source {} changed so that it has to be read once more, and its beginning is in the archive already; run the job again",
                String::from_utf8_lossy(&entry.path),
                self.source.name
            )));
        }
        self.open = match size {
            Some(size) => {
                self.directory_of(entry)?;
                let header = self.header(entry, size);
                self.member(&header)?;
                Open::Known { path: entry.path.clone(), size, left: size }
            }
            None => Open::Gathered { entry: Box::new(entry.clone()), bytes: Vec::new(), parts: 0, size: 0 },
        };
        Ok(())
    }

    fn large_begin(&mut self) -> Result<(), SinkError> {
        match self.open {
            Open::Nothing => Err(bug("contents came of no file")),
            _ => Ok(()),
        }
    }

    fn large_space(&mut self, want: usize) -> &mut [u8] {
        let len = want.clamp(1, 1 << 20);
        if self.space.len() < len {
            self.space.resize(len, 0);
        }
        self.space.get_mut(..len).unwrap_or_default()
    }

    fn large_filled(&mut self, len: usize) -> Result<(), SinkError> {
        let space = std::mem::take(&mut self.space);
        let taken = self.take(space.get(..len).unwrap_or_default());
        self.space = space;
        taken
    }

    fn large_hole(&mut self, len: u64) -> Result<(), SinkError> {
        self.go_on()?;
        match &mut self.open {
            Open::Known { left, .. } => {
                let len = len.min(*left);
                *left -= len;
                Ok(self.archive.zeros(len)?)
            }
            _ => Err(bug("a hole came of no file")),
        }
    }

    fn large_finish(&mut self, entry: Entry) -> Result<(), SinkError> {
        self.close(&entry)
    }

    /// Only the next of what is open; the id is none that anything could be fetched by.
    fn store(&mut self, chunk: &[u8], _: Texture) -> Result<ChunkId, SinkError> {
        self.take(chunk)?;
        self.chunks += 1;
        let mut id = [0; 32];
        if let Some(number) = id.first_chunk_mut() {
            *number = self.chunks.to_be_bytes();
        }
        Ok(ChunkId(id))
    }

    /// Nothing that came before is here.
    fn chunk_len(&mut self, _: &ChunkId) -> Result<Option<u32>, SinkError> {
        Ok(None)
    }

    fn fetch(&mut self, _: &ChunkId) -> Result<Vec<u8>, SinkError> {
        Err(bug("an archive has no chunks to fetch"))
    }
}
