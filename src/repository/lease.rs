//! The lease: one daemon writes to a repository, and everybody can read who.
//!
//! `writer.json` names the holder and a counter that the holder raises while it works. No clocks need agree: whoever finds
//! a lease watches it on its own monotonic clock, and only when the counter stood still for the whole term is the holder
//! taken for dead. What a holder left behind by crashing is taken over at once by the next start with the same state directory, which
//! knows the runs that took one; without it (the state was lost, or an older one brought back) the machine's start and the process tell, or the term is waited for.
//!
//! After the work the lease is released and goes on naming its machine: a clone of the machine, or a restored image beside the
//! original, would otherwise write in turns with it and nobody would notice. Another machine is refused until it takes over by command.
//!
//! Safety does not rest on the lease (packs, manifests and all else are never overwritten, and a service may ignore create-if-absent);
//! it keeps two daemons from working against each other.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::error::{RepositoryError, Result};
use super::open::Repository;
use crate::storage::StorageError;

const NAME: &str = "writer.json";
const MAX_BYTES: u64 = 16 << 10;
/// Between looks at somebody else's lease.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// So often it may be there and not be there.
const CONTRADICTIONS: usize = 4;

/// Who writes, for messages and to know one's own leftovers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Random, kept in the state directory.
    pub instance: String,
    pub host: String,
    /// Of the machine, the same after each start; empty when the machine has none.
    #[serde(default)]
    pub machine: String,
    /// Of the machine's present start: two clones of a machine differ in it while they run.
    #[serde(default)]
    pub boot: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    format: u32,
    #[serde(flatten)]
    holder: Holder,
    pid: u32,
    run: String,
    /// Raised at every renewal.
    counter: u64,
    /// Renewed at least this often; after so long without a change the holder counts as dead.
    term_seconds: u64,
    written: String,
    /// Nobody is writing now.
    #[serde(default)]
    released: bool,
}

impl Record {
    fn who(&self) -> String {
        format!("{} (instance {}, process {})", self.holder.host, self.holder.instance, self.pid)
    }

    fn is_of(&self, other: &Record) -> bool {
        self.holder == other.holder && self.pid == other.pid && self.run == other.run
    }
}

/// How long a lease lives without renewal.
pub const TERM: Duration = Duration::from_secs(60);

