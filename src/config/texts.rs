//! The files of a configuration as texts: what is read, checked, exchanged and changed.
//!
//! In: the main file, its drop-ins, and a change of them that was begun ([`super::change`]). Out: the texts as they count now, wholly those of
//! before a change or wholly those after it; from them the checked [`Config`], or the raw tables of its items.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use toml::de::DeTable;

use super::change::Journal;
use super::load::{self, absolute};
use super::paths::Surroundings;
use super::problem::{Place, Problem, Problems, Severity};
use super::reader::Table;
use super::source_text::{SourceText, read_text, reason};
use super::{Config, ItemKind, ItemName};

/// Tables that there are once.
const SETTINGS: [&str; 4] = ["daemon", "coverage", "config_backup", "audit"];
/// Read again so often when somebody writes meanwhile.
const ATTEMPTS: usize = 8;

/// A configuration's files with their texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Texts {
    pub main: PathBuf,
    /// The main file first, then `conf.d/*.toml` by name. Empty where there is no configuration yet.
    pub files: Vec<(PathBuf, String)>,
}

/// A file, and its text or why it cannot be read.
type Found = (PathBuf, Result<String, String>);

impl Texts {
    /// Reads `main` and its drop-ins, with a change that was begun already made. A file that cannot be read is an error, told with all else that
    /// is wrong.
    pub fn read(main: &Path) -> Result<Self, Problems> {
        Self::read_in(main, &Surroundings::of_this_process())
    }

    pub(super) fn read_in(main: &Path, here: &Surroundings<'_>) -> Result<Self, Problems> {
        let found = read_settled(main).map_err(|problem| Problems(vec![problem]))?;
        if found.iter().all(|(_, text)| text.is_ok()) {
            let files = found.into_iter().filter_map(|(path, text)| Some((path, text.ok()?))).collect();
            return Ok(Self { main: main.to_owned(), files });
        }
        match load::check(main, here, found.into_iter().map(source).collect()) {
            Err(problems) => Err(problems),
            Ok(_) => Err(Problems(vec![Problem::of_key(Severity::Error, "", "a file of the configuration cannot be read")])),
        }
    }

    /// The configuration that they are, or all that is wrong with it.
    pub fn load(&self) -> Result<Config, Problems> {
        self.load_in(&Surroundings::of_this_process())
    }

    pub(super) fn load_in(&self, here: &Surroundings<'_>) -> Result<Config, Problems> {
        load::check(&self.main, here, self.sources())
    }

    /// The tables that a configuration is exchanged in, as they are written, each with the file that it stands in. That they are right is not
    /// looked at, only that each can be made out and stands there once.
    pub fn items(&self) -> Result<BTreeMap<ItemName, (PathBuf, serde_json::Value)>, Problems> {
        let sources = self.sources();
        let tables: Vec<DeTable<'_>> = sources.iter().map(SourceText::parse).collect();
        let mut items: BTreeMap<ItemName, (PathBuf, serde_json::Value)> = BTreeMap::new();
        for (source, table) in sources.iter().zip(&tables) {
            for (item, table) in items_of(&Table::root(source, table)) {
                match items.get(&item) {
                    Some((first, _)) => {
                        let first = Place { file: first.clone(), line: 0, column: 0 };
                        table.report(format!(
                            "is defined already in {first}; a table must stand in one file only, so remove one of the two"
                        ));
                    }
                    None => drop(items.insert(item, (source.path().to_owned(), table.json()))),
                }
            }
        }
        drop(tables);
        let problems: Vec<Problem> = sources.into_iter().flat_map(SourceText::into_problems).collect();
        if problems.is_empty() { Ok(items) } else { Err(Problems(problems)) }
    }

    /// The same without the files.
    pub fn values(&self) -> Result<BTreeMap<ItemName, serde_json::Value>, Problems> {
        Ok(self.items()?.into_iter().map(|(item, (_, value))| (item, value)).collect())
    }

