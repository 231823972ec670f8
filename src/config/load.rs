//! From the main file and its drop-ins to one [`Config`], or everything that is wrong with them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use toml::de::DeTable;

use super::destination::FsRoot;
use super::paths::Surroundings;
use super::problem::{Place, Problem, Problems, Severity, quoted};
use super::reader::Table;
use super::source::FilesPlace;
use super::source_text::SourceText;
use super::texts::{self, Texts};
use super::{
    Access, Audit, Config, Coverage, Daemon, Destination, access, audit, config_backup, coverage, daemon, destination, job, overlap, value,
};

/// Reads `main`, then `conf.d/*.toml` beside it in the order of their names (those beginning with a dot are left out). Each
/// file may add tables, none may repeat one. All problems are found in one go.
pub fn load(main: &Path) -> Result<Config, Problems> {
    Texts::read(main)?.load()
}

/// The configuration of these files, or all that is wrong with them.
pub(super) fn check(main: &Path, here: &Surroundings<'_>, sources: Vec<SourceText>) -> Result<Config, Problems> {
    let tables: Vec<DeTable<'_>> = sources.iter().map(SourceText::parse).collect();
    let built = build(main, here, &sources, &tables);
    drop(tables);
    let problems: Vec<Problem> = sources.into_iter().flat_map(SourceText::into_problems).collect();
    match built {
        Some(config) if problems.is_empty() => Ok(config),
        // Nothing is ever left out without a word.
        None if problems.is_empty() => {
            Err(Problems(vec![Problem::of_key(Severity::Error, "", "something is wrong that keepd cannot name; please report this")]))
        }
        _ => Err(Problems(problems)),
    }
}

/// The destinations of a configuration whose other tables may be missing, for a rescue.
pub fn load_destinations(main: &Path) -> Result<BTreeMap<String, Destination>, Problems> {
    let sources = texts::sources(main).map_err(|problem| Problems(vec![problem]))?;
    let tables: Vec<DeTable<'_>> = sources.iter().map(SourceText::parse).collect();
    let mut found = Collected::default();
    for (source, table) in sources.iter().zip(&tables) {
        found.add(&Table::root(source, table));
    }
    let known = Known {
        encryption: BTreeSet::new(),
        destinations: BTreeSet::new(),
        whole: sources.iter().all(SourceText::is_whole),
        directory: absolute(main).parent().map(Path::to_owned).unwrap_or_default(),
        is_rescue: true,
    };
    let built =
        found.destination.iter().filter_map(|(name, table)| Some(((*name).to_owned(), destination::destination(name, table, &known).0?)));
    let built: BTreeMap<String, Destination> = built.collect();
    drop(found);
    drop(tables);
    let problems: Vec<Problem> = sources.into_iter().flat_map(SourceText::into_problems).collect();
    if problems.is_empty() { Ok(built) } else { Err(Problems(problems)) }
}

/// The names that other tables may refer to.
pub(super) struct Known {
    pub encryption: BTreeSet<String>,
    pub destinations: BTreeSet<String>,
    /// False when a file could not be made out: then a name that is missing may only seem to be.
    pub whole: bool,
    /// Where relative key files are looked for.
    pub directory: PathBuf,
    /// Only destinations count, and not what they are encrypted with.
    pub is_rescue: bool,
}

/// The tables of all files, each name once.
#[derive(Default)]
struct Collected<'a> {
    daemon: Option<Table<'a>>,
    coverage: Option<Table<'a>>,
    config_backup: Option<Table<'a>>,
    access: Option<Table<'a>>,
    audit: Option<Table<'a>>,
    encryption: Vec<(&'a str, Table<'a>)>,
    destination: Vec<(&'a str, Table<'a>)>,
    job: Vec<(&'a str, Table<'a>)>,
    claimed: BTreeMap<String, Place>,
}

