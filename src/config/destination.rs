//! `[encryption.*]`, `[destination.*]` and retention rules.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::load::Known;
use super::problem::{did_you_mean, looks_like_key, quoted};
use super::reader::{Item, Table};
use super::{
    Bandwidth, Compression, Destination, Encryption, Hours, KeySource, Layout, OptionValue, Rates, Retention, SecretSource, TokenSource,
    Transfer, service, value,
};

/// The directory of a destination on this machine.
pub(super) struct FsRoot<'a> {
    pub destination: &'a str,
    pub path: PathBuf,
    pub item: Item<'a>,
}

pub(super) fn encryption(name: &str, table: &Table<'_>, known: &Known) -> Option<Encryption> {
    if name == "none" {
        table.report("'none' is no name for a profile: in a destination it says that nothing is encrypted");
        return None;
    }
    const WAYS: [&str; 4] = ["key_file", "credential", "passphrase", "pkcs11"];
    table.check_keys(&[&WAYS[..], &["retired", "public_key"]].concat(), &[]);
    let given: Vec<&str> = WAYS.into_iter().filter(|key| table.has(key)).collect();
    let key = match given.as_slice() {
        [] => {
            table.require("key_file", "the path of a file made by 'keepd key generate FILE'");
            return None;
        }
        [way] => key_source(&table.get(way)?, way, known)?,
        more => {
            table.report(format!(
                "must have one key, and has {}; other keys open its repositories after 'keepctl key add'",
                more.join(" and ")
            ));
            return None;
        }
    };
    let retired = match table.get("retired") {
        None => Vec::new(),
        Some(item) => {
            let items = item.list("an array of paths of key files that were used before")?;
            items.iter().map(|item| path_beside(item, known)).collect::<Option<Vec<_>>>()?
        }
    };
    let public_key = match table.get("public_key") {
        None => None,
        Some(item) => Some(key_path(&item, known)?),
    };
    Some(Encryption { name: name.to_owned(), key, retired, public_key })
}

/// Where a profile's key is.
fn key_source(item: &Item<'_>, way: &str, known: &Known) -> Option<KeySource> {
    match way {
        "key_file" => key_path(item, known).map(KeySource::File),
        "credential" => credential(item).map(KeySource::Credential),
        "pkcs11" => token(item, known).map(KeySource::Token),
        _ if item.is_table() => secret(item, known).map(KeySource::Passphrase),
        _ => {
            item.report("is a secret and does not belong into the configuration; give passphrase = { file = \"/path\" }, { credential = \"name\" } or { env = \"NAME\" }");
            None
        }
    }
}

/// `{ module = "/usr/lib/….so", token = "label", key = "label", pin = { file = … } }`
fn token(item: &Item<'_>, known: &Known) -> Option<TokenSource> {
    let table =
        item.table("a table such as { module = \"/usr/lib/module.so\", token = \"label\", key = \"label\", pin = { file = \"/path\" } }")?;
    table.check_keys(&["module", "token", "key", "pin"], &[]);
    let module = table.require("module", "the path of the PKCS#11 library that the token's maker gives").and_then(|i| i.absolute_path());
    let label = |key: &str, why: &str| {
        table.require(key, why).and_then(|item| {
            let text = item.text(why)?;
            if text.is_empty() {
                item.report(format!("must be {why}"));
                return None;
            }
            Some(text.to_owned())
        })
    };
    let (name, key) = (label("token", "the token's label or serial number"), label("key", "the label of an AES-256 key in the token"));
    let pin = table.optional(
        "pin",
        |item| {
            if !item.is_table() {
                item.report("is a secret and does not belong into the configuration; give pin = { file = \"/path\" }, { credential = \"name\" } or { env = \"NAME\" }");
                return None;
            }
            secret(item, known).map(Some)
        },
        None,
    );
    Some(TokenSource { module: module?, token: name?, key: key?, pin: pin? })
}

/// The path of a key file, where people may give the key itself.
fn key_path(item: &Item<'_>, known: &Known) -> Option<PathBuf> {
    let text = item.text("the path of a key file")?;
    if looks_like_key(text) {
        item.report("is the path of a key file, not the key itself; put the key in a file of its own, away from the configuration");
        return None;
    }
    path_beside(item, known)
}

