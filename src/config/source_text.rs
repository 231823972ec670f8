//! One configuration file: its text, its parsed tables, and what was found wrong in it.
//!
//! In: a path. Out: a TOML tree with spans, and [`Problem`]s with line and column.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use toml::de::DeTable;

use super::problem::{Place, Printable, Problem, Severity};

/// No configuration is this long; a log file given by mistake is.
pub(super) const MAX_BYTES: u64 = 1 << 20;

/// A configuration file while it is read.
#[derive(Debug)]
pub(super) struct SourceText {
    path: PathBuf,
    text: String,
    /// With the byte offset, to sort by.
    problems: RefCell<Vec<(usize, Problem)>>,
    /// Lines with a syntax error: what stands there is not looked at any further.
    broken_lines: RefCell<Vec<usize>>,
    unreadable: Cell<bool>,
}

impl SourceText {
    /// A file that cannot be read: it is empty and has a problem.
    pub fn unreadable(path: &Path, why: &str) -> Self {
        let source = Self::new(path, String::new());
        source.unreadable.set(true);
        source.report_whole(&format!("cannot be read: {why}"));
        source
    }

    pub fn new(path: &Path, mut text: String) -> Self {
        if text.starts_with('\u{feff}') {
            text.remove(0);
        }
        Self { path: path.to_owned(), text, problems: RefCell::default(), broken_lines: RefCell::default(), unreadable: Cell::new(false) }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// The tables that could be made out; syntax errors are noted as problems.
    pub fn parse(&self) -> DeTable<'_> {
        let (table, errors) = DeTable::parse_recoverable(&self.text);
        for error in errors {
            let span = error.span().unwrap_or_default();
            let offset = span.start.min(self.text.len());
            self.broken_lines.borrow_mut().push(self.line_column(offset).0);
            let text = match (error.message(), self.text.get(span)) {
                ("duplicate key", Some(key)) => format!("'{}' is defined twice in this file", Printable(key)),
                ("string values must be quoted, expected literal string", _) => "a text must stand in quotes: \"…\"".to_owned(),
                (message, _) => message.to_owned(),
            };
            self.push(offset, "", text);
        }
        table.into_inner()
    }

    /// False when some of it could not be made out: then what is missing may only seem to be.
    pub fn is_whole(&self) -> bool {
        self.broken_lines.borrow().is_empty() && !self.unreadable.get()
    }

    pub fn place(&self, offset: usize) -> Place {
        let (line, column) = self.line_column(offset);
        Place { file: self.path.clone(), line, column }
    }

    /// Notes a problem at a byte offset.
    pub fn report(&self, offset: usize, key: &str, text: impl Into<String>) {
        if !self.broken_lines.borrow().contains(&self.line_column(offset).0) {
            self.push(offset, key, text.into());
        }
    }

    pub fn into_problems(self) -> Vec<Problem> {
        let mut problems = self.problems.into_inner();
        problems.sort_by_key(|(offset, _)| *offset);
        problems.into_iter().map(|(_, problem)| problem).collect()
    }

    fn report_whole(&self, text: &str) {
        let place = Place { file: self.path.clone(), line: 0, column: 0 };
        let problem = Problem { severity: Severity::Error, place: Some(place), key: String::new(), text: text.to_owned() };
        self.problems.borrow_mut().push((0, problem));
    }

    fn push(&self, offset: usize, key: &str, text: String) {
        let problem = Problem { severity: Severity::Error, place: Some(self.place(offset)), key: key.to_owned(), text };
        self.problems.borrow_mut().push((offset, problem));
    }

    /// Line and column from 1; columns count characters.
    fn line_column(&self, offset: usize) -> (usize, usize) {
        let before = self.text.get(..self.text.floor_char_boundary(offset)).unwrap_or_default();
        let line = before.bytes().filter(|&b| b == b'\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        (line, column)
    }
}

/// The text of a file, or why it cannot be read.
pub(super) fn read_text(path: &Path) -> Result<String, String> {
    // Looked at before opening: opening a FIFO would wait for its writer.
    let found = std::fs::metadata(path).map_err(|e| reason(&e))?;
    if !found.is_file() {
        return Err("it is not a regular file".into());
    }
    let file = File::open(path).map_err(|e| reason(&e))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| reason(&e))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("it is longer than {} KiB, so it can hardly be a configuration", MAX_BYTES >> 10));
    }
    String::from_utf8(bytes).map_err(|e| {
        let good = e.as_bytes().get(..e.utf8_error().valid_up_to()).unwrap_or_default();
        let line = good.iter().filter(|&&b| b == b'\n').count() + 1;
        format!("it is not UTF-8 (a byte in line {line} is wrong)")
    })
}

/// An I/O error in words, without the number of the operating system.
pub(super) fn reason(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such file".into(),
        std::io::ErrorKind::PermissionDenied => "permission denied".into(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_count_characters() {
        let source = SourceText::new(Path::new("x"), "a = 1\nä = ü\n".into());
        assert_eq!(source.line_column(0), (1, 1));
        assert_eq!(source.line_column(source.text.find('ü').expect("there")), (2, 5));
        assert_eq!(source.line_column(9999), (3, 1));
    }

    #[test]
    fn a_byte_order_mark_is_no_column() {
        let source = SourceText::new(Path::new("x"), "\u{feff}a == 1\n".into());
        source.parse();
        assert!(source.into_problems().iter().all(|p| p.place.as_ref().is_some_and(|p| p.line == 1 && p.column > 3)));
    }
}
