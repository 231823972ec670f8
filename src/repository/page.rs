//! Pages: the entries of a source, in path order, cut into self-contained CBOR chunks.
//!
//! ```text
//! page    = [ [chunk id …], [entry …] ]
//! entry   = [ shared, suffix, kind, mode, uid, gid, [mtime s, ns], [ctime s, ns], inode, size, content, extra ]
//! content = null | [ hash, 0, [t, offset, length, …] ] | [ hash, 1, [n …] ]
//! list    = [ [chunk id …], [t, offset, length, …] ]
//! ```
//! `shared` bytes of the path are those of the entry before. In a triple, t = 0 is a hole of `length` bytes, else the
//! extent lies in chunk t - 1 of the page's table. Contents of many segments stand in lists, chunks of their own, whose
//! ids are at n in the page's table. Where a page ends is decided by the hash of a path, so that an unchanged stretch
//! of entries makes the same page again and costs nothing.

use std::collections::HashMap;

use minicbor::decode::Error as CborError;
use minicbor::{Decoder, Encoder};

use super::entry::{ChunkId, Content, Entry, Extent, Kind, MAX_CHUNK_BYTES, Segment, Time};
use super::pack::decode_id;

/// No page is cut before it has this many bytes.
const MIN_PAGE_BYTES: usize = 8 << 10;
/// About this many entries stand in a page, by the hash of the path.
const ENTRIES_MASK: u64 = 0xff;
/// A page is cut when it reaches this length.
const MAX_PAGE_BYTES: usize = 128 << 10;
/// A page is cut, too, when the paths of its entries have so many bytes written out …
const CUT_AT_PATH_BYTES: usize = 16 << 20;
/// … and one whose paths have more than this is none: a few bytes can share a long path with the entry before, again and again.
const MAX_PATH_BYTES: usize = 64 << 20;
/// More segments than this go to lists.
const INLINE_SEGMENTS: usize = 64;
/// Segments of one list.
const LIST_SEGMENTS: usize = 8192;

/// The contents of an entry as a page has them: whole, or to be read from lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PagedEntry {
    pub entry: Entry,
    /// Ids of the list chunks; then `entry.content.segments` is empty until they are read.
    pub lists: Vec<ChunkId>,
}

/// Gathers entries into pages.
#[derive(Default)]
pub struct PageBuilder {
    table: Table,
    entries: Vec<u8>,
    count: u64,
    /// Of all paths, written out.
    path_bytes: usize,
    last_path: Vec<u8>,
    first_path: Vec<u8>,
}

/// A page ready to be stored.
pub struct BuiltPage {
    pub bytes: Vec<u8>,
    pub first_path: Vec<u8>,
    pub entries: u64,
}

#[derive(Default)]
struct Table {
    ids: Vec<ChunkId>,
    places: HashMap<ChunkId, u64>,
}

impl Table {
    fn place(&mut self, id: ChunkId) -> u64 {
        *self.places.entry(id).or_insert_with(|| {
            self.ids.push(id);
            self.ids.len() as u64 - 1
        })
    }

    fn encode(&self, e: &mut Encoder<&mut Vec<u8>>) {
        let _ = e.array(self.ids.len() as u64);
        for id in &self.ids {
            let _ = e.bytes(&id.0);
        }
    }
}

impl PageBuilder {
    /// Adds an entry whose long contents were put into lists before ([`lists_of`]); returns a page when one is full.
    pub fn push(&mut self, paged: &PagedEntry) -> Option<BuiltPage> {
        if self.count == 0 {
            self.first_path = paged.entry.path.clone();
        }
        encode_entry(paged, &self.last_path, &mut self.table, &mut self.entries);
        self.count += 1;
        self.path_bytes += paged.entry.path.len();
        self.last_path.clear();
        self.last_path.extend_from_slice(&paged.entry.path);
        let len = self.entries.len() + self.table.ids.len() * 34;
        let boundary = len >= MIN_PAGE_BYTES && path_hash(&paged.entry.path) & ENTRIES_MASK == 0;
        (boundary || len >= MAX_PAGE_BYTES || self.path_bytes >= CUT_AT_PATH_BYTES).then(|| self.take())
    }

