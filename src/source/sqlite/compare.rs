//! A backup's database beside the live one, table by table, at one moment of that.
//!
//! In: the live database, held still as for a capture, and the backup's as a file that nobody else has. Out: tables that came or went, whose rows
//! or statements differ, and on demand how many rows came, went and changed. Rows go by the primary key: by an integer one both tables are read
//! side by side; by any other, and by all their columns where there is none, through an index of hashes in a file that has no name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, Row, params};
use tokio_util::sync::CancellationToken;

use super::alone::Alone;
use super::database::{Database, quoted};
use super::inspect::Watch;
use super::signature::Signature;
use super::snapshot::{self, Pages, Snapshot};
use super::{ATTEMPTS, Tuning, not_held, take};
use crate::config::SqliteSource;
use crate::source::{Context, SourceError};

/// Rows between looks at whether to stop.
const ROWS_PER_LOOK: u64 = 4096;

/// Rows of one table, by its primary key; without one a changed row is one that went and one that came.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rows {
    pub added: u64,
    pub removed: u64,
    pub changed: u64,
}

/// A table (or a view) that differs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TableDifference {
    pub table: String,
    pub before: Side,
    pub after: Side,
    /// The statements that it, its indexes and its triggers are made with differ.
    pub schema: bool,
    /// Where contents were compared.
    pub rows: Option<Rows>,
}

/// A table on one side.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Side {
    pub is_there: bool,
    /// None for what has no rows of its own: a view, a virtual table.
    pub rows: Option<u64>,
}

/// What a comparison found.
#[derive(Debug, Default)]
pub struct Compared {
    /// By name.
    pub tables: Vec<TableDifference>,
    /// Tables that could not be compared, and why.
    pub problems: Vec<String>,
}

/// Compares the database file `backup`, which nobody else has open, with the live database. `deep`: also the rows' contents.
pub fn compare(source: &SqliteSource, backup: &Path, deep: bool, context: &Context<'_>) -> Result<Compared, SourceError> {
    let tuning = Tuning::default();
    let database = Database::find(&source.path)?;
    let backup = Database::of_our_own(backup)?;
    let _alone = Alone::with(&database.stat()?, context.cancel)?;
    for attempt in 0..ATTEMPTS {
        let mut stat = database.stat()?;
        let before = open_backup(&backup, &tuning, context.cancel)?;
        let Some(header) = database.header()? else {
            // A file of no bytes is an empty database.
            let empty = Connection::open_in_memory().map_err(|e| database.failed("opening it", &e))?;
            return pair(&database, &before, &empty, deep, context.cancel);
        };
        let signature = Signature::take(&database, &header)?;
        let wal = snapshot::uses_wal(&header);
        let Some(moment) = take(&database, wal, signature, &mut stat, attempt == 0, &tuning, context)? else { continue };
        let compared = pair(&database, &before, connection(&database, &moment)?, deep, context.cancel);
        if moment.held(&database) {
            return compared;
        }
    }
    Err(not_held(&database))
}

fn open_backup(backup: &Database, tuning: &Tuning, cancel: &CancellationToken) -> Result<Connection, SourceError> {
    // Frozen: its header may want a write-ahead log, which a captured file never has.
    backup.open(true, tuning.busy, cancel).map_err(|e| backup.failed("opening the backup's database", &e))
}

fn connection<'m>(database: &Database, moment: &'m Snapshot) -> Result<&'m Connection, SourceError> {
    let of_pages = if let Pages::Table(connection) = &moment.pages { Some(connection) } else { None };
    of_pages.or(moment.inspector.as_ref()).ok_or_else(|| {
        SourceError::Failed(format!("the database {} is held, but nothing reads it; this is a fault of keepd", database.shown()))
    })
}

/// What is made of a table: the statements by kind and name, and whether it has rows of its own.
#[derive(Default, PartialEq, Eq)]
struct Made {
    statements: BTreeSet<(String, String, String)>,
    has_rows: bool,
}

fn schema(connection: &Connection) -> rusqlite::Result<BTreeMap<String, Made>> {
    let mut statement = connection.prepare(
        "SELECT type, name, tbl_name, coalesce(sql, ''), rootpage FROM sqlite_schema WHERE tbl_name NOT LIKE 'sqlite\\_%' ESCAPE '\\'",
    )?;
    let mut rows = statement.query([])?;
    let mut tables: BTreeMap<String, Made> = BTreeMap::new();
    while let Some(row) = rows.next()? {
        let text = |n: usize| -> rusqlite::Result<String> { Ok(String::from_utf8_lossy(row.get_ref(n)?.as_bytes()?).into_owned()) };
        let made = tables.entry(text(2)?).or_default();
        let kind = text(0)?;
        // A virtual table has no pages of its own; its shadow tables have.
        made.has_rows |= kind == "table" && row.get::<_, i64>(4)? > 0;
        made.statements.insert((kind, text(1)?, text(3)?));
    }
    Ok(tables)
}

