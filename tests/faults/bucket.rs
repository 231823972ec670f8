//! The matrix on an object store: every verb of S3 with every fault.

use std::collections::{BTreeMap, BTreeSet};

use crate::common::*;
use crate::http::Fault;
use crate::matrix::{Cell, OPERATIONS, Operation, seed, thinned, try_all};
use crate::s3::{Rule, Verb};
use crate::world::{Layout, NAME, Trouble, World};

/// What may go wrong with requests of a verb.
pub fn faults(verb: Verb) -> Vec<Fault> {
    use Fault::*;
    let any = [Status(500), Status(503), Status(403), Reset, Hang];
    let more: &[Fault] = match verb {
        Verb::PutNew | Verb::Put | Verb::Part => &[DoneAndError, DoneAndReset, Twice, Full, ShortWrite, Lost, WrongTag, Slow],
        Verb::Get | Verb::Range => &[NotThere, Cut, Short, HangInBody, Flipped, Slow, WrongTag],
        Verb::Stat => &[NotThere, WrongTag],
        Verb::List => &[Stale, Holes, FirstPageOnly, NoToken, Circle, CutText, Cut, HangInBody, Html, Nothing, Slow],
        Verb::Delete => &[DoneAndError, DoneAndReset, Twice, Lost, NotThere],
    };
    any.iter().chain(more).copied().collect()
}

/// Whether one attempt more gets over it.
pub fn heals(verb: Verb, fault: Fault) -> bool {
    use Fault::*;
    match fault {
        Status(403) | Full | Flipped | FlippedWrite | NotThere | Stale | Holes | FirstPageOnly | Nothing => false,
        // Asked for in one piece, nobody knows how much there is.
        Short => verb == Verb::Range,
        // Nobody looks whether what was deleted is gone: it shows itself.
        Lost => verb != Verb::Put,
        _ => true,
    }
}

/// What a message says of the cause, one of these.
pub fn words(fault: Fault) -> &'static [&'static str] {
    match fault {
        Fault::Status(500) | Fault::DoneAndError => &["internal error (InternalError)", "answered 500"],
        Fault::Status(503) => &["reduce your request rate (SlowDown)", "answered 503"],
        Fault::Status(_) => &["not permitted"],
        Fault::Full => &["no space"],
        Fault::Reset | Fault::DoneAndReset | Fault::Cut => &["connection", "cut off", "incomplete", "end of file"],
        Fault::Hang | Fault::HangInBody => &["nothing for 2 s"],
        Fault::Short => &["cut off", "too little data", "damaged", "not readable"],
        Fault::ShortWrite => &["bytes arrived"],
        Fault::Lost => &["not there", "lost a write", "bytes arrived", "still there"],
        Fault::Flipped | Fault::FlippedWrite => &["damaged", "does not open", "does not parse", "do not open"],
        Fault::NotThere => &["not there", "missing", "is gone", "removed", "no key slot", "still there"],
        Fault::Stale | Fault::Holes | Fault::FirstPageOnly | Fault::Nothing => {
            // A listing of key slots that hides the one that the key opens looks like a repository of another key.
            &["listing lacks", "not there", "no key slot", "still sealed with the old key", "the key does not open this repository"]
        }
        Fault::NoToken | Fault::Circle | Fault::CutText | Fault::Html => &["the listing", "a listing", "xml"],
        Fault::Twice | Fault::Slow | Fault::WrongTag => &[],
    }
}

/// The directory of an object, or its name. That of an archive has the time in it: what it ends with, then.
pub fn kind(world: &World, name: &str) -> String {
    let name = name.strip_prefix("pre/").unwrap_or(name);
    match name {
        _ if world.layout == Layout::Repository || name.contains('/') => name.split_inclusive('/').next().unwrap_or_default().to_owned(),
        companion if companion.ends_with(".meta.json") => ".meta.json".into(),
        archive if archive.contains(".tar") => ".tar".into(),
        other => other.into(),
    }
}

