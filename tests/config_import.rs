//! keepctl config: the configuration taken along, and brought in, by the real binaries.

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use common::*;
use serde_json::{Value, json};

const CANARY: &str = "canary-of-a-secret";
/// The table of a destination that is never reached, whose secret lies in a file.
const OFFSITE: &str = "[destination.offsite]\nservice = \"s3\"\nbucket = \"b\"\nregion = \"x\"\nendpoint = \"http://127.0.0.1:9\"\n\
    access_key_id = { file = \"secrets/s3-id\" }\nsecret_access_key = { file = \"secrets/s3-secret\" }\nencryption = \"main\"\n";

fn write_secret(keepd: &Keepd, name: &str, text: &str) {
    let path = keepd.path(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, format!("{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// A daemon with a job, two destinations and secrets, all with comments of its owner.
fn started() -> Keepd {
    let mut keepd = Keepd::prepared();
    keepd.configure("", "schedule = \"30 2 * * *\" # at night\n");
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), format!("# ours\n{text}\n{OFFSITE}")).unwrap();
    write_secret(&keepd, "secrets/s3-id", "canary-of-an-id");
    write_secret(&keepd, "secrets/s3-secret", CANARY);
    make_database(&keepd.path("shop.db"), 10);
    keepd.start();
    keepd
}

/// A daemon with nothing but a state directory.
fn empty() -> Keepd {
    let mut keepd = Keepd::prepared();
    let d = keepd.dir.path().display();
    fs::write(keepd.path("keepd.toml"), format!("[daemon]\nstate_dir = \"{d}/state\"\nsocket = \"{d}/keepd.sock\"\n")).unwrap();
    fs::remove_file(keepd.path("main.key")).unwrap();
    keepd.start();
    keepd
}

fn export(keepd: &Keepd, name: &str, options: &[&str]) -> String {
    let file = keepd.path(name).to_str().unwrap().to_owned();
    keepd.ok(&[&["config", "export", "-o", &file], options].concat());
    file
}

/// All that a configuration is, by its files.
fn files(keepd: &Keepd) -> Vec<(String, Vec<u8>)> {
    let mut all = vec![keepd.path("keepd.toml")];
    all.extend(files_below(&keepd.path("conf.d")));
    all.extend(files_below(&keepd.path("secrets")));
    all.iter().map(|p| (p.strip_prefix(keepd.dir.path()).unwrap().display().to_string(), fs::read(p).unwrap())).collect()
}

fn read_plain(path: &str) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn item<'v>(all: &'v Value, name: &str) -> &'v Value {
    let (kind, name) = name.split_once('.').unwrap();
    all["items"].as_array().unwrap().iter().find(|i| i["type"] == kind && i["name"] == name).unwrap_or_else(|| panic!("no {kind}.{name}"))
}

