//! keepd rescue: the daemon, its configuration and its state are gone; the storage and a key are there.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::servers::{Kind, SECRET, Server};
use common::*;
use serde_json::Value;

/// What is left of a machine: its storage and a key, and what was on it, to compare.
struct Ruin {
    keepd: Keepd,
    environment: Vec<(String, String)>,
    destination: String,
}

impl Ruin {
    /// Backs up twice into the local directory, and removes everything that is keepd's but the repository and the key.
    fn of_local() -> Self {
        let mut keepd = Keepd::started();
        fill(&keepd);
        keepd.ok(&["backup", "shop", "--name", "first"]);
        fs::write(keepd.path("files/deep/later"), "later").unwrap();
        keepd.ok(&["backup", "shop", "--name", "second"]);
        keepd.stop();
        Self::left_of(keepd, |keepd| format!("fs:{}", keepd.path("repository").display()))
    }

    fn left_of(keepd: Keepd, destination: impl Fn(&Keepd) -> String) -> Self {
        fs::remove_dir_all(keepd.path("state")).unwrap();
        fs::remove_file(keepd.path("keepd.toml")).unwrap();
        fs::create_dir(keepd.path("tmp")).unwrap();
        let destination = destination(&keepd);
        Self { environment: vec![("TMPDIR".into(), keepd.path("tmp").display().to_string())], keepd, destination }
    }

    fn command(&self, command: &str, arguments: &[&str]) -> Command {
        let mut run = Command::new(keepd_binary());
        run.args(["rescue", command, "--destination", &self.destination]).args(arguments);
        run.envs(self.environment.iter().cloned()).current_dir(self.keepd.dir.path()).stdin(Stdio::null());
        run
    }

    fn run(&self, command: &str, arguments: &[&str]) -> Output {
        let out = self.command(command, arguments).output().unwrap();
        assert!(files_below(&self.keepd.path("tmp")).is_empty(), "something is left in the temporary directory");
        out
    }

    fn ok(&self, command: &str, arguments: &[&str]) -> String {
        let out = self.run(command, &[arguments, &["--key", "main.key"]].concat());
        assert!(out.status.success(), "{command} {arguments:?}: {}", text(&out));
        String::from_utf8(out.stdout).unwrap()
    }

    fn json(&self, command: &str, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(command, &[arguments, &["--json"]].concat())).unwrap()
    }

    fn ends(&self, code: i32, command: &str, arguments: &[&str]) -> String {
        let out = self.run(command, arguments);
        assert_eq!(out.status.code(), Some(code), "{command} {arguments:?}: {}", text(&out));
        text(&out)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.keepd.path(name)
    }

    /// The restored directory is what was backed up.
    fn assert_whole(&self, restored: &Path) {
        assert_same(&self.path("files"), &restored.join("files"));
        assert_eq!(proven_sum(&restored.join("db/shop.db")), 50_000);
    }
}

/// All that is in a directory, with what would change were anything written there.
fn state_of(dir: &Path) -> Vec<(PathBuf, u64, std::time::SystemTime)> {
    let meta = |p: PathBuf| {
        let m = fs::metadata(&p).unwrap();
        (p, m.len(), m.modified().unwrap())
    };
    let mut all: Vec<_> = files_below(dir).into_iter().map(meta).collect();
    for name in ["", "packs", "index", "backups", "keys", "tmp"] {
        all.extend(Some(dir.join(name)).filter(|d| d.exists()).map(meta));
    }
    all
}

