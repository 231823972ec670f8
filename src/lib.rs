//! keepd: captures the state of applications on a schedule, stores it deduplicated and sealed, and gives it back.
//!
//! Data flows source → repository → storage; `run` and `control` stand above, `config`, `crypto` and `ledger` below.
//! `docs/architecture.md` shows the whole house.

pub mod access;
pub mod archive;
#[doc(hidden)]
pub mod attack;
pub mod believed;
pub mod config;
pub mod control;
pub mod crypto;
pub mod daemon;
pub mod durable;
pub mod kit;
pub mod ledger;
pub mod machine;
pub mod meta;
pub mod portable;
pub mod process;
pub mod profile;
pub mod repository;
pub mod rescue;
pub mod retention;
pub mod run;
pub mod schedule;
pub mod secret;
pub mod source;
pub mod sqlite_error;
pub mod storage;
