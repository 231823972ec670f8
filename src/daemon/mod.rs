//! The daemon: start, wiring, sd-notify, signals, reload, shutdown.

pub mod command_line;
