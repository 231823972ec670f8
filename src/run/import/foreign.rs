//! A tar that keepd did not make: its entries come in any order, and go into the repository in path order.
//!
//! Contents are stored as they come. The entries wait in a table of this machine, by a key that sorts as paths do, with what is missing between them made up: directories
//! that nothing says anything of, and of several names of a file the first one as the file.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use jiff::Timestamp;
use keepd_protocol::model::{ImportCounts, Level};
use rusqlite::{Connection, OptionalExtension, params};
use tokio_util::sync::CancellationToken;

use super::commit::foreign_manifest;
use super::contents::entry;
use super::work::{Done, Work, failed, told};
use crate::portable::Limits;
use crate::repository::entry::EntrySink;
use crate::repository::page::{PageBuilder, PagedEntry, decode_list, decode_page, lists_of};
use crate::repository::source_writer::SourceWriter;
use crate::repository::spool::SpoolReader;
use crate::repository::writer::Writer;
use crate::repository::{ChunkId, Entry, Kind, Time};
use crate::run::backup::Writing;
use crate::run::live::Failure;

/// A directory that nothing says anything of.
const MADE_UP_MODE: u32 = 0o755;

/// Names by number, as the tar has them.
#[derive(Default)]
struct Owners(BTreeMap<u32, String>);

impl Owners {
    fn add(&mut self, id: u32, name: Option<&String>) {
        if let Some(name) = name.filter(|n| !n.is_empty()) {
            self.0.entry(id).or_insert_with(|| name.clone());
        }
    }

    fn of(&self, ids: &HashSet<u32>) -> Vec<(u32, String)> {
        self.0.iter().filter(|(id, _)| ids.contains(id)).map(|(id, name)| (*id, name.clone())).collect()
    }
}

pub fn import(mut work: Work<'_>, writing: Writing<'_>, whole: &CancellationToken, patience: Duration) -> Result<Done, Failure> {
    let (request, live) = (work.request, work.live);
    let (Some(source), Some(job)) = (&request.foreign_source, &request.job) else {
        return Err(failed(
            "the archive is a tar that keepd did not make; say the job and the source that it is of ('--from tar --job JOB --source NAME')",
        ));
    };
    live.update(|run| run.job = Some(job.clone()));
    if request.validate_only {
        live.step("Validating archive");
        while let Some(header) = work.next_entry()? {
            work.count(&header);
            work.read_past()?;
        }
        work.finish()?;
        work.wait_for_word(whole, patience)?;
        live.message(Level::Info, format!("the archive is whole: {}", told(&work.counts)));
        return Ok(Done { backup: None, job: job.clone(), counts: work.counts });
    }
    let open = work.open(writing)?;
    live.step("Importing files");
    let started = request.time.clone().unwrap_or_else(|| Timestamp::now().to_string());
    let place = request.place.clone().unwrap_or_default().into_bytes();
    let mut writer = Writer::new(open.repository.clone(), live.cancel.clone())?;
    let mut first = SourceWriter::new(&mut writer, source, "files", &place, None).into_first_pass(&work.work_dir)?.in_any_order();
    let (mut users, mut groups) = (Owners::default(), Owners::default());
    while let Some(header) = work.next_entry()? {
        let path = header.path.to_bytes().map_err(failed)?;
        let mut entry = entry(&header, below(&path))?;
        work.count(&header);
        users.add(header.uid, header.user.as_ref());
        groups.add(header.gid, header.group.as_ref());
        match entry.kind {
            Kind::File => match work.contents(&mut first, header.size)? {
                Some(contents) => first.push_small(entry, &contents)?,
                None => first.large_finish(entry)?,
            },
            Kind::Hardlink => {
                entry.target = below(&entry.target).to_vec();
                first.push(entry)?;
            }
            _ => first.push(entry)?,
        }
    }
    work.finish()?;
    work.wait_for_word(whole, patience)?;
    live.step("Sorting entries");
    let mut table = Table::create(&work.work_dir)?;
    table.fill(first.finish_first_pass()?, &live.cancel)?;
    let mut second = SourceWriter::new(&mut writer, source, "files", &place, None);
    table.pour(Limits::default().entries, &live.cancel, |entry| Ok(second.push(entry)?))?;
    work.counts = ImportCounts { entries: table.poured, directories: table.directories, ..work.counts };
    let written = second.finish("{}".into())?;
    live.step("Storing");
    let flushed = writer.flush()?;
    live.set_added(flushed.added_bytes);
    let (users, groups) = (users.of(&written.users), groups.of(&written.groups));
    let manifest = foreign_manifest(&work, started, written.source, users, groups);
    let backup = work.commit(&open, manifest, &flushed, None)?;
    Ok(Done { backup: Some(backup), job: job.clone(), counts: ImportCounts { backups: 1, ..work.counts } })
}

