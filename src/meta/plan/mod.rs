//! What an import does with each item: decided from what is here and what the file has, before anything is touched.
//!
//! In: the items here and what is known of their secrets, the envelope, the options. Out: for each item what becomes of it and why, the values that are
//! written, the secret files that are made, and all that keeps it from being applied. Nothing is read or written here: the same question has the same
//! answer. The envelope may be forged.

mod keys;
mod needs;
mod references;
#[cfg(test)]
mod tests;
mod values;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use jiff::Timestamp;
use keepd_protocol::configuration::{Allow, ImportMode, ItemAction, ItemConflict, PlannedItem};
use keepd_protocol::model::escape;
use serde_json::{Map, Value};

pub use self::keys::{DIRECTORY as SECRETS, Digest, Held, NewFile, Offered};
use self::keys::{Guarded, Settled};
pub use self::needs::{Items, Written, needs};
use self::references::mend;
pub use self::references::references;
use crate::config::{self, ItemKind, ItemName};
use crate::ledger::ScheduleState;
use crate::portable::envelope::{Envelope, Item};

/// How an import was asked for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options {
    pub mode: ImportMode,
    /// Of mode `selective`: `job.shop`, or `job` for all jobs.
    pub only: Vec<String>,
    pub on_conflict: ItemConflict,
    /// For single items, by their names.
    pub answers: BTreeMap<String, ItemConflict>,
    /// A missing dependency is a problem, not a reason to leave something out.
    pub strict: bool,
    pub allow: BTreeSet<Allow>,
}

/// What an import finds.
#[derive(Debug, Clone, Default)]
pub struct Here {
    /// Of the configuration's main file, absolute.
    pub directory: PathBuf,
    pub items: Items,
    /// Secrets of the items here.
    pub secrets: BTreeMap<ItemName, Vec<Held>>,
    /// What the places of secrets of the file's items give here.
    pub offered: BTreeMap<ItemName, Vec<Offered>>,
    /// Names in `secrets/` that are taken.
    pub taken: BTreeSet<String>,
    /// What the ledger knows, by job; jobs that it knows nothing of are not there.
    pub schedule: BTreeMap<String, ScheduleState>,
    pub now: Timestamp,
}

/// What an import does.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    pub items: Vec<PlannedItem>,
    /// Items with the values that they get.
    pub set: Vec<(ItemName, Value)>,
    pub remove: Vec<ItemName>,
    /// States of jobs in the ledger.
    pub schedule: Vec<(String, ScheduleState)>,
    /// Secret files that are made.
    pub files: Vec<NewFile>,
    /// Why it cannot be applied as it is; what needs leave is among them.
    pub problems: Vec<String>,
    pub needs: Vec<Allow>,
    /// Secrets that have to be entered, and where.
    pub missing: Vec<String>,
}

/// Decides what becomes of each item.
pub fn plan(here: &Here, envelope: &Envelope, options: &Options) -> Plan {
    let mut planner =
        Planner { here, options, incoming: Vec::new(), states: Vec::new(), removed: Vec::new(), kept: Vec::new(), out: Plan::default() };
    planner.take_in(envelope);
    planner.select();
    planner.decide();
    planner.leave_out();
    planner.remove(envelope);
    planner.settle();
    planner.states();
    planner.told()
}

/// An item of the file.
struct Incoming<'a> {
    name: ItemName,
    /// Its name here.
    to: ItemName,
    item: &'a Item,
    /// Its value, but for what stays this machine's own.
    asked: Cow<'a, Value>,
    /// What it names.
    references: BTreeSet<ItemName>,
    action: ItemAction,
    notes: Vec<String>,
    /// What it becomes here, where it is written.
    value: Option<Value>,
    needs: Vec<(Allow, String)>,
}

impl Incoming<'_> {
    fn is_written(&self) -> bool {
        matches!(self.action, ItemAction::Add | ItemAction::Overwrite | ItemAction::Rename)
    }

    fn told(&self) -> PlannedItem {
        PlannedItem {
            item: self.name.to_string(),
            action: self.action,
            to: (self.action == ItemAction::Rename).then(|| self.to.to_string()),
            notes: self.notes.clone(),
            ..PlannedItem::default()
        }
    }
}

/// The schedule state of a job, in the file.
struct State<'a> {
    job: &'a str,
    state: ScheduleState,
}

