//! What an import must be told explicitly before it does it, and what should be known of it besides.
//!
//! Everything is judged by what is here now and what would be here then, not by what the file says of itself. Where it is not known whether something
//! is worse than now, it counts as worse.

use std::collections::{BTreeMap, BTreeSet};

use keepd_protocol::access::Right;
use keepd_protocol::configuration::Allow;
use serde_json::Value;

use super::values::{place, same, show, step};
use crate::config::{ItemKind, ItemName, Retention, is_common_key, is_secret};
use crate::meta::secrets;

/// The tables of a configuration.
pub type Items = BTreeMap<ItemName, Value>;

/// An item that is written: as it is here now, if it is, and as it becomes.
pub struct Written<'a> {
    pub item: &'a ItemName,
    pub before: Option<&'a Value>,
    pub after: &'a Value,
    /// All items, now and then.
    pub all_before: &'a Items,
    pub all_after: &'a Items,
}

/// How well contents are kept from others' eyes, the worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kept {
    /// Whoever has the files reads them.
    Readable,
    /// This machine's key opens them.
    Sealed,
    /// This machine itself cannot read them back.
    WriteOnly,
}

/// What must be allowed, each with the reason.
pub fn needs(written: &Written<'_>) -> Vec<(Allow, String)> {
    let mut found = Vec::new();
    match written.item.kind {
        ItemKind::Encryption => profile(written, &mut found),
        ItemKind::Destination => destination(written, &mut found),
        ItemKind::Job => job(written, &mut found),
        ItemKind::Settings if written.item.name == "config_backup" => config_backup(written, &mut found),
        _ => {}
    }
    commands(written, &mut found);
    admins(written, &mut found);
    found
}

/// A text of a table.
fn text<'v>(value: &'v Value, key: &str) -> Option<&'v str> {
    value.get(key).and_then(Value::as_str)
}

fn kept_by(profile: Option<&str>, all: &Items) -> Kept {
    match profile {
        None | Some("none") => Kept::Readable,
        Some(name) => match all.get(&ItemName::new(ItemKind::Encryption, name)) {
            Some(profile) if profile.get("public_key").is_some() => Kept::WriteOnly,
            _ => Kept::Sealed,
        },
    }
}

fn kept_at(destination: &str, all: &Items) -> Kept {
    let destination = all.get(&ItemName::new(ItemKind::Destination, destination));
    kept_by(destination.and_then(|value| text(value, "encryption")), all)
}

fn profile(written: &Written<'_>, found: &mut Vec<(Allow, String)>) {
    let Some(before) = written.before else { return };
    if before.get("public_key").is_some() && written.after.get("public_key").is_none() {
        found.push((Allow::WeakerEncryption, "public_key goes: this machine could read back what it writes".into()));
    }
}

/// Options that say who somebody is. They lead nowhere else, also where they are read from a file as secrets are.
const WHO: [&str; 7] = ["access_key_id", "account_name", "application_key_id", "client_id", "email", "user_name", "username"];

/// The options of a destination that are no secrets and are written as one: what they say is not in the table.
pub fn hidden<'v>(item: &ItemName, value: &'v Value) -> Vec<&'v str> {
    if item.kind != ItemKind::Destination || text(value, "service") == Some("exec") {
        return Vec::new();
    }
    let is_hidden = |key: &&str| !is_common_key(key) && !is_secret(key) && !WHO.contains(key);
    keys(value).filter(is_hidden).filter(|key| value.get(*key).is_some_and(Value::is_object)).collect()
}

