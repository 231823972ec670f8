//! The main job through the real binaries: capture, lose, give back.

mod common;

use std::fs;
use std::process::Command;
use std::time::Duration;

use common::*;

#[test]
fn a_live_database_and_a_directory_come_back() {
    let keepd = Keepd::started();
    let path = keepd.path("shop.db");
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let db = rusqlite::Connection::open(&path).unwrap();
            db.busy_timeout(Duration::from_secs(20)).unwrap();
            let mut n = 1i64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                n = (n * 48271) % 2147483647;
                let sql = format!("BEGIN IMMEDIATE; UPDATE account SET balance = balance - 1 WHERE id = {}; UPDATE account SET balance = balance + 1 WHERE id = {}; COMMIT", n % 500, (n / 7) % 500);
                db.execute_batch(&sql).unwrap();
            }
        });
        for n in 0..3 {
            fs::write(keepd.path("files/deep/note.txt"), format!("note {n}")).unwrap();
            keepd.ok(&["backup", "shop"]);
            let out = keepd.restored("latest");
            assert_eq!(proven_sum(&out.join("db/shop.db")), 50_000);
            assert_same(&keepd.path("files"), &out.join("files"));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let list = keepd.json(&["list", "--job", "shop"]);
    assert_eq!(list.as_array().unwrap().len(), 3);
    for key in ["id", "job", "time", "type", "outcome", "proven", "pinned", "destinations", "sources", "bytes", "added_bytes", "labels"] {
        assert!(list[0].get(key).is_some(), "list --json has {key}");
    }
    assert_eq!(
        (list[0]["type"].as_str(), list[0]["outcome"].as_str(), list[0]["destinations"][0]["name"].as_str()),
        (Some("manual"), Some("good"), Some("local"))
    );
    assert!(list[0]["time"].as_str() > list[1]["time"].as_str(), "newest first");
    assert!(list[0]["added_bytes"].as_u64() < Some(200_000), "an increment is small");
    assert!(keepd.ok(&["check", "local", "--read-data"]).contains("no damage found: 3 backups"));
}

