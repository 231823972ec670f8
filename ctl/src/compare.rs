//! `keepctl compare`: what differs now between a backup and what is live.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;

use keepd_protocol::methods::{StartCompare, start_compare};
use keepd_protocol::model::{CompareLine, CompareSummary, Difference, RunState, escape};

use crate::arguments::{Arguments, BackupArgument};
use crate::client::Client;
use crate::commands::{bytes_path, pipe, quiet_end};
use crate::keys::Keys;
use crate::render::{path, short, sign, sizes};
use crate::{Exit, Failure, follow};

/// A longer line is none of keepd's.
const MAX_LINE: u64 = 1 << 20;

/// Prints each difference as it comes, then the counts.
pub fn compare(
    arguments: &Arguments,
    socket: &Path,
    of: &BackupArgument,
    paths: &[OsString],
    deep: bool,
    keys: &Keys,
) -> Result<Exit, Failure> {
    let (reader, writer) = pipe()?;
    let call = start_compare::In {
        backup: of.backup.clone(),
        job: of.job.clone(),
        paths: paths.iter().map(|p| bytes_path(p)).collect(),
        deep,
        private_keys: keys.places(1),
    };
    let started = Client::connect(socket)?.call_writing::<StartCompare>(&call, writer.as_fd(), keys)?;
    drop(writer);
    let guard = follow::interrupt(socket, &started.run)?;
    let mut out = BufWriter::new(io::stdout().lock());
    if arguments.json {
        write!(out, "{{\"backup\": {}, \"differences\": [", serde_json::to_string(&started.backup).map_err(io::Error::from)?)?;
    }
    let mut summary: Option<CompareSummary> = None;
    let mut first = true;
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        if (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        // The last line of a stream that was cut off may be half of one.
        match serde_json::from_slice(&line) {
            Ok(CompareLine::Difference(difference)) if arguments.json => {
                write!(out, "{}\n  ", if first { "" } else { "," })?;
                serde_json::to_writer(&mut out, &difference).map_err(io::Error::from)?;
                first = false;
            }
            Ok(CompareLine::Difference(difference)) => writeln!(out, "{}", shown(&difference))?,
            Ok(CompareLine::Summary(counts)) => summary = Some(counts),
            Err(_) => break,
        }
    }
    drop(reader);
    drop(guard);
    let run = quiet_end(socket, &started.run)?;
    if arguments.json {
        let (summary, run) = (serde_json::to_string(&summary), serde_json::to_string(&run));
        writeln!(out, "\n], \"summary\": {}, \"run\": {}}}", summary.map_err(io::Error::from)?, run.map_err(io::Error::from)?)?;
    } else if let Some(summary) = summary.as_ref().filter(|_| !arguments.quiet) {
        writeln!(out, "{}", told(summary, &short(&started.backup)))?;
    }
    out.flush()?;
    drop(out);
    if summary.is_none() && matches!(run.state, RunState::Good | RunState::Partial) {
        return Err(Failure::failed("the comparison was cut off: its last line did not come"));
    }
    Ok(follow::conclude(arguments, &run))
}

fn shown(d: &Difference) -> String {
    let sign = sign(d.change);
    if let Some(named) = &d.path {
        return format!("{sign} {}{}", path(named), sizes(d.size_before, d.size_after));
    }
    let mut of = escape(&d.source);
    if let Some(database) = &d.database {
        of = format!("{of}/{}", escape(database));
    }
    let Some(table) = &d.table else { return format!("{sign} {of}") };
    let mut notes = Vec::new();
    match (d.rows_before, d.rows_after) {
        (Some(before), Some(after)) if before != after => notes.push(format!("{before} -> {after} rows")),
        (Some(rows), _) | (None, Some(rows)) => notes.push(format!("{rows} rows")),
        (None, None) => {}
    }
    let rows = [(d.rows_added, "added"), (d.rows_removed, "removed"), (d.rows_changed, "changed")];
    notes.extend(rows.iter().filter_map(|(n, what)| n.filter(|n| *n > 0).map(|n| format!("{n} {what}"))));
    if d.schema {
        notes.push("schema".into());
    }
    let notes = if notes.is_empty() { String::new() } else { format!("  ({})", notes.join(", ")) };
    format!("{sign} {of}: {}{notes}", escape(table))
}

fn told(summary: &CompareSummary, backup: &str) -> String {
    let paths = summary.added + summary.removed + summary.modified + summary.metadata;
    let mut text = match (paths, summary.tables) {
        (0, 0) if summary.not_compared.is_empty() => format!("nothing differs from backup {backup}"),
        (0, 0) => format!("of what was compared, nothing differs from backup {backup}"),
        (paths, tables) => format!(
            "{paths} paths ({} added, {} removed, {} modified, {} in metadata only) and {tables} tables differ from backup {backup}",
            summary.added, summary.removed, summary.modified, summary.metadata
        ),
    };
    if summary.excluded > 0 {
        text.push_str(&format!("; {} paths of it are there, but left out by their source now", summary.excluded));
    }
    if !summary.not_compared.is_empty() {
        let names: Vec<String> = summary.not_compared.iter().map(|name| escape(name)).collect();
        text.push_str(&format!("; not compared, or not as a whole: {}", names.join(", ")));
    }
    text
}
