//! A dump back into a server.
//!
//! Triggers, views, routines and events keep their definers, whether owners are wanted or not: a dump has no other form. The user who restores
//! needs the right to make objects of others (SUPER, or SET USER / SET_USER_ID), and what is defined by a user who is not there cannot run.

use std::sync::PoisonError;

use tokio_util::sync::CancellationToken;

use super::client::{Client, literal, quoted};
use super::moving::Contents;
use super::{NAMED, SYSTEM};
use crate::process::{Pipes, Running};
use crate::source::SourceError;
use crate::source::load::{Loader, Wanted, compare, used_by};

/// Tables counted with one question.
const AT_ONCE: usize = 100;

/// An event that is switched on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub name: String,
    /// Who defined it, as SQL has it.
    pub definer: String,
    /// Sets what it was defined under.
    pub session: String,
}

impl Client<'_> {
    /// Character set and collation of a database; None: it is not there.
    pub fn charset(&self, database: &str, cancel: &CancellationToken) -> Result<Option<(String, String)>, SourceError> {
        let question = format!(
            "select default_character_set_name, default_collation_name from information_schema.schemata where schema_name = {}",
            literal(database)
        );
        let row = self.table(&question, cancel)?.into_iter().next();
        Ok(row.and_then(|row| {
            let mut row = row.into_iter().flatten();
            Some((row.next()?, row.next()?))
        }))
    }

    /// Counts the rows of tables.
    pub fn count(&self, database: &str, tables: &[&String], cancel: &CancellationToken) -> Result<Vec<(String, Option<u64>)>, SourceError> {
        let mut counted = Vec::new();
        for tables in tables.chunks(AT_ONCE) {
            let count = |(n, t): (usize, &&String)| format!("select {n}, count(*) from {}.{}", quoted(database), quoted(t));
            let question = tables.iter().enumerate().map(count).collect::<Vec<_>>().join(" union all ");
            for row in self.table(&question, cancel)? {
                let mut row = row.into_iter().flatten();
                let table = row.next().and_then(|n| tables.get(n.parse::<usize>().ok()?));
                counted.extend(table.map(|t| ((*t).clone(), row.next().and_then(|n| n.parse().ok()))));
            }
        }
        Ok(counted)
    }

    /// Makes a database; without a character set, as the server makes it.
    pub fn create(&self, database: &str, charset: Option<(&str, &str)>, cancel: &CancellationToken) -> Result<(), SourceError> {
        let how = charset.map(how).unwrap_or_default();
        self.execute(&format!("CREATE DATABASE {}{how}", quoted(database)), cancel)
    }

    /// Switches events off.
    pub fn rest(&self, database: &str, events: &[Event], cancel: &CancellationToken) -> Result<(), SourceError> {
        // Whoever alters an event becomes its definer, and gives it modes and character sets of his own, unless it is said what they are.
        let change =
            |e: &Event| format!("{}\nALTER DEFINER = {} EVENT {}.{} DISABLE;", e.session, e.definer, quoted(database), quoted(&e.name));
        match events.is_empty() {
            true => Ok(()),
            false => self.execute(&events.iter().map(change).collect::<Vec<_>>().join("\n"), cancel),
        }
    }

    /// Fails if anybody but keepd is connected to a database: what is written while it is replaced would not go through its triggers.
    pub fn unused(&self, database: &str, cancel: &CancellationToken) -> Result<(), SourceError> {
        let question = format!(
            "select concat(user, '@', host, ', id ', id) from information_schema.processlist where db = {} and id <> connection_id() order by id",
            literal(database)
        );
        let users: Vec<String> = self.table(&question, cancel)?.into_iter().flatten().flatten().collect();
        used_by(database, &users)
    }

    /// Fails if tables of other databases refer to tables of this one: they would follow them to where they are kept.
    fn unreferenced(&self, database: &str, cancel: &CancellationToken) -> Result<(), SourceError> {
        let question = format!(
            "select concat(constraint_schema, '.', table_name) from information_schema.referential_constraints where unique_constraint_schema = \
             {0} and constraint_schema <> {0} order by 1",
            literal(database)
        );
        let tables: Vec<String> = self.table(&question, cancel)?.into_iter().flatten().flatten().collect();
        match tables.is_empty() {
            true => Ok(()),
            false => Err(SourceError::Failed(format!(
                "database {database} cannot be replaced: tables of other databases refer to it by foreign keys ({}); drop those, and make them again \
                 afterwards, or load it into a database of another name",
                tables.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ")
            ))),
        }
    }
}

