//! Bringing a dump back into a server: into a scratch database first, checked there, and only then put in place.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::{Facts, SourceError};
use crate::process::Running;

/// What is brought back, and as what.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Wanted {
    /// The database that was captured.
    pub database: String,
    /// What it is to be called.
    pub target: String,
    /// Only these; none means all.
    pub tables: Vec<String>,
    /// A database of the name may be there: it is kept under another name.
    pub replace: bool,
    /// Objects belong to whom they belonged.
    pub owners: bool,
    /// Who uses the database that is replaced is stopped just before.
    pub stops: bool,
    /// The facts of the source.
    pub facts: Facts,
    /// The database it is loaded into first.
    pub scratch: String,
    /// What one that is in the way is called then.
    pub aside: String,
}

impl Wanted {
    /// A database as `target`, by a run (its id): in no place that is taken, with its owners.
    pub fn of(database: &str, target: &str, facts: Facts, run: &str) -> Self {
        // Only what every server takes in a name.
        let run: String = run.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_lowercase();
        let short: String = target.chars().take(24).collect();
        Self {
            database: database.to_owned(),
            target: target.to_owned(),
            tables: Vec::new(),
            replace: false,
            owners: true,
            stops: false,
            facts,
            scratch: scratch_name(&run),
            aside: format!("{short}_before_{run}"),
        }
    }

    /// Rows of the tables that are wanted, by table, as they were captured. Empty when they were not counted.
    pub fn rows(&self) -> Vec<(String, u64)> {
        let wanted = |name: &String| {
            let last = name.rsplit('.').next().unwrap_or(name);
            self.tables.is_empty() || self.tables.iter().any(|t| t == name || t == last)
        };
        rows(&self.facts, &self.database).into_iter().filter(|(name, _)| wanted(name)).collect()
    }

    /// An error when a table is wanted that the backup has not.
    pub fn has_tables(&self) -> Result<(), SourceError> {
        let known = self.rows();
        let has = |wanted: &&String| known.iter().any(|(name, _)| name == *wanted || name.rsplit('.').next() == Some(wanted.as_str()));
        match self.tables.iter().find(|t| !has(t)) {
            Some(missing) if self.facts.contains_key("tables") => {
                let all = Self { tables: Vec::new(), ..self.clone() }.rows();
                let some: Vec<&str> = all.iter().take(20).map(|(name, _)| name.as_str()).collect();
                let more = if all.len() > some.len() { " …" } else { "" };
                Err(SourceError::Failed(format!(
                    "database {} has no table '{missing}' in this backup; it has {}{more}",
                    self.database,
                    some.join(", ")
                )))
            }
            _ => Ok(()),
        }
    }

    /// An error unless the database that is there may be replaced.
    pub fn may_replace(&self) -> Result<(), SourceError> {
        match self.replace {
            true => Ok(()),
            false => Err(SourceError::Failed(format!(
                "database {} is there already; give another name, or --replace to have it kept as {} and replaced",
                self.target, self.aside
            ))),
        }
    }

    /// A fact of this database.
    pub fn fact(&self, name: &str) -> Option<&str> {
        self.facts.get("databases")?.get(&self.database)?.get(name)?.as_str()
    }
}

/// Rows of a database's tables as a server source's facts have them, by table. Empty when they were not counted.
pub fn rows(facts: &Facts, database: &str) -> Vec<(String, u64)> {
    let Some(tables) = facts.get("tables").and_then(|t| t.as_object()) else { return Vec::new() };
    let databases: Vec<&String> = facts.get("databases").and_then(|d| d.as_object()).map(|d| d.keys().collect()).unwrap_or_default();
    // A database's name may begin like another one's.
    let within = |name: &str, database: &str| name.strip_prefix(database).and_then(|n| n.strip_prefix('.')).map(str::to_owned);
    let own = |name: &str| match databases.len() {
        0 | 1 => Some(name.to_owned()),
        _ => {
            let of = databases.iter().filter(|d| within(name, d).is_some()).max_by_key(|d| d.len())?;
            within(name, of).filter(|_| of.as_str() == database)
        }
    };
    tables.iter().filter_map(|(name, rows)| Some((own(name)?, rows.as_u64()?))).collect()
}

/// A server whose rows can be counted as they are now.
pub trait Counter {
    /// The databases that the source means.
    fn databases(&self, cancel: &CancellationToken) -> Result<Vec<String>, SourceError>;

