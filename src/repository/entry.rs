//! What a backup holds: entries in path order, their contents as extents of chunks.

use std::cmp::Ordering;
use std::fmt;

pub use super::payload::Texture;

/// Keyed BLAKE3 of a chunk's plaintext.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId(pub [u8; 32]);

/// Chunks are never longer, so that a reader can bound what it allocates.
pub const MAX_CHUNK_BYTES: usize = 4 << 20;
/// Files up to this size are gathered with their neighbours into shared chunks.
pub const SMALL_FILE_BYTES: u64 = 128 << 10;
/// About how long the chunks are that gather small files or database pages.
pub const GATHER_BYTES: usize = 1 << 20;

/// A range of a chunk's plaintext.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Extent {
    pub chunk: ChunkId,
    pub offset: u32,
    pub len: u32,
}

/// The next piece of a file's contents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Segment {
    Data(Extent),
    /// Zeros that take no space.
    Hole(u64),
}

impl Segment {
    /// Bytes of the file it covers.
    pub fn len(&self) -> u64 {
        match self {
            Segment::Data(e) => u64::from(e.len),
            Segment::Hole(n) => *n,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A point in time as file systems keep it.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Time {
    pub seconds: i64,
    /// 0 to 999,999,999
    pub nanoseconds: u32,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum Kind {
    #[default]
    File,
    Directory,
    Symlink,
    /// Another name of the file at `Entry::target` (a path in the same source, earlier in path order).
    Hardlink,
}

/// The contents of a regular file: its segments in order, their lengths summing to the file's size.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Content {
    /// Equal for equal contents within a repository and a way of cutting; 16 zero bytes when not known.
    pub hash: [u8; 16],
    pub segments: Vec<Segment>,
}

/// One file, directory or link of a source.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Relative to the source's root, without a leading slash; empty is the root itself.
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Permission bits, 0o7777 at most.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Time,
    /// With `inode` and `size` it tells whether a file is as it was.
    pub ctime: Time,
    pub inode: u64,
    pub size: u64,
    /// Symlink target, or the first name of a hard-linked file.
    pub target: Vec<u8>,
    /// Extended attributes by name, ACLs among them, sorted by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// The file changed while it was read, also on the second try.
    pub changed_while_read: bool,
    pub content: Content,
}

/// Path order: component by component, so that a directory is followed by what is in it (`/` sorts below any other byte).
pub fn path_order(a: &[u8], b: &[u8]) -> Ordering {
    let common = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    let rank = |p: &[u8]| match p.get(common) {
        None => 0u16,
        Some(b'/') => 1,
        Some(&c) => 2 + u16::from(c),
    };
    rank(a).cmp(&rank(b))
}

#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    #[error("cancelled")]
    Cancelled,
    /// The storage did not do what it was asked; the text says what was tried, on what and why.
    #[error("{0}")]
    Storage(String),
    /// The repository failed; the text says what was tried, on what and why.
    #[error("{0}")]
    Repository(String),
}

/// Where a source puts what it captures. Entries must come in path order ([`path_order`]), each path once.
pub trait EntrySink {
    /// An entry without contents to store: a directory, a link, an empty file, or a file whose segments all lie in chunks
    /// the sink already has (an unchanged file, or one the source cut itself through [`EntrySink::store`]).
    fn push(&mut self, entry: Entry) -> Result<(), SinkError>;

    /// A regular file of at most [`SMALL_FILE_BYTES`] with its whole contents; the sink gathers it with its neighbours
    /// and fills in `content` and `size`.
    fn push_small(&mut self, entry: Entry, contents: &[u8]) -> Result<(), SinkError>;

    /// Where the sink gathers: `want` bytes of the next small file (at most [`SMALL_FILE_BYTES`]) may be appended there, and are its contents if
    /// [`EntrySink::push_small_appended`] comes next; if anything else does they are forgotten. None where the sink has no such memory.
    fn small_memory(&mut self, _want: usize) -> Option<&mut Vec<u8>> {
        None
    }

