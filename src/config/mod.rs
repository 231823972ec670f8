//! Configuration: TOML files to checked types.
//!
//! In: `keepd.toml` and the drop-ins of `conf.d`. Out: one [`Config`] in which every name resolves, or a list of
//! [`Problem`]s with file, line and column. Nothing on the machine is looked at but these files; what they refer to is checked
//! by [`check_files`].

mod access;
mod audit;
mod change;
mod config_backup;
mod coverage;
pub mod cron;
mod daemon;
mod destination;
mod draft;
mod drill;
mod edit;
mod environment;
mod item;
mod item_text;
mod job;
mod line_ends;
mod load;
mod overlap;
mod patch;
mod paths;
mod problem;
mod program;
mod reader;
mod service;
mod source;
mod source_text;
#[cfg(test)]
mod tests;
mod texts;
mod types;
mod value;

use std::sync::{Arc, PoisonError, RwLock};

pub use change::{clear_kept, finish_change, previous, undo};
pub use destination::is_common_key;
pub use draft::Draft;
pub use environment::check_files;
pub use item::{ItemKind, ItemName};
pub use load::{load, load_destinations};
pub use patch::patch;
pub use paths::{default_path, default_socket};
pub use problem::{Place, Problem, Problems, Severity};
pub(crate) use problem::{did_you_mean, looks_like_key};
pub(crate) use service::is_secret;
pub use service::operator;
pub use texts::{Texts, is_settings};
pub use types::*;
pub use value::{is_name, moment, show_duration};

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
