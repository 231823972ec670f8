//! Texts of TOML with another table in them: only the keys that differ are touched, so that comments and the way things are written stay.
//!
//! In: a text, the path of a table, the table as JSON. Out: the new text. Whether it says what it should is looked at by whoever asked
//! ([`super::draft`]), for it is cheaper to read it again than to prove this here.

use std::fmt::Write;
use std::str::FromStr;

use serde_json::{Map, Value as Json};
use toml_edit::{Array, ArrayOfTables, DocumentMut, InlineTable, Item, RawString, Table, TableLike, Value};

use super::line_ends::with_line_ends;

/// A table that is no longer than this stands in one line.
const INLINE: usize = 100;
/// Keys that come first in what is written anew, in this order; the others by name.
const FIRST: [&str; 14] = [
    "name",
    "service",
    "root",
    "sqlite",
    "files",
    "postgres",
    "mysql",
    "command",
    "key_file",
    "enabled",
    "schedule",
    "every",
    "destinations",
    "destination",
];

/// A document that is changed.
struct Edited<'t> {
    text: &'t str,
    document: DocumentMut,
}

impl<'t> Edited<'t> {
    fn of(text: &'t str) -> Result<Self, String> {
        let plain = text.strip_prefix('\u{feff}').unwrap_or(text);
        let document = DocumentMut::from_str(plain).map_err(|e| e.message().to_owned())?;
        Ok(Self { text, document })
    }

    fn table(&mut self, path: &[&str]) -> Option<&mut Item> {
        path.iter().try_fold(self.document.as_item_mut(), |item, key| item.as_table_like_mut()?.get_mut(key))
    }

    /// Takes an item out of the table at `outer`; comments that stay go to the next key there, or into `left` with the place of the table that they
    /// stood in or above.
    fn take(&mut self, outer: &[&str], name: &str, left: &mut Vec<(isize, String)>) -> Option<()> {
        let outer = self.table(outer)?;
        let position = outer.as_table().and_then(Table::position).unwrap_or_default();
        let (gone, comments) = remove(outer.as_table_like_mut()?, name)?;
        comments_of(&gone, left);
        left.push((position, comments));
        Some(())
    }

    /// Puts comments back that stay of what went.
    fn put_back(&mut self, mut left: Vec<(isize, String)>) {
        left.retain(|(_, comments)| comments.contains('#'));
        // From the last to the first, so that they come to stand in their order.
        left.sort_by_key(|(position, _)| std::cmp::Reverse(*position));
        for (position, comments) in left {
            self.put_behind(position, &comments);
        }
    }

    /// Puts comments above the first header behind a place, or at the end.
    fn put_behind(&mut self, position: isize, comments: &str) {
        let mut next = None;
        each_header(self.document.as_table_mut(), &mut |table| {
            let at = table.position().filter(|at| *at > position);
            next = [next, at].into_iter().flatten().min();
        });
        let mut is_put = false;
        each_header(self.document.as_table_mut(), &mut |table| {
            if next.is_some() && table.position() == next && !is_put {
                let prefix = format!("{comments}{}", text_of(table.decor().prefix()));
                table.decor_mut().set_prefix(prefix);
                is_put = true;
            }
        });
        if !is_put {
            let trailing = format!("{comments}{}", text_of(Some(self.document.trailing())));
            self.document.set_trailing(trailing);
        }
    }

    fn finish(self) -> String {
        let mut text = with_line_ends(self.text.strip_prefix('\u{feff}').unwrap_or(self.text), &self.document.to_string());
        if self.text.starts_with('\u{feff}') {
            text.insert(0, '\u{feff}');
        }
        text
    }
}

