//! The local index: a cache of the repository's index in SQLite, so that memory does not grow with the repository.
//!
//! Whatever is in it can be made again from the repository. Packs that were stored but are in no index object yet (an
//! interrupted run left them, or the present one) are marked, so that the next run uses them instead of storing again.

pub mod counts;
mod held;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, OptionalExtension, Transaction, params};

use super::entry::{ChunkId, MAX_CHUNK_BYTES};
use super::error::{RepositoryError, Result};
use super::index::IndexedPack;
use super::pack::{MAX_PACK_BYTES, PackedChunk, is_tail, is_write_only};
use crate::crypto::{HEADER_BYTES, ObjectKind};
use crate::sqlite_error;

pub use held::{CHUNKS, Dead, Held, PackUsage};

/// Where a chunk lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    pub pack: [u8; 32],
    pub kind: ObjectKind,
    /// The chunk's place in its pack, counted from 0.
    pub ordinal: u32,
    pub offset: u32,
    pub sealed_len: u32,
    pub len: u32,
}

impl Location {
    /// Whether a chunk may lie there: within a pack, and no longer than any.
    fn is_possible(&self) -> bool {
        let end = u64::from(self.offset) + u64::from(self.sealed_len);
        self.offset >= HEADER_BYTES as u32 && end <= MAX_PACK_BYTES && self.len as usize <= MAX_CHUNK_BYTES
    }
}

pub struct LocalIndex {
    db: Arc<Mutex<Connection>>,
    location: String,
    path: PathBuf,
    /// What packs that stand in no index object yet held when they were put in here, as digests: the cache itself has no sums.
    added: Mutex<HashMap<[u8; 32], [u8; 32]>>,
}

