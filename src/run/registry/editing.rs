//! Single tables of the configuration, changed for those who ask at the control socket.
//!
//! In: edits, and what they were made from. Out: the files' texts as they are to be, checked as a whole as a reload checks them, and committed at once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use keepd_protocol::configuration::{ConfigEdit, EditKind, LeftBackups};
use keepd_protocol::methods::edit_config;
use keepd_protocol::model::{Level, Run, RunKind};
use serde_json::{Map, Value};

use super::{Error, Result, Runs, Work, lock};
use crate::access::{By, Right, wanted_by_change};
use crate::config::{self, Config, Destination, Draft, ItemKind, ItemName, Problem, Texts};
use crate::machine;
use crate::meta::plan::{Items, references};
use crate::run::check;
use crate::run::live::{Failure, Finish, LiveRun};

/// Edits in one call.
const MOST_EDITS: usize = 1000;
/// What a unit that may not write there is to be given.
const READ_ONLY: &str =
    "; keepd's unit may not write there: give it a drop-in with [Service] ReadWritePaths=/etc/keepd (see docs/editing.md)";

/// An item that an edit changes: as it is, and as it becomes. None: it is not there.
struct ChangedItem<'a> {
    item: &'a ItemName,
    before: Option<&'a Value>,
    after: Option<&'a Value>,
}

/// An item as it stands in its file.
pub struct ItemText {
    pub file: String,
    pub text: String,
    pub base: String,
}

/// What an edit would do, or did.
pub struct Edited {
    pub diff: String,
    pub base: String,
    pub warnings: Vec<String>,
    /// Of the jobs that go.
    pub backups: u64,
    pub is_applied: bool,
    /// What should be known of it besides.
    pub notes: Vec<String>,
    /// Jobs that go.
    pub gone: Vec<String>,
    /// Whether their backups are to be deleted once they are gone.
    pub deletes: bool,
}

/// What deletes the backups of a job that is gone.
#[derive(Default)]
pub struct Deleting {
    pub runs: Vec<String>,
    /// What should be known of it.
    pub notes: Vec<String>,
    /// What stays, and why.
    pub not_deleted: Vec<String>,
}

/// Who changed the configuration last, by its digest then.
pub struct LastEdit {
    digest: String,
    by: String,
    time: Timestamp,
}

impl Runs {
    /// An item's table with its comments.
    pub fn show_item_text(&self, item: &str) -> Result<ItemText> {
        let item = editable(item)?;
        let texts = self.texts()?;
        let base = texts.digest();
        let draft = Draft::of(texts);
        if draft.value(&item).map_err(Error::Failed)?.is_none() {
            return Err(absent(&item, draft.after()));
        }
        let (file, text) = draft.text_of(&item).map_err(Error::Failed)?;
        Ok(ItemText { file: file.display().to_string(), text, base })
    }

    /// Makes edits, all of them or none, or only says what they would do.
    pub fn edit_config(&self, request: &edit_config::In, by: &By) -> Result<Edited> {
        if request.edits.is_empty() || request.edits.len() > MOST_EDITS {
            return Err(Error::Failed(format!("nothing was changed: one call takes 1 to {MOST_EDITS} edits, not {}", request.edits.len())));
        }
        // Until all of it is done: what was checked must be what is changed.
        let _alone = lock(&self.config_changes);
        let texts = self.texts()?;
        let base = texts.digest();
        if request.base.as_ref().is_some_and(|shown| *shown != base) {
            return Err(self.changed_since(&base));
        }
        let before = items(&texts)?;
        let mut draft = Draft::of(texts);
        for edit in &request.edits {
            apply(&mut draft, edit)?;
        }
        let after = items(draft.after())?;
        let changed = changed(&before, &after);
        // Before anything else is told of it; and it may have waited.
        by.ask_again()?;
        wanted_by_change(by, Right::JobEdit, &before, &after)?;
        let jobs: Vec<&str> = changed.iter().filter(|c| c.item.kind == ItemKind::Job).map(|c| c.item.name.as_str()).collect();
        let removed =
            |kind: ItemKind| changed.iter().filter(move |c| c.item.kind == kind && c.after.is_none()).map(|c| c.item.name.as_str());
        let gone: Vec<&str> = removed(ItemKind::Job).collect();
        let mut backups = 0;
        for job in &gone {
            backups += self.ledger.backups(Some(job), None)?.len() as u64;
        }
        let mut edited = Edited {
            diff: draft.diff(),
            base,
            warnings: Vec::new(),
            backups,
            is_applied: false,
            notes: Vec::new(),
            gone: Vec::new(),
            deletes: false,
        };
        if draft.is_nothing() {
            return Ok(edited);
        }
        is_unused(&changed, &after)?;
        let config = draft.after().load().map_err(|problems| refused(&problems.to_string()))?;
        let found = machine::check(config);
        if !found.errors.is_empty() {
            return Err(refused(&config::Problems(found.errors).to_string()));
        }
        edited.warnings = found.warnings.iter().map(Problem::to_string).collect();
        edited.notes = self.notes(&jobs, &found.config);
        if request.dry_run {
            return Ok(edited);
        }
        if let Some(left) = self.backups_left(&gone, backups, request.backups)? {
            edited.notes.push(left);
        }
        edited.deletes = request.backups == Some(LeftBackups::Delete);
        edited.gone = gone.into_iter().map(str::to_owned).collect();
        // Known before: nothing may fail once it counts.
        let digest = draft.after().digest();
        let advice = |why: String| if why.contains("Read-only file system") { why + READ_ONLY } else { why };
        draft.commit(&self.previous()).map_err(|why| Error::Failed(advice(why)))?;
        *lock(&self.last_edit) = Some(LastEdit { digest: digest.clone(), by: by.name().to_owned(), time: Timestamp::now() });
        edited.base = digest;
        edited.is_applied = true;
        Ok(edited)
    }

