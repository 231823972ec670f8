//! Reading the configuration again, for SIGHUP and the control socket alike: one at a time, and a wrong one changes nothing.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;
use keepd_protocol::model::{Event, EventKind};
use tokio::sync::{broadcast, mpsc, oneshot};

use super::command_line::count;
use super::notify::Notifier;
use super::status::{self, Picture};
use crate::config::{Config, Current};
use crate::machine;

/// What a reload did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reloaded {
    pub jobs: u32,
    /// For people; says what takes effect after a restart only.
    pub message: String,
}

struct Request {
    by: String,
    answer: oneshot::Sender<Result<Reloaded, String>>,
}

/// Asks for a reload.
#[derive(Debug, Clone)]
pub struct Handle(mpsc::Sender<Request>);

impl Handle {
    /// Reloads and says how it went; the error is what is wrong with the configuration. `by` is who asked, for the log.
    pub async fn reload(&self, by: String) -> Result<Reloaded, String> {
        let (answer, outcome) = oneshot::channel();
        let gone = || "keepd is stopping and reloads nothing".to_owned();
        self.0.send(Request { by, answer }).await.map_err(|_| gone())?;
        outcome.await.unwrap_or_else(|_| Err(gone()))
    }
}

/// What a reload needs of the daemon.
pub struct Reloader {
    pub path: PathBuf,
    pub current: Arc<Current>,
    pub events: broadcast::Sender<Event>,
    pub notifier: Notifier,
    /// Whether the configuration on disk was refused last time; the status line shows it.
    pub refused: Arc<AtomicBool>,
    /// Called after the swap.
    pub changed: Box<dyn Fn() -> Vec<String> + Send + Sync>,
    /// The status line to tell when it is over.
    pub status: Arc<dyn Fn() -> Picture + Send + Sync>,
}

impl Reloader {
    /// The handle, and the task that answers it until all handles are gone.
    pub fn task(self) -> (Handle, impl Future<Output = ()> + Send) {
        let (sender, mut requests) = mpsc::channel::<Request>(8);
        let task = async move {
            while let Some(request) = requests.recv().await {
                self.notifier.reloading();
                let outcome = self.reload(&request.by).await;
                self.notifier.ready(&status::line(&self.status).await);
                // Whoever asked may have gone.
                let _ = request.answer.send(outcome);
            }
        };
        (Handle(sender), task)
    }

    async fn reload(&self, by: &str) -> Result<Reloaded, String> {
        let path = self.path.clone();
        // Files on a file system that does not answer must not hold the loop that feeds the watchdog.
        let loaded = match tokio::task::spawn_blocking(move || machine::load(&path)?.without_errors()).await {
            Ok(loaded) => loaded,
            Err(_) => Err("reading the configuration ended in a bug of keepd, see the log".to_owned()),
        };
        self.refused.store(loaded.is_err(), Ordering::Relaxed);
        match loaded {
            Ok(new) => {
                new.log_problems();
                let reloaded = self.swap(new.config);
                tracing::info!(by, jobs = reloaded.jobs, "{} (asked by {by})", reloaded.message);
                self.tell(EventKind::ConfigReloaded, reloaded.message.clone());
                Ok(reloaded)
            }
            Err(problems) => {
                for problem in problems.lines().filter(|l| !l.trim().is_empty()) {
                    tracing::error!("{problem}");
                }
                tracing::error!(by, "the configuration was not reloaded (asked by {by}); the one in force stays");
                self.tell(EventKind::ReloadFailed, problems.clone());
                Err(problems)
            }
        }
    }

    /// Runs in progress hold the old configuration until they end.
    fn swap(&self, mut new: Config) -> Reloaded {
        let notes = keep_what_cannot_change(&self.current.get(), &mut new);
        let jobs = new.jobs.len();
        self.current.set(new);
        let held_back = (self.changed)();
        held_back.iter().for_each(|note| tracing::warn!("{note}"));
        let mut message = format!("configuration reloaded: {}", count(jobs, "job", "jobs"));
        for note in notes.into_iter().chain(held_back) {
            message.push_str("; ");
            message.push_str(&note);
        }
        Reloaded { jobs: u32::try_from(jobs).unwrap_or(u32::MAX), message }
    }

    fn tell(&self, kind: EventKind, text: String) {
        // Without a listener there is nobody to tell.
        let _ = self.events.send(Event { time: Timestamp::now().to_string(), kind, text, ..Event::default() });
    }
}

