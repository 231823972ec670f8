//! `keepctl job`: jobs shown, made, changed, held and planned.

use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, Subcommand};
use jiff::{SignedDuration, Timestamp};
use keepd_protocol::configuration::{ConfigEdit, EditKind, LeftBackups};
use keepd_protocol::methods::*;
use keepd_protocol::model::escape;
use serde_json::{Map, Value, json};

use crate::arguments::seconds;
use crate::change::{self, Changing, Keys};
use crate::commands::Context;
use crate::render::time;
use crate::{Exit, Failure, editor, follow, remote};

type Result<T> = std::result::Result<T, Failure>;

#[derive(Subcommand)]
pub enum JobCommand {
    /// All jobs, and when they run
    List,
    /// A job as it is configured, and how it does
    Show { job: String },
    /// Make a job, in a file of its own in conf.d
    Add(Box<AddArguments>),
    /// Change a job: by options, or without any in $VISUAL or $EDITOR
    Edit(Box<EditArguments>),
    /// Take a job out of the configuration; asks what becomes of its backups
    Remove(RemoveArguments),
    /// Have the schedule start a job again
    Enable {
        job: String,
        #[command(flatten)]
        how: Changing,
    },
    /// Have the schedule start a job no more
    Disable {
        job: String,
        #[command(flatten)]
        how: Changing,
    },
    /// Have the schedule start a job no more until a time; what falls due until then is not made up
    #[command(group = ArgGroup::new("end").required(true))]
    Pause {
        job: String,
        /// RFC 3339, or without an offset in the job's timezone: 2026-12-24T18:00, 2026-12-24
        #[arg(long, value_name = "TIME", group = "end")]
        until: Option<String>,
        /// Such as 36h, 3d, 2w
        #[arg(long = "for", value_name = "DURATION", value_parser = seconds, group = "end")]
        duration: Option<u64>,
        #[command(flatten)]
        how: Changing,
    },
    /// End a pause
    Resume {
        job: String,
        #[command(flatten)]
        how: Changing,
    },
    /// Have a job run once at a time, beside its schedule
    RunAt {
        job: String,
        /// RFC 3339, or without an offset in the job's timezone: 2026-12-24T18:00
        #[arg(required_unless_present = "cancel")]
        time: Option<String>,
        /// Not at this time after all; without one at none that was planned
        #[arg(long)]
        cancel: bool,
    },
}

/// What most jobs have.
#[derive(Args, Clone)]
#[command(group = ArgGroup::new("when").multiple(false))]
pub struct JobOptions {
    /// Where the backups go; may be repeated
    #[arg(long, value_name = "NAME")]
    destination: Vec<String>,
    /// A cron expression, such as '30 2 * * *' or @daily
    #[arg(long, value_name = "CRON", group = "when")]
    schedule: Option<String>,
    /// Such as 6h
    #[arg(long, value_name = "DURATION", group = "when")]
    every: Option<String>,
    /// Once, in the job's timezone: 2026-12-24T18:00
    #[arg(long, value_name = "TIME", group = "when")]
    at: Option<String>,
    /// IANA name
    #[arg(long, value_name = "ZONE")]
    timezone: Option<String>,
    /// Overdue without a good backup for so long, such as 26h
    #[arg(long, value_name = "DURATION")]
    max_age: Option<String>,
    /// A rule and its number, such as keep_daily=7; may be repeated
    #[arg(long, value_name = "RULE=N")]
    retention: Vec<String>,
    #[command(flatten)]
    keys: Keys,
}

#[derive(Args, Clone)]
pub struct AddArguments {
    job: String,
    /// A SQLite database; may be repeated
    #[arg(long, value_name = "PATH")]
    sqlite: Vec<PathBuf>,
    /// A directory, or a file; may be repeated
    #[arg(long, value_name = "PATH")]
    files: Vec<PathBuf>,
    /// A database of the PostgreSQL on this machine ('*': all); may be repeated
    #[arg(long, value_name = "DATABASE")]
    postgres: Vec<String>,
    /// A database of the MySQL or MariaDB on this machine ('*': all); may be repeated
    #[arg(long, value_name = "DATABASE")]
    mysql: Vec<String>,
    #[command(flatten)]
    options: JobOptions,
    /// TOML of the job as it is to stand in the file ('-': standard input)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["sqlite", "files", "postgres", "mysql", "destination", "when", "timezone", "max_age", "retention", "set", "unset"])]
    from: Option<PathBuf>,
    #[command(flatten)]
    how: Changing,
}

#[derive(Args, Clone)]
pub struct EditArguments {
    job: String,
    #[command(flatten)]
    options: JobOptions,
    #[command(flatten)]
    how: Changing,
}