    /// Forgets what is known of the schedules of jobs that are configured no more.
    pub fn forget_schedules(&self, jobs: &[String]) {
        let config = self.config.get();
        let gone = jobs.iter().filter(|job| !config.jobs.contains_key(*job));
        let forgotten: Vec<(&str, Option<&crate::ledger::ScheduleState>)> = gone.map(|job| (job.as_str(), None)).collect();
        if let Err(e) = self.ledger.replace_schedule_states(&forgotten) {
            tracing::warn!("what is known of the schedules of removed jobs stays: {e}");
        }
    }

    fn changed_since(&self, now: &str) -> Error {
        let who = lock(&self.last_edit).as_ref().filter(|last| last.digest == now).map(|last| format!(" by {} at {}", last.by, last.time));
        let who = who.unwrap_or_else(|| ", and not by this command (a file was edited, or a configuration imported)".into());
        Error::Busy(format!("the configuration was changed since it was shown{who}; nothing was changed: look again"))
    }

    /// What should be known of changed jobs.
    fn notes(&self, jobs: &[&str], after: &Config) -> Vec<String> {
        let mut notes = Vec::new();
        for run in self.active() {
            if let Some(job) = run.job.as_deref().filter(|job| jobs.contains(job)) {
                let then = match after.jobs.contains_key(job) {
                    true => "it goes on as it began, the change counts from the next one",
                    false => "it goes on to its end as it began, also without the job",
                };
                notes.push(format!("{} of {job} is {} (run {}): {then}", run.kind, run.state, run.id));
            }
        }
        let now = Timestamp::now();
        for job in jobs.iter().filter_map(|name| after.jobs.get(*name)) {
            if let Some(until) = job.paused_until.filter(|until| *until <= now) {
                notes.push(format!("paused_until of {} is past ({until}): it is not paused", job.name));
            }
        }
        notes
    }

    /// What becomes of the backups of jobs that go, in words; an error where it must be said first, or cannot be.
    fn backups_left(&self, gone: &[&str], backups: u64, left: Option<LeftBackups>) -> Result<Option<String>> {
        let names = gone.join(", ");
        match left {
            _ if gone.is_empty() || backups == 0 && left != Some(LeftBackups::Delete) => Ok(None),
            None => Err(Error::Failed(format!(
                "nothing was changed: there are {backups} backups of {names}; say whether they stay (--keep-backups) or are deleted (--delete-backups)"
            ))),
            Some(LeftBackups::Keep) => Ok(Some(format!(
                "{backups} backups of {names} stay; no retention removes them, 'keepctl list --job' shows and 'keepctl delete' removes them"
            ))),
            Some(LeftBackups::Delete) => {
                for job in gone {
                    if let Some(run) = self.adding_to(job)? {
                        return Err(Error::Busy(format!(
                            "nothing was changed: the backups of {job} are to be deleted, and a run that may add to them ({}, {}) is {}; cancel it ('keepctl run cancel') or wait for it",
                            run.kind, run.id, run.state
                        )));
                    }
                }
                Ok(None)
            }
        }
    }

