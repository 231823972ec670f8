//! keepctl export: a backup as one file that every tar reads.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::*;
use sha2::{Digest, Sha256};

fn sha256(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(&Sha256::digest(bytes))
}

/// A backup of a database and of files of every kind.
fn filled() -> Keepd {
    let keepd = Keepd::started();
    fill(&keepd);
    keepd.ok(&["backup", "shop", "--name", "one", "--label", "is=it"]);
    keepd
}

/// Extracts it with the system's tar.
fn untar(keepd: &Keepd, archive: &Path) -> PathBuf {
    let to = keepd.path(&format!("out-{}", archive.file_name().unwrap().to_string_lossy()));
    fs::create_dir(&to).unwrap();
    let out = Command::new("tar").arg("-xpf").arg(archive).arg("-C").arg(&to).output().unwrap();
    assert!(out.status.success() && out.stderr.is_empty(), "{}", text(&out));
    to
}

fn assert_whole(keepd: &Keepd, to: &Path) {
    assert_same(&keepd.path("files"), &to.join("files"));
    assert_eq!(proven_sum(&to.join("db/shop.db")), 50_000);
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(to.join("manifest.json")).unwrap()).unwrap();
    assert_eq!((&manifest["format"], &manifest["origin"]["job"], &manifest["origin"]["name"]), (&1.into(), &"shop".into(), &"one".into()));
    assert_eq!(manifest["origin"]["labels"]["is"], "it");
    let listed = manifest["files"].as_array().unwrap();
    for line in listed {
        let bytes = fs::read(to.join(line["path"].as_str().unwrap())).unwrap();
        assert_eq!((line["size"].as_u64(), line["sha256"].as_str()), (Some(bytes.len() as u64), Some(sha256(&bytes).as_str())), "{line}");
    }
    assert_eq!(manifest["totals"]["files"].as_u64().unwrap(), listed.len() as u64);
    // All that came out but the manifest itself, and the second name of one file.
    assert_eq!(files_below(to).iter().filter(|p| p.symlink_metadata().unwrap().is_file()).count(), listed.len() + 2);
}

#[test]
fn every_tar_reads_what_was_exported() {
    let keepd = filled();
    for name in ["shop.tar", "shop.tar.gz", "shop.tar.zst"] {
        let said = keepd.ok(&["export", "latest", "-o", keepd.path(name).to_str().unwrap()]);
        assert!(said.contains(name), "{said}");
        assert_eq!(keepd.path(name).metadata().unwrap().mode() & 0o777, 0o600);
        let first = Command::new("tar").arg("-tf").arg(keepd.path(name)).output().unwrap();
        assert!(String::from_utf8_lossy(&first.stdout).starts_with("manifest.json\n"));
        let to = untar(&keepd, &keepd.path(name));
        assert_whole(&keepd, &to);
        assert_eq!(fs::metadata(to.join("files/zzz")).unwrap().nlink(), 2);
        // Nothing is left beside it, and it is not written over.
        assert!(keepd.fails(1, &["export", "latest", "-o", keepd.path(name).to_str().unwrap()]).contains("not overwritten"));
        let beside = fs::read_dir(keepd.dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        assert!(beside.filter(|n| n.starts_with('.')).count() == 0);
    }
    let runs = keepd.json(&["run", "list"]);
    assert_eq!((&runs[0]["kind"], &runs[0]["state"]), (&"export".into(), &"good".into()));
}

#[test]
fn files_with_the_same_contents_come_whole_wherever_they_stand() {
    let keepd = Keepd::started();
    fill(&keepd);
    let contents =
        |n: u8| (0..40_000u32).flat_map(|i| (i * u32::from(n + 1)).to_le_bytes()).take(1000 + usize::from(n) * 1500).collect::<Vec<_>>();
    for (directory, numbers) in [("same-a", 0..60), ("same-b", 20..80), ("same-c", 0..80)] {
        fs::create_dir(keepd.path(&format!("files/{directory}"))).unwrap();
        for n in numbers {
            fs::write(keepd.path(&format!("files/{directory}/{n}")), contents(n)).unwrap();
        }
    }
    keepd.ok(&["backup", "shop"]);
    for name in ["same.tar", "same.tar.zst"] {
        keepd.ok(&["export", "latest", "-o", keepd.path(name).to_str().unwrap()]);
        assert_same(&keepd.path("files"), &untar(&keepd, &keepd.path(name)).join("files"));
    }
    keepd.ok(&["export", "latest", "-o", keepd.path("some.tar").to_str().unwrap(), "files/same-b/20", "files/same-c"]);
    assert_same(&keepd.path("files/same-c"), &untar(&keepd, &keepd.path("some.tar")).join("files/same-c"));
}

#[test]
fn a_pipe_takes_it_and_some_of_it() {
    let keepd = filled();
    let to = keepd.path("piped");
    fs::create_dir(&to).unwrap();
    let mut tar = Command::new("tar").args(["--zstd", "-xpf", "-", "-C"]).arg(&to).stdin(Stdio::piped()).spawn().unwrap();
    let export =
        keepd.ctl_command(&["export", "latest", "-o", "-", "--compression", "zstd"]).stdout(tar.stdin.take().unwrap()).status().unwrap();
    assert!(export.success() && tar.wait().unwrap().success());
    assert_whole(&keepd, &to);

    keepd.ok(&["export", "latest", "-o", keepd.path("some.tar").to_str().unwrap(), "files/deep", "files/zzz"]);
    let to = untar(&keepd, &keepd.path("some.tar"));
    assert_same(&keepd.path("files/deep"), &to.join("files/deep"));
    assert_eq!(fs::read(to.join("files/zzz")).unwrap(), fs::read(keepd.path("files/big")).unwrap());
    assert!(!to.join("db").exists() && !to.join("files/long").exists());
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(to.join("manifest.json")).unwrap()).unwrap();
    assert_eq!((&manifest["selected"], manifest["sources"].as_array().unwrap().len()), (&true.into(), 1));

    // Whoever goes away, goes away: no run that hangs, and no success.
    let gone = keepd.ctl_command(&["export", "latest", "-o", "-"]).stdout(Stdio::piped()).spawn().map(|mut child| {
        drop(child.stdout.take());
        child.wait().unwrap()
    });
    assert_eq!(gone.unwrap().code(), Some(1));
    assert!(keepd.fails(1, &["export", "latest", "-o", keepd.path("x.tar").to_str().unwrap(), "nothing"]).contains("it has db, files"));
    assert!(
        keepd.fails(1, &["export", "latest", "-o", keepd.path("x.tar").to_str().unwrap(), "files/nothing"]).contains("not in the backup")
    );
    assert!(keepd.fails(1, &["export", "latest", "-o", keepd.path("no/x.tar").to_str().unwrap()]).contains("cannot make"));
    assert!(!keepd.path("x.tar").exists());
    assert!(keepd.fails(2, &["export", "latest", "-o", "-", "--json"]).contains("standard output"));
}

