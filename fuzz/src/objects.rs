//! Sealed objects of a repository, before and behind their seal.

use keepd::attack;
use keepd::crypto::object::FOOTER_ORDINAL;
use keepd::crypto::{Keyring, MasterKey, ObjectHeader, ObjectKind, TAG_BYTES};
use keepd::repository::condemned::Condemned;
use keepd::repository::index::Index;
use keepd::repository::pack::{self, ChunkOpener, SealedChunk};
use keepd::repository::page::{self, PageBuilder};
use keepd::repository::{ChunkId, Entry, Manifest, Mark, Segment};

/// Chunks and pages are never longer.
const MAX_CHUNK: usize = 4 << 20;
const REPOSITORY: [u8; 16] = [3; 16];

fn keys() -> Keyring {
    Keyring::of(MasterKey::from_bytes([7; 32]))
}

/// A whole pack: as it comes (an even first byte), or one whose header is genuine and whose footer was sealed by whoever has the key.
pub fn pack(data: &[u8]) -> bool {
    let Some((way, rest)) = data.split_first() else { return false };
    let keys = keys();
    let bytes = match way & 1 {
        0 => rest.to_vec(),
        _ => {
            // So many bytes of sealed chunks, then the footer in plain.
            let Some((len, rest)) = rest.split_first() else { return false };
            let (chunks, footer) = rest.split_at((*len as usize).min(rest.len()));
            let kind = if way & 2 == 0 { ObjectKind::DataPack } else { ObjectKind::MetaPack };
            let Ok(header) = keys.header(kind, &REPOSITORY) else { return false };
            let mut bytes = header.bytes().to_vec();
            bytes.extend_from_slice(chunks);
            let Ok(cipher) = keys.cipher(&header) else { return false };
            cipher.seal(FOOTER_ORDINAL, footer, &mut bytes).expect("a footer is sealed");
            bytes.extend_from_slice(&((footer.len() + TAG_BYTES) as u32).to_le_bytes());
            bytes
        }
    };
    let Ok(contents) = pack::contents(&keys, &REPOSITORY, &bytes) else { return false };
    assert!(pack::chunks_end(&contents.chunks) <= bytes.len() as u64, "chunks end within their pack");
    let Ok(cipher) = pack::cipher(&keys, &contents.header, &bytes, &contents.chunks) else { return false };
    let (mut opener, mut raw) = (ChunkOpener::default(), Vec::new());
    for (ordinal, c) in contents.chunks.iter().enumerate() {
        let sealed = bytes.get(c.offset as usize..c.offset as usize + c.sealed_len as usize).expect("a chunk lies in its pack");
        let sealed = SealedChunk { ordinal: ordinal as u64, id: c.id, len: c.len, bytes: sealed };
        if opener.open_into(&cipher, &keys.chunk_id_key(), &sealed, &mut raw).is_ok() {
            assert_eq!(pack::chunk_id(&keys.chunk_id_key(), &raw), c.id);
        }
        let _ = opener.open_frame(&cipher, &sealed);
    }
    !contents.chunks.is_empty()
}

/// A footer that was opened.
pub fn footer(data: &[u8]) -> bool {
    let read = attack::footer(data);
    if let Ok(again) = &read {
        assert_eq!(attack::footer(again).as_ref(), Ok(again), "what was read is written and read the same");
    }
    for size in [data.len() as u64, u64::from(u32::MAX), u64::MAX] {
        if let Some(trailer) = data.last_chunk::<4>()
            && let Ok((start, len)) = pack::footer_range(size, *trailer)
        {
            assert!(start + len + 4 == size && start >= 64, "a footer lies in its pack");
        }
    }
    data.len() > 1 && read.is_ok()
}

/// An index object that was opened.
pub fn index(data: &[u8]) -> bool {
    let Ok(index) = Index::decode(data) else { return false };
    assert_eq!(Index::decode(&index.encode()).expect("what was written is read"), index);
    for pack in &index.packs {
        assert!(pack.chunks.iter().all(|c| u64::from(c.offset) + u64::from(c.sealed_len) < pack.size && c.len as usize <= MAX_CHUNK));
    }
    !index.packs.is_empty()
}

