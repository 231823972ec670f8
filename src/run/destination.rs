//! Opening a destination's repository as configured.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use data_encoding::HEXLOWER;
use keepd_protocol::model::{Backup, BackupPlace, Traffic};
use tokio::runtime::Handle;

use super::backup::Environment;
use super::live::{Failure, LiveRun};
use super::names;
use crate::config::{Config, Destination};
use crate::crypto::{self, Profile};
use crate::ledger::Ledger;
use crate::profile;
use crate::repository::lease::{Holder, Lease, TERM};
use crate::repository::{OpenOptions, Repository, RepositoryError};
use crate::storage::{self, Counters, Storage};

/// Where a destination is, without secrets.
pub fn location(destination: &Destination) -> String {
    storage::location(destination)
}

/// The profile that a destination names, with its keys; None where nothing is encrypted.
pub fn profile(config: &Config, destination: &Destination) -> Result<Option<Profile>, Failure> {
    let Some(name) = &destination.encryption else { return Ok(None) };
    profile_named(config, name).map(Some).map_err(|e| Failure::Failed(format!("destination {}: {e}", destination.name)))
}

/// A profile by its name, with its keys.
pub fn profile_named(config: &Config, name: &str) -> Result<Profile, Failure> {
    let known = config.encryption.get(name).ok_or_else(|| {
        let names = config.encryption.keys().cloned().collect::<Vec<_>>().join(", ");
        Failure::Failed(format!("there is no encryption profile '{name}'; configured are: {names}"))
    })?;
    profile::load(known).map_err(|(_, e)| Failure::Failed(format!("encryption profile {name}: {e}")))
}

/// ` (fingerprint …)`, where the key has one.
fn told_fingerprint(profile: &Profile) -> String {
    let fingerprint = profile.key.fingerprint().ok().flatten();
    fingerprint.map(|f| format!(" (its key's fingerprint is {f})")).unwrap_or_default()
}

/// Its storage; nothing is contacted yet.
pub fn storage(destination: &Destination, runtime: &Handle) -> Result<Storage, Failure> {
    Storage::open(destination, runtime.clone()).map_err(|e| Failure::Failed(format!("destination {}: {e}", destination.name)))
}

/// An error of a repository with the name of its destination.
pub fn at(destination: &Destination, error: RepositoryError) -> Failure {
    match error {
        RepositoryError::Cancelled => Failure::Cancelled,
        e @ RepositoryError::Storage(_) => Failure::Storage(format!("destination {}: {e}", destination.name)),
        other => Failure::Failed(format!("destination {}: {other}", destination.name)),
    }
}

/// The storage of a destination and the id of its repository, without opening it; None where there never was one.
pub fn identify(env: &Environment, destination: &Destination) -> Result<Option<(Storage, [u8; 16])>, Failure> {
    let storage = storage(destination, &env.runtime)?;
    let known = env.ledger.note(&id_note(storage.location()))?;
    let id = crate::repository::open::identify(&storage, known.as_deref()).map_err(|e| at(destination, e))?;
    Ok(id.map(|id| (storage, id)))
}

/// Opens the repository of a destination; with `create` makes one where none ever was.
pub fn open(env: &Environment, destination: &Destination, create: bool) -> Result<Arc<Repository>, Failure> {
    let Environment { config, ledger, runtime, lent } = env;
    let profile = profile(config, destination)?;
    let storage = storage(destination, runtime)?;
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
        RepositoryError::Storage(_) => at(destination, e),
        // A name says little of a key: another machine may call another one so.
        RepositoryError::Object { .. } => {
            let of = profile.as_ref().map(|p| format!("encryption profile {}{}: ", p.name, told_fingerprint(p))).unwrap_or_default();
            Failure::Failed(format!("destination {}: {of}{e}", destination.name))
        }
        other => Failure::Failed(format!("destination {}: {other}", destination.name)),
    })?;
    repository.lend(lent);
    if known_id.is_none() && !repository.may_be_another() {
        remember(ledger, &repository)?;
    }
    Ok(repository)
}

fn keys_note(repository: &Repository) -> String {
    format!("master key of {}", repository.id())
}

/// Remembers at which master key a repository is; `ended`: that the one before is in force no more.
pub fn remember_keys(ledger: &Ledger, repository: &Repository, ended: bool) -> Result<(), Failure> {
    Ok(ledger.set_note(&keys_note(repository), &format!("{}{}", repository.epoch(), if ended { " ended" } else { "" }))?)
}

