//! docs/recipes.md against the real programs: the blocks of the document are taken as they are, only names of places and ports are others.

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::*;

const PASSWORD: &str = "canary-4c1d-word";

/// What stands under a heading, up to the next of its level or a higher one.
fn section(heading: &str) -> String {
    let document = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/recipes.md")).unwrap();
    let level = |line: &str| line.starts_with('#').then(|| line.chars().take_while(|c| *c == '#').count());
    let mut fenced = false;
    let mut found: Vec<&str> = Vec::new();
    for line in document.lines() {
        fenced ^= line.starts_with("```");
        match level(line).filter(|_| !fenced) {
            Some(_) if line == heading => found.push(line),
            Some(here) if !found.is_empty() && here <= level(heading).unwrap() => break,
            _ if found.is_empty() => {}
            _ => found.push(line),
        }
    }
    assert!(!found.is_empty(), "docs/recipes.md has no heading '{heading}'");
    found.join("\n")
}

fn blocks(text: &str, language: &str) -> Vec<String> {
    let opening = format!("```{language}\n");
    text.split(&opening).skip(1).map(|rest| rest.split("\n```").next().unwrap().to_owned() + "\n").collect()
}

/// Says it past the test's own output, which nobody sees when it passes.
fn skipped(why: &str) {
    std::io::stderr().write_all(format!("SKIPPED: {why}\n").as_bytes()).unwrap();
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A server's user when the tests run as root, and ourselves when not.
fn user(name: &str) -> String {
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    if is_root() && passwd.lines().any(|l| l.starts_with(&format!("{name}:"))) {
        return name.to_owned();
    }
    String::from_utf8(Command::new("id").arg("-un").output().unwrap().stdout).unwrap().trim().to_owned()
}

fn own(path: &Path, user: &str) {
    assert!(!is_root() || Command::new("chown").args(["-R", user]).arg(path).status().unwrap().success());
}

fn free_port() -> String {
    common::servers::free_port().to_string()
}

fn tool(name: &str) -> String {
    let found = Command::new("/bin/sh").args(["-c", &format!("PATH=$PATH:/usr/sbin:/sbin command -v {name}")]).output().unwrap();
    assert!(found.status.success(), "{name} is missing: run 'sh tests/install-tools.sh test' first");
    String::from_utf8(found.stdout).unwrap().trim().to_owned()
}

/// Runs a line of shell and gives what it printed.
fn sh(line: &str, input: &str) -> String {
    let mut child =
        Command::new("/bin/sh").args(["-euc", line]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let out = std::thread::scope(|scope| {
        // One that wants no input may end before it has all; its exit status tells.
        scope.spawn(move || stdin.write_all(input.as_bytes()));
        child.wait_with_output().unwrap()
    });
    assert!(out.status.success(), "{line}: {}", text(&out));
    String::from_utf8(out.stdout).unwrap()
}

/// A recipe in a temporary directory: its job in the configuration, its scripts beside.
struct Recipe {
    keepd: Keepd,
    job: &'static str,
    section: String,
    changes: Vec<(&'static str, String)>,
}

impl Recipe {
    /// `changes` are applied to everything of the section; each must be there, or the document has moved on.
    fn new(job: &'static str, heading: &str, changes: &[(&'static str, &str)]) -> Self {
        let mut keepd = Keepd::prepared();
        // Commands of other users have to get through.
        fs::set_permissions(keepd.dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        for name in ["bin", "lib", "secrets"] {
            fs::create_dir(keepd.path(name)).unwrap();
            fs::set_permissions(keepd.path(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
        let path = format!("{}:{}:/usr/sbin:/sbin", keepd.path("bin").display(), std::env::var("PATH").unwrap());
        keepd.environment.push(("PATH".into(), path));
        let d = keepd.dir.path().display().to_string();
        let changes = changes.iter().map(|(from, to)| (*from, to.replace("{d}", &d))).collect();
        let recipe = Self { keepd, job, section: section(heading), changes };
        for (from, _) in &recipe.changes {
            assert!(recipe.section.contains(from), "nothing under '{heading}' has '{from}'");
        }
        for script in blocks(&recipe.section, "sh") {
            let (_, rest) = script.split_once("\n# /usr/local/lib/keepd/").expect("a script's second line says where it belongs");
            recipe.script(&format!("lib/{}", rest.split(':').next().unwrap()), &recipe.changed(&script));
        }
        recipe.configure("");
        recipe
    }

    fn changed(&self, block: &str) -> String {
        let lib = self.keepd.path("lib").display().to_string();
        let text = block.replace("/usr/local/lib/keepd", &lib);
        self.changes.iter().fold(text, |text, (from, to)| text.replace(from, to))
    }

    fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.keepd.path(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn secret(&self, name: &str, word: &str, user: &str) {
        let path = self.keepd.path("secrets").join(name);
        fs::write(&path, format!("{word}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        own(&path, user);
    }

    /// The job as the document has it, and further lines.
    fn configure(&self, more: &str) {
        let job = blocks(&self.section, "toml").remove(0);
        let text = format!("{}{}{more}", header(self.keepd.dir.path()), self.changed(&job));
        fs::write(self.keepd.path("keepd.toml"), text).unwrap();
    }

    /// Makes a backup; how much it added.
    fn backup(&self) -> u64 {
        self.keepd.json(&["backup", self.job])["progress"]["added_bytes"].as_u64().unwrap()
    }

    fn restore(&self, source: &str) {
        self.keepd.ok(&["restore", "latest", "--job", self.job, "--in-place", "--source", source, "--yes"]);
    }
}

fn header(d: &Path) -> String {
    let d = d.display();
    format!(
        "[daemon]\nstate_dir = \"{d}/state\"\nsocket = \"{d}/keepd.sock\"\n[encryption.main]\nkey_file = \"{d}/main.key\"\n\
         [destination.local]\nservice = \"fs\"\nroot = \"{d}/repository\"\nencryption = \"main\"\n"
    )
}

/// A server that lines of shell start and stop, for the test and as `systemctl` for keepd.
struct Service {
    control: PathBuf,
    pid: PathBuf,
}

impl Service {
    /// `start` must write `$pid`.
    fn started(recipe: &Recipe, unit: &str, start: &str) -> Self {
        let pid = recipe.keepd.path("bin/pid");
        let text = format!(
            "#!/bin/sh\nset -eu\npid={}\ncase $1 in start|stop) unit=$2 ;; *) for unit; do :; done ;; esac\n[ \"$unit\" = {unit} ] || exit 5\ncase \"$*\" in\n\
             show*) echo LoadState=loaded; if [ -e $pid ]; then echo ActiveState=active; else echo ActiveState=inactive; fi ;;\n\
             *start*)\n{start}\n;;\n*stop*) kill \"$(cat $pid)\"; while kill -0 \"$(cat $pid)\" 2>/dev/null; do sleep 0.05; done; rm -f $pid ;;\n*) exit 1 ;;\nesac\n",
            pid.display()
        );
        let service = Self { control: recipe.script("bin/systemctl", &text), pid };
        service.go("start", unit);
        service
    }

    fn go(&self, verb: &str, unit: &str) {
        let done = Command::new(&self.control).args([verb, unit]).stdin(Stdio::null()).output().unwrap();
        assert!(done.status.success(), "{verb} {unit}: {}", text(&done));
    }

    fn is_running(&self) -> bool {
        let pid = fs::read_to_string(&self.pid).unwrap_or_default();
        !pid.trim().is_empty() && Path::new(&format!("/proc/{}/stat", pid.trim())).exists()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let Ok(pid) = fs::read_to_string(&self.pid) else { return };
        let _ = Command::new("kill").args(["-9", pid.trim()]).stderr(Stdio::null()).status();
        let since = Instant::now();
        while self.is_running() && since.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn every_block_is_valid() {
    let keepd = Keepd::prepared();
    let document = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/recipes.md")).unwrap();
    let all = blocks(&document, "toml");
    assert!(all.len() >= 8, "{}", all.len());
    for block in all {
        fs::write(keepd.path("keepd.toml"), header(keepd.dir.path()) + &block).unwrap();
        let out = keepd.command().arg("--check").output().unwrap();
        assert!(out.status.success(), "{}\n{block}", text(&out));
    }
    for script in blocks(&document, "sh") {
        let out = Command::new("/bin/sh").args(["-n", "-c", &script]).output().unwrap();
        assert!(out.status.success() && script.starts_with("#!/bin/sh\n# /usr/local/lib/keepd/"), "{}\n{script}", text(&out));
    }
}

#[test]
fn redis() {
    let (port, spare) = (free_port(), free_port());
    let own_name = user("root");
    let changes = [
        ("spare=16379", &*format!("spare={spare}")),
        ("port=6379", &format!("port={port}")),
        ("-p 6379", &format!("-p {port}")),
        ("/etc/keepd/secrets", "{d}/secrets"),
        ("/var/lib/keepd", "{d}/state"),
    ];
    let mut recipe = Recipe::new("redis", "## Redis", &changes);
    let d = recipe.keepd.dir.path().display().to_string();
    // Debian's redis-server is redis-check-rdb under another name.
    if !Path::new("/usr/bin/redis-server").exists() {
        std::os::unix::fs::symlink(tool("redis-check-rdb"), recipe.keepd.path("bin/redis-server")).unwrap();
    }
    fs::create_dir(recipe.keepd.path("redis")).unwrap();
    let conf = blocks(&recipe.section, "conf").remove(0).replace("PASSWORD", PASSWORD);
    let conf = format!(
        "{conf}port {port}\nbind 127.0.0.1\ndir {d}/redis\nlogfile {d}/redis/log\ndaemonize yes\npidfile {d}/bin/pid\nsave \"\"\n\
         appendonly yes\nuser default on >admin ~* &* +@all\n"
    );
    fs::write(recipe.keepd.path("redis.conf"), conf).unwrap();
    recipe.secret("redis", PASSWORD, &own_name);
    // --no-raw writes bytes that are no text as escapes.
    let said = |options: &str, lines: &str| {
        let said = sh(&format!("redis-cli -p {port} --user default --askpass {options}"), &format!("admin\n{lines}"));
        assert!(!said.contains("ERR"), "{said}");
        said
    };
    let ask = |lines: &str| said("", lines);
    let start = format!(
        "PATH={d}/bin:$PATH; shift 2; redis-server {d}/redis.conf \"$@\"; until [ -s $pid ]; do sleep 0.05; done; \
         until printf 'admin\\nping\\n' | redis-cli -p {port} --user default --askpass 2>/dev/null | grep -q PONG; do sleep 0.05; done"
    );
    let service = Service::started(&recipe, "redis-server", &start);
    let fill: String = (0..5000).map(|n| format!("SET key:{n} {n}-{}\n", n * 48271)).collect();
    ask(&format!("{fill}RPUSH list a b c\nHSET hash a 1 b 2\nSET mortal soon PXAT 33000000000000\n"));
    let data = || {
        let mut keys: Vec<String> = ask("KEYS *\n").lines().map(str::to_owned).collect();
        keys.sort();
        said("--no-raw", &keys.iter().map(|k| format!("DUMP {k}\nPEXPIRETIME {k}\n")).collect::<String>())
    };
    recipe.keepd.start();
    let first = recipe.backup();
    ask("SET key:17 changed\nDEL key:18\nSET new 1\n");
    let second = recipe.backup();
    assert!(second < first / 2, "{first}, then {second}");
    let before = data();
    ask("FLUSHALL\nSET stray 1\n");
    recipe.restore("redis");
    assert!(data() == before);
    assert!(ask("INFO replication\n").contains("role:master"));
    assert!(!recipe.keepd.path("state/redis-restore").exists());
    // Also after a restart, from the append-only file.
    service.go("stop", "redis-server");
    service.go("start", "redis-server");
    assert!(data() == before);
    // What is no snapshot is refused before the server hears of it, and a wrong password fails the backup.
    let bad = Command::new(recipe.keepd.path("lib/redis-restore")).stdin(Stdio::null()).output().unwrap();
    assert!(!bad.status.success() && data() == before, "{}", text(&bad));
    fs::remove_file(recipe.keepd.path("secrets/redis")).unwrap();
    recipe.secret("redis", "wrong", &own_name);
    let failed = recipe.keepd.fails(1, &["backup", "redis"]);
    assert!(failed.contains("WRONGPASS") && !failed.contains(PASSWORD), "{failed}");
    // By hand.
    let out = recipe.keepd.restored("latest");
    service.go("stop", "redis-server");
    fs::remove_dir_all(recipe.keepd.path("redis/appendonlydir")).unwrap();
    fs::copy(out.join("redis/dump.rdb"), recipe.keepd.path("redis/dump.rdb")).unwrap();
    let started = Command::new(&service.control).args(["start", "redis-server", "--appendonly", "no"]).status().unwrap();
    assert!(started.success() && data() == before);
    // The password is in nothing that keepd wrote.
    assert!(!recipe.keepd.log().contains(PASSWORD));
}

#[test]
fn openldap() {
    let (port, owner) = (free_port(), user("openldap"));
    let changes = [
        ("/etc/ldap/slapd.d", "{d}/ldap/slapd.d"),
        ("/var/lib/ldap", "{d}/ldap/data"),
        ("/run/slapd/slapd.pid", "{d}/ldap/run/pid"),
        ("run_as = \"openldap\"", &format!("run_as = \"{owner}\"")),
    ];
    let mut recipe = Recipe::new("ldap", "## OpenLDAP", &changes);
    let d = recipe.keepd.dir.path().display().to_string();
    for name in ["ldap/slapd.d", "ldap/data", "ldap/run"] {
        fs::create_dir_all(recipe.keepd.path(name)).unwrap();
    }
    let (suffix, admin) = ("dc=example,dc=org", "cn=admin,dc=example,dc=org");
    let config = format!(
        "dn: cn=config\nobjectClass: olcGlobal\ncn: config\nolcSizeLimit: unlimited\nolcPidFile: {d}/ldap/run/pid\n\n\
         dn: cn=module{{0}},cn=config\nobjectClass: olcModuleList\ncn: module{{0}}\nolcModulePath: /usr/lib/ldap\nolcModuleLoad: back_mdb\n\n\
         dn: cn=schema,cn=config\nobjectClass: olcSchemaConfig\ncn: schema\n\ninclude: file:///etc/ldap/schema/core.ldif\n\
         include: file:///etc/ldap/schema/cosine.ldif\ninclude: file:///etc/ldap/schema/inetorgperson.ldif\n\n\
         dn: olcDatabase={{1}}mdb,cn=config\nobjectClass: olcDatabaseConfig\nobjectClass: olcMdbConfig\nolcDatabase: {{1}}mdb\n\
         olcSuffix: {suffix}\nolcRootDN: {admin}\nolcRootPW: admin\nolcDbDirectory: {d}/ldap/data\nolcDbMaxSize: 67108864\n"
    );
    sh(&format!("{} -n 0 -F {d}/ldap/slapd.d", tool("slapadd")), &config);
    own(&recipe.keepd.path("ldap"), &owner);
    let as_user = if is_root() { format!("-u {owner}") } else { String::new() };
    // It goes into the background once it listens; its own pid file has another place than the one the test ends it by.
    let start = format!(
        "{} -h ldap://127.0.0.1:{port} -F {d}/ldap/slapd.d {as_user} >/dev/null 2>&1; until [ -s {d}/ldap/run/pid ]; do sleep 0.05; done; \
         cp {d}/ldap/run/pid $pid; \
         until ldapsearch -x -H ldap://127.0.0.1:{port} -s base -b '' >/dev/null 2>&1; do kill -0 $(cat $pid); sleep 0.05; done",
        tool("slapd")
    );
    let service = Service::started(&recipe, "slapd.service", &start);
    fs::write(recipe.keepd.path("secrets/admin"), "admin").unwrap();
    let at = format!("-x -H ldap://127.0.0.1:{port}");
    let admin = format!("{at} -D {admin} -y {d}/secrets/admin");
    let person = |n: usize| {
        format!(
            "dn: uid=p{n},{suffix}\nobjectClass: inetOrgPerson\nuid: p{n}\ncn: Person {n}\nsn: Nº {n}\nmail: p{n}@example.org\ndescription: {}\n\n",
            "of some length ".repeat(30)
        )
    };
    let root = format!("dn: {suffix}\nobjectClass: dcObject\nobjectClass: organization\no: Example\ndc: example\n\n");
    sh(&format!("ldapadd {admin}"), &(root + &(0..500).map(person).collect::<String>()));
    let data = || {
        let all = sh(&format!("ldapsearch {at} -LLL -o ldif-wrap=no -b {suffix} '*' '+'"), "");
        let mut entries: Vec<String> = all.split("\n\n").map(str::to_owned).collect();
        entries.sort();
        entries
    };
    recipe.keepd.start();
    let first = recipe.backup();
    let change = format!("dn: uid=p7,{suffix}\nchangetype: modify\nreplace: sn\nsn: changed\n\n{}", person(500));
    sh(&format!("ldapmodify -a {admin}"), &change);
    let second = recipe.backup();
    assert!(second < first / 2, "{first}, then {second}");
    let before = data();
    assert_eq!(before.iter().filter(|e| e.starts_with("dn: ")).count(), 502);
    sh(&format!("ldapdelete -r {admin} {suffix}"), "");
    // Nothing is there, which its command would rather fail than print.
    let restore =
        || recipe.keepd.ok(&["restore", "latest", "--job", "ldap", "--in-place", "--source", "directory", "--yes", "--no-safety-backup"]);
    restore();
    assert_eq!(data(), before);
    // The disk was lost.
    service.go("stop", "slapd.service");
    fs::remove_dir_all(recipe.keepd.path("ldap/data")).unwrap();
    fs::create_dir(recipe.keepd.path("ldap/data")).unwrap();
    own(&recipe.keepd.path("ldap/data"), &owner);
    service.go("start", "slapd.service");
    restore();
    assert_eq!(data(), before);
    // While slapd runs the script does nothing; when the dump is no LDIF, the old database is back.
    let script = format!(
        "{}{d}/lib/ldap-restore",
        if is_root() { format!("setpriv --reuid {owner} --regid {owner} --clear-groups ") } else { String::new() }
    );
    assert!(sh(&format!("! {script} 2>&1"), "dn: nonsense\n").contains("slapd runs"));
    service.go("stop", "slapd.service");
    assert!(sh(&format!("! {script} 2>&1"), "dn: nonsense\n").contains("back in place"));
    service.go("start", "slapd.service");
    assert_eq!(data(), before);
    // The configuration, on a new machine.
    let out = recipe.keepd.restored("latest");
    let again = sh(
        &format!(
            "mkdir {d}/new; {} -F {d}/new -n 0 <{}; {} -F {d}/new -n 0",
            tool("slapadd"),
            out.join("config/config.ldif").display(),
            tool("slapcat")
        ),
        "",
    );
    assert!(again.contains("olcSuffix: dc=example,dc=org") && again.contains("inetOrgPerson"), "{again}");
}

#[test]
fn etcd() {
    let (port, peer, owner) = (free_port(), free_port(), user("etcd"));
    let changes = [
        ("/var/lib/etcd", "{d}/etcd"),
        ("/etc/keepd/secrets", "{d}/secrets"),
        ("http://127.0.0.1:2379", &format!("http://127.0.0.1:{port}")),
        ("http://localhost:2380", &format!("http://127.0.0.1:{peer}")),
        ("run_as = \"etcd\"", &format!("run_as = \"{owner}\"")),
    ];
    let mut recipe = Recipe::new("etcd", "## etcd", &changes);
    let d = recipe.keepd.dir.path().display().to_string();
    fs::create_dir(recipe.keepd.path("etcd")).unwrap();
    own(&recipe.keepd.path("etcd"), &owner);
    recipe.secret("etcd", &format!("root:{PASSWORD}"), &owner);
    let at = format!("http://127.0.0.1:{port}");
    let as_user = if is_root() { format!("setpriv --reuid {owner} --regid {owner} --clear-groups") } else { String::new() };
    let start = format!(
        "export ETCDCTL_API=3; setsid {as_user} {} --data-dir {d}/etcd/default --name default --listen-client-urls {at} --advertise-client-urls {at} \
         --listen-peer-urls http://127.0.0.1:{peer} --initial-advertise-peer-urls http://127.0.0.1:{peer} \
         --initial-cluster default=http://127.0.0.1:{peer} >>{d}/etcd.log 2>&1 & echo $! >$pid; \
         until ETCDCTL_USER=root:{PASSWORD} etcdctl --endpoints {at} endpoint health >/dev/null 2>&1 || etcdctl --endpoints {at} endpoint health >/dev/null 2>&1; \
         do kill -0 $(cat $pid); sleep 0.1; done",
        tool("etcd")
    );
    let service = Service::started(&recipe, "etcd.service", &start);
    let ctl = format!("export ETCDCTL_API=3 ETCDCTL_USER=root:{PASSWORD}; etcdctl --endpoints {at}");
    let open = format!("export ETCDCTL_API=3; etcdctl --endpoints {at}");
    sh(
        &format!(
            "{{ {open} role add root; {open} user add root:{PASSWORD}; {open} user grant-role root root; {open} user add app:app; {open} auth enable; }} 2>&1"
        ),
        "",
    );
    // etcd takes 128 changes at once.
    let fill = |from: usize, to: usize| {
        let lines: String = (from..to).map(|n| format!("put key/{n:05} {n}-{}\n", "v".repeat(300))).collect();
        sh(&format!("{ctl} txn"), &format!("\n{lines}\n\n"))
    };
    for n in 0..20 {
        fill(n * 100, n * 100 + 100);
    }
    let data = || sh(&format!("{ctl} get '' --from-key; {ctl} user list"), "");
    recipe.keepd.start();
    let first = recipe.backup();
    sh(&format!("{ctl} put key/00017 changed; {ctl} put new 1; {ctl} del key/00018"), "");
    let second = recipe.backup();
    assert!(second < first, "{first}, then {second}");
    assert!(!recipe.keepd.path("etcd/keepd-save").exists());
    let before = data();
    assert!(before.contains("key/01999") && before.contains("changed") && before.contains("app"), "{before:.200}");
    sh(&format!("{ctl} del '' --from-key; {ctl} put stray 1; {ctl} user delete app"), "");
    recipe.restore("etcd");
    assert!(service.is_running() && data() == before);
    // The disk was lost.
    service.go("stop", "etcd.service");
    fs::remove_dir_all(recipe.keepd.path("etcd/default")).unwrap();
    service.go("start", "etcd.service");
    recipe.restore("etcd");
    assert!(data() == before);
    let left: Vec<_> = fs::read_dir(recipe.keepd.path("etcd")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(left.iter().all(|n| n == "default" || n == "default.before"), "{left:?}");
    // A cut-off dump is refused and changes nothing.
    let whole = fs::read(recipe.keepd.restored("latest").join("etcd/snapshot.db")).unwrap();
    service.go("stop", "etcd.service");
    fs::write(recipe.keepd.path("cut"), &whole[..whole.len() / 2]).unwrap();
    assert!(sh(&format!("! {as_user} {d}/lib/etcd-restore <{d}/cut 2>&1"), "").contains("rror"));
    assert!(recipe.keepd.path("etcd/default/member").exists());
    service.go("start", "etcd.service");
    assert!(data() == before);
    // Without its password there is no backup.
    fs::remove_file(recipe.keepd.path("secrets/etcd")).unwrap();
    recipe.keepd.fails(1, &["backup", "etcd"]);
    assert!(!recipe.keepd.log().contains(PASSWORD));
}

/// Unmounts in the end.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn btrfs() {
    if !is_root() {
        return skipped("snapshots of btrfs: root is needed to mount a file system");
    }
    if !fs::read_to_string("/proc/filesystems").unwrap().contains("btrfs") {
        return skipped("snapshots of btrfs: this kernel has no btrfs");
    }
    let mut recipe = Recipe::new("photos", "### btrfs", &[("/srv", "{d}/srv")]);
    let d = recipe.keepd.dir.path().display().to_string();
    fs::create_dir(recipe.keepd.path("srv")).unwrap();
    fs::File::create(recipe.keepd.path("image")).unwrap().set_len(256 << 20).unwrap();
    sh(&format!("{} -q {d}/image", tool("mkfs.btrfs")), "");
    let mount = Command::new("mount").args(["-o", "loop"]).arg(recipe.keepd.path("image")).arg(recipe.keepd.path("srv")).output().unwrap();
    if !mount.status.success() {
        return skipped(&format!("snapshots of btrfs: no file system can be mounted here: {}", text(&mount).trim()));
    }
    let _mounted = Mounted(recipe.keepd.path("srv"));
    sh(&format!("btrfs subvolume create {d}/srv/photos"), "");
    let (live, snapshot) = (recipe.keepd.path("srv/photos"), recipe.keepd.path("srv/.keepd-photos"));
    fs::write(live.join("large"), noise(8 << 20, 3)).unwrap();
    fs::write(live.join("note"), "one").unwrap();
    recipe.keepd.start();
    assert!(recipe.backup() > 8 << 20);
    assert!(!snapshot.exists());
    assert_same(&live, &recipe.keepd.restored("latest").join("photos"));
    // A leftover of a crash is not what is read.
    let script = format!("{d}/lib/snapshot-btrfs");
    sh(&format!("{script} begin {d}/srv/photos {d}/srv/.keepd-photos"), "");
    fs::write(live.join("note"), "two").unwrap();
    let added = recipe.backup();
    assert!(added < 100_000, "{added}");
    assert!(!snapshot.exists());
    assert_same(&live, &recipe.keepd.restored("latest").join("photos"));
    // A backup that fails removes the snapshot, too.
    recipe.configure("[[job.photos.source]]\nname = \"fails\"\ncommand = [\"false\"]\n");
    recipe.keepd.ok(&["reload"]);
    recipe.keepd.fails(1, &["backup", "photos"]);
    assert!(!snapshot.exists());
    // The capabilities of the drop-in are enough, also where the subvolume is another's.
    std::os::unix::fs::chown(&live, Some(12345), Some(12345)).unwrap();
    let ini = blocks(&recipe.section, "ini").remove(0);
    let given = ini.lines().find_map(|l| l.strip_prefix("CapabilityBoundingSet=")).unwrap();
    let given: String = given.split_whitespace().map(|c| format!(",+{}", c.trim_start_matches("CAP_").to_lowercase())).collect();
    let walls = format!("setpriv --bounding-set=-all,+dac_read_search{given}");
    for verb in ["begin", "begin", "end", "end"] {
        sh(&format!("{walls} {script} {verb} {d}/srv/photos {d}/srv/.keepd-photos"), "");
        assert_eq!(snapshot.exists(), verb == "begin");
    }
}

/// The scripts with stand-ins for the programs: what they call, in which order, and what a crash leaves.
fn with_stand_ins(job: &'static str, heading: &str, place: &'static str, stand_ins: &[(&str, &str)], snapshots: &str) {
    let mut recipe = Recipe::new(job, heading, &[(place, "{d}/mnt")]);
    let d = recipe.keepd.dir.path().display().to_string();
    let mounting = [
        ("mountpoint", "[ -e $d/mounted ]"),
        ("umount", "rm $d/mounted; rm -r $d/mnt/*"),
        // The last two words are what is mounted and where.
        ("mount", "while [ $# -gt 2 ]; do shift; done; [ ! -e $d/mounted ]; cp -a $d/live/. $2/; touch $d/mounted"),
    ];
    for (name, body) in mounting.iter().chain(stand_ins) {
        recipe.script(&format!("bin/{name}"), &format!("#!/bin/sh\nset -eu\nd={d}\necho {name} \"$@\" >>$d/calls\n{body}\n"));
    }
    fs::create_dir(recipe.keepd.path("live")).unwrap();
    fs::write(recipe.keepd.path("live/file"), "one").unwrap();
    recipe.keepd.start();
    let state = |there: bool| {
        assert_eq!((recipe.keepd.path("mounted").exists(), recipe.keepd.path("snapshot").exists()), (there, there));
    };
    recipe.backup();
    state(false);
    // The one that a crash left is removed first.
    let words = format!("{d}/lib/snapshot-{}", heading.trim_start_matches('#').trim().to_lowercase());
    sh(&format!("PATH={d}/bin:$PATH {words} begin {snapshots} {d}/mnt"), "");
    state(true);
    fs::write(recipe.keepd.path("live/file"), "two").unwrap();
    recipe.backup();
    state(false);
    assert_eq!(fs::read_to_string(recipe.keepd.restored("latest").join(job).join("file")).unwrap(), "two");
    recipe.configure(&format!("[[job.{job}.source]]\nname = \"fails\"\ncommand = [\"false\"]\n"));
    recipe.keepd.ok(&["reload"]);
    recipe.keepd.fails(1, &["backup", job]);
    state(false);
}

#[test]
fn zfs_with_stand_ins() {
    let zfs = "case $1 in list) [ -e $d/snapshot ] ;; snapshot) [ ! -e $d/snapshot ]; touch $d/snapshot ;; \
               destroy) case $2 in *@*) ;; *) exit 9 ;; esac; [ ! -e $d/mounted ]; rm $d/snapshot ;; *) exit 1 ;; esac";
    with_stand_ins("mail", "### ZFS", "/run/keepd-mail", &[("zfs", zfs)], "tank/mail");
    skipped("snapshots of ZFS: Debian's kernel has none; only the script is tried, with stand-ins for zfs and mount");
}

#[test]
fn lvm_with_stand_ins() {
    let programs = [
        ("lvs", "[ -e $d/snapshot ]"),
        ("lvcreate", "[ ! -e $d/snapshot ]; touch $d/snapshot"),
        ("lvremove", "case $2 in *_keepd) ;; *) exit 9 ;; esac; [ ! -e $d/mounted ]; rm $d/snapshot"),
        ("blkid", "echo xfs"),
    ];
    with_stand_ins("files", "### LVM", "/run/keepd-files", &programs, "vg0/files");
    skipped("snapshots of LVM with real volumes: only the script is tried, with stand-ins for LVM's programs and mount");
}
