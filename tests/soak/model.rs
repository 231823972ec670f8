//! What must be true of keepd's backups: which there are, where, of what, and which of them may go.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::Value;

use super::database::Moments;
use super::tree::Picture;

/// What the sources of a job were.
#[derive(Debug, Clone, Default)]
pub struct Truth {
    pub trees: BTreeMap<String, Picture>,
    pub databases: BTreeMap<String, Moments>,
    /// What commands print.
    pub printed: BTreeMap<String, Vec<u8>>,
}

#[derive(Debug, Clone)]
pub struct Backup {
    pub id: String,
    pub job: String,
    pub time: Timestamp,
    /// "manual", "imported", "pre-restore".
    pub kind: String,
    pub outcome: String,
    pub proven: Option<String>,
    pub pinned: bool,
    pub sources: Vec<String>,
    pub truth: Arc<Truth>,
    pub on: BTreeSet<String>,
    /// Where it was and was removed on purpose, by somebody or a rule: it does not come back by itself.
    pub removed: BTreeSet<String>,
}

/// A backup that may turn up.
#[derive(Debug, Clone)]
pub struct Expected {
    pub job: String,
    pub kind: &'static str,
    /// When it was made.
    pub time: RangeInclusive<Timestamp>,
    pub truth: Arc<Truth>,
}

/// What a step may do to the list of backups.
#[derive(Debug, Clone, Default)]
pub struct Permit {
    /// These may go from there.
    pub go: BTreeSet<(String, String)>,
    /// And these must be gone afterwards.
    pub must_go: BTreeSet<(String, String)>,
    /// Copies may come there, also of what was removed there before.
    pub come: BTreeSet<(String, String)>,
    /// Backups that may be new.
    pub new: Vec<Expected>,
    /// Pins and acceptances may be so or so (the step was broken off).
    pub marks: BTreeSet<String>,
    /// Nobody knows what was removed before.
    pub state_lost: bool,
    /// A destination that is no longer configured, or is again.
    pub destination: Option<String>,
    /// May have become suspect.
    pub suspect: bool,
}

/// How many of a job's backups stay at a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    pub keep_last: usize,
    /// Another rule of before that is in force as well until somebody confirms this one.
    pub pending: Option<usize>,
    /// It may be in force, or wait to be confirmed: the test does not know.
    pub unsure: bool,
}

#[derive(Default)]
pub struct Model {
    pub backups: Vec<Backup>,
    /// By job and destination. Without one everything stays.
    pub rules: BTreeMap<(String, String), Rule>,
    pub destinations: BTreeSet<String>,
    /// A state was lost: where a proof was not written down, nobody knows of it there any more.
    pub state_lost: bool,
}

impl Model {
    pub fn get(&self, id: &str) -> Option<&Backup> {
        self.backups.iter().find(|b| b.id == id)
    }

    pub fn get_mut(&mut self, id: &str) -> Option<&mut Backup> {
        self.backups.iter_mut().find(|b| b.id == id)
    }

    /// Those that are somewhere.
    pub fn there(&self) -> impl Iterator<Item = &Backup> {
        self.backups.iter().filter(|b| !b.on.is_empty())
    }

    /// How many good ones of its job there are newer than this one at that destination: what rules count.
    fn newer(&self, backup: &Backup, destination: &str) -> usize {
        self.counted(&backup.job, destination).filter(|b| b.time > backup.time).count()
    }

