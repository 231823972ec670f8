//! Portable archives in the hands of others: tar, gzip, zstd, Python, the decoder of the recovery kit, and the program that docs/archive.md has in it.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, Read, Write};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Instant;

use common::python;
use data_encoding::{BASE64, HEXLOWER};
use keepd::crypto::{Profile, ProfileKey, key_file};
use keepd::portable::head::{Contents, Origin, Source, Totals};
use keepd::portable::read::OpenWith;
use keepd::portable::write::Options;
use keepd::portable::{ArchiveReader, ArchiveWriter, FileLine, FileListWriter, Head, Limits, Made, Packing, PortableError, Tail};
use keepd::repository::entry::path_order;
use keepd_protocol::model::{BytesPath, EntryKind};
use keepd_protocol::restore::EntryHeader;
use proptest::prelude::*;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

const PACKINGS: [Packing; 3] = [Packing::None, Packing::Gzip, Packing::Zstd];

type Item = (EntryHeader, Vec<u8>);

fn entry(path: &[u8], kind: EntryKind, contents: &[u8]) -> Item {
    let header = EntryHeader {
        path: BytesPath::from_bytes(path),
        kind,
        mode: if kind == EntryKind::Directory { 0o755 } else { 0o640 },
        uid: 1000,
        gid: 100,
        user: Some("alice".into()),
        group: Some("users".into()),
        mtime_seconds: 1_700_000_000,
        mtime_nanoseconds: 250_000_000,
        size: if kind == EntryKind::File { contents.len() as u64 } else { 0 },
        ..EntryHeader::default()
    };
    (header, contents.to_vec())
}

fn file(path: &str, contents: &[u8]) -> Item {
    entry(path.as_bytes(), EntryKind::File, contents)
}

fn directory(path: &str) -> Item {
    entry(path.as_bytes(), EntryKind::Directory, b"")
}

fn link(path: &str, kind: EntryKind, target: &[u8]) -> Item {
    let (header, none) = entry(path.as_bytes(), kind, b"");
    (EntryHeader { target: Some(BytesPath::from_bytes(target)), ..header }, none)
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    common::noise(len, seed)
}

fn items() -> Vec<Item> {
    let (odd, _) = file("files/dir/odd", b"");
    let odd = EntryHeader { uid: 3_000_000, gid: 4_000_000_000, mode: 0o4755, mtime_seconds: -12, mtime_nanoseconds: 750_000_000, ..odd };
    let attributes =
        EntryHeader { xattrs: vec![("user.a=b%".into(), BASE64.encode(b"\0\xffvalue\n"))], ..file("files/attributes", b"x").0 };
    vec![
        directory("db"),
        file("db/shop.db", &noise(3 << 20, 1)),
        directory("files"),
        file("files/a", b"a"),
        (attributes, b"x".to_vec()),
        link("files/b", EntryKind::Hardlink, b"files/a"),
        directory("files/dir"),
        (odd, Vec::new()),
        file("files/dir/\u{e4}\u{1f600}", &noise(512, 2)),
        entry(b"files/dir/\xff name", EntryKind::File, b"four"),
        link("files/link", EntryKind::Symlink, b"../somewhere/\xfe"),
        directory(&format!("files/long-{}", "x".repeat(200))),
        file(&format!("files/long-{}/y", "x".repeat(200)), &noise(511, 3)),
    ]
}

fn name(header: &EntryHeader) -> Vec<u8> {
    header.path.to_bytes().unwrap()
}

fn sources(items: &[Item]) -> Vec<Source> {
    let mut sources: Vec<(Source, Totals)> = Vec::new();
    for (header, _) in items {
        let source = String::from_utf8(name(header).split(|b| *b == b'/').next().unwrap().to_vec()).unwrap();
        if sources.last().is_none_or(|(s, _)| s.name != source) {
            sources.push((Source { name: source, kind: "files".into(), place: "/srv".into(), ..Source::default() }, Totals::default()));
        }
        sources.last_mut().unwrap().1.count(header);
    }
    let counted = |(s, t): (Source, Totals)| Source { entries: t.entries, files: t.files, directories: t.directories, bytes: t.bytes, ..s };
    sources.into_iter().map(counted).collect()
}

fn totals(items: &[Item]) -> Totals {
    let mut totals = Totals::default();
    items.iter().for_each(|(header, _)| totals.count(header));
    totals
}

fn head(items: &[Item], contents: Contents) -> Head {
    Head {
        format: 1,
        archive: "00112233445566778899aabbccddeeff".into(),
        created: "2026-03-04T05:06:07Z".into(),
        keepd_version: "0.1.0".into(),
        contents,
        origin: Origin {
            backup: "ab".repeat(32),
            job: "shop".into(),
            started: "2026-03-04T05:00:00Z".into(),
            finished: "2026-03-04T05:00:01Z".into(),
            r#type: "manual".into(),
            outcome: "good".into(),
            ..Origin::default()
        },
        sources: sources(items),
        totals: (contents == Contents::First).then(|| totals(items)),
        ..Head::default()
    }
}

