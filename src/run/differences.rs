//! What differs between a backup and the live files it was made of, without storing anything.
//!
//! In: the walk of the source, and the backup's entries. Out: one difference after the other, in path order. A file that has the backup's size,
//! mtime, ctime and inode is equal; any other is read and held against the chunks of the backup one by one, so that neither another way of
//! cutting (a copy's chunks are its original's) nor another layout of holes looks like other contents. A chunk itself is fetched only where its
//! id does not tell.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::OFlags;

use super::live::Failure;
use super::restore::find;
use super::selection::is_at_or_below;
use crate::config::FilesSource;
use crate::repository::entry::{Extent, MAX_CHUNK_BYTES, Texture, path_order};
use crate::repository::{ChunkId, Entry, EntrySink, Kind, ManifestSource, Repository, RepositoryError, Segment, SinkError, SourceReader};
use crate::source::{Context, Previous, SourceError, files, way};

/// Chunks of the backup that are kept for the next small files (about 1 MiB each).
const MAX_CHUNKS: usize = 4;

/// One path at which the live source and the backup differ.
#[derive(Debug, Clone)]
pub struct Difference {
    /// The source's own path; empty is its root.
    pub path: Vec<u8>,
    /// With all its segments. A hard link whose first name is not looked at is the file itself here.
    pub backup: Option<Entry>,
    /// Without contents.
    pub live: Option<Entry>,
    pub what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// Only in the backup. `hidden`: something is at the path that the source does not capture: it is excluded, in a cache or on another file
    /// system, or a socket, a pipe or a device.
    Missing { hidden: bool },
    /// Only live.
    Extra,
    /// Another kind, other contents or another target.
    Contents,
    /// The same contents; another mode, owner or mtime, or other extended attributes.
    Metadata,
    /// What is live could not be read: nothing is known of it and of what is in it. The report names it and the reason.
    Unreadable,
}

/// How many of each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub missing: u64,
    pub extra: u64,
    pub contents: u64,
    pub metadata: u64,
    pub unreadable: u64,
    pub equal: u64,
}

/// Calls `each` for every difference at or below `paths` (own paths of the source; none means everything), in path order.
///
/// A source that is not there at all differs by everything and is no error. What cannot be read is [`What::Unreadable`] and counted as left out by
/// the context's report. Extended attributes that cannot be read are only told there. Memory grows with the files that have several names and
/// with nothing else. Errors are those of the repository, a source that is neither a directory nor a file, a cancel, and what `each` returns.
pub fn of_files(
    repository: &Arc<Repository>,
    of: &ManifestSource,
    source: &FilesSource,
    paths: &[Vec<u8>],
    context: &Context<'_>,
    each: &mut dyn FnMut(Difference) -> Result<(), Failure>,
) -> Result<Counts, Failure> {
    let paths = outermost(paths);
    let backup = RefCell::new(Backup { entries: Subtrees::new(repository, of, &paths), ahead: VecDeque::new(), given: 0 });
    let mut comparer = Comparer {
        repository,
        paths: &paths,
        root: root(&source.path),
        backup: &backup,
        each,
        failure: None,
        counts: Counts::default(),
        unread: None,
        linked: HashMap::new(),
        at: Vec::new(),
        reading: Reading::default(),
        space: Vec::new(),
        chunks: VecDeque::new(),
    };
    let is_gone = std::fs::symlink_metadata(&source.path).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound);
    let looked = match is_gone {
        true => Ok(()),
        false => files::look(source, &paths, &mut Given(&backup), &mut comparer, context),
    };
    let ended = looked.and_then(|()| Ok(comparer.missing_before(None)?));
    match (comparer.failure, ended) {
        (Some(failure), _) => Err(failure),
        (None, Ok(())) => Ok(comparer.counts),
        (None, Err(SourceError::Cancelled | SourceError::Sink(SinkError::Cancelled))) => Err(Failure::Cancelled),
        (None, Err(SourceError::Sink(SinkError::Storage(text)))) => Err(Failure::Storage(text)),
        (None, Err(e)) => Err(Failure::Failed(e.to_string())),
    }
}

/// The paths in path order without those inside another; the root when there are none.
fn outermost(paths: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut sorted = paths.to_vec();
    sorted.sort_by(|a, b| path_order(a, b));
    let mut kept: Vec<Vec<u8>> = Vec::new();
    for path in sorted {
        if !kept.last().is_some_and(|k| is_at_or_below(&path, k)) {
            kept.push(path);
        }
    }
    if kept.is_empty() {
        kept.push(Vec::new());
    }
    kept
}

