//! What must be true at the next start, with no manual step: every backup that is reported good comes back byte for byte, none is gone, everything works at once, and the next prune
//! leaves nothing that nobody needs.

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::common;
use crate::scenarios::{Scenario, a_new_backup_is_what_is_live};
use crate::world::{Result, World, picture, picture_of_known};

/// Where the time went, over all workers: seconds and how often.
pub static SPENT: Mutex<BTreeMap<&str, (f64, usize)>> = Mutex::new(BTreeMap::new());

/// What was done since then; returns when the next begins.
pub fn spent(what: &'static str, since: Instant) -> Instant {
    let mut spent = SPENT.lock().unwrap_or_else(PoisonError::into_inner);
    let entry = spent.entry(what).or_default();
    *entry = (entry.0 + since.elapsed().as_secs_f64(), entry.1 + 1);
    Instant::now()
}

/// How many files there are under each name in which ids and times are left out, when all is done.
pub type Tree = BTreeMap<String, usize>;

/// Less than the term of a lease: a keepd that takes so long waits for a dead one.
const WAIT: Duration = Duration::from_secs(55);

/// What is known of a state beside what is on the disk.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// Ids that were reported good before the end.
    pub reported: Vec<String>,
    /// Ids that may be gone, beside those that the scenario names: something that was done meanwhile removed them.
    pub removed: Vec<String>,
    /// The operation was done so many times more than the reference had it: what each leaves on purpose is there as often.
    pub once_more: usize,
    /// What keepctl printed, when it had said by then that it was done.
    pub said: Option<String>,
}

/// The places of backups: name, directory, whether it keeps archives.
const PLACES: [(&str, &str, bool); 3] = [("local", "repository", false), ("second", "second", false), ("archives", "archives", true)];

/// Proves it. `reference` is what an undisturbed keepd leaves.
pub fn proven(w: &mut World, scenario: &Scenario, told: &Told, reference: Option<&[Tree]>) -> Result<Tree> {
    let said = |what: &str| {
        let what = what.to_owned();
        move |e: String| format!("{what}: {e}")
    };
    let since = Instant::now();
    w.start().map_err(said("the next start"))?;
    w.settled().map_err(said("after the next start"))?;
    let since = spent("start", since);
    let good = all_known(w, scenario, told)?;
    let removed = removed(w, scenario, told);
    let live = picture_of_known(&w.facts.live)?;
    for (id, places) in &good {
        if places.is_empty() {
            return Err(format!("backup {id} is good and nowhere"));
        }
        let restored = match w.restored(id, "restored") {
            Ok(restored) => picture(&restored)?,
            // Retention went on in between.
            Err(_) if removed.contains(id) && !w.good()?.contains_key(id) => continue,
            Err(e) => return Err(format!("LOST: a good backup does not come back: {e}")),
        };
        let same = match w.facts.known.get(id) {
            Some(known) => restored == *picture_of_known(known)?,
            None => {
                let mut same = restored == *live;
                for known in w.facts.known.values() {
                    same = same || restored == *picture_of_known(known)?;
                }
                same
            }
        };
        if !same {
            return Err(format!("LOST: backup {id} has other contents"));
        }
    }
    let since = spent("restore all", since);
    (scenario.after)(w)?;
    if let Some(told) = &told.said {
        (scenario.told)(w, told).map_err(said("what keepctl had said was done"))?;
    }
    let since = spent("after, told", since);
    let begun = since;
    (scenario.again)(w).map_err(said("the same again"))?;
    let since = spent("again", since);
    a_new_backup_is_what_is_live(w)?;
    if begun.elapsed() > WAIT {
        return Err(format!("it took {:.0} s: keepd waits for somebody who is gone", begun.elapsed().as_secs_f64()));
    }
    let since = spent("a new backup", since);
    let places: Vec<_> = PLACES.into_iter().filter(|p| w.at(p.1).join(if p.2 { "" } else { "backups" }).is_dir()).collect();
    for (name, ..) in &places {
        w.ok(&["check", name, "--read-data"])?;
    }
    let since = spent("check", since);
    for (name, directory, archives) in &places {
        if *archives {
            // Several daemons may keep archives in one directory, so what was being written is removed when it is old.
            for left in common::files_below(&w.at(directory).join("tmp")) {
                let old = std::time::SystemTime::now() - Duration::from_secs(2 * 86_400);
                fs::File::open(&left).and_then(|file| file.set_modified(old)).map_err(|e| format!("{}: {e}", left.display()))?;
            }
        }
        w.ok(&["prune", name])?;
        match archives {
            true => archives_alone(w, name, directory)?,
            false => nothing_left(w, name, directory)?,
        }
    }
    let since = spent("prune and the foreign reader", since);
    w.settled()?;
    w.stop()?;
    let tree = tree(w)?;
    spent("stop", since);
    if let Some(reference) = reference {
        let more: Vec<_> = tree
            .iter()
            .filter(|(name, count)| {
                reference.iter().filter_map(|r| r.get(*name)).max().is_none_or(|allowed| **count > allowed + told.once_more)
            })
            .map(|(name, count)| format!("{name} ({count})"))
            .collect();
        if !more.is_empty() {
            return Err(format!("GARBAGE: {}", more.join(", ")));
        }
    }
    Ok(tree)
}

