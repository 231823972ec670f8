//! Restores, by every means there is, held against what was backed up.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::database;
use super::model::{Backup, Permit, Truth};
use super::tree::{self, picture};
use super::world::{World, emptied};
use crate::common::{python, text};

/// By whom a backup is given back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum By {
    Daemon,
    Rescue(String),
    Decoder(String),
}

impl World {
    /// Restores a backup and compares all of it.
    pub fn prove(&mut self, backup: &Backup, by: &By) {
        self.note(format!("proving {} of {} by {by:?}", &backup.id[..12], backup.job));
        let to = self.path("proof");
        emptied(&to);
        let place = to.to_str().unwrap().to_owned();
        let out = match by {
            By::Daemon => self.keepd.ctl(&["restore", &backup.id, "--to", &place]),
            By::Rescue(destination) => self.rescue(&["restore", &backup.id, "--to", &place], destination),
            By::Decoder(destination) => {
                let mut command = Command::new(python());
                command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("kit/keepd_decoder.py")).arg(self.path(destination));
                command.arg("--key").arg(&self.keys[0]).args(["restore", &backup.id, &place]);
                command.stdin(Stdio::null()).output().unwrap()
            }
        };
        if !out.status.success() && !self.is_still_there(backup, by) {
            self.note("a rule has removed it meanwhile");
            return emptied(&to);
        }
        assert!(out.status.success(), "{} by {by:?}: {}", backup.id, text(&out));
        compare(backup, &to).unwrap_or_else(|wrong| panic!("{} of {} by {by:?}, kept in {place}: {wrong}", backup.id, backup.job));
        match by {
            By::Daemon => self.figures.by_daemon += 1,
            By::Rescue(_) => self.figures.by_rescue += 1,
            By::Decoder(_) => self.figures.by_decoder += 1,
        }
        emptied(&to);
    }

    /// What is tried again in the background removes by its rules as well, which the model knows.
    fn is_still_there(&mut self, backup: &Backup, by: &By) -> bool {
        self.rest();
        self.judge(&Permit::default());
        let places = self.model.get(&backup.id).map(|b| self.places(b)).unwrap_or_default();
        match by {
            By::Daemon => !places.is_empty(),
            By::Rescue(place) | By::Decoder(place) => places.contains(place),
        }
    }

    /// All ways in which a backup can be had now.
    pub fn ways(&self, backup: &Backup) -> Vec<By> {
        let mut ways = vec![By::Daemon];
        for destination in self.places(backup) {
            ways.push(By::Rescue(destination.clone()));
            if ["one", "two"].contains(&destination.as_str()) {
                ways.push(By::Decoder(destination.clone()));
            }
        }
        ways
    }

    /// Everything that must be there is there: from each destination that has it, and the destinations themselves are whole.
    pub fn prove_everything(&mut self) {
        self.cloud_comes_back();
        self.make_room();
        self.rest();
        let all: Vec<Backup> = self.model.there().cloned().collect();
        for backup in all.iter().filter(|b| !self.places(b).is_empty()).collect::<Vec<_>>() {
            for destination in self.places(backup) {
                self.prove(backup, &By::Rescue(destination));
            }
            self.prove(backup, &By::Daemon);
        }
        if let Some(backup) = all.iter().find(|b| b.on.contains("one")) {
            self.prove(backup, &By::Decoder("one".into()));
        }
    }
}

/// Holds a restored directory against what the backup's sources were.
pub fn compare(backup: &Backup, restored: &Path) -> Result<(), String> {
    let there: BTreeSet<String> = fs::read_dir(restored).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    let wanted: BTreeSet<String> = backup.sources.iter().cloned().collect();
    if there != wanted {
        return Err(format!("sources {there:?} instead of {wanted:?}"));
    }
    for source in &backup.sources {
        compare_source(&backup.truth, source, &restored.join(source)).map_err(|e| format!("{source}: {e}"))?;
    }
    Ok(())
}

pub fn compare_source(truth: &Truth, source: &str, at: &Path) -> Result<(), String> {
    if let Some(wanted) = truth.trees.get(source) {
        return tree::difference(wanted, &picture(at), true).map_or(Ok(()), Err);
    }
    let file = fs::read_dir(at).map_err(|e| e.to_string())?.map(|e| e.unwrap().path()).next().ok_or("it is empty")?;
    if let Some(moments) = truth.databases.get(source) {
        let others = fs::read_dir(at).unwrap().count() - 1;
        let found = database::moment(&file)?;
        return match moments.has(found) && others == 0 {
            true => Ok(()),
            false => Err(format!(
                "it is of transaction {found:?} (and {others} files beside it), not of those from {} to {}",
                moments.first,
                moments.first + moments.tokens.len() - 1
            )),
        };
    }
    let wanted = truth.printed.get(source).ok_or("no such source was there")?;
    match fs::read(&file).map_err(|e| e.to_string())? == *wanted {
        true => Ok(()),
        false => Err("what the command printed differs".into()),
    }
}
