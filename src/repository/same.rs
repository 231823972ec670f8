//! Whether a file that was restored has the contents of its entry.
//!
//! What was stored by hashes alone is proven by them: the hash of a small file's contents, or of a chunk that stands in the file as a whole. Of
//! the rest the chunks are read again and compared, each once.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use tokio_util::sync::CancellationToken;

use super::entry::{ChunkId, Entry, Extent, MAX_CHUNK_BYTES, SMALL_FILE_BYTES, Segment};
use super::error::RepositoryError;
use super::open::Repository;
use super::pack::chunk_id;

/// Segments whose chunks are put into order at once.
const WINDOW: usize = 1 << 16;
/// Read of a hole at once.
const HOLE_BYTES: u64 = 1 << 20;

/// Where a file differs.
#[derive(Debug, PartialEq, Eq)]
pub enum Same {
    Yes,
    /// From this offset on, somewhere within the next piece.
    DiffersAt(u64),
}

/// Why a comparison has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// The restored file cannot be read.
    #[error("{0}")]
    File(#[from] io::Error),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
}

impl Repository {
    /// Compares a file with an entry's contents. Memory is bounded by a few chunks. `progress` gets the bytes as they are compared.
    pub fn compare(&self, entry: &Entry, file: &File, progress: &dyn Fn(u64), cancel: &CancellationToken) -> Result<Same, CompareError> {
        if entry.size <= SMALL_FILE_BYTES && entry.content.hash != [0; 16] {
            let mut contents = vec![0; entry.size as usize];
            file.read_exact_at(&mut contents, 0)?;
            if blake3::keyed_hash(&self.chunk_key, &contents).as_bytes().first_chunk() == Some(&entry.content.hash) {
                progress(entry.size);
                return Ok(Same::Yes);
            }
        }
        let mut buffer = Vec::new();
        let mut offset = 0;
        for window in entry.content.segments.chunks(WINDOW) {
            let mut order: Vec<ChunkId> = Vec::new();
            let mut left: HashMap<ChunkId, Vec<(u64, Extent)>> = HashMap::new();
            for segment in window {
                if cancel.is_cancelled() {
                    return Err(RepositoryError::Cancelled.into());
                }
                match segment {
                    Segment::Hole(len) => {
                        if !is_zero(file, offset, *len, &mut buffer)? {
                            return Ok(Same::DiffersAt(offset));
                        }
                        progress(*len);
                    }
                    Segment::Data(extent) => {
                        let piece = read(file, offset, extent.len as usize, &mut buffer)?;
                        // A hash that fits says that the piece is the whole chunk, too.
                        match extent.offset == 0 && chunk_id(&self.chunk_key, piece) == extent.chunk {
                            true => progress(u64::from(extent.len)),
                            false => left
                                .entry(extent.chunk)
                                .or_insert_with(|| {
                                    order.push(extent.chunk);
                                    Vec::new()
                                })
                                .push((offset, *extent)),
                        }
                    }
                }
                offset += segment.len();
            }
            for id in order {
                if cancel.is_cancelled() {
                    return Err(RepositoryError::Cancelled.into());
                }
                let chunk = self.read_chunk(&id)?;
                for (at, extent) in left.remove(&id).unwrap_or_default() {
                    let start = extent.offset as usize;
                    let stored = chunk.get(start..start + extent.len as usize);
                    if stored != Some(read(file, at, extent.len as usize, &mut buffer)?) {
                        return Ok(Same::DiffersAt(at));
                    }
                    progress(u64::from(extent.len));
                }
            }
        }
        Ok(Same::Yes)
    }
}

fn read<'b>(file: &File, offset: u64, len: usize, buffer: &'b mut Vec<u8>) -> io::Result<&'b [u8]> {
    buffer.resize(len.min(MAX_CHUNK_BYTES), 0);
    file.read_exact_at(buffer, offset)?;
    Ok(buffer)
}

fn is_zero(file: &File, offset: u64, len: u64, buffer: &mut Vec<u8>) -> io::Result<bool> {
    let mut done = 0;
    while done < len {
        let now = (len - done).min(HOLE_BYTES);
        if read(file, offset + done, now as usize, buffer)?.iter().any(|b| *b != 0) {
            return Ok(false);
        }
        done += now;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::payload::Texture;
    use super::super::source_writer::SourceWriter;
    use super::super::test_world::World;
    use super::super::writer::Writer;
    use super::super::{Content, EntrySink, Kind, SourceReader};
    use super::*;

    #[test]
    fn every_changed_byte_is_found() {
        let world = World::new();
        let repository = world.seen_by("a", None);
        let mut writer = Writer::new(repository.clone(), CancellationToken::new()).unwrap();
        let mut sink = SourceWriter::new(&mut writer, "files", "files", b"/x", None);
        let mut noise = vec![0; 300_000];
        blake3::Hasher::new().update(b"noise").finalize_xof().fill(&mut noise);
        sink.push(Entry { kind: Kind::Directory, ..Entry::default() }).unwrap();
        sink.push_small(Entry { path: b"a".into(), ..Entry::default() }, &noise[..1000]).unwrap();
        // A whole chunk, a hole, parts of chunks out of order.
        let (one, two) = (sink.store(&noise[..100_000], Texture::Mixed).unwrap(), sink.store(&noise[100_000..], Texture::Mixed).unwrap());
        let part = |chunk, offset, len| Segment::Data(Extent { chunk, offset, len });
        let segments = vec![part(one, 0, 100_000), Segment::Hole(5000), part(two, 700, 50_000), part(one, 10, 20), part(two, 0, 500)];
        let expected = [&noise[..100_000], &[0; 5000], &noise[100_700..150_700], &noise[10..30], &noise[100_000..100_500]].concat();
        let content = Content { hash: [0; 16], segments };
        sink.push(Entry { path: b"b".into(), size: expected.len() as u64, content, ..Entry::default() }).unwrap();
        let source = sink.finish("{}".into()).unwrap().source;
        writer.flush().unwrap();
        let mut reader = SourceReader::new(repository.clone(), &source);
        let mut compared = 0;
        while let Some(entry) = reader.next_entry().unwrap() {
            if entry.kind != Kind::File {
                continue;
            }
            let expected = if entry.path == b"a" { &noise[..1000] } else { &expected[..] };
            let same = |bytes: &[u8]| {
                let mut file = tempfile::tempfile().unwrap();
                file.write_all(bytes).unwrap();
                repository.compare(&entry, &file, &|_| {}, &CancellationToken::new()).unwrap()
            };
            assert_eq!(same(expected), Same::Yes);
            for at in [0, 500, 99_999, 100_000, 104_999, 105_000, 154_999, 155_000, 155_519] {
                if let Some(byte) = expected.to_vec().get_mut(at) {
                    let mut changed = expected.to_vec();
                    changed[at] = *byte ^ 1;
                    assert!(matches!(same(&changed), Same::DiffersAt(from) if from <= at as u64), "{at}");
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, 11);
    }
}
