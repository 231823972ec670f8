//! The layer itself: that it passes through what programs do, numbers it, and does what its rules say.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use keepd_faultfs::{Action, Loss, Mounted, Rule, Verb, When, errno};

struct Bench {
    // Unmounted before the directory goes: one with a mount in it cannot be removed.
    mounted: Option<Mounted>,
    dir: tempfile::TempDir,
}

impl Bench {
    /// None where there is no FUSE: said loudly, and a failure where it was asked for.
    fn new() -> Option<Self> {
        if let Some(why) = keepd_faultfs::unavailable() {
            eprintln!("SKIPPED: {why}");
            assert!(std::env::var_os("KEEPD_REQUIRE_FUSE").is_none(), "{why}");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("behind")).unwrap();
        fs::create_dir(dir.path().join("at")).unwrap();
        let mounted = Mounted::new(&dir.path().join("behind"), &dir.path().join("at")).unwrap();
        Some(Self { mounted: Some(mounted), dir })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join("at").join(name)
    }

    fn behind(&self, name: &str) -> PathBuf {
        self.dir.path().join("behind").join(name)
    }

    fn control(&self) -> &keepd_faultfs::Control {
        self.mounted.as_ref().unwrap().control()
    }

    fn said(&self) -> Vec<String> {
        self.control().operations().iter().map(ToString::to_string).collect()
    }
}

#[test]
fn programs_work_on_it() {
    let Some(bench) = Bench::new() else { return };
    fs::create_dir_all(bench.at("a/b")).unwrap();
    fs::write(bench.at("a/b/file"), "contents").unwrap();
    fs::hard_link(bench.at("a/b/file"), bench.at("a/other")).unwrap();
    assert_eq!(fs::metadata(bench.at("a/other")).unwrap().nlink(), 2);
    std::os::unix::fs::symlink("b/file", bench.at("a/link")).unwrap();
    assert_eq!(fs::read_to_string(bench.at("a/link")).unwrap(), "contents");
    fs::rename(bench.at("a"), bench.at("c")).unwrap();
    assert_eq!(fs::read_to_string(bench.behind("c/b/file")).unwrap(), "contents");
    fs::set_permissions(bench.at("c/b/file"), fs::Permissions::from_mode(0o640)).unwrap();
    assert_eq!(fs::metadata(bench.behind("c/other")).unwrap().mode() & 0o7777, 0o640);
    File::create(bench.at("sparse")).unwrap().set_len(1 << 20).unwrap();
    assert_eq!(fs::metadata(bench.at("sparse")).unwrap().len(), 1 << 20);
    let mut names: Vec<_> = fs::read_dir(bench.at("c")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["b", "link", "other"]);
    // An inode is the one behind: who remembers it recognises the file after another mount.
    assert_eq!(fs::metadata(bench.at("c/other")).unwrap().ino(), fs::metadata(bench.behind("c/other")).unwrap().ino());
    let direct = fs::File::options().write(true).create(true).truncate(true).custom_flags(0o40000).open(bench.at("direct"));
    direct.unwrap().write_all_at(&[7; 4096], 0).unwrap();
    assert_eq!(fs::read(bench.at("direct")).unwrap(), [7; 4096]);
    let mut unnamed = tempfile::tempfile_in(bench.at("c")).unwrap();
    unnamed.write_all(b"nameless").unwrap();
    rustix_rename(&bench);
}

/// `mv -n` and `mv --exchange` are renameat2 with flags.
fn rustix_rename(bench: &Bench) {
    fs::write(bench.at("one"), "1").unwrap();
    fs::write(bench.at("two"), "2").unwrap();
    let refused =
        rustix::fs::renameat_with(rustix::fs::CWD, bench.at("one"), rustix::fs::CWD, bench.at("two"), rustix::fs::RenameFlags::NOREPLACE);
    assert_eq!(refused.unwrap_err(), rustix::io::Errno::EXIST);
    rustix::fs::renameat_with(rustix::fs::CWD, bench.at("one"), rustix::fs::CWD, bench.at("two"), rustix::fs::RenameFlags::EXCHANGE)
        .unwrap();
    assert_eq!((fs::read(bench.at("one")).unwrap(), fs::read(bench.at("two")).unwrap()), (b"2".to_vec(), b"1".to_vec()));
}

