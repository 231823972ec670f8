//! What comes with a stored configuration, what became of it, and what is to be done next: for people, or as one JSON document.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use keepd_protocol::configuration::{ConfigFileInfo, ItemAction, PlannedItem};
use keepd_protocol::model::escape;
use serde::Serialize;

use super::choose::Chosen;
use crate::config::{self, Config};
use crate::meta::apply::Prepared;
use crate::rescue::arguments::{Beginning, Place};
use crate::rescue::{Exit, Result, print_json, render, tell};

/// A destination as it was found.
#[derive(Debug, Default, Serialize)]
pub struct Seen {
    pub name: String,
    pub location: String,
    /// None: it could not be looked at.
    pub backups: Option<u64>,
    /// Nothing was ever backed up to it.
    pub is_new: bool,
    /// Another machine, which has to be taken over before this one can write there.
    pub writer: Option<String>,
    pub taken_over: bool,
    pub problems: Vec<String>,
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The object or file that it came from.
    pub from: String,
    /// Beside it at the destination.
    pub newer: usize,
    pub older: usize,
    pub file: ConfigFileInfo,
    pub config: PathBuf,
    pub state_dir: PathBuf,
    pub items: Vec<PlannedItem>,
    /// What runs on this machine from now on.
    pub programs: Vec<String>,
    pub warnings: Vec<String>,
    /// Secrets that have to be put where they belong.
    pub missing: Vec<String>,
    /// Secrets that are there in this shell only.
    pub asked_elsewhere: Vec<String>,
    /// What `keepd --check` would refuse.
    pub problems: Vec<String>,
    pub written: Vec<String>,
    pub destinations: Vec<Seen>,
    pub next: Vec<String>,
    pub dry_run: bool,
    #[serde(skip)]
    socket: PathBuf,
    #[serde(skip)]
    jobs: Vec<String>,
    #[serde(skip)]
    json: bool,
    #[serde(skip)]
    pub quiet: bool,
}

impl Report {
    pub fn of(place: &Place, main: &Path, chosen: &Chosen, how: &Beginning) -> Self {
        let envelope = &chosen.envelope;
        let (newer, older) = chosen.among.as_ref().map_or((0, 0), |among| (among.newer, among.older));
        Self {
            from: chosen.name.clone(),
            newer,
            older,
            file: envelope.info(chosen.sealed, chosen.opened_with.clone()),
            config: main.to_owned(),
            state_dir: PathBuf::new(),
            items: Vec::new(),
            programs: Vec::new(),
            warnings: chosen.warnings.clone(),
            missing: Vec::new(),
            asked_elsewhere: Vec::new(),
            problems: Vec::new(),
            written: Vec::new(),
            destinations: Vec::new(),
            next: Vec::new(),
            dry_run: how.dry_run,
            socket: PathBuf::new(),
            jobs: Vec::new(),
            json: place.json,
            quiet: place.quiet,
        }
    }

    /// What the plan says.
    pub fn planned(&mut self, prepared: &Prepared, config: &Config) {
        let plan = prepared.plan();
        self.items = plan.items.clone();
        self.programs = super::programs(&plan.items);
        self.missing = plan.missing.clone();
        self.state_dir = config.daemon.state_dir.clone();
        self.socket = config.daemon.socket.clone();
        self.jobs = config.jobs.keys().cloned().collect();
        let left_out = plan.items.iter().filter(|item| item.action != ItemAction::Add);
        self.warnings.extend(left_out.map(|item| format!("{} is left out: {}", item.item, item.notes.join("; "))));
    }

    pub fn tell_warnings(&self) {
        self.warnings.iter().for_each(|text| tell(&format!("warning: {text}")));
    }

