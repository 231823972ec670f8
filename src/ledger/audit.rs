//! The audit log: who did what, as a chain of hashes in the ledger.
//!
//! Every entry's hash is taken over the hash before it and the entry's exact text, so that nothing can be changed, removed or put in without all hashes
//! behind it becoming others. The chain begins with a random id, the log's instance. Its newest hash, the head, is also kept in the file `audit-head`
//! of the state directory and published elsewhere (`run/audit`): whoever can write the ledger can make a new chain, and cannot make it fit those.
//! `docs/audit.md` says what that proves and what not.

use std::io::Write;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use keepd_protocol::audit::{AuditEntry, AuditResult, BrokenLink};
use keepd_protocol::model::escape;
use rusqlite::{Connection, OptionalExtension, Row, TransactionBehavior, params};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::{Ledger, LedgerError, Result, to_json};

/// The newest hash, beside the ledger.
pub const HEAD_FILE: &str = "audit-head";
/// What the daemon does by itself is done by this user.
pub const KEEPD: &str = "keepd";

const DOMAIN: &[u8] = b"keepd audit entry 1\0";
const MAX_WORD: usize = 256;
const MAX_COMMAND: usize = 1 << 10;
const MAX_MESSAGE: usize = 1 << 10;
pub const MAX_ON: usize = 4 << 10;
/// Said of a value that is left out.
const TOO_LONG: &str = "(too long to be kept)";
/// What an entry cannot do without: what was acted on. Whatever else there is makes room for it.
pub const ACTED_ON: &[&str] = &[
    "job",
    "backup",
    "run",
    "import",
    "item",
    "destination",
    "slot",
    "profile",
    "a",
    "b",
    "database",
    "target",
    "user",
    "path",
    "source",
    "sources",
    "paths",
    "tables",
    "edits",
    "items",
    "destinations",
    "backups",
    "all_sha256",
];
/// The file is written at most so often: the ledger alone is the proof, and the file what it is compared with.
const HEAD_EVERY: Duration = Duration::from_secs(1);
/// Problems of a log that a verification names.
const MOST_PROBLEMS: usize = 20;
/// Entries that are in memory at once.
const PAGE: u32 = 500;
/// Entries that retention removes in one transaction.
const PIECE: usize = 10_000;

/// `run` is there to be looked for, and is no part of the chain.
pub(super) const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS audit (seq INTEGER PRIMARY KEY, json TEXT NOT NULL, hash BLOB NOT NULL, run TEXT);
    CREATE INDEX IF NOT EXISTS audit_run ON audit (run) WHERE run IS NOT NULL;
    CREATE TABLE IF NOT EXISTS audit_base (one INTEGER PRIMARY KEY CHECK (one = 0), seq INTEGER NOT NULL, hash BLOB NOT NULL, instance BLOB NOT NULL);";

type Hash = [u8; 32];

/// A place in the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub seq: u64,
    pub hash: Hash,
}

/// What the daemon knows of the log while it runs.
#[derive(Debug, Default)]
pub(super) struct Chain {
    known: Option<Known>,
    /// Entries that could not be written since the last one that could, and why the last of them could not.
    missing: u64,
    why: String,
    /// When the file was written last; `is_behind`: not with the newest head.
    written: Option<Instant>,
    is_behind: bool,
}

#[derive(Debug, Clone)]
struct Known {
    head: Head,
    instance: Hash,
    /// What is wrong with the log that was found, to be said in it.
    problem: Option<String>,
}

/// As it stands in the table, believed in nothing.
#[derive(Debug, Clone)]
pub struct Stored {
    pub seq: u64,
    pub text: Vec<u8>,
    pub hash: Vec<u8>,
}

/// The chain from its first kept entry to its last.
#[derive(Debug, Clone, Default)]
pub struct Proof {
    /// Of the first entry that is still here; one more than `last` where there is none.
    pub first: u64,
    pub last: u64,
    pub head: String,
    pub broken: Option<BrokenLink>,
    /// What entries say was wrong with the log when it was found.
    pub problems: Vec<BrokenLink>,
}

#[derive(Debug, Serialize, Deserialize)]
struct HeadFile {
    instance: String,
    seq: u64,
    hash: String,
}

impl Stored {
    /// The entry; one that cannot be read says so.
    pub fn entry(&self) -> AuditEntry {
        let hash = HEXLOWER.encode(&self.hash);
        match serde_json::from_slice::<AuditEntry>(&self.text) {
            Ok(entry) => AuditEntry { hash, ..entry },
            Err(e) => AuditEntry {
                seq: self.seq,
                action: "unreadable".into(),
                result: AuditResult::Failed,
                message: Some(format!("this entry is not as keepd wrote it: {e}")),
                hash,
                ..AuditEntry::default()
            },
        }
    }
}

