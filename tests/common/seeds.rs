//! Inputs for the targets of `fuzz/`, made of real objects: those of the golden repositories, opened, and small ones of each other kind.

#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use keepd::archive::Companion;
use keepd::crypto::object::FOOTER_ORDINAL;
use keepd::crypto::slot::Slot;
use keepd::crypto::{HEADER_BYTES, Keyring, MasterKey, ObjectHeader, ObjectKind, ProfileKey, TAG_BYTES, key_file};
use keepd::portable::head::{Contents, Origin, Source, Totals};
use keepd::portable::write::Options;
use keepd::portable::{ArchiveWriter, Head, Packing, Tail};
use keepd::repository::pack::{self, PackBuilder, PackMemory, Prover};
use keepd::repository::payload;
use keepd_protocol::model::{BytesPath, EntryKind};
use keepd_protocol::restore::{EntryHeader, FrameWriter, Summary};

use super::common::files_below;

/// Of an input, for its name.
pub fn hash(input: &[u8]) -> u64 {
    u64::from_le_bytes(blake3::hash(input).as_bytes()[..8].try_into().unwrap())
}

pub type Seeds = Vec<(&'static str, Vec<u8>)>;

/// Longer ones are not worth their place: what a fuzzer changes should matter.
const MOST: usize = 6 << 10;

pub fn all() -> Seeds {
    let mut seeds = Seeds::new();
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    for name in ["1-zstd", "1-gzip", "1-marks", "1-epochs", "1-dump", "1-write-only", "1-copy"] {
        of_repository(&tests.join("golden").join(name), &mut seeds);
    }
    for path in files_below(&tests.join("golden-config")) {
        let input = fs::read(&path).unwrap();
        let target = if path.extension().is_some_and(|e| e == "key") { "key_file" } else { "meta_backup" };
        seeds.push((target, input));
    }
    for path in files_below(&tests.join("golden-archives")).into_iter().filter(|p| p.extension().is_some_and(|e| e == "key")) {
        seeds.push(("key_file", fs::read(path).unwrap()));
    }
    configurations(&tests, &mut seeds);
    for text in [
        "30 2 * * *",
        "*/5 * * * *",
        "0 0 1 1 *",
        "@daily",
        "@hourly",
        "15,45 8-18/2 * 1-12/3 mon-fri",
        "0 0 L * *",
        "0 3 * * sun#2",
        "0 3 * * friL",
        "0 0 29 2 *",
        "0 0 31 * 1",
        "59 23 * dec sat",
        "0 12 15W * *",
        "1-5/70 * * * *",
        "@reboot",
        "0 0 * * 7",
    ] {
        seeds.push(("cron", text.into()));
    }
    archives(&mut seeds);
    streams(&tests, &mut seeds);
    seeds.retain(|(target, input)| input.len() <= MOST || matches!(*target, "archive" | "postgres_archive" | "mysql_dump" | "meta_backup"));
    seeds
}

fn of_repository(golden: &Path, seeds: &mut Seeds) {
    let at = |path: &str| golden.join("repository").join(path);
    let config = fs::read(at("keepd.json")).unwrap();
    let id = serde_json::from_slice::<serde_json::Value>(&config).unwrap()["repository"].as_str().unwrap().to_owned();
    let id: [u8; 16] = data_encoding::HEXLOWER.decode(id.as_bytes()).unwrap().try_into().unwrap();
    seeds.push(("repository_json", config));
    let text = fs::read_to_string(golden.join("golden.key")).unwrap();
    seeds.push(("key_file", text.clone().into()));
    if let Ok(public) = fs::read(golden.join("read.key.pub")) {
        seeds.push(("key_file", public));
    }
    let key = ProfileKey::Key(Arc::new(key_file::from_text(Path::new("golden.key"), &text).unwrap()));
    let mut keys = None;
    for path in files_below(&at("keys")) {
        let bytes = fs::read(path).unwrap();
        keys = serde_json::from_slice::<Slot>(&bytes).unwrap().unwrap(&id, Some(&key)).ok().or(keys);
        seeds.push(("key_slot", bytes));
    }
    let keys: Keyring = keys.unwrap();
    for (directory, target) in [("index", "index"), ("backups", "manifest"), ("marks", "records"), ("condemned", "records")] {
        for path in files_below(&at(directory)) {
            let object = fs::read(path).unwrap();
            let header = ObjectHeader::parse(&object, &id).unwrap();
            let sealed = keys.cipher(&header).unwrap().open(0, &object[HEADER_BYTES..]).unwrap();
            seeds.push((target, payload::decompress(&sealed, 1 << 20).unwrap()));
            seeds.push(("payload", [&[20], &sealed[..]].concat()));
        }
    }
    for path in files_below(&at("packs")) {
        let bytes = fs::read(path).unwrap();
        let contents = pack::contents(&keys, &id, &bytes).unwrap();
        let footer_at = pack::chunks_end(&contents.chunks) as usize + pack::sealed_key_len(&contents.header);
        let footer = keys.cipher(&contents.header).unwrap().open(FOOTER_ORDINAL, &bytes[footer_at..bytes.len() - 4]).unwrap();
        // The target knows another key: of what was sealed so many bytes stand for the chunks, behind them the footer in plain.
        seeds.push((
            "pack",
            [&[1, (footer_at - HEADER_BYTES).min(255) as u8], &bytes[HEADER_BYTES..footer_at.min(HEADER_BYTES + 255)], &footer].concat(),
        ));
        seeds.push(("footer", footer));
        if contents.header.kind != ObjectKind::MetaPack {
            continue;
        }
        let cipher = pack::cipher(&keys, &contents.header, &bytes, &contents.chunks).unwrap();
        let mut payloads = Vec::new();
        for (ordinal, c) in contents.chunks.iter().enumerate() {
            let sealed = &bytes[c.offset as usize..(c.offset + c.sealed_len) as usize];
            assert!(sealed.len() > TAG_BYTES);
            let opened = cipher.open(ordinal as u64, sealed).unwrap();
            seeds.push(("entry_stream", payload::decompress(&opened, 4 << 20).unwrap()));
            seeds.push(("payload", [&[22], &opened[..]].concat()));
            payloads.push(opened);
        }
        seeds.push(("pack", [&[0], &whole_pack(&payloads)[..]].concat()));
    }
    seeds.push(("key_slot", b"argon2id m=65536 t=3 p=4".to_vec()));
}

/// A pack of these payloads under the keys that the targets know.
fn whole_pack(payloads: &[Vec<u8>]) -> Vec<u8> {
    let (keys, repository) = (Keyring::of(MasterKey::from_bytes([7; 32])), [3; 16]);
    let mut pack = PackBuilder::new(&keys, &repository, ObjectKind::MetaPack, &PackMemory::default()).unwrap();
    let mut prover = Prover::default();
    for payload in payloads {
        let raw = payload::decompress(payload, 4 << 20).unwrap();
        pack.push(pack::chunk_id(&keys.chunk_id_key(), &raw), payload, &raw, &mut prover).unwrap();
    }
    pack.finish(&keys, &repository).unwrap().bytes.to_vec()
}

fn configurations(tests: &Path, seeds: &mut Seeds) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut texts: Vec<PathBuf> = files_below(&tests.join("config/faulty"));
    texts.push(root.join("config/keepd.toml"));
    for path in texts {
        seeds.push(("configuration", fs::read(path).unwrap()));
    }
    for page in files_below(&root.join("docs")).into_iter().chain([root.join("README.md")]) {
        let text = fs::read_to_string(page).unwrap();
        let blocks = text.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next());
        for block in blocks {
            seeds.push(("configuration", block.into()));
        }
    }
}

