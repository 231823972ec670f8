//! A backup beside what is live now: paths of files, tables of databases.
//!
//! In: a backup and the sources of its job. Out: a JSON object a line for each thing that differs, and a last one with the counts, into the
//! client's pipe. Nothing live is changed. A source that cannot be compared is told, and the others are.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use keepd_protocol::model::{BytesPath, ChangeKind, CompareLine, CompareSummary, Difference, Level};

use super::backup::Environment;
use super::contents;
use super::differences::{self, What};
use super::live::{Failure, Finish, LiveRun};
use super::patient::{PATIENCE, PatientWriter};
use super::restore::{Another, Place, find, gone, kind};
use super::selection::{Selected, Selection, Shown};
use super::set::told;
use crate::config::{FilesSource, Job, Source, SourceKind, SqliteSource, Verify};
use crate::repository::entry::Texture;
use crate::repository::{ChunkId, Entry, EntrySink, Kind, SinkError};
use crate::source::load::{Counter, rows};
use crate::source::{Context, Facts, Previous, mysql, postgres, sqlite};

/// Space that is to be left on the state directory's file system.
const SPARE_BYTES: u64 = 64 << 20;

/// What is to be compared, and how.
#[derive(Debug, Clone, Default)]
pub struct CompareRequest {
    /// `<source>[/<path>]`; none means all.
    pub paths: Vec<Vec<u8>>,
    /// Also the rows of SQLite's tables.
    pub deep: bool,
}

/// Compares a backup with the job's sources as they are now, and writes what differs into `out`.
pub fn compare(
    env: &Environment,
    job: &Job,
    place: &Place,
    another: Another<'_>,
    request: &CompareRequest,
    out: OwnedFd,
    live: &LiveRun,
) -> Result<Finish, Failure> {
    let selection = Selection::new(&place.manifest, &request.paths).map_err(Failure::Failed)?;
    if request.paths.is_empty() {
        live.set_total(place.manifest.bytes());
    }
    let work = env.config.daemon.state_dir.join("work");
    let scratch = std::fs::create_dir_all(&work).and_then(|()| tempfile::Builder::new().prefix("compare-").tempdir_in(&work));
    let scratch = scratch.map_err(|e| Failure::Failed(format!("cannot make a directory in {}: {e}", work.display())))?;
    let out = BufWriter::with_capacity(64 << 10, PatientWriter::new(out, PATIENCE, live.cancel.clone())?);
    let mut comparison = Comparison {
        job,
        place,
        another,
        deep: request.deep,
        scratch: scratch.path(),
        live,
        lines: Lines { out, live, summary: CompareSummary::default(), gone: false },
    };
    let mut compared = 0;
    let mut first = None;
    for selected in &selection.sources {
        let name = &selected.shown.source.name;
        let left_out = live.report.left_out_count();
        live.step(&format!("comparing {name}"));
        match comparison.source(selected) {
            Ok(()) => compared += 1,
            Err(Failure::Cancelled) => return Err(Failure::Cancelled),
            // That the client is gone is no matter of the source.
            Err(failure) if comparison.lines.gone => return Err(failure),
            Err(failure) => {
                live.report.left_out(format!("source {name} was not compared: {failure}"));
                first.get_or_insert(failure);
            }
        }
        if live.report.left_out_count() > left_out {
            comparison.lines.summary.not_compared.push(name.clone());
        }
    }
    for source in job.sources.iter().filter(|s| request.paths.is_empty() && !place.manifest.sources.iter().any(|m| m.name == s.name)) {
        live.message(Level::Info, format!("source {} is in the configuration and not in the backup", source.name));
        comparison.lines.tell(&Difference { source: source.name.clone(), change: ChangeKind::Added, ..Difference::default() })?;
    }
    if let Some(failure) = first.filter(|_| compared == 0) {
        return Err(Failure::Failed(format!("nothing could be compared: {failure}")));
    }
    comparison.lines.finish()?;
    Ok(if live.report.left_out_count() > 0 { Finish::Partial } else { Finish::Good })
}

/// What goes to the client.
struct Lines<'a> {
    out: BufWriter<PatientWriter>,
    live: &'a LiveRun,
    summary: CompareSummary,
    /// Nobody takes it any more.
    gone: bool,
}