/// An entry of what keepd does by itself.
pub fn by_keepd(action: &str, result: AuditResult) -> AuditEntry {
    AuditEntry { user: KEEPD.into(), action: action.into(), result, ..AuditEntry::default() }
}

/// Names and values for an entry's `on`.
pub fn on<const N: usize>(values: [(&str, Value); N]) -> Map<String, Value> {
    values.into_iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name.to_owned(), value)).collect()
}

/// At most `max` bytes of a text; what was cut off is shown by three dots.
pub fn bounded(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let end = (0..=max.saturating_sub(3)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    format!("{}…", text.get(..end).unwrap_or_default())
}

fn bound(entry: &mut AuditEntry) {
    let word = |text: &mut String| *text = bounded(text, MAX_WORD);
    word(&mut entry.user);
    word(&mut entry.action);
    for text in [&mut entry.login, &mut entry.origin, &mut entry.right, &mut entry.run].into_iter().flatten() {
        word(text);
    }
    if let Some(command) = &mut entry.command {
        *command = bounded(command, MAX_COMMAND);
    }
    if let Some(message) = &mut entry.message {
        *message = bounded(message, MAX_MESSAGE);
    }
    let length = |value: &Value| serde_json::to_string(value).map_or(usize::MAX, |text| text.len());
    let is_long = |on: &Map<String, Value>| on.iter().map(|(name, value)| name.len() + 4 + length(value)).sum::<usize>() > MAX_ON;
    while is_long(&entry.on) {
        let is_first = |name: &str, long: usize| !ACTED_ON.contains(&name) && (long > TOO_LONG.len() + 2 || name.len() > MAX_WORD);
        let sizes = || entry.on.iter().map(|(name, value)| (name, name.len() + length(value), length(value)));
        let longest = sizes()
            .filter(|(name, _, long)| is_first(name, *long))
            .max_by_key(|(_, all, _)| *all)
            .or_else(|| sizes().max_by_key(|(_, all, _)| *all))
            .map(|(name, _, long)| (name.clone(), long));
        match longest {
            Some((name, long)) if name.len() <= MAX_WORD && long > TOO_LONG.len() + 2 => match entry.on.get_mut(&name) {
                Some(Value::Array(list)) if list.len() > 2 => shorten(list),
                Some(value) => *value = TOO_LONG.into(),
                None => break,
            },
            Some((name, _)) => drop(entry.on.remove(&name)),
            None => break,
        }
    }
}

/// Takes half of a list away, and says how many are not there.
fn shorten(list: &mut Vec<Value>) {
    let said = list.last().and_then(Value::as_str).and_then(|text| text.strip_prefix("and ")?.strip_suffix(" more")?.parse::<usize>().ok());
    if said.is_some() {
        list.pop();
    }
    let kept = list.len() / 2;
    let gone = list.len() - kept + said.unwrap_or(0);
    list.truncate(kept);
    list.push(format!("and {gone} more").into());
}

fn hash_of(before: &[u8], text: &[u8]) -> Hash {
    let mut hash = Sha256::new();
    hash.update(DOMAIN);
    hash.update(before);
    hash.update(text);
    hash.finalize().into()
}

fn stored(row: &Row<'_>) -> rusqlite::Result<Stored> {
    // Whatever stands there, of whatever type: that is told, and is no error of the question.
    let bytes = |at: usize| row.get_ref(at).map(|value| value.as_bytes().map(<[u8]>::to_vec).unwrap_or_default());
    Ok(Stored { seq: row.get::<_, i64>(0)?.try_into().unwrap_or(0), text: bytes(1)?, hash: bytes(2)? })
}

fn as_hash(bytes: &[u8]) -> Hash {
    // Of another length only where somebody else wrote it; then nothing fits it.
    bytes.try_into().unwrap_or_else(|_| hash_of(b"no hash", bytes))
}

fn signed(seq: u64) -> i64 {
    i64::try_from(seq).unwrap_or(i64::MAX)
}

/// The base of the chain: the last entry that was removed (or the beginning), its hash, and the instance. Made where there is none.
fn base(db: &Connection) -> rusqlite::Result<(Head, Hash)> {
    let found = db
        .query_row("SELECT seq, hash, instance FROM audit_base WHERE one = 0", [], |row| {
            let seq: i64 = row.get(0)?;
            Ok((seq, row.get::<_, Vec<u8>>(1)?, row.get::<_, Vec<u8>>(2)?))
        })
        .optional()?;
    if let Some((seq, hash, instance)) = found {
        return Ok((Head { seq: seq.try_into().unwrap_or(0), hash: as_hash(&hash) }, as_hash(&instance)));
    }
    let instance: Hash = crate::crypto::random().map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))?;
    db.execute("INSERT INTO audit_base (one, seq, hash, instance) VALUES (0, 0, ?1, ?1)", [&instance[..]])?;
    Ok((Head { seq: 0, hash: instance }, instance))
}

