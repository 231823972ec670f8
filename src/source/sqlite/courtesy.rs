//! While an application writes to the database that is being captured, a processor is left to it.
//!
//! A commit goes through several hands (the application, the file system's journal, the disk's interrupt), and on a kernel that
//! preempts only at its ticks (the default of servers) each of them waits up to a tick of 4 ms behind threads that compute without
//! pause, whatever their priority. Measured on two processors: a writer that syncs each commit saw a p99 of 8 ms while all
//! processors were busy with a capture, 0.4 ms while one was left to it. It costs the capture its share of that processor; so a
//! writer that fills its log faster than any disk syncs commits gets none: it waits for nothing but its own next checkpoint, which is
//! the longer the longer the capture takes.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity};

/// Between looks at the write-ahead log.
const EVERY: Duration = Duration::from_millis(20);
/// It must have been written to between so many looks in a row: one transaction now and then gains nothing.
const IN_A_ROW: u32 = 3;
/// A log that grew faster, in bytes a second, is not synced at each commit.
const UNSYNCED: f64 = 64e6;

/// Looks at the write-ahead log while pages are read.
pub struct Courtesy {
    wal: PathBuf,
    looked: Instant,
    /// When it was written to last, and how long it was.
    seen: Option<(SystemTime, u64)>,
    in_a_row: u32,
    left: Option<Left>,
}

impl Courtesy {
    pub fn new(wal: &Path) -> Self {
        Self { wal: wal.to_owned(), looked: Instant::now(), seen: None, in_a_row: 0, left: None }
    }

    /// To be called often.
    pub fn look(&mut self) {
        if self.left.is_some() || self.looked.elapsed() < EVERY {
            return;
        }
        let elapsed = self.looked.elapsed().as_secs_f64();
        self.looked = Instant::now();
        let now = self.wal.symlink_metadata().and_then(|stat| Ok((stat.modified()?, stat.len()))).ok();
        let changed = match (self.seen, now) {
            (Some(before), Some(now)) => before.0 != now.0 && (now.1.saturating_sub(before.1) as f64) < UNSYNCED * elapsed,
            _ => false,
        };
        self.seen = now;
        self.in_a_row = if changed { self.in_a_row + 1 } else { 0 };
        if self.in_a_row >= IN_A_ROW {
            self.left = Some(Left::begin());
        }
    }
}

/// How many captures leave a processor now, and where the process' threads may run else.
static LEAVING: Mutex<(usize, Option<CpuSet>)> = Mutex::new((0, None));

/// While it lives, all threads of this process keep off one of the processors they may run on (unless it is the only one).
struct Left;

impl Left {
    fn begin() -> Self {
        let mut leaving = LEAVING.lock().unwrap_or_else(PoisonError::into_inner);
        leaving.0 += 1;
        if leaving.0 == 1
            && let Ok(all) = sched_getaffinity(None)
            && all.count() > 1
        {
            let mut fewer = all;
            if let Some(first) = (0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu)) {
                fewer.unset(first);
            }
            leaving.1 = Some(all);
            run_on(&fewer);
        }
        Self
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        let mut leaving = LEAVING.lock().unwrap_or_else(PoisonError::into_inner);
        leaving.0 -= 1;
        if leaving.0 == 0
            && let Some(all) = leaving.1.take()
        {
            run_on(&all);
        }
    }
}

/// All threads there are; those that come later inherit from them. It is only a courtesy: what fails is left as it is.
fn run_on(processors: &CpuSet) {
    for task in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let thread = task.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        if let Some(thread) = thread {
            let _ = sched_setaffinity(Some(thread), processors);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_is_left_while_the_log_grows_and_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let wal = dir.path().join("x-wal");
        let before = sched_getaffinity(None).unwrap().count();
        let mut still = Courtesy::new(&wal);
        let mut busy = Courtesy::new(&wal);
        for n in 0..6 {
            std::fs::write(&wal, [n; 10]).unwrap();
            std::thread::sleep(EVERY + Duration::from_millis(5));
            busy.look();
        }
        assert!(busy.left.is_some());
        let fewer = if before > 1 { before - 1 } else { before };
        assert_eq!(sched_getaffinity(None).unwrap().count(), fewer);
        for _ in 0..6 {
            std::thread::sleep(EVERY + Duration::from_millis(5));
            still.look();
        }
        assert!(still.left.is_none(), "nobody writes");
        drop(busy);
        assert_eq!(sched_getaffinity(None).unwrap().count(), before);
    }
}
