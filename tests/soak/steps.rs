//! What can happen in a life, each by its weight.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::Value;

use super::dice::Dice;
use super::model::{Backup, Expected, Permit, Truth};
use super::tree;
use super::world::{Break, Deed, Job, SPARE, World, emptied};
use crate::common::{files_below, text};

type Step = fn(&mut World, &mut Dice);

/// By weight.
const STEPS: [(u32, Step); 32] = [
    (20, World::back_up),
    (4, World::back_up_beside),
    (4, World::copy),
    (4, World::prune),
    (4, World::other_retention),
    (3, World::delete),
    (4, World::pin_or_unpin),
    (3, World::check),
    (3, World::damage),
    (8, World::restore_and_compare),
    (5, World::restore_parts),
    (9, World::restore_in_place),
    (5, World::export_and_import),
    (4, World::compare_and_diff),
    (3, World::drill),
    (3, World::hold_and_release),
    (4, World::extra_job),
    (4, World::spare_destination),
    (3, World::bad_configuration),
    (2, World::partner_key),
    (2, World::rotate),
    (2, World::re_encrypt),
    (2, World::store_configuration),
    (2, World::lose_state),
    (2, World::begin_anew),
    (3, World::restart),
    (4, World::server_comes_or_goes),
    (3, World::disk_is_full),
    (2, World::suspicious),
    (3, World::cancel),
    (2, World::lose_index),
    (2, World::undo_configuration),
];

fn words(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|a| (*a).to_owned()).collect()
}

fn deed(arguments: &[&str]) -> Deed {
    Deed { arguments: words(arguments), good: vec![0], ..Deed::default() }
}

impl World {
    pub fn step(&mut self, dice: &mut Dice) {
        self.live_on(dice);
        if dice.percent(18) {
            let how = *dice.pick(&[Break::Kill, Break::Kill, Break::Kill, Break::Term, Break::Server]);
            self.next_break = Some((how, dice.below(1300) as f64 / 1000.0));
        }
        let all: u32 = STEPS.iter().map(|(weight, _)| weight).sum();
        let mut at = dice.below(all as usize) as u32;
        let mut step: Step = World::back_up;
        for (weight, one) in STEPS {
            if at < weight {
                step = one;
                break;
            }
            at -= weight;
        }
        step(self, dice);
        self.next_break = None;
        self.figures.steps += 1;
    }

    /// The applications go on.
    fn live_on(&mut self, dice: &mut Dice) {
        let mut trees: Vec<PathBuf> = self.jobs.values().flat_map(|j| j.trees.values().cloned()).collect();
        trees.push(self.path("extra-files"));
        trees.dedup();
        for path in trees {
            if dice.percent(50) {
                let times = dice.below(6);
                tree::change(&path, dice, times);
            }
        }
        if dice.percent(30) {
            let lines = dice.below(3000);
            let report = format!("line {}\n", dice.draw()).repeat(lines + 1);
            fs::write(self.path("report.txt"), report).unwrap();
        }
        for job in self.jobs.values_mut() {
            for live in job.databases.values_mut() {
                match dice.below(10) {
                    0 | 1 => live.stop(),
                    2 => {
                        live.stop();
                        live.rework(dice.below(5));
                        live.start();
                    }
                    _ => live.start(),
                }
            }
        }
    }

    /// What is to be done now is not broken off.
    fn whole(&mut self) {
        self.next_break = None;
    }

    /// A backup that somebody could have.
    fn any(&self, dice: &mut Dice, wanted: impl Fn(&Backup) -> bool) -> Option<Backup> {
        let all: Vec<&Backup> = self.model.there().filter(|b| !self.places(b).is_empty() && wanted(b)).collect();
        (!all.is_empty()).then(|| (*dice.pick(&all)).clone())
    }

    fn any_job(&self, dice: &mut Dice) -> String {
        let names: Vec<&String> = self.jobs.keys().collect();
        (*dice.pick(&names)).clone()
    }

    fn repository(&self, dice: &mut Dice) -> String {
        (*dice.pick(&["one", "two", "cloud"])).to_owned()
    }

    fn backup_deed(job: &str, dice: &mut Dice) -> Deed {
        let mut arguments = words(&["backup", job]);
        if dice.percent(30) {
            arguments.extend(words(&["--name", "named \"one\"", "--label", "by=soak"]));
        }
        Deed { arguments, makes: vec![(job.to_owned(), "manual")], good: vec![0], ..Deed::default() }
    }

    fn back_up(&mut self, dice: &mut Dice) {
        let job = self.any_job(dice);
        let deed = Self::backup_deed(&job, dice);
        let trouble = self.trouble() || self.next_break.is_some();
        let done = self.perform(deed);
        if trouble || done.broken {
            return;
        }
        let destinations = self.jobs[&job].destinations.clone();
        let made: Vec<&Backup> = done.new.iter().filter_map(|id| self.model.get(id)).filter(|b| b.job == job).collect();
        assert_eq!(made.len(), 1, "{}", done.said);
        assert_eq!(made[0].outcome, "good");
        for destination in &destinations {
            assert!(made[0].on.contains(destination), "{} is not at {destination}: {}", made[0].id, done.said);
        }
        self.model.judge_retention(&job, &destinations).unwrap_or_else(|e| panic!("{e}"));
    }

