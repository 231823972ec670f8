//! Archives as a whole: what is written comes back, and nothing else does.

use std::io::{Cursor, Read};
use std::path::Path;
use std::sync::Arc;

use data_encoding::{BASE64, HEXLOWER};
use keepd_protocol::model::{BytesPath, EntryKind};
use keepd_protocol::restore::EntryHeader;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::head::{Contents, Origin, Source, Totals};
use super::read::OpenWith;
use super::write::Options;
use super::*;
use crate::crypto::locked::Locked;
use crate::crypto::{Key, PrivateKey, Profile, ProfileKey};

const PACKINGS: [Packing; 3] = [Packing::None, Packing::Gzip, Packing::Zstd];

/// An entry and its contents.
type Item = (EntryHeader, Vec<u8>);

fn header(path: &[u8], kind: EntryKind) -> EntryHeader {
    EntryHeader {
        path: BytesPath::from_bytes(path),
        kind,
        mode: 0o644,
        uid: 1000,
        gid: 100,
        user: Some("alice".into()),
        group: Some("users".into()),
        mtime_seconds: 1_700_000_000,
        ..EntryHeader::default()
    }
}

fn file(path: &str, contents: &[u8]) -> Item {
    (EntryHeader { size: contents.len() as u64, ..header(path.as_bytes(), EntryKind::File) }, contents.to_vec())
}

fn directory(path: &str) -> Item {
    (header(path.as_bytes(), EntryKind::Directory), Vec::new())
}

