//! What is sealed: one byte for the way of compression, the length before it (u32 LE), the bytes.

use std::io::{Read, Write};

use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;

use crate::config::Compression;

const STORED: u8 = 0;
const ZSTD: u8 = 1;
const ZLIB: u8 = 2;
const PREFIX: usize = 5;
/// zstd's default level: on database pages it costs about the same as level 1 with AVX2 and gives a tenth less.
const ZSTD_LEVEL: i32 = 3;
/// Incompressible data is noticed on samples of this size.
const SAMPLE: usize = 4 << 10;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
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

/// Compresses payloads; one for each thread, its buffers are used again.
pub struct Compressor {
    how: Compression,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Compressor {
    pub fn new(how: Compression) -> Result<Self, PayloadError> {
        let zstd = match how {
            Compression::Zstd => Some(zstd::bulk::Compressor::new(ZSTD_LEVEL).map_err(|e| PayloadError::Compress(e.to_string()))?),
            _ => None,
        };
        Ok(Self { how, zstd })
    }

    /// The payload of `raw`; stored as it is where compressing does not pay.
    pub fn compress(&mut self, raw: &[u8]) -> Result<Vec<u8>, PayloadError> {
        let len = u32::try_from(raw.len()).map_err(|_| PayloadError::TooLong { claimed: raw.len() as u64, limit: u64::from(u32::MAX) })?;
        let failed = |e: std::io::Error| PayloadError::Compress(e.to_string());
        let prefix = |method: u8| {
            let mut out = vec![method];
            out.extend_from_slice(&len.to_le_bytes());
            out
        };
        if self.how != Compression::None && self.looks_compressible(raw)? {
            let mut out;
            if let Some(zstd) = &mut self.zstd {
                out = prefix(ZSTD);
                out.resize(PREFIX + zstd::zstd_safe::compress_bound(raw.len()), 0);
                let body = out.get_mut(PREFIX..).ok_or(PayloadError::Short)?;
                let n = zstd.compress_to_buffer(raw, body).map_err(failed)?;
                out.truncate(PREFIX + n);
            } else {
                let mut encoder = ZlibEncoder::new(prefix(ZLIB), flate2::Compression::default());
                encoder.write_all(raw).map_err(failed)?;
                out = encoder.finish().map_err(failed)?;
            }
            if out.len() < PREFIX + raw.len() {
                return Ok(out);
            }
        }
        let mut out = prefix(STORED);
        out.extend_from_slice(raw);
        Ok(out)
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
    let (&method, rest) = payload.split_first().ok_or(PayloadError::Short)?;
    let (len, body) = rest.split_first_chunk::<4>().ok_or(PayloadError::Short)?;
    let len = u32::from_le_bytes(*len) as usize;
    if len > limit {
        return Err(PayloadError::TooLong { claimed: len as u64, limit: limit as u64 });
    }
    let damaged = |e: std::io::Error| PayloadError::Damaged(e.to_string());
    let raw = match method {
        STORED => body.to_vec(),
        ZSTD => zstd::bulk::decompress(body, len).map_err(damaged)?,
        ZLIB => {
            let mut raw = Vec::with_capacity(len);
            ZlibDecoder::new(body).take(len as u64 + 1).read_to_end(&mut raw).map_err(damaged)?;
            raw
        }
        other => return Err(PayloadError::Method(other)),
    };
    if raw.len() != len {
        return Err(PayloadError::Damaged(format!("{} bytes came out where {len} went in", raw.len())));
    }
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_back_in_every_way() {
        let text = b"all work and no play ".repeat(9000);
        let noise: Vec<u8> = (0..100_000u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32).wrapping_mul(i) as u8).collect();
        for how in [Compression::Zstd, Compression::Gzip, Compression::None] {
            for raw in [&text[..], &noise, b"", b"x"] {
                let payload = Compressor::new(how).unwrap().compress(raw).unwrap();
                assert!(payload.len() <= raw.len() + PREFIX);
                assert_eq!(decompress(&payload, 1 << 20).unwrap(), raw);
                assert!(raw.is_empty() || decompress(&payload, raw.len() - 1).is_err(), "over the limit");
                for cut in 0..payload.len().min(200) {
                    assert!(decompress(&payload[..cut], 1 << 20).is_err());
                }
            }
        }
        assert!(Compressor::new(Compression::Zstd).unwrap().compress(&text).unwrap().len() < 2000);
    }

    #[test]
    fn a_lying_length_is_an_error() {
        let mut payload = Compressor::new(Compression::Zstd).unwrap().compress(&[7; 5000]).unwrap();
        payload[1..5].copy_from_slice(&4999u32.to_le_bytes());
        assert!(decompress(&payload, 1 << 20).is_err());
        payload[1..5].copy_from_slice(&5001u32.to_le_bytes());
        assert!(decompress(&payload, 1 << 20).is_err());
    }
}
