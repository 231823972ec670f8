//! A keepd of a test's own: configuration, key, repository and socket in a temporary directory, the real binaries.
#![allow(dead_code)]

pub mod databases;
pub mod servers;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

pub struct Keepd {
    pub dir: tempfile::TempDir,
    /// Of the daemon, beside what it inherits.
    pub environment: Vec<(String, String)>,
    /// The daemon is started through this (a namespace, limits), which becomes it.
    pub wrapper: Vec<String>,
    /// The file that the daemon reads.
    pub config: PathBuf,
    child: Option<Child>,
}

pub fn keepd_binary() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_keepd"))
}

pub fn keepctl_binary() -> PathBuf {
    let path = keepd_binary().with_file_name("keepctl");
    assert!(path.exists(), "{} is missing: run 'cargo build --workspace --bins' first", path.display());
    path
}

/// The Python of the project's own environment, with the packages of the decoder and the foreign client.
pub fn python() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    assert!(path.exists(), "{} is missing: run 'sh tests/install-tools.sh test' first", path.display());
    path
}

impl Keepd {
    /// Sources db (shop.db, WAL) and files (`files`), one destination; not started.
    pub fn prepared() -> Self {
        Self::prepared_in(tempfile::tempdir().unwrap())
    }

    pub fn prepared_in(dir: tempfile::TempDir) -> Self {
        let config = dir.path().join("keepd.toml");
        let keepd = Self { dir, environment: Vec::new(), wrapper: Vec::new(), config, child: None };
        keepd.generate_key("main.key");
        fs::create_dir(keepd.path("files")).unwrap();
        keepd.configure("", "");
        keepd
    }

    pub fn started() -> Self {
        let mut keepd = Self::prepared();
        make_database(&keepd.path("shop.db"), 500);
        fs::create_dir_all(keepd.path("files/deep")).unwrap();
        fs::write(keepd.path("files/deep/note.txt"), "a note").unwrap();
        fs::write(keepd.path("files/big"), noise(3 << 20, 5)).unwrap();
        std::os::unix::fs::symlink("deep/note.txt", keepd.path("files/link")).unwrap();
        keepd.start();
        keepd
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn generate_key(&self, name: &str) {
        let status = Command::new(keepd_binary()).args(["key", "generate"]).arg(self.path(name)).stdout(Stdio::null()).status().unwrap();
        assert!(status.success());
    }

    /// Writes the configuration; `destination` and `job` are further lines of their tables.
    pub fn configure(&self, destination: &str, job: &str) {
        let d = self.dir.path().display();
        let text = format!(
            "[daemon]\nstate_dir = \"{d}/state\"\nsocket = \"{d}/keepd.sock\"\n[encryption.main]\nkey_file = \"main.key\"\n\
             [destination.local]\nservice = \"fs\"\nroot = \"{d}/repository\"\nencryption = \"main\"\n{destination}\n\
             [job.shop]\ndestinations = [\"local\"]\n{job}\n\
             [[job.shop.source]]\nname = \"db\"\nsqlite = \"{d}/shop.db\"\n[[job.shop.source]]\nname = \"files\"\nfiles = \"{d}/files\"\n"
        );
        fs::write(self.path("keepd.toml"), text).unwrap();
    }

    pub fn command(&self) -> Command {
        let words: Vec<std::ffi::OsString> = self.wrapper.iter().map(Into::into).chain([keepd_binary().into()]).collect();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg("--config").arg(&self.config).env_remove("NOTIFY_SOCKET").env_remove("LISTEN_FDS");
        command
    }

    pub fn start(&mut self) {
        self.try_start(Duration::from_secs(30)).unwrap();
    }

    /// The same where it may refuse: what it said, then. One that neither answers nor ends within `patience` fails the test.
    pub fn try_start(&mut self, patience: Duration) -> Result<(), String> {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("keepd.log")).unwrap();
        let before = self.log().len();
        self.child = Some(self.command().envs(self.environment.iter().cloned()).stderr(log).spawn().unwrap());
        let since = Instant::now();
        while !self.ctl(&["status"]).status.success() {
            if let Some(ended) = self.child.as_mut().unwrap().try_wait().unwrap() {
                self.child = None;
                return Err(format!("{ended}: {}", self.log().get(before..).unwrap_or_default()));
            }
            assert!(since.elapsed() < patience, "keepd does not answer: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Whether it still runs; one that ended is forgotten.
    pub fn is_alive(&mut self) -> bool {
        let is_alive = self.child.as_mut().is_some_and(|child| child.try_wait().unwrap().is_none());
        if !is_alive {
            self.child = None;
        }
        is_alive
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("keepd.log")).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            signal(child.id(), "TERM");
            assert!(child.wait().unwrap().success(), "{}", self.log());
        }
    }

    pub fn ctl(&self, arguments: &[&str]) -> Output {
        self.ctl_command(arguments).output().unwrap()
    }

    pub fn ctl_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(keepctl_binary());
        command.arg("--socket").arg(self.path("keepd.sock")).args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs keepctl and wants success; gives standard output.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let out = self.ctl(arguments);
        assert!(out.status.success(), "keepctl {arguments:?}: {}\n{}", text(&out), self.log());
        String::from_utf8(out.stdout).unwrap()
    }

