//! The dump of one database, looked at while it goes by: is it whole, and how many rows of which table are in it?
//!
//! Known are the forms that `mysqldump` and `mariadb-dump` print: statements ended by `;`, rows as `INSERT INTO name VALUES (…),(…);` on one line
//! or many, bodies of routines, triggers and events between `DELIMITER ;;` and `DELIMITER ;`, and `-- Dump completed` as the last line. The last
//! line decides by itself; should the rest not be understood, only the counts are missing.

use std::collections::BTreeMap;

use super::trigger;
use crate::source::dump::Table;

/// The tools write it last.
const END: &[u8] = b"-- Dump completed";
/// Of the stream's end so much is kept.
const TAIL: usize = 256;
/// No statement of interest has more before the name of its table.
const MOST_HEAD: usize = 64;
/// Of a table's name, in bytes.
const MOST_NAME: usize = 1024;
/// Of a comment, or the beginning of a body.
const MOST_TEXT: usize = 2048;

/// What came by.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Summary {
    pub tables: BTreeMap<String, Table>,
    pub server_version: String,
    pub tool_version: String,
    /// Triggers that name their database, which ties them to it.
    pub tied: Vec<String>,
    /// False: what came was not followed to its end, and nothing of this is certain.
    pub understood: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Between,
    /// The first bytes of a statement, until it is clear what it is.
    Head,
    /// The name of a table, in backticks. `closing`: the last byte was a backtick, which ends it unless another one follows.
    Name {
        insert: bool,
        closing: bool,
    },
    /// From `--` to the end of the line.
    Line,
    /// From `/*` to `*/`; of a conditional one the quotes count.
    Block {
        conditional: bool,
        star: bool,
    },
    /// Something else, to its `;`.
    Statement,
    /// Behind the name of an `INSERT`, before `VALUES`.
    Columns {
        depth: u32,
    },
    Values {
        depth: u32,
    },
    /// Between `DELIMITER ;;` and `DELIMITER ;`. `last`: the line before ended with `;;`.
    Body {
        last: bool,
    },
}

/// Looks at a dump as it goes by.
pub struct DumpReader {
    state: State,
    /// Within this quote.
    quote: Option<u8>,
    /// The next byte is taken as it is.
    escaped: bool,
    /// The head, name, comment or line that is gathered.
    held: Vec<u8>,
    /// The beginning of a body.
    body: Vec<u8>,
    table: String,
    numbers: Table,
    tail: Vec<u8>,
    summary: Summary,
}

impl Default for DumpReader {
    fn default() -> Self {
        let (state, numbers) = (State::Between, Table::default());
        let (held, body, tail, table) = (Vec::new(), Vec::new(), Vec::new(), String::new());
        Self { state, quote: None, escaped: false, held, body, table, numbers, tail, summary: Summary::default() }
    }
}

fn blank(b: u8) -> bool {
    matches!(b, b' ' | b'\n' | b'\r' | b'\t')
}

/// What is behind the first `n` bytes.
fn behind(bytes: &[u8], n: usize) -> &[u8] {
    bytes.get(n..).unwrap_or_default()
}

