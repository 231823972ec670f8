//! An import, made: what the plan needs to know is found out, the change is drafted and checked, and then applied whole or not at all.
//!
//! In: the configuration's texts, the ledger, an envelope. Out: the plan for people; and, once it is wanted so, new secret files, the texts and the
//! ledger's schedule states, in that order. Whatever fails, the new files go again and all else is as it was.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use jiff::Timestamp;
use keepd_protocol::configuration::ConfigPlan;
use keepd_protocol::model::escape;
use serde_json::Value;

use super::plan::{self, Digest, Held, Here, NewFile, Offered, Options, SECRETS};
use super::secret_files::SecretFiles;
use super::secrets;
use crate::config::{Config, Draft, ItemKind, ItemName, Problem, SecretSource, Texts};
use crate::ledger::{Ledger, ScheduleState};
use crate::machine;
use crate::portable::envelope::{Envelope, SecretKind};

/// An import that was thought through, and is not made yet.
pub struct Prepared {
    plan: ConfigPlan,
    draft: Draft,
    files: Vec<NewFile>,
    schedule: Vec<(String, ScheduleState)>,
    /// Of the plan's problems those of this machine: what the configuration refers to is not here. They are the last ones.
    of_machine: Vec<String>,
}

/// Thinks an import through; nothing is changed. An error is one of what is here; what is wrong with the file is a problem of the plan.
pub fn prepare(texts: Texts, ledger: &Ledger, envelope: &Envelope, options: &Options) -> Result<Prepared, String> {
    let base = texts.digest();
    let here = look(&texts, ledger, envelope)?;
    let directory = here.directory.clone();
    let planned = plan::plan(&here, envelope, options);

    let mut draft = Draft::of(texts);
    let mut problems = planned.problems;
    problems.extend(planned.remove.iter().filter_map(|item| draft.remove(item).err()));
    problems.extend(planned.set.iter().filter_map(|(item, value)| draft.set(item, value).err()));
    let mut of_machine = Vec::new();
    match draft.after().load() {
        Err(wrong) => problems.extend(wrong.0.iter().map(|p| format!("the configuration would be wrong: {p}"))),
        Ok(config) => {
            let coming: BTreeSet<PathBuf> = planned.files.iter().map(|file| directory.join(&file.name)).collect();
            of_machine = lacks(config, &coming);
        }
    }
    problems.extend(of_machine.iter().cloned());
    let plan = ConfigPlan {
        items: planned.items,
        problems,
        needs: planned.needs,
        missing: planned.missing,
        diff: draft.diff(),
        files: planned.files.iter().map(|file| escape(&directory.join(&file.name).to_string_lossy())).collect(),
        base,
    };
    Ok(Prepared { plan, draft, files: planned.files, schedule: planned.schedule, of_machine })
}

impl Prepared {
    pub fn plan(&self) -> &ConfigPlan {
        &self.plan
    }

    /// The texts as they will be.
    pub fn after(&self) -> &Texts {
        self.draft.after()
    }

    /// The files that secrets will be put into.
    pub fn secret_files(&self) -> Vec<PathBuf> {
        let directory = self.draft.after().directory();
        self.files.iter().map(|file| directory.join(&file.name)).collect()
    }

    /// What keeps it from being made on any machine; what this one lacks is not among it.
    pub fn obstacles(&self) -> Vec<&str> {
        self.plan.problems.iter().filter(|problem| !self.of_machine.contains(problem)).map(String::as_str).collect()
    }

    /// Whether nothing at all would change.
    #[cfg(test)]
    pub fn is_nothing(&self) -> bool {
        self.draft.is_nothing() && self.files.is_empty() && self.schedule.is_empty()
    }

    /// Makes the change; the texts of before are kept in the directory `previous`. An error names what kept it from being made, and nothing was changed.
    pub fn apply(self, previous: &Path, ledger: &Ledger) -> Result<(), String> {
        self.make(previous, ledger, true).map(drop)
    }

    /// The same where no daemon runs yet: what this machine lacks is no reason to change nothing. It is told.
    pub fn apply_anyway(self, previous: &Path, ledger: &Ledger) -> Result<Vec<String>, String> {
        self.make(previous, ledger, false)
    }