    fn back_up_beside(&mut self, dice: &mut Dice) {
        let mut deeds: Vec<Deed> = self.jobs.keys().cloned().collect::<Vec<_>>().iter().map(|job| Self::backup_deed(job, dice)).collect();
        if let Some(backup) = self.any(dice, |_| true) {
            let to = self.path("beside");
            emptied(&to);
            deeds.push(deed(&["restore", &backup.id, "--to", to.to_str().unwrap()]));
            // A rule may remove it meanwhile.
            deeds.last_mut().unwrap().good.push(1);
            let done = self.perform_together(deeds);
            let restored = done.last().unwrap();
            if restored.code == Some(0) {
                super::proof::compare(&backup, &to).unwrap_or_else(|wrong| panic!("{} in {}: {wrong}", backup.id, to.display()));
                self.figures.by_daemon += 1;
            }
            emptied(&to);
        } else {
            self.perform_together(deeds);
        }
    }

    fn copy(&mut self, dice: &mut Dice) {
        let Some(backup) = self.any(dice, |_| true) else { return };
        let all: Vec<String> = self.model.destinations.iter().cloned().collect();
        let to = dice.pick(&all).clone();
        let mut deed = deed(&["copy", &backup.id, "--to", &to]);
        deed.permit.come.insert((backup.id.clone(), to.clone()));
        let (trouble, there) = (self.trouble() || self.next_break.is_some(), backup.on.contains(&to));
        if there {
            // Said to be there already.
            deed.good = if self.doubtful.contains(&(backup.id.clone(), to.clone())) { vec![0, 1] } else { vec![1] };
        }
        let done = self.perform(deed);
        if !trouble && !there {
            assert!(self.model.get(&backup.id).is_some_and(|b| b.on.contains(&to)), "{}", done.said);
        }
    }

    fn prune(&mut self, dice: &mut Dice) {
        let all: Vec<String> = self.used();
        let destination = dice.pick(&all).clone();
        let mut arguments = words(&["prune", &destination]);
        if dice.percent(15) {
            arguments.push("--dry-run".into());
        }
        self.perform(Deed { arguments, good: vec![0], ..Deed::default() });
    }

    fn other_retention(&mut self, dice: &mut Dice) {
        let job = self.any_job(dice);
        let keep = 1 + dice.below(6);
        let broken = self.next_break.is_some();
        let done = self.perform(deed(&["job", "edit", &job, "--retention", &format!("keep_last={keep}"), "--yes"]));
        if broken {
            // Whether it was taken: once more.
            self.perform(deed(&["job", "edit", &job, "--retention", &format!("keep_last={keep}"), "--yes"]));
        } else {
            assert_eq!(done.code, Some(0), "{}", done.said);
        }
        for destination in self.jobs[&job].destinations.clone().iter().filter(|d| *d != "arch") {
            self.model.rule_changed(&job, destination, keep);
        }
        if dice.percent(60) && self.reachable("cloud") {
            self.confirm(&job);
        }
    }

    fn confirm(&mut self, job: &str) {
        // From now on the new rule decides, also when it is broken off.
        let before = self.model.rules.clone();
        self.model.rules_confirmed(job);
        let done = self.perform(deed(&["retention", job, "--apply", "--yes"]));
        if done.code != Some(0) {
            self.model.rules = before;
            self.whole();
            let again = self.perform_confirmed(job);
            if again {
                self.model.rules_confirmed(job);
            }
        }
    }

    fn perform_confirmed(&mut self, job: &str) -> bool {
        let before = self.model.rules.clone();
        self.model.rules_confirmed(job);
        let done = self.perform(deed(&["retention", job, "--apply", "--yes"]));
        if done.code != Some(0) {
            self.model.rules = before;
        }
        done.code == Some(0)
    }

    fn delete(&mut self, dice: &mut Dice) {
        let Some(backup) = self.any(dice, |_| true) else { return };
        let mut arguments = words(&["delete", &backup.id, "--yes"]);
        let mut from: Vec<String> = backup.on.iter().cloned().collect();
        if dice.percent(50) {
            from = vec![dice.pick(&from).clone()];
            arguments.extend(words(&["--destination", &from[0]]));
        }
        if backup.pinned {
            self.whole();
            let done = self.perform(Deed { arguments, good: vec![1], ..Deed::default() });
            assert!(done.said.contains("pinned"), "{}", done.said);
            return;
        }
        let unknown = from.iter().filter(|d| !self.model.destinations.contains(*d)).count();
        let good = match unknown {
            0 => vec![0],
            all if all == from.len() => vec![1],
            _ => vec![3],
        };
        self.perform(Deed { arguments, permit: self.going(&backup, &from), good, ..Deed::default() });
    }

    /// A backup is to go from there, wherever that is configured.
    fn going(&self, backup: &Backup, from: &[String]) -> Permit {
        let configured = from.iter().filter(|d| self.model.destinations.contains(*d));
        let pairs: std::collections::BTreeSet<_> = configured.map(|d| (backup.id.clone(), d.clone())).collect();
        Permit { go: pairs.clone(), must_go: pairs, ..Permit::default() }
    }

