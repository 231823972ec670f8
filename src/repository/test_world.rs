//! A repository in a temporary directory, as several daemons see it, for tests.

use std::path::Path;
use std::sync::Arc;

use super::{OpenOptions, Repository};
use crate::config::{Compression, Destination};
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
        let destination = Destination::plain(
            "local",
            "fs",
            [("root".to_owned(), self.path().join("repository").display().to_string().as_str().into())].into(),
        );
        let mut storage = Storage::open(&destination, self.runtime.handle().clone()).unwrap();
        storage.before_each = told;
        let options = OpenOptions {
            key: None,
            compression: Compression::None,
            cache_root: &self.path().join(daemon),
            known_id: None,
            create: true,
            memory: 1 << 26,
        };
        Repository::open(storage, &options).unwrap()
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}
