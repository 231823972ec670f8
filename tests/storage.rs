//! Destinations beyond this machine: every service against a real server, what goes wrong with them, copies between them.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::servers::{Kind, SECRET, Server, Tap};
use common::*;

/// The daemon's configuration with these destinations, each in full, and one job that goes to them.
fn configure(keepd: &Keepd, destinations: &[String], job: &str) {
    let d = keepd.dir.path().display();
    let names: Vec<&str> = destinations.iter().map(|t| t.split_once("[destination.").unwrap().1.split_once(']').unwrap().0).collect();
    let text = format!(
        "[daemon]\nstate_dir = \"{d}/state\"\nsocket = \"{d}/keepd.sock\"\n[encryption.main]\nkey_file = \"main.key\"\n\
         [encryption.other]\nkey_file = \"other.key\"\n{}\n[job.shop]\ndestinations = {names:?}\nretry = {{ backoff = \"1s\" }}\n{job}\n\
         [[job.shop.source]]\nname = \"db\"\nsqlite = \"{d}/shop.db\"\n[[job.shop.source]]\nname = \"files\"\nfiles = \"{d}/files\"\n",
        destinations.join("\n")
    );
    fs::write(keepd.path("keepd.toml"), text).unwrap();
}

fn local(keepd: &Keepd, name: &str, more: &str) -> String {
    format!("[destination.{name}]\nservice = \"fs\"\nroot = \"{}\"\nencryption = \"main\"\n{more}\n", keepd.path(name).display())
}

fn prepared(bytes: usize) -> Keepd {
    let keepd = Keepd::prepared();
    keepd.generate_key("other.key");
    make_database(&keepd.path("shop.db"), 200);
    fs::create_dir_all(keepd.path("files/deep")).unwrap();
    fs::write(keepd.path("files/deep/note.txt"), "a note").unwrap();
    fs::write(keepd.path("files/big"), noise(bytes, 5)).unwrap();
    keepd
}

fn started(server: &Server, bytes: usize, more: &str) -> Keepd {
    let mut keepd = prepared(bytes);
    keepd.environment = server.environment();
    configure(&keepd, &[server.destination("there", more)], "");
    keepd.start();
    keepd
}

fn assert_restores(keepd: &Keepd) {
    let to = keepd.restored("latest");
    assert_same(&keepd.path("files"), &to.join("files"));
    assert_eq!(proven_sum(&to.join("db/shop.db")), 20_000);
}

/// The names of its destinations, of the newest backup.
fn places(keepd: &Keepd) -> Vec<String> {
    let list = keepd.json(&["list"]);
    list[0]["destinations"].as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap().to_owned()).collect()
}

