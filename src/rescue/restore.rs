//! A backup written to a directory.

use std::ffi::OsString;
use std::io::{self, BufWriter, PipeWriter, Write};
use std::path::Path;

use keepd_protocol::restore::{EntryHeader, FrameWriter, Summary};
use keepd_writer::{Options, RestoreError};

use super::arguments::{Of, Place};
use super::opened::{self, Opened};
use super::pour::{Poured, Sink, pour};
use super::{Exit, Failure, Result, print_json, render, tell, tell_some};
use crate::repository::Manifest;

/// Writes what is selected of a backup beneath `to`.
pub fn restore(place: &Place, of: &Of, to: &Path, paths: &[OsString], options: Options) -> Result<Exit> {
    let opened = Opened::open(place)?;
    opened.may_write(to, "what is restored (--to DIR)")?;
    opened.tell_problems();
    let (backup, manifest) = opened.find(of)?;
    let bar = opened::bar(place, "restoring", manifest.bytes());
    let restored = write(&opened, &manifest, &opened::bytes(paths), to, options, &|bytes| bar.set_position(bytes));
    bar.finish_and_clear();
    let (mut poured, mut written) = match restored {
        Ok(done) => done,
        Err(failure) => {
            return Err(Failure { text: format!("the restore to {} is not complete: {}", to.display(), failure.text), ..failure });
        }
    };
    poured.hurt.append(&mut written.lost);
    tell_some("not restored", &poured.hurt);
    written.warnings.iter().for_each(|warning| tell(&format!("warning: {warning}")));
    if written.warnings_total > written.warnings.len() as u64 {
        tell(&format!("({} more warnings)", written.warnings_total - written.warnings.len() as u64));
    }
    if place.json {
        print_json(&serde_json::json!({
            "backup": backup.id, "entries": written.entries, "bytes": written.bytes, "not_restored": poured.hurt, "warnings": written.warnings_total,
        }))?;
    } else if !place.quiet {
        let (entries, bytes) = (written.entries, render::bytes(written.bytes));
        writeln!(io::stdout(), "restored {entries} entries, {bytes} of backup {} to {}", render::short(&backup.id), to.display())?;
        if !poured.hurt.is_empty() {
            writeln!(io::stdout(), "{} could not be restored and are not there", poured.hurt.len())?;
        }
    }
    Ok(if poured.hurt.is_empty() && written.warnings_total == 0 { Exit::Good } else { Exit::Partial })
}

/// Pours into the writer of restores.
pub(super) fn write(
    opened: &Opened,
    manifest: &Manifest,
    paths: &[Vec<u8>],
    to: &Path,
    options: Options,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(Poured, keepd_writer::Outcome)> {
    let (input, out) = io::pipe().map_err(|e| Failure::failed(format!("cannot make a pipe: {e}")))?;
    std::thread::scope(|scope| {
        let writer = std::thread::Builder::new()
            .name("write".into())
            .spawn_scoped(scope, move || keepd_writer::write_what_can_be(input, to, options, &|_, bytes| progress(bytes)));
        let writer = writer.map_err(|e| Failure::failed(format!("cannot start a thread: {e}")))?;
        let mut frames = Frames { out: FrameWriter::new(BufWriter::with_capacity(256 << 10, out)), sent: Summary::default() };
        let poured = pour(opened, manifest, paths, &mut frames);
        let sent = match &poured {
            Ok(_) => frames.out.finish(&frames.sent).map(drop),
            Err(failure) => frames.out.error(&failure.text),
        };
        let written = writer.join().unwrap_or_else(|_| Err(RestoreError("the writer panicked".into())));
        match (poured, written, sent) {
            // When the writer gave up, that is why nothing more could be sent.
            (_, Err(RestoreError(text)), _) => Err(Failure::failed(text)),
            (Err(failure), Ok(_), _) => Err(failure),
            (Ok(_), Ok(_), Err(e)) => Err(Failure::failed(format!("the stream to the writer broke: {e}"))),
            (Ok(poured), Ok(written), Ok(())) => Ok((poured, written)),
        }
    })
}

struct Frames {
    out: FrameWriter<BufWriter<PipeWriter>>,
    sent: Summary,
}

impl Sink for Frames {
    fn entry(&mut self, header: &EntryHeader, contents: &[u8]) -> io::Result<()> {
        self.sent.entries += 1;
        self.sent.bytes += contents.len() as u64;
        self.out.entry(header, contents)
    }

    fn data(&mut self, entry: u64, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.sent.bytes += bytes.len() as u64;
        self.out.data(entry, offset, bytes)
    }

    fn end(&mut self, entry: u64) -> io::Result<()> {
        self.out.end(entry)
    }

    fn lost(&mut self, entry: u64) -> io::Result<()> {
        self.out.lost(entry)
    }
}
