//! A storage plugin that misbehaves on command (`plugin.py`): the example plugin of keepd's own, told by files what it is to do.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::*;

/// Which requests meet which fault, by the names that `plugin.py` has for them.
#[derive(Debug, Clone)]
pub struct Rule {
    pub verb: String,
    /// What the object's name (of a listing: the prefix) contains.
    pub name: String,
    /// Begins with this occurrence, counted from 1.
    pub nth: usize,
    /// And ends after so many; never with 0.
    pub times: usize,
    pub fault: &'static str,
}

pub struct Plugin {
    dir: PathBuf,
}

impl Plugin {
    /// Its objects, and what it is told, lie below `dir`.
    pub fn prepared(dir: &Path) -> Self {
        let dir = dir.join("plugin");
        fs::create_dir_all(dir.join("objects")).unwrap();
        fs::create_dir(dir.join("control")).unwrap();
        Self { dir }
    }

    pub fn objects(&self) -> PathBuf {
        self.dir.join("objects")
    }

    fn control(&self, name: &str) -> PathBuf {
        self.dir.join("control").join(name)
    }

    pub fn destination(&self, name: &str, more: &str) -> String {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        format!(
            "[destination.{name}]\nservice = \"exec\"\ncommand = [\"{}\", \"{}\", \"{}\", \"{}\"]\noptions = {{ directory = \"{}\" }}\n\
             encryption = \"main\"\n{more}\n",
            python().display(),
            here.join("tests/faults/plugin.py").display(),
            here.join("config/plugins/directory.py").display(),
            self.dir.join("control").display(),
            self.objects().display()
        )
    }

    pub fn set(&self, rule: &Rule) {
        let json = serde_json::json!({ "verb": rule.verb, "name": rule.name, "nth": rule.nth, "times": rule.times, "fault": rule.fault });
        ["seen", "met"].iter().for_each(|name| drop(fs::remove_file(self.control(name))));
        fs::write(self.control("rule-to-be"), json.to_string()).unwrap();
        fs::rename(self.control("rule-to-be"), self.control("rule")).unwrap();
    }

    /// No fault any more, and what hangs ends. How often it was met.
    pub fn clear(&self) -> usize {
        let _ = fs::remove_file(self.control("rule"));
        fs::read(self.control("met")).map_or(0, |met| met.len())
    }

    /// What an old listing lists.
    pub fn remember(&self) {
        let root = self.objects();
        let there: Vec<(String, u64)> = files_below(&root)
            .into_iter()
            .map(|path| (path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned(), fs::metadata(&path).unwrap().len()))
            .collect();
        fs::write(self.control("remembered"), serde_json::json!(there).to_string()).unwrap();
    }

    pub fn forget_log(&self) {
        let _ = fs::remove_file(self.control("log"));
    }

    /// Verbs and names.
    pub fn log(&self) -> Vec<(String, String)> {
        let text = fs::read_to_string(self.control("log")).unwrap_or_default();
        text.lines().filter_map(|line| line.split_once(' ')).map(|(verb, name)| (verb.to_owned(), name.to_owned())).collect()
    }
}
