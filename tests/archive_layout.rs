//! Destinations of archives (`layout = "archive"`): plain files that tar reads, and all that keepd does with a repository.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::servers::{Kind, Server};
use common::*;

fn archives(keepd: &Keepd, name: &str, more: &str) -> String {
    let root = keepd.path(name);
    format!("[destination.{name}]\nservice = \"fs\"\nroot = \"{}\"\nlayout = \"archive\"\n{more}\n", root.display())
}

fn repository(keepd: &Keepd, name: &str) -> String {
    format!("[destination.{name}]\nservice = \"fs\"\nroot = \"{}\"\nencryption = \"main\"\n", keepd.path(name).display())
}

const PLAIN: &str = "encryption = \"none\"";
const SEALED: &str = "encryption = \"main\"";

/// The daemon's configuration with these destinations, each in full, and one job that goes to them.
fn configure(keepd: &Keepd, destinations: &[String], job: &str, more: &str) {
    let d = keepd.dir.path().display();
    let names: Vec<&str> = destinations.iter().map(|t| t.split_once("[destination.").unwrap().1.split_once(']').unwrap().0).collect();
    let text = format!(
        "[daemon]\nstate_dir = \"{d}/state\"\nsocket = \"{d}/keepd.sock\"\n[encryption.main]\nkey_file = \"main.key\"\n{}\n\
         [job.shop]\ndestinations = {names:?}\nretry = {{ attempts = 1 }}\n{job}\n\
         [[job.shop.source]]\nname = \"db\"\nsqlite = \"{d}/shop.db\"\n[[job.shop.source]]\nname = \"files\"\nfiles = \"{d}/files\"\n{more}",
        destinations.join("\n")
    );
    fs::write(keepd.path("keepd.toml"), text).unwrap();
}

/// With a database, files of all kinds, one large, one sparse.
fn prepared() -> Keepd {
    let keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 500);
    fs::create_dir_all(keepd.path("files/deep")).unwrap();
    fs::write(keepd.path("files/deep/note.txt"), "a note").unwrap();
    fs::write(keepd.path("files/empty"), "").unwrap();
    fs::write(keepd.path("files/big"), noise(3 << 20, 5)).unwrap();
    std::os::unix::fs::symlink("deep/note.txt", keepd.path("files/link")).unwrap();
    fs::hard_link(keepd.path("files/big"), keepd.path("files/same")).unwrap();
    let sparse = fs::File::create(keepd.path("files/sparse")).unwrap();
    sparse.set_len(5 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"in the middle", 2 << 20).unwrap();
    keepd
}

fn started(destinations: &[String], keepd: Keepd, job: &str, more: &str) -> Keepd {
    let mut keepd = keepd;
    configure(&keepd, destinations, job, more);
    keepd.start();
    keepd
}

/// The archives in a directory, without what stands beside them.
fn objects(directory: &Path) -> Vec<PathBuf> {
    let all = files_below(directory);
    all.into_iter().filter(|p| p.to_string_lossy().contains(".tar") && !p.to_string_lossy().ends_with(".meta.json")).collect()
}

/// All that lies at a destination but the heads of the audit log.
fn stored(directory: &Path) -> Vec<PathBuf> {
    files_below(directory).into_iter().filter(|p| !p.to_string_lossy().contains("/audit/")).collect()
}

fn companion(archive: &Path) -> PathBuf {
    PathBuf::from(format!("{}.meta.json", archive.display()))
}

fn untarred(keepd: &Keepd, archive: &Path, name: &str) -> PathBuf {
    let to = keepd.path(name);
    fs::create_dir(&to).unwrap();
    let status = Command::new("tar").arg("-xpf").arg(archive).arg("-C").arg(&to).status().unwrap();
    assert!(status.success());
    to
}

fn assert_restores(keepd: &Keepd, backup: &str) {
    let to = keepd.restored(backup);
    assert_same(&keepd.path("files"), &to.join("files"));
    assert_eq!(proven_sum(&to.join("db/shop.db")), 50_000);
}

