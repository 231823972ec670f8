//! A database in place of another one. A schema cannot be renamed, but its tables can be moved, all of them with one statement; its triggers,
//! views, routines and events are taken down before, and made again where the tables went.
//!
//! What was there is never only in memory: its tables are in one schema or the other, and the text of all else is in a table of the schema that it
//! is kept in, until it stands again.

use std::sync::PoisonError;

use tokio_util::sync::CancellationToken;

use super::client::{Client, literal, quoted};
use super::dump_reader::{DumpReader, Summary};
use super::restore::{Event, how};
use crate::source::SourceError;
use crate::source::load::Wanted;

/// Bytes of a text in one row: in hexadecimal it fits any server's packets.
const PIECE: usize = 256 << 10;
/// Comment of a table of text that stands as objects, too.
const MADE: &str = "made";
/// The same of a database that had no table.
const EMPTY: &str = "empty";

/// What is in a database, and how to make again what is no table.
pub struct Contents {
    tables: Vec<String>,
    events: Vec<Event>,
    /// Takes down what is no table. Every statement may find nothing.
    take_down: String,
    sql: Vec<u8>,
    summary: Summary,
}

impl Contents {
    pub fn of(client: &Client<'_>, database: &str, cancel: &CancellationToken) -> Result<Self, SourceError> {
        let name = literal(database);
        let question = format!(
            "select 'TRIGGER', trigger_name from information_schema.triggers where trigger_schema = {name} union all \
             select 'VIEW', table_name from information_schema.views where table_schema = {name} union all \
             select routine_type, routine_name from information_schema.routines where routine_schema = {name} union all \
             select 'EVENT', event_name from information_schema.events where event_schema = {name}"
        );
        let (mut take_down, mut views) = (String::new(), Vec::new());
        for row in client.table(&question, cancel)? {
            let mut row = row.into_iter().flatten();
            let (Some(kind), Some(object)) = (row.next(), row.next()) else { continue };
            take_down.push_str(&format!("DROP {kind} IF EXISTS {}.{};\n", quoted(database), quoted(&object)));
            if kind == "VIEW" {
                views.push(object);
            }
        }
        let mut sql = client.printed(&client.print_code(database), database, cancel)?;
        let mut reader = DumpReader::default();
        reader.feed(&sql);
        let whole = |reader: DumpReader| {
            reader.finish().map_err(|text| SourceError::Failed(format!("the definitions of database {database} are cut off: {text}")))
        };
        let summary = whole(reader)?;
        // Views come last: they may call routines.
        if !views.is_empty() {
            let text = client.printed(&client.print_views(database, &views), database, cancel)?;
            let mut reader = DumpReader::default();
            reader.feed(&text);
            whole(reader)?;
            sql.extend_from_slice(&text);
        }
        let (tables, events) = (client.tables(database, cancel)?, client.events(database, cancel)?);
        Ok(Self { tables, events, take_down, sql, summary })
    }

    /// Fails if something could not be made again elsewhere.
    pub fn movable(&self, database: &str) -> Result<(), SourceError> {
        match self.summary.tied.is_empty() {
            true => Ok(()),
            false => Err(SourceError::Failed(format!(
                "database {database} cannot be moved: triggers were written with its name ({}); create them again without it, or drop them",
                self.summary.tied.join(", ")
            ))),
        }
    }

    /// Drops the events that are switched on.
    pub fn drop_events(&self, database: &str) -> String {
        self.events.iter().map(|e| format!("DROP EVENT IF EXISTS {}.{};\n", quoted(database), quoted(&e.name))).collect()
    }

    fn moves(&self, from: &str, to: &str) -> Vec<String> {
        let one = |table: &String| format!("{}.{} TO {}.{}", quoted(from), quoted(table), quoted(to), quoted(table));
        self.tables.iter().map(one).collect()
    }
}

