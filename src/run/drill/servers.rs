//! Servers that dumps are loaded into: one that the drill starts for itself, else a scratch database on the source's own.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use keepd_protocol::model::{Level, SourceInfo};
use rustix::process::Signal;
use tokio_util::sync::CancellationToken;

use super::scratch::{Person, Scratch};
use super::{Result, Trouble, Wrong, failed, mysql, postgres};
use crate::config::{Databases, Job, ServerSource, SourceKind};
use crate::process::Running;
use crate::run::live::{Failure, LiveRun};
use crate::source::load::{Loader, PATIENCE, Wanted, scratch_name};
use crate::source::postgres::without_commands;
use crate::source::{Facts, SourceError};

/// A server that was started answers within so long.
const READY_WITHIN: Duration = Duration::from_secs(180);
/// Between asking a server to end and ending it.
const MERCY: Duration = Duration::from_secs(10);
/// What servers and tools say when it is not the dump's fault that it does not load.
const SURROUNDINGS: [&str; 22] = [
    "No space left on device",
    "Disk full",
    "out of memory",
    "Out of memory",
    "Cannot allocate memory",
    "server closed the connection",
    "terminating connection",
    "Lost connection",
    "has gone away",
    "Can't connect",
    "connection to server",
    "could not connect",
    "is not available",
    "extension control file",
    "could not access file \"$libdir",
    "could not load library",
    "permission denied",
    "must be superuser",
    "Access denied",
    "Unknown storage engine",
    "unsupported version",
    "specified as a definer",
];

/// Whose server it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Postgres,
    Mysql,
}

/// Where the server of a source's dumps comes from.
pub struct Planned {
    pub source: String,
    kind: Kind,
    how: How,
}

enum How {
    /// Started for the drill, by these programs.
    Started { programs: Programs, user: Option<Person>, config: ServerSource },
    /// A scratch database on the source's own; `lock` is what no other run may work on meanwhile.
    Own { config: ServerSource, lock: Option<String> },
    /// There is none, for this reason.
    None(String),
}

/// Server programs of one installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    pub server: PathBuf,
    /// Makes a data directory; None: the server does it itself.
    pub install: Option<PathBuf>,
    /// Where tools lie that are not older than the dump; None: as the source is configured.
    pub tools: Option<PathBuf>,
}

impl Planned {
    /// None for a source that is no server's.
    pub fn of(job: &Job, source: &SourceInfo, cancel: &CancellationToken) -> Option<Self> {
        let kind = match source.kind.as_str() {
            "postgres" => Kind::Postgres,
            "mysql" => Kind::Mysql,
            _ => return None,
        };
        let known = job.sources.iter().find(|s| s.name == source.name && s.kind.word() == source.kind);
        let configured = known.and_then(|s| match &s.kind {
            SourceKind::Postgres(server) | SourceKind::Mysql(server) => Some((server.clone(), s.kind.lock())),
            _ => None,
        });
        let config = configured.as_ref().map_or_else(|| ServerSource::plain(Databases::All), |(server, _)| server.clone());
        let fact = |name: &str| source.facts.get(name).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
        let found = match kind {
            Kind::Postgres => postgres::find(&config, &fact("server_version"), &fact("tool_version"), cancel),
            Kind::Mysql => mysql::find(&config, &fact("server_version"), cancel),
        };
        let usual = match kind {
            Kind::Postgres => "postgres",
            Kind::Mysql => "mysql",
        };
        let how = match (found, configured) {
            (Ok(programs), _) => match server_user(&config, usual) {
                Ok(user) => How::Started { programs, user, config },
                Err(text) => How::None(text),
            },
            (Err(_), Some((config, lock))) => How::Own { config, lock },
            (Err(text), None) => How::None(format!("{text}, and the job no longer says where its own server is")),
        };
        Some(Self { source: source.name.clone(), kind, how })
    }

    /// The user a started server runs as, where that is not keepd's own.
    pub fn person(&self) -> Option<&Person> {
        if let How::Started { user, .. } = &self.how { user.as_ref() } else { None }
    }

