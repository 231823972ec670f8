//! What a program prints, captured as a file: pieces that the last dump had already keep their old extents, the others are gathered into new
//! chunks.
//!
//! In: a program's output as a stream, and the entry of the job's last backup. Out: the contents of one entry. A dump is never staged on disk. It
//! is cut where its contents say so (FastCDC) into pieces far smaller than chunks, of which only the hashes are kept; so a row that was
//! added, changed or moved costs a piece or two, while chunks stay long enough to be compressed well.

mod facts;
mod pieces;

use std::time::Duration;

pub use facts::{Collected, Counted, Table};
pub use pieces::Counts;
use pieces::PieceCutter;

use super::{Context, SourceError};
use crate::process::{Ended, ProcessError, Running};
use crate::repository::{Entry, EntrySink, Kind, Time};

/// Asked for at once.
const READ_BYTES: usize = 1 << 20;

impl From<ProcessError> for SourceError {
    fn from(error: ProcessError) -> Self {
        match error {
            ProcessError::Cancelled => SourceError::Cancelled,
            ProcessError::Failed(text) => SourceError::Failed(text),
        }
    }
}

/// Looks at a dump while it goes by; an error says what is wrong with it.
pub type Watch<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), String>;

/// What a dump became.
pub struct Captured {
    pub entry: Entry,
    pub counts: Counts,
    pub ended: Ended,
}

/// Reads a program's output to its end. The caller judges how it ended, and then pushes the entry.
pub fn capture(
    mut running: Running,
    name: &str,
    patience: Duration,
    before: Option<&Entry>,
    watch: Watch<'_>,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<Captured, SourceError> {
    sink.begins(&file(name), None)?;
    let mut cutter = PieceCutter::begin(name, before, sink, context)?;
    loop {
        let space = cutter.space(READ_BYTES);
        let n = running.read(space, patience, context.cancel)?;
        if n == 0 {
            break;
        }
        if let Err(text) = watch(space.get(..n).unwrap_or_default()) {
            // What the program itself says explains more than what is missing.
            let ended = running.finish(Duration::from_secs(5), context.cancel);
            let said = ended.ok().filter(|e| !e.status.success()).map(|e| format!("; {}", e.told())).unwrap_or_default();
            return Err(SourceError::Failed(format!("the dump is not what it should be: {text}{said}")));
        }
        context.report.bytes(n as u64);
        cutter.filled(n, sink)?;
    }
    let ended = running.finish(patience, context.cancel)?;
    let (content, counts) = cutter.finish(sink, context)?;
    let entry = Entry { size: counts.bytes, content, ..file(name) };
    Ok(Captured { entry, counts, ended })
}

/// A file of its name that belongs to the daemon's user.
pub fn file(name: &str) -> Entry {
    Entry { path: name.as_bytes().to_vec(), kind: Kind::File, mode: 0o600, ..ours() }
}

/// The directory that the files of a source lie in.
pub fn directory() -> Entry {
    Entry { kind: Kind::Directory, mode: 0o700, ..ours() }
}

fn ours() -> Entry {
    let now = jiff::Timestamp::now();
    let time = Time { seconds: now.as_second(), nanoseconds: now.subsec_nanosecond().unsigned_abs() };
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Entry { uid, gid, mtime: time, ctime: time, ..Entry::default() }
}

/// A name that can be a file's: what cannot stand in one is written as `%2F`.
pub fn file_name(name: &str, ending: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        match c {
            '/' | '%' => out.push_str(&format!("%{:02X}", u32::from(c))),
            c if c.is_control() => out.push_str(&format!("%{:02X}", u32::from(c))),
            c => out.push(c),
        }
    }
    format!("{out}.{ending}")
}