fn header(path: &str, kind: EntryKind, size: u64) -> EntryHeader {
    EntryHeader { path: BytesPath::from_bytes(path.as_bytes()), kind, mode: 0o644, size, ..EntryHeader::default() }
}

/// A small archive as keepd makes it.
pub fn archive(packing: Packing, profile: Option<&keepd::crypto::Profile>) -> Vec<u8> {
    let entries = [
        (header("files", EntryKind::Directory, 0), &b""[..]),
        (EntryHeader { xattrs: vec![("user.keepd".into(), "a2VwdA==".into())], ..header("files/a", EntryKind::File, 5) }, b"hello"),
        (EntryHeader { target: Some("files/a".into()), ..header("files/b", EntryKind::Hardlink, 0) }, b""),
        (EntryHeader { mtime_nanoseconds: 5, ..header("files/c", EntryKind::File, 600) }, &[b'c'; 600]),
        (EntryHeader { target: Some("../x".into()), ..header("files/d", EntryKind::Symlink, 0) }, b""),
    ];
    let mut totals = Totals::default();
    entries.iter().for_each(|(header, _)| totals.count(header));
    let source = Source { name: "files".into(), kind: "files".into(), place: "/srv".into(), ..Source::default() };
    let whole =
        Source { entries: totals.entries, files: totals.files, directories: totals.directories, bytes: totals.bytes, ..source.clone() };
    let head = Head {
        format: 1,
        archive: "00112233445566778899aabbccddeeff".into(),
        created: "2026-03-04T05:06:07Z".into(),
        keepd_version: "0.1.0".into(),
        contents: Contents::Last,
        origin: Origin {
            backup: "ab".repeat(32),
            job: "shop".into(),
            r#type: "manual".into(),
            started: "2026-03-04T05:06:07Z".into(),
            ..Origin::default()
        },
        sources: vec![source],
        ..Head::default()
    };
    let work = std::env::temp_dir();
    let options = Options { packing, seal: profile, work_dir: &work, cancel: tokio_util::sync::CancellationToken::new() };
    let mut writer = ArchiveWriter::create(Vec::new(), &options, &head, None).unwrap();
    for (header, contents) in &entries {
        writer.entry(header).unwrap();
        if !contents.is_empty() {
            writer.contents(contents).unwrap();
        }
    }
    let tail = Tail {
        archive: head.archive.clone(),
        finished: "2026-03-04T05:06:08Z".into(),
        outcome: "good".into(),
        sources: vec![whole],
        totals,
        ..Tail::default()
    };
    writer.finish(Some(&tail)).unwrap().0
}