    pub fn is_own(&self) -> bool {
        matches!(self.how, How::Own { .. })
    }

    /// What no other run may work on meanwhile.
    pub fn lock(&self) -> Option<String> {
        if let How::Own { lock, .. } = &self.how { lock.clone() } else { None }
    }

    /// Bytes that an empty server takes.
    pub fn server_bytes(&self) -> u64 {
        match self.kind {
            Kind::Postgres => 100 << 20,
            Kind::Mysql => 200 << 20,
        }
    }
}

/// Servers refuse to run as root: as the source's `run_as`, or as the user that the package made, or as nobody.
fn server_user(config: &ServerSource, usual: &str) -> Result<Option<Person>, String> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    match &config.run_as {
        Some(name) => Person::named(name),
        None => Person::named(usual).or_else(|_| Person::named("nobody")),
    }
}

/// A server that takes dumps.
pub struct Server {
    pub source: String,
    pub kind: Kind,
    /// How it is reached.
    pub config: ServerSource,
    /// Where its files are, when the drill started it.
    dir: Option<PathBuf>,
    running: Option<Running>,
    user: Option<Person>,
    /// Made on the source's own server.
    made: Vec<Wanted>,
    /// Databases that are loaded: as they were captured, and as they are called here.
    databases: Vec<(String, String)>,
}

impl Server {
    /// Starts one, or makes ready to use the source's own.
    pub fn start(planned: &Planned, job: &Job, scratch: &mut Scratch, live: &LiveRun) -> Result<Self> {
        let source = planned.source.clone();
        let about = |text: String| Trouble::untried(format!("source {}: {text}", planned.source));
        match &planned.how {
            How::None(text) => Err(about(text.clone())),
            How::Own { config, .. } => {
                let text = format!(
                    "source {source}: no programs of a server that fits are installed, so it is loaded into a scratch database of its own server"
                );
                live.message(Level::Info, text);
                let config = config.clone();
                Ok(Self {
                    source,
                    kind: planned.kind,
                    config,
                    dir: None,
                    running: None,
                    user: None,
                    made: Vec::new(),
                    databases: Vec::new(),
                })
            }
            How::Started { programs, user, config } => {
                live.step(&format!("starting a server for {source}"));
                let dir = scratch.for_server(user.as_ref()).map_err(about)?;
                let run_as = user.as_ref().map(|u| u.name.as_str());
                let begun = match planned.kind {
                    Kind::Postgres => postgres::start(programs, &dir, run_as, job.drill.memory, &live.cancel),
                    Kind::Mysql => mysql::start(programs, &dir, run_as, job.drill.memory, &live.cancel),
                };
                let running = begun.map_err(|e| failed(&planned.source, e))?;
                let config = ServerSource {
                    bin_dir: programs.tools.clone().or_else(|| config.bin_dir.clone()),
                    run_as: run_as.map(str::to_owned),
                    ..match planned.kind {
                        Kind::Postgres => postgres::connection(&dir),
                        Kind::Mysql => mysql::connection(&dir),
                    }
                };
                let (user, running) = (user.clone(), Some(running));
                let made = Vec::new();
                let mut server = Self { source, kind: planned.kind, config, dir: Some(dir), running, user, made, databases: Vec::new() };
                server.wait(live)?;
                Ok(server)
            }
        }
    }

    pub fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// Until it answers.
    fn wait(&mut self, live: &LiveRun) -> Result<()> {
        let since = Instant::now();
        loop {
            match self.ask_whether_ready(&live.cancel) {
                Ok(()) => return Ok(()),
                Err(SourceError::Cancelled) => return Err(Failure::Cancelled.into()),
                Err(e) => {
                    if let Some(text) = self.ended(Duration::from_millis(100)) {
                        return Err(Trouble::untried(format!("source {}: {text}", self.source)));
                    }
                    if since.elapsed() > READY_WITHIN {
                        let said = self.running.as_ref().map(Running::said_so_far).unwrap_or_default();
                        let text = format!(
                            "source {}: the server that was started for it does not answer for {} s: {e}; it said: {said}",
                            self.source,
                            READY_WITHIN.as_secs()
                        );
                        return Err(Trouble::untried(text));
                    }
                }
            }
        }
    }

