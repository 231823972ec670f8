//! What is sealed: one byte for the way of compression, the length before it (u32 LE), the bytes.

use std::io::{Read, Write};

use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use zstd::zstd_safe::CParameter;

use crate::config::Compression;

const STORED: u8 = 0;
const ZSTD: u8 = 1;
const ZLIB: u8 = 2;
const PREFIX: usize = 5;
/// zstd's default level: on text and programs a tenth slower than level 1, for 5 % less. Its tables are a quarter as large as by default, so that they stay in the processor's own
/// cache beside the chunk: 8 to 18 % faster for 1 % more.
const ZSTD_LEVEL: i32 = 3;
const HASH_LOG: u32 = 15;
const CHAIN_LOG: u32 = 14;
/// Database pages: a quarter faster than level 3, for 3 % more; dumps: two thirds faster, for no more at all. The window is smaller than a chunk, so that it stays in the
/// processor's own cache; pages are like their neighbours.
const PAGES_LEVEL: i32 = 1;
const PAGES_WINDOW_LOG: u32 = 18;
const PAGES_HASH_LOG: u32 = 15;
/// Incompressible data is noticed on samples of this size.
const SAMPLE: usize = 4 << 10;

#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum PayloadError {
    #[error("its payload is too short")]
    Short,
    #[error("its payload claims {claimed} bytes, more than the {limit} it may have")]
    TooLong { claimed: u64, limit: u64 },
    #[error("its payload is compressed in a way ({0}) this version of keepd does not know")]
    Method(u8),
    #[error("its payload does not decompress: {0}")]
    Damaged(String),
    #[error("compressing failed: {0}")]
    Compress(String),
}

/// What is compressed, as far as it matters for how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Texture {
    #[default]
    Mixed,
    /// Pages of a database, pieces of its dump.
    Pages,
}

/// Compresses payloads; one for each thread, its buffers are used again.
pub struct Compressor {
    how: Compression,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    /// For pages.
    zstd_pages: Option<zstd::bulk::Compressor<'static>>,
    /// The last one became shorter by an eighth at least: then the next is mostly like it, and is compressed without a sample.
    shrank: bool,
    out: Vec<u8>,
}

impl Compressor {
    pub fn new(how: Compression) -> Result<Self, PayloadError> {
        let new = |level: i32, parameters: [CParameter; 2]| -> std::io::Result<_> {
            let mut compressor = zstd::bulk::Compressor::new(level)?;
            parameters.into_iter().try_for_each(|parameter| compressor.set_parameter(parameter))?;
            Ok(compressor)
        };
        let failed = |e: std::io::Error| PayloadError::Compress(e.to_string());
        let (mut zstd, mut zstd_pages) = (None, None);
        if how == Compression::Zstd {
            zstd = Some(new(ZSTD_LEVEL, [CParameter::HashLog(HASH_LOG), CParameter::ChainLog(CHAIN_LOG)]).map_err(failed)?);
            let pages = [CParameter::WindowLog(PAGES_WINDOW_LOG), CParameter::HashLog(PAGES_HASH_LOG)];
            zstd_pages = Some(new(PAGES_LEVEL, pages).map_err(failed)?);
        }
        Ok(Self { how, zstd, zstd_pages, shrank: false, out: Vec::new() })
    }

    /// The payload of `raw`; stored as it is where compressing does not pay.
    pub fn compress(&mut self, raw: &[u8], texture: Texture) -> Result<&[u8], PayloadError> {
        let len = u32::try_from(raw.len()).map_err(|_| PayloadError::TooLong { claimed: raw.len() as u64, limit: u64::from(u32::MAX) })?;
        let failed = |e: std::io::Error| PayloadError::Compress(e.to_string());
        let compressible = self.how != Compression::None && (self.shrank || self.looks_compressible(raw)?);
        let begin = |out: &mut Vec<u8>, method: u8| {
            out.clear();
            out.push(method);
            out.extend_from_slice(&len.to_le_bytes());
        };
        if compressible {
            let zstd = match texture {
                Texture::Mixed => &mut self.zstd,
                Texture::Pages => &mut self.zstd_pages,
            };
            let packed = if let Some(zstd) = zstd {
                begin(&mut self.out, ZSTD);
                self.out.resize(PREFIX + zstd::zstd_safe::compress_bound(raw.len()), 0);
                let body = self.out.get_mut(PREFIX..).ok_or(PayloadError::Short)?;
                PREFIX + zstd.compress_to_buffer(raw, body).map_err(failed)?
            } else {
                begin(&mut self.out, ZLIB);
                let mut encoder = ZlibEncoder::new(&mut self.out, flate2::Compression::default());
                encoder.write_all(raw).map_err(failed)?;
                encoder.finish().map_err(failed)?.len()
            };
            self.shrank = packed <= raw.len() / 8 * 7;
            if packed < PREFIX + raw.len() {
                return self.out.get(..packed).ok_or(PayloadError::Short);
            }
        }
        begin(&mut self.out, STORED);
        self.out.extend_from_slice(raw);
        Ok(&self.out)
    }

