//! Imports: what is initiated, uploaded and started, and what becomes of it.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use keepd_protocol::methods::{initiate_import, upload_import};
use keepd_protocol::model::{Import, ImportState, RunKind};
use tokio_util::sync::CancellationToken;

use super::{Error, Result, Runs, Work, job_named, lock};
use crate::access::By;
use crate::config::is_name;
use crate::crypto::{Key, PrivateKey};
use crate::run::import::{self, Done, Given, is_source_name};
use crate::run::live::{Failure, Finish};

/// Between looks for deadlines, at most.
const LOOK: Duration = Duration::from_secs(60);
const MAX_TIMEOUT: u64 = 7 * 86_400;
/// Of a name, a description, a label, in bytes.
const MAX_TEXT: usize = 4096;
const MAX_LABELS: usize = 64;

/// Tells how an import ended, also when its run never began.
struct Told {
    runs: Arc<Runs>,
    import: String,
    told: bool,
}

impl Told {
    fn end(mut self, step: String, result: &Result<Done, Failure>) {
        self.told = true;
        self.runs.imports.end(&self.import, step, result);
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        if !self.told {
            let failure = match std::thread::panicking() {
                true => Failure::Failed("an internal error (a panic, see the log); nothing was committed by it".into()),
                false => Failure::Cancelled,
            };
            self.runs.imports.end(&self.import, String::new(), &Err(failure));
        }
    }
}

fn unfit(what: &str, text: impl std::fmt::Display) -> Error {
    Error::Failed(format!("{what}: {text}"))
}

impl Runs {
    /// Begins an import for a user. Blocks.
    pub fn initiate_import(self: &Arc<Self>, request: initiate_import::In, by: &By) -> Result<Import> {
        let config = self.config.get();
        self.destination(&config, &request.destination)?;
        if request.timeout_seconds.is_some_and(|s| !(1..=MAX_TIMEOUT).contains(&s)) {
            return Err(unfit("timeout_seconds", format!("from 1 to {MAX_TIMEOUT} are possible")));
        }
        if let Some(job) = &request.job {
            // A job that is not configured yet is one to restore from all the same.
            if !is_name(job) {
                return Err(unfit("job", format!("'{job}' is no name of a job")));
            }
        }
        if let Some(source) = &request.foreign_source {
            let job = request.job.as_ref().ok_or_else(|| unfit("job", "a tar that keepd did not make says nothing of a job: name one"))?;
            job_named(&config, job)?;
            if !is_source_name(source) {
                return Err(unfit("foreign_source", format!("'{source}' is no name of a source")));
            }
            if !(request.sources.is_empty() && request.paths.is_empty() && request.rename_sources.is_empty()) {
                return Err(unfit("sources", "of a tar that keepd did not make all is imported"));
            }
        }
        if let Some(time) = &request.time {
            time.parse::<Timestamp>().map_err(|e| unfit("time", format!("'{time}' is no time: {e}")))?;
        }
        if request.bandwidth == Some(0) || request.max_bytes == Some(0) {
            return Err(unfit("bandwidth, max_bytes", "0 is nothing"));
        }
        let texts = [&request.name, &request.description, &request.place];
        let labels = request.labels.iter().flat_map(|(k, v)| [k, v]).chain(texts.into_iter().flatten());
        if request.labels.len() > MAX_LABELS || labels.into_iter().any(|t| t.len() > MAX_TEXT) {
            return Err(unfit("name, description, labels", format!("at most {MAX_LABELS} labels, and texts of {MAX_TEXT} bytes")));
        }
        let import = self.imports.initiate(self.next_id()?, request, by.name().to_owned(), by.uid().unwrap_or(0))?;
        self.deadlines.notify_one();
        Ok(import)
    }

    pub fn add_import_keys(&self, import: &str, keys: Vec<Key>, private_keys: Vec<PrivateKey>) -> Result<()> {
        self.imports.add_keys(import, keys, private_keys)
    }

    pub fn give_import(&self, import: &str, archive: Given, confirm: bool) -> Result<u64> {
        self.imports.give(import, archive, confirm)
    }

    pub fn confirm_import(&self, import: &str) -> Result<u64> {
        self.imports.confirm(import)
    }

    pub fn import_piece(&self, piece: &upload_import::In, data: &[u8]) -> Result<u64> {
        self.imports.piece(piece, data)
    }

    /// Queues the run of an import whose archive was given.
    pub fn start_import(self: &Arc<Self>, import: &str, by: &By) -> Result<String> {
        let env = self.environment();
        let known = self.imports.get(import)?;
        self.destination(&env.config, &known.destination)?;
        let taken = self.imports.take(import)?;
        let told = Told { runs: self.clone(), import: import.to_owned(), told: false };
        let work = Work { job: known.job.clone(), ..Work::on(RunKind::Import, &known.destination, by) };
        let runs = self.clone();
        let run = self.start(work, move |live| {
            runs.imports.set_run(&told.import, &live.id());
            let writing = |name: &str| runs.wait_to_write(name, live);
            let done = import::import(&env, taken, live, &writing);
            told.end(live.snapshot().step, &done);
            done.map(|_| Finish::Good)
        })?;
        self.imports.set_run(import, &run);
        Ok(run)
    }

    /// Whose an import is, and the job that it is for where one was named.
    pub fn import_owner(&self, import: &str) -> Option<(u32, Option<String>)> {
        self.imports.owner(import)
    }

    pub fn import(&self, import: &str) -> Result<Import> {
        Ok(self.with_run(self.imports.get(import)?))
    }

    /// Of one user, or of all.
    pub fn list_imports(&self, of: Option<u32>) -> Vec<Import> {
        self.imports.expire();
        self.imports.list(of).into_iter().map(|import| self.with_run(import)).collect()
    }

    /// With what its run says of it.
    fn with_run(&self, mut import: Import) -> Import {
        let live =
            import.run.as_ref().filter(|_| import.state == ImportState::Processing).and_then(|run| lock(&self.live).get(run).cloned());
        if let Some(run) = live.map(|live| live.snapshot()) {
            import.step = run.step;
            import.percent = import.percent.or(run.progress.percent);
            import.job = run.job.or(import.job);
        }
        import
    }

    /// Removes an import that was not started, or cancels the run of one that is processed.
    pub fn cancel_import(&self, import: &str) -> Result<()> {
        if let Some(run) = self.imports.cancel(import)? {
            self.cancel(&run);
        }
        Ok(())
    }

    /// At start: what an earlier daemon left.
    pub fn load_imports(&self) {
        self.imports.load();
    }

    /// Ends imports at their deadlines, until cancelled.
    pub async fn watch_deadlines(self: Arc<Self>, cancel: CancellationToken) {
        loop {
            let left = self.imports.next_deadline().map(|at| Timestamp::now().duration_until(at));
            let wait = left.map_or(LOOK, |left| Duration::try_from(left).unwrap_or(Duration::ZERO).min(LOOK));
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.deadlines.notified() => continue,
                () = cancel.cancelled() => return,
            }
            let runs = self.clone();
            if let Err(e) = tokio::task::spawn_blocking(move || runs.imports.expire()).await {
                tracing::warn!("imports whose deadline is over could not be looked for: {e}");
            }
        }
    }
}
