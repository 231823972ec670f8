//! A backup into a destination of archives, streamed while it is captured.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use keepd_protocol::model::{BackupType, Level, Outcome};

use super::{capture, catalogue, open, upkeep};
use crate::archive::{ArchiveSink, Archives, Companion, describe};
use crate::config::{Destination, Job};
use crate::crypto;
use crate::portable::head::{Contents, Origin, Totals};
use crate::portable::{ArchiveWriter, Head, Made, PortableError, Tail, write};
use crate::run::backup::{Environment, ReaderGate};
use crate::run::live::{Failure, LiveRun};
use crate::run::registry::BackupRequest;
use crate::run::{catalogue as ledgered, names, outcome};
use crate::storage::stream::ObjectWriter;

/// Bytes at the end of an archive that are read back.
const END_BYTES: u64 = 64 << 10;

/// Backs a job up into a new archive of the destination, then retention there. Its outcome and its id.
pub fn backup(
    env: &Environment,
    job: &Job,
    target: &Destination,
    request: &BackupRequest,
    live: &LiveRun,
    gate: ReaderGate<'_>,
) -> Result<(Outcome, String), Failure> {
    live.step("opening the archives");
    live.update(|run| run.destination = Some(target.name.clone()));
    let place = open(env, target)?;
    place.storage.prepare()?;
    if !target.append_only
        && let swept @ 1.. = place.sweep()?
    {
        live.message(Level::Info, format!("{swept} objects were removed that an interrupted run left at {}", target.name));
    }
    for problem in catalogue::sync(&place, &env.ledger, &live.cancel)? {
        live.message(Level::Warning, problem);
    }
    let history = env.ledger.newest_good(&job.name, &target.name, outcome::HISTORY)?;
    live.update(|run| run.progress.total_bytes = history.first().map(|b| b.backup.bytes));
    let started = Timestamp::now();
    let mut name = place.free_name(&job.name, started)?.to_string();
    let head = head(job, request, &live.id(), started)?;
    let written = Arc::new(AtomicU64::new(0));
    let out = Counted { out: place.storage.writer(&name)?, written: written.clone() };
    let options =
        write::Options { packing: place.packing, seal: place.profile.as_ref(), work_dir: &place.work_dir, cancel: live.cancel.clone() };
    // A place that does not take it is the place's fault: the next one may.
    let unwritten = |e: PortableError| match e {
        PortableError::Io(e) => Failure::Storage(format!("destination {}: the archive cannot be written: {e}", target.name)),
        other => Failure::from(other),
    };
    let mut sink = ArchiveSink::new(ArchiveWriter::create(out, &options, &head, None).map_err(unwritten)?, live.cancel.clone());
    let captured = capture::capture(env, job, &mut sink, live)?;
    live.set_added(written.load(Ordering::Relaxed));
    live.tick();
    let snapshot = live.snapshot();
    let totals = Totals::of(&captured.sources);
    let mut tail = Tail {
        archive: head.archive.clone(),
        finished: Timestamp::now().to_string(),
        outcome: Outcome::Good.as_str().into(),
        sources: captured.sources,
        totals,
        users: names::users(&sink.users).into_iter().collect(),
        groups: names::groups(&sink.groups).into_iter().collect(),
        messages: snapshot.messages.iter().map(|m| (m.level.as_str().to_owned(), m.text.clone())).collect(),
        left_out: live.report.left_out_count(),
        version: captured.version,
        schema_version: captured.schema_version,
    };
    let mut reasons = captured.reasons;
    reasons.extend(outcome::judge(&ledgered::detail(&name, &describe::manifest(&head, Some(&tail), None, 0)), &history, &job.suspect));
    if !reasons.is_empty() {
        tail.outcome = Outcome::Suspect.as_str().into();
    }
    for reason in reasons {
        tail.messages.push((Level::Warning.as_str().to_owned(), format!("suspect: {reason}")));
        live.message(Level::Warning, format!("suspect: {reason}"));
    }
    if live.cancel.is_cancelled() {
        return Err(Failure::Cancelled);
    }
    live.step("storing");
    let (mut counted, made) = sink.finish(&tail).map_err(unwritten)?;
    live.step("committing");
    if place.storage.exists(&name)? && counted.out.may_be_renamed() {
        // Another keepd was quicker with this name.
        name = place.free_name(&job.name, started)?.to_string();
        counted.out.rename(&name);
    }
    counted.out.finish()?;
    live.set_added(made.bytes);
    let committed = commit(env, target, &place, &name, &head, &tail, &made, live)?;
    if request.r#type != BackupType::PreRestore
        && let Err(e) = upkeep::retain(env, job, target, &place, live, gate)
        && !matches!(e, Failure::Cancelled)
    {
        live.message(Level::Error, format!("the backup is made, but cleaning up after it failed: {e}"));
    }
    Ok((committed, head.origin.backup))
}