/// Whether a path is one of these (see [`outermost`]) or in one.
fn is_in_one(path: &[u8], paths: &[Vec<u8>]) -> bool {
    let after = paths.partition_point(|p| path_order(p, path).is_le());
    after.checked_sub(1).and_then(|last| paths.get(last)).is_some_and(|last| is_at_or_below(path, last))
}

/// The source's directory, to look into; None when it is none.
fn root(path: &Path) -> Option<OwnedFd> {
    way::open(&way::resolve(path).ok()?, OFlags::PATH | OFlags::DIRECTORY).ok()
}

/// The entries of a source at or below some paths, in path order.
struct Subtrees<'a> {
    repository: &'a Arc<Repository>,
    source: &'a ManifestSource,
    paths: &'a [Vec<u8>],
    next: usize,
    reader: Option<SourceReader>,
    /// First names that are not among the entries, and the name that stands for each.
    outside: HashMap<Vec<u8>, Vec<u8>>,
}

impl<'a> Subtrees<'a> {
    fn new(repository: &'a Arc<Repository>, source: &'a ManifestSource, paths: &'a [Vec<u8>]) -> Self {
        Self { repository, source, paths, next: 0, reader: None, outside: HashMap::new() }
    }

    fn next_entry(&mut self) -> Result<Option<Entry>, RepositoryError> {
        while let Some(path) = self.paths.get(self.next) {
            let reader = self.reader.get_or_insert_with(|| SourceReader::starting_at(self.repository.clone(), self.source, path));
            match reader.next_paged()? {
                Some(paged) if is_at_or_below(&paged.entry.path, path) => {
                    let entry = reader.whole(paged)?;
                    return self.with_first_name(entry).map(Some);
                }
                Some(paged) if path_order(&paged.entry.path, path).is_lt() => {}
                _ => {
                    self.reader = None;
                    self.next += 1;
                }
            }
        }
        Ok(None)
    }

    /// The first of several names whose file is elsewhere becomes that file, the others its other names: so the walk sees them, too.
    fn with_first_name(&mut self, mut entry: Entry) -> Result<Entry, RepositoryError> {
        if entry.kind != Kind::Hardlink || is_in_one(&entry.target, self.paths) {
            return Ok(entry);
        }
        if let Some(first) = self.outside.get(&entry.target) {
            entry.target.clone_from(first);
            return Ok(entry);
        }
        let Some(file) = find(self.repository, self.source, &entry.target)? else { return Ok(entry) };
        self.outside.insert(entry.target, entry.path.clone());
        Ok(Entry { path: entry.path, ..file })
    }
}

/// The backup's entries, read once for two: the walk asks what was at its next path, the comparison follows behind.
struct Backup<'a> {
    entries: Subtrees<'a>,
    /// Read and not compared yet: two at the most, for the comparison comes to each path before the walk asks for it.
    ahead: VecDeque<Entry>,
    /// So many of those the walk has been given.
    given: usize,
}

impl Backup<'_> {
    fn read(&mut self) -> Result<bool, RepositoryError> {
        let next = self.entries.next_entry()?;
        let is_more = next.is_some();
        self.ahead.extend(next);
        Ok(is_more)
    }

    /// The next one to compare, as far as it was read.
    fn next(&self) -> Option<&Entry> {
        self.ahead.front()
    }

    /// Takes the next one to compare, if `is_wanted` says so.
    fn take_if(&mut self, is_wanted: impl Fn(&Entry) -> bool) -> Result<Option<Entry>, RepositoryError> {
        if self.ahead.is_empty() {
            self.read()?;
        }
        let taken = if self.next().is_some_and(is_wanted) { self.ahead.pop_front() } else { None };
        self.given = self.given.saturating_sub(usize::from(taken.is_some()));
        Ok(taken)
    }
}

/// The walk's side of it.
struct Given<'b, 'a>(&'b RefCell<Backup<'a>>);

impl Previous for Given<'_, '_> {
    fn next_entry(&mut self) -> Result<Option<Entry>, SinkError> {
        let mut backup = self.0.borrow_mut();
        if backup.given == backup.ahead.len() && !backup.read()? {
            return Ok(None);
        }
        backup.given += 1;
        Ok(backup.ahead.get(backup.given - 1).cloned())
    }
}

/// A file's contents on their way past the segments of the backup's.
#[derive(Default)]
struct Reading {
    backup: Entry,
    /// The live file has several names.
    is_linked: bool,
    is_same: bool,
    /// The segment that is compared, and how far into it.
    segment: usize,
    done: u64,
    /// What of it came, if it is data.
    bytes: Vec<u8>,
}

