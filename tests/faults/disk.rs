//! The matrix in a directory: every operation of a file system with every error that it can give.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use keepd_faultfs::errno::{self, Errno};
use keepd_faultfs::{Action, Rule, Verb};

use crate::common::*;
use crate::matrix::{Cell, OPERATIONS, Operation, seed, thinned, try_all};
use crate::world::{Layout, Place, Trouble, World};

/// Its name, itself, and what is told of it.
type Error = (&'static str, Errno, &'static [&'static str]);

const EIO: Error = ("EIO", errno::EIO, &["Input/output error"]);
const ENOSPC: Error = ("ENOSPC", errno::ENOSPC, &["no space"]);
const EDQUOT: Error = ("EDQUOT", errno::EDQUOT, &["no space"]);
const EROFS: Error = ("EROFS", errno::EROFS, &["Read-only file system"]);
const EACCES: Error = ("EACCES", errno::EACCES, &["Permission denied"]);
const ESTALE: Error = ("ESTALE", errno::ESTALE, &["Stale file handle"]);
const ENOENT: Error = ("ENOENT", errno::ENOENT, &["No such file", "not there", "is gone", "missing", "no key slot"]);

/// What may go wrong with operations of a verb, and what of it is told.
fn faults(verb: Verb) -> Vec<(String, Action, &'static [&'static str])> {
    let errors: &[Error] = match verb {
        Verb::Create => &[EIO, ENOSPC, EDQUOT, EROFS, EACCES],
        Verb::Write => &[EIO, ENOSPC, EDQUOT],
        Verb::Fsync => &[EIO, ENOSPC],
        Verb::FsyncDir => &[EIO],
        Verb::Rename => &[EIO, ENOSPC, EROFS],
        Verb::Unlink => &[EIO, EROFS, EACCES],
        Verb::Mkdir => &[EIO, ENOSPC],
        Verb::List => &[EIO, EACCES],
        Verb::Open => &[EIO, EACCES, ENOENT, ESTALE],
        Verb::Read => &[EIO, ESTALE],
        Verb::Stat => &[EIO, ENOENT],
        _ => &[],
    };
    let mut all: Vec<(String, Action, &'static [&'static str])> =
        errors.iter().map(|(name, error, words)| ((*name).to_owned(), Action::Fail(*error), *words)).collect();
    let omitted: &[&str] = &["the listing lacks", "no key slot", "still sealed with the old key", "the key does not open this repository"];
    let more: Vec<(&str, Action, &'static [&'static str])> = match verb {
        Verb::Write => vec![
            ("short", Action::Short(1000), &[]),
            ("torn, EIO", Action::Torn(errno::EIO), EIO.2),
            ("torn, ENOSPC", Action::Torn(errno::ENOSPC), ENOSPC.2),
        ],
        Verb::List => vec![
            ("nothing", Action::Omit("*".into()), omitted),
            ("some left out", Action::Omit("[0-7]*".into()), omitted),
            ("stale", Action::Stale, omitted),
            ("slow", Action::Delay(Duration::from_millis(200)), &[]),
        ],
        Verb::Fsync => vec![("slow", Action::Delay(Duration::from_millis(200)), &[])],
        _ => Vec::new(),
    };
    all.extend(more.into_iter().map(|(name, action, words)| (name.to_owned(), action, words)));
    all
}

/// Which kinds of objects an operation touches, with which verbs, and how often.
fn places(world: &mut World, operation: Operation) -> BTreeMap<(Verb, String), usize> {
    operation.prepare(world);
    let Place::Fs(mounted) = &world.place else { panic!("it is no directory") };
    mounted.control().count_anew();
    let out = operation.run(world);
    assert!(out.status.success(), "{operation:?} without any fault: {}", text(&out));
    let done = mounted.control().operations();
    assert_eq!(operation.believe(world, &out), None);
    let kind = |path: &std::path::Path| crate::bucket::kind(world, &path.to_string_lossy()).trim_end_matches('/').to_owned();
    let mut places: BTreeMap<(Verb, String), usize> = BTreeMap::new();
    for operation in done {
        // A rename is met by either name; that of the temporary file says nothing.
        *places.entry((operation.verb, kind(operation.other.as_ref().unwrap_or(&operation.path)))).or_default() += 1;
    }
    // These have no numbers.
    let kinds: BTreeSet<String> = places.keys().map(|(_, kind)| kind.clone()).filter(|kind| !kind.is_empty() && kind != "tmp").collect();
    let more: &[&str] = if world.layout == Layout::Repository { &["keepd.json", "keys"] } else { &[] };
    for kind in kinds.into_iter().chain(more.iter().map(|kind| (*kind).to_owned())) {
        for verb in [Verb::Open, Verb::Read, Verb::Stat] {
            // Archives are opened by who reads them; what stands beside one is read where the ledger was lost.
            let reads = [Operation::Backup, Operation::Check, Operation::Restore, Operation::CopyFrom, Operation::Export];
            if kind.starts_with('.') && verb != Verb::Stat && (kind != ".tar" || !reads.contains(&operation)) {
                continue;
            }
            places.insert((verb, kind.clone()), 3);
        }
    }
    places
}

