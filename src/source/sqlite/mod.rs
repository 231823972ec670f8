//! A live SQLite database, captured page by page as of one moment, while its application goes on writing.
//!
//! In: the path of a database file, and the entry of the job's last backup. Out: one entry at the source's root, whose contents are
//! a database file that opens by itself (what is in the write-ahead log is merged into it), made of the extents of pages that did not
//! change and of new chunks that gather those that did. The idea of a page map is litestream's and bupstash's in one: hashes
//! of all pages, kept locally, rebuilt from the repository when they are lost.
//!
//! The way: [`database`] finds and opens the file, [`signature`] tells whether it changed at all, [`snapshot`] (and [`copy`] for rollback
//! journals) holds one moment still, [`inspect`] checks it on a second thread while [`cutter`] takes its pages; [`previous`] says
//! what is used again, [`pagemap`] keeps the hashes until the next time, [`alone`] keeps the process' own hands off the locks, and [`courtesy`] leaves a writer a processor.
//!
//! What is not in the backup: `-wal` and `-shm` files, which belong to the moment. The database is never written, not even checkpointed.

mod alone;
mod ask;
mod compare;
mod copy;
mod courtesy;
mod cutter;
mod database;
mod inspect;
mod look;
mod pagemap;
mod previous;
mod prove;
mod signature;
mod snapshot;
mod tables;
#[cfg(test)]
mod test_sink;
#[cfg(test)]
mod tests;

use std::fs::Metadata;
use std::time::Duration;

use keepd_protocol::model::Level;
use serde_json::Value;

pub use self::ask::{ask, first};
pub use self::compare::{Compared, Rows, TableDifference, compare};
pub use self::look::is_database;
pub use self::prove::{Proof, prove};

use self::alone::Alone;
use self::courtesy::Courtesy;
use self::cutter::{Cut, Cutter, Old};
use self::database::Database;
pub use self::inspect::check_whole;
use self::inspect::{Inspection, inspect};
use self::pagemap::{Footer, MapReader};
use self::signature::Signature;
use self::snapshot::Snapshot;
pub use self::tables::take_tables;
use super::extents::{Chunks, Cursor};
use super::{Context, Facts, Previous, SourceError};
use crate::config::{SqliteSource, Verify};
use crate::repository::{Entry, EntrySink, Kind, SinkError};

/// Pages between looks at whether to stop.
const PAGES_PER_LOOK: u64 = 256;
/// Captures are done over when the moment was lost.
const ATTEMPTS: usize = 3;

/// Captures a database as one entry, the source's root, into the sink.
pub fn capture(
    source: &SqliteSource,
    previous: &mut dyn Previous,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<Facts, SourceError> {
    capture_with(&Tuning::default(), source, previous, sink, context)
}

/// Patience, and what tests make small.
struct Tuning {
    /// With others' locks.
    busy: Duration,
    /// With counting rows.
    count: Duration,
    /// Tries to catch two connections in the same moment; a writer that commits without pause may need some.
    twin_tries: usize,
    /// Pages that the backup API copies in a step, between which writers can go on.
    step_pages: i32,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { busy: Duration::from_secs(30), count: Duration::from_secs(2), twin_tries: 100, step_pages: 1024 }
    }
}

