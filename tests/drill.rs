//! Drills: backups restored into a scratch place and proven there, and what happens to those that do not stand it.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::databases::*;
use common::*;
use serde_json::Value;

/// A MariaDB server on a socket.
struct Mariadb {
    dir: tempfile::TempDir,
    child: Child,
}

impl Mariadb {
    fn started() -> Self {
        let dir = tempfile::Builder::new().prefix("keepd-my-").tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::create_dir(dir.path().join("tmp")).unwrap();
        let (data, tmp) = (format!("--datadir={}", path("data")), format!("--tmpdir={}", path("tmp")));
        let user = if rustix::process::geteuid().is_root() { vec!["--user=root"] } else { vec![] };
        let made = Command::new("mariadb-install-db")
            .args(["--no-defaults", &data, &tmp, "--auth-root-authentication-method=normal", "--skip-test-db"])
            .args(&user)
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", text(&made));
        let program =
            ["/usr/sbin/mariadbd", "/usr/bin/mariadbd", "mariadbd"].into_iter().find(|p| Path::new(p).exists()).unwrap_or("mariadbd");
        let child = Command::new(program)
            .args([
                "--no-defaults",
                &data,
                &tmp,
                "--skip-networking",
                "--innodb-buffer-pool-size=32M",
                "--innodb-flush-log-at-trx-commit=0",
            ])
            .args([format!("--socket={}", path("s.sock")), format!("--pid-file={}", path("pid")), format!("--log-error={}", path("log"))])
            .args(&user)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self { dir, child };
        let since = Instant::now();
        while !server.client().args(["-e", "SELECT 1"]).output().unwrap().status.success() {
            let log = fs::read_to_string(server.dir.path().join("log")).unwrap_or_default();
            assert!(since.elapsed() < Duration::from_secs(60), "{log}");
            std::thread::sleep(Duration::from_millis(50));
        }
        server
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s.sock")
    }

    fn client(&self) -> Command {
        let mut command = Command::new("mariadb");
        command.args(["--no-defaults", "-uroot", "--batch", "--skip-column-names"]).stdin(Stdio::null());
        command.arg(format!("--socket={}", self.socket().display()));
        command
    }

    fn sql(&self, sql: &str) -> String {
        let out = self.client().args(["-e", sql]).output().unwrap();
        assert!(out.status.success(), "{sql}: {}", text(&out));
        String::from_utf8(out.stdout).unwrap().trim_end().to_owned()
    }
}

impl Drop for Mariadb {
    fn drop(&mut self) {
        signal(self.child.id(), "TERM");
        let _ = self.child.wait();
    }
}

/// A keepd with a database and files, whose job has these further lines; `sources` are further ones.
fn keepd_with(job: &str, sources: &str) -> Keepd {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 500);
    fs::create_dir_all(keepd.path("files/deep")).unwrap();
    fs::write(keepd.path("files/deep/note.txt"), "a note").unwrap();
    fs::write(keepd.path("files/big"), noise(3 << 20, 5)).unwrap();
    fs::hard_link(keepd.path("files/big"), keepd.path("files/same")).unwrap();
    std::os::unix::fs::symlink("deep/note.txt", keepd.path("files/link")).unwrap();
    fs::File::create(keepd.path("files/sparse")).unwrap().set_len(5 << 20).unwrap();
    reconfigure(&keepd, job, sources);
    keepd.start();
    keepd
}

fn reconfigure(keepd: &Keepd, job: &str, sources: &str) {
    keepd.configure("", job);
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), text + sources).unwrap();
}

/// The run of the newest drill.
fn last_drill(keepd: &Keepd) -> Value {
    let runs = keepd.json(&["run", "list"]);
    let run = runs.as_array().unwrap().iter().find(|r| r["kind"] == "drill").expect("a drill").clone();
    shown_run(keepd, run["id"].as_str().unwrap())
}

/// A run, however it ended.
fn shown_run(keepd: &Keepd, run: &str) -> Value {
    serde_json::from_slice(&keepd.ctl(&["run", "show", run, "--json"]).stdout).unwrap()
}

/// Processes whose command line names a run.
fn processes_of(run: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let own = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) == Some(std::process::id());
        if !own && line.contains(&format!("drill-{run}")) {
            found.push(line);
        }
    }
    found
}

