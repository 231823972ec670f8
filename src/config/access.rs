//! `[access]`: who may do what. Whether the users and groups are there is not looked at here: they may come from a server that is away now.

use std::collections::BTreeSet;

use super::problem::quoted;
use super::reader::{Item, Table};
use super::value::is_name;
use super::{Access, AccessLimits, AccessRole, Member};
use crate::access::{BUILTIN, Right};

const WANTED: &str = "an array of users, groups and numeric ids such as [\"alice\", \"@wheel\", 1000, \"@1000\"]";
/// The kernel's "no such id" is no id.
const LARGEST_ID: u64 = u32::MAX as u64 - 1;
/// A name of a user or a group, in bytes.
const LONGEST_NAME: usize = 256;
/// Connections of one user; the control socket takes twice as many in all.
pub(super) const MOST_CONNECTIONS: u64 = 512;
/// As many as there can be runs at all.
const MOST_RUNS: u64 = 64;
const MOST_CALLS: u64 = 100_000;

/// Reads the table; everything in it has a default. `jobs`: the names that a role may be limited to, None where not all files could be made out.
pub(super) fn access(table: &Table<'_>, jobs: Option<&BTreeSet<String>>) -> Option<Access> {
    table.check_keys(&["admin", "operator", "viewer", "role", "limits"], &[]);
    let [admin, operator, viewer] = BUILTIN.map(|(name, _)| table.optional(name, members, Vec::new()));
    let mut complete = true;
    let mut roles = Vec::new();
    if let Some(item) = table.get("role") {
        let outer = item.table("tables such as [access.role.NAME]");
        complete &= outer.is_some();
        for (name, item) in outer.iter().flat_map(Table::items) {
            match item.table("a table: [access.role.NAME]").and_then(|table| role(name, &table, jobs)) {
                Some(role) => roles.push(role),
                None => complete = false,
            }
        }
    }
    let limits = match table.get("limits") {
        Some(item) => item.table("a table: [access.limits]").and_then(|table| limits(&table)),
        None => Some(AccessLimits::default()),
    };
    roles.sort_by(|a, b| a.name.cmp(&b.name));
    let access = Access { admin: admin?, operator: operator?, viewer: viewer?, roles, limits: limits? };
    complete.then_some(access)
}

fn role(name: &str, table: &Table<'_>, jobs: Option<&BTreeSet<String>>) -> Option<AccessRole> {
    table.check_keys(&["members", "rights", "jobs"], &[]);
    let mut complete = true;
    if BUILTIN.iter().any(|(builtin, _)| *builtin == name) {
        table.report(format!(
            "{name} is a role that keepd has; its members stand in access.{name}, and a role of your own has another name"
        ));
        complete = false;
    } else if !is_name(name) {
        let text = "is no name; allowed are letters, digits and . _ - (a letter or digit first), at most 64 of them";
        table.report(format!("{} {text}", quoted(name)));
        complete = false;
    }
    let members = table.require("members", "who has this role, such as [\"@deployers\"]").and_then(|item| members(&item));
    let words: Vec<(&str, Right)> = Right::ALL.iter().map(|(right, word)| (*word, *right)).collect();
    let rights = table.require("rights", "what the role may do, such as [\"view\", \"backup\"]").and_then(|item| {
        let list = item.list("an array of rights such as [\"view\", \"backup\"]")?;
        if list.is_empty() {
            item.report("is empty; a role without a right is nothing, so name at least one");
            return None;
        }
        let found: Vec<Option<Right>> = list.iter().map(|item| item.word(&words)).collect();
        let found: BTreeSet<Right> = found.into_iter().collect::<Option<_>>()?;
        Some(found.into_iter().collect::<Vec<_>>())
    });
    let limited = match table.get("jobs") {
        None => Some(None),
        Some(item) => names_of_jobs(&item, jobs).map(Some),
    };
    let role = AccessRole { name: name.to_owned(), members: members?, rights: rights?, jobs: limited? };
    complete.then_some(role)
}

fn names_of_jobs(item: &Item<'_>, jobs: Option<&BTreeSet<String>>) -> Option<Vec<String>> {
    let list = item.list("an array of names of jobs such as [\"shop\"]")?;
    if list.is_empty() {
        item.report("is empty; name at least one job, or leave 'jobs' out for all of them");
        return None;
    }
    let mut found = BTreeSet::new();
    let mut complete = true;
    for item in &list {
        match item.text("the name of a job") {
            Some(name) if jobs.is_some_and(|jobs| !jobs.contains(name)) => {
                let known = jobs.into_iter().flatten().map(String::as_str);
                let guess = super::did_you_mean(name, known);
                item.report(format!("there is no job {}{guess}", quoted(name)));
                complete = false;
            }
            Some(name) => drop(found.insert(name.to_owned())),
            None => complete = false,
        }
    }
    complete.then(|| found.into_iter().collect())
}

