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
        origin: Origin {
            backup: "ab".repeat(32),
            job: "shop".into(),
            started: "2026-03-04T05:06:06Z".into(),
            finished: "2026-03-04T05:06:07Z".into(),
            r#type: "manual".into(),
            ..Origin::default()
        },
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
    let shown = |(h, c): &Item| format!("{:?} {}", EntryHeader { index: 0, ..h.clone() }, HEXLOWER.encode(&Sha256::digest(c)));
    items.iter().map(shown).collect()
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

/// A tar that nobody's library would make: headers of any kind, one after the other.
#[derive(Clone, Default)]
struct Raw(Vec<u8>);

impl Raw {
    fn member(self, name: &[u8], kind: u8, target: &[u8], contents: &[u8]) -> Self {
        self.with(name, kind, target, contents, |_| {})
    }

    fn with(mut self, name: &[u8], kind: u8, target: &[u8], contents: &[u8], change: impl Fn(&mut tar::Header)) -> Self {
        let mut header = tar::Header::new_ustar();
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name);
        old.linkname[..target.len()].copy_from_slice(target);
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_size(contents.len() as u64);
        change(&mut header);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(contents);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &[u8], contents: &[u8]) -> Self {
        self.member(name, b'0', b"", contents)
    }

    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut body = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let len = (1..10).map(|digits| rest + digits).find(|len| rest + len.to_string().len() == *len).unwrap();
            body.extend_from_slice(format!("{len} {key}=").as_bytes());
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        self.member(b"PaxHeader", b'x', b"", &body)
    }

    fn bytes(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

fn foreign() -> Given {
    Given { foreign: Some("site".into()), ..Given::default() }
}

#[track_caller]
fn refused(archive: &[u8], given: &Given, text: &str) -> PortableError {
    let error = read(archive, given).map(|r| shown(&r.1)).expect_err(text);
    assert!(error.to_string().contains(text), "'{error}' has no '{text}'");
    error
}

#[test]
fn hostile_members_are_refused_by_name() {
    let long = vec![b'a'; 70_000];
    let target = vec![b't'; 4097];
    let deep = [b"d/".repeat(1001), b"x".to_vec()].concat();
    let far = [b"directory/".repeat(410), b"x".to_vec()].concat();
    let big_pax = vec![b'v'; (1 << 20) + 1];
    let xattr_name = format!("SCHILY.xattr.{}", "n".repeat(256));
    let raw = Raw::default;
    let cases: Vec<(&str, Raw)> = vec![
        ("absolute path", raw().file(b"/etc/passwd", b"x")),
        ("absolute path", raw().pax(&[("path", b"/etc/passwd")]).file(b"good", b"x")),
        ("absolute path", raw().member(b"L", b'L', b"", b"/etc/passwd\0").file(b"good", b"x")),
        ("leads out", raw().file(b"../up", b"x")),
        ("leads out", raw().file(b"a/../../up", b"x")),
        ("leads out", raw().member(b"..", b'5', b"", b"")),
        ("empty name", raw().file(b"", b"x")),
        ("zero byte", raw().pax(&[("path", b"a\0b")]).file(b"good", b"x")),
        ("zero byte", raw().member(b"L", b'L', b"", b"a\0b\0").file(b"good", b"x")),
        ("65536 are the most", raw().pax(&[("path", &long)]).file(b"good", b"x")),
        ("more than 1048576 bytes", raw().pax(&[("comment", &big_pax)]).file(b"good", b"x")),
        ("more than 1048576 bytes", raw().member(b"L", b'L', b"", &big_pax).file(b"good", b"x")),
        ("is a device", raw().member(b"dev", b'3', b"", b"")),
        ("is a device", raw().member(b"dev", b'4', b"", b"")),
        ("is a fifo", raw().member(b"pipe", b'6', b"", b"")),
        ("type 'V'", raw().member(b"label", b'V', b"", b"")),
        ("type 'M'", raw().member(b"more", b'M', b"", b"")),
        ("type 'D'", raw().member(b"dump", b'D', b"", b"x")),
        ("type 'Z'", raw().member(b"what", b'Z', b"", b"")),
        ("without --sparse", raw().member(b"sparse", b'S', b"", b"")),
        ("without --sparse", raw().pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.realsize", b"99999999")]).file(b"sparse", b"x")),
        ("no user or group has", raw().pax(&[("uid", b"4294967296")]).file(b"a", b"x")),
        ("gid is no number", raw().pax(&[("gid", b"-1")]).file(b"a", b"x")),
        ("size is no number", raw().pax(&[("size", b"1e9")]).file(b"a", b"x")),
        ("size that no file has", raw().pax(&[("size", b"18446744073709551615")]).with(b"a", b'0', b"", b"", |_| {})),
        ("size that no file has", raw().with(b"a", b'0', b"", b"x", |h| h.as_old_mut().size = [0xff; 12])),
        ("size is no number", raw().with(b"a", b'0', b"", b"x", |h| h.as_old_mut().size = *b"88888888888\0")),
        ("readers take in different ways", raw().pax(&[("size", b"7")]).file(b"a", b"x")),
        ("readers take in different ways", raw().member(b"dir", b'5', b"", b"x")),
        ("readers take in different ways", raw().file(b"a", b"").member(b"b", b'1', b"a", b"x")),
        ("time that is none", raw().pax(&[("mtime", b"soon")]).file(b"a", b"x")),
        ("two pax headers", raw().pax(&[("mtime", b"1")]).pax(&[("mtime", b"2")]).file(b"a", b"x")),
        ("two long names", raw().member(b"L", b'L', b"", b"a\0").member(b"L", b'L', b"", b"b\0").file(b"a", b"x")),
        ("twice, which readers", raw().pax(&[("path", b"a"), ("path", b"b")]).file(b"a", b"x")),
        ("is damaged: its records", raw().member(b"P", b'x', b"", b"5 a\n").file(b"a", b"x")),
        ("global pax header", raw().member(b"G", b'g', b"", b"12 path=abc\n").file(b"a", b"x")),
        ("gives every member the same", raw().member(b"G", b'g', b"", b"25 SCHILY.xattr.user.a=v\n").file(b"a", b"x")),
        ("more than 1,000 directories deep", raw().pax(&[("path", &deep)]).file(b"a", b"x")),
        ("a path of more than 4,096 bytes", raw().pax(&[("path", &far)]).file(b"a", b"x")),
        ("more than 8 headers", (0..20).fold(raw(), |r, _| r.member(b"G", b'g', b"", b"13 mtime=123\n"))),
        ("describes another member", raw().file(b"a", b"x").pax(&[("mtime", b"1")])),
        ("is there twice", raw().file(b"a", b"x").file(b"./a", b"y")),
        ("is there twice", raw().member(b"a/", b'5', b"", b"").member(b"a", b'5', b"", b"")),
        ("below something that is no directory", raw().file(b"a", b"x").file(b"a/b", b"y")),
        ("below something that is no directory", raw().member(b"a", b'2', b"/etc", b"").file(b"a/passwd", b"y")),
        ("below something that is no directory", raw().member(b"a", b'2', b"/etc", b"").file(b"a/b/c", b"y")),
        ("below it, and is no directory", raw().file(b"a/b", b"x").member(b"a", b'2', b"/etc", b"")),
        ("place of the source itself", raw().file(b".", b"x")),
        ("place of the source itself", raw().member(b".", b'2', b"/etc", b"")),
        ("no file that stands before", raw().member(b"a", b'1', b"b", b"").file(b"b", b"x")),
        ("no file that stands before", raw().member(b"d/", b'5', b"", b"").member(b"a", b'1', b"d", b"")),
        ("no file that stands before", raw().member(b"a", b'1', b"a", b"")),
        ("absolute path", raw().file(b"x", b"").member(b"a", b'1', b"/etc/shadow", b"")),
        ("leads out", raw().file(b"x", b"").member(b"a", b'1', b"../x", b"")),
        ("target is empty", raw().member(b"a", b'2', b"", b"")),
        ("target is empty", raw().member(b"a", b'1', b"", b"")),
        ("longer than 4096 bytes", raw().pax(&[("linkpath", &target)]).member(b"a", b'2', b"x", b"")),
        ("which no system has", raw().pax(&[(&xattr_name, b"v")]).file(b"a", b"x")),
        ("checksum does not match", Raw(b"this is no tar at all, and longer than a block of one".repeat(20))),
        ("checksum does not match", {
            let mut changed = raw().file(b"a", b"x");
            changed.0[0] = b'b';
            changed
        }),
    ];
    for (text, raw) in cases {
        refused(&raw.bytes(), &foreign(), text);
    }
}

#[test]
fn ends_that_are_none_are_refused() {
    let whole = Raw::default().file(b"a", b"x").bytes();
    read(&whole, &foreign()).unwrap();
    read(&[whole.as_slice(), &[0; 10_240]].concat(), &foreign()).unwrap();
    refused(&whole[..1024], &foreign(), "cut off: it has no end");
    refused(&whole[..1536], &foreign(), "its end is not whole");
    refused(&whole[..1600], &foreign(), "ends within a block");
    refused(&[whole.as_slice(), b"x"].concat(), &foreign(), "something follows the end");
    refused(&[&whole[..1536], &whole[..1024]].concat(), &foreign(), "something follows the end");
    refused(&[whole.as_slice(), &whole].concat(), &foreign(), "something follows the end");
    refused(b"", &foreign(), "the archive is empty");
    for (start, text) in [(&b"BZh91AY"[..], "bunzip2"), (b"\xfd7zXZ\0\0\0", "unxz"), (b"PK\x03\x04\0\0\0\0", "zip file")] {
        assert!(matches!(refused(start, &foreign(), text), PortableError::Version(_)));
    }
}

#[test]
fn a_tar_of_another_is_taken_as_a_source_or_not_at_all() {
    let raw = Raw::default()
        .member(b"./", b'5', b"", b"")
        .with(b"./a", b'0', b"", b"one", |h| h.set_mode(0o4755))
        .member(b"dir//b", b'7', b"", b"two")
        .member(b"./hard", b'1', b"./a", b"")
        .member(b"soft", b'2', b"../../etc", b"")
        .file(b"old-directory/", b"")
        .member(b"G", b'g', b"", b"19 comment=whatever\n".get(..19).map(|_| b"20 comment=whatever\n" as &[u8]).unwrap())
        .pax(&[("mtime", b"-1.25"), ("uid", b"4000000000"), ("uname", "jörg".as_bytes()), ("SCHILY.xattr.user.a%3Db", b"v")])
        .member(b"z", b'\0', b"", b"three");
    let archive = raw.bytes();
    assert!(matches!(refused(&archive, &Given::default(), "was not made by keepd"), PortableError::Version(_)));
    let (head, items, totals, tail) = read(&archive, &foreign()).unwrap();
    assert!(head.is_none() && tail.is_none());
    assert_eq!(totals, Totals { entries: 7, files: 3, directories: 2, bytes: 11 });
    let found: Vec<(String, EntryKind, u32, String)> =
        items.iter().map(|(h, c)| (h.path.path.clone(), h.kind, h.mode, String::from_utf8(c.clone()).unwrap())).collect();
    let expected = [
        ("site", EntryKind::Directory, 0o644, ""),
        ("site/a", EntryKind::File, 0o4755, "one"),
        ("site/dir/b", EntryKind::File, 0o644, "two"),
        ("site/hard", EntryKind::Hardlink, 0o644, ""),
        ("site/soft", EntryKind::Symlink, 0o644, ""),
        ("site/old-directory", EntryKind::Directory, 0o644, ""),
        ("site/z", EntryKind::File, 0o644, "three"),
    ];
    assert_eq!(found, expected.map(|(p, k, m, c)| (p.to_owned(), k, m, c.to_owned())));
    assert_eq!(items[3].0.target, Some("site/a".into()));
    assert_eq!(items[4].0.target, Some("../../etc".into()));
    let last = &items[6].0;
    assert_eq!((last.mtime_seconds, last.mtime_nanoseconds, last.uid), (-2, 750_000_000, 4_000_000_000));
    assert_eq!((last.user.as_deref(), last.xattrs.len()), (Some("jörg"), 1));
    assert_eq!(last.xattrs[0], ("user.a=b".into(), BASE64.encode(b"v")));
}

#[test]
fn a_manifest_of_something_else_is_a_file_like_any_other() {
    let manifest = format!(r#"{{"name":"app","icons":["{}"]}}"#, "x".repeat(100_000));
    let archive = Raw::default().file(b"manifest.json", manifest.as_bytes()).file(b"z", b"z").bytes();
    let (head, items, ..) = read(&archive, &foreign()).unwrap();
    assert!(head.is_none());
    assert_eq!(items[0].1, manifest.as_bytes());
    assert_eq!(items[1].0.path, "site/z".into());
    refused(&archive, &Given::default(), "was not made by keepd");
    for (manifest, text) in [
        (r#"{"format":2,"archive":"x"}"#, "of format 2"),
        (r#"{"format":1,"archive":"x"}"#, "manifest.json of the archive is damaged"),
        (r#"{"format":1,"archive":"x"#, "was not made by keepd"),
    ] {
        refused(&Raw::default().file(b"manifest.json", manifest.as_bytes()).bytes(), &Given::default(), text);
    }
}

/// An archive of keepd's with another body than its head says.
fn ours(head: &Head, files: &[(&str, &[u8])], raw: Raw) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let items: Vec<Item> = files.iter().map(|(path, contents)| file(path, contents)).collect();
    let mut manifest = Vec::new();
    let files = (head.contents == Contents::First).then(|| file_list(dir.path(), &items));
    listing::write(&mut manifest, head, files).unwrap();
    let mut all = Raw::default().file(b"manifest.json", &manifest);
    all.0.extend_from_slice(&raw.0);
    all.bytes()
}

#[test]
fn an_archive_of_ours_holds_what_it_says_and_nothing_else() {
    let given = Given::default();
    let items = [directory("s"), file("s/a", b"one"), file("s/b", b"two")];
    let good = head(&items, Contents::First);
    let list: &[(&str, &[u8])] = &[("s/a", b"one"), ("s/b", b"two")];
    let s = || Raw::default().member(b"s/", b'5', b"", b"");
    read(&ours(&good, list, s().file(b"s/a", b"one").file(b"s/b", b"two")), &given).unwrap();
    for (text, raw) in [
        ("SHA-256", s().file(b"s/a", b"ONE").file(b"s/b", b"two")),
        ("is not what its list of files has", s().file(b"s/a", b"one!").file(b"s/b", b"two")),
        ("is not what its list of files has", s().file(b"s/b", b"two")),
        ("and not in the archive", s().file(b"s/a", b"one")),
        ("is not what its list of files has", s().file(b"s/a", b"one").file(b"s/b", b"two").file(b"s/c", b"")),
        ("does not hold what manifest.json says", s().file(b"s/a", b"one").file(b"s/b", b"two").member(b"s/c", b'2', b"x", b"")),
        ("does not hold what manifest.json says", Raw::default().file(b"s/a", b"one").file(b"s/b", b"two")),
        ("is there twice", s().member(b"s", b'5', b"", b"")),
        ("is there twice", s().member(b"s/0", b'2', b"x", b"").member(b"s/0", b'2', b"x", b"")),
        ("in the order of their paths", s().member(b"s/c", b'2', b"x", b"").file(b"s/a", b"one")),
        ("does not name, or that came before", s().member(b"t/c", b'2', b"x", b"")),
        ("does not name, or that came before", s().member(b"/s/c", b'2', b"x", b"")),
        ("no path below a source", s().member(b"s/../c", b'2', b"x", b"")),
        ("no path below a source", s().member(b"s//c", b'2', b"x", b"")),
        ("no path below a source", s().member(b"s/./c", b'2', b"x", b"")),
        ("no directory", s().member(b"s/0", b'2', b"x", b"").member(b"s/0/x", b'2', b"x", b"")),
        ("no directory", s().file(b"s/a", b"one").file(b"s/a/b", b"two")),
        ("outside of its source", s().member(b"s/0", b'1', b"../etc/passwd", b"")),
        ("outside of its source", s().member(b"s/0", b'1', b"/etc/passwd", b"")),
        ("outside of its source", s().member(b"s/0", b'1', b"s/../x", b"")),
        ("does not stand before it", s().member(b"s/0", b'1', b"s/a", b"")),
        ("does not stand before it", s().member(b"s/0", b'1', b"s/0", b"")),
        ("which is no file that stands before it", s().file(b"s/a", b"one").member(b"s/aa", b'1', b"s/Z", b"")),
        ("which is no file that stands before it", s().file(b"s/a", b"one").member(b"s/aa", b'1', b"s", b"")),
        ("is a device", s().member(b"s/0", b'3', b"", b"")),
    ] {
        refused(&ours(&good, list, raw), &given, text);
    }
    for (text, change) in [
        ("is damaged: the name of the archive", Head { archive: "xyz".into(), ..good.clone() }),
        ("which is no name", Head { sources: vec![Source { name: "..".into(), ..Source::default() }], ..good.clone() }),
        ("which is no name", Head { sources: vec![Source { name: "a/b".into(), ..Source::default() }], ..good.clone() }),
        ("which is no name", Head { sources: vec![Source { name: "contents.json".into(), ..Source::default() }], ..good.clone() }),
        ("there twice", Head { sources: [good.sources.clone(), good.sources.clone()].concat(), ..good.clone() }),
        (
            "are the most",
            Head { sources: (0..1001).map(|n| Source { name: n.to_string(), ..Source::default() }).collect(), ..good.clone() },
        ),
        ("no list of files", head(&items, Contents::Last)),
    ] {
        let mut head = change;
        let mut bytes = ours(&head, list, s().file(b"s/a", b"one").file(b"s/b", b"two"));
        if text == "no list of files" {
            head.contents = Contents::First;
            let mut manifest = Vec::new();
            listing::write(&mut manifest, &head, None).unwrap();
            bytes = Raw::default().file(b"manifest.json", &manifest).bytes();
        }
        refused(&bytes, &given, text);
    }
    let wrong = Head { totals: Some(Totals { bytes: 7, ..totals(&items) }), ..good.clone() };
    refused(&ours(&wrong, list, s().file(b"s/a", b"one").file(b"s/b", b"two")), &given, "it should have 3 entries");
}

#[test]
fn heads_that_say_too_much_are_refused() {
    let items = [directory("s")];
    let good = head(&items, Contents::First);
    let body = || Raw::default().member(b"s/", b'5', b"", b"");
    read(&ours(&good, &[], body()), &Given::default()).unwrap();
    let origin = |change: &dyn Fn(&mut Origin)| {
        let mut head = good.clone();
        change(&mut head.origin);
        head
    };
    let long = "x".repeat(4097);
    for (text, head) in [
        ("no name of a job", origin(&|o| o.job = "../shop".into())),
        ("no name of a job", origin(&|o| o.job = "a/b".into())),
        ("no id of a backup", origin(&|o| o.backup = "AB".repeat(32))),
        ("is no time", origin(&|o| o.started = "soon".into())),
        ("is no time", origin(&|o| o.finished = String::new())),
        ("is no time", Head { created: String::new(), ..good.clone() }),
        ("its host has 4097 bytes", origin(&|o| o.host = long.clone())),
        ("its description has 4097 bytes", origin(&|o| o.description = Some(long.clone()))),
        ("101 labels", origin(&|o| o.labels = (0..101).map(|n| (n.to_string(), String::new())).collect())),
        ("its label has 4097 bytes", origin(&|o| o.labels = [(long.clone(), String::new())].into())),
        ("1001 messages", Head { messages: vec![Default::default(); 1001], ..good.clone() }),
        ("65537 users", Head { users: (0..65_537).map(|n| (n, String::new())).collect(), ..good.clone() }),
        ("its name of a user or group", Head { groups: [(0, "x".repeat(257))].into(), ..good.clone() }),
        ("which is no name", Head { sources: vec![Source { name: "a\nb".into(), ..Source::default() }], ..good.clone() }),
    ] {
        assert!(matches!(refused(&ours(&head, &[], body()), &Given::default(), text), PortableError::Hostile(_)));
    }
}

#[test]
fn a_tail_tells_what_came_or_the_archive_is_refused() {
    let given = Given::default();
    let items = [directory("s"), file("s/a", b"one"), file("s/b", b"two")];
    let start = head(&items, Contents::Last);
    let dir = tempfile::tempdir().unwrap();
    let tail_of = |tail: &Tail, listed: &[Item]| {
        let mut out = Vec::new();
        listing::write(&mut out, tail, Some(file_list(dir.path(), listed))).unwrap();
        out
    };
    let body = || Raw::default().member(b"s/", b'5', b"", b"").file(b"s/a", b"one").file(b"s/b", b"two");
    let good = tail_of(&tail(&items), &items);
    read(&ours(&start, &[], body().file(b"contents.json", &good)), &given).unwrap();
    let other = [directory("s"), file("s/a", b"one"), file("s/b", b"TWO")];
    let more = [directory("s"), file("s/a", b"one"), file("s/b", b"two"), file("s/c", b"")];
    for (text, raw) in [
        ("ends without contents.json", body()),
        ("follows contents.json", body().file(b"contents.json", &good).file(b"s/c", b"")),
        ("follows contents.json", body().file(b"contents.json", &good).file(b"contents.json", &good)),
        ("differs at 's/b'", body().file(b"contents.json", &tail_of(&tail(&items), &other))),
        ("differs at 's/c'", body().file(b"contents.json", &tail_of(&tail(&items), &more))),
        ("not in the list at its end", body().file(b"contents.json", &tail_of(&tail(&items), &items[..2]))),
        ("does not hold what contents.json says", body().file(b"contents.json", &tail_of(&tail(&more), &items))),
        ("of another archive", body().file(b"contents.json", &tail_of(&Tail { archive: "00".repeat(16), ..tail(&items) }, &items))),
        ("contents.json of the archive is damaged", body().file(b"contents.json", &good[..good.len() - 3])),
        ("contents.json of the archive is damaged", body().file(b"contents.json", b"{}")),
        ("does not name", body().member(b"contents.json", b'2', b"x", b"")),
    ] {
        refused(&ours(&start, &[], raw), &given, text);
    }
}

#[test]
fn every_byte_of_a_sealed_archive_counts() {
    let items = [directory("s"), file("s/a", b"one"), file("s/b", &noise(300))];
    let (bytes, _) = write(&items, Contents::First, Packing::Zstd, Some(&Profile::of("main", key(1)))).unwrap();
    let given = with_key(1);
    for at in 0..bytes.len() {
        for bit in [1, 0x80] {
            let mut changed = bytes.clone();
            changed[at] ^= bit;
            let mut came = Vec::new();
            let error = read_into(&changed, &given, &mut came).expect_err("a changed archive was read");
            assert!(came.is_empty(), "byte {at}: something of it was given out");
            assert!(!error.to_string().is_empty());
        }
    }
    for len in 0..bytes.len() {
        let mut came = Vec::new();
        let error = read_into(&bytes[..len], &given, &mut came).expect_err("a cut archive was read");
        assert!(came.is_empty() && !error.to_string().is_empty(), "cut at {len}");
    }
    refused(&[bytes.as_slice(), b"x"].concat(), &given, "does not open");
}

#[test]
fn every_change_of_a_plain_archive_is_seen_or_harms_no_contents() {
    let items = [directory("s"), file("s/a", b"one"), file("s/b", &noise(300))];
    for packing in PACKINGS {
        let (bytes, _) = write(&items, Contents::First, packing, None).unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            // Of a header the time or the owner may be another: nothing but sealing proves those. Contents are.
            if let Ok((_, read, ..)) = read(&changed, &Given::default()) {
                for ((_, contents), (_, written)) in read.iter().zip(&items) {
                    assert_eq!(contents, written, "byte {at}, {packing:?}");
                }
            }
        }
        for len in 0..bytes.len() {
            let error = read(&bytes[..len], &Given::default()).map(|r| r.1.len()).expect_err("a cut archive was read");
            assert!(!error.to_string().is_empty(), "cut at {len}");
        }
    }
}

#[test]
fn segments_stand_where_they_were_put() {
    let items = [directory("s"), file("s/a", &noise(3 << 20))];
    let (bytes, _) = write(&items, Contents::First, Packing::None, Some(&Profile::of("main", key(1)))).unwrap();
    let given = with_key(1);
    read(&bytes, &given).unwrap();
    let slots = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let (start, body) = bytes.split_at(64 + slots);
    let segments: Vec<&[u8]> = body.chunks((1 << 20) + 16).collect();
    assert_eq!(segments.len(), 4);
    let of = |order: &[usize]| order.iter().fold(start.to_vec(), |all, n| [all.as_slice(), segments[*n]].concat());
    for (order, text) in [
        (&[1usize, 0, 2, 3][..], "segment 0 of the sealed archive does not open"),
        (&[0, 1, 1, 3], "segment 2 of the sealed archive does not open"),
        (&[0, 1, 1, 2, 3], "segment 2 of the sealed archive does not open"),
        (&[0, 2, 3], "segment 1 of the sealed archive does not open"),
        (&[0, 1, 3], "segment 2 of the sealed archive does not open"),
        (&[0, 1, 2], "cut off after segment 2"),
        (&[0], "cut off after segment 0"),
        (&[], "segment 0 is missing"),
        (&[0, 1, 2, 3, 3], "segment 3 of the sealed archive does not open"),
    ] {
        refused(&of(order), &given, text);
        let mut whole = Vec::new();
        let error = seal::SealedFile::open(
            Cursor::new(of(order)),
            &seal::Keys { keys: vec![key(1)], private: Vec::new(), cancel: CancellationToken::new() },
        )
        .and_then(|mut file| file.read_to_end(&mut whole).map_err(PortableError::Io));
        assert!(error.is_err(), "{order:?}");
    }
}

#[test]
fn what_follows_the_last_segment_is_seen_even_where_it_is_full() {
    // A plaintext of exactly one segment, sealed directly.
    let mut sealer = seal::Sealer::create(Vec::new(), &[7; 16], &Profile::of("main", key(1))).unwrap();
    let plain = noise(2 << 20);
    std::io::Write::write_all(&mut sealer, &plain).unwrap();
    let sealed = sealer.finish().unwrap();
    let keys = seal::Keys { keys: vec![key(1)], private: Vec::new(), cancel: CancellationToken::new() };
    let open = |bytes: &[u8]| {
        let mut out = Vec::new();
        let mut opener = seal::Opener::open(&bytes[8..], &keys).unwrap();
        opener.read_to_end(&mut out).map(|_| out).map_err(|e| e.to_string())
    };
    assert_eq!(open(&sealed).unwrap(), plain);
    assert!(open(&[sealed.as_slice(), b"x"].concat()).unwrap_err().contains("something follows the end"));
    let slots = u32::from_le_bytes(sealed[12..16].try_into().unwrap()) as usize;
    assert_eq!(sealed.len(), 64 + slots + 2 * ((1 << 20) + 16), "no empty segment at the end");
    let mut file = seal::SealedFile::open(Cursor::new(&sealed), &keys).unwrap();
    assert_eq!((file.len(), file.archive()), (2 << 20, [7; 16]));
    for (at, len) in [(0u64, 10usize), ((1 << 20) - 5, 10), ((2 << 20) - 3, 3), (1 << 20, 1 << 20), (5, 1 << 20)] {
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(at)).unwrap();
        let mut out = vec![0; len];
        file.read_exact(&mut out).unwrap();
        assert_eq!(out, &plain[at as usize..at as usize + len]);
    }
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(3 << 20)).unwrap();
    assert_eq!(file.read(&mut [0; 10]).unwrap(), 0);
}

#[test]
fn a_sealed_archive_opens_with_its_key_alone() {
    let items = [directory("s"), file("s/a", b"one")];
    let profile = Profile::of("main", key(1));
    let (bytes, _) = write(&items, Contents::First, Packing::Gzip, Some(&profile)).unwrap();
    let fingerprint = |n| key(n).fingerprint().unwrap().unwrap().to_string();
    for (given, texts) in [
        (Given::default(), vec!["no key was given", "'main'"]),
        (with_key(2), vec!["which does not open it", &fingerprint(1), &fingerprint(2)]),
        (Given { private: vec![Arc::new(PrivateKey::generate().unwrap())], ..Given::default() }, vec!["given was private key"]),
    ] {
        for text in texts {
            assert!(matches!(refused(&bytes, &given, text), PortableError::NotOpen(_)));
        }
    }
    let both = Given { keys: vec![key(2), key(1)], ..Given::default() };
    same(&read(&bytes, &both).unwrap().1, &items);
    let (plain, _) = write(&items, Contents::First, Packing::Gzip, None).unwrap();
    assert!(matches!(refused(&plain, &with_key(1), "is not sealed, and a key was given"), PortableError::NotOpen(_)));
    // Headers that are not keepd's of today.
    for (at, value, text) in [(8, 2, "sealed in format 2"), (9, 30, "another size of segments"), (15, 1, "65536 are the most")] {
        let mut changed = bytes.clone();
        changed[at] = value;
        refused(&changed, &with_key(1), text);
    }
    // Slots that are none, or too many.
    let slots = |text: &str| [&bytes[..12], &(text.len() as u32).to_le_bytes(), &bytes[16..64], text.as_bytes()].concat();
    let len = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let slot = std::str::from_utf8(&bytes[64..64 + len]).unwrap();
    let one = &slot[1..slot.len() - 1];
    refused(&slots(&format!("[{}]", vec![one; 33].join(","))), &with_key(1), "has 33 key slots");
    refused(&slots("{}"), &with_key(1), "key slots of the sealed archive are damaged");
    refused(&slots("[]"), &with_key(1), "sealed for nobody");
    refused(&slots(&slot.replace("key-file", "none")), &with_key(1), "has its key in plain");
    refused(&slots(&slot.replace("\"format\":1", "\"format\":2")), &with_key(1), "of format 2");
    refused(&slots(&slot.replace("00112233", "11112233")), &with_key(1), "another");
    let passphrase = ProfileKey::Passphrase(Arc::new(zeroize::Zeroizing::new("correct horse".to_owned())));
    let (bytes, _) = write(&items, Contents::First, Packing::None, Some(&Profile::of("words", passphrase.clone()))).unwrap();
    refused(&bytes, &with_key(1), "the passphrase of encryption profile 'words'");
    same(&read(&bytes, &Given { keys: vec![key(1), passphrase], ..Given::default() }).unwrap().1, &items);
}

#[test]
fn a_key_sealed_to_a_pair_opens_with_nothing_else() {
    let items = [directory("s"), file("s/a", b"one")];
    let private = Arc::new(PrivateKey::generate().unwrap());
    let profile = Profile { recipient: Some(private.public()), ..Profile::of("offline", key(1)) };
    let (bytes, _) = write(&items, Contents::First, Packing::None, Some(&profile)).unwrap();
    refused(&bytes, &with_key(1), "the private key");
    let given = Given { private: vec![Arc::new(PrivateKey::generate().unwrap()), private], ..Given::default() };
    same(&read(&bytes, &given).unwrap().1, &items);
    let len = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    for at in (0..64 + len).filter(|at| *at < 12 || *at >= 16) {
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        let mut came = Vec::new();
        // The profile's name and the slot's are for people, and nothing proves them.
        if read_into(&changed, &given, &mut came).is_err() {
            assert!(came.is_empty(), "byte {at}");
        } else {
            same(&came, &items);
        }
    }
}

#[test]
fn limits_hold() {
    let items = [directory("s"), file("s/a", b"one"), file("s/b", b"two")];
    let (bytes, _) = write(&items, Contents::First, Packing::None, None).unwrap();
    let given = |limits| Given { limits, ..Given::default() };
    let entries = refused(&bytes, &given(Limits { entries: 2, ..Limits::default() }), "more than 2 entries");
    assert!(matches!(entries, PortableError::TooMuch(_)));
    read(&bytes, &given(Limits { entries: 3, bytes: Some(bytes.len() as u64) })).unwrap();
    refused(&bytes, &given(Limits { bytes: Some(bytes.len() as u64 - 1), ..Limits::default() }), "unpacks to more than");
    // A bomb: 2 GiB of zeros in a few bytes, which never lie in memory.
    let mut bomb = Vec::new();
    let frame = zstd::bulk::compress(&vec![0; 16 << 20], 3).unwrap();
    bomb.extend_from_slice(&zstd::bulk::compress(&Raw::default().with(b"a", b'0', b"", b"", |h| h.set_size(4 << 30)).0, 3).unwrap());
    (0..128).for_each(|_| bomb.extend_from_slice(&frame));
    let error = refused(&bomb, &foreign(), "allow more if that is what it should hold");
    assert!(matches!(error, PortableError::TooMuch(_)));
}

#[test]
fn a_frame_that_wants_much_memory_is_refused() {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.set_parameter(zstd::zstd_safe::CParameter::WindowLog(27)).unwrap();
    encoder.include_contentsize(false).unwrap();
    std::io::Write::write_all(&mut encoder, &Raw::default().file(b"a", &noise(1 << 20)).bytes()).unwrap();
    let archive = encoder.finish().unwrap();
    assert!(matches!(refused(&archive, &foreign(), "window of more than 64 MiB"), PortableError::TooMuch(_)));
}

#[test]
fn a_small_frame_that_wants_much_memory_is_refused_too() {
    let tar = Raw::default().file(b"a", b"x").bytes();
    // Not of a single segment, the content's size in 4 bytes, one raw block.
    let frame = |window_log: u8| {
        let len = tar.len() as u32;
        let block = (len << 3 | 1).to_le_bytes();
        [&[0x28, 0xb5, 0x2f, 0xfd, 0x80, (window_log - 10) << 3][..], &len.to_le_bytes(), &block[..3], &tar].concat()
    };
    assert!(matches!(refused(&frame(27), &foreign(), "window of more than 64 MiB"), PortableError::TooMuch(_)));
    for window_log in [26, 23, 17] {
        read(&frame(window_log), &foreign()).unwrap();
    }
}

#[test]
fn frames_without_contents_end() {
    let nothing = zstd::bulk::compress(b"", 3).unwrap();
    let tar = zstd::bulk::compress(&Raw::default().file(b"a", b"x").bytes(), 3).unwrap();
    read(&[nothing.repeat(1000), tar.clone(), nothing.repeat(1000)].concat(), &foreign()).unwrap();
    refused(&[nothing.repeat(1001), tar].concat(), &foreign(), "more than 1000 empty frames in a row");
}

#[test]
fn compressed_streams_that_are_damaged_say_so() {
    let items = [directory("s"), file("s/a", &noise(5000))];
    for (packing, name) in [(Packing::Gzip, "gzip"), (Packing::Zstd, "zstd")] {
        let (bytes, _) = write(&items, Contents::First, packing, None).unwrap();
        refused(&bytes[..bytes.len() - 1], &Given::default(), &format!("its {name} stream ends early"));
        refused(&[bytes.as_slice(), b"garbage"].concat(), &Given::default(), &format!("{name} stream"));
        let mut changed = bytes.clone();
        let last = changed.len() - 1;
        changed[last] ^= 1;
        refused(&changed, &Given::default(), &format!("{name} stream is damaged"));
    }
}

#[test]
fn a_writer_that_is_told_wrong_things_makes_no_archive() {
    let items = [directory("s"), file("s/a", b"one"), file("s/b", b"two")];
    let dir = tempfile::tempdir().unwrap();
    let options = Options { packing: Packing::None, seal: None, work_dir: dir.path(), cancel: CancellationToken::new() };
    let start =
        || ArchiveWriter::create(Vec::new(), &options, &head(&items, Contents::First), Some(file_list(dir.path(), &items))).unwrap();
    let says = |result: Result<()>, text: &str| {
        let error = result.expect_err(text).to_string();
        assert!(error.contains(text), "{error}");
    };
    let mut writer = start();
    says(writer.contents(b"x"), "contents came without a file");
    writer.entry(&items[0].0).unwrap();
    says(writer.contents(b"x"), "contents came without a file");
    writer.entry(&items[1].0).unwrap();
    says(writer.contents(b"four"), "more contents than the 3 bytes");
    writer.contents(b"on").unwrap();
    says(writer.zeros(2), "more contents than the 3 bytes");
    says(writer.entry(&items[2].0), "has 2 bytes; its entry says 3");
    let mut writer = start();
    writer.entry(&items[1].0).unwrap();
    writer.contents(b"ONE").unwrap();
    says(writer.entry(&items[2].0), "did it change in between?");
    let mut writer = start();
    writer.entry(&items[1].0).unwrap();
    says(writer.known_contents(b"four"), "more contents than the 3 bytes");
    writer.known_contents(b"on").unwrap();
    says(writer.entry(&items[2].0), "has 2 bytes; its entry says 3");
    let mut writer = start();
    writer.entry(&items[2].0).unwrap();
    writer.known_contents(b"two").unwrap();
    says(writer.finish(None).map(drop), "does not stand at its place");
    let mut writer = start();
    writer.entry(&items[2].0).unwrap();
    writer.contents(b"two").unwrap();
    says(writer.finish(None).map(drop), "does not stand at its place");
    let mut writer = start();
    writer.entry(&items[1].0).unwrap();
    writer.contents(b"one").unwrap();
    says(writer.entry(&items[0].0), "in the order of their paths");
    let mut writer = ArchiveWriter::create(Vec::new(), &options, &head(&items, Contents::Last), None).unwrap();
    writer.entry(&items[1].0).unwrap();
    says(writer.known_contents(b"one"), "only where the list of files stands first");
    says(start().finish(None).map(drop), "did not come");
    says(start().finish(Some(&tail(&items))).map(drop), "a tail comes with contents that stand last");
    let mut writer = start();
    says(writer.entry(&file("other/a", b"").0), "does not name");
    let wrong = Head { archive: "x".into(), ..head(&items, Contents::First) };
    let made = ArchiveWriter::create(Vec::new(), &options, &wrong, Some(file_list(dir.path(), &items))).map(drop);
    says(made, "32 hexadecimal digits");
    says(ArchiveWriter::create(Vec::new(), &options, &head(&items, Contents::First), None).map(drop), "a list of files comes with");
}

#[test]
fn a_writer_that_is_dropped_leaves_nothing_that_opens() {
    let items = [directory("s"), file("s/a", &noise(3 << 20))];
    for packing in PACKINGS {
        for seal in [None, Some(&Profile::of("main", key(1)))] {
            let dir = tempfile::tempdir().unwrap();
            let options = Options { packing, seal, work_dir: dir.path(), cancel: CancellationToken::new() };
            let (out, mut from) = std::io::pipe().map(|(read, write)| (write, read)).unwrap();
            let reading = std::thread::spawn(move || {
                let mut all = Vec::new();
                from.read_to_end(&mut all).map(|_| all)
            });
            let mut writer =
                ArchiveWriter::create(out, &options, &head(&items, Contents::First), Some(file_list(dir.path(), &items))).unwrap();
            writer.entry(&items[0].0).unwrap();
            writer.entry(&items[1].0).unwrap();
            writer.contents(&items[1].1).unwrap();
            drop(writer);
            let came = reading.join().unwrap().unwrap();
            let given = if seal.is_some() { with_key(1) } else { Given::default() };
            read(&came, &given).map(|r| r.1.len()).expect_err("half an archive was read");
        }
    }
}

/// Takes so many bytes.
struct Full(usize);

impl std::io::Write for Full {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 = self.0.checked_sub(bytes.len()).ok_or(std::io::ErrorKind::StorageFull)?;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn an_output_that_is_full_is_an_error_of_the_place() {
    let items = [directory("s"), file("s/a", &noise(40 << 20))];
    for packing in PACKINGS {
        for room in [0, 100, 5 << 20, 20 << 20] {
            let dir = tempfile::tempdir().unwrap();
            let profile = Profile::of("main", key(1));
            let options = Options { packing, seal: (room > 0).then_some(&profile), work_dir: dir.path(), cancel: CancellationToken::new() };
            let write = || -> Result<()> {
                let mut writer =
                    ArchiveWriter::create(Full(room), &options, &head(&items, Contents::First), Some(file_list(dir.path(), &items)))?;
                writer.entry(&items[0].0)?;
                writer.entry(&items[1].0)?;
                for piece in items[1].1.chunks(100_000) {
                    writer.contents(piece)?;
                }
                writer.finish(None).map(drop)
            };
            match write() {
                Err(PortableError::Io(e)) => assert_eq!(e.kind(), std::io::ErrorKind::StorageFull),
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn both_ways_can_be_cancelled() {
    let items = [directory("s"), file("s/a", &noise(4 << 20))];
    let cancel = CancellationToken::new();
    cancel.cancel();
    let dir = tempfile::tempdir().unwrap();
    let options = Options { packing: Packing::None, seal: None, work_dir: dir.path(), cancel: cancel.clone() };
    let mut writer =
        ArchiveWriter::create(Vec::new(), &options, &head(&items, Contents::First), Some(file_list(dir.path(), &items))).unwrap();
    writer.entry(&items[1].0).unwrap();
    assert!(matches!(writer.contents(&items[1].1), Err(PortableError::Cancelled)));
    // An input that never comes to an end holds nobody.
    let (from, to) = std::io::pipe().unwrap();
    let given = Given { cancel, ..Given::default() };
    assert!(matches!(open(from, &given), Err(PortableError::Cancelled)));
    drop(to);
}

/// An input that fails after so many bytes.
struct Failing(Cursor<Vec<u8>>);

impl Read for Failing {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        match self.0.read(into)? {
            0 => Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "the disk is gone")),
            n => Ok(n),
        }
    }
}

#[test]
fn an_input_that_fails_is_an_error_of_the_place() {
    let items = [directory("s"), file("s/a", &noise(3 << 20))];
    for packing in PACKINGS {
        for seal in [None, Some(&Profile::of("main", key(1)))] {
            let (bytes, _) = write(&items, Contents::First, packing, seal).unwrap();
            let given = if seal.is_some() { with_key(1) } else { Given::default() };
            for len in [0, 4, 30, 100, 2 << 20] {
                let result = open(Failing(Cursor::new(bytes[..len].to_vec())), &given).and_then(ArchiveReader::finish);
                match result {
                    Err(PortableError::Io(e)) => assert_eq!(e.kind(), std::io::ErrorKind::TimedOut),
                    other => panic!("{len}: {other:?}"),
                }
            }
        }
    }
}