#[test]
fn everything_comes_back_with_the_storage_and_the_key_alone() {
    let ruin = Ruin::of_local();
    let before = state_of(&ruin.path("repository"));
    let list = ruin.json("list", &[]);
    assert_eq!(list.as_array().unwrap().len(), 2);
    assert_eq!((&list[0]["name"], &list[1]["name"], &list[0]["job"]), (&"second".into(), &"first".into(), &"shop".into()));
    let table = ruin.ok("list", &[]);
    assert!(table.lines().count() == 3 && table.contains("shop") && table.contains("second"), "{table}");
    assert_eq!(ruin.json("list", &["--job", "other"]).as_array().unwrap().len(), 0);
    let id = list[0]["id"].as_str().unwrap();

    let top = ruin.ok("ls", &["latest"]);
    assert!(top.contains(" db") && top.contains(" files"), "{top}");
    let listing = ruin.ok("ls", &[&id[..9], "files/deep"]);
    assert!(listing.contains("files/deep/later") && listing.contains("files/deep/small-7") && !listing.contains("files/big"), "{listing}");
    assert!(ruin.ok("ls", &["latest", "-R"]).contains("ümläut"));

    ruin.ok("restore", &["latest", "--job", "shop", "--to", "back"]);
    ruin.assert_whole(&ruin.path("back"));
    let meta = |name: &str| fs::metadata(ruin.path("back/files").join(name)).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert!(meta("sparse").blocks() * 512 < 1 << 20, "the hole is a hole");
    assert_eq!((meta("zzz").ino(), meta("zzz").nlink()), (meta("big").ino(), 2));
    let said = ruin.ends(1, "restore", &["latest", "--to", "back", "--key", "main.key"]);
    assert!(said.contains("--overwrite"), "{said}");
    fs::write(ruin.path("back/files/text"), "changed").unwrap();
    ruin.ok("restore", &["latest", "--to", "back", "--overwrite"]);
    ruin.assert_whole(&ruin.path("back"));
    ruin.ok("restore", &[list[1]["id"].as_str().unwrap(), "--to", "some", "files/deep", "files/zzz"]);
    assert_eq!(fs::read(ruin.path("some/files/zzz")).unwrap(), fs::read(ruin.path("files/big")).unwrap());
    assert!(ruin.path("some/files/deep/note.txt").exists() && !ruin.path("some/files/deep/later").exists());
    assert!(!ruin.path("some/files/text").exists() && !ruin.path("some/db").exists());
    let said = ruin.ends(1, "restore", &["latest", "--to", "none", "files/nowhere", "--key", "main.key"]);
    assert!(said.contains("'files/nowhere' is not in the backup"), "{said}");
    for (backup, code) in [("ffff", 1), ("newest", 2), ("", 2)] {
        let said = ruin.ends(code, "ls", &[backup, "--key", "main.key"]);
        assert!(said.contains("rescue list") || said.contains("unique start"), "{said}");
    }

    let told = ruin.ok("check", &["--read-data"]);
    assert!(told.contains("no damage found: 2 backups"), "{told}");
    assert_eq!(ruin.json("check", &[])["packs_read"], 0);

    // A cache makes the next one quicker, and holds no key.
    ruin.ok("list", &["--cache", "cache"]);
    ruin.ok("restore", &["latest", "--cache", "cache", "--to", "cached", "db"]);
    assert_eq!(proven_sum(&ruin.path("cached/db/shop.db")), 50_000);
    assert_eq!(state_of(&ruin.path("repository")), before, "nothing was written to the storage");
}