/// Refuses to write to a repository whose key slots are from before the end of its last re-encryption: whoever has the old key, and can write to the
/// storage, may have put them back to read the next backups.
fn is_not_older(env: &Environment, destination: &Destination, repository: &Repository) -> Result<(), Failure> {
    let note = env.ledger.note(&keys_note(repository))?.unwrap_or_default();
    let (known, ended) = note.split_once(' ').map_or((note.as_str(), false), |(known, _)| (known, true));
    let known: u16 = known.parse().unwrap_or(0);
    let (name, epoch) = (&destination.name, repository.epoch());
    match epoch < known || (epoch == known && ended && repository.is_changing_keys()) {
        false => Ok(()),
        true => Err(Failure::Failed(format!(
            "destination {name}: its key slots are from before the end of a re-encryption (master key {epoch}, and it was at {known}): somebody put older ones into keys/ back, or the whole storage. Nothing is \
             written with a key that was given up; what is there can be restored. If you brought an older state back yourself: keepctl destination take-over {name}"
        ))),
    }
}

/// Whether a repository that was opened a while ago still has the keys that it has now.
pub fn has_its_keys(env: &Environment, repository: &Repository) -> bool {
    let now = format!("{}{}", repository.epoch(), if repository.is_changing_keys() { "" } else { " ended" });
    env.ledger.note(&keys_note(repository)).is_ok_and(|note| note.is_none_or(|note| note == now))
}

/// Takes a repository as it is: it is at the master key that its slots have.
pub fn accept_keys(env: &Environment, repository: &Repository) -> Result<(), Failure> {
    remember_keys(&env.ledger, repository, !repository.is_changing_keys())
}

/// Opens the repository of a destination to say something of a backup there.
pub fn open_to_mark(env: &Environment, destination: &Destination) -> Result<Arc<Repository>, Failure> {
    let repository = open(env, destination, false)?;
    is_not_older(env, destination, &repository)?;
    Ok(repository)
}

/// Opens the repository of a destination and becomes its writer; with `create` makes one where none ever was.
pub fn open_for_writing(
    env: &Environment,
    destination: &Destination,
    live: &LiveRun,
    create: bool,
) -> Result<(Arc<Repository>, Lease), Failure> {
    let repository = open(env, destination, create)?;
    is_not_older(env, destination, &repository)?;
    let lease = lease(env, &repository, live)?;
    Ok((repository, lease))
}

/// So many runs before are remembered: each may have ended before it wrote its lease over that of the one before.
const LEASES_KNOWN: usize = 8;

/// Becomes the writer of an open repository. Which runs did is remembered first, so that what one leaves by a crash is known as one's own.
pub fn lease(env: &Environment, repository: &Arc<Repository>, live: &LiveRun) -> Result<Lease, Failure> {
    let (run, holder) = (live.id(), holder(&env.config.daemon.state_dir)?);
    let earlier = env.ledger.change_note(&format!("lease at {}", repository.location()), |note| {
        let earlier: Vec<String> = note.unwrap_or_default().split_whitespace().map(str::to_owned).collect();
        let kept = earlier.iter().rev().take(LEASES_KNOWN).rev().map(String::as_str);
        let note = kept.chain([run.as_str()]).collect::<Vec<_>>().join(" ");
        (earlier, Some(note))
    })?;
    Ok(Lease::acquire(repository, &holder, &run, &earlier, TERM, &live.cancel)?)
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

/// Says of a backup's places which of them are no longer configured.
pub fn mark_unconfigured(config: &Config, backup: &mut Backup) {
    for place in backup.destinations.iter_mut().filter(|place| !config.destinations.contains_key(&place.name)) {
        place.status = BackupPlace::UNCONFIGURED.into();
    }
}

/// The configured destinations that have a backup, the quickest to read from first.
pub fn best_first<'c>(config: &'c Config, backup: &Backup) -> Vec<&'c Destination> {
    let mut places: Vec<&Destination> = backup.destinations.iter().filter_map(|p| config.destinations.get(&p.name)).collect();
    places.sort_by_key(|d| (d.directory().is_none(), super::archived::is(d)));
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
    Ok(Holder { instance, host: names::host(), machine, boot: crate::believed::boot_id() })
}

fn fresh_instance(path: &Path) -> std::io::Result<String> {
    let random: [u8; 8] = crypto::random().map_err(|e| std::io::Error::other(e.to_string()))?;
    let instance = HEXLOWER.encode(&random);
    let directory = path.parent().unwrap_or(Path::new("."));
    // On the disk before a lease with it is: a machine whose power went out would not know its own.
    let mut new = tempfile::Builder::new().prefix(".instance-").tempfile_in(directory)?;
    new.write_all(format!("{instance}\n").as_bytes())?;
    new.as_file().sync_all()?;
    new.persist(path).map_err(|e| e.error)?;
    std::fs::File::open(directory)?.sync_all()?;
    Ok(instance)
}
