//! What the daemon does by itself besides backups.
//!
//! The rolling check: where a destination has `check_every`, each of its packs is read once in that time, a few at a time. The cleanup:
//! once a day retention is applied to each job, and what is condemned for long enough is deleted, if there is anything to do. Copies: what a
//! destination lacks is brought there. Drills: where a job has `drill.every`, a backup of it is proven that often. The audit
//! log: once a day what is older than it keeps goes.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{Error, Runs};
use crate::access::By;

/// Parts that a period is divided into; each reads its share.
const PARTS: u32 = 24;
const SHORTEST: Duration = Duration::from_secs(1);
/// Between looks whether a part is due.
const LOOK_EVERY: Duration = Duration::from_secs(3600);

/// Between two parts of a period.
pub fn pause(period: Duration) -> Duration {
    (period / PARTS).max(SHORTEST)
}

/// The share of all packs that a part reads: a little more than its own, so that the last are not late.
pub fn share(period: Duration) -> f64 {
    1.25 / (period.as_secs_f64() / pause(period).as_secs_f64()).max(1.0)
}

/// Between two cleanups of a job. Backups clean up after themselves; this is for rules that count days, and for what was condemned, where
/// no backup comes.
pub const CLEANUP_EVERY: Duration = Duration::from_secs(86_400);

/// Starts what is due, until cancelled.
pub async fn keep_house(runs: Arc<Runs>, cancel: CancellationToken) {
    loop {
        let parts = runs.rolling_checks().into_values().map(pause);
        let wait = parts.chain(runs.drill_periods()).min().unwrap_or(LOOK_EVERY).min(LOOK_EVERY);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = cancel.cancelled() => return,
        }
        for destination in runs.rolling_checks().into_keys() {
            match runs.start_rolling_check(&destination) {
                Ok(_) | Err(Error::Busy(_) | Error::ShuttingDown) => {}
                Err(e) => tracing::warn!(destination, "the rolling check could not be started: {e}"),
            }
        }
        let asked = runs.clone();
        let started = tokio::task::spawn_blocking(move || asked.start_due_cleanups(CLEANUP_EVERY)).await;
        let asked = runs.clone();
        let _ = tokio::task::spawn_blocking(move || asked.start_all_missing_copies(&By::schedule())).await;
        let asked = runs.clone();
        if let Ok(Err(e)) = tokio::task::spawn_blocking(move || asked.retain_audit()).await {
            tracing::warn!("old entries of the audit log could not be removed: {e}");
        }
        let asked = runs.clone();
        match tokio::task::spawn_blocking(move || asked.start_due_drills()).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => tracing::warn!("what is due of drills is not known: {e}"),
            Err(e) => tracing::warn!("what is due of drills is not known: {e}"),
        }
        match started {
            Ok(Ok(()) | Err(Error::Busy(_) | Error::ShuttingDown)) => {}
            Ok(Err(e)) => tracing::warn!("the cleanup could not be started: {e}"),
            Err(e) => tracing::warn!("the cleanup could not be started: {e}"),
        }
    }
}
