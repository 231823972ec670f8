//! A backup poured into something: what is whole goes in, what is not is named.

use std::collections::HashSet;
use std::io;

use keepd_protocol::model::{BytesPath, EntryKind};
use keepd_protocol::restore::EntryHeader;
use tokio_util::sync::CancellationToken;

use super::opened::Opened;
use super::{Failure, Result};
use crate::repository::{Manifest, Repository, RepositoryError};
use crate::run::live::Failure as RunFailure;
use crate::run::readable::{self, Reading};
use crate::run::restore::{Broken, Op, Ops, Wanted, is_bearable, part, with_ops};

/// What a backup is poured into. Entries come in path order, their directories before them.
pub trait Sink {
    /// An entry; with `inline` its whole contents, else those of a file follow.
    fn entry(&mut self, header: &EntryHeader, contents: &[u8]) -> io::Result<()>;
    /// Contents of the file that came last, in any order of offsets.
    fn data(&mut self, entry: u64, offset: u64, bytes: &[u8]) -> io::Result<()>;
    fn end(&mut self, entry: u64) -> io::Result<()>;
    /// The file that came last cannot be had whole: nothing of it is kept.
    fn lost(&mut self, entry: u64) -> io::Result<()>;
}

/// What went in.
#[derive(Debug, Default)]
pub struct Poured {
    pub entries: u64,
    pub bytes: u64,
    /// What could not be read, each with why.
    pub hurt: Vec<String>,
}

/// Pours what is selected of a backup. An error is of the sink, of a storage that does not answer, or of a key that is missing.
pub fn pour(opened: &Opened, manifest: &Manifest, paths: &[Vec<u8>], sink: &mut dyn Sink) -> Result<Poured> {
    let repository = &opened.repository;
    // Before anything is written; what is damaged is told by whoever reads it.
    let wanted = Reading::Contents(paths.to_vec());
    if let Err(RunFailure::NeedsKey(text)) = readable::check(repository, manifest, &wanted, repository.location()) {
        return Err(Failure::failed(text));
    }
    let mut pouring = Pouring {
        repository,
        cancel: &opened.cancel,
        sink,
        done: Poured::default(),
        open: None,
        lost: HashSet::new(),
        links: HashSet::new(),
        last: Vec::new(),
    };
    let wanted = Wanted { paths, only: None, skip: 0, sent: None, is_patient: true, in_order: false, frames: false, repeated: None };
    let ended = with_ops(repository, manifest, &wanted, &opened.cancel, |ops| pouring.all(ops));
    let done = pouring.done;
    match ended {
        Ok(()) => Ok(done),
        Err(Broken::Place(error)) => Err(error.into()),
        Err(Broken::End(failure)) => Err(failure.into()),
    }
}

struct Pouring<'a> {
    repository: &'a Repository,
    cancel: &'a CancellationToken,
    sink: &'a mut dyn Sink,
    done: Poured,
    /// The file whose contents come, unless some of it was lost.
    open: Option<(u64, Vec<u8>)>,
    /// What is not there: the other names of such a file are not either.
    lost: HashSet<Vec<u8>>,
    /// Symlinks: nothing lies behind one, whatever a backup says.
    links: HashSet<Vec<u8>>,
    last: Vec<u8>,
}

