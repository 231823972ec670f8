//! Undoing a restore in place, or seeing it through: after a failure, and at the next start of a keepd that was killed on its way.

use std::path::PathBuf;

use keepd_protocol::model::Level;
use tokio_util::sync::CancellationToken;

use super::health::Question;
use super::journal::{Journal, Phase};
use super::point;
use super::targets::restore_command;
use super::tree::{self, Beneath, Tree};
use crate::config::{FilesSource, Job, Source, SourceKind};
use crate::repository::Entry;
use crate::run::backup::Environment;
use crate::run::live::{Failure, LiveRun};
use crate::run::restore::{self, Place};
use crate::run::{load, quiesce};
use crate::source::way;

/// What undoing needs.
pub struct Helper<'a> {
    pub env: &'a Environment,
    /// As it is configured now, if it is.
    pub job: Option<&'a Job>,
    pub open: &'a dyn Fn(&str) -> Result<Place, Failure>,
    pub another: &'a dyn Fn(&str, &mut Vec<String>) -> Option<Place>,
    pub live: &'a LiveRun,
}

type Tell<'a> = &'a mut dyn FnMut(Level, String);

/// A dump with the places that it can be read from.
pub fn contents<'a>(
    place: Place,
    another: &'a dyn Fn(&str, &mut Vec<String>) -> Option<Place>,
    backup: &str,
    path: &[u8],
    entry: &Entry,
) -> load::Dump<'a> {
    let mut tried = vec![place.destination.clone()];
    let backup = backup.to_owned();
    load::Dump { place, another: Box::new(move || another(&backup, &mut tried)), path: path.to_vec(), entry: entry.clone() }
}

/// A job whose databases of SQLite are files like any others, for what cannot be read as a database any more.
pub fn with_plain_files(job: &Job) -> Job {
    let mut plain = job.clone();
    plain.sources = job.sources.iter().flat_map(as_plain_files).collect();
    plain.version = None;
    plain.schema_version = None;
    plain
}

/// What SQLite keeps beside a database and cannot be without.
pub const LOGS: [&str; 2] = ["-wal", "-journal"];

fn as_plain_files(source: &Source) -> Vec<Source> {
    let SourceKind::Sqlite(sqlite) = &source.kind else { return vec![source.clone()] };
    let mut sources = Vec::new();
    for suffix in std::iter::once("").chain(LOGS) {
        let mut path = way::resolve(&sqlite.path).unwrap_or_else(|_| sqlite.path.clone()).into_os_string();
        path.push(suffix);
        let path = PathBuf::from(path);
        if path.symlink_metadata().is_ok() {
            let files = FilesSource { path, exclude: Vec::new(), one_file_system: false, exclude_caches: false };
            sources.push(Source { name: format!("{}{suffix}", source.name), kind: SourceKind::Files(files), references: None });
        }
    }
    sources
}

/// Puts everything back, from wherever it stands, any number of times. What could not be put back is the error, and stays in the journal; true
/// when a command may not have what it had.
pub fn undo(journal: &mut Journal, helper: &Helper<'_>, tell: Tell<'_>) -> Result<bool, Failure> {
    // Whatever was cancelled: this is done.
    let go_on = CancellationToken::new();
    let mut is_doubtful = false;
    if journal.phase != Phase::Undone {
        let touched = matches!(journal.phase, Phase::Swapping | Phase::Swapped | Phase::Undoing);
        if touched {
            hold_again(journal, helper, &go_on, tell)?;
            // A full disk must not keep things from being put back.
            if let Err(e) = journal.enter(Phase::Undoing) {
                tell(Level::Error, e.to_string());
            }
        }
        is_doubtful = put_back(journal, touched, helper, tell)?;
        // Never twice: from here on the application may work with it.
        if let Err(e) = journal.enter(Phase::Undone) {
            tell(Level::Error, e.to_string());
        }
    }
    if let Some(held) = &journal.held {
        quiesce::end_noted(held).map_err(Failure::Failed)?;
        point();
    }
    clear(journal, tell);
    journal.remove()?;
    Ok(is_doubtful)
}

/// Holds the application still, whoever started it since: systemd, too, at a start of the machine.
fn hold_again(journal: &Journal, helper: &Helper<'_>, go_on: &CancellationToken, tell: Tell<'_>) -> Result<(), Failure> {
    if let (Some(begin), Some(job)) = (journal.begin.as_ref().filter(|_| journal.phase == Phase::Swapped), helper.job)
        && let Err(e) = quiesce::begin_maintenance(job, begin, &helper.live.uncancelled())
    {
        tell(Level::Error, e.to_string());
    }
    for unit in journal.held.iter().flat_map(|held| held.services.iter().rev()) {
        quiesce::stop(unit, go_on)?;
    }
    Ok(())
}

