//! Names of users and groups for the numbers that entries carry.

use std::collections::HashSet;

/// The names that this machine knows, sorted by number.
pub fn users(ids: &HashSet<u32>) -> Vec<(u32, String)> {
    named(ids, |id| uzers::get_user_by_uid(id).map(|u| u.name().to_string_lossy().into_owned()))
}

pub fn groups(ids: &HashSet<u32>) -> Vec<(u32, String)> {
    named(ids, |id| uzers::get_group_by_gid(id).map(|g| g.name().to_string_lossy().into_owned()))
}

fn named(ids: &HashSet<u32>, name: impl Fn(u32) -> Option<String>) -> Vec<(u32, String)> {
    let mut names: Vec<(u32, String)> = ids.iter().filter_map(|id| Some((*id, name(*id)?))).collect();
    names.sort();
    names
}

/// This machine's name.
pub fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
