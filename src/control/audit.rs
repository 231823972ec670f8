//! What callers did, written into the audit log, and the methods that tell it.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use data_encoding::{BASE64, HEXLOWER};
use jiff::Timestamp;
use keepd_protocol::MAX_REPLY_BYTES;
use keepd_protocol::audit::{AuditEntry, AuditResult};
use keepd_protocol::call::{Call, errors};
use keepd_protocol::methods::*;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::handlers::{Result, failed};
use super::service::Control;
use super::transport::{Fault, Peer, Replies};
use crate::access::deed::{Audited, Deed};
use crate::access::is_owner;
use crate::ledger::Ledger;
use crate::ledger::audit::{ACTED_ON, MAX_ON, bounded};

/// Refusals of one user in this time, after the first, are one further entry.
const FOLDED: Duration = Duration::from_secs(60);
/// Users whose refusals are told apart at once; those of more are counted together.
const MOST_REFUSED: usize = 64;
/// Methods and users that such an entry names.
const MOST_NAMED: usize = 5;
/// Of what a refused call was about, in bytes: whoever may do nothing chooses what stands there.
const MAX_REFUSED: usize = 256;
/// What one user looked at is written down so many times an hour; the rest of that hour is counted.
const MOST_LOOKS: u32 = 600;
const LOOKS_IN: Duration = Duration::from_secs(3600);
/// Users whose looks are counted apart, and uploads that are remembered.
const MOST_LOOKING: usize = 1024;
const MOST_UPLOADS: usize = 4096;

/// Of a list of things that a call is about.
const MAX_ITEMS: usize = 20;
const MAX_TEXT: usize = 256;

/// Parameters that say what a call is about. Others may hold contents or secrets: of them only the names are kept.
const TOLD: &[&str] = &[
    "a",
    "after",
    "all",
    "allow",
    "answers",
    "at",
    "b",
    "backup",
    "backups",
    "bandwidth",
    "base",
    "cancel",
    "compression",
    "configured",
    "confirm",
    "database",
    "deep",
    "description",
    "destination",
    "destinations",
    "drop_slots",
    "dry_run",
    "edits",
    "file",
    "foreign_source",
    "fresh_key",
    "import",
    "include_secrets",
    "item",
    "items",
    "job",
    "label",
    "labels",
    "limit",
    "mark",
    "max_bytes",
    "mode",
    "name",
    "newest",
    "no_owner",
    "no_safety",
    "offline",
    "on_conflict",
    "only",
    "part",
    "path",
    "paths",
    "place",
    "policy",
    "private_key",
    "profile",
    "read_data",
    "recursive",
    "rename_sources",
    "repair",
    "replace",
    "result",
    "roles",
    "run",
    "since",
    "slot",
    "source",
    "sources",
    "step",
    "strict",
    "tables",
    "target",
    "time",
    "timeout_seconds",
    "type",
    "types",
    "undo",
    "until",
    "user",
    "validate",
    "validate_only",
    "version",
    "action",
];

/// What is counted so that nobody fills the log: refusals by user, and what each looks at.
#[derive(Default)]
pub struct Refusals {
    refused: Mutex<HashMap<u32, Folded>>,
    looks: Mutex<HashMap<u32, Looks>>,
    /// Parts of imports whose upload is written down.
    uploads: Mutex<HashSet<String>>,
}

struct Folded {
    since: Instant,
    times: u64,
    /// The last of them.
    entry: AuditEntry,
    methods: Vec<String>,
    users: Vec<String>,
}

struct Looks {
    since: Instant,
    written: u32,
    /// Those that were not, and the last of them.
    times: u64,
    entry: AuditEntry,
}

/// Stands for all users that are too many to be told apart.
const OTHERS: u32 = u32::MAX;

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn note(names: &mut Vec<String>, name: &str) {
    if names.len() < MOST_NAMED && !names.iter().any(|known| known == name) {
        names.push(name.to_owned());
    }
}

impl Refusals {
    /// Whether it is to be written now; else it is counted with the one that was.
    fn is_new(&self, entry: &AuditEntry) -> bool {
        let mut known = lock(&self.refused);
        let uid = entry.uid.unwrap_or(OTHERS);
        let uid = if known.contains_key(&uid) || known.len() < MOST_REFUSED { uid } else { OTHERS };
        let is_new = !known.contains_key(&uid);
        let folded = known.entry(uid).or_insert_with(|| Folded {
            since: Instant::now(),
            times: 0,
            entry: entry.clone(),
            methods: Vec::new(),
            users: Vec::new(),
        });
        if !is_new {
            folded.times += 1;
            folded.entry = entry.clone();
            note(&mut folded.methods, &entry.action);
            note(&mut folded.users, &entry.user);
        }
        is_new
    }