    /// Over the names of the files below the main one's directory, and their texts; SHA-256 in hexadecimal digits.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for (path, text) in &self.files {
            for part in [self.relative(path).as_bytes(), text.as_bytes()] {
                hash.update((part.len() as u64).to_le_bytes());
                hash.update(part);
            }
        }
        hex(&hash.finalize())
    }

    /// The text of one of the files.
    pub fn text(&self, path: &Path) -> Option<&str> {
        self.files.iter().find(|(p, _)| p == path).map(|(_, text)| text.as_str())
    }

    /// The directory that relative paths of the configuration are meant from; absolute.
    pub fn directory(&self) -> PathBuf {
        absolute(&self.main).parent().map(Path::to_owned).unwrap_or_default()
    }

    /// `keepd.toml`, `conf.d/a.toml`.
    pub(super) fn relative(&self, path: &Path) -> String {
        relative(&self.main, path)
    }

    /// Another text for a file, or none at all.
    pub(super) fn put(&mut self, path: &Path, text: Option<String>) {
        self.files.retain(|(p, _)| p != path);
        self.files.extend(text.map(|text| (path.to_owned(), text)));
        let main = &self.main;
        self.files.sort_by(|(a, _), (b, _)| (a != main, a).cmp(&(b != main, b)));
    }

    fn sources(&self) -> Vec<SourceText> {
        self.files.iter().map(|(path, text)| SourceText::new(path, text.clone())).collect()
    }
}

/// The items that stand in a file, in its order.
fn items_of<'a>(root: &Table<'a>) -> Vec<(ItemName, Table<'a>)> {
    let mut found = Vec::new();
    for (key, item) in root.items() {
        if SETTINGS.contains(&key) || key == "access" {
            let kind = if key == "access" { ItemKind::Access } else { ItemKind::Settings };
            found.extend(item.table(&format!("a table: [{key}]")).map(|table| (ItemName::new(kind, key), table)));
            continue;
        }
        let Some(kind) = named_kind(key) else { continue };
        let Some(outer) = item.table(&format!("tables such as [{key}.NAME]")) else { continue };
        for (name, item) in outer.items() {
            found.extend(item.table(&format!("a table: [{key}.NAME]")).map(|table| (ItemName::new(kind, name), table)));
        }
    }
    found
}

/// Whether there is a table `[name]` of settings.
pub fn is_settings(name: &str) -> bool {
    SETTINGS.contains(&name)
}

/// The kind of the tables `[key.NAME]`.
fn named_kind(key: &str) -> Option<ItemKind> {
    let kinds = [ItemKind::Encryption, ItemKind::Destination, ItemKind::Job, ItemKind::Notification];
    kinds.into_iter().find(|kind| kind.word() == key)
}

/// The files as they are checked; only a list of drop-ins that cannot be read ends it here.
pub(super) fn sources(main: &Path) -> Result<Vec<SourceText>, Problem> {
    Ok(read_settled(main)?.into_iter().map(source).collect())
}

fn source((path, text): Found) -> SourceText {
    match text {
        Ok(text) => SourceText::new(&path, text),
        Err(why) => SourceText::unreadable(&path, &why),
    }
}

/// Reads until two readings agree: one that a change came in between of may have files of before and of after it.
fn read_settled(main: &Path) -> Result<Vec<Found>, Problem> {
    let mut found = read_all(main);
    for _ in 1..ATTEMPTS {
        let again = read_all(main);
        if again == found {
            break;
        }
        found = again;
    }
    found
}

/// The main file, its drop-ins, and over them a change that was begun.
fn read_all(main: &Path) -> Result<Vec<Found>, Problem> {
    let journal = Journal::read(main).map_err(|(path, why)| whole(&path, &why))?;
    let mut found = read_files(main)?;
    if let Some(journal) = journal {
        journal.overlay(main, &mut found).map_err(|(path, why)| whole(&path, &why))?;
    }
    Ok(found)
}

/// What stands on the disk. An unreadable file is there with its reason; only a list of drop-ins that cannot be read ends it here.
pub(super) fn read_files(main: &Path) -> Result<Vec<Found>, Problem> {
    let advice = "; keepd is configured by one TOML file, by default /etc/keepd/keepd.toml, another is named with --config";
    let mut found = vec![(main.to_owned(), read_text(main).map_err(|why| why + advice))];
    let directory = drop_ins(main);
    let failed = |error: &std::io::Error| whole(&directory, &format!("the drop-ins cannot be listed: {}", reason(error)));
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(failed(&error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| failed(&e))?.path();
        if is_drop_in(&path) {
            paths.push(path);
        }
    }
    paths.sort();
    found.extend(paths.into_iter().map(|path| {
        let text = read_text(&path);
        (path, text)
    }));
    Ok(found)
}

