//! The local index is a cache without sums: whatever is wrong in it, nothing is pruned or listed by it, and it is mended from the repository.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::Repository;
use super::check::{Reading, check};
use super::error::RepositoryError;
use super::open::{may_be_elsewhere, pack_name};
use super::test_world::World;
use super::two_writers::{Backup, HOUR, nothing_is_lost, prune_with, with_something_dead};
use crate::storage::StorageError;

fn objects(repository: &Repository) -> Vec<String> {
    ["packs/", "index/", "condemned/"].iter().flat_map(|directory| repository.storage().names(directory).unwrap()).collect()
}

/// What the index objects say of packs is what their footers say.
fn the_index_is_right(repository: &Repository) {
    for id in repository.listed_indexes().unwrap() {
        for pack in repository.read_index(&id).unwrap().packs {
            assert_eq!(repository.pack_from_footer(&pack.id, None).unwrap(), pack);
        }
    }
}

#[test]
fn a_prune_that_would_believe_a_wrong_cache_stores_nothing_and_the_next_one_goes_on() {
    let world = with_something_dead();
    let a = world.seen_by("a", None);
    a.sync_index().unwrap();
    let moved = "UPDATE chunk SET pack = (SELECT min(n) FROM pack WHERE kind = 1) WHERE pack = (SELECT max(n) FROM pack WHERE kind = 1)";
    assert!(a.local.execute(moved) > 0);
    let before = objects(&a);
    let told = prune_with(&a, HOUR).unwrap_err().to_string();
    assert!(told.contains("the local index") && told.contains("nothing was pruned"), "{told}");
    assert_eq!(objects(&a), before);
    assert!(prune_with(&a, HOUR).unwrap().condemned.packs > 0);
    prune_with(&a, std::time::Duration::ZERO).unwrap();
    nothing_is_lost(&world, "pruned with a cache that was made anew");
    the_index_is_right(&a);
}

#[test]
fn what_the_cache_lacks_is_found_however_much_it_is() {
    let world = with_something_dead();
    let a = world.seen_by("a", None);
    (3..15).for_each(|n| Backup::of(a.clone(), n).whole());
    for prune in [false, true] {
        // The looks are counted for each of them.
        let a = world.seen_by("a", None);
        assert!(a.local.execute("DELETE FROM chunk") > 8);
        if prune {
            prune_with(&a, HOUR).unwrap();
        } else {
            let report = check(&a, Reading::Percent(0), &|_, _, _| {}, &CancellationToken::new()).unwrap();
            assert!(report.hurt.is_empty(), "{report:?}");
        }
    }
    nothing_is_lost(&world, "pruned with a cache without chunks");
}

#[test]
fn a_repository_that_was_begun_and_cut_off_leaves_no_slot() {
    let world = World::new();
    let keys = world.path().join("repository/keys");
    std::fs::create_dir_all(&keys).unwrap();
    std::fs::write(keys.join("0011223344556677.json"), "{}").unwrap();
    drop(world.seen_by("a", None));
    assert_eq!(std::fs::read_dir(&keys).unwrap().count(), 1);
    assert!(!keys.join("0011223344556677.json").exists());
    // Something is there that it might open.
    std::fs::remove_file(world.path().join("repository/keepd.json")).unwrap();
    let pack = world.path().join("repository/packs/00");
    std::fs::create_dir_all(&pack).unwrap();
    std::fs::write(pack.join("00".repeat(32)), "").unwrap();
    drop(world.try_open("b", None, None));
    assert_eq!(std::fs::read_dir(&keys).unwrap().count(), 2);
}

#[test]
fn what_it_forgets_it_forgets_as_a_whole() {
    let world = with_something_dead();
    let a = world.seen_by("a", None);
    a.sync_index().unwrap();
    let loaded = a.local.loaded().unwrap();
    assert!(!loaded.is_empty());
    // The second half of it does not go through.
    a.local.execute("CREATE TRIGGER listed BEFORE UPDATE OF listed ON pack BEGIN SELECT RAISE(ABORT, 'no'); END");
    assert!(a.local.unload(&loaded.iter().copied().collect::<Vec<_>>()).is_err());
    assert_eq!(a.local.loaded().unwrap(), loaded);
    let chunks = a.local.execute("UPDATE chunk SET len = len");
    a.local.execute("CREATE TRIGGER gone BEFORE DELETE ON pack BEGIN SELECT RAISE(ABORT, 'no'); END");
    assert!(chunks > 0 && a.local.clear().is_err());
    assert_eq!(a.local.execute("UPDATE chunk SET len = len"), chunks);
}

#[test]
fn a_damaged_index_object_goes_with_the_next_prune() {
    let world = with_something_dead();
    let a = world.seen_by("a", None);
    let name = a.storage().names("index/").unwrap().remove(0);
    let path = world.path().join("repository").join(&name);
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let b = world.seen_by("b", None);
    assert_eq!(b.sync_index().unwrap().len(), 1);
    prune_with(&b, HOUR).unwrap();
    assert!(!path.exists());
    nothing_is_lost(&world, "pruned with a damaged index object");
    the_index_is_right(&b);
}