fn destination(written: &Written<'_>, found: &mut Vec<(Allow, String)>) {
    for key in hidden(written.item, written.after) {
        found.push((Allow::KeyChange, format!("{}: what it says is not in the table, and it is no secret", place(key))));
    }
    let profile = text(written.after, "encryption");
    let now = kept_by(profile, written.all_after);
    let Some(before) = written.before else {
        if now == Kept::Readable {
            found.push((Allow::WeakerEncryption, "encryption = \"none\": whoever has the files reads them".into()));
        }
        return;
    };
    let profile_before = text(before, "encryption");
    let shown = |profile: Option<&str>| show("encryption", &Value::from(profile.unwrap_or("none")));
    if now < kept_by(profile_before, written.all_before) {
        found.push((Allow::WeakerEncryption, format!("encryption {} becomes {}", shown(profile_before), shown(profile))));
    } else if profile != profile_before && profile_before.is_some_and(|p| p != "none") {
        found.push((Allow::KeyChange, format!("encryption {} becomes {}, another key", shown(profile_before), shown(profile))));
    }
    let gone: Vec<&str> = ["server_side_encryption", "encryption_key", "encryption_algorithm", "encryption_customer"]
        .into_iter()
        .flat_map(|word| keys(before).filter(move |key| key.contains(word)))
        .filter(|key| written.after.get(*key).is_none())
        .collect();
    if !gone.is_empty() {
        found.push((Allow::WeakerEncryption, format!("{} goes: the service would no longer encrypt so", gone.join(", "))));
    }
    let is_plain = |value: &Value| match value.get("endpoint") {
        Some(Value::String(text)) => {
            let text = text.trim_start().to_lowercase();
            text.starts_with("http://") || text.starts_with("ftp://")
        }
        other => other.is_some_and(Value::is_object),
    };
    if is_plain(written.after) && !is_plain(before) {
        found.push((Allow::WeakerEncryption, "endpoint: what travels there is no longer encrypted".into()));
    }
    const STRATEGIES: [&str; 3] = ["accept", "add", "strict"];
    let strategy = |value: &Value| match value.get("known_hosts_strategy") {
        Some(Value::Object(_)) => Some(0),
        other => STRATEGIES.iter().position(|s| *s == other.and_then(Value::as_str).unwrap_or("strict").to_lowercase()),
    };
    if text(written.after, "service") == Some("sftp") && strategy(written.after) < strategy(before) {
        found.push((Allow::WeakerEncryption, "known_hosts_strategy: another machine could take the server's place".into()));
    }
    if before.get("ca_file") != written.after.get("ca_file") && written.after.get("ca_file").is_some() {
        found.push((Allow::WeakerEncryption, "ca_file: another authority is trusted to say who the server is".into()));
    }
}

fn keys(value: &Value) -> impl Iterator<Item = &str> {
    value.as_object().into_iter().flat_map(|table| table.keys().map(String::as_str))
}

fn names(value: Option<&Value>, key: &str) -> Vec<String> {
    let list = value.and_then(|v| v.get(key)).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn job(written: &Written<'_>, found: &mut Vec<(Allow, String)>) {
    let (before, after) = (names(written.before, "destinations"), names(Some(written.after), "destinations"));
    let readable: Vec<&str> =
        after.iter().filter(|d| !before.contains(d) && kept_at(d, written.all_after) == Kept::Readable).map(String::as_str).collect();
    let worst = |names: &[String], all: &Items| names.iter().map(|d| kept_at(d, all)).min();
    if !readable.is_empty() {
        let list = readable.join(", ");
        found.push((Allow::WeakerEncryption, format!("destinations: the job's data goes to {list}, which has encryption = \"none\"")));
    } else if written.before.is_some()
        && worst(&before, written.all_before) == Some(Kept::WriteOnly)
        && worst(&after, written.all_after) < Some(Kept::WriteOnly)
    {
        found.push((Allow::WeakerEncryption, "destinations: this machine could read back what it could only write before".into()));
    }
    if written.before.is_some() {
        let profile = |d: &str, all| Items::get(all, &ItemName::new(ItemKind::Destination, d)).and_then(|value| text(value, "encryption"));
        let known: BTreeSet<&str> = before.iter().filter_map(|d| profile(d, written.all_before)).collect();
        let is_other = |d: &&String| profile(d, written.all_after).is_some_and(|p| p != "none" && !known.contains(p));
        let other: Vec<&str> = after.iter().filter(|d| !before.contains(d)).filter(is_other).map(String::as_str).collect();
        if !other.is_empty() {
            let list = other.join(", ");
            found.push((Allow::KeyChange, format!("destinations: the job's data goes to {list}, for other keys than now")));
        }
    }
    tls(written, found);
}

/// How the clients of database servers ask for encryption, server by server.
fn tls(written: &Written<'_>, found: &mut Vec<(Allow, String)>) {
    const MODES: [&str; 6] = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];
    fn servers(value: &Value) -> impl Iterator<Item = (usize, &'static str, &Value)> {
        let sources = value.get("source").and_then(Value::as_array).into_iter().flatten().enumerate();
        sources.flat_map(|(n, source)| ["postgres", "mysql"].into_iter().filter_map(move |kind| Some((n, kind, source.get(kind)?))))
    }
    let mode = |server: &Value| text(server, "sslmode").and_then(|mode| MODES.iter().position(|known| *known == mode));
    let Some(before) = written.before else { return };
    let known: Vec<_> = servers(before).map(|(_, kind, server)| (kind, place_of_server(server), mode(server))).collect();
    for (n, kind, server) in servers(written.after) {
        let here = place_of_server(server);
        let same: Vec<_> = known.iter().filter(|(k, place, _)| *k == kind && *place == here).collect();
        // One that was not asked before: as the strictest of its kind was.
        let old = match same.is_empty() {
            true => known.iter().filter(|(k, ..)| *k == kind).filter_map(|(.., mode)| *mode).max(),
            false => same.iter().filter_map(|(.., mode)| *mode).max(),
        };
        // Without one, it is as if it said "prefer", or less.
        if old.is_some_and(|old| mode(server).unwrap_or(2) < old) {
            found.push((Allow::WeakerEncryption, format!("source[{n}].{kind}.sslmode: the way to the server would be less safe")));
        }
    }
}

