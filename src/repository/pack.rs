//! Packs: chunks sealed one after the other behind a header, then a sealed footer that lists them.
//!
//! ```text
//! header (64) | sealed chunk 0 | sealed chunk 1 | … | sealed footer | footer length (u32 LE)
//! ```
//! Between the last chunk and the footer of a write-only pack stands the key of its chunks, sealed to a public key.
//! The footer's payload is a CBOR array of `[chunk id, sealed length, plain length]`; chunk n is sealed with ordinal n.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use minicbor::{Decoder, Encoder};

use super::entry::{ChunkId, MAX_CHUNK_BYTES};
use super::index::IndexedPack;
use super::payload;
use crate::crypto::hpke::SEALED_BYTES;
use crate::crypto::object::FOOTER_ORDINAL;
use crate::crypto::{CryptoError, HEADER_BYTES, Keyring, ObjectCipher, ObjectHeader, ObjectKind, TAG_BYTES};
use crate::storage::direct::ALIGNMENT;

/// A pack is closed when it reaches this length.
pub const PACK_TARGET_BYTES: usize = 16 << 20;
/// No pack is longer: the target, one more chunk, and the footer.
pub const MAX_PACK_BYTES: u64 = 64 << 20;
/// Memory for one pack: a chunk begun just below the target still fits, and the footer mostly.
const PACK_MEMORY_BYTES: usize = PACK_TARGET_BYTES + MAX_CHUNK_BYTES + (1 << 20);
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

/// A pack being filled, by several threads at once: each reserves its chunk's place, seals into it, and gives it back.
pub struct PackBuilder {
    cipher: Arc<ObjectCipher>,
    object_header: ObjectHeader,
    /// Of a write-only pack: the key of its chunks, sealed.
    sealed_key: Option<[u8; SEALED_BYTES]>,
    header: BytesMut,
    /// The sealed chunks in order; None while one is being sealed.
    sealed: Vec<Option<BytesMut>>,
    /// Places that are not back yet.
    away: usize,
    chunks: Vec<PackedChunk>,
    /// Reserved so far, the header among it.
    len: usize,
    /// What of the pack's memory is not reserved yet.
    rest: BytesMut,
}

/// A chunk's place in a pack that is being filled.
pub struct Place {
    cipher: Arc<ObjectCipher>,
    ordinal: usize,
    bytes: BytesMut,
}

/// A filled pack, not yet stored.
pub struct BuiltPack {
    pub kind: ObjectKind,
    pub bytes: Bytes,
    pub chunks: Vec<PackedChunk>,
}

/// What proving a sealed chunk needs; one for each thread, its buffers are used again.
#[derive(Default)]
pub struct Prover {
    payload: Vec<u8>,
    raw: Vec<u8>,
    decompressor: payload::Decompressor,
}

/// Memory for packs: one that was stored gives its memory to the next, so that the kernel need not clear it anew.
#[derive(Default)]
pub struct PackMemory(Mutex<Vec<BytesMut>>);

impl PackMemory {
    /// Packs' memory that is kept for use again.
    const KEPT: usize = 4;

    fn take(&self) -> BytesMut {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.unwrap_or_else(|| {
            // Where the pack begins is aligned, so that it can be written past the page cache.
            let mut memory = BytesMut::zeroed(PACK_MEMORY_BYTES + ALIGNMENT);
            let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
            memory.split_off(start)
        })
    }

    /// Takes back a stored pack's memory.
    pub fn give(&self, bytes: Bytes) {
        // As long as the pack was: the rest was never touched, and so takes none of the machine's memory.
        if let Ok(memory) = bytes.try_into_mut()
            && memory.capacity() >= PACK_MEMORY_BYTES
        {
            let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.len() < Self::KEPT {
                kept.push(memory);
            }
        }
    }
}

/// Whether there is room for so many bytes, which may be written to then.
fn is_room(memory: &mut BytesMut, len: usize) -> bool {
    let fits = len <= memory.capacity();
    if fits && memory.len() < len {
        memory.resize(len, 0);
    }
    fits
}

impl PackBuilder {
    pub fn new(keys: &Keyring, repository: &[u8; 16], kind: ObjectKind, memory: &PackMemory) -> Result<Self, CryptoError> {
        let object_header = keys.header(kind, repository)?;
        let mut rest = memory.take();
        is_room(&mut rest, HEADER_BYTES);
        let mut header = rest.split_to(HEADER_BYTES);
        header.copy_from_slice(object_header.bytes());
        let (cipher, sealed_key) = keys.new_pack(&object_header)?;
        let cipher = Arc::new(cipher);
        Ok(Self { cipher, object_header, sealed_key, header, sealed: Vec::new(), away: 0, chunks: Vec::new(), len: HEADER_BYTES, rest })
    }