    /// Takes those whose time is over (or all): entries that stand for several.
    fn over(&self, all: bool) -> Vec<AuditEntry> {
        let mut known = lock(&self.refused);
        let over: Vec<_> = known.iter().filter(|(_, f)| all || f.since.elapsed() >= FOLDED).map(|(uid, _)| *uid).collect();
        let taken = over.iter().filter_map(|uid| known.remove(uid)).filter(|folded| folded.times > 0);
        let entry = |folded: Folded| {
            let mut entry = AuditEntry { times: Some(folded.times), ..folded.entry };
            for (name, list) in [("methods", folded.methods), ("users", folded.users)] {
                if list.len() > 1 {
                    entry.on.insert(name.into(), list.into());
                }
            }
            entry
        };
        let mut entries: Vec<AuditEntry> = taken.map(entry).collect();
        drop(known);
        let mut looks = lock(&self.looks);
        let over: Vec<_> = looks.iter().filter(|(_, l)| all || l.since.elapsed() >= LOOKS_IN).map(|(uid, _)| *uid).collect();
        let taken = over.iter().filter_map(|uid| looks.remove(uid)).filter(|looks| looks.times > 0);
        entries.extend(taken.map(|looks| AuditEntry { times: Some(looks.times), ..looks.entry }));
        entries
    }

    /// 0: what somebody looked at is to be written; else it is counted, and how many were.
    fn untold(&self, entry: &AuditEntry) -> u64 {
        let mut known = lock(&self.looks);
        let uid = entry.uid.unwrap_or(OTHERS);
        // Whoever did not look too often begins anew; of the others somebody waits to write that down.
        known.retain(|_, looks| looks.times > 0 || looks.since.elapsed() < LOOKS_IN);
        let uid = if known.contains_key(&uid) || known.len() < MOST_LOOKING { uid } else { OTHERS };
        let looks = known.entry(uid).or_insert_with(|| Looks { since: Instant::now(), written: 0, times: 0, entry: entry.clone() });
        if looks.written < MOST_LOOKS {
            looks.written += 1;
            return 0;
        }
        looks.times += 1;
        looks.entry = entry.clone();
        looks.times
    }

    /// Whether this is the first piece of a part of an import.
    fn begins_upload(&self, on: &Map<String, Value>) -> bool {
        let mut known = lock(&self.uploads);
        if known.len() >= MOST_UPLOADS {
            known.clear();
        }
        known.insert(format!("{:?} {:?}", on.get("import"), on.get("part")))
    }

    /// Writes down what is still only counted. Blocks.
    pub fn flush(&self, ledger: &Ledger) {
        for entry in self.over(true) {
            // Whether it could be written is said by the ledger.
            let _ = ledger.audit(entry);
        }
    }
}

/// A call that stands in the log as begun, or will when it ended; what became of it does too when this is ended, or dropped.
pub(super) struct Recorded(Option<Open>);

struct Open {
    ledger: Arc<Ledger>,
    refusals: Arc<Refusals>,
    deed: &'static Deed,
    /// What all entries of the call say.
    entry: AuditEntry,
    begun: Option<u64>,
    /// How it ended is written down.
    is_written: bool,
    /// Somebody may go on where that cannot be.
    goes_on: bool,
}

