//! An object store that speaks S3 and misbehaves on command. Objects are in memory; rules say which request meets which fault; requests are numbered, and a
//! process can be killed at one of them.
//!
//! Conditions (`If-None-Match: *`), ranges, pages and uploads in parts work as in the real thing, so that what a fault does is the fault's doing. Pages
//! are short: every listing of the tests has several.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::common::servers::SECRET;
use crate::http::{self, Answer, Fault, Rules, read_headers, send, serve};

/// Objects of one page of a listing.
const PAGE: usize = 3;
pub const BUCKET: &str = "bucket";

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verb {
    /// On the condition that there is none of that name.
    PutNew,
    /// Whatever is there.
    Put,
    /// A part of a longer object, or the beginning or end of such an upload.
    Part,
    Get,
    Range,
    Stat,
    List,
    Delete,
}

pub type Rule = http::Rule<Verb>;

/// A process that dies at a request.
#[derive(Debug, Clone, Copy)]
pub struct Kill {
    pub pid: u32,
    /// At this request, counted from when it was set.
    pub at: usize,
    /// When the request was done already, and before its answer.
    pub done: bool,
}

type Objects = BTreeMap<String, Arc<Vec<u8>>>;

#[derive(Default)]
struct State {
    objects: Objects,
    remembered: Objects,
    uploads: BTreeMap<String, (String, BTreeMap<u32, Vec<u8>>)>,
    rules: Rules<Verb>,
    kill: Option<Kill>,
    requests: usize,
}

struct Shared {
    state: Mutex<State>,
    /// Told when what hangs may end.
    released: Condvar,
}

#[derive(Clone)]
pub struct S3 {
    pub port: u16,
    shared: Arc<Shared>,
}

struct Request {
    method: String,
    /// Decoded, without the bucket.
    key: String,
    query: BTreeMap<String, String>,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Answer {
    fn error(status: u16, code: &str, message: &str) -> Self {
        Self::of(status, format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>{message}</Message></Error>"))
    }

    fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.into(), value.to_string()));
        self
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl S3 {
    pub fn started() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared { state: Mutex::default(), released: Condvar::new() });
        let server = Self { port, shared: shared.clone() };
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                std::thread::spawn(move || serve(&stream, read_request, |request| handle(&request, &stream, &shared)));
            }
        });
        server
    }

    /// A destination's table for it.
    pub fn destination(&self, name: &str, root: &str, secret_file: &std::path::Path, more: &str) -> String {
        std::fs::write(secret_file, format!("{SECRET}\n")).unwrap();
        format!(
            "[destination.{name}]\nservice = \"s3\"\nbucket = \"{BUCKET}\"\nroot = \"{root}\"\nendpoint = \"http://127.0.0.1:{}\"\nregion = \"us-east-1\"\n\
             access_key_id = \"keeper\"\nsecret_access_key = {{ file = \"{}\" }}\nencryption = \"main\"\n{more}\n",
            self.port,
            secret_file.display()
        )
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
        let mut state = lock(&self.shared);
        state.remembered = state.objects.clone();
    }

    pub fn kill_at(&self, kill: Kill) {
        let mut state = lock(&self.shared);
        (state.requests, state.kill) = (0, Some(kill));
        state.rules.log.clear();
    }

    /// Whether the process was not killed yet; it will not be any more.
    pub fn spare(&self) -> bool {
        lock(&self.shared).kill.take().is_some()
    }

    pub fn names(&self) -> Vec<String> {
        lock(&self.shared).objects.keys().cloned().collect()
    }

    /// The requests since the last rule or count was set.
    pub fn log(&self) -> Vec<(Verb, String)> {
        lock(&self.shared).rules.log.clone()
    }

    pub fn forget_log(&self) {
        lock(&self.shared).rules.log.clear();
    }

    /// Requests that it has no answer for: a test that has some tests something else.
    pub fn unknown(&self) -> Vec<String> {
        lock(&self.shared).rules.unknown.clone()
    }
}

