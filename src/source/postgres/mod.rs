//! Databases of a PostgreSQL server, each as an archive that `pg_restore` reads, and what they share: roles and tablespaces.
//!
//! In: a server and the names of databases. Out: `DATABASE.dump` for each (custom format, not compressed, for the repository does that
//! better) and `globals.sql`, streamed from `pg_dump` and `pg_dumpall`. The exit status and the archive itself decide whether a dump is whole; its rows are
//! counted as they go by ([`archive`]). [`restore`] brings one back into a server.

mod archive;
mod client;
mod restore;
mod rows;
mod survey;

use keepd_protocol::model::Level;
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;

pub(crate) use self::archive::ArchiveReader;
use self::archive::{About, Summary};
pub use self::client::{Client, without_commands};
pub use self::survey::survey;
use super::dump::{Collected, Counted};
use super::load::is_scratch;
use super::{Context, Facts, Merge, Previous, SourceError, dump};
use crate::config::{Databases, ServerSource};
use crate::process::Pipes;
use crate::repository::EntrySink;

/// The file of roles and tablespaces.
pub const GLOBALS: &str = "globals.sql";
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
    let databases = databases(source, &client, context.cancel)?;
    let mut files: Vec<(String, Option<&str>)> = databases.iter().map(|d| (file_of(d), Some(d.as_str()))).collect();
    if source.globals {
        files.push((GLOBALS.into(), None));
    }
    files.sort_by(|a, b| crate::repository::entry::path_order(a.0.as_bytes(), b.0.as_bytes()));
    sink.push(dump::directory())?;
    context.report.entry();
    let mut previous = Merge::new(previous);
    let mut facts = Collected::of(&databases);
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
                let Summary { mut about, tables, large_objects, understood } = summary;
                let own = own(&mut about, large_objects);
                let counted = Counted { tables, server_version: about.server_version, tool_version: about.tool_version };
                facts.add(database, own, understood.then_some(counted), captured.counts);
                sink.push(captured.entry)?;
            }
            None => {
                let text = globals(&client, databases.first(), source, context)?;
                context.report.bytes(text.len() as u64);
                let entry = dump::file(GLOBALS);
                match text.len() as u64 <= crate::repository::entry::SMALL_FILE_BYTES {
                    true => sink.push_small(entry, &text)?,
                    false => {
                        sink.begins(&entry, Some(text.len() as u64))?;
                        sink.large_begin()?;
                        sink.large_bytes(&text)?;
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

fn databases(source: &ServerSource, client: &Client<'_>, cancel: &CancellationToken) -> Result<Vec<String>, SourceError> {
    match &source.databases {
        Databases::Named(names) => Ok(names.clone()),
        Databases::All => {
            let question = "select datname from pg_database where datallowconn and not datistemplate order by 1";
            let mut found = client.ask("postgres", question, cancel)?;
            found.retain(|name| !is_scratch(name));
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

/// What a dump says of its database as a whole.
fn own(about: &mut About, large_objects: u64) -> Map<String, Value> {
    let texts = [
        ("create", about.create.take()),
        ("owner", about.owner.take()),
        ("grants", about.grants.take()),
        ("properties", about.properties.take()),
    ];
    let mut own: Map<String, Value> = texts.into_iter().filter_map(|(name, text)| Some((name.to_owned(), text?.into()))).collect();
    own.insert("large_objects".into(), large_objects.into());
    own
}