/// Of the layout; a cache of another one is thrown away.
const VERSION: i64 = 5;
/// `lost`: chunks that do not open any more, and where that was; of each damaged pack also [`ITSELF`]. `listed`: the index object that a pack stands in. `condemned`: nothing needs it,
/// and new backups must not build upon it. `read`: when it was read whole and found good, in seconds since 1970. `closed`: a write-only pack.
/// `compared`: the state of the storage with which `pack` and `loaded` agreed; a change of theirs forgets it.
/// `went`: how often a pack or a chunk went from here.
/// `translation`: what chunks of other repositories became here.
const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS pack (n INTEGER PRIMARY KEY, id BLOB NOT NULL UNIQUE, size INTEGER NOT NULL, kind INTEGER NOT NULL, listed BLOB, condemned INTEGER NOT NULL, read INTEGER NOT NULL DEFAULT 0, closed INTEGER NOT NULL DEFAULT 0);
    CREATE INDEX IF NOT EXISTS pack_closed ON pack (closed) WHERE closed;
    CREATE INDEX IF NOT EXISTS pack_listed ON pack (listed);
    CREATE TABLE IF NOT EXISTS lost (id BLOB NOT NULL, pack BLOB NOT NULL, PRIMARY KEY (id, pack)) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS lost_pack ON lost (pack);
    CREATE TABLE IF NOT EXISTS condemned (id BLOB PRIMARY KEY, since INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS chunk (id BLOB PRIMARY KEY, pack INTEGER NOT NULL, ordinal INTEGER NOT NULL, start INTEGER NOT NULL, sealed INTEGER NOT NULL, len INTEGER NOT NULL) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS chunk_pack ON chunk (pack);
    CREATE TABLE IF NOT EXISTS loaded (id BLOB PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS went (one INTEGER PRIMARY KEY CHECK (one = 1), n INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS compared (one INTEGER PRIMARY KEY CHECK (one = 1), state BLOB NOT NULL);
    CREATE TRIGGER IF NOT EXISTS pack_came AFTER INSERT ON pack BEGIN DELETE FROM compared; END;
    CREATE TRIGGER IF NOT EXISTS pack_went AFTER DELETE ON pack BEGIN DELETE FROM compared; INSERT INTO went VALUES (1, 1) ON CONFLICT (one) DO UPDATE SET n = n + 1; END;
    CREATE TRIGGER IF NOT EXISTS chunk_lost AFTER INSERT ON lost BEGIN INSERT INTO went VALUES (1, 1) ON CONFLICT (one) DO UPDATE SET n = n + 1; END;
    CREATE TRIGGER IF NOT EXISTS pack_became AFTER UPDATE OF id, size ON pack BEGIN DELETE FROM compared; END;
    CREATE TRIGGER IF NOT EXISTS loaded_came AFTER INSERT ON loaded BEGIN DELETE FROM compared; END;
    CREATE TRIGGER IF NOT EXISTS loaded_went AFTER DELETE ON loaded BEGIN DELETE FROM compared; END;
    CREATE TABLE IF NOT EXISTS translation (repository BLOB NOT NULL, there BLOB NOT NULL, here BLOB NOT NULL, PRIMARY KEY (repository, there)) WITHOUT ROWID;";

/// Chunks that are taken up in one transaction, some 30 MiB of memory.
const BATCH_CHUNKS: usize = 500_000;
/// So many are taken up by an empty cache in another way.
const BULK_CHUNKS: usize = 100_000;

/// Stands for no chunk, and for a pack as a whole.
const ITSELF: ChunkId = ChunkId([0; 32]);

/// The caches by which something is pruned.
static PRUNED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// A cache that nobody else prunes by.
pub struct Alone(PathBuf);

impl Drop for Alone {
    fn drop(&mut self) {
        PRUNED.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

impl LocalIndex {
    /// Opens the cache at `path`; a file that is no database of this layout is thrown away, for it can be made again.
    pub fn open(path: &Path, location: &str) -> Result<Self> {
        // To put a new file into WAL mode waits for nobody: of two that open it at once, as after a start, one would find it locked.
        static OPENING: Mutex<()> = Mutex::new(());
        let _alone = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
        let connect = || -> rusqlite::Result<Connection> {
            let db = Connection::open(path)?;
            db.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA cache_size = -8192; PRAGMA busy_timeout = 120000; PRAGMA temp_store = FILE;")?;
            let version: i64 = db.query_row("PRAGMA user_version", [], |r| r.get(0))?;
            if version != VERSION {
                db.execute_batch(
                    "DROP TABLE IF EXISTS pack; DROP TABLE IF EXISTS chunk; DROP TABLE IF EXISTS loaded; DROP TABLE IF EXISTS note; DROP TABLE IF EXISTS condemned; DROP TABLE IF EXISTS compared;",
                )?;
                // What is lost cannot be learnt from the repository; version 4 has it in the same columns.
                if version != 4 {
                    db.execute_batch("DROP TABLE IF EXISTS lost")?;
                }
                db.execute_batch(counts::DROP)?;
                db.pragma_update(None, "user_version", VERSION)?;
            }
            db.execute_batch(SCHEMA)?;
            db.execute_batch(counts::SCHEMA)?;
            db.set_prepared_statement_cache_capacity(32);
            Ok(db)
        };
        let db = connect().or_else(|first| {
            // No space, no descriptors: it is as good as it was, and reading a whole repository again helps nobody.
            if sqlite_error::words(&first, path).1 {
                return Err(first);
            }
            for suffix in ["", "-wal", "-shm"] {
                let mut name = path.as_os_str().to_owned();
                name.push(suffix);
                let _ = std::fs::remove_file(name);
            }
            connect().map_err(|_| first)
        });
        match db {
            Ok(db) => {
                Ok(Self { db: Arc::new(Mutex::new(db)), location: location.to_owned(), path: path.to_owned(), added: Mutex::default() })
            }
            Err(e) => {
                let text = format!("cannot open {}: {}", path.display(), sqlite_error::words(&e, path).0);
                Err(RepositoryError::LocalIndex { location: location.to_owned(), text })
            }
        }
    }

    fn db(&self) -> MutexGuard<'_, Connection> {
        self.db.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, error: rusqlite::Error) -> RepositoryError {
        RepositoryError::LocalIndex {
            location: self.location.clone(),
            text: match sqlite_error::words(&error, &self.path) {
                (text, true) => text,
                (text, false) => {
                    format!("{text}; it is a cache: stop keepd, remove {}, start keepd, and it is made anew", self.path.display())
                }
            },
        }
    }

    /// Damages the cache, or asks how it is; how many rows that changed.
    #[cfg(test)]
    pub fn execute(&self, sql: &str) -> usize {
        self.db().execute(sql, []).unwrap()
    }

    /// The texts that a question has for an answer.
    #[cfg(test)]
    pub fn ask(&self, sql: &str) -> Vec<String> {
        self.rows(sql, [], |r| r.get(0)).unwrap()
    }

    /// The index objects already read into the cache.
    pub fn loaded(&self) -> Result<HashSet<[u8; 32]>> {
        self.rows("SELECT id FROM loaded", [], |r| r.get(0))
    }

    /// Empties the cache, wholly or not at all: packs that are known and hold nothing are worse than none.
    pub fn clear(&self) -> Result<()> {
        let mut db = self.db();
        let work =
            |tx: Transaction<'_>| tx.execute_batch("DELETE FROM chunk; DELETE FROM pack; DELETE FROM loaded;").and_then(|()| tx.commit());
        db.transaction().and_then(work).map_err(|e| self.fail(e))
    }

    /// Takes up index objects: their ids and packs.
    pub fn load(&self, indexes: &[([u8; 32], Vec<IndexedPack>)]) -> Result<()> {
        let count = |packs: &[IndexedPack]| packs.iter().map(|p| p.chunks.len()).sum::<usize>();
        // An index over very many rows is made in a fraction of the time when they are all there.
        let is_bulk = indexes.iter().map(|(_, packs)| count(packs)).sum::<usize>() >= BULK_CHUNKS && self.is_empty()?;
        if is_bulk {
            self.db().execute_batch("DROP INDEX IF EXISTS chunk_pack").map_err(|e| self.fail(e))?;
        }
        let (mut batch, mut chunks, mut done) = (Vec::new(), 0, Ok(()));
        for (n, (id, packs)) in indexes.iter().enumerate() {
            chunks += count(packs);
            batch.push((Some(id), packs.as_slice()));
            if done.is_ok() && (chunks >= BATCH_CHUNKS || n + 1 == indexes.len()) {
                done = self.insert(&batch);
                batch.clear();
                chunks = 0;
            }
        }
        let indexed = if is_bulk { self.db().execute_batch(SCHEMA).map_err(|e| self.fail(e)) } else { Ok(()) };
        done.and(indexed)
    }

    fn is_empty(&self) -> Result<bool> {
        self.db().query_row("SELECT NOT EXISTS (SELECT 1 FROM chunk)", [], |r| r.get(0)).map_err(|e| self.fail(e))
    }

    /// Takes up a pack that stands in no index object yet.
    pub fn add_unindexed(&self, pack: &IndexedPack) -> Result<()> {
        self.insert(&[(None, std::slice::from_ref(pack))])?;
        self.added().insert(pack.id, digest(pack));
        Ok(())
    }

    fn added(&self) -> MutexGuard<'_, HashMap<[u8; 32], [u8; 32]>> {
        self.added.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pack that waits to be listed, when it was put in here by this process and is still the same.
    pub fn pack_as_added(&self, id: &[u8; 32]) -> Result<Option<IndexedPack>> {
        let Some(added) = self.added().get(id).copied() else { return Ok(None) };
        Ok(self.pack(id)?.filter(|pack| digest(pack) == added))
    }

    /// A chunk that is in two packs is remembered where it was first, unless that pack is condemned and the other is not. All in one transaction, chunks in the
    /// order of their ids: so each page of the table is written once, and not for each chunk.
    fn insert(&self, indexes: &[(Option<&[u8; 32]>, &[IndexedPack])]) -> Result<()> {
        let mut db = self.db();
        let mut work = || -> rusqlite::Result<()> {
            let tx = db.transaction()?;
            {
                let mut add_pack = tx.prepare_cached(
                    "INSERT INTO pack (id, size, kind, listed, condemned, closed) VALUES (?1, ?2, ?3, ?4, EXISTS (SELECT 1 FROM condemned WHERE id = ?1), ?5)
                     ON CONFLICT (id) DO UPDATE SET listed = coalesce(excluded.listed, listed) RETURNING n",
                )?;
                let mut add_chunk = tx.prepare_cached(
                    "INSERT INTO chunk (id, pack, ordinal, start, sealed, len) SELECT ?1, ?2, ?3, ?4, ?5, ?6
                     WHERE NOT EXISTS (SELECT 1 FROM lost WHERE id = ?1 AND pack = ?7) ON CONFLICT (id) DO UPDATE
                     SET pack = excluded.pack, ordinal = excluded.ordinal, start = excluded.start, sealed = excluded.sealed, len = excluded.len
                     WHERE (SELECT condemned FROM pack WHERE n = chunk.pack) > (SELECT condemned FROM pack WHERE n = excluded.pack)",
                )?;
                let mut add_loaded = tx.prepare_cached("INSERT OR IGNORE INTO loaded (id) VALUES (?1)")?;
                let mut chunks: Vec<(&PackedChunk, u32, i64, &[u8; 32])> = Vec::new();
                for (index_id, packs) in indexes {
                    for pack in *packs {
                        let kind = i64::from(pack.kind == ObjectKind::MetaPack) + 1;
                        let n: i64 =
                            add_pack.query_row(params![pack.id, pack.size as i64, kind, index_id, is_write_only(pack)], |r| r.get(0))?;
                        chunks.extend(pack.chunks.iter().zip(0..).map(|(c, ordinal)| (c, ordinal, n, &pack.id)));
                    }
                    if let Some(id) = index_id {
                        add_loaded.execute([id])?;
                    }
                }
                // Those of one id stay in their order.
                chunks.sort_by_key(|(c, ..)| c.id);
                for (c, ordinal, n, pack) in chunks {
                    add_chunk.execute(params![c.id.0, n, ordinal, c.offset, c.sealed_len, c.len, pack])?;
                }
            }
            tx.commit()
        };
        work().map_err(|e| self.fail(e))
    }

    /// Where a chunk lies. A place where no chunk can lie (the cache is damaged) is none.
    pub fn lookup(&self, id: &ChunkId) -> Result<Option<Location>> {
        let db = self.db();
        let mut statement = db
            .prepare_cached(
                "SELECT p.id, p.kind, c.ordinal, c.start, c.sealed, c.len FROM chunk c JOIN pack p ON p.n = c.pack WHERE c.id = ?1",
            )
            .map_err(|e| self.fail(e))?;
        let row = statement.query_row([id.0], |r| {
            let kind = kind_of(r.get(1)?);
            Ok(Location { pack: r.get(0)?, kind, ordinal: r.get(2)?, offset: r.get(3)?, sealed_len: r.get(4)?, len: r.get(5)? })
        });
        Ok(row.optional().map_err(|e| self.fail(e))?.filter(Location::is_possible))
    }

    /// Puts a chunk where the repository says that it lies, when the cache had it elsewhere or not at all.
    pub fn correct(&self, id: &ChunkId, at: &Location) -> Result<()> {
        let mut db = self.db();
        let mut work = || -> rusqlite::Result<()> {
            let tx = db.transaction()?;
            let kind = i64::from(at.kind == ObjectKind::MetaPack) + 1;
            tx.execute("UPDATE pack SET kind = ?2 WHERE id = ?1", params![at.pack, kind])?;
            tx.execute(
                "INSERT INTO chunk (id, pack, ordinal, start, sealed, len) SELECT ?1, n, ?3, ?4, ?5, ?6 FROM pack WHERE id = ?2 ON CONFLICT (id) DO UPDATE
                 SET pack = excluded.pack, ordinal = excluded.ordinal, start = excluded.start, sealed = excluded.sealed, len = excluded.len",
                params![id.0, at.pack, at.ordinal, at.offset, at.sealed_len, at.len],
            )?;
            tx.commit()
        };
        work().map_err(|e| self.fail(e))
    }

    /// The kinds of the packs that chunks lie in, condemned ones too; None for chunks that are not there. All in one transaction.
    pub fn kinds(&self, ids: &[ChunkId]) -> Result<Vec<Option<ObjectKind>>> {
        let mut db = self.db();
        let mut work = || -> rusqlite::Result<Vec<Option<ObjectKind>>> {
            let tx = db.transaction()?;
            let mut look = tx.prepare_cached("SELECT p.kind FROM chunk c JOIN pack p ON p.n = c.pack WHERE c.id = ?1")?;
            ids.iter().map(|id| look.query_row([id.0], |r| Ok(kind_of(r.get(0)?))).optional()).collect()
        };
        work().map_err(|e| self.fail(e))
    }

    /// The plaintext lengths of chunks, None for those that are not there or lie in a condemned pack. All in one transaction: it costs more to begin one
    /// than to look one up.
    pub fn lens(&self, ids: &[ChunkId]) -> Result<Vec<Option<u32>>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let mut db = self.db();
        let mut work = || -> rusqlite::Result<Vec<Option<u32>>> {
            let tx = db.transaction()?;
            let mut look =
                tx.prepare_cached("SELECT c.len FROM chunk c JOIN pack p ON p.n = c.pack WHERE c.id = ?1 AND NOT p.condemned")?;
            ids.iter().map(|id| look.query_row([id.0], |r| r.get(0)).optional()).collect()
        };
        work().map_err(|e| self.fail(e))
    }

    /// Whether there is any write-only pack.
    pub fn has_write_only(&self) -> Result<bool> {
        self.db().query_row("SELECT EXISTS (SELECT 1 FROM pack WHERE closed)", [], |r| r.get(0)).map_err(|e| self.fail(e))
    }

    /// The write-only packs among those that chunks lie in. All in one transaction.
    pub fn write_only_packs(&self, ids: &[ChunkId]) -> Result<HashSet<[u8; 32]>> {
        let mut db = self.db();
        let mut work = || -> rusqlite::Result<HashSet<[u8; 32]>> {
            let tx = db.transaction()?;
            let mut look = tx.prepare_cached("SELECT p.id FROM chunk c JOIN pack p ON p.n = c.pack WHERE c.id = ?1 AND p.closed")?;
            ids.iter().filter_map(|id| look.query_row([id.0], |r| r.get(0)).optional().transpose()).collect()
        };
        work().map_err(|e| self.fail(e))
    }

    /// Whether anything is remembered of another repository's chunks.
    pub fn has_translations(&self, repository: &[u8; 16]) -> Result<bool> {
        let sql = "SELECT EXISTS (SELECT 1 FROM translation WHERE repository = ?1)";
        self.db().query_row(sql, [repository], |r| r.get(0)).map_err(|e| self.fail(e))
    }

    /// What chunks of another repository are here, as far as that is remembered.
    pub fn translations(&self, repository: &[u8; 16], there: &[ChunkId]) -> Result<Vec<Option<ChunkId>>> {
        let mut db = self.db();
        let mut work = || -> rusqlite::Result<Vec<Option<ChunkId>>> {
            let tx = db.transaction()?;
            let mut look = tx.prepare_cached("SELECT here FROM translation WHERE repository = ?1 AND there = ?2")?;
            there.iter().map(|id| look.query_row(params![repository, id.0], |r| Ok(ChunkId(r.get(0)?))).optional()).collect()
        };
        work().map_err(|e| self.fail(e))
    }

    /// Remembers chunks of another repository (first) and what they are here.
    pub fn put_translations(&self, repository: &[u8; 16], pairs: &[(ChunkId, ChunkId)]) -> Result<()> {
        let mut db = self.db();
        let mut work = || -> rusqlite::Result<()> {
            let tx = db.transaction()?;
            for (there, here) in pairs {
                let sql = "INSERT OR REPLACE INTO translation (repository, there, here) VALUES (?1, ?2, ?3)";
                tx.prepare_cached(sql)?.execute(params![repository, there.0, here.0])?;
            }
            tx.commit()
        };
        work().map_err(|e| self.fail(e))
    }

    /// All rows of a question.
    fn rows<T, C: FromIterator<T>>(
        &self,
        sql: &str,
        parameters: impl rusqlite::Params,
        row: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<C> {
        let db = self.db();
        let work = || -> rusqlite::Result<C> { db.prepare_cached(sql)?.query_map(parameters, row)?.collect() };
        work().map_err(|e| self.fail(e))
    }

    /// All packs with their sizes, or those that are not condemned.
    pub fn packs(&self, condemned_too: bool) -> Result<Vec<([u8; 32], u64)>> {
        self.rows(
            if condemned_too { "SELECT id, size FROM pack" } else { "SELECT id, size FROM pack WHERE NOT condemned" },
            [],
            id_and_number,
        )
    }

    /// The chunks that the cache has in a pack, however many of it those are.
    pub fn chunks_in(&self, pack: &[u8; 32]) -> Result<Vec<ChunkId>> {
        self.rows("SELECT c.id FROM chunk c JOIN pack p ON p.n = c.pack WHERE p.id = ?1", [pack], |r| Ok(ChunkId(r.get(0)?)))
    }

    /// A pack is damaged, and these chunks of it (none, when its header or footer alone is) do not open any more: from now on they are not there, so
    /// that a backup that has their content stores it anew.
    pub fn mark_lost(&self, pack: &[u8; 32], chunks: &[ChunkId]) -> Result<()> {
        let mut db = self.db();
        let mut work = || -> rusqlite::Result<()> {
            let tx = db.transaction()?;
            for id in chunks.iter().chain([&ITSELF]) {
                tx.prepare_cached("INSERT OR IGNORE INTO lost (id, pack) VALUES (?1, ?2)")?.execute(params![id.0, pack])?;
                tx.prepare_cached("DELETE FROM chunk WHERE id = ?1 AND pack = (SELECT n FROM pack WHERE id = ?2)")?
                    .execute(params![id.0, pack])?;
            }
            tx.commit()
        };
        work().map_err(|e| self.fail(e))
    }

    /// A pack is whole again (somebody put a good copy in its place); true when it was not before. Its chunks must be added again.
    pub fn unmark_lost(&self, pack: &[u8; 32]) -> Result<bool> {
        Ok(self.db().execute("DELETE FROM lost WHERE pack = ?1", [pack]).map_err(|e| self.fail(e))? > 0)
    }

    /// A number that is another one when a pack or a chunk went from here, because it is gone or damaged.
    pub fn went(&self) -> Result<i64> {
        let found = self.db().query_row("SELECT n FROM went", [], |r| r.get(0)).optional();
        found.map(Option::unwrap_or_default).map_err(|e| self.fail(e))
    }

    /// The state of the storage, by [`crate::storage::Storage::state`], with which the packs and index objects here agree.
    pub fn compared(&self) -> Result<Option<[u8; 32]>> {
        match self.db().query_row("SELECT state FROM compared", [], |r| r.get(0)).optional() {
            Err(e) if is_wrong_row(&e) => Ok(None),
            found => found.map_err(|e| self.fail(e)),
        }
    }

    pub fn set_compared(&self, state: &[u8; 32]) -> Result<()> {
        let done = self.db().execute("INSERT OR REPLACE INTO compared (one, state) VALUES (1, ?1)", [state]);
        done.map(drop).map_err(|e| self.fail(e))
    }

    /// The same where `marked` was set and nothing changed since.
    pub fn confirm_compared(&self, marked: &[u8; 32], state: &[u8; 32]) -> Result<()> {
        let done = self.db().execute("UPDATE compared SET state = ?2 WHERE state = ?1", [marked, state]);
        done.map(drop).map_err(|e| self.fail(e))
    }

    /// At most so many packs with their sizes, those condemned too, by their ids from the one behind `last` on, round to it.
    pub fn packs_in_turn(&self, last: &[u8; 32], most: usize) -> Result<Vec<([u8; 32], u64)>> {
        let sql = "SELECT id, size FROM pack WHERE id > ?1 ORDER BY id LIMIT ?2";
        let mut packs: Vec<_> = self.rows(sql, params![last, most as i64], id_and_number)?;
        if packs.len() < most {
            let sql = "SELECT id, size FROM pack WHERE id <= ?1 ORDER BY id LIMIT ?2";
            let before: Vec<_> = self.rows(sql, params![last, (most - packs.len()) as i64], id_and_number)?;
            packs.extend(before);
        }
        Ok(packs)
    }

    /// Packs that are not condemned and were not read whole since `before` (seconds since 1970), those first that wait longest; at
    /// most `most`. Those that were read after `now`, by a clock that was wrong, are among them.
    pub fn unread(&self, before: i64, now: i64, most: usize) -> Result<Vec<([u8; 32], u64)>> {
        /// A clock that is set right by less is none that was wrong.
        const AHEAD: i64 = 86_400;
        let sql = "SELECT id, size FROM pack WHERE NOT condemned AND (read <= ?1 OR read > ?2) ORDER BY read > ?2, read, id LIMIT ?3";
        self.rows(sql, params![before, now.saturating_add(AHEAD), most as i64], id_and_number)
    }

    /// Notes that packs were read whole and found good.
    pub fn mark_read(&self, packs: &[[u8; 32]], now: i64) -> Result<()> {
        let mut db = self.db();
        let mut work = || -> rusqlite::Result<()> {
            let tx = db.transaction()?;
            for id in packs {
                tx.prepare_cached("UPDATE pack SET read = ?2 WHERE id = ?1")?.execute(params![id, now])?;
            }
            tx.commit()
        };
        work().map_err(|e| self.fail(e))
    }

    /// Forgets packs, and with them that their chunks are there.
    pub fn forget(&self, packs: &[[u8; 32]]) -> Result<()> {
        let mut db = self.db();
        let mut work = || -> rusqlite::Result<()> {
            let tx = db.transaction()?;
            for id in packs {
                tx.execute("DELETE FROM chunk WHERE pack = (SELECT n FROM pack WHERE id = ?1)", [id])?;
                tx.execute("DELETE FROM pack WHERE id = ?1", [id])?;
                tx.execute("DELETE FROM lost WHERE pack = ?1", [id])?;
            }
            tx.execute("DELETE FROM translation WHERE NOT EXISTS (SELECT 1 FROM chunk WHERE chunk.id = translation.here)", [])?;
            tx.commit()
        };
        work().map_err(|e| self.fail(e))
    }

    /// Condemns exactly these packs, each since a time in seconds since 1970.
    pub fn set_condemned(&self, since: &BTreeMap<[u8; 32], i64>) -> Result<()> {
        if self.condemned()? == *since {
            return Ok(());
        }
        let mut db = self.db();
        let mut work = || -> rusqlite::Result<()> {
            let tx = db.transaction()?;
            tx.execute("DELETE FROM condemned", [])?;
            for (id, time) in since {
                tx.prepare_cached("INSERT INTO condemned (id, since) VALUES (?1, ?2)")?.execute(params![id, time])?;
            }
            tx.execute("UPDATE pack SET condemned = EXISTS (SELECT 1 FROM condemned WHERE condemned.id = pack.id)", [])?;
            tx.commit()
        };
        work().map_err(|e| self.fail(e))
    }

    /// What is condemned, and since when.
    pub fn condemned(&self) -> Result<BTreeMap<[u8; 32], i64>> {
        self.rows("SELECT id, since FROM condemned", [], |r| Ok((r.get(0)?, r.get(1)?)))
    }

    /// Ids of the packs that stand in no index object yet and should.
    pub fn unindexed(&self) -> Result<Vec<[u8; 32]>> {
        self.rows("SELECT id FROM pack WHERE listed IS NULL AND NOT condemned ORDER BY n", [], |r| r.get(0))
    }

    /// The packs of an index object.
    pub fn listed_in(&self, index_id: &[u8; 32]) -> Result<Vec<[u8; 32]>> {
        self.rows("SELECT id FROM pack WHERE listed = ?1 ORDER BY n", [index_id], |r| r.get(0))
    }

    /// The index objects that no pack stands in any more.
    pub fn idle_indexes(&self) -> Result<Vec<[u8; 32]>> {
        self.rows("SELECT id FROM loaded WHERE NOT EXISTS (SELECT 1 FROM pack WHERE listed = loaded.id) ORDER BY id", [], |r| r.get(0))
    }

    /// The index objects with the number of their chunks.
    pub fn index_sizes(&self) -> Result<BTreeMap<[u8; 32], u64>> {
        let sql = "SELECT l.id, (SELECT count(*) FROM pack p JOIN chunk c ON c.pack = p.n WHERE p.listed = l.id) FROM loaded l";
        self.rows(sql, [], id_and_number)
    }

    /// A pack with all its chunks. Chunks that lie in an older pack too are listed there only, so a pack with doubles comes
    /// back as None: its footer has the whole list.
    pub fn pack(&self, id: &[u8; 32]) -> Result<Option<IndexedPack>> {
        let db = self.db();
        let work = || -> rusqlite::Result<Option<IndexedPack>> {
            let head = db
                .prepare_cached("SELECT n, size, kind FROM pack WHERE id = ?1")?
                .query_row([id], |r| Ok((r.get::<_, i64>(0)?, r.get::<_, i64>(1)?, r.get::<_, i64>(2)?)))
                .optional()?;
            let Some((n, size, kind)) = head else { return Ok(None) };
            let kind = kind_of(kind);
            let mut statement = db.prepare_cached("SELECT id, start, sealed, len, ordinal FROM chunk WHERE pack = ?1 ORDER BY ordinal")?;
            let rows = statement.query_map([n], |r| {
                Ok((PackedChunk { id: ChunkId(r.get(0)?), offset: r.get(1)?, sealed_len: r.get(2)?, len: r.get(3)? }, r.get::<_, i64>(4)?))
            })?;
            let mut chunks: Vec<PackedChunk> = Vec::new();
            let mut next = HEADER_BYTES as u32;
            for row in rows {
                let (chunk, ordinal) = row?;
                if ordinal != chunks.len() as i64 || chunk.offset != next {
                    return Ok(None);
                }
                next = next.saturating_add(chunk.sealed_len);
                chunks.push(chunk);
            }
            // The last ones may be those that are listed elsewhere.
            let whole = (size as u64).checked_sub(u64::from(next)).is_some_and(|tail| is_tail(tail, &chunks));
            Ok(whole.then_some(IndexedPack { id: *id, size: size as u64, kind, chunks }))
        };
        work().map_err(|e| self.fail(e))
    }

    /// Notes that an index object was written that lists these packs.
    pub fn mark_indexed(&self, index_id: &[u8; 32], packs: &[[u8; 32]]) -> Result<()> {
        let mut db = self.db();
        let mut work = || -> rusqlite::Result<()> {
            let tx = db.transaction()?;
            for id in packs {
                tx.execute("UPDATE pack SET listed = ?2 WHERE id = ?1", params![id, index_id])?;
            }
            tx.execute("INSERT OR IGNORE INTO loaded (id) VALUES (?1)", [index_id])?;
            tx.commit()
        };
        work().map_err(|e| self.fail(e))?;
        let mut added = self.added();
        for id in packs {
            added.remove(id);
        }
        Ok(())
    }

    /// Notes that index objects were removed; all of it or nothing: a pack that is still listed in one that is not known any more would have every later prune
    /// look for that one.
    pub fn unload(&self, index_ids: &[[u8; 32]]) -> Result<()> {
        let mut db = self.db();
        let mut work = || -> rusqlite::Result<()> {
            let tx = db.transaction()?;
            for id in index_ids {
                tx.execute("DELETE FROM loaded WHERE id = ?1", [id])?;
                tx.execute("UPDATE pack SET listed = NULL WHERE listed = ?1", [id])?;
            }
            tx.commit()
        };
        work().map_err(|e| self.fail(e))
    }

    /// Keeps other prunes away from this cache until it is dropped; None when there is one: the same repository may be reached in two ways.
    pub fn pruned_alone(&self) -> Option<Alone> {
        PRUNED.lock().unwrap_or_else(PoisonError::into_inner).insert(self.path.clone()).then(|| Alone(self.path.clone()))
    }

    /// The packs that the cache learnt last, with their sizes.
    pub fn newest_packs(&self, most: usize) -> Result<Vec<([u8; 32], u64)>> {
        self.rows("SELECT id, size FROM pack ORDER BY n DESC LIMIT ?1", [most as i64], id_and_number)
    }

    /// The directory of the cache.
    pub fn directory(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// Temporary files beside the cache cannot be written or read.
    pub fn no_room(&self, error: &std::io::Error) -> RepositoryError {
        let text = format!("a temporary file in {}: {error}", self.directory().display());
        RepositoryError::LocalIndex { location: self.location.clone(), text }
    }
}

/// A row holds what nobody wrote there.
fn is_wrong_row(error: &rusqlite::Error) -> bool {
    use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType};
    matches!(error, FromSqlConversionFailure(..) | InvalidColumnType(..) | IntegralValueOutOfRange(..))
}

/// Of all that an index object would say of a pack.
fn digest(pack: &IndexedPack) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&pack.size.to_le_bytes()).update(&[u8::from(pack.kind == ObjectKind::MetaPack)]);
    for c in &pack.chunks {
        hasher.update(&c.id.0).update(&c.offset.to_le_bytes()).update(&c.sealed_len.to_le_bytes()).update(&c.len.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

fn id_and_number(row: &rusqlite::Row<'_>) -> rusqlite::Result<([u8; 32], u64)> {
    Ok((row.get(0)?, row.get::<_, i64>(1)? as u64))
}

fn kind_of(kind: i64) -> ObjectKind {
    if kind == 2 { ObjectKind::MetaPack } else { ObjectKind::DataPack }
}