    /// Rows of all tables that a dump would have, by the names that facts give them. `known`: tables that a dump did have, which count whatever
    /// is excluded now. None: there is no such database.
    fn rows_now(
        &self,
        database: &str,
        known: &[(String, u64)],
        cancel: &CancellationToken,
    ) -> Result<Option<Vec<(String, u64)>>, SourceError>;
}

/// A server that takes dumps back.
pub trait Loader {
    /// Looks whether it can be done at all, before anything is changed. `stops`: whoever uses the database will be stopped before it is replaced.
    fn look(&self, wanted: &Wanted, stops: bool, cancel: &CancellationToken) -> Result<(), SourceError>;

    /// Makes the scratch database and starts what reads the dump on its standard input.
    fn begin(&self, wanted: &Wanted, cancel: &CancellationToken) -> Result<Running, SourceError>;

    /// Compares the scratch database with what was captured; says what it found.
    fn verify(&self, wanted: &Wanted, cancel: &CancellationToken) -> Result<String, SourceError>;

    /// Puts the scratch database in place; what is worth telling.
    fn publish(&self, wanted: &Wanted, cancel: &CancellationToken) -> Result<Vec<String>, SourceError>;

    /// Takes back what `publish` did, wherever that was interrupted, also when it was not begun: what was there is there again, and what was put
    /// in its place is gone. `there`: a database of that name was there. What is worth telling.
    fn take_back(&self, wanted: &Wanted, there: bool) -> Result<Vec<String>, SourceError>;

    /// After `publish`, when nothing will be taken back any more: removes what was kept for that.
    fn settle(&self, _wanted: &Wanted) -> Result<(), SourceError> {
        Ok(())
    }

    /// Whether there is a database of that name.
    fn is_there(&self, database: &str, cancel: &CancellationToken) -> Result<bool, SourceError>;

    /// Removes the scratch database.
    fn discard(&self, wanted: &Wanted) -> Result<(), SourceError>;
}

const SCRATCH: &str = "keepd_";

/// The database that a run loads into; `run` is its id in small letters and digits, time first.
pub fn scratch_name(run: &str) -> String {
    format!("{SCRATCH}{run}")
}

/// Whether a database is one that a restore loads into: it is nobody's, and may be gone in a moment.
pub fn is_scratch(database: &str) -> bool {
    let day = database.strip_prefix(SCRATCH).and_then(|run| run.split_once('t')).map(|(day, _)| day);
    day.is_some_and(|day| day.len() == 8 && day.bytes().all(|b| b.is_ascii_digit()))
}

/// An error when somebody uses a database that is to be replaced.
pub fn used_by(database: &str, users: &[String]) -> Result<(), SourceError> {
    match users.is_empty() {
        true => Ok(()),
        false => Err(SourceError::Failed(format!(
            "database {database} is in use by {}; stop what uses it, or name its services in the job (services = [\"…\"]), and try again",
            users.join("; ")
        ))),
    }
}

/// A dump's end may be waited for as long as the server builds its indexes.
pub const PATIENCE: Duration = Duration::from_secs(7 * 86_400);

/// How the error begins that says so.
pub const NOT_THE_SAME: &str = "what was loaded is not what was captured";

/// Rows that were counted beside those that were captured: fewer is an error. An extension may have brought some of its own.
pub fn compare(expected: &[(String, u64)], counted: &[(String, Option<u64>)]) -> Result<String, SourceError> {
    let mut wrong = Vec::new();
    for (table, rows) in expected {
        match counted.iter().find(|(name, _)| name == table).and_then(|(_, n)| *n) {
            Some(n) if n >= *rows => {}
            Some(n) => wrong.push(format!("{table} has {n} rows, {rows} were captured")),
            None => wrong.push(format!("{table} is not there")),
        }
    }
    if !wrong.is_empty() {
        let more = wrong.len().saturating_sub(20);
        wrong.truncate(20);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        return Err(SourceError::Failed(format!("{NOT_THE_SAME}: {}{more}", wrong.join("; "))));
    }
    if expected.is_empty() {
        return Ok("no rows were counted when it was captured, so there is nothing to compare".into());
    }
    let rows: u64 = expected.iter().map(|(_, rows)| rows).sum();
    Ok(format!("{} tables have their {rows} rows", expected.len()))
}
