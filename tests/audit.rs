//! Who did what, by the real binaries: every call leaves its entries, and whatever is done to the log afterwards is found.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::*;
use rusqlite::Connection;
use serde_json::{Value, json};

/// Somebody who may do nothing.
const STRANGER: u32 = 65_534;

fn entries(keepd: &Keepd) -> Vec<Value> {
    keepd.json(&["audit", "list"]).as_array().unwrap().clone()
}

/// Those of one action.
fn of(keepd: &Keepd, action: &str) -> Vec<Value> {
    entries(keepd).into_iter().filter(|e| e["action"] == action).collect()
}

/// Waits until there are so many of an action.
fn at_least(keepd: &Keepd, action: &str, n: usize) -> Vec<Value> {
    let since = Instant::now();
    loop {
        let found = of(keepd, action);
        if found.len() >= n {
            return found;
        }
        assert!(since.elapsed() < Duration::from_secs(30), "{action}: {found:?}\n{}", keepd.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn results(entries: &[Value]) -> Vec<&str> {
    entries.iter().map(|e| e["result"].as_str().unwrap()).collect()
}

fn is_root() -> bool {
    let is = rustix::process::geteuid().is_root();
    if !is {
        eprintln!("SKIPPED: this test needs root");
    }
    is
}

/// keepctl as somebody else; the socket is opened to everybody first.
fn ctl_as(keepd: &Keepd, uid: u32, arguments: &[&str]) -> std::process::Output {
    fs::set_permissions(keepd.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(keepd.path("keepd.sock"), fs::Permissions::from_mode(0o666)).unwrap();
    // Where the binaries lie may be closed to others.
    let program = keepd.path("keepctl");
    if !program.exists() {
        copy_program(&keepctl_binary(), &program);
    }
    Command::new(program).arg("--socket").arg(keepd.path("keepd.sock")).args(arguments).uid(uid).gid(uid).current_dir("/").output().unwrap()
}

fn ledger(keepd: &Keepd) -> Connection {
    Connection::open(keepd.path("state/ledger.sqlite")).unwrap()
}

fn verified(keepd: &Keepd, code: i32) -> Value {
    let out = keepd.ctl(&["audit", "verify", "--json"]);
    assert_eq!(out.status.code(), Some(code), "{}", text(&out));
    serde_json::from_slice(&out.stdout).unwrap()
}

fn heads(root: &Path) -> Vec<PathBuf> {
    files_below(&root.join("audit"))
}

/// A call without keepctl; the reply is only waited for.
fn call(keepd: &Keepd, method: &str, parameters: &Value) {
    let mut stream = UnixStream::connect(keepd.path("keepd.sock")).unwrap();
    let mut bytes = json!({ "method": format!("io.keepd.Control.{method}"), "parameters": parameters }).to_string().into_bytes();
    bytes.push(0);
    stream.write_all(&bytes).unwrap();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 && byte[0] != 0 {}
}

#[test]
fn calls_leave_what_was_done_and_how_it_ended() {
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop", "--label", "reason=an update"]);
    let ends = at_least(&keepd, "run", 1);
    let calls = of(&keepd, "StartBackup");
    assert_eq!(results(&calls), ["begun", "done"]);
    let (begun, done) = (&calls[0], &calls[1]);
    assert_eq!((begun["user"].as_str(), begun["uid"].as_u64()), (Some("root"), Some(0)), "{begun}");
    assert_eq!(begun["on"], json!({ "job": "shop", "labels": { "reason": "an update" } }));
    assert_eq!((begun["right"].as_str(), done["begun"].as_u64()), (Some("backup"), begun["seq"].as_u64()));
    assert!(begun["command"].as_str().unwrap().ends_with("backup shop --label reason=an update"), "{begun}");
    let run = done["run"].as_str().unwrap();
    let end = ends.iter().find(|e| e["run"] == run).unwrap();
    assert_eq!((end["result"].as_str(), end["user"].as_str(), end["begun"].clone()), (Some("done"), Some("root"), begun["seq"].clone()));
    assert_eq!(
        (end["on"]["kind"].as_str(), end["on"]["state"].as_str(), end["on"]["job"].as_str()),
        (Some("backup"), Some("good"), Some("shop"))
    );

    // What fails says why; so does a call whose shape is wrong.
    call(&keepd, "StartDelete", &json!({ "backup": "beefbeef" }));
    let failed = of(&keepd, "StartDelete");
    assert_eq!(results(&failed), ["begun", "failed"], "what is not there was not refused");
    assert!(failed[1]["on"]["backup"] == "beefbeef" && failed[1]["message"].as_str().is_some_and(|m| m.contains("beefbeef")), "{failed:?}");
    call(&keepd, "StartPrune", &json!({ "destination": "local", "password": "hunter2" }));
    let prunes = of(&keepd, "StartPrune");
    assert_eq!(results(&prunes), ["begun", "failed"]);
    assert!(prunes[1]["message"].as_str().unwrap().contains("password") && prunes[1]["on"]["not_kept"] == json!(["password"]));
    assert!(!entries(&keepd).iter().any(|e| e.to_string().contains("hunter2")));

    // What only looks leaves nothing; what reveals names does.
    keepd.ok(&["list"]);
    keepd.ok(&["status"]);
    keepd.ok(&["ls", "latest", "files", "--job", "shop"]);
    let all = entries(&keepd);
    assert!(!all.iter().any(|e| e["action"] == "ListBackups" || e["action"] == "GetStatus"));
    let listed: Vec<_> = all.iter().filter(|e| e["action"] == "ListEntries").collect();
    assert_eq!((results(&[listed[0].clone()]), listed.len(), listed[0]["on"]["path"].as_str()), (vec!["done"], 1, Some("files")));
    // By the bytes that were asked for, whatever else is said of them.
    let path = json!({ "path": "files/harmless", "base64": data_encoding::BASE64.encode(b"files/deep/note.txt") });
    call(&keepd, "ListEntries", &json!({ "backup": "latest", "path": path }));
    let listed = of(&keepd, "ListEntries");
    assert_eq!(listed[1]["on"]["path"], "files/deep/note.txt");
    // A command line does not keep a secret.
    keepd.ctl(&["backup", "none", "--label", "password=hunter2"]);
    assert!(!entries(&keepd).iter().any(|e| e["command"].as_str().is_some_and(|c| c.contains("hunter2"))));

    // By any of its filters, as lines, as a table.
    let lines = keepd.ok(&["audit", "list", "--jsonl"]);
    let parsed: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(parsed.len() >= all.len() && parsed.iter().enumerate().all(|(at, e)| e["seq"].as_u64() == Some(at as u64 + 1)));
    assert_eq!(keepd.json(&["audit", "list", "--user", "0", "--action", "StartPrune", "-n", "1"])[0]["result"], "failed");
    assert_eq!(keepd.json(&["audit", "list", "--user", "keepd", "--action", "start"]).as_array().unwrap().len(), 1);
    assert_eq!(keepd.json(&["audit", "list", "--until", "1h"]), json!([]));
    assert_eq!(keepd.json(&["audit", "list", "--refused"]), json!([]));
    assert!(keepd.ok(&["audit", "list", "--since", "1h", "-n", "5000"]).contains("StartBackup"));
    keepd.fails(2, &["audit", "list", "--since", "some day"]);
    assert!(keepd.ok(&["audit", "verify"]).contains("are whole"));

    // Each is a line of the log, too.
    let log = keepd.log();
    assert!(log.contains("audit: root: StartBackup: done") && log.contains("audit: keepd: start: done"), "{log}");
}

#[test]
fn whoever_has_the_lines_can_prove_the_chain() {
    use sha2::{Digest, Sha256};
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    at_least(&keepd, "run", 1);
    let lines = keepd.ok(&["audit", "list", "--jsonl"]);
    let instance: Vec<u8> = ledger(&keepd).query_row("SELECT instance FROM audit_base", [], |r| r.get(0)).unwrap();
    let mut before = instance;
    for line in lines.lines() {
        let (text, hash) = line.rsplit_once(",\"hash\":\"").unwrap();
        let mut sum = Sha256::new();
        sum.update(b"keepd audit entry 1\0");
        sum.update(&before);
        sum.update(format!("{text}}}"));
        before = sum.finalize().to_vec();
        assert_eq!(hash.trim_end_matches("\"}"), data_encoding::HEXLOWER.encode(&before), "{line}");
    }
}

#[test]
fn starts_stops_reloads_and_changes_of_the_configuration() {
    let mut keepd = Keepd::started();
    let first = at_least(&keepd, "config_changed", 1);
    assert_eq!((first[0]["user"].as_str(), first[0]["on"]["before"].clone()), (Some("keepd"), Value::Null));
    keepd.configure("", "timezone = \"Europe/Berlin\"");
    signal(keepd.pid(), "HUP");
    let changed = at_least(&keepd, "config_changed", 2);
    assert_eq!(changed[1]["on"]["before"], changed[0]["on"]["sha256"]);
    let reload = at_least(&keepd, "reload", 1);
    assert_eq!(
        (reload[0]["result"].as_str(), reload[0]["uid"].as_u64()),
        (Some("done"), Some(u64::from(rustix::process::geteuid().as_raw())))
    );
    assert!(reload[0]["pid"].as_i64().unwrap() > 0);
    fs::write(keepd.path("keepd.toml"), "[daemon\n").unwrap();
    signal(keepd.pid(), "HUP");
    let reload = at_least(&keepd, "reload", 2);
    assert_eq!(reload[1]["result"], "failed");
    keepd.configure("", "timezone = \"Europe/Berlin\"");
    keepd.stop();
    keepd.start();
    let all = entries(&keepd);
    let (stop, start) =
        (all.iter().position(|e| e["action"] == "stop").unwrap(), all.iter().rposition(|e| e["action"] == "start").unwrap());
    assert!(stop + 1 == start && all[stop]["on"]["signal"] == "SIGTERM", "{all:?}");
    assert_eq!(of(&keepd, "config_changed").len(), 2, "the same configuration is said once");
    keepd.kill();
    keepd.start();
    assert_eq!(verified(&keepd, 0)["broken"], Value::Null, "a killed keepd leaves a whole chain");
}

#[test]
fn who_hangs_up_is_not_forgotten() {
    let keepd = Keepd::prepared();
    let d = keepd.dir.path().display().to_string();
    // Asking a destination waits for a plugin that takes its time.
    let mut keepd = keepd;
    let slow = keepd.path("slow.sh");
    fs::write(&slow, "#!/bin/sh\nsleep 20\n").unwrap();
    fs::set_permissions(&slow, fs::Permissions::from_mode(0o755)).unwrap();
    let more = format!("[destination.slow]\nservice = \"exec\"\ncommand = [\"{d}/slow.sh\"]\nencryption = \"none\"\n");
    let toml = fs::read_to_string(keepd.path("keepd.toml")).unwrap().replace("[job.shop]", &format!("{more}[job.shop]"));
    fs::write(keepd.path("keepd.toml"), toml).unwrap();
    make_database(&keepd.path("shop.db"), 10);
    keepd.start();
    let mut stream = UnixStream::connect(keepd.path("keepd.sock")).unwrap();
    stream.write_all(b"{\"method\":\"io.keepd.Control.TestDestination\",\"parameters\":{\"destination\":\"slow\"}}\0").unwrap();
    at_least(&keepd, "TestDestination", 1);
    drop(stream);
    let calls = at_least(&keepd, "TestDestination", 2);
    assert_eq!(results(&calls), ["begun", "failed"]);
    assert!(calls[1]["message"].as_str().unwrap().contains("hung up") && calls[1]["begun"] == calls[0]["seq"]);
}

#[test]
fn refusals_are_kept_and_a_flood_of_them_is_bounded() {
    if !is_root() {
        return;
    }
    let mut keepd = Keepd::started();
    for _ in 0..40 {
        assert_eq!(ctl_as(&keepd, STRANGER, &["backup", "shop"]).status.code(), Some(5));
    }
    assert_eq!(ctl_as(&keepd, STRANGER, &["status"]).status.code(), Some(5));
    let refused = keepd.json(&["audit", "list", "--refused"]);
    let refused = refused.as_array().unwrap();
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert_eq!((refused[0]["action"].as_str(), refused[0]["uid"].as_u64()), (Some("StartBackup"), Some(u64::from(STRANGER))));
    assert!(
        refused[0]["message"].as_str().is_some_and(|m| !m.is_empty()) && refused[0]["command"].as_str().unwrap().contains("backup shop")
    );
    // What was only counted is written down at the latest when keepd stops.
    keepd.stop();
    keepd.start();
    let refused = keepd.json(&["audit", "list", "--refused", "--user", &STRANGER.to_string()]);
    let counted: Vec<_> = refused.as_array().unwrap().iter().filter_map(|e| e["times"].as_u64()).collect();
    assert_eq!(counted, [40]);
    let last = &refused.as_array().unwrap()[1];
    assert_eq!((last["action"].as_str(), last["on"]["methods"].clone()), (Some("GetStatus"), json!(["StartBackup", "GetStatus"])));
    verified(&keepd, 0);
}

#[test]
fn nothing_in_a_name_reaches_the_terminal() {
    let keepd = Keepd::started();
    let bad = "\u{1b}[2J\u{1b}]0;x\u{7}\n2026 root Delete done";
    keepd.ok(&["backup", "shop", "--label", &format!("reason={bad}"), "--description", bad]);
    keepd.ctl(&["restore", "latest", "--job", "shop", "--to", keepd.path("out").to_str().unwrap(), &format!("files/{bad}")]);
    for arguments in [&["audit", "list"][..], &["audit", "list", "-v"]] {
        let table = keepd.ok(arguments);
        assert!(table.contains("StartBackup") && !table.contains(|c: char| c.is_control() && c != '\n'), "{table:?}");
        assert!(!table.lines().any(|line| line.starts_with("2026 root")), "{table}");
    }
    let lines = keepd.ok(&["audit", "list", "--jsonl"]);
    assert!(lines.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()) && !lines.contains('\u{1b}'));
    let log = keepd.log();
    assert!(!log.lines().filter(|l| l.contains("audit:")).any(|l| l.contains("2J\u{1b}]0")), "{log}");
}

/// Stops keepd, changes its ledger, starts it; what a verification finds.
fn after(keepd: &mut Keepd, change: impl FnOnce(&Keepd)) -> Value {
    keepd.stop();
    change(keepd);
    keepd.start();
    verified(keepd, 1)
}

#[test]
fn whatever_is_done_to_the_ledger_is_found() {
    let cases: [(&str, &str, u64); 5] = [
        (
            "one byte",
            "UPDATE audit SET json = replace(json, '\"user\":\"root\"', '\"user\":\"rott\"') WHERE seq = (SELECT min(seq) FROM audit WHERE json ->> 'user' = 'root')",
            0,
        ),
        ("a removed entry", "DELETE FROM audit WHERE seq = 4", 4),
        ("a removed tail", "DELETE FROM audit WHERE seq > 3", 4),
        (
            "exchanged entries",
            "UPDATE audit SET seq = -1 WHERE seq = 2; UPDATE audit SET seq = 2 WHERE seq = 3; UPDATE audit SET seq = 3 WHERE seq = -1",
            2,
        ),
        ("no JSON", "UPDATE audit SET json = 'x' || json WHERE seq = 3", 3),
    ];
    for (what, sql, seq) in cases {
        let mut keepd = Keepd::started();
        keepd.ok(&["config", "show"]);
        keepd.ok(&["config", "show"]);
        verified(&keepd, 0);
        let mut expected = seq;
        let found = after(&mut keepd, |keepd| {
            let db = ledger(keepd);
            if seq == 0 {
                let first = "SELECT min(seq) FROM audit WHERE json ->> 'user' = 'root'";
                expected = db.query_row(first, [], |r| r.get::<_, i64>(0)).unwrap() as u64;
            }
            db.execute_batch(sql).unwrap();
        });
        assert_eq!(found["broken"]["seq"].as_u64(), Some(expected), "{what}: {found}");
        let said = keepd.fails(1, &["audit", "verify"]);
        assert!(said.contains(&format!("BROKEN at entry {expected}")), "{what}: {said}");
        // It stays so, and the log goes on behind it.
        keepd.stop();
        keepd.start();
        assert_eq!(verified(&keepd, 1)["broken"]["seq"].as_u64(), Some(expected), "{what}");
        assert!(!keepd.ok(&["audit", "list"]).is_empty());
    }
}

#[test]
fn an_older_copy_of_the_ledger_does_not_pass() {
    let mut keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    at_least(&keepd, "run", 1);
    keepd.stop();
    let (state, saved) = (keepd.path("state"), keepd.dir.path().to_owned());
    // Nothing may stand beside it only.
    ledger(&keepd).query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    for file in ["ledger.sqlite", "audit-head"] {
        fs::copy(state.join(file), keepd.path(file)).unwrap();
    }
    let back = |files: &[&str]| {
        for rest in ["ledger.sqlite-wal", "ledger.sqlite-shm"] {
            let _ = fs::remove_file(state.join(rest));
        }
        for file in files {
            fs::copy(saved.join(file), state.join(file)).unwrap();
        }
    };
    let old = ledger(&keepd).query_row("SELECT max(seq) FROM audit", [], |r| r.get::<_, i64>(0)).unwrap() as u64;
    keepd.start();
    keepd.ok(&["config", "show"]);
    // A head of now at the destination: an hour has passed, as far as keepd knows.
    ledger(&keepd).execute("UPDATE note SET value = json_set(value, '$.second', 0) WHERE name LIKE 'audit head at %'", []).unwrap();
    keepd.ok(&["backup", "shop"]);
    let published = heads(&keepd.path("repository")).len();
    assert_eq!(published, 2);

    // The ledger alone: the file beside it knows better.
    let found = after(&mut keepd, |_| back(&["ledger.sqlite"]));
    assert_eq!(found["broken"]["seq"].as_u64(), Some(old + 1), "{found}");
    let said = &of(&keepd, "log_problem")[0];
    assert!(said["message"].as_str().unwrap().contains("cut off or set back"), "{said}");

    // Both, so that the chain is whole: what was published is beyond it.
    keepd.stop();
    back(&["ledger.sqlite", "audit-head"]);
    keepd.start();
    let found = verified(&keepd, 1);
    assert_eq!(found["broken"], Value::Null);
    let head = found["heads"].as_array().unwrap().iter().find(|h| h["destination"] == "local").unwrap();
    assert!(head["agrees"] == false && head["seq"].as_u64().unwrap() > old, "{head}");
    assert!(keepd.ok(&["audit", "verify", "--offline"]).contains("whole"));

    // A new ledger: said in its first entry, and the destination remembers another log of this place.
    keepd.stop();
    fs::remove_file(state.join("ledger.sqlite")).unwrap();
    back(&[]);
    keepd.start();
    assert!(entries(&keepd)[0]["message"].as_str().unwrap().contains("another log"));
    let found = verified(&keepd, 3);
    let head = found["heads"].as_array().unwrap().iter().find(|h| h["destination"] == "local").unwrap();
    assert!(head["agrees"].is_null() && head["message"].as_str().unwrap().contains("begun anew"), "{head}");
}

#[test]
fn a_log_that_was_cut_does_not_pass_for_whole_where_its_head_is_gone() {
    let mut keepd = Keepd::started();
    keepd.ok(&["config", "show"]);
    keepd.ok(&["config", "show"]);
    assert_eq!(verified(&keepd, 0)["problems"], json!([]));
    keepd.stop();
    ledger(&keepd).execute_batch("DELETE FROM audit WHERE seq > 3").unwrap();
    fs::remove_file(keepd.path("state/audit-head")).unwrap();
    for _ in 0..2 {
        keepd.start();
        let problems = verified(&keepd, 3)["problems"].clone();
        assert!(problems[0]["seq"] == 4 && problems[0]["why"].as_str().unwrap().contains("audit-head is missing"), "{problems}");
        assert!(text(&keepd.ctl(&["audit", "verify"])).contains("entry 4 says: audit-head is missing"));
        keepd.stop();
    }
}

#[test]
fn heads_at_destinations() {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 50);
    fs::write(keepd.path("files/note"), "a note").unwrap();
    let d = keepd.dir.path().display().to_string();
    let text = format!(
        "[daemon]\nstate_dir = \"{d}/state\"\nsocket = \"{d}/keepd.sock\"\n[encryption.main]\nkey_file = \"main.key\"\n\
         [destination.local]\nservice = \"fs\"\nroot = \"{d}/repository\"\nencryption = \"main\"\n\
         [destination.kept]\nservice = \"fs\"\nroot = \"{d}/kept\"\nencryption = \"main\"\nappend_only = true\n\
         [destination.plain]\nservice = \"fs\"\nroot = \"{d}/plain\"\nlayout = \"archive\"\nencryption = \"none\"\n\
         [job.shop]\ndestinations = [\"local\", \"kept\", \"plain\"]\n\
         [[job.shop.source]]\nname = \"db\"\nsqlite = \"{d}/shop.db\"\n[[job.shop.source]]\nname = \"files\"\nfiles = \"{d}/files\"\n"
    );
    fs::write(keepd.path("keepd.toml"), text).unwrap();
    keepd.start();
    let found = verified(&keepd, 0);
    assert!(found["heads"].as_array().unwrap().iter().all(|h| h["agrees"] == true), "none is there yet, and none is missing: {found}");
    keepd.ok(&["backup", "shop"]);
    at_least(&keepd, "run", 3);
    for place in ["repository", "kept", "plain"] {
        let there = heads(&keepd.path(place));
        assert_eq!(there.len(), 1, "{place}: {}", keepd.log());
        let head: Value = serde_json::from_slice(&fs::read(&there[0]).unwrap()).unwrap();
        let name = there[0].file_name().unwrap().to_str().unwrap().to_owned();
        let (seq, hash) = name.split_once('-').unwrap();
        assert_eq!(seq.parse::<u64>().unwrap(), head["seq"].as_u64().unwrap());
        assert!(head["hash"].as_str().unwrap().starts_with(hash) && hash.len() == 16 && head["audit_head"] == 1, "{head}");
        let stored = entries(&keepd).into_iter().find(|e| e["seq"] == head["seq"]).unwrap();
        assert_eq!(stored["hash"], head["hash"]);
    }
    // At most once an hour.
    keepd.ok(&["backup", "shop"]);
    at_least(&keepd, "run", 6);
    assert_eq!(heads(&keepd.path("repository")).len(), 1);
    // Nobody stumbles over them.
    fs::write(keepd.path("repository/audit/readme"), "what is not keepd's").unwrap();
    keepd.ok(&["check", "local", "--read-data"]);
    keepd.ok(&["check", "plain"]);
    keepd.ok(&["prune", "local"]);
    keepd.ok(&["destination", "test", "plain"]);
    keepd.ok(&["destination", "take-over", "local"]);
    assert_eq!(keepd.backups().len(), 2);
    assert_eq!(heads(&keepd.path("repository")).len(), 2, "and they are left alone");
    verified(&keepd, 0);

    // A head that says something else, one that is gone, and a destination that does not answer.
    let head = heads(&keepd.path("kept"))[0].clone();
    let good = fs::read(&head).unwrap();
    let name = head.file_name().unwrap().to_str().unwrap().to_owned();
    let other = head.with_file_name(format!("{}-0123456789abcdef", name.split_once('-').unwrap().0));
    fs::rename(&head, &other).unwrap();
    let of = |found: &Value, name: &str| found["heads"].as_array().unwrap().iter().find(|h| h["destination"] == name).unwrap().clone();
    assert!(of(&verified(&keepd, 1), "kept")["message"].as_str().unwrap().contains("another one"));
    fs::remove_file(&other).unwrap();
    assert!(of(&verified(&keepd, 1), "kept")["message"].as_str().unwrap().contains("gone"));
    fs::write(&head, b"no JSON").unwrap();
    assert_eq!(of(&verified(&keepd, 3), "kept")["agrees"], Value::Null);
    fs::write(&head, &good).unwrap();
    verified(&keepd, 0);
    fs::rename(keepd.path("plain"), keepd.path("away")).unwrap();
    fs::write(keepd.path("plain"), "no directory").unwrap();
    let found = verified(&keepd, 3);
    assert!(of(&found, "plain")["agrees"].is_null() && !of(&found, "plain")["message"].as_str().unwrap().is_empty(), "{found}");
    assert_eq!(keepd.ctl(&["audit", "verify", "--offline"]).status.code(), Some(0));
}

#[test]
fn it_is_in_no_backup_and_no_restore() {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 10);
    fs::create_dir_all(keepd.path("files/var")).unwrap();
    fs::write(keepd.path("files/note"), "a note").unwrap();
    let d = keepd.dir.path().display().to_string();
    let inside = |job: &str| {
        fs::read_to_string(keepd.path("keepd.toml"))
            .unwrap()
            .replace(&format!("state_dir = \"{d}/state\""), &format!("state_dir = \"{d}/files/var/keepd state\""))
            .replace("[job.shop]", &format!("[job.shop]\n{job}"))
    };
    let good = inside("");
    // A job that reads keepd's own files is refused.
    let wrong = good.replace(&format!("sqlite = \"{d}/shop.db\""), &format!("sqlite = \"{d}/files/var/keepd state/ledger.sqlite\""));
    fs::write(keepd.path("keepd.toml"), wrong).unwrap();
    let out = keepd.command().arg("--check").output().unwrap();
    assert!(!out.status.success() && text(&out).contains("lies inside daemon.state_dir"), "{}", text(&out));
    // One that reads what is above leaves them out, whatever its patterns say.
    fs::write(
        keepd.path("keepd.toml"),
        good.replace(&format!("files = \"{d}/files\""), &format!("files = \"{d}/files\"\nexclude = [\"*.none\", \"!/var/**\"]")),
    )
    .unwrap();
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let listed = keepd.ok(&["ls", "latest", "files", "-R", "--job", "shop"]);
    assert!(listed.contains("note") && !listed.contains("ledger") && !listed.contains("audit-head"), "{listed}");
    // A restore in place goes around them.
    fs::write(keepd.path("files/note"), "changed").unwrap();
    let before = entries(&keepd).len();
    keepd.ok(&["restore", "latest", "--job", "shop", "--in-place", "--source", "files", "--yes"]);
    assert_eq!(fs::read_to_string(keepd.path("files/note")).unwrap(), "a note");
    assert!(entries(&keepd).len() > before);
    assert_eq!(verified(&keepd, 0)["broken"], Value::Null);
    // Nor does it leave with the configuration.
    keepd.ok(&["config", "export", "--encryption", "none", "-o", keepd.path("out.json.gz").to_str().unwrap()]);
    let out = Command::new("gzip").args(["-dc"]).arg(keepd.path("out.json.gz")).output().unwrap();
    assert!(!text(&out).contains("StartBackup"));
}

#[test]
fn what_is_old_goes_and_the_rest_stays_provable() {
    let mut keepd = Keepd::started();
    keepd.ok(&["config", "show"]);
    keepd.stop();
    // Entries of long ago, in a chain that is whole: the clock of then, made here.
    use sha2::{Digest, Sha256};
    let db = ledger(&keepd);
    let mut before: Vec<u8> = db.query_row("SELECT instance FROM audit_base", [], |r| r.get(0)).unwrap();
    let rows: Vec<(i64, String)> = db
        .prepare("SELECT seq, json FROM audit ORDER BY seq")
        .unwrap()
        .query_map([], |r| Ok((r.get(0)?, r.get(1)?)))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let half = rows.len() / 2;
    for (at, (seq, json)) in rows.iter().enumerate() {
        let json = if at < half { json.replacen("\"time\":\"20", "\"time\":\"19", 1) } else { json.clone() };
        let mut sum = Sha256::new();
        sum.update(b"keepd audit entry 1\0");
        sum.update(&before);
        sum.update(&json);
        before = sum.finalize().to_vec();
        db.execute("UPDATE audit SET json = ?1, hash = ?2 WHERE seq = ?3", rusqlite::params![json, before, seq]).unwrap();
    }
    drop(db);
    let head = fs::read_to_string(keepd.path("state/audit-head")).unwrap();
    let mut head: Value = serde_json::from_str(&head).unwrap();
    head["hash"] = json!(data_encoding::HEXLOWER.encode(&before));
    fs::write(keepd.path("state/audit-head"), head.to_string()).unwrap();
    // The house is kept every so often where a job has a drill that is due so often.
    keepd.configure("check_every = \"1d\"", "");
    let toml = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), toml.replace("check_every = \"1d\"", "check_every = \"1s\"")).unwrap();
    let allowed = keepd.command().arg("--check").output().unwrap().status.success();
    assert!(allowed, "{}", text(&keepd.command().arg("--check").output().unwrap()));
    keepd.start();
    let said = at_least(&keepd, "retention", 1);
    assert_eq!(
        (said[0]["on"]["from"].as_u64(), said[0]["on"]["to"].as_u64(), said[0]["user"].as_str()),
        (Some(1), Some(half as u64), Some("keepd"))
    );
    let since = Instant::now();
    let found = loop {
        let found = verified(&keepd, 0);
        if found["first"].as_u64() == Some(half as u64 + 1) {
            break found;
        }
        assert!(since.elapsed() < Duration::from_secs(10), "{found}");
    };
    assert_eq!(found["broken"], Value::Null);
    let wrong = fs::read_to_string(keepd.path("keepd.toml")).unwrap() + "[audit]\nkeep = \"3d\"\n";
    fs::write(keepd.path("keepd.toml"), wrong).unwrap();
    assert!(!keepd.command().arg("--check").output().unwrap().status.success(), "less than 30 days is refused");
}

