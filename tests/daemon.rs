//! The daemon's life as a service manager sees it: the real binary, a socket in systemd's place, real signals.

use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Long enough for a loaded machine; nothing here waits this long when all is well.
const PATIENCE: Duration = Duration::from_secs(20);

struct Bench {
    dir: tempfile::TempDir,
    config: PathBuf,
    notify: UnixDatagram,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().expect("tempdir");
    let notify = UnixDatagram::bind(dir.path().join("notify")).expect("notify socket");
    notify.set_read_timeout(Some(PATIENCE)).expect("timeout");
    std::fs::create_dir(dir.path().join("files")).expect("files");
    let bench = Bench { config: dir.path().join("keepd.toml"), dir, notify };
    bench.configure("one");
    bench
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn configure(&self, job: &str) {
        let dir = self.dir.path().display();
        let text = format!(
            "[daemon]\nstate_dir = \"{dir}/state\"\nsocket = \"{dir}/sock\"\n\n\
             [destination.local]\nservice = \"fs\"\nroot = \"{dir}/repository\"\nencryption = \"none\"\n\n\
             [job.{job}]\ndestinations = [\"local\"]\n\n[[job.{job}.source]]\nfiles = \"{dir}/files\"\n"
        );
        std::fs::write(&self.config, text).expect("configuration");
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keepd"));
        command.arg("--config").arg(&self.config).env("NOTIFY_SOCKET", self.path("notify"));
        for variable in ["JOURNAL_STREAM", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "RUST_LOG"] {
            command.env_remove(variable);
        }
        command
    }

    fn start(&self, command: &mut Command) -> Daemon {
        let log = std::fs::File::create(self.path("log")).expect("log");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("keepd starts");
        Daemon { child, log: self.path("log") }
    }

    /// The next datagram that holds `wanted`.
    fn told(&self, wanted: &str) -> String {
        let begun = Instant::now();
        let mut seen = String::new();
        while begun.elapsed() < PATIENCE {
            let mut buffer = [0; 4096];
            let n = match self.notify.recv(&mut buffer) {
                Ok(n) => n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    seen.push_str(&error.to_string());
                    break;
                }
            };
            let message = String::from_utf8_lossy(&buffer[..n]).into_owned();
            if message.contains(wanted) {
                return message;
            }
            seen.push_str(&format!("{message:?} "));
        }
        panic!("keepd never said {wanted}, only {seen}; its log: {}", std::fs::read_to_string(self.path("log")).unwrap_or_default());
    }
}

struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("signal");
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).expect("log")
    }

    fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().expect("wait") {
                return status;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("keepd does not end; its log: {}", self.log());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).expect("exists").permissions().mode() & 0o7777
}

#[test]
fn ready_status_and_a_clean_stop() {
    let bench = bench();
    let mut daemon = bench.start(&mut bench.command());
    let ready = bench.told("READY=1");
    assert!(ready.contains("STATUS=Idle; nothing scheduled"), "{ready}");
    assert_eq!(mode(&bench.path("state")), 0o700);
    assert_eq!(mode(&bench.path("sock")), 0o660);
    UnixStream::connect(bench.path("sock")).expect("it listens once it is ready");
    daemon.signal(Signal::TERM);
    bench.told("STOPPING=1");
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    assert!(!bench.path("sock").exists(), "its own socket is gone");
    let log = daemon.log();
    let own = format!("SIGTERM from process {} of uid", std::process::id());
    assert!(log.contains(&own) && !log.contains('\u{1b}'), "{log}");
}

#[test]
fn a_signal_reloads_and_a_wrong_configuration_changes_nothing() {
    let bench = bench();
    let mut daemon = bench.start(&mut bench.command());
    bench.told("READY=1");

    bench.configure("two");
    daemon.signal(Signal::HUP);
    let reloading = bench.told("RELOADING=1");
    let stamp = reloading.lines().find_map(|l| l.strip_prefix("MONOTONIC_USEC=")).expect("a time, or systemd would kill us");
    assert!(stamp.parse::<u64>().expect("a number") > 0);
    bench.told("READY=1");
    assert!(daemon.log().contains("configuration reloaded: 1 job"), "{}", daemon.log());

    std::fs::write(&bench.config, "[daemon]\nstate_dir = \n").expect("write");
    daemon.signal(Signal::HUP);
    bench.told("RELOADING=1");
    let ready = bench.told("READY=1");
    assert!(ready.contains("the configuration on disk is wrong"), "{ready}");
    assert!(daemon.log().contains("the one in force stays"), "{}", daemon.log());

    daemon.signal(Signal::INT);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
}

