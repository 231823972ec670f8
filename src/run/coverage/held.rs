//! What the jobs hold of a machine: which source captures a path.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Failure, Found, shown};
use crate::config::{Config, Quiesce, SourceKind};
use crate::source::files::{Held, Holder};

/// The sources of all jobs.
pub struct Jobs {
    pub databases: Vec<Database>,
    pub directories: Vec<Directory>,
    /// `JOB/SOURCE` of command sources, with the words of their commands.
    pub commands: Vec<(String, Vec<String>)>,
}

/// A `sqlite` source whose file is there.
pub struct Database {
    /// `JOB/SOURCE`.
    pub source: String,
    pub path: PathBuf,
    pub id: (u64, u64),
}

/// A `files` source.
pub struct Directory {
    pub source: String,
    pub job: String,
    /// The names of the job's sources.
    pub names: Vec<String>,
    /// Nothing writes while it is captured.
    pub still: bool,
    pub holder: Holder,
}

/// What the files sources make of a path.
#[derive(Default)]
pub struct ByFiles<'j> {
    pub captured: Vec<&'j Directory>,
    /// Sources that leave it out, with the key that says so.
    pub left_out: Vec<(&'j Directory, &'static str)>,
}

impl Jobs {
    pub fn new(config: &Config, found: &mut Found) -> Result<Self, Failure> {
        let mut jobs = Self { databases: Vec::new(), directories: Vec::new(), commands: Vec::new() };
        for job in config.jobs.values() {
            if !job.enabled {
                found.note(format!("job {} is disabled: what is in it counts as covered, but is not backed up by itself", job.name));
            }
            for source in &job.sources {
                let name = format!("{}/{}", job.name, source.name);
                match &source.kind {
                    SourceKind::Sqlite(sqlite) => match sqlite.path.canonicalize().and_then(|path| Ok((path.metadata()?, path))) {
                        Ok((stat, path)) => jobs.databases.push(Database { source: name, path, id: (stat.dev(), stat.ino()) }),
                        Err(e) => found.note(format!("{name}: the database {} cannot be found: {e}", shown(&sqlite.path))),
                    },
                    SourceKind::Files(files) => jobs.directories.push(Directory {
                        source: name,
                        job: job.name.clone(),
                        names: job.sources.iter().map(|s| s.name.clone()).collect(),
                        still: job.quiesce != Quiesce::No,
                        holder: Holder::new(files).map_err(|e| Failure::Failed(e.to_string()))?,
                    }),
                    SourceKind::Command(command) => {
                        let text = command.program.command.join(" ");
                        let words = text.split(|c: char| c.is_whitespace() || "'\"=;|&<>()".contains(c));
                        jobs.commands.push((name, words.filter(|w| !w.is_empty()).map(str::to_owned).collect()));
                    }
                    SourceKind::Postgres(_) | SourceKind::Mysql(_) => {}
                }
            }
        }
        Ok(jobs)
    }

    /// The `sqlite` sources that capture this file, by whatever name.
    pub fn of_database(&self, path: &Path, id: (u64, u64)) -> Vec<String> {
        self.databases.iter().filter(|d| d.path == path || d.id == id).map(|d| d.source.clone()).collect()
    }

    /// A path without links in it.
    pub fn of_path(&self, path: &Path, is_directory: bool) -> ByFiles<'_> {
        let mut by = ByFiles::default();
        for directory in &self.directories {
            match directory.holder.holds(path, is_directory) {
                Held::Captured => by.captured.push(directory),
                Held::LeftOut(key) => by.left_out.push((directory, key)),
                Held::Elsewhere => {}
            }
        }
        by
    }

    /// The command sources that have one of these words in their command, as it is or as the last part of a path.
    pub fn of_words(&self, words: &[&str]) -> Vec<String> {
        let is_one = |word: &String| words.contains(&word.as_str()) || words.contains(&word.rsplit('/').next().unwrap_or_default());
        self.commands.iter().filter(|(_, command)| command.iter().any(is_one)).map(|(source, _)| source.clone()).collect()
    }

    /// What any source reads, as paths without links.
    pub fn paths(&self) -> impl Iterator<Item = (&Path, &str)> {
        let databases = self.databases.iter().map(|d| (d.path.as_path(), d.source.as_str()));
        databases.chain(self.directories.iter().map(|d| (d.holder.root.as_path(), d.source.as_str())))
    }
}

/// The files of `sqlite` sources as the configuration has them now: a job may be added while a scan goes on.
pub struct Captured {
    config: Option<Arc<Config>>,
    paths: HashSet<PathBuf>,
    ids: HashSet<(u64, u64)>,
}

impl Captured {
    pub fn new() -> Self {
        Self { config: None, paths: HashSet::new(), ids: HashSet::new() }
    }

    /// Whether a file is captured as a database. It must not be opened then: to close it would drop the locks of a capture.
    pub fn has(&mut self, current: Arc<Config>, path: &Path, id: (u64, u64)) -> bool {
        if !self.config.as_ref().is_some_and(|config| Arc::ptr_eq(config, &current)) {
            let sources = current.jobs.values().flat_map(|job| &job.sources);
            let configured = sources.filter_map(|s| if let SourceKind::Sqlite(sqlite) = &s.kind { Some(&sqlite.path) } else { None });
            self.paths = configured.map(|path| path.canonicalize().unwrap_or_else(|_| path.clone())).collect();
            self.ids = self.paths.iter().filter_map(|p| p.metadata().ok()).map(|stat| (stat.dev(), stat.ino())).collect();
            self.config = Some(current);
        }
        self.paths.contains(path) || self.ids.contains(&id)
    }
}
