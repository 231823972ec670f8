//! The daemon's life: wiring, signals, reload, shutdown.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use keepd_protocol::model::{Event, EventKind};
use sd_notify::NotifyState;
use signal_hook::consts::signal::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::exfiltrator::WithOrigin;
use signal_hook_tokio::SignalsInfo;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{logging, notify};
use crate::config::{self, Config, Severity};
use crate::control::{self, App, Control, Reloaded, listener};
use crate::ledger::Ledger;
use crate::ledger::lock::StateLock;
use crate::run::Runs;
use crate::schedule::{Scheduler, SystemClock};

/// Runs get this long to reach a safe point after SIGTERM; the unit's stop time is longer.
const STOP_LIMIT: Duration = Duration::from_secs(60);
const EVENTS_KEPT: usize = 1024;

/// Why the daemon ended or did not start.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DaemonError(String);

fn failed(error: impl std::fmt::Display) -> DaemonError {
    DaemonError(error.to_string())
}

/// Runs the daemon in the foreground until a signal ends it.
pub fn run(path: PathBuf, config: Config) -> Result<(), DaemonError> {
    logging::set_up();
    make_state_dir(&config.daemon.state_dir)?;
    let _lock = StateLock::acquire(&config.daemon.state_dir).map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(64)
        .thread_name("keepd")
        .enable_all()
        .build()
        .map_err(|e| DaemonError(format!("the async runtime cannot be started: {e}")))?;
    let result = runtime.block_on(serve(path, config));
    // What still blocks (a storage that does not answer) must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(2));
    result
}

fn make_state_dir(dir: &Path) -> Result<(), DaemonError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| DaemonError(format!("cannot make the state directory {}: {e}", dir.display())))?;
    // What a run staged and did not remove before it was killed.
    let work = dir.join("work");
    match std::fs::remove_dir_all(&work) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(DaemonError(format!("cannot clear {}: {e}", work.display()))),
        _ => Ok(()),
    }
}

type ReloadRequest = (String, oneshot::Sender<Reloaded>);

async fn serve(path: PathBuf, config: Config) -> Result<(), DaemonError> {
    let started = Timestamp::now();
    let socket_path = config.daemon.socket.clone();
    let ledger = Arc::new(Ledger::open(&config.daemon.state_dir).map_err(failed)?);
    let reason = "keepd ended before the run did (killed, crashed, or the power failed); what it had stored is used again";
    let interrupted = ledger.close_interrupted_runs(reason, started).map_err(failed)?;
    for run in &interrupted {
        tracing::warn!(run = %run.id, job = run.job.as_deref().unwrap_or("-"), "the run was interrupted by the end of keepd");
    }
    let jobs = config.jobs.len();
    let current = Arc::new(config::Current::new(config));
    let (events, _) = broadcast::channel::<Event>(EVENTS_KEPT);
    let runs = Runs::new(current.clone(), ledger.clone(), events.clone());
    let scheduler = Scheduler::new(current.clone(), ledger.clone(), Arc::new(runs.clone()), Arc::new(SystemClock));
    let told = scheduler.clone();
    runs.set_on_finish(move |run| told.job_finished(run));
    interrupted.iter().for_each(|run| scheduler.job_finished(run));
    let listening = listener::listen(&socket_path).map_err(failed)?;
    let mut signals =
        SignalsInfo::<WithOrigin>::new([SIGHUP, SIGTERM, SIGINT]).map_err(|e| DaemonError(format!("signals cannot be caught: {e}")))?;
    let (reloads, mut reload_requests) = mpsc::channel::<ReloadRequest>(8);
    let stop = CancellationToken::new();
    let listener = listening.listener.try_clone().map_err(|e| DaemonError(format!("the control socket: {e}")))?;
    let ask_reload = reloads.clone();
    let status = scheduler.clone();
    let app = Arc::new(App {
        config: current.clone(),
        ledger: ledger.clone(),
        runs: runs.clone(),
        events: events.clone(),
        reload: Box::new(move || {
            let reloads = ask_reload.clone();
            Box::pin(async move {
                let (sender, receiver) = oneshot::channel();
                let gone = || "keepd is stopping".to_owned();
                reloads.send(("keepctl".into(), sender)).await.map_err(|_| gone())?;
                receiver.await.map_err(|_| gone())?
            })
        }),
        job_status: Box::new(move |name| status.job_status(name)),
        started,
        config_path: path.clone(),
    });
    let control = tokio::spawn(control::transport::serve(listener, Arc::new(Control { app }), stop.clone()));
    let schedule = {
        let (scheduler, stop) = (scheduler.clone(), stop.clone());
        tokio::spawn(async move { scheduler.run(stop).await })
    };
    notify::ready(&notify::status_text(&runs, &scheduler));
    tracing::info!(version = env!("CARGO_PKG_VERSION"), jobs, socket = %socket_path.display(), "keepd is ready");
    runs.sync_catalogue();
    tokio::spawn(notify::keep_status(runs.clone(), scheduler.clone(), events.subscribe(), stop.clone()));
    tokio::spawn(notify::feed_watchdog(scheduler.clone(), ledger.clone(), stop.clone()));
    loop {
        tokio::select! {
            signal = signals.next() => match signal {
                Some(origin) if origin.signal == SIGHUP => {
                    let who = origin.process.map(|p| format!("process {} of user {}", p.pid, p.uid)).unwrap_or_else(|| "the kernel".into());
                    let _ = reload(&path, &current, &scheduler, &events, &format!("SIGHUP from {who}")).await;
                }
                Some(origin) => {
                    tracing::info!(signal = origin.signal, "stopping");
                    break;
                }
                None => break,
            },
            Some((who, answer)) = reload_requests.recv() => {
                let _ = answer.send(reload(&path, &current, &scheduler, &events, &who).await);
            }
        }
    }
    let waiting = runs.active().len();
    let extend = u32::try_from((STOP_LIMIT + Duration::from_secs(10)).as_micros()).unwrap_or(u32::MAX);
    notify::tell(&[NotifyState::Stopping, NotifyState::Status(&format!("stopping; {waiting} runs come to a safe point"))]);
    notify::tell(&[NotifyState::ExtendTimeoutUsec(extend)]);
    let ended = tokio::select! {
        ended = runs.shutdown(STOP_LIMIT) => ended,
        _ = async { loop { if signals.next().await.is_none_or(|o| o.signal != SIGHUP) { break } } } => {
            tracing::warn!("a second signal: stopping at once");
            false
        }
    };
    stop.cancel();
    let _ = tokio::time::timeout(Duration::from_secs(2), async { (control.await, schedule.await) }).await;
    drop(listening);
    match ended {
        true => tracing::info!("keepd has stopped"),
        false => tracing::warn!("keepd stops although runs have not ended; what they stored is used again"),
    }
    Ok(())
}