fn row_at(db: &Connection, seq: u64) -> rusqlite::Result<Option<Stored>> {
    db.prepare_cached("SELECT seq, json, hash FROM audit WHERE seq = ?1")?.query_row([signed(seq)], stored).optional()
}

fn last_row(db: &Connection) -> rusqlite::Result<Option<Stored>> {
    db.prepare_cached("SELECT seq, json, hash FROM audit ORDER BY seq DESC LIMIT 1")?.query_row([], stored).optional()
}

/// Where the log goes on, with what the file says: what was cut off, set back or made anew stays a broken link for ever.
fn known(db: &Connection, file: Option<HeadFile>) -> rusqlite::Result<Known> {
    let (base, instance) = base(db)?;
    let last = last_row(db)?.map_or(base, |row| Head { seq: row.seq, hash: as_hash(&row.hash) });
    let mut known = Known { head: last, instance, problem: None };
    let Some(file) = file else {
        if last.seq > 0 {
            known.problem = Some(format!(
                "{HEAD_FILE} is missing from the state directory: whether the log ended at entry {} cannot be told",
                last.seq
            ));
        }
        return Ok(known);
    };
    let hash = HEXLOWER.decode(file.hash.as_bytes()).map(|hash| as_hash(&hash)).unwrap_or_default();
    if file.instance != HEXLOWER.encode(&instance) {
        known.problem = Some(format!(
            "{HEAD_FILE} is of another log, {}, that had {} entries; its hash was {}: the ledger was exchanged or begun anew",
            bounded(&escape(&file.instance), 16),
            file.seq,
            bounded(&escape(&file.hash), 64)
        ));
        // A log that is not new must not look whole.
        if last.seq > 0 {
            known.head.hash = hash;
        }
        return Ok(known);
    }
    let there = match file.seq {
        seq if seq == base.seq => Some(base.hash),
        seq => row_at(db, seq)?.map(|row| as_hash(&row.hash)),
    };
    if file.seq < base.seq || there == Some(hash) {
        return Ok(known);
    }
    known.problem = Some(match there {
        Some(_) => format!("entry {} is not the one that {HEAD_FILE} names: the log was changed while keepd did not run", file.seq),
        None => {
            format!("the log ends at entry {}, and {HEAD_FILE} says that there were {}: it was cut off or set back", last.seq, file.seq)
        }
    });
    known.head = Head { seq: last.seq.max(file.seq), hash };
    Ok(known)
}

/// Puts entries behind the head; what they became.
fn put(db: &mut Connection, known: &Known, entries: &mut [AuditEntry]) -> rusqlite::Result<Head> {
    let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let mut head = known.head;
    // Whoever wrote entries of their own behind ours did not have our head: nothing will fit.
    if let Some(last) = last_row(&tx)?.filter(|last| last.seq > head.seq) {
        head.seq = last.seq;
    }
    for entry in entries {
        head.seq += 1;
        entry.seq = head.seq;
        entry.hash = String::new();
        let text = serde_json::to_string(entry).map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))?;
        head.hash = hash_of(&head.hash, text.as_bytes());
        entry.hash = HEXLOWER.encode(&head.hash);
        tx.prepare_cached("INSERT INTO audit (seq, json, hash, run) VALUES (?1, ?2, ?3, ?4)")?.execute(params![
            signed(head.seq),
            text,
            &head.hash[..],
            entry.run
        ])?;
    }
    tx.commit()?;
    Ok(head)
}

fn read_head(directory: &Path) -> Option<HeadFile> {
    let text = std::fs::read(directory.join(HEAD_FILE)).ok()?;
    Some(serde_json::from_slice(&text).unwrap_or(HeadFile { instance: "(unreadable)".into(), seq: 0, hash: String::new() }))
}

