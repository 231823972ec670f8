//! Changing keepd's configuration: as a text with its comments, replaced at once and only as long as nobody else changed it.

use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use toml_edit::{Array, DocumentMut, Item, RawString, Value};

use crate::line_ends::with_line_ends;

/// No configuration file is longer, in bytes.
const MAX_BYTES: u64 = 16 << 20;
/// What is written and not in its place yet begins so, as keepd's own changes do: when one is cut off, keepd removes it at its next start.
const TEMPORARY: &str = ".keepd-change-";

/// A file of the configuration as it was read.
pub struct ConfigFile {
    /// The file itself, not a link to it.
    pub path: PathBuf,
    pub text: String,
}

/// What stands between a text and its change.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    /// The key stands there already.
    Nothing,
    Text(String),
}

impl ConfigFile {
    fn read(path: &Path) -> io::Result<Self> {
        let path = path.canonicalize()?;
        let file = File::open(&path)?;
        let mut text = String::new();
        io::Read::read_to_string(&mut io::Read::take(file, MAX_BYTES), &mut text)?;
        Ok(Self { path, text })
    }

    /// Replaces the file's text, durable when it returns; an error when somebody changed it since it was read. Mode and owner stay.
    pub fn replace(&mut self, text: String) -> io::Result<()> {
        let there = Self::read(&self.path)?;
        if there.text != self.text {
            return Err(io::Error::other("somebody changed it just now; look at it and try again"));
        }
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        let held = File::open(directory)?;
        // keepd holds it while it makes a change or tidies up. Where a file system has no locks, nothing but the look above keeps two apart.
        if let Err(TryLockError::WouldBlock) = held.try_lock() {
            return Err(io::Error::other("another change of it is being made just now; try again"));
        }
        let found = std::fs::metadata(&self.path)?;
        let mut new = tempfile::Builder::new().prefix(TEMPORARY).suffix(".tmp").tempfile_in(directory)?;
        new.write_all(text.as_bytes())?;
        let own = new.as_file().metadata()?;
        if (own.uid(), own.gid()) != (found.uid(), found.gid()) {
            fchown(new.as_file(), Some(found.uid()), Some(found.gid()))?;
        }
        // After the owner, which may take bits away.
        new.as_file().set_permissions(std::fs::Permissions::from_mode(found.mode() & 0o7777))?;
        new.as_file().sync_all()?;
        new.persist(&self.path).map_err(|e| e.error)?;
        held.sync_all()?;
        self.text = text;
        Ok(())
    }
}

/// The file in which an encryption profile stands: the main one, or a drop-in beside it.
pub fn find_profile(main: &Path, profile: &str) -> Result<ConfigFile, (PathBuf, String)> {
    let mut files = vec![main.to_owned()];
    let drop_ins = main.parent().unwrap_or(Path::new("/")).join("conf.d");
    let mut names: Vec<PathBuf> = match std::fs::read_dir(&drop_ins) {
        Ok(entries) => entries.flatten().map(|e| e.path()).collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err((drop_ins, e.to_string())),
    };
    let is_drop_in = |path: &PathBuf| {
        let hidden = path.file_name().is_none_or(|n| n.to_string_lossy().starts_with('.'));
        !hidden && path.extension().is_some_and(|e| e == "toml")
    };
    names.retain(is_drop_in);
    names.sort();
    files.extend(names);
    for path in files {
        let file = ConfigFile::read(&path).map_err(|e| (path.clone(), e.to_string()))?;
        let document: DocumentMut = file.text.parse().map_err(|e: toml_edit::TomlError| (path.clone(), e.message().to_owned()))?;
        if document.get("encryption").and_then(Item::as_table_like).is_some_and(|t| t.contains_key(profile)) {
            return Ok(file);
        }
    }
    Err((main.to_owned(), format!("neither it nor its drop-ins have a table [encryption.{profile}]")))
}

