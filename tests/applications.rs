//! Whole applications: databases of a real server, commands, sets that fit together, hooks, quiesce, labels.

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::databases::{PASSWORD, Postgres, postgres_tools, script};
use common::*;

/// Another job of the configuration, as the tables below `[job.NAME]`.
fn add_job(keepd: &Keepd, name: &str, job: &str, sources: &str) {
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let sources = sources.replace("[[source]]", &format!("[[job.{name}.source]]"));
    fs::write(keepd.path("keepd.toml"), format!("{text}\n[job.{name}]\ndestinations = [\"local\"]\n{job}\n{sources}")).unwrap();
}

/// keepd with one more job `app`, started.
fn with_app(job: &str, sources: &str) -> Keepd {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 10);
    add_job(&keepd, "app", job, &sources.replace("DIR", &keepd.dir.path().display().to_string()));
    keepd.start();
    keepd
}

fn app_backups(keepd: &Keepd) -> usize {
    keepd.json(&["list", "--job", "app"]).as_array().unwrap().len()
}

fn latest(keepd: &Keepd) -> serde_json::Value {
    keepd.json(&["show", "latest", "--job", "app"])
}

fn fact<'v>(backup: &'v serde_json::Value, source: &str, name: &str) -> &'v serde_json::Value {
    let sources = backup["sources"].as_array().unwrap();
    &sources.iter().find(|s| s["name"] == source).unwrap()["facts"][name]
}

const SCHEMA: &str = "create table account (id int primary key, balance bigint not null);
    insert into account select n, 100 from generate_series(1, 100) n;
    create table upload (path text primary key, account int not null references account(id));
    create table note (id serial primary key, body text not null);
    insert into note (body) select repeat(md5(n::text), 10) from generate_series(1, 3000) n;
    create table \"Odd.Name\" (a text); insert into \"Odd.Name\" values (E'a\\nb\\tc\\\\.'), (null);
    create view rich as select * from account where balance > 100;
    create function total() returns bigint language sql as 'select sum(balance)::bigint from account'";

#[test]
fn a_database_and_its_uploads_fit_each_other_while_the_application_goes_on() {
    let server = Arc::new(Postgres::started());
    server.sql("postgres", "create database shop");
    server.sql("shop", SCHEMA);
    let keepd = with_app(
        "",
        &format!(
            "[[source]]\nname = \"db\"\npostgres = {{ dbname = \"shop\", {} }}\nreferences = {{ sql = \"select path from upload\", under = \"uploads\" }}\n\
             [[source]]\nname = \"uploads\"\nfiles = \"DIR/uploads\"\n",
            server.connection()
        ),
    );
    let uploads = keepd.path("uploads");
    fs::create_dir(&uploads).unwrap();
    // The application: transfers keep the sum, a file is there before its row and goes after it.
    let stop = Arc::new(AtomicBool::new(false));
    let application = {
        let (server, stop, uploads) = (server.clone(), stop.clone(), uploads.clone());
        std::thread::spawn(move || {
            let mut psql = server.psql("shop").args(["-f", "-"]).stdin(std::process::Stdio::piped()).spawn().unwrap();
            let mut pipe = psql.stdin.take().unwrap();
            for n in 0u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                use std::io::Write;
                let name = format!("{n:06}.bin");
                fs::write(uploads.join(&name), noise(2000, n + 1)).unwrap();
                let (a, b) = (n % 100 + 1, (n * 7 + 3) % 100 + 1);
                writeln!(
                    pipe,
                    "begin; update account set balance = balance - 1 where id = {a}; update account set balance = balance + 1 where id = {b}; \
                     insert into upload values ('{name}', {a}); commit;"
                )
                .unwrap();
                // Of the older ones every other one goes, its row first; all in the order of one connection.
                if n >= 1500 && n % 2 == 0 {
                    let old = format!("{:06}.bin", n - 1500);
                    writeln!(pipe, "delete from upload where path = '{old}';\n\\! rm '{}'", uploads.join(&old).display()).unwrap();
                }
                std::thread::sleep(Duration::from_millis(3));
            }
            drop(pipe);
            assert!(psql.wait().unwrap().success());
        })
    };
    std::thread::sleep(Duration::from_millis(6000));
    for round in 0..4 {
        let told = keepd.ok(&["backup", "app"]);
        let backup = latest(&keepd);
        assert_eq!(backup["outcome"], "good", "{told}");
        let restored = keepd.restored("latest");
        assert!(!restored.join("app").exists());
        let dump = keepd.path(&format!("out-{round}"));
        keepd.ok(&["restore", "latest", "--job", "app", "--to", dump.to_str().unwrap()]);
        let copy = format!("copy{round}");
        keepd.ok(&["restore", "latest", "--job", "app", "--to-database", &copy]);
        assert_eq!(server.sql(&copy, "select total()"), "10000");
        let named = server.sql(&copy, "select path from upload");
        assert!(named.lines().count() > 5, "{named}");
        for path in named.lines() {
            assert!(dump.join("uploads").join(path).exists(), "round {round}: {path} is named and not there");
        }
        let rows: u64 = server.sql(&copy, "select count(*) from upload").parse().unwrap();
        assert_eq!(*fact(&backup, "db", "tables").get("public.upload").unwrap(), rows);
        assert_eq!(fact(&backup, "db", "tables")["public.Odd.Name"], 2);
        assert_eq!(fact(&backup, "db", "tables")["public.note"], 3000);
        assert!(fact(&backup, "db", "server_version").as_str().unwrap().contains('.'));
    }
    stop.store(true, Ordering::Relaxed);
    application.join().unwrap();
    // The dump is one that PostgreSQL's own tool reads.
    let listed =
        std::process::Command::new(postgres_tools().join("pg_restore")).arg("-l").arg(keepd.path("out-3/db/shop.dump")).output().unwrap();
    assert!(listed.status.success() && text(&listed).contains("TABLE DATA public account"), "{}", text(&listed));
    let globals = fs::read_to_string(keepd.path("out-3/db/globals.sql")).unwrap();
    assert!(globals.contains("CREATE ROLE postgres") && globals.contains("SCRAM-SHA-256"), "{globals}");
    // A file that a row names and nobody has.
    server.sql("shop", "insert into upload values ('lost/one.bin', 1), ('./lost/two.bin', 1)");
    let told = keepd.fails(3, &["backup", "app"]);
    assert!(told.contains("2 of ") && told.contains("lost/one.bin, lost/two.bin"), "{told}");
    assert_eq!(latest_of_any_outcome(&keepd)["outcome"], "suspect");
}

