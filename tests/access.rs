//! Who may do what, by the real daemon: callers of other users and groups, whose credentials the kernel tells.
//!
//! A thread has credentials of its own, and what it connects or starts has them, too; so these tests need root.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use common::*;
use keepd::access::Right;
use keepd::access::deed::{self, Subject};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use serde_json::{Value, json};

const ADMIN: u32 = 610_001;
const OPERATOR: u32 = 610_002;
const VIEWER: u32 = 610_003;
const NOBODY: u32 = 610_004;
/// All rights, for the job shop alone.
const LIMITED: u32 = 610_005;
/// Changes jobs, and nothing else.
const EDITOR: u32 = 610_006;
/// Imports configurations, and nothing else.
const IMPORTER: u32 = 610_007;
/// A group that /etc/group does not know.
const GROUP: u32 = 777_001;

const NOT_PERMITTED: &str = "io.keepd.Control.NotPermitted";
const BUSY: &str = "io.keepd.Control.Busy";

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: only root can take the credentials of others");
    }
    root
}

/// Does something with the credentials of another.
fn as_user<T: Send>(uid: u32, groups: &[u32], work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let groups: Vec<Gid> = groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
            set_thread_groups(&groups).unwrap();
            let (gid, uid) = (Gid::from_raw(uid), Uid::from_raw(uid));
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

struct Connection(UnixStream);

impl Connection {
    fn of(keepd: &Keepd, uid: u32) -> Self {
        Self::with_groups(keepd, uid, &[])
    }

    fn with_groups(keepd: &Keepd, uid: u32, groups: &[u32]) -> Self {
        let path = keepd.path("keepd.sock");
        let stream = if uid == 0 { UnixStream::connect(path) } else { as_user(uid, groups, || UnixStream::connect(path)) };
        let stream = stream.unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self(stream)
    }

    fn send(&mut self, call: &Value) {
        let mut bytes = serde_json::to_vec(call).unwrap();
        bytes.push(0);
        self.0.write_all(&bytes).unwrap();
    }

    fn receive(&mut self) -> Option<Value> {
        let (mut bytes, mut one) = (Vec::new(), [0u8; 1]);
        loop {
            match self.0.read(&mut one) {
                Ok(0) | Err(_) => return None,
                Ok(_) if one[0] == 0 => return serde_json::from_slice(&bytes).ok(),
                Ok(_) => bytes.push(one[0]),
            }
        }
    }

    fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.send(&json!({ "method": method, "parameters": parameters }));
        self.receive().expect("a reply")
    }

    /// The parameters of a reply that is no error.
    fn ok(&mut self, method: &str, parameters: Value) -> Value {
        let reply = self.call(&format!("io.keepd.Control.{method}"), parameters);
        assert!(reply.get("error").is_none(), "{method}: {reply}");
        reply["parameters"].clone()
    }

    /// What is said of a call that is not permitted, and which right is missing.
    fn refused(&mut self, method: &str, parameters: Value) -> (String, String) {
        let reply = self.call(&format!("io.keepd.Control.{method}"), parameters);
        assert_eq!(reply["error"], NOT_PERMITTED, "{method}: {reply}");
        let text = |key: &str| reply["parameters"][key].as_str().unwrap_or_default().to_owned();
        (text("message"), text("right"))
    }
}

