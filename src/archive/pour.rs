//! An archive into a repository: what is there then is the same backup, with pages and chunks, for all that reads one.

use std::collections::HashSet;

use keepd_protocol::model::EntryKind;
use keepd_protocol::restore::EntryHeader;

use super::place::{Opened, ReadError};
use super::{describe, entries, parts};
use crate::portable::head::Source;
use crate::portable::{Head, Tail};
use crate::repository::entry::{ChunkId, Content, Entry, EntrySink, Extent, Kind, MAX_CHUNK_BYTES, SMALL_FILE_BYTES, Segment, SinkError};
use crate::repository::source_writer::SourceWriter;
use crate::repository::writer::Writer;
use crate::repository::{Manifest, RepositoryError};

/// So many zeros in a row take no space, in bytes.
const HOLE_BYTES: usize = 64 << 10;
/// A chunk that no repository has: what was not poured is not there, whoever asks for it.
const NOWHERE: ChunkId = ChunkId([0xff; 32]);

/// What is poured of an archive.
pub enum What<'a> {
    All,
    /// Entries, without any contents.
    Entries,
    /// All entries, and the contents of what lies at or below one of these (`<source>[/<path>]`) or exactly at one of those.
    Below(&'a [Vec<u8>], &'a HashSet<Vec<u8>>),
}

impl What<'_> {
    fn has(&self, path: &[u8]) -> bool {
        let below = |top: &Vec<u8>| path.strip_prefix(top.as_slice()).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"));
        match self {
            What::All => true,
            What::Entries => false,
            What::Below(paths, also) => paths.iter().any(below) || also.contains(path),
        }
    }
}

/// What came of it.
pub struct Poured {
    pub head: Head,
    pub tail: Option<Tail>,
    /// With pages, and of no repository yet.
    pub manifest: Manifest,
    /// With [`What::Below`]: targets of hard links that are wanted, without their contents being so.
    pub lacking: HashSet<Vec<u8>>,
}

/// Why it did not end.
#[derive(Debug, thiserror::Error)]
pub enum PourError {
    #[error("{0}")]
    Read(ReadError),
    #[error("{0}")]
    Write(RepositoryError),
    #[error("cancelled")]
    Cancelled,
}

impl From<RepositoryError> for PourError {
    fn from(error: RepositoryError) -> Self {
        match error {
            RepositoryError::Cancelled => PourError::Cancelled,
            other => PourError::Write(other),
        }
    }
}

impl From<SinkError> for PourError {
    fn from(error: SinkError) -> Self {
        match error {
            SinkError::Cancelled => PourError::Cancelled,
            SinkError::Storage(text) | SinkError::Repository(text) => PourError::Write(RepositoryError::Other(text)),
        }
    }
}

impl From<ReadError> for PourError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Cancelled => PourError::Cancelled,
            other => PourError::Read(other),
        }
    }
}

/// Pours what is wanted into a writer, and proves the whole archive on the way. `progress` is told the bytes of the archive that were read since it was told last.
pub fn pour(mut from: Opened, what: &What<'_>, writer: &mut Writer, progress: &dyn Fn(u64)) -> Result<Poured, PourError> {
    let tell = from.teller();
    let damaged = |text: String| PourError::Read(ReadError::Archive(text));
    let Some(head) = from.reader.head().cloned() else {
        return Err(damaged(format!("{}: {}: it was not made by keepd", from.location, from.object)));
    };
    let mut flow = Flow { from: &mut from, next: None, told: 0, progress };
    let mut sources = Vec::new();
    let mut lacking = HashSet::new();
    flow.advance()?;
    for source in &head.sources {
        let place = source.place.to_bytes().unwrap_or_default();
        let mut sink = SourceWriter::new(writer, &source.name, &source.kind, &place, None);
        let mut one = One { source, what, lacking: &mut lacking, root: None };
        while let Some(header) = flow.take_of(source)? {
            one.entry(header, &mut flow, &mut sink)?;
        }
        one.end(&mut sink)?;
        sources.push(sink.finish("{}".into())?.source);
    }
    if let Some(header) = &flow.next {
        return Err(damaged(format!("{}: {}: {} is of no source that it names", from.location, from.object, header.path.path)));
    }
    let size = from.size;
    let (_, tail) = from.reader.finish().map_err(tell)?;
    let mut manifest = describe::manifest(&head, tail.as_ref(), None, size);
    for (has, poured) in manifest.sources.iter_mut().zip(sources) {
        let facts = std::mem::take(&mut has.facts);
        *has = crate::repository::ManifestSource { facts, ..poured };
    }
    Ok(Poured { head, tail, manifest, lacking })
}