    fn make(self, previous: &Path, ledger: &Ledger, whole: bool) -> Result<Vec<String>, String> {
        let counts = |problem: &&String| whole || !self.of_machine.contains(problem);
        let problems: Vec<&str> = self.plan.problems.iter().filter(counts).map(String::as_str).collect();
        if !problems.is_empty() {
            return Err(format!("nothing was changed: {}", problems.join("; ")));
        }
        let nothing = |why: String| format!("nothing was changed: {why}");
        let files = SecretFiles::write(&self.draft.after().directory(), &self.files).map_err(nothing)?;
        // Now with the keys that came along.
        let config = self.draft.after().load().map_err(|wrong| nothing(wrong.to_string()))?;
        let lacks = lacks(config, &BTreeSet::new());
        if whole && !lacks.is_empty() {
            return Err(nothing(lacks.join("; ")));
        }
        let own = ledger.schedule_states().map_err(|e| nothing(e.to_string()))?;
        let mut schedule = self.schedule;
        for (job, state) in &mut schedule {
            // What this machine was asked to do once, it does, and what failed here is tried again.
            (state.once, state.retry) = own.get(job).map(|own| (own.once.clone(), own.retry.clone())).unwrap_or_default();
        }
        let new: Vec<(&str, Option<&ScheduleState>)> = schedule.iter().map(|(job, state)| (job.as_str(), Some(state))).collect();
        let old = ledger.replace_schedule_states(&new).map_err(|e| nothing(e.to_string()))?;
        if !self.draft.is_nothing()
            && let Err(why) = self.draft.commit(previous)
        {
            let old: Vec<(&str, Option<&ScheduleState>)> = old.iter().map(|(job, state)| (job.as_str(), state.as_ref())).collect();
            return Err(match ledger.replace_schedule_states(&old) {
                Ok(_) => why,
                Err(error) => format!("{why}; besides, the schedule states of the jobs that were to come stay in the ledger: {error}"),
            });
        }
        files.keep();
        Ok(lacks)
    }
}

/// What a reload would refuse, but for files that are still to come.
fn lacks(config: Config, coming: &BTreeSet<PathBuf>) -> Vec<String> {
    let profiles_to_come: BTreeSet<String> = config
        .encryption
        .values()
        .filter(|profile| {
            let key = match &profile.key {
                crate::config::KeySource::File(path) => Some(path),
                crate::config::KeySource::Passphrase(SecretSource::File(path)) => Some(path),
                crate::config::KeySource::Token(token) => match &token.pin {
                    Some(SecretSource::File(path)) => Some(path),
                    _ => None,
                },
                _ => None,
            };
            key.into_iter().chain(&profile.retired).chain(&profile.public_key).any(|path| coming.contains(path))
        })
        .map(|profile| format!("encryption.{}.", profile.name))
        .collect();
    let comes = |problem: &Problem| profiles_to_come.iter().any(|prefix| problem.key.starts_with(prefix.as_str()));
    let errors = machine::check(config).errors;
    errors
        .iter()
        .filter(|p| !comes(p))
        .map(|p| format!("{p}; keepd would refuse the configuration, so put that right and import again"))
        .collect()
}

/// All that the planner has to know.
fn look(texts: &Texts, ledger: &Ledger, envelope: &Envelope) -> Result<Here, String> {
    let directory = texts.directory();
    let items: BTreeMap<ItemName, Value> = match texts.items() {
        Ok(items) => items.into_iter().map(|(name, (_, value))| (name, value)).collect(),
        Err(wrong) => return Err(format!("the configuration here cannot be made out, so nothing can be imported into it: {wrong}")),
    };
    let digest = |named: &secrets::Named| secrets::read(named).ok().map(|text| Digest::of(&text));
    let held = |(name, value): (&ItemName, &Value)| {
        let held = secrets::of(name, value, &directory).into_iter().map(|named| Held { text: digest(&named), named });
        (name.clone(), held.collect::<Vec<_>>())
    };
    let held: BTreeMap<ItemName, Vec<Held>> = items.iter().map(held).collect();
    let places = Places::of(&directory, &items, &held, envelope);
    let mut offered = BTreeMap::new();
    for item in &envelope.items {
        let Some(kind) = item.kind() else { continue };
        let name = ItemName::new(kind, item.name.as_str());
        let all = secrets::of(&name, &item.value, &directory).into_iter().take(plan::MOST_SECRETS + 1).map(|named| {
            let text = secrets::read(&named).ok();
            let is_key = named.kind == SecretKind::Secret && text.as_ref().is_some_and(|text| secrets::is_key(text));
            Offered { here: text.map(|text| Digest::of(&text)), is_key, place: places.place(named.kind, &named.source), named }
        });
        offered.insert(name, all.collect());
    }
    let taken = match std::fs::read_dir(directory.join(SECRETS)) {
        Ok(list) => list.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect(),
        Err(_) => BTreeSet::new(),
    };
    let schedule = ledger.schedule_states().map_err(|e| e.to_string())?;
    Ok(Here { directory, items, secrets: held, offered, taken, schedule, now: Timestamp::now() })
}