fn write_to<W: Write + Send + 'static>(out: W, items: &[Item], contents: Contents, packing: Packing, seal: Option<&Profile>) -> (W, Made) {
    let dir = tempfile::tempdir().unwrap();
    let files = (contents == Contents::First).then(|| {
        let mut writer = FileListWriter::create(dir.path()).unwrap();
        for (header, contents) in items.iter().filter(|(h, _)| h.kind == EntryKind::File) {
            let sha256 = HEXLOWER.encode(&Sha256::digest(contents));
            writer.push(&FileLine { path: header.path.clone(), size: header.size, sha256 }).unwrap();
        }
        writer.finish().unwrap()
    });
    let tail = (contents == Contents::Last).then(|| Tail {
        archive: "00112233445566778899aabbccddeeff".into(),
        finished: "2026-03-04T05:00:02Z".into(),
        outcome: "good".into(),
        sources: sources(items),
        totals: totals(items),
        ..Tail::default()
    });
    let options = Options { packing, seal, work_dir: dir.path(), cancel: CancellationToken::new() };
    let mut writer = ArchiveWriter::create(out, &options, &head(items, contents), files).unwrap();
    for (header, contents) in items {
        writer.entry(header).unwrap();
        if header.kind == EntryKind::File {
            writer.contents(contents).unwrap();
        }
    }
    writer.finish(tail.as_ref()).unwrap()
}

fn written(items: &[Item], contents: Contents, packing: Packing, seal: Option<&Profile>) -> Vec<u8> {
    write_to(Vec::new(), items, contents, packing, seal).0
}

fn read(archive: Vec<u8>, keys: &[ProfileKey], foreign: Option<&str>) -> Result<(Vec<Item>, Totals), PortableError> {
    let dir = tempfile::tempdir().unwrap();
    let with = OpenWith {
        keys,
        private_keys: &[],
        limits: Limits::default(),
        work_dir: dir.path(),
        cancel: CancellationToken::new(),
        foreign_source: foreign.map(str::to_owned),
    };
    let mut reader = ArchiveReader::open(Cursor::new(archive), &with)?;
    let mut items = Vec::new();
    while let Some(header) = reader.next_entry()? {
        let mut contents = Vec::new();
        let mut buffer = vec![0; 100_000];
        loop {
            let n = reader.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            contents.extend_from_slice(&buffer[..n]);
        }
        items.push((header, contents));
    }
    reader.finish().map(|(totals, _)| (items, totals))
}

fn run(command: &mut Command) -> Output {
    let out = command.stdin(Stdio::null()).output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    out
}

/// What lies in a directory: kind, mode, time, owner, and contents or target, by path.
fn tree(root: &Path) -> BTreeMap<Vec<u8>, (u32, i64, i64, Vec<u8>)> {
    use std::os::unix::ffi::OsStrExt;
    let mut found = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let contents = match meta.file_type() {
                t if t.is_symlink() => fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec(),
                t if t.is_dir() => {
                    left.push(path.clone());
                    Vec::new()
                }
                _ => fs::read(&path).unwrap(),
            };
            found.insert(
                path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec(),
                (meta.mode(), meta.mtime(), meta.mtime_nsec(), contents),
            );
        }
    }
    found
}

/// As [`tree`] should find it. Links have whatever mode the system gives them.
fn expected(items: &[Item]) -> BTreeMap<Vec<u8>, (u32, i64, i64, Vec<u8>)> {
    let mut all: BTreeMap<Vec<u8>, (u32, i64, i64, Vec<u8>)> = BTreeMap::new();
    for (header, contents) in items {
        let target = header.target.as_ref().map(|t| t.to_bytes().unwrap()).unwrap_or_default();
        let found = match header.kind {
            EntryKind::Hardlink => all[&target].clone(),
            EntryKind::Symlink => (0o120777, header.mtime_seconds, header.mtime_nanoseconds.into(), target),
            EntryKind::Directory => (0o40000 | header.mode, header.mtime_seconds, header.mtime_nanoseconds.into(), Vec::new()),
            EntryKind::File => (0o100000 | header.mode, header.mtime_seconds, header.mtime_nanoseconds.into(), contents.clone()),
        };
        all.insert(name(header), found);
    }
    all
}

#[track_caller]
fn same_tree(root: &Path, items: &[Item]) {
    let found = tree(root);
    let expected = expected(items);
    let names = |tree: &BTreeMap<Vec<u8>, _>| tree.keys().map(|k| String::from_utf8_lossy(k).into_owned()).collect::<Vec<_>>();
    assert_eq!(names(&found), names(&expected));
    for (path, wanted) in &expected {
        assert!(found[path] == *wanted, "{}: {:?} {:?}", String::from_utf8_lossy(path), &found[path].0, &wanted.0);
    }
}