#[test]
fn an_archive_holds_everything() {
    let ruin = Ruin::of_local();
    let unpack = |archive: &Path, to: &str| {
        fs::create_dir(ruin.path(to)).unwrap();
        let out = Command::new("tar")
            .args(["-x", "-p", "--xattrs", "--xattrs-include=*", "-f"])
            .arg(archive)
            .arg("-C")
            .arg(ruin.path(to))
            .output();
        let out = out.unwrap();
        assert!(out.status.success() && out.stderr.is_empty(), "{}", text(&out));
    };
    ruin.ok("export", &["latest", "-o", "all.tar"]);
    unpack(&ruin.path("all.tar"), "unpacked");
    ruin.assert_whole(&ruin.path("unpacked"));
    use std::os::unix::fs::MetadataExt;
    let meta = |name: &str| fs::metadata(ruin.path("unpacked/files").join(name)).unwrap();
    assert_eq!((meta("zzz").ino(), meta("zzz").nlink()), (meta("big").ino(), 2));
    let value = |dir: &str| {
        Command::new("getfattr").args(["--only-values", "-n", "user.keepd"]).arg(ruin.path(dir).join("text")).output().unwrap().stdout
    };
    assert_eq!(value("unpacked/files"), value("files"));
    let said = ruin.ends(1, "export", &["latest", "-o", "all.tar", "--key", "main.key"]);
    assert!(said.contains("exists already"), "{said}");
    // Python's reader finds the same.
    let program = "import sys, tarfile; print('\\n'.join(m.name for m in tarfile.open(sys.argv[1])))";
    let names = Command::new(python()).args(["-c", program]).arg(ruin.path("all.tar")).output().unwrap();
    assert!(text(&names).contains("/ümläut\n") && text(&names).contains("files/deep/later\n"), "{}", text(&names));
    // Into a pipe, and only a part.
    let out = ruin.run("export", &["latest", "-o", "-", "db", "files/deep", "--key", "main.key"]);
    assert!(out.status.success() && out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
    fs::write(ruin.path("part.tar"), &out.stdout).unwrap();
    unpack(&ruin.path("part.tar"), "part");
    assert_eq!(proven_sum(&ruin.path("part/db/shop.db")), 50_000);
    assert_same(&ruin.path("files/deep"), &ruin.path("part/files/deep"));
    assert!(!ruin.path("part/files/big").exists());
}

#[test]
fn what_is_whole_comes_back_and_the_rest_is_named() {
    let ruin = Ruin::of_local();
    let repository = ruin.path("repository");
    let keep = ruin.path("kept");
    let copy = |from: &Path, to: &Path| assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
    copy(&repository, &keep);
    let anew = || {
        fs::remove_dir_all(&repository).unwrap();
        copy(&keep, &repository);
    };
    let damage = |path: &Path| {
        let mut bytes = fs::read(path).unwrap();
        let half = bytes.len() / 2;
        bytes[half] ^= 1;
        fs::write(path, bytes).unwrap();
    };

    // A chunk of a pack of contents.
    ruin.keepd.damage_a_pack();
    let said = ruin.ends(3, "restore", &["latest", "--to", "hurt", "--key", "main.key"]);
    let gone = |dir: &str| {
        let (all, there) = (files_below(&ruin.path("files")), files_below(&ruin.path(&format!("{dir}/files"))));
        let name = |p: &PathBuf, top: &str| p.strip_prefix(ruin.path(top)).unwrap().to_owned();
        let there: Vec<PathBuf> = there.iter().map(|p| name(p, &format!("{dir}/files"))).collect();
        for path in &there {
            let (a, b) = (ruin.path("files").join(path), ruin.path(&format!("{dir}/files")).join(path));
            if a.is_symlink() {
                assert_eq!(fs::read_link(a).unwrap(), fs::read_link(b).unwrap());
                continue;
            }
            assert!(fs::read(a).unwrap() == fs::read(b).unwrap(), "{} is there and not whole", path.display());
        }
        all.iter().map(|p| name(p, "files")).filter(|p| !there.contains(p)).collect::<Vec<_>>()
    };
    let lost = gone("hurt");
    assert!(!lost.is_empty() && lost.len() < 5, "{lost:?}\n{said}");
    for path in &lost {
        assert!(said.contains(&format!("not restored: 'files/{}'", path.display())), "{path:?}: {said}");
    }
    let said = ruin.ends(3, "export", &["latest", "-o", "hurt.tar", "--key", "main.key"]);
    assert!(said.contains(&format!("not exported: 'files/{}'", lost[0].display())), "{said}");
    fs::create_dir(ruin.path("hurt-tar")).unwrap();
    assert!(Command::new("tar").arg("-xf").arg(ruin.path("hurt.tar")).arg("-C").arg(ruin.path("hurt-tar")).status().unwrap().success());
    assert_eq!(gone("hurt-tar"), lost);
    let said = ruin.ends(1, "check", &["--read-data", "--key", "main.key"]);
    assert!(said.contains("its SHA-256 is not its name") && said.contains(&format!("files/{}", lost[0].display())), "{said}");

    // The pack is gone.
    let pack = ruin.keepd.packs().into_iter().max_by_key(|p| fs::metadata(p).unwrap().len()).unwrap();
    fs::remove_file(pack).unwrap();
    let said = ruin.ends(3, "restore", &["latest", "--to", "missing", "--key", "main.key"]);
    assert!(said.contains("it is missing") && lost.iter().all(|l| gone("missing").contains(l)), "{said}");

    // No index, or one that is damaged, loses nothing.
    anew();
    fs::remove_dir_all(repository.join("index")).unwrap();
    ruin.ok("restore", &["latest", "--to", "unindexed"]);
    ruin.assert_whole(&ruin.path("unindexed"));
    anew();
    files_below(&repository.join("index")).iter().for_each(|index| damage(index));
    let said = ruin.ends(0, "restore", &["latest", "--to", "bad-index", "--key", "main.key"]);
    assert!(said.contains("damaged: ") && said.contains("index/"), "{said}");
    ruin.assert_whole(&ruin.path("bad-index"));

    // A manifest that is damaged takes its own backup with it.
    anew();
    let newest = ruin.json("list", &[])[0]["id"].as_str().unwrap().to_owned();
    damage(&repository.join("backups").join(&newest));
    let said = ruin.ends(3, "list", &["--key", "main.key"]);
    assert!(said.contains(&newest) && said.contains("first") && !said.contains("second"), "{said}");
    ruin.ends(0, "restore", &["latest", "--to", "first", "--key", "main.key"]);
    assert!(ruin.path("first/files/text").exists() && !ruin.path("first/files/deep/later").exists());
    let said = ruin.ends(1, "restore", &[&newest, "--to", "second", "--key", "main.key"]);
    assert!(said.contains("its manifest cannot be read"), "{said}");

    // Each pack of pages in turn: what they listed is lost, not more, and nothing panics.
    anew();
    let meta: Vec<PathBuf> = ruin.keepd.packs().into_iter().filter(|p| fs::read(p).unwrap()[8] == 2).collect();
    assert!(!meta.is_empty());
    for (n, pack) in meta.iter().enumerate() {
        anew();
        damage(pack);
        let to = format!("pages-{n}");
        let out = ruin.run("restore", &["latest", "--to", &to, "--key", "main.key"]);
        let code = out.status.code();
        assert!(code == Some(0) || (code == Some(3) && text(&out).contains("entries behind it are lost")), "{code:?}: {}", text(&out));
        gone(&to);
    }
}

#[test]
fn only_the_right_keys_open() {
    let ruin = Ruin::of_local();
    ruin.keepd.generate_key("other.key");
    let said = ruin.ends(1, "list", &["--key", "other.key"]);
    assert!(said.contains("made with another key"), "{said}");
    assert_eq!(
        serde_json::from_str::<Value>(&ruin.ends(0, "list", &["--json", "--key", "other.key", "--key", "main.key"])).unwrap()[0]["job"],
        "shop"
    );
    let said = ruin.ends(1, "list", &[]);
    assert!(said.contains("is encrypted") && said.contains("key-file of profile 'main'") && said.contains("--key FILE"), "{said}");
    let said = ruin.ends(1, "list", &["--key", "nowhere.key"]);
    assert!(said.contains("there is no key file nowhere.key"), "{said}");
    let key = fs::read_to_string(ruin.path("main.key")).unwrap();
    let write = |name: &str, text: &str| {
        fs::write(ruin.path(name), text).unwrap();
        fs::set_permissions(ruin.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    };
    write("cut.key", &key[..key.len() - 12]);
    let said = ruin.ends(1, "list", &["--key", "cut.key"]);
    assert!(said.contains("cut.key") && said.contains("truncated"), "{said}");
    write("kit.txt", &format!("A recovery kit of somebody\n\nIts key:\n\n{}\n\nSteps follow.\n", key.lines().last().unwrap()));
    ruin.ends(0, "list", &["--key", "kit.txt"]);
    let said = ruin.ends(1, "list", &["--passphrase-file", "kit.txt"]);
    assert!(said.contains("other kind of key"), "{said}");
    let secret = key.lines().last().unwrap().split(' ').nth(1).unwrap();
    assert!(!said.contains(secret));
    // Of what is written at one place nothing is at the other.
    let nothing =
        Ruin { destination: ruin.path("files").display().to_string(), environment: ruin.environment.clone(), keepd: Keepd::prepared() };
    fs::create_dir(nothing.path("tmp")).unwrap();
    let said = nothing.ends(1, "list", &["--key", "main.key"]);
    assert!(said.contains("nothing was backed up to it yet"), "{said}");
}

#[test]
fn places_on_s3_and_in_files_are_read() {
    let mut keepd = Keepd::started();
    let server = Server::started(Kind::S3, keepd.dir.path());
    fill(&keepd);
    let config = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let table = server.destination("offsite", "");
    let config = config.replace("destinations = [\"local\"]", "destinations = [\"local\", \"offsite\"]");
    fs::write(keepd.path("keepd.toml"), format!("{config}{table}")).unwrap();
    keepd.ok(&["reload"]);
    keepd.ok(&["backup", "shop"]);
    let since = std::time::Instant::now();
    while keepd.json(&["list", "--destination", "offsite"]).as_array().unwrap().is_empty() {
        assert!(since.elapsed() < Duration::from_secs(60), "{}", keepd.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    // While the daemon runs and holds the lease.
    let config = keepd.path("saved.toml");
    fs::copy(keepd.path("keepd.toml"), &config).unwrap();
    let mut command = Command::new(keepd_binary());
    command.args(["rescue", "list", "--json", "--name", "local", "--key"]).arg(keepd.path("main.key"));
    let out = command.arg("--destination").arg(&config).output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    keepd.stop();
    let mut ruin = Ruin::left_of(keepd, |_| "s3://bucket/pre".into());
    ruin.environment.extend([
        ("AWS_ENDPOINT_URL".into(), format!("http://127.0.0.1:{}", server.port)),
        ("AWS_ACCESS_KEY_ID".into(), "keeper".into()),
        ("AWS_SECRET_ACCESS_KEY".into(), SECRET.into()),
    ]);
    fs::remove_dir_all(ruin.path("repository")).unwrap();
    let before = files_below(&server.data());
    assert_eq!(ruin.json("list", &[]).as_array().unwrap().len(), 1);
    ruin.ok("restore", &["latest", "--to", "back"]);
    ruin.assert_whole(&ruin.path("back"));
    assert!(ruin.ok("check", &["--read-data=100"]).contains("no damage found"));
    ruin.ok("export", &["latest", "-o", "all.tar"]);
    assert_eq!(files_below(&server.data()), before, "nothing was written to the storage");

    // The same by the old configuration.
    ruin.environment.truncate(1);
    ruin.destination = config.display().to_string();
    let said = ruin.ends(2, "list", &["--key", "main.key"]);
    assert!(said.contains("several destinations") && said.contains("local, offsite"), "{said}");
    ruin.ok("restore", &["latest", "--to", "by-file", "--name", "offsite"]);
    ruin.assert_whole(&ruin.path("by-file"));
    fs::write(ruin.path("one.toml"), table.replace("encryption = \"main\"\n", "")).unwrap();
    ruin.destination = ruin.path("one.toml").display().to_string();
    assert_eq!(ruin.json("list", &[]).as_array().unwrap().len(), 1);
    fs::write(ruin.path("one.toml"), table.replace("bucket = \"bucket\"", "bocket = \"bucket\"")).unwrap();
    let said = ruin.ends(1, "list", &["--key", "main.key"]);
    assert!(said.contains("bocket") && said.contains("did you mean 'bucket'"), "{said}");
    ruin.environment.push(("AWS_ENDPOINT_URL".into(), format!("http://127.0.0.1:{}", server.port)));
    ruin.environment.extend([("AWS_ACCESS_KEY_ID".into(), "keeper".into()), ("AWS_SECRET_ACCESS_KEY".into(), "wrong-canary".into())]);
    ruin.destination = "s3://bucket/pre".into();
    let said = ruin.ends(1, "list", &["--key", "main.key"]);
    assert!(said.contains("credentials") && !said.contains("wrong-canary"), "{said}");
}

#[test]
fn write_only_backups_want_their_private_key() {
    let mut keepd = Keepd::prepared();
    let made = Command::new(keepd_binary()).args(["key", "generate", "--pair"]).arg(keepd.path("read")).output().unwrap();
    assert!(made.status.success(), "{}", text(&made));
    make_database(&keepd.path("shop.db"), 500);
    fs::write(keepd.path("files/note.txt"), "a note").unwrap();
    let config = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), config.replace("key_file = \"main.key\"", "key_file = \"main.key\"\npublic_key = \"read.pub\""))
        .unwrap();
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    keepd.stop();
    let ruin = Ruin::left_of(keepd, |keepd| keepd.path("repository").display().to_string());
    assert!(ruin.ok("ls", &["latest", "files"]).contains("note.txt"), "names open with the profile's key");
    let said = ruin.ends(1, "restore", &["latest", "--to", "closed", "--key", "main.key"]);
    assert!(said.contains("opens with the private key") && !ruin.path("closed/files/note.txt").exists(), "{said}");
    ruin.ok("restore", &["latest", "--to", "back", "--key", "read"]);
    ruin.assert_whole(&ruin.path("back"));
    let said = ruin.ends(1, "list", &["--key", "read"]);
    assert!(said.contains("is encrypted"), "{said}");
}

/// The repositories of tests/kit/writer.py.
#[test]
fn hostile_repositories_reach_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let writer = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kit/writer.py");
    let out = Command::new(python()).arg(writer).arg(dir.path()).output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    let before = files_below(dir.path());
    let mut seen = 0;
    for here in fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()) {
        let name = here.file_name().unwrap().to_str().unwrap().to_owned();
        let to = tempfile::tempdir().unwrap();
        for command in ["restore", "export"] {
            let mut run = Command::new(keepd_binary());
            run.args(["rescue", command, "latest", "--destination"]).arg(here.join("repository")).stdin(Stdio::null());
            if name.starts_with("passphrase") {
                run.arg("--passphrase-file").arg(here.join("passphrase"));
            } else {
                run.arg("--key").arg(here.join("main.key")).arg("--key").arg(here.join("private.key"));
            }
            let target = to.path().join("in/here");
            fs::create_dir_all(target.parent().unwrap()).unwrap();
            match command {
                "restore" => run.arg("--to").arg(&target),
                _ => run.arg("-o").arg(to.path().join("in/tar")),
            };
            let out = run.output().unwrap();
            let code = out.status.code();
            assert!(matches!(code, Some(0 | 1 | 3)) && !text(&out).contains("panicked"), "{name}: {code:?}: {}", text(&out));
            let is_good = ["key-file", "token-and-key-file", "planted-beside", "epochs", "passphrase", "write-only", "write-only-unlisted"];
            if is_good.contains(&name.as_str()) {
                assert_eq!(code, Some(0), "{name}: {}", text(&out));
                if command == "restore" {
                    assert_same(&here.join("expected"), &target);
                }
            } else if !name.starts_with("payload") && name != "twice" {
                // With every chunk in two packs, which of them is read is left to chance.
                assert_ne!(code, Some(0), "{name}: {}", text(&out));
                assert!(!out.stderr.is_empty());
            }
        }
        let outside = fs::read_dir(to.path()).unwrap().chain(fs::read_dir(to.path().join("in")).unwrap());
        for entry in outside.map(|e| e.unwrap().file_name()) {
            assert!(["in", "here", "tar"].contains(&entry.to_str().unwrap()), "{name}: {entry:?} was made outside");
        }
        seen += 1;
    }
    assert!(seen > 40, "{seen}");
    assert_eq!(files_below(dir.path()), before);
    assert!(!Path::new("/tmp/keepd-decoder-outside").exists());
}