    /// Reserves the next place for a payload of `payload_len` bytes, whose plaintext is `len` bytes long.
    pub fn reserve(&mut self, id: ChunkId, payload_len: usize, len: u32) -> Result<Place, CryptoError> {
        let sealed_len = payload_len + TAG_BYTES;
        if !is_room(&mut self.rest, sealed_len) {
            return Err(CryptoError::Short);
        }
        let (offset, ordinal) = (self.len as u32, self.chunks.len());
        self.len += sealed_len;
        self.sealed.push(None);
        self.away += 1;
        self.chunks.push(PackedChunk { id, offset, sealed_len: sealed_len as u32, len });
        Ok(Place { cipher: self.cipher.clone(), ordinal, bytes: self.rest.split_to(sealed_len) })
    }

    /// Adds one chunk, sealed and proven; `payload` is what `raw` was compressed to.
    pub fn push(&mut self, id: ChunkId, payload: &[u8], raw: &[u8], prover: &mut Prover) -> Result<(), PackError> {
        let mut place = self.reserve(id, payload.len(), raw.len() as u32)?;
        place.seal(payload, raw, prover)?;
        self.give(place);
        Ok(())
    }

    /// Takes a place back, sealed.
    pub fn give(&mut self, place: Place) {
        if let Some(slot) = self.sealed.get_mut(place.ordinal) {
            *slot = Some(place.bytes);
            self.away -= 1;
        }
    }

    /// Whether all places are back.
    pub fn is_whole(&self) -> bool {
        self.away == 0
    }

    /// Bytes reserved so far.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Adds the footer and proves that it opens again to the same list.
    pub fn finish(mut self, keys: &Keyring, repository: &[u8; 16]) -> Result<BuiltPack, PackError> {
        let footer = encode_footer(&self.chunks);
        let sealed_len = footer.len() + TAG_BYTES;
        let mut tail = self.sealed_key.map(Vec::from).unwrap_or_default();
        keys.cipher(&self.object_header)?.seal(FOOTER_ORDINAL, &footer, &mut tail)?;
        tail.extend_from_slice(&(sealed_len as u32).to_le_bytes());
        let mut bytes = self.header;
        for sealed in self.sealed {
            bytes.unsplit(sealed.ok_or_else(|| PackError::Footer("a chunk is not sealed yet".into()))?);
        }
        if is_room(&mut self.rest, tail.len()) {
            self.rest[..tail.len()].copy_from_slice(&tail);
            bytes.unsplit(self.rest);
            bytes.truncate(self.len + tail.len());
        } else {
            bytes.extend_from_slice(&tail);
        }
        let kind = self.object_header.kind;
        let contents = contents(keys, repository, &bytes)?;
        if contents.chunks != self.chunks || contents.header.kind != kind {
            return Err(PackError::Footer("it lists other chunks than were sealed".into()));
        }
        Ok(BuiltPack { kind, bytes: bytes.freeze(), chunks: self.chunks })
    }
}

impl Place {
    /// Seals a payload into its place and proves that it opens to `raw` again.
    pub fn seal(&mut self, payload: &[u8], raw: &[u8], prover: &mut Prover) -> Result<(), PackError> {
        self.cipher.seal_into(self.ordinal as u64, payload, &mut self.bytes)?;
        self.cipher.open_into(self.ordinal as u64, &self.bytes, &mut prover.payload)?;
        match prover.decompressor.opens_to(&prover.payload, raw, &mut prover.raw)? {
            true => Ok(()),
            false => Err(PackError::ReadBack),
        }
    }
}

/// What a pack (whole, or from a tail that holds the footer) says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackContents {
    pub header: ObjectHeader,
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
    #[error("sealing a chunk and opening it again gave other bytes")]
    ReadBack,
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
pub fn open_footer(keys: &Keyring, header: &ObjectHeader, sealed: &[u8], start: u64) -> Result<PackContents, PackError> {
    let plain = keys.cipher(header)?.open(FOOTER_ORDINAL, sealed)?;
    let chunks = decode_footer(&plain).map_err(|e| PackError::Footer(e.to_string()))?;
    let end = chunks_end(&chunks);
    if end + sealed_key_len(header) as u64 != start {
        return Err(PackError::Footer(format!("its chunks end at {end}, not at {start}")));
    }
    Ok(PackContents { header: *header, chunks })
}