fn build<'a>(main: &Path, here: &Surroundings<'_>, sources: &'a [SourceText], tables: &'a [DeTable<'a>]) -> Option<Config> {
    let mut found = Collected::default();
    for (source, table) in sources.iter().zip(tables) {
        found.add(&Table::root(source, table));
    }
    let known = Known {
        encryption: found.encryption.iter().map(|(n, _)| (*n).to_owned()).filter(|n| n != "none").collect(),
        destinations: found.destination.iter().map(|(n, _)| (*n).to_owned()).collect(),
        whole: sources.iter().all(SourceText::is_whole),
        directory: absolute(main).parent().map(Path::to_owned).unwrap_or_default(),
        is_rescue: false,
    };

    // Every builder notes what is wrong and then gives None; all are asked, so that all is noted.
    let mut complete = true;
    let daemon = found.daemon(here, sources);
    complete &= daemon.is_some();
    let coverage = found.coverage.as_ref().map_or_else(|| Some(Coverage::default()), coverage::coverage);
    complete &= coverage.is_some();

    // A job whose table is wrong is there all the same.
    let names: BTreeSet<String> = found.job.iter().map(|(name, _)| (*name).to_owned()).collect();
    let names = known.whole.then_some(&names);
    let access = found.access.as_ref().map_or_else(|| Some(Access::default()), |table| access::access(table, names));
    complete &= access.is_some();
    let audit = found.audit.as_ref().map_or_else(|| Some(Audit::default()), audit::audit);
    complete &= audit.is_some();

    let mut encryption = BTreeMap::new();
    for (name, table) in &found.encryption {
        match destination::encryption(name, table, &known) {
            Some(profile) => drop(encryption.insert((*name).to_owned(), profile)),
            None => complete = false,
        }
    }
    let mut destinations = BTreeMap::new();
    let mut roots: Vec<FsRoot<'_>> = Vec::new();
    for (name, table) in &found.destination {
        let (destination, root) = destination::destination(name, table, &known);
        roots.extend(root);
        match destination {
            Some(destination) => drop(destinations.insert((*name).to_owned(), destination)),
            None => complete = false,
        }
    }
    let mut jobs = BTreeMap::new();
    let mut places: Vec<FilesPlace<'_>> = Vec::new();
    for (name, table) in &found.job {
        match job::job(name, table, &known, &mut places) {
            Some(job) => drop(jobs.insert((*name).to_owned(), job)),
            None => complete = false,
        }
    }
    let config_backup = match &found.config_backup {
        Some(table) => config_backup::config_backup(table, &known, &destinations).map(Some),
        None => Some(None),
    };
    complete &= config_backup.is_some();
    if let Some(daemon) = &daemon {
        jobs.values_mut().for_each(|job| overlap::leave_out(job, &daemon.state_dir));
    }
    overlap::check(&roots, &places, daemon.as_ref().map(|d| d.state_dir.as_path()));
    if !complete {
        return None;
    }
    let files = sources.iter().map(|s| absolute(s.path())).collect();
    Some(Config {
        files,
        daemon: daemon?,
        encryption,
        destinations,
        jobs,
        coverage: coverage?,
        config_backup: config_backup?,
        access: access?,
        audit: audit?,
    })
}

impl<'a> Collected<'a> {
    fn add(&mut self, root: &Table<'a>) {
        root.check_keys(&["daemon", "encryption", "destination", "job", "coverage", "config_backup", "access", "audit"], &[]);
        if let Some(table) = root.get("daemon").and_then(|item| item.table("a table: [daemon]"))
            && self.claim(&table)
        {
            self.daemon = Some(table);
        }
        if let Some(table) = root.get("coverage").and_then(|item| item.table("a table: [coverage]"))
            && self.claim(&table)
        {
            self.coverage = Some(table);
        }
        if let Some(table) = root.get("config_backup").and_then(|item| item.table("a table: [config_backup]"))
            && self.claim(&table)
        {
            self.config_backup = Some(table);
        }
        if let Some(table) = root.get("access").and_then(|item| item.table("a table: [access]"))
            && self.claim(&table)
        {
            self.access = Some(table);
        }
        if let Some(table) = root.get("audit").and_then(|item| item.table("a table: [audit]"))
            && self.claim(&table)
        {
            self.audit = Some(table);
        }
        for section in ["encryption", "destination", "job"] {
            let Some(outer) = root.get(section).and_then(|item| item.table(&format!("tables such as [{section}.NAME]"))) else {
                continue;
            };
            for (name, item) in outer.items() {
                let Some(table) = item.table(&format!("a table: [{section}.NAME]")) else { continue };
                if !self.claim(&table) {
                    continue;
                }
                if !value::is_name(name) {
                    let text = "is no name; allowed are letters, digits and . _ - (a letter or digit first), at most 64 of them";
                    table.report(format!("{} {text}", quoted(name)));
                }
                match section {
                    "encryption" => self.encryption.push((name, table)),
                    "destination" => self.destination.push((name, table)),
                    _ => self.job.push((name, table)),
                }
            }
        }
    }

    /// False, and noted, when another file has this table already.
    fn claim(&mut self, table: &Table<'a>) -> bool {
        if let Some(first) = self.claimed.get(&table.path) {
            table.report(format!("is defined already at {first}; a table must stand in one file only, so remove one of the two"));
            return false;
        }
        self.claimed.insert(table.path.clone(), table.place());
        true
    }

    fn daemon(&self, here: &Surroundings<'_>, sources: &[SourceText]) -> Option<Daemon> {
        let empty = DeTable::new();
        let table = match (&self.daemon, sources.first()) {
            (Some(table), _) => table.clone(),
            (None, Some(main)) => return daemon::daemon(&Table::root(main, &empty), here),
            (None, None) => return None,
        };
        daemon::daemon(&table, here)
    }
}

/// The same path whatever the working directory is later.
pub(super) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