fn read_request(reader: &mut impl BufRead) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let headers: BTreeMap<String, String> = read_headers(reader)?.into_iter().collect();
    let len: usize = headers.get("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
    let mut body = vec![0; len];
    reader.read_exact(&mut body).ok()?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query = query.split('&').filter(|p| !p.is_empty());
    let query = query.map(|p| p.split_once('=').unwrap_or((p, ""))).map(|(k, v)| (decoded(k), decoded(v))).collect();
    let path = decoded(path);
    let key = path.trim_start_matches('/').strip_prefix(BUCKET).unwrap_or(&path).trim_start_matches('/').to_owned();
    Some(Request { method, key, query, headers, body })
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut left = text.bytes();
    while let Some(byte) = left.next() {
        match byte {
            b'%' => {
                let hex: Vec<u8> = left.by_ref().take(2).collect();
                bytes.push(u8::from_str_radix(std::str::from_utf8(&hex).unwrap(), 16).unwrap());
            }
            b'+' => bytes.push(b' '),
            other => bytes.push(other),
        }
    }
    String::from_utf8(bytes).unwrap()
}

impl Request {
    fn verb(&self) -> Option<Verb> {
        let has = |name: &str| self.query.contains_key(name);
        Some(match self.method.as_str() {
            "GET" if has("list-type") => Verb::List,
            "GET" if self.headers.contains_key("range") => Verb::Range,
            "GET" => Verb::Get,
            "HEAD" => Verb::Stat,
            "DELETE" if has("uploadId") => Verb::Part,
            "DELETE" => Verb::Delete,
            "PUT" if has("partNumber") => Verb::Part,
            "PUT" if self.headers.contains_key("if-none-match") => Verb::PutNew,
            "PUT" => Verb::Put,
            "POST" if has("uploads") || has("uploadId") => Verb::Part,
            _ => return None,
        })
    }

    fn name(&self) -> &str {
        self.query.get("prefix").unwrap_or(&self.key)
    }
}

/// Answers a request; None when the connection is to end.
fn handle(request: &Request, stream: &TcpStream, shared: &Shared) -> Option<()> {
    let mut state = lock(shared);
    let Some(verb) = request.verb() else {
        state.rules.unknown.push(format!("{} {}", request.method, request.key));
        drop(state);
        return send(stream, &Answer::error(501, "NotImplemented", "the tests' storage knows no such request"), true, None);
    };
    let has_body = verb != Verb::Stat;
    state.rules.log.push((verb, request.name().to_owned()));
    state.requests += 1;
    if let Some(kill) = state.kill.filter(|k| state.requests >= k.at) {
        state.kill = None;
        if kill.done {
            let _ = state.answer(request, verb, None);
        }
        let killed = std::process::Command::new("kill").args(["-9", &kill.pid.to_string()]).status().unwrap();
        assert!(killed.success());
        return None;
    }
    let fault = state.rules.fault(verb, request.name());
    match fault {
        Some(Fault::Hang) => {
            wait_for_release(state, shared);
            return None;
        }
        Some(Fault::Reset) => return None,
        Some(Fault::DoneAndReset) => {
            let _ = state.answer(request, verb, None);
            return None;
        }
        Some(Fault::DoneAndError) => {
            let _ = state.answer(request, verb, None);
            drop(state);
            return send(stream, &Answer::error(500, "InternalError", "We encountered an internal error"), has_body, None);
        }
        _ => {}
    }
    let answer = state.answer(request, verb, fault);
    if fault == Some(Fault::HangInBody) {
        let _ = send(stream, &answer, has_body, fault);
        wait_for_release(state, shared);
        return None;
    }
    drop(state);
    send(stream, &answer, has_body, fault)
}

/// Until the rule is cleared.
fn wait_for_release(state: MutexGuard<'_, State>, shared: &Shared) {
    drop(shared.released.wait_while(state, |s| s.rules.is_set()));
}