struct Planner<'a> {
    here: &'a Here,
    options: &'a Options,
    incoming: Vec<Incoming<'a>>,
    states: Vec<State<'a>>,
    removed: Vec<ItemName>,
    /// Only here, and needed by what stays.
    kept: Vec<(ItemName, ItemName)>,
    out: Plan,
}

impl<'a> Planner<'a> {
    fn problem(&mut self, text: impl Into<String>) {
        self.out.problems.push(text.into());
    }

    /// What can be an item at all.
    fn take_in(&mut self, envelope: &'a Envelope) {
        let mut seen = BTreeSet::new();
        for item in &envelope.items {
            let shown = escape(&format!("{}.{}", item.r#type, item.name)).chars().take(140).collect::<String>();
            let Some(kind) = item.kind() else {
                let known = ItemKind::ALL.map(|(_, word)| word).join(", ");
                self.problem(format!("{shown} is of no kind that a configuration has; there are {known}"));
                continue;
            };
            if !config::is_name(&item.name) || is_misnamed(kind, &item.name) {
                self.problem(format!("{shown} is no name that an item of its kind can have"));
                continue;
            }
            let name = ItemName::new(kind, item.name.as_str());
            if !seen.insert(name.clone()) {
                self.problem(format!("{shown} is in the file twice"));
                continue;
            }
            if kind == ItemKind::Schedule {
                match serde_json::from_value::<ScheduleState>(item.value.clone()) {
                    Ok(state) => self.states.push(State { job: &item.name, state: believable(state, self.here.now) }),
                    Err(_) => self.problem(format!("{shown} is no state of a schedule")),
                }
                continue;
            }
            if let Err(why) = values::check(&item.value) {
                self.problem(format!("{shown} cannot be in a configuration: {why}"));
                continue;
            }
            if self::references::are_too_many(&name, &item.value) {
                self.problem(format!("{shown} names more than {} others, as no item does", references::MOST));
                continue;
            }
            let offered = self.here.offered.get(&name).map(Vec::as_slice).unwrap_or_default();
            if offered.len() > MOST_SECRETS {
                self.problem(format!("{shown} names more than {MOST_SECRETS} secrets, as no item does"));
                continue;
            }
            for text in keys::wrong(item, offered) {
                self.problem(format!("{shown}: {text}"));
            }
            let (asked, notes) = with_own_place(self.here, &name, &item.value);
            self.incoming.push(Incoming {
                to: name.clone(),
                references: references(&name, &item.value),
                name,
                item,
                asked,
                action: ItemAction::Skip,
                notes,
                value: None,
                needs: Vec::new(),
            });
        }
    }

    /// Of mode `selective` only what was asked for.
    fn select(&mut self) {
        match (self.options.mode, self.options.only.is_empty()) {
            (ImportMode::Selective, true) => self.problem("mode selective needs the items that are wanted; name them with --only job.shop"),
            (ImportMode::Selective, false) => {}
            (_, false) => return self.problem("only the mode selective takes single items; say --mode selective, or leave --only out"),
            (_, true) => return,
        }
        let all: Vec<String> =
            self.incoming.iter().map(|i| i.name.to_string()).chain(self.states.iter().map(|s| format!("schedule.{}", s.job))).collect();
        let (mut kinds, mut names) = (BTreeSet::new(), BTreeSet::new());
        for wanted in &self.options.only {
            let (kind, name) = match wanted.split_once('.') {
                None => (ItemKind::from_word(wanted), None),
                Some((kind, name)) => (ItemKind::from_word(kind), Some(name)),
            };
            let item = kind.map(|kind| ItemName::new(kind, name.unwrap_or_default()));
            let is_there = item.as_ref().is_some_and(|item| match name {
                None => all.iter().any(|other| other.starts_with(&format!("{}.", item.kind.word()))),
                Some(_) => all.contains(&item.to_string()),
            });
            match item.filter(|_| is_there) {
                Some(item) if name.is_none() => drop(kinds.insert(item.kind)),
                Some(item) => drop(names.insert(item)),
                None => {
                    let kinds = ItemKind::ALL.iter().map(|(_, word)| *word);
                    let near = config::did_you_mean(wanted, all.iter().map(String::as_str).chain(kinds));
                    self.problem(format!("there is no '{}' in the file{near}", escape(wanted)));
                }
            }
        }
        let is_wanted = |item: &ItemName| kinds.contains(&item.kind) || names.contains(item);
        self.incoming.retain(|i| is_wanted(&i.name));
        self.states.retain(|s| is_wanted(&ItemName::new(ItemKind::Schedule, s.job)) || is_wanted(&ItemName::new(ItemKind::Job, s.job)));
    }

    /// What is added, what is here already, and what becomes of what differs.
    fn decide(&mut self) {
        let full = self.options.mode == ImportMode::Full;
        if full && (!matches!(self.options.on_conflict, ItemConflict::Skip | ItemConflict::Overwrite) || !self.options.answers.is_empty()) {
            self.problem("mode full replaces what differs; --on-conflict goes with the modes merge and selective");
        }
        let unknown: Vec<String> =
            self.options.answers.keys().filter(|name| !self.incoming.iter().any(|i| i.name.to_string() == **name)).cloned().collect();
        for name in unknown {
            self.problem(format!("there is an answer for '{}', which is not among what is imported", escape(&name)));
        }
        let mut names: BTreeSet<ItemName> = self.here.items.keys().cloned().chain(self.incoming.iter().map(|i| i.name.clone())).collect();
        let (here, options) = (self.here, self.options);
        for incoming in &mut self.incoming {
            let Some(old) = here.items.get(&incoming.name) else {
                let is_nothing = !incoming.notes.is_empty() && incoming.asked.as_object().is_some_and(Map::is_empty);
                incoming.action = if is_nothing { ItemAction::Skip } else { ItemAction::Add };
                continue;
            };
            let offered = here.offered.get(&incoming.name).map(Vec::as_slice).unwrap_or_default();
            let other_secrets = keys::differing(incoming.item, offered);
            let how = match full {
                true => ItemConflict::Overwrite,
                false => options.answers.get(&incoming.name.to_string()).copied().unwrap_or(options.on_conflict),
            };
            if values::same(old, &incoming.asked) && other_secrets.is_empty() {
                let elsewhere = keys::must_be_named_anew(incoming.item, offered, options.allow.contains(&Allow::KeyChange));
                incoming.action = if elsewhere && how == ItemConflict::Overwrite { ItemAction::Overwrite } else { ItemAction::Same };
                continue;
            }
            for at in other_secrets {
                incoming.notes.push(format!("{at} is another one in the file than here"));
            }
            let is_single = matches!(incoming.name.kind, ItemKind::Settings | ItemKind::Access);
            incoming.action = match how {
                ItemConflict::Overwrite => ItemAction::Overwrite,
                ItemConflict::Ask => ItemAction::Ask,
                ItemConflict::Rename if !is_single => match free_name(&incoming.name, &names) {
                    Some(free) => {
                        names.insert(free.clone());
                        incoming.to = free;
                        ItemAction::Rename
                    }
                    None => {
                        incoming.notes.push("skipped: no name is free that it could have".into());
                        ItemAction::Skip
                    }
                },
                ItemConflict::Rename => {
                    incoming
                        .notes
                        .push("skipped: there is one such table only, so it cannot come under another name; this machine's stays".into());
                    ItemAction::Skip
                }
                ItemConflict::Skip => {
                    incoming.notes.push("skipped: it differs from this machine's, which stays".into());
                    ItemAction::Skip
                }
            };
        }
    }

    /// Leaves out what names something that is neither here nor comes with it, and in turn what names that.
    fn leave_out(&mut self) {
        let comes = self.incoming.iter().filter(|i| i.action != ItemAction::Skip).map(|i| &i.name);
        let mut available: BTreeSet<ItemName> = comes.chain(self.here.items.keys()).cloned().collect();
        let in_file: BTreeSet<ItemName> = self.incoming.iter().map(|i| i.name.clone()).collect();
        let mut named_by: BTreeMap<ItemName, Vec<usize>> = BTreeMap::new();
        for (n, incoming) in self.incoming.iter().enumerate() {
            incoming.references.iter().for_each(|name| named_by.entry(name.clone()).or_default().push(n));
        }
        let mut open: BTreeSet<usize> = (0..self.incoming.len()).collect();
        while let Some(n) = open.pop_first() {
            let Some(incoming) = self.incoming.get_mut(n).filter(|i| i.is_written() || i.action == ItemAction::Ask) else { continue };
            let missing: Vec<&ItemName> = incoming.references.iter().filter(|name| !available.contains(*name)).collect();
            if missing.is_empty() {
                continue;
            }
            let list = missing.iter().map(|name| escape(&name.to_string())).collect::<Vec<_>>().join(", ");
            let which = match missing.iter().any(|name| in_file.contains(*name)) {
                true => "left out itself",
                false => "neither here nor among what is imported",
            };
            let text = format!("it needs {list}, which is {which}");
            let name = incoming.name.clone();
            incoming.action = ItemAction::Skip;
            incoming.to = name.clone();
            incoming.notes.push(format!("skipped: {text}"));
            if !self.here.items.contains_key(&name) {
                available.remove(&name);
                open.extend(named_by.get(&name).into_iter().flatten());
            }
            if self.options.strict {
                self.problem(format!("{name}: {text}; import it with it, or do without --strict to leave {name} out"));
            }
        }
    }

    /// Of mode `full`: what is only here goes, of the kinds that the file holds, unless something that stays needs it.
    fn remove(&mut self, envelope: &Envelope) {
        if self.options.mode != ImportMode::Full {
            return;
        }
        let mut kinds = BTreeSet::new();
        for word in envelope.export_type.split(',').map(str::trim) {
            match (word, ItemKind::from_word(word)) {
                ("all", _) => kinds.extend(ItemKind::ALL.iter().map(|(kind, _)| *kind)),
                (_, Some(kind)) => drop(kinds.insert(kind)),
                _ => self.problem(format!("the file says that it holds '{}', which is no kind of items", escape(word))),
            }
        }
        let in_file: BTreeSet<&ItemName> = self.incoming.iter().map(|i| &i.name).collect();
        let has_own_place = |name: &ItemName| {
            is_daemon(name) && OWN_PLACE.iter().any(|key| self.here.items.get(name).is_some_and(|old| old.get(key).is_some()))
        };
        let is_only_here = |name: &&ItemName| kinds.contains(&name.kind) && !in_file.contains(name) && !has_own_place(name);
        let mut removed: BTreeSet<ItemName> = self.here.items.keys().filter(is_only_here).cloned().collect();
        let written: BTreeSet<&ItemName> = self.incoming.iter().filter(|i| i.is_written()).map(|i| &i.name).collect();
        let coming = self.incoming.iter().filter(|i| i.is_written()).map(|i| (&i.name, Cow::Borrowed(&i.references)));
        let staying = self.here.items.iter().filter(|(name, _)| !removed.contains(*name) && !written.contains(name));
        let mut open: Vec<_> = coming.chain(staying.map(|(name, value)| (name, Cow::Owned(references(name, value))))).collect();
        while let Some((by, names)) = open.pop() {
            for needed in names.iter().filter_map(|name| removed.take(name)) {
                if let Some((name, value)) = self.here.items.get_key_value(&needed) {
                    open.push((name, Cow::Owned(references(name, value))));
                }
                self.kept.push((needed, by.clone()));
            }
        }
        self.removed = removed.into_iter().collect();
    }

    /// What is written, and what it needs.
    fn settle(&mut self) {
        let renamed: BTreeMap<ItemName, ItemName> =
            self.incoming.iter().filter(|i| i.action == ItemAction::Rename).map(|i| (i.name.clone(), i.to.clone())).collect();
        let skipped: BTreeSet<ItemName> = self.incoming.iter().filter(|i| i.action == ItemAction::Skip).map(|i| i.name.clone()).collect();
        let mut settled = Settled::new(self.here, self.options);
        for incoming in &mut self.incoming {
            let offered = self.here.offered.get(&incoming.name).map(Vec::as_slice).unwrap_or_default();
            if incoming.is_written() {
                let mut value = incoming.asked.clone().into_owned();
                mend(&incoming.name, &mut value, &renamed);
                for name in &incoming.references {
                    if let Some(to) = renamed.get(name) {
                        incoming.notes.push(format!("it names {to} instead of {name}"));
                    } else if skipped.contains(name) {
                        incoming.notes.push(format!("it names {name}, which is this machine's and differs from the file's"));
                    }
                }
                settled.secrets(&incoming.to, incoming.item, offered, &mut value, &mut incoming.notes);
                incoming.value = Some(value);
            } else if incoming.action == ItemAction::Same {
                settled.secrets_of_same(&incoming.name, incoming.item, offered, &mut incoming.notes);
            }
        }
        let (files, missing, problems) = settled.finish();
        self.out.files = files;
        self.out.missing = missing;
        self.out.problems.extend(problems);

        let mut after = self.here.items.clone();
        after.retain(|name, _| !self.removed.contains(name));
        after.extend(self.incoming.iter().filter_map(|i| Some((i.to.clone(), i.value.clone()?))));
        let guarded = Guarded::of(self.here);
        for incoming in &mut self.incoming {
            let Some(value) = &incoming.value else { continue };
            let before = self.here.items.get(&incoming.to);
            let written = Written { item: &incoming.to, before, after: value, all_before: &self.here.items, all_after: &after };
            incoming.needs = needs::needs(&written);
            incoming.needs.extend(keys::needs(self.here, &incoming.name, incoming.action, incoming.item, value));
            self.out.problems.extend(guarded.refused(self.here, &incoming.name, incoming.item, value));
            incoming.notes.extend(needs::notes(&written));
            let used = |d: &ItemName| self.here.items.get(d).zip(after.get(d)).is_some_and(|(old, new)| old == new);
            if incoming.action == ItemAction::Rename && incoming.name.kind == ItemKind::Destination && used(&incoming.name) {
                let is_same_place = self.here.items.get(&incoming.name).is_some_and(|old| !needs::is_elsewhere(old, value));
                if is_same_place {
                    incoming
                        .notes
                        .push(format!("it is the same place as {}, and two destinations cannot share one directory", incoming.name));
                }
            }
        }
    }

    /// Whose schedule goes on where it was.
    fn states(&mut self) {
        let jobs = self.incoming.iter().filter(|i| i.name.kind == ItemKind::Job);
        let jobs: BTreeMap<String, (ItemAction, ItemName)> = jobs.map(|i| (i.name.name.clone(), (i.action, i.to.clone()))).collect();
        for State { job, state } in std::mem::take(&mut self.states) {
            let name = ItemName::new(ItemKind::Job, job);
            let item = format!("schedule.{job}");
            let incoming = jobs.get(job);
            let is_here = self.here.items.contains_key(&name) && !self.removed.contains(&name);
            let (target, is_new) = match incoming.map(|(action, to)| (*action, to)) {
                Some((ItemAction::Add, to)) => (Some(to.name.clone()), true),
                Some((ItemAction::Rename, to)) => (Some(to.name.clone()), true),
                Some((ItemAction::Same, to)) => (Some(to.name.clone()), false),
                Some(_) => (None, false),
                None => (is_here.then(|| job.to_owned()), false),
            };
            let old = target.as_ref().and_then(|target| self.here.schedule.get(target));
            let is_newer = |old: &ScheduleState| old.schedule == state.schedule && old.last_due >= state.last_due;
            let (action, note) = match (&target, old) {
                (None, _) if incoming.is_some() || is_here => (ItemAction::Skip, "the job's own state on this machine stays"),
                (None, _) => (ItemAction::Skip, "skipped: its job is neither here nor among what is imported"),
                (Some(_), Some(old)) if *old == state => (ItemAction::Same, ""),
                (Some(_), Some(_)) if !is_new => (ItemAction::Skip, "the job's own state on this machine stays"),
                (Some(_), Some(old)) if is_newer(old) => {
                    (ItemAction::Skip, "what this machine knows of a job of that name is newer, and stays")
                }
                (Some(_), Some(_)) => (ItemAction::Overwrite, ""),
                (Some(target), None) if target != job => (ItemAction::Rename, ""),
                (Some(_), None) => (ItemAction::Add, ""),
            };
            let to = target.as_ref().filter(|target| *target != job).map(|target| format!("schedule.{target}"));
            if let Some(target) = target.filter(|_| !matches!(action, ItemAction::Skip | ItemAction::Same)) {
                self.out.schedule.push((target, state));
            }
            let notes = if note.is_empty() { Vec::new() } else { vec![note.to_owned()] };
            self.out.items.push(PlannedItem { item, action, to, notes, ..PlannedItem::default() });
        }
    }

    /// All of it, in words.
    fn told(mut self) -> Plan {
        let mut told = Vec::new();
        let mut lacking: BTreeMap<Allow, Vec<String>> = BTreeMap::new();
        let mut waiting = Vec::new();
        let mut most_told = MOST_TOLD;
        for incoming in &self.incoming {
            let mut item = incoming.told();
            let old = self.here.items.get(&incoming.to);
            item.changes = match incoming.action {
                ItemAction::Same => Vec::new(),
                _ => values::changes(old, Some(incoming.value.as_ref().unwrap_or(&incoming.asked)), most_told.min(MOST_TOLD_OF_ONE)),
            };
            most_told = most_told.saturating_sub(item.changes.len());
            for (allow, why) in &incoming.needs {
                if !item.needs.contains(allow) {
                    item.needs.push(*allow);
                }
                item.notes.push(format!("{}: {why}", allow.as_str()));
                if !self.options.allow.contains(allow) {
                    lacking.entry(*allow).or_default().push(format!("{} ({why})", incoming.to));
                }
            }
            if incoming.action == ItemAction::Ask {
                waiting.push(incoming.name.to_string());
            }
            told.push(item);
        }
        for name in &self.removed {
            let notes = match name.kind {
                ItemKind::Settings => vec!["its defaults count then".to_owned()],
                ItemKind::Job => vec!["what it backed up stays at its destinations, and is no longer added to".to_owned()],
                _ => Vec::new(),
            };
            let changes = values::changes(self.here.items.get(name), None, MOST_TOLD_OF_ONE);
            told.push(PlannedItem { item: name.to_string(), action: ItemAction::Remove, notes, changes, ..PlannedItem::default() });
        }
        for (name, by) in &self.kept {
            let notes = vec![format!("only here, and kept: {by} needs it")];
            told.push(PlannedItem { item: name.to_string(), action: ItemAction::Skip, notes, ..PlannedItem::default() });
        }
        told.append(&mut self.out.items);
        if !waiting.is_empty() {
            self.problem(format!(
                "what is here already differs, and each needs an answer (skip, rename or overwrite): {}",
                waiting.join(", ")
            ));
        }
        for (allow, why) in lacking {
            self.problem(format!("not without --allow-{}: {}", allow.as_str(), why.join("; ")));
            self.out.needs.push(allow);
        }
        self.out.items = told;
        self.out.remove = self.removed;
        self.out.set = self.incoming.into_iter().filter_map(|i| Some((i.to, i.value?))).collect();
        self.out
    }
}

/// No item names more secrets.
pub const MOST_SECRETS: usize = 1000;
/// What is told of what differs, of all items and of each.
const MOST_TOLD: usize = 50_000;
const MOST_TOLD_OF_ONE: usize = 1000;

/// Where a daemon is, which no other machine knows.
const OWN_PLACE: [&str; 2] = ["state_dir", "socket"];

fn is_daemon(name: &ItemName) -> bool {
    name.kind == ItemKind::Settings && name.name == "daemon"
}

/// A value as it is asked for: where something is configured here, the daemon keeps its state and its socket, said or not.
fn with_own_place<'a>(here: &Here, name: &ItemName, value: &'a Value) -> (Cow<'a, Value>, Vec<String>) {
    let (mut asked, mut notes) = (Cow::Borrowed(value), Vec::new());
    if !is_daemon(name) || here.items.is_empty() {
        return (asked, notes);
    }
    for key in OWN_PLACE {
        let mine = here.items.get(name).and_then(|old| old.get(key));
        if mine == value.get(key) {
            continue;
        }
        let Some(table) = asked.to_mut().as_object_mut() else { continue };
        match mine {
            Some(mine) => {
                table.insert(key.to_owned(), mine.clone());
                notes.push(format!("{key} stays {}", values::show(key, mine)));
            }
            None => {
                table.remove(key);
                notes.push(format!("{key} stays what it is here by default"));
            }
        }
    }
    (asked, notes)
}

/// Names that would stand for something else than they seem to: `settings.job` for all jobs, a profile `none`.
fn is_misnamed(kind: ItemKind, name: &str) -> bool {
    let is_word = ItemKind::ALL.iter().any(|(_, word)| *word == name);
    match kind {
        ItemKind::Settings => is_word,
        ItemKind::Access => name != "access",
        ItemKind::Encryption => name == "none",
        _ => false,
    }
}

/// `shop-2`, `shop-3`: the first that nothing has.
fn free_name(item: &ItemName, taken: &BTreeSet<ItemName>) -> Option<ItemName> {
    (2..10_000).find_map(|n| {
        let suffix = format!("-{n}");
        // A name is ASCII.
        let base: String = item.name.chars().take(64usize.saturating_sub(suffix.len())).collect();
        let free = ItemName::new(item.kind, base + &suffix);
        (config::is_name(&free.name) && !taken.contains(&free)).then_some(free)
    })
}

/// Times that have not come yet would keep a job from being overdue (the scheduler itself does not believe such a due time). What another machine ran
/// is not known here.
fn believable(mut state: ScheduleState, now: Timestamp) -> ScheduleState {
    for time in [&mut state.first_seen, &mut state.last_start, &mut state.last_good] {
        *time = time.filter(|time| *time <= now);
    }
    state.last_run = None;
    state.paused_until = None;
    state.once.clear();
    (state.retry, state.ahead, state.leaps) = Default::default();
    state
}
