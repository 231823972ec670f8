//! Coverage: what on this machine holds data and is in no job.
//!
//! In: the configuration and the machine: its mounts ([`mounts`]), the servers of databases ([`servers`]), the services of systemd ([`services`]), and
//! every file of the local file systems that may be a SQLite database ([`sqlite`]). Out: items, each with the sources that hold it ([`held`]) or the
//! reason why it is a gap. The ledger keeps what the last scan found and which gaps somebody acknowledged ([`record`]).
//!
//! The worst that can happen is a list that looks complete and is not: what cannot be looked at is counted and told in a note.

mod directories;
mod held;
mod mounts;
mod processes;
mod record;
mod servers;
mod services;
mod sqlite;

use std::collections::{BTreeMap, HashSet};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ignore::gitignore::{Gitignore, GitignoreBuilder};
use jiff::Timestamp;
use keepd_protocol::model::{Coverage, CoverageItem, Level};

pub use record::{Unknown, acknowledge, counts, last};

use self::held::Jobs;
use self::mounts::Mounts;
use super::backup::Environment;
use super::live::{Failure, Finish, LiveRun};
use crate::config::Config;

/// Items that are kept; the others are counted.
const MAX_ITEMS: usize = 10_000;
/// Things that cannot be read are named so many times.
const NAMED: usize = 5;
/// Of the texts that could not be foreseen.
const MAX_NOTES: usize = 100;

/// What a scan works with.
struct Scan<'a> {
    env: &'a Environment,
    /// The configuration as it is by now.
    current: &'a dyn Fn() -> Arc<Config>,
    live: &'a LiveRun,
    all: bool,
    /// With all links resolved.
    roots: Vec<PathBuf>,
    excludes: Gitignore,
    /// By device and inode: what is keepd's own.
    own: HashSet<(u64, u64)>,
    jobs: Jobs,
    mounts: Mounts,
    found: Found,
    /// The databases among what was found.
    databases: HashSet<PathBuf>,
    /// Data directories of servers whose databases are items of their own.
    served: Vec<PathBuf>,
}

/// What was found so far.
#[derive(Default)]
struct Found {
    items: Vec<CoverageItem>,
    known: HashSet<String>,
    cut: u64,
    notes: Vec<String>,
    skipped: BTreeMap<String, u64>,
    looked_at: u64,
    unreadable: u64,
    /// The first that could not be read.
    named: Vec<String>,
}

impl Found {
    fn item(&mut self, item: CoverageItem) {
        let is_full = self.items.len() >= MAX_ITEMS;
        match is_full || self.known.insert(record::key(&item)) {
            true if is_full => self.cut += 1,
            true => self.items.push(item),
            false => {}
        }
    }

    fn note(&mut self, text: String) {
        if self.notes.len() < MAX_NOTES && !self.notes.contains(&text) {
            self.notes.push(text.chars().take(2000).collect());
        }
    }

    fn skip(&mut self, what: &str) {
        *self.skipped.entry(what.to_owned()).or_default() += 1;
    }

    fn unreadable(&mut self, path: &Path, error: impl std::fmt::Display) {
        self.unreadable += 1;
        if self.named.len() < NAMED {
            self.named.push(format!("{} ({error})", shown(path)));
        }
    }
}

/// Looks at the machine and keeps what is found in the ledger.
pub fn scan(env: &Environment, current: &(dyn Fn() -> Arc<Config> + Sync), all: bool, live: &LiveRun) -> Result<Finish, Failure> {
    // On a thread of its own, whose niceness (and with it the priority of its reads) ends with it.
    let scanned = std::thread::scope(|scope| {
        let work = || {
            let _ = rustix::process::nice(19);
            scan_now(env, current, all, live)
        };
        scope.spawn(work).join()
    });
    scanned.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn scan_now(env: &Environment, current: &dyn Fn() -> Arc<Config>, all: bool, live: &LiveRun) -> Result<Finish, Failure> {
    let time = Timestamp::now();
    live.step("looking at mounts");
    let mut found = Found::default();
    let roots = roots(&env.config, &mut found);
    let mounts = Mounts::read(&mut found);
    let jobs = Jobs::new(&env.config, &mut found)?;
    let own = own(&env.config);
    let excludes = excludes(&env.config)?;
    let mut scan =
        Scan { env, current, live, all, roots, excludes, own, jobs, mounts, found, databases: HashSet::new(), served: Vec::new() };
    live.step("asking database servers");
    scan.servers()?;
    live.step("looking for databases");
    let volumes = scan.walk()?;
    live.step("looking at services");
    scan.services(volumes)?;
    scan.mounted();
    scan.finish(time)
}

impl Scan<'_> {
    fn check(&self) -> Result<(), Failure> {
        if self.live.cancel.is_cancelled() { Err(Failure::Cancelled) } else { Ok(()) }
    }

    /// Whether a path (without links) is where is looked, and nobody said that it is not.
    fn is_meant(&self, path: &Path, is_directory: bool) -> bool {
        self.roots.iter().any(|root| path.starts_with(root))
            && !(path.parent().is_some() && self.excludes.matched_path_or_any_parents(path, is_directory).is_ignore())
    }

    /// Whether the whole machine is meant.
    fn is_everywhere(&self) -> bool {
        self.roots.iter().any(|root| root.parent().is_none())
    }

    /// Writes down what was found, and says it in short.
    fn finish(mut self, time: Timestamp) -> Result<Finish, Failure> {
        self.check()?;
        if self.found.unreadable > 0 {
            let more = self.found.unreadable - self.found.named.len() as u64;
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let text = format!("{} could not be read: {}{more}", self.found.unreadable, self.found.named.join(", "));
            self.found.note(text);
        }
        let found = self.found;
        let coverage = Coverage {
            run: self.live.id(),
            all: self.all,
            items: found.items,
            cut: found.cut,
            skipped: found.skipped,
            notes: found.notes,
            looked_at: found.looked_at,
            unreadable: found.unreadable,
            ..Coverage::default()
        };
        let coverage = record::keep(&self.env.ledger, coverage, time)?;
        let counts = &coverage.counts;
        self.live.message(
            Level::Info,
            format!(
                "{} gaps ({} acknowledged), {} covered, {} files looked at",
                counts.gaps + counts.acknowledged,
                counts.acknowledged,
                counts.covered,
                coverage.looked_at
            ),
        );
        Ok(Finish::Good)
    }
}