#[test]
fn every_tar_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let items = items();
    for (contents, packing) in [Contents::First, Contents::Last].into_iter().flat_map(|c| PACKINGS.map(|p| (c, p))) {
        let path = dir.path().join(format!("shop{}", packing.suffix()));
        let archive = written(&items, contents, packing, None);
        fs::write(&path, &archive).unwrap();
        match packing {
            Packing::None => {}
            Packing::Gzip => drop(run(Command::new("gzip").arg("-t").arg(&path))),
            Packing::Zstd => drop(run(Command::new("zstd").args(["-q", "-t"]).arg(&path))),
        }
        let target = tempfile::tempdir().unwrap();
        run(Command::new("tar")
            .args(["-x", "-p", "--xattrs", "--xattrs-include=user.*", "--same-owner", "-f"])
            .arg(&path)
            .arg("-C")
            .arg(target.path()));
        fs::remove_file(target.path().join("manifest.json")).unwrap();
        if contents == Contents::Last {
            fs::remove_file(target.path().join("contents.json")).unwrap();
        }
        same_tree(target.path(), &items);
        let meta = fs::metadata(target.path().join("files/dir/odd")).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (3_000_000, 4_000_000_000));
        assert_eq!(fs::metadata(target.path().join("files/b")).unwrap().ino(), fs::metadata(target.path().join("files/a")).unwrap().ino());
    }
    let script = "import sys, tarfile\nfor m in tarfile.open(sys.argv[1], encoding='utf-8'):\n  print(m.type.decode(), oct(m.mode), m.uid, m.gid, m.uname, m.mtime, \
                  m.size, ascii(m.name), ascii(m.linkname), ascii(sorted(k for k in m.pax_headers if 'xattr' in k)))";
    let listed = run(Command::new(python()).args(["-c", script]).arg(dir.path().join("shop.tar.gz")));
    let listed = String::from_utf8(listed.stdout).unwrap();
    for line in [
        "0 0o640 1000 100 alice 1700000000.25 3145728 'db/shop.db' '' []",
        "0 0o4755 3000000 4000000000 alice -11.25 0 'files/dir/odd' '' []",
        "1 0o640 1000 100 alice 1700000000.25 0 'files/b' 'files/a' []",
        r"2 0o640 1000 100 alice 1700000000.25 0 'files/link' '../somewhere/\udcfe' []",
        r"0 0o640 1000 100 alice 1700000000.25 4 'files/dir/\udcff name' '' []",
        "0 0o640 1000 100 alice 1700000000.25 1 'files/attributes' '' ['SCHILY.xattr.user.a%3Db%25']",
    ] {
        assert!(listed.lines().any(|l| l == line), "{line}\n{listed}");
    }
}

#[test]
fn what_tar_makes_comes_in() {
    let dir = tempfile::tempdir().unwrap();
    let site = dir.path().join("site");
    fs::create_dir_all(site.join("deep").join("d".repeat(150))).unwrap();
    fs::write(site.join("a"), noise(100_000, 4)).unwrap();
    fs::write(site.join("deep").join("d".repeat(150)).join("f".repeat(150)), b"long").unwrap();
    fs::hard_link(site.join("a"), site.join("b")).unwrap();
    symlink("../x".repeat(60), site.join("link")).unwrap();
    for format in ["gnu", "posix", "ustar", "v7", "oldgnu"] {
        let archive = dir.path().join(format!("{format}.tar"));
        let mut command = Command::new("tar");
        command.arg("-c").arg(format!("--format={format}")).arg("-f").arg(&archive).arg("-C").arg(&site);
        if ["ustar", "v7"].contains(&format) {
            command.args(["a", "b"]);
        } else {
            command.arg(".");
        }
        run(&mut command);
        let (items, _) = read(fs::read(&archive).unwrap(), &[], Some("site")).unwrap();
        let by_name: BTreeMap<Vec<u8>, &Item> = items.iter().map(|item| (name(&item.0), item)).collect();
        let files: Vec<&Item> = ["site/a", "site/b"].iter().map(|n| by_name[n.as_bytes()]).collect();
        let (whole, linked) = if files[0].0.kind == EntryKind::File { (files[0], files[1]) } else { (files[1], files[0]) };
        assert_eq!(whole.1, noise(100_000, 4), "{format}");
        assert_eq!((linked.0.kind, &linked.0.target), (EntryKind::Hardlink, &Some(whole.0.path.clone())), "{format}");
        if !["ustar", "v7"].contains(&format) {
            assert_eq!(by_name[format!("site/deep/{}/{}", "d".repeat(150), "f".repeat(150)).as_bytes()].1, b"long");
            assert_eq!(by_name[&b"site/link"[..]].0.target, Some(BytesPath::from("../x".repeat(60).as_str())));
            assert_eq!(by_name[&b"site"[..]].0.kind, EntryKind::Directory);
        }
    }
    for packer in ["gzip", "zstd"] {
        let archive = dir.path().join(packer);
        run(Command::new("tar").arg(format!("--{packer}")).arg("-cf").arg(&archive).arg("-C").arg(&site).arg("."));
        assert!(read(fs::read(&archive).unwrap(), &[], Some("site")).unwrap().0.len() >= 6);
    }
    let holes = site.join("holes");
    fs::File::create(&holes).unwrap().set_len(10 << 20).unwrap();
    for format in ["gnu", "posix"] {
        let archive = dir.path().join("sparse.tar");
        run(Command::new("tar")
            .args(["-c", "--sparse"])
            .arg(format!("--format={format}"))
            .arg("-f")
            .arg(&archive)
            .arg("-C")
            .arg(&site)
            .arg("."));
        let error = read(fs::read(&archive).unwrap(), &[], Some("site")).unwrap_err().to_string();
        assert!(error.contains("make the archive again without --sparse"), "{error}");
    }
}

