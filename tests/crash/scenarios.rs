//! What is attacked: for each operation of keepd a state to begin with, the operation, and what must be true of it afterwards.

use std::fs;
use std::process::Output;

use crate::common;
use crate::world::{Facts, Ground, Picture, Result, World, picture, picture_of_known, rows};

pub struct Scenario {
    pub name: &'static str,
    /// Leaves keepd running, with everything that the operation needs.
    prepare: fn(&mut World) -> Result<()>,
    /// What is attacked; None: the start of keepd.
    pub operate: Option<fn(&World) -> Output>,
    /// Ids that the operation removes on purpose, as [`World::remember`]ed.
    pub removes: &'static [&'static str],
    /// After the next start: what the operation left is whole.
    pub after: fn(&World) -> Result<()>,
    /// The same, when keepctl had said before the end that it was done: with what it printed.
    pub told: fn(&World, &str) -> Result<()>,
    /// The same asked for again, which must go through.
    pub again: fn(&World) -> Result<()>,
}

const NOTHING: fn(&World) -> Result<()> = |_| Ok(());
/// A start tells nothing; and what a prune deleted may come back, as long as the next one finds it.
const UNTOLD: fn(&World, &str) -> Result<()> = |_, _| Ok(());

/// The first backup, to one destination.
const A_BACKUP: Scenario = Scenario {
    name: "first backup",
    prepare: |w| begin(w, "[\"local\"]", "", 0),
    operate: Some(|w| w.ctl(&["backup", "shop", "--json"])),
    removes: &[],
    after: NOTHING,
    told: |w, said| is_there(w, said, &["local"]),
    again: |w| w.ok(&["backup", "shop"]).map(drop),
};

const A_START: Scenario = Scenario {
    name: "start after a crash",
    prepare: interrupted,
    operate: None,
    removes: &[],
    after: NOTHING,
    told: UNTOLD,
    again: NOTHING,
};

const DELETED: Scenario = Scenario {
    name: "delete",
    prepare: |w| {
        begin(w, "[\"local\"]", "", 2)?;
        w.remember("deleted", 1)
    },
    operate: Some(|w| w.ctl(&["delete", w.remembered("deleted"), "--yes"])),
    removes: &["deleted"],
    after: NOTHING,
    told: |w, _| match w.good()?.contains_key(w.remembered("deleted")) {
        true => Err("what was deleted is there again".into()),
        false => Ok(()),
    },
    again: |w| {
        if w.good()?.contains_key(w.remembered("deleted")) { w.ok(&["delete", w.remembered("deleted"), "--yes"]).map(drop) } else { Ok(()) }
    },
};

