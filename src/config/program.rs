//! Programs of others in the configuration: hooks, maintenance modes, and what tells a version.

use std::time::Duration;

use super::problem::quoted;
use super::reader::{Item, Table};
use super::{Health, HealthCheck, Hooks, Program, Quiesce, Source, SourceKind, VersionFrom};

/// How long a hook may take where nothing is said.
const USUAL_TIMEOUT: Duration = Duration::from_secs(600);
const WANTED: &str = "an array of a program and its arguments such as [\"/usr/bin/touch\", \"/run/x\"], or a table with command or shell, timeout and run_as";

/// An array of texts.
pub(super) fn texts(item: &Item<'_>, wanted: &str) -> Option<Vec<String>> {
    item.list(wanted)?.iter().map(|item| item.text("a text").map(str::to_owned)).collect()
}

/// A program and its arguments: no shell looks at them.
pub(super) fn command_line(item: &Item<'_>) -> Option<Vec<String>> {
    let words = match item.is_list() {
        true => texts(item, WANTED)?,
        false => {
            item.report(format!("must be {WANTED}; no shell takes a line apart, so write each argument by itself"));
            return None;
        }
    };
    let wrong = match words.first() {
        None => "is empty; the first word is the program",
        Some(program) if program.is_empty() => "begins with an empty word; the first is the program",
        _ if words.iter().any(|w| w.contains('\0')) => "holds a NUL character, which no argument can",
        _ => return Some(words),
    };
    item.report(wrong);
    None
}

pub(super) fn user_name(item: &Item<'_>) -> Option<String> {
    let name = item.text("the name of a user of this machine")?;
    if name.is_empty() || name.chars().any(|c| c.is_control() || c == ':' || c == '/') {
        item.report(format!("{} is no name of a user", quoted(name)));
        return None;
    }
    Some(name.to_owned())
}

pub(super) fn sql(item: &Item<'_>) -> Option<String> {
    let text = item.text("a question in SQL")?.trim().trim_end_matches(';').trim_end();
    if text.is_empty() || text.contains('\0') {
        item.report("is no question in SQL");
        return None;
    }
    Some(text.to_owned())
}

/// A program: an argument list, or a table that says more.
pub(super) fn program(item: &Item<'_>) -> Option<Program> {
    if !item.is_table() {
        return Some(Program { command: command_line(item)?, timeout: USUAL_TIMEOUT, run_as: None });
    }
    let table = item.table(WANTED)?;
    table.check_keys(&["command", "shell", "timeout", "run_as"], &[]);
    let timeout = table.optional("timeout", |item| item.duration(Duration::from_secs(1)), USUAL_TIMEOUT);
    let run_as = table.optional("run_as", |item| user_name(item).map(Some), None);
    let command = match (table.get("command"), table.get("shell")) {
        (Some(item), None) => command_line(&item),
        (None, Some(item)) => shell(&item),
        _ => {
            item.report("must have one of command = [ … ] and shell = \"…\"");
            None
        }
    };
    Some(Program { command: command?, timeout: timeout?, run_as: run_as? })
}

fn shell(item: &Item<'_>) -> Option<Vec<String>> {
    let text = item.text("a line for /bin/sh")?;
    if text.trim().is_empty() || text.contains('\0') {
        item.report("is no line for /bin/sh");
        return None;
    }
    Some(vec!["/bin/sh".into(), "-c".into(), text.to_owned()])
}

/// One program, or an array of several.
fn programs(item: &Item<'_>) -> Option<Vec<Program>> {
    if item.is_list() {
        let list = item.list(WANTED)?;
        if !list.is_empty() && list.iter().all(|i| i.is_list() || i.is_table()) {
            return list.iter().map(program).collect();
        }
    }
    program(item).map(|p| vec![p])
}

pub(super) fn hooks(item: &Item<'_>) -> Option<Hooks> {
    const NAMES: [&str; 5] = ["before", "after", "on_failure", "before_restore", "after_restore"];
    let table = item.table("a table such as { before = [\"/usr/local/bin/prepare\"] }")?;
    table.check_keys(&NAMES, &[]);
    let [before, after, on_failure, before_restore, after_restore] = NAMES.map(|name| table.optional(name, programs, Vec::new()));
    Some(Hooks { before: before?, after: after?, on_failure: on_failure?, before_restore: before_restore?, after_restore: after_restore? })
}

