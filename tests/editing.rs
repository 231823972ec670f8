//! Jobs and destinations edited from keepctl, by the real binaries.

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::*;
use serde_json::json;

/// A daemon whose main file has comments everywhere, with a job in it (shop), and one in a drop-in of its own (mail).
fn started() -> Keepd {
    let mut keepd = Keepd::prepared();
    keepd.configure("", "# when\nschedule = \"30 2 * * *\" # at night\n# enabled = false\nretention = { keep_last = 3 } # enough\n");
    let d = keepd.dir.path().display().to_string();
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap().replace("[job.shop]", "# on all jobs\n\n# the shop\n[job.shop]");
    fs::write(keepd.path("keepd.toml"), format!("# ours\n\n{text}# tail of shop\n\n# the end\n")).unwrap();
    fs::create_dir(keepd.path("conf.d")).unwrap();
    fs::write(
        keepd.path("conf.d/job.mail.toml"),
        format!("# of the mail\r\n\r\n[job.mail]\r\ndestinations = [\"local\"] # one\r\n[[job.mail.source]]\r\nfiles = \"{d}/files\"\r\n"),
    )
    .unwrap();
    make_database(&keepd.path("shop.db"), 10);
    fs::write(keepd.path("files/note"), "a note").unwrap();
    keepd.start();
    keepd
}

fn main_file(keepd: &Keepd) -> String {
    fs::read_to_string(keepd.path("keepd.toml")).unwrap()
}

/// All files of the configuration.
fn files(keepd: &Keepd) -> Vec<(String, Vec<u8>)> {
    let mut all = vec![keepd.path("keepd.toml")];
    all.extend(files_below(&keepd.path("conf.d")));
    all.iter().map(|p| (p.strip_prefix(keepd.dir.path()).unwrap().display().to_string(), fs::read(p).unwrap())).collect()
}

/// An editor: a script that gets the file as $1.
fn script(keepd: &Keepd, name: &str, lines: &str) -> String {
    let path = keepd.path(name);
    write_program(&path, &format!("#!/bin/sh\n{lines}\n"));
    path.to_str().unwrap().to_owned()
}

/// keepctl with this editor, without a terminal.
fn edited(keepd: &Keepd, editor: &str, arguments: &[&str]) -> Output {
    fs::create_dir_all(keepd.path("tmp")).unwrap();
    keepd.ctl_command(arguments).env("VISUAL", "").env("EDITOR", editor).env("TMPDIR", keepd.path("tmp")).output().unwrap()
}

/// The file that an error says the text is kept in.
fn kept(out: &Output) -> String {
    let said = text(out);
    let path = said.lines().find_map(|line| line.split_once("your text is kept in ")).unwrap_or_else(|| panic!("{said}")).1;
    fs::read_to_string(path).unwrap()
}

fn job<'v>(status: &'v serde_json::Value, name: &str) -> &'v serde_json::Value {
    status["jobs"].as_array().unwrap().iter().find(|j| j["name"] == name).unwrap_or_else(|| panic!("no {name} in {status}"))
}

#[test]
fn options_change_what_they_name_and_nothing_else() {
    let keepd = started();
    let before = main_file(&keepd);
    let shown = keepd.ok(&["job", "edit", "shop", "--schedule", "15 4 * * *", "--retention", "keep_daily=7", "--dry-run"]);
    assert!(shown.contains("-schedule = \"30 2 * * *\"") && shown.contains("+schedule = \"15 4 * * *\" # at night"), "{shown}");
    assert_eq!(main_file(&keepd), before, "a dry run changes nothing");
    assert!(keepd.fails(2, &["job", "edit", "shop", "--max-age", "26h"]).contains("--yes"));
    assert_eq!(main_file(&keepd), before);

    let done = keepd.ok(&["job", "edit", "shop", "--schedule", "15 4 * * *", "--retention", "keep_daily=7", "--yes"]);
    assert!(done.contains("the configuration was changed"), "{done}");
    let wanted = before.replace("30 2 * * *", "15 4 * * *").replace("{ keep_last = 3 }", "{ keep_last = 3 , keep_daily = 7 }");
    let loose = |text: &str| text.replace(" ,", ",");
    assert_eq!(loose(&main_file(&keepd)), loose(&wanted));
    assert_eq!(keepd.json(&["job", "show", "shop"])["status"]["schedule"], "15 4 * * *", "in force at once");
    // Another way to say when takes the place of the one before.
    keepd.ok(&["job", "edit", "shop", "--every", "6h", "--yes"]);
    assert_eq!(keepd.json(&["job", "show", "shop"])["status"]["schedule"], "every 6h");
    // From a drop-in, whose line ends stay.
    keepd.ok(&["job", "edit", "mail", "--set", "jitter=\"5m\"", "--every", "1d", "--yes"]);
    let mail = fs::read_to_string(keepd.path("conf.d/job.mail.toml")).unwrap();
    assert!(
        mail.starts_with("# of the mail\r\n\r\n[job.mail]\r\ndestinations = [\"local\"] # one\r\n") && mail.contains("jitter = \"5m\"\r\n"),
        "{mail:?}"
    );
    keepd.ok(&["job", "edit", "mail", "--unset", "jitter", "--set", "source.files.exclude=[\"*.tmp\"]", "--yes"]);
    assert!(keepd.json(&["config", "show", "job.mail"])[0]["toml"].as_str().unwrap().contains("*.tmp"));
    assert!(keepd.ok(&["job", "edit", "mail", "--unset", "jitter", "--yes"]).contains("Nothing is to be changed"));
    let document = keepd.json(&["job", "edit", "mail", "--max-age", "3d", "--yes"]);
    assert!(document["applied"] == true && document["diff"].as_str().unwrap().contains("+max_age = \"3d\""), "{document}");
    keepd.ok(&["config", "undo", "--yes"]);
    assert!(keepd.json(&["job", "show", "mail"])["status"]["max_age_seconds"].is_null());

    keepd.ok(&["job", "disable", "shop", "--yes"]);
    assert_eq!(keepd.json(&["job", "show", "shop"])["status"]["enabled"], false);
    assert!(keepd.ok(&["job", "disable", "shop", "--yes"]).contains("Nothing is to be changed"));
    keepd.ok(&["job", "enable", "shop", "--yes"]);
    assert_eq!(keepd.json(&["job", "show", "shop"])["status"]["enabled"], true);
    assert!(keepd.ok(&["job", "enable", "shop", "--yes"]).contains("Nothing is to be changed"));
    // One that says nothing of it is enabled, and stays as it is written.
    assert!(keepd.ok(&["job", "enable", "mail", "--yes"]).contains("Nothing is to be changed"));
    assert!(keepd.fails(1, &["job", "enable", "none", "--yes"]).contains("there is no job.none"));
    // What counts is the file, also where it is not in force yet.
    let disabled = main_file(&keepd).replace("\nenabled = true", "\nenabled = false");
    fs::write(keepd.path("keepd.toml"), &disabled).unwrap();
    keepd.ok(&["job", "enable", "shop", "--yes"]);
    assert_eq!(main_file(&keepd), disabled.replace("\nenabled = false", "\nenabled = true"));
    assert!(main_file(&keepd).contains("# enabled = false\n") && main_file(&keepd).ends_with("# tail of shop\n\n# the end\n"));
    keepd.ok(&["config", "check"]);
}

