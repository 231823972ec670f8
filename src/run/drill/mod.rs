//! Drills: a backup restored into a scratch place, checked there, and marked as proven, or as suspect.
//!
//! In: a backup, and what must hold of it. Out: a mark at every destination that has it, and nothing left behind. [`scratch`] is the place,
//! [`compare`] holds what was written against the backup, [`servers`] are started for dumps, [`assertions`] are the user's own. The live
//! application is not touched.
//!
//! What could not be tried (no space, a storage that does not answer, a tool that is not there, a cancel) fails the run and says nothing of the
//! backup. What was tried and is bad makes it suspect.

mod assertions;
mod compare;
mod mysql;
mod postgres;
pub mod scratch;
mod servers;

use std::path::Path;
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use keepd_protocol::model::{Backup, Level, SourceInfo};
use tokio_util::sync::CancellationToken;

use self::scratch::{Person, Scratch};
pub use self::servers::Planned;
use self::servers::Server;
use super::backup::{Environment, short};
use super::copy::Reading;
use super::live::{Failure, Finish, LiveRun};
use super::restore::{Another, Place};
use super::{catalogue, to_directory};
use crate::config::{Assertion, Drill, Job, show_duration};
use crate::repository::{self, Manifest, Repository};
use crate::source::{Facts, SourceError, sqlite};

/// Between looks at the limits.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Reasons that are told one by one.
const MAX_TOLD: usize = 20;

/// Why a drill did not end well.
#[derive(Debug)]
pub enum Trouble {
    /// It could not be tried; nothing is said of the backup by it.
    Untried(Failure),
    /// It was tried, and this is wrong with the backup.
    Bad(String),
}

type Result<T, E = Trouble> = std::result::Result<T, E>;

impl Trouble {
    fn untried(text: impl Into<String>) -> Self {
        Trouble::Untried(Failure::Failed(text.into()))
    }
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Damaged(text) => Trouble::Bad(text),
            other => Trouble::Untried(other),
        }
    }
}

/// Why a backup is not what it should be.
#[derive(Debug, Default)]
struct Wrong {
    reasons: Vec<String>,
    more: usize,
}

impl Wrong {
    fn add(&mut self, reason: impl Into<String>) {
        match self.reasons.len() < MAX_TOLD {
            true => self.reasons.push(reason.into()),
            false => self.more += 1,
        }
    }

    /// Bad news is gathered, so that one drill tells all of it; what could not be tried ends it.
    fn take(&mut self, result: Result<()>) -> Result<()> {
        match result {
            Err(Trouble::Bad(text)) => {
                self.add(text);
                Ok(())
            }
            other => other,
        }
    }

    fn lines(mut self) -> Vec<String> {
        if self.more > 0 {
            self.reasons.push(format!("and {} more", self.more));
        }
        self.reasons
    }
}

/// What is drilled, and how.
pub struct Request {
    pub job: Job,
    pub backup: Backup,
    /// By source, how its dumps are loaded.
    pub planned: Vec<Planned>,
}

/// How it ended.
pub struct Ended {
    pub result: Result<Finish, Failure>,
    /// Whether anything is known of the backup now that was not before.
    pub tried: bool,
}

/// Which servers a drill of a backup needs, and where they come from. Programs are looked for and asked for their versions.
pub fn plan(job: &Job, sources: &[SourceInfo], cancel: &CancellationToken) -> Vec<Planned> {
    sources.iter().filter_map(|source| Planned::of(job, source, cancel)).collect()
}

