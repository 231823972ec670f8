//! What the dumps of a server's databases say, as facts for the manifest: the same ones, whichever server it is.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::Counts;
use crate::source::Facts;

/// Rows of a table, and their bytes in the dump.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Table {
    pub rows: u64,
    pub bytes: u64,
}

/// What was counted in a dump that was understood.
pub struct Counted {
    pub tables: BTreeMap<String, Table>,
    pub server_version: String,
    pub tool_version: String,
}

/// Facts of all databases of a source.
#[derive(Default)]
pub struct Collected {
    /// Tables go by their database, too.
    many: bool,
    versions: Option<(String, String)>,
    tables: Map<String, Value>,
    table_bytes: Map<String, Value>,
    databases: Map<String, Value>,
    changed: u64,
}

impl Collected {
    pub fn of(databases: &[String]) -> Self {
        Self { many: databases.len() > 1, ..Self::default() }
    }

    /// A database with facts of its own; `counted` is None when its dump was not understood.
    pub fn add(&mut self, database: &str, mut own: Map<String, Value>, counted: Option<Counted>, counts: Counts) {
        self.changed += counts.new_bytes;
        own.insert("bytes".into(), counts.bytes.into());
        if let Some(Counted { tables, server_version, tool_version }) = counted {
            own.insert("tables".into(), tables.len().into());
            own.insert("rows".into(), tables.values().map(|t| t.rows).sum::<u64>().into());
            for (table, numbers) in tables {
                let name = if self.many { format!("{database}.{table}") } else { table };
                self.tables.insert(name.clone(), numbers.rows.into());
                self.table_bytes.insert(name, numbers.bytes.into());
            }
            self.versions = Some((server_version, tool_version));
        }
        self.databases.insert(database.to_owned(), own.into());
    }

    pub fn finish(self) -> Facts {
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
