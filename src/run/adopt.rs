//! Destinations as a machine takes them up that knows nothing of them, or not enough: what is there comes into the ledger, and who writes there.

use tokio_util::sync::CancellationToken;

use super::backup::Environment;
use super::live::Failure;
use super::{archived, catalogue, check, destination};
use crate::config::Destination;
use crate::repository::lease::Lease;

/// Brings the catalogue of a destination up to date with what is there; returns what could not be read.
pub fn sync(env: &Environment, target: &Destination, cancel: &CancellationToken) -> Result<Vec<String>, Failure> {
    match archived::is(target) {
        true => archived::open(env, target).and_then(|place| archived::catalogue::sync(&place, &env.ledger, cancel)),
        false => destination::open(env, target, false).and_then(|repository| catalogue::sync(&repository, &target.name, &env.ledger)),
    }
}

/// The other machine that writes to a destination, if there is one. Archives have no writer.
pub fn other_writer(env: &Environment, target: &Destination) -> Result<Option<String>, Failure> {
    if archived::is(target) {
        return Ok(None);
    }
    let repository = destination::open(env, target, false)?;
    Ok(Lease::other_writer(&repository, &destination::holder(&env.config.daemon.state_dir)?)?)
}

/// Makes this machine the writer of a destination, whoever was it; returns what was done.
pub fn take_over(env: &Environment, target: &Destination) -> Result<String, Failure> {
    check::take_over(env, target)
}

/// From now on archives of other machines count at a destination of archives.
pub fn accept_hosts(env: &Environment, target: &Destination) -> Result<(), Failure> {
    match archived::is(target) {
        true => archived::catalogue::accept_hosts(&env.ledger, &target.name),
        false => Ok(()),
    }
}