    /// A run that may add backups of a job, queued or running.
    fn adding_to(&self, job: &str) -> Result<Option<Arc<Run>>> {
        for run in self.active().into_iter().filter(|run| !run.state.is_finished()) {
            let is_it = match (run.kind, &run.job, &run.backup) {
                // A restore in place backs up before it; others name no job.
                (RunKind::Backup | RunKind::Copy | RunKind::Import | RunKind::Restore, Some(of), _) => of == job,
                (RunKind::Copy, None, Some(backup)) => self.ledger.backup_detail(backup)?.is_some_and(|found| found.backup.job == job),
                // Whose it is, its archive says.
                (RunKind::Import, None, _) => true,
                _ => false,
            };
            if is_it {
                return Ok(Some(run));
            }
        }
        Ok(None)
    }

    /// Deletes all backups of a job that is not configured any more, a run for each destination; what is pinned stays.
    pub fn start_delete_all(self: &Arc<Self>, job: &str, by: &By) -> Result<Deleting> {
        let env = self.environment();
        let mut deleting = Deleting::default();
        if env.config.jobs.contains_key(job) {
            return Err(Error::Failed("the job is configured again".into()));
        }
        // It may have begun just before the job was gone.
        if let Some(run) = self.adding_to(job)? {
            return Err(Error::Busy(format!("a run that may add to them ({}, {}) is {}", run.kind, run.id, run.state)));
        }
        let stay = &mut deleting.not_deleted;
        let mut places: BTreeMap<String, u64> = BTreeMap::new();
        let mut pinned = 0;
        for backup in self.ledger.backups(Some(job), None)? {
            if backup.pinned {
                pinned += 1;
                continue;
            }
            for place in &backup.destinations {
                *places.entry(place.name.clone()).or_default() += 1;
            }
        }
        if pinned > 0 {
            stay.push(format!("{pinned} backups of {job} are pinned and stay ('keepctl unpin')"));
        }
        for (name, count) in places {
            let Some(target) = env.config.destinations.get(&name).cloned() else {
                stay.push(format!("{count} backups of {job} at {name} stay: that is no destination of this configuration any more"));
                continue;
            };
            if let Err(e) = check::may_delete(&target) {
                stay.push(format!("{count} backups of {job} at {name} stay: {e}"));
                continue;
            }
            if target.object_lock.is_some() {
                deleting.notes.push(format!("{name} has object_lock: what it holds of {job} is freed when its lock is over"));
            }
            let work = Work { job: Some(job.to_owned()), ..Work::on(RunKind::Delete, &name, by) };
            let (registry, of) = (self.clone(), job.to_owned());
            match self.start(work, move |live| registry.delete_all(&of, &target, live)) {
                Ok(run) => deleting.runs.push(run),
                Err(e) => stay.push(format!("{count} backups of {job} at {name} stay, since their deletion could not be started: {e}")),
            }
        }
        Ok(deleting)
    }

    /// Deletes what there is of a job at a destination by now, as long as the job does not come back; what is pinned by now stays.
    fn delete_all(&self, job: &str, target: &Destination, live: &LiveRun) -> Result<Finish, Failure> {
        let name = &target.name;
        let is_wanted = || match self.config.get().jobs.contains_key(job) {
            true => Err(Failure::Failed(format!("job {job} is configured again, so what there is of its backups at {name} stays"))),
            false => Ok(()),
        };
        is_wanted()?;
        if let Some(run) = self.adding_to(job).map_err(|e| Failure::Failed(e.to_string()))? {
            let text =
                format!("a run that may add to the backups of {job} ({}, {}) is {}; those at {name} stay", run.kind, run.id, run.state);
            return Err(Failure::Failed(text));
        }
        let ids: Vec<String> = self.ledger.backups(Some(job), Some(name))?.into_iter().map(|backup| backup.id).collect();
        let goes = |id: &str| {
            is_wanted()?;
            Ok(self.ledger.backups_by_prefix(id, Some(job))?.first().is_some_and(|backup| !backup.pinned))
        };
        check::delete_backups(&self.environment(), target, &ids, live, &goes, &|name| self.readers_gone(name))?;
        let left = self.ledger.backups(Some(job), Some(name))?.len();
        if left > 0 {
            live.message(
                Level::Warning,
                format!("{left} backups of {job} stay at {name}: they are pinned, or came while others were deleted"),
            );
            return Ok(Finish::Partial);
        }
        Ok(Finish::Good)
    }
}