fn limits(table: &Table<'_>) -> Option<AccessLimits> {
    table.check_keys(&["connections", "runs", "calls_per_second"], &[]);
    let default = AccessLimits::default();
    let number = |key: &str, most: u64, default: usize| {
        table.optional(key, |item| item.number(1..=most).and_then(|n| usize::try_from(n).ok()), default)
    };
    let connections = number("connections", MOST_CONNECTIONS, default.connections);
    let runs = number("runs", MOST_RUNS, default.runs);
    let calls = number("calls_per_second", MOST_CALLS, default.calls_per_second as usize).and_then(|n| u32::try_from(n).ok());
    Some(AccessLimits { connections: connections?, runs: runs?, calls_per_second: calls? })
}

fn members(item: &Item<'_>) -> Option<Vec<Member>> {
    let list = item.list(WANTED)?;
    let found: Vec<Option<Member>> = list.iter().map(member).collect();
    let mut members: Vec<Member> = Vec::new();
    for member in found.into_iter().collect::<Option<Vec<_>>>()? {
        if !members.contains(&member) {
            members.push(member);
        }
    }
    Some(members)
}

fn member(item: &Item<'_>) -> Option<Member> {
    let text = item.scalar("a user, a group such as \"@wheel\", or a numeric id")?;
    // What was meant by a bare true is nobody.
    if matches!(text.as_str(), "true" | "false") {
        item.report(format!("{text} is neither a user nor a group; write \"alice\", \"@wheel\", or a numeric id"));
        return None;
    }
    match parse_member(&text) {
        Ok(member) => Some(member),
        Err(why) => {
            item.report(format!("{} {why}", quoted(&text)));
            None
        }
    }
}

/// A member as it is written: `alice`, `@wheel`, `1000`, `@1000`.
fn parse_member(text: &str) -> Result<Member, String> {
    let (is_group, name) = text.strip_prefix('@').map_or((false, text), |name| (true, name));
    if name.is_empty() {
        return Err("names nobody; write a user, a group such as \"@wheel\", or a numeric id".into());
    }
    if name.bytes().all(|b| b.is_ascii_digit()) {
        let id = name.parse::<u64>().ok().filter(|id| *id <= LARGEST_ID).and_then(|id| u32::try_from(id).ok());
        let id = id.ok_or_else(|| format!("is no numeric id; they go from 0 to {LARGEST_ID}"))?;
        return Ok(if is_group { Member::Gid(id) } else { Member::Uid(id) });
    }
    if let Some(group) = name.strip_prefix('%') {
        return Err(format!("is not how a group is written here; write \"@{group}\""));
    }
    // What no directory service has: names with a space ("domain users"), @ and \ do occur.
    let is_odd = |c: char| c.is_control() || c == ':' || c == ',' || c == '/';
    if name.starts_with(['-', '#', '@', ' ']) || name.ends_with(' ') || name.contains(is_odd) || name.len() > LONGEST_NAME {
        return Err("is no name of a user or a group; write \"alice\", \"@wheel\", or a numeric id".into());
    }
    Ok(if is_group { Member::Group(name.to_owned()) } else { Member::User(name.to_owned()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_read_as_they_are_meant() {
        let user = |name: &str| Ok(Member::User(name.into()));
        for (text, wanted) in [
            ("alice", user("alice")),
            ("alice@example.org", user("alice@example.org")),
            ("EXAMPLE\\alice", user("EXAMPLE\\alice")),
            ("@domain users", Ok(Member::Group("domain users".into()))),
            ("1000", Ok(Member::Uid(1000))),
            ("@0", Ok(Member::Gid(0))),
            ("0x10", user("0x10")),
        ] {
            assert_eq!(parse_member(text), wanted, "{text}");
        }
        for text in ["", "@", "%wheel", "@%wheel", "4294967295", "@99999999999999999999", "-a", "a:b", "a\nb", " a", "a ", "@@a", "a,b"] {
            assert!(parse_member(text).is_err(), "{text}");
        }
        for member in [Member::User("alice".into()), Member::Group("wheel".into()), Member::Uid(7), Member::Gid(7)] {
            assert_eq!(parse_member(&member.to_string()), Ok(member));
        }
    }
}
