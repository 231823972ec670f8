//! What systemd is told: readiness, status, reloads, the watchdog.

use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use crate::ledger::Ledger;
use crate::run::Runs;
use crate::schedule::Scheduler;

/// Sends states; without a service manager nothing happens.
pub fn tell(states: &[NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(states) {
        tracing::debug!("the service manager could not be told: {e}");
    }
}

/// A status may hold names and errors; a line break in it would begin another assignment.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(256).collect()
}

pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(&one_line(status))]);
}

/// What runs and what is next.
pub fn status_text(runs: &Runs, scheduler: &Scheduler) -> String {
    let active = runs.active();
    let mut text = match active.as_slice() {
        [] => "idle".to_owned(),
        running => running
            .iter()
            .map(|r| format!("{} {}", r.kind, r.job.as_deref().or(r.destination.as_deref()).unwrap_or("")))
            .collect::<Vec<_>>()
            .join(", "),
    };
    if let Some((job, at)) = scheduler.next() {
        text.push_str(&format!("; next: {job} at {}", at.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S %Z")));
    }
    one_line(&text)
}

/// Keeps the status line up to date: it wakes with events only.
pub async fn keep_status(
    runs: Arc<Runs>,
    scheduler: Arc<Scheduler>,
    mut events: broadcast::Receiver<keepd_protocol::model::Event>,
    cancel: CancellationToken,
) {
    let mut last = String::new();
    loop {
        let (runs, scheduler) = (runs.clone(), scheduler.clone());
        let text = tokio::task::spawn_blocking(move || status_text(&runs, &scheduler)).await.unwrap_or_default();
        if text != last {
            tell(&[NotifyState::Status(&text)]);
            last = text;
        }
        tokio::select! {
            event = events.recv() => if matches!(event, Err(broadcast::error::RecvError::Closed)) { return },
            () = cancel.cancelled() => return,
        }
        // A burst of events is one change of status; the end of a run is seen when the registry has let go of it.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// Feeds the watchdog as long as the schedule's loop and the ledger answer: if either hangs, systemd restarts keepd.
pub async fn feed_watchdog(scheduler: Arc<Scheduler>, ledger: Arc<Ledger>, cancel: CancellationToken) {
    let Some(interval) = sd_notify::watchdog_enabled() else { return };
    loop {
        let answered = tokio::time::timeout(interval / 2, async {
            let looped = scheduler.ping().await.is_ok();
            let ledger = ledger.clone();
            let kept = tokio::task::spawn_blocking(move || ledger.ping().is_ok()).await.unwrap_or(false);
            looped && kept
        })
        .await;
        match answered {
            Ok(true) => tell(&[NotifyState::Watchdog]),
            _ => tracing::error!("the schedule or the ledger does not answer; the watchdog is not fed"),
        }
        tokio::select! {
            () = tokio::time::sleep(interval / 2) => {}
            () = cancel.cancelled() => return,
        }
    }
}
