//! The engine's parts, one by one: `cargo bench` (or `make bench-parts`). What a whole command costs, and what the other
//! programs of the field take for the same, is measured by `bench/run.sh`.

use std::hint::black_box;
use std::path::Path;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use keepd::config::{Compression, FilesSource};
use keepd::crypto::{Keyring, MasterKey, ObjectKind};
use keepd::repository::entry::Texture;
use keepd::repository::index::IndexedPack;
use keepd::repository::local::LocalIndex;
use keepd::repository::pack::{PackBuilder, PackMemory, PackedChunk, Prover, chunk_id};
use keepd::repository::page::{PageBuilder, PagedEntry, decode_page};
use keepd::repository::payload::{Compressor, decompress};
use keepd::repository::{ChunkId, Content, Entry, EntrySink, Extent, Kind, Segment, SinkError, chunker};
use keepd::source::{Context, Previous, Report, files};
use tokio_util::sync::CancellationToken;

const MIB: usize = 1 << 20;

/// Bytes that do not compress, the same in every run.
fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        out.extend_from_slice(&seed.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// Rows as an application's database holds them: words, numbers, times; zstd makes about a third of them.
fn rows(len: usize) -> Vec<u8> {
    let words = ["order", "customer", "shipped", "invoice", "paid", "pending", "street", "note", "quantity", "article"];
    let (mut out, numbers) = (Vec::with_capacity(len + 64), noise(8 * MIB, 7));
    let mut numbers = numbers.chunks_exact(8).map(|n| u64::from_le_bytes(n.try_into().unwrap_or_default())).cycle();
    while out.len() < len {
        let n = numbers.next().unwrap_or_default();
        let (a, b) = (words[n as usize % 10], words[(n >> 8) as usize % 10]);
        out.extend_from_slice(format!("{}|{a} {b}|2026-{:02}-{:02}|{:x};", n % 1_000_000, n % 12 + 1, n % 28 + 1, n >> 40).as_bytes());
    }
    out.truncate(len);
    out
}

fn chunking(c: &mut Criterion) {
    let data = noise(32 * MIB, 3);
    let mut group = c.benchmark_group("chunker");
    group.throughput(Throughput::Bytes(data.len() as u64));
    group.bench_function("cut incompressible data", |b| {
        let mut chunker = chunker::Chunker::new(Keyring::of(MasterKey::from_bytes([1; 32])).gear());
        b.iter(|| {
            chunker.clear();
            let mut rest = &data[..];
            let mut chunks = 0;
            while !rest.is_empty() {
                let space = chunker.space(rest.len().min(MIB));
                let (now, later) = rest.split_at(space.len());
                space.copy_from_slice(now);
                chunker.filled(now.len());
                rest = later;
                while chunker.next_chunk(false).is_some() {
                    chunks += 1;
                }
            }
            chunks
        });
    });
    group.bench_function("name a chunk (keyed BLAKE3)", |b| {
        b.iter(|| data.chunks(MIB).map(|chunk| usize::from(black_box(chunk_id(&[2; 32], chunk)).0[0])).sum::<usize>())
    });
    group.finish();
}

fn entries(count: usize) -> Vec<PagedEntry> {
    let entry = |n: usize| Entry {
        path: format!("src/{:03}/module-{:05}.rs", n / 200, n).into_bytes(),
        kind: Kind::File,
        mode: 0o644,
        inode: 1_000_000 + n as u64,
        size: 4000 + n as u64 % 777,
        content: Content {
            hash: [n as u8; 16],
            segments: vec![Segment::Data(Extent {
                chunk: ChunkId([(n / 200) as u8; 32]),
                offset: 4096 * (n as u32 % 200),
                len: 4000 + n as u32 % 777,
            })],
        },
        ..Entry::default()
    };
    (0..count).map(|n| PagedEntry { entry: entry(n), lists: Vec::new() }).collect()
}

fn pages(c: &mut Criterion) {
    let entries = entries(10_000);
    let encode = || {
        let mut builder = PageBuilder::default();
        let mut pages: Vec<_> = entries.iter().filter_map(|e| builder.push(e)).collect();
        pages.extend(builder.finish());
        pages
    };
    let pages = encode();
    let mut group = c.benchmark_group("pages");
    group.throughput(Throughput::Elements(entries.len() as u64));
    group.bench_function("encode entries", |b| b.iter(|| encode().len()));
    group
        .bench_function("decode entries", |b| b.iter(|| pages.iter().map(|p| decode_page(&p.bytes).map_or(0, |e| e.len())).sum::<usize>()));
    group.finish();
}

fn sealing(c: &mut Criterion) {
    let keys = Keyring::of(MasterKey::from_bytes([1; 32]));
    let Ok(cipher) = keys.header(ObjectKind::DataPack, &[1; 16]).and_then(|header| keys.cipher(&header)) else { return };
    let (plain, mut sealed, mut opened) = (noise(MIB, 5), vec![0; MIB + 16], Vec::new());
    let mut group = c.benchmark_group("seal");
    group.throughput(Throughput::Bytes(MIB as u64));
    group.bench_function("seal 1 MiB (AES-256-GCM)", |b| b.iter(|| cipher.seal_into(7, black_box(&plain), &mut sealed).is_ok()));
    group.bench_function("open 1 MiB (AES-256-GCM)", |b| b.iter(|| cipher.open_into(7, black_box(&sealed), &mut opened).is_ok()));
    group.finish();
}

fn packing(c: &mut Criterion) {
    let mut group = c.benchmark_group("pack");
    let keys = Keyring::of(MasterKey::from_bytes([1; 32]));
    for (name, data, texture) in [
        ("rows", rows(8 * MIB), Texture::Mixed),
        ("rows as pages", rows(8 * MIB), Texture::Pages),
        ("incompressible", noise(8 * MIB, 9), Texture::Mixed),
    ] {
        group.throughput(Throughput::Bytes(data.len() as u64));
        let Ok(mut compressor) = Compressor::new(Compression::Zstd) else { return };
        let (memory, mut prover) = (PackMemory::default(), Prover::default());
        let chunks: Vec<(&[u8], ChunkId)> = data.chunks(MIB).map(|raw| (raw, chunk_id(&[2; 32], raw))).collect();
        group.bench_function(format!("compress, seal, prove: {name}"), |b| {
            b.iter(|| {
                let mut builder = PackBuilder::new(&keys, &[1; 16], ObjectKind::DataPack, &memory).ok()?;
                for (raw, id) in &chunks {
                    let payload = compressor.compress(raw, texture).ok()?;
                    let mut place = builder.reserve(*id, payload.len(), raw.len() as u32).ok()?;
                    place.seal(payload, raw, &mut prover).ok()?;
                    builder.give(place);
                }
                let pack = builder.finish(&keys, &[1; 16]).ok()?;
                let len = pack.bytes.len();
                memory.give(pack.bytes);
                Some(len)
            });
        });
        let payloads: Vec<Vec<u8>> = chunks.iter().filter_map(|(raw, _)| Some(compressor.compress(raw, texture).ok()?.to_vec())).collect();
        group.bench_function(format!("decompress: {name}"), |b| {
            b.iter(|| payloads.iter().map(|p| decompress(p, MIB).map_or(0, |raw| raw.len())).sum::<usize>());
        });
    }
    group.finish();
}

fn index(c: &mut Criterion) {
    let Ok(dir) = tempfile::tempdir() else { return };
    let Ok(index) = LocalIndex::open(&dir.path().join("index.sqlite"), "bench") else { return };
    let id = |n: u64| ChunkId(*blake3::hash(&n.to_le_bytes()).as_bytes());
    let (packs, per_pack) = (2_000u64, 100u64);
    let pack = |p: u64| IndexedPack {
        id: id(1 << 40 | p).0,
        size: 16 << 20,
        kind: ObjectKind::DataPack,
        chunks: (0..per_pack)
            .map(|n| PackedChunk { id: id(p * per_pack + n), offset: 64 + n as u32 * 1000, sealed_len: 1000, len: 4000 })
            .collect(),
    };
    if index.load(&[([0; 32], (0..packs).map(pack).collect::<Vec<_>>())]).is_err() {
        return;
    }
    let mut group = c.benchmark_group("index of 200,000 chunks");
    let mut n = 0u64;
    let mut next = move || {
        n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (n >> 33) % (packs * per_pack)
    };
    group.bench_function("look one up", |b| b.iter_batched(&mut next, |n| index.lookup(&id(n)).ok(), BatchSize::SmallInput));
    group.bench_function("look for one that is not there", |b| {
        b.iter_batched(|| 1 << 50, |n| index.lookup(&id(n)).ok(), BatchSize::SmallInput)
    });
    let thousand: Vec<ChunkId> = (0..1000).map(|n| id(n * 199)).collect();
    group.throughput(Throughput::Elements(1000));
    group.bench_function("look a thousand up at once", |b| b.iter(|| index.lens(&thousand).map(|l| l.len()).ok()));
    group.finish();
}

/// The last backup's entries from memory, and a sink that has everything.
struct Last(std::vec::IntoIter<Entry>);

impl Previous for Last {
    fn next_entry(&mut self) -> Result<Option<Entry>, SinkError> {
        Ok(self.0.next())
    }
}

#[derive(Default)]
struct Keep(Vec<Entry>, Vec<u8>);

impl EntrySink for Keep {
    fn push(&mut self, entry: Entry) -> Result<(), SinkError> {
        self.0.push(entry);
        Ok(())
    }
    fn push_small(&mut self, mut entry: Entry, contents: &[u8]) -> Result<(), SinkError> {
        let extent = Extent { chunk: ChunkId([1; 32]), offset: 0, len: contents.len() as u32 };
        (entry.size, entry.content.segments) = (contents.len() as u64, vec![Segment::Data(extent)]);
        self.push(entry)
    }
    fn large_begin(&mut self) -> Result<(), SinkError> {
        Ok(())
    }
    fn large_space(&mut self, want: usize) -> &mut [u8] {
        self.1.resize(want, 0);
        &mut self.1
    }
    fn large_filled(&mut self, _: usize) -> Result<(), SinkError> {
        Ok(())
    }
    fn large_hole(&mut self, _: u64) -> Result<(), SinkError> {
        Ok(())
    }
    fn large_finish(&mut self, entry: Entry) -> Result<(), SinkError> {
        self.push(entry)
    }
    fn store(&mut self, _: &[u8], _: Texture) -> Result<ChunkId, SinkError> {
        Ok(ChunkId([1; 32]))
    }
    fn chunk_len(&mut self, _: &ChunkId) -> Result<Option<u32>, SinkError> {
        Ok(Some(1 << 20))
    }
    fn fetch(&mut self, _: &ChunkId) -> Result<Vec<u8>, SinkError> {
        Ok(Vec::new())
    }
}

/// An increment of a tree in which nothing changed: the walk beside the last manifest's entries.
fn merge(c: &mut Criterion) {
    let Ok(dir) = tempfile::tempdir() else { return };
    for d in 0..50 {
        let sub = dir.path().join(format!("{d:02}"));
        let made = std::fs::create_dir(&sub)
            .and_then(|()| (0..100).try_for_each(|f| std::fs::write(sub.join(format!("{f:03}")), format!("{d} {f}"))));
        if made.is_err() {
            return;
        }
    }
    let source = FilesSource { path: dir.path().to_owned(), exclude: Vec::new(), one_file_system: false, exclude_caches: true };
    let (cancel, report) = (CancellationToken::new(), Report::default());
    let nowhere = Path::new("/nonexistent");
    let context = Context { cancel: &cancel, report: &report, work_dir: nowhere, cache_dir: nowhere };
    let mut first = Keep::default();
    if files::capture(&source, &mut Last(Vec::new().into_iter()), &mut first, &context).is_err() {
        return;
    }
    let mut group = c.benchmark_group("manifest merge");
    group.throughput(Throughput::Elements(first.0.len() as u64));
    group.bench_function("walk 5,000 unchanged files beside the last entries", |b| {
        b.iter_batched(
            || (Last(first.0.clone().into_iter()), Keep::default()),
            |(mut last, mut sink)| files::capture(&source, &mut last, &mut sink, &context).is_ok(),
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

criterion_group!(benches, chunking, pages, sealing, packing, index, merge);
criterion_main!(benches);
