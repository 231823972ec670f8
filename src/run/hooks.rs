//! Programs of the user's around a run, and what they said as messages of it.
//!
//! Each gets its arguments as they are, with no shell between, and the run in its environment: `KEEPD_EVENT` (before, after, on_failure,
//! before_restore, after_restore), `KEEPD_JOB`, `KEEPD_RUN`, `KEEPD_TYPE`, `KEEPD_DESTINATION`, and where they are known `KEEPD_BACKUP`, `KEEPD_OUTCOME`, `KEEPD_ERROR`.

use std::ffi::OsString;
use std::time::Duration;

use keepd_protocol::model::Level;
use tokio_util::sync::CancellationToken;

use super::live::{Failure, Finish, LiveRun};
use crate::config::{Job, Program};
use crate::process::{Pipes, ProcessError};
use crate::source::command;

/// Of what a hook prints so much is kept in the run, in bytes.
const MOST_SAID: usize = 16 << 10;

/// The hooks of one event, and what they are told.
pub struct Event<'a> {
    pub name: &'static str,
    pub programs: &'a [Program],
    pub job: &'a str,
    pub r#type: &'a str,
}

impl Event<'_> {
    /// Runs them in order; the first that fails ends it.
    pub fn run(&self, live: &LiveRun, more: &[(&'static str, String)]) -> Result<(), Failure> {
        self.run_until(live, more, &live.cancel)
    }

    fn run_until(&self, live: &LiveRun, more: &[(&'static str, String)], cancel: &CancellationToken) -> Result<(), Failure> {
        for program in self.programs {
            let shown = program.command.first().map(String::as_str).unwrap_or_default();
            live.step(&format!("hook {}: {shown}", self.name));
            let snapshot = live.snapshot();
            let mut environment: Vec<(&str, OsString)> = vec![
                ("KEEPD_EVENT", self.name.into()),
                ("KEEPD_JOB", self.job.into()),
                ("KEEPD_RUN", snapshot.id.into()),
                ("KEEPD_TYPE", self.r#type.into()),
                ("KEEPD_DESTINATION", snapshot.destination.unwrap_or_default().into()),
            ];
            // An environment holds no NUL.
            environment.extend(more.iter().map(|(key, value)| (*key, value.replace('\0', " ").into())));
            let said = run_program(program, environment, cancel).map_err(|e| e.about(&format!("hook {}", self.name)))?;
            if !said.is_empty() {
                live.message(Level::Info, format!("{}: {shown}: {said}", self.name));
            }
        }
        Ok(())
    }
}

/// Runs a program to its end; what it printed. Whatever is not exit status 0 is an error.
pub fn run_program(program: &Program, environment: Vec<(&str, OsString)>, cancel: &CancellationToken) -> Result<String, ProcessError> {
    // Both of its outputs go one way, so that what it says stays in order.
    let running = command::job(program, environment).start(Pipes::Input)?;
    let ended = running.finish(program.timeout, cancel)?;
    ended.good()?;
    let mut said = ended.said;
    if said.len() > MOST_SAID {
        let end = (0..=MOST_SAID).rev().find(|at| said.is_char_boundary(*at)).unwrap_or(0);
        said.truncate(end);
        said.push('…');
    }
    Ok(said)
}

/// What follows a backup: `after` when it is there, `on_failure` when it is not (also when it was cancelled).
pub fn around_backup(job: &Job, r#type: &str, live: &LiveRun, work: impl FnOnce() -> Result<Finish, Failure>) -> Result<Finish, Failure> {
    let event = |name, programs| Event { name, programs, job: &job.name, r#type };
    let result = event("before", job.hooks.before.as_slice()).run(live, &[]).and_then(|()| work());
    match result {
        Ok(finish) => {
            let outcome = match finish {
                Finish::Good => "good",
                Finish::Partial => "partial",
                Finish::Suspect => "suspect",
            };
            let backup = live.snapshot().backup.unwrap_or_default();
            let told = [("KEEPD_OUTCOME", outcome.to_owned()), ("KEEPD_BACKUP", backup)];
            match event("after", job.hooks.after.as_slice()).run(live, &told) {
                Ok(()) => Ok(finish),
                // The backup is made; that is not taken back.
                Err(e) => {
                    live.message(Level::Error, format!("the backup is made, but {e}"));
                    Ok(if finish == Finish::Good { Finish::Partial } else { finish })
                }
            }
        }
        Err(failure) => Err(failed(&event("on_failure", job.hooks.on_failure.as_slice()), live, failure)),
    }
}

/// A restore that changes something: `before_restore`, then `after_restore`, or `on_failure` when it went wrong.
pub fn around_restore(job: &Job, live: &LiveRun, work: impl FnOnce() -> Result<Finish, Failure>) -> Result<Finish, Failure> {
    let event = |name, programs| Event { name, programs, job: &job.name, r#type: "restore" };
    let result = event("before_restore", job.hooks.before_restore.as_slice()).run(live, &[]).and_then(|()| work());
    let result = result.and_then(|finish| {
        event("after_restore", job.hooks.after_restore.as_slice()).run(live, &[("KEEPD_OUTCOME", "good".to_owned())])?;
        Ok(finish)
    });
    result.map_err(|failure| failed(&event("on_failure", job.hooks.on_failure.as_slice()), live, failure))
}

/// Runs the hooks of a failure. A cancelled run still clears up after itself, each hook within its own time.
pub fn failed(hooks: &Event<'_>, live: &LiveRun, failure: Failure) -> Failure {
    let outcome = if matches!(failure, Failure::Cancelled) { "cancelled" } else { "failed" };
    let told = [("KEEPD_OUTCOME", outcome.to_owned()), ("KEEPD_ERROR", failure.to_string())];
    if let Err(e) = hooks.run_until(live, &told, &CancellationToken::new()) {
        live.message(Level::Error, e.to_string());
    }
    failure
}

/// The first line that a version's program prints.
pub fn first_line(program: &Program, job: &str, cancel: &CancellationToken) -> Result<String, ProcessError> {
    const MOST: usize = 64 << 10;
    let output =
        command::job(program, vec![("KEEPD_JOB", job.into())]).run(b"", MOST, program.timeout.min(Duration::from_secs(60)), cancel)?;
    let text = String::from_utf8_lossy(&output);
    let line = text.lines().map(str::trim).find(|l| !l.is_empty()).unwrap_or_default();
    Ok(line.chars().filter(|c| !c.is_control()).take(200).collect())
}
