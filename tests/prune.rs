//! Prune takes two steps with a grace period between, and deletes nothing that anybody needs.

mod common;

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use common::*;

fn stored(keepd: &Keepd) -> u64 {
    keepd.packs().iter().map(|p| fs::metadata(p).unwrap().len()).sum()
}

fn condemned(keepd: &Keepd) -> usize {
    files_below(&keepd.path("repository/condemned")).len()
}

/// Told of packs: a number of bytes may end in a zero too.
fn nothing_deleted(told: &str) -> bool {
    told.lines().any(|line| line.trim_start().starts_with("0 of ") && line.contains(" packs "))
}

/// Two backups; between them there was one that alone held four megabytes.
fn with_something_dead(grace: &str) -> (Keepd, Vec<u8>) {
    let mut keepd = Keepd::prepared();
    keepd.configure(&format!("prune_grace = \"{grace}\""), "suspect = { smaller = 0 }");
    make_database(&keepd.path("shop.db"), 200);
    let blob = noise(4 << 20, 7);
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    fs::write(keepd.path("files/blob"), &blob).unwrap();
    keepd.ok(&["backup", "shop"]);
    fs::remove_file(keepd.path("files/blob")).unwrap();
    fs::write(keepd.path("files/small"), noise(50_000, 8)).unwrap();
    keepd.ok(&["backup", "shop"]);
    let middle = keepd.backups().remove(1);
    keepd.ok(&["delete", &middle, "--yes"]);
    (keepd, blob)
}

#[test]
fn what_nothing_needs_is_condemned_first_and_deleted_later() {
    let (keepd, blob) = with_something_dead("3s");
    let before = stored(&keepd);
    assert!(keepd.ok(&["prune", "local", "--dry-run"]).contains("would be condemned"));
    assert_eq!(condemned(&keepd), 0, "a dry run changes nothing");
    let told = keepd.ok(&["prune", "local"]);
    assert!(told.contains("were condemned") && nothing_deleted(&told), "{told}");
    assert!(stored(&keepd) >= before && condemned(&keepd) == 1);
    // New backups do not build upon what is condemned; a check does not count it as damage; everything is still there.
    let waiting = keepd.ok(&["prune", "local"]);
    assert!(waiting.contains("wait until 3s are over"), "{waiting}");
    keepd.ok(&["check", "local", "--read-data"]);
    fs::write(keepd.path("files/blob2"), &blob).unwrap();
    let run: serde_json::Value = serde_json::from_str(&keepd.ok(&["backup", "shop", "--json"])).unwrap();
    assert!(run["progress"]["added_bytes"].as_u64().unwrap() > 3 << 20, "{run}");
    std::thread::sleep(Duration::from_secs(3));
    let told = keepd.ok(&["prune", "local"]);
    assert!(told.contains("were deleted") && !nothing_deleted(&told), "{told}");
    assert!(stored(&keepd) < before + (1 << 20) && condemned(&keepd) == 0);
    keepd.ok(&["check", "local", "--read-data"]);
    assert_same(&keepd.path("files"), &keepd.restored("latest").join("files"));
    assert!(nothing_deleted(&keepd.ok(&["prune", "local"])));
}

