//! What head and tail of an archive may say at most, wherever the archive is read: nothing of it is believed before. A head that says more is not written either.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::file_list::shown;
use super::head::{Contents, HEAD_NAME, Head, Source, TAIL_NAME, Tail};
use super::{PortableError, Result};

/// Of a text of the backup, in bytes.
const MAX_TEXT: usize = 4 << 10;
/// Of a message, in bytes: it may have the output of a program in it.
const MAX_MESSAGE: usize = 64 << 10;
const MAX_MESSAGES: usize = 1000;
/// Of a place, in bytes, also where it is a server with all its databases.
const MAX_PLACE: usize = 64 << 10;
/// Of the name of a user or group, in bytes.
const MAX_NAME: usize = 256;
const MAX_LABELS: usize = 100;
/// Users, and groups.
const MAX_OWNERS: usize = 65_536;

fn wrong(of: &str, text: String) -> PortableError {
    PortableError::Hostile(format!("{of} of the archive is not one that keepd makes: {text}"))
}

fn is_text(of: &str, what: &str, text: &str, most: usize) -> Result<()> {
    match text.len() > most {
        true => Err(wrong(of, format!("its {what} has {} bytes; {most} are the most", text.len()))),
        false => Ok(()),
    }
}

fn is_count(of: &str, what: &str, count: usize, most: usize) -> Result<()> {
    match count > most {
        true => Err(wrong(of, format!("it has {count} {what}; {most} are the most"))),
        false => Ok(()),
    }
}

fn is_time(of: &str, what: &str, time: &str) -> Result<()> {
    match time.parse::<Timestamp>() {
        Ok(_) => Ok(()),
        Err(_) => Err(wrong(of, format!("{}, its time '{what}', is no time", shown(time.as_bytes())))),
    }
}

pub fn check_head(head: &Head) -> Result<()> {
    let (of, origin) = (HEAD_NAME, &head.origin);
    let is_id = origin.backup.len() == 64 && origin.backup.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if !is_id {
        return Err(wrong(of, format!("{} is no id of a backup", shown(origin.backup.as_bytes()))));
    }
    if !crate::config::is_name(&origin.job) {
        return Err(wrong(of, format!("{} is no name of a job", shown(origin.job.as_bytes()))));
    }
    is_time(of, "created", &head.created)?;
    is_time(of, "started", &origin.started)?;
    if head.contents == Contents::First || !origin.finished.is_empty() {
        is_time(of, "finished", &origin.finished)?;
    }
    for (what, text) in [
        ("version of keepd", &head.keepd_version),
        ("run", &origin.run),
        ("host", &origin.host),
        ("version of keepd", &origin.keepd_version),
        ("type", &origin.r#type),
        ("outcome", &origin.outcome),
    ] {
        is_text(of, what, text, MAX_TEXT)?;
    }
    for (what, text) in [("name", &origin.name), ("description", &origin.description)] {
        is_text(of, what, text.as_deref().unwrap_or_default(), MAX_TEXT)?;
    }
    is_count(of, "labels", origin.labels.len(), MAX_LABELS)?;
    for (name, value) in &origin.labels {
        is_text(of, "label", name, MAX_TEXT)?;
        is_text(of, "label", value, MAX_TEXT)?;
    }
    check_common(of, &head.sources, &head.users, &head.groups, &head.messages, [&origin.version, &origin.schema_version])
}

pub fn check_tail(tail: &Tail) -> Result<()> {
    is_time(TAIL_NAME, "finished", &tail.finished)?;
    is_text(TAIL_NAME, "outcome", &tail.outcome, MAX_TEXT)?;
    check_common(TAIL_NAME, &tail.sources, &tail.users, &tail.groups, &tail.messages, [&tail.version, &tail.schema_version])
}

fn check_common(
    of: &str,
    sources: &[Source],
    users: &BTreeMap<u32, String>,
    groups: &BTreeMap<u32, String>,
    messages: &[(String, String)],
    versions: [&Option<String>; 2],
) -> Result<()> {
    for version in versions {
        is_text(of, "version", version.as_deref().unwrap_or_default(), MAX_TEXT)?;
    }
    for source in sources {
        is_text(of, "kind of a source", &source.kind, MAX_NAME)?;
        is_text(of, "place of a source", &source.place.path, MAX_PLACE)?;
        is_text(of, "place of a source", source.place.base64.as_deref().unwrap_or_default(), MAX_PLACE)?;
    }
    for (what, names) in [("users", users), ("groups", groups)] {
        is_count(of, what, names.len(), MAX_OWNERS)?;
        names.values().try_for_each(|name| is_text(of, "name of a user or group", name, MAX_NAME))?;
    }
    is_count(of, "messages", messages.len(), MAX_MESSAGES)?;
    messages.iter().try_for_each(|(level, text)| {
        is_text(of, "level of a message", level, MAX_NAME)?;
        is_text(of, "message", text, MAX_MESSAGE)
    })
}
