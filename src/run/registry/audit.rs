//! What runs leave in the audit log, and the log's head at the destinations that they wrote to.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::SignedDuration;
use keepd_protocol::audit::{AuditEntry, AuditResult, AuditVerified, PublishedHead};
use keepd_protocol::model::{Level, Run, RunKind, RunState};
use serde_json::json;

use super::{Result, Runs, Work};
use crate::ledger::Ledger;
use crate::ledger::audit::{HEAD_FILE, KEEPD, by_keepd, on};
use crate::run::live::LiveRun;
use crate::run::{audit, config_backup};

const RETAIN_EVERY: Duration = Duration::from_secs(86_400);
const CONFIG_NOTE: &str = "configuration that the audit log knows";

/// Where a run wrote, so that the head belongs there.
pub(super) fn written_to(work: &Work, live: &LiveRun) -> Vec<String> {
    match work.kind {
        RunKind::Backup => live.snapshot().destination.into_iter().collect(),
        RunKind::Copy | RunKind::Prune | RunKind::Delete | RunKind::Retention | RunKind::Key | RunKind::Import => work.destinations.clone(),
        _ => Vec::new(),
    }
}

/// How a run ended, as an entry of the log.
fn ended(run: &Run, begun: Option<AuditEntry>) -> AuditEntry {
    let result = match run.state {
        RunState::Good | RunState::Partial | RunState::Suspect => AuditResult::Done,
        _ => AuditResult::Failed,
    };
    let by_itself = run.by.is_empty() || run.by == "schedule";
    let mut entry = AuditEntry {
        on: on([
            ("kind", json!(run.kind)),
            ("state", json!(run.state)),
            ("job", json!(run.job)),
            ("destination", json!(run.destination)),
            ("backup", json!(run.backup)),
            ("safety", json!(run.safety)),
        ]),
        run: Some(run.id.clone()),
        message: run.error.clone(),
        ..by_keepd("run", result)
    };
    match begun {
        Some(call) => {
            entry.begun = Some(call.begun.unwrap_or(call.seq));
            (entry.user, entry.uid, entry.login) = (call.user, call.uid, call.login);
        }
        None if !by_itself => entry.user.clone_from(&run.by),
        None => entry.user = KEEPD.into(),
    }
    entry
}

fn write_end(ledger: &Ledger, run: &Run) {
    // What a calendar started was called by nobody.
    let begun = if run.by == "schedule" { None } else { ledger.audited_start(&run.id).ok().flatten() };
    // Whether it could be written is said by the ledger.
    let _ = ledger.audit(ended(run, begun));
}

impl Runs {
    /// Writes down how a run ended; the daemon does not stop before.
    pub fn audit_end(self: &Arc<Self>, run: &Run) {
        self.unwritten.fetch_add(1, Ordering::AcqRel);
        let (runs, run) = (self.clone(), run.clone());
        self.runtime.spawn_blocking(move || {
            write_end(&runs.ledger, &run);
            runs.unwritten.fetch_sub(1, Ordering::AcqRel);
        });
    }

    /// At the end of a run that wrote to destinations, before it counts as ended. What fails is a warning of the run.
    pub(super) fn publish_heads(&self, names: &[String], live: &LiveRun) {
        let env = self.environment();
        for target in names.iter().filter_map(|name| env.config.destinations.get(name)) {
            if let Err(e) = audit::publish(&env, target) {
                live.message(Level::Warning, format!("the head of the audit log could not be published at {}: {e}", target.name));
            }
        }
    }

    /// Proves the chain, and asks the destinations for what was published there, unless `offline`. Blocks.
    pub fn verify_audit(&self, offline: bool) -> Result<AuditVerified> {
        let env = self.environment();
        let proof = self.ledger.prove_audit()?;
        let (seq, differs) = self.ledger.audit_file_differs()?;
        let path = env.config.daemon.state_dir.join(HEAD_FILE).display().to_string();
        let mut heads =
            vec![PublishedHead { destination: path, seq, agrees: Some(differs.is_none()), message: differs, ..PublishedHead::default() }];
        if !offline {
            // A destination that does not answer takes its time; all together take that once.
            heads.extend(std::thread::scope(|scope| {
                let asked: Vec<_> =
                    env.config.destinations.values().map(|target| (target, scope.spawn(|| audit::compare(&env, target)))).collect();
                let told = |(target, answer): (&crate::config::Destination, std::thread::ScopedJoinHandle<'_, PublishedHead>)| {
                    let message = Some("asking it ended in a bug of keepd, see the log".to_owned());
                    answer.join().unwrap_or_else(|_| PublishedHead {
                        destination: target.name.clone(),
                        message,
                        ..PublishedHead::default()
                    })
                };
                asked.into_iter().map(told).collect::<Vec<_>>()
            }));
        }
        Ok(AuditVerified { first: proof.first, last: proof.last, head: proof.head, broken: proof.broken, problems: proof.problems, heads })
    }

    /// Removes what is older than `[audit]` keeps, once a day. Blocks.
    pub fn retain_audit(&self) -> Result<()> {
        if !self.begin_if_due("retention of the audit log", RETAIN_EVERY)? {
            return Ok(());
        }
        let keep = SignedDuration::try_from(self.config.get().audit.keep).unwrap_or(SignedDuration::MAX);
        let Ok(before) = crate::believed::now(&self.ledger)?.checked_sub(keep) else { return Ok(()) };
        match self.ledger.retain_audit(before)? {
            0 => {}
            n => tracing::info!("{n} entries of the audit log were older than it keeps, and were removed"),
        }
        Ok(())
    }

    /// Writes down that the configuration on disk is another one than the log knows. Blocks.
    pub fn audit_config(&self) {
        let Ok(texts) = config_backup::texts(&self.environment()) else { return };
        let digest = texts.digest();
        let before = match self.ledger.note(CONFIG_NOTE) {
            Ok(before) if before.as_deref() == Some(digest.as_str()) => return,
            Ok(before) => before,
            Err(_) => None,
        };
        let files: Vec<String> = texts.files.iter().take(20).map(|(path, _)| path.display().to_string()).collect();
        let entry = AuditEntry {
            on: on([("sha256", json!(digest)), ("before", json!(before)), ("files", json!(files))]),
            ..by_keepd("config_changed", AuditResult::Done)
        };
        if self.ledger.audit(entry).is_ok() {
            // Where that fails, it is said once more.
            let _ = self.ledger.set_note(CONFIG_NOTE, &digest);
        }
    }
}

/// Writes down what a rule removed.
pub fn removed(ledger: &Ledger, job: &str, destination: &str, backup: &str, run: &str) {
    // `run` is for calls that started one.
    let _ = ledger.audit(AuditEntry {
        on: on([("job", json!(job)), ("destination", json!(destination)), ("backup", json!(backup)), ("run", json!(run))]),
        ..by_keepd("removed", AuditResult::Done)
    });
}
