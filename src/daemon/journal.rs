//! What the daemon itself leaves in the audit log: its start and stop, and what signals asked for.

use std::sync::Arc;
use std::time::Duration;

use keepd_protocol::audit::{AuditEntry, AuditResult};
use serde_json::json;

use super::signals::Signal;
use crate::access::user_name;
use crate::control::origin::Process;
use crate::ledger::Ledger;
use crate::ledger::audit::{by_keepd, on};

/// Writes an entry on a thread that may block. Whether it could be written is said by the ledger.
pub async fn write(ledger: Arc<Ledger>, entry: impl FnOnce() -> AuditEntry + Send + 'static) {
    let _ = tokio::task::spawn_blocking(move || ledger.audit(entry())).await;
}

/// Keeps the file of the audit log's head not far behind the log.
pub async fn keep_head(ledger: Arc<Ledger>) {
    loop {
        ledger.head_is_behind().await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let ledger = ledger.clone();
        let _ = tokio::task::spawn_blocking(move || ledger.write_audit_head()).await;
    }
}

pub fn started() -> AuditEntry {
    AuditEntry {
        pid: i32::try_from(std::process::id()).ok(),
        on: on([("version", json!(env!("CARGO_PKG_VERSION"))), ("uid", json!(rustix::process::geteuid().as_raw()))]),
        ..by_keepd("start", AuditResult::Done)
    }
}

/// By whoever sent the signal.
fn asked(action: &str, result: AuditResult, signal: &Signal) -> AuditEntry {
    let mut entry = by_keepd(action, result);
    if let Some(uid) = signal.uid {
        let process = Process::of(signal.pid, uid, None);
        entry = AuditEntry {
            user: user_name(uid),
            uid: Some(uid),
            pid: signal.pid,
            login: process.login,
            command: process.command,
            origin: process.origin,
            ..entry
        };
    }
    entry.on = on([("signal", json!(signal.from.split(' ').next()))]);
    entry
}

pub fn reloaded(signal: &Signal, reloaded: Result<String, String>) -> AuditEntry {
    match reloaded {
        Ok(message) => AuditEntry { message: Some(message), ..asked("reload", AuditResult::Done, signal) },
        Err(problems) => AuditEntry { message: Some(problems), ..asked("reload", AuditResult::Failed, signal) },
    }
}

/// None: it stops because a part of it ended by itself.
pub fn stopped(by: Option<&Signal>) -> AuditEntry {
    match by {
        Some(signal) => asked("stop", AuditResult::Done, signal),
        None => {
            AuditEntry { message: Some("a part of keepd ended by itself, see the log".into()), ..by_keepd("stop", AuditResult::Failed) }
        }
    }
}
