//! What a table names of others: a job its destinations, a destination its encryption profile, `[config_backup]` both.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::config::{ItemKind, ItemName};

/// The keys of an item that name others.
fn keys(item: &ItemName) -> &'static [(&'static str, ItemKind)] {
    match (item.kind, item.name.as_str()) {
        (ItemKind::Job, _) => &[("destinations", ItemKind::Destination)],
        (ItemKind::Destination, _) => &[("encryption", ItemKind::Encryption)],
        (ItemKind::Settings, "config_backup") => &[("destination", ItemKind::Destination), ("encryption", ItemKind::Encryption)],
        _ => &[],
    }
}

/// No item names more others.
pub const MOST: usize = 1000;

/// Whether an item names more others than any does.
pub fn are_too_many(item: &ItemName, value: &Value) -> bool {
    keys(item).iter().any(|(key, _)| value.get(key).and_then(Value::as_array).is_some_and(|list| list.len() > MOST))
}

/// The items that an item names, each once.
pub fn references(item: &ItemName, value: &Value) -> BTreeSet<ItemName> {
    let mut found = BTreeSet::new();
    for (key, kind) in keys(item) {
        let texts: Vec<&str> = match value.get(key) {
            Some(Value::String(text)) => vec![text],
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        for text in texts.into_iter().filter(|text| *kind != ItemKind::Encryption || *text != "none") {
            found.insert(ItemName::new(*kind, text));
        }
    }
    found
}

/// Names what has another name now by that.
pub fn mend(item: &ItemName, value: &mut Value, renamed: &BTreeMap<ItemName, ItemName>) {
    for (key, kind) in keys(item) {
        let change = |place: &mut Value| {
            let named = place.as_str().filter(|text| *kind != ItemKind::Encryption || *text != "none");
            let new = named.and_then(|text| renamed.get(&ItemName::new(*kind, text)));
            if let Some(new) = new {
                *place = Value::from(new.name.as_str());
            }
        };
        match value.get_mut(key) {
            Some(Value::Array(list)) => list.iter_mut().for_each(change),
            Some(place) => change(place),
            None => {}
        }
    }
}