pub const ALL: &[Scenario] = &[
    A_BACKUP,
    Scenario { name: "backup", prepare: |w| begin(w, "[\"local\"]", "", 2), ..A_BACKUP },
    Scenario { name: "resume", prepare: interrupted, ..A_BACKUP },
    A_START,
    Scenario {
        name: "start with the state lost",
        prepare: |w| {
            begin(w, "[\"local\", \"second\"]", "", 2)?;
            w.stop()?;
            fs::remove_dir_all(w.at("state")).map_err(|e| e.to_string())?;
            w.at_rest = true;
            Ok(())
        },
        ..A_START
    },
    Scenario {
        name: "backup with a copy",
        prepare: |w| begin(w, "[\"local\", \"second\"]", "", 1),
        told: |w, said| is_there(w, said, &["local", "second"]),
        ..A_BACKUP
    },
    Scenario {
        name: "copy",
        prepare: |w| begin(w, "[\"local\"]", "", 2),
        operate: Some(|w| w.ctl(&["copy", "latest", "--to", "second"])),
        removes: &[],
        after: NOTHING,
        told: |w, _| if w.good_at("second")? > 0 { Ok(()) } else { Err("the copy is not there".into()) },
        again: |w| w.ok(&["copy", "latest", "--to", "second"]).or_else(|e| if e.contains("already") { Ok(e) } else { Err(e) }).map(drop),
    },
    DELETED,
    Scenario {
        name: "prune",
        prepare: |w| {
            begin(w, "[\"local\"]", "", 3)?;
            w.remember("deleted", 2)?;
            w.ok(&["delete", w.remembered("deleted"), "--yes"]).map(drop)
        },
        operate: Some(|w| w.ctl(&["prune", "local"])),
        removes: &["deleted"],
        after: NOTHING,
        told: UNTOLD,
        again: |w| w.ok(&["prune", "local"]).map(drop),
    },
    Scenario {
        name: "repack",
        prepare: |w| {
            // One pack of which most is dead later.
            for n in 0..8 {
                write(w, &format!("files/part-{n}"), &common::noise(400_000, 50 + n));
            }
            begin(w, "[\"local\"]", "", 1)?;
            for n in 2..8 {
                fs::remove_file(w.at(&format!("files/part-{n}"))).map_err(|e| e.to_string())?;
            }
            w.change(2);
            w.ok(&["backup", "shop"])?;
            w.remember("deleted", 1)?;
            w.ok(&["delete", w.remembered("deleted"), "--yes"]).map(drop)
        },
        operate: Some(|w| w.ctl(&["prune", "local"])),
        removes: &["deleted"],
        after: NOTHING,
        told: UNTOLD,
        again: |w| w.ok(&["prune", "local"]).map(drop),
    },
    Scenario {
        name: "retention",
        prepare: |w| {
            begin(w, "[\"local\", \"second\"]", "retention = { keep_last = 2 }", 2)?;
            w.remember("oldest", 1)
        },
        removes: &["oldest"],
        told: |w, said| is_there(w, said, &["local", "second"]),
        ..A_BACKUP
    },
    Scenario {
        name: "repair",
        prepare: |w| {
            begin(w, "[\"local\", \"second\"]", "", 2)?;
            w.stop()?;
            let packs = common::files_below(&w.at("repository/packs"));
            let longest = packs.into_iter().max_by_key(|p| fs::metadata(p).map_or(0, |m| m.len())).ok_or("no packs")?;
            let mut bytes = fs::read(&longest).map_err(|e| e.to_string())?;
            let half = bytes.len() / 2;
            bytes[half] ^= 1;
            write(w, longest.strip_prefix(w.at("")).map_err(|e| e.to_string())?.to_str().unwrap_or_default(), &bytes);
            w.start()
        },
        operate: Some(|w| w.ctl(&["check", "local", "--read-data"])),
        removes: &[],
        after: NOTHING,
        told: |w, _| match w.ctl(&["check", "local", "--read-data"]) {
            out if common::text(&out).contains(" is hurt") => Err(format!("what was repaired is damaged: {}", common::text(&out))),
            _ => Ok(()),
        },
        again: |w| {
            let out = w.ctl(&["check", "local", "--read-data"]);
            // 3: damage was found and repaired. The damaged pack itself is told of, with no backup that lacks anything, until the next prune takes it away.
            if !matches!(out.status.code(), Some(0 | 3)) {
                return Err(common::text(&out));
            }
            w.ok(&["prune", "local"]).map(drop)
        },
    },
    Scenario {
        name: "key add",
        prepare: |w| {
            begin(w, "[\"local\"]", "", 1)?;
            w.generate_key("other.key");
            Ok(())
        },
        operate: Some(|w| w.ctl(&["key", "add", "local", "--key", &w.at("other.key").display().to_string()])),
        removes: &[],
        after: NOTHING,
        told: |w, _| opens(w, "repository", "other.key"),
        again: |w| {
            // Added already is no success, but neither is it a lock.
            let _ = w.ctl(&["key", "add", "local", "--key", &w.at("other.key").display().to_string()]);
            opens(w, "repository", "main.key")?;
            opens(w, "repository", "other.key")?;
            match fs::read_dir(w.at("repository/keys")).map_or(0, Iterator::count) {
                2 => Ok(()),
                n => Err(format!("{n} slots")),
            }
        },
    },
    Scenario {
        name: "key rotate",
        prepare: |w| {
            begin(w, "[\"local\", \"second\"]", "", 1)?;
            w.generate_key("new.key");
            Ok(())
        },
        operate: Some(|w| w.ctl(&["key", "rotate", "main", "--to", &w.at("new.key").display().to_string()])),
        removes: &[],
        after: NOTHING,
        told: |w, _| {
            for repository in ["repository", "second"] {
                opens(w, repository, "new.key")?;
                if opens(w, repository, "main.key").is_ok() {
                    return Err(format!("the old key opens {repository} again"));
                }
            }
            let text = fs::read_to_string(w.at("keepd.toml")).map_err(|e| e.to_string())?;
            if text.contains("new.key") { Ok(()) } else { Err(format!("the configuration has the old key: {text}")) }
        },
        again: |w| {
            w.ok(&["key", "rotate", "main", "--to", &w.at("new.key").display().to_string()])?;
            for repository in ["repository", "second"] {
                let slots = fs::read_dir(w.at(repository).join("keys")).map_or(0, Iterator::count);
                if slots != 1 {
                    return Err(format!("{repository} has {slots} slots"));
                }
                opens(w, repository, "new.key")?;
            }
            Ok(())
        },
    },
    Scenario {
        name: "re-encryption",
        prepare: |w| {
            begin(w, "[\"local\"]", "", 2)?;
            let before = names(w).join(" ");
            w.facts.words.insert("before", before);
            Ok(())
        },
        operate: Some(|w| w.ctl(&["key", "re-encrypt", "local", "--yes"])),
        removes: &[],
        after: NOTHING,
        told: |w, _| match names(w).iter().find(|name| w.remembered("before").contains(name.as_str())) {
            Some(name) => Err(format!("{name}, which opens with the old master key, is there again")),
            None => Ok(()),
        },
        again: |w| {
            // keepd goes on with it by itself, once it has looked at its destinations.
            let since = std::time::Instant::now();
            loop {
                match w.ok(&["key", "re-encrypt", "local", "--yes"]) {
                    Err(e) if e.contains("is being re-encrypted already") && since.elapsed().as_secs() < 60 => w.settled()?,
                    said => return said.map(drop),
                }
            }
        },
    },
    Scenario {
        name: "import",
        prepare: |w| {
            begin(w, "[\"local\"]", "", 2)?;
            w.ok(&["export", "latest", "-o", &w.at("shop.tar.gz").display().to_string()])?;
            w.remember("exported", 0)?;
            w.ok(&["delete", w.remembered("exported"), "--yes"])?;
            w.ok(&["prune", "local"]).map(drop)
        },
        operate: Some(|w| w.ctl(&["import", &w.at("shop.tar.gz").display().to_string(), "--job", "shop", "--destination", "local"])),
        removes: &["exported"],
        after: NOTHING,
        told: |w, _| match w.good()?.len() {
            2 => Ok(()),
            n => Err(format!("{n} backups and not 2: the imported one is not there")),
        },
        again: |w| w.ok(&["import", &w.at("shop.tar.gz").display().to_string(), "--job", "shop", "--destination", "local"]).map(drop),
    },
    Scenario {
        name: "restore in place",
        prepare: |w| {
            begin(w, "[\"local\"]", "", 2)?;
            w.remember("wanted", 1)
        },
        operate: Some(|w| w.ctl(&["restore", w.remembered("wanted"), "--in-place", "--yes"])),
        removes: &[],
        after: |w| old_or_new(w, "wanted"),
        told: |w, _| match is(w, &w.facts.known[w.remembered("wanted")])? {
            true => Ok(()),
            false => Err("it is not what was wanted".into()),
        },
        again: |w| {
            w.ok(&["restore", w.remembered("wanted"), "--in-place", "--yes"])?;
            if is(w, &w.facts.known[w.remembered("wanted")].clone())? { Ok(()) } else { Err("it is not what was wanted".into()) }
        },
    },
    Scenario {
        name: "undo of a restore in place",
        prepare: |w| {
            begin(w, "[\"local\"]", "", 2)?;
            w.remember("wanted", 1)?;
            w.ok(&["backup", "shop"])?;
            w.remember("undone", 0)?;
            let run = w.json(&["restore", w.remembered("wanted"), "--in-place", "--yes"])?;
            w.facts.words.insert("run", run["id"].as_str().unwrap_or_default().to_owned());
            Ok(())
        },
        operate: Some(|w| w.ctl(&["undo", w.remembered("run"), "--yes"])),
        removes: &[],
        after: |w| old_or_new(w, "undone"),
        told: |w, _| match is(w, &w.facts.known[w.remembered("undone")])? {
            true => Ok(()),
            false => Err("it is not what was there before the restore".into()),
        },
        again: |w| {
            w.ok(&["undo", w.remembered("run"), "--yes"]).or_else(|e| if e.contains("undone") { Ok(String::new()) } else { Err(e) })?;
            if is(w, &w.facts.known[w.remembered("undone")])? { Ok(()) } else { Err("it is not what was there before the restore".into()) }
        },
    },
    Scenario {
        name: "configuration change",
        prepare: |w| begin(w, "[\"local\"]", "", 1),
        operate: Some(|w| w.ctl(&["job", "edit", "shop", "--max-age", "26h", "--yes"])),
        removes: &[],
        after: |w| {
            if w.at(".keepd-change.json").exists() {
                return Err("the journal of the change is still there".into());
            }
            w.ok(&["config", "check"]).map(drop)
        },
        told: max_age_is_26_hours,
        again: |w| {
            w.ok(&["job", "edit", "shop", "--max-age", "26h", "--yes"])?;
            max_age_is_26_hours(w, "")
        },
    },
    Scenario {
        name: "configuration import",
        prepare: |w| {
            begin(w, "[\"local\"]", "", 1)?;
            let file = w.at("config.json").display().to_string();
            let alone = fs::read_to_string(w.at("keepd.toml")).map_err(|e| e.to_string())?;
            let other = format!("[[job.other.source]]\nname = \"files\"\nfiles = \"{}\"\n", w.at("files").display());
            fs::write(w.at("keepd.toml"), format!("{alone}[job.other]\ndestinations = [\"local\"]\n{other}")).map_err(|e| e.to_string())?;
            w.ok(&["reload"])?;
            w.ok(&["job", "edit", "shop", "--max-age", "26h", "--yes"])?;
            w.ok(&["config", "export", "--type", "jobs", "--encryption", "none", "-o", &file])?;
            fs::write(w.at("keepd.toml"), alone).map_err(|e| e.to_string())?;
            w.ok(&["reload"]).map(drop)
        },
        operate: Some(import_configuration),
        removes: &[],
        after: |w| {
            if w.at(".keepd-change.json").exists() {
                return Err("the journal of the change is still there".into());
            }
            w.ok(&["config", "check"])?;
            is_imported(w).map(drop)
        },
        told: |w, _| if is_imported(w)? { Ok(()) } else { Err("the configuration is as it was before".into()) },
        again: |w| {
            let out = import_configuration(w);
            match out.status.success() && is_imported(w)? {
                true => Ok(()),
                false => Err(common::text(&out)),
            }
        },
    },
    Scenario {
        name: "configuration backup",
        prepare: |w| {
            w.more = "[config_backup]\ndestination = \"local\"\nretention = { keep_last = 2 }";
            begin(w, "[\"local\"]", "", 1)?;
            store_configuration(w)?;
            store_configuration(w)?;
            let before = configurations(w).join(" ");
            w.facts.words.insert("before", before);
            Ok(())
        },
        operate: Some(|w| w.ctl(&["config", "backup"])),
        removes: &[],
        after: |w| if configurations(w).len() < 2 { Err("LOST: a stored configuration".into()) } else { Ok(()) },
        told: |w, _| match configurations(w).iter().any(|name| !w.remembered("before").contains(name.as_str())) {
            true => Ok(()),
            false => Err("LOST: the configuration that was stored".into()),
        },
        again: |w| {
            store_configuration(w)?;
            let to = w.beside("fetched.json");
            let _ = fs::remove_file(&to);
            w.ok(&["config", "fetch", "-o", &to.display().to_string()])?;
            match configurations(w).len() {
                2 => Ok(()),
                n => Err(format!("GARBAGE: {n} stored configurations, and 2 are kept")),
            }
        },
    },
    Scenario {
        name: "key remove",
        prepare: |w| {
            begin(w, "[\"local\"]", "", 1)?;
            w.generate_key("other.key");
            let own = slots(w);
            w.ok(&["key", "add", "local", "--key", &w.at("other.key").display().to_string()])?;
            let slot = slots(w).into_iter().find(|slot| !own.contains(slot)).ok_or("no slot was added")?;
            w.facts.words.insert("slot", slot);
            Ok(())
        },
        operate: Some(|w| w.ctl(&["key", "remove", "local", w.remembered("slot"), "--yes"])),
        removes: &[],
        after: |w| opens(w, "repository", "main.key"),
        told: |w, _| match opens(w, "repository", "other.key") {
            Ok(()) => Err("the key that was removed opens the repository again".into()),
            Err(_) => Ok(()),
        },
        again: |w| {
            if slots(w).iter().any(|slot| slot == w.remembered("slot")) {
                w.ok(&["key", "remove", "local", w.remembered("slot"), "--yes"])?;
            }
            match slots(w).len() {
                1 if opens(w, "repository", "other.key").is_err() => Ok(()),
                n => Err(format!("{n} slots, and the removed key opens one")),
            }
        },
    },
    Scenario {
        name: "archive",
        prepare: |w| begin(w, "[\"archives\"]", "", 1),
        told: |w, said| is_there(w, said, &["archives"]),
        ..A_BACKUP
    },
    Scenario {
        name: "backup with an archive",
        prepare: |w| begin(w, "[\"local\", \"archives\"]", "", 1),
        told: |w, said| is_there(w, said, &["local", "archives"]),
        ..A_BACKUP
    },
    Scenario {
        name: "retention of archives",
        prepare: |w| {
            begin(w, "[\"archives\"]", "retention = { keep_last = 2 }", 2)?;
            w.remember("oldest", 1)
        },
        removes: &["oldest"],
        told: |w, said| is_there(w, said, &["archives"]),
        ..A_BACKUP
    },
    Scenario {
        name: "archive deleted",
        prepare: |w| {
            begin(w, "[\"archives\"]", "", 2)?;
            w.remember("deleted", 1)
        },
        ..DELETED
    },
    Scenario {
        name: "pin",
        prepare: |w| {
            begin(w, "[\"local\", \"second\"]", "", 1)?;
            w.remember("pinned", 0)
        },
        operate: Some(|w| w.ctl(&["pin", w.remembered("pinned")])),
        removes: &[],
        after: NOTHING,
        told: |w, _| match w
            .json(&["list"])?
            .as_array()
            .into_iter()
            .flatten()
            .any(|b| b["id"] == w.remembered("pinned") && b["pinned"] == true)
        {
            true => Ok(()),
            false => Err("it is not pinned".into()),
        },
        again: |w| w.ok(&["pin", w.remembered("pinned")]).map(drop),
    },
];

