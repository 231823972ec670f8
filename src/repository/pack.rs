//! Packs: chunks sealed one after the other behind a header, then a sealed footer that lists them.
//!
//! ```text
//! header (64) | sealed chunk 0 | sealed chunk 1 | … | sealed footer | footer length (u32 LE)
//! ```
//! The footer's payload is a CBOR array of `[chunk id, sealed length, plain length]`; chunk n is sealed with ordinal n.

use minicbor::{Decoder, Encoder};

use super::entry::{ChunkId, MAX_CHUNK_BYTES};
use super::payload;
use crate::crypto::object::FOOTER_ORDINAL;
use crate::crypto::{CryptoError, HEADER_BYTES, MasterKey, ObjectCipher, ObjectHeader, ObjectKind, TAG_BYTES};

/// A pack is closed when it reaches this length.
pub const PACK_TARGET_BYTES: usize = 16 << 20;
/// No pack is longer: the target, one more chunk, and the footer.
pub const MAX_PACK_BYTES: u64 = 64 << 20;
/// What a footer may be long at the most.
const MAX_FOOTER_BYTES: usize = 16 << 20;

/// A chunk in a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedChunk {
    pub id: ChunkId,
    /// Of the sealed chunk, from the start of the pack.
    pub offset: u32,
    pub sealed_len: u32,
    /// Of the plaintext.
    pub len: u32,
}

/// A pack being filled.
pub struct PackBuilder {
    cipher: ObjectCipher,
    bytes: Vec<u8>,
    chunks: Vec<PackedChunk>,
}

/// A filled pack, not yet stored.
pub struct BuiltPack {
    pub kind: ObjectKind,
    pub bytes: Vec<u8>,
    pub chunks: Vec<PackedChunk>,
}

impl PackBuilder {
    pub fn new(master: &MasterKey, repository: &[u8; 16], kind: ObjectKind) -> Result<Self, CryptoError> {
        let header = ObjectHeader::fresh(kind, repository)?;
        let mut bytes = Vec::with_capacity(PACK_TARGET_BYTES / 4);
        bytes.extend_from_slice(header.bytes());
        Ok(Self { cipher: ObjectCipher::new(master, &header), bytes, chunks: Vec::new() })
    }

    /// Seals a chunk's payload into the pack; `len` is the plaintext's length.
    pub fn add(&mut self, id: ChunkId, payload: &[u8], len: u32) -> Result<(), CryptoError> {
        let offset = self.bytes.len();
        self.cipher.seal(self.chunks.len() as u64, payload, &mut self.bytes)?;
        let sealed_len = (self.bytes.len() - offset) as u32;
        self.chunks.push(PackedChunk { id, offset: offset as u32, sealed_len, len });
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Adds the footer.
    pub fn finish(mut self, kind: ObjectKind) -> Result<BuiltPack, CryptoError> {
        let footer = encode_footer(&self.chunks);
        let start = self.bytes.len();
        self.cipher.seal(FOOTER_ORDINAL, &footer, &mut self.bytes)?;
        let len = (self.bytes.len() - start) as u32;
        self.bytes.extend_from_slice(&len.to_le_bytes());
        Ok(BuiltPack { kind, bytes: self.bytes, chunks: self.chunks })
    }
}

/// What a pack (whole, or from a tail that holds the footer) says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackContents {
    pub kind: ObjectKind,
    pub chunks: Vec<PackedChunk>,
}

/// Why a pack is not what it should be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PackError {
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    #[error(transparent)]
    Payload(#[from] payload::PayloadError),
    #[error("its footer is damaged: {0}")]
    Footer(String),
    #[error("chunk {0} is not the chunk its name says")]
    Content(ChunkId),
}

/// Where the sealed footer lies in a pack of `size` bytes whose last four bytes are `trailer`.
pub fn footer_range(size: u64, trailer: [u8; 4]) -> Result<(u64, u64), PackError> {
    let len = u64::from(u32::from_le_bytes(trailer));
    let start = size.checked_sub(4).and_then(|s| s.checked_sub(len)).filter(|s| *s >= HEADER_BYTES as u64);
    match start {
        Some(start) if len >= TAG_BYTES as u64 && len <= MAX_FOOTER_BYTES as u64 => Ok((start, len)),
        _ => Err(PackError::Footer(format!("it claims {len} of the pack's {size} bytes"))),
    }
}

/// Opens a footer given the pack's header, the sealed footer and where it starts.
pub fn open_footer(master: &MasterKey, header: &ObjectHeader, sealed: &[u8], start: u64) -> Result<PackContents, PackError> {
    let plain = ObjectCipher::new(master, header).open(FOOTER_ORDINAL, sealed)?;
    let chunks = decode_footer(&plain).map_err(|e| PackError::Footer(e.to_string()))?;
    let end = chunks.last().map_or(HEADER_BYTES as u64, |c| u64::from(c.offset) + u64::from(c.sealed_len));
    if end != start {
        return Err(PackError::Footer(format!("its chunks end at {end}, not at {start}")));
    }
    Ok(PackContents { kind: header.kind, chunks })
}