/// The text with another key file for a profile; the one before becomes a retired one. Relative paths are meant from `base`, the main file's
/// directory, also in drop-ins.
pub fn with_key_file(text: &str, profile: &str, key_file: &str, base: &Path) -> Result<Change, String> {
    let mut document: DocumentMut = text.parse().map_err(|e: toml_edit::TomlError| e.message().to_owned())?;
    let no_table = || format!("it has no table [encryption.{profile}]");
    let item = document
        .get_mut("encryption")
        .and_then(|t| t.as_table_like_mut())
        .and_then(|t| t.get_mut(profile))
        .filter(|t| t.is_table_like())
        .ok_or_else(no_table)?;
    let before = item.get("key_file").and_then(Item::as_str).map(str::to_owned);
    if before.as_deref().is_some_and(|before| is_same(base, before, key_file)) {
        return Ok(Change::Nothing);
    }
    match ["credential", "passphrase", "pkcs11"].into_iter().find(|way| item.get(way).is_some()) {
        Some(way) if before.is_none() => replace(item, way, key_file).ok_or_else(no_table)?,
        _ => {
            let table = item.as_table_like_mut().ok_or_else(no_table)?;
            match table.get_mut("key_file") {
                Some(Item::Value(value)) => set(value, key_file.into()),
                _ => drop(table.insert("key_file", toml_edit::value(key_file))),
            }
        }
    }
    let table = item.as_table_like_mut().ok_or_else(no_table)?;
    match table.get_mut("retired") {
        None => {
            if let Some(before) = before {
                table.insert("retired", toml_edit::value(Array::from_iter([before])));
            }
        }
        Some(retired) => {
            let retired = retired.as_array_mut().ok_or_else(|| format!("retired in [encryption.{profile}] is no list"))?;
            retire(retired, before, key_file, base);
            if retired.is_empty() && !retired.to_string().contains('#') {
                table.remove("retired");
            }
        }
    }
    Ok(Change::Text(with_line_ends(text, &document.to_string())))
}

/// Whether two paths of the configuration name one file, as far as can be seen; links as such are different files.
fn is_same(base: &Path, one: &str, other: &str) -> bool {
    let resolved = |path: &str| {
        let path = base.join(path);
        let there = || Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?));
        // Without `.`; what is not there has no other names.
        there().unwrap_or_else(|| path.components().collect())
    };
    resolved(one) == resolved(other)
}

/// Puts a key file in the place of another way to a key, with what was said about that.
fn replace(profile: &mut Item, way: &str, key_file: &str) -> Option<()> {
    let (key, old) = profile.as_table_like()?.get_key_value(way)?;
    let (mut above, mut behind) = (String::new(), String::new());
    let mut header = None;
    match old {
        Item::Value(value) => {
            above.push_str(text_of(key.leaf_decor().prefix()));
            behind.push_str(text_of(value.decor().suffix()));
        }
        Item::Table(table) => {
            if !table.is_dotted() {
                header = Some((table.decor().clone(), table.position()));
            }
            inner_comments(table, &mut above);
        }
        _ => {}
    }
    profile.as_table_like_mut()?.remove(way);
    if let Some((decor, position)) = header {
        match profile.as_table_mut() {
            // [encryption.main] was not written, and [encryption.main.passphrase] makes place for it.
            Some(table) if table.is_implicit() && !table.is_dotted() => {
                *table.decor_mut() = decor;
                table.set_position(position);
                table.set_implicit(false);
            }
            _ => {
                above.insert_str(0, text_of(decor.prefix()));
                behind.push_str(text_of(decor.suffix()));
            }
        }
    }
    let table = profile.as_table_like_mut()?;
    let mut value = Value::from(key_file);
    value.decor_mut().set_prefix(" ");
    value.decor_mut().set_suffix(behind);
    table.insert("key_file", Item::Value(value));
    table.key_mut("key_file")?.leaf_decor_mut().set_prefix(above);
    Some(())
}

fn text_of(raw: Option<&RawString>) -> &str {
    raw.and_then(RawString::as_str).unwrap_or_default()
}

/// The comments in a table, each on a line of its own.
fn inner_comments(table: &toml_edit::Table, into: &mut String) {
    for (keys, value) in table.get_values() {
        let above = keys.last().map(|key| text_of(key.leaf_decor().prefix())).unwrap_or_default();
        for text in [above, text_of(value.decor().suffix())] {
            for line in text.lines().map(str::trim).filter(|line| line.starts_with('#')) {
                into.push_str(line);
                into.push('\n');
            }
        }
    }
}

