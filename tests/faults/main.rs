//! Storage that misbehaves: every verb of a storage with every fault, met by everything that keepd does with a destination. Nothing is good that is not durable, nothing is
//! deleted that is needed, what failed says why, and when the fault is over all goes on by itself (docs/faults.md).
//!
//! `KEEPD_TEST_LONG=1` tries every place where a fault can be met instead of one of each kind; `KEEPD_TEST_SEED` chooses which.

mod archives;
mod bucket;
#[path = "../common/mod.rs"]
mod common;
mod crash;
mod dav;
mod disk;
mod http;
mod matrix;
mod plugin;
mod s3;
mod services;
mod world;
