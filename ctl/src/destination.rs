//! `keepctl destination`: destinations shown, tried, made and changed.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use keepd_protocol::configuration::{ConfigEdit, EditKind};
use keepd_protocol::methods::*;
use keepd_protocol::model::escape;
use serde_json::{Map, Value};

use crate::change::{self, Changing, Keys};
use crate::commands::Context;
use crate::{Exit, Failure, editor, job};

type Result<T> = std::result::Result<T, Failure>;

#[derive(Subcommand)]
pub enum DestinationCommand {
    /// All destinations with where they are and how they do
    List,
    /// A destination, and how it does
    Show { destination: String },
    /// Try what a destination can do; leaves nothing behind
    Test { destination: String },
    /// Make this machine the one that writes there: the other is gone, or shall stop
    TakeOver { destination: String },
    /// Make a destination, in a file of its own in conf.d
    Add(Box<AddArguments>),
    /// Change a destination: by options, or without any in $VISUAL or $EDITOR
    Edit(Box<EditArguments>),
    /// Take a destination out of the configuration; what is stored there stays
    Remove {
        destination: String,
        #[command(flatten)]
        how: Changing,
    },
}

/// What most destinations have; secrets are named, not given: --set 'secret_access_key={ file = "/etc/keepd/secrets/s3" }'
#[derive(Args, Clone)]
pub struct DestinationOptions {
    /// fs, s3, sftp, …
    #[arg(long, value_name = "SERVICE")]
    service: Option<String>,
    /// The directory there
    #[arg(long, value_name = "PATH")]
    root: Option<String>,
    /// The encryption profile, or none
    #[arg(long, value_name = "PROFILE|none")]
    encryption: Option<String>,
    #[command(flatten)]
    keys: Keys,
}

#[derive(Args, Clone)]
pub struct AddArguments {
    destination: String,
    #[command(flatten)]
    options: DestinationOptions,
    /// TOML of the destination as it is to stand in the file ('-': standard input)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["service", "root", "encryption", "set", "unset"])]
    from: Option<PathBuf>,
    #[command(flatten)]
    how: Changing,
}

#[derive(Args, Clone)]
pub struct EditArguments {
    destination: String,
    #[command(flatten)]
    options: DestinationOptions,
    #[command(flatten)]
    how: Changing,
}

pub fn run(context: &Context<'_>, command: &DestinationCommand) -> Result<Exit> {
    match command {
        DestinationCommand::List => context.destination_list(),
        DestinationCommand::Show { destination } => context.destination_show(destination),
        DestinationCommand::Test { destination } => context.destination_test(destination.clone()),
        DestinationCommand::TakeOver { destination } => {
            let out = context.client()?.call::<TakeOver>(&take_over::In { destination: destination.clone() })?;
            context.done(&out, &escape(&out.message))
        }
        DestinationCommand::Add(arguments) => {
            let item = item(&arguments.destination);
            let edit = match &arguments.from {
                Some(from) => ConfigEdit { item, change: EditKind::Add, text: Some(job::read(from)?), ..ConfigEdit::default() },
                None => change::edit(&item, EditKind::Add, arguments.options.values()?),
            };
            change::change(context, edit, &arguments.how)
        }
        DestinationCommand::Edit(arguments) => {
            let item = item(&arguments.destination);
            let values = arguments.options.values()?;
            match values.is_empty() {
                true => editor::edit(context, &item, &arguments.how),
                false => change::change(context, change::edit(&item, EditKind::Patch, values), &arguments.how),
            }
        }
        DestinationCommand::Remove { destination, how } => {
            let planned = change::plan(context, vec![change::edit(&item(destination), EditKind::Remove, Map::new())], None)?;
            let question = format!("remove destination {}? What is stored there stays.", escape(destination));
            change::make(context, planned, how, None, &question)?;
            Ok(Exit::Good)
        }
    }
}

fn item(destination: &str) -> String {
    format!("destination.{destination}")
}

impl DestinationOptions {
    fn values(&self) -> Result<Map<String, Value>> {
        let given = [("service", &self.service), ("root", &self.root), ("encryption", &self.encryption)];
        let mut values: Map<String, Value> =
            given.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value.clone()?.into()))).collect();
        self.keys.put_into(&mut values)?;
        Ok(values)
    }
}