    /// Samples long payloads: media and archives are not worth compressing whole to find that out.
    fn looks_compressible(&mut self, raw: &[u8]) -> Result<bool, PayloadError> {
        let (Some(zstd), true) = (&mut self.zstd, raw.len() >= 16 * SAMPLE) else { return Ok(true) };
        let mut sample = Vec::with_capacity(4 * SAMPLE);
        for quarter in 0..4 {
            let at = raw.len() / 4 * quarter;
            sample.extend_from_slice(raw.get(at..at + SAMPLE).unwrap_or_default());
        }
        let packed = zstd.compress(&sample).map_err(|e| PayloadError::Compress(e.to_string()))?;
        Ok(packed.len() < sample.len() - sample.len() / 50)
    }
}

/// Opens a payload; `limit` bounds what is allocated.
pub fn decompress(payload: &[u8], limit: usize) -> Result<Vec<u8>, PayloadError> {
    let mut raw = Vec::new();
    Decompressor::default().decompress_into(payload, limit, &mut raw)?;
    Ok(raw)
}

/// Opens payloads; one for each thread, so that zstd's tables are made once.
#[derive(Default)]
pub struct Decompressor {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Decompressor {
    /// Opens a payload; `limit` bounds what is allocated. `raw` is replaced, and of no use after an error.
    pub fn decompress_into(&mut self, payload: &[u8], limit: usize, raw: &mut Vec<u8>) -> Result<(), PayloadError> {
        let (method, len, body) = parts(payload, limit)?;
        let damaged = |e: std::io::Error| PayloadError::Damaged(e.to_string());
        let came = match method {
            STORED => {
                raw.clear();
                raw.extend_from_slice(body);
                body.len()
            }
            ZSTD => {
                raw.clear();
                raw.reserve(len);
                self.zstd()?.decompress_to_buffer(body, raw).map_err(damaged)?
            }
            ZLIB => {
                raw.clear();
                ZlibDecoder::new(body).take(len as u64 + 1).read_to_end(raw).map_err(damaged)?
            }
            other => return Err(PayloadError::Method(other)),
        };
        if came != len {
            return Err(PayloadError::Damaged(format!("{came} bytes came out where {len} went in")));
        }
        Ok(())
    }

    /// Whether a payload opens to exactly `raw`; `scratch` is of no use afterwards.
    pub fn opens_to(&mut self, payload: &[u8], raw: &[u8], scratch: &mut Vec<u8>) -> Result<bool, PayloadError> {
        match parts(payload, raw.len())? {
            (STORED, len, body) => Ok(len == raw.len() && body == raw),
            _ => {
                self.decompress_into(payload, raw.len(), scratch)?;
                Ok(scratch == raw)
            }
        }
    }

    fn zstd(&mut self) -> Result<&mut zstd::bulk::Decompressor<'static>, PayloadError> {
        if self.zstd.is_none() {
            self.zstd = Some(zstd::bulk::Decompressor::new().map_err(|e| PayloadError::Damaged(e.to_string()))?);
        }
        self.zstd.as_mut().ok_or(PayloadError::Short)
    }
}

/// A payload of a zstd frame that unpacks to `len` bytes; None where it is not one such frame, or no shorter than them.
pub fn of_zstd_frame(frame: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut payload = Vec::with_capacity(PREFIX + frame.len());
    payload.push(ZSTD);
    payload.extend_from_slice(&u32::try_from(len).ok()?.to_le_bytes());
    payload.extend_from_slice(frame);
    (frame.len() < len && zstd_frame(&payload, len).is_some()).then_some(payload)
}

/// What unpacking a frame as a whole may need besides its plaintext, in bytes: what every decoder of zstd allows without being asked to.
const MAX_WINDOW: u64 = 8 << 20;

/// Whether a zstd frame (RFC 8878) needs no dictionary, and no window of more than 8 MiB besides its plaintext. False also for what is no frame, or the start of one too short
/// to tell: 6 bytes are enough.
pub fn is_frugal_frame(frame: &[u8]) -> bool {
    let Some([0x28, 0xb5, 0x2f, 0xfd, descriptor, window]) = frame.first_chunk::<6>() else { return false };
    let (is_single_segment, has_dictionary) = (descriptor & 0x20 != 0, descriptor & 0x03 != 0);
    let base = 1u64 << (10 + (window >> 3));
    !has_dictionary && (is_single_segment || base + base / 8 * u64::from(window & 7) <= MAX_WINDOW)
}

