//! Configuration: TOML files to checked types.
//!
//! In: `keepd.toml` and the drop-ins of `conf.d`. Out: one [`Config`] in which every name resolves, or a list of
//! [`Problem`]s with file, line and column.

pub mod cron;
mod load;
mod problem;
mod read;
mod types;
mod values;

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

pub use load::load;
pub use problem::{Problem, Problems};
pub use types::*;

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A directory named by the environment: systemd's (a list, the first counts) or XDG's.
fn directory(variable: &str) -> Option<PathBuf> {
    let value = std::env::var(variable).ok()?;
    let first = value.split(':').next().filter(|v| v.starts_with('/'))?;
    Some(PathBuf::from(first))
}

fn home(below: &str) -> PathBuf {
    directory("HOME").unwrap_or_else(|| PathBuf::from("/")).join(below)
}

/// `/etc/keepd/keepd.toml`, or for an ordinary user `$XDG_CONFIG_HOME/keepd/keepd.toml`.
pub fn default_path() -> PathBuf {
    match is_root() {
        true => PathBuf::from("/etc/keepd/keepd.toml"),
        false => directory("XDG_CONFIG_HOME").unwrap_or_else(|| home(".config")).join("keepd/keepd.toml"),
    }
}

/// systemd's `$STATE_DIRECTORY`, `/var/lib/keepd`, or for an ordinary user `$XDG_STATE_HOME/keepd`.
pub fn default_state_dir() -> PathBuf {
    match (directory("STATE_DIRECTORY"), is_root()) {
        (Some(dir), _) => dir,
        (None, true) => PathBuf::from("/var/lib/keepd"),
        (None, false) => directory("XDG_STATE_HOME").unwrap_or_else(|| home(".local/state")).join("keepd"),
    }
}

/// `/run/keepd/keepd.sock`, or for an ordinary user `$XDG_RUNTIME_DIR/keepd/keepd.sock`, else in the state directory.
pub fn default_socket() -> PathBuf {
    match (directory("RUNTIME_DIRECTORY"), is_root(), directory("XDG_RUNTIME_DIR")) {
        (Some(dir), _, _) => dir.join("keepd.sock"),
        (None, true, _) => PathBuf::from("/run/keepd/keepd.sock"),
        (None, false, Some(dir)) => dir.join("keepd/keepd.sock"),
        (None, false, None) => default_state_dir().join("keepd.sock"),
    }
}

/// What of the configuration can be tried on this machine: the keys. Sources need not exist yet; they are only told of.
pub fn try_out(config: &Config) -> (Vec<String>, Vec<String>) {
    let (mut errors, mut warnings) = (Vec::new(), Vec::new());
    for profile in config.encryption.values() {
        let KeySource::File(path) = &profile.key;
        if let Err(e) = crate::crypto::key_file::load(path) {
            errors.push(format!("encryption.{}.key_file: {e}", profile.name));
        }
    }
    for job in config.jobs.values() {
        for source in job.sources.iter().filter(|s| !exists(s.kind.path())) {
            warnings.push(format!("job.{}: source {}: {} does not exist now", job.name, source.name, source.kind.path().display()));
        }
    }
    (errors, warnings)
}

fn exists(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok()
}

/// The configuration in force, shared by all rooms; a reload swaps it whole.
#[derive(Debug)]
pub struct Current(RwLock<Arc<Config>>);

impl Current {
    pub fn new(config: Config) -> Self {
        Self(RwLock::new(Arc::new(config)))
    }

    pub fn get(&self) -> Arc<Config> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set(&self, config: Config) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }
}