    /// Before anything is written.
    pub fn show_what_comes(&self) -> Result<()> {
        if self.json || self.quiet {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        let file = &self.file;
        let secrets = if file.includes_secrets { "with its secrets" } else { "without secrets" };
        writeln!(
            out,
            "The configuration of {}, made {} by keepd {}: {}, {secrets}, {}",
            escape(&file.instance),
            render::time(&file.exported_at),
            escape(&file.keepd_version),
            escape(&self.from),
            file.opened_with.as_ref().map_or_else(|| "not sealed".to_owned(), |key| format!("opened with {}", escape(key)))
        )?;
        match (self.newer, self.older) {
            (0, 0) => {}
            (0, older) => writeln!(out, "  the newest there; {older} older")?,
            (newer, older) => writeln!(out, "  NOT the newest there: {newer} newer, {older} older")?,
        }
        let names: Vec<String> = self.items.iter().filter(|i| i.action == ItemAction::Add).map(|i| escape(&i.item)).collect();
        writeln!(out, "It has {}: {}", render_count(names.len(), "item", "items"), names.join(", "))?;
        if !self.programs.is_empty() {
            writeln!(out, "With it come programs, and what they are told, which keepd will run:")?;
        }
        for program in &self.programs {
            writeln!(out, "  {}", escape(program))?;
        }
        Ok(())
    }

    /// What became of it, and what is next.
    pub fn end(mut self) -> Result<Exit> {
        self.next = if self.dry_run { Vec::new() } else { self.steps() };
        let is_whole = self.missing.is_empty()
            && self.asked_elsewhere.is_empty()
            && self.problems.is_empty()
            && self.items.iter().all(|item| item.action == ItemAction::Add)
            && self.destinations.iter().all(|seen| seen.problems.is_empty());
        let exit = if is_whole { Exit::Good } else { Exit::Partial };
        if self.json {
            print_json(&self)?;
        } else {
            self.show()?;
        }
        Ok(exit)
    }

    fn show(&self) -> Result<()> {
        for problem in &self.problems {
            tell(&format!("warning: {problem}"));
        }
        for seen in &self.destinations {
            seen.problems.iter().for_each(|problem| tell(&format!("warning: {}: {problem}", seen.name)));
        }
        for missing in self.missing.iter().chain(&self.asked_elsewhere) {
            tell(&format!("missing: {missing}"));
        }
        if self.quiet {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        if self.dry_run {
            writeln!(out, "Nothing was written. It would go to {}, with the state in {}", self.config.display(), self.state_dir.display())?;
            return Ok(());
        }
        writeln!(out, "Written:")?;
        for path in &self.written {
            writeln!(out, "  {}", escape(path))?;
        }
        writeln!(out, "Taken up, in {}:", self.state_dir.display())?;
        for seen in &self.destinations {
            let found = match seen.backups {
                Some(n) => render_count(n as usize, "backup", "backups"),
                None if seen.is_new => "nothing was backed up to it yet".to_owned(),
                None => "could not be looked at; keepd tries again when it starts".to_owned(),
            };
            let writer = match (&seen.writer, seen.taken_over) {
                (_, true) => "; taken over, this machine writes to it now".to_owned(),
                (Some(who), _) => format!("; {} writes to it", escape(who)),
                _ => String::new(),
            };
            writeln!(out, "  {} ({}): {found}{writer}", seen.name, escape(&seen.location))?;
        }
        writeln!(out, "Next:")?;
        for step in &self.next {
            writeln!(out, "  {}", escape(step))?;
        }
        Ok(())
    }

    /// Commands, each with a word on it.
    fn steps(&self) -> Vec<String> {
        let config = if self.config == config::default_path() { String::new() } else { format!(" --config {}", self.config.display()) };
        let usual = config::default_socket().is_some_and(|socket| socket == self.socket);
        let ctl = if usual { "keepctl".to_owned() } else { format!("keepctl --socket {}", self.socket.display()) };
        let start =
            if config.is_empty() { "systemctl enable --now keepd.socket keepd.service".to_owned() } else { format!("keepd{config}") };
        let mut steps = Vec::new();
        let mut step = |command: String, why: &str| steps.push(format!("{command:<58} # {why}"));
        if !self.missing.is_empty() {
            step("(put what is missing where it is said above)".to_owned(), "secrets are not in this configuration");
        }
        step(format!("keepd{config} --check"), "what this machine still lacks");
        step(start, "as a service, or in the way it is run here");
        step(format!("{ctl} list"), "the backups");
        for seen in self.destinations.iter().filter(|seen| seen.writer.is_some()) {
            step(format!("{ctl} destination take-over {}", seen.name), "if the old machine never writes there again");
        }
        for job in &self.jobs {
            step(format!("{ctl} restore latest --job {job} --in-place"), "shows what it does, and asks");
        }
        steps
    }
}

fn render_count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}
