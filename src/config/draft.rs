//! A change of the configuration that is not made yet: items set and removed in the texts, shown as a difference, committed at once.
//!
//! In: the texts as they are, items as JSON. Out: the texts as they will be. After every step the text is read again and must say exactly what
//! was asked for; else the step fails and changes nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use toml::de::DeTable;

use super::change;
use super::edit;
use super::item_text;
use super::problem::quoted;
use super::reader::Table;
use super::source_text::{MAX_BYTES, SourceText};
use super::texts::{Texts, drop_ins};
use super::value::is_name;
use super::{ItemKind, ItemName};

/// A change of the configuration, before it is made.
#[derive(Debug, Clone)]
pub struct Draft {
    before: Texts,
    after: Texts,
    /// What each file says, or why it cannot be made out.
    said: BTreeMap<PathBuf, Result<Value, String>>,
}

impl Draft {
    /// Where there is no configuration yet, an empty main file will be made.
    pub fn of(texts: Texts) -> Self {
        Self::between(texts.clone(), texts)
    }

    pub(super) fn between(before: Texts, mut after: Texts) -> Self {
        if after.text(&after.main).is_none() {
            let main = after.main.clone();
            after.put(&main, Some(String::new()));
        }
        let said = after.files.iter().map(|(file, text)| (file.clone(), tables(file, text))).collect();
        Self { before, after, said }
    }

    /// Gives an item this value: where it stands, touching only what differs, so that comments stay; else in a drop-in of its own, settings in the
    /// main file.
    pub fn set(&mut self, item: &ItemName, value: &Value) -> Result<(), String> {
        let failed = |why: String| format!("{item} cannot be written into the configuration: {why}");
        let new = value.as_object().ok_or_else(|| failed("it is no table".to_owned()))?;
        self.try_set(item, new).map_err(failed)
    }

    /// Takes an item out. A drop-in in which nothing is left goes.
    pub fn remove(&mut self, item: &ItemName) -> Result<(), String> {
        self.try_remove(item).map_err(|why| format!("{item} cannot be taken out of the configuration: {why}"))
    }

    /// The file that an item stands in, and its text there, with its comments.
    pub fn text_of(&self, item: &ItemName) -> Result<(PathBuf, String), String> {
        let failed = |why: String| format!("the text of {item} cannot be shown: {why}");
        let path = path_of(item).map_err(failed)?;
        let (file, _) = self.file_of(&path).map_err(failed)?.ok_or_else(|| failed("it is not in the configuration".into()))?;
        let text = self.after.text(&file).unwrap_or_default();
        match item_text::cut_out(text, item, self.is_alone(&file, &path)).map_err(failed)? {
            Some(cut) => Ok((file, cut)),
            None => Err(failed(odd_form(&file))),
        }
    }

    /// Gives an item another text: where it stands, everything else staying as it is; else in a drop-in of its own.
    pub fn set_text(&mut self, item: &ItemName, new: &str) -> Result<(), String> {
        let value = item_text::value_of(item, new)?;
        self.try_set_text(item, new, &value).map_err(|why| format!("{item} cannot be written into the configuration: {why}"))
    }

    /// What an item is; None where it is not there.
    pub fn value(&self, item: &ItemName) -> Result<Option<&Value>, String> {
        Ok(self.file_of(&path_of(item)?)?.map(|(_, value)| value))
    }

    /// The texts as they will be.
    pub fn after(&self) -> &Texts {
        &self.after
    }

    /// The texts as they are.
    pub fn before(&self) -> &Texts {
        &self.before
    }

    /// What differs, as `diff -u` shows it.
    pub fn diff(&self) -> String {
        let mut out = String::new();
        for (path, before, after) in self.changes() {
            let name = |there: bool| if there { path.display().to_string() } else { "/dev/null".to_owned() };
            let (old, new) = (name(before.is_some()), name(after.is_some()));
            let diff = similar::TextDiff::from_lines(before.unwrap_or_default(), after.unwrap_or_default());
            out.push_str(&diff.unified_diff().context_radius(2).header(&old, &new).to_string());
        }
        out
    }

    pub fn is_nothing(&self) -> bool {
        self.changes().is_empty()
    }

    /// Makes the change, all of it or nothing, durable when it returns. What was before is kept in the directory `previous`, for [`super::undo`].
    /// Refused when somebody changed the files since they were read.
    pub fn commit(self, previous: &Path) -> Result<(), String> {
        change::commit(&self, previous)
    }

