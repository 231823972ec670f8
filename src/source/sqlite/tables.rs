//! Some tables of one database in the place of those of another, with all that hangs on them; everything else stays.

use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, OptionalExtension, params};
use tokio_util::sync::CancellationToken;

use super::database::{self, quoted};
use super::inspect::{Complaints, complaints, told};
use crate::source::SourceError;

/// What became of a table.
#[derive(Debug, PartialEq, Eq)]
pub struct Moved {
    pub table: String,
    pub rows_before: Option<u64>,
    pub rows_after: u64,
}

/// Gives the database at `into` the tables that the one at `from` has. Nobody else may have either open; both are ordinary files of keepd's own, and
/// what lies beside `into` (a log, a hot journal) is taken into it. Rows keep their numbers, triggers do not fire. Also says how many rows refer to
/// nothing afterwards.
pub fn take_tables(into: &Path, from: &Path, tables: &[String], cancel: &CancellationToken) -> Result<(Vec<Moved>, u64), SourceError> {
    let failed = |doing: &str, e: rusqlite::Error| match cancel.is_cancelled() {
        true => SourceError::Cancelled,
        false => SourceError::Failed(format!("cannot {doing}: {e}")),
    };
    let open = || -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = database::prepare(Connection::open_with_flags(into, flags)?, Duration::from_secs(1), cancel)?;
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
        connection.pragma_update(None, "foreign_keys", false)?;
        // A table that is dropped takes nothing else with it.
        connection.pragma_update(None, "legacy_alter_table", true)?;
        connection.execute("ATTACH ?1 AS taken", params![from.to_string_lossy()])?;
        Ok(connection)
    };
    let mut connection = open().map_err(|e| failed("open the copies of the databases", e))?;
    let transaction = connection.transaction().map_err(|e| failed("change the copy of the database", e))?;
    let mut moved = Vec::new();
    for table in tables {
        let one = take_table(&transaction, table).map_err(|e| failed(&format!("bring table {table} back"), e))?;
        moved.push(one.ok_or_else(|| SourceError::Failed(format!("table {table} is none of the backup's ordinary tables")))?);
    }
    transaction.commit().map_err(|e| failed("write the copy of the database", e))?;
    let dangling = connection
        .query_row("SELECT count(*) FROM pragma_foreign_key_check", [], |r| r.get::<_, i64>(0))
        .map_err(|e| failed("check the references", e))?;
    let Complaints { damaged, .. } = complaints(&connection, "quick_check").map_err(|e| failed("check the database", e))?;
    if !damaged.is_empty() {
        return Err(SourceError::Failed(format!("the database is damaged, its quick_check says: {}", told(&damaged))));
    }
    connection.execute("DETACH taken", []).map_err(|e| failed("let the backup's database go", e))?;
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).map_err(|e| failed("write the log back", e))?;
    connection.close().map_err(|(_, e)| failed("close the copy of the database", e))?;
    Ok((moved, u64::try_from(dangling).unwrap_or_default()))
}