/// A held lease; renewed by a thread, released on drop.
pub struct Lease {
    repository: Arc<Repository>,
    /// As it was written last.
    record: Arc<Mutex<Record>>,
    stop: Arc<(Mutex<bool>, Condvar)>,
    lost: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Lease {
    /// Takes the lease, waiting up to `term` for a holder that may be dead. `earlier`: runs that this state directory had begun to take it for.
    pub fn acquire(
        repository: &Arc<Repository>,
        holder: &Holder,
        run: &str,
        earlier: &[String],
        term: Duration,
        cancel: &CancellationToken,
    ) -> Result<Self> {
        let mut record = fresh(holder, run, term);
        let mut seen: Option<(Record, Instant)> = None;
        let mut contradicted = 0;
        loop {
            let Some(found) = read(repository)? else {
                match repository.storage.put_new(NAME, encode(&record)?) {
                    Ok(()) => break,
                    // Somebody was quicker, or the storage says both.
                    Err(e @ StorageError::Exists { .. }) if contradicted >= CONTRADICTIONS => {
                        return Err(held(repository, format!("the storage says that {NAME} is not there, and that it is ({e})")));
                    }
                    Err(StorageError::Exists { .. }) => contradicted += 1,
                    Err(e) => return Err(e.into()),
                }
                if cancel.is_cancelled() {
                    return Err(RepositoryError::Cancelled);
                }
                if contradicted > 1 {
                    std::thread::sleep(LOOK_EVERY);
                }
                continue;
            };
            // Whoever can write to the storage can write any number.
            record.counter = found.counter.wrapping_add(1);
            let earlier = if found.holder.boot == record.holder.boot || !repository.storage.may_be_shared() { earlier } else { &[] };
            if may_follow(&found, &record)? || is_own_leftover(&found, &record, earlier) {
                repository.storage.put(NAME, encode(&record)?)?;
                break;
            }
            match &seen {
                Some((before, since)) if *before == found => {
                    if since.elapsed() >= Duration::from_secs(found.term_seconds.clamp(1, 3600)) {
                        // Dead. Whether its successor may be this machine is the same question as after a release.
                        may_follow(&Record { released: true, ..found }, &record)?;
                        repository.storage.put(NAME, encode(&record)?)?;
                        break;
                    }
                }
                Some(_) => {
                    let text = format!("another keepd, {}, is writing here; one repository has one writer", found.who());
                    return Err(held(repository, text));
                }
                None => seen = Some((found, Instant::now())),
            }
            if cancel.is_cancelled() {
                return Err(RepositoryError::Cancelled);
            }
            std::thread::sleep(LOOK_EVERY);
        }
        let lease = Self::keep(repository.clone(), record, term);
        // Where create-if-absent is ignored another one may have written at the same time: the last one has it. What is still on its way now is seen
        // by the look before the commit.
        lease.check()?;
        Ok(lease)
    }

    /// Makes this machine the writer, whoever was it; returns who, if anybody. One that is at work stops before it commits.
    pub fn take_over(repository: &Arc<Repository>, holder: &Holder) -> Result<Option<String>> {
        let found = read(repository)?;
        let counter = found.as_ref().map_or(0, |f| f.counter.wrapping_add(1));
        let record = Record { counter, released: true, ..fresh(holder, "take-over", TERM) };
        repository.storage.put(NAME, encode(&record)?)?;
        Ok(found.map(|f| f.who()))
    }

    /// Who writes there, if that is another machine, which must be taken over first.
    pub fn other_writer(repository: &Repository, holder: &Holder) -> Result<Option<String>> {
        Ok(read(repository)?.filter(|found| !is_same(&found.holder, holder)).map(|found| found.who()))
    }

    fn keep(repository: Arc<Repository>, record: Record, term: Duration) -> Self {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let lost = Arc::new(AtomicBool::new(false));
        let record = Arc::new(Mutex::new(record));
        let (stop2, lost2, repository2, record2) = (stop.clone(), lost.clone(), repository.clone(), record.clone());
        let thread = std::thread::Builder::new().name("lease".into()).spawn(move || {
            let mut renewed = Instant::now();
            loop {
                let guard = stop2.0.lock().unwrap_or_else(PoisonError::into_inner);
                let (guard, _) = stop2.1.wait_timeout_while(guard, term / 4, |stop| !*stop).unwrap_or_else(PoisonError::into_inner);
                if *guard {
                    return;
                }
                drop(guard);
                let mut record = record2.lock().unwrap_or_else(PoisonError::into_inner);
                let found = read(&repository2);
                if matches!(&found, Ok(found) if !found.as_ref().is_some_and(|f| f.is_of(&record))) {
                    // Somebody took over: it is theirs now and not written to any more.
                    lost2.store(true, Ordering::Release);
                    return;
                }
                record.counter = record.counter.wrapping_add(1);
                record.written = jiff::Timestamp::now().to_string();
                let renewal = found.and_then(|_| encode(&record)).and_then(|bytes| Ok(repository2.storage.put(NAME, bytes)?));
                if renewal.is_ok() {
                    renewed = Instant::now();
                } else if renewed.elapsed() > term {
                    // Somebody may have taken over by now: whoever holds this must stop before it commits.
                    lost2.store(true, Ordering::Release);
                    return;
                }
            }
        });
        Self { repository, record, stop, lost, thread: thread.ok() }
    }

    /// Looks whether the lease is still held: an error once it could not be renewed for its whole term, or somebody took it over.
    pub fn check(&self) -> Result<()> {
        if self.lost.load(Ordering::Acquire) || self.thread.is_none() {
            let text =
                "the lease on the repository was lost while writing (the storage did not answer in time, or another keepd took over)";
            return Err(held(&self.repository, text.into()));
        }
        let ours = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        match read(&self.repository)? {
            Some(found) if found.is_of(&ours) => Ok(()),
            Some(found) if found.format == 0 => Err(held(&self.repository, format!("{NAME} is damaged: it does not say who writes here"))),
            Some(found) if found.holder == ours.holder && found.pid == ours.pid => {
                let text = format!("{NAME} is not as this run wrote it: the storage lost a write, or shows an older state");
                Err(held(&self.repository, text))
            }
            Some(found) => Err(held(&self.repository, format!("{} took the repository over while this keepd was writing", found.who()))),
            None => Err(held(&self.repository, format!("{NAME} was removed while this keepd was writing"))),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        *self.stop.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.1.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let still_ours = matches!(read(&self.repository), Ok(Some(found)) if found.is_of(&record));
        if !self.lost.load(Ordering::Acquire) && still_ours {
            // Left as it is it would only make another start wait for the term.
            record.released = true;
            record.counter = record.counter.wrapping_add(1);
            let _ = encode(&record).map(|bytes| self.repository.storage.put(NAME, bytes));
        }
    }
}

/// Whether a released lease may be taken by `record`: the same machine, or one that cannot be told, follows; another is refused by name.
fn may_follow(found: &Record, record: &Record) -> Result<bool> {
    match (found.released, is_same(&found.holder, &record.holder)) {
        (false, _) => Ok(false),
        (true, true) => Ok(true),
        (true, false) => Err(RepositoryError::Other(format!(
            "this repository is written by keepd on {} since {}; one repository has one writer. If that machine is gone, or shall stop, \
             'keepctl destination take-over NAME' makes this one its writer",
            found.who(),
            found.written
        ))),
    }
}

/// One machine, or one that cannot be told from it.
fn is_same(theirs: &Holder, ours: &Holder) -> bool {
    theirs.instance == ours.instance || theirs.machine.is_empty() || theirs.machine == ours.machine
}

/// A lease of this state directory: of one of the `earlier` runs that it knows of (whoever asks has the directory for itself, so that one is over, also when the power
/// went out meanwhile or another process has its number now), or of this start of the machine, whose process is not there any more, or is this one.
fn is_own_leftover(found: &Record, record: &Record, earlier: &[String]) -> bool {
    let pid = i32::try_from(found.pid).ok().and_then(rustix::process::Pid::from_raw);
    let alive = || pid.is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH));
    let (theirs, ours) = (&found.holder, &record.holder);
    let is_known = theirs.instance == ours.instance && theirs.machine == ours.machine && earlier.contains(&found.run);
    is_known || (theirs == ours && (found.pid == record.pid || !alive()))
}

