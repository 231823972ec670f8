//! Databases of a MySQL or MariaDB server, each as the statements that make it anew.
//!
//! In: a server and the names of databases. Out: `DATABASE.sql` for each, streamed from `mariadb-dump` or `mysqldump` in one transaction, so that
//! its tables are of one moment; two databases are of two. The exit status and the dump's last line decide whether it is whole; rows are counted as
//! they go by ([`dump_reader`]). [`restore`] brings one back into a server.

mod client;
mod dump_reader;
mod explain;
mod moving;
mod options;
mod restore;
mod rows;
mod survey;
#[cfg(test)]
mod tests;
mod trigger;

use keepd_protocol::model::Level;
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;

pub use self::client::Client;
use self::client::literal;
pub(crate) use self::dump_reader::DumpReader;
use self::dump_reader::Summary;
pub use self::survey::survey;
use super::dump::{Collected, Counted};
use super::load::is_scratch;
use super::{Context, Facts, Merge, Previous, SourceError, dump};
use crate::config::{Databases, ServerSource};
use crate::process::Pipes;
use crate::repository::EntrySink;

/// What belongs to the server and not to who uses it.
const SYSTEM: [&str; 4] = ["information_schema", "performance_schema", "sys", "mysql"];
/// Engines that `--single-transaction` holds at one moment.
const TRANSACTIONAL: &str = "'InnoDB', 'XtraDB', 'RocksDB', 'TokuDB', 'ndbcluster'";
/// So many of many are named.
const NAMED: usize = 5;

