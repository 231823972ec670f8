//! `[[job.*.source]]`: what is captured.

use std::path::PathBuf;
use std::time::Duration;

use ignore::gitignore::{Gitignore, GitignoreBuilder};
use serde_json::Value;

use super::destination::secret;
use super::load::Known;
use super::problem::quoted;
use super::program::{command_line, sql, texts, user_name};
use super::reader::{Item, Table};
use super::{CommandSource, Databases, FilesSource, Program, References, ServerSource, Source, SourceKind, SqliteSource, Verify};

/// A path a job reads, with what it leaves out and where the job's backups go.
pub(super) struct FilesPlace<'a> {
    pub path: PathBuf,
    pub item: Item<'a>,
    /// None for a database, which is a single file.
    pub exclude: Option<Gitignore>,
    pub destinations: Vec<String>,
}

/// The sources of a job; what they read of this machine is added to `places`.
pub(super) fn sources<'a>(
    job: &str,
    table: &Table<'a>,
    destinations: &[String],
    known: &Known,
    places: &mut Vec<FilesPlace<'a>>,
) -> Option<Vec<Source>> {
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
        let Some((kind, place)) = source_kind(&table, known) else {
            good = false;
            continue;
        };
        let name = source_name(&table, &kind);
        places.extend(place.map(|place| FilesPlace { destinations: destinations.to_vec(), ..place }));
        let Some((name, references)) = name.zip(table.optional("references", |item| references(item).map(Some), None)) else {
            good = false;
            continue;
        };
        if sources.iter().any(|s| s.name == name) {
            let text = format!("a source of this job is named {} already; give each a 'name' of its own", quoted(&name));
            table.get("name").map_or_else(|| table.report(&text), |item| item.report(&text));
            good = false;
        }
        sources.push(Source { name, kind, references });
    }
    for (item, source) in list.iter().zip(&sources) {
        let Some(References { under, .. }) = source.references.as_ref().filter(|_| good) else { continue };
        if !sources.iter().any(|s| s.name == *under && matches!(s.kind, SourceKind::Files(_))) {
            let files: Vec<&str> = sources.iter().filter(|s| matches!(s.kind, SourceKind::Files(_))).map(|s| s.name.as_str()).collect();
            let known = if files.is_empty() { "it has none".to_owned() } else { format!("they are {}", files.join(", ")) };
            item.report(format!("references.under: there is no files source {} in this job; {known}", quoted(under)));
            good = false;
        }
    }
    good.then_some(sources)
}

/// The keys that a source of each kind may have beside its name.
const KEYS: [(&str, &[&str]); 5] = [
    ("sqlite", &["verify", "references"]),
    ("files", &["exclude", "one_file_system", "exclude_caches"]),
    ("postgres", &["references"]),
    ("mysql", &["references"]),
    ("command", &["restore_command", "file", "min_size", "timeout", "run_as"]),
];

fn source_kind<'a>(table: &Table<'a>, known: &Known) -> Option<(SourceKind, Option<FilesPlace<'a>>)> {
    let given: Vec<&str> = KEYS.iter().map(|(kind, _)| *kind).filter(|kind| table.has(kind)).collect();
    let kind = match given.as_slice() {
        [kind] => *kind,
        [] => {
            let all: Vec<&str> = std::iter::once("name")
                .chain(KEYS.iter().flat_map(|(kind, keys)| std::iter::once(*kind).chain(keys.iter().copied())))
                .collect();
            table.check_keys(&all, &[]);
            if table.is_whole() {
                table.report("says not what to back up; it needs one of sqlite = \"/path\", files = \"/path\", postgres = { … }, mysql = { … } or command = [ … ]");
            }
            return None;
        }
        several => {
            table.report(format!("is both {}; each [[…source]] is one of them, so make two of it", several.join(" and ")));
            return None;
        }
    };
    let item = table.get(kind)?;
    let own = KEYS.iter().find(|(k, _)| *k == kind).map(|(_, keys)| *keys).unwrap_or_default();
    let others: Vec<(&str, Vec<&str>, String)> = KEYS
        .iter()
        .filter(|(k, _)| *k != kind)
        .map(|(k, keys)| (*k, keys.iter().filter(|key| !own.contains(key)).copied().collect(), format!("is only for {k} sources")))
        .collect();
    let others: Vec<(&[&str], &str)> = others.iter().map(|(_, keys, why)| (keys.as_slice(), why.as_str())).collect();
    let mut keys = vec!["name", kind];
    keys.extend(own);
    table.check_keys(&keys, &others);
    match kind {
        "sqlite" => sqlite(table, item),
        "files" => files(table, item),
        "postgres" => Some((SourceKind::Postgres(server(&item, known, "postgres")?), None)),
        "mysql" => Some((SourceKind::Mysql(server(&item, known, "mysql")?), None)),
        _ => Some((SourceKind::Command(command(table, &item)?), None)),
    }
}