/// A long file is sent from its start to its end where the chunks of all its generations fit in memory, and in the order of its
/// chunks where they do not; both give the same bytes. The same with holes, and with lengths that are no whole blocks.
#[test]
fn long_files_of_many_generations_come_back_byte_for_byte() {
    let mut keepd = Keepd::prepared();
    let db = make_database(&keepd.path("shop.db"), 10);
    db.execute_batch("PRAGMA wal_autocheckpoint = 0; CREATE TABLE part (id INTEGER PRIMARY KEY, data BLOB); BEGIN").unwrap();
    for id in 0..5000 {
        db.execute("INSERT INTO part VALUES (?1, ?2)", rusqlite::params![id, noise(3900, id as u64 + 1)]).unwrap();
    }
    db.execute_batch("COMMIT; PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    fs::write(keepd.path("files/odd"), noise((9 << 20) + 777, 3)).unwrap();
    fs::write(keepd.path("files/blocks"), noise(8 << 20, 4)).unwrap();
    let sparse = fs::File::create(keepd.path("files/sparse")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &noise(6 << 20, 5), 12_345).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"the end", 40 << 20).unwrap();
    drop(sparse);
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let generations = 12;
    for generation in 0..generations {
        db.execute_batch("BEGIN").unwrap();
        for id in (generation..5000).step_by(generations as usize + 1) {
            db.execute("UPDATE part SET data = ?2 WHERE id = ?1", rusqlite::params![id, noise(3900, (id + 7777) as u64)]).unwrap();
        }
        db.execute_batch("COMMIT; PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
        keepd.ok(&["backup", "shop"]);
    }
    let database = fs::read(keepd.path("shop.db")).unwrap();
    for memory in ["64MiB", "2GiB"] {
        keepd.stop();
        let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
        fs::write(keepd.path("keepd.toml"), text.replacen("[daemon]\n", &format!("[daemon]\nmemory = \"{memory}\"\n"), 1)).unwrap();
        keepd.start();
        fs::write(keepd.path("keepd.toml"), text).unwrap();
        let out = keepd.restored("latest");
        assert!(fs::read(out.join("db/shop.db")).unwrap() == database, "with {memory}");
        assert_same(&keepd.path("files"), &out.join("files"));
        use std::os::unix::fs::MetadataExt;
        assert!(fs::metadata(out.join("files/sparse")).unwrap().blocks() * 512 < 10 << 20, "holes stay holes");
    }
}

#[test]
fn diff_tells_of_each_name_of_a_file_that_changed() {
    let keepd = Keepd::started();
    let (one, two) = (keepd.path("files/a-name"), keepd.path("files/b-name"));
    fs::write(&one, "before").unwrap();
    fs::hard_link(&one, &two).unwrap();
    keepd.ok(&["backup", "shop"]);
    let modified = fs::metadata(&one).unwrap().modified().unwrap();
    fs::write(&one, "after!").unwrap();
    fs::File::options().write(true).open(&one).unwrap().set_modified(modified).unwrap();
    keepd.ok(&["backup", "shop"]);
    let ids = keepd.backups();
    let diff = keepd.ok(&["diff", &ids[1], &ids[0]]);
    assert!(diff.contains("M files/a-name") && diff.contains("M files/b-name"), "{diff}");
}

#[test]
fn every_command_answers() {
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop", "--label", "why=test", "--name", "first", "--type", "pre-update"]);
    fs::write(keepd.path("files/new"), "new").unwrap();
    fs::remove_file(keepd.path("files/link")).unwrap();
    keepd.ok(&["backup", "shop"]);
    let ids = keepd.backups();
    let show = keepd.json(&["show", &ids[1][..10]]);
    assert_eq!(
        (show["name"].as_str(), show["labels"]["why"].as_str(), show["type"].as_str()),
        (Some("first"), Some("test"), Some("pre-update"))
    );
    assert_eq!(show["sources"][0]["facts"]["tables"]["account"].as_u64(), Some(500));
    assert_eq!(keepd.ok(&["cat", "latest", "files/deep/note.txt"]), "a note");
    let listing = keepd.ok(&["ls", "latest", "files"]);
    assert!(listing.contains("files/new") && listing.contains("files/deep") && !listing.contains("note.txt"), "{listing}");
    assert!(keepd.ok(&["ls", "latest", "-R"]).contains("db/shop.db"));
    assert_eq!(keepd.json(&["ls", "latest", "files/deep"]).as_array().unwrap().len(), 1);
    let diff = keepd.ok(&["diff", &ids[1], &ids[0]]);
    assert!(diff.contains("+ files/new") && diff.contains("- files/link") && !diff.contains("note.txt"), "{diff}");
    let part = keepd.path("part");
    keepd.ok(&["restore", "latest", "--to", part.to_str().unwrap(), "files/deep", "db"]);
    assert!(part.join("files/deep/note.txt").exists() && part.join("db/shop.db").exists() && !part.join("files/big").exists());
    assert!(keepd.fails(1, &["restore", "latest", "--to", part.to_str().unwrap()]).contains("already"));
    keepd.ok(&["restore", "latest", "--overwrite", "--to", part.to_str().unwrap()]);
    assert_same(&keepd.path("files"), &part.join("files"));
    assert!(keepd.ok(&["status"]).contains("shop"));
    assert!(keepd.ok(&["job", "list"]).contains("shop"));
    assert!(keepd.ok(&["job", "show", "shop"]).contains("sqlite"));
    let runs = keepd.json(&["run", "list"]);
    let run = runs[0]["id"].as_str().unwrap();
    assert!(keepd.ok(&["run", "show", run]).contains("restor"));
    assert_eq!(keepd.json(&["run", "follow", run])["state"].as_str(), Some("good"));
    assert!(keepd.fails(1, &["run", "cancel", run]).contains("ended already"));
    assert!(keepd.fails(1, &["run", "show", "nothing"]).contains("no run"));
    assert!(keepd.fails(1, &["backup", "shoop"]).contains("configured are: shop"));
    assert!(keepd.fails(1, &["show", "ffffffffffff"]).contains("no backup"));
    assert!(keepd.fails(1, &["check", "nowhere"]).contains("configured are: local"));
    assert!(keepd.fails(1, &["cat", "latest", "files/nope"]).contains("not in the backup"));
    assert!(keepd.fails(1, &["ls", "latest", "nope"]).contains("has db, files"));
    assert!(keepd.fails(2, &["delete", "latest"]).contains("--yes"));
    keepd.fails(2, &["restore", "latest"]);
    keepd.ok(&["delete", &ids[1], "--yes"]);
    assert_eq!(keepd.backups(), [ids[0].clone()]);
    assert!(keepd.ok(&["prune", "local", "--dry-run"]).contains("would be"));
    keepd.ok(&["prune", "local"]);
    keepd.ok(&["check", "local", "--read-data=50"]);
    assert_same(&keepd.path("files"), &keepd.restored("latest").join("files"));
    let out = Command::new(keepctl_binary()).args(["--socket", "/nonexistent/s", "status"]).output().unwrap();
    assert_eq!(out.status.code(), Some(4), "{}", text(&out));
}

#[test]
fn killed_in_the_middle_it_goes_on_and_loses_nothing() {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 500);
    for n in 0..60 {
        fs::write(keepd.path(&format!("files/f{n:02}")), noise(1 << 20, n + 1)).unwrap();
    }
    for round in 0..2 {
        keepd.start();
        keepd.ok(&["backup", "shop", "--detach"]);
        // Killed as soon as something of the first backup is stored, and again a little later.
        while keepd.packs().len() <= round {
            std::thread::sleep(Duration::from_millis(2));
        }
        keepd.kill();
        assert!(files_below(&keepd.path("repository/backups")).is_empty(), "nothing is committed");
    }
    let before = keepd.packs();
    keepd.start();
    let runs = keepd.json(&["run", "list"]);
    assert!(runs.as_array().unwrap().iter().all(|r| r["state"] == "failed"), "{runs}");
    let run: serde_json::Value = serde_json::from_str(&keepd.ok(&["backup", "shop", "--json"])).unwrap();
    let stored: u64 = before.iter().map(|p| fs::metadata(p).unwrap().len()).sum();
    let added = run["progress"]["added_bytes"].as_u64().unwrap();
    assert!(added + stored < 66 << 20, "what was stored before the kill is used: {stored} there, {added} added");
    assert_same(&keepd.path("files"), &keepd.restored("latest").join("files"));
    keepd.ok(&["check", "local", "--read-data"]);
    // Killed in an increment: the first backup stays whole.
    fs::write(keepd.path("files/more"), noise(30 << 20, 99)).unwrap();
    let first = keepd.backups().remove(0);
    let packs = keepd.packs().len();
    keepd.ok(&["backup", "shop", "--detach"]);
    while keepd.packs().len() <= packs {
        std::thread::sleep(Duration::from_millis(2));
    }
    keepd.kill();
    keepd.start();
    keepd.ok(&["check", "local", "--read-data"]);
    keepd.restored(&first);
    keepd.ok(&["backup", "shop"]);
    assert_same(&keepd.path("files"), &keepd.restored("latest").join("files"));
}

