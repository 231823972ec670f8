//! What a restore in place would change, and whether it can be done: looked at before anything is begun.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use keepd_protocol::model::{BytesPath, Change as Told, ChangeKind, PlannedSource, PlannedSpace, RestorePlan};
use rustix::fs::{Access, AtFlags, CWD};

use super::targets::{Dump, Target, To};
use super::tree::{Beneath, Change, ChangeWriter, Described, SIDECARS, Xattr};
use crate::config::{Job, SourceKind};
use crate::repository::{Entry, Kind, Manifest, Segment};
use crate::run::differences::{self, What};
use crate::run::live::{Failure, LiveRun};
use crate::run::load::loader;
use crate::run::restore::{Place, kind};
use crate::run::set::told;
use crate::source::load::Wanted;
use crate::source::{Context, Facts, Report};

/// Changes shown of each source.
const SHOWN: usize = 50;
/// Room that is left free beside what is needed, in bytes.
const RESERVE: u64 = 16 << 20;

/// A path at which things differ, without its contents.
pub struct Found {
    pub path: Vec<u8>,
    pub what: What,
    pub backup: Option<Entry>,
    pub live: Option<Entry>,
    /// Bytes of contents that the backup has of it.
    pub bytes: u64,
}

/// All differences of a directory, in path order.
///
/// What `others` see to by themselves, databases of SQLite among the files, is left to them.
pub fn look(
    place: &Place,
    target: &Target<'_>,
    others: &HashSet<PathBuf>,
    live: &LiveRun,
    state_dir: &Path,
) -> Result<Vec<Found>, Failure> {
    let (SourceKind::Files(source), To::Directory { root, paths, .. }) = (&target.source.kind, &target.to) else { return Ok(Vec::new()) };
    let of = super::targets::of(&place.manifest, &target.name)?;
    let report = Report::default();
    let work_dir = state_dir.join("work");
    let context = Context { cancel: &live.cancel, report: &report, work_dir: &work_dir, cache_dir: &work_dir };
    let own = state_dir.canonicalize().unwrap_or_else(|_| state_dir.to_owned());
    let mut found = Vec::new();
    let mut each = |difference: differences::Difference| -> Result<(), Failure> {
        match difference.what {
            // What the source leaves out now stays as it is.
            What::Missing { hidden: true } => return Ok(()),
            What::Unreadable => {
                let path = String::from_utf8_lossy(&difference.path).escape_debug().to_string();
                let why = report.take_messages().into_iter().map(|(_, text)| text).collect::<Vec<_>>().join("; ");
                return Err(Failure::Failed(format!("source {}: '{path}' cannot be compared with the backup: {why}", target.name)));
            }
            _ => {}
        }
        let path = root.join(OsStr::from_bytes(&difference.path));
        // What keepd itself knows, its audit log above all, is no part of any restore.
        if others.contains(&path) || path.starts_with(state_dir) || path.starts_with(&own) {
            return Ok(());
        }
        let data = |s: &Segment| if let Segment::Data(x) = s { u64::from(x.len) } else { 0 };
        let bytes = difference.backup.as_ref().map_or(0, |e| e.content.segments.iter().map(data).sum());
        let without = |entry: Option<Entry>| {
            entry.map(|mut e| {
                e.content.segments = Vec::new();
                e
            })
        };
        found.push(Found {
            path: difference.path,
            what: difference.what,
            backup: without(difference.backup),
            live: without(difference.live),
            bytes,
        });
        Ok(())
    };
    differences::of_files(&place.repository, of, source, paths, &context, &mut each)?;
    Ok(found)
}

