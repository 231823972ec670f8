//! What each command does.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use clap::CommandFactory;
use indicatif::{ProgressBar, ProgressStyle};
use keepd_protocol::MAX_DESCRIPTORS;
use keepd_protocol::methods::*;
use keepd_protocol::model::{
    Backup, BackupPlace, BackupType, BytesPath, ConfigBackupStatus, DestinationStatus, Mark, Outcome, RetentionPlan, Run, RunState,
};
use serde::Serialize;

use crate::arguments::{Arguments, BackupArgument, Command, RestoreTarget, RunCommand};
use crate::client::{Client, socket};
use crate::keys::Keys;
use crate::render::{bytes, entry, escaped, lines, pairs, path, short, sign, sizes, table, time, time_or};
use crate::{Exit, Failure, compare, config, coverage, drill, export, follow, import, in_place, key, remote};
use keepd_protocol::model::escape;

type Result<T, E = Failure> = std::result::Result<T, E>;

/// Carries the command out.
pub fn run(arguments: &Arguments) -> Result<Exit> {
    let is_bridge = matches!(arguments.command, Command::Bridge);
    if !is_bridge {
        remote::choose(&arguments.remote, arguments.socket.as_deref())?;
    }
    let socket = socket(arguments.socket.as_deref());
    let context = Context { arguments, socket: &socket };
    match &arguments.command {
        Command::Completion { shell } => {
            clap_complete::generate(*shell, &mut Arguments::command(), "keepctl", &mut io::stdout());
            Ok(Exit::Good)
        }
        Command::Manual => {
            clap_mangen::Man::new(Arguments::command()).render(&mut io::stdout())?;
            Ok(Exit::Good)
        }
        Command::Bridge => remote::far::run(arguments.socket.as_deref()),
        Command::Status { job } => context.status(job.clone()),
        Command::Backup { job, r#type, label, name, description, detach } => {
            let call = start_backup::In {
                job: job.clone(),
                r#type: backup_type(r#type.as_deref())?,
                name: name.clone(),
                description: description.clone(),
                labels: labels(label)?,
            };
            context.backup(call, *detach)
        }
        Command::List { job, destination, r#type, name, app_version, label } => context.list(list_backups::In {
            job: job.clone(),
            destination: destination.clone(),
            r#type: backup_type(r#type.as_deref())?,
            name: name.clone(),
            version: app_version.clone(),
            labels: labels(label)?,
        }),
        Command::Show(of) => context.show(of),
        Command::Ls { of, path, recursive } => context.ls(of, path.as_deref(), *recursive),
        Command::Cat { of, path, keys } => context.cat(of, path, &keys.open()?),
        Command::Diff { a, b, job } => context.diff(a, b, job.clone()),
        Command::Restore { of, target: RestoreTarget { to: Some(to), .. }, paths, overwrite, numeric_owner, keys, .. } => {
            let paths = paths.iter().map(|p| bytes_path(p)).collect();
            let options = keepd_writer::Options { overwrite: *overwrite, numeric_owner: *numeric_owner, memory: None };
            context.restore(of, to, paths, options, &keys.open()?)
        }
        Command::Restore {
            of,
            target: RestoreTarget { to_database: Some(target), .. },
            paths,
            source,
            database,
            table,
            replace,
            no_owner,
            yes,
            detach,
            keys,
            ..
        } => {
            let keys = keys.open()?;
            if !paths.is_empty() || source.len() > 1 {
                return Err(Failure::new(Exit::Usage, "one database is loaded at a time: name it by --source and --database"));
            }
            let call = start_load::In {
                backup: of.backup.clone(),
                job: of.job.clone(),
                source: source.first().cloned(),
                database: database.clone(),
                target: target.clone(),
                tables: table.clone(),
                replace: *replace,
                no_owner: *no_owner,
                private_keys: keys.places(0),
            };
            context.load(call, &keys, *yes, *detach)
        }
        Command::Restore { of, paths, source, database, table, no_owner, dry_run, no_safety_backup, yes, detach, keys, .. } => {
            let keys = keys.open()?;
            let call = start_in_place::In {
                backup: of.backup.clone(),
                job: of.job.clone(),
                sources: source.clone(),
                paths: paths.iter().map(|p| bytes_path(p)).collect(),
                database: database.clone(),
                tables: table.clone(),
                no_owner: *no_owner,
                no_safety: *no_safety_backup,
                dry_run: *dry_run,
                private_keys: keys.places(0),
            };
            in_place::restore(&context, call, &keys, *yes, *detach)
        }
        Command::Undo { run, dry_run, yes, detach, keys } => {
            let keys = keys.open()?;
            let call = start_undo::In { run: run.clone(), dry_run: *dry_run, private_keys: keys.places(0) };
            in_place::undo(&context, call, &keys, *yes, *detach)
        }
        Command::Export(arguments) => export::run(&context, arguments),
        Command::Copy { of, to, keys } => context.copy(of, to.clone(), &keys.open()?),
        Command::Check { destination, read_data, repair, keys } => {
            let keys = keys.open()?;
            let call = start_check::In {
                destination: destination.clone(),
                read_data: read_data.unwrap_or(0),
                repair: *repair,
                private_keys: keys.places(0),
            };
            let started = context.client()?.call_lending::<StartCheck>(&call, &keys)?;
            context.work(&started.run, true)
        }
        Command::Prune { destination, dry_run, keys } => {
            let keys = keys.open()?;
            let call = start_prune::In { destination: destination.clone(), dry_run: *dry_run, private_keys: keys.places(0) };
            let started = context.client()?.call_lending::<StartPrune>(&call, &keys)?;
            context.work(&started.run, true)
        }
        Command::Key(command) => key::run(&context, command),
        Command::Config(command) => config::run(&context, command),
        Command::Access(command) => crate::access::run(&context, command),
        Command::Audit(command) => crate::audit::run(&context, command),
        Command::Accept(of) => context.mark(of, Mark::Accept),
        Command::Pin(of) => context.mark(of, Mark::Pin),
        Command::Unpin(of) => context.mark(of, Mark::Unpin),
        Command::Retention { job, destination, rules, apply, yes } => {
            let call = show_retention::In { job: job.clone(), destination: destination.clone(), policy: rules.numbers() };
            if *apply { context.retention_apply(call, *yes) } else { context.retention(call) }
        }
        Command::Delete { of, destination, yes } => context.delete(of, destination.clone(), *yes),
        Command::Job(command) => crate::job::run(&context, command),
        Command::Destination(command) => crate::destination::run(&context, command),
        Command::Run(RunCommand::List { job, limit }) => context.run_list(job.clone(), *limit),
        Command::Run(RunCommand::Show { run }) => context.run_show(run),
        Command::Run(RunCommand::Follow { run }) => context.work(run, true),
        Command::Run(RunCommand::Cancel { run }) => {
            context.client()?.call::<CancelRun>(&cancel_run::In { run: run.clone() })?;
            context.done(&serde_json::json!({ "run": run }), "asked to stop at its next safe point")
        }
        Command::Watch => context.watch(),
        Command::Reload => {
            let out = context.client()?.call::<Reload>(&reload::In {})?;
            context.done(&out, &format!("configuration reloaded: {}", escape(&out.message)))
        }
        Command::Compare { of, paths, deep, keys } => compare::compare(arguments, &socket, of, paths, *deep, &keys.open()?),
        Command::Import(options) => import::run(&context, options),
        Command::Coverage(options) => coverage::coverage(arguments, &socket, options),
        Command::Drill { backup, job, detach, keys } => {
            let started = drill::start(&mut context.client()?, backup.clone(), job.clone(), &keys.open()?)?;
            match detach {
                true => context.done(&started, &format!("run {}", escape(&started.run))),
                false => context.work(&started.run, true),
            }
        }
    }
}