fn put_back(journal: &mut Journal, touched: bool, helper: &Helper<'_>, tell: Tell<'_>) -> Result<bool, Failure> {
    let go_on = CancellationToken::new();
    let mut is_doubtful = false;
    let mut errors = Vec::new();
    while let Some(name) = journal.commands.pop() {
        // Whether it took anything, and what it has now, only it knows: that is told, and does not keep the rest from going on.
        if let Err(e) = feed_again(journal, &name, helper) {
            is_doubtful = true;
            tell(Level::Error, format!("its restore_command could not be given back what was there: {e}"));
        }
        let _ = journal.save();
    }
    for loaded in journal.databases.iter().rev() {
        let source = helper.job.and_then(|job| job.sources.iter().find(|s| s.name == loaded.source));
        let source = source.filter(|s| s.kind.lock().unwrap_or_default() == loaded.server);
        let Some(source) = source else {
            let text = format!(
                "job {} has no source {} on that server any more, so its database {} cannot be put back",
                journal.job, loaded.source, loaded.wanted.target
            );
            if loaded.begun {
                errors.push(text)
            } else {
                tell(Level::Warning, text)
            }
            continue;
        };
        let back = load::loader(source, &go_on).and_then(|server| {
            let failed = |e| crate::run::set::told(source, e);
            match loaded.begun {
                true => server.take_back(&loaded.wanted, loaded.there).map_err(failed),
                false => server.discard(&loaded.wanted).map(|()| Vec::new()).map_err(failed),
            }
        });
        match back {
            Ok(told) => told.into_iter().for_each(|text| tell(Level::Warning, text)),
            Err(e) if loaded.begun => errors.push(e.to_string()),
            // It is in nobody's way.
            Err(e) => tell(Level::Warning, format!("the scratch database {} could not be removed: {e}", loaded.wanted.scratch)),
        }
        point();
    }
    // Files that fit the databases are not taken from them.
    for number in (0..journal.trees.len()).rev() {
        if !errors.is_empty() {
            break;
        }
        let Some(tree) = journal.trees.get(number) else { continue };
        let wrong = take_back(tree, &journal.changes_of(number), touched, tell);
        if wrong.is_empty()
            && touched
            && let Some(tree) = journal.trees.get_mut(number)
        {
            tree.planned = false;
            let _ = journal.save();
        }
        errors.extend(wrong);
    }
    match errors.is_empty() {
        true => Ok(is_doubtful),
        false => Err(Failure::Failed(format!(
            "{}. The application is not started, and nothing else works on the job; what is to be put back is noted in the state directory, and \
             keepd tries again",
            errors.join("; ")
        ))),
    }
}

fn take_back(tree: &Tree, changes: &std::path::Path, touched: bool, tell: Tell<'_>) -> Vec<String> {
    let mut errors = Vec::new();
    if !touched || !tree.planned {
        return errors;
    }
    let all = match tree::read_changes(changes) {
        Ok(all) => all,
        Err(e) => return vec![format!("cannot read {}: {e}", changes.display())],
    };
    let beneath = match Beneath::open(tree) {
        Ok(beneath) => beneath,
        Err(e) => return vec![format!("cannot open {}: {e}", tree.root.display())],
    };
    if !beneath.has_stage() {
        return vec![format!("{} has no {} any more, or its file system is not mounted", tree.root.display(), tree.stage)];
    }
    for change in all.iter().rev() {
        match beneath.take_back(change) {
            Ok(told) => told.into_iter().for_each(|text| tell(Level::Error, text)),
            Err(e) => errors.push(e),
        }
        point();
    }
    // Directories had changed once more while things were put back into them.
    for change in &all {
        errors.extend(beneath.settle(change).err());
    }
    errors.extend(beneath.sync().err());
    errors
}

/// Where a command source's one file is in a backup.
pub fn file_in_backup(source: &str, file: &str) -> Vec<u8> {
    [source.as_bytes(), b"/", file.as_bytes()].concat()
}

/// Feeds a command what the safety backup has of it.
fn feed_again(journal: &Journal, name: &str, helper: &Helper<'_>) -> Result<(), Failure> {
    let failed = |text: String| Failure::Failed(format!("source {name}: {text}"));
    let job = helper.job.ok_or_else(|| failed(format!("there is no job {} any more", journal.job)))?;
    let source = job.sources.iter().find(|s| s.name == name).ok_or_else(|| failed("the job has it no more".into()))?;
    let safety =
        journal.safety.as_ref().ok_or_else(|| failed("there is no safety backup that its restore_command could be fed again".into()))?;
    let SourceKind::Command(command) = &source.kind else { return Err(failed("it is no command any more".into())) };
    restore_command(source).ok_or_else(|| failed("it has no restore_command any more".into()))?;
    let uncancelled = helper.live.uncancelled();
    if journal.kept.iter().any(|kept| kept == name) {
        let file = std::fs::File::open(journal.kept_of(name)).map_err(|e| failed(format!("what was kept of it cannot be read: {e}")))?;
        return load::file_through_command(job, source, file, &uncancelled);
    }
    let path = file_in_backup(name, &command.file);
    let place = (helper.open)(safety)?;
    let entry = restore::find_file(&place.repository, &place.manifest, &path)?;
    load::through_command(job, source, contents(place, helper.another, safety, &path, &entry), &uncancelled)
}

