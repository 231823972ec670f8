//! A restore in place: all of what is wanted takes the place of what is there, or nothing does.
//!
//! plan → safety backup → stage beside the target, and check → stop the application → exchange → migrate → start → healthy? → keep, or put everything
//! back. What is begun is written down before (`journal`), so that a keepd that was killed anywhere on the way finds out at its next start what to undo
//! or to finish (`recover`).

mod health;
mod journal;
mod own;
mod plan;
mod recover;
mod targets;
mod tree;
mod users;

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use keepd_protocol::model::{Backup, BytesPath, Level, PlannedService, RestorePlan};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use self::journal::{Journal, Loaded, Phase};
use self::plan::{Found, Owners};
use self::targets::{Target, To};
use self::tree::{Beneath, Tree, stage_name};
use super::backup::{Environment, short};
use super::hooks::Event;
use super::live::{Failure, Finish, LiveRun};
use super::load;
use super::quiesce::{self, Note};
use super::restore::Place;
use super::set::{ask_version, told};
use super::to_directory;
use crate::config::{Databases, Job, Quiesce, Source, SourceKind};
use crate::repository::Entry;
use crate::source::load::Loader;
use crate::source::way;

pub use self::recover::{Finished, Helper, Pending, pending};

/// Whether a source of a safety copy is a log of a database that was saved as the file that it is.
pub fn is_log_of(name: &str, database: &str) -> bool {
    recover::LOGS.into_iter().any(|log| name.strip_suffix(log) == Some(database))
}

/// Fails while something that a restore in place had begun in a job could not be undone.
pub fn nothing_is_left(env: &Environment, job: &str, run: &str) -> Result<(), Failure> {
    match Journal::of_job(&env.config.daemon.state_dir, job, run) {
        None => Ok(()),
        Some(left) => Err(Failure::Failed(format!(
            "the restore in place of run {left} could be neither finished nor undone, so job {job} is left alone until it is: 'keepctl run show {left}' \
             says why; mend that, and restart keepd"
        ))),
    }
}

/// What is to be restored in place, and how.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Only these sources; with `paths` none means those of the paths, without any all.
    pub sources: Vec<String>,
    /// `<source>/<path>`
    pub paths: Vec<Vec<u8>>,
    /// Of a server's databases only this one.
    pub database: Option<String>,
    /// Of a database of SQLite only these tables; everything else in it stays.
    pub tables: Vec<String>,
    pub owners: bool,
    /// What is there is backed up first.
    pub safety: bool,
    pub dry_run: bool,
    /// It puts back what an earlier restore replaced, whatever state that is in.
    pub is_undo: bool,
    /// What should be known of it.
    pub notes: Vec<String>,
}

impl Request {
    /// What it may read of a backup: `<source>[/<path>]`, none means all.
    pub fn selected(&self) -> Vec<Vec<u8>> {
        self.sources.iter().map(|s| s.clone().into_bytes()).chain(self.paths.iter().cloned()).collect()
    }
}

/// What a transaction needs of the registry.
pub struct Transaction<'a> {
    pub env: &'a Environment,
    pub job: &'a Job,
    pub request: &'a Request,
    pub backup: &'a Backup,
    /// Opens a backup at its best place.
    pub open: &'a dyn Fn(&str) -> Result<Place, Failure>,
    /// Another place of the same backup, that was not tried.
    pub another: &'a dyn Fn(&str, &mut Vec<String>) -> Option<Place>,
    /// Backs a job up as it is now; the backup's id.
    pub back_up: &'a dyn Fn(&Job) -> Result<String, Failure>,
    pub live: &'a LiveRun,
}

/// A place in a transaction where a test lets keepd die.
#[cfg(debug_assertions)]
pub fn point() {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    static DIES_AT: LazyLock<Option<u64>> = LazyLock::new(|| std::env::var("KEEPD_TEST_DIES_AT").ok()?.parse().ok());
    static POINTS: AtomicU64 = AtomicU64::new(0);
    if DIES_AT.is_some_and(|at| POINTS.fetch_add(1, Ordering::SeqCst) + 1 == at) {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}

#[cfg(not(debug_assertions))]
pub fn point() {}

/// A target with what is known of it.
struct Known<'j> {
    target: Target<'j>,
    found: Vec<Found>,
    /// What was staged, and where: the first time, and what came to it since.
    staged: [HashSet<Vec<u8>>; 2],
    /// Its tree in the journal.
    tree: Option<usize>,
    /// The backup's database, where only tables of it are wanted.
    apart: Option<tempfile::TempDir>,
}