impl Recorded {
    /// Writes down how it ended. An error takes the place of a result that must not be told, for it cannot be written.
    pub async fn end(mut self, result: &Result<Value, Fault>) -> Result<()> {
        let Some(open) = self.0.take() else { return Ok(()) };
        let (mut entry, deed) = (open.entry.clone(), open.deed);
        entry.begun = open.begun;
        let is_refused = result.as_ref().is_err_and(|fault| fault.error == errors::NOT_PERMITTED);
        match result {
            Err(fault) => {
                entry.result = if is_refused { AuditResult::Refused } else { AuditResult::Failed };
                entry.message = Some(words(fault));
            }
            Ok(value) => {
                entry.result = AuditResult::Done;
                add_reply(&mut entry, value);
            }
        }
        if is_refused && open.begun.is_none() {
            if open.is_written {
                open.is_over();
            }
            open.refused(entry).await;
            return Ok(());
        }
        if !open.is_written {
            return Ok(());
        }
        let (is_look, goes_on) = (is_look(deed), open.goes_on);
        if is_look && open.is_counted(&entry) {
            return Ok(());
        }
        // Goes on when nobody waits for it any more.
        let written = tokio::task::spawn_blocking(move || {
            let written = open.ledger.audit(entry);
            open.is_over();
            written
        });
        match written.await.map_err(failed)? {
            Err(e) if is_look && !goes_on && result.is_ok() => Err(unwritten(&e)),
            _ => Ok(()),
        }
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        let Some(open) = self.0.take().filter(|open| open.is_written) else { return };
        let entry = AuditEntry {
            begun: open.begun,
            result: AuditResult::Failed,
            message: Some("the caller hung up, or keepd stopped, before it was answered".into()),
            ..open.entry.clone()
        };
        if is_look(open.deed) && open.is_counted(&entry) {
            return;
        }
        let write = move || {
            let _ = open.ledger.audit(entry);
            open.is_over();
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(write)),
            Err(_) => write(),
        }
    }
}

impl Open {
    async fn refused(self, mut entry: AuditEntry) {
        // Root floods nobody's log but its own, and may do what it is refused otherwise.
        if entry.uid != Some(0) {
            entry.on = small(entry.on);
            if !self.refusals.is_new(&entry) {
                return;
            }
            self.later(FOLDED);
        }
        let ledger = self.ledger;
        let _ = tokio::task::spawn_blocking(move || ledger.audit(entry)).await;
    }

    /// Whether the caller looked too often lately for this to be an entry of its own.
    fn is_counted(&self, entry: &AuditEntry) -> bool {
        let times = self.refusals.untold(entry);
        if times == 1 {
            self.later(LOOKS_IN);
        }
        if times > 0 {
            self.is_over();
        }
        times > 0
    }

    /// Has what is counted written down when its time is over.
    fn later(&self, pause: Duration) {
        let (ledger, refusals) = (self.ledger.clone(), self.refusals.clone());
        // Without a runtime keepd stops, and writes down all that is counted.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            tokio::time::sleep(pause).await;
            let entries = refusals.over(false);
            let _ = tokio::task::spawn_blocking(move || entries.into_iter().for_each(|entry| drop(ledger.audit(entry)))).await;
        });
    }

    /// No run will be named by this call any more.
    fn is_over(&self) {
        self.ledger.audited_calls().fetch_sub(1, Ordering::AcqRel);
    }
}

fn is_look(deed: &Deed) -> bool {
    deed.audited == Audited::Looks
}

fn unwritten(e: &crate::ledger::LedgerError) -> Fault {
    failed(format!(
        "nothing was done: the audit log cannot be written, and without it only root may go on: {e}; free some space where keepd keeps its state, \
         or have root look into keepd's log"
    ))
}

/// Of what a refused call was about, what fits into [`MAX_REFUSED`]: what would have been acted on first.
fn small(on: Map<String, Value>) -> Map<String, Value> {
    let (mut kept, mut left) = (Map::new(), MAX_REFUSED);
    for name in ACTED_ON {
        let Some(value) = on.get(*name) else { continue };
        let first = |list: &Vec<Value>| list.first().cloned().unwrap_or_default();
        let value = match value {
            Value::Array(list) if list.len() > 1 => Value::from(vec![first(list), format!("and {} more", list.len() - 1).into()]),
            other => other.clone(),
        };
        let text = serde_json::to_string(&value).unwrap_or_default();
        let value = if text.len() > 96 { Value::from(bounded(&text, 96)) } else { value };
        let needed = name.len() + 6 + text.len().min(110);
        if needed <= left {
            left -= needed;
            kept.insert((*name).to_owned(), value);
        }
    }
    kept
}

/// An error reply in words.
fn words(fault: &Fault) -> String {
    let text = |name: &str| fault.parameters.get(name).and_then(Value::as_str).map(str::to_owned);
    match fault.error.as_str() {
        "org.varlink.service.InvalidParameter" => format!("the value of '{}' is not accepted", text("parameter").unwrap_or_default()),
        other => text("message").unwrap_or_else(|| other.to_owned()),
    }
}