/// Restores a backup, checks it, and marks it. `open` gives the place to read from.
pub fn drill(
    env: &Environment,
    request: Request,
    open: impl FnOnce() -> Result<Place, Failure>,
    another: Another<'_>,
    reading: Reading<'_>,
    live: &LiveRun,
) -> Ended {
    let limits = Limits::new(&request.job.drill);
    let outcome = std::thread::scope(|scope| {
        // Ends with the work, also when that panics.
        let (_end, ended) = mpsc::channel();
        let limits = &limits;
        scope.spawn(move || limits.watch(&ended, live));
        attempt(env, &request, open, another, limits, live)
    });
    let id = short(&request.backup.id);
    match (outcome, limits.reached()) {
        // What came after a limit was reached is its consequence.
        (Err(Trouble::Untried(_)), Some(limit)) => Ended { result: Err(Failure::Failed(limit)), tried: false },
        (Err(Trouble::Untried(failure)), None) => Ended { result: Err(untried(id, failure)), tried: false },
        (Ok(proof), _) => {
            live.message(Level::Info, format!("backup {id} is proven: restored and checked in {} s", proof.seconds));
            let said = |object| repository::Mark { seconds: Some(proof.seconds), ..mark(object, catalogue::PROVEN, live) };
            tell(env, &request.backup, said, reading, live);
            let finish = if proof.from_another { Finish::Partial } else { Finish::Good };
            Ended { result: Ok(finish), tried: true }
        }
        (Err(Trouble::Bad(text)), _) => {
            for reason in text.lines() {
                live.message(Level::Error, reason.to_owned());
            }
            let said = |object| repository::Mark { text: Some(text.clone()), ..mark(object, catalogue::SUSPECT, live) };
            tell(env, &request.backup, said, reading, live);
            let reasons = text.lines().collect::<Vec<_>>().join("; ");
            let text = format!("backup {id} did not stand its drill and is suspect from now on: {reasons}");
            Ended { result: Err(Failure::Failed(text)), tried: true }
        }
    }
}

fn untried(id: &str, failure: Failure) -> Failure {
    let told = |text: String| format!("backup {id} could not be drilled (that says nothing of the backup): {text}");
    match failure {
        Failure::Cancelled => Failure::Cancelled,
        Failure::Storage(text) => Failure::Storage(told(text)),
        Failure::Failed(text) | Failure::Damaged(text) => Failure::Failed(told(text)),
        Failure::NeedsKey(text) => Failure::NeedsKey(told(text)),
    }
}

fn mark(object: [u8; 32], kind: &str, live: &LiveRun) -> repository::Mark {
    repository::Mark::new(object, kind, Timestamp::now().to_string(), live.snapshot().by)
}

/// Says something of a backup at every destination that has it. One that cannot be told is a warning.
fn tell(env: &Environment, backup: &Backup, said: impl Fn([u8; 32]) -> repository::Mark, reading: Reading<'_>, live: &LiveRun) {
    live.step("marking the backup");
    for place in &backup.destinations {
        let told = || -> Result<(), Failure> {
            let target = env.config.destinations.get(&place.name);
            let target = target.ok_or_else(|| Failure::Failed(format!("there is no destination '{}' any more", place.name)))?;
            let _reading = reading(&target.name);
            catalogue::say(env, target, &backup.id, &said)
        };
        if let Err(e) = told() {
            live.message(Level::Warning, format!("what the drill found could not be written down at {}: {e}", place.name));
        }
    }
}

/// A backup that is good.
struct Proof {
    seconds: u64,
    /// One destination has it no longer whole.
    from_another: bool,
}