/// The name of a credential of the service manager.
fn credential(item: &Item<'_>) -> Option<String> {
    let name = item.text("the name of a credential of the service manager")?;
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        item.report("must be the name of a credential, no path");
        return None;
    }
    Some(name.to_owned())
}

/// Keys that every destination has, whatever its service.
const COMMON: [&str; 13] = [
    "service",
    "layout",
    "encryption",
    "compression",
    "retention",
    "max_age",
    "prune_grace",
    "check_every",
    "bandwidth",
    "timeout",
    "retry",
    "concurrency",
    "append_only",
];

/// Keys that only S3 has a use for.
const LOCK: [&str; 2] = ["object_lock", "object_lock_mode"];

/// Whether a key of a destination is keepd's own, and no option of its service.
pub fn is_common_key(key: &str) -> bool {
    COMMON.contains(&key) || LOCK.contains(&key) || matches!(key, "ca_file" | "command")
}

/// The destination unless something is wrong with it, and its directory as far as it is known.
pub(super) fn destination<'a>(name: &'a str, table: &Table<'a>, known: &Known) -> (Option<Destination>, Option<FsRoot<'a>>) {
    let service = table.require("service", "where it is, for instance \"fs\", \"s3\" or \"sftp\"");
    let Some((item, service)) = service.and_then(|item| item.text("a service's name").map(|text| (item, text))) else {
        let _ = common(name, table, known);
        return (None, None);
    };
    if service == "exec" {
        return (exec(name, table, known), None);
    }
    let Some(options) = service::options(service) else {
        let (names, given) = (service::names(), quoted(service));
        let allowed = names.iter().chain(&["exec"]).map(|n| format!("\"{n}\"")).collect::<Vec<_>>().join(", ");
        if service::MORE.contains(&service) {
            let how = "it is built with cargo's feature services-more";
            item.report(format!("service {given} is known, but not in this build of keepd ({how}); allowed are {allowed}"));
        } else {
            let guess = did_you_mean(service, names.iter().copied().chain(service::MORE));
            item.report(format!("there is no service {given}; allowed are {allowed}{guess}"));
        }
        // What its options would be is not known here.
        let _ = common(name, table, known);
        return (None, None);
    };
    let (lock, no_lock): (&[&str], &[&str]) = if service == "s3" { (&LOCK, &[]) } else { (&[], &LOCK) };
    let mut keys: Vec<&str> = [&COMMON, lock].concat();
    if !matches!(service, "fs" | "sftp" | "ftp") {
        keys.push("ca_file");
    }
    keys.extend(&options);
    table.check_keys(&keys, &[(no_lock, "only S3 knows object lock; append_only = true keeps keepd from deleting anywhere")]);
    let common = common(name, table, known);
    if service == "fs" {
        let root = table.require("root", "the directory of the repository, an absolute path").and_then(|item| {
            let path = item.absolute_path()?;
            if path.parent().is_none() {
                item.report("must be a directory of its own, not '/'");
                return None;
            }
            Some(FsRoot { destination: name, path, item })
        });
        let destination = common.and_then(|common| {
            let root = root.as_ref()?.path.to_str()?;
            Some(Destination { service: "fs".into(), options: BTreeMap::from([("root".to_owned(), root.into())]), ..common })
        });
        return (destination, root);
    }
    let found = read_options(table.items().filter(|(key, _)| options.contains(key)), known);
    let mut good = found.is_some();
    if good && service == "s3" && table.has("object_lock") {
        for key in ["access_key_id", "secret_access_key"] {
            good &= table
                .require(key, "object_lock needs it, for OpenDAL does not know object lock and keepd signs these requests itself")
                .is_some();
        }
    }
    if let Some(found) = found.as_ref().filter(|_| good && table.is_whole()) {
        let values = found.iter().map(|(key, value)| (key.clone(), value.plain().map(str::to_owned))).collect();
        if let Err(text) = service::check(service, &values) {
            table.report(format!("cannot be opened so: {text}"));
            good = false;
        }
    }
    let destination = common.filter(|_| good).zip(found);
    (destination.map(|(common, options)| Destination { service: service.to_owned(), options, ..common }), None)
}

