//! The configuration and the state, written: all of it, or nothing.
//!
//! First the whole of it is made in a directory of the state directory: a configuration of the same tables, with its secrets, and a ledger that the
//! destinations are brought into with it. That may take long, and may be given up at any time. Then the files go where they belong, which takes
//! a moment; what fails then takes back what was written.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use keepd_protocol::audit::{AuditEntry, AuditResult};
use tempfile::TempDir;

use super::report::{Report, Seen};
use super::{Given, is_sample, prepare};
use crate::access::user_name;
use crate::config::{Config, Destination};
use crate::daemon::state_dir;
use crate::ledger::Ledger;
use crate::ledger::audit::by_keepd;
use crate::ledger::lock::StateLock;
use crate::portable::envelope::Envelope;
use crate::rescue::{Failure, Result, tell};
use crate::run::adopt;
use crate::run::backup::Environment;

/// Of what is in a state directory what is made here.
const STATE: [&str; 3] = ["ledger.sqlite", "instance", "repositories"];

/// Makes it; the report says what came of it.
pub fn make(main: &Path, envelope: &Envelope, given: &Given, take_over: bool, report: &mut Report) -> Result<()> {
    let state = State::begin(&report.state_dir)?;
    let stage = state.stage.path().to_owned();
    *given.leavings.lock().unwrap_or_else(PoisonError::into_inner) = Some(stage.clone());
    let ledger = Arc::new(Ledger::open(&stage).map_err(Failure::failed)?);
    let config = staged(&stage, &ledger, envelope)?;
    let mut env = Environment { config: Arc::new(config), ledger, runtime: given.runtime.clone(), lent: given.lent.clone() };
    for target in env.config.destinations.values() {
        if !report.quiet {
            tell(&format!("looking at {} ({})", target.name, crate::storage::location(target)));
        }
        report.destinations.push(see(&env, target, take_over, given));
        wanted(given)?;
    }

    let mut written = Written::default();
    let directory = main.parent().unwrap_or(Path::new("/"));
    written.directory(directory)?;
    written.directory(&directory.join("conf.d"))?;
    written.set_aside(main)?;
    let prepared = prepare(main, &env.ledger, envelope)?;
    let texts = prepared.after().clone();
    let secrets = prepared.secret_files();
    for file in &secrets {
        let between = file.ancestors().skip(1).take_while(|a| *a != directory).map(Path::to_owned).collect::<Vec<_>>();
        written.directories.extend(between.into_iter().rev().filter(|d| !d.exists()));
    }
    let made: Vec<PathBuf> = texts.files.iter().map(|(path, _)| path.clone()).chain(secrets).collect();
    written.files.extend(made.iter().filter(|path| path.symlink_metadata().is_err()).cloned());
    report.problems = prepared.apply_anyway(&stage.join("before"), &env.ledger).map_err(Failure::failed)?;
    env.config = Arc::new(texts.load().map_err(Failure::failed)?);
    // Nothing may have it open when it moves.
    let Environment { config, ledger, runtime, lent } = env;
    drop(ledger);
    let state_dir = config.daemon.state_dir.clone();
    state.settle(&mut written)?;
    let ledger = Arc::new(Ledger::open(&state_dir).map_err(Failure::failed)?);
    written.keep();
    // A new log: the one of before is not brought back, only its heads are at the destinations.
    let begun = AuditEntry {
        user: user_name(rustix::process::getuid().as_raw()),
        uid: Some(rustix::process::getuid().as_raw()),
        message: Some("this state was made anew by keepd rescue bootstrap: what was logged before is not here".into()),
        ..by_keepd("bootstrap", AuditResult::Done)
    };
    if let Err(e) = ledger.audit(begun) {
        report.problems.push(format!("the audit log could not be begun: {e}"));
    }
    report.written = made.iter().map(|path| path.display().to_string()).collect();

    let env = Environment { config, ledger, runtime, lent };
    for seen in report.destinations.iter_mut().filter(|seen| take_over && seen.writer.is_some()) {
        let Some(target) = env.config.destinations.get(&seen.name) else { continue };
        match adopt::take_over(&env, target) {
            Ok(_) => (seen.taken_over, seen.writer) = (true, None),
            Err(e) => seen.problems.push(format!("it could not be taken over: {e}")),
        }
    }
    Ok(())
}

