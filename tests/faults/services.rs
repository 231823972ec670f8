//! The matrix, smaller, on services of other kinds: WebDAV, where everything is written under another name first and renamed, and a storage plugin.

use std::collections::{BTreeMap, BTreeSet};

use crate::bucket::{self, kind};
use crate::common::*;
use crate::dav;
use crate::http::Fault;
use crate::matrix::{Cell, OF_ARCHIVES, Operation, is_long, seed, thinned, try_all};
use crate::plugin;
use crate::world::{Layout, Place, Trouble, World};

/// What is tried with services whose storage side is that of the others.
const FEW: [Operation; 5] = [Operation::Backup, Operation::Prune, Operation::Restore, Operation::Check, Operation::KeyRotate];

/// Verbs and kinds of objects, with how often, by what the log of a storage says after an operation without any fault.
fn places<V: Ord>(world: &mut World, operation: Operation, log: impl Fn(&World) -> Vec<(V, String)>) -> BTreeMap<(V, String), usize> {
    operation.prepare(world);
    match &world.place {
        Place::Dav(dav) => dav.forget_log(),
        Place::Plugin(plugin) => plugin.forget_log(),
        _ => panic!("it has no log"),
    }
    let out = operation.run(world);
    let log = log(world);
    assert!(out.status.success(), "{operation:?} without any fault: {}", text(&out));
    assert_eq!(operation.believe(world, &out), None);
    let mut places = BTreeMap::new();
    for (verb, name) in log {
        *places.entry((verb, kind(world, &name))).or_default() += 1;
    }
    places
}

/// What may go wrong with requests to WebDAV.
fn dav_faults(verb: dav::Verb) -> Vec<Fault> {
    use Fault::*;
    let any = [Status(500), Status(503), Status(403), Reset, Hang];
    let more: &[Fault] = match verb {
        dav::Verb::Put => &[DoneAndError, DoneAndReset, Twice, Full, Status(507), ShortWrite, Lost, Slow],
        dav::Verb::Move => &[DoneAndError, DoneAndReset, Twice, Status(507), Lost, NotThere],
        dav::Verb::Mkcol => &[DoneAndError, DoneAndReset, Twice, Status(507), Lost],
        dav::Verb::Get => &[NotThere, Cut, Short, HangInBody, Flipped, Slow],
        dav::Verb::Stat => &[NotThere, CutText, Html],
        dav::Verb::List => &[Stale, Holes, FirstPageOnly, CutText, Cut, HangInBody, Html, Nothing, NotThere, Slow],
        dav::Verb::Delete => &[DoneAndError, DoneAndReset, Twice, Lost, NotThere],
    };
    any.iter().chain(more).copied().collect()
}

/// What a message says of the cause, one of these.
fn dav_words(verb: dav::Verb, fault: Fault) -> &'static [&'static str] {
    match fault {
        Fault::Status(507) => &["no space"],
        Fault::Twice if verb == dav::Verb::Move => &["is gone"],
        Fault::NotThere if verb == dav::Verb::List => {
            &["listing lacks", "not there", "no key slot", "no repository", "the key does not open this repository"]
        }
        // A file that is to be renamed and is not there.
        Fault::NotThere | Fault::Lost if matches!(verb, dav::Verb::Move | dav::Verb::Mkcol) => {
            &["not there", "Not Found", "not found", "Conflict"]
        }
        Fault::CutText | Fault::Html | Fault::Cut if matches!(verb, dav::Verb::Stat | dav::Verb::List) => {
            &["something else than the storage answered", "the listing", "a listing", "xml", "connection", "cut off", "end of file"]
        }
        _ => bucket::words(fault),
    }
}

/// Whether one attempt more gets over it.
fn dav_heals(verb: dav::Verb, fault: Fault) -> bool {
    use Fault::*;
    match fault {
        Status(403 | 507) | Full | Flipped | NotThere | Stale | Holes | FirstPageOnly | Nothing => false,
        // What is moved, or moved into, is not there then: tried again from its beginning.
        _ => verb != dav::Verb::Delete || fault != Lost,
    }
}

