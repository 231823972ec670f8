//! Keys of a table set and taken out by dotted names.
//!
//! All of them are looked up in the table as it was, so that none moves the place of another; then what is set is set, what is new in a list comes to
//! its end, and what goes is taken out, in lists from the end.

use keepd_protocol::model::escape;
use serde_json::{Map, Value};

use super::source::written_name;

/// Parts of a key.
const MOST_PARTS: usize = 16;

/// A step into a table or a list.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Key(String),
    /// In a list, from 0.
    At(usize),
    /// Behind the last.
    New(usize),
}

/// A key with what it is to hold; null: it goes.
struct Wanted<'a> {
    key: &'a str,
    /// What is left of it below the value that is looked at.
    parts: Vec<String>,
    new: &'a Value,
}

/// The same, looked up.
struct Found<'a> {
    key: &'a str,
    path: Vec<Part>,
    /// None: it goes.
    new: Option<Value>,
}

/// Sets what stands at dotted keys (`retention.keep_daily`, `options."a.b"`), or takes it out (null). A table of a list is named by its number, from 0,
/// or by its `name`. An error names the key; what `value` is then is of no use.
pub fn patch(value: &mut Value, changes: &Map<String, Value>) -> Result<(), String> {
    let mut wanted = Vec::new();
    for (key, new) in changes {
        wanted.push(Wanted { key, parts: split(key).map_err(|why| told(key, &why))?, new });
    }
    patch_below(value, &[], wanted)
}

fn told(key: &str, why: &str) -> String {
    format!("{}: {why}", escape(key))
}

fn split(key: &str) -> Result<Vec<String>, String> {
    let wrong = || "it is no key such as retention.keep_daily".to_owned();
    let parts = toml_edit::Key::parse(key).map_err(|_| wrong())?;
    match parts.len() {
        1..=MOST_PARTS => Ok(parts.into_iter().map(|part| part.get().to_owned()).collect()),
        _ => Err(wrong()),
    }
}

