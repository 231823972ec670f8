//! WebDAV that misbehaves on command: a proxy before rclone's server. Rules say which request meets which fault, as with the object store of [`crate::s3`].

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::common::files_below;
use crate::common::servers::{Kind, SECRET, Server};
use crate::http::{self, Answer, Fault, Rules, read_headers, send, serve};

pub type Rule = http::Rule<Verb>;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verb {
    Put,
    /// By the name that it is to have.
    Move,
    Mkcol,
    Get,
    Stat,
    List,
    Delete,
}

#[derive(Default)]
struct State {
    rules: Rules<Verb>,
    /// The files that there were, by their paths below the root.
    remembered: BTreeSet<String>,
}

struct Shared {
    server: u16,
    state: Mutex<State>,
    released: Condvar,
}

pub struct Dav {
    pub port: u16,
    shared: Arc<Shared>,
    server: Server,
}

struct Request {
    method: String,
    target: String,
    /// As they came, but what says how long the body is and whether the connection stays.
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Dav {
    /// Its files lie below `dir`.
    pub fn started(dir: &Path) -> Self {
        let server = Server::started(Kind::Webdav, dir);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared { server: server.port, state: Mutex::default(), released: Condvar::new() });
        let proxy = Self { port, shared: shared.clone(), server };
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                std::thread::spawn(move || serve(&stream, read_request, |request| handle(&request, &stream, &shared)));
            }
        });
        proxy
    }

    pub fn destination(&self, name: &str, more: &str) -> String {
        self.server.destination_at(name, self.port, SECRET, more)
    }

    /// Where its objects lie.
    pub fn data(&self) -> PathBuf {
        self.server.data()
    }

    /// From now on this fault; counts begin anew.
    pub fn set(&self, rule: Rule) {
        lock(&self.shared).rules.set(rule);
    }

    /// No fault any more, and what hangs ends. How often it was met.
    pub fn clear(&self) -> usize {
        let hits = lock(&self.shared).rules.clear();
        self.shared.released.notify_all();
        hits
    }

    /// What [`Fault::Stale`] lists.
    pub fn remember(&self) {
        let root = self.data();
        let names = files_below(&root).into_iter().map(|path| path.strip_prefix(&root).unwrap().to_string_lossy().into_owned());
        lock(&self.shared).remembered = names.collect();
    }

    pub fn log(&self) -> Vec<(Verb, String)> {
        lock(&self.shared).rules.log.clone()
    }

    pub fn forget_log(&self) {
        lock(&self.shared).rules.log.clear();
    }

    /// Requests of no known kind: a test that has some tests something else.
    pub fn unknown(&self) -> Vec<String> {
        lock(&self.shared).rules.unknown.clone()
    }
}

fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
}

/// A body of a known length, or in chunks; else none, or what comes until the end.
fn read_body(reader: &mut impl BufRead, headers: &[(String, String)], to_the_end: bool) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    if header(headers, "transfer-encoding").is_some_and(|how| how.contains("chunked")) {
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
            let len = usize::from_str_radix(line.trim().split(';').next()?, 16).ok()?;
            let mut chunk = vec![0; len + 2];
            reader.read_exact(&mut chunk).ok()?;
            if len == 0 {
                return Some(body);
            }
            body.extend_from_slice(&chunk[..len]);
        }
    }
    match header(headers, "content-length").map(str::parse) {
        Some(len) => {
            body = vec![0; len.ok()?];
            reader.read_exact(&mut body).ok()?;
        }
        None if to_the_end => drop(reader.read_to_end(&mut body).ok()?),
        None => {}
    }
    Some(body)
}

/// What is said of the connection, not of what it carries.
fn without_lengths(mut headers: Vec<(String, String)>) -> Vec<(String, String)> {
    headers.retain(|(name, _)| !["content-length", "transfer-encoding", "connection", "host"].contains(&name.as_str()));
    headers
}

fn read_request(reader: &mut impl BufRead) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let headers = read_headers(reader)?;
    if header(&headers, "expect").is_some() {
        return None;
    }
    let body = read_body(reader, &headers, false)?;
    Some(Request { method, target, headers: without_lengths(headers), body })
}

impl Request {
    fn verb(&self) -> Option<Verb> {
        Some(match self.method.as_str() {
            "PUT" => Verb::Put,
            "MOVE" => Verb::Move,
            "MKCOL" => Verb::Mkcol,
            "GET" => Verb::Get,
            "PROPFIND" if header(&self.headers, "depth") == Some("0") => Verb::Stat,
            "PROPFIND" => Verb::List,
            "DELETE" => Verb::Delete,
            _ => return None,
        })
    }

    /// Below the root; for a move the new one.
    fn name(&self) -> String {
        let path = match header(&self.headers, "destination") {
            Some(url) => url.split_once("://").map_or(url, |(_, rest)| rest.split_once('/').map_or("", |(_, path)| path)),
            None => &self.target,
        };
        let path = path.trim_start_matches('/');
        path.strip_prefix("pre/").unwrap_or(if path == "pre" { "" } else { path }).to_owned()
    }

    /// Done by the server behind.
    fn done(&self, server: u16, body: &[u8]) -> Option<Answer> {
        let mut stream = TcpStream::connect(("127.0.0.1", server)).ok()?;
        // The server compares it with where things are to be moved to.
        let host = header(&self.headers, "destination").and_then(|url| Some(url.split_once("://")?.1.split_once('/')?.0));
        let mut head = format!(
            "{} {} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n",
            self.method,
            self.target,
            host.unwrap_or("127.0.0.1"),
            body.len()
        );
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes()).ok()?;
        stream.write_all(body).ok()?;
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let status = line.split_whitespace().nth(1)?.parse().ok()?;
        let headers = read_headers(&mut reader)?;
        let body = if status == 204 { Vec::new() } else { read_body(&mut reader, &headers, true)? };
        Some(Answer { status, headers: without_lengths(headers), body })
    }
}

