//! `[encryption.*]`, `[destination.*]` and retention rules.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::load::Known;
use super::problem::{did_you_mean, looks_like_key, quoted};
use super::reader::{Item, NOT_BUILT, Table};
use super::{Compression, Destination, Encryption, KeySource, Retention, value};

/// Services OpenDAL knows. Of these only `fs` is built in so far.
const SERVICES: [&str; 28] = [
    "fs",
    "aliyun_drive",
    "alluxio",
    "azblob",
    "azdls",
    "azfile",
    "b2",
    "cos",
    "dropbox",
    "ftp",
    "gcs",
    "gdrive",
    "hdfs",
    "hdfs_native",
    "http",
    "koofr",
    "memory",
    "obs",
    "onedrive",
    "oss",
    "pcloud",
    "s3",
    "seafile",
    "sftp",
    "swift",
    "upyun",
    "webdav",
    "webhdfs",
];

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
    table.check_keys(&["key_file"], &[(&["credential", "pkcs11"], NOT_BUILT)]);
    if !table.has("key_file") && (table.has("credential") || table.has("pkcs11")) {
        return None;
    }
    let item = table.require("key_file", "the path of a file made by 'keepd key generate FILE'")?;
    let text = item.text("the path of a key file")?;
    if looks_like_key(text) {
        item.report("is the path of a key file, not the key itself; put the key in a file of its own, away from the configuration");
        return None;
    }
    let path = if text.is_empty() || text.starts_with(['/', '~']) {
        item.absolute_path()?
    } else {
        // Relative to the main file, also when it stands in a drop-in.
        let joined = known.directory.join(text);
        match joined.to_str().map(value::absolute_path) {
            Some(Ok(path)) => path,
            Some(Err(why)) => {
                item.report(format!("{} {why}", quoted(text)));
                return None;
            }
            None => joined,
        }
    };
    Some(Encryption { name: name.to_owned(), key: KeySource::File(path) })
}

/// The destination unless something is wrong with it, and its directory as far as it is known.
pub(super) fn destination<'a>(name: &'a str, table: &Table<'a>, known: &Known) -> (Option<Destination>, Option<FsRoot<'a>>) {
    let service = table.require("service", "where it is; allowed is \"fs\"");
    let service = service.and_then(|item| item.text("a service's name").map(|text| (item, text)));
    if let Some((item, other)) = service.as_ref().filter(|(_, s)| *s != "fs") {
        if SERVICES.contains(other) {
            item.report(format!("service {} is known, but not built into this version of keepd; allowed is \"fs\"", quoted(other)));
        } else {
            item.report(format!("there is no service {}; allowed is \"fs\"{}", quoted(other), did_you_mean(other, SERVICES)));
        }
        // What its options would be is not known here.
        let _ = common(table, known);
        return (None, None);
    }
    table.check_keys(
        &["service", "root", "encryption", "compression", "retention", "prune_grace", "check_every"],
        &[(&["bandwidth"], NOT_BUILT)],
    );
    let root = table.require("root", "the directory of the repository, an absolute path").and_then(|item| {
        let path = item.absolute_path()?;
        if path.parent().is_none() {
            item.report("must be a directory of its own, not '/'");
            return None;
        }
        Some(FsRoot { destination: name, path, item })
    });
    let common = common(table, known);
    let destination = (|| {
        let (encryption, compression, retention, prune_grace, check_every) = common?;
        let root = root.as_ref()?.path.to_str()?.to_owned();
        service?;
        Some(Destination {
            name: name.to_owned(),
            service: "fs".into(),
            options: BTreeMap::from([("root".to_owned(), root)]),
            encryption,
            compression,
            retention,
            prune_grace,
            check_every,
        })
    })();
    (destination, root)
}

type Common = (Option<String>, Compression, Option<Retention>, Duration, Option<Duration>);

const DEFAULT_GRACE: Duration = Duration::from_secs(86_400);

/// What every destination has, whatever its service.
fn common(table: &Table<'_>, known: &Known) -> Option<Common> {
    let encryption = table
        .require("encryption", "the name of an [encryption.*] table, or \"none\" to store everything readable by whoever has the files")
        .and_then(|item| profile(&item, known));
    let compression = match table.get("compression") {
        Some(item) => item.word(&[("zstd", Compression::Zstd), ("gzip", Compression::Gzip), ("none", Compression::None)]),
        None => Some(Compression::Zstd),
    };
    let retention = match table.get("retention") {
        Some(item) => retention(&item).map(Some),
        None => Some(None),
    };
    let grace = match table.get("prune_grace") {
        Some(item) => item.duration(Duration::ZERO),
        None => Some(DEFAULT_GRACE),
    };
    let check_every = match table.get("check_every") {
        Some(item) => item.duration(Duration::from_secs(1)).map(Some),
        None => Some(None),
    };
    Some((encryption?, compression?, retention?, grace?, check_every?))
}

/// `Some(None)` is the word `"none"`.
fn profile(item: &Item<'_>, known: &Known) -> Option<Option<String>> {
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
