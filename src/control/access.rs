//! Who may call what, and the method that tells it.
//!
//! A call is judged once before anything is done, by the right that its method wants ([`deed`](crate::access::deed)), what it is about and what its
//! parameters ask for. What is named is looked up here: a backup becomes its whole id, so that what was judged is what is worked on. Whoever has a
//! right for some jobs alone is refused whatever else is named, whether it is there or not.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use keepd_protocol::access::{Access, Role};
use keepd_protocol::call::{Call, errors};
use keepd_protocol::methods::*;
use keepd_protocol::model::{Event, Run, RunKind};
use serde_json::{Map, Value, json};

use super::handlers::{Result, failed};
use super::service::Control;
use super::transport::{Fault, Peer};
use crate::access::deed::{Deed, Subject};
use crate::access::{BUILTIN, By, Caller, Jobs, KnownRole, Need, Of, Refusal, Right, Standing};
use crate::config::{Databases, Source, SourceKind};
use crate::ledger::Ledger;
use crate::run::Error;

/// What a caller named is told with so many characters.
const MOST_NAMED: usize = 80;

type Parameters = Map<String, Value>;

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        Fault::new(errors::NOT_PERMITTED, json!({ "message": refusal.text, "right": refusal.right.word() }))
    }
}

/// A call that is judged.
struct Judged<'c> {
    control: &'c Control,
    caller: Caller,
    name: std::sync::Arc<str>,
    roles: &'c [KnownRole],
    standing: Standing,
    deed: &'c Deed,
    /// The right that the method wants, and the jobs that the caller has it for.
    right: Right,
    jobs: Jobs,
}

impl Control {
    /// An error for a user who calls more often than is allowed.
    pub(super) fn in_pace(&self, peer: &Peer) -> Result<()> {
        let paced = self.app.runs.judge().pace(peer.uid);
        paced.map_err(|wait| Fault::new(errors::BUSY, json!({ "message": self.too_often("call", wait) })))
    }

    /// What somebody is told who does something more often than is allowed.
    pub(super) fn too_often(&self, what: &str, wait: Duration) -> String {
        let most = self.app.config.get().access.limits.calls_per_second;
        let seconds = wait.as_secs_f64().max(0.01);
        format!(
            "you {what} keepd more than {most} times each second, as often as access.limits.calls_per_second allows; try again in {seconds:.2} s"
        )
    }

    /// Whether the caller may make this call, and on whose behalf it is then carried out. What it names is replaced by what that is now.
    pub(super) async fn permit(&self, peer: &Peer, deed: &Deed, call: &mut Call) -> Result<By> {
        // The pieces of an upload are as many as they are, where they may come.
        let is_piece = deed.method == UploadImport::NAME;
        if !is_piece {
            self.in_pace(peer)?;
        }
        let permitted = self.judged(peer, deed, call).await;
        if let Err(fault) = &permitted {
            if is_piece {
                self.in_pace(peer)?;
            }
            self.log(peer, deed, fault);
        }
        permitted
    }

    async fn judged(&self, peer: &Peer, deed: &Deed, call: &mut Call) -> Result<By> {
        let judge = self.app.runs.judge();
        let (caller, name) = (peer.caller(), judge.name(peer.uid).await);
        let needs = match deed.right {
            None => Vec::new(),
            Some(right) => {
                let roles = judge.roles_for(peer.uid).await;
                let standing = judge.standing(&roles, &caller);
                match standing.jobs(right) {
                    None => Err(judge.refusal(&roles, &name, right, "").into()),
                    Some(jobs) => {
                        let caller = caller.clone();
                        let judged = Judged { control: self, caller, name, roles: &roles, standing, deed, right, jobs };
                        let mut none = Parameters::new();
                        let parameters = call.parameters.as_mut().and_then(Value::as_object_mut).unwrap_or(&mut none);
                        judged.needs(parameters).await
                    }
                }?
            }
        };
        judge.by(caller, needs).await.map_err(Fault::from)
    }

    fn log(&self, peer: &Peer, deed: &Deed, fault: &Fault) {
        let why = fault.parameters.get("message").and_then(Value::as_str).unwrap_or_default();
        match self.app.runs.judge().is_logged(peer.uid) {
            true => tracing::warn!(uid = peer.uid, pid = peer.pid, method = deed.method, "a control call was refused: {why}"),
            false => tracing::debug!(uid = peer.uid, pid = peer.pid, method = deed.method, "a control call was refused: {why}"),
        }
    }