#[test]
fn what_is_wrong_is_told_with_its_place_and_changes_nothing() {
    let keepd = started();
    let before = files(&keepd);
    let d = keepd.dir.path().display().to_string();
    let refused: [(&[&str], i32, &str); 14] = [
        (&["job", "edit", "shop", "--schedule", "99 2 * * *"], 1, "keepd.toml:"),
        (&["job", "edit", "shop", "--set", "retension={}"], 1, "did you mean 'retention'"),
        (&["job", "edit", "shop", "--destination", "nowhere"], 1, "there is no destination 'nowhere'"),
        (&["job", "edit", "shop", "--timezone", "Europe/Berlim"], 1, "did you mean 'Europe/Berlin'"),
        (&["job", "edit", "shop", "--set", "timezone=Europe/Berlin"], 2, "stands in quotes"),
        (&["job", "edit", "shop", "--set", "source.nosuch.files=\"/x\""], 1, "nosuch"),
        (&["job", "edit", "none", "--every", "1h"], 1, "there is no job.none"),
        (&["job", "add", "shop", "--files", "/srv", "--destination", "local"], 1, "is there already"),
        (&["job", "add", "new", "--files", "/srv"], 1, "'destinations' is missing"),
        (&["job", "add", "a b", "--files", "/srv", "--destination", "local"], 1, "names no part"),
        (&["destination", "remove", "local"], 1, "is used by job.mail, job.shop"),
        (
            &[
                "destination",
                "add",
                "s3",
                "--service",
                "s3",
                "--encryption",
                "main",
                "--set",
                "bucket=\"b\"",
                "--set",
                "secret_access_key=\"canary\"",
            ],
            1,
            "is a secret",
        ),
        (&["job", "pause", "shop", "--until", "soon"], 1, "is no time"),
        (&["job", "run-at", "shop", "2001-01-01"], 1, "is past"),
    ];
    for (arguments, code, wanted) in refused {
        let yes = if arguments[1] == "run-at" { &[][..] } else { &["--yes"] };
        let said = keepd.fails(code, &[arguments, yes].concat());
        assert!(said.contains(wanted) && !said.contains("canary"), "{arguments:?}: {said}");
        assert_eq!(files(&keepd), before, "{arguments:?}");
    }
    // A path of another machine is not completed here; nobody is asked there.
    let said = keepd.fails(2, &["--host", "nowhere.invalid", "job", "add", "new", "--files", "data", "--destination", "local", "--yes"]);
    assert!(said.contains("give the whole path"), "{said}");
    // Nor is anything removed that something names.
    assert!(keepd.fails(1, &["config", "show", "job.none"]).contains("none"));
    // What only this machine can tell: a key file that is not there.
    fs::write(keepd.path("new.toml"), format!("[destination.x]\nservice = \"fs\"\nroot = \"{d}/x\"\nencryption = \"other\"\n")).unwrap();
    let said = keepd.fails(1, &["destination", "add", "x", "--from", keepd.path("new.toml").to_str().unwrap(), "--yes"]);
    assert!(said.contains("conf.d/destination.x.toml:4:") && said.contains("other"), "{said}");
    assert_eq!(files(&keepd), before);
}

