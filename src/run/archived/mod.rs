//! Runs on destinations of archives (`layout = "archive"`): what the rest of `run` does with a repository, done with one file for each backup.

pub(super) mod backup;
mod capture;
pub(crate) mod catalogue;
pub(super) mod copy;
pub(crate) mod stage;
pub(crate) mod upkeep;

use super::backup::Environment;
use super::destination;
use super::live::Failure;
use crate::archive::place::{self, ReadError};
use crate::archive::{Archives, pour::PourError};
use crate::config::{Destination, Layout};
use crate::storage::{Storage, StorageError};

/// Whether a destination keeps archives.
pub fn is(target: &Destination) -> bool {
    target.layout == Layout::Archive
}

/// An error for what only a repository has.
pub fn is_none(target: &Destination, what: &str) -> Result<(), Failure> {
    match is(target) {
        true => Err(Failure::Failed(format!("destination {} keeps archives (layout = \"archive\"): {what}", target.name))),
        false => Ok(()),
    }
}

/// The archives of a destination; nothing is contacted yet.
pub fn open(env: &Environment, target: &Destination) -> Result<Archives, Failure> {
    let profile = destination::profile(&env.config, target)?;
    let storage = Storage::open(target, env.runtime.clone()).map_err(|e| Failure::Failed(format!("destination {}: {e}", target.name)))?;
    let work_dir = env.config.daemon.state_dir.join("work");
    std::fs::create_dir_all(&work_dir).map_err(|e| Failure::Failed(format!("cannot make {}: {e}", work_dir.display())))?;
    Ok(Archives {
        storage,
        name: target.name.clone(),
        profile,
        packing: place::packing(target.compression),
        private_keys: env.lent.keys().to_vec(),
        work_dir,
        only: None,
    })
}

impl From<StorageError> for Failure {
    fn from(error: StorageError) -> Self {
        Failure::Storage(error.to_string())
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        match error {
            // What is gone is damage; a storage that does not answer says nothing of the archive.
            ReadError::Storage(e @ StorageError::NotFound { .. }) => Failure::Damaged(e.to_string()),
            ReadError::Storage(e) => Failure::Storage(e.to_string()),
            ReadError::Archive(text) => Failure::Damaged(text),
            ReadError::NotOpen(text) => Failure::NeedsKey(text),
            ReadError::Cancelled => Failure::Cancelled,
        }
    }
}

impl From<PourError> for Failure {
    fn from(error: PourError) -> Self {
        match error {
            PourError::Read(e) => e.into(),
            PourError::Write(e) => Failure::Failed(format!("the archive cannot be read into the state directory: {e}")),
            PourError::Cancelled => Failure::Cancelled,
        }
    }
}