impl Pouring<'_> {
    fn all(&mut self, ops: &Ops) -> Result<(), Broken> {
        for op in ops {
            if self.cancel.is_cancelled() {
                return Err(Broken::End(RunFailure::Cancelled));
            }
            self.one(op?)?;
        }
        Ok(())
    }

    fn one(&mut self, op: Op) -> Result<(), Broken> {
        match op {
            Op::Entry(header, parts) => {
                let path = header.path.to_bytes().unwrap_or_default();
                if let Some(why) = self.refusal(&header, &path) {
                    self.hurt(path, why);
                    return Ok(());
                }
                let mut contents = Vec::new();
                for part in parts {
                    if let Err(broken) = part.append_to(&mut contents) {
                        let why = self.bearable(broken)?;
                        self.hurt(path, why);
                        return Ok(());
                    }
                }
                if header.inline && contents.len() as u64 != header.size {
                    self.hurt(path, "its contents are not as long as they should be".into());
                    return Ok(());
                }
                self.sink.entry(&header, &contents).map_err(unwritable)?;
                self.last.clone_from(&path);
                if header.kind == EntryKind::Symlink {
                    self.links.insert(path.clone());
                }
                self.done.entries += 1;
                self.done.bytes += contents.len() as u64;
                self.open = (header.kind == EntryKind::File && !header.inline).then_some((header.index, path));
            }
            Op::Data { entry, offset, slot, extent } => {
                if self.open.as_ref().is_none_or(|(open, _)| *open != entry) {
                    return Ok(());
                }
                let read = slot.wait().map_err(Broken::Place);
                let bytes = read.as_ref().map_err(|_| ()).and_then(|bytes| part(bytes, &extent).map_err(|_| ()));
                match bytes {
                    Ok(bytes) => {
                        self.sink.data(entry, offset, bytes).map_err(unwritable)?;
                        self.done.bytes += bytes.len() as u64;
                    }
                    Err(()) => {
                        let why = match read {
                            Err(broken) => self.bearable(broken)?,
                            Ok(_) => format!("it refers beyond the end of chunk {}", extent.chunk),
                        };
                        self.sink.lost(entry).map_err(unwritable)?;
                        if let Some((_, path)) = self.open.take() {
                            self.hurt(path, why);
                        }
                    }
                }
            }
            Op::End { entry } => {
                if self.open.take_if(|(open, _)| *open == entry).is_some() {
                    self.sink.end(entry).map_err(unwritable)?;
                }
            }
            Op::Hurt { path, text } => {
                self.done.hurt.push(text);
                self.lost.insert(path);
            }
        }
        Ok(())
    }

    /// Why an entry is left out though it can be read.
    fn refusal(&self, header: &EntryHeader, path: &[u8]) -> Option<String> {
        let target = || header.target.as_ref().map(BytesPath::to_bytes).and_then(Result::ok).unwrap_or_default();
        if leads_elsewhere(path) || (header.kind == EntryKind::Hardlink && leads_elsewhere(&target())) {
            return Some("its path leads elsewhere; nobody who means well makes such a backup".into());
        }
        if header.kind == EntryKind::Hardlink && self.lost.contains(&target()) {
            return Some("it is another name of a file that cannot be read".into());
        }
        if self.last == path || self.is_below_none(path) || (header.kind == EntryKind::Hardlink && self.is_below_none(&target())) {
            return Some("what it stands in is no directory; nobody who means well makes such a backup".into());
        }
        None
    }

    /// Whether something above a path is a symlink, or was left out.
    fn is_below_none(&self, path: &[u8]) -> bool {
        let ends = path.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(at, _)| at);
        ends.filter_map(|end| path.get(..end)).any(|above| self.links.contains(above) || self.lost.contains(above))
    }

    /// Why something cannot be read, when the rest may be.
    fn bearable(&self, broken: Broken) -> Result<String, Broken> {
        match broken {
            Broken::Place(error) if is_bearable(&error, self.repository) => Ok(error.to_string()),
            Broken::End(RunFailure::Damaged(text)) => Ok(text),
            Broken::Place(RepositoryError::Cancelled) => Err(Broken::End(RunFailure::Cancelled)),
            other => Err(other),
        }
    }

    fn hurt(&mut self, path: Vec<u8>, why: String) {
        self.done.hurt.push(format!("'{}': {why}", String::from_utf8_lossy(&path)));
        self.lost.insert(path);
    }
}

/// Whether a path names something else than what lies beneath where it is written.
fn leads_elsewhere(path: &[u8]) -> bool {
    path.split(|b| *b == b'/').any(|c| c.is_empty() || c == b"." || c == b".." || c.contains(&0))
}

fn unwritable(error: io::Error) -> Broken {
    Broken::End(RunFailure::Failed(match error.kind() {
        io::ErrorKind::BrokenPipe => "whoever took it went away before the end".into(),
        _ => format!("it cannot be written: {error}"),
    }))
}
