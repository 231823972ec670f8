//! A private copy of a database with a rollback journal that is being written to, where a read transaction as long as the capture would keep
//! writers out. SQLite's backup API copies in small steps and lets writers in between; it starts again when one has
//! written, so after some restarts the rest is copied under one transaction, as long as that takes.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use keepd_protocol::model::Level;
use rusqlite::backup::{Backup, StepResult};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};
use tokio_util::sync::CancellationToken;

use super::Tuning;
use super::alone;
use super::database::{Database, HEADER_BYTES, Header, prepare};
use super::signature::Signature;
use super::snapshot::{Snapshot, shape};
use crate::source::{Context, SourceError};
use crate::sqlite_error;

const PAUSE: Duration = Duration::from_millis(1);
/// Restarts before writers have to wait.
const PATIENCE: u32 = 4;
/// Writers who had to wait longer are told of.
const TELL_AFTER: Duration = Duration::from_secs(1);
/// Space that is to be left on the state directory's file system.
const SPARE_BYTES: u64 = 64 << 20;

/// Copies into a file of the work directory that has no name any more. None: the lock was lost on the way.
pub fn snapshot(database: &Database, before: &Signature, tuning: &Tuning, context: &Context<'_>) -> Result<Option<Snapshot>, SourceError> {
    let (work_dir, cancel) = (context.work_dir, context.cancel);
    let failed = |e| database.failed("copying it", &e);
    let source = database.open(false, tuning.busy, cancel).map_err(failed)?;
    let (page_size, page_count) = shape(&source).map_err(failed)?;
    check_space(database, work_dir, page_count * u64::from(page_size))?;

    let staging = |e: &dyn std::fmt::Display| not_made(database, work_dir, e);
    let (copy, mut target) = create(work_dir, tuning, cancel).map_err(|e| staging(&e))?;
    let Some((header, held)) = run(database, &source, &mut target, tuning, context)? else { return Ok(None) };
    if held >= TELL_AFTER {
        context.report.message(
            Level::Warning,
            format!(
                "the database {} is written to without pause, so its writers had to wait {:.1} s while it was copied; with a write-ahead log \
                 (`PRAGMA journal_mode=WAL`) they would not have to",
                database.shown(),
                held.as_secs_f64()
            ),
        );
    }
    // The same bytes in the header as the original's at that moment, where the backup API counts on its own.
    copy.write_all_at(&header, 0).map_err(|e| staging(&e))?;
    let unchanged = before.is_settled() && before.again(database).is_ok_and(|now| now.same_main_file(before));
    let signature = unchanged.then(|| before.clone());
    drop(source);
    Snapshot::of_copy(copy, target, signature).map(Some).map_err(failed)
}

fn not_made(database: &Database, work_dir: &Path, why: &dyn std::fmt::Display) -> SourceError {
    SourceError::Failed(format!(
        "no private copy of the database {} can be made in {} (one is needed as it has a rollback journal; `PRAGMA journal_mode=WAL` avoids \
         it): {why}",
        database.shown(),
        work_dir.display()
    ))
}

/// Nothing but the copy is written.
fn is_of_writing(error: &rusqlite::Error) -> bool {
    // SQLITE_IOERR_WRITE, _FSYNC, _TRUNCATE
    const WRITING: [i32; 3] = [778, 1034, 1546];
    error.sqlite_error().is_some_and(|e| e.code == rusqlite::ErrorCode::DiskFull || WRITING.contains(&e.extended_code))
}

fn check_space(database: &Database, work_dir: &Path, bytes: u64) -> Result<(), SourceError> {
    let Ok(space) = rustix::fs::statvfs(work_dir) else { return Ok(()) };
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    if free >= bytes.saturating_add(SPARE_BYTES) {
        return Ok(());
    }
    Err(SourceError::Failed(format!(
        "the database {} has a rollback journal and is copied to {} first, which takes {} MiB where {} MiB are free: make room there, or switch \
         the database to a write-ahead log (`PRAGMA journal_mode=WAL`), which needs no copy",
        database.shown(),
        work_dir.display(),
        (bytes + SPARE_BYTES) >> 20,
        free >> 20
    )))
}