    /// The last page, if it holds anything.
    pub fn finish(mut self) -> Option<BuiltPage> {
        (self.count > 0).then(|| self.take())
    }

    fn take(&mut self) -> BuiltPage {
        let done = std::mem::take(self);
        let mut bytes = Vec::with_capacity(done.entries.len() + done.table.ids.len() * 34 + 16);
        let mut e = Encoder::new(&mut bytes);
        let _ = e.array(2);
        done.table.encode(&mut e);
        let _ = e.array(done.count);
        bytes.extend_from_slice(&done.entries);
        BuiltPage { bytes, first_path: done.first_path, entries: done.count }
    }
}

/// A hash of a path that is the same in every backup (first 8 bytes of BLAKE3).
fn path_hash(path: &[u8]) -> u64 {
    u64::from_le_bytes(*blake3::hash(path).as_bytes().first_chunk().unwrap_or(&[0; 8]))
}

/// The list chunks for contents too long for a page; none when they fit.
pub fn lists_of(segments: &[Segment]) -> Vec<Vec<u8>> {
    if segments.len() <= INLINE_SEGMENTS {
        return Vec::new();
    }
    segments.chunks(LIST_SEGMENTS).map(encode_list).collect()
}

/// A list chunk of these segments.
pub fn encode_list(segments: &[Segment]) -> Vec<u8> {
    let (mut table, mut triples) = (Table::default(), Vec::new());
    encode_segments(segments, &mut table, &mut triples);
    let mut bytes = Vec::new();
    let mut e = Encoder::new(&mut bytes);
    let _ = e.array(2);
    table.encode(&mut e);
    bytes.extend_from_slice(&triples);
    bytes
}

/// The segments of a list chunk.
pub fn decode_list(bytes: &[u8]) -> Result<Vec<Segment>, CborError> {
    let mut d = Decoder::new(bytes);
    expect_array(&mut d, 2)?;
    let table = decode_table(&mut d)?;
    let segments = decode_segments(&mut d, &table)?;
    at_end(&d, bytes)?;
    Ok(segments)
}

/// The entries of a page.
pub fn decode_page(bytes: &[u8]) -> Result<Vec<PagedEntry>, CborError> {
    let mut d = Decoder::new(bytes);
    expect_array(&mut d, 2)?;
    let table = decode_table(&mut d)?;
    let count = d.array()?.ok_or_else(|| CborError::message("an array of unknown length"))?;
    let mut entries: Vec<PagedEntry> = Vec::with_capacity(count.min(bytes.len() as u64 / 16) as usize);
    let mut path_bytes = 0usize;
    for _ in 0..count {
        let before: &[u8] = entries.last().map_or(&[], |e| &e.entry.path);
        let entry = decode_entry(&mut d, &table, before)?;
        path_bytes = path_bytes.saturating_add(entry.entry.path.len());
        if path_bytes > MAX_PATH_BYTES {
            return Err(CborError::message("its paths are longer than those of any page"));
        }
        entries.push(entry);
    }
    at_end(&d, bytes)?;
    Ok(entries)
}

/// The chunks a page or a list refers to: its table, without reading the rest.
pub fn references(bytes: &[u8]) -> Result<Vec<ChunkId>, CborError> {
    let mut d = Decoder::new(bytes);
    expect_array(&mut d, 2)?;
    decode_table(&mut d)
}

