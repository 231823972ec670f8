//! `keepctl access`: who may do what.

use std::io::{self, Write};

use clap::Subcommand;
use keepd_protocol::access::{Access, Right, Role};
use keepd_protocol::methods::*;
use keepd_protocol::model::escape;

use crate::client::Client;
use crate::commands::{Context, print_json};
use crate::render::table;
use crate::{Exit, Failure};

#[derive(Subcommand)]
pub enum AccessCommand {
    /// What you may do, or what USER may
    Show {
        /// A user's name or number
        user: Option<String>,
        /// Every role, and who has it
        #[arg(long)]
        roles: bool,
    },
}

pub fn run(context: &Context<'_>, command: &AccessCommand) -> Result<Exit, Failure> {
    match command {
        AccessCommand::Show { user, roles } => show(context, user.clone(), *roles),
    }
}

fn show(context: &Context<'_>, user: Option<String>, roles: bool) -> Result<Exit, Failure> {
    let is_named = user.is_some();
    let out = Client::connect(context.socket)?.call::<ShowAccess>(&show_access::In { user, roles })?;
    if context.arguments.json {
        print_json(&out)?;
        return Ok(Exit::Good);
    }
    // With --roles alone it is the roles that are wanted.
    if is_named || !roles {
        show_user(&out.access, &out.roles, roles)?;
    }
    if roles {
        if is_named {
            writeln!(io::stdout())?;
        }
        let row = |role: &Role| vec![escape(&role.name), rights(&role.rights), jobs(role.jobs.as_ref()), escape(&role.members.join(", "))];
        table(&["ROLE", "RIGHTS", "JOBS", "WHO HAS IT"], out.roles.iter().map(row).collect())?;
    }
    Ok(Exit::Good)
}

fn show_user(access: &Access, roles: &[Role], with_roles: bool) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let groups = if access.groups.is_empty() { "no group".to_owned() } else { escape(&access.groups.join(", ")) };
    writeln!(out, "{} (uid {}; {groups})", escape(&access.user), access.uid)?;
    if access.grants.is_empty() {
        let admins = roles.iter().find(|role| role.name == "admin").map(|role| escape(&role.members.join(", ")));
        let whom = admins.map(|admins| format!("; who may give rights: {admins}")).unwrap_or_default();
        writeln!(out, "may do nothing{}", if with_roles { String::new() } else { whom })?;
        return Ok(());
    }
    drop(out);
    let rows = access.grants.iter().map(|g| vec![escape(&g.role), rights(&g.rights), jobs(g.jobs.as_ref()), escape(&g.through)]).collect();
    table(&["ROLE", "RIGHTS", "JOBS", "THROUGH"], rows)?;
    Ok(())
}

fn rights(rights: &[Right]) -> String {
    if rights.len() == Right::ALL.len() {
        return "all".into();
    }
    rights.iter().map(|right| right.word()).collect::<Vec<_>>().join(", ")
}

fn jobs(jobs: Option<&Vec<String>>) -> String {
    jobs.map_or_else(|| "all".into(), |jobs| escape(&jobs.join(", ")))
}