/// A profile of a new key file.
fn key_in(path: &Path) -> Profile {
    key_file::generate(path).unwrap();
    Profile::of("main", ProfileKey::Key(Arc::new(key_file::load(path).unwrap())))
}

#[test]
fn the_program_in_the_document_opens_it() {
    let document = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/archive.md")).unwrap();
    let program = document.split("```python\n").nth(1).unwrap().split("```").next().unwrap();
    assert!(program.lines().count() <= 60);
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("shop.key");
    let profile = key_in(&key);
    fs::write(dir.path().join("open_archive.py"), program).unwrap();
    let open = |archive: &[u8], key: &Path| {
        fs::write(dir.path().join("archive"), archive).unwrap();
        let input = fs::File::open(dir.path().join("archive")).unwrap();
        Command::new(python()).arg(dir.path().join("open_archive.py")).arg(key).stdin(input).output().unwrap()
    };
    let items = items();
    let sealed = written(&items, Contents::First, Packing::Gzip, Some(&profile));
    let out = open(&sealed, &key);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(out.stdout, written(&items, Contents::First, Packing::Gzip, None));
    let slots = u32::from_le_bytes(sealed[12..16].try_into().unwrap()) as usize;
    let boundary = 64 + slots + (1 << 20) + 16;
    for cut in [0, 63, 64 + slots - 1, 64 + slots, 64 + slots + 5, boundary, boundary + 5, sealed.len() - 1] {
        assert!(!open(&sealed[..cut], &key).status.success(), "cut at {cut}");
    }
    for at in [0, 8, 20, 40, 70, boundary - 1, sealed.len() - 20] {
        let mut changed = sealed.clone();
        changed[at] ^= 1;
        assert!(!open(&changed, &key).status.success(), "changed at {at}");
    }
    let other = dir.path().join("other.key");
    key_in(&other);
    let out = open(&sealed, &other);
    assert!(String::from_utf8_lossy(&out.stderr).contains("it is sealed for") && !out.status.success());
}

/// The decoder with the Python packages, with the system's libraries alone, and with the program zstd alone.
fn decoder(way: usize, dir: &Path, arguments: &[&str]) -> (bool, Vec<u8>, String) {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("kit/keepd_decoder.py");
    let mut command = match way {
        0 => Command::new(python()),
        _ => {
            let mut command = Command::new(fs::canonicalize(python()).unwrap());
            command.args(["-I", "-S"]);
            command
        }
    };
    command.arg(program);
    match way {
        1 => drop(command.args(["--avoid", "compression.zstd"])),
        2 => drop(command.args(["--avoid", "libcrypto,libzstd,compression.zstd"])),
        _ => {}
    }
    let out = command.args(arguments).current_dir(dir).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(!said.contains("Traceback") && !said.contains("not as this decoder expects"), "{said}");
    (out.status.success(), out.stdout, said)
}

