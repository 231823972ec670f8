//! What goes wrong on the machine itself: no space, a quota, read-only file systems, what belongs to somebody else, a ledger that is locked, damaged or gone, no
//! descriptors, no memory, sources that do not answer, no directory for temporary files, a configuration that cannot be written.
//!
//! Each fault, at each size that it comes in: a run is good only if what it says it made is restored byte for byte; what was good before stays so;
//! the message names the cause; and when the fault is over, the next run is good with nothing done by hand. Mounts are made in a namespace of the
//! test's own. `KEEPD_TEST_LONG=1` sweeps finer, `KEEPD_REQUIRE_MOUNTS=1` makes a failure of what would be skipped.

mod common;
#[path = "local_faults/hung.rs"]
mod hung;
#[path = "local_faults/owners.rs"]
mod owners;
#[path = "local_faults/places.rs"]
mod places;
#[path = "local_faults/quota.rs"]
mod quota;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::*;

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

fn is_long() -> bool {
    std::env::var_os("KEEPD_TEST_LONG").is_some()
}

fn skipped(why: &str) {
    assert!(std::env::var_os("KEEPD_REQUIRE_MOUNTS").is_none(), "not possible here: {why}");
    println!("SKIPPED, NOTHING WAS TESTED: {why}");
}

/// A mount namespace, kept alive by a process that sleeps in it.
struct Namespace(Child);

