//! How often the backups refer to each chunk, as counted by the last prune: so that the next one reads what came and went since, and no more.
//!
//! Backups refer to pages, pages to lists of long contents, and both to chunks. Backups, pages and lists never change, so what is counted of them stays true. That the counts
//! fit together is proven each time before anything is concluded from them: each page and list is used as often as the backups and pages that are counted say, and the sum
//! of all references that they hold is that of all counts (an incremental multiset hash: Clarke, Devadas, van Dijk, Gassend and Suh, *Incremental Multiset Hash
//! Functions and Their Application to Memory Integrity Checking*, 2003, MSet-Add-Hash; the hash of a chunk is made of its id, itself a keyed BLAKE3). And the backups that are counted must
//! be exactly those that were listed. Where it is not so, the counts are forgotten and all is counted anew.

use std::collections::{BTreeSet, HashMap};

use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, Rows, Transaction, params};

use super::{LocalIndex, is_wrong_row};
use crate::repository::entry::ChunkId;
use crate::repository::error::Result;
use crate::repository::runs::Runs;

/// `pages`, `lists`: numbers of nodes, four bytes each, little-endian. `sum`: of the chunks that a node's table names, 16 bytes, little-endian.
pub(super) const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS counted_backup (id BLOB PRIMARY KEY, pages BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS counted_node (n INTEGER PRIMARY KEY, id BLOB NOT NULL, kind INTEGER NOT NULL, uses INTEGER NOT NULL, lists BLOB NOT NULL, sum BLOB NOT NULL, UNIQUE (id, kind));
    CREATE TABLE IF NOT EXISTS counted_chunk (id BLOB PRIMARY KEY, uses INTEGER NOT NULL) WITHOUT ROWID;";
pub(super) const FORGET: &str = "DELETE FROM counted_backup; DELETE FROM counted_node; DELETE FROM counted_chunk;";
pub(super) const DROP: &str = "DROP TABLE IF EXISTS counted_backup; DROP TABLE IF EXISTS counted_node; DROP TABLE IF EXISTS counted_chunk;";

/// A chunk that refers to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Page = 0,
    List = 1,
}

pub type NodeId = (ChunkId, Kind);

/// What a page or list refers to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// The lists of a page, each once.
    pub lists: Vec<ChunkId>,
    /// [`sum`] of all its chunks, each once.
    pub sum: u128,
}

/// A page or list as it is counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub n: u32,
    pub uses: i64,
    /// Their numbers.
    pub lists: Vec<u32>,
    pub sum: u128,
}

#[derive(Debug, Clone)]
pub enum Known {
    Counted(Node),
    New(Contents),
}

#[derive(Debug, Clone)]
pub struct NodeChange {
    /// So many more, or fewer.
    pub uses: i64,
    pub known: Known,
}

/// What is counted from now on, and what no longer.
#[derive(Default)]
pub struct Change {
    /// Backups with their pages, each page once.
    pub came: Vec<([u8; 32], Vec<ChunkId>)>,
    pub went: Vec<[u8; 32]>,
    pub nodes: HashMap<NodeId, NodeChange>,
}

/// Why counts cannot be used.
pub(super) enum Wrong {
    /// They do not fit together.
    Counts,
    Database(rusqlite::Error),
    Files(std::io::Error),
}

impl From<rusqlite::Error> for Wrong {
    fn from(error: rusqlite::Error) -> Self {
        match error {
            rusqlite::Error::QueryReturnedNoRows => Wrong::Counts,
            e if is_wrong_row(&e) => Wrong::Counts,
            e if e.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => Wrong::Counts,
            e => Wrong::Database(e),
        }
    }
}

/// The sum of these chunks, modulo 2^128.
pub fn sum<'i>(ids: impl IntoIterator<Item = &'i ChunkId>) -> u128 {
    ids.into_iter().map(hash).fold(0, u128::wrapping_add)
}

/// All of an id has a part in it: a damaged one is told, whichever of its bytes that is.
fn hash(ChunkId(id): &ChunkId) -> u128 {
    const ODD: u128 = 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835;
    let half = |bytes: Option<&[u8; 16]>| bytes.map_or(0, |bytes| u128::from_le_bytes(*bytes));
    half(id.first_chunk()).wrapping_add(half(id.last_chunk()).wrapping_mul(ODD))
}

impl LocalIndex {
    /// The backups that are counted.
    pub fn counted_backups(&self) -> Result<Option<BTreeSet<[u8; 32]>>> {
        let db = self.db();
        let work =
            || Ok(db.prepare_cached("SELECT id FROM counted_backup")?.query_map([], |r| r.get(0))?.collect::<rusqlite::Result<_>>()?);
        self.unless_wrong(work())
    }