/// The values of options, when all of them are right; each that is not is noted.
fn read_options<'a>(items: impl Iterator<Item = (&'a str, Item<'a>)>, known: &Known) -> Option<BTreeMap<String, OptionValue>> {
    let read: Vec<_> = items.map(|(key, item)| Some((key.to_owned(), option(key, &item, known)?))).collect();
    read.into_iter().collect()
}

/// A value of a service's option.
fn option(key: &str, item: &Item<'_>, known: &Known) -> Option<OptionValue> {
    if item.is_table() {
        return secret(item, known).map(OptionValue::Secret);
    }
    if service::is_secret(key) {
        item.report(format!(
            "is a secret and does not belong into the configuration; give {key} = {{ file = \"/path\" }}, {{ credential = \"name\" }} or {{ env = \"NAME\" }}"
        ));
        return None;
    }
    let text = item.scalar("a string, a number, true or false")?;
    let host = text.split_once("://").map_or(text.as_str(), |(_, rest)| rest);
    if key == "endpoint" && host.rsplit_once('@').is_some_and(|(user, _)| user.contains(':')) {
        item.report("holds a password, which does not belong into the configuration; give it as an option of its own, { file = … }");
        return None;
    }
    Some(OptionValue::Plain(text))
}

/// `{ file = … }`, `{ credential = … }` or `{ env = … }`.
pub(super) fn secret(item: &Item<'_>, known: &Known) -> Option<SecretSource> {
    const WAYS: [&str; 3] = ["file", "credential", "env"];
    let table = item.table("a table such as { file = \"/path\" }")?;
    table.check_keys(&WAYS, &[]);
    let given: Vec<&str> = WAYS.into_iter().filter(|key| table.has(key)).collect();
    let [way] = given.as_slice() else {
        item.report("must have exactly one of file, credential and env");
        return None;
    };
    let value = table.get(way)?;
    match *way {
        "file" => path_beside(&value, known).map(SecretSource::File),
        "credential" => credential(&value).map(SecretSource::Credential),
        _ => {
            let name = value.text("the name of an environment variable")?;
            if name.is_empty() || name.contains(['=', '\0']) {
                value.report("must be the name of an environment variable");
                return None;
            }
            Some(SecretSource::Environment(name.to_owned()))
        }
    }
}

/// A path that may be relative to the main file, also when it stands in a drop-in.
fn path_beside(item: &Item<'_>, known: &Known) -> Option<PathBuf> {
    let text = item.text("a path")?;
    if text.is_empty() || text.starts_with(['/', '~']) {
        return item.absolute_path();
    }
    let joined = known.directory.join(text);
    match joined.to_str().map(value::absolute_path) {
        Some(Ok(path)) => Some(path),
        Some(Err(why)) => {
            item.report(format!("{} {why}", quoted(text)));
            None
        }
        None => Some(joined),
    }
}

/// `service = "exec"`: a plugin.
fn exec(name: &str, table: &Table<'_>, known: &Known) -> Option<Destination> {
    table.check_keys(&[&COMMON[..], &["command", "options"]].concat(), &[]);
    let common = common(name, table, known);
    let command = table.require("command", "the plugin's program and its arguments, such as [\"/usr/local/bin/plugin\", \"--fast\"]");
    let command = command.and_then(|item| {
        let words = item.list("an array: the program and its arguments")?;
        let words = words.iter().map(|word| word.text("a string").map(str::to_owned)).collect::<Option<Vec<_>>>()?;
        match words.first() {
            Some(program) if program.starts_with('/') => Some(words),
            _ => {
                item.report("must begin with the absolute path of a program");
                None
            }
        }
    });
    let told = |item: &Item<'_>| read_options(item.table("a table of what the plugin is told")?.items(), known);
    let options = table.optional("options", told, BTreeMap::new());
    Some(Destination { service: "exec".into(), options: options?, command: command?, ..common? })
}

