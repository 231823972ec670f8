//! Where nothing came or went since packs and index objects were compared with the local index, they are not compared again; whatever is done to them is
//! seen all the same.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::Repository;
use super::open::pack_name;
use super::test_world::{Told, World};
use super::two_writers::Backup;

/// A repository that is seen to be as it was; None where the file system is none whose directories are believed.
fn settled(world: &World) -> Option<(Arc<Repository>, Arc<AtomicUsize>)> {
    let operations = Arc::new(AtomicUsize::new(0));
    let counted = operations.clone();
    let told: Told = Arc::new(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    let a = world.seen_by("a", Some(told));
    Backup::of(a.clone(), 1).whole();
    Backup::of(a.clone(), 2).whole();
    settle(&a);
    a.storage().state(&["packs/", "index/"]).map(|_| (a, operations))
}

/// Until what was written is long enough ago for directories to be believed, and all was compared.
fn settle(a: &Repository) {
    std::thread::sleep(Duration::from_millis(3_100));
    for _ in 0..2 {
        assert!(a.sync_index_in_turn().unwrap().is_empty());
    }
}

fn path(world: &World, name: &str) -> PathBuf {
    world.path().join("repository").join(name)
}

#[test]
fn nothing_that_is_done_to_packs_goes_unseen() {
    let world = World::new();
    let Some((a, operations)) = settled(&world) else { return };
    assert!(a.is_as_compared().unwrap());
    let before = operations.load(Ordering::Relaxed);
    assert!(a.sync_index_in_turn().unwrap().is_empty());
    let fast = operations.swap(0, Ordering::Relaxed) - before;
    assert!(a.sync_index().unwrap().is_empty());
    assert!(fast < operations.load(Ordering::Relaxed), "{fast}: packs and index objects were listed");

    // A pack that is cut off leaves its directory as it is.
    let mut packs = a.packs().unwrap();
    packs.sort();
    let cut = path(&world, &pack_name(&packs[0].0));
    let whole = fs::read(&cut).unwrap();
    fs::OpenOptions::new().write(true).open(&cut).unwrap().set_len(whole.len() as u64 - 1).unwrap();
    assert!(a.is_as_compared().unwrap());
    let told = a.sync_index_in_turn().unwrap();
    assert!(told.len() == 1 && told[0].contains("bytes long"), "{told:?}");
    fs::write(&cut, whole).unwrap();
    assert!(!a.is_as_compared().unwrap(), "the local index forgot it");
    a.sync_index().unwrap();
    settle(&a);
    assert!(a.is_as_compared().unwrap());

    // One that goes, and comes back.
    let aside = world.path().join("aside");
    fs::rename(&cut, &aside).unwrap();
    assert!(!a.is_as_compared().unwrap());
    let told = a.sync_index_in_turn().unwrap();
    assert!(told.len() == 1 && told[0].contains("missing"), "{told:?}");
    fs::rename(&aside, &cut).unwrap();
    a.sync_index().unwrap();
    settle(&a);
    assert!(a.is_as_compared().unwrap());

    // What another daemon stores, and what the cache loses.
    Backup::of(world.seen_by("b", None), 3).whole();
    assert!(!a.is_as_compared().unwrap());
    let known = a.packs().unwrap().len();
    assert!(a.sync_index_in_turn().unwrap().is_empty());
    assert!(a.packs().unwrap().len() > known);
    settle(&a);
    for loss in ["DELETE FROM pack WHERE n = (SELECT max(n) FROM pack)", "DELETE FROM loaded", "UPDATE pack SET size = size + 1"] {
        assert!(a.is_as_compared().unwrap(), "{loss}");
        assert!(a.local.execute(loss) > 0);
        assert!(!a.is_as_compared().unwrap(), "{loss}");
        a.local.clear().unwrap();
        for _ in 0..2 {
            assert!(a.sync_index_in_turn().unwrap().is_empty(), "{loss}");
        }
    }
}

#[test]
fn a_backup_upon_what_went_is_not_committed() {
    let world = World::new();
    let Some((a, _)) = settled(&world) else { return };
    // The same contents: it stores nothing, and builds upon what is there.
    let mut backup = Backup::of(a.clone(), 2);
    backup.part(0);
    backup.part(1);
    assert!(a.is_as_compared().unwrap());
    for (id, _) in a.packs().unwrap() {
        fs::remove_file(path(&world, &pack_name(&id))).unwrap();
    }
    backup.part(2);
    assert_eq!(backup.committed(), Some(false));
}

#[test]
fn a_backup_upon_what_another_run_found_gone_is_not_committed() {
    let world = World::new();
    let a = world.seen_by("a", None);
    Backup::of(a.clone(), 1).whole();
    for damaged in [false, true] {
        Backup::of(a.clone(), 2).whole();
        let mut backup = Backup::of(a.clone(), 2);
        backup.part(0);
        backup.part(1);
        let (pack, _) = a.packs().unwrap().into_iter().max_by_key(|(_, size)| *size).unwrap();
        if damaged {
            a.local.mark_lost(&pack, &a.local.chunks_in(&pack).unwrap()).unwrap();
        } else {
            fs::remove_file(path(&world, &pack_name(&pack))).unwrap();
            assert_eq!(a.sync_index().unwrap().len(), 1);
        }
        backup.part(2);
        assert_eq!(backup.committed(), Some(false), "damaged: {damaged}");
    }
}