#[test]
fn what_goes_out_says_what_it_is_and_keeps_its_secrets() {
    let keepd = started();
    let plain = export(&keepd, "plain.json", &[]);
    let all = read_plain(&plain);
    assert_eq!((&all["format_version"], &all["export_type"], &all["includes_secrets"]), (&json!(1), &json!("all"), &json!(false)));
    assert_eq!(all["item_count"].as_u64().unwrap() as usize, all["items"].as_array().unwrap().len());
    assert_eq!(item(&all, "job.shop")["value"]["schedule"], "30 2 * * *");
    let secrets = item(&all, "destination.offsite")["secrets"].as_array().unwrap();
    assert_eq!(secrets.iter().map(|s| (&s["at"], &s["value"])).collect::<Vec<_>>().len(), 2);
    assert!(secrets.iter().all(|s| s["value"] == ""), "empty places");
    assert_eq!(fs::metadata(&plain).unwrap().mode() & 0o777, 0o600);

    // Nothing that is a secret leaves unsealed, whoever asks.
    let refused = keepd.fails(2, &["config", "export", "--include-secrets", "-o", keepd.path("s.json").to_str().unwrap()]);
    assert!(refused.contains("only sealed"), "{refused}");
    assert!(!keepd.path("s.json").exists());
    let sealed = export(&keepd, "sealed.json.gz.enc", &["--include-secrets"]);
    for file in [&plain, &sealed] {
        assert!(!String::from_utf8_lossy(&fs::read(file).unwrap()).contains("canary"), "{file}");
    }
    // The decoder alone, with the key alone, gives them back.
    let decoder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kit/keepd_decoder.py");
    let out = Command::new(python()).arg(decoder).args(["config", &sealed, "--key"]).arg(keepd.path("main.key")).output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    let decoded = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(decoded.contains(CANARY), "{decoded}");

    let jobs = read_plain(&export(&keepd, "jobs.json", &["--type", "jobs"]));
    assert!(jobs["items"].as_array().unwrap().iter().all(|i| i["type"] == "job") && jobs["export_type"] == "job");
    assert!(keepd.fails(1, &["config", "export", "-o", keepd.path("x.json").to_str().unwrap(), "--type", "cats"]).contains("cats"));
    // Through a pipe, too.
    let out = keepd.ctl(&["config", "export", "-o", "-", "--encryption", "none", "--compression", "none"]);
    assert_eq!(serde_json::from_slice::<Value>(&out.stdout).unwrap()["items"], all["items"]);
    // Without -o it is called by its time.
    let named = keepd.path("here");
    fs::create_dir(&named).unwrap();
    assert!(keepd.ctl_command(&["config", "export"]).current_dir(&named).status().unwrap().success());
    let name = fs::read_dir(&named).unwrap().next().unwrap().unwrap().file_name().into_string().unwrap();
    assert!(name.starts_with("config_backup_20") && name.ends_with("Z.json.gz.enc"), "{name}");

    let preview = keepd.json(&["config", "preview"]);
    let offsite = preview["items"].as_array().unwrap().iter().find(|i| i["item"] == "destination.offsite").unwrap();
    assert_eq!(offsite["secrets"].as_array().unwrap().len(), 2);
    assert!(!preview.to_string().contains("canary"), "by name only");

    // One that cannot be read fails it, by its name.
    fs::remove_file(keepd.path("secrets/s3-secret")).unwrap();
    let failed = keepd.fails(1, &["config", "export", "--include-secrets", "-o", keepd.path("f.json.enc").to_str().unwrap()]);
    assert!(failed.contains("destination.offsite") && failed.contains("secret_access_key") && !failed.contains("canary"), "{failed}");
    assert!(!keepd.path("f.json.enc").exists());
    assert!(!keepd.log().contains("canary"), "{}", keepd.log());
}

#[test]
fn an_empty_daemon_becomes_the_same() {
    let (a, b) = (started(), empty());
    let sealed = export(&a, "a.json.gz.enc", &["--include-secrets", "--type", "encryption,destinations,jobs,schedule"]);
    let key = a.path("main.key");
    let refused = b.fails(1, &["config", "import", &sealed, "--yes"]);
    assert!(refused.contains("key"), "{refused}");
    let before = files(&b);
    let with_key = ["config", "import", &sealed, "--key", key.to_str().unwrap()];
    let shown = b.ok(&[&with_key[..], &["--dry-run"]].concat());
    assert!(shown.contains("+ job.shop") && shown.contains("+ destination.offsite") && !shown.contains("canary"), "{shown}");
    assert_eq!(files(&b), before, "a dry run changes nothing");
    assert!(b.fails(2, &with_key).contains("--yes"));
    assert_eq!(files(&b), before);
    b.ok(&[&with_key[..], &["--yes"]].concat());
    assert_eq!(b.json(&["job", "list"])[0]["name"], "shop");
    assert_eq!(fs::read_to_string(b.path("secrets/s3-secret")).unwrap().trim(), CANARY);
    for secret in ["secrets/s3-secret", "secrets/s3-id", "main.key"] {
        assert_eq!(fs::metadata(b.path(secret)).unwrap().mode() & 0o777, 0o600, "{secret}");
    }
    // What it exports now is what came in.
    let plain = |keepd: &Keepd, name: &str| {
        let all = read_plain(&export(keepd, name, &["--type", "encryption,destinations,jobs,schedule"]));
        (all["items"].clone(), all["export_type"].clone())
    };
    assert_eq!(plain(&a, "a.json"), plain(&b, "b.json"));
    // It survives a restart, and works: with the same key at the same place.
    let mut b = b;
    b.stop();
    b.start();
    b.ok(&["config", "check"]);
    assert!(!b.log().contains("canary"), "{}", b.log());
}

