//! Content-defined chunking: FastCDC (Xia et al., 2016 and 2020) with a secret gear table of the repository.

use fastcdc::v2020::{Normalization, cut_gear, select_masks};

/// Chunk sizes of plain files in bytes. The average is what an insertion into a file stores anew, and about 1/400 of what
/// the index costs.
pub const MIN_BYTES: usize = 256 << 10;
pub const AVERAGE_BYTES: usize = 512 << 10;
pub const MAX_BYTES: usize = 2 << 20;

/// How long chunks are, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// At least 64.
    pub min: usize,
    /// At least 256.
    pub average: usize,
    /// At most a quarter of the buffer.
    pub max: usize,
}

/// The gear table that everybody has: for cuts that tell nothing.
pub fn public_gear() -> Box<[u64; 256]> {
    let mut gear = Box::new([0; 256]);
    for (slot, word) in gear.iter_mut().zip(fastcdc::v2020::get_gear_with_seed(0).0.iter()) {
        *slot = *word;
    }
    gear
}

/// What is held at the most: a chunk's worth of bytes ahead is needed to cut, more makes moving the rest rarer.
const BUFFER_BYTES: usize = 8 << 20;

/// Cuts a stream that arrives in pieces, in a buffer the pieces are read into.
pub struct Chunker {
    gear: Box<[u64; 256]>,
    gear_ls: Box<[u64; 256]>,
    masks: (u64, u64),
    sizes: Sizes,
    buffer: Vec<u8>,
    /// What of the buffer was cut off already.
    start: usize,
    /// Where the bytes that came end.
    end: usize,
}

impl Chunker {
    pub fn new(gear: Box<[u64; 256]>) -> Self {
        Self::with(gear, Sizes { min: MIN_BYTES, average: AVERAGE_BYTES, max: MAX_BYTES })
    }

    pub fn with(gear: Box<[u64; 256]>, sizes: Sizes) -> Self {
        let mut gear_ls = gear.clone();
        gear_ls.iter_mut().for_each(|g| *g = g.wrapping_shl(1));
        let masks = select_masks(sizes.average, Normalization::Level1);
        Self { gear, gear_ls, masks, sizes, buffer: Vec::new(), start: 0, end: 0 }
    }

    /// Where the next bytes go, at most `want` of them and at least one; tell with [`Chunker::filled`] how many came.
    pub fn space(&mut self, want: usize) -> &mut [u8] {
        if self.buffer.is_empty() {
            self.buffer.resize(BUFFER_BYTES, 0);
        }
        if self.buffer.len() - self.end < want.min(BUFFER_BYTES / 4) {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let space = self.buffer.get_mut(self.end..).unwrap_or_default();
        let len = want.min(space.len());
        space.get_mut(..len).unwrap_or_default()
    }

    /// Takes in what was written to the space. Call [`Chunker::next_chunk`] until it gives none before the next.
    pub fn filled(&mut self, len: usize) {
        self.end = (self.end + len).min(self.buffer.len());
    }

    /// The next chunk whose end is certain; with `last`, also what is left over.
    pub fn next_chunk(&mut self, last: bool) -> Option<&[u8]> {
        let rest = self.buffer.get(self.start..self.end).unwrap_or_default();
        if rest.is_empty() || (!last && rest.len() < self.sizes.max) {
            return None;
        }
        let (mask_s, mask_l) = self.masks;
        let (_, cut) = cut_gear(
            rest,
            self.sizes.min,
            self.sizes.average,
            self.sizes.max,
            mask_s,
            mask_l,
            mask_s << 1,
            mask_l << 1,
            self.gear.as_slice(),
            self.gear_ls.as_slice(),
        );
        let chunk = rest.get(..cut).unwrap_or(rest);
        self.start += chunk.len();
        Some(chunk)
    }

    /// Forgets what it holds.
    pub fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::{Keyring, MasterKey};

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
        let mut chunker = Chunker::new(Keyring::of(MasterKey::from_bytes([master; 32])).gear());
        let mut chunks = Vec::new();
        let mut data = data;
        while !data.is_empty() {
            let space = chunker.space(piece.min(data.len()));
            let (now, later) = data.split_at(space.len());
            space.copy_from_slice(now);
            chunker.filled(now.len());
            data = later;
            chunks.extend(std::iter::from_fn(|| chunker.next_chunk(false).map(<[u8]>::to_vec)));
        }
        chunks.extend(std::iter::from_fn(|| chunker.next_chunk(true).map(<[u8]>::to_vec)));
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
