//! keepd is killed before and after every operation on its files, and the power goes out after every one of them; it is killed again while it recovers, and the power goes out after
//! a kill. docs/crash.md says what that means and has the figures.
//!
//! The short run takes a seeded sample of points of each operation. `KEEPD_TEST_LONG=1` takes all, `KEEPD_TEST_SECONDS` ends it then, `KEEPD_TEST_SEED` is another sample, `KEEPD_TEST_THREADS`
//! is how many points are tried at a time; `KEEPD_TEST_SCENARIO=prune` takes operations whose name has that in it, and `KEEPD_TEST_POINT='kill 17 after'` or `'power 17 any 3'` that one
//! point, as a failure names it; `KEEPD_TEST_KEEP=DIRECTORY` keeps its state as it was found.

mod common;
#[path = "crash/scenarios.rs"]
mod scenarios;
#[path = "crash/verify.rs"]
mod verify;
#[path = "crash/world.rs"]
mod world;

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use keepd_faultfs::{Loss, Record, Verb, When};
use scenarios::Scenario;
use verify::{Told, Tree, all_known, proven, spent};
use world::{Facts, Ground, Result, World};

#[derive(Clone, Copy, Debug)]
enum Point {
    Kill(u64, When),
    Power(u64, Loss),
    /// Killed after the first, and the next keepd after the second operation of its own.
    Again(u64, u64),
    /// Killed, and when the next keepd has done its work, the power goes out. With a seed: somewhere in the middle of that.
    Cut(u64, u64),
}

const KINDS: [&str; 4] = ["killed", "power lost", "killed again while recovering", "power lost after a kill"];

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(n, When::Before) => write!(f, "kill {n} before"),
            Self::Kill(n, When::After) => write!(f, "kill {n} after"),
            Self::Power(n, Loss::Nothing) => write!(f, "power {n} nothing 0"),
            Self::Power(n, Loss::Unsynced) => write!(f, "power {n} unsynced 0"),
            Self::Power(n, Loss::Ordered { seed }) => write!(f, "power {n} ordered {seed}"),
            Self::Power(n, Loss::Any { seed }) => write!(f, "power {n} any {seed}"),
            Self::Again(n, then) => write!(f, "again {n} {then}"),
            Self::Cut(n, seed) => write!(f, "cut {n} {seed}"),
        }
    }
}

impl Point {
    /// As it is printed.
    fn parse(text: &str) -> Option<Self> {
        let words: Vec<_> = text.split(' ').collect();
        let n = words.get(1)?.parse().ok()?;
        let seed = words.get(3).and_then(|s| s.parse().ok()).unwrap_or(0);
        Some(match (words[0], *words.get(2)?) {
            ("kill", "before") => Self::Kill(n, When::Before),
            ("kill", "after") => Self::Kill(n, When::After),
            ("power", "nothing") => Self::Power(n, Loss::Nothing),
            ("power", "unsynced") => Self::Power(n, Loss::Unsynced),
            ("power", "ordered") => Self::Power(n, Loss::Ordered { seed }),
            ("power", "any") => Self::Power(n, Loss::Any { seed }),
            ("again", then) => Self::Again(n, then.parse().ok()?),
            ("cut", seed) => Self::Cut(n, seed.parse().ok()?),
            _ => return None,
        })
    }

    fn kind(self) -> usize {
        match self {
            Self::Kill(..) => 0,
            Self::Power(..) => 1,
            Self::Again(..) => 2,
            Self::Cut(..) => 3,
        }
    }

    fn number(self) -> u64 {
        match self {
            Self::Kill(n, _) | Self::Power(n, _) | Self::Again(n, _) | Self::Cut(n, _) => n,
        }
    }
}

/// What came of points.
#[derive(Default)]
struct Tally {
    /// Of each kind, in the order of [`KINDS`].
    tried: [usize; 4],
    all: [usize; 4],
    /// Not reached, since that run had fewer operations.
    missed: usize,
    /// They had a state that was proven already.
    equal: usize,
    wrong: Vec<String>,
    /// Seconds, over all workers.
    took: f64,
}