    /// Carries an edit out, and tells whoever may change some jobs alone nothing of what stands beside them.
    pub(super) async fn edit_config_as_seen(&self, p: edit_config::In, by: By) -> Result<edit_config::Out> {
        let Jobs::Only(jobs) = self.jobs_of(&by, Right::JobEdit).await? else { return self.edit_config(p, by).await };
        match self.edit_config(p, by).await {
            Ok(mut out) => {
                out.warnings.retain(|text| is_of(text, &jobs));
                out.diff = out.diff.lines().filter(|line| !line.starts_with(' ')).map(|line| format!("{line}\n")).collect();
                Ok(out)
            }
            Err(fault) if fault.error == errors::FAILED => {
                let text = fault.parameters.get("message").and_then(Value::as_str).unwrap_or_default();
                let mut lines = text.lines();
                let first = lines.next().unwrap_or_default();
                let own: Vec<&str> = lines.clone().filter(|line| is_of(line, &jobs)).collect();
                let others = lines.count() - own.len();
                let more =
                    if others == 0 { Vec::new() } else { vec!["there is more that is none of your jobs'; an administrator sees it"] };
                Err(failed([vec![first], own, more].concat().join("\n")))
            }
            Err(fault) => Err(fault),
        }
    }

    /// The jobs that somebody has a right for now; refused where there are none.
    pub(super) async fn jobs_of(&self, by: &By, right: Right) -> Result<Jobs> {
        let Some(standing) = by.standing_now().await else { return Ok(Jobs::All) };
        match standing.jobs(right) {
            Some(jobs) => Ok(jobs),
            None => Err(self
                .app
                .runs
                .judge()
                .refusal(&self.app.runs.judge().roles_for(by.uid().unwrap_or(0)).await, by.name(), right, "")
                .into()),
        }
    }

    /// Whether a caller still may what it was permitted.
    pub(super) async fn still(&self, by: &By) -> Result<()> {
        by.still().await.map_err(Fault::from)
    }

    /// Whether somebody is an administrator.
    pub(super) async fn is_admin(&self, by: &By) -> bool {
        by.standing_now().await.is_none_or(|standing| standing.is_admin())
    }

    /// Those of the runs that the caller sees: of its jobs, and its own.
    pub(super) async fn runs_seen(&self, runs: Vec<Run>, seen: &Jobs, by: &By) -> Result<Vec<Run>> {
        let Jobs::Only(_) = seen else { return Ok(runs) };
        let backups: Vec<String> = runs.iter().filter(|run| run.job.is_none()).filter_map(|run| run.backup.clone()).collect();
        let jobs = self.ask(move |ledger| jobs_of_backups(ledger, &backups)).await?;
        let job = |run: &Run| run.job.clone().or_else(|| jobs.get(run.backup.as_ref()?).cloned());
        let is_seen = |run: &Run| job(run).is_some_and(|job| seen.has(&job)) || self.is_own(run, by.uid(), by.name());
        Ok(runs.into_iter().filter(is_seen).collect())
    }

    /// Whether a caller sees an event: of its jobs, and of its own runs.
    pub(super) async fn event_seen(&self, event: &Event, seen: &Jobs, by: &By) -> Result<bool> {
        if *seen == Jobs::All {
            return Ok(true);
        }
        if event.job.as_ref().is_some_and(|job| seen.has(job)) {
            return Ok(true);
        }
        let Some(id) = &event.run else { return Ok(false) };
        let Some(run) = self.known_run(id).await? else { return Ok(false) };
        Ok(!self.runs_seen(vec![run], seen, by).await?.is_empty())
    }

    fn is_own(&self, run: &Run, uid: Option<u32>, name: &str) -> bool {
        let by_name = || run.by == name && !matches!(name, "schedule" | "keepd");
        match self.app.runs.owner(&run.id).map(|owner| owner.uid()) {
            Some(Some(owner)) => Some(owner) == uid,
            // Ended, or what followed from something of that name.
            Some(None) | None => by_name(),
        }
    }

    /// A run that is queued or running, or was.
    async fn known_run(&self, id: &str) -> Result<Option<Run>> {
        let live = self.app.runs.follow(id).map(|changes| (**changes.borrow()).clone());
        match live {
            Some(run) => Ok(Some(run)),
            None => {
                let id = id.to_owned();
                self.ask(move |ledger| ledger.run(&id)).await
            }
        }
    }