/// The files that restoring a database of SQLite sees to.
pub fn databases_of(targets: &[Target<'_>]) -> HashSet<PathBuf> {
    let mut paths = HashSet::new();
    for target in targets {
        if let To::File { root, file, database: true, .. } = &target.to {
            for suffix in std::iter::once("").chain(SIDECARS) {
                let name = [file, suffix.as_bytes()].concat();
                paths.insert(root.join(OsStr::from_bytes(&name)));
            }
        }
    }
    paths
}

fn is_directory(entry: Option<&Entry>) -> bool {
    entry.is_some_and(|e| e.kind == Kind::Directory)
}

impl Found {
    /// It is staged whole: a file or symlink that is not there as it was.
    fn is_staged(&self) -> bool {
        let Some(backup) = &self.backup else { return false };
        match (backup.kind, self.what) {
            (Kind::Directory | Kind::Hardlink, _) => false,
            (Kind::Symlink, _) => true,
            (Kind::File, what) => what != What::Metadata,
        }
    }

    /// Making the change, or taking it back, sets a set-user-ID or set-group-ID bit.
    fn sets_special_bits(&self) -> bool {
        let special = |e: &Entry| matches!(e.kind, Kind::File | Kind::Directory) && e.mode & 0o6000 != 0;
        let same = match (&self.backup, &self.live) {
            // A new owner takes a file these bits, a directory not.
            (Some(b), Some(l)) if b.kind == l.kind && b.mode == l.mode => {
                b.kind == Kind::Directory || (!self.is_staged() && (b.uid, b.gid) == (l.uid, l.gid))
            }
            _ => false,
        };
        // What is moved aside comes back as it is.
        let is_changed = |live: &&Entry| live.kind == Kind::Directory || self.what == What::Metadata;
        !same && (self.backup.as_ref().is_some_and(special) || self.live.as_ref().filter(is_changed).is_some_and(special))
    }
}

/// What of a source's entries is staged: files and links that differ, and the directories above them.
pub fn staged(found: &[Found]) -> HashSet<Vec<u8>> {
    let mut set: HashSet<Vec<u8>> = found.iter().filter(|f| f.is_staged()).map(|f| f.path.clone()).collect();
    let links: Vec<&Found> = found.iter().filter(|f| f.backup.as_ref().is_some_and(|b| b.kind == Kind::Hardlink)).collect();
    for link in links {
        // One whose first name stays as it is becomes another name of that.
        if link.backup.as_ref().is_some_and(|b| set.contains(&b.target)) {
            set.insert(link.path.clone());
        }
    }
    let above: HashSet<Vec<u8>> = set
        .iter()
        .flat_map(|path| path.iter().enumerate().filter(|(_, b)| **b == b'/').filter_map(|(at, _)| path.get(..at).map(<[u8]>::to_vec)))
        .collect();
    if !set.is_empty() {
        set.extend(above);
        set.insert(Vec::new());
    }
    set
}

/// Numbers of users and groups on this machine, for those of a backup; without any they are what they are.
#[derive(Default)]
pub struct Owners {
    users: BTreeMap<u32, u32>,
    groups: BTreeMap<u32, u32>,
}

impl Owners {
    pub fn of(manifest: &Manifest) -> Self {
        let users = manifest.users.iter().filter_map(|(id, name)| Some((*id, uzers::get_user_by_name(name)?.uid()))).collect();
        let groups = manifest.groups.iter().filter_map(|(id, name)| Some((*id, uzers::get_group_by_name(name)?.gid()))).collect();
        Self { users, groups }
    }

    fn described(&self, entry: &Entry) -> Described {
        Described {
            mode: entry.mode,
            uid: self.users.get(&entry.uid).copied().unwrap_or(entry.uid),
            gid: self.groups.get(&entry.gid).copied().unwrap_or(entry.gid),
            seconds: entry.mtime.seconds,
            nanoseconds: entry.mtime.nanoseconds,
            xattrs: entry.xattrs.iter().map(|(name, value)| Xattr { name: name.clone(), value: value.clone() }).collect(),
        }
    }
}

/// Writes down the changes that make a directory what the backup has; `from` says where a path was staged. How many there are.
pub fn write_changes(
    to: &Path,
    beneath: &Beneath<'_>,
    found: &[Found],
    owners: &Owners,
    source: &str,
    from: &dyn Fn(&[u8]) -> Option<&'static str>,
) -> Result<u64, Failure> {
    let failed = |e: std::io::Error| Failure::Failed(format!("cannot write down in {} what is to be changed: {e}", to.display()));
    let mut out = ChangeWriter::create(to).map_err(failed)?;
    let (mut number, mut count) = (0, 0);
    let mut write = |change: Change| {
        count += 1;
        out.write(&change).map_err(failed)
    };
    let none = Owners::default();
    let needs_room = |f: &&Found| match (&f.backup, f.live.as_ref()) {
        (None, Some(live)) => live.kind != Kind::Directory,
        (Some(backup), live) if backup.kind == Kind::Directory => live.is_some() && !is_directory(live),
        (Some(_), None) => false,
        (Some(backup), live) => !is_directory(live) && (f.is_staged() || (backup.kind == Kind::Hardlink && f.what != What::Metadata)),
        (None, None) => false,
    };
    for f in found.iter().filter(needs_room) {
        write(Change::Aside { path: f.path.clone(), number })?;
        number += 1;
    }
    for f in found.iter().rev().filter(|f| is_directory(f.live.as_ref()) && !is_directory(f.backup.as_ref())) {
        if let Some(live) = &f.live {
            write(Change::RemoveDirectory { path: f.path.clone(), was: none.described(live) })?;
        }
    }
    write(Change::Sync)?;
    let is_made = |f: &&Found| is_directory(f.backup.as_ref()) && !is_directory(f.live.as_ref()) && !f.path.is_empty();
    for f in found.iter().filter(is_made) {
        write(Change::MakeDirectory { path: f.path.clone() })?;
    }
    for f in found {
        let Some(backup) = f.backup.as_ref().filter(|b| b.kind != Kind::Directory) else { continue };
        if let Some(stage) = from(&f.path).filter(|_| f.is_staged() || backup.kind == Kind::Hardlink) {
            let from = [stage.as_bytes(), b"/", source.as_bytes(), b"/", &f.path].concat();
            write(Change::Put { from, path: f.path.clone(), database: false })?;
        } else if backup.kind == Kind::Hardlink && f.what != What::Metadata {
            write(Change::Link { first: backup.target.clone(), path: f.path.clone() })?;
        }
    }
    // A directory's time changes when something is put into it.
    let mut touched: BTreeSet<&[u8]> = BTreeSet::new();
    for f in found.iter().filter(|f| f.what != What::Metadata && !f.path.is_empty()) {
        touched.insert(f.path.iter().rposition(|b| *b == b'/').and_then(|at| f.path.get(..at)).unwrap_or_default());
    }
    let known: HashSet<&[u8]> = found.iter().map(|f| f.path.as_slice()).collect();
    touched.retain(|path| !known.contains(path));
    for f in found.iter().rev() {
        let Some(backup) =
            f.backup.as_ref().filter(|b| matches!(b.kind, Kind::Directory) || (b.kind == Kind::File && f.what == What::Metadata))
        else {
            continue;
        };
        let was = f.live.as_ref().filter(|live| live.kind == backup.kind).map(|live| none.described(live));
        write(Change::Describe { path: f.path.clone(), was, to: owners.described(backup) })?;
    }
    for path in touched {
        if let Some(is) = beneath.as_it_was(path).map_err(Failure::Failed)? {
            write(Change::Describe { path: path.to_vec(), was: Some(is.clone()), to: is })?;
        }
    }
    out.finish().map_err(failed)?;
    Ok(count)
}

/// The changes for a source that is one file.
pub fn write_file_changes(to: &Path, beneath: &Beneath<'_>, file: &[u8], staged_as: &[u8], database: bool) -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure::Failed(format!("cannot write down in {} what is to be changed: {e}", to.display()));
    let mut out = ChangeWriter::create(to).map_err(failed)?;
    let sidecars = if database { SIDECARS.as_slice() } else { &[] };
    for (suffix, number) in std::iter::once("").chain(sidecars.iter().copied()).zip(0..) {
        out.write(&Change::Aside { path: [file, suffix.as_bytes()].concat(), number }).map_err(failed)?;
    }
    out.write(&Change::Sync).map_err(failed)?;
    let from = [b"new/".as_slice(), staged_as].concat();
    out.write(&Change::Put { from, path: file.to_vec(), database }).map_err(failed)?;
    if let Some(is) = beneath.as_it_was(b"").map_err(Failure::Failed)? {
        out.write(&Change::Describe { path: Vec::new(), was: Some(is.clone()), to: is }).map_err(failed)?;
    }
    out.finish().map_err(failed)
}

/// What a source's database is loaded as, with the facts of the source.
pub fn wanted(dump: &Dump, facts: &Facts, owners: bool, stops: bool, run: &str) -> Wanted {
    Wanted { replace: true, owners, stops, ..Wanted::of(&dump.database, &dump.database, facts.clone(), run) }
}

/// Fills in what becomes of a target, and what keeps it from being done.
pub fn plan(
    job: &Job,
    place: &Place,
    target: &Target<'_>,
    found: &[Found],
    owners: bool,
    live: &LiveRun,
    plan: &mut RestorePlan,
) -> Result<(), Failure> {
    let mut planned = PlannedSource {
        name: target.name.clone(),
        kind: target.source.kind.word().to_owned(),
        target: target.shown(),
        ..PlannedSource::default()
    };
    let problem = |text: String| format!("source {}: {text}", target.name);
    match &target.to {
        To::Directory { root, .. } => {
            let mut directories: BTreeSet<PathBuf> = BTreeSet::new();
            for f in found {
                tell(&mut planned, place, target, f);
                planned.bytes += if f.is_staged() { f.bytes } else { 0 };
                let path = root.join(OsStr::from_bytes(&f.path));
                if f.what != What::Metadata {
                    directories.extend(path.parent().filter(|_| !f.path.is_empty()).map(Path::to_owned));
                }
            }
            may_change(root, &directories, plan, &problem);
            foreign(found.iter().filter_map(|f| f.backup.as_ref()), plan, &problem);
            if let Some(f) = found.iter().find(|f| f.sets_special_bits()).filter(|_| !super::users::can_set_special_bits()) {
                let path = root.join(OsStr::from_bytes(&f.path));
                plan.problems.push(problem(format!(
                    "{} has, or is to have, a set-user-ID or set-group-ID bit, which keepd's unit forbids to set; for this restore it needs \
                     'RestrictSUIDSGID=no' (see docs/restore.md)",
                    path.display().to_string().escape_debug()
                )));
            }
            need(root, planned.bytes, plan);
        }
        To::File { root, file, entry, database, .. } => {
            (planned.written, planned.bytes) = (1, entry.size);
            let path = root.join(OsStr::from_bytes(file));
            may_change(root, &BTreeSet::new(), plan, &problem);
            foreign(std::iter::once(entry.as_ref()), plan, &problem);
            need(root, entry.size, plan);
            match path.symlink_metadata() {
                Err(_) => planned.text = "is not there now".into(),
                Ok(now) => {
                    planned.text = format!("{} bytes now, {} in the backup", now.len(), entry.size);
                    let users = if *database { super::users::of(&path) } else { super::users::Users::default() };
                    let shown = users.named.join(", ");
                    if !shown.is_empty() && job.services.is_empty() {
                        plan.problems.push(problem(format!(
                            "{} is in use by {shown}; stop what uses it, or name its services in the job (services = [\"…\"])",
                            path.display()
                        )));
                    } else if !shown.is_empty() {
                        plan.notes.push(problem(format!("in use by {shown}, which the job's services should be")));
                    }
                }
            }
        }
        To::Databases { dumps, facts } => {
            let stops = !job.services.is_empty();
            for dump in dumps {
                planned.bytes += dump.entry.size;
                let wanted = wanted(dump, facts, owners, stops, "plan");
                let looked = loader(target.source, &live.cancel)
                    .and_then(|server| server.look(&wanted, stops, &live.cancel).map_err(|e| told(target.source, e)));
                match looked {
                    Ok(()) => {}
                    Err(Failure::Cancelled) => return Err(Failure::Cancelled),
                    Err(e) => plan.problems.push(e.to_string()),
                }
            }
            planned.written = dumps.len() as u64;
            planned.text = "loaded beside what is there, which is kept under another name".into();
        }
        To::Command { entry, .. } => {
            planned.bytes = entry.size;
            planned.text = "is fed to its restore_command; should anything fail after that, it is fed what the safety backup has".into();
        }
    }
    plan.sources.push(planned);
    Ok(())
}

fn tell(planned: &mut PlannedSource, place: &Place, target: &Target<'_>, f: &Found) {
    let change = match (f.what, &f.backup) {
        (What::Extra, _) | (_, None) => ChangeKind::Removed,
        (What::Missing { .. }, _) => ChangeKind::Added,
        (What::Contents | What::Unreadable, _) => ChangeKind::Modified,
        (What::Metadata, _) => ChangeKind::Metadata,
    };
    match change {
        ChangeKind::Removed => planned.removed += 1,
        ChangeKind::Metadata => planned.described += 1,
        ChangeKind::Added | ChangeKind::Modified => planned.written += 1,
    }
    if planned.changes.len() >= SHOWN {
        return;
    }
    let size = |e: &Option<Entry>| e.as_ref().filter(|e| e.kind == Kind::File).map(|e| e.size);
    let Some(one) = f.backup.as_ref().or(f.live.as_ref()) else { return };
    let Ok(of) = super::targets::of(&place.manifest, &target.name) else { return };
    let path = crate::run::selection::Shown::new(of).path(&f.path);
    planned.changes.push(Told {
        change,
        path: BytesPath::from_bytes(&path),
        kind: kind(one.kind),
        size_before: size(&f.live),
        size_after: size(&f.backup),
    });
}

/// The nearest directory above that is there.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|p| p.is_dir()).unwrap_or(Path::new("/"))
}

