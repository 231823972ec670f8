//! Bandwidth: bytes leave and come no faster than the configuration says, evenly.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::config::{Bandwidth, Rates};

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Up,
    Down,
}

/// The limits of one destination, for all who use it together.
#[derive(Debug, Default)]
pub struct Pace {
    limits: Mutex<Bandwidth>,
    /// When what was let through so far will have gone at the limit.
    up: Mutex<Option<Instant>>,
    down: Mutex<Option<Instant>>,
}

/// Bytes let through at a time where there is a limit; less where they would take longer than [`PIECE_TIME`].
const PIECE_BYTES: usize = 256 << 10;
const PIECE_TIME: Duration = Duration::from_millis(100);

impl Pace {
    pub fn set(&self, limits: &Bandwidth) {
        let mut held = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        if *held != *limits {
            *held = limits.clone();
        }
    }

    fn rate(&self, way: Way) -> Option<u64> {
        let limits = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        let Rates { up, down } = match limits.hours.is_empty() {
            true => limits.rates,
            false => limits.at(jiff::Zoned::now().time()),
        };
        if way == Way::Up { up } else { down }
    }

    /// How many bytes of `len` to pass on in one go.
    pub fn piece(&self, way: Way, len: usize) -> usize {
        match self.rate(way) {
            None => len,
            Some(rate) => len.min(PIECE_BYTES).min((rate as f64 * PIECE_TIME.as_secs_f64()) as usize).max(1),
        }
    }

    /// How long to wait before `len` more bytes may go; they are counted as gone.
    pub fn take(&self, way: Way, len: usize) -> Duration {
        let Some(rate) = self.rate(way) else { return Duration::ZERO };
        let mut free_at = if way == Way::Up { &self.up } else { &self.down }.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        // What was not used in time is lost: a pause is followed by no burst.
        let start = free_at.unwrap_or(now).max(now);
        *free_at = start.checked_add(Duration::from_secs_f64(len as f64 / rate.max(1) as f64));
        start - now
    }

    /// [`Pace::take`], waited for. For threads.
    pub fn wait(&self, way: Way, len: usize) {
        let wait = self.take(way, len);
        if !wait.is_zero() {
            std::thread::sleep(wait);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Hours;

    #[test]
    fn many_together_get_the_limit_and_no_more() {
        let pace = Pace::default();
        pace.set(&Bandwidth { rates: Rates { up: Some(1 << 20), down: None }, hours: Vec::new() });
        assert_eq!(pace.piece(Way::Up, 1 << 20), (1 << 20) / 10);
        assert_eq!(pace.piece(Way::Down, 1 << 20), 1 << 20);
        let waits: Vec<Duration> = (0..5).map(|_| pace.take(Way::Up, 1 << 20)).collect();
        // The first goes at once, each other one after those before it.
        for (n, wait) in waits.iter().enumerate() {
            assert!((wait.as_secs_f64() - n as f64).abs() < 0.1, "{waits:?}");
        }
        assert_eq!(pace.take(Way::Down, 1 << 30), Duration::ZERO);
    }

    #[test]
    fn hours_may_go_beyond_midnight() {
        let time = |h, m| jiff::civil::time(h, m, 0, 0);
        let slow = Rates { up: Some(2), down: Some(2) };
        let day = Hours { from: time(8, 0), to: time(18, 0), rates: slow };
        let night = Hours { from: time(22, 0), to: time(6, 0), rates: Rates { up: Some(3), down: None } };
        let limits = Bandwidth { rates: Rates { up: Some(1), down: None }, hours: vec![day, night] };
        let up = |h, m| limits.at(time(h, m)).up;
        assert_eq!(
            [up(7, 59), up(8, 0), up(17, 59), up(18, 0), up(22, 0), up(0, 0), up(5, 59), up(6, 0)],
            [1, 2, 2, 1, 3, 3, 3, 1].map(Some)
        );
    }
}