fn dav_cells(world: &mut World, operations: &[Operation], every: usize) -> Vec<Cell> {
    let log = |world: &World| match &world.place {
        Place::Dav(dav) => dav.log(),
        _ => Vec::new(),
    };
    let (mut all, mut turn) = (Vec::new(), seed() as usize);
    for &operation in operations {
        let places = places(world, operation, log);
        let verbs: BTreeSet<dav::Verb> = places.keys().map(|(verb, _)| *verb).collect();
        // Directories are made when the first object comes into them: that is now and then.
        for verb in verbs.into_iter().filter(|verb| *verb != dav::Verb::Mkcol || operation == Operation::Backup) {
            let kinds: Vec<(&String, usize)> = places.iter().filter(|((v, _), _)| *v == verb).map(|((_, k), n)| (k, *n)).collect();
            for fault in dav_faults(verb) {
                thinned(operation, &kinds, &mut turn, (every, 4), |kind, nth, lasting| {
                    let lasting = lasting && !(kind == "writer.json" && fault == Fault::ShortWrite);
                    let times = if lasting { usize::MAX } else { 1 };
                    all.push(Cell {
                        operation,
                        verb: format!("{verb:?}"),
                        kind: kind.into(),
                        fault: format!("{fault:?}"),
                        nth,
                        lasting,
                        trouble: Trouble::Dav(dav::Rule { verb, name: kind.into(), nth, times, fault }),
                        words: dav_words(verb, fault),
                        heals: !lasting && world.layout == Layout::Repository && dav_heals(verb, fault),
                        hangs: matches!(fault, Fault::Hang | Fault::HangInBody),
                    });
                });
            }
        }
    }
    all
}

#[test]
fn every_fault_of_webdav_is_survived_and_named() {
    let cells = dav_cells(&mut World::on_dav(Layout::Repository, true), &FEW, 13);
    try_all("WebDAV", &cells, || World::on_dav(Layout::Repository, true), || World::on_dav(Layout::Repository, false));
}

#[test]
fn every_fault_of_webdav_with_archives_is_survived_and_named() {
    let operations: &[Operation] = if is_long() { &OF_ARCHIVES } else { &[Operation::Backup] };
    let cells = dav_cells(&mut World::on_dav(Layout::Archive, true), operations, 5);
    try_all("archives on WebDAV", &cells, || World::on_dav(Layout::Archive, true), || World::on_dav(Layout::Archive, false));
}

