//! Changing the configuration by single tables: what would be changed is shown, asked for, and changed if nobody else did meanwhile.

use std::io::{self, IsTerminal};
use std::str::FromStr;

use clap::Args;
use keepd_protocol::configuration::{ConfigEdit, EditKind, LeftBackups};
use keepd_protocol::methods::*;
use keepd_protocol::model::escape;
use serde_json::{Map, Value};

use crate::commands::{Context, print_json};
use crate::{Exit, Failure};

type Result<T> = std::result::Result<T, Failure>;

/// How a change is made.
#[derive(Args, Clone)]
pub struct Changing {
    /// Only show what would be changed
    #[arg(long)]
    pub dry_run: bool,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

/// Any key of a table, as the configuration has it.
#[derive(Args, Clone)]
pub struct Keys {
    /// A key and its value as TOML; keys in tables with dots: retention.keep_daily=7, source.db.verify='"full"'; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// A key that goes; may be repeated
    #[arg(long, value_name = "KEY")]
    pub unset: Vec<String>,
}

impl Keys {
    /// Adds them to the values of an edit.
    pub fn put_into(&self, values: &mut Map<String, Value>) -> Result<()> {
        let usage = |text: String| Failure::new(Exit::Usage, text);
        for given in &self.set {
            let (key, value) =
                given.split_once('=').ok_or_else(|| usage(format!("--set {} has no value; write KEY=VALUE", escape(given))))?;
            let key = key.trim();
            if values.insert(key.to_owned(), toml_value(key, value)?).is_some() {
                return Err(usage(format!("{} is given twice", escape(key))));
            }
        }
        for key in &self.unset {
            if values.insert(key.trim().to_owned(), Value::Null).is_some() {
                return Err(usage(format!("{} is given twice", escape(key))));
            }
        }
        Ok(())
    }
}

fn toml_value(key: &str, text: &str) -> Result<Value> {
    let usage = |text: String| Failure::new(Exit::Usage, text);
    let wrong = |e: toml_edit::TomlError| {
        let hint = match text.contains(['"', '\'', '{', '[']) {
            false => format!("; a text stands in quotes: --set '{}=\"{}\"'", escape(key), escape(text.trim())),
            true => String::new(),
        };
        usage(format!("the value of {} is no TOML ({}){hint}", escape(key), e.message().lines().collect::<Vec<_>>().join("; ")))
    };
    let value = toml_edit::Value::from_str(text.trim()).map_err(wrong)?;
    json(&value).ok_or_else(|| usage(format!("the value of {} is a number that no configuration has", escape(key))))
}

fn json(value: &toml_edit::Value) -> Option<Value> {
    Some(match value {
        toml_edit::Value::String(text) => text.value().as_str().into(),
        toml_edit::Value::Integer(number) => (*number.value()).into(),
        toml_edit::Value::Float(number) => Value::Number(serde_json::Number::from_f64(*number.value())?),
        toml_edit::Value::Boolean(value) => (*value.value()).into(),
        toml_edit::Value::Datetime(time) => time.value().to_string().into(),
        toml_edit::Value::Array(list) => list.iter().map(json).collect::<Option<Vec<_>>>()?.into(),
        toml_edit::Value::InlineTable(table) => {
            // Dotted keys make tables in it.
            let entry = |(key, value): (&str, &toml_edit::Value)| Some((key.to_owned(), json(value)?));
            table.iter().map(entry).collect::<Option<Map<_, _>>>()?.into()
        }
    })
}

pub fn edit(item: &str, change: EditKind, values: Map<String, Value>) -> ConfigEdit {
    ConfigEdit { item: item.to_owned(), change, values, text: None }
}

/// A change that was looked at, and not made.
pub struct Planned {
    call: edit_config::In,
    pub out: edit_config::Out,
}

impl Planned {
    pub fn is_nothing(&self) -> bool {
        self.out.diff.is_empty()
    }
}

/// What edits would do; `base`: of the configuration that they were made from, where that was shown already.
pub fn plan(context: &Context<'_>, edits: Vec<ConfigEdit>, base: Option<String>) -> Result<Planned> {
    let call = edit_config::In { edits, base, backups: None, dry_run: true };
    let out = context.client()?.call::<EditConfig>(&call)?;
    Ok(Planned { call, out })
}

/// Shows a planned change, asks, and makes it. None: it was only shown, or there was nothing to do.
pub fn make(
    context: &Context<'_>,
    planned: Planned,
    how: &Changing,
    backups: Option<LeftBackups>,
    question: &str,
) -> Result<Option<edit_config::Out>> {
    let Planned { mut call, out } = planned;
    let is_nothing = out.diff.is_empty();
    let shows = !context.json() && (!context.arguments.quiet || !how.yes);
    if shows && !is_nothing {
        println!("{}", shown(&out.diff));
        tell_warnings(&out);
    } else if !is_nothing && !how.yes && !how.dry_run {
        // Nobody is asked about what was not shown.
        eprintln!("{}", shown(&out.diff));
        tell_warnings(&out);
    }
    if is_nothing || how.dry_run {
        if context.json() {
            print_json(&out)?;
        } else if !context.arguments.quiet {
            match is_nothing {
                true => println!("Nothing is to be changed."),
                false => out.message.lines().for_each(|line| println!("{}", escape(line))),
            }
        }
        return Ok(None);
    }
    if !how.yes {
        context.ask(question)?;
    }
    call.dry_run = false;
    call.base = Some(out.base);
    call.backups = backups;
    let done = context.client()?.call::<EditConfig>(&call)?;
    if context.json() {
        print_json(&done)?;
    } else if !context.arguments.quiet {
        done.message.lines().for_each(|line| println!("{}", escape(line)));
    }
    if !shows && !context.json() {
        tell_warnings(&done);
    }
    Ok(Some(done))
}

fn shown(diff: &str) -> String {
    diff.lines().map(escape).collect::<Vec<_>>().join("\n")
}

fn tell_warnings(out: &edit_config::Out) {
    out.warnings.iter().for_each(|text| eprintln!("{}", escape(text)));
}

/// The whole of a simple change.
pub fn change(context: &Context<'_>, edit: ConfigEdit, how: &Changing) -> Result<Exit> {
    let planned = plan(context, vec![edit], None)?;
    make(context, planned, how, None, "change the configuration so?")?;
    Ok(Exit::Good)
}

/// Whether a question can be asked; an error with advice where it cannot and would have to be.
pub fn can_ask(how: &Changing) -> Result<()> {
    match how.yes || how.dry_run || io::stdin().is_terminal() {
        true => Ok(()),
        false => Err(Failure::new(Exit::Usage, "this asks first; without a terminal say --yes")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_are_toml() {
        let keys = |set: &[&str], unset: &[&str]| {
            let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
            let mut values = Map::new();
            Keys { set: owned(set), unset: owned(unset) }.put_into(&mut values).map(|()| Value::Object(values)).map_err(|f| f.text)
        };
        assert_eq!(
            keys(
                &["enabled=false", "a.b = 'x=y'", "at=2026-12-24T18:00:00", "list=[1, 2.5]", "password={ file = \"/p\", x.y = 1 }"],
                &["jitter"]
            ),
            Ok(
                json!({"enabled": false, "a.b": "x=y", "at": "2026-12-24T18:00:00", "list": [1, 2.5], "password": {"file": "/p", "x": {"y": 1}}, "jitter": null})
            )
        );
        assert!(keys(&["timezone=Europe/Berlin"], &[]).unwrap_err().contains("--set 'timezone=\"Europe/Berlin\"'"));
        assert!(keys(&["enabled"], &[]).unwrap_err().contains("KEY=VALUE"));
        assert!(keys(&["a=1"], &["a"]).unwrap_err().contains("twice"));
        assert!(keys(&["a=nan"], &[]).is_err());
    }
}
