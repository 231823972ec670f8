//! Who may do what: rights, roles, and what each call wants.
//!
//! In: who is on the other side of a connection, as the kernel says ([`Caller`]), and the configuration in force. Out: what that one may
//! ([`Standing`]), and for whatever is done on somebody's behalf a [`By`] that can be asked again before the effect begins: a right that was taken
//! away meanwhile is gone.

mod by;
mod caller;
mod change;
pub mod deed;
mod judge;

pub use by::{By, Need, Of, Refusal};
pub use caller::{Caller, groups_of, is_owner, user_name};
pub use change::wanted as wanted_by_change;
pub use judge::{BUILTIN, Jobs, Judge, KnownRole, Standing};
pub use keepd_protocol::access::Right;