/// The lock, the socket and the places for runs were taken at start: another choice waits for the next one.
fn keep_what_cannot_change(old: &Config, new: &mut Config) -> Vec<String> {
    let mut notes = Vec::new();
    let mut keep = |key: &str, value: &dyn std::fmt::Display| notes.push(format!("daemon.{key} stays {value} until keepd is restarted"));
    let (old, new) = (&old.daemon, &mut new.daemon);
    if old.state_dir != new.state_dir {
        keep("state_dir", &old.state_dir.display());
        new.state_dir.clone_from(&old.state_dir);
    }
    if old.socket != new.socket {
        keep("socket", &old.socket.display());
        new.socket.clone_from(&old.socket);
    }
    if old.max_parallel_runs != new.max_parallel_runs {
        keep("max_parallel_runs", &old.max_parallel_runs);
        new.max_parallel_runs = old.max_parallel_runs;
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    struct Bench {
        _temp: tempfile::TempDir,
        file: PathBuf,
        current: Arc<Current>,
        events: broadcast::Receiver<Event>,
        refused: Arc<AtomicBool>,
        changed: Arc<AtomicU32>,
        handle: Handle,
    }

    fn configuration(dir: &std::path::Path, socket: &str, job: &str) -> String {
        let dir = dir.display();
        format!(
            "[daemon]\nstate_dir = '{dir}/state'\nsocket = '{dir}/{socket}'\n\
             [destination.local]\nservice = 'fs'\nroot = '{dir}/repo'\nencryption = 'none'\n\
             [job.{job}]\ndestinations = ['local']\n[[job.{job}.source]]\nfiles = '{dir}/files'\n"
        )
    }

    fn bench() -> Bench {
        let temp = tempfile::tempdir().expect("tempdir");
        let file = temp.path().join("keepd.toml");
        std::fs::write(&file, configuration(temp.path(), "sock", "first")).expect("write");
        let current = Arc::new(Current::new(machine::load(&file).map(|l| l.config).expect("valid")));
        let (sender, events) = broadcast::channel(16);
        let refused = Arc::new(AtomicBool::new(false));
        let changed = Arc::new(AtomicU32::new(0));
        let counted = changed.clone();
        let (handle, task) = Reloader {
            path: file.clone(),
            current: current.clone(),
            events: sender,
            notifier: Notifier,
            refused: refused.clone(),
            changed: Box::new(move || {
                counted.fetch_add(1, Ordering::Relaxed);
                Vec::new()
            }),
            status: Arc::new(Picture::default),
        }
        .task();
        tokio::spawn(task);
        Bench { _temp: temp, file, current, events, refused, changed, handle }
    }

    #[tokio::test]
    async fn a_valid_one_is_swapped_in_and_a_run_keeps_its_own() {
        let mut bench = bench();
        let of_a_run = bench.current.get();
        std::fs::write(&bench.file, configuration(bench._temp.path(), "sock", "second")).expect("write");
        let reloaded = bench.handle.reload("a test".into()).await.expect("reloaded");
        assert_eq!(reloaded, Reloaded { jobs: 1, message: "configuration reloaded: 1 job".into() });
        assert!(bench.current.get().jobs.contains_key("second"));
        assert!(of_a_run.jobs.contains_key("first"));
        assert_eq!(bench.changed.load(Ordering::Relaxed), 1);
        assert_eq!(bench.events.recv().await.expect("event").kind, EventKind::ConfigReloaded);
    }

    #[tokio::test]
    async fn a_wrong_one_changes_nothing_and_says_why() {
        let mut bench = bench();
        std::fs::write(&bench.file, "[daemon\n").expect("write");
        let problems = bench.handle.reload("a test".into()).await.expect_err("wrong");
        assert!(problems.contains("keepd.toml"), "{problems}");
        assert!(bench.current.get().jobs.contains_key("first"));
        assert!(bench.refused.load(Ordering::Relaxed));
        assert_eq!(bench.changed.load(Ordering::Relaxed), 0);
        let event = bench.events.recv().await.expect("event");
        assert_eq!((event.kind, event.text), (EventKind::ReloadFailed, problems));

        std::fs::write(&bench.file, configuration(bench._temp.path(), "sock", "third")).expect("write");
        bench.handle.reload("a test".into()).await.expect("mended");
        assert!(!bench.refused.load(Ordering::Relaxed));
    }

    #[tokio::test]
    async fn a_new_socket_waits_for_a_restart() {
        let bench = bench();
        std::fs::write(&bench.file, configuration(bench._temp.path(), "other", "first")).expect("write");
        let reloaded = bench.handle.reload("a test".into()).await.expect("reloaded");
        assert!(reloaded.message.contains("daemon.socket stays"), "{}", reloaded.message);
        assert!(bench.current.get().daemon.socket.ends_with("sock"));
    }
}
