//! A restore in place: all of it or nothing, whatever happens on the way.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::*;

/// What a directory holds, to the last attribute that a restore gives back: by path, kind, mode, owner, time and contents.
fn picture(dir: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut stack = vec![dir.to_owned()];
    while let Some(path) = stack.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let contents = match () {
            () if meta.is_dir() => {
                stack.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
                String::new()
            }
            () if meta.is_symlink() => fs::read_link(&path).unwrap().display().to_string(),
            () => format!("{} {:?}", meta.nlink(), blake(&fs::read(&path).unwrap())),
        };
        let name = path.strip_prefix(dir).unwrap().display();
        lines.push(format!("{name} {:o} {} {} {}.{} {contents}", meta.mode(), meta.uid(), meta.gid(), meta.mtime(), meta.mtime_nsec()));
    }
    lines.sort();
    lines
}

fn blake(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

/// The rows of the database, read as a bystander would, and what lies beside it.
fn rows(path: &Path) -> i64 {
    let db = rusqlite::Connection::open_with_flags(path, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    assert_eq!(db.query_row("PRAGMA integrity_check", [], |r| r.get::<_, String>(0)).unwrap(), "ok");
    db.query_row("SELECT count(*) FROM account", [], |r| r.get(0)).unwrap()
}

/// The state that is backed up, and then another one.
fn first_state(keepd: &Keepd) {
    let files = keepd.path("files");
    fs::create_dir_all(files.join("deep/er")).unwrap();
    fs::create_dir_all(files.join("emptied")).unwrap();
    fs::write(files.join("same"), "the same").unwrap();
    fs::write(files.join("changed"), "as it was").unwrap();
    fs::write(files.join("deep/er/gone"), "will be gone").unwrap();
    fs::write(files.join("emptied/x"), "x").unwrap();
    fs::write(files.join("big"), noise(600 << 10, 9)).unwrap();
    fs::write(files.join("mode"), "mode").unwrap();
    fs::write(files.join("file-then-directory"), "file").unwrap();
    fs::create_dir(files.join("directory-then-file")).unwrap();
    fs::write(files.join("directory-then-file/in"), "in").unwrap();
    fs::hard_link(files.join("changed"), files.join("changed-too")).unwrap();
    fs::hard_link(files.join("same"), files.join("same-too")).unwrap();
    std::os::unix::fs::symlink("deep/er", files.join("link")).unwrap();
    fs::set_permissions(files.join("deep"), fs::Permissions::from_mode(0o750)).unwrap();
}

fn second_state(keepd: &Keepd) {
    let files = keepd.path("files");
    // An unlinked and rewritten file and its other name, as an editor leaves them.
    fs::remove_file(files.join("changed")).unwrap();
    fs::write(files.join("changed"), "as it is").unwrap();
    fs::remove_dir_all(files.join("deep/er")).unwrap();
    fs::remove_file(files.join("emptied/x")).unwrap();
    let big = fs::metadata(files.join("big")).unwrap();
    let mut other = noise(600 << 10, 9);
    other[300_000] ^= 1;
    fs::write(files.join("big"), other).unwrap();
    // Its time does not tell.
    fs::File::options().write(true).open(files.join("big")).unwrap().set_modified(big.modified().unwrap()).unwrap();
    fs::set_permissions(files.join("mode"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::remove_file(files.join("file-then-directory")).unwrap();
    fs::create_dir(files.join("file-then-directory")).unwrap();
    fs::write(files.join("file-then-directory/new"), "new").unwrap();
    fs::remove_dir_all(files.join("directory-then-file")).unwrap();
    fs::write(files.join("directory-then-file"), "file now").unwrap();
    fs::remove_file(files.join("same-too")).unwrap();
    fs::remove_file(files.join("link")).unwrap();
    std::os::unix::fs::symlink("deep", files.join("link")).unwrap();
    fs::create_dir_all(files.join("added/below")).unwrap();
    fs::write(files.join("added/below/file"), "added").unwrap();
    fs::write(files.join("leave.tmp"), "left out of backups").unwrap();
    let db = rusqlite::Connection::open(keepd.path("shop.db")).unwrap();
    db.execute_batch("PRAGMA journal_mode = WAL; DELETE FROM account WHERE id >= 100").unwrap();
}

/// Both sources, an application's health, and programs that say when they are called.
fn configure(keepd: &Keepd, job: &str) {
    keepd.configure("", job);
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), format!("{text}exclude = [\"*.tmp\"]\n")).unwrap();
}

fn prepared(job: &str) -> Keepd {
    let keepd = Keepd::prepared();
    configure(&keepd, job);
    drop(make_database(&keepd.path("shop.db"), 500));
    first_state(&keepd);
    keepd
}

fn no_leftovers(keepd: &Keepd) {
    let stages: Vec<_> = Command::new("find").arg(keepd.dir.path()).args(["-name", ".keepd-restore-*"]).output().unwrap().stdout;
    assert!(stages.is_empty(), "{}", String::from_utf8_lossy(&stages));
    let journals = fs::read_dir(keepd.path("state/in-place")).map_or(0, |d| d.count());
    assert_eq!(journals, 0, "{}", keepd.log());
}

fn last_restore(keepd: &Keepd) -> serde_json::Value {
    let runs = keepd.json(&["run", "list"]);
    let id = runs.as_array().unwrap().iter().find(|r| r["kind"] == "restore").unwrap()["id"].as_str().unwrap().to_owned();
    // Its exit status is that of the run.
    serde_json::from_slice(&keepd.ctl(&["run", "show", &id, "--json"]).stdout).unwrap()
}

#[test]
fn what_differs_is_exchanged_and_comes_back_by_undo() {
    let mut keepd = prepared("");
    keepd.start();
    let (files, db) = (keepd.path("files"), keepd.path("shop.db"));
    let before = picture(&files);
    keepd.ok(&["backup", "shop"]);
    second_state(&keepd);
    let after = picture(&files);
    let same = fs::metadata(files.join("same")).unwrap().ino();

    let plan = keepd.json(&["restore", "latest", "--in-place", "--dry-run"])["plan"].clone();
    let source = plan["sources"].as_array().unwrap().iter().find(|s| s["name"] == "files").unwrap().clone();
    let change = |sign: &str, path: &str| {
        let all = source["changes"].as_array().unwrap();
        assert!(all.iter().any(|c| c["change"] == sign && c["path"]["path"] == path), "{sign} {path}: {all:#?}");
    };
    change("modified", "files/changed");
    change("modified", "files/big");
    change("added", "files/deep/er/gone");
    change("removed", "files/added/below/file");
    change("metadata", "files/mode");
    assert!(!source["changes"].to_string().contains("leave.tmp"));
    assert_eq!(picture(&files), after, "a dry run changes nothing");
    assert_eq!(rows(&db), 100);
    let asked = keepd.fails(2, &["restore", "latest", "--in-place"]);
    assert!(asked.contains("say --yes") && asked.contains("files/changed"), "{asked}");

    keepd.ok(&["restore", "latest", "--in-place", "--yes"]);
    assert_eq!(rows(&db), 500);
    assert!(fs::read(files.join("leave.tmp")).is_ok(), "what backups leave out stays");
    fs::remove_file(files.join("leave.tmp")).unwrap();
    let root = before.iter().find(|l| l.starts_with(' ')).unwrap().clone();
    let without_root = |lines: Vec<String>| lines.into_iter().filter(|l| !l.starts_with(' ')).collect::<Vec<_>>();
    assert_eq!(without_root(picture(&files)), without_root(before.clone()), "{root}");
    assert_eq!(fs::metadata(files.join("same")).unwrap().ino(), same, "what does not differ is not written");
    no_leftovers(&keepd);

    // A safety copy is no `latest`.
    let list = keepd.json(&["list"]);
    assert_eq!((list[0]["type"].as_str(), list[1]["type"].as_str()), (Some("pre-restore"), Some("manual")));
    assert_eq!(keepd.json(&["show", "latest"])["id"].as_str(), list[1]["id"].as_str());
    let run = last_restore(&keepd);
    assert_eq!(run["safety"], list[0]["id"]);
    let steps: Vec<&str> = run["steps"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    for step in ["planning", "staging db", "checking db", "staging files", "exchanging", "clearing up"] {
        assert!(steps.contains(&step), "{steps:?}");
    }

    keepd.ok(&["undo", run["id"].as_str().unwrap(), "--yes"]);
    let back: Vec<String> = after.iter().filter(|l| !l.starts_with("leave.tmp")).cloned().collect();
    assert_eq!(without_root(picture(&files)), without_root(back));
    assert_eq!(rows(&db), 100);
    no_leftovers(&keepd);
    assert!(keepd.fails(1, &["undo", "nothing"]).contains("there is no run 'nothing'"));
    let backup = keepd.json(&["run", "list"]).as_array().unwrap().iter().find(|r| r["kind"] == "backup").unwrap()["id"].clone();
    assert!(keepd.fails(1, &["undo", backup.as_str().unwrap(), "--yes"]).contains("no restore in place"));
}

#[test]
fn parts_can_be_restored_and_what_is_gone_is_made_again() {
    let mut keepd = prepared("");
    keepd.start();
    let (files, db) = (keepd.path("files"), keepd.path("shop.db"));
    keepd.ok(&["backup", "shop"]);
    let before = picture(&files);
    second_state(&keepd);
    // A path, with everything else as it is.
    keepd.ok(&["restore", "latest", "--in-place", "--yes", "files/deep"]);
    assert_eq!(fs::read(files.join("deep/er/gone")).unwrap(), b"will be gone");
    assert_eq!(fs::read(files.join("changed")).unwrap(), b"as it is");
    assert_eq!(rows(&db), 100);
    // A source.
    keepd.ok(&["restore", "latest", "--in-place", "--yes", "--source", "db"]);
    assert_eq!((rows(&db), fs::read(files.join("changed")).unwrap()), (500, b"as it is".to_vec()));
    assert!(keepd.fails(1, &["restore", "latest", "--in-place", "--yes", "--source", "cellar"]).contains("no source of that name"));
    assert!(keepd.fails(1, &["restore", "latest", "--in-place", "--yes", "files/nowhere"]).contains("nowhere"));
    // A table, with everything else in the database as it is.
    let live = || rusqlite::Connection::open(&db).unwrap();
    live().execute_batch("DELETE FROM account; CREATE TABLE later (a); INSERT INTO later VALUES ('stays')").unwrap();
    assert!(keepd.fails(1, &["restore", "latest", "--in-place", "--yes", "--table", "account"]).contains("from SQLite only"));
    let wrong = keepd.fails(1, &["restore", "latest", "--in-place", "--yes", "--source", "db", "--table", "nothing"]);
    assert!(wrong.contains("has no table 'nothing'; it has account"), "{wrong}");
    let told = keepd.ok(&["restore", "latest", "--in-place", "--yes", "--source", "db", "--table", "account"]);
    assert!(told.contains("table account: 500 rows, 0 before"), "{told}");
    assert_eq!(rows(&db), 500);
    assert_eq!(live().query_row("SELECT a FROM later", [], |r| r.get::<_, String>(0)).unwrap(), "stays");
    // Everything is gone, as after a lost disk.
    fs::remove_dir_all(&files).unwrap();
    for name in ["shop.db", "shop.db-wal", "shop.db-shm"] {
        let _ = fs::remove_file(keepd.path(name));
    }
    let told = keepd.ok(&["restore", "latest", "--in-place", "--yes"]);
    assert!(told.contains("is not there now"), "{told}");
    assert_eq!(picture(&files), before);
    assert_eq!(rows(&db), 500);
    // The database is no database any more: it is kept as the file that it is, and comes back by undo.
    fs::write(&db, noise(10_000, 3)).unwrap();
    keepd.ok(&["restore", "latest", "--in-place", "--yes"]);
    assert_eq!(rows(&db), 500);
    let run = last_restore(&keepd)["id"].as_str().unwrap().to_owned();
    keepd.ok(&["undo", &run, "--yes"]);
    assert!(fs::read(&db).unwrap() == noise(10_000, 3));
    no_leftovers(&keepd);
}

#[test]
fn whatever_goes_wrong_leaves_everything_as_it_was() {
    let mut keepd = prepared("");
    keepd.start();
    let (files, db) = (keepd.path("files"), keepd.path("shop.db"));
    keepd.ok(&["backup", "shop"]);
    let id = keepd.backups()[0].clone();
    second_state(&keepd);
    let after = picture(&files);
    let unchanged = |keepd: &Keepd, what: &str| {
        assert_eq!(picture(&files), after, "{what}");
        assert_eq!(rows(&db), 100, "{what}");
        no_leftovers(keepd);
    };
    let restart = |keepd: &mut Keepd, job: &str| {
        configure(keepd, job);
        keepd.ok(&["reload"]);
    };
    // Somebody has the database open.
    let script = "import sqlite3, sys, time\nd = sqlite3.connect(sys.argv[1]); d.execute('select count(*) from account').fetchall()\nprint('open', flush=True); time.sleep(60)";
    let mut user = Command::new("python3").args(["-c", script]).arg(&db).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut line = [0; 4];
    std::io::Read::read_exact(user.stdout.as_mut().unwrap(), &mut line).unwrap();
    let told = keepd.fails(1, &["restore", &id, "--in-place", "--yes"]);
    assert!(told.contains(&format!("in use by python3 (pid {})", user.id())), "{told}");
    user.kill().unwrap();
    user.wait().unwrap();
    unchanged(&keepd, "in use");

    restart(&mut keepd, "health = { command = [\"/bin/sh\", \"-c\", \"echo it is ill; exit 1\"], patience = \"1s\" }");
    let told = keepd.fails(1, &["restore", &id, "--in-place", "--yes"]);
    assert!(told.contains("not healthy") && told.contains("it is ill") && told.contains("everything is as it was"), "{told}");
    unchanged(&keepd, "not healthy");

    let port = servers::free_port();
    restart(&mut keepd, &format!("health = {{ url = \"http://127.0.0.1:{port}/health\", patience = \"1s\" }}"));
    let told = keepd.fails(1, &["restore", &id, "--in-place", "--yes"]);
    assert!(told.contains("not healthy") && told.contains("/health"), "{told}");
    unchanged(&keepd, "no answer");

    for (hook, text) in [("before_restore", "hook before_restore"), ("after_restore", "hook after_restore")] {
        restart(&mut keepd, &format!("hooks = {{ {hook} = [\"/bin/false\"] }}"));
        let told = keepd.fails(1, &["restore", &id, "--in-place", "--yes"]);
        assert!(told.contains(text), "{told}");
        unchanged(&keepd, hook);
    }

    // No safety backup, no restore; unless that is said.
    restart(&mut keepd, "");
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), format!("{text}[[job.shop.source]]\nname = \"extra\"\ncommand = [\"/bin/false\"]\n")).unwrap();
    keepd.ok(&["reload"]);
    let told = keepd.fails(1, &["restore", &id, "--in-place", "--yes"]);
    assert!(told.contains("could not be backed up first, so nothing was changed") && told.contains("source extra"), "{told}");
    unchanged(&keepd, "no safety backup");

    // Cancelled while the application's health is waited for.
    restart(&mut keepd, "health = { command = [\"/bin/false\"], patience = \"60s\" }");
    keepd.ok(&["restore", &id, "--in-place", "--yes", "--detach"]);
    let since = Instant::now();
    let run = loop {
        let run = last_restore(&keepd);
        if run["step"] == "checking the application's health" {
            break run["id"].as_str().unwrap().to_owned();
        }
        assert!(since.elapsed() < Duration::from_secs(30), "{run:#}");
        std::thread::sleep(Duration::from_millis(20));
    };
    keepd.ok(&["run", "cancel", &run]);
    let since = Instant::now();
    while last_restore(&keepd)["state"] != "cancelled" {
        assert!(since.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    unchanged(&keepd, "cancelled");
    assert!(last_restore(&keepd)["messages"].to_string().contains("everything is as it was before"));
}

/// Killed at every step, with two sources: all is old or all is new, and the next start has nothing left to do by hand.
#[test]
fn killed_at_any_step_it_is_wholly_old_or_wholly_new() {
    let mut keepd = prepared("hooks = { before_restore = [\"/bin/true\"] }\nhealth = { command = [\"/bin/true\"] }");
    keepd.start();
    let (files, db) = (keepd.path("files"), keepd.path("shop.db"));
    keepd.ok(&["backup", "shop"]);
    let id = keepd.backups()[0].clone();
    let new = picture(&files);
    second_state(&keepd);
    fs::remove_file(files.join("leave.tmp")).unwrap();
    let old = picture(&files);
    keepd.stop();
    // The root's own time is that of what was renamed in it last; everything below is exact.
    let below = |lines: &[String]| lines.iter().filter(|l| !l.starts_with(' ')).cloned().collect::<Vec<_>>();
    let (mut undone, mut kept) = (0, 0);
    for point in 1.. {
        assert!(point < 400, "it never ends");
        keepd.environment = vec![("KEEPD_TEST_DIES_AT".into(), point.to_string())];
        keepd.start();
        let out = keepd.ctl(&["restore", &id, "--in-place", "--yes", "--no-safety-backup"]);
        let finished = out.status.success();
        keepd.environment.clear();
        if !finished {
            keepd.kill();
            // Killed once more while it undoes, and once more.
            for again in [point % 5 + 1, point % 11 + 2] {
                dies_while_it_recovers(&keepd, again);
            }
            keepd.start();
            keepd.settled(point);
        }
        no_leftovers(&keepd);
        let (now, count) = (below(&picture(&files)), rows(&db));
        match (now == below(&new), now == below(&old), count) {
            (true, _, 500) => kept += 1,
            (_, true, 100) => undone += 1,
            _ => panic!("killed at point {point} it is neither old nor new ({count} rows):\n{now:#?}\n{}", keepd.log()),
        }
        if finished {
            break;
        }
        if count == 500 {
            // Back to the state that the next try starts from.
            keepd.stop();
            fs::remove_dir_all(&files).unwrap();
            fs::create_dir(&files).unwrap();
            for name in ["shop.db", "shop.db-wal", "shop.db-shm"] {
                let _ = fs::remove_file(keepd.path(name));
            }
            drop(make_database(&db, 500));
            keepd.start();
            keepd.ok(&["restore", &id, "--in-place", "--yes", "--no-safety-backup"]);
            second_state(&keepd);
            fs::remove_file(files.join("leave.tmp")).unwrap();
            for (path, line) in old.iter().map(|l| (l.split(' ').next().unwrap(), l)) {
                let time = line.split(' ').nth(4).unwrap().split_once('.').unwrap();
                let time = format!("@{}.{:0>9}", time.0, time.1);
                assert!(Command::new("touch").args(["-h", "-d", &time]).arg(files.join(path)).status().unwrap().success());
            }
            assert_eq!(below(&picture(&files)), below(&old));
        }
        keepd.stop();
    }
    println!("killed at {} points: {undone} times wholly old, {kept} times wholly new", undone + kept - 1);
    assert!(undone > 20 && kept > 2, "{undone} {kept}");
}

/// Starts a keepd that dies at a step of what it does at its start, or is stopped when it came through.
fn dies_while_it_recovers(keepd: &Keepd, point: u64) {
    let log = fs::OpenOptions::new().append(true).open(keepd.path("keepd.log")).unwrap();
    let mut child = keepd.command().env("KEEPD_TEST_DIES_AT", point.to_string()).stderr(log).spawn().unwrap();
    let since = Instant::now();
    while since.elapsed() < Duration::from_millis(300) && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = child.kill();
    child.wait().unwrap();
}

/// A database of PostgreSQL, files and what a command keeps are one set: all exchanged, or none.
#[test]
fn a_database_of_a_server_goes_with_the_files_or_not_at_all() {
    let server = databases::Postgres::started();
    let mut keepd = Keepd::prepared();
    let d = keepd.dir.path().display().to_string();
    let configure = |keepd: &Keepd, job: &str| {
        keepd.configure("", "");
        let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
        let job = format!(
            "[job.app]\ndestinations = [\"local\"]\n{job}\n[[job.app.source]]\nname = \"uploads\"\nfiles = \"{d}/uploads\"\n\
             [[job.app.source]]\nname = \"pg\"\npostgres = {{ dbname = [\"one\", \"two\"], {} }}\n\
             [[job.app.source]]\nname = \"cache\"\ncommand = [\"/bin/cat\", \"{d}/cache\"]\n\
             restore_command = [\"/bin/sh\", \"-c\", \"cat >{d}/cache.new && mv {d}/cache.new {d}/cache\"]\n",
            server.connection()
        );
        fs::write(keepd.path("keepd.toml"), format!("{text}{job}")).unwrap();
    };
    configure(&keepd, "");
    drop(make_database(&keepd.path("shop.db"), 1));
    fs::create_dir(keepd.path("uploads")).unwrap();
    let set = |keepd: &Keepd, state: &str| {
        fs::write(keepd.path("uploads/a"), state).unwrap();
        fs::write(keepd.path("cache"), state).unwrap();
        for database in ["one", "two"] {
            server.sql(database, &format!("update state set name = '{state}'"));
        }
    };
    let state = |keepd: &Keepd| -> Vec<String> {
        let mut all = vec![fs::read_to_string(keepd.path("uploads/a")).unwrap(), fs::read_to_string(keepd.path("cache")).unwrap()];
        all.extend(["one", "two"].map(|database| server.sql(database, "select name from state")));
        all
    };
    let tidy = || {
        for database in server.sql("postgres", "select datname from pg_database where datname like '%\\_before\\_%'").lines() {
            server.sql("postgres", &format!("drop database \"{database}\""));
        }
        let left = server.sql("postgres", "select datname from pg_database where datname like 'keepd\\_%'");
        assert_eq!(left, "", "scratch databases");
    };
    for database in ["one", "two"] {
        server.sql("postgres", &format!("create database {database}"));
        server.sql(database, "create table state (name text); insert into state values ('')");
    }
    let (old, new) = (vec!["second".to_owned(); 4], vec!["first".to_owned(); 4]);
    set(&keepd, "first");
    keepd.start();
    keepd.ok(&["backup", "app"]);
    let id = keepd.json(&["list", "--job", "app"])[0]["id"].as_str().unwrap().to_owned();
    set(&keepd, "second");

    // The application is not well with it: everything comes back, also what the command was fed.
    configure(&keepd, "health = { command = [\"/bin/false\"], patience = \"1s\" }");
    keepd.ok(&["reload"]);
    let told = keepd.fails(1, &["restore", &id, "--in-place", "--yes"]);
    assert!(told.contains("not healthy") && told.contains("everything is as it was before"), "{told}");
    assert_eq!(state(&keepd), old, "{told}");
    tidy();
    configure(&keepd, "");
    keepd.ok(&["reload"]);
    let only = keepd.ok(&["restore", &id, "--in-place", "--yes", "--source", "pg", "--database", "two"]);
    assert_eq!(state(&keepd), ["second", "second", "second", "first"], "{only}");
    let run = last_restore(&keepd)["id"].as_str().unwrap().to_owned();
    keepd.ok(&["restore", &id, "--in-place", "--yes"]);
    assert_eq!(state(&keepd), new);
    keepd.ok(&["undo", &run, "--yes"]);
    assert_eq!(state(&keepd), ["first", "first", "first", "second"], "an undo brings back what its own restore replaced");
    set(&keepd, "second");
    tidy();
    keepd.stop();

    let (mut undone, mut kept, mut point) = (0, 0, 1u64);
    loop {
        keepd.environment = vec![("KEEPD_TEST_DIES_AT".into(), point.to_string())];
        keepd.start();
        // With a safety backup: a command can only be given back what that has.
        let out = keepd.ctl(&["restore", &id, "--in-place", "--yes"]);
        let finished = out.status.success();
        keepd.environment.clear();
        if !finished {
            keepd.kill();
            keepd.start();
            keepd.settled(point);
        }
        match state(&keepd) {
            now if now == old => undone += 1,
            now if now == new => kept += 1,
            now => panic!("killed at point {point} it is neither old nor new: {now:?}\n{}\n{}", text(&out), keepd.log()),
        }
        tidy();
        if finished {
            break;
        }
        set(&keepd, "second");
        keepd.stop();
        // Close together where databases are exchanged, which is in the middle.
        point += if (18..30).contains(&point) { 1 } else { 5 };
        assert!(point < 200, "it never ends");
    }
    println!("killed at {} points: {undone} times wholly old, {kept} times wholly new", undone + kept - 1);
    assert!(undone > 6 && kept > 1, "{undone} {kept}");
}
