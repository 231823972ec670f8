//! What tells an unchanged database without reading it: sizes, times and inodes of the file and its `-wal`, and the
//! headers of both with change counter and salts.

use std::fs::{File, Metadata};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::database::{Database, Header};
use crate::source::SourceError;

const WAL_HEADER_BYTES: u64 = 32;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Signature {
    #[serde(flatten)]
    state: State,
    /// When it was taken, the last change was so long ago that the next one had to give other times: file systems count
    /// time in ticks. Without that an equal signature later means nothing.
    #[serde(skip)]
    settled: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    main: FileSignature,
    header: Vec<u8>,
    wal: Option<(FileSignature, Vec<u8>)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileSignature {
    device: u64,
    inode: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Signature {
    /// Opens the `-wal` file only, on which SQLite has no locks that closing it could drop.
    pub fn take(database: &Database, header: &Header) -> Result<Self, SourceError> {
        Self::with(database, header.to_vec())
    }

    /// As it is now, with the header as it was: when the file's times did not change, neither did its header.
    pub fn again(&self, database: &Database) -> Result<Self, SourceError> {
        Self::with(database, self.state.header.clone())
    }

    fn with(database: &Database, header: Vec<u8>) -> Result<Self, SourceError> {
        let main = FileSignature::of(&database.stat()?);
        let wal = wal(database)
            .map_err(|e| SourceError::Failed(format!("the -wal file of the database {} cannot be read: {e}", database.shown())))?;
        let settled = main.is_settled() && wal.as_ref().is_none_or(|(file, _)| file.is_settled());
        Ok(Self { state: State { main, header, wal }, settled })
    }

    pub fn is_settled(&self) -> bool {
        self.settled
    }

    pub fn same(&self, other: &Self) -> bool {
        self.state == other.state
    }

    pub fn same_main_file(&self, other: &Self) -> bool {
        self.state.main == other.state.main
    }

    pub fn has_wal(&self) -> bool {
        self.state.wal.is_some()
    }

    pub fn wal_is_empty(&self) -> bool {
        self.state.wal.as_ref().is_none_or(|(file, _)| file.size == 0)
    }
}

impl FileSignature {
    fn of(stat: &Metadata) -> Self {
        Self {
            device: stat.dev(),
            inode: stat.ino(),
            size: stat.size(),
            mtime: (stat.mtime(), stat.mtime_nsec()),
            ctime: (stat.ctime(), stat.ctime_nsec()),
        }
    }

    fn is_settled(&self) -> bool {
        // Nobody can set the change time; a clock that was set back makes it unsettled for a while.
        let (seconds, nanoseconds) = self.ctime;
        // A whole second is most likely a file system that counts in seconds, or in two.
        let tick = Duration::from_millis(if nanoseconds == 0 { 2500 } else { 100 });
        let changed = Duration::new(seconds.try_into().unwrap_or(0), nanoseconds.try_into().unwrap_or(0));
        SystemTime::now().duration_since(UNIX_EPOCH).is_ok_and(|now| changed + tick < now)
    }
}

fn wal(database: &Database) -> std::io::Result<Option<(FileSignature, Vec<u8>)>> {
    // Whatever else has that name is not opened: SQLite will say what it thinks of it.
    let path = database.beside("-wal");
    let stat = match path.symlink_metadata() {
        Ok(stat) if stat.is_file() => stat,
        Ok(_) => return Ok(None),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut header = Vec::new();
    match File::open(&path) {
        Ok(file) => file.take(WAL_HEADER_BYTES).read_to_end(&mut header)?,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    // Opening a -wal as root makes SQLite set its owner, and with it the change time.
    let file = FileSignature::of(&stat);
    Ok(Some((FileSignature { ctime: file.mtime, ..file }, header)))
}
