//! `[job.*]`: when, what, where to, how long.

use std::path::PathBuf;
use std::time::Duration;

use ignore::gitignore::{Gitignore, GitignoreBuilder};
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use super::destination::retention;
use super::load::Known;
use super::problem::{did_you_mean, quoted};
use super::reader::{Item, NOT_BUILT, Table};
use super::{FilesSource, Job, Retention, Retry, Schedule, Source, SourceKind, SqliteSource, Suspect, Verify, cron};

/// A path a job reads, with what it leaves out and where the job's backups go.
pub(super) struct FilesPlace<'a> {
    pub path: PathBuf,
    pub item: Item<'a>,
    /// None for a database, which is a single file.
    pub exclude: Option<Gitignore>,
    pub destinations: Vec<String>,
}

pub(super) fn job<'a>(name: &str, table: &Table<'a>, known: &Known, places: &mut Vec<FilesPlace<'a>>) -> Option<Job> {
    table.check_keys(
        &["enabled", "schedule", "every", "at", "timezone", "jitter", "max_age", "destinations", "retention", "suspect", "retry", "source"],
        &[(&["services", "quiesce", "hooks", "health"], NOT_BUILT)],
    );
    let enabled = table.optional("enabled", Item::boolean, true);
    let schedule = schedule(table);
    let timezone = table.optional("timezone", |item| timezone(item).map(Some), None);
    let jitter = jitter(table, &schedule);
    let max_age = table.optional("max_age", |item| item.duration(Duration::from_secs(1)).map(Some), None);
    let destinations = destinations(table, known);
    let retention = table.optional("retention", retention, Retention::default());
    let suspect = table.optional("suspect", suspect, Suspect::default());
    let usual = Retry { attempts: 1, backoff: DEFAULT_BACKOFF };
    let retry = table.optional("retry", |item| retry(item, &usual), usual.clone());
    let sources = sources(name, table, destinations.as_deref().unwrap_or_default(), places);
    Some(Job {
        name: name.to_owned(),
        enabled: enabled?,
        schedule: schedule?,
        timezone: timezone?,
        jitter: jitter?,
        max_age: max_age?,
        destinations: destinations?,
        retention: retention?,
        suspect: suspect?,
        retry: retry?,
        sources: sources?,
    })
}

const DEFAULT_BACKOFF: Duration = Duration::from_secs(60);

fn schedule(table: &Table<'_>) -> Option<Option<Schedule>> {
    const WAYS: [&str; 3] = ["schedule", "every", "at"];
    let given: Vec<&str> = WAYS.into_iter().filter(|key| table.has(key)).collect();
    if let [first, second, ..] = given.as_slice()
        && let Some(item) = table.get(second)
    {
        item.report(format!("'{first}' is there as well; only one of schedule, every and at can say when the job is due"));
    }
    let found = [
        table.optional("schedule", |item| cron_text(item).map(|t| Some(Schedule::Cron(t))), None),
        table.optional("every", |item| item.duration(Duration::from_secs(1)).map(|d| Some(Schedule::Every(d))), None),
        table.optional("at", |item| at(item).map(|t| Some(Schedule::At(t))), None),
    ];
    match (given.len(), found) {
        (0 | 1, [Some(a), Some(b), Some(c)]) => Some(a.or(b).or(c)),
        _ => None,
    }
}