    pub(super) async fn show_access(&self, p: show_access::In, peer: &Peer, by: By) -> Result<show_access::Out> {
        let judge = self.app.runs.judge();
        let own = peer.uid.to_string();
        let other = p.user.filter(|user| user != by.name() && *user != own);
        if other.is_some() || p.roles {
            let what = if other.is_some() { " of others" } else { "" };
            judge.by(peer.caller(), vec![Need::new(Right::AuditRead, Of::Whole, what)]).await?;
        }
        let (name, caller) = match other {
            None => (by.name().to_owned(), peer.caller()),
            Some(user) => blocking(move || user_of(&user)).await??,
        };
        let roles = judge.roles().await;
        let grants = judge.standing(&roles, &caller).grants;
        let mut told: Vec<Role> = judge.roles_told(&roles);
        if !p.roles {
            // Whoever has nothing is told whom to ask.
            let [(admin, _), ..] = BUILTIN;
            told.retain(|role| grants.is_empty() && role.name == admin);
        }
        let uid = caller.uid;
        let groups = blocking(move || groups_of(&caller)).await?;
        Ok(show_access::Out { access: Access { user: name, uid, groups, grants }, roles: told })
    }
}

impl Judged<'_> {
    fn refuse(&self, what: &str) -> Fault {
        self.control.app.runs.judge().refusal(self.roles, &self.name, self.right, what).into()
    }

    fn need(&self, of: Of, what: impl Into<String>) -> Need {
        Need::new(self.right, of, what)
    }

    fn any(&self) -> Vec<Need> {
        vec![self.need(Of::Any, "")]
    }

    fn whole(&self) -> Need {
        self.need(Of::Whole, " for all jobs")
    }

    fn of_job(&self, job: &str) -> Need {
        self.need(Of::Job(job.to_owned()), named("job", job))
    }

    /// What the call takes. A parameter that is missing or of the wrong kind is left to whoever reads them all, and refuses it.
    async fn needs(&self, p: &mut Parameters) -> Result<Vec<Need>> {
        let mut needs = match self.deed.subject {
            Subject::Caller => Vec::new(),
            Subject::List => self.list(p)?,
            Subject::Whole => vec![self.whole()],
            Subject::Job => match text(p, "job") {
                Some(job) => vec![self.of_job(&job)],
                None => self.any(),
            },
            Subject::Backup => match self.backup(p, "backup").await? {
                Some(job) => vec![self.need(job, named("backup", &text(p, "backup").unwrap_or_default()))],
                None => self.any(),
            },
            Subject::TwoBackups => {
                let mut needs = Vec::new();
                for key in ["a", "b"] {
                    if let Some(of) = self.backup(p, key).await? {
                        needs.push(self.need(of, named("backup", &text(p, key).unwrap_or_default())));
                    }
                }
                // They are known by their whole ids now, and may be of two jobs.
                if self.jobs != Jobs::All && !needs.is_empty() {
                    p.remove("job");
                }
                if needs.is_empty() { self.any() } else { needs }
            }
            Subject::Drill => self.drill(p).await?,
            Subject::Copy => {
                let of = self.backup(p, "backup").await?;
                let mut needs = match &of {
                    Some(of) => vec![self.need(of.clone(), named("backup", &text(p, "backup").unwrap_or_default()))],
                    None => self.any(),
                };
                if let (Some(Of::Job(job)), Some(to)) = (&of, text(p, "destination"))
                    && !self.is_destination_of(job, &to)
                {
                    needs.push(self.need(Of::Whole, format!(" to {}, which is no destination of its job", short(&to))));
                }
                needs
            }
            Subject::Run => match text(p, "run") {
                Some(run) => vec![self.run(&run).await?],
                None => self.any(),
            },
            Subject::Cancel => self.cancel(p).await?,
            Subject::NewImport => match text(p, "job") {
                Some(job) => {
                    let mut needs = vec![self.of_job(&job)];
                    if let Some(to) = text(p, "destination")
                        && !self.is_destination_of(&job, &to)
                    {
                        needs.push(self.need(Of::Whole, format!(" to {}, which is no destination of job {}", short(&to), short(&job))));
                    }
                    needs
                }
                None => vec![self.whole()],
            },
            Subject::Import => self.import(p).await?,
            Subject::Item => match text(p, "item") {
                Some(item) => vec![self.item(&item, false)],
                None => self.any(),
            },
            Subject::Edits => self.edits(p),
        };
        self.further(p, &mut needs);
        Ok(needs)
    }

    /// What some parameters want beside the method's own right.
    fn further(&self, p: &Parameters, needs: &mut Vec<Need>) {
        let on = |key: &str| p.get(key) == Some(&Value::Bool(true));
        let word = |key: &str| p.get(key).and_then(Value::as_str).unwrap_or_default();
        let secrets = || Need::new(Right::ConfigExportSecrets, Of::Whole, "");
        match self.deed.method {
            ExportConfig::NAME | MakeKit::NAME if on("include_secrets") => needs.push(secrets()),
            MarkBackup::NAME if !matches!(word("mark"), "" | "pin") => {
                // Of the same backup.
                let same: Vec<Need> = needs.iter().map(|need| Need { right: Right::Delete, ..need.clone() }).collect();
                needs.extend(same);
            }
            StartLoad::NAME if self.jobs != Jobs::All => needs.extend(self.load(p, needs.first())),
            StartCheck::NAME if on("repair") => needs.push(Need::new(Right::Prune, Of::Whole, " in a repair")),
            InitiateImport::NAME if word("on_conflict") == "replace" => {
                needs.push(Need::new(Right::Delete, Of::Whole, " that an import replaces"));
            }
            EditConfig::NAME if word("backups") == "delete" => needs.push(Need::new(Right::Delete, Of::Whole, " of jobs that go")),
            _ => {}
        }
    }

    /// What a load into a server wants of somebody who has the right for some jobs alone: a server's databases may be others'.
    fn load(&self, p: &Parameters, first: Option<&Need>) -> Option<Need> {
        let Some(Need { of: Of::Job(job), .. }) = first else { return None };
        let (target, source) = (text(p, "target")?, text(p, "source"));
        let config = self.control.app.config.get();
        let is_it = |name: &String| name.eq_ignore_ascii_case(&target);
        let names = |of: &Source| match &of.kind {
            SourceKind::Postgres(server) | SourceKind::Mysql(server) => {
                matches!(&server.databases, Databases::Named(names) if names.iter().any(is_it))
            }
            _ => false,
        };
        let mut others = config.jobs.iter().filter(|(name, _)| !self.jobs.has(name)).flat_map(|(_, job)| &job.sources);
        let is_own = config.jobs.get(job).is_some_and(|job| {
            let mut sources = job.sources.iter().filter(|of| source.as_ref().is_none_or(|name| of.name == *name));
            sources.any(names)
        });
        let is_over = p.get("replace") == Some(&Value::Bool(true)) && !is_own;
        let what = format!(" into database {}, which is not the job's own", short(&target));
        (is_over || others.any(names)).then(|| self.need(Of::Whole, what))
    }

    fn list(&self, p: &Parameters) -> Result<Vec<Need>> {
        if let Jobs::Only(jobs) = &self.jobs {
            if let Some(job) = text(p, "job").filter(|job| !jobs.contains(job)) {
                return Err(self.refuse(&named("job", &job)));
            }
            if let Some(to) = text(p, "destination").filter(|to| !jobs.iter().any(|job| self.is_destination_of(job, to))) {
                return Err(self.refuse(&named("destination", &to)));
            }
        }
        Ok(self.any())
    }

    fn is_destination_of(&self, job: &str, destination: &str) -> bool {
        let config = self.control.app.config.get();
        config.jobs.get(job).is_some_and(|job| job.destinations.iter().any(|name| name == destination))
    }

    /// The job of the backup that a parameter names, which is its whole id then. None: there is no such parameter. What there is not, as far as the
    /// caller has the right for all jobs, is left for who looks for it.
    async fn backup(&self, p: &mut Parameters, key: &str) -> Result<Option<Of>> {
        let Some(wanted) = text(p, key) else { return Ok(None) };
        let job = text(p, "job");
        let Jobs::Only(jobs) = &self.jobs else {
            let asked = wanted.clone();
            let found = self.control.ask_runs(move |runs| Ok(runs.resolve(&asked, job.as_deref()))).await?;
            return Ok(Some(match found {
                Ok(found) => {
                    p.insert(key.to_owned(), found.id.into());
                    Of::Job(found.job)
                }
                Err(_) => Of::Whole,
            }));
        };
        if let Some(job) = job.as_ref().filter(|job| !jobs.contains(*job)) {
            return Err(self.refuse(&named("job", job)));
        }
        let among: Vec<String> = jobs.iter().filter(|name| job.as_ref().is_none_or(|job| job == *name)).cloned().collect();
        let asked = wanted.clone();
        let found = self.control.ask_runs(move |runs| runs.resolve_among(&asked, &among)).await;
        match found {
            Ok(Some(found)) => {
                p.insert(key.to_owned(), found.id.into());
                p.insert("job".to_owned(), found.job.clone().into());
                Ok(Some(Of::Job(found.job)))
            }
            Ok(None) => Err(self.refuse(&named("backup", &wanted))),
            Err(fault) => Err(fault),
        }
    }

    async fn drill(&self, p: &mut Parameters) -> Result<Vec<Need>> {
        if let Some(of) = self.backup(p, "backup").await? {
            return Ok(vec![self.need(of, named("backup", &text(p, "backup").unwrap_or_default()))]);
        }
        match (text(p, "job"), &self.jobs) {
            (Some(job), _) => Ok(vec![self.of_job(&job)]),
            (None, Jobs::All) => Ok(vec![self.whole()]),
            (None, Jobs::Only(jobs)) => match jobs.iter().collect::<Vec<_>>().as_slice() {
                [one] => {
                    p.insert("job".to_owned(), (*one).clone().into());
                    Ok(vec![self.of_job(one)])
                }
                many => {
                    let names = many.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
                    Err(Error::Ambiguous(format!("say which backup, or which job; you may drill {names}")).into())
                }
            },
        }
    }

    /// A run's job, also where it is known only by its backup.
    async fn job_of(&self, run: &Run) -> Result<Option<String>> {
        if let Some(job) = run.plan.as_ref().map(|plan| plan.job.clone()).filter(|job| !job.is_empty()).or_else(|| run.job.clone()) {
            return Ok(Some(job));
        }
        let Some(backup) = run.backup.clone() else { return Ok(None) };
        let mut jobs = self.control.ask(move |ledger| jobs_of_backups(ledger, &[backup])).await?;
        Ok(jobs.pop_first().map(|(_, job)| job))
    }

    /// What a named run takes. To look at one's own, a right to look at anything is enough.
    async fn run(&self, id: &str) -> Result<Need> {
        let found = self.control.known_run(id).await?;
        let what = named("run", id);
        let Some(run) = found else {
            return if self.jobs == Jobs::All { Ok(self.need(Of::Any, what)) } else { Err(self.refuse(&what)) };
        };
        if self.right == Right::View && self.control.is_own(&run, Some(self.caller.uid), &self.name) {
            return Ok(self.need(Of::Any, what));
        }
        match self.job_of(&run).await? {
            Some(job) if self.jobs.has(&job) => Ok(self.need(Of::Job(job), what)),
            None if self.jobs == Jobs::All => Ok(self.need(Of::Whole, what)),
            _ => Err(self.refuse(&what)),
        }
    }

    /// One's own run may be stopped by whoever sees it, another's by who may start such a one.
    async fn cancel(&self, p: &Parameters) -> Result<Vec<Need>> {
        let Some(id) = text(p, "run") else { return Ok(self.any()) };
        let mut needs = vec![self.run(&id).await?];
        let Some(owner) = self.control.app.runs.owner(&id) else { return Ok(needs) };
        let Some(run) = self.control.known_run(&id).await? else { return Ok(needs) };
        if owner.uid() == Some(self.caller.uid) {
            return Ok(needs);
        }
        let what = format!("{}, to stop it", named("run", &id));
        let started_with = owner.needs().iter().filter(|need| need.of != Of::Any);
        needs.extend(started_with.map(|need| Need { what: what.clone(), ..need.clone() }));
        if needs.len() == 1 {
            let of = self.job_of(&run).await?.map_or(Of::Whole, Of::Job);
            needs.push(Need::new(right_of(run.kind), of, what));
        }
        Ok(needs)
    }

    /// Imports are their users' own, and the administrators'.
    async fn import(&self, p: &Parameters) -> Result<Vec<Need>> {
        let Some(id) = text(p, "import") else { return Ok(self.any()) };
        let (asked, uid) = (id.clone(), self.caller.uid);
        let owner = self.control.ask_runs(move |runs| Ok(runs.import_owner(&asked))).await?;
        match owner {
            Some((owner, job)) if owner == uid => Ok(vec![match (self.deed.method, job) {
                (GetImport::NAME | CancelImport::NAME, _) => self.need(Of::Any, named("import", &id)),
                (_, Some(job)) => self.of_job(&job),
                (_, None) => self.whole(),
            }]),
            _ if self.standing.is_admin() => Ok(vec![self.whole()]),
            _ => {
                let what = format!("{}: it is none of yours, if there is one", named("import", &id));
                Err(self.refuse(&what))
            }
        }
    }

    fn item(&self, item: &str, is_made_or_removed: bool) -> Need {
        match item.strip_prefix("job.").or_else(|| item.strip_prefix("jobs.")) {
            Some(job) if !is_made_or_removed => self.need(Of::Job(job.to_owned()), format!(" of {}", short(item))),
            _ => self.need(Of::Whole, format!(" of {}", short(item))),
        }
    }

    fn edits(&self, p: &Parameters) -> Vec<Need> {
        let edits = p.get("edits").and_then(Value::as_array).into_iter().flatten();
        let needs: Vec<Need> = edits
            .map(|edit| {
                let item = edit.get("item").and_then(Value::as_str).unwrap_or_default();
                let change = edit.get("change").and_then(Value::as_str).unwrap_or("patch");
                self.item(item, !matches!(change, "patch" | "text"))
            })
            .collect();
        if needs.is_empty() { self.any() } else { needs }
    }
}

