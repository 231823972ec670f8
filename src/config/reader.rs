//! Walks parsed tables and turns values into types, noting every problem on the way instead of stopping at the first.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use super::problem::{Printable, did_you_mean, quoted};
use super::source_text::SourceText;
use super::value;

/// A table of a file, with its dotted path.
#[derive(Debug, Clone)]
pub(super) struct Table<'a> {
    pub path: String,
    source: &'a SourceText,
    table: &'a DeTable<'a>,
    offset: usize,
}

/// A value of a table or array, with its dotted path.
#[derive(Debug, Clone)]
pub(super) struct Item<'a> {
    pub path: String,
    source: &'a SourceText,
    value: &'a DeValue<'a>,
    span: Range<usize>,
}

impl<'a> Table<'a> {
    pub fn root(source: &'a SourceText, table: &'a DeTable<'a>) -> Self {
        Self { path: String::new(), source, table, offset: 0 }
    }

    /// Notes a problem with the table as a whole, at its header.
    pub fn report(&self, text: impl Into<String>) {
        self.source.report(self.offset, &self.path, text);
    }

    pub fn place(&self) -> super::problem::Place {
        self.source.place(self.offset)
    }

    /// Notes every key that is not in `known`. `others` are keys that are known too but cannot stand here, with the reason.
    pub fn check_keys(&self, known: &[&str], others: &[(&[&str], &str)]) {
        for (key, _) in self.table.iter() {
            let name: &str = key.get_ref();
            let path = self.child(name);
            if let Some((_, why)) = others.iter().find(|(keys, _)| keys.contains(&name)) {
                self.source.report(key.span().start, &path, *why);
            } else if !known.contains(&name) {
                let guess = did_you_mean(name, known.iter().copied());
                let kind = if self.path.is_empty() { "table" } else { "key" };
                let text = format!("unknown {kind}; allowed are {}{guess}", known.join(", "));
                self.source.report(key.span().start, &path, text);
            }
        }
    }

    pub fn get(&self, key: &str) -> Option<Item<'a>> {
        let (name, value) = self.table.get_key_value(key)?;
        Some(self.item(name.get_ref(), name.span(), value.get_ref(), value.span()))
    }

    /// Like [`Table::get`], and notes it when there is none. `why` says what it is for.
    pub fn require(&self, key: &str, why: &str) -> Option<Item<'a>> {
        let found = self.get(key);
        if found.is_none() && self.source.is_whole() {
            self.report(format!("'{key}' is missing: {why}"));
        }
        found
    }

    /// The default when the key is absent, None when its value is wrong.
    pub fn optional<T>(&self, key: &str, read: impl FnOnce(&Item<'a>) -> Option<T>, default: T) -> Option<T> {
        match self.get(key) {
            Some(item) => read(&item),
            None => Some(default),
        }
    }

    pub fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// False when the file has syntax errors, so that what is missing may only seem to be.
    pub fn is_whole(&self) -> bool {
        self.source.is_whole()
    }

    /// All that is in it: whole numbers and fractions as such, dates as they are written.
    pub fn json(&self) -> serde_json::Value {
        json_table(self.table)
    }

    /// All values, by key.
    pub fn items(&self) -> impl Iterator<Item = (&'a str, Item<'a>)> {
        self.table.iter().map(|(name, value)| {
            let key: &'a str = name.get_ref();
            (key, self.item(key, name.span(), value.get_ref(), value.span()))
        })
    }

    fn item(&self, key: &str, key_span: Range<usize>, value: &'a DeValue<'a>, span: Range<usize>) -> Item<'a> {
        // A value that could not be parsed has no span of its own.
        let span = if span.is_empty() { key_span } else { span };
        Item { path: self.child(key), source: self.source, value, span }
    }

    fn child(&self, key: &str) -> String {
        let bare = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        let key = if bare { key.to_owned() } else { format!("\"{}\"", Printable(&key.chars().take(80).collect::<String>())) };
        if self.path.is_empty() { key } else { format!("{}.{key}", self.path) }
    }
}

impl<'a> Item<'a> {
    pub fn report(&self, text: impl Into<String>) {
        self.source.report(self.span.start, &self.path, text);
    }

    /// Notes a problem at a byte of the string, as near as the way it is written allows.
    pub fn report_within(&self, byte: usize, text: impl Into<String>) {
        let written = self.source.text().get(self.span.start..self.span.end).unwrap_or_default();
        let plain = self.value.as_str().is_some_and(|s| written.get(1..).is_some_and(|w| w.starts_with(s)));
        let offset = if plain { self.span.start + 1 + byte } else { self.span.start };
        self.source.report(offset, &self.path, text);
    }

    fn wrong_type(&self, wanted: &str) {
        self.report(format!("must be {wanted}, not {}", kind(self.value)));
    }

