//! What on a machine is in no job: files, servers, services, and what changes after somebody acknowledged it.

mod common;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::databases::{Postgres, script};
use common::*;
use rustix::fs::inotify;
use serde_json::Value;

/// keepd with jobs as given (DIR stands for its directory), that looks at its own directory and at `roots`; not started.
fn prepared(jobs: &str, roots: &[&Path]) -> Keepd {
    let keepd = Keepd::prepared();
    configure(&keepd, jobs, roots);
    keepd
}

fn configure(keepd: &Keepd, jobs: &str, roots: &[&Path]) {
    let dir = keepd.dir.path().display().to_string();
    let roots: Vec<String> = std::iter::once(dir.clone()).chain(roots.iter().map(|r| r.display().to_string())).collect();
    let text = format!(
        "[daemon]\nstate_dir = \"DIR/state\"\nsocket = \"DIR/keepd.sock\"\n[encryption.main]\nkey_file = \"main.key\"\n\
         [destination.local]\nservice = \"fs\"\nroot = \"DIR/repository\"\nencryption = \"main\"\n\
         [coverage]\nroots = {roots:?}\nexclude = [\"scratch/\"]\n{jobs}"
    );
    fs::write(keepd.path("keepd.toml"), text.replace("DIR", &dir)).unwrap();
}

const JOBS: &str = "[job.shop]\ndestinations = [\"local\"]\n[[job.shop.source]]\nname = \"db\"\nsqlite = \"DIR/shop.db\"\n\
                    [[job.shop.source]]\nname = \"files\"\nfiles = \"DIR/files\"\nexclude = [\"out/\"]\n";

/// Looks, wants this exit status, and gives the answer.
fn look(keepd: &Keepd, code: i32, options: &[&str]) -> Value {
    let out = keepd.ctl(&[&["coverage", "--json"], options].concat());
    assert_eq!(out.status.code(), Some(code), "{}\n{}", text(&out), keepd.log());
    serde_json::from_slice(&out.stdout).unwrap()
}

fn items(coverage: &Value) -> &[Value] {
    coverage["items"].as_array().unwrap()
}

/// The item whose `what` ends so.
fn item<'v>(coverage: &'v Value, end: &str) -> &'v Value {
    let found: Vec<&Value> = items(coverage).iter().filter(|i| i["what"].as_str().unwrap().ends_with(end)).collect();
    assert_eq!(found.len(), 1, "{end} in {coverage:#}");
    found[0]
}

fn has(coverage: &Value, end: &str) -> bool {
    items(coverage).iter().any(|i| i["what"].as_str().unwrap().ends_with(end))
}

fn notes(coverage: &Value) -> String {
    coverage["notes"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect::<Vec<_>>().join("\n")
}

/// A database of a few pages, closed.
fn database(path: &Path) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    drop(make_database(path, 5));
}