impl Lines<'_> {
    fn tell(&mut self, difference: &Difference) -> Result<(), Failure> {
        let count = match (&difference.path, difference.change) {
            (None, _) => &mut self.summary.tables,
            (_, ChangeKind::Added) => &mut self.summary.added,
            (_, ChangeKind::Removed) => &mut self.summary.removed,
            (_, ChangeKind::Modified) => &mut self.summary.modified,
            (_, ChangeKind::Metadata) => &mut self.summary.metadata,
        };
        *count += 1;
        self.line(&CompareLine::Difference(difference.clone()))
    }

    fn line(&mut self, line: &CompareLine) -> Result<(), Failure> {
        let written = serde_json::to_writer(&mut self.out, line).map_err(io::Error::from).and_then(|()| self.out.write_all(b"\n"));
        self.written(written)
    }

    fn finish(&mut self) -> Result<(), Failure> {
        self.line(&CompareLine::Summary(self.summary.clone()))?;
        let flushed = self.out.flush();
        self.written(flushed)
    }

    fn written(&mut self, written: io::Result<()>) -> Result<(), Failure> {
        written.map_err(|e| {
            self.gone = true;
            gone(&self.live.cancel, &e)
        })
    }
}

struct Comparison<'a> {
    job: &'a Job,
    place: &'a Place,
    another: Another<'a>,
    deep: bool,
    /// A directory that goes with the run.
    scratch: &'a Path,
    live: &'a LiveRun,
    lines: Lines<'a>,
}

