//! When nothing was done for a while, the daemon lets go of the pages of its program that it does not need to wait.

use std::time::Duration;

use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

/// What comes soon after something else finds them there.
const QUIET: Duration = Duration::from_secs(10);

/// After each time that something happened, and at the start, lets go once and sleeps on.
pub async fn follow<E: Clone>(mut events: Receiver<E>) {
    loop {
        while let Ok(event) = tokio::time::timeout(QUIET, events.recv()).await {
            if matches!(event, Err(RecvError::Closed)) {
                return;
            }
        }
        let _ = tokio::task::spawn_blocking(crate::run::memory::let_go_of_program).await;
        if matches!(events.recv().await, Err(RecvError::Closed)) {
            return;
        }
    }
}