#[test]
fn without_secrets_it_says_what_is_to_be_entered_again() {
    let (a, b) = (started(), empty());
    let file = export(&a, "a.json", &["--type", "encryption,destinations,jobs"]);
    let before = files(&b);
    let refused = b.fails(1, &["config", "import", &file, "--yes"]);
    assert!(refused.contains("main.key"), "{refused}");
    assert_eq!(files(&b), before, "a profile without its key cannot be in force");
    // The key is put there by hand; the access keys are still missing, which is no error before they are used.
    fs::copy(a.path("main.key"), b.path("main.key")).unwrap();
    let out = b.ctl(&["config", "import", &file, "--yes"]);
    assert!(text(&out).contains("secret_access_key") && text(&out).contains("s3-secret"), "{}", text(&out));
    if out.status.code() == Some(3) {
        assert_eq!(b.json(&["job", "list"])[0]["name"], "shop");
    } else {
        // Refused as keepd --check refuses it: then it goes once they are there.
        assert_eq!(out.status.code(), Some(1), "{}", text(&out));
        write_secret(&b, "secrets/s3-id", "i");
        write_secret(&b, "secrets/s3-secret", "s");
        // Where it goes is the file's choice.
        assert!(b.fails(1, &["config", "import", &file, "--yes"]).contains("--allow-key-change"));
        b.ok(&["config", "import", &file, "--allow-key-change", "--yes"]);
    }
    assert!(
        !b.path("secrets/s3-secret").exists() || fs::metadata(b.path("secrets/s3-secret")).unwrap().len() > 0,
        "no empty secret is made"
    );
}

#[test]
fn conflicts_are_skipped_renamed_or_overwritten_and_all_of_it_undone() {
    let keepd = started();
    let file = export(&keepd, "then.json", &[]);
    let text_of = |name: &str| fs::read_to_string(keepd.path(name)).unwrap();
    let changed = text_of("keepd.toml").replace("30 2 * * *", "15 4 * * *").replace("\"b\"", "\"other\"");
    fs::write(keepd.path("keepd.toml"), &changed).unwrap();
    keepd.ok(&["reload"]);
    let before = files(&keepd);

    let skipped = keepd.ok(&["config", "import", &file, "--yes"]);
    assert!(skipped.contains("job.shop is left out") && skipped.contains("15 4 * * *"), "{skipped}");
    assert_eq!(files(&keepd), before);

    // Renamed: what refers to it in the file refers to the new name; what is here stays as it is.
    // This machine's access keys would go to another place than now: that must be told.
    for conflict in ["rename", "overwrite"] {
        let refused = keepd.fails(1, &["config", "import", &file, "--on-conflict", conflict, "--yes"]);
        assert!(refused.contains("--allow-key-change") && refused.contains("secret_access_key"), "{refused}");
        assert_eq!(files(&keepd), before);
    }
    keepd.ok(&["config", "import", &file, "--on-conflict", "rename", "--allow-key-change", "--yes"]);
    assert_eq!(text_of("keepd.toml"), changed);
    let jobs = keepd.json(&["job", "list"]);
    assert_eq!(jobs.as_array().unwrap().iter().map(|j| j["name"].as_str().unwrap()).collect::<Vec<_>>(), ["shop", "shop-2"]);
    assert!(text_of("conf.d/destination.offsite-2.toml").contains("bucket = \"b\""));
    let undone = keepd.ok(&["config", "undo", "--yes"]);
    assert!(undone.contains("changed back"), "{undone}");
    assert_eq!(files(&keepd), before);
    assert_eq!(keepd.json(&["job", "list"]).as_array().unwrap().len(), 1);

    // Overwritten: where it stands, with its comments.
    keepd.ok(&["config", "import", &file, "--on-conflict", "overwrite", "--allow-key-change", "--yes"]);
    assert_eq!(text_of("keepd.toml"), changed.replace("15 4 * * *", "30 2 * * *").replace("\"other\"", "\"b\""));
    keepd.ok(&["config", "undo", "--yes"]);
    assert_eq!(files(&keepd), before);
    keepd.ok(&["config", "undo", "--yes"]);
    assert_eq!(text_of("keepd.toml"), changed.replace("15 4 * * *", "30 2 * * *").replace("\"other\"", "\"b\""), "and forth again");

    // Somebody edits: an undo would lose that.
    fs::write(keepd.path("keepd.toml"), format!("{}# mine\n", text_of("keepd.toml"))).unwrap();
    let refused = keepd.fails(1, &["config", "undo", "--yes"]);
    assert!(refused.contains("keepd.toml"), "{refused}");
    assert!(text_of("keepd.toml").ends_with("# mine\n"));
}

