//! Counting what backups need: reads the manifests, pages and lists that came since the last time, and the pages and lists that no backup has any more, and changes the
//! counts in the local index (see [`super::local::counts`]) by what they refer to. So the work is that of what came and went, however long the history; and on a remote storage
//! nothing is fetched twice.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::entry::ChunkId;
use super::error::{RepositoryError, Result};
use super::local::CHUNKS;
use super::local::counts::{Change, Contents, Kind, Known, Node, NodeChange, NodeId, sum};
use super::needed::refuse;
use super::open::Repository;
use super::page;
use super::runs::Runs;
use crate::storage::StorageError;

/// What is read is counted after this time at the latest: what is cancelled then, or killed, need not be read again.
const BATCH: Duration = Duration::from_secs(60);
/// And when so many pages and lists came, some 30 MiB of memory, …
const BATCH_NODES: usize = 100_000;
/// … the backups have so many pages between them (32 MiB), …
const BATCH_PAGES: usize = 1_000_000;
/// … or so many backups went.
const BATCH_GONE: usize = 64;

/// Counts what these backups need. Fails when anything that came cannot be read, for then nobody knows what is needed. What cannot be taken off any more has all
/// counted anew.
pub fn bring_up_to_date(repository: &Repository, listed: &BTreeSet<[u8; 32]>, cancel: &CancellationToken) -> Result<()> {
    if tried(repository, listed, cancel)?.is_none() {
        tracing::info!("{}: what its backups need is counted anew", repository.location());
        repository.local.forget_counts()?;
        if tried(repository, listed, cancel)?.is_none() {
            return Err(repository.local.damaged(CHUNKS)?);
        }
    }
    Ok(())
}

/// None when it cannot go on from what is counted.
fn tried(repository: &Repository, listed: &BTreeSet<[u8; 32]>, cancel: &CancellationToken) -> Result<Option<()>> {
    let Some(counted) = repository.local.counted_backups()? else { return Ok(None) };
    let mut walk = Walk::new(repository, cancel);
    for id in listed.difference(&counted) {
        walk.go_on()?;
        let manifest = repository.read_manifest(id).map_err(refuse)?;
        let pages: BTreeSet<ChunkId> = manifest.sources.iter().flat_map(|s| &s.pages).map(|page| ChunkId(*page.chunk)).collect();
        pages.iter().try_for_each(|page| walk.one_more((*page, Kind::Page)))?;
        walk.pages += pages.len();
        walk.change.came.push((*id, pages.into_iter().collect()));
        if walk.is_full() && walk.count()?.is_none() {
            return Ok(None);
        }
    }
    for id in counted.difference(listed) {
        let Some(pages) = repository.local.counted_pages(id)? else { return Ok(None) };
        for n in pages {
            if walk.one_fewer(n)?.is_none() {
                return Ok(None);
            }
        }
        walk.change.went.push(*id);
        if (walk.is_full() || walk.change.went.len() >= BATCH_GONE) && walk.count()?.is_none() {
            return Ok(None);
        }
    }
    walk.count()
}

struct Walk<'r> {
    repository: &'r Repository,
    cancel: &'r CancellationToken,
    begun: Instant,
    /// Of the backups that came.
    pages: usize,
    change: Change,
    uses: Runs,
}

impl<'r> Walk<'r> {
    fn new(repository: &'r Repository, cancel: &'r CancellationToken) -> Self {
        let uses = Runs::within(repository.local.directory());
        Self { repository, cancel, begun: Instant::now(), pages: 0, change: Change::default(), uses }
    }

    fn is_full(&self) -> bool {
        self.begun.elapsed() >= BATCH || self.change.nodes.len() >= BATCH_NODES || self.pages >= BATCH_PAGES
    }

    /// Counts what was gathered, and begins to gather again; None when it does not fit to what is counted.
    fn count(&mut self) -> Result<Option<()>> {
        // Pages first: lists go with them.
        for kind in [Kind::Page, Kind::List] {
            if self.take_off(kind)?.is_none() {
                return Ok(None);
            }
        }
        let Self { change, mut uses, .. } = std::mem::replace(self, Self::new(self.repository, self.cancel));
        if change.came.is_empty() && change.went.is_empty() {
            return Ok(Some(()));
        }
        self.repository.local.count(&change, &mut uses)
    }

