//! Varlink's frames: JSON and a NUL byte.

use std::io;

use bytes::BytesMut;
use tokio_util::codec::Decoder;

/// Cuts a byte stream at NUL bytes; a frame longer than `max` is an error before it is held whole.
pub struct NulFrames {
    max: usize,
    /// What of the buffer was looked at already, so that a frame that comes byte by byte costs no more.
    scanned: usize,
}

impl NulFrames {
    pub fn new(max: usize) -> Self {
        Self { max, scanned: 0 }
    }
}

impl Decoder for NulFrames {
    type Item = BytesMut;
    type Error = io::Error;

    fn decode(&mut self, buffer: &mut BytesMut) -> io::Result<Option<BytesMut>> {
        let fresh = buffer.get(self.scanned..).unwrap_or_default();
        let Some(at) = fresh.iter().position(|b| *b == 0) else {
            self.scanned = buffer.len();
            return match buffer.len() >= self.max {
                true => Err(io::Error::new(io::ErrorKind::InvalidData, format!("a message is longer than {} bytes", self.max))),
                false => Ok(None),
            };
        };
        let end = self.scanned + at;
        if end >= self.max {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a message is longer than {} bytes", self.max)));
        }
        let mut frame = buffer.split_to(end + 1);
        frame.truncate(end);
        self.scanned = 0;
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_do_not_depend_on_how_bytes_arrive(frames in proptest::collection::vec("[a-z]{0,20}", 0..10), step in 1usize..9) {
            let bytes: Vec<u8> = frames.iter().flat_map(|f| f.bytes().chain([0])).collect();
            let (mut decoder, mut buffer, mut found) = (NulFrames::new(64), BytesMut::new(), Vec::new());
            for piece in bytes.chunks(step) {
                buffer.extend_from_slice(piece);
                while let Some(frame) = decoder.decode(&mut buffer).unwrap() { found.push(String::from_utf8(frame.to_vec()).unwrap()); }
            }
            prop_assert_eq!(found, frames);
        }
    }

    #[test]
    fn too_long_is_an_error_with_and_without_its_end() {
        for tail in ["", "\0"] {
            let mut buffer = BytesMut::from(format!("{}{tail}", "x".repeat(64)).as_bytes());
            assert!(NulFrames::new(64).decode(&mut buffer).is_err());
        }
    }
}