    fn pin_or_unpin(&mut self, dice: &mut Dice) {
        let Some(backup) = self.any(dice, |_| true) else { return };
        let pinned = self.model.there().filter(|b| b.pinned).count();
        let word = if backup.pinned || pinned > 3 { "unpin" } else { "pin" };
        let backup = match word {
            "unpin" if !backup.pinned => match self.any(dice, |b| b.pinned) {
                Some(backup) => backup,
                None => return,
            },
            _ => backup,
        };
        if self.trouble() {
            // Said at some places only, it would have to be said again.
            return;
        }
        let said = |world: &mut Self| {
            let mut deed = deed(&[word, &backup.id]);
            deed.permit.marks.insert(backup.id.clone());
            world.perform(deed)
        };
        let mut done = said(self);
        if done.code != Some(0) {
            self.cloud_comes_back();
            done = said(self);
        }
        assert_eq!(self.model.get(&backup.id).unwrap().pinned, word == "pin", "{}", done.said);
    }

    fn check(&mut self, dice: &mut Dice) {
        let all: Vec<String> = self.used();
        let destination = dice.pick(&all).clone();
        let mut arguments = words(&["check", &destination]);
        if dice.percent(60) {
            arguments.push("--read-data".into());
        }
        self.perform(Deed { arguments, good: vec![0], ..Deed::default() });
    }

    /// A pack rots where every backup has another copy: it is found, and repaired from there.
    fn damage(&mut self, dice: &mut Dice) {
        let place = (*dice.pick(&["one", "two"])).to_owned();
        let others = ["one", "two", "cloud"];
        let elsewhere = |b: &Backup| self.places(b).iter().any(|d| *d != place && others.contains(&d.as_str()));
        if self.full || !self.model.there().filter(|b| b.on.contains(&place)).all(elsewhere) {
            return self.check(dice);
        }
        self.whole();
        let packs = files_below(&self.path(&place).join("packs"));
        if packs.is_empty() {
            return;
        }
        let pack = dice.pick(&packs).clone();
        let mut bytes = fs::read(&pack).unwrap();
        let at = dice.below(bytes.len());
        let bit = dice.below(8);
        bytes[at] ^= 1 << bit;
        fs::write(&pack, &bytes).unwrap();
        self.note(format!("a bit of {} is flipped", pack.display()));
        // Meanwhile another copy does; not looked at is going on in the middle with one that is an archive, which fails now and then.
        if let Some(backup) = self.any(dice, |b| self.places(b).contains(&place) && !b.on.contains("arch")) {
            self.prove(&backup, &super::proof::By::Daemon);
        }
        let mut deed = deed(&["check", &place, "--read-data"]);
        // Damage that no backup needs is told and needs no repair.
        deed.good = vec![1, 3];
        let done = self.perform(deed);
        assert!(done.said.contains("damage"), "{}", done.said);
        self.perform(Deed { arguments: words(&["prune", &place]), good: vec![0], ..Deed::default() });
        self.perform(Deed { arguments: words(&["check", &place, "--read-data"]), good: vec![0], ..Deed::default() });
        self.figures.damages += 1;
    }

    fn lose_index(&mut self, dice: &mut Dice) {
        let place = (*dice.pick(&["one", "two"])).to_owned();
        self.whole();
        self.keepd.stop();
        let index = files_below(&self.path(&place).join("index"));
        if !index.is_empty() {
            let lost = dice.pick(&index).clone();
            self.note(format!("index {} is lost", lost.display()));
            fs::remove_file(lost).unwrap();
        }
        self.start();
        self.rest();
        let Some(backup) = self.any(dice, |b| self.places(b).contains(&place)) else { return };
        self.prove(&backup, &super::proof::By::Rescue(place.clone()));
        let mut check = deed(&["check", &place, "--read-data"]);
        check.good = vec![0, 1, 3];
        self.perform(check);
        let mut prune = deed(&["prune", &place]);
        if self.full && place == "two" {
            prune.good.push(1);
        }
        self.perform(prune);
        if !self.full {
            self.perform(deed(&["check", &place, "--read-data"]));
        }
    }

    fn restore_and_compare(&mut self, dice: &mut Dice) {
        let Some(backup) = self.any(dice, |_| true) else { return };
        self.whole();
        let ways = self.ways(&backup);
        let way = dice.pick(&ways).clone();
        self.prove(&backup, &way);
    }

    fn restore_parts(&mut self, dice: &mut Dice) {
        let Some(backup) = self.any(dice, |b| b.sources.iter().any(|s| b.truth.trees.contains_key(s))) else { return };
        self.whole();
        let source = backup.sources.iter().find(|s| backup.truth.trees.contains_key(*s)).unwrap().clone();
        let tree = &backup.truth.trees[&source];
        let names: Vec<&str> = tree.keys().filter(|n| !n.is_empty()).filter_map(|n| std::str::from_utf8(n).ok()).collect();
        if names.is_empty() {
            return;
        }
        let name = (*dice.pick(&names)).to_owned();
        let to = self.path("part");
        emptied(&to);
        self.note(format!("restoring {source}/{name} of {}", backup.id));
        let out = self.keepd.ctl(&["restore", &backup.id, "--to", to.to_str().unwrap(), &format!("{source}/{name}")]);
        assert!(out.status.success(), "{}", text(&out));
        let found = tree::part(&tree::picture(&to.join(&source)), name.as_bytes());
        if let Some(wrong) = tree::difference(&tree::part(tree, name.as_bytes()), &found, true) {
            panic!("{source}/{name} of {} in {}: {wrong}", backup.id, to.display());
        }
        self.figures.in_parts += 1;
        emptied(&to);
    }

