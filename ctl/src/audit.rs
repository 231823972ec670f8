//! `keepctl audit`: who did what.

use std::io::{self, Write};

use clap::{Args, Subcommand};
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, Zoned};
use keepd_protocol::audit::{AuditEntry, AuditResult, AuditVerified, PublishedHead};
use keepd_protocol::methods::*;
use keepd_protocol::model::escape;
use serde_json::Value;

use crate::commands::{Context, print_json};
use crate::render::{table, time};
use crate::{Exit, Failure};

/// Shown to people where nobody says how many.
const SHOWN: u64 = 100;
const MAX_WHAT: usize = 120;

#[derive(Subcommand)]
pub enum AuditCommand {
    /// What was done by whom, oldest first
    List(ListArguments),
    /// Prove that nothing in the log was changed, removed or put in
    Verify {
        /// Do not ask the destinations for the heads that were published there
        #[arg(long)]
        offline: bool,
    },
}

#[derive(Args, Clone)]
pub struct ListArguments {
    /// At most so many, the newest (100 for people, all with --json and --jsonl)
    #[arg(short = 'n', value_name = "N")]
    newest: Option<u64>,
    /// Only what stands behind this number
    #[arg(long, value_name = "NUMBER")]
    after: Option<u64>,
    /// Not before: 2026-11-22, '2026-11-22 14:00', RFC 3339, or how long ago: 2d, 6h
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<Timestamp>,
    /// Not after, in the same ways
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<Timestamp>,
    /// Only by this user: who called, or who logged in
    #[arg(long, value_name = "NAME|UID")]
    user: Option<String>,
    /// Only this: a method such as StartDelete, or start, stop, reload, run, config_changed, removed, retention
    #[arg(long, value_name = "ACTION")]
    action: Option<String>,
    /// Only what was refused
    #[arg(long)]
    refused: bool,
    /// One JSON object a line, as they come
    #[arg(long)]
    jsonl: bool,
}

/// An instant as people write it; civil times are of the local zone.
fn moment(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    if let Ok(civil) = text.parse::<DateTime>() {
        return civil.to_zoned(TimeZone::system()).map(|zoned| zoned.timestamp()).map_err(|e| e.to_string());
    }
    let ago = text.parse::<Span>().ok().and_then(|span| Zoned::now().checked_sub(span.abs()).ok());
    ago.map(|zoned| zoned.timestamp()).ok_or_else(|| "no time such as 2026-11-22, '2026-11-22 14:00', 2026-11-22T14:00:00Z or 2d".into())
}

pub fn run(context: &Context<'_>, command: &AuditCommand) -> Result<Exit, Failure> {
    match command {
        AuditCommand::List(arguments) => list(context, arguments),
        AuditCommand::Verify { offline } => {
            let verified = context.client()?.call::<VerifyAudit>(&verify_audit::In { offline: *offline })?.verified;
            let exit = exit_of(&verified);
            if context.json() {
                print_json(&verified)?;
            } else if !(context.arguments.quiet && exit == Exit::Good) {
                show(&verified)?;
            }
            Ok(exit)
        }
    }
}

fn list(context: &Context<'_>, arguments: &ListArguments) -> Result<Exit, Failure> {
    let is_for_people = !context.json() && !arguments.jsonl;
    let parameters = list_audit::In {
        after: arguments.after,
        newest: arguments.newest.or(is_for_people.then_some(SHOWN)),
        since: arguments.since.map(|time| time.to_string()),
        until: arguments.until.map(|time| time.to_string()),
        user: arguments.user.clone(),
        action: arguments.action.clone(),
        result: arguments.refused.then_some(AuditResult::Refused),
    };
    let mut all = Vec::new();
    context.client()?.call_more::<ListAudit>(&parameters, |out| {
        if !arguments.jsonl {
            all.extend(out.entries);
            return Ok(());
        }
        let mut lines = io::stdout().lock();
        for entry in &out.entries {
            serde_json::to_writer(&mut lines, entry).map_err(io::Error::from)?;
            writeln!(lines)?;
        }
        Ok(lines.flush()?)
    })?;
    if arguments.jsonl {
        return Ok(Exit::Good);
    }
    if context.json() {
        print_json(&all)?;
    } else {
        let verbose = context.arguments.verbose;
        let header = ["NUMBER", "TIME", "USER", "ACTION", "RESULT", "ON", if verbose { "CALLED BY" } else { "" }];
        table(&header, all.iter().map(|entry| row(entry, verbose)).collect())?;
    }
    Ok(Exit::Good)
}

