//! Opening the user's database without ever changing it.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::backup::{Backup, StepResult};
use rusqlite::{Connection, ErrorCode, OpenFlags};
use tempfile_in::TemporaryFile;
use tokio_util::sync::CancellationToken;

use super::wal_path;
use crate::config::SqliteSource;
use crate::source::{Context, SourceError};

/// A database that is busy with another process's writes is waited for this long.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pages copied between two chances for writers.
const STEP_PAGES: i32 = 1024;

/// Opens for reading. A database in WAL mode on a read-only place, where its -shm cannot be made, is read as it stands
/// when there is no WAL to take into account.
pub fn read_only(path: &Path, cancel: &CancellationToken) -> rusqlite::Result<Connection> {
    let db = connect(path, "mode=ro")?;
    let usable = db.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()));
    let mut db = match usable {
        Err(e) if matches!(e.sqlite_error_code(), Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly)) && no_wal(path) => {
            connect(path, "mode=ro&immutable=1")?
        }
        _ => db,
    };
    interrupt_on(&mut db, cancel)?;
    Ok(db)
}

fn connect(path: &Path, options: &str) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
    let db = Connection::open_with_flags(format!("file:{}?{options}", escaped(path.as_os_str())), flags)?;
    // Short, so that a cancel is seen; `begin` and `copy` do the waiting.
    db.busy_timeout(Duration::from_millis(250))?;
    Ok(db)
}

/// A path in an SQLite URI (https://sqlite.org/uri.html): all but plain letters, digits and slashes as %XX.
fn escaped(path: &OsStr) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/._-".contains(&b);
    path.as_bytes().iter().map(|b| if plain(*b) { char::from(*b).to_string() } else { format!("%{b:02X}") }).collect()
}

fn no_wal(path: &Path) -> bool {
    std::fs::metadata(wal_path(path)).map_or(true, |m| m.len() == 0)
}

/// Long statements end when the run is cancelled.
pub fn interrupt_on(db: &mut Connection, cancel: &CancellationToken) -> rusqlite::Result<()> {
    let cancel = cancel.clone();
    db.progress_handler(10_000, Some(move || cancel.is_cancelled()))
}

fn is_busy(e: &rusqlite::Error) -> bool {
    matches!(e.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

/// Starts the snapshot: a read transaction that has read something.
pub fn begin(db: &Connection, cancel: &CancellationToken) -> rusqlite::Result<()> {
    let since = Instant::now();
    db.execute_batch("BEGIN")?;
    loop {
        match db.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(())) {
            Err(e) if is_busy(&e) && since.elapsed() < PATIENCE && !cancel.is_cancelled() => {}
            other => return other,
        }
    }
}

/// What an error of opening means and what can be done.
pub fn explain(source: &SqliteSource, e: rusqlite::Error) -> SourceError {
    let advice = match e.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            "another process holds it locked for longer than 30 s; the run can be tried again (retry = …)"
        }
        Some(ErrorCode::NotADatabase) => "it is no SQLite database, or an encrypted one",
        Some(ErrorCode::DatabaseCorrupt) => "it is damaged; earlier backups are untouched",
        Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly) => {
            "it needs recovery that only a writer can do (a crashed writer left its journal), or keepd may not open its -shm and -wal; start the application once, or check rights"
        }
        Some(ErrorCode::OperationInterrupted) => return SourceError::Cancelled,
        _ => "it cannot be read",
    };
    SourceError::Failed(format!("{}: {advice} ({e})", source.path.display()))
}

/// Copies a database in rollback-journal mode into the work directory, a few pages at a time so that writers go on.
pub fn copy(source: &SqliteSource, path: &Path, size: u64, context: &Context<'_>) -> Result<TemporaryFile, SourceError> {
    let failed = |text: String| SourceError::Failed(format!("{}: {text}", source.path.display()));
    let space =
        rustix::fs::statvfs(context.work_dir).map_err(|e| failed(format!("the work directory {}: {e}", context.work_dir.display())))?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    if free < size + (16 << 20) {
        return Err(failed(format!(
            "a database in rollback-journal mode is copied to {} before it is captured; {size} bytes are needed there, {free} are free (in WAL mode no copy is needed)",
            context.work_dir.display()
        )));
    }
    let copy =
        TemporaryFile::new(context.work_dir).map_err(|e| failed(format!("no copy can be made in {}: {e}", context.work_dir.display())))?;
    let from = read_only(path, context.cancel).map_err(|e| explain(source, e))?;
    let mut to = Connection::open(copy.path()).map_err(|e| failed(format!("its copy cannot be made: {e}")))?;
    to.execute_batch("PRAGMA synchronous = OFF; PRAGMA journal_mode = OFF;")
        .map_err(|e| failed(format!("its copy cannot be made: {e}")))?;
    let backup = Backup::new(&from, &mut to).map_err(|e| explain(source, e))?;
    let mut last_progress = Instant::now();
    loop {
        if context.cancel.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        match backup.step(STEP_PAGES).map_err(|e| explain(source, e))? {
            StepResult::Done => break,
            StepResult::More => {
                last_progress = Instant::now();
                std::thread::yield_now();
            }
            _ if last_progress.elapsed() > PATIENCE => {
                return Err(failed("another process holds it locked for longer than 30 s; the run can be tried again (retry = …)".into()));
            }
            _ => std::thread::sleep(Duration::from_millis(50)),
        }
    }
    drop(backup);
    to.close().map_err(|(_, e)| failed(format!("its copy cannot be made: {e}")))?;
    Ok(copy)
}

mod tempfile_in {
    //! A file of ours in the work directory, gone on drop (and at the daemon's next start after a crash).

    use std::io;
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::{Path, PathBuf};

    pub struct TemporaryFile(PathBuf);

    impl TemporaryFile {
        pub fn new(dir: &Path) -> io::Result<Self> {
            let random: [u8; 8] = crate::crypto::random().map_err(|e| io::Error::other(e.to_string()))?;
            let path = dir.join(format!("copy-{}.sqlite", data_encoding::HEXLOWER.encode(&random)));
            std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            Ok(Self(path))
        }

        pub fn path(&self) -> &Path {
            &self.0
        }
    }

    impl Drop for TemporaryFile {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }
}
