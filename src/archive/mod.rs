//! Destinations that keep archives: each backup one portable archive for itself, beside it a companion that is only a convenience.
//!
//! In: entries while they are captured ([`sink`]), or archives as somebody made them. Out: objects `JOB-TIME.tar.zst[.enc]`, their list, and what they say
//! ([`pour`] into a repository for those who read one). docs/archive-layout.md describes them for users, docs/archive.md byte by byte.

pub mod companion;
pub mod describe;
pub mod entries;
pub mod name;
pub mod parts;
pub mod place;
pub mod pour;
pub mod sink;

pub use companion::Companion;
pub use name::ArchiveName;
pub use place::Archives;
pub use sink::ArchiveSink;
