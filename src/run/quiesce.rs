//! An application held still: services stopped or a maintenance mode begun, and in any case ended again.
//!
//! Before anything is stopped, a note of how to end it is written to `quiesced/` of the state directory. Should the daemon die meanwhile, its next
//! start finds the note and ends what it began.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use keepd_protocol::model::Level;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::hooks;
use super::live::{Failure, LiveRun};
use crate::config::{Job, Program, Quiesce};
use crate::process::{Job as Process, ProcessError};

/// For a unit to stop or to start.
const UNIT_PATIENCE: Duration = Duration::from_secs(300);

/// How it is ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    pub job: String,
    pub run: String,
    /// Units to start, in this order.
    pub services: Vec<String>,
    pub end: Option<Program>,
}

/// Ends when it is dropped, at the latest.
pub struct Quiesced<'a> {
    note: Option<(PathBuf, Note)>,
    live: &'a LiveRun,
}

fn systemctl(words: [&str; 2], unit: &str, cancel: &CancellationToken) -> Result<String, ProcessError> {
    let words = std::iter::once("systemctl").chain(words).chain(["--", unit]);
    let output = Process::new(words).run(b"", 64 << 10, UNIT_PATIENCE, cancel)?;
    Ok(String::from_utf8_lossy(&output).into_owned())
}

/// Whether a unit runs, or is about to.
pub fn is_active(unit: &str, cancel: &CancellationToken) -> Result<bool, ProcessError> {
    // `is-active` ends with another exit status than 0 for what does not run, `show` only when it cannot tell.
    let shown = systemctl(["show", "--property=LoadState,ActiveState"], unit, cancel)?;
    if !shown.lines().any(|l| l.starts_with("LoadState=")) {
        return Err(ProcessError::Failed(format!("systemctl says nothing of unit {unit}")));
    }
    if shown.contains("LoadState=not-found") {
        return Err(ProcessError::Failed(format!("systemd knows no unit {unit}")));
    }
    Ok(["active", "activating", "reloading"].iter().any(|s| shown.lines().any(|l| l == format!("ActiveState={s}"))))
}

/// Holds a job's application still as it is configured; None when it goes on working.
pub fn begin<'a>(job: &Job, state_dir: &Path, live: &'a LiveRun) -> Result<Option<Quiesced<'a>>, Failure> {
    if job.quiesce != Quiesce::No {
        recovered(live)?;
    }
    match &job.quiesce {
        Quiesce::No => Ok(None),
        Quiesce::Services => stop_services(job, state_dir, live).map(Some),
        Quiesce::Maintenance { begin, end } => {
            let mut held = Quiesced { note: None, live };
            held.write_down(state_dir, Note { job: job.name.clone(), run: live.id(), services: Vec::new(), end: Some(end.clone()) })?;
            begin_maintenance(job, begin, live)?;
            Ok(Some(held))
        }
    }
}

pub fn begin_maintenance(job: &Job, begin: &Program, live: &LiveRun) -> Result<(), Failure> {
    live.step("beginning the maintenance mode");
    let environment =
        vec![("KEEPD_EVENT", "quiesce_begin".into()), ("KEEPD_JOB", job.name.as_str().into()), ("KEEPD_RUN", live.id().into())];
    let said = hooks::run_program(begin, environment, &live.cancel);
    let said = said.map_err(|e| e.about("the maintenance mode could not be begun"))?;
    if !said.is_empty() {
        live.message(Level::Info, format!("quiesce: {said}"));
    }
    Ok(())
}

/// Those of a job's services that run now.
pub fn running_services(job: &Job, cancel: &CancellationToken) -> Result<Vec<String>, Failure> {
    let mut running = Vec::new();
    for unit in &job.services {
        if is_active(unit, cancel).map_err(|e| e.about(&format!("service {unit} cannot be looked at")))? {
            running.push(unit.clone());
        }
    }
    Ok(running)
}

pub fn stop(unit: &str, cancel: &CancellationToken) -> Result<(), Failure> {
    let stopped = systemctl(["--no-ask-password", "stop"], unit, cancel);
    Ok(stopped.map(drop).map_err(|e| e.about(&format!("service {unit} could not be stopped")))?)
}

/// Stops those of a job's services that run.
pub fn stop_services<'a>(job: &Job, state_dir: &Path, live: &'a LiveRun) -> Result<Quiesced<'a>, Failure> {
    recovered(live)?;
    live.step("stopping services");
    let running = running_services(job, &live.cancel)?;
    let mut held = Quiesced { note: None, live };
    if running.is_empty() {
        return Ok(held);
    }
    // They start in the order opposite to that in which they stop.
    let services = running.iter().rev().cloned().collect();
    held.write_down(state_dir, Note { job: job.name.clone(), run: live.id(), services, end: None })?;
    for unit in &running {
        stop(unit, &live.cancel)?;
    }
    Ok(held)
}

fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("quiesced")
}

impl Quiesced<'_> {
    fn write_down(&mut self, state_dir: &Path, note: Note) -> Result<(), Failure> {
        let directory = directory(state_dir);
        // A run may hold still more than once: for each destination that it tries.
        let path = directory.join(format!("{}-{}.json", note.run, jiff::Timestamp::now().as_nanosecond()));
        let write = || -> std::io::Result<()> {
            crate::durable::make_directories(&directory)?;
            let mut file = tempfile::NamedTempFile::new_in(&directory)?;
            file.write_all(&serde_json::to_vec(&note)?)?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|e| e.error)?;
            std::fs::File::open(&directory)?.sync_all()
        };
        write().map_err(|e| {
            Failure::Failed(format!("cannot note in {} what is to be started again: {e}; nothing was stopped", path.display()))
        })?;
        self.note = Some((path, note));
        Ok(())
    }

    /// Ends it; the error says what could not be ended.
    pub fn end(mut self) -> Result<(), Failure> {
        self.end_now()
    }

    fn end_now(&mut self) -> Result<(), Failure> {
        let Some((path, note)) = self.note.take() else { return Ok(()) };
        self.live.step(if note.end.is_some() { "ending the maintenance mode" } else { "starting services" });
        end_and_forget(&note, &path).map_err(Failure::Failed)
    }
}

impl Drop for Quiesced<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.end_now() {
            self.live.message(Level::Error, e.to_string());
        }
    }
}

/// The note goes when all of it was ended.
fn end_and_forget(note: &Note, path: &Path) -> Result<(), String> {
    end_noted(note)?;
    std::fs::remove_file(path).map_err(|e| format!("cannot remove {}: {e}", path.display()))
}

/// Ends what a note says; the error says what could not be ended.
pub fn end_noted(note: &Note) -> Result<(), String> {
    // Whatever was cancelled: this is done.
    let cancel = CancellationToken::new();
    let mut errors = Vec::new();
    for unit in &note.services {
        if let Err(e) = systemctl(["--no-ask-password", "start"], unit, &cancel) {
            errors.push(format!("service {unit} was stopped and COULD NOT BE STARTED AGAIN: {e}"));
        }
    }
    if let Some(program) = &note.end {
        let environment =
            vec![("KEEPD_EVENT", "quiesce_end".into()), ("KEEPD_JOB", note.job.clone().into()), ("KEEPD_RUN", note.run.clone().into())];
        if let Err(e) = hooks::run_program(program, environment, &cancel) {
            errors.push(format!("the maintenance mode COULD NOT BE ENDED: {e}"));
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors.join("; ")) }
}

/// What a daemon that died had begun is being ended.
static RECOVERING: AtomicBool = AtomicBool::new(false);

/// While it lives, nothing is held still by a run: what a daemon that died had begun is ended first.
pub struct Recovery(());

impl Recovery {
    pub fn begin() -> Self {
        RECOVERING.store(true, Ordering::Release);
        Self(())
    }
}

impl Drop for Recovery {
    fn drop(&mut self) {
        RECOVERING.store(false, Ordering::Release);
    }
}

/// Waits until that is done.
pub fn recovered(live: &LiveRun) -> Result<(), Failure> {
    while RECOVERING.load(Ordering::Acquire) {
        if live.cancel.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Ends what a daemon that died had begun. Blocks.
pub fn recover(state_dir: &Path) {
    let Ok(entries) = std::fs::read_dir(directory(state_dir)) else { return };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "json")).collect();
    paths.sort();
    paths.iter().for_each(|path| recover_one(path));
}

fn recover_one(path: &Path) {
    let note = std::fs::read(path).map_err(|e| e.to_string()).and_then(|b| serde_json::from_slice::<Note>(&b).map_err(|e| e.to_string()));
    match note {
        Err(e) => tracing::error!("{} cannot be read; what it was to start again has to be started by hand: {e}", path.display()),
        Ok(note) => match end_and_forget(&note, path) {
            Ok(()) => tracing::warn!(job = %note.job, run = %note.run, "keepd died while it held the application still; it goes on now"),
            Err(e) => tracing::error!(job = %note.job, run = %note.run, "keepd died while it held the application still: {e}"),
        },
    }
}
