//! The ledger: what happened, in one SQLite database of the state directory (WAL).
//!
//! Runs, the schedule's state, the catalogue of backups, the audit log. The catalogue is a copy of what the repositories hold and can be
//! rebuilt from them; runs, schedule state and the audit log live only here.

pub mod audit;
pub mod lock;
mod sums;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use keepd_protocol::model::{Backup, BackupDetail, BackupPlace, BackupType, Outcome, Run, RunState};
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::sqlite_error;

#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("{0}")]
    Failed(String),
}

pub type Result<T, E = LedgerError> = std::result::Result<T, E>;

/// A job's schedule state. Times are instants.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct ScheduleState {
    /// The schedule this state belongs to, in words; another one resets `last_due`.
    pub schedule: String,
    /// When the job was first seen; a job without any good backup is overdue from then on.
    pub first_seen: Option<Timestamp>,
    /// The newest due time that was started (or found already covered); the next one is computed from it.
    pub last_due: Option<Timestamp>,
    pub last_start: Option<Timestamp>,
    /// End of the newest run that made a good backup.
    pub last_good: Option<Timestamp>,
    pub last_run: Option<String>,
    pub runs_good: u64,
    pub runs_failed: u64,
    /// The job's `paused_until` as it was seen last: when it changes, what fell due until then is covered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused_until: Option<Timestamp>,
    /// When the job runs beside its schedule, once each; in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub once: Vec<Timestamp>,
    /// A run that is to be tried again, or that was noted as begun and is not written down yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry: Option<Waiting>,
    /// The clock went back: so far it had come, and nothing up to then is begun a second time when it comes there again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ahead: Option<Timestamp>,
    /// The clock leapt ahead: what holds again when it comes back. In order of time.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub leaps: Vec<Leap>,
}

/// A run that waits to be tried again.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Waiting {
    pub since: Timestamp,
    pub at: Timestamp,
    pub attempt: u32,
}

/// The clock leapt ahead, or nobody looked at it for a while.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Leap {
    /// The newest due time that was begun before.
    pub due: Timestamp,
    /// What the clock said then.
    pub to: Timestamp,
}

/// A mark of a repository, as the ledger knows it. All are text: ids in hexadecimal, the time in RFC 3339.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownMark {
    pub id: String,
    pub backup: String,
    pub time: String,
    pub kind: String,
    pub seconds: Option<u64>,
    pub text: Option<String>,
}

/// The open ledger; its methods block for a moment (a small SQLite transaction each).
#[derive(Debug)]
pub struct Ledger {
    db: Mutex<Connection>,
    path: PathBuf,
    /// The sums of the catalogue's rows were looked at since it was opened.
    are_sums_seen: AtomicBool,
    audit: Mutex<audit::Chain>,
    audited_calls: AtomicUsize,
    /// The file with the head of the audit log is to be written.
    head_behind: tokio::sync::Notify,
    /// The last entry of the audit log could not be written.
    audit_misses: AtomicBool,
    /// Ends of runs that could not be written, by id: as long as this process lives they hold, and not what the database has.
    unwritten: Mutex<BTreeMap<String, Run>>,
}

/// So many ends of runs are kept in memory; the oldest go first.
const MAX_UNWRITTEN: usize = 256;

