//! The methods that change single tables of the configuration, and a job's single times.

use keepd_protocol::methods::*;

use super::handlers::{Result, failed};
use super::service::Control;
use super::transport::Fault;
use crate::access::By;
use crate::config;

/// What a fault says.
fn said(fault: &Fault) -> &str {
    fault.parameters.get("message").and_then(|message| message.as_str()).unwrap_or_default()
}

impl Control {
    pub(super) async fn show_item_text(&self, p: show_item_text::In) -> Result<show_item_text::Out> {
        let found = self.ask_runs(move |runs| runs.show_item_text(&p.item)).await?;
        Ok(show_item_text::Out { file: found.file, text: found.text, base: found.base })
    }

    pub(super) async fn edit_config(&self, p: edit_config::In, by: By) -> Result<edit_config::Out> {
        let editor = by.clone();
        let edited = self.ask_runs(move |runs| runs.edit_config(&p, &editor)).await?;
        let mut out = edit_config::Out {
            diff: edited.diff,
            base: edited.base,
            warnings: edited.warnings,
            backups: edited.backups,
            applied: edited.is_applied,
            message: String::new(),
            runs: Vec::new(),
            not_deleted: Vec::new(),
        };
        let mut notes = edited.notes;
        if out.applied {
            let in_force = self.in_force("changed", by.name()).await;
            let nothing_deleted = |fault: Fault| match edited.deletes {
                true => failed(format!("{}; no backup of {} was deleted", said(&fault), edited.gone.join(", "))),
                false => fault,
            };
            notes.insert(0, in_force.map_err(nothing_deleted)?);
            let gone = edited.gone.clone();
            self.ask_runs(move |runs| {
                runs.forget_schedules(&gone);
                Ok(())
            })
            .await?;
        }
        for job in edited.gone.into_iter().filter(|_| out.applied && edited.deletes) {
            let by = by.clone();
            let named = job.clone();
            match self.ask_runs(move |runs| runs.start_delete_all(&job, &by)).await {
                Ok(deleting) => {
                    out.runs.extend(deleting.runs);
                    notes.extend(deleting.notes);
                    out.not_deleted.extend(deleting.not_deleted);
                }
                Err(fault) => {
                    let why = said(&fault);
                    out.not_deleted.push(format!("the backups of {named} are not deleted: {why}; 'keepctl list --job {named}' shows them"));
                }
            }
        }
        out.message = notes.join("\n");
        Ok(out)
    }

    pub(super) async fn schedule_once(&self, p: schedule_once::In, by: By) -> Result<schedule_once::Out> {
        let zone = self.app.config.get().jobs.get(&p.job).map(config::Job::zone).unwrap_or(jiff::tz::TimeZone::UTC);
        let parse =
            |text: &String| config::moment(text, &zone).map_err(|why| failed(format!("job {} is not planned to run once: {why}", p.job)));
        let at = p.at.as_ref().map(parse).transpose()?;
        self.still(&by).await?;
        let app = self.app.clone();
        let (job, cancel) = (p.job.clone(), p.cancel);
        let once = tokio::task::spawn_blocking(move || (app.schedule_once)(&job, at, cancel)).await.map_err(failed)??;
        tracing::info!(by = by.name(), job = %p.job, cancel, "planned to run once: {} times", once.len());
        Ok(schedule_once::Out { once: once.iter().map(ToString::to_string).collect() })
    }
}