fn tag(bytes: &[u8]) -> String {
    let digest = <sha2::Sha256 as sha2::Digest>::digest(bytes);
    format!("\"{}\"", data_encoding::HEXLOWER.encode(&digest[..16]))
}

impl State {
    fn answer(&mut self, request: &Request, verb: Verb, fault: Option<Fault>) -> Answer {
        match fault {
            Some(Fault::Status(503)) => return Answer::error(503, "SlowDown", "Please reduce your request rate."),
            Some(Fault::Status(403)) => return Answer::error(403, "AccessDenied", "Access Denied"),
            Some(Fault::Status(status)) => return Answer::error(status, "InternalError", "We encountered an internal error"),
            Some(Fault::Full) => return Answer::error(507, "InsufficientStorage", "The storage is full: quota exceeded"),
            Some(Fault::NotThere) => return Answer::error(404, "NoSuchKey", "The specified key does not exist."),
            Some(Fault::Html) => return Answer::of(200, "<html><head><title>Log in</title></head><body>Welcome</body></html>"),
            Some(Fault::Twice) => {
                let _ = self.done(request, verb, None);
            }
            _ => {}
        }
        let mut answer = self.done(request, verb, fault);
        match fault {
            Some(Fault::Flipped) => {
                let middle = answer.body.len() / 2;
                answer.body.get_mut(middle).into_iter().for_each(|b| *b ^= 1);
            }
            Some(Fault::Short | Fault::CutText) => answer.body.truncate(answer.body.len() / 2),
            Some(Fault::WrongTag) => {
                answer.headers.retain(|(name, _)| name != "ETag");
                answer = answer.with("ETag", "\"00000000000000000000000000000000\"");
            }
            _ => {}
        }
        answer
    }

