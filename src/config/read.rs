//! Reading TOML tables key by key: every mistake is noted with its place, and reading goes on.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeArray, DeString, DeTable, DeValue};

use super::problem::Problem;
use super::values;

/// A file being read.
pub struct Source {
    pub file: PathBuf,
    pub text: String,
}

impl Source {
    pub fn problem(&self, at: usize, key: &str, text: String) -> Problem {
        let before = self.text.get(..at.min(self.text.len())).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Problem { file: self.file.clone(), line, column, key: key.to_owned(), text }
    }
}

/// A table and what was asked of it so far.
pub struct Table<'a> {
    pub source: &'a Source,
    table: &'a DeTable<'a>,
    /// Where it begins, for keys that are missing.
    pub at: usize,
    pub path: String,
    asked: BTreeSet<String>,
    /// Known to the design, not built into this version.
    later: &'static [&'static str],
}

type Found<'a> = (&'a DeValue<'a>, usize);

impl<'a> Table<'a> {
    pub fn new(source: &'a Source, table: &'a DeTable<'a>, at: usize, path: String) -> Self {
        Self { source, table, at, path, asked: BTreeSet::new(), later: &[] }
    }

    pub fn with_later(mut self, later: &'static [&'static str]) -> Self {
        self.later = later;
        self
    }

    pub fn key(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    pub fn problem(&self, at: usize, key: &str, text: String) -> Problem {
        self.source.problem(at, &self.key(key), text)
    }

    fn find(&mut self, key: &'static str) -> Option<Found<'a>> {
        self.asked.insert(key.to_owned());
        let table: &'a DeTable<'a> = self.table;
        table.iter().find(|(k, _)| k.get_ref().as_ref() == key).map(|(_, v)| (v.get_ref(), v.span().start))
    }

    fn typed<T>(
        &mut self,
        key: &'static str,
        wanted: &str,
        problems: &mut Vec<Problem>,
        get: impl Fn(&'a DeValue<'a>) -> Option<T>,
    ) -> Option<(T, usize)> {
        let (value, at) = self.find(key)?;
        match get(value) {
            Some(v) => Some((v, at)),
            None => {
                problems.push(self.problem(at, key, format!("it is {} where {wanted} is wanted", article(value.type_str()))));
                None
            }
        }
    }

    pub fn string(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Option<(&'a str, usize)> {
        self.typed(key, "a string", problems, |v| v.as_str())
    }

    pub fn boolean(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Option<bool> {
        self.typed(key, "true or false", problems, |v| v.as_bool()).map(|(b, _)| b)
    }

    /// A whole number within bounds.
    pub fn number(&mut self, key: &'static str, low: u32, high: u32, problems: &mut Vec<Problem>) -> Option<u32> {
        let (text, at) = self.typed(key, "a whole number", problems, |v| v.as_integer().map(|i| (i.as_str().to_owned(), i.radix())))?;
        let number = i64::from_str_radix(&text.0.replace('_', ""), text.1).ok().filter(|n| (i64::from(low)..=i64::from(high)).contains(n));
        if number.is_none() {
            problems.push(self.problem(at, key, format!("{} is out of range; it must be from {low} to {high}", text.0)));
        }
        number.and_then(|n| u32::try_from(n).ok())
    }

    pub fn duration(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Option<Duration> {
        let (text, at) = self.string(key, problems)?;
        values::duration(text).map_err(|e| problems.push(self.problem(at, key, e))).ok()
    }

    /// A size in bytes: a string with a unit, or a plain number.
    pub fn size(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Option<(u64, usize)> {
        let (text, at) = self.typed(key, "a size like \"256MiB\"", problems, |v| {
            v.as_str().map(str::to_owned).or_else(|| v.as_integer().map(|i| i.as_str().to_owned()))
        })?;
        values::size(&text).map_err(|e| problems.push(self.problem(at, key, e))).ok().map(|n| (n, at))
    }

    /// One of several words.
    pub fn word<T: Copy>(&mut self, key: &'static str, words: &[(&str, T)], problems: &mut Vec<Problem>) -> Option<T> {
        let (text, at) = self.string(key, problems)?;
        let found = words.iter().find(|(w, _)| *w == text).map(|(_, v)| *v);
        if found.is_none() {
            let known: Vec<&str> = words.iter().map(|(w, _)| *w).collect();
            problems.push(self.problem(
                at,
                key,
                format!("'{text}' is none of {}{}", known.join(", "), nearest(text, known.iter().copied())),
            ));
        }
        found
    }

    /// An absolute path without `..`.
    pub fn path(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Option<(PathBuf, usize)> {
        let (text, at) = self.string(key, problems)?;
        let path = PathBuf::from(text);
        let strange = !path.is_absolute() || text.contains('\0') || path.components().any(|c| c == std::path::Component::ParentDir);
        if strange {
            problems.push(self.problem(at, key, format!("'{text}' is no absolute path (it must begin with / and hold no ..)")));
            return None;
        }
        Some((path, at))
    }

    pub fn strings(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Option<Vec<(String, usize)>> {
        let (array, _): (&DeArray<'a>, usize) = self.typed(key, "a list of strings", problems, |v| v.as_array())?;
        let mut strings = Vec::new();
        for item in array.iter() {
            match item.get_ref().as_str() {
                Some(s) => strings.push((s.to_owned(), item.span().start)),
                None => problems.push(self.problem(
                    item.span().start,
                    key,
                    format!("an element is {} where a string is wanted", article(item.get_ref().type_str())),
                )),
            }
        }
        Some(strings)
    }

    pub fn table(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Option<Table<'a>> {
        let path = self.key(key);
        let (table, at) = self.typed(key, "a table", problems, |v| v.as_table())?;
        Some(Table::new(self.source, table, at, path))
    }

    pub fn tables(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Option<Vec<Table<'a>>> {
        let (array, _): (&DeArray<'a>, usize) = self.typed(key, "a list of tables ([[…]])", problems, |v| v.as_array())?;
        let path = self.key(key);
        let mut tables = Vec::new();
        for item in array.iter() {
            match item.get_ref().as_table() {
                Some(t) => tables.push(Table::new(self.source, t, item.span().start, path.clone())),
                None => problems.push(self.problem(item.span().start, key, "an element is no table".into())),
            }
        }
        Some(tables)
    }

    /// The tables below a table, by name: `[job.shop]`, `[job.wiki]` …
    pub fn named(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Vec<(String, Table<'a>)> {
        let Some(outer) = self.table(key, problems) else { return Vec::new() };
        let mut found = Vec::new();
        for (name, value) in outer.table.iter() {
            let (text, at) = (name.get_ref().to_string(), name.span().start);
            if !good_name(&text) {
                problems.push(outer.problem(
                    at,
                    &text,
                    "a name has letters, digits, '.', '_' and '-', begins with a letter or digit, and is at most 64 long".into(),
                ));
                continue;
            }
            match value.get_ref().as_table() {
                Some(t) => found.push((text.clone(), Table::new(self.source, t, at, outer.key(&text)))),
                None => problems.push(outer.problem(
                    value.span().start,
                    &text,
                    format!("it is {} where a table is wanted", article(value.get_ref().type_str())),
                )),
            }
        }
        found
    }

    /// Every key that is there, with where it stands: for tables that take a service's own options.
    pub fn entries(&self) -> impl Iterator<Item = (&'a Spanned<DeString<'a>>, &'a Spanned<DeValue<'a>>)> + use<'a> {
        let table: &'a DeTable<'a> = self.table;
        table.iter()
    }

    /// Takes a key as read whose value cannot be judged.
    pub fn mark_asked(&mut self, key: String) {
        self.asked.insert(key);
    }

    pub fn has(&self, key: &str) -> bool {
        self.table.iter().any(|(k, _)| k.get_ref().as_ref() == key)
    }

    /// Notes every key nobody asked for.
    pub fn finish(self, problems: &mut Vec<Problem>) {
        for (key, _) in self.table.iter() {
            let name = key.get_ref().as_ref();
            if self.asked.contains(name) {
                continue;
            }
            let text = if self.later.contains(&name) {
                "this key is known, but what it does is not built into this version of keepd; remove it".to_owned()
            } else {
                let known: Vec<&str> = self.asked.iter().map(String::as_str).collect();
                format!("unknown key; allowed are {}{}", known.join(", "), nearest(name, known.iter().copied()))
            };
            problems.push(self.problem(key.span().start, name, text));
        }
    }
}

fn article(kind: &str) -> String {
    let vowel = kind.starts_with(['a', 'e', 'i', 'o', 'u']);
    format!("{} {kind}", if vowel { "an" } else { "a" })
}

/// `; did you mean 'x'?` where something is near.
pub fn nearest<'n>(name: &str, known: impl Iterator<Item = &'n str>) -> String {
    let best = known.map(|k| (strsim::damerau_levenshtein(name, k), k)).min();
    match best {
        Some((distance, k)) if distance <= 1 + name.len() / 4 => format!("; did you mean '{k}'?"),
        _ => String::new(),
    }
}

fn good_name(name: &str) -> bool {
    let ok = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    !name.is_empty() && name.len() <= 64 && name.chars().all(ok) && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}
