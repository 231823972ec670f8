//! The archives of one destination: their list, their names, reading and removing them.

use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::companion::{self, Companion};
use super::name::{ArchiveName, COMPANION};
use crate::config::Compression;
use crate::crypto::{PrivateKey, Profile, ProfileKey};
use crate::portable::read::OpenWith;
use crate::portable::{ArchiveReader, Limits, Packing, PortableError};
use crate::storage::stream::Problem;
use crate::storage::{Storage, StorageError};

/// Archives of one second and job.
const MOST_OF_A_SECOND: u32 = 100;

/// A destination of archives.
pub struct Archives {
    pub storage: Storage,
    /// The destination's name.
    pub name: String,
    pub profile: Option<Profile>,
    pub packing: Packing,
    pub private_keys: Vec<Arc<PrivateKey>>,
    /// Where unnamed files may lie.
    pub work_dir: PathBuf,
    /// Nothing but this object counts, whatever it is called.
    pub only: Option<String>,
}

/// An archive that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct There {
    pub object: String,
    /// In bytes.
    pub size: u64,
}

/// What there is, each sorted by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct List {
    pub archives: Vec<There>,
    /// The archives' names that companions are of.
    pub companions: Vec<String>,
    /// What is none of keepd's.
    pub foreign: Vec<String>,
}

/// How a compression is done in an archive.
pub fn packing(compression: Compression) -> Packing {
    match compression {
        Compression::None => Packing::None,
        Compression::Gzip => Packing::Gzip,
        Compression::Zstd => Packing::Zstd,
    }
}

impl Archives {
    /// All that is there, or an error. A directory that nothing was written to yet has none.
    pub fn list(&self) -> Result<List, StorageError> {
        let mut list = List::default();
        for object in self.storage.top()? {
            if let Some(only) = &self.only {
                if *only == object.name {
                    list.archives.push(There { object: object.name, size: object.size });
                }
                continue;
            }
            if let Some(archive) = object.name.strip_suffix(COMPANION).filter(|name| ArchiveName::parse(name).is_some()) {
                list.companions.push(archive.to_owned());
            } else if ArchiveName::parse(&object.name).is_some() {
                list.archives.push(There { object: object.name, size: object.size });
            } else {
                list.foreign.push(object.name);
            }
        }
        Ok(list)
    }

    /// A name for a backup of a job that began at a time, which nothing has yet.
    pub fn free_name(&self, job: &str, time: Timestamp) -> Result<ArchiveName, StorageError> {
        let time = Timestamp::from_second(time.as_second()).unwrap_or(time);
        let mut name = ArchiveName { job: job.to_owned(), time, number: 1, packing: self.packing, sealed: self.profile.is_some() };
        while name.number < MOST_OF_A_SECOND && self.storage.exists(&name.to_string())? {
            name.number += 1;
        }
        Ok(name)
    }

    /// Opens an archive, as far as its head.
    pub fn open(&self, object: &str, cancel: &CancellationToken) -> Result<Opened, ReadError> {
        let reader = self.storage.reader(object)?;
        let (size, problem) = (reader.size(), reader.problem());
        let keys: Vec<ProfileKey> = self.profile.iter().flat_map(Profile::keys).cloned().collect();
        // What is here was put here by those who may: no bomb is looked for.
        let limits = Limits { bytes: Some(u64::MAX), entries: u64::MAX };
        let (keys, private_keys, work_dir) = (keys.as_slice(), self.private_keys.as_slice(), self.work_dir.as_path());
        let with = OpenWith { keys, private_keys, limits, work_dir, cancel: cancel.clone(), foreign_source: None };
        match ArchiveReader::open(reader, &with) {
            Ok(reader) => Ok(Opened { reader, object: object.to_owned(), location: self.storage.location().to_owned(), size, problem }),
            Err(e) => Err(why(self.storage.location(), object, &problem, e)),
        }
    }

    /// What stands beside an archive; None where that is nothing, or nothing that can be understood.
    pub fn companion(&self, object: &str) -> Result<Option<Companion>, StorageError> {
        match self.storage.get(&format!("{object}{COMPANION}"), companion::MAX_BYTES) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(StorageError::NotFound { .. }) => Ok(None),
            // Longer than any is.
            Err(StorageError::Failed { reason, .. }) if reason.contains("longer than") || reason.contains("bytes long") => Ok(None),
            Err(e) => Err(e),
        }
    }

    pub fn put_companion(&self, companion: &Companion) -> Result<(), StorageError> {
        let json = serde_json::to_vec_pretty(companion).unwrap_or_default();
        self.storage.put(&format!("{}{COMPANION}", companion.archive), json)
    }

    /// Removes an archive, then its companion; what is gone already is fine. The archive is the backup: a companion that does not go is swept later.
    pub fn remove(&self, object: &str) -> Result<(), StorageError> {
        self.storage.delete(object)?;
        if let Err(e) = self.storage.delete(&format!("{object}{COMPANION}")) {
            tracing::warn!("{e}; the archive is removed, and the next prune removes what stood beside it");
        }
        Ok(())
    }

    /// Removes what interrupted writes and removals left; how many objects.
    pub fn sweep(&self) -> Result<u64, StorageError> {
        let mut swept = self.storage.sweep_streams()?;
        let list = self.list()?;
        for orphan in list.companions.iter().filter(|c| !list.archives.iter().any(|a| a.object == **c)) {
            // The listing may be old, or the archive just coming.
            if self.storage.exists(orphan)? {
                continue;
            }
            self.storage.delete(&format!("{orphan}{COMPANION}"))?;
            swept += 1;
        }
        Ok(swept)
    }
}

/// Why an archive could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The storage did not do what it was asked, which says nothing of the archive.
    #[error("{0}")]
    Storage(StorageError),
    /// It is not what it should be.
    #[error("{0}")]
    Archive(String),
    /// It opens with another key.
    #[error("{0}")]
    NotOpen(String),
    #[error("cancelled")]
    Cancelled,
}

impl From<StorageError> for ReadError {
    fn from(error: StorageError) -> Self {
        ReadError::Storage(error)
    }
}

/// An archive that is read.
pub struct Opened {
    pub reader: ArchiveReader,
    pub object: String,
    pub location: String,
    /// Of the archive as it lies there, in bytes.
    pub size: u64,
    problem: Problem,
}

impl Opened {
    /// Why it could not be read: a storage that failed on the way is told apart from an archive that is not what it should be.
    pub fn why(&self, error: PortableError) -> ReadError {
        why(&self.location, &self.object, &self.problem, error)
    }

    /// What tells why, once the reader is used up.
    pub fn teller(&self) -> impl Fn(PortableError) -> ReadError + use<> {
        let (location, object, problem) = (self.location.clone(), self.object.clone(), self.problem.clone());
        move |error| why(&location, &object, &problem, error)
    }
}

fn why(location: &str, object: &str, problem: &Problem, error: PortableError) -> ReadError {
    match (problem.get(), error) {
        (_, PortableError::Cancelled) => ReadError::Cancelled,
        (Some(e), _) => ReadError::Storage(e.clone()),
        (None, PortableError::NotOpen(e)) => ReadError::NotOpen(format!("{location}: {object}: {e}")),
        (None, PortableError::Key(e)) => ReadError::NotOpen(format!("{location}: {object}: {e}")),
        (None, e) => ReadError::Archive(format!("{location}: {object}: {e}")),
    }
}