    fn restore_in_place(&mut self, dice: &mut Dice) {
        let Some(backup) = self.any(dice, |b| self.jobs.contains_key(&b.job)) else { return };
        let job = backup.job.clone();
        let mut sources: Vec<String> = backup.sources.clone();
        let mut arguments = words(&["restore", &backup.id, "--in-place", "--yes"]);
        if dice.percent(50) {
            sources = vec![dice.pick(&sources).clone()];
            arguments.extend(words(&["--source", &sources[0]]));
        }
        if dice.percent(25) {
            arguments.push("--no-safety-backup".into());
        }
        let breaking = self.next_break.is_some();
        let before = self.still(&job);
        let done = self.perform(Deed {
            arguments: arguments.clone(),
            makes: vec![(job.clone(), "pre-restore")],
            good: vec![0],
            ..Deed::default()
        });
        let after = self.still(&job);
        let is = self.which(&sources, &before, &backup.truth, &after);
        match (done.code, done.broken) {
            (Some(0), false) => assert!(is.1, "it says that it is restored, and it is not: {:?}", is.2),
            (_, false) => assert!(is.0, "it says that it failed, and something changed: {:?}", is.2),
            _ => assert!(is.0 || is.1, "neither as before nor as in the backup: {:?}", is.2),
        }
        self.goes_on(&job, &after);
        if done.code == Some(0) && !done.broken {
            self.figures.in_place += 1;
            if !breaking && !arguments.contains(&"--no-safety-backup".to_owned()) && dice.percent(40) {
                self.undo(&job, &sources, &before, dice);
            }
        }
    }

    fn undo(&mut self, job: &str, sources: &[String], before: &Truth, dice: &mut Dice) {
        let runs = self.ask(&["run", "list"]);
        let run = runs.as_array().unwrap().iter().find(|r| r["kind"] == "restore" && r["job"] == *job).unwrap()["id"]
            .as_str()
            .unwrap()
            .to_owned();
        if dice.percent(25) {
            self.next_break = Some((Break::Kill, dice.below(1300) as f64 / 1000.0));
        }
        let present = self.still(job);
        let done = self.perform(Deed {
            arguments: words(&["undo", &run, "--yes"]),
            makes: vec![(job.to_owned(), "pre-restore")],
            good: vec![0],
            ..Deed::default()
        });
        let after = self.still(job);
        let is = self.which(sources, &present, before, &after);
        if done.broken {
            assert!(is.0 || is.1, "neither undone nor as before: {:?}", is.2);
        } else if done.code == Some(0) {
            assert!(is.1, "it is not undone: {:?}", is.2);
            self.figures.undone += 1;
        }
        self.goes_on(job, &after);
    }

    /// Whether what is there now is all as before, or all as wanted; and why not.
    fn which(&self, sources: &[String], before: &Truth, wanted: &Truth, now: &Truth) -> (bool, bool, Vec<String>) {
        let mut why = Vec::new();
        let mut same = |a: &Truth, what: &str, of: &dyn Fn(&str) -> bool| {
            let mut equal = true;
            let mut tell = |wrong: Option<String>, source: &str| {
                if let Some(wrong) = wrong {
                    why.push(format!("{source} is not as {what}: {wrong}"));
                    equal = false;
                }
            };
            for (source, tree) in now.trees.iter().filter(|(s, _)| of(s)) {
                tell(tree::difference(&a.trees[source], tree, false), source);
            }
            for (source, moments) in now.databases.iter().filter(|(s, _)| of(s)) {
                let moment = (moments.first, moments.tokens[0]);
                tell((!a.databases[source].has(moment)).then(|| format!("transaction {moment:?}")), source);
            }
            for (source, printed) in now.printed.iter().filter(|(s, _)| of(s)) {
                tell((a.printed[source] != *printed).then(|| "what it prints".to_owned()), source);
            }
            equal
        };
        let chosen = |s: &str| sources.iter().any(|x| x == s);
        let untouched = same(before, "before", &|s| !chosen(s));
        assert!(untouched, "what was not to be restored is changed: {why:?}");
        let mut why = Vec::new();
        let mut same = |a: &Truth, what: &str| {
            let mut equal = true;
            for source in sources {
                let wrong = match (now.trees.get(source), now.databases.get(source), now.printed.get(source)) {
                    (Some(tree), ..) => tree::difference(&a.trees[source], tree, false),
                    (_, Some(moments), _) => {
                        let moment = (moments.first, moments.tokens[0]);
                        (!a.databases[source].has(moment)).then(|| format!("transaction {moment:?}"))
                    }
                    (_, _, printed) => (a.printed.get(source) != printed).then(|| "what it prints".to_owned()),
                };
                if let Some(wrong) = wrong {
                    why.push(format!("{source} is not as {what}: {wrong}"));
                    equal = false;
                }
            }
            equal
        };
        let old = same(before, "before");
        let new = same(wanted, "wanted");
        (old, new, why)
    }

    fn goes_on(&mut self, job: &str, now: &Truth) {
        for (source, moments) in &now.databases {
            self.jobs[job].databases[source].goes_on_from((moments.first, moments.tokens[0]));
        }
    }

