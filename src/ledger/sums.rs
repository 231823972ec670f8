//! Sums over the rows of the catalogue: SQLite notices a torn page, not a changed byte, and by these rows retention decides what goes.
//!
//! They are looked at before the catalogue is first brought up to date with a destination, and of a job's rows each time before retention decides. A
//! destination with a row that does not fit loses its rows: they are read anew from its repository or archives, which are sealed.

use std::collections::BTreeSet;

use rusqlite::{Connection, Row};

/// Of a row: 8 bytes of BLAKE3 over its columns, each with its length before it.
pub fn of(columns: &[&str]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    for column in columns {
        hasher.update(&(column.len() as u64).to_le_bytes());
        hasher.update(column.as_bytes());
    }
    hasher.finalize().as_bytes().first_chunk().copied().unwrap_or_default()
}

/// Columns of a backup, for [`fits`].
pub const BACKUP: &str = "sum, destination, id, job, CAST(time AS TEXT), outcome, type, json";
const MARK: &str = "sum, destination, id, backup, time, kind, coalesce(CAST(seconds AS TEXT), ''), coalesce(text, '')";
const TABLES: [(&str, &str); 2] = [("backup", BACKUP), ("mark", MARK)];

fn computed(row: &Row<'_>) -> rusqlite::Result<[u8; 8]> {
    let columns = row.as_ref().column_count();
    let texts = (1..columns).map(|n| row.get::<_, String>(n)).collect::<rusqlite::Result<Vec<String>>>()?;
    Ok(of(&texts.iter().map(String::as_str).collect::<Vec<_>>()))
}

/// Whether a row of these columns is as it was written. One without a sum is of an earlier keepd that was used in between.
pub fn fits(row: &Row<'_>) -> bool {
    match row.get::<_, Option<Vec<u8>>>(0) {
        Ok(None) => true,
        // What is no text any more does not fit either.
        Ok(Some(sum)) => computed(row).is_ok_and(|computed| computed == *sum),
        Err(_) => false,
    }
}

/// Adds the sums to a ledger that has none, over the rows as they are.
pub fn add(db: &mut Connection) -> rusqlite::Result<()> {
    for (table, columns) in TABLES {
        if db.column_exists(None, table, "sum")? {
            continue;
        }
        let tx = db.transaction()?;
        tx.execute_batch(&format!("ALTER TABLE {table} ADD COLUMN sum BLOB"))?;
        let sums = tx
            .prepare(&format!("SELECT {columns} FROM {table}"))?
            .query_map([], |row| Ok((row.get(1)?, row.get(2)?, computed(row)?)))?
            .collect::<rusqlite::Result<Vec<(String, String, [u8; 8])>>>()?;
        let mut update = tx.prepare(&format!("UPDATE {table} SET sum = ?3 WHERE destination = ?1 AND id = ?2"))?;
        for (destination, id, sum) in sums {
            update.execute((destination, id, sum))?;
        }
        drop(update);
        tx.commit()?;
    }
    Ok(())
}

/// Forgets what the catalogue has of destinations with a damaged row. Where it is the destination's name that is damaged, that is the row alone: the
/// destination that it was of lacks it now. Reads all rows.
pub fn forget_damaged(db: &mut Connection) -> rusqlite::Result<()> {
    // As bytes: a damaged name may be no text.
    let mut damaged: BTreeSet<Option<Vec<u8>>> = BTreeSet::new();
    for (table, columns) in TABLES {
        let mut statement = db.prepare(&format!("SELECT {columns} FROM {table}"))?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            if !fits(row) {
                damaged.insert(row.get_ref(1)?.as_bytes_or_null().ok().flatten().map(<[u8]>::to_vec));
            }
        }
    }
    if damaged.is_empty() {
        return Ok(());
    }
    let tx = db.transaction()?;
    for destination in &damaged {
        let name = String::from_utf8_lossy(destination.as_deref().unwrap_or_default());
        tracing::warn!("the ledger's list of backups at {name} is damaged; it is made anew from there");
        for (table, _) in TABLES {
            tx.execute(&format!("DELETE FROM {table} WHERE CAST(destination AS BLOB) IS ?1"), [destination])?;
        }
    }
    tx.commit()
}

#[cfg(test)]
mod tests {
    use keepd_protocol::model::{Backup, BackupDetail};

    use crate::ledger::{KnownMark, Ledger};

    fn put(ledger: &Ledger, destination: &str, id: &str) {
        let backup = Backup { id: id.repeat(64), job: "shop".into(), time: "2026-03-04T05:06:07Z".into(), ..Backup::default() };
        ledger.put_backup(destination, &BackupDetail { backup, ..BackupDetail::default() }).unwrap();
        let mark = KnownMark {
            id: id.into(),
            backup: id.repeat(64),
            time: "2026-03-04T05:06:07Z".into(),
            kind: "pin".into(),
            seconds: Some(7),
            text: Some("why".into()),
        };
        ledger.put_mark(destination, &mark).unwrap();
    }