/// The text in which the table at `path`, which is there, holds `new`.
pub(super) fn with_table(text: &str, path: &[&str], new: &Map<String, Json>) -> Result<String, String> {
    let mut edited = Edited::of(text)?;
    // Of the nearest table around it that has a header.
    let around = (0..=path.len()).rev().find_map(|n| edited.table(path.get(..n)?)?.as_table()?.position());
    let item = edited.table(path).ok_or_else(|| format!("it has no table [{}]", path.join(".")))?;
    let nested = matches!(item, Item::Table(table) if !table.is_dotted());
    let table = item.as_table_like_mut().ok_or_else(|| format!("{} is no table", path.join(".")))?;
    let mut left = Left { position: around.unwrap_or_default(), comments: Vec::new() };
    update_table(table, new, nested, true, &mut left)?;
    if let Item::Table(table) = item {
        settle(table);
    }
    edited.put_back(left.comments);
    Ok(edited.finish())
}

/// The text without the table at `path`, and without the one around it where nothing is left in that. The comments right above go with it; those
/// that a blank line separates from it stay.
pub(super) fn without_table(text: &str, path: &[&str]) -> Result<String, String> {
    let mut edited = Edited::of(text)?;
    let missing = || format!("it has no table [{}]", path.join("."));
    let (name, outer) = path.split_last().ok_or_else(missing)?;
    let mut left = Vec::new();
    edited.take(outer, name, &mut left).ok_or_else(missing)?;
    if let Some((name, above)) = outer.split_last()
        && edited.table(outer).and_then(|t| t.as_table_like_mut()).is_some_and(|t| t.is_empty())
    {
        edited.take(above, name, &mut left);
    }
    edited.put_back(left);
    // Where it was the first one, the blank lines above the next are not wanted; those that somebody wrote stay.
    let head = |text: &str| {
        let at = text.strip_prefix('\u{feff}').unwrap_or(text);
        let blank = at.len() - at.trim_start_matches(['\r', '\n']).len();
        (text.len() - at.len(), text.len() - at.len() + blank)
    };
    let mut new = edited.finish();
    let ((_, wanted), (begin, end)) = (head(text), head(&new));
    new.replace_range(begin..end, text.get(begin..wanted).unwrap_or_default());
    Ok(new)
}

/// The text with a table at its end, which it must not have yet.
pub(super) fn with_new_table(text: &str, path: &[&str], new: &Map<String, Json>) -> Result<String, String> {
    let mut table = made_table(new, true)?;
    let mut outer = path;
    let mut document = DocumentMut::new();
    while let Some((key, rest)) = outer.split_last() {
        let mut around = Table::new();
        around.set_implicit(true);
        around.insert(key, Item::Table(table));
        table = around;
        outer = rest;
    }
    *document.as_table_mut() = table;
    let mut whole = text.to_owned();
    if !whole.is_empty() && !whole.ends_with('\n') {
        whole.push('\n');
    }
    if !whole.trim_start_matches('\u{feff}').trim().is_empty() {
        whole.push('\n');
    }
    whole.push_str(&document.to_string());
    Ok(with_line_ends(text, &whole))
}

/// All tables with a header of their own.
fn each_header(table: &mut Table, ask: &mut dyn FnMut(&mut Table)) {
    for (_, item) in table.iter_mut() {
        match item {
            Item::Table(inner) => {
                if !(inner.is_dotted() || inner.is_implicit() && inner.get_values().is_empty()) {
                    ask(inner);
                }
                each_header(inner, ask);
            }
            Item::ArrayOfTables(list) => {
                for inner in list.iter_mut() {
                    ask(inner);
                    each_header(inner, ask);
                }
            }
            _ => {}
        }
    }
}

/// What stays of the comments above the headers of a table that goes, with their places.
fn headers(table: &Table, left: &mut Vec<(isize, String)>) {
    if let Some(position) = table.position() {
        left.push((position, detached(text_of(table.decor().prefix())).to_owned()));
    }
    for (_, item) in table.iter() {
        match item {
            Item::Table(inner) => headers(inner, left),
            Item::ArrayOfTables(list) => list.iter().for_each(|inner| headers(inner, left)),
            _ => {}
        }
    }
}