impl Tally {
    fn add(&mut self, other: &mut Tally) {
        for kind in 0..4 {
            self.tried[kind] += other.tried[kind];
            self.all[kind] += other.all[kind];
        }
        self.missed += other.missed;
        self.equal += other.equal;
        self.took += other.took;
        self.wrong.append(&mut other.wrong);
    }

    fn words(&self) -> String {
        let kinds = (0..4).map(|k| format!("{}: {} of {}", KINDS[k], self.tried[k], self.all[k]));
        kinds.collect::<Vec<_>>().join(", ")
    }
}

fn names(operation: &keepd_faultfs::Operation) -> bool {
    matches!(operation.verb, Verb::Rename | Verb::Link | Verb::Mkdir | Verb::Unlink | Verb::Rmdir)
}

enum Tried {
    Proven,
    /// Its state was proven already.
    Equal,
    /// The run had fewer operations.
    Missed,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One operation, done once undisturbed with everything written down; its points are for whoever has time.
struct Attack<'s> {
    scenario: &'s Scenario,
    facts: Facts,
    record: Record,
    operations: Vec<keepd_faultfs::Operation>,
    /// What was reported good when it was done.
    reported: Vec<String>,
    /// What keepctl printed, and after which operation.
    told: Option<(u64, String)>,
    reference: Vec<Tree>,
    /// So many operations a start has.
    starts: u64,
    points: Vec<Point>,
    taken: AtomicUsize,
    /// States that were proven, with what had been told.
    seen: Mutex<HashSet<blake3::Hash>>,
    tally: Mutex<Tally>,
}

impl<'s> Attack<'s> {
    fn prepared(scenario: &'s Scenario, world: &mut World, ground: &Ground, settings: &Settings) -> Result<Self> {
        scenario.prepared(world, ground)?;
        let base = world.facts.scene.join("base");
        let first = world.facts.scene.join("first");
        world.mount()?;
        let mut told = None;
        let mut starts = 0;
        match scenario.operate {
            Some(operate) => {
                world.start()?;
                world.settled()?;
                world.quiet();
                starts = world.layer().count();
                world.layer().record(&first).map_err(|e| e.to_string())?;
                let out = operate(world);
                if !scenario.is_done(&out) {
                    return Err(format!("undisturbed: {}", common::text(&out)));
                }
                told = Some((world.layer().count(), String::from_utf8_lossy(&out.stdout).into_owned()));
                world.settled()?;
            }
            None => {
                let mut go = world.waiting();
                world.layer().record(&first).map_err(|e| e.to_string())?;
                go.write_all(b"go\n").map_err(|e| e.to_string())?;
                world.answers()?;
                world.settled()?;
                // What it does beside answering is attacked, too.
                world.quiet();
            }
        }
        let operations = world.layer().operations();
        let record = world.layer().recorded().ok_or("no record")?;
        let reported = world.good()?.into_keys().collect();
        world.stop()?;
        world.unmount()?;
        // Once when it was done, and once when it never was.
        let said = Told { said: told.as_ref().map(|t| t.1.clone()), ..Told::default() };
        let done = proven(world, scenario, &said, None).map_err(|e| format!("undisturbed: {e}"))?;
        world.reset(&base)?;
        let never = proven(world, scenario, &Told::default(), None).map_err(|e| format!("not even begun: {e}"))?;
        let mut attack = Self {
            scenario,
            facts: world.facts.clone(),
            record,
            starts: starts.max(operations.len() as u64 / 2).max(1),
            operations,
            reported,
            told,
            reference: vec![done, never],
            points: Vec::new(),
            taken: AtomicUsize::new(0),
            seen: Mutex::default(),
            tally: Mutex::default(),
        };
        attack.points = attack.chosen(settings);
        Ok(attack)
    }