fn pair(
    database: &Database,
    before: &Connection,
    after: &Connection,
    deep: bool,
    cancel: &CancellationToken,
) -> Result<Compared, SourceError> {
    let _watches = (Watch::over(before, cancel, None), Watch::over(after, cancel, None));
    let looked = |e| if cancel.is_cancelled() { SourceError::Cancelled } else { database.failed("looking at it", &e) };
    let (old, new) = (schema(before).map_err(looked)?, schema(after).map_err(looked)?);
    let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let mut compared = Compared::default();
    for table in names {
        if cancel.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        match one(table, (before, old.get(table)), (after, new.get(table)), deep, cancel) {
            Ok(difference) => compared.tables.extend(difference),
            Err(Broken::Cancelled) => return Err(SourceError::Cancelled),
            Err(Broken::Sqlite(_)) if cancel.is_cancelled() => return Err(SourceError::Cancelled),
            // Of an application's own functions and collations, mostly.
            Err(Broken::Sqlite(e)) => {
                compared.problems.push(format!("table {table} of {} could not be compared: {e}", database.shown()));
            }
        }
    }
    Ok(compared)
}

enum Broken {
    Cancelled,
    Sqlite(rusqlite::Error),
}

impl From<rusqlite::Error> for Broken {
    fn from(error: rusqlite::Error) -> Self {
        Broken::Sqlite(error)
    }
}

fn one(
    table: &str,
    (before, old): (&Connection, Option<&Made>),
    (after, new): (&Connection, Option<&Made>),
    deep: bool,
    cancel: &CancellationToken,
) -> Result<Option<TableDifference>, Broken> {
    let side = |connection: &Connection, made: Option<&Made>| -> rusqlite::Result<Side> {
        let count =
            |_: &Made| connection.query_row(&format!("SELECT count(*) FROM main.{}", quoted(table)), [], |row| row.get::<_, i64>(0));
        let rows = made.filter(|m| m.has_rows).map(count).transpose()?;
        Ok(Side { is_there: made.is_some(), rows: rows.map(i64::unsigned_abs) })
    };
    let (left, right) = (side(before, old)?, side(after, new)?);
    let mut difference = TableDifference { table: table.to_owned(), before: left, after: right, ..TableDifference::default() };
    if let (Some(old), Some(new)) = (old, new) {
        difference.schema = old.statements != new.statements;
        if deep && old.has_rows && new.has_rows {
            difference.rows = contents(table, before, after, cancel)?;
        }
        let is_same = !difference.schema && left == right && difference.rows.is_none_or(|rows| rows == Rows::default());
        return Ok((!is_same).then_some(difference));
    }
    Ok(Some(difference))
}

/// None when the columns differ: then no row is another one's successor.
fn contents(table: &str, before: &Connection, after: &Connection, cancel: &CancellationToken) -> Result<Option<Rows>, Broken> {
    let (old, new) = (columns(before, table)?, columns(after, table)?);
    if old != new {
        return Ok(None);
    }
    let mut key: Vec<(i64, &str)> = new.iter().filter(|(_, key)| *key > 0).map(|(name, key)| (*key, name.as_str())).collect();
    key.sort_unstable();
    let key: Vec<&str> = key.into_iter().map(|(_, name)| name).collect();
    if let [one] = key.as_slice()
        && let Some(rows) = by_integer(table, one, before, after, cancel)?
    {
        return Ok(Some(rows));
    }
    by_hash(table, &key, before, after, cancel).map(Some)
}