/// Answers a request; None when the connection is to end.
fn handle(request: &Request, stream: &TcpStream, shared: &Shared) -> Option<()> {
    let Some(verb) = request.verb() else {
        lock(shared).rules.unknown.push(format!("{} {}", request.method, request.target));
        return send(stream, &Answer::of(501, "the tests' proxy knows no such request"), true, None);
    };
    let name = request.name();
    let fault = {
        let mut state = lock(shared);
        state.rules.log.push((verb, name.clone()));
        state.rules.fault(verb, &name)
    };
    let server = shared.server;
    match fault {
        Some(Fault::Hang) => {
            wait_for_release(shared);
            return None;
        }
        Some(Fault::Reset) => return None,
        Some(Fault::DoneAndReset) => {
            request.done(server, &request.body)?;
            return None;
        }
        Some(Fault::DoneAndError) => {
            request.done(server, &request.body)?;
            return send(stream, &Answer::of(500, "We encountered an internal error (InternalError)"), true, None);
        }
        _ => {}
    }
    let answer = answer(request, verb, &name, fault, shared)?;
    let sent = send(stream, &answer, answer.status != 204, fault);
    if fault == Some(Fault::HangInBody) {
        wait_for_release(shared);
        return None;
    }
    sent
}

fn answer(request: &Request, verb: Verb, name: &str, fault: Option<Fault>, shared: &Shared) -> Option<Answer> {
    let half = request.body.len() / 2;
    let body = match fault {
        Some(Fault::Status(500)) => return Some(Answer::of(500, "We encountered an internal error (InternalError)")),
        Some(Fault::Status(503)) => return Some(Answer::of(503, "Please reduce your request rate (SlowDown)")),
        // As servers do whose disk is full: without a word.
        Some(Fault::Status(status)) => return Some(Answer::of(status, "")),
        Some(Fault::Full) => return Some(Answer::of(507, "Insufficient Storage")),
        Some(Fault::NotThere) => return Some(Answer::of(404, "Not Found")),
        Some(Fault::Html) => {
            let page = "<html><head><title>Log in</title></head><body>Welcome</body></html>";
            return Some(Answer::of(if matches!(verb, Verb::List | Verb::Stat) { 207 } else { 200 }, page));
        }
        Some(Fault::Lost) => return Some(Answer::of(if verb == Verb::Delete { 204 } else { 201 }, "")),
        Some(Fault::ShortWrite) => &request.body[..half],
        Some(Fault::Twice) => {
            request.done(shared.server, &request.body)?;
            &request.body[..]
        }
        _ => &request.body[..],
    };
    let mut answer = request.done(shared.server, body)?;
    match fault {
        Some(Fault::Flipped) => {
            let middle = answer.body.len() / 2;
            answer.body.get_mut(middle).into_iter().for_each(|b| *b ^= 1);
        }
        Some(Fault::Short | Fault::CutText) => answer.body.truncate(answer.body.len() / 2),
        Some(fault @ (Fault::Stale | Fault::Holes | Fault::FirstPageOnly | Fault::Nothing)) if verb == Verb::List => {
            let text = String::from_utf8(std::mem::take(&mut answer.body)).unwrap();
            answer.body = listed(&text, name, fault, &lock(shared).remembered).into_bytes();
        }
        _ => {}
    }
    Some(answer)
}

/// A listing as a fault has it. Its first entry is the directory itself.
fn listed(text: &str, directory: &str, fault: Fault, remembered: &BTreeSet<String>) -> String {
    const END: &str = "</D:response>";
    let Some((begin, end)) = text.find("<D:response>").zip(text.rfind(END)) else { return text.to_owned() };
    let (head, entries, tail) = (&text[..begin], &text[begin..end + END.len()], &text[end + END.len()..]);
    let mut entries: Vec<String> = entries.split_inclusive(END).map(str::to_owned).collect();
    let name = |entry: &str| {
        let href = entry.split_once("<D:href>")?.1.split_once("</D:href>")?.0;
        Some(href.trim_start_matches('/').strip_prefix("pre/").unwrap_or_default().to_owned())
    };
    let itself = entries.remove(0);
    match fault {
        Fault::Nothing => entries.clear(),
        Fault::FirstPageOnly => entries.truncate(1),
        Fault::Holes => {
            let mut n = 0;
            entries.retain(|_| {
                n += 1;
                n % 2 == 0
            });
        }
        _ => {
            // Without what came since, and with what went.
            let was =
                |name: &str| remembered.contains(name) || remembered.iter().any(|known| known.starts_with(name) && name.ends_with('/'));
            let pattern = entries.iter().find(|entry| name(entry).is_some_and(|n| !n.ends_with('/'))).cloned();
            let there: BTreeSet<String> = entries.iter().filter_map(|entry| name(entry)).collect();
            entries.retain(|entry| name(entry).is_some_and(|n| was(&n)));
            let gone = remembered.iter().filter(|n| {
                n.strip_prefix(directory).is_some_and(|rest| !rest.trim_start_matches('/').contains('/')) && !there.contains(n.as_str())
            });
            entries.extend(gone.filter_map(|gone| {
                let pattern = pattern.as_ref()?;
                Some(pattern.replace(&name(pattern)?, gone))
            }));
        }
    }
    format!("{head}{itself}{}{tail}", entries.concat())
}

/// Until the rule is cleared.
fn wait_for_release(shared: &Shared) {
    drop(shared.released.wait_while(lock(shared), |state| state.rules.is_set()));
}
