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
    /// The configuration is stored there, and an older one removed.
    ConfigBackup,
    /// An archive becomes a backup there.
    Import,
    Export,
    /// Another key opens it, too.
    KeyAdd,
    KeyRemove,
    /// The profile's key is exchanged, in the configuration as well.
    KeyRotate,
}

pub const OPERATIONS: [Operation; 16] = [
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
    Operation::ConfigBackup,
    Operation::Import,
    Operation::Export,
    Operation::KeyAdd,
    Operation::KeyRemove,
    Operation::KeyRotate,
];

/// What a destination of archives has.
pub const OF_ARCHIVES: [Operation; 11] = [
    Operation::Backup,
    Operation::Prune,
    Operation::Delete,
    Operation::Check,
    Operation::Restore,
    Operation::CopyTo,
    Operation::CopyFrom,
    Operation::Pin,
    Operation::TakeOver,
    Operation::ConfigBackup,
    Operation::Export,
];

/// Key slots that a repository may have before those that were added are removed again.
const MANY_SLOTS: usize = 12;

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
            Self::Check | Self::Restore | Self::Export | Self::TakeOver | Self::ReEncrypt | Self::ConfigBackup => {}
            Self::Import => {
                world.change();
                world.keepd.ok(&["backup", "docs"]);
                let archive = world.keepd.path("import.tar.gz");
                let _ = std::fs::remove_file(&archive);
                world.keepd.ok(&["export", "latest", "--job", "docs", "-o", archive.to_str().unwrap()]);
            }
            Self::KeyAdd => {
                let strange: Vec<String> = slots(world).into_iter().filter(|(_, is_ours)| !is_ours).map(|(id, _)| id).collect();
                if strange.len() > MANY_SLOTS {
                    strange.iter().for_each(|id| drop(world.keepd.ok(&["key", "remove", NAME, id, "--yes"])));
                }
                let name = format!("other-{}.key", world.next_number());
                world.keepd.generate_key(&name);
                world.other_key = Some((world.keepd.path(&name), String::new()));
            }
            Self::KeyRemove => {
                Self::KeyAdd.prepare(world);
                let before = slots(world);
                let (key, _) = world.other_key.take().unwrap();
                world.keepd.ok(&["key", "add", NAME, "--key", key.to_str().unwrap()]);
                let (id, _) = slots(world).into_iter().find(|slot| !before.contains(slot)).unwrap();
                world.other_key = Some((key, id));
            }
            Self::KeyRotate => {
                let name = format!("main-{}.key", world.next_number());
                world.keepd.generate_key(&name);
                world.other_key = Some((world.keepd.path(&name), world.key().display().to_string()));
            }
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
            Self::ConfigBackup => keepd.ctl(&["config", "backup"]),
            Self::Import => {
                let archive = keepd.path("import.tar.gz");
                keepd.ctl(&["import", archive.to_str().unwrap(), "--destination", NAME, "--on-conflict", "rename"])
            }
            Self::Export => {
                let to = keepd.path("exported.tar");
                let _ = std::fs::remove_file(&to);
                keepd.ctl(&["export", &world.newest().0, "-o", to.to_str().unwrap()])
            }
            Self::KeyAdd => keepd.ctl(&["key", "add", NAME, "--key", world.other_key.as_ref().unwrap().0.to_str().unwrap()]),
            Self::KeyRemove => keepd.ctl(&["key", "remove", NAME, &world.other_key.as_ref().unwrap().1, "--yes"]),
            Self::KeyRotate => keepd.ctl(&["key", "rotate", "main", "--to", world.other_key.as_ref().unwrap().0.to_str().unwrap()]),
        }
    }

    /// Whether what failed was done all the same, so that there is nothing to be done once more.
    fn is_done(self, world: &World) -> bool {
        match self {
            Self::KeyRemove => !slots(world).iter().any(|(id, _)| *id == world.other_key.as_ref().unwrap().1),
            _ => false,
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
            // Exit 3: it is stored, and an old one could not be removed.
            Self::ConfigBackup if matches!(out.status.code(), Some(0 | 3)) => return world.config_stored(),
            Self::Import => return imported(world, out.status.success()),
            Self::Export => return exported(world, out.status.success()),
            Self::KeyAdd if out.status.success() => {
                let opened = world.rescue_with(&world.other_key.as_ref().unwrap().0, "list", &[]);
                return (!opened.status.success()).then(|| format!("the key was added, and does not open: {}", text(&opened)));
            }
            Self::KeyRemove if out.status.success() => {
                let opened = world.rescue_with(&world.other_key.as_ref().unwrap().0, "list", &[]);
                return opened.status.success().then(|| "the key was removed, and opens".into());
            }
            Self::KeyRotate if out.status.success() => {
                let (new, old) = world.other_key.clone().unwrap();
                if world.key() != new {
                    return Some("the key was exchanged, and the configuration has the old one".into());
                }
                // The new one is tried by whoever looks whether something is lost.
                let opened = world.rescue_with(old.as_ref(), "list", &[]);
                return opened.status.success().then(|| "the key was exchanged, and the old one opens".into());
            }
            _ => {}
        }
        None
    }
}