#[test]
fn sealed_for_a_profile_or_with_a_key_of_its_own() {
    let keepd = filled();
    let archive = |name: &str| keepd.path(name).to_str().unwrap().to_owned();
    let said = keepd.ok(&["export", "latest", "-o", &archive("a.tar.zst.enc")]);
    assert!(said.contains("a.tar.zst.enc.key"), "{said}");
    let key = keepd.path("a.tar.zst.enc.key");
    assert_eq!(key.metadata().unwrap().mode() & 0o777, 0o600);
    assert!(fs::read_to_string(&key).unwrap().contains("keepd-key-1 "));
    keepd.ok(&["export", "latest", "-o", &archive("b.tar.enc"), "--encryption", "main"]);
    assert!(!keepd.path("b.tar.enc.key").exists());
    for (name, key) in [("a.tar.zst.enc", key), ("b.tar.enc", keepd.path("main.key"))] {
        let sealed = fs::read(keepd.path(name)).unwrap();
        assert!(sealed.starts_with(b"KEEPDENC\x01"));
        assert!(!sealed.windows(9).any(|w| w == b"line afte" || w == b"manifest."), "nothing of it is readable");
        let opened = keepd.path(&format!("{name}.opened"));
        let script = python_script();
        let out = Command::new(python())
            .arg("-c")
            .arg(&script)
            .arg(&key)
            .stdin(fs::File::open(keepd.path(name)).unwrap())
            .stdout(fs::File::create(&opened).unwrap())
            .output();
        assert!(out.as_ref().unwrap().status.success(), "{}", text(&out.unwrap()));
        assert_whole(&keepd, &untar(&keepd, &opened));
    }
    assert!(keepd.fails(1, &["export", "latest", "-o", &archive("c.tar.enc"), "--encryption", "nobody"]).contains("configured are: main"));
    assert!(keepd.fails(2, &["export", "latest", "-o", &archive("c.tar.enc"), "--encryption", "none"]).contains("sealed by its name"));
    assert!(keepd.fails(2, &["export", "latest", "-o", &archive("c.tar"), "--encryption", "main"]).contains("c.tar.enc"));
    fs::write(keepd.path("d.tar.enc.key"), "precious").unwrap();
    assert!(keepd.fails(1, &["export", "latest", "-o", &archive("d.tar.enc")]).contains("not overwritten"));
    assert_eq!(fs::read(keepd.path("d.tar.enc.key")).unwrap(), b"precious");
    assert!(!keepd.path("c.tar.enc").exists() && !keepd.path("d.tar.enc").exists());
}

/// The script of the document.
fn python_script() -> String {
    let document = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/archive.md")).unwrap();
    let script = document.split("```python\n").nth(1).expect("the document has a script").split("```").next().unwrap().to_owned();
    assert!(script.lines().count() <= 60, "{} lines", script.lines().count());
    script
}

#[test]
fn what_is_damaged_is_no_archive() {
    let keepd = filled();
    let pack = keepd.packs().into_iter().max_by_key(|p| p.metadata().unwrap().len()).unwrap();
    let mut bytes = fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::set_permissions(&pack, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&pack, bytes).unwrap();
    let said = keepd.fails(1, &["export", "latest", "-o", keepd.path("x.tar.gz").to_str().unwrap()]);
    assert!(said.contains("packs/"), "{said}");
    assert!(!keepd.path("x.tar.gz").exists());
}