/// Where a pack's last chunk ends.
pub fn chunks_end(chunks: &[PackedChunk]) -> u64 {
    chunks.last().map_or(HEADER_BYTES as u64, |c| u64::from(c.offset) + u64::from(c.sealed_len))
}

/// What stands between the last chunk and the footer, in bytes.
pub fn sealed_key_len(header: &ObjectHeader) -> usize {
    if header.is_write_only() { SEALED_BYTES } else { 0 }
}

/// The cipher of a whole pack's chunks.
pub fn cipher(keys: &Keyring, header: &ObjectHeader, pack: &[u8], chunks: &[PackedChunk]) -> Result<ObjectCipher, CryptoError> {
    let end = chunks_end(chunks) as usize;
    keys.pack_cipher(header, pack.get(end..end + sealed_key_len(header)).unwrap_or_default())
}

/// Opens a whole pack's footer.
pub fn contents(keys: &Keyring, repository: &[u8; 16], pack: &[u8]) -> Result<PackContents, PackError> {
    let header = ObjectHeader::parse(pack, repository)?;
    let trailer: [u8; 4] = *pack.last_chunk().ok_or(CryptoError::Short)?;
    let (start, len) = footer_range(pack.len() as u64, trailer)?;
    let sealed = pack.get(start as usize..(start + len) as usize).ok_or(CryptoError::Short)?;
    open_footer(keys, &header, sealed, start)
}

/// Opens sealed chunks; one for each thread, its buffers are used again.
#[derive(Default)]
pub struct ChunkOpener {
    payload: Vec<u8>,
    decompressor: payload::Decompressor,
}

/// A sealed chunk and what the index says of it.
pub struct SealedChunk<'a> {
    pub ordinal: u64,
    pub id: ChunkId,
    /// Of the plaintext.
    pub len: u32,
    pub bytes: &'a [u8],
}

impl ChunkOpener {
    /// The chunk opened last as it is in its pack, compressed.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// Opens one sealed chunk no further than to its zstd frame, where it has one; it is the one its id names as far as the pack's writer is believed.
    pub fn open_frame(&mut self, cipher: &ObjectCipher, sealed: &SealedChunk<'_>) -> Result<Option<&[u8]>, PackError> {
        cipher.open_into(sealed.ordinal, sealed.bytes, &mut self.payload)?;
        Ok(payload::zstd_frame(&self.payload, sealed.len as usize))
    }

    /// Opens one sealed chunk and proves that it is the one its id names; `raw` is of no use after an error.
    pub fn open_into(
        &mut self,
        cipher: &ObjectCipher,
        key: &[u8; 32],
        sealed: &SealedChunk<'_>,
        raw: &mut Vec<u8>,
    ) -> Result<(), PackError> {
        cipher.open_into(sealed.ordinal, sealed.bytes, &mut self.payload)?;
        self.decompressor.decompress_into(&self.payload, sealed.len as usize, raw)?;
        match raw.len() == sealed.len as usize && chunk_id(key, raw) == sealed.id {
            true => Ok(()),
            false => Err(PackError::Content(sealed.id)),
        }
    }
}

/// Opens one sealed chunk and proves that it is the one its id names.
pub fn open_chunk(cipher: &ObjectCipher, key: &[u8; 32], sealed: &SealedChunk<'_>) -> Result<Vec<u8>, PackError> {
    let mut raw = Vec::new();
    ChunkOpener::default().open_into(cipher, key, sealed, &mut raw)?;
    Ok(raw)
}

/// The id of a chunk: keyed BLAKE3 of its plaintext.
pub fn chunk_id(key: &[u8; 32], raw: &[u8]) -> ChunkId {
    ChunkId(*blake3::keyed_hash(key, raw).as_bytes())
}

/// Whether so many bytes can follow the chunks of a pack: the sealed footer and its length, and before them perhaps the sealed key.
pub(super) fn is_tail(bytes: u64, chunks: &[PackedChunk]) -> bool {
    let footer = footer_len(chunks);
    bytes == footer || bytes == footer + SEALED_BYTES as u64
}

/// Whether a pack is a write-only one, which its length tells: the sealed key stands before its footer.
pub(super) fn is_write_only(pack: &IndexedPack) -> bool {
    let tail = pack.size.saturating_sub(chunks_end(&pack.chunks));
    pack.kind == ObjectKind::DataPack && tail == footer_len(&pack.chunks) + SEALED_BYTES as u64
}