fn write_head(directory: &Path, known: &Known) -> std::io::Result<()> {
    let file = HeadFile { instance: HEXLOWER.encode(&known.instance), seq: known.head.seq, hash: HEXLOWER.encode(&known.head.hash) };
    let mut new = tempfile::Builder::new().prefix(".audit-head-").tempfile_in(directory)?;
    new.write_all(serde_json::to_string(&file)?.as_bytes())?;
    new.as_file().sync_all()?;
    new.persist(directory.join(HEAD_FILE)).map_err(|e| e.error)?;
    std::fs::File::open(directory)?.sync_all()
}

fn tell(entry: &AuditEntry) {
    let (user, action, result) = (escape(&entry.user), escape(&entry.action), word(entry.result));
    let head = entry.hash.get(..16).unwrap_or_default();
    tracing::info!(target: "keepd::audit", seq = entry.seq, head, user, action, result, "audit: {user}: {action}: {result}");
}

/// As on the wire.
pub fn word(result: AuditResult) -> &'static str {
    match result {
        AuditResult::Begun => "begun",
        AuditResult::Refused => "refused",
        AuditResult::Done => "done",
        AuditResult::Failed => "failed",
    }
}

impl Ledger {
    fn chain(&self) -> MutexGuard<'_, Chain> {
        self.audit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn directory(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    fn known(&self, chain: &mut Chain) -> Result<Known> {
        if let Some(known) = &chain.known {
            return Ok(known.clone());
        }
        let file = read_head(self.directory());
        let known = self.run_sql(|db| known(db, file))?;
        if let Some(problem) = &known.problem {
            tracing::error!("the audit log: {problem}");
        }
        chain.known = Some(known.clone());
        Ok(known)
    }

    /// Writes an entry behind the last; gives it with its number, time and hash. An error was logged, and is counted: the next entry that can be written is
    /// preceded by one that says how many are missing.
    pub fn audit(&self, entry: AuditEntry) -> Result<AuditEntry> {
        let mut chain = self.chain();
        let action = entry.action.clone();
        match self.append(&mut chain, vec![entry]) {
            Ok(entry) => {
                self.audit_misses.store(false, Ordering::Release);
                Ok(entry)
            }
            Err(e) => {
                self.audit_misses.store(true, Ordering::Release);
                chain.missing += 1;
                chain.why = e.to_string();
                tracing::error!("the audit log could not be written ({}): {e}", escape(&action));
                Err(e)
            }
        }
    }

    fn append(&self, chain: &mut Chain, entries: Vec<AuditEntry>) -> Result<AuditEntry> {
        let known = self.known(chain)?;
        let mut all = Vec::new();
        if let Some(problem) = &known.problem {
            all.push(AuditEntry { message: Some(problem.clone()), ..by_keepd("log_problem", AuditResult::Failed) });
        }
        if chain.missing > 0 {
            all.push(AuditEntry {
                on: on([("entries", chain.missing.into())]),
                message: Some(format!("before this one {} entries could not be written: {}", chain.missing, chain.why)),
                ..by_keepd("log_missing", AuditResult::Failed)
            });
        }
        all.extend(entries);
        let now = Timestamp::now().to_string();
        for entry in &mut all {
            entry.time.clone_from(&now);
            bound(entry);
        }
        let head = self.run_sql(|db| put(db, &known, &mut all))?;
        let known = Known { head, problem: None, ..known };
        *chain = Chain { known: Some(known), is_behind: true, written: chain.written, ..Chain::default() };
        // Behind the ledger by some entries it still proves those before.
        if chain.written.is_none_or(|since| since.elapsed() >= HEAD_EVERY) {
            self.write_known(chain);
        }
        if chain.is_behind {
            self.head_behind.notify_one();
        }
        all.iter().for_each(tell);
        all.pop().ok_or_else(|| LedgerError::Failed("nothing was to be written".into()))
    }

    fn write_known(&self, chain: &mut Chain) {
        let Some(known) = &chain.known else { return };
        match write_head(self.directory(), known) {
            Ok(()) => chain.is_behind = false,
            Err(e) => tracing::warn!("{} could not be written: {e}", self.directory().join(HEAD_FILE).display()),
        }
        chain.written = Some(Instant::now());
    }

    /// Whether the last entry could not be written.
    pub fn audit_misses(&self) -> bool {
        self.audit_misses.load(Ordering::Acquire)
    }

    /// Writes the newest head into its file, where that has an older one. Blocks.
    pub fn write_audit_head(&self) {
        let mut chain = self.chain();
        if chain.is_behind {
            self.write_known(&mut chain);
        }
        // It could not be: once more later.
        if chain.is_behind {
            self.head_behind.notify_one();
        }
    }

    /// Waits until the file with the head has an older one, or had since this was asked last.
    pub async fn head_is_behind(&self) {
        self.head_behind.notified().await;
    }

    /// Calls that may still write an entry with a run that they started.
    pub fn audited_calls(&self) -> &std::sync::atomic::AtomicUsize {
        &self.audited_calls
    }

    /// The call that started a run, by any of its entries that names it. Waits a little where a call is not written down yet.
    pub fn audited_start(&self, run: &str) -> Result<Option<AuditEntry>> {
        let sql = "SELECT seq, json, hash FROM audit WHERE run = ?1 ORDER BY seq LIMIT 1";
        for _ in 0..20 {
            if let Some(found) = self.run_sql(|db| db.prepare_cached(sql)?.query_row([run], stored).optional())? {
                return Ok(Some(found.entry()));
            }
            if self.audited_calls.load(Ordering::Acquire) == 0 {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        // The last call may have been written between the two looks.
        Ok(self.run_sql(|db| db.prepare_cached(sql)?.query_row([run], stored).optional())?.map(|found| found.entry()))
    }

    /// The id of this log, and its newest entry.
    pub fn audit_head(&self) -> Result<(Hash, Head)> {
        let known = self.known(&mut self.chain())?;
        Ok((known.instance, known.head))
    }

    /// Entries behind `after`, oldest first, a bounded number.
    pub fn audit_page(&self, after: u64) -> Result<Vec<Stored>> {
        let sql = "SELECT seq, json, hash FROM audit WHERE seq > ?1 ORDER BY seq LIMIT ?2";
        self.run_sql(|db| db.prepare_cached(sql)?.query_map(params![signed(after), PAGE], stored)?.collect())
    }

    /// Entries before `before`, newest first, a bounded number.
    pub fn audit_page_before(&self, before: u64) -> Result<Vec<Stored>> {
        let sql = "SELECT seq, json, hash FROM audit WHERE seq < ?1 ORDER BY seq DESC LIMIT ?2";
        self.run_sql(|db| db.prepare_cached(sql)?.query_map(params![signed(before), PAGE], stored)?.collect())
    }

    /// The hash of an entry, in hexadecimal; None for one that is not here.
    pub fn audit_hash(&self, seq: u64) -> Result<Option<String>> {
        self.run_sql(|db| {
            let (base, _) = base(db)?;
            match base.seq == seq {
                true => Ok(Some(HEXLOWER.encode(&base.hash))),
                false => Ok(row_at(db, seq)?.map(|row| HEXLOWER.encode(&row.hash))),
            }
        })
    }

    /// Walks the whole chain; memory does not depend on its length.
    pub fn prove_audit(&self) -> Result<Proof> {
        loop {
            let (_, until) = self.audit_head()?;
            let (begin, _) = self.run_sql(|db| base(db))?;
            let proof = self.walk(begin, until)?;
            // Not when retention took entries away on the way.
            if self.run_sql(|db| base(db))?.0 == begin {
                return Ok(proof);
            }
        }
    }

    fn walk(&self, base: Head, until: Head) -> Result<Proof> {
        let mut proof = Proof { first: base.seq.saturating_add(1), last: base.seq, head: HEXLOWER.encode(&base.hash), ..Proof::default() };
        let mut before = base;
        let mut is_bound = base.seq == 0;
        let stray = "SELECT count(*) FROM audit WHERE seq <= ?1";
        if self.run_sql(|db| db.query_row(stray, [signed(base.seq)], |row| row.get::<_, i64>(0)))? > 0 {
            let why = format!(
                "entries stand before it that were removed, or never were; the first that counts is {}",
                base.seq.saturating_add(1)
            );
            proof.broken = Some(BrokenLink { seq: base.seq, why });
        }
        loop {
            let page = self.audit_page(before.seq)?;
            let Some(end) = page.last().map(|row| Head { seq: row.seq, hash: as_hash(&row.hash) }) else { break };
            for row in page {
                if proof.broken.is_none() {
                    proof.broken = broken(&before, &row).map(|(seq, why)| BrokenLink { seq, why });
                }
                is_bound = is_bound || vouches(&row, &base);
                if proof.problems.len() < MOST_PROBLEMS {
                    proof.problems.extend(problem(&row));
                }
                before = Head { seq: row.seq, hash: as_hash(&row.hash) };
            }
            (proof.last, proof.head) = (end.seq, HEXLOWER.encode(&end.hash));
        }
        if proof.broken.is_none() && before.seq < until.seq {
            let why = format!("the log ends before it; this keepd wrote entries up to {}", until.seq);
            proof.broken = Some(BrokenLink { seq: before.seq.saturating_add(1), why });
        }
        if proof.broken.is_none() && before.seq == until.seq && before.hash != until.hash {
            proof.broken = Some(BrokenLink { seq: before.seq, why: "it is not the entry that this keepd wrote".into() });
        }
        if proof.broken.is_none() && !is_bound {
            let why = format!("no entry says that those up to {} were removed because they were old", base.seq);
            proof.broken = Some(BrokenLink { seq: base.seq.saturating_add(1), why });
        }
        Ok(proof)
    }

    /// Removes entries that are older than `before`, oldest first; how many. An entry says which, and binds the rest of the chain.
    ///
    /// A clock that was wrong when entries were written, or is now, takes no more away than is as old by the newest entry.
    pub fn retain_audit(&self, before: Timestamp) -> Result<u64> {
        let keep = Timestamp::now().duration_since(before);
        let newest = self.run_sql(|db| last_row(db))?.and_then(|row| row.entry().time.parse::<Timestamp>().ok());
        let before = newest.and_then(|newest| newest.checked_sub(keep).ok()).map_or(before, |by_newest| before.min(by_newest));
        let mut removed = 0;
        loop {
            let piece = self.retain_piece(before)?;
            removed += piece;
            if piece < PIECE as u64 {
                return Ok(removed);
            }
        }
    }

    fn retain_piece(&self, before: Timestamp) -> Result<u64> {
        let (base, _) = self.run_sql(|db| base(db))?;
        let (mut last, mut count, mut from) = (base, 0, None);
        'pages: while count < PIECE as u64 {
            let page = self.audit_page(last.seq)?;
            if page.is_empty() {
                break;
            }
            for row in page {
                let time = row.entry().time.parse::<Timestamp>();
                // One that cannot be read goes with those around it, and never first.
                if count >= PIECE as u64 || time.as_ref().is_ok_and(|time| *time >= before) || (time.is_err() && from.is_none()) {
                    break 'pages;
                }
                from.get_or_insert(row.seq);
                last = Head { seq: row.seq, hash: as_hash(&row.hash) };
                count += 1;
            }
        }
        let Some(from) = from else { return Ok(0) };
        self.audit(AuditEntry {
            on: on([
                ("from", from.into()),
                ("to", last.seq.into()),
                ("entries", count.into()),
                ("hash", HEXLOWER.encode(&last.hash).into()),
                ("older_than", before.to_string().into()),
            ]),
            ..by_keepd("retention", AuditResult::Done)
        })?;
        self.run_sql(|db| {
            let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
            tx.execute("DELETE FROM audit WHERE seq <= ?1", [signed(last.seq)])?;
            tx.execute("UPDATE audit_base SET seq = ?1, hash = ?2 WHERE one = 0", params![signed(last.seq), &last.hash[..]])?;
            tx.commit()
        })?;
        Ok(count)
    }

    /// What this log says about the file beside it, for a verification: None where they agree.
    pub fn audit_file_differs(&self) -> Result<(u64, Option<String>)> {
        // Not while an entry is on its way into both.
        let mut chain = self.chain();
        let known = self.known(&mut chain)?;
        let path = self.directory().join(HEAD_FILE);
        let Some(file) = read_head(self.directory()) else { return Ok((0, Some(format!("{} is missing", path.display())))) };
        let differs = match () {
            () if file.instance != HEXLOWER.encode(&known.instance) => Some("it is of another log".to_owned()),
            () if file.seq > known.head.seq => Some(format!("it names entry {}, and the log ends at {}", file.seq, known.head.seq)),
            () if self.audit_hash(file.seq)?.is_some_and(|hash| hash != file.hash) => Some(format!("entry {} is another one", file.seq)),
            () => None,
        };
        Ok((file.seq, differs))
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.write_audit_head();
    }
}

/// What is wrong between an entry and the one before, and the number it is wrong at.
fn broken(before: &Head, row: &Stored) -> Option<(u64, String)> {
    let expected = before.seq.saturating_add(1);
    if row.seq > expected {
        let missing = match row.seq - expected {
            1 => "it is missing".to_owned(),
            n => format!("it and {} more are missing", n - 1),
        };
        return Some((expected, format!("{missing}: the next one here is {}", row.seq)));
    }
    match serde_json::from_slice::<AuditEntry>(&row.text) {
        Err(e) => return Some((row.seq, format!("its text cannot be read: {e}"))),
        Ok(entry) if entry.seq != row.seq => return Some((row.seq, format!("its text is that of entry {}", entry.seq))),
        Ok(_) => {}
    }
    match hash_of(&before.hash, &row.text)[..] == row.hash[..] {
        true => None,
        false => Some((row.seq, "its hash does not fit its text and the entry before".into())),
    }
}

/// What an entry says was wrong with the log.
fn problem(row: &Stored) -> Option<BrokenLink> {
    const WORD: &[u8] = b"\"log_problem\"";
    row.text.windows(WORD.len()).any(|window| window == WORD).then_some(())?;
    let entry = row.entry();
    let is_it = entry.action == "log_problem" && entry.user == KEEPD && entry.uid.is_none();
    is_it.then(|| BrokenLink { seq: row.seq, why: entry.message.unwrap_or_default() })
}

/// Whether an entry says that the chain goes on behind this base.
fn vouches(row: &Stored, base: &Head) -> bool {
    let entry = row.entry();
    entry.action == "retention"
        && entry.user == KEEPD
        && entry.on.get("to").and_then(Value::as_u64) == Some(base.seq)
        && entry.on.get("hash").and_then(Value::as_str) == Some(HEXLOWER.encode(&base.hash).as_str())
}

/// What an entry is as a line of JSON.
pub fn to_line(entry: &AuditEntry) -> Result<String> {
    to_json(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(dir: &Path, n: u64) -> Ledger {
        let ledger = Ledger::open(dir).unwrap();
        for at in 0..n {
            ledger.audit(AuditEntry { user: "anna".into(), uid: Some(1000), ..by_keepd(&format!("Do{at}"), AuditResult::Done) }).unwrap();
        }
        ledger
    }

    fn broken_at(ledger: &Ledger) -> (u64, String) {
        let broken = ledger.prove_audit().unwrap().broken.unwrap();
        (broken.seq, broken.why)
    }

    #[test]
    fn a_chain_is_proven_and_every_tampering_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = filled(dir.path(), 1200);
        let proof = ledger.prove_audit().unwrap();
        assert_eq!((proof.first, proof.last, proof.broken.is_none()), (1, 1200, true));
        assert_eq!(proof.head, ledger.audit_hash(1200).unwrap().unwrap());
        drop(ledger);
        let good = std::fs::read(dir.path().join("ledger.sqlite")).unwrap();
        let cases = [
            ("UPDATE audit SET json = replace(json, 'anna', 'otto') WHERE seq = 700", 700, "does not fit"),
            ("DELETE FROM audit WHERE seq BETWEEN 600 AND 602", 600, "it and 2 more are missing"),
            ("UPDATE audit SET json = x'00ff' WHERE seq = 9", 9, "cannot be read"),
            ("UPDATE audit SET hash = zeroblob(3) WHERE seq = 9", 9, "does not fit"),
            (
                "UPDATE audit SET seq = -1 WHERE seq = 5; UPDATE audit SET seq = 5 WHERE seq = 6; UPDATE audit SET seq = 6 WHERE seq = -1",
                5,
                "of entry 6",
            ),
            ("DELETE FROM audit WHERE seq > 1190", 1191, "it and 9 more are missing"),
            ("DELETE FROM audit", 1, "missing"),
            ("DELETE FROM audit; DELETE FROM audit_base", 1, ""),
            (
                "UPDATE audit_base SET seq = 3, hash = (SELECT hash FROM audit WHERE seq = 3); DELETE FROM audit WHERE seq <= 3",
                4,
                "no entry says",
            ),
        ];
        for (sql, seq, why) in cases {
            std::fs::write(dir.path().join("ledger.sqlite"), &good).unwrap();
            let head = std::fs::read(dir.path().join(HEAD_FILE)).unwrap();
            Connection::open(dir.path().join("ledger.sqlite")).unwrap().execute_batch(sql).unwrap();
            let ledger = Ledger::open(dir.path()).unwrap();
            let entry = ledger.audit(by_keepd("start", AuditResult::Done)).unwrap();
            if sql.contains("DELETE FROM audit_base") {
                let first = ledger.audit_page(0).unwrap()[0].entry();
                assert!(first.action == "log_problem" && first.message.as_ref().unwrap().contains("another log"), "{first:?}");
            } else {
                let (found, text) = broken_at(&ledger);
                assert!(found == seq && text.contains(why), "{sql}: {found}: {text}");
                assert!(entry.seq > 1200, "{sql}: numbers are never used twice");
            }
            drop(ledger);
            std::fs::write(dir.path().join(HEAD_FILE), head).unwrap();
        }
    }

    #[test]
    fn while_keepd_runs_a_cut_is_seen_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = filled(dir.path(), 10);
        ledger.run_sql(|db| db.execute_batch("DELETE FROM audit WHERE seq > 7")).unwrap();
        assert_eq!(broken_at(&ledger).0, 8);
        ledger.audit(by_keepd("start", AuditResult::Done)).unwrap();
        assert_eq!(broken_at(&ledger).0, 8);
        assert_eq!(ledger.audit_head().unwrap().1.seq, 11);
    }

    #[test]
    fn retention_keeps_it_provable() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = filled(dir.path(), 20);
        assert_eq!(ledger.retain_audit(Timestamp::UNIX_EPOCH).unwrap(), 0);
        let later = Timestamp::now().checked_add(jiff::SignedDuration::from_secs(5)).unwrap();
        assert_eq!(ledger.retain_audit(later).unwrap(), 20);
        let proof = ledger.prove_audit().unwrap();
        assert_eq!((proof.first, proof.last, proof.broken), (21, 21, None));
        ledger.audit(by_keepd("start", AuditResult::Done)).unwrap();
        drop(ledger);
        let ledger = Ledger::open(dir.path()).unwrap();
        assert_eq!(ledger.audit(by_keepd("start", AuditResult::Done)).unwrap().seq, 23);
        assert!(ledger.prove_audit().unwrap().broken.is_none());
        ledger.run_sql(|db| db.execute_batch("UPDATE audit_base SET hash = zeroblob(32)")).unwrap();
        assert_eq!(broken_at(&ledger).0, 21);
    }