/// Which kinds of objects an operation asks for, with which verbs, and how often.
fn places(world: &mut World, operation: Operation) -> BTreeMap<(Verb, String), usize> {
    operation.prepare(world);
    world.s3().forget_log();
    let out = operation.run(world);
    let log = world.s3().log();
    assert!(out.status.success(), "{operation:?} without any fault: {}", text(&out));
    assert_eq!(operation.believe(world, &out), None);
    let mut places = BTreeMap::new();
    for (verb, name) in log {
        *places.entry((verb, kind(world, &name))).or_default() += 1;
    }
    places
}

/// The cells of these operations; in the short run each `every`th.
pub fn cells(world: &mut World, operations: &[Operation], every: usize, heals: fn(Verb, Fault) -> bool) -> Vec<Cell> {
    let mut all = Vec::new();
    let mut turn = seed() as usize;
    for &operation in operations {
        let places = places(world, operation);
        let verbs: BTreeSet<Verb> = places.keys().map(|(verb, _)| *verb).collect();
        for verb in verbs {
            let kinds: Vec<(&String, usize)> = places.iter().filter(|((v, _), _)| *v == verb).map(|((_, k), n)| (k, *n)).collect();
            for fault in faults(verb) {
                let add = |kind: &str, nth: usize, lasting: bool| {
                    // A lease that nobody can read is waited for, for its whole term.
                    let lasting = lasting && !(kind == "writer.json" && fault == Fault::ShortWrite);
                    let times = if lasting { usize::MAX } else { 1 };
                    let rule = Rule { verb, name: kind.into(), nth, times, fault };
                    let verb_met = verb;
                    let (verb, fault_name) = (format!("{verb:?}"), format!("{fault:?}"));
                    let trouble = Trouble::S3(rule);
                    all.push(Cell {
                        operation,
                        verb,
                        kind: kind.into(),
                        fault: fault_name,
                        nth,
                        lasting,
                        trouble,
                        words: words(fault),
                        heals: !lasting && heals(verb_met, fault),
                        hangs: matches!(fault, Fault::Hang | Fault::HangInBody),
                    });
                };
                thinned(operation, &kinds, &mut turn, (every, 4), add);
            }
        }
    }
    all
}

#[test]
fn every_fault_of_every_verb_of_an_object_store_is_survived_and_named() {
    let cells = cells(&mut World::on_s3(), &OPERATIONS, 1, heals);
    try_all("object store", &cells, World::on_s3, World::on_s3_impatient);
}

fn stored(world: &World, what: &str) -> Vec<String> {
    world.s3().names().into_iter().filter(|name| name.starts_with(&format!("pre/{what}"))).collect()
}

fn meets(world: &World, verb: Verb, name: &str, fault: Fault) {
    world.arm(&Trouble::S3(Rule { verb, name: name.into(), nth: 1, times: usize::MAX, fault }));
}

#[test]
fn a_listing_that_lacks_backups_condemns_and_deletes_nothing() {
    let mut world = World::on_s3();
    Operation::Prune.prepare(&mut world);
    for fault in [Fault::Nothing, Fault::Holes, Fault::Stale] {
        let before = (stored(&world, "packs/"), stored(&world, "backups/"), stored(&world, "condemned/"));
        meets(&world, Verb::List, "backups/", fault);
        let told = world.keepd.fails(1, &["prune", NAME]);
        assert!(world.disarm() > 0);
        assert!(told.contains("the listing lacks backups/") || told.contains("is not there"), "{fault:?}: {told}");
        assert_eq!((stored(&world, "packs/"), stored(&world, "backups/"), stored(&world, "condemned/")), before, "{fault:?}");
        assert_eq!(world.lost(), Vec::<String>::new());
    }
    assert!(!world.keepd.ok(&["prune", NAME]).contains("\n0 of"));
    assert_eq!(world.lost(), Vec::<String>::new());
}

