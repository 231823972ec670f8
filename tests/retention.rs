//! What keeps a good backup from being pushed out: suspect ones do not count, pins hold, changed rules ask first.

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::*;

fn backup(keepd: &Keepd, n: u64) {
    fs::write(keepd.path("files/blob"), noise(100_000, n + 1)).unwrap();
    keepd.ok(&["backup", "shop"]);
}

fn messages(run: &serde_json::Value) -> String {
    run["messages"].as_array().unwrap().iter().map(|m| m["text"].as_str().unwrap()).collect::<Vec<_>>().join("\n")
}

#[test]
fn an_emptied_database_is_suspect_until_accepted_and_displaces_nothing() {
    let mut keepd = Keepd::prepared();
    keepd.configure("", "retention = { keep_last = 1 }");
    let db = make_database(&keepd.path("shop.db"), 500);
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let good = keepd.backups().remove(0);
    db.execute_batch("DELETE FROM account").unwrap();
    for _ in 0..3 {
        let out = keepd.ctl(&["backup", "shop"]);
        assert_eq!(out.status.code(), Some(3), "{}", text(&out));
        assert!(text(&out).contains("0 rows, 500 in the last good backup") && text(&out).contains("suspect"), "{}", text(&out));
    }
    let list = keepd.json(&["list"]);
    assert_eq!(list.as_array().unwrap().len(), 4, "three worthless ones push out nothing");
    assert_eq!(list[0]["outcome"], "suspect");
    assert_eq!(keepd.json(&["show", "latest"])["id"].as_str(), Some(good.as_str()), "latest is the newest good one");
    assert_eq!(proven_sum(&keepd.restored("latest").join("db/shop.db")), 50_000);
    let status = keepd.json(&["status"]);
    assert_eq!(status["jobs"][0]["last_outcome"], "suspect");
    let suspect = list[0]["id"].as_str().unwrap();
    assert_eq!(keepd.ctl(&["show", suspect]).status.code(), Some(3));
    assert!(text(&keepd.ctl(&["show", suspect])).contains("suspect: source db"));
    // Somebody says that it is meant so: now it counts, and the old one falls.
    assert_eq!(keepd.json(&["accept", suspect])["outcome"], "good");
    assert!(keepd.fails(1, &["accept", suspect]).contains("good already"));
    assert_eq!(keepd.json(&["show", "latest"])["id"].as_str(), Some(suspect));
    // What was said lies in the repository: a lost state knows it again.
    keepd.stop();
    fs::remove_dir_all(keepd.path("state")).unwrap();
    keepd.start();
    let since = Instant::now();
    while keepd.json(&["list"])[0]["outcome"] != "good" {
        assert!(since.elapsed() < Duration::from_secs(10), "{}", keepd.ok(&["list"]));
        std::thread::sleep(Duration::from_millis(50));
    }
    keepd.ok(&["backup", "shop"]);
}

#[test]
fn a_source_that_shrank_or_went_is_suspect() {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 500);
    for n in 0..40 {
        fs::write(keepd.path(&format!("files/f{n}")), noise(5000, n + 1)).unwrap();
    }
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    for n in 0..40 {
        fs::remove_file(keepd.path(&format!("files/f{n}"))).unwrap();
    }
    assert!(keepd.fails(3, &["backup", "shop"]).contains("source files is empty"));
    fs::write(keepd.path("files/f1"), "1").unwrap();
    assert!(keepd.fails(3, &["backup", "shop"]).contains("2 entries, usual are 41"));
    // A rule can be turned off, and a wrong one is refused.
    keepd.configure("", "suspect = { fewer_files = 0, smaller = 0 }");
    keepd.ok(&["reload"]);
    keepd.ok(&["backup", "shop"]);
    keepd.configure("", "suspect = { fewer_fils = 10 }");
    assert!(keepd.fails(1, &["reload"]).contains("did you mean 'fewer_files'"));
    keepd.configure("", "suspect = { smaller = 101 }");
    assert!(keepd.fails(1, &["reload"]).contains("from 0 to 100"));
}

#[test]
fn a_pinned_backup_stays() {
    let mut keepd = Keepd::prepared();
    keepd.configure("", "retention = { keep_last = 1 }");
    make_database(&keepd.path("shop.db"), 50);
    keepd.start();
    backup(&keepd, 0);
    let first = keepd.backups().remove(0);
    assert_eq!(keepd.json(&["pin", &first[..10]])["pinned"], true);
    backup(&keepd, 1);
    backup(&keepd, 2);
    assert_eq!(keepd.backups().len(), 2);
    assert!(keepd.ok(&["list"]).contains("pinned"));
    assert!(keepd.fails(1, &["delete", &first, "--yes"]).contains("pinned"));
    keepd.ok(&["check", "local", "--read-data"]);
    keepd.restored(&first);
    keepd.ok(&["unpin", &first]);
    assert_eq!(fs::read_dir(keepd.path("repository/marks")).unwrap().count(), 2);
    backup(&keepd, 3);
    assert_eq!(keepd.backups().len(), 1);
    assert_eq!(fs::read_dir(keepd.path("repository/marks")).unwrap().count(), 0, "what was said of it goes with it");
    assert!(keepd.fails(1, &["pin", &first]).contains("no backup"));
}