    fn done(&mut self, request: &Request, verb: Verb, fault: Option<Fault>) -> Answer {
        match verb {
            Verb::PutNew if self.objects.contains_key(&request.key) => {
                Answer::error(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold")
            }
            Verb::PutNew | Verb::Put => {
                let tag = tag(&request.body);
                self.store(&request.key, request.body.clone(), fault);
                Answer::of(200, "").with("ETag", tag)
            }
            Verb::Part => self.part(request, fault),
            Verb::Stat | Verb::Get | Verb::Range => match self.objects.get(&request.key) {
                None => Answer::error(404, "NoSuchKey", "The specified key does not exist."),
                Some(bytes) => content(request, verb, bytes),
            },
            Verb::List => self.list(request, fault),
            Verb::Delete => {
                if fault != Some(Fault::Lost) {
                    self.objects.remove(&request.key);
                }
                Answer::of(204, "")
            }
        }
    }

    fn store(&mut self, key: &str, mut bytes: Vec<u8>, fault: Option<Fault>) {
        match fault {
            Some(Fault::Lost) => return,
            Some(Fault::ShortWrite) => bytes.truncate(bytes.len() / 2),
            Some(Fault::FlippedWrite) => {
                let middle = bytes.len() / 2;
                bytes.get_mut(middle).into_iter().for_each(|b| *b ^= 1);
            }
            _ => {}
        }
        self.objects.insert(key.to_owned(), Arc::new(bytes));
    }

    fn part(&mut self, request: &Request, fault: Option<Fault>) -> Answer {
        let Some(id) = request.query.get("uploadId") else {
            let id = format!("upload-{}", self.requests);
            self.uploads.insert(id.clone(), (request.key.clone(), BTreeMap::new()));
            return Answer::of(200, format!("<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"));
        };
        let Some((key, parts)) = self.uploads.get_mut(id) else {
            return Answer::error(404, "NoSuchUpload", "The specified upload does not exist.");
        };
        if let Some(number) = request.query.get("partNumber") {
            parts.insert(number.parse().unwrap(), request.body.clone());
            return Answer::of(200, "").with("ETag", tag(&request.body));
        }
        let (key, whole) = (key.clone(), parts.values().flatten().copied().collect::<Vec<u8>>());
        self.uploads.remove(id);
        if request.method == "DELETE" {
            return Answer::of(204, "");
        }
        let tag = tag(&whole);
        self.store(&key, whole, fault);
        Answer::of(200, format!("<CompleteMultipartUploadResult><Key>{key}</Key><ETag>{tag}</ETag></CompleteMultipartUploadResult>"))
    }

    fn list(&self, request: &Request, fault: Option<Fault>) -> Answer {
        let value = |name: &str| request.query.get(name).map(String::as_str).unwrap_or_default();
        let (prefix, delimiter, after) = (value("prefix"), value("delimiter"), value("continuation-token"));
        let objects = if fault == Some(Fault::Stale) { &self.remembered } else { &self.objects };
        let mut found: Vec<(String, Option<&Arc<Vec<u8>>>)> = Vec::new();
        for (key, bytes) in objects.iter().filter(|(key, _)| key.starts_with(prefix)) {
            let rest = &key[prefix.len()..];
            match rest.split_once('/').filter(|_| !delimiter.is_empty()) {
                Some((directory, _)) => {
                    let name = format!("{prefix}{directory}/");
                    if found.last().is_none_or(|(last, _)| *last != name) {
                        found.push((name, None));
                    }
                }
                None => found.push((key.clone(), Some(bytes))),
            }
        }
        found.retain(|(name, _)| name.as_str() > after);
        let mut goes_on = found.len() > PAGE;
        found.truncate(PAGE);
        let mut next = found.last().map(|(name, _)| name.clone()).unwrap_or_default();
        match fault {
            Some(Fault::Holes) => {
                let mut n = 0;
                found.retain(|_| {
                    n += 1;
                    n % 2 == 0
                });
            }
            Some(Fault::FirstPageOnly) => goes_on = false,
            Some(Fault::NoToken) => (goes_on, next) = (true, String::new()),
            Some(Fault::Circle) => (goes_on, next) = (true, after.to_owned() + "!"),
            Some(Fault::Nothing) => {
                found.clear();
                goes_on = false;
            }
            _ => {}
        }
        let mut text = format!("<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>{goes_on}</IsTruncated>");
        if goes_on && !next.is_empty() {
            text.push_str(&format!("<NextContinuationToken>{next}</NextContinuationToken>"));
        }
        for (name, bytes) in found {
            text.push_str(&match bytes {
                None => format!("<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>"),
                Some(bytes) => format!(
                    "<Contents><Key>{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{}</ETag><Size>{}</Size></Contents>",
                    tag(bytes).replace('"', "&quot;"),
                    bytes.len()
                ),
            });
        }
        Answer::of(200, text + "</ListBucketResult>").with("Content-Type", "application/xml")
    }
}

fn content(request: &Request, verb: Verb, bytes: &Arc<Vec<u8>>) -> Answer {
    let tagged = |answer: Answer| answer.with("ETag", tag(bytes)).with("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT");
    match verb {
        Verb::Stat => tagged(Answer::of(200, "")).with("Content-Length", bytes.len()),
        Verb::Range => {
            let range = request.headers["range"].trim_start_matches("bytes=").to_owned();
            let (from, to) = range.split_once('-').unwrap();
            let from: usize = from.parse().unwrap();
            let to = to.parse().map_or(bytes.len(), |to: usize| (to + 1).min(bytes.len()));
            if from >= bytes.len() {
                return Answer::error(416, "InvalidRange", "The requested range is not satisfiable");
            }
            tagged(Answer::of(206, &bytes[from..to])).with("Content-Range", format!("bytes {from}-{}/{}", to - 1, bytes.len()))
        }
        _ => tagged(Answer::of(200, bytes.as_slice())),
    }
}
