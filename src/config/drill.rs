//! `drill` and `assert` of a job: how its backups are proven.

use std::time::Duration;

use super::problem::quoted;
use super::program::{program, sql};
use super::reader::{Item, Table};
use super::{Assertion, Databases, Drill, Source, SourceKind};

const WANTED: &str = "a table such as { every = \"7d\", space = \"20GiB\" }";
const ASSERTION: &str = "a table with one of sql = \"…\", file = \"<source>/<path>\" and command = [ … ]";

/// `drill = { … }`, and `assert = [ … ]` in it or beside it.
pub(super) fn drill(table: &Table<'_>, sources: Option<&[Source]>) -> Option<Drill> {
    let usual = Drill::default();
    let Some(item) = table.get("drill") else {
        let assertions = table.optional("assert", |item| assertions(item, sources), Vec::new());
        return Some(Drill { assertions: assertions?, ..usual });
    };
    let own = item.table(WANTED)?;
    own.check_keys(&["every", "space", "memory", "dir", "timeout", "assert"], &[]);
    let every = own.optional("every", |item| item.duration(Duration::from_secs(1)).map(Some), None);
    let space = own.optional("space", |item| item.size().map(Some), None);
    let memory = own.optional("memory", memory, usual.memory);
    let dir = own.optional("dir", |item| item.absolute_path().map(Some), None);
    let timeout = own.optional("timeout", |item| item.duration(Duration::from_secs(1)), usual.timeout);
    let holder = match (own.has("assert"), table.get("assert")) {
        (true, Some(item)) => {
            item.report("is there twice, in the job and in its 'drill'; put them together in one place");
            None
        }
        (true, None) => Some(&own),
        (false, _) => Some(table),
    };
    let assertions = holder.and_then(|t| t.optional("assert", |item| assertions(item, sources), Vec::new()));
    Some(Drill { every: every?, space: space?, memory: memory?, dir: dir?, timeout: timeout?, assertions: assertions? })
}

/// Less than this no server starts with.
const LEAST_MEMORY: u64 = 256 << 20;

fn memory(item: &Item<'_>) -> Option<u64> {
    let bytes = item.size()?;
    if bytes < LEAST_MEMORY {
        item.report("is too little for a database server; at least 256MiB");
        return None;
    }
    Some(bytes)
}

fn assertions(item: &Item<'_>, sources: Option<&[Source]>) -> Option<Vec<Assertion>> {
    let list = item.list(&format!("an array of tables, each {ASSERTION}"))?;
    // All are looked at, so that all mistakes are told.
    let read: Vec<Option<Assertion>> = list.iter().map(|item| assertion(item, sources)).collect();
    let read: Vec<Assertion> = read.into_iter().collect::<Option<_>>()?;
    let users = || read.iter().filter_map(|a| if let Assertion::Command(p) = a { p.run_as.as_deref() } else { None });
    if let Some(first) = users().next()
        && let Some(other) = users().find(|user| *user != first)
    {
        item.report(format!("commands run as {} and as {}; the scratch place is opened to one user only", quoted(first), quoted(other)));
        return None;
    }
    Some(read)
}

fn assertion(item: &Item<'_>, sources: Option<&[Source]>) -> Option<Assertion> {
    let table = item.table(ASSERTION)?;
    let given = [table.has("sql"), table.has("file"), table.has("command") || table.has("shell")];
    match given {
        [true, false, false] => question(&table, sources),
        [false, true, false] => file(&table, sources),
        [false, false, true] => program(item).map(Assertion::Command),
        _ => {
            item.report(format!("must be {ASSERTION}"));
            None
        }
    }
}

fn is_database(source: &Source) -> bool {
    matches!(source.kind, SourceKind::Sqlite(_) | SourceKind::Postgres(_) | SourceKind::Mysql(_))
}

fn question(table: &Table<'_>, sources: Option<&[Source]>) -> Option<Assertion> {
    table.check_keys(&["sql", "source", "database"], &[]);
    let sql = table.get("sql").and_then(|item| sql(&item));
    let all: Vec<&Source> = sources?.iter().filter(|s| is_database(s)).collect();
    let names = || all.iter().map(|s| s.name.as_str()).collect::<Vec<_>>().join(", ");
    let source = match (table.get("source"), all.as_slice()) {
        (Some(item), _) => {
            let name = item.text("the name of a database source")?;
            let found = all.iter().copied().find(|s| s.name == name);
            if found.is_none() {
                let known = if all.is_empty() { "this job has none".to_owned() } else { format!("they are {}", names()) };
                item.report(format!("there is no database source {}; {known}", quoted(name)));
            }
            found?
        }
        (None, [one]) => *one,
        (None, []) => {
            table.report("asks a database, and this job has none");
            return None;
        }
        (None, _) => {
            table.report(format!("needs a 'source': this job has several databases, {}", names()));
            return None;
        }
    };
    let database = database(table, source);
    Some(Assertion::Sql { sql: sql?, source: source.name.clone(), database: database? })
}

/// Which database of a server is asked; None for a source that is a file.
fn database(table: &Table<'_>, source: &Source) -> Option<Option<String>> {
    let given = table.get("database");
    let (SourceKind::Postgres(server) | SourceKind::Mysql(server)) = &source.kind else {
        return match given {
            None => Some(None),
            Some(item) => {
                item.report(format!("source {} is one database", quoted(&source.name)));
                None
            }
        };
    };
    match (given, &server.databases) {
        (None, Databases::Named(names)) if names.len() == 1 => Some(names.first().cloned()),
        (None, Databases::Named(names)) => {
            table.report(format!("needs a 'database': source {} has several, {}", quoted(&source.name), names.join(", ")));
            None
        }
        (None, Databases::All) => {
            table.report(format!("needs a 'database': source {} has all of its server", quoted(&source.name)));
            None
        }
        (Some(item), databases) => {
            let name = item.text("the name of a database")?;
            match databases {
                Databases::Named(names) if !names.iter().any(|n| n == name) => {
                    item.report(format!("source {} has no database {}; it has {}", quoted(&source.name), quoted(name), names.join(", ")));
                    None
                }
                _ => Some(Some(name.to_owned())),
            }
        }
    }
}

fn file(table: &Table<'_>, sources: Option<&[Source]>) -> Option<Assertion> {
    table.check_keys(&["file", "min_size"], &[]);
    let min_size = table.optional("min_size", Item::size, 0);
    let item = table.get("file")?;
    let text = item.text("<source>/<path>")?;
    let (source, path) = text.split_once('/').unwrap_or((text, ""));
    let sources = sources?;
    if !sources.iter().any(|s| s.name == source) {
        let names = sources.iter().map(|s| s.name.as_str()).collect::<Vec<_>>().join(", ");
        item.report(format!("begins with {}, which is no source of this job; they are {names}", quoted(source)));
        return None;
    }
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) || path.contains('\0') {
        item.report(format!("{} is no <source>/<path> of a file", quoted(text)));
        return None;
    }
    Some(Assertion::File { source: source.to_owned(), path: path.to_owned(), min_size: min_size? })
}
