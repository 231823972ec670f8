//! Configuration: TOML files to checked types.
//!
//! In: `keepd.toml` and the drop-ins of `conf.d`. Out: one [`Config`] in which every name resolves, or a list of
//! [`Problem`]s with file, line and column.

mod types;

use std::sync::{Arc, PoisonError, RwLock};

pub use types::*;

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