fn row(entry: &AuditEntry, verbose: bool) -> Vec<String> {
    let user = match &entry.login {
        Some(login) => format!("{} ({})", escape(&entry.user), escape(login)),
        None => escape(&entry.user),
    };
    let times = entry.times.map(|n| format!(" ({n} times)")).unwrap_or_default();
    let mut what: Vec<String> = entry.on.iter().map(|(name, value)| format!("{} {}", escape(name), words(value))).collect();
    what.extend(entry.run.iter().map(|run| format!("run {}", escape(run))));
    what.extend(entry.begun.map(|begun| format!("begun as {begun}")));
    let mut what = what.join(", ");
    if !verbose && what.chars().count() > MAX_WHAT {
        what = what.chars().take(MAX_WHAT).chain(['…']).collect();
    }
    if let Some(message) = &entry.message {
        what = if what.is_empty() { escape(message) } else { format!("{what}: {}", escape(message)) };
    }
    let caller = match verbose {
        true => {
            let pid = entry.pid.map(|pid| format!("process {pid}"));
            [pid, entry.command.as_deref().map(escape), entry.origin.as_deref().map(escape)]
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
                .join(", ")
        }
        false => String::new(),
    };
    let result = match entry.result {
        AuditResult::Begun => "begun",
        AuditResult::Refused => "refused",
        AuditResult::Done => "done",
        AuditResult::Failed => "failed",
    };
    vec![entry.seq.to_string(), time(&entry.time), user, format!("{}{times}", escape(&entry.action)), result.to_owned(), what, caller]
}

/// A value of `on` in words; no quotation marks around what needs none.
fn words(value: &Value) -> String {
    match value {
        Value::String(text) => escape(text),
        Value::Array(list) => list.iter().map(words).collect::<Vec<_>>().join(" "),
        Value::Object(map) => map.iter().map(|(name, value)| format!("{}={}", escape(name), words(value))).collect::<Vec<_>>().join(" "),
        other => other.to_string(),
    }
}

fn exit_of(verified: &AuditVerified) -> Exit {
    match () {
        () if verified.broken.is_some() || verified.heads.iter().any(|head| head.agrees == Some(false)) => Exit::Failed,
        () if !verified.problems.is_empty() || verified.heads.iter().any(|head| head.agrees.is_none()) => Exit::Partial,
        () => Exit::Good,
    }
}

fn show(verified: &AuditVerified) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match &verified.broken {
        Some(broken) => writeln!(out, "BROKEN at entry {}: {}", broken.seq, escape(&broken.why))?,
        None => writeln!(out, "entries {} to {} are whole, the head is {}", verified.first, verified.last, escape(&verified.head))?,
    }
    for problem in &verified.problems {
        writeln!(out, "entry {} says: {}", problem.seq, escape(&problem.why))?;
    }
    for PublishedHead { destination, seq, time: at, agrees, message } in &verified.heads {
        let word = match agrees {
            Some(true) => "agrees",
            Some(false) => "DIFFERS",
            None => "not known",
        };
        let entry = if *seq > 0 { format!(" entry {seq}") } else { String::new() };
        let at = at.as_ref().map(|t| format!(" of {}", time(t))).unwrap_or_default();
        let message = message.as_ref().map(|m| format!(" ({})", escape(m))).unwrap_or_default();
        writeln!(out, "{}:{entry}{at} {word}{message}", escape(destination))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_people_write_them() {
        assert_eq!(moment("2026-11-22T14:00:00Z").unwrap().to_string(), "2026-11-22T14:00:00Z");
        assert!(moment("2026-11-22").is_ok() && moment("2026-11-22 14:00").is_ok());
        let ago = Timestamp::now().as_second() - moment("2d").unwrap().as_second();
        assert!((169_000..176_500).contains(&ago), "{ago}");
        assert!(moment("yesterday-ish").unwrap_err().contains("2d"));
    }

    #[test]
    fn nothing_in_an_entry_moves_the_cursor() {
        let bad = "\u{1b}[2J\n\u{202e}x".to_owned();
        let mut entry = AuditEntry {
            user: bad.clone(),
            login: Some(bad.clone()),
            action: bad.clone(),
            message: Some(bad.clone()),
            ..AuditEntry::default()
        };
        (entry.command, entry.origin, entry.run, entry.time) = (Some(bad.clone()), Some(bad.clone()), Some(bad.clone()), bad.clone());
        entry.on.insert(bad.clone(), serde_json::json!([bad, { "a\u{1b}": bad }]));
        let text = row(&entry, true).join("|");
        assert!(!text.contains(|c: char| c.is_control() || c == '\u{202e}'), "{text:?}");
    }
}