    pub fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[arguments, &["--json"]].concat())).unwrap()
    }

    /// Runs keepctl and wants this exit status; gives what it said.
    pub fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let out = self.ctl(arguments);
        assert_eq!(out.status.code(), Some(code), "keepctl {arguments:?}: {}", text(&out));
        text(&out)
    }

    pub fn backups(&self) -> Vec<String> {
        self.json(&["list"]).as_array().unwrap().iter().map(|b| b["id"].as_str().unwrap().to_owned()).collect()
    }

    /// Restores a backup to a fresh directory.
    pub fn restored(&self, backup: &str) -> PathBuf {
        let to = self.path(&format!("restored-{}", fs::read_dir(self.dir.path()).unwrap().count()));
        self.ok(&["restore", backup, "--to", to.to_str().unwrap()]);
        to
    }

    /// Changes a bit in the middle of the longest pack; which one that is.
    pub fn damage_a_pack(&self) -> PathBuf {
        let pack = self.packs().into_iter().max_by_key(|p| fs::metadata(p).unwrap().len()).unwrap();
        let mut bytes = fs::read(&pack).unwrap();
        let half = bytes.len() / 2;
        bytes[half] ^= 1;
        fs::write(&pack, bytes).unwrap();
        pack
    }

    /// Waits until a restore in place that a killed keepd had begun is finished or undone.
    pub fn settled(&self, point: u64) {
        let since = Instant::now();
        while fs::read_dir(self.path("state/in-place")).is_ok_and(|d| d.count() > 0) {
            assert!(since.elapsed() < Duration::from_secs(60), "point {point}: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// All packs of the repository.
    pub fn packs(&self) -> Vec<PathBuf> {
        files_below(&self.path("repository/packs"))
    }
}

impl Drop for Keepd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs keepctl at a terminal of its own and answers each question that it asks, in order; `meanwhile` happens when the first was asked.
pub fn at_a_terminal(keepd: &Keepd, arguments: &[&str], answers: &[(&str, &str)], meanwhile: impl FnOnce()) -> Output {
    at_a_terminal_with(keepd, &[], arguments, answers, meanwhile)
}

/// The same with variables in its environment.
pub fn at_a_terminal_with(
    keepd: &Keepd,
    environment: &[(&str, &str)],
    arguments: &[&str],
    answers: &[(&str, &str)],
    meanwhile: impl FnOnce(),
) -> Output {
    const SCRIPT: &str = r#"
import json, os, pty, sys
answers = json.loads(sys.argv[1])
pid, fd = pty.fork()
if pid == 0:
    os.execv(sys.argv[2], sys.argv[2:])
said, at = b'', 0
try:
    while True:
        more = os.read(fd, 4096)
        if not more:
            break
        said += more
        while answers and said.find(answers[0][0].encode(), at) >= 0:
            question, answer = answers.pop(0)
            at = said.find(question.encode(), at) + len(question)
            print('asked', file=sys.stderr, flush=True)
            sys.stdin.readline()
            os.write(fd, answer.encode() + b'\n')
except OSError:
    pass
sys.stdout.write(said.decode())
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"#;
    let mut python = Command::new("python3")
        .args(["-c", SCRIPT, &serde_json::json!(answers).to_string()])
        .arg(keepctl_binary())
        .arg("--socket")
        .arg(keepd.path("keepd.sock"))
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut asked = [0; 6];
    std::io::Read::read_exact(python.stderr.as_mut().unwrap(), &mut asked).unwrap();
    meanwhile();
    // It goes on when this is closed.
    drop(python.stdin.take());
    python.wait_with_output().unwrap()
}

pub fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

pub fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").args(["-s", name, &pid.to_string()]).status().unwrap().success());
}

pub fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().unwrap().is_dir() {
            found.extend(files_below(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

pub fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    (0..len)
        .map(|_| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed as u8
        })
        .collect()
}

pub fn make_database(path: &Path, rows: usize) -> rusqlite::Connection {
    let db = rusqlite::Connection::open(path).unwrap();
    db.execute_batch(
        "PRAGMA journal_mode = WAL; CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL, note TEXT); BEGIN",
    )
    .unwrap();
    for n in 0..rows {
        db.execute("INSERT INTO account VALUES (?1, 100, ?2)", rusqlite::params![n as i64, "x".repeat(200)]).unwrap();
    }
    db.execute_batch("COMMIT").unwrap();
    db
}

/// The sum of the balances, after an integrity check.
pub fn proven_sum(path: &Path) -> i64 {
    let db = rusqlite::Connection::open(path).unwrap();
    assert_eq!(db.query_row("PRAGMA integrity_check", [], |r| r.get::<_, String>(0)).unwrap(), "ok");
    db.query_row("SELECT sum(balance) FROM account", [], |r| r.get(0)).unwrap()
}

/// More kinds of files.
pub fn fill(keepd: &Keepd) {
    use std::os::unix::fs::PermissionsExt;
    for n in 0..200 {
        fs::write(keepd.path(&format!("files/deep/small-{n}")), noise(n * 37, n as u64 + 1)).unwrap();
    }
    fs::write(keepd.path("files/long"), noise(9 << 20, 99)).unwrap();
    fs::write(keepd.path("files/text"), "line after line\n".repeat(100_000)).unwrap();
    fs::hard_link(keepd.path("files/big"), keepd.path("files/zzz")).unwrap();
    fs::File::create(keepd.path("files/sparse")).unwrap().set_len(9 << 20).unwrap();
    fs::create_dir_all(keepd.path(&format!("files/{0}/{0}", "a-long-name-".repeat(12)))).unwrap();
    fs::write(keepd.path(&format!("files/{0}/{0}/ümläut", "a-long-name-".repeat(12))), "found").unwrap();
    fs::set_permissions(keepd.path("files/text"), fs::Permissions::from_mode(0o4711)).unwrap();
    let _ = Command::new("setfattr").args(["-n", "user.keepd", "-v", "kept"]).arg(keepd.path("files/text")).status();
}

/// Compares two directories: names, kinds, contents, modes, times.
pub fn assert_same(a: &Path, b: &Path) {
    use std::os::unix::fs::MetadataExt;
    let names = |d: &Path| {
        let mut names: Vec<_> = fs::read_dir(d).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(a), names(b), "{} and {}", a.display(), b.display());
    for name in names(a) {
        let (x, y) = (a.join(&name), b.join(&name));
        let (m, n) = (fs::symlink_metadata(&x).unwrap(), fs::symlink_metadata(&y).unwrap());
        assert_eq!(
            (m.mode(), m.uid(), m.gid(), m.mtime(), m.mtime_nsec()),
            (n.mode(), n.uid(), n.gid(), n.mtime(), n.mtime_nsec()),
            "{}",
            x.display()
        );
        if m.is_dir() {
            assert_same(&x, &y);
        } else if m.is_symlink() {
            assert_eq!(fs::read_link(&x).unwrap(), fs::read_link(&y).unwrap());
        } else {
            assert!(fs::read(&x).unwrap() == fs::read(&y).unwrap(), "{} differs", x.display());
        }
    }
}

/// Copies a program. Another process does: what this one has open for writing, a child that another test starts at that moment has too, and a program
/// that anybody has open for writing does not start ("Text file busy").
pub fn copy_program(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg(from).arg(to).status().unwrap().success());
}

/// Writes a script that can be started, likewise.
pub fn write_program(path: &Path, text: &str) {
    let written = Command::new("sh").args(["-c", "printf '%s' \"$2\" > \"$1\" && chmod 755 \"$1\"", "sh"]).arg(path).arg(text).status();
    assert!(written.unwrap().success());
}