    /// All points, of each kind.
    fn all_points(&self, seed: u64) -> [Vec<Point>; 4] {
        let numbers = || 1..=self.operations.len() as u64;
        let losses = |n| [Loss::Unsynced, Loss::Ordered { seed: n }, Loss::Any { seed: n }].map(|loss| Point::Power(n, loss));
        let mut random = fastrand::Rng::with_seed(seed);
        [
            numbers().flat_map(|n| [Point::Kill(n, When::Before), Point::Kill(n, When::After)]).collect(),
            self.record.points().into_iter().flat_map(losses).collect(),
            numbers().step_by(4).map(|n| Point::Again(n, random.u64(1..=(self.starts * 3 / 4).max(1)))).collect(),
            // What is given a name, or loses it, is what the next keepd may rely on before it is durable.
            numbers()
                .filter(|n| n % 16 == 1 || names(&self.operations[*n as usize - 1]))
                .flat_map(|n| [Point::Cut(n, 0), Point::Cut(n, n)])
                .collect(),
        ]
    }

    /// The points that are tried, in their order.
    fn chosen(&self, settings: &Settings) -> Vec<Point> {
        let all = self.all_points(settings.seed);
        locked(&self.tally).all = [0, 1, 2, 3].map(|kind| all[kind].len());
        if let Some(point) = setting("KEEPD_TEST_POINT") {
            return vec![Point::parse(&point).expect("a point, as it is printed")];
        }
        let mut random = fastrand::Rng::with_seed(settings.seed ^ self.scenario.name.len() as u64);
        // What was reported has to survive whatever comes: that point is always tried.
        let mut points = vec![Point::Power(self.record.last(), Loss::Unsynced)];
        for (kind, mut all) in all.into_iter().enumerate() {
            random.shuffle(&mut all);
            all.retain(|point| point.to_string() != points[0].to_string());
            all.truncate(if settings.long { usize::MAX } else { [2, 2, 1, 1][kind] });
            points.extend(all);
        }
        if settings.long {
            random.shuffle(&mut points[1..]);
        }
        points
    }

    /// Tries a point.
    fn tried(&self, world: &mut World, point: Point) -> Result<Tried> {
        let since = Instant::now();
        if world.facts.scene != self.facts.scene {
            world.clear(self.facts.clone())?;
        }
        world.boot = "one";
        let (is_reached, told) = match point {
            Point::Kill(number, when) => {
                let told = self.killed(world, number, when, None)?;
                let is_reached = world.layer().killed().is_some();
                (is_reached, Told { said: told, ..Told::default() })
            }
            Point::Again(number, then) => {
                let told = self.killed(world, number, When::After, None)?;
                (self.killed_again(world, then)?, Told { said: told, ..Told::default() })
            }
            Point::Power(number, loss) => {
                self.lost(world, &self.record, number, loss)?;
                // What was reported good when all was done is on the disk.
                let reported = if number == self.record.last() { self.reported.clone() } else { Vec::new() };
                let said = self.told.as_ref().filter(|told| number >= told.0).map(|told| told.1.clone());
                (true, Told { reported, said, ..Told::default() })
            }
            Point::Cut(number, seed) => self.killed_and_cut(world, number, seed)?,
        };
        world.ends()?;
        let since = spent(["a kill", "a power loss", "two kills", "a kill and a power loss"][point.kind()], since);
        if let Some(to) = setting("KEEPD_TEST_KEEP") {
            let _ = fs::remove_dir_all(&to);
            world::copy(&world.top(), std::path::Path::new(&to))?;
        }
        let state = world.state()?;
        let state = blake3::hash(format!("{state} {told:?} {}", world.boot).as_bytes());
        spent("hash", since);
        if locked(&self.seen).contains(&state) {
            return Ok(Tried::Equal);
        }
        proven(world, self.scenario, &told, Some(&self.reference))?;
        locked(&self.seen).insert(state);
        Ok(if is_reached { Tried::Proven } else { Tried::Missed })
    }

    /// The disk becomes what it is after a power loss.
    fn lost(&self, world: &mut World, record: &Record, number: u64, loss: Loss) -> Result<()> {
        world.ends()?;
        let top = world.top();
        fs::remove_dir_all(&top).map_err(|e| e.to_string())?;
        record.after_power_loss(number, loss, &top).map_err(|e| format!("building the state: {e}"))?;
        world.same_inodes()?;
        let _ = fs::remove_file(world.beside("keepd.log"));
        world.boot = "two";
        Ok(())
    }