    /// [`EntrySink::push_small`] with the contents that were appended to [`EntrySink::small_memory`].
    fn push_small_appended(&mut self, _entry: Entry) -> Result<(), SinkError> {
        Err(SinkError::Repository("contents lie in memory that the sink does not have; this is a bug".into()))
    }

    /// The source came to a path, and may push its entry next.
    fn arrives(&mut self, _path: &[u8]) -> Result<(), SinkError> {
        Ok(())
    }

    /// Whether the contents of the file it came to are wanted, which has this size in bytes and so many names; else (a sink that only compares may know
    /// enough) the entry is to be pushed without them.
    fn wants(&mut self, _size: u64, _names: u64) -> bool {
        true
    }

    /// Whether contents are passed on while they come. What came cannot be taken back then, every byte has to come (holes among them), and of a file
    /// that becomes longer or shorter as many bytes are kept as were said.
    fn passes_on(&self) -> bool {
        false
    }

    /// Contents come next, in order and once, of the entry that is pushed or finished after them under the same path; `size` as far as it is known, in
    /// bytes. To be called where [`EntrySink::passes_on`].
    fn begins(&mut self, _entry: &Entry, _size: Option<u64>) -> Result<(), SinkError> {
        Ok(())
    }

    /// What is at a path, and all that is in it, could not be read: nothing is known of it.
    fn left_out(&mut self, _path: &[u8]) -> Result<(), SinkError> {
        Ok(())
    }

    /// Starts the contents of a large file. Follow with `large_space` and `large_filled`, `large_hole`, and `large_finish`.
    fn large_begin(&mut self) -> Result<(), SinkError>;
    /// Where the next bytes are to be read to: at most `want` of them (not 0), at least one.
    fn large_space(&mut self, want: usize) -> &mut [u8];
    /// So many bytes were read into the space.
    fn large_filled(&mut self, len: usize) -> Result<(), SinkError>;
    /// The next bytes, from where they are.
    fn large_bytes(&mut self, mut bytes: &[u8]) -> Result<(), SinkError> {
        while !bytes.is_empty() {
            let space = self.large_space(bytes.len());
            let (now, later) = bytes.split_at(space.len().min(bytes.len()));
            space.get_mut(..now.len()).unwrap_or_default().copy_from_slice(now);
            self.large_filled(now.len())?;
            bytes = later;
        }
        Ok(())
    }
    /// Whether the rest of the contents matters; else `large_finish` may follow early.
    fn large_goes_on(&self) -> bool {
        true
    }
    /// The next `len` bytes are a hole.
    fn large_hole(&mut self, len: u64) -> Result<(), SinkError>;
    /// Ends the contents and pushes the entry with `content` and `size` filled in. To throw the contents away (the file
    /// changed, it is read again) just call `large_begin` again instead.
    fn large_finish(&mut self, entry: Entry) -> Result<(), SinkError>;

    /// Stores a chunk that the source cut itself, at most [`MAX_CHUNK_BYTES`]; a chunk the repository has costs nothing.
    fn store(&mut self, chunk: &[u8], texture: Texture) -> Result<ChunkId, SinkError>;

    /// The plaintext length of a chunk of the repository (or of this backup so far), None when it is not there: then it
    /// must not be referred to.
    fn chunk_len(&mut self, id: &ChunkId) -> Result<Option<u32>, SinkError>;

    /// Whether all chunks of these segments are there, so that they may be referred to.
    fn has_all(&mut self, segments: &[Segment]) -> Result<bool, SinkError> {
        for segment in segments {
            if let Segment::Data(extent) = segment
                && self.chunk_len(&extent.chunk)?.is_none()
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The plaintext of a chunk of the repository, verified.
    fn fetch(&mut self, id: &ChunkId) -> Result<Vec<u8>, SinkError>;
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkId({self})")
    }
}
