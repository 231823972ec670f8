//! The configuration itself, out and in: collected into an envelope, planned against what is here, applied as one change.
//!
//! In: the configuration's texts, the secrets that they name, the ledger's schedule state; or an envelope from anybody's hands. Out: an envelope;
//! or a plan, and when it is wanted so a change of the files. `docs/config-backup.md` shows it to people.

pub mod apply;
#[cfg(test)]
mod apply_tests;
pub mod collect;
#[cfg(test)]
mod collect_tests;
pub mod plan;
mod secret_files;
pub mod secrets;
#[cfg(test)]
mod secrets_tests;
pub mod stored;
#[cfg(test)]
mod stored_tests;
