//! Format 1 against its document: the second reader, written from docs/format.md, gives back what keepd stored; and
//! repositories of earlier days open forever.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::*;

fn reader(repository: &Path, key: Option<&Path>, arguments: &[&str]) -> String {
    let keys: Vec<&str> = key.into_iter().flat_map(|key| ["--key", key.to_str().unwrap()]).collect();
    reader_with(repository, &keys, arguments)
}

fn reader_with(repository: &Path, keys: &[&str], arguments: &[&str]) -> String {
    let mut command = Command::new(python());
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("kit/keepd_decoder.py")).arg(repository).args(keys);
    let out = command.args(arguments).output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn the_second_reader_restores_byte_for_byte() {
    let keepd = Keepd::started();
    for n in 0..300 {
        fs::write(keepd.path(&format!("files/deep/small-{n}")), noise(n * 37, n as u64 + 1)).unwrap();
    }
    fs::hard_link(keepd.path("files/big"), keepd.path("files/zzz")).unwrap();
    fs::File::create(keepd.path("files/sparse")).unwrap().set_len(9 << 20).unwrap();
    keepd.ok(&["backup", "shop"]);
    let db = rusqlite::Connection::open(keepd.path("shop.db")).unwrap();
    for n in 0..120 {
        db.execute_batch(&format!("UPDATE account SET balance = balance + 1 WHERE id = {}", n * 4)).unwrap();
    }
    db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    keepd.ok(&["backup", "shop"]);
    let (repository, key) = (keepd.path("repository"), keepd.path("main.key"));
    assert_eq!(reader(&repository, Some(&key), &["list"]).lines().count(), 2);
    assert!(reader(&repository, Some(&key), &["verify"]).contains("are whole"));
    let out = keepd.path("by-python");
    reader(&repository, Some(&key), &["restore", "latest", out.to_str().unwrap()]);
    assert_same(&keepd.path("files"), &out.join("files"));
    assert!(fs::read(out.join("db/shop.db")).unwrap() == fs::read(keepd.path("shop.db")).unwrap());
    assert_same(&keepd.restored("latest").join("files"), &out.join("files"));
}

/// How a golden repository's profile has its key: the lines of `[encryption.main]`.
fn key_lines(name: &str) -> &'static str {
    match name {
        "1-passphrase" => "passphrase = { file = \"passphrase\" }",
        "1-write-only" => "key_file = \"main.key\"\npublic_key = \"read.key.pub\"",
        _ => "key_file = \"main.key\"",
    }
}

/// What keys a golden repository has beside its golden.key, and with which modes.
const GOLDEN_KEYS: [(&str, u32); 3] = [("passphrase", 0o600), ("read.key", 0o600), ("read.key.pub", 0o644)];

