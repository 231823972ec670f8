//! A backup from one repository into another, whose key, chunk ids and compression are its own: what is missing there is read, opened,
//! and stored anew; what is there already does not travel.
//!
//! Chunk ids are keyed, so which chunk there is which here must be remembered (in the local index of the repository written to) or read
//! off a backup that both have: a copy has the entries, pages and segments of its original one by one, with other ids. That holds the other
//! way round, too: copying a damaged backup's other copy over it makes the same chunks again, and so repairs it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use minicbor::bytes::ByteArray;
use tokio_util::sync::CancellationToken;

use super::entry::{ChunkId, Segment};
use super::error::{RepositoryError, Result};
use super::fetch::{Fetcher, Slot};
use super::manifest::{Manifest, ManifestSource, PageRef};
use super::open::Repository;
use super::page::{self, PageBuilder, PagedEntry};
use super::payload::Texture;
use super::writer::Writer;
use crate::crypto::ObjectKind;

/// Pages looked at together, so that what they need is fetched together.
const PAGES_AT_ONCE: usize = 32;
/// Translations kept in memory (about 100 bytes each).
const MEMO: usize = 200_000;

/// Copies the sources of a backup; `base` is a backup that both repositories have, as each has it, whose unchanged pages are used again.
/// `progress` is told the bytes that were fetched. Nothing is committed.
pub fn copy_sources(
    from: &Arc<Repository>,
    manifest: &Manifest,
    base: Option<(&Manifest, &Manifest)>,
    writer: &mut Writer,
    progress: &dyn Fn(u64),
    cancel: &CancellationToken,
) -> Result<Vec<ManifestSource>> {
    let source_id = from.raw_id();
    if let Some((there, here)) = base
        && !writer.repository().local.has_translations(&source_id)?
    {
        learn(from, there, here, writer)?;
    }
    let mut pages = HashMap::new();
    for (there, here) in base.into_iter().flat_map(|(there, here)| pairs(there, here)) {
        pages.extend(there.pages.iter().zip(&here.pages).map(|(a, b)| (ChunkId(*a.chunk), b.clone())));
    }
    let fetcher = Fetcher::new(from.clone(), from.ahead_bytes(), cancel.clone())?;
    let mut copier = Copier { from, writer, fetcher, pages, memo: HashMap::new(), texture: Texture::Mixed, progress, cancel };
    manifest.sources.iter().map(|source| copier.source(source)).collect()
}

/// The sources of a backup and of its copy that have the same pages.
fn pairs<'a>(there: &'a Manifest, here: &'a Manifest) -> Vec<(&'a ManifestSource, &'a ManifestSource)> {
    let same = |a: &ManifestSource, b: &ManifestSource| {
        a.name == b.name
            && a.entries == b.entries
            && a.pages.len() == b.pages.len()
            && a.pages.iter().zip(&b.pages).all(|(a, b)| a.first_path == b.first_path)
    };
    there.sources.iter().zip(&here.sources).filter(|(a, b)| same(a, b)).collect()
}

/// Reads off a backup that both have which chunk is which.
fn learn(from: &Arc<Repository>, there: &Manifest, here: &Manifest, writer: &mut Writer) -> Result<()> {
    let to = writer.repository().clone();
    for (there, here) in pairs(there, here) {
        for (a, b) in there.pages.iter().zip(&here.pages) {
            let mut found = Vec::new();
            let (a, b) = (entries(from, &ChunkId(*a.chunk))?, entries(&to, &ChunkId(*b.chunk))?);
            for (a, b) in a.iter().zip(&b).filter(|(a, b)| a.entry.path == b.entry.path && a.lists.len() == b.lists.len()) {
                found.extend(same_segments(&a.entry.content.segments, &b.entry.content.segments));
                for (a, b) in a.lists.iter().zip(&b.lists) {
                    found.extend(same_segments(&list(from, a)?, &list(&to, b)?));
                }
            }
            to.local.put_translations(&from.raw_id(), &found)?;
        }
    }
    Ok(())
}

fn same_segments(a: &[Segment], b: &[Segment]) -> Vec<(ChunkId, ChunkId)> {
    let pair = |(a, b): (&Segment, &Segment)| match (a, b) {
        (Segment::Data(a), Segment::Data(b)) if (a.offset, a.len) == (b.offset, b.len) => Some((a.chunk, b.chunk)),
        _ => None,
    };
    let mut found: Vec<_> = a.iter().zip(b).filter_map(pair).collect();
    found.dedup();
    found
}

fn entries(repository: &Repository, id: &ChunkId) -> Result<Vec<PagedEntry>> {
    let bytes = repository.read_chunk(id)?;
    page::decode_page(&bytes).map_err(|e| repository.damaged(&format!("page {id}"), format!("it is no valid page of entries: {e}")))
}

fn list(repository: &Repository, id: &ChunkId) -> Result<Vec<Segment>> {
    let bytes = repository.read_chunk(id)?;
    page::decode_list(&bytes).map_err(|e| repository.damaged(&format!("list {id}"), format!("it is no valid list of segments: {e}")))
}