fn latest_of_any_outcome(keepd: &Keepd) -> serde_json::Value {
    keepd.json(&["list", "--job", "app"]).as_array().unwrap()[0].clone()
}

#[test]
fn a_database_comes_back_beside_in_place_and_in_part() {
    let server = Postgres::started();
    server.sql("postgres", "create database \"My Shop\"");
    server.sql("postgres", "create role clerk login");
    server.sql("My Shop", SCHEMA);
    server.sql("My Shop", "alter database \"My Shop\" set work_mem to '7MB'; alter table note owner to clerk");
    let keepd = with_app("", &format!("[[source]]\nname = \"db\"\npostgres = {{ dbname = \"My Shop\", {} }}\n", server.connection()));
    keepd.ok(&["backup", "app"]);
    let id = latest(&keepd)["id"].as_str().unwrap().to_owned();
    // An unchanged dump costs nothing but its metadata, a changed row a piece.
    keepd.ok(&["backup", "app"]);
    assert_eq!(fact(&latest(&keepd), "db", "changed_bytes").as_u64().map(|n| n < 10_000), Some(true), "{}", latest(&keepd));
    server.sql("My Shop", "update note set body = 'changed' where id = 1500");
    keepd.ok(&["backup", "app"]);
    assert!(fact(&latest(&keepd), "db", "changed_bytes").as_u64().unwrap() < 20_000);

    keepd.ok(&["restore", &id, "--to-database", "beside"]);
    assert_eq!(
        server.sql("beside", "select total(), (select count(*) from rich), (select body <> 'changed' from note where id = 1500)"),
        "10000|0|t"
    );
    assert_eq!(server.sql("beside", "show work_mem"), "7MB");
    assert_eq!(server.sql("beside", "select tableowner from pg_tables where tablename = 'note'"), "clerk");
    let told = keepd.fails(1, &["restore", &id, "--to-database", "beside"]);
    assert!(told.contains("is there already") && told.contains("--replace"), "{told}");
    keepd.ok(&["restore", &id, "--to-database", "part", "--table", "account", "--table", "public.note"]);
    assert_eq!(
        server.sql("part", "select string_agg(tablename, ' ' order by tablename) from pg_tables where schemaname = 'public'"),
        "account note"
    );
    let told = keepd.fails(1, &["restore", &id, "--to-database", "none", "--table", "nothing"]);
    assert!(told.contains("has no table 'nothing' in this backup; it has public.Odd.Name, public.account"), "{told}");

    // In place: what is there is kept under another name; a connected application is told, not thrown out.
    server.sql("My Shop", "delete from note; create table later (a int)");
    assert!(keepd.fails(2, &["restore", &id, "--to", "/nowhere", "--table", "note"]).contains("cannot be used with"));
    assert!(keepd.fails(2, &["restore", &id, "--in-place", "--replace"]).contains("cannot be used with"));
    let told = keepd.fails(2, &["restore", &id, "--in-place"]);
    assert!(told.contains("--yes"), "{told}");
    let mut connected = server.psql("My Shop").args(["-c", "select pg_sleep(60)"]).spawn().unwrap();
    let since = Instant::now();
    loop {
        let told = keepd.ctl(&["restore", &id, "--in-place", "--yes"]);
        if text(&told).contains("is in use by psql (postgres, pid") {
            break;
        }
        assert!(since.elapsed() < Duration::from_secs(20), "{}", text(&told));
    }
    connected.kill().unwrap();
    connected.wait().unwrap();
    server.sql(
        "postgres",
        "select pg_terminate_backend(pid) from pg_stat_activity where query like '%pg_sleep(60)%' and pid <> pg_backend_pid()",
    );
    let since = Instant::now();
    let told = loop {
        let out = keepd.ctl(&["restore", &id, "--in-place", "--yes"]);
        if out.status.success() {
            break text(&out);
        }
        assert!(since.elapsed() < Duration::from_secs(20), "{}", text(&out));
    };
    assert!(told.contains("DROP DATABASE \"My Shop_before_"), "{told}");
    assert_eq!(server.sql("My Shop", "select count(*) from note"), "3000");
    let all = server.sql("postgres", "select datname from pg_database");
    let aside = all.lines().find(|l| l.starts_with("My Shop_before_")).unwrap();
    assert_eq!(server.sql(aside, "select count(*) from later"), "0");
    assert!(!all.contains("keepd_"), "no scratch database stays: {all}");
}