/// What says where a database server is.
pub fn place_of_server(server: &Value) -> [Option<&Value>; 3] {
    ["host", "port", "socket"].map(|key| server.get(key))
}

fn config_backup(written: &Written<'_>, found: &mut Vec<(Allow, String)>) {
    let effective = |value: &Value, all: &Items| {
        let at = text(value, "destination").and_then(|d| all.get(&ItemName::new(ItemKind::Destination, d)));
        let profile = text(value, "encryption").or(at.and_then(|d| text(d, "encryption")));
        (profile.map(str::to_owned), kept_by(profile, all))
    };
    let secrets = |value: &Value| value.get("include_secrets").is_some_and(|v| *v != Value::Bool(false));
    let (profile, now) = effective(written.after, written.all_after);
    let old = written.before.map(|before| effective(before, written.all_before));
    if now == Kept::Readable && old.as_ref().is_none_or(|(_, kept)| *kept > Kept::Readable) {
        found.push((Allow::WeakerEncryption, "the configuration is stored with encryption = \"none\"".into()));
    } else if old.as_ref().is_some_and(|(_, kept)| now < *kept) {
        found.push((Allow::WeakerEncryption, "encryption: this machine could read back the configurations it stores".into()));
    }
    if secrets(written.after) {
        let what = "every secret of this machine is stored with its configuration";
        match written.before {
            Some(before) if secrets(before) => {
                if text(before, "destination") != text(written.after, "destination") {
                    found.push((Allow::WeakerEncryption, format!("destination: {what}, elsewhere than now")));
                }
                if old.is_some_and(|(old, _)| old != profile) {
                    found.push((Allow::KeyChange, format!("encryption: {what}, for another key than now")));
                }
            }
            _ => found.push((Allow::WeakerEncryption, format!("include_secrets: {what}"))),
        }
    }
}

/// No item has more programs, and no more are told apart.
const MOST_PROGRAMS: usize = 1000;
/// What is told of them, one by one.
const MOST_TOLD: usize = 30;