fn head(job: &Job, request: &BackupRequest, run: &str, started: Timestamp) -> Result<Head, Failure> {
    let failed = |e: crypto::CryptoError| Failure::Failed(e.to_string());
    let (archive, backup): ([u8; 16], [u8; 32]) = (crypto::random().map_err(failed)?, crypto::random().map_err(failed)?);
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let origin = Origin {
        backup: HEXLOWER.encode(&backup),
        job: job.name.clone(),
        run: run.to_owned(),
        host: names::host(),
        keepd_version: version.clone(),
        started: started.to_string(),
        r#type: request.r#type.as_str().into(),
        name: request.name.clone(),
        description: request.description.clone(),
        labels: request.labels.clone(),
        ..Origin::default()
    };
    Ok(Head {
        format: 1,
        archive: HEXLOWER.encode(&archive),
        created: started.to_string(),
        keepd_version: version,
        contents: Contents::Last,
        origin,
        sources: capture::sources(job),
        ..Head::default()
    })
}

/// Looks at what was published, and takes it up. The backup's outcome.
#[allow(clippy::too_many_arguments)]
fn commit(
    env: &Environment,
    target: &Destination,
    place: &Archives,
    name: &str,
    head: &Head,
    tail: &Tail,
    made: &Made,
    live: &LiveRun,
) -> Result<Outcome, Failure> {
    let is_it = |found: &Head| found.archive == head.archive && found.origin == head.origin;
    if let Err(e) = read_back(place, name, &is_it, made, live) {
        // What cannot be read is no backup, and shall not look like one.
        if !target.append_only
            && let Err(e) = place.remove(name)
        {
            live.message(Level::Error, format!("{name} cannot be read, and could not be removed: {e}"));
        }
        return Err(Failure::Storage(format!("destination {}: what was written cannot be read back: {e}", target.name)));
    }
    let newest = env.ledger.newest_in_chain(&target.name)?;
    let mut manifest = describe::manifest(head, Some(tail), None, made.bytes);
    manifest.sequence = ledgered::next_sequence(&target.name, &env.ledger, newest.as_ref().map_or(0, |d| d.sequence))?;
    let detail = ledgered::detail(name, &manifest);
    env.ledger.put_backup(&target.name, &detail)?;
    live.update(|run| {
        run.backup.get_or_insert(detail.backup.id.clone());
    });
    // Only a convenience.
    if let Err(e) = place.put_companion(&Companion::of(name, place.profile.is_some(), head, tail, made)) {
        live.message(Level::Warning, format!("the backup is made, but what stands beside it could not be written: {e}"));
    }
    Ok(detail.backup.outcome)
}

/// That the archive is there, as long as it was written, with its head and its end.
pub fn read_back(place: &Archives, name: &str, is_it: &dyn Fn(&Head) -> bool, made: &Made, live: &LiveRun) -> Result<(), Failure> {
    let size = place.storage.size(name)?;
    if size != made.bytes {
        return Err(Failure::Storage(format!("{name} has {size} bytes, {} were written", made.bytes)));
    }
    let end = size.min(END_BYTES);
    place.storage.range(name, size - end, end)?;
    if place.profile.as_ref().is_some_and(|p| p.recipient.is_some()) && place.private_keys.is_empty() {
        // Its head opens with a private key that is not here.
        place.storage.range(name, 0, end)?;
        return Ok(());
    }
    let opened = place.open(name, &live.cancel)?;
    match opened.reader.head() {
        Some(found) if is_it(found) => Ok(()),
        _ => Err(Failure::Storage(format!("{name} is not what was written"))),
    }
}

/// Counts what goes through.
struct Counted {
    out: ObjectWriter,
    written: Arc<AtomicU64>,
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.written.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