/// What comes behind the source's name.
fn below(path: &[u8]) -> &[u8] {
    path.iter().position(|b| *b == b'/').and_then(|at| path.get(at + 1..)).unwrap_or_default()
}

/// What a hard link of a tar is another name of.
enum Linked {
    /// The number of its first entry.
    File(i64),
    /// As GNU tar has a symlink of several names: each becomes one of its own.
    Symlink(Entry),
}

/// The entries in path order. Its file has a name only while it is opened.
struct Table {
    db: Connection,
    poured: u64,
    directories: u64,
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        failed(format!("the entries cannot be kept in the work directory: {error}"))
    }
}

/// Sorts as [`crate::repository::entry::path_order`] does: no path has a NUL.
fn key(path: &[u8]) -> Vec<u8> {
    path.iter().map(|b| if *b == b'/' { 0 } else { *b }).collect()
}

fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

impl Table {
    fn create(work_dir: &std::path::Path) -> Result<Self, Failure> {
        let file = tempfile::Builder::new()
            .prefix("import-")
            .tempfile_in(work_dir)
            .map_err(|e| failed(format!("cannot make a file in {}: {e}", work_dir.display())))?;
        let db = Connection::open(file.path())?;
        db.execute_batch(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA locking_mode = EXCLUSIVE; PRAGMA cache_size = -16000; PRAGMA temp_store = MEMORY;
             CREATE TABLE entry (key BLOB PRIMARY KEY, id INTEGER NOT NULL, root INTEGER, page BLOB NOT NULL) WITHOUT ROWID;
             CREATE INDEX by_root ON entry (root, key) WHERE root IS NOT NULL;
             CREATE UNIQUE INDEX by_id ON entry (id);
             CREATE TABLE list (id INTEGER, n INTEGER, bytes BLOB NOT NULL, PRIMARY KEY (id, n)) WITHOUT ROWID;
             BEGIN",
        )?;
        // Held open by the connection alone.
        file.close().map_err(|e| failed(format!("cannot remove a file in {}: {e}", work_dir.display())))?;
        Ok(Self { db, poured: 0, directories: 0 })
    }

    /// Takes the entries in the order of the tar; a link is of the file that its target is, which came before it.
    fn fill(&mut self, mut spool: SpoolReader, cancel: &CancellationToken) -> Result<(), Failure> {
        let mut id = 0i64;
        while let Some(mut entry) = spool.next_entry()? {
            if cancel.is_cancelled() {
                return Err(Failure::Cancelled);
            }
            id += 1;
            let key = key(&entry.path);
            let mut root = None;
            if entry.kind == Kind::Hardlink {
                match self.root_of(&entry)? {
                    Linked::File(id) => root = Some(id),
                    Linked::Symlink(link) => entry = Entry { path: entry.path, ..link },
                }
            }
            let lists = lists_of(&entry.content.segments);
            if !lists.is_empty() {
                entry.content.segments.clear();
            }
            for (n, list) in lists.iter().enumerate() {
                self.db.prepare_cached("INSERT INTO list VALUES (?1, ?2, ?3)")?.execute(params![id, n as i64, list])?;
            }
            let path = lossy(&entry.path);
            let paged = PagedEntry { entry, lists: vec![ChunkId([0; 32]); lists.len()] };
            let mut page = PageBuilder::default();
            let built = page.push(&paged).or_else(|| page.finish()).ok_or_else(|| failed("an entry made no page; this is a bug"))?;
            let added = self.db.prepare_cached("INSERT OR IGNORE INTO entry VALUES (?1, ?2, ?3, ?4)")?.execute(params![
                key,
                id,
                root,
                built.bytes
            ])?;
            if added == 0 {
                return Err(failed(format!("the archive is not imported: it has '{path}' twice")));
            }
        }
        Ok(())
    }