/// Where a table has a program started, another machine asked, or something run by a server. What is beneath counts as one.
fn programs<'v>(item: &ItemName, value: &'v Value) -> Vec<(String, &'v Value)> {
    const WORDS: [&str; 17] = [
        "hooks",
        "health",
        "version",
        "schema_version",
        "command",
        "restore_command",
        "shell",
        "run_as",
        "bin_dir",
        "module",
        "url",
        "sql",
        "begin",
        "end",
        "exec",
        "program",
        "script",
    ];
    fn walk<'v>(at: &mut String, value: &'v Value, found: &mut Vec<(String, &'v Value)>) {
        let length = at.len();
        match value {
            _ if found.len() > MOST_PROGRAMS => {}
            Value::Object(table) => {
                for (key, value) in table {
                    step(at, key);
                    match WORDS.contains(&key.as_str()) {
                        true => found.push((at.clone(), value)),
                        false => walk(at, value, found),
                    }
                    at.truncate(length);
                }
            }
            Value::Array(list) => {
                for (n, value) in list.iter().enumerate().filter(|(_, value)| value.is_object() || value.is_array()) {
                    at.push_str(&format!("[{n}]"));
                    walk(at, value, found);
                    at.truncate(length);
                }
            }
            _ => {}
        }
    }
    let mut found = Vec::new();
    walk(&mut String::new(), value, &mut found);
    if item.kind == ItemKind::Job {
        if sees_only_sqlite(value) {
            // There a question can only read.
            found.retain(|(at, _)| at.rsplit('.').next() != Some("sql"));
            found.retain(|(at, value)| !matches!(at.as_str(), "version" | "schema_version") || value.get("sql").is_none());
        }
        let stops = value.get("quiesce").filter(|quiesce| **quiesce == Value::Bool(true));
        found.extend(stops.map(|value| ("quiesce".to_owned(), value)));
        // They are stopped for a restore, too.
        found.extend(value.get("services").map(|value| ("services".to_owned(), value)));
    }
    if item.kind == ItemKind::Destination {
        if text(value, "service") == Some("exec") {
            found.extend(value.get("options").map(|value| ("options".to_owned(), value)));
        }
        // It would be an option of the program that connects.
        let may_be_option = |e: &&Value| e.as_str().map_or(e.is_object(), |e| e.trim_start().starts_with('-') || e.contains("://-"));
        let option = value.get("endpoint").filter(may_be_option);
        found.extend(option.map(|value| ("endpoint".to_owned(), value)));
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

fn sees_only_sqlite(job: &Value) -> bool {
    let sources = job.get("source").and_then(Value::as_array);
    sources.is_some_and(|list| list.iter().all(|source| source.get("postgres").is_none() && source.get("mysql").is_none()))
}

fn commands(written: &Written<'_>, found: &mut Vec<(Allow, String)>) {
    let before = written.before.map(|before| programs(written.item, before)).unwrap_or_default();
    let after = programs(written.item, written.after);
    // Without it, it would be keepd's own user.
    for (at, _) in before.iter().filter(|(at, _)| at.rsplit('.').next() == Some("run_as") && !after.iter().any(|(other, _)| other == at)) {
        let table = at.strip_suffix("run_as").unwrap_or_default();
        let programs =
            ["command", "shell", "restore_command", "bin_dir"].iter().any(|key| after.iter().any(|(at, _)| *at == format!("{table}{key}")));
        if programs || table.ends_with("postgres.") || table.ends_with("mysql.") {
            found.push((Allow::Commands, format!("{at} goes: its programs would run as keepd's own user")));
        }
    }
    let is_many = after.len() > MOST_PROGRAMS;
    let new: Vec<_> = after.into_iter().filter(|(at, value)| !before.iter().any(|(other, old)| other == at && same(old, value))).collect();
    for (at, value) in new.iter().take(MOST_TOLD) {
        found.push((Allow::Commands, format!("{} = {}", place(at), show(at, value))));
    }
    if is_many || new.len() > MOST_TOLD {
        found.push((Allow::Commands, "and more than is shown here".into()));
    }
}

/// Everybody who is named under a key that makes administrators.
fn admins_of(value: &Value) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![(false, value)];
    while let Some((within, value)) = open.pop() {
        match value {
            Value::Object(table) => open.extend(table.iter().map(|(key, value)| {
                let makes = within || key.to_lowercase().contains("admin");
                if within {
                    found.insert(key.clone());
                }
                (makes, value)
            })),
            Value::Array(list) => open.extend(list.iter().map(|value| (within, value))),
            Value::Null => {}
            Value::String(text) if within => drop(found.insert(text.clone())),
            other if within => drop(found.insert(other.to_string())),
            _ => {}
        }
    }
    found
}

/// Who has a right, by a role of the configuration's own, that can be made into all of them, or that changes what is stored or live.
fn powers_of(access: &Value) -> BTreeSet<(String, &'static str)> {
    const POWERS: [Right; 8] = [
        Right::RestoreInPlace,
        Right::ImportBackup,
        Right::Delete,
        Right::Prune,
        Right::JobEdit,
        Right::ConfigExportSecrets,
        Right::ConfigImport,
        Right::KeyManage,
    ];
    let mut found = BTreeSet::new();
    for role in access.get("role").and_then(Value::as_object).into_iter().flat_map(|roles| roles.values()) {
        let list = |key: &str| role.get(key).and_then(Value::as_array).into_iter().flatten();
        let words: Vec<&str> = list("rights").filter_map(Value::as_str).collect();
        for member in list("members") {
            let name = member.as_str().map_or_else(|| member.to_string(), str::to_owned);
            found.extend(POWERS.iter().map(|right| right.word()).filter(|word| words.contains(word)).map(|word| (name.clone(), word)));
        }
    }
    found
}

fn admins(written: &Written<'_>, found: &mut Vec<(Allow, String)>) {
    if !matches!(written.item.kind, ItemKind::Access | ItemKind::Settings) {
        return;
    }
    let before = written.before.map(admins_of).unwrap_or_default();
    let gained: Vec<String> = admins_of(written.after).difference(&before).map(|name| show("", &Value::from(name.as_str()))).collect();
    if !gained.is_empty() {
        found.push((Allow::Admins, format!("{} would get the rights of an administrator", gained.join(", "))));
    }
    let (old, new) = (written.before.map(powers_of).unwrap_or_default(), powers_of(written.after));
    let powers: Vec<String> = new
        .difference(&old)
        .map(|(name, right)| format!("{} would get the right {right}", show("", &Value::from(name.as_str()))))
        .collect();
    if !powers.is_empty() {
        found.push((Allow::Admins, powers.join(", ")));
    }
}

/// What should be known of an overwrite, though it needs nobody's leave.
pub fn notes(written: &Written<'_>) -> Vec<String> {
    let Some(before) = written.before else { return Vec::new() };
    let (after, mut found) = (written.after, Vec::new());
    let on = |value: &Value, key: &str| value.get(key) == Some(&Value::Bool(true));
    let goes = |key: &str| before.get(key).is_some() && after.get(key).is_none();
    match written.item.kind {
        ItemKind::Job => {
            if before.get("enabled") != Some(&Value::Bool(false)) && after.get("enabled") == Some(&Value::Bool(false)) {
                found.push("it is switched off".to_owned());
            }
            let ways = ["schedule", "every", "at"];
            if ways.iter().any(|w| before.get(w).is_some()) && ways.iter().all(|w| after.get(w).is_none()) {
                found.push("it no longer runs by itself".to_owned());
            }
            let gone: Vec<String> =
                names(Some(before), "destinations").into_iter().filter(|d| !names(Some(after), "destinations").contains(d)).collect();
            if !gone.is_empty() {
                found.push(format!("it no longer goes to {}", gone.join(", ")));
            }
            for (key, what) in
                [("max_age", "nobody is told any more when it is overdue"), ("drill", "its backups are no longer proven by drills")]
            {
                if goes(key) {
                    found.push(format!("{key} goes: {what}"));
                }
            }
        }
        ItemKind::Destination => {
            if on(before, "append_only") && !on(after, "append_only") {
                found.push("append_only is turned off: keepd may delete there".to_owned());
            }
            if goes("object_lock") {
                found.push("object_lock is turned off: what is stored from now on can be deleted".to_owned());
            } else if before.get("object_lock").is_some()
                && ["object_lock", "object_lock_mode"].iter().any(|k| before.get(k) != after.get(k))
            {
                found.push("object_lock holds otherwise than now".to_owned());
            }
            if goes("check_every") {
                found.push("check_every goes: what is stored is no longer read to see whether it is whole".to_owned());
            }
            if is_elsewhere(before, after) {
                found.push(
                    "it is another place than now: what is stored at the old one stays there, and is no longer looked after".to_owned(),
                );
            }
        }
        _ => {}
    }
    found.extend(removes_more(before.get("retention"), after.get("retention")));
    found
}

/// Whether a key of a destination says where it is; of keepd's own only these two do.
fn is_place(key: &str) -> bool {
    matches!(key, "service" | "command") || !(is_common_key(key) || key == "default_storage_class")
}

/// Whether a destination becomes another place, whatever secrets it is reached with.
pub fn is_elsewhere(before: &Value, after: &Value) -> bool {
    let all: BTreeSet<&str> = keys(before).chain(keys(after)).collect();
    let is_table = |value: &Value, key: &str| value.get(key).is_some_and(Value::is_object);
    let service = text(after, "service").unwrap_or_default();
    let is_no_place = |key: &str| {
        let tables = [before, after].map(|value| is_table(value, key));
        is_secret(key) || (WHO.contains(&key) && tables == [true; 2]) || (secrets::is_path(service, key) && tables == [false; 2])
    };
    all.into_iter().filter(|key| is_place(key) && !is_no_place(key)).any(|key| before.get(key) != after.get(key))
}

fn removes_more(before: Option<&Value>, after: Option<&Value>) -> Option<String> {
    let after = after?;
    let Some(before) = before else { return Some("retention: backups that are all kept now are removed by it".into()) };
    let less = |rule: &&str| match (before.get(rule), after.get(rule)) {
        (Some(old), Some(new)) => match (old.as_u64(), new.as_u64()) {
            (Some(old), Some(new)) => new < old,
            _ => old != new,
        },
        (Some(_), None) => true,
        _ => false,
    };
    let rules: Vec<String> = Retention::RULES
        .into_iter()
        .filter(less)
        .map(|rule| format!("{rule} {} becomes {}", shown(before.get(rule)), shown(after.get(rule))))
        .collect();
    (!rules.is_empty()).then(|| format!("retention may remove more than now: {}", rules.join(", ")))
}

fn shown(value: Option<&Value>) -> String {
    value.map_or_else(|| "nothing".into(), |value| show("", value))
}