    fn counted<'a>(&'a self, job: &'a str, destination: &'a str) -> impl Iterator<Item = &'a Backup> {
        self.backups.iter().filter(move |b| b.job == job && b.on.contains(destination) && b.kind == "manual" && b.outcome == "good")
    }

    /// A job's rule is another one now.
    pub fn rule_changed(&mut self, job: &str, destination: &str, keep_last: usize) {
        let there = self.counted(job, destination).count();
        let before = self.rules.get(&(job.to_owned(), destination.to_owned())).copied();
        // What removes no more than the rule of before is in force at once.
        let stricter = before.map(|r| r.pending.unwrap_or(0).max(r.keep_last)).filter(|before| *before > keep_last);
        let pending = stricter.filter(|_| there > keep_last);
        let unsure = before.is_some_and(|r| r.unsure) || (stricter.is_some() && pending.is_none());
        self.rules.insert((job.into(), destination.into()), Rule { keep_last, pending, unsure });
    }

    /// A job that comes back: what it would remove is asked for.
    pub fn rule_is_new(&mut self, job: &str, destination: &str, keep_last: usize) {
        let pending = (self.counted(job, destination).count() > keep_last).then_some(usize::MAX);
        self.rules.insert((job.into(), destination.into()), Rule { keep_last, pending, unsure: true });
    }

    pub fn rules_confirmed(&mut self, job: &str) {
        self.rules.iter_mut().filter(|((j, _), _)| j == job).for_each(|(_, rule)| {
            rule.pending = None;
            rule.unsure = false;
        });
    }

    pub fn state_was_lost(&mut self) {
        self.state_lost = true;
        self.rules.values_mut().for_each(|rule| rule.pending = Some(usize::MAX));
        self.look_at_rules();
        self.backups.iter_mut().for_each(|b| b.removed.clear());
    }

    /// Takes over what `keepctl list` says, when nothing in it breaks a rule. Gives the new ones, or what is wrong.
    pub fn judge(&mut self, list: &Value, permit: &Permit) -> Result<Vec<String>, String> {
        let list = list.as_array().ok_or("the list is no list")?;
        if permit.state_lost {
            self.state_was_lost();
        }
        let mut seen = BTreeSet::new();
        let mut new = Vec::new();
        let before = self.backups.clone();
        for line in list {
            let text = |key: &str| line[key].as_str().unwrap_or_default().to_owned();
            let id = text("id");
            let time: Timestamp = text("time").parse().map_err(|e| format!("{line}: {e}"))?;
            if !seen.insert(id.clone()) {
                return Err(format!("{id} is listed twice"));
            }
            let on = line["destinations"].as_array().into_iter().flatten().map(|d| d["name"].as_str().unwrap().to_owned()).collect();
            let sources: Vec<String> =
                line["sources"].as_array().into_iter().flatten().map(|s| s.as_str().unwrap_or_default().to_owned()).collect();
            if let Some(status) = line["destinations"].as_array().into_iter().flatten().find(|d| d["status"] != "present") {
                return Err(format!("{id}: {status}"));
            }
            if self.get(&id).is_none() {
                let mut allowed = permit.new.iter();
                let truth = allowed
                    .find(|e| e.job == text("job") && e.kind == text("type") && e.time.contains(&time))
                    .map(|e| e.truth.clone())
                    .ok_or_else(|| format!("nobody made {line}"))?;
                new.push(id.clone());
                self.backups.push(Backup {
                    id,
                    job: text("job"),
                    time,
                    kind: text("type"),
                    outcome: text("outcome"),
                    proven: line["proven"].as_str().map(str::to_owned),
                    pinned: line["pinned"] == true,
                    sources,
                    truth,
                    on,
                    removed: BTreeSet::new(),
                });
                continue;
            }
            let backup = self.backups.iter_mut().find(|b| b.id == id).ok_or("gone")?;
            for destination in on.difference(&backup.on) {
                let here = (id.clone(), destination.clone());
                if backup.removed.contains(destination) && !permit.come.contains(&here) {
                    return Err(format!("{id} of {} was removed from {destination}, and is there again", backup.job));
                }
                backup.removed.remove(destination);
            }
            backup.on = on;
            for (what, was, is) in [
                ("job", &backup.job, text("job")),
                ("type", &backup.kind, text("type")),
                ("time", &backup.time.to_string(), time.to_string()),
                ("sources", &backup.sources.join(","), sources.join(",")),
            ] {
                if *was != is {
                    return Err(format!("{id}: {what} was {was} and is {is}"));
                }
            }
            if backup.pinned != (line["pinned"] == true) && !permit.marks.contains(&id) {
                return Err(format!("{id}: pinned was {} and is {}", backup.pinned, line["pinned"]));
            }
            backup.pinned = line["pinned"] == true;
            let outcome = text("outcome");
            if backup.outcome != outcome && !(permit.marks.contains(&id) && outcome == "good" || permit.suspect) {
                return Err(format!("{id}: it was {} and is {outcome}", backup.outcome));
            }
            backup.outcome = outcome;
            backup.proven = line["proven"].as_str().map(str::to_owned);
        }
        self.backups.iter_mut().filter(|b| !seen.contains(&b.id)).for_each(|b| b.on.clear());
        self.judge_what_went(&before, permit)?;
        self.judge_what_had_to_go(permit)?;
        Ok(new)
    }

    fn judge_what_went(&mut self, before: &[Backup], permit: &Permit) -> Result<(), String> {
        let mut removed = Vec::new();
        for was in before {
            let is = self.get(&was.id).ok_or("a backup is forgotten")?;
            for destination in was.on.difference(&is.on) {
                if permit.destination.as_ref() == Some(destination) {
                    continue;
                }
                removed.push((was.id.clone(), destination.clone()));
                if permit.go.contains(&(was.id.clone(), destination.clone())) {
                    continue;
                }
                let rule = self.rules.get(&(was.job.clone(), destination.clone()));
                let newer = self.newer(was, destination);
                let by_rule = rule.is_some_and(|r| newer >= r.keep_last.max(r.pending.unwrap_or(0)));
                let newest_proven = self.newest_proven(before, was, destination) && (!self.state_lost || is.on.is_empty());
                if !by_rule || was.pinned || was.kind != "manual" || newest_proven {
                    return Err(format!(
                        "{} of {} ({}, {}, pinned: {}) is gone from {destination}, where {newer} newer good ones are and the rule is {rule:?}; the newest proven one: {newest_proven}",
                        was.id, was.job, was.kind, was.outcome, was.pinned
                    ));
                }
            }
        }
        for (id, destination) in removed {
            if let Some(backup) = self.get_mut(&id) {
                backup.removed.insert(destination);
            }
        }
        Ok(())
    }

    fn newest_proven(&self, before: &[Backup], backup: &Backup, destination: &str) -> bool {
        let proven = before.iter().filter(|b| {
            b.job == backup.job && b.proven.is_some() && b.on.contains(destination) && b.kind == "manual" && b.outcome == "good"
        });
        let newer_now = self.counted(&backup.job, destination).any(|b| b.proven.is_some() && b.time > backup.time);
        !newer_now && proven.max_by_key(|b| b.time).is_some_and(|b| b.id == backup.id)
    }

    fn judge_what_had_to_go(&mut self, permit: &Permit) -> Result<(), String> {
        for (id, destination) in &permit.must_go {
            if self.get(id).is_some_and(|b| b.on.contains(destination)) {
                return Err(format!("{id} was removed from {destination}, and is there"));
            }
            if let Some(backup) = self.get_mut(id) {
                backup.removed.insert(destination.clone());
            }
        }
        self.look_at_rules();
        Ok(())
    }

    /// A rule that removes nothing more now than the one before may be in force without a word.
    fn look_at_rules(&mut self) {
        let all: Vec<_> = self.rules.iter().filter(|(_, rule)| rule.pending.is_some()).map(|(key, rule)| (key.clone(), *rule)).collect();
        for ((job, destination), rule) in all {
            let newest_proven = self.counted(&job, &destination).filter(|b| b.proven.is_some()).max_by_key(|b| b.time).map(|b| &b.id);
            let stays = |b: &&Backup| b.pinned || Some(&b.id) == newest_proven;
            let falling = |keep| self.counted(&job, &destination).filter(|b| !stays(b) && self.newer(b, &destination) >= keep).count();
            if falling(rule.keep_last) <= rule.pending.map_or(0, falling) {
                self.rules.insert((job, destination), Rule { pending: None, unsure: true, ..rule });
            }
        }
    }

    /// After a good backup of the job: what rules remove is not there any more.
    pub fn judge_retention(&self, job: &str, destinations: &[String]) -> Result<(), String> {
        for destination in destinations {
            let Some(rule) = self.rules.get(&(job.to_owned(), destination.clone())).filter(|r| r.pending.is_none() && !r.unsure) else {
                continue;
            };
            let newest_proven = self.counted(job, destination).filter(|b| b.proven.is_some()).max_by_key(|b| b.time).map(|b| &b.id);
            let too_many = |b: &&Backup| self.newer(b, destination) >= rule.keep_last && !b.pinned && Some(&b.id) != newest_proven;
            if let Some(old) = self.counted(job, destination).find(too_many) {
                return Err(format!("{} of {job} is still at {destination}, against {rule:?}", old.id));
            }
        }
        Ok(())
    }
}