#[derive(Args, Clone)]
pub struct RemoveArguments {
    job: String,
    /// Its backups stay, and no retention removes them
    #[arg(long)]
    keep_backups: bool,
    /// Its backups are deleted at all destinations, but pinned ones
    #[arg(long, conflicts_with = "keep_backups")]
    delete_backups: bool,
    #[command(flatten)]
    how: Changing,
    /// Do not wait until the backups are deleted
    #[arg(long)]
    detach: bool,
}

pub fn run(context: &Context<'_>, command: &JobCommand) -> Result<Exit> {
    match command {
        JobCommand::List => context.job_list(),
        JobCommand::Show { job } => context.job_show(job),
        JobCommand::Add(arguments) => add(context, arguments),
        JobCommand::Edit(arguments) => {
            let mut values = Map::new();
            arguments.options.put_into(&mut values, true)?;
            match values.is_empty() {
                true => editor::edit(context, &item(&arguments.job), &arguments.how),
                false => patch(context, &arguments.job, values, &arguments.how),
            }
        }
        JobCommand::Remove(arguments) => remove(context, arguments),
        JobCommand::Enable { job, how } => enable(context, job, true, how),
        JobCommand::Disable { job, how } => enable(context, job, false, how),
        JobCommand::Pause { job, until, duration, how } => {
            let until = match (until, duration) {
                (Some(until), _) => until.clone(),
                (None, duration) => after(duration.unwrap_or_default())?,
            };
            patch(context, job, one("paused_until", until.into()), how)
        }
        JobCommand::Resume { job, how } => patch(context, job, one("paused_until", Value::Null), how),
        JobCommand::RunAt { job, time, cancel } => run_at(context, job, time.as_ref(), *cancel),
    }
}

fn item(job: &str) -> String {
    format!("job.{job}")
}

fn one(key: &str, value: Value) -> Map<String, Value> {
    [(key.to_owned(), value)].into_iter().collect()
}

fn patch(context: &Context<'_>, job: &str, values: Map<String, Value>, how: &Changing) -> Result<Exit> {
    change::change(context, change::edit(&item(job), EditKind::Patch, values), how)
}