#[test]
fn files_that_are_databases_are_found_and_others_are_not() {
    let mut keepd = prepared(JOBS, &[]);
    database(&keepd.path("shop.db"));
    let writer = make_database(&keepd.path("forgotten.db"), 50);
    for name in ["files/inside.db", "files/out/left.db", "srv/node_modules/x.db", "srv/cache/y.db", "srv/scratch/z.db", "srv/torn.sqlite"] {
        database(&keepd.path(name));
    }
    let odd = keepd.path("srv").join(OsStr::from_bytes(b"odd\xff\"name"));
    database(&odd);
    fs::write(keepd.path("srv/cache/CACHEDIR.TAG"), "Signature: 8a477f597d28d172789f06886806bc55\n").unwrap();
    fs::OpenOptions::new().write(true).open(keepd.path("srv/torn.sqlite")).unwrap().set_len(4196).unwrap();
    // What only looks like one.
    fs::write(keepd.path("srv/text.db"), format!("SQLite format 3 is what this is about{}", "x".repeat(2000))).unwrap();
    fs::write(keepd.path("srv/short.db"), b"SQLite format 3\0").unwrap();
    symlink(".", keepd.path("srv/loop")).unwrap();
    symlink("torn.sqlite", keepd.path("srv/link.db")).unwrap();
    assert!(Command::new("mkfifo").arg(keepd.path("srv/pipe.db")).status().unwrap().success());
    fs::create_dir(keepd.path("srv/locked")).unwrap();
    fs::set_permissions(keepd.path("srv/locked"), fs::Permissions::from_mode(0o000)).unwrap();
    keepd.start();
    assert!(keepd.fails(1, &["coverage", "--no-scan"]).contains("nothing was looked at yet"));
    assert!(!keepd.ok(&["status"]).contains("coverage:"));

    // Nobody opens what a job captures; everything else may be.
    let opened = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
    let watch = |name: &str| inotify::add_watch(&opened, keepd.path(name), inotify::WatchFlags::OPEN).unwrap();
    let (captured, other) = (watch("shop.db"), watch("forgotten.db"));
    let found = look(&keepd, 3, &[]);
    let mut space = vec![std::mem::MaybeUninit::uninit(); 64 << 10];
    let mut reader = inotify::Reader::new(&opened, &mut space);
    let mut events = Vec::new();
    while let Ok(event) = reader.next() {
        events.push(event.wd());
    }
    assert!(events.contains(&other) && !events.contains(&captured), "{events:?}");

    let dir = keepd.dir.path().canonicalize().unwrap();
    let forgotten = item(&found, "/forgotten.db");
    assert_eq!(forgotten["what"], dir.join("forgotten.db").to_str().unwrap());
    assert_eq!((&forgotten["kind"], &forgotten["gap"], &forgotten["reason"]), (&"sqlite".into(), &true.into(), &"in no job".into()));
    assert_eq!(forgotten["covered_by"], Value::Array(vec![]));
    let wal = fs::metadata(keepd.path("forgotten.db-wal")).unwrap().len();
    assert!(wal > 0 && forgotten["bytes"].as_u64().unwrap() >= wal, "what is in the log counts: {forgotten}");
    assert!(forgotten["modified"].as_str().unwrap().starts_with("20"));
    assert!(forgotten["acknowledged"].is_null() && forgotten["drift"].is_null());
    let suggestion = forgotten["suggestion"].as_str().unwrap();
    assert_eq!(suggestion, format!("[[job.NAME.source]]\nsqlite = \"{}\"\n", dir.join("forgotten.db").display()));
    let shop = item(&found, "/shop.db");
    assert_eq!((&shop["gap"], &shop["covered_by"][0]), (&false.into(), &"shop/db".into()));
    let inside = item(&found, "/inside.db");
    assert_eq!((&inside["gap"], &inside["covered_by"][0]), (&true.into(), &"shop/files".into()));
    assert!(inside["reason"].as_str().unwrap().contains("captured as a plain file by shop/files"));
    assert!(inside["suggestion"].as_str().unwrap().contains("[[job.shop.source]]"), "{inside}");
    assert!(item(&found, "/left.db")["reason"].as_str().unwrap().contains("shop/files leaves it out (exclude)"));
    assert_eq!(item(&found, "/odd\\xff\"name")["suggestion"], Value::Null);
    assert!(item(&found, "/torn.sqlite")["gap"].as_bool().unwrap());
    for name in ["text.db", "short.db", "link.db", "pipe.db", "node_modules/x.db", "cache/y.db", "scratch/z.db", "ledger.sqlite"] {
        assert!(!has(&found, name), "{name} in {found:#}");
    }
    assert_eq!(items(&found).iter().filter(|i| i["kind"] == "sqlite").count(), 6, "{found:#}");
    let skipped = &found["skipped"];
    assert_eq!(skipped["caches and directories of the base system"], 2, "{skipped}");
    assert_eq!(skipped["directories excluded by the configuration"], 1, "{skipped}");
    assert!(skipped["directories of keepd's own"].as_u64().unwrap() >= 1, "{skipped}");
    if !rustix::process::geteuid().is_root() {
        assert!(found["unreadable"].as_u64().unwrap() >= 1 && notes(&found).contains("srv/locked"), "{}", notes(&found));
    }
    // Without systemd that is told.
    if !Path::new("/run/systemd/system").exists() {
        assert!(notes(&found).contains("the services of systemd cannot be listed"), "{}", notes(&found));
    }
    let all = look(&keepd, 3, &["--all"]);
    assert!(has(&all, "node_modules/x.db") && has(&all, "cache/y.db") && !has(&all, "scratch/z.db"), "{all:#}");

    // For people.
    let told = keepd.fails(3, &["coverage", "-v"]);
    for wanted in ["forgotten.db", "in no job", "1 covered", "[[job.NAME.source]]", "left out: ", "captured as a database"] {
        assert!(told.contains(wanted), "{wanted} in {told}");
    }
    let told = keepd.fails(3, &["coverage", "--no-progress"]);
    assert!(!told.contains("captured as a database") && told.contains("1 covered (-v shows them)"), "{told}");
    assert_eq!(keepd.fails(3, &["coverage", "-q"]), "");
    keepd.fails(2, &["coverage", "--all", "--no-scan"]);
    drop(writer);
    fs::set_permissions(keepd.path("srv/locked"), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn what_is_acknowledged_is_quiet_until_something_changes() {
    let mut keepd = prepared(JOBS, &[]);
    for name in ["shop.db", "srv/a.db", "srv/b.db", "srv/deep/c.db"] {
        database(&keepd.path(name));
    }
    keepd.start();
    assert!(keepd.fails(1, &["coverage", "--acknowledge"]).contains("nothing was looked at yet"));
    let found = look(&keepd, 3, &[]);
    assert_eq!((&found["counts"]["gaps"], &found["counts"]["new_gaps"]), (&3.into(), &0.into()));
    assert!(keepd.ok(&["status"]).contains("coverage: 3 gaps (looked at "));
    let a = item(&found, "/a.db")["what"].as_str().unwrap().to_owned();
    let deep = Path::new(&a).with_file_name("deep").display().to_string() + "/";
    let told = keepd.fails(1, &["coverage", "--acknowledge", &a, "/nowhere.db"]);
    assert!(told.contains("'/nowhere.db' is no gap of the last scan"), "{told}");
    assert_eq!(look(&keepd, 3, &["--no-scan"])["counts"]["acknowledged"], 0, "all or nothing");
    assert!(keepd.ok(&["coverage", "--acknowledge", &a, &deep]).contains("2 gaps acknowledged"));
    let found = look(&keepd, 3, &["--no-scan"]);
    assert!(item(&found, "/a.db")["acknowledged"].as_str().unwrap().starts_with("20"));
    assert_eq!((&found["counts"]["gaps"], &found["counts"]["acknowledged"]), (&1.into(), &2.into()));
    let told = keepd.fails(3, &["coverage"]);
    assert!(!told.contains("/a.db") && told.contains("/b.db") && told.contains("2 acknowledged (--acknowledged shows them)"), "{told}");
    assert!(keepd.fails(3, &["coverage", "--no-scan", "--acknowledged"]).contains("/a.db"));
    assert_eq!(keepd.json(&["coverage", "--acknowledge"])["acknowledged"], 1, "all that are left");
    let told = keepd.ok(&["coverage"]);
    assert!(told.contains("no gaps; 1 covered"), "{told}");

    // A database comes, one goes, one loses its source.
    database(&keepd.path("srv/new.db"));
    fs::remove_file(keepd.path("srv/b.db")).unwrap();
    configure(&keepd, &JOBS.replace("shop.db", "other.db"), &[]);
    keepd.ok(&["reload"]);
    let found = look(&keepd, 3, &[]);
    assert_eq!(item(&found, "/new.db")["drift"], "new");
    assert_eq!(item(&found, "/shop.db")["drift"], "uncovered");
    assert_eq!(item(&found, "/a.db")["drift"], Value::Null);
    assert_eq!(found["vanished"].as_array().unwrap().len(), 1);
    assert!(found["vanished"][0].as_str().unwrap().ends_with("/b.db"));
    assert!(notes(&found).contains("shop/db: the database"), "{}", notes(&found));
    assert!(items(&found)[0]["drift"].is_string() && items(&found)[1]["drift"].is_string(), "what is new comes first");
    let told = keepd.fails(3, &["coverage", "--no-scan"]);
    for wanted in ["no longer covered", "new", "gone: ", "2 gaps, 2 new since "] {
        assert!(told.contains(wanted), "{wanted} in {told}");
    }
    assert!(keepd.ok(&["status"]).contains("coverage: 2 gaps, 2 new since "));
    // It outlives the daemon.
    keepd.stop();
    keepd.start();
    assert_eq!(look(&keepd, 3, &["--no-scan"]), found);
    assert!(keepd.ok(&["coverage", "--forget", &a]).contains("1 gap no longer acknowledged"));
    assert_eq!(look(&keepd, 3, &["--no-scan"])["counts"]["gaps"], 3);
    assert!(keepd.fails(1, &["coverage", "--forget", &a]).contains("is no acknowledged gap"));
}

/// A MariaDB server without a password, that only its socket leads to.
struct MariaDb(Child);

impl MariaDb {
    fn started(dir: &Path) -> Self {
        fs::create_dir_all(dir.join("tmp")).unwrap();
        let own = |option: &str, name: &str| format!("--{option}={}", dir.join(name).display());
        let root = rustix::process::geteuid().is_root();
        let user = root.then_some("--user=root");
        let mut install = Command::new("mariadb-install-db");
        install.args(["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"]).args(user);
        let out = install.args([own("datadir", "data"), own("tmpdir", "tmp")]).output().unwrap();
        assert!(out.status.success(), "{}", text(&out));
        let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin";
        let mut command = Command::new("mariadbd");
        command.env("PATH", path).args(["--no-defaults", "--skip-networking", "--innodb-buffer-pool-size=32M"]).args(user);
        command.args([
            own("datadir", "data"),
            own("tmpdir", "tmp"),
            own("socket", "mysqld.sock"),
            own("pid-file", "pid"),
            own("log-error", "log"),
        ]);
        let server = Self(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let since = Instant::now();
        let ask = || {
            let mut client = Command::new("mariadb");
            client.args(["--no-defaults", "-uroot"]).arg(own("socket", "mysqld.sock"));
            client.args(["-e", "create database if not exists wiki; create table if not exists wiki.page (id int)"]).output().unwrap()
        };
        while !ask().status.success() {
            assert!(since.elapsed() < Duration::from_secs(60), "{}", fs::read_to_string(dir.join("log")).unwrap_or_default());
            std::thread::sleep(Duration::from_millis(50));
        }
        server
    }
}

impl Drop for MariaDb {
    fn drop(&mut self) {
        signal(self.0.id(), "TERM");
        let _ = self.0.wait();
    }
}

/// Ends with its test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn databases_of_servers_are_found_however_the_server_is_reached() {
    let (server, stranger) = (Postgres::started(), Postgres::started());
    server.sql("postgres", "create database shop");
    server.sql("postgres", "create database forgotten");
    let homes: Vec<PathBuf> = [&server, &stranger].iter().map(|s| s.password_file().parent().unwrap().to_owned()).collect();
    let jobs =
        |dbname: &str| format!("{JOBS}[[job.shop.source]]\nname = \"pg\"\npostgres = {{ dbname = {dbname}, {} }}\n", server.connection());
    let roots: Vec<&Path> = homes.iter().map(PathBuf::as_path).collect();
    let mut keepd = prepared(&jobs("\"shop\""), &roots);
    database(&keepd.path("shop.db"));
    let _mariadb = MariaDb::started(&keepd.path("mariadb"));
    fs::create_dir(keepd.path("redis")).unwrap();
    // Debian's redis-server is redis-check-rdb under another name, which may be the only one that is installed.
    std::os::unix::fs::symlink("/usr/bin/redis-check-rdb", keepd.path("redis-server")).unwrap();
    let mut redis = Command::new(keepd.path("redis-server"));
    redis.args(["--port", "0", "--save", "", "--dir"]).arg(keepd.path("redis")).arg("--unixsocket").arg(keepd.path("redis/s"));
    let redis = Process(redis.stdout(Stdio::null()).spawn().unwrap());
    let since = Instant::now();
    while !keepd.path("redis/s").exists() {
        assert!(since.elapsed() < Duration::from_secs(20), "redis does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    keepd.start();
    let found = look(&keepd, 3, &[]);
    let shop = item(&found, "postgres shop");
    assert_eq!((&shop["gap"], &shop["covered_by"][0], &shop["kind"]), (&false.into(), &"shop/pg".into(), &"database".into()));
    assert_eq!(shop["where"], format!("localhost:{}", server.port));
    assert!(shop["bytes"].as_u64().unwrap() > 1 << 20, "{shop}");
    let forgotten = item(&found, "postgres forgotten");
    assert_eq!((&forgotten["gap"], &forgotten["reason"]), (&true.into(), &"in no job".into()));
    let suggestion = forgotten["suggestion"].as_str().unwrap();
    assert!(suggestion.starts_with("[[job.shop.source]]\npostgres = { dbname = \"forgotten\", host = \"127.0.0.1\""), "{suggestion}");
    assert!(suggestion.contains("password = { file = ") && !suggestion.contains("canary"), "{suggestion}");
    assert!(!has(&found, "postgres postgres"), "it is empty: {found:#}");
    assert_eq!(found["skipped"]["databases without tables that every server has"], 1);
    // The other server wants a password and no job has one.
    let at = format!(".s.PGSQL.{}", stranger.port);
    let unasked = item(&found, &at);
    assert!(unasked["gap"].as_bool().unwrap() && unasked["reason"].as_str().unwrap().contains("cannot be asked: "), "{unasked}");
    assert!(!has(&found, &format!(".s.PGSQL.{}", server.port)), "a job leads to it: {found:#}");
    if rustix::process::geteuid().is_root() {
        let wiki = item(&found, "mysql wiki");
        assert_eq!((&wiki["gap"], &wiki["covered_by"]), (&true.into(), &Value::Array(vec![])));
        assert!(wiki["suggestion"].as_str().unwrap().contains("mysqld.sock"), "{wiki}");
        assert_eq!(items(&found).iter().filter(|i| i["what"].as_str().unwrap().starts_with("mysql")).count(), 1, "{found:#}");
    }
    let redis_item = item(&found, "/redis");
    assert!(redis_item["what"].as_str().unwrap().starts_with("redis in ") && redis_item["gap"].as_bool().unwrap(), "{redis_item}");
    assert!(!found.to_string().contains("canary"), "no secret is told");

    // All of the server, the other server by its job, and a command for the one without databases.
    let more = format!(
        "{}[[job.shop.source]]\nname = \"pg2\"\npostgres = {{ dbname = \"*\", {} }}\n\
         [[job.shop.source]]\nname = \"cache\"\ncommand = [\"/usr/bin/redis-cli\", \"--rdb\", \"-\"]\n",
        jobs("\"*\""),
        stranger.connection()
    );
    configure(&keepd, &more, &roots);
    keepd.ok(&["reload"]);
    let found = look(&keepd, if rustix::process::geteuid().is_root() { 3 } else { 0 }, &[]);
    assert_eq!(item(&found, "postgres forgotten")["covered_by"][0], "shop/pg");
    assert!(!has(&found, &at), "{found:#}");
    assert_eq!(item(&found, "/redis")["covered_by"][0], "shop/cache");
    // A server of a job that does not answer.
    drop(server);
    let found = look(&keepd, 3, &[]);
    assert!(notes(&found).contains("the server of shop/pg cannot be asked"), "{}", notes(&found));
    drop(redis);
}

#[test]
fn directories_of_services_and_volumes_are_told_unless_a_job_has_them() {
    let mut keepd = prepared(JOBS, &[]);
    let dir = keepd.dir.path().display().to_string();
    for name in ["shop.db", "app/data/a.db", "only/b.db"] {
        database(&keepd.path(name));
    }
    for name in ["app/data/upload.bin", "files/app/x", "docker/volumes/wiki/_data/page.txt", "half/known/x"] {
        fs::create_dir_all(keepd.path(name).parent().unwrap()).unwrap();
        fs::write(keepd.path(name), noise(3000, 7)).unwrap();
    }
    fs::create_dir(keepd.path("empty")).unwrap();
    let unit = |id: &str, more: &str| format!("echo 'Id={id}'; echo MainPID=0; {more}; echo");
    let lines = [
        "case \"$1\" in list-units) echo 'app.service loaded active running The app'; echo 'ssh.service loaded active running x';; *)",
        "case \"$*\" in *ssh.service*) exit 3;; esac",
        &unit("app.service", &format!("echo 'WorkingDirectory=!{dir}/app'; echo 'ReadWritePaths=-{dir}/files/app {dir}/only /var/lib'")),
        &unit("empty.service", &format!("echo 'BindPaths={dir}/empty:/x:rbind {dir}/gone'; echo WorkingDirectory=/")),
        ";; esac",
    ];
    script(&keepd.path("bin/systemctl"), &lines.join("\n"));
    keepd.environment = vec![("PATH".into(), format!("{dir}/bin:{}", std::env::var("PATH").unwrap()))];
    keepd.start();
    let found = look(&keepd, 3, &[]);
    let directories: Vec<&Value> = items(&found).iter().filter(|i| i["kind"] == "data-directory").collect();
    assert_eq!(directories.len(), 3, "{directories:#?}");
    let app = item(&found, &format!("{dir}/app"));
    assert_eq!(
        (&app["where"], &app["gap"], &app["bytes"]),
        (&"app.service".into(), &true.into(), &3000.into()),
        "the database is counted by itself"
    );
    assert!(app["suggestion"].as_str().unwrap().contains("files = "));
    assert_eq!(item(&found, "/files/app")["covered_by"][0], "shop/files");
    let volume = item(&found, "/wiki/_data");
    assert_eq!((&volume["where"], &volume["gap"]), (&"volume wiki of Docker".into(), &true.into()));
    assert!(item(&found, "/app/data/a.db")["gap"].as_bool().unwrap() && item(&found, "/only/b.db")["gap"].as_bool().unwrap());

    configure(&keepd, &format!("{JOBS}[[job.shop.source]]\nname = \"app\"\nfiles = \"DIR/app/data\"\n"), &[]);
    keepd.ok(&["reload"]);
    let app = look(&keepd, 3, &[]);
    let app = item(&app, &format!("{dir}/app"));
    assert_eq!((&app["gap"], &app["covered_by"][0]), (&false.into(), &"shop/app".into()), "all that is in it lies below the source: {app}");
}

#[test]
fn a_scan_leaves_a_capture_alone_and_can_be_cancelled() {
    let hanging = "[[job.slow.source]]\nname = \"pg\"\npostgres = { dbname = \"x\", bin_dir = \"DIR/tools\" }\n";
    let mut keepd = prepared(JOBS, &[]);
    // A rollback journal: the capture relies on locks that closing any descriptor of the file would drop.
    let db = make_database(&keepd.path("shop.db"), 60_000);
    db.execute_batch("PRAGMA journal_mode = DELETE").unwrap();
    keepd.start();
    let mut backup = keepd.ctl_command(&["backup", "shop", "--no-progress"]).stdout(Stdio::null()).spawn().unwrap();
    let mut scans = 0;
    while backup.try_wait().unwrap().is_none() {
        let transfer = "BEGIN IMMEDIATE; UPDATE account SET balance = balance + 1 WHERE id = 1; UPDATE account SET balance = balance - 1 WHERE id = 2; COMMIT";
        db.execute_batch(transfer).unwrap();
        look(&keepd, 0, &[]);
        scans += 1;
    }
    assert!(scans > 0 && backup.wait().unwrap().success(), "{}", keepd.log());
    let restored = keepd.restored("latest").join("db/shop.db");
    assert_eq!(proven_sum(&restored), 6_000_000, "{scans} scans");
    drop(db);

    script(&keepd.path("tools/psql"), "exec sleep 60");
    configure(&keepd, &format!("{JOBS}[job.slow]\ndestinations = [\"local\"]\n{hanging}"), &[]);
    keepd.ok(&["reload"]);
    let scan = keepd.ctl_command(&["coverage"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let since = Instant::now();
    let run = loop {
        assert!(since.elapsed() < Duration::from_secs(20), "{}", keepd.log());
        let runs = keepd.json(&["run", "list", "-n", "1"]);
        if runs[0]["kind"] == "coverage" && runs[0]["state"] == "running" && runs[0]["step"] == "asking database servers" {
            break runs[0]["id"].as_str().unwrap().to_owned();
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(keepd.fails(1, &["coverage"]).contains("such a scan is running already"));
    keepd.ok(&["run", "cancel", &run]);
    let out = scan.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(1), "{}", text(&out));
    assert!(text(&out).contains("was cancelled") && since.elapsed() < Duration::from_secs(20), "{}", text(&out));
    assert!(items(&look(&keepd, 0, &["--no-scan"])).len() == 1, "what was found before stays");
}

#[test]
fn wrong_tables_are_refused() {
    let keepd = prepared(JOBS, &[]);
    let good = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    for (line, wanted) in [("roots = []", "is empty"), ("roots = [\"srv\"]", "not an absolute path"), ("rots = []", "did you mean 'roots'")]
    {
        let text = good.lines().map(|l| if l.starts_with("roots = ") { line } else { l }).collect::<Vec<_>>().join("\n");
        fs::write(keepd.path("keepd.toml"), text).unwrap();
        let out = keepd.command().arg("--check").output().unwrap();
        assert!(!out.status.success() && common::text(&out).contains(wanted), "{line}: {}", common::text(&out));
    }
}