/// Columns with their place in the primary key, counted from 1; 0 for the others.
fn columns(connection: &Connection, table: &str) -> rusqlite::Result<Vec<(String, i64)>> {
    let mut statement = connection.prepare("SELECT name, pk FROM pragma_table_info(?1, 'main')")?;
    statement.query_map([table], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
}

/// A row's key, and its hash.
type Keyed = (i64, [u8; 32]);

/// Reads both tables in the order of their key, side by side; None when it holds anything but integers.
fn by_integer(table: &str, key: &str, before: &Connection, after: &Connection, cancel: &CancellationToken) -> Result<Option<Rows>, Broken> {
    let question = format!("SELECT {0}, * FROM main.{1} ORDER BY {0}", quoted(key), quoted(table));
    let (mut old, mut new) = (before.prepare(&question)?, after.prepare(&question)?);
    let (mut old, mut new) = (old.query([])?, new.query([])?);
    // The inner one is None at the end, the outer one where the key is no integer.
    let next = |rows: &mut rusqlite::Rows<'_>| -> rusqlite::Result<Option<Option<Keyed>>> {
        let Some(row) = rows.next()? else { return Ok(Some(None)) };
        Ok(match row.get_ref(0)? {
            ValueRef::Integer(key) => Some(Some((key, hash(row, 1)?))),
            _ => None,
        })
    };
    let mut found = Rows::default();
    let (Some(mut left), Some(mut right)) = (next(&mut old)?, next(&mut new)?) else { return Ok(None) };
    let mut looks = 0u64;
    loop {
        looks += 1;
        if looks.is_multiple_of(ROWS_PER_LOOK) && cancel.is_cancelled() {
            return Err(Broken::Cancelled);
        }
        let (takes_left, takes_right) = match (&left, &right) {
            (None, None) => return Ok(Some(found)),
            (Some(_), None) => (true, false),
            (None, Some(_)) => (false, true),
            (Some((l, _)), Some((r, _))) => (l <= r, r <= l),
        };
        match (takes_left, takes_right) {
            (true, true) => found.changed += u64::from(left != right),
            (true, false) => found.removed += 1,
            (false, _) => found.added += 1,
        }
        if takes_left {
            let Some(row) = next(&mut old)? else { return Ok(None) };
            left = row;
        }
        if takes_right {
            let Some(row) = next(&mut new)? else { return Ok(None) };
            right = row;
        }
    }
}

/// Gathers the hashes of keys and rows of both; a row without a key is its own.
fn by_hash(table: &str, key: &[&str], before: &Connection, after: &Connection, cancel: &CancellationToken) -> Result<Rows, Broken> {
    // An empty name is a private file on disk that goes with the connection.
    let index = Connection::open("")?;
    index.execute_batch(
        "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; \
         CREATE TABLE row (key BLOB PRIMARY KEY, before BLOB, after BLOB, befores INTEGER NOT NULL, afters INTEGER NOT NULL) WITHOUT ROWID; BEGIN",
    )?;
    let listed: String = key.iter().map(|name| format!("{}, ", quoted(name))).collect();
    let question = format!("SELECT {listed}* FROM main.{}", quoted(table));
    let sides = [
        (before, "INSERT INTO row VALUES (?1, ?2, NULL, 1, 0) ON CONFLICT DO UPDATE SET before = ?2, befores = befores + 1"),
        (after, "INSERT INTO row VALUES (?1, NULL, ?2, 0, 1) ON CONFLICT DO UPDATE SET after = ?2, afters = afters + 1"),
    ];
    for (connection, insert) in sides {
        let (mut statement, mut insert) = (connection.prepare(&question)?, index.prepare(insert)?);
        let mut rows = statement.query([])?;
        let mut looks = 0u64;
        while let Some(row) = rows.next()? {
            looks += 1;
            if looks.is_multiple_of(ROWS_PER_LOOK) && cancel.is_cancelled() {
                return Err(Broken::Cancelled);
            }
            let own = hash(row, key.len())?;
            // Keys that hold NULL are many in SQLite.
            let mut has_key = !key.is_empty();
            let mut hasher = blake3::Hasher::new();
            for n in 0..key.len() {
                has_key &= row.get_ref(n)? != ValueRef::Null;
                add(&mut hasher, row.get_ref(n)?);
            }
            let key = if has_key { *hasher.finalize().as_bytes() } else { own };
            insert.execute(params![key, own])?;
        }
    }
    let count =
        "SELECT total(max(afters - befores, 0)), total(max(befores - afters, 0)), total(befores = afters AND before <> after) FROM row";
    let found = index.query_row(count, [], |row| Ok((row.get::<_, f64>(0)?, row.get::<_, f64>(1)?, row.get::<_, f64>(2)?))).optional()?;
    let (added, removed, changed) = found.unwrap_or_default();
    Ok(Rows { added: added as u64, removed: removed as u64, changed: changed as u64 })
}

/// Of a row's values from a column on, with their types.
fn hash(row: &Row<'_>, from: usize) -> rusqlite::Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    for n in from..row.as_ref().column_count() {
        add(&mut hasher, row.get_ref(n)?);
    }
    Ok(*hasher.finalize().as_bytes())
}

