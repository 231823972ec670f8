//! Index objects: which chunks lie in which packs, so that nobody has to read every pack's footer.
//!
//! ```text
//! index = [ [ [pack id, pack length, kind, [ [chunk id, sealed length, plain length] … ] ] … ], [superseded index id …] ]
//! ```
//! Chunks stand in the order of the pack, so their offsets follow from their lengths. kind: 1 data, 2 metadata.

use minicbor::decode::Error as CborError;
use minicbor::{Decoder, Encoder};

use super::entry::MAX_CHUNK_BYTES;
use super::pack::{PackedChunk, decode_id};
use crate::crypto::{HEADER_BYTES, ObjectKind};

/// No index object is longer, sealed or plain.
pub const MAX_INDEX_BYTES: u64 = 64 << 20;
/// An index object is closed when it lists this many chunks (about 2 MiB).
pub const INDEX_CHUNKS: usize = 50_000;

/// A pack as an index lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexedPack {
    pub id: [u8; 32],
    pub size: u64,
    pub kind: ObjectKind,
    pub chunks: Vec<PackedChunk>,
}

/// One index object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Index {
    pub packs: Vec<IndexedPack>,
    /// Index objects that this one replaces and that may still be there.
    pub supersedes: Vec<[u8; 32]>,
}

impl Index {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut e = Encoder::new(&mut out);
        // Writing to a Vec does not fail.
        let _ = e.array(2).and_then(|e| e.array(self.packs.len() as u64));
        for pack in &self.packs {
            let kind = if pack.kind == ObjectKind::MetaPack { 2 } else { 1 };
            let _ = e.array(4).and_then(|e| e.bytes(&pack.id)).and_then(|e| e.u64(pack.size)).and_then(|e| e.u8(kind));
            let _ = e.array(pack.chunks.len() as u64);
            for c in &pack.chunks {
                let _ = e.array(3).and_then(|e| e.bytes(&c.id.0)).and_then(|e| e.u32(c.sealed_len)).and_then(|e| e.u32(c.len));
            }
        }
        let _ = e.array(self.supersedes.len() as u64);
        for id in &self.supersedes {
            let _ = e.bytes(id);
        }
        out
    }

    pub fn decode(body: &[u8]) -> Result<Self, CborError> {
        let bad = CborError::message;
        let mut d = Decoder::new(body);
        let array = |d: &mut Decoder<'_>| d.array()?.ok_or_else(|| bad("an array of unknown length"));
        let expect = |d: &mut Decoder<'_>, n: u64| if d.array()? == Some(n) { Ok(()) } else { Err(bad("an array of another length")) };
        let mut index = Index::default();
        expect(&mut d, 2)?;
        for _ in 0..array(&mut d)? {
            expect(&mut d, 4)?;
            let id = decode_id(&mut d)?.0;
            let size = d.u64()?;
            let kind = match d.u8()? {
                1 => ObjectKind::DataPack,
                2 => ObjectKind::MetaPack,
                _ => return Err(bad("a pack of unknown kind")),
            };
            let mut pack = IndexedPack { id, size, kind, chunks: Vec::new() };
            let mut offset = HEADER_BYTES as u32;
            for _ in 0..array(&mut d)? {
                expect(&mut d, 3)?;
                let id = decode_id(&mut d)?;
                let (sealed_len, len) = (d.u32()?, d.u32()?);
                if len as usize > MAX_CHUNK_BYTES {
                    return Err(bad("a chunk is too long"));
                }
                pack.chunks.push(PackedChunk { id, offset, sealed_len, len });
                offset = offset.checked_add(sealed_len).filter(|o| u64::from(*o) < size).ok_or_else(|| bad("chunks beyond their pack"))?;
            }
            index.packs.push(pack);
        }
        for _ in 0..array(&mut d)? {
            index.supersedes.push(decode_id(&mut d)?.0);
        }
        match d.position() == body.len() {
            true => Ok(index),
            false => Err(bad("bytes follow the end")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::entry::ChunkId;
    use proptest::prelude::*;

    #[test]
    fn comes_back() {
        let chunk = |n: u8, offset| PackedChunk { id: ChunkId([n; 32]), offset, sealed_len: 100, len: 500 };
        let pack = |n: u8, kind| IndexedPack { id: [n; 32], size: 1000, kind, chunks: vec![chunk(n, 64), chunk(n + 1, 164)] };
        let index = Index { packs: vec![pack(1, ObjectKind::DataPack), pack(5, ObjectKind::MetaPack)], supersedes: vec![[9; 32]] };
        let body = index.encode();
        assert_eq!(Index::decode(&body).unwrap(), index);
        for cut in 0..body.len() {
            assert!(Index::decode(&body[..cut]).is_err());
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Index::decode(&body);
        }
    }
}