#[test]
fn an_interrupt_ends_it_cleanly() {
    let ruin = Ruin::of_local();
    let child = ruin
        .command("restore", &["latest", "--to", "back", "--key", "main.key"])
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let since = std::time::Instant::now();
    while files_below(&ruin.path("tmp")).is_empty() && !ruin.path("back").exists() {
        assert!(since.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(1));
    }
    signal(child.id(), "INT");
    let out = child.wait_with_output().unwrap();
    // It may have been done just before.
    assert!(matches!(out.status.code(), Some(0 | 1)), "{:?}: {}", out.status, text(&out));
    assert!(out.status.success() || text(&out).contains("cancelled"), "{}", text(&out));
    assert!(files_below(&ruin.path("tmp")).is_empty(), "the temporary directory is left behind");
}

/// Twice, while nobody takes what it writes: it goes at once, and its temporary directory with it.
#[test]
fn a_second_hangup_leaves_nothing_behind() {
    use std::os::unix::process::ExitStatusExt;
    let ruin = Ruin::of_local();
    let mut child =
        ruin.command("export", &["latest", "-o", "-", "--key", "main.key"]).stderr(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let since = std::time::Instant::now();
    while files_below(&ruin.path("tmp")).is_empty() {
        assert!(since.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(1));
    }
    // Until it stands before the full pipe.
    std::thread::sleep(Duration::from_millis(1500));
    signal(child.id(), "HUP");
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "it waits for its next safe point");
    signal(child.id(), "HUP");
    assert_eq!(child.wait().unwrap().signal(), Some(1));
    assert_eq!(fs::read_dir(ruin.path("tmp")).unwrap().count(), 0);
}