/// Puts a key file that was used before at the head of a list, where it is not there yet, and takes the present one out; comments stay.
fn retire(retired: &mut Array, before: Option<String>, present: &str, base: &Path) {
    let is = |value: &Value, path: &str| value.as_str().is_some_and(|text| is_same(base, text, path));
    while let Some(at) = (0..retired.len()).find(|at| retired.get(*at).is_some_and(|value| is(value, present))) {
        let gone = retired.remove(at);
        let above = text_of(gone.decor().prefix()).to_owned();
        match retired.get_mut(at) {
            Some(next) if at == 0 || above.contains('#') => {
                let own = text_of(next.decor().prefix()).to_owned();
                let merged = if own.contains('#') { format!("{above}{own}") } else { above };
                next.decor_mut().set_prefix(merged);
            }
            None if above.contains('#') => {
                let trailing = format!("{above}{}", text_of(Some(retired.trailing())));
                retired.set_trailing(trailing);
            }
            _ => {}
        }
    }
    let Some(before) = before.filter(|before| !retired.iter().any(|value| is(value, before))) else { return };
    let mut value = Value::from(before);
    match retired.get_mut(0) {
        None => retired.push(value),
        Some(first) => {
            // On a line of its own where the others are; a comment behind the bracket stays there.
            let above = text_of(first.decor().prefix()).to_owned();
            let (own, next) = match above.find('\n').and_then(|at| above.split_at_checked(at)) {
                Some((head, rest)) => {
                    let indent = rest.rsplit('\n').next().unwrap_or_default();
                    (format!("{head}\n{indent}"), rest.to_owned())
                }
                None => (above, " ".to_owned()),
            };
            first.decor_mut().set_prefix(next);
            value.decor_mut().set_prefix(own);
            value.decor_mut().set_suffix("");
            retired.insert_formatted(0, value);
        }
    }
}

/// Another value with what stands around it.
fn set(value: &mut Value, new: Value) {
    let decor = value.decor().clone();
    *value = new;
    *value.decor_mut() = decor;
}