#[test]
fn a_mode_says_what_becomes_of_the_rest() {
    let keepd = started();
    let all = export(&keepd, "all.json", &[]);
    let jobs = export(&keepd, "jobs.json", &["--type", "jobs"]);
    let d = keepd.dir.path().display().to_string();
    fs::create_dir(keepd.path("conf.d")).unwrap();
    fs::write(
        keepd.path("conf.d/more.toml"),
        format!("[job.more]\ndestinations = [\"local\"]\n[[job.more.source]]\nfiles = \"{d}/more\"\n[destination.more]\nservice = \"fs\"\nroot = \"{d}/more-repository\"\nencryption = \"main\"\n"),
    )
    .unwrap();
    keepd.ok(&["reload"]);
    assert!(keepd.ok(&["config", "import", &all, "--yes"]).contains("Nothing is to be changed"));
    let shown = keepd.ok(&["config", "import", &jobs, "--mode", "full", "--dry-run"]);
    assert!(shown.contains("- job.more") && !shown.contains("- destination.more"), "{shown}");
    let shown = keepd.ok(&["config", "import", &all, "--mode", "full", "--dry-run"]);
    assert!(shown.contains("- job.more") && shown.contains("- destination.more"), "{shown}");
    keepd.ok(&["config", "import", &all, "--mode", "full", "--yes"]);
    assert_eq!(keepd.json(&["job", "list"]).as_array().unwrap().len(), 1);
    assert!(!keepd.path("conf.d/more.toml").exists());
    keepd.ok(&["config", "undo", "--yes"]);
    assert_eq!(keepd.json(&["job", "list"]).as_array().unwrap().len(), 2);

    // Only what is named; what that needs and is not there is told, and nothing is imported with less.
    let other = empty();
    let shown = other.ok(&["config", "import", &all, "--only", "job.shop", "--yes"]);
    assert!(shown.contains("job.shop is left out") && shown.contains("local"), "{shown}");
    let strict = other.fails(1, &["config", "import", &all, "--only", "job.shop", "--strict", "--yes"]);
    assert!(strict.contains("local"), "{strict}");
    assert!(other.fails(1, &["config", "import", &all, "--only", "job.shpo"]).contains("job.shop"), "the nearest name is told");
    assert_eq!(other.json(&["job", "list"]).as_array().unwrap().len(), 0);
}

#[test]
fn nothing_worse_comes_in_unless_it_is_told() {
    let keepd = started();
    let file = export(&keepd, "a.json", &[]);
    let forged = |change: &dyn Fn(&mut Value)| {
        let mut all = read_plain(&file);
        change(&mut all);
        all["item_count"] = all["items"].as_array().unwrap().len().into();
        let path = keepd.path("forged.json");
        fs::write(&path, all.to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    fn value<'v>(all: &'v mut Value, kind: &str, name: &str) -> &'v mut Value {
        let items = all["items"].as_array_mut().unwrap();
        &mut items.iter_mut().find(|i| i["type"] == kind && i["name"] == name).unwrap()["value"]
    }
    let before = files(&keepd);
    type Forge<'f> = Box<dyn Fn(&mut Value) + 'f>;
    let marker = keepd.path("ran");
    let touch = json!(["touch", marker.to_str().unwrap()]);
    let cases: Vec<(&str, Forge<'_>)> = vec![
        ("commands", Box::new(|all| value(all, "job", "shop")["hooks"] = json!({ "before": [touch] }))),
        ("commands", Box::new(|all| value(all, "job", "shop")["health"] = json!({ "command": touch }))),
        (
            "commands",
            Box::new(|all| {
                let job = json!({ "destinations": ["local"], "source": [{ "name": "x", "command": { "command": touch } }] });
                all["items"].as_array_mut().unwrap().push(json!({ "type": "job", "name": "evil", "value": job }));
            }),
        ),
        ("weaker-encryption", Box::new(|all| value(all, "destination", "local")["encryption"] = json!("none"))),
        (
            "weaker-encryption",
            Box::new(|all| {
                let there = json!({ "service": "fs", "root": "/tmp/open", "encryption": "none" });
                all["items"].as_array_mut().unwrap().push(json!({ "type": "destination", "name": "open", "value": there }));
            }),
        ),
        ("key-change", Box::new(|all| value(all, "encryption", "main")["key_file"] = json!("/tmp/another.key"))),
    ];
    for (flag, forge) in &cases {
        let file = forged(&**forge);
        for conflict in ["overwrite", "rename"] {
            if *flag == "key-change" && conflict == "rename" {
                continue;
            }
            let refused = keepd.fails(1, &["config", "import", &file, "--on-conflict", conflict, "--yes"]);
            assert!(refused.contains(&format!("--allow-{flag}")), "{flag} {conflict}: {refused}");
            assert_eq!(files(&keepd), before, "{flag} {conflict}");
        }
        // validate tells and changes nothing, either.
        keepd.ctl(&["config", "validate", &file]);
        assert_eq!(files(&keepd), before);
    }
    assert!(!marker.exists(), "nothing that came in was run");
    // The right word lets it in.
    let hook = forged(&|all| value(all, "job", "shop")["hooks"] = json!({ "before": [touch] }));
    keepd.ok(&["config", "import", &hook, "--on-conflict", "overwrite", "--allow-commands", "--yes"]);
    assert!(keepd.ok(&["config", "show", "job.shop"]).contains("touch"));
    assert!(!marker.exists(), "a hook runs with a backup, not before");
}