/// Whether keepd may change what is in a directory and the ones below it that are touched.
fn may_change(root: &Path, directories: &BTreeSet<PathBuf>, plan: &mut RestorePlan, problem: &dyn Fn(String) -> String) {
    let here = existing(root);
    let device = here.metadata().map(|m| m.dev()).unwrap_or_default();
    for directory in std::iter::once(here).chain(directories.iter().map(|d| existing(d))).collect::<BTreeSet<_>>() {
        if let Err(e) = rustix::fs::accessat(CWD, directory, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS) {
            let why = match e {
                rustix::io::Errno::ROFS => format!(
                    "{} is read-only for keepd; its unit lets it write only where it is told to: 'systemctl edit keepd' and \
                     'ReadWritePaths={}' (see docs/restore.md)",
                    directory.display(),
                    root.display()
                ),
                rustix::io::Errno::ACCESS => format!(
                    "keepd may not write to {}, which belongs to another user; its unit has to give it more rights for restores in place (see \
                     docs/restore.md)",
                    directory.display()
                ),
                e => format!("{} cannot be written to: {e}", directory.display()),
            };
            plan.problems.push(problem(why));
            return;
        }
        if directory.metadata().is_ok_and(|m| m.dev() != device) {
            plan.problems.push(problem(format!(
                "{} is on another file system than {}, and nothing can be exchanged between two at once; restore it with --to DIR",
                directory.display(),
                here.display()
            )));
            return;
        }
    }
}

