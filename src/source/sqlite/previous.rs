//! The page map of the previous backup, when it was lost.

use std::path::Path;

use tokio_util::sync::CancellationToken;

use super::pagemap::{ContentHasher, MapReader, MapWriter, PageHash, hash_page};
use crate::repository::EntrySink;
use crate::repository::entry::Content;
use crate::source::SourceError;
use crate::source::extents::{Cursor, Fetched};

/// Hashes the previous content's pages again by fetching its chunks. None when it is no database's content.
pub fn rebuild_map(
    content: &Content,
    size: u64,
    cache_dir: &Path,
    sink: &mut dyn EntrySink,
    cancel: &CancellationToken,
) -> Result<Option<MapReader>, SourceError> {
    let mut fetched = Fetched::default();
    let mut taken = Vec::new();
    let mut page = Vec::new();
    if !Cursor::new(content).take(100, &mut taken) {
        return Ok(None);
    }
    fetched.read(&taken, &mut page, sink)?;
    let page_size = match page.get(16..18) {
        Some(&[0, 1]) => 1 << 16,
        Some(&[high, low]) => u32::from(u16::from_be_bytes([high, low])),
        _ => 0,
    };
    if !page_size.is_power_of_two() || page_size < 512 || !size.is_multiple_of(u64::from(page_size)) {
        return Ok(None);
    }
    // Whatever is wrong with the cache directory: then it goes without.
    let Ok(mut map) = MapWriter::create(cache_dir, page_size) else { return Ok(None) };
    let mut hasher = ContentHasher::new(page_size);
    let mut cursor = Cursor::new(content);
    for number in 0..size / u64::from(page_size) {
        if number % 256 == 0 && cancel.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        if !cursor.take(u64::from(page_size), &mut taken) {
            return Ok(None);
        }
        fetched.read(&taken, &mut page, sink)?;
        let hash = hash_page(&page);
        hasher.update(&hash);
        if page.len() != page_size as usize || map.write(&hash).is_err() {
            return Ok(None);
        }
    }
    if content.hash != PageHash::default() && content.hash != hasher.finish() {
        return Ok(None);
    }
    Ok(map.into_reader().ok())
}