impl Scenario {
    /// Whether keepctl has said that all of it is done; damage that was found and repaired has a status of its own.
    pub fn is_done(&self, out: &Output) -> bool {
        out.status.success() || (self.name == "repair" && out.status.code() == Some(3))
    }

    /// Whether each backup may take the place of an older one.
    pub fn forgets(&self) -> bool {
        self.removes.contains(&"oldest")
    }

    /// Prepares the state to begin with, saves it as `base` and makes the world that; what its backups hold is known then.
    pub fn prepared(&self, world: &mut World, ground: &Ground) -> Result<()> {
        world.clear(Facts { scene: ground.scene(self.name), ..Facts::default() })?;
        (self.prepare)(world)?;
        if !world.at_rest {
            world.know()?;
            world.settled()?;
            world.stop()?;
        }
        let base = world.save("base")?;
        world.start()?;
        world.settled()?;
        world.ok(&["backup", "shop"])?;
        world.facts.live = world.restored_for_all("latest", "live")?;
        let live = world.facts.live.clone();
        if !is(world, &live)? {
            return Err("a backup is not what is live".into());
        }
        world.reset(&base)
    }
}

/// The backup that keepctl told of is a good one at these destinations.
fn is_there(w: &World, said: &str, destinations: &[&str]) -> Result<()> {
    let run: serde_json::Value = serde_json::from_str(said).map_err(|e| format!("keepctl said {said:?}: {e}"))?;
    let id = run["backup"].as_str().ok_or_else(|| format!("no backup in {run}"))?;
    let good = w.good()?;
    let places = good.get(id).ok_or_else(|| format!("LOST: backup {id} was told of and is not there as a good one"))?;
    match destinations.iter().find(|d| !places.iter().any(|p| p == *d)) {
        Some(missing) => Err(format!("LOST: backup {id} was told of and is not at {missing}")),
        None => Ok(()),
    }
}