    fn export_and_import(&mut self, dice: &mut Dice) {
        let Some(backup) = self.any(dice, |b| b.outcome == "good") else { return };
        let kind = dice.below(4);
        let name = ["taken.tar", "taken.tar.gz", "taken.tar.zst.enc", "taken.tar.zst.enc"][kind];
        let file = self.path(name).to_str().unwrap().to_owned();
        let key = format!("{file}.key");
        let clean = || {
            let _ = fs::remove_file(&file);
            let _ = fs::remove_file(&key);
        };
        clean();
        let mut arguments = words(&["export", &backup.id, "-o", &file]);
        if kind == 3 {
            arguments.extend(words(&["--encryption", "main"]));
        }
        let done = self.perform(Deed { arguments, good: vec![0], ..Deed::default() });
        if done.code != Some(0) {
            assert!(!std::path::Path::new(&file).exists(), "half an archive stands under its name");
            return clean();
        }
        let at: Vec<String> = self.places(&backup).into_iter().filter(|d| d != "arch").collect();
        if at.is_empty() {
            return clean();
        }
        let to = dice.pick(&at).clone();
        let mut arguments = words(&["import", &file, "--destination", &to, "--on-conflict", "rename"]);
        if kind == 2 {
            arguments.extend(words(&["--key", &key]));
        }
        if dice.percent(20) {
            self.next_break = Some((Break::Kill, dice.below(1300) as f64 / 1000.0));
        }
        let expected = Expected {
            job: backup.job.clone(),
            kind: "imported",
            // It keeps the time of what it was made of.
            time: backup.time..=backup.time,
            truth: backup.truth.clone(),
        };
        let permit = Permit {
            new: vec![expected],
            // Gone meanwhile, by a rule, it comes again.
            come: [(backup.id.clone(), to)].into(),
            ..Permit::default()
        };
        let done = self.perform(Deed { arguments, permit, good: vec![0], ..Deed::default() });
        for id in &done.new {
            let (sources, truth) = (backup.sources.clone(), backup.truth.clone());
            let imported = self.model.get_mut(id).unwrap();
            if imported.kind == "imported" {
                assert_eq!(imported.sources, sources);
                imported.truth = truth;
            }
        }
        if done.code == Some(0) && !done.broken {
            assert_eq!(done.new.len(), 1, "{}", done.said);
            let imported = self.model.get(&done.new[0]).unwrap().clone();
            self.figures.imports += 1;
            if dice.percent(50) {
                self.prove(&imported, &super::proof::By::Daemon);
            }
        }
        // They stay until they are deleted; that is done here, or there were more and more of them.
        let imported: Vec<Backup> = self.model.there().filter(|b| b.kind != "manual" && !b.pinned).cloned().collect();
        if imported.len() > 4 && !self.trouble() {
            let old = imported[0].clone();
            let permit = self.going(&old, &old.on.iter().cloned().collect::<Vec<_>>());
            self.perform(Deed { arguments: words(&["delete", &old.id, "--yes"]), permit, good: vec![0, 1, 3], ..Deed::default() });
        }
        clean();
    }

    fn compare_and_diff(&mut self, dice: &mut Dice) {
        self.whole();
        let Some(a) = self.any(dice, |b| b.outcome == "good") else { return };
        let Some(b) = self.any(dice, |b| b.job == a.job) else { return };
        self.note(format!("diff {} {}", a.id, b.id));
        let one_place = a.on == b.on && a.on.len() == 1;
        let found: Value = self.ask(&["diff", &a.id, &b.id]);
        let told: std::collections::BTreeSet<Vec<u8>> = found
            .as_array()
            .unwrap()
            .iter()
            .filter(|d| d["path"]["base64"].is_null())
            .map(|d| d["path"]["path"].as_str().unwrap().as_bytes().to_vec())
            .collect();
        for (source, tree) in &a.truth.trees {
            let Some(other) = b.truth.trees.get(source).filter(|_| a.sources.contains(source) && b.sources.contains(source)) else {
                continue;
            };
            let named = |n: &[u8]| [source.as_bytes(), b"/", n].concat();
            for name in tree.keys().chain(other.keys()).filter(|n| !n.is_empty() && std::str::from_utf8(n).is_ok()) {
                let (x, y) = (tree.get(name), other.get(name));
                // From two repositories sizes and times are compared, contents are not.
                let size = |n: &tree::Node| n.holds.split(',').next().unwrap_or_default().to_owned();
                let seen = one_place || x.map(|n| (size(n), &n.described)) != y.map(|n| (size(n), &n.described));
                let differs = seen && x.map(|n| &n.holds) != y.map(|n| &n.holds);
                assert!(!differs || told.contains(&named(name)), "diff does not tell of {}", String::from_utf8_lossy(name));
                // Zeros that are a hole in the one and stored in the other are told, though they are the same bytes.
                let holed =
                    x.is_some_and(|n| size(n).split(' ').nth(2).and_then(|len| len.parse().ok()).is_some_and(|len: u64| len > 1 << 20));
                // What was cut elsewhere and copied here is told where it was touched meanwhile.
                assert!(
                    holed || !one_place || x != y || !told.contains(&named(name)),
                    "diff tells of {}, which is the same",
                    String::from_utf8_lossy(name)
                );
            }
        }
        if self.jobs.contains_key(&a.job) {
            let out = self.keepd.ctl(&["compare", &a.id, "--json"]);
            assert!(matches!(out.status.code(), Some(0 | 3)), "{}", text(&out));
            let found: Value = serde_json::from_slice(&out.stdout).unwrap();
            let told: std::collections::BTreeSet<String> = found["differences"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|d| d["path"]["base64"].is_null())
                .filter_map(|d| d["path"]["path"].as_str().map(str::to_owned))
                .collect();
            for (source, path) in &self.jobs[&a.job].trees {
                let Some(then) = a.truth.trees.get(source).filter(|_| a.sources.contains(source)) else { continue };
                let now = tree::picture(path);
                for name in then.keys().chain(now.keys()).filter(|n| !n.is_empty()) {
                    let Ok(text) = std::str::from_utf8(name) else { continue };
                    let differs = then.get(name).map(|n| &n.holds) != now.get(name).map(|n| &n.holds);
                    assert!(!differs || told.contains(&format!("{source}/{text}")), "compare does not tell of {source}/{text}");
                }
            }
        }
    }

