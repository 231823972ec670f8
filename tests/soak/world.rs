//! The world of a life: a daemon with its jobs, their live data and the storages they go to; how things are done there, broken off, and looked at
//! afterwards.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::Value;

use super::database::{self, Live, Moments};
use super::dice::Dice;
use super::figures::Figures;
use super::model::{Backup, Expected, Model, Permit, Truth};
use super::tree::{self, picture};
use crate::common::servers::{Kind, Server};
use crate::common::{Keepd, files_below, keepd_binary, text};

pub const SPARE: &str = "spare";
/// No answer of the daemon to a simple question takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Job {
    pub destinations: Vec<String>,
    pub trees: BTreeMap<String, PathBuf>,
    pub databases: BTreeMap<String, Live>,
    /// The files that commands print.
    pub printed: BTreeMap<String, PathBuf>,
}

/// What a job's sources are at a moment.
pub struct Mark {
    truth: Truth,
    databases: BTreeMap<String, usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Break {
    /// The daemon, by SIGKILL.
    Kill,
    /// The daemon, by SIGTERM.
    Term,
    /// The S3 server, with all its connections.
    Server,
}

/// A command of keepctl and what it may do.
#[derive(Default)]
pub struct Deed {
    pub arguments: Vec<String>,
    /// The jobs and kinds of the backups that may be new then.
    pub makes: Vec<(String, &'static str)>,
    pub permit: Permit,
    /// Exit codes that are right when nothing is in the way.
    pub good: Vec<i32>,
}

pub struct Done {
    pub code: Option<i32>,
    pub said: String,
    pub new: Vec<String>,
    /// The daemon was ended meanwhile.
    pub broken: bool,
}

pub struct World {
    pub keepd: Keepd,
    pub cloud: Server,
    pub cloud_up: bool,
    /// The file system of destination `two` is nearly full.
    pub full: bool,
    mount: Option<Mounted>,
    pub model: Model,
    pub jobs: BTreeMap<String, Job>,
    /// Of profile main, the present one first.
    pub keys: Vec<PathBuf>,
    pub figures: Figures,
    pub steps: VecDeque<String>,
    /// The next command is to be broken off so, at this part of the time that it usually takes.
    pub next_break: Option<(Break, f64)>,
    usual: BTreeMap<String, f64>,
    /// What broken-off commands may have made, should it turn up later.
    late: VecDeque<Expected>,
    /// Being removed there when the daemon or the server ended: perhaps it is.
    pub doubtful: BTreeSet<(String, String)>,
    log_read: u64,
    /// Threads and open files at the first rest of this process.
    at_rest: Option<(u32, usize, usize)>,
    /// The audit log began anew.
    pub audit_anew: bool,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut keepd = Keepd::prepared();
        fs::remove_dir(keepd.path("files")).unwrap();
        fs::create_dir(keepd.path("two")).unwrap();
        let mount = Mounted::at(keepd.path("two"));
        let cloud = Server::started(Kind::S3, keepd.dir.path());
        let mut jobs = BTreeMap::new();
        for (name, database, wal, destinations) in
            [("shop", "db", true, ["one", "two", "cloud"]), ("docs", "ledger", false, ["cloud", "two", "arch"])]
        {
            let tree = keepd.path(&format!("{name}-files"));
            fs::create_dir(&tree).unwrap();
            tree::change(&tree, &mut Dice::of(seed, name.len() as u64 + name.as_bytes()[0] as u64), 60);
            let live = Live::new(&keepd.path(&format!("{name}.db")), wal);
            let mut job = Job {
                destinations: destinations.map(str::to_owned).to_vec(),
                trees: [("files".to_owned(), tree)].into(),
                databases: [(database.to_owned(), live)].into(),
                printed: BTreeMap::new(),
            };
            if name == "shop" {
                fs::write(keepd.path("report.txt"), "a report\n".repeat(50)).unwrap();
                job.printed.insert("report".into(), keepd.path("report.txt"));
            }
            jobs.insert(name.to_owned(), job);
        }
        fs::create_dir(keepd.path("extra-files")).unwrap();
        tree::change(&keepd.path("extra-files"), &mut Dice::of(seed, 99), 30);
        configure(&keepd, &cloud);
        keepd.environment = cloud.environment();
        let keys = vec![keepd.path("main.key")];
        let mut model = Model { destinations: ["one", "two", "arch", "cloud"].map(str::to_owned).into(), ..Model::default() };
        for (job, destination, keep) in
            [("shop", "one", 4), ("shop", "two", 4), ("shop", "cloud", 4), ("docs", "cloud", 3), ("docs", "two", 3), ("docs", "arch", 2)]
        {
            model.rule_changed(job, destination, keep);
        }
        let mut world = Self {
            keepd,
            cloud,
            cloud_up: true,
            full: false,
            mount,
            model,
            jobs,
            keys,
            figures: Figures::default(),
            steps: VecDeque::new(),
            next_break: None,
            usual: BTreeMap::new(),
            late: VecDeque::new(),
            doubtful: BTreeSet::new(),
            log_read: 0,
            at_rest: None,
            audit_anew: false,
        };
        world.start();
        // Each destination is used before anything happens to it.
        for job in ["shop", "docs"] {
            let arguments = vec!["backup".to_owned(), job.to_owned()];
            world.perform(Deed { arguments, makes: vec![(job.to_owned(), "manual")], good: vec![0], ..Deed::default() });
        }
        world
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.keepd.path(name)
    }