/// The repositories in tests/golden were made by `make_golden` below with earlier versions; they must open forever.
#[test]
fn golden_repositories_open() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut seen = 0;
    for entry in fs::read_dir(&golden).unwrap().flatten().filter(|e| e.path().is_dir()) {
        let name = entry.file_name().into_string().unwrap();
        let encryption = if name.ends_with("-plain") { "none" } else { "main" };
        let mut keepd = Keepd::prepared();
        let toml = fs::read_to_string(keepd.path("keepd.toml"))
            .unwrap()
            .replace("encryption = \"main\"", &format!("encryption = \"{encryption}\"\nprune_grace = \"1s\""))
            .replace("key_file = \"main.key\"", key_lines(&name));
        fs::write(keepd.path("keepd.toml"), toml).unwrap();
        // Only what git keeps: contents and names; the key must be its owner's alone.
        assert!(
            Command::new("cp").arg("-r").arg(entry.path().join("repository")).arg(keepd.path("repository")).status().unwrap().success()
        );
        fs::copy(entry.path().join("golden.key"), keepd.path("main.key")).unwrap();
        fs::set_permissions(keepd.path("main.key"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        for (file, mode) in GOLDEN_KEYS.into_iter().filter(|(file, _)| entry.path().join(file).exists()) {
            fs::copy(entry.path().join(file), keepd.path(file)).unwrap();
            fs::set_permissions(keepd.path(file), std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        }
        keepd.start();
        let since = std::time::Instant::now();
        while keepd.backups().len() < 2 {
            assert!(since.elapsed() < std::time::Duration::from_secs(10), "{name}: {}", keepd.log());
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        keepd.ok(&["check", "local", "--read-data"]);
        let (private, passphrase) = (keepd.path("read.key"), keepd.path("passphrase"));
        let lent: Vec<&str> = if private.exists() { vec!["--key", private.to_str().unwrap()] } else { Vec::new() };
        let out = keepd.path("restored");
        keepd.ok(&[&["restore", "latest", "--to", out.to_str().unwrap()], &lent[..]].concat());
        let sums =
            Command::new("sha256sum").args(["--check", "--quiet"]).arg(entry.path().join("SHA256SUMS")).current_dir(&out).output().unwrap();
        assert!(sums.status.success(), "{name}: {}", text(&sums));
        assert_eq!(proven_sum(&out.join("db/shop.db")), 50_100, "{name}");
        let (by_python, key) = (keepd.path("by-python"), keepd.path("main.key"));
        let keys = match name.as_str() {
            "1-plain" => Vec::new(),
            "1-passphrase" => vec!["--passphrase-file", passphrase.to_str().unwrap()],
            _ => [&["--key", key.to_str().unwrap()], &lent[..]].concat(),
        };
        reader_with(&keepd.path("repository"), &keys, &["restore", "latest", by_python.to_str().unwrap()]);
        for file in files_below(&out) {
            let twin = by_python.join(file.strip_prefix(&out).unwrap());
            assert!(fs::read(&twin).unwrap() == fs::read(&file).unwrap(), "{name}: {}", twin.display());
        }
        if name.ends_with("-dump") {
            let list = keepd.json(&["list"]);
            assert_eq!(
                (&list[1]["description"], &list[0]["version"], &list[0]["schema_version"]),
                (&"golden".into(), &"1.2".into(), &"499".into())
            );
        }
        if name.ends_with("-copy") {
            // They go by the ids of what they are copies of.
            let objects = files_below(&keepd.path("repository/backups"));
            assert!(keepd.backups().iter().all(|id| !objects.iter().any(|o| o.ends_with(id))));
        }
        if name.ends_with("-marks") {
            let list = keepd.json(&["list"]);
            assert_eq!((list[0]["pinned"].as_bool(), list[1]["pinned"].as_bool()), (Some(false), Some(true)), "{list}");
            // Condemned long ago: its time is over.
            let told = keepd.ok(&["prune", "local", "--dry-run"]);
            let line = told.lines().find(|l| l.contains("packs would be deleted")).unwrap();
            assert!(line.split(' ').next().unwrap().parse::<u64>().unwrap() > 0, "{told}");
        }
        if name.ends_with("-epochs") {
            // Sealed anew twice; they go by the ids that their first manifests had.
            let objects = files_below(&keepd.path("repository/backups"));
            assert!(keepd.backups().iter().all(|id| !objects.iter().any(|o| o.ends_with(id))));
            assert!(objects.iter().all(|o| fs::read(o).unwrap()[10..12] == [2, 0]));
        }
        if name.ends_with("-write-only") {
            let told = keepd.fails(1, &["restore", "latest", "--to", keepd.path("without").to_str().unwrap()]);
            assert!(told.contains("private key"), "{told}");
            assert!(files_below(&keepd.path("repository/packs")).iter().any(|p| fs::read(p).unwrap()[9] == 1));
        }
        if name.ends_with("-drill") {
            let list = keepd.json(&["list"]);
            assert_eq!((list[0]["outcome"].as_str(), list[1]["outcome"].as_str()), (Some("good"), Some("suspect")), "{list}");
            assert!(list[1]["proven"].is_null());
            let shown = |n: usize| -> serde_json::Value {
                serde_json::from_slice(&keepd.ctl(&["show", list[n]["id"].as_str().unwrap(), "--json"]).stdout).unwrap()
            };
            assert!(list[0]["proven"].is_string() && shown(0)["proven_seconds"].as_u64() >= Some(1), "{list}");
            assert!(shown(1)["suspect"][0].as_str().unwrap().contains("files/new should be there"));
        }
        seen += 1;
    }
    assert!(seen >= 10, "{seen} golden repositories");
}

/// Makes new golden repositories: `GOLDEN=DIR cargo test --test format make_golden -- --ignored` (`GOLDEN_ONLY=NAME`: only that one).
#[test]
#[ignore = "writes fixtures"]
fn make_golden() {
    let target = std::env::var("GOLDEN").expect("GOLDEN names the directory");
    let all = [
        ("1-zstd", "main", "zstd"),
        ("1-gzip", "main", "gzip"),
        ("1-plain", "none", "none"),
        ("1-marks", "main", "zstd"),
        ("1-copy", "main", "zstd"),
        ("1-dump", "main", "zstd"),
        ("1-drill", "main", "zstd"),
        ("1-epochs", "main", "zstd"),
        ("1-write-only", "main", "zstd"),
        ("1-passphrase", "main", "zstd"),
    ];
    let only = std::env::var("GOLDEN_ONLY").ok();
    for (name, encryption, compression) in all.into_iter().filter(|(name, _, _)| only.as_ref().is_none_or(|o| o == name)) {
        let mut keepd = Keepd::prepared();
        let toml = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
        let settings = format!("encryption = \"{encryption}\"\ncompression = \"{compression}\"");
        let mut toml = toml.replace("encryption = \"main\"", &settings).replace("key_file = \"main.key\"", key_lines(name));
        if name == "1-write-only" {
            let made = Command::new(keepd_binary()).args(["key", "generate", "--pair"]).arg(keepd.path("read.key")).status().unwrap();
            assert!(made.success());
        }
        if name == "1-passphrase" {
            fs::write(keepd.path("passphrase"), "correct horse battery staple\n").unwrap();
        }
        if name == "1-copy" {
            let copied = keepd.path("copied");
            toml = toml.replace("destinations = [\"local\"]", "destinations = [\"local\", \"copied\"]");
            toml.push_str(&format!("[destination.copied]\nservice = \"fs\"\nroot = \"{}\"\n{settings}\n", copied.display()));
        }
        let rows =
            |changed: u32| (0..3000u32).map(|n| format!("{n}\t{}\n", if n == changed { 0 } else { n * 7919 % 10_007 })).collect::<String>();
        if name == "1-dump" {
            fs::write(keepd.path("rows.txt"), rows(u32::MAX)).unwrap();
            let source = format!(
                "[[job.shop.source]]\nname = \"dump\"\ncommand = [\"/bin/cat\", \"{}\"]\nfile = \"rows.txt\"\n",
                keepd.path("rows.txt").display()
            );
            let versions = "version = [\"/bin/echo\", \"1.2\"]\nschema_version = { sql = \"select max(id) from account\" }\n";
            toml = toml.replace("[job.shop]\n", &format!("[job.shop]\n{versions}")) + &source;
        }
        if name == "1-drill" {
            toml = toml.replace("[job.shop]\n", "[job.shop]\nassert = [{ file = \"files/new\" }]\n");
        }
        fs::write(keepd.path("keepd.toml"), toml).unwrap();
        let db = make_database(&keepd.path("shop.db"), 500);
        fs::create_dir_all(keepd.path("files/deep")).unwrap();
        fs::write(keepd.path("files/deep/note.txt"), "a note").unwrap();
        fs::write(keepd.path("files/larger"), noise(200_000, 5)).unwrap();
        fs::File::create(keepd.path("files/sparse")).unwrap().set_len(300_000).unwrap();
        fs::hard_link(keepd.path("files/larger"), keepd.path("files/zzz")).unwrap();
        std::os::unix::fs::symlink("deep/note.txt", keepd.path("files/link")).unwrap();
        keepd.start();
        keepd.ok(&["backup", "shop", "--description", "golden"]);
        if name == "1-dump" {
            fs::write(keepd.path("rows.txt"), rows(1500)).unwrap();
        }
        db.execute_batch("UPDATE account SET balance = 200 WHERE id = 7").unwrap();
        fs::write(keepd.path("files/new"), "new").unwrap();
        keepd.ok(&["backup", "shop"]);
        if name == "1-marks" {
            keepd.ok(&["pin", &keepd.backups()[1]]);
            fs::write(keepd.path("files/dead"), noise(9000, 9)).unwrap();
            keepd.ok(&["backup", "shop"]);
            keepd.ok(&["delete", "latest", "--yes"]);
            keepd.ok(&["prune", "local"]);
        }
        if name == "1-drill" {
            keepd.ok(&["drill"]);
            keepd.fails(1, &["drill", &keepd.backups()[1]]);
        }
        if name == "1-epochs" {
            keepd.ok(&["key", "re-encrypt", "local", "--yes"]);
            keepd.ok(&["key", "re-encrypt", "local", "--yes"]);
        }
        let out = keepd.restored("latest");
        keepd.stop();
        let to = Path::new(&target).join(name);
        fs::create_dir_all(&to).unwrap();
        // It names the machine it was made on.
        let repository = keepd.path(if name == "1-copy" { "copied" } else { "repository" });
        fs::remove_file(repository.join("writer.json")).unwrap();
        assert!(Command::new("cp").arg("-r").arg(&repository).arg(to.join("repository")).status().unwrap().success());
        fs::copy(keepd.path("main.key"), to.join("golden.key")).unwrap();
        for (file, _) in GOLDEN_KEYS.into_iter().filter(|(file, _)| keepd.path(file).exists()) {
            fs::copy(keepd.path(file), to.join(file)).unwrap();
        }
        let sums = Command::new("sh")
            .args(["-c", "find . -type f ! -name shop.db -exec sha256sum {} + | sort -k2"])
            .current_dir(&out)
            .output()
            .unwrap();
        fs::write(to.join("SHA256SUMS"), sums.stdout).unwrap();
    }
}