impl Namespace {
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skipped("mounting needs root");
            return None;
        }
        let Ok(child) = Command::new("unshare").args(["-m", "--propagation", "private", "sleep", "100000"]).spawn() else {
            skipped("there is no 'unshare'");
            return None;
        };
        let namespace = Self(child);
        let own = fs::read_link("/proc/self/ns/mnt").unwrap();
        for _ in 0..500 {
            if fs::read_link(format!("/proc/{}/ns/mnt", namespace.0.id())).is_ok_and(|other| other != own) {
                return Some(namespace);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        skipped("no mount namespace can be made");
        None
    }

    fn wrapper(&self) -> Vec<String> {
        ["nsenter", "-t", &self.0.id().to_string(), "-m", "--"].map(str::to_owned).to_vec()
    }

    fn command(&self, words: &[&str]) -> Command {
        let wrapper = self.wrapper();
        let mut command = Command::new(&wrapper[0]);
        command.args(&wrapper[1..]).args(words).stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> bool {
        let out = self.command(words).output().unwrap();
        if !out.status.success() {
            println!("{words:?}: {}", text(&out));
        }
        out.status.success()
    }

    fn mount(&self, place: &Path, size: u64) {
        fs::create_dir_all(place).unwrap();
        let size = format!("mode=0700,size={size}");
        assert!(self.run(&["mount", "-t", "tmpfs", "-o", &size, "tmpfs", place.to_str().unwrap()]), "mount");
    }

    fn remount(&self, place: &Path, options: &str) -> bool {
        self.run(&["mount", "-o", &format!("remount,{options}"), place.to_str().unwrap()])
    }

    /// A path as it is seen within.
    fn inside(&self, path: &Path) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{}", self.0.id(), path.display()))
    }

    fn used(&self, place: &Path) -> u64 {
        let stat = rustix::fs::statvfs(self.inside(place)).unwrap();
        (stat.f_blocks - stat.f_bfree) * stat.f_frsize
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a fault came to.
#[derive(Default)]
struct Table {
    rows: Vec<(String, String)>,
    good: usize,
    failed: usize,
    refused: usize,
}

impl Table {
    fn add(&mut self, fault: impl Into<String>, outcome: impl Into<String>) {
        self.rows.push((fault.into(), outcome.into()));
    }

    fn print(&self, what: &str) {
        for (fault, outcome) in &self.rows {
            println!("  {fault:<44} {outcome}");
        }
        println!(
            "{what}: {} faults, {} runs failed, {} good and restored, {} starts refused, then all good again",
            self.rows.len(),
            self.failed,
            self.good,
            self.refused
        );
    }
}

/// Files that a run has to store anew, and what they are.
fn change(keepd: &Keepd, seed: u64) {
    fs::write(keepd.path("files/new"), noise(3 << 20, seed * 7 + 1)).unwrap();
    for n in 0..5 {
        fs::write(keepd.path(&format!("files/small-{n}")), noise(3000 + n * 500, seed * 13 + n as u64)).unwrap();
    }
    let db = rusqlite::Connection::open(keepd.path("shop.db")).unwrap();
    db.execute("UPDATE account SET balance = ?1", [seed as i64]).unwrap();
}

/// The backup is what is there now.
fn prove(keepd: &Keepd, backup: &str) {
    let restored = keepd.restored(backup);
    assert_same(&keepd.path("files"), &restored.join("files"));
    assert_eq!(proven_sum(&database_of(&restored)), proven_sum(&keepd.path("shop.db")));
    fs::remove_dir_all(restored).unwrap();
}

fn database_of(restored: &Path) -> PathBuf {
    files_below(restored).into_iter().find(|p| p.extension().is_some_and(|e| e == "db")).unwrap()
}

fn last_line(text: &str) -> String {
    let line = text
        .lines()
        .rev()
        .find(|line| line.contains("error") || line.contains("failed") || line.contains("cannot"))
        .or(text.lines().last());
    line.unwrap_or_default().chars().take(170).collect()
}

/// A run with a fault: what it is worth is what it says. The backup that is said to be good: it is to be proven when the fault is over, for a restore
/// may need what is missing.
#[must_use]
fn attempt(keepd: &Keepd, table: &mut Table, fault: &str, causes: &[&str]) -> Option<String> {
    let before = keepd.backups();
    let out = keepd.ctl(&["backup", "shop"]);
    let said = text(&out);
    if out.status.success() {
        table.good += 1;
        table.add(fault, "good, and restored byte for byte");
    } else {
        table.failed += 1;
        let lower = said.to_lowercase();
        assert!(causes.iter().any(|cause| lower.contains(cause)), "{fault}: the cause is not named: {said}\n{}", keepd.log());
        table.add(fault, format!("failed: {}", last_line(&said)));
    }
    // A run that failed at its very end may have made its backup; nothing that was there is gone.
    let after = keepd.backups();
    assert!(before.iter().all(|id| after.contains(id)), "{fault}: {before:?} became {after:?}");
    out.status
        .success()
        .then(|| after.into_iter().find(|id| !before.contains(id)).unwrap_or_else(|| panic!("{fault}: good, and no backup")))
}

/// The fault is over: what was said to be `good` is, and the next run is, with nothing done by hand.
fn recovers(keepd: &Keepd, fault: &str, first: &str, good: Option<String>) {
    if let Some(good) = good {
        prove(keepd, &good);
    }
    let out = keepd.ctl(&["backup", "shop"]);
    assert!(out.status.success(), "{fault}: the next run is not good: {}\n{}", text(&out), keepd.log());
    prove(keepd, "latest");
    assert!(keepd.backups().iter().any(|id| id == first), "{fault}: the first backup is gone");
}

fn prepared(namespace: &Namespace) -> Keepd {
    let mut keepd = filled(Keepd::prepared());
    keepd.wrapper = namespace.wrapper();
    keepd
}

/// With what a job backs up.
fn filled(keepd: Keepd) -> Keepd {
    let db = make_database(&keepd.path("shop.db"), 500);
    // Copied to the work directory first.
    db.execute_batch("PRAGMA journal_mode = DELETE").unwrap();
    fs::write(keepd.path("files/kept"), noise(1 << 20, 77)).unwrap();
    // Which runs fail decides how much is usually new: no matter of these tests.
    keepd.configure("", "suspect = { changed = 0, incompressible = 0 }");
    keepd
}

fn steps(most: u64) -> Vec<u64> {
    if is_long() {
        let small = (0..16).map(|n| n * 4096);
        return small.chain((1..).map(|n| n * 131_072).take_while(move |n| *n < most)).chain([most]).collect();
    }
    [0, 4096, 16_384, 65_536, 262_144, MIB, most / 2, most].into_iter().filter(|n| *n <= most).collect()
}

#[test]
fn no_space_for_the_repository_at_any_moment_is_no_good_backup_and_over_when_there_is_space() {
    no_space(&[("repository", 6 * MIB)]);
}

#[test]
fn no_space_for_the_state_at_any_moment_is_no_good_backup_and_over_when_there_is_space() {
    no_space(&[("state", 4 * MIB), ("state/work", MIB)]);
}

fn no_space(places: &[(&str, u64)]) {
    let Some(namespace) = Namespace::new() else { return };
    for &(place, most) in places {
        let mut keepd = prepared(&namespace);
        if place == "state/work" {
            fs::create_dir_all(keepd.path("state/work")).unwrap();
            fs::set_permissions(keepd.path("state"), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        }
        let mount = keepd.path(place);
        namespace.mount(&mount, 400 * MIB);
        keepd.start();
        keepd.ok(&["backup", "shop"]);
        let first = keepd.backups().remove(0);
        let mut table = Table::default();
        for (n, free) in steps(most).into_iter().enumerate() {
            change(&keepd, n as u64 + 1);
            let fault = format!("{place}: {free} bytes left");
            // None at all would be no limit.
            let size = (namespace.used(&mount) + free).max(4096);
            assert!(namespace.remount(&mount, &format!("size={size}")), "{fault}");
            let good = attempt(&keepd, &mut table, &fault, &["no space left", "database or disk is full", "disk is full", "mib are free"]);
            assert!(keepd.is_alive(), "{fault}: {}", keepd.log());
            // Half of them also with a start while it is full.
            if n % 2 == 1 {
                keepd.stop();
                match keepd.try_start(PATIENCE) {
                    Ok(()) => {}
                    Err(said) => {
                        table.refused += 1;
                        let lower = said.to_lowercase();
                        assert!(lower.contains("no space") || lower.contains("disk is full"), "{fault}: {said}");
                    }
                }
            }
            assert!(namespace.remount(&mount, "size=400m"));
            if !keepd.is_alive() {
                keepd.start();
            }
            recovers(&keepd, &fault, &first, good);
        }
        let temporaries = namespace.inside(&keepd.path("repository/tmp"));
        assert!(files_below(&temporaries).is_empty(), "half an object was left");
        keepd.ok(&["check", "local", "--read-data"]);
        table.print(&format!("no space on {place}"));
        assert!(table.failed > 0, "{place}: it never filled");
        keepd.stop();
        assert!(namespace.run(&["umount", mount.to_str().unwrap()]));
    }
}

#[test]
fn a_restore_into_a_full_file_system_says_so_and_is_not_complete() {
    let Some(namespace) = Namespace::new() else { return };
    let mut keepd = prepared(&namespace);
    keepd.start();
    change(&keepd, 3);
    keepd.ok(&["backup", "shop"]);
    let target = keepd.path("target");
    let mut table = Table::default();
    for size in [4096, 65_536, MIB, 3 * MIB, 16 * MIB] {
        namespace.mount(&target, size);
        let to = target.join("out");
        let ctl = keepctl_binary();
        let socket = keepd.path("keepd.sock");
        let words = [ctl.to_str().unwrap(), "--socket", socket.to_str().unwrap(), "restore", "latest", "--to", to.to_str().unwrap()];
        let out = namespace.command(&words).output().unwrap();
        let fault = format!("target of {size} bytes");
        if out.status.success() {
            table.good += 1;
            assert_same(&keepd.path("files"), &namespace.inside(&to).join("files"));
            table.add(fault, "restored byte for byte");
        } else {
            table.failed += 1;
            assert!(text(&out).to_lowercase().contains("no space left"), "{fault}: {}", text(&out));
            table.add(fault, format!("failed: {}", last_line(&text(&out))));
        }
        assert!(namespace.run(&["umount", target.to_str().unwrap()]));
    }
    prove(&keepd, "latest");
    assert!(table.good > 0 && table.failed > 2);
    table.print("no space where a restore goes");
}

#[test]
fn read_only_file_systems_are_named_at_start_and_in_the_middle_and_over_when_they_can_be_written() {
    let Some(namespace) = Namespace::new() else { return };
    let mut table = Table::default();
    const CAUSE: [&str; 3] = ["read-only", "readonly", "read only"];
    // The repository, between two runs and in the middle of one.
    let mut keepd = prepared(&namespace);
    let repository = keepd.path("repository");
    namespace.mount(&repository, 400 * MIB);
    let d = keepd.dir.path().display().to_string();
    write_program(
        &keepd.path("slow"),
        &format!(
            "#!/bin/sh\nhead -c 3000000 /dev/urandom\nif [ -e {d}/wait ]; then touch {d}/begun; while [ -e {d}/wait ]; do sleep 0.05; done; fi\n"
        ),
    );
    keepd.configure("", &format!("[[job.shop.source]]\nname = \"slow\"\ncommand = [\"{d}/slow\"]\n"));
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let first = keepd.backups().remove(0);
    change(&keepd, 1);
    assert!(namespace.remount(&repository, "ro"));
    assert_eq!(attempt(&keepd, &mut table, "repository read-only", &CAUSE), None);
    assert!(namespace.remount(&repository, "rw"));
    recovers(&keepd, "repository read-only", &first, None);
    change(&keepd, 2);
    fs::write(keepd.path("wait"), "").unwrap();
    let run = keepd.ctl_command(&["backup", "shop"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let since = Instant::now();
    while !keepd.path("begun").exists() {
        assert!(since.elapsed() < PATIENCE, "the source is not asked: {}", keepd.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    let is_set = (0..200).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        namespace.remount(&repository, "ro")
    });
    fs::remove_file(keepd.path("wait")).unwrap();
    let out = run.wait_with_output().unwrap();
    assert!(is_set, "files were open for writing all the time");
    assert!(!out.status.success() && CAUSE.iter().any(|cause| text(&out).to_lowercase().contains(cause)), "{}", text(&out));
    table.failed += 1;
    table.add("repository read-only in the middle", format!("failed: {}", last_line(&text(&out))));
    assert!(namespace.remount(&repository, "rw"));
    recovers(&keepd, "repository read-only in the middle", &first, None);
    keepd.stop();
    // At start.
    assert!(namespace.remount(&repository, "ro"));
    keepd.start();
    assert_eq!(attempt(&keepd, &mut table, "repository read-only at start", &CAUSE), None);
    prove(&keepd, "latest");
    assert!(namespace.remount(&repository, "rw"));
    recovers(&keepd, "repository read-only at start", &first, None);
    keepd.stop();

    // The state, at start: a daemon that can note nothing starts nothing.
    let mut keepd = prepared(&namespace);
    let state = keepd.path("state");
    namespace.mount(&state, 400 * MIB);
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let first = keepd.backups().remove(0);
    keepd.stop();
    assert!(namespace.remount(&state, "ro"));
    let said = keepd.try_start(PATIENCE).expect_err("it starts where it can note nothing");
    assert!(CAUSE.iter().any(|cause| said.to_lowercase().contains(cause)) && said.contains("state"), "{said}");
    table.refused += 1;
    table.add("state read-only at start", format!("refused: {}", last_line(&said)));
    assert!(namespace.remount(&state, "rw"));
    keepd.start();
    recovers(&keepd, "state read-only at start", &first, None);
    table.print("read-only file systems");
}

#[test]
fn a_ledger_that_somebody_locks_holds_a_run_and_breaks_nothing() {
    let mut keepd = Keepd::started();
    let mut table = Table::default();
    keepd.ok(&["backup", "shop"]);
    let first = keepd.backups().remove(0);
    change(&keepd, 1);
    let other = rusqlite::Connection::open(keepd.path("state/ledger.sqlite")).unwrap();
    other.busy_timeout(Duration::from_secs(30)).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert_eq!(attempt(&keepd, &mut table, "ledger locked while running", &["locked"]), None);
    assert!(keepd.is_alive());
    other.execute_batch("ROLLBACK").unwrap();
    recovers(&keepd, "ledger locked while running", &first, None);
    keepd.stop();
    other.execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE").unwrap();
    match keepd.try_start(PATIENCE) {
        Err(said) => {
            assert!(said.contains("ledger.sqlite") && said.contains("locked"), "{said}");
            table.refused += 1;
            table.add("ledger locked at start", format!("refused: {}", last_line(&said)));
        }
        Ok(()) => panic!("it started with a ledger that it cannot write"),
    }
    drop(other);
    keepd.start();
    recovers(&keepd, "ledger locked at start", &first, None);
    table.print("locked ledger");
}

#[test]
fn a_ledger_that_is_damaged_is_refused_with_what_to_do_and_that_helps() {
    let mut keepd = Keepd::started();
    let mut table = Table::default();
    keepd.ok(&["backup", "shop"]);
    keepd.ok(&["backup", "shop"]);
    let ledger = keepd.path("state/ledger.sqlite");
    let others = ["-wal", "-shm"].map(|suffix| PathBuf::from(format!("{}{suffix}", ledger.display())));
    type Damage = fn(&mut Vec<u8>);
    // And whether that is refused; what is not has to be told apart from a ledger that never had anything.
    let damages: [(&str, Damage, bool); 7] = [
        ("header overwritten", |bytes| bytes[..16].fill(b'x'), true),
        ("first page overwritten", |bytes| bytes[100..4096].fill(0xff), true),
        (
            "a page in the middle overwritten",
            |bytes| {
                let half = bytes.len() / 2 / 4096 * 4096;
                bytes[half..half + 4096].fill(0xa5);
            },
            true,
        ),
        ("all pages but the first overwritten", |bytes| bytes[4096..].fill(0), true),
        ("truncated to a half", |bytes| bytes.truncate(bytes.len() / 2), true),
        ("truncated within a page", |bytes| bytes.truncate(5000), true),
        ("empty", Vec::clear, false),
    ];
    for (what, damage, is_refused) in damages {
        let before = keepd.backups();
        keepd.stop();
        // All of it into the file that is damaged.
        rusqlite::Connection::open(&ledger).unwrap().query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
        let mut bytes = fs::read(&ledger).unwrap();
        assert!(bytes.len() > 16_384, "{what}: {} bytes", bytes.len());
        damage(&mut bytes);
        fs::write(&ledger, bytes).unwrap();
        others.iter().for_each(|path| drop(fs::remove_file(path)));
        let fault = format!("ledger: {what}");
        match keepd.try_start(PATIENCE) {
            Err(said) => {
                table.refused += 1;
                assert!(said.contains("ledger.sqlite") && said.contains("move it"), "{fault}: {said}");
                table.add(&fault, format!("refused: {}", last_line(&said)));
                // As it says.
                fs::rename(&ledger, keepd.path("moved")).unwrap();
                others.iter().for_each(|path| drop(fs::remove_file(path)));
                keepd.start();
            }
            Ok(()) => {
                assert!(!is_refused, "{fault}: it starts, as if nothing were wrong: {}", keepd.log());
                table.add(&fault, "started, and begun anew");
            }
        }
        // The catalogue is made anew in the background.
        let since = Instant::now();
        while keepd.backups().len() < before.len() {
            assert!(since.elapsed() < PATIENCE, "{fault}: {before:?} became {:?}; {}", keepd.backups(), keepd.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        change(&keepd, 5);
        recovers(&keepd, &fault, &before[0], None);
    }
    // While it runs: what SQLite has open goes on, and the next start finds what there is.
    for (what, names) in [("removed while running", vec![ledger.clone()]), ("-wal and -shm removed while running", others.to_vec())] {
        let before = keepd.backups();
        names.iter().for_each(|path| drop(fs::remove_file(path)));
        change(&keepd, 6);
        let out = keepd.ctl(&["backup", "shop"]);
        table.add(format!("ledger: {what}"), if out.status.success() { "good".into() } else { last_line(&text(&out)) });
        keepd.kill();
        if let Err(said) = keepd.try_start(PATIENCE) {
            assert!(said.contains("move it"), "{said}");
            names.iter().chain([&ledger]).for_each(|path| drop(fs::remove_file(path)));
            keepd.start();
        }
        let since = Instant::now();
        while !before.iter().all(|id| keepd.backups().contains(id)) {
            assert!(since.elapsed() < PATIENCE, "{what}: {}", keepd.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        recovers(&keepd, what, &before[0], None);
    }
    table.print("damaged ledger");
}

#[test]
fn without_descriptors_it_fails_by_name_and_goes_on_with_them() {
    let mut table = Table::default();
    let mut keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    let first = keepd.backups().remove(0);
    keepd.stop();
    let counts: Vec<u32> =
        if is_long() { (8..100).step_by(2).chain([128, 192, 256]).collect() } else { vec![8, 16, 20, 24, 28, 32, 40, 64, 256] };
    for (n, count) in counts.into_iter().enumerate() {
        change(&keepd, n as u64 + 1);
        let fault = format!("{count} descriptors");
        keepd.wrapper = ["prlimit", &format!("--nofile={count}:4096"), "--"].map(str::to_owned).to_vec();
        let started = keepd.try_start(PATIENCE);
        keepd.wrapper.clear();
        let mut good = None;
        match started {
            Err(said) => {
                table.refused += 1;
                assert!(
                    said.contains("Too many open files") || said.contains("unable to open") || said.contains("os error 24"),
                    "{fault}: {said}"
                );
                table.add(&fault, format!("refused: {}", last_line(&said)));
                keepd.start();
            }
            Ok(()) => {
                good = attempt(&keepd, &mut table, &fault, &["too many open files", "unable to open", "os error 24"]);
                assert!(keepd.is_alive(), "{fault}: {}", keepd.log());
                let raised = Command::new("prlimit").args(["--pid", &keepd.pid().to_string(), "--nofile=4096:4096"]).status().unwrap();
                assert!(raised.success());
            }
        }
        recovers(&keepd, &fault, &first, good);
        keepd.stop();
    }
    table.print("descriptors");
}

#[test]
fn limits_on_files_memory_and_processes_are_crashes_at_worst() {
    let mut table = Table::default();
    let mut keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    let first = keepd.backups().remove(0);
    let mut known = vec![first.clone()];
    keepd.stop();
    let mut faults: Vec<(String, Vec<String>)> = Vec::new();
    for size in [0u64, 4096, 65_536, MIB, 2 * MIB] {
        faults.push((format!("no file longer than {size} bytes"), vec!["prlimit".into(), format!("--fsize={size}"), "--".into()]));
    }
    for size in [48u64, 96, 192, 384, 768] {
        faults.push((format!("address space of {size} MiB"), vec!["prlimit".into(), format!("--as={}", size * MIB), "--".into()]));
    }
    let groups = Groups::new();
    for (kind, limit, value) in
        [("memory", "memory.limit_in_bytes", vec![24 * MIB, 40 * MIB, 64 * MIB, 128 * MIB]), ("pids", "pids.max", vec![3, 6, 10, 16])]
    {
        for value in value {
            if let Some(wrapper) = groups.wrapper(kind, limit, value) {
                faults.push((format!("cgroup {kind} of {value}"), wrapper));
            } else {
                table.add(format!("cgroup {kind} of {value}"), "SKIPPED: no such controller can be written here");
            }
        }
    }
    let mut stuck = Vec::new();
    for (n, (fault, wrapper)) in faults.into_iter().enumerate() {
        change(&keepd, n as u64 + 1);
        keepd.wrapper = wrapper;
        let started = catch_unwind(AssertUnwindSafe(|| keepd.try_start(Duration::from_secs(20))));
        keepd.wrapper.clear();
        let mut is_good = false;
        match started {
            Err(_) => {
                table.add(&fault, "NEITHER ANSWERS NOR ENDS");
                stuck.push(fault.clone());
                keepd.kill();
            }
            Ok(Err(said)) => {
                table.refused += 1;
                table.add(&fault, format!("refused: {}", last_line(&said)));
            }
            Ok(Ok(())) => {
                let out = keepd.ctl(&["backup", "shop"]);
                is_good = out.status.success();
                if is_good {
                    table.good += 1;
                    table.add(&fault, "good, and restored byte for byte");
                } else {
                    table.failed += 1;
                    let ended = if keepd.is_alive() { "" } else { "keepd ended; " };
                    table.add(&fault, format!("{ended}failed: {}", last_line(&text(&out))));
                }
                keepd.kill();
            }
        }
        keepd.start();
        let runs = keepd.json(&["run", "list"]);
        let is_open = |run: &&serde_json::Value| matches!(run["state"].as_str(), None | Some("queued" | "running"));
        assert_eq!(runs.as_array().unwrap().iter().find(is_open), None, "{fault}: a run that nobody closed");
        let new = keepd.backups().into_iter().find(|id| !known.contains(id));
        assert!(!is_good || new.is_some(), "{fault}: good, and no backup");
        recovers(&keepd, &fault, &first, new.filter(|_| is_good));
        known = keepd.backups();
        keepd.stop();
    }
    table.print("limits");
    assert!(stuck.is_empty(), "keepd neither answers nor ends: {stuck:?}");
    // Without control groups there are ten faults.
    assert!(table.failed + table.refused > 3 && table.good > 0);
}

/// Control groups of this test, of the first or the second kind, whichever can be written.
struct Groups(std::cell::RefCell<Vec<PathBuf>>);

impl Groups {
    fn new() -> Self {
        Self(Default::default())
    }

    fn wrapper(&self, kind: &str, limit: &str, value: u64) -> Option<Vec<String>> {
        let one = PathBuf::from("/sys/fs/cgroup").join(kind);
        let (parent, limit) = match one.is_dir() {
            true => (one, limit),
            false => (PathBuf::from("/sys/fs/cgroup"), if kind == "memory" { "memory.max" } else { limit }),
        };
        let group = parent.join(format!("keepd-test-{}-{value}", std::process::id()));
        fs::create_dir(&group).ok()?;
        self.0.borrow_mut().push(group.clone());
        fs::write(group.join(limit), value.to_string()).ok()?;
        let swap = group.join("memory.swap.max");
        if swap.exists() {
            fs::write(swap, "0").ok()?;
        }
        let script = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", group.display());
        Some(["sh", "-c", &script, "sh"].map(str::to_owned).to_vec())
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        for group in self.0.borrow().iter() {
            let _ = fs::remove_dir(group);
        }
    }
}

#[test]
fn what_the_schedule_noted_in_the_future_does_not_stop_it() {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 50);
    keepd.configure("", "every = \"1h\"\nmax_age = \"2h\"\n");
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    keepd.stop();
    // As a clock that was ten years ahead leaves it.
    let db = rusqlite::Connection::open(keepd.path("state/ledger.sqlite")).unwrap();
    let rows = db
        .execute(
            "UPDATE schedule SET json = json_set(json, '$.last_due', '2046-01-01T00:00:00Z', '$.first_seen', '2046-01-01T00:00:00Z',
             '$.last_good', '2046-01-01T00:00:00Z') WHERE job = 'shop'",
            [],
        )
        .unwrap();
    assert_eq!(rows, 1);
    drop(db);
    keepd.start();
    let status = keepd.json(&["status"]);
    let next: jiff::Timestamp = status["jobs"][0]["next"].as_str().unwrap().parse().unwrap();
    assert!(next.duration_since(jiff::Timestamp::now()) <= jiff::SignedDuration::from_hours(1), "{status}");
    keepd.ok(&["backup", "shop"]);
}