/// What a reply adds: the run that was started, the backup that was meant, whether a change was made.
fn add_reply(entry: &mut AuditEntry, value: &Value) {
    entry.run = value.get("run").and_then(Value::as_str).map(str::to_owned);
    for (from, to) in [
        ("backup", "resolved"),
        ("applied", "applied"),
        ("base", "shown"),
        ("import", "import"),
        ("sha256", "sha256"),
        ("fingerprint", "fingerprint"),
    ] {
        if let Some(value) = value.get(from).filter(|value| value.is_string() || value.is_boolean()) {
            entry.on.insert(to.to_owned(), value.clone());
        }
    }
    if let Some(backup) = value.get("backup").and_then(|backup| backup.get("id")).filter(|id| id.is_string()) {
        entry.on.insert("resolved".into(), backup.clone());
    }
    if let Some(runs) = value.get("runs").filter(|runs| runs.as_array().is_some_and(|runs| runs.iter().any(Value::is_string))) {
        entry.on.insert("runs".into(), told(runs, BRIEFLY, 0));
    }
}

/// How much of parameters is told.
#[derive(Clone, Copy)]
struct Most {
    items: usize,
    text: usize,
    depth: u32,
}

const BRIEFLY: Most = Most { items: MAX_ITEMS, text: MAX_TEXT, depth: 2 };
const WHOLLY: Most = Most { items: usize::MAX, text: usize::MAX, depth: 64 };

/// What a call is about: its parameters, without contents and secrets, each bounded. Where some of it is left out for its length, a hash stands for all.
fn about(parameters: Option<&Value>) -> Map<String, Value> {
    let mut on = told_of(parameters, BRIEFLY);
    let all = told_of(parameters, WHOLLY);
    let length = |on: &Map<String, Value>| serde_json::to_string(on).map_or(usize::MAX, |text| text.len());
    if on != all || length(&on) > MAX_ON - 128 {
        let sum = Sha256::digest(serde_json::to_vec(&all).unwrap_or_default());
        on.insert("all_sha256".into(), HEXLOWER.encode(&sum).into());
    }
    on
}

fn told_of(parameters: Option<&Value>, most: Most) -> Map<String, Value> {
    let Some(parameters) = parameters.and_then(Value::as_object) else { return Map::new() };
    let mut on = Map::new();
    let mut others = Vec::new();
    for (name, value) in parameters {
        match name.as_str() {
            "edits" => drop(on.insert(name.clone(), edits(value, most))),
            name if TOLD.contains(&name) => match value {
                Value::Null => {}
                Value::Array(list) if list.is_empty() => {}
                Value::Object(map) if map.is_empty() => {}
                value => drop(on.insert(name.to_owned(), told(value, most, 0))),
            },
            name if others.len() < MAX_ITEMS => others.push(Value::from(bounded(name, 64))),
            _ => {}
        }
    }
    if !others.is_empty() {
        on.insert("not_kept".into(), others.into());
    }
    on
}

/// The first of a list, and how many more there are.
fn list(values: &[Value], most: Most, each: impl Fn(&Value) -> Value) -> Value {
    let more = values.len().saturating_sub(most.items);
    let mut kept: Vec<Value> = values.iter().take(most.items).map(each).collect();
    if more > 0 {
        kept.push(format!("and {more} more").into());
    }
    kept.into()
}

fn told(value: &Value, most: Most, depth: u32) -> Value {
    match value {
        Value::String(text) => bounded(text, most.text).into(),
        // A path of the wire: what counts of it are its bytes.
        Value::Object(map) if map.get("path").is_some_and(Value::is_string) => bounded(&path(map), most.text).into(),
        _ if depth > most.depth => "(not kept)".into(),
        Value::Array(values) => list(values, most, |value| told(value, most, depth + 1)),
        Value::Object(map) => Value::Object(
            map.iter().take(most.items).map(|(name, value)| (bounded(name, most.text), told(value, most, depth + 1))).collect(),
        ),
        other => other.clone(),
    }
}

/// A path as it is acted on; bytes that are no text as `\xff`.
fn path(map: &Map<String, Value>) -> String {
    let text = |name: &str| map.get(name).and_then(Value::as_str);
    let Some(base64) = text("base64") else { return text("path").unwrap_or_default().to_owned() };
    let Ok(bytes) = BASE64.decode(base64.as_bytes()) else { return "(a path whose base64 does not decode)".into() };
    let mut shown = String::new();
    for chunk in bytes.utf8_chunks() {
        shown.push_str(chunk.valid());
        chunk.invalid().iter().for_each(|byte| shown.push_str(&format!("\\x{byte:02x}")));
    }
    shown
}

