//! Imports: archives of whatever origin become backups of a destination.
//!
//! In: an archive as [`crate::portable`] describes it, or a plain tar, that somebody uploads in three steps (initiate, upload, start). Out: one backup of type imported, or nothing.
//! `desk` knows which imports there are, also across a restart; `input` reads what was uploaded, `keys` are what it may open with; `work` is the run, `chosen` what of the archive is
//! wanted, `contents` what goes into the repository, `commit` what makes a backup of that; `foreign` brings a tar's entries into path order.

mod chosen;
mod commit;
mod contents;
mod desk;
mod foreign;
mod input;
pub(super) mod keys;
mod work;

pub use commit::is_source_name;
pub use desk::{Desk, Given};
pub use work::{Done, import};