/// The chunks a page refers to, and which of them are lists of long contents: without taking the entries apart.
pub fn references_and_lists(bytes: &[u8]) -> Result<(Vec<ChunkId>, Vec<ChunkId>), CborError> {
    let bad = CborError::message;
    let mut d = Decoder::new(bytes);
    expect_array(&mut d, 2)?;
    let table = decode_table(&mut d)?;
    let mut lists = Vec::new();
    for _ in 0..d.array()?.ok_or_else(|| bad("an array of unknown length"))? {
        expect_array(&mut d, 12)?;
        // Shared bytes, suffix; kind; mode, owner, group, two times, inode, size.
        d.skip()?;
        d.skip()?;
        let kind = d.u8()?;
        (0..7).try_for_each(|_| d.skip())?;
        if kind == 0 {
            expect_array(&mut d, 3)?;
            d.skip()?;
            match d.u8()? {
                0 => d.skip()?,
                1 => {
                    for _ in 0..d.array()?.ok_or_else(|| bad("an array of unknown length"))? {
                        let place = d.u64()?;
                        lists.push(*table.get(place as usize).ok_or_else(|| bad("a list outside the table"))?);
                    }
                }
                _ => return Err(bad("contents of unknown form")),
            }
        } else if kind <= 3 {
            d.null()?;
        } else {
            return Err(bad("an entry of unknown kind"));
        }
        d.skip()?;
    }
    at_end(&d, bytes)?;
    Ok((table, lists))
}

fn encode_entry(paged: &PagedEntry, last_path: &[u8], table: &mut Table, out: &mut Vec<u8>) {
    let entry = &paged.entry;
    let shared = entry.path.iter().zip(last_path).take_while(|(a, b)| a == b).count();
    let mut e = Encoder::new(&mut *out);
    // Writing to a Vec does not fail.
    let _ = e.array(12).and_then(|e| e.u64(shared as u64)).and_then(|e| e.bytes(entry.path.get(shared..).unwrap_or_default()));
    let kind = match entry.kind {
        Kind::File => 0,
        Kind::Directory => 1,
        Kind::Symlink => 2,
        Kind::Hardlink => 3,
    };
    let _ = e.u8(kind).and_then(|e| e.u32(entry.mode)).and_then(|e| e.u32(entry.uid)).and_then(|e| e.u32(entry.gid));
    for time in [entry.mtime, entry.ctime] {
        let _ = e.array(2).and_then(|e| e.i64(time.seconds)).and_then(|e| e.u32(time.nanoseconds));
    }
    let _ = e.u64(entry.inode).and_then(|e| e.u64(entry.size));
    if entry.kind != Kind::File {
        let _ = e.null();
    } else {
        let _ = e.array(3).and_then(|e| e.bytes(&entry.content.hash));
        if paged.lists.is_empty() {
            let _ = e.u8(0);
            encode_segments(&entry.content.segments, table, out);
        } else {
            let _ = e.u8(1).and_then(|e| e.array(paged.lists.len() as u64));
            for id in &paged.lists {
                let _ = e.u64(table.place(*id));
            }
        }
    }
    let mut e = Encoder::new(out);
    let parts = u64::from(!entry.target.is_empty()) + u64::from(!entry.xattrs.is_empty()) + u64::from(entry.changed_while_read);
    let _ = e.map(parts);
    if !entry.target.is_empty() {
        let _ = e.u8(1).and_then(|e| e.bytes(&entry.target));
    }
    if !entry.xattrs.is_empty() {
        let _ = e.u8(2).and_then(|e| e.array(entry.xattrs.len() as u64));
        for (name, value) in &entry.xattrs {
            let _ = e.array(2).and_then(|e| e.bytes(name)).and_then(|e| e.bytes(value));
        }
    }
    if entry.changed_while_read {
        let _ = e.u8(3).and_then(|e| e.bool(true));
    }
}

fn encode_segments(segments: &[Segment], table: &mut Table, out: &mut Vec<u8>) {
    let mut e = Encoder::new(out);
    let _ = e.array(segments.len() as u64 * 3);
    for segment in segments {
        let (t, offset, len) = match segment {
            Segment::Hole(len) => (0, 0, *len),
            Segment::Data(x) => (table.place(x.chunk) + 1, u64::from(x.offset), u64::from(x.len)),
        };
        let _ = e.u64(t).and_then(|e| e.u64(offset)).and_then(|e| e.u64(len));
    }
}

