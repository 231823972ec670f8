//! The matrix: operations × verbs × faults, whatever the storage: cells, what is asked after each, and the table of it all.

use std::collections::BTreeMap;
use std::process::Output;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::*;
use crate::world::{NAME, Trouble, World, tree};

/// What meets the fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// With retention, which removes a backup, and prune after it.
    Backup,
    Prune,
    Delete,
    Check,
    Restore,
    CopyTo,
    CopyFrom,
    Pin,
    TakeOver,
    /// A new master key: everything is sealed anew.
    ReEncrypt,
}

pub const OPERATIONS: [Operation; 10] = [
    Operation::Backup,
    Operation::Prune,
    Operation::Delete,
    Operation::Check,
    Operation::Restore,
    Operation::CopyTo,
    Operation::CopyFrom,
    Operation::Pin,
    Operation::TakeOver,
    Operation::ReEncrypt,
];

impl Operation {
    /// Brings about what it needs; nothing is faulty yet.
    pub fn prepare(self, world: &mut World) {
        match self {
            Self::Backup => world.change(),
            Self::Prune => {
                world.backed_up();
                let oldest = world.oldest();
                world.keepd.ok(&["delete", &oldest, "--yes"]);
                world.expect_no_more(&oldest);
            }
            Self::CopyTo => {
                world.change();
                world.keepd.ok(&["backup", "docs"]);
            }
            Self::Delete | Self::Pin => world.backed_up(),
            Self::CopyFrom => world.backed_up(),
            Self::Check | Self::Restore | Self::TakeOver | Self::ReEncrypt => {}
        }
    }

    pub fn run(self, world: &World) -> Output {
        let keepd = &world.keepd;
        let docs = || keepd.json(&["list", "--job", "docs"])[0]["id"].as_str().unwrap().to_owned();
        match self {
            Self::Backup => keepd.ctl(&["backup", "shop", "--json"]),
            Self::Prune => keepd.ctl(&["prune", NAME]),
            Self::Delete => keepd.ctl(&["delete", &world.oldest(), "--yes"]),
            Self::Check => keepd.ctl(&["check", NAME, "--read-data"]),
            Self::Restore => {
                let to = keepd.path("restored");
                let _ = std::fs::remove_dir_all(&to);
                keepd.ctl(&["restore", &world.newest().0, "--to", to.to_str().unwrap()])
            }
            Self::CopyTo => keepd.ctl(&["copy", &docs(), "--to", NAME]),
            Self::CopyFrom => keepd.ctl(&["copy", &world.newest().0, "--to", "near"]),
            Self::Pin => keepd.ctl(&["pin", &world.oldest()]),
            Self::TakeOver => keepd.ctl(&["destination", "take-over", NAME]),
            Self::ReEncrypt => keepd.ctl(&["key", "re-encrypt", NAME, "--yes"]),
        }
    }

    /// Notes what it says that it did; what it says wrongly.
    pub fn believe(self, world: &mut World, out: &Output) -> Option<String> {
        match self {
            Self::Backup => world.made(out),
            Self::Delete if out.status.success() => {
                let oldest = world.oldest();
                world.expect_no_more(&oldest);
            }
            Self::Restore if out.status.success() => {
                let back = tree(&world.keepd.path("restored/files"));
                return (back != world.newest().1).then(|| "the restore was good, and what came back is not what went in".into());
            }
            Self::CopyTo if out.status.success() => {
                let id = world.keepd.json(&["list", "--job", "docs"])[0]["id"].as_str().unwrap().to_owned();
                world.expect(&id);
                // Only what stands beside it is looked at for long.
                let lost = world.lost();
                world.expect_no_more(&id);
                return lost.into_iter().find(|l| l.contains(&id));
            }
            _ => {}
        }
        None
    }
}

/// A cell: this operation, with this fault at requests of this verb for objects of this kind.
#[derive(Debug, Clone)]
pub struct Cell {
    pub operation: Operation,
    pub verb: String,
    /// The directory, or the object's name.
    pub kind: String,
    pub fault: String,
    pub nth: usize,
    /// As often as it is tried, or once.
    pub lasting: bool,
    pub trouble: Trouble,
    /// What a message says of the cause, one of these; none where nothing is wrong for whoever asked.
    pub words: &'static [&'static str],
    /// One attempt more gets over it, and nobody needs to hear of it.
    pub heals: bool,
    /// Nothing comes until keepd gives up.
    pub hangs: bool,
}