fn capture_with(
    tuning: &Tuning,
    source: &SqliteSource,
    previous: &mut dyn Previous,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<Facts, SourceError> {
    let database = Database::find(&source.path)?;
    let mut last = Last::new(previous)?;
    let _alone = Alone::with(&database.stat()?, context.cancel)?;
    let mut frozen_may_do = true;
    for _ in 0..ATTEMPTS {
        if let Some(facts) = attempt(&database, source.verify, frozen_may_do, &mut last, tuning, sink, context)? {
            return Ok(facts);
        }
        frozen_may_do = false;
    }
    Err(not_held(&database))
}

fn not_held(database: &Database) -> SourceError {
    SourceError::Failed(format!(
        "the database {} could not be held still: its file changed while nobody had it open, or a `files` source of keepd read the \
         database or its -shm at the same time (exclude both there); run the job again",
        database.shown()
    ))
}

/// What the last backup has.
struct Last {
    entry: Option<Entry>,
    chunks: Option<Chunks>,
    map: Option<MapReader>,
    /// Pages that the last capture stored; the next one will likely store about as many.
    stored_pages: u64,
    prepared: bool,
}

impl Last {
    fn new(previous: &mut dyn Previous) -> Result<Self, SinkError> {
        let entry = previous.next_entry()?.filter(|e| e.kind == Kind::File && e.path.is_empty() && e.size > 0);
        Ok(Self { entry, chunks: None, map: None, stored_pages: 0, prepared: false })
    }

    /// Looks once which of its chunks are there.
    fn chunks(&mut self, sink: &mut dyn EntrySink) -> Result<Option<(&Entry, &Chunks)>, SinkError> {
        let Some(entry) = &self.entry else { return Ok(None) };
        if self.chunks.is_none() {
            self.chunks = Some(Chunks::of(&entry.content, sink)?);
        }
        Ok(self.chunks.as_ref().map(|chunks| (entry, chunks)))
    }

    /// Gets the page map, before any moment is held.
    fn prepare(&mut self, footer: Option<&Footer>, sink: &mut dyn EntrySink, context: &Context<'_>) -> Result<(), SourceError> {
        if std::mem::replace(&mut self.prepared, true) {
            return Ok(());
        }
        self.stored_pages = footer.map_or(0, |footer| footer.stored_pages);
        let Some((entry, chunks)) = self.chunks(sink)? else { return Ok(()) };
        let mut map = MapReader::open(context.cache_dir, entry.content.hash);
        if map.is_none() && chunks.are_complete() {
            map = match previous::rebuild_map(&entry.content, entry.size, context.cache_dir, sink, context.cancel) {
                Ok(map) => map,
                Err(SourceError::Sink(e)) => {
                    context.report.message(Level::Warning, format!("the last backup cannot be read, the database is stored whole: {e}"));
                    None
                }
                Err(e) => return Err(e),
            };
        }
        self.map = map.filter(|map| map.page_count.checked_mul(u64::from(map.page_size)) == Some(entry.size));
        Ok(())
    }
}

/// None: the moment was lost while it was read.
fn attempt(
    database: &Database,
    verify: Verify,
    frozen_may_do: bool,
    last: &mut Last,
    tuning: &Tuning,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<Option<Facts>, SourceError> {
    let mut stat = database.stat()?;
    let Some(header) = database.header()? else { return empty(database, &stat, sink, context).map(Some) };
    let wal = snapshot::uses_wal(&header);
    let before = Signature::take(database, &header)?;
    let footer = pagemap::read_footer(context.cache_dir);
    if let Some(footer) = &footer
        && footer.signature.as_ref().is_some_and(|then| then.same(&before))
        && let Some(facts) = unchanged(database, &stat, footer, verify, last, sink, context)?
    {
        return Ok(Some(facts));
    }
    last.prepare(footer.as_ref(), sink, context)?;

    // A rollback journal beside a write-ahead log is what a crash while switching between them leaves; SQLite has to judge it.
    let Some(mut snapshot) = take(database, wal, before, &mut stat, frozen_may_do, tuning, context)? else { return Ok(None) };
    let read = read(database, &stat, &mut snapshot, verify, last, tuning, sink, context);
    if !snapshot.held(database) {
        return match read {
            Err(e @ (SourceError::Cancelled | SourceError::Sink(_))) => Err(e),
            _ => Ok(None),
        };
    }
    let (cutter, inspection) = read?;
    // The moment ends here; what is left to store does not keep the log from shrinking.
    let Snapshot { page_size, signature, pages, .. } = snapshot;
    drop(pages);

    let cut = cutter.finish(sink)?;
    if inspection.tables == 0 {
        context.report.message(Level::Warning, format!("the database {} has no tables", database.shown()));
    }
    for warning in inspection.warnings {
        context.report.message(Level::Warning, warning);
    }
    let mut facts = inspection.facts;
    facts.insert("journal_mode".into(), if wal { "wal" } else { "rollback" }.into());
    facts.insert("changed_pages".into(), cut.stored_pages.into());
    finish(database, &stat, cut, page_size, signature, &facts, sink, context)?;
    Ok(Some(facts))
}

/// Holds one moment still, whose signature was `before` just now and whose stat may be taken anew. None: it was lost.
fn take(
    database: &Database,
    wal: bool,
    mut before: Signature,
    stat: &mut Metadata,
    frozen_may_do: bool,
    tuning: &Tuning,
    context: &Context<'_>,
) -> Result<Option<Snapshot>, SourceError> {
    // A rollback journal beside a write-ahead log is what a crash while switching between them leaves; SQLite has to judge it.
    let mut frozen = wal && frozen_may_do && !before.has_wal() && !database.has_journal();
    if frozen && !before.is_settled() {
        // Its application has closed it just now. A moment later it can be read without leaving files beside it.
        std::thread::sleep(Duration::from_millis(150));
        *stat = database.stat()?;
        before = before.again(database)?;
        frozen = before.is_settled() && !before.has_wal();
    }
    let taken = if wal {
        Snapshot::of_wal(database, before, frozen, tuning, context.cancel).map(Some)
    } else if frozen_may_do
        && before.is_settled()
        && let Some(idle) = Snapshot::of_idle(database, &before, tuning, context.cancel)?
    {
        Ok(Some(idle))
    } else {
        copy::snapshot(database, &before, tuning, context)
    };
    match taken {
        Err(_) if context.cancel.is_cancelled() => Err(SourceError::Cancelled),
        taken => taken,
    }
}

/// The pages through the cutter, and meanwhile the inspection.
#[allow(clippy::too_many_arguments)]
fn read<'l>(
    database: &Database,
    stat: &Metadata,
    snapshot: &mut Snapshot,
    verify: Verify,
    last: &'l mut Last,
    tuning: &Tuning,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<(Cutter<'l>, Inspection), SourceError> {
    let page_bytes = u64::from(snapshot.page_size);
    let expected = last.stored_pages * page_bytes;
    let mut old = None;
    if let (Some(entry), Some(chunks), Some(map)) = (&last.entry, &last.chunks, &mut last.map)
        && map.page_size == snapshot.page_size
        && map.restart().is_ok()
    {
        let condemned = chunks.condemn(snapshot.bytes(), expected);
        old = Some(Old { hashes: map, cursor: Cursor::new(&entry.content), condemned });
    }
    let mut cutter = Cutter::new(snapshot.page_size, old, context.cache_dir);
    if sink.passes_on() {
        sink.begins(&database.entry(stat), Some(snapshot.bytes()))?;
        cutter.with_zeros();
    }

    // Stops both sides: the run is cancelled, or the other side failed.
    let stop = context.cancel.child_token();
    let inspector = snapshot.inspector.take();
    let pages = &snapshot.pages;
    let (streamed, inspection) = std::thread::scope(|scope| {
        let inspection = inspector.map(|connection| {
            let stop = &stop;
            scope.spawn(move || inspect(database, &connection, verify, tuning, stop).inspect_err(|_| stop.cancel()))
        });
        let mut number = 0;
        let mut courtesy = Courtesy::new(&database.beside("-wal"));
        let streamed = pages.read(database, snapshot.page_size, snapshot.page_count, |page| {
            if number % PAGES_PER_LOOK == 0 {
                if stop.is_cancelled() {
                    return Err(SourceError::Cancelled);
                }
                let ahead = (snapshot.page_count - number).min(PAGES_PER_LOOK);
                context.report.bytes(ahead * page_bytes);
                courtesy.look();
            }
            number += 1;
            Ok(cutter.page(page, sink)?)
        });
        if streamed.is_err() {
            stop.cancel();
        }
        let inspection = inspection.map(|thread| {
            thread
                .join()
                .unwrap_or_else(|_| Err(SourceError::Failed("the check of the database broke off; this is a fault of keepd".into())))
        });
        (streamed, inspection)
    });
    // Of two errors one may only be that the other side stopped.
    let inspection = match (streamed, inspection) {
        (Err(SourceError::Cancelled), Some(Err(e))) => return Err(e),
        (Err(e), _) => return Err(e),
        (Ok(()), Some(inspection)) => inspection?,
        (Ok(()), None) => match pages.connection() {
            Some(connection) => inspect(database, connection, verify, tuning, &stop)?,
            None => return Err(SourceError::Failed("the copy of the database was not checked; this is a fault of keepd".into())),
        },
    };
    Ok((cutter, inspection))
}

/// A file of no bytes is an empty database.
fn empty(database: &Database, stat: &Metadata, sink: &mut dyn EntrySink, context: &Context<'_>) -> Result<Facts, SourceError> {
    context.report.message(Level::Warning, format!("the database {} has no tables: its file is empty", database.shown()));
    sink.push(database.entry(stat))?;
    context.report.entry();
    Ok(Facts::from([
        ("page_count".into(), 0.into()),
        ("changed_pages".into(), 0.into()),
        ("tables".into(), Value::Object(serde_json::Map::new())),
        ("verified".into(), "off".into()),
    ]))
}

/// The last backup's contents once more, when the database is as it was and nothing else speaks against it.
fn unchanged(
    database: &Database,
    stat: &Metadata,
    footer: &Footer,
    verify: Verify,
    last: &mut Last,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<Option<Facts>, SourceError> {
    let verified = match footer.facts.get("verified").and_then(Value::as_str) {
        Some("full") => Verify::Full,
        Some("quick") => Verify::Quick,
        _ => Verify::Off,
    };
    let enough = verify == Verify::Off || verified == verify || verified == Verify::Full;
    let Some((entry, chunks)) = last.chunks(sink)? else { return Ok(None) };
    if !enough || !footer.describes(&entry.content, entry.size) || !chunks.are_complete() || chunks.are_too_sparse(entry.size, 0) {
        return Ok(None);
    }
    context.report.bytes(entry.size);
    sink.push(Entry { size: entry.size, content: entry.content.clone(), ..database.entry(stat) })?;
    context.report.entry();
    let mut facts = footer.facts.clone();
    facts.insert("changed_pages".into(), 0.into());
    Ok(Some(facts))
}

#[allow(clippy::too_many_arguments)]
fn finish(
    database: &Database,
    stat: &Metadata,
    cut: Cut,
    page_size: u32,
    signature: Option<Signature>,
    facts: &Facts,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<(), SourceError> {
    let size = cut.page_count * u64::from(page_size);
    let content = cut.content.hash;
    sink.push(Entry { size, content: cut.content, ..database.entry(stat) })?;
    context.report.entry();
    let footer = Footer { page_size, page_count: cut.page_count, content, signature, stored_pages: cut.stored_pages, facts: facts.clone() };
    // The map is only a cache: without it the next capture takes longer.
    let kept = cut.map.ok_or_else(|| "it could not be written".to_owned());
    if let Err(e) = kept.and_then(|map| map.finish(context.cache_dir, &footer).map_err(|e| e.to_string())) {
        let text = format!("the page map of the database {} cannot be kept in {}: {e}", database.shown(), context.cache_dir.display());
        context.report.message(Level::Info, text);
    }
    Ok(())
}