    /// What a hard link is another name of; a file is marked as one of several names.
    fn root_of(&self, entry: &Entry) -> Result<Linked, Failure> {
        let sql = "SELECT id, root FROM entry WHERE key = ?1";
        let row = |r: &rusqlite::Row<'_>| Ok((r.get::<_, i64>(0)?, r.get::<_, Option<i64>>(1)?));
        let found = self.db.prepare_cached(sql)?.query_row([key(&entry.target)], row).optional()?;
        let (id, root) = found.ok_or_else(|| {
            let (path, target) = (lossy(&entry.path), lossy(&entry.target));
            failed(format!("the archive is not imported: '{path}' is a hard link to '{target}', which does not come before it"))
        })?;
        if let Some(root) = root {
            return Ok(Linked::File(root));
        }
        let target = self.load(id)?;
        if target.kind == Kind::Symlink {
            return Ok(Linked::Symlink(target));
        }
        if target.kind != Kind::File {
            return Err(failed(format!("the archive is not imported: '{}' is a hard link to what is no file", lossy(&entry.path))));
        }
        self.db.prepare_cached("UPDATE entry SET root = ?1 WHERE id = ?1")?.execute([id])?;
        Ok(Linked::File(id))
    }

    fn load(&self, id: i64) -> Result<Entry, Failure> {
        let page: Vec<u8> = self.db.prepare_cached("SELECT page FROM entry WHERE id = ?1")?.query_row([id], |r| r.get(0))?;
        self.decoded(id, &page)
    }

    fn decoded(&self, id: i64, page: &[u8]) -> Result<Entry, Failure> {
        let entry = decode_page(page).map_err(failed)?.into_iter().next();
        let mut entry = entry.ok_or_else(|| failed("a page without an entry; this is a bug"))?.entry;
        let mut lists = self.db.prepare_cached("SELECT bytes FROM list WHERE id = ?1 ORDER BY n")?;
        let mut rows = lists.query([id])?;
        while let Some(row) = rows.next()? {
            entry.content.segments.extend(decode_list(&row.get::<_, Vec<u8>>(0)?).map_err(failed)?);
        }
        Ok(entry)
    }

    /// Gives the entries in path order, each below a directory; at most so many, those that are made up among them.
    fn pour(&mut self, most: u64, cancel: &CancellationToken, mut push: impl FnMut(Entry) -> Result<(), Failure>) -> Result<(), Failure> {
        let now = Timestamp::now();
        let now = Time { seconds: now.as_second(), nanoseconds: 0 };
        let (mut poured, mut directories) = (0u64, 0u64);
        // The directories that lead to the last entry, the source itself first.
        let mut open: Vec<Vec<u8>> = Vec::new();
        let mut give = |entry: Entry| {
            poured += 1;
            if poured > most {
                return Err(failed(format!(
                    "the archive is not imported: with the directories that lead to its entries they are more than {most}"
                )));
            }
            directories += u64::from(entry.kind == Kind::Directory);
            push(entry)
        };
        let mut rows = self.db.prepare("SELECT id, root, page, key FROM entry ORDER BY key")?;
        let mut rows = rows.query([])?;
        while let Some(row) = rows.next()? {
            if cancel.is_cancelled() {
                return Err(Failure::Cancelled);
            }
            let (id, root): (i64, Option<i64>) = (row.get(0)?, row.get(1)?);
            let mut entry = self.decoded(id, &row.get::<_, Vec<u8>>(2)?)?;
            let path = entry.path.clone();
            if let Some(root) = root {
                entry = self.name_of_file(entry, root, &row.get::<_, Vec<u8>>(3)?)?;
            }
            let is_within =
                |dir: &Vec<u8>| dir.is_empty() || path.strip_prefix(dir.as_slice()).is_some_and(|rest| rest.first() == Some(&b'/'));
            while open.last().is_some_and(|dir| !is_within(dir)) {
                open.pop();
            }
            if !path.is_empty() {
                for parent in parents(&path).skip(open.len()) {
                    if self.is_there(parent)? {
                        return Err(failed(format!(
                            "the archive is not imported: '{}' is no directory, and '{}' is in it",
                            lossy(parent),
                            lossy(&path)
                        )));
                    }
                    give(Entry {
                        path: parent.to_vec(),
                        kind: Kind::Directory,
                        mode: MADE_UP_MODE,
                        uid: entry.uid,
                        gid: entry.gid,
                        mtime: now,
                        ..Entry::default()
                    })?;
                    open.push(parent.to_vec());
                }
            }
            if entry.kind == Kind::Directory {
                open.push(path);
            }
            give(entry)?;
        }
        (self.poured, self.directories) = (poured, directories);
        Ok(())
    }