/// Where secret files may be made: in the configuration's directory, and nowhere in it where a file would mean something else.
struct Places<'a> {
    directory: &'a Path,
    /// Directories that hold secrets already.
    known: BTreeSet<&'a Path>,
    /// The state of keepd, and repositories.
    never: Vec<PathBuf>,
}

impl<'a> Places<'a> {
    fn of(directory: &'a Path, items: &BTreeMap<ItemName, Value>, held: &'a BTreeMap<ItemName, Vec<Held>>, envelope: &Envelope) -> Self {
        let known = held.values().flatten().filter(|h| h.text.is_some()).filter_map(|h| match &h.named.source {
            SecretSource::File(path) => path.parent(),
            _ => None,
        });
        let in_file = envelope.items.iter().filter_map(|item| Some((item.kind()?, &item.value)));
        let all = items.iter().map(|(name, value)| (name.kind, value)).chain(in_file);
        let never = all.flat_map(|(kind, value)| {
            let keys: &[&str] = match kind {
                ItemKind::Settings => &["state_dir", "socket"],
                ItemKind::Destination => &["root"],
                _ => &[],
            };
            keys.iter()
                .filter_map(|key| value.get(key)?.as_str())
                .map(|text| Path::new(text).components().collect::<PathBuf>())
                .collect::<Vec<_>>()
        });
        Self { directory, known: known.collect(), never: never.collect() }
    }

    /// The name of a file below the directory that a reference looks for, where one can be made.
    /// A file may mean something to others by its name alone: where /etc/keepd.toml is the main file, all that is in its directory does.
    fn place(&self, kind: SecretKind, source: &SecretSource) -> Option<String> {
        let SecretSource::File(path) = source else { return None };
        let below = path.strip_prefix(self.directory).ok()?;
        let names = below.components().map(|component| match component {
            Component::Normal(name) => {
                name.to_str().filter(|name| !name.starts_with('.') && name.len() < 200 && !name.chars().any(char::is_control))
            }
            _ => None,
        });
        let names: Vec<&str> = names.collect::<Option<_>>()?;
        let (first, last) = (names.first()?, names.last()?);
        // A table of the configuration, and what an editor or keepd itself may keep beside one.
        let is_table = *first == "conf.d" || last.to_ascii_lowercase().contains(".toml");
        if is_table || names.len() > 8 || self.never.iter().any(|never| path.starts_with(never) || never.starts_with(path)) {
            return None;
        }
        let is_usual = names.len() > 1 && [SECRETS, "keys"].contains(first);
        let ends_with = |ends: &[&str]| ends.iter().any(|end| last.ends_with(end));
        let is_right = match (kind, names.len()) {
            _ if is_usual => true,
            // What is in it is a key and nothing else.
            (SecretKind::KeyFile | SecretKind::PublicKey, 1) => ends_with(&[".key", ".pub"]),
            (SecretKind::KeyFile | SecretKind::PublicKey, _) => true,
            (SecretKind::Secret, 1) => ends_with(&[".key"]),
            (SecretKind::Secret, _) => ends_with(&[".key"]) || path.parent().is_some_and(|parent| self.known.contains(parent)),
        };
        if !is_right {
            return None;
        }
        let mut so_far = self.directory.to_owned();
        for (n, name) in names.iter().enumerate() {
            so_far.push(name);
            match so_far.symlink_metadata() {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Some(names.join("/")),
                Err(_) => return None,
                // A directory that is there may be anybody's, with files that mean something.
                Ok(found) if n + 1 < names.len() && found.is_dir() && (is_usual || self.known.contains(so_far.as_path())) => {}
                Ok(_) => return None,
            }
        }
        None
    }
}

/// Those of some names for which a secret file could be made in a directory.
#[cfg(test)]
pub(super) fn places_of_tests(directory: &Path, kind: SecretKind, names: &[&str]) -> Vec<String> {
    let held = BTreeMap::new();
    let no_items = Envelope {
        format_version: 1,
        keepd_version: String::new(),
        export_type: String::new(),
        exported_at: Timestamp::UNIX_EPOCH,
        instance: String::new(),
        item_count: 0,
        includes_secrets: false,
        items: Vec::new(),
    };
    let places = Places::of(directory, &BTreeMap::new(), &held, &no_items);
    names.iter().filter_map(|name| places.place(kind, &SecretSource::File(directory.join(name)))).collect()
}