/// The ids of the key slots there, and whether the configured key opens them.
fn slots(world: &World) -> Vec<(String, bool)> {
    let found = world.keepd.json(&["key", "list", NAME]);
    let slots = found["destinations"][0]["slots"].as_array().unwrap();
    slots.iter().map(|slot| (slot["id"].as_str().unwrap().to_owned(), slot["opens"] != "no")).collect()
}

/// Looks at what an import made, and removes it.
fn imported(world: &mut World, is_good: bool) -> Option<String> {
    let listed = world.keepd.json(&["list", "--destination", NAME, "--type", "imported"]);
    let ids: Vec<String> = listed.as_array().unwrap().iter().map(|b| b["id"].as_str().unwrap().to_owned()).collect();
    let mut wrong = (is_good && ids.is_empty()).then(|| "an import was good, and no backup is listed".to_owned());
    for id in &ids {
        world.expect(id);
        // Also what a failed one left is whole, or nothing.
        wrong = wrong.or(world.lost().into_iter().find(|l| l.contains(id)));
        world.expect_no_more(id);
        world.keepd.ok(&["delete", id, "--yes"]);
    }
    wrong
}

/// A good export is what was backed up; one that failed leaves no file.
fn exported(world: &World, is_good: bool) -> Option<String> {
    let (archive, to) = (world.keepd.path("exported.tar"), world.keepd.path("untarred"));
    if !is_good {
        return archive.exists().then(|| "an export failed, and its file is there".into());
    }
    let _ = std::fs::remove_dir_all(&to);
    std::fs::create_dir(&to).unwrap();
    let untarred = std::process::Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&to).status().unwrap();
    let is_same = untarred.success() && tree(&to.join("files")) == world.newest().1;
    (!is_same).then(|| "an export was good, and what is in it is not what was backed up".into())
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
            "" | "tmp" => vec!["packs", "index", "backups", "marks", "audit", "keys", "condemned", "config", ".tar", "writer.json", "tmp"],
            "keepd.json" => vec!["keepd.json", "no repository"],
            "keys" => vec!["keys", "no key slot"],
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
    strays: Vec<String>,
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
        if !again.status.success() && cell.operation.is_done(world) {
            // As it is now, that is so.
        } else if !again.status.success() {
            stuck = Some(format!("{}: it does not go on by itself: {}\nbefore: {told}", cell.told(), said(&again)));
        } else if let Some(wrong) = cell.operation.believe(world, &again) {
            stuck = Some(format!("{}: the next one: {wrong}", cell.told()));
        }
    }
    world.keepd.ctl(&["unpin", &world.oldest()]);
    let strays = world.strays();
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
    if !strays.is_empty() {
        tally.strays.push(format!("{} ({:?}): {strays:?}\nit said: {told}", cell.told(), out.status.code()));
    }
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

/// Each fault of each verb with each operation, of one kind of objects.
fn is_wide() -> bool {
    is_long() || std::env::var_os("KEEPD_TEST_WIDE").is_some()
}

/// Of all that could be tried, what is: everything in the long run; else each fault of each verb with the operations that write and delete, and now and then
/// with the others.
pub fn chosen(operation: Operation, turn: usize) -> bool {
    is_wide()
        || match operation {
            Operation::Backup | Operation::Prune => true,
            Operation::ConfigBackup | Operation::Import | Operation::Export => turn.is_multiple_of(11),
            Operation::KeyAdd | Operation::KeyRemove | Operation::KeyRotate => turn.is_multiple_of(11),
            _ => turn.is_multiple_of(6),
        }
}

/// Which cells of a fault there are, as (kind, nth, lasting): in the long run all; else one kind each turn, every so many turns a fault that passes, and of all that only
/// each `every`th.
pub fn thinned(
    operation: Operation,
    kinds: &[(&String, usize)],
    turn: &mut usize,
    (every, passes_every): (usize, usize),
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
    if chosen(operation, *turn) && (is_wide() || turn.is_multiple_of(every)) {
        add(kinds[*turn % kinds.len()].0, 1, !turn.is_multiple_of(passes_every));
    }
}

/// Tries all cells, several at a time, and wants every answer to be the right one. Those that hang have worlds of their own, which wait most of the time.
pub fn try_all(what: &str, cells: &[Cell], world: impl Fn() -> World + Sync, impatient: impl Fn() -> World + Sync) {
    let tally = Mutex::new(Tally::default());
    let only = std::env::var("KEEPD_TEST_ONLY").unwrap_or_default();
    let cells: Vec<&Cell> = cells.iter().filter(|c| only.is_empty() || c.told().contains(&only)).collect();
    println!("{what}: seed {}, {} cells", seed(), cells.len());
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
        ("STRAY", &tally.strays),
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
        "{what}: fault cases: {}, good in spite of the fault: {}, good that was not durable: {}, lost: {}, nameless messages: {}, did not go on by itself: {}\
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
    assert!(tally.stuck.is_empty() && tally.unhealed.is_empty() && tally.strays.is_empty());
}