#[test]
fn a_pin_that_a_listing_hides_still_holds() {
    let mut world = World::on_s3();
    let pinned = world.oldest();
    world.keepd.ok(&["pin", &pinned]);
    for _ in 0..2 {
        world.backed_up();
    }
    world.change();
    meets(&world, Verb::List, "marks/", Fault::Nothing);
    let told = world.keepd.fails(1, &["backup", "shop"]);
    assert!(world.disarm() > 0);
    assert!(told.contains("the listing lacks marks/"), "{told}");
    world.backed_up();
    assert!(world.keepd.backups().contains(&pinned), "{}", world.keepd.ok(&["list"]));
}

#[test]
fn half_a_manifest_is_no_backup_and_does_not_stay() {
    let mut world = World::on_s3();
    let before = stored(&world, "backups/");
    for name in ["backups/", "packs/", "index/"] {
        // Packs of a run that failed are used by the next one: there is to be something new.
        world.change();
        meets(&world, Verb::PutNew, name, Fault::ShortWrite);
        let told = world.keepd.fails(1, &["backup", "shop"]);
        assert!(world.disarm() > 1, "{name}: it was tried again");
        assert!(told.contains("bytes arrived") && told.contains(name), "{told}");
        assert_eq!(stored(&world, "backups/"), before, "half of a manifest would be a backup that nobody can read");
    }
    world.backed_up();
    world.keepd.ok(&["check", NAME, "--read-data"]);
    assert_eq!(world.lost(), Vec::<String>::new());
}

#[test]
fn an_index_that_could_not_be_removed_never_counts_again() {
    let mut world = World::on_s3();
    Operation::Prune.prepare(&mut world);
    meets(&world, Verb::Delete, "index/", Fault::Lost);
    let told = world.keepd.ok(&["prune", NAME]);
    assert!(world.disarm() > 0, "no index was written anew: {told}");
    for _ in 0..4 {
        Operation::Prune.prepare(&mut world);
        world.keepd.ok(&["prune", NAME]);
        assert_eq!(world.lost(), Vec::<String>::new());
    }
    world.keepd.ok(&["check", NAME, "--read-data"]);
}

#[test]
fn a_lease_that_is_there_and_is_not_is_told() {
    let world = World::on_s3();
    meets(&world, Verb::Get, "writer.json", Fault::NotThere);
    let told = world.keepd.fails(1, &["backup", "shop"]);
    assert!(world.disarm() < 100, "it asked for ever");
    assert!(told.contains("writer.json"), "{told}");
    world.keepd.ok(&["backup", "shop"]);
}

#[test]
fn a_bit_that_the_storage_changes_is_told_by_the_next_read_and_never_given_back() {
    let mut world = World::on_s3();
    world.change();
    meets(&world, Verb::PutNew, "packs/", Fault::FlippedWrite);
    world.keepd.ok(&["backup", "shop"]);
    assert!(world.disarm() > 0);
    let told = world.keepd.fails(1, &["check", NAME, "--read-data"]);
    assert!(told.contains("packs/") && told.contains("is hurt"), "{told}");
    let to = world.keepd.path("back");
    let out = world.keepd.ctl(&["restore", "latest", "--job", "shop", "--to", to.to_str().unwrap()]);
    assert!(!out.status.success(), "{}", text(&out));
    for (path, digest) in crate::world::tree(&to.join("files")) {
        let there = crate::world::tree(&world.keepd.path("files"));
        assert_eq!(there.get(&path), Some(&digest), "{} is not what it was", path.display());
    }
    // What was lost is stored again, for it is still there.
    world.backed_up();
    let (id, files) = world.newest();
    let again = world.keepd.restored(&id);
    assert!(crate::world::tree(&again.join("files")) == files);
}

#[test]
fn a_backup_that_a_listing_hides_is_not_left_behind_by_a_new_key() {
    let mut world = World::on_s3();
    world.backed_up();
    meets(&world, Verb::List, "backups/", Fault::Holes);
    let told = world.keepd.fails(1, &["key", "re-encrypt", NAME, "--yes"]);
    assert!(world.disarm() > 0);
    assert!(told.contains("the listing lacks backups/"), "{told}");
    assert_eq!(world.lost(), Vec::<String>::new());
    world.keepd.ok(&["key", "re-encrypt", NAME, "--yes"]);
    assert_eq!(world.lost(), Vec::<String>::new());
}
