//! Tables of a configuration as JSON values: whether two say the same, what differs, and how it is shown.

use keepd_protocol::configuration::FieldChange;
use keepd_protocol::model::escape;
use serde_json::{Map, Value};

/// No table of a configuration is nested deeper.
const DEEPEST: usize = 24;
/// What is shown of a value, in characters.
const LONGEST_SHOWN: usize = 200;
/// What is shown of a place, in characters.
const LONGEST_PLACE: usize = 300;

/// The place of a key beneath another place.
pub fn child(at: &str, key: &str) -> String {
    let mut at = at.to_owned();
    step(&mut at, key);
    at
}

/// Makes a place that of a key beneath it.
pub fn step(at: &mut String, key: &str) {
    if !at.is_empty() {
        at.push('.');
    }
    let bare = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    match bare {
        true => at.push_str(key),
        false => at.push_str(&Value::from(key).to_string()),
    }
}

/// Whether two values say the same; `1` and `1.0` do.
pub fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => a.len() == b.len() && a.iter().all(|(k, v)| b.get(k).is_some_and(|w| same(v, w))),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(v, w)| same(v, w)),
        (Value::Number(a), Value::Number(b)) => a == b || (a.as_i64().is_none() || b.as_i64().is_none()) && a.as_f64() == b.as_f64(),
        _ => a == b,
    }
}

/// Why a value cannot be a table of a configuration.
pub fn check(value: &Value) -> Result<(), String> {
    if !value.is_object() {
        return Err(format!("it is no table, but {}", kind(value)));
    }
    let mut open = vec![(value, 0usize)];
    while let Some((value, depth)) = open.pop() {
        if depth > DEEPEST {
            return Err(format!("it is nested deeper than {DEEPEST} tables"));
        }
        match value {
            Value::Object(table) => {
                // Without the whole place, which would take far more room than what is there.
                let wrong = table.iter().find_map(|(key, value)| Some((key, cannot_be(value)?)));
                if let Some((key, why)) = wrong {
                    return Err(format!("{} {why}", place(key)));
                }
                open.extend(table.values().map(|value| (value, depth + 1)));
            }
            Value::Array(list) => {
                if let Some(why) = list.iter().find_map(cannot_be) {
                    return Err(format!("an array holds what {why}"));
                }
                open.extend(list.iter().map(|value| (value, depth + 1)));
            }
            _ => {}
        }
    }
    Ok(())
}

fn cannot_be(value: &Value) -> Option<&'static str> {
    match value {
        Value::Null => Some("is null, which no configuration can say"),
        Value::Number(number) if number.as_i64().is_none() && number.is_u64() => Some("is a larger number than a configuration can hold"),
        _ => None,
    }
}

/// A place as it is shown: harmless and not too long.
pub fn place(at: &str) -> String {
    let text = escape(at);
    match text.char_indices().nth(LONGEST_PLACE) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "an array",
        Value::Object(_) => "a table",
    }
}

/// What differs, in the order of the keys, and no more than `most` of it. Where nothing was, or is, each key of the table by itself.
pub fn changes(before: Option<&Value>, after: Option<&Value>, most: usize) -> Vec<FieldChange> {
    let nothing = Value::Object(Map::new());
    let mut found = Vec::new();
    differ("", before.unwrap_or(&nothing), after.unwrap_or(&nothing), most.saturating_add(1), &mut found);
    if found.len() > most {
        found.truncate(most);
        found.push(FieldChange { at: "…".into(), before: None, after: Some("(more than is shown)".into()) });
    }
    found
}

fn differ(at: &str, before: &Value, after: &Value, most: usize, found: &mut Vec<FieldChange>) {
    if found.len() >= most || same(before, after) {
        return;
    }
    let mut one = |at: &str, before: Option<&Value>, after: Option<&Value>| match (before, after) {
        _ if found.len() >= most => {}
        (Some(before), Some(after)) => differ(at, before, after, most, found),
        _ => found.push(FieldChange { at: place(at), before: before.map(|v| show(at, v)), after: after.map(|v| show(at, v)) }),
    };
    match (before, after) {
        (Value::Object(b), Value::Object(a)) => {
            let keys: std::collections::BTreeSet<&String> = b.keys().chain(a.keys()).collect();
            keys.into_iter().for_each(|key| one(&child(at, key), b.get(key), a.get(key)));
        }
        (Value::Array(b), Value::Array(a)) if b.iter().chain(a).any(Value::is_object) => {
            (0..b.len().max(a.len())).for_each(|n| one(&format!("{at}[{n}]"), b.get(n), a.get(n)));
        }
        _ => found.push(FieldChange { at: place(at), before: Some(show(at, before)), after: Some(show(at, after)) }),
    }
}