    /// The operation from its beginning, killed there; what keepctl printed if it said that it was done. It stays mounted.
    fn killed(&self, world: &mut World, number: u64, when: When, record: Option<&std::path::Path>) -> Result<Option<String>> {
        let mut told = None;
        let base = self.facts.scene.join("base");
        world.reset(&base)?;
        world.mount()?;
        let attack = |world: &World| -> Result<()> {
            if let Some(first) = record {
                let _ = fs::remove_dir_all(first);
                world.layer().record(first).map_err(|e| e.to_string())?;
            }
            world.layer().kill_at(number, when, world.pid());
            Ok(())
        };
        match self.scenario.operate {
            Some(operate) => {
                world.start()?;
                world.settled()?;
                world.quiet();
                attack(world)?;
                let out = operate(world);
                if self.scenario.is_done(&out) {
                    told = Some(String::from_utf8_lossy(&out.stdout).into_owned());
                }
            }
            None => {
                let mut go = world.waiting();
                attack(world)?;
                go.write_all(b"go\n").map_err(|e| e.to_string())?;
                if world.answers().is_ok() && world.settled().is_ok() {
                    world.quiet();
                }
            }
        }
        world.layer().refuse();
        world.kill();
        Ok(told)
    }

    /// The next keepd is killed at an operation of its own; whether it came to that.
    fn killed_again(&self, world: &mut World, then: u64) -> Result<bool> {
        let reached = world.layer().killed().is_some();
        world.serves_again();
        let mut go = world.waiting();
        world.layer().kill_at(then, When::After, world.pid());
        go.write_all(b"go\n").map_err(|e| e.to_string())?;
        if world.answers().is_ok() && world.settled().is_ok() {
            world.quiet();
        }
        let again = world.layer().killed().is_some();
        world.layer().refuse();
        world.kill();
        Ok(reached && again)
    }

    /// Killed, and the next keepd does what it can, all on one record; then the power goes out: at the end, where all that was reported by then has to stay, or before.
    fn killed_and_cut(&self, world: &mut World, number: u64, seed: u64) -> Result<(bool, Told)> {
        let recorded = world.beside("recorded");
        self.killed(world, number, When::After, Some(&recorded))?;
        let is_reached = world.layer().killed().is_some();
        world.serves_again();
        let begun = world.layer().count();
        world.start().map_err(|e| format!("the next start: {e}"))?;
        world.settled().map_err(|e| format!("after the next start: {e}"))?;
        let first = all_known(world, self.scenario, &Told::default())?;
        let listed = world.layer().count();
        (self.scenario.again)(world).map_err(|e| format!("the same again: {e}"))?;
        world.ok(&["backup", "shop"])?;
        // Copies, and the retention after them, come to their end.
        world.settled()?;
        let good = world.good()?;
        let is_gone = |id: &&String| !good.contains_key(*id);
        let gone: Vec<String> = self.facts.known.keys().chain(first.keys()).filter(is_gone).cloned().collect();
        if let Some(lost) =
            gone.iter().find(|id| !self.scenario.forgets() && !self.scenario.removes.iter().any(|r| world.remembered(r) == *id))
        {
            return Err(format!("LOST: backup {lost} was there after the kill and is not there any more"));
        }
        if setting("KEEPD_TEST_SHOW").is_some() {
            world.layer().operations().iter().for_each(|o| println!("{o}"));
        }
        let record = world.layer().recorded().ok_or("no record")?;
        let mut reported: Vec<String> = good.keys().cloned().collect();
        let (number, loss) = match seed {
            0 => (record.last(), Loss::Unsynced),
            seed => {
                let points: Vec<_> = record.points().into_iter().filter(|p| *p >= begun).collect();
                let mut random = fastrand::Rng::with_seed(seed);
                let number = points.get(random.usize(0..points.len().max(1))).copied().unwrap_or(begun);
                let reported_by_then =
                    if number >= listed { first.keys().filter(|id| good.contains_key(*id)).cloned().collect() } else { Vec::new() };
                reported = reported_by_then;
                (number, if random.bool() { Loss::Unsynced } else { Loss::Any { seed } })
            }
        };
        self.lost(world, &record, number, loss)?;
        let _ = fs::remove_dir_all(&recorded);
        Ok((is_reached, Told { reported, removed: gone, once_more: 1, said: None }))
    }

