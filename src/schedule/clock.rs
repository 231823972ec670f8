//! The clock of the schedule: the system's, or one that tests move.

use std::pin::Pin;
use std::time::Duration;

use jiff::Timestamp;

/// Tells the time and waits for it.
pub trait Clock: Send + Sync {
    fn now(&self) -> Timestamp;

    /// Returns at `until` by the wall clock, or earlier: the caller looks at the time again. A clock that was set forward
    /// or back, or a suspended machine, makes it return early, never late by more than a minute.
    fn sleep_until(&self, until: Option<Timestamp>) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// The system's clock.
pub struct SystemClock;

/// A jump of the wall clock is noticed at the latest after this.
const LONGEST: Duration = Duration::from_secs(60);

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn sleep_until(&self, until: Option<Timestamp>) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async move {
            match until {
                // Nothing is due: only a change of the configuration can alter that.
                None => std::future::pending().await,
                Some(until) => {
                    let left = until.duration_since(self.now());
                    let left = Duration::try_from(left).unwrap_or_default();
                    tokio::time::sleep(left.min(LONGEST)).await;
                }
            }
        })
    }
}