/// The right that starting a run of this kind takes.
fn right_of(kind: RunKind) -> Right {
    match kind {
        RunKind::Backup | RunKind::Copy | RunKind::Check | RunKind::Drill | RunKind::Coverage => Right::Backup,
        RunKind::Restore => Right::RestoreInPlace,
        RunKind::Cat => Right::RestoreTo,
        RunKind::Prune => Right::Prune,
        RunKind::Delete | RunKind::Retention => Right::Delete,
        RunKind::Compare => Right::Browse,
        RunKind::Key | RunKind::ReEncrypt => Right::KeyManage,
        RunKind::Export => Right::ExportBackup,
        RunKind::Import => Right::ImportBackup,
        RunKind::ConfigBackup => Right::ConfigExport,
    }
}

/// Whether a text about the configuration is about one of these jobs.
fn is_of(text: &str, jobs: &BTreeSet<String>) -> bool {
    let mut words = text.split(|c: char| !(c.is_alphanumeric() || matches!(c, '_' | '-')));
    words.any(|word| jobs.contains(word))
}

fn text(p: &Parameters, key: &str) -> Option<String> {
    p.get(key).and_then(Value::as_str).map(str::to_owned)
}

fn short(name: &str) -> String {
    name.chars().take(MOST_NAMED).collect()
}