const STAGES: [&str; 2] = ["new", "more"];

impl Transaction<'_> {
    /// Carries it out, or only plans it.
    pub fn run(&self) -> Result<Finish, Failure> {
        nothing_is_left(self.env, &self.job.name, &self.live.id())?;
        self.live.step("planning");
        let place = (self.open)(&self.backup.id)?;
        let mut plan = RestorePlan {
            backup: self.backup.id.clone(),
            job: self.job.name.clone(),
            time: self.backup.time.clone(),
            paths: self.request.paths.iter().map(|p| BytesPath::from_bytes(p)).collect(),
            database: self.request.database.clone(),
            tables: self.request.tables.clone(),
            version: self.backup.version.clone(),
            notes: self.request.notes.clone(),
            ..RestorePlan::default()
        };
        let targets = targets::find(self.job, &place, self.request, &mut plan)?;
        let mut known = Vec::new();
        let others = plan::databases_of(&targets);
        for target in targets {
            let found = plan::look(&place, &target, &others, self.live, &self.env.config.daemon.state_dir)?;
            plan::plan(self.job, &place, &target, &found, self.request.owners, self.live, &mut plan)?;
            plan.problems.extend(self.may_change(&place, &target, &found).err().map(|e| e.to_string()));
            known.push(Known { target, found, staged: [HashSet::new(), HashSet::new()], tree: None, apart: None });
        }
        self.plan_application(&mut plan)?;
        plan::has_room(&mut plan);
        self.live.update(|run| run.plan = Some(plan.clone()));
        if !plan.problems.is_empty() {
            let verb = if self.request.dry_run { "it could not be done" } else { "nothing was changed" };
            return Err(Failure::Failed(format!("{verb}: {}", plan.problems.join("; "))));
        }
        if known.is_empty() {
            return Err(Failure::Failed("there is nothing to restore".into()));
        }
        if self.request.dry_run {
            return Ok(Finish::Good);
        }
        let event = |name, programs| Event { name, programs, job: &self.job.name, r#type: "restore" };
        let done = event("before_restore", self.job.hooks.before_restore.as_slice())
            .run(self.live, &[])
            .and_then(|()| self.go(place, known, &others));
        done.map_err(|failure| super::hooks::failed(&event("on_failure", self.job.hooks.on_failure.as_slice()), self.live, failure))
    }

    fn may_change(&self, place: &Place, target: &Target<'_>, found: &[Found]) -> Result<(), Failure> {
        own::may_change(&self.live.by, &self.env.config, target, targets::of(&place.manifest, &target.name)?, found)
    }

    /// Services and versions.
    fn plan_application(&self, plan: &mut RestorePlan) -> Result<(), Failure> {
        let running = match quiesce::running_services(self.job, &self.live.cancel) {
            Ok(running) => running,
            Err(Failure::Cancelled) => return Err(Failure::Cancelled),
            Err(e) => {
                plan.problems.push(e.to_string());
                Vec::new()
            }
        };
        let service = |name: &String| PlannedService { name: name.clone(), running: running.contains(name) };
        plan.services = self.job.services.iter().map(service).collect();
        let asked = self.job.version.as_ref().and_then(|from| ask_version(from, self.job, &self.live.cancel).ok());
        plan.version_now = asked.filter(|v| !v.is_empty());
        if let (Some(then), Some(now)) = (&plan.version, &plan.version_now)
            && then != now
        {
            plan.notes
                .push(format!("the backup is of version {then}, now it is {now}: its data may need migrations (hooks, after_restore)"));
        }
        Ok(())
    }

    fn go(&self, place: Place, known: Vec<Known<'_>>, others: &HashSet<PathBuf>) -> Result<Finish, Failure> {
        quiesce::recovered(self.live)?;
        let mut journal = Journal::new(
            &self.env.config.daemon.state_dir,
            self.live.id(),
            self.job.name.clone(),
            self.backup.id.clone(),
            self.job.health.clone(),
        );
        journal.safety = self.back_up_first()?;
        if let Err(e) = self.keep_for_commands(&known, &mut journal) {
            journal.forget_kept();
            return Err(e);
        }
        let mut restored = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.change(place, known, others, &mut journal)))
            .unwrap_or_else(|_| Err(Failure::Failed("an internal error (a panic, see the log)".into())));
        if let Err(failure) = &restored
            && journal.phase != Phase::Keeping
        {
            self.live.step(if matches!(failure, Failure::Cancelled) {
                "cancelling: putting everything back"
            } else {
                "putting everything back"
            });
            let was_touched = matches!(journal.phase, Phase::Swapping | Phase::Swapped);
            match recover::undo(&mut journal, &self.helper(), &mut |level, text| self.live.message(level, text)) {
                Ok(is_doubtful) if was_touched => self.live.message(Level::Warning, recover::as_before(is_doubtful).into()),
                Ok(_) => {}
                Err(e) if was_touched => {
                    restored = Err(Failure::Failed(format!("{failure}. And what was there COULD NOT BE PUT BACK as a whole: {e}")));
                }
                Err(e) => restored = Err(Failure::Failed(format!("{failure}. Nothing was exchanged, but {e}"))),
            }
        }
        restored
    }

    fn helper(&self) -> recover::Helper<'_> {
        recover::Helper { env: self.env, job: Some(self.job), open: self.open, another: self.another, live: self.live }
    }

    /// Backs up what is there now, so that it can be had back.
    fn back_up_first(&self) -> Result<Option<String>, Failure> {
        if !self.request.safety {
            self.live.message(Level::Warning, "no safety backup was wanted: what is replaced cannot be had back".into());
            return Ok(None);
        }
        let mut job = self.job.clone();
        // What is not there cannot be lost.
        job.sources.retain(|s| s.kind.path().is_none_or(|p| p.symlink_metadata().is_ok()));
        for source in &mut job.sources {
            self.only_what_is_there(source);
        }
        let has_any = |s: &Source| match &s.kind {
            SourceKind::Postgres(server) | SourceKind::Mysql(server) => server.databases != Databases::Named(Vec::new()),
            _ => true,
        };
        job.sources.retain(has_any);
        for gone in self.job.sources.iter().filter(|s| !job.sources.iter().any(|j| j.name == s.name)) {
            self.live.message(Level::Info, format!("source {} is not there now, so there is nothing of it to save", gone.name));
        }
        if job.sources.is_empty() {
            return Ok(None);
        }
        let step = |e: Failure| match e {
            Failure::Cancelled => Failure::Cancelled,
            e => Failure::Failed(format!(
                "what is there now could not be backed up first, so nothing was changed: {e}. Mend that, or restore with --no-safety-backup"
            )),
        };
        let made = match (self.back_up)(&job) {
            // A database that is damaged is perhaps why it is restored: it is kept as the file that it is.
            Err(Failure::Failed(text)) if job.sources.iter().any(|s| matches!(s.kind, SourceKind::Sqlite(_))) => {
                self.live.message(Level::Warning, format!("{text}; databases are backed up as plain files instead"));
                (self.back_up)(&recover::with_plain_files(&job))
            }
            other => other,
        };
        let id = made.map_err(step)?;
        self.live.message(Level::Info, format!("what was there is backup {}", short(&id)));
        self.live.update(|run| run.safety = Some(id.clone()));
        self.live.report.restart();
        self.live.tick();
        Ok(Some(id))
    }

    /// What the safety backup has for commands is kept in files where it takes a private key to read it: nobody lends one at the next start, when
    /// commands may have to be given it back.
    fn keep_for_commands(&self, known: &[Known<'_>], journal: &mut Journal) -> Result<(), Failure> {
        let Some(safety) = journal.safety.clone() else { return Ok(()) };
        for Known { target, .. } in known {
            let SourceKind::Command(command) = &target.source.kind else { continue };
            let place = (self.open)(&safety)?;
            if !place.repository.has_write_only()? {
                continue;
            }
            self.live.step(&format!("keeping what {} has", target.name));
            let path = recover::file_in_backup(&target.name, &command.file);
            let entry = super::restore::find_file(&place.repository, &place.manifest, &path)?;
            let failed = |e: std::io::Error| Failure::Failed(format!("cannot keep what {} has in the state directory: {e}", target.name));
            let file = journal.keep(&target.name).map_err(failed)?;
            let out = file.try_clone().map_err(failed)?;
            let dump = recover::contents(place, self.another, &safety, &path, &entry);
            dump.write(out.into(), crate::source::load::PATIENCE, self.live)?;
            file.sync_all().map_err(failed)?;
            self.live.report.restart();
            self.live.tick();
        }
        Ok(())
    }

    /// Of a server's databases those that are there; all of them when it cannot be asked, which the backup will tell.
    fn only_what_is_there(&self, source: &mut Source) {
        let Ok(server) = load::loader(source, &self.live.cancel) else { return };
        let (SourceKind::Postgres(configured) | SourceKind::Mysql(configured)) = &source.kind else { return };
        let Databases::Named(names) = &configured.databases else { return };
        let is_gone = |name: &&String| matches!(server.is_there(name, &self.live.cancel), Ok(false));
        let gone: Vec<String> = names.iter().filter(is_gone).cloned().collect();
        drop(server);
        if let SourceKind::Postgres(configured) | SourceKind::Mysql(configured) = &mut source.kind
            && let Databases::Named(names) = &mut configured.databases
        {
            names.retain(|name| !gone.contains(name));
        }
    }

    fn change(&self, place: Place, mut known: Vec<Known<'_>>, others: &HashSet<PathBuf>, journal: &mut Journal) -> Result<Finish, Failure> {
        self.live.set_total(self.live.snapshot().plan.map_or(0, |plan| plan.sources.iter().map(|s| s.bytes).sum()));
        journal.save()?;
        for known in &mut known {
            self.stage(&place, known, journal)?;
        }
        let servers = self.load(&place, &known, journal)?;
        self.hold(journal)?;
        self.live.step("looking what changed meanwhile");
        for known in &mut known {
            self.write_down(&place, known, others, journal)?;
        }
        journal.enter(Phase::Swapping)?;
        self.exchange(&place, &known, &servers, journal)?;
        for tree in &journal.trees {
            Beneath::open(tree).map_err(|e| e.to_string()).and_then(|b| b.sync()).map_err(Failure::Failed)?;
        }
        let after = Event { name: "after_restore", programs: &self.job.hooks.after_restore, job: &self.job.name, r#type: "restore" };
        after.run(self.live, &[("KEEPD_OUTCOME", "good".to_owned())])?;
        if self.live.cancel.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        journal.enter(Phase::Swapped)?;
        let started = journal.held.as_ref().map(|held| held.services.clone()).unwrap_or_default();
        if let Some(held) = &journal.held {
            self.live.step("starting services");
            quiesce::end_noted(held).map_err(Failure::Failed)?;
            point();
        }
        let run = self.live.id();
        let question = health::Question { health: self.job.health.as_ref(), job: &self.job.name, run: &run, services: &started };
        question.ask_within(&self.env.runtime, self.live)?;
        journal.enter(Phase::Keeping)?;
        self.live.step("clearing up");
        recover::keep(journal, Some(self.job), &mut |level, text| self.live.message(level, text))?;
        self.live.tick();
        let bytes = self.live.snapshot().progress.bytes;
        self.live.message(Level::Info, format!("backup {} is in place ({bytes} bytes were written)", short(&self.backup.id)));
        if journal.safety.is_some() {
            self.live.message(Level::Info, format!("'keepctl undo {}' brings back what was there", self.live.id()));
        }
        Ok(Finish::Good)
    }

    /// Writes what differs beside its target.
    fn stage(&self, place: &Place, known: &mut Known<'_>, journal: &mut Journal) -> Result<(), Failure> {
        let root = match &known.target.to {
            To::Directory { root, .. } | To::File { root, .. } => root.clone(),
            To::Databases { .. } | To::Command { .. } => return Ok(()),
        };
        self.live.step(&format!("staging {}", known.target.name));
        let made: Vec<_> = root.ancestors().take_while(|p| p.symlink_metadata().is_err()).map(Path::to_owned).collect();
        let tree = Tree {
            source: known.target.name.clone(),
            stage: stage_name(&journal.run, journal.trees.len()),
            made: made.into_iter().rev().collect(),
            was: None,
            inode: None,
            root,
            planned: false,
        };
        let identified = |tree: Tree| -> Result<Tree, Failure> {
            let beneath = self.beneath(&tree)?;
            let inode = beneath.inode().map_err(|e| Failure::Failed(format!("cannot look at {}: {e}", tree.root.display())))?;
            let was = if tree.made.is_empty() { Some(beneath.time().map_err(Failure::Failed)?) } else { None };
            Ok(Tree { was, inode: Some(inode), ..tree })
        };
        let tree = if tree.made.is_empty() { identified(tree)? } else { tree };
        let number = journal.trees.len();
        journal.trees.push(tree.clone());
        journal.save()?;
        known.tree = Some(number);
        for directory in &tree.made {
            way::make_directory(directory, Mode::RWXU | Mode::RWXG | Mode::RWXO)
                .map_err(|e| Failure::Failed(format!("cannot make {}: {e}", directory.display())))?;
            point();
        }
        let tree = if tree.inode.is_none() { identified(tree)? } else { tree };
        if let Some(known) = journal.trees.get_mut(number) {
            *known = tree.clone();
        }
        journal.save()?;
        let beneath = self.beneath(&tree)?;
        beneath.make_stage().map_err(Failure::Failed)?;
        point();
        known.staged[0] = match &known.target.to {
            To::Directory { .. } => plan::staged(&known.found),
            _ => HashSet::new(),
        };
        if self.request.tables.is_empty() {
            self.write_stage(place, known, &tree, 0)?;
            point();
            return self.verify_staged(known, &tree);
        }
        // Where nobody else can reach it.
        let work = self.env.config.daemon.state_dir.join("work");
        let apart = std::fs::create_dir_all(&work).and_then(|()| tempfile::tempdir_in(&work));
        let apart = apart.map_err(|e| Failure::Failed(format!("cannot make a directory in {}: {e}", work.display())))?;
        let mut tried = vec![place.destination.clone()];
        let another = &mut || (self.another)(&self.backup.id, &mut tried);
        to_directory::write(place.clone(), another, &[known.target.name.as_bytes().to_vec()], &apart.path().join(STAGES[0]), self.live)?;
        known.apart = Some(apart);
        Ok(())
    }

    /// A copy of the live database with the wanted tables of the backup's, in the stage. Nobody has it open.
    fn merge(&self, known: &Known<'_>, beneath: &Beneath<'_>, path: &Path, staged_as: &[u8]) -> Result<(), Failure> {
        let failed = |e: std::io::Error| Failure::Failed(format!("cannot copy {}: {e}", path.display()));
        let Some(apart) = &known.apart else { return Ok(()) };
        self.live.step(&format!("bringing tables of {} back", known.target.name));
        let copy = apart.path().join("live.db");
        for suffix in ["", "-wal", "-journal"] {
            let with = |path: &Path| {
                let mut name = path.as_os_str().to_owned();
                name.push(suffix);
                name
            };
            let from = match way::open(Path::new(&with(path)), OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK) {
                Err(Errno::NOENT) if !suffix.is_empty() => continue,
                other => other.map_err(|e| failed(e.into()))?,
            };
            let copied = std::fs::File::create(with(&copy)).and_then(|mut to| std::io::copy(&mut std::fs::File::from(from), &mut to));
            copied.map_err(failed)?;
        }
        let from = apart.path().join(STAGES[0]).join(OsStr::from_bytes(staged_as));
        let (moved, dangling) = crate::source::sqlite::take_tables(&copy, &from, &self.request.tables, &self.live.cancel)
            .map_err(|e| told(known.target.source, e))?;
        for table in moved {
            let before = table.rows_before.map_or("it was not there".to_owned(), |n| format!("{n} before"));
            self.live.message(Level::Info, format!("table {}: {} rows, {before}", table.table, table.rows_after));
        }
        if dangling > 0 {
            self.live.message(Level::Warning, format!("{dangling} rows refer to rows of other tables that are not there"));
        }
        beneath.put_into_stage(&copy, staged_as).map_err(Failure::Failed)
    }

    fn beneath<'t>(&self, tree: &'t Tree) -> Result<Beneath<'t>, Failure> {
        Beneath::open(tree).map_err(|e| Failure::Failed(format!("cannot open {}: {e}", tree.root.display())))
    }

    fn write_stage(&self, place: &Place, known: &Known<'_>, tree: &Tree, stage: usize) -> Result<(), Failure> {
        let mut tried = vec![place.destination.clone()];
        let another = &mut || (self.another)(&self.backup.id, &mut tried);
        let source = [known.target.name.as_bytes().to_vec()];
        let only = known.staged.get(stage).filter(|_| matches!(known.target.to, To::Directory { .. }));
        if only.is_some_and(HashSet::is_empty) {
            return Ok(());
        }
        let to = self.beneath(tree)?.make_in_stage(STAGES.get(stage).copied().unwrap_or_default()).map_err(Failure::Failed)?;
        let written = to_directory::write_only(place.clone(), another, &source, only, to, self.live)?;
        match written.warnings_total {
            0 => Ok(()),
            n => Err(Failure::Failed(format!("{n} owners, modes or attributes could not be set ({})", written.warnings.join("; ")))),
        }
    }

    /// A database of SQLite is asked itself whether it is whole.
    fn verify_staged(&self, known: &Known<'_>, tree: &Tree) -> Result<(), Failure> {
        let To::File { staged_as, database: true, .. } = &known.target.to else { return Ok(()) };
        if self.request.is_undo {
            return Ok(());
        }
        self.live.step(&format!("checking {}", known.target.name));
        let path = tree.root.join(&tree.stage).join(STAGES[0]).join(OsStr::from_bytes(staged_as));
        crate::source::sqlite::check_whole(&path, &self.live.cancel).map_err(|e| told(known.target.source, e))
    }

    /// Loads dumps into scratch databases.
    fn load<'j>(&self, place: &Place, known: &[Known<'j>], journal: &mut Journal) -> Result<Vec<Box<dyn Loader + 'j>>, Failure> {
        let mut servers = Vec::new();
        for Known { target, .. } in known {
            let To::Databases { dumps, facts } = &target.to else { continue };
            for dump in dumps {
                let stops = !self.job.services.is_empty();
                let wanted = plan::wanted(dump, facts, self.request.owners, stops, &format!("{}{}", journal.run, journal.databases.len()));
                let server = load::loader(target.source, &self.live.cancel)?;
                let there = server.is_there(&wanted.target, &self.live.cancel).map_err(|e| told(target.source, e))?;
                let server_name = target.source.kind.lock().unwrap_or_default();
                journal.databases.push(Loaded {
                    source: target.name.clone(),
                    wanted: wanted.clone(),
                    there,
                    begun: false,
                    server: server_name,
                });
                journal.save()?;
                load::load_and_check(target.source, server.as_ref(), &wanted, self.contents(place, &dump.path, &dump.entry), self.live)?;
                servers.push(server);
                point();
            }
        }
        Ok(servers)
    }

    fn contents(&self, place: &Place, path: &[u8], entry: &Entry) -> load::Dump<'_> {
        recover::contents(place.clone(), self.another, &self.backup.id, path, entry)
    }

    /// Holds the application still: its maintenance mode begins, its services stop.
    fn hold(&self, journal: &mut Journal) -> Result<(), Failure> {
        let running = quiesce::running_services(self.job, &self.live.cancel)?;
        let (begin, end) = match &self.job.quiesce {
            Quiesce::Maintenance { begin, end } => (Some(begin), Some(end.clone())),
            _ => (None, None),
        };
        if running.is_empty() && begin.is_none() {
            return Ok(());
        }
        let services = running.iter().rev().cloned().collect();
        journal.held = Some(Note { job: self.job.name.clone(), run: self.live.id(), services, end });
        journal.begin = begin.cloned();
        journal.enter(Phase::Holding)?;
        if let Some(begin) = begin {
            quiesce::begin_maintenance(self.job, begin, self.live)?;
            point();
        }
        self.live.step("stopping services");
        // Also one that is on its way down by itself is waited for.
        for unit in &self.job.services {
            quiesce::stop(unit, &self.live.cancel)?;
            point();
        }
        Ok(())
    }

    /// Now that nobody writes: what exactly is to be changed.
    fn write_down(&self, place: &Place, known: &mut Known<'_>, others: &HashSet<PathBuf>, journal: &mut Journal) -> Result<(), Failure> {
        let Some(number) = known.tree else { return Ok(()) };
        let tree =
            journal.trees.get(number).cloned().ok_or_else(|| Failure::Failed("a tree is not in the journal; this is a bug".into()))?;
        let changes = journal.changes_of(number);
        let beneath = self.beneath(&tree)?;
        match &known.target.to {
            To::File { root, file, staged_as, database, .. } => {
                let path = root.join(OsStr::from_bytes(file));
                let users = if *database { users::of(&path) } else { users::Users::default() };
                if !users.named.is_empty() {
                    return Err(Failure::Failed(format!(
                        "{} is still in use by {}; stop what uses it, or name its services in the job, and try again",
                        path.display(),
                        users.named.join(", ")
                    )));
                }
                if users.hidden > 0 {
                    let text = format!(
                        "{} processes could only be asked for their locks on {}, not for their open files",
                        users.hidden,
                        path.display()
                    );
                    self.live.message(Level::Info, text);
                }
                if known.apart.is_some() {
                    self.merge(known, &beneath, &path, staged_as)?;
                }
                plan::write_file_changes(&changes, &beneath, file, staged_as, *database)?;
            }
            To::Directory { .. } => {
                known.found = plan::look(place, &known.target, others, self.live, &self.env.config.daemon.state_dir)?;
                self.may_change(place, &known.target, &known.found)?;
                let wanted = plan::staged(&known.found);
                if wanted.iter().any(|path| !known.staged[0].contains(path)) {
                    // What belongs together (hard links) is staged together.
                    known.staged[1] = wanted;
                    known.staged[0].clear();
                    self.write_stage(place, known, &tree, 1)?;
                }
                let stage = |path: &[u8]| known.staged.iter().zip(STAGES).find(|(set, _)| set.contains(path)).map(|(_, stage)| stage);
                let owners = Owners::of(&place.manifest);
                plan::write_changes(&changes, &beneath, &known.found, &owners, &known.target.name, &stage)?;
            }
            To::Databases { .. } | To::Command { .. } => {}
        }
        if let Some(tree) = journal.trees.get_mut(number) {
            tree.planned = true;
        }
        Ok(())
    }

    fn exchange(&self, place: &Place, known: &[Known<'_>], servers: &[Box<dyn Loader + '_>], journal: &mut Journal) -> Result<(), Failure> {
        self.live.step("exchanging");
        for (number, tree) in journal.trees.iter().enumerate() {
            let changes = journal.changes_of(number);
            let all = tree::read_changes(&changes).map_err(|e| Failure::Failed(format!("cannot read {}: {e}", changes.display())))?;
            let beneath = self.beneath(tree)?;
            for (n, change) in all.iter().enumerate() {
                if self.live.cancel.is_cancelled() {
                    return Err(Failure::Cancelled);
                }
                beneath.make(change).map_err(Failure::Failed)?;
                point();
                if n % 1000 == 0 {
                    self.live.update(|run| run.progress.percent = Some((n * 1000 / all.len()) as f64 / 10.0));
                }
            }
        }
        for (number, server) in servers.iter().enumerate() {
            let Some(loaded) = journal.databases.get_mut(number) else { break };
            let Some(Known { target, .. }) = known.iter().find(|k| k.target.name == loaded.source) else { continue };
            // It may have come or gone since it was loaded.
            loaded.there = server.is_there(&loaded.wanted.target, &self.live.cancel).map_err(|e| told(target.source, e))?;
            loaded.begun = true;
            let loaded = loaded.clone();
            journal.save()?;
            self.live.step(&format!("putting {} in place", loaded.wanted.target));
            let said = server.publish(&loaded.wanted, &self.live.cancel).map_err(|e| told(target.source, e))?;
            said.into_iter().for_each(|text| self.live.message(Level::Info, text));
            point();
        }
        for Known { target, .. } in known {
            let To::Command { path, entry } = &target.to else { continue };
            journal.commands.push(target.name.clone());
            journal.save()?;
            load::through_command(self.job, target.source, self.contents(place, path, entry), self.live)?;
            point();
        }
        Ok(())
    }
}