#[test]
fn what_is_no_export_is_refused_and_changes_nothing() {
    let keepd = started();
    let before = files(&keepd);
    let good = fs::read(export(&keepd, "good.json", &[])).unwrap();
    let sealed = fs::read(export(&keepd, "good.json.gz.enc", &["--include-secrets"])).unwrap();
    let all: Value = serde_json::from_slice(&good).unwrap();
    let with = |change: &dyn Fn(&mut Value)| {
        let mut all = all.clone();
        change(&mut all);
        all.to_string().into_bytes()
    };
    let mut flipped = sealed.clone();
    let half = flipped.len() / 2;
    flipped[half] ^= 1;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Vec::new()),
        ("garbage", noise(5000, 7)),
        ("half of it", good[..good.len() / 2].to_vec()),
        ("half of a sealed one", sealed[..sealed.len() / 2].to_vec()),
        ("a flipped bit", flipped),
        ("a later version", with(&|all| all["format_version"] = json!(99))),
        ("a wrong count", with(&|all| all["item_count"] = json!(3))),
        ("an unknown kind", with(&|all| all["items"][0]["type"] = json!("cat"))),
        ("no name", with(&|all| all["items"][0]["name"] = json!("../../etc/passwd"))),
        (
            "twice the same",
            with(&|all| {
                let again = all["items"][0].clone();
                all["items"].as_array_mut().unwrap().push(again);
                all["item_count"] = json!(all["items"].as_array().unwrap().len());
            }),
        ),
        ("no table", with(&|all| all["items"].as_array_mut().unwrap().iter_mut().for_each(|i| i["value"] = json!(5)))),
        (
            "an unknown key",
            with(&|all| {
                let items = all["items"].as_array_mut().unwrap();
                items.iter_mut().find(|i| i["type"] == "job").unwrap()["value"]["cat"] = json!(1);
            }),
        ),
    ];
    let file = keepd.path("tried");
    for (what, bytes) in &cases {
        fs::write(&file, bytes).unwrap();
        for command in [&["config", "validate"][..], &["config", "import", "--yes", "--on-conflict", "overwrite", "--mode", "full"]] {
            let said = keepd.fails(1, &[command, &[file.to_str().unwrap()]].concat());
            assert!(!said.contains("panic") && !said.contains("bug") && said.trim().len() > 20, "{what}: {said}");
            assert_eq!(files(&keepd), before, "{what}");
        }
    }
    assert!(keepd.fails(1, &["config", "import", "/nowhere", "--yes"]).contains("/nowhere"));
    assert!(!keepd.log().contains("panic"), "{}", keepd.log());
    keepd.ok(&["status"]);
}

#[test]
fn what_was_shown_is_what_is_changed() {
    let keepd = started();
    let file = export(&keepd, "a.json", &[]);
    fs::write(keepd.path("keepd.toml"), fs::read_to_string(keepd.path("keepd.toml")).unwrap().replace("30 2 * * *", "15 4 * * *")).unwrap();
    // While it waits for an answer, somebody else edits.
    let edit = || {
        let mut toml = fs::OpenOptions::new().append(true).open(keepd.path("keepd.toml")).unwrap();
        toml.write_all(b"# edited\n").unwrap();
    };
    let out =
        at_a_terminal(&keepd, &["config", "import", &file, "--on-conflict", "overwrite"], &[("change the configuration so?", "y")], edit);
    assert_eq!(out.status.code(), Some(1), "{}", text(&out));
    assert!(text(&out).contains("was changed since it was shown"), "{}", text(&out));
    let now = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    assert!(now.contains("15 4 * * *") && now.ends_with("# edited\n"), "{now}");
}

