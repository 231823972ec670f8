//! What goes wrong gets its right word, and nothing is lost by it.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use common::*;

#[test]
fn check_names_what_is_damaged_and_whom_it_hurts() {
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    let backup = keepd.backups().remove(0);
    let objects: Vec<_> = ["packs", "index", "backups"].iter().flat_map(|d| files_below(&keepd.path(&format!("repository/{d}")))).collect();
    assert!(objects.len() >= 4);
    for object in &objects {
        let name = object.file_name().unwrap().to_str().unwrap();
        let whole = fs::read(object).unwrap();
        let other = objects.iter().find(|o| *o != object && o.parent().unwrap().parent() == object.parent().unwrap().parent()).cloned();
        let mut damages: Vec<(&str, Option<Vec<u8>>)> = vec![("missing", None), ("truncated", Some(whole[..whole.len() / 2].to_vec()))];
        let mut flipped = whole.clone();
        flipped[whole.len() / 3] ^= 4;
        damages.push(("a flipped bit", Some(flipped)));
        if let Some(other) = other {
            damages.push(("exchanged", Some(fs::read(other).unwrap())));
        }
        for (what, bytes) in damages {
            match bytes {
                None => fs::remove_file(object).unwrap(),
                Some(bytes) => fs::write(object, bytes).unwrap(),
            }
            let said = keepd.ctl(&["check", "local", "--read-data"]);
            let said_text = text(&said);
            if object.parent().unwrap().ends_with("index") {
                // The packs say themselves what they hold: an index object lost hurts nobody, but a damaged one is named.
                assert!(what == "missing" || said_text.contains(name), "{what} {name}: {said_text}");
                assert!(!said_text.contains("is hurt"), "{said_text}");
            } else {
                assert_eq!(said.status.code(), Some(1), "{what} {}: {said_text}", object.display());
                assert!(said_text.contains(name), "{what} {name} is not named: {said_text}");
                let hurts = object.components().any(|c| c.as_os_str() == "packs");
                assert!(!hurts || said_text.contains(&backup[..12]), "{what}: whom it hurts is not named: {said_text}");
            }
            fs::write(object, &whole).unwrap();
        }
        assert!(keepd.ctl(&["check", "local", "--read-data"]).status.success(), "{}", text(&keepd.ctl(&["check", "local", "--read-data"])));
    }
    assert_same(&keepd.path("files"), &keepd.restored("latest").join("files"));
}

#[test]
fn a_damaged_pack_is_never_restored_as_if_whole_and_the_next_backup_mends_it() {
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    let pack = keepd.damage_a_pack();
    let to = keepd.path("out");
    assert!(keepd.fails(1, &["restore", "latest", "--to", to.to_str().unwrap()]).contains("not complete"));
    fs::remove_file(&pack).unwrap();
    keepd.ok(&["backup", "shop"]);
    assert_same(&keepd.path("files"), &keepd.restored("latest").join("files"));
}

#[test]
fn a_database_that_is_none_fails_the_run_and_keeps_the_backups() {
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    let good = keepd.backups();
    for suffix in ["-wal", "-shm"] {
        let _ = fs::remove_file(format!("{}{suffix}", keepd.path("shop.db").display()));
    }
    fs::write(
        keepd.path("shop.db"),
        "somebody wrote a text over the database; it is longer than the hundred bytes of a header, so that is no excuse",
    )
    .unwrap();
    assert!(keepd.fails(1, &["backup", "shop"]).contains("not an SQLite database"));
    assert_eq!(keepd.backups(), good);
    fs::remove_file(keepd.path("shop.db")).unwrap();
    assert!(keepd.fails(1, &["backup", "shop"]).contains("does not exist"));
    fs::remove_dir_all(keepd.path("files")).unwrap();
    make_database(&keepd.path("shop.db"), 10);
    assert!(keepd.fails(1, &["backup", "shop"]).contains("cannot find"));
    assert_eq!(keepd.backups(), good);
    assert_eq!(keepd.json(&["status"])["jobs"][0]["runs_failed"].as_u64(), Some(3));
    keepd.restored(&good[0]);
}