fn cron_text(item: &Item<'_>) -> Option<String> {
    let text = item.text("a cron expression such as \"30 2 * * *\", or a word such as \"@daily\"")?;
    cron::parse(text).map_err(|e| item.report_within(e.at, e.text)).ok()?;
    Some(text.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn at(item: &Item<'_>) -> Option<DateTime> {
    const WANTED: &str = "a date and time without offset such as \"2026-12-24T18:00\", meant in the job's timezone";
    let bare = item.datetime_text();
    let text = match &bare {
        Some(text) => text.as_str(),
        None => item.text(WANTED)?,
    };
    let found = ["%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M"]
        .iter()
        .find_map(|format| DateTime::strptime(format, text).ok());
    if found.is_none() {
        item.report(format!("{} is not understood; allowed is {WANTED}", quoted(text)));
    }
    found
}

fn timezone(item: &Item<'_>) -> Option<String> {
    let name = item.text("a time zone's name such as \"Europe/Berlin\"")?;
    if TimeZone::get(name).is_err() {
        let all: Vec<String> = jiff::tz::db().available().map(|n| n.as_str().to_owned()).collect();
        let guess = did_you_mean(name, all.iter().map(String::as_str));
        item.report(format!("there is no time zone {}; allowed are IANA names such as \"Europe/Berlin\" or \"UTC\"{guess}", quoted(name)));
        return None;
    }
    Some(name.to_owned())
}

fn jitter(table: &Table<'_>, schedule: &Option<Option<Schedule>>) -> Option<Duration> {
    let Some(item) = table.get("jitter") else { return Some(Duration::ZERO) };
    let jitter = item.duration(Duration::ZERO)?;
    if let Some(Some(Schedule::Every(every))) = schedule
        && jitter >= *every
    {
        item.report("must be shorter than 'every'");
        return None;
    }
    Some(jitter)
}

pub(super) fn retry(item: &Item<'_>, usual: &Retry) -> Option<Retry> {
    let table = item.table("a table such as { attempts = 3, backoff = \"1m\" }")?;
    table.check_keys(&["attempts", "backoff"], &[]);
    let attempts = table.optional("attempts", |i| i.number(1..=100).and_then(|n| u32::try_from(n).ok()), usual.attempts);
    let backoff = table.optional("backoff", |i| i.duration(Duration::ZERO), usual.backoff);
    Some(Retry { attempts: attempts?, backoff: backoff? })
}

fn suspect(item: &Item<'_>) -> Option<Suspect> {
    let table = item.table("a table such as { fewer_rows = 50, larger = 10 }, 0 to turn a rule off")?;
    table.check_keys(&["fewer_rows", "fewer_files", "smaller", "larger", "changed", "incompressible"], &[]);
    let usual = Suspect::default();
    let number = |key: &str, most: u64, usual: u32| table.optional(key, |i| i.number(0..=most).and_then(|n| u32::try_from(n).ok()), usual);
    let fewer_rows = number("fewer_rows", 100, usual.fewer_rows);
    let fewer_files = number("fewer_files", 100, usual.fewer_files);
    let smaller = number("smaller", 100, usual.smaller);
    let larger = number("larger", 1_000_000, usual.larger);
    let changed = number("changed", 100, usual.changed);
    let incompressible = number("incompressible", 100, usual.incompressible);
    Some(Suspect {
        fewer_rows: fewer_rows?,
        fewer_files: fewer_files?,
        smaller: smaller?,
        larger: larger?,
        changed: changed?,
        incompressible: incompressible?,
    })
}

fn destinations(table: &Table<'_>, known: &Known) -> Option<Vec<String>> {
    const WANTED: &str = "an array of names of [destination.*] tables";
    let item = table.require("destinations", "where the backups go, an array such as [\"local\"]")?;
    let list = item.list(WANTED)?;
    if list.is_empty() {
        item.report("is empty; a job needs at least one destination");
        return None;
    }
    let mut names: Vec<String> = Vec::new();
    let mut good = true;
    for item in &list {
        let Some(name) = item.text("the name of a [destination.*] table") else {
            good = false;
            continue;
        };
        if names.iter().any(|n| n == name) {
            item.report(format!("{} is there twice", quoted(name)));
            good = false;
        } else if !known.destinations.contains(name) {
            if known.whole {
                let candidates = known.destinations.iter().map(String::as_str);
                let allowed = match known.destinations.len() {
                    0 => "none is defined, add [destination.NAME]".to_owned(),
                    _ => format!("allowed are {}", candidates.clone().collect::<Vec<_>>().join(", ")),
                };
                item.report(format!("there is no destination {}; {allowed}{}", quoted(name), did_you_mean(name, candidates)));
            }
            good = false;
        } else {
            names.push(name.to_owned());
        }
    }
    good.then_some(names)
}

fn sources<'a>(job: &str, table: &Table<'a>, destinations: &[String], places: &mut Vec<FilesPlace<'a>>) -> Option<Vec<Source>> {
    let item = table.require("source", &format!("what to back up; add at least one [[job.{job}.source]]"))?;
    if item.is_table() {
        item.report(format!("must be an array of tables; write [[job.{job}.source]] with two brackets"));
        return None;
    }
    let list = item.list(&format!("an array of tables [[job.{job}.source]]"))?;
    if list.is_empty() {
        item.report(format!("is empty; add at least one [[job.{job}.source]]"));
        return None;
    }
    let mut sources: Vec<Source> = Vec::new();
    let mut good = true;
    for item in &list {
        let Some(table) = item.table(&format!("a table [[job.{job}.source]]")) else {
            good = false;
            continue;
        };
        let Some((kind, place)) = source_kind(&table) else {
            good = false;
            continue;
        };
        let name = source_name(&table, &kind);
        places.push(FilesPlace { destinations: destinations.to_vec(), ..place });
        let Some(name) = name else {
            good = false;
            continue;
        };
        if sources.iter().any(|s| s.name == name) {
            let text = format!("a source of this job is named {} already; give each a 'name' of its own", quoted(&name));
            table.get("name").map_or_else(|| table.report(&text), |item| item.report(&text));
            good = false;
        }
        sources.push(Source { name, kind });
    }
    good.then_some(sources)
}

fn source_kind<'a>(table: &Table<'a>) -> Option<(SourceKind, FilesPlace<'a>)> {
    const KINDS: [&str; 2] = ["sqlite", "files"];
    const LATER: [&str; 3] = ["postgres", "mysql", "command"];
    const FILES_ONLY: [&str; 3] = ["exclude", "one_file_system", "exclude_caches"];
    const SQLITE_ONLY: [&str; 1] = ["verify"];
    let given: Vec<&str> = KINDS.into_iter().filter(|kind| table.has(kind)).collect();
    let kind = match given.as_slice() {
        [kind] => *kind,
        [] => {
            if let Some((key, item)) = LATER.into_iter().find_map(|key| Some((key, table.get(key)?))) {
                item.report(format!("a {key} source is known, but not built into this version of keepd; allowed are sqlite and files"));
            } else {
                table.check_keys(&["name", "sqlite", "files", "verify", "exclude", "one_file_system", "exclude_caches"], &[]);
                if table.is_whole() {
                    table.report("says not what to back up; it needs one of sqlite = \"/path\" or files = \"/path\"");
                }
            }
            return None;
        }
        _ => {
            table.report("is both sqlite and files; each [[…source]] is one of them, so make two of it");
            return None;
        }
    };
    let item = table.get(kind)?;
    if kind == "sqlite" {
        table.check_keys(&["name", "sqlite", "verify"], &[(&FILES_ONLY, "is only for files sources"), (&LATER, NOT_BUILT)]);
        let verify = table.optional(
            "verify",
            |item| item.word(&[("quick", Verify::Quick), ("full", Verify::Full), ("off", Verify::Off)]),
            Verify::Quick,
        );
        let path = item.absolute_path().filter(|path| not_root(&item, path))?;
        let place = FilesPlace { path: path.clone(), item, exclude: None, destinations: Vec::new() };
        return Some((SourceKind::Sqlite(SqliteSource { path, verify: verify? }), place));
    }
    table.check_keys(
        &["name", "files", "exclude", "one_file_system", "exclude_caches"],
        &[(&SQLITE_ONLY, "is only for sqlite sources"), (&LATER, NOT_BUILT)],
    );
    let one_file_system = table.optional("one_file_system", Item::boolean, false);
    let exclude_caches = table.optional("exclude_caches", Item::boolean, true);
    let path = item.absolute_path();
    let exclude = exclude(table, path.as_deref().unwrap_or(std::path::Path::new("/")));
    let (path, (exclude, matcher)) = (path?, exclude?);
    let place = FilesPlace { path: path.clone(), item, exclude: Some(matcher), destinations: Vec::new() };
    let files = FilesSource { path, exclude, one_file_system: one_file_system?, exclude_caches: exclude_caches? };
    Some((SourceKind::Files(files), place))
}