    /// Notes what is done, for whoever has to read of a failure.
    pub fn note(&mut self, what: impl Into<String>) {
        let what = what.into();
        if std::env::var_os("KEEPD_TEST_TELL").is_some() {
            eprintln!("{} {what}", Timestamp::now());
        }
        self.steps.push_back(what);
        if self.steps.len() > 60 {
            self.steps.pop_front();
        }
    }

    /// Whether something is in the way of commands that usually work.
    pub fn trouble(&self) -> bool {
        !self.cloud_up || self.full
    }

    /// Whether what is the matter with a destination is in the way of this.
    fn in_the_way(&self, deed: &Deed, server_died: bool) -> bool {
        let mut ill: Vec<&str> = Vec::new();
        if !self.cloud_up || server_died {
            ill.push("cloud");
        }
        if self.full {
            ill.push("two");
        }
        let named = |a: &&String| ill.contains(&a.as_str());
        let at_a_job = |job: &str| self.jobs.get(job).is_some_and(|j| j.destinations.iter().any(|d| named(&d)));
        let words = &deed.arguments;
        let of = words.get(1).map(String::as_str).unwrap_or_default();
        let stored = self.model.get(of).is_some_and(|b| b.on.iter().any(|d| named(&d)));
        let of_its_job = self.model.get(of).is_some_and(|b| at_a_job(&b.job));
        match words[0].as_str() {
            "backup" | "retention" => at_a_job(of),
            "prune" | "check" | "copy" | "import" | "key" => words.iter().any(|w| named(&w)) || stored,
            "delete" | "pin" | "unpin" | "accept" => stored,
            // What is only read comes from wherever it can be had; only the death of the server in the middle is in the way.
            "restore" if words.iter().any(|w| w == "--in-place") => of_its_job || (server_died && stored),
            "restore" | "export" | "drill" => server_died && stored,
            "undo" => !ill.is_empty(),
            _ => false,
        }
    }

    /// Whether it holds anything: nobody prunes or checks what was never used.
    pub fn used(&self) -> Vec<String> {
        let used = |d: &&String| *d == "cloud" || fs::read_dir(self.path(d)).is_ok_and(|mut d| d.next().is_some());
        self.model.destinations.iter().filter(used).cloned().collect()
    }

    /// Whether the daemon can work with it now.
    pub fn reachable(&self, destination: &str) -> bool {
        self.model.destinations.contains(destination) && (destination != "cloud" || self.cloud_up)
    }

    /// Where it must be to be had.
    pub fn places(&self, backup: &Backup) -> Vec<String> {
        let sure = |d: &&String| self.reachable(d) && !self.doubtful.contains(&(backup.id.clone(), (*d).clone()));
        backup.on.iter().filter(sure).cloned().collect()
    }

    /// The job's sources now, before something is done.
    pub fn mark(&self, job: &str) -> Mark {
        let Some(job) = self.jobs.get(job) else { return Mark { truth: Truth::default(), databases: BTreeMap::new() } };
        let trees = job.trees.iter().map(|(name, path)| (name.clone(), picture(path))).collect();
        let printed = job.printed.iter().map(|(name, path)| (name.clone(), fs::read(path).unwrap())).collect();
        let databases = job.databases.iter().map(|(name, live)| (name.clone(), live.mark())).collect();
        Mark { truth: Truth { trees, printed, databases: BTreeMap::new() }, databases }
    }