/// A whole second, as the configuration has it.
fn after(seconds: u64) -> Result<String> {
    let too_far = || Failure::new(Exit::Usage, "that is further away than any calendar goes");
    let seconds = i64::try_from(seconds).map_err(|_| too_far())?;
    let end = Timestamp::now().checked_add(SignedDuration::from_secs(seconds)).map_err(|_| too_far())?;
    Ok(end.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
}

/// True or false for whoever reads it; a job that says nothing is enabled, and stays as it is written.
fn enable(context: &Context<'_>, job: &str, enabled: bool, how: &Changing) -> Result<Exit> {
    let plan = |value: Value| change::plan(context, vec![change::edit(&item(job), EditKind::Patch, one("enabled", value))], None);
    let mut planned = plan(if enabled { Value::Null } else { false.into() })?;
    if enabled && !planned.is_nothing() {
        planned = plan(true.into())?;
    }
    change::make(context, planned, how, None, "change the configuration so?")?;
    Ok(Exit::Good)
}

impl JobOptions {
    /// `is_there`: the job is, and another way to say when it runs takes the place of the one that it has.
    fn put_into(&self, values: &mut Map<String, Value>, is_there: bool) -> Result<()> {
        if !self.destination.is_empty() {
            values.insert("destinations".into(), self.destination.clone().into());
        }
        let when = [("schedule", &self.schedule), ("every", &self.every), ("at", &self.at)];
        if when.iter().any(|(_, given)| given.is_some()) {
            for (key, given) in when.into_iter().filter(|(_, given)| is_there || given.is_some()) {
                values.insert(key.into(), given.clone().into());
            }
        }
        for (key, given) in [("timezone", &self.timezone), ("max_age", &self.max_age)] {
            values.extend(given.clone().map(|given| (key.to_owned(), Value::from(given))));
        }
        for rule in &self.retention {
            let (key, number) = rule.split_once('=').ok_or_else(|| {
                Failure::new(Exit::Usage, format!("--retention {} has no number; write it as keep_daily=7", escape(rule)))
            })?;
            let number = number.trim();
            let value = number.parse::<u64>().map_or_else(|_| Value::from(number), Value::from);
            values.insert(format!("retention.{}", key.trim()), value);
        }
        self.keys.put_into(values)
    }
}

fn add(context: &Context<'_>, arguments: &AddArguments) -> Result<Exit> {
    let item = item(&arguments.job);
    if let Some(from) = &arguments.from {
        let text = read(from)?;
        let edit = ConfigEdit { item, change: EditKind::Add, text: Some(text), ..ConfigEdit::default() };
        return change::change(context, edit, &arguments.how);
    }
    let mut values = Map::new();
    let mut sources = Vec::new();
    for (kind, paths) in [("sqlite", &arguments.sqlite), ("files", &arguments.files)] {
        for path in paths {
            if let Some(host) = remote::host().filter(|_| path.is_relative()) {
                let text = format!("--{kind} {} says not where that is on {}; give the whole path", path.display(), escape(&host));
                return Err(Failure::new(Exit::Usage, text));
            }
            let absolute =
                std::path::absolute(path).map_err(|e| Failure::failed(format!("cannot tell where {} is: {e}", path.display())))?;
            let text = absolute.to_str().ok_or_else(|| {
                Failure::failed(format!("the path {} is no text and cannot stand in the configuration", absolute.display()))
            })?;
            sources.push(json!({ (kind): text }));
        }
    }
    for (kind, databases) in [("postgres", &arguments.postgres), ("mysql", &arguments.mysql)] {
        sources.extend(databases.iter().map(|name| json!({ (kind): { "dbname": name } })));
    }
    if !sources.is_empty() {
        values.insert("source".into(), sources.into());
    }
    arguments.options.put_into(&mut values, false)?;
    change::change(context, change::edit(&item, EditKind::Add, values), &arguments.how)
}

/// The text of a file that the caller names.
pub fn read(from: &Path) -> Result<String> {
    const LONGEST: u64 = 1 << 20;
    let failed = |why: &dyn std::fmt::Display| Failure::failed(format!("cannot read {}: {why}", from.display()));
    let mut bytes = Vec::new();
    let read = match from == Path::new("-") {
        true => io::stdin().lock().take(LONGEST + 1).read_to_end(&mut bytes),
        false => std::fs::File::open(from).and_then(|file| file.take(LONGEST + 1).read_to_end(&mut bytes)),
    };
    read.map_err(|e| failed(&e))?;
    if bytes.len() as u64 > LONGEST {
        return Err(failed(&format!("it is longer than {} KiB", LONGEST >> 10)));
    }
    String::from_utf8(bytes).map_err(|_| failed(&"it is no UTF-8 text"))
}

fn remove(context: &Context<'_>, arguments: &RemoveArguments) -> Result<Exit> {
    let how = &arguments.how;
    let job = escape(&arguments.job);
    let planned = change::plan(context, vec![change::edit(&item(&arguments.job), EditKind::Remove, Map::new())], None)?;
    let backups = planned.out.backups;
    let left = match (arguments.keep_backups, arguments.delete_backups) {
        (true, _) => Some(LeftBackups::Keep),
        (_, true) => Some(LeftBackups::Delete),
        _ if backups == 0 || how.dry_run => None,
        _ if how.yes || !io::stdin().is_terminal() => {
            let text = format!(
                "nothing was changed: there are {backups} backups of {job}; say whether they stay (--keep-backups) or are deleted (--delete-backups)"
            );
            return Err(Failure::new(Exit::Usage, text));
        }
        _ => Some(left_backups(&job, backups)?),
    };
    let what = match left {
        Some(LeftBackups::Delete) if backups > 0 => format!("remove job {job} and DELETE its {backups} backups?"),
        Some(LeftBackups::Keep) if backups > 0 => format!("remove job {job} and keep its {backups} backups?"),
        _ => format!("remove job {job}?"),
    };
    let Some(done) = change::make(context, planned, how, left, &what)? else { return Ok(Exit::Good) };
    let mut exits = vec![if done.not_deleted.is_empty() { Exit::Good } else { Exit::Partial }];
    done.not_deleted.iter().for_each(|text| eprintln!("keepctl: {}", escape(text)));
    for run in done.runs.iter().filter(|_| !arguments.detach) {
        exits.push(match context.json() {
            // What was printed is all that there is of JSON.
            true => follow::conclude(context.arguments, &follow::follow(context.arguments, context.socket, run)?),
            false => context.work(run, true)?,
        });
    }
    // Of several the worst.
    let worst = exits.into_iter().max_by_key(|exit| match exit {
        Exit::Good => 0,
        Exit::Partial => 1,
        _ => 2,
    });
    Ok(worst.unwrap_or(Exit::Good))
}

fn left_backups(job: &str, backups: u64) -> Result<LeftBackups> {
    loop {
        eprint!("there are {backups} backups of {job}: keep or delete them? [k/d] ");
        let mut answer = String::new();
        if io::stdin().read_line(&mut answer)? == 0 {
            return Err(Failure::failed("nothing was changed"));
        }
        match answer.trim() {
            "k" | "keep" => return Ok(LeftBackups::Keep),
            "d" | "delete" => return Ok(LeftBackups::Delete),
            _ => {}
        }
    }
}

fn run_at(context: &Context<'_>, job: &str, at: Option<&String>, cancel: bool) -> Result<Exit> {
    let call = schedule_once::In { job: job.to_owned(), at: at.cloned(), cancel };
    let planned = context.client()?.call::<ScheduleOnce>(&call)?;
    let times = planned.once.iter().map(|at| time(at)).collect::<Vec<_>>().join(", ");
    let text = if times.is_empty() {
        format!("{} runs by its schedule only", escape(job))
    } else {
        format!("{} runs once at {times}", escape(job))
    };
    context.done(&planned, &text)
}