fn wait_for(what: &str, keepd: &Keepd, mut is: impl FnMut() -> bool) {
    let since = Instant::now();
    while !is() {
        assert!(since.elapsed() < Duration::from_secs(60), "{what}: {}", keepd.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn every_command(kind: Kind) {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::started(kind, dir.path());
    let keepd = started(&server, 3 << 20, "prune_grace = \"0s\"");
    let tested = keepd.json(&["destination", "test", "there"]);
    for finding in tested.as_array().unwrap() {
        let fine =
            finding["verdict"] == "ok" || (finding["verdict"] == "warning" && finding["step"] == "create-if-absent" && kind == Kind::S3);
        assert!(fine, "{kind:?}: {finding}");
    }
    assert!(tested.as_array().unwrap().len() >= 11);
    keepd.ok(&["backup", "shop"]);
    assert_restores(&keepd);
    fs::write(keepd.path("files/new"), noise(100_000, 9)).unwrap();
    keepd.ok(&["backup", "shop"]);
    let newest = &keepd.json(&["list"])[0];
    assert!(newest["added_bytes"].as_u64().unwrap() < 300_000, "{kind:?}: only what changed travels: {newest}");
    assert_restores(&keepd);
    keepd.ok(&["check", "there", "--read-data"]);
    let oldest = keepd.backups().pop().unwrap();
    keepd.ok(&["delete", &oldest, "--yes"]);
    fs::remove_file(keepd.path("files/new")).unwrap();
    let said = keepd.ok(&["prune", "there"]);
    assert!(said.contains("deleted"), "{said}");
    keepd.ok(&["check", "there", "--read-data"]);
    let listed = &keepd.json(&["destination", "list"])[0];
    assert_eq!(listed["error"], serde_json::Value::Null);
    assert!(listed["traffic"]["sent"].as_u64().unwrap() > 3 << 20 && listed["traffic"]["received"].as_u64().unwrap() > 3 << 20, "{listed}");
    if kind != Kind::Moto {
        let names: Vec<String> =
            files_below(&server.data()).iter().map(|p| p.strip_prefix(server.data()).unwrap().display().to_string()).collect();
        assert!(names.iter().all(|n| !n.starts_with("tmp/") && !n.contains(".part")), "{kind:?} left something behind: {names:?}");
        for name in names.iter().filter(|n| n.starts_with("packs/")) {
            let digest =
                data_encoding::HEXLOWER.encode(&<sha2::Sha256 as sha2::Digest>::digest(fs::read(server.data().join(name)).unwrap()));
            assert!(name.ends_with(&digest), "{name}");
        }
    }
    no_secrets(&keepd);
}

/// The secret is in no log, no reply and no argument of the daemon or its children.
fn no_secrets(keepd: &Keepd) {
    for text in
        [keepd.log(), keepd.ok(&["destination", "list", "--json"]), keepd.ok(&["status", "--json"]), keepd.ok(&["run", "list", "--json"])]
    {
        assert!(!text.contains(SECRET));
    }
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).into_owned();
        assert!(!command.contains(SECRET) || command.contains("rclone"), "{command}");
    }
}

#[test]
fn s3_does_everything() {
    every_command(Kind::S3);
}

#[test]
fn s3_with_conditions_does_everything() {
    every_command(Kind::Moto);
}

#[test]
fn webdav_does_everything() {
    every_command(Kind::Webdav);
}

#[test]
fn ftp_does_everything() {
    every_command(Kind::Ftp);
}

#[test]
fn sftp_does_everything() {
    every_command(Kind::Sftp);
}

/// Kills the server while the command runs, starts it again, and wants the command to succeed.
fn survives(keepd: &Keepd, server: &mut Server, arguments: &[&str]) {
    let before = keepd.json(&["destination", "list"])[0]["traffic"].clone();
    let moved = |keepd: &Keepd| {
        let now = keepd.json(&["destination", "list"])[0]["traffic"].clone();
        ["sent", "received"].iter().map(|k| now[k].as_u64().unwrap() - before[k].as_u64().unwrap()).sum::<u64>()
    };
    let child = keepd.ctl_command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // In the middle: some of its bytes went, and not all of them.
    wait_for("it goes on", keepd, || moved(keepd) > 600_000);
    server.kill();
    std::thread::sleep(Duration::from_millis(1500));
    server.start();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{:?} {arguments:?}: {}\n{}", server.kind, text(&out), keepd.log());
}

fn survives_everything(kind: Kind) {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::started(kind, dir.path());
    let slow = "bandwidth = \"1500KiB/s\"\nprune_grace = \"0s\"\ntimeout = \"5s\"";
    let keepd = started(&server, 4 << 20, slow);
    survives(&keepd, &mut server, &["backup", "shop"]);
    let to = keepd.path("out");
    survives(&keepd, &mut server, &["restore", "latest", "--to", to.to_str().unwrap()]);
    assert_same(&keepd.path("files"), &to.join("files"));
    survives(&keepd, &mut server, &["check", "there", "--read-data"]);
    // A prune that has to rewrite: most of a pack is needed by nothing.
    fs::remove_file(keepd.path("files/big")).unwrap();
    fs::write(keepd.path("files/other"), noise(2 << 20, 77)).unwrap();
    keepd.ok(&["backup", "shop"]);
    let oldest = keepd.backups().pop().unwrap();
    keepd.ok(&["delete", &oldest, "--yes"]);
    let pruning = keepd.ctl_command(&["prune", "there"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    server.kill();
    std::thread::sleep(Duration::from_millis(800));
    server.start();
    let out = pruning.wait_with_output().unwrap();
    assert!(out.status.success(), "{kind:?}: {}", text(&out));
    keepd.ok(&["check", "there", "--read-data"]);
    assert_restores(&keepd);
    // A copy to it.
    configure(&keepd, &[local(&keepd, "near", ""), server.destination("there", slow)], "");
    keepd.ok(&["reload"]);
    fs::write(keepd.path("files/third"), noise(3 << 20, 99)).unwrap();
    let backup = keepd.ctl_command(&["backup", "shop"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for("it copies", &keepd, || {
        keepd.json(&["status"])["running"].as_array().unwrap().iter().any(|r| r["kind"] == "copy" && r["destination"] == "there")
    });
    std::thread::sleep(Duration::from_millis(900));
    server.kill();
    std::thread::sleep(Duration::from_millis(1500));
    server.start();
    let out = backup.wait_with_output().unwrap();
    assert!(out.status.success(), "{kind:?}: {}\n{}", text(&out), keepd.log());
    assert_eq!(places(&keepd), ["near", "there"]);
    keepd.ok(&["check", "there", "--read-data"]);
}

#[test]
fn s3_may_be_killed_in_the_middle_of_everything() {
    survives_everything(Kind::S3);
}

#[test]
fn webdav_may_be_killed_in_the_middle_of_everything() {
    survives_everything(Kind::Webdav);
}

#[test]
fn sftp_may_be_killed_in_the_middle_of_everything() {
    survives_everything(Kind::Sftp);
}

#[test]
fn ftp_may_be_killed_in_the_middle_of_everything() {
    survives_everything(Kind::Ftp);
}

#[test]
fn a_stalled_connection_ends_and_says_so() {
    for kind in [Kind::S3, Kind::Webdav, Kind::Ftp, Kind::Sftp] {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::started(kind, dir.path());
        // FTP tells the port of its data connection itself, so only the way of its commands can be tapped.
        let tap = Tap::before(server.port);
        let mut keepd = prepared(4 << 20);
        keepd.environment = server.environment();
        if kind == Kind::Sftp {
            // The host is known by its port.
            let known = files_below(dir.path()).into_iter().find(|p| p.ends_with("known_hosts")).unwrap();
            let text = fs::read_to_string(&known).unwrap();
            fs::write(&known, text.replace(&server.port.to_string(), &tap.port.to_string())).unwrap();
        }
        let impatient = "timeout = \"2s\"\nretry = { attempts = 2, backoff = \"1s\" }\nbandwidth = \"2MiB/s\"";
        configure(&keepd, &[server.destination_at("there", tap.port, SECRET, impatient)], "");
        keepd.start();
        keepd.ok(&["destination", "test", "there"]);
        let backup = keepd.ctl_command(&["backup", "shop"]).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(1000));
        tap.stalled.store(true, Ordering::Relaxed);
        let out = backup.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(1), "{kind:?}: {}", text(&out));
        assert!(text(&out).contains("destination there") || text(&out).contains("127.0.0.1"), "{kind:?}: {}", text(&out));
        tap.stalled.store(false, Ordering::Relaxed);
        keepd.ok(&["backup", "shop"]);
        assert_restores(&keepd);
    }
}

#[test]
fn wrong_credentials_are_told_at_once_and_lose_nothing() {
    for kind in [Kind::S3, Kind::Webdav, Kind::Ftp, Kind::Sftp] {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::started(kind, dir.path());
        let keepd = started(&server, 100_000, "");
        keepd.ok(&["backup", "shop"]);
        configure(&keepd, &[server.destination_at("there", server.port, "wrong-canary-9d", "")], "");
        keepd.ok(&["reload"]);
        let said = keepd.fails(1, &["backup", "shop"]);
        assert!(said.contains("destination there"), "{kind:?}: {said}");
        let words = [
            "credentials",
            "Permission denied",
            "denied",
            "password",
            "Password",
            "Forbidden",
            "authentication",
            "NotLoggedIn",
            "not logged in",
        ];
        assert!(words.iter().any(|w| said.contains(w)), "{kind:?}: {said}");
        assert!(!said.contains("wrong-canary-9d") && !keepd.log().contains("wrong-canary-9d"));
        let tested = keepd.ctl(&["destination", "test", "there"]);
        assert_eq!(tested.status.code(), Some(1), "{}", text(&tested));
        assert_eq!(keepd.backups().len(), 1, "{kind:?}: a list that cannot be read is not an empty one");
        configure(&keepd, &[server.destination("there", "")], "");
        keepd.ok(&["reload"]);
        assert_restores(&keepd);
    }
}

/// A file system of its own, small. Needs root, as the tests of the service do.
struct Small(std::path::PathBuf);

impl Small {
    fn mounted(at: &Path) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "none"]).arg(at).status().ok()?;
        mounted.success().then(|| Self(at.to_owned()))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_storage_is_told_and_what_is_there_stays_good() {
    for kind in [Kind::S3, Kind::Sftp] {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::started(kind, dir.path());
        let parent = server.data().parent().unwrap().to_owned();
        let Some(_small) = Small::mounted(&parent) else {
            eprintln!("not tested: nothing can be mounted here");
            return;
        };
        let keepd = started(&server, 1 << 20, "retry = { attempts = 2, backoff = \"1s\" }");
        keepd.ok(&["backup", "shop"]);
        fs::write(keepd.path("files/huge"), noise(6 << 20, 3)).unwrap();
        let said = keepd.fails(1, &["backup", "shop"]);
        assert!(said.contains("destination there") || said.contains("no space") || said.contains("write"), "{kind:?}: {said}");
        assert_eq!(keepd.backups().len(), 1);
        keepd.ok(&["check", "there", "--read-data"]);
        fs::remove_file(keepd.path("files/huge")).unwrap();
        assert_restores(&keepd);
    }
}

#[test]
fn a_backup_is_captured_once_and_copied_whatever_the_others_do() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::started(Kind::S3, dir.path());
    let mut keepd = prepared(2 << 20);
    let offsite = server.destination("offsite", "compression = \"gzip\"").replace("encryption = \"main\"", "encryption = \"other\"");
    configure(&keepd, &[local(&keepd, "near", ""), offsite.clone()], "");
    keepd.start();
    let said = keepd.ok(&["backup", "shop"]);
    assert!(said.contains("copied to offsite"), "{said}");
    assert_eq!(places(&keepd), ["near", "offsite"]);
    let first = keepd.backups().remove(0);
    // A dead destination spoils nothing.
    server.kill();
    fs::write(keepd.path("files/second"), noise(50_000, 8)).unwrap();
    let impatient = offsite.replace("compression", "retry = { attempts = 1 }\ncompression");
    configure(&keepd, &[local(&keepd, "near", ""), impatient.clone()], "");
    keepd.ok(&["reload"]);
    let said = keepd.fails(3, &["backup", "shop"]);
    assert!(said.contains("not copied to offsite yet"), "{said}");
    assert_eq!(places(&keepd), ["near"]);
    let waiting = keepd.json(&["destination", "list"]);
    assert_eq!(waiting[1]["missing"]["shop"], 1, "{waiting}");
    let captures = || keepd.json(&["run", "list"]).as_array().unwrap().iter().filter(|r| r["kind"] == "backup").count();
    assert_eq!(captures(), 2);
    server.start();
    wait_for("the copy is made later", &keepd, || places(&keepd) == ["near", "offsite"]);
    assert_eq!(captures(), 2, "and nothing was captured for it");
    // One that was removed there on purpose does not come back.
    keepd.ok(&["delete", &first, "--destination", "offsite", "--yes"]);
    // Each restores without the other, the copy with its own key; nothing but what changed was sent for the second.
    keepd.ok(&["check", "offsite", "--read-data"]);
    let second = &keepd.json(&["list"])[0];
    assert!(second["added_bytes"].as_u64().unwrap() < 200_000, "{second}");
    fs::rename(keepd.path("near"), keepd.path("near-away")).unwrap();
    assert_restores(&keepd);
    // The first in the list is gone: the other one takes the backup.
    fs::write(keepd.path("near"), "no directory").unwrap();
    fs::write(keepd.path("files/third"), noise(50_000, 9)).unwrap();
    let out = keepd.ctl(&["backup", "shop"]);
    assert_eq!(out.status.code(), Some(3), "{}", text(&out));
    assert_eq!(places(&keepd), ["offsite"], "{}", text(&out));
    fs::remove_file(keepd.path("near")).unwrap();
    fs::rename(keepd.path("near-away"), keepd.path("near")).unwrap();
    wait_for("it comes back to the first", &keepd, || places(&keepd) == ["near", "offsite"]);
    assert_eq!(captures(), 3);
    // A destination that is added later is filled.
    configure(&keepd, &[local(&keepd, "near", ""), offsite, local(&keepd, "third", "")], "");
    keepd.ok(&["reload"]);
    keepd.ok(&["backup", "shop"]);
    wait_for("the new one is filled", &keepd, || {
        let list = keepd.json(&["list"]);
        list.as_array().unwrap().iter().all(|b| b["destinations"].as_array().unwrap().iter().any(|d| d["name"] == "third"))
    });
    let list = keepd.json(&["list"]);
    let first_now = list.as_array().unwrap().iter().find(|b| b["id"] == first.as_str()).unwrap();
    let at: Vec<_> = first_now["destinations"].as_array().unwrap().iter().map(|d| d["name"].clone()).collect();
    assert_eq!(at, ["near", "third"]);
    for destination in ["near", "offsite", "third"] {
        keepd.ok(&["check", destination, "--read-data"]);
    }
    // A lost state is read back from the repositories, copies included.
    let before = keepd.json(&["list"]);
    keepd.stop();
    fs::remove_dir_all(keepd.path("state")).unwrap();
    keepd.start();
    let known = |list: &serde_json::Value| -> Vec<(String, usize)> {
        list.as_array()
            .unwrap()
            .iter()
            .map(|b| (b["id"].as_str().unwrap().to_owned(), b["destinations"].as_array().unwrap().len()))
            .collect()
    };
    // Only that one was removed somewhere on purpose is forgotten with the state: it is copied there again.
    let (mut back, expected) = (Vec::new(), known(&before));
    wait_for("the catalogue is back", &keepd, || {
        back = known(&keepd.json(&["list"]));
        back.len() == expected.len() && back.iter().zip(&expected).all(|(now, then)| now.0 == then.0 && now.1 >= then.1)
    });
    wait_for("nothing runs", &keepd, || keepd.json(&["status"])["running"].as_array().unwrap().is_empty());
    // With it what chunks are called where is lost: it is read off what both have, and the next copy is as small as ever.
    fs::write(keepd.path("files/fourth"), noise(50_000, 10)).unwrap();
    keepd.ok(&["backup", "shop"]);
    let sent: Vec<u64> = keepd
        .json(&["run", "list"])
        .as_array()
        .unwrap()
        .iter()
        .filter(|r| r["kind"] == "copy")
        .take(2)
        .map(|r| r["progress"]["added_bytes"].as_u64().unwrap())
        .collect();
    assert_eq!(sent.len(), 2);
    assert!(sent.iter().all(|n| *n < 200_000), "{sent:?}");
}

#[test]
fn copy_brings_one_backup_where_it_is_told() {
    let mut keepd = prepared(100_000);
    let aside = local(&keepd, "aside", "");
    configure(&keepd, &[local(&keepd, "near", "")], "");
    let text_before = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), format!("{aside}{text_before}")).unwrap();
    keepd.start();
    keepd.ok(&["backup", "shop", "--name", "before the move", "--label", "a=b"]);
    keepd.ok(&["pin", "latest"]);
    keepd.ok(&["copy", "latest", "--to", "aside"]);
    assert_eq!(places(&keepd), ["aside", "near"]);
    let backup = &keepd.json(&["list"])[0];
    assert_eq!(
        (backup["pinned"].as_bool(), backup["name"].as_str(), backup["labels"]["a"].as_str()),
        (Some(true), Some("before the move"), Some("b"))
    );
    assert!(keepd.fails(1, &["copy", "latest", "--to", "aside"]).contains("already"));
    assert!(keepd.fails(1, &["copy", "latest", "--to", "nowhere"]).contains("configured are"));
    keepd.ok(&["unpin", "latest"]);
    fs::remove_dir_all(keepd.path("near")).unwrap();
    assert_restores(&keepd);
    keepd.ok(&["check", "aside", "--read-data"]);
}