impl DumpReader {
    /// The next bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        let last = behind(bytes, bytes.len().saturating_sub(TAIL));
        let over = (self.tail.len() + last.len()).saturating_sub(TAIL).min(self.tail.len());
        self.tail.drain(..over);
        self.tail.extend_from_slice(last);
        let mut rest = bytes;
        while !rest.is_empty() {
            let inserting = matches!(self.state, State::Columns { .. } | State::Values { .. });
            let used = match self.quote {
                Some(quote) => self.quoted(rest, quote),
                None => self.step(rest),
            };
            if inserting {
                self.numbers.bytes += used as u64;
            }
            if inserting && self.state == State::Between {
                self.end_insert();
            }
            rest = behind(rest, used);
        }
    }

    /// Whether it was whole, and what went by. The error says what is missing.
    pub fn finish(mut self) -> Result<Summary, String> {
        let last = self.tail.strip_suffix(b"\n").map(|t| t.rsplit(|b| *b == b'\n').next().unwrap_or_default());
        if !last.is_some_and(|line| line.starts_with(END)) {
            let end = String::from_utf8_lossy(END).into_owned();
            let place = match (self.tail.is_empty(), self.table.is_empty()) {
                (true, _) => "it is empty".to_owned(),
                (_, true) => "it ends before its first table".to_owned(),
                _ => format!("it ends in or behind its table {}", self.table),
            };
            return Err(format!("{place}; its last line, '{end}', is missing"));
        }
        self.summary.understood = self.state == State::Between && self.quote.is_none();
        Ok(self.summary)
    }

    /// To the end of a quoted text; two quotes in it are the end of one and the beginning of another.
    fn quoted(&mut self, rest: &[u8], quote: u8) -> usize {
        if self.escaped {
            self.escaped = false;
            return 1;
        }
        let found = if quote == b'`' { memchr::memchr(quote, rest) } else { memchr::memchr2(quote, b'\\', rest) };
        let Some(at) = found else { return rest.len() };
        match rest.get(at) == Some(&quote) {
            true => self.quote = None,
            false => self.escaped = true,
        }
        at + 1
    }

    /// Goes on outside of quotes; how many bytes it took.
    fn step(&mut self, rest: &[u8]) -> usize {
        let Some(first) = rest.first().copied() else { return 0 };
        match self.state {
            State::Between => {
                let skipped = rest.iter().take_while(|b| blank(**b) || **b == b';').count();
                if skipped < rest.len() {
                    self.held.clear();
                    self.state = State::Head;
                }
                skipped
            }
            State::Head => self.head(first),
            State::Name { insert, closing: true } if first != b'`' => {
                self.table = String::from_utf8_lossy(&self.held).into_owned();
                self.summary.tables.entry(self.table.clone()).or_default();
                self.numbers = Table::default();
                self.state = if insert { State::Columns { depth: 0 } } else { State::Statement };
                0
            }
            State::Name { insert, closing } => {
                if closing || first != b'`' {
                    self.held.push(first);
                }
                self.state = State::Name { insert, closing: first == b'`' && !closing };
                if self.held.len() > MOST_NAME {
                    self.state = State::Statement;
                }
                1
            }
            State::Line => {
                let end = memchr::memchr(b'\n', rest);
                self.hold(rest.get(..end.unwrap_or(rest.len())).unwrap_or_default());
                if end.is_some() {
                    self.comment();
                    self.state = State::Between;
                }
                end.map_or(rest.len(), |n| n + 1)
            }
            State::Block { conditional, star } => {
                if star && first == b'/' {
                    self.state = State::Between;
                    return 1;
                }
                self.state = State::Block { conditional, star: first == b'*' };
                if conditional && matches!(first, b'\'' | b'"' | b'`') {
                    self.quote = Some(first);
                }
                1
            }
            State::Statement => match rest.iter().position(|b| matches!(b, b'\'' | b'"' | b'`' | b';')) {
                Some(at) => {
                    match rest.get(at) {
                        Some(b';') => self.state = State::Between,
                        other => self.quote = other.copied(),
                    }
                    at + 1
                }
                None => rest.len(),
            },
            State::Columns { depth } => {
                match first {
                    b'`' => self.quote = Some(first),
                    b'(' => self.state = State::Columns { depth: depth + 1 },
                    b')' => self.state = State::Columns { depth: depth.saturating_sub(1) },
                    b'V' | b'v' if depth == 0 => self.state = State::Values { depth: 0 },
                    b';' => self.state = State::Between,
                    _ => {}
                }
                1
            }
            State::Values { depth } => self.values(rest, depth),
            State::Body { last } => {
                let end = memchr::memchr(b'\n', rest);
                let line = rest.get(..end.unwrap_or(rest.len())).unwrap_or_default();
                let room = MOST_TEXT.saturating_sub(self.body.len());
                self.body.extend(line.iter().chain(end.map(|_| &b'\n')).take(room));
                // Only its first and its last bytes are asked for.
                if self.held.len() > MOST_TEXT {
                    self.held.drain(16..self.held.len() - 2);
                }
                self.held.extend_from_slice(line);
                if end.is_some() {
                    if last && self.held == b"DELIMITER ;" {
                        let tied = trigger::tied(&String::from_utf8_lossy(&self.body));
                        self.summary.tied.extend(tied);
                        self.state = State::Between;
                    } else {
                        self.state = State::Body { last: self.held.ends_with(b";;") };
                    }
                    self.held.clear();
                }
                end.map_or(rest.len(), |n| n + 1)
            }
        }
    }

    fn values(&mut self, rest: &[u8], mut depth: u32) -> usize {
        for (n, b) in rest.iter().enumerate() {
            match b {
                b'(' => {
                    self.numbers.rows += u64::from(depth == 0);
                    depth += 1;
                }
                b')' => depth = depth.saturating_sub(1),
                b'\'' | b'"' | b'`' => {
                    self.quote = Some(*b);
                    self.state = State::Values { depth };
                    return n + 1;
                }
                b';' => {
                    self.state = State::Between;
                    return n + 1;
                }
                _ => {}
            }
        }
        self.state = State::Values { depth };
        rest.len()
    }

    /// One byte more of what a statement begins with.
    fn head(&mut self, byte: u8) -> usize {
        if byte == b'`' {
            let text = String::from_utf8_lossy(&self.held).to_ascii_uppercase();
            let words: Vec<&str> = text.split_ascii_whitespace().collect();
            self.state = match words.as_slice() {
                ["INSERT", .., "INTO"] => State::Name { insert: true, closing: false },
                ["CREATE", "TABLE"] | ["CREATE", "TABLE", "IF", "NOT", "EXISTS"] => State::Name { insert: false, closing: false },
                _ => {
                    self.quote = Some(byte);
                    State::Statement
                }
            };
            self.held.clear();
            return 1;
        }
        self.held.push(byte);
        let whole_word = |word: &[u8]| self.held.trim_ascii_end().eq_ignore_ascii_case(word);
        self.state = match self.held.as_slice() {
            [b'#', ..] | [b'-', b'-', ..] => State::Line,
            [b'/', b'*', third] => State::Block { conditional: matches!(third, b'!' | b'M'), star: *third == b'*' },
            [b'-' | b'/'] | [b'/', b'*'] => State::Head,
            [before @ .., b';'] if before.trim_ascii_end().eq_ignore_ascii_case(b"DELIMITER") => {
                self.body.clear();
                self.held = vec![b';'];
                State::Body { last: false }
            }
            _ if whole_word(b"DELIMITER") => State::Head,
            held if held.len() <= MOST_HEAD && (byte.is_ascii_alphabetic() || blank(byte)) => State::Head,
            _ => {
                // What it is does not matter, but this byte may be a quote, or the end.
                self.state = State::Statement;
                return 0;
            }
        };
        1
    }

    fn hold(&mut self, bytes: &[u8]) {
        let room = MOST_TEXT.saturating_sub(self.held.len()).min(bytes.len());
        self.held.extend_from_slice(bytes.get(..room).unwrap_or_default());
    }

    fn end_insert(&mut self) {
        let table = self.summary.tables.entry(self.table.clone()).or_default();
        table.rows += self.numbers.rows;
        table.bytes += self.numbers.bytes;
        self.numbers = Table::default();
    }

    /// A comment line: the first ones tell versions.
    fn comment(&mut self) {
        if !self.summary.tables.is_empty() {
            return;
        }
        let text = String::from_utf8_lossy(&self.held).into_owned();
        if let Some(version) = text.strip_prefix("-- Server version") {
            self.summary.server_version = version.trim().to_owned();
        } else if let Some(tool) = text.strip_prefix("-- MySQL dump ").or_else(|| text.strip_prefix("-- MariaDB dump ")) {
            let version = tool.split_once("Distrib ").map_or(tool, |(_, v)| v);
            self.summary.tool_version = version.split(',').next().unwrap_or(version).trim().to_owned();
        }
    }
}