    fn ask_whether_ready(&self, cancel: &CancellationToken) -> Result<(), SourceError> {
        match self.kind {
            Kind::Postgres => crate::source::postgres::Client::new(&self.config)?.ask("postgres", "select 1", cancel).map(drop),
            Kind::Mysql => crate::source::mysql::Client::new(&self.config, cancel)?.table("select 1", cancel).map(drop),
        }
    }

    /// How a server ended that should not have.
    fn ended(&mut self, within: Duration) -> Option<String> {
        let running = self.running.as_mut()?;
        running.has_ended_within(within).then(|| {
            let said = running.said_so_far();
            let said = if said.is_empty() { "it said nothing".to_owned() } else { format!("it said: {said}") };
            format!("the server that was started for it has ended; {said}")
        })
    }

    /// Loads what the source's directory of the restored tree holds, and counts its rows.
    pub fn load(&mut self, dir: &Path, facts: &Facts, wrong: &mut Wrong, live: &LiveRun) -> Result<()> {
        let databases: Vec<String> =
            facts.get("databases").and_then(|d| d.as_object()).map(|d| d.keys().cloned().collect()).unwrap_or_default();
        let owners = self.roles(dir, live)?;
        let run: String = live.id().chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_lowercase();
        for (n, database) in databases.iter().enumerate() {
            let scratch = match self.kind {
                _ if self.dir.is_none() => scratch_name(&format!("{run}x{n}")),
                // Names of the server's own are taken.
                Kind::Postgres if postgres::OWN.contains(&database.as_str()) => scratch_name(&format!("{run}x{n}")),
                Kind::Mysql if mysql::OWN.contains(&database.to_lowercase().as_str()) => scratch_name(&format!("{run}x{n}")),
                // Under its own name whatever names it finds it.
                _ => database.clone(),
            };
            let wanted = Wanted {
                database: database.clone(),
                target: scratch.clone(),
                tables: Vec::new(),
                replace: false,
                owners,
                stops: false,
                facts: facts.clone(),
                scratch: scratch.clone(),
                aside: String::new(),
            };
            let file = dir.join(match self.kind {
                Kind::Postgres => crate::source::postgres::file_of(database),
                Kind::Mysql => crate::source::mysql::file_of(database),
            });
            let loaded = self.load_one(&wanted, &file, live);
            let is_loaded = loaded.is_ok();
            let loaded = match (loaded, self.ended(Duration::ZERO)) {
                (Err(Trouble::Bad(text)), Some(ended)) => Err(Trouble::untried(format!("source {}: {ended}; {text}", self.source))),
                (loaded, _) => loaded,
            };
            wrong.take(loaded)?;
            if is_loaded {
                self.databases.push((database.clone(), scratch));
            }
        }
        Ok(())
    }

    /// Roles and tablespaces of the dump, so that objects get their owners; whether there are any.
    fn roles(&self, dir: &Path, live: &LiveRun) -> Result<bool> {
        let Some(own) = self.dir.as_ref().filter(|_| self.kind == Kind::Postgres) else { return Ok(false) };
        let Ok(text) = std::fs::read(dir.join(crate::source::postgres::GLOBALS)) else { return Ok(false) };
        live.step(&format!("loading the roles of {}", self.source));
        let (text, left_out) = without_commands(&String::from_utf8_lossy(&text));
        if left_out > 0 {
            let text = format!("source {}: {left_out} lines of its roles hold backslashes, and were left out", self.source);
            live.message(Level::Warning, text);
        }
        let text = postgres::globals(&text, own, self.user.as_ref()).map_err(Trouble::untried)?;
        let said = crate::source::postgres::Client::new(&self.config)
            .and_then(|client| client.execute_on("postgres", text.as_bytes(), &live.cancel))
            .map_err(|e| failed(&self.source, e))?;
        let lines: Vec<&str> = said.lines().filter(|l| l.contains("ERROR") && !l.contains("already exists")).take(5).collect();
        if !lines.is_empty() {
            live.message(Level::Warning, format!("source {}: not all roles could be made: {}", self.source, lines.join("; ")));
        }
        Ok(true)
    }

