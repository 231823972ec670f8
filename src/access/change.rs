//! What a change of the configuration takes besides the right to change it: who can have keepd run programs, or say who may what, is root.

use keepd_protocol::access::Right;
use keepd_protocol::configuration::Allow;
use serde_json::{Map, Value};

use super::{By, Need, Of, Refusal};
use crate::config::{ItemKind, ItemName};
use crate::meta::plan::{self, Items, Written};

/// What may change of a destination without it being another place, or another way there.
const LIMITS: [&str; 9] =
    ["bandwidth", "check_every", "compression", "concurrency", "max_age", "prune_grace", "retention", "retry", "timeout"];
/// What may change of a database server without a password being told to another one.
const CONTENTS: [&str; 5] = ["dbname", "exclude_tables", "globals", "name", "timeout"];

fn without(table: &Map<String, Value>, keys: &[&str]) -> Map<String, Value> {
    table.iter().filter(|(key, _)| !keys.contains(&key.as_str())).map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Whether a destination is where it was, and reached and sealed as before.
fn is_same_place(old: Option<&Value>, new: &Value) -> bool {
    let of = |value: &Value| value.as_object().map(|table| without(table, &LIMITS));
    old.and_then(of) == of(new)
}

/// The tables that name a secret, without what is told to nobody.
fn with_secrets(value: &Value, found: &mut Vec<Map<String, Value>>) {
    let is_reference = |value: &Value| {
        value.as_object().is_some_and(|table| table.len() == 1 && ["file", "credential", "env"].iter().any(|key| table.contains_key(*key)))
    };
    match value {
        Value::Object(table) => {
            if table.values().any(is_reference) {
                found.push(without(table, &CONTENTS));
            }
            table.values().for_each(|value| with_secrets(value, found));
        }
        Value::Array(list) => list.iter().for_each(|value| with_secrets(value, found)),
        _ => {}
    }
}

/// Whether a secret of this machine is named that was not, or is told to another place than now.
fn is_secret_told(old: Option<&Value>, new: &Value) -> bool {
    let (mut before, mut after) = (Vec::new(), Vec::new());
    old.into_iter().for_each(|value| with_secrets(value, &mut before));
    with_secrets(new, &mut after);
    after.iter().any(|table| !before.contains(table))
}

/// The destinations that a job gets.
fn more_destinations<'v>(old: Option<&Value>, new: &'v Value) -> impl Iterator<Item = &'v str> {
    let list = |value: &Value| value.get("destinations").and_then(Value::as_array).cloned().unwrap_or_default();
    let before = old.map(list).unwrap_or_default();
    let after = new.get("destinations").and_then(Value::as_array).into_iter().flatten();
    after.filter(move |name| !before.contains(name)).filter_map(Value::as_str)
}