/// Whether what belongs to others can be given to them.
fn foreign<'e>(mut entries: impl Iterator<Item = &'e Entry>, plan: &mut RestorePlan, problem: &dyn Fn(String) -> String) {
    let me = rustix::process::geteuid().as_raw();
    if entries.any(|e| e.uid != me) && !super::users::can_give_away() {
        plan.problems.push(problem(
            "it holds files of other users, and keepd may not give files away; as root, its unit has to leave it CAP_CHOWN (see docs/restore.md)"
                .into(),
        ));
    }
}

/// Adds up what a file system must hold.
fn need(root: &Path, bytes: u64, plan: &mut RestorePlan) {
    let here = existing(root);
    let device = |p: &Path| p.metadata().map(|m| m.dev()).ok();
    let known = plan.file_systems.iter_mut().find(|s| device(Path::new(&s.path)) == device(here));
    match known {
        Some(space) => space.needed += bytes,
        None => {
            let free = rustix::fs::statvfs(here).map_or(0, |s| s.f_bavail.saturating_mul(s.f_frsize));
            plan.file_systems.push(PlannedSpace { path: here.display().to_string(), needed: bytes, free });
        }
    }
}

/// Adds a problem for each file system that is too small.
pub fn has_room(plan: &mut RestorePlan) {
    for space in &plan.file_systems {
        if space.needed > 0 && space.needed + RESERVE > space.free {
            plan.problems.push(format!(
                "{} has {} bytes free, and {} are needed to hold what is new beside what is there",
                space.path, space.free, space.needed
            ));
        }
    }
}
