//! Ids of chunks, any number of them, in order and each once, within a bound on memory: as sorted runs in temporary files, merged when they are read.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use super::entry::ChunkId;

/// Ids in memory before they are written to a run: 16 MiB of them.
const BUFFERED: usize = 512 << 10;
/// Bytes of a run that are read at once.
const READ_AHEAD: usize = 64 << 10;

/// Ids, any number of them, as sorted runs: those that are full in temporary files without a name, one in memory.
pub struct Runs {
    /// Where the files are.
    directory: PathBuf,
    full: Vec<File>,
    last: Vec<ChunkId>,
    /// Ids in memory before they are written to a file.
    most: usize,
}

impl Runs {
    pub fn within(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), full: Vec::new(), last: Vec::new(), most: BUFFERED }
    }

    pub fn add(&mut self, id: ChunkId) -> std::io::Result<()> {
        self.last.push(id);
        if self.last.len() < self.most {
            return Ok(());
        }
        self.sort();
        // Most backups refer to what the one before did: it is a run only when half of it is new.
        if self.last.len() * 2 < self.most {
            return Ok(());
        }
        let mut out = BufWriter::new(tempfile::tempfile_in(&self.directory)?);
        for id in self.last.drain(..) {
            out.write_all(&id.0)?;
        }
        self.full.push(out.into_inner().map_err(std::io::IntoInnerError::into_error)?);
        Ok(())
    }

    fn sort(&mut self) {
        self.last.sort_unstable();
        self.last.dedup();
    }

    /// All of them in order, each once.
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
            heads.extend(run.next()?.map(|id| Reverse((id, n))));
        }
        Ok(Merged { runs, heads, last: None })
    }
}

enum Run<'r> {
    File(BufReader<&'r File>),
    Memory(std::slice::Iter<'r, ChunkId>),
}

impl Run<'_> {
    fn next(&mut self) -> std::io::Result<Option<ChunkId>> {
        match self {
            Run::Memory(ids) => Ok(ids.next().copied()),
            Run::File(file) => {
                let mut id = [0; 32];
                if file.read(&mut id[..1])? == 0 {
                    return Ok(None);
                }
                file.read_exact(&mut id[1..])?;
                Ok(Some(ChunkId(id)))
            }
        }
    }
}

pub struct Merged<'r> {
    runs: Vec<Run<'r>>,
    heads: BinaryHeap<Reverse<(ChunkId, usize)>>,
    last: Option<ChunkId>,
}

impl Merged<'_> {
    /// The next one; strictly ascending.
    pub fn next(&mut self) -> std::io::Result<Option<ChunkId>> {
        while let Some(Reverse((id, n))) = self.heads.pop() {
            if let Some(run) = self.runs.get_mut(n) {
                self.heads.extend(run.next()?.map(|id| Reverse((id, n))));
            }
            if self.last != Some(id) {
                self.last = Some(id);
                return Ok(Some(id));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    proptest::proptest! {
        #[test]
        fn what_is_added_comes_out_once_and_in_order(bytes in proptest::collection::vec(0u8..50, 0..400), most in 2usize..40) {
            let directory = tempfile::tempdir().unwrap();
            let mut runs = Runs { most, ..Runs::within(directory.path()) };
            for byte in &bytes {
                runs.add(ChunkId([*byte; 32])).unwrap();
                proptest::prop_assert!(runs.last.len() < most);
            }
            // As often as one likes.
            for _ in 0..2 {
                let (mut merged, mut found) = (runs.merged().unwrap(), Vec::new());
                while let Some(id) = merged.next().unwrap() {
                    found.push(id.0[0]);
                }
                proptest::prop_assert_eq!(found, bytes.iter().copied().collect::<BTreeSet<u8>>().into_iter().collect::<Vec<_>>());
            }
        }
    }
}
