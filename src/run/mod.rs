//! Runs: one piece of work each, with steps, progress, cancel and an outcome.
//!
//! `Runs` is the registry the schedule and the control socket start work through. A run is queued, waits for its job (a
//! job never overlaps itself) and for a place (`max_parallel_runs`), works on blocking threads, and ends in the ledger.

pub(crate) mod adopt;
pub(crate) mod archived;
mod audit;
pub(crate) mod backup;
pub(crate) mod browse;
pub(crate) mod catalogue;
mod check;
mod compare;
mod config_backup;
mod contents;
mod copy;
mod coverage;
mod destination;
mod differences;
mod drill;
mod export;
mod hooks;
pub mod housekeeping;
mod import;
mod in_place;
mod keys;
mod kit;
pub(crate) mod live;
mod load;
pub mod memory;
mod names;
mod outcome;
mod outlet;
mod patient;
mod quiesce;
pub(crate) mod readable;
mod reencrypt;
mod references;
mod registry;
mod repeats;
mod reread;
pub(crate) mod restore;
pub(crate) mod retain;
pub(crate) mod selection;
mod set;
mod to_directory;

pub use archived::stage::clear as clear_staged;
pub use compare::CompareRequest;
pub use drill::scratch::{clear_dead as clear_dead_drills, remove_tree};
pub use export::{ExportRequest, SealFor};
pub use import::Given as GivenArchive;
pub use in_place::Request as InPlaceRequest;
pub use live::LiveRun;
pub use load::LoadRequest;
pub(crate) use names::host;
pub use outlet::{RestoreOut, SharedMemory};
pub use registry::{BackupRequest, DrillStarted, Error, RestoreStarted, Result, Runs};