/// As TOML writes it, on one line, harmless and not too long.
pub fn show(at: &str, value: &Value) -> String {
    let mut text = String::new();
    write(at, value, &mut text);
    let text = escape(&text);
    match text.char_indices().nth(LONGEST_SHOWN) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

fn write(at: &str, value: &Value, out: &mut String) {
    // More would not be shown.
    if out.len() > 8 * LONGEST_SHOWN {
        return;
    }
    match value {
        Value::String(text) if is_kept_back(at, text) => out.push_str("\"(not shown)\""),
        Value::Object(table) => {
            out.push('{');
            for (n, (key, value)) in table.iter().enumerate().take(LONGEST_SHOWN) {
                out.push_str(if n == 0 { " " } else { ", " });
                out.push_str(&child("", key));
                out.push_str(" = ");
                write(&child(at, key), value, out);
            }
            out.push_str(if table.is_empty() { "}" } else { " }" });
        }
        Value::Array(list) => {
            out.push('[');
            for (n, value) in list.iter().enumerate().take(LONGEST_SHOWN) {
                if n > 0 {
                    out.push_str(", ");
                }
                write(at, value, out);
            }
            out.push(']');
        }
        other => out.push_str(&other.to_string()),
    }
}

/// A secret has no place in a table; one that stands there all the same, from somebody else's hands, is not shown.
fn is_kept_back(at: &str, text: &str) -> bool {
    let key = at.rsplit('.').next().unwrap_or_default();
    let word = ["password", "passphrase", "secret", "token", "pin", "credential", "application_key", "account_key"];
    let plain_name = matches!(key, "credential" | "token") && text.len() <= 64;
    crate::config::looks_like_key(text)
        || (!plain_name && word.iter().any(|w| key == *w || (w.len() > 3 && key.contains(w))) && !key.ends_with("_id"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_are_the_same_however_they_are_written() {
        assert!(same(&json!({"a": 1, "b": [1.0]}), &json!({"b": [1], "a": 1.0})));
        assert!(!same(&json!(i64::MAX), &json!(i64::MAX - 1)));
        assert!(!same(&json!({"a": 1}), &json!({"a": 1, "b": 2})));
        assert!(!same(&json!("1"), &json!(1)));
    }

    #[test]
    fn what_differs_is_told_place_by_place() {
        let before = json!({"every": "6h", "destinations": ["a", "b"], "source": [{"files": "/a", "exclude": ["x"]}], "enabled": false});
        let after =
            json!({"every": "6h", "destinations": ["a"], "source": [{"files": "/a", "exclude": ["x", "y\u{1b}[2J"]}, {"sqlite": "/b"}]});
        let told: Vec<String> = changes(Some(&before), Some(&after), 100)
            .into_iter()
            .map(|c| format!("{}: {} -> {}", c.at, c.before.unwrap_or("-".into()), c.after.unwrap_or("-".into())))
            .collect();
        assert_eq!(
            told,
            [
                "destinations: [\"a\", \"b\"] -> [\"a\"]",
                "enabled: false -> -",
                "source[0].exclude: [\"x\"] -> [\"x\", \"y\\u001b[2J\"]",
                "source[1]: - -> { sqlite = \"/b\" }",
            ]
        );
        assert_eq!(changes(None, Some(&json!({"a": 1, "b": "c"})), 2).len(), 2);
        let many = changes(None, Some(&json!({"a": 1, "b": "c", ("k".repeat(900)): 1})), 2);
        assert_eq!((many.len(), many[2].at.as_str()), (3, "…"));
    }

    #[test]
    fn a_value_is_shown_short_and_without_what_is_secret() {
        let long = show("x", &json!("y".repeat(5000)));
        assert!(long.chars().count() <= LONGEST_SHOWN + 1 && long.ends_with('…'));
        assert_eq!(show("secret_access_key", &json!("AKIA")), "\"(not shown)\"");
        assert_eq!(show("password", &json!({"env": "P"})), "{ env = \"P\" }");
        assert_eq!(show("access_key_id", &json!("AKIA")), "\"AKIA\"");
        assert!(!show("key_file", &json!("ab".repeat(32))).contains("abab"));
    }

    #[test]
    fn what_no_table_can_be_is_refused() {
        assert!(check(&json!({"a": [1, {"b": "c"}]})).is_ok());
        for wrong in [json!(null), json!([]), json!("x"), json!({"a": [null]}), json!({"a": u64::MAX})] {
            assert!(check(&wrong).is_err(), "{wrong}");
        }
        let deep = (0..100).fold(json!(1), |inner, _| json!({"a": inner}));
        assert!(check(&deep).unwrap_err().contains("nested"));
    }
}