/// ` of job shop`
fn named(what: &str, name: &str) -> String {
    format!(" of {what} {}", short(name))
}

fn jobs_of_backups(ledger: &Ledger, ids: &[String]) -> std::result::Result<BTreeMap<String, String>, crate::ledger::LedgerError> {
    let mut jobs = BTreeMap::new();
    for id in ids {
        if !jobs.contains_key(id)
            && let Some(detail) = ledger.backup_detail(id)?
        {
            jobs.insert(id.clone(), detail.backup.job);
        }
    }
    Ok(jobs)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(failed)
}

/// A user of the system by name or number; a number that nobody has is one all the same.
fn user_of(user: &str) -> Result<(String, Caller)> {
    let number = user.parse::<u32>().ok().filter(|uid| *uid != u32::MAX);
    let found = uzers::get_user_by_name(user).or_else(|| number.and_then(uzers::get_user_by_uid));
    match (found, number) {
        (Some(found), _) => {
            let groups = uzers::get_user_groups(found.name(), found.primary_group_id()).unwrap_or_default();
            let groups = groups.iter().map(uzers::Group::gid).collect();
            let caller = Caller { uid: found.uid(), gid: found.primary_group_id(), groups };
            Ok((found.name().to_string_lossy().into_owned(), caller))
        }
        (None, Some(uid)) => Ok((format!("uid {uid}"), Caller { uid, gid: u32::MAX, groups: Vec::new() })),
        (None, None) => {
            let text = format!("the system knows no user '{}'; 'getent passwd' shows whom it knows", short(user));
            Err(Error::NotFound { what: "user", name: user.to_owned(), text }.into())
        }
    }
}

/// The names of a caller's groups, numbers of those that have none.
fn groups_of(caller: &Caller) -> Vec<String> {
    let mut ids: Vec<u32> = std::iter::once(caller.gid).chain(caller.groups.iter().copied()).filter(|gid| *gid != u32::MAX).collect();
    let mut seen = std::collections::BTreeSet::new();
    ids.retain(|gid| seen.insert(*gid));
    let name = |gid: u32| uzers::get_group_by_gid(gid).map(|group| group.name().to_string_lossy().into_owned());
    ids.into_iter().map(|gid| name(gid).unwrap_or_else(|| gid.to_string())).collect()
}
