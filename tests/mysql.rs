//! A real MariaDB server as a source: captured while it is written to, lost, and brought back.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::*;

/// With all that an options file could stumble over.
const PASSWORD: &str = r##"canary-5e1d p"#';\ "##;
const ACCOUNTS: i64 = 50;

const SHOP: &str = "
CREATE DATABASE shop CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci;
USE shop;
CREATE TABLE account (id INT PRIMARY KEY, balance INT NOT NULL, note TEXT) ENGINE = InnoDB;
CREATE TABLE transfer (id INT PRIMARY KEY AUTO_INCREMENT, source INT NOT NULL, target INT NOT NULL, amount INT NOT NULL,
  FOREIGN KEY (source) REFERENCES account (id), FOREIGN KEY (target) REFERENCES account (id)) ENGINE = InnoDB;
CREATE TABLE logged (id INT, what TEXT) ENGINE = InnoDB;
CREATE TABLE `odd ``name; (x` (id INT, b BLOB, t TEXT, g INT AS (id + 1) VIRTUAL) ENGINE = InnoDB;
CREATE TABLE old_fashioned (id INT PRIMARY KEY, t TEXT) ENGINE = MyISAM;
CREATE SEQUENCE numbers START WITH 10;
CREATE FUNCTION double_of(x INT) RETURNS INT DETERMINISTIC RETURN 2 * x;
CREATE PROCEDURE note_it(x INT) INSERT INTO logged VALUES (x, 'INSERT INTO `logged` VALUES (1),(2);');
CREATE VIEW rich AS SELECT id, double_of(balance) AS twice FROM account WHERE balance > 0;
CREATE VIEW richer AS SELECT * FROM rich;
CREATE TRIGGER watch AFTER INSERT ON transfer FOR EACH ROW INSERT INTO logged VALUES (NEW.id, 'it''s (noted)');
CREATE EVENT sweep ON SCHEDULE EVERY 1 DAY STARTS '2030-01-01 00:00:00' DO DELETE FROM logged WHERE id < 0;
INSERT INTO `odd ``name; (x` (id, b, t) VALUES (1, X'00FF275C', 'a\\'b),(\\\\'), (2, NULL, 'line\\nbreak\\r\\n');
INSERT INTO old_fashioned VALUES (1, 'x'), (2, 'y'), (3, 'z');
";

struct Server {
    dir: PathBuf,
    port: u16,
    child: Child,
}

impl Server {
    fn started(dir: &Path) -> Self {
        let dir = dir.join("server");
        fs::create_dir_all(dir.join("tmp")).unwrap();
        // A server removes what it takes for its own temporary tables, those of other servers too.
        let tmp = format!("--tmpdir={}", dir.join("tmp").display());
        let data = format!("--datadir={}", dir.join("data").display());
        let root = rustix::process::geteuid().is_root();
        let mut install = Command::new("mariadb-install-db");
        install.args(["--no-defaults", &data, &tmp, "--auth-root-authentication-method=normal", "--skip-test-db"]);
        let out = if root { install.arg("--user=root") } else { &mut install }.output().unwrap();
        assert!(out.status.success(), "{}", text(&out));
        let port = common::servers::free_port();
        let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin";
        let mut command = Command::new("mariadbd");
        command.env("PATH", path).args(["--no-defaults", &data, &tmp, "--bind-address=127.0.0.1", "--innodb-buffer-pool-size=32M"]);
        command.args([format!("--socket={}", dir.join("s.sock").display()), format!("--port={port}")]);
        command.args([format!("--pid-file={}", dir.join("pid").display()), format!("--log-error={}", dir.join("log").display())]);
        command.args(["--event-scheduler=ON", "--innodb-flush-log-at-trx-commit=0"]);
        if root {
            command.arg("--user=root");
        }
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let server = Self { dir, port, child };
        let since = Instant::now();
        while !server.client().args(["-e", "SELECT 1"]).output().unwrap().status.success() {
            assert!(since.elapsed() < Duration::from_secs(60), "{}", fs::read_to_string(server.dir.join("log")).unwrap_or_default());
            std::thread::sleep(Duration::from_millis(50));
        }
        // A person's own rights, by the socket; keepd's by the network.
        let password = PASSWORD.replace('\\', "\\\\").replace('\'', "''");
        server.sql(&format!(
            "CREATE USER keepd@'127.0.0.1' IDENTIFIED BY '{password}'; CREATE USER keepd@localhost IDENTIFIED BY '{password}'; \
             GRANT ALL ON *.* TO keepd@'127.0.0.1' WITH GRANT OPTION; GRANT ALL ON *.* TO keepd@localhost WITH GRANT OPTION"
        ));
        server
    }

    fn client(&self) -> Command {
        let mut command = Command::new("mariadb");
        command.args(["--no-defaults", "-uroot", "--batch", "--skip-column-names"]).stdin(Stdio::null());
        command.arg(format!("--socket={}", self.dir.join("s.sock").display()));
        command
    }

    fn sql(&self, sql: &str) -> String {
        let out = self.client().args(["-e", sql]).output().unwrap();
        assert!(out.status.success(), "{sql}: {}", text(&out));
        String::from_utf8(out.stdout).unwrap().trim_end().to_owned()
    }

    fn make_shop(&self) {
        let accounts: Vec<String> = (0..ACCOUNTS).map(|id| format!("({id}, 100, 'it''s {}')", "note ".repeat(200))).collect();
        let transfers: Vec<String> = (0..20_000).map(|n| format!("({}, {}, 1)", n % ACCOUNTS, (n * 7) % ACCOUNTS)).collect();
        let file = self.dir.join("shop.sql");
        let transfers = transfers.join(",");
        let sql = format!(
            "{SHOP} INSERT INTO account VALUES {}; INSERT INTO transfer (source, target, amount) VALUES {transfers};",
            accounts.join(",")
        );
        fs::write(&file, sql).unwrap();
        let out = self.client().stdin(fs::File::open(&file).unwrap()).output().unwrap();
        assert!(out.status.success(), "{}", text(&out));
    }

    /// Moves money until it is told to stop.
    fn write_until(&self, stop: &AtomicBool) {
        let mut n = 1i64;
        while !stop.load(Ordering::Relaxed) {
            let mut sql = String::new();
            for _ in 0..20 {
                n = (n * 48271) % 2147483647;
                let (a, b) = (n % ACCOUNTS, (n / 7) % ACCOUNTS);
                sql += &format!(
                    "START TRANSACTION; UPDATE shop.account SET balance = balance - 1 WHERE id = {a}; UPDATE shop.account SET balance = balance + 1 \
                     WHERE id = {b}; INSERT INTO shop.transfer (source, target, amount) VALUES ({a}, {b}, 1); COMMIT;"
                );
            }
            self.sql(&sql);
        }
    }

    /// That nothing but whole transactions is in it, and that what is no table works.
    fn prove(&self, database: &str) {
        let ask = |sql: &str| self.sql(&format!("USE {database}; {sql}"));
        assert_eq!(ask("SELECT sum(balance) FROM account"), (ACCOUNTS * 100).to_string());
        assert_eq!(ask("SELECT count(*) FROM transfer"), ask("SELECT count(*) FROM logged"), "the trigger and its table are of one moment");
        let moved = "SELECT count(*) FROM (SELECT a.id, a.balance - 100 - coalesce((SELECT sum(amount) FROM transfer WHERE target = a.id AND id > 20000), 0) \
                     + coalesce((SELECT sum(amount) FROM transfer WHERE source = a.id AND id > 20000), 0) AS off FROM account a) x WHERE off <> 0";
        assert_eq!(ask(moved), "0", "accounts and transfers are of one moment");
        assert_eq!(ask("SELECT hex(b), t, g FROM `odd ``name; (x` WHERE id = 1"), "00FF275C\ta'b),(\\\\\t2");
        assert_eq!(ask("SELECT hex(t) FROM `odd ``name; (x` WHERE id = 2"), "6C696E650A627265616B0D0A");
        assert_eq!(ask("SELECT count(*) FROM richer"), ask("SELECT count(*) FROM account WHERE balance > 0"));
        assert_eq!(ask("SELECT count(*) FROM old_fashioned"), "3");
        let before: i64 = ask("SELECT count(*) FROM logged").parse().unwrap();
        ask("CALL note_it(7); INSERT INTO transfer (source, target, amount) VALUES (1, 1, 0)");
        assert_eq!(ask("SELECT count(*) FROM logged"), (before + 2).to_string(), "routine and trigger");
        ask("DELETE FROM logged WHERE id = 7 OR id = (SELECT max(id) FROM transfer); DELETE FROM transfer WHERE amount = 0");
        assert!(
            self.client()
                .args(["-e", &format!("INSERT INTO {database}.transfer (source, target, amount) VALUES (1, 999999, 1)")])
                .output()
                .unwrap()
                .status
                .code()
                == Some(1)
        );
        assert!(ask("SELECT nextval(numbers)").parse::<i64>().unwrap() >= 10);
        let foreign = format!(
            "SELECT DISTINCT unique_constraint_schema FROM information_schema.referential_constraints WHERE constraint_schema = '{database}'"
        );
        assert_eq!(self.sql(&foreign), database);
        let charset = format!("SELECT default_collation_name FROM information_schema.schemata WHERE schema_name = '{database}'");
        assert_eq!(self.sql(&charset), "utf8mb4_unicode_ci");
    }

    fn event(&self, database: &str) -> String {
        self.sql(&format!(
            "SELECT event_name, status, definer, character_set_client FROM information_schema.events WHERE event_schema = '{database}'"
        ))
    }

    fn databases(&self) -> Vec<String> {
        let own = ["information_schema", "mysql", "performance_schema", "sys"];
        self.sql("SHOW DATABASES").lines().filter(|d| !own.contains(d)).map(str::to_owned).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whatever happens, the writer is told to stop.
struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A keepd with one job that captures from a server.
struct World {
    keepd: Keepd,
    server: Server,
}

impl World {
    fn started() -> Self {
        let keepd = Keepd::prepared();
        let server = Server::started(keepd.dir.path());
        server.make_shop();
        fs::write(keepd.path("password"), format!("{PASSWORD}\n")).unwrap();
        fs::create_dir(keepd.path("bin")).unwrap();
        let mut world = Self { keepd, server };
        for tool in ["mariadb", "mariadb-dump"] {
            world.wrap(tool, "exec \"$real\" \"$@\"");
        }
        world.configure("dbname = \"shop\"", "");
        world.keepd.start();
        world
    }

    /// A tool that notes what it was given, and then does this.
    fn wrap(&self, tool: &str, then: &str) {
        let path = self.keepd.path("bin").join(tool);
        let notes = self.keepd.path("notes");
        let script = format!(
            "#!/bin/sh\nreal=/usr/bin/{tool}\n{{ echo \"{tool} $*\"; env; cat /proc/self/environ /proc/$$/cmdline | tr '\\0' '\\n'; }} >>{}\n\
             case \"$*\" in *--version*) exec \"$real\" \"$@\";; esac\n{then}\n",
            notes.display()
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn configure(&self, databases: &str, more: &str) {
        let d = self.keepd.dir.path().display();
        let port = self.server.port;
        let text = format!(
            "[daemon]\nstate_dir = \"{d}/state\"\nsocket = \"{d}/keepd.sock\"\n[encryption.main]\nkey_file = \"main.key\"\n\
             [destination.local]\nservice = \"fs\"\nroot = \"{d}/repository\"\nencryption = \"main\"\n\
             [job.shop]\ndestinations = [\"local\"]\n\
             [[job.shop.source]]\nname = \"db\"\nmysql = {{ {databases}, host = \"127.0.0.1\", port = {port}, user = \"keepd\", \
             password = {{ file = \"{d}/password\" }}, bin_dir = \"{d}/bin\"{more} }}\n"
        );
        fs::write(self.keepd.path("keepd.toml"), text).unwrap();
    }

    fn reconfigure(&self, databases: &str, more: &str) {
        self.configure(databases, more);
        self.keepd.ok(&["reload"]);
    }

    /// A backup that fails, and leaves nothing behind; what was said.
    fn fails(&self) -> String {
        let before = self.keepd.backups();
        let said = self.keepd.fails(1, &["backup", "shop"]);
        assert_eq!(self.keepd.backups(), before, "a failed run is no backup: {said}");
        assert!(!said.contains("canary"), "{said}");
        said
    }
}

#[test]
fn a_live_database_comes_back() {
    let world = World::started();
    let World { keepd, server } = &world;
    server.sql("DELETE FROM shop.logged; INSERT INTO shop.logged SELECT id, 'first' FROM shop.transfer");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| server.write_until(&stop));
        let stopping = Stopping(&stop);
        for _ in 0..3 {
            keepd.ok(&["backup", "shop"]);
        }
        drop(stopping);
    });
    let list = keepd.json(&["list"]);
    assert_eq!((list.as_array().unwrap().len(), list[0]["outcome"].as_str()), (3, Some("good")), "{list}");
    assert!(list[0]["added_bytes"].as_u64() < Some(200_000), "an increment is small: {list}");
    let show = keepd.json(&["show", "latest"]);
    let facts = &show["sources"][0]["facts"];
    let tables = &facts["tables"];
    assert_eq!(
        (tables["account"].as_i64(), tables["old_fashioned"].as_i64(), tables["odd `name; (x"].as_i64()),
        (Some(ACCOUNTS), Some(3), Some(2))
    );
    assert!(tables["transfer"].as_i64() > Some(20_000) && tables["transfer"] == tables["logged"], "{tables}");
    assert_eq!(tables.as_object().unwrap().len(), 5, "{tables}");
    assert!(facts["server_version"].as_str().unwrap().contains("MariaDB") && facts["tool_version"].as_str().unwrap().contains("MariaDB"));
    assert_eq!(facts["databases"]["shop"]["collation"].as_str(), Some("utf8mb4_unicode_ci"));
    assert!(facts["changed_bytes"].as_u64().is_some() && facts["table_bytes"]["transfer"].as_u64() > Some(100_000));
    let run = keepd.json(&["run", "list"])[0]["id"].as_str().unwrap().to_owned();
    let told = keepd.ok(&["run", "show", &run]);
    assert!(told.contains("shop.old_fashioned (MyISAM)"), "{told}");

    // A directory.
    let out = keepd.restored("latest");
    let dump = fs::read(out.join("db/shop.sql")).unwrap();
    assert!(dump.ends_with(b"\n-- Dump completed\n"));

    // Beside what is there.
    keepd.ok(&["restore", "latest", "--to-database", "copy"]);
    server.prove("copy");
    assert_eq!(server.event("copy"), "sweep\tENABLED\troot@localhost\tutf8mb3");
    assert_eq!(server.databases(), ["copy", "shop"]);
    assert!(keepd.fails(1, &["restore", "latest", "--to-database", "copy"]).contains("is there already"));
    assert!(
        keepd.fails(1, &["restore", "latest", "--to-database", "mysql", "--replace", "--yes"]).contains("belongs to the server itself")
    );
    assert!(keepd.fails(1, &["restore", "latest", "--to-database", "one", "--table", "account"]).contains("under another name"));

    // In place of what is there.
    server.sql(
        "UPDATE shop.account SET balance = 0; DROP VIEW shop.richer; CREATE VIEW shop.newer AS SELECT 1; CREATE TABLE shop.extra (id INT)",
    );
    server.sql("CREATE TRIGGER shop.later BEFORE INSERT ON shop.account FOR EACH ROW SET NEW.note = 'later'");
    let tied = keepd.fails(1, &["restore", "latest", "--in-place", "--yes"]);
    assert!(tied.contains("written with its name (shop.later)"), "{tied}");
    server.sql("DROP TRIGGER shop.later; USE shop; CREATE TRIGGER later BEFORE INSERT ON account FOR EACH ROW SET NEW.note = 'later'");
    let other = server.client().args(["shop", "-e", "SELECT sleep(60)"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let since = Instant::now();
    loop {
        let said = server.sql("SELECT count(*) FROM information_schema.processlist WHERE db = 'shop'");
        if said == "1" {
            break;
        }
        assert!(since.elapsed() < Duration::from_secs(20));
    }
    let used = keepd.fails(1, &["restore", "latest", "--in-place", "--yes"]);
    assert!(used.contains("in use by root@localhost"), "{used}");
    let id = server.sql("SELECT id FROM information_schema.processlist WHERE db = 'shop'");
    server.sql(&format!("KILL {id}"));
    drop(other.wait_with_output().unwrap());
    let said = keepd.ok(&["restore", "latest", "--in-place", "--yes"]);
    server.prove("shop");
    assert_eq!(server.event("shop"), "sweep\tENABLED\troot@localhost\tutf8mb3");
    let databases = server.databases();
    let aside = databases.iter().find(|d| d.starts_with("shop_before_")).unwrap();
    assert_eq!(databases.len(), 3, "{databases:?}");
    let told = said + &keepd.ok(&["run", "show", keepd.json(&["run", "list"])[0]["id"].as_str().unwrap()]);
    assert!(told.contains(&format!("DROP DATABASE `{aside}`")), "{told}");
    assert_eq!(server.sql(&format!("SELECT sum(balance) FROM {aside}.account")), "0");
    assert_eq!(server.sql(&format!("SELECT * FROM {aside}.newer")), "1");
    assert_eq!(server.event(aside), "sweep\tDISABLED\troot@localhost\tutf8mb3");
    let objects = |database: &str| {
        server.sql(&format!(
            "SELECT group_concat(trigger_name ORDER BY 1) FROM information_schema.triggers WHERE trigger_schema = '{database}'; \
             SELECT group_concat(table_name ORDER BY 1) FROM information_schema.tables WHERE table_schema = '{database}'; \
             SELECT group_concat(routine_name ORDER BY 1) FROM information_schema.routines WHERE routine_schema = '{database}'"
        ))
    };
    assert_eq!(objects("shop"), "watch\naccount,logged,numbers,odd `name; (x,old_fashioned,rich,richer,transfer\ndouble_of,note_it");
    assert_eq!(
        objects(aside),
        "later,watch\naccount,extra,logged,newer,numbers,odd `name; (x,old_fashioned,rich,transfer\ndouble_of,note_it"
    );

    // After a disaster.
    server.sql("DROP DATABASE shop");
    keepd.ok(&["restore", "latest", "--in-place", "--yes"]);
    server.prove("shop");

    let notes = fs::read_to_string(keepd.path("notes")).unwrap();
    assert!(notes.contains("mariadb-dump --defaults-file=/proc/self/fd/3 ") && notes.contains("LC_ALL=C.UTF-8"), "{notes:.2000}");
    assert!(!notes.contains("canary"), "the password is on no command line and in no environment");
    for file in files_below(&keepd.path("state")) {
        assert!(!String::from_utf8_lossy(&fs::read(&file).unwrap()).contains("canary"), "{}", file.display());
    }
    assert!(!keepd.log().contains("canary"));
}

#[test]
fn a_dump_that_is_not_whole_is_no_backup() {
    let world = World::started();
    let World { keepd, server } = &world;
    keepd.ok(&["backup", "shop"]);
    let cases = [
        ("\"$real\" \"$@\" | head -c 100000; kill -9 $$", "was ended by signal 9"),
        ("\"$real\" \"$@\" | head -c 100000; exit 0", "is cut off"),
        ("exit 0", "it is empty"),
        ("\"$real\" \"$@\" | sed '$d'", "its last line, '-- Dump completed', is missing"),
        (
            "\"$real\" \"$@\"; echo 'mariadb-dump: Error 2013: Lost connection to server during query' >&2; exit 3",
            "broke off the connection",
        ),
        ("\"$real\" \"$@\" | head -c 100000; sleep 100", "gave nothing for 5 s"),
    ];
    world.reconfigure("dbname = \"shop\"", ", timeout = \"5s\"");
    for (then, wanted) in cases {
        world.wrap("mariadb-dump", then);
        let said = world.fails();
        assert!(said.contains(wanted) && said.contains("shop"), "{then}: {said}");
    }
    world.wrap("mariadb-dump", "echo 'mariadb-dump: something odd' >&2; exec \"$real\" \"$@\"");
    keepd.ok(&["backup", "shop"]);
    let told = keepd.ok(&["run", "show", keepd.json(&["run", "list"])[0]["id"].as_str().unwrap()]);
    assert!(told.contains("something odd"), "{told}");

    // Questions that have no answer.
    world.reconfigure("dbname = \"shoop\"", "");
    let said = world.fails();
    assert!(said.contains("there is no database shoop"), "{said}");
    world.reconfigure("dbname = [\"shop\", \"shoop\"]", "");
    world.fails();
    world.reconfigure("dbname = \"shop\"", ", sslmode = \"require\"");
    let said = world.fails();
    assert!(said.contains("the connection is not encrypted"), "{said}");
    world.reconfigure("dbname = \"shop\"", ", sslmode = \"verify-full\"");
    let said = world.fails();
    assert!(said.contains("cannot be encrypted as sslmode wants it"), "{said}");
    world.reconfigure("dbname = \"shop\"", "");
    fs::write(keepd.path("password"), "canary-wrong").unwrap();
    let said = world.fails();
    assert!(said.contains("user or password is wrong"), "{said}");
    fs::write(keepd.path("password"), "canary\nline").unwrap();
    let said = world.fails();
    assert!(said.contains("line feed"), "{said}");
    fs::write(keepd.path("password"), PASSWORD).unwrap();
    server.sql("CREATE USER small@'127.0.0.1' IDENTIFIED BY 'x'; GRANT SELECT ON shop.* TO small@'127.0.0.1'");
    let toml = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), toml.replace("user = \"keepd\"", "user = \"small\"")).unwrap();
    fs::write(keepd.path("password"), "x").unwrap();
    keepd.ok(&["reload"]);
    let said = world.fails();
    assert!(said.contains("has not all rights") && said.contains("GRANT"), "{said}");
    fs::write(keepd.path("password"), PASSWORD).unwrap();
    for tool in ["mariadb", "mariadb-dump"] {
        fs::remove_file(keepd.path("bin").join(tool)).unwrap();
    }
    world.reconfigure("dbname = \"shop\"", "");
    let said = world.fails();
    assert!(said.contains("neither mariadb-dump nor mysqldump is in"), "{said}");
}

#[test]
fn all_databases_of_a_server_are_files_of_one_source() {
    let world = World::started();
    let World { keepd, server } = &world;
    server.sql(
        "CREATE DATABASE `a/b`; CREATE TABLE `a/b`.x (id INT) ENGINE = InnoDB; INSERT INTO `a/b`.x VALUES (1), (2); CREATE DATABASE empty",
    );
    world.wrap("mariadb-dump", "exec \"$real\" \"$@\"");
    world.reconfigure("dbname = \"*\"", ", exclude_tables = [\"shop.logged\", \"old_fashioned\"]");
    keepd.ok(&["backup", "shop"]);
    let out = keepd.restored("latest");
    let names: Vec<String> = files_below(&out.join("db")).iter().map(|p| p.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    assert_eq!(names, ["a%2Fb.sql", "empty.sql", "shop.sql"]);
    let facts = keepd.json(&["show", "latest"])["sources"][0]["facts"].clone();
    assert_eq!((facts["tables"]["a/b.x"].as_i64(), facts["tables"]["shop.account"].as_i64()), (Some(2), Some(ACCOUNTS)));
    assert!(facts["tables"].get("shop.logged").is_none() && facts["tables"].get("shop.old_fashioned").is_none(), "{facts}");
    keepd.ok(&["restore", "latest", "--database", "a/b", "--to-database", "c d"]);
    assert_eq!(server.sql("SELECT count(*) FROM `c d`.x"), "2");
    keepd.ok(&["restore", "latest", "--database", "empty", "--to-database", "empty2"]);
    assert!(keepd.fails(1, &["restore", "latest", "--to-database", "x"]).contains("--database"));
}

#[test]
fn a_replacement_that_fails_leaves_everything_as_it_was() {
    let World { mut keepd, server } = World::started();
    keepd.ok(&["backup", "shop"]);
    let code = || {
        let mut command = Command::new("mariadb-dump");
        command.args([
            "--no-defaults",
            "-uroot",
            "--single-transaction",
            "--routines",
            "--triggers",
            "--events",
            "--skip-dump-date",
            "shop",
        ]);
        let out = command.arg(format!("--socket={}", server.dir.join("s.sock").display())).output().unwrap();
        assert!(out.status.success(), "{}", text(&out));
        out.stdout
    };
    let before = code();
    // Somebody reads a table within a transaction and does not end it: it cannot be moved.
    let mut other = server.client();
    other
        .args(["-e", "START TRANSACTION; SELECT count(*) FROM shop.account; SELECT sleep(300)"])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut other = other.spawn().unwrap();
    let since = Instant::now();
    while server.sql("SELECT count(*) FROM information_schema.processlist WHERE info LIKE 'SELECT sleep(300)%'") == "0" {
        assert!(since.elapsed() < Duration::from_secs(20));
    }
    let said = keepd.fails(1, &["restore", "latest", "--in-place", "--yes"]);
    assert!(said.contains("Lock wait timeout exceeded"), "{said}");
    assert!(code() == before, "triggers, views, routines and events are made again");
    assert_eq!(server.databases(), ["shop"], "neither a scratch database nor one aside is left");
    let id = server.sql("SELECT id FROM information_schema.processlist WHERE info LIKE 'SELECT sleep(300)%' AND id <> connection_id()");
    server.sql(&format!("KILL {id}"));
    other.wait().unwrap();
    keepd.ok(&["restore", "latest", "--in-place", "--yes"]);
    assert!(code() == before, "what was replaced by itself is what it was, to the last setting of its event");
    // In place already, and then taken back, because the application is not well with it or keepd dies.
    for database in server.databases().iter().filter(|d| d.contains("_before_")) {
        server.sql(&format!("DROP DATABASE `{database}`"));
    }
    let id = keepd.json(&["list"]).as_array().unwrap().iter().find(|b| b["type"] == "manual").unwrap()["id"].as_str().unwrap().to_owned();
    server.sql("UPDATE shop.account SET note = 'now'; ALTER EVENT shop.sweep DISABLE; CREATE TABLE shop.later (id INT)");
    let before = code();
    let config = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let ill = config.replace("[job.shop]\n", "[job.shop]\nhealth = { command = [\"/bin/false\"], patience = \"1s\" }\n");
    assert_ne!(ill, config);
    fs::write(keepd.path("keepd.toml"), ill).unwrap();
    keepd.ok(&["reload"]);
    let said = keepd.fails(1, &["restore", &id, "--in-place", "--yes"]);
    assert!(said.contains("everything is as it was before"), "{said}");
    assert!(code() == before, "{said}");
    let is_old = |server: &Server| {
        assert_eq!(server.sql("SELECT count(*) = sum(note = 'now') FROM shop.account"), "1");
        assert_eq!(server.databases(), ["shop"], "neither a scratch database nor one aside is left");
    };
    is_old(&server);
    fs::write(keepd.path("keepd.toml"), &config).unwrap();
    let mut ended = 0;
    for point in (4..).step_by(2) {
        keepd.stop();
        keepd.environment = vec![("KEEPD_TEST_DIES_AT".into(), point.to_string())];
        keepd.start();
        let finished = keepd.ctl(&["restore", &id, "--in-place", "--yes", "--no-safety-backup"]).status.success();
        keepd.environment.clear();
        if finished {
            break;
        }
        keepd.kill();
        keepd.start();
        keepd.settled(point);
        if server.sql("SELECT count(*) FROM shop.account WHERE note = 'now'") == "0" {
            // Killed when it was in place: it stays.
            ended += 1;
            break;
        }
        is_old(&server);
        assert!(code() == before, "killed at point {point}: {}", keepd.log());
        ended += 1;
    }
    assert!(ended > 3, "killed {ended} times");
}
