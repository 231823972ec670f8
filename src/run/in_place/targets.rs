//! Where a backup's sources go in place: which of the job's configured paths, databases and programs.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use keepd_protocol::model::RestorePlan;

use super::Request;
use crate::config::{Job, ServerSource, Source, SourceKind};
use crate::repository::{Entry, Kind, Manifest, ManifestSource};
use crate::run::live::Failure;
use crate::run::restore::{self, Place};
use crate::run::selection::{Selected, Selection, Shown};
use crate::source::{Facts, mysql, postgres, way};

/// One source of a backup with its place.
pub struct Target<'j> {
    pub source: &'j Source,
    /// Its name in the backup.
    pub name: String,
    pub to: To,
}

pub enum To {
    /// A directory with what is in it.
    Directory { root: PathBuf, paths: Vec<Vec<u8>> },
    /// One file in a directory, a database of SQLite or any other.
    File { root: PathBuf, file: Vec<u8>, staged_as: Vec<u8>, database: bool, entry: Box<Entry> },
    /// Databases of a server.
    Databases { dumps: Vec<Dump>, facts: Facts },
    /// What feeds a program.
    Command { path: Vec<u8>, entry: Box<Entry> },
}

/// A database's dump in the backup.
pub struct Dump {
    pub database: String,
    /// `<source>/<file>`
    pub path: Vec<u8>,
    pub entry: Entry,
}

impl Target<'_> {
    /// For people.
    pub fn shown(&self) -> String {
        match &self.to {
            To::Directory { root, .. } => root.display().to_string(),
            To::File { root, file, .. } => root.join(std::ffi::OsStr::from_bytes(file)).display().to_string(),
            To::Databases { dumps, .. } => {
                let names: Vec<&str> = dumps.iter().map(|d| d.database.as_str()).collect();
                format!("{} {}", self.source.kind.word(), names.join(", "))
            }
            To::Command { .. } => restore_command(self.source).map(|p| p.command.join(" ")).unwrap_or_default(),
        }
    }
}

pub fn restore_command(source: &Source) -> Option<&crate::config::Program> {
    if let SourceKind::Command(command) = &source.kind { command.restore.as_ref() } else { None }
}

/// What is wanted of a backup, with its places; what has none is a problem of the plan.
pub fn find<'j>(job: &'j Job, place: &Place, request: &Request, plan: &mut RestorePlan) -> Result<Vec<Target<'j>>, Failure> {
    let manifest = &place.manifest;
    let selection = Selection::new(manifest, &request.selected()).map_err(Failure::Failed)?;
    let mut targets = Vec::new();
    for selected in selection.sources {
        let name = &selected.shown.source.name;
        match target(job, place, request, &selected) {
            Ok(target) => match wrong_tables(&target, selected.shown.source, request) {
                None => targets.push(target),
                Some(text) => plan.problems.push(format!("source {name}: {text}")),
            },
            Err(Failure::Failed(text)) => plan.problems.push(format!("source {name}: {text}")),
            Err(other) => return Err(other),
        }
    }
    Ok(targets)
}

/// What keeps tables from being restored by themselves.
fn wrong_tables(target: &Target<'_>, of: &ManifestSource, request: &Request) -> Option<String> {
    if request.tables.is_empty() {
        return None;
    }
    let To::File { root, file, database: true, .. } = &target.to else {
        return Some("single tables come back in place from SQLite only; of a server use --to-database NAME --table TABLE, else leave it out by --source".into());
    };
    if !root.join(std::ffi::OsStr::from_bytes(file)).is_file() {
        return Some("there is no database now that tables could be brought back into; restore all of it".into());
    }
    let facts: Facts = serde_json::from_str(&of.facts).unwrap_or_default();
    let known = facts.get("tables").and_then(|t| t.as_object())?;
    let lacks = request.tables.iter().find(|t| !known.contains_key(*t))?;
    Some(format!("the backup has no table '{lacks}'; it has {}", known.keys().take(20).cloned().collect::<Vec<_>>().join(", ")))
}