/// A manifest that was opened; and as a sealed object.
pub fn manifest(data: &[u8]) -> bool {
    let _ = Manifest::open(&keys(), &REPOSITORY, data);
    let Ok(manifest) = minicbor::decode::<Manifest>(data) else { return false };
    let _ = (manifest.bytes(), manifest.entries(), manifest.known_as(&[1; 32]));
    let written = minicbor::to_vec(&manifest).expect("it is written");
    assert_eq!(minicbor::decode::<Manifest>(&written).expect("what was written is read"), manifest);
    true
}

/// Marks and lists of condemned packs that were opened, and headers.
pub fn records(data: &[u8]) -> bool {
    let _ = ObjectHeader::parse(data, &REPOSITORY);
    let mut is_taken = false;
    if let Ok(mark) = minicbor::decode::<Mark>(data) {
        let written = minicbor::to_vec(&mark).expect("it is written");
        assert_eq!(minicbor::decode::<Mark>(&written).expect("what was written is read"), mark);
        is_taken = true;
    }
    if let Ok(list) = minicbor::decode::<Condemned>(data) {
        let written = minicbor::to_vec(&list).expect("it is written");
        assert_eq!(minicbor::decode::<Condemned>(&written).expect("what was written is read"), list);
        is_taken = true;
        let _ = keepd::repository::condemned::is_over(list.time, 0, std::time::Duration::from_secs(1));
    }
    let _ = keepd::crypto::Keyring::from_bytes(data);
    is_taken
}

/// A payload that was opened; its first byte says how long what comes out may be.
pub fn payload(data: &[u8]) -> bool {
    let Some((limit, rest)) = data.split_first() else { return false };
    let limit = 1usize << (limit % 23);
    let read = keepd::repository::payload::decompress(rest, limit);
    if let Ok(raw) = &read {
        assert!(raw.len() <= limit, "no more comes out than may");
    }
    if let Some(frame) = keepd::repository::payload::zstd_frame(rest, limit) {
        assert!(keepd::repository::payload::is_frugal_frame(frame));
    }
    read.is_ok_and(|raw| !raw.is_empty())
}

/// Pages of entries, and lists of segments.
pub fn entry_stream(data: &[u8]) -> bool {
    let _ = page::references(data);
    let mut is_list = false;
    if let Ok(segments) = page::decode_list(data) {
        is_list = !segments.is_empty();
        bounded(&segments);
        assert_eq!(page::decode_list(&page::encode_list(&segments)).expect("what was written is read"), segments);
    }
    let Ok(entries) = page::decode_page(data) else { return is_list };
    let mut pages = PageBuilder::default();
    let mut built: Vec<_> = Vec::new();
    for paged in &entries {
        no_way_out(&paged.entry);
        bounded(&paged.entry.content.segments);
        if paged.entry.kind == keepd::repository::Kind::File && paged.lists.is_empty() {
            assert_eq!(
                paged.entry.content.segments.iter().map(Segment::len).sum::<u64>(),
                paged.entry.size,
                "contents are as long as they should be"
            );
        }
        built.extend(pages.push(paged));
    }
    built.extend(pages.finish());
    let again: Vec<_> = built.iter().flat_map(|page| page::decode_page(&page.bytes).expect("what was written is read")).collect();
    assert_eq!(again, entries);
    is_list || !entries.is_empty()
}

fn no_way_out(entry: &Entry) {
    let odd = |c: &[u8]| c.is_empty() || c == b"." || c == b".." || c.contains(&0);
    assert!(entry.path.is_empty() || !entry.path.split(|b| *b == b'/').any(odd), "a path leads nowhere else");
}

fn bounded(segments: &[Segment]) {
    for segment in segments {
        if let Segment::Data(extent) = segment {
            assert!(extent.offset as usize + extent.len as usize <= MAX_CHUNK);
        }
    }
    let _: Vec<ChunkId> = keepd::repository::reader::chunks_of(segments);
}