/// Of changes of the configuration: the items, what is done with them, and the names of keys; never a value.
fn edits(value: &Value, most: Most) -> Value {
    let edit = |edit: &Value| {
        let text = |name: &str| edit.get(name).and_then(Value::as_str).map(|text| Value::from(bounded(text, most.text)));
        let keys: Vec<Value> = edit
            .get("values")
            .and_then(Value::as_object)
            .map(|map| map.keys().map(|key| key.as_str().into()).collect())
            .unwrap_or_default();
        let keys =
            (!keys.is_empty()).then(|| list(&keys, most, |key| bounded(key.as_str().unwrap_or_default(), most.text.min(256)).into()));
        let named = [("item", text("item")), ("change", text("change")), ("keys", keys)];
        Value::Object(named.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect())
    };
    value.as_array().map_or_else(|| Value::Array(Vec::new()), |values| list(values, most, edit))
}

/// Who may go on where the log cannot be written: somebody must be able to restore, and to make room.
fn goes_on(uid: u32) -> bool {
    is_owner(uid)
}

impl Control {
    /// Writes a call down before anything is done, and whether it is permitted. An error: it cannot be written, and nothing must be done.
    pub(super) async fn record(
        &self,
        peer: &Peer,
        name: &str,
        deed: &'static Deed,
        call: &Call,
        permitted: &Result<()>,
    ) -> Result<Recorded> {
        let entry = AuditEntry {
            user: name.to_owned(),
            uid: Some(peer.uid),
            login: peer.process.login.clone(),
            pid: peer.pid,
            command: peer.process.command.clone(),
            origin: peer.process.origin.clone(),
            action: deed.method.rsplit('.').next().unwrap_or_default().to_owned(),
            right: deed.right.map(|right| right.word().to_owned()),
            on: about(call.parameters.as_ref()),
            ..AuditEntry::default()
        };
        let refusals = self.app.refusals.clone();
        let is_written = match deed.method {
            // A part of an import comes in pieces.
            UploadImport::NAME => permitted.is_ok() && refusals.begins_upload(&entry.on),
            _ => deed.audited != Audited::No,
        };
        let goes_on = goes_on(peer.uid);
        let open = Open { ledger: self.app.ledger.clone(), refusals, deed, entry, begun: None, is_written, goes_on };
        if let Err(fault) = permitted {
            // What is not there, or must wait, was not refused. All of it is counted alike.
            let result = if fault.error == errors::NOT_PERMITTED { AuditResult::Refused } else { AuditResult::Failed };
            if result == AuditResult::Failed && deed.audited == Audited::No {
                return Ok(Recorded(None));
            }
            let entry = AuditEntry { result, message: Some(words(fault)), ..open.entry.clone() };
            open.refused(entry).await;
            return Ok(Recorded(None));
        }
        if !is_written {
            return Ok(Recorded(Some(open)));
        }
        open.ledger.audited_calls().fetch_add(1, Ordering::AcqRel);
        // From here on whatever becomes of it is written down, also when the caller goes.
        let mut recorded = Recorded(Some(open));
        let Some(open) = &mut recorded.0 else { return Ok(recorded) };
        // One entry when it ended, unless it is doubtful whether that can be written.
        if is_look(deed) && !open.ledger.audit_misses() {
            return Ok(recorded);
        }
        let (ledger, begun) = (open.ledger.clone(), AuditEntry { result: AuditResult::Begun, ..open.entry.clone() });
        match tokio::task::spawn_blocking(move || ledger.audit(begun)).await.map_err(failed)? {
            Ok(entry) => open.begun = Some(entry.seq),
            Err(_) if goes_on => {}
            Err(e) => {
                open.is_over();
                recorded.0 = None;
                return Err(unwritten(&e));
            }
        }
        Ok(recorded)
    }