/// Whoever asked for it may have given it up.
fn wanted(given: &Given) -> Result<()> {
    match given.cancel.is_cancelled() {
        true => Err(Failure::failed("cancelled; nothing was written")),
        false => Ok(()),
    }
}

/// The same configuration where nobody looks for one, with the stage as its state directory.
fn staged(stage: &Path, ledger: &Ledger, envelope: &Envelope) -> Result<Config> {
    let directory = stage.join("configuration");
    let made = |e: io::Error| Failure::failed(format!("cannot make {}: {e}", directory.display()));
    DirBuilder::new().mode(0o700).create(&directory).map_err(made)?;
    let prepared = prepare(&directory.join("keepd.toml"), ledger, envelope)?;
    let texts = prepared.after().clone();
    prepared.apply_anyway(&stage.join("before"), ledger).map_err(Failure::failed)?;
    let mut config = texts.load().map_err(Failure::failed)?;
    config.daemon.state_dir = stage.to_owned();
    Ok(config)
}

/// Brings what a destination has into the ledger. One that does not answer is no reason to do without the others.
fn see(env: &Environment, target: &Destination, take_over: bool, given: &Given) -> Seen {
    let mut seen = Seen { name: target.name.clone(), location: crate::storage::location(target), ..Seen::default() };
    let looked = match take_over {
        true => adopt::accept_hosts(env, target),
        false => Ok(()),
    };
    match looked.and_then(|()| adopt::sync(env, target, &given.cancel)) {
        Ok(problems) => {
            seen.backups = env.ledger.count_backups(&target.name).ok();
            seen.problems = problems;
        }
        Err(e) if e.to_string().contains("nothing was backed up to it yet") => {
            seen.is_new = true;
            return seen;
        }
        Err(e) => {
            seen.problems.push(e.to_string());
            return seen;
        }
    }
    match adopt::other_writer(env, target) {
        Ok(writer) => seen.writer = writer,
        Err(e) => seen.problems.push(e.to_string()),
    }
    seen
}

/// The state directory, which is nobody else's while this lives.
struct State {
    directory: PathBuf,
    /// What was made for it, if all of it comes to nothing.
    made: Vec<PathBuf>,
    lock_is_new: bool,
    settled: bool,
    stage: TempDir,
    _lock: StateLock,
}

impl State {
    /// Makes the directory where it is missing; one in which a keepd remembers something is refused.
    fn begin(directory: &Path) -> Result<Self> {
        let made = missing(directory);
        let undo = |failure: Failure| {
            made.iter().rev().for_each(|directory| drop(fs::remove_dir(directory)));
            failure
        };
        state_dir::prepare(directory).map_err(|e| undo(Failure::failed(e)))?;
        let lock_is_new = !directory.join("lock").exists();
        let begun = Self::occupy(directory).map_err(|failure| {
            if lock_is_new {
                let _ = fs::remove_file(directory.join("lock"));
            }
            undo(failure)
        });
        let (stage, lock) = begun?;
        Ok(Self { directory: directory.to_owned(), made, lock_is_new, settled: false, stage, _lock: lock })
    }