/// The roots that are there, none inside another.
fn roots(config: &Config, found: &mut Found) -> Vec<PathBuf> {
    let mut roots = Vec::new();
    for root in &config.coverage.roots {
        match root.canonicalize() {
            Ok(root) => roots.push(root),
            Err(e) => found.unreadable(root, e),
        }
    }
    roots.sort();
    roots.dedup();
    let all = roots.clone();
    roots.retain(|root| !all.iter().any(|other| other != root && root.starts_with(other)));
    roots
}

fn excludes(config: &Config) -> Result<Gitignore, Failure> {
    patterns(config.coverage.exclude.iter().map(String::as_str))
}

/// A matcher of absolute paths.
fn patterns<'p>(patterns: impl IntoIterator<Item = &'p str>) -> Result<Gitignore, Failure> {
    let mut builder = GitignoreBuilder::new("/");
    for pattern in patterns {
        builder.add_line(None, pattern).map_err(|e| Failure::Failed(format!("the pattern '{pattern}' is wrong: {e}")))?;
    }
    builder.build().map_err(|e| Failure::Failed(format!("the patterns are wrong: {e}")))
}

/// The state directory and the directories of destinations.
fn own(config: &Config) -> HashSet<(u64, u64)> {
    let destinations = config.destinations.values().filter_map(|d| d.directory()).map(Path::new);
    let own = destinations.chain([config.daemon.state_dir.as_path()]);
    own.filter_map(|path| path.metadata().ok()).map(|stat| (stat.dev(), stat.ino())).collect()
}

/// A path as text; bytes that are not UTF-8 as \xNN.
fn shown(path: &Path) -> String {
    let chunks = path.as_os_str().as_bytes().utf8_chunks();
    chunks.map(|c| c.valid().to_owned() + &c.invalid().iter().map(|b| format!("\\x{b:02x}")).collect::<String>()).collect()
}

/// A time of the file system or of a server, RFC 3339.
fn written(seconds: i64) -> Option<String> {
    Timestamp::from_second(seconds).ok().map(|t| t.to_string())
}

/// A source of a job as it would be written; None for a path that TOML cannot hold.
fn suggestion(job: Option<&str>, key: &str, path: &Path, more: &str) -> Option<String> {
    let path = toml::Value::from(path.to_str()?);
    Some(format!("[[job.{}.source]]\n{key} = {path}\n{more}", job.unwrap_or("NAME")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_any_bytes_are_shown_and_only_text_is_suggested() {
        let odd = Path::new(std::ffi::OsStr::from_bytes(b"/srv/a\xff\"b.db"));
        assert_eq!(shown(odd), "/srv/a\\xff\"b.db");
        assert_eq!(suggestion(None, "sqlite", odd, ""), None);
        let quoted = suggestion(Some("shop"), "sqlite", Path::new("/srv/a\"\\b\n.db"), "").unwrap();
        let read: toml::Table = quoted.parse().unwrap();
        assert_eq!(read["job"]["shop"]["source"][0]["sqlite"].as_str(), Some("/srv/a\"\\b\n.db"), "{quoted}");
    }

    #[test]
    fn what_is_found_has_a_bound() {
        let mut found = Found::default();
        let item = |n: usize| CoverageItem { what: n.to_string(), ..CoverageItem::default() };
        (0..10).chain(0..10).for_each(|n| found.item(item(n)));
        assert_eq!(found.items.len(), 10, "each once");
        (10..MAX_ITEMS + 5).for_each(|n| found.item(item(n)));
        assert_eq!((found.items.len(), found.cut), (MAX_ITEMS, 5));
        (0..200).for_each(|n| found.note(format!("note {n}")));
        assert_eq!(found.notes.len(), MAX_NOTES);
    }
}
