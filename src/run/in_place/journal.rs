//! What a restore in place has begun, written down before each step so that the next start can finish or undo it.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::tree::Tree;
use crate::config::{Health, Program};
use crate::run::live::Failure;
use crate::run::quiesce::Note;
use crate::source::load::Wanted;

/// How far it has come. Up to `Swapping` an interruption means that all is put back; from `Swapped` on it means that it is seen through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Staging; nothing that anybody uses was touched.
    Preparing,
    /// The application is being stopped, or is.
    Holding,
    /// Things are being exchanged.
    Swapping,
    /// All is in place; whether the application works with it is being found out.
    Swapped,
    /// What was there is being put back.
    Undoing,
    /// All of it is back; the application is let go, and what was staged is cleared away.
    Undone,
    /// It stays; what was there is being cleared away.
    Keeping,
}

/// A database that was loaded into a scratch one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Loaded {
    pub source: String,
    pub wanted: Wanted,
    /// One of the name was there before.
    pub there: bool,
    /// Putting it in place was begun.
    pub begun: bool,
    /// What is done on its server is done there only.
    pub server: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Journal {
    pub format: u32,
    pub run: String,
    pub job: String,
    pub backup: String,
    pub safety: Option<String>,
    pub phase: Phase,
    pub trees: Vec<Tree>,
    pub databases: Vec<Loaded>,
    /// Command sources that were fed, by name.
    pub commands: Vec<String>,
    /// Command sources of which it is kept in a file what the safety backup has, for that opens with a private key alone.
    #[serde(default)]
    pub kept: Vec<String>,
    /// How the application is let go again; it may be running already.
    pub held: Option<Note>,
    /// What begins its maintenance mode.
    pub begin: Option<Program>,
    pub health: Option<Health>,
    #[serde(skip)]
    path: PathBuf,
}

fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("in-place")
}

impl Journal {
    pub fn new(state_dir: &Path, run: String, job: String, backup: String, health: Option<Health>) -> Self {
        let path = directory(state_dir).join(format!("{run}.json"));
        let (trees, databases, commands, kept) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let phase = Phase::Preparing;
        Self { format: 1, run, job, backup, safety: None, phase, trees, databases, commands, kept, held: None, begin: None, health, path }
    }

    /// Durable when it returns.
    pub fn save(&self) -> Result<(), Failure> {
        let parent = self.path.parent().unwrap_or(Path::new("/"));
        let write = || -> std::io::Result<()> {
            crate::durable::make_directories(parent)?;
            let mut file = tempfile::NamedTempFile::new_in(parent)?;
            file.write_all(&serde_json::to_vec(self)?)?;
            file.as_file().sync_all()?;
            file.persist(&self.path).map_err(|e| e.error)?;
            std::fs::File::open(parent)?.sync_all()
        };
        super::point();
        write().map_err(|e| Failure::Failed(format!("cannot note in {} what is about to be done: {e}", self.path.display())))?;
        super::point();
        Ok(())
    }

    pub fn enter(&mut self, phase: Phase) -> Result<(), Failure> {
        let before = std::mem::replace(&mut self.phase, phase);
        self.save().inspect_err(|_| self.phase = before)
    }

    /// Where the changes of a tree are written.
    pub fn changes_of(&self, tree: usize) -> PathBuf {
        self.path.with_extension(format!("{tree}.changes"))
    }

    /// Where it is kept what a command source had.
    pub fn kept_of(&self, source: &str) -> PathBuf {
        self.path.with_extension(format!("{source}.kept"))
    }

    /// Makes that file, for writing, readable by keepd's own user alone.
    pub fn keep(&mut self, source: &str) -> std::io::Result<std::fs::File> {
        crate::durable::make_directories(self.path.parent().unwrap_or(Path::new("/")))?;
        let file = std::fs::File::options().write(true).create_new(true).mode(0o600).open(self.kept_of(source))?;
        self.kept.push(source.to_owned());
        Ok(file)
    }

    /// Removes those files. What stays is swept at the next start.
    pub fn forget_kept(&self) {
        for source in &self.kept {
            let _ = std::fs::remove_file(self.kept_of(source));
        }
    }

    /// All is done.
    pub fn remove(&self) -> Result<(), Failure> {
        let failed = |e: std::io::Error| Failure::Failed(format!("cannot remove {}: {e}", self.path.display()));
        match std::fs::remove_file(&self.path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
            _ => {}
        }
        if let Some(directory) = self.path.parent().filter(|d| d.exists()) {
            std::fs::File::open(directory).and_then(|d| d.sync_all()).map_err(failed)?;
        }
        super::point();
        for tree in 0..self.trees.len() {
            // What stays is swept at the next start.
            let _ = std::fs::remove_file(self.changes_of(tree));
        }
        self.forget_kept();
        Ok(())
    }

    /// The run that left something undone in a job, if there is one besides `but`.
    pub fn of_job(state_dir: &Path, job: &str, but: &str) -> Option<String> {
        Self::left(state_dir).0.into_iter().find(|j| j.job == job && j.run != but).map(|j| j.run)
    }

    /// Removes what no journal needs: changes of what was done, and what was being written when keepd died. To be called before any run.
    pub fn sweep(state_dir: &Path, journals: &[Journal]) {
        let needed = |name: &str| journals.iter().any(|j| name.starts_with(&j.run)) || name.ends_with(".json");
        for entry in std::fs::read_dir(directory(state_dir)).into_iter().flatten().flatten() {
            if !entry.file_name().to_str().is_some_and(needed) {
                // It is in nobody's way.
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// Those that an earlier keepd left, and what could not be read.
    pub fn left(state_dir: &Path) -> (Vec<Journal>, Vec<String>) {
        let (mut journals, mut problems) = (Vec::new(), Vec::new());
        let entries = match std::fs::read_dir(directory(state_dir)) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return (journals, problems),
            Err(e) => return (journals, vec![format!("{}: {e}", directory(state_dir).display())]),
        };
        for path in entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "json")) {
            let read = std::fs::read(&path).map_err(|e| e.to_string());
            match read.and_then(|bytes| serde_json::from_slice::<Journal>(&bytes).map_err(|e| e.to_string())) {
                Ok(journal) if journal.format == 1 => journals.push(Journal { path, ..journal }),
                Ok(journal) => problems.push(format!("{}: its format {} is of another version of keepd", path.display(), journal.format)),
                Err(e) => problems.push(format!("{}: {e}", path.display())),
            }
        }
        // What was done last is undone first.
        journals.sort_by(|a, b| b.run.cmp(&a.run));
        (journals, problems)
    }
}
