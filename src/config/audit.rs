//! `[audit]`: how long is kept who did what.

use std::time::Duration;

use super::Audit;
use super::reader::Table;

/// What is removed is lost to whoever looks into something later.
const LEAST: Duration = Duration::from_secs(30 * 86_400);

/// Reads the table; everything in it has a default.
pub(super) fn audit(table: &Table<'_>) -> Option<Audit> {
    table.check_keys(&["keep"], &[]);
    Some(Audit { keep: table.optional("keep", |item| item.duration(LEAST), Audit::default().keep)? })
}