#[test]
fn a_changed_policy_that_removes_more_asks_first() {
    let mut keepd = Keepd::prepared();
    keepd.configure("", "retention = { keep_last = 4 }");
    make_database(&keepd.path("shop.db"), 50);
    keepd.start();
    for n in 0..5 {
        backup(&keepd, n);
    }
    assert_eq!(keepd.backups().len(), 4);
    keepd.configure("", "retention = { keep_last = 1 }");
    assert!(keepd.ok(&["reload"]).contains("would remove 3 more backups"), "also said at once");
    fs::write(keepd.path("files/blob"), noise(100_000, 77)).unwrap();
    let run: serde_json::Value = serde_json::from_str(&keepd.ok(&["backup", "shop", "--json"])).unwrap();
    assert!(messages(&run).contains("would remove 3 more backups"), "{run}");
    assert_eq!(keepd.backups().len(), 4, "the old rules hold until the new ones are confirmed");
    let plan = keepd.json(&["retention", "shop"]);
    assert_eq!((plan[0]["removes"].as_u64(), plan[0]["held_back"].as_u64()), (Some(3), Some(3)), "{plan}");
    assert_eq!(plan[0]["in_force"]["keep_last"], 4);
    assert!(keepd.fails(2, &["retention", "shop", "--apply"]).contains("--yes"));
    assert_eq!(keepd.backups().len(), 4);
    keepd.ok(&["retention", "shop", "--apply", "--yes"]);
    assert_eq!(keepd.backups().len(), 1);
    assert_eq!(keepd.json(&["retention", "shop"])[0]["held_back"], 0);
    // Rules that keep more need no word.
    keepd.configure("", "retention = { keep_last = 2 }");
    keepd.ok(&["reload"]);
    backup(&keepd, 9);
    backup(&keepd, 10);
    assert_eq!(keepd.backups().len(), 2);
    // All rules at once taken away keep everything, and given again with less are held back.
    keepd.configure("", "");
    keepd.ok(&["reload"]);
    backup(&keepd, 11);
    assert_eq!(keepd.backups().len(), 3);
    keepd.configure("", "retention = { keep_last = 1 }");
    keepd.ok(&["reload"]);
    backup(&keepd, 12);
    assert_eq!(keepd.backups().len(), 4);
}

/// Waits until midnight (UTC) has passed where it is less than a minute away: what a test makes after this is of one day.
fn wait_out_midnight() {
    let to_midnight = 86_400 - jiff::Timestamp::now().as_second().rem_euclid(86_400);
    if to_midnight < 60 {
        std::thread::sleep(std::time::Duration::from_secs(to_midnight.unsigned_abs() + 1));
    }
}

#[test]
fn retention_tells_why_and_when_and_tries_other_rules() {
    let mut keepd = Keepd::prepared();
    // A run at midnight is the first of its day: whatever the hour of this test, the next one belongs to another day.
    keepd.configure("", "schedule = \"0 0 * * *\"\ntimezone = \"UTC\"\nretention = { keep_daily = 3 }");
    make_database(&keepd.path("shop.db"), 50);
    wait_out_midnight();
    keepd.start();
    assert!(keepd.ok(&["retention", "shop"]).contains("keep_daily = 3"));
    backup(&keepd, 0);
    let told = keepd.ok(&["retention", "shop"]);
    assert!(told.contains("newest good backup; keep_daily: newest of"), "{told}");
    let plan = keepd.json(&["retention", "shop", "--destination", "local"]);
    let verdict = &plan[0]["verdicts"][0];
    let (made, falls): (jiff::Timestamp, jiff::Timestamp) =
        (verdict["time"].as_str().unwrap().parse().unwrap(), verdict["falls"].as_str().unwrap().parse().unwrap());
    // It stays until three other days have one: to the third midnight from now.
    let today = made.to_zoned(jiff::tz::TimeZone::UTC).start_of_day().unwrap();
    assert_eq!(falls, today.checked_add(jiff::Span::new().days(3)).unwrap().timestamp(), "made at {made}");
    backup(&keepd, 1);
    assert_eq!(keepd.backups().len(), 1);
    let tried = keepd.json(&["retention", "shop", "--keep-within", "30d", "--min-keep", "2"]);
    assert_eq!(tried[0]["policy"]["keep_within"], 30 * 86_400);
    assert_eq!((tried[0]["simulated"].as_bool(), tried[0]["removes"].as_u64()), (Some(true), Some(0)));
    assert_eq!(keepd.json(&["retention", "shop"])[0]["policy"]["keep_daily"], 3, "trying changes nothing");
    assert!(keepd.fails(1, &["retention", "shop", "--min-keep", "2"]).contains("min_keep removes nothing by itself"));
    assert!(keepd.fails(1, &["retention", "shoop"]).contains("configured are: shop"));
    assert!(keepd.fails(1, &["retention", "shop", "--destination", "moon"]).contains("its destinations are: local"));
    keepd.fails(2, &["retention", "shop", "--keep-last", "0"]);
    keepd.fails(2, &["retention", "shop", "--keep-within", "soon"]);
    keepd.fails(2, &["retention", "shop", "--keep-last", "1", "--apply"]);
}

#[test]
fn rules_that_count_time_are_applied_also_where_no_backup_comes() {
    let mut keepd = Keepd::prepared();
    keepd.configure("", "retention = { keep_within = \"4s\" }");
    make_database(&keepd.path("shop.db"), 50);
    keepd.start();
    backup(&keepd, 0);
    backup(&keepd, 1);
    assert_eq!(keepd.backups().len(), 2);
    keepd.stop();
    std::thread::sleep(Duration::from_secs(4));
    // The daemon looks after its house more often where a check is due often.
    keepd.configure("prune_grace = \"0s\"\ncheck_every = \"10s\"", "retention = { keep_within = \"4s\" }");
    keepd.start();
    let since = Instant::now();
    while keepd.backups().len() != 1 {
        assert!(since.elapsed() < Duration::from_secs(10), "{}", keepd.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    let runs = keepd.json(&["run", "list"]);
    assert!(runs.as_array().unwrap().iter().any(|r| r["kind"] == "retention" && r["by"] == "schedule"), "{runs}");
    keepd.restored("latest");
}