impl Comparison<'_> {
    fn source(&mut self, selected: &Selected<'_>) -> Result<(), Failure> {
        let of = selected.shown.source;
        let source = self.job.sources.iter().find(|s| s.name == of.name);
        let source = source.ok_or_else(|| Failure::Failed(format!("job {} has no such source any more", self.job.name)))?;
        if source.kind.word() != of.kind {
            return Err(Failure::Failed(format!("it was of {} then and is of {} now", of.kind, source.kind.word())));
        }
        match &source.kind {
            SourceKind::Files(files) => self.files(selected, files),
            SourceKind::Sqlite(sqlite) => self.sqlite(selected, source, sqlite),
            SourceKind::Postgres(server) => {
                let client = postgres::Client::new(server).map_err(|e| told(source, e))?;
                self.server(selected, source, &client, postgres::file_of)
            }
            SourceKind::Mysql(server) => {
                let client = mysql::Client::new(server, &self.live.cancel).map_err(|e| told(source, e))?;
                self.server(selected, source, &client, mysql::file_of)
            }
            SourceKind::Command(_) => Err(Failure::Failed("it is what a command prints, which nothing live can be compared with".into())),
        }
    }

    fn context(&self) -> Context<'_> {
        Context { cancel: &self.live.cancel, report: &self.live.report, work_dir: self.scratch, cache_dir: self.scratch }
    }

    fn files(&mut self, selected: &Selected<'_>, files: &FilesSource) -> Result<(), Failure> {
        let shown = &selected.shown;
        let live = self.live;
        for path in selected.paths.iter().filter(|p| !p.is_empty()) {
            let is_live = std::fs::symlink_metadata(files.path.join(OsStr::from_bytes(path))).is_ok();
            if !is_live && find(&self.place.repository, shown.source, path)?.is_none() {
                return Err(absent(&shown.path(path)));
            }
        }
        let context = Context { cancel: &live.cancel, report: &live.report, work_dir: self.scratch, cache_dir: self.scratch };
        let lines = &mut self.lines;
        let counts = differences::of_files(&self.place.repository, shown.source, files, &selected.paths, &context, &mut |found| {
            let change = match found.what {
                // It is there, only not looked at.
                What::Missing { hidden: true } => {
                    lines.summary.excluded += 1;
                    return Ok(());
                }
                What::Unreadable => return Ok(()),
                What::Missing { hidden: false } => ChangeKind::Removed,
                What::Extra => ChangeKind::Added,
                What::Contents => ChangeKind::Modified,
                What::Metadata => ChangeKind::Metadata,
            };
            lines.tell(&of_path(shown, change, &found.path, found.backup.as_ref(), found.live.as_ref()))
        })?;
        lines.summary.equal += counts.equal;
        Ok(())
    }

    /// The database's pages first; where they differ, its tables.
    fn sqlite(&mut self, selected: &Selected<'_>, source: &Source, of: &SqliteSource) -> Result<(), Failure> {
        let shown = &selected.shown;
        let entry = find(&self.place.repository, shown.source, b"")?;
        let entry = entry.ok_or_else(|| Failure::Failed("the backup does not hold the database".into()))?;
        let is_gone = std::fs::symlink_metadata(&of.path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
        if is_gone {
            return self.lines.tell(&of_path(shown, ChangeKind::Removed, b"", Some(&entry), None));
        }
        // Damage is no matter of a comparison.
        let unverified = SqliteSource { path: of.path.clone(), verify: Verify::Off };
        let mut sink = Nowhere::default();
        sqlite::capture(&unverified, &mut Nothing, &mut sink, &self.context()).map_err(|e| told(source, e))?;
        let now = sink.0.ok_or_else(|| Failure::Failed("the database was not captured; this is a bug".into()))?;
        let rights = |e: &Entry| (e.mode, e.uid, e.gid);
        if (now.size, now.content.hash) == (entry.size, entry.content.hash) && (now.size == 0 || now.content.hash != [0; 16]) {
            if rights(&now) != rights(&entry) {
                return self.lines.tell(&of_path(shown, ChangeKind::Metadata, b"", Some(&entry), Some(&now)));
            }
            self.lines.summary.equal += 1;
            return Ok(());
        }
        self.lines.tell(&of_path(shown, ChangeKind::Modified, b"", Some(&entry), Some(&now)))?;
        let backup = self.restored(shown, &entry)?;
        self.live.step(&format!("comparing the tables of {}", source.name));
        let compared = sqlite::compare(of, backup.path(), self.deep, &self.context()).map_err(|e| told(source, e))?;
        for table in compared.tables {
            let change = match (table.before.is_there, table.after.is_there) {
                (false, _) => ChangeKind::Added,
                (_, false) => ChangeKind::Removed,
                _ => ChangeKind::Modified,
            };
            self.lines.tell(&Difference {
                source: source.name.clone(),
                change,
                table: Some(table.table),
                rows_before: table.before.rows,
                rows_after: table.after.rows,
                schema: table.schema,
                rows_added: table.rows.map(|r| r.added),
                rows_removed: table.rows.map(|r| r.removed),
                rows_changed: table.rows.map(|r| r.changed),
                ..Difference::default()
            })?;
        }
        for problem in compared.problems {
            self.live.report.left_out(format!("source {}: {problem}", source.name));
        }
        Ok(())
    }

    /// The backup's database in a file of the run's directory, which goes when it is dropped.
    fn restored(&mut self, shown: &Shown<'_>, entry: &Entry) -> Result<tempfile::NamedTempFile, Failure> {
        self.live.step(&format!("reading {} from the backup", shown.source.name));
        let free = rustix::fs::statvfs(self.scratch).map_or(u64::MAX, |s| s.f_bavail.saturating_mul(s.f_frsize));
        if free < entry.size.saturating_add(SPARE_BYTES) {
            return Err(Failure::Failed(format!(
                "its tables are compared beside the backup's, which takes {} MiB in {} where {} MiB are free: make room there",
                (entry.size + SPARE_BYTES) >> 20,
                self.scratch.display(),
                free >> 20
            )));
        }
        let failed = |e: io::Error| Failure::Failed(format!("cannot write to {}: {e}", self.scratch.display()));
        let file = tempfile::Builder::new().suffix(".db").tempfile_in(self.scratch).map_err(failed)?;
        let out: File = file.as_file().try_clone().map_err(failed)?;
        contents::write(self.place.clone(), self.another, &shown.path(b""), entry, (out.into(), PATIENCE), self.live)?;
        Ok(file)
    }

    /// Rows now beside those that were captured, database by database.
    fn server(
        &mut self,
        selected: &Selected<'_>,
        source: &Source,
        server: &dyn Counter,
        file_of: fn(&str) -> String,
    ) -> Result<(), Failure> {
        let cancel = &self.live.cancel;
        let facts: Facts = serde_json::from_str(&selected.shown.source.facts).unwrap_or_default();
        let captured = facts.get("databases").and_then(|d| d.as_object());
        let captured = captured.ok_or_else(|| Failure::Failed("the backup does not say which databases it has".into()))?;
        let is_wanted = |database: &str| selected.paths.iter().any(|p| p.is_empty() || p == file_of(database).as_bytes());
        let now = server.databases(cancel).map_err(|e| told(source, e))?;
        for path in selected.paths.iter().filter(|p| !p.is_empty()) {
            if !captured.keys().chain(&now).any(|database| file_of(database).as_bytes() == path) {
                return Err(absent(&selected.shown.path(path)));
            }
        }
        let of = |database: &str, change| Difference {
            source: source.name.clone(),
            change,
            database: Some(database.to_owned()),
            ..Difference::default()
        };
        for database in captured.keys().filter(|d| is_wanted(d)) {
            let before = rows(&facts, database);
            let Some(after) = server.rows_now(database, &before, cancel).map_err(|e| told(source, e))? else {
                self.lines.tell(&of(database, ChangeKind::Removed))?;
                continue;
            };
            if !facts.contains_key("tables") {
                self.live.report.left_out(format!(
                    "source {}: the rows of database {database} were not counted when it was captured, so there is nothing to compare with",
                    source.name
                ));
                continue;
            }
            let mut names: Vec<&String> = before.iter().chain(&after).map(|(name, _)| name).collect();
            names.sort_unstable();
            names.dedup();
            for name in names {
                let count = |of: &[(String, u64)]| of.iter().find(|(table, _)| table == name).map(|(_, rows)| *rows);
                let (rows_before, rows_after) = (count(&before), count(&after));
                let change = match (rows_before, rows_after) {
                    (before, after) if before == after => continue,
                    (None, _) => ChangeKind::Added,
                    (_, None) => ChangeKind::Removed,
                    _ => ChangeKind::Modified,
                };
                self.lines.tell(&Difference { table: Some(name.clone()), rows_before, rows_after, ..of(database, change) })?;
            }
        }
        for database in now.iter().filter(|d| !captured.contains_key(*d) && is_wanted(d)) {
            self.lines.tell(&of(database, ChangeKind::Added))?;
        }
        Ok(())
    }
}