#[test]
fn a_rewritten_pack_stays_until_its_time_and_a_lost_state_knows_all_of_it() {
    let mut keepd = Keepd::prepared();
    keepd.configure("prune_grace = \"2s\"", "suspect = { smaller = 0, fewer_files = 0 }");
    make_database(&keepd.path("shop.db"), 200);
    for n in 0..8 {
        fs::write(keepd.path(&format!("files/f{n}")), noise(1_500_000, n + 1)).unwrap();
    }
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    for n in 2..8 {
        fs::remove_file(keepd.path(&format!("files/f{n}"))).unwrap();
    }
    keepd.ok(&["backup", "shop"]);
    let first = keepd.backups().remove(1);
    keepd.ok(&["delete", &first, "--yes"]);
    let before = stored(&keepd);
    assert!(keepd.ok(&["prune", "local"]).contains("were rewritten"));
    assert!(stored(&keepd) > before, "the old pack is still there");
    // Forgets all: index, condemned packs and those that stand in no index are learnt from the repository.
    keepd.stop();
    fs::remove_dir_all(keepd.path("state")).unwrap();
    keepd.start();
    keepd.ok(&["check", "local", "--read-data"]);
    std::thread::sleep(Duration::from_secs(2));
    // A backup deletes what is over, too, when the job has rules.
    keepd.configure("prune_grace = \"2s\"", "suspect = { smaller = 0, fewer_files = 0 }\nretention = { keep_last = 9 }");
    keepd.ok(&["reload"]);
    keepd.ok(&["backup", "shop"]);
    assert!(stored(&keepd) < before / 2 && condemned(&keepd) == 0, "{} of {before}", stored(&keepd));
    keepd.ok(&["check", "local", "--read-data"]);
    for backup in keepd.backups() {
        assert_same(&keepd.path("files"), &keepd.restored(&backup).join("files"));
    }
}