    fn drill(&mut self, dice: &mut Dice) {
        let Some(backup) = self.any(dice, |b| b.outcome == "good" && self.jobs.contains_key(&b.job)) else { return };
        let done = self.perform(deed(&["drill", &backup.id]));
        if done.code == Some(0) && !done.broken {
            assert!(self.model.get(&backup.id).unwrap().proven.is_some(), "{}", done.said);
        }
    }

    fn hold_and_release(&mut self, dice: &mut Dice) {
        let job = self.any_job(dice);
        const CHANGES: [&[&str]; 6] = [
            &["disable"],
            &["enable"],
            &["pause", "--for", "3d"],
            &["resume"],
            &["edit", "--max-age", "26h"],
            &["edit", "--schedule", "30 2 1 1 *"],
        ];
        let change = *dice.pick(&CHANGES);
        let mut arguments = words(&["job", change[0], &job]);
        arguments.extend(words(&change[1..]));
        arguments.push("--yes".into());
        self.perform(Deed { arguments, good: vec![0], ..Deed::default() });
    }

    /// A third job that comes, and goes with its backups or without.
    fn extra_job(&mut self, dice: &mut Dice) {
        if !self.jobs.contains_key("extra") {
            let files = self.path("extra-files").to_str().unwrap().to_owned();
            let mut arguments = words(&["job", "add", "extra", "--files", &files, "--destination", "two", "--destination", "arch"]);
            arguments.extend(words(&[
                "--retention",
                "keep_last=3",
                "--set",
                "suspect={ smaller = 0, larger = 0, fewer_files = 0, changed = 0, incompressible = 0 }",
                "--yes",
            ]));
            let broken = self.next_break.is_some();
            self.perform(Deed { arguments, good: vec![0], ..Deed::default() });
            if broken && !self.path("conf.d/job.extra.toml").exists() && !self.configured("job.extra") {
                return;
            }
            let job = Job {
                destinations: words(&["two", "arch"]),
                trees: [("extra-files".to_owned(), self.path("extra-files"))].into(),
                databases: Default::default(),
                printed: Default::default(),
            };
            self.jobs.insert("extra".into(), job);
            // Older backups of a job of that name are subject to its rules again, when those are confirmed.
            for (destination, keep) in [("two", 3), ("arch", 2)] {
                self.model.rule_is_new("extra", destination, keep);
            }
            return;
        }
        if dice.percent(60) {
            return self.back_up(dice);
        }
        let delete = dice.percent(50) && !self.trouble();
        let what = if delete { "--delete-backups" } else { "--keep-backups" };
        let all: Vec<Backup> = self.model.there().filter(|b| b.job == "extra").cloned().collect();
        let go = all.iter().filter(|b| delete && !b.pinned).flat_map(|b| b.on.iter().map(|d| (b.id.clone(), d.clone()))).collect();
        let permit = Permit { go, ..Permit::default() };
        let good = if delete && all.iter().any(|b| b.pinned) { vec![3] } else { vec![0] };
        self.perform(Deed { arguments: words(&["job", "remove", "extra", what, "--yes"]), permit, good, ..Deed::default() });
        if !self.configured("job.extra") {
            self.jobs.remove("extra");
            self.model.rules.retain(|(job, _), _| job != "extra");
        }
    }

    /// Whether the configuration in force has a table.
    fn configured(&mut self, table: &str) -> bool {
        self.keepd.ctl(&["config", "show", table]).status.success()
    }

    /// A fourth destination that is added, used and removed; what is stored there stays there.
    fn spare_destination(&mut self, dice: &mut Dice) {
        if !self.model.destinations.contains(SPARE) {
            self.whole();
            let root = self.path(SPARE).to_str().unwrap().to_owned();
            let mut deed = deed(&["destination", "add", SPARE, "--service", "fs", "--root", &root, "--encryption", "main", "--yes"]);
            deed.permit.destination = Some(SPARE.into());
            self.perform(deed);
            self.model.destinations.insert(SPARE.into());
            return self.copy_to_spare(dice);
        }
        match dice.below(4) {
            0 => {
                self.whole();
                let mut deed = deed(&["destination", "remove", SPARE, "--yes"]);
                deed.permit.destination = Some(SPARE.into());
                self.perform(deed);
                self.model.destinations.remove(SPARE);
            }
            1 => {
                let age = format!("max_age=\"{}d\"", 1 + dice.below(9));
                self.perform(deed(&["destination", "edit", SPARE, "--set", &age, "--yes"]));
            }
            _ => self.copy_to_spare(dice),
        }
    }