fn whole(file: &Path, text: &str) -> Problem {
    let place = Some(Place { file: file.to_owned(), line: 0, column: 0 });
    Problem { severity: Severity::Error, place, key: String::new(), text: text.to_owned() }
}

/// The directory of the drop-ins.
pub(super) fn drop_ins(main: &Path) -> PathBuf {
    main.parent().unwrap_or(Path::new("")).join("conf.d")
}

/// Whether a file in that directory counts.
pub(super) fn is_drop_in(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|n| n.as_encoded_bytes().starts_with(b"."));
    !hidden && path.extension().is_some_and(|e| e == "toml")
}

/// `keepd.toml`, `conf.d/a.toml`.
pub(super) fn relative(main: &Path, path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if path == main { name } else { format!("conf.d/{name}") }
}

pub(super) fn digest(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn texts(files: &[(&str, &str)]) -> Texts {
        let files = files.iter().map(|(path, text)| (PathBuf::from(path), (*text).to_owned())).collect();
        Texts { main: "/c/keepd.toml".into(), files }
    }

    #[test]
    fn items_are_the_tables_as_they_are_written() {
        let found = texts(&[
            (
                "/c/keepd.toml",
                "\u{feff}job.a.at = 2026-12-24T18:00\n[daemon]\nmemory = 0x10\nshare = 0.5\n[access]\nadmin = ['root']\n[unknown]\nx = 1\n",
            ),
            (
                "/c/conf.d/n.toml",
                "[notification.mail]\nto = 'x'\n[config_backup]\n[encryption]\nmain = { key_file = 'k' }\n[[job.b.source]]\nfiles = '/b'\n",
            ),
        ]);
        let items = found.items().unwrap_or_else(|problems| panic!("{problems}"));
        let shown: Vec<_> = items.iter().map(|(name, (path, value))| (name.to_string(), found.relative(path), value.clone())).collect();
        let at = |name: &str, file: &str, value| (name.to_owned(), file.to_owned(), value);
        assert_eq!(
            shown,
            [
                at("settings.config_backup", "conf.d/n.toml", json!({})),
                at("settings.daemon", "keepd.toml", json!({"memory": 16, "share": 0.5})),
                at("encryption.main", "conf.d/n.toml", json!({"key_file": "k"})),
                at("job.a", "keepd.toml", json!({"at": "2026-12-24T18:00"})),
                at("job.b", "conf.d/n.toml", json!({"source": [{"files": "/b"}]})),
                at("access.access", "keepd.toml", json!({"admin": ["root"]})),
                at("notification.mail", "conf.d/n.toml", json!({"to": "x"})),
            ]
        );
    }

    #[test]
    fn what_cannot_be_made_out_is_told_with_its_place() {
        for (text, wanted) in [
            ("[job.a\n", "/c/keepd.toml:1:"),
            ("job = 5\n", "/c/keepd.toml:1:7: job: must be tables such as [job.NAME]"),
            ("daemon = 5\n", "/c/keepd.toml:1:10: daemon: must be a table"),
            ("[job]\na = 5\n", "/c/keepd.toml:2:5: job.a: must be a table"),
        ] {
            let error = texts(&[("/c/keepd.toml", text)]).items().unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        let twice = texts(&[("/c/keepd.toml", "[job.a]\n"), ("/c/conf.d/b.toml", "[job.a]\n")]).items().unwrap_err().to_string();
        assert!(twice.contains("/c/conf.d/b.toml:1:1: job.a: is defined already in /c/keepd.toml"), "{twice}");
    }

    #[test]
    fn the_digest_is_that_of_names_and_texts() {
        let one = texts(&[("/c/keepd.toml", "x = 1\n"), ("/c/conf.d/a.toml", "")]);
        assert_eq!(one.digest().len(), 64);
        assert_eq!(one.digest(), one.clone().digest());
        for other in [
            texts(&[("/c/keepd.toml", "x = 2\n"), ("/c/conf.d/a.toml", "")]),
            texts(&[("/c/keepd.toml", "x = 1\n"), ("/c/conf.d/b.toml", "")]),
            texts(&[("/c/keepd.toml", "x = 1\n")]),
        ] {
            assert_ne!(one.digest(), other.digest());
        }
        let elsewhere = Texts {
            main: "/d/keepd.toml".into(),
            files: vec![("/d/keepd.toml".into(), "x = 1\n".into()), ("/d/conf.d/a.toml".into(), "".into())],
        };
        assert_eq!(one.digest(), elsewhere.digest());
    }
}