/// The zstd frame of a payload, where it is one of exactly `len` bytes of plaintext, says so itself, and is one that any decoder takes
/// ([`is_frugal_frame`]).
pub fn zstd_frame(payload: &[u8], len: usize) -> Option<&[u8]> {
    match parts(payload, len) {
        Ok((ZSTD, claimed, frame)) if claimed == len => {
            let is_one = zstd::zstd_safe::find_frame_compressed_size(frame).is_ok_and(|size| size == frame.len());
            let says_so = matches!(zstd::zstd_safe::get_frame_content_size(frame), Ok(Some(size)) if size == len as u64);
            (is_one && says_so && is_frugal_frame(frame)).then_some(frame)
        }
        _ => None,
    }
}

/// Method, length before compression, body.
fn parts(payload: &[u8], limit: usize) -> Result<(u8, usize, &[u8]), PayloadError> {
    let (&method, rest) = payload.split_first().ok_or(PayloadError::Short)?;
    let (len, body) = rest.split_first_chunk::<4>().ok_or(PayloadError::Short)?;
    let len = u32::from_le_bytes(*len) as usize;
    match len > limit {
        true => Err(PayloadError::TooLong { claimed: len as u64, limit: limit as u64 }),
        false => Ok((method, len, body)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_back_in_every_way() {
        let text = b"all work and no play ".repeat(9000);
        let noise: Vec<u8> = (0..100_000u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32).wrapping_mul(i) as u8).collect();
        for how in [Compression::Zstd, Compression::Gzip, Compression::None] {
            for (raw, texture) in [
                (&text[..], Texture::Mixed),
                (&text[..], Texture::Pages),
                (&noise[..], Texture::Pages),
                (b"", Texture::Mixed),
                (b"x", Texture::Mixed),
            ] {
                let payload = Compressor::new(how).unwrap().compress(raw, texture).unwrap().to_vec();
                assert!(payload.len() <= raw.len() + PREFIX);
                assert_eq!(decompress(&payload, 1 << 20).unwrap(), raw);
                assert!(raw.is_empty() || decompress(&payload, raw.len() - 1).is_err(), "over the limit");
                for cut in 0..payload.len().min(200) {
                    assert!(decompress(&payload[..cut], 1 << 20).is_err());
                }
            }
        }
        assert!(Compressor::new(Compression::Zstd).unwrap().compress(&text, Texture::Mixed).unwrap().len() < 2000);
    }

    #[test]
    fn a_lying_length_is_an_error() {
        let mut payload = Compressor::new(Compression::Zstd).unwrap().compress(&[7; 5000], Texture::Pages).unwrap().to_vec();
        payload[1..5].copy_from_slice(&4999u32.to_le_bytes());
        assert!(decompress(&payload, 1 << 20).is_err());
        payload[1..5].copy_from_slice(&5001u32.to_le_bytes());
        assert!(decompress(&payload, 1 << 20).is_err());
    }

    #[test]
    fn frames_of_large_windows_or_dictionaries_are_not_passed_on() {
        let text = b"all work and no play ".repeat(9000);
        let streamed = |window: Option<u32>| {
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
            if let Some(window) = window {
                encoder.set_parameter(CParameter::WindowLog(window)).unwrap();
            }
            encoder.write_all(&text).unwrap();
            encoder.finish().unwrap()
        };
        assert!(is_frugal_frame(&zstd::bulk::compress(&text, 3).unwrap()));
        assert!(is_frugal_frame(&streamed(None)));
        assert!(is_frugal_frame(&streamed(Some(23))));
        assert!(!is_frugal_frame(&streamed(Some(24))));
        assert!(!is_frugal_frame(&[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x69]), "9 MiB");
        assert!(!is_frugal_frame(b"") && !is_frugal_frame(&[0x50, 0x2a, 0x4d, 0x18, 0x20, 0]) && !is_frugal_frame(&text));
        let whole = zstd::bulk::compress(&text, 3).unwrap();
        assert!(of_zstd_frame(&whole, text.len()).is_some());
        // The same frame, as if it needed a dictionary.
        let (mut of_dictionary, id) = (whole.clone(), 1);
        of_dictionary[4] |= 1;
        of_dictionary.insert(5, id);
        assert_eq!(zstd::zstd_safe::get_frame_content_size(&of_dictionary).unwrap(), Some(text.len() as u64));
        assert!(of_zstd_frame(&of_dictionary, text.len()).is_none());
    }
}