fn not_root(item: &Item<'_>, path: &std::path::Path) -> bool {
    if path.parent().is_none() {
        item.report("must be a database file, not '/'");
    }
    path.parent().is_some()
}

/// The patterns as they are, and compiled.
fn exclude(table: &Table<'_>, root: &std::path::Path) -> Option<(Vec<String>, Gitignore)> {
    let mut builder = GitignoreBuilder::new(root);
    let mut patterns = Vec::new();
    let mut good = true;
    if let Some(item) = table.get("exclude") {
        for item in item.list("an array of patterns such as [\"*.tmp\", \"cache/\"]")? {
            let Some(pattern) = item.text("a pattern such as \"*.tmp\"") else {
                good = false;
                continue;
            };
            let wrong = if pattern.trim().is_empty() {
                Some("is empty and would match nothing".to_owned())
            } else if pattern.starts_with('#') {
                Some("begins with '#' and would be a comment; write '\\\\#' for a name that begins so".to_owned())
            } else {
                match builder.add_line(None, pattern) {
                    Ok(_) => None,
                    Err(ignore::Error::Glob { err, .. }) => Some(format!("is no pattern: {err}")),
                    Err(error) => Some(format!("is no pattern: {error}")),
                }
            };
            if let Some(wrong) = wrong {
                item.report(format!("{} {wrong}", quoted(pattern)));
                good = false;
            }
            patterns.push(pattern.to_owned());
        }
    }
    let matcher = builder.build().map_err(|e| table.report(format!("the patterns of 'exclude' do not fit together: {e}"))).ok()?;
    good.then_some((patterns, matcher))
}

fn source_name(table: &Table<'_>, kind: &SourceKind) -> Option<String> {
    if let Some(item) = table.get("name") {
        let name = item.text("a name")?;
        let wrong = match name {
            "" => "is empty",
            "." | ".." => "is no name for a directory, which a restore makes of it",
            _ if name.contains('/') => "must not contain '/'",
            _ if name.len() > 255 => "is longer than 255 bytes",
            _ if name.chars().any(char::is_control) => "must not contain control characters",
            _ => return Some(name.to_owned()),
        };
        item.report(format!("{} {wrong}", quoted(name)));
        return None;
    }
    let last = kind.path().file_name().and_then(|n| n.to_str()).filter(|n| !n.chars().any(char::is_control));
    if last.is_none() {
        table.report("needs a 'name', as its path ends in nothing that could be one");
    }
    last.map(str::to_owned)
}