fn link(path: &str, kind: EntryKind, target: &[u8]) -> Item {
    (EntryHeader { target: Some(BytesPath::from_bytes(target)), ..header(path.as_bytes(), kind) }, Vec::new())
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252u64;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// Something of everything.
fn items() -> Vec<Item> {
    let odd = EntryHeader {
        uid: 3_000_000,
        gid: u32::MAX,
        user: Some("a-user-whose-name-is-longer-than-any-header-has-room-for".into()),
        group: Some("grüppe".into()),
        mode: 0o6755,
        mtime_seconds: -12,
        mtime_nanoseconds: 750_000_000,
        xattrs: vec![("user.a=b%".into(), BASE64.encode(b"\0\xff=\n")), ("user.empty".into(), String::new())],
        ..file("files/dir/odd", b"").0
    };
    let not_utf8 = EntryHeader { size: 4, ..header(b"files/dir/\xff\xfe name", EntryKind::File) };
    let mut items = vec![
        (EntryHeader { size: 5, ..header(b"db", EntryKind::File) }, b"hello".to_vec()),
        directory("files"),
        file("files/a", b"a"),
        link("files/b", EntryKind::Hardlink, b"files/a"),
        directory("files/dir"),
        (odd, Vec::new()),
        (not_utf8, b"four".to_vec()),
        file("files/dir-2", &noise(512)),
        file("files/large", &noise((1 << 20) * 2 + 77)),
        link("files/link", EntryKind::Symlink, b"../../somewhere/\xff"),
        directory(&format!("files/long-{}", "x".repeat(200))),
        file(&format!("files/long-{}/y", "x".repeat(200)), &noise(511)),
        link("files/zlink", EntryKind::Symlink, "t".repeat(4096).as_bytes()),
    ];
    for (n, item) in items.iter_mut().enumerate() {
        item.0.index = n as u64;
    }
    items
}

fn sources(items: &[Item]) -> Vec<Source> {
    let mut sources: Vec<Source> = Vec::new();
    for (header, _) in items {
        let path = header.path.to_bytes().unwrap();
        let name = String::from_utf8(path.split(|b| *b == b'/').next().unwrap().to_vec()).unwrap();
        if sources.last().is_none_or(|s| s.name != name) {
            sources.push(Source { name, kind: "files".into(), place: "/srv".into(), ..Source::default() });
        }
        let source = sources.last_mut().unwrap();
        let mut totals = Totals { entries: source.entries, files: source.files, directories: source.directories, bytes: source.bytes };
        totals.count(header);
        (source.entries, source.files, source.directories, source.bytes) = (totals.entries, totals.files, totals.directories, totals.bytes);
    }
    sources
}

fn totals(items: &[Item]) -> Totals {
    let mut totals = Totals::default();
    items.iter().for_each(|(header, _)| totals.count(header));
    totals
}

fn head(items: &[Item], contents: Contents) -> Head {
    let mut sources = sources(items);
    if contents == Contents::Last {
        sources.iter_mut().for_each(|s| (s.entries, s.files, s.directories, s.bytes) = (0, 0, 0, 0));
    }
    Head {
        format: 1,
        archive: "00112233445566778899aabbccddeeff".into(),
        created: "2026-03-04T05:06:07Z".into(),
        keepd_version: "0.1.0".into(),
        contents,
        origin: Origin { backup: "ab".repeat(32), job: "shop".into(), r#type: "manual".into(), ..Origin::default() },
        sources,
        totals: (contents == Contents::First).then(|| totals(items)),
        ..Head::default()
    }
}

fn tail(items: &[Item]) -> Tail {
    Tail {
        archive: "00112233445566778899aabbccddeeff".into(),
        finished: "2026-03-04T05:06:08Z".into(),
        outcome: "good".into(),
        sources: sources(items),
        totals: totals(items),
        ..Tail::default()
    }
}

fn file_list(dir: &Path, items: &[Item]) -> FileList {
    let mut writer = FileListWriter::create(dir).unwrap();
    for (header, contents) in items.iter().filter(|(h, _)| h.kind == EntryKind::File) {
        let sha256 = HEXLOWER.encode(&Sha256::digest(contents));
        writer.push(&FileLine { path: header.path.clone(), size: header.size, sha256 }).unwrap();
    }
    writer.finish().unwrap()
}

/// An output that can be looked at.
fn write(items: &[Item], contents: Contents, packing: Packing, seal: Option<&Profile>) -> Result<(Vec<u8>, Made)> {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { packing, seal, work_dir: dir.path(), cancel: CancellationToken::new() };
    let files = (contents == Contents::First).then(|| file_list(dir.path(), items));
    let mut writer = ArchiveWriter::create(Vec::new(), &options, &head(items, contents), files)?;
    for (header, contents) in items {
        writer.entry(header)?;
        for piece in contents.chunks(300_000) {
            writer.contents(piece)?;
        }
    }
    writer.finish((contents == Contents::Last).then(|| tail(items)).as_ref())
}

#[derive(Default, Clone)]
struct Given {
    keys: Vec<ProfileKey>,
    private: Vec<Arc<PrivateKey>>,
    limits: Limits,
    foreign: Option<String>,
    cancel: CancellationToken,
}

fn open(archive: impl Read + Send + 'static, given: &Given) -> Result<ArchiveReader> {
    let dir = tempfile::tempdir().unwrap();
    ArchiveReader::open(
        archive,
        &OpenWith {
            keys: &given.keys,
            private_keys: &given.private,
            limits: given.limits.clone(),
            work_dir: dir.path(),
            cancel: given.cancel.clone(),
            foreign_source: given.foreign.clone(),
        },
    )
}

type Read_ = (Option<Head>, Vec<Item>, Totals, Option<Tail>);

/// Whatever was given out before an error, too.
fn read_into(archive: &[u8], given: &Given, items: &mut Vec<Item>) -> Result<(Option<Head>, Totals, Option<Tail>)> {
    let mut reader = open(Cursor::new(archive.to_vec()), given)?;
    let head = reader.head().cloned();
    while let Some(header) = reader.next_entry()? {
        let mut contents = Vec::new();
        let mut buffer = vec![0; 70_000];
        loop {
            let n = reader.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            contents.extend_from_slice(&buffer[..n]);
        }
        items.push((header, contents));
    }
    assert!(reader.position() <= archive.len() as u64);
    let (totals, tail) = reader.finish()?;
    Ok((head, totals, tail))
}

fn read(archive: &[u8], given: &Given) -> Result<Read_> {
    let mut items = Vec::new();
    let (head, totals, tail) = read_into(archive, given, &mut items)?;
    Ok((head, items, totals, tail))
}

fn key(byte: u8) -> ProfileKey {
    ProfileKey::Key(Arc::new(Key::new(Locked::take(&mut [byte; 32]))))
}

fn with_key(byte: u8) -> Given {
    Given { keys: vec![key(byte)], ..Given::default() }
}

fn shown(items: &[Item]) -> Vec<String> {
    items.iter().map(|(h, c)| format!("{h:?} {}", HEXLOWER.encode(&Sha256::digest(c)))).collect()
}

#[track_caller]
fn same(read: &[Item], written: &[Item]) {
    for (read, written) in shown(read).iter().zip(&shown(written)) {
        assert_eq!(read, written);
    }
    assert_eq!(read.len(), written.len());
}

#[test]
fn what_is_written_comes_back_however_it_is_packed_and_sealed() {
    let items = items();
    let private = Arc::new(PrivateKey::generate().unwrap());
    let key_file = Profile::of("main", key(1));
    let to_public = Profile { recipient: Some(private.public()), ..Profile::of("offline", key(2)) };
    let to_private = Given { private: vec![private], ..Given::default() };
    for contents in [Contents::First, Contents::Last] {
        for packing in PACKINGS {
            for (seal, given) in [(None, Given::default()), (Some(&key_file), with_key(1)), (Some(&to_public), to_private.clone())] {
                let (bytes, made) = write(&items, contents, packing, seal).unwrap();
                assert_eq!(made, Made { bytes: bytes.len() as u64, sha256: HEXLOWER.encode(&Sha256::digest(&bytes)) });
                let (head_read, items_read, totals_read, tail_read) = read(&bytes, &given).unwrap();
                assert_eq!(head_read.unwrap(), head(&items, contents));
                same(&items_read, &items);
                assert_eq!(totals_read, totals(&items));
                assert_eq!(tail_read, (contents == Contents::Last).then(|| tail(&items)));
            }
        }
    }
}
