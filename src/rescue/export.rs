//! A backup as a tar archive (POSIX.1-2001, with pax headers where they are needed), which every system can read.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use keepd_protocol::model::EntryKind;
use keepd_protocol::restore::EntryHeader;

use super::arguments::{Of, Place};
use super::opened::{self, Opened};
use super::pour::{Sink, pour};
use super::{Exit, Failure, Result, print_json, render, tell_some};
use crate::portable::member;

/// Writes what is selected of a backup to a new file, or to standard output.
pub fn export(place: &Place, of: &Of, output: &Path, paths: &[OsString]) -> Result<Exit> {
    let to_stdout = output == Path::new("-");
    if to_stdout && place.json {
        return Err(Failure::usage("standard output cannot take the archive and a JSON document; give -o FILE"));
    }
    if to_stdout && io::stdout().is_terminal() {
        return Err(Failure::usage("an archive is nothing for a terminal; give -o FILE, or send it through a pipe"));
    }
    let opened = Opened::open(place)?;
    if !to_stdout {
        opened.may_write(output, "the archive (-o FILE)")?;
    }
    opened.tell_problems();
    let (backup, manifest) = opened.find(of)?;
    let out: Box<dyn Write> = match to_stdout {
        true => Box::new(io::stdout()),
        false => Box::new(File::create_new(output).map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => Failure::failed(format!("{} exists already and is not overwritten", output.display())),
            _ => Failure::failed(format!("cannot make {}: {e}", output.display())),
        })?),
    };
    let bar = opened::bar(place, "exporting", manifest.bytes());
    let mut archive =
        Archive { out: BufWriter::with_capacity(1 << 20, out), scratch: opened.scratch.clone(), open: None, done: 0, bar: &bar };
    let poured = pour(&opened, &manifest, &opened::bytes(paths), &mut archive).and_then(|poured| {
        archive.zeros(member::END_BYTES)?;
        archive.out.flush()?;
        if !to_stdout {
            File::open(output).and_then(|f| f.sync_all()).map_err(|e| Failure::failed(format!("cannot sync {}: {e}", output.display())))?;
        }
        Ok(poured)
    });
    bar.finish_and_clear();
    let poured = match poured {
        Ok(poured) => poured,
        Err(failure) => {
            // Made just now; half an archive looks like a whole one.
            if !to_stdout {
                let _ = std::fs::remove_file(output);
            }
            return Err(Failure { text: format!("the export is not complete: {}", failure.text), ..failure });
        }
    };
    tell_some("not exported", &poured.hurt);
    if place.json {
        print_json(&serde_json::json!({
            "backup": backup.id, "entries": poured.entries, "bytes": poured.bytes, "not_exported": poured.hurt,
        }))?;
    } else if !place.quiet && !to_stdout {
        let (entries, bytes) = (poured.entries, render::bytes(poured.bytes));
        writeln!(io::stdout(), "exported {entries} entries, {bytes} of backup {} to {}", render::short(&backup.id), output.display())?;
    }
    Ok(if poured.hurt.is_empty() { Exit::Good } else { Exit::Partial })
}

/// Entries as they go into the archive. Contents that come in pieces, in any order, are gathered in an unnamed file first, so that nothing of a
/// file goes in that turns out to be damaged.
struct Archive<'a> {
    out: BufWriter<Box<dyn Write>>,
    scratch: PathBuf,
    open: Option<(EntryHeader, File)>,
    done: u64,
    bar: &'a indicatif::ProgressBar,
}

impl Archive<'_> {
    fn append(&mut self, entry: &EntryHeader, mut contents: impl Read) -> io::Result<()> {
        self.out.write_all(&member::blocks(entry).map_err(io::Error::other)?)?;
        if entry.kind == EntryKind::File {
            let copied = io::copy(&mut contents, &mut self.out)?;
            if copied != entry.size {
                return Err(io::Error::other(format!("{}: {copied} bytes came, and its entry says {}", entry.path.path, entry.size)));
            }
            self.zeros(member::padding(entry.size))?;
        }
        Ok(())
    }

    fn zeros(&mut self, len: u64) -> io::Result<()> {
        io::copy(&mut io::repeat(0).take(len), &mut self.out).map(drop)
    }
}

impl Sink for Archive<'_> {
    fn entry(&mut self, header: &EntryHeader, contents: &[u8]) -> io::Result<()> {
        if header.kind == EntryKind::File && !header.inline {
            let named = |e: io::Error| {
                io::Error::new(e.kind(), format!("a temporary file in {}: {e}; name another with --cache DIR", self.scratch.display()))
            };
            let file = tempfile::tempfile_in(&self.scratch).map_err(named)?;
            // Holes read as zeros.
            file.set_len(header.size).map_err(named)?;
            self.open = Some((header.clone(), file));
            return Ok(());
        }
        self.done += contents.len() as u64;
        self.bar.set_position(self.done);
        self.append(header, contents)
    }

    fn data(&mut self, _: u64, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let Some((header, file)) = &self.open else { return Ok(()) };
        if offset.saturating_add(bytes.len() as u64) > header.size {
            return Err(io::Error::other("contents came beyond a file's end"));
        }
        self.done += bytes.len() as u64;
        self.bar.set_position(self.done);
        file.write_all_at(bytes, offset).map_err(|e| {
            io::Error::new(e.kind(), format!("a temporary file in {}: {e}; name another with --cache DIR", self.scratch.display()))
        })
    }

    fn end(&mut self, _: u64) -> io::Result<()> {
        let Some((header, mut file)) = self.open.take() else { return Ok(()) };
        file.seek(SeekFrom::Start(0))?;
        self.append(&header, file)
    }

    fn lost(&mut self, _: u64) -> io::Result<()> {
        self.open = None;
        Ok(())
    }
}