/// What differs, as `diff -u` shows it.
pub fn diff(path: &Path, before: &str, after: &str) -> String {
    let name = path.display().to_string();
    similar::TextDiff::from_lines(before, after).unified_diff().context_radius(2).header(&name, &name).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(text: &str) -> String {
        match with_key_file(text, "main", "/new.key", Path::new("/")).unwrap() {
            Change::Text(text) => text,
            Change::Nothing => panic!("nothing was changed in {text}"),
        }
    }

    #[test]
    fn comments_stay_and_the_old_key_is_retired() {
        assert_eq!(
            changed("# top\n[encryption.main] # ours\n# the key\nkey_file = \"main.key\" # since 2024\n\n[daemon]\n"),
            "# top\n[encryption.main] # ours\n# the key\nkey_file = \"/new.key\" # since 2024\nretired = [\"main.key\"]\n\n[daemon]\n"
        );
        assert_eq!(
            changed("[encryption.main]\nkey_file = \"b\"\nretired = [\"a\", \"/new.key\"] # old\n"),
            "[encryption.main]\nkey_file = \"/new.key\"\nretired = [\"b\", \"a\"] # old\n"
        );
        assert_eq!(
            changed("encryption = { main = { key_file = 'b' } }\n"),
            "encryption = { main = { key_file = \"/new.key\" , retired = [\"b\"] } }\n"
        );
        assert_eq!(
            changed("encryption.main.key_file = 'b'\n"),
            "encryption.main.key_file = \"/new.key\"\nencryption.main.retired = [\"b\"]\n"
        );
        assert_eq!(
            changed("[encryption.main]\npassphrase = { file = \"/p\" }\npublic_key = \"x\"\n"),
            "[encryption.main]\npublic_key = \"x\"\nkey_file = \"/new.key\"\n"
        );
        assert_eq!(with_key_file("[encryption.main]\nkey_file = \"/new.key\"\n", "main", "/new.key", Path::new("/")), Ok(Change::Nothing));
        for text in ["", "[encryption.other]\nkey_file = \"a\"\n", "encryption = 1\n", "[encryption\n", "[encryption]\nmain = 5\n"] {
            assert!(with_key_file(text, "main", "/new.key", Path::new("/")).is_err(), "{text}");
        }
    }

    #[test]
    fn comments_in_lists_and_of_what_goes_stay() {
        assert_eq!(
            changed(
                "[encryption.main]\nkey_file = \"b\"\nretired = [ # gone\n    # the first\n    \"a\", # of 2024\n    \"/new.key\", # tried once\n] # end\n"
            ),
            "[encryption.main]\nkey_file = \"/new.key\"\nretired = [ # gone\n    \"b\",\n    # the first\n    \"a\", # of 2024\n     # tried once\n] # end\n"
        );
        assert_eq!(
            changed("[encryption.main]\n# in my head\npassphrase = { file = \"/p\" } # long\npublic_key = \"x\"\n"),
            "[encryption.main]\npublic_key = \"x\"\n# in my head\nkey_file = \"/new.key\" # long\n"
        );
        assert_eq!(
            changed("[daemon]\n\n# in my head\n[encryption.main.passphrase] # long\n# there\nfile = \"/p\"\n\n[job.a]\n"),
            "[daemon]\n\n# in my head\n[encryption.main] # long\n# there\nkey_file = \"/new.key\"\n\n[job.a]\n"
        );
        assert_eq!(
            changed("[encryption.main]\npublic_key = \"x\"\n\n# the card\n[encryption.main.pkcs11] # blue\nkey = \"k\"\n\n[job.a]\n"),
            "[encryption.main]\npublic_key = \"x\"\n\n# the card\nkey_file = \"/new.key\" # blue\n\n[job.a]\n"
        );
        assert!(with_key_file("[encryption.main]\nkey_file = \"b\"\nretired = 5\n", "main", "/new.key", Path::new("/")).is_err());
    }

    #[test]
    fn line_ends_stay() {
        assert_eq!(
            changed("# top\r\n[encryption.main]\r\nkey_file = \"b\"\r\n\r\n[daemon]\r\n"),
            "# top\r\n[encryption.main]\r\nkey_file = \"/new.key\"\r\nretired = [\"b\"]\r\n\r\n[daemon]\r\n"
        );
        assert_eq!(
            changed("# top\n[encryption.main]\r\nkey_file = \"b\"\r\n# end\n"),
            "# top\n[encryption.main]\r\nkey_file = \"/new.key\"\r\nretired = [\"b\"]\r\n# end\n"
        );
    }

    #[test]
    fn one_file_by_two_names_stands_there_once() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().canonicalize().unwrap();
        std::fs::create_dir(base.join("keys")).unwrap();
        let new = base.join("keys/new.key").display().to_string();
        let old = base.join("keys/old.key").display().to_string();
        let text = format!("[encryption.main]\nkey_file = \"keys/old.key\"\nretired = [\"./keys/new.key\", \"{old}\", \"a\"]\n");
        let wanted = format!("[encryption.main]\nkey_file = \"{new}\"\nretired = [\"{old}\", \"a\"]\n");
        assert_eq!(with_key_file(&text, "main", &new, &base), Ok(Change::Text(wanted)));
        let text = "[encryption.main]\nkey_file = \"keys/../keys/new.key\"\n";
        assert_eq!(with_key_file(text, "main", &new, &base), Ok(Change::Nothing));
        let text = "[encryption.main]\npassphrase = { file = \"/p\" }\nretired = [\"keys/new.key\"]\n";
        let wanted = format!("[encryption.main]\nkey_file = \"{new}\"\n");
        assert_eq!(with_key_file(text, "main", &new, &base), Ok(Change::Text(wanted)));
    }

    #[test]
    fn a_file_is_replaced_with_its_mode_through_a_link_and_never_over_somebodys_change() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keepd.toml");
        std::fs::create_dir(directory.path().join("conf.d")).unwrap();
        std::fs::write(&path, "[daemon]\n").unwrap();
        let drop_in = directory.path().join("conf.d/keys.toml");
        let real = directory.path().join("real");
        std::fs::write(&real, "[encryption.main]\nkey_file = \"a\"\n").unwrap();
        std::fs::set_permissions(&real, std::fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink(&real, &drop_in).unwrap();
        std::fs::write(directory.path().join("conf.d/.hidden.toml"), "[encryption.hidden]\n").unwrap();
        assert!(find_profile(&path, "hidden").is_err());
        let mut file = find_profile(&path, "main").map_err(|e| e.1).unwrap();
        file.replace("new = 1\n".into()).unwrap();
        assert!(drop_in.is_symlink());
        assert_eq!(std::fs::read_to_string(&real).unwrap(), "new = 1\n");
        assert_eq!(std::fs::metadata(&real).unwrap().mode() & 0o7777, 0o640);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 3, "no temporary file is left");
        std::fs::write(&real, "somebody = 1\n").unwrap();
        assert!(file.replace("mine = 1\n".into()).unwrap_err().to_string().contains("somebody changed it"));
        assert_eq!(std::fs::read_to_string(&real).unwrap(), "somebody = 1\n");
    }
}