    pub(super) async fn list_audit(&self, p: list_audit::In, replies: &mut Replies<'_>) -> Result<list_audit::Out> {
        let wanted = Arc::new(Wanted::of(&p)?);
        let mut after = p.after.unwrap_or(0);
        if let Some(newest) = p.newest {
            let (ledger, wanted) = (self.app.ledger.clone(), wanted.clone());
            let begin = tokio::task::spawn_blocking(move || begin_of(&ledger, &wanted, newest)).await.map_err(failed)??;
            after = after.max(begin);
        }
        // Entries that this question itself leaves are not waited for.
        let (ledger, mut page, mut bytes) = (self.app.ledger.clone(), Vec::new(), 0);
        let (_, head) = tokio::task::spawn_blocking(move || ledger.audit_head()).await.map_err(failed)??;
        loop {
            let ledger = self.app.ledger.clone();
            let rows = tokio::task::spawn_blocking(move || ledger.audit_page(after)).await.map_err(failed)??;
            let Some(last) = rows.last().map(|row| row.seq) else { break };
            for entry in rows.iter().filter(|row| row.seq <= head.seq).map(|row| row.entry()).filter(|entry| wanted.is(entry)) {
                let len = serde_json::to_string(&entry).map_or(0, |text| text.len() + 1);
                if bytes + len > MAX_REPLY_BYTES {
                    if !replies.more() {
                        return Err(failed("the list is longer than one reply may be; ask with 'more', or for fewer entries"));
                    }
                    if !replies.send(&list_audit::Out { entries: std::mem::take(&mut page) }).await {
                        return Err(failed("the caller went away"));
                    }
                    bytes = 0;
                }
                bytes += len;
                page.push(entry);
            }
            if last >= head.seq {
                break;
            }
            after = last;
        }
        Ok(list_audit::Out { entries: page })
    }

    pub(super) async fn verify_audit(&self, p: verify_audit::In) -> Result<verify_audit::Out> {
        let verified = self.ask_runs(move |runs| runs.verify_audit(p.offline)).await?;
        Ok(verify_audit::Out { verified })
    }
}

/// Which entries somebody wants to see.
struct Wanted {
    since: Option<Timestamp>,
    until: Option<Timestamp>,
    user: Option<String>,
    action: Option<String>,
    result: Option<AuditResult>,
}

impl Wanted {
    fn of(p: &list_audit::In) -> Result<Self> {
        let time =
            |text: &Option<String>, name: &str| text.as_ref().map(|t| t.parse().map_err(|_| Fault::invalid_parameter(name))).transpose();
        Ok(Self {
            since: time(&p.since, "since")?,
            until: time(&p.until, "until")?,
            user: p.user.clone(),
            action: p.action.clone(),
            result: p.result,
        })
    }

    fn is(&self, entry: &AuditEntry) -> bool {
        let is_in_time = match entry.time.parse::<Timestamp>() {
            Ok(time) => self.since.is_none_or(|since| time >= since) && self.until.is_none_or(|until| time <= until),
            // One that cannot be read is always shown.
            Err(_) => true,
        };
        let is_by = |user: &String| {
            entry.user == *user || entry.login.as_ref() == Some(user) || entry.uid.is_some_and(|uid| uid.to_string() == *user)
        };
        is_in_time
            && self.user.as_ref().is_none_or(is_by)
            && self.action.as_ref().is_none_or(|action| entry.action.eq_ignore_ascii_case(action))
            && self.result.is_none_or(|result| entry.result == result)
    }
}