    /// How many backups and marks there are, after the look at the sums.
    fn counts(ledger: &Ledger, destination: &str) -> (usize, usize) {
        (ledger.objects(destination).unwrap().len(), ledger.marks(destination, None).unwrap().len())
    }

    fn filled(directory: &std::path::Path) -> Ledger {
        let ledger = Ledger::open(directory).unwrap();
        for (destination, id) in [("local", "a"), ("local", "b"), ("offsite", "a"), ("offsite", "b"), ("single", "a")] {
            put(&ledger, destination, id);
        }
        ledger
    }

    const DAMAGES: [&str; 6] = [
        "UPDATE backup SET json = replace(json, '2026-03', '2036-03') WHERE destination = 'local' AND id LIKE 'a%'",
        "UPDATE backup SET time = time + 1 WHERE destination = 'local' AND id LIKE 'a%'",
        "UPDATE backup SET outcome = 'gooe' WHERE destination = 'local' AND id LIKE 'b%'",
        "UPDATE mark SET kind = 'qin' WHERE destination = 'local' AND id = 'a'",
        "UPDATE mark SET seconds = 8 WHERE destination = 'local' AND id = 'a'",
        "UPDATE mark SET text = 'who' WHERE destination = 'local' AND id = 'a'",
    ];

    #[test]
    fn a_changed_row_is_forgotten_with_its_destination_and_others_stay() {
        for damage in DAMAGES {
            let directory = tempfile::tempdir().unwrap();
            let ledger = filled(directory.path());
            assert_eq!(counts(&ledger, "local"), (2, 2), "nothing is wrong yet");
            assert_eq!(ledger.db().execute(damage, []).unwrap(), 1, "{damage}");
            drop(ledger);
            let ledger = Ledger::open(directory.path()).unwrap();
            assert_eq!(counts(&ledger, "local"), (0, 0), "{damage}");
            assert_eq!((counts(&ledger, "offsite"), counts(&ledger, "single")), ((2, 2), (1, 1)), "{damage}");
        }
    }

    #[test]
    fn a_row_that_is_changed_while_keepd_runs_is_none_that_retention_decides_by() {
        for damage in &DAMAGES[..3] {
            let directory = tempfile::tempdir().unwrap();
            let ledger = filled(directory.path());
            assert_eq!((counts(&ledger, "local"), ledger.backups_at("shop", "local").unwrap().len()), ((2, 2), 2));
            assert_eq!(ledger.db().execute(damage, []).unwrap(), 1, "{damage}");
            assert_eq!(ledger.backups_at("shop", "local").unwrap().len(), 0, "{damage}");
            assert_eq!(counts(&ledger, "local"), (0, 0), "so that all of it is read anew: {damage}");
            assert_eq!(ledger.backups_at("shop", "offsite").unwrap().len(), 2);
        }
    }

    #[test]
    fn a_row_of_nobody_knows_where_goes_alone() {
        for name in ["'mocal'", "x'ff6c'", "7"] {
            let directory = tempfile::tempdir().unwrap();
            let ledger = filled(directory.path());
            let sql = format!("UPDATE backup SET destination = {name} WHERE destination = 'single'");
            assert_eq!(ledger.db().execute(&sql, []).unwrap(), 1);
            drop(ledger);
            let ledger = Ledger::open(directory.path()).unwrap();
            assert_eq!(
                (counts(&ledger, "local"), counts(&ledger, "offsite"), counts(&ledger, "single")),
                ((2, 2), (2, 2), (0, 1)),
                "{name}"
            );
            assert_eq!(ledger.count_backups("mocal").unwrap() + ledger.count_backups("7").unwrap(), 0);
        }
    }

    #[test]
    fn a_ledger_of_an_earlier_keepd_gets_sums_over_what_it_has() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = filled(directory.path());
        ledger.db().execute_batch("ALTER TABLE backup DROP COLUMN sum; ALTER TABLE mark DROP COLUMN sum").unwrap();
        drop(ledger);
        let ledger = Ledger::open(directory.path()).unwrap();
        let without = |table: &str| {
            let sql = format!("SELECT count(*) FROM {table} WHERE sum IS NULL");
            ledger.db().query_row(&sql, [], |row| row.get::<_, i64>(0)).unwrap()
        };
        assert_eq!((without("backup"), without("mark"), counts(&ledger, "local")), (0, 0, (2, 2)));
        ledger.db().execute(DAMAGES[1], []).unwrap();
        assert_eq!(ledger.backups_at("shop", "local").unwrap().len(), 0);
    }
}