#[test]
fn all_databases_of_a_server_and_a_role_that_may_not_read_passwords() {
    let server = Postgres::started();
    for database in ["one", "two", "a/b"] {
        server.sql("postgres", &format!("create database \"{database}\""));
        server.sql(database, "create table t (a int); insert into t values (1), (2); grant select on t to public");
    }
    server.sql("postgres", &format!("create role keeper login password '{PASSWORD}'"));
    let keepd = with_app(
        "",
        &format!(
            "[[source]]\nname = \"db\"\npostgres = {{ dbname = \"*\", {} }}\n",
            server.connection().replace("\"postgres\"", "\"keeper\"")
        ),
    );
    let told = keepd.ok(&["backup", "app"]);
    let to = keepd.path("out");
    keepd.ok(&["restore", "latest", "--job", "app", "--to", to.to_str().unwrap()]);
    let names: Vec<_> = files_below(&to.join("db")).iter().map(|p| p.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    assert_eq!(names, ["a%2Fb.dump", "globals.sql", "one.dump", "postgres.dump", "two.dump"], "{told}");
    assert_eq!(fact(&latest(&keepd), "db", "tables")["two.public.t"], 2);
    let globals = fs::read_to_string(to.join("db/globals.sql")).unwrap();
    assert!(globals.contains("CREATE ROLE keeper") && !globals.contains("SCRAM"), "{globals}");
    assert!(keepd.ok(&["show", "latest", "--job", "app"]).contains("passwords are not in the backup"));
    let told = keepd.fails(1, &["restore", "latest", "--job", "app", "--to-database", "x"]);
    assert!(told.contains("--database"), "{told}");
    server.sql("postgres", "alter role keeper createdb");
    keepd.ok(&["restore", "latest", "--job", "app", "--database", "a/b", "--to-database", "ab", "--no-owner"]);
    assert_eq!(server.sql("ab", "select count(*) from t"), "2");
}

#[test]
fn a_dump_that_is_not_whole_is_no_backup() {
    let server = Postgres::started();
    server.sql("postgres", "create database shop");
    server.sql("shop", SCHEMA);
    let tools = tempfile::tempdir().unwrap();
    let real = postgres_tools();
    for name in ["pg_dump", "pg_dumpall", "psql", "pg_restore"] {
        std::os::unix::fs::symlink(real.join(name), tools.path().join(name)).unwrap();
    }
    let keepd = with_app(
        "",
        &format!(
            "[[source]]\nname = \"db\"\npostgres = {{ dbname = \"shop\", bin_dir = \"{}\", timeout = \"5s\", {} }}\n",
            tools.path().display(),
            server.connection()
        ),
    );
    keepd.ok(&["backup", "app"]);
    let dump = real.join("pg_dump").display().to_string();
    let cases = [
        ("dies after half of it", format!("{dump} \"$@\" | head -c 60000; echo 'out of memory' >&2; exit 1"), "out of memory"),
        ("cuts it off and says nothing", format!("{dump} \"$@\" | head -c 60000"), "cut off"),
        ("leaves the last byte out", format!("{dump} \"$@\" | head -c -1"), "cut off"),
        ("cuts the contents off", format!("{dump} \"$@\" | head -c 500"), "table of contents"),
        ("prints nothing", "exit 0".into(), "empty"),
        ("prints something else", "echo hello; exit 0".into(), "does not begin like an archive"),
        ("prints all and fails", format!("{dump} \"$@\"; exit 3"), "exit status 3"),
        ("is killed", format!("{dump} \"$@\" | head -c 60000; kill -9 $$"), "signal 9"),
        ("hangs", format!("{dump} \"$@\" | head -c 60000; sleep 300"), "gave nothing for 5 s"),
        (
            "is older than the server",
            "echo 'pg_dump: error: aborting because of server version mismatch' >&2; echo 'pg_dump: detail: server version: 99.1; pg_dump version: 15.2' >&2; exit 1"
                .into(),
            "the server is newer than the tools",
        ),
    ];
    for (what, lines, wanted) in cases {
        let _ = fs::remove_file(tools.path().join("pg_dump"));
        script(&tools.path().join("pg_dump"), &lines);
        let told = keepd.fails(1, &["backup", "app"]);
        assert!(told.contains(wanted), "a tool that {what}: {told}");
        assert_eq!(app_backups(&keepd), 1, "a tool that {what}");
    }
    fs::remove_file(tools.path().join("pg_dump")).unwrap();
    let told = keepd.fails(1, &["backup", "app"]);
    assert!(told.contains("pg_dump") && told.contains("is it installed"), "{told}");
    // What is asked for and shown of a real one: no password on a command line, nor in an environment.
    let seen = keepd.path("seen");
    for name in ["pg_dump", "pg_dumpall", "psql", "pg_restore"] {
        let _ = fs::remove_file(tools.path().join(name));
        let real = real.join(name).display().to_string();
        script(&tools.path().join(name), &format!("{{ echo \"$0 $@\"; env; }} >>{}; exec {real} \"$@\"", seen.display()));
    }
    keepd.ok(&["backup", "app"]);
    keepd.ok(&["restore", "latest", "--job", "app", "--to-database", "again"]);
    let seen = fs::read_to_string(seen).unwrap();
    assert!(["pg_dump ", "pg_dumpall ", "psql ", "pg_restore "].iter().all(|t| seen.contains(t)), "{seen}");
    assert!(!seen.contains("canary"), "{seen}");
    assert!(!keepd.log().contains("canary"));
    // Wrong in other ways.
    fs::write(
        keepd.path("keepd.toml"),
        fs::read_to_string(keepd.path("keepd.toml")).unwrap().replace("dbname = \"shop\"", "dbname = \"moon\""),
    )
    .unwrap();
    keepd.ok(&["reload"]);
    let told = keepd.fails(1, &["backup", "app"]);
    assert!(told.contains("database moon") && told.contains("does not exist"), "{told}");
    fs::write(server.password_file(), "wrong\n").unwrap();
    let told = keepd.fails(1, &["backup", "app"]);
    assert!(told.contains("password authentication failed") && told.contains("give the source user and password"), "{told}");
}

#[test]
fn what_a_command_prints_comes_back_through_another() {
    let data = tempfile::tempdir().unwrap();
    let path = data.path().join("data");
    fs::write(&path, noise(5_000_000, 3)).unwrap();
    let shown = path.display();
    let keepd = with_app(
        "",
        &format!(
            "[[source]]\nname = \"cache\"\ncommand = [\"/bin/sh\", \"-c\", \"echo a word >&2; cat {shown}; . {shown}.after\"]\n\
             restore_command = [\"/bin/sh\", \"-c\", \"cat >{shown}.part && mv {shown}.part {shown}.back; . {shown}.after\"]\nfile = \"cache.rdb\"\nmin_size = \"1KiB\"\ntimeout = \"2s\"\n"
        ),
    );
    let after = data.path().join("data.after");
    fs::write(&after, "true").unwrap();
    keepd.ok(&["backup", "app"]);
    assert_eq!(fact(&latest(&keepd), "cache", "said"), "a word");
    // An insertion in the middle costs a piece or two.
    let mut longer = fs::read(&path).unwrap();
    longer.splice(2_000_000..2_000_000, *b"inserted");
    fs::write(&path, &longer).unwrap();
    keepd.ok(&["backup", "app"]);
    let changed = fact(&latest(&keepd), "cache", "changed_bytes").as_u64().unwrap();
    assert!((8..30_000).contains(&changed), "{changed}");
    let to = keepd.path("out");
    keepd.ok(&["restore", "latest", "--job", "app", "--to", to.to_str().unwrap()]);
    assert!(fs::read(to.join("cache/cache.rdb")).unwrap() == longer);
    keepd.ok(&["restore", "latest", "--job", "app", "--in-place", "--yes"]);
    assert!(fs::read(data.path().join("data.back")).unwrap() == longer);
    fs::write(&after, "echo disk full >&2; exit 9").unwrap();
    let told = keepd.fails(1, &["restore", "latest", "--job", "app", "--in-place", "--yes", "--no-safety-backup"]);
    assert!(told.contains("exit status 9: disk full"), "{told}");
    let before = app_backups(&keepd);
    let told = keepd.fails(1, &["backup", "app"]);
    assert!(told.contains("exit status 9: a word\n    disk full"), "{told}");
    fs::write(&after, "sleep 100").unwrap();
    let told = keepd.fails(1, &["backup", "app"]);
    assert!(told.contains("did not end for 2 s") || told.contains("gave nothing for 2 s"), "{told}");
    fs::write(&after, "true").unwrap();
    fs::write(&path, "little").unwrap();
    let told = keepd.fails(1, &["backup", "app"]);
    assert!(told.contains("printed 6 bytes, at least 1024 are wanted"), "{told}");
    assert_eq!(app_backups(&keepd), before);
    // A restore that breaks off never looks like the end of all: the command is ended before its input is.
    let mut keepd = keepd;
    keepd.stop();
    let packs: Vec<_> = keepd.packs().into_iter().map(|p| (fs::read(&p).unwrap(), p)).collect();
    for (bytes, pack) in packs.iter().filter(|(bytes, _)| bytes.len() > 1_000_000) {
        let mut damaged = bytes.clone();
        damaged[bytes.len() / 2] ^= 1;
        fs::write(pack, damaged).unwrap();
    }
    fs::remove_file(data.path().join("data.back")).unwrap();
    keepd.start();
    let told = keepd.fails(1, &["restore", "latest", "--job", "app", "--in-place", "--yes", "--no-safety-backup"]);
    assert!(told.contains("packs/"), "{told}");
    assert!(!data.path().join("data.back").exists(), "half of it was taken for all: {told}");
    keepd.stop();
    for (bytes, pack) in &packs {
        fs::write(pack, bytes).unwrap();
    }
    // A lost state is made again from the repository, and the dump is not stored anew.
    fs::write(&path, &longer).unwrap();
    fs::remove_dir_all(keepd.path("state")).unwrap();
    keepd.start();
    keepd.ok(&["backup", "app"]);
    assert_eq!(fact(&latest(&keepd), "cache", "changed_bytes"), 0);
}

#[test]
fn what_vanishes_while_a_set_is_captured_is_kept_and_what_comes_is_taken() {
    // The command in the middle is the application that goes on.
    let keepd = with_app(
        "",
        "[[source]]\nfiles = \"DIR/app\"\n\
         [[source]]\nname = \"between\"\ncommand = [\"/bin/sh\", \"-c\", \"cd DIR/app && rm -r gone a/gone dir z-vanishes && echo new >new && echo more >>grown && mkdir later && echo x >later/x && rm turned && mkdir turned && echo y >turned/y && rmdir was && echo f >was; echo done\"]\n",
    );
    let app = keepd.path("app");
    for dir in ["a", "dir/deep", "was"] {
        fs::create_dir_all(app.join(dir)).unwrap();
    }
    for name in ["gone", "a/gone", "a/stays", "dir/deep/gone", "grown", "turned"] {
        fs::write(app.join(name), name).unwrap();
    }
    fs::write(app.join("a/large"), noise(600_000, 4)).unwrap();
    fs::hard_link(app.join("a/stays"), app.join("z-linked")).unwrap();
    fs::hard_link(app.join("a/stays"), app.join("z-vanishes")).unwrap();
    keepd.ok(&["backup", "app"]);
    let to = keepd.path("out");
    keepd.ok(&["restore", "latest", "--job", "app", "--to", to.to_str().unwrap()]);
    let out = to.join("app");
    let has = |name: &str| fs::read_to_string(out.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    for (name, wanted) in [
        ("gone", "gone"),
        ("a/gone", "a/gone"),
        ("dir/deep/gone", "dir/deep/gone"),
        ("z-vanishes", "a/stays"),
        ("new", "new\n"),
        ("grown", "grownmore\n"),
        ("later/x", "x\n"),
    ] {
        assert_eq!(has(name), wanted);
    }
    assert_eq!((has("turned/y").as_str(), has("was").as_str()), ("y\n", "f\n"));
    assert_eq!(fs::read(out.join("a/large")).unwrap(), noise(600_000, 4));
    let backup = latest(&keepd);
    let count = fact(&backup, "app", "vanished_and_kept");
    assert_eq!(*count, 3);
    keepd.ok(&["check", "local", "--read-data"]);
}

#[test]
fn hooks_get_their_arguments_and_the_run_and_a_failing_one_stops_it() {
    let seen = tempfile::tempdir().unwrap();
    let file = seen.path().join("seen");
    let log = file.display();
    let hook = |name: &str| {
        format!("{name} = {{ shell = \"echo $KEEPD_EVENT $KEEPD_JOB $KEEPD_OUTCOME ${{KEEPD_ERROR:+error}} >>{log}; . {log}.{name}\" }}")
    };
    let all = ["before", "after", "on_failure", "before_restore", "after_restore"].map(hook).join(", ");
    for name in ["before", "after", "on_failure", "before_restore", "after_restore"] {
        fs::write(seen.path().join(format!("seen.{name}")), "true").unwrap();
    }
    let keepd = with_app(
        &format!("hooks = {{ {all} }}"),
        &format!(
            "[[source]]\nname = \"c\"\ncommand = [\"/bin/sh\", \"-c\", \"cat {log}.data\"]\nrestore_command = [\"/bin/sh\", \"-c\", \"cat >/dev/null\"]\n"
        ),
    );
    let events = || {
        let text = fs::read_to_string(&file).unwrap_or_default();
        let _ = fs::remove_file(&file);
        text.lines().map(|l| l.trim().to_owned()).collect::<Vec<_>>()
    };
    fs::write(seen.path().join("seen.data"), "data").unwrap();
    keepd.ok(&["backup", "app"]);
    assert_eq!(events(), ["before app", "after app good"]);
    keepd.ok(&["restore", "latest", "--job", "app", "--in-place", "--yes"]);
    assert_eq!(events(), ["before_restore app", "after_restore app good"]);
    // What a hook says is kept in the run; control characters are not.
    fs::write(seen.path().join("seen.before"), "printf 'prepared \\033[31mall\\n'; exit 0").unwrap();
    keepd.ok(&["backup", "app"]);
    let run = keepd.json(&["run", "list", "--job", "app"])[0]["id"].as_str().unwrap().to_owned();
    let told = keepd.ok(&["run", "show", &run]);
    assert!(told.contains("prepared") && !told.contains('\u{1b}'), "{told}");
    events();
    // A failing one stops the run, and what follows knows.
    fs::write(seen.path().join("seen.before"), "echo not today >&2; exit 4").unwrap();
    let told = keepd.fails(1, &["backup", "app"]);
    assert!(told.contains("hook before: ") && told.contains("exit status 4: not today"), "{told}");
    assert_eq!(events(), ["before app", "on_failure app failed error"]);
    // One was made to be safe.
    assert_eq!(app_backups(&keepd), 3);
    fs::write(seen.path().join("seen.before"), "true").unwrap();
    fs::remove_file(seen.path().join("seen.data")).unwrap();
    keepd.fails(1, &["backup", "app"]);
    assert_eq!(events(), ["before app", "on_failure app failed error"]);
    // A failing `after` does not take the backup back.
    fs::write(seen.path().join("seen.data"), "data").unwrap();
    fs::write(seen.path().join("seen.after"), "exit 5").unwrap();
    let told = keepd.fails(3, &["backup", "app"]);
    assert!(told.contains("the backup is made, but hook after"), "{told}");
    assert_eq!(app_backups(&keepd), 4);
    fs::write(seen.path().join("seen.before_restore"), "exit 6").unwrap();
    events();
    assert!(keepd.fails(1, &["restore", "latest", "--job", "app", "--in-place", "--yes"]).contains("hook before_restore"));
    assert_eq!(events(), ["before_restore app", "on_failure app failed error"]);
}

#[test]
fn no_shell_looks_at_arguments_and_a_hook_has_its_time() {
    let seen = tempfile::tempdir().unwrap();
    let out = seen.path().join("out");
    let program = seen.path().join("hook");
    script(&program, &format!("for a in \"$@\"; do echo \"<$a>\"; done >{}; env >>{}", out.display(), out.display()));
    let mut keepd = with_app(
        &format!(
            "hooks = {{ before = [\"{}\", \"$(touch x)\", \"a b\", \"*\", \"\"], on_failure = {{ command = [\"/bin/sh\", \"-c\", \"sleep 50\"], timeout = \"1s\" }} }}",
            program.display()
        ),
        "[[source]]\nname = \"c\"\ncommand = [\"/bin/cat\", \"/nowhere\"]\n",
    );
    keepd.environment = vec![("KEEPD_TEST_SECRET".into(), "canary".into())];
    keepd.stop();
    keepd.start();
    let since = Instant::now();
    let told = keepd.fails(1, &["backup", "app"]);
    assert!(since.elapsed() < Duration::from_secs(20));
    assert!(told.contains("/nowhere"), "{told}");
    let text = fs::read_to_string(&out).unwrap();
    assert!(text.starts_with("<$(touch x)>\n<a b>\n<*>\n<>\n"), "{text}");
    assert!(text.contains("KEEPD_TYPE=manual") && !text.contains("canary"), "{text}");
    assert!(keepd.log().contains("did not end for 1 s"), "{}", keepd.log());
}

/// A `systemctl` that knows two units, by files in a directory.
fn fake_systemctl(dir: &Path) -> (String, String) {
    let d = dir.display();
    script(
        &dir.join("bin/systemctl"),
        &format!(
            "for unit; do :; done\necho \"$@\" >>{d}/calls\ncase \"$*\" in\n\
             show*) [ -e {d}/units/$unit ] && echo LoadState=loaded || echo LoadState=not-found; echo ActiveState=$(cat {d}/units/$unit 2>/dev/null) ;;\n\
             *stop*) [ -e {d}/stubborn ] && {{ echo 'Access denied' >&2; exit 4; }}; echo inactive >{d}/units/$unit ;;\n\
             *start*) echo active >{d}/units/$unit ;;\nesac"
        ),
    );
    fs::create_dir_all(dir.join("units")).unwrap();
    ("PATH".into(), format!("{d}/bin:{}", std::env::var("PATH").unwrap()))
}

#[test]
fn services_stand_still_while_they_are_captured_and_never_longer() {
    let world = tempfile::tempdir().unwrap();
    let unit = |name: &str| world.path().join("units").join(name);
    let state = |name: &str| fs::read_to_string(unit(name)).unwrap().trim().to_owned();
    let path = fake_systemctl(world.path());
    fs::write(unit("shop.service"), "active").unwrap();
    fs::write(unit("worker.service"), "active").unwrap();
    fs::write(unit("idle.service"), "inactive").unwrap();
    let w = world.path().display();
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 10);
    add_job(
        &keepd,
        "app",
        "services = [\"shop.service\", \"worker.service\", \"idle.service\"]\nquiesce = true",
        &format!("[[source]]\nname = \"c\"\ncommand = [\"/bin/sh\", \"-c\", \"cat {w}/units/*; . {w}/more\"]\ntimeout = \"60s\"\n"),
    );
    keepd.environment = vec![path];
    fs::write(world.path().join("more"), "true").unwrap();
    keepd.start();
    keepd.ok(&["backup", "app"]);
    let to = keepd.path("out");
    keepd.ok(&["restore", "latest", "--job", "app", "--to", to.to_str().unwrap()]);
    assert_eq!(fs::read_to_string(to.join("c/output")).unwrap().replace('\n', ""), "inactiveinactiveinactive");
    assert_eq!([state("shop.service"), state("worker.service"), state("idle.service")], ["active", "active", "inactive"]);
    let calls = fs::read_to_string(world.path().join("calls")).unwrap();
    let starts: Vec<&str> = calls.lines().filter(|l| l.contains(" start ")).map(|l| l.rsplit(' ').next().unwrap()).collect();
    assert_eq!(starts, ["worker.service", "shop.service"], "{calls}");
    // A capture that fails.
    fs::write(world.path().join("more"), "exit 1").unwrap();
    keepd.fails(1, &["backup", "app"]);
    assert_eq!([state("shop.service"), state("worker.service")], ["active", "active"]);
    // A daemon that is killed meanwhile.
    fs::write(world.path().join("more"), "sleep 60").unwrap();
    keepd.ok(&["backup", "app", "--detach"]);
    let since = Instant::now();
    while state("worker.service") == "active" {
        assert!(since.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(state("shop.service"), "inactive");
    keepd.kill();
    keepd.start();
    let since = Instant::now();
    while state("shop.service") != "active" || state("worker.service") != "active" {
        assert!(since.elapsed() < Duration::from_secs(20), "{}", keepd.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(state("idle.service"), "inactive");
    let since = Instant::now();
    while files_below(&keepd.path("state/quiesced")).iter().any(|p| p.exists()) {
        assert!(since.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    }
    // What cannot be stopped is told, and nothing is captured.
    fs::write(world.path().join("more"), "true").unwrap();
    fs::write(world.path().join("stubborn"), "").unwrap();
    let before = app_backups(&keepd);
    let told = keepd.fails(1, &["backup", "app"]);
    assert!(told.contains("service shop.service could not be stopped") && told.contains("Access denied"), "{told}");
    fs::remove_file(world.path().join("stubborn")).unwrap();
    fs::remove_file(unit("idle.service")).unwrap();
    let told = keepd.fails(1, &["backup", "app"]);
    assert!(told.contains("systemd knows no unit idle.service"), "{told}");
    assert_eq!(app_backups(&keepd), before);
    assert_eq!([state("shop.service"), state("worker.service")], ["active", "active"]);
}

#[test]
fn a_maintenance_mode_is_always_ended() {
    let world = tempfile::tempdir().unwrap();
    let w = world.path().display();
    let keepd = with_app(
        &format!("quiesce = {{ begin = [\"/usr/bin/touch\", \"{w}/on\"], end = [\"/bin/rm\", \"{w}/on\"] }}"),
        &format!("[[source]]\nname = \"c\"\ncommand = [\"/bin/sh\", \"-c\", \"ls {w}; . {w}/more\"]\n"),
    );
    fs::write(world.path().join("more"), "true").unwrap();
    keepd.ok(&["backup", "app"]);
    assert!(!world.path().join("on").exists());
    let out = keepd.ok(&["cat", "latest", "--job", "app", "c/output"]);
    assert_eq!(out, "more\non\n");
    fs::write(world.path().join("more"), "exit 1").unwrap();
    keepd.fails(1, &["backup", "app"]);
    assert!(!world.path().join("on").exists());
    fs::write(world.path().join("more"), "sleep 60").unwrap();
    let run = keepd.json(&["backup", "app", "--detach"])["run"].as_str().unwrap().to_owned();
    let since = Instant::now();
    while !world.path().join("on").exists() {
        assert!(since.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    }
    keepd.ok(&["run", "cancel", &run]);
    while world.path().join("on").exists() {
        assert!(since.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn backups_are_named_described_and_found_again() {
    let keepd = with_app(
        "version = [\"/bin/echo\", \"shop 4.2\\nmore\"]\nschema_version = { sql = \"select max(id) from account\", source = \"data\" }",
        "[[source]]\nname = \"data\"\nsqlite = \"DIR/shop.db\"\n",
    );
    keepd.ok(&[
        "backup",
        "app",
        "--name",
        "before the move",
        "--description",
        "all is well",
        "--label",
        "ticket=7",
        "--type",
        "pre-update",
    ]);
    keepd.ok(&["backup", "app", "--label", "ticket=8"]);
    let backup = &keepd.json(&["list", "--job", "app"])[1];
    assert_eq!(
        (&backup["version"], &backup["schema_version"], &backup["description"]),
        (&"shop 4.2".into(), &"9".into(), &"all is well".into())
    );
    for (filter, count) in [
        (&["--type", "pre-update"][..], 1),
        (&["--name", "before the move"], 1),
        (&["--label", "ticket=8"], 1),
        (&["--label", "ticket=8", "--type", "pre-update"], 0),
        (&["--app-version", "shop 4.2"], 2),
        (&["--app-version", "shop 4.3"], 0),
    ] {
        assert_eq!(keepd.json(&[&["list", "--job", "app"], filter].concat()).as_array().unwrap().len(), count, "{filter:?}");
    }
    assert!(keepd.ok(&["list", "--job", "app"]).contains("version shop 4.2"));
    let shown = keepd.ok(&["show", keepd.json(&["list", "--job", "app"])[1]["id"].as_str().unwrap()]);
    assert!(shown.contains("all is well") && shown.contains("schema version  9"), "{shown}");
    assert!(keepd.fails(2, &["list", "--label", "ticket"]).contains("key=value"));
    // What cannot be found out is told, and no reason to have no backup.
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), text.replace("/bin/echo", "/nowhere/echo").replace("max(id) from account", "moon from account"))
        .unwrap();
    keepd.ok(&["reload"]);
    let told = text_of(&keepd, &["backup", "app"]);
    assert!(told.contains("version: cannot start /nowhere/echo") && told.contains("no such column: moon"), "{told}");
    assert_eq!(keepd.json(&["list", "--job", "app"])[0]["version"], serde_json::Value::Null);
}

fn text_of(keepd: &Keepd, arguments: &[&str]) -> String {
    let out = keepd.ctl(arguments);
    assert!(out.status.success(), "{}", text(&out));
    text(&out)
}

#[test]
fn runs_that_want_the_same_wait_for_each_other() {
    let world = tempfile::tempdir().unwrap();
    let w = world.path().display();
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 10);
    let source = format!(
        "[[source]]\nname = \"c\"\ncommand = [\"/bin/sh\", \"-c\", \"echo begin >>{w}/log; sleep 1; echo end >>{w}/log; echo x\"]\n"
    );
    add_job(&keepd, "app", "", &source);
    add_job(&keepd, "other", "", &source);
    keepd.start();
    let runs: Vec<String> =
        ["app", "other"].iter().map(|job| keepd.json(&["backup", job, "--detach"])["run"].as_str().unwrap().to_owned()).collect();
    for run in &runs {
        keepd.ok(&["run", "follow", run]);
    }
    assert_eq!(fs::read_to_string(world.path().join("log")).unwrap(), "begin\nend\nbegin\nend\n");
}
