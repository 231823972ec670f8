//! The local index held against what backups need: how much of each pack that is, what is dead, what is lost.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::{Connection, OptionalExtension};

use super::counts::{Counted, Wrong};
use super::{LocalIndex, is_wrong_row, kind_of};
use crate::crypto::ObjectKind;
use crate::repository::entry::ChunkId;
use crate::repository::error::{RepositoryError, Result};
use crate::repository::pack::PackedChunk;

/// What is damaged where no single row is known: see [`LocalIndex::damaged`].
pub const CHUNKS: &str = "what it has of chunks is";

/// The cache held against all that is needed.
pub struct Held {
    /// Every pack, with its needed chunks and their sealed bytes.
    pub usage: Vec<PackUsage>,
    pub dead: Dead,
    /// What is needed and in no pack of the cache.
    pub missing: Vec<ChunkId>,
}

/// Why a cache was not held against what is needed.
enum Scan {
    Needed(Wrong),
    Database(rusqlite::Error),
    Damaged,
}

impl From<rusqlite::Error> for Scan {
    fn from(error: rusqlite::Error) -> Self {
        if is_wrong_row(&error) { Scan::Damaged } else { Scan::Database(error) }
    }
}

impl From<Wrong> for Scan {
    fn from(wrong: Wrong) -> Self {
        Scan::Needed(wrong)
    }
}

impl Held {
    fn scan(&mut self, db: &Connection, listed: &BTreeSet<[u8; 32]>) -> Result<(), Scan> {
        let tx = db.unchecked_transaction()?;
        let (mut packs, mut places) = (Vec::new(), HashMap::new());
        let mut counted = tx.prepare(Counted::SQL)?;
        let mut needed = Counted::of(&tx, counted.query([])?, listed)?;
        let mut next = needed.next()?;
        {
            let mut statement = tx.prepare("SELECT n, id, size, kind, condemned, listed FROM pack ORDER BY n")?;
            let mut rows = statement.query([])?;
            while let Some(r) = rows.next()? {
                let (id, size, kind) = (r.get(1)?, r.get::<_, i64>(2)? as u64, kind_of(r.get(3)?));
                let usage = PackUsage { id, size, kind, used_bytes: 0, used_chunks: 0, condemned: r.get(4)?, listed: r.get(5)? };
                places.insert(r.get::<_, i64>(0)?, packs.len());
                packs.push(usage);
            }
            let mut kill = tx.prepare(&format!("INSERT INTO {} (id) VALUES (?1)", self.dead.table))?;
            let mut statement = tx.prepare("SELECT id, pack, sealed FROM chunk ORDER BY id")?;
            let mut rows = statement.query([])?;
            let mut last: Option<ChunkId> = None;
            while let Some(r) = rows.next()? {
                let id = ChunkId(r.get(0)?);
                // In another order one that is needed would be passed by.
                if last.is_some_and(|last| last >= id) {
                    return Err(Scan::Damaged);
                }
                last = Some(id);
                while let Some(passed) = next.filter(|next| *next < id) {
                    self.missing.push(passed);
                    next = needed.next()?;
                }
                if next != Some(id) {
                    kill.execute([id.0])?;
                    continue;
                }
                next = needed.next()?;
                match places.get(&r.get(1)?).and_then(|place| packs.get_mut(*place)) {
                    Some(usage) => {
                        usage.used_bytes = usage.used_bytes.saturating_add(u64::from(r.get::<_, u32>(2)?));
                        usage.used_chunks += 1;
                    }
                    // A chunk of a pack that is not there is nowhere.
                    None => self.missing.push(id),
                }
            }
        }
        while let Some(passed) = next {
            self.missing.push(passed);
            next = needed.next()?;
        }
        drop(needed);
        drop(counted);
        tx.commit()?;
        self.usage = packs;
        Ok(())
    }
}