/// Unmounts when it is dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn root_goes_on_where_the_log_cannot_be_written() {
    if !is_root() {
        return;
    }
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 10);
    let state = keepd.path("state");
    fs::create_dir(&state).unwrap();
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs"]).arg(&state).stderr(Stdio::null()).status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: no tmpfs can be mounted here");
        return;
    }
    let mounted = Mounted(state.clone());
    keepd.start();
    keepd.ok(&["config", "show"]);
    let written = entries(&keepd).len();
    let mut filler = fs::File::create(state.join("filler")).unwrap();
    while filler.write_all(&[7; 4096]).is_ok() {}
    // The log before the ledger may have room for a little: until nothing goes any more.
    let since = Instant::now();
    while !keepd.log().contains("the audit log could not be written") {
        assert!(since.elapsed() < Duration::from_secs(30), "{}", keepd.log());
        keepd.ok(&["config", "show"]);
    }
    keepd.ok(&["config", "show"]);
    assert_eq!(ctl_as(&keepd, STRANGER, &["config", "show"]).status.code(), Some(5));
    drop(filler);
    fs::remove_file(state.join("filler")).unwrap();
    keepd.ok(&["config", "show"]);
    let all = entries(&keepd);
    assert!(all.len() > written);
    let missing = all.iter().find(|e| e["action"] == "log_missing").unwrap();
    assert!(missing["on"]["entries"].as_u64().unwrap() >= 2, "{missing}");
    assert_eq!(verified(&keepd, 0)["broken"], Value::Null);
    keepd.stop();
    drop(mounted);
}