#[test]
fn cancel_and_terminate_stop_at_a_safe_point() {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 500);
    fs::write(keepd.path("files/large"), noise(120 << 20, 3)).unwrap();
    keepd.start();
    let run = keepd.json(&["backup", "shop", "--detach"])["run"].as_str().unwrap().to_owned();
    assert!(keepd.fails(1, &["backup", "shop"]).contains("never overlaps itself"));
    keepd.ok(&["run", "cancel", &run]);
    let ended = keepd.ctl(&["run", "follow", &run, "--json"]);
    assert_eq!(ended.status.code(), Some(1));
    assert!(text(&ended).contains("\"cancelled\""), "{}", text(&ended));
    assert!(keepd.backups().is_empty());
    keepd.ok(&["backup", "shop", "--detach"]);
    keepd.stop();
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    assert_same(&keepd.path("files"), &keepd.restored("latest").join("files"));
}

#[test]
fn retention_and_prune_follow_a_good_run() {
    let mut keepd = Keepd::prepared();
    keepd.configure("prune_grace = \"0s\"", "retention = { keep_last = 2 }");
    make_database(&keepd.path("shop.db"), 500);
    keepd.start();
    let mut sizes = Vec::new();
    for n in 0..5 {
        fs::write(keepd.path("files/blob"), noise(4 << 20, n + 1)).unwrap();
        keepd.ok(&["backup", "shop"]);
        sizes.push(keepd.packs().iter().map(|p| fs::metadata(p).unwrap().len()).sum::<u64>());
    }
    assert_eq!(keepd.backups().len(), 2);
    assert!(sizes[4] < 10 << 20, "what no backup needs is gone: {sizes:?}");
    keepd.ok(&["check", "local", "--read-data"]);
    assert_same(&keepd.path("files"), &keepd.restored("latest").join("files"));
    // The state is lost: everything is known again from the repository.
    keepd.stop();
    fs::remove_dir_all(keepd.path("state")).unwrap();
    keepd.start();
    let since = std::time::Instant::now();
    while keepd.backups().len() != 2 {
        assert!(since.elapsed() < Duration::from_secs(10), "{}", keepd.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    let run: serde_json::Value = serde_json::from_str(&keepd.ok(&["backup", "shop", "--json"])).unwrap();
    assert!(run["progress"]["added_bytes"].as_u64().unwrap() < 50_000, "nothing is stored again: {run}");
}

#[test]
fn a_schedule_runs_and_a_reload_changes_it() {
    let mut keepd = Keepd::prepared();
    keepd.configure("", "every = \"1s\"");
    make_database(&keepd.path("shop.db"), 10);
    keepd.start();
    let wait = |wanted: usize| {
        let since = std::time::Instant::now();
        while keepd.backups().len() < wanted {
            assert!(since.elapsed() < Duration::from_secs(30), "{}", keepd.log());
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    wait(2);
    assert_eq!(keepd.json(&["list"])[0]["type"].as_str(), Some("scheduled"));
    fs::write(keepd.path("keepd.toml"), fs::read_to_string(keepd.path("keepd.toml")).unwrap().replace("every", "evrey")).unwrap();
    assert!(keepd.fails(1, &["reload"]).contains("did you mean"));
    let before = keepd.backups().len();
    wait(before + 1);
    keepd.configure("", "schedule = \"30 2 * * *\"\ntimezone = \"UTC\"");
    keepd.ok(&["reload"]);
    let status = keepd.json(&["status"]);
    assert!(status["jobs"][0]["next"].as_str().unwrap().contains("T02:30:00Z"), "{status}");
    assert!(status["jobs"][0]["runs_good"].as_u64().unwrap() >= 3);
}

#[test]
fn gzip_and_none_and_no_encryption_work_too() {
    for (compression, encryption) in [("gzip", "main"), ("none", "main"), ("zstd", "none")] {
        let mut keepd = Keepd::prepared();
        let toml = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
        fs::write(
            keepd.path("keepd.toml"),
            toml.replace("encryption = \"main\"", &format!("encryption = \"{encryption}\"\ncompression = \"{compression}\"")),
        )
        .unwrap();
        make_database(&keepd.path("shop.db"), 2000);
        fs::write(keepd.path("files/a"), noise(500_000, 4)).unwrap();
        keepd.start();
        keepd.ok(&["backup", "shop"]);
        keepd.ok(&["check", "local", "--read-data"]);
        let out = keepd.restored("latest");
        assert_same(&keepd.path("files"), &out.join("files"));
        assert_eq!(proven_sum(&out.join("db/shop.db")), 200_000);
    }
}
