//! The entries of a source and their contents, from the archive into the repository: large runs of zeros become holes.

use std::collections::{BTreeSet, HashSet};

use keepd_protocol::model::EntryKind;
use keepd_protocol::restore::EntryHeader;

use super::chosen::{Path, Wanted, lossy, split, takes};
use super::work::{Work, failed};
use crate::archive::{entries, parts};
use crate::portable::head::{Source, Totals};
use crate::repository::entry::{EntrySink, SMALL_FILE_BYTES};
use crate::repository::source_writer::SourceWriter;
use crate::repository::{Entry, Kind};
use crate::run::live::Failure;

/// Zeros of this length, at a multiple of it, become a hole.
const HOLE: usize = 64 << 10;
/// Names that an error lists.
const NAMED: usize = 20;

/// An entry as the repository has it, without its contents.
pub fn entry(header: &EntryHeader, below: &[u8]) -> Result<Entry, Failure> {
    entries::entry(header, below).map_err(|text| failed(format!("the archive is not imported: {}: {text}", header.path.path)))
}

impl Work<'_> {
    /// The entries of one source, the next of the archive. Without a sink they are read and proven alone; without paths they are not counted either.
    pub fn source(
        &mut self,
        source: &Source,
        mut sink: Option<&mut SourceWriter<'_>>,
        mut paths: Option<&mut Vec<Path>>,
    ) -> Result<(), Failure> {
        let mut tops: BTreeSet<String> = BTreeSet::new();
        let mut links: HashSet<Vec<u8>> = HashSet::new();
        let chosen = paths.as_ref().is_some_and(|p| !p.iter().any(|p| p.below.is_empty()));
        // A source that is one file shows as a directory with that file in it; it is pushed when something else follows.
        let mut root: Option<Entry> = None;
        let mut next = self.next_of(source)?;
        while let Some(header) = next {
            let path = header.path.to_bytes().map_err(failed)?;
            let (_, below) = split(&path);
            if chosen && tops.len() < NAMED && !below.is_empty() && !below.contains(&b'/') {
                tops.insert(lossy(below));
            }
            let wanted = paths.as_deref_mut().is_some_and(|paths| takes(paths, below, header.kind));
            if !wanted {
                if chosen && header.kind == EntryKind::File {
                    links.insert(below.to_vec());
                }
                next = self.next_of(source)?;
                continue;
            }
            let mut entry = entry(&header, below)?;
            if entry.kind == Kind::Hardlink {
                entry.target = split(&entry.target).1.to_vec();
                if links.contains(&entry.target) {
                    let (name, path) = (&source.name, lossy(&entry.target));
                    return Err(failed(format!(
                        "'{name}/{}' is another name of '{name}/{path}', which is not chosen; choose it, too",
                        lossy(below)
                    )));
                }
            }
            self.count(&header);
            if below.is_empty() && entry.kind == Kind::Directory {
                root = Some(entry);
                next = self.next_of(source)?;
                continue;
            }
            let Some(sink) = sink.as_deref_mut() else {
                self.read_past()?;
                next = self.next_of(source)?;
                continue;
            };
            let may_be_alone = source.is_one_file() && root.is_some() && entry.kind == Kind::File && below == source.file_name();
            if !may_be_alone && let Some(root) = root.take() {
                sink.push(root)?;
            }
            if entry.kind != Kind::File {
                sink.push(entry)?;
                next = self.next_of(source)?;
                continue;
            }
            let small = self.contents(sink, header.size)?;
            next = self.next_of(source)?;
            // Contents whose length was not known when they were captured stand in parts.
            if let (None, Some((file, 0))) = (&small, parts::part_of(&source.kind, below)) {
                entry.path = file.to_vec();
                let mut number = 1;
                while let Some(part) = next.take_if(|next| is_part(source, next, file, number)) {
                    self.count(&part);
                    self.more(sink, part.size)?;
                    next = self.next_of(source)?;
                    number += 1;
                }
            }
            if let Some(root) = root.take() {
                if next.is_none() && entries::is_made_up(&root, &entry) {
                    entry.path.clear();
                    self.counts.entries -= 1;
                    self.counts.directories -= 1;
                } else {
                    sink.push(root)?;
                }
            }
            match small {
                Some(contents) => sink.push_small(entry, &contents)?,
                None => sink.large_finish(entry)?,
            }
        }
        if let (Some(root), Some(sink)) = (root, sink) {
            sink.push(root)?;
        }
        if let Some(paths) = paths
            && let Some(missing) = paths.iter().find(|p| !p.found)
        {
            let names = tops.into_iter().collect::<Vec<_>>().join(", ");
            let path = lossy(&missing.below);
            return Err(failed(format!("the archive has no '{}/{path}'; source {} has {names}", source.name, source.name)));
        }
        Ok(())
    }

    /// The next entry, if it is of this source.
    fn next_of(&mut self, source: &Source) -> Result<Option<EntryHeader>, Failure> {
        if self.ahead.is_none() {
            self.ahead = self.next_entry()?;
        }
        let is_of = |header: &EntryHeader| header.path.to_bytes().is_ok_and(|path| split(&path).0 == source.name.as_bytes());
        Ok(self.ahead.take_if(|header| is_of(header)))
    }

    pub fn count(&mut self, header: &EntryHeader) {
        self.counts.entries += 1;
        match header.kind {
            EntryKind::File => {
                self.counts.files += 1;
                self.counts.bytes += header.size;
            }
            EntryKind::Directory => self.counts.directories += 1,
            _ => {}
        }
        self.live.report.entry();
    }

    /// Reads what is not stored, so that it is proven.
    pub fn read_past(&mut self) -> Result<(), Failure> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut read = || -> Result<(), Failure> {
            loop {
                let n = self.read(&mut buffer)?;
                if n == 0 {
                    return Ok(());
                }
                self.live.report.bytes(n as u64);
            }
        };
        let done = read();
        self.buffer = buffer;
        done
    }

    /// Gives the contents of a file of `size` bytes: a small one's as a whole; those of a large one go to the sink, where they wait for their entry.
    pub fn contents(&mut self, sink: &mut SourceWriter<'_>, size: u64) -> Result<Option<Vec<u8>>, Failure> {
        if size <= SMALL_FILE_BYTES {
            let mut contents = vec![0; size as usize];
            let mut len = 0;
            loop {
                let space = contents.get_mut(len..).unwrap_or_default();
                let mut end = [0];
                let n = if space.is_empty() { self.read(&mut end)? } else { self.read(space)? };
                if n == 0 {
                    break;
                }
                len += n;
            }
            self.live.report.bytes(len as u64);
            return if len as u64 == size { Ok(Some(contents)) } else { Err(lying()) };
        }
        sink.large_begin()?;
        self.more(sink, size)?;
        Ok(None)
    }

    /// The next `size` bytes of a large file.
    fn more(&mut self, sink: &mut SourceWriter<'_>, size: u64) -> Result<(), Failure> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let done = self.large(sink, size, &mut buffer);
        self.buffer = buffer;
        done
    }

    fn large(&mut self, sink: &mut SourceWriter<'_>, size: u64, buffer: &mut [u8]) -> Result<(), Failure> {
        static ZEROS: [u8; HOLE] = [0; HOLE];
        let (mut hole, mut done) = (0u64, 0u64);
        loop {
            // What is a frame of its own in the archive becomes a chunk of its own.
            while let Some((contents, frame)) = self.frame()? {
                if contents.iter().all(|b| *b == 0) {
                    hole += contents.len() as u64;
                } else {
                    if hole > 0 {
                        sink.large_hole(std::mem::take(&mut hole))?;
                    }
                    sink.large_frame(&contents, &frame)?;
                }
                self.live.report.bytes(contents.len() as u64);
                done += contents.len() as u64;
                self.recycle(contents)?;
            }
            let mut len = 0;
            while let Some(space) = buffer.get_mut(len..).filter(|space| !space.is_empty()) {
                let n = self.read(space)?;
                if n == 0 {
                    break;
                }
                len += n;
            }
            for block in buffer.get(..len).unwrap_or_default().chunks(HOLE) {
                // The rest of a hole at the end belongs to it.
                let zeros = (block.len() == HOLE || hole > 0) && ZEROS.get(..block.len()) == Some(block);
                if zeros {
                    hole += block.len() as u64;
                    continue;
                }
                if hole > 0 {
                    sink.large_hole(std::mem::take(&mut hole))?;
                }
                sink.large_bytes(block)?;
            }
            self.live.report.bytes(len as u64);
            done += len as u64;
            if len < buffer.len() {
                break;
            }
        }
        if hole > 0 {
            sink.large_hole(hole)?;
        }
        if done == size { Ok(()) } else { Err(lying()) }
    }

    pub fn all_found(&mut self, wanted: &Wanted) -> Result<(), Failure> {
        if self.ahead.is_some() || self.next_entry()?.is_some() {
            return Err(failed("the archive is not imported: it has entries of a source that its manifest does not name"));
        }
        match wanted.sources.values().flatten().all(|p| p.found) {
            true => Ok(()),
            false => Err(failed("the archive does not have all that was chosen")),
        }
    }

    /// What was stored is what was proven.
    pub fn is_all(&self, totals: &Totals) -> Result<(), Failure> {
        match totals.bytes == self.counts.bytes && totals.files == self.counts.files {
            true => Ok(()),
            false => Err(failed(format!(
                "the archive has {} files with {} bytes, and {} with {} were imported; this is a bug",
                totals.files, totals.bytes, self.counts.files, self.counts.bytes
            ))),
        }
    }
}

/// Whether an entry is this part of a file.
fn is_part(source: &Source, header: &EntryHeader, file: &[u8], number: u64) -> bool {
    let path = header.path.to_bytes().unwrap_or_default();
    header.kind == EntryKind::File && parts::part_of(&source.kind, split(&path).1) == Some((file, number))
}

fn lying() -> Failure {
    failed("the archive is not imported: a file does not have the size that its header says")
}
