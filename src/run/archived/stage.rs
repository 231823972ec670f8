//! Staging: an archive that is to be read is first brought into a repository of its own in the state directory, sealed with a key that is in memory alone;
//! all that reads repositories reads it there. It is removed with its last reader, and what a keepd that died left of it at the next start.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minicbor::bytes::ByteArray;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::open;
use crate::archive::Archives;
use crate::archive::pour::{self, What};
use crate::config::{Compression, Destination};
use crate::crypto::{Key, Profile, ProfileKey};
use crate::repository::writer::{self, Writer};
use crate::repository::{Manifest, OpenOptions, Repository};
use crate::run::backup::{Environment, short};
use crate::run::live::Failure;
use crate::run::readable::Reading;
use crate::run::restore::Place;
use crate::storage::Storage;

/// The directory of all that is staged.
fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("staged")
}

/// Removes what a keepd that died left. Only before anything is staged.
pub fn clear(state_dir: &Path) {
    let directory = directory(state_dir);
    match std::fs::remove_dir_all(&directory) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!("what was staged of archives in {} cannot be removed: {e}", directory.display());
        }
        _ => {}
    }
}

/// A backup of an archive as a place like others. `reader` is kept as long as somebody reads there.
pub fn place(
    env: &Environment,
    target: &Destination,
    backup: &str,
    reading: &Reading,
    reader: Arc<dyn Send + Sync>,
    cancel: &CancellationToken,
) -> Result<Place, Failure> {
    let detail = env.ledger.backup_at(&target.name, backup)?;
    let detail = detail.ok_or_else(|| Failure::Failed(format!("backup {} is not at {}", short(backup), target.name)))?;
    let archives = open(env, target)?;
    let parent = directory(&env.config.daemon.state_dir);
    let failed = |e: std::io::Error| Failure::Failed(format!("cannot make a directory in {}: {e}", parent.display()));
    std::fs::create_dir_all(&parent).map_err(failed)?;
    // 0700, as all that this crate makes.
    let staged = tempfile::Builder::new().prefix("archive-").tempdir_in(&parent).map_err(failed)?;
    let memory = env.config.daemon.memory / env.config.daemon.max_parallel_runs.max(1) as u64;
    let poured = |what: &What<'_>, name: &str| {
        let repository = fresh(&env.runtime, memory, &staged.path().join(name))?;
        let (manifest, lacking) = into(&archives, detail.object(), backup, what, &repository, cancel)?;
        Ok::<_, Failure>((repository, manifest, lacking))
    };
    let none = HashSet::new();
    let (mut repository, mut manifest, lacking) = match reading {
        Reading::Names => poured(&What::Entries, "1")?,
        Reading::Contents(paths) if !paths.is_empty() => poured(&What::Below(paths, &none), "1")?,
        _ => poured(&What::All, "1")?,
    };
    if let Reading::Contents(paths) = reading
        && !lacking.is_empty()
    {
        // Other names of files whose contents are wanted: they stand before them, and were read past.
        (repository, manifest, _) = poured(&What::Below(paths, &lacking), "2")?;
    }
    let _reading: Arc<dyn Send + Sync> = Arc::new((staged, reader));
    Ok(Place { repository, manifest, destination: target.name.clone(), _reading })
}

/// Pours an archive, which is of this backup, into a repository; the manifest there, and what is lacking of what was wanted.
pub fn into(
    archives: &Archives,
    object: &str,
    backup: &str,
    what: &What<'_>,
    repository: &Arc<Repository>,
    cancel: &CancellationToken,
) -> Result<(Manifest, HashSet<Vec<u8>>), Failure> {
    let opened = archives.open(object, cancel)?;
    if opened.reader.head().is_none_or(|head| head.origin.backup != backup) {
        return Err(Failure::Damaged(format!("{}: {object} is another backup than it was", archives.storage.location())));
    }
    let mut writer = Writer::new(repository.clone(), cancel.clone())?;
    let poured = pour::pour(opened, what, &mut writer, &|_| {})?;
    let mut manifest = poured.manifest;
    manifest.repository = ByteArray::from(repository.raw_id());
    manifest.sequence = 1;
    let flushed = writer.flush()?;
    writer::commit(repository, &manifest, &flushed)?;
    Ok((manifest, poured.lacking))
}

/// An empty repository that nobody else can read.
pub fn fresh(runtime: &Handle, memory: u64, root: &Path) -> Result<Arc<Repository>, Failure> {
    let failed = |text: String| Failure::Failed(format!("{}: {text}", root.display()));
    let path = root.to_str().ok_or_else(|| failed("its name is no text".into()))?;
    let options = [("root".to_owned(), path.into())].into_iter().collect();
    let storage = Storage::open(&Destination::plain("staged", "fs", options), runtime.clone())?;
    let key = Key::generate().map_err(|e| failed(e.to_string()))?;
    let profile = Profile::of("staged", ProfileKey::Key(Arc::new(key)));
    let options = OpenOptions {
        profile: Some(&profile),
        compression: Compression::Zstd,
        cache_root: &root.join("cache"),
        known_id: None,
        create: true,
        memory,
    };
    Ok(Repository::open(storage, &options)?)
}
