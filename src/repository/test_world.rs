//! A repository in a temporary directory, as several daemons see it, for tests.

use std::path::Path;
use std::sync::Arc;

use minicbor::bytes::ByteArray;

use super::{Manifest, ManifestSource, OpenOptions, Repository, RepositoryError};
use crate::config::{Compression, Destination};
use crate::crypto::Profile;
use crate::storage::Storage;

pub struct World {
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

/// Told before each storage operation.
pub type Told = Arc<dyn Fn() + Send + Sync>;

impl World {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), runtime: tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap() }
    }

    /// The repository through a daemon's own cache.
    pub fn seen_by(&self, daemon: &str, told: Option<Told>) -> Arc<Repository> {
        self.opened_by(daemon, told, None)
    }

    /// The same, with the key of a profile.
    pub fn opened_by(&self, daemon: &str, told: Option<Told>, profile: Option<&Profile>) -> Arc<Repository> {
        self.try_open(daemon, told, profile).unwrap()
    }

    pub fn try_open(&self, daemon: &str, told: Option<Told>, profile: Option<&Profile>) -> Result<Arc<Repository>, RepositoryError> {
        let destination = Destination::plain(
            "local",
            "fs",
            [("root".to_owned(), self.path().join("repository").display().to_string().as_str().into())].into(),
        );
        let mut storage = Storage::open(&destination, self.runtime.handle().clone()).unwrap();
        storage.before_each = told;
        let options = OpenOptions {
            profile,
            compression: Compression::None,
            cache_root: &self.path().join(daemon),
            known_id: None,
            create: true,
            memory: 1 << 26,
        };
        Repository::open(storage, &options)
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// A manifest of these sources.
pub fn manifest(repository: &Repository, sources: Vec<ManifestSource>) -> Manifest {
    Manifest {
        format: 1,
        repository: ByteArray::from(repository.raw_id()),
        sequence: 1,
        predecessor: None,
        job: "job".into(),
        run: "run".into(),
        started: "2026-01-01T00:00:00Z".into(),
        finished: "2026-01-01T00:00:00Z".into(),
        r#type: "manual".into(),
        outcome: "good".into(),
        name: None,
        labels: Vec::new(),
        host: String::new(),
        keepd_version: String::new(),
        sources,
        users: Vec::new(),
        groups: Vec::new(),
        messages: Vec::new(),
        left_out: 0,
        added_bytes: 0,
        new_bytes: None,
        parent: None,
        origin: None,
        description: None,
        version: None,
        schema_version: None,
    }
}

/// Contents that nothing makes smaller.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}