impl Cell {
    /// What a message calls the object, one of these.
    fn objects(&self) -> Vec<&str> {
        match self.kind.trim_end_matches('/') {
            // By the name that the file was to have.
            "" | "tmp" => vec!["packs", "index", "backups", "marks", "audit", "keys", "condemned", "writer.json", "tmp"],
            "keepd.json" => vec!["keepd.json", "no repository"],
            kind => vec![kind],
        }
    }

    fn told(&self) -> String {
        let often = if self.lasting { "always" } else { "once" };
        format!("{:?} × {} {} × {} (from number {}, {often})", self.operation, self.verb, self.kind, self.fault, self.nth)
    }
}

/// What came of all cells.
#[derive(Default)]
struct Tally {
    cases: usize,
    unmet: usize,
    good: usize,
    not_durable: Vec<String>,
    lost: Vec<String>,
    nameless: Vec<String>,
    stuck: Vec<String>,
    unhealed: Vec<String>,
    /// By verb and fault: met, and ended well in spite of it.
    table: BTreeMap<(String, String), (usize, usize)>,
}

fn try_cell(world: &mut World, cell: &Cell, tally: &Mutex<Tally>) {
    cell.operation.prepare(world);
    world.arm(&cell.trouble);
    let out = cell.operation.run(world);
    let met = world.disarm();
    let wrong = cell.operation.believe(world, &out);
    let is_good = out.status.success();
    let told = said(&out);
    if std::env::var_os("KEEPD_TEST_TELL").is_some() {
        eprintln!("--- {} met {met} times: {:?}\n{told}", cell.told(), out.status.code());
    }
    let lost = world.lost();
    world.remember();
    let mut stuck = None;
    if !is_good {
        let again = cell.operation.run(world);
        if !again.status.success() {
            stuck = Some(format!("{}: it does not go on by itself: {}\nbefore: {told}", cell.told(), said(&again)));
        } else if let Some(wrong) = cell.operation.believe(world, &again) {
            stuck = Some(format!("{}: the next one: {wrong}", cell.told()));
        }
    }
    world.keepd.ctl(&["unpin", &world.oldest()]);
    let mut tally = tally.lock().unwrap();
    if met == 0 {
        println!("not met: {}", cell.told());
        tally.unmet += 1;
    } else {
        tally.cases += 1;
        let entry = tally.table.entry((cell.verb.clone(), cell.fault.clone())).or_default();
        entry.0 += 1;
        entry.1 += usize::from(is_good);
        tally.good += usize::from(is_good);
    }
    tally.not_durable.extend(wrong.map(|w| format!("{}: {w}", cell.told())));
    tally.lost.extend(lost.into_iter().map(|l| format!("{} ({:?}): {l}\nit said: {told}", cell.told(), out.status.code())));
    tally.stuck.extend(stuck);
    if cell.heals && !is_good {
        tally.unhealed.push(format!("{}: {told}", cell.told()));
    }
    let unnamed = [
        ("the cause", cell.words.iter().any(|word| told.contains(word))),
        ("the destination", told.contains(NAME) || told.contains(&world.address())),
        // Beside the place, which has words of its own.
        ("the object", cell.objects().iter().any(|object| told.replace(&world.address(), "").contains(object))),
    ];
    let unnamed: Vec<&str> = unnamed.iter().filter(|(_, is_named)| !is_named).map(|(what, _)| *what).collect();
    if !is_good && !unnamed.is_empty() && met > 0 {
        tally.nameless.push(format!("{} ({:?}): not named: {}: {told}", cell.told(), out.status.code(), unnamed.join(", ")));
    }
}

/// What a user reads, without the rest of a document.
fn said(out: &Output) -> String {
    let run: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
    let messages = run["messages"].as_array().into_iter().flatten().map(|m| m["text"].to_string() + "\n").collect::<String>();
    let printed = if run.is_null() { text(out) } else { String::from_utf8_lossy(&out.stderr).into_owned() };
    messages + &printed
}

