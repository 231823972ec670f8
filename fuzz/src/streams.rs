//! What comes as a stream: archives, dumps, the restore's own stream, frames of the control socket, what plugins print.

use std::fs;
use std::io::Cursor;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use bytes::BytesMut;
use keepd::attack;
use keepd::control::frames::NulFrames;
use keepd::portable::member::{self, BLOCK, Records};
use keepd::portable::read::OpenWith;
use keepd::portable::{ArchiveReader, Limits, seal};
use keepd_protocol::call::{Call, Reply};
use keepd_protocol::methods::{self, Method};
use keepd_protocol::model::{BytesPath, EntryKind};
use keepd_protocol::restore::{EntryHeader, Frame, FrameReader, FrameWriter, Summary};
use keepd_writer::{Memory, Options};
use serde_json::Value;
use tokio_util::codec::Decoder;
use tokio_util::sync::CancellationToken;

use super::bridge;

/// Where files may be made that nobody needs: in memory, where there is such a place.
fn scratch() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() { memory } else { std::env::temp_dir() }
}

/// An archive; an odd first byte takes one that keepd did not make as a source.
pub fn archive(data: &[u8]) -> bool {
    const MOST: u64 = 16 << 20;
    static WORK: LazyLock<PathBuf> = LazyLock::new(scratch);
    let Some((way, rest)) = data.split_first() else { return false };
    let _ = seal::slots(rest);
    let with = OpenWith {
        keys: &[],
        private_keys: &[],
        limits: Limits { bytes: Some(MOST), entries: 1000 },
        work_dir: &WORK,
        cancel: CancellationToken::new(),
        foreign_source: (way & 1 == 1).then(|| "taken".to_owned()),
    };
    let Ok(mut reader) = ArchiveReader::open(Cursor::new(rest.to_vec()), &with) else { return false };
    let mut buffer = vec![0; 16 << 10];
    let mut total = 0;
    loop {
        let header = match reader.next_entry() {
            Ok(Some(header)) => header,
            Ok(None) => break,
            Err(e) => return told(&e.to_string()),
        };
        let path = header.path.to_bytes().expect("a path");
        assert!(
            !path.split(|b| *b == b'/').any(|c| c == b".." || c.contains(&0)) && path.first() != Some(&b'/'),
            "a path leads nowhere else"
        );
        let mut came = 0;
        if header.kind == EntryKind::File {
            loop {
                match reader.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(n) => came += n as u64,
                    Err(e) => return told(&e.to_string()),
                }
                assert!(came <= header.size, "no more comes than was said");
            }
            assert_eq!(came, header.size, "as much comes as was said");
        }
        total += came;
        assert!(total <= MOST, "no more is unpacked than may be");
    }
    reader.finish().is_ok()
}

/// It was not taken, and why is said.
fn told(why: &str) -> bool {
    assert!(!why.is_empty());
    false
}

/// Header blocks of a tar, and pax records.
pub fn tar_headers(data: &[u8]) -> bool {
    let mut is_taken = false;
    for block in data.chunks_exact(BLOCK) {
        if let Ok(block) = <&[u8; BLOCK]>::try_from(block)
            && let Ok(member::Block::Member(header)) = member::block(block)
        {
            is_taken |= member::entry(&header, &member::Before::default(), &Records::default()).is_ok();
        }
    }
    if let Ok(records) = Records::parse(data) {
        let _ = records.check_global();
        // Under a header that is whole, they have their say.
        let header = EntryHeader { path: BytesPath::from_bytes(b"a/b"), kind: EntryKind::File, ..EntryHeader::default() };
        let blocks = member::blocks(&header).expect("a plain entry is written");
        if let Some(block) = blocks.last_chunk::<BLOCK>()
            && let Ok(member::Block::Member(header)) = member::block(block)
        {
            let before = member::Before { pax: Some(records), ..member::Before::default() };
            if let Ok((entry, path, target)) = member::entry(&header, &before, &Records::default()) {
                assert!(!path.contains(&0));
                let entry = EntryHeader {
                    path: BytesPath::from_bytes(&path),
                    target: (!target.is_empty()).then(|| BytesPath::from_bytes(&target)),
                    ..entry
                };
                let _ = member::blocks(&entry);
                is_taken = true;
            }
        }
    }
    is_taken
}