    pub fn text(&self, wanted: &str) -> Option<&'a str> {
        let text = self.value.as_str();
        if text.is_none() {
            self.wrong_type(wanted);
        }
        text
    }

    /// A string, a whole number, or true or false, as text.
    pub fn scalar(&self, wanted: &str) -> Option<String> {
        match self.value {
            DeValue::Boolean(value) => Some(value.to_string()),
            DeValue::Integer(_) => self.number(0..=u64::MAX).map(|n| n.to_string()),
            _ => self.text(wanted).map(str::to_owned),
        }
    }

    pub fn boolean(&self) -> Option<bool> {
        let found = self.value.as_bool();
        if found.is_none() {
            self.wrong_type("true or false");
        }
        found
    }

    /// A whole number within bounds.
    pub fn number(&self, allowed: std::ops::RangeInclusive<u64>) -> Option<u64> {
        let range = match *allowed.end() {
            u64::MAX => format!("a whole number of at least {}", allowed.start()),
            end => format!("a whole number from {} to {end}", allowed.start()),
        };
        let Some(integer) = self.value.as_integer() else {
            self.wrong_type(&range);
            return None;
        };
        let found = i64::from_str_radix(integer.as_str(), integer.radix()).ok().and_then(|n| u64::try_from(n).ok());
        if let Some(number) = found.filter(|n| allowed.contains(n)) {
            return Some(number);
        }
        self.report(format!("must be {range}, not {}", quoted(integer.as_str())));
        None
    }

    pub fn duration(&self, least: Duration) -> Option<Duration> {
        const WANTED: &str = "a duration such as \"90s\", \"15m\", \"6h\", \"30d\", \"2w\" or \"1h30m\"";
        match self.value {
            DeValue::Integer(_) => {
                self.report(format!("a number needs its unit; allowed is {WANTED}"));
                None
            }
            _ => {
                let text = self.text(WANTED)?;
                match value::duration(text) {
                    Ok(found) if found >= least => Some(found),
                    Ok(_) => {
                        self.report(format!("{} is too short; at least {}", quoted(text), value::show_duration(least)));
                        None
                    }
                    Err(why) => {
                        self.report(format!("{} is no duration: {why}; allowed is {WANTED}", quoted(text)));
                        None
                    }
                }
            }
        }
    }

    /// A size in bytes.
    pub fn size(&self) -> Option<u64> {
        const WANTED: &str = "a size such as \"64MiB\", \"10GB\" or a number of bytes";
        if self.value.is_integer() {
            return self.number(0..=u64::MAX);
        }
        let text = self.text(WANTED)?;
        value::size(text).map_err(|why| self.report(format!("{} is no size: {why}; allowed is {WANTED}", quoted(text)))).ok()
    }

    /// An absolute path without `..`, tidied of doubled and trailing slashes.
    pub fn absolute_path(&self) -> Option<PathBuf> {
        let text = self.text("an absolute path")?;
        value::absolute_path(text).map_err(|why| self.report(format!("{} {why}", quoted(text)))).ok()
    }

    /// One of a few words.
    pub fn word<T: Copy>(&self, words: &[(&str, T)]) -> Option<T> {
        let allowed = words.iter().map(|(w, _)| format!("\"{w}\"")).collect::<Vec<_>>().join(", ");
        let text = self.text(&format!("one of {allowed}"))?;
        let found = words.iter().find(|(w, _)| *w == text).map(|(_, t)| *t);
        if found.is_none() {
            let guess = did_you_mean(text, words.iter().map(|(w, _)| *w));
            self.report(format!("{} is not known; allowed are {allowed}{guess}", quoted(text)));
        }
        found
    }

    pub fn list(&self, wanted: &str) -> Option<Vec<Item<'a>>> {
        let Some(array) = self.value.as_array() else {
            self.wrong_type(wanted);
            return None;
        };
        let items = array.iter().enumerate().map(|(n, v)| Item {
            path: format!("{}[{n}]", self.path),
            source: self.source,
            value: v.get_ref(),
            span: if v.span().is_empty() { self.span.clone() } else { v.span() },
        });
        Some(items.collect())
    }

    pub fn table(&self, wanted: &str) -> Option<Table<'a>> {
        let Some(table) = self.value.as_table() else {
            self.wrong_type(wanted);
            return None;
        };
        Some(Table { path: self.path.clone(), source: self.source, table, offset: self.span.start })
    }

    pub fn is_list(&self) -> bool {
        self.value.is_array()
    }

    pub fn is_table(&self) -> bool {
        self.value.is_table()
    }

    /// A bare TOML date as it would be written in quotes.
    pub fn datetime_text(&self) -> Option<String> {
        self.value.as_datetime().map(ToString::to_string)
    }
}

fn json_table(table: &DeTable<'_>) -> serde_json::Value {
    table.iter().map(|(key, value)| (key.get_ref().to_string(), json(value.get_ref()))).collect::<serde_json::Map<_, _>>().into()
}

fn json(value: &DeValue<'_>) -> serde_json::Value {
    match value {
        DeValue::String(text) => text.as_ref().into(),
        DeValue::Integer(number) => {
            let parsed = i64::from_str_radix(number.as_str(), number.radix());
            parsed.map_or_else(|_| number.to_string().into(), serde_json::Value::from)
        }
        DeValue::Float(number) => {
            let parsed = number.as_str().parse().ok().and_then(serde_json::Number::from_f64);
            parsed.map_or_else(|| number.to_string().into(), serde_json::Value::Number)
        }
        DeValue::Boolean(value) => (*value).into(),
        DeValue::Datetime(time) => time.to_string().into(),
        DeValue::Array(array) => array.iter().map(|v| json(v.get_ref())).collect::<Vec<_>>().into(),
        DeValue::Table(table) => json_table(table),
    }
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}