    fn go_on(&self) -> Result<()> {
        if self.cancel.is_cancelled() { Err(RepositoryError::Cancelled) } else { Ok(()) }
    }

    /// One more has this page or list. What is not counted yet is read.
    fn one_more(&mut self, node: NodeId) -> Result<()> {
        if let Some(change) = self.change.nodes.get_mut(&node) {
            change.uses += 1;
            return Ok(());
        }
        if let Some(counted) = self.repository.local.counted(&node)? {
            self.change.nodes.insert(node, NodeChange { uses: 1, known: Known::Counted(counted) });
            return Ok(());
        }
        let (table, lists) = self.read(node)?;
        self.add(node.0, &table, 1)?;
        let contents = Contents { sum: sum(&table), lists: lists.into_iter().collect() };
        contents.lists.iter().try_for_each(|id| self.one_more((*id, Kind::List)))?;
        self.change.nodes.insert(node, NodeChange { uses: 1, known: Known::New(contents) });
        Ok(())
    }

    /// One fewer has the page or list of this number; None when there is none of it.
    fn one_fewer(&mut self, n: u32) -> Result<Option<()>> {
        let Some((node, counted)) = self.repository.local.counted_at(n)? else { return Ok(None) };
        let change = self.change.nodes.entry(node).or_insert(NodeChange { uses: 0, known: Known::Counted(counted) });
        change.uses -= 1;
        Ok(Some(()))
    }

    /// Takes off what those refer to that nobody has any more. They are read once more; None when they cannot be, or say something else than when they were counted.
    fn take_off(&mut self, kind: Kind) -> Result<Option<()>> {
        let gone = |(node, change): (&NodeId, &NodeChange)| match &change.known {
            Known::Counted(counted) if node.1 == kind && counted.uses.saturating_add(change.uses) == 0 => Some((*node, counted.clone())),
            _ => None,
        };
        let gone: Vec<(NodeId, Node)> = self.change.nodes.iter().filter_map(gone).collect();
        for (node, counted) in gone {
            let (table, lists) = match self.read(node) {
                Ok(read) => read,
                // Somebody else pruned it.
                Err(RepositoryError::Storage(StorageError::NotFound { .. } | StorageError::Short { .. })) => return Ok(None),
                // The disk is damaged where it lies: nobody needs it, and what the other backups have may be whole.
                Err(RepositoryError::Storage(_)) if !self.repository.storage.is_remote() => return Ok(None),
                Err(e @ (RepositoryError::Storage(_) | RepositoryError::Cancelled)) => return Err(e),
                Err(_) => return Ok(None),
            };
            if sum(&table) != counted.sum || lists.len() != counted.lists.len() {
                return Ok(None);
            }
            self.add(node.0, &table, -1)?;
            for n in counted.lists {
                if self.one_fewer(n)?.is_none() {
                    return Ok(None);
                }
            }
        }
        Ok(Some(()))
    }

    /// What a page or list refers to: all its chunks, and which of them are lists, as the page itself tells.
    fn read(&self, (id, kind): NodeId) -> Result<(BTreeSet<ChunkId>, BTreeSet<ChunkId>)> {
        self.go_on()?;
        let bytes = self.repository.read_chunk(&id).map_err(refuse)?;
        let (what, valid, read) = match kind {
            Kind::Page => ("page", "page", page::references_and_lists(&bytes)),
            Kind::List => ("list", "list of segments", page::references(&bytes).map(|table| (table, Vec::new()))),
        };
        let wrong = |e| refuse(self.repository.damaged(&format!("{what} {id}"), format!("it is no valid {valid}: {e}")));
        let (table, lists) = read.map_err(wrong)?;
        Ok((table.into_iter().collect(), lists.into_iter().collect()))
    }