#[test]
fn a_restore_goes_on_with_another_copy_when_one_dies() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = Server::started(Kind::S3, dir.path());
    let second = Server::started(Kind::Webdav, dir.path());
    let mut keepd = prepared(30 << 20);
    for n in 0..300 {
        fs::write(keepd.path(&format!("files/deep/{n}")), noise(3000, n + 1)).unwrap();
    }
    fs::write(keepd.path("files/deep/zero"), vec![0; 1 << 20]).unwrap();
    let slow = "bandwidth = { down = \"6MiB/s\" }\nretry = { attempts = 2, backoff = \"1s\" }";
    configure(&keepd, &[first.destination("first", slow), second.destination("second", "")], "");
    // Less is read ahead, so that it is not all on its way when the server dies.
    let text_before = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), text_before.replace("[daemon]", "[daemon]\nmemory = \"64MiB\"")).unwrap();
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    assert_eq!(places(&keepd), ["first", "second"]);
    let to = keepd.path("out");
    let restore = keepd.ctl_command(&["restore", "latest", "--to", to.to_str().unwrap()]).stderr(Stdio::piped()).spawn().unwrap();
    wait_for("it has begun", &keepd, || keepd.json(&["status"])["running"][0]["progress"]["bytes"].as_u64().is_some_and(|n| n > 1 << 20));
    first.kill();
    let out = restore.wait_with_output().unwrap();
    assert!(out.status.success(), "{}\n{}", text(&out), keepd.log());
    assert!(text(&out).contains("going on with the copy at second"), "{}{}", text(&out), keepd.log());
    assert_same(&keepd.path("files"), &to.join("files"));
    assert_eq!(proven_sum(&to.join("db/shop.db")), 20_000);
    // One file, too.
    let cat = keepd.ctl(&["cat", "latest", "files/big"]);
    assert!(cat.status.success(), "{}", String::from_utf8_lossy(&cat.stderr));
    assert!(cat.stdout == fs::read(keepd.path("files/big")).unwrap());
}