/// What every destination has, whatever its service.
fn common(name: &str, table: &Table<'_>, known: &Known) -> Option<Destination> {
    let plain = Destination::plain(name, "", BTreeMap::new());
    let encryption = if known.is_rescue {
        // It is given keys on the command line.
        Some(None)
    } else {
        table
            .require("encryption", "the name of an [encryption.*] table, or \"none\" to store everything readable by whoever has the files")
            .and_then(|item| profile(&item, known))
    };
    let layouts = [("repository", Layout::Repository), ("archive", Layout::Archive)];
    let layout = table.optional("layout", |item| item.word(&layouts), Layout::Repository);
    let fits = layout != Some(Layout::Archive) || fits_archives(table);
    let words = [("zstd", Compression::Zstd), ("gzip", Compression::Gzip), ("none", Compression::None)];
    let compression = table.optional("compression", |item| item.word(&words), Compression::Zstd);
    let retention = table.optional("retention", |item| retention(item).map(Some), None);
    let prune_grace = table.optional("prune_grace", |item| item.duration(Duration::ZERO), plain.prune_grace);
    let check_every = table.optional("check_every", |item| item.duration(Duration::from_secs(1)).map(Some), None);
    let max_age = table.optional("max_age", |item| item.duration(Duration::from_secs(1)).map(Some), None);
    let append_only = table.optional("append_only", Item::boolean, false);
    let object_lock = table.optional("object_lock", |item| item.duration(Duration::from_secs(86_400)).map(Some), None);
    let modes = [("governance", false), ("compliance", true)];
    let compliance_lock = table.optional("object_lock_mode", |item| item.word(&modes), false);
    let transfer = transfer(table, known);
    if !fits {
        return None;
    }
    Some(Destination {
        layout: layout?,
        encryption: encryption?,
        compression: compression?,
        retention: retention?,
        prune_grace: prune_grace?,
        check_every: check_every?,
        max_age: max_age?,
        append_only: append_only?,
        object_lock: object_lock?,
        compliance_lock: compliance_lock?,
        transfer: transfer?,
        ..plain
    })
}

/// Whether nothing is said of a destination of archives that has no sense there.
fn fits_archives(table: &Table<'_>) -> bool {
    const WITHOUT: [(&str, &str); 4] = [
        ("prune_grace", "has no use with layout = \"archive\": a backup is one file, and is gone when that is removed"),
        (
            "check_every",
            "does not go with layout = \"archive\": there are no packs to read a few at a time; a calendar can run 'keepctl check NAME --read-data'",
        ),
        (
            "object_lock",
            "does not go with layout = \"archive\" yet: leave it out, or let the bucket's own default lock what is written to it",
        ),
        ("object_lock_mode", "does not go with layout = \"archive\" yet"),
    ];
    let mut good = true;
    for (key, why) in WITHOUT {
        if let Some(item) = table.get(key) {
            item.report(why);
            good = false;
        }
    }
    let service = table.get("service").and_then(|item| item.text("a service's name"));
    let why = match service {
        Some("exec") => "a plugin is told the size of an object before its bytes, and an archive's is not known before it is written",
        Some("ftp") => "ftp reads every object from its start, and an archive is read in pieces",
        _ => return good,
    };
    if let Some(item) = table.get("layout") {
        item.report(format!(
            "\"archive\" does not go with service = {}: {why}; leave layout out there",
            quoted(service.unwrap_or_default())
        ));
    }
    false
}

fn transfer(table: &Table<'_>, known: &Known) -> Option<Transfer> {
    let usual = Transfer::default();
    let bandwidth = table.optional("bandwidth", bandwidth, usual.bandwidth);
    let timeout = table.optional("timeout", |item| item.duration(Duration::from_secs(1)), usual.timeout);
    let retry = table.optional("retry", |item| super::job::retry(item, &usual.retry), usual.retry.clone());
    let concurrency = table.optional("concurrency", |item| item.number(1..=64).map(|n| n as usize), usual.concurrency);
    let ca_file = table.optional("ca_file", |item| path_beside(item, known).map(Some), None);
    Some(Transfer { bandwidth: bandwidth?, timeout: timeout?, retry: retry?, concurrency: concurrency?, ca_file: ca_file? })
}

