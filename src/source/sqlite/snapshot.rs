//! One moment of a database, held still while it is read, in the way that hurts its writers least:
//!
//! - *live*, write-ahead log: a read transaction, which blocks nobody. A second connection at the same moment checks the
//!   database while the first one reads its pages.
//! - *frozen*, write-ahead log but no `-wal` file: nobody has the database open, and opening it would leave a `-wal` and a `-shm` behind,
//!   perhaps owned by a user that its application is not. So it is read without locks, and once more if it changed meanwhile.
//!   The same with a rollback journal when a look under a lock shows that nobody is in the middle of writing.
//! - *copied*, rollback journal: see [`super::copy`].

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use rusqlite::{Connection, ErrorCode};
use tokio_util::sync::CancellationToken;

use super::Tuning;
use super::alone;
use super::database::{Database, Header};
use super::signature::Signature;
use crate::source::SourceError;

/// Bytes 18 and 19 of the header of a database with a write-ahead log.
const WAL_VERSION: [u8; 2] = [2, 2];
const READ_BYTES: usize = 1 << 20;

pub struct Snapshot {
    pub page_size: u32,
    pub page_count: u64,
    pub pages: Pages,
    /// Sees the same moment, to check it on another thread; None: the pages' own connection has to, afterwards.
    pub inspector: Option<Connection>,
    /// Set when it is known that this and no other state was captured.
    pub signature: Option<Signature>,
    hold: Hold,
}

/// Where the pages are read from.
pub enum Pages {
    Table(Connection),
    Copy(File),
}

/// What keeps the moment.
enum Hold {
    /// The inodes of the database and its `-shm` that we have locks on; empty when locks cannot be looked at.
    Live(Vec<u64>),
    Frozen,
    Copied,
}

pub fn uses_wal(header: &Header) -> bool {
    header[18..20] == WAL_VERSION
}

/// What of the connection's database is to be read: page size and number of pages.
pub fn shape(connection: &Connection) -> rusqlite::Result<(u32, u64)> {
    let page_size = connection.pragma_query_value(None, "page_size", |row| row.get(0))?;
    let page_count: i64 = connection.pragma_query_value(None, "page_count", |row| row.get(0))?;
    Ok((page_size, page_count.unsigned_abs()))
}

impl Snapshot {
    /// Of a database with a write-ahead log. `before`: its signature just now.
    pub fn of_wal(
        database: &Database,
        before: Signature,
        frozen: bool,
        tuning: &Tuning,
        cancel: &CancellationToken,
    ) -> Result<Self, SourceError> {
        if frozen {
            return Self::frozen(database, before, tuning, cancel).map_err(|e| database.failed("opening it", &e));
        }
        match Self::live(database, &before, tuning, cancel) {
            Ok(snapshot) => Ok(snapshot),
            // Where nothing can be written (a read-only mount) there is no -shm; with nothing in the -wal it is not needed.
            Err(rusqlite::Error::SqliteFailure(code, _))
                if before.wal_is_empty() && before.is_settled() && matches!(code.code, ErrorCode::CannotOpen | ErrorCode::ReadOnly) =>
            {
                Self::frozen(database, before, tuning, cancel).map_err(|e| database.failed("opening it", &e))
            }
            Err(e) => Err(database.failed("beginning to read it", &e)),
        }
    }

    /// Of a database with a rollback journal that nobody writes to; None when somebody does.
    pub fn of_idle(
        database: &Database,
        before: &Signature,
        tuning: &Tuning,
        cancel: &CancellationToken,
    ) -> Result<Option<Self>, SourceError> {
        let failed = |e| database.failed("opening it", &e);
        // Under a shared lock the file is a committed state (and what a crash left behind is an error); it stays that state for as
        // long as nothing is written, lock or not.
        let look = database.open(false, tuning.busy, cancel).map_err(failed)?;
        begin(&look).map_err(failed)?;
        let idle = before.is_settled() && before.again(database)?.same_main_file(before);
        drop(look);
        if !idle {
            return Ok(None);
        }
        Self::frozen(database, before.clone(), tuning, cancel).map(Some).map_err(failed)
    }