impl Loader for Client<'_> {
    fn look(&self, wanted: &Wanted, stops: bool, cancel: &CancellationToken) -> Result<(), SourceError> {
        let target = &wanted.target;
        let failed = |text: String| Err(SourceError::Failed(text));
        if target.is_empty() || target.chars().count() > 64 || target.chars().any(char::is_control) || target.ends_with(' ') {
            return failed("a database's name has 1 to 64 characters, no control characters, and no space at its end".into());
        }
        if SYSTEM.contains(&target.to_lowercase().as_str()) {
            return failed(format!(
                "{target} belongs to the server itself and is not replaced while it runs; restore its dump with --to DIR"
            ));
        }
        if !wanted.tables.is_empty() {
            return failed(
                "single tables of MySQL cannot be restored by themselves: load the database under another name and take the tables from there \
                 (CREATE TABLE … LIKE …; INSERT … SELECT …)"
                    .into(),
            );
        }
        if let Some(tied) = wanted.fact("tied_triggers") {
            return failed(format!(
                "the backup has triggers that were written with the database's name ({tied}): loading them would write to {}; restore it with \
                 --to DIR, take the names out of its text, and load that",
                wanted.database
            ));
        }
        if self.charset(target, cancel)?.is_none() {
            return Ok(());
        }
        wanted.may_replace()?;
        self.unreferenced(target, cancel)?;
        Contents::of(self, target, cancel)?.movable(target)?;
        if stops { Ok(()) } else { self.unused(target, cancel) }
    }

    fn begin(&self, wanted: &Wanted, cancel: &CancellationToken) -> Result<Running, SourceError> {
        self.create(&wanted.scratch, wanted.fact("charset").zip(wanted.fact("collation")), cancel)?;
        Ok(self.load(&wanted.scratch).start(Pipes::Input)?)
    }

    fn verify(&self, wanted: &Wanted, cancel: &CancellationToken) -> Result<String, SourceError> {
        // An event may delete old rows, and its time may come while they are counted.
        let contents = Contents::of(self, &wanted.scratch, cancel)?;
        let events = contents.drop_events(&wanted.scratch);
        if !events.is_empty() {
            self.execute(&events, cancel)?;
        }
        *self.loaded.lock().unwrap_or_else(PoisonError::into_inner) = Some(contents);
        let expected = wanted.rows();
        let there = self.tables(&wanted.scratch, cancel)?;
        let present: Vec<&String> = expected.iter().map(|(name, _)| name).filter(|name| there.contains(name)).collect();
        compare(&expected, &self.count(&wanted.scratch, &present, cancel)?)
    }

    fn publish(&self, wanted: &Wanted, cancel: &CancellationToken) -> Result<Vec<String>, SourceError> {
        self.put_in_place(wanted, cancel)
    }

    fn take_back(&self, wanted: &Wanted, there: bool) -> Result<Vec<String>, SourceError> {
        let told = self.put_back(wanted, there)?;
        self.discard(wanted)?;
        Ok(told)
    }

    fn settle(&self, wanted: &Wanted) -> Result<(), SourceError> {
        self.forget_text(wanted)
    }

    fn is_there(&self, database: &str, cancel: &CancellationToken) -> Result<bool, SourceError> {
        Ok(self.charset(database, cancel)?.is_some())
    }

    /// It holds nothing but what the backup holds, whatever happened.
    fn discard(&self, wanted: &Wanted) -> Result<(), SourceError> {
        self.execute(&format!("DROP DATABASE IF EXISTS {}", quoted(&wanted.scratch)), &CancellationToken::new())
    }
}

/// Character set and collation of a database as SQL has them; only what can be their names.
pub fn how((charset, collation): (&str, &str)) -> String {
    let is_name = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    match is_name(charset) && is_name(collation) {
        true => format!(" CHARACTER SET {charset} COLLATE {collation}"),
        false => String::new(),
    }
}