/// An item that stands in the files, by its name.
fn editable(name: &str) -> Result<ItemName> {
    let item: ItemName = name.parse().map_err(Error::Failed)?;
    let is_there = match item.kind {
        ItemKind::Settings => config::is_settings(&item.name),
        ItemKind::Access => item.name == "access",
        ItemKind::Schedule => false,
        _ => true,
    };
    match is_there {
        true => Ok(item),
        false => Err(Error::Failed(format!(
            "{item} is no table of the configuration that can be edited; such are job.shop, destination.offsite, settings.daemon, access.access"
        ))),
    }
}

fn absent(item: &ItemName, texts: &Texts) -> Error {
    let same_kind =
        texts.items().map(|all| all.into_keys().filter(|i| i.kind == item.kind).map(|i| i.name).collect::<Vec<_>>()).unwrap_or_default();
    let known = if same_kind.is_empty() { "there is none".to_owned() } else { format!("there are: {}", same_kind.join(", ")) };
    let guess = config::did_you_mean(&item.name, same_kind.iter().map(String::as_str));
    Error::NotFound { what: "item", name: item.to_string(), text: format!("there is no {item} in the configuration; {known}{guess}") }
}

fn refused(problems: &str) -> Error {
    Error::Failed(format!("nothing was changed, for the configuration would be refused:\n{problems}"))
}

fn items(texts: &Texts) -> Result<Items> {
    texts
        .values()
        .map_err(|problems| Error::Failed(format!("nothing was changed: the configuration as it stands cannot be made out:\n{problems}")))
}

fn apply(draft: &mut Draft, edit: &ConfigEdit) -> Result<()> {
    let item = editable(&edit.item)?;
    let failed = |why: String| Error::Failed(format!("nothing was changed: {why}"));
    let before = draft.value(&item).map_err(failed)?.cloned();
    if before.is_some() && edit.change == EditKind::Add {
        return Err(failed(format!("{item} is there already; change it with 'keepctl {} edit {}'", item.kind.word(), item.name)));
    }
    if before.is_none() && edit.change != EditKind::Add {
        return Err(absent(&item, draft.after()));
    }
    match (edit.change, &edit.text) {
        (EditKind::Remove, None) if edit.values.is_empty() => draft.remove(&item).map_err(failed),
        (EditKind::Add | EditKind::Text, Some(text)) if edit.values.is_empty() => draft.set_text(&item, text).map_err(failed),
        (EditKind::Add | EditKind::Patch, None) => {
            let mut value = before.unwrap_or_else(|| Value::Object(Map::new()));
            config::patch(&mut value, &edit.values).map_err(|why| failed(format!("{item}: {why}")))?;
            draft.set(&item, &value).map_err(failed)
        }
        _ => Err(failed(format!("the edit of {item} has a text and values at once, or none of what it needs"))),
    }
}

fn changed<'a>(before: &'a Items, after: &'a Items) -> Vec<ChangedItem<'a>> {
    let names: BTreeSet<&ItemName> = before.keys().chain(after.keys()).collect();
    let all = names.into_iter().map(|item| ChangedItem { item, before: before.get(item), after: after.get(item) });
    all.filter(|item| item.before != item.after).collect()
}

/// An error where something that goes is named by something that stays.
fn is_unused(changed: &[ChangedItem<'_>], after: &Items) -> Result<()> {
    for gone in changed.iter().filter(|c| c.after.is_none()) {
        let users: Vec<String> =
            after.iter().filter(|(item, value)| references(item, value).contains(gone.item)).map(|(item, _)| item.to_string()).collect();
        if !users.is_empty() {
            return Err(Error::Failed(format!(
                "nothing was changed: {} is used by {}; have these use another one first",
                gone.item,
                users.join(", ")
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tables_of_the_files_are_edited() {
        for name in ["job.shop", "destination.a", "encryption.main", "settings.daemon", "access.access"] {
            assert!(editable(name).is_ok(), "{name}");
        }
        for name in ["settings.job", "schedule.shop", "access.x", "job", "job.", "cat.a"] {
            assert!(editable(name).is_err(), "{name}");
        }
    }
}