#[test]
fn the_decoder_opens_it_in_every_way() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let items = items();
    let profile = key_in(&at("main.key"));
    let (_, public) = key_file::generate_pair(&at("private.key")).unwrap();
    let offline = Profile { recipient: Some(key_file::load_public(&public).unwrap()), ..profile.clone() };
    let words = Profile::of("words", ProfileKey::Passphrase(Arc::new("correct horse".to_owned().into())));
    fs::write(at("words"), "correct horse\n").unwrap();
    let sealed: [(&str, Option<&Profile>, &[&str]); 4] = [
        ("plain", None, &[]),
        ("key", Some(&profile), &["--key", "main.key"]),
        ("pair", Some(&offline), &["--key", "private.key"]),
        ("words", Some(&words), &["--passphrase-file", "words"]),
    ];
    for (n, (how, seal, key)) in sealed.iter().enumerate() {
        for (m, packing) in PACKINGS.iter().enumerate() {
            let contents = if (n + m) % 2 == 0 { Contents::First } else { Contents::Last };
            let archive = at(&format!("{how}{}", packing.suffix()));
            fs::write(&archive, written(&items, contents, *packing, *seal)).unwrap();
            let archive = archive.to_str().unwrap();
            // Its own Argon2 takes a minute.
            for way in (0..3).filter(|way| *how != "words" || *way == 0) {
                let with = |words: &[&str]| decoder(way, dir.path(), &[&[archive], *key, words].concat());
                let whole = |words: &[&str]| {
                    let (good, out, said) = with(words);
                    assert!(good, "{archive} {way} {words:?}: {said}");
                    out
                };
                let listed = String::from_utf8(whole(&["list"])).unwrap();
                assert!(listed.starts_with("abababababababab  2026-03-04T05:00:00Z  shop  manual  good  db files"), "{listed}");
                let listed = String::from_utf8(whole(&["ls"])).unwrap();
                assert!(listed.contains("f 4755            0 files/dir/odd\n") && listed.lines().count() == items.len(), "{listed}");
                assert!(String::from_utf8(whole(&["verify"])).unwrap().contains("7 files with 3146757 bytes are whole"));
                assert_eq!(whole(&["stream"]), written(&items, contents, *packing, None));
                let target = at(&format!("out-{how}-{m}-{way}"));
                whole(&["restore", target.to_str().unwrap()]);
                same_tree(&target, &items);
                let target = at(&format!("some-{how}-{m}-{way}"));
                whole(&["restore", target.to_str().unwrap(), "files/b", "db"]);
                assert_eq!(fs::read(target.join("files/b")).unwrap(), b"a");
                assert!(target.join("db/shop.db").exists() && !target.join("files/a").exists());
            }
            if seal.is_some() {
                let (good, _, said) = decoder(0, dir.path(), &[archive, "list"]);
                assert!(!good && said.contains("no key that was given opens the archive"), "{said}");
            }
        }
    }
}

#[test]
fn the_decoder_gives_nothing_out_that_was_changed() {
    let dir = tempfile::tempdir().unwrap();
    let profile = key_in(&dir.path().join("main.key"));
    let items = [directory("s"), file("s/a", b"one"), file("s/b", &noise(2 << 20, 6))];
    let restore = |archive: &[u8], way: usize| {
        fs::write(dir.path().join("archive"), archive).unwrap();
        let target = tempfile::tempdir().unwrap();
        let (good, _, said) =
            decoder(way, dir.path(), &["archive", "--key", "main.key", "restore", target.path().join("t").to_str().unwrap()]);
        for (path, (_, _, _, contents)) in tree(target.path()) {
            for (header, wanted) in items.iter().filter(|(h, _)| h.kind == EntryKind::File && path == [b"t/", name(h).as_slice()].concat())
            {
                assert_eq!(contents, *wanted, "{}", header.path.path);
            }
        }
        (good, said)
    };
    for packing in PACKINGS {
        for seal in [None, Some(&profile)] {
            let whole = written(&items, Contents::First, packing, seal);
            for way in 0..3 {
                let end = whole.len();
                // (The last four bytes of a zstd stream are its own checksum, of what the list proved before.)
                for cut in [0, 5, 40, 200, end / 2, end - 8] {
                    let (good, said) = restore(&whole[..cut], way);
                    assert!(!good && !said.is_empty(), "{packing:?} {} cut at {cut}", seal.is_some());
                }
                for at in [end / 3, end / 2, end * 2 / 3] {
                    let mut changed = whole.clone();
                    changed[at] ^= 1;
                    let (good, said) = restore(&changed, way);
                    assert!(!good && !said.is_empty(), "{packing:?} {} changed at {at}", seal.is_some());
                }
            }
        }
    }
    // Cut between two segments.
    let whole = written(&items, Contents::First, Packing::None, Some(&profile));
    let slots = u32::from_le_bytes(whole[12..16].try_into().unwrap()) as usize;
    let (good, said) = restore(&whole[..64 + slots + (1 << 20) + 16], 0);
    assert!(!good && said.contains("cut off after segment 0"), "{said}");
}