/// A key opens a repository, with nothing else.
fn opens(w: &World, repository: &str, key: &str) -> Result<()> {
    let mut rescue = std::process::Command::new(common::keepd_binary());
    rescue.args(["rescue", "list", "--destination"]).arg(w.at(repository)).arg("--key").arg(w.at(key));
    let out = rescue.output().map_err(|e| e.to_string())?;
    if out.status.success() { Ok(()) } else { Err(format!("{key} does not open {repository}: {}", common::text(&out))) }
}

/// Names of all that is sealed with a master key, and of the slots.
fn names(w: &World) -> Vec<String> {
    let below = |kind: &str| common::files_below(&w.at("repository").join(kind));
    let all = ["keys", "packs", "index", "backups"].into_iter().flat_map(below);
    all.filter_map(|p| Some(p.file_name()?.to_str()?.to_owned())).collect()
}

/// The ids of the key slots.
fn slots(w: &World) -> Vec<String> {
    let all = common::files_below(&w.at("repository/keys"));
    all.iter().filter_map(|p| Some(p.file_stem()?.to_str()?.to_owned())).collect()
}

/// The names of the stored configurations.
fn configurations(w: &World) -> Vec<String> {
    let all = common::files_below(&w.at("repository/config"));
    all.iter().filter_map(|p| Some(p.file_name()?.to_str()?.to_owned())).collect()
}