/// What was restored stays: what was there goes.
pub fn keep(journal: &Journal, job: Option<&Job>, tell: Tell<'_>) -> Result<(), Failure> {
    for loaded in &journal.databases {
        let Some(source) = job.and_then(|job| job.sources.iter().find(|s| s.name == loaded.source)) else { continue };
        let settled = load::loader(source, &CancellationToken::new())
            .and_then(|server| server.settle(&loaded.wanted).map_err(|e| crate::run::set::told(source, e)));
        if let Err(e) = settled {
            tell(Level::Warning, format!("what was kept of {} for taking it back could not be removed: {e}", loaded.wanted.aside));
        }
    }
    clear(journal, tell);
    journal.remove()
}

/// Removes the stages. What cannot be removed is told: it is in nobody's way.
fn clear(journal: &Journal, tell: Tell<'_>) {
    for tree in &journal.trees {
        let stage = tree.root.join(&tree.stage);
        if stage.symlink_metadata().is_ok() {
            // The directory's time is not that of our clearing up.
            let cleared = Beneath::open(tree).map_err(|e| e.to_string()).and_then(|beneath| {
                let now = beneath.time()?;
                beneath.clear()?;
                beneath.set_time(if journal.phase == Phase::Keeping { now } else { tree.was.unwrap_or(now) })
            });
            if let Err(e) = cleared {
                tell(Level::Warning, format!("{} could not be removed: {e}", stage.display()));
            }
        }
        if journal.phase != Phase::Keeping {
            tree::unmake(tree);
        }
        // The journal goes next, and may lie on another disk: a stage that a power cut brought back after it would stay for ever.
        let there = tree.root.ancestors().find(|d| d.is_dir());
        if let Some(Err(e)) = there.map(|d| std::fs::File::open(d).and_then(|d| d.sync_all())) {
            tell(Level::Warning, format!("whether {} is gone for good is not certain: {e}", stage.display()));
        }
        point();
    }
}

/// What an earlier keepd left undone.
pub struct Pending {
    journal: Journal,
}

/// All that was left, and what could not be read.
pub fn pending(state_dir: &std::path::Path) -> (Vec<Pending>, Vec<String>) {
    let (journals, problems) = Journal::left(state_dir);
    if problems.is_empty() {
        Journal::sweep(state_dir, &journals);
    }
    (journals.into_iter().map(|journal| Pending { journal }).collect(), problems)
}

/// What an undo that went well is told as.
pub fn as_before(is_doubtful: bool) -> &'static str {
    match is_doubtful {
        true => "everything is as it was before, but for what a restore_command could not be given back",
        false => "everything is as it was before",
    }
}

/// How it ended.
pub struct Finished {
    pub text: String,
    /// What was restored stays.
    pub stays: bool,
}

impl Pending {
    pub fn job(&self) -> &str {
        &self.journal.job
    }

    pub fn run(&self) -> &str {
        &self.journal.run
    }

    /// Finishes or undoes it; says which.
    pub fn finish(&mut self, helper: &Helper<'_>) -> Result<Finished, Failure> {
        let stays = |text: &str| Finished { text: text.to_owned(), stays: true };
        let undone = |text: String| Finished { text, stays: false };
        let mut tell = |_: Level, text: String| tracing::warn!("{text}");
        let journal = &mut self.journal;
        match journal.phase {
            Phase::Keeping => {
                keep(journal, helper.job, &mut tell)?;
                Ok(stays("the restore was done; what was left of clearing up after it is done now"))
            }
            Phase::Swapped => {
                let services = journal.held.as_ref().map(|held| held.services.clone()).unwrap_or_default();
                let started = journal.held.as_ref().map_or(Ok(()), |held| quiesce::end_noted(held).map_err(Failure::Failed));
                let question = Question { health: journal.health.as_ref(), job: &journal.job, run: &journal.run, services: &services };
                match started.and_then(|()| question.ask(&helper.env.runtime, &helper.live.cancel)) {
                    Ok(_) => {
                        journal.enter(Phase::Keeping)?;
                        keep(journal, helper.job, &mut tell)?;
                        Ok(stays("all was in place already, and it stays"))
                    }
                    Err(e) => {
                        let is_doubtful = undo(journal, helper, &mut tell)?;
                        Ok(undone(format!("all was in place, but {e}; {}", as_before(is_doubtful))))
                    }
                }
            }
            _ => {
                let is_doubtful = undo(journal, helper, &mut tell)?;
                Ok(undone(as_before(is_doubtful).into()))
            }
        }
    }
}