    fn load_one(&mut self, wanted: &Wanted, file: &Path, live: &LiveRun) -> Result<()> {
        let config = self.config.clone();
        match self.kind {
            Kind::Postgres => {
                let client = crate::source::postgres::Client::new(&config).map_err(|e| failed(&self.source, e))?;
                self.load_with(&client, wanted, file, live)?;
                // What only the database as a whole has, such as where tables are looked for.
                if self.dir.is_some()
                    && wanted.scratch == wanted.database
                    && let Some(sql) = wanted.fact("properties")
                    && let Err(e) = client.execute("postgres", without_commands(sql).0.trim().trim_end_matches(';'), &live.cancel)
                {
                    live.message(
                        Level::Warning,
                        format!("source {}: the properties of {} could not be set: {e}", self.source, wanted.database),
                    );
                }
                Ok(())
            }
            Kind::Mysql => {
                let client = crate::source::mysql::Client::new(&config, &live.cancel).map_err(|e| failed(&self.source, e))?;
                self.load_with(&client, wanted, file, live)
            }
        }
    }

    fn load_with(&mut self, loader: &dyn Loader, wanted: &Wanted, file: &Path, live: &LiveRun) -> Result<()> {
        let source = self.source.clone();
        let untried = |e| failed(&source, e);
        live.step(&format!("loading {}", wanted.database));
        if self.dir.is_none() {
            loader.look(wanted, false, &live.cancel).map_err(untried)?;
            self.made.push(wanted.clone());
        }
        let running = loader.begin(wanted, &live.cancel).map_err(untried)?;
        if let Err(text) = feed(running, file, live)? {
            let text = format!("source {source}: the dump of {} does not load: {text}", wanted.database);
            return Err(if is_of_surroundings(&text, wanted.owners) { Trouble::untried(text) } else { Trouble::Bad(text) });
        }
        live.step(&format!("checking {}", wanted.database));
        match loader.verify(wanted, &live.cancel) {
            Ok(found) => live.message(Level::Info, format!("source {source}: {}: {found}", wanted.database)),
            Err(SourceError::Failed(text)) if text.contains(crate::source::load::NOT_THE_SAME) => {
                return Err(Trouble::Bad(format!("source {source}: database {}: {text}", wanted.database)));
            }
            Err(e) => return Err(untried(e)),
        }
        Ok(())
    }

    /// What a database is called here; None when it was not loaded.
    pub fn name_of(&self, database: &str) -> Option<&str> {
        self.databases.iter().find(|(name, _)| name == database).map(|(_, there)| there.as_str())
    }

    /// Variables by which a command reaches a server that the drill started.
    pub fn environment(&self) -> Vec<(&'static str, OsString)> {
        let Some(dir) = &self.dir else { return Vec::new() };
        match self.kind {
            Kind::Postgres => {
                let first = self.databases.first().map_or("postgres", |(_, there)| there.as_str());
                vec![("PGHOST", dir.into()), ("PGPORT", postgres::PORT.into()), ("PGUSER", "postgres".into()), ("PGDATABASE", first.into())]
            }
            Kind::Mysql => {
                vec![("MYSQL_UNIX_PORT", dir.join(mysql::SOCKET).into()), ("KEEPD_MYSQL_DEFAULTS", dir.join(mysql::DEFAULTS).into())]
            }
        }
    }

    /// The first value of a question's first row.
    pub fn first(&self, database: &str, sql: &str, cancel: &CancellationToken) -> Result<Option<String>, SourceError> {
        match self.kind {
            Kind::Postgres => crate::source::postgres::Client::new(&self.config)?.first(database, sql, cancel),
            Kind::Mysql => crate::source::mysql::Client::new(&self.config, cancel)?.first(database, sql, cancel),
        }
    }