#[test]
fn a_check_repairs_from_another_destination() {
    let mut keepd = prepared(3 << 20);
    for n in 0..50 {
        fs::write(keepd.path(&format!("files/deep/{n}")), noise(3000, n + 1)).unwrap();
    }
    configure(&keepd, &[local(&keepd, "near", "prune_grace = \"0s\""), local(&keepd, "far", "")], "");
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let packs = files_below(&keepd.path("near/packs"));
    assert!(packs.len() >= 2, "data and metadata");
    let manifest = files_below(&keepd.path("near/backups")).remove(0);
    for victim in packs.iter().chain([&manifest]) {
        let mut bytes = fs::read(victim).unwrap();
        let middle = bytes.len() / 3;
        bytes[middle] ^= 1;
        fs::write(victim, &bytes).unwrap();
        let said = keepd.fails(3, &["check", "near", "--read-data"]);
        assert!(said.contains("from the copy at far") && said.contains("verified"), "{said}");
        // Nothing of the other one is needed now.
        fs::rename(keepd.path("far"), keepd.path("far-away")).unwrap();
        let to = keepd.restored("latest");
        assert_same(&keepd.path("files"), &to.join("files"));
        fs::rename(keepd.path("far-away"), keepd.path("far")).unwrap();
        keepd.ok(&["prune", "near"]);
        keepd.ok(&["check", "near", "--read-data"]);
    }
    // What no copy has is named and nothing is claimed.
    for place in ["near", "far"] {
        for pack in files_below(&keepd.path(place).join("packs")) {
            fs::write(&pack, "nothing").unwrap();
        }
    }
    let said = keepd.fails(1, &["check", "near", "--read-data"]);
    assert!(said.contains("hurt") && !said.contains("whole again"), "{said}");
}