/// Behind which number the newest so many begin.
fn begin_of(ledger: &Ledger, wanted: &Wanted, newest: u64) -> Result<u64> {
    let (mut left, mut before) = (newest, u64::MAX);
    loop {
        if left == 0 {
            return Ok(before.saturating_sub(1));
        }
        let rows = ledger.audit_page_before(before)?;
        if rows.is_empty() {
            return Ok(0);
        }
        for row in rows {
            before = row.seq;
            if wanted.is(&row.entry()) {
                left -= 1;
                if left == 0 {
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn contents_and_secrets_stay_out() {
        let paths: Vec<Value> = (0..30).map(|n| json!({ "path": format!("files/{n}") })).collect();
        let parameters = json!({
            "job": "shop", "paths": paths, "data": "c2VjcmV0", "password": "hunter2", "private_keys": [1], "description": "x".repeat(9000), "labels": { "a": "b" },
            "edits": [{ "item": "job.shop", "change": "patch", "values": { "schedule": "@daily", "password": "hunter2" }, "text": "hunter2" }], "name": null, "tables": [],
        });
        let on = about(Some(&parameters));
        let text = serde_json::to_string(&on).unwrap();
        assert!(!text.contains("hunter2") && !text.contains("c2VjcmV0") && text.len() < 2000, "{text}");
        assert_eq!(on["not_kept"], json!(["data", "password", "private_keys"]));
        assert_eq!(on["edits"], json!([{ "item": "job.shop", "change": "patch", "keys": ["password", "schedule"] }]));
        assert_eq!((on["paths"][0].clone(), on["paths"][20].clone()), (json!("files/0"), json!("and 10 more")));
        assert!(!on.contains_key("name") && !on.contains_key("tables"));
    }

    #[test]
    fn paths_are_told_as_they_are_acted_on() {
        let path = |path: &str, bytes: &[u8]| json!({ "path": path, "base64": BASE64.encode(bytes) });
        let on = about(Some(&json!({ "path": path("files/harmless", b"files/etc/shadow") })));
        assert_eq!(on["path"], "files/etc/shadow");
        let on = about(Some(&json!({ "paths": [path("a\u{fffd}b", b"a\xffb\n"), { "path": "c", "base64": "?" }] })));
        assert_eq!(on["paths"], json!(["a\\xffb\n", "(a path whose base64 does not decode)"]));
        assert!(!on.contains_key("all_sha256"));
        // What is left out is bound by a hash.
        let many = |last: &str| {
            let edits: Vec<Value> =
                (0..30).map(|n| json!({ "item": format!("job.{n}"), "change": if n == 29 { last } else { "patch" } })).collect();
            about(Some(&json!({ "edits": edits })))
        };
        let (one, other) = (many("patch"), many("remove"));
        assert_eq!(one["edits"][20], "and 10 more");
        assert!(one["all_sha256"].as_str().is_some_and(|sum| sum.len() == 64) && one["all_sha256"] != other["all_sha256"]);
    }

    #[test]
    fn refusals_of_a_user_are_counted() {
        let refusals = Refusals::default();
        let entry = |uid, action: &str, pid| AuditEntry { uid: Some(uid), action: action.into(), pid: Some(pid), ..AuditEntry::default() };
        assert!(refusals.is_new(&entry(7, "A", 1)) && refusals.is_new(&entry(8, "A", 1)));
        assert!(!refusals.is_new(&entry(7, "B", 2)) && !refusals.is_new(&entry(7, "C", 3)));
        assert!(refusals.over(false).is_empty());
        let over = refusals.over(true);
        assert_eq!((over.len(), over[0].times, over[0].pid, over[0].on["methods"].clone()), (1, Some(2), Some(3), json!(["B", "C"])));
        assert!(refusals.is_new(&entry(7, "A", 4)));
        // However many users there are.
        let new = (1000..11_000).filter(|uid| refusals.is_new(&entry(*uid, "A", 1))).count();
        assert_eq!((new, refusals.over(true).len()), (MOST_REFUSED, 1));
    }

    #[test]
    fn what_somebody_looks_at_is_counted_from_some_number_on() {
        let refusals = Refusals::default();
        let entry = |uid| AuditEntry { uid: Some(uid), ..AuditEntry::default() };
        assert_eq!((0..10_000).filter(|_| refusals.untold(&entry(7)) == 0).count(), MOST_LOOKS as usize);
        assert!(refusals.untold(&entry(8)) == 0 && refusals.over(false).is_empty());
        let over = refusals.over(true);
        assert_eq!((over.len(), over[0].times), (1, Some(10_000 - u64::from(MOST_LOOKS))));
        let looks = [
            GetCoverage::NAME,
            ListEntries::NAME,
            DiffBackups::NAME,
            ShowItemText::NAME,
            ShowConfig::NAME,
            CheckConfig::NAME,
            PreviewConfig::NAME,
            ListAudit::NAME,
            VerifyAudit::NAME,
        ];
        assert!(crate::access::deed::ALL.iter().all(|deed| (deed.audited == Audited::Looks) == looks.contains(&deed.method)));
    }

    #[test]
    fn a_refusal_takes_little_room() {
        let long = "x".repeat(10_000);
        let on = json!({ "description": long, "paths": [long, long], "backup": "b".repeat(64), "job": "shop", "labels": { "a": long } });
        let kept = small(about(Some(&on)));
        assert!(serde_json::to_string(&kept).unwrap().len() <= MAX_REFUSED + 2, "{kept:?}");
        assert_eq!((kept["job"].as_str(), kept["backup"].as_str().map(str::len)), (Some("shop"), Some(64)));
    }

    #[test]
    fn root_alone_goes_on_without_a_log() {
        assert!(goes_on(0) && goes_on(rustix::process::geteuid().as_raw()) && !goes_on(4_000_000_000));
    }
}
