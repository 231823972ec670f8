//! A keepd whose destination misbehaves on command, what it is known to have backed up, and the questions that are asked after every fault: is everything
//! that was told to be good there and whole, seen by a reader without any state, and did what failed say why.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use keepd_faultfs::Mounted;
use serde_json::Value;

use crate::common::*;
use crate::dav::{self, Dav};
use crate::plugin::{self, Plugin};
use crate::s3::{self, S3};

/// The destination that misbehaves: a word that nothing else has in what keepd says.
pub const NAME: &str = "harbour";

/// How long keepd waits for a byte of an object store, in seconds. Long enough for a machine that is busy with other tests.
const PATIENCE: u64 = 10;
/// The same where a storage that never answers is waited for again and again.
pub const IMPATIENCE: u64 = 2;

/// Backups of a job that retention keeps.
const KEPT: usize = 3;
/// Stored configurations that retention keeps.
const KEPT_CONFIGS: usize = 2;

/// Paths and digests of contents.
pub type Tree = BTreeMap<PathBuf, [u8; 32]>;

/// Where the destination [`NAME`] lies.
pub enum Place {
    S3(S3),
    /// A directory, through a file system that misbehaves on command.
    Fs(Mounted),
    Dav(Dav),
    Plugin(Plugin),
}

/// How backups lie there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    Repository,
    /// Each is a file for itself (docs/archive-layout.md).
    Archive,
}

/// A fault that is about to be met.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
pub enum Trouble {
    S3(s3::Rule),
    Fs(keepd_faultfs::Rule),
    Dav(dav::Rule),
    Plugin(plugin::Rule),
}

pub struct World {
    // Ended before what is mounted in the directory, and that before the directory goes: see `drop`.
    pub place: Place,
    pub keepd: Keepd,
    pub layout: Layout,
    /// What was told to be backed up to the destination that misbehaves, oldest first, and what was in it.
    expected: Vec<(String, Tree)>,
    /// The stored configurations that are to be there.
    configs: Vec<String>,
    /// A key of somebody else that is to open it, or is not to; the slot it has.
    pub other_key: Option<(PathBuf, String)>,
    changes: u64,
}

pub fn tree(root: &Path) -> Tree {
    let digest = |path: &PathBuf| <sha2::Sha256 as sha2::Digest>::digest(fs::read(path).unwrap()).into();
    files_below(root).into_iter().map(|path| (path.strip_prefix(root).unwrap().to_owned(), digest(&path))).collect()
}

impl Drop for World {
    fn drop(&mut self) {
        // Whoever has something open keeps a file system from being unmounted, and a directory with a mount in it cannot be removed.
        self.keepd.kill();
    }
}

impl World {
    /// A keepd with destinations [`NAME`], which misbehaves, and `near`, a directory; two backups are there.
    pub fn on_s3() -> Self {
        Self::started(Keepd::prepared(), Place::S3(S3::started()), Layout::Repository, PATIENCE)
    }

    /// The same, and it gives up soon when nothing is answered.
    pub fn on_s3_impatient() -> Self {
        Self::started(Keepd::prepared(), Place::S3(S3::started()), Layout::Repository, IMPATIENCE)
    }

    /// The same with archives instead of a repository.
    pub fn of_archives_on_s3(is_patient: bool) -> Self {
        Self::started(Keepd::prepared(), Place::S3(S3::started()), Layout::Archive, if is_patient { PATIENCE } else { IMPATIENCE })
    }

    /// On WebDAV.
    pub fn on_dav(layout: Layout, is_patient: bool) -> Self {
        let keepd = Keepd::prepared();
        let dav = Dav::started(keepd.dir.path());
        Self::started(keepd, Place::Dav(dav), layout, if is_patient { PATIENCE } else { IMPATIENCE })
    }

    /// With a storage plugin.
    pub fn on_plugin(is_patient: bool) -> Self {
        let keepd = Keepd::prepared();
        let plugin = Plugin::prepared(keepd.dir.path());
        Self::started(keepd, Place::Plugin(plugin), Layout::Repository, if is_patient { PATIENCE } else { IMPATIENCE })
    }