/// The same of whatever goes.
fn comments_of(gone: &Item, left: &mut Vec<(isize, String)>) {
    match gone {
        Item::Table(gone) => headers(gone, left),
        Item::ArrayOfTables(gone) => gone.iter().for_each(|gone| headers(gone, left)),
        _ => {}
    }
}

/// Comments of what goes from a table, with the places of the tables that they stood in or above.
struct Left {
    /// Of the table that is changed just now.
    position: isize,
    comments: Vec<(isize, String)>,
}

/// What is above the last blank line: no comment on what follows, but on more than that.
fn detached(prefix: &str) -> &str {
    let mut at = 0;
    let mut end = 0;
    for line in prefix.split_inclusive('\n') {
        at += line.len();
        if line.trim().is_empty() && line.ends_with('\n') {
            end = at;
        }
    }
    prefix.get(..end).unwrap_or_default()
}

fn text_of(raw: Option<&RawString>) -> &str {
    raw.and_then(RawString::as_str).unwrap_or_default()
}

/// Takes a key out. What stays of the comments above it goes above the next key, or is given back.
fn remove(table: &mut dyn TableLike, key: &str) -> Option<(Item, String)> {
    let prefix = |table: &dyn TableLike, key: &str| match table.get_key_value(key) {
        Some((key, Item::Value(_))) => detached(text_of(key.leaf_decor().prefix())).to_owned(),
        _ => String::new(),
    };
    let mut comments = prefix(table, key);
    let next = table.iter().skip_while(|(k, _)| *k != key).skip(1).find(|(_, item)| item.is_value()).map(|(k, _)| k.to_owned());
    let gone = table.remove(key)?;
    if comments.contains('#')
        && let Some(mut next) = next.and_then(|next| table.key_mut(&next).map(|_| next)).and_then(|next| table.key_mut(&next))
    {
        let merged = format!("{comments}{}", text_of(next.leaf_decor().prefix()));
        next.leaf_decor_mut().set_prefix(merged);
        comments.clear();
    }
    Some((gone, comments))
}

fn take_out(table: &mut dyn TableLike, key: &str, left: &mut Left) {
    if let Some((gone, comments)) = remove(table, key) {
        comments_of(&gone, &mut left.comments);
        left.comments.push((left.position, comments));
    }
}

/// `top`: the item's own table, in which lists of tables are written as such.
fn update_table(table: &mut dyn TableLike, new: &Map<String, Json>, nested: bool, top: bool, left: &mut Left) -> Result<(), String> {
    let gone: Vec<String> = table.iter().map(|(key, _)| key.to_owned()).filter(|key| !new.contains_key(key)).collect();
    for key in gone {
        take_out(table, &key, left);
    }
    for (key, value) in ordered(new) {
        let fits = match table.get_mut(key) {
            Some(item) => update(item, value, left)?,
            None => false,
        };
        if !fits {
            take_out(table, key, left);
            table.insert(key, made(value, nested, top)?);
        }
    }
    Ok(())
}

/// A table that had no header and now has keys gets one, above the first of those in it.
fn settle(table: &mut Table) {
    if !table.is_implicit() || table.is_dotted() || table.get_values().is_empty() {
        return;
    }
    let mut first = None;
    each_header(table, &mut |inner| first = [first, inner.position()].into_iter().flatten().min());
    table.set_implicit(false);
    table.set_position(first);
}