    fn is_there(&self, path: &[u8]) -> Result<bool, Failure> {
        Ok(self.db.prepare_cached("SELECT 1 FROM entry WHERE key = ?1")?.exists([key(path)])?)
    }

    /// One of several names of a file: the first in path order is the file, the others are links to it.
    fn name_of_file(&self, entry: Entry, root: i64, own: &[u8]) -> Result<Entry, Failure> {
        let first: Vec<u8> =
            self.db.prepare_cached("SELECT key FROM entry WHERE root = ?1 ORDER BY key LIMIT 1")?.query_row([root], |r| r.get(0))?;
        let file = self.load(root)?;
        if first == own {
            return Ok(Entry { path: entry.path, ..file });
        }
        let target = first.iter().map(|b| if *b == 0 { b'/' } else { *b }).collect();
        let (mode, uid, gid, mtime) = (file.mode, file.uid, file.gid, file.mtime);
        Ok(Entry { path: entry.path, kind: Kind::Hardlink, target, mode, uid, gid, mtime, ..Entry::default() })
    }
}

/// The directories that lead to a path, the source itself (the empty path) first.
fn parents(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let ends = path.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(at, _)| at);
    std::iter::once(0).chain(ends).map(|end| path.get(..end).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::entry::path_order;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keys_sort_as_paths_do(a in "[a-c./-]{0,8}", b in "[a-c./-]{0,8}") {
            prop_assert_eq!(key(a.as_bytes()).cmp(&key(b.as_bytes())), path_order(a.as_bytes(), b.as_bytes()));
        }
    }

    #[test]
    fn directories_that_are_made_up_count() {
        let dir = tempfile::tempdir().unwrap();
        let mut table = Table::create(dir.path()).unwrap();
        let mut page = PageBuilder::default();
        let entry = Entry { path: b"a/b/c".to_vec(), kind: Kind::Symlink, target: b"x".to_vec(), ..Entry::default() };
        let built = page.push(&PagedEntry { entry, lists: Vec::new() }).or_else(|| page.finish()).unwrap();
        table.db.execute("INSERT INTO entry VALUES (?1, 1, NULL, ?2)", params![key(b"a/b/c"), built.bytes]).unwrap();
        let mut pour = |most| table.pour(most, &CancellationToken::new(), |_| Ok(()));
        assert!(pour(3).unwrap_err().to_string().contains("more than 3"));
        pour(4).unwrap();
        assert_eq!((table.poured, table.directories), (4, 3));
    }

    #[test]
    fn directories_lead_to_a_path() {
        let of = |path: &'static str| parents(path.as_bytes()).map(lossy).collect::<Vec<_>>();
        assert_eq!(of("a"), [""]);
        assert_eq!(of("a/bc/d"), ["", "a", "a/bc"]);
    }
}
