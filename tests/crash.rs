//! keepd is killed before and after every operation on its files, and the power goes out after every one of them; docs/crash.md says what that means and has the figures.
//!
//! The short run takes a seeded sample of points of each operation. `KEEPD_TEST_LONG=1` takes all, `KEEPD_TEST_SECONDS` ends it then, `KEEPD_TEST_SEED` is another sample;
//! `KEEPD_TEST_SCENARIO=prune` takes operations whose name has that in it, and `KEEPD_TEST_POINT='kill 17 after'` or `'power 17 any 3'` that one point, as a failure names it.

mod common;
#[path = "crash/scenarios.rs"]
mod scenarios;
#[path = "crash/verify.rs"]
mod verify;
#[path = "crash/world.rs"]
mod world;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use keepd_faultfs::{Loss, Record, When};
use scenarios::Scenario;
use verify::{Tree, proven};
use world::{Result, World};

#[derive(Clone, Copy, Debug)]
enum Point {
    Kill(u64, When),
    Power(u64, Loss),
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(n, When::Before) => write!(f, "kill {n} before"),
            Self::Kill(n, When::After) => write!(f, "kill {n} after"),
            Self::Power(n, Loss::Nothing) => write!(f, "power {n} nothing 0"),
            Self::Power(n, Loss::Unsynced) => write!(f, "power {n} unsynced 0"),
            Self::Power(n, Loss::Ordered { seed }) => write!(f, "power {n} ordered {seed}"),
            Self::Power(n, Loss::Any { seed }) => write!(f, "power {n} any {seed}"),
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
            _ => return None,
        })
    }
}

/// Points tried, of how many; those that were not reached, since the run had fewer operations this time; what went wrong.
#[derive(Default)]
struct Tally {
    kills: (usize, usize),
    powers: (usize, usize),
    missed: usize,
    wrong: Vec<String>,
}

/// One operation, done once undisturbed with everything written down.
struct Attack<'s> {
    scenario: &'s Scenario,
    world: World,
    record: Record,
    operations: Vec<keepd_faultfs::Operation>,
    /// What was reported good when it was done.
    reported: Vec<String>,
    /// What keepctl printed, and after which operation.
    told: Option<(u64, String)>,
    reference: Vec<Tree>,
}

