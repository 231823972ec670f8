//! keepctl --host: through a real sshd on the loopback interface, and against far ends that want no good.

mod common;

use std::fs;
use std::io::{BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::servers::free_port;
use common::*;

/// A daemon, and an sshd that leads to it.
struct World {
    keepd: Keepd,
    ssh: tempfile::TempDir,
    port: u16,
    sshd: Child,
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.sshd.kill();
        let _ = self.sshd.wait();
    }
}

fn user() -> String {
    String::from_utf8(Command::new("id").arg("-un").output().unwrap().stdout).unwrap().trim().to_owned()
}

fn wait_for(what: &str, mut is: impl FnMut() -> bool) {
    let since = Instant::now();
    while !is() {
        assert!(since.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

impl World {
    fn started() -> Self {
        Self::of(Keepd::started())
    }

    fn of(keepd: Keepd) -> Self {
        let ssh = tempfile::tempdir().unwrap();
        let (dir, port) = (ssh.path().display().to_string(), free_port());
        for name in ["host", "other-host", "user"] {
            let made =
                Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(ssh.path().join(name)).status().unwrap();
            assert!(made.success());
        }
        let known = |key: &str| format!("[127.0.0.1]:{port} {}", fs::read_to_string(ssh.path().join(format!("{key}.pub"))).unwrap());
        fs::write(ssh.path().join("known_hosts"), known("host")).unwrap();
        fs::write(ssh.path().join("wrong_hosts"), known("other-host")).unwrap();
        let config = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {dir}/host\nAuthorizedKeysFile {dir}/authorized_keys\nStrictModes no\nUsePAM no\n\
             PidFile none\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nMaxStartups 200\nMaxSessions 200\n"
        );
        fs::write(ssh.path().join("sshd_config"), config).unwrap();
        // An alias, as a user's own configuration has them.
        let config = format!(
            "Host there\n HostName 127.0.0.1\n Port {port}\nHost *\n UserKnownHostsFile {dir}/known_hosts\n GlobalKnownHostsFile /dev/null\n\
             StrictHostKeyChecking yes\n IdentityFile {dir}/user\n IdentitiesOnly yes\n"
        );
        fs::write(ssh.path().join("config"), config).unwrap();
        let _ = fs::create_dir_all("/run/sshd");
        let log = fs::File::create(ssh.path().join("log")).unwrap();
        let mut command = Command::new("/usr/sbin/sshd");
        command.args(["-D", "-e", "-f"]).arg(ssh.path().join("sshd_config"));
        let sshd = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let world = Self { keepd, ssh, port, sshd };
        world.authorize("");
        wait_for("sshd does not answer", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        world
    }

    /// What the key may do, in the words of authorized_keys.
    fn authorize(&self, options: &str) {
        let key = fs::read_to_string(self.ssh.path().join("user.pub")).unwrap();
        fs::write(self.ssh.path().join("authorized_keys"), format!("{options} {key}")).unwrap();
    }

    fn logins(&self) -> usize {
        fs::read_to_string(self.ssh.path().join("log")).unwrap().matches("Accepted publickey").count()
    }

    fn host(&self) -> String {
        format!("{}@127.0.0.1:{}", user(), self.port)
    }

    /// keepctl without words of ours.
    fn bare(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(keepctl_binary());
        command.args(arguments).env("KEEPD_SSH_COMMAND", format!("ssh -F {}/config", self.ssh.path().display())).stdin(Stdio::null());
        command.env_remove("KEEPD_HOST").env_remove("KEEPD_SOCKET");
        command
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let (keepctl, socket) = (keepctl_binary(), self.keepd.path("keepd.sock"));
        let first = ["--host", &self.host(), "--remote-command", keepctl.to_str().unwrap(), "--socket", socket.to_str().unwrap()]
            .map(str::to_owned);
        let all: Vec<&str> = first.iter().map(String::as_str).chain(arguments.iter().copied()).collect();
        self.bare(&all)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let out = self.run(arguments);
        assert!(out.status.success(), "{arguments:?}: {}{}", text(&out), self.keepd.log());
        String::from_utf8(out.stdout).unwrap()
    }

    fn path(&self, name: &str) -> String {
        self.keepd.path(name).display().to_string()
    }

    /// Bridges that run for this daemon.
    fn bridges(&self) -> usize {
        let of = |pid: &Path| {
            let line = fs::read(pid.join("cmdline")).unwrap_or_default();
            let mut words = line.split(|b| *b == 0);
            let is_ours = fs::read_link(pid.join("exe")).is_ok_and(|exe| exe == keepctl_binary());
            is_ours && words.any(|w| w == b"bridge") && self.is_below_sshd(pid)
        };
        fs::read_dir("/proc").unwrap().flatten().filter(|e| of(&e.path())).count()
    }

    /// All tests run at once.
    fn is_below_sshd(&self, pid: &Path) -> bool {
        let parent = |pid: &Path| -> Option<u32> {
            let stat = fs::read_to_string(pid.join("stat")).ok()?;
            stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
        };
        let mut at = parent(pid);
        while let Some(pid) = at.filter(|pid| *pid > 1) {
            if pid == self.sshd.id() {
                return true;
            }
            at = parent(Path::new(&format!("/proc/{pid}")));
        }
        false
    }
}

fn same_file(a: &str, b: &str) {
    assert!(fs::read(a).unwrap() == fs::read(b).unwrap(), "{a} and {b} differ");
}

#[test]
fn what_works_here_works_there() {
    let world = World::started();
    fill(&world.keepd);
    world.ok(&["status"]);
    // Lines of progress, and one login for all connections of a keepctl.
    let before = world.logins();
    let made = world.run(&["backup", "shop", "--name", "one"]);
    assert!(made.status.success() && text(&made).contains("is made") && text(&made).contains("entries"), "{}", text(&made));
    assert_eq!(world.logins() - before, 1);
    for arguments in
        [&["list", "--json"][..], &["ls", "latest", "-R"], &["job", "show", "shop"], &["config", "show"], &["destination", "list"]]
    {
        assert_eq!(world.ok(arguments), world.keepd.ok(arguments), "{arguments:?}");
    }
    let (here, there) = (world.path("restored-here"), world.path("restored-there"));
    world.keepd.ok(&["restore", "latest", "--to", &here]);
    let said = world.ok(&["restore", "latest", "--to", &there]);
    assert!(said.contains("restored"), "{said}");
    assert_same(Path::new(&here), Path::new(&there));
    let cat = world.run(&["cat", "latest", "files/long"]);
    assert!(cat.status.success() && cat.stdout == fs::read(world.path("files/long")).unwrap(), "{}", String::from_utf8_lossy(&cat.stderr));

    fs::write(world.path("files/deep/note.txt"), "another note").unwrap();
    let (a, b) = (world.keepd.ok(&["compare", "latest"]), world.ok(&["compare", "latest"]));
    assert!(a == b && a.contains("M files/deep/note.txt"), "{a}{b}");
    // Errors and exit statuses are those of the daemon.
    let (a, b) = (world.keepd.ctl(&["show", "nonesuch"]), world.run(&["show", "nonesuch"]));
    assert_eq!((a.status.code(), text(&a)), (b.status.code(), text(&b)));
}

#[test]
fn archives_keys_kits_and_configurations_land_here_and_come_from_here() {
    let world = World::started();
    fill(&world.keepd);
    world.ok(&["backup", "shop"]);
    let away = tempfile::tempdir().unwrap();
    let at = |name: &str| away.path().join(name).display().to_string();

    let said = world.ok(&["export", "latest", "-o", &at("a.tar.gz")]);
    assert!(said.contains("exported"), "{said}");
    let out = world.run(&["export", "latest", "-o", "-", "--compression", "gzip"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let listed = |file: &str| Command::new("tar").args(["-tzf", file]).output().unwrap();
    fs::write(at("b.tar.gz"), &out.stdout).unwrap();
    let (a, b) = (listed(&at("a.tar.gz")), listed(&at("b.tar.gz")));
    assert!(a.status.success() && b.status.success() && a.stdout == b.stdout && a.stdout.starts_with(b"manifest.json\n"));

    // Sealed with a key of its own, which lands here, too; and back.
    world.ok(&["export", "latest", "-o", &at("c.tar.zst.enc")]);
    assert_eq!(fs::metadata(at("c.tar.zst.enc.key")).unwrap().permissions().mode() & 0o777, 0o600);
    let import = ["import", &at("c.tar.zst.enc"), "--key", &at("c.tar.zst.enc.key"), "--on-conflict", "rename"];
    world.ok(&import);
    let imported = world.keepd.json(&["list", "--type", "imported"]);
    let id = imported[0]["id"].as_str().unwrap().to_owned();
    assert_same(&world.keepd.restored(&id).join("files"), &world.keepd.path("files"));
    let without = world.run(&["import", &at("c.tar.zst.enc"), "--on-conflict", "rename"]);
    assert_eq!(without.status.code(), Some(1), "{}", text(&without));
    // From standard input, and a directory through tar.
    let mut command = world.command(&["import", "-", "--on-conflict", "rename", "--detach"]);
    let out = command.stdin(fs::File::open(at("a.tar.gz")).unwrap()).output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    fs::create_dir(at("old")).unwrap();
    fs::write(at("old/one"), noise(3 << 20, 8)).unwrap();
    world.ok(&["import", &at("old"), "--job", "shop", "--source", "files"]);
    wait_for("both are there", || world.keepd.json(&["list", "--type", "imported"]).as_array().unwrap().len() == 3);

    world.ok(&["config", "export", "-o", &at("all.json.gz.enc"), "--include-secrets"]);
    let told = world.ok(&["config", "validate", &at("all.json.gz.enc")]);
    assert!(told.contains("can be imported"), "{told}");
    let changed = world.ok(&["config", "import", &at("all.json.gz.enc"), "--yes"]);
    assert!(!changed.is_empty());
    world.ok(&["key", "kit", "main", "-o", &at("kit.py")]);
    assert!(fs::read_to_string(at("kit.py")).unwrap().contains("keepd-key-1 "));
    assert_eq!(fs::metadata(at("kit.py")).unwrap().permissions().mode() & 0o777, 0o600);
    // What is there is not written over, also from there.
    let again = world.run(&["export", "latest", "-o", &at("a.tar.gz")]);
    assert!(again.status.code() == Some(1) && text(&again).contains("not overwritten"), "{}", text(&again));
    // What needs this machine says so.
    let rotate = world.run(&["key", "rotate", "main", "--to", &world.path("main.key")]);
    assert!(rotate.status.code() == Some(2) && text(&rotate).contains("--host"), "{}", text(&rotate));
}

#[test]
fn a_private_key_is_lent_over_the_line() {
    let keepd = Keepd::prepared();
    let away = tempfile::tempdir().unwrap();
    let private = away.path().join("read").display().to_string();
    assert!(Command::new(keepd_binary()).args(["key", "generate", "--pair", &private]).output().unwrap().status.success());
    let config = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let config = config.replace("key_file = \"main.key\"\n", &format!("key_file = \"main.key\"\npublic_key = \"{private}.pub\"\n"));
    fs::write(keepd.path("keepd.toml"), config).unwrap();
    drop(make_database(&keepd.path("shop.db"), 50));
    fs::write(keepd.path("files/big"), noise(3 << 20, 5)).unwrap();
    let mut world = World::of(keepd);
    world.keepd.start();
    world.ok(&["backup", "shop"]);
    // What this process of keepd wrote, it can read.
    world.keepd.stop();
    world.keepd.start();
    let without = world.run(&["cat", "latest", "files/big"]);
    assert!(!without.status.success() && text(&without).contains("--key FILE"), "{}", text(&without));
    let with = world.run(&["cat", "latest", "files/big", "--key", &private]);
    assert!(with.status.success() && with.stdout == noise(3 << 20, 5), "{}", String::from_utf8_lossy(&with.stderr));
    let to = world.path("restored");
    world.ok(&["restore", "latest", "--to", &to, "--key", &private]);
    same_file(&format!("{to}/files/big"), &world.path("files/big"));
    // The rights of the file are those that it has here.
    fs::set_permissions(&private, fs::Permissions::from_mode(0o644)).unwrap();
    let open = world.run(&["cat", "latest", "files/big", "--key", &private]);
    assert!(!open.status.success() && text(&open).contains("0644") && text(&open).contains("read"), "{}", text(&open));
}

#[test]
fn whoever_stops_early_ends_it_at_both_ends() {
    let world = World::started();
    fs::write(world.keepd.path("files/huge"), noise(96 << 20, 7)).unwrap();
    world.keepd.ok(&["backup", "shop"]);
    // A reader that goes away.
    let mut cat = world.command(&["cat", "latest", "files/huge"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = vec![0; 1000];
    cat.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert!(first == noise(1000, 7));
    // One that does not go on holds up what comes: memory is bounded at both ends.
    std::thread::sleep(Duration::from_secs(1));
    let high = fs::read_to_string(format!("/proc/{}/status", cat.id())).unwrap();
    let high = high.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap().trim().trim_end_matches(" kB").parse::<u64>().unwrap();
    assert!(high < 64 << 10, "{high} kB");
    drop(cat.stdout.take());
    assert!(cat.wait().unwrap().code().is_some());
    let is_over = || world.keepd.json(&["run", "list"]).as_array().unwrap().iter().all(|r| r["state"] != "running");
    wait_for("the run goes on", is_over);
    wait_for("the bridge goes on", || world.bridges() == 0);

    // Ctrl-C, which a terminal sends to all of the foreground.
    let mut watch = world.command(&["watch"]);
    let mut watch = watch.process_group(0).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("no bridge began", || world.bridges() == 1);
    std::thread::sleep(Duration::from_millis(300));
    assert!(Command::new("kill").args(["-INT", "--", &format!("-{}", watch.id())]).status().unwrap().success());
    let ended = watch.wait().unwrap();
    assert!(ended.signal() == Some(2) || ended.code() == Some(130), "{ended:?}");
    wait_for("the bridge goes on", || world.bridges() == 0);
    // One that is killed outright.
    let mut watch = world.command(&["watch"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("no bridge began", || world.bridges() == 1);
    watch.kill().unwrap();
    watch.wait().unwrap();
    wait_for("the bridge goes on", || world.bridges() == 0);
}

#[test]
fn ctrl_c_cancels_the_run_there() {
    let keepd = Keepd::prepared();
    keepd.configure("", "hooks = { before = [\"/bin/sleep\", \"60\"] }");
    drop(make_database(&keepd.path("shop.db"), 5));
    let mut world = World::of(keepd);
    world.keepd.start();
    let mut backup = world.command(&["backup", "shop"]);
    let backup = backup.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for("no run began", || world.keepd.json(&["run", "list"]).as_array().unwrap().iter().any(|r| r["state"] == "running"));
    std::thread::sleep(Duration::from_millis(500));
    assert!(Command::new("kill").args(["-INT", "--", &format!("-{}", backup.id())]).status().unwrap().success());
    let out = backup.wait_with_output().unwrap();
    assert!(out.status.code() == Some(1) && text(&out).contains("was cancelled"), "{:?} {}", out.status, text(&out));
    assert_eq!(world.keepd.json(&["run", "list"])[0]["state"], "cancelled");
}

/// A line that gets stuck when so much went over it, so that there is something to be lost.
struct Stuck(World);

impl Stuck {
    /// `line` is a script that runs the bridge, which is `BRIDGE` in it.
    fn started(&self, line: &str, arguments: &[&str], stdout: Stdio) -> Child {
        let slow = self.0.ssh.path().join("slow");
        let bridge = format!("{} --socket {} bridge", keepctl_binary().display(), self.0.path("keepd.sock"));
        fs::write(&slow, line.replace("BRIDGE", &bridge)).unwrap();
        let mut command = self.0.command(arguments);
        command.env("KEEPD_SSH_COMMAND", format!("sh {}", slow.display()));
        command.stderr(Stdio::piped()).stdout(stdout).process_group(0).spawn().unwrap()
    }

    /// What comes from there is lost.
    fn coming(&self, arguments: &[&str], stdout: Stdio) -> Child {
        self.started("BRIDGE | { dd bs=4096 count=700 status=none; sleep 100; }\n", arguments, stdout)
    }

    /// Ends all of the line at once, and not keepctl.
    fn lost(&self, keepctl: Child) -> Output {
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let group = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(2)?.parse::<u32>().ok());
            let own: u32 = entry.file_name().to_string_lossy().parse().unwrap_or(0);
            if group == Some(keepctl.id()) && own != keepctl.id() {
                let _ = Command::new("kill").args(["-9", &own.to_string()]).stderr(Stdio::null()).status();
            }
        }
        let out = keepctl.wait_with_output().unwrap();
        assert!(out.status.code() == Some(4) && text(&out).contains("was lost"), "{:?} {}", out.status, text(&out));
        out
    }
}

#[test]
fn a_line_that_is_lost_leaves_nothing_half() {
    let world = World::started();
    fs::write(world.keepd.path("files/huge"), noise(64 << 20, 7)).unwrap();
    world.keepd.ok(&["backup", "shop"]);
    let (away, whole) = (tempfile::tempdir().unwrap(), world.path("whole.tar"));
    let at = |name: &str| away.path().join(name).display().to_string();
    world.keepd.ok(&["export", "latest", "-o", &whole]);
    let stuck = Stuck(world);
    let long = |path: &Path| path.metadata().is_ok_and(|m| m.len() > 1 << 20);

    let export = stuck.coming(&["export", "latest", "-o", &at("half.tar")], Stdio::piped());
    wait_for("the export did not begin", || files_below(away.path()).iter().any(|f| long(f)));
    stuck.lost(export);
    assert!(files_below(away.path()).is_empty());

    // What was sent to standard output cannot be taken back, and the exit status says that it is not whole.
    for arguments in [&["cat", "latest", "files/huge"][..], &["export", "latest", "-o", "-"]] {
        let out = fs::File::create(at("out")).unwrap();
        let keepctl = stuck.coming(arguments, out.into());
        wait_for("nothing came", || long(Path::new(&at("out"))));
        stuck.lost(keepctl);
    }

    let restore = stuck.coming(&["restore", "latest", "--to", &at("to"), "files/huge"], Stdio::piped());
    wait_for("nothing was restored", || files_below(Path::new(&at("to"))).iter().any(|f| long(f)));
    let said = text(&stuck.lost(restore));
    assert!(said.contains("is not complete") && said.contains(&at("to")), "{said}");

    // The other way: what came there of the archive is no backup.
    let import = stuck.started(
        "{ dd bs=4096 count=2000 status=none; sleep 100; } | BRIDGE\n",
        &["import", &whole, "--on-conflict", "rename"],
        Stdio::piped(),
    );
    let of_imports =
        || stuck.0.keepd.json(&["run", "list"]).as_array().unwrap().iter().filter(|r| r["kind"] == "import").cloned().collect();
    wait_for("the import did not begin", || {
        let runs: Vec<serde_json::Value> = of_imports();
        runs.iter().any(|r| r["progress"]["bytes"].as_u64() > Some(0) || r["state"] == "running")
    });
    std::thread::sleep(Duration::from_secs(1));
    stuck.lost(import);
    wait_for("the import goes on", || {
        let runs: Vec<serde_json::Value> = of_imports();
        runs.iter().all(|r| r["state"] == "failed" || r["state"] == "cancelled")
    });
    assert!(stuck.0.keepd.json(&["list", "--type", "imported"]).as_array().unwrap().is_empty());
}

#[test]
fn what_a_terminal_sends_while_an_editor_is_open_is_the_editors() {
    let world = World::started();
    let editor = world.path("editor");
    // The whole foreground gets it, keepctl and ssh with it.
    let lines = "#!/bin/sh\ntrap : INT QUIT\nkill -INT 0\nkill -QUIT 0\nsleep 1\n\
                 sed -i 's/^destinations = .*/&\\ntimezone = \"Europe\\/Berlin\"/' \"$1\"\n";
    write_program(editor.as_ref(), lines);
    let edit = |mut command: Command| {
        command.env("VISUAL", "").env("EDITOR", &editor).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.process_group(0).spawn().unwrap().wait_with_output().unwrap()
    };
    // What was typed stays, also when it was only tried.
    let tried = edit(world.keepd.ctl_command(&["job", "edit", "shop", "--dry-run"]));
    assert!(tried.status.success(), "{:?} {}", tried.status, text(&tried));
    let said = text(&tried);
    let kept = said.lines().find_map(|line| line.split_once("your text is kept in ")).unwrap_or_else(|| panic!("{said}")).1;
    assert!(fs::read_to_string(kept).unwrap().contains("Europe/Berlin"));
    fs::remove_file(kept).unwrap();
    let done = edit(world.command(&["job", "edit", "shop", "--yes"]));
    assert!(done.status.success(), "{:?} {}", done.status, text(&done));
    assert_eq!(world.keepd.json(&["job", "show", "shop"])["timezone"], "Europe/Berlin");

    // Afterwards it ends keepctl, as ever: here at the question.
    write_program(editor.as_ref(), "#!/bin/sh\nsed -i '/^timezone/d' \"$1\"\n");
    for signal in ["\u{3}", "\u{1c}"] {
        let environment = [("VISUAL", ""), ("EDITOR", editor.as_str())];
        let out = at_a_terminal_with(&world.keepd, &environment, &["job", "edit", "shop"], &[("so?", signal)], || ());
        assert!(matches!(out.status.code(), Some(254 | 253)), "{:?} {}", out.status, text(&out));
    }
    // One that forks and leaves the text as it is.
    let mut command = world.keepd.ctl_command(&["job", "edit", "shop", "--yes"]);
    let out = command.env("VISUAL", "true").output().unwrap();
    assert!(out.status.success() && text(&out).contains("--wait"), "{}", text(&out));
}

/// Wants this exit status, and words; nothing that a terminal obeys may come.
fn refused(out: &Output, code: i32, words: &[&str]) {
    let said = text(out);
    assert_eq!(out.status.code(), Some(code), "{said}");
    for word in words {
        assert!(said.contains(word), "'{word}' in: {said}");
    }
    assert!(!out.stdout.contains(&0x1b) && !out.stderr.contains(&0x1b), "{said:?}");
}

#[test]
fn what_is_in_the_way_is_named() {
    let world = World::started();
    let keepctl = keepctl_binary().display().to_string();
    // By an alias, and by the environment.
    let out = world.bare(&["-H", "there", "--remote-command", &keepctl, "--socket", &world.path("keepd.sock"), "status"]).output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    let mut command = world.bare(&["--socket", &world.path("keepd.sock"), "status"]);
    command.env("KEEPD_HOST", format!("ssh://{}", world.host())).env("KEEPD_REMOTE_KEEPCTL", &keepctl);
    assert!(command.output().unwrap().status.success());

    for wrong in ["-oProxyCommand=touch /tmp/x", "a b", "x@-y", "a;b", ""] {
        refused(&world.bare(&["--host", wrong, "status"]).output().unwrap(), 2, &["--host", "[user@]machine[:port]"]);
    }
    refused(&world.bare(&["--remote-command", "x", "status"]).output().unwrap(), 2, &["--host"]);
    // Completions and the manual go nowhere.
    assert!(world.bare(&["--host", "nonesuch.invalid", "completion", "bash"]).output().unwrap().status.success());

    let port = free_port();
    refused(&world.bare(&["--host", &format!("127.0.0.1:{port}"), "status"]).output().unwrap(), 4, &["Connection refused", "cannot reach"]);
    let known = format!("UserKnownHostsFile={}/wrong_hosts", world.ssh.path().display());
    refused(&world.run(&["--ssh-option", &known, "status"]), 4, &["REMOTE HOST IDENTIFICATION HAS CHANGED", "cannot reach"]);
    let missing = world.bare(&["--host", &world.host(), "--remote-command", "/nonesuch dir/keepctl", "status"]).output().unwrap();
    refused(&missing, 4, &["there is no /nonesuch dir/keepctl on", "--remote-command PATH"]);
    let no_socket = world.bare(&["--host", &world.host(), "--remote-command", &keepctl, "--socket", "/nonesuch.sock", "status"]);
    refused(&{ no_socket }.output().unwrap(), 4, &["cannot reach keepd at /nonesuch.sock", "127.0.0.1"]);

    // Login shells that print; one that prints and nothing else; an older keepctl.
    world.authorize("command=\"printf 'Welcome\\n\\033[2J to this machine'; exec $SSH_ORIGINAL_COMMAND\"");
    world.ok(&["status"]);
    world.authorize("command=\"printf 'Only \\033[2J this'\"");
    refused(&world.run(&["status"]), 4, &["ended with status 0 before it answered", "Only", "this"]);
    world.authorize("command=\"printf 'unrecognized \\033[2J' >&2; exit 2\"");
    refused(&world.run(&["status"]), 4, &["unrecognized", "older"]);
    world.authorize("command=\"yes\"");
    refused(&world.run(&["status"]), 4, &["is no keepctl"]);
    world.authorize("command=\"printf '\\000keepctl-bridge 9 9.9.9\\n'; cat\"");
    refused(&world.run(&["status"]), 4, &["version 9", "the same keepctl"]);
    // An ssh that cannot be had.
    let with = |line: &str| world.command(&["status"]).env("KEEPD_SSH_COMMAND", line).output().unwrap();
    refused(&with("/nonesuch/ssh -v"), 4, &["there is no program '/nonesuch/ssh' on this machine", "KEEPD_SSH_COMMAND"]);
    refused(&with("'/nonesuch/my ssh'"), 4, &["names no program of this machine"]);
    let mut command = world.command(&["status"]);
    refused(&command.env_remove("KEEPD_SSH_COMMAND").env("PATH", "/nonesuch").output().unwrap(), 4, &["there is no program 'ssh'"]);
    // Lines for the shell, as in git.
    world.authorize("");
    for line in ["X='a b' ssh -F CONFIG", "ssh -F CONFIG", "if true; then ssh -F CONFIG \"$@\"; fi; true"] {
        let out = with(&line.replace("CONFIG", &world.ssh.path().join("config").display().to_string()));
        assert!(out.status.success(), "{line}: {}", text(&out));
    }
}

#[test]
fn a_key_that_may_do_this_and_nothing_else() {
    let world = World::started();
    let (keepctl, socket) = (keepctl_binary().display().to_string(), world.path("keepd.sock"));
    // Another service of that machine, which only root may reach.
    let other = world.path("other.sock");
    let listener = UnixListener::bind(&other).unwrap();
    listener.set_nonblocking(true).unwrap();
    let bare = |arguments: &[&str]| world.bare(&[&["--host", &world.host()], arguments].concat()).output().unwrap();
    // As it stands in the manual, where the usual socket of that machine is this one; and with the socket on the line.
    for line in [format!("KEEPD_SOCKET={socket} {keepctl} bridge"), format!("{keepctl} --socket {socket} bridge")] {
        world.authorize(&format!("command=\"{line}\",restrict"));
        for arguments in [&["status"][..], &["--socket", &socket, "status"]] {
            let out = bare(arguments);
            assert!(out.status.success(), "{}", text(&out));
        }
        refused(&bare(&["--socket", &other, "status"]), 4, &["only the socket", &socket, &other]);
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    }
}

#[test]
fn another_user_has_the_rights_of_that_user() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can become another user");
        return;
    }
    let world = World::started();
    let there = world.ssh.path().join("as-nobody");
    // The copy is where anybody can run it.
    let keepctl = world.ssh.path().join("keepctl");
    copy_program(&keepctl_binary(), &keepctl);
    let script = format!(
        "#!/bin/sh\nexec setpriv --reuid=65534 --regid=65534 --clear-groups {} --socket {} bridge\n",
        keepctl.display(),
        world.path("keepd.sock")
    );
    write_program(&there, &script);
    for (path, mode) in [(there.as_path(), 0o755), (keepctl.as_path(), 0o755), (world.ssh.path(), 0o755)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let run = || world.command(&["status"]).env("KEEPD_SSH_COMMAND", there.display().to_string()).output().unwrap();
    refused(&run(), 5, &["you may not connect", "Permission denied"]);
    // Through the socket, and refused by the daemon.
    fs::set_permissions(world.keepd.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(world.path("keepd.sock"), fs::Permissions::from_mode(0o666)).unwrap();
    refused(&run(), 5, &["may"]);
}

/// Far ends by hand.
struct Hostile {
    dir: tempfile::TempDir,
}

const DATA: u8 = 4;

fn frame(kind: u8, id: u32, payload: &[u8]) -> Vec<u8> {
    [&[kind][..], &id.to_be_bytes(), &(payload.len() as u32).to_be_bytes(), payload].concat()
}

impl Hostile {
    /// Sends this behind a good greeting, then `then` (shell).
    fn sends(&self, frames: &[u8], then: &str, arguments: &[&str]) -> Output {
        let (bytes, script) = (self.dir.path().join("bytes"), self.dir.path().join("script"));
        fs::write(&bytes, frames).unwrap();
        // Not before it was asked to connect.
        let script_text = format!("printf '\\000keepctl-bridge 1 0.1.0\\n'\nsleep 0.5\ncat {}\n{then}\n", bytes.display());
        fs::write(&script, script_text).unwrap();
        let mut command = Command::new(keepctl_binary());
        command.args(["--host", "evil"]).args(arguments).stdin(Stdio::null());
        command.env("KEEPD_SSH_COMMAND", format!("sh {}", script.display())).env_remove("KEEPD_SOCKET");
        let since = Instant::now();
        let out = command.output().unwrap();
        assert!(since.elapsed() < Duration::from_secs(50), "{}", text(&out));
        out
    }
}

#[test]
fn far_ends_that_want_no_good_get_nothing() {
    let hostile = Hostile { dir: tempfile::tempdir().unwrap() };
    let stay = "cat > /dev/null";
    let opened = frame(2, 1, b"");
    let lost = "what comes is not what a bridge sends";
    let huge = [&[DATA][..], &1u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat();
    refused(&hostile.sends(&[opened.clone(), huge].concat(), stay, &["status"]), 4, &[lost, "4294967295 bytes"]);
    for (frames, word) in [
        (frame(DATA, 77, b"x"), "nobody asked for"),
        (frame(6, 77, b""), "nobody asked for"),
        (frame(42, 1, b""), "unknown kind 42"),
        (frame(0, 1, b"{}"), "Hello"),
        (frame(1, 1, b""), "Open"),
        (frame(9, 1, b"[]"), "Pass"),
        ([opened.clone(), frame(5, 1, &u32::MAX.to_be_bytes())].concat(), "more credit"),
        ([opened.clone(), frame(5, 1, b"12")].concat(), "no number"),
        ([opened.clone(), opened.clone()].concat(), "does not belong"),
        ([opened.clone(), frame(8, 1, b"")].concat(), "does not belong"),
    ] {
        refused(&hostile.sends(&frames, stay, &["status"]), 4, &[lost, word]);
    }
    refused(&hostile.sends(&[opened.clone(), vec![DATA, 0, 0]].concat(), "exit 0", &["status"]), 4, &["was lost"]);
    refused(&hostile.sends(&opened, "exit 0", &["status"]), 4, &["was lost"]);
    refused(&hostile.sends(&[opened.clone(), frame(6, 1, b"")].concat(), stay, &["status"]), 4, &["was lost"]);
    // Not the exit status that it would like.
    refused(&hostile.sends(&frame(3, 1, b"\0all is well \x1b[2J"), stay, &["status"]), 4, &["all is well", "u{1b}"]);
    refused(&hostile.sends(&frame(3, 1, b""), stay, &["status"]), 4, &[]);
    let reply = |json: &str| [opened.clone(), frame(DATA, 1, &[json.as_bytes(), b"\0"].concat())].concat();
    let wrong = reply(r#"{"error":"io.keepd.Control.Failed","parameters":{"message":"boo \u001b]0;x\u0007"}}"#);
    refused(&hostile.sends(&wrong, stay, &["status"]), 1, &["boo"]);
    refused(&hostile.sends(&reply(r#"{"error":"\u001b[2J"}"#), stay, &["status"]), 1, &["u{1b}"]);
    refused(&hostile.sends(&reply(r#"{"parameters":{"status":7}}"#), stay, &["status"]), 1, &["not understood"]);
    refused(&hostile.sends(&reply(r#"{"parameters":{"run":"\u001b[2J"}}"#), stay, &["backup", "shop", "--detach"]), 0, &["u{1b}"]);
    refused(
        &hostile.sends(&reply(r#"{"parameters":{"run":"\u001b[2J"}}"#), stay, &["key", "re-encrypt", "d", "--yes", "--detach"]),
        0,
        &["u{1b}"],
    );
    let slots = r#"{"parameters":{"profiles":[],"destinations":[{"destination":"d","slots":[],"error":"boo\u001b[2J"}]}}"#;
    refused(&hostile.sends(&reply(slots), stay, &["key", "remove", "d", "x"]), 1, &["boo\\u{1b}"]);
    refused(&hostile.sends(b"", "printf 'said \\033[2J\\n' >&2; exit 1", &["status"]), 4, &["said", "was lost"]);
    // A reply without end, in allowed pieces and in all that may come unasked.
    let endless: Vec<u8> = (0..200).flat_map(|_| frame(DATA, 1, &[b'x'; 60 << 10])).collect();
    let out = hostile.sends(&[opened.clone(), endless].concat(), stay, &["status"]);
    let said = text(&out);
    assert!(said.contains("more than any reply") || said.contains("than was asked for"), "{said}");
    assert!(matches!(out.status.code(), Some(1 | 4)), "{said}");
    let small: Vec<u8> = (0..3_000_000).flat_map(|_| frame(DATA, 1, b"")).collect();
    refused(&hostile.sends(&[opened.clone(), small].concat(), "exit 0", &["status"]), 4, &["was lost"]);
    // A stream that is no restore.
    let to = hostile.dir.path().join("to").display().to_string();
    let started = r#"{"parameters":{"run":"r","backup":"b","bytes":1,"entries":1}}"#;
    let second = hostile.dir.path().join("second");
    fs::write(&second, [frame(DATA, 2, &[0xff; 5000]), frame(6, 2, b"")].concat()).unwrap();
    // When it was asked for.
    let then = format!("sleep 1; cat {}; {stay}", second.display());
    refused(&hostile.sends(&reply(started), &format!("{then} & sleep 5"), &["restore", "latest", "--to", &to]), 4, &["was lost"]);
    assert!(files_below(&PathBuf::from(&to)).is_empty());
    // Before.
    let early = [reply(started), fs::read(&second).unwrap()].concat();
    refused(&hostile.sends(&early, stay, &["restore", "latest", "--to", &to]), 4, &["nobody asked for"]);
    assert!(files_below(&PathBuf::from(to)).is_empty());
}

/// A far end that answers in the words of a test.
struct Scripted {
    keepctl: Child,
    line: (fs::File, BufReader<fs::File>),
    _dir: tempfile::TempDir,
}

impl Scripted {
    fn of(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        assert!(Command::new("mkfifo").args([at("down"), at("up")]).status().unwrap().success());
        fs::write(at("script"), format!("exec 3<&0\ncat <&3 > {} &\nexec cat {}\n", at("up"), at("down"))).unwrap();
        let mut command = Command::new(keepctl_binary());
        command.args(["--host", "far"]).args(arguments).env("KEEPD_SSH_COMMAND", format!("sh {}", at("script"))).env_remove("KEEPD_SOCKET");
        let keepctl = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut down = fs::File::options().write(true).open(at("down")).unwrap();
        down.write_all(b"\0keepctl-bridge 1 0.1.0\n").unwrap();
        let up = BufReader::new(fs::File::open(at("up")).unwrap());
        Self { keepctl, line: (down, up), _dir: dir }
    }

    fn sends(&mut self, kind: u8, id: u32, payload: &[u8]) {
        self.line.0.write_all(&frame(kind, id, payload)).unwrap();
    }

    /// The next frame of this kind; the others are passed over.
    fn hears(&mut self, kind: u8) -> (u32, Vec<u8>) {
        loop {
            let (found, id, payload) = read_frame(&mut self.line.1);
            if found == kind {
                return (id, payload);
            }
        }
    }

    /// Takes a connection and its one call, and answers it.
    fn answers(&mut self, reply: &str) {
        let id = self.hears(OPEN).0;
        self.sends(OPENED, id, b"");
        while self.hears(DATA).1.last() != Some(&0) {}
        self.sends(DATA, id, &[reply.as_bytes(), b"\0"].concat());
    }

    /// The line goes first, or last.
    fn ends(self, is_lost: bool) -> Output {
        let _line = Some(self.line).filter(|_| !is_lost);
        self.keepctl.wait_with_output().unwrap()
    }
}

const OPEN: u8 = 1;
const OPENED: u8 = 2;
const CREDIT: u8 = 5;
const END: u8 = 6;
const DROP: u8 = 7;
const DONE: u8 = 8;
const PASS: u8 = 9;

fn read_frame(from: &mut impl Read) -> (u8, u32, Vec<u8>) {
    let mut header = [0; 9];
    from.read_exact(&mut header).unwrap();
    let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
    let mut payload = vec![0; number(5) as usize];
    from.read_exact(&mut payload).unwrap();
    (header[0], number(1), payload)
}

#[test]
fn less_than_all_on_standard_output_is_no_success() {
    let preview = r#"{"parameters":{"items":[],"instance":"x","profiles":[]}}"#;
    let made = r#"{"parameters":{"items":1,"secrets":0,"bytes":10,"sha256":"x"}}"#;
    let exported = |given: &[u8], end: Option<u8>| {
        let mut far = Scripted::of(&["config", "export", "-o", "-", "--encryption", "none"]);
        far.answers(preview);
        far.answers(made);
        // The first id is the preview's connection, the second one the export's.
        far.sends(DATA, 3, given);
        if let Some(end) = end {
            far.sends(END, 3, &[end]);
            assert_eq!(far.hears(DONE), (3, vec![end]));
        }
        let out = far.ends(end.is_none());
        assert_eq!(out.stdout, given, "{}", text(&out));
        out
    };
    let whole = exported(b"ten bytes.", Some(0));
    assert!(whole.status.success(), "{}", text(&whole));
    refused(&exported(b"half", Some(0)), 1, &["4 of 10 bytes"]);
    refused(&exported(b"half", Some(1)), 1, &["broken off"]);
    refused(&exported(b"half", None), 4, &["was lost"]);
}

#[test]
fn an_archive_that_did_not_come_whole_is_never_said_to_be() {
    let dir = tempfile::tempdir().unwrap();
    let good = dir.path().join("archive").display().to_string();
    fs::write(&good, b"an archive").unwrap();
    // How the far end says that it was written, and whether keepctl then says that all of it went. Of the last one the first byte cannot be read.
    for (archive, written, is_confirmed) in [(good.as_str(), 0, true), (&good, 1, false), (&good, 2, true), ("/proc/self/mem", 0, false)] {
        let mut far = Scripted::of(&["import", archive, "--destination", "d"]);
        let mut stream = 0;
        let said = loop {
            let (kind, id, payload) = read_frame(&mut far.line.1);
            match kind {
                OPEN => far.sends(OPENED, id, b""),
                PASS => stream = serde_json::from_slice::<serde_json::Value>(&payload).unwrap()[0]["id"].as_u64().unwrap(),
                END if u64::from(id) == stream => far.sends(DONE, id, &[written]),
                DATA if u64::from(id) != stream => {
                    let call = String::from_utf8(payload).unwrap();
                    let reply = match call.as_str() {
                        c if c.contains("CancelImport") || c.contains("\"last\":true") => break call,
                        c if c.contains("InitiateImport") => r#"{"parameters":{"import":"i","deadline":"2030-01-01T00:00:00Z"}}"#,
                        c if c.contains("StartImport") => r#"{"parameters":{"run":"r"}}"#,
                        c if c.contains("UploadImport") => r#"{"parameters":{"next":0}}"#,
                        _ => continue,
                    };
                    far.sends(DATA, id, &[reply.as_bytes(), b"\0"].concat());
                }
                _ => {}
            }
        };
        assert_eq!(said.contains("\"last\":true"), is_confirmed, "{archive} {written}: {said}");
        drop(far.ends(true));
    }
}

/// A bridge by hand, and the socket that it leads to.
struct Bridge {
    child: Child,
    listener: UnixListener,
    dir: tempfile::TempDir,
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Bridge {
    fn started(hello: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("a.sock")).unwrap();
        let mut command = Command::new(keepctl_binary());
        command.arg("--socket").arg(dir.path().join("a.sock")).arg("bridge").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut bridge = Self { child: command.stderr(Stdio::piped()).spawn().unwrap(), listener, dir };
        let mut byte = [0];
        while byte != *b"\n" {
            bridge.child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
        }
        bridge.sends(0, 0, hello.as_bytes());
        bridge
    }

    fn sends(&mut self, kind: u8, id: u32, payload: &[u8]) {
        self.child.stdin.as_mut().unwrap().write_all(&frame(kind, id, payload)).unwrap();
    }

    fn hears(&mut self) -> (u8, u32, Vec<u8>) {
        read_frame(self.child.stdout.as_mut().unwrap())
    }
}

#[test]
fn a_bridge_gives_the_daemon_whole_requests() {
    let mut bridge = Bridge::started(r#"{"version":"1"}"#);
    bridge.sends(OPEN, 1, b"");
    let (mut daemon, _) = bridge.listener.accept().unwrap();
    assert_eq!(bridge.hears().0, OPENED);
    let mut came = [0; 100];
    let mut reads = |wait: u64| {
        daemon.set_read_timeout(Some(Duration::from_millis(wait))).unwrap();
        loop {
            match daemon.read(&mut came) {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                other => break other.map(|n| came[..n].to_vec()),
            }
        }
    };
    bridge.sends(DATA, 1, b"{\"method\":");
    assert_eq!(reads(300).unwrap_err().kind(), ErrorKind::WouldBlock);
    bridge.sends(DATA, 1, b"1}\0{\"b\"");
    assert_eq!(reads(20_000).unwrap(), b"{\"method\":1}\0");
    assert_eq!(reads(300).unwrap_err().kind(), ErrorKind::WouldBlock);
    bridge.sends(DATA, 1, b":2}\0");
    assert_eq!(reads(20_000).unwrap(), b"{\"b\":2}\0");
    // One without an end is the daemon's to refuse: it comes nevertheless.
    for _ in 0..17 {
        bridge.sends(DATA, 1, &[b'x'; 64 << 10]);
    }
    assert_eq!(reads(20_000).unwrap(), [b'x'; 100]);
}

#[test]
fn a_bridge_holds_no_more_files_than_it_has_room_for() {
    let mut bridge = Bridge::started(r#"{"version":"1"}"#);
    bridge.sends(OPEN, 1, b"");
    let (mut daemon, _) = bridge.listener.accept().unwrap();
    assert_eq!(bridge.hears().0, OPENED);
    let piece = [7; 64 << 10];
    let mut held = 0;
    let mut refused = None;
    for id in 2..5 {
        bridge.sends(PASS, 1, format!(r#"[{{"id":{id},"way":{{"file":{{"mode":384,"name":"key"}}}}}}]"#).as_bytes());
        for _ in 0..(60 << 20) / piece.len() {
            bridge.sends(DATA, id, &piece);
            match bridge.hears() {
                (CREDIT, _, _) => held += piece.len(),
                (DROP, _, _) => {
                    refused = Some(id);
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        bridge.sends(END, id, &[0]);
        assert_eq!(bridge.hears(), (DONE, id, vec![u8::from(refused.is_some())]));
        if refused.is_some() {
            break;
        }
    }
    assert!(refused == Some(4) && held == 128 << 20, "{refused:?} {held}");
    // The call that wanted it is hung up.
    bridge.sends(DATA, 1, b"{}\0");
    assert_eq!(daemon.read(&mut [0; 10]).unwrap(), 0);
    bridge.child.kill().unwrap();
    let mut said = String::new();
    bridge.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("128 MiB"), "{said}");
}

#[test]
fn a_bridge_leads_to_its_own_socket_alone() {
    let mut bridge = Bridge::started(r#"{"version":"1","socket":"/run/dbus/system_bus_socket"}"#);
    let mut said = String::new();
    bridge.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    let own = bridge.dir.path().join("a.sock").display().to_string();
    assert!(said.contains("only the socket") && said.contains(&own) && said.contains("system_bus"), "{said}");
    assert!(!bridge.child.wait().unwrap().success());
}