#[test]
fn the_decoder_follows_nothing_that_leads_out() {
    let dir = tempfile::tempdir().unwrap();
    let manifest = serde_json::json!({
        "format": 1, "archive": "00".repeat(16), "contents": "first",
        "origin": {"backup": "ab".repeat(32), "job": "shop", "started": "x", "type": "manual"},
        "sources": [{"name": "s", "kind": "files", "place": {"path": "/"}}],
        "files": [{"path": "s/../../escaped", "size": 1, "sha256": HEXLOWER.encode(&Sha256::digest(b"x"))}],
    });
    let member = |name: &str, kind: u8, target: &str, contents: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_size(contents.len() as u64);
        header.set_cksum();
        let mut out = [header.as_bytes().as_slice(), contents].concat();
        out.resize(out.len().next_multiple_of(512), 0);
        out
    };
    fs::write(dir.path().join("outside"), "secret").unwrap();
    for (text, members) in [
        ("leads elsewhere", vec![member("s/../../escaped", b'0', "", b"x")]),
        ("leads elsewhere", vec![member("s/hard", b'1', "s/../../outside", b"")]),
        ("leads elsewhere", vec![member("s/hard", b'1', "../outside", b"")]),
        ("not those that were archived", vec![member("s/a", b'2', "..", b""), member("s/a/escaped", b'0', "", b"x")]),
        ("is no file, directory or link", vec![member("s/dev", b'3', "", b"")]),
        ("is no file, directory or link", vec![member("s/pipe", b'6', "", b"")]),
        ("does not stand where it belongs", vec![member("s/b", b'5', "", b""), member("s/a", b'5', "", b"")]),
        ("does not stand where it belongs", vec![member("s/b", b'5', "", b""), member("s/b", b'5', "", b"")]),
        ("not those that were archived", vec![member("s/unlisted", b'0', "", b"x")]),
    ] {
        let archive = [member("manifest.json", b'0', "", manifest.to_string().as_bytes()), members.concat(), vec![0; 1024]].concat();
        fs::write(dir.path().join("archive"), archive).unwrap();
        let target = dir.path().join("deep/target");
        fs::create_dir(dir.path().join("deep")).unwrap();
        let (good, _, said) = decoder(0, dir.path(), &["archive", "restore", target.to_str().unwrap()]);
        assert!(!good && said.contains(text), "{text}: {said}");
        assert!(!dir.path().join("deep/escaped").exists() && !dir.path().join("escaped").exists());
        assert!(!target.join("s/hard").exists() && !target.join("s/unlisted").exists());
        fs::remove_dir_all(dir.path().join("deep")).unwrap();
    }
}

fn any_name() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![Just(b'a'), Just(b'b'), Just(b'\n'), Just(b' '), Just(b'='), Just(0xff), Just(0xc3), any::<u8>()];
    let name = prop_oneof![9 => proptest::collection::vec(byte, 1..6), 1 => Just(vec![b'l'; 120])];
    name.prop_map(|name| name.into_iter().map(|b| if b == 0 || b == b'/' { b'_' } else { b }).collect::<Vec<u8>>())
        .prop_map(|name| if name == b"." || name == b".." { b"dots".to_vec() } else { name })
}

/// An entry below its source: its path, what it is, and how large.
fn any_item() -> impl Strategy<Value = (Vec<u8>, u8, usize, EntryHeader)> {
    let size = prop_oneof![
        4 => 0usize..1200,
        1 => (1usize << 20) - 2000..(1 << 20) + 2000,
        1 => prop::sample::select(vec![511usize, 512, 513, 1024, (2 << 20) + 1]),
    ];
    let header = (
        0u32..0o10000,
        prop_oneof![Just(0u32), Just(2_097_151), Just(2_097_152), any::<u32>()],
        proptest::option::of("[a-z\u{e4}]{1,40}"),
        prop_oneof![Just(0i64), Just(-1), -(1i64 << 40)..(1i64 << 40), Just(i64::from(u32::MAX) * 1000)],
        prop_oneof![Just(0u32), 0u32..1_000_000_000],
        proptest::collection::btree_map(any_name(), proptest::collection::vec(any::<u8>(), 0..40), 0..3),
    );
    let header = header.prop_map(|(mode, uid, user, mtime_seconds, mtime_nanoseconds, xattrs)| EntryHeader {
        mode,
        uid,
        gid: uid / 3,
        group: user.clone(),
        user,
        mtime_seconds,
        mtime_nanoseconds,
        xattrs: xattrs.iter().map(|(name, value)| (BytesPath::from_bytes(name), BASE64.encode(value))).collect(),
        ..EntryHeader::default()
    });
    (proptest::collection::vec(any_name(), 1..4).prop_map(|names| names.join(&b'/')), 0u8..8, size, header)
}