#[test]
fn what_is_wrong_in_the_cache_is_not_listed_in_the_repository() {
    for same in [true, false] {
        let world = World::new();
        let open = || world.seen_by("a", None);
        let mut a = open();
        let mut interrupted = Backup::of(a.clone(), 1);
        interrupted.part(0);
        drop(interrupted);
        if !same {
            a = open();
        }
        assert_eq!(a.local.unindexed().unwrap().len(), 2, "a pack of contents and one of pages wait");
        assert_eq!(a.local.execute("UPDATE chunk SET id = zeroblob(32) WHERE id = (SELECT max(id) FROM chunk)"), 1);
        Backup::of(a.clone(), 1).whole();
        the_index_is_right(&a);
        nothing_is_lost(&world, "listed");
    }
}

#[test]
fn a_storage_that_does_not_answer_says_nothing_of_the_cache() {
    let (location, name, reason) = ("there".to_owned(), "packs/ab".to_owned(), "no answer".to_owned());
    let not_there = StorageError::NotFound { location: location.clone(), name: name.clone() };
    let short = StorageError::Short { location: location.clone(), name: name.clone(), reason: reason.clone() };
    let silent = StorageError::Failed { location, verb: "read", name, reason };
    assert!(may_be_elsewhere(&not_there.into()) && may_be_elsewhere(&short.into()));
    assert!(!may_be_elsewhere(&silent.into()) && !may_be_elsewhere(&RepositoryError::Cancelled));
}

/// A place beyond the end of a pack is one of the cache's, not a storage that fails.
#[test]
fn a_chunk_beyond_its_pack_is_read_where_it_lies() {
    let world = with_something_dead();
    let a: Arc<Repository> = world.seen_by("a", None);
    a.sync_index().unwrap();
    assert!(a.local.execute("UPDATE chunk SET start = start + 1000000") > 0);
    let report = check(&a, Reading::Percent(0), &|_, _, _| {}, &CancellationToken::new()).unwrap();
    assert!(report.hurt.is_empty(), "{report:?}");
}

/// A chunk is in two packs, of which the local index knows one, and that rots.
#[test]
fn a_second_copy_of_what_is_lost_is_not_dead() {
    let world = World::new();
    let (a, b) = (world.seen_by("a", None), world.seen_by("b", None));
    let (mut first, mut second) = (Backup::of(a.clone(), 1), Backup::of(b, 1));
    // Neither knows of what the other stores.
    first.part(0);
    second.part(0);
    first.part(1);
    first.part(2);
    let packs = || a.storage().names("packs/").unwrap();
    let path = |name: &String| world.path().join("repository").join(name);
    let longest = packs().into_iter().max_by_key(|name| std::fs::metadata(path(name)).unwrap().len()).unwrap();
    second.part(1);
    drop(second);
    a.sync_index().unwrap();
    assert_eq!(packs().len(), 4, "each has a pack of contents and one of pages");
    let mut bytes = std::fs::read(path(&longest)).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::remove_file(path(&longest)).unwrap();
    std::fs::write(path(&longest), bytes).unwrap();
    let report = check(&a, Reading::Percent(100), &|_, _, _| {}, &CancellationToken::new()).unwrap();
    assert_eq!(report.problems.len(), 1, "{report:?}");
    let told = prune_with(&a, std::time::Duration::ZERO).unwrap_err().to_string();
    assert!(told.contains("nothing was pruned"), "{told}");
    prune_with(&a, std::time::Duration::ZERO).unwrap();
    assert!(!packs().contains(&longest));
    nothing_is_lost(&world, "pruned when one of two copies was lost");
}

#[test]
fn where_sizes_cost_each_pack_has_its_turn_and_one_that_is_gone_is_seen_at_once() {
    const MOST: usize = 3;
    let world = World::new();
    let a = world.seen_by("a", None);
    (1..13).for_each(|n| Backup::of(a.clone(), n).whole());
    let mut packs: Vec<[u8; 32]> = a.packs().unwrap().into_iter().map(|(id, _)| id).collect();
    packs.sort();
    assert!(packs.len() > 3 * MOST);
    let path = |id: &[u8; 32]| world.path().join("repository").join(pack_name(id));
    let cut = |id: &[u8; 32]| {
        let whole = std::fs::read(path(id)).unwrap();
        std::fs::write(path(id), &whole[..whole.len() / 2]).unwrap();
        whole
    };
    let told = |sizes| a.sync_index_with(sizes).unwrap().join("; ");
    // Twice round: where it stopped is remembered.
    for id in packs.iter().rev().chain(&packs).step_by(2) {
        let whole = cut(id);
        let turns = (1..=packs.len()).find(|_| told(MOST).contains("bytes long, not")).unwrap();
        assert!(turns <= packs.len().div_ceil(MOST), "after {turns}");
        std::fs::write(path(id), whole).unwrap();
        assert_eq!(told(MOST), "");
    }
    // Enough for all, or no bound.
    for sizes in [packs.len(), usize::MAX] {
        let whole = cut(&packs[5]);
        assert!(told(sizes).contains("bytes long, not"));
        std::fs::write(path(&packs[5]), whole).unwrap();
        assert_eq!(told(sizes), "");
    }
    for id in [packs[0], packs[7]] {
        std::fs::remove_file(path(&id)).unwrap();
        assert!(told(MOST).contains("it is missing"));
    }
    // A pack that is not known is taken up whosever turn it is.
    let b = world.seen_by("b", None);
    assert_eq!(b.sync_index_with(MOST).unwrap().len(), 2);
    assert_eq!(b.packs().unwrap().len(), packs.len() - 2);
}