    /// In a directory; None where no file system can be mounted.
    pub fn on_fs(layout: Layout) -> Option<Self> {
        if let Some(why) = keepd_faultfs::unavailable() {
            eprintln!("SKIPPED: {why}");
            assert!(std::env::var_os("KEEPD_REQUIRE_FUSE").is_none(), "{why}");
            return None;
        }
        let keepd = Keepd::prepared();
        let (behind, at) = (keepd.path("behind"), keepd.path("at"));
        fs::create_dir(&behind).unwrap();
        fs::create_dir(&at).unwrap();
        let mounted = Mounted::new(&behind, &at).unwrap();
        Some(Self::started(keepd, Place::Fs(mounted), layout, PATIENCE))
    }

    fn started(mut keepd: Keepd, place: Place, layout: Layout, patience: u64) -> Self {
        let d = keepd.dir.path().display();
        let how = match layout {
            Layout::Repository => "prune_grace = \"0s\"",
            Layout::Archive => "layout = \"archive\"",
        };
        let more = format!("timeout = \"{patience}s\"\nretry = {{ attempts = 2 }}\n{how}");
        let destination = match &place {
            Place::S3(s3) => s3.destination(NAME, "pre", &keepd.path("secret"), &more),
            Place::Fs(mounted) => {
                let at = mounted.at().display();
                format!("[destination.{NAME}]\nservice = \"fs\"\nroot = \"{at}\"\nencryption = \"main\"\n{how}\n")
            }
            Place::Dav(dav) => dav.destination(NAME, &more),
            Place::Plugin(plugin) => plugin.destination(NAME, &more),
        };
        let rules = "suspect = { smaller = 0, fewer_files = 0, larger = 0 }";
        let source = |job: &str| format!("[[job.{job}.source]]\nname = \"files\"\nfiles = \"{d}/files\"\n");
        let text = format!(
            "[daemon]\nstate_dir = \"{d}/state\"\nsocket = \"{d}/keepd.sock\"\n[encryption.main]\nkey_file = \"{d}/main.key\"\n{destination}\n\
             [destination.near]\nservice = \"fs\"\nroot = \"{d}/near\"\nencryption = \"main\"\nprune_grace = \"0s\"\n\
             [config_backup]\ndestination = \"{NAME}\"\nretention = {{ keep_last = {KEPT_CONFIGS} }}\n\
             [job.shop]\ndestinations = [\"{NAME}\"]\nretention = {{ keep_last = {KEPT} }}\n{rules}\n{}\
             [job.docs]\ndestinations = [\"near\"]\n{rules}\n{}",
            source("shop"),
            source("docs"),
        );
        fs::write(keepd.path("keepd.toml"), text).unwrap();
        for n in 0..4 {
            fs::write(keepd.path(&format!("files/stays-{n}")), noise(20_000, n + 1)).unwrap();
        }
        keepd.start();
        let mut world = Self { place, keepd, layout, expected: Vec::new(), configs: Vec::new(), other_key: None, changes: 0 };
        world.backed_up();
        world.remember();
        world.backed_up();
        world
    }

    /// What listings of an older state will say.
    pub fn remember(&self) {
        match &self.place {
            Place::S3(s3) => s3.remember(),
            Place::Dav(dav) => dav.remember(),
            Place::Plugin(plugin) => plugin.remember(),
            Place::Fs(_) => {}
        }
    }

    pub fn arm(&self, trouble: &Trouble) {
        match (&self.place, trouble) {
            (Place::S3(s3), Trouble::S3(rule)) => s3.set(rule.clone()),
            (Place::Fs(mounted), Trouble::Fs(rule)) => mounted.control().add(rule.clone()),
            (Place::Dav(dav), Trouble::Dav(rule)) => dav.set(rule.clone()),
            (Place::Plugin(plugin), Trouble::Plugin(rule)) => plugin.set(rule),
            _ => panic!("this storage has no such trouble"),
        }
    }

    /// All is well again. How often the fault was met.
    pub fn disarm(&self) -> u64 {
        match &self.place {
            Place::S3(s3) => s3.clear() as u64,
            Place::Dav(dav) => dav.clear() as u64,
            Place::Plugin(plugin) => plugin.clear() as u64,
            Place::Fs(mounted) => {
                let fired = mounted.control().fired();
                mounted.control().clear_rules();
                fired
            }
        }
    }

