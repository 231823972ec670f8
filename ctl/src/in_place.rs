//! A restore in place: its plan is shown, then asked about, then carried out.

use std::io::{self, Write};

use keepd_protocol::methods::*;
use keepd_protocol::model::{ChangeKind, PlannedSource, RestorePlan, RunState, escape};

use crate::commands::{Context, print_json};
use crate::keys::Keys;
use crate::render::{bytes, path, short, time};
use crate::{Exit, Failure, follow};

type Result<T> = std::result::Result<T, Failure>;

pub fn restore(context: &Context<'_>, call: start_in_place::In, keys: &Keys, yes: bool, detach: bool) -> Result<Exit> {
    let dry_run = call.dry_run;
    let start = |dry_run: bool| {
        let call = start_in_place::In { dry_run, ..call.clone() };
        Ok(context.client()?.call_lending::<StartInPlace>(&call, keys)?.run)
    };
    carry_out(context, &start, dry_run, yes, detach)
}

pub fn undo(context: &Context<'_>, call: start_undo::In, keys: &Keys, yes: bool, detach: bool) -> Result<Exit> {
    let start = |dry_run: bool| {
        let call = start_undo::In { dry_run, ..call.clone() };
        Ok(context.client()?.call_lending::<StartUndo>(&call, keys)?.run)
    };
    carry_out(context, &start, call.dry_run, yes, detach)
}

fn carry_out(context: &Context<'_>, start: &dyn Fn(bool) -> Result<String>, dry_run: bool, yes: bool, detach: bool) -> Result<Exit> {
    if dry_run || !yes {
        let run = follow::follow(context.arguments, context.socket, &start(true)?)?;
        if dry_run && context.json() {
            print_json(&run)?;
        } else if let Some(plan) = &run.plan {
            // What is asked about must be seen, whatever goes to standard output.
            let mut out: Box<dyn Write> = if context.json() { Box::new(io::stderr()) } else { Box::new(io::stdout()) };
            show(plan, out.as_mut())?;
        }
        if dry_run || run.state != RunState::Good {
            return Ok(follow::conclude(context.arguments, &run));
        }
        context.ask("Carry this out?")?;
    }
    let run = start(false)?;
    if detach {
        return context.done(&serde_json::json!({ "run": run }), &format!("run {}", escape(&run)));
    }
    context.work(&run, true)
}

fn show(plan: &RestorePlan, out: &mut dyn Write) -> Result<()> {
    writeln!(out, "backup {} of job {} from {}, in place:", short(&plan.backup), escape(&plan.job), time(&plan.time))?;
    for source in &plan.sources {
        show_source(source, out)?;
    }
    for service in &plan.services {
        let what = if service.running { "is stopped meanwhile" } else { "does not run, and is not started" };
        writeln!(out, "service {} {what}", escape(&service.name))?;
    }
    if plan.version.is_some() || plan.version_now.is_some() {
        let version = |v: &Option<String>| v.as_ref().map_or_else(|| "unknown".to_owned(), |v| escape(v));
        writeln!(out, "version {} in the backup, {} now", version(&plan.version), version(&plan.version_now))?;
    }
    for space in plan.file_systems.iter().filter(|s| s.needed > 0) {
        writeln!(out, "{}: {} needed, {} free", escape(&space.path), bytes(space.needed), bytes(space.free))?;
    }
    for note in &plan.notes {
        writeln!(out, "note: {}", escape(note))?;
    }
    for problem in &plan.problems {
        writeln!(out, "PROBLEM: {}", escape(problem))?;
    }
    Ok(())
}

fn show_source(source: &PlannedSource, out: &mut dyn Write) -> Result<()> {
    let counts = format!(
        "{} written ({}), {} removed, {} with other owner, mode or time",
        source.written,
        bytes(source.bytes),
        source.removed,
        source.described
    );
    let what = match (source.kind.as_str(), source.written + source.removed + source.described) {
        ("files", 0) => "nothing differs".to_owned(),
        ("files", _) => counts,
        _ => bytes(source.bytes),
    };
    let more = if source.text.is_empty() { String::new() } else { format!("; {}", escape(&source.text)) };
    writeln!(out, "{} ({}) → {}: {what}{more}", escape(&source.name), escape(&source.kind), escape(&source.target))?;
    for change in &source.changes {
        let sign = match change.change {
            ChangeKind::Added => '+',
            ChangeKind::Removed => '-',
            ChangeKind::Modified => 'M',
            ChangeKind::Metadata => 'm',
        };
        writeln!(out, "  {sign} {}", path(&change.path))?;
    }
    let rest = (source.written + source.removed + source.described).saturating_sub(source.changes.len() as u64);
    if rest > 0 && !source.changes.is_empty() {
        writeln!(out, "  … and {rest} more")?;
    }
    Ok(())
}
