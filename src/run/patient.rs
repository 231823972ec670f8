//! A client's descriptors, used without ever hanging on them: a client that does nothing is given up, a cancel ends the wait.

use std::fs::File;
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use tokio_util::sync::CancellationToken;

use super::live::Failure;

/// A client that takes nothing for so long is given up.
pub(super) const PATIENCE: Duration = Duration::from_secs(600);
/// So much of a regular file is written before the kernel is told to bring it to the disk, in bytes.
const SENT_BYTES: u64 = 8 << 20;

/// Writes to a client's descriptor without ever hanging on it: a client that takes nothing is given up, a cancel ends it.
pub(super) struct PatientWriter {
    file: File,
    /// Of a regular file: bytes written, and how many of them are on their way to the disk.
    written: Option<(u64, u64)>,
    patience: Duration,
    cancel: CancellationToken,
}

impl PatientWriter {
    pub(super) fn new(fd: OwnedFd, patience: Duration, cancel: CancellationToken) -> Result<Self, Failure> {
        let failed = |e: rustix::io::Errno| Failure::Failed(format!("cannot use the client's descriptor: {e}"));
        // A larger pipe saves wake-ups; not getting one is fine.
        let _ = rustix::pipe::fcntl_setpipe_size(&fd, 1 << 20);
        let file = File::from(not_waiting(fd, OFlags::WRONLY).map_err(failed)?);
        let written = file.metadata().is_ok_and(|m| m.is_file()).then_some((0, 0));
        Ok(Self { file, written, patience, cancel })
    }
}

impl PatientWriter {
    /// Has the kernel begin to write, so that not all of it is left for the sync at the end. Only a hint: what comes of it does not matter.
    fn send_on(&mut self, n: u64) {
        let Some((written, sent)) = &mut self.written else { return };
        *written += n;
        if *written - *sent >= SENT_BYTES {
            let _ = rustix::fs::fadvise(&self.file, *sent, NonZeroU64::new(*written - *sent), rustix::fs::Advice::DontNeed);
            *sent = *written;
        }
    }
}

impl Write for PatientWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let since = Instant::now();
        loop {
            match self.file.write(bytes) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Ok(n) => {
                    self.send_on(n as u64);
                    return Ok(n);
                }
                other => return other,
            }
            let _ = wait_for(&self.file, PollFlags::OUT, since, self.patience, &self.cancel)?;
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a client passed, so that it does not wait. Whoever passed it shares the flags of that descriptor and could take this one back: a pipe that may be opened
/// anew, to read or to write as `access` says, has flags of its own.
pub(super) fn not_waiting(passed: OwnedFd, access: OFlags) -> rustix::io::Result<OwnedFd> {
    // Only a pipe has a size; a file opened anew would be written from its start.
    if rustix::pipe::fcntl_getpipe_size(&passed).is_ok() {
        let again = format!("/proc/self/fd/{}", passed.as_raw_fd());
        if let Ok(own) = rustix::fs::open(again, access | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()) {
            return Ok(own);
        }
    }
    let flags = rustix::fs::fcntl_getfl(&passed)?;
    rustix::fs::fcntl_setfl(&passed, flags | OFlags::NONBLOCK)?;
    Ok(passed)
}

/// Waits a little until a descriptor is ready, and tells whether it is; an error when it was cancelled meanwhile, or took longer than is to be borne.
pub(super) fn wait_for(file: &File, what: PollFlags, since: Instant, patience: Duration, cancel: &CancellationToken) -> io::Result<bool> {
    if cancel.is_cancelled() {
        return Err(io::Error::other("cancelled"));
    }
    if since.elapsed() > patience {
        return Err(io::Error::other(format!("it took nothing for {} s", patience.as_secs())));
    }
    let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
    match poll(&mut [PollFd::new(file, what)], Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
