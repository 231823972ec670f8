//! The database file: where it is, what it is, and connections that only read it.
//!
//! POSIX locks belong to the process: closing any descriptor of a file drops every lock that the process has on it. So
//! the database file is opened by our own hands ([`Database::header`]) only before SQLite has it open, and `-shm` never.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{File, Metadata};
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};
use rustix::fs::OFlags;
use tokio_util::sync::CancellationToken;

use crate::repository::{Entry, Kind, Time};
use crate::source::{SourceError, way};

pub const HEADER_BYTES: usize = 100;
pub const MAGIC: &[u8; 16] = b"SQLite format 3\0";
/// Of each connection's page cache, in KiB: a scan has no use for more.
const CACHE_KIB: i64 = 3 << 10;

pub type Header = [u8; HEADER_BYTES];

/// A regular file that is to be captured.
#[derive(Debug)]
pub struct Database {
    /// With all links resolved: SQLite puts `-wal` beside the file itself.
    pub path: PathBuf,
    /// As configured, for messages.
    shown: String,
}

impl Database {
    /// What is configured.
    pub fn find(configured: &Path) -> Result<Self, SourceError> {
        Self::at(configured, way::of_source(configured)?)
    }

    /// A file that keepd wrote itself.
    pub fn of_our_own(path: &Path) -> Result<Self, SourceError> {
        Self::at(path, way::resolve(path).map_err(SourceError::Failed)?)
    }

    fn at(configured: &Path, path: PathBuf) -> Result<Self, SourceError> {
        let shown = configured.display().to_string();
        path.symlink_metadata().map_err(|e| match e.kind() {
            ErrorKind::NotFound => SourceError::Failed(format!(
                "the database {shown} does not exist; if it was moved, change the source's `sqlite` path, if it is created later, \
                 run the job again then"
            )),
            _ => SourceError::Failed(format!("the database {shown} cannot be found: {e}")),
        })?;
        let database = Self { path, shown };
        database.stat()?;
        Ok(database)
    }

    /// What the file system says about the file, which is a regular one.
    pub fn stat(&self) -> Result<Metadata, SourceError> {
        let stat = self
            .path
            .symlink_metadata()
            .map_err(|e| SourceError::Failed(format!("the database {} cannot be looked at: {e}", self.shown)))?;
        let kind = stat.file_type();
        if kind.is_file() {
            return Ok(stat);
        }
        let what = match () {
            () if kind.is_dir() => "a directory",
            () if kind.is_fifo() => "a named pipe",
            () if kind.is_socket() => "a socket",
            () if kind.is_symlink() => "a symbolic link that appeared just now",
            () => "a device",
        };
        Err(SourceError::Failed(format!("{} is {what}, not an SQLite database; the source's `sqlite` path must name a file", self.shown)))
    }

    /// The first bytes of the file; None when it is empty, which is an empty database to SQLite.
    pub fn header(&self) -> Result<Option<Header>, SourceError> {
        let failed = |e| SourceError::Failed(format!("the database {} cannot be read: {e}", self.shown));
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        let file = way::open(&self.path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK).map_err(|e| failed(e.into()))?;
        File::from(file).take(HEADER_BYTES as u64).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.is_empty() {
            return Ok(None);
        }
        match Header::try_from(bytes) {
            Ok(header) if header.starts_with(MAGIC) => Ok(Some(header)),
            _ => Err(self.no_database()),
        }
    }

    fn no_database(&self) -> SourceError {
        SourceError::Failed(format!(
            "{} is not an SQLite database (it does not begin with \"SQLite format 3\"); a database encrypted by SQLCipher or the like cannot \
             be captured page by page: use a `files` source while its application is stopped",
            self.shown
        ))
    }

