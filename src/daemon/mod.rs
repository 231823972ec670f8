//! The daemon: start, wiring, sd-notify, signals, reload, shutdown.
//!
//! Start goes configuration → log → state directory and its lock → ledger → runs → socket → scheduler → READY; whatever
//! asks a repository comes after READY. Then the main loop answers signals and the watchdog until it is told to stop, and
//! the same way is gone backwards.

pub mod command_line;
mod journal;
mod logging;
mod notify;
mod reload;
mod rest;
mod signals;
pub(crate) mod state_dir;
mod status;
mod watchdog;
mod wiring;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use jiff::Timestamp;
use tokio::sync::{Notify, broadcast, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::command_line::{Exit, complain, count};
use self::notify::Notifier;
use self::reload::Reloader;
use self::signals::{Signals, Wish};
use self::status::Picture;
use self::wiring::ControlParts;
use crate::config::{self, Config};
use crate::control::listener;
use crate::durable;
use crate::ledger::Ledger;
use crate::ledger::lock::StateLock;
use crate::machine;
use crate::run::{Runs, housekeeping};
use crate::schedule::{Scheduler, SystemClock};

/// How long runs may take to reach a safe point at shutdown; below the unit's TimeoutStopSec.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// While stopping, the service manager is asked for this much patience, again and again well before it is over.
const STOP_PATIENCE: Duration = Duration::from_secs(15);
/// How long replies may take to leave after the last run ended.
const GOODBYE: Duration = Duration::from_secs(2);
/// Events kept for a listener that is slow.
const EVENTS: usize = 1024;

/// Runs the daemon until it is told to stop.
fn run(config_path: &Path, verbose: u8) -> Exit {
    // Where it cannot be finished, it counts all the same.
    let change = config::finish_change(config_path);
    let loaded = match machine::load(config_path) {
        Ok(loaded) => loaded,
        Err(problems) => {
            complain(&problems);
            return Exit::Configuration;
        }
    };
    logging::start(verbose);
    match change {
        Ok(true) => tracing::info!("a change of the configuration that was cut off is finished"),
        Ok(false) => {}
        Err(why) => tracing::warn!("a change of the configuration that was cut off counts, but its files cannot be written: {why}"),
    }
    // A missing key must not keep the jobs that need another one from their backups at the next boot.
    loaded.log_problems();
    match start(loaded.config, config_path.to_owned()) {
        Ok(exit) => exit,
        Err(error) => {
            tracing::error!("keepd does not start: {error}");
            Notifier.stopping(&error);
            Exit::Failed
        }
    }
}

/// The part of the start that needs no runtime; errors are for people.
fn start(config: Config, config_path: PathBuf) -> Result<Exit, String> {
    let state_dir = &config.daemon.state_dir;
    state_dir::prepare(state_dir).map_err(|e| e.to_string())?;
    crate::source::way::keep_out(state_dir);
    let _lock = StateLock::acquire(state_dir).map_err(|e| e.to_string())?;
    // Only now is it certain that what was staged there is nobody's.
    state_dir::clear_work(state_dir).map_err(|e| e.to_string())?;
    config::clear_kept(&config_path, &config::previous(state_dir));
    let ledger = Arc::new(Ledger::open(state_dir).map_err(|e| e.to_string())?);
    crate::run::memory::few_pools();
    can_make_threads().map_err(|e| format!("cannot start threads: {e}; raise the limits on memory and tasks"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        // More than all runs, so that permits, the audit log and the questions of others always find one.
        .max_blocking_threads(256)
        .thread_name("keepd")
        .thread_stack_size(1 << 20)
        .enable_all()
        .build()
        .map_err(|e| format!("cannot start threads: {e}"))?;
    let exit = runtime.block_on(serve(config, config_path, ledger));
    // What still blocks now was asked to stop long ago.
    runtime.shutdown_timeout(GOODBYE);
    exit
}

/// What a run that was cut off gave its name may not be on the disk yet. Remembered until it is, for this keepd may end before that, too.
fn doubt_destinations(ledger: &Ledger, config: &Config) -> crate::ledger::Result<()> {
    if ledger.has_unfinished_runs()? {
        ledger.set_note(durable::DOUBTED, "yes")?;
    }
    if ledger.note(durable::DOUBTED)?.is_some_and(|doubted| !doubted.is_empty()) {
        durable::doubt(config.destinations.values().filter_map(|d| d.directory()).map(PathBuf::from));
    }
    Ok(())
}

/// tokio panics where it cannot make a thread, and then waits for ever for those that it made: that is asked before.
fn can_make_threads() -> std::io::Result<()> {
    let gate = Arc::new(std::sync::Mutex::new(()));
    let closed = gate.lock();
    let made: std::io::Result<Vec<std::thread::JoinHandle<()>>> = (0..4)
        .map(|_| {
            let gate = gate.clone();
            std::thread::Builder::new().stack_size(1 << 20).spawn(move || drop(gate.lock()))
        })
        .collect();
    drop(closed);
    made?.into_iter().for_each(|thread| drop(thread.join()));
    Ok(())
}

/// A task whose end, before it was asked for, is the daemon's end.
type Tasks = JoinSet<&'static str>;

const CONTROL: &str = "the service of the control socket";

fn spawn(tasks: &mut Tasks, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
    tasks.spawn(async move {
        task.await;
        name
    });
}

/// Wires the rooms together, says READY, and answers until stopped.
async fn serve(config: Config, config_path: PathBuf, ledger: Arc<Ledger>) -> Result<Exit, String> {
    let notifier = Notifier;
    let started = Timestamp::now();
    let mut signals = Signals::new().map_err(|e| format!("cannot take signals over: {e}"))?;
    let daemon = config.daemon.clone();
    let (jobs, destinations) = (config.jobs.len(), config.destinations.len());
    let current = Arc::new(config::Current::new(config));
    let (events, _) = broadcast::channel(EVENTS);
    doubt_destinations(&ledger, &current.get()).map_err(|e| format!("what an earlier keepd left unfinished cannot be told: {e}"))?;
    let interrupted = ledger
        .close_interrupted_runs(
            "keepd ended before the run did (killed, crashed, or the power failed); what it had stored is used again",
            started,
        )
        .map_err(|e| format!("the runs that an earlier keepd left unfinished could not be closed: {e}"))?;
    if let Err(e) = crate::believed::now(&ledger) {
        tracing::warn!("what was seen of the clock is not known: {e}");
    }
    // Without it nothing is lost but the log: whoever may go on without is told by the calls.
    let _ = ledger.audit(journal::started());
    let runs = Runs::new(current.clone(), ledger.clone(), events.clone());
    let scheduler = Scheduler::new(current.clone(), ledger.clone(), Arc::new(runs.clone()), Arc::new(SystemClock));
    let told = scheduler.clone();
    runs.set_on_finish(move |run| told.job_finished(run));
    let told = scheduler.clone();
    runs.set_on_stopped(move |run| told.job_stopped(run));
    for run in &interrupted {
        let what = run.job.as_deref().or(run.destination.as_deref()).unwrap_or("a backup");
        tracing::warn!(run = run.id, job = run.job, "{} of {what} was interrupted by the end of keepd", run.kind);
        scheduler.job_finished(run);
        runs.audit_end(run);
    }
    let listening = listener::listen(&daemon.socket).map_err(|e| e.to_string())?;
    let mut tasks = Tasks::new();

    let refused = Arc::new(AtomicBool::new(false));
    let picture: Arc<dyn Fn() -> Picture + Send + Sync> = {
        let (runs, scheduler, refused) = (runs.clone(), scheduler.clone(), refused.clone());
        Arc::new(move || Picture { active: runs.active(), next: scheduler.next(), config_refused: refused.load(Ordering::Relaxed) })
    };
    let status_changed = Arc::new(Notify::new());
    let (reload, reloads) = Reloader {
        path: config_path.clone(),
        current: current.clone(),
        events: events.clone(),
        notifier,
        refused,
        changed: {
            let (runs, scheduler, status_changed) = (runs.clone(), scheduler.clone(), status_changed.clone());
            Box::new(move || {
                scheduler.config_changed();
                runs.config_may_have_changed();
                tokio::task::spawn_blocking({
                    let runs = runs.clone();
                    move || runs.audit_config()
                });
                status_changed.notify_one();
                runs.held_back()
            })
        },
        status: picture.clone(),
    }
    .task();
    spawn(&mut tasks, "the reloader", reloads);

    // Before any run of this daemon holds something still.
    runs.recover();
    let stop_schedule = CancellationToken::new();
    spawn(&mut tasks, "housekeeping", housekeeping::keep_house(runs.clone(), stop_schedule.clone()));
    runs.load_imports();
    spawn(&mut tasks, "the clerk of imports", runs.clone().watch_deadlines(stop_schedule.clone()));
    spawn(&mut tasks, "the scheduler", {
        let (scheduler, stop) = (scheduler.clone(), stop_schedule.clone());
        async move { scheduler.run(stop).await }
    });
    // Not told by its end, which is the daemon's.
    let heads = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(journal::keep_head(ledger.clone())));
    let stop_control = CancellationToken::new();
    let parts = ControlParts {
        config: current.clone(),
        ledger: ledger.clone(),
        runs: runs.clone(),
        events: events.clone(),
        scheduler: scheduler.clone(),
        reload: reload.clone(),
        started,
        config_path: config_path.clone(),
    };
    spawn(&mut tasks, CONTROL, wiring::serve_control(listening, parts, stop_control.clone()));

    notifier.ready(&status::line(&picture).await);
    tracing::info!(
        "keepd {} is ready: {}, {}, configuration {}, state in {}, socket {}",
        env!("CARGO_PKG_VERSION"),
        count(jobs, "job", "jobs"),
        count(destinations, "destination", "destinations"),
        config_path.display(),
        daemon.state_dir.display(),
        daemon.socket.display(),
    );
    let line = tokio::spawn(status::follow(notifier, events.subscribe(), status_changed, picture));
    let line = tokio_util::task::AbortOnDropHandle::new(line);
    let resting = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(rest::follow(events.subscribe())));
    let (pulse, mut pulses) = mpsc::channel::<oneshot::Sender<()>>(1);
    if let Some(interval) = sd_notify::watchdog_enabled() {
        let stages = stages(pulse, scheduler.clone(), ledger.clone(), runs.clone());
        spawn(&mut tasks, "the watchdog's feeder", watchdog::feed(interval, stages, notifier));
    }
    runs.sync_catalogue();
    tokio::task::spawn_blocking({
        let runs = runs.clone();
        move || runs.audit_config()
    });
    // It may have been changed before this start.
    runs.config_may_have_changed();

    let by = loop {
        tokio::select! {
            signal = signals.next() => match signal.wish {
                Wish::Reload => {
                    let (reload, ledger) = (reload.clone(), ledger.clone());
                    // Reported by the reloader; here nobody waits for the answer.
                    tokio::spawn(async move {
                        let reloaded = reload.reload(signal.from.clone()).await;
                        journal::write(ledger, move || journal::reloaded(&signal, reloaded.map(|r| r.message))).await;
                    });
                }
                Wish::Stop | Wish::Interrupt => {
                    tracing::info!("stopping ({})", signal.from);
                    break Some(signal);
                }
            },
            Some(answer) = pulses.recv() => {
                let _ = answer.send(());
            }
            Some(ended) = tasks.join_next() => {
                let what = ended.unwrap_or("a part of keepd (see the panic above)");
                tracing::error!("stopping: {what} ended by itself, which is a bug of keepd");
                break None;
            }
        }
    };

    drop((line, resting));
    let active = runs.active().len();
    if active == 0 {
        notifier.stopping("Stopping");
    } else {
        let waiting = format!("waiting for {} to reach a safe point", count(active, "run", "runs"));
        tracing::info!("{waiting}");
        notifier.stopping(&format!("Stopping: {waiting}"));
    }
    stop_schedule.cancel();
    let stopped = stop_runs(&runs, notifier, &mut signals).await;
    // Not before: whoever follows a run wants to see how it ended.
    stop_control.cancel();
    let last_replies = async {
        while let Some(ended) = tasks.join_next().await {
            if matches!(ended, Ok(CONTROL)) {
                break;
            }
        }
    };
    if tokio::time::timeout(GOODBYE, last_replies).await.is_err() {
        tracing::debug!("a control connection did not end in time");
    }
    let broken = by.is_none();
    drop(heads);
    journal::write(ledger.clone(), move || journal::stopped(by.as_ref())).await;
    let _ = tokio::task::spawn_blocking(move || ledger.write_audit_head()).await;
    if stopped && !broken {
        tracing::info!("stopped");
        return Ok(Exit::Good);
    }
    Ok(Exit::Failed)
}

/// Waits until all runs ended; false when they did not in time, or somebody at the keyboard would not wait.
async fn stop_runs(runs: &Arc<Runs>, notifier: Notifier, signals: &mut Signals) -> bool {
    let mut shutdown = std::pin::pin!(runs.shutdown(STOP_LIMIT));
    let mut patience = tokio::time::interval(STOP_PATIENCE / 3);
    loop {
        tokio::select! {
            ended = &mut shutdown => {
                if !ended {
                    let left: Vec<String> = runs.active().iter().map(|r| r.id.clone()).collect();
                    tracing::error!("cut off after {} s: {}; what they stored is reused by the next run", STOP_LIMIT.as_secs(), left.join(", "));
                }
                return ended;
            }
            _ = patience.tick() => notifier.extend(STOP_PATIENCE),
            signal = signals.next() => if signal.wish == Wish::Interrupt {
                tracing::warn!("not waiting any longer for runs to stop ({})", signal.from);
                return false;
            },
        }
    }
}

/// What the watchdog asks: see `watchdog`.
fn stages(
    pulse: mpsc::Sender<oneshot::Sender<()>>,
    scheduler: Arc<Scheduler>,
    ledger: Arc<Ledger>,
    runs: Arc<Runs>,
) -> Vec<watchdog::Stage> {
    let main_loop = move || -> BoxFuture<'static, ()> {
        let pulse = pulse.clone();
        Box::pin(async move {
            let (answer, answered) = oneshot::channel();
            if pulse.send(answer).await.is_ok() {
                let _ = answered.await;
            }
        })
    };
    let schedule = move || -> BoxFuture<'static, ()> {
        let ping = scheduler.ping();
        // A loop that ended answers as little as one that hangs.
        Box::pin(async move {
            if ping.await.is_err() {
                std::future::pending::<()>().await;
            }
        })
    };
    let locks = move || -> BoxFuture<'static, ()> {
        let (ledger, runs) = (ledger.clone(), runs.clone());
        Box::pin(async move {
            let ask = move || {
                // An error is an answer too: a full disk is no hang.
                let _ = ledger.ping();
                let _ = runs.active();
            };
            let _ = tokio::task::spawn_blocking(ask).await;
        })
    };
    vec![
        watchdog::Stage { name: "the main loop", ask: Box::new(main_loop) },
        watchdog::Stage { name: "the scheduler", ask: Box::new(schedule) },
        watchdog::Stage { name: "the ledger or the registry of runs", ask: Box::new(locks) },
    ]
}