#[test]
fn jobs_and_destinations_come_and_go() {
    let keepd = started();
    let d = keepd.dir.path().display().to_string();
    let before = files(&keepd);
    keepd.ok(&[
        "destination",
        "add",
        "usb",
        "--service",
        "fs",
        "--root",
        &format!("{d}/usb"),
        "--encryption",
        "main",
        "--set",
        "max_age=\"3d\"",
        "--yes",
    ]);
    assert_eq!(keepd.json(&["destination", "show", "usb"])["service"], "fs");
    let add = [
        "job",
        "add",
        "web",
        "--files",
        "files",
        "--sqlite",
        "shop.db",
        "--destination",
        "local",
        "--destination",
        "usb",
        "--every",
        "6h",
        "--retention",
        "keep_last=7",
        "--yes",
    ];
    let out = keepd.ctl_command(&add).current_dir(keepd.dir.path()).output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    let written = fs::read_to_string(keepd.path("conf.d/job.web.toml")).unwrap();
    assert!(written.contains(&format!("files = \"{d}/files\"")) && written.contains("retention = { keep_last = 7 }"), "{written}");
    assert_eq!(fs::metadata(keepd.path("conf.d/job.web.toml")).unwrap().permissions().mode() & 0o777, 0o600);
    keepd.ok(&["backup", "web"]);
    keepd.ok(&["backup", "web"]);
    assert_eq!(keepd.json(&["list", "--job", "web"]).as_array().unwrap().len(), 2);

    // What becomes of the backups must be said.
    let said = keepd.fails(2, &["job", "remove", "web", "--yes"]);
    assert!(said.contains("2 backups of web") && said.contains("--keep-backups"), "{said}");
    let kept = keepd.ok(&["job", "remove", "web", "--keep-backups", "--yes"]);
    assert!(kept.contains("2 backups of web stay"), "{kept}");
    assert!(!keepd.path("conf.d/job.web.toml").exists());
    assert_eq!(keepd.json(&["list", "--job", "web"]).as_array().unwrap().len(), 2);
    let file = keepd.restored(keepd.json(&["list", "--job", "web"])[0]["id"].as_str().unwrap());
    assert!(file.exists(), "they are restored as ever");

    // From a text, with its comments; then away with all of it but what is pinned.
    fs::write(keepd.path("web.toml"), format!("# from a file\n{written}")).unwrap();
    keepd.ok(&["job", "add", "web", "--from", keepd.path("web.toml").to_str().unwrap(), "--yes"]);
    assert!(fs::read_to_string(keepd.path("conf.d/job.web.toml")).unwrap().starts_with("# from a file\n"));
    let backups = keepd.json(&["list", "--job", "web"]);
    let pinned = backups[1]["id"].as_str().unwrap();
    keepd.ok(&["pin", pinned]);
    let deleted = keepd.fails(3, &["job", "remove", "web", "--delete-backups", "--yes"]);
    assert!(deleted.contains("1 backups of web are pinned") && deleted.contains("removed from usb"), "{deleted}");
    let left = keepd.json(&["list", "--job", "web"]);
    assert_eq!((left.as_array().unwrap().len(), left[0]["id"].as_str()), (1, Some(pinned)));
    keepd.ok(&["destination", "remove", "usb", "--yes"]);
    assert_eq!(files(&keepd), before, "and all is as it was");
    keepd.ok(&["check", "local", "--read-data"]);
}

#[test]
fn asked_at_a_terminal() {
    let keepd = started();
    keepd.ok(&["backup", "shop"]);
    let before = main_file(&keepd);
    let no = at_a_terminal(&keepd, &["job", "edit", "shop", "--every", "1h"], &[("[y/N]", "n")], || ());
    assert!(no.status.code() == Some(1) && main_file(&keepd) == before, "{}", text(&no));
    // A file that is edited by hand while keepctl waits for an answer.
    let hand = || fs::write(keepd.path("keepd.toml"), format!("{before}# by hand\n")).unwrap();
    let told = at_a_terminal(&keepd, &["job", "edit", "shop", "--every", "1h"], &[("[y/N]", "y")], hand);
    assert!(
        told.status.code() == Some(1) && text(&told).contains("was changed since it was shown, and not by this command"),
        "{}",
        text(&told)
    );
    assert_eq!(main_file(&keepd), format!("{before}# by hand\n"));
    let other = || drop(keepd.ok(&["job", "edit", "mail", "--every", "2h", "--yes"]));
    let told = at_a_terminal(&keepd, &["job", "edit", "shop", "--every", "1h"], &[("[y/N]", "y")], other);
    assert!(told.status.code() == Some(1) && text(&told).contains("was changed since it was shown by "), "{}", text(&told));
    // Nobody is asked about what was not shown.
    let json = at_a_terminal(&keepd, &["job", "edit", "shop", "--every", "1h", "--json"], &[("[y/N]", "n")], || ());
    assert!(json.status.code() == Some(1) && text(&json).contains("+every = \"1h\""), "{}", text(&json));
    let removed = at_a_terminal(&keepd, &["job", "remove", "shop"], &[("[k/d]", "k"), ("keep its 1 backups?", "y")], || ());
    assert!(removed.status.success(), "{}", text(&removed));
    let now = main_file(&keepd);
    assert!(!now.contains("job.shop") && now.contains("# on all jobs") && now.ends_with("# the end\n# by hand\n"), "{now}");
    assert_eq!(keepd.json(&["list", "--job", "shop"]).as_array().unwrap().len(), 1);
}