#[test]
fn each_conflict_can_be_asked_for_at_a_terminal() {
    let keepd = started();
    let file = export(&keepd, "a.json", &[]);
    let text_now = fs::read_to_string(keepd.path("keepd.toml")).unwrap().replace("30 2 * * *", "15 4 * * *").replace("\"b\"", "\"other\"");
    fs::write(keepd.path("keepd.toml"), &text_now).unwrap();
    assert!(keepd.fails(2, &["config", "import", &file, "--on-conflict", "ask"]).contains("terminal"));
    // The destination is asked for first (others refer to it): overwritten; the job stays.
    let answers = [("[s/r/o]", "o"), ("[s/r/o]", "s"), ("[y/N]", "y")];
    let arguments = ["config", "import", &file, "--on-conflict", "ask", "--allow-key-change"];
    let out = at_a_terminal(&keepd, &arguments, &answers, || ());
    assert!(out.status.success(), "{}", text(&out));
    assert_eq!(fs::read_to_string(keepd.path("keepd.toml")).unwrap(), text_now.replace("\"other\"", "\"b\""), "{}", text(&out));
}

#[test]
fn killed_in_the_middle_it_is_the_old_one_or_the_new_one() {
    let mut keepd = started();
    let d = keepd.dir.path().display().to_string();
    // Forty jobs more in the file than are here.
    let mut all = read_plain(&export(&keepd, "a.json", &[]));
    for n in 0..40 {
        let job = json!({ "destinations": ["local"], "source": [{ "files": format!("{d}/more-{n}") }] });
        all["items"].as_array_mut().unwrap().push(json!({ "type": "job", "name": format!("more-{n:02}"), "value": job }));
    }
    all["item_count"] = json!(all["items"].as_array().unwrap().len());
    fs::write(keepd.path("more.json"), all.to_string()).unwrap();
    let file = keepd.path("more.json").to_str().unwrap().to_owned();
    let (mut old, mut new) = (0, 0);
    for round in 0..24u64 {
        let mut import =
            keepd.ctl_command(&["config", "import", &file, "--yes"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(10 + round * 7));
        keepd.kill();
        let _ = import.wait();
        keepd.start();
        let jobs = keepd.json(&["job", "list"]).as_array().unwrap().len();
        assert!(jobs == 1 || jobs == 41, "round {round}: {jobs} jobs");
        assert!(!keepd.path(".keepd-change.json").exists(), "the start finished it");
        keepd.ok(&["config", "check"]);
        if jobs == 1 {
            old += 1;
        } else {
            new += 1;
            keepd.ok(&["config", "undo", "--yes"]);
            assert_eq!(keepd.json(&["job", "list"]).as_array().unwrap().len(), 1);
        }
    }
    println!("killed {} times in an import: {old} times the old configuration, {new} times the new one", old + new);
}

#[test]
fn a_hundred_jobs_and_twenty_destinations() {
    let (keepd, other) = (started(), empty());
    let d = keepd.dir.path().display().to_string();
    fs::create_dir(keepd.path("conf.d")).unwrap();
    let mut text = String::new();
    for n in 0..20 {
        text += &format!("[destination.place-{n}]\nservice = \"fs\"\nroot = \"{d}/places/{n}\"\nencryption = \"main\"\n");
    }
    for n in 0..100 {
        let to = n % 20;
        text += &format!(
            "[job.job-{n}]\nschedule = \"{} 3 * * *\"\ndestinations = [\"place-{to}\"]\nretention = {{ keep_daily = 7 }}\n[[job.job-{n}.source]]\nfiles = \"{d}/data/{n}\"\n",
            n % 60
        );
    }
    fs::write(keepd.path("conf.d/many.toml"), text).unwrap();
    keepd.ok(&["reload"]);
    let since = std::time::Instant::now();
    let file = export(&keepd, "many.json.gz.enc", &["--include-secrets", "--type", "encryption,destinations,jobs,schedule"]);
    let exported = since.elapsed();
    let since = std::time::Instant::now();
    other.ok(&["config", "import", &file, "--key", keepd.path("main.key").to_str().unwrap(), "--yes"]);
    println!("export {exported:?}, import {:?}", since.elapsed());
    assert_eq!(other.json(&["job", "list"]).as_array().unwrap().len(), 101);
    let items = |keepd: &Keepd, name: &str| read_plain(&export(keepd, name, &["--type", "encryption,destinations,jobs"]))["items"].clone();
    assert_eq!(items(&keepd, "x.json"), items(&other, "y.json"));
}