/// `health = { command = [ … ] }` or `{ url = "…" }`, and for how long it may take.
pub(super) fn health(item: &Item<'_>) -> Option<Health> {
    const WANTED: &str =
        "a table such as { url = \"http://127.0.0.1:8080/health\" } or { command = [\"/usr/local/bin/healthy\"] }, and patience";
    /// Of one try of a command.
    const ONE_TRY: Duration = Duration::from_secs(30);
    let table = item.table(WANTED)?;
    table.check_keys(&["command", "shell", "url", "timeout", "run_as", "patience"], &[]);
    let patience = table.optional("patience", |item| item.duration(Duration::from_secs(1)), Duration::from_secs(60));
    let timeout = table.optional("timeout", |item| item.duration(Duration::from_secs(1)), ONE_TRY);
    let run_as = table.optional("run_as", |item| user_name(item).map(Some), None);
    let check = match (table.get("command"), table.get("shell"), table.get("url")) {
        (Some(item), None, None) => command_line(&item)
            .zip(timeout)
            .zip(run_as)
            .map(|((command, timeout), run_as)| HealthCheck::Command(Program { command, timeout, run_as })),
        (None, Some(item), None) => shell(&item)
            .zip(timeout)
            .zip(run_as)
            .map(|((command, timeout), run_as)| HealthCheck::Command(Program { command, timeout, run_as })),
        (None, None, Some(item)) => url(&item).map(HealthCheck::Url),
        _ => {
            item.report("must have one of command = [ … ], shell = \"…\" and url = \"…\"");
            None
        }
    };
    Some(Health { check: check?, patience: patience? })
}

fn url(item: &Item<'_>) -> Option<String> {
    const WANTED: &str = "an address such as \"http://127.0.0.1:8080/health\"";
    let text = item.text(WANTED)?;
    let parsed = reqwest::Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    if parsed.is_none() {
        item.report(format!("{} is no address; allowed is {WANTED}", quoted(text)));
    }
    parsed.map(|_| text.to_owned())
}

/// Units of systemd.
pub(super) fn services(item: &Item<'_>) -> Option<Vec<String>> {
    let names = texts(item, "an array of systemd's units such as [\"shop.service\"]")?;
    for name in &names {
        let good = name.contains('.')
            && !name.starts_with(['-', '.'])
            && !name.contains(|c: char| c.is_whitespace() || "/*?[]".contains(c) || c.is_control());
        if !good {
            item.report(format!("{} is no unit of systemd; write it with its ending, such as \"shop.service\"", quoted(name)));
            return None;
        }
    }
    Some(names)
}

/// `quiesce = true`, or a table with `begin` and `end`.
pub(super) fn quiesce(table: &Table<'_>, services: &[String]) -> Option<Quiesce> {
    let Some(item) = table.get("quiesce") else { return Some(Quiesce::No) };
    if !item.is_table() {
        return match item.boolean()? {
            false => Some(Quiesce::No),
            true if services.is_empty() && !table.has("services") => {
                item.report("stops the job's services while it is captured, but there are none; add services = [\"…\"], or give { begin = [ … ], end = [ … ] }");
                None
            }
            true => Some(Quiesce::Services),
        };
    }
    let both = item.table("a table")?;
    both.check_keys(&["begin", "end"], &[]);
    let begin = both.require("begin", "what begins the maintenance mode").and_then(|item| program(&item));
    let end = both.require("end", "what ends the maintenance mode").and_then(|item| program(&item));
    Some(Quiesce::Maintenance { begin: begin?, end: end? })
}

/// `version = [ … ]`, `{ command = [ … ] }` or `{ sql = "…", source = "…" }`.
pub(super) fn version_from(item: &Item<'_>, sources: Option<&[Source]>) -> Option<VersionFrom> {
    let table = match item.is_table() {
        true => item.table("a table")?,
        false => return program(item).map(VersionFrom::Command),
    };
    if !table.has("sql") {
        return program(item).map(VersionFrom::Command);
    }
    table.check_keys(&["sql", "source"], &[]);
    let question = table.require("sql", "the question").and_then(|item| sql(&item));
    let databases: Vec<&str> = sources?
        .iter()
        .filter(|s| matches!(s.kind, SourceKind::Sqlite(_) | SourceKind::Postgres(_) | SourceKind::Mysql(_)))
        .map(|s| s.name.as_str())
        .collect();
    let source = match (table.get("source"), databases.as_slice()) {
        (None, [one]) => (*one).to_owned(),
        (None, _) => {
            item.report(format!("needs 'source', the database that is asked; there are {}", list(&databases)));
            return None;
        }
        (Some(item), _) => {
            let name = item.text("the name of a database source of this job")?;
            if !databases.contains(&name) {
                item.report(format!("there is no database source {} in this job; there are {}", quoted(name), list(&databases)));
                return None;
            }
            name.to_owned()
        }
    };
    Some(VersionFrom::Sql { sql: question?, source })
}

fn list(names: &[&str]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}