/// Whether `by` may make this of the configuration; `right` is what it is changed with. May block on the directory of users.
pub fn wanted(by: &By, right: Right, before: &Items, after: &Items) -> Result<(), Refusal> {
    let mut names: Vec<&ItemName> = before.keys().chain(after.keys()).collect();
    names.sort_unstable();
    names.dedup();
    for item in names.into_iter().filter(|item| before.get(*item) != after.get(*item)) {
        let (old, new) = (before.get(item), after.get(item));
        let what = format!(" of {item}");
        // A grant for some jobs is for changing them: neither for others, nor for making and removing them.
        let is_of_job = item.kind == ItemKind::Job && old.is_some() && new.is_some();
        let of = if is_of_job { Of::Job(item.name.clone()) } else { Of::Whole };
        by.may(&[Need::new(right, of, what.as_str())])?;
        if item.kind == ItemKind::Access || item.kind == ItemKind::Settings && matches!(item.name.as_str(), "audit" | "daemon") {
            by.is_admin(right, &format!("[{}] changes", item.name))?;
        }
        let Some(new) = new else { continue };
        for name in more_destinations(old, new).filter(|_| is_of_job) {
            by.may(&[Need::new(right, Of::Whole, format!(" to have {item} go to {name}, which is no destination of it"))])?;
        }
        if item.kind == ItemKind::Destination {
            if !is_same_place(old, new) {
                by.is_admin(right, &format!("{item} is another place, or reached or sealed otherwise"))?;
            }
        } else if is_secret_told(old, new) && by.may(&[Need::new(Right::ConfigExportSecrets, Of::Whole, "")]).is_err() {
            by.is_admin(right, &format!("{item} uses a secret that it did not use, or tells one to another place"))?;
        }
        let written = Written { item, before: old, after: new, all_before: before, all_after: after };
        if let Some((_, why)) = plan::needs(&written).into_iter().find(|(need, _)| matches!(need, Allow::Commands | Allow::Admins)) {
            by.is_admin(right, &format!("keepd runs something else for {item} ({why})"))?;
        }
        if item.kind == ItemKind::Settings && item.name == "config_backup" && new.get("include_secrets").is_some_and(|on| *on != false) {
            by.may(&[Need::new(Right::ConfigExportSecrets, Of::Whole, what)])?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::access::{Caller, Judge};
    use crate::config::{Access, AccessRole, Current, Member};

    /// Somebody who may change the configuration, all of it or a job's part.
    async fn editor(jobs: Option<Vec<String>>) -> By {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keepd.toml");
        std::fs::write(&path, "").unwrap();
        let mut config = crate::config::load(&path).unwrap();
        let role = AccessRole { name: "editors".into(), members: vec![Member::Uid(4242)], rights: vec![Right::JobEdit], jobs };
        config.access = Access { roles: vec![role], ..Access::default() };
        let judge = Judge::new(Arc::new(Current::new(config)));
        judge.by(Caller { uid: 4242, gid: 4242, groups: Vec::new() }, Vec::new()).await.unwrap()
    }

    fn items(list: &[(ItemKind, &str, serde_json::Value)]) -> Items {
        list.iter().map(|(kind, name, value)| (ItemName::new(*kind, *name), value.clone())).collect()
    }

    #[tokio::test]
    async fn who_edits_jobs_is_not_root() {
        let by = editor(None).await;
        let source = json!([{"files": "/srv/a"}]);
        let job = |extra: serde_json::Value| {
            let mut job = json!({"source": source, "destinations": ["local"]});
            job.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            items(&[(ItemKind::Job, "shop", job)])
        };
        let may = |before: &Items, after: &Items| wanted(&by, Right::JobEdit, before, after);
        let plain = job(json!({}));
        assert!(may(&plain, &job(json!({"schedule": "@daily"}))).is_ok());
        assert!(may(&Items::new(), &plain).is_ok() && may(&plain, &Items::new()).is_ok());
        for more in [
            json!({"hooks": {"before": ["true"]}}),
            json!({"health": {"command": ["true"]}}),
            json!({"version": {"command": ["true"]}}),
            json!({"quiesce": true}),
            json!({"services": ["sshd.service"]}),
            json!({"source": [{"command": {"command": ["id"]}}]}),
            json!({"source": [{"postgres": {"run_as": "root"}}]}),
            json!({"drill": {"assertions": [{"command": ["true"]}]}}),
        ] {
            let refused = may(&plain, &job(more.clone())).expect_err(&more.to_string());
            assert!(refused.text.contains("takes the role admin; root"), "{refused}");
        }
        for (kind, name, value) in [
            (ItemKind::Access, "access", json!({"admin": [4242]})),
            (ItemKind::Access, "access", json!({"role": {"x": {"members": [4242], "rights": ["job_edit"]}}})),
            (ItemKind::Settings, "audit", json!({"keep": "30d"})),
            (ItemKind::Settings, "daemon", json!({"socket": "/tmp/x"})),
            (ItemKind::Destination, "x", json!({"service": "exec", "command": ["id"], "encryption": "none"})),
            (ItemKind::Encryption, "x", json!({"token": {"module": "/tmp/x.so"}})),
            (ItemKind::Settings, "config_backup", json!({"destination": "local", "include_secrets": true})),
        ] {
            let one = items(&[(kind, name, value.clone())]);
            assert!(may(&Items::new(), &one).is_err(), "{value}");
            // What is there already may stay.
            assert!(may(&one, &one).is_ok());
        }
        let place = |more: serde_json::Value| {
            let mut place =
                json!({"service": "s3", "endpoint": "https://a.example", "secret_access_key": {"file": "/s/key"}, "encryption": "main"});
            place.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            items(&[(ItemKind::Destination, "x", place)])
        };
        let now = place(json!({}));
        assert!(
            may(&now, &place(json!({"bandwidth": "1MiB/s", "retention": {"keep_last": 3}}))).is_ok() && may(&now, &Items::new()).is_ok()
        );
        assert!(may(&Items::new(), &now).is_err(), "a new place");
        for other in [
            json!({"endpoint": "https://b.example"}),
            json!({"secret_access_key": {"file": "/etc/shadow"}}),
            json!({"encryption": "none"}),
            json!({"append_only": false}),
        ] {
            assert!(may(&now, &place(other.clone())).is_err(), "{other}");
        }
        let server = |host: &str, file: &str, more: &str| {
            job(json!({"source": [{"postgres": {"dbname": more, "host": host, "password": {"file": file}}}]}))
        };
        let now = server("a", "/s/pw", "shop");
        assert!(may(&now, &server("a", "/s/pw", "wiki")).is_ok());
        for other in [server("b", "/s/pw", "shop"), server("a", "/s/other", "shop")] {
            assert!(may(&now, &other).unwrap_err().text.contains("secret"));
            assert!(may(&plain, &other).is_err() && may(&Items::new(), &other).is_err());
        }
        // Nor may what is there be taken away.
        let access = items(&[(ItemKind::Access, "access", json!({"admin": ["anna"]}))]);
        assert!(may(&access, &Items::new()).is_err());
    }

    #[tokio::test]
    async fn a_limited_editor_changes_its_jobs_and_nothing_else() {
        let by = editor(Some(vec!["shop".into()])).await;
        let job = |name: &str, every: &str| items(&[(ItemKind::Job, name, json!({"every": every}))]);
        let may = |before: &Items, after: &Items| wanted(&by, Right::JobEdit, before, after).is_ok();
        let allowed: BTreeSet<(bool, &str)> = [
            (may(&job("shop", "1h"), &job("shop", "2h")), "change"),
            (may(&job("wiki", "1h"), &job("wiki", "2h")), "another"),
            (may(&Items::new(), &job("shop", "1h")), "add"),
            (may(&job("shop", "1h"), &Items::new()), "remove"),
        ]
        .into();
        let goes_to = |names: &[&str]| items(&[(ItemKind::Job, "shop", json!({"destinations": names}))]);
        assert!(may(&goes_to(&["a", "b"]), &goes_to(&["b"])) && !may(&goes_to(&["a"]), &goes_to(&["a", "b"])));
        assert_eq!(allowed, [(true, "change"), (false, "another"), (false, "add"), (false, "remove")].into());
    }
}
