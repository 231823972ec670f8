//! `[job.*]`: when, what, where to, how long.

use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use super::destination::retention;
use super::drill::drill;
use super::load::Known;
use super::problem::{did_you_mean, quoted};
use super::program::{health, hooks, quiesce, services, version_from};
use super::reader::{Item, Table};
use super::source::{FilesPlace, sources};
use super::value::{MOMENT, moment};
use super::{Hooks, Job, Retention, Retry, Schedule, Suspect, cron};

pub(super) fn job<'a>(name: &str, table: &Table<'a>, known: &Known, places: &mut Vec<FilesPlace<'a>>) -> Option<Job> {
    table.check_keys(
        &[
            "enabled",
            "paused_until",
            "schedule",
            "every",
            "at",
            "timezone",
            "jitter",
            "max_age",
            "destinations",
            "retention",
            "suspect",
            "retry",
            "services",
            "quiesce",
            "hooks",
            "health",
            "version",
            "schema_version",
            "source",
            "drill",
            "assert",
        ],
        &[],
    );
    let enabled = table.optional("enabled", Item::boolean, true);
    let schedule = schedule(table, &["schedule", "every", "at"]);
    let timezone = table.optional("timezone", |item| timezone(item).map(Some), None);
    let zone = timezone.iter().flatten().find_map(|name| TimeZone::get(name).ok()).unwrap_or_else(TimeZone::system);
    let paused_until = table.optional("paused_until", |item| paused_until(item, &zone).map(Some), None);
    let jitter = jitter(table, &schedule);
    let max_age = table.optional("max_age", |item| item.duration(Duration::from_secs(1)).map(Some), None);
    let destinations = destinations(table, known);
    let retention = table.optional("retention", retention, Retention::default());
    let suspect = table.optional("suspect", suspect, Suspect::default());
    let usual = Retry { attempts: 1, backoff: DEFAULT_BACKOFF };
    let retry = table.optional("retry", |item| retry(item, &usual), usual.clone());
    let sources = sources(name, table, destinations.as_deref().unwrap_or_default(), known, places);
    let services = table.optional("services", services, Vec::new());
    let quiesce = quiesce(table, services.as_deref().unwrap_or_default());
    let hooks = table.optional("hooks", hooks, Hooks::default());
    let health = table.optional("health", |item| health(item).map(Some), None);
    let version = table.optional("version", |item| version_from(item, sources.as_deref()).map(Some), None);
    let schema_version = table.optional("schema_version", |item| version_from(item, sources.as_deref()).map(Some), None);
    let drill = drill(table, sources.as_deref());
    Some(Job {
        name: name.to_owned(),
        enabled: enabled?,
        paused_until: paused_until?,
        schedule: schedule?,
        timezone: timezone?,
        jitter: jitter?,
        max_age: max_age?,
        destinations: destinations?,
        retention: retention?,
        suspect: suspect?,
        retry: retry?,
        sources: sources?,
        services: services?,
        quiesce: quiesce?,
        hooks: hooks?,
        health: health?,
        version: version?,
        schema_version: schema_version?,
        drill: drill?,
    })
}

const DEFAULT_BACKOFF: Duration = Duration::from_secs(60);

/// At most one of the ways to say when something is due; all that are looked for are `schedule`, `every` and `at`.
pub(super) fn schedule(table: &Table<'_>, ways: &[&str]) -> Option<Option<Schedule>> {
    let given: Vec<&str> = ways.iter().copied().filter(|key| table.has(key)).collect();
    if let [first, second, ..] = given.as_slice()
        && let Some(item) = table.get(second)
    {
        let (last, others) = ways.split_last()?;
        let what = if table.path.starts_with("job.") { "the job" } else { "it" };
        item.report(format!("'{first}' is there as well; only one of {} and {last} can say when {what} is due", others.join(", ")));
    }
    let found = |way: &str| match way {
        "schedule" => table.optional(way, |item| cron_text(item).map(|t| Some(Schedule::Cron(t))), None),
        "every" => table.optional(way, |item| item.duration(Duration::from_secs(1)).map(|d| Some(Schedule::Every(d))), None),
        _ => table.optional(way, |item| at(item).map(|t| Some(Schedule::At(t))), None),
    };
    // All are read, so that all that is wrong is noted.
    let found: Vec<Option<Option<Schedule>>> = ways.iter().map(|way| found(way)).collect();
    let found: Vec<Option<Schedule>> = found.into_iter().collect::<Option<_>>()?;
    if given.len() > 1 { None } else { Some(found.into_iter().flatten().next()) }
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

fn paused_until(item: &Item<'_>, zone: &TimeZone) -> Option<Timestamp> {
    let bare = item.datetime_text();
    let text = match &bare {
        Some(text) => text.as_str(),
        None => item.text(&format!("a time: {MOMENT}"))?,
    };
    moment(text, zone).map_err(|why| item.report(why)).ok()
}

pub(super) fn timezone(item: &Item<'_>) -> Option<String> {
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
        } else if !is_known(item, name, known) {
            good = false;
        } else {
            names.push(name.to_owned());
        }
    }
    good.then_some(names)
}

/// False, and noted, when there is no such destination.
pub(super) fn is_known(item: &Item<'_>, name: &str, known: &Known) -> bool {
    let found = known.destinations.contains(name);
    if !found && known.whole {
        let candidates = known.destinations.iter().map(String::as_str);
        let allowed = match known.destinations.len() {
            0 => "none is defined, add [destination.NAME]".to_owned(),
            _ => format!("allowed are {}", candidates.clone().collect::<Vec<_>>().join(", ")),
        };
        item.report(format!("there is no destination {}; {allowed}{}", quoted(name), did_you_mean(name, candidates)));
    }
    found
}
