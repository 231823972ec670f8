//! The types of keepd's control interface `io.keepd.Control`, shared by the daemon and keepctl.
//!
//! The wire is Varlink (a JSON object and a NUL byte per message); `io.keepd.Control.varlink` beside this file is the
//! published text of the interface and changes together with these types. `restore` is the binary stream that carries
//! the contents of a restore over a pipe the client passed in.

pub mod access;
pub mod audit;
pub mod call;
pub mod configuration;
pub mod methods;
pub mod model;
pub mod restore;

/// The Varlink text of the interface, as the daemon serves it.
pub const INTERFACE: &str = include_str!("io.keepd.Control.varlink");
/// The name of the interface.
pub const INTERFACE_NAME: &str = "io.keepd.Control";
/// A request frame, NUL included, is at most this long.
pub const MAX_REQUEST_BYTES: usize = 1 << 20;
/// Descriptors with one message.
pub const MAX_DESCRIPTORS: usize = 8;
/// A reply frame is kept below this by splitting lists over several `continues` replies.
pub const MAX_REPLY_BYTES: usize = 256 << 10;
