//! Following a run: a bar on a terminal, lines elsewhere, and its outcome as an exit status.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use keepd_protocol::methods::{CancelRun, FollowRun, cancel_run, follow_run};
use keepd_protocol::model::{Level, Run, RunState};

use crate::arguments::Arguments;
use crate::client::Client;
use crate::render::{bytes, lines};
use crate::{Exit, Failure, signals};
use keepd_protocol::model::escape;

/// Messages printed at the end; the run keeps more.
const MAX_MESSAGES: usize = 20;
const LINE_EVERY: Duration = Duration::from_secs(10);

/// How a run's progress is shown.
enum Shown {
    Nothing,
    Lines { step: String, last: Instant },
    Bar(ProgressBar),
}

/// Follows a run to its end; Ctrl-C asks it to stop, a second one leaves it to itself.
pub fn follow(arguments: &Arguments, socket: &Path, id: &str) -> Result<Run, Failure> {
    let mut client = Client::connect(socket)?;
    let mut shown = Shown::new(arguments);
    let guard = interrupt(socket, id)?;
    let mut last = None;
    client.call_more::<FollowRun>(&follow_run::In { run: id.to_owned() }, |out| {
        shown.update(&out.run);
        last = Some(out.run);
        Ok(())
    })?;
    drop(guard);
    if let Shown::Bar(bar) = &shown {
        bar.finish_and_clear();
    }
    match last {
        Some(run) if run.state.is_finished() => Ok(run),
        Some(run) => Err(Failure::failed(format!("keepd told nothing of how run {} ended; 'keepctl run show {0}' may", escape(&run.id)))),
        None => Err(Failure::failed("keepd told nothing of the run")),
    }
}

/// Prints what a run left behind and turns its state into an exit status.
pub fn conclude(arguments: &Arguments, run: &Run) -> Exit {
    let told: Vec<_> = run.messages.iter().filter(|m| m.level != Level::Info || arguments.verbose).collect();
    for message in told.iter().rev().take(MAX_MESSAGES).rev() {
        eprintln!("{}: {}", message.level, lines(&message.text));
    }
    if told.len() > MAX_MESSAGES {
        eprintln!("({} more; 'keepctl run show {}' has them)", told.len() - MAX_MESSAGES, escape(&run.id));
    }
    if let Some(error) = &run.error {
        eprintln!("keepctl: {}", lines(error));
    }
    if run.state == RunState::Cancelled {
        eprintln!("keepctl: run {} was cancelled", escape(&run.id));
    }
    exit(run.state)
}

pub fn exit(state: RunState) -> Exit {
    match state {
        RunState::Good | RunState::Queued | RunState::Running => Exit::Good,
        RunState::Partial | RunState::Suspect => Exit::Partial,
        RunState::Failed | RunState::Cancelled => Exit::Failed,
    }
}

/// Catches Ctrl-C until dropped.
pub struct Interrupt {
    ids: Vec<signal_hook::SigId>,
    _held: signals::Held,
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        for id in self.ids.drain(..) {
            signal_hook::low_level::unregister(id);
        }
    }
}

/// The first Ctrl-C asks the daemon to cancel the run (through a connection of its own), the second ends keepctl.
pub fn interrupt(socket: &Path, run: &str) -> Result<Interrupt, Failure> {
    use signal_hook::consts::SIGINT;
    let count = Arc::new(AtomicUsize::new(0));
    let armed = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let held = signals::Held::interrupt();
    // Order matters: the second signal finds the flag set by the first and ends the process.
    let first = signal_hook::flag::register_conditional_shutdown(SIGINT, 130, armed.clone())?;
    let second = signal_hook::flag::register(SIGINT, armed.clone())?;
    let (socket, run) = (socket.to_owned(), run.to_owned());
    std::thread::spawn(move || {
        while !armed.load(Ordering::Relaxed) && Arc::strong_count(&armed) > 1 {
            std::thread::sleep(Duration::from_millis(100));
        }
        if armed.load(Ordering::Relaxed) && count.fetch_add(1, Ordering::Relaxed) == 0 {
            eprintln!("keepctl: asking keepd to cancel the run; Ctrl-C again leaves it to itself");
            if let Ok(mut client) = Client::connect(&socket) {
                let _ = client.call::<CancelRun>(&cancel_run::In { run });
            }
        }
    });
    Ok(Interrupt { ids: vec![first, second], _held: held })
}

impl Shown {
    fn new(arguments: &Arguments) -> Self {
        if arguments.quiet || arguments.no_progress || arguments.json {
            return Shown::Nothing;
        }
        if !std::io::stderr().is_terminal() {
            return Shown::Lines { step: String::new(), last: Instant::now() };
        }
        let bar = ProgressBar::no_length();
        bar.enable_steady_tick(Duration::from_millis(200));
        Shown::Bar(bar)
    }

    fn update(&mut self, run: &Run) {
        let p = &run.progress;
        match self {
            Shown::Nothing => {}
            Shown::Lines { step, last } => {
                let fresh = *step != run.step && !run.step.is_empty();
                if fresh || (last.elapsed() >= LINE_EVERY && !run.state.is_finished()) {
                    let percent = p.percent.map(|n| format!(", {n:.0} %")).unwrap_or_default();
                    eprintln!("{}: {} entries, {}{percent}", escape(&run.step), p.entries, bytes(p.bytes));
                    step.clone_from(&run.step);
                    *last = Instant::now();
                }
            }
            Shown::Bar(bar) => {
                bar.set_message(escape(&run.step));
                match p.total_bytes {
                    Some(total) => {
                        bar.set_length(total.max(p.bytes));
                        bar.set_style(style("{spinner} {msg} [{bar:30}] {bytes}/{total_bytes} {percent} % {bytes_per_sec} {eta}"));
                    }
                    None => bar.set_style(style("{spinner} {msg} {bytes} {bytes_per_sec}")),
                }
                bar.set_position(p.bytes);
            }
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