#[test]
fn every_change_and_listing_has_a_number() {
    let Some(bench) = Bench::new() else { return };
    fs::create_dir(bench.at("d")).unwrap();
    let mut file = File::create(bench.at("d/f")).unwrap();
    file.write_all(b"x").unwrap();
    file.sync_all().unwrap();
    fs::rename(bench.at("d/f"), bench.at("d/g")).unwrap();
    File::open(bench.at("d")).unwrap().sync_all().unwrap();
    assert_eq!(fs::read_dir(bench.at("d")).unwrap().count(), 1);
    fs::remove_file(bench.at("d/g")).unwrap();
    assert_eq!(
        bench.said(),
        ["1 Mkdir d", "2 Create d/f", "3 Write d/f", "4 Fsync d/f", "5 Rename d/f -> d/g", "6 FsyncDir d", "7 List d", "8 Unlink d/g"]
    );
}

#[test]
fn a_process_is_killed_before_or_after_an_operation_and_then_nothing_works() {
    for (when, expected) in [(When::Before, vec!["1", "2"]), (When::After, vec!["1", "2", "3"])] {
        let Some(bench) = Bench::new() else { return };
        let mut shell = Command::new("sh")
            .args(["-c", "read go; for n in 1 2 3 4; do mkdir \"$0/$n\" || exit 7; done"])
            .arg(bench.at(""))
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        bench.control().kill_at(3, when, shell.id());
        shell.stdin.take().unwrap().write_all(b"go\n").unwrap();
        let status = shell.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "{status}");
        let mut names: Vec<_> = fs::read_dir(bench.behind("")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, expected);
        assert_eq!(bench.control().killed().unwrap().to_string(), "3 Mkdir 3");
        assert!(fs::write(bench.at("late"), "").is_err());
        bench.control().serve();
        fs::write(bench.at("late"), "").unwrap();
    }
}

