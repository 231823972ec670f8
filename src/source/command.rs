//! What a command prints, as one file.
//!
//! In: a program of the user's. Out: its output, taken as it is, when it ended with exit status 0 and printed enough.

use std::time::Duration;

use super::{Context, Facts, Merge, Previous, SourceError, dump};
use crate::config::{CommandSource, Program};
use crate::process::{Job, Pipes};
use crate::repository::EntrySink;
use keepd_protocol::model::Level;

/// A configured program, ready to start.
pub fn job<'a>(program: &'a Program, environment: Vec<(&'a str, std::ffi::OsString)>) -> Job<'a> {
    Job { environment, run_as: program.run_as.as_deref(), ..Job::new(program.command.iter().cloned()) }
}

/// Captures a command's output into the sink.
pub fn capture(
    source: &CommandSource,
    job_name: &str,
    previous: &mut dyn Previous,
    sink: &mut dyn EntrySink,
    context: &Context<'_>,
) -> Result<Facts, SourceError> {
    sink.push(dump::directory())?;
    context.report.entry();
    let before = Merge::new(previous).at(source.file.as_bytes())?;
    let running = job(&source.program, vec![("KEEPD_JOB", job_name.into())]).start(Pipes::Output)?;
    let patience: Duration = source.program.timeout;
    let captured = dump::capture(running, &source.file, patience, before.as_ref(), &mut |_| Ok(()), sink, context)?;
    captured.ended.good()?;
    let bytes = captured.counts.bytes;
    if bytes < source.min_size {
        let said = if captured.ended.said.is_empty() { String::new() } else { format!("; it said: {}", captured.ended.said) };
        let program = source.program.command.first().map(String::as_str).unwrap_or_default();
        return Err(SourceError::Failed(format!(
            "{program} ended with exit status 0 and printed {bytes} bytes, at least {} are wanted (min_size){said}",
            source.min_size
        )));
    }
    if !captured.ended.said.is_empty() {
        context.report.message(Level::Info, format!("{}: {}", source.file, captured.ended.said));
    }
    sink.push(captured.entry)?;
    context.report.entry();
    Ok(Facts::from([
        ("exit_status".into(), 0.into()),
        ("changed_bytes".into(), captured.counts.new_bytes.into()),
        ("said".into(), captured.ended.said.into()),
    ]))
}
