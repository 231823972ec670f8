//! Two daemons on one repository, each ignoring the other's lease: whatever one does between any two storage operations of the other, no
//! committed backup is lost.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::check::{Reading, check};
use super::condemned::Now;
use super::prune::{PruneOptions, PruneReport, prune};
use super::source_writer::SourceWriter;
use super::test_world::{Told, World, manifest, noise};
use super::writer::{Flushed, Writer, commit};
use super::{Entry, EntrySink, Kind, Manifest, ManifestSource, Repository};

/// A backup in the three parts that a writer's run has.
pub(super) struct Backup {
    repository: Arc<Repository>,
    contents: u8,
    writer: Option<Writer>,
    source: Option<ManifestSource>,
    flushed: Option<Flushed>,
    committed: Option<bool>,
}

impl Backup {
    pub(super) fn of(repository: Arc<Repository>, contents: u8) -> Self {
        Self { repository, contents, writer: None, source: None, flushed: None, committed: None }
    }

    pub(super) fn part(&mut self, n: usize) {
        match n {
            0 => {
                self.repository.sync_index().unwrap();
                let mut writer = Writer::new(self.repository.clone(), CancellationToken::new()).unwrap();
                let mut sink = SourceWriter::new(&mut writer, "files", "files", b"/x", None);
                sink.push(Entry { kind: Kind::Directory, ..Entry::default() }).unwrap();
                let noise = noise(90_000, self.contents.into());
                for n in 0..3u8 {
                    let entry = Entry { path: vec![b'a' + n], kind: Kind::File, ..Entry::default() };
                    sink.push_small(entry, noise.get(usize::from(n) * 30_000..).unwrap().get(..30_000).unwrap()).unwrap();
                }
                self.source = Some(sink.finish("{}".into()).unwrap().source);
                self.writer = Some(writer);
            }
            1 => self.flushed = Some(self.writer.take().unwrap().flush().unwrap()),
            _ => {
                let manifest =
                    Manifest { sequence: u64::from(self.contents), ..manifest(&self.repository, vec![self.source.take().unwrap()]) };
                self.committed = Some(commit(&self.repository, &manifest, self.flushed.as_ref().unwrap()).is_ok());
            }
        }
    }

    pub(super) fn committed(&self) -> Option<bool> {
        self.committed
    }

    pub(super) fn whole(mut self) {
        (0..3).for_each(|n| self.part(n));
        assert_eq!(self.committed, Some(true));
    }
}

pub(super) fn prune_with(repository: &Arc<Repository>, grace: Duration) -> super::error::Result<PruneReport> {
    let alone = || Some(Box::new(()) as Box<dyn Send>);
    prune(
        repository,
        &PruneOptions { dry_run: false, grace, known: &[], now: Now::believing(jiff::Timestamp::now().as_second()), alone: &alone },
        &|_| {},
        &CancellationToken::new(),
    )
}

pub(super) const HOUR: Duration = Duration::from_secs(3600);

/// A repository with a living backup and one that was deleted, whose contents the next backup has again.
pub(super) fn with_something_dead() -> World {
    let world = World::new();
    let a = world.seen_by("a", None);
    Backup::of(a.clone(), 1).whole();
    Backup::of(a.clone(), 2).whole();
    let dead = a.listed_backups().unwrap().into_iter().find(|id| a.read_manifest(id).unwrap().sequence == 1).unwrap();
    a.delete_manifest(&dead).unwrap();
    world
}

pub(super) fn nothing_is_lost(world: &World, after: &str) {
    // As somebody who knows nothing sees it.
    let _ = std::fs::remove_dir_all(world.path().join("c"));
    let report = check(&world.seen_by("c", None), Reading::Percent(100), &|_, _, _| {}, &CancellationToken::new()).unwrap();
    assert!(report.problems.is_empty() && report.hurt.is_empty(), "{after}: {report:?}");
}

/// Prunes as `a` while `b` backs up, its three parts before the storage operations of these numbers; returns how many there were.
fn interleaved(points: [usize; 3]) -> usize {
    let world = with_something_dead();
    let backup = Arc::new(Mutex::new((Backup::of(world.seen_by("b", None), 1), 0)));
    let (count, inner) = (Arc::new(AtomicUsize::new(0)), backup.clone());
    let counter = count.clone();
    let told: Told = Arc::new(move || {
        let now = counter.fetch_add(1, Ordering::Relaxed);
        let mut b = inner.lock().unwrap();
        while b.1 < 3 && points[b.1] <= now {
            let part = b.1;
            b.0.part(part);
            b.1 += 1;
        }
    });
    let a = world.seen_by("a", Some(told));
    // It may refuse, when it sees a backup whose parts it does not know yet.
    let pruned = prune_with(&a, HOUR);
    let mut b = backup.lock().unwrap();
    while b.1 < 3 {
        let part = b.1;
        b.0.part(part);
        b.1 += 1;
    }
    let after = format!("{points:?}, {pruned:?}, committed {:?}", b.0.committed);
    nothing_is_lost(&world, &after);
    // The grace period is over.
    let a = world.seen_by("a", None);
    prune_with(&a, Duration::ZERO).unwrap();
    nothing_is_lost(&world, &after);
    // And what was refused can be had by doing it again.
    if b.0.committed == Some(false) {
        Backup::of(world.seen_by("b", None), 1).whole();
        nothing_is_lost(&world, &after);
    }
    assert_eq!(a.listed_backups().unwrap().len(), 2, "{after}");
    count.load(Ordering::Relaxed)
}

#[test]
fn no_interleaving_of_a_backup_with_a_prune_loses_it() {
    let operations = interleaved([usize::MAX; 3]);
    assert!(operations > 10, "{operations}");
    let points: Vec<usize> = (0..=operations).step_by(3).chain([usize::MAX]).collect();
    let mut tried = 0;
    for (i, a) in points.iter().enumerate() {
        for (j, b) in points.iter().enumerate().skip(i) {
            for c in points.iter().skip(j) {
                interleaved([*a, *b, *c]);
                tried += 1;
            }
        }
    }
    assert!(tried > 50, "{tried}");
}

/// The backup began before anything was condemned, and took longer than the grace period.
#[test]
fn a_backup_that_builds_upon_what_was_deleted_meanwhile_is_not_committed() {
    let world = with_something_dead();
    let mut backup = Backup::of(world.seen_by("b", None), 1);
    backup.part(0);
    backup.part(1);
    let a = world.seen_by("a", None);
    prune_with(&a, HOUR).unwrap();
    prune_with(&a, Duration::ZERO).unwrap();
    backup.part(2);
    assert_eq!(backup.committed, Some(false));
    nothing_is_lost(&world, "refused");
    Backup::of(world.seen_by("b", None), 1).whole();
    nothing_is_lost(&world, "done again");
}
