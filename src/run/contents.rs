//! One file's contents in order, into a descriptor: for `cat`, and for what reads a dump.
//!
//! A thread asks for chunks ahead; those used last are kept, for the contents of many generations go to and fro between their chunks.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::bounded;

use super::live::{Failure, Finish, LiveRun};
use super::patient::PatientWriter;
use super::restore::{Another, Broken, Place, find_file, gone, next_place, part, unreadable};
use crate::repository::entry::Extent;
use crate::repository::fetch::{Fetcher, Slot};
use crate::repository::{Entry, RepositoryError, Segment};

/// Pieces on their way from one thread to the other.
const AHEAD: usize = 4096;

enum Piece {
    Zeros(u64),
    Data(Arc<Slot>, Extent),
}

/// Writes a file's contents; a reader that takes nothing for `patience` is given up. When a place fails, another one goes on.
pub fn write(
    mut place: Place,
    another: Another<'_>,
    path: &[u8],
    entry: &Entry,
    (out, patience): (OwnedFd, Duration),
    live: &LiveRun,
) -> Result<Finish, Failure> {
    let mut entry = entry.clone();
    let mut out = io::BufWriter::with_capacity(256 << 10, PatientWriter::new(out, patience, live.cancel.clone())?);
    let mut done = 0;
    loop {
        match write_from(&place, &entry, &mut done, &mut out, live) {
            Ok(()) => break,
            Err(Broken::End(failure)) => return Err(failure),
            Err(Broken::Place(e)) => {
                if !next_place(&mut place, another, &e, live) {
                    return Err(unreadable(e));
                }
                let found = find_file(&place.repository, &place.manifest, path)?;
                if found.content.segments.len() != entry.content.segments.len() {
                    return Err(unreadable(e));
                }
                entry = found;
            }
        }
    }
    out.flush().map_err(|e| gone(&live.cancel, &e))?;
    live.report.entry();
    Ok(Finish::Good)
}

/// Goes on after so many segments as are done.
fn write_from(place: &Place, entry: &Entry, done: &mut usize, out: &mut impl Write, live: &LiveRun) -> Result<(), Broken> {
    let cancel = live.cancel.child_token();
    let left = entry.content.segments.get(*done..).unwrap_or_default();
    std::thread::scope(|scope| {
        let (pieces, queue) = bounded::<Result<Piece, RepositoryError>>(AHEAD);
        let (repository, for_planner) = (place.repository.clone(), cancel.clone());
        let planner = std::thread::Builder::new().name("plan".into()).spawn_scoped(scope, move || {
            let plan = || -> Result<(), RepositoryError> {
                let mut fetcher = Fetcher::new(repository.clone(), repository.ahead_bytes(), for_planner)?;
                for segment in left {
                    let piece = match segment {
                        Segment::Hole(len) => Piece::Zeros(*len),
                        Segment::Data(extent) => Piece::Data(fetcher.request(extent.chunk)?, *extent),
                    };
                    if pieces.is_full() {
                        // The other side may wait for what is not on its way yet.
                        fetcher.flush();
                    }
                    if pieces.send(Ok(piece)).is_err() {
                        return Ok(());
                    }
                }
                fetcher.flush();
                Ok(())
            };
            if let Err(e) = plan() {
                let _ = pieces.send(Err(e));
            }
        });
        planner.map_err(|e| Broken::End(Failure::Failed(format!("cannot start a thread: {e}"))))?;
        let mut written = Ok(());
        for piece in &queue {
            written = piece.map_err(Broken::from).and_then(|piece| write_piece(piece, out, live));
            if written.is_err() {
                break;
            }
            *done += 1;
        }
        if written.is_err() {
            cancel.cancel();
        }
        drop(queue);
        written
    })
}

fn write_piece(piece: Piece, out: &mut impl Write, live: &LiveRun) -> Result<(), Broken> {
    const ZEROS: [u8; 4096] = [0; 4096];
    if live.cancel.is_cancelled() {
        return Err(Broken::End(Failure::Cancelled));
    }
    let io = |e: io::Error| Broken::End(gone(&live.cancel, &e));
    match piece {
        Piece::Zeros(len) => {
            let mut left = len;
            while left > 0 {
                let n = left.min(ZEROS.len() as u64);
                out.write_all(ZEROS.get(..n as usize).unwrap_or_default()).map_err(io)?;
                left -= n;
            }
            live.report.bytes(len);
        }
        Piece::Data(slot, extent) => {
            out.write_all(part(&slot.wait()?, &extent).map_err(Broken::End)?).map_err(io)?;
            live.report.bytes(u64::from(extent.len));
        }
    }
    Ok(())
}