struct Comparer<'a> {
    repository: &'a Arc<Repository>,
    paths: &'a [Vec<u8>],
    root: Option<OwnedFd>,
    backup: &'a RefCell<Backup<'a>>,
    each: &'a mut dyn FnMut(Difference) -> Result<(), Failure>,
    /// Of `each`: then the walk ends.
    failure: Option<Failure>,
    counts: Counts,
    /// What could not be read, last.
    unread: Option<Vec<u8>>,
    /// Files with several names that differ, by their first one.
    linked: HashMap<Vec<u8>, What>,
    /// Where the walk is.
    at: Vec<u8>,
    reading: Reading,
    space: Vec<u8>,
    chunks: VecDeque<(ChunkId, Vec<u8>)>,
}

impl Comparer<'_> {
    fn is_wanted(&self, path: &[u8]) -> bool {
        is_in_one(path, self.paths)
    }

    fn tell(&mut self, path: Vec<u8>, backup: Option<Entry>, live: Option<Entry>, what: What) -> Result<(), SinkError> {
        match what {
            What::Missing { .. } => self.counts.missing += 1,
            What::Extra => self.counts.extra += 1,
            What::Contents => self.counts.contents += 1,
            What::Metadata => self.counts.metadata += 1,
            What::Unreadable => self.counts.unreadable += 1,
        }
        let live = live.map(|live| Entry { content: Default::default(), ..live });
        (self.each)(Difference { path, backup, live, what }).map_err(|failure| {
            self.failure = Some(failure);
            SinkError::Cancelled
        })
    }

    /// What the backup has before a path (anywhere, without one) is not live; but nothing is known of what could not be read.
    fn missing_before(&mut self, path: Option<&[u8]>) -> Result<(), SinkError> {
        loop {
            let is_before = |entry: &Entry| path.is_none_or(|path| path_order(&entry.path, path).is_lt());
            let Some(entry) = self.backup.borrow_mut().take_if(is_before)? else { return Ok(()) };
            if self.unread.as_ref().is_some_and(|unread| is_at_or_below(&entry.path, unread)) {
                continue;
            }
            let hidden = self.root.as_ref().is_some_and(|root| !entry.path.is_empty() && is_there(root, &entry.path));
            self.tell(entry.path.clone(), Some(entry), None, What::Missing { hidden })?;
        }
    }

    fn backup_at(&mut self, path: &[u8]) -> Result<Option<Entry>, SinkError> {
        self.missing_before(Some(path))?;
        Ok(self.backup.borrow_mut().take_if(|entry| entry.path == path)?)
    }

    /// A live entry.
    fn comes_live(&mut self, live: Entry, has_same_contents: bool) -> Result<(), SinkError> {
        if !self.is_wanted(&live.path) {
            return Ok(());
        }
        let backup = self.backup_at(&live.path)?;
        // A directory whose names could not be read.
        if self.unread.as_ref() == Some(&live.path) {
            return Ok(());
        }
        let Some(backup) = backup else { return self.tell(live.path.clone(), None, Some(live), What::Extra) };
        match self.what_differs(&backup, &live, has_same_contents) {
            Some(what) => {
                if live.kind == Kind::File && self.reading.is_linked {
                    self.linked.insert(live.path.clone(), what);
                }
                self.tell(live.path.clone(), Some(backup), Some(live), what)
            }
            None => {
                self.counts.equal += 1;
                Ok(())
            }
        }
    }

    fn what_differs(&self, backup: &Entry, live: &Entry, has_same_contents: bool) -> Option<What> {
        if backup.kind != live.kind || backup.target != live.target || (live.kind == Kind::File && !has_same_contents) {
            return Some(What::Contents);
        }
        if live.kind == Kind::Hardlink {
            // Its attributes are its file's.
            return self.linked.get(&live.target).copied();
        }
        let differs = (backup.mode, backup.uid, backup.gid, backup.mtime) != (live.mode, live.uid, live.gid, live.mtime);
        (differs || backup.xattrs != live.xattrs).then_some(What::Metadata)
    }

    fn start(&mut self) {
        let Reading { segment, done, is_same, bytes, .. } = &mut self.reading;
        (*segment, *done, *is_same) = (0, 0, true);
        bytes.clear();
    }

    /// The next bytes of the live file.
    fn data(&mut self, mut bytes: &[u8]) -> Result<(), SinkError> {
        while self.reading.is_same && !bytes.is_empty() {
            let reading = &mut self.reading;
            let Some(segment) = reading.backup.content.segments.get(reading.segment).copied() else {
                reading.is_same = false;
                return Ok(());
            };
            let (now, later) = bytes.split_at(bytes.len().min(usize::try_from(segment.len() - reading.done).unwrap_or(usize::MAX)));
            bytes = later;
            match segment {
                Segment::Hole(_) => reading.is_same = now.iter().all(|b| *b == 0),
                Segment::Data(_) => reading.bytes.extend_from_slice(now),
            }
            self.advance(segment, now.len() as u64)?;
        }
        Ok(())
    }

    /// The next so many bytes of the live file are zeros.
    fn zeros(&mut self, mut len: u64) -> Result<(), SinkError> {
        while self.reading.is_same && len > 0 {
            let reading = &mut self.reading;
            let Some(segment) = reading.backup.content.segments.get(reading.segment).copied() else {
                reading.is_same = false;
                return Ok(());
            };
            let now = len.min(segment.len() - reading.done);
            len -= now;
            if matches!(segment, Segment::Data(_)) {
                // No longer than a chunk: advance sees to it.
                reading.bytes.resize(reading.bytes.len() + now.min(MAX_CHUNK_BYTES as u64) as usize, 0);
            }
            self.advance(segment, now)?;
        }
        Ok(())
    }

    /// So much more of a segment came; compares it when it is whole.
    fn advance(&mut self, segment: Segment, len: u64) -> Result<(), SinkError> {
        self.reading.done += len;
        if self.reading.done < segment.len() {
            return Ok(());
        }
        (self.reading.segment, self.reading.done) = (self.reading.segment + 1, 0);
        if let Segment::Data(extent) = segment {
            let bytes = std::mem::take(&mut self.reading.bytes);
            self.reading.is_same &= self.is_extent(&extent, &bytes)?;
            self.reading.bytes = bytes;
            self.reading.bytes.clear();
        }
        Ok(())
    }

    /// Whether these are the bytes of an extent.
    fn is_extent(&mut self, extent: &Extent, bytes: &[u8]) -> Result<bool, SinkError> {
        if extent.offset == 0 {
            if self.repository.chunk_id(bytes) == extent.chunk {
                return Ok(true);
            }
            if self.repository.lookup(&extent.chunk)?.is_some_and(|at| at.len == extent.len) {
                return Ok(false);
            }
        }
        if !self.chunks.iter().any(|(id, _)| *id == extent.chunk) {
            let chunk = self.repository.read_chunk(&extent.chunk)?;
            self.chunks.truncate(MAX_CHUNKS - 1);
            self.chunks.push_front((extent.chunk, chunk));
        }
        let chunk = self.chunks.iter().find(|(id, _)| *id == extent.chunk).map(|(_, bytes)| bytes.as_slice()).unwrap_or_default();
        Ok(chunk.get(extent.offset as usize..extent.offset as usize + extent.len as usize) == Some(bytes))
    }

    /// Whether all of the backup's contents came and nothing else.
    fn is_whole(&self, live: &Entry) -> bool {
        let reading = &self.reading;
        reading.is_same && reading.done == 0 && reading.segment == reading.backup.content.segments.len() && !live.changed_while_read
    }
}