#[test]
fn a_restore_that_reads_holds_deleting_and_nothing_else() {
    let (keepd, _) = with_something_dead("0s");
    // Its pipe is never read, so it stands in the middle. More than a pipe and what is fetched ahead.
    fs::write(keepd.path("files/large"), noise(160 << 20, 3)).unwrap();
    keepd.ok(&["backup", "shop"]);
    let mut reader = keepd.ctl_command(&["cat", "latest", "files/large"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut begun = false;
    for _ in 0..500 {
        begun |= keepd.json(&["status"])["running"].as_array().unwrap().iter().any(|r| r["kind"] == "cat" && r["step"] == "reading");
        if begun {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(begun);
    let before = stored(&keepd);
    let told = keepd.ok(&["prune", "local"]);
    assert!(told.contains("when the restore that is reading has ended"), "{told}");
    assert_eq!(stored(&keepd), before);
    drop(reader.stdout.take());
    reader.wait().unwrap();
    while keepd.json(&["status"])["running"].as_array().unwrap().iter().any(|r| r["kind"] == "cat") {
        std::thread::sleep(Duration::from_millis(20));
    }
    keepd.ok(&["prune", "local"]);
    assert!(stored(&keepd) < before);
    keepd.ok(&["check", "local", "--read-data"]);
}

#[test]
fn a_prune_that_does_not_know_everything_does_nothing() {
    let (mut keepd, _) = with_something_dead("1h");
    keepd.ok(&["prune", "local"]);
    let list = files_below(&keepd.path("repository/condemned")).remove(0);
    let whole = fs::read(&list).unwrap();
    let mut bad = whole.clone();
    bad[100] ^= 1;
    fs::write(&list, &bad).unwrap();
    let before = stored(&keepd);
    assert!(keepd.fails(1, &["prune", "local"]).contains("nothing was pruned"));
    assert!(keepd.fails(1, &["check", "local"]).contains("condemned/"));
    let counted = files_below(&keepd.path("repository/backups"));
    keepd.ok(&["backup", "shop"]);
    fs::write(&list, &whole).unwrap();
    // A manifest that does not open: of a new one nobody knows what it needs, of one that was read before that is known and stays.
    let new = files_below(&keepd.path("repository/backups")).into_iter().find(|m| !counted.contains(m)).unwrap();
    for (manifest, is_known) in [(new, false), (counted[0].clone(), true)] {
        let good = fs::read(&manifest).unwrap();
        fs::write(&manifest, &good[..good.len() - 1]).unwrap();
        let pruned = keepd.ctl(&["prune", "local"]);
        let said = String::from_utf8_lossy(&pruned.stderr).into_owned();
        assert_eq!(pruned.status.code(), Some(if is_known { 0 } else { 1 }), "{said}");
        assert!(is_known || said.contains("nothing was pruned"), "{said}");
        assert!(stored(&keepd) >= before);
        fs::write(&manifest, &good).unwrap();
    }
    // What an interrupted prune leaves: the old index is still there, and lists what is condemned.
    keepd.stop();
    fs::remove_dir_all(keepd.path("state")).unwrap();
    keepd.configure("prune_grace = \"0s\"", "");
    keepd.start();
    keepd.ok(&["prune", "local"]);
    assert!(stored(&keepd) < before);
    keepd.ok(&["check", "local", "--read-data"]);
    keepd.restored("latest");
}

#[test]
fn what_is_damaged_is_stored_anew_and_that_heals_older_backups() {
    let mut keepd = Keepd::prepared();
    keepd.configure("prune_grace = \"0s\"", "");
    make_database(&keepd.path("shop.db"), 200);
    fs::write(keepd.path("files/blob"), noise(3 << 20, 3)).unwrap();
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    fs::write(keepd.path("files/other"), noise(5000, 4)).unwrap();
    keepd.ok(&["backup", "shop"]);
    let largest = keepd.packs().into_iter().max_by_key(|p| fs::metadata(p).unwrap().len()).unwrap();
    let good = fs::read(&largest).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    fs::write(&largest, &bad).unwrap();
    let told = keepd.fails(1, &["check", "local", "--read-data"]);
    assert!(told.contains("files/blob") && told.contains("2 of 2 backups hurt"), "{told}");
    let target = keepd.path("broken");
    assert!(keepd.fails(1, &["restore", "latest", "--to", target.to_str().unwrap()]).contains("no pack of the repository holds it"));
    // It is needed and nowhere else: prune leaves it, for somebody may have a good copy.
    keepd.ok(&["prune", "local"]);
    assert!(largest.exists());
    // A good copy put in its place is noticed, too.
    fs::write(&largest, &good).unwrap();
    keepd.ok(&["check", "local", "--read-data"]);
    keepd.restored("latest");
    fs::write(&largest, &bad).unwrap();
    keepd.fails(1, &["check", "local", "--read-data"]);
    let run: serde_json::Value = serde_json::from_str(&keepd.ok(&["backup", "shop", "--json"])).unwrap();
    let added = run["progress"]["added_bytes"].as_u64().unwrap();
    assert!((100_000..4 << 20).contains(&added), "only what was lost is stored anew: {added}");
    for backup in keepd.backups() {
        let back = keepd.restored(&backup);
        assert!(fs::read(back.join("files/blob")).unwrap() == noise(3 << 20, 3));
    }
    let told = keepd.fails(3, &["check", "local", "--read-data"]);
    assert!(told.contains("no backup lacks anything by them") && told.contains("keepctl prune local"), "{told}");
    assert!(keepd.ok(&["prune", "local"]).contains("rewritten"));
    assert!(!largest.exists());
    keepd.stop();
    fs::remove_dir_all(keepd.path("state")).unwrap();
    keepd.start();
    keepd.ok(&["check", "local", "--read-data"]);
    for backup in keepd.backups() {
        keepd.restored(&backup);
    }
}

#[test]
fn a_pack_of_which_the_footer_alone_is_damaged_is_replaced() {
    let mut keepd = Keepd::prepared();
    keepd.configure("prune_grace = \"0s\"", "");
    make_database(&keepd.path("shop.db"), 200);
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let damaged = keepd.packs();
    for pack in &damaged {
        let mut bytes = fs::read(pack).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(pack, bytes).unwrap();
    }
    for _ in 0..2 {
        let told = keepd.fails(3, &["check", "local", "--read-data"]);
        assert!(told.contains("no backup lacks anything by them") && told.contains("keepctl prune local"), "{told}");
    }
    keepd.ok(&["prune", "local"]);
    assert!(keepd.packs().iter().all(|pack| !damaged.contains(pack)));
    // Also for one who knows nothing of what was there.
    keepd.stop();
    fs::remove_dir_all(keepd.path("state")).unwrap();
    keepd.start();
    keepd.ok(&["check", "local", "--read-data"]);
    keepd.restored("latest");
}

#[test]
fn a_storage_set_back_to_an_older_state_is_noticed() {
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    let copy = keepd.path("copy");
    assert!(std::process::Command::new("cp").arg("-a").arg(keepd.path("repository")).arg(&copy).status().unwrap().success());
    for n in 0..2 {
        fs::write(keepd.path("files/new"), format!("{n}")).unwrap();
        keepd.ok(&["backup", "shop"]);
    }
    let sequence = |backup: &str| keepd.json(&["show", backup])["sequence"].as_u64().unwrap();
    let last = sequence("latest");
    fs::remove_dir_all(keepd.path("repository")).unwrap();
    fs::rename(&copy, keepd.path("repository")).unwrap();
    let out = keepd.ctl(&["backup", "shop"]);
    assert!(out.status.success() && text(&out).contains("was set back to an older state"), "{}", text(&out));
    assert!(sequence("latest") > last, "numbers are used once");
    assert!(!text(&keepd.ctl(&["backup", "shop"])).contains("set back"));
    keepd.ok(&["check", "local", "--read-data"]);
    assert_same(&keepd.path("files"), &keepd.restored("latest").join("files"));
    // One that somebody removed is told, too.
    fs::remove_file(files_below(&keepd.path("repository/backups")).remove(0)).unwrap();
    assert!(keepd.fails(1, &["check", "local"]).contains("it is missing"));
}

/// It is told once, and then forgotten: what else fails in the same run must not take that away.
#[test]
fn a_storage_set_back_is_told_of_also_where_the_run_fails() {
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    let (repository, copy) = (keepd.path("repository"), keepd.path("copy"));
    assert!(std::process::Command::new("cp").arg("-a").arg(&repository).arg(&copy).status().unwrap().success());
    fs::write(keepd.path("files/new"), "new").unwrap();
    keepd.ok(&["backup", "shop"]);
    fs::remove_dir_all(&repository).unwrap();
    fs::rename(&copy, &repository).unwrap();
    // The marks cannot be listed: nothing is concluded yet.
    let (marks, aside) = (repository.join("marks"), keepd.path("aside"));
    let had_marks = fs::rename(&marks, &aside).is_ok();
    fs::write(&marks, "no directory").unwrap();
    assert!(!keepd.fails(1, &["backup", "shop"]).contains("set back"));
    fs::remove_file(&marks).unwrap();
    if had_marks {
        fs::rename(&aside, &marks).unwrap();
    }
    // The index cannot be: the run fails, and says the other, too.
    let index = repository.join("index");
    fs::rename(&index, &aside).unwrap();
    fs::write(&index, "no directory").unwrap();
    let told = keepd.fails(1, &["backup", "shop"]);
    assert!(told.contains("was set back to an older state") && told.contains("index"), "{told}");
    fs::remove_file(&index).unwrap();
    fs::rename(&aside, &index).unwrap();
    assert!(!keepd.ok(&["backup", "shop"]).contains("set back"));
    keepd.ok(&["check", "local", "--read-data"]);
}

#[test]
fn the_repository_names_its_writer() {
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    let path = keepd.path("repository/writer.json");
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(record["released"], true);
    for (key, value) in [("instance", "another"), ("host", "the-clone"), ("machine", "0123456789abcdef")] {
        record[key] = value.into();
    }
    fs::write(&path, record.to_string()).unwrap();
    for command in [&["backup", "shop"][..], &["prune", "local"], &["delete", "latest", "--yes"]] {
        let told = keepd.fails(1, command);
        assert!(told.contains("the-clone") && told.contains("keepctl destination take-over"), "{told}");
    }
    keepd.restored("latest");
    assert!(keepd.ok(&["destination", "take-over", "local"]).contains("before it was the-clone"));
    keepd.ok(&["backup", "shop"]);
    assert!(keepd.ok(&["destination", "list"]).contains("local"));
    assert!(keepd.fails(1, &["destination", "take-over", "moon"]).contains("configured are: local"));
}

#[test]
fn a_rolling_check_reads_every_pack_in_its_time_and_finds_damage_by_itself() {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 200);
    keepd.start();
    let mut second = Vec::new();
    for n in 0..4 {
        let before = keepd.packs();
        fs::write(keepd.path("files/blob"), noise(300_000, n + 1)).unwrap();
        keepd.ok(&["backup", "shop"]);
        if n == 1 {
            second = keepd.packs().into_iter().filter(|p| !before.contains(p)).collect();
        }
    }
    keepd.stop();
    // Forgotten when it was read: everything is due.
    fs::remove_dir_all(keepd.path("state")).unwrap();
    keepd.configure("check_every = \"4s\"", "");
    keepd.start();
    let rolling = |keepd: &Keepd| -> Vec<String> {
        let runs = keepd.json(&["run", "list", "--limit", "100"]);
        let parts = runs.as_array().unwrap().iter().filter(|r| r["kind"] == "check" && r["by"] == "schedule" && r["finished"].is_string());
        parts.map(|r| r["id"].as_str().unwrap().to_owned()).collect()
    };
    let since = std::time::Instant::now();
    let packs = keepd.packs().len();
    let mut read = 0;
    let mut seen: Vec<String> = Vec::new();
    while read < packs {
        assert!(since.elapsed() < Duration::from_secs(20), "{read} of {packs} packs read: {}", keepd.log());
        for run in rolling(&keepd) {
            if !seen.contains(&run) {
                let told = keepd.ok(&["run", "show", &run]);
                let (before, _) = told.split_once(&format!(" of {packs} packs read")).unwrap_or_else(|| panic!("{told}"));
                let now: usize = before.rsplit(' ').next().unwrap().parse().unwrap();
                assert!(now < packs, "a part is not all: {told}");
                read += now;
                seen.push(run);
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    // What only an older backup needs: the live source cannot heal it.
    let pack = second.into_iter().max_by_key(|p| fs::metadata(p).unwrap().len()).unwrap();
    let mut bytes = fs::read(&pack).unwrap();
    assert!(bytes.len() > 300_000, "it holds the second blob");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let since = std::time::Instant::now();
    let told = loop {
        let error = keepd.json(&["destination", "list"])[0]["error"].clone();
        if let Some(told) = error.as_str() {
            break told.to_owned();
        }
        assert!(since.elapsed() < Duration::from_secs(20), "{}", keepd.log());
        std::thread::sleep(Duration::from_millis(100));
    };
    assert!(told.contains(" 1 of "), "one backup is hurt, and stays so: {told}");
    assert!(keepd.log().contains("its SHA-256 is not its name"), "{}", keepd.log());
    // Further parts find it still, and say so still.
    std::thread::sleep(Duration::from_secs(3));
    assert!(!keepd.json(&["destination", "list"])[0]["error"].is_null(), "{}", keepd.log());
}

#[test]
fn a_destination_that_is_away_keeps_nobody_from_deleting_at_the_others() {
    let keepd = Keepd::started();
    let d = keepd.dir.path().display().to_string();
    for name in ["away", "zip"] {
        keepd.ok(&["destination", "add", name, "--service", "fs", "--root", &format!("{d}/{name}"), "--encryption", "main", "--yes"]);
    }
    keepd.ok(&["backup", "shop"]);
    keepd.ok(&["backup", "shop"]);
    let ids = keepd.backups();
    for id in &ids {
        keepd.ok(&["copy", id, "--to", "away"]);
        keepd.ok(&["copy", id, "--to", "zip"]);
    }
    let on = |id: &str| -> Vec<String> {
        let list = keepd.json(&["list"]);
        let line = list.as_array().unwrap().iter().find(|b| b["id"] == id).cloned().unwrap_or_default();
        line["destinations"].as_array().into_iter().flatten().map(|d| d["name"].as_str().unwrap().to_owned()).collect()
    };
    // Not mounted.
    fs::rename(keepd.path("away"), keepd.path("unmounted")).unwrap();
    let told = keepd.fails(1, &["delete", &ids[0], "--yes"]);
    assert!(told.contains("not removed everywhere: away: destination away"), "{told}");
    assert_eq!(on(&ids[0]), ["away"]);
    fs::rename(keepd.path("unmounted"), keepd.path("away")).unwrap();
    keepd.ok(&["delete", &ids[0], "--yes"]);
    assert!(on(&ids[0]).is_empty());
    // No longer configured: it can be pinned where it is known, and deleted there.
    keepd.ok(&["destination", "remove", "away", "--yes"]);
    keepd.ok(&["pin", &ids[1]]);
    keepd.ok(&["unpin", &ids[1]]);
    let told = keepd.fails(3, &["delete", &ids[1], "--yes"]);
    assert!(told.contains("stays at away, which is no longer configured"), "{told}");
    assert_eq!(on(&ids[1]), ["away"]);
    let told = keepd.fails(1, &["delete", &ids[1], "--yes"]);
    assert!(told.contains("there is no destination 'away'"), "{told}");
}

#[test]
fn a_destination_that_is_no_longer_configured_counts_for_nothing_and_is_remembered() {
    let mut keepd = Keepd::started();
    let away = format!("{}/away", keepd.dir.path().display());
    let added = ["destination", "add", "away", "--service", "fs", "--root", &away, "--encryption", "main", "--yes"];
    keepd.ok(&added);
    keepd.ok(&["backup", "shop"]);
    keepd.ok(&["backup", "shop"]);
    let (newest, older) = (keepd.backups().remove(0), keepd.backups().remove(1));
    for id in [&newest, &older] {
        keepd.ok(&["copy", id, "--to", "away"]);
    }
    keepd.ok(&["delete", &newest, "--destination", "local", "--yes"]);
    let micros = |time: &serde_json::Value| time.as_str().map(|t| t.parse::<jiff::Timestamp>().unwrap().as_microsecond());
    let last_good = || micros(&keepd.json(&["status"])["jobs"][0]["last_good"]);
    let begun = |id: &str| micros(&keepd.json(&["show", id])["time"]);
    assert_eq!(keepd.json(&["show", "latest"])["id"], newest.as_str());
    assert_eq!(last_good(), begun(&newest));
    keepd.ok(&["destination", "remove", "away", "--yes"]);
    // Listed is what can be had, and where; the rest is told of.
    let listed = keepd.ctl(&["list"]);
    let table = String::from_utf8(listed.stdout.clone()).unwrap();
    assert!(table.contains(&older[..12]) && !table.contains(&newest[..12]), "{table}");
    assert!(!table.contains("away") && table.contains("local"), "{table}");
    assert!(text(&listed).contains("1 backup that lies only at destinations that are no longer configured (away)"), "{}", text(&listed));
    assert!(!text(&keepd.ctl(&["list", "-q"])).contains("away"));
    // All of it is known.
    let all = keepd.json(&["list"]);
    let places = |id: &str| -> Vec<(String, String)> {
        let one = all.as_array().unwrap().iter().find(|b| b["id"] == id).unwrap();
        let word = |v: &serde_json::Value| v.as_str().unwrap().to_owned();
        one["destinations"].as_array().unwrap().iter().map(|d| (word(&d["name"]), word(&d["status"]))).collect()
    };
    let pair = |name: &str, status: &str| (name.to_owned(), status.to_owned());
    assert_eq!(places(&newest), [pair("away", "unconfigured")]);
    assert_eq!(places(&older), [pair("away", "unconfigured"), pair("local", "present")]);
    assert!(keepd.ctl(&["show", &newest]).stdout.windows(27).any(|w| w == b"away (no longer configured)"));
    // The newest that can be had is the latest, and how old it is counts.
    assert_eq!(keepd.json(&["show", "latest"])["id"], older.as_str());
    assert_eq!(last_good(), begun(&older));
    assert_same(&keepd.path("files"), &keepd.restored("latest").join("files"));
    assert!(keepd.fails(1, &["restore", &newest, "--to", "/nonesuch/x"]).contains("(away) are no longer configured"));
    keepd.ok(&["delete", &older, "--destination", "local", "--yes"]);
    assert_eq!(last_good(), None);
    assert!(keepd.fails(1, &["show", "latest"]).contains("at a destination that is configured"));
    // It is back as it was when the destination is.
    keepd.ok(&added);
    assert_eq!(keepd.json(&["show", "latest"])["id"], newest.as_str());
    keepd.stop();
    keepd.start();
    assert_same(&keepd.path("files"), &keepd.restored("latest").join("files"));
}