#[test]
fn an_editor_gets_the_text_with_its_comments() {
    let keepd = started();
    let before = main_file(&keepd);
    let log = keepd.path("seen");
    let see = script(&keepd, "see", &format!("cat \"$1\" > {0}; stat -c %a \"$1\" > {0}.mode", log.display()));
    let out = edited(&keepd, &see, &["job", "edit", "shop", "--yes"]);
    assert!(out.status.success() && text(&out).contains("nothing was edited"), "{}", text(&out));
    let seen = fs::read_to_string(&log).unwrap();
    assert!(seen.starts_with("# the shop\n[job.shop]\n") && seen.ends_with("# tail of shop\n") && !seen.contains("on all jobs"), "{seen}");
    assert!(before.contains(&seen), "as it stands in the file");
    assert_eq!(fs::read_to_string(format!("{}.mode", log.display())).unwrap().trim(), "600");

    let change = script(&keepd, "change", "sed -i 's/30 2/45 5/; s/# the shop/# our shop/' \"$1\"");
    let out = edited(&keepd, &change, &["job", "edit", "shop", "--yes"]);
    assert!(out.status.success(), "{}", text(&out));
    assert_eq!(main_file(&keepd), before.replace("30 2 *", "45 5 *").replace("# the shop", "# our shop"), "all else byte for byte");
    assert_eq!(keepd.json(&["job", "show", "shop"])["status"]["schedule"], "45 5 * * *");
    // A file of its own is wholly shown; an editor with arguments.
    let append = script(
        &keepd,
        "append",
        "printf 'max_age = \"3d\"\\n' > \"$2.new\"; sed \"/^destinations/r $2.new\" -i \"$2\"; rm \"$2.new\"; echo $1 > /dev/null",
    );
    let mail = fs::read_to_string(keepd.path("conf.d/job.mail.toml")).unwrap();
    let out = edited(&keepd, &format!("{append} --wait"), &["job", "edit", "mail", "--yes"]);
    assert!(out.status.success(), "{}", text(&out));
    assert_eq!(fs::read_to_string(keepd.path("conf.d/job.mail.toml")).unwrap(), mail.replace("# one\r\n", "# one\r\nmax_age = \"3d\"\r\n"));
    assert_eq!(fs::read_dir(keepd.path("tmp")).unwrap().count(), 0, "nothing is left behind");

    let now = files(&keepd);
    assert!(edited(&keepd, "false", &["job", "edit", "shop", "--yes"]).status.code() == Some(1));
    assert!(text(&edited(&keepd, "/no/such/editor", &["job", "edit", "shop", "--yes"])).contains("/no/such/editor"));
    assert!(text(&edited(&keepd, &script(&keepd, "empty", ": > \"$1\""), &["job", "edit", "shop", "--yes"])).contains("is empty"));
    let asks = edited(&keepd, &change, &["job", "edit", "shop"]);
    assert!(asks.status.code() == Some(2) && text(&asks).contains("--yes"), "{}", text(&asks));
    // What is wrong is told, and the text kept.
    for (name, lines, wanted) in [
        ("syntax", "echo 'x = ' >> \"$1\"", "the text of job.shop:"),
        ("other", "echo '[job.other]' >> \"$1\"", "job.other: is another one"),
        ("headless", "sed -i 's/^\\[.*//' \"$1\"", "belongs to another part"),
        ("key", "sed -i 's/^schedule/scedule/' \"$1\"", "keepd.toml:"),
    ] {
        let out = edited(&keepd, &script(&keepd, name, lines), &["job", "edit", "shop", "--yes"]);
        assert!(out.status.code() == Some(1) && text(&out).contains(wanted), "{name}: {}", text(&out));
        assert!(kept(&out).contains("our shop"), "{name}");
    }
    assert_eq!(files(&keepd), now);
}

#[test]
fn wrong_once_and_right_the_second_time() {
    let keepd = started();
    // The first time it makes a mistake, the second time it finds its own text and mends it.
    let editor = script(
        &keepd,
        "editor",
        "if grep -q scedule \"$1\"; then sed -i 's/scedule/schedule/' \"$1\"; else sed -i 's/^schedule = \"30 2/scedule = \"45 5/' \"$1\"; fi",
    );
    let environment = [("VISUAL", editor.as_str())];
    let answers = [("edit again? [Y/n]", ""), ("change the configuration so?", "y")];
    let out = at_a_terminal_with(&keepd, &environment, &["job", "edit", "shop"], &answers, || ());
    assert!(out.status.success() && text(&out).contains("did you mean 'schedule'"), "{}", text(&out));
    assert!(main_file(&keepd).contains("schedule = \"45 5 * * *\" # at night"));
}