fn decode_entry(d: &mut Decoder<'_>, table: &[ChunkId], before: &[u8]) -> Result<PagedEntry, CborError> {
    let bad = CborError::message;
    expect_array(d, 12)?;
    let shared = d.u64()? as usize;
    let suffix = d.bytes()?;
    let start = before.get(..shared).ok_or_else(|| bad("a path shares more than there is"))?;
    let path = [start, suffix].concat();
    check_path(&path)?;
    let kind = match d.u8()? {
        0 => Kind::File,
        1 => Kind::Directory,
        2 => Kind::Symlink,
        3 => Kind::Hardlink,
        _ => return Err(bad("an entry of unknown kind")),
    };
    let (mode, uid, gid) = (d.u32()?, d.u32()?, d.u32()?);
    if mode > 0o7777 {
        return Err(bad("a mode out of range"));
    }
    let mut times = [Time::default(); 2];
    for time in &mut times {
        expect_array(d, 2)?;
        *time = Time { seconds: d.i64()?, nanoseconds: d.u32()? };
        if time.nanoseconds > 999_999_999 {
            return Err(bad("nanoseconds out of range"));
        }
    }
    let (inode, size) = (d.u64()?, d.u64()?);
    let (mut content, mut lists) = (Content::default(), Vec::new());
    if kind == Kind::File {
        expect_array(d, 3)?;
        content.hash = d.bytes()?.try_into().map_err(|_| bad("a content hash has not 16 bytes"))?;
        match d.u8()? {
            0 => {
                content.segments = decode_segments(d, table)?;
                if content.segments.iter().try_fold(0u64, |sum, s| sum.checked_add(s.len())) != Some(size) {
                    return Err(bad("the segments do not sum up to the size"));
                }
            }
            1 => {
                for _ in 0..d.array()?.ok_or_else(|| bad("an array of unknown length"))? {
                    let place = d.u64()?;
                    lists.push(*table.get(place as usize).ok_or_else(|| bad("a list outside the table"))?);
                }
                // Whoever restores it would take it for a file of that size without contents.
                if lists.is_empty() && size > 0 {
                    return Err(bad("contents in no list"));
                }
            }
            _ => return Err(bad("contents of unknown form")),
        }
    } else {
        d.null()?;
    }
    let mut entry = Entry { path, kind, mode, uid, gid, mtime: times[0], ctime: times[1], inode, size, content, ..Entry::default() };
    for _ in 0..d.map()?.ok_or_else(|| bad("a map of unknown length"))? {
        match d.u8()? {
            1 => entry.target = d.bytes()?.to_vec(),
            2 => {
                for _ in 0..d.array()?.ok_or_else(|| bad("an array of unknown length"))? {
                    expect_array(d, 2)?;
                    entry.xattrs.push((d.bytes()?.to_vec(), d.bytes()?.to_vec()));
                }
            }
            3 => entry.changed_while_read = d.bool()?,
            // A later version may say more of an entry.
            _ => d.skip()?,
        }
    }
    Ok(PagedEntry { entry, lists })
}

/// A path of an entry names something below its source and nothing else.
fn check_path(path: &[u8]) -> Result<(), CborError> {
    let odd = |c: &[u8]| c.is_empty() || c == b"." || c == b".." || c.contains(&0);
    match !path.is_empty() && path.split(|b| *b == b'/').any(odd) {
        true => Err(CborError::message("a path that leads elsewhere")),
        false => Ok(()),
    }
}

fn decode_segments(d: &mut Decoder<'_>, table: &[ChunkId]) -> Result<Vec<Segment>, CborError> {
    let bad = CborError::message;
    let count = d.array()?.ok_or_else(|| bad("an array of unknown length"))?;
    if count % 3 != 0 {
        return Err(bad("segments are no triples"));
    }
    let mut segments = Vec::with_capacity((count / 3).min(LIST_SEGMENTS as u64 * 8) as usize);
    for _ in 0..count / 3 {
        let (t, offset, len) = (d.u64()?, d.u64()?, d.u64()?);
        segments.push(match t.checked_sub(1) {
            None => Segment::Hole(len),
            Some(place) => {
                let chunk = *table.get(place as usize).ok_or_else(|| bad("a segment outside the table"))?;
                if offset.saturating_add(len) > MAX_CHUNK_BYTES as u64 {
                    return Err(bad("an extent beyond its chunk"));
                }
                Segment::Data(Extent { chunk, offset: offset as u32, len: len as u32 })
            }
        });
    }
    Ok(segments)
}