pub fn seed() -> u64 {
    std::env::var("KEEPD_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1)
}

/// How many worlds there are at a time: no more than the machine bears, for pauses of its own look like those of a storage.
pub fn at_a_time() -> usize {
    std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8))
}

pub fn is_long() -> bool {
    std::env::var_os("KEEPD_TEST_LONG").is_some()
}

/// Of all that could be tried, what is: everything in the long run; else each fault of each verb with the operations that write and delete, and now and then
/// with the others.
pub fn chosen(operation: Operation, turn: usize) -> bool {
    is_long() || matches!(operation, Operation::Backup | Operation::Prune) || turn.is_multiple_of(6)
}

/// Which cells of a fault there are, as (kind, nth, lasting): in the long run all; else one kind each turn, and every so many turns a fault that passes.
pub fn spread(
    operation: Operation,
    kinds: &[(&String, usize)],
    turn: &mut usize,
    passes_every: usize,
    mut add: impl FnMut(&str, usize, bool),
) {
    if is_long() {
        for (kind, count) in kinds {
            add(kind, 1, true);
            (1..=*count).for_each(|nth| add(kind, nth, false));
        }
        return;
    }
    *turn += 1;
    if chosen(operation, *turn) {
        add(kinds[*turn % kinds.len()].0, 1, !turn.is_multiple_of(passes_every));
    }
}

/// Tries all cells, several at a time, and wants every answer to be the right one. Those that hang have worlds of their own, which wait most of the time.
pub fn try_all(cells: &[Cell], world: impl Fn() -> World + Sync, impatient: impl Fn() -> World + Sync) {
    let tally = Mutex::new(Tally::default());
    let only = std::env::var("KEEPD_TEST_ONLY").unwrap_or_default();
    let cells: Vec<&Cell> = cells.iter().filter(|c| only.is_empty() || c.told().contains(&only)).collect();
    println!("seed {}, {} cells", seed(), cells.len());
    let (hanging, others): (Vec<&Cell>, Vec<&Cell>) = cells.iter().partition(|c| c.hangs);
    let (next_hanging, next_other) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let lived = |cells: &[&Cell], next: &AtomicUsize, world: &dyn Fn() -> World| {
        let mut world = world();
        while let Some(cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
            try_cell(&mut world, cell, &tally);
        }
        world.was_understood();
    };
    std::thread::scope(|scope| {
        for _ in 0..at_a_time().min(others.len()) {
            scope.spawn(|| lived(&others, &next_other, &world));
        }
        for _ in 0..3.min(hanging.len()) {
            scope.spawn(|| lived(&hanging, &next_hanging, &impatient));
        }
    });
    let tally = tally.into_inner().unwrap();
    for (what, list) in [
        ("NOT DURABLE", &tally.not_durable),
        ("LOST", &tally.lost),
        ("NAMELESS", &tally.nameless),
        ("STUCK", &tally.stuck),
        ("NOT HEALED", &tally.unhealed),
    ] {
        list.iter().for_each(|l| println!("{what}: {l}"));
    }
    for ((verb, fault), (met, good)) in &tally.table {
        println!("{verb} × {fault}: {met} cases, {good} good in spite of it");
    }
    let healing = match cells.iter().filter(|c| c.heals).count() {
        // Nothing is tried again in a directory.
        0 => String::new(),
        all => format!(", did not heal by another attempt: {} of {all}", tally.unhealed.len()),
    };
    println!(
        "fault cases: {}, good in spite of the fault: {}, good that was not durable: {}, lost: {}, nameless messages: {}, did not go on by itself: {}\
{healing} ({} cells not met)",
        tally.cases,
        tally.good,
        tally.not_durable.len(),
        tally.lost.len(),
        tally.nameless.len(),
        tally.stuck.len(),
        tally.unmet
    );
    assert!(tally.cases * 10 >= cells.len() * 9, "too many faults were not met");
    assert!(tally.not_durable.is_empty() && tally.lost.is_empty() && tally.nameless.is_empty());
    assert!(tally.stuck.is_empty() && tally.unhealed.is_empty());
}