#[test]
fn of_two_editors_the_second_is_told() {
    let keepd = started();
    let (go, began) = (keepd.path("go"), keepd.path("began"));
    let slow = script(
        &keepd,
        "slow",
        &format!("sed -i 's/30 2/1 1/' \"$1\"; : > {}; while [ ! -e {} ]; do sleep 0.05; done", began.display(), go.display()),
    );
    let quick = script(&keepd, "quick", "sed -i 's/30 2/2 2/' \"$1\"");
    fs::create_dir_all(keepd.path("tmp")).unwrap();
    let mut command = keepd.ctl_command(&["job", "edit", "shop", "--yes"]);
    command.env("VISUAL", &slow).env("TMPDIR", keepd.path("tmp")).stdout(Stdio::piped()).stderr(Stdio::piped());
    let first = command.spawn().unwrap();
    let since = Instant::now();
    while !began.exists() {
        assert!(since.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(edited(&keepd, &quick, &["job", "edit", "shop", "--yes"]).status.success());
    fs::write(&go, "").unwrap();
    let first = first.wait_with_output().unwrap();
    assert!(first.status.code() == Some(1) && text(&first).contains("was changed since it was shown by "), "{}", text(&first));
    assert!(kept(&first).contains("1 1 * * *"));
    assert!(main_file(&keepd).contains("2 2 * * *"));
}

#[test]
fn odd_ways_to_write_a_table_are_told() {
    let keepd = started();
    let d = keepd.dir.path().display().to_string();
    let odd = format!(
        "[job]\nodd = {{ destinations = [\"local\"], source = [{{ files = \"{d}/files\" }}] }} # odd\nother.destinations = [\"local\"]\nother.source = [{{ files = \"{d}/files\" }}]\n"
    );
    fs::write(keepd.path("conf.d/odd.toml"), &odd).unwrap();
    keepd.ok(&["reload"]);
    let out = edited(&keepd, "false", &["job", "edit", "odd", "--yes"]);
    assert!(text(&out).contains("conf.d/odd.toml") && text(&out).contains("--set"), "{}", text(&out));
    keepd.ok(&["job", "edit", "odd", "--every", "1h", "--yes"]);
    keepd.ok(&["job", "edit", "other", "--every", "2h", "--yes"]);
    let now = fs::read_to_string(keepd.path("conf.d/odd.toml")).unwrap();
    assert!(now.contains("# odd") && now.contains("other.every = \"2h\""), "{now}");
    assert_eq!(keepd.json(&["job", "show", "odd"])["status"]["schedule"], "every 1h");
}

#[test]
fn a_pause_covers_what_falls_due_in_it() {
    let mut keepd = started();
    keepd.ok(&["job", "edit", "mail", "--every", "2s", "--yes"]);
    wait_for(&keepd, 1);
    keepd.ok(&["job", "pause", "mail", "--for", "3d", "--yes"]);
    let status = keepd.json(&["status"]);
    let until = job(&status, "mail")["paused_until"].as_str().unwrap().to_owned();
    assert!(job(&status, "mail")["next"].as_str().unwrap() >= until.as_str(), "{status}");
    assert!(keepd.ok(&["status"]).contains("paused until") && keepd.ok(&["job", "show", "mail"]).contains("paused until"));
    std::thread::sleep(Duration::from_millis(500));
    let before = runs(&keepd);
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(runs(&keepd), before, "nothing is started");
    keepd.stop();
    keepd.start();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(runs(&keepd), before, "nor by a restart");
    keepd.ok(&["backup", "mail"]);
    // By hand it runs; a civil time counts in the job's zone; what is past is told.
    keepd.ok(&["job", "edit", "mail", "--timezone", "America/New_York", "--yes"]);
    keepd.ok(&["job", "pause", "mail", "--until", "2036-01-01T12:00", "--yes"]);
    assert_eq!(job(&keepd.json(&["status"]), "mail")["paused_until"], "2036-01-01T17:00:00Z");
    assert!(keepd.ok(&["job", "pause", "mail", "--until", "2001-01-01", "--dry-run"]).contains("is past"));
    assert!(keepd.ok(&["job", "pause", "mail", "--until", "2001-01-01", "--yes"]).contains("is past"));
    keepd.ok(&["job", "resume", "mail", "--yes"]);
    wait_for(&keepd, before + 2);
    assert!(!fs::read_to_string(keepd.path("conf.d/job.mail.toml")).unwrap().contains("paused_until"));
}

fn runs(keepd: &Keepd) -> usize {
    keepd.json(&["run", "list", "--job", "mail"]).as_array().unwrap().iter().filter(|r| r["kind"] == "backup").count()
}

fn wait_for(keepd: &Keepd, count: usize) {
    let since = Instant::now();
    while runs(keepd) < count {
        assert!(since.elapsed() < Duration::from_secs(30), "{} runs: {}", runs(keepd), keepd.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn in_seconds(seconds: i64) -> String {
    let at = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[test]
fn a_single_run_at_a_time() {
    let mut keepd = started();
    // The job has no schedule. Planned, missed while keepd is down, run once at the start.
    let (soon, later) = (in_seconds(3), in_seconds(3600));
    keepd.ok(&["job", "run-at", "mail", &soon]);
    let planned = keepd.json(&["job", "run-at", "mail", &later]);
    assert_eq!(planned["once"].as_array().unwrap().len(), 2);
    assert_eq!(job(&keepd.json(&["status"]), "mail")["next"], soon.as_str());
    keepd.ok(&["reload"]);
    keepd.kill();
    std::thread::sleep(Duration::from_secs(4));
    keepd.start();
    wait_for(&keepd, 1);
    // One that the end of keepd stopped would be begun anew.
    let since = Instant::now();
    while keepd.json(&["status"])["running"].as_array().is_some_and(|running| !running.is_empty()) {
        assert!(since.elapsed() < Duration::from_secs(60), "{}", keepd.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    keepd.stop();
    keepd.start();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(runs(&keepd), 1, "once");
    assert_eq!(job(&keepd.json(&["status"]), "mail")["next"], later.as_str());
    // Also while it is paused; not while it is disabled.
    keepd.ok(&["job", "pause", "mail", "--for", "1d", "--yes"]);
    keepd.ok(&["job", "run-at", "mail", &in_seconds(2)]);
    wait_for(&keepd, 2);
    keepd.ok(&["job", "disable", "mail", "--yes"]);
    assert!(keepd.fails(1, &["job", "run-at", "mail", &later]).contains("job enable mail"));
    keepd.ok(&["job", "enable", "mail", "--yes"]);
    assert!(keepd.fails(1, &["job", "run-at", "mail", "--cancel", "2035-01-01"]).contains("does not run once at"));
    assert_eq!(keepd.json(&["job", "run-at", "mail", "--cancel"])["once"], json!([]));
    assert!(keepd.fails(1, &["job", "run-at", "none", &later]).contains("there is no job"));
    assert!(keepd.fails(2, &["job", "run-at", "mail"]).contains("TIME"));
    // A removed job loses what was planned for it.
    keepd.ok(&["job", "run-at", "mail", &later]);
    let text_of = fs::read_to_string(keepd.path("conf.d/job.mail.toml")).unwrap();
    keepd.ok(&["job", "remove", "mail", "--keep-backups", "--yes"]);
    fs::write(keepd.path("conf.d/job.mail.toml"), text_of).unwrap();
    keepd.ok(&["reload"]);
    assert_eq!(job(&keepd.json(&["status"]), "mail")["once"], json!([]));
}

#[test]
fn killed_in_the_middle_it_is_the_old_one_or_the_new_one() {
    let mut keepd = started();
    let mut round = 0;
    // Whether it was the new one that the next start found.
    let mut is_new_after = |delay: Duration| {
        let before = keepd.json(&["job", "show", "shop"])["status"]["schedule"].clone();
        let minute = format!("{} {} * * *", round % 60, 1 + round / 60);
        round += 1;
        let mut edit = keepd
            .ctl_command(&["job", "edit", "shop", "--schedule", &minute, "--yes"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(delay);
        keepd.kill();
        let _ = edit.wait();
        keepd.start();
        let now = keepd.json(&["job", "show", "shop"])["status"]["schedule"].clone();
        assert!(now == before || now == minute.as_str(), "round {round}: {now}");
        assert!(!keepd.path(".keepd-change.json").exists(), "the start finished it");
        keepd.ok(&["config", "check"]);
        now == minute.as_str()
    };
    // Too early and late enough, and then closer and closer to the moment between.
    let (mut early, mut late) = (Duration::ZERO, Duration::from_millis(20));
    assert!(!is_new_after(early));
    while !is_new_after(late) {
        early = late;
        late *= 2;
        assert!(late < Duration::from_secs(20));
    }
    for _ in 0..12 {
        let between = (early + late) / 2;
        match is_new_after(between) {
            true => late = between,
            false => early = between,
        }
    }
}

/// As a client that hangs up at once: what it asked for is done nevertheless, all of it.
#[test]
fn a_caller_that_goes_leaves_nothing_half_done() {
    let keepd = started();
    for minute in 1..=8 {
        let schedule = format!("{minute} 5 * * *");
        let call = json!({ "method": "io.keepd.Control.EditConfig", "parameters": {
            "edits": [{ "item": "job.shop", "change": "patch", "values": { "schedule": schedule } }],
        } });
        let mut stream = UnixStream::connect(keepd.path("keepd.sock")).unwrap();
        stream.write_all(format!("{call}\0").as_bytes()).unwrap();
        drop(stream);
        let since = Instant::now();
        while keepd.json(&["job", "show", "shop"])["status"]["schedule"] != schedule.as_str() {
            assert!(since.elapsed() < Duration::from_secs(20), "{schedule} is not in force: {}\n{}", main_file(&keepd), keepd.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let since = Instant::now();
    loop {
        let entries = keepd.json(&["audit", "list", "--action", "EditConfig"]);
        let with = |result: &str| entries.as_array().unwrap().iter().filter(|entry| entry["result"] == result).count();
        if (with("begun"), with("done"), with("failed")) == (8, 8, 0) {
            break;
        }
        assert!(since.elapsed() < Duration::from_secs(20), "{entries}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn numbers_mean_the_tables_that_were_shown() {
    let keepd = started();
    let d = keepd.dir.path().display().to_string();
    for name in ["a", "b", "c"] {
        fs::create_dir(keepd.path(name)).unwrap();
    }
    let paths = ["a", "b", "c"].map(|name| format!("{d}/{name}"));
    let add = ["job", "add", "web", "--files", &paths[0], "--files", &paths[1], "--files", &paths[2], "--destination", "local"];
    keepd.ok(&[&add[..], &["--set", "source.b.exclude=[\"x\"]", "--yes"]].concat());
    let written = || fs::read_to_string(keepd.path("conf.d/job.web.toml")).unwrap();
    assert!(written().contains(&format!("files = \"{d}/b\"\nexclude = [\"x\"]")), "{}", written());
    let said = keepd.fails(1, &["job", "edit", "web", "--unset", "source.0", "--unset", "source.a", "--yes"]);
    assert!(said.contains("cannot be changed at once"), "{said}");
    keepd.ok(&["job", "edit", "web", "--unset", "source.0", "--unset", "source.1", "--yes"]);
    let left = written();
    assert!(left.contains("/c\"") && !left.contains("/a\"") && !left.contains("/b\""), "{left}");
}

/// A job whose backup goes on until `go` is there.
fn with_slow_job(keepd: &Keepd) {
    let command = format!("while [ ! -e {} ]; do sleep 0.05; done; echo done", keepd.path("go").display());
    let text = format!(
        "[job.slow]\ndestinations = [\"local\"]\n[[job.slow.source]]\nname = \"out\"\ncommand = [\"/bin/sh\", \"-c\", \"{command}\"]\n"
    );
    fs::write(keepd.path("slow.toml"), text).unwrap();
    keepd.ok(&["job", "add", "slow", "--from", keepd.path("slow.toml").to_str().unwrap(), "--yes"]);
    keepd.ok(&["backup", "slow", "--detach"]);
    let since = Instant::now();
    while !keepd.json(&["run", "list"]).as_array().unwrap().iter().any(|run| run["job"] == "slow" && run["state"] == "running") {
        assert!(since.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The last run that deletes, at its end.
fn deleted(keepd: &Keepd) -> serde_json::Value {
    let since = Instant::now();
    loop {
        let runs = keepd.json(&["run", "list"]);
        let last =
            runs.as_array().unwrap().iter().filter(|run| run["kind"] == "delete").max_by_key(|run| run["id"].as_str().unwrap().to_owned());
        if let Some(run) = last.filter(|run| run["finished"].is_string()) {
            return run.clone();
        }
        assert!(since.elapsed() < Duration::from_secs(30), "{runs}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn backups_are_not_deleted_while_more_are_made() {
    let keepd = started();
    with_slow_job(&keepd);
    let before = files(&keepd);
    let said = keepd.fails(1, &["job", "remove", "slow", "--delete-backups", "--yes"]);
    assert!(said.contains("a run that may add to them (backup, ") && files(&keepd) == before, "{said}");
    let said = keepd.ok(&["job", "remove", "slow", "--keep-backups", "--yes"]);
    assert!(said.contains("goes on to its end as it began, also without the job") && !said.contains("from the next one"), "{said}");
    fs::write(keepd.path("go"), "").unwrap();
    let since = Instant::now();
    while keepd.backups().is_empty() {
        assert!(since.elapsed() < Duration::from_secs(30), "{}", keepd.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_deletion_that_waited_looks_again() {
    let keepd = started();
    for _ in 0..2 {
        keepd.ok(&["backup", "shop"]);
    }
    let of_shop = || keepd.json(&["list", "--job", "shop"]).as_array().unwrap().clone();
    // It waits for the backup of another job to the same destination. Meanwhile the job comes back: nothing is deleted.
    with_slow_job(&keepd);
    keepd.ok(&["job", "remove", "shop", "--delete-backups", "--yes", "--detach"]);
    keepd.ok(&["config", "undo", "--yes"]);
    fs::write(keepd.path("go"), "").unwrap();
    let run = deleted(&keepd);
    assert!(run["state"] == "failed" && run["error"].as_str().unwrap().contains("is configured again"), "{run}");
    assert_eq!(of_shop().len(), 2);
    // Meanwhile one is pinned: that stays.
    fs::remove_file(keepd.path("go")).unwrap();
    keepd.ok(&["job", "remove", "slow", "--keep-backups", "--yes"]);
    with_slow_job(&keepd);
    let removed = keepd.json(&["job", "remove", "shop", "--delete-backups", "--yes", "--detach"]);
    assert_eq!((removed["not_deleted"].clone(), removed["runs"].as_array().unwrap().len()), (json!([]), 1));
    let pinned = of_shop()[0]["id"].as_str().unwrap().to_owned();
    keepd.ok(&["pin", &pinned]);
    fs::write(keepd.path("go"), "").unwrap();
    let run = deleted(&keepd);
    assert_eq!(run["state"], "partial", "{run}");
    assert_eq!(of_shop().iter().map(|b| b["id"].as_str().unwrap()).collect::<Vec<_>>(), [pinned.as_str()]);
}

#[test]
fn what_cannot_be_deleted_is_told_and_no_success() {
    let mut keepd = started();
    keepd.ok(&["backup", "shop"]);
    keepd.stop();
    keepd.configure("append_only = true", "");
    keepd.start();
    let out = keepd.ctl(&["job", "remove", "shop", "--delete-backups", "--yes", "--json"]);
    let document: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(out.status.code(), Some(3), "{}", text(&out));
    assert!(document["not_deleted"][0].as_str().unwrap().contains("append_only") && document["runs"] == json!([]), "{document}");
    assert_eq!(keepd.json(&["list", "--job", "shop"]).as_array().unwrap().len(), 1);
}

/// May change jobs, and nothing else.
const EDITOR: u32 = 620_001;
/// The same, of one job.
const LIMITED: u32 = 620_002;

fn as_user(command: &mut Command, uid: u32) -> Output {
    // Groups of root are dropped by the standard library where root changes the user.
    command.uid(uid).gid(uid).current_dir("/").output().unwrap()
}

#[test]
fn who_may_change_jobs_is_no_admin() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can take the credentials of others");
        return;
    }
    let keepd = started();
    fs::write(
        keepd.path("conf.d/access.toml"),
        format!(
            "[access]\n[access.role.editor]\nmembers = [{EDITOR}]\nrights = [\"job_edit\"]\n\
             [access.role.keeper]\nmembers = [{LIMITED}]\nrights = [\"job_edit\"]\njobs = [\"shop\"]\n"
        ),
    )
    .unwrap();
    keepd.ok(&["reload"]);
    keepd.ok(&["backup", "mail"]);
    for (path, mode) in [("", 0o755), ("keepd.sock", 0o666)] {
        fs::set_permissions(keepd.path(path), fs::Permissions::from_mode(mode)).unwrap();
    }
    copy_program(&keepctl_binary(), &keepd.path("keepctl"));
    let ctl = |uid: u32, arguments: &[&str]| {
        let mut command = Command::new(keepd.path("keepctl"));
        as_user(command.arg("--socket").arg(keepd.path("keepd.sock")).args(arguments).stdin(Stdio::null()), uid)
    };
    // A schedule is theirs to change.
    for (uid, hour) in [(EDITOR, 4), (LIMITED, 5)] {
        let schedule = format!("15 {hour} * * *");
        let out = ctl(uid, &["job", "edit", "shop", "--schedule", &schedule, "--yes"]);
        assert!(out.status.success(), "{}", text(&out));
        assert_eq!(keepd.json(&["job", "show", "shop"])["status"]["schedule"], schedule.as_str());
        assert!(ctl(uid, &["job", "disable", "shop", "--yes"]).status.success());
        assert!(ctl(uid, &["job", "enable", "shop", "--yes"]).status.success());
    }
    let before = files(&keepd);
    let refused = |out: Output, wanted: &str| {
        assert!(out.status.code() == Some(5) && text(&out).contains(wanted), "{wanted}: {}", text(&out));
        assert_eq!(files(&keepd), before, "{wanted}");
    };
    // What keepd runs as root is not, nor is deleting backups; for a dry run neither.
    for more in [
        "hooks.before=[\"/bin/true\"]",
        "health={ command = [\"/bin/true\"] }",
        "version={ command = [\"/bin/true\"] }",
        "services=[\"sshd.service\"]",
        "source.2={ name = \"x\", command = [\"/usr/bin/id\"] }",
    ] {
        for how in ["--yes", "--dry-run"] {
            refused(ctl(EDITOR, &["job", "edit", "shop", "--set", more, how]), "takes the role admin");
        }
    }
    fs::write(
        keepd.path("hooked.toml"),
        "[job.hooked]\ndestinations = [\"local\"]\nhooks = { before = [\"/bin/true\"] }\n[[job.hooked.source]]\nfiles = \"/srv\"\n",
    )
    .unwrap();
    let file = keepd.path("hooked.toml").display().to_string();
    refused(ctl(EDITOR, &["job", "add", "hooked", "--from", &file, "--yes"]), "takes the role admin");
    refused(
        ctl(
            EDITOR,
            &["destination", "add", "x", "--service", "exec", "--encryption", "none", "--set", "command=[\"/usr/bin/id\"]", "--yes"],
        ),
        "takes the role admin",
    );
    refused(ctl(EDITOR, &["job", "remove", "mail", "--delete-backups", "--yes"]), "delete");
    refused(ctl(EDITOR, &["config", "undo", "--yes"]), "config_import");
    // Of one job: neither another nor any more or fewer of them.
    refused(ctl(LIMITED, &["job", "edit", "mail", "--every", "1h", "--yes"]), "mail");
    refused(ctl(LIMITED, &["job", "remove", "shop", "--keep-backups", "--yes"]), "job_edit");
    refused(ctl(LIMITED, &["job", "add", "more", "--files", "/srv", "--destination", "local", "--yes"]), "job_edit");
    refused(ctl(LIMITED, &["destination", "edit", "local", "--set", "max_age=\"9d\"", "--yes"]), "job_edit");
    // Nor through the socket itself: tables that keepctl has no command for.
    let call = |item: &str, change: &str, values: serde_json::Value| {
        let call = json!({ "method": "io.keepd.Control.EditConfig", "parameters": { "edits": [{ "item": item, "change": change, "values": values }] } });
        let script = "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\ns.sendall(sys.argv[2].encode() + b'\\0')\nd = b''\nwhile not d.endswith(b'\\0'):\n  d += s.recv(65536)\nprint(d[:-1].decode())";
        let mut command = Command::new("python3");
        let out = as_user(command.args(["-c", script]).arg(keepd.path("keepd.sock")).arg(call.to_string()), EDITOR);
        let reply: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&out)));
        assert_eq!(reply["error"], "io.keepd.Control.NotPermitted", "{item}: {reply}");
        assert_eq!(files(&keepd), before, "{item}");
    };
    call("access.access", "patch", json!({ "admin": [EDITOR] }));
    call("access.access", "patch", json!({ "role.editor.rights": ["job_edit", "delete"] }));
    call("access.access", "remove", json!({}));
    call("settings.audit", "add", json!({ "keep": "30d" }));
    call("settings.daemon", "patch", json!({ "socket": "/tmp/x" }));
    call("settings.config_backup", "add", json!({ "destination": "local", "include_secrets": true }));
    call("encryption.other", "add", json!({ "token": { "module": "/tmp/x.so" } }));
    // All of it is in the log.
    let entries = keepd.json(&["audit", "list", "--action", "EditConfig", "--user", &EDITOR.to_string()]);
    let is_told = |entry: &&serde_json::Value| entry["result"] == "refused" && entry["on"]["edits"][0]["keys"][0] == "hooks.before";
    assert!(entries.as_array().unwrap().iter().filter(is_told).count() > 0, "{entries}");
}

#[test]
fn where_it_may_not_write_it_says_so() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: root is needed for a read-only mount");
        return;
    }
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 10);
    // As a hardened unit sees /etc: in a mount name space of its own, read-only.
    let d = keepd.dir.path().display().to_string();
    fs::create_dir(keepd.path("etc")).unwrap();
    fs::rename(keepd.path("keepd.toml"), keepd.path("etc/keepd.toml")).unwrap();
    fs::rename(keepd.path("main.key"), keepd.path("etc/main.key")).unwrap();
    let log = fs::File::create(keepd.path("keepd.log")).unwrap();
    let line = format!(
        "mount --bind {d}/etc {d}/etc && mount -o remount,ro,bind {d}/etc && exec {} --config {d}/etc/keepd.toml",
        keepd_binary().display()
    );
    let mut command = Command::new("unshare");
    command.args(["-m", "--propagation", "private", "sh", "-c", &line]).stderr(log).env_remove("NOTIFY_SOCKET").env_remove("LISTEN_FDS");
    let Ok(mut child) = command.spawn() else {
        eprintln!("SKIPPED: unshare is not there");
        return;
    };
    let since = Instant::now();
    while !keepd.ctl(&["status"]).status.success() {
        if child.try_wait().unwrap().is_some() {
            eprintln!("SKIPPED: no mount name space can be made here: {}", keepd.log());
            return;
        }
        assert!(since.elapsed() < Duration::from_secs(30), "{}", keepd.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    let before = fs::read(keepd.path("etc/keepd.toml")).unwrap();
    let said = keepd.fails(1, &["job", "edit", "shop", "--every", "1h", "--yes"]);
    signal(child.id(), "TERM");
    let _ = child.wait();
    assert!(said.contains("was not changed") && said.contains("ReadWritePaths=/etc/keepd"), "{said}");
    assert_eq!(fs::read(keepd.path("etc/keepd.toml")).unwrap(), before);
    keepd.kill();
}

/// The blocks of docs/editing.md, each command as it stands there.
#[test]
fn the_shown_commands_work() {
    let keepd = started();
    let document = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/editing.md")).unwrap();
    let blocks = document.split("```sh\n").skip(1).map(|rest| rest.split("\n```").next().unwrap());
    let d = keepd.dir.path().display().to_string();
    let path = format!("{}:{}", keepctl_binary().parent().unwrap().display(), std::env::var("PATH").unwrap());
    fs::create_dir_all(keepd.path("srv")).unwrap();
    let mut count = 0;
    for line in blocks.flat_map(str::lines).filter(|line| line.starts_with("keepctl") || line.starts_with("mkdir")) {
        let line = line.replace("/srv", &format!("{d}/srv")).replace("/mnt/usb", &format!("{d}/usb"));
        let out = Command::new("/bin/sh")
            .args(["-c", &line])
            .env("PATH", &path)
            .env("KEEPD_SOCKET", keepd.path("keepd.sock"))
            .env("VISUAL", "sed -i s/shop/shop/")
            .current_dir(keepd.dir.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(out.status.success(), "{line}: {}", text(&out));
        count += 1;
    }
    assert!(count >= 12, "{count}");
}
