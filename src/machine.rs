//! What this machine has of what a configuration refers to: the same checks for `keepd --check`, a start, a reload and an import.

use std::path::Path;

use crate::config::{self, Config, Problem, Severity};
use crate::profile;

/// A configuration without a mistake in itself, and what this machine has not as it refers to it.
pub struct Loaded {
    pub config: Config,
    /// Keys that cannot be used, destinations that cannot be: some job is sure to fail.
    pub errors: Vec<Problem>,
    /// What is perhaps not meant so.
    pub warnings: Vec<Problem>,
}

/// The configuration, or all that is wrong with it, a line each.
pub fn load(path: &Path) -> Result<Loaded, String> {
    config::load(path).map(check).map_err(|problems| problems.to_string())
}

/// Looks at what the configuration refers to.
pub fn check(config: Config) -> Loaded {
    let problems = profile::check(&config).into_iter().chain(config::check_files(&config));
    let (errors, warnings) = problems.partition(|p: &Problem| p.severity == Severity::Error);
    Loaded { config, errors, warnings }
}

impl Loaded {
    /// For somebody who can mend it now: errors are as bad as mistakes.
    pub fn without_errors(self) -> Result<Self, String> {
        if self.errors.is_empty() { Ok(self) } else { Err(config::Problems(self.errors).to_string()) }
    }

    pub fn log_problems(&self) {
        self.errors.iter().for_each(|p| tracing::error!("{p}"));
        self.warnings.iter().for_each(|p| tracing::warn!("{}", p.to_string().trim_start_matches("warning: ")));
    }
}