    /// What a backup that was made since then may be of.
    pub fn truth(&self, job: &str, mark: &Mark) -> Truth {
        let databases = mark.databases.iter().map(|(name, mark)| (name.clone(), self.jobs[job].databases[name].since(*mark))).collect();
        Truth { databases, ..mark.truth.clone() }
    }

    /// What lies there now, with nobody writing.
    pub fn still(&mut self, job: &str) -> Truth {
        let job = self.jobs.get_mut(job).unwrap();
        job.databases.values_mut().for_each(Live::stop);
        Truth {
            trees: job.trees.iter().map(|(name, path)| (name.clone(), picture(path))).collect(),
            printed: job.printed.iter().map(|(name, path)| (name.clone(), fs::read(path).unwrap())).collect(),
            databases: job
                .databases
                .iter()
                .map(|(name, live)| (name.clone(), Moments::only(database::moment(&live.path).unwrap_or_else(|e| panic!("live: {e}")))))
                .collect(),
        }
    }

    pub fn perform(&mut self, deed: Deed) -> Done {
        self.perform_together(vec![deed]).remove(0)
    }

    /// Has keepctl do it, all of it at once, breaks it off where that is its turn, and looks at everything afterwards.
    pub fn perform_together(&mut self, deeds: Vec<Deed>) -> Vec<Done> {
        let broken = self.next_break.take();
        let mut permit = Permit::default();
        let mut marks = Vec::new();
        for deed in &deeds {
            for (job, kind) in &deed.makes {
                marks.push((job.clone(), *kind, self.mark(job)));
            }
            let more = deed.permit.clone();
            permit.go.extend(more.go);
            permit.come.extend(more.come);
            permit.new.extend(more.new);
            permit.marks.extend(more.marks);
            permit.destination = permit.destination.or(more.destination);
            permit.suspect |= more.suspect;
        }
        let kind = deeds.iter().map(|d| d.arguments.iter().take(2).cloned().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>().join("+");
        let usual = self.usual.get(&kind).copied().unwrap_or(0.15);
        let told = deeds.iter().map(|d| format!("keepctl {}", d.arguments.join(" "))).collect::<Vec<_>>().join("  beside  ");
        self.note(broken.map_or(told.clone(), |(how, part)| format!("{told}  and then {how:?} at {:.0} % of {usual:.3} s", part * 100.0)));
        let from = Timestamp::now();
        let since = Instant::now();
        let mut children = Vec::new();
        for deed in &deeds {
            let arguments: Vec<&str> = deed.arguments.iter().map(String::as_str).collect();
            let mut command = self.keepd.ctl_command(&arguments);
            children.push(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
        }
        if let Some((how, part)) = broken {
            std::thread::sleep(Duration::from_secs_f64(usual * part));
            match how {
                Break::Kill => self.keepd.kill(),
                Break::Term => self.keepd.stop(),
                Break::Server => self.cloud_dies(),
            }
            self.figures.broken(how);
        }
        let outputs: Vec<Output> = children.into_iter().map(|child| ended(child, &told)).collect();
        if broken.is_none() {
            let took = since.elapsed().as_secs_f64();
            self.usual.entry(kind).and_modify(|u| *u = *u * 0.7 + took * 0.3).or_insert(took);
        }
        let ended = matches!(broken, Some((Break::Kill | Break::Term, _)));
        if ended {
            self.start();
        }
        self.rest();
        for (job, kind, mark) in &marks {
            let truth = Arc::new(self.truth(job, mark));
            permit.new.push(Expected { job: job.clone(), kind, time: from..=Timestamp::now(), truth });
        }
        if broken.is_some() || self.trouble() {
            self.late.extend(permit.new.iter().cloned());
            self.doubtful.extend(permit.go.iter().cloned());
            while self.late.len() > 40 {
                self.late.pop_front();
            }
        }
        let codes: Vec<_> = outputs.iter().map(|o| o.status.code()).collect();
        for (deed, code) in deeds.iter().zip(&codes) {
            if *code == Some(0) && !ended {
                permit.must_go.extend(deed.permit.must_go.iter().cloned());
            }
        }
        let new = self.judge(&permit);
        let mut all = Vec::new();
        for (deed, out) in deeds.iter().zip(outputs) {
            let said = text(&out);
            let code = out.status.code();
            self.note(format!("  ... {code:?} {}", said.lines().last().unwrap_or_default()));
            let right = code.is_some_and(|c| deed.good.contains(&c));
            let server = matches!(broken, Some((Break::Server, _)));
            let excused = ended || (self.in_the_way(deed, server) && matches!(code, Some(1 | 3)));
            // Removed by a rule just before: the model has looked at that.
            let gone = deed.arguments.get(1).and_then(|id| self.model.get(id)).is_some_and(|b| b.on.is_empty()) && code == Some(1);
            assert!(right || excused || gone, "keepctl {}: {code:?}: {said}", deed.arguments.join(" "));
            all.push(Done { code, said, new: new.clone(), broken: ended });
        }
        all
    }

    /// Starts the daemon again, and waits until it knows what its destinations have.
    pub fn start(&mut self) {
        let begin = fs::metadata(self.path("keepd.log")).map_or(0, |m| m.len());
        self.keepd.start();
        self.at_rest = None;
        let since = Instant::now();
        while !self.log_from(begin).contains("the catalogues of the destinations were read") {
            assert!(since.elapsed() < Duration::from_secs(120), "catalogues are not read: {}", self.log_from(begin));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn log_from(&self, begin: u64) -> String {
        let mut file = fs::File::open(self.path("keepd.log")).unwrap();
        file.seek(SeekFrom::Start(begin)).unwrap();
        let mut more = Vec::new();
        file.read_to_end(&mut more).unwrap();
        String::from_utf8_lossy(&more).into_owned()
    }

    pub fn cloud_dies(&mut self) {
        self.cloud.kill();
        self.cloud_up = false;
    }

    pub fn cloud_comes_back(&mut self) {
        if !self.cloud_up {
            self.note("the S3 server is there again");
            self.cloud.start();
            self.cloud_up = true;
        }
    }

    /// Has the destination's file system run full but for some bytes.
    pub fn fill(&mut self, left: u64) {
        let Ok(stat) = rustix::fs::statvfs(self.path("two")) else { return };
        let free = stat.f_bavail * stat.f_frsize;
        if self.mount.is_some() && free > left {
            self.note(format!("destination two has {left} bytes left"));
            let file = fs::File::create(self.path("two/ballast")).unwrap();
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, free - left).unwrap();
            self.full = true;
        }
    }

    pub fn make_room(&mut self) {
        if self.full {
            self.note("destination two has room again");
            fs::remove_file(self.path("two/ballast")).unwrap();
            self.full = false;
        }
    }

    /// Asks the daemon, which answers within bounds.
    pub fn ask(&mut self, arguments: &[&str]) -> Value {
        let since = Instant::now();
        let answer = self.keepd.json(arguments);
        let took = since.elapsed();
        self.figures.slowest_answer = self.figures.slowest_answer.max(took);
        assert!(took < PATIENCE, "{arguments:?} took {took:?}");
        answer
    }

    /// Waits until nothing runs; then looks at the process.
    pub fn rest(&mut self) {
        let since = Instant::now();
        while self.ask(&["status"])["running"].as_array().is_some_and(|r| !r.is_empty())
            || fs::read_dir(self.path("state/in-place")).is_ok_and(|d| d.count() > 0)
        {
            assert!(since.elapsed() < Duration::from_secs(240), "something runs for ever: {}", self.keepd.ok(&["status"]));
            std::thread::sleep(Duration::from_millis(15));
        }
        self.look_at_the_log();
        let status = fs::read_to_string(format!("/proc/{}/status", self.keepd.pid())).unwrap();
        let number = |key: &str| -> usize {
            let line = status.lines().find(|l| l.starts_with(key)).unwrap_or_else(|| panic!("{status}"));
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        self.figures.memory_kib = self.figures.memory_kib.max(number("VmHWM:"));
        assert!(self.figures.memory_kib < 256 << 10, "{} KiB of memory", self.figures.memory_kib);
        let (threads, files) = (number("Threads:"), fs::read_dir(format!("/proc/{}/fd", self.keepd.pid())).unwrap().count());
        self.figures.threads = self.figures.threads.max(threads);
        self.figures.open_files = self.figures.open_files.max(files);
        let (times, first_threads, first_files) = self.at_rest.unwrap_or((0, threads, files));
        // Connections that are kept, and threads that wait a while for more to do, are no leak.
        assert!(threads <= first_threads.max(8) + 60, "{threads} threads, {first_threads} at first, after {times} rests");
        assert!(files <= first_files.max(20) + 60, "{files} open files, {first_files} at first, after {times} rests");
        self.at_rest = Some((times + 1, first_threads, first_files));
    }

    /// No part of the daemon panicked.
    fn look_at_the_log(&mut self) {
        let more = self.log_from(self.log_read);
        assert!(!more.contains("panicked"), "{more}");
        // A line that is just being written is looked at the next time.
        self.log_read += more.rfind('\n').unwrap_or(0) as u64;
    }

    /// Holds the list of backups against the model.
    pub fn judge(&mut self, permit: &Permit) -> Vec<String> {
        let mut permit = permit.clone();
        permit.new.extend(self.late.iter().cloned());
        permit.go.extend(self.doubtful.iter().cloned());
        let since = Instant::now();
        if permit.state_lost {
            self.model.state_was_lost();
            permit.state_lost = false;
            // Catalogues are read after the start.
            while !self.all_listed() && since.elapsed() < Duration::from_secs(60) {
                std::thread::sleep(Duration::from_millis(30));
            }
        }
        let list = self.ask(&["list"]);
        let new = self.model.judge(&list, &permit).unwrap_or_else(|wrong| panic!("{wrong}\n{}", self.keepd.ok(&["list"])));
        self.figures.backups += new.len();
        new
    }

    fn all_listed(&mut self) -> bool {
        let list = self.ask(&["list"]);
        let listed = |id: &str, destination: &str| {
            let line = list.as_array().unwrap().iter().find(|b| b["id"] == id);
            line.is_some_and(|b| b["destinations"].as_array().unwrap().iter().any(|d| d["name"] == destination))
        };
        self.model.there().all(|b| b.on.iter().all(|d| listed(&b.id, d) || !self.model.destinations.contains(d)))
    }

    /// What lies in the daemon's directories when it rests, but for what it keeps there.
    pub fn look_for_leftovers(&mut self) {
        self.rest();
        for place in ["work", "staged", "in-place", "drills"] {
            let left = files_below(&self.path("state").join(place));
            assert!(left.is_empty(), "left in the state directory: {left:?}");
        }
        let imports = files_below(&self.path("state/imports"));
        assert!(imports.iter().all(|p| p.ends_with("import.json")), "{imports:?}");
        let known = [
            "audit-head",
            "instance",
            "ledger.sqlite",
            "ledger.sqlite-shm",
            "ledger.sqlite-wal",
            "lock",
            "repositories",
            "work",
            "staged",
            "in-place",
            "drills",
            "imports",
            "previous-config",
        ];
        for entry in fs::read_dir(self.path("state")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(known.iter().any(|k| name.starts_with(k)), "what is {name} in the state directory?");
        }
        let find = Command::new("find").arg(self.keepd.dir.path()).args(["-name", ".keepd-restore-*"]).output().unwrap();
        assert!(find.stdout.is_empty(), "{}", text(&find));
    }

    /// `keepd rescue`, with the keys as somebody would have them who has nothing else.
    pub fn rescue(&self, what: &[&str], destination: &str) -> Output {
        let mut command = Command::new(keepd_binary());
        command.arg("rescue").args(what).envs(self.keepd.environment.iter().cloned()).stdin(Stdio::null());
        // A destination of a service is asked for by its table, with the configuration as it was when the world began.
        match destination {
            "cloud" => command.arg("--destination").arg(self.path("elsewhere/cloud.toml")),
            name => command.arg("--destination").arg(format!("fs:{}", self.path(name).display())),
        };
        let keys = if ["one", "two", "cloud"].contains(&destination) { &self.keys[..1] } else { &self.keys[..] };
        keys.iter().for_each(|key| {
            command.arg("--key").arg(key);
        });
        command.output().unwrap()
    }

    pub fn end(&mut self) {
        for job in self.jobs.values_mut() {
            job.databases.values_mut().for_each(Live::stop);
        }
        self.keepd.stop();
        self.cloud.kill();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.keepd.kill();
        self.cloud.kill();
        if self.mount.is_some() && (std::thread::panicking() || self.keepd.dir.path().join("keep").exists()) {
            // What lies there is wanted after a failure.
            let _ = Command::new("cp").arg("-a").arg(self.path("two")).arg(self.path("two-kept")).status();
        }
        self.mount = None;
    }
}

/// A small file system that is there as long as this is.
struct Mounted(PathBuf);

impl Mounted {
    /// None without the rights for it.
    fn at(place: PathBuf) -> Option<Self> {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=256m", "tmpfs"]).arg(&place).stderr(Stdio::null());
        let mounted = rustix::process::geteuid().is_root() && mount.status().is_ok_and(|s| s.success());
        mounted.then_some(Self(place))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Also when somebody still has a file open there.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn ended(child: std::process::Child, told: &str) -> Output {
    let pid = child.id();
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || send.send(child.wait_with_output()));
    match receive.recv_timeout(Duration::from_secs(300)) {
        Ok(out) => out.unwrap(),
        Err(_) => panic!("{told}: still running after 300 s (pid {pid})"),
    }
}

fn configure(keepd: &Keepd, cloud: &Server) {
    let d = keepd.dir.path().display();
    let never = "suspect = { fewer_rows = 0, fewer_files = 0, smaller = 0, larger = 0, changed = 0, incompressible = 0 }";
    let cloud = cloud.destination("cloud", "prune_grace = \"0s\"\nretry = { attempts = 2, backoff = \"1s\" }\ntimeout = \"20s\"");
    // By itself: what `destination add` writes beside keepd.toml would be read with it.
    fs::create_dir(keepd.path("elsewhere")).unwrap();
    fs::write(keepd.path("elsewhere/cloud.toml"), &cloud).unwrap();
    let text = format!(
        "[daemon]\nstate_dir = \"{d}/state\"\nsocket = \"{d}/keepd.sock\"\nmax_parallel_runs = 3\n\
         [encryption.main]\nkey_file = \"main.key\"\n\
         [destination.one]\nservice = \"fs\"\nroot = \"{d}/one\"\nencryption = \"main\"\nprune_grace = \"0s\"\n\
         [destination.two]\nservice = \"fs\"\nroot = \"{d}/two\"\nencryption = \"main\"\nprune_grace = \"0s\"\ncompression = \"gzip\"\n\
         [destination.arch]\nservice = \"fs\"\nroot = \"{d}/arch\"\nencryption = \"main\"\nlayout = \"archive\"\nretention = {{ keep_last = 2 }}\n\
         {cloud}\n\
         [config_backup]\ndestination = \"one\"\ninclude_secrets = true\non_change = true\nretention = {{ keep_last = 5 }}\n\
         [job.shop]\ndestinations = [\"one\", \"two\", \"cloud\"]\nretention = {{ keep_last = 4 }}\nretry = {{ attempts = 1, backoff = \"1s\" }}\n{never}\n\
         [[job.shop.source]]\nname = \"db\"\nsqlite = \"{d}/shop.db\"\n[[job.shop.source]]\nname = \"files\"\nfiles = \"{d}/shop-files\"\n\
         [[job.shop.source]]\nname = \"report\"\ncommand = [\"/bin/cat\", \"{d}/report.txt\"]\nfile = \"report.txt\"\n\
         restore_command = [\"/bin/sh\", \"-c\", \"cat > {d}/report.new && mv {d}/report.new {d}/report.txt\"]\n\
         [job.docs]\ndestinations = [\"cloud\", \"two\", \"arch\"]\nretention = {{ keep_last = 3 }}\nretry = {{ attempts = 1, backoff = \"1s\" }}\n{never}\n\
         [[job.docs.source]]\nname = \"ledger\"\nsqlite = \"{d}/docs.db\"\n[[job.docs.source]]\nname = \"files\"\nfiles = \"{d}/docs-files\"\n"
    );
    fs::write(keepd.path("keepd.toml"), text).unwrap();
}

/// A directory of a restore, made empty.
pub fn emptied(path: &Path) {
    if path.exists() {
        fs::remove_dir_all(path).unwrap();
    }
}
