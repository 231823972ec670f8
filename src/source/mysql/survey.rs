//! Which databases a MySQL or MariaDB server has.

use tokio_util::sync::CancellationToken;

use super::{Client, SYSTEM};
use crate::config::ServerSource;
use crate::source::SourceError;
use crate::source::load::is_scratch;
use crate::source::survey::{Survey, Surveyed, WITHIN};

const SERVER: &str = "select @@hostname, @@port, @@datadir, @@socket";
/// The last two are NULL where the engine does not know.
const DATABASES: &str = "select s.schema_name, count(t.table_name), sum(t.data_length + t.index_length),
    unix_timestamp(max(coalesce(t.update_time, t.create_time)))
    from information_schema.schemata s left join information_schema.tables t on t.table_schema = s.schema_name group by s.schema_name";
/// Some installations make it, for whoever wants to try something.
const PLAYGROUND: &str = "test";

/// Asks a server that is reached like this.
pub fn survey(source: &ServerSource, cancel: &CancellationToken) -> Result<Survey, SourceError> {
    let client = Client::new(source, cancel)?;
    let server = client.table_within(SERVER, WITHIN, cancel)?.into_iter().next().unwrap_or_default();
    let text = |n: usize| server.get(n).cloned().flatten();
    let identity = server.iter().map(|field| field.clone().unwrap_or_default()).collect::<Vec<_>>().join(":");
    let data_dir = text(2).map(|dir| std::path::Path::new(&dir).components().collect());
    let mut survey = Survey { identity, port: text(1).and_then(|port| port.parse().ok()), data_dir, ..Survey::default() };
    for row in client.table_within(DATABASES, WITHIN, cancel)? {
        let mut fields = row.into_iter();
        let Some(name) = fields.next().flatten() else { continue };
        let number = |field: Option<Option<String>>| field.flatten().and_then(|n| n.parse::<f64>().ok());
        let (tables, bytes, modified) = (number(fields.next()), number(fields.next()), number(fields.next()));
        if SYSTEM.contains(&name.to_lowercase().as_str()) || is_scratch(&name) {
            continue;
        }
        if name == PLAYGROUND && tables == Some(0.0) {
            survey.empty += 1;
            continue;
        }
        survey.databases.push(Surveyed { name, bytes: bytes.map(|n| n as u64), modified: modified.map(|n| n as i64) });
    }
    Ok(survey)
}