fn add(hasher: &mut blake3::Hasher, value: ValueRef<'_>) {
    let mut sized = |tag: u8, bytes: &[u8]| {
        hasher.update(&[tag]);
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    match value {
        ValueRef::Null => sized(0, &[]),
        ValueRef::Integer(n) => sized(1, &n.to_le_bytes()),
        ValueRef::Real(n) => sized(2, &n.to_bits().to_le_bytes()),
        ValueRef::Text(text) => sized(3, text),
        ValueRef::Blob(blob) => sized(4, blob),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Verify;
    use crate::source::Report;

    const BEFORE: &str = "CREATE TABLE same (id INTEGER PRIMARY KEY, t TEXT); INSERT INTO same VALUES (1, 'a'), (5, 'b');
        CREATE TABLE number (id INTEGER PRIMARY KEY, t); INSERT INTO number VALUES (-3, 'm'), (1, 'a'), (2, 'b'), (4, 'd');
        CREATE TABLE word (w TEXT COLLATE NOCASE PRIMARY KEY, n) WITHOUT ROWID; INSERT INTO word VALUES ('a', 1), ('b', 2), ('c', 3);
        CREATE TABLE pair (a, b, c, PRIMARY KEY (b, a)); INSERT INTO pair VALUES (1, 2, 3), (2, 1, 3), (NULL, 1, 1), (NULL, 1, 1);
        CREATE TABLE loose (x); INSERT INTO loose VALUES (1), (1), (1), ('y'), (NULL);
        CREATE TABLE gone (x); INSERT INTO gone VALUES (1);
        CREATE TABLE wider (a); INSERT INTO wider VALUES (1);
        CREATE VIEW seen AS SELECT t FROM number;
        CREATE TABLE \"odd \"\"name; --\" (\"a \"\"b\" INTEGER PRIMARY KEY, v); INSERT INTO \"odd \"\"name; --\" VALUES (1, 1);";
    const CHANGE: &str =
        "UPDATE number SET t = 'changed' WHERE id = 2; DELETE FROM number WHERE id = -3; INSERT INTO number VALUES (3, 'c'), (9, 'z');
        UPDATE word SET n = 9 WHERE w = 'b'; UPDATE word SET w = 'C' WHERE w = 'c'; INSERT INTO word VALUES ('d', 4);
        UPDATE pair SET c = 4 WHERE a = 1; DELETE FROM pair WHERE rowid = 4;
        DELETE FROM loose WHERE rowid = 1; UPDATE loose SET x = '1' WHERE x = 'y';
        DROP TABLE gone; CREATE TABLE come (x); ALTER TABLE wider ADD COLUMN b; CREATE INDEX of_word ON word (n);
        DROP VIEW seen; CREATE VIEW seen AS SELECT id FROM number; UPDATE \"odd \"\"name; --\" SET v = 1.0;";

    fn found(mode: &str, deep: bool) -> Vec<TableDifference> {
        let dir = tempfile::tempdir().unwrap();
        let (live, backup) = (dir.path().join("live.db"), dir.path().join("backup.db"));
        for path in [&live, &backup] {
            let db = Connection::open(path).unwrap();
            db.execute_batch(&format!("PRAGMA journal_mode = {mode}; {BEFORE}")).unwrap();
        }
        let writer = Connection::open(&live).unwrap();
        writer.execute_batch(CHANGE).unwrap();
        let names = || {
            let mut names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names
        };
        let (there, bytes) = (names(), std::fs::read(&live).unwrap());
        let (cancel, report) = (CancellationToken::new(), Report::default());
        let context = Context { cancel: &cancel, report: &report, work_dir: dir.path(), cache_dir: dir.path() };
        let compared = compare(&SqliteSource { path: live.clone(), verify: Verify::Off }, &backup, deep, &context).unwrap();
        assert!(compared.problems.is_empty(), "{:?}", compared.problems);
        assert_eq!(names(), there, "nothing is left beside it");
        assert!(std::fs::read(&live).unwrap() == bytes, "it is as it was, not even checkpointed");
        // Nobody is held up by what is left of it.
        writer.execute_batch("INSERT INTO come VALUES (1)").unwrap();
        compared.tables
    }

    fn rows(added: u64, removed: u64, changed: u64) -> Option<Rows> {
        Some(Rows { added, removed, changed })
    }

    #[test]
    fn rows_come_go_and_change_by_their_key() {
        for mode in ["wal", "delete"] {
            let found: Vec<_> = found(mode, true).into_iter().map(|d| (d.table, d.before.rows, d.after.rows, d.schema, d.rows)).collect();
            let expected = [
                ("come", None, Some(0), false, None),
                ("gone", Some(1), None, false, None),
                ("loose", Some(5), Some(4), false, rows(1, 2, 0)),
                ("number", Some(4), Some(5), false, rows(2, 1, 1)),
                ("odd \"name; --", Some(1), Some(1), false, rows(0, 0, 1)),
                ("pair", Some(4), Some(3), false, rows(0, 1, 1)),
                ("seen", None, None, true, None),
                ("wider", Some(1), Some(1), true, None),
                ("word", Some(3), Some(4), true, rows(2, 1, 1)),
            ];
            assert_eq!(found, expected.map(|(name, before, after, schema, rows)| (name.to_owned(), before, after, schema, rows)), "{mode}");
        }
    }

    #[test]
    fn without_contents_rows_and_statements_are_compared() {
        let found: Vec<_> = found("wal", false).into_iter().map(|d| d.table).collect();
        assert_eq!(found, ["come", "gone", "loose", "number", "pair", "seen", "wider", "word"]);
    }
}