#[test]
fn nothing_is_written_into_the_destination() {
    let ruin = Ruin::of_local();
    let before = files_below(&ruin.path("repository"));
    std::os::unix::fs::symlink("repository/packs", ruin.path("packs")).unwrap();
    for (command, arguments) in [
        ("restore", ["latest", "--to", "repository/new"]),
        ("restore", ["latest", "--to", "packs/new"]),
        ("export", ["latest", "-o", "packs/backup.tar"]),
        ("ls", ["latest", "--cache", "repository/cache"]),
    ] {
        let said = ruin.ends(2, command, &[&arguments[..], &["--key", "main.key"]].concat());
        assert!(said.contains("lies in the destination"), "{said}");
    }
    assert_eq!(files_below(&ruin.path("repository")), before);
}

#[test]
fn a_key_on_a_stick_is_taken_with_a_warning() {
    let ruin = Ruin::of_local();
    fs::set_permissions(ruin.path("main.key"), fs::Permissions::from_mode(0o644)).unwrap();
    let said = ruin.ends(0, "list", &["--key", "main.key"]);
    assert!(said.contains("warning: main.key can be read or changed by others on this machine (mode 0644)"), "{said}");
    if rustix::process::geteuid().is_root() {
        fs::set_permissions(ruin.path("main.key"), fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::chown(ruin.path("main.key"), Some(12_345), None).unwrap();
        let said = ruin.ends(0, "list", &["--key", "main.key"]);
        assert!(said.contains("warning: main.key belongs to another user (uid 12345)"), "{said}");
    }
}