#[test]
fn append_only_deletes_nothing() {
    let mut keepd = prepared(100_000);
    configure(&keepd, &[local(&keepd, "near", "append_only = true\nprune_grace = \"0s\"")], "retention = { keep_last = 1 }");
    keepd.start();
    for n in 0..3 {
        fs::write(keepd.path("files/deep/note.txt"), format!("note {n}")).unwrap();
        keepd.ok(&["backup", "shop"]);
    }
    assert_eq!(keepd.backups().len(), 3, "retention removes nothing here");
    for command in [&["prune", "near"][..], &["delete", "latest", "--yes"], &["retention", "shop", "--apply", "--yes"]] {
        let out = keepd.ctl(command);
        assert!(command[0] == "retention" || text(&out).contains("append_only"), "{command:?}: {}", text(&out));
    }
    assert_eq!(keepd.backups().len(), 3);
    let said = keepd.ok(&["destination", "test", "near"]);
    assert!(said.contains("append_only"), "{said}");
    assert!(files_below(&keepd.path("near/tmp")).is_empty());
    keepd.ok(&["check", "near", "--read-data"]);
}

#[test]
fn object_lock_is_set_renewed_and_respected() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::started(Kind::Moto, dir.path());
    let stored = "server_side_encryption = \"AES256\"\ndefault_storage_class = \"STANDARD_IA\"";
    let keepd = started(&server, 1 << 20, &format!("object_lock = \"30d\"\nprune_grace = \"0s\"\n{stored}"));
    keepd.ok(&["backup", "shop"]);
    let head = "
for o in client.list_objects_v2(Bucket='bucket')['Contents']:
    head = client.head_object(Bucket='bucket', Key=o['Key'])
    print(head.get('ServerSideEncryption'), head.get('StorageClass'))";
    assert!(server.python(head).lines().all(|line| line == "AES256 STANDARD_IA"), "{}", server.python(head));
    let locks = || -> serde_json::Value {
        let program = "
import json
found = {}
for o in client.list_objects_v2(Bucket='bucket').get('Contents', []):
    head = client.head_object(Bucket='bucket', Key=o['Key'])
    until = head.get('ObjectLockRetainUntilDate')
    found[o['Key']] = [head.get('ObjectLockMode'), until and until.timestamp()]
print(json.dumps(found))";
        serde_json::from_str(&server.python(program)).unwrap()
    };
    let now = jiff::Timestamp::now().as_second() as f64;
    let days = |lock: &serde_json::Value| (lock[1].as_f64().unwrap() - now) / 86_400.0;
    let first = locks();
    for (name, lock) in first.as_object().unwrap() {
        match name.as_str() {
            "pre/writer.json" => assert!(lock[0].is_null(), "the lease is replaced all the time"),
            _ => assert!(lock[0] == "GOVERNANCE" && (29.9..30.1).contains(&days(lock)), "{name}: {lock}"),
        }
    }
    assert!(first.as_object().unwrap().keys().any(|k| k.starts_with("pre/packs/")));
    // A longer period is in force with the next backup, for what is there already too.
    configure(&keepd, &[server.destination("there", "object_lock = \"60d\"\nobject_lock_mode = \"compliance\"\nprune_grace = \"0s\"")], "");
    keepd.ok(&["reload"]);
    keepd.ok(&["backup", "shop"]);
    for (name, lock) in locks().as_object().unwrap().iter().filter(|(name, _)| *name != "pre/writer.json") {
        // A head of the audit log that was published before keeps the lock that it got.
        let is_old = name.starts_with("pre/audit/") && first.get(name).is_some();
        assert!(is_old || lock[0] == "COMPLIANCE" && (59.9..60.1).contains(&days(lock)), "{name}: {lock}");
    }
    // What nothing needs any more is condemned, and stays until its lock has ended.
    fs::write(keepd.path("files/big"), noise(1 << 20, 6)).unwrap();
    let made = keepd.ctl(&["backup", "shop"]);
    assert!(matches!(made.status.code(), Some(0 | 3)), "all its contents are new: {}", text(&made));
    for old in keepd.backups().split_off(1) {
        keepd.ok(&["delete", &old, "--yes"]);
    }
    let packs = |all: &serde_json::Value| all.as_object().unwrap().keys().filter(|k| k.starts_with("pre/packs/")).count();
    let before = packs(&locks());
    keepd.ok(&["prune", "there"]);
    let said = keepd.ok(&["prune", "there"]);
    assert!(said.contains("wait until") && packs(&locks()) >= before, "{said}");
    keepd.ok(&["check", "there", "--read-data"]);
    // Where the bucket knows no locks that is told, and the backup does not count.
    server.python("client.create_bucket(Bucket='plain')");
    let plain = server.destination("there", "object_lock = \"30d\"").replace("\"bucket\"", "\"plain\"");
    configure(&keepd, &[plain.replace("there", "plain")], "");
    keepd.ok(&["reload"]);
    assert!(keepd.fails(1, &["backup", "shop"]).contains("lock"));
}

