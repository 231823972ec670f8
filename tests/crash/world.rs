//! A keepd whose everything lies beneath one directory, on the fault layer or on the plain disk, always under the same path: configuration, keys, state, repositories, what is
//! backed up, archives. Only its socket and its log are elsewhere. Several work at once, each in a view of the file systems of its own, in which that path is its own.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use keepd_faultfs::Mounted;
use serde_json::{Value, json};

use crate::common;

/// What went wrong, for whoever reads the test's output.
pub type Result<T, E = String> = std::result::Result<T, E>;

/// So long nothing may come before what a start set going counts as done.
const QUIET: Duration = Duration::from_millis(60);

/// The directory of a whole run: what the scenarios begin with, and one place per worker.
pub struct Ground(tempfile::TempDir);

impl Ground {
    /// In memory, where there is some: a sync costs nothing there, and the rules of a disk are the record's.
    pub fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let is_there = rustix::fs::statvfs(memory).is_ok_and(|s| s.f_bavail * s.f_frsize > 4 << 30);
        let ground =
            tempfile::Builder::new().prefix("keepd-crash-").tempdir_in(if is_there { memory.to_owned() } else { std::env::temp_dir() });
        let ground = Self(ground.unwrap());
        fs::create_dir(ground.place()).unwrap();
        ground
    }

    /// Where it is, for who reads the figures.
    pub fn shown(&self) -> &'static str {
        if self.0.path().starts_with("/dev/shm") { "memory" } else { "the directory for temporary files" }
    }

    /// Where every worker has its own.
    fn place(&self) -> PathBuf {
        self.0.path().join("w")
    }

    /// What a scenario needs as long as its points are tried, for all workers.
    pub fn scene(&self, name: &str) -> PathBuf {
        let scene = self.0.path().join(name.replace(' ', "-"));
        fs::create_dir_all(&scene).unwrap();
        scene
    }
}

/// What a scenario's points have in common.
#[derive(Clone, Default)]
pub struct Facts {
    /// Contents of backups by their ids, restored before anything was attacked.
    pub known: BTreeMap<String, PathBuf>,
    /// What a backup of what is live must have.
    pub live: PathBuf,
    /// Names for ids.
    pub words: BTreeMap<&'static str, String>,
    /// Where what all workers need of it lies.
    pub scene: PathBuf,
}

pub struct World {
    dir: PathBuf,
    child: Option<Child>,
    mounted: Option<Mounted>,
    /// So long the log was when keepd was started.
    logged: usize,
    reader: Option<(Child, ChildStdin, BufReader<ChildStdout>)>,
    pub facts: Facts,
    /// keepd is not to run before the attack: what its start does is what is attacked, or its state is to stay as a crash left it.
    pub at_rest: bool,
    /// Further lines of the configuration.
    pub more: &'static str,
    /// Which start of the machine this is, for keepd: another one after the power was lost.
    pub boot: &'static str,
}

impl World {
    /// The calling thread's own, for the rest of its life.
    pub fn new(ground: &Ground, worker: usize) -> Result<Self> {
        let (own, dir) = (ground.0.path().join(format!("worker-{worker}")), ground.place());
        fs::create_dir_all(&own).map_err(|e| e.to_string())?;
        keepd_faultfs::in_a_place_of_its_own(&own, &dir).map_err(|e| format!("no view of the file systems of its own: {e}"))?;
        let mut world = Self {
            dir,
            child: None,
            mounted: None,
            logged: 0,
            reader: None,
            facts: Facts::default(),
            at_rest: false,
            more: "",
            boot: "one",
        };
        world.clear(Facts::default())?;
        Ok(world)
    }

