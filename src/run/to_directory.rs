//! A restore into a directory that the daemon writes itself: for drills, and for what is put in place.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use keepd_protocol::model::Level;
use keepd_writer::{Memory, Options, Outcome, RestoreError};

use super::live::{Failure, LiveRun};
use super::outlet::{RestoreOut, SharedMemory};
use super::restore::{self, Another, Place};

/// Writes what is selected beneath `to` (made when it is not there), as `<source>/<path>` each; on the disk when it returns.
/// `paths` are `<source>[/<path>]`, none means all. What could not be set (an owner, an attribute) is told as warnings.
pub fn write(place: Place, another: Another<'_>, paths: &[Vec<u8>], to: &Path, live: &LiveRun) -> Result<Outcome, Failure> {
    write_with(place, another, paths, None, live, |input, options| keepd_writer::write(input, to, options, &|_, _| {}))
}

/// The same into an open directory, and for exactly those entries of one source whose own paths are in `only`, the directories above them among
/// them.
pub fn write_only(
    place: Place,
    another: Another<'_>,
    paths: &[Vec<u8>],
    only: Option<&HashSet<Vec<u8>>>,
    to: OwnedFd,
    live: &LiveRun,
) -> Result<Outcome, Failure> {
    write_with(place, another, paths, only, live, |input, options| keepd_writer::write_beneath(input, to, options, &|_, _| {}))
}

fn write_with(
    place: Place,
    another: Another<'_>,
    paths: &[Vec<u8>],
    only: Option<&HashSet<Vec<u8>>>,
    live: &LiveRun,
    write: impl FnOnce(io::PipeReader, Options) -> Result<Outcome, RestoreError> + Send,
) -> Result<Outcome, Failure> {
    let (input, out) = io::pipe().map_err(|e| Failure::Failed(format!("cannot make a pipe: {e}")))?;
    let written = std::thread::scope(|scope| {
        // Where the system has no memory to lend, the pipe does.
        let (memory, offer) = Memory::offer().ok().unzip();
        let shared = offer.map(|offer| SharedMemory::new(offer.memory, offer.returned)).transpose().map_err(Failure::Failed)?;
        let writer = std::thread::Builder::new().name("write".into()).spawn_scoped(scope, move || {
            let options = Options { overwrite: false, numeric_owner: false, memory };
            write(input, options)
        });
        let writer = writer.map_err(|e| Failure::Failed(format!("cannot start a thread: {e}")))?;
        let sent = restore::stream(place, another, paths, only, RestoreOut { frames: out.into(), memory: shared }, live);
        let written = writer.join().unwrap_or_else(|_| Err(RestoreError("the writer panicked".into())));
        match (sent, written) {
            (_, _) if live.cancel.is_cancelled() => Err(Failure::Cancelled),
            // When the writer gave up, that is why nothing more could be sent.
            (Err(sent), Err(RestoreError(text))) => Err(if text == sent.to_string() { sent } else { Failure::Failed(text) }),
            (Ok(_), Err(RestoreError(text))) => Err(Failure::Failed(text)),
            (Err(sent), Ok(_)) => Err(sent),
            (Ok(_), Ok(outcome)) => Ok(outcome),
        }
    })?;
    for warning in &written.warnings {
        live.message(Level::Warning, warning.clone());
    }
    Ok(written)
}