/// The chunks of the cache that nothing needs, as a temporary table of its connection; gone with this.
pub struct Dead {
    db: Arc<Mutex<Connection>>,
    table: String,
}

impl Dead {
    fn new(local: &LocalIndex) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let table = format!("temp.dead_{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let made = local.db().execute_batch(&format!("CREATE TABLE {table} (id BLOB PRIMARY KEY) WITHOUT ROWID"));
        made.map_err(|e| local.fail(e))?;
        Ok(Self { db: local.db.clone(), table })
    }
}

impl Drop for Dead {
    fn drop(&mut self) {
        let db = self.db.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(e) = db.execute_batch(&format!("DROP TABLE {}", self.table)) {
            tracing::debug!("{}: {e}", self.table);
        }
    }
}

/// How much of a pack is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackUsage {
    pub id: [u8; 32],
    pub size: u64,
    pub kind: ObjectKind,
    pub used_bytes: u64,
    pub used_chunks: u64,
    pub condemned: bool,
    /// The index object it stands in.
    pub listed: Option<[u8; 32]>,
}

impl LocalIndex {
    /// Holds all that these backups are counted to need against all chunks of the cache, both in the order of ids; None when the counts are not of these backups, or do
    /// not fit together. A cache that is found damaged is emptied, and made anew by the next run.
    pub fn held(&self, listed: &BTreeSet<[u8; 32]>) -> Result<Option<Held>> {
        let mut held = Held { usage: Vec::new(), dead: Dead::new(self)?, missing: Vec::new() };
        let scanned = {
            let db = self.db();
            held.scan(&db, listed)
        };
        match scanned {
            Ok(()) => Ok(Some(held)),
            Err(Scan::Needed(wrong)) => self.unless_wrong(Err(wrong)),
            Err(Scan::Database(e)) => Err(self.fail(e)),
            Err(Scan::Damaged) => Err(self.damaged(CHUNKS)?),
        }
    }

    /// Empties a cache that was found damaged; what is to be told of that. `what` says what is damaged, with its verb.
    pub fn damaged(&self, what: &str) -> Result<RepositoryError> {
        self.forget_counts()?;
        self.clear()?;
        let text = format!(
            "{what} damaged, and nothing was pruned. It is a cache: it is made anew from the repository, and the next prune goes on"
        );
        Ok(RepositoryError::LocalIndex { location: self.location.clone(), text })
    }

    /// Which of the chunks that are needed the cache has in which pack; None for one that is dead, or that it does not have.
    pub fn needed_in(&self, dead: &Dead, ids: &[ChunkId]) -> Result<Vec<Option<[u8; 32]>>> {
        let mut db = self.db();
        let mut work = || -> rusqlite::Result<Vec<Option<[u8; 32]>>> {
            let tx = db.transaction()?;
            let mut look = tx.prepare(&format!(
                "SELECT p.id FROM chunk c JOIN pack p ON p.n = c.pack WHERE c.id = ?1 AND NOT EXISTS (SELECT 1 FROM {} d WHERE d.id = c.id)",
                dead.table
            ))?;
            ids.iter().map(|id| look.query_row([id.0], |r| r.get(0)).optional()).collect()
        };
        work().map_err(|e| self.fail(e))
    }

    /// Which chunks of a pack are needed, with their ordinals.
    pub fn needed_chunks(&self, dead: &Dead, pack: &[u8; 32]) -> Result<Vec<(u32, PackedChunk)>> {
        let db = self.db();
        let work = || -> rusqlite::Result<Vec<(u32, PackedChunk)>> {
            let mut statement = db.prepare(&format!(
                "SELECT c.ordinal, c.id, c.start, c.sealed, c.len FROM chunk c JOIN pack p ON p.n = c.pack
                 WHERE p.id = ?1 AND NOT EXISTS (SELECT 1 FROM {} d WHERE d.id = c.id) ORDER BY c.ordinal",
                dead.table
            ))?;
            let rows = statement.query_map([pack], |r| {
                Ok((r.get(0)?, PackedChunk { id: ChunkId(r.get(1)?), offset: r.get(2)?, sealed_len: r.get(3)?, len: r.get(4)? }))
            })?;
            rows.collect()
        };
        work().map_err(|e| self.fail(e))
    }