fn backup_type(word: Option<&str>) -> Result<Option<BackupType>> {
    word.map(str::parse::<BackupType>).transpose().map_err(|e| Failure::new(Exit::Usage, e))
}

pub fn labels(given: &[String]) -> Result<BTreeMap<String, String>> {
    let pair = |label: &String| label.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
    let wrong = |label: &String| Failure::new(Exit::Usage, format!("'{label}' is no label; write it as key=value"));
    given.iter().map(|label| pair(label).ok_or_else(|| wrong(label))).collect()
}

pub fn bytes_path(path: &OsStr) -> BytesPath {
    BytesPath::from_bytes(path.as_bytes())
}

pub fn print_json(value: &impl Serialize) -> Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
    writeln!(out)?;
    Ok(())
}

pub struct Context<'a> {
    pub arguments: &'a Arguments,
    pub socket: &'a Path,
}

impl Context<'_> {
    pub fn client(&self) -> Result<Client> {
        Client::connect(self.socket)
    }

    pub fn json(&self) -> bool {
        self.arguments.json
    }

    pub fn done(&self, value: &impl Serialize, text: &str) -> Result<Exit> {
        if self.json() {
            print_json(value)?;
        } else if !self.arguments.quiet {
            writeln!(io::stdout(), "{}", escaped(text))?;
        }
        Ok(Exit::Good)
    }

    /// Follows started work to its end.
    pub fn work(&self, run: &str, tell: bool) -> Result<Exit> {
        let run = follow::follow(self.arguments, self.socket, run)?;
        let exit = self.ended(&run, tell)?;
        Ok(self.copies(&run)?.unwrap_or(exit))
    }

    /// Follows the copies of a backup; Partial when one of them failed: it is tried again later, and the backup is made.
    fn copies(&self, run: &Run) -> Result<Option<Exit>> {
        let mut exit = None;
        for id in &run.copies {
            let copy = follow::follow(self.arguments, self.socket, id)?;
            let target = copy.destination.clone().unwrap_or_default();
            if copy.state == RunState::Good {
                if !self.json() && !self.arguments.quiet {
                    writeln!(io::stdout(), "copied to {}, {} added", escape(&target), bytes(copy.progress.added_bytes))?;
                }
                continue;
            }
            follow::conclude(self.arguments, &copy);
            eprintln!("keepctl: the backup is made, but not copied to {} yet; keepd tries again", escape(&target));
            exit = Some(Exit::Partial);
        }
        Ok(exit)
    }

    fn copy(&self, of: &BackupArgument, destination: String, keys: &Keys) -> Result<Exit> {
        let call = start_copy::In { backup: of.backup.clone(), job: of.job.clone(), destination, private_keys: keys.places(0) };
        let run = self.client()?.call_lending::<StartCopy>(&call, keys)?.run;
        self.work(&run, true)
    }

    pub fn destination_test(&self, destination: String) -> Result<Exit> {
        let findings = self.client()?.call::<TestDestination>(&test_destination::In { destination })?.findings;
        let failed = findings.iter().any(|f| f.verdict == "failed");
        if self.json() {
            print_json(&findings)?;
        } else {
            let rows = findings.iter().map(|f| vec![escape(&f.step), escape(&f.verdict), escape(&f.text)]);
            table(&["STEP", "VERDICT", "WHAT"], rows.collect())?;
        }
        Ok(if failed { Exit::Failed } else { Exit::Good })
    }

    pub fn ended(&self, run: &Run, tell: bool) -> Result<Exit> {
        if self.json() {
            print_json(run)?;
        } else if tell && !self.arguments.quiet && matches!(run.state, RunState::Good | RunState::Partial | RunState::Suspect) {
            let mut out = io::stdout().lock();
            for message in run.messages.iter().filter(|m| m.level == keepd_protocol::model::Level::Info) {
                writeln!(out, "{}", lines(&message.text))?;
            }
            match &run.backup {
                Some(id) if run.kind == keepd_protocol::model::RunKind::Backup => writeln!(
                    out,
                    "backup {} is {}: {} entries, {}, {} added",
                    short(id),
                    match run.state {
                        RunState::Good => "made",
                        RunState::Suspect => "made, but suspect ('keepctl accept' makes it good)",
                        _ => "made, but not everything went well",
                    },
                    run.progress.entries,
                    bytes(run.progress.bytes),
                    bytes(run.progress.added_bytes)
                )?,
                _ => {}
            }
        }
        Ok(follow::conclude(self.arguments, run))
    }

    fn status(&self, job: Option<String>) -> Result<Exit> {
        let status = self.client()?.call::<GetStatus>(&get_status::In { job })?.status;
        let overdue = status.jobs.iter().any(|j| j.overdue) || status.destinations.iter().any(|d| !d.overdue.is_empty());
        let exit = if overdue { Exit::Overdue } else { Exit::Good };
        if self.json() {
            print_json(&status)?;
            return Ok(exit);
        }
        let state = |j: &keepd_protocol::model::JobStatus| match (j.overdue, j.enabled, &j.paused_until) {
            (true, _, _) => "OVERDUE".to_owned(),
            (false, false, _) => "disabled".to_owned(),
            (false, true, Some(until)) => format!("paused until {}", time(until)),
            (false, true, None) => j.last_outcome.map_or_else(|| "never ran".to_owned(), |o| o.to_string()),
        };
        let rows = status.jobs.iter().map(|j| {
            let schedule = if j.schedule.is_empty() { "by hand".into() } else { escape(&j.schedule) };
            vec![
                escape(&j.name),
                state(j),
                time_or(j.last_good.as_ref(), "never"),
                time_or(j.last_proven.as_ref(), "never"),
                j.recovery_seconds.map_or_else(|| "-".to_owned(), drill::duration),
                time_or(j.next.as_ref(), "-"),
                schedule,
                format!("{}/{}", j.runs_good, j.runs_failed),
            ]
        });
        table(&["JOB", "STATE", "LAST GOOD", "PROVEN", "RECOVERY", "NEXT", "SCHEDULE", "GOOD/FAILED"], rows.collect())?;
        println!();
        destinations(&status.destinations)?;
        if let Some(counts) = &status.coverage {
            println!("\n{}", coverage::line(counts));
        }
        if let Some(kept) = &status.config_backup {
            println!("\n{}", config_backup(kept));
        }
        for run in &status.running {
            let what = run.job.as_ref().or(run.destination.as_ref()).map(|s| escape(s)).unwrap_or_default();
            println!("\n{} {what}: {} ({}, run {})", run.kind, escape(&run.step), bytes(run.progress.bytes), run.id);
        }
        Ok(exit)
    }

    fn backup(&self, call: start_backup::In, detach: bool) -> Result<Exit> {
        let started = self.client()?.call::<StartBackup>(&call)?;
        if detach {
            return self.done(&started, &format!("run {}", escape(&started.run)));
        }
        self.work(&started.run, true)
    }

    /// Brings a database back into its server.
    fn load(&self, call: start_load::In, keys: &Keys, yes: bool, detach: bool) -> Result<Exit> {
        if call.replace && !yes {
            self.ask(&format!("Replace database {} if it is there (it is kept under another name)?", escape(&call.target)))?;
        }
        let started = self.client()?.call_lending::<StartLoad>(&call, keys)?;
        if detach {
            return self.done(&started, &format!("run {}", escape(&started.run)));
        }
        self.work(&started.run, true)
    }

    fn list(&self, call: list_backups::In) -> Result<Exit> {
        let mut all: Vec<Backup> = Vec::new();
        self.client()?.call_more::<ListBackups>(&call, |out| {
            all.extend(out.backups);
            Ok(())
        })?;
        if self.json() {
            print_json(&all)?;
            return Ok(Exit::Good);
        }
        let rows = all.iter().filter(|b| b.is_at_hand()).map(|b| {
            let mut outcome = if b.partial { format!("{}, partial", b.outcome) } else { b.outcome.to_string() };
            if b.pinned {
                outcome.push_str(", pinned");
            }
            if b.proven.is_some() {
                outcome.push_str(", proven");
            }
            let places = b.destinations.iter().filter(|d| d.is_configured()).map(|d| escape(&d.name)).collect::<Vec<_>>().join(", ");
            let name = b
                .name
                .iter()
                .cloned()
                .chain(b.version.iter().map(|v| format!("version {v}")))
                .chain(b.labels.iter().map(|(k, v)| format!("{k}={v}")))
                .map(|s| escape(&s))
                .collect::<Vec<_>>()
                .join(" ");
            vec![
                short(&b.id),
                escape(&b.job),
                time(&b.time),
                b.r#type.to_string(),
                outcome,
                bytes(b.bytes),
                bytes(b.added_bytes),
                places,
                name,
            ]
        });
        table(&["BACKUP", "JOB", "TIME", "TYPE", "OUTCOME", "SIZE", "ADDED", "ON", "NAME"], rows.collect())?;
        let away: Vec<&Backup> = all.iter().filter(|b| !b.is_at_hand()).collect();
        if !away.is_empty() && !self.arguments.quiet {
            let places: BTreeSet<String> = away.iter().flat_map(|b| &b.destinations).map(|d| escape(&d.name)).collect();
            let places = places.into_iter().collect::<Vec<_>>().join(", ");
            let backups = if away.len() == 1 { "1 backup that lies".to_owned() } else { format!("{} backups that lie", away.len()) };
            eprintln!("keepctl: not listed: {backups} only at destinations that are no longer configured ({places})");
        }
        Ok(Exit::Good)
    }

    fn show(&self, of: &BackupArgument) -> Result<Exit> {
        let b = self.client()?.call::<ShowBackup>(&show_backup::In { backup: of.backup.clone(), job: of.job.clone() })?.backup;
        let exit = if b.backup.outcome == Outcome::Good && !b.backup.partial { Exit::Good } else { Exit::Partial };
        if self.json() {
            // The fields of `list` stand at the top, as there.
            let mut value = serde_json::to_value(&b.backup).map_err(Failure::failed)?;
            let rest = serde_json::to_value(&b).map_err(Failure::failed)?;
            if let (Some(top), Some(rest)) = (value.as_object_mut(), rest.as_object()) {
                rest.iter().filter(|(k, _)| *k != "backup").for_each(|(k, v)| drop(top.insert(k.clone(), v.clone())));
            }
            print_json(&value)?;
            return Ok(exit);
        }
        let status = |d: &BackupPlace| if d.is_configured() { escape(&d.status) } else { "no longer configured".into() };
        let places = b.backup.destinations.iter().map(|d| format!("{} ({})", escape(&d.name), status(d))).collect::<Vec<_>>().join(", ");
        let labels = b.backup.labels.iter().map(|(k, v)| format!("{}={}", escape(k), escape(v))).collect::<Vec<_>>().join(" ");
        let taken = b.proven_seconds.map(|s| format!(", restored and checked in {}", drill::duration(s))).unwrap_or_default();
        let proven = b.backup.proven.as_ref().map(|at| format!("{}{taken}", time(at))).unwrap_or_default();
        pairs(&[
            ("backup", b.backup.id.clone()),
            ("job", escape(&b.backup.job)),
            ("name", b.backup.name.as_deref().map(escape).unwrap_or_default()),
            ("description", b.backup.description.as_deref().map(escape).unwrap_or_default()),
            ("version", b.backup.version.as_deref().map(escape).unwrap_or_default()),
            ("schema version", b.backup.schema_version.as_deref().map(escape).unwrap_or_default()),
            ("labels", labels),
            ("type", b.backup.r#type.to_string()),
            ("outcome", if b.backup.partial { format!("{}, partial", b.backup.outcome) } else { b.backup.outcome.to_string() }),
            ("started", time(&b.started)),
            ("finished", time(&b.finished)),
            ("proven", proven),
            ("suspect", b.suspect.iter().map(|reason| escape(reason)).collect::<Vec<_>>().join("; ")),
            ("on", places),
            ("size", format!("{} in {} files and {} directories", bytes(b.backup.bytes), b.files, b.directories)),
            ("added", bytes(b.backup.added_bytes)),
            ("host", escape(&b.host)),
            ("keepd", escape(&b.keepd_version)),
            ("sequence", b.sequence.to_string()),
            ("run", b.run.clone()),
        ])?;
        for source in &b.sources {
            println!(
                "\nsource {} ({}) from {}: {} entries, {}",
                escape(&source.name),
                source.kind,
                escape(&source.path),
                source.entries,
                bytes(source.bytes)
            );
            for (name, fact) in &source.facts {
                println!("  {}: {}", escape(name), escape(&fact.to_string()));
            }
        }
        for message in &b.messages {
            println!("{}: {}", message.level, lines(&message.text));
        }
        Ok(exit)
    }

    fn ls(&self, of: &BackupArgument, below: Option<&OsStr>, recursive: bool) -> Result<Exit> {
        let call = list_entries::In { backup: of.backup.clone(), job: of.job.clone(), path: below.map(bytes_path), recursive };
        let mut out = io::BufWriter::new(io::stdout().lock());
        let mut first = true;
        let json = self.json();
        if json {
            write!(out, "[")?;
        }
        self.client()?.call_more::<ListEntries>(&call, |page| {
            for e in &page.entries {
                if json {
                    write!(out, "{}\n  ", if first { "" } else { "," })?;
                    serde_json::to_writer(&mut out, e).map_err(io::Error::from)?;
                    first = false;
                } else {
                    writeln!(out, "{}", entry(e))?;
                }
            }
            Ok(())
        })?;
        if json {
            writeln!(out, "\n]")?;
        }
        out.flush()?;
        Ok(Exit::Good)
    }

    fn cat(&self, of: &BackupArgument, file: &OsStr, keys: &Keys) -> Result<Exit> {
        let (mut reader, writer) = pipe()?;
        let call = start_cat::In { backup: of.backup.clone(), job: of.job.clone(), path: bytes_path(file), private_keys: keys.places(1) };
        let started = self.client()?.call_writing::<StartCat>(&call, writer.as_fd(), keys)?;
        drop(writer);
        let guard = follow::interrupt(self.socket, &started.run)?;
        let copied = to_stdout(&mut reader);
        drop(reader);
        let copied = copied?;
        drop(guard);
        let run = quiet_end(self.socket, &started.run)?;
        remote::settle()?;
        if run.state == RunState::Good && copied != started.bytes {
            return Err(Failure::failed(format!("{copied} of {} bytes came", started.bytes)));
        }
        Ok(follow::conclude(self.arguments, &run))
    }

    fn diff(&self, a: &str, b: &str, job: Option<String>) -> Result<Exit> {
        let mut all = Vec::new();
        let json = self.json();
        let mut out = io::BufWriter::new(io::stdout().lock());
        self.client()?.call_more::<DiffBackups>(&diff_backups::In { a: a.to_owned(), b: b.to_owned(), job }, |page| {
            for change in page.changes {
                if json {
                    all.push(change);
                    continue;
                }
                let sizes = sizes(change.size_before, change.size_after);
                writeln!(out, "{} {}{sizes}", sign(change.change), path(&change.path))?;
            }
            Ok(())
        })?;
        out.flush()?;
        drop(out);
        if json {
            print_json(&all)?;
        }
        Ok(Exit::Good)
    }

    fn restore(
        &self,
        of: &BackupArgument,
        to: &Path,
        paths: Vec<BytesPath>,
        mut options: keepd_writer::Options,
        keys: &Keys,
    ) -> Result<Exit> {
        let (reader, writer) = pipe()?;
        let mut descriptors: Vec<_> = std::iter::once(writer.as_fd()).chain(keys.descriptors()).collect();
        // Another machine sees none of this one's memory.
        let can_lend = remote::host().is_none() && descriptors.len() + 2 <= MAX_DESCRIPTORS;
        let (memory, offer) = can_lend.then(|| keepd_writer::Memory::offer().ok()).flatten().unzip();
        options.memory = memory;
        let place = offer.is_some().then_some(descriptors.len() as u32);
        if let Some(offer) = &offer {
            descriptors.extend([offer.memory.as_fd(), offer.returned.as_fd()]);
        }
        let call = start_restore::In {
            backup: of.backup.clone(),
            job: of.job.clone(),
            paths,
            private_keys: keys.places(1),
            memory: place,
            returned: place.map(|place| place + 1),
        };
        let started = self.client()?.call_with::<StartRestore>(&call, &descriptors)?;
        drop((writer, offer));
        let guard = follow::interrupt(self.socket, &started.run)?;
        let bar = match self.arguments.quiet || self.arguments.no_progress || self.json() || !io::stderr().is_terminal() {
            true => ProgressBar::hidden(),
            false => ProgressBar::new(started.bytes),
        };
        bar.set_style(
            ProgressStyle::with_template("{spinner} restoring [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}")
                .unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        let written = keepd_writer::write(reader, to, options, &|_, done| bar.set_position(done));
        drop(guard);
        bar.finish_and_clear();
        let run = quiet_end(self.socket, &started.run);
        // What lies in the directory comes first, also where the daemon cannot be asked any more.
        let outcome = match written {
            Ok(outcome) => outcome,
            Err(keepd_writer::RestoreError(text)) => {
                if let (true, Ok(run)) = (self.json(), &run) {
                    print_json(run)?;
                }
                let (exit, cause) = match &run {
                    Ok(run) => (Exit::Failed, run.error.as_ref().filter(|e| !e.contains("client went away"))),
                    Err(failure) => (failure.exit, Some(&failure.text)),
                };
                let cause = cause.filter(|e| !text.contains(e.as_str())).map(|e| format!(" ({})", escape(e))).unwrap_or_default();
                return Err(Failure::new(exit, format!("the restore to {} is not complete: {}{cause}", to.display(), escape(&text))));
            }
        };
        let run = run.map_err(|failure| {
            let text = format!("everything was restored to {}, but how the run ended is not known: {}", to.display(), failure.text);
            Failure::new(failure.exit, text)
        })?;
        for message in run.messages.iter().filter(|m| m.level != keepd_protocol::model::Level::Info) {
            eprintln!("{}: {}", message.level, lines(&message.text));
        }
        for warning in &outcome.warnings {
            eprintln!("warning: {warning}");
        }
        if outcome.warnings_total > outcome.warnings.len() as u64 {
            eprintln!("({} more warnings)", outcome.warnings_total - outcome.warnings.len() as u64);
        }
        if self.json() {
            print_json(&run)?;
        } else if !self.arguments.quiet {
            println!(
                "restored {} entries, {} of backup {} to {}",
                outcome.entries,
                bytes(outcome.bytes),
                short(&started.backup),
                to.display()
            );
        }
        match (run.state, outcome.warnings_total) {
            (RunState::Good, 0) => Ok(Exit::Good),
            (RunState::Good, _) => Ok(Exit::Partial),
            _ => Ok(follow::conclude(self.arguments, &run)),
        }
    }

    fn mark(&self, of: &BackupArgument, mark: Mark) -> Result<Exit> {
        let call = mark_backup::In { backup: of.backup.clone(), job: of.job.clone(), mark };
        let backup = self.client()?.call::<MarkBackup>(&call)?.backup;
        let what = match mark {
            Mark::Accept => "accepted: it is good now",
            Mark::Pin => "pinned: it stays whatever retention says",
            Mark::Unpin => "no longer pinned",
        };
        let text = format!("backup {} of job {} from {} is {what}", short(&backup.id), escape(&backup.job), time(&backup.time));
        self.done(&backup, &text)
    }

    fn retention(&self, call: show_retention::In) -> Result<Exit> {
        let plans = self.client()?.call::<ShowRetention>(&call)?.plans;
        if self.json() {
            print_json(&plans)?;
            return Ok(Exit::Good);
        }
        for (n, plan) in plans.iter().enumerate() {
            if n > 0 {
                println!();
            }
            print_plan(plan)?;
        }
        Ok(Exit::Good)
    }

    fn retention_apply(&self, call: show_retention::In, yes: bool) -> Result<Exit> {
        let plans = self.client()?.call::<ShowRetention>(&call)?.plans;
        let removes: u64 = plans.iter().map(|p| p.removes).sum();
        if removes > 0 && !yes {
            if !io::stdin().is_terminal() {
                let text = format!("{removes} backups would be removed and this asks first; without a terminal say --yes");
                return Err(Failure::new(Exit::Usage, text));
            }
            for plan in &plans {
                print_plan(plan)?;
            }
            self.ask(&format!("remove {removes} backups of job {}?", escape(&call.job)))?;
        }
        let started = self.client()?.call::<StartRetention>(&start_retention::In { job: call.job, destination: call.destination })?;
        self.work(&started.run, true)
    }

    /// Anything but yes is an error.
    pub fn ask(&self, question: &str) -> Result<()> {
        if !io::stdin().is_terminal() {
            return Err(Failure::new(Exit::Usage, "this asks first; without a terminal say --yes"));
        }
        eprint!("{question} [y/N] ");
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        match answer.trim() {
            "y" | "Y" | "yes" => Ok(()),
            _ => Err(Failure::failed("nothing was changed")),
        }
    }

    fn delete(&self, of: &BackupArgument, destination: Option<String>, yes: bool) -> Result<Exit> {
        let found = self.client()?.call::<ShowBackup>(&show_backup::In { backup: of.backup.clone(), job: of.job.clone() })?.backup.backup;
        if !yes {
            self.ask(&format!("delete backup {} of job {} from {}?", short(&found.id), escape(&found.job), time(&found.time)))?;
        }
        let started = self.client()?.call::<StartDelete>(&start_delete::In { backup: found.id, job: None, destination })?;
        self.work(&started.run, true)
    }

    pub fn job_list(&self) -> Result<Exit> {
        let jobs = self.client()?.call::<ListJobs>(&list_jobs::In {})?.jobs;
        if self.json() {
            print_json(&jobs)?;
            return Ok(Exit::Good);
        }
        let rows = jobs.iter().map(|j| {
            let enabled = match (j.enabled, &j.paused_until) {
                (false, _) => "no".to_owned(),
                (true, Some(until)) => format!("paused until {}", time(until)),
                (true, None) => "yes".to_owned(),
            };
            vec![escape(&j.name), enabled, escape(&j.schedule), time_or(j.next.as_ref(), "-"), time_or(j.last_start.as_ref(), "never")]
        });
        table(&["JOB", "ENABLED", "SCHEDULE", "NEXT", "LAST START"], rows.collect())?;
        Ok(Exit::Good)
    }

    pub fn job_show(&self, job: &str) -> Result<Exit> {
        let j = self.client()?.call::<ShowJob>(&show_job::In { job: job.to_owned() })?.job;
        if self.json() {
            print_json(&j)?;
            return Ok(Exit::Good);
        }
        let retention = j.retention.iter().map(|(k, v)| format!("{k} = {v}")).collect::<Vec<_>>().join(", ");
        pairs(&[
            ("job", escape(&j.status.name)),
            ("enabled", if j.status.enabled { "yes" } else { "no" }.into()),
            ("schedule", escape(&j.status.schedule)),
            ("timezone", j.timezone.as_deref().map(escape).unwrap_or_default()),
            ("paused until", time_or(j.status.paused_until.as_ref(), "")),
            ("next", time_or(j.status.next.as_ref(), "-")),
            ("once", j.status.once.iter().map(|at| time(at)).collect::<Vec<_>>().join(", ")),
            ("last good", time_or(j.status.last_good.as_ref(), "never")),
            ("last proven", time_or(j.status.last_proven.as_ref(), "never")),
            ("recovery takes", j.status.recovery_seconds.map(drill::duration).unwrap_or_default()),
            ("overdue", if j.status.overdue { "yes" } else { "no" }.into()),
            ("destinations", escape(&j.destinations.join(", "))),
            ("retention", if retention.is_empty() { "everything is kept".into() } else { retention }),
            ("retry", format!("{} attempts, {} s apart at first", j.retry_attempts, j.retry_backoff_seconds)),
        ])?;
        for source in &j.sources {
            println!("source {}: {} {}", escape(&source.name), source.kind, escape(&source.path));
        }
        Ok(Exit::Good)
    }

    pub fn destination_list(&self) -> Result<Exit> {
        let found = self.client()?.call::<GetStatus>(&get_status::In::default())?.status.destinations;
        if self.json() {
            print_json(&found)?;
        } else {
            destinations(&found)?;
        }
        Ok(Exit::Good)
    }

    pub fn destination_show(&self, name: &str) -> Result<Exit> {
        let found = self.client()?.call::<GetStatus>(&get_status::In::default())?.status.destinations;
        let Some(d) = found.iter().find(|d| d.name == name) else {
            let known = found.iter().map(|d| escape(&d.name)).collect::<Vec<_>>().join(", ");
            return Err(Failure::failed(format!("there is no destination '{}'; configured are: {known}", escape(name))));
        };
        if self.json() {
            print_json(d)?;
            return Ok(Exit::Good);
        }
        let missing = d.missing.iter().map(|(job, n)| format!("{n} of {}", escape(job))).collect::<Vec<_>>().join(", ");
        pairs(&[
            ("destination", escape(&d.name)),
            ("service", escape(&d.service)),
            ("where", escape(&d.location)),
            ("encryption", escape(&d.encryption)),
            ("key", d.fingerprint.as_deref().map(escape).unwrap_or_default()),
            ("compression", escape(&d.compression)),
            ("backups", d.backups.to_string()),
            ("last good", time_or(d.last_good.as_ref(), "never")),
            ("not copied yet", missing),
            ("overdue", d.overdue.iter().map(|job| escape(job)).collect::<Vec<_>>().join(", ")),
            ("problem", d.error.as_deref().map(lines).unwrap_or_default()),
        ])?;
        Ok(Exit::Good)
    }

    fn run_list(&self, job: Option<String>, limit: u32) -> Result<Exit> {
        let runs = self.client()?.call::<ListRuns>(&list_runs::In { job, limit: Some(limit) })?.runs;
        if self.json() {
            print_json(&runs)?;
            return Ok(Exit::Good);
        }
        let rows = runs.iter().map(|r| {
            let what = r.job.as_ref().or(r.destination.as_ref()).map(|s| escape(s)).unwrap_or_default();
            vec![
                r.id.clone(),
                r.kind.to_string(),
                what,
                r.state.to_string(),
                time(&r.queued),
                escape(&r.by),
                r.error.as_deref().map(escape).unwrap_or_default(),
            ]
        });
        table(&["RUN", "KIND", "OF", "STATE", "QUEUED", "BY", "ERROR"], rows.collect())?;
        Ok(Exit::Good)
    }

    fn run_show(&self, id: &str) -> Result<Exit> {
        let run = self.client()?.call::<ShowRun>(&show_run::In { run: id.to_owned() })?.run;
        if self.json() {
            print_json(&run)?;
            return Ok(follow::exit(run.state));
        }
        pairs(&[
            ("run", escape(&run.id)),
            ("kind", run.kind.to_string()),
            ("state", run.state.to_string()),
            ("job", run.job.as_deref().map(escape).unwrap_or_default()),
            ("destination", run.destination.as_deref().map(escape).unwrap_or_default()),
            ("backup", run.backup.clone().unwrap_or_default()),
            ("queued", time(&run.queued)),
            ("started", time_or(run.started.as_ref(), "")),
            ("finished", time_or(run.finished.as_ref(), "")),
            ("by", escape(&run.by)),
            (
                "progress",
                format!("{} entries, {}, {} added", run.progress.entries, bytes(run.progress.bytes), bytes(run.progress.added_bytes)),
            ),
            ("error", run.error.as_deref().map(lines).unwrap_or_default()),
        ])?;
        for step in &run.steps {
            println!("  {} {}", step.seconds.map_or_else(|| "     …  ".into(), |s| format!("{s:7.2} s")), escape(&step.name));
        }
        for message in &run.messages {
            println!("{} {}: {}", time(&message.time), message.level, lines(&message.text));
        }
        Ok(follow::exit(run.state))
    }

    fn watch(&self) -> Result<Exit> {
        self.client()?.call_more::<Watch>(&watch::In {}, |out| {
            let mut stdout = io::stdout().lock();
            if self.json() {
                // One document a line: the stream has no end.
                serde_json::to_writer(&mut stdout, &out.event).map_err(io::Error::from)?;
                writeln!(stdout)?;
            } else {
                let e = &out.event;
                let of = e.job.iter().chain(&e.run).map(|s| escape(s)).collect::<Vec<_>>().join(" ");
                let state = e.state.map(|s| format!(" {s}")).unwrap_or_default();
                writeln!(stdout, "{} {}{state} {of} {}", time(&e.time), e.kind, escape(&e.text))?;
            }
            stdout.flush()?;
            Ok(())
        })?;
        Ok(Exit::Good)
    }
}

fn destinations(list: &[DestinationStatus]) -> Result<()> {
    let rows = list.iter().map(|d| {
        let mut notes: Vec<String> = d.missing.iter().map(|(job, n)| format!("{n} backups of {} not copied yet", escape(job))).collect();
        notes.extend(d.overdue.iter().map(|job| format!("{} overdue", escape(job))));
        notes.extend(d.error.as_ref().map(|e| escape(e)));
        let state = if notes.is_empty() { "ok".to_owned() } else { notes.join("; ") };
        vec![
            escape(&d.name),
            escape(&d.location),
            d.fingerprint.as_ref().map_or_else(|| escape(&d.encryption), |f| format!("{} ({})", escape(&d.encryption), escape(f))),
            d.backups.to_string(),
            time_or(d.last_good.as_ref(), "never"),
            state,
        ]
    });
    Ok(table(&["DESTINATION", "WHERE", "ENCRYPTION", "BACKUPS", "LAST GOOD", "STATE"], rows.collect())?)
}

fn print_plan(plan: &RetentionPlan) -> Result<()> {
    let rules = |rules: &BTreeMap<String, u64>| match rules.is_empty() {
        true => "every backup is kept".to_owned(),
        false => rules
            .iter()
            .map(|(name, n)| if name == "keep_within" { format!("{name} = {n} s") } else { format!("{name} = {n}") })
            .collect::<Vec<_>>()
            .join(", "),
    };
    let simulated = if plan.simulated { " (tried, not in force)" } else { "" };
    println!("job {} at {}: {}{simulated}", escape(&plan.job), escape(&plan.destination), rules(&plan.policy));
    let rows = plan.verdicts.iter().map(|v| {
        let what = match (v.quarantined, v.keep) {
            (true, _) => "quarantined",
            (false, true) => "keep",
            (false, false) => "remove",
        };
        let falls = match v.keep {
            true => time_or(v.falls.as_ref(), "-"),
            false => "now".into(),
        };
        let outcome = if v.proven.is_some() { format!("{}, proven", v.outcome) } else { v.outcome.to_string() };
        vec![short(&v.id), time(&v.time), outcome, what.into(), falls, escape(&v.reasons.join("; "))]
    });
    table(&["BACKUP", "TIME", "OUTCOME", "", "FALLS", "WHY"], rows.collect())?;
    if plan.removes > 0 {
        println!("{} of {} backups would be removed", plan.removes, plan.verdicts.len());
    }
    if plan.held_back > 0 {
        println!(
            "{} of them are held back: the rules were changed (before: {}); 'keepctl retention {} --apply' confirms them",
            plan.held_back,
            rules(&plan.in_force),
            escape(&plan.job)
        );
    }
    Ok(())
}

pub fn pipe() -> Result<(File, std::os::fd::OwnedFd)> {
    let (reader, writer) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| Failure::failed(format!("no pipe can be made: {e}")))?;
    Ok((File::from(reader), writer))
}

/// Copies all of it to standard output, where it is when this returns.
pub fn to_stdout(from: &mut impl io::Read) -> io::Result<u64> {
    let mut out = io::stdout().lock();
    let copied = io::copy(from, &mut out)?;
    out.flush()?;
    Ok(copied)
}

/// Waits for a run whose data came through a pipe to be over.
pub fn quiet_end(socket: &Path, id: &str) -> Result<Run> {
    let mut last = None;
    Client::connect(socket)?.call_more::<FollowRun>(&follow_run::In { run: id.to_owned() }, |out| {
        last = Some(out.run);
        Ok(())
    })?;
    last.ok_or_else(|| Failure::failed("keepd told nothing of the run"))
}

/// The line of `status` about the configuration itself.
fn config_backup(kept: &ConfigBackupStatus) -> String {
    let last = kept.last_outcome.map_or_else(|| "never ran".to_owned(), |o| o.to_string());
    let good = time_or(kept.last_good.as_ref(), "never");
    let next = time_or(kept.next.as_ref(), "-");
    format!("configuration to {}: {last}, last good {good}, next {next}", escape(&kept.destination))
}