    #[test]
    fn what_cannot_be_written_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = filled(dir.path(), 1);
        ledger.run_sql(|db| db.execute_batch("PRAGMA query_only = 1")).unwrap();
        for _ in 0..3 {
            assert!(ledger.audit(by_keepd("lost", AuditResult::Done)).is_err());
        }
        ledger.run_sql(|db| db.execute_batch("PRAGMA query_only = 0")).unwrap();
        assert_eq!(ledger.audit(by_keepd("back", AuditResult::Done)).unwrap().seq, 3);
        let said = ledger.audit_page(1).unwrap()[0].entry();
        assert_eq!((said.action.as_str(), said.on.get("entries").and_then(Value::as_u64)), ("log_missing", Some(3)));
    }

    #[test]
    fn entries_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        let long = "ü".repeat(100_000);
        let mut entry =
            AuditEntry { command: Some(long.clone()), message: Some(long.clone()), user: long.clone(), ..AuditEntry::default() };
        for at in 0..500 {
            entry.on.insert(format!("{at}{long}"), long.clone().into());
            entry.on.insert(format!("{at}"), at.into());
        }
        ledger.audit(entry).unwrap();
        assert!(ledger.audit_page(0).unwrap()[0].text.len() < 8 << 10);
        // What was acted on stays, whatever else there is.
        let paths: Vec<Value> = (0..21).map(|n| format!("files/{n}/{}", "x".repeat(240)).into()).collect();
        let mut entry = AuditEntry {
            on: on([("job", "shop".into()), ("paths", paths.into()), ("backup", "b".repeat(64).into())]),
            ..by_keepd("x", AuditResult::Done)
        };
        for name in ["label", "description", "policy"] {
            entry.on.insert(name.into(), "y".repeat(4000).into());
        }
        let entry = ledger.audit(entry).unwrap();
        assert_eq!(
            (entry.on["job"].as_str(), entry.on["backup"].as_str().map(str::len), entry.on["label"].as_str()),
            (Some("shop"), Some(64), Some(TOO_LONG))
        );
        let paths = entry.on["paths"].as_array().unwrap();
        assert!(
            paths.len() > 5 && paths[0].as_str().unwrap().starts_with("files/0/") && paths.last().unwrap() == "and 11 more",
            "{paths:?}"
        );
        let line = to_line(&ledger.audit_page(0).unwrap()[0].entry()).unwrap();
        let stored = String::from_utf8(ledger.audit_page(0).unwrap()[0].text.clone()).unwrap();
        let (text, _) = line.rsplit_once(",\"hash\":").unwrap();
        assert_eq!(format!("{text}}}"), stored, "whoever has the lines can prove the chain");
    }
}
