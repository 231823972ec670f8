//! Content-defined chunking: FastCDC (Xia et al., 2016 and 2020) with a secret gear table of the repository.

use fastcdc::v2020::{Normalization, cut_gear, select_masks};

/// Chunk sizes of plain files in bytes. The average is what an insertion into a file stores anew, and about 1/400 of what
/// the index costs.
pub const MIN_BYTES: usize = 128 << 10;
pub const AVERAGE_BYTES: usize = 512 << 10;
pub const MAX_BYTES: usize = 2 << 20;

/// Cuts a stream that arrives in pieces.
pub struct Chunker {
    gear: Box<[u64; 256]>,
    gear_ls: Box<[u64; 256]>,
    masks: (u64, u64),
    buffer: Vec<u8>,
    /// What of the buffer was cut off already.
    start: usize,
}

impl Chunker {
    pub fn new(gear: Box<[u64; 256]>) -> Self {
        let mut gear_ls = gear.clone();
        gear_ls.iter_mut().for_each(|g| *g = g.wrapping_shl(1));
        Self { gear, gear_ls, masks: select_masks(AVERAGE_BYTES, Normalization::Level1), buffer: Vec::new(), start: 0 }
    }

    /// Takes bytes in; call [`Chunker::next_chunk`] until it gives none before the next.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next chunk whose end is certain; with `last`, also what is left over.
    pub fn next_chunk(&mut self, last: bool) -> Option<Vec<u8>> {
        let rest = self.buffer.get(self.start..).unwrap_or_default();
        if rest.is_empty() || (!last && rest.len() < MAX_BYTES) {
            return None;
        }
        let (mask_s, mask_l) = self.masks;
        let (_, cut) = cut_gear(
            rest,
            MIN_BYTES,
            AVERAGE_BYTES,
            MAX_BYTES,
            mask_s,
            mask_l,
            mask_s << 1,
            mask_l << 1,
            self.gear.as_slice(),
            self.gear_ls.as_slice(),
        );
        let chunk = rest.get(..cut).unwrap_or(rest).to_vec();
        self.start += chunk.len();
        Some(chunk)
    }

    /// Forgets what it holds.
    pub fn clear(&mut self) {
        self.buffer.clear();
        self.start = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::MasterKey;

    fn noise(len: usize, mut seed: u64) -> Vec<u8> {
        (0..len)
            .map(|_| {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed as u8
            })
            .collect()
    }

    fn cut(data: &[u8], piece: usize, master: u8) -> Vec<Vec<u8>> {
        let mut chunker = Chunker::new(MasterKey::from_bytes([master; 32]).gear());
        let mut chunks = Vec::new();
        for bytes in data.chunks(piece) {
            chunker.push(bytes);
            chunks.extend(std::iter::from_fn(|| chunker.next_chunk(false)));
        }
        chunks.extend(std::iter::from_fn(|| chunker.next_chunk(true)));
        chunks
    }

    #[test]
    fn pieces_do_not_matter_and_nothing_is_lost() {
        let data = noise(9 << 20, 1);
        let a = cut(&data, 1 << 20, 1);
        assert_eq!(a.concat(), data);
        assert_eq!(a, cut(&data, 77_777, 1));
        assert!(a.iter().rev().skip(1).all(|c| (MIN_BYTES..=MAX_BYTES).contains(&c.len())));
        assert_ne!(a, cut(&data, 1 << 20, 2), "another repository cuts elsewhere");
    }

    #[test]
    fn an_insertion_changes_few_chunks() {
        let data = noise(16 << 20, 3);
        let mut longer = data.clone();
        longer.splice(7_000_000..7_000_000, noise(1000, 9));
        let (a, b) = (cut(&data, 1 << 20, 1), cut(&longer, 1 << 20, 1));
        let new = b.iter().filter(|c| !a.contains(c)).count();
        assert!(new <= 3, "{new} new chunks of {}", b.len());
    }
}