    /// Damaged packs, and how many of these chunks, which are needed and in no other pack, were in them.
    pub fn lost(&self, needed: &HashSet<ChunkId>) -> Result<BTreeMap<[u8; 32], u64>> {
        let rows: Vec<(ChunkId, [u8; 32])> = self.rows("SELECT id, pack FROM lost", [], |r| Ok((ChunkId(r.get(0)?), r.get(1)?)))?;
        let mut lost = BTreeMap::new();
        for (chunk, pack) in rows {
            *lost.entry(pack).or_default() += u64::from(needed.contains(&chunk));
        }
        Ok(lost)
    }

    /// Which of these chunks were in a data pack and do not open any more, and that is known.
    pub fn known_as_lost(&self, ids: &[ChunkId]) -> Result<HashSet<ChunkId>> {
        let mut db = self.db();
        let mut work = || -> rusqlite::Result<HashSet<ChunkId>> {
            let tx = db.transaction()?;
            let mut look = tx.prepare_cached("SELECT 1 FROM lost WHERE id = ?1 AND pack IN (SELECT id FROM pack WHERE kind = 1)")?;
            let mut known = HashSet::new();
            for id in ids {
                if look.exists([id.0])? {
                    known.insert(*id);
                }
            }
            Ok(known)
        };
        work().map_err(|e| self.fail(e))
    }
}

#[cfg(test)]
mod tests {
    use super::super::counts::{Change, Contents, Kind, Known, NodeChange, sum};
    use super::*;
    use crate::crypto::HEADER_BYTES;
    use crate::repository::index::IndexedPack;
    use crate::repository::runs::Runs;

    fn id(n: u8) -> ChunkId {
        ChunkId([n; 32])
    }

    fn pack(name: u8, chunks: &[u8]) -> IndexedPack {
        let offset = |n: usize| (HEADER_BYTES + 10 * n) as u32;
        let chunks: Vec<PackedChunk> =
            chunks.iter().enumerate().map(|(n, c)| PackedChunk { id: id(*c), offset: offset(n), sealed_len: 10, len: 1 }).collect();
        IndexedPack { id: [name; 32], size: 1000, kind: ObjectKind::DataPack, chunks }
    }

    /// A backup with one page, which refers to these, is all that is counted.
    fn needing(local: &LocalIndex, ids: &[u8]) {
        let ids: BTreeSet<ChunkId> = ids.iter().map(|n| id(*n)).collect();
        // The first is the page.
        let Some((page, table)) = ids.iter().next().map(|page| (*page, ids.iter().skip(1))) else { return };
        let known = Known::New(Contents { lists: Vec::new(), sum: sum(table) });
        let nodes = [((page, Kind::Page), NodeChange { uses: 1, known })].into();
        let mut uses = Runs::within(local.directory());
        ids.iter().for_each(|id| uses.add(*id, 1).unwrap());
        local.forget_counts().unwrap();
        assert!(local.count(&Change { came: vec![([9; 32], vec![page])], went: Vec::new(), nodes }, &mut uses).unwrap().is_some());
    }