/// Of the sealed footer and its length behind it.
fn footer_len(chunks: &[PackedChunk]) -> u64 {
    (encode_footer(chunks).len() + TAG_BYTES + 4) as u64
}

pub(crate) fn encode_footer(chunks: &[PackedChunk]) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + chunks.len() * 48);
    let mut e = Encoder::new(&mut out);
    // Writing to a Vec does not fail.
    let _ = e.array(chunks.len() as u64);
    for c in chunks {
        let _ = e.array(3).and_then(|e| e.bytes(&c.id.0)).and_then(|e| e.u32(c.sealed_len)).and_then(|e| e.u32(c.len));
    }
    out
}

pub(crate) fn decode_footer(plain: &[u8]) -> Result<Vec<PackedChunk>, minicbor::decode::Error> {
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
    use crate::crypto::{MasterKey, PrivateKey};

    #[test]
    fn a_pack_tells_its_chunks_and_any_damage_is_noticed() {
        every_damage_is_noticed(&Keyring::of(MasterKey::from_bytes([1; 32])));
    }

    #[test]
    fn so_does_a_write_only_pack() {
        let private = PrivateKey::generate().unwrap();
        let keys = Keyring::of(MasterKey::from_bytes([1; 32])).sealing_to(Some(private.public()));
        keys.lend(Arc::new(private));
        every_damage_is_noticed(&keys);
    }

    fn every_damage_is_noticed(keys: &Keyring) {
        let (repository, key) = ([2; 16], [3; 32]);
        let mut compressor = payload::Compressor::new(Compression::Zstd).unwrap();
        let memory = PackMemory::default();
        let raws: Vec<Vec<u8>> = (0..4u8).map(|n| vec![n; 100 + usize::from(n)]).collect();
        let mut build = || {
            let mut builder = PackBuilder::new(keys, &repository, ObjectKind::DataPack, &memory).unwrap();
            let mut places = Vec::new();
            for raw in &raws {
                let payload = compressor.compress(raw, payload::Texture::Mixed).unwrap();
                let mut place = builder.reserve(chunk_id(&key, raw), payload.len(), raw.len() as u32).unwrap();
                place.seal(payload, raw, &mut Prover::default()).unwrap();
                assert!(place.seal(payload, b"something else", &mut Prover::default()).is_err(), "what went in is not what comes out");
                places.push(place);
            }
            assert!(!builder.is_whole());
            // Threads end in any order.
            places.into_iter().rev().for_each(|place| builder.give(place));
            assert!(builder.is_whole());
            builder.finish(keys, &repository).unwrap()
        };
        memory.give(build().bytes);
        assert_eq!(memory.0.lock().unwrap().len(), 1, "a stored pack's memory is kept");
        let pack = build();
        assert!(memory.0.lock().unwrap().is_empty(), "and used for the next");
        let read = |bytes: &[u8]| -> Result<Vec<Vec<u8>>, PackError> {
            let header = ObjectHeader::parse(bytes, &repository)?;
            let chunks = contents(keys, &repository, bytes)?.chunks;
            let cipher = cipher(keys, &header, bytes, &chunks)?;
            // The key is remembered where it was made: what stands in the pack must open, too.
            if header.is_write_only() {
                let end = chunks_end(&chunks) as usize;
                keys.open_sealed_key(&header, &bytes[end..end + SEALED_BYTES])?;
            }
            chunks
                .iter()
                .enumerate()
                .map(|(n, c)| {
                    let sealed = &bytes[c.offset as usize..(c.offset + c.sealed_len) as usize];
                    open_chunk(&cipher, &key, &SealedChunk { ordinal: n as u64, id: c.id, len: c.len, bytes: sealed })
                })
                .collect()
        };
        assert_eq!(read(&pack.bytes).unwrap(), raws);
        assert_eq!(contents(keys, &repository, &pack.bytes).unwrap().chunks, pack.chunks);
        for at in 0..pack.bytes.len() {
            let mut bad = pack.bytes.to_vec();
            bad[at] ^= 0x40;
            assert!(read(&bad).is_err(), "byte {at} changed unnoticed");
        }
        for cut in 0..pack.bytes.len() {
            assert!(read(&pack.bytes[..cut]).is_err(), "cut at {cut} unnoticed");
        }
    }
}