/// keepctl with the credentials of another.
fn ctl(keepd: &Keepd, uid: u32, arguments: &[&str]) -> Output {
    let copy = keepd.path("keepctl");
    if !copy.exists() {
        copy_program(&keepctl_binary(), &copy);
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new(copy);
    command.current_dir("/").arg("--socket").arg(keepd.path("keepd.sock")).args(arguments).stdin(std::process::Stdio::null());
    as_user(uid, &[], move || command.output().unwrap())
}

fn access_file(keepd: &Keepd) -> PathBuf {
    keepd.path("conf.d/access.toml")
}

fn roles() -> String {
    let all = Right::ALL.map(|(_, word)| format!("\"{word}\"")).join(", ");
    format!(
        "[access]\nadmin = [{ADMIN}]\noperator = [\"{OPERATOR}\"]\nviewer = [{VIEWER}, \"@{GROUP}\", \"nobody-of-that-name\"]\n\
         [access.role.shopkeeper]\nmembers = [{LIMITED}]\nrights = [{all}]\njobs = [\"shop\"]\n\
         [access.role.editor]\nmembers = [{EDITOR}]\nrights = [\"job_edit\"]\n\
         [access.role.importer]\nmembers = [{IMPORTER}]\nrights = [\"config_import\"]\n"
    )
}

/// Jobs shop and wiki, and everybody may connect.
fn started(more: &str, wiki: &str) -> Keepd {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 50);
    fs::write(keepd.path("files/note"), "a note").unwrap();
    fs::create_dir_all(keepd.path("wiki")).unwrap();
    fs::write(keepd.path("wiki/page"), "a page").unwrap();
    fs::create_dir_all(keepd.path("conf.d")).unwrap();
    let d = keepd.dir.path().display().to_string();
    let others = format!(
        "[coverage]\nroots = [\"{d}/wiki\"]\n[destination.second]\nservice = \"fs\"\nroot = \"{d}/second\"\nencryption = \"main\"\n\
         [job.wiki]\ndestinations = [\"second\"]\n{wiki}\n[[job.wiki.source]]\nname = \"files\"\nfiles = \"{d}/wiki\"\n"
    );
    fs::write(keepd.path("conf.d/others.toml"), others).unwrap();
    fs::write(access_file(&keepd), roles() + more).unwrap();
    let main = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), main.replacen("[daemon]\n", "[daemon]\nmax_parallel_runs = 1\n", 1)).unwrap();
    keepd.start();
    fs::set_permissions(keepd.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(keepd.path("keepd.sock"), fs::Permissions::from_mode(0o666)).unwrap();
    keepd
}

fn reload_with(keepd: &Keepd, access: &str) {
    fs::write(access_file(keepd), access).unwrap();
    keepd.ok(&["reload"]);
}

fn back_up(keepd: &Keepd, job: &str) -> String {
    let before = keepd.backups();
    keepd.ok(&["backup", job]);
    keepd.backups().into_iter().find(|id| !before.contains(id)).unwrap()
}