    /// The storage had an answer to everything.
    pub fn was_understood(&self) {
        let unknown = match &self.place {
            Place::S3(s3) => s3.unknown(),
            Place::Dav(dav) => dav.unknown(),
            Place::Fs(_) | Place::Plugin(_) => Vec::new(),
        };
        assert_eq!(unknown, Vec::<String>::new());
    }

    /// Where the destination that misbehaves is, as messages say it.
    pub fn address(&self) -> String {
        match &self.place {
            Place::S3(s3) => format!("s3:{}/pre at http://127.0.0.1:{}", s3::BUCKET, s3.port),
            Place::Fs(mounted) => format!("fs:{}", mounted.at().display()),
            Place::Dav(dav) => format!("webdav:/pre at http://127.0.0.1:{}", dav.port),
            Place::Plugin(_) => format!("exec:{NAME} through "),
        }
    }

    pub fn s3(&self) -> &S3 {
        match &self.place {
            Place::S3(s3) => s3,
            _ => panic!("it lies elsewhere"),
        }
    }

    /// What lies there now, whatever is listed.
    pub fn stored(&self) -> Vec<String> {
        let below = |root: &Path| {
            let names = files_below(root).into_iter().map(|path| path.strip_prefix(root).unwrap().to_string_lossy().into_owned());
            names.collect::<Vec<String>>()
        };
        match &self.place {
            Place::S3(s3) => s3.names().iter().filter_map(|name| name.strip_prefix("pre/")).map(str::to_owned).collect(),
            Place::Fs(_) => below(&self.keepd.path("behind")),
            Place::Dav(dav) => below(&dav.data()),
            Place::Plugin(plugin) => below(&plugin.objects()),
        }
    }

    /// Something new to back up, and something that nothing needs any more after it.
    pub fn change(&mut self) {
        self.changes += 1;
        fs::write(self.keepd.path("files/changes"), noise(700_000, self.changes * 7919)).unwrap();
        fs::write(self.keepd.path(&format!("files/one-of-{}", self.changes % 5)), noise(3_000, self.changes + 77)).unwrap();
    }

    /// A backup without any fault, which must be good.
    pub fn backed_up(&mut self) {
        self.change();
        let out = self.keepd.ctl(&["backup", "shop", "--json"]);
        assert!(out.status.success(), "{}\n{}", text(&out), self.keepd.log());
        self.made(&out);
    }

    /// Takes note of what a backup says that it made, and of what retention may have removed then.
    pub fn made(&mut self, out: &Output) {
        let run: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
        if let Some(id) = run["backup"].as_str() {
            self.adopt(id);
            self.expect(id);
        }
        let excess = self.expected.len().saturating_sub(KEPT);
        self.expected.drain(..excess);
    }

    /// Takes note of backups that were made by runs that could not tell it any more: they count for retention. Nothing was changed since. Only
    /// those of this destination: what was copied from it stays elsewhere when retention has removed it here.
    fn adopt(&mut self, told: &str) {
        let listed = self.keepd.json(&["list", "--job", "shop", "--destination", NAME]);
        let ids = listed.as_array().unwrap().iter().rev().map(|b| b["id"].as_str().unwrap());
        for id in ids.filter(|id| *id != told).collect::<Vec<_>>() {
            if !self.expected.iter().any(|(known, _)| known == id) {
                self.expect(id);
            }
        }
    }

    /// From now on this backup is to be there, with the files as they are now.
    pub fn expect(&mut self, id: &str) {
        let files = tree(&self.keepd.path("files"));
        self.expected.push((id.to_owned(), files));
    }

    /// Somebody removed it.
    pub fn expect_no_more(&mut self, id: &str) {
        self.expected.retain(|(known, _)| known != id);
    }

    pub fn oldest(&self) -> String {
        self.expected[0].0.clone()
    }

    pub fn newest(&self) -> (String, Tree) {
        self.expected.last().unwrap().clone()
    }

    /// The key file that the configuration names.
    pub fn key(&self) -> PathBuf {
        let text = fs::read_to_string(self.keepd.path("keepd.toml")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("key_file = ")).unwrap();
        PathBuf::from(line.trim().trim_matches('"'))
    }

    pub fn rescue(&self, command: &str, arguments: &[&str]) -> Output {
        self.rescue_with(&self.key(), command, arguments)
    }