    /// The pages of a counted backup.
    pub fn counted_pages(&self, backup: &[u8; 32]) -> Result<Option<Vec<u32>>> {
        let db = self.db();
        let ask =
            || Ok(db.query_row("SELECT pages FROM counted_backup WHERE id = ?1", [backup], |r| Ok(numbers(r.get_ref(0)?.as_blob()?)))?);
        self.unless_wrong(ask())
    }

    /// A page or list, when it is counted.
    pub fn counted(&self, (id, kind): &NodeId) -> Result<Option<Node>> {
        let db = self.db();
        let ask = || {
            let mut look = db.prepare_cached("SELECT n, uses, lists, sum FROM counted_node WHERE id = ?1 AND kind = ?2")?;
            Ok(look.query_row(params![id.0, *kind as i64], node)?)
        };
        self.unless_wrong(ask())
    }

    pub fn counted_at(&self, n: u32) -> Result<Option<(NodeId, Node)>> {
        let db = self.db();
        let ask = || {
            let mut look = db.prepare_cached("SELECT n, uses, lists, sum, id, kind FROM counted_node WHERE n = ?1")?;
            Ok(look.query_row([n], |r| Ok(((ChunkId(r.get(4)?), kind(r.get(5)?)), node(r)?)))?)
        };
        self.unless_wrong(ask())
    }

    /// Forgets all counts, so that they are made anew.
    pub fn forget_counts(&self) -> Result<()> {
        let mut db = self.db();
        let work = |tx: Transaction<'_>| tx.execute_batch(FORGET).and_then(|()| tx.commit());
        db.transaction().and_then(work).map_err(|e| self.fail(e))
    }

    /// Counts a change, wholly or not at all; None when it does not fit to what is counted.
    pub fn count(&self, change: &Change, uses: &mut Runs) -> Result<Option<()>> {
        let mut db = self.db();
        let mut work = || {
            let tx = db.transaction()?;
            count(&tx, change, uses)?;
            Ok(tx.commit()?)
        };
        self.unless_wrong(work())
    }

    /// None where the counts are wrong, or what was asked for is not there.
    pub(super) fn unless_wrong<T>(&self, asked: Result<T, Wrong>) -> Result<Option<T>> {
        match asked {
            Ok(found) => Ok(Some(found)),
            Err(Wrong::Counts) => Ok(None),
            Err(Wrong::Database(e)) => Err(self.fail(e)),
            Err(Wrong::Files(e)) => Err(self.no_room(&e)),
        }
    }
}

fn count(tx: &Transaction<'_>, change: &Change, uses: &mut Runs) -> Result<(), Wrong> {
    let mut places: HashMap<NodeId, u32> = HashMap::new();
    let mut insert = tx.prepare("INSERT INTO counted_node (id, kind, uses, lists, sum) VALUES (?1, ?2, ?3, ?4, ?5) RETURNING n")?;
    // The lists first: pages have their numbers.
    for kind in [Kind::List, Kind::Page] {
        for (node, NodeChange { uses, known }) in change.nodes.iter().filter(|((_, k), _)| *k == kind) {
            let n = match known {
                Known::Counted(known) => known.n,
                Known::New(contents) => {
                    let lists = blob(&places, contents.lists.iter().map(|id| (*id, Kind::List)))?;
                    insert.query_row(params![node.0.0, kind as i64, uses, lists, contents.sum.to_le_bytes()], |r| r.get(0))?
                }
            };
            places.insert(*node, n);
        }
    }
    for ((id, _), NodeChange { uses, known }) in &change.nodes {
        let Known::Counted(known) = known else { continue };
        let changed = match known.uses.saturating_add(*uses) {
            ..0 => return Err(Wrong::Counts),
            0 => tx.prepare_cached("DELETE FROM counted_node WHERE n = ?1 AND id = ?2")?.execute(params![known.n, id.0])?,
            uses => {
                tx.prepare_cached("UPDATE counted_node SET uses = ?3 WHERE n = ?1 AND id = ?2")?.execute(params![known.n, id.0, uses])?
            }
        };
        if changed != 1 {
            return Err(Wrong::Counts);
        }
    }
    for (id, pages) in &change.came {
        let pages = blob(&places, pages.iter().map(|id| (*id, Kind::Page)))?;
        tx.prepare_cached("INSERT INTO counted_backup (id, pages) VALUES (?1, ?2)")?.execute(params![id, pages])?;
    }
    for id in &change.went {
        tx.prepare_cached("DELETE FROM counted_backup WHERE id = ?1")?.execute([id])?;
    }
    let mut more =
        tx.prepare("INSERT INTO counted_chunk (id, uses) VALUES (?1, ?2) ON CONFLICT (id) DO UPDATE SET uses = uses + excluded.uses")?;
    let mut fewer = tx.prepare("UPDATE counted_chunk SET uses = uses + ?2 WHERE id = ?1 AND uses + ?2 >= 0 RETURNING uses")?;
    let mut remove = tx.prepare("DELETE FROM counted_chunk WHERE id = ?1")?;
    let mut merged = uses.merged().map_err(Wrong::Files)?;
    while let Some((id, uses)) = merged.next().map_err(Wrong::Files)? {
        if uses > 0 {
            more.execute(params![id.0, uses])?;
            continue;
        }
        match fewer.query_row(params![id.0, uses], |r| r.get::<_, i64>(0)).optional()? {
            Some(0) => drop(remove.execute([id.0])?),
            Some(_) => {}
            None => return Err(Wrong::Counts),
        }
    }
    Ok(())
}

