//! What must be true at the next start, with no manual step: every backup that is reported good comes back byte for byte, none is gone, everything works at once, and the next prune
//! leaves nothing that nobody needs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common;
use crate::scenarios::{Scenario, a_new_backup_is_what_is_live};
use crate::world::{Result, World, picture};

/// How many files there are under each name in which ids and times are left out, when all is done.
pub type Tree = BTreeMap<String, usize>;

/// Proves it. `reference` is what an undisturbed keepd leaves; `reported` are ids that were reported good before the attack's end, `told` what keepctl
/// printed when it had said by then that it was done.
pub fn proven(w: &mut World, scenario: &Scenario, reported: &[String], told: Option<&str>, reference: Option<&[Tree]>) -> Result<Tree> {
    let said = |what: &str| {
        let what = what.to_owned();
        move |e: String| format!("{what}: {e}")
    };
    w.start().map_err(said("the next start"))?;
    w.settled().map_err(said("after the next start"))?;
    // The catalogue of a state that was lost is read from the repositories beside everything else.
    let since = Instant::now();
    let mut good = w.good()?;
    while w.known.keys().any(|id| !good.contains_key(id)) && scenario.removes.is_empty() && since.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(50));
        good = w.good()?;
    }
    let removed: Vec<_> = scenario.removes.iter().map(|r| w.remembered(r).to_owned()).collect();
    for id in w.known.keys().chain(reported) {
        if !good.contains_key(id) && !removed.contains(id) {
            return Err(format!("LOST: backup {id} is not there any more as a good one: {}", w.ok(&["list"])?));
        }
    }
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
        let same = match w.known.get(id) {
            Some(known) => restored == picture(known)?,
            None => {
                let mut same = restored == picture(&w.live)?;
                for known in w.known.values() {
                    same = same || restored == picture(known)?;
                }
                same
            }
        };
        if !same {
            return Err(format!("LOST: backup {id} has other contents"));
        }
    }
    (scenario.after)(w)?;
    if let Some(told) = told {
        (scenario.told)(w, told).map_err(said("what keepctl had said was done"))?;
    }
    (scenario.again)(w).map_err(said("the same again"))?;
    a_new_backup_is_what_is_live(w)?;
    let places: Vec<_> =
        [("local", "repository"), ("second", "second")].into_iter().filter(|p| w.at(p.1).join("backups").is_dir()).collect();
    for (name, _) in &places {
        w.ok(&["check", name, "--read-data"])?;
    }
    for (name, directory) in &places {
        w.ok(&["prune", name])?;
        nothing_left(w, name, directory)?;
    }
    w.settled()?;
    w.stop()?;
    let tree = tree(w)?;
    if let Some(reference) = reference {
        let more: Vec<_> = tree
            .iter()
            .filter(|(name, count)| reference.iter().filter_map(|r| r.get(*name)).max().is_none_or(|allowed| *count > allowed))
            .map(|(name, count)| format!("{name} ({count})"))
            .collect();
        if !more.is_empty() {
            return Err(format!("GARBAGE: {}", more.join(", ")));
        }
    }
    Ok(tree)
}

/// A repository has what its backups need, and nothing else.
fn nothing_left(w: &World, name: &str, directory: &str) -> Result<()> {
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
    needed_alone(w, name, &at)
}

/// The same by a reader that shares nothing with keepd: packs, index objects and marks.
fn needed_alone(w: &World, name: &str, repository: &Path) -> Result<()> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut reader = Command::new("python3");
    reader.arg(source.join("tests/crash/needed.py")).arg(source.join("kit/keepd_decoder.py")).arg(repository);
    reader.args(["main.key", "new.key"].map(|key| w.at(key)).iter().filter(|key| key.exists()));
    let out = reader.output().map_err(|e| format!("python3: {e}"))?;
    let said = common::text(&out);
    match out.status.success() && said.lines().count() == 1 {
        true => Ok(()),
        false => Err(format!("GARBAGE: of {name} a fresh reader says: {said}")),
    }
}

/// Everything beside what is backed up and the objects of repositories, which are counted by themselves.
fn tree(w: &World) -> Result<Tree> {
    let mut tree = Tree::new();
    for path in common::files_below(&w.at("")) {
        let name = path.strip_prefix(w.at("")).map_err(|e| e.to_string())?.display().to_string();
        let object = ["packs/", "index/", "backups/", "audit/", "marks/"].iter().any(|k| name.contains(k));
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