fn attempt(
    env: &Environment,
    request: &Request,
    open: impl FnOnce() -> Result<Place, Failure>,
    another: Another<'_>,
    limits: &Limits,
    live: &LiveRun,
) -> Result<Proof> {
    let job = &request.job;
    live.step("looking whether it can be tried");
    for problem in scratch::clear_dead(&env.config.daemon.state_dir, Some(&live.id())) {
        live.message(Level::Warning, problem);
    }
    let place = open()?;
    live.update(|run| run.destination = Some(place.destination.clone()));
    let people = request.planned.iter().filter_map(|p| p.person()).cloned().collect::<Vec<_>>();
    let reader = reader(&job.drill)?;
    let state_dir = &env.config.daemon.state_dir;
    let mut scratch = Scratch::make(state_dir, &job.drill, &live.id(), &people, reader.as_ref()).map_err(Trouble::untried)?;
    enough_space(job, &place.manifest, &request.planned, &scratch)?;
    let dumps: u64 = place.manifest.sources.iter().filter(|s| is_server(&s.kind)).map(|s| s.bytes).fold(0, u64::saturating_add);
    live.set_total(place.manifest.bytes().saturating_mul(2).saturating_add(dumps));
    limits.set_tree(place.manifest.bytes());

    let since = Instant::now();
    live.step("restoring");
    // Kept from being pruned until the end: what is compared may be read again.
    let (mut from, mut from_another) = (place.clone(), false);
    let mut next = || {
        let next = another()?;
        (from, from_another) = (next.clone(), true);
        Some(next)
    };
    let written = to_directory::write(place, &mut next, &[], &scratch.tree, live).map_err(Trouble::from);
    written.map_err(|e| unless_away(e, &from.repository))?;
    let Place { repository, manifest, .. } = &from;

    let mut wrong = Wrong::default();
    live.step("comparing with the backup");
    compare::compare(repository, manifest, &scratch.tree, &mut wrong, live).map_err(|e| unless_away(e, repository))?;
    let mut servers = Vec::new();
    let checked = check(request, manifest, &mut scratch, &mut servers, &mut wrong, limits, live);
    let checked = checked.and_then(|()| assertions::check(job, &request.backup, manifest, &scratch.tree, &servers, &mut wrong, live));
    let seconds = since.elapsed().as_millis().div_ceil(1000) as u64;
    live.step("clearing up");
    for server in servers {
        server.end(live);
    }
    if let Err(text) = scratch.remove() {
        live.message(Level::Warning, text);
    }
    checked?;
    if live.cancel.is_cancelled() {
        return Err(Failure::Cancelled.into());
    }
    match wrong.lines() {
        reasons if reasons.is_empty() => Ok(Proof { seconds, from_another }),
        reasons => Err(Trouble::Bad(reasons.iter().map(|r| r.replace('\n', " ")).collect::<Vec<_>>().join("\n"))),
    }
}

/// A disk that was unplugged meanwhile has no object any more, and that is no damage.
fn unless_away(trouble: Trouble, repository: &Repository) -> Trouble {
    match trouble {
        Trouble::Bad(text) if !repository.listed_backups().is_ok_and(|listed| !listed.is_empty()) => {
            Trouble::Untried(Failure::Storage(text))
        }
        other => other,
    }
}

/// As whom commands look at what was restored, where that is somebody else.
fn reader(settings: &Drill) -> Result<Option<Person>> {
    let user = settings.assertions.iter().find_map(|a| if let Assertion::Command(p) = a { p.run_as.as_deref() } else { None });
    user.map(Person::named).transpose().map(Option::flatten).map_err(Trouble::untried)
}

fn is_server(kind: &str) -> bool {
    matches!(kind, "postgres" | "mysql")
}

/// Refuses what would not fit: the restored tree, and for dumps about twice their size in a server's files.
fn enough_space(job: &Job, manifest: &Manifest, planned: &[Planned], scratch: &Scratch) -> Result<()> {
    let tree = manifest.bytes();
    let loaded = |p: &Planned| {
        let bytes = manifest.sources.iter().find(|s| s.name == p.source).map_or(0, |s| s.bytes);
        if p.is_own() { 0 } else { bytes.saturating_mul(2).saturating_add(p.server_bytes()) }
    };
    let servers = planned.iter().map(loaded).fold(0u64, u64::saturating_add);
    let all = tree.saturating_add(servers);
    if let Some(space) = job.drill.space.filter(|space| *space < all) {
        return Err(Trouble::untried(format!("it needs {all} bytes of space, and job {} allows {space} (drill.space)", job.name)));
    }
    let (tree_dir, server_dir) = scratch.places();
    let device = |path: &Path| std::fs::metadata(path).map(|m| std::os::unix::fs::MetadataExt::dev(&m)).ok();
    let together = device(tree_dir) == device(server_dir);
    for (path, need) in [(tree_dir, if together { all } else { tree }), (server_dir, if together { 0 } else { servers })] {
        let stat = rustix::fs::statvfs(path).map_err(|e| Trouble::untried(format!("cannot look at {}: {e}", path.display())))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if need > free {
            return Err(Trouble::untried(format!(
                "it needs {need} bytes of space, and the file system of {} has {free}; free some, or name another place: drill = {{ dir = \"/srv/drills\" }}",
                path.display()
            )));
        }
    }
    Ok(())
}