/// Frames in both directions: calls and replies, however they arrive, and the frames of a bridge.
pub fn control_frames(data: &[u8]) -> bool {
    let whole = frames(data, data.len().max(1));
    for step in [1, 7] {
        assert_eq!(frames(data, step), whole, "frames do not depend on how bytes arrive");
    }
    let mut is_taken = false;
    for frame in whole.0 {
        if let Ok(call) = serde_json::from_slice::<Call>(&frame) {
            let again = serde_json::to_vec(&call).expect("a call is written");
            assert_eq!(serde_json::from_slice::<Call>(&again).expect("what was written is read").method, call.method);
            parameters(&call.parameters.unwrap_or_default());
            is_taken = true;
        }
        if let Ok(reply) = serde_json::from_slice::<Reply>(&frame) {
            parameters(&reply.parameters.unwrap_or_default());
        }
    }
    let mut input = data;
    while let Ok(Some(frame)) = bridge::read(&mut input) {
        assert!(frame.payload.len() <= bridge::MAX_PAYLOAD);
        let header = bridge::header(frame.kind, frame.id, frame.payload.len());
        let again = bridge::read(&mut &[&header[..], &frame.payload].concat()[..]).expect("what was written is read").expect("a frame");
        assert_eq!((again.kind, again.id, again.payload), (frame.kind, frame.id, frame.payload.clone()));
        let _ = serde_json::from_slice::<bridge::Hello>(&frame.payload);
        let _ = serde_json::from_slice::<Vec<bridge::Passed>>(&frame.payload);
        is_taken = true;
    }
    is_taken
}

fn frames(data: &[u8], step: usize) -> (Vec<Vec<u8>>, bool) {
    let (mut decoder, mut buffer, mut found) = (NulFrames::new(4096), BytesMut::new(), Vec::new());
    for piece in data.chunks(step) {
        buffer.extend_from_slice(piece);
        loop {
            match decoder.decode(&mut buffer) {
                Ok(Some(frame)) => found.push(frame.to_vec()),
                Ok(None) => break,
                Err(_) => return (found, false),
            }
        }
    }
    (found, true)
}

/// As what goes in and what comes out of each method.
fn parameters(value: &Value) {
    fn of<M: Method>(value: &Value) {
        let into = serde_json::from_value::<M::In>(value.clone()).map(|v| serde_json::to_vec(&v));
        let out = serde_json::from_value::<M::Out>(value.clone()).map(|v| serde_json::to_vec(&v));
        for bytes in [into, out].into_iter().flatten() {
            assert!(!bytes.expect("what was read is written").is_empty());
        }
    }
    of::<methods::GetStatus>(value);
    of::<methods::StartBackup>(value);
    of::<methods::StartRestore>(value);
    of::<methods::StartInPlace>(value);
    of::<methods::StartExport>(value);
    of::<methods::InitiateImport>(value);
    of::<methods::UploadImport>(value);
    of::<methods::ImportConfig>(value);
    of::<methods::PreviewConfig>(value);
    of::<methods::EditConfig>(value);
    of::<methods::ListBackups>(value);
    of::<methods::ListEntries>(value);
    of::<methods::ShowBackup>(value);
    of::<methods::FollowRun>(value);
    of::<methods::ListAudit>(value);
    of::<methods::MakeKit>(value);
}

