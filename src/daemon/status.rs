//! The one line `systemctl status` shows: what runs, what is next. Told when something changed, never on a timer.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use keepd_protocol::model::{Event, EventKind, Run, RunState};
use tokio::sync::{Notify, broadcast};

use super::command_line::count;
use super::notify::Notifier;

/// Events come in bunches; one line for each bunch is enough.
const SETTLE: Duration = Duration::from_millis(200);

/// What the line is made of.
#[derive(Debug, Default)]
pub struct Picture {
    pub active: Vec<Arc<Run>>,
    /// The job that is due next, and when.
    pub next: Option<(String, Timestamp)>,
    /// The configuration on disk was refused at the last reload.
    pub config_refused: bool,
}

impl Picture {
    pub fn line(&self, zone: &TimeZone) -> String {
        let running: Vec<String> = self.active.iter().filter(|r| r.state == RunState::Running).map(|r| describe(r)).collect();
        let queued = self.active.iter().filter(|r| r.state == RunState::Queued).count();
        let mut parts = Vec::new();
        if running.is_empty() {
            parts.push("Idle".to_owned());
        } else {
            parts.push(format!("Running: {}", running.join(", ")));
        }
        if queued > 0 {
            parts.push(format!("{} waiting", count(queued, "run", "runs")));
        }
        parts.push(match &self.next {
            Some((job, at)) => format!("next: {job} at {}", at.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S %Z")),
            None => "nothing scheduled".to_owned(),
        });
        if self.config_refused {
            parts.push("the configuration on disk is wrong and not in force, see the log".to_owned());
        }
        parts.join("; ")
    }
}

/// `backup of shop (storing)`, `check of local`.
fn describe(run: &Run) -> String {
    let mut text = run.kind.to_string();
    if let Some(of) = run.job.as_ref().or(run.destination.as_ref()).or(run.backup.as_ref()) {
        text = format!("{text} of {of}");
    }
    if !run.step.is_empty() {
        text = format!("{text} ({})", run.step);
    }
    text
}

/// The line, in the machine's time zone. On a blocking thread: what is next stands in the ledger.
pub async fn line(picture: &Arc<dyn Fn() -> Picture + Send + Sync>) -> String {
    let picture = picture.clone();
    tokio::task::spawn_blocking(move || picture().line(&TimeZone::system())).await.unwrap_or_default()
}

/// Tells the service manager a new line whenever an event (or `poke`) made it another one. Ends with the events' sender.
pub async fn follow(
    notifier: Notifier,
    mut events: broadcast::Receiver<Event>,
    poke: Arc<Notify>,
    picture: Arc<dyn Fn() -> Picture + Send + Sync>,
) {
    let mut told = String::new();
    loop {
        let line = line(&picture).await;
        if line != told {
            notifier.status(&line);
            told = line;
        }
        loop {
            tokio::select! {
                () = poke.notified() => break,
                event = events.recv() => match event {
                    // A message changes nothing the line shows.
                    Ok(event) if event.kind == EventKind::RunMessage => {}
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => break,
                    Err(broadcast::error::RecvError::Closed) => return,
                },
            }
        }
        tokio::time::sleep(SETTLE).await;
        // What came meanwhile is part of the picture taken now.
        events = events.resubscribe();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keepd_protocol::model::RunKind;

    fn run(kind: RunKind, state: RunState, job: Option<&str>, step: &str) -> Arc<Run> {
        Arc::new(Run { kind, state, job: job.map(Into::into), step: step.into(), ..Run::default() })
    }

    #[test]
    fn the_line_says_what_runs_and_what_is_next() {
        let mut picture = Picture::default();
        assert_eq!(picture.line(&TimeZone::UTC), "Idle; nothing scheduled");
        picture.next = Some(("shop".into(), "2026-12-24T18:00:00Z".parse().expect("time")));
        assert_eq!(picture.line(&TimeZone::UTC), "Idle; next: shop at 2026-12-24 18:00:00 UTC");
        picture.active = vec![
            run(RunKind::Backup, RunState::Running, Some("shop"), "capture db"),
            run(RunKind::Backup, RunState::Queued, Some("blog"), ""),
        ];
        picture.config_refused = true;
        assert_eq!(
            picture.line(&TimeZone::UTC),
            "Running: backup of shop (capture db); 1 run waiting; next: shop at 2026-12-24 18:00:00 UTC; the configuration on disk is wrong and not in force, see the log"
        );
    }
}