fn target<'j>(job: &'j Job, place: &Place, request: &Request, selected: &Selected<'_>) -> Result<Target<'j>, Failure> {
    let (of, shown) = (selected.shown.source, &selected.shown);
    let failed = |text: String| Failure::Failed(text);
    // A safety copy of a database that could not be read has its logs beside it.
    let suffix = super::recover::LOGS.into_iter().find(|s| of.kind == "files" && of.name.ends_with(s)).unwrap_or_default();
    let beside = of.name.strip_suffix(suffix).filter(|_| !suffix.is_empty());
    let configured = |name: &str| job.sources.iter().find(|s| s.name == name);
    let (source, suffix) = match (configured(&of.name), beside.and_then(configured)) {
        (Some(source), _) => (source, ""),
        (None, Some(source)) if matches!(source.kind, SourceKind::Sqlite(_)) => (source, suffix),
        _ => {
            return Err(failed(format!(
                "job {} has no source of that name any more, so keepd does not know where it belongs; restore it with --to DIR",
                job.name
            )));
        }
    };
    let other = || {
        failed(format!(
            "it is of {} in the backup and of {} in the job's configuration; restore it with --to DIR",
            of.kind,
            source.kind.word()
        ))
    };
    let to = match &source.kind {
        SourceKind::Sqlite(s) if of.kind == "sqlite" || (of.kind == "files" && shown.is_one_file()) => {
            one_file(place, shown, &real(&s.path)?, suffix, of.kind == "sqlite" || suffix.is_empty())?
        }
        SourceKind::Files(f) if of.kind == "files" => {
            let root = real(&f.path)?;
            for path in selected.paths.iter().filter(|p| !p.is_empty()) {
                let named = String::from_utf8_lossy(&shown.path(path)).into_owned();
                // What came with a restore goes when that is undone.
                if !request.is_undo && restore::find(&place.repository, of, path)?.is_none() {
                    return Err(failed(format!("'{named}' is not in the backup")));
                }
                let above = path.iter().rposition(|b| *b == b'/').and_then(|at| path.get(..at)).unwrap_or_default();
                if !root.join(std::ffi::OsStr::from_bytes(above)).is_dir() {
                    return Err(failed(format!("the directory above '{named}' is not there; restore that, or the whole source")));
                }
            }
            match (shown.is_one_file(), root.is_dir()) {
                (true, true) => {
                    return Err(failed(format!(
                        "it is one file in the backup, and {} is a directory; restore it with --to DIR",
                        root.display()
                    )));
                }
                (true, false) => one_file(place, shown, &root, "", false)?,
                (false, true) => To::Directory { root, paths: selected.paths.clone() },
                (false, false) if root.symlink_metadata().is_ok() => {
                    return Err(failed(format!("{} is no directory now; move it away first", root.display())));
                }
                (false, false) => To::Directory { root, paths: selected.paths.clone() },
            }
        }
        SourceKind::Postgres(server) if of.kind == "postgres" => databases(place, request, selected, server, postgres::file_of)?,
        SourceKind::Mysql(server) if of.kind == "mysql" => databases(place, request, selected, server, mysql::file_of)?,
        SourceKind::Command(command) if of.kind == "command" => {
            if command.restore.is_none() {
                return Err(failed("it has no restore_command; give --source for the others, and restore it with --to DIR".into()));
            }
            let path = [of.name.as_bytes(), b"/", command.file.as_bytes()].concat();
            let entry = restore::find_file(&place.repository, &place.manifest, &path)?;
            To::Command { path, entry: Box::new(entry) }
        }
        _ => return Err(other()),
    };
    Ok(Target { source, name: of.name.clone(), to })
}

/// The path with all links resolved, as far as it is there. Never in the state directory, nor through a stranger's link.
fn real(path: &Path) -> Result<PathBuf, Failure> {
    way::of_source(path).map_err(|e| Failure::Failed(e.to_string()))
}

fn one_file(place: &Place, shown: &Shown<'_>, path: &Path, suffix: &str, database: bool) -> Result<To, Failure> {
    let found = restore::find(&place.repository, shown.source, b"")?;
    let entry = found.filter(|e| e.kind == Kind::File).ok_or_else(|| Failure::Failed("the backup holds no file of it".into()))?;
    let (Some(root), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Failure::Failed(format!("{} is no file's path", path.display())));
    };
    let file = [name.as_bytes(), suffix.as_bytes()].concat();
    Ok(To::File { root: root.to_owned(), file, staged_as: shown.path(b""), database, entry: Box::new(entry) })
}

fn databases(
    place: &Place,
    request: &Request,
    selected: &Selected<'_>,
    server: &ServerSource,
    file_of: fn(&str) -> String,
) -> Result<To, Failure> {
    let of: &ManifestSource = selected.shown.source;
    let facts: Facts = serde_json::from_str(&of.facts).unwrap_or_else(|_| BTreeMap::new());
    let mut names: Vec<String> = match facts.get("databases").and_then(|d| d.as_object()) {
        Some(databases) => databases.keys().cloned().collect(),
        None => match &server.databases {
            crate::config::Databases::Named(names) => names.clone(),
            crate::config::Databases::All => Vec::new(),
        },
    };
    if let Some(wanted) = &request.database {
        if !names.contains(wanted) {
            return Err(Failure::Failed(format!("the backup has no database '{wanted}'; it has {}", names.join(", "))));
        }
        names.retain(|n| n == wanted);
    }
    let mut dumps = Vec::new();
    for database in names {
        let file = file_of(&database);
        let shown = selected.shown.path(if selected.shown.is_one_file() { b"" } else { file.as_bytes() });
        let own: &[u8] = if selected.shown.is_one_file() { b"" } else { file.as_bytes() };
        if !selected.paths.iter().any(|p| crate::run::selection::is_at_or_below(own, p)) {
            continue;
        }
        dumps.push(Dump { entry: restore::find_file(&place.repository, &place.manifest, &shown)?, database, path: shown });
    }
    if dumps.is_empty() {
        return Err(Failure::Failed("the backup has no database of it that is wanted".into()));
    }
    Ok(To::Databases { dumps, facts })
}

/// A source's part of a manifest.
pub fn of<'m>(manifest: &'m Manifest, name: &str) -> Result<&'m ManifestSource, Failure> {
    manifest.sources.iter().find(|s| s.name == name).ok_or_else(|| Failure::Failed(format!("the backup has no source {name}")))
}