#[test]
fn a_second_daemon_is_refused_and_the_first_lives_on() {
    let bench = bench();
    let mut first = bench.start(&mut bench.command());
    bench.told("READY=1");
    let second = bench.command().output().expect("runs");
    assert_eq!(second.status.code(), Some(1));
    let said = text(&second.stderr);
    assert!(said.contains("another keepd") && said.contains("state"), "{said}");
    UnixStream::connect(bench.path("sock")).expect("the first one's socket is still there");
    first.signal(Signal::TERM);
    assert_eq!(first.wait().code(), Some(0));
}

#[test]
fn the_watchdog_is_fed() {
    let bench = bench();
    let mut command = bench.command();
    command.env("WATCHDOG_USEC", "600000");
    let daemon = bench.start(&mut command);
    bench.told("READY=1");
    bench.told("WATCHDOG=1");
    bench.told("WATCHDOG=1");
    drop(daemon);
}

#[test]
fn a_killed_daemon_is_followed_by_a_healthy_one() {
    let bench = bench();
    let mut first = bench.start(&mut bench.command());
    bench.told("READY=1");
    first.signal(Signal::KILL);
    first.wait();
    assert!(bench.path("sock").exists(), "nobody was there to remove it");
    let mut second = bench.start(&mut bench.command());
    bench.told("READY=1");
    UnixStream::connect(bench.path("sock")).expect("it listens in the stale socket's place");
    second.signal(Signal::TERM);
    assert_eq!(second.wait().code(), Some(0), "{}", second.log());
}

#[test]
fn a_client_that_sends_garbage_or_nothing_does_not_stop_it() {
    let bench = bench();
    let mut daemon = bench.start(&mut bench.command());
    bench.told("READY=1");
    let mut garbage = UnixStream::connect(bench.path("sock")).expect("connect");
    let _ = garbage.write_all(&[0xff; 64 * 1024]);
    let _silent = UnixStream::connect(bench.path("sock")).expect("connect");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    garbage.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let mut rest = Vec::new();
    let _ = garbage.read_to_end(&mut rest);
}

#[test]
fn a_wrong_configuration_ends_with_its_own_code_and_check_with_one() {
    let bench = bench();
    let check = |bench: &Bench| -> Output { bench.command().arg("--check").output().expect("runs") };
    let good = check(&bench);
    assert_eq!(good.status.code(), Some(0), "{}", text(&good.stderr));
    assert!(text(&good.stdout).contains("is valid: 1 job, "), "{}", text(&good.stdout));
    assert!(!bench.path("state").exists(), "a check changes nothing");

    std::fs::write(&bench.config, "[daemon\n").expect("write");
    let wrong = check(&bench);
    assert_eq!(wrong.status.code(), Some(1));
    assert!(text(&wrong.stderr).contains("keepd.toml"), "{}", text(&wrong.stderr));
    let start = bench.command().output().expect("runs");
    assert_eq!(start.status.code(), Some(78), "{}", text(&start.stderr));
    let usage = bench.command().arg("--nonsense").output().expect("runs");
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn a_key_is_made_once_and_for_its_owner_alone() {
    let bench = bench();
    let key = bench.path("main.key");
    let generate = || Command::new(env!("CARGO_BIN_EXE_keepd")).args(["key", "generate"]).arg(&key).output().expect("runs");
    let made = generate();
    assert_eq!(made.status.code(), Some(0), "{}", text(&made.stderr));
    assert_eq!(mode(&key), 0o600);
    let content = std::fs::read(&key).expect("key");
    let again = generate();
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("main.key"), "{}", text(&again.stderr));
    assert_eq!(std::fs::read(&key).expect("key"), content);
}

#[test]
fn a_missing_key_is_told_but_stops_no_start_and_is_refused_by_check() {
    let bench = bench();
    let text_before = std::fs::read_to_string(&bench.config).expect("configuration");
    let key = bench.path("missing.key");
    let with_key = text_before.replace("encryption = \"none\"", "encryption = \"main\"");
    std::fs::write(&bench.config, format!("[encryption.main]\nkey_file = \"{}\"\n\n{with_key}", key.display())).expect("write");
    let check = bench.command().arg("--check").output().expect("runs");
    assert_eq!(check.status.code(), Some(1));
    assert!(text(&check.stderr).contains("missing.key"), "{}", text(&check.stderr));
    let mut daemon = bench.start(&mut bench.command());
    bench.told("READY=1");
    assert!(daemon.log().contains("missing.key"), "{}", daemon.log());
    daemon.signal(Signal::HUP);
    bench.told("RELOADING=1");
    let ready = bench.told("READY=1");
    assert!(ready.contains("the configuration on disk is wrong"), "{ready}");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
}
