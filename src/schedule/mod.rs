//! When a job is due, and the loop that starts it.
//!
//! `due` is pure; `state` turns what the ledger knows and what time it is into the next start; `scheduler` waits and
//! starts. `docs/schedule.md` says how daylight saving, missed runs and moved clocks are treated.

mod clock;
pub mod due;
mod scheduler;
mod state;
#[cfg(test)]
mod two_years;

pub use clock::{Clock, SystemClock};
pub use scheduler::{Scheduler, Starter};