/// `above`: the parts that lead to `value`.
fn patch_below(value: &mut Value, above: &[String], mut wanted: Vec<Wanted<'_>>) -> Result<(), String> {
    wanted.sort_by(|a, b| a.parts.cmp(&b.parts));
    let mut found: Vec<Found<'_>> = Vec::new();
    let mut wanted = wanted.into_iter().peekable();
    while let Some(one) = wanted.next() {
        // What is set in what is set comes into that.
        let mut inner = Vec::new();
        while let Some(next) = wanted.next_if(|next| next.parts.starts_with(&one.parts)) {
            let parts = next.parts.get(one.parts.len()..).unwrap_or_default().to_vec();
            if parts.is_empty() || one.new.is_null() {
                return Err(together(next.key, one.key));
            }
            inner.push(Wanted { parts, ..next });
        }
        let mut new = (!one.new.is_null()).then(|| one.new.clone());
        if let Some(new) = new.as_mut().filter(|_| !inner.is_empty()) {
            patch_below(new, &[above, &one.parts].concat(), inner)?;
        }
        if let Some(path) = find(value, above, &one.parts, new.is_none()).map_err(|why| told(one.key, &why))? {
            found.push(Found { key: one.key, path, new });
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    for (one, next) in found.iter().zip(found.iter().skip(1)) {
        if next.path.starts_with(&one.path) {
            return Err(together(next.key, one.key));
        }
    }
    let (set, gone): (Vec<_>, Vec<_>) = found.into_iter().partition(|found| found.new.is_some());
    for Found { key, path, new } in set {
        put(value, &path, new.unwrap_or_default()).map_err(|why| told(key, &why))?;
    }
    for Found { key, path, .. } in gone.into_iter().rev() {
        take(value, &path).ok_or_else(|| told(key, "there is nothing"))?;
    }
    Ok(())
}

fn together(key: &str, other: &str) -> String {
    format!("{} and {} cannot be changed at once: one stands in the other, or both are the same", escape(key), escape(other))
}

/// Where parts lead in a value; None where there is nothing that could be taken out.
fn find(value: &Value, above: &[String], parts: &[String], is_removal: bool) -> Result<Option<Vec<Part>>, String> {
    let mut at = Some(value);
    let mut path = Vec::new();
    for (n, part) in parts.iter().enumerate() {
        let is_last = n + 1 == parts.len();
        let is_source = above.len() + n == 1 && above.first().or(parts.first()).is_some_and(|outer| outer == "source");
        let (step, next) = match at {
            None => (Part::Key(part.clone()), None),
            Some(Value::Object(table)) => (Part::Key(part.clone()), table.get(part)),
            Some(Value::Array(list)) => match place(list, part, is_source) {
                Ok(place) => (Part::At(place), list.get(place)),
                Err(why) => match part.parse::<usize>() {
                    Ok(number) if number >= list.len() && is_last && !is_removal => (Part::New(number), None),
                    _ => return Err(why),
                },
            },
            Some(_) => return Err(format!("'{}' cannot be in what is no table", escape(part))),
        };
        if next.is_none() && is_removal {
            return Ok(None);
        }
        path.push(step);
        at = next;
    }
    Ok(Some(path))
}

/// The table of a list that a part of a key means.
fn place(list: &[Value], part: &str, is_source: bool) -> Result<usize, String> {
    let is_named = |value: &Value| match is_source {
        true => written_name(value).as_deref() == Some(part),
        false => value.get("name").and_then(Value::as_str) == Some(part),
    };
    let mut named = list.iter().enumerate().filter(|(_, value)| is_named(value)).map(|(n, _)| n);
    let number = part.parse::<usize>().ok().filter(|n| *n < list.len());
    let shown = escape(part);
    match (named.next(), named.next(), number) {
        (Some(_), Some(_), _) => Err(format!("more than one table of the list is called '{shown}'; give the number, from 0")),
        (Some(name), None, Some(number)) if name != number => Err(format!(
            "'{shown}' is what table {name} of the list is called, and the number of another; say {name} for the first, and for the other its name"
        )),
        (Some(place), ..) | (None, _, Some(place)) => Ok(place),
        (None, _, None) => Err(format!(
            "there is no '{shown}' in the list: give the 'name' of one of its tables, or its number, from 0 ({} are there)",
            list.len()
        )),
    }
}

fn put(value: &mut Value, path: &[Part], new: Value) -> Result<(), String> {
    let Some((first, rest)) = path.split_first() else {
        *value = new;
        return Ok(());
    };
    match (first, value) {
        (Part::Key(key), Value::Object(table)) => put(table.entry(key.clone()).or_insert_with(|| Value::Object(Map::new())), rest, new),
        (Part::At(place), Value::Array(list)) => put(list.get_mut(*place).ok_or("there is nothing")?, rest, new),
        (Part::New(number), Value::Array(list)) if *number == list.len() => {
            list.push(new);
            Ok(())
        }
        (Part::New(_), Value::Array(list)) => Err(format!("the next one of the list is {}", list.len())),
        _ => Err("it stands in what is no table".into()),
    }
}

fn take(value: &mut Value, path: &[Part]) -> Option<Value> {
    let (last, outer) = path.split_last()?;
    let inner = outer.iter().try_fold(value, |value, part| match part {
        Part::Key(key) => value.get_mut(key),
        Part::At(place) | Part::New(place) => value.get_mut(*place),
    })?;
    match (last, inner) {
        (Part::Key(key), Value::Object(table)) => table.remove(key),
        (Part::At(place), Value::Array(list)) if *place < list.len() => Some(list.remove(*place)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn patched(value: &Value, changes: Value) -> Result<Value, String> {
        let mut value = value.clone();
        patch(&mut value, changes.as_object().unwrap()).map(|()| value)
    }

    #[test]
    fn keys_go_into_tables_and_lists() {
        let value =
            json!({"retention": {"keep_last": 3}, "source": [{"name": "db", "sqlite": "/a"}, {"files": "/b"}], "destinations": ["a"]});
        let changes = json!({
            "retention.keep_daily": 7, "source.db.sqlite": "/c", "source.b.one_file_system": true, "source.1.exclude": ["x"], "source.2": {"files": "/d"},
            "hooks.before": ["/x"], "nothing.there": null, "retention.keep_last": null, "destinations.0": "b", "\"a.b\"": true,
        });
        assert_eq!(
            patched(&value, changes).unwrap(),
            json!({"retention": {"keep_daily": 7}, "source": [{"name": "db", "sqlite": "/c"}, {"files": "/b", "exclude": ["x"], "one_file_system": true}, {"files": "/d"}],
                "destinations": ["b"], "hooks": {"before": ["/x"]}, "a.b": true})
        );
        for key in ["", "a..b", "source.7", "source.none.x", "source.2.x", "destinations.0.x", &"a.".repeat(20)] {
            assert!(patched(&value, json!({key: 1})).is_err(), "{key}");
        }
    }

    #[test]
    fn numbers_mean_the_list_as_it_was() {
        let value = json!({"source": [{"files": "/a"}, {"files": "/b"}, {"files": "/c"}, {"files": "/d"}]});
        let left = |changes: Value| -> Result<Vec<String>, String> {
            let value = patched(&value, changes)?;
            Ok(value["source"].as_array().unwrap().iter().map(|s| s["files"].as_str().unwrap().to_owned()).collect())
        };
        assert_eq!(left(json!({"source.0": null, "source.1": null})).unwrap(), ["/c", "/d"]);
        assert_eq!(left(json!({"source.0": null, "source.c": null, "source.3.files": "/e"})).unwrap(), ["/b", "/e"]);
        assert_eq!(
            left(json!({"source.5": {"files": "/y"}, "source.0": null, "source.4": {"files": "/x"}})).unwrap(),
            ["/b", "/c", "/d", "/x", "/y"]
        );
        assert!(left(json!({"source.5": {"files": "/y"}})).unwrap_err().contains("source.5: the next one of the list is 4"));
        for (changes, both) in [
            (json!({"source.0": null, "source.a": null}), "the same"),
            (json!({"source.0": null, "source.a.files": "/x"}), "stands in the other"),
            (json!({"source.0.files": "/x", "source": null}), "stands in the other"),
            (json!({"source.7": null}), "no '7'"),
        ] {
            assert!(left(changes.clone()).unwrap_err().contains(both), "{changes}");
        }
    }

    #[test]
    fn what_is_set_in_what_is_set() {
        let changes = json!({"source": [{"files": "/srv/blog"}], "source.blog.exclude": ["x"], "retention.keep_last": 1});
        assert_eq!(
            patched(&json!({}), changes).unwrap(),
            json!({"source": [{"files": "/srv/blog", "exclude": ["x"]}], "retention": {"keep_last": 1}})
        );
        assert!(patched(&json!({}), json!({"a": 5, "a.b": 1})).is_err());
    }

    #[test]
    fn a_name_that_is_anothers_number_is_refused() {
        let value = json!({"source": [{"name": "1", "files": "/a"}, {"files": "/b"}, {"name": "2", "files": "/c"}, {"files": "/x/c"}, {"files": "/y/c"}]});
        assert!(patched(&value, json!({"source.1": null})).unwrap_err().contains("say 0 for the first"));
        assert_eq!(patched(&value, json!({"source.0": null, "source.b": null})).unwrap()["source"].as_array().unwrap().len(), 3);
        assert!(patched(&value, json!({"source.2": null})).is_ok(), "both are the same table");
        assert!(patched(&value, json!({"source.c.one_file_system": true})).unwrap_err().contains("more than one"));
    }

    #[test]
    fn sources_are_named_as_everywhere() {
        let value = json!({"source": [
            {"postgres": {"dbname": ["a", "b"]}}, {"mysql": {"dbname": "shop"}}, {"command": ["/usr/bin/dump", "x"]}, {"files": "/srv/www/"}, {"postgres": {"dbname": "*"}, "name": "all"},
        ]});
        for (name, place) in [("postgres", 0), ("shop", 1), ("dump", 2), ("www", 3), ("all", 4)] {
            let patched = patched(&value, json!({(format!("source.{name}.timeout")): "1m"})).unwrap();
            assert_eq!(patched["source"][place]["timeout"], "1m", "{name}");
        }
    }
}
