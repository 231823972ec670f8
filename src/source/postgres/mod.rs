//! Databases of a PostgreSQL server, each as an archive that `pg_restore` reads, and what they share: roles and tablespaces.
//!
//! In: a server and the names of databases. Out: `DATABASE.dump` for each (custom format, not compressed, for the repository does that
//! better) and `globals.sql`, streamed from `pg_dump` and `pg_dumpall`. The exit status and the archive itself decide whether a dump is whole; its rows are
//! counted as they go by ([`archive`]). [`restore`] brings one back into a server.

mod archive;
mod client;
mod restore;

use keepd_protocol::model::Level;
use serde_json::{Map, Value, json};

use self::archive::{ArchiveReader, Summary};
pub use self::client::Client;
use super::{Context, Facts, Merge, Previous, SourceError, dump};
use crate::config::{Databases, ServerSource};
use crate::process::Pipes;
use crate::repository::EntrySink;

const GLOBALS: &str = "globals.sql";
/// What `pg_dumpall` writes last.
const GLOBALS_END: &[u8] = b"-- PostgreSQL database cluster dump complete";

/// Captures the databases into the sink.
pub fn capture(
    source: &ServerSource,
    previous: &mut dyn Previous,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<Facts, SourceError> {
    let client = Client::new(source)?;
    let databases = databases(source, &client, context)?;
    let mut files: Vec<(String, Option<&str>)> = databases.iter().map(|d| (file_of(d), Some(d.as_str()))).collect();
    if source.globals {
        files.push((GLOBALS.into(), None));
    }
    files.sort_by(|a, b| crate::repository::entry::path_order(a.0.as_bytes(), b.0.as_bytes()));
    sink.push(dump::directory())?;
    context.report.entry();
    let mut previous = Merge::new(previous);
    let mut facts = Collected { many: databases.len() > 1, ..Collected::default() };
    for (file, database) in &files {
        let before = previous.at(file.as_bytes())?;
        match database {
            Some(database) => {
                let running = client.dump(database, &source.exclude_tables).start(Pipes::Output)?;
                let mut archive = ArchiveReader::default();
                let captured =
                    dump::capture(running, file, source.timeout, before.as_ref(), &mut |bytes| archive.feed(bytes), sink, context)?;
                captured.ended.good().map_err(|e| client.explained(&e, database))?;
                let summary = archive
                    .finish()
                    .map_err(|text| SourceError::Failed(format!("the dump of database {database} is not whole: {text}")))?;
                if !summary.understood {
                    let text = format!(
                        "the dump of {database} is of a later PostgreSQL than this keepd knows: only its exit status tells that it is whole"
                    );
                    context.report.message(Level::Warning, text);
                }
                warn(context, &captured.ended.said);
                facts.add(database, summary, captured.counts);
                sink.push(captured.entry)?;
            }
            None => {
                let text = globals(&client, databases.first(), source, context)?;
                context.report.bytes(text.len() as u64);
                let entry = dump::file(GLOBALS);
                match text.len() as u64 <= crate::repository::entry::SMALL_FILE_BYTES {
                    true => sink.push_small(entry, &text)?,
                    false => {
                        sink.large_begin()?;
                        let mut rest = text.as_slice();
                        while !rest.is_empty() {
                            let space = sink.large_space(rest.len());
                            let (now, later) = rest.split_at(space.len().min(rest.len()));
                            space.get_mut(..now.len()).unwrap_or_default().copy_from_slice(now);
                            sink.large_filled(now.len())?;
                            rest = later;
                        }
                        sink.large_finish(entry)?;
                    }
                }
            }
        }
        context.report.entry();
    }
    Ok(facts.finish())
}

/// The name of a database's file in the source.
pub fn file_of(database: &str) -> String {
    dump::file_name(database, "dump")
}

fn warn(context: &Context<'_>, said: &str) {
    if !said.is_empty() {
        context.report.message(Level::Warning, format!("pg_dump: {said}"));
    }
}

fn databases(source: &ServerSource, client: &Client<'_>, context: &Context<'_>) -> Result<Vec<String>, SourceError> {
    match &source.databases {
        Databases::Named(names) => Ok(names.clone()),
        Databases::All => {
            let question = "select datname from pg_database where datallowconn and not datistemplate and datname !~ '^keepd_[0-9]{8}t[0-9]' order by 1";
            let found = client.ask("postgres", question, context.cancel)?;
            match found.is_empty() {
                true => Err(SourceError::Failed("the server has no databases, which cannot be; nothing was captured".into())),
                false => Ok(found),
            }
        }
    }
}

/// Roles and tablespaces. Only a superuser may read the roles' passwords; without them is better than nothing, and told.
fn globals(client: &Client<'_>, database: Option<&String>, source: &ServerSource, context: &Context<'_>) -> Result<Vec<u8>, SourceError> {
    const MOST: usize = 256 << 20;
    let database = database.map(String::as_str).unwrap_or("postgres");
    let text = match client.globals(database, true).run(b"", MOST, source.timeout, context.cancel) {
        Err(crate::process::ProcessError::Failed(said)) if said.contains("pg_authid") => {
            let text = client.globals(database, false).run(b"", MOST, source.timeout, context.cancel)?;
            let hint = "the roles' passwords are not in the backup: only a superuser may read them";
            context.report.message(Level::Info, hint.into());
            text
        }
        other => other.map_err(|e| client.explained(&e, database))?,
    };
    let tail = text.get(text.len().saturating_sub(4096)..).unwrap_or_default();
    match tail.windows(GLOBALS_END.len()).any(|w| w == GLOBALS_END) {
        true => Ok(text),
        false => Err(SourceError::Failed(format!(
            "the dump of roles and tablespaces is cut off after {} bytes: its last line is missing",
            text.len()
        ))),
    }
}

/// Facts of all databases of the source.
#[derive(Default)]
struct Collected {
    many: bool,
    versions: Option<(String, String)>,
    tables: Map<String, Value>,
    table_bytes: Map<String, Value>,
    databases: Map<String, Value>,
    changed: u64,
}

impl Collected {
    fn add(&mut self, database: &str, summary: Summary, counts: dump::Counts) {
        let name = |table: &str| if self.many { format!("{database}.{table}") } else { table.to_owned() };
        let rows: u64 = summary.tables.values().map(|t| t.rows).sum();
        for (table, numbers) in &summary.tables {
            self.tables.insert(name(table), numbers.rows.into());
            self.table_bytes.insert(name(table), numbers.bytes.into());
        }
        let about = summary.about;
        let mut own =
            json!({ "tables": summary.tables.len(), "rows": rows, "bytes": counts.bytes, "large_objects": summary.large_objects });
        if let Some(own) = own.as_object_mut() {
            own.extend(about.create.map(|sql| ("create".to_owned(), sql.into())));
            own.extend(about.owner.map(|name| ("owner".to_owned(), name.into())));
            own.extend(about.grants.map(|sql| ("grants".to_owned(), sql.into())));
            own.extend(about.properties.map(|sql| ("properties".to_owned(), sql.into())));
        }
        self.databases.insert(database.to_owned(), own);
        self.changed += counts.new_bytes;
        if summary.understood {
            self.versions = Some((about.server_version, about.tool_version));
        }
    }

    fn finish(self) -> Facts {
        let mut facts =
            Facts::from([("databases".to_owned(), Value::Object(self.databases)), ("changed_bytes".to_owned(), self.changed.into())]);
        if let Some((server, tool)) = self.versions {
            facts.insert("server_version".into(), server.into());
            facts.insert("tool_version".into(), tool.into());
            facts.insert("tables".into(), Value::Object(self.tables));
            facts.insert("table_bytes".into(), Value::Object(self.table_bytes));
        }
        facts
    }
}