impl<'s> Attack<'s> {
    fn prepared(scenario: &'s Scenario) -> Result<Self> {
        let mut world = scenario.prepared()?;
        let base = world.beside("base");
        world.mount()?;
        let mut told = None;
        let first = world.beside("first");
        let _ = fs::remove_dir_all(&first);
        match scenario.operate {
            Some(operate) => {
                world.start()?;
                world.settled()?;
                world.quiet();
                world.layer().record(&first).map_err(|e| e.to_string())?;
                let out = operate(&world);
                if !matches!(out.status.code(), Some(0 | 3)) {
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
            }
        }
        let operations = world.layer().operations();
        let record = world.layer().recorded().ok_or("no record")?;
        let reported = world.good()?.into_keys().collect();
        world.stop()?;
        world.unmount()?;
        // Once when it was done, and once when it never was.
        let done = proven(&mut world, scenario, &[], told.as_ref().map(|t| t.1.as_str()), None).map_err(|e| format!("undisturbed: {e}"))?;
        world.reset(&base)?;
        let never = proven(&mut world, scenario, &[], None, None).map_err(|e| format!("not even begun: {e}"))?;
        Ok(Self { scenario, world, record, operations, reported, told, reference: vec![done, never] })
    }

    fn points(&self) -> (Vec<Point>, Vec<Point>) {
        let kills = (1..=self.operations.len() as u64).flat_map(|n| [Point::Kill(n, When::Before), Point::Kill(n, When::After)]).collect();
        let losses = |n| [Loss::Unsynced, Loss::Ordered { seed: n }, Loss::Any { seed: n }].map(|loss| Point::Power(n, loss));
        (kills, self.record.points().into_iter().flat_map(losses).collect())
    }

    /// Tries a point: whether it was reached.
    fn tried(&mut self, point: Point) -> Result<bool> {
        let (reached, told) = match point {
            Point::Kill(number, when) => self.killed(number, when)?,
            Point::Power(number, loss) => {
                self.world.kill();
                self.world.unmount()?;
                let top = self.world.top();
                fs::remove_dir_all(&top).map_err(|e| e.to_string())?;
                self.record.after_power_loss(number, loss, &top).map_err(|e| format!("building the state: {e}"))?;
                self.world.same_inodes()?;
                let _ = fs::remove_file(self.world.beside("keepd.log"));
                (true, self.told.as_ref().filter(|told| number >= told.0).map(|told| told.1.clone()))
            }
        };
        // What was reported good when all was done is on the disk.
        let last = matches!(point, Point::Power(number, _) if number == self.record.last());
        let reported = if last { self.reported.clone() } else { Vec::new() };
        proven(&mut self.world, self.scenario, &reported, told.as_deref(), Some(&self.reference))?;
        Ok(reached)
    }

    /// Whether it was reached, and what keepctl printed if it said that it was done.
    fn killed(&mut self, number: u64, when: When) -> Result<(bool, Option<String>)> {
        let mut told = None;
        let base = self.world.beside("base");
        self.world.reset(&base)?;
        self.world.mount()?;
        match self.scenario.operate {
            Some(operate) => {
                self.world.start()?;
                self.world.settled()?;
                self.world.quiet();
                self.world.layer().kill_at(number, when, self.world.pid());
                let out = operate(&self.world);
                if matches!(out.status.code(), Some(0 | 3)) {
                    told = Some(String::from_utf8_lossy(&out.stdout).into_owned());
                }
            }
            None => {
                let mut go = self.world.waiting();
                self.world.layer().kill_at(number, when, self.world.pid());
                go.write_all(b"go\n").map_err(|e| e.to_string())?;
                if self.world.answers().is_ok() {
                    let _ = self.world.settled();
                }
            }
        }
        let reached = self.world.layer().killed().is_some();
        self.world.layer().refuse();
        self.world.kill();
        self.world.unmount()?;
        Ok((reached, told))
    }

    fn described(&self, point: Point) -> String {
        let number = match point {
            Point::Kill(n, _) | Point::Power(n, _) => n,
        };
        let operation = self.operations.get(number as usize - 1).map_or_else(String::new, ToString::to_string);
        format!("{}, {point} ({operation})", self.scenario.name)
    }
}

fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

fn attacked(scenario: &Scenario, sample: usize, seed: u64, until: Option<Instant>, tally: &Mutex<Tally>) {
    let mut attack = match Attack::prepared(scenario) {
        Ok(attack) => attack,
        Err(e) => return tally.lock().unwrap().wrong.push(format!("{}: not prepared: {e}", scenario.name)),
    };
    let (mut kills, mut powers) = attack.points();
    let all = (kills.len(), powers.len());
    let mut random = fastrand::Rng::with_seed(seed ^ scenario.name.len() as u64);
    random.shuffle(&mut kills);
    random.shuffle(&mut powers);
    // What was reported has to survive whatever comes: that point is always tried.
    let last = Point::Power(attack.record.last(), Loss::Unsynced);
    let mut points: Vec<Point> = vec![last];
    points.extend(kills.into_iter().take(sample).zip(powers.into_iter().take(sample)).flat_map(|(k, p)| [k, p]));
    if sample == usize::MAX {
        let (kills, powers) = attack.points();
        points = kills.into_iter().chain(powers).collect();
        random.shuffle(&mut points);
    }
    if let Some(point) = setting("KEEPD_TEST_POINT") {
        points = vec![Point::parse(&point).expect("a point, as it is printed")];
    }
    if setting("KEEPD_TEST_SHOW").is_some() {
        attack.operations.iter().for_each(|o| println!("{o}"));
    }
    let (mut tried_kills, mut tried_powers, mut missed) = (0, 0, 0);
    let mut wrong = Vec::new();
    let since = Instant::now();
    for point in points {
        if until.is_some_and(|until| Instant::now() > until) {
            break;
        }
        match attack.tried(point) {
            Ok(reached) => missed += usize::from(!reached),
            Err(e) => {
                let log = attack.world.log();
                let lines: Vec<_> = log.lines().rev().take(if setting("KEEPD_TEST_POINT").is_some() { 60 } else { 6 }).collect();
                let log: Vec<_> = lines.into_iter().rev().collect();
                let what = format!("{}: {e}\n    {}", attack.described(point), log.join("\n    "));
                eprintln!("{what}");
                if let Some(to) = setting("KEEPD_TEST_KEEP") {
                    attack.world.kill();
                    let _ = attack.world.unmount();
                    let _ = world::copy(&attack.world.top(), std::path::Path::new(&to));
                }
                wrong.push(what);
            }
        }
        match point {
            Point::Kill(..) => tried_kills += 1,
            Point::Power(..) => tried_powers += 1,
        }
    }
    println!(
        "{:28} killed at {tried_kills} of {} points, power lost at {tried_powers} of {}, wrong: {} ({:.0} s)",
        scenario.name,
        all.0,
        all.1,
        wrong.len(),
        since.elapsed().as_secs_f64()
    );
    let mut tally = tally.lock().unwrap();
    tally.kills = (tally.kills.0 + tried_kills, tally.kills.1 + all.0);
    tally.powers = (tally.powers.0 + tried_powers, tally.powers.1 + all.1);
    tally.missed += missed;
    tally.wrong.extend(wrong);
}

#[test]
fn killed_or_without_power_at_any_point_nothing_is_lost() {
    if let Some(why) = keepd_faultfs::unavailable() {
        eprintln!("SKIPPED: no crash point was tried: {why}. KEEPD_REQUIRE_FUSE=1 makes this a failure.");
        assert!(setting("KEEPD_REQUIRE_FUSE").is_none(), "{why}");
        return;
    }
    let long = setting("KEEPD_TEST_LONG").is_some();
    let seed = setting("KEEPD_TEST_SEED").map_or(1, |s| s.parse().expect("a number"));
    let until = setting("KEEPD_TEST_SECONDS").map(|s| Instant::now() + Duration::from_secs(s.parse().expect("a number")));
    let only = setting("KEEPD_TEST_SCENARIO").unwrap_or_default();
    let wanted: Vec<_> = scenarios::ALL.iter().filter(|s| s.name.contains(&only)).collect();
    let next = AtomicUsize::new(0);
    let tally = Mutex::new(Tally::default());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(scenario) = wanted.get(next.fetch_add(1, Ordering::SeqCst)) {
                    // What is left of the time is shared by those that are left.
                    let left = wanted.len() - next.load(Ordering::SeqCst).min(wanted.len()) + 1;
                    let until = until.map(|u| {
                        let rounds = left.div_ceil(2) as u32;
                        Instant::now() + u.saturating_duration_since(Instant::now()) / rounds.max(1)
                    });
                    attacked(scenario, if long { usize::MAX } else { 2 }, seed, until, &tally);
                }
            });
        }
    });
    let tally = tally.into_inner().unwrap();
    let kinds = tally.wrong.iter().fold(BTreeMap::<&str, usize>::new(), |mut kinds, w| {
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
    println!(
        "crash points tried: {} of {} (not reached: {}); power losses tried: {} of {}; losses: {}, garbage: {}, other: {}",
        tally.kills.0,
        tally.kills.1,
        tally.missed,
        tally.powers.0,
        tally.powers.1,
        kinds.get("losses").unwrap_or(&0),
        kinds.get("garbage").unwrap_or(&0),
        kinds.get("other").unwrap_or(&0)
    );
    assert!(tally.wrong.is_empty(), "\n{}", tally.wrong.join("\n"));
    assert!(tally.kills.0 + tally.powers.0 > 0, "nothing was tried");
}