/// What a storage plugin printed.
pub fn plugin_answers(data: &[u8]) -> bool {
    let (object, listing) = attack::plugin(data);
    let is_taken = object.is_ok() || listing.is_ok();
    if let Ok(len) = object {
        assert!(len <= data.len(), "an object's bytes are those that came");
    }
    if let Ok(names) = listing {
        assert!(names.iter().all(|name| name.starts_with("packs/") && !name.ends_with('/')), "what was asked for is listed");
    }
    is_taken
}

/// A dump of MySQL.
pub fn mysql_dump(data: &[u8]) -> bool {
    let whole = attack::mysql_dump(data, data.len());
    for piece in [1, 7] {
        assert_eq!(attack::mysql_dump(data, piece), whole, "a dump is read the same, however it comes");
    }
    matches!(whole, Ok(Some(_)))
}

/// An archive of PostgreSQL.
pub fn postgres_archive(data: &[u8]) -> bool {
    let whole = attack::postgres_archive(data, data.len());
    for piece in [1, 7, 64] {
        let in_pieces = attack::postgres_archive(data, piece);
        assert_eq!(in_pieces.is_ok(), whole.is_ok(), "an archive is read the same, however it comes");
        if let (Ok(a), Ok(b)) = (&in_pieces, &whole) {
            assert_eq!(a, b);
        }
    }
    matches!(whole, Ok(Some(_)))
}

/// The stream of a restore. An odd first byte: the rest says what a hostile daemon sends; else it is the stream itself. Nothing is written outside.
pub fn restore_stream(data: &[u8]) -> bool {
    let Some((way, rest)) = data.split_first() else { return false };
    let stream = if way & 1 == 0 { rest.to_vec() } else { composed(rest) };
    let mut reader = FrameReader::new(&stream[..]);
    let mut taken = vec![0; 1 << 16];
    while let Ok(Some(frame)) = reader.next_frame() {
        if let Frame::Data { mut len, .. } = frame {
            while len > 0 {
                let now = len.min(taken.len());
                if reader.data(&mut taken[..now]).is_err() {
                    break;
                }
                len -= now;
            }
            if len > 0 {
                break;
            }
        }
    }
    let world = tempfile::Builder::new().prefix("keepd-fuzz-").tempdir_in(scratch()).expect("a directory");
    let (outside, to) = (world.path().join("outside"), world.path().join("to"));
    fs::create_dir(&outside).expect("a directory");
    fs::write(outside.join("canary"), "sings").expect("a file");
    fs::create_dir(&to).expect("a directory");
    // What a user may have made there before.
    symlink(&outside, to.join("link")).expect("a link");
    let before = state_of(&outside);
    let memory = if way & 16 != 0 { Some(Memory::offer().expect("memory").0) } else { None };
    let options = Options { overwrite: way & 2 != 0, numeric_owner: way & 4 != 0, memory };
    let written = match way & 8 {
        0 => keepd_writer::write(&stream[..], &to, options, &|_, _| ()),
        _ => keepd_writer::write_what_can_be(&stream[..], &to, options, &|_, _| ()),
    };
    assert_eq!(state_of(&outside), before, "nothing is written outside");
    let mut names: Vec<_> = fs::read_dir(world.path()).expect("it is there").map(|e| e.expect("listed").file_name()).collect();
    names.sort();
    assert_eq!(names, ["outside", "to"], "nothing is written beside");
    written.is_ok_and(|outcome| outcome.entries > 0)
}

/// Path, mode, names, modification time, owner and contents of what lies somewhere.
type State = Vec<(PathBuf, u32, u64, i64, i64, u32, Vec<u8>)>;

fn state_of(outside: &Path) -> State {
    let mut paths = vec![outside.to_owned()];
    paths.extend(fs::read_dir(outside).expect("it is there").map(|e| e.expect("listed").path()));
    let state = |path: PathBuf| {
        let m = fs::symlink_metadata(&path).expect("it is there");
        let contents = if m.is_file() { fs::read(&path).unwrap_or_default() } else { Vec::new() };
        (path, m.mode(), m.nlink(), m.mtime(), m.mtime_nsec(), m.uid(), contents)
    };
    let mut all: Vec<_> = paths.into_iter().map(state).collect();
    all.sort();
    all
}

