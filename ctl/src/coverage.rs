//! `keepctl coverage`: what on the machine is in no job.

use std::io::{self, Write};
use std::path::Path;

use keepd_protocol::methods::*;
use keepd_protocol::model::{Coverage, CoverageCounts, CoverageItem, Drift, RunState, escape};

use crate::arguments::{Arguments, CoverageArguments};
use crate::client::Client;
use crate::commands::print_json;
use crate::render::{bytes, lines, table, time, time_or};
use crate::{Exit, Failure, follow};

/// Carries the command out.
pub fn coverage(arguments: &Arguments, socket: &Path, options: &CoverageArguments) -> Result<Exit, Failure> {
    if let Some(named) = &options.acknowledge {
        return acknowledge(arguments, socket, named, false);
    }
    if !options.forget.is_empty() {
        return acknowledge(arguments, socket, &options.forget, true);
    }
    if !options.no_scan {
        let run = Client::connect(socket)?.call::<StartCoverage>(&start_coverage::In { all: options.all })?.run;
        let run = follow::follow(arguments, socket, &run)?;
        if run.state != RunState::Good {
            if arguments.json {
                print_json(&run)?;
            }
            return Ok(follow::conclude(arguments, &run));
        }
    }
    let mut found = Coverage::default();
    Client::connect(socket)?.call_more::<GetCoverage>(&get_coverage::In {}, |out| {
        let items = std::mem::take(&mut found.items);
        found = out.coverage;
        found.items.splice(..0, items);
        Ok(())
    })?;
    if arguments.json {
        print_json(&found)?;
    } else if !arguments.quiet {
        show(&found, arguments.verbose, options.acknowledged)?;
    }
    Ok(if found.counts.gaps == 0 { Exit::Good } else { Exit::Partial })
}

fn acknowledge(arguments: &Arguments, socket: &Path, named: &[String], undo: bool) -> Result<Exit, Failure> {
    let call = acknowledge_coverage::In { items: named.to_vec(), all: named.is_empty(), undo };
    let out = Client::connect(socket)?.call::<AcknowledgeCoverage>(&call)?;
    if arguments.json {
        print_json(&out)?;
    } else if !arguments.quiet {
        let done = if undo { "no longer acknowledged" } else { "acknowledged" };
        writeln!(io::stdout(), "{} {done}", number(out.acknowledged, "gap"))?;
    }
    Ok(Exit::Good)
}

/// The line of `status`.
pub fn line(counts: &CoverageCounts) -> String {
    let new = match &counts.since {
        Some(since) => format!(", {} new since {}", counts.new_gaps, time(since)),
        None => String::new(),
    };
    format!("coverage: {}{new} (looked at {})", number(counts.gaps, "gap"), time(&counts.time))
}

fn number(n: u64, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

fn show(found: &Coverage, verbose: bool, acknowledged: bool) -> Result<(), Failure> {
    let counts = &found.counts;
    let shown = |i: &&CoverageItem| (i.gap && (acknowledged || i.acknowledged.is_none())) || (verbose && !i.gap);
    let items: Vec<&CoverageItem> = found.items.iter().filter(shown).collect();
    if !items.is_empty() {
        table(&["", "KIND", "WHAT", "WHERE", "SIZE", "WRITTEN", "JOBS", "WHY"], items.iter().map(|i| row(i)).collect())?;
    }
    let mut out = io::stdout().lock();
    if !items.is_empty() {
        writeln!(out)?;
    }
    for suggestion in items.iter().filter(|_| verbose).filter_map(|i| i.suggestion.as_ref()) {
        writeln!(out, "{}\n", suggestion.lines().map(escape).collect::<Vec<_>>().join("\n"))?;
    }
    for gone in &found.vanished {
        writeln!(out, "gone: {}", escape(gone))?;
    }
    let hint = |shown: bool, text: &str| if shown { String::new() } else { format!(" ({text} shows them)") };
    let cut = if found.cut > 0 { format!("; {} more did not fit into the list", found.cut) } else { String::new() };
    writeln!(out, "{}; {} covered{}{cut}", gaps(counts), counts.covered, hint(verbose || counts.covered == 0, "-v"))?;
    if counts.acknowledged > 0 {
        writeln!(out, "{} acknowledged{}", counts.acknowledged, hint(acknowledged, "--acknowledged"))?;
    }
    if !found.skipped.is_empty() {
        let skipped: Vec<String> = found.skipped.iter().map(|(what, n)| format!("{n} {}", escape(what))).collect();
        let all = if found.all { "" } else { "; --all looks into caches" };
        writeln!(out, "left out: {}{all}", skipped.join(", "))?;
    }
    for note in &found.notes {
        writeln!(out, "note: {}", lines(note))?;
    }
    Ok(())
}

fn gaps(counts: &CoverageCounts) -> String {
    match (&counts.since, counts.gaps) {
        (_, 0) => "no gaps".to_owned(),
        (None, gaps) => number(gaps, "gap"),
        (Some(since), gaps) => format!("{}, {} new since {}", number(gaps, "gap"), counts.new_gaps, time(since)),
    }
}

fn row(item: &CoverageItem) -> Vec<String> {
    let mark = match (item.gap, &item.acknowledged, item.drift) {
        (false, _, _) => "ok",
        (true, Some(_), _) => "acknowledged",
        (true, None, Some(Drift::New)) => "new",
        (true, None, Some(Drift::Uncovered)) => "no longer covered",
        (true, None, None) => "",
    };
    vec![
        mark.to_owned(),
        item.kind.to_string(),
        escape(&item.what),
        escape(&item.r#where),
        item.bytes.map(bytes).unwrap_or_default(),
        time_or(item.modified.as_ref(), ""),
        escape(&item.covered_by.join(", ")),
        lines(&item.reason),
    ]
}