fn sqlite<'a>(table: &Table<'a>, item: Item<'a>) -> Option<(SourceKind, Option<FilesPlace<'a>>)> {
    let words = [("quick", Verify::Quick), ("full", Verify::Full), ("off", Verify::Off)];
    let verify = table.optional("verify", |item| item.word(&words), Verify::Quick);
    let path = item.absolute_path().filter(|path| not_root(&item, path))?;
    let place = FilesPlace { path: path.clone(), item, exclude: None, destinations: Vec::new() };
    Some((SourceKind::Sqlite(SqliteSource { path, verify: verify? }), Some(place)))
}

fn files<'a>(table: &Table<'a>, item: Item<'a>) -> Option<(SourceKind, Option<FilesPlace<'a>>)> {
    let one_file_system = table.optional("one_file_system", Item::boolean, false);
    let exclude_caches = table.optional("exclude_caches", Item::boolean, true);
    let path = item.absolute_path();
    let exclude = exclude(table, path.as_deref().unwrap_or(std::path::Path::new("/")));
    let (path, (exclude, matcher)) = (path?, exclude?);
    let place = FilesPlace { path: path.clone(), item, exclude: Some(matcher), destinations: Vec::new() };
    let files = FilesSource { path, exclude, one_file_system: one_file_system?, exclude_caches: exclude_caches? };
    Some((SourceKind::Files(files), Some(place)))
}

/// A dump may wait for locks, and sort before it prints.
const USUAL_TIMEOUT: Duration = Duration::from_secs(1800);

