//! `[coverage]`.

use std::path::Path;

use super::Coverage;
use super::reader::Table;
use super::source::exclude;

/// Reads the table; everything in it has a default.
pub(super) fn coverage(table: &Table<'_>) -> Option<Coverage> {
    table.check_keys(&["roots", "exclude"], &[]);
    let mut roots = Some(Coverage::default().roots);
    if let Some(item) = table.get("roots") {
        let list = item.list("an array of absolute paths such as [\"/\"]");
        roots = list.and_then(|list| list.iter().map(|item| item.absolute_path()).collect());
        if roots.as_ref().is_some_and(Vec::is_empty) {
            item.report("is empty; name at least one directory, [\"/\"] for the whole machine");
            roots = None;
        }
    }
    let (exclude, _) = exclude(table, Path::new("/"))?;
    Some(Coverage { roots: roots?, exclude })
}
