//! Random life: backups, edits, restores, prunes, kills, dead servers and lost machines, from a seed, beside a model that knows what must be
//! restorable. docs/soak.md says what is done and how to do it again.
//!
//! KEEPD_TEST_SEED: this life again. KEEPD_TEST_SECONDS: how long (without it a quarter of a minute; what is proven at its end comes after that). KEEPD_TEST_STEPS: how many steps at most.
//! KEEPD_TEST_LONG=1: lives of KEEPD_TEST_LIFE seconds each (300), one after the other, for KEEPD_TEST_SECONDS (an hour). KEEPD_TEST_TELL=1: each step as it is made.

mod common;
mod soak {
    pub mod database;
    pub mod dice;
    pub mod figures;
    pub mod model;
    pub mod proof;
    pub mod steps;
    pub mod tree;
    pub mod world;
}

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use soak::dice::Dice;
use soak::figures::Figures;
use soak::world::World;

const FIXED: u64 = 20_261_122;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable} is no number: {text}")))
}

/// So much of a life; what is proven at its end comes after that.
fn live(seed: u64, time: Duration, steps: u64) -> Figures {
    println!("KEEPD_TEST_SEED={seed} for {} s and at most {steps} steps", time.as_secs());
    let since = Instant::now();
    let mut world = World::new(seed);
    let lived = catch_unwind(AssertUnwindSafe(|| {
        for step in 1..=steps {
            if since.elapsed() >= time {
                break;
            }
            world.note(format!("step {step}"));
            world.step(&mut Dice::of(seed, step));
            if step % 60 == 0 {
                world.look_for_leftovers();
            }
        }
        world.note("the end");
        end(&mut world);
    }));
    if lived.is_err() {
        let place = world.keepd.dir.path().to_owned();
        std::fs::write(place.join("keep"), "").unwrap();
        let told: Vec<&str> = world.steps.iter().map(String::as_str).collect();
        world.keepd.dir.disable_cleanup(true);
        panic!("KEEPD_TEST_SEED={seed}: {} is kept; the last steps:\n{}", place.display(), told.join("\n"));
    }
    let mut figures = world.figures.clone();
    figures.lives = 1;
    figures.lived = since.elapsed();
    figures
}

/// What must hold when a life ends.
fn end(world: &mut World) {
    world.cloud_comes_back();
    world.make_room();
    world.rest();
    world.judge(&soak::model::Permit::default());
    world.prove_everything();
    for destination in world.used() {
        world.keepd.ok(&["prune", &destination]);
        world.keepd.ok(&["check", &destination, "--read-data"]);
        let dry = world.keepd.ok(&["prune", &destination, "--dry-run"]);
        world.note(format!("prune {destination} --dry-run: {dry}"));
        if destination != "cloud" {
            let half = common::files_below(&world.path(&destination).join("tmp"));
            assert!(half.is_empty(), "{destination}: {half:?}");
        }
    }
    world.judge(&soak::model::Permit::default());
    world.look_for_leftovers();
    let verified = world.keepd.ctl(&["audit", "verify"]);
    let right = if world.audit_anew { &[0, 3][..] } else { &[0] };
    assert!(verified.status.code().is_some_and(|c| right.contains(&c)), "{}", common::text(&verified));
    world.end();
}

fn short(seed: u64) {
    let time = Duration::from_secs(number("KEEPD_TEST_SECONDS").unwrap_or(15));
    let figures = live(seed, time, number("KEEPD_TEST_STEPS").unwrap_or(u64::MAX));
    println!("{figures}");
}

fn from_the_clock() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    u64::try_from(now.as_millis()).unwrap() % 1_000_000_007
}

#[test]
fn a_short_life_from_a_fixed_seed() {
    if number("KEEPD_TEST_SEED").is_none() && number("KEEPD_TEST_LONG").is_none() {
        short(FIXED);
    }
}

/// Another one each time: for whoever looks for something new, not for whoever wants to know whether all is as it was.
#[test]
#[ignore = "another life each time; KEEPD_TEST_SEED chooses one"]
fn a_short_life_from_the_clock_or_a_given_seed() {
    if number("KEEPD_TEST_LONG").is_none() {
        short(number("KEEPD_TEST_SEED").unwrap_or_else(from_the_clock));
    }
}

#[test]
fn lives_for_hours() {
    if number("KEEPD_TEST_LONG").is_none() {
        return;
    }
    let time = Duration::from_secs(number("KEEPD_TEST_SECONDS").unwrap_or(3600));
    let life = Duration::from_secs(number("KEEPD_TEST_LIFE").unwrap_or(300));
    let first = number("KEEPD_TEST_SEED").unwrap_or_else(from_the_clock);
    let since = Instant::now();
    let mut all = Figures::default();
    let (mut seed, mut failed) = (first, Vec::new());
    while since.elapsed() < time {
        match catch_unwind(|| live(seed, life, u64::MAX)) {
            Ok(figures) => all.add(&figures),
            Err(_) => failed.push(seed),
        }
        println!("after seeds {first} to {seed}, failed: {failed:?}\n{all}");
        seed += 1;
    }
    assert!(failed.is_empty(), "failed: {failed:?}");
}