    #[test]
    fn what_is_needed_dead_and_missing_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let local = LocalIndex::open(&dir.path().join("index.sqlite"), "there").unwrap();
        local.load(&[([1; 32], vec![pack(1, &[9, 2, 5]), pack(2, &[4, 2])]), ([2; 32], vec![pack(3, &[7])])]).unwrap();
        let used = |held: &Held| held.usage.iter().map(|u| (u.id[0], u.used_chunks, u.used_bytes)).collect::<Vec<_>>();
        needing(&local, &[5, 3, 2, 5, 8, 4, 200]);
        let held = local.held(&[[9; 32]].into()).unwrap().unwrap();
        assert_eq!(used(&held), [(1, 2, 20), (2, 1, 10), (3, 0, 0)], "a chunk that is in two packs counts where it was first");
        assert_eq!(held.missing, [id(3), id(8), id(200)]);
        // Another one at the same time, which needs all.
        needing(&local, &(0..=255).collect::<Vec<_>>());
        let all = local.held(&[[9; 32]].into()).unwrap().unwrap();
        assert_eq!(used(&all), [(1, 3, 30), (2, 1, 10), (3, 1, 10)]);
        assert_eq!(local.needed_in(&held.dead, &[id(9), id(2), id(3)]).unwrap(), [None, Some([1; 32]), None]);
        assert_eq!(local.needed_in(&all.dead, &[id(9), id(2), id(3)]).unwrap(), [Some([1; 32]), Some([1; 32]), None]);
        let ordinals: Vec<u32> = local.needed_chunks(&held.dead, &[1; 32]).unwrap().iter().map(|(ordinal, _)| *ordinal).collect();
        assert_eq!(ordinals, [1, 2]);
        let table = held.dead.table.clone();
        drop(held);
        assert!(local.db().execute_batch(&format!("SELECT * FROM {table}")).is_err());
        local.mark_lost(&[1; 32], &[id(5)]).unwrap();
        assert_eq!(local.held(&[[9; 32]].into()).unwrap().unwrap().missing.iter().filter(|c| **c == id(5)).count(), 1);
        assert_eq!(local.known_as_lost(&[id(5), id(8)]).unwrap(), HashSet::from([id(5)]));
        assert_eq!(local.lost(&HashSet::from([id(5)])).unwrap(), BTreeMap::from([([1; 32], 1)]));
    }

    #[test]
    fn a_cache_with_a_wrong_row_is_emptied_and_nothing_is_concluded() {
        for damage in ["UPDATE chunk SET id = 'text' WHERE pack = 1", "UPDATE pack SET id = x'00' WHERE n = 1"] {
            let dir = tempfile::tempdir().unwrap();
            let local = LocalIndex::open(&dir.path().join("index.sqlite"), "there").unwrap();
            local.load(&[([1; 32], vec![pack(1, &[9])])]).unwrap();
            assert_eq!(local.execute(damage), 1);
            let told = local.held(&BTreeSet::new()).err().unwrap().to_string();
            assert!(told.contains("nothing was pruned"), "{told}");
            assert!(local.loaded().unwrap().is_empty());
        }
    }

    #[test]
    fn many_are_taken_up_in_another_way_and_found() {
        let dir = tempfile::tempdir().unwrap();
        let local = LocalIndex::open(&dir.path().join("index.sqlite"), "there").unwrap();
        let id = |n: u32| ChunkId(*blake3::hash(&n.to_le_bytes()).as_bytes());
        let chunk = |n: u32| PackedChunk { id: id(n), offset: HEADER_BYTES as u32 + n % 1000 * 10, sealed_len: 10, len: 1 };
        let pack = |name: u32| IndexedPack {
            id: id(name).0,
            size: 1,
            kind: ObjectKind::DataPack,
            chunks: (0..1000).map(|n| chunk(name * 1000 + n)).collect(),
        };
        let indexes: Vec<_> = (0..120).map(|n| (id(n).0, vec![pack(n)])).collect();
        local.load(&indexes).unwrap();
        for n in [0, 1, 77_777, 119_999] {
            let at = local.lookup(&id(n)).unwrap().unwrap();
            assert_eq!((at.pack, at.ordinal), (id(n / 1000).0, n % 1000));
        }
        let made = local.db().query_row("SELECT count(*) FROM sqlite_schema WHERE name = 'chunk_pack'", [], |r| r.get::<_, i64>(0));
        assert_eq!((made.unwrap(), local.loaded().unwrap().len()), (1, 120));
    }
}