const VERSION: i64 = 1;
const SCHEMA: &str = "
    CREATE TABLE run (id TEXT PRIMARY KEY, job TEXT, queued TEXT NOT NULL, finished INTEGER NOT NULL, json TEXT NOT NULL) WITHOUT ROWID;
    CREATE INDEX run_queued ON run (queued);
    CREATE TABLE schedule (job TEXT PRIMARY KEY, json TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE backup (destination TEXT NOT NULL, id TEXT NOT NULL, job TEXT NOT NULL, time INTEGER NOT NULL, outcome TEXT NOT NULL, type TEXT NOT NULL, json TEXT NOT NULL, PRIMARY KEY (destination, id)) WITHOUT ROWID;
    CREATE INDEX backup_id ON backup (id);
    CREATE TABLE note (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    PRAGMA user_version = 1;";

impl Ledger {
    /// Opens or makes `ledger.sqlite` in the state directory.
    pub fn open(state_dir: &Path) -> Result<Self> {
        let path = state_dir.join("ledger.sqlite");
        let failed = |e: &dyn std::fmt::Display| {
            LedgerError::Failed(format!(
                "cannot open the ledger {}: {e}. It holds the history of runs and the schedule's state; the backups themselves are safe in their \
                 repositories. If it is damaged, stop keepd, move it (and its -wal and -shm) away and start keepd: the list of backups is made \
                 anew from the repositories, the history of runs begins again",
                path.display()
            ))
        };
        // A file that could be opened tomorrow is not to be moved away.
        let at_fault = |e: &rusqlite::Error| match sqlite_error::words(e, &path) {
            (text, true) => LedgerError::Failed(format!("cannot open the ledger {}: {text}", path.display())),
            (text, false) => failed(&text),
        };
        let mut db = Connection::open(&path).map_err(|e| at_fault(&e))?;
        let said = |db: &Connection, check: &str| db.query_row(&format!("PRAGMA {check}(1)"), [], |r| r.get::<_, String>(0));
        // The version, and what integrity_check says, which looks at all that quick_check does and at the indexes: only when it is not satisfied is the other asked, whether the
        // tables can be used.
        let prepare = |db: &Connection| -> rusqlite::Result<(i64, String)> {
            db.execute_batch(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA busy_timeout = 10000; PRAGMA cache_size = -2048;",
            )?;
            let integrity = said(db, "integrity_check").unwrap_or_else(|e| e.to_string());
            let tables = if integrity == "ok" { integrity.clone() } else { said(db, "quick_check")? };
            match tables.as_str() {
                "ok" => Ok((db.query_row("PRAGMA user_version", [], |r| r.get(0))?, integrity)),
                _ => Err(rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT), Some(tables))),
            }
        };
        let (version, integrity) = prepare(&db).map_err(|e| at_fault(&e))?;
        match version {
            0 => {
                let tx = db.transaction().map_err(|e| at_fault(&e))?;
                tx.execute_batch(SCHEMA).and_then(|()| tx.commit()).map_err(|e| at_fault(&e))?;
            }
            VERSION => {}
            newer => {
                return Err(failed(&format!("it is of version {newer}, this keepd knows {VERSION}; use the newer keepd that made it")));
            }
        }
        // Made here and not with the rest, for ledgers that are older than they.
        db.execute_batch(
            "CREATE INDEX IF NOT EXISTS backup_sequence ON backup (destination, json ->> 'sequence');
             CREATE INDEX IF NOT EXISTS backup_object ON backup (destination) WHERE json_valid(json) AND json ->> 'object' IS NOT NULL;
             CREATE INDEX IF NOT EXISTS backup_proven ON backup (job, time) WHERE json_valid(json) AND json ->> '$.backup.proven' IS NOT NULL;
             CREATE INDEX IF NOT EXISTS backup_worth ON backup (job, time, outcome, type);
             DROP INDEX IF EXISTS backup_job;
             CREATE TABLE IF NOT EXISTS mark (destination TEXT NOT NULL, id TEXT NOT NULL, backup TEXT NOT NULL, time TEXT NOT NULL, kind TEXT NOT NULL, PRIMARY KEY (destination, id)) WITHOUT ROWID;
             CREATE INDEX IF NOT EXISTS mark_backup ON mark (backup);
             CREATE TABLE IF NOT EXISTS removed (destination TEXT NOT NULL, id TEXT NOT NULL, PRIMARY KEY (destination, id)) WITHOUT ROWID;",
        )
        .map_err(|e| at_fault(&e))?;
        db.execute_batch(audit::SCHEMA).map_err(|e| at_fault(&e))?;
        for (table, column) in [("mark", "seconds INTEGER"), ("mark", "text TEXT")] {
            let name = column.split(' ').next().unwrap_or_default();
            if !db.column_exists(None, table, name).map_err(|e| at_fault(&e))? {
                db.execute_batch(&format!("ALTER TABLE {table} ADD COLUMN {column}")).map_err(|e| at_fault(&e))?;
            }
        }
        sums::add(&mut db).map_err(|e| at_fault(&e))?;
        // An index is made of its table: one that hides or invents a row is made anew, once rows that are damaged themselves are forgotten. Whatever comes of it, the
        // ledger opens: what quick_check has found whole can be used.
        if integrity != "ok" {
            let mended = sums::forget_damaged(&mut db).and_then(|()| db.execute_batch("REINDEX"));
            let outcome = mended.map_or_else(|e| format!("they could not be made anew: {e}"), |()| "they were made anew".into());
            tracing::warn!("indexes of the ledger {} are damaged ({integrity}); {outcome}", path.display());
        }
        db.set_prepared_statement_cache_capacity(32);
        Ok(Self {
            db: Mutex::new(db),
            path,
            are_sums_seen: AtomicBool::new(false),
            audit: Mutex::default(),
            audited_calls: AtomicUsize::new(0),
            head_behind: tokio::sync::Notify::new(),
            audit_misses: AtomicBool::new(false),
            unwritten: Mutex::default(),
        })
    }

    fn db(&self) -> MutexGuard<'_, Connection> {
        self.db.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run_sql<T>(&self, work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>) -> Result<T> {
        work(&mut self.db()).map_err(|e| self.failed(&e))
    }

    fn failed(&self, error: &rusqlite::Error) -> LedgerError {
        LedgerError::Failed(format!("the ledger {}: {}", self.path.display(), sqlite_error::words(error, &self.path).0))
    }

    /// Proves that the ledger answers (for the watchdog).
    pub fn ping(&self) -> Result<()> {
        self.run_sql(|db| db.query_row("SELECT 1", [], |_| Ok(())))
    }

    /// Inserts or replaces a run. The end of one that cannot be written now is written with the next one that can.
    pub fn save_run(&self, run: &Run) -> Result<()> {
        let written = self.write_run(run);
        if written.is_ok() {
            self.unwritten().remove(&run.id);
            let left: Vec<Run> = self.unwritten().values().cloned().collect();
            for end in left {
                if self.write_run(&end).is_err() {
                    break;
                }
                self.unwritten().remove(&end.id);
            }
        } else if run.state.is_finished() {
            let mut unwritten = self.unwritten();
            unwritten.insert(run.id.clone(), run.clone());
            if unwritten.len() > MAX_UNWRITTEN {
                unwritten.pop_first();
            }
        }
        written
    }

    fn unwritten(&self) -> MutexGuard<'_, BTreeMap<String, Run>> {
        self.unwritten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_run(&self, run: &Run) -> Result<()> {
        let json = to_json(run)?;
        self.run_sql(|db| {
            db.prepare_cached("INSERT OR REPLACE INTO run (id, job, queued, finished, json) VALUES (?1, ?2, ?3, ?4, ?5)")?
                .execute(params![run.id, run.job, run.queued, run.state.is_finished(), json])
                .map(drop)
        })
    }

    pub fn run(&self, id: &str) -> Result<Option<Run>> {
        if let Some(run) = self.unwritten().get(id) {
            return Ok(Some(run.clone()));
        }
        let json = self.run_sql(|db| db.prepare_cached("SELECT json FROM run WHERE id = ?1")?.query_row([id], text).optional())?;
        json.map(|j| from_json(&j)).transpose()
    }

    /// The newest first.
    pub fn runs(&self, job: Option<&str>, limit: u32) -> Result<Vec<Run>> {
        let sql = "SELECT json FROM run WHERE ?1 IS NULL OR job = ?1 ORDER BY queued DESC, id DESC LIMIT ?2";
        let list =
            self.run_sql(|db| db.prepare_cached(sql)?.query_map(params![job, limit], text)?.collect::<rusqlite::Result<Vec<_>>>())?;
        self.with_ends(&list)
    }

    /// Runs as they are in the database, those that ended and could not be written as they ended.
    fn with_ends(&self, list: &[String]) -> Result<Vec<Run>> {
        let unwritten = self.unwritten();
        let ended = |run: Run| unwritten.get(&run.id).cloned().unwrap_or(run);
        list.iter().map(|json| Ok(ended(from_json(json)?))).collect()
    }

    /// The newest runs of some jobs, of these jobs' backups, and of one user.
    pub fn runs_of(&self, jobs: &BTreeSet<String>, by: Option<&str>, job: Option<&str>, limit: u32) -> Result<Vec<Run>> {
        let sql = "SELECT json FROM run WHERE (?1 IS NULL OR job = ?1) AND (job IN (SELECT value FROM json_each(?2))
            OR json_extract(json, '$.by') = ?3
            OR job IS NULL AND EXISTS (SELECT 1 FROM backup WHERE backup.id = json_extract(run.json, '$.backup')
                AND backup.job IN (SELECT value FROM json_each(?2))))
            ORDER BY queued DESC, id DESC LIMIT ?4";
        let jobs = serde_json::Value::from_iter(jobs.iter().cloned()).to_string();
        let list = self
            .run_sql(|db| db.prepare_cached(sql)?.query_map(params![job, jobs, by, limit], text)?.collect::<rusqlite::Result<Vec<_>>>())?;
        self.with_ends(&list)
    }

    /// At start: whether an earlier daemon left runs queued or running.
    pub fn has_unfinished_runs(&self) -> Result<bool> {
        self.run_sql(|db| db.query_row("SELECT EXISTS (SELECT 1 FROM run WHERE finished = 0)", [], |r| r.get(0)))
    }

    /// At start: runs that an earlier daemon left queued or running become failed, with that reason. Returns them.
    pub fn close_interrupted_runs(&self, reason: &str, now: Timestamp) -> Result<Vec<Run>> {
        let sql = "SELECT json FROM run WHERE finished = 0 ORDER BY queued";
        let open = self.run_sql(|db| db.prepare(sql)?.query_map([], text)?.collect::<rusqlite::Result<Vec<_>>>())?;
        let mut closed = Vec::new();
        for json in open {
            let mut run: Run = from_json(&json)?;
            run.state = RunState::Failed;
            run.error = Some(reason.to_owned());
            run.finished = Some(now.to_string());
            self.save_run(&run)?;
            closed.push(run);
        }
        Ok(closed)
    }

    /// Removes all but the newest `keep` finished runs.
    pub fn trim_runs(&self, keep: u32) -> Result<()> {
        let sql = "DELETE FROM run WHERE finished = 1 AND queued <= (SELECT queued FROM run ORDER BY queued DESC LIMIT 1 OFFSET ?1)";
        self.run_sql(|db| db.prepare_cached(sql)?.execute([keep]).map(drop))
    }

    pub fn schedule_state(&self, job: &str) -> Result<ScheduleState> {
        let json = self.run_sql(|db| db.prepare_cached("SELECT json FROM schedule WHERE job = ?1")?.query_row([job], text).optional())?;
        Ok(json.map(|j| from_json(&j)).transpose()?.unwrap_or_default())
    }

    pub fn save_schedule_state(&self, job: &str, state: &ScheduleState) -> Result<()> {
        let json = to_json(state)?;
        self.run_sql(|db| db.prepare_cached("INSERT OR REPLACE INTO schedule (job, json) VALUES (?1, ?2)")?.execute([job, &json]).map(drop))
    }

    /// Changes a job's schedule state, which nobody else does meanwhile. Returns what it was and what it is.
    pub fn change_schedule_state(&self, job: &str, change: impl FnOnce(&mut ScheduleState)) -> Result<(ScheduleState, ScheduleState)> {
        let mut db = self.db();
        let failed = |e: rusqlite::Error| self.failed(&e);
        let read = |db: &mut Connection| db.prepare_cached("SELECT json FROM schedule WHERE job = ?1")?.query_row([job], text).optional();
        let old: ScheduleState = read(&mut db).map_err(failed)?.map(|json| from_json(&json)).transpose()?.unwrap_or_default();
        let mut new = old.clone();
        change(&mut new);
        if new != old {
            let json = to_json(&new)?;
            let write = |db: &mut Connection| {
                db.prepare_cached("INSERT OR REPLACE INTO schedule (job, json) VALUES (?1, ?2)")?.execute([job, &json]).map(drop)
            };
            write(&mut db).map_err(failed)?;
        }
        Ok((old, new))
    }

    /// The schedule states of all jobs that there ever were.
    pub fn schedule_states(&self) -> Result<BTreeMap<String, ScheduleState>> {
        let row = |r: &Row<'_>| Ok((r.get::<_, String>(0)?, r.get::<_, String>(1)?));
        let list = self
            .run_sql(|db| db.prepare_cached("SELECT job, json FROM schedule")?.query_map([], row)?.collect::<rusqlite::Result<Vec<_>>>())?;
        list.into_iter().map(|(job, json)| Ok((job, from_json(&json)?))).collect()
    }

    /// Gives jobs these schedule states, or none at all, in one transaction. Returns what they had.
    pub fn replace_schedule_states(&self, states: &[(&str, Option<&ScheduleState>)]) -> Result<Vec<(String, Option<ScheduleState>)>> {
        if states.is_empty() {
            return Ok(Vec::new());
        }
        let new: Vec<(&str, Option<String>)> =
            states.iter().map(|(job, state)| Ok((*job, state.map(to_json).transpose()?))).collect::<Result<_>>()?;
        let old = self.run_sql(|db| {
            let tx = db.transaction()?;
            let mut old = Vec::new();
            for (job, json) in &new {
                old.push((*job, tx.query_row("SELECT json FROM schedule WHERE job = ?1", [job], text).optional()?));
                match json {
                    Some(json) => tx.execute("INSERT OR REPLACE INTO schedule (job, json) VALUES (?1, ?2)", [job, &json.as_str()])?,
                    None => tx.execute("DELETE FROM schedule WHERE job = ?1", [job])?,
                };
            }
            tx.commit()?;
            Ok(old)
        })?;
        old.into_iter().map(|(job, json)| Ok((job.to_owned(), json.map(|j| from_json(&j)).transpose()?))).collect()
    }

    /// Adds a backup to the catalogue of a destination (or replaces it). `detail.backup.destinations` is not stored: it is
    /// what the catalogue itself knows.
    pub fn put_backup(&self, destination: &str, detail: &BackupDetail) -> Result<()> {
        let b = &detail.backup;
        let time: Timestamp = b.time.parse().map_err(|e| LedgerError::Failed(format!("backup {}: its time does not parse: {e}", b.id)))?;
        let json = to_json(detail)?;
        let (time, outcome, kind) = (time.as_microsecond(), b.outcome.as_str(), b.r#type.as_str());
        let sum = sums::of(&[destination, &b.id, &b.job, &time.to_string(), outcome, kind, &json]);
        let sql =
            "INSERT OR REPLACE INTO backup (destination, id, job, time, outcome, type, json, sum) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
        self.run_sql(|db| db.prepare_cached(sql)?.execute(params![destination, b.id, b.job, time, outcome, kind, json, sum]).map(drop))
    }

    pub fn remove_backup(&self, destination: &str, id: &str) -> Result<()> {
        self.run_sql(|db| {
            db.prepare_cached("DELETE FROM mark WHERE destination = ?1 AND backup = ?2")?.execute([destination, id])?;
            db.prepare_cached("DELETE FROM backup WHERE destination = ?1 AND id = ?2")?.execute([destination, id]).map(drop)
        })
    }

    /// Notes a mark of a destination.
    pub fn put_mark(&self, destination: &str, mark: &KnownMark) -> Result<()> {
        let sql =
            "INSERT OR REPLACE INTO mark (destination, id, backup, time, kind, seconds, text, sum) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
        let seconds = mark.seconds.map(|s| i64::try_from(s).unwrap_or(i64::MAX));
        let (ran, said) = (seconds.map(|s| s.to_string()).unwrap_or_default(), mark.text.as_deref().unwrap_or_default());
        let sum = sums::of(&[destination, &mark.id, &mark.backup, &mark.time, &mark.kind, &ran, said]);
        self.run_sql(|db| {
            db.prepare_cached(sql)?
                .execute(params![destination, mark.id, mark.backup, mark.time, mark.kind, seconds, mark.text, sum])
                .map(drop)
        })
    }

    pub fn remove_mark(&self, destination: &str, id: &str) -> Result<()> {
        self.run_sql(|db| db.prepare_cached("DELETE FROM mark WHERE destination = ?1 AND id = ?2")?.execute([destination, id]).map(drop))
    }

    /// The marks of a destination, of one backup or of all, oldest first.
    pub fn marks(&self, destination: &str, backup: Option<&str>) -> Result<Vec<KnownMark>> {
        let sql = "SELECT id, backup, time, kind, seconds, text FROM mark WHERE destination = ?1 AND (?2 IS NULL OR backup = ?2) ORDER BY time, id";
        let row = |r: &Row<'_>| {
            let seconds = r.get::<_, Option<i64>>(4)?.and_then(|s| u64::try_from(s).ok());
            Ok(KnownMark { id: r.get(0)?, backup: r.get(1)?, time: r.get(2)?, kind: r.get(3)?, seconds, text: r.get(5)? })
        };
        let mut marks: Vec<KnownMark> =
            self.run_sql(|db| db.prepare_cached(sql)?.query_map(params![destination, backup], row)?.collect())?;
        // As texts, times of one second sort by how many digits their fractions have.
        marks.sort_by_cached_key(|m| m.time.parse::<Timestamp>().ok());
        Ok(marks)
    }

    /// What a destination's catalogue holds of a backup.
    pub fn backup_at(&self, destination: &str, id: &str) -> Result<Option<BackupDetail>> {
        let sql = "SELECT json FROM backup WHERE destination = ?1 AND id = ?2";
        let json = self.run_sql(|db| db.prepare_cached(sql)?.query_row([destination, id], text).optional())?;
        json.map(|j| from_json(&j)).transpose()
    }

    /// A job's backups as a destination's catalogue has them, newest first. By these retention decides: where one of them is damaged there are none, and
    /// the next look at the destination makes its list anew.
    pub fn backups_at(&self, job: &str, destination: &str) -> Result<Vec<Backup>> {
        let sql = format!("SELECT {} FROM backup WHERE job = ?1 AND destination = ?2 ORDER BY time DESC, id", sums::BACKUP);
        let rows = self.run_sql(|db| {
            let rows = db
                .prepare_cached(&sql)?
                .query_map([job, destination], |row| sums::fits(row).then(|| row.get::<_, String>("json")).transpose())?
                .collect::<rusqlite::Result<Option<Vec<String>>>>()?;
            match rows {
                Some(rows) => Ok(rows),
                None => sums::forget_damaged(db).map(|()| Vec::new()),
            }
        })?;
        rows.iter().map(|json| Ok(from_json::<BackupDetail>(json)?.backup)).collect()
    }

    /// The newest good backups of a job at a destination, newest first, with their facts; imported ones say nothing of how the job does.
    pub fn newest_good(&self, job: &str, destination: &str, limit: u32) -> Result<Vec<BackupDetail>> {
        let rows = self.newest("json", "outcome = 'good' AND type != 'imported'", job, destination, limit)?;
        rows.iter().map(|json| from_json(json)).collect()
    }

    /// A column of a job's newest backups at a destination, newest first; those from more than a day in the future (a clock was wrong) after all others.
    fn newest(&self, column: &str, which: &str, job: &str, destination: &str, limit: u32) -> Result<Vec<String>> {
        self.run_sql(|db| {
            let mut found: Vec<String> = Vec::new();
            // Each of both is found by the index on the time; a single order of both would read and sort all rows.
            for from in ["<=", ">"] {
                let left = limit.saturating_sub(u32::try_from(found.len()).unwrap_or(u32::MAX));
                if left > 0 {
                    let sql = format!(
                        "SELECT {column} FROM backup WHERE job = ?1 AND destination = ?2 AND {which}
                         AND time {from} (unixepoch() + 86400) * 1000000 ORDER BY time DESC, id LIMIT ?3"
                    );
                    let mut statement = db.prepare_cached(&sql)?;
                    let rows = statement.query_map(params![job, destination, left], text)?;
                    found.extend(rows.collect::<rusqlite::Result<Vec<_>>>()?);
                }
            }
            Ok(found)
        })
    }

    /// The backups that a destination's catalogue holds: the id that the repository knows each by, and the backup's own.
    pub fn objects(&self, destination: &str) -> Result<BTreeMap<String, String>> {
        // By indexes that have all that is asked for: the rows themselves, which fill pages of their own, are not read.
        let named = "SELECT id, id FROM backup INDEXED BY backup_id WHERE destination = ?1";
        let renamed = "SELECT json ->> 'object', id FROM backup INDEXED BY backup_object WHERE destination = ?1 AND json_valid(json) AND json ->> 'object' IS NOT NULL";
        self.run_sql(|db| {
            // Whoever asks this is about to compare it with what is there, and reads anew what is missing here.
            if !self.are_sums_seen.load(Ordering::Acquire) {
                sums::forget_damaged(db)?;
                self.are_sums_seen.store(true, Ordering::Release);
            }
            let rows = |sql: &str| -> rusqlite::Result<BTreeMap<String, String>> {
                db.prepare_cached(sql)?.query_map([destination], |r| Ok((r.get(0)?, r.get(1)?)))?.collect()
            };
            let (mut objects, renamed) = (rows(named)?, rows(renamed)?);
            for id in renamed.values() {
                objects.remove(id);
            }
            objects.extend(renamed);
            Ok(objects)
        })
    }

    /// The id of the backup that a destination's repository knows by `object`.
    pub fn id_of(&self, destination: &str, object: &str) -> Result<Option<String>> {
        let sql = "SELECT id FROM backup WHERE destination = ?1 AND id = ?2 AND json ->> 'object' IS NULL
             UNION ALL SELECT id FROM backup INDEXED BY backup_object WHERE destination = ?1 AND json_valid(json) AND json ->> 'object' IS NOT NULL AND json ->> 'object' = ?2";
        self.run_sql(|db| db.prepare_cached(sql)?.query_row([destination, object], text).optional())
    }

    /// The backup with the highest sequence number of a destination.
    pub fn newest_in_chain(&self, destination: &str) -> Result<Option<BackupDetail>> {
        let sql = "SELECT json FROM backup WHERE destination = ?1 ORDER BY json ->> 'sequence' DESC LIMIT 1";
        let json = self.run_sql(|db| db.prepare_cached(sql)?.query_row([destination], text).optional())?;
        json.map(|j| from_json(&j)).transpose()
    }

    /// What the destination's repository knows the job's newest backup by that was not imported, nor made by a clock that was ahead.
    pub fn newest_of_job(&self, job: &str, destination: &str) -> Result<Option<String>> {
        Ok(self.newest("coalesce(json ->> 'object', id)", "type != 'imported'", job, destination, 1)?.pop())
    }

    /// Whether a job has backups elsewhere that a destination has not, those that were removed there on purpose not counted.
    pub fn lacks_any(&self, job: &str, destination: &str) -> Result<bool> {
        let sql = "SELECT EXISTS (SELECT 1 FROM backup b WHERE job = ?1 AND destination != ?2 AND type != 'imported'
             AND NOT EXISTS (SELECT 1 FROM backup h INDEXED BY backup_id WHERE h.id = b.id AND h.destination = ?2)
             AND NOT EXISTS (SELECT 1 FROM removed r WHERE r.id = b.id AND r.destination = ?2))";
        self.run_sql(|db| db.prepare_cached(sql)?.query_row([job, destination], |r| r.get(0)))
    }

    /// Notes that a backup was removed from a destination on purpose: it is not copied there again.
    pub fn set_removed(&self, destination: &str, id: &str) -> Result<()> {
        let sql = "INSERT OR IGNORE INTO removed (destination, id) VALUES (?1, ?2)";
        self.run_sql(|db| db.prepare_cached(sql)?.execute([destination, id]).map(drop))
    }

    /// Backups that were removed from a destination on purpose.
    pub fn removed(&self, destination: &str) -> Result<BTreeSet<String>> {
        self.run_sql(|db| db.prepare_cached("SELECT id FROM removed WHERE destination = ?1")?.query_map([destination], text)?.collect())
    }

    /// When a job was last proven, of what lies at these destinations, and how long restoring and checking its newest proven backup took, in seconds.
    pub fn last_proven(&self, job: &str, at: &[&str]) -> Result<(Option<Timestamp>, Option<u64>)> {
        let sql = "SELECT json ->> '$.backup.proven', json ->> '$.proven_seconds' FROM backup INDEXED BY backup_proven
             WHERE job = ?1 AND type != 'imported' AND destination IN (SELECT value FROM json_each(?2))
             AND json_valid(json) AND json ->> '$.backup.proven' IS NOT NULL ORDER BY time DESC, id, destination";
        let row = |r: &Row<'_>| Ok((r.get::<_, String>(0)?, r.get::<_, Option<i64>>(1)?));
        let rows: Vec<(String, Option<i64>)> = self.run_sql(|db| db.prepare_cached(sql)?.query_map([job, &list(at)], row)?.collect())?;
        let newest = rows.iter().filter_map(|(time, _)| time.parse::<Timestamp>().ok()).max();
        Ok((newest, rows.first().and_then(|(_, seconds)| u64::try_from((*seconds)?).ok())))
    }

    /// Whether a job has made any backup that is there, of whatever worth.
    pub fn has_backups(&self, job: &str) -> Result<bool> {
        let sql = "SELECT 1 FROM backup WHERE job = ?1 AND type != 'imported' LIMIT 1";
        Ok(self.run_sql(|db| db.prepare_cached(sql)?.query_row([job], |r| r.get::<_, i64>(0)).optional())?.is_some())
    }

    /// When the newest good backup at these destinations was begun, of a job or of any. Safety copies (type pre-restore) do not count, nor imported
    /// ones: they say nothing of what the job saves; nor those from the future, which would look fresh for years.
    pub fn last_good(&self, job: Option<&str>, at: &[&str]) -> Result<Option<Timestamp>> {
        let sql = match job {
            Some(_) => {
                "SELECT time FROM backup WHERE job = ?1 AND outcome = 'good' AND type NOT IN ('pre-restore', 'imported')
                 AND destination IN (SELECT value FROM json_each(?2)) AND time <= (unixepoch() + 86400) * 1000000 ORDER BY time DESC LIMIT 1"
            }
            None => {
                "SELECT max(time) FROM backup WHERE ?1 IS NULL AND outcome = 'good' AND type NOT IN ('pre-restore', 'imported')
                 AND destination IN (SELECT value FROM json_each(?2)) AND time <= (unixepoch() + 86400) * 1000000"
            }
        };
        let micros =
            self.run_sql(|db| db.prepare_cached(sql)?.query_row(params![job, list(at)], |r| r.get::<_, Option<i64>>(0)).optional())?;
        Ok(micros.flatten().and_then(|m| Timestamp::from_microsecond(m).ok()))
    }

    /// How many backups a destination holds.
    pub fn count_backups(&self, destination: &str) -> Result<u64> {
        let sql = "SELECT count(*) FROM backup WHERE destination = ?1";
        self.run_sql(|db| db.prepare_cached(sql)?.query_row([destination], |r| r.get::<_, i64>(0))).map(|n| n as u64)
    }

    /// Newest first, one row for each id, with every destination that has it.
    pub fn backups(&self, job: Option<&str>, destination: Option<&str>) -> Result<Vec<Backup>> {
        self.assemble(
            "SELECT id, destination, json FROM backup b WHERE (?1 IS NULL OR job = ?1)
             AND (?2 IS NULL OR EXISTS (SELECT 1 FROM backup o WHERE o.id = b.id AND o.destination = ?2)) ORDER BY time DESC, id, destination",
            params![job, destination],
        )
    }

    /// All backups whose id starts with `prefix` (hexadecimal), of any job or of one: at most two, enough to see ambiguity.
    pub fn backups_by_prefix(&self, prefix: &str, job: Option<&str>) -> Result<Vec<Backup>> {
        let mut found = self.assemble(
            "SELECT id, destination, json FROM backup WHERE id >= ?1 AND id < ?1 || 'g' AND (?2 IS NULL OR job = ?2) ORDER BY time DESC, id, destination",
            params![prefix, job],
        )?;
        found.truncate(2);
        Ok(found)
    }

    /// The newest good backup that lies at one of these destinations, safety copies (type pre-restore) not counted; an imported one where there is no
    /// other. One from more than a day in the future was made by a clock that was wrong: whatever is not is newer.
    pub fn latest(&self, job: Option<&str>, at: &[&str]) -> Result<Option<Backup>> {
        let found = self.assemble(
            "SELECT id, destination, json FROM backup WHERE id = (SELECT id FROM backup WHERE (?1 IS NULL OR job = ?1) AND outcome = 'good'
             AND type != 'pre-restore' AND destination IN (SELECT value FROM json_each(?2))
             AND NOT EXISTS (SELECT 1 FROM backup o WHERE o.id = backup.id AND o.outcome = 'suspect')
             ORDER BY type = 'imported', time > (unixepoch() + 86400) * 1000000, time DESC, id LIMIT 1) ORDER BY time DESC, id, destination",
            params![job, list(at)],
        )?;
        Ok(found.into_iter().next())
    }

    pub fn backup_detail(&self, id: &str) -> Result<Option<BackupDetail>> {
        let json =
            self.run_sql(|db| db.prepare_cached("SELECT json FROM backup WHERE id = ?1 LIMIT 1")?.query_row([id], text).optional())?;
        json.map(|j| from_json(&j)).transpose()
    }

    fn assemble(&self, sql: &str, parameters: impl rusqlite::Params) -> Result<Vec<Backup>> {
        let rows = self.run_sql(|db| {
            let row = |r: &Row<'_>| Ok((r.get::<_, String>(0)?, r.get::<_, String>(1)?, r.get::<_, String>(2)?));
            db.prepare_cached(sql)?.query_map(parameters, row)?.collect::<rusqlite::Result<Vec<_>>>()
        })?;
        let mut list: Vec<Backup> = Vec::new();
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        for (id, destination, json) in rows {
            let detail: BackupDetail = from_json(&json)?;
            let at = match places.get(&id) {
                Some(at) => *at,
                None => {
                    list.push(detail.backup.clone());
                    places.insert(id, list.len() - 1);
                    list.len() - 1
                }
            };
            if let Some(backup) = list.get_mut(at) {
                // What it added is told of the capture, not of a copy.
                if detail.object.is_none() {
                    backup.added_bytes = detail.backup.added_bytes;
                }
                backup.pinned |= detail.backup.pinned;
                // The one that a job made is what it is, wherever else it was imported.
                if backup.r#type == BackupType::Imported {
                    backup.r#type = detail.backup.r#type;
                }
                // Where one destination could not be told, what the others know counts.
                if detail.backup.outcome == Outcome::Suspect {
                    (backup.outcome, backup.proven) = (Outcome::Suspect, detail.backup.proven.clone());
                } else if backup.outcome == Outcome::Good {
                    backup.proven = later(backup.proven.take(), detail.backup.proven);
                }
                backup.destinations.push(BackupPlace { name: destination, status: "present".into() });
            }
        }
        Ok(list)
    }

    /// A small value kept by name (for example a repository's newest sequence number as seen from here).
    pub fn note(&self, key: &str) -> Result<Option<String>> {
        self.run_sql(|db| db.prepare_cached("SELECT value FROM note WHERE name = ?1")?.query_row([key], text).optional())
    }

    pub fn set_note(&self, key: &str, value: &str) -> Result<()> {
        self.run_sql(|db| db.prepare_cached("INSERT OR REPLACE INTO note (name, value) VALUES (?1, ?2)")?.execute([key, value]).map(drop))
    }

    /// Looks at a note and writes it, which nobody else does meanwhile. `change` gives what comes of it and what is to be written, None for what is there.
    pub(crate) fn change_note<T>(&self, key: &str, change: impl FnOnce(Option<&str>) -> (T, Option<String>)) -> Result<T> {
        self.run_sql(|db| {
            let old = db.prepare_cached("SELECT value FROM note WHERE name = ?1")?.query_row([key], text).optional()?;
            let (answer, new) = change(old.as_deref());
            if let Some(new) = new {
                db.prepare_cached("INSERT OR REPLACE INTO note (name, value) VALUES (?1, ?2)")?.execute([key, &new])?;
            }
            Ok(answer)
        })
    }
}