fn removed(w: &World, scenario: &Scenario, told: &Told) -> Vec<String> {
    scenario.removes.iter().map(|r| w.remembered(r).to_owned()).chain(told.removed.iter().cloned()).collect()
}

/// The good backups, and that none is missing of those that were known or reported.
pub fn all_known(w: &World, scenario: &Scenario, told: &Told) -> Result<BTreeMap<String, Vec<String>>> {
    let removed = removed(w, scenario, told);
    let since = Instant::now();
    loop {
        let good = w.good()?;
        let Some(missing) = w.facts.known.keys().chain(&told.reported).find(|id| !good.contains_key(*id) && !removed.contains(id)) else {
            return Ok(good);
        };
        // The catalogue of a state that was lost is read from the repositories beside everything else.
        if since.elapsed() > Duration::from_secs(20) {
            return Err(format!("LOST: backup {missing} is not there any more as a good one: {}", w.ok(&["list"])?));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A repository has what its backups need, and nothing else.
fn nothing_left(w: &mut World, name: &str, directory: &str) -> Result<()> {
    let at = w.at(directory);
    let said = w.ok(&["prune", name, "--dry-run"])?;
    if !said.starts_with("0 of ") {
        return Err(format!("GARBAGE: a second prune of {name} has something to do: {said}"));
    }
    let needed: usize = said.split(' ').nth(2).and_then(|n| n.parse().ok()).ok_or_else(|| format!("prune says: {said}"))?;
    let listed = w.good_at(name)?;
    for (kind, wanted) in [("packs", needed), ("backups", listed), ("tmp", 0), ("condemned", 0)] {
        let found = common::files_below(&at.join(kind));
        if found.len() != wanted {
            let names: Vec<_> = found.iter().map(|p| p.strip_prefix(&at).unwrap_or(p).display().to_string()).collect();
            return Err(format!("GARBAGE: {name} has {} of {kind}, {wanted} are needed: {}", found.len(), names.join(" ")));
        }
    }
    // The same by a reader that shares nothing with keepd: packs, index objects and marks.
    let foreign = w.foreign(&at)?;
    match foreign["wrong"].as_array().is_some_and(Vec::is_empty) && foreign["backups"] == listed {
        true => Ok(()),
        false => Err(format!("GARBAGE: of {name}, with {listed} backups, a fresh reader says: {foreign}")),
    }
}

/// A directory of archives has one of each backup, and nothing beside but companions of those: one that was not written by the time of the crash is nobody's loss.
fn archives_alone(w: &World, name: &str, directory: &str) -> Result<()> {
    let at = w.at(directory);
    let names: Vec<_> = common::files_below(&at).iter().map(|p| p.strip_prefix(&at).unwrap_or(p).display().to_string()).collect();
    let (beside, others): (Vec<_>, Vec<_>) = names.iter().filter(|n| !n.starts_with("audit/")).partition(|n| n.ends_with(".meta.json"));
    let listed = w.good_at(name)?;
    let is_of_one = |companion: &&String| others.iter().any(|archive| **companion == format!("{archive}.meta.json"));
    match others.len() == listed && others.iter().all(|n| n.contains(".tar")) && beside.iter().all(is_of_one) {
        true => Ok(()),
        false => Err(format!("GARBAGE: {name} has {listed} backups and {}", names.join(" "))),
    }
}

/// Everything beside what is backed up and the objects of repositories, which are counted by themselves.
fn tree(w: &World) -> Result<Tree> {
    let mut tree = Tree::new();
    for path in common::files_below(&w.at("")) {
        let name = path.strip_prefix(w.at("")).map_err(|e| e.to_string())?.display().to_string();
        let object = ["packs/", "index/", "backups/", "audit/", "marks/", "archives/"].iter().any(|k| name.contains(k));
        // Databases may leave these or not.
        let of_a_database = name.ends_with("-wal") || name.ends_with("-shm");
        if !(object || of_a_database || name.starts_with("files/")) {
            *tree.entry(without_ids(&name)).or_default() += 1;
        }
    }
    for directory in ["", "state"] {
        for entry in fs::read_dir(w.at(directory)).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                *tree.entry(without_ids(&format!("{directory}/{}/", entry.file_name().to_string_lossy()))).or_default() += 1;
            }
        }
    }
    Ok(tree)
}

/// Runs of at least eight hexadecimal digits, and of four decimal ones, become '#'.
fn without_ids(name: &str) -> String {
    let mut out = String::new();
    let mut run = String::new();
    for c in name.chars().chain(['\0']) {
        if c.is_ascii_digit() || ('a'..='f').contains(&c) {
            run.push(c);
            continue;
        }
        let is_id = run.len() >= 8 || (run.len() >= 4 && run.chars().all(|c| c.is_ascii_digit()));
        out.push_str(if is_id { "#" } else { &run });
        run.clear();
        if c != '\0' {
            out.push(c);
        }
    }
    out
}