/// Changes an item in its place; false when it is something of another kind.
fn update(item: &mut Item, new: &Json, left: &mut Left) -> Result<bool, String> {
    if json(item).as_ref() == Some(new) {
        return Ok(true);
    }
    match (item, new) {
        (Item::Table(table), Json::Object(new)) => {
            let nested = !table.is_dotted();
            update_inner(table, new, nested, left)?;
            settle(table);
        }
        (Item::ArrayOfTables(list), Json::Array(new)) => return update_list(list, new, left),
        (Item::Value(value), new) => update_value(value, new, left)?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// The same of a table in it, which may have a header and so a place of its own.
fn update_inner(table: &mut Table, new: &Map<String, Json>, nested: bool, left: &mut Left) -> Result<(), String> {
    let around = left.position;
    left.position = table.position().unwrap_or(around);
    let updated = update_table(table, new, nested, false, left);
    left.position = around;
    updated
}

fn update_value(value: &mut Value, new: &Json, left: &mut Left) -> Result<(), String> {
    match (&mut *value, new) {
        (value, new) if value_json(value).as_ref() == Some(new) => {}
        (Value::InlineTable(table), Json::Object(new)) => update_table(table, new, false, false, left)?,
        (Value::Array(list), Json::Array(new)) => update_array(list, new, left)?,
        (value, new) => {
            let decor = value.decor().clone();
            *value = inline(new)?;
            *value.decor_mut() = decor;
        }
    }
    Ok(())
}

/// Element by element where their number stays; else those that are the same stay as they are written, and the others are written anew.
fn update_list(list: &mut ArrayOfTables, new: &[Json], left: &mut Left) -> Result<bool, String> {
    if new.is_empty() || !new.iter().all(Json::is_object) {
        return Ok(false);
    }
    let new = new.iter().filter_map(Json::as_object);
    if list.len() == new.clone().count() {
        for (table, new) in list.iter_mut().zip(new) {
            update_inner(table, new, true, left)?;
        }
        return Ok(true);
    }
    // Only ever forward: tables are written where they stood.
    let mut old = std::mem::take(list).into_iter().collect::<Vec<Table>>().into_iter();
    for new in new {
        let same = old.as_slice().iter().position(|table| table_json(table).as_ref().and_then(Json::as_object) == Some(new));
        let skipped = same.unwrap_or_default();
        old.by_ref().take(skipped).for_each(|gone| headers(&gone, &mut left.comments));
        list.push(match same.and_then(|_| old.next()) {
            Some(table) => table,
            None => made_table(new, false)?,
        });
    }
    old.for_each(|gone| headers(&gone, &mut left.comments));
    Ok(true)
}

fn update_array(list: &mut Array, new: &[Json], left: &mut Left) -> Result<(), String> {
    if list.len() == new.len() {
        return list.iter_mut().zip(new).try_for_each(|(old, new)| update_value(old, new, left));
    }
    let mut bare = list.clone();
    bare.decor_mut().clear();
    if !bare.to_string().contains(['#', '\n']) {
        let decor = list.decor().clone();
        *list = array(new)?;
        for value in list.iter_mut() {
            if let Some(old) = bare.iter().find(|old| value_json(old) == value_json(value)) {
                let around = value.decor().clone();
                *value = old.clone();
                *value.decor_mut() = around;
            }
        }
        *list.decor_mut() = decor;
        return Ok(());
    }
    // What the list keeps, in its order.
    let mut at = 0;
    for new in new {
        let same = (at..list.len()).find(|n| list.get(*n).and_then(value_json).as_ref() == Some(new));
        match same {
            Some(same) => (at..same).for_each(|_| remove_line(list, at)),
            None => insert_line(list, at, inline(new)?),
        }
        at += 1;
    }
    while list.len() > at {
        remove_line(list, at);
    }
    Ok(())
}

/// What stands before an element: the end of the line before it, which speaks of the one before, and the rest.
fn line_end(prefix: &str) -> (String, String) {
    let (head, rest) = prefix.split_at_checked(prefix.find('\n').unwrap_or_default()).unwrap_or(("", prefix));
    (head.to_owned(), rest.to_owned())
}

/// The text before the element at `at`, or before the bracket.
fn before(list: &Array, at: usize) -> (String, String) {
    line_end(list.get(at).map_or_else(|| text_of(Some(list.trailing())), |value| text_of(value.decor().prefix())))
}

fn set_before(list: &mut Array, at: usize, text: String) {
    match list.get_mut(at) {
        Some(value) => value.decor_mut().set_prefix(text),
        None => list.set_trailing(text),
    }
}

/// Takes an element out with its line.
fn remove_line(list: &mut Array, at: usize) {
    let (above, _) = before(list, at);
    list.remove(at);
    let (_, rest) = before(list, at);
    set_before(list, at, format!("{above}{rest}"));
}

/// Puts an element on a line of its own.
fn insert_line(list: &mut Array, at: usize, mut value: Value) {
    let (head, rest) = before(list, at);
    let like = [at, at.saturating_sub(1)].into_iter().filter_map(|n| list.get(n)).map(|v| text_of(v.decor().prefix()).to_owned());
    let indent = like.filter_map(|prefix| prefix.rsplit_once('\n').map(|(_, indent)| indent.to_owned())).next();
    let indent = indent.unwrap_or_else(|| "    ".to_owned());
    if at == list.len() && !list.trailing_comma() {
        // What stands behind the last one without a comma speaks of it; behind a comma it goes on doing so.
        list.set_trailing_comma(true);
    }
    value.decor_mut().set_prefix(format!("{head}\n{indent}"));
    value.decor_mut().set_suffix("");
    list.insert_formatted(at, value);
    let rest = if rest.is_empty() { "\n".to_owned() } else { rest };
    set_before(list, at + 1, rest);
}

fn ordered(table: &Map<String, Json>) -> Vec<(&str, &Json)> {
    let mut keys: Vec<(&str, &Json)> = table.iter().map(|(key, value)| (key.as_str(), value)).collect();
    keys.sort_by_key(|(key, _)| (FIRST.iter().position(|k| k == key).unwrap_or(FIRST.len()), *key));
    keys
}

fn made_table(new: &Map<String, Json>, top: bool) -> Result<Table, String> {
    let mut table = Table::new();
    for (key, value) in ordered(new) {
        table.insert(key, made(value, true, top)?);
    }
    Ok(table)
}

/// `nested`: tables with a header of their own may stand there. `top`: and lists of them.
fn made(value: &Json, nested: bool, top: bool) -> Result<Item, String> {
    match value {
        Json::Array(list) if nested && top && !list.is_empty() && list.iter().all(Json::is_object) => {
            let mut tables = ArrayOfTables::new();
            for element in list.iter().filter_map(Json::as_object) {
                tables.push(made_table(element, false)?);
            }
            Ok(Item::ArrayOfTables(tables))
        }
        Json::Object(table) => {
            let short = inline(value)?;
            if nested && short.to_string().len() > INLINE { Ok(Item::Table(made_table(table, false)?)) } else { Ok(Item::Value(short)) }
        }
        Json::Array(list) => {
            let mut array = array(list)?;
            if array.to_string().len() > INLINE {
                array.iter_mut().for_each(|value| value.decor_mut().set_prefix("\n    "));
                array.set_trailing("\n");
                array.set_trailing_comma(true);
            }
            Ok(Item::Value(Value::Array(array)))
        }
        value => Ok(Item::Value(inline(value)?)),
    }
}

fn array(list: &[Json]) -> Result<Array, String> {
    let mut array = Array::new();
    for value in list {
        array.push(inline(value)?);
    }
    Ok(array)
}

/// A value that stands in a line.
fn inline(value: &Json) -> Result<Value, String> {
    match value {
        Json::Null => Err("null is no value of a configuration; leave the key out".to_owned()),
        Json::Bool(value) => Ok(Value::from(*value)),
        Json::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(whole), _) => Ok(Value::from(whole)),
            (None, Some(fraction)) if number.is_f64() => Ok(Value::from(fraction)),
            _ => Err(format!("the number {number} is too large for a configuration")),
        },
        Json::String(text) => string(text),
        Json::Array(list) => Ok(Value::Array(array(list)?)),
        Json::Object(table) => {
            let mut inner = InlineTable::new();
            for (key, value) in ordered(table) {
                inner.insert(key, inline(value)?);
            }
            Ok(Value::InlineTable(inner))
        }
    }
}

