//! Which databases a PostgreSQL server has.

use tokio_util::sync::CancellationToken;

use super::Client;
use crate::config::{Databases, ServerSource};
use crate::source::SourceError;
use crate::source::load::is_scratch;
use crate::source::survey::{Survey, Surveyed, WITHIN};

const SERVER: &str = "select system_identifier::text || ':' || current_setting('port') from pg_control_system()
    union all select coalesce((select setting from pg_settings where name = 'data_directory'), '-')";
const DATABASES: &str =
    "select coalesce(case when has_database_privilege(oid, 'connect') then pg_database_size(oid) end::text, '-') || ' ' || datname
    from pg_database where datallowconn and not datistemplate order by datname";
/// In a database: what somebody put there.
const RELATIONS: &str = "select count(*) from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind in ('r', 'p', 'm', 'v') and n.nspname not like 'pg\\_%' and n.nspname <> 'information_schema'";
/// Every server has it, for tools to connect to.
const MAINTENANCE: &str = "postgres";

/// Asks a server that is reached like this.
pub fn survey(source: &ServerSource, cancel: &CancellationToken) -> Result<Survey, SourceError> {
    let client = Client::new(source)?;
    let database = match &source.databases {
        Databases::Named(names) => names.first().map_or(MAINTENANCE, String::as_str),
        Databases::All => MAINTENANCE,
    };
    let mut server = client.ask_patiently(database, SERVER, WITHIN, cancel)?.into_iter();
    let identity = server.next().unwrap_or_default();
    let data_dir = server.next().filter(|dir| dir != "-").map(Into::into);
    let port = identity.rsplit(':').next().and_then(|port| port.parse().ok());
    let mut survey = Survey { identity, port, data_dir, ..Survey::default() };
    for row in client.ask_patiently(database, DATABASES, WITHIN, cancel)? {
        let Some((bytes, name)) = row.split_once(' ').filter(|(_, name)| !is_scratch(name)) else { continue };
        if name == MAINTENANCE {
            match client.ask_patiently(MAINTENANCE, RELATIONS, WITHIN, cancel) {
                Ok(count) if count.first().is_some_and(|n| n == "0") => {
                    survey.empty += 1;
                    continue;
                }
                Err(SourceError::Cancelled) => return Err(SourceError::Cancelled),
                // What cannot be looked into may hold something.
                _ => {}
            }
        }
        survey.databases.push(Surveyed { name: name.to_owned(), bytes: bytes.parse().ok(), modified: None });
    }
    Ok(survey)
}