/// Opens a whole pack's footer.
pub fn contents(master: &MasterKey, repository: &[u8; 16], pack: &[u8]) -> Result<PackContents, PackError> {
    let header = ObjectHeader::parse(pack, repository)?;
    let trailer: [u8; 4] = *pack.last_chunk().ok_or(CryptoError::Short)?;
    let (start, len) = footer_range(pack.len() as u64, trailer)?;
    let sealed = pack.get(start as usize..(start + len) as usize).ok_or(CryptoError::Short)?;
    open_footer(master, &header, sealed, start)
}

/// Opens one sealed chunk and proves that it is the one its id names.
pub fn open_chunk(
    cipher: &ObjectCipher,
    key: &[u8; 32],
    ordinal: u64,
    id: &ChunkId,
    len: u32,
    sealed: &[u8],
) -> Result<Vec<u8>, PackError> {
    let payload = cipher.open(ordinal, sealed)?;
    let raw = payload::decompress(&payload, len as usize)?;
    if raw.len() != len as usize || chunk_id(key, &raw) != *id {
        return Err(PackError::Content(*id));
    }
    Ok(raw)
}

/// The id of a chunk: keyed BLAKE3 of its plaintext.
pub fn chunk_id(key: &[u8; 32], raw: &[u8]) -> ChunkId {
    ChunkId(*blake3::keyed_hash(key, raw).as_bytes())
}

fn encode_footer(chunks: &[PackedChunk]) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + chunks.len() * 48);
    let mut e = Encoder::new(&mut out);
    // Writing to a Vec does not fail.
    let _ = e.array(chunks.len() as u64);
    for c in chunks {
        let _ = e.array(3).and_then(|e| e.bytes(&c.id.0)).and_then(|e| e.u32(c.sealed_len)).and_then(|e| e.u32(c.len));
    }
    out
}

fn decode_footer(plain: &[u8]) -> Result<Vec<PackedChunk>, minicbor::decode::Error> {
    let mut d = Decoder::new(plain);
    let bad = minicbor::decode::Error::message;
    let count = d.array()?.ok_or_else(|| bad("an array of unknown length"))?;
    let mut chunks = Vec::with_capacity(count.min(plain.len() as u64 / 36) as usize);
    let mut offset = HEADER_BYTES as u32;
    for _ in 0..count {
        if d.array()? != Some(3) {
            return Err(bad("an entry has not three parts"));
        }
        let id = decode_id(&mut d)?;
        let (sealed_len, len) = (d.u32()?, d.u32()?);
        if len as usize > MAX_CHUNK_BYTES {
            return Err(bad("a chunk is too long"));
        }
        chunks.push(PackedChunk { id, offset, sealed_len, len });
        offset = offset.checked_add(sealed_len).ok_or_else(|| bad("the pack is too long"))?;
    }
    match d.position() == plain.len() {
        true => Ok(chunks),
        false => Err(bad("bytes follow the last entry")),
    }
}

/// A 32-byte string.
pub(super) fn decode_id(d: &mut Decoder<'_>) -> Result<ChunkId, minicbor::decode::Error> {
    let bytes: [u8; 32] = d.bytes()?.try_into().map_err(|_| minicbor::decode::Error::message("an id has not 32 bytes"))?;
    Ok(ChunkId(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Compression;

    #[test]
    fn a_pack_tells_its_chunks_and_any_damage_is_noticed() {
        let (master, repository, key) = (MasterKey::from_bytes([1; 32]), [2; 16], [3; 32]);
        let mut compressor = payload::Compressor::new(Compression::Zstd).unwrap();
        let mut builder = PackBuilder::new(&master, &repository, ObjectKind::DataPack).unwrap();
        let raws: Vec<Vec<u8>> = (0..4u8).map(|n| vec![n; 100 + usize::from(n)]).collect();
        for raw in &raws {
            builder.add(chunk_id(&key, raw), &compressor.compress(raw).unwrap(), raw.len() as u32).unwrap();
        }
        let pack = builder.finish(ObjectKind::DataPack).unwrap();
        let read = |bytes: &[u8]| -> Result<Vec<Vec<u8>>, PackError> {
            let header = ObjectHeader::parse(bytes, &repository)?;
            let cipher = ObjectCipher::new(&master, &header);
            contents(&master, &repository, bytes)?
                .chunks
                .iter()
                .enumerate()
                .map(|(n, c)| {
                    let sealed = &bytes[c.offset as usize..(c.offset + c.sealed_len) as usize];
                    open_chunk(&cipher, &key, n as u64, &c.id, c.len, sealed)
                })
                .collect()
        };
        assert_eq!(read(&pack.bytes).unwrap(), raws);
        assert_eq!(contents(&master, &repository, &pack.bytes).unwrap().chunks, pack.chunks);
        for at in 0..pack.bytes.len() {
            let mut bad = pack.bytes.clone();
            bad[at] ^= 0x40;
            assert!(read(&bad).is_err(), "byte {at} changed unnoticed");
        }
        for cut in 0..pack.bytes.len() {
            assert!(read(&pack.bytes[..cut]).is_err(), "cut at {cut} unnoticed");
        }
    }
}
