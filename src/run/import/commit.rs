//! What makes a backup of what was stored: its manifest, and the commit.

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use keepd_protocol::model::{BackupDetail, Level, Mark as Said, Outcome};
use minicbor::bytes::ByteArray;

use super::work::{Open, Work, failed, told};
use crate::archive::describe;
use crate::portable::{Head, Tail};
use crate::repository::writer::{self, Flushed};
use crate::repository::{self, Manifest, ManifestSource};
use crate::run::backup::{short, unhex};
use crate::run::live::Failure;
use crate::run::{catalogue, destination, names};

impl Work<'_> {
    /// Commits, and removes what it replaces; the backup's id.
    pub fn commit(
        &self,
        open: &Open,
        mut manifest: Manifest,
        flushed: &Flushed,
        replaced: Option<BackupDetail>,
    ) -> Result<String, Failure> {
        let (env, live, target, repository) = (self.env, self.live, &open.target, &open.repository);
        let newest = env.ledger.newest_in_chain(&target.name)?;
        manifest.repository = ByteArray::from(repository.raw_id());
        manifest.sequence = catalogue::next_sequence(&target.name, &env.ledger, newest.as_ref().map_or(0, |d| d.sequence))?;
        manifest.predecessor = newest.as_ref().and_then(|d| unhex(d.object())).map(ByteArray::from);
        (manifest.added_bytes, manifest.new_bytes) = (flushed.added_bytes, Some(flushed.new_bytes));
        if live.cancel.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        open.lease.check()?;
        live.step("Committing");
        let raw = writer::commit(repository, &manifest, flushed)?;
        destination::remember(&env.ledger, repository)?;
        let before = match &replaced {
            Some(old) => env.ledger.marks(&target.name, Some(&old.backup.id))?,
            None => Vec::new(),
        };
        let detail = catalogue::detail(&HEXLOWER.encode(&raw), &manifest);
        env.ledger.put_backup(&target.name, &detail)?;
        let id = detail.backup.id;
        live.update(|run| run.backup = Some(id.clone()));
        if let Some(old) = replaced {
            if old.backup.pinned {
                let said = repository::Mark::new(raw, Said::Pin.as_str(), Timestamp::now().to_string(), live.snapshot().by);
                catalogue::mark(repository, &target.name, &env.ledger, &said)?;
            }
            // The new one is committed: what fails now does not take that back.
            let removed = || -> Result<(), Failure> {
                if let Some(raw) = unhex(old.object()) {
                    repository.delete_manifest(&raw)?;
                }
                for mark in before {
                    if let Some(raw) = unhex(&mark.id) {
                        repository.delete_mark(&raw)?;
                    }
                    env.ledger.remove_mark(&target.name, &mark.id)?;
                }
                Ok(())
            };
            match removed() {
                Ok(()) => live.message(Level::Info, format!("it takes the place of backup {} at {}", short(&id), target.name)),
                Err(e) => {
                    live.message(Level::Error, format!("the backup is imported, but the one that it replaces could not be removed: {e}"))
                }
            }
        }
        live.message(
            Level::Info,
            format!("backup {} of job {} imported to {}: {}", short(&id), manifest.job, target.name, told(&self.counts)),
        );
        Ok(id)
    }
}

/// As the configuration has it.
pub fn is_source_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && name.len() <= 255 && !name.contains('/') && !name.chars().any(char::is_control)
}

/// What no backup can be made of is told before anything is read; how the head is bounded was seen when it was read.
pub fn check_head(head: &Head, job: &str) -> Result<(), Failure> {
    let wrong = |text: String| failed(format!("the archive is not imported: its manifest is not one that keepd makes: {text}"));
    if !crate::config::is_name(job) {
        return Err(wrong(format!("'{job}' is no name of a job")));
    }
    if let Some(source) = head.sources.iter().find(|s| !is_source_name(&s.name)) {
        return Err(wrong(format!("'{}' is no name of a source", source.name)));
    }
    if head.sources.is_empty() {
        return Err(wrong("it names no source".into()));
    }
    Ok(())
}

pub fn manifest(head: &Head, tail: Option<&Tail>, sources: Vec<ManifestSource>, notes: Vec<String>) -> Result<Manifest, Failure> {
    let origin = &head.origin;
    let outcome = tail.map_or(&origin.outcome, |t| &t.outcome);
    // What is no word that is known was not good.
    let outcome = outcome.parse::<Outcome>().unwrap_or(Outcome::Suspect);
    let mut messages = tail.map_or(&head.messages, |t| &t.messages).clone();
    messages.push((
        Level::Info.as_str().into(),
        format!("imported at {} from archive {}, made on {} by keepd {}", Timestamp::now(), head.archive, origin.host, head.keepd_version),
    ));
    messages.extend(notes.into_iter().map(|text| (Level::Info.as_str().into(), text)));
    Ok(Manifest {
        r#type: IMPORTED.into(),
        outcome: outcome.as_str().into(),
        sources,
        messages,
        origin: None,
        ..describe::manifest(head, tail, None, 0)
    })
}

/// The manifest of a foreign tar.
pub fn foreign_manifest(
    work: &Work<'_>,
    started: String,
    source: ManifestSource,
    users: Vec<(u32, String)>,
    groups: Vec<(u32, String)>,
) -> Manifest {
    let request = work.request;
    let now = Timestamp::now().to_string();
    let place = request.place.as_ref().map(|p| format!(" from {p}")).unwrap_or_default();
    Manifest {
        format: 1,
        repository: ByteArray::from([0; 16]),
        sequence: 0,
        predecessor: None,
        job: request.job.clone().unwrap_or_default(),
        run: work.live.id(),
        started,
        finished: now.clone(),
        r#type: IMPORTED.into(),
        outcome: Outcome::Good.as_str().into(),
        name: request.name.clone(),
        labels: request.labels.clone().into_iter().collect(),
        host: names::host(),
        keepd_version: env!("CARGO_PKG_VERSION").into(),
        sources: vec![source],
        users,
        groups,
        messages: vec![(Level::Info.as_str().into(), format!("imported at {now}{place}, of a tar archive that keepd did not make"))],
        left_out: 0,
        added_bytes: 0,
        new_bytes: None,
        parent: None,
        origin: None,
        description: request.description.clone(),
        version: None,
        schema_version: None,
    }
}

const IMPORTED: &str = "imported";
