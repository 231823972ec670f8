//! `[config_backup]`: when and where to the configuration itself is stored.

use std::collections::BTreeMap;

use super::destination::{profile, retention};
use super::job::{is_known, schedule, timezone};
use super::load::Known;
use super::reader::{Item, Table};
use super::{ConfigBackup, Destination, Retention};

/// Reads the table. `destinations` are those that are right in themselves.
pub(super) fn config_backup(table: &Table<'_>, known: &Known, destinations: &BTreeMap<String, Destination>) -> Option<ConfigBackup> {
    table.check_keys(
        &["schedule", "every", "timezone", "destination", "encryption", "include_secrets", "retention", "on_change"],
        &[(&["at"], "a single time is for jobs; allowed here are schedule and every")],
    );
    let schedule = schedule(table, &["schedule", "every"]);
    let timezone = table.optional("timezone", |item| timezone(item).map(Some), None);
    let destination = table.require("destination", "where it goes, the name of a [destination.*] table").and_then(|item| {
        let name = item.text("the name of a [destination.*] table")?;
        is_known(&item, name, known).then(|| name.to_owned())
    });
    let said = table.optional("encryption", |item| profile(item, known).map(Some), None);
    let include_secrets = table.optional("include_secrets", Item::boolean, false);
    let retention = table.optional("retention", retention, Retention::default());
    let on_change = table.optional("on_change", Item::boolean, false);

    let destination = destination?;
    let encryption = match said? {
        Some(said) => said,
        // One that is wrong was told of already.
        None => destinations.get(&destination)?.encryption.clone(),
    };
    if include_secrets? && encryption.is_none() {
        if let Some(item) = table.get("include_secrets") {
            let why = if table.has("encryption") {
                "encryption is \"none\"".to_owned()
            } else {
                format!("the destination '{destination}' is not encrypted")
            };
            item.report(format!("secrets are never stored unsealed, and {why}; name an encryption profile with 'encryption'"));
        }
        return None;
    }
    Some(ConfigBackup {
        schedule: schedule?,
        timezone: timezone?,
        destination,
        encryption,
        include_secrets: include_secrets?,
        retention: retention?,
        on_change: on_change?,
    })
}