    /// Ends it, or removes what was made on the source's own. What could not be is told.
    pub fn end(self, live: &LiveRun) {
        if self.made.is_empty() {
            return;
        }
        // Also of a run that was cancelled.
        let go_on = CancellationToken::new();
        for wanted in &self.made {
            let removed = match self.kind {
                Kind::Postgres => crate::source::postgres::Client::new(&self.config).and_then(|c| c.discard(wanted)),
                Kind::Mysql => crate::source::mysql::Client::new(&self.config, &go_on).and_then(|c| c.discard(wanted)),
            };
            if let Err(e) = removed {
                let text = format!("source {}: the scratch database {} could not be removed: {e}", self.source, wanted.scratch);
                live.message(Level::Warning, text);
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let Some(mut running) = self.running.take() else { return };
        // Nothing of it is kept, so it need not put anything in order.
        running.signal(match self.kind {
            Kind::Postgres => Signal::QUIT,
            Kind::Mysql => Signal::TERM,
        });
        running.has_ended_within(MERCY);
    }
}

/// Whether what a server or tool says is not the backup's fault.
pub fn is_of_surroundings(text: &str, has_roles: bool) -> bool {
    let missing = |what: &str| text.lines().any(|l| l.contains(what) && l.contains("does not exist"));
    SURROUNDINGS.iter().any(|s| text.contains(s)) || missing("tablespace \"") || (!has_roles && missing("role \""))
}

/// Feeds a file to a program; what is wrong with how that ended.
fn feed(mut running: Running, file: &Path, live: &LiveRun) -> Result<Result<(), String>> {
    let opened = File::open(file).map_err(|e| Trouble::Bad(format!("{} was not restored: {e}", file.display())))?;
    let input = running.take_input().map(File::from).ok_or_else(|| Trouble::untried("the program has no input; this is a bug"))?;
    std::thread::scope(|scope| {
        let feeder = scope.spawn(move || copy(opened, input, live));
        let ended = running.finish(PATIENCE, &live.cancel);
        let fed = feeder.join().unwrap_or(Err(Fed::Lost("a thread panicked".into())));
        let ended = ended.map_err(Failure::from)?;
        if let Err(Fed::Lost(text)) = fed {
            return Err(Trouble::untried(format!("{} cannot be read back: {text}", file.display())));
        }
        Ok(match (ended.good(), fed) {
            (Err(e), _) => Err(e.to_string()),
            (Ok(()), Err(_)) => Err(format!("{} ended well, but did not take all of it", ended.name())),
            (Ok(()), Ok(())) => Ok(()),
        })
    })
}

/// Why not all was fed.
enum Fed {
    /// Nobody took it.
    Refused,
    /// It could not be read.
    Lost(String),
}

fn copy(mut from: File, mut to: File, live: &LiveRun) -> Result<(), Fed> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Fed::Lost(e.to_string())),
        };
        to.write_all(buffer.get(..n).unwrap_or_default()).map_err(|_| Fed::Refused)?;
        live.report.bytes(n as u64);
    }
}

/// The numbers that a version begins with: `15.14 (Debian…)` is 15, 14.
pub fn version(text: &str) -> Option<(u32, u32)> {
    let start = text.find(|c: char| c.is_ascii_digit())?;
    let digits = text.get(start..)?.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
    let mut numbers = digits.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
    Some((numbers.next()?, numbers.next().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(version("15.14 (Debian 15.14-0+deb12u1)"), Some((15, 14)));
        assert_eq!(version("postgres (PostgreSQL) 17beta2"), Some((17, 0)));
        assert_eq!(version("10.11.19-MariaDB"), Some((10, 11)));
        assert_eq!(version("none"), None);
    }

    #[test]
    fn what_is_not_the_dumps_fault_says_nothing_of_it() {
        assert!(is_of_surroundings("ERROR: could not extend file: No space left on device", true));
        assert!(is_of_surroundings("ERROR: role \"shop\" does not exist", false));
        assert!(!is_of_surroundings("ERROR: role \"shop\" does not exist", true));
        assert!(!is_of_surroundings("ERROR: syntax error at or near \"x\"", true));
        assert!(!is_of_surroundings("pg_restore: error: could not read from input file: end of file", false));
    }
}