#[test]
fn keys_are_guarded_and_another_key_opens_nothing() {
    let mut keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    keepd.stop();
    let check = |keepd: &Keepd| text(&keepd.command().arg("--check").output().unwrap());
    fs::rename(keepd.path("main.key"), keepd.path("kept.key")).unwrap();
    assert!(check(&keepd).contains("main.key"), "{}", check(&keepd));
    keepd.generate_key("main.key");
    keepd.start();
    assert!(keepd.fails(1, &["backup", "shop"]).contains("another key"));
    let said = keepd.fails(1, &["restore", "latest", "--to", keepd.path("x").to_str().unwrap()]);
    assert!(said.contains("another key") || said.contains("no good backup"), "{said}");
    keepd.stop();
    fs::rename(keepd.path("kept.key"), keepd.path("main.key")).unwrap();
    fs::set_permissions(keepd.path("main.key"), fs::Permissions::from_mode(0o644)).unwrap();
    assert!(check(&keepd).contains("chmod"), "{}", check(&keepd));
    fs::set_permissions(keepd.path("main.key"), fs::Permissions::from_mode(0o600)).unwrap();
    keepd.start();
    keepd.restored("latest");
    let key = fs::read_to_string(keepd.path("main.key")).unwrap();
    let secret = key.lines().last().unwrap().split(' ').nth(1).unwrap();
    assert!(!keepd.log().contains(secret) && !keepd.ok(&["status", "--json"]).contains(secret));
}

#[test]
fn a_repository_that_vanished_is_not_begun_anew() {
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    fs::rename(keepd.path("repository"), keepd.path("unmounted")).unwrap();
    fs::create_dir(keepd.path("repository")).unwrap();
    assert!(keepd.fails(1, &["backup", "shop"]).contains("is gone"));
    fs::remove_dir(keepd.path("repository")).unwrap();
    fs::rename(keepd.path("unmounted"), keepd.path("repository")).unwrap();
    keepd.ok(&["backup", "shop"]);
}

#[test]
fn a_full_disk_fails_the_run_and_loses_nothing() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: mounting a small file system needs root");
        return;
    }
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 500);
    fs::write(keepd.path("files/a"), noise(4 << 20, 1)).unwrap();
    let repository = keepd.path("repository");
    fs::create_dir(&repository).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=16m", "tmpfs"]).arg(&repository).status().unwrap();
    if !mounted.success() {
        println!("skipped: no file system can be mounted here");
        return;
    }
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    fs::write(keepd.path("files/b"), noise(30 << 20, 2)).unwrap();
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("no space left"), "{said}");
    assert_eq!(keepd.backups().len(), 1);
    keepd.ok(&["check", "local", "--read-data"]);
    assert!(files_below(&repository.join("tmp")).is_empty(), "half an object was left");
    fs::remove_file(keepd.path("files/b")).unwrap();
    keepd.ok(&["prune", "local"]);
    keepd.ok(&["backup", "shop"]);
    assert_same(&keepd.path("files"), &keepd.restored("latest").join("files"));
    keepd.stop();
    assert!(Command::new("umount").arg(&repository).status().unwrap().success());
}

#[test]
fn unreadable_things_make_the_run_partial() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: root is needed to make something unreadable to another user");
        return;
    }
    // As root nothing is unreadable; an attribute of a kind that the file system refuses to read is rare. A directory on a
    // broken FUSE mount would be; simplest is a process of another user.
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 10);
    fs::write(keepd.path("files/open"), "open").unwrap();
    fs::write(keepd.path("files/closed"), "closed").unwrap();
    fs::set_permissions(keepd.path("files/closed"), fs::Permissions::from_mode(0o000)).unwrap();
    let status = Command::new("chown").args(["-R", "65534:65534"]).arg(keepd.dir.path()).status().unwrap();
    assert!(status.success());
    fs::set_permissions(keepd.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    assert!(Command::new("chown").arg("0").arg(keepd.path("files/closed")).status().unwrap().success());
    let copy = tempfile::tempdir().unwrap();
    fs::set_permissions(copy.path(), fs::Permissions::from_mode(0o755)).unwrap();
    copy_program(&keepd_binary(), &copy.path().join("keepd"));
    let mut command = Command::new(copy.path().join("keepd"));
    std::os::unix::process::CommandExt::uid(&mut command, 65534);
    let mut child = command.arg("--config").arg(keepd.path("keepd.toml")).current_dir("/").spawn().unwrap();
    let since = std::time::Instant::now();
    while !keepd.ctl(&["status"]).status.success() {
        assert!(since.elapsed() < std::time::Duration::from_secs(20));
        std::thread::sleep(std::time::Duration::from_millis(30));
    }
    let said = keepd.fails(3, &["backup", "shop"]);
    assert!(said.contains("left out") && said.contains("files/closed"), "{said}");
    assert_eq!(keepd.json(&["list"])[0]["partial"].as_bool(), Some(true));
    let out = keepd.ctl(&["restore", "latest", "--to", keepd.path("out").to_str().unwrap()]);
    assert!(out.status.success(), "{}", text(&out));
    assert!(keepd.path("out/files/open").exists() && !keepd.path("out/files/closed").exists());
    signal(child.id(), "TERM");
    child.wait().unwrap();
    keepd.kill();
}