/// An empty database that only we can see, twice: to read its pages, and for SQLite.
fn create(work_dir: &Path, tuning: &Tuning, cancel: &CancellationToken) -> Result<(File, Connection), Box<dyn std::error::Error>> {
    // Mode 0600. It loses its name as soon as SQLite has it open, so that nothing stays behind however we end.
    let named = tempfile::Builder::new().prefix("sqlite-copy-").tempfile_in(work_dir)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let target = prepare(Connection::open_with_flags(named.path(), flags)?, tuning.busy, cancel)?;
    // No journal, which would need a name; a defensive connection refuses that.
    target.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, false)?;
    target.execute_batch("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF")?;
    target.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    let (copy, path) = named.into_parts();
    path.close()?;
    Ok((copy, target))
}

/// The header of the moment that was copied, and how long writers were kept out at the end.
fn run(
    database: &Database,
    source: &Connection,
    target: &mut Connection,
    tuning: &Tuning,
    context: &Context<'_>,
) -> Result<Option<(Header, Duration)>, SourceError> {
    let (work_dir, cancel) = (context.work_dir, context.cancel);
    let failed = |e: rusqlite::Error| match is_of_writing(&e) {
        // Not the database's fault: where the copy goes there is no room.
        true => not_made(database, work_dir, &sqlite_error::words(&e, &work_dir.join("copy")).0),
        false => database.failed("copying it", &e),
    };
    let step = tuning.step_pages;
    let (_, page_count) = shape(source).map_err(failed)?;
    let mut remaining = i32::try_from(page_count).unwrap_or(i32::MAX);
    let mut restarts = 0;
    let inode = database.stat()?.ino();
    let mut holding = false;
    let mut locked = false;
    let mut since = Instant::now();
    let mut progress = Instant::now();
    let backup = Backup::new(source, target).map_err(failed)?;
    loop {
        if cancel.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        // The last step is always under our own transaction, so that the moment can be looked at.
        if !holding && (remaining <= step || restarts >= PATIENCE) {
            source.execute_batch("BEGIN; SELECT count(*) FROM sqlite_schema").map_err(failed)?;
            holding = true;
            since = Instant::now();
            // Not every kernel or file system shows it.
            locked = alone::holds_lock(inode) == Some(true);
        }
        match backup.step(step).map_err(failed)? {
            StepResult::Done => break,
            StepResult::More => {
                let now = backup.progress().remaining;
                if now > remaining - step {
                    restarts += 1;
                }
                remaining = now;
                progress = Instant::now();
                if holding && restarts < PATIENCE && remaining > step {
                    source.execute_batch("ROLLBACK").map_err(failed)?;
                    holding = false;
                }
            }
            // Busy or locked: whoever writes lets go of it, or it does not work.
            _ if progress.elapsed() < tuning.busy => std::thread::sleep(Duration::from_millis(20)),
            _ => {
                return Err(SourceError::Failed(format!(
                    "the database {} was locked by another program for {} s while it was copied; run the job again when it has let go of it",
                    database.shown(),
                    tuning.busy.as_secs()
                )));
            }
        }
        if !holding {
            std::thread::sleep(PAUSE);
        }
    }
    drop(backup);
    let header: Vec<u8> =
        source.query_row("SELECT data FROM sqlite_dbpage('main') WHERE pgno = 1", [], |row| row.get(0)).map_err(failed)?;
    // A lock lost in an earlier step shows in the next one; in the last only here.
    if locked && alone::holds_lock(inode) == Some(false) {
        return Ok(None);
    }
    source.execute_batch("ROLLBACK").map_err(failed)?;
    let held = since.elapsed();
    match header.get(..HEADER_BYTES).and_then(|h| Header::try_from(h).ok()) {
        Some(header) => Ok(Some((header, held))),
        None => Err(SourceError::Failed(format!("the database {} gave no first page; the file is likely damaged", database.shown()))),
    }
}
