//! Imports: archives of whatever origin become backups of a destination.
//!
//! In: an archive as [`crate::portable`] describes it, or a plain tar, that somebody uploads in three steps (initiate, upload, start). Out: one backup of type imported, or nothing.
//! `desk` knows which imports there are, also across a restart; `input` reads what was uploaded; `work` is the run; `foreign` brings a tar's entries into path order.

mod desk;
mod foreign;
mod input;
mod keys;
mod work;

pub use desk::{Desk, Given};
pub use work::{Done, import, is_source_name};