fn archives(seeds: &mut Seeds) {
    let plain = archive(Packing::None, None);
    for packed in [&plain, &archive(Packing::Gzip, None), &archive(Packing::Zstd, None)] {
        seeds.push(("archive", [&[0], &packed[..]].concat()));
    }
    let mut foreign = tar::Builder::new(Vec::new());
    let mut file = tar::Header::new_gnu();
    file.set_size(3);
    foreign.append_data(&mut file, "./dir/a-file", &b"abc"[..]).unwrap();
    file.set_size(2);
    foreign.append_data(&mut file, "n".repeat(150), &b"de"[..]).unwrap();
    let mut link = tar::Header::new_ustar();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    foreign.append_link(&mut link, "link", "dir/a-file").unwrap();
    seeds.push(("archive", [&[1], &foreign.into_inner().unwrap()[..]].concat()));
    seeds.push(("tar_headers", plain[..4096].to_vec()));
    seeds.push(("tar_headers", b"19 SCHILY.xattr.a=b\n12 path=x/y\n24 mtime=1700000000.75\n13 size=1234\n17 linkpath=a/b\n".to_vec()));
    seeds.push((
        "companion",
        serde_json::to_vec(&Companion { archive: "shop_2026.tar.gz".into(), size: 7, ..Companion::default() }).unwrap(),
    ));
    seeds.push(("companion", b"shop_2026-11-22_034500_0123456789ab.tar.zst.enc".to_vec()));
}