fn server(item: &Item<'_>, known: &Known, kind: &str) -> Option<ServerSource> {
    const COMMON: [&str; 9] = ["dbname", "host", "port", "user", "password", "bin_dir", "run_as", "timeout", "exclude_tables"];
    let table = item.table("a table such as { dbname = \"shop\", user = \"keepd\" }")?;
    let postgres = kind == "postgres";
    let (own, other, why): (&[&str], &[&str], &str) = match postgres {
        true => (
            &["globals", "sslmode"],
            &["socket"],
            "is only for mysql; PostgreSQL's socket is named by its directory: host = \"/run/postgresql\"",
        ),
        false => (&["socket", "sslmode"], &["globals"], "is only for postgres"),
    };
    table.check_keys(&[&COMMON[..], own].concat(), &[(other, why)]);
    let databases = table.require("dbname", "the database, an array of several, or \"*\" for all").and_then(|item| databases(&item));
    let word = |item: &Item<'_>| {
        let text = item.text("a text")?;
        let wrong = text.is_empty() || text.chars().any(char::is_control);
        if wrong {
            item.report("must be neither empty nor hold control characters");
        }
        (!wrong).then(|| Some(text.to_owned()))
    };
    let host = table.optional("host", word, None);
    let port = table.optional("port", |item| item.number(1..=65_535).and_then(|n| u16::try_from(n).ok()).map(Some), None);
    let socket = table.optional("socket", |item| item.absolute_path().map(Some), None);
    let user = table.optional("user", word, None);
    let password = table.optional(
        "password",
        |item| match item.is_table() {
            true => secret(item, known).map(Some),
            false => {
                item.report("is a secret and does not belong into the configuration; give password = { file = \"/path\" }, { credential = \"name\" } or { env = \"NAME\" }");
                None
            }
        },
        None,
    );
    let bin_dir = table.optional("bin_dir", |item| item.absolute_path().map(Some), None);
    let run_as = table.optional("run_as", |item| user_name(item).map(Some), None);
    let timeout = table.optional("timeout", |item| item.duration(Duration::from_secs(1)), USUAL_TIMEOUT);
    let globals = table.optional("globals", Item::boolean, true);
    let exclude_tables =
        table.optional("exclude_tables", |item| texts(item, "an array of tables such as [\"public.sessions\"]"), Vec::new());
    let sslmode = table.optional("sslmode", |item| sslmode(item, postgres).map(Some), None);
    if let (Some(Some(_)), Some(Some(_)), Some(item)) = (&host, &socket, table.get("socket")) {
        item.report("and 'host' cannot both be; a socket is on this machine");
        return None;
    }
    Some(ServerSource {
        databases: databases?,
        host: host?,
        port: port?,
        socket: socket?,
        user: user?,
        password: password?,
        bin_dir: bin_dir?,
        run_as: run_as?,
        timeout: timeout?,
        globals: globals? && postgres,
        exclude_tables: exclude_tables?,
        sslmode: sslmode?,
    })
}

fn sslmode(item: &Item<'_>, postgres: bool) -> Option<String> {
    let words: &[&str] = match postgres {
        true => &["disable", "allow", "prefer", "require", "verify-ca", "verify-full"],
        false => &["disable", "require", "verify-full"],
    };
    let words: Vec<(&str, &str)> = words.iter().map(|w| (*w, *w)).collect();
    item.word(&words).map(str::to_owned)
}

fn databases(item: &Item<'_>) -> Option<Databases> {
    const WANTED: &str = "a database's name, an array of names, or \"*\" for all";
    if !item.is_list() {
        let name = item.text(WANTED)?;
        return match name {
            "*" => Some(Databases::All),
            _ => database(item).map(|name| Databases::Named(vec![name])),
        };
    }
    let list = item.list(WANTED)?;
    let names: Vec<String> = list.iter().map(database).collect::<Option<_>>()?;
    let twice = names.iter().enumerate().find(|(n, name)| names.iter().take(*n).any(|other| other == *name));
    match (names.is_empty(), twice) {
        (true, _) => item.report("is empty; name at least one database"),
        (_, Some((_, name))) => item.report(format!("{} is there twice", quoted(name))),
        _ => return Some(Databases::Named(names)),
    }
    None
}

fn database(item: &Item<'_>) -> Option<String> {
    let name = item.text("the name of a database")?;
    let wrong = match name {
        "" => "is empty",
        "*" => "means all and cannot be one of several; write dbname = \"*\"",
        // It may hold a password, so it is not repeated.
        _ if name.contains("://") || name.contains('=') => {
            item.report("must be a name only; host, port, user and password have keys of their own");
            return None;
        }
        _ if name.starts_with('-') => "must not begin with '-'",
        _ if name.chars().any(char::is_control) => "must not hold control characters",
        _ if name.len() > 128 => "is longer than any database's name",
        _ => return Some(name.to_owned()),
    };
    item.report(format!("{} {wrong}", quoted(name)));
    None
}

fn command(table: &Table<'_>, item: &Item<'_>) -> Option<CommandSource> {
    let timeout = table.optional("timeout", |item| item.duration(Duration::from_secs(1)), USUAL_TIMEOUT);
    let run_as = table.optional("run_as", |item| user_name(item).map(Some), None);
    let command = command_line(item);
    let restore = table.optional("restore_command", |item| command_line(item).map(Some), None);
    let file = table.optional("file", file_name, "output".to_owned());
    let min_size = table.optional("min_size", Item::size, 1);
    let (timeout, run_as) = (timeout?, run_as?);
    let program = |command| Program { command, timeout, run_as: run_as.clone() };
    Some(CommandSource { program: program(command?), restore: restore?.map(program), file: file?, min_size: min_size? })
}