/// Takes a new configuration up, or keeps the old one and says what is wrong. A run in progress keeps what it began with.
async fn reload(path: &Path, current: &config::Current, scheduler: &Scheduler, events: &broadcast::Sender<Event>, who: &str) -> Reloaded {
    let now = sd_notify::NotifyState::monotonic_usec_now();
    match now {
        Ok(now) => notify::tell(&[NotifyState::Reloading, now]),
        Err(_) => notify::tell(&[NotifyState::Reloading]),
    }
    let (path, old) = (path.to_owned(), current.get());
    let loaded = tokio::task::spawn_blocking(move || {
        let loaded = config::load(&path).map_err(|problems| problems.to_string())?;
        let (errors, warnings): (Vec<_>, Vec<_>) = config::check_files(&loaded).into_iter().partition(|p| p.severity == Severity::Error);
        let lines = |problems: Vec<config::Problem>| problems.iter().map(ToString::to_string).collect::<Vec<_>>();
        match errors.is_empty() {
            true => Ok((loaded, lines(warnings))),
            false => Err(lines(errors).join("\n")),
        }
    })
    .await
    .unwrap_or_else(|e| Err(e.to_string()));
    let event = |kind, text: &str| Event { time: Timestamp::now().to_string(), kind, text: text.to_owned(), ..Event::default() };
    let result = match loaded {
        Ok((mut loaded, warnings)) => {
            let jobs = loaded.jobs.len() as u32;
            let mut notes: Vec<String> = warnings;
            let restart = (
                loaded.daemon.state_dir != old.daemon.state_dir,
                loaded.daemon.socket != old.daemon.socket,
                loaded.daemon.max_parallel_runs != old.daemon.max_parallel_runs,
            );
            if restart != (false, false, false) {
                notes.push(
                    "changes of daemon.state_dir, daemon.socket and daemon.max_parallel_runs need a restart; the old values stay".into(),
                );
                loaded.daemon = old.daemon.clone();
            }
            current.set(loaded);
            scheduler.config_changed();
            let text = std::iter::once(format!("{jobs} jobs")).chain(notes).collect::<Vec<_>>().join("; ");
            tracing::info!("configuration reloaded ({who}): {text}");
            let _ = events.send(event(EventKind::ConfigReloaded, &text));
            Ok((jobs, text))
        }
        Err(text) => {
            for line in text.lines() {
                tracing::error!("reload ({who}) refused, the old configuration stays: {line}");
            }
            let _ = events.send(event(EventKind::ReloadFailed, &text));
            Err(text)
        }
    };
    notify::tell(&[NotifyState::Ready]);
    result
}