/// The later of two times.
fn later(a: Option<String>, b: Option<String>) -> Option<String> {
    let at = |t: &Option<String>| t.as_ref().and_then(|t| t.parse::<Timestamp>().ok());
    if at(&b) > at(&a) { b } else { a }
}

fn text(row: &Row<'_>) -> rusqlite::Result<String> {
    row.get(0)
}

/// Names as `json_each` takes them.
fn list(names: &[&str]) -> String {
    serde_json::Value::from(names).to_string()
}

fn to_json(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| LedgerError::Failed(format!("the ledger cannot write a record: {e}")))
}

fn from_json<T: for<'a> serde::Deserialize<'a>>(json: &str) -> Result<T> {
    serde_json::from_str(json).map_err(|e| LedgerError::Failed(format!("the ledger holds a record that does not parse: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detail(id: &str, job: &str, time: &str, outcome: Outcome) -> BackupDetail {
        let backup = Backup { id: id.into(), job: job.into(), time: time.into(), outcome, ..Backup::default() };
        BackupDetail { backup, sequence: 1, ..BackupDetail::default() }
    }

    #[test]
    fn a_row_that_is_no_json_any_more_keeps_no_ledger_from_opening() {
        use std::os::unix::fs::FileExt;
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.put_backup("a", &detail("aa11", "shop", "2026-01-01T00:00:00Z", Outcome::Good)).unwrap();
        ledger.run_sql(|db| db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)")).unwrap();
        drop(ledger);
        let path = dir.path().join("ledger.sqlite");
        let bytes = std::fs::read(&path).unwrap();
        let at = bytes.windows(8).position(|w| w == b"{\"backup").unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().write_all_at(b"x", at as u64).unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        assert!(ledger.backups_at("shop", "a").unwrap().is_empty(), "it is read anew from its destination");
    }

    #[test]
    fn the_end_of_a_run_that_cannot_be_written_holds_and_is_written_later() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        let run = |state| Run { id: "r1".into(), queued: "2026-01-01T00:00:00Z".into(), state, ..Run::default() };
        ledger.save_run(&run(RunState::Running)).unwrap();
        let full = |on| ledger.run_sql(|db| db.execute_batch(&format!("PRAGMA query_only = {on}"))).unwrap();
        full("ON");
        assert!(ledger.save_run(&run(RunState::Failed)).is_err());
        assert_eq!(ledger.run("r1").unwrap().unwrap().state, RunState::Failed);
        assert_eq!(ledger.runs(None, 10).unwrap()[0].state, RunState::Failed);
        full("OFF");
        ledger.save_run(&Run { id: "r2".into(), queued: "2026-01-02T00:00:00Z".into(), ..Run::default() }).unwrap();
        assert!(ledger.unwritten().is_empty());
        drop(ledger);
        assert_eq!(Ledger::open(dir.path()).unwrap().run("r1").unwrap().unwrap().state, RunState::Failed);
    }

    #[test]
    fn an_index_that_hides_a_row_is_made_anew() {
        use std::os::unix::fs::FileExt;
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.put_backup("a", &detail("aa11", "shop", "2026-01-01T00:00:00Z", Outcome::Good)).unwrap();
        let (page, size): (u64, u64) = ledger
            .run_sql(|db| {
                db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)")?;
                let page = db.query_row("SELECT rootpage FROM sqlite_schema WHERE name = 'backup_id'", [], |r| r.get::<_, i64>(0))?;
                Ok((page as u64, db.query_row("PRAGMA page_size", [], |r| r.get::<_, i64>(0))? as u64))
            })
            .unwrap();
        drop(ledger);
        let file = std::fs::File::options().read(true).write(true).open(dir.path().join("ledger.sqlite")).unwrap();
        let mut bytes = vec![0; size as usize];
        file.read_exact_at(&mut bytes, (page - 1) * size).unwrap();
        let at = bytes.windows(4).position(|w| w == b"aa11").unwrap();
        file.write_all_at(b"x", (page - 1) * size + at as u64).unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        assert_eq!(ledger.backups_by_prefix("aa11", None).unwrap().len(), 1);
        assert!(ledger.backup_detail("aa11").unwrap().is_some());
    }

    #[test]
    fn the_catalogue_answers_by_job_place_and_prefix() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.put_backup("a", &detail("aa11", "shop", "2026-01-01T00:00:00Z", Outcome::Good)).unwrap();
        ledger.put_backup("b", &detail("aa11", "shop", "2026-01-01T00:00:00Z", Outcome::Good)).unwrap();
        ledger.put_backup("a", &detail("aa22", "shop", "2026-01-02T00:00:00Z", Outcome::Suspect)).unwrap();
        let mut safety = detail("bb33", "shop", "2026-01-03T00:00:00Z", Outcome::Good);
        safety.backup.r#type = BackupType::PreRestore;
        ledger.put_backup("a", &safety).unwrap();
        let mut imported = detail("cc44", "shop", "2026-01-04T00:00:00Z", Outcome::Good);
        imported.backup.r#type = BackupType::Imported;
        ledger.put_backup("c", &imported).unwrap();
        let all = ledger.backups(Some("shop"), None).unwrap();
        assert_eq!(all.iter().map(|b| b.id.as_str()).collect::<Vec<_>>(), ["cc44", "bb33", "aa22", "aa11"]);
        assert_eq!(all[3].destinations.len(), 2);
        assert_eq!(ledger.backups(None, Some("b")).unwrap().len(), 1);
        assert_eq!(ledger.backups_by_prefix("aa", None).unwrap().len(), 2);
        assert_eq!(ledger.backups_by_prefix("aa1", Some("shop")).unwrap().len(), 1);
        assert_eq!(ledger.backups_by_prefix("aa1", Some("other")).unwrap().len(), 0);
        assert_eq!(ledger.latest(None, &["a", "b", "c"]).unwrap().unwrap().id, "aa11", "neither suspect nor a safety copy, nor imported");
        assert_eq!(ledger.last_good(Some("shop"), &["a", "b"]).unwrap().unwrap().to_string(), "2026-01-01T00:00:00Z");
        assert_eq!((ledger.last_good(None, &["c"]).unwrap(), ledger.newest_of_job("shop", "c").unwrap()), (None, None));
        assert_eq!(ledger.latest(None, &["c"]).unwrap().unwrap().id, "cc44");
        assert!(ledger.latest(None, &["d"]).unwrap().is_none() && ledger.last_good(Some("shop"), &[]).unwrap().is_none());
        assert!(ledger.newest_good("shop", "c", 9).unwrap().is_empty() && ledger.lacks_any("shop", "c").unwrap());
        ledger.remove_backup("a", "aa11").unwrap();
        assert_eq!(ledger.backups_by_prefix("aa1", None).unwrap()[0].destinations[0].name, "b");
        for id in ["aa11", "aa22", "bb33"] {
            ["a", "b"].iter().for_each(|place| ledger.remove_backup(place, id).unwrap());
        }
        assert_eq!(ledger.latest(Some("shop"), &["a", "c"]).unwrap().unwrap().id, "cc44", "better than none");
        assert!(!ledger.has_backups("shop").unwrap() && !ledger.lacks_any("shop", "a").unwrap());
    }

    #[test]
    fn a_backup_from_the_future_is_not_the_newest_and_makes_no_job_fresh() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        let ahead = Timestamp::now().checked_add(jiff::SignedDuration::from_hours(24 * 3653)).unwrap().to_string();
        ledger.put_backup("a", &detail("ff00", "shop", &ahead, Outcome::Good)).unwrap();
        assert_eq!(ledger.last_good(Some("shop"), &["a", "b"]).unwrap(), None);
        assert_eq!(ledger.last_good(None, &["a"]).unwrap(), None);
        assert_eq!(ledger.latest(None, &["a", "b"]).unwrap().unwrap().id, "ff00", "better than none");
        ledger.put_backup("a", &detail("aa11", "shop", "2026-01-01T00:00:00Z", Outcome::Good)).unwrap();
        assert_eq!(ledger.latest(Some("shop"), &["a", "b"]).unwrap().unwrap().id, "aa11");
        assert_eq!(ledger.newest_of_job("shop", "a").unwrap().as_deref(), Some("aa11"));
        let newest = ledger.newest_good("shop", "a", 2).unwrap();
        assert_eq!(newest.iter().map(|detail| detail.backup.id.as_str()).collect::<Vec<_>>(), ["aa11", "ff00"]);
        assert_eq!(ledger.newest_good("shop", "a", 1).unwrap().len(), 1);
        assert_eq!(ledger.last_good(Some("shop"), &["a", "b"]).unwrap().unwrap().to_string(), "2026-01-01T00:00:00Z");
    }

    #[test]
    fn runs_survive_a_restart_and_interrupted_ones_are_closed() {
        let dir = tempfile::tempdir().unwrap();
        let run = |n: u32, state| Run { id: format!("r{n}"), queued: format!("2026-01-01T00:00:{n:02}Z"), state, ..Run::default() };
        {
            let ledger = Ledger::open(dir.path()).unwrap();
            ledger.save_run(&run(1, RunState::Good)).unwrap();
            ledger.save_run(&run(2, RunState::Running)).unwrap();
            ledger.set_note("k", "v").unwrap();
            ledger.save_schedule_state("shop", &ScheduleState { runs_good: 3, ..ScheduleState::default() }).unwrap();
        }
        let ledger = Ledger::open(dir.path()).unwrap();
        let closed = ledger.close_interrupted_runs("the daemon was killed", Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(closed.len(), 1);
        assert_eq!(ledger.run("r2").unwrap().unwrap().state, RunState::Failed);
        assert_eq!(ledger.runs(None, 10).unwrap().iter().map(|r| r.id.as_str()).collect::<Vec<_>>(), ["r2", "r1"]);
        assert_eq!((ledger.note("k").unwrap().as_deref(), ledger.note("x").unwrap()), (Some("v"), None));
        assert_eq!(ledger.schedule_state("shop").unwrap().runs_good, 3);
        ledger.trim_runs(1).unwrap();
        assert_eq!(ledger.runs(None, 10).unwrap().len(), 1);
    }

    #[test]
    fn runs_are_found_by_job_by_their_backups_and_by_who_began_them() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.put_backup("a", &detail("aa11", "shop", "2026-01-01T00:00:00Z", Outcome::Good)).unwrap();
        ledger.put_backup("a", &detail("bb22", "wiki", "2026-01-01T00:00:00Z", Outcome::Good)).unwrap();
        let runs = [
            ("shop", "", "root"),
            ("wiki", "", "root"),
            ("", "aa11", "root"),
            ("", "bb22", "root"),
            ("", "bb22", "anna"),
            ("wiki", "", "root"),
        ];
        for (n, (job, backup, by)) in runs.into_iter().enumerate() {
            let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
            let queued = format!("2026-01-01T00:00:{n:02}Z");
            ledger
                .save_run(&Run { id: format!("r{n}"), queued, job: some(job), backup: some(backup), by: by.into(), ..Run::default() })
                .unwrap();
        }
        let shop = BTreeSet::from(["shop".to_owned()]);
        let of = |by: Option<&str>, job: Option<&str>, limit| {
            ledger.runs_of(&shop, by, job, limit).unwrap().into_iter().map(|run| run.id).collect::<Vec<_>>()
        };
        assert_eq!(of(None, None, 9), ["r2", "r0"]);
        assert_eq!(of(Some("anna"), None, 9), ["r4", "r2", "r0"]);
        assert_eq!((of(Some("anna"), None, 1), of(None, Some("shop"), 9)), (vec!["r4".to_owned()], vec!["r0".to_owned()]));
    }

    #[test]
    fn a_damaged_or_newer_ledger_is_told() {
        let dir = tempfile::tempdir().unwrap();
        drop(Ledger::open(dir.path()).unwrap());
        let path = dir.path().join("ledger.sqlite");
        Connection::open(&path).unwrap().execute_batch("PRAGMA user_version = 9").unwrap();
        assert!(Ledger::open(dir.path()).unwrap_err().to_string().contains("version 9"));
        std::fs::write(&path, "this is no database, it is a text of some length").unwrap();
        let error = Ledger::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("move it") && error.contains("safe"), "{error}");
    }
}