    fn copy_to_spare(&mut self, dice: &mut Dice) {
        let Some(backup) = self.any(dice, |b| b.outcome == "good") else { return };
        let mut deed = deed(&["copy", &backup.id, "--to", SPARE]);
        deed.permit.come.insert((backup.id, SPARE.into()));
        self.perform(deed);
    }

    fn bad_configuration(&mut self, dice: &mut Dice) {
        self.whole();
        let wrong = *dice.pick(&[
            "[job.shop2]\nshedule = 1\n",
            "[destination.two]\nservice = \"fs\"\n",
            "this is no TOML",
            "[job.x]\ndestinations = [\"nowhere\"]\nsource = [{ files = \"/srv\" }]\n",
            "[daemon]\nmemory = \"1KiB\"\n",
            "[encryption.other]\nkey_file = \"missing.key\"\n",
        ]);
        let _ = fs::create_dir(self.path("conf.d"));
        let file = self.path("conf.d/zz.toml");
        fs::write(&file, wrong).unwrap();
        let mut reload = deed(&["reload"]);
        reload.good = vec![1];
        self.perform(reload);
        fs::remove_file(file).unwrap();
        self.perform(deed(&["reload"]));
    }

    fn partner_key(&mut self, dice: &mut Dice) {
        self.whole();
        let place = self.repository(dice);
        if !self.reachable(&place) || (self.full && place == "two") {
            return;
        }
        let key = self.path("partner.key");
        if !key.exists() {
            self.keepd.generate_key("partner.key");
        }
        let slots = |world: &mut Self| -> Vec<String> {
            let found = world.ask(&["key", "list", &place]);
            found["destinations"][0]["slots"].as_array().unwrap().iter().map(|s| s["id"].as_str().unwrap().to_owned()).collect()
        };
        let before = slots(self);
        self.perform(deed(&["key", "add", &place, "--key", key.to_str().unwrap()]));
        let new: Vec<String> = slots(self).into_iter().filter(|s| !before.contains(s)).collect();
        assert_eq!(new.len(), 1, "{before:?}");
        let keys = std::mem::replace(&mut self.keys, vec![key]);
        let out = self.rescue(&["list"], &place);
        assert!(out.status.success(), "with the partner's key: {}", text(&out));
        self.keys = keys;
        self.perform(deed(&["key", "remove", &place, &new[0], "--yes"]));
        assert_eq!(slots(self), before);
    }

    fn rotate(&mut self, _: &mut Dice) {
        if self.trouble() {
            return;
        }
        let name = format!("main-{}.key", self.figures.rotations + 2);
        self.keepd.generate_key(&name);
        let key = self.path(&name);
        let to = key.to_str().unwrap().to_owned();
        self.keys.insert(0, key);
        if matches!(self.next_break, Some((Break::Server, _))) {
            self.whole();
        }
        let done = self.perform(deed(&["key", "rotate", "main", "--to", &to]));
        if done.broken {
            // The same command once more finishes.
            self.perform(deed(&["key", "rotate", "main", "--to", &to]));
        }
        self.figures.rotations += 1;
        let first = self.model.there().next().cloned();
        if let Some(backup) = first {
            for on in self.places(&backup) {
                self.prove(&backup, &super::proof::By::Rescue(on));
            }
        }
    }

    fn re_encrypt(&mut self, dice: &mut Dice) {
        let place = self.repository(dice);
        if self.trouble() {
            return;
        }
        if matches!(self.next_break, Some((Break::Server, _))) {
            self.whole();
        }
        let done = self.perform(deed(&["key", "re-encrypt", &place, "--yes"]));
        if done.broken {
            // It goes on by itself at the next start; if it was not begun, now it is.
            self.rest();
            self.perform(deed(&["key", "re-encrypt", &place, "--yes"]));
        }
        self.figures.re_encryptions += 1;
        self.perform(deed(&["check", &place, "--read-data"]));
    }

    fn store_configuration(&mut self, _: &mut Dice) {
        self.perform(deed(&["config", "backup"]));
        let list = self.ask(&["config", "list"]);
        assert!(!list.to_string().is_empty());
    }

    fn undo_configuration(&mut self, _: &mut Dice) {
        self.whole();
        // There and back.
        let job = self.ask(&["job", "show", "shop"])["status"]["max_age_seconds"].clone();
        self.perform(deed(&["job", "edit", "shop", "--max-age", "77h", "--yes"]));
        assert_eq!(self.ask(&["job", "show", "shop"])["status"]["max_age_seconds"], 77 * 3600);
        self.perform(deed(&["config", "undo", "--yes"]));
        assert_eq!(self.ask(&["job", "show", "shop"])["status"]["max_age_seconds"], job);
    }

    /// The state directory is gone; everything comes back from the destinations.
    fn lose_state(&mut self, dice: &mut Dice) {
        self.whole();
        self.cloud_comes_back();
        self.rest();
        match dice.percent(50) {
            true => self.keepd.kill(),
            false => self.keepd.stop(),
        }
        self.note("the state directory is lost");
        fs::remove_dir_all(self.path("state")).unwrap();
        self.state_is_new();
    }

    fn state_is_new(&mut self) {
        self.audit_anew = true;
        self.start();
        self.rest();
        // What is not configured is not looked at.
        let unknown = Some(SPARE.to_owned()).filter(|spare| !self.model.destinations.contains(spare));
        self.judge(&Permit { state_lost: true, destination: unknown, ..Permit::default() });
        self.figures.states_lost += 1;
    }