/// From the `nth` time on, once or (`lasting`) always.
fn cell(
    operation: Operation,
    verb: Verb,
    kind: &str,
    fault: &str,
    action: &Action,
    words: &'static [&'static str],
    (nth, lasting): (usize, bool),
) -> Cell {
    let glob = match kind {
        "" => String::new(),
        // An archive, or what stands beside it: what its name ends with.
        end if end.starts_with('.') => format!("*{end}*"),
        kind => format!("{{{kind},{kind}/**}}"),
    };
    let times = if lasting { u64::MAX } else { 1 };
    let rule = Rule::on(&[verb], &glob).from(nth as u64).times(times).does(action.clone());
    Cell {
        operation,
        verb: format!("{verb:?}"),
        kind: kind.into(),
        fault: fault.into(),
        nth,
        lasting,
        trouble: Trouble::Fs(rule),
        words,
        heals: false,
        hangs: false,
    }
}

pub fn cells(world: &mut World, operations: &[Operation], every: usize) -> Vec<Cell> {
    let mut all = Vec::new();
    let mut turn = seed() as usize;
    for &operation in operations {
        let places = places(world, operation);
        let verbs: BTreeSet<Verb> = places.keys().map(|(verb, _)| *verb).collect();
        for verb in verbs {
            let kinds: Vec<(&String, usize)> = places.iter().filter(|((v, _), _)| *v == verb).map(|((_, k), n)| (k, *n)).collect();
            for (fault, action, words) in faults(verb) {
                let add = |kind: &str, nth: usize, lasting: bool| {
                    all.push(cell(operation, verb, kind, &fault, &action, words, (nth, lasting)));
                };
                thinned(operation, &kinds, &mut turn, (every, 3), add);
            }
        }
    }
    all
}

#[test]
fn every_error_of_every_operation_of_a_file_system_is_survived_and_named() {
    let Some(mut world) = World::on_fs(Layout::Repository) else { return };
    let cells = cells(&mut world, &OPERATIONS, 1);
    drop(world);
    let world = || World::on_fs(Layout::Repository).unwrap();
    try_all("directory", &cells, world, world);
}

/// A list that is believed to be empty condemns all that it stands for.
#[test]
fn a_directory_that_is_said_not_to_be_there_is_not_one_that_was_never_made() {
    if World::on_fs(Layout::Repository).is_none() {
        return;
    }
    // What each asks for.
    let kinds: &[(Operation, &[&str])] = &[
        (Operation::Prune, &["backups", "index", "packs", "condemned"]),
        (Operation::Backup, &["backups", "index", "packs", "marks", "condemned"]),
        (Operation::Check, &["backups", "index", "packs", "marks", "condemned"]),
        (Operation::ReEncrypt, &["backups", "index", "packs", "marks", "condemned"]),
        (Operation::Delete, &["backups", "marks"]),
        (Operation::TakeOver, &["backups", "marks"]),
    ];
    let mut cells = Vec::new();
    for (operation, kinds) in kinds {
        for kind in *kinds {
            for often in [(1, true), (1, false), (2, false)] {
                let (fault, error, words) = ENOENT;
                cells.push(cell(*operation, Verb::Stat, kind, fault, &Action::Fail(error), words, often));
            }
        }
    }
    let world = || World::on_fs(Layout::Repository).unwrap();
    try_all("directories that are denied", &cells, world, world);
}