/// Nothing of a drill is left: no files, no notes, no processes.
fn nothing_left(keepd: &Keepd, run: &str) {
    assert_eq!(files_below(&keepd.path("state/work")), [""; 0].map(PathBuf::from));
    assert_eq!(files_below(&keepd.path("state/drills")), [""; 0].map(PathBuf::from));
    assert!(!Path::new("/var/tmp").join(format!("keepd-drill-{run}")).exists());
    let since = Instant::now();
    while !processes_of(run).is_empty() {
        assert!(since.elapsed() < Duration::from_secs(10), "{:?}", processes_of(run));
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn outcome(keepd: &Keepd, backup: &str) -> String {
    let list = keepd.json(&["list"]);
    let found = list.as_array().unwrap().iter().find(|b| b["id"] == backup).unwrap().clone();
    found["outcome"].as_str().unwrap().to_owned()
}

#[test]
fn a_set_of_all_kinds_is_proven_and_nothing_is_left() {
    let (postgres, mariadb) = (Postgres::started(), Mariadb::started());
    postgres.sql("postgres", "CREATE ROLE shopkeeper LOGIN");
    postgres.sql("postgres", "CREATE DATABASE shop OWNER shopkeeper");
    postgres.sql("postgres", "ALTER DATABASE shop SET search_path TO app");
    postgres.sql(
        "shop",
        "CREATE SCHEMA app AUTHORIZATION shopkeeper; SET ROLE shopkeeper; CREATE TABLE app.users (id int PRIMARY KEY, name text); \
         INSERT INTO app.users SELECT n, 'user ' || n FROM generate_series(1, 2000) n",
    );
    mariadb.sql(
        "CREATE DATABASE store; CREATE TABLE store.item (id INT PRIMARY KEY, price INT NOT NULL); \
         INSERT INTO store.item VALUES (1, 10), (2, 20), (3, 30); CREATE VIEW store.dear AS SELECT * FROM store.item WHERE price > 15; \
         CREATE EVENT store.sweep ON SCHEDULE EVERY 1 SECOND DO DELETE FROM store.item WHERE id = 3",
    );
    let dir = tempfile::tempdir().unwrap();
    let seen = dir.path().join("seen");
    let look = dir.path().join("look");
    script(
        &look,
        &format!(
            "set -e; cmp $KEEPD_DRILL_DIR/files/deep/note.txt $(dirname $0)/note; test -s $KEEPD_DRILL_DIR/db/shop.db\n\
             psql -XAtc 'select count(*) from users' >{0}\nmariadb --defaults-file=$KEEPD_MYSQL_DEFAULTS -BNe 'select sum(price) from store.dear' >>{0}\n\
             test -S $MYSQL_UNIX_PORT; echo $KEEPD_JOB $KEEPD_BACKUP >>{0}; echo looked; ulimit -d >>{0}",
            seen.display()
        ),
    );
    fs::write(dir.path().join("note"), "a note").unwrap();
    let job = format!(
        "assert = [\n\
         {{ sql = \"select count(*) = 500 from account\", source = \"db\" }},\n\
         {{ sql = \"select count(*) > 1000 from users\", source = \"pg\" }},\n\
         {{ sql = \"select pg_get_userbyid(relowner) = 'shopkeeper' from pg_class where relname = 'users'\", source = \"pg\", database = \"shop\" }},\n\
         {{ sql = \"select count(*) from dear\", source = \"my\" }},\n\
         {{ file = \"files/deep/note.txt\", min_size = \"6B\" }},\n\
         {{ file = \"words/output\" }},\n\
         {{ command = [\"{}\"], timeout = \"1m\" }} ]\n\
         drill = {{ memory = \"300MiB\" }}",
        look.display()
    );
    let sources = format!(
        "[[job.shop.source]]\nname = \"pg\"\npostgres = {{ dbname = \"shop\", {} }}\n\
         [[job.shop.source]]\nname = \"my\"\nmysql = {{ dbname = \"store\", socket = \"{}\", user = \"root\" }}\n\
         [[job.shop.source]]\nname = \"words\"\ncommand = [\"/bin/echo\", \"some words\"]\n",
        postgres.connection(),
        mariadb.socket().display()
    );
    let keepd = keepd_with(&job, &sources);
    assert!(keepd.ok(&["status"]).contains("never"), "not proven yet");
    keepd.ok(&["backup", "shop"]);
    let (database, backup) = (fs::read(keepd.path("shop.db")).unwrap(), keepd.backups().remove(0));
    let live =
        |server: &Postgres| server.sql("postgres", "select string_agg(datname, ',' order by 1), count(*) from pg_database, pg_roles");
    let (pg_before, my_before) = (live(&postgres), mariadb.sql("show databases; checksum table store.item"));

    let said = keepd.ok(&["drill"]);
    assert!(said.contains("is proven: restored and checked in"), "{said}");
    for wanted in [
        "source db: integrity and references are good, 1 tables have their 500 rows",
        "source pg: shop: 1 tables have their 2000 rows",
        "source my: store: 1 tables have their 3 rows",
        "source words: its file is there",
        "looked",
    ] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    let found = fs::read_to_string(&seen).unwrap();
    assert_eq!(found, format!("2000\n50\nshop {backup}\n{}\n", 300 << 10));
    let run = last_drill(&keepd);
    assert_eq!((run["state"].as_str(), run["backup"].as_str()), (Some("good"), Some(backup.as_str())));
    nothing_left(&keepd, run["id"].as_str().unwrap());
    // The live ones are as they were.
    assert!(fs::read(keepd.path("shop.db")).unwrap() == database);
    assert_eq!(live(&postgres), pg_before);
    assert_eq!(mariadb.sql("show databases; checksum table store.item"), my_before);
    // It is shown everywhere.
    let listed = keepd.json(&["list"])[0].clone();
    let proven = listed["proven"].as_str().unwrap().to_owned();
    let shown = keepd.json(&["show", &backup]);
    assert_eq!(shown["proven"].as_str(), Some(proven.as_str()));
    assert!(shown["proven_seconds"].as_u64().unwrap() >= 1, "{shown}");
    let status = keepd.json(&["status"])["jobs"][0].clone();
    assert_eq!((status["last_proven"].as_str(), &status["recovery_seconds"]), (Some(proven.as_str()), &shown["proven_seconds"]));
    let told = keepd.ok(&["status"]);
    assert!(told.contains("PROVEN") && told.contains("RECOVERY") && !told.contains("never"), "{told}");
    assert!(keepd.ok(&["show", &backup]).contains("restored and checked in"));
    // The repository knows it, too: a ledger that is lost learns it again.
    let mut keepd = keepd;
    keepd.stop();
    fs::remove_file(keepd.path("state/ledger.sqlite")).unwrap();
    keepd.start();
    let since = Instant::now();
    while keepd.json(&["list"])[0]["proven"].as_str() != Some(proven.as_str()) {
        assert!(since.elapsed() < Duration::from_secs(10), "{}", keepd.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn what_does_not_hold_makes_the_backup_suspect_until_it_is_accepted() {
    let job = "assert = [ { sql = \"select sum(balance) from account where id < 0\" }, { file = \"files/missing\" }, { file = \"files/deep/note.txt\", min_size = \"1KiB\" }, \
               { command = [\"/bin/sh\", \"-c\", \"echo canary words; exit 3\"] }, { sql = \"select count(*) from nowhere\" } ]";
    let keepd = keepd_with(job, "");
    keepd.ok(&["backup", "shop"]);
    let backup = keepd.backups().remove(0);
    let said = keepd.fails(1, &["drill", "--job", "shop"]);
    for wanted in [
        "select sum(balance) from account where id < 0' should be true, and is NULL",
        "files/missing should be there",
        "should have 1024 bytes at least, and has 6",
        "exit status 3: canary words",
        "no such table: nowhere",
        "is suspect from now on",
    ] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    assert!(keepd.log().contains("ERROR") && keepd.log().contains("did not stand its drill"), "{}", keepd.log());
    let run = last_drill(&keepd);
    assert_eq!(run["state"].as_str(), Some("failed"));
    nothing_left(&keepd, run["id"].as_str().unwrap());
    let shown: Value = serde_json::from_slice(&keepd.ctl(&["show", &backup, "--json"]).stdout).unwrap();
    assert_eq!((shown["outcome"].as_str(), shown["proven"].as_str()), (Some("suspect"), None));
    assert_eq!(shown["suspect"].as_array().unwrap().len(), 5, "{shown}");
    assert!(keepd.fails(3, &["show", &backup]).contains("files/missing should be there"));
    assert!(keepd.fails(1, &["drill"]).contains("there is no good backup"), "nothing good is left to be drilled");
    assert!(keepd.json(&["status"])["jobs"][0]["last_good"].is_null(), "what turned out to be worthless is no last good backup");
    keepd.ok(&["accept", &backup]);
    assert_eq!(outcome(&keepd, &backup), "good");
    assert_eq!(keepd.json(&["show", &backup])["suspect"].as_array().unwrap().len(), 0);
    // A later drill counts more than the acceptance before it, and the other way round.
    keepd.fails(1, &["drill", &backup]);
    assert_eq!(outcome(&keepd, &backup), "suspect");
    keepd.ok(&["accept", &backup]);
    reconfigure(&keepd, "assert = [ { sql = \"select 'yes'\" } ]", "");
    keepd.ok(&["reload"]);
    keepd.ok(&["drill", &backup[..10]]);
    assert!(keepd.json(&["list"])[0]["proven"].is_string());
    assert_eq!(outcome(&keepd, &backup), "good");
}

#[test]
fn damage_is_found_and_what_cannot_be_tried_says_nothing() {
    let mut keepd = keepd_with("", "");
    assert!(keepd.fails(1, &["drill"]).contains("there is no good backup of job shop yet"));
    assert!(keepd.fails(1, &["drill", "--job", "shpo"]).contains("there is no job 'shpo'; configured are: shop"));
    keepd.ok(&["backup", "shop"]);
    let backup = keepd.backups().remove(0);
    // Too little space is told before anything is written.
    reconfigure(&keepd, "drill = { space = \"1MiB\" }", "");
    keepd.ok(&["reload"]);
    let said = keepd.fails(1, &["drill"]);
    assert!(
        said.contains("bytes of space, and job shop allows 1048576 (drill.space)") && said.contains("says nothing of the backup"),
        "{said}"
    );
    // Nor does a command that is not there, or a time that is over.
    reconfigure(&keepd, "assert = [ { command = [\"/nowhere/at/all\"] } ]", "");
    keepd.ok(&["reload"]);
    assert!(keepd.fails(1, &["drill"]).contains("cannot be run"));
    reconfigure(&keepd, "drill = { timeout = \"1s\", assert = [ { command = [\"/bin/sleep\", \"100\"] } ] }", "");
    keepd.ok(&["reload"]);
    assert!(keepd.fails(1, &["drill"]).contains("was given up after 1s (drill.timeout)"));
    // Nor does a cancel.
    reconfigure(&keepd, "assert = [ { command = [\"/bin/sleep\", \"100\"] } ]", "");
    keepd.ok(&["reload"]);
    let run = keepd.json(&["drill", "--detach"])["run"].as_str().unwrap().to_owned();
    until_step(&keepd, &run, "assertion 1 of 1");
    keepd.ok(&["run", "cancel", &run]);
    assert_eq!(keepd.ctl(&["run", "follow", &run]).status.code(), Some(1));
    nothing_left(&keepd, &run);
    // Nor a storage that is away.
    reconfigure(&keepd, "", "");
    keepd.ok(&["reload"]);
    fs::rename(keepd.path("repository"), keepd.path("away")).unwrap();
    assert!(keepd.fails(1, &["drill"]).contains("could not be drilled"));
    fs::rename(keepd.path("away"), keepd.path("repository")).unwrap();
    assert_eq!(outcome(&keepd, &backup), "good");
    keepd.ok(&["drill"]);
    // A pack with a flipped byte is the backup's fault.
    let pack = keepd.packs().into_iter().max_by_key(|p| fs::metadata(p).unwrap().len()).unwrap();
    let whole = fs::read(&pack).unwrap();
    let mut bytes = whole.clone();
    let half = bytes.len() / 2;
    bytes[half] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let said = keepd.fails(1, &["drill"]);
    assert!(said.contains("is suspect from now on") && said.contains(pack.file_name().unwrap().to_str().unwrap()), "{said}");
    nothing_left(&keepd, last_drill(&keepd)["id"].as_str().unwrap());
    assert_eq!(outcome(&keepd, &backup), "suspect");
    assert!(keepd.json(&["list"])[0]["proven"].is_null(), "no longer proven");
    // So is one that is gone.
    fs::write(&pack, &whole).unwrap();
    keepd.ok(&["accept", &backup]);
    fs::remove_file(&pack).unwrap();
    let said = keepd.fails(1, &["drill", &backup]);
    assert!(said.contains("is suspect from now on"), "{said}");
    assert_eq!(outcome(&keepd, &backup), "suspect");
    keepd.stop();
}

#[test]
fn one_copy_that_is_whole_is_enough() {
    let keepd = keepd_with("", "");
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap().replace("[\"local\"]", "[\"local\", \"second\"]");
    let second = format!("[destination.second]\nservice = \"fs\"\nroot = \"{}\"\nencryption = \"main\"\n", keepd.path("second").display());
    fs::write(keepd.path("keepd.toml"), text + &second).unwrap();
    keepd.ok(&["reload"]);
    keepd.ok(&["backup", "shop"]);
    keepd.damage_a_pack();
    let said = keepd.fails(3, &["drill"]);
    assert!(said.contains("going on with the copy at second") && said.contains("is proven"), "{said}");
    let listed = keepd.json(&["list"])[0].clone();
    assert!(listed["proven"].is_string() && listed["outcome"] == "good", "{listed}");
    for repository in ["repository", "second"] {
        assert_eq!(files_below(&keepd.path(repository).join("marks")).len(), 1, "{repository} knows it");
    }
}

#[test]
fn a_command_of_another_user_sees_what_that_user_may_see() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: root is needed to be somebody else");
        return;
    }
    let look =
        "id -un; cat $KEEPD_DRILL_DIR/files/deep/note.txt; cat $KEEPD_DRILL_DIR/files/secret 2>&1; ls $KEEPD_DRILL_DIR/.. 2>&1; true";
    let keepd = keepd_with(&format!("assert = [ {{ shell = \"{look}\", run_as = \"nobody\" }} ]"), "");
    fs::write(keepd.path("files/secret"), "canary").unwrap();
    fs::set_permissions(keepd.path("files/secret"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    keepd.ok(&["backup", "shop"]);
    let said = keepd.ok(&["drill"]);
    assert!(said.contains("nobody") && said.contains("a note"), "{said}");
    assert!(!said.contains("canary") && said.matches("ermission denied").count() == 2, "{said}");
    nothing_left(&keepd, last_drill(&keepd)["id"].as_str().unwrap());
}

fn until_step(keepd: &Keepd, run: &str, step: &str) {
    let since = Instant::now();
    while shown_run(keepd, run)["step"] != step {
        let now = shown_run(keepd, run);
        assert!(since.elapsed() < Duration::from_secs(60) && now["error"].is_null(), "{now}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_calendar_drills_by_itself_and_now_and_then_an_older_one() {
    let keepd = keepd_with("drill = { every = \"1s\" }", "[job.other]\ndestinations = [\"local\"]\nsource = [{ files = \"/etc/apt\" }]\n");
    keepd.ok(&["backup", "shop"]);
    keepd.ok(&["backup", "shop"]);
    let backups = keepd.backups();
    let drilled = || -> Vec<String> {
        let runs = keepd.json(&["run", "list", "--job", "shop", "-n", "100"]);
        let mut drills: Vec<&Value> = runs.as_array().unwrap().iter().filter(|r| r["kind"] == "drill" && r["state"] == "good").collect();
        drills.reverse();
        assert!(drills.iter().all(|r| r["by"] == "schedule"));
        drills.iter().map(|r| r["backup"].as_str().unwrap().to_owned()).collect()
    };
    let since = Instant::now();
    while drilled().len() < 5 {
        assert!(since.elapsed() < Duration::from_secs(40), "{:?} {}", drilled(), keepd.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    let found = drilled();
    assert_eq!((&found[0], &found[3]), (&backups[0], &backups[1]), "every fourth is an older one: {found:?}");
    assert!(keepd.json(&["list"]).as_array().unwrap().iter().all(|b| b["proven"].is_string()));
    // By hand it must be said which of several jobs.
    let said = keepd.fails(2, &["drill"]);
    assert!(said.contains("other, shop"), "{said}");
}

#[test]
fn a_daemon_that_is_killed_leaves_nothing_for_long() {
    let postgres = Postgres::started();
    postgres.sql("postgres", "CREATE DATABASE shop");
    postgres.sql("shop", "CREATE TABLE users (id int); INSERT INTO users VALUES (1)");
    let sources = format!("[[job.shop.source]]\nname = \"pg\"\npostgres = {{ dbname = \"shop\", {} }}\n", postgres.connection());
    let mut keepd =
        keepd_with("assert = [ { command = [\"/bin/sh\", \"-c\", \"exec tail -f $KEEPD_DRILL_DIR/files/deep/note.txt\"] } ]", &sources);
    keepd.ok(&["backup", "shop"]);
    let run = keepd.json(&["drill", "--detach"])["run"].as_str().unwrap().to_owned();
    until_step(&keepd, &run, "assertion 1 of 1");
    let since = Instant::now();
    while processes_of(&run).len() < 2 {
        assert!(since.elapsed() < Duration::from_secs(10), "a server and a command: {:?}", processes_of(&run));
        std::thread::sleep(Duration::from_millis(20));
    }
    keepd.kill();
    let since = Instant::now();
    while !processes_of(&run).is_empty() {
        assert!(since.elapsed() < Duration::from_secs(20), "{:?}", processes_of(&run));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!files_below(&keepd.path("state/drills")).is_empty(), "it is written down");
    keepd.start();
    nothing_left(&keepd, &run);
    let ended = shown_run(&keepd, &run);
    assert_eq!(ended["state"].as_str(), Some("failed"), "{ended}");
    assert_eq!(outcome(&keepd, &keepd.backups()[0]), "good");
}

#[test]
fn without_server_programs_the_sources_own_server_lends_a_scratch_database() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: root is needed to hide programs");
        return;
    }
    let postgres = Postgres::started();
    postgres.sql("postgres", "CREATE DATABASE shop");
    postgres.sql("shop", "CREATE TABLE users (id int); INSERT INTO users SELECT generate_series(1, 10)");
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 5);
    let sources = format!("[[job.shop.source]]\nname = \"pg\"\npostgres = {{ dbname = \"shop\", {} }}\n", postgres.connection());
    reconfigure(&keepd, "assert = [ { sql = \"select count(*) = 10 from users\", source = \"pg\" } ]", &sources);
    // A program in whose view of the files there is no initdb.
    let hide = format!("mount --bind /dev/null {} && exec \"$@\"", postgres_tools().join("initdb").display());
    let log = fs::File::create(keepd.path("hidden.log")).unwrap();
    let mut child = Command::new("unshare")
        .args(["--mount", "--", "sh", "-c", &hide, "sh"])
        .arg(keepd_binary())
        .arg("--config")
        .arg(keepd.path("keepd.toml"))
        .stderr(log)
        .spawn()
        .unwrap();
    let since = Instant::now();
    while !keepd.ctl(&["status"]).status.success() {
        if child.try_wait().unwrap().is_some() {
            println!("skipped: no mount namespaces here");
            return;
        }
        assert!(since.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    }
    keepd.ok(&["backup", "shop"]);
    let databases = || postgres.sql("postgres", "select string_agg(datname, ',' order by 1) from pg_database");
    let before = databases();
    let said = keepd.ok(&["drill"]);
    assert!(said.contains("into a scratch database of its own server") && said.contains("1 tables have their 10 rows"), "{said}");
    assert_eq!(databases(), before);
    // One that cannot be made is nobody's fault.
    postgres.sql("postgres", "CREATE ROLE reader LOGIN PASSWORD 'canary'; GRANT pg_read_all_data TO reader");
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("weak"), "canary\n").unwrap();
    let weak = text
        .replace("user = \"postgres\"", "user = \"reader\"")
        .replace(&postgres.password_file().display().to_string(), &keepd.path("weak").display().to_string());
    fs::write(keepd.path("keepd.toml"), weak).unwrap();
    keepd.ok(&["reload"]);
    let said = keepd.fails(1, &["drill"]);
    assert!(said.contains("could not be drilled") && said.contains("permission denied"), "{said}");
    assert_eq!(outcome(&keepd, &keepd.backups()[0]), "good");
    signal(child.id(), "TERM");
    child.wait().unwrap();
    keepd.kill();
}