#[test]
fn rules_fail_shorten_delay_and_leave_out() {
    let Some(bench) = Bench::new() else { return };
    let control = bench.control();
    fs::create_dir(bench.at("packs")).unwrap();
    for name in ["a1", "a2", "b1"] {
        fs::write(bench.at("packs").join(name), "0123456789").unwrap();
    }
    let names = || {
        let mut names: Vec<_> = fs::read_dir(bench.at("packs")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };

    control.add(Rule::on(&[Verb::Create], "packs/c*").nth(2).fails(errno::ENOSPC));
    fs::write(bench.at("packs/c1"), "").unwrap();
    assert_eq!(fs::write(bench.at("packs/c2"), "").unwrap_err().raw_os_error(), Some(28));
    fs::write(bench.at("packs/c3"), "").unwrap();
    assert_eq!(control.fired(), 1);
    control.clear_rules();

    control.add(Rule::on(&[Verb::List], "packs").does(Action::Omit("a*".into())).times(1));
    assert_eq!(names(), ["b1", "c1", "c3"]);
    assert_eq!(names(), ["a1", "a2", "b1", "c1", "c3"]);
    control.clear_rules();

    control.add(Rule::on(&[Verb::List], "**").does(Action::Stale));
    fs::write(bench.at("packs/new"), "").unwrap();
    fs::remove_file(bench.at("packs/a1")).unwrap();
    assert_eq!(names(), ["a1", "a2", "b1", "c1", "c3"]);
    control.clear_rules();
    assert_eq!(names(), ["a2", "b1", "c1", "c3", "new"]);

    control.add(Rule::on(&[Verb::Write], "short").does(Action::Short(3)).times(1));
    let mut file = File::create(bench.at("short")).unwrap();
    assert_eq!(file.write(b"0123456789").unwrap(), 3);
    control.clear_rules();

    control.add(Rule::on(&[Verb::Write], "torn").does(Action::Torn(errno::EIO)));
    assert!(fs::write(bench.at("torn"), "0123456789").is_err());
    assert_eq!(fs::read(bench.behind("torn")).unwrap(), b"01234");
    control.clear_rules();

    control.add(Rule::on(&[Verb::Read], "packs/b1").fails(errno::EIO));
    assert!(File::open(bench.at("packs/b1")).unwrap().read_to_end(&mut Vec::new()).is_err());
    control.clear_rules();

    control.add(Rule::on(&[Verb::Mkdir], "slow").does(Action::Delay(Duration::from_millis(300))));
    let since = Instant::now();
    fs::create_dir(bench.at("slow")).unwrap();
    assert!(since.elapsed() >= Duration::from_millis(300));
}

#[test]
fn power_loss_keeps_what_was_synced_and_loses_the_rest() {
    let Some(bench) = Bench::new() else { return };
    fs::write(bench.at("old"), vec![1; 10_000]).unwrap();
    fs::create_dir(bench.at("apart")).unwrap();
    let base = bench.dir.path().join("base");
    bench.control().record(&base).unwrap();
    // 1..4: in the order that keeps: written, synced, named, the directory synced.
    let file = File::create(bench.at("apart/tmp")).unwrap();
    file.write_all_at(&[2; 6000], 0).unwrap();
    file.sync_all().unwrap();
    fs::rename(bench.at("apart/tmp"), bench.at("kept")).unwrap();
    File::open(bench.at("")).unwrap().sync_all().unwrap();
    // 6..: nothing of this is synced.
    fs::write(bench.at("new"), vec![3; 6000]).unwrap();
    fs::File::options().write(true).open(bench.at("old")).unwrap().write_all_at(&[4; 10_000], 0).unwrap();
    fs::remove_file(bench.at("kept")).unwrap();
    let record = bench.control().recorded().unwrap();
    let last = record.last();
    let state = |number, loss, name: &str| {
        let to = bench.dir.path().join(name);
        record.after_power_loss(number, loss, &to).unwrap();
        to
    };

    let before = state(4, Loss::Unsynced, "before");
    assert!(!before.join("kept").exists() && !before.join("apart/tmp").exists(), "the directory was not synced yet");
    let all = state(last, Loss::Nothing, "all");
    assert_eq!(fs::read(all.join("new")).unwrap(), vec![3; 6000]);
    assert_eq!(fs::read(all.join("old")).unwrap(), vec![4; 10_000]);
    assert!(!all.join("kept").exists());
    let lost = state(last, Loss::Unsynced, "lost");
    assert!(!lost.join("new").exists());
    assert_eq!(fs::read(lost.join("old")).unwrap(), vec![1; 10_000]);
    assert_eq!(fs::read(lost.join("kept")).unwrap(), vec![2; 6000]);

    let (mut torn, mut zeros, mut empty) = (0, 0, 0);
    for seed in 0..60 {
        let some = state(last, if seed % 2 == 0 { Loss::Ordered { seed } } else { Loss::Any { seed } }, &format!("some-{seed}"));
        let old = fs::read(some.join("old")).unwrap();
        assert!(old.len() == 10_000 && old.iter().all(|b| [1, 4].contains(b)));
        torn += u32::from(old.contains(&1) && old.contains(&4));
        if let Ok(new) = fs::read(some.join("new")) {
            empty += u32::from(new.is_empty());
            zeros += u32::from(new.contains(&0));
        }
        if let Ok(kept) = fs::read(some.join("kept")) {
            assert_eq!(kept, vec![2; 6000], "what was synced is whole");
        }
        let again = state(last, if seed % 2 == 0 { Loss::Ordered { seed } } else { Loss::Any { seed } }, &format!("again-{seed}"));
        assert_eq!(fs::read(again.join("old")).unwrap(), old, "the same seed gives the same");
    }
    assert!(torn > 5 && zeros > 2 && empty > 2, "torn {torn}, zeros {zeros}, empty {empty}");
}

#[test]
fn sqlite_works_on_it_with_wal_from_two_processes() {
    let Some(bench) = Bench::new() else { return };
    // The mode is set by one before the two begin: SQLite tells at once, whatever the timeout, whoever changes it beside another.
    let set_up = "import sqlite3, sys; d = sqlite3.connect(sys.argv[1]); d.execute('pragma journal_mode=wal'); \
                  d.execute('create table t (x)'); d.commit()";
    assert!(Command::new("python3").args(["-c", set_up]).arg(bench.at("db")).status().unwrap().success());
    let python = "import sqlite3, sys; d = sqlite3.connect(sys.argv[1], timeout=60)\n\
                  for n in range(50): d.execute('insert into t values (1)'); d.commit()\n\
                  print(d.execute('pragma integrity_check').fetchone()[0])";
    let start = || Command::new("python3").args(["-c", python]).arg(bench.at("db")).stdout(Stdio::piped()).spawn().unwrap();
    for child in [start(), start()] {
        let out = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8(out.stdout).unwrap(), "ok\n");
    }
    let count = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('select count(*) from t').fetchone()[0])";
    let out = Command::new("python3").args(["-c", count]).arg(bench.at("db")).output().unwrap();
    assert_eq!(String::from_utf8(out.stdout).unwrap(), "100\n");
    assert!(bench.said().iter().all(|o| !o.contains("-shm") || !o.contains("Write")));
}