/// Whether anything stands at a path, reached through no symlink.
fn is_there(root: &OwnedFd, path: &[u8]) -> bool {
    keepd_writer::open_beneath(root, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC).is_ok()
}

fn stores_nothing() -> SinkError {
    SinkError::Repository("a comparison was given something to store; this is a bug".into())
}

impl EntrySink for Comparer<'_> {
    /// A directory, a link, a file that is as it was, or one whose contents were not wanted.
    fn push(&mut self, entry: Entry) -> Result<(), SinkError> {
        let is_as_it_was =
            self.backup.borrow().next().is_some_and(|b| (&b.path, b.size, &b.content) == (&entry.path, entry.size, &entry.content));
        self.comes_live(entry, is_as_it_was)
    }

    fn push_small(&mut self, mut entry: Entry, contents: &[u8]) -> Result<(), SinkError> {
        entry.size = contents.len() as u64;
        // A copy's hashes are those of its original, so that another one says nothing.
        let backup = &self.reading.backup;
        let is_known = !contents.is_empty() && backup.size == entry.size && backup.content.hash == self.repository.content_hash(contents);
        let is_same = match is_known && !entry.changed_while_read {
            true => true,
            false => {
                self.start();
                self.data(contents)?;
                self.is_whole(&entry)
            }
        };
        self.comes_live(entry, is_same)
    }

    fn arrives(&mut self, path: &[u8]) -> Result<(), SinkError> {
        self.missing_before(Some(path))?;
        self.reading.is_linked = false;
        self.at = path.to_vec();
        Ok(())
    }

    fn wants(&mut self, size: u64, names: u64) -> bool {
        self.reading.is_linked = names > 1;
        let backup = self.backup.borrow();
        let found = backup.next().filter(|e| e.path == self.at && e.kind == Kind::File && e.size == size);
        // A chunk is never longer: an extent that is comes of damage, and its bytes are not gathered.
        let is_sound = |e: &&Entry| e.content.segments.iter().all(|s| matches!(s, Segment::Hole(_)) || s.len() <= MAX_CHUNK_BYTES as u64);
        let found = found.filter(is_sound).cloned();
        let is_wanted = found.is_some();
        self.reading.backup = found.unwrap_or_default();
        is_wanted
    }

    fn left_out(&mut self, path: &[u8]) -> Result<(), SinkError> {
        let backup = self.backup_at(path)?;
        self.unread = Some(path.to_vec());
        self.tell(path.to_vec(), backup, None, What::Unreadable)
    }

    fn large_begin(&mut self) -> Result<(), SinkError> {
        self.start();
        Ok(())
    }

    fn large_space(&mut self, want: usize) -> &mut [u8] {
        if self.space.len() < want {
            self.space.resize(want, 0);
        }
        self.space.get_mut(..want).unwrap_or_default()
    }

    fn large_filled(&mut self, len: usize) -> Result<(), SinkError> {
        let space = std::mem::take(&mut self.space);
        let compared = self.data(space.get(..len).unwrap_or_default());
        self.space = space;
        compared
    }

    fn large_goes_on(&self) -> bool {
        self.reading.is_same
    }

    fn large_hole(&mut self, len: u64) -> Result<(), SinkError> {
        self.zeros(len)
    }

    fn large_finish(&mut self, mut entry: Entry) -> Result<(), SinkError> {
        let is_same = self.is_whole(&entry);
        // Contents that differ early were not read to their end.
        entry.size = self.reading.backup.size;
        self.comes_live(entry, is_same)
    }

    fn store(&mut self, _: &[u8], _: Texture) -> Result<ChunkId, SinkError> {
        Err(stores_nothing())
    }

    fn chunk_len(&mut self, _: &ChunkId) -> Result<Option<u32>, SinkError> {
        Ok(None)
    }

    /// Whether the repository still has the contents is not asked: they need not be read to know that they are the same.
    fn has_all(&mut self, _: &[Segment]) -> Result<bool, SinkError> {
        Ok(true)
    }

    fn fetch(&mut self, _: &ChunkId) -> Result<Vec<u8>, SinkError> {
        Err(stores_nothing())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::time::{Duration, SystemTime};

    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::repository::copy::copy_sources;
    use crate::repository::source_writer::SourceWriter;
    use crate::repository::test_world::{World, manifest, noise};
    use crate::repository::writer::Writer;
    use crate::source::Report;

    /// A directory, and its backup in a repository.
    struct Case {
        dir: tempfile::TempDir,
        source: FilesSource,
        world: World,
        repository: Arc<Repository>,
        of: ManifestSource,
    }

    impl Case {
        fn of(fill: impl FnOnce(&Path)) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("live");
            fs::create_dir(&path).unwrap();
            fill(&path);
            let source = FilesSource { path, exclude: vec![], one_file_system: false, exclude_caches: true };
            Self::with(dir, source)
        }

        fn with(dir: tempfile::TempDir, source: FilesSource) -> Self {
            let world = World::new();
            let repository = world.seen_by("a", None);
            let mut writer = Writer::new(repository.clone(), CancellationToken::new()).unwrap();
            let mut sink = SourceWriter::new(&mut writer, "files", "files", b"/x", None);
            let (cancel, report) = (CancellationToken::new(), Report::default());
            let context = Context { cancel: &cancel, report: &report, work_dir: dir.path(), cache_dir: dir.path() };
            files::capture(&source, &mut Nothing, &mut sink, &context).unwrap();
            let of = sink.finish("{}".into()).unwrap().source;
            writer.flush().unwrap();
            Self { dir, source, world, repository, of }
        }

        fn live(&self) -> &Path {
            &self.source.path
        }

        fn all(&self, paths: &[&str]) -> (Vec<Difference>, Counts, Report) {
            let (cancel, report) = (CancellationToken::new(), Report::default());
            let context = Context { cancel: &cancel, report: &report, work_dir: self.dir.path(), cache_dir: self.dir.path() };
            let paths: Vec<Vec<u8>> = paths.iter().map(|p| p.as_bytes().to_vec()).collect();
            let mut found: Vec<Difference> = Vec::new();
            let counts = of_files(&self.repository, &self.of, &self.source, &paths, &context, &mut |difference| {
                if let Some(last) = found.last() {
                    assert!(path_order(&last.path, &difference.path).is_lt());
                }
                found.push(difference);
                Ok(())
            });
            (found, counts.unwrap(), report)
        }

        /// Without directories that only have another mtime.
        fn found(&self, paths: &[&str]) -> Vec<(String, What)> {
            let of = |d: &Difference| d.live.as_ref().is_none_or(|l| l.kind != Kind::Directory) || d.what != What::Metadata;
            let (all, _, _) = self.all(paths);
            all.into_iter().filter(of).map(|d| (String::from_utf8(d.path).unwrap(), d.what)).collect()
        }
    }

    struct Nothing;

    impl Previous for Nothing {
        fn next_entry(&mut self) -> Result<Option<Entry>, SinkError> {
            Ok(None)
        }
    }

    fn named(found: &[(&str, What)]) -> Vec<(String, What)> {
        found.iter().map(|(path, what)| ((*path).to_owned(), *what)).collect()
    }

    fn touch(path: &Path) {
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000)).unwrap();
    }

    fn tree(root: &Path) {
        fs::create_dir_all(root.join("a/deep")).unwrap();
        for n in 0..5 {
            fs::write(root.join(format!("a/small-{n}")), noise(3000, n)).unwrap();
        }
        fs::write(root.join("a/deep/two"), "two").unwrap();
        fs::write(root.join("a.txt"), "text").unwrap();
        fs::write(root.join("empty"), "").unwrap();
        fs::write(root.join("large"), noise(5 << 20, 77)).unwrap();
        fs::hard_link(root.join("a/small-1"), root.join("name-2")).unwrap();
        fs::hard_link(root.join("a/small-1"), root.join("name-3")).unwrap();
        symlink("a.txt", root.join("link")).unwrap();
        let sparse = fs::File::create(root.join("sparse")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&sparse, &noise(200_000, 5), 3 << 20).unwrap();
        sparse.set_len(9 << 20).unwrap();
    }

    const MISSING: What = What::Missing { hidden: false };
    const HIDDEN: What = What::Missing { hidden: true };

    #[test]
    fn what_did_not_change_is_equal_and_not_read() {
        let case = Case::of(tree);
        let (found, counts, report) = case.all(&[]);
        assert!(found.is_empty(), "{found:?}");
        assert_eq!((counts.equal, report.left_out_count()), (case.of.entries, 0));
    }

    #[test]
    fn every_kind_of_change_is_told() {
        let case = Case::of(tree);
        let live = case.live();
        fs::write(live.join("a/small-0"), noise(3000, 100)).unwrap();
        fs::write(live.join("a/small-2"), noise(2999, 2)).unwrap();
        fs::remove_file(live.join("a/small-3")).unwrap();
        fs::write(live.join("a/small-3b"), "new").unwrap();
        fs::set_permissions(live.join("a.txt"), fs::Permissions::from_mode(0o600)).unwrap();
        fs::remove_dir_all(live.join("a/deep")).unwrap();
        fs::write(live.join("empty"), "no more").unwrap();
        fs::remove_file(live.join("link")).unwrap();
        symlink("elsewhere", live.join("link")).unwrap();
        let mut large = noise(5 << 20, 77);
        large[4 << 20] ^= 1;
        fs::write(live.join("large"), large).unwrap();
        fs::remove_file(live.join("sparse")).unwrap();
        fs::create_dir_all(live.join("sparse/below")).unwrap();
        let (all, counts, _) = case.all(&[]);
        assert_eq!(
            case.found(&[]),
            named(&[
                ("a/deep", MISSING),
                ("a/deep/two", MISSING),
                ("a/small-0", What::Contents),
                ("a/small-2", What::Contents),
                ("a/small-3", MISSING),
                ("a/small-3b", What::Extra),
                ("a.txt", What::Metadata),
                ("empty", What::Contents),
                ("large", What::Contents),
                ("link", What::Contents),
                ("sparse", What::Contents),
                ("sparse/below", What::Extra),
            ])
        );
        assert_eq!((counts.missing, counts.extra, counts.contents), (3, 2, 6));
        let of = |path: &str| all.iter().find(|d| d.path == path.as_bytes()).unwrap();
        let sides = |path: &str| (of(path).backup.as_ref().map(|e| e.size), of(path).live.as_ref().map(|e| e.size));
        assert_eq!(sides("a/small-2"), (Some(3000), Some(2999)));
        assert_eq!(sides("a/small-3"), (Some(3000), None));
        assert_eq!(sides("a/small-3b"), (None, Some(3)));
        assert_eq!(sides("large"), (Some(5 << 20), Some(5 << 20)));
        assert!(!of("large").backup.as_ref().unwrap().content.segments.is_empty());
        assert_eq!(of("a.txt").live.as_ref().unwrap().mode, 0o600);
    }

    #[test]
    fn the_same_contents_with_another_mtime_are_read_and_equal() {
        let case = Case::of(tree);
        for name in ["a/small-0", "a/deep/two", "empty", "large", "sparse"] {
            touch(&case.live().join(name));
        }
        // The same zeros, but no holes any more.
        let whole = fs::read(case.live().join("sparse")).unwrap();
        fs::write(case.live().join("sparse"), whole).unwrap();
        let expected = ["a/deep/two", "a/small-0", "empty", "large", "sparse"].map(|name| (name, What::Metadata));
        assert_eq!(case.found(&[]), named(&expected));
        // And holes where there were zeros.
        let case = Case::of(|root| fs::write(root.join("zeros"), vec![0; 3 << 20]).unwrap());
        fs::File::create(case.live().join("zeros")).unwrap().set_len(3 << 20).unwrap();
        assert_eq!(case.found(&[]), named(&[("zeros", What::Metadata)]));
    }

    #[test]
    fn contents_that_changed_with_size_and_mtime_kept_differ() {
        let case = Case::of(tree);
        for (name, contents) in [("a/deep/two", b"TWO".to_vec()), ("large", noise(5 << 20, 78))] {
            let path = case.live().join(name);
            let mtime = fs::metadata(&path).unwrap().modified().unwrap();
            fs::write(&path, contents).unwrap();
            fs::File::options().write(true).open(&path).unwrap().set_modified(mtime).unwrap();
        }
        assert_eq!(case.found(&[]), named(&[("a/deep/two", What::Contents), ("large", What::Contents)]));
    }

    #[test]
    fn names_of_one_file_go_together() {
        let case = Case::of(tree);
        fs::write(case.live().join("name-3"), noise(3000, 9)).unwrap();
        let all = [("a/small-1", What::Contents), ("name-2", What::Contents), ("name-3", What::Contents)];
        assert_eq!(case.found(&[]), named(&all));
        // Also where the first name is not looked at.
        assert_eq!(case.found(&["name-2"]), named(&all[1..2]));
        assert_eq!(case.found(&["name-2", "name-3"]), named(&all[1..]));
        let case = Case::of(tree);
        assert_eq!(case.found(&["name-2", "name-3"]), []);
        fs::remove_file(case.live().join("name-2")).unwrap();
        fs::write(case.live().join("name-2"), noise(3000, 1)).unwrap();
        assert_eq!(case.found(&[]), named(&[("name-2", What::Contents)]), "no other name of the file any more");
    }

    #[test]
    fn only_what_is_asked_for_is_looked_at() {
        let case = Case::of(tree);
        fs::write(case.live().join("a/small-0"), "x").unwrap();
        fs::write(case.live().join("a.txt"), "x").unwrap();
        fs::write(case.live().join("a/deep/new"), "x").unwrap();
        assert_eq!(case.found(&["a/deep", "a/deep/new", "large"]), named(&[("a/deep/new", What::Extra)]));
        assert_eq!(case.found(&["a.txt"]), named(&[("a.txt", What::Contents)]));
        assert_eq!(case.found(&["not there"]), []);
        fs::remove_dir_all(case.live().join("a")).unwrap();
        fs::write(case.live().join("a"), "a file now").unwrap();
        assert_eq!(case.found(&["a/deep"]), named(&[("a/deep", MISSING), ("a/deep/two", MISSING)]));
    }

    #[test]
    fn what_is_left_out_is_no_difference_and_what_it_hides_is_said() {
        let mut case = Case::of(tree);
        case.source.exclude = vec!["small-0".into(), "new".into()];
        fs::write(case.live().join("new"), "x").unwrap();
        fs::create_dir_all(case.live().join("a/.keepd-restore-17/x")).unwrap();
        fs::write(case.live().join(".keepd-restore-x"), "x").unwrap();
        fs::remove_file(case.live().join("empty")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(case.live().join("empty")).unwrap();
        assert_eq!(case.found(&[]), named(&[("a/small-0", HIDDEN), ("empty", HIDDEN)]));
        // Not through a link.
        fs::remove_dir_all(case.live().join("a/deep")).unwrap();
        fs::create_dir(case.dir.path().join("outside")).unwrap();
        fs::write(case.dir.path().join("outside/two"), "two").unwrap();
        symlink(case.dir.path().join("outside"), case.live().join("a/deep")).unwrap();
        assert_eq!(case.found(&["a/deep"]), named(&[("a/deep", What::Contents), ("a/deep/two", MISSING)]));
    }

    #[test]
    fn a_source_that_is_gone_lacks_everything_and_one_file_is_fine() {
        let case = Case::of(tree);
        fs::rename(case.live(), case.dir.path().join("elsewhere")).unwrap();
        let (found, counts, _) = case.all(&[]);
        assert!(found.iter().all(|d| d.what == MISSING && d.live.is_none() && d.backup.is_some()));
        assert_eq!((counts.missing, counts.equal), (case.of.entries, 0));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("one");
        fs::write(&path, "one").unwrap();
        let case = Case::with(dir, FilesSource { path, ..case.source });
        assert_eq!(case.found(&[]), []);
        touch(case.live());
        assert_eq!(case.found(&[""]), named(&[("", What::Metadata)]));
        fs::write(case.live(), "two").unwrap();
        assert_eq!(case.found(&[]), named(&[("", What::Contents)]));
        fs::remove_file(case.live()).unwrap();
        assert_eq!(case.found(&[]), named(&[("", MISSING)]));
    }

    #[test]
    fn a_copy_is_compared_by_its_contents() {
        let case = Case::of(tree);
        let there = World::new();
        let repository = there.seen_by("b", None);
        let mut writer = Writer::new(repository.clone(), CancellationToken::new()).unwrap();
        let manifest = manifest(&case.repository, vec![case.of.clone()]);
        let sources = copy_sources(&case.repository, &manifest, None, &mut writer, &|_| {}, &CancellationToken::new()).unwrap();
        writer.flush().unwrap();
        let case = Case { repository, of: sources.into_iter().next().unwrap(), world: there, ..case };
        for name in ["a/small-0", "large", "sparse"] {
            touch(&case.live().join(name));
        }
        fs::write(case.live().join("a/small-2"), noise(3000, 100)).unwrap();
        assert_eq!(
            case.found(&[]),
            named(&[("a/small-0", What::Metadata), ("a/small-2", What::Contents), ("large", What::Metadata), ("sparse", What::Metadata)])
        );
        assert!(case.world.path().exists());
    }

    #[test]
    fn a_directory_that_cannot_be_read_is_not_an_empty_one() {
        // Root may list everything, so the test process must be somebody else.
        if rustix::process::geteuid().is_root() {
            let copy = tempfile::tempdir().unwrap();
            fs::set_permissions(copy.path(), fs::Permissions::from_mode(0o755)).unwrap();
            let exe = copy.path().join("test");
            fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
            let name = "run::differences::tests::a_directory_that_cannot_be_read_is_not_an_empty_one";
            let mut command = std::process::Command::new(&exe);
            std::os::unix::process::CommandExt::uid(&mut command, 65534);
            assert!(command.args([name, "--exact"]).current_dir("/").env("TMPDIR", "/tmp").status().unwrap().success());
            return;
        }
        let case = Case::of(tree);
        let deep = case.live().join("a/deep");
        touch(&case.live().join("a.txt"));
        fs::set_permissions(case.live().join("a.txt"), fs::Permissions::from_mode(0o000)).unwrap();
        for mode in [0o000, 0o300] {
            fs::set_permissions(&deep, fs::Permissions::from_mode(mode)).unwrap();
            let (found, counts, report) = case.all(&[]);
            fs::set_permissions(&deep, fs::Permissions::from_mode(0o700)).unwrap();
            let found: Vec<_> = found.iter().map(|d| (d.path.as_slice(), d.what, d.backup.is_some())).collect();
            assert_eq!(found, [(&b"a/deep"[..], What::Unreadable, true), (&b"a.txt"[..], What::Unreadable, true)]);
            assert_eq!((counts.unreadable, report.left_out_count()), (2, 2));
        }
    }

    #[test]
    fn an_error_of_the_caller_ends_it() {
        let case = Case::of(tree);
        fs::remove_dir_all(case.live().join("a")).unwrap();
        let (cancel, report) = (CancellationToken::new(), Report::default());
        let context = Context { cancel: &cancel, report: &report, work_dir: case.dir.path(), cache_dir: case.dir.path() };
        let mut calls = 0;
        let ended = of_files(&case.repository, &case.of, &case.source, &[], &context, &mut |_| {
            calls += 1;
            Err(Failure::Failed("enough".into()))
        });
        assert!(matches!(ended, Err(Failure::Failed(text)) if text == "enough"));
        assert_eq!(calls, 1);
    }
}
