//! `keepctl config`: the configuration checked, shown, exported, imported and brought back.
//!
//! The daemon reads and writes the configuration; keepctl opens files for its caller, shows what would be changed, and asks.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use jiff::Timestamp;
use keepd_protocol::configuration::{Allow, ConfigItem, ConfigPlan, FieldChange, ImportMode, ItemAction, ItemConflict, PlannedItem};
use keepd_protocol::methods::*;
use keepd_protocol::model::{ArchiveCompression, escape};

use crate::commands::{Context, pipe, print_json, to_stdout};
use crate::new_file::NewFile;
use crate::render::{bytes, lines, table, time};
use crate::{Exit, Failure, remote};

type Result<T> = std::result::Result<T, Failure>;

/// What an export is called where nobody says it.
const DEFAULT_NAME: &str = "config_backup_";

#[derive(Subcommand)]
pub enum ConfigCommand {
    /// What is wrong with the configuration as it stands in its files; changes nothing
    Check,
    /// The configuration, table by table, with the file that each stands in
    Show {
        /// Only these: job.shop, destination.offsite, or all jobs: job
        #[arg(value_name = "ITEM")]
        items: Vec<String>,
    },
    /// What an export would hold, and which secrets, by name
    Preview {
        /// Only items of this kind: settings, encryption, destinations, jobs, access, notifications, schedule; may be repeated
        #[arg(long = "type", value_name = "KIND", value_delimiter = ',')]
        types: Vec<String>,
    },
    /// Write the configuration as one file to take along
    Export(ConfigExportArguments),
    /// Whether a file could be imported, and what would conflict; changes nothing
    Validate {
        file: PathBuf,
        /// A key file or recovery kit that it opens with; may be repeated
        #[arg(long, value_name = "FILE")]
        key: Vec<PathBuf>,
    },
    /// Bring an exported configuration in: shows what it changes, asks, and changes all of it at once
    Import(ConfigImportArguments),
    /// Bring back the configuration from before the last change made through keepd (an import, 'job edit' and the like); once more brings that change back
    Undo {
        /// Only show what would be changed
        #[arg(long)]
        dry_run: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Store the configuration now where [config_backup] says
    Backup {
        /// Return at once
        #[arg(long)]
        detach: bool,
    },
    /// The stored configurations at a destination
    List {
        /// That of [config_backup] where none is named
        destination: Option<String>,
    },
    /// Write a stored configuration, as it is stored, to a file
    Fetch {
        /// Its name as 'keepctl config list' shows it; the newest without one
        name: Option<String>,
        /// That of [config_backup] where none is named
        #[arg(long, value_name = "NAME")]
        destination: Option<String>,
        /// Where to ('-' is standard output)
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
}

#[derive(Args, Clone)]
pub struct ConfigExportArguments {
    /// Where to ('-' is standard output); config_backup_<UTC time>.json.gz.enc in this directory where nothing is said
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Passwords, access keys and key files, too; it must be sealed then
    #[arg(long)]
    pub include_secrets: bool,
    /// Seal it for this encryption profile ('none': for everybody to read); the only profile where there is one
    #[arg(long, value_name = "PROFILE|none")]
    pub encryption: Option<String>,
    /// How it is compressed, where FILE's name does not say it (gzip)
    #[arg(long, value_name = "none|gzip|zstd", value_parser = compression)]
    pub compression: Option<ArchiveCompression>,
    /// Only items of this kind: settings, encryption, destinations, jobs, access, notifications, schedule; may be repeated
    #[arg(long = "type", value_name = "KIND", value_delimiter = ',')]
    pub types: Vec<String>,
}

#[derive(Args, Clone)]
pub struct ConfigImportArguments {
    pub file: PathBuf,
    /// A key file or recovery kit that it opens with, tried before those of the configured profiles; may be repeated
    #[arg(long, value_name = "FILE")]
    pub key: Vec<PathBuf>,
    /// full: what is not in it goes; merge: what is not in it stays; selective: only what --only names
    #[arg(long, value_name = "full|merge|selective", value_parser = word::<ImportMode>)]
    pub mode: Option<ImportMode>,
    /// job.shop, or all of a kind: job; may be repeated
    #[arg(long, value_name = "ITEM")]
    pub only: Vec<String>,
    /// What becomes of an item that is here and is another one
    #[arg(long, value_name = "skip|rename|overwrite|ask", value_parser = word::<ItemConflict>)]
    pub on_conflict: Option<ItemConflict>,
    /// Only show what would be changed
    #[arg(long)]
    pub dry_run: bool,
    /// An item that needs another one that is missing makes it fail, instead of being left out
    #[arg(long)]
    pub strict: bool,
    /// Something may be stored with less encryption than now, or with none
    #[arg(long)]
    pub allow_weaker_encryption: bool,
    /// Programs may come in: hooks, plugins, commands, tools
    #[arg(long)]
    pub allow_commands: bool,
    /// Somebody may get an administrator's rights
    #[arg(long)]
    pub allow_admins: bool,
    /// A key or secret may take the place of another one of its name
    #[arg(long)]
    pub allow_key_change: bool,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

fn compression(text: &str) -> std::result::Result<ArchiveCompression, String> {
    text.parse()
}

fn word<T: std::str::FromStr<Err = String>>(text: &str) -> std::result::Result<T, String> {
    text.parse()
}

pub fn run(context: &Context<'_>, command: &ConfigCommand) -> Result<Exit> {
    match command {
        ConfigCommand::Check => check(context),
        ConfigCommand::Show { items } => show(context, items.clone()),
        ConfigCommand::Preview { types } => preview(context, types.clone()),
        ConfigCommand::Export(arguments) => export(context, arguments),
        ConfigCommand::Validate { file, key } => validate(context, file, key),
        ConfigCommand::Import(arguments) => import(context, arguments),
        ConfigCommand::Undo { dry_run, yes } => undo(context, *dry_run, *yes),
        ConfigCommand::Backup { detach } => {
            let started = context.client()?.call::<StartConfigBackup>(&start_config_backup::In {})?;
            if *detach { context.done(&started, &format!("run {}", started.run)) } else { context.work(&started.run, true) }
        }
        ConfigCommand::List { destination } => list(context, destination.clone()),
        ConfigCommand::Fetch { name, destination, output } => {
            let call = fetch_config_backup::In { destination: destination.clone(), name: name.clone() };
            let (out, size) = write(output, context, |to| {
                let out = context.client()?.call_with::<FetchConfigBackup>(&call, &[to])?;
                let size = out.bytes;
                Ok((out, size))
            })?;
            told_written(context, &out, output, &format!("fetched {} to {}, {}", escape(&out.name), shown(output), bytes(size)))
        }
    }
}

fn shown(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

fn check(context: &Context<'_>) -> Result<Exit> {
    let found = context.client()?.call::<CheckConfig>(&check_config::In {})?;
    let exit = if found.errors.is_empty() { Exit::Good } else { Exit::Failed };
    if context.json() {
        print_json(&found)?;
        return Ok(exit);
    }
    found.warnings.iter().chain(&found.errors).for_each(|text| eprintln!("{}", lines(text)));
    if exit == Exit::Good && !context.arguments.quiet {
        let count = |n: u32, one: &str| format!("{n} {one}{}", if n == 1 { "" } else { "s" });
        println!("the configuration is valid: {}, {}", count(found.jobs, "job"), count(found.destinations, "destination"));
    }
    Ok(exit)
}

/// Each table with its file; TOML that could be read again.
fn show(context: &Context<'_>, items: Vec<String>) -> Result<Exit> {
    let found = context.client()?.call::<ShowConfig>(&show_config::In { items })?;
    if context.json() {
        print_json(&found.config)?;
        return Ok(Exit::Good);
    }
    let mut out = io::stdout().lock();
    let mut file = "";
    for item in &found.config {
        if item.file != file {
            file = &item.file;
            writeln!(out, "# {}", escape(file))?;
        }
        writeln!(out, "{}\n", item.toml.lines().map(escape).collect::<Vec<_>>().join("\n").trim_end())?;
    }
    Ok(Exit::Good)
}

fn preview(context: &Context<'_>, types: Vec<String>) -> Result<Exit> {
    let found = context.client()?.call::<PreviewConfig>(&preview_config::In { types })?;
    let unreadable = found.items.iter().flat_map(|i| &i.secrets).any(|s| s.problem.is_some());
    let exit = if unreadable { Exit::Partial } else { Exit::Good };
    if context.json() {
        print_json(&found)?;
        return Ok(exit);
    }
    let row = |item: &ConfigItem| vec![escape(&item.item), escape(&item.file), item.secrets.len().to_string()];
    table(&["ITEM", "FILE", "SECRETS"], found.items.iter().map(row).collect())?;
    let secrets: Vec<Vec<String>> = found
        .items
        .iter()
        .flat_map(|item| item.secrets.iter().map(move |s| (item, s)))
        .map(|(item, s)| {
            let state = s.problem.as_ref().map_or_else(|| "can be read".to_owned(), |p| escape(p));
            vec![escape(&item.item), escape(&s.at), escape(&s.from), state]
        })
        .collect();
    println!();
    if secrets.is_empty() {
        println!("No secret would go with it.");
    } else {
        println!("With --include-secrets these go with it, else their places are empty:");
        table(&["ITEM", "SECRET", "FROM", ""], secrets)?;
    }
    println!("\n{} items of {}; it can be sealed for: {}", found.items.len(), escape(&found.instance), profiles(&found.profiles));
    Ok(exit)
}

fn profiles(names: &[String]) -> String {
    if names.is_empty() {
        "nothing, there is no encryption profile".into()
    } else {
        names.iter().map(|n| escape(n)).collect::<Vec<_>>().join(", ")
    }
}

/// How an export is to be made.
#[derive(Debug, PartialEq, Eq)]
struct How {
    output: PathBuf,
    /// None: for everybody to read.
    profile: Option<String>,
    compression: ArchiveCompression,
}

/// What follows from the arguments, the profiles that there are, and the time.
fn how(arguments: &ConfigExportArguments, profiles_here: &[String], now: Timestamp) -> Result<How> {
    let usage = |text: String| Failure::new(Exit::Usage, text);
    let file = arguments.output.as_ref().and_then(|o| o.file_name()).map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
    let (inner, says_sealed) = file.strip_suffix(".enc").map_or((file.as_str(), false), |inner| (inner, true));
    let endings = [(".json", ArchiveCompression::None), (".json.gz", ArchiveCompression::Gzip), (".json.zst", ArchiveCompression::Zstd)];
    let named = endings.into_iter().find(|(ending, _)| inner.ends_with(ending)).map(|(_, c)| c);
    let says_plain = named.is_some() && !says_sealed;
    let is_plain = match arguments.encryption.as_deref() {
        Some(name) => name == "none",
        None => says_plain || (profiles_here.is_empty() && !says_sealed),
    };
    if is_plain && arguments.include_secrets {
        return Err(usage(format!(
            "secrets leave only sealed: name an encryption profile by --encryption (there are: {}), and a file that ends with .enc",
            profiles(profiles_here)
        )));
    }
    let profile = match (is_plain, arguments.encryption.as_deref(), profiles_here) {
        (true, _, _) => None,
        (false, Some(name), _) => Some(name.to_owned()),
        (false, None, [one]) => Some(one.clone()),
        (false, None, _) => return Err(usage(format!("say for which profile it is sealed by --encryption: {}", profiles(profiles_here)))),
    };
    if is_plain && says_sealed {
        return Err(usage(format!("{file} is sealed by its name, and --encryption none says that it is not")));
    }
    if !is_plain && says_plain {
        return Err(usage(format!("{file} is not sealed by its name; call it {file}.enc, or say --encryption none")));
    }
    if let (Some(given), Some(named)) = (arguments.compression, named)
        && given != named
    {
        return Err(usage(format!("{file} is {named} by its name, and --compression says {given}")));
    }
    let compression = arguments.compression.or(named).unwrap_or(ArchiveCompression::Gzip);
    let output = arguments.output.clone().unwrap_or_else(|| {
        let packed = match compression {
            ArchiveCompression::None => "",
            ArchiveCompression::Gzip => ".gz",
            ArchiveCompression::Zstd => ".zst",
        };
        let sealed = if is_plain { "" } else { ".enc" };
        PathBuf::from(format!("{DEFAULT_NAME}{}.json{packed}{sealed}", now.strftime("%Y%m%dT%H%M%SZ")))
    });
    Ok(How { output, profile, compression })
}

fn export(context: &Context<'_>, arguments: &ConfigExportArguments) -> Result<Exit> {
    let preview = context.client()?.call::<PreviewConfig>(&preview_config::In { types: arguments.types.clone() })?;
    let How { output, profile, compression } = how(arguments, &preview.profiles, Timestamp::now())?;
    let call = export_config::In {
        types: arguments.types.clone(),
        include_secrets: arguments.include_secrets,
        profile: profile.clone(),
        compression,
    };
    let (out, size) = write(&output, context, |to| {
        let out = context.client()?.call_with::<ExportConfig>(&call, &[to])?;
        let size = out.bytes;
        Ok((out, size))
    })?;
    let secrets = match (arguments.include_secrets, preview.items.iter().map(|i| i.secrets.len()).sum::<usize>()) {
        (true, _) => format!("{} secrets", out.secrets),
        (false, 0) => "no secrets to leave out".into(),
        (false, n) => format!("without its {n} secrets, which an import asks for (--include-secrets takes them along)"),
    };
    let sealed = profile.map_or_else(|| "for everybody to read".to_owned(), |p| format!("sealed for profile {}", escape(&p)));
    let text = format!("exported {} items to {}, {}, {sealed}, {secrets}", out.items, shown(&output), bytes(size));
    told_written(context, &out, &output, &text)
}

/// Has something written to a new file, or to standard output.
fn write<T>(output: &Path, context: &Context<'_>, call: impl FnOnce(BorrowedFd<'_>) -> Result<(T, u64)>) -> Result<(T, u64)> {
    if output != Path::new("-") {
        let file = NewFile::create(output)?;
        let out = call(file.file.as_file().as_fd())?;
        file.publish()?;
        return Ok(out);
    }
    if context.json() {
        return Err(Failure::new(Exit::Usage, "standard output cannot take the file and a JSON document; give -o FILE"));
    }
    if io::stdout().is_terminal() {
        return Err(Failure::new(Exit::Usage, "this is nothing for a terminal; give -o FILE, or send it through a pipe"));
    }
    let (mut reader, writer) = pipe()?;
    let copying = std::thread::spawn(move || to_stdout(&mut reader));
    let out = call(writer.as_fd());
    drop(writer);
    let copied = copying.join().map_err(|_| Failure::failed("standard output could not be written"))?;
    let (out, size) = out?;
    let copied = copied?;
    remote::settle()?;
    match copied == size {
        true => Ok((out, size)),
        false => Err(Failure::failed(format!("{copied} of {size} bytes came: what was written is not whole"))),
    }
}

fn told_written(context: &Context<'_>, out: &impl serde::Serialize, output: &Path, text: &str) -> Result<Exit> {
    // Standard output may be what was written.
    if output == Path::new("-") { Ok(Exit::Good) } else { context.done(out, text) }
}

/// The file and the keys, opened with the caller's rights.
struct Given {
    file: File,
    keys: Vec<File>,
}

impl Given {
    fn open(file: &Path, keys: &[PathBuf]) -> Result<Self> {
        let open = |path: &Path| File::open(path).map_err(|e| Failure::failed(format!("cannot read {}: {e}", path.display())));
        if keys.len() >= keepd_protocol::MAX_DESCRIPTORS {
            let most = keepd_protocol::MAX_DESCRIPTORS - 1;
            return Err(Failure::new(Exit::Usage, format!("at most {most} key files can be given")));
        }
        Ok(Self { file: open(file)?, keys: keys.iter().map(|path| open(path)).collect::<Result<_>>()? })
    }

    fn call(&self, context: &Context<'_>, call: &import_config::In) -> Result<import_config::Out> {
        let descriptors: Vec<_> = std::iter::once(self.file.as_fd()).chain(self.keys.iter().map(|k| k.as_fd())).collect();
        context.client()?.call_with::<ImportConfig>(call, &descriptors)
    }
}

fn validate(context: &Context<'_>, file: &Path, keys: &[PathBuf]) -> Result<Exit> {
    let call = import_config::In { validate: true, dry_run: true, ..import_config::In::default() };
    let found = Given::open(file, keys)?.call(context, &call)?;
    let exit = if found.plan.problems.is_empty() { Exit::Good } else { Exit::Failed };
    if context.json() {
        print_json(&found)?;
        return Ok(exit);
    }
    tell_file(&found);
    tell_plan(context, &found.plan);
    if exit == Exit::Good && !context.arguments.quiet {
        println!("{} can be imported.", shown(file));
    }
    Ok(exit)
}

fn tell_file(found: &import_config::Out) {
    let info = &found.file;
    let sealed = match (info.sealed, &info.opened_with) {
        (true, Some(with)) => format!("sealed, opened with {}", escape(with)),
        (true, None) => "sealed".to_owned(),
        (false, _) => "not sealed: anybody can have written it".to_owned(),
    };
    println!(
        "{} items ({}) of {}, exported {} by keepd {}; {} secrets; {sealed}",
        info.item_count,
        escape(&info.export_type),
        escape(&info.instance),
        time(&info.exported_at),
        escape(&info.keepd_version),
        if info.includes_secrets { "with" } else { "without" },
    );
}

/// A plan as people read it: what is the same is only counted.
fn tell_plan(context: &Context<'_>, plan: &ConfigPlan) {
    let same = plan.items.iter().filter(|i| i.action == ItemAction::Same).count();
    for item in plan.items.iter().filter(|i| i.action != ItemAction::Same || context.arguments.verbose) {
        print!("{}", told_item(item));
    }
    if same > 0 {
        println!("{same} items are here already, as they are.");
    }
    plan.files.iter().for_each(|file| println!("a secret is written to {}", escape(file)));
    if context.arguments.verbose && !plan.diff.is_empty() {
        println!("\n{}", plan.diff.lines().map(escape).collect::<Vec<_>>().join("\n"));
    }
    tell_missing(plan);
    plan.problems.iter().for_each(|text| eprintln!("keepctl: {}", lines(text)));
}

fn tell_missing(plan: &ConfigPlan) {
    plan.missing.iter().for_each(|text| eprintln!("to be entered again: {}", escape(text)));
}

fn told_item(item: &PlannedItem) -> String {
    let name = escape(&item.item);
    let mut text = match (item.action, &item.to) {
        (ItemAction::Add, _) => format!("+ {name}\n"),
        (ItemAction::Rename, Some(to)) => format!("+ {name} as {}\n", escape(to)),
        (ItemAction::Rename, None) => format!("+ {name}\n"),
        (ItemAction::Overwrite, _) => format!("M {name}\n"),
        (ItemAction::Remove, _) => format!("- {name}\n"),
        (ItemAction::Skip, _) => format!("  {name} is left out\n"),
        (ItemAction::Same, _) => format!("= {name}\n"),
        (ItemAction::Ask, _) => format!("? {name} is here already, and is another one\n"),
    };
    item.changes.iter().for_each(|change| text.push_str(&told_change(change)));
    item.notes.iter().for_each(|note| _ = writeln!(text, "      {}", escape(note)));
    if !item.needs.is_empty() {
        let flags = item.needs.iter().map(|n| format!("--allow-{n}")).collect::<Vec<_>>().join(" ");
        let _ = writeln!(text, "      needs {flags}");
    }
    text
}

fn told_change(change: &FieldChange) -> String {
    let at = escape(&change.at);
    let value = |text: &str| escape(text);
    match (&change.before, &change.after) {
        (None, Some(after)) => format!("      {at} = {}\n", value(after)),
        (Some(before), None) => format!("      {at} = {} is gone\n", value(before)),
        (Some(before), Some(after)) => format!("      {at}: {} -> {}\n", value(before), value(after)),
        (None, None) => String::new(),
    }
}

fn import(context: &Context<'_>, arguments: &ConfigImportArguments) -> Result<Exit> {
    let mode = arguments.mode.unwrap_or(if arguments.only.is_empty() { ImportMode::Merge } else { ImportMode::Selective });
    let on_conflict = arguments.on_conflict.unwrap_or_default();
    let asks = on_conflict == ItemConflict::Ask;
    if asks && !io::stdin().is_terminal() {
        return Err(Failure::new(Exit::Usage, "--on-conflict ask wants a terminal; say skip, rename or overwrite"));
    }
    let allowed = [
        (arguments.allow_weaker_encryption, Allow::WeakerEncryption),
        (arguments.allow_commands, Allow::Commands),
        (arguments.allow_admins, Allow::Admins),
        (arguments.allow_key_change, Allow::KeyChange),
    ];
    let mut call = import_config::In {
        mode,
        only: arguments.only.clone(),
        on_conflict,
        strict: arguments.strict,
        allow: allowed.into_iter().filter(|(is_given, _)| *is_given).map(|(_, allow)| allow).collect(),
        dry_run: true,
        ..import_config::In::default()
    };
    let given = Given::open(&arguments.file, &arguments.key)?;
    let mut planned = given.call(context, &call)?;
    let shows = !context.json() && (!context.arguments.quiet || !arguments.yes);
    if shows {
        tell_file(&planned);
    }
    if asks {
        call.answers = answers(&planned.plan.items)?;
        planned = given.call(context, &call)?;
    }
    let plan = &planned.plan;
    if shows {
        tell_plan(context, plan);
    }
    let is_refused = !plan.problems.is_empty() || !plan.needs.is_empty();
    let changes = |i: &PlannedItem| !matches!(i.action, ItemAction::Same | ItemAction::Skip | ItemAction::Ask);
    let is_nothing = !plan.items.iter().any(changes) && plan.files.is_empty();
    if is_refused || is_nothing || arguments.dry_run {
        if context.json() {
            print_json(&planned)?;
        } else if is_nothing && !is_refused && !context.arguments.quiet {
            println!("Nothing is to be changed.");
        }
        return Ok(if is_refused { Exit::Failed } else { exit(&planned) });
    }
    if !arguments.yes {
        context.ask("change the configuration so?")?;
    }
    call.dry_run = false;
    call.base = Some(plan.base.clone());
    let done = given.call(context, &call)?;
    if context.json() {
        print_json(&done)?;
    } else if done.applied && !context.arguments.quiet {
        println!("{}; 'keepctl config undo' brings back what was", escape(&done.message));
    }
    if done.applied && !shows && !context.json() {
        tell_missing(&done.plan);
    }
    if !done.applied {
        done.plan.problems.iter().for_each(|text| eprintln!("keepctl: {}", lines(text)));
        return Ok(Exit::Failed);
    }
    Ok(exit(&done))
}

/// Partial where something was left out that is not here, or must be entered again.
fn exit(found: &import_config::Out) -> Exit {
    if found.plan.missing.is_empty() { Exit::Good } else { Exit::Partial }
}

/// Asks for each item that conflicts.
fn answers(items: &[PlannedItem]) -> Result<BTreeMap<String, ItemConflict>> {
    let mut answers = BTreeMap::new();
    for item in items.iter().filter(|i| i.action == ItemAction::Ask) {
        eprint!("{}", told_item(item));
        loop {
            eprint!("skip it, rename it, or overwrite what is here? [s/r/o] ");
            let mut answer = String::new();
            if io::stdin().read_line(&mut answer)? == 0 {
                return Err(Failure::failed("nothing was changed"));
            }
            let found = match answer.trim() {
                "s" | "skip" => ItemConflict::Skip,
                "r" | "rename" => ItemConflict::Rename,
                "o" | "overwrite" => ItemConflict::Overwrite,
                _ => continue,
            };
            answers.insert(item.item.clone(), found);
            break;
        }
    }
    Ok(answers)
}

fn undo(context: &Context<'_>, dry_run: bool, yes: bool) -> Result<Exit> {
    let planned = context.client()?.call::<UndoConfig>(&undo_config::In { dry_run: true, base: None })?;
    if !context.json() {
        println!("{}", planned.diff.lines().map(escape).collect::<Vec<_>>().join("\n"));
    }
    if dry_run {
        return if context.json() { context.done(&planned, "") } else { Ok(Exit::Good) };
    }
    if !yes {
        context.ask("change the configuration back so?")?;
    }
    let done = context.client()?.call::<UndoConfig>(&undo_config::In { dry_run: false, base: Some(planned.base) })?;
    context.done(&done, &escape(&done.message))
}

fn list(context: &Context<'_>, destination: Option<String>) -> Result<Exit> {
    let found = context.client()?.call::<ListConfigBackups>(&list_config_backups::In { destination })?;
    if context.json() {
        print_json(&found)?;
        return Ok(Exit::Good);
    }
    if found.backups.is_empty() {
        println!("no configuration is stored at {}", escape(&found.destination));
        return Ok(Exit::Good);
    }
    let rows = found.backups.iter().map(|b| vec![time(&b.time), bytes(b.bytes), escape(&b.name)]);
    table(&["TIME", "SIZE", "NAME"], rows.collect())?;
    Ok(Exit::Good)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(output: Option<&str>, encryption: Option<&str>, include_secrets: bool) -> ConfigExportArguments {
        ConfigExportArguments {
            output: output.map(PathBuf::from),
            include_secrets,
            encryption: encryption.map(str::to_owned),
            compression: None,
            types: Vec::new(),
        }
    }

    fn made(output: Option<&str>, encryption: Option<&str>, include_secrets: bool, profiles: &[&str]) -> std::result::Result<How, String> {
        let profiles: Vec<String> = profiles.iter().map(|p| (*p).to_owned()).collect();
        how(&arguments(output, encryption, include_secrets), &profiles, "2026-02-03T04:05:06Z".parse().unwrap()).map_err(|f| f.text)
    }

    #[test]
    fn an_export_is_sealed_where_it_can_be() {
        let found = made(None, None, false, &["main"]).unwrap();
        assert_eq!(found.output, Path::new("config_backup_20260203T040506Z.json.gz.enc"));
        assert_eq!((found.profile.as_deref(), found.compression), (Some("main"), ArchiveCompression::Gzip));
        assert_eq!(made(None, None, false, &[]).unwrap().output, Path::new("config_backup_20260203T040506Z.json.gz"));
        assert_eq!(made(Some("a.json"), None, false, &["main"]).unwrap().profile, None);
        assert_eq!(made(Some("a.json.enc"), None, true, &["main"]).unwrap().profile.as_deref(), Some("main"));
        assert_eq!(made(Some("a.json.zst.enc"), Some("x"), true, &["main", "x"]).unwrap().compression, ArchiveCompression::Zstd);
        assert_eq!(made(Some("-"), Some("none"), false, &["main"]).unwrap().profile, None);
        assert!(made(None, None, false, &["main", "x"]).unwrap_err().contains("--encryption"));
        assert!(made(Some("a.enc"), Some("none"), false, &["main"]).unwrap_err().contains("sealed by its name"));
        assert!(made(Some("a.json.gz"), Some("main"), false, &["main"]).unwrap_err().contains("a.json.gz.enc"));
    }

    #[test]
    fn secrets_leave_only_sealed() {
        for (output, encryption, profiles) in [
            (Some("a.json"), None, &["main"][..]),
            (None, Some("none"), &["main"]),
            (None, None, &[]),
            (Some("-"), Some("none"), &["main"]),
        ] {
            assert!(made(output, encryption, true, profiles).unwrap_err().contains("only sealed"), "{output:?} {encryption:?}");
        }
    }

    #[test]
    fn what_others_named_is_escaped() {
        let item = PlannedItem {
            item: "job.a\x1b[2J".into(),
            action: ItemAction::Overwrite,
            notes: vec!["b\r".into()],
            changes: vec![FieldChange { at: "c\n".into(), before: Some("\u{202e}".into()), after: Some("d\x07".into()) }],
            needs: vec![Allow::Commands],
            ..PlannedItem::default()
        };
        let text = told_item(&item);
        assert!(text.chars().all(|c| c == '\n' || (!c.is_control() && c != '\u{202e}')), "{text:?}");
        assert!(text.contains("needs --allow-commands"));
    }
}