    fn occupy(directory: &Path) -> Result<(TempDir, StateLock)> {
        let lock = StateLock::acquire(directory).map_err(Failure::failed)?;
        if directory.join(STATE[0]).exists() {
            let ledger = Ledger::open(directory).map_err(Failure::failed)?;
            if !ledger.runs(None, 1)?.is_empty() || !ledger.backups(None, None)?.is_empty() {
                return Err(Failure::failed(format!(
                    "{} has the state of a keepd that worked here, and nothing is written over it: move it away, or put its configuration back",
                    directory.display()
                )));
            }
        }
        let stage = tempfile::Builder::new().prefix(".bootstrap-").tempdir_in(directory);
        let stage = stage.map_err(|e| Failure::failed(format!("cannot make a directory in {}: {e}", directory.display())))?;
        Ok((stage, lock))
    }

    /// Moves what was made into its place. An empty ledger that was there goes.
    fn settle(mut self, written: &mut Written) -> Result<()> {
        let stage = self.stage.path().to_owned();
        written.directories.extend(self.made.iter().cloned());
        for name in STATE {
            let (from, to) = (stage.join(name), self.directory.join(name));
            let failed = |e: io::Error| Failure::failed(format!("{} cannot be put in its place: {e}", to.display()));
            if name == STATE[0] {
                for suffix in ["", "-wal", "-shm"] {
                    let old = self.directory.join(format!("{name}{suffix}"));
                    fs::remove_file(&old).or_else(not_found).map_err(failed)?;
                }
            }
            // Who this machine is to others stays, and what a cache has is had again.
            if !from.exists() || to.exists() {
                continue;
            }
            fs::rename(&from, &to).map_err(failed)?;
            written.state.push(to);
        }
        let synced = fs::File::open(&self.directory).and_then(|directory| directory.sync_all());
        synced.map_err(|e| Failure::failed(format!("{} cannot be synced: {e}", self.directory.display())))?;
        self.settled = true;
        Ok(())
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        let _ = fs::remove_dir_all(self.stage.path());
        if self.lock_is_new {
            let _ = fs::remove_file(self.directory.join("lock"));
        }
        // Only where nothing is in it.
        self.made.iter().rev().for_each(|directory| drop(fs::remove_dir(directory)));
    }
}

/// The directories above and with this one that are not there, the uppermost first.
fn missing(directory: &Path) -> Vec<PathBuf> {
    let mut missing: Vec<PathBuf> = directory.ancestors().take_while(|a| a.symlink_metadata().is_err()).map(Path::to_owned).collect();
    missing.reverse();
    missing
}

fn not_found(e: io::Error) -> io::Result<()> {
    match e.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(e),
    }
}

/// What was written outside the stage. Unless it is kept, it goes again.
#[derive(Default)]
struct Written {
    directories: Vec<PathBuf>,
    files: Vec<PathBuf>,
    state: Vec<PathBuf>,
    /// The sample that was in the place of the configuration, and where it is now.
    sample: Option<(PathBuf, PathBuf)>,
    kept: bool,
}

impl Written {
    fn directory(&mut self, directory: &Path) -> Result<()> {
        self.directories.extend(missing(directory));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|e| Failure::failed(format!("cannot make the directory {}: {e}; nothing was written", directory.display())))
    }

    /// Moves the sample aside, if it is there.
    fn set_aside(&mut self, main: &Path) -> Result<()> {
        if !is_sample(main) {
            return Ok(());
        }
        let mut name = main.file_name().unwrap_or_default().to_owned();
        name.push(".before-bootstrap");
        let aside = main.with_file_name(name);
        fs::rename(main, &aside)
            .map_err(|e| Failure::failed(format!("{} cannot be moved aside: {e}; nothing was written", main.display())))?;
        self.sample = Some((main.to_owned(), aside));
        Ok(())
    }

    fn keep(mut self) {
        self.kept = true;
        if let Some((_, aside)) = &self.sample {
            let _ = fs::remove_file(aside);
        }
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        for path in &self.state {
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
        self.files.iter().for_each(|file| drop(fs::remove_file(file)));
        if let Some((main, aside)) = &self.sample {
            let _ = fs::rename(aside, main);
        }
        self.directories.iter().rev().for_each(|directory| drop(fs::remove_dir(directory)));
    }
}