fn file_name(item: &Item<'_>) -> Option<String> {
    let name = item.text("a file name such as \"dump.rdb\"")?;
    let wrong =
        name.is_empty() || name == "." || name == ".." || name.contains('/') || name.chars().any(char::is_control) || name.len() > 255;
    if wrong {
        item.report(format!("{} is no name of a file", quoted(name)));
        return None;
    }
    let is_part = name.rsplit_once(".part-").is_some_and(|(_, digits)| digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit()));
    if is_part {
        item.report(format!("{} is what a part of a long file is called in an archive; give it another name", quoted(name)));
        return None;
    }
    Some(name.to_owned())
}

fn references(item: &Item<'_>) -> Option<References> {
    let table = item.table("a table such as { sql = \"select path from uploads\", under = \"uploads\" }")?;
    table.check_keys(&["sql", "under"], &[]);
    let sql = table.require("sql", "a question whose first column is a path").and_then(|item| sql(&item));
    let under = table.require("under", "the name of the files source that has them")?.text("the name of a files source")?;
    Some(References { sql: sql?, under: under.to_owned() })
}

fn not_root(item: &Item<'_>, path: &std::path::Path) -> bool {
    if path.parent().is_none() {
        item.report("must be a database file, not '/'");
    }
    path.parent().is_some()
}

/// The patterns as they are, and compiled.
pub(super) fn exclude(table: &Table<'_>, root: &std::path::Path) -> Option<(Vec<String>, Gitignore)> {
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
    let name = match kind {
        SourceKind::Postgres(server) | SourceKind::Mysql(server) => {
            let databases: Vec<&str> = match &server.databases {
                Databases::All => Vec::new(),
                Databases::Named(names) => names.iter().map(String::as_str).collect(),
            };
            usual_name(kind.word(), None, &databases)
        }
        SourceKind::Command(command) => usual_name(kind.word(), command.program.command.first().map(std::path::Path::new), &[]),
        other => usual_name(other.word(), other.path(), &[]),
    };
    if name.is_none() {
        table.report("needs a 'name', as its path ends in nothing that could be one");
    }
    name
}

/// What a source is called that has no `name`: the last part of what it reads or runs; its database where that is one, else its kind.
fn usual_name(kind: &str, path: Option<&std::path::Path>, databases: &[&str]) -> Option<String> {
    let name = match (kind, databases) {
        ("postgres" | "mysql", [one]) => Some(*one),
        ("postgres" | "mysql", _) => Some(kind),
        _ => path.and_then(|path| path.file_name()?.to_str()),
    };
    name.filter(|n| !n.contains('/') && *n != "." && *n != ".." && !n.chars().any(char::is_control)).map(str::to_owned)
}

/// What a source is called, as it is written.
pub(super) fn written_name(source: &Value) -> Option<String> {
    if let Some(name) = source.get("name") {
        return name.as_str().map(str::to_owned);
    }
    let (kind, value) = KEYS.iter().find_map(|(kind, _)| Some((*kind, source.get(kind)?)))?;
    let texts = |value: &'_ Value| match value {
        Value::Array(list) => list.iter().map(|text| text.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>(),
        value => value.as_str().map(|text| vec![text.to_owned()]),
    };
    let databases = value.get("dbname").and_then(texts).unwrap_or_default();
    let databases: Vec<&str> = databases.iter().map(String::as_str).filter(|name| *name != "*").collect();
    let path = texts(value).and_then(|texts| texts.into_iter().next());
    usual_name(kind, path.as_deref().map(std::path::Path::new), &databases)
}
