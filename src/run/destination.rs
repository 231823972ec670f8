//! Opening a destination's repository as configured.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use data_encoding::HEXLOWER;
use keepd_protocol::model::{Backup, Traffic};

use super::backup::Environment;
use super::live::{Failure, LiveRun};
use super::names;
use crate::config::{Config, Destination};
use crate::crypto;
use crate::ledger::Ledger;
use crate::profile;
use crate::repository::lease::{Holder, Lease, TERM};
use crate::repository::{OpenOptions, Repository, RepositoryError};
use crate::storage::{self, Counters, Storage};

/// Where a destination is, without secrets.
pub fn location(destination: &Destination) -> String {
    storage::location(destination)
}

/// Opens the repository of a destination; with `create` makes one where none ever was.
pub fn open(env: &Environment, destination: &Destination, create: bool) -> Result<Arc<Repository>, Failure> {
    let Environment { config, ledger, runtime, lent } = env;
    let failed = |text: String| Failure::Failed(format!("destination {}: {text}", destination.name));
    let profile = match &destination.encryption {
        None => None,
        Some(name) => {
            let known = config.encryption.get(name).ok_or_else(|| failed(format!("there is no encryption profile '{name}'")))?;
            Some(profile::load(known).map_err(|(_, e)| failed(format!("encryption profile {name}: {e}")))?)
        }
    };
    let storage = Storage::open(destination, runtime.clone()).map_err(|e| failed(e.to_string()))?;
    let note = id_note(storage.location());
    let known_id = ledger.note(&note)?;
    let options = OpenOptions {
        profile: profile.as_ref(),
        compression: destination.compression,
        cache_root: &cache_root(&config.daemon.state_dir),
        known_id: known_id.as_deref(),
        create,
        memory: config.daemon.memory / config.daemon.max_parallel_runs.max(1) as u64,
    };
    let repository = Repository::open(storage, &options).map_err(|e| match e {
        RepositoryError::Storage(e) => Failure::Storage(format!("destination {}: {e}", destination.name)),
        other => failed(other.to_string()),
    })?;
    is_not_older(ledger, &repository).map_err(failed)?;
    repository.lend(lent);
    if known_id.is_none() && !repository.may_be_another() {
        remember(ledger, &repository)?;
    }
    Ok(repository)
}

/// Refuses a repository whose key slots are from before its last re-encryption: whoever has the old key, and can write to the storage, may have put
/// them back to read the next backups.
fn is_not_older(ledger: &Ledger, repository: &Repository) -> Result<(), String> {
    let note = format!("master key of {}", repository.id());
    let known: u16 = ledger.note(&note).map_err(|e| e.to_string())?.and_then(|n| n.parse().ok()).unwrap_or(0);
    match repository.epoch().cmp(&known) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => ledger.set_note(&note, &repository.epoch().to_string()).map_err(|e| e.to_string()),
        std::cmp::Ordering::Less => Err(format!(
            "its key slots are from before a re-encryption (master key {}, and it was at {known}): somebody put older ones into keys/ back, or the whole storage; nothing is written with a key that was given up",
            repository.epoch()
        )),
    }
}

/// Opens the repository of a destination and becomes its writer; with `create` makes one where none ever was.
pub fn open_for_writing(
    env: &Environment,
    destination: &Destination,
    live: &LiveRun,
    create: bool,
) -> Result<(Arc<Repository>, Lease), Failure> {
    let repository = open(env, destination, create)?;
    let lease = lease(env, &repository, live)?;
    Ok((repository, lease))
}

/// Becomes the writer of an open repository.
pub fn lease(env: &Environment, repository: &Arc<Repository>, live: &LiveRun) -> Result<Lease, Failure> {
    Ok(Lease::acquire(repository, &holder(&env.config.daemon.state_dir)?, &live.id(), TERM, &live.cancel)?)
}

fn id_note(location: &str) -> String {
    format!("repository at {location}")
}

/// From now on another repository in its place is an error. One that was just made is remembered when something was committed to it.
pub fn remember(ledger: &Ledger, repository: &Repository) -> Result<(), Failure> {
    Ok(ledger.set_note(&id_note(repository.location()), &repository.id())?)
}

/// What a destination was used for since the daemon started.
pub fn traffic(destination: &Destination) -> Traffic {
    let Counters { sent, received, operations, retries, errors } = storage::counters(destination);
    Traffic { sent, received, operations, retries, errors }
}

/// The configured destinations that have a backup, the quickest to read from first.
pub fn best_first<'c>(config: &'c Config, backup: &Backup) -> Vec<&'c Destination> {
    let mut places: Vec<&Destination> = backup.destinations.iter().filter_map(|p| config.destinations.get(&p.name)).collect();
    places.sort_by_key(|d| d.directory().is_none());
    places
}

fn cache_root(state_dir: &Path) -> PathBuf {
    state_dir.join("repositories")
}

/// Who this daemon is to other daemons: a random name in the state directory, and the host.
pub fn holder(state_dir: &Path) -> Result<Holder, Failure> {
    let path = state_dir.join("instance");
    let failed = |e: std::io::Error| Failure::Failed(format!("cannot read or write {}: {e}", path.display()));
    let instance = match std::fs::read_to_string(&path) {
        Ok(text) if !text.trim().is_empty() => text.trim().to_owned(),
        Ok(_) => fresh_instance(&path).map_err(failed)?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => fresh_instance(&path).map_err(failed)?,
        Err(e) => return Err(failed(e)),
    };
    // The machine's id is confidential (machine-id(5)): only a hash of it leaves the machine.
    let id = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let machine = match id.trim() {
        "" => String::new(),
        id => HEXLOWER.encode(&blake3::derive_key("keepd writer.json machine", id.as_bytes())[..8]),
    };
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned();
    Ok(Holder { instance, host: names::host(), machine, boot })
}

fn fresh_instance(path: &Path) -> std::io::Result<String> {
    let random: [u8; 8] = crypto::random().map_err(|e| std::io::Error::other(e.to_string()))?;
    let instance = HEXLOWER.encode(&random);
    std::fs::write(path, format!("{instance}\n"))?;
    Ok(instance)
}