fn plugin(keepd: &Keepd, name: &str, program: &str, options: &str) -> String {
    format!(
        "[destination.{name}]\nservice = \"exec\"\ncommand = [\"{}\", \"{program}\"]\noptions = {{ {options} }}\nencryption = \"main\"\ntimeout = \"3s\"\nretry = {{ attempts = 2, backoff = \"1s\" }}\n",
        python().display()
    ) + &format!("# {}\n", keepd.dir.path().display())
}

#[test]
fn a_plugin_is_a_destination_like_any_other() {
    let mut keepd = prepared(2 << 20);
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/plugins/directory.py");
    let directory = format!("directory = \"{}\"", keepd.path("objects").display());
    configure(&keepd, &[plugin(&keepd, "vault", program.to_str().unwrap(), &directory), local(&keepd, "near", "")], "");
    keepd.start();
    let tested = keepd.json(&["destination", "test", "vault"]);
    assert!(tested.as_array().unwrap().iter().all(|f| f["verdict"] == "ok" || f["step"] == "clock"), "{tested}");
    assert!(files_below(&keepd.path("objects")).is_empty(), "nothing is left behind");
    keepd.ok(&["backup", "shop"]);
    assert_restores(&keepd);
    keepd.ok(&["check", "vault", "--read-data"]);
    let oldest = keepd.backups().remove(0);
    keepd.ok(&["delete", &oldest, "--yes"]);
    keepd.ok(&["prune", "vault"]);
    // Its own word on its options reaches the user.
    configure(&keepd, &[plugin(&keepd, "vault", program.to_str().unwrap(), "directry = \"/x\"")], "");
    keepd.ok(&["reload"]);
    assert!(keepd.fails(1, &["backup", "shop"]).contains("unknown options: directry"));
}

/// A plugin like the one that is shipped; it stores no manifest while the file `hold` is there, and then makes `held`, and none that `full` stands beside.
fn held_plugin(keepd: &Keepd, name: &str) -> String {
    let d = keepd.dir.path().display();
    let program = format!(
        "import errno, os, sys, time\nsys.dont_write_bytecode = True\nsys.path.insert(0, '{}')\nimport directory\n\
         class Held(directory.Store):\n    def put(self, name, data, if_absent):\n        while name.startswith('backups/') and os.path.exists('{d}/hold'):\n            open('{d}/held', 'w').close()\n            time.sleep(0.02)\n\
         \x20       if name.startswith('backups/') and os.path.exists('{d}/full'):\n            raise OSError(errno.ENOSPC, 'full')\n        super().put(name, data, if_absent)\n\
         directory.Store = Held\ndirectory.main()\n",
        Path::new(env!("CARGO_MANIFEST_DIR")).join("config/plugins").display()
    );
    fs::write(keepd.path("held.py"), program).unwrap();
    let directory = format!("directory = \"{d}/{name}\"");
    plugin(keepd, name, &format!("{d}/held.py"), &directory).replace("timeout = \"3s\"", "timeout = \"60s\"")
}

/// Near on this machine, far at a plugin that can be held; one backup is at both.
fn with_a_far_one(job: &str) -> Keepd {
    let mut keepd = prepared(100_000);
    configure(&keepd, &[local(&keepd, "near", ""), held_plugin(&keepd, "far")], job);
    keepd.start();
    wait_for("what follows a start is over", &keepd, || keepd.log().contains("the catalogues of the destinations were read"));
    keepd.ok(&["backup", "shop"]);
    assert_eq!(places(&keepd), ["far", "near"]);
    keepd
}

