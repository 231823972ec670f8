//! The configuration as it goes out: its tables, what the ledger knows of schedules, and the secrets.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use jiff::Timestamp;
use keepd_protocol::configuration::{ConfigItem, ConfigSecret};
use serde_json::{Map, Value, json};
use zeroize::Zeroizing;

use super::secrets;
use crate::config::{ItemKind, ItemName, Texts};
use crate::ledger::Ledger;
use crate::portable::envelope::{self, Envelope, Item, Secret, SecretKind};
use crate::run::live::Failure;

/// Items by their names, with the files that they stand in; what stands in none has an empty path.
type Items = BTreeMap<ItemName, (PathBuf, Value)>;

/// All that goes out, in the order of its names. Without a ledger no schedule state; without `kinds` all of them. A secret that cannot be read is an error, which names all
/// of them: an export that lacks one is found out when it is needed.
pub fn collect(
    texts: &Texts,
    ledger: Option<&Ledger>,
    kinds: Option<&BTreeSet<ItemKind>>,
    include_secrets: bool,
) -> Result<Envelope, Failure> {
    let directory = texts.directory();
    let mut problems = Vec::new();
    let mut items = Vec::new();
    for (name, (_, value)) in found(texts, ledger, kinds)? {
        let mut found = Vec::new();
        for named in secrets::of(&name, &value, &directory) {
            let value = match include_secrets || named.kind == SecretKind::PublicKey {
                false => Zeroizing::default(),
                true => secrets::read(&named).unwrap_or_else(|why| {
                    problems.push(format!("{name}: {} ({}): {why}", named.at, named.from()));
                    Zeroizing::default()
                }),
            };
            found.push(Secret { at: named.at, kind: named.kind, value });
        }
        items.push(Item { r#type: name.kind.word().to_owned(), name: name.name, value, secrets: found });
    }
    if !problems.is_empty() {
        let what = if include_secrets { "secrets" } else { "public keys" };
        return Err(Failure::Failed(format!("{what} cannot be read, and nothing was exported without them: {}", problems.join("; "))));
    }
    let words = kinds.map(|kinds| kinds.iter().map(|kind| kind.word()).collect::<Vec<_>>().join(","));
    let now = Timestamp::now();
    Ok(Envelope {
        format_version: envelope::VERSION,
        keepd_version: env!("CARGO_PKG_VERSION").to_owned(),
        export_type: words.unwrap_or_else(|| "all".to_owned()),
        exported_at: Timestamp::from_second(now.as_second()).unwrap_or(now),
        instance: crate::run::host(),
        item_count: items.len() as u64,
        includes_secrets: include_secrets,
        items,
    })
}

/// What [`collect`] would give, for people: with the names of the secrets and without what they are.
pub fn preview(texts: &Texts, ledger: Option<&Ledger>, kinds: Option<&BTreeSet<ItemKind>>) -> Result<Vec<ConfigItem>, Failure> {
    let directory = texts.directory();
    let shown = found(texts, ledger, kinds)?.into_iter().map(|(name, (file, value))| {
        let told = secrets::of(&name, &value, &directory).into_iter().map(|named| {
            let problem = secrets::read(&named).err();
            ConfigSecret { from: named.from(), at: named.at, problem }
        });
        let stays = secrets::kept_by_token(&name, &value).map(|key| ConfigSecret {
            at: "pkcs11".into(),
            from: key,
            problem: Some("a token does not give its key away: the profile goes out without it, and opens only where the token is".into()),
        });
        ConfigItem {
            item: name.to_string(),
            file: file.display().to_string(),
            secrets: told.chain(stays).collect(),
            toml: toml_of(&name, &value),
        }
    });
    Ok(shown.collect())
}

fn found(texts: &Texts, ledger: Option<&Ledger>, kinds: Option<&BTreeSet<ItemKind>>) -> Result<Items, Failure> {
    let all = texts.items().map_err(|problems| Failure::Failed(problems.to_string()))?;
    let is_wanted = |kind: ItemKind| kinds.is_none_or(|kinds| kinds.contains(&kind));
    let mut schedules = Vec::new();
    if let Some(ledger) = ledger.filter(|_| is_wanted(ItemKind::Schedule)) {
        for job in all.keys().filter(|name| name.kind == ItemKind::Job) {
            let state = schedule(ledger, &job.name)?;
            schedules.extend(state.map(|state| (ItemName::new(ItemKind::Schedule, job.name.clone()), (PathBuf::new(), state))));
        }
    }
    Ok(all.into_iter().filter(|(name, _)| is_wanted(name.kind)).chain(schedules).collect())
}

/// What is of this machine alone: its runs, and what somebody asked it to do once.
const OWN: [&str; 3] = ["last_run", "once", "paused_until"];

/// What the ledger knows of a job's schedule, but what is of this machine alone; None where it knows nothing.
fn schedule(ledger: &Ledger, job: &str) -> Result<Option<Value>, Failure> {
    let state = ledger.schedule_state(job)?;
    if state.first_seen.is_none() {
        return Ok(None);
    }
    let value = serde_json::to_value(state).map_err(|e| Failure::Failed(format!("the schedule state of {job}: {e}")))?;
    let fields = value.as_object().into_iter().flatten().filter(|(key, value)| !OWN.contains(&key.as_str()) && !value.is_null());
    Ok(Some(Value::Object(fields.map(|(key, value)| (key.clone(), value.clone())).collect::<Map<_, _>>())))
}

/// An item as it stands in a file; what stands in none as its fields.
pub fn toml_of(name: &ItemName, value: &Value) -> String {
    let mut whole = value.clone();
    for key in name.table().into_iter().rev() {
        whole = json!({ key: whole });
    }
    // Numbers beyond TOML's, which no configuration has.
    toml::to_string(&whole).unwrap_or_else(|e| format!("# it cannot be written as TOML: {e}\n"))
}