    fn described(&self, point: Point) -> String {
        let operation = self.operations.get(point.number() as usize - 1).map_or_else(String::new, ToString::to_string);
        format!("{}, {point} ({operation})", self.scenario.name)
    }

    /// Tries the next point; false: there is none.
    fn next(&self, world: &mut World) -> bool {
        let Some(point) = self.points.get(self.taken.fetch_add(1, Ordering::SeqCst)).copied() else { return false };
        let since = Instant::now();
        let tried = self.tried(world, point);
        let mut tally = locked(&self.tally);
        tally.tried[point.kind()] += 1;
        tally.took += since.elapsed().as_secs_f64();
        match tried {
            Ok(Tried::Proven) => {}
            Ok(Tried::Equal) => tally.equal += 1,
            Ok(Tried::Missed) => tally.missed += 1,
            Err(e) => {
                let log = world.log();
                let lines: Vec<_> = log.lines().rev().take(if setting("KEEPD_TEST_POINT").is_some() { 80 } else { 6 }).collect();
                let log: Vec<_> = lines.into_iter().rev().collect();
                let what = format!("{}: {e}\n    {}", self.described(point), log.join("\n    "));
                eprintln!("{what}");
                tally.wrong.push(what);
            }
        }
        true
    }

    /// Which share of its points was taken.
    fn share(&self) -> f64 {
        self.taken.load(Ordering::SeqCst) as f64 / self.points.len().max(1) as f64
    }
}

fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

struct Settings {
    long: bool,
    seed: u64,
    until: Option<Instant>,
}

/// All operations: each is prepared by one of the workers, and then all take points of the one of which the smallest share was tried.
struct Run<'s> {
    wanted: Vec<&'s Scenario>,
    next: AtomicUsize,
    prepared: AtomicUsize,
    attacks: Mutex<Vec<Arc<Attack<'s>>>>,
    failed: Mutex<Vec<String>>,
    tried: AtomicUsize,
    since: Instant,
}

impl<'s> Run<'s> {
    fn work(&self, world: &mut World, ground: &Ground, settings: &Settings) {
        while let Some(scenario) = self.wanted.get(self.next.fetch_add(1, Ordering::SeqCst)) {
            let since = Instant::now();
            match Attack::prepared(scenario, world, ground, settings) {
                Ok(attack) => {
                    if setting("KEEPD_TEST_SHOW").is_some() {
                        attack.operations.iter().for_each(|o| println!("{o}"));
                    }
                    locked(&self.attacks).push(Arc::new(attack));
                }
                Err(e) => {
                    let what = format!("{}: not prepared: {e}\n    {}", scenario.name, world.log());
                    eprintln!("{what}");
                    locked(&self.failed).push(what);
                }
            }
            spent("preparing", since);
            self.prepared.fetch_add(1, Ordering::SeqCst);
        }
        while settings.until.is_none_or(|until| Instant::now() < until) {
            let attacks = locked(&self.attacks).clone();
            let left = attacks.into_iter().filter(|a| a.share() < 1.0);
            let Some(attack) = left.min_by(|a, b| a.share().total_cmp(&b.share())) else {
                if self.prepared.load(Ordering::SeqCst) >= self.wanted.len() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
                continue;
            };
            if attack.next(world) {
                let tried = self.tried.fetch_add(1, Ordering::SeqCst) + 1;
                if settings.long && tried.is_multiple_of(250) {
                    eprintln!("{tried} points in {:.0} s", self.since.elapsed().as_secs_f64());
                }
            }
        }
    }
}