fn wait_for(what: &str, keepd: &Keepd, mut is: impl FnMut() -> bool) {
    let since = Instant::now();
    while !is() {
        assert!(since.elapsed() < Duration::from_secs(60), "{what}: {}", keepd.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_plain_archive_is_read_by_tar_while_its_database_was_written_to() {
    let keepd = prepared();
    let target = archives(&keepd, "plain", PLAIN);
    let command = format!(
        "[[job.shop.source]]\nname = \"export\"\ncommand = [\"sh\", \"-c\", \"head -c 100000000 {d}/noise\"]\nfile = \"export.bin\"\n\
         [[job.shop.source]]\nname = \"short\"\ncommand = [\"echo\", \"hello\"]\nfile = \"hello.txt\"\n",
        d = keepd.dir.path().display()
    );
    let bytes = noise(100_000_000, 3);
    fs::write(keepd.path("noise"), &bytes).unwrap();
    let keepd = started(&[target], keepd, "", &command);
    let stop = Arc::new(AtomicBool::new(false));
    let (path, stopped) = (keepd.path("shop.db"), stop.clone());
    let writer = std::thread::spawn(move || {
        let db = rusqlite::Connection::open(path).unwrap();
        db.busy_timeout(Duration::from_secs(10)).unwrap();
        let mut moves = 0;
        while !stopped.load(Ordering::Relaxed) {
            let (from, to) = (moves % 500, (moves * 7 + 1) % 500);
            db.execute_batch(&format!(
                "BEGIN IMMEDIATE; UPDATE account SET balance = balance - 1 WHERE id = {from};
                 UPDATE account SET balance = balance + 1 WHERE id = {to}; COMMIT"
            ))
            .unwrap();
            moves += 1;
        }
        moves
    });
    keepd.ok(&["backup", "shop"]);
    stop.store(true, Ordering::Relaxed);
    assert!(writer.join().unwrap() > 0);

    let found = objects(&keepd.path("plain"));
    assert_eq!(found.len(), 1, "{found:?}");
    let name = found[0].file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with("shop-20") && name.ends_with("Z.tar.zst"), "{name}");
    let to = untarred(&keepd, &found[0], "by-hand");
    assert_same(&keepd.path("files"), &to.join("files"));
    assert_eq!(proven_sum(&to.join("db/shop.db")), 50_000);
    assert_eq!(fs::read(to.join("short/hello.txt")).unwrap(), b"hello\n");
    let mut parts: Vec<_> = files_below(&to.join("export"));
    parts.sort();
    assert_eq!(parts.len(), 3);
    assert!(parts[0].ends_with("export.bin.part-00000"), "{parts:?}");
    assert!(parts.iter().flat_map(|p| fs::read(p).unwrap()).eq(bytes.iter().copied()));
    // The lists in it are those of its files.
    let contents: serde_json::Value = serde_json::from_slice(&fs::read(to.join("contents.json")).unwrap()).unwrap();
    for line in contents["files"].as_array().unwrap() {
        let bytes = fs::read(to.join(line["path"].as_str().unwrap())).unwrap();
        assert_eq!(data_encoding::HEXLOWER.encode(&<sha2::Sha256 as sha2::Digest>::digest(&bytes)), line["sha256"].as_str().unwrap());
    }
    // And keepd puts the parts together.
    let restored = keepd.restored("latest");
    assert!(fs::read(restored.join("export/export.bin")).unwrap() == bytes);
    assert_same(&keepd.path("files"), &restored.join("files"));
    assert_eq!(proven_sum(&restored.join("db/shop.db")), 50_000);
    let listed = keepd.ok(&["ls", "latest", "--recursive"]);
    assert!(listed.contains("export/export.bin") && !listed.contains(".part-"), "{listed}");
    assert!(files_below(&keepd.path("state/staged")).is_empty());
}

#[test]
fn sealed_archives_are_kept_checked_and_known_again() {
    let mut keepd = prepared();
    let target = archives(&keepd, "sealed", &format!("{SEALED}\ncompression = \"gzip\""));
    keepd = started(&[target], keepd, "retention = { keep_last = 2 }", "");
    for n in 0..4 {
        fs::write(keepd.path("files/new"), noise(1000, n + 1)).unwrap();
        keepd.ok(&["backup", "shop"]);
    }
    let found = objects(&keepd.path("sealed"));
    assert_eq!(found.len(), 2, "retention leaves two: {found:?}");
    for archive in &found {
        assert!(archive.to_str().unwrap().ends_with(".tar.gz.enc"));
        let bytes = fs::read(archive).unwrap();
        assert!(bytes.starts_with(b"KEEPDENC"));
        let said = fs::read_to_string(companion(archive)).unwrap();
        assert!(!said.contains("shop.db") && said.contains("\"sealed\": true"), "{said}");
    }
    assert_eq!(stored(&keepd.path("sealed")).len(), 4, "nothing else is there");
    let backups = keepd.backups();
    assert_eq!(backups.len(), 2);
    let of = |id: &String| found.iter().find(|a| fs::read_to_string(companion(a)).unwrap().contains(id)).unwrap().clone();
    let (older, newer) = (of(&backups[1]), of(&backups[0]));
    assert_restores(&keepd, "latest");
    assert_eq!(keepd.ok(&["cat", "latest", "files/deep/note.txt"]), "a note");
    assert!(keepd.ok(&["ls", "latest"]).contains("files"));
    let changed = keepd.ok(&["diff", &backups[1], &backups[0]]);
    assert!(changed.contains("files/new") && !changed.contains("files/big"), "{changed}");
    keepd.ok(&["pin", &backups[1]]);
    // The state is lost, and what stands beside one archive, and beside the other it lies.
    keepd.stop();
    fs::remove_dir_all(keepd.path("state")).unwrap();
    let said = fs::read_to_string(companion(&newer)).unwrap();
    fs::write(companion(&newer), said.replace("\"job\": \"shop\"", "\"job\": \"else\"").replace("good", "suspect")).unwrap();
    keepd.start();
    wait_for("the catalogue", &keepd, || keepd.backups().len() == 2);
    let list = keepd.json(&["list"]);
    assert!(list.as_array().unwrap().iter().all(|b| b["job"] == "shop" && b["outcome"] == "good"), "{list}");
    assert_eq!(keepd.backups(), backups);
    assert_eq!(list[1]["pinned"], true, "pins stand beside the archive");
    assert_eq!(proven_sum(&keepd.restored(&backups[1]).join("db/shop.db")), 50_000);
    fs::remove_file(companion(&older)).unwrap();
    fs::write(keepd.path("sealed/holiday.jpg"), "foreign").unwrap();
    keepd.ok(&["check", "sealed", "--read-data"]);
    keepd.ok(&["prune", "sealed"]);
    assert!(keepd.path("sealed/holiday.jpg").exists());
    // One that is removed by hand is gone.
    keepd.ok(&["unpin", &backups[1]]);
    fs::remove_file(&older).unwrap();
    let out = keepd.ctl(&["backup", "shop"]);
    assert!(text(&out).contains("removed from sealed, and not by this keepd"), "{}", text(&out));
    assert!(!keepd.backups().contains(&backups[1]));
    // And one that cannot be opened counts for nothing and stays.
    let newest = objects(&keepd.path("sealed")).pop().unwrap();
    let strange = keepd.path("sealed/shop-2020-01-01T00-00-00Z.tar.gz.enc");
    let mut bytes = fs::read(newest).unwrap();
    bytes.truncate(bytes.len() / 2);
    bytes[200] ^= 1;
    fs::write(&strange, bytes).unwrap();
    let out = keepd.ctl(&["backup", "shop"]);
    assert!(text(&out).contains("it is not counted, and stays"), "{}", text(&out));
    assert!(strange.exists());
    assert_eq!(keepd.backups().len(), 2);
}

#[test]
fn a_flipped_bit_is_found_and_named_and_the_backup_counts_no_more() {
    for (seal, more) in [(PLAIN, "compression = \"none\""), (PLAIN, ""), (SEALED, "")] {
        let keepd = prepared();
        let target = archives(&keepd, "there", &format!("{seal}\n{more}"));
        let keepd = started(&[target], keepd, "", "");
        keepd.ok(&["backup", "shop"]);
        keepd.ok(&["check", "there", "--read-data"]);
        let archive = objects(&keepd.path("there")).remove(0);
        let mut bytes = fs::read(&archive).unwrap();
        let half = bytes.len() / 2;
        bytes[half] ^= 1;
        fs::write(&archive, bytes).unwrap();
        keepd.ok(&["check", "there"]);
        let said = keepd.fails(1, &["check", "there", "--read-data"]);
        let backup = keepd.backups().remove(0);
        assert!(said.contains(&format!("backup {}", &backup[..12])) && said.contains("is hurt"), "{said}");
        assert!(said.contains(".tar"), "{said}");
        assert_eq!(keepd.json(&["list"])[0]["outcome"], "suspect");
        keepd.fails(1, &["restore", &backup, "--to", keepd.path("nowhere").to_str().unwrap()]);
        fs::OpenOptions::new().write(true).open(&archive).unwrap().set_len(half as u64).unwrap();
        let said = keepd.fails(1, &["check", "there"]);
        assert!(said.contains("bytes, and had"), "{said}");
    }
}

#[test]
fn some_of_it_is_restored_and_all_of_it_where_it_was() {
    let keepd = prepared();
    let target = archives(&keepd, "there", SEALED);
    let keepd = started(&[target], keepd, "", "");
    keepd.ok(&["backup", "shop"]);
    let to = keepd.path("some");
    keepd.ok(&["restore", "latest", "--to", to.to_str().unwrap(), "files/same", "files/deep"]);
    // Another name of a file that is not wanted itself.
    assert!(fs::read(to.join("files/same")).unwrap() == noise(3 << 20, 5));
    assert_eq!(fs::read(to.join("files/deep/note.txt")).unwrap(), b"a note");
    assert!(!to.join("files/big").exists() && !to.join("db").exists());
    let to = keepd.path("database");
    keepd.ok(&["restore", "latest", "--to", to.to_str().unwrap(), "db"]);
    assert_eq!(proven_sum(&to.join("db/shop.db")), 50_000);
    let drilled = keepd.ok(&["drill", "latest"]);
    assert!(drilled.contains("proven"), "{drilled}");
    assert!(keepd.json(&["list"])[0]["proven"].is_string());
    let beside = fs::read_to_string(companion(&objects(&keepd.path("there"))[0])).unwrap();
    assert!(beside.contains("\"proven\""), "{beside}");
    keepd.ok(&["compare", "latest"]);
    fs::write(keepd.path("files/deep/note.txt"), "scribbled").unwrap();
    fs::remove_file(keepd.path("files/link")).unwrap();
    assert!(text(&keepd.ctl(&["compare", "latest"])).contains("files/deep/note.txt"));
    rusqlite::Connection::open(keepd.path("shop.db")).unwrap().execute_batch("DELETE FROM account").unwrap();
    keepd.ok(&["restore", "latest", "--in-place", "--yes"]);
    assert_eq!(fs::read(keepd.path("files/deep/note.txt")).unwrap(), b"a note");
    assert!(keepd.path("files/link").is_symlink());
    assert_eq!(proven_sum(&keepd.path("shop.db")), 50_000);
    assert!(files_below(&keepd.path("state/staged")).is_empty());
    let backup = keepd.backups().pop().unwrap();
    keepd.ok(&["delete", &backup, "--yes"]);
    assert!(!keepd.backups().contains(&backup));
}

#[test]
fn copies_go_both_ways() {
    // To an archive destination, from a repository.
    let keepd = prepared();
    let targets = [repository(&keepd, "near"), archives(&keepd, "far", SEALED)];
    let keepd = started(&targets, keepd, "", "");
    keepd.ok(&["backup", "shop"]);
    wait_for("the copy", &keepd, || keepd.json(&["list"])[0]["destinations"].as_array().unwrap().len() == 2);
    fs::rename(keepd.path("near"), keepd.path("lost")).unwrap();
    assert_restores(&keepd, "latest");
    keepd.ok(&["check", "far", "--read-data"]);
    drop(keepd);
    // And from one.
    let keepd = prepared();
    let targets = [archives(&keepd, "near", PLAIN), repository(&keepd, "far"), archives(&keepd, "third", SEALED)];
    let keepd = started(&targets, keepd, "", "");
    keepd.ok(&["backup", "shop"]);
    wait_for("the copies", &keepd, || keepd.json(&["list"])[0]["destinations"].as_array().unwrap().len() == 3);
    fs::rename(keepd.path("near"), keepd.path("lost")).unwrap();
    assert_restores(&keepd, "latest");
    fs::rename(keepd.path("far"), keepd.path("lost2")).unwrap();
    assert_restores(&keepd, "latest");
    keepd.ok(&["check", "third", "--read-data"]);
    rusqlite::Connection::open(keepd.path("shop.db")).unwrap().execute_batch("DELETE FROM account").unwrap();
    keepd.ok(&["restore", "latest", "--in-place", "--yes", "--no-safety-backup"]);
    assert_eq!(proven_sum(&keepd.path("shop.db")), 50_000);
}

#[test]
fn an_archive_is_carried_from_one_destination_to_another_by_hand_and_imported() {
    let keepd = prepared();
    let bytes = noise(40_000_000, 3);
    fs::write(keepd.path("noise"), &bytes).unwrap();
    let command = format!(
        "[[job.shop.source]]\nname = \"export\"\ncommand = [\"cat\", \"{}\"]\nfile = \"export.bin\"\n",
        keepd.path("noise").display()
    );
    let targets = [archives(&keepd, "near", PLAIN)];
    let keepd = started(&targets, keepd, "", &command);
    keepd.ok(&["backup", "shop"]);
    let backup = keepd.backups().remove(0);
    let archive = objects(&keepd.path("near")).remove(0);
    // The other destination is another machine's.
    let mut other = Keepd::prepared();
    fs::remove_dir(other.path("files")).unwrap();
    let targets = [archives(&other, "here", PLAIN), repository(&other, "imported")];
    configure(&other, &targets, "", "");
    fs::create_dir(other.path("here")).unwrap();
    fs::copy(&archive, other.path("here").join(archive.file_name().unwrap())).unwrap();
    other.start();
    wait_for("the catalogue", &other, || {
        other.json(&["list"]).as_array().is_some_and(|l| l.iter().any(|b| b["destinations"].as_array().unwrap().len() == 2))
    });
    assert_eq!(other.backups(), [backup.as_str()], "it is known by its own id, and was copied on");
    let is_whole = |to: &Path| {
        assert_same(&keepd.path("files"), &to.join("files"));
        assert_eq!(proven_sum(&to.join("db/shop.db")), 50_000);
        assert!(fs::read(to.join("export/export.bin")).unwrap() == bytes);
    };
    is_whole(&other.restored(&backup));
    fs::rename(other.path("imported"), other.path("away")).unwrap();
    is_whole(&other.restored(&backup));
    other.stop();
    // Imported, the parts are one file, too.
    let mut third = Keepd::prepared();
    configure(&third, &[repository(&third, "imported")], "", "");
    third.start();
    third.ok(&["import", archive.to_str().unwrap()]);
    is_whole(&third.restored("latest"));
}

#[test]
fn a_kill_in_the_middle_leaves_nothing_under_a_final_name() {
    let mut keepd = prepared();
    let target = archives(&keepd, "there", SEALED);
    let slow = format!(
        "[[job.shop.source]]\nname = \"slow\"\ncommand = [\"sh\", \"-c\", \"cat {d}/files/big; test -e {d}/go || exec sleep 1000\"]\nfile = \"slow.bin\"\n",
        d = keepd.dir.path().display()
    );
    keepd = started(&[target], keepd, "", &slow);
    let mut client = keepd.ctl_command(&["backup", "shop"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("something is written", &keepd, || {
        files_below(&keepd.path("there")).iter().any(|p| p.to_str().unwrap().contains("there/tmp/"))
    });
    keepd.kill();
    client.wait().unwrap();
    assert!(objects(&keepd.path("there")).is_empty());
    keepd.start();
    assert!(keepd.backups().is_empty());
    fs::write(keepd.path("go"), "").unwrap();
    keepd.ok(&["backup", "shop"]);
    assert_eq!(stored(&keepd.path("there")).len(), 2, "what was left behind is swept: {:?}", files_below(&keepd.path("there")));
    assert_restores(&keepd, "latest");
    // Cancelled: the same.
    fs::remove_file(keepd.path("go")).unwrap();
    let mut client = keepd.ctl_command(&["backup", "shop"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("something is written", &keepd, || {
        files_below(&keepd.path("there")).iter().any(|p| p.to_str().unwrap().contains("there/tmp/"))
    });
    let run = keepd.json(&["run", "list"])[0]["id"].as_str().unwrap().to_owned();
    keepd.ok(&["run", "cancel", &run]);
    client.wait().unwrap();
    wait_for("it is gone", &keepd, || stored(&keepd.path("there")).len() == 2);
}

#[test]
fn a_disk_that_is_gone_or_full_is_told() {
    let mut keepd = prepared();
    let target = archives(&keepd, "there", PLAIN);
    keepd = started(&[target], keepd, "", "");
    keepd.ok(&["backup", "shop"]);
    let backup = keepd.backups().remove(0);
    fs::rename(keepd.path("there"), keepd.path("elsewhere")).unwrap();
    fs::create_dir(keepd.path("there")).unwrap();
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("is the disk mounted?"), "{said}");
    assert!(objects(&keepd.path("there")).is_empty());
    fs::remove_dir_all(keepd.path("there")).unwrap();
    fs::rename(keepd.path("elsewhere"), keepd.path("there")).unwrap();
    assert_restores(&keepd, &backup);
    // A name that is taken is not written over.
    keepd.ok(&["backup", "shop"]);
    assert_eq!(objects(&keepd.path("there")).len(), 2);
    // A disk that is too small.
    let small = keepd.path("small");
    fs::create_dir(&small).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).arg(&small).status().unwrap();
    assert!(mounted.success(), "this test needs to mount a tmpfs");
    let unmount = Unmount(small.clone());
    configure(&keepd, &[archives(&keepd, "small", PLAIN)], "", "");
    keepd.ok(&["reload"]);
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("no space left"), "{said}");
    assert!(files_below(&small).is_empty(), "{:?}", files_below(&small));
    drop(unmount);
}

/// Unmounts when it is dropped.
struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn rescue_reads_archives_without_a_daemon() {
    for seal in [PLAIN, SEALED] {
        let keepd = prepared();
        let target = archives(&keepd, "there", seal);
        let mut keepd = started(&[target], keepd, "", "");
        keepd.ok(&["backup", "shop"]);
        keepd.stop();
        fs::remove_dir_all(keepd.path("state")).unwrap();
        let tmp = keepd.path("scratch");
        fs::create_dir(&tmp).unwrap();
        let one = objects(&keepd.path("there")).remove(0);
        let renamed = keepd.path(if seal == PLAIN { "mine.tar.zst" } else { "mine.tar.zst.enc" });
        fs::copy(&one, &renamed).unwrap();
        for (n, place) in
            [format!("fs:{}", keepd.path("there").display()), one.display().to_string(), renamed.display().to_string()].iter().enumerate()
        {
            let rescue = |arguments: &[&str]| {
                let mut run = Command::new(keepd_binary());
                run.args(["rescue", arguments[0], "--destination", place]).args(&arguments[1..]).env("TMPDIR", &tmp).stdin(Stdio::null());
                if seal == SEALED {
                    run.arg("--key").arg(keepd.path("main.key"));
                }
                let out = run.output().unwrap();
                assert!(out.status.success(), "{place}: {arguments:?}: {}", text(&out));
                assert!(files_below(&tmp).is_empty());
                String::from_utf8(out.stdout).unwrap()
            };
            assert!(rescue(&["list"]).contains("shop"));
            assert!(rescue(&["ls", "latest", "--recursive"]).contains("files/deep/note.txt"));
            assert!(rescue(&["check", "--read-data"]).contains("1 of 1 archives read"));
            let to = keepd.path(&format!("rescued-{n}"));
            rescue(&["restore", "latest", "--to", to.to_str().unwrap()]);
            assert_same(&keepd.path("files"), &to.join("files"));
            assert_eq!(proven_sum(&to.join("db/shop.db")), 50_000);
        }
        assert_eq!(stored(&keepd.path("there")).len(), 2, "nothing is written there");
    }
}

#[test]
fn write_only_archives_open_with_the_private_key_alone() {
    let keepd = prepared();
    let pair = keepd.path("pair");
    let made = Command::new(keepd_binary()).args(["key", "generate", "--pair"]).arg(&pair).output().unwrap();
    assert!(made.status.success(), "{}", text(&made));
    let target = archives(&keepd, "there", SEALED);
    let mut keepd = keepd;
    configure(&keepd, &[target], "", "");
    let config = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let public = format!("key_file = \"main.key\"\npublic_key = \"{}.pub\"", pair.display());
    fs::write(keepd.path("keepd.toml"), config.replace("key_file = \"main.key\"", &public)).unwrap();
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let said = keepd.fails(1, &["restore", "latest", "--to", keepd.path("nowhere").to_str().unwrap()]);
    assert!(said.contains("key"), "{said}");
    let key = pair.to_str().unwrap();
    let to = keepd.path("with-key");
    keepd.ok(&["restore", "latest", "--to", to.to_str().unwrap(), "--key", key]);
    assert_same(&keepd.path("files"), &to.join("files"));
    let said = keepd.ok(&["check", "there", "--read-data"]);
    assert!(said.contains("private key alone"), "{said}");
    let said = keepd.ok(&["check", "there", "--read-data", "--key", key]);
    assert!(said.contains("1 of 1 archives read"), "{said}");
}

#[test]
fn others_work_beside_a_backup_and_old_keys_open_old_archives() {
    let keepd = prepared();
    let slow = format!(
        "[[job.shop.source]]\nname = \"slow\"\ncommand = [\"sh\", \"-c\", \"echo slow; while test -e {d}/wait; do sleep 0.05; done\"]\nfile = \"slow.bin\"\n",
        d = keepd.dir.path().display()
    );
    let target = archives(&keepd, "there", SEALED);
    let keepd = started(&[target], keepd, "", &slow);
    keepd.ok(&["backup", "shop"]);
    fs::write(keepd.path("wait"), "").unwrap();
    let mut client = keepd.ctl_command(&["backup", "shop"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("something is written", &keepd, || {
        files_below(&keepd.path("there")).iter().any(|p| p.to_str().unwrap().contains("there/tmp/"))
    });
    assert_restores(&keepd, "latest");
    keepd.ok(&["check", "there", "--read-data"]);
    let exported = keepd.path("exported.tar");
    keepd.ok(&["export", "latest", "-o", exported.to_str().unwrap()]);
    let to = untarred(&keepd, &exported, "exported");
    assert_same(&keepd.path("files"), &to.join("files"));
    fs::remove_file(keepd.path("wait")).unwrap();
    assert!(client.wait().unwrap().success());
    assert_eq!(keepd.backups().len(), 2);
    // The profile gets another key.
    keepd.generate_key("new.key");
    let config = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), config.replace("\"main.key\"", "\"new.key\"\nretired = [\"main.key\"]")).unwrap();
    keepd.ok(&["reload"]);
    assert_restores(&keepd, "latest");
    keepd.ok(&["backup", "shop"]);
    assert_restores(&keepd, "latest");
    keepd.ok(&["check", "there", "--read-data"]);
    let said = text(&keepd.ctl(&["key", "re-encrypt", "there", "--yes"]));
    assert!(said.contains("keeps archives"), "{said}");
}

#[test]
fn configurations_without_sense_are_refused() {
    let keepd = prepared();
    for (more, says) in [
        ("encryption = \"none\"\nprune_grace = \"1d\"", "has no use"),
        ("encryption = \"none\"\ncheck_every = \"1d\"", "does not go with"),
        ("encryption = \"none\"\nlayout = \"tar\"", ""),
    ] {
        let target = match says {
            "" => archives(&keepd, "there", "encryption = \"none\"").replace("\"archive\"", "\"tar\""),
            _ => archives(&keepd, "there", more),
        };
        configure(&keepd, &[target], "", "");
        let out = keepd.command().arg("--check").output().unwrap();
        assert!(!out.status.success() && text(&out).contains(says) && text(&out).contains("there."), "{}", text(&out));
    }
}

fn elsewhere(kind: Kind) {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::started(kind, dir.path());
    let mut keepd = prepared();
    fs::write(keepd.path("files/long"), noise(40 << 20, 6)).unwrap();
    keepd.environment = server.environment();
    let target = server.destination("there", "layout = \"archive\"");
    let keepd = started(&[target], keepd, "retention = { keep_last = 2 }", "");
    for n in 0..3 {
        fs::write(keepd.path("files/new"), noise(1000, n + 1)).unwrap();
        keepd.ok(&["backup", "shop"]);
    }
    assert_eq!(keepd.backups().len(), 2);
    assert_restores(&keepd, "latest");
    keepd.ok(&["check", "there", "--read-data"]);
    let names = stored(&server.data());
    assert_eq!(names.len(), 4, "{kind:?}: {names:?}");
}

#[test]
fn archives_on_an_s3_server() {
    elsewhere(Kind::S3);
}

#[test]
fn archives_on_an_sftp_server() {
    elsewhere(Kind::Sftp);
}

#[test]
fn a_wrong_key_condemns_nothing() {
    let mut keepd = prepared();
    let target = archives(&keepd, "there", SEALED);
    keepd = started(&[target], keepd, "retention = { keep_last = 4 }", "");
    keepd.ok(&["backup", "shop"]);
    keepd.ok(&["backup", "shop"]);
    let before = keepd.backups();
    fs::rename(keepd.path("main.key"), keepd.path("right.key")).unwrap();
    keepd.generate_key("main.key");
    keepd.stop();
    keepd.start();
    let said = keepd.fails(1, &["check", "there", "--read-data"]);
    assert!(said.contains("2 of 2 archives do not open") && said.contains("Nothing was marked"), "{said}");
    fs::remove_file(keepd.path("main.key")).unwrap();
    fs::rename(keepd.path("right.key"), keepd.path("main.key")).unwrap();
    keepd.stop();
    keepd.start();
    assert!(keepd.json(&["list"]).as_array().unwrap().iter().all(|b| b["outcome"] == "good"));
    assert_eq!(keepd.backups(), before);
    keepd.ok(&["check", "there", "--read-data"]);
}

#[test]
fn what_is_put_there_counts_only_when_it_is_whole_and_of_this_host() {
    let keepd = prepared();
    let targets = [repository(&keepd, "near"), archives(&keepd, "there", PLAIN)];
    configure(&keepd, &targets[..1], "", "");
    let keepd = started(&targets[..1], keepd, "", "");
    keepd.ok(&["backup", "shop"]);
    for (name, paths) in [("whole.tar", None), ("part.tar", Some("files/deep"))] {
        let file = keepd.path(name);
        let command = ["export", "latest", "-o", file.to_str().unwrap()];
        keepd.ok(&command.into_iter().chain(paths).collect::<Vec<_>>());
    }
    let name = |second: u32| keepd.path("there").join(format!("shop-2026-01-01T00-00-0{second}Z.tar"));
    fs::create_dir_all(keepd.path("there/tmp/mine")).unwrap();
    fs::write(keepd.path("there/tmp/mine/radio.stream"), "mine").unwrap();
    let whole = fs::read(keepd.path("whole.tar")).unwrap();
    fs::write(name(1), &whole[..whole.len() / 2]).unwrap();
    fs::copy(keepd.path("part.tar"), name(2)).unwrap();
    // The same length, and another host.
    let start = String::from_utf8_lossy(&whole[..4096]).into_owned();
    let at = start.find("\"host\":\"").unwrap() + 8;
    let mut elsewhere = whole.clone();
    elsewhere[at] = if elsewhere[at] == b'z' { b'y' } else { b'z' };
    fs::write(name(3), &elsewhere).unwrap();
    configure(&keepd, &targets, "", "");
    // Where nothing is known of them but what they say.
    keepd.ok(&["reload"]);
    let there = || keepd.json(&["list", "--destination", "there"]).as_array().unwrap().len();
    let said = || keepd.ctl(&["check", "there"]);
    let told = text(&said());
    assert!(told.contains("cut off") && told.contains("only a part of its backup") && told.contains("of host "), "{told}");
    assert_eq!(there(), 0);
    assert!(name(1).exists() && name(2).exists() && name(3).exists() && keepd.path("there/tmp/mine/radio.stream").exists());
    keepd.ok(&["destination", "take-over", "there"]);
    assert_eq!(there(), 1, "the one of another host");
    keepd.ok(&["prune", "there"]);
    assert!(name(1).exists() && keepd.path("there/tmp/mine/radio.stream").exists(), "what is not keepd's stays");
}

#[test]
fn a_renamed_archive_keeps_its_pin() {
    let keepd = prepared();
    let target = archives(&keepd, "there", PLAIN);
    let keepd = started(&[target], keepd, "retention = { keep_last = 1 }", "");
    keepd.ok(&["backup", "shop"]);
    let pinned = keepd.backups().remove(0);
    keepd.ok(&["pin", &pinned]);
    let archive = objects(&keepd.path("there")).remove(0);
    fs::rename(&archive, keepd.path("there").join(format!("shop-2026-01-01T00-00-01Z{}", ".tar.zst"))).unwrap();
    keepd.ok(&["backup", "shop"]);
    keepd.ok(&["backup", "shop"]);
    let backups = keepd.backups();
    assert!(backups.len() == 2 && backups.contains(&pinned), "{backups:?}");
    assert_restores(&keepd, &pinned);
}

#[test]
fn a_full_place_is_left_for_the_next_one() {
    let keepd = prepared();
    let small = keepd.path("small");
    fs::create_dir(&small).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).arg(&small).status();
    if !mounted.is_ok_and(|s| s.success()) {
        eprintln!("SKIPPED: no tmpfs can be mounted here");
        return;
    }
    let targets = [archives(&keepd, "small", PLAIN), repository(&keepd, "near")];
    let mut keepd = started(&targets, keepd, "", "");
    let out = keepd.ctl(&["backup", "shop"]);
    let made = keepd.json(&["list", "--destination", "near"]).as_array().unwrap().len();
    keepd.stop();
    assert!(Command::new("umount").arg(&small).status().unwrap().success());
    assert_eq!(made, 1, "{}", text(&out));
}

/// A repository cuts a database that grew otherwise than an archive has it: what one began the other cannot go on with.
#[test]
fn a_restore_that_began_elsewhere_goes_on_only_with_the_same() {
    let keepd = prepared();
    let destinations = [repository(&keepd, "first"), archives(&keepd, "second", SEALED)];
    let keepd = started(&destinations, keepd, "", "");
    keepd.ok(&["backup", "shop"]);
    let db = rusqlite::Connection::open(keepd.path("shop.db")).unwrap();
    db.execute_batch("UPDATE account SET note = note || 'x' WHERE id % 7 = 0").unwrap();
    keepd.ok(&["backup", "shop"]);
    let newest = keepd.backups()[0].clone();
    wait_for("the copy", &keepd, || objects(&keepd.path("second")).len() == 2);
    let pack = files_below(&keepd.path("first/packs")).into_iter().max_by_key(|p| fs::metadata(p).unwrap().len()).unwrap();
    let mut bytes = fs::read(&pack).unwrap();
    let half = bytes.len() / 2;
    bytes[half] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let to = keepd.path("out");
    let out = keepd.ctl(&["restore", &newest, "--to", to.to_str().unwrap()]);
    let said = text(&out);
    if out.status.success() {
        assert!(said.contains("going on with the copy at second"), "{said}");
        assert_same(&keepd.path("files"), &to.join("files"));
    } else {
        assert!(said.contains("laid out in another way"), "{said}");
    }
}
