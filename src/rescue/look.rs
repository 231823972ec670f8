//! Looking: lists of backups and of what is in them, and the check.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;

use keepd_protocol::model::{EntryInfo, Run, escape};
use serde::Serialize;

use super::arguments::{Of, Place};
use super::opened::{Opened, bar};
use super::{Exit, Failure, Result, print_json, render, tell_some};
use crate::archive::Archives;
use crate::archive::pour::What;
use crate::repository::check::{self, Reading};
use crate::run::archived::upkeep;
use crate::run::browse;
use crate::run::live::LiveRun;

/// Backups, newest first.
pub fn list(place: &Place, job: Option<&str>) -> Result<Exit> {
    let opened = Opened::open(place)?;
    opened.tell_problems();
    let backups = opened.backups(job)?;
    let exit = if opened.problems.is_empty() { Exit::Good } else { Exit::Partial };
    if place.json {
        print_json(&backups)?;
        return Ok(exit);
    }
    let rows = backups.iter().map(|b| {
        let outcome = if b.partial { format!("{}, partial", b.outcome) } else { b.outcome.to_string() };
        vec![
            render::short(&b.id).to_owned(),
            escape(&b.job),
            render::time(&b.time),
            b.r#type.to_string(),
            outcome,
            render::bytes(b.bytes),
            b.sources.iter().map(|s| escape(s)).collect::<Vec<_>>().join(", "),
            b.name.as_deref().map(escape).unwrap_or_default(),
        ]
    });
    render::table(&["BACKUP", "JOB", "TIME", "TYPE", "OUTCOME", "SIZE", "SOURCES", "NAME"], rows.collect())?;
    Ok(exit)
}

/// What is in a backup.
pub fn ls(place: &Place, of: &Of, path: Option<&OsStr>, recursive: bool) -> Result<Exit> {
    let opened = Opened::open(place)?;
    opened.tell_problems();
    let (_, manifest) = opened.find_for(of, &What::Entries)?;
    let (mut all, mut written) = (Vec::<EntryInfo>::new(), Ok(()));
    let mut out = io::stdout().lock();
    let path = path.map(|p| p.as_bytes().to_vec());
    let listed = browse::list(&opened.repository, &manifest, path, recursive, &mut |entries| {
        if place.json {
            all.extend(entries);
        } else {
            written = entries.iter().try_for_each(|entry| writeln!(out, "{}", render::entry(entry)));
        }
        written.is_ok() && !opened.cancel.is_cancelled()
    });
    drop(out);
    if place.json {
        print_json(&all)?;
    }
    written?;
    listed?;
    Ok(Exit::Good)
}

/// What a check found, as JSON shows it.
#[derive(Serialize)]
pub(super) struct Report {
    backups: u64,
    packs: u64,
    packs_read: u64,
    bytes_read: u64,
    pub(super) problems: Vec<String>,
    /// By backup the first paths hurt.
    pub(super) hurt: std::collections::BTreeMap<String, Vec<String>>,
}

/// Proves that the backups are whole.
pub fn check(place: &Place, percent: u32) -> Result<Exit> {
    let opened = Opened::open(place)?;
    let (report, what) = match &opened.archives {
        Some(archives) => (of_archives(&opened, archives, percent)?, "archives"),
        None => (of_packs(&opened, place, percent)?, "packs"),
    };
    let is_whole = report.problems.is_empty() && report.hurt.is_empty();
    if place.json {
        print_json(&report)?;
    } else {
        tell_some("damaged", &report.problems);
        let hurt: Vec<String> =
            report.hurt.iter().map(|(id, paths)| format!("backup {}: {}", render::short(id), paths.join(", "))).collect();
        tell_some("hurt", &hurt);
        if is_whole && !place.quiet {
            let read = format!("{} of {} {what} read, {}", report.packs_read, report.packs, render::bytes(report.bytes_read));
            writeln!(io::stdout(), "no damage found: {} backups, {read}", report.backups)?;
        }
    }
    if is_whole {
        return Ok(Exit::Good);
    }
    Err(Failure::failed(format!(
        "{} damaged or missing objects, {} of {} backups hurt",
        report.problems.len(),
        report.hurt.len(),
        report.backups
    )))
}

pub(super) fn of_packs(opened: &Opened, place: &Place, percent: u32) -> Result<Report> {
    let total: u64 = opened.repository.packs()?.iter().map(|(_, size)| size).sum();
    let bar = bar(place, "reading", total / 100 * u64::from(percent));
    let progress = |_: usize, _: usize, bytes: u64| bar.set_position(bytes);
    let found = check::check(&opened.repository, Reading::Percent(percent), &progress, &opened.cancel);
    bar.finish_and_clear();
    let found = found?;
    // What the first look found is not in the local index any more.
    let mut problems = opened.problems.clone();
    problems.extend(found.problems.into_iter().filter(|p| !opened.problems.contains(p)));
    Ok(Report {
        backups: found.backups,
        packs: found.packs,
        packs_read: found.packs_read,
        bytes_read: found.bytes_read,
        problems,
        hurt: found.hurt,
    })
}

/// The same of archives, which are their own packs.
pub(super) fn of_archives(opened: &Opened, archives: &Archives, percent: u32) -> Result<Report> {
    let mut live = LiveRun::new(Run::default(), tokio::sync::broadcast::Sender::new(1));
    live.cancel = opened.cancel.clone();
    let found = upkeep::examine(archives, &opened.ledger, percent, &live)?;
    let mut problems = opened.problems.clone();
    problems.extend(found.problems);
    problems.sort();
    problems.dedup();
    let hurt = found.hurt.into_iter().map(|(detail, why)| (detail.backup.id, vec![why])).collect();
    let (packs, packs_read) = (found.all as u64, found.read as u64);
    Ok(Report { backups: found.known as u64, packs, packs_read, bytes_read: found.bytes, problems, hurt })
}