#[test]
fn killed_or_without_power_at_any_point_nothing_is_lost() {
    let unavailable = keepd_faultfs::unavailable().or_else(|| {
        // Views of the file systems are for threads: this one keeps its own.
        let alone = std::thread::spawn(|| keepd_faultfs::in_a_place_of_its_own("/".as_ref(), std::env::temp_dir().as_ref()));
        alone.join().unwrap().err().map(|e| format!("no view of the file systems can be had for a thread alone: {e}"))
    });
    if let Some(why) = unavailable {
        eprintln!("SKIPPED: no crash point was tried: {why}. KEEPD_REQUIRE_FUSE=1 makes this a failure.");
        assert!(setting("KEEPD_REQUIRE_FUSE").is_none(), "{why}");
        return;
    }
    let number = |name: &str| setting(name).map(|s| s.parse::<u64>().expect("a number"));
    let settings = Settings {
        long: setting("KEEPD_TEST_LONG").is_some(),
        seed: number("KEEPD_TEST_SEED").unwrap_or(1),
        until: number("KEEPD_TEST_SECONDS").map(|s| Instant::now() + Duration::from_secs(s)),
    };
    let workers = number("KEEPD_TEST_THREADS").map_or(4, |n| n as usize);
    let only = setting("KEEPD_TEST_SCENARIO").unwrap_or_default();
    let ground = Ground::new();
    let run = Run {
        wanted: scenarios::ALL.iter().filter(|s| s.name.contains(&only)).collect(),
        next: AtomicUsize::new(0),
        prepared: AtomicUsize::new(0),
        attacks: Mutex::default(),
        failed: Mutex::default(),
        tried: AtomicUsize::new(0),
        since: Instant::now(),
    };
    println!("seed {}, {workers} at a time, in {}", settings.seed, ground.shown());
    std::thread::scope(|scope| {
        for worker in 0..workers {
            let (run, ground, settings) = (&run, &ground, &settings);
            scope.spawn(move || match World::new(ground, worker) {
                Ok(mut world) => run.work(&mut world, ground, settings),
                Err(e) => locked(&run.failed).push(e),
            });
        }
    });
    let took = run.since.elapsed().as_secs_f64();
    let mut attacks = run.attacks.into_inner().unwrap();
    attacks.sort_by_key(|a| a.scenario.name);
    let mut all = Tally { wrong: run.failed.into_inner().unwrap(), ..Tally::default() };
    for attack in attacks {
        let mut tally = locked(&attack.tally);
        println!(
            "{:28} {}; proven already: {}, wrong: {} ({:.0} s)",
            attack.scenario.name,
            tally.words(),
            tally.equal,
            tally.wrong.len(),
            tally.took
        );
        all.add(&mut tally);
    }
    let kinds = all.wrong.iter().fold(BTreeMap::<&str, usize>::new(), |mut kinds, w| {
        *kinds
            .entry(if w.contains("LOST") {
                "losses"
            } else if w.contains("GARBAGE") {
                "garbage"
            } else {
                "other"
            })
            .or_default() += 1;
        kinds
    });
    let tried: usize = all.tried.iter().sum();
    println!("{}", all.words());
    println!(
        "{tried} of {} points in {took:.0} s, {:.2} s each; of these {} had a state that was proven already, and {} were not reached; losses: {}, garbage: {}, other: {}",
        all.all.iter().sum::<usize>(),
        all.took / tried.max(1) as f64,
        all.equal,
        all.missed,
        kinds.get("losses").unwrap_or(&0),
        kinds.get("garbage").unwrap_or(&0),
        kinds.get("other").unwrap_or(&0)
    );
    if setting("KEEPD_TEST_TIMES").is_some() {
        for (what, (seconds, times)) in locked(&verify::SPENT).iter() {
            println!("    {what:32} {:6.0} ms, {times} times", 1000.0 * seconds / *times as f64);
        }
    }
    assert!(all.wrong.is_empty(), "\n{}", all.wrong.join("\n"));
    assert!(tried > 0, "nothing was tried");
}