/// Streams of frames that are well formed, and as mean as they can be.
fn composed(mut rest: &[u8]) -> Vec<u8> {
    const PATHS: [&[u8]; 16] = [
        b"a",
        b"a/b",
        b"a/b/c",
        b"link",
        b"link/canary",
        b"../outside/canary",
        b"/dev/shm/x",
        b"a/../../outside/new",
        b"b",
        b"b/c",
        b"a/link",
        b"a/link/canary",
        b"",
        b".",
        b"a\0b",
        b"b/",
    ];
    const OFFSETS: [u64; 8] = [0, 1, 255, 4096, u64::MAX, u64::MAX / 2, 1 << 40, 7];
    const TARGETS: [&[u8]; 6] = [b"../outside", b"../outside/canary", b"a", b"a/b", b"link/canary", b"/"];
    let mut byte = || {
        let (first, more) = rest.split_first()?;
        rest = more;
        Some(*first)
    };
    let mut out = Vec::new();
    let (mut index, mut summary) = (0u64, Summary::default());
    while let (Some(what), Some(path)) = (byte(), byte()) {
        let path = PATHS[usize::from(path % 16)];
        let kind = [EntryKind::File, EntryKind::Directory, EntryKind::Symlink, EntryKind::Hardlink][usize::from(what % 4)];
        let of = index.saturating_sub(u64::from(what >> 7));
        let sent = match (what >> 2) % 8 {
            0..=3 => {
                let mut header =
                    EntryHeader { index, path: BytesPath::from_bytes(path), kind, mode: u32::from(what) << 4, ..EntryHeader::default() };
                header.size = u64::from(byte().unwrap_or(0));
                let contents = vec![b'x'; if kind == EntryKind::File && what & 0x40 != 0 { header.size as usize } else { 0 }];
                header.inline = what & 0x40 != 0;
                if kind == EntryKind::Symlink || kind == EntryKind::Hardlink {
                    header.target = Some(BytesPath::from_bytes(TARGETS[usize::from(byte().unwrap_or(0) % 6)]));
                }
                (header.uid, header.gid) = (u32::from(what & 1), u32::from(what & 1));
                index += 1;
                summary.entries += 1;
                summary.bytes += contents.len() as u64;
                FrameWriter::new(&mut out).entry(&header, &contents)
            }
            4 => {
                let offset = OFFSETS[usize::from(byte().unwrap_or(0) % 8)];
                summary.bytes += 5;
                // As no writer of keepd's would: the end may lie beyond all numbers.
                out.extend_from_slice(&[2, 21, 0, 0, 0]);
                out.extend_from_slice(&of.saturating_sub(1).to_le_bytes());
                out.extend_from_slice(&u64::to_le_bytes(offset));
                out.extend_from_slice(b"bytes");
                Ok(())
            }
            5 => {
                let place = byte().unwrap_or(0);
                let len = [0, 5, 4096, 4 << 20, (4 << 20) + 1, u32::MAX][usize::from(place >> 3) % 6];
                let block = [0, 1, 3, 4, 15, 16, 255, u32::MAX][usize::from(byte().unwrap_or(0) % 8)];
                summary.bytes += u64::from(len);
                FrameWriter::new(&mut out).shared(of.saturating_sub(1), OFFSETS[usize::from(place % 8)], block, len)
            }
            6 => FrameWriter::new(&mut out).end(of.saturating_sub(1)),
            _ => FrameWriter::new(&mut out).lost(of.saturating_sub(1)),
        };
        if sent.is_err() {
            break;
        }
    }
    let _ = FrameWriter::new(&mut out).finish(&summary);
    out
}