/// `"20MiB/s"`, or `{ up = …, down = …, hours = [{ from = "08:00", to = "18:00", up = … }] }`.
fn bandwidth(item: &Item<'_>) -> Option<Bandwidth> {
    if !item.is_table() {
        let rate = Some(rate(item)?);
        return Some(Bandwidth { rates: Rates { up: rate, down: rate }, hours: Vec::new() });
    }
    let table = item.table("a rate such as \"20MiB/s\"")?;
    table.check_keys(&["up", "down", "hours"], &[]);
    let usual = rates(&table);
    let mut hours = Some(Vec::new());
    if let Some(list) = table.get("hours") {
        for item in list.list("an array of tables such as { from = \"08:00\", to = \"18:00\", up = \"2MiB/s\" }")? {
            let one = (|| {
                let table = item.table("a table such as { from = \"08:00\", to = \"18:00\", up = \"2MiB/s\" }")?;
                table.check_keys(&["from", "to", "up", "down"], &[]);
                let from = table.require("from", "the time of the day from which on it holds").and_then(|i| time_of_day(&i));
                let to = table.require("to", "the time of the day at which it ends").and_then(|i| time_of_day(&i));
                Some(Hours { rates: rates(&table)?, from: from?, to: to? })
            })();
            hours = hours.zip(one).map(|(mut hours, one)| {
                hours.push(one);
                hours
            });
        }
    }
    Some(Bandwidth { rates: usual?, hours: hours? })
}

fn rates(table: &Table<'_>) -> Option<Rates> {
    let up = table.optional("up", |item| rate(item).map(Some), None);
    let down = table.optional("down", |item| rate(item).map(Some), None);
    Some(Rates { up: up?, down: down? })
}

/// Bytes a second: a size, with or without `/s`.
fn rate(item: &Item<'_>) -> Option<u64> {
    const WANTED: &str = "a rate such as \"20MiB/s\"";
    let text = item.text(WANTED)?;
    match value::size(text.strip_suffix("/s").unwrap_or(text)) {
        Ok(rate) if rate >= 1024 => Some(rate),
        Ok(_) => {
            item.report(format!("{} is less than 1KiB/s", quoted(text)));
            None
        }
        Err(why) => {
            item.report(format!("{} is no rate: {why}; allowed is {WANTED}", quoted(text)));
            None
        }
    }
}

fn time_of_day(item: &Item<'_>) -> Option<jiff::civil::Time> {
    let text = item.text("a time of the day such as \"08:00\"")?;
    let time = jiff::civil::Time::strptime("%H:%M", text);
    time.map_err(|_| item.report(format!("{} is no time of the day such as \"08:00\"", quoted(text)))).ok()
}

/// `Some(None)` is the word `"none"`.
pub(super) fn profile(item: &Item<'_>, known: &Known) -> Option<Option<String>> {
    let name = item.text("the name of an [encryption.*] table, or \"none\"")?;
    if name == "none" {
        return Some(None);
    }
    if known.encryption.contains(name) {
        return Some(Some(name.to_owned()));
    }
    if known.whole {
        let names = known.encryption.iter().map(String::as_str);
        let allowed = names.clone().chain(["\"none\""]).collect::<Vec<_>>().join(", ");
        let guess = did_you_mean(name, names.chain(["none"]));
        item.report(format!("there is no encryption profile {}; allowed are {allowed}{guess}", quoted(name)));
    }
    None
}

/// A table of rules, at least one.
pub(super) fn retention(item: &Item<'_>) -> Option<Retention> {
    let rules = Retention::RULES;
    let table = item.table("a table of rules such as { keep_daily = 7, keep_monthly = 6 }")?;
    if table.is_empty() {
        item.report(format!(
            "is empty; allowed are {} (at least one of them), or leave 'retention' out to keep every backup",
            rules.join(", ")
        ));
        return None;
    }
    table.check_keys(&rules, &[]);
    let mut good = true;
    let mut numbers = BTreeMap::new();
    for name in rules {
        let Some(item) = table.get(name) else { continue };
        let number = match name {
            "keep_within" => item.duration(Duration::from_secs(1)).map(|d| d.as_secs()),
            _ => item.number(1..=u64::from(u32::MAX)),
        };
        good &= number.is_some();
        numbers.extend(number.map(|n| (name.to_owned(), n)));
    }
    if !good || numbers.is_empty() {
        // One with unknown keys only is no policy to keep everything.
        return None;
    }
    Retention::from_numbers(&numbers).map_err(|text| item.report(text)).ok()
}
