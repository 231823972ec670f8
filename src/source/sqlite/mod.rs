//! A live SQLite database, captured page by page under one read transaction.
//!
//! In WAL mode the `sqlite_dbpage` table gives the pages of one moment without blocking any writer and without a copy; in
//! rollback-journal mode, where a long read would block writers, the backup API makes a copy in the private work
//! directory first. Pages that did not change since the last backup keep their old extents (`increment`); a database
//! whose files are as they were is not read at all (`signature`). The `-wal` and `-shm` files are never copied.

mod facts;
mod increment;
mod open;
mod page_map;
mod signature;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use keepd_protocol::model::Level;
use rusqlite::Connection;

use super::{Context, Facts, Previous, SourceError};
use crate::config::{SqliteSource, Verify};
use crate::repository::{Entry, EntrySink, Kind, Time};
use increment::Increment;
use page_map::PageMap;
use signature::Signature;

const MAGIC: &[u8; 16] = b"SQLite format 3\0";
/// Problems named when a check fails.
const MAX_PROBLEMS: u32 = 20;

/// Captures a database as one entry (the source's root itself) into the sink.
pub fn capture(
    source: &SqliteSource,
    previous: &mut dyn Previous,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<Facts, SourceError> {
    let failed = |text: String| SourceError::Failed(format!("{}: {text}", source.path.display()));
    // The -wal of a database lies beside the file itself, not beside a link to it.
    let path = std::fs::canonicalize(&source.path).map_err(|e| failed(format!("the database cannot be found: {e}")))?;
    let entry = describe(&path).map_err(&failed)?;
    let before = previous.next_entry()?.filter(|e| e.kind == Kind::File && e.path.is_empty());
    if entry.size == 0 {
        context.report.message(Level::Warning, format!("{}: the database is empty (0 bytes, no tables)", source.path.display()));
        context.report.entry();
        sink.push(entry)?;
        return Ok(Facts::from([("tables".into(), serde_json::json!({})), ("page_count".into(), 0.into())]));
    }
    let header = Header::read(&path).map_err(&failed)?;
    let signature = Signature::of(&path).map_err(|e| failed(format!("cannot look at the database: {e}")))?;
    let map = PageMap::load(context.cache_dir, before.as_ref());
    if let (Some(map), Some(before)) = (&map, &before)
        && map.signature.as_ref() == Some(&signature)
        && increment::is_whole(before, sink)?
    {
        context.report.entry();
        context.report.bytes(before.size);
        let mut facts = map.facts.clone();
        facts.insert("unchanged".into(), true.into());
        sink.push(Entry { size: before.size, content: before.content.clone(), ..entry })?;
        return Ok(facts);
    }
    if header.wal {
        from_wal(source, &path, entry, before, map, signature, sink, context)
    } else {
        from_copy(source, &path, entry, before, map, signature, sink, context)
    }
}

/// The first bytes of a database file.
struct Header {
    wal: bool,
}

impl Header {
    fn read(path: &Path) -> Result<Self, String> {
        let mut bytes = [0u8; 100];
        let mut file = File::open(path).map_err(|e| format!("cannot be read: {e}"))?;
        match file.read_exact(&mut bytes) {
            Ok(()) if bytes[..16] == MAGIC[..] => Ok(Self { wal: bytes[18] == 2 && bytes[19] == 2 }),
            _ => Err("it is no SQLite database (its first bytes are others); was it replaced, encrypted or damaged?".into()),
        }
    }
}

/// The entry, but for its contents.
fn describe(path: &Path) -> Result<Entry, String> {
    let stat = rustix::fs::stat(path).map_err(|e| format!("cannot look at it: {e}"))?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile {
        return Err("it is no regular file".into());
    }
    let time = |seconds: i64, nanoseconds: u64| Time { seconds, nanoseconds: (nanoseconds % 1_000_000_000) as u32 };
    Ok(Entry {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        inode: stat.st_ino,
        size: stat.st_size as u64,
        ..Entry::default()
    })
}

#[allow(clippy::too_many_arguments)]
fn from_wal(
    source: &SqliteSource,
    path: &Path,
    entry: Entry,
    before: Option<Entry>,
    map: Option<PageMap>,
    signature: Signature,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<Facts, SourceError> {
    let failed = |text: String| SourceError::Failed(format!("{}: {text}", source.path.display()));
    let db = open::read_only(path, context.cancel).map_err(|e| open::explain(source, e))?;
    open::begin(&db, context.cancel).map_err(|e| open::explain(source, e))?;
    // Only when nothing was written between the look at the files and the snapshot does the signature tell of it.
    let signature = Signature::of(path).ok().filter(|now| *now == signature);
    verify(source, &db)?;
    let facts = facts::of(&db, source.verify, "wal").map_err(|e| failed(format!("its facts cannot be read: {e}")))?;
    let number = |pragma: &str| db.query_row(pragma, [], |r| r.get::<_, i64>(0)).map_err(|e| failed(format!("{pragma}: {e}")));
    let (page_size, page_count) = (number("PRAGMA page_size")? as usize, number("PRAGMA page_count")? as u64);
    let mut increment = Increment::new(page_size, page_count, before, map, sink, context)?;
    let mut statement =
        db.prepare("SELECT pgno, data FROM sqlite_dbpage('main')").map_err(|e| failed(format!("its pages cannot be read: {e}")))?;
    let mut rows = statement.query([]).map_err(|e| failed(format!("its pages cannot be read: {e}")))?;
    let unreadable = |e: rusqlite::Error| match context.cancel.is_cancelled() {
        true => SourceError::Cancelled,
        false => failed(format!("its pages cannot be read: {e}")),
    };
    while let Some(row) = rows.next().map_err(unreadable)? {
        let number: i64 = row.get(0).map_err(unreadable)?;
        let data = row.get_ref(1).map_err(unreadable)?.as_blob().map_err(|e| failed(format!("page {number} is no page: {e}")))?;
        increment.page(number as u64, data)?;
    }
    drop(rows);
    drop(statement);
    // Nothing of the database is needed any more; a long snapshot would keep the WAL from being reset.
    drop(db);
    increment.finish(entry, signature, facts)
}

#[allow(clippy::too_many_arguments)]
fn from_copy(
    source: &SqliteSource,
    path: &Path,
    entry: Entry,
    before: Option<Entry>,
    map: Option<PageMap>,
    signature: Signature,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<Facts, SourceError> {
    let failed = |text: String| SourceError::Failed(format!("{}: {text}", source.path.display()));
    let copy = open::copy(source, path, entry.size, context)?;
    let signature = Signature::of(path).ok().filter(|now| *now == signature);
    let (facts, page_size, page_count) = {
        let mut db = Connection::open(copy.path()).map_err(|e| failed(format!("its copy cannot be opened: {e}")))?;
        open::interrupt_on(&mut db, context.cancel).map_err(|e| failed(e.to_string()))?;
        verify(source, &db)?;
        let facts = facts::of(&db, source.verify, "rollback").map_err(|e| failed(format!("its facts cannot be read: {e}")))?;
        let number = |pragma: &str| db.query_row(pragma, [], |r| r.get::<_, i64>(0)).map_err(|e| failed(format!("{pragma}: {e}")));
        (facts, number("PRAGMA page_size")? as usize, number("PRAGMA page_count")? as u64)
    };
    let mut increment = Increment::new(page_size, page_count, before, map, sink, context)?;
    let mut file = File::open(copy.path()).map_err(|e| failed(format!("its copy cannot be read: {e}")))?;
    let mut page = vec![0u8; page_size];
    for number in 1..=page_count {
        file.read_exact(&mut page).map_err(|e| failed(format!("its copy cannot be read: {e}")))?;
        increment.page(number, &page)?;
    }
    increment.finish(entry, signature, facts)
}

/// The check the configuration asks for, in the snapshot that is captured.
fn verify(source: &SqliteSource, db: &Connection) -> Result<(), SourceError> {
    let (pragma, name) = match source.verify {
        Verify::Off => return Ok(()),
        Verify::Quick => ("quick_check", "quick"),
        Verify::Full => ("integrity_check", "full"),
    };
    let failed = |text: String| {
        SourceError::Failed(format!(
            "{}: the {name} check {text}; nothing was captured, earlier backups are untouched",
            source.path.display()
        ))
    };
    let check = || -> rusqlite::Result<Vec<String>> {
        db.prepare(&format!("PRAGMA {pragma}({MAX_PROBLEMS})"))?.query_map([], |r| r.get::<_, String>(0))?.collect()
    };
    match check() {
        Ok(lines) if lines == ["ok"] => Ok(()),
        Ok(lines) => Err(failed(format!("found damage: {}", lines.join("; ").replace('\n', " ")))),
        Err(e) if e.sqlite_error_code() == Some(rusqlite::ErrorCode::OperationInterrupted) => Err(SourceError::Cancelled),
        Err(e) => Err(failed(format!("could not be done: {e}"))),
    }
}

/// The `-wal` beside a database.
fn wal_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    PathBuf::from(name)
}