fn streams(tests: &Path, seeds: &mut Seeds) {
    for path in files_below(&tests.join("postgres")) {
        seeds.push(("postgres_archive", fs::read(path).unwrap()));
    }
    // The dumps that the reader of dumps is tested with.
    let text = include_str!("../../src/source/mysql/tests.rs");
    for dump in text.split("r#\"").skip(1).filter_map(|rest| rest.split("\"#").next()) {
        seeds.push(("mysql_dump", dump.into()));
    }
    for text in [
        r#"{"ok":true,"version":1}"#,
        r#"{"ok":true,"size":5}"#,
        r#"{"error":"not_found","message":"it is not there"}"#,
        "{\"ok\":true}\n{\"name\":\"packs/aa\",\"size\":5}\n{\"name\":\"packs/ab\",\"size\":6}\n{\"end\":true,\"count\":2}",
    ] {
        seeds.push(("plugin_answers", format!("{text}\nhello").into()));
        seeds.push(("plugin_answers", format!("{text}\n").into()));
    }
    for text in [
        r#"{"method":"io.keepd.Control.GetStatus","parameters":{"job":"shop"}}"#,
        r#"{"method":"io.keepd.Control.FollowRun","parameters":{"run":"1"},"more":true}"#,
        r#"{"method":"io.keepd.Control.StartRestore","parameters":{"backup":"latest","paths":["files"]},"oneway":true}"#,
        r#"{"parameters":{"backups":[{"id":"00","job":"shop","time":"2026-01-01T00:00:00Z","type":"manual","outcome":"good","bytes":1}]},"continues":true}"#,
        r#"{"error":"io.keepd.Control.NotFound","parameters":{"what":"job","message":"there is none"}}"#,
    ] {
        seeds.push(("control_frames", format!("{text}\0{text}\0").into()));
    }
    seeds.push(("control_frames", b"\x00\0\0\0\0\0\0\0\x0f{\"version\":\"1\"}\x04\0\0\0\x07\0\0\0\x03abc".to_vec()));
    let mut frames = FrameWriter::new(Vec::new());
    frames.entry(&EntryHeader { mode: 0o755, ..header("a", EntryKind::Directory, 0) }, b"").unwrap();
    frames.entry(&EntryHeader { index: 1, inline: true, ..header("a/b", EntryKind::File, 5) }, b"hello").unwrap();
    frames.entry(&EntryHeader { index: 2, sparse: true, ..header("a/c", EntryKind::File, 9000) }, b"").unwrap();
    frames.data(2, 4096, b"data").unwrap();
    frames.end(2).unwrap();
    frames.entry(&EntryHeader { index: 3, target: Some("../outside".into()), ..header("a/d", EntryKind::Symlink, 0) }, b"").unwrap();
    let stream = frames.finish(&Summary { entries: 4, bytes: 9 }).unwrap();
    for way in [0u8, 8] {
        seeds.push(("restore_stream", [&[way], &stream[..]].concat()));
    }
    let mut frames = FrameWriter::new(Vec::new());
    frames.entry(&header("a", EntryKind::File, 9000), b"").unwrap();
    frames.shared(0, 4096, 3, 4904).unwrap();
    frames.shared(0, 0, 0, 4096).unwrap();
    frames.end(0).unwrap();
    let stream = frames.finish(&Summary { entries: 1, bytes: 9000 }).unwrap();
    for way in [0u8, 16, 24] {
        seeds.push(("restore_stream", [&[way], &stream[..]].concat()));
    }
    for way in [1u8, 3, 9, 11] {
        seeds.push(("restore_stream", vec![way, 1, 0, 0, 0x42, 1, 5, 2, 3, 0, 3, 4, 1, 0x40, 5, 7, 0x13, 1, 0, 0x98, 1]));
        seeds.push(("restore_stream", vec![way, 2, 0, 0, 0, 0x40, 1, 9, 3, 9, 0, 1, 0, 2, 0x10, 0, 1, 0x18, 0]));
    }
}