    /// The files that differ, with their texts before and after.
    pub(super) fn changes(&self) -> Vec<(&Path, Option<&str>, Option<&str>)> {
        let mut paths: Vec<&PathBuf> = self.before.files.iter().chain(&self.after.files).map(|(path, _)| path).collect();
        paths.sort_by_key(|path| (**path != self.after.main, *path));
        paths.dedup();
        let both = paths.into_iter().map(|path| (path.as_path(), self.before.text(path), self.after.text(path)));
        both.filter(|(_, before, after)| before != after).collect()
    }

    fn try_set(&mut self, item: &ItemName, new: &Map<String, Value>) -> Result<(), String> {
        let path = path_of(item)?;
        if let Some((file, said)) = self.file_of(&path)? {
            if said.as_object() == Some(new) {
                return Ok(());
            }
            let in_place = self.change(&file, &path, Some(new), |old| edit::with_table(old, &path, new));
            // What cannot be changed where it stands is written anew.
            let anew = |old: &str| edit::with_new_table(&edit::without_table(old, &path)?, &path, new);
            return in_place.or_else(|_| self.change(&file, &path, Some(new), anew));
        }
        let mut outcome = Err("there is no place for it".to_owned());
        for file in self.places(item) {
            outcome = self.change(&file, &path, Some(new), |old| edit::with_new_table(old, &path, new));
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }

    fn try_remove(&mut self, item: &ItemName) -> Result<(), String> {
        let path = path_of(item)?;
        let (file, _) = self.file_of(&path)?.ok_or("it is not there")?;
        self.change(&file, &path, None, |old| edit::without_table(old, &path))
    }

    fn try_set_text(&mut self, item: &ItemName, new: &str, value: &Map<String, Value>) -> Result<(), String> {
        let path = path_of(item)?;
        let Some((file, _)) = self.file_of(&path)? else {
            let is_free = |file: &PathBuf| self.after.text(file).is_none_or(|text| text.trim().is_empty());
            let file = self.places(item).into_iter().filter(|file| *file != self.after.main).find(is_free);
            let file = file.ok_or("there is no place for it")?;
            return self.change(&file, &path, Some(value), |_| Ok(item_text::file_of(new)));
        };
        let is_alone = self.is_alone(&file, &path);
        let old = self.after.text(&file).unwrap_or_default();
        match item_text::cut_out(old, item, is_alone)? {
            Some(cut) if cut == new => Ok(()),
            Some(_) => self.change(&file, &path, Some(value), |old| item_text::put_back(old, item, is_alone, new)),
            None => Err(odd_form(&file)),
        }
    }

    /// Whether a drop-in has nothing but one item.
    fn is_alone(&self, file: &Path, path: &[&str]) -> bool {
        let mut said = self.said.get(file).and_then(|said| said.as_ref().ok());
        for key in path {
            let Some(table) = said.and_then(Value::as_object).filter(|table| table.len() == 1) else { return false };
            said = table.get(*key);
        }
        file != self.after.main && said.is_some()
    }

    /// Another text for a file, if it says what the old one does but for the table at `path`.
    fn change(
        &mut self,
        file: &Path,
        path: &[&str],
        new: Option<&Map<String, Value>>,
        edit: impl FnOnce(&str) -> Result<String, String>,
    ) -> Result<(), String> {
        let named = |why: String| format!("{}: {why}", file.display());
        let mut wanted = self.said.get(file).cloned().unwrap_or_else(|| Ok(Value::Object(Map::new())))?;
        put(&mut wanted, path, new);
        let text = edit(self.after.text(file).unwrap_or_default()).map_err(named)?;
        let said = checked(file, &text, &wanted).map_err(named)?;
        if new.is_none() && file != self.after.main && text.trim_start_matches('\u{feff}').trim().is_empty() {
            self.said.remove(file);
            self.after.put(file, None);
        } else {
            self.said.insert(file.to_owned(), Ok(said));
            self.after.put(file, Some(text));
        }
        Ok(())
    }

    /// Where an item that is new may go, in the order of preference.
    fn places(&self, item: &ItemName) -> Vec<PathBuf> {
        let directory = drop_ins(&self.after.main);
        let stem = if item.kind == ItemKind::Access { "access".to_owned() } else { item.to_string() };
        let others = (2..10).map(|n| directory.join(format!("{stem}-{n}.toml")));
        let main = (item.kind == ItemKind::Settings).then(|| self.after.main.clone());
        main.into_iter().chain([directory.join(format!("{stem}.toml"))]).chain(others).collect()
    }

    /// The file that has the table, and what it says there.
    fn file_of(&self, path: &[&str]) -> Result<Option<(PathBuf, &Value)>, String> {
        let mut found: Option<(PathBuf, &Value)> = None;
        for (file, said) in &self.said {
            let said = said.as_ref().map_err(Clone::clone)?;
            let Some(table) = path.iter().try_fold(said, |tables, key| tables.get(key)) else { continue };
            if let Some((first, _)) = found.replace((file.clone(), table)) {
                return Err(format!("it stands both in {} and in {}", first.display(), file.display()));
            }
        }
        Ok(found)
    }
}

fn odd_form(file: &Path) -> String {
    format!(
        "in {} it is written in a way that cannot be taken out by itself (dotted keys, or a table in one line); change single keys with --set, or edit \
         that file and run 'keepctl reload'",
        file.display()
    )
}

fn path_of(item: &ItemName) -> Result<Vec<&str>, String> {
    if !is_name(&item.name) {
        return Err(format!("{} is no name", quoted(&item.name)));
    }
    let path = item.table();
    if path.is_empty() { Err("it is no part of the configuration's files".to_owned()) } else { Ok(path) }
}

/// All that a text says.
fn tables(file: &Path, text: &str) -> Result<Value, String> {
    let source = SourceText::new(file, text.to_owned());
    let table: DeTable<'_> = source.parse();
    let json = Table::root(&source, &table).json();
    drop(table);
    match source.into_problems().first() {
        None => Ok(json),
        Some(problem) => Err(problem.to_string()),
    }
}

/// What a text says, if that is what is wanted.
fn checked(file: &Path, text: &str, wanted: &Value) -> Result<Value, String> {
    if text.len() as u64 > MAX_BYTES {
        return Err(format!("it would be longer than the {} KiB that are read of a file", MAX_BYTES >> 10));
    }
    let said = tables(file, text).map_err(|why| format!("the changed text would be wrong ({why}); please report this"))?;
    if said != *wanted && without_empty(&said) != without_empty(wanted) {
        return Err("the changed text would not say what it should; please report this".to_owned());
    }
    Ok(said)
}

/// Without tables around items in which nothing is.
fn without_empty(tables: &Value) -> Value {
    let empty = |key: &str, value: &Value| {
        ["encryption", "destination", "job", "notification"].contains(&key) && value.as_object().is_some_and(Map::is_empty)
    };
    match tables {
        Value::Object(tables) => {
            tables.iter().filter(|(k, v)| !empty(k, v)).map(|(k, v)| (k.clone(), v.clone())).collect::<Map<_, _>>().into()
        }
        other => other.clone(),
    }
}

/// What the tables of a file are with another one at `path`.
fn put(tables: &mut Value, path: &[&str], new: Option<&Map<String, Value>>) {
    let Some((last, outer)) = path.split_last() else { return };
    let mut inner = tables;
    for key in outer {
        let Value::Object(table) = inner else { return };
        inner = table.entry(*key).or_insert_with(|| Value::Object(Map::new()));
    }
    let Value::Object(table) = inner else { return };
    match new {
        Some(new) => drop(table.insert((*last).to_owned(), Value::Object(new.clone()))),
        None => drop(table.remove(*last)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn texts(files: &[(&str, &str)]) -> Texts {
        let files = files.iter().map(|(path, text)| (PathBuf::from(path), (*text).to_owned())).collect();
        Texts { main: "/etc/keepd/keepd.toml".into(), files }
    }

    fn item(text: &str) -> ItemName {
        text.parse().unwrap()
    }

    const MAIN: &str = "/etc/keepd/keepd.toml";

    #[test]
    fn items_go_where_they_are_looked_for() {
        let mut draft = Draft::of(texts(&[(MAIN, "# mine\n"), ("/etc/keepd/conf.d/job.b.toml", "job = { x = {} }\n")]));
        assert!(draft.is_nothing());
        draft.set(&item("job.a"), &json!({"every": "6h"})).unwrap();
        draft.set(&item("job.b"), &json!({"every": "6h"})).unwrap();
        draft.set(&item("settings.daemon"), &json!({"memory": 1})).unwrap();
        draft.set(&item("access.access"), &json!({"admin": ["root"]})).unwrap();
        let names: Vec<_> = draft.after().files.iter().map(|(path, _)| draft.after().relative(path)).collect();
        assert_eq!(names, ["keepd.toml", "conf.d/access.toml", "conf.d/job.a.toml", "conf.d/job.b-2.toml", "conf.d/job.b.toml"]);
        assert_eq!(draft.after().text(Path::new(MAIN)), Some("# mine\n\n[daemon]\nmemory = 1\n"));
        assert_eq!(draft.after().text(Path::new("/etc/keepd/conf.d/job.a.toml")), Some("[job.a]\nevery = \"6h\"\n"));
        insta::with_settings!({ snapshot_path => "../../tests/config/snapshots", prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!("draft_diff", draft.diff());
        });
        draft.remove(&item("job.a")).unwrap();
        draft.remove(&item("job.b")).unwrap();
        draft.remove(&item("access.access")).unwrap();
        draft.remove(&item("settings.daemon")).unwrap();
        assert_eq!(draft.after().files.len(), 2);
        assert!(draft.remove(&item("job.a")).unwrap_err().contains("it is not there"));
    }

    #[test]
    fn what_cannot_be_is_refused_and_changes_nothing() {
        let mut draft = Draft::of(texts(&[(MAIN, "[job.a]\nx = 1\n")]));
        for (item, value) in [
            (item("job.a"), json!(5)),
            (item("job.a"), json!({"x": null})),
            (item("schedule.a"), json!({})),
            (ItemName::new(ItemKind::Job, "../a"), json!({})),
            (item("job.long"), json!({"x": "y".repeat(2 << 20)})),
        ] {
            assert!(draft.set(&item, &value).unwrap_err().starts_with(&item.to_string()), "{item}");
        }
        assert!(draft.is_nothing());
        let mut draft = Draft::of(texts(&[(MAIN, "[job.a]\n"), ("/etc/keepd/conf.d/a.toml", "[job.a]\n")]));
        assert!(draft.set(&item("job.a"), &json!({})).unwrap_err().contains("stands both in"));
        let mut draft = Draft::of(texts(&[(MAIN, "[job.a\n")]));
        assert!(draft.set(&item("job.b"), &json!({})).unwrap_err().contains("keepd.toml:1"));
    }

    #[test]
    fn many_items_are_quick() {
        let job =
            |n: usize| json!({"every": "6h", "destinations": ["local"], "source": [{"files": format!("/srv/{n}"), "exclude": ["a", "b"]}]});
        let mut text = String::new();
        for n in 0..120 {
            text.push_str(&format!(
                "# job {n}\n[job.j{n}]\nevery = '1h'\ndestinations = ['local']\n[[job.j{n}.source]]\nfiles = '/srv/x'\n\n"
            ));
        }
        let begin = std::time::Instant::now();
        let mut one = Draft::of(texts(&[(MAIN, &text)]));
        (0..120).for_each(|n| one.set(&item(&format!("job.j{n}")), &job(n)).unwrap());
        let in_one = begin.elapsed();
        let begin = std::time::Instant::now();
        let mut many = Draft::of(texts(&[(MAIN, "")]));
        (0..120).for_each(|n| many.set(&item(&format!("job.j{n}")), &job(n)).unwrap());
        let in_many = begin.elapsed();
        eprintln!("120 items in one file {in_one:?}, in many {in_many:?}");
        assert!(in_one.as_secs() < 10 && in_many.as_secs() < 10);
        assert_eq!(one.after().text(Path::new(MAIN)).unwrap().matches("# job ").count(), 120);
    }

    fn key() -> impl Strategy<Value = String> {
        prop_oneof![
            Just("every".to_owned()),
            Just("enabled".to_owned()),
            Just("retention".to_owned()),
            Just("source".to_owned()),
            Just("a b".to_owned()),
            Just("ö.".to_owned()),
            "[a-z]{1,3}",
        ]
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1000i32..1000).prop_map(|n| Value::from(f64::from(n) / 8.0)),
            "\\PC{0,10}".prop_map(Value::from),
            "[a-z\"'\\\\\n\r\t# ]{0,40}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(key(), inner.clone(), 0..4).prop_map(|m| Value::Object(m.into_iter().collect())),
                prop::collection::vec(prop::collection::btree_map(key(), inner, 0..3), 1..4).prop_map(|list| list
                    .into_iter()
                    .map(|m| Value::Object(m.into_iter().collect()))
                    .collect::<Vec<_>>()
                    .into()),
            ]
        })
    }

    fn table() -> impl Strategy<Value = Map<String, Value>> {
        prop::collection::btree_map(key(), value(), 0..5).prop_map(|m| m.into_iter().collect())
    }

    fn name() -> impl Strategy<Value = ItemName> {
        let names = prop_oneof![Just("a"), Just("b.c"), Just("d-1"), Just("2")];
        let kinds = prop_oneof![Just(ItemKind::Encryption), Just(ItemKind::Destination), Just(ItemKind::Job), Just(ItemKind::Notification)];
        prop_oneof![
            4 => (kinds, names).prop_map(|(kind, name)| ItemName::new(kind, name)),
            1 => prop_oneof![Just("daemon"), Just("coverage"), Just("config_backup")].prop_map(|n| ItemName::new(ItemKind::Settings, n)),
            1 => Just(ItemName::new(ItemKind::Access, "access")),
        ]
    }

    /// Tables as somebody writes them: with headers, dotted, in one line, with comments between.
    struct Writer {
        out: String,
        style: u8,
        lines: u32,
    }

    impl Writer {
        fn line(&mut self, line: &str) {
            self.lines += 1;
            if self.lines.is_multiple_of(3) {
                self.out.push_str(&format!("# remark {}\n", self.lines));
            }
            if self.lines.is_multiple_of(7) {
                self.out.push_str("\n#old = 1\n\n");
            }
            self.out.push_str(line);
            self.out.push_str(if self.lines.is_multiple_of(4) { " # behind\n" } else { "\n" });
        }

        fn inline(value: &Value) -> String {
            match value {
                Value::Object(map) => {
                    let inner: Vec<String> = map.iter().map(|(k, v)| format!("{} = {}", quote(k), Self::inline(v))).collect();
                    format!("{{ {} }}", inner.join(", "))
                }
                Value::Array(list) => format!("[{}]", list.iter().map(Self::inline).collect::<Vec<_>>().join(", ")),
                Value::String(text) => quote(text),
                Value::Number(n) if n.is_f64() => format!("{:?}", n.as_f64().unwrap()),
                other => other.to_string(),
            }
        }

        fn table(&mut self, path: &str, table: &Map<String, Value>) {
            let (values, tables): (Vec<_>, Vec<_>) = table.iter().partition(|(_, v)| !self.has_headers(v));
            if self.style != 1 || tables.is_empty() || !values.is_empty() {
                self.line(&format!("[{path}]"));
            }
            self.inner(path, values, tables);
        }

        fn has_headers(&self, value: &Value) -> bool {
            let list = value.as_array().is_some_and(|l| !l.is_empty() && l.iter().all(Value::is_object));
            self.style < 2 && (value.is_object() || list)
        }

        fn inner(&mut self, path: &str, values: Vec<(&String, &Value)>, tables: Vec<(&String, &Value)>) {
            for (key, value) in values {
                self.line(&format!("{} = {}", quote(key), Self::inline(value)));
            }
            for (key, value) in tables {
                let path = format!("{path}.{}", quote(key));
                match value {
                    Value::Object(table) => self.table(&path, table),
                    Value::Array(list) => {
                        for element in list.iter().filter_map(Value::as_object) {
                            self.line(&format!("[[{path}]]"));
                            let (values, tables) = element.iter().partition(|(_, v)| !self.has_headers(v));
                            self.inner(&path, values, tables);
                        }
                    }
                    _ => {}
                }
            }
        }

        fn dotted(&mut self, path: &str, table: &Map<String, Value>) {
            for (key, value) in table {
                let path = format!("{path}.{}", quote(key));
                match value.as_object().filter(|inner| !inner.is_empty()) {
                    Some(inner) => self.dotted(&path, inner),
                    None => self.line(&format!("{path} = {}", Self::inline(value))),
                }
            }
        }
    }

    fn quote(text: &str) -> String {
        let mut out = String::from("\"");
        for c in text.chars() {
            match c {
                '"' | '\\' => out.extend(['\\', c]),
                c if c.is_control() => out.push_str(&format!("\\u{:04X}", u32::from(c))),
                c => out.push(c),
            }
        }
        out.push('"');
        out
    }

    /// Each kind of tables in a style of its own, so that no text is wrong.
    fn written(items: &BTreeMap<ItemName, Map<String, Value>>, styles: &[u8], crlf: bool) -> String {
        let mut writer = Writer { out: "# the file\n\n".to_owned(), style: 0, lines: 0 };
        let of = |kind: ItemKind| items.iter().filter(move |(name, _)| name.kind == kind);
        let kinds: Vec<(ItemKind, u8)> =
            ItemKind::ALL.iter().zip(styles.iter().cycle()).map(|((kind, _), style)| (*kind, *style)).collect();
        for (kind, style) in &kinds {
            // At the root, before any header.
            for (name, table) in of(*kind) {
                let path = name.table().iter().map(|k| quote(k)).collect::<Vec<_>>().join(".");
                match style {
                    4 if !table.is_empty() => writer.dotted(&path, table),
                    4 | 5 => writer.line(&format!("{path} = {}", Writer::inline(&Value::Object(table.clone())))),
                    _ => {}
                }
            }
        }
        for (kind, style) in &kinds {
            writer.style = *style;
            if *style == 3 && of(*kind).next().is_some() && *kind != ItemKind::Settings && *kind != ItemKind::Access {
                writer.line(&format!("[{}]", kind.word()));
                of(*kind).for_each(|(name, table)| {
                    writer.line(&format!("{} = {}", quote(&name.name), Writer::inline(&Value::Object(table.clone()))));
                });
                continue;
            }
            if *style < 4 {
                for (name, table) in of(*kind) {
                    let path = name.table().iter().map(|k| quote(k)).collect::<Vec<_>>().join(".");
                    if table.is_empty() {
                        writer.line(&format!("[{path}]"));
                    } else {
                        writer.table(&path, table);
                    }
                }
            }
        }
        if crlf { writer.out.replace('\n', "\r\n") } else { writer.out }
    }

    fn said(texts: &Texts) -> BTreeMap<ItemName, Map<String, Value>> {
        let items = texts.items().unwrap_or_else(|problems| panic!("{problems}\n{texts:?}"));
        items.into_iter().map(|(name, (_, value))| (name, value.as_object().unwrap().clone())).collect()
    }

    #[derive(Debug, Clone)]
    enum Step {
        Set(ItemName, Map<String, Value>),
        /// Another value of one key of an item that is there.
        Change(usize, String, Option<Value>),
        Remove(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            2 => (name(), table()).prop_map(|(name, table)| Step::Set(name, table)),
            4 => (any::<usize>(), key(), prop::option::of(value())).prop_map(|(n, key, value)| Step::Change(n, key, value)),
            1 => any::<usize>().prop_map(Step::Remove),
        ]
    }

    proptest! {
        #[test]
        fn whatever_is_asked_is_what_the_texts_say(
            items in prop::collection::btree_map(name(), table(), 0..8),
            in_drop_in in any::<u8>(),
            styles in prop::collection::vec(0u8..6, 7),
            crlf in any::<bool>(),
            steps in prop::collection::vec(step(), 1..10),
        ) {
            let (mut main, mut other) = (BTreeMap::new(), BTreeMap::new());
            for (n, (name, table)) in items.iter().enumerate() {
                let into = if in_drop_in & (1 << n) == 0 { &mut main } else { &mut other };
                into.insert(name.clone(), table.clone());
            }
            let mut model = items;
            let begin = texts(&[(MAIN, &written(&main, &styles, crlf)), ("/etc/keepd/conf.d/o.toml", &written(&other, &styles, false))]);
            prop_assert_eq!(&said(&begin), &model);
            let mut draft = Draft::of(begin);
            for step in steps {
                match step {
                    Step::Set(name, table) => {
                        draft.set(&name, &Value::Object(table.clone())).map_err(|e| TestCaseError::fail(format!("{e}\n{:?}", draft.after())))?;
                        model.insert(name, table);
                    }
                    Step::Change(n, key, value) => {
                        let Some((name, table)) = model.iter().nth(n % model.len().max(1)) else { continue };
                        let (name, mut table) = (name.clone(), table.clone());
                        match value {
                            Some(value) => drop(table.insert(key, value)),
                            None => drop(table.remove(&key)),
                        }
                        draft.set(&name, &Value::Object(table.clone())).map_err(|e| TestCaseError::fail(format!("{e}\n{:?}", draft.after())))?;
                        model.insert(name, table);
                    }
                    Step::Remove(n) => {
                        let Some(name) = model.keys().nth(n % model.len().max(1)).cloned() else { continue };
                        draft.remove(&name).map_err(|e| TestCaseError::fail(format!("{e}\n{:?}", draft.after())))?;
                        model.remove(&name);
                    }
                }
                prop_assert_eq!(&said(draft.after()), &model);
            }
            // What is the same again is no change of a text.
            let texts = draft.after().clone();
            let mut again = Draft::of(texts.clone());
            for (name, table) in model {
                again.set(&name, &Value::Object(table)).map_err(TestCaseError::fail)?;
            }
            prop_assert!(again.is_nothing());
        }
    }
}