    fn live(database: &Database, before: &Signature, tuning: &Tuning, cancel: &CancellationToken) -> rusqlite::Result<Self> {
        let reader = database.open(false, tuning.busy, cancel)?;
        let twin = database.open(false, tuning.busy, cancel)?;
        let mut inspector = None;
        for _ in 0..tuning.twin_tries {
            // The twin's data version changes when anybody commits between its two looks; the reader begins in between.
            let earlier = data_version(&twin)?;
            begin(&reader)?;
            begin(&twin)?;
            if data_version(&twin)? == earlier {
                inspector = Some(twin);
                break;
            }
            twin.execute_batch("ROLLBACK")?;
            reader.execute_batch("ROLLBACK")?;
        }
        if inspector.is_none() {
            begin(&reader)?;
        }
        let (page_size, page_count) = shape(&reader)?;
        // Nothing changed from before the transaction until after its begin: that is the state it sees.
        let unchanged = before.is_settled() && before.again(database).is_ok_and(|after| after.same(before));
        let signature = unchanged.then(|| before.clone());
        let files = [database.path.clone(), database.beside("-shm")];
        let inodes = files.iter().filter_map(|file| Some(file.symlink_metadata().ok()?.ino()));
        let hold = Hold::Live(inodes.filter(|&inode| alone::holds_lock(inode) == Some(true)).collect());
        Ok(Self { page_size, page_count, pages: Pages::Table(reader), inspector, signature, hold })
    }

    fn frozen(database: &Database, before: Signature, tuning: &Tuning, cancel: &CancellationToken) -> rusqlite::Result<Self> {
        let reader = database.open(true, tuning.busy, cancel)?;
        let inspector = database.open(true, tuning.busy, cancel)?;
        begin(&reader)?;
        begin(&inspector)?;
        let (page_size, page_count) = shape(&reader)?;
        let (pages, inspector) = (Pages::Table(reader), Some(inspector));
        Ok(Self { page_size, page_count, pages, inspector, signature: Some(before), hold: Hold::Frozen })
    }

    /// Of a private copy that `inspector` has open as well.
    pub fn of_copy(copy: File, inspector: Connection, signature: Option<Signature>) -> rusqlite::Result<Self> {
        begin(&inspector)?;
        let (page_size, page_count) = shape(&inspector)?;
        let (pages, inspector) = (Pages::Copy(copy), Some(inspector));
        Ok(Self { page_size, page_count, pages, inspector, signature, hold: Hold::Copied })
    }

    /// Whether what was read since the begin is one moment for sure; ask before the connections are closed.
    pub fn held(&self, database: &Database) -> bool {
        match (&self.hold, &self.signature) {
            (Hold::Live(inodes), _) => inodes.iter().all(|&inode| alone::holds_lock(inode) != Some(false)),
            (Hold::Frozen, Some(before)) => before.again(database).is_ok_and(|now| now.same_main_file(before)),
            _ => true,
        }
    }

    pub fn bytes(&self) -> u64 {
        self.page_count * u64::from(self.page_size)
    }
}

/// Begins a read transaction; only its first read fixes the moment.
fn begin(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch("BEGIN; SELECT count(*) FROM sqlite_schema")
}

fn data_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "data_version", |row| row.get(0))
}

impl Pages {
    /// Gives every page in order to `each`.
    pub fn read(
        &self,
        database: &Database,
        page_size: u32,
        page_count: u64,
        mut each: impl FnMut(&[u8]) -> Result<(), SourceError>,
    ) -> Result<(), SourceError> {
        match self {
            Pages::Table(connection) => {
                let doing = "reading its pages";
                let failed = |e| database.failed(doing, &e);
                let mut statement = connection.prepare("SELECT pgno, data FROM sqlite_dbpage('main') ORDER BY pgno").map_err(failed)?;
                let mut rows = statement.query([]).map_err(failed)?;
                let mut expected = 1u64;
                while let Some(row) = rows.next().map_err(failed)? {
                    let number: i64 = row.get(0).map_err(failed)?;
                    let data = row.get_ref(1).map_err(failed)?;
                    match data.as_blob() {
                        Ok(page) if number.unsigned_abs() == expected && page.len() == page_size as usize => each(page)?,
                        _ => return Err(incomplete(database, expected, page_count)),
                    }
                    expected += 1;
                }
                if expected != page_count + 1 {
                    return Err(incomplete(database, expected, page_count));
                }
            }
            Pages::Copy(copy) => {
                let mut buffer = vec![0; READ_BYTES.max(page_size as usize)];
                let total = page_count * u64::from(page_size);
                let mut at = 0;
                while at < total {
                    let len = usize::try_from(total - at).unwrap_or(usize::MAX).min(buffer.len());
                    copy.read_exact_at(&mut buffer[..len], at).map_err(|e| {
                        SourceError::Failed(format!("the private copy of the database {} cannot be read: {e}", database.shown()))
                    })?;
                    for page in buffer[..len].chunks_exact(page_size as usize) {
                        each(page)?;
                    }
                    at += len as u64;
                }
            }
        }
        Ok(())
    }

    pub fn connection(&self) -> Option<&Connection> {
        match self {
            Pages::Table(connection) => Some(connection),
            Pages::Copy(_) => None,
        }
    }
}

fn incomplete(database: &Database, page: u64, count: u64) -> SourceError {
    SourceError::Failed(format!(
        "the database {} gave no page {page} of its {count}; the file is likely damaged or was cut short while it was read",
        database.shown()
    ))
}