/// What each source's own kind of check finds.
fn check(
    request: &Request,
    manifest: &Manifest,
    scratch: &mut Scratch,
    servers: &mut Vec<Server>,
    wrong: &mut Wrong,
    limits: &Limits,
    live: &LiveRun,
) -> Result<()> {
    for source in &manifest.sources {
        let facts: Facts = serde_json::from_str(&source.facts).unwrap_or_default();
        let dir = scratch.tree.join(&source.name);
        match source.kind.as_str() {
            "sqlite" => {
                live.step(&format!("checking {}", source.name));
                wrong.take(database_file(&source.name, &dir, &facts, live))?;
            }
            kind if is_server(kind) => {
                let Some(planned) = request.planned.iter().find(|p| p.source == source.name) else {
                    return Err(Trouble::untried(format!("source {}: nothing is known of its server", source.name)));
                };
                let server = Server::start(planned, &request.job, scratch, live)?;
                limits.watch_servers(server.dir());
                servers.push(server);
                if let Some(server) = servers.last_mut() {
                    server.load(&dir, &facts, wrong, live)?;
                }
            }
            "command" => {
                let text = format!("source {}: its file is there as it was captured; what it means only assertions can say", source.name);
                live.message(Level::Info, text);
            }
            _ => {}
        }
    }
    Ok(())
}

/// Checks the one file of a database source.
fn database_file(source: &str, dir: &Path, facts: &Facts, live: &LiveRun) -> Result<()> {
    let file = only_file(dir).ok_or_else(|| Trouble::Bad(format!("source {source}: its database was not restored")))?;
    let proof = sqlite::prove(&file, facts, &live.cancel).map_err(|e| failed(source, e))?;
    for warning in proof.warnings {
        live.message(Level::Warning, format!("source {source}: {warning}"));
    }
    if proof.wrong.is_empty() {
        live.message(Level::Info, format!("source {source}: {}", proof.good));
        return Ok(());
    }
    Err(Trouble::Bad(format!("source {source}: {}", proof.wrong.join("; "))))
}

/// The file of a source that is one file.
fn only_file(dir: &Path) -> Option<std::path::PathBuf> {
    let files = std::fs::read_dir(dir).ok()?.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_file()));
    files.map(|e| e.path()).next()
}

/// A source's error that says nothing of the backup.
fn failed(source: &str, error: SourceError) -> Trouble {
    match error {
        SourceError::Cancelled => Failure::Cancelled.into(),
        other => Trouble::untried(format!("source {source}: {other}")),
    }
}

/// The limits of a drill as a whole; reaching one cancels the run.
struct Limits {
    timeout: Duration,
    space: Option<u64>,
    tree: Mutex<u64>,
    servers: Mutex<Vec<std::path::PathBuf>>,
    reached: Mutex<Option<String>>,
}

impl Limits {
    fn new(settings: &Drill) -> Self {
        Self {
            timeout: settings.timeout,
            space: settings.space,
            tree: Mutex::default(),
            servers: Mutex::default(),
            reached: Mutex::default(),
        }
    }

    fn set_tree(&self, bytes: u64) {
        *lock(&self.tree) = bytes;
    }

    fn watch_servers(&self, dir: Option<&Path>) {
        lock(&self.servers).extend(dir.map(Path::to_owned));
    }

    fn reached(&self) -> Option<String> {
        lock(&self.reached).clone()
    }

    fn watch(&self, ended: &mpsc::Receiver<()>, live: &LiveRun) {
        let since = Instant::now();
        while ended.recv_timeout(LOOK_EVERY) == Err(mpsc::RecvTimeoutError::Timeout) {
            let limit = match () {
                () if since.elapsed() > self.timeout => {
                    let text = format!(
                        "the drill was given up after {} (drill.timeout), which says nothing of the backup",
                        show_duration(self.timeout)
                    );
                    Some(text)
                }
                () => self.too_large(),
            };
            if let Some(limit) = limit {
                lock(&self.reached).get_or_insert(limit);
                live.cancel.cancel();
                return;
            }
        }
    }

    fn too_large(&self) -> Option<String> {
        let space = self.space?;
        let dirs = lock(&self.servers).clone();
        let used = dirs.iter().map(|dir| scratch::used(dir)).fold(*lock(&self.tree), u64::saturating_add);
        (used > space).then(|| {
            format!("the drill was given up, which says nothing of the backup: its servers' files and the restored ones take {used} bytes, {space} are allowed (drill.space)")
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
