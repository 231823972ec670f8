//! Whether an application works: a program or an address is asked until it says so, or patience is over.

use std::time::{Duration, Instant};

use keepd_protocol::model::Level;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::config::{Health, HealthCheck};
use crate::run::live::{Failure, LiveRun};
use crate::run::{hooks, quiesce};

/// Between two questions.
const PAUSE: Duration = Duration::from_secs(1);
/// For one answer of an address.
const ONE_ANSWER: Duration = Duration::from_secs(10);
/// A service that fails often does so at once.
const SETTLED: Duration = Duration::from_secs(2);

/// What is asked, of which job.
pub struct Question<'a> {
    pub health: Option<&'a Health>,
    pub job: &'a str,
    pub run: &'a str,
    /// Services that were started: without a question of its own, that they go on running is what is looked at.
    pub services: &'a [String],
}

impl Question<'_> {
    /// Asks until the application works. Blocks.
    pub fn ask(&self, runtime: &Handle, cancel: &CancellationToken) -> Result<String, Failure> {
        let since = Instant::now();
        let Some(health) = self.health else {
            if self.services.is_empty() {
                return Ok(String::new());
            }
            sleep(SETTLED, cancel)?;
            for unit in self.services {
                if !quiesce::is_active(unit, cancel)? {
                    return Err(Failure::Failed(format!("service {unit} does not run any more after it was started")));
                }
            }
            return Ok(format!("{} running", self.services.join(", ")));
        };
        loop {
            let said = match &health.check {
                HealthCheck::Command(program) => {
                    let environment =
                        vec![("KEEPD_EVENT", "health".into()), ("KEEPD_JOB", self.job.into()), ("KEEPD_RUN", self.run.into())];
                    hooks::run_program(program, environment, cancel).map_err(Failure::from)
                }
                HealthCheck::Url(url) => answer(url, runtime, cancel),
            };
            match said {
                Ok(_) => return Ok(format!("healthy after {:.1} s", since.elapsed().as_secs_f64())),
                Err(Failure::Cancelled) => return Err(Failure::Cancelled),
                Err(e) if since.elapsed() >= health.patience => {
                    return Err(Failure::Failed(format!("the application is not healthy after {} s: {e}", since.elapsed().as_secs())));
                }
                Err(_) => sleep(PAUSE, cancel)?,
            }
        }
    }

    /// The same as a step of a run.
    pub fn ask_within(&self, runtime: &Handle, live: &LiveRun) -> Result<(), Failure> {
        live.step("checking the application's health");
        let said = self.ask(runtime, &live.cancel)?;
        if !said.is_empty() {
            live.message(Level::Info, said);
        }
        Ok(())
    }
}

fn sleep(pause: Duration, cancel: &CancellationToken) -> Result<(), Failure> {
    let until = Instant::now() + pause;
    while Instant::now() < until {
        if cancel.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn answer(url: &str, runtime: &Handle, cancel: &CancellationToken) -> Result<String, Failure> {
    let failed = |text: String| Failure::Failed(format!("{url}: {text}"));
    let refused = |e: reqwest::Error| failed(crate::storage::with_causes(&e.to_string(), std::error::Error::source(&e)));
    let asked = async {
        let client = reqwest::Client::builder().timeout(ONE_ANSWER).build().map_err(refused)?;
        let response = client.get(url).send().await.map_err(refused)?;
        match response.status() {
            status if status.is_success() || status.is_redirection() => Ok(status.to_string()),
            status => Err(failed(format!("the answer is {status}"))),
        }
    };
    runtime.block_on(async {
        tokio::select! {
            said = asked => said,
            () = cancel.cancelled() => Err(Failure::Cancelled),
        }
    })
}