/// Captures the databases into the sink.
pub fn capture(
    source: &ServerSource,
    previous: &mut dyn Previous,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<Facts, SourceError> {
    let client = Client::new(source, context.cancel)?;
    let mut databases = databases(source, &client, context.cancel)?;
    databases.sort_by(|a, b| crate::repository::entry::path_order(file_of(a).as_bytes(), file_of(b).as_bytes()));
    tell_what_is_hidden(&client, context)?;
    sink.push(dump::directory())?;
    context.report.entry();
    let mut previous = Merge::new(previous);
    let mut facts = Collected::of(&databases);
    let mut loose = Vec::new();
    for database in &databases {
        let schema = schema(&client, database, context)?;
        loose.extend(without_transactions(&client, database, context)?);
        let file = file_of(database);
        let before = previous.at(file.as_bytes())?;
        let running = client.dump(database).start(Pipes::Output)?;
        let mut reader = DumpReader::default();
        let mut watch = |bytes: &[u8]| {
            reader.feed(bytes);
            Ok(())
        };
        let captured = dump::capture(running, &file, source.timeout, before.as_ref(), &mut watch, sink, context);
        let captured = captured.map_err(|e| match e {
            SourceError::Failed(text) => SourceError::Failed(format!("database {database}: {text}")),
            other => other,
        })?;
        captured.ended.good().map_err(|e| client.explained(&e, database))?;
        let summary = reader.finish().map_err(|text| SourceError::Failed(format!("the dump of database {database} is cut off: {text}")))?;
        tell(&summary, database, context);
        warn(context, &captured.ended.said);
        let own = own(schema, &summary);
        let Summary { tables, server_version, tool_version, understood, .. } = summary;
        facts.add(database, own, understood.then_some(Counted { tables, server_version, tool_version }), captured.counts);
        sink.push(captured.entry)?;
        context.report.entry();
    }
    tell_what_is_loose(&loose, context);
    Ok(facts.finish())
}

/// The name of a database's file in the source.
pub fn file_of(database: &str) -> String {
    dump::file_name(database, "sql")
}

fn warn(context: &Context<'_>, said: &str) {
    // That a tool has a newer name is nothing to act on.
    let lines: Vec<&str> = said.lines().filter(|line| !line.contains("Deprecated program name")).collect();
    if !lines.is_empty() {
        context.report.message(Level::Warning, lines.join("\n"));
    }
}

fn databases(source: &ServerSource, client: &Client<'_>, cancel: &CancellationToken) -> Result<Vec<String>, SourceError> {
    match &source.databases {
        Databases::Named(names) => Ok(names.clone()),
        Databases::All => {
            let rows = client.table("show databases", cancel)?;
            let all = rows.into_iter().filter_map(|row| row.into_iter().next().flatten());
            let found: Vec<String> = all.filter(|name| !SYSTEM.contains(&name.to_lowercase().as_str()) && !is_scratch(name)).collect();
            match found.is_empty() {
                true => Err(SourceError::Failed(
                    "the server has no databases beside its own, or its user may not see them; nothing was captured".into(),
                )),
                false => Ok(found),
            }
        }
    }
}

/// How a database was made.
struct Schema {
    charset: String,
    collation: String,
}

fn schema(client: &Client<'_>, database: &str, context: &Context<'_>) -> Result<Schema, SourceError> {
    let (charset, collation) = client.charset(database, context.cancel)?.ok_or_else(|| {
        SourceError::Failed(format!(
            "there is no database {database} on the server, or its user may not see it; check dbname and its rights"
        ))
    })?;
    Ok(Schema { charset, collation })
}

/// Triggers and routines that a user may not see are not in its dumps, and no tool says a word of it.
fn tell_what_is_hidden(client: &Client<'_>, context: &Context<'_>) -> Result<(), SourceError> {
    let rows = client.table("show grants", context.cancel)?;
    let grants: Vec<String> = rows.into_iter().filter_map(|row| row.into_iter().next().flatten()).collect();
    let any = |words: &[&str]| grants.iter().any(|grant| words.iter().any(|word| grant.contains(word)));
    // MySQL names the roles of a user, but not their rights.
    let role = grants.iter().any(|grant| !grant.contains(" ON "));
    let all_tables = grants.iter().any(|grant| grant.contains("SELECT") && grant.contains(" ON *.* "));
    let mut hidden = Vec::new();
    if !role && !any(&["TRIGGER", "ALL PRIVILEGES"]) {
        hidden.push("triggers (TRIGGER ON db.*)");
    }
    let routines = ["ALL PRIVILEGES", "SHOW_ROUTINE", "SHOW CREATE ROUTINE", "CREATE ROUTINE", "ALTER ROUTINE", "EXECUTE", "`mysql`"];
    if !role && !all_tables && !any(&routines) {
        hidden.push("routines (MariaDB: SELECT ON mysql.proc; MySQL: SHOW_ROUTINE ON *.*)");
    }
    if !hidden.is_empty() {
        let text =
            format!("the user may not see {}: if there are any, they are not in the backup; grant it the right", hidden.join(" and "));
        context.report.message(Level::Warning, text);
    }
    Ok(())
}

/// Tables that are dumped as they are when their turn comes.
fn without_transactions(client: &Client<'_>, database: &str, context: &Context<'_>) -> Result<Vec<String>, SourceError> {
    let question = format!(
        "select table_name, engine from information_schema.tables where table_schema = {} and table_type <> 'VIEW' and engine is not null \
         and engine not in ({TRANSACTIONAL}) order by 1",
        literal(database)
    );
    let rows = client.table(&question, context.cancel)?;
    let named = rows.into_iter().filter_map(|row| {
        let mut row = row.into_iter().flatten();
        let (table, engine) = (row.next()?, row.next()?);
        let excluded = client.excluded(database).any(|t| t == table);
        (!excluded).then(|| format!("{database}.{table} ({engine})"))
    });
    Ok(named.collect())
}

fn tell_what_is_loose(loose: &[String], context: &Context<'_>) {
    if loose.is_empty() {
        return;
    }
    let named = loose.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    let more = if loose.len() > NAMED { format!(" and {} more", loose.len() - NAMED) } else { String::new() };
    let text = format!(
        "not of the one moment that the others are of, for their engine knows no transactions: {named}{more}; ALTER TABLE … ENGINE = InnoDB, or \
         hold the application still (quiesce)"
    );
    context.report.message(Level::Info, text);
}

fn tell(summary: &Summary, database: &str, context: &Context<'_>) {
    if !summary.understood {
        let text =
            format!("the rows in the dump of {database} could not be counted: its last line and the exit status tell that it is whole");
        context.report.message(Level::Warning, text);
    }
    if !summary.tied.is_empty() {
        let named = summary.tied.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
        let text = format!(
            "{database} has triggers that were written with the database's name ({named}), and can be restored to a directory only; create them \
             again without it"
        );
        context.report.message(Level::Warning, text);
    }
}

/// What is known of a database as a whole.
fn own(schema: Schema, summary: &Summary) -> Map<String, Value> {
    let mut own = Map::from_iter([("charset".to_owned(), schema.charset.into()), ("collation".to_owned(), schema.collation.into())]);
    if !summary.tied.is_empty() {
        own.insert("tied_triggers".into(), summary.tied.join(", ").into());
    }
    own
}
