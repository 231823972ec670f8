//! The daemon: start, wiring, sd-notify, signals, reload, shutdown.

pub mod command_line;
mod logging;
mod notify;
mod service;

pub use service::run;