/// The entries, the next one in sight.
struct Flow<'a> {
    from: &'a mut Opened,
    next: Option<EntryHeader>,
    told: u64,
    progress: &'a dyn Fn(u64),
}

impl Flow<'_> {
    fn advance(&mut self) -> Result<(), PourError> {
        let read = self.from.reader.next_entry();
        self.next = read.map_err(|e| self.from.why(e))?;
        let at = self.from.reader.position();
        (self.progress)(at.saturating_sub(self.told));
        self.told = self.told.max(at);
        Ok(())
    }

    /// The next entry, if it is of this source.
    fn take_of(&mut self, source: &Source) -> Result<Option<EntryHeader>, PourError> {
        Ok(if self.has_more_of(source) { self.next.take() } else { None })
    }

    fn has_more_of(&self, source: &Source) -> bool {
        let path = self.next.as_ref().and_then(|next| next.path.to_bytes().ok());
        path.is_some_and(|path| path.strip_prefix(source.name.as_bytes()).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/")))
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, PourError> {
        let read = self.from.reader.read(buffer);
        let n = read.map_err(|e| self.from.why(e))?;
        let at = self.from.reader.position();
        (self.progress)(at.saturating_sub(self.told));
        self.told = self.told.max(at);
        Ok(n)
    }

    /// Fills the buffer, or as much of it as is left of the file.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, PourError> {
        let mut at = 0;
        while let Some(rest) = buffer.get_mut(at..).filter(|r| !r.is_empty()) {
            match self.read(rest)? {
                0 => break,
                n => at += n,
            }
        }
        Ok(at)
    }
}

/// One source on its way.
struct One<'a> {
    source: &'a Source,
    what: &'a What<'a>,
    lacking: &'a mut HashSet<Vec<u8>>,
    /// The directory of the source; where it is made up for one file, it is none of the backup's entries.
    root: Option<Entry>,
}

/// What came of a file.
enum Contents {
    Small(Vec<u8>),
    /// In the sink, where they wait for their entry.
    Large,
    /// They were not wanted: so many bytes.
    None(u64),
}

