//! What the servers that misbehave share: faults, rules that say which request meets which, and HTTP as far as they speak it.

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// Answered by this status, and nothing done.
    Status(u16),
    /// The storage says that it is full.
    Full,
    /// The connection ends without an answer, and nothing was done.
    Reset,
    /// Done, and answered by an error.
    DoneAndError,
    /// Done, and the connection ends without an answer.
    DoneAndReset,
    /// Done twice (a proxy sends the request again); the answer is the second one's.
    Twice,
    /// Never answered, and nothing done.
    Hang,
    /// The answer stops in the middle of its body and never goes on.
    HangInBody,
    /// The connection ends in the middle of the answer's body.
    Cut,
    /// The answer says that it is shorter than what was asked for, and is.
    Short,
    /// Answered as done; half of it was stored.
    ShortWrite,
    /// Answered as done; nothing was stored.
    Lost,
    /// A bit of the answer's body is another.
    Flipped,
    /// Answered as done; a bit of what was stored is another.
    FlippedWrite,
    /// The answer names another ETag.
    WrongTag,
    /// Not there, whatever is.
    NotThere,
    /// The listing as it was when [`S3::remember`] was called.
    Stale,
    /// Every second object of the page is left out; nothing tells.
    Holes,
    /// The listing ends after its first page and says that it is complete.
    FirstPageOnly,
    /// The listing says that it goes on and does not say where.
    NoToken,
    /// The listing's next page is always this one.
    Circle,
    /// The text of the listing stops in the middle.
    CutText,
    /// A page of some proxy, answered as good.
    Html,
    /// A listing of nothing.
    Nothing,
    /// The answer comes in small pieces with pauses, each shorter than any timeout.
    Slow,
}

#[derive(Debug, Clone)]
pub struct Rule<V> {
    pub verb: V,
    /// What the name (of a listing: the prefix) contains.
    pub name: String,
    /// Begins with this occurrence, counted from 1.
    pub nth: usize,
    /// And ends after so many.
    pub times: usize,
    pub fault: Fault,
}

/// The rule that holds, and what was asked for since.
pub struct Rules<V> {
    rule: Option<Rule<V>>,
    seen: usize,
    hits: usize,
    /// Since the counting began.
    pub log: Vec<(V, String)>,
    /// Requests of no known kind.
    pub unknown: Vec<String>,
}

impl<V> Default for Rules<V> {
    fn default() -> Self {
        Self { rule: None, seen: 0, hits: 0, log: Vec::new(), unknown: Vec::new() }
    }
}

impl<V: Clone + PartialEq> Rules<V> {
    /// From now on this fault; counts begin anew.
    pub fn set(&mut self, rule: Rule<V>) {
        (self.seen, self.hits, self.rule) = (0, 0, Some(rule));
        self.log.clear();
    }

    /// No fault any more. How often it was met.
    pub fn clear(&mut self) -> usize {
        self.rule = None;
        self.hits
    }

    pub fn is_set(&self) -> bool {
        self.rule.is_some()
    }

    /// The fault that this request meets.
    pub fn fault(&mut self, verb: V, name: &str) -> Option<Fault> {
        let rule = self.rule.clone().filter(|r| r.verb == verb && name.contains(&r.name))?;
        self.seen += 1;
        let is_met = self.seen >= rule.nth && self.seen - rule.nth < rule.times;
        is_met.then(|| {
            self.hits += 1;
            rule.fault
        })
    }
}

pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn of(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into() }
    }
}

/// Answers the requests of a connection, until one ends it.
pub fn serve<R>(stream: &TcpStream, read: impl Fn(&mut BufReader<TcpStream>) -> Option<R>, handle: impl Fn(R) -> Option<()>) {
    let _ = stream.set_nodelay(true);
    let Ok(reading) = stream.try_clone() else { return };
    let mut reader = BufReader::new(reading);
    while let Some(request) = read(&mut reader) {
        if handle(request).is_none() {
            break;
        }
    }
    let _ = stream.shutdown(Shutdown::Both);
}

/// Names in lower case, in the order that they came in.
pub fn read_headers(reader: &mut impl BufRead) -> Option<Vec<(String, String)>> {
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { return Some(headers) };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
}

/// Sends an answer as a fault has it; None when the connection is to end. Without a body there is no word of its length.
pub fn send(mut stream: &TcpStream, answer: &Answer, has_body: bool, fault: Option<Fault>) -> Option<()> {
    let mut head = format!("HTTP/1.1 {} Answer\r\n", answer.status);
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if has_body {
        head.push_str(&format!("Content-Length: {}\r\n", answer.body.len()));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).ok()?;
    let body: &[u8] = if has_body { &answer.body } else { &[] };
    match fault {
        Some(Fault::Cut) => {
            stream.write_all(&body[..body.len() / 2]).ok()?;
            None
        }
        Some(Fault::HangInBody) => {
            stream.write_all(&body[..body.len() / 2]).ok()?;
            stream.flush().ok()
        }
        Some(Fault::Slow) => {
            for piece in body.chunks(body.len().div_ceil(6).max(1)) {
                std::thread::sleep(Duration::from_millis(60));
                stream.write_all(piece).ok()?;
            }
            Some(())
        }
        _ => stream.write_all(body).ok(),
    }
}
