//! A backup as a tar archive (POSIX.1-2001, with pax headers where they are needed), which every system can read.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use data_encoding::BASE64;
use keepd_protocol::model::EntryKind;
use keepd_protocol::restore::EntryHeader;
use tar::{Builder, EntryType, Header};

use super::arguments::{Of, Place};
use super::opened::{self, Opened};
use super::pour::{Sink, pour};
use super::{Exit, Failure, Result, print_json, render, tell_some};

/// Longer names stand in a pax header.
const NAME_BYTES: usize = 100;

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
    let mut archive = Archive {
        out: Builder::new(BufWriter::with_capacity(1 << 20, out)),
        scratch: opened.scratch.clone(),
        open: None,
        done: 0,
        bar: &bar,
    };
    let poured = pour(&opened, &manifest, &opened::bytes(paths), &mut archive).and_then(|poured| {
        let mut out = archive.out.into_inner()?;
        out.flush()?;
        drop(out);
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
    out: Builder<BufWriter<Box<dyn Write>>>,
    scratch: PathBuf,
    open: Option<(EntryHeader, File)>,
    done: u64,
    bar: &'a indicatif::ProgressBar,
}

impl Archive<'_> {
    fn append(&mut self, entry: &EntryHeader, contents: impl Read) -> io::Result<()> {
        let mut path = entry.path.to_bytes().map_err(io::Error::other)?;
        if entry.kind == EntryKind::Directory {
            path.push(b'/');
        }
        let target = entry.target.as_ref().map(|t| t.to_bytes()).transpose().map_err(io::Error::other)?.unwrap_or_default();
        let mut header = Header::new_ustar();
        header.set_entry_type(match entry.kind {
            EntryKind::File => EntryType::Regular,
            EntryKind::Directory => EntryType::Directory,
            EntryKind::Symlink => EntryType::Symlink,
            EntryKind::Hardlink => EntryType::Link,
        });
        header.set_mode(entry.mode & 0o7777);
        header.set_uid(entry.uid.into());
        header.set_gid(entry.gid.into());
        header.set_size(if entry.kind == EntryKind::File { entry.size } else { 0 });
        header.set_mtime(u64::try_from(entry.mtime_seconds).unwrap_or(0));
        // Too long a name is left out, the number is there.
        let _ = entry.user.as_deref().map(|name| header.set_username(name));
        let _ = entry.group.as_deref().map(|name| header.set_groupname(name));
        let mut records: Vec<(String, Vec<u8>)> = Vec::new();
        let mut name = |field: &mut [u8; NAME_BYTES], key: &str, value: &[u8]| {
            for (to, from) in field.iter_mut().zip(value) {
                *to = *from;
            }
            if value.len() > NAME_BYTES || !value.is_ascii() {
                records.push((key.to_owned(), value.to_vec()));
            }
        };
        name(&mut header.as_old_mut().name, "path", &path);
        name(&mut header.as_old_mut().linkname, "linkpath", &target);
        if entry.mtime_nanoseconds > 0 || entry.mtime_seconds < 0 {
            records.push(("mtime".into(), decimal(entry.mtime_seconds, entry.mtime_nanoseconds).into_bytes()));
        }
        for (name, value) in &entry.xattrs {
            let (Some(name), Ok(value)) = (name.to_bytes().ok().and_then(|n| String::from_utf8(n).ok()), BASE64.decode(value.as_bytes()))
            else {
                continue;
            };
            records.push((format!("SCHILY.xattr.{name}"), value));
        }
        header.set_cksum();
        if !records.is_empty() {
            self.out.append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), value.as_slice())))?;
        }
        self.out.append(&header, contents)
    }
}

/// Seconds with their fraction, also before 1970.
fn decimal(seconds: i64, nanoseconds: u32) -> String {
    let total = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    let sign = if total < 0 { "-" } else { "" };
    format!("{sign}{}.{:09}", total.unsigned_abs() / 1_000_000_000, total.unsigned_abs() % 1_000_000_000)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_have_their_sign_once() {
        assert_eq!(decimal(5, 25), "5.000000025");
        assert_eq!(decimal(-1, 750_000_000), "-0.250000000");
        assert_eq!(decimal(-2, 0), "-2.000000000");
    }
}
