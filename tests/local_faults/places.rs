//! Places that keepd needs beside its sources and destinations: the note of the audit log's head, a directory for temporary files, the configuration's own directory.

use std::collections::BTreeSet;

use keepd_faultfs::{Rule, Verb, errno};

use super::*;

#[test]
fn a_damaged_or_missing_audit_head_is_told_and_stops_nothing() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 7] = [
        ("missing", |path| fs::remove_file(path).unwrap()),
        ("empty", |path| fs::write(path, "").unwrap()),
        ("cut off", |path| {
            let bytes = fs::read(path).unwrap();
            fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("no JSON", |path| fs::write(path, "hello there").unwrap()),
        ("not UTF-8", |path| fs::write(path, [0xff; 300]).unwrap()),
        ("another hash", |path| {
            let text = fs::read_to_string(path).unwrap();
            let mut head: serde_json::Value = serde_json::from_str(&text).unwrap();
            head["hash"] = "00".repeat(32).into();
            fs::write(path, head.to_string()).unwrap();
        }),
        ("a directory", |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
    ];
    let mut table = Table::default();
    for (what, damage) in damages {
        let mut keepd = filled(Keepd::prepared());
        keepd.start();
        keepd.ok(&["backup", "shop"]);
        let first = keepd.backups().remove(0);
        assert_eq!(keepd.ctl(&["audit", "verify"]).status.code(), Some(0), "{}", text(&keepd.ctl(&["audit", "verify"])));
        keepd.stop();
        let path = keepd.path("state/audit-head");
        damage(&path);
        let fault = format!("audit-head: {what}");
        keepd.try_start(PATIENCE).unwrap_or_else(|said| panic!("{fault}: it does not start: {said}"));
        assert!(keepd.log().contains("audit-head"), "{fault}: nothing is told: {}", keepd.log());
        let verified = keepd.ctl(&["audit", "verify"]);
        let said = text(&verified);
        assert!(matches!(verified.status.code(), Some(1 | 3)) && said.contains("audit-head"), "{fault}: {said}");
        table.add(&fault, format!("started, and told: {}", last_line(&said)));
        change(&keepd, 3);
        recovers(&keepd, &fault, &first, None);
        // It is noted anew, and the next start has nothing more to tell.
        let since = Instant::now();
        while what != "a directory" && serde_json::from_slice::<serde_json::Value>(&fs::read(&path).unwrap_or_default()).is_err() {
            assert!(since.elapsed() < PATIENCE, "{fault}: it is not noted anew");
            std::thread::sleep(Duration::from_millis(50));
        }
        keepd.stop();
        if path.is_dir() {
            fs::remove_dir(&path).unwrap();
        }
        keepd.start();
        keepd.ok(&["backup", "shop"]);
    }
    table.print("the note of the audit log's head");
}

/// All that may want a temporary file somewhere.
fn everything_works(keepd: &Keepd, ctl: &dyn Fn(&[&str]) -> std::process::Output, what: &str) {
    change(keepd, 5);
    let archive = keepd.path(&format!("{}.tar.zst", what.replace('/', "-")));
    let kit = keepd.path(&format!("{}.kit", what.replace('/', "-")));
    let back = keepd.path(&format!("back-{}", what.replace('/', "-")));
    let [archive, kit, back] = [&archive, &kit, &back].map(|path| path.to_str().unwrap());
    let all: &[&[&str]] = &[
        &["backup", "shop"],
        &["check", "local", "--read-data"],
        &["drill", "--job", "shop"],
        &["compare", "latest", "--deep"],
        &["restore", "latest", "--to", back],
        &["restore", "latest", "--in-place", "--yes"],
        &["export", "latest", "-o", archive],
        &["import", archive, "--on-conflict", "rename"],
        &["config", "export", "-o", &format!("{archive}.json.enc")],
        &["key", "kit", "main", "-o", kit],
        &["job", "edit", "shop", "--max-age", "26h", "--yes"],
        &["prune", "local"],
    ];
    for arguments in all {
        let out = ctl(arguments);
        assert!(out.status.success(), "{what}: keepctl {arguments:?}: {}\n{}", text(&out), keepd.log());
    }
    assert_same(&keepd.path("files"), &Path::new(back).join("files"));
}

#[test]
fn without_a_directory_for_temporary_files_all_goes_on() {
    for place in ["/nonexistent/tmp", "/proc"] {
        let mut keepd = filled(Keepd::prepared());
        keepd.environment = vec![("TMPDIR".into(), place.into())];
        keepd.start();
        everything_works(&keepd, &|arguments| keepd.ctl_command(arguments).env("TMPDIR", place).output().unwrap(), place);
        // What an editor is to have needs one: it is named.
        let edited = keepd.ctl_command(&["job", "edit", "shop", "--yes"]).env("TMPDIR", place).env("VISUAL", "true").output().unwrap();
        assert!(!edited.status.success() && text(&edited).contains(place), "{}", text(&edited));
        println!("TMPDIR={place}: all goes on, but for an editor: {}", last_line(&text(&edited)));
    }
    // Neither /tmp nor /var/tmp nor the working directory can be written.
    let Some(namespace) = Namespace::new() else { return };
    let Ok(dir) = tempfile::Builder::new().prefix("keepd-test-").tempdir_in("/run") else {
        return skipped("/run cannot be written");
    };
    let mut keepd = filled(Keepd::prepared_in(dir));
    for place in ["/tmp", "/var/tmp"] {
        assert!(namespace.run(&["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place]), "mount");
    }
    let here = ["sh", "-c", "cd /proc && exec \"$@\"", "sh"].map(str::to_owned);
    keepd.wrapper = namespace.wrapper().into_iter().chain(here).collect();
    keepd.start();
    let ctl = |arguments: &[&str]| {
        let (program, socket) = (keepctl_binary(), keepd.path("keepd.sock"));
        let words: Vec<&str> =
            ["sh", "-c", "cd /proc && exec \"$@\"", "sh", program.to_str().unwrap(), "--socket", socket.to_str().unwrap()]
                .into_iter()
                .chain(arguments.iter().copied())
                .collect();
        namespace.command(&words).output().unwrap()
    };
    everything_works(&keepd, &ctl, "read-only");
    println!("/tmp and /var/tmp read-only: all goes on");
    keepd.stop();
}

#[test]
fn a_configuration_that_cannot_be_written_stays_as_it_was() {
    let mut keepd = filled(Keepd::prepared());
    let Some(mounted) = quota::layer(&keepd, "etc") else { return };
    keepd.config = keepd.path("etc/keepd.toml");
    let d = keepd.dir.path().display().to_string();
    let first = fs::read_to_string(keepd.path("keepd.toml")).unwrap().replace("\"main.key\"", &format!("\"{d}/main.key\""));
    fs::write(&keepd.config, first).unwrap();
    fs::create_dir(keepd.path("etc/conf.d")).unwrap();
    keepd.start();
    keepd.ok(&["job", "edit", "shop", "--max-age", "1h", "--yes"]);
    let tree = |keepd: &Keepd| -> Vec<(PathBuf, Vec<u8>)> {
        files_below(&keepd.path("etc")).into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
    };
    let in_force = |keepd: &Keepd| keepd.ok(&["config", "show"]);
    let errors = [("ENOSPC", errno::ENOSPC, "no space"), ("EDQUOT", errno::EDQUOT, "quota"), ("EIO", errno::EIO, "input/output error")];
    let verbs = [Verb::Create, Verb::Write, Verb::Fsync, Verb::FsyncDir, Verb::Rename, Verb::SetAttr, Verb::Unlink];
    let (mut cases, mut kept, mut done, mut told) = (0, 0, 0, BTreeSet::new());
    let mut hours = 1;
    for (verb_at, verb) in verbs.into_iter().enumerate() {
        for (error_at, (name, errno, words)) in errors.into_iter().enumerate() {
            if !is_long() && error_at != verb_at % 3 && verb != Verb::Write {
                continue;
            }
            // A table of a file that is there, and a new drop-in.
            for is_new in [false, true] {
                if !is_long() && is_new != (verb_at % 2 == 0) && verb != Verb::Rename {
                    continue;
                }
                for nth in 1..=12 {
                    hours += 1;
                    let (job, age) = (format!("new-{hours}"), format!("{hours}h"));
                    let files = format!("{d}/files");
                    let edit = ["job", "edit", "shop", "--max-age", &age, "--yes"];
                    let add = ["job", "add", &job, "--files", &files, "--destination", "local", "--yes"];
                    let arguments: &[&str] = if is_new { &add } else { &edit };
                    let (before, force) = (tree(&keepd), in_force(&keepd));
                    mounted.control().add(Rule::on(&[verb], "**").nth(nth).fails(errno));
                    let out = keepd.ctl(arguments);
                    let met = mounted.control().fired();
                    mounted.control().clear_rules();
                    let fault = format!("{verb:?} {nth} × {name}, {arguments:?}");
                    let said = text(&out);
                    if met == 0 {
                        assert!(out.status.success(), "{fault}: nothing was wrong: {said}");
                        break;
                    }
                    cases += 1;
                    assert!(keepd.is_alive(), "{fault}: {}", keepd.log());
                    let checked = Command::new(keepd_binary()).arg("--config").arg(&keepd.config).arg("--check").output().unwrap();
                    assert!(checked.status.success(), "{fault}: what stands there now is no configuration: {}", text(&checked));
                    // What is in force is what stands there.
                    keepd.ok(&["reload"]);
                    let now = in_force(&keepd);
                    match out.status.success() {
                        true => {
                            done += 1;
                            assert_ne!(now, force, "{fault}: told as done, and not there: {said}");
                            // What was left to be finished, the next change finishes.
                            hours += 1;
                            keepd.ok(&["job", "edit", "shop", "--max-age", &format!("{hours}h"), "--yes"]);
                        }
                        false => {
                            kept += 1;
                            assert!(said.to_lowercase().contains(words), "{fault}: the cause is not named: {said}");
                            assert_eq!(now, force, "{fault}: told as failed, and done: {said}");
                            told.insert(last_line(&said).replace(&d, ""));
                            // The next one goes on, and takes along what this one left.
                            keepd.ok(arguments);
                        }
                    }
                    if !is_new {
                        let names = |tree: &[(PathBuf, Vec<u8>)]| tree.iter().map(|(path, _)| path.clone()).collect::<Vec<_>>();
                        assert_eq!(names(&tree(&keepd)), names(&before), "{fault}: something is left there");
                    }
                    if is_new {
                        keepd.ok(&["job", "remove", &job, "--keep-backups", "--yes"]);
                        assert_eq!(
                            tree(&keepd).len(),
                            before.len(),
                            "{fault}: something is left there: {:?}",
                            files_below(&keepd.path("etc"))
                        );
                    }
                }
            }
        }
    }
    told.iter().for_each(|line| println!("  {line}"));
    println!(
        "a configuration that cannot be written: {cases} faults, {kept} changes refused and nothing changed, {done} done all the same"
    );
    assert!(cases > 10 && kept > 5);
    keepd.stop();
    mounted.unmount().unwrap();
}