fn absent(path: &[u8]) -> Failure {
    Failure::Failed(format!("'{}' is neither in the backup nor live", String::from_utf8_lossy(path)))
}

fn of_path(shown: &Shown<'_>, change: ChangeKind, path: &[u8], before: Option<&Entry>, after: Option<&Entry>) -> Difference {
    let size = |e: Option<&Entry>| e.filter(|e| e.kind == Kind::File).map(|e| e.size);
    Difference {
        source: shown.source.name.clone(),
        change,
        path: Some(BytesPath::from_bytes(&shown.path(path))),
        kind: after.or(before).map(|e| kind(e.kind)),
        size_before: size(before),
        size_after: size(after),
        ..Difference::default()
    }
}

/// No backup before this one.
struct Nothing;

impl Previous for Nothing {
    fn next_entry(&mut self) -> Result<Option<Entry>, SinkError> {
        Ok(None)
    }
}

/// Takes a database's pages and keeps only what they hash to.
#[derive(Default)]
struct Nowhere(Option<Entry>);

fn no_database() -> SinkError {
    SinkError::Repository("a database was captured as something else; this is a bug".into())
}

impl EntrySink for Nowhere {
    fn push(&mut self, entry: Entry) -> Result<(), SinkError> {
        self.0 = Some(entry);
        Ok(())
    }

    fn push_small(&mut self, _: Entry, _: &[u8]) -> Result<(), SinkError> {
        Err(no_database())
    }

    fn large_begin(&mut self) -> Result<(), SinkError> {
        Err(no_database())
    }

    fn large_space(&mut self, _: usize) -> &mut [u8] {
        &mut []
    }

    fn large_filled(&mut self, _: usize) -> Result<(), SinkError> {
        Err(no_database())
    }

    fn large_hole(&mut self, _: u64) -> Result<(), SinkError> {
        Err(no_database())
    }

    fn large_finish(&mut self, _: Entry) -> Result<(), SinkError> {
        Err(no_database())
    }

    /// What a chunk would be called is of no use here.
    fn store(&mut self, _: &[u8], _: Texture) -> Result<ChunkId, SinkError> {
        Ok(ChunkId([0; 32]))
    }

    fn chunk_len(&mut self, _: &ChunkId) -> Result<Option<u32>, SinkError> {
        Ok(None)
    }

    fn fetch(&mut self, _: &ChunkId) -> Result<Vec<u8>, SinkError> {
        Err(no_database())
    }
}
