//! Crash points of remote storage: keepd is killed at each of its requests, before the storage did it and after, and is started again. Nothing needs to be unlocked, what was
//! to be done can be done, every backup that was told to be good comes back, and after the next prune nothing is left over.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::*;
use crate::matrix::{Operation, at_a_time, is_long, seed};
use crate::s3::Kill;
use crate::world::{NAME, World};

const OPERATIONS: [Operation; 6] =
    [Operation::Backup, Operation::Prune, Operation::Delete, Operation::CopyTo, Operation::ReEncrypt, Operation::Pin];

/// Kills at this request. None when there are not so many.
fn crash(world: &mut World, operation: Operation, at: usize, done: bool) -> Option<Vec<String>> {
    let label = format!("{operation:?}, killed {} request {at}", if done { "after" } else { "before" });
    operation.prepare(world);
    let goal = world.oldest();
    world.s3().kill_at(Kill { pid: world.keepd.pid(), at, done });
    let out = operation.run(world);
    if world.s3().spare() {
        operation.believe(world, &out);
        return None;
    }
    let (verb, name) = world.s3().log().last().cloned().unwrap();
    let label = format!("{label} ({verb:?} {name})");
    world.keepd.kill();
    world.keepd.start();
    let mut problems = Vec::new();
    let is_deleted = operation == Operation::Delete && !text(&world.rescue("list", &["--json"])).contains(&goal);
    if is_deleted {
        world.expect_no_more(&goal);
    } else {
        let mut again = operation.run(world);
        let since = std::time::Instant::now();
        // A re-encryption goes on by itself.
        while text(&again).contains("being re-encrypted already") && since.elapsed().as_secs() < 120 {
            std::thread::sleep(std::time::Duration::from_millis(100));
            again = operation.run(world);
        }
        if !again.status.success() {
            problems.push(format!("{label}: it cannot be done after the crash: {}", text(&again)));
        }
        problems.extend(operation.believe(world, &again).map(|wrong| format!("{label}: {wrong}")));
    }
    problems.extend(world.lost().into_iter().map(|lost| format!("{label}: LOST: {lost}")));
    let pruned = world.keepd.ctl(&["prune", NAME]);
    if !pruned.status.success() {
        problems.push(format!("{label}: no prune after it: {}", text(&pruned)));
    }
    let twice = text(&world.keepd.ctl(&["prune", NAME]));
    if !twice.lines().any(|line| line.trim_start().starts_with("0 of ")) || !world.left_over().is_empty() {
        problems.push(format!("{label}: something is left over: {twice} {:?}", world.left_over()));
    }
    let checked = world.keepd.ctl(&["check", NAME, "--read-data"]);
    if !checked.status.success() {
        problems.push(format!("{label}: a check finds something: {}", text(&checked)));
    }
    world.keepd.ctl(&["unpin", &world.oldest()]);
    Some(problems)
}

/// How many requests an operation makes, about: killed points beyond are passed over.
fn requests(world: &mut World, operation: Operation) -> usize {
    operation.prepare(world);
    world.s3().forget_log();
    let out = operation.run(world);
    assert!(out.status.success(), "{operation:?}: {}", text(&out));
    let requests = world.s3().log().len();
    operation.believe(world, &out);
    requests
}

#[test]
fn a_crash_at_any_request_loses_nothing_and_needs_no_unlocking() {
    let mut points = Vec::new();
    let mut world = World::on_s3();
    for operation in OPERATIONS {
        let all = requests(&mut world, operation);
        let step = if is_long() { 1 } else { (all * 2).div_ceil(8) };
        let first = if is_long() { 0 } else { seed() as usize % step };
        points.extend((first..all * 2).step_by(step).map(|n| (operation, n / 2 + 1, n % 2 == 1)));
        println!("{operation:?}: {all} requests");
    }
    drop(world);
    let only = std::env::var("KEEPD_TEST_ONLY").unwrap_or_default();
    points.retain(|p| only.is_empty() || format!("{p:?}").contains(&only));
    let (next, tried, problems) = (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..at_a_time() {
            scope.spawn(|| {
                let mut world = World::on_s3();
                while let Some((operation, at, done)) = points.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
                    if let Some(found) = crash(&mut world, operation, at, done) {
                        tried.fetch_add(1, Ordering::Relaxed);
                        problems.lock().unwrap().extend(found);
                    }
                }
            });
        }
    });
    let problems = problems.into_inner().unwrap();
    problems.iter().for_each(|p| println!("{p}"));
    let tried = tried.into_inner();
    println!("crash points of remote storage: {tried} of {} asked for, problems: {}", points.len(), problems.len());
    assert!(tried * 10 >= points.len() * 9, "too many points were not met");
    assert!(problems.is_empty());
}