    /// The machine is gone but for its data; a destination and the key are left.
    fn begin_anew(&mut self, dice: &mut Dice) {
        self.whole();
        self.cloud_comes_back();
        self.make_room();
        self.perform(deed(&["config", "backup"]));
        self.rest();
        let kit = self.path("kit.key");
        fs::copy(&self.keys[0], &kit).unwrap();
        match dice.percent(50) {
            true => self.keepd.kill(),
            false => self.keepd.stop(),
        }
        self.note("the machine begins anew");
        let lost = self.path("lost");
        emptied(&lost);
        fs::create_dir(&lost).unwrap();
        let keys: Vec<String> = self.keys.iter().map(|k| k.file_name().unwrap().to_str().unwrap().to_owned()).collect();
        for name in ["keepd.toml", "conf.d", "state", "secrets"].into_iter().chain(keys.iter().map(String::as_str)) {
            if self.path(name).exists() {
                fs::rename(self.path(name), lost.join(name)).unwrap();
            }
        }
        let mut command = Command::new(crate::common::keepd_binary());
        command.args(["rescue", "bootstrap", "--destination", &format!("fs:{}", self.path("one").display())]).arg("--key").arg(&kit);
        command.arg("--config").arg(self.path("keepd.toml")).envs(self.keepd.environment.iter().cloned());
        let out = command.output().unwrap();
        assert_eq!(out.status.code(), Some(0), "{}", text(&out));
        for key in &keys {
            assert!(self.path(key).exists(), "{key} did not come back: {}", text(&out));
        }
        self.figures.bootstraps += 1;
        self.state_is_new();
    }

    fn restart(&mut self, dice: &mut Dice) {
        self.whole();
        let how = dice.percent(50);
        self.note(format!("the daemon is {} and started", if how { "killed" } else { "stopped" }));
        match how {
            true => self.keepd.kill(),
            false => self.keepd.stop(),
        }
        self.start();
        self.rest();
        self.judge(&Permit::default());
    }

    fn server_comes_or_goes(&mut self, dice: &mut Dice) {
        self.whole();
        if !self.cloud_up {
            self.cloud_comes_back();
        } else if dice.percent(60) {
            self.note("the S3 server dies");
            self.cloud_dies();
        }
        self.back_up(dice);
    }

    fn disk_is_full(&mut self, dice: &mut Dice) {
        self.whole();
        if self.full {
            self.make_room();
        } else {
            self.fill(dice.below(600 << 10) as u64);
        }
        self.back_up(dice);
        if dice.percent(60) {
            self.make_room();
        }
    }

    /// A source that is suddenly empty makes a backup that does not count until somebody says that it does.
    fn suspicious(&mut self, dice: &mut Dice) {
        self.whole();
        let job = self.any_job(dice);
        let good = self.model.there().any(|b| b.job == job && b.kind == "manual" && b.outcome == "good" && !self.places(b).is_empty());
        if !good || self.trouble() {
            return;
        }
        let path = self.jobs[&job].trees.values().next().unwrap().clone();
        let aside = path.with_extension("aside");
        self.note(format!("{} is empty", path.display()));
        fs::rename(&path, &aside).unwrap();
        fs::create_dir(&path).unwrap();
        let mut deed = Self::backup_deed(&job, dice);
        deed.good = vec![3];
        let done = self.perform(deed);
        fs::remove_dir(&path).unwrap();
        fs::rename(&aside, &path).unwrap();
        assert_eq!(done.new.len(), 1, "{}", done.said);
        let id = done.new[0].clone();
        assert_eq!(self.model.get(&id).unwrap().outcome, "suspect", "{}", done.said);
        match dice.below(3) {
            0 => {
                let mut accept = Deed { arguments: words(&["accept", &id]), good: vec![0], ..Deed::default() };
                accept.permit.marks.insert(id.clone());
                self.perform(accept);
                assert_eq!(self.model.get(&id).unwrap().outcome, "good");
            }
            1 => {
                let backup = self.model.get(&id).unwrap().clone();
                let permit = self.going(&backup, &backup.on.iter().cloned().collect::<Vec<_>>());
                self.perform(Deed { arguments: words(&["delete", &id, "--yes"]), permit, good: vec![0], ..Deed::default() });
            }
            _ => {}
        }
    }

    fn cancel(&mut self, dice: &mut Dice) {
        self.whole();
        let job = self.any_job(dice);
        let mark = self.mark(&job);
        let from = Timestamp::now();
        self.note(format!("a backup of {job} is cancelled"));
        let out = self.keepd.ctl(&["backup", &job, "--detach", "--json"]);
        assert!(out.status.success(), "{}", text(&out));
        std::thread::sleep(std::time::Duration::from_millis(dice.below(120) as u64));
        let runs = self.ask(&["run", "list"]);
        let run =
            runs.as_array().unwrap().iter().find(|r| r["kind"] == "backup" && r["job"] == *job).unwrap()["id"].as_str().unwrap().to_owned();
        // It may have ended.
        let _ = self.keepd.ctl(&["run", "cancel", &run]);
        self.rest();
        let truth = Arc::new(self.truth(&job, &mark));
        self.judge(&Permit { new: vec![Expected { job, kind: "manual", time: from..=Timestamp::now(), truth }], ..Permit::default() });
    }
}
