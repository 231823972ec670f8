//! The matrix on destinations of archives (docs/archive-layout.md): each backup is one stream, and nothing of it may be taken for one before it is whole.

use crate::bucket::{cells, heals};
use crate::common::*;
use crate::disk;
use crate::http::Fault;
use crate::matrix::{OF_ARCHIVES, Operation, is_long, try_all};
use crate::s3::{Rule, Verb};
use crate::world::{Layout, NAME, Trouble, World};

/// Whether one attempt more gets over it. An archive is a stream that goes by: what was acknowledged and is not there cannot be sent once more.
fn heals_in_a_stream(verb: Verb, fault: Fault) -> bool {
    let is_gone = matches!(fault, Fault::ShortWrite | Fault::Lost);
    heals(verb, fault) && !(is_gone && matches!(verb, Verb::Put | Verb::PutNew | Verb::Part))
}

#[test]
fn every_fault_of_an_object_store_of_archives_is_survived_and_named() {
    let cells = cells(&mut World::of_archives_on_s3(true), &OF_ARCHIVES, 11, heals_in_a_stream);
    try_all("archives in an object store", &cells, || World::of_archives_on_s3(true), || World::of_archives_on_s3(false));
}

#[test]
fn every_error_of_a_directory_of_archives_is_survived_and_named() {
    let Some(mut world) = World::on_fs(Layout::Archive) else { return };
    let cells = disk::cells(&mut world, &OF_ARCHIVES, 7);
    drop(world);
    let world = || World::on_fs(Layout::Archive).unwrap();
    try_all("archives in a directory", &cells, world, world);
}

/// An archive that is longer than one request goes in parts, and counts when the storage has put them together.
#[test]
fn an_archive_in_parts_is_there_whole_or_not_at_all() {
    let mut world = World::of_archives_on_s3(true);
    std::fs::write(world.keepd.path("files/long"), noise(17 << 20, 4711)).unwrap();
    world.backed_up();
    use Fault::*;
    let all = [Status(503), Reset, DoneAndReset, DoneAndError, Twice, Status(403), Full, Lost, ShortWrite];
    let first = crate::matrix::seed() as usize % all.len();
    let faults: Vec<Fault> = if is_long() { all.to_vec() } else { (0..3).map(|n| all[(first + n * 4) % all.len()]).collect() };
    let mut problems = Vec::new();
    for fault in faults {
        for nth in if is_long() { 1..=4 } else { 2..=3 } {
            world.change();
            let rule = Rule { verb: Verb::Part, name: ".tar".into(), nth, times: 1, fault };
            world.arm(&Trouble::S3(rule));
            let out = Operation::Backup.run(&world);
            assert!(world.disarm() > 0, "{fault:?} at part {nth} was not met: {}", text(&out));
            let _ = Operation::Backup.believe(&mut world, &out);
            let told = format!("{fault:?} at part {nth} ({:?}): {}", out.status.code(), text(&out));
            problems.extend(world.lost().into_iter().map(|lost| format!("LOST {lost}: {told}")));
            if !out.status.success() {
                world.backed_up();
            }
            problems.extend(world.strays().into_iter().map(|stray| format!("STRAY {stray}: {told}")));
        }
    }
    assert_eq!(problems, Vec::<String>::new());
    world.keepd.ok(&["check", NAME, "--read-data"]);
}

#[test]
fn a_listing_that_lacks_archives_forgets_and_blames_nothing() {
    let mut world = World::of_archives_on_s3(true);
    world.backed_up();
    let before = world.keepd.backups();
    for fault in [Fault::Nothing, Fault::Holes, Fault::Stale] {
        for command in [&["check", NAME, "--read-data"][..], &["backup", "shop"], &["destination", "take-over", NAME]] {
            world.change();
            let rule = Rule { verb: Verb::List, name: String::new(), nth: 1, times: usize::MAX, fault };
            world.arm(&Trouble::S3(rule));
            let told = world.keepd.fails(1, command);
            assert!(world.disarm() > 0);
            assert!(told.contains("the listing lacks") && !told.contains("is missing"), "{fault:?}, {command:?}: {told}");
            assert_eq!(world.keepd.backups(), before, "{fault:?}, {command:?}");
        }
    }
    world.keepd.ok(&["check", NAME, "--read-data"]);
    world.backed_up();
    assert_eq!(world.lost(), Vec::<String>::new());
}

#[test]
fn half_an_archive_does_not_stay() {
    let mut world = World::of_archives_on_s3(true);
    for fault in [Fault::ShortWrite, Fault::Lost] {
        world.change();
        world.arm(&Trouble::S3(Rule { verb: Verb::Put, name: ".enc".into(), nth: 1, times: 1, fault }));
        let told = world.keepd.fails(1, &["backup", "shop"]);
        assert!(world.disarm() > 0);
        assert!(told.contains(".tar.zst.enc") && (told.contains("bytes arrived") || told.contains("not there")), "{fault:?}: {told}");
        assert_eq!(world.strays(), Vec::<String>::new(), "{fault:?}");
        world.backed_up();
        let listed = world.keepd.ok(&["run", "list"]);
        assert!(!listed.contains("it is not counted, and stays"), "{listed}");
        assert_eq!(world.lost(), Vec::<String>::new());
    }
}

/// The archive is the backup: what stands beside it is swept.
#[test]
fn an_archive_whose_companion_does_not_go_is_deleted_all_the_same() {
    let mut world = World::of_archives_on_s3(true);
    world.backed_up();
    let oldest = world.oldest();
    world.arm(&Trouble::S3(Rule { verb: Verb::Delete, name: ".meta.json".into(), nth: 1, times: usize::MAX, fault: Fault::Status(403) }));
    world.keepd.ok(&["delete", &oldest, "--yes"]);
    assert!(world.disarm() > 0);
    world.expect_no_more(&oldest);
    assert!(!world.keepd.backups().contains(&oldest));
    let companions = |world: &World| world.stored().iter().filter(|name| name.ends_with(".meta.json")).count();
    assert_eq!(companions(&world), 3);
    world.change();
    let out = Operation::Backup.run(&world);
    assert!(out.status.success() && !text(&out).contains("not by this keepd"), "{}", text(&out));
    assert_eq!(Operation::Backup.believe(&mut world, &out), None);
    world.keepd.ok(&["prune", NAME]);
    assert_eq!(companions(&world), 3, "{:?}", world.stored());
    assert_eq!(world.lost(), Vec::<String>::new());
}