/// Changes something and begins a backup.
fn begin_backup(keepd: &Keepd, n: u64) -> std::process::Child {
    fs::write(keepd.path(&format!("files/new-{n}")), noise(50_000, n)).unwrap();
    keepd.ctl_command(&["backup", "shop"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn copies(keepd: &Keepd) -> Vec<serde_json::Value> {
    keepd.json(&["run", "list"]).as_array().unwrap().iter().filter(|r| r["kind"] == "copy").cloned().collect()
}

/// Waits until so many backups are made, and the next one can begin.
fn made(keepd: &Keepd, count: usize) {
    wait_for("the backup is made", keepd, || {
        let status = keepd.json(&["status"]);
        keepd.backups().len() == count && status["running"].as_array().unwrap().iter().all(|r| r["kind"] != "backup")
    });
}

/// Has the copy of the next backup stand in the middle; its list is made.
fn begin_a_held_backup(keepd: &Keepd, n: u64) -> std::process::Child {
    let _ = fs::remove_file(keepd.path("held"));
    fs::write(keepd.path("hold"), "").unwrap();
    let backup = begin_backup(keepd, n);
    wait_for("the copy is held", keepd, || keepd.path("held").exists());
    backup
}

#[test]
fn a_backup_waits_for_its_own_copy_and_not_only_for_one_that_began_before_it() {
    let keepd = with_a_far_one("");
    let first = begin_a_held_backup(&keepd, 1);
    // What comes now is copied by one more run, together.
    let mut second = begin_backup(&keepd, 2);
    made(&keepd, 3);
    let third = begin_backup(&keepd, 3);
    made(&keepd, 4);
    std::thread::sleep(Duration::from_millis(500));
    assert!(second.try_wait().unwrap().is_none(), "it ended before its copy");
    assert_eq!(places(&keepd), ["near"]);
    fs::remove_file(keepd.path("hold")).unwrap();
    for child in [second, third, first] {
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success() && text(&out).contains("copied to far"), "{}\n{}", text(&out), keepd.log());
        assert_eq!(places(&keepd), ["far", "near"], "it said so before it was there");
    }
    assert_eq!(copies(&keepd).len(), 3, "{:#?}", copies(&keepd));
    // Who waits for the next one is told when that fails.
    let fourth = begin_a_held_backup(&keepd, 4);
    let fifth = begin_backup(&keepd, 5);
    made(&keepd, 6);
    fs::write(keepd.path("full"), "").unwrap();
    fs::remove_file(keepd.path("hold")).unwrap();
    for child in [fourth, fifth] {
        let out = child.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(3), "{}", text(&out));
        assert!(text(&out).contains("not copied to far yet"), "{}", text(&out));
    }
    fs::remove_file(keepd.path("full")).unwrap();
    wait_for("they are copied later", &keepd, || {
        keepd.json(&["list"]).as_array().unwrap().iter().all(|b| b["destinations"].as_array().unwrap().len() == 2)
    });
    keepd.ok(&["check", "far", "--read-data"]);
}

#[test]
fn a_copy_that_was_called_off_while_it_waited_is_not_taken_for_the_next_backups() {
    let keepd = with_a_far_one("");
    let first = begin_a_held_backup(&keepd, 1);
    let second = begin_backup(&keepd, 2);
    made(&keepd, 3);
    let queued = copies(&keepd).into_iter().find(|r| r["state"] == "queued").unwrap();
    keepd.ok(&["run", "cancel", queued["id"].as_str().unwrap()]);
    let out = second.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(3), "{}", text(&out));
    let third = begin_backup(&keepd, 3);
    made(&keepd, 4);
    fs::remove_file(keepd.path("hold")).unwrap();
    for child in [first, third] {
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success(), "{}\n{}", text(&out), keepd.log());
    }
    assert_eq!(places(&keepd), ["far", "near"]);
}

#[test]
fn a_copy_that_cannot_even_be_started_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("mark");
    let after = format!("hooks = {{ after = [\"sh\", \"-c\", \"if [ -e {0} ]; then touch {0}.here; sleep 30; fi\"] }}", mark.display());
    let mut keepd = with_a_far_one(&after);
    fs::write(&mark, "").unwrap();
    let backup = begin_backup(&keepd, 1);
    wait_for("its backup is made", &keepd, || dir.path().join("mark.here").exists());
    // From now on keepd starts nothing.
    keepd.stop();
    let out = backup.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(3), "{}", text(&out));
    assert!(text(&out).contains("what far lacks could not be copied there now"), "{}", text(&out));
    fs::remove_file(&mark).unwrap();
    keepd.start();
    wait_for("the copy follows", &keepd, || places(&keepd) == ["far", "near"]);
}

#[test]
fn a_plugin_that_keeps_to_nothing_is_named() {
    let mut keepd = prepared(1000);
    let hello = "import sys, json, time\nsys.stdin.readline()\nprint(json.dumps({'ok': True, 'version': 1}), flush=True)\n";
    let programs = [
        ("dies", "import sys\nsys.exit(3)".to_owned(), "ended before it answered"),
        ("old", "print('{\"ok\": true, \"version\": 0}', flush=True)\nimport time; time.sleep(9)".to_owned(), "version 1"),
        ("babbles", "print('hello there', flush=True)\nimport time; time.sleep(9)".to_owned(), "not of the interface"),
        ("hangs", format!("{hello}time.sleep(60)"), "did nothing for 3 s"),
        ("floods", "import sys\nwhile True: sys.stdout.write('x' * 100000)".to_owned(), "no line"),
        (
            "lies",
            format!(
                "{hello}for l in sys.stdin:\n    known = '\"list\"' in l\n    lines = [{{'ok': True}}, {{'end': True, 'count': 5}}] if known else [{{'error': 'not_found'}}]\n    for line in lines: print(json.dumps(line), flush=True)\n"
            ),
            "counts Some(5)",
        ),
        (
            "refuses",
            format!(
                "{hello}\nfor l in sys.stdin: print(json.dumps({{'error': 'denied', 'message': 'the key is out of date'}}), flush=True)"
            ),
            "the key is out of date",
        ),
    ];
    let mut destinations = vec![local(&keepd, "near", "")];
    for (name, program, _) in &programs {
        let path = keepd.path(&format!("{name}.py"));
        fs::write(&path, program).unwrap();
        destinations.push(plugin(&keepd, name, path.to_str().unwrap(), ""));
    }
    configure(&keepd, &destinations, "");
    keepd.start();
    for (name, _, word) in &programs {
        let out = keepd.ctl(&["destination", "test", name]);
        assert_eq!(out.status.code(), Some(1), "{name}: {}", text(&out));
        assert!(
            text(&out).replace('\n', " ").contains(word) || text(&keepd.ctl(&["destination", "test", name, "--json"])).contains(word),
            "{name}: {}",
            text(&out)
        );
    }
}

