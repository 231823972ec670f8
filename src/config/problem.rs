//! What is wrong with a configuration: where, which key, what is allowed.

use std::fmt;
use std::path::PathBuf;

/// One thing that is wrong, or doubtful.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub severity: Severity,
    /// None when it is not about a place in a file, but about what the configuration refers to.
    pub place: Option<Place>,
    /// Dotted, as `job.shop.schedule`; empty for a syntax error or a file that cannot be read.
    pub key: String,
    /// What is wrong, what is allowed, what to do. Never holds a secret's value.
    pub text: String,
}

/// A place in a file. Line and column begin with 1 and count characters; 0 means the file as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub file: PathBuf,
    pub line: usize,
    pub column: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// keepd does not work with it.
    Error,
    /// keepd works, but perhaps not as meant.
    Warning,
}

/// All that is wrong with a configuration, in the order of files and lines. Displays one line for each, then a count.
#[derive(Debug, Clone, Default, PartialEq, Eq, thiserror::Error)]
pub struct Problems(pub Vec<Problem>);

impl Problem {
    /// About what the configuration refers to, not about a place in it.
    pub fn of_key(severity: Severity, key: impl Into<String>, text: impl Into<String>) -> Self {
        Self { severity, place: None, key: key.into(), text: text.into() }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Printable(&self.file.to_string_lossy()))?;
        if self.line > 0 { write!(f, ":{}:{}", self.line, self.column) } else { Ok(()) }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        if self.severity == Severity::Warning {
            f.write_str("warning: ")?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        // Some texts hold a path as it is.
        write!(f, "{}", Printable(&self.text))
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in &self.0 {
            writeln!(f, "{problem}")?;
        }
        match self.0.len() {
            1 => write!(f, "1 problem"),
            n => write!(f, "{n} problems"),
        }
    }
}

/// Text from a file, made harmless for a terminal: control characters are shown escaped.
pub(super) struct Printable<'a>(pub &'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| if unsafe_to_print(c) { write!(f, "{}", c.escape_default()) } else { write!(f, "{c}") })
    }
}

/// Control characters, and those that turn the direction of the text around.
fn unsafe_to_print(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2028}' | '\u{2029}' | '\u{2066}'..='\u{2069}')
}

/// A value as messages quote it: `'text'`, harmless and not longer than a line. What looks like a key, pasted where it does not
/// belong, is not shown.
pub(super) fn quoted(text: &str) -> String {
    const LONGEST: usize = 80;
    if looks_like_key(text) {
        return "the value (not shown, it looks like a key)".into();
    }
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("'{}…'", Printable(text.get(..end).unwrap_or_default())),
        None => format!("'{}'", Printable(text)),
    }
}

/// Whether a text holds a keepd key, or as many hexadecimal digits in a row as one has.
pub(crate) fn looks_like_key(text: &str) -> bool {
    text.contains("keepd-key-") || text.split(|c: char| !c.is_ascii_hexdigit()).any(|run| run.len() >= 64)
}

/// `; did you mean 'x'?` when one of the candidates is near enough, else nothing.
pub(crate) fn did_you_mean<'c>(given: &str, candidates: impl IntoIterator<Item = &'c str>) -> String {
    let given = given.to_lowercase();
    let length = given.chars().count();
    if length > 64 {
        return String::new();
    }
    candidates
        .into_iter()
        .filter_map(|c| {
            let distance = strsim::osa_distance(&given, &c.to_lowercase());
            // Half a word typed, or typed too much of it, is near as well.
            let part = length >= 3 && (c.starts_with(&given) || (c.len() >= 3 && given.starts_with(c)));
            (distance <= (length / 3).max(1) || part).then_some((distance, c))
        })
        .min()
        .map_or_else(String::new, |(_, c)| format!("; did you mean '{c}'?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_offered_and_a_far_one_is_not() {
        let known = ["keep_daily", "keep_days", "keep_last"];
        assert_eq!(did_you_mean("keep_dayly", known), "; did you mean 'keep_daily'?");
        assert_eq!(did_you_mean("KEEP_LAST", known), "; did you mean 'keep_last'?");
        assert_eq!(did_you_mean("dest", ["destinations", "enabled"]), "; did you mean 'destinations'?");
        assert_eq!(did_you_mean("colour", known), "");
    }

    #[test]
    fn what_a_file_holds_cannot_play_with_the_terminal() {
        assert_eq!(quoted("a\u{1b}[31mb\u{202e}\n"), "'a\\u{1b}[31mb\\u{202e}\\n'");
        assert_eq!(quoted(&"x".repeat(81)), format!("'{}…'", "x".repeat(80)));
    }

    #[test]
    fn a_pasted_key_is_not_quoted() {
        assert!(!quoted(&"a1".repeat(32)).contains("a1a1"));
        assert!(!quoted("keepd-key-1 abc").contains("abc"));
    }
}
