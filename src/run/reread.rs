//! What is read once stays at hand until it is used again, as far as there is room for it: when a scattered file is sent from its start to its end, the
//! pieces of one chunk come far apart.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use crate::repository::{ChunkId, Segment};

/// Chunks held from one use to the next. Where there is no room for all, the one whose next use is the furthest goes (L. A. Belady, "A study of
/// replacement algorithms for a virtual-storage computer", 1966), and is read again then.
pub struct Held<T> {
    /// When each chunk is used, in pieces from the first on; what was used is gone.
    uses: HashMap<ChunkId, VecDeque<u32>>,
    held: HashMap<ChunkId, (T, usize)>,
    /// The held ones by their next use.
    by_next: BTreeSet<(u32, ChunkId)>,
    bytes: usize,
    limit: usize,
}

impl<T: Clone> Held<T> {
    /// For the pieces of these segments, in their order. `limit`: bytes held at once at most.
    pub fn new(segments: &[Segment], limit: usize) -> Self {
        let mut uses: HashMap<ChunkId, VecDeque<u32>> = HashMap::new();
        for (n, segment) in (0u32..).zip(segments) {
            if let Segment::Data(extent) = segment {
                uses.entry(extent.chunk).or_default().push_back(n);
            }
        }
        Self { uses, held: HashMap::new(), by_next: BTreeSet::new(), bytes: 0, limit }
    }

    /// Whether any chunk is used more than once.
    pub fn will_hold(&self) -> bool {
        self.uses.values().any(|uses| uses.len() > 1)
    }

    /// The next piece is of this chunk. `get` gives it, and its length in bytes, where it is not held.
    pub fn next<E>(&mut self, chunk: &ChunkId, get: impl FnOnce() -> Result<(T, usize), E>) -> Result<T, E> {
        let uses = self.uses.get_mut(chunk);
        let (now, later) = uses.map_or((None, None), |uses| (uses.pop_front(), uses.front().copied()));
        let (what, len) = match self.held.remove(chunk) {
            Some(held) => {
                if let Some(now) = now {
                    self.by_next.remove(&(now, *chunk));
                }
                self.bytes -= held.1;
                held
            }
            None => get()?,
        };
        if let Some(later) = later {
            self.held.insert(*chunk, (what.clone(), len));
            self.by_next.insert((later, *chunk));
            self.bytes += len;
            while self.bytes > self.limit
                && let Some((_, furthest)) = self.by_next.pop_last()
            {
                self.bytes -= self.held.remove(&furthest).map_or(0, |(_, len)| len);
            }
        }
        Ok(what)
    }

    /// The next piece is of this chunk, and not wanted.
    pub fn pass(&mut self, chunk: &ChunkId) {
        let uses = self.uses.get_mut(chunk);
        let Some(now) = uses.and_then(VecDeque::pop_front) else { return };
        if self.by_next.remove(&(now, *chunk))
            && let Some((_, len)) = self.held.remove(chunk)
        {
            self.bytes -= len;
        }
    }
}

/// Whether a piece comes of a chunk of which another one came before.
pub fn comes_again(segments: &[Segment]) -> bool {
    let mut seen = HashSet::new();
    segments.iter().any(|segment| matches!(segment, Segment::Data(extent) if !seen.insert(extent.chunk)))
}

/// What sending the pieces in their order reads: bytes of chunks, those that are read again among them, and bytes of all the chunks once. `len_of`: how
/// long a chunk is, in bytes; where that is not known it counts as far as it is needed.
pub fn read_in_order(segments: &[Segment], len_of: impl Fn(&ChunkId) -> Option<u32>, limit: usize) -> (u64, u64) {
    let mut lengths: HashMap<ChunkId, usize> = HashMap::new();
    for segment in segments {
        if let Segment::Data(extent) = segment {
            let end = (extent.offset as usize).saturating_add(extent.len as usize);
            let len = lengths.entry(extent.chunk).or_insert_with(|| len_of(&extent.chunk).unwrap_or_default() as usize);
            *len = end.max(*len);
        }
    }
    let once = lengths.values().map(|len| *len as u64).sum();
    let (mut held, mut read) = (Held::new(segments, limit), 0u64);
    for segment in segments {
        if let Segment::Data(extent) = segment {
            let len = lengths.get(&extent.chunk).copied().unwrap_or_default();
            let _: Result<(), std::convert::Infallible> = held.next(&extent.chunk, || {
                read += len as u64;
                Ok(((), len))
            });
        }
    }
    (read, once)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::entry::Extent;
    use proptest::prelude::*;

    fn segments(chunks: &[u8]) -> Vec<Segment> {
        let of = |c: &u8| Segment::Data(Extent { chunk: ChunkId([*c; 32]), offset: 0, len: 10 });
        chunks.iter().map(of).collect()
    }

    #[test]
    fn the_furthest_goes() {
        let none = |_: &ChunkId| None;
        // Room for two: when 3 comes, 2 is the one that is needed last.
        assert_eq!(read_in_order(&segments(&[1, 2, 3, 1, 3, 2]), none, 20), (40, 30));
        assert_eq!(read_in_order(&segments(&[1, 2, 3, 1, 3, 2]), none, 30), (30, 30));
        assert_eq!(read_in_order(&segments(&[1, 1, 2, 2, 3, 3]), none, 10), (30, 30));
        // A hole is nothing that is read.
        let mut with_hole = segments(&[1, 2, 1]);
        with_hole.insert(1, Segment::Hole(5));
        assert_eq!(read_in_order(&with_hole, none, 20), (20, 20));
        assert_eq!(read_in_order(&segments(&[1, 2, 1]), |_| Some(100), 20), (300, 200), "too long to be held");
        assert!(comes_again(&with_hole) && !comes_again(&segments(&[1, 2, 3])));
    }

    proptest! {
        #[test]
        fn nothing_else_is_given_and_no_more_is_held(
            pieces in prop::collection::vec((0u8..12, 1usize..6, any::<bool>()), 0..200),
            limit in 0usize..40,
        ) {
            let chunks: Vec<u8> = pieces.iter().map(|p| p.0).collect();
            let len = |c: u8| usize::from(c % 5) + 1;
            let mut held = Held::new(&segments(&chunks), limit);
            let (mut read, mut wanted) = (0, std::collections::HashSet::new());
            for (c, _, pass) in pieces {
                let id = ChunkId([c; 32]);
                if pass {
                    held.pass(&id);
                } else {
                    let got = held.next(&id, || { read += 1; Ok::<_, ()>((c, len(c))) }).unwrap();
                    prop_assert_eq!(got, c);
                    wanted.insert(c);
                }
                prop_assert!(held.bytes <= limit);
                prop_assert_eq!(held.bytes, held.held.values().map(|(_, len)| *len).sum::<usize>());
                prop_assert_eq!(held.held.len(), held.by_next.len());
            }
            prop_assert!(held.held.is_empty() && read >= wanted.len());
        }
    }
}