/// The counted chunks in the order of their ids, and whether they are what the counted backups refer to.
pub(super) struct Counted<'s> {
    rows: Rows<'s>,
    last: Option<ChunkId>,
    /// What is left when each chunk that was passed is taken off as often as it is used; 0 at the end.
    left: u128,
}

impl<'s> Counted<'s> {
    pub const SQL: &'static str = "SELECT id, uses FROM counted_chunk ORDER BY id";

    /// `rows` are those of [`Self::SQL`].
    pub fn of(db: &Connection, rows: Rows<'s>, listed: &BTreeSet<[u8; 32]>) -> Result<Self, Wrong> {
        let mut statement = db.prepare("SELECT id FROM counted_backup ORDER BY id")?;
        let mut counted = statement.query([])?;
        let mut expected = listed.iter();
        while let Some(row) = counted.next()? {
            if expected.next() != Some(&row.get(0)?) {
                return Err(Wrong::Counts);
            }
        }
        if expected.next().is_some() {
            return Err(Wrong::Counts);
        }
        Ok(Self { rows, last: None, left: referred_to(db)? })
    }

    /// The next chunk that is needed; an error at the end, or before, when the counts do not fit together.
    pub fn next(&mut self) -> Result<Option<ChunkId>, Wrong> {
        let Some(row) = self.rows.next()? else {
            return if self.left == 0 { Ok(None) } else { Err(Wrong::Counts) };
        };
        let (id, uses) = (ChunkId(row.get(0)?), row.get::<_, i64>(1)?);
        if self.last.is_some_and(|last| last >= id) || uses <= 0 {
            return Err(Wrong::Counts);
        }
        self.last = Some(id);
        self.left = self.left.wrapping_sub(hash(&id).wrapping_mul(uses as u128));
        Ok(Some(id))
    }
}

/// The sum of all that the counted pages and lists refer to, themselves included; an error when one of them is not used as often as it is counted.
fn referred_to(db: &Connection) -> Result<u128, Wrong> {
    let (mut left, mut total): (HashMap<u32, i64>, u128) = (HashMap::new(), 0);
    let mut statement = db.prepare("SELECT n, uses, sum, id FROM counted_node")?;
    let mut rows = statement.query([])?;
    while let Some(r) = rows.next()? {
        left.insert(r.get(0)?, r.get(1)?);
        total = total.wrapping_add(u128::from_le_bytes(r.get(2)?)).wrapping_add(hash(&ChunkId(r.get(3)?)));
    }
    for sql in ["SELECT pages FROM counted_backup", "SELECT lists FROM counted_node WHERE length(lists) > 0"] {
        let mut statement = db.prepare(sql)?;
        let mut rows = statement.query([])?;
        while let Some(r) = rows.next()? {
            for n in numbers(r.get_ref(0)?.as_blob().map_err(|_| Wrong::Counts)?) {
                *left.get_mut(&n).ok_or(Wrong::Counts)? -= 1;
            }
        }
    }
    if left.values().all(|uses| *uses == 0) { Ok(total) } else { Err(Wrong::Counts) }
}

fn node(r: &Row<'_>) -> rusqlite::Result<Node> {
    let lists = numbers(r.get_ref(2)?.as_blob()?);
    Ok(Node { n: r.get(0)?, uses: r.get(1)?, lists, sum: u128::from_le_bytes(r.get(3)?) })
}

fn kind(kind: i64) -> Kind {
    if kind == 1 { Kind::List } else { Kind::Page }
}

/// The numbers of a blob.
fn numbers(blob: &[u8]) -> Vec<u32> {
    blob.chunks(4).map(|n| n.first_chunk().map_or(u32::MAX, |n| u32::from_le_bytes(*n))).collect()
}

/// The numbers of nodes, as a blob.
fn blob(places: &HashMap<NodeId, u32>, nodes: impl Iterator<Item = NodeId>) -> Result<Vec<u8>, Wrong> {
    let mut blob = Vec::new();
    for node in nodes {
        blob.extend_from_slice(&places.get(&node).ok_or(Wrong::Counts)?.to_le_bytes());
    }
    Ok(blob)
}