    pub fn rescue_with(&self, key: &Path, command: &str, arguments: &[&str]) -> Output {
        let mut run = Command::new(keepd_binary());
        run.args(["rescue", command, "--destination"]).arg(self.keepd.path("keepd.toml")).args(["--name", NAME, "--key"]);
        run.arg(key).args(arguments).current_dir(self.keepd.dir.path()).output().unwrap()
    }

    /// A number that was not given before.
    pub fn next_number(&mut self) -> u64 {
        self.changes += 1;
        self.changes
    }

    /// Of an operation that stored the configuration: it opens with the key alone, and is to stay. What is wrong with it.
    pub fn config_stored(&mut self) -> Option<String> {
        let listed = self.keepd.json(&["config", "list", NAME]);
        let mut names: Vec<String> = listed["backups"].as_array().unwrap().iter().map(|b| b["name"].as_str().unwrap().to_owned()).collect();
        names.sort();
        let Some(newest) = names.pop() else { return Some("a stored configuration is not listed".into()) };
        let to = self.keepd.path("fetched.json.gz.enc");
        let _ = fs::remove_file(&to);
        let fetched = self.keepd.ctl(&["config", "fetch", &newest, "--destination", NAME, "-o", to.to_str().unwrap()]);
        let proven = self.keepd.ctl(&["config", "validate", to.to_str().unwrap(), "--key", self.key().to_str().unwrap()]);
        if !fetched.status.success() || !proven.status.success() {
            return Some(format!("{newest} was stored and does not open: {}{}", text(&fetched), text(&proven)));
        }
        if !self.configs.contains(&newest) {
            self.configs.push(newest);
        }
        let excess = self.configs.len().saturating_sub(KEPT_CONFIGS);
        self.configs.drain(..excess);
        None
    }

    /// Of archives: those that lie there and are in no list, so that nobody will ever remove them.
    pub fn strays(&self) -> Vec<String> {
        if self.layout == Layout::Repository {
            return Vec::new();
        }
        let swept = self.keepd.ctl(&["prune", NAME]);
        if !swept.status.success() {
            return vec![format!("nothing can be swept: {}", text(&swept))];
        }
        let listed = self.keepd.json(&["list", "--destination", NAME]).as_array().unwrap().len();
        let is_archive = |name: &&String| name.contains(".tar") && !name.ends_with(".meta.json");
        let there: Vec<String> = self.stored().iter().filter(is_archive).cloned().collect();
        if there.len() > listed { there } else { Vec::new() }
    }

    /// Backups that were told to be there and are not, or that do not come back as they were, as a reader sees it that has no state.
    pub fn lost(&self) -> Vec<String> {
        let listed = self.rescue("list", &["--json"]);
        if !listed.status.success() {
            return vec![format!("nothing can be listed: {}", text(&listed))];
        }
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let stored = self.stored();
        let mut lost: Vec<String> = self
            .configs
            .iter()
            .filter(|name| !stored.iter().any(|there| there.ends_with(name.as_str())))
            // A new key stores it anew by itself: names begin with the time, and retention takes what has enough newer ones.
            .filter(|name| {
                let newer = |there: &&String| there.contains("config_backup_") && there.rsplit('/').next() > name.rsplit('/').next();
                stored.iter().filter(newer).count() < KEPT_CONFIGS
            })
            .map(|name| format!("{name} is gone"))
            .collect();
        for (id, files) in &self.expected {
            if !listed.contains(id.as_str()) {
                lost.push(format!("{id} is not listed"));
                continue;
            }
            let to = self.keepd.path("whole");
            let _ = fs::remove_dir_all(&to);
            let out = self.rescue("restore", &[id, "--to", to.to_str().unwrap()]);
            if !out.status.success() || tree(&to.join("files")) != *files {
                lost.push(format!("{id} does not come back: {}", text(&out)));
            }
        }
        lost
    }

    /// Objects that no backup can need: nothing may be left over after a prune.
    pub fn left_over(&self) -> Vec<String> {
        let strange = |name: &&String| {
            // Configurations are stored for themselves, and retention looks after them.
            let known = ["packs/", "index/", "backups/", "marks/", "audit/", "keys/", "config/config_backup_", "keepd.json", "writer.json"];
            !known.iter().any(|d| name.contains(d))
        };
        self.s3().names().iter().filter(|name| name.starts_with("pre/")).filter(strange).cloned().collect()
    }
}
