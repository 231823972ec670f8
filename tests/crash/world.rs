//! A keepd whose everything lies beneath one directory, on the fault layer or on the plain disk, always under the same path: configuration, keys, state, repositories, what is
//! backed up, archives. Only its socket and its log are elsewhere.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use keepd_faultfs::Mounted;
use serde_json::Value;

use crate::common;

/// What went wrong, for whoever reads the test's output.
pub type Result<T, E = String> = std::result::Result<T, E>;

pub struct World {
    dir: tempfile::TempDir,
    child: Option<Child>,
    mounted: Option<Mounted>,
    /// Contents of backups by their ids, restored before anything was attacked.
    pub known: BTreeMap<String, PathBuf>,
    /// What a backup of what is live must have.
    pub live: PathBuf,
    /// Names for ids.
    pub words: BTreeMap<&'static str, String>,
    /// keepd is not to run before the attack: what its start does is what is attacked, or its state is to stay as a crash left it.
    pub at_rest: bool,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("keepd-crash-").tempdir().unwrap();
        // The root of the layer has another inode than the directory behind it, and keepd remembers inodes: nothing lies in the root itself.
        fs::create_dir_all(dir.path().join("at/all")).unwrap();
        let live = dir.path().join("live");
        Self { dir, child: None, mounted: None, known: BTreeMap::new(), live, words: BTreeMap::new(), at_rest: false }
    }

    /// Beneath the directory that everything lies in.
    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join("at/all").join(name)
    }

    /// The directory that is mounted.
    pub fn top(&self) -> PathBuf {
        self.dir.path().join("at")
    }

    /// Beside it, never on the layer.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Two destinations; `daemon`, `job` and `more` are further lines.
    pub fn configure(&self, destinations: &str, job: &str, more: &str) {
        let d = self.at("").display().to_string();
        let d = d.trim_end_matches('/');
        let text = format!(
            "[daemon]\nstate_dir = \"{d}/state\"\nsocket = \"{}\"\n[encryption.main]\nkey_file = \"{d}/main.key\"\n\
             [destination.local]\nservice = \"fs\"\nroot = \"{d}/repository\"\nencryption = \"main\"\nprune_grace = \"0s\"\n\
             [destination.second]\nservice = \"fs\"\nroot = \"{d}/second\"\nencryption = \"main\"\nprune_grace = \"0s\"\n{more}\n\
             [job.shop]\ndestinations = {destinations}\nsuspect = {{ smaller = 0, fewer_files = 0 }}\n{job}\n\
             [[job.shop.source]]\nname = \"db\"\nsqlite = \"{d}/shop.db\"\n[[job.shop.source]]\nname = \"files\"\nfiles = \"{d}/files\"\n",
            self.beside("keepd.sock").display()
        );
        fs::write(self.at("keepd.toml"), text).unwrap();
    }

    pub fn generate_key(&self, name: &str) {
        let status =
            Command::new(common::keepd_binary()).args(["key", "generate"]).arg(self.at(name)).stdout(Stdio::null()).status().unwrap();
        assert!(status.success());
    }

    /// Puts everything onto the layer, over what `behind` has.
    pub fn mount(&mut self) -> Result<()> {
        let behind = self.beside("behind");
        fs::rename(self.top(), &behind).map_err(|e| format!("behind: {e}"))?;
        fs::create_dir(self.top()).map_err(|e| format!("the mount point: {e}"))?;
        self.mounted = Some(Mounted::new(&behind, &self.top()).map_err(|e| format!("not mounted: {e}"))?);
        Ok(())
    }

    /// Puts everything back onto the plain disk, as it is.
    pub fn unmount(&mut self) -> Result<()> {
        if let Some(mounted) = self.mounted.take() {
            mounted.unmount().map_err(|e| format!("not unmounted: {e}"))?;
            fs::remove_dir(self.top()).map_err(|e| format!("the mount point: {e}"))?;
            fs::rename(self.beside("behind"), self.top()).map_err(|e| format!("behind: {e}"))?;
        }
        Ok(())
    }

    pub fn layer(&self) -> &keepd_faultfs::Control {
        self.mounted.as_ref().expect("mounted").control()
    }

    /// Waits until nothing more comes from what the start set going.
    pub fn quiet(&self) {
        let mut before = u64::MAX;
        while self.layer().count() != before {
            before = self.layer().count();
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Everything becomes what was saved under this name, or what `from` is.
    pub fn reset(&mut self, from: &Path) -> Result<()> {
        self.kill();
        self.unmount()?;
        let _ = fs::remove_file(self.beside("keepd.log"));
        fs::remove_dir_all(self.top()).map_err(|e| format!("clearing: {e}"))?;
        copy(from, &self.top())?;
        self.same_inodes()
    }

    /// A journal of a restore in place knows its directories by their inodes, which a disk keeps and a copy does not: it gets those of the copy.
    pub fn same_inodes(&self) -> Result<()> {
        use std::os::unix::fs::MetadataExt;
        for path in common::files_below(&self.at("state/in-place")) {
            let Ok(mut journal) = fs::read(&path).map_err(drop).and_then(|b| serde_json::from_slice::<Value>(&b).map_err(drop)) else {
                continue;
            };
            for tree in journal["trees"].as_array_mut().into_iter().flatten() {
                let found = tree["root"].as_str().and_then(|root| fs::metadata(root).ok());
                if let (Some(found), Some(inode)) = (found, tree.get_mut("inode")) {
                    *inode = found.ino().into();
                }
            }
            fs::write(&path, journal.to_string()).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    pub fn save(&self, name: &str) -> PathBuf {
        let to = self.beside(name);
        copy(&self.top(), &to).unwrap();
        to
    }

    /// Starts keepd and gives what to tell it to begin: nothing was done yet.
    pub fn waiting(&mut self) -> std::process::ChildStdin {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.beside("keepd.log")).unwrap();
        let mut child = Command::new("sh")
            .args(["-c", "read go; exec \"$0\" --config \"$1\""])
            .arg(common::keepd_binary())
            .arg(self.at("keepd.toml"))
            .env_remove("NOTIFY_SOCKET")
            .env_remove("LISTEN_FDS")
            .env("KEEPD_TEST_TELLS_SYNCFS", "1")
            .stdin(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let go = child.stdin.take().unwrap();
        self.child = Some(child);
        go
    }

    pub fn start(&mut self) -> Result<()> {
        self.waiting().write_all(b"go\n").map_err(|e| e.to_string())?;
        self.answers()
    }

    /// Waits until it answers.
    pub fn answers(&mut self) -> Result<()> {
        let since = Instant::now();
        while !self.ctl(&["status"]).status.success() {
            if let Some(status) = self.child.as_mut().and_then(|c| c.try_wait().ok()?) {
                return Err(format!("keepd ended ({status})"));
            }
            if since.elapsed() > Duration::from_secs(60) {
                return Err("keepd does not answer".into());
            }
            std::thread::sleep(Duration::from_millis(15));
        }
        Ok(())
    }

    /// Waits until nothing runs, and what a restore in place or a re-encryption had begun is finished.
    pub fn settled(&self) -> Result<()> {
        let since = Instant::now();
        loop {
            let status = self.json(&["status"])?;
            let in_place = fs::read_dir(self.at("state/in-place")).is_ok_and(|d| d.count() > 0);
            if status["running"].as_array().is_some_and(Vec::is_empty) && !in_place {
                return Ok(());
            }
            if since.elapsed() > Duration::from_secs(120) {
                return Err(format!("it never settles: running {}, in place: {in_place}", status["running"]));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    pub fn stop(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        common::signal(child.id(), "TERM");
        let status = child.wait().map_err(|e| e.to_string())?;
        if status.success() { Ok(()) } else { Err(format!("it ends with {status}")) }
    }

    pub fn ctl(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(common::keepctl_binary());
        command.arg("--socket").arg(self.beside("keepd.sock")).arg("--no-progress").args(arguments).stdin(Stdio::null());
        command.output().unwrap()
    }

    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        let out = self.ctl(arguments);
        match out.status.success() {
            true => Ok(String::from_utf8_lossy(&out.stdout).into_owned()),
            false => Err(format!("keepctl {} ({}): {}", arguments.join(" "), out.status, common::text(&out).trim())),
        }
    }

    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let said = self.ok(&[arguments, &["--json"]].concat())?;
        serde_json::from_str(&said).map_err(|e| format!("{arguments:?}: {e}"))
    }

    /// Ids of backups that are reported good, and where each is.
    pub fn good(&self) -> Result<BTreeMap<String, Vec<String>>> {
        let list = self.json(&["list"])?;
        let mut good = BTreeMap::new();
        for backup in list.as_array().into_iter().flatten().filter(|b| b["outcome"] == "good") {
            let places = backup["destinations"].as_array().into_iter().flatten();
            let places: Vec<_> =
                places.filter(|d| d["status"] == "present").filter_map(|d| d["name"].as_str().map(str::to_owned)).collect();
            good.insert(backup["id"].as_str().unwrap_or_default().to_owned(), places);
        }
        Ok(good)
    }

    /// How many backups a destination has.
    pub fn good_at(&self, destination: &str) -> Result<usize> {
        let list = self.json(&["list"])?;
        let has =
            |b: &Value| b["destinations"].as_array().into_iter().flatten().any(|d| d["name"] == destination && d["status"] == "present");
        Ok(list.as_array().into_iter().flatten().filter(|b| has(b)).count())
    }

    /// Gives the nth newest backup a name.
    pub fn remember(&mut self, word: &'static str, nth: usize) -> Result<()> {
        let list = self.json(&["list"])?;
        let id = list[nth]["id"].as_str().ok_or("no such backup")?.to_owned();
        self.words.insert(word, id);
        Ok(())
    }

    pub fn remembered(&self, word: &str) -> &str {
        self.words.get(word).map_or("", String::as_str)
    }

    /// Restores a backup beside everything.
    pub fn restored(&self, backup: &str, name: &str) -> Result<PathBuf> {
        let to = self.beside(name);
        let _ = fs::remove_dir_all(&to);
        self.ok(&["restore", backup, "--to", &to.display().to_string()])?;
        Ok(to)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.beside("keepd.log")).unwrap_or_default()
    }

    /// The next state of what is backed up; states differ in contents, names and rows.
    pub fn change(&self, state: u64) {
        let files = self.at("files");
        fs::create_dir_all(files.join("deep")).unwrap();
        for n in 0..6u64 {
            fs::write(files.join(format!("deep/small-{n}")), common::noise(300 + 700 * n as usize, n + 1)).unwrap();
        }
        fs::write(files.join("changing"), format!("state {state}\n").repeat(200)).unwrap();
        fs::write(files.join(format!("of-{state}")), common::noise(260_000, 100 + state)).unwrap();
        if state > 1 {
            let _ = fs::remove_file(files.join(format!("of-{}", state - 2)));
        }
        let _ = fs::remove_file(files.join("link"));
        std::os::unix::fs::symlink(format!("of-{state}"), files.join("link")).unwrap();
        let db = self.at("shop.db");
        let db = match db.exists() {
            true => rusqlite::Connection::open(db).unwrap(),
            false => common::make_database(&db, 300),
        };
        db.execute("UPDATE account SET balance = ?1 WHERE id % 7 = ?2", rusqlite::params![1000 + state as i64, state as i64 % 7]).unwrap();
        db.execute("INSERT INTO account VALUES (?1, ?2, 'new')", rusqlite::params![10_000 + state as i64, state as i64]).unwrap();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.kill();
        if let Err(e) = self.unmount() {
            eprintln!("{e}");
        }
    }
}

/// Copies a directory with everything that it knows of its files.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").args(["-a", "-T"]).arg(from).arg(to).status().map_err(|e| e.to_string())?;
    if status.success() { Ok(()) } else { Err(format!("{} is not copied", from.display())) }
}

/// Every path beneath with its kind, mode and contents' hash; databases by their rows.
pub fn picture(dir: &Path) -> Result<BTreeMap<String, String>> {
    use std::os::unix::fs::MetadataExt;
    let mut found = BTreeMap::new();
    let mut left = vec![PathBuf::new()];
    while let Some(at) = left.pop() {
        let path = dir.join(&at);
        let said = |e: std::io::Error| format!("{}: {e}", path.display());
        let meta = fs::symlink_metadata(&path).map_err(said)?;
        let what = if meta.is_dir() {
            for entry in fs::read_dir(&path).map_err(said)? {
                left.push(at.join(entry.map_err(said)?.file_name()));
            }
            "directory".to_owned()
        } else if meta.is_symlink() {
            format!("link to {}", fs::read_link(&path).map_err(said)?.display())
        } else {
            let bytes = fs::read(&path).map_err(said)?;
            format!("{} bytes, {:016x}", bytes.len(), hash(&bytes))
        };
        found.insert(at.display().to_string(), format!("{:o} {what}", meta.mode() & 0o7777));
    }
    Ok(found)
}

/// FNV-1a over words: what differs by chance differs here.
fn hash(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0xcbf2_9ce4_8422_2325, |h, c| {
        let mut word = [0; 8];
        word[..c.len()].copy_from_slice(c);
        (h ^ u64::from_le_bytes(word)).wrapping_mul(0x100_0000_01b3).rotate_left(23)
    })
}

/// All rows of the test's database.
pub fn rows(path: &Path) -> Result<Vec<(i64, i64, String)>> {
    let db = rusqlite::Connection::open(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let read = || -> rusqlite::Result<_> {
        let sound: String = db.query_row("PRAGMA integrity_check", [], |r| r.get(0))?;
        let rows: Vec<_> = db
            .prepare("SELECT id, balance, note FROM account ORDER BY id")?
            .query_map([], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?)))?
            .collect::<rusqlite::Result<_>>()?;
        Ok((sound, rows))
    };
    match read() {
        Ok((sound, rows)) if sound == "ok" => Ok(rows),
        Ok((sound, _)) => Err(format!("{}: {sound}", path.display())),
        Err(e) => Err(format!("{}: {e}", path.display())),
    }
}