/// None when the backup has no such table.
fn take_table(db: &Connection, table: &str) -> rusqlite::Result<Option<Moved>> {
    let sql_in = |schema: &str| -> rusqlite::Result<Option<String>> {
        let question =
            format!("SELECT sql FROM {schema}.sqlite_schema WHERE type = 'table' AND name = ?1 AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'");
        db.query_row(&question, [table], |r| r.get(0)).optional()
    };
    let count = |schema: &str| -> rusqlite::Result<u64> {
        db.query_row(&format!("SELECT count(*) FROM {schema}.{}", quoted(table)), [], |r| r.get::<_, i64>(0)).map(|n| n as u64)
    };
    let Some(wanted) = sql_in("taken")?.filter(|sql| !sql.to_ascii_uppercase().starts_with("CREATE VIRTUAL")) else { return Ok(None) };
    let now = sql_in("main")?;
    let rows_before = now.as_ref().map(|_| count("main")).transpose()?;
    let is_same = now.as_ref() == Some(&wanted);
    if is_same {
        db.execute(&format!("DELETE FROM main.{}", quoted(table)), [])?;
    } else {
        if now.is_some() {
            db.execute(&format!("DROP TABLE main.{}", quoted(table)), [])?;
        }
        // Statements of a schema name no database, and `main` is the first that is looked in.
        db.execute(&wanted, [])?;
    }
    let mut columns: Vec<String> = db
        .prepare("SELECT name FROM pragma_table_xinfo(?1, 'taken') WHERE hidden = 0")?
        .query_map([table], |r| r.get::<_, String>(0))?
        .collect::<rusqlite::Result<_>>()?;
    let has_numbers: bool =
        db.query_row("SELECT wr = 0 FROM pragma_table_list WHERE schema = 'taken' AND name = ?1", [table], |r| r.get(0))?;
    columns = columns.iter().map(|c| quoted(c)).collect();
    if has_numbers && !columns.iter().any(|c| c.eq_ignore_ascii_case("\"rowid\"")) {
        columns.push("rowid".into());
    }
    let columns = columns.join(", ");
    db.execute(&format!("INSERT INTO main.{0} ({columns}) SELECT {columns} FROM taken.{0}", quoted(table)), [])?;
    if !is_same {
        let hanging: Vec<String> = db
            .prepare("SELECT sql FROM taken.sqlite_schema WHERE tbl_name = ?1 AND type IN ('index', 'trigger') AND sql IS NOT NULL")?
            .query_map([table], |r| r.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        hanging.iter().try_for_each(|sql| db.execute(sql, []).map(drop))?;
    }
    Ok(Some(Moved { table: table.to_owned(), rows_before, rows_after: count("main")? }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_tables_come_back_and_everything_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (into, from) = (dir.path().join("into.db"), dir.path().join("from.db"));
        let schema = "PRAGMA journal_mode = WAL;
            CREATE TABLE kept (a); CREATE TABLE log (what);
            CREATE TABLE same (id INTEGER PRIMARY KEY AUTOINCREMENT, a, twice AS (a * 2));
            CREATE TABLE \"odd \"\"name\" (a TEXT PRIMARY KEY, b) WITHOUT ROWID;
            CREATE TABLE numbered (a); CREATE INDEX by_a ON numbered (a);
            CREATE TRIGGER noted AFTER INSERT ON same BEGIN INSERT INTO log VALUES (new.a); END;
            INSERT INTO same (a) VALUES (1), (2), (3); INSERT INTO kept VALUES ('then');
            INSERT INTO \"odd \"\"name\" VALUES ('x', 1); INSERT INTO numbered (rowid, a) VALUES (7, 'seven'), (9, 'nine');";
        for path in [&into, &from] {
            Connection::open(path).unwrap().execute_batch(schema).unwrap();
        }
        let live = Connection::open(&into).unwrap();
        live.execute_batch(
            "PRAGMA wal_autocheckpoint = 0; DELETE FROM same; UPDATE kept SET a = 'now'; DROP TABLE \"odd \"\"name\"; DROP TABLE numbered;
             CREATE TABLE numbered (a, other); INSERT INTO log VALUES ('live')",
        )
        .unwrap();
        // As it lies there when its application was killed: with its log.
        let copy = dir.path().join("copy.db");
        for suffix in ["", "-wal"] {
            std::fs::copy(format!("{}{suffix}", into.display()), format!("{}{suffix}", copy.display())).unwrap();
        }
        let cancel = CancellationToken::new();
        let tables = ["same", "odd \"name", "numbered"].map(str::to_owned);
        let (moved, dangling) = take_tables(&copy, &from, &tables, &cancel).unwrap();
        assert_eq!(moved.iter().map(|m| (m.rows_before, m.rows_after)).collect::<Vec<_>>(), [(Some(0), 3), (None, 1), (Some(0), 2)]);
        assert_eq!(dangling, 0);
        assert_eq!(std::fs::metadata(dir.path().join("copy.db-wal")).map_or(0, |m| m.len()), 0, "all of it is in the file itself");
        let db = Connection::open(&copy).unwrap();
        let text = |sql: &str| db.query_row(sql, [], |r| r.get::<_, String>(0)).unwrap();
        assert_eq!(text("SELECT group_concat(id || ':' || twice) FROM same"), "1:2,2:4,3:6");
        assert_eq!(text("SELECT a FROM kept"), "now");
        assert_eq!(text("SELECT group_concat(rowid || a) FROM numbered"), "7seven,9nine");
        assert_eq!(text("SELECT name FROM sqlite_schema WHERE type = 'index' AND tbl_name = 'numbered'"), "by_a");
        assert_eq!(text("SELECT group_concat(what) FROM (SELECT what FROM log ORDER BY rowid)"), "1,2,3,live", "no trigger fired");
        assert_eq!(text("PRAGMA journal_mode"), "wal");
        for wrong in ["nothing", "sqlite_sequence"] {
            assert!(take_tables(&copy, &from, &[wrong.to_owned()], &cancel).is_err(), "{wrong}");
        }
    }
}