/// Entries as a backup has them: in order, each once, directories before what is in them.
fn any_items() -> impl Strategy<Value = Vec<Item>> {
    proptest::collection::vec(any_item(), 0..12).prop_map(|drawn| {
        let mut at: BTreeMap<Vec<u8>, (EntryKind, usize, EntryHeader)> = BTreeMap::new();
        for (path, kind, size, header) in drawn {
            let above = (0..path.len()).filter(|n| path[*n] == b'/').map(|n| path[..n].to_vec()).collect::<Vec<_>>();
            let below = |p: &[u8]| at.keys().any(|k| k.starts_with(&[p, b"/"].concat()));
            if at.contains_key(&path)
                || below(&path)
                || above.iter().any(|p| at.get(p).is_some_and(|(kind, ..)| *kind != EntryKind::Directory))
            {
                continue;
            }
            for parent in above {
                at.entry(parent).or_insert_with(|| (EntryKind::Directory, 0, EntryHeader::default()));
            }
            let kind =
                [EntryKind::File, EntryKind::Directory, EntryKind::Symlink, EntryKind::Hardlink][usize::from(kind.saturating_sub(4))];
            at.insert(path, (kind, size, header));
        }
        let mut paths: Vec<_> = at.into_iter().collect();
        paths.sort_by(|(a, _), (b, _)| path_order(a, b));
        let mut items = vec![directory("s")];
        let mut files: Vec<Vec<u8>> = Vec::new();
        for (n, (path, (kind, size, header))) in paths.into_iter().enumerate() {
            let path = [b"s/", path.as_slice()].concat();
            let kind = if kind == EntryKind::Hardlink && files.is_empty() { EntryKind::File } else { kind };
            let target = match kind {
                EntryKind::Hardlink => Some(BytesPath::from_bytes(&files[n % files.len()])),
                EntryKind::Symlink => Some(BytesPath::from_bytes(&[b"../\xff", path.as_slice()].concat())),
                _ => None,
            };
            let contents = if kind == EntryKind::File { noise(size, n as u64 + 1) } else { Vec::new() };
            if kind == EntryKind::File {
                files.push(path.clone());
            }
            items.push((EntryHeader { path: BytesPath::from_bytes(&path), kind, target, size: contents.len() as u64, ..header }, contents));
        }
        items
    })
}

fn sealed_for(byte: u8) -> Profile {
    let dir = tempfile::tempdir().unwrap();
    let mut profile = key_in(&dir.path().join("key"));
    profile.name = format!("profile-{byte}");
    profile
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn anything_comes_back(items in any_items(), packing in 0usize..3, sealed: bool, last: bool) {
        let profile = sealed_for(1);
        let contents = if last { Contents::Last } else { Contents::First };
        let archive = written(&items, contents, PACKINGS[packing], sealed.then_some(&profile));
        let keys: &[ProfileKey] = if sealed { std::slice::from_ref(&profile.key) } else { &[] };
        let (read, read_totals) = read(archive, keys, None).unwrap();
        prop_assert_eq!(read_totals, totals(&items));
        prop_assert_eq!(read.len(), items.len());
        for (read, written) in read.iter().zip(&items) {
            prop_assert_eq!(EntryHeader { index: 0, ..read.0.clone() }, written.0.clone());
            prop_assert!(read.1 == written.1);
        }
    }

    #[test]
    fn no_bytes_bring_it_down(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4, any::<prop::sample::Index>()), 1..6),
        packing in 0usize..3,
        last: bool,
        foreign: bool,
    ) {
        let items = [directory("s"), file("s/a", b"one"), link("s/b", EntryKind::Hardlink, b"s/a"), file("s/c", &noise(3000, 9))];
        let contents = if last { Contents::Last } else { Contents::First };
        let mut archive = written(&items, contents, PACKINGS[packing], None);
        for (at, byte, how, other) in changes {
            let (at, other) = (at.index(archive.len()), other.index(archive.len()));
            match how {
                0 => archive[at] = byte,
                1 => archive.insert(at, byte),
                2 if archive.len() > 1 => drop(archive.remove(at)),
                _ => {
                    let block = archive[at / 512 * 512..].iter().take(512).copied().collect::<Vec<_>>();
                    let to = other / 512 * 512;
                    archive.splice(to..to, block);
                }
            }
        }
        // Whatever comes of it: an error with a text, or what was written.
        match read(archive, &[], foreign.then_some("site")) {
            Err(e) => prop_assert!(!e.to_string().is_empty()),
            Ok((read, _)) => for (header, contents) in read {
                if let Some((_, wanted)) = items.iter().find(|(h, _)| h.path == header.path && header.kind == EntryKind::File) {
                    prop_assert_eq!(&contents, wanted);
                }
            },
        }
    }
}

