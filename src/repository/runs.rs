//! How often chunks are referred to, more or less often than before: any number of them, in the order of their ids and each once, within a bound on memory. Sorted runs
//! in temporary files are merged when they are read (Knuth, *The Art of Computer Programming*, vol. 3, 5.4).

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use super::entry::ChunkId;

/// Uses in memory before they are written to a run: 20 MiB of them.
const BUFFERED: usize = 512 << 10;
/// Bytes of a run that are read at once.
const READ_AHEAD: usize = 64 << 10;

/// A chunk, and how many references to it there are more, or fewer.
pub type Uses = (ChunkId, i64);

/// Uses of chunks as sorted runs: those that are full in temporary files without a name, one in memory.
pub struct Runs {
    /// Where the files are.
    directory: PathBuf,
    full: Vec<File>,
    last: Vec<Uses>,
    /// Uses in memory before they are written to a file.
    most: usize,
}

impl Runs {
    pub fn within(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), full: Vec::new(), last: Vec::new(), most: BUFFERED }
    }

    pub fn add(&mut self, id: ChunkId, uses: i64) -> std::io::Result<()> {
        self.last.push((id, uses));
        if self.last.len() < self.most {
            return Ok(());
        }
        self.sort();
        // Most backups refer to what the one before did: it is a run only when half of it is new.
        if self.last.len() * 2 < self.most {
            return Ok(());
        }
        let mut out = BufWriter::new(tempfile::tempfile_in(&self.directory)?);
        for (id, uses) in self.last.drain(..) {
            out.write_all(&id.0)?;
            out.write_all(&uses.to_le_bytes())?;
        }
        self.full.push(out.into_inner().map_err(std::io::IntoInnerError::into_error)?);
        Ok(())
    }

    fn sort(&mut self) {
        self.last.sort_unstable_by_key(|(id, _)| *id);
        self.last.dedup_by(|next, kept| {
            let is_same = next.0 == kept.0;
            if is_same {
                kept.1 = kept.1.saturating_add(next.1);
            }
            is_same
        });
    }

    /// All of them in order, each once; those that are used as often as before are left out.
    pub fn merged(&mut self) -> std::io::Result<Merged<'_>> {
        self.sort();
        let mut heads = BinaryHeap::new();
        let mut runs = Vec::with_capacity(self.full.len() + 1);
        for file in &mut self.full {
            file.rewind()?;
            runs.push(Run::File(BufReader::with_capacity(READ_AHEAD, &*file)));
        }
        runs.push(Run::Memory(self.last.iter()));
        for (n, run) in runs.iter_mut().enumerate() {
            heads.extend(run.next()?.map(|uses| Reverse((uses, n))));
        }
        Ok(Merged { runs, heads })
    }
}

enum Run<'r> {
    File(BufReader<&'r File>),
    Memory(std::slice::Iter<'r, Uses>),
}

impl Run<'_> {
    fn next(&mut self) -> std::io::Result<Option<Uses>> {
        match self {
            Run::Memory(uses) => Ok(uses.next().copied()),
            Run::File(file) => {
                if file.fill_buf()?.is_empty() {
                    return Ok(None);
                }
                let (mut id, mut uses) = ([0; 32], [0; 8]);
                file.read_exact(&mut id)?;
                file.read_exact(&mut uses)?;
                Ok(Some((ChunkId(id), i64::from_le_bytes(uses))))
            }
        }
    }
}

pub struct Merged<'r> {
    runs: Vec<Run<'r>>,
    heads: BinaryHeap<Reverse<(Uses, usize)>>,
}

impl Merged<'_> {
    /// The next one; their ids are strictly ascending.
    pub fn next(&mut self) -> std::io::Result<Option<Uses>> {
        while let Some((id, mut uses)) = self.pop()? {
            while self.heads.peek().is_some_and(|Reverse(((next, _), _))| *next == id) {
                uses = uses.saturating_add(self.pop()?.map_or(0, |(_, more)| more));
            }
            if uses != 0 {
                return Ok(Some((id, uses)));
            }
        }
        Ok(None)
    }

    fn pop(&mut self) -> std::io::Result<Option<Uses>> {
        let Some(Reverse((uses, n))) = self.heads.pop() else { return Ok(None) };
        if let Some(run) = self.runs.get_mut(n) {
            self.heads.extend(run.next()?.map(|uses| Reverse((uses, n))));
        }
        Ok(Some(uses))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    proptest::proptest! {
        #[test]
        fn what_is_added_comes_out_summed_and_in_order(all in proptest::collection::vec((0u8..50, -2i64..3), 0..400), most in 2usize..40) {
            let directory = tempfile::tempdir().unwrap();
            let mut runs = Runs { most, ..Runs::within(directory.path()) };
            let mut sums: BTreeMap<u8, i64> = BTreeMap::new();
            for (byte, uses) in &all {
                runs.add(ChunkId([*byte; 32]), *uses).unwrap();
                *sums.entry(*byte).or_default() += uses;
                proptest::prop_assert!(runs.last.len() < most);
            }
            sums.retain(|_, uses| *uses != 0);
            // As often as one likes.
            for _ in 0..2 {
                let (mut merged, mut found) = (runs.merged().unwrap(), Vec::new());
                while let Some((id, uses)) = merged.next().unwrap() {
                    found.push((id.0[0], uses));
                }
                proptest::prop_assert_eq!(found, sums.clone().into_iter().collect::<Vec<_>>());
            }
        }
    }
}
