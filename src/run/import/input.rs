//! What was uploaded, as a reader: at most as fast as was asked for, and never longer than the run.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio_util::sync::CancellationToken;

use super::desk::Given;
use crate::config::{Bandwidth, Rates};
use crate::storage::pace::{Pace, Way};

/// A sealed archive begins with it.
pub const SEALED: &[u8; 8] = b"KEEPDENC";
/// Between looks whether the run was cancelled.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// An archive that is read once, from its start.
pub struct Input {
    from: From,
    pace: Option<Pace>,
    cancel: CancellationToken,
    patience: Duration,
    read: Arc<AtomicU64>,
    /// Its first bytes, which were looked at, and how many of them were given out.
    first: Vec<u8>,
    given: usize,
}

enum From {
    File(File, u64),
    Stream(OwnedFd),
}

impl Input {
    /// `bandwidth`: bytes each second. `patience`: so long nothing may come from a pipe. `read` is told how much was read.
    pub fn new(archive: Given, bandwidth: Option<u64>, patience: Duration, cancel: CancellationToken, read: Arc<AtomicU64>) -> Self {
        let pace = bandwidth.map(|rate| {
            let pace = Pace::default();
            pace.set(&Bandwidth { rates: Rates { up: None, down: Some(rate.max(1)) }, hours: Vec::new() });
            pace
        });
        let from = match archive {
            // From its start, wherever whoever passed it along had got to.
            Given::File(file, _) => From::File(file, 0),
            Given::Stream(fd) => From::Stream(fd),
        };
        Self { from, pace, cancel, patience, read, first: Vec::new(), given: 0 }
    }

    /// Whether the archive is sealed, by its first bytes.
    pub fn is_sealed(&mut self) -> io::Result<bool> {
        let mut first = [0; SEALED.len()];
        while self.first.len() < SEALED.len() {
            let space = first.get_mut(self.first.len()..).unwrap_or_default();
            let n = self.read_on(space)?;
            if n == 0 {
                break;
            }
            self.first.extend_from_slice(space.get(..n).unwrap_or_default());
        }
        Ok(self.first == SEALED)
    }

    fn read_on(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = self.pace.as_ref().map_or(into.len(), |pace| pace.piece(Way::Down, into.len()));
        let into = into.get_mut(..most).unwrap_or_default();
        self.is_wanted()?;
        let n = match &mut self.from {
            From::File(file, at) => {
                let n = file.read_at(into, *at)?;
                *at += n as u64;
                n
            }
            From::Stream(fd) => read_stream(fd, into, self.patience, &self.cancel)?,
        };
        if let Some(pace) = &self.pace {
            let until = Instant::now() + pace.take(Way::Down, n);
            while Instant::now() < until {
                self.is_wanted()?;
                std::thread::sleep((until - Instant::now().min(until)).min(Duration::from_millis(100)));
            }
        }
        self.read.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }

    fn is_wanted(&self) -> io::Result<()> {
        if self.cancel.is_cancelled() { Err(io::Error::other("cancelled")) } else { Ok(()) }
    }
}

fn read_stream(fd: &OwnedFd, into: &mut [u8], patience: Duration, cancel: &CancellationToken) -> io::Result<usize> {
    let since = Instant::now();
    loop {
        if cancel.is_cancelled() {
            return Err(io::Error::other("cancelled"));
        }
        let mut asked = [PollFd::new(fd, PollFlags::IN)];
        match poll(&mut asked, Some(&LOOK)) {
            Ok(0) if since.elapsed() >= patience => {
                let text = format!("nothing came for {} s, and the other side has not closed it", patience.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        match rustix::io::read(fd.as_fd(), &mut *into) {
            // Somebody else read it, or the descriptor does not block.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            read => return Ok(read?),
        }
    }
}

impl Read for Input {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let first = self.first.get(self.given..).unwrap_or_default();
        if !first.is_empty() {
            let n = first.len().min(into.len());
            into.get_mut(..n).unwrap_or_default().copy_from_slice(first.get(..n).unwrap_or_default());
            self.given += n;
            return Ok(n);
        }
        if into.is_empty() {
            return Ok(0);
        }
        self.read_on(into)
    }
}