fn decode_table(d: &mut Decoder<'_>) -> Result<Vec<ChunkId>, CborError> {
    let count = d.array()?.ok_or_else(|| CborError::message("an array of unknown length"))?;
    if count > (MAX_CHUNK_BYTES / 33) as u64 {
        return Err(CborError::message("a table longer than its page"));
    }
    (0..count).map(|_| decode_id(d)).collect()
}

fn expect_array(d: &mut Decoder<'_>, len: u64) -> Result<(), CborError> {
    match d.array()? == Some(len) {
        true => Ok(()),
        false => Err(CborError::message("an array of another length")),
    }
}

fn at_end(d: &Decoder<'_>, bytes: &[u8]) -> Result<(), CborError> {
    match d.position() == bytes.len() {
        true => Ok(()),
        false => Err(CborError::message("bytes follow the end")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segment() -> impl Strategy<Value = Segment> {
        prop_oneof![
            (0u64..1 << 40).prop_map(Segment::Hole),
            (any::<u8>(), 0u32..1 << 20, 0u32..1 << 20).prop_map(|(c, offset, len)| Segment::Data(Extent {
                chunk: ChunkId([c; 32]),
                offset,
                len
            })),
        ]
    }

    fn entry() -> impl Strategy<Value = PagedEntry> {
        let component = "[a-z\\.]{0,3}[a-z]";
        let kind = prop_oneof![Just(Kind::File), Just(Kind::Directory), Just(Kind::Symlink), Just(Kind::Hardlink)];
        (
            proptest::collection::vec(component, 0..4),
            kind,
            0u32..0o10000,
            any::<(u32, u32, i64, u64)>(),
            0u32..1_000_000_000,
            proptest::collection::vec(segment(), 0..INLINE_SEGMENTS),
            any::<bool>(),
            proptest::collection::vec((any::<Vec<u8>>(), any::<Vec<u8>>()), 0..3),
        )
            .prop_map(|(path, kind, mode, (uid, gid, seconds, inode), nanoseconds, segments, changed, xattrs)| {
                let time = Time { seconds, nanoseconds };
                let mut entry =
                    Entry { path: path.join("/").into_bytes(), kind, mode, uid, gid, mtime: time, ctime: time, inode, ..Entry::default() };
                entry.changed_while_read = changed;
                entry.xattrs = xattrs;
                match kind {
                    Kind::File => {
                        entry.size = segments.iter().map(Segment::len).sum();
                        entry.content = Content { hash: [4; 16], segments };
                    }
                    Kind::Symlink | Kind::Hardlink => entry.target = b"there".to_vec(),
                    Kind::Directory => {}
                }
                PagedEntry { entry, lists: Vec::new() }
            })
    }

    proptest! {
        #[test]
        fn pages_give_back_their_entries(entries in proptest::collection::vec(entry(), 0..200)) {
            let mut builder = PageBuilder::default();
            let mut pages: Vec<BuiltPage> = entries.iter().filter_map(|e| builder.push(e)).collect();
            pages.extend(builder.finish());
            let back: Vec<PagedEntry> = pages.iter().flat_map(|p| decode_page(&p.bytes).unwrap()).collect();
            prop_assert_eq!(back, entries);
        }

        #[test]
        fn what_a_page_refers_to_is_told_without_its_entries(entries in proptest::collection::vec((entry(), proptest::collection::vec(any::<[u8; 32]>(), 0..4)), 1..200)) {
            let mut builder = PageBuilder::default();
            let mut pages = Vec::new();
            for (n, (mut paged, lists)) in entries.into_iter().enumerate() {
                paged.entry.path = format!("{n:06}").into_bytes();
                if paged.entry.kind == Kind::File && !lists.is_empty() {
                    (paged.entry.content.segments, paged.lists) = (Vec::new(), lists.into_iter().map(ChunkId).collect());
                }
                pages.extend(builder.push(&paged));
            }
            pages.extend(builder.finish());
            for page in pages {
                let (table, lists) = references_and_lists(&page.bytes).unwrap();
                prop_assert_eq!(table, references(&page.bytes).unwrap());
                let whole: Vec<ChunkId> = decode_page(&page.bytes).unwrap().into_iter().flat_map(|p| p.lists).collect();
                prop_assert_eq!(lists, whole);
                prop_assert!(references_and_lists(&page.bytes[..page.bytes.len() - 1]).is_err());
            }
        }

        #[test]
        fn lists_give_back_their_segments(segments in proptest::collection::vec(segment(), 0..300)) {
            let lists = lists_of(&segments);
            prop_assert_eq!(lists.is_empty(), segments.len() <= INLINE_SEGMENTS);
            let back: Vec<Segment> = lists.iter().flat_map(|l| decode_list(l).unwrap()).collect();
            if !lists.is_empty() { prop_assert_eq!(back, segments); }
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), flips in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..4), e in entry()) {
            let _ = decode_page(&bytes);
            let _ = decode_list(&bytes);
            let mut builder = PageBuilder::default();
            builder.push(&e);
            if let Some(mut page) = builder.finish() {
                for (at, with) in flips { let n = page.bytes.len(); page.bytes[at % n] ^= with; }
                let _ = decode_page(&page.bytes);
            }
        }
    }

    #[test]
    fn a_page_does_not_unpack_to_far_more_than_it_is() {
        // 3 MiB of path once, and then 30 bytes for each entry that shares it: 100 GB of paths in a chunk of 4 MiB.
        let (mut table, mut entries, mut last) = (Table::default(), Vec::new(), Vec::new());
        for n in 0..=100 {
            let path = [vec![b'a'; 3 << 20], format!("{n}").into_bytes()].concat();
            let paged = PagedEntry { entry: Entry { path, kind: Kind::Directory, ..Entry::default() }, lists: Vec::new() };
            encode_entry(&paged, &last, &mut table, &mut entries);
            last = paged.entry.path;
        }
        let mut bytes = Vec::new();
        let mut e = Encoder::new(&mut bytes);
        let _ = e.array(2);
        table.encode(&mut e);
        let _ = e.array(101);
        bytes.extend_from_slice(&entries);
        assert!(bytes.len() < MAX_CHUNK_BYTES);
        assert!(decode_page(&bytes).unwrap_err().to_string().contains("longer than those of any page"));
        // What keepd writes stays below, however long the paths.
        let mut builder = PageBuilder::default();
        let mut pages = Vec::new();
        for n in 0..300 {
            let path = [vec![b'a'; 1 << 20], n.to_string().into_bytes()].concat();
            pages.extend(builder.push(&PagedEntry { entry: Entry { path, kind: Kind::Directory, ..Entry::default() }, lists: Vec::new() }));
        }
        pages.extend(builder.finish());
        assert_eq!(pages.iter().map(|p| decode_page(&p.bytes).unwrap().len()).sum::<usize>(), 300);
    }

    #[test]
    fn a_change_touches_only_its_own_page() {
        let build = |changed: Option<usize>| {
            let mut builder = PageBuilder::default();
            let mut pages = Vec::new();
            for n in 0..20_000usize {
                let mut entry = Entry { path: format!("d{:03}/f{n:05}", n / 100).into_bytes(), ..Entry::default() };
                entry.inode = if changed == Some(n) { 7 } else { 8 };
                pages.extend(builder.push(&PagedEntry { entry, lists: Vec::new() }));
            }
            pages.extend(builder.finish());
            pages.into_iter().map(|p| blake3::hash(&p.bytes)).collect::<Vec<_>>()
        };
        let (a, b) = (build(None), build(Some(9_999)));
        assert!(a.len() > 20);
        assert_eq!(a.iter().filter(|p| !b.contains(p)).count(), 1);
    }
}