#[test]
fn two_daemons_on_a_service_without_conditions_are_kept_apart() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::started(Kind::S3, dir.path());
    let one = started(&server, 100_000, "");
    let two = {
        let mut keepd = prepared(100_000);
        fs::copy(one.path("main.key"), keepd.path("main.key")).unwrap();
        configure(&keepd, &[server.destination("there", "")], "");
        // Another machine, as far as keepd can tell: its identity is the machine's, so here a lease of one is made up.
        keepd.start();
        keepd
    };
    one.ok(&["backup", "shop"]);
    let held = server.python("print(client.get_object(Bucket='bucket', Key='pre/writer.json')['Body'].read().decode())");
    let mut other: serde_json::Value = serde_json::from_str(&held).unwrap();
    other["instance"] = "elsewhere".into();
    other["machine"] = "another".into();
    other["host"] = "the-other-host".into();
    server.python(&format!("client.put_object(Bucket='bucket', Key='pre/writer.json', Body='''{other}''')"));
    let said = two.fails(1, &["backup", "shop"]);
    assert!(said.contains("the-other-host") && said.contains("take-over"), "{said}");
    two.ok(&["destination", "take-over", "there"]);
    two.ok(&["backup", "shop"]);
    assert_restores(&two);
}

#[test]
fn bandwidth_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::started(Kind::Webdav, dir.path());
    let mut keepd = prepared(3 << 20);
    configure(&keepd, &[server.destination("there", "bandwidth = { up = \"1MiB/s\" }")], "");
    keepd.start();
    let since = Instant::now();
    keepd.ok(&["backup", "shop"]);
    assert!(since.elapsed() > Duration::from_millis(2700), "3 MiB at 1 MiB/s came in {:?}", since.elapsed());
    configure(
        &keepd,
        &[server.destination("there", "bandwidth = { down = \"1MiB/s\" }"), local(&keepd, "near", "bandwidth = \"1MiB/s\"")],
        "",
    );
    keepd.ok(&["reload"]);
    let since = Instant::now();
    keepd.ok(&["check", "there", "--read-data"]);
    assert!(since.elapsed() > Duration::from_millis(2700), "{:?}", since.elapsed());
}

#[test]
fn a_check_has_what_no_copy_has_read_from_its_source_again() {
    let mut keepd = prepared(3 << 20);
    configure(&keepd, &[local(&keepd, "near", "")], "");
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let largest = files_below(&keepd.path("near/packs")).into_iter().max_by_key(|p| fs::metadata(p).unwrap().len()).unwrap();
    let mut bytes = fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&largest, &bytes).unwrap();
    let first = keepd.backups().remove(0);
    let said = keepd.fails(1, &["check", "near", "--read-data", "--repair"]);
    assert!(said.contains("hurt"), "{said}");
    let runs =
        || keepd.json(&["run", "list"]).as_array().unwrap().iter().map(|r| (r["kind"].clone(), r["state"].clone())).collect::<Vec<_>>();
    wait_for("backup and check follow by themselves", &keepd, || {
        let runs = runs();
        runs.len() == 4 && runs[0] == ("check".into(), "good".into()) && runs[1].0 == "backup"
    });
    // The older backup is whole again, too.
    let to = keepd.restored(&first);
    assert_same(&keepd.path("files"), &to.join("files"));
}

#[test]
fn two_that_begin_at_once_make_one_repository_and_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::started(Kind::S3, dir.path());
    let both: Vec<Keepd> = (0..2).map(|_| started(&server, 200_000, "")).collect();
    fs::copy(both[0].path("main.key"), both[1].path("main.key")).unwrap();
    for round in 0..4 {
        for keepd in &both {
            configure(keepd, &[server.destination("there", "").replace("\"pre\"", &format!("\"pre{round}\""))], "");
            keepd.ok(&["reload"]);
        }
        let running: Vec<_> = both
            .iter()
            .map(|keepd| keepd.ctl_command(&["backup", "shop", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
            .collect();
        let outs: Vec<_> = running.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
        let mut made = Vec::new();
        for out in &outs {
            let run: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
            match run["backup"].as_str() {
                Some(id) if out.status.success() => made.push(id.to_owned()),
                _ => {
                    let told = text(out);
                    let known = ["another keepd", "one writer", "took the repository over", "exists already", "lease", "try again"];
                    assert!(known.iter().any(|words| told.contains(words)), "{told}");
                }
            }
        }
        assert!(!made.is_empty(), "round {round}: neither could: {}\n{}", text(&outs[0]), text(&outs[1]));
        // Whoever was refused can go on at once, and everything that was told to be made is there and whole.
        for keepd in &both {
            let out = keepd.ctl(&["backup", "shop"]);
            assert!(out.status.success(), "round {round}: {}", text(&out));
        }
        both[0].ok(&["backup", "shop"]);
        let listed = both[0].backups();
        assert!(made.iter().all(|id| listed.contains(id)), "round {round}: {made:?} {listed:?}");
        both[0].ok(&["check", "there", "--read-data"]);
        assert_restores(&both[0]);
    }
}