/// A text on one line, whatever is in it: the line ends of the file are nobody's value.
fn string(text: &str) -> Result<Value, String> {
    if !text.chars().any(char::is_control) {
        return Ok(Value::from(text));
    }
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            c if c.is_control() => drop(write!(quoted, "\\u{:04X}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    Value::from_str(&quoted).map_err(|e| e.message().to_owned())
}

/// As [`super::reader::Table::json`] says it. None for what is not there.
fn json(item: &Item) -> Option<Json> {
    match item {
        Item::None => None,
        Item::Value(value) => value_json(value),
        Item::Table(table) => table_json(table),
        Item::ArrayOfTables(list) => list.iter().map(|table| table_json(table)).collect::<Option<Vec<_>>>().map(Json::from),
    }
}

fn value_json(value: &Value) -> Option<Json> {
    Some(match value {
        Value::String(text) => text.value().as_str().into(),
        Value::Integer(number) => (*number.value()).into(),
        Value::Float(number) => match serde_json::Number::from_f64(*number.value()) {
            Some(number) => Json::Number(number),
            None => return None,
        },
        Value::Boolean(value) => (*value.value()).into(),
        Value::Datetime(time) => time.value().to_string().into(),
        Value::Array(list) => list.iter().map(value_json).collect::<Option<Vec<_>>>()?.into(),
        Value::InlineTable(table) => table_json(table)?,
    })
}

fn table_json(table: &dyn TableLike) -> Option<Json> {
    let entries = table.iter().filter(|(_, item)| !item.is_none()).map(|(key, item)| Some((key.to_owned(), json(item)?)));
    entries.collect::<Option<Map<_, _>>>().map(Json::Object)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Map<String, Json> {
        let json: Json = serde_json::from_str(text).unwrap();
        json.as_object().unwrap().clone()
    }

    /// A table's text and path, and the text with another value there.
    fn set(text: &str, path: &[&str], new: &str) -> String {
        with_table(text, path, &table(new)).unwrap()
    }

    #[test]
    fn only_what_differs_is_touched() {
        assert_eq!(
            set(
                "# top\n\n[job.a] # ours\n# when\nevery   =  '6h' # often\nenabled = true\n\n[job.b]\n",
                &["job", "a"],
                r#"{"every": "7h", "enabled": true}"#
            ),
            "# top\n\n[job.a] # ours\n# when\nevery   =  \"7h\" # often\nenabled = true\n\n[job.b]\n"
        );
        assert_eq!(
            set("[job.a]\nat = 2026-12-24T18:00:00\nmost = 0xff\n", &["job", "a"], r#"{"at": "2026-12-24T18:00:00", "most": 255}"#),
            "[job.a]\nat = 2026-12-24T18:00:00\nmost = 0xff\n"
        );
        assert_eq!(
            set("job.a.every = '6h' # x\n", &["job", "a"], r#"{"every": "6h", "enabled": true}"#),
            "job.a.every = '6h' # x\njob.a.enabled = true\n"
        );
        assert_eq!(
            set("job = { a = { every = '6h' } } # x\n", &["job", "a"], r#"{"every": "7h"}"#),
            "job = { a = { every = \"7h\" } } # x\n"
        );
        assert_eq!(
            set("[job]\na.every = '6h'\nb.every = '1h'\n", &["job", "a"], r#"{"every": "7h"}"#),
            "[job]\na.every = \"7h\"\nb.every = '1h'\n"
        );
        assert_eq!(
            set("\u{feff}[a]\r\nx = 1\r\n# c\r\ny = 2\r\n", &["a"], r#"{"x": 3, "y": 2, "z": 1}"#),
            "\u{feff}[a]\r\nx = 3\r\n# c\r\ny = 2\r\nz = 1\r\n"
        );
    }

    #[test]
    fn lists_keep_what_stays() {
        let text = "[[job.a.source]] # first\nfiles = '/a' # a\n\n# the second\n[[job.a.source]]\nfiles = '/b' # b\n[job.b]\n";
        assert_eq!(
            set(text, &["job", "a"], r#"{"source": [{"files": "/a"}, {"files": "/c"}]}"#),
            "[[job.a.source]] # first\nfiles = '/a' # a\n\n# the second\n[[job.a.source]]\nfiles = \"/c\" # b\n[job.b]\n"
        );
        assert_eq!(
            set(text, &["job", "a"], r#"{"source": [{"files": "/b"}]}"#),
            "\n# the second\n[[job.a.source]]\nfiles = '/b' # b\n[job.b]\n"
        );
        assert_eq!(
            set(text, &["job", "a"], r#"{"source": [{"files": "/a"}, {"files": "/n"}, {"files": "/b"}]}"#),
            "[[job.a.source]] # first\nfiles = '/a' # a\n\n[[job.a.source]]\nfiles = \"/n\"\n\n# the second\n[[job.a.source]]\nfiles = '/b' # b\n[job.b]\n"
        );
        let text = "[a]\nlist = [ # all\n    # the first\n    'a', # is a\n    'b', # is b\n] # end\n";
        assert_eq!(
            set(text, &["a"], r#"{"list": ["a", "n", "b"]}"#),
            "[a]\nlist = [ # all\n    # the first\n    'a', # is a\n    \"n\",\n    'b', # is b\n] # end\n"
        );
        assert_eq!(set(text, &["a"], r#"{"list": ["b"]}"#), "[a]\nlist = [ # all\n    'b', # is b\n] # end\n");
        assert_eq!(
            set(text, &["a"], r#"{"list": ["a", "b", "c"]}"#),
            "[a]\nlist = [ # all\n    # the first\n    'a', # is a\n    'b', # is b\n    \"c\",\n] # end\n"
        );
        assert_eq!(set("[a]\nlist = ['a', 'b'] # x\n", &["a"], r#"{"list": ["a"]}"#), "[a]\nlist = ['a'] # x\n");
    }

    #[test]
    fn comments_outlive_what_they_stood_above() {
        let text = "[job.a]\nevery = '6h'\n# on all\n\n# on the zone\ntimezone = 'UTC'\n\n# on sources\n\n# the first\n[[job.a.source]]\nfiles = '/a'\n\n\
                    # on the second\n\n[[job.a.source]]\nfiles = '/b'\n\n# b\n[job.b]\n";
        assert_eq!(
            set(text, &["job", "a"], r#"{"every": "6h", "timezone": "UTC", "source": [{"files": "/a"}]}"#),
            text.replace("[[job.a.source]]\nfiles = '/b'\n", "")
        );
        assert_eq!(
            set(text, &["job", "a"], r#"{"every": "6h", "timezone": "UTC", "source": [{"files": "/b"}]}"#),
            text.replace("# the first\n[[job.a.source]]\nfiles = '/a'\n", "")
        );
        assert_eq!(
            set(text, &["job", "a"], r#"{"every": "6h", "source": [{"files": "/a"}, {"files": "/b"}]}"#),
            text.replace("# on the zone\ntimezone = 'UTC'\n", "")
        );
        let none = set(text, &["job", "a"], r#"{"every": "6h", "timezone": "UTC"}"#);
        assert!(none.contains("# on sources\n") && none.contains("# on the second\n") && !none.contains("# the first"), "{none}");
    }

    #[test]
    fn a_table_that_is_only_implied_gets_its_header_where_it_is() {
        assert_eq!(
            set(
                "# top\n\n[daemon]\n\n# a's\n[job.a.hooks]\nbefore = ['/x']\n",
                &["job", "a"],
                r#"{"every": "6h", "hooks": {"before": ["/x"]}}"#
            ),
            "# top\n\n[daemon]\n\n[job.a]\nevery = \"6h\"\n\n# a's\n[job.a.hooks]\nbefore = ['/x']\n"
        );
    }

    #[test]
    fn what_is_new_is_written_as_people_write() {
        let value = r#"{"destinations": ["local", "offsite"], "every": "6h", "retention": {"keep_daily": 7},
            "source": [{"postgres": {"dbname": "shop", "password": {"file": "/s/pw"}}, "name": "db"},
                       {"files": "/srv/a", "exclude": ["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb", "ccccccccccccccccccccccccccc"]}],
            "hooks": {"before": ["/usr/bin/one", "two words"], "after": {"shell": "a | b", "timeout": "30s", "run_as": "somebody-with-a-long-name"}}}"#;
        insta::with_settings!({ snapshot_path => "../../tests/config/snapshots", prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!("written_anew", with_new_table("[daemon]\nmemory = 1", &["job", "shop"], &table(value)).unwrap());
        });
        assert_eq!(
            with_new_table("", &["destination", "a.b"], &table(r#"{"service": "fs", "root": "/d"}"#)).unwrap(),
            "[destination.\"a.b\"]\nservice = \"fs\"\nroot = \"/d\"\n"
        );
        assert_eq!(with_new_table("x = 1\r\n", &["daemon"], &table("{}")).unwrap(), "x = 1\r\n\r\n[daemon]\r\n");
        assert!(with_new_table("", &["daemon"], &table(r#"{"a": null}"#)).unwrap_err().contains("null"));
        assert!(with_new_table("", &["daemon"], &table(r#"{"a": 18446744073709551615}"#)).unwrap_err().contains("too large"));
    }

    #[test]
    fn what_is_taken_out_leaves_the_comments_of_others() {
        let without = |text: &str, path: &[&str]| without_table(text, path).unwrap();
        assert_eq!(
            without(
                "# the file\n\n# a\n[job.a]\nx = 1 # x\n# in a\n\n# on sources\n\n[[job.a.source]]\nfiles = '/a'\n# tail\n\n# b\n[job.b]\n",
                &["job", "a"]
            ),
            "# the file\n\n# in a\n\n# on sources\n\n# tail\n\n# b\n[job.b]\n"
        );
        assert_eq!(without("# the file\n\n[job.a]\nx = 1\n", &["job", "a"]), "# the file\n\n");
        assert_eq!(without("# of a\n[job.a]\nx = 1\n", &["job", "a"]), "");
        assert_eq!(without("[job]\n[job.a]\nx = 1\n", &["job", "a"]), "");
        assert_eq!(without("job.a.x = 1\njob.b.x = 2\n", &["job", "a"]), "job.b.x = 2\n");
        assert_eq!(without("# top\n\njob = { a = { x = 1 } }\ny = 1\n", &["job", "a"]), "# top\n\ny = 1\n");
        assert_eq!(without("job = { a = { x = 1 }, b = {} } # jobs\n", &["job", "a"]), "job = { b = {} } # jobs\n");
        // Blank lines at the head are whoever wrote them's.
        assert_eq!(without("\r\n\n[job.b]\n\n[job.a]\n", &["job", "a"]), "\r\n\n[job.b]\n");
        assert_eq!(without("[job.a]\n\n[job.b]\n", &["job", "a"]), "[job.b]\n");
        assert_eq!(without("\u{feff}[job.a]\n\n[job.b]\n", &["job", "a"]), "\u{feff}[job.b]\n");
        assert!(without_table("[job.b]\n", &["job", "a"]).is_err());
    }
}
