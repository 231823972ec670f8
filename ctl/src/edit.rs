//! Changing keepd's configuration: as a text with its comments, replaced at once and only as long as nobody else changed it.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use toml_edit::{Array, DocumentMut, Item, Value};

/// No configuration file is longer, in bytes.
const MAX_BYTES: u64 = 16 << 20;

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
        let found = std::fs::metadata(&self.path)?;
        let mut new = tempfile::Builder::new().prefix(".keepd-").suffix(".tmp").tempfile_in(directory)?;
        new.write_all(text.as_bytes())?;
        let own = new.as_file().metadata()?;
        if (own.uid(), own.gid()) != (found.uid(), found.gid()) {
            fchown(new.as_file(), Some(found.uid()), Some(found.gid()))?;
        }
        // After the owner, which may take bits away.
        new.as_file().set_permissions(std::fs::Permissions::from_mode(found.mode() & 0o7777))?;
        new.as_file().sync_all()?;
        new.persist(&self.path).map_err(|e| e.error)?;
        File::open(directory)?.sync_all()?;
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

/// The text with another key file for a profile; the one before becomes a retired one.
pub fn with_key_file(text: &str, profile: &str, key_file: &str) -> Result<Change, String> {
    let mut document: DocumentMut = text.parse().map_err(|e: toml_edit::TomlError| e.message().to_owned())?;
    let table = document
        .get_mut("encryption")
        .and_then(|t| t.as_table_like_mut())
        .and_then(|t| t.get_mut(profile))
        .and_then(|t| t.as_table_like_mut())
        .ok_or_else(|| format!("it has no table [encryption.{profile}]"))?;
    let before = table.get("key_file").and_then(Item::as_str).map(str::to_owned);
    if before.as_deref() == Some(key_file) {
        return Ok(Change::Nothing);
    }
    let old = ["key_file", "credential", "passphrase", "pkcs11"].into_iter().find(|key| table.contains_key(key));
    match old {
        Some("key_file") => {
            if let Some(Item::Value(value)) = table.get_mut("key_file") {
                set(value, key_file.into());
            }
        }
        other => {
            // What was said about the key goes with it.
            if let Some(name) = other {
                table.remove(name);
            }
            table.insert("key_file", toml_edit::value(key_file));
        }
    }
    let mut retired: Vec<String> = table
        .get("retired")
        .and_then(Item::as_array)
        .map(|a| a.iter().filter_map(Value::as_str).filter(|path| *path != key_file).map(str::to_owned).collect())
        .unwrap_or_default();
    if let Some(before) = before.filter(|before| !retired.contains(before)) {
        retired.insert(0, before);
    }
    match (retired.is_empty(), table.get_mut("retired")) {
        (true, None) => {}
        (true, Some(_)) => drop(table.remove("retired")),
        (false, Some(Item::Value(value))) => set(value, Value::Array(Array::from_iter(retired))),
        (false, _) => drop(table.insert("retired", toml_edit::value(Array::from_iter(retired)))),
    }
    Ok(Change::Text(document.to_string()))
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
        match with_key_file(text, "main", "/new.key").unwrap() {
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
        assert_eq!(with_key_file("[encryption.main]\nkey_file = \"/new.key\"\n", "main", "/new.key"), Ok(Change::Nothing));
        for text in ["", "[encryption.other]\nkey_file = \"a\"\n", "encryption = 1\n", "[encryption\n", "[encryption]\nmain = 5\n"] {
            assert!(with_key_file(text, "main", "/new.key").is_err(), "{text}");
        }
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