struct Copier<'a> {
    from: &'a Arc<Repository>,
    writer: &'a mut Writer,
    fetcher: Fetcher,
    /// Pages of the base there, and what they are here.
    pages: HashMap<ChunkId, PageRef>,
    memo: HashMap<ChunkId, ChunkId>,
    texture: Texture,
    progress: &'a dyn Fn(u64),
    cancel: &'a CancellationToken,
}

impl Copier<'_> {
    fn source(&mut self, source: &ManifestSource) -> Result<ManifestSource> {
        self.texture = if source.kind == "files" { Texture::Mixed } else { Texture::Pages };
        let mut pages = Vec::new();
        for part in source.pages.chunks(PAGES_AT_ONCE) {
            if self.cancel.is_cancelled() {
                return Err(RepositoryError::Cancelled);
            }
            pages.extend(self.pages(part)?);
        }
        Ok(ManifestSource { pages, ..source.clone() })
    }

    fn pages(&mut self, part: &[PageRef]) -> Result<Vec<PageRef>> {
        let mut read: Vec<(&PageRef, Option<Vec<PagedEntry>>)> = Vec::new();
        let mut lists: HashMap<ChunkId, Vec<Segment>> = HashMap::new();
        let (mut needed, mut seen) = (Vec::new(), HashSet::new());
        let mut need = |segments: &[Segment]| {
            for segment in segments {
                if let Segment::Data(extent) = segment
                    && seen.insert(extent.chunk)
                {
                    needed.push(extent.chunk);
                }
            }
        };
        for page in part {
            if self.pages.contains_key(&ChunkId(*page.chunk)) {
                read.push((page, None));
                continue;
            }
            let entries = entries(self.from, &ChunkId(*page.chunk))?;
            for entry in &entries {
                need(&entry.entry.content.segments);
                for id in &entry.lists {
                    let segments = list(self.from, id)?;
                    need(&segments);
                    lists.insert(*id, segments);
                }
            }
            read.push((page, Some(entries)));
        }
        self.translate(&needed)?;
        let mut done = Vec::new();
        for (page, entries) in read {
            let Some(entries) = entries else {
                done.extend(self.pages.get(&ChunkId(*page.chunk)).cloned());
                continue;
            };
            let mut builder = PageBuilder::default();
            let mut built = Vec::new();
            for mut entry in entries {
                self.rename(&mut entry.entry.content.segments)?;
                for id in &mut entry.lists {
                    let mut segments = lists.get(id).cloned().unwrap_or_default();
                    self.rename(&mut segments)?;
                    *id = self.writer.store(&page::encode_list(&segments), ObjectKind::MetaPack, Texture::Mixed)?;
                }
                built.extend(builder.push(&entry));
            }
            built.extend(builder.finish());
            for page in built {
                let id = self.writer.store(&page.bytes, ObjectKind::MetaPack, Texture::Mixed)?;
                done.push(PageRef { chunk: ByteArray::from(id.0), first_path: page.first_path });
            }
        }
        Ok(done)
    }

    fn rename(&self, segments: &mut [Segment]) -> Result<()> {
        for segment in segments {
            if let Segment::Data(extent) = segment {
                let here = self.memo.get(&extent.chunk).copied();
                extent.chunk = here.ok_or_else(|| RepositoryError::Other("a chunk was not copied; this is a bug".into()))?;
            }
        }
        Ok(())
    }

    /// Has all these chunks here, and what they are called, in the memo.
    fn translate(&mut self, needed: &[ChunkId]) -> Result<()> {
        if self.memo.len() + needed.len() > MEMO {
            self.memo.clear();
        }
        let unknown: Vec<ChunkId> = needed.iter().filter(|id| !self.memo.contains_key(*id)).copied().collect();
        let known = self.writer.repository().local.translations(&self.from.raw_id(), &unknown)?;
        let mut missing = Vec::new();
        for (there, here) in unknown.into_iter().zip(known) {
            match here {
                // One that was pruned here since, or is damaged, travels again.
                Some(here) if self.writer.has(&here)?.is_some() => drop(self.memo.insert(there, here)),
                _ => missing.push(there),
            }
        }
        let mut learned = Vec::new();
        // So many that what is held here never keeps a request waiting for room.
        for part in missing.chunks((self.fetcher.kept() / 4).max(1)) {
            let slots = part.iter().map(|id| Ok((*id, self.fetcher.request(*id)?))).collect::<Result<Vec<_>>>()?;
            self.fetcher.flush();
            for slot in slots {
                learned.push(self.store(slot)?);
            }
        }
        // What a crash keeps from becoming durable is not there for the next look either.
        self.writer.repository().local.put_translations(&self.from.raw_id(), &learned)
    }

    fn store(&mut self, (there, slot): (ChunkId, Arc<Slot>)) -> Result<(ChunkId, ChunkId)> {
        let bytes = slot.wait()?;
        let here = self.writer.store(&bytes, ObjectKind::DataPack, self.texture)?;
        (self.progress)(bytes.len() as u64);
        self.memo.insert(there, here);
        Ok((there, here))
    }
}