/// Stored in a second of its own: one of the same second is called by the next one, and retention leaves alone what is of a later time.
fn store_configuration(w: &World) -> Result<()> {
    let now = || jiff::Timestamp::now().strftime("config_backup_%Y%m%dT%H%M%SZ").to_string();
    while configurations(w).last().is_some_and(|newest| *newest >= now()) {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    w.ok(&["config", "backup"]).map(drop)
}

fn import_configuration(w: &World) -> Output {
    w.ctl(&["config", "import", &w.at("config.json").display().to_string(), "--on-conflict", "overwrite", "--yes"])
}

/// Whether the configuration is what was imported, or what was there before; something of both is neither.
fn is_imported(w: &World) -> Result<bool> {
    let status = w.json(&["status"])?;
    let jobs: Vec<_> = status["jobs"].as_array().into_iter().flatten().collect();
    let changed = jobs.iter().any(|j| j["name"] == "shop" && j["max_age_seconds"] == 93600);
    let added = jobs.iter().any(|j| j["name"] == "other");
    if changed == added { Ok(added) } else { Err(format!("half of the import: {}", status["jobs"])) }
}

fn max_age_is_26_hours(w: &World, _: &str) -> Result<()> {
    let status = w.json(&["status"])?;
    if status["jobs"][0]["max_age_seconds"] == 93600 { Ok(()) } else { Err(format!("max_age: {}", status["jobs"][0])) }
}

fn write(w: &World, name: &str, bytes: &[u8]) {
    let path = w.at(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// Key, configuration, so many backups of different states, and one state that no backup has.
fn begin(w: &mut World, destinations: &str, job: &str, backups: u64) -> Result<()> {
    w.generate_key("main.key");
    w.configure(destinations, job, w.more);
    w.change(0);
    w.start()?;
    for state in 1..=backups {
        w.ok(&["backup", "shop"])?;
        // Known before the next one may remove it.
        w.know()?;
        w.change(state);
    }
    w.settled()
}

/// A backup was killed when a good part of it was stored, so that something is left over.
fn interrupted(w: &mut World) -> Result<()> {
    begin(w, "[\"local\"]", "", 1)?;
    w.stop()?;
    w.mount()?;
    w.start()?;
    w.settled()?;
    w.layer().count_anew();
    let seen = |w: &World| {
        w.layer().operations().iter().filter(|o| o.other.as_ref().is_some_and(|p| p.starts_with("all/repository/packs"))).count()
    };
    // Packs are published by now, the manifest is not.
    w.layer().add(
        keepd_faultfs::Rule::on(&[keepd_faultfs::Verb::Rename], "all/repository/index/*")
            .does(keepd_faultfs::Action::Delay(std::time::Duration::from_secs(2))),
    );
    w.ok(&["backup", "shop", "--detach"])?;
    let since = std::time::Instant::now();
    while seen(w) == 0 && since.elapsed() < std::time::Duration::from_secs(30) {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    w.layer().refuse();
    w.kill();
    w.unmount()?;
    w.at_rest = true;
    Ok(())
}

/// Rows of a database that somebody may have open, read from a copy that another process makes: keepd looks for who has it open, and a child that is just being started has all
/// that this process has.
fn live_rows(w: &World) -> Result<Vec<(i64, i64, String)>> {
    let dir = tempfile::tempdir_in(w.beside("")).map_err(|e| e.to_string())?;
    let there = ["shop.db", "shop.db-wal"].map(|name| w.at(name)).into_iter().filter(|path| path.exists());
    let status = std::process::Command::new("cp").arg("-a").args(there).arg(dir.path()).status().map_err(|e| e.to_string())?;
    if status.success() { rows(&dir.path().join("shop.db")) } else { Err("the database is not copied".into()) }
}

/// Whether what is live is what a restored backup has.
fn is(w: &World, restored: &std::path::Path) -> Result<bool> {
    // What is restored for all workers stays as it is, what is beside everything does not.
    let files: std::sync::Arc<Picture> = if restored.starts_with(w.beside("")) {
        picture(&restored.join("files"))?.into()
    } else {
        picture_of_known(&restored.join("files"))?
    };
    Ok(picture(&w.at("files"))? == *files && live_rows(w)? == restored_rows(w, restored)?)
}

/// Rows of a restored database, read from a copy: to open it would change it.
fn restored_rows(w: &World, restored: &std::path::Path) -> Result<Vec<(i64, i64, String)>> {
    let found = common::files_below(&restored.join("db"));
    let db = found.first().ok_or("no database was restored")?;
    let dir = tempfile::tempdir_in(w.beside("")).map_err(|e| e.to_string())?;
    fs::copy(db, dir.path().join("db")).map_err(|e| e.to_string())?;
    rows(&dir.path().join("db"))
}

/// All or nothing: what was live before, or what the remembered backup has.
fn old_or_new(w: &World, word: &str) -> Result<()> {
    let new = &w.facts.known[w.remembered(word)];
    if is(w, &w.facts.live)? || is(w, new)? {
        return Ok(());
    }
    let now = picture(&w.at("files"))?;
    let against = |other: &std::path::Path| -> Result<String> {
        let other = picture(&other.join("files"))?;
        let differs = now.iter().filter(|(k, v)| other.get(*k) != Some(v)).map(|(k, v)| format!("{k} is {v}, "));
        let missing = other.iter().filter(|(k, _)| !now.contains_key(*k)).map(|(k, _)| format!("{k} is missing, "));
        Ok(differs.chain(missing).collect())
    };
    Err(format!("what is live is neither old ({}) nor new ({})", against(&w.facts.live)?, against(new)?))
}

/// A backup made now has what is live now.
pub fn a_new_backup_is_what_is_live(w: &World) -> Result<()> {
    w.ok(&["backup", "shop"])?;
    let to = w.restored("latest", "checked")?;
    if is(w, &to)? { Ok(()) } else { Err("a new backup is not what is live".into()) }
}