/// What a plugin may do wrong, and what of it is told; whether one attempt more gets over it.
fn plugin_faults(verb: &str) -> Vec<(&'static str, &'static [&'static str], bool)> {
    const AGAIN: &[&str] = &["as the rule says"];
    const ENDED: &[&str] = &["ended before it answered", "takes nothing", "cannot be read"];
    const NOT_THERE: &[&str] = &["not there", "missing", "is gone", "removed", "no key slot", "lost a write"];
    const LACKS: &[&str] = &["listing lacks", "not there", "no key slot", "the key does not open this repository"];
    let mut all: Vec<(&str, &[&str], bool)> = vec![
        ("temporary", AGAIN, true),
        ("denied", &["not permitted"], false),
        ("Dies", ENDED, true),
        ("Babble", &["not of the interface"], true),
        ("Neither", &["neither ok nor an error"], true),
        ("Hang", &["did nothing for 2 s"], true),
    ];
    let more: &[(&str, &[&str], bool)] = match verb {
        "PutNew" | "Put" => &[
            ("no_space", &["no space"], false),
            ("DoneAndDies", ENDED, true),
            ("DoneAndError", AGAIN, true),
            ("Twice", &["exists"], true),
            ("ShortWrite", &["bytes arrived"], true),
            ("Lost", &["not there", "lost a write", "bytes arrived"], true),
        ],
        "Get" => &[
            ("not_found", NOT_THERE, false),
            ("Short", &["cut off", "too little", "too short", "damaged", "not readable"], true),
            ("Cut", &["cut off"], true),
            ("HangInBody", &["did nothing for 2 s"], true),
            ("Flipped", &["damaged", "not readable", "does not open", "does not parse", "do not open"], false),
            ("TooMuch", &["more than any object has"], true),
            ("Slow", &[], true),
        ],
        "Stat" => &[("not_found", NOT_THERE, false)],
        "List" => &[
            ("Stale", LACKS, false),
            ("Holes", LACKS, false),
            ("Nothing", LACKS, false),
            ("WrongCount", &["counts"], true),
            ("NoEnd", ENDED, true),
            ("CutText", &["no line", "ended before it answered", "not of the interface"], true),
            ("Circle", &["twice"], true),
            ("HangInBody", &["did nothing for 2 s"], true),
            ("Slow", &[], true),
        ],
        "Delete" => &[
            ("DoneAndDies", ENDED, true),
            ("DoneAndError", AGAIN, true),
            ("Twice", &[], true),
            ("Lost", &[], true),
            ("not_found", &[], true),
        ],
        _ => &[],
    };
    all.extend(more);
    all
}

fn plugin_cells(world: &mut World, every: usize) -> Vec<Cell> {
    let log = |world: &World| match &world.place {
        Place::Plugin(plugin) => plugin.log(),
        _ => Vec::new(),
    };
    let (mut all, mut turn) = (Vec::new(), seed() as usize);
    for operation in FEW {
        let places = places(world, operation, log);
        let verbs: BTreeSet<&String> = places.keys().map(|(verb, _)| verb).collect();
        for verb in verbs {
            let kinds: Vec<(&String, usize)> = places.iter().filter(|((v, _), _)| v == verb).map(|((_, k), n)| (k, *n)).collect();
            for (fault, words, heals) in plugin_faults(verb) {
                thinned(operation, &kinds, &mut turn, (every, 4), |kind, nth, lasting| {
                    let lasting = lasting && !(kind == "writer.json" && fault == "ShortWrite");
                    // Asked for in one piece, nobody knows how much there is.
                    let heals = heals && !(fault == "Short" && verb == "Get");
                    // Nobody looks whether what was deleted is gone, and a lease is replaced.
                    let heals = heals && !(fault == "Lost" && verb == "Put");
                    all.push(Cell {
                        operation,
                        verb: verb.clone(),
                        kind: kind.into(),
                        fault: fault.into(),
                        nth,
                        lasting,
                        trouble: Trouble::Plugin(plugin::Rule {
                            verb: verb.clone(),
                            name: kind.into(),
                            nth,
                            times: if lasting { 0 } else { 1 },
                            fault,
                        }),
                        words,
                        heals: !lasting && heals,
                        hangs: matches!(fault, "Hang" | "HangInBody"),
                    });
                });
            }
        }
    }
    all
}

#[test]
fn every_fault_of_a_storage_plugin_is_survived_and_named() {
    let cells = plugin_cells(&mut World::on_plugin(true), 17);
    try_all("storage plugin", &cells, || World::on_plugin(true), || World::on_plugin(false));
}

#[test]
fn a_renaming_that_is_asked_twice_is_done() {
    let mut world = World::on_dav(Layout::Repository, true);
    // Asked twice, a server removes what it has just renamed, for it is in the way: that is written again.
    for (fault, times) in [(Fault::Twice, 1), (Fault::DoneAndError, usize::MAX), (Fault::DoneAndReset, usize::MAX)] {
        world.change();
        world.arm(&Trouble::Dav(dav::Rule { verb: dav::Verb::Move, name: String::new(), nth: 1, times, fault }));
        let out = Operation::Backup.run(&world);
        assert!(world.disarm() > 0);
        assert!(out.status.success(), "{fault:?}: {}", text(&out));
        assert_eq!(Operation::Backup.believe(&mut world, &out), None);
        assert_eq!(world.lost(), Vec::<String>::new());
    }
}

/// A server whose disk is full says so by its status alone, as many do.
#[test]
fn webdav_without_space_is_told_as_that() {
    let mut world = World::on_dav(Layout::Repository, true);
    world.change();
    world.arm(&Trouble::Dav(dav::Rule { verb: dav::Verb::Put, name: String::new(), nth: 1, times: usize::MAX, fault: Fault::Status(507) }));
    let told = world.keepd.fails(1, &["backup", "shop"]);
    assert!(world.disarm() > 0);
    assert!(told.contains("no space left") && told.contains(&world.address()), "{told}");
    world.backed_up();
    assert_eq!(world.lost(), Vec::<String>::new());
}