fn ended(keepd: &Keepd, run: &str) -> Value {
    let since = Instant::now();
    loop {
        // Of one that failed keepctl fails, too.
        let found: Value = serde_json::from_slice(&keepd.ctl(&["run", "show", run, "--json"]).stdout).unwrap();
        if found["finished"].is_string() {
            return found;
        }
        assert!(since.elapsed() < Duration::from_secs(60), "{found}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn every_method_wants_its_right_of_every_role() {
    if !is_root() {
        return;
    }
    let keepd = started("", "");
    let viewer = BTreeSet::from([Right::View, Right::Browse]);
    let operator = BTreeSet::from([Right::View, Right::Browse, Right::Backup, Right::RestoreTo]);
    let all: BTreeSet<Right> = Right::ALL.map(|(right, _)| right).into();
    let roles: [(u32, &[u32], &BTreeSet<Right>, bool); 7] = [
        (0, &[], &all, false),
        (ADMIN, &[], &all, false),
        (OPERATOR, &[], &operator, false),
        (VIEWER, &[], &viewer, false),
        // By a group that only the process has.
        (NOBODY, &[5, GROUP, 6], &viewer, false),
        (NOBODY, &[], &BTreeSet::new(), false),
        (LIMITED, &[], &all, true),
    ];
    for (uid, groups, rights, is_limited) in roles {
        for deed in deed::ALL {
            // Each by a connection of its own, and below the pace.
            let mut connection = Connection::with_groups(&keepd, uid, groups);
            let reply = connection.call(deed.method, json!({}));
            let (error, right) = (reply["error"].as_str().unwrap_or_default(), reply["parameters"]["right"].as_str());
            let Some(wanted) = deed.right else {
                assert_eq!(error, "", "{uid} {}: {reply}", deed.method);
                continue;
            };
            let is_allowed = rights.contains(&wanted) && !(is_limited && matches!(deed.subject, Subject::Whole | Subject::NewImport));
            match is_allowed {
                true => assert_ne!(error, NOT_PERMITTED, "{uid} {}: {reply}", deed.method),
                false => assert_eq!((error, right), (NOT_PERMITTED, Some(wanted.word())), "{uid} {}: {reply}", deed.method),
            }
            std::thread::sleep(Duration::from_millis(21));
        }
    }
}

#[test]
fn a_refusal_says_what_is_missing_and_who_has_it() {
    if !is_root() {
        return;
    }
    let keepd = started("", "");
    back_up(&keepd, "shop");
    let said = ctl(&keepd, VIEWER, &["restore", "latest", "--in-place", "--yes"]);
    assert_eq!(said.status.code(), Some(5), "{}", text(&said));
    let said = text(&said);
    let wanted = format!("uid {VIEWER} may not restore in place (right restore_in_place)");
    assert!(said.contains(&wanted) && said.contains("may (role admin)") && said.contains("(role shopkeeper, job shop)"), "{said}");
    assert_eq!(ctl(&keepd, VIEWER, &["status"]).status.code(), Some(0));
    assert_eq!(ctl(&keepd, OPERATOR, &["backup", "shop"]).status.code(), Some(0));
    let runs = keepd.json(&["run", "list"]);
    assert_eq!(runs[0]["by"], format!("uid {OPERATOR}"));

    // Somebody without a role is told whom to ask.
    let shown = ctl(&keepd, NOBODY, &["access", "show"]);
    let said = text(&shown);
    assert_eq!(shown.status.code(), Some(0), "{said}");
    assert!(said.contains("may do nothing; who may give rights: root") && said.contains(&ADMIN.to_string()), "{said}");
    let shown: Value = serde_json::from_slice(&ctl(&keepd, VIEWER, &["access", "show", "--json"]).stdout).unwrap();
    assert_eq!((shown["access"]["uid"].as_u64(), shown["access"]["grants"][0]["role"].as_str()), (Some(VIEWER.into()), Some("viewer")));
    // Of others, and the roles, only who may read who did what.
    for arguments in [&["access", "show", "root"][..], &["access", "show", "--roles"]] {
        assert_eq!(ctl(&keepd, VIEWER, arguments).status.code(), Some(5));
        assert_eq!(ctl(&keepd, LIMITED, arguments).status.code(), Some(5));
        assert_eq!(ctl(&keepd, ADMIN, arguments).status.code(), Some(0));
    }
    let of = keepd.json(&["access", "show", &LIMITED.to_string()]);
    assert_eq!(of["access"]["grants"][0]["jobs"], json!(["shop"]));
    assert!(keepd.fails(1, &["access", "show", "nobody-of-that-name"]).contains("the system knows no user"));
    assert!(keepd.ok(&["access", "show", "--roles"]).contains("shopkeeper"));
    assert!(keepd.ok(&["access", "show"]).contains("admin"));
}

#[test]
fn what_further_parameters_want() {
    if !is_root() {
        return;
    }
    let keepd = started("", "");
    let shop = back_up(&keepd, "shop");
    let mut operator = Connection::of(&keepd, OPERATOR);
    operator.ok("MarkBackup", json!({ "backup": shop, "mark": "pin" }));
    for mark in ["unpin", "accept"] {
        assert_eq!(operator.refused("MarkBackup", json!({ "backup": shop, "mark": mark })).1, "delete");
    }
    assert_eq!(operator.refused("StartCheck", json!({ "destination": "local", "repair": true })).1, "prune");
    // Their own runs may be stopped by who sees them, others' by who may start them.
    let run = Connection::of(&keepd, OPERATOR).ok("StartCheck", json!({ "destination": "local" }))["run"].clone();
    ended(&keepd, run.as_str().unwrap());
    let mut admin = Connection::of(&keepd, ADMIN);
    let import = admin.ok("InitiateImport", json!({ "destination": "local" }))["import"].clone();
    // A number that there is not, and one that is another's.
    let mut limited = Connection::of(&keepd, LIMITED);
    let other = limited.refused("GetImport", json!({ "import": import })).0;
    let none = limited.refused("GetImport", json!({ "import": "none" })).0;
    assert_eq!(other.replace(import.as_str().unwrap(), "none"), none);
    let own = limited.ok("InitiateImport", json!({ "destination": "local", "job": "shop" }))["import"].clone();
    assert_eq!(limited.ok("ListImports", json!({}))["imports"].as_array().unwrap().len(), 1);
    limited.ok("GetImport", json!({ "import": own }));
    assert_eq!(admin.ok("ListImports", json!({}))["imports"].as_array().unwrap().len(), 2);
    limited.refused("InitiateImport", json!({ "destination": "second", "job": "shop" }));
    limited.refused("InitiateImport", json!({ "destination": "second", "job": "wiki" }));
    assert_eq!(limited.refused("InitiateImport", json!({ "destination": "local", "job": "shop", "on_conflict": "replace" })).1, "delete");
    limited.ok("CancelImport", json!({ "import": own }));
}

const INVALID: &str = "org.varlink.service.InvalidParameter";

/// What a call is refused with, or nothing.
fn error_of(connection: &mut Connection, method: &str, parameters: Value) -> String {
    let reply = connection.call(&format!("io.keepd.Control.{method}"), parameters);
    reply["error"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn a_word_in_another_form_is_no_way_around_its_right() {
    if !is_root() {
        return;
    }
    let keepd = started("", "");
    let shop = back_up(&keepd, "shop");
    let (mut operator, mut editor, mut limited) =
        (Connection::of(&keepd, OPERATOR), Connection::of(&keepd, EDITOR), Connection::of(&keepd, LIMITED));
    operator.ok("MarkBackup", json!({ "backup": shop, "mark": "pin" }));
    for mark in [json!({ "unpin": null }), json!(["unpin"]), json!({ "accept": null })] {
        assert_eq!(error_of(&mut operator, "MarkBackup", json!({ "backup": shop, "mark": mark })), INVALID);
    }
    assert_eq!(operator.ok("ShowBackup", json!({ "backup": shop }))["backup"]["backup"]["pinned"], true);
    let import = |form: Value| json!({ "destination": "local", "job": "shop", "on_conflict": form });
    assert_eq!(error_of(&mut limited, "InitiateImport", import(json!({ "replace": null }))), INVALID);
    assert_eq!(error_of(&mut limited, "InitiateImport", import(json!("replace"))), NOT_PERMITTED);
    let removal = |form: Value| json!({ "edits": [{ "item": "job.shop", "change": "remove" }], "backups": form });
    assert_eq!(error_of(&mut editor, "EditConfig", removal(json!({ "delete": null }))), INVALID);
    assert_eq!(editor.refused("EditConfig", removal(json!("delete"))).1, "delete");
    let edit = json!({ "edits": [{ "item": "job.shop", "change": { "remove": null } }], "backups": "keep" });
    assert_eq!(error_of(&mut limited, "EditConfig", edit), INVALID);
    assert_eq!(operator.ok("ListJobs", json!({}))["jobs"].as_array().unwrap().len(), 2);
    // What people see of a path is what it is.
    let path = json!({ "path": "files/harmless", "base64": "ZmlsZXMv/w==" });
    assert_eq!(error_of(&mut operator, "ListEntries", json!({ "backup": shop, "path": path })), INVALID);
    assert!(keepd.backups().contains(&shop));
}

#[test]
fn who_is_limited_to_a_job_does_nothing_to_another() {
    if !is_root() {
        return;
    }
    let keepd = started("", "hooks = { before = [\"sleep\", \"5\"] }");
    let (shop, wiki) = (back_up(&keepd, "shop"), back_up(&keepd, "wiki"));
    let mut limited = Connection::of(&keepd, LIMITED);
    let calls = |backup: &str, job: &str, destination: &str, file: &str| {
        [
            ("StartCat", json!({ "backup": backup, "path": { "path": file } })),
            ("StartExport", json!({ "backup": backup })),
            ("StartRestore", json!({ "backup": backup })),
            ("StartInPlace", json!({ "backup": backup, "dry_run": true })),
            ("StartLoad", json!({ "backup": backup, "target": "scratch" })),
            ("MarkBackup", json!({ "backup": backup, "mark": "unpin" })),
            ("InitiateImport", json!({ "destination": destination, "job": job })),
            ("EditConfig", json!({ "edits": [{ "item": format!("job.{job}"), "values": { "max_age": "9h" } }], "dry_run": true })),
            ("ScheduleOnce", json!({ "job": job, "cancel": true })),
            ("StartDelete", json!({ "backup": backup, "job": job, "destination": "none" })),
        ]
    };
    for (method, parameters) in calls(&wiki, "wiki", "second", "wiki/page") {
        limited.refused(method, parameters);
        std::thread::sleep(Duration::from_millis(21));
    }
    for (method, parameters) in calls(&shop, "shop", "local", "files/note") {
        let error = error_of(&mut limited, method, parameters);
        assert_ne!(error, NOT_PERMITTED, "{method}");
        assert_ne!(error, INVALID, "{method}");
        std::thread::sleep(Duration::from_millis(21));
    }
    // What another's database is called is not known here; what is there is replaced only where it is the job's own.
    limited.refused("StartLoad", json!({ "backup": shop, "target": "scratch", "replace": true }));
    let edit = |values: Value| json!({ "edits": [{ "item": "job.shop", "values": values }], "dry_run": true });
    limited.refused("EditConfig", edit(json!({ "destinations": ["local", "second"] })));
    let shown = limited.ok("EditConfig", edit(json!({ "max_age": "9h" })));
    let diff = shown["diff"].as_str().unwrap();
    assert!(diff.contains("+max_age = \"9h\"") && diff.lines().all(|line| line.starts_with(['+', '-', '@'])), "{diff}");
    let places = limited.ok("GetStatus", json!({}))["status"]["destinations"].clone();
    assert_eq!((&places[0]["location"], &places[0]["backups"]), (&json!(""), &json!(1)), "{places}");

    let run = Connection::of(&keepd, 0).ok("StartBackup", json!({ "job": "wiki" }))["run"].clone();
    limited.refused("CancelRun", json!({ "run": run }));
    assert_eq!(Connection::of(&keepd, VIEWER).refused("CancelRun", json!({ "run": run })).1, "backup");
    Connection::of(&keepd, OPERATOR).ok("CancelRun", json!({ "run": run }));
    assert_eq!(ended(&keepd, run.as_str().unwrap())["state"], "cancelled");
    let runs = limited.ok("ListRuns", json!({ "limit": 1 }))["runs"].clone();
    assert!(runs.as_array().unwrap().len() == 1 && runs[0]["job"] != "wiki", "the newest of its own: {runs}");
    assert!(keepd.backups().contains(&shop) && keepd.backups().contains(&wiki));
}

#[test]
fn who_is_limited_to_a_job_sees_and_touches_nothing_else() {
    if !is_root() {
        return;
    }
    let keepd = started("", "");
    let shop = back_up(&keepd, "shop");
    let wiki = back_up(&keepd, "wiki");
    let mut limited = Connection::of(&keepd, LIMITED);
    let status = limited.ok("GetStatus", json!({}))["status"].clone();
    let names = |list: &Value, key: &str| list.as_array().unwrap().iter().map(|one| one[key].clone()).collect::<Vec<_>>();
    assert_eq!(names(&status["jobs"], "name"), [json!("shop")]);
    assert_eq!(names(&status["destinations"], "name"), [json!("local")]);
    assert!(status.get("coverage").is_none_or(Value::is_null));
    assert_eq!(names(&limited.ok("ListJobs", json!({}))["jobs"], "name"), [json!("shop")]);
    assert_eq!(names(&limited.ok("ListBackups", json!({}))["backups"], "id"), [json!(shop)]);
    let runs = limited.ok("ListRuns", json!({}))["runs"].clone();
    assert!(names(&runs, "job").iter().all(|job| job == "shop") && !runs.as_array().unwrap().is_empty(), "{runs}");
    let all = keepd.json(&["run", "list"]);
    let of = |job: &str| all.as_array().unwrap().iter().find(|r| r["job"] == job).unwrap()["id"].as_str().unwrap().to_owned();

    // The wiki's is newer.
    assert_eq!(limited.ok("ShowBackup", json!({ "backup": "latest" }))["backup"]["backup"]["id"], json!(shop));
    assert_eq!(limited.ok("ShowBackup", json!({ "backup": &shop[..12] }))["backup"]["backup"]["job"], "shop");
    assert!(!limited.ok("ListEntries", json!({ "backup": "latest" }))["entries"].as_array().unwrap().is_empty());
    limited.ok("ShowRun", json!({ "run": of("shop") }));

    // What is there and what is not are refused in the same words.
    let absent = "0".repeat(64);
    let same = |limited: &mut Connection, method: &str, there: Value, not: Value, word: &str, other: &str| {
        let (told, right) = limited.refused(method, there);
        let (untold, other_right) = limited.refused(method, not);
        assert_eq!((told.replace(word, other), right), (untold, other_right), "{method}");
        std::thread::sleep(Duration::from_millis(50));
    };
    for deed in deed::ALL {
        let method = deed.method.rsplit('.').next().unwrap();
        match deed.subject {
            Subject::Job => same(&mut limited, method, json!({ "job": "wiki" }), json!({ "job": "none" }), "wiki", "none"),
            Subject::List if matches!(method, "ListJobs" | "Watch" | "ListImports") => {}
            Subject::List => same(&mut limited, method, json!({ "job": "wiki" }), json!({ "job": "none" }), "wiki", "none"),
            Subject::Backup | Subject::Copy | Subject::Drill => {
                let (there, not) = (json!({ "backup": wiki }), json!({ "backup": absent }));
                same(&mut limited, method, there, not, &wiki, &absent);
                let (there, not) = (json!({ "backup": wiki, "job": "wiki" }), json!({ "backup": wiki, "job": "none" }));
                same(&mut limited, method, there, not, "wiki", "none");
                // Not by another job's name either.
                let (there, not) = (json!({ "backup": wiki, "job": "shop" }), json!({ "backup": absent, "job": "shop" }));
                same(&mut limited, method, there, not, &wiki, &absent);
            }
            Subject::TwoBackups => {
                let (there, not) = (json!({ "a": shop, "b": wiki }), json!({ "a": shop, "b": absent }));
                same(&mut limited, method, there, not, &wiki, &absent);
                limited.ok(method, json!({ "a": shop, "b": "latest" }));
            }
            Subject::Run | Subject::Cancel => {
                let run = of("wiki");
                same(&mut limited, method, json!({ "run": run }), json!({ "run": "none" }), &run, "none");
            }
            Subject::Item => {
                same(&mut limited, method, json!({ "item": "job.wiki" }), json!({ "item": "job.none" }), "wiki", "none");
                limited.refused(method, json!({ "item": "destination.local" }));
            }
            Subject::Edits => {
                for edit in [
                    json!({ "item": "job.wiki", "change": "patch", "values": { "enabled": false } }),
                    json!({ "item": "job.shop", "change": "remove" }),
                    json!({ "item": "job.other", "change": "add" }),
                    json!({ "item": "settings.coverage", "change": "patch" }),
                ] {
                    let own = json!({ "item": "job.shop", "change": "patch", "values": { "enabled": true } });
                    limited.refused(method, json!({ "edits": [own, edit] }));
                }
            }
            Subject::Caller | Subject::Whole | Subject::NewImport | Subject::Import => {}
        }
    }
    limited.refused("StartCopy", json!({ "backup": shop, "destination": "second" }));
    limited.refused("ListBackups", json!({ "destination": "second" }));

    // What it may, it can.
    let run = limited.ok("StartBackup", json!({ "job": "shop" }))["run"].clone();
    assert_eq!(ended(&keepd, run.as_str().unwrap())["state"], "good");
    let run = limited.ok("StartDelete", json!({ "backup": &shop[..10] }))["run"].clone();
    let run = run.as_str().unwrap();
    assert_eq!(ended(&keepd, run)["state"], "good");
    // Its own run is seen, though the backup is gone that told the job.
    limited.ok("ShowRun", json!({ "run": run }));
    assert!(keepd.backups().contains(&wiki) && !keepd.backups().contains(&shop));
}

#[test]
fn what_waited_while_its_right_was_taken_away_is_not_done() {
    if !is_root() {
        return;
    }
    let keepd = started("", "hooks = { before = [\"sleep\", \"4\"] }");
    // The only place is taken.
    let first = Connection::of(&keepd, 0).ok("StartBackup", json!({ "job": "wiki" }))["run"].clone();
    let waiting = Connection::of(&keepd, OPERATOR).ok("StartBackup", json!({ "job": "shop" }))["run"].clone();
    let mut follower = Connection::of(&keepd, OPERATOR);
    follower.send(&json!({ "method": "io.keepd.Control.FollowRun", "parameters": { "run": waiting }, "more": true }));
    assert_eq!(follower.receive().unwrap()["parameters"]["run"]["state"], "queued");
    reload_with(&keepd, &format!("[access]\nviewer = [{VIEWER}]\n"));
    assert_eq!(follower.receive().unwrap()["error"], NOT_PERMITTED, "who follows is asked again, too");
    let run = ended(&keepd, waiting.as_str().unwrap());
    assert_eq!(run["state"], "failed", "{run}");
    let why = run["error"].as_str().unwrap();
    assert!(why.contains("taken away") && why.contains("right backup"), "{why}");
    assert_eq!(ended(&keepd, first.as_str().unwrap())["state"], "good", "root's goes on");
    assert_eq!(keepd.backups().len(), 1);
}

#[test]
fn who_may_watch_no_longer_is_told_so() {
    if !is_root() {
        return;
    }
    let keepd = started("", "");
    let watch = json!({ "method": "io.keepd.Control.Watch", "more": true });
    let (mut viewer, mut limited) = (Connection::of(&keepd, VIEWER), Connection::of(&keepd, LIMITED));
    viewer.send(&watch);
    limited.send(&watch);
    std::thread::sleep(Duration::from_millis(300));
    back_up(&keepd, "wiki");
    let shop = back_up(&keepd, "shop");
    let mut jobs = BTreeSet::new();
    while jobs.len() < 2 {
        jobs.extend(viewer.receive().unwrap()["parameters"]["event"]["job"].as_str().map(str::to_owned));
    }
    assert_eq!(limited.receive().unwrap()["parameters"]["event"]["job"], "shop", "the other job's are not shown");
    // Nothing happens any more but the reload.
    reload_with(&keepd, "[access]\n");
    for watcher in [&mut viewer, &mut limited] {
        let since = Instant::now();
        loop {
            let reply = watcher.receive().expect("a last word");
            if reply["error"] == NOT_PERMITTED {
                break;
            }
            assert!(reply.get("error").is_none() && since.elapsed() < Duration::from_secs(30), "{reply}");
        }
    }
    assert!(keepd.backups().contains(&shop));
}

#[test]
fn one_user_cannot_keep_the_others_out() {
    if !is_root() {
        return;
    }
    let keepd = started("[access.limits]\nconnections = 3\nruns = 1\ncalls_per_second = 5\n", "hooks = { before = [\"sleep\", \"3\"] }");
    let held: Vec<Connection> = (0..3).map(|_| Connection::of(&keepd, VIEWER)).collect();
    // Once they are all taken up.
    std::thread::sleep(Duration::from_millis(300));
    let mut refused = Connection::of(&keepd, VIEWER);
    let reply = refused.receive().expect("a word on why");
    assert_eq!(reply["error"], BUSY);
    assert!(reply["parameters"]["message"].as_str().unwrap().contains("access.limits.connections"), "{reply}");
    assert_eq!(refused.receive(), None, "then it is closed");
    let said = ctl(&keepd, VIEWER, &["status"]);
    assert!(text(&said).contains("access.limits.connections"), "keepctl tells it, too: {}", text(&said));
    Connection::of(&keepd, NOBODY).ok("ShowAccess", json!({}));
    drop(held);

    let mut operator = Connection::of(&keepd, OPERATOR);
    operator.ok("StartBackup", json!({ "job": "wiki" }));
    let reply = operator.call("io.keepd.Control.StartBackup", json!({ "job": "shop" }));
    assert_eq!(reply["error"], BUSY);
    assert!(reply["parameters"]["message"].as_str().unwrap().contains("access.limits.runs"), "{reply}");
    // Others may.
    Connection::of(&keepd, ADMIN).ok("StartBackup", json!({ "job": "shop" }));

    let mut hasty = Connection::of(&keepd, ADMIN);
    let errors: Vec<Value> = (0..40).map(|_| hasty.call("io.keepd.Control.ListJobs", json!({}))["error"].clone()).collect();
    assert!(errors.iter().take(5).all(Value::is_null), "{errors:?}");
    assert!(errors.iter().filter(|e| **e == BUSY).count() >= 20, "{errors:?}");
    std::thread::sleep(Duration::from_secs(1));
    hasty.ok("ListJobs", json!({}));
    // Also what is refused anyway, and what there is not, is counted.
    let mut hasty = Connection::of(&keepd, NOBODY);
    for method in ["io.keepd.Control.UploadImport", "io.keepd.Control.Nothing"] {
        std::thread::sleep(Duration::from_secs(2));
        let errors: Vec<Value> = (0..40).map(|_| hasty.call(method, json!({ "import": "x" }))["error"].clone()).collect();
        assert!(errors.first().is_some_and(|e| *e != BUSY) && errors.iter().filter(|e| **e == BUSY).count() >= 20, "{errors:?}");
    }
    let mut told = String::new();
    for _ in 0..40 {
        let mut connection = Connection::of(&keepd, IMPORTER);
        connection.send(&json!({ "method": "io.keepd.Control.ShowAccess" }));
        let reply = connection.receive().unwrap_or_default();
        told += reply["parameters"]["message"].as_str().unwrap_or_default();
    }
    assert!(told.contains("you connect to keepd more than 5 times each second"), "{told}");
    let mut root = Connection::of(&keepd, 0);
    (0..60).for_each(|_| drop(root.ok("ListJobs", json!({}))));
}

#[test]
fn who_changes_the_configuration_is_not_root() {
    if !is_root() {
        return;
    }
    let keepd = started("", "");
    let file = |name: &str| {
        let path = keepd.path(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let export = |name: &str| {
        keepd.ok(&["config", "export", "-o", keepd.path(name).to_str().unwrap()]);
        file(name)
    };
    let others = fs::read_to_string(keepd.path("conf.d/others.toml")).unwrap();
    let harmless = others.replace("[job.wiki]\n", "[job.wiki]\nmax_age = \"9h\"\n");
    let hooked = others.replace("[job.wiki]\n", "[job.wiki]\nhooks = { before = [\"id\"] }\n");
    let admin = roles().replace(&format!("admin = [{ADMIN}]"), &format!("admin = [{ADMIN}, {IMPORTER}]"));
    let variant = |name: &str, path: PathBuf, text: &str| {
        let before = fs::read_to_string(&path).unwrap();
        fs::write(&path, text).unwrap();
        let file = export(name);
        fs::write(&path, before).unwrap();
        file
    };
    let harmless = variant("harmless.json", keepd.path("conf.d/others.toml"), &harmless);
    let hooked = variant("hooked.json", keepd.path("conf.d/others.toml"), &hooked);
    let admin = variant("admin.json", access_file(&keepd), &admin);
    let import = |uid: u32, file: &str| {
        let allow = ["--allow-commands", "--allow-admins"];
        ctl(&keepd, uid, &[&["config", "import", file, "--yes", "--on-conflict", "overwrite"], &allow[..]].concat())
    };
    for file in [&hooked, &admin] {
        let said = import(IMPORTER, file);
        assert_eq!(said.status.code(), Some(5), "{}", text(&said));
        assert!(text(&said).contains("that takes the role admin; root and "), "{}", text(&said));
    }
    // Nor is a destination of one's own among it: keepd writes there as root.
    let mut editor = Connection::of(&keepd, EDITOR);
    let edit = |values: Value| json!({ "edits": [{ "item": "destination.second", "values": values }], "dry_run": true });
    editor.ok("EditConfig", edit(json!({ "bandwidth": "1MiB/s" })));
    for values in [json!({ "root": "/etc/cron.d" }), json!({ "encryption": "none" })] {
        assert!(editor.refused("EditConfig", edit(values)).0.contains("that takes the role admin"));
    }
    let add =
        json!({ "item": "destination.third", "change": "add", "values": { "service": "fs", "root": "/etc/cron.d", "encryption": "none" } });
    editor.refused("EditConfig", json!({ "edits": [add], "dry_run": true }));
    let now = fs::read_to_string(keepd.path("conf.d/others.toml")).unwrap();
    assert_eq!((now, fs::read_to_string(access_file(&keepd)).unwrap()), (others, roles()));
    let said = import(EDITOR, &harmless);
    assert_eq!(said.status.code(), Some(5), "{}", text(&said));
    let said = import(IMPORTER, &harmless);
    assert_eq!(said.status.code(), Some(0), "{}", text(&said));
    assert!(fs::read_to_string(keepd.path("conf.d/others.toml")).unwrap().contains("max_age"));
    let said = import(ADMIN, &hooked);
    assert_eq!(said.status.code(), Some(0), "{}", text(&said));
    // Going back is a change as any other: that takes a hook away, and the next one would bring it.
    assert_eq!(ctl(&keepd, IMPORTER, &["config", "undo", "--yes"]).status.code(), Some(0));
    let said = ctl(&keepd, IMPORTER, &["config", "undo", "--yes"]);
    assert_eq!(said.status.code(), Some(5), "{}", text(&said));
}