impl One<'_> {
    fn below(&self, path: &[u8]) -> Vec<u8> {
        let rest = path.strip_prefix(self.source.name.as_bytes()).unwrap_or(path);
        rest.strip_prefix(b"/").unwrap_or(rest).to_vec()
    }

    fn entry(&mut self, header: EntryHeader, flow: &mut Flow<'_>, sink: &mut SourceWriter<'_>) -> Result<(), PourError> {
        let path = header.path.to_bytes().unwrap_or_default();
        let below = self.below(&path);
        let part = (header.kind == EntryKind::File).then(|| parts::part_of(&self.source.kind, &below)).flatten();
        let (below, first_part) = match part {
            Some((file, 0)) => (file.to_vec(), true),
            _ => (below, false),
        };
        let wrong = |text: String| PourError::Read(ReadError::Archive(format!("{}: {text}", header.path.path)));
        let mut entry = entries::entry(&header, &below).map_err(wrong)?;
        let target = entry.target.clone();
        if entry.kind == Kind::Hardlink {
            entry.target = self.below(&target);
        }
        if entry.kind == Kind::Hardlink && matches!(self.what, What::Below(..)) && self.what.has(&path) && !self.what.has(&target) {
            self.lacking.insert(target);
        }
        if entry.kind == Kind::Directory && entry.path.is_empty() {
            self.root = Some(entry);
            return flow.advance();
        }
        let may_be_alone = self.source.is_one_file() && entry.kind == Kind::File && entry.path == self.source.file_name();
        if !may_be_alone {
            self.end(sink)?;
        }
        if entry.kind != Kind::File {
            sink.push(entry)?;
            return flow.advance();
        }
        let shown = if first_part { [self.source.name.as_bytes(), b"/", &entry.path].concat() } else { path };
        let contents = self.contents(&shown, &entry, &header, first_part, flow, sink)?;
        if let Some(root) = self.root.take() {
            match entries::is_made_up(&root, &entry) && !flow.has_more_of(self.source) {
                true => entry.path.clear(),
                false => sink.push(root)?,
            }
        }
        match contents {
            Contents::Small(contents) => sink.push_small(entry, &contents)?,
            Contents::Large => sink.large_finish(entry)?,
            Contents::None(size) => sink.push(without_contents(entry, size))?,
        }
        Ok(())
    }

    /// The directory, when something else than one file follows, or nothing.
    fn end(&mut self, sink: &mut SourceWriter<'_>) -> Result<(), PourError> {
        match self.root.take() {
            Some(root) => Ok(sink.push(root)?),
            None => Ok(()),
        }
    }

    /// The contents of a file, which may stand in parts; moves on to what follows.
    fn contents(
        &self,
        shown: &[u8],
        entry: &Entry,
        header: &EntryHeader,
        first_part: bool,
        flow: &mut Flow<'_>,
        sink: &mut SourceWriter<'_>,
    ) -> Result<Contents, PourError> {
        let wanted = self.what.has(shown);
        let mut size = header.size;
        if wanted && size <= SMALL_FILE_BYTES && !first_part {
            let mut contents = vec![0; size as usize];
            let n = flow.fill(&mut contents)?;
            contents.truncate(n);
            flow.advance()?;
            return Ok(Contents::Small(contents));
        }
        if wanted {
            sink.large_begin()?;
            copy(flow, sink)?;
        }
        flow.advance()?;
        let mut number = 1;
        while first_part && self.is_part(flow, &entry.path, number) {
            size += flow.next.as_ref().map_or(0, |n| n.size);
            if wanted {
                copy(flow, sink)?;
            }
            flow.advance()?;
            number += 1;
        }
        Ok(if wanted { Contents::Large } else { Contents::None(size) })
    }

    /// Whether the next entry is this part of a file.
    fn is_part(&self, flow: &Flow<'_>, file: &[u8], number: u64) -> bool {
        let Some(next) = flow.next.as_ref().filter(|n| n.kind == EntryKind::File) else { return false };
        let path = next.path.to_bytes().unwrap_or_default();
        let is_of_it = path.starts_with(&[self.source.name.as_bytes(), b"/"].concat());
        is_of_it && parts::part_of(&self.source.kind, &self.below(&path)) == Some((file, number))
    }
}

/// An entry that says how long its contents are, and has them nowhere.
fn without_contents(mut entry: Entry, size: u64) -> Entry {
    let mut left = size;
    let mut segments = Vec::new();
    while left > 0 {
        let len = left.min(MAX_CHUNK_BYTES as u64) as u32;
        segments.push(Segment::Data(Extent { chunk: NOWHERE, offset: 0, len }));
        left -= u64::from(len);
    }
    entry.size = size;
    entry.content = Content { hash: [0; 16], segments };
    entry
}

/// The contents of the file that came last.
fn copy(flow: &mut Flow<'_>, sink: &mut SourceWriter<'_>) -> Result<(), PourError> {
    let mut buffer = vec![0; HOLE_BYTES];
    let zeros = vec![0; HOLE_BYTES];
    let mut hole = 0;
    loop {
        let n = flow.fill(&mut buffer)?;
        let bytes = buffer.get(..n).unwrap_or_default();
        if bytes == zeros {
            hole += n as u64;
            continue;
        }
        if hole > 0 {
            sink.large_hole(std::mem::take(&mut hole))?;
        }
        if n == 0 {
            return Ok(());
        }
        sink.large_bytes(bytes)?;
    }
}