    /// Nothing is there, and these are the facts.
    pub fn clear(&mut self, facts: Facts) -> Result<()> {
        self.kill();
        self.unmount()?;
        for entry in fs::read_dir(&self.dir).map_err(|e| e.to_string())?.flatten() {
            let gone = if entry.path().is_dir() { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) };
            gone.map_err(|e| format!("clearing: {e}"))?;
        }
        // The root of the layer has another inode than the directory behind it, and keepd remembers inodes: nothing lies in the root itself.
        fs::create_dir_all(self.dir.join("at/all")).map_err(|e| e.to_string())?;
        (self.facts, self.at_rest, self.more, self.boot) = (facts, false, "", "one");
        Ok(())
    }

    /// Beneath the directory that everything lies in.
    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.join("at/all").join(name)
    }

    /// The directory that is mounted.
    pub fn top(&self) -> PathBuf {
        self.dir.join("at")
    }

    /// Beside it, never on the layer.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Two repositories and a place for archives; `job` and `more` are further lines.
    pub fn configure(&self, destinations: &str, job: &str, more: &str) {
        let d = self.at("").display().to_string();
        let d = d.trim_end_matches('/');
        let text = format!(
            "[daemon]\nstate_dir = \"{d}/state\"\nsocket = \"{}\"\n[encryption.main]\nkey_file = \"{d}/main.key\"\n\
             [destination.local]\nservice = \"fs\"\nroot = \"{d}/repository\"\nencryption = \"main\"\nprune_grace = \"0s\"\n\
             [destination.second]\nservice = \"fs\"\nroot = \"{d}/second\"\nencryption = \"main\"\nprune_grace = \"0s\"\n\
             [destination.archives]\nservice = \"fs\"\nroot = \"{d}/archives\"\nlayout = \"archive\"\nencryption = \"main\"\n{more}\n\
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

    /// The layer is as a disk again, after a kill.
    pub fn serves_again(&self) {
        self.layer().serve();
        // The kernel remembers that the dead one's mapped pages were refused, and tells the first who syncs all.
        let _ = fs::File::open(self.top()).map(rustix::fs::syncfs);
    }

    /// Waits until nothing more comes from what the start set going.
    pub fn quiet(&self) {
        let since = Instant::now();
        let is_read = |log: &str| log.get(self.logged..).is_some_and(|log| log.contains("the catalogues of the destinations were read"));
        while !is_read(&self.log()) && since.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(2));
        }
        let (mut before, mut since) = (self.layer().count(), Instant::now());
        while since.elapsed() < QUIET {
            std::thread::sleep(Duration::from_millis(5));
            let now = self.layer().count();
            if now != before {
                (before, since) = (now, Instant::now());
            }
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

    /// For all workers.
    pub fn save(&self, name: &str) -> Result<PathBuf> {
        let to = self.facts.scene.join(name);
        copy(&self.top(), &to)?;
        Ok(to)
    }

    /// What tells the state of the disk from every other one: names, kinds, modes, owners, contents, attributes, times of files, which names are one file. Inodes are left out, also
    /// where a journal has written them down.
    pub fn state(&self) -> Result<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        let mut links = HashMap::new();
        let mut left = vec![PathBuf::new()];
        while let Some(at) = left.pop() {
            let path = self.top().join(&at);
            let said = |e: std::io::Error| format!("{}: {e}", path.display());
            let meta = fs::symlink_metadata(&path).map_err(said)?;
            let mut attributes = vec![0; 4096];
            let len = rustix::fs::llistxattr(&path, &mut attributes[..]).map_err(|e| said(e.into()))?;
            attributes.truncate(len);
            for name in attributes.clone().split(|b| *b == 0).filter(|n| !n.is_empty()) {
                let mut value = vec![0; 64 << 10];
                let len = rustix::fs::lgetxattr(&path, name, &mut value[..]).map_err(|e| said(e.into()))?;
                attributes.extend_from_slice(&value[..len]);
            }
            let first = links.entry(meta.ino()).or_insert_with(|| at.clone()).clone();
            let times = if meta.is_file() { (meta.mtime(), meta.mtime_nsec()) } else { (0, 0) };
            let what = format!("{:?} {:?} {:o} {} {} {times:?} {attributes:?}\n", at, first, meta.mode(), meta.uid(), meta.gid());
            hasher.update(what.as_bytes());
            if meta.is_dir() {
                let mut names: Vec<_> = fs::read_dir(&path).map_err(said)?.flatten().map(|e| at.join(e.file_name())).collect();
                names.sort();
                left.extend(names);
            } else if meta.is_symlink() {
                hasher.update(fs::read_link(&path).map_err(said)?.as_os_str().as_encoded_bytes());
            } else {
                let mut bytes = fs::read(&path).map_err(said)?;
                if at.starts_with("all/state/in-place") {
                    bytes = without_inodes(bytes);
                }
                hasher.update(&(bytes.len() as u64).to_le_bytes()).update(&bytes);
            }
        }
        Ok(hasher.finalize())
    }

    /// What a reader that shares nothing with keepd finds in a repository: `backups`, a number, and what is `wrong`, texts.
    pub fn foreign(&mut self, repository: &Path) -> Result<Value> {
        let keys: Vec<_> = ["main.key", "new.key"].iter().map(|key| self.at(key)).filter(|key| key.exists()).collect();
        let (_, to, from) = match &mut self.reader {
            Some(reader) => reader,
            none => none.insert(start_reader()?),
        };
        let mut said = String::new();
        let asked = writeln!(to, "{}", json!({ "repository": repository, "keys": keys })).and_then(|()| from.read_line(&mut said));
        asked.map_err(|e| format!("the foreign reader: {e}"))?;
        serde_json::from_str(&said).map_err(|e| format!("the foreign reader says {said:?}: {e}"))
    }

    fn spawn(&mut self, mut command: Command) -> &mut Child {
        // One that a killed keepd left takes nobody's connections.
        let _ = fs::remove_file(self.beside("keepd.sock"));
        self.logged = self.log().len();
        let log = fs::OpenOptions::new().create(true).append(true).open(self.beside("keepd.log")).unwrap();
        command.env_remove("NOTIFY_SOCKET").env_remove("LISTEN_FDS").env("KEEPD_TEST_TELLS_SYNCFS", "1").env("KEEPD_TEST_BOOT", self.boot);
        self.child.insert(command.stderr(log).spawn().unwrap())
    }

    /// Starts keepd and gives what to tell it to begin: nothing was done yet.
    pub fn waiting(&mut self) -> ChildStdin {
        let mut command = Command::new("sh");
        command.args(["-c", "read go; exec \"$0\" --config \"$1\""]).arg(common::keepd_binary()).arg(self.at("keepd.toml"));
        command.stdin(Stdio::piped());
        self.spawn(command).stdin.take().unwrap()
    }

    pub fn start(&mut self) -> Result<()> {
        let mut command = Command::new(common::keepd_binary());
        command.arg("--config").arg(self.at("keepd.toml")).stdin(Stdio::null());
        self.spawn(command);
        self.answers()
    }

    /// Waits until it answers.
    pub fn answers(&mut self) -> Result<()> {
        let since = Instant::now();
        while UnixStream::connect(self.beside("keepd.sock")).is_err() || !self.ctl(&["status"]).status.success() {
            if let Some(status) = self.child.as_mut().and_then(|c| c.try_wait().ok()?) {
                return Err(format!("keepd ended ({status})"));
            }
            if since.elapsed() > Duration::from_secs(60) {
                return Err("keepd does not answer".into());
            }
            std::thread::sleep(Duration::from_millis(4));
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
            std::thread::sleep(Duration::from_millis(10));
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

    /// Nothing runs any more, and everything is on the plain disk.
    pub fn ends(&mut self) -> Result<()> {
        self.kill();
        self.unmount()
    }

    pub fn stop(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).map_err(|e| e.to_string())?;
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
        self.facts.words.insert(word, id);
        Ok(())
    }

    pub fn remembered(&self, word: &str) -> &str {
        self.facts.words.get(word).map_or("", String::as_str)
    }

    /// Restores a backup beside everything.
    pub fn restored(&self, backup: &str, name: &str) -> Result<PathBuf> {
        self.restored_to(backup, self.beside(name))
    }

    /// Restores a backup to where it stays as long as the scenario's points are tried.
    pub fn restored_for_all(&self, backup: &str, name: &str) -> Result<PathBuf> {
        self.restored_to(backup, self.facts.scene.join(name))
    }

    fn restored_to(&self, backup: &str, to: PathBuf) -> Result<PathBuf> {
        let _ = fs::remove_dir_all(&to);
        self.ok(&["restore", backup, "--to", &to.display().to_string()])?;
        Ok(to)
    }

    /// Restores the backups that are good and not known yet.
    pub fn know(&mut self) -> Result<()> {
        for id in self.good()?.into_keys() {
            if !self.facts.known.contains_key(&id) {
                let to = self.restored_for_all(&id, &format!("known-{id}"))?;
                self.facts.known.insert(id, to);
            }
        }
        Ok(())
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
        if let Some((mut reader, ..)) = self.reader.take() {
            let _ = reader.kill();
            let _ = reader.wait();
        }
        self.kill();
        if let Err(e) = self.unmount() {
            eprintln!("{e}");
        }
    }
}

fn start_reader() -> Result<(Child, ChildStdin, BufReader<ChildStdout>)> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    // With the packages of the project's own environment it is quicker.
    let python = source.join(".venv/bin/python");
    let mut command = Command::new(if python.exists() { python } else { "python3".into() });
    command.arg(source.join("tests/crash/needed.py")).arg(source.join("kit/keepd_decoder.py"));
    let mut reader = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(|e| format!("python3: {e}"))?;
    let (to, from) = (reader.stdin.take().ok_or("no stdin")?, reader.stdout.take().ok_or("no stdout")?);
    Ok((reader, to, BufReader::new(from)))
}