impl Client<'_> {
    /// Whatever has rows, or numbers: tables and sequences.
    pub fn tables(&self, database: &str, cancel: &CancellationToken) -> Result<Vec<String>, SourceError> {
        let question = format!(
            "select table_name from information_schema.tables where table_schema = {} and table_type not in ('VIEW', 'SYSTEM VIEW') order by 1",
            literal(database)
        );
        Ok(self.table(&question, cancel)?.into_iter().flatten().flatten().collect())
    }

    /// Events that are not switched off.
    pub fn events(&self, database: &str, cancel: &CancellationToken) -> Result<Vec<Event>, SourceError> {
        let question = format!(
            "select event_name, definer, sql_mode, character_set_client, collation_connection, time_zone from information_schema.events \
             where event_schema = {} and status = 'ENABLED'",
            literal(database)
        );
        let rows = self.table(&question, cancel)?.into_iter().filter_map(|row| {
            let mut row = row.into_iter().flatten();
            let mut next = || row.next();
            let (name, definer) = (next()?, next()?);
            let (user, host) = definer.rsplit_once('@').unwrap_or((&definer, "%"));
            let [mode, charset, collation, zone] = [next()?, next()?, next()?, next()?].map(|text| literal(&text));
            let session = format!(
                "SET SESSION sql_mode = {mode}, character_set_client = {charset}, collation_connection = {collation}, time_zone = {zone};"
            );
            Some(Event { name, definer: format!("{}@{}", quoted(user), quoted(host)), session })
        });
        Ok(rows.collect())
    }

    /// Moves the scratch database to the target, and what is there aside.
    pub fn put_in_place(&self, wanted: &Wanted, cancel: &CancellationToken) -> Result<Vec<String>, SourceError> {
        let (target, scratch, aside) = (&wanted.target, &wanted.scratch, &wanted.aside);
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner).take();
        let new = loaded.map_or_else(|| Contents::of(self, scratch, cancel), Ok)?;
        new.movable(&wanted.database)?;
        // From the first change on it goes to its end.
        let go_on = CancellationToken::new();
        let old = match self.charset(target, cancel)? {
            None => {
                self.create(target, wanted.fact("charset").zip(wanted.fact("collation")), cancel)?;
                None
            }
            Some(_) if !wanted.replace => {
                return Err(SourceError::Failed(format!("database {target} has come into being meanwhile")));
            }
            Some((charset, collation)) => {
                self.unused(target, cancel)?;
                let old = Contents::of(self, target, cancel)?;
                old.movable(target)?;
                self.create(aside, Some((&charset, &collation)), &go_on)?;
                if let Err(e) = self.keep_text(wanted, &old.sql, old.tables.is_empty(), &go_on) {
                    return Err(and(e, self.drop_if_empty(aside, Some(scratch)).err()));
                }
                Some(old)
            }
        };
        if let Err(e) = self.exchange(wanted, old.as_ref(), &new) {
            return Err(match self.is_moved(wanted, old.as_ref(), &new) {
                Ok(false) => self.back(wanted, old.as_ref(), e),
                Ok(true) => {
                    and_where(e, wanted, old.is_some(), "the tables are in place, but not the triggers, views, routines and events")
                }
                Err(_) => and_where(e, wanted, old.is_some(), "it is not known whether the tables were moved"),
            });
        }
        let made = self.run(target, &new.sql, &go_on);
        let mut told = Vec::new();
        if let Some(old) = &old {
            told.push(self.finish_aside(wanted, old));
            if let Some(charset) = wanted.fact("charset").zip(wanted.fact("collation"))
                && let Err(e) = self.execute(&format!("ALTER DATABASE {}{}", quoted(target), how(charset)), &go_on)
            {
                told.push(format!("the character set of {target} could not be set: {e}"));
            }
        }
        if let Err(e) = made {
            return Err(and_where(e, wanted, old.is_some(), "the tables are in place, but not all triggers, views, routines and events"));
        }
        if let Err(e) = self.execute(&format!("DROP DATABASE IF EXISTS {}", quoted(scratch)), &go_on) {
            told.push(format!("the scratch database {scratch}, which has no tables any more, could not be removed: {e}"));
        }
        Ok(told)
    }

    /// The other way round, from wherever it was interrupted: the tables that were moved aside come back, with all that hangs on them.
    pub fn put_back(&self, wanted: &Wanted, there: bool) -> Result<Vec<String>, SourceError> {
        let go_on = CancellationToken::new();
        let (target, aside) = (&wanted.target, &wanted.aside);
        let Some((charset, collation)) = self.charset(aside, &go_on)? else {
            // What is there now can only be what was put there, unless it was not begun.
            if !there && self.charset(target, &go_on)?.is_some() {
                self.execute(&format!("DROP DATABASE {}", quoted(target)), &go_on)?;
            }
            return Ok(Vec::new());
        };
        let text = format!("{}.{}", quoted(aside), quoted(&wanted.scratch));
        let all = self.tables(aside, &go_on)?;
        let is_noted = all.contains(&wanted.scratch);
        let part = part_of(wanted);
        let is_old = |table: &&String| **table != wanted.scratch && **table != part;
        let moved: Vec<&String> = all.iter().filter(is_old).collect();
        let mut told = Vec::new();
        // Of a database without a table nothing is seen to have moved, and nothing can be lost.
        if !moved.is_empty() || (is_noted && self.comment_of_text(wanted)?.contains(EMPTY)) {
            let mut kept = Contents::of(self, aside, &go_on)?;
            if !is_noted {
                // Settled long ago: its events were switched off there.
                kept.movable(aside)?;
                told.push(format!("the events of {target}, if it has any, stay switched off"));
                self.keep_text(wanted, &kept.sql, false, &go_on)?;
            }
            kept.tables.retain(|table| is_old(&table));
            // Where the exchange of all tables is not one step, what did not come to be exchanged is still the old.
            let drop_target = match self.tables(&wanted.scratch, &go_on)?.is_empty() {
                true => format!("DROP DATABASE IF EXISTS {};\n", quoted(target)),
                false => String::new(),
            };
            let how = how((&charset, &collation));
            let moves = kept.moves(aside, target);
            let rename = if moves.is_empty() { String::new() } else { format!("RENAME TABLE {};\n", moves.join(", ")) };
            let sql = format!(
                "SET SESSION foreign_key_checks = 0, lock_wait_timeout = 30;\n{drop_target}CREATE DATABASE IF NOT EXISTS {}{how};\n{}{rename}",
                quoted(target),
                kept.take_down,
            );
            self.execute(&sql, &go_on)?;
        } else if !is_noted {
            // Made, and nothing put into it yet.
            self.execute(&format!("DROP DATABASE {}", quoted(aside)), &go_on)?;
            return Ok(told);
        }
        let pieces = self.table(&format!("select hex(statements) from {text} order by n"), &go_on)?;
        let hex: String = pieces.into_iter().flatten().flatten().collect();
        let sql = data_encoding::HEXUPPER
            .decode(hex.as_bytes())
            .map_err(|e| SourceError::Failed(format!("the statements in {text} do not decode: {e}")))?;
        // Some of it may stand still, which is an error for each; what counts is that it is what it was.
        let _ = self.run_on(target, &sql, &go_on);
        let now = Contents::of(self, target, &go_on)?;
        if now.sql != sql {
            return Err(SourceError::Failed(format!(
                "all tables of {target} are back, but not all of its triggers, views, routines and events are what they were; they stand as statements \
                 in {text}"
            )));
        }
        self.execute(&format!("DROP DATABASE {}", quoted(aside)), &go_on)?;
        Ok(told)
    }

    /// The text of what is no table, where it outlives keepd.
    fn keep_text(&self, wanted: &Wanted, sql: &[u8], of_no_table: bool, cancel: &CancellationToken) -> Result<(), SourceError> {
        let comment = if of_no_table { EMPTY } else { "" };
        let whole = format!("{}.{}", quoted(&wanted.aside), quoted(&wanted.scratch));
        // Under its name when all of it is there.
        let table = format!("{}.{}", quoted(&wanted.aside), quoted(&part_of(wanted)));
        let mut statements = format!(
            "DROP TABLE IF EXISTS {table};\nCREATE TABLE {table} (n INT PRIMARY KEY, statements LONGBLOB NOT NULL) ENGINE = InnoDB COMMENT = '{comment}';\n"
        );
        for (n, piece) in sql.chunks(PIECE).enumerate() {
            statements.push_str(&format!("INSERT INTO {table} VALUES ({n}, X'{}');\n", data_encoding::HEXUPPER.encode(piece)));
        }
        statements.push_str(&format!("RENAME TABLE {table} TO {whole};\n"));
        self.execute(&statements, cancel)
    }

    /// Takes down what hangs on the tables, and moves all tables with one statement: all of them, or none.
    fn exchange(&self, wanted: &Wanted, old: Option<&Contents>, new: &Contents) -> Result<(), SourceError> {
        let mut moves = old.map(|old| old.moves(&wanted.target, &wanted.aside)).unwrap_or_default();
        moves.extend(new.moves(&wanted.scratch, &wanted.target));
        let take_down = format!("{}{}", old.map(|old| old.take_down.as_str()).unwrap_or_default(), new.take_down);
        let rename = if moves.is_empty() { String::new() } else { format!("RENAME TABLE {};\n", moves.join(", ")) };
        // Nobody is there to wait for longer.
        let sql = format!("SET SESSION foreign_key_checks = 0, lock_wait_timeout = 30;\n{take_down}{rename}");
        self.execute(&sql, &CancellationToken::new())
    }

    /// The text of what stands again where it is kept goes; that of what could not be made there stays.
    pub fn forget_text(&self, wanted: &Wanted) -> Result<(), SourceError> {
        let cancel = CancellationToken::new();
        match self.comment_of_text(wanted)?.contains(MADE) {
            true => self.execute(&format!("DROP TABLE {}.{}", quoted(&wanted.aside), quoted(&wanted.scratch)), &cancel),
            false => Ok(()),
        }
    }

    /// What the table of text says of itself; empty when there is none.
    fn comment_of_text(&self, wanted: &Wanted) -> Result<String, SourceError> {
        let question = format!(
            "select table_comment from information_schema.tables where table_schema = {} and table_name = {}",
            literal(&wanted.aside),
            literal(&wanted.scratch)
        );
        Ok(self.table(&question, &CancellationToken::new())?.into_iter().flatten().flatten().next().unwrap_or_default())
    }

    fn is_moved(&self, wanted: &Wanted, old: Option<&Contents>, new: &Contents) -> Result<bool, SourceError> {
        let cancel = CancellationToken::new();
        let old_moved = old.and_then(|old| old.tables.first()).map(|table| (table, &wanted.aside));
        let moved = new.tables.first().map(|table| (table, &wanted.target)).filter(|_| old.is_none());
        let Some((table, database)) = old_moved.or(moved) else {
            return Ok(!new.tables.is_empty() && self.tables(&wanted.scratch, &cancel)?.is_empty());
        };
        Ok(self.tables(database, &cancel)?.contains(table))
    }

    /// Nothing was moved: what was taken down is made again.
    fn back(&self, wanted: &Wanted, old: Option<&Contents>, error: SourceError) -> SourceError {
        let Some(old) = old else { return and(error, self.drop_if_empty(&wanted.target, None).err()) };
        let cancel = CancellationToken::new();
        // Some of it may stand still, which is an error for each; what counts is that it is what it was.
        let _ = self.run_on(&wanted.target, &old.sql, &cancel);
        let same = Contents::of(self, &wanted.target, &cancel).and_then(|now| match now.sql == old.sql {
            true => Ok(()),
            false => Err(SourceError::Failed("they are not what they were".into())),
        });
        match same {
            Ok(()) => and(error, self.drop_if_empty(&wanted.aside, Some(&wanted.scratch)).err()),
            Err(e) => SourceError::Failed(format!(
                "{error}. All tables are where they were, but triggers, views, routines and events of {} could not be made again: {e}. They stand as \
                 statements in the table {}.{}",
                wanted.target,
                quoted(&wanted.aside),
                quoted(&wanted.scratch)
            )),
        }
    }

    /// Removes a database that was made for nothing; `but` may be in it.
    fn drop_if_empty(&self, database: &str, but: Option<&String>) -> Result<(), SourceError> {
        let cancel = CancellationToken::new();
        let tables = self.tables(database, &cancel)?;
        match tables.iter().all(|table| Some(table) == but) {
            true => self.execute(&format!("DROP DATABASE {}", quoted(database)), &cancel),
            false => Err(SourceError::Failed(format!("database {database} stays: it holds tables"))),
        }
    }

    /// Makes what was taken down again where its tables are kept; says what is to be said of it.
    fn finish_aside(&self, wanted: &Wanted, old: &Contents) -> String {
        let (cancel, aside) = (CancellationToken::new(), &wanted.aside);
        let text = format!("{}.{}", quoted(aside), quoted(&wanted.scratch));
        let made = self.run(aside, &old.sql, &cancel).and_then(|()| self.rest(aside, &old.events, &cancel)).and_then(|()| {
            let empty = if old.tables.is_empty() { EMPTY } else { "" };
            self.execute(&format!("ALTER TABLE {text} COMMENT = '{MADE} {empty}'"), &cancel)
        });
        let resting = if old.events.is_empty() { "" } else { ", its events switched off" };
        let incomplete = match made {
            Ok(()) => String::new(),
            Err(e) => format!(
                "; not all of its triggers, views, routines and events could be made there ({e}), they stand as statements in {text}"
            ),
        };
        format!(
            "the database that was there is kept as {aside}{resting}{incomplete}; when it is no longer needed: DROP DATABASE {}",
            quoted(aside)
        )
    }
}

/// The table of text while it is being filled.
fn part_of(wanted: &Wanted) -> String {
    format!("{}_part", wanted.scratch)
}

fn and(error: SourceError, more: Option<SourceError>) -> SourceError {
    match more {
        Some(more) => SourceError::Failed(format!("{error}; {more}")),
        None => error,
    }
}

fn and_where(error: SourceError, wanted: &Wanted, replaced: bool, state: &str) -> SourceError {
    let (target, aside) = (&wanted.target, &wanted.aside);
    let old =
        if replaced { format!(" The database that was there is in {aside}, or still in {target}: drop neither.") } else { String::new() };
    SourceError::Failed(format!("{target}: {state}: {error}.{old} The backup is unchanged and can be restored again under another name"))
}