fn fresh(holder: &Holder, run: &str, term: Duration) -> Record {
    Record {
        format: 1,
        holder: holder.clone(),
        pid: std::process::id(),
        run: run.to_owned(),
        counter: 0,
        term_seconds: term.as_secs(),
        written: jiff::Timestamp::now().to_string(),
        released: false,
    }
}

fn held(repository: &Repository, text: String) -> RepositoryError {
    RepositoryError::Held { location: repository.location().to_owned(), text }
}

fn encode(record: &Record) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(record).map_err(|e| RepositoryError::Other(e.to_string()))
}

/// The lease as it stands; one that does not parse is treated as a stranger's.
fn read(repository: &Repository) -> Result<Option<Record>> {
    let bytes = match repository.storage.get(NAME, MAX_BYTES) {
        Ok(bytes) => bytes,
        Err(StorageError::NotFound { .. }) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    Ok(Some(serde_json::from_slice(&bytes).unwrap_or_else(|_| {
        let unknown = Holder { instance: "unknown".into(), host: "unknown".into(), machine: String::new(), boot: String::new() };
        Record { format: 0, pid: 0, written: String::new(), ..fresh(&unknown, "", TERM) }
    })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::test_world::World;

    fn written(world: &World) -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(world.path().join("repository/writer.json")).unwrap()).unwrap()
    }

    fn holder(instance: &str, machine: &str, boot: &str) -> Holder {
        Holder { instance: instance.into(), host: format!("host-{instance}"), machine: machine.into(), boot: boot.into() }
    }

    const SHORT: Duration = Duration::from_secs(1);

    fn acquire(repository: &Arc<Repository>, holder: &Holder, run: &str) -> Result<Lease> {
        Lease::acquire(repository, holder, run, &["known".to_owned()], SHORT, &CancellationToken::new())
    }

    #[test]
    fn a_second_machine_is_refused_by_name_until_it_takes_over() {
        let world = World::new();
        let (a, b) = (world.seen_by("a", None), world.seen_by("b", None));
        let (first, second) = (holder("one", "m1", "b1"), holder("two", "m2", "b2"));
        let lease = acquire(&a, &first, "run1").unwrap();
        let refused = acquire(&b, &second, "run2").err().unwrap().to_string();
        assert!(refused.contains("host-one") && refused.contains("one writer"), "{refused}");
        lease.check().unwrap();
        drop(lease);
        assert_eq!(written(&world)["released"], true);
        let refused = acquire(&b, &second, "run3").err().unwrap().to_string();
        assert!(refused.contains("host-one") && refused.contains("take-over"), "{refused}");
        drop(acquire(&a, &first, "run4").unwrap());
        assert!(Lease::take_over(&b, &second).unwrap().unwrap().contains("host-one"));
        drop(acquire(&b, &second, "run5").unwrap());
        assert!(acquire(&a, &first, "run6").err().unwrap().to_string().contains("host-two"));
    }

    #[test]
    fn one_that_was_taken_over_notices_and_does_not_write_over_it() {
        let world = World::new();
        let (a, b) = (world.seen_by("a", None), world.seen_by("b", None));
        let lease = acquire(&a, &holder("one", "m1", "b1"), "run1").unwrap();
        Lease::take_over(&b, &holder("two", "m2", "b2")).unwrap();
        let lost = lease.check().err().unwrap().to_string();
        assert!(lost.contains("host-two"), "{lost}");
        let theirs = acquire(&b, &holder("two", "m2", "b2"), "run2").unwrap();
        // Longer than a renewal takes, and its end.
        std::thread::sleep(SHORT);
        assert!(lease.check().is_err());
        drop(lease);
        theirs.check().unwrap();
        assert_eq!(written(&world)["instance"], "two");
    }

    #[test]
    fn a_crashed_holder_is_followed_when_its_counter_stood_still() {
        let world = World::new();
        let a = world.seen_by("a", None);
        let put = |record: &Record| a.storage.put(NAME, encode(record).unwrap()).unwrap();
        // The machine was started anew: it cannot know that nobody is there, and waits.
        put(&Record { pid: 1, ..fresh(&holder("one", "m1", "before"), "run1", SHORT) });
        let since = Instant::now();
        drop(acquire(&a, &holder("one", "m1", "now"), "run2").unwrap());
        assert!(since.elapsed() >= SHORT);
        // The same start, and the process is gone: at once.
        put(&Record { pid: i32::MAX as u32 - 7, ..fresh(&holder("one", "m1", "now"), "run3", TERM) });
        let since = Instant::now();
        drop(acquire(&a, &holder("one", "m1", "now"), "run4").unwrap());
        // The machine was started anew, or another process has the number; but this state directory knows the run: at once.
        for boot in ["before", "now"] {
            put(&Record { pid: 1, ..fresh(&holder("one", "m1", boot), "known", TERM) });
            drop(acquire(&a, &holder("one", "m1", "now"), "run4").unwrap());
        }
        assert!(since.elapsed() < TERM / 2);
        // Another machine's is not one's own for that.
        put(&Record { pid: 1, ..fresh(&holder("one", "m2", "now"), "known", SHORT) });
        let since = Instant::now();
        drop(acquire(&a, &holder("one", "m1", "now"), "run4").unwrap());
        assert!(since.elapsed() >= SHORT);
        // A lost state directory on the same machine.
        drop(acquire(&a, &holder("other", "m1", "now"), "run5").unwrap());
        // A dead one of another machine is not followed without a word.
        put(&fresh(&holder("three", "m3", "b3"), "run6", SHORT));
        assert!(acquire(&a, &holder("one", "m1", "now"), "run7").err().unwrap().to_string().contains("take-over"));
        // Somebody wrote the largest number there is.
        put(&Record { pid: i32::MAX as u32 - 7, counter: u64::MAX, ..fresh(&holder("one", "m1", "now"), "run8", TERM) });
        drop(acquire(&a, &holder("one", "m1", "now"), "run8").unwrap());
        put(&Record { counter: u64::MAX, released: true, ..fresh(&holder("two", "m2", "b2"), "run8", TERM) });
        assert!(Lease::take_over(&a, &holder("one", "m1", "now")).unwrap().unwrap().contains("host-two"));
        // What does not parse is watched, too.
        a.storage.put(NAME, b"{".to_vec()).unwrap();
        let cancel = CancellationToken::new();
        cancel.cancel();
        let waiting = Lease::acquire(&a, &holder("one", "m1", "now"), "run9", &[], SHORT, &cancel);
        assert!(matches!(waiting, Err(RepositoryError::Cancelled)));
    }
}
