//! The watchdog: the service manager hears of us only while everything that could hang still answers.
//!
//! A feeder that ran on its own would go on feeding for a daemon that does nothing else. Ours asks, each time, the daemon's
//! main loop, the scheduler's loop and the ledger and run registry (behind their locks, on a blocking thread); one that does
//! not answer is named in the log, and the service manager is left to its conclusion.

use std::time::Duration;

use futures::future::BoxFuture;

use super::notify::Notifier;

/// Something that must answer: its name, and the question.
pub struct Stage {
    pub name: &'static str,
    pub ask: Box<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>,
}

/// Feeds the watchdog for as long as all stages answer; never ends. `interval` is the service manager's patience.
pub async fn feed(interval: Duration, stages: Vec<Stage>, notifier: Notifier) {
    loop {
        // Two beats, each with its waiting, fit into the interval.
        tokio::time::sleep(interval / 3).await;
        if beat(&stages, interval / 3).await {
            notifier.watchdog();
        }
    }
}

/// Whether all stages answered; each has `patience`.
async fn beat(stages: &[Stage], patience: Duration) -> bool {
    let begun = tokio::time::Instant::now();
    for stage in stages {
        if tokio::time::timeout_at(begun + patience, (stage.ask)()).await.is_err() {
            tracing::error!("{} does not answer for {} s: the watchdog is not fed", stage.name, begun.elapsed().as_secs());
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(answers: bool) -> Stage {
        let ask = move || -> BoxFuture<'static, ()> {
            Box::pin(async move {
                if !answers {
                    std::future::pending::<()>().await;
                }
            })
        };
        Stage { name: "a stage", ask: Box::new(ask) }
    }

    #[tokio::test]
    async fn one_silent_stage_stops_the_feeding() {
        assert!(beat(&[stage(true), stage(true)], Duration::from_secs(5)).await);
        assert!(!beat(&[stage(true), stage(false), stage(true)], Duration::from_millis(20)).await);
    }
}
