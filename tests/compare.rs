//! What differs now between a backup and what is live, through the real binaries.

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use common::databases::{Postgres, postgres_tools};
use common::*;
use serde_json::Value;

/// The differences of `--json` as `change what`, sorted as they came.
fn named(found: &Value) -> Vec<String> {
    let name = |d: &Value| match (d["path"]["path"].as_str(), d["database"].as_str(), d["table"].as_str()) {
        (Some(path), _, _) => path.to_owned(),
        (_, Some(database), Some(table)) => format!("{database}:{table}"),
        (_, Some(database), None) => format!("database {database}"),
        (_, None, Some(table)) => format!(":{table}"),
        _ => format!("source {}", d["source"].as_str().unwrap()),
    };
    found["differences"].as_array().unwrap().iter().map(|d| format!("{} {}", d["change"].as_str().unwrap(), name(d))).collect()
}

fn table<'v>(found: &'v Value, name: &str) -> &'v Value {
    found["differences"].as_array().unwrap().iter().find(|d| d["table"] == name).unwrap_or_else(|| panic!("no {name} in {found}"))
}

fn partly(keepd: &Keepd, arguments: &[&str]) -> Value {
    let out = keepd.ctl(&[arguments, &["--json"]].concat());
    assert_eq!(out.status.code(), Some(3), "{}", text(&out));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn files_and_a_live_database_beside_their_backup() {
    let mut keepd = Keepd::started();
    fs::write(keepd.path("files/kept-size"), noise(200_000, 7)).unwrap();
    fs::write(keepd.path("files/touched"), noise(200_000, 8)).unwrap();
    fs::write(keepd.path("files/cached"), "x").unwrap();
    let db = rusqlite::Connection::open(keepd.path("shop.db")).unwrap();
    db.execute_batch(
        "CREATE TABLE note (id INTEGER PRIMARY KEY, t TEXT); INSERT INTO note VALUES (1, 'a'), (2, 'b'), (3, 'c'); CREATE TABLE gone (x)",
    )
    .unwrap();
    keepd.ok(&["backup", "shop"]);
    assert!(keepd.ok(&["compare", "latest"]).contains("nothing differs from backup"));

    // Every kind of change, and a database that is written to all the time.
    let mtime = fs::metadata(keepd.path("files/kept-size")).unwrap().modified().unwrap();
    fs::write(keepd.path("files/kept-size"), noise(200_000, 9)).unwrap();
    fs::File::options().write(true).open(keepd.path("files/kept-size")).unwrap().set_modified(mtime).unwrap();
    fs::File::options().write(true).open(keepd.path("files/touched")).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
    fs::write(keepd.path("files/new\nname"), "new").unwrap();
    fs::remove_file(keepd.path("files/link")).unwrap();
    fs::create_dir(keepd.path("files/.keepd-restore-1")).unwrap();
    db.execute_batch("INSERT INTO note VALUES (4, 'd'); UPDATE note SET t = 'B' WHERE id = 2; DELETE FROM note WHERE id = 1; DROP TABLE gone; CREATE TABLE come (x); ALTER TABLE account ADD COLUMN since TEXT").unwrap();
    let stop = AtomicBool::new(false);
    let (found, deep) = std::thread::scope(|scope| {
        scope.spawn(|| {
            let db = rusqlite::Connection::open(keepd.path("shop.db")).unwrap();
            db.busy_timeout(Duration::from_secs(20)).unwrap();
            let mut slowest = Duration::ZERO;
            while !stop.load(Ordering::Relaxed) {
                let since = Instant::now();
                db.execute_batch("UPDATE account SET balance = balance + 1 WHERE id = 5").unwrap();
                slowest = slowest.max(since.elapsed());
            }
            assert!(slowest < Duration::from_secs(5), "a writer waited {slowest:?}");
        });
        let found = keepd.json(&["compare", "latest", "--job", "shop"]);
        let deep = keepd.json(&["compare", "latest", "db", "--deep"]);
        stop.store(true, Ordering::Relaxed);
        (found, deep)
    });
    assert_eq!(
        named(&found),
        [
            "modified db/shop.db",
            "modified :account",
            "added :come",
            "removed :gone",
            "metadata files",
            "modified files/kept-size",
            "removed files/link",
            "added files/new\nname",
            "metadata files/touched"
        ]
    );
    assert_eq!((table(&found, "account")["schema"].as_bool(), table(&found, "account")["rows_after"].as_u64()), (Some(true), Some(500)));
    let summary = &found["summary"];
    let counts = ["added", "removed", "modified", "metadata", "tables", "excluded"].map(|n| summary[n].as_u64().unwrap());
    assert_eq!(counts, [1, 1, 2, 2, 3, 0], "{summary}");
    assert_eq!(found["run"]["kind"], "compare");
    // The rows of note are as many as before: only a look at their contents tells.
    let note = table(&deep, "note");
    assert_eq!((note["rows_before"].as_u64(), note["rows_after"].as_u64()), (Some(3), Some(3)));
    assert_eq!(["rows_added", "rows_removed", "rows_changed"].map(|n| note[n].as_u64().unwrap()), [1, 1, 1]);
    let shown = keepd.ok(&["compare", "latest", "db", "files/link", "files/new\nname", "--deep"]);
    for line in [
        "M db: note  (3 rows, 1 added, 1 removed, 1 changed)",
        "- db: gone  (0 rows)",
        "+ files/new\\nname",
        "- files/link",
        "M db: account  (500 rows, schema)",
    ] {
        assert!(shown.lines().any(|l| l == line), "{line} in {shown}");
    }
    assert!(shown.contains("4 tables differ from backup"), "{shown}");
    assert!(proven_sum(&keepd.path("shop.db")) > 50_000, "it is whole, and was written to meanwhile");
    assert!(fs::read_dir(keepd.path("state/work")).unwrap().next().is_none(), "nothing is left of it");

    // What is said wrong, and what cannot be read.
    assert!(keepd.fails(1, &["compare", "latest", "nothing"]).contains("no source of that name"));
    assert!(keepd.fails(1, &["compare", "latest", "files/typo"]).contains("'files/typo' is neither in the backup nor live"));
    assert!(keepd.fails(1, &["compare", "ffff"]).contains("there is no backup"));
    assert!(keepd.ok(&["compare", "latest", "files/deep"]).contains("nothing differs"));

    // Another configuration: a source more, one less, one that is left out now.
    drop(db);
    let toml = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let d = keepd.dir.path().display().to_string();
    let other = toml
        .replace("name = \"db\"\nsqlite", "name = \"base\"\nsqlite")
        .replace(&format!("files = \"{d}/files\""), &format!("files = \"{d}/files\"\nexclude = [\"cached\"]"));
    fs::write(keepd.path("keepd.toml"), other).unwrap();
    keepd.ok(&["reload"]);
    let found = partly(&keepd, &["compare", "latest"]);
    assert!(named(&found).contains(&"added source base".to_owned()), "{found}");
    assert_eq!((found["summary"]["excluded"].as_u64(), &found["summary"]["not_compared"]), (Some(1), &serde_json::json!(["db"])));
    assert!(!named(&found).iter().any(|n| n.contains("cached")), "{found}");
    assert!(text(&keepd.ctl(&["compare", "latest"])).contains("job shop has no such source any more"));
    fs::write(keepd.path("keepd.toml"), toml).unwrap();
    keepd.ok(&["reload"]);

    // What is gone altogether differs, too.
    fs::remove_dir_all(keepd.path("files")).unwrap();
    for name in ["shop.db", "shop.db-wal", "shop.db-shm"] {
        let _ = fs::remove_file(keepd.path(name));
    }
    let found = keepd.json(&["compare", "latest"]);
    assert_eq!(found["summary"]["removed"].as_u64(), Some(1 + 8), "{found}");
    assert_eq!((named(&found)[0].as_str(), named(&found)[1].as_str()), ("removed db/shop.db", "removed files"));
    keepd.stop();
}

#[test]
fn what_cannot_be_read_is_no_difference() {
    // Root reads everything; a directory in the place of the database is nothing for anybody.
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    fs::remove_file(keepd.path("shop.db")).unwrap();
    fs::create_dir(keepd.path("shop.db")).unwrap();
    fs::set_permissions(keepd.path("files/deep"), fs::Permissions::from_mode(0o700)).unwrap();
    let found = partly(&keepd, &["compare", "latest"]);
    assert_eq!(named(&found), ["metadata files/deep"]);
    let said = text(&keepd.ctl(&["compare", "latest"]));
    assert!(
        said.contains("source db was not compared")
            && said.contains("is a directory")
            && said.contains("not compared, or not as a whole: db"),
        "{said}"
    );
    assert!(keepd.fails(1, &["compare", "latest", "db"]).contains("nothing could be compared"));
}

#[test]
fn a_comparison_of_a_copy_and_one_that_nobody_reads() {
    let mut keepd = Keepd::prepared();
    let d = keepd.dir.path().display().to_string();
    let toml = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let toml = toml.replace("[job.shop]\ndestinations = [\"local\"]", &format!("[destination.second]\nservice = \"fs\"\nroot = \"{d}/second\"\nencryption = \"none\"\n[job.shop]\ndestinations = [\"local\", \"second\"]"));
    fs::write(keepd.path("keepd.toml"), toml).unwrap();
    let db = make_database(&keepd.path("shop.db"), 500);
    for n in 0..20_000 {
        fs::write(keepd.path(&format!("files/small-{n:05}")), noise(500, n)).unwrap();
    }
    fs::write(keepd.path("files/big"), noise(5 << 20, 5)).unwrap();
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    // The first place is gone: the copy has other keys.
    fs::rename(keepd.path("repository"), keepd.path("lost")).unwrap();
    for name in ["big", "small-00003"] {
        fs::File::options().write(true).open(keepd.path("files").join(name)).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
    }
    fs::write(keepd.path("files/small-00004"), noise(500, 99_999)).unwrap();
    db.execute_batch("UPDATE account SET balance = 7 WHERE id = 3").unwrap();
    let found = keepd.json(&["compare", "latest", "--deep"]);
    assert_eq!(
        named(&found),
        ["modified db/shop.db", "modified :account", "metadata files/big", "metadata files/small-00003", "modified files/small-00004"]
    );
    assert_eq!(table(&found, "account")["rows_changed"].as_u64(), Some(1));
    // Whoever stops reading leaves no run behind.
    for n in 0..20_000 {
        fs::remove_file(keepd.path(&format!("files/small-{n:05}"))).unwrap();
    }
    let mut child = keepd.ctl_command(&["compare", "latest", "files"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("m files"));
    drop(lines);
    child.wait().unwrap();
    let since = Instant::now();
    while !keepd.json(&["status"])["running"].as_array().unwrap().is_empty() {
        assert!(since.elapsed() < Duration::from_secs(20), "the run goes on");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(keepd.json(&["compare", "latest", "files"])["summary"]["removed"].as_u64(), Some(20_000));
}

#[test]
fn rows_of_postgresql_and_what_a_command_prints() {
    let server = Postgres::started();
    for database in ["shop", "blog"] {
        server.sql("postgres", &format!("create database {database}"));
        server.sql(
            database,
            "create table account (id int primary key, note text); insert into account select n, 'x' from generate_series(1, 300) n; \
             create table gone (x int); create schema \"Odd.S\"; create table \"Odd.S\".\"T'x\" (a int); \
             create table part (id int) partition by range (id); create table part_1 partition of part for values from (0) to (100); \
             insert into part select n from generate_series(1, 50) n; create unlogged table loose (x int); create table sessions_1 (x int)",
        );
    }
    let mut keepd = Keepd::prepared();
    let tools = postgres_tools().display().to_string();
    let source = format!("{}, bin_dir = \"{tools}\", exclude_tables = [\"sessions_*\"]", server.connection());
    let toml = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let sources = format!(
        "[[job.shop.source]]\nname = \"pg\"\npostgres = {{ dbname = \"*\", {source} }}\n[[job.shop.source]]\nname = \"said\"\ncommand = [\"/bin/echo\", \"hello\"]\n"
    );
    let toml = format!("{}{sources}", &toml[..toml.find("[[job.shop.source]]").unwrap()]);
    fs::write(keepd.path("keepd.toml"), toml).unwrap();
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let found = keepd.json(&["compare", "latest", "pg"]);
    assert_eq!(named(&found), [""; 0], "{found}");
    let said = text(&keepd.ctl(&["compare", "latest"]));
    assert!(said.contains("source said was not compared: it is what a command prints"), "{said}");

    server.sql("shop", "insert into account values (1000, 'y'); drop table gone; create table come (x int); delete from part where id > 40; insert into \"Odd.S\".\"T'x\" values (1); create table sessions_2 (x int)");
    server.sql("postgres", "drop database blog");
    server.sql("postgres", "create database fresh");
    let found = partly(&keepd, &["compare", "latest"]);
    let expected = [
        "removed database blog",
        "modified shop:Odd.S.T'x",
        "modified shop:public.account",
        "added shop:public.come",
        "removed shop:public.gone",
        "modified shop:public.part_1",
        "added database fresh",
    ];
    assert_eq!(named(&found), expected);
    assert_eq!(
        (table(&found, "public.part_1")["rows_before"].as_u64(), table(&found, "public.part_1")["rows_after"].as_u64()),
        (Some(50), Some(40))
    );
    assert_eq!(found["summary"]["not_compared"], serde_json::json!(["said"]));
    let shown = keepd.ok(&["compare", "latest", "pg/shop.dump"]);
    assert!(shown.contains("M pg/shop: public.account  (300 -> 301 rows)") && !shown.contains("blog"), "{shown}");
    assert!(keepd.fails(1, &["compare", "latest", "pg/none.dump"]).contains("neither in the backup nor live"));
    drop(server);
    let said = keepd.fails(1, &["compare", "latest"]);
    assert!(said.contains("source pg was not compared") && said.contains("nothing could be compared"), "{said}");
    assert!(!said.contains("canary"), "{said}");
}

/// A MariaDB server of a test's own, on a socket.
struct MariaDb {
    dir: tempfile::TempDir,
    child: Child,
}

impl MariaDb {
    fn started() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = format!("--datadir={}", dir.path().join("data").display());
        let user = if rustix::process::geteuid().is_root() { &["--user=root"][..] } else { &[] };
        let mut install = Command::new("mariadb-install-db");
        install.args(["--no-defaults", &data, "--auth-root-authentication-method=normal", "--skip-test-db"]).args(user);
        let out = install.output().unwrap();
        assert!(out.status.success(), "{}", text(&out));
        let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin";
        let mut command = Command::new("mariadbd");
        command.env("PATH", path).args(["--no-defaults", &data, "--skip-networking", "--innodb-buffer-pool-size=32M"]).args(user);
        command.args([format!("--socket={}/s", dir.path().display()), format!("--pid-file={}/pid", dir.path().display())]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let server = Self { dir, child };
        let since = Instant::now();
        while !server.client("SELECT 1").status.success() {
            assert!(since.elapsed() < Duration::from_secs(60), "MariaDB does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
        server
    }

    fn client(&self, sql: &str) -> std::process::Output {
        let socket = format!("--socket={}/s", self.dir.path().display());
        Command::new("mariadb").args(["--no-defaults", "-uroot", "--batch", &socket, "-e", sql]).output().unwrap()
    }

    fn sql(&self, sql: &str) {
        let out = self.client(sql);
        assert!(out.status.success(), "{sql}: {}", text(&out));
    }
}

impl Drop for MariaDb {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn rows_of_mariadb() {
    let server = MariaDb::started();
    server.sql(
        "CREATE DATABASE shop; USE shop; CREATE TABLE account (id INT PRIMARY KEY); INSERT INTO account SELECT seq FROM seq_1_to_300; \
         CREATE TABLE `odd ``name; (x` (a INT); CREATE TABLE gone (x INT); CREATE VIEW seen AS SELECT id FROM account; \
         CREATE SEQUENCE numbers; CREATE TABLE sessions (x INT); CREATE TABLE old (x INT) ENGINE = MyISAM; INSERT INTO old VALUES (1)",
    );
    let mut keepd = Keepd::prepared();
    let toml = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let sources = format!(
        "[[job.shop.source]]\nname = \"my\"\nmysql = {{ dbname = \"shop\", socket = \"{}/s\", user = \"root\", exclude_tables = [\"sessions\"] }}\n",
        server.dir.path().display()
    );
    fs::write(keepd.path("keepd.toml"), format!("{}{sources}", &toml[..toml.find("[[job.shop.source]]").unwrap()])).unwrap();
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    assert!(keepd.ok(&["compare", "latest"]).contains("nothing differs"), "{}", keepd.ok(&["compare", "latest"]));
    server.sql("USE shop; DELETE FROM account WHERE id < 11; INSERT INTO `odd ``name; (x` VALUES (1); DROP TABLE gone; CREATE TABLE come (x INT); INSERT INTO sessions VALUES (1)");
    let found = keepd.json(&["compare", "latest"]);
    assert_eq!(named(&found), ["modified shop:account", "added shop:come", "removed shop:gone", "modified shop:odd `name; (x"]);
    server.sql("DROP DATABASE shop");
    assert_eq!(named(&keepd.json(&["compare", "latest"])), ["removed database shop"]);
}
