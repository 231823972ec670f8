//! Makes a repository with a long history, for `bench/large.sh`: `large DIR BACKUPS CHUNKS`. Each backup has its share of new chunks (of
//! a hundred bytes: their number matters here, not their size) and refers to those of the backup before, too.

use std::path::Path;

use jiff::{SignedDuration, Timestamp};
use keepd::config::{Compression, Destination};
use keepd::repository::entry::Texture;
use keepd::repository::source_writer::SourceWriter;
use keepd::repository::writer::{Writer, commit};
use keepd::repository::{Content, Entry, EntrySink, Extent, Kind, Manifest, OpenOptions, Repository, Segment};
use keepd::storage::Storage;
use minicbor::bytes::ByteArray;
use tokio_util::sync::CancellationToken;

const CHUNK_BYTES: usize = 100;

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    // `cargo bench` itself adds an argument.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let [dir, backups, chunks] = arguments.as_slice() else {
        println!("usage: large DIR BACKUPS CHUNKS");
        return Ok(());
    };
    let (backups, chunks): (u64, u64) = (backups.parse()?, chunks.parse()?);
    let runtime = tokio::runtime::Runtime::new()?;
    let destination = Destination::plain("local", "fs", [("root".to_owned(), format!("{dir}/repository").as_str().into())].into());
    let storage = Storage::open(&destination, runtime.handle().clone())?;
    let options = OpenOptions {
        profile: None,
        compression: Compression::Zstd,
        cache_root: &Path::new(dir).join("cache"),
        known_id: None,
        create: true,
        memory: 256 << 20,
    };
    let repository = Repository::open(storage, &options)?;
    let (mut last, mut predecessor) = (Vec::new(), None);
    let start = Timestamp::now().checked_sub(SignedDuration::from_hours(backups as i64))?;
    let mut noise = blake3::Hasher::new().finalize_xof();
    for n in 0..backups {
        let mut writer = Writer::new(repository.clone(), CancellationToken::new())?;
        let mut sink = SourceWriter::new(&mut writer, "files", "files", b"/data", None);
        sink.push(Entry { kind: Kind::Directory, mode: 0o755, ..Entry::default() })?;
        let mut new = Vec::new();
        for _ in 0..chunks / backups {
            let mut chunk = [0; CHUNK_BYTES];
            noise.fill(&mut chunk);
            let chunk = sink.store(&chunk, Texture::Mixed)?;
            new.push(Segment::Data(Extent { chunk, offset: 0, len: CHUNK_BYTES as u32 }));
        }
        for (name, segments) in [(b"a", &new), (b"b", &last)] {
            let size = segments.iter().map(Segment::len).sum();
            let content = Content { segments: segments.clone(), ..Content::default() };
            sink.push(Entry { path: name.to_vec(), kind: Kind::File, mode: 0o644, size, content, ..Entry::default() })?;
        }
        let source = sink.finish("{}".into())?.source;
        let flushed = writer.flush()?;
        let time = start.checked_add(SignedDuration::from_hours(n as i64))?.to_string();
        let manifest = Manifest {
            format: 1,
            repository: ByteArray::from(repository.raw_id()),
            sequence: n + 1,
            predecessor: predecessor.map(ByteArray::from),
            job: "bench".into(),
            run: format!("run{n}"),
            started: time.clone(),
            finished: time,
            r#type: "scheduled".into(),
            outcome: "good".into(),
            name: None,
            labels: Vec::new(),
            host: "bench".into(),
            keepd_version: env!("CARGO_PKG_VERSION").into(),
            sources: vec![source],
            users: Vec::new(),
            groups: Vec::new(),
            messages: Vec::new(),
            left_out: 0,
            added_bytes: flushed.added_bytes,
            new_bytes: Some(flushed.new_bytes),
            parent: predecessor.map(ByteArray::from),
            origin: None,
            description: None,
            version: None,
            schema_version: None,
        };
        predecessor = Some(commit(&repository, &manifest, &flushed)?);
        last = new;
    }
    Ok(())
}