    fn add(&mut self, node: ChunkId, table: &BTreeSet<ChunkId>, uses: i64) -> Result<()> {
        let all = std::iter::once(&node).chain(table);
        all.copied().try_for_each(|id| self.uses.add(id, uses)).map_err(|e| self.repository.local.no_room(&e))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use proptest::strategy::Strategy as _;

    use super::super::entry::Texture;
    use super::super::source_writer::SourceWriter;
    use super::super::test_world::{Told, World, manifest, noise};
    use super::super::two_writers::{HOUR, nothing_is_lost, prune_with};
    use super::super::writer::{Writer, commit};
    use super::super::{Content, Entry, EntrySink, Extent, Kind as EntryKind, Manifest, Segment};
    use super::*;

    /// A backup of so many files, each of the contents of this number, and of a long one that has them all and more segments than fit into a page.
    fn back_up(repository: &Arc<Repository>, sequence: u64, files: &[u8]) -> [u8; 32] {
        repository.sync_index().unwrap();
        let mut writer = Writer::new(repository.clone(), CancellationToken::new()).unwrap();
        let mut sink = SourceWriter::new(&mut writer, "files", "files", b"/x", None);
        sink.push(Entry { kind: EntryKind::Directory, ..Entry::default() }).unwrap();
        let mut long = Vec::new();
        for (n, contents) in files.iter().enumerate() {
            for part in 0..30 {
                let chunk = sink.store(&noise(2000, u64::from(*contents) * 100 + part), Texture::Mixed).unwrap();
                long.push(Segment::Data(Extent { chunk, offset: 0, len: 2000 }));
            }
            let entry = Entry { path: format!("b{n}").into_bytes(), kind: EntryKind::File, ..Entry::default() };
            sink.push_small(entry, &noise(30_000, u64::from(*contents))).unwrap();
        }
        let size = long.iter().map(Segment::len).sum();
        let content = Content { segments: long, ..Content::default() };
        sink.push(Entry { path: b"long".to_vec(), kind: EntryKind::File, size, content, ..Entry::default() }).unwrap();
        let source = sink.finish("{}".into()).unwrap().source;
        let flushed = writer.flush().unwrap();
        commit(repository, &Manifest { sequence, ..manifest(repository, vec![source]) }, &flushed).unwrap()
    }

    /// All counts; numbers of nodes replaced by what they stand for.
    fn counts(repository: &Repository) -> Vec<String> {
        let chunks = "SELECT hex(id) || ' ' || uses FROM counted_chunk";
        let nodes = "SELECT hex(id) || kind || ' ' || uses || hex(sum) || length(lists) FROM counted_node";
        let backups = "SELECT hex(id) || length(pages) FROM counted_backup";
        let mut all: Vec<String> = [chunks, nodes, backups].iter().flat_map(|sql| repository.local.ask(sql)).collect();
        all.sort();
        all
    }

    fn counted_by_a_stranger(world: &World) -> Vec<String> {
        let _ = std::fs::remove_dir_all(world.path().join("stranger"));
        let stranger = world.seen_by("stranger", None);
        stranger.sync_index().unwrap();
        let listed = stranger.listed_backups().unwrap();
        bring_up_to_date(&stranger, &listed, &CancellationToken::new()).unwrap();
        assert!(stranger.local.held(&listed).unwrap().unwrap().missing.is_empty());
        counts(&stranger)
    }

    #[derive(Debug, Clone)]
    enum Step {
        BackUp(Vec<u8>),
        Delete(usize),
        Prune(bool),
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { cases: 10, ..Default::default() })]
        #[test]
        fn what_is_counted_step_by_step_is_what_a_stranger_counts(steps in proptest::collection::vec(proptest::prop_oneof![
            proptest::collection::vec(0u8..6, 1..5).prop_map(Step::BackUp),
            (0usize..8).prop_map(Step::Delete),
            proptest::bool::ANY.prop_map(Step::Prune),
        ], 4..16)) {
            let world = World::new();
            let a = world.seen_by("a", None);
            let (mut there, mut sequence) = (Vec::new(), 0);
            for step in steps.into_iter().chain([Step::Prune(false), Step::Prune(true)]) {
                match step {
                    Step::BackUp(files) => {
                        sequence += 1;
                        there.push(back_up(&a, sequence, &files));
                    }
                    Step::Delete(n) if !there.is_empty() => a.delete_manifest(&there.remove(n % there.len())).unwrap(),
                    Step::Delete(_) => {}
                    Step::Prune(at_once) => {
                        prune_with(&a, if at_once { Duration::ZERO } else { HOUR }).unwrap();
                        proptest::prop_assert_eq!(counts(&a), counted_by_a_stranger(&world));
                        nothing_is_lost(&world, "pruned");
                    }
                }
            }
        }
    }

    /// A repository of three backups that were counted, and one more and one fewer since.
    fn with_a_history() -> (World, Arc<Repository>) {
        let world = World::new();
        let a = world.seen_by("a", None);
        let first = back_up(&a, 1, &[1, 2, 3]);
        back_up(&a, 2, &[2, 3, 4]);
        back_up(&a, 3, &[3, 4, 5]);
        prune_with(&a, HOUR).unwrap();
        a.delete_manifest(&first).unwrap();
        back_up(&a, 4, &[4, 5, 6]);
        (world, a)
    }

    #[test]
    fn counts_that_do_not_fit_together_are_made_anew() {
        let damages = [
            "UPDATE counted_chunk SET uses = uses + 1 WHERE id = (SELECT max(id) FROM counted_chunk)",
            "UPDATE counted_chunk SET uses = 0 WHERE id = (SELECT min(id) FROM counted_chunk)",
            "UPDATE counted_chunk SET uses = 'many' WHERE id = (SELECT min(id) FROM counted_chunk)",
            "DELETE FROM counted_chunk WHERE id = (SELECT min(id) FROM counted_chunk)",
            "DELETE FROM counted_chunk",
            "UPDATE counted_chunk SET id = x'00' WHERE id = (SELECT min(id) FROM counted_chunk)",
            "UPDATE counted_chunk SET id = CAST(substr(id, 1, 31) || x'aa' AS BLOB) WHERE id = (SELECT min(id) FROM counted_chunk)",
            "UPDATE counted_chunk SET id = zeroblob(32) WHERE id = (SELECT min(id) FROM counted_chunk)",
            "UPDATE counted_node SET uses = uses + 1 WHERE kind = 1",
            "UPDATE counted_node SET uses = -1",
            "UPDATE counted_node SET sum = zeroblob(16) WHERE n = (SELECT max(n) FROM counted_node)",
            "UPDATE counted_node SET sum = 'none'",
            "UPDATE counted_node SET id = zeroblob(32) WHERE n = (SELECT max(n) FROM counted_node)",
            "UPDATE counted_node SET lists = x'' WHERE kind = 0",
            "UPDATE counted_node SET lists = x'010203'",
            "UPDATE counted_node SET n = n + 100",
            "DELETE FROM counted_node WHERE kind = 1",
            "DELETE FROM counted_node",
            "UPDATE counted_backup SET pages = x''",
            "UPDATE counted_backup SET pages = x'ffffffff'",
            "UPDATE counted_backup SET pages = 7",
            "UPDATE counted_backup SET id = 'text' WHERE id = (SELECT min(id) FROM counted_backup)",
            "UPDATE counted_backup SET id = zeroblob(32) WHERE id = (SELECT min(id) FROM counted_backup)",
            "DELETE FROM counted_backup WHERE id = (SELECT max(id) FROM counted_backup)",
            "DELETE FROM counted_backup",
        ];
        for damage in damages {
            // Before anything came and went, and when all is counted.
            let (world, a) = with_a_history();
            for _ in 0..2 {
                assert!(a.local.execute(damage) > 0, "{damage}");
                prune_with(&a, HOUR).unwrap_or_else(|e| panic!("{damage}: {e}"));
                assert_eq!(counts(&a), counted_by_a_stranger(&world), "{damage}");
            }
            prune_with(&a, Duration::ZERO).unwrap();
            nothing_is_lost(&world, damage);
        }
    }

    #[test]
    fn what_was_counted_is_not_read_again() {
        let world = World::new();
        let operations = |prune: bool| {
            let count = Arc::new(AtomicUsize::new(0));
            let counter = count.clone();
            let told: Told = Arc::new(move || {
                counter.fetch_add(1, Ordering::Relaxed);
            });
            let a = world.seen_by("a", Some(told));
            let opened = count.load(Ordering::Relaxed);
            if prune {
                prune_with(&a, HOUR).unwrap();
            }
            count.load(Ordering::Relaxed) - opened
        };
        let a = world.seen_by("a", None);
        let mut few = 0;
        for n in 1..40 {
            back_up(&a, n, &[(n % 7) as u8, (n % 5) as u8]);
            if n == 3 {
                operations(true);
                few = operations(true);
            }
        }
        let all = operations(true);
        // The index objects were merged by the first.
        let (merged, many) = (operations(true), operations(true));
        assert!(many <= few + 2 && many <= merged && all > 36 + many, "{few} with 3 backups, {all}, then {merged} and {many} with 39");
    }

    #[test]
    fn what_went_and_cannot_be_read_any_more_has_all_counted_anew() {
        let (world, a) = with_a_history();
        let pages = "SELECT hex(id) FROM counted_node WHERE kind = 0 AND uses = 1";
        assert_eq!(a.local.ask(pages).len(), 3);
        // By somebody who knows nothing of what is counted here, and deletes at once.
        prune_with(&world.seen_by("b", None), Duration::ZERO).unwrap();
        prune_with(&a, HOUR).unwrap();
        assert_eq!(counts(&a), counted_by_a_stranger(&world));
        nothing_is_lost(&world, "pruned by two");
    }

    #[test]
    fn counts_of_other_backups_are_not_believed() {
        let (world, a) = with_a_history();
        let listed = a.listed_backups().unwrap();
        assert!(a.local.held(&listed).unwrap().is_none(), "one came, one went");
        // As another prune of the same cache may leave them that is half done.
        bring_up_to_date(&a, &listed.iter().take(2).copied().collect(), &CancellationToken::new()).unwrap();
        assert!(a.local.held(&listed).unwrap().is_none());
        prune_with(&a, HOUR).unwrap();
        assert_eq!(counts(&a), counted_by_a_stranger(&world));
        let Some(alone) = a.local.pruned_alone() else { panic!("nobody else prunes") };
        let told = prune_with(&world.seen_by("a", None), HOUR).unwrap_err().to_string();
        assert!(told.contains("is pruned already"), "{told}");
        drop(alone);
        prune_with(&a, HOUR).unwrap();
        nothing_is_lost(&world, "pruned");
    }

    #[test]
    fn a_page_that_went_and_lies_on_a_damaged_disk_is_in_nobodys_way() {
        let (world, a) = with_a_history();
        prune_with(&a, Duration::ZERO).unwrap();
        let gone = a.listed_backups().unwrap().into_iter().find(|id| a.read_manifest(id).unwrap().sequence == 4).unwrap();
        let page = ChunkId(*a.read_manifest(&gone).unwrap().sources[0].pages[0].chunk);
        let pack = world.path().join("repository").join(super::super::open::pack_name(&a.lookup(&page).unwrap().unwrap().pack));
        a.delete_manifest(&gone).unwrap();
        // Whatever reads it gets an error that is neither "not found" nor damage.
        let whole = std::fs::read(&pack).unwrap();
        std::fs::remove_file(&pack).unwrap();
        std::fs::create_dir(&pack).unwrap();
        assert!(matches!(a.read_chunk(&page), Err(RepositoryError::Storage(_))), "{:?}", a.read_chunk(&page));
        bring_up_to_date(&a, &a.listed_backups().unwrap(), &CancellationToken::new()).unwrap();
        std::fs::remove_dir(&pack).unwrap();
        std::fs::write(&pack, whole).unwrap();
        assert_eq!(counts(&a), counted_by_a_stranger(&world));
        prune_with(&a, Duration::ZERO).unwrap();
        nothing_is_lost(&world, "pruned");
    }

    #[test]
    fn who_is_cancelled_counts_nothing_and_goes_on_later() {
        let (world, a) = with_a_history();
        let before = counts(&a);
        let cancel = CancellationToken::new();
        cancel.cancel();
        let listed = a.listed_backups().unwrap();
        assert!(matches!(bring_up_to_date(&a, &listed, &cancel), Err(RepositoryError::Cancelled)));
        assert_eq!(counts(&a), before);
        bring_up_to_date(&a, &listed, &CancellationToken::new()).unwrap();
        assert_eq!(counts(&a), counted_by_a_stranger(&world));
    }
}