    /// The file beside it whose name ends with `suffix`.
    pub fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = OsString::from(&self.path);
        name.push(suffix);
        name.into()
    }

    pub fn has_journal(&self) -> bool {
        self.beside("-journal").symlink_metadata().is_ok_and(|stat| stat.len() > 0)
    }

    /// The entry without its contents.
    pub fn entry(&self, stat: &Metadata) -> Entry {
        Entry {
            kind: Kind::File,
            mode: stat.mode() & 0o7777,
            uid: stat.uid(),
            gid: stat.gid(),
            mtime: time(stat.mtime(), stat.mtime_nsec()),
            ctime: time(stat.ctime(), stat.ctime_nsec()),
            inode: stat.ino(),
            xattrs: xattrs(&self.path),
            ..Entry::default()
        }
    }

    /// A connection that reads and never changes anything. `frozen` takes no locks and trusts that nobody writes.
    pub fn open(&self, frozen: bool, busy: Duration, cancel: &CancellationToken) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
        // All links were resolved: one that is there now was put there since.
        let flags = flags | OpenFlags::SQLITE_OPEN_NOFOLLOW;
        let connection = Connection::open_with_flags(uri(&self.path, frozen), flags)?;
        prepare(connection, busy, cancel)
    }

    /// The failure of SQLite in words.
    pub fn failed(&self, doing: &str, error: &rusqlite::Error) -> SourceError {
        let name = &self.shown;
        let Some(code) = error.sqlite_error() else {
            return SourceError::Failed(format!("the database {name}: {doing} failed: {error}"));
        };
        // The extended codes tell what to do about it.
        const READONLY_RECOVERY: i32 = 264;
        const READONLY_ROLLBACK: i32 = 776;
        const READONLY_CANTINIT: i32 = 1288;
        SourceError::Failed(match (code.extended_code, code.code) {
            (READONLY_ROLLBACK, _) => format!(
                "the database {name} was left in the middle of a transaction (its -journal file is still to be rolled back), most likely by a \
                 crash; keepd does not change databases: start its application, or run `sqlite3 {name} 'PRAGMA schema_version'` as its owner, \
                 and run the job again"
            ),
            (READONLY_RECOVERY | READONLY_CANTINIT, _) | (_, ErrorCode::CannotOpen) => format!(
                "the database {name} cannot be opened: {error}. It has a -wal file, which can be read only where its -shm file can be written \
                 or created: give keepd write access to the directory and to the -shm file, or let its application close the database"
            ),
            (_, ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::FileLockingProtocolFailed) => format!(
                "the database {name} is locked by another program, which did not let go of it in time ({doing}: {error}); run the job again \
                 when it has"
            ),
            (_, ErrorCode::NotADatabase) => return self.no_database(),
            (_, ErrorCode::DatabaseCorrupt) => format!(
                "the database {name} is damaged ({doing}: {error}); earlier backups are as they were: restore one, or try `sqlite3 {name} .recover`"
            ),
            (_, ErrorCode::OperationInterrupted) => return SourceError::Cancelled,
            _ => format!("the database {name}: {doing} failed: {error}"),
        })
    }

    pub fn shown(&self) -> &str {
        &self.shown
    }
}

/// Settings that every connection has: a small cache, no way to write, no trust in what a schema wants to call.
pub fn prepare(mut connection: Connection, busy: Duration, cancel: &CancellationToken) -> rusqlite::Result<Connection> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    let cancel = cancel.clone();
    let mut since = Instant::now();
    connection.busy_handler(Some(move |tries: i32| {
        if tries == 0 {
            since = Instant::now();
        }
        std::thread::sleep(Duration::from_millis(if tries < 10 { 5 } else { 25 }));
        !cancel.is_cancelled() && since.elapsed() < busy
    }))?;
    connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
    // A mapped file that another program cuts short would kill the daemon.
    connection.pragma_update(None, "mmap_size", 0)?;
    Ok(connection)
}

/// Any path, whatever its bytes, as SQLite's `file:` URI.
fn uri(path: &Path, frozen: bool) -> String {
    let mut uri = String::from("file:");
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b'/' | b'.' | b'-' | b'_' | b'~' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => uri.push(char::from(byte)),
            // Writing to a string does not fail.
            other => drop(write!(uri, "%{other:02X}")),
        }
    }
    if frozen {
        uri.push_str("?immutable=1");
    }
    uri
}

fn time(seconds: i64, nanoseconds: i64) -> Time {
    Time { seconds, nanoseconds: u32::try_from(nanoseconds).unwrap_or(0) }
}

/// What extended attributes can be read; there are file systems without any.
fn xattrs(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut buffer = vec![0; 64 << 10];
    let Ok(len) = rustix::fs::listxattr(path, &mut buffer[..]) else { return Vec::new() };
    let names: Vec<Vec<u8>> = buffer[..len].split(|&b| b == 0).filter(|n| !n.is_empty()).map(<[u8]>::to_vec).collect();
    let mut found: Vec<_> = names
        .into_iter()
        .filter_map(|name| {
            let len = rustix::fs::getxattr(path, name.as_slice(), &mut buffer[..]).ok()?;
            Some((name, buffer[..len].to_vec()))
        })
        .collect();
    found.sort();
    found
}

/// A name as it stands in a statement.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_carry_any_name() {
        let path = Path::new(std::ffi::OsStr::from_bytes(b"/a b/100%?#&=\xff.db"));
        assert_eq!(uri(path, false), "file:/a%20b/100%25%3F%23%26%3D%FF.db");
        assert_eq!(uri(Path::new("/x"), true), "file:/x?immutable=1");
    }
}