/// Throughput against the usual tools; run alone: `cargo test --release --test archive -- --ignored --nocapture`. `KEEPD_BENCH_DIR`: what is archived.
#[test]
#[ignore = "a measurement"]
fn measured_against_tar() {
    let Some(dir) = std::env::var_os("KEEPD_BENCH_DIR").map(PathBuf::from) else { return };
    let work = tempfile::tempdir().unwrap();
    let mut paths: Vec<Vec<u8>> = Vec::new();
    let mut left = vec![dir.clone()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path.clone());
            }
            use std::os::unix::ffi::OsStrExt;
            paths.push(path.strip_prefix(&dir).unwrap().as_os_str().as_bytes().to_vec());
        }
    }
    paths.sort_by(|a, b| path_order(a, b));
    let header = |path: &[u8]| {
        use std::os::unix::ffi::OsStrExt;
        let meta = fs::metadata(dir.join(std::ffi::OsStr::from_bytes(path))).unwrap();
        let kind = if meta.is_dir() { EntryKind::Directory } else { EntryKind::File };
        EntryHeader {
            path: BytesPath::from_bytes(&[b"files/", path].concat()),
            kind,
            mode: meta.mode() & 0o7777,
            size: if meta.is_dir() { 0 } else { meta.len() },
            ..EntryHeader::default()
        }
    };
    let size: u64 = paths.iter().map(|p| header(p).size).sum();
    let source = |t: Totals| Source {
        name: "files".into(),
        kind: "files".into(),
        entries: t.entries,
        files: t.files,
        directories: t.directories,
        bytes: t.bytes,
        ..Source::default()
    };
    let mut totals = Totals::default();
    paths.iter().for_each(|p| totals.count(&header(p)));
    let write = |packing: Packing, seal: Option<&Profile>, path: &Path| {
        let options = Options { packing, seal, work_dir: work.path(), cancel: CancellationToken::new() };
        let head = Head { sources: vec![source(Totals::default())], totals: None, ..head(&[], Contents::Last) };
        let mut writer = ArchiveWriter::create(fs::File::create(path).unwrap(), &options, &head, None).unwrap();
        let mut buffer = vec![0; 1 << 20];
        for path in &paths {
            use std::os::unix::ffi::OsStrExt;
            let header = header(path);
            writer.entry(&header).unwrap();
            if header.kind == EntryKind::File {
                let mut f = fs::File::open(dir.join(std::ffi::OsStr::from_bytes(path))).unwrap();
                loop {
                    let n = f.read(&mut buffer).unwrap();
                    if n == 0 {
                        break;
                    }
                    writer.contents(&buffer[..n]).unwrap();
                }
            }
        }
        let tail = Tail {
            archive: head.archive.clone(),
            finished: head.created.clone(),
            sources: vec![source(totals)],
            totals,
            ..Tail::default()
        };
        writer.finish(Some(&tail)).unwrap().1
    };
    let read = |path: &Path, keys: &[ProfileKey]| {
        let with = OpenWith {
            keys,
            private_keys: &[],
            limits: Limits::default(),
            work_dir: work.path(),
            cancel: CancellationToken::new(),
            foreign_source: None,
        };
        let mut reader = ArchiveReader::open(fs::File::open(path).unwrap(), &with).unwrap();
        let mut buffer = vec![0; 1 << 20];
        while reader.next_entry().unwrap().is_some() {
            while reader.read(&mut buffer).unwrap() > 0 {}
        }
        reader.finish().unwrap();
    };
    let timed = |what: &str, work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        let seconds = start.elapsed().as_secs_f64();
        println!("{what:40} {seconds:7.2} s {:8.0} MB/s", size as f64 / seconds / 1e6);
    };
    let shell = |text: String| drop(run(Command::new("sh").arg("-c").arg(text)));
    let (from, to) = (dir.display(), work.path().display());
    let profile = sealed_for(1);
    let out = work.path().join("archive");
    for (packing, theirs, back) in [
        (Packing::None, format!("tar -cf {to}/theirs -C {from} ."), format!("tar -xOf {to}/theirs > /dev/null")),
        (Packing::Gzip, format!("tar -c -C {from} . | gzip > {to}/theirs"), format!("gzip -dc {to}/theirs | tar -xO > /dev/null")),
        (
            Packing::Zstd,
            format!("tar -c -C {from} . | zstd -q -3 -T2 > {to}/theirs"),
            format!("zstd -qdc {to}/theirs | tar -xO > /dev/null"),
        ),
    ] {
        timed(&theirs[..theirs.find(" /").unwrap_or(20)], &mut || shell(theirs.clone()));
        timed(&format!("ours {packing:?}"), &mut || drop(write(packing, None, &out)));
        println!("{} bytes, theirs {}", fs::metadata(&out).unwrap().len(), fs::metadata(work.path().join("theirs")).unwrap().len());
        timed("theirs, back", &mut || shell(back.clone()));
        timed(&format!("ours {packing:?}, back"), &mut || read(&out, &[]));
        timed(&format!("ours {packing:?}, sealed"), &mut || drop(write(packing, Some(&profile), &out)));
        timed(&format!("ours {packing:?}, sealed, back"), &mut || read(&out, std::slice::from_ref(&profile.key)));
    }
    let status = fs::read_to_string("/proc/self/status").unwrap();
    println!("{}", status.lines().find(|l| l.starts_with("VmHWM")).unwrap());
}