/// A journal of a restore in place knows directories by their inodes, which are others in each copy.
fn without_inodes(bytes: Vec<u8>) -> Vec<u8> {
    let Ok(mut journal) = serde_json::from_slice::<Value>(&bytes) else { return bytes };
    for tree in journal["trees"].as_array_mut().into_iter().flatten() {
        if let Some(inode) = tree.get_mut("inode") {
            *inode = 0.into();
        }
    }
    journal.to_string().into_bytes()
}

/// Copies a directory with everything that it knows of its files.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").args(["-a", "-T"]).arg(from).arg(to).status().map_err(|e| e.to_string())?;
    if status.success() { Ok(()) } else { Err(format!("{} is not copied", from.display())) }
}

/// Every path beneath with its kind, mode and contents' hash; databases by their rows.
pub type Picture = BTreeMap<String, String>;

/// The picture of something that stays as it is as long as the scenario's points are tried.
pub fn picture_of_known(dir: &Path) -> Result<Arc<Picture>> {
    static SEEN: Mutex<BTreeMap<PathBuf, Arc<Picture>>> = Mutex::new(BTreeMap::new());
    if let Some(seen) = SEEN.lock().unwrap_or_else(PoisonError::into_inner).get(dir) {
        return Ok(seen.clone());
    }
    let picture = Arc::new(picture(dir)?);
    SEEN.lock().unwrap_or_else(PoisonError::into_inner).insert(dir.to_owned(), picture.clone());
    Ok(picture)
}

pub fn picture(dir: &Path) -> Result<Picture> {
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
