//! `keepctl key`: what opens destinations, and how that is changed.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use keepd_protocol::methods::*;
use keepd_protocol::model::{DestinationKeys, KeyOpens, KeySlot, KeyStep, RunState, escape};

use crate::arguments::KeyCommand;
use crate::commands::{Context, pipe, print_json, quiet_end, to_stdout};
use crate::edit::{self, Change};
use crate::keys::Keys;
use crate::render::table;
use crate::{Exit, Failure, follow, remote};

type Result<T> = std::result::Result<T, Failure>;

pub fn run(context: &Context<'_>, command: &KeyCommand) -> Result<Exit> {
    match command {
        KeyCommand::List { destinations } => list(context, destinations.clone()),
        KeyCommand::Add { destination, profile, key } => add(context, destination, profile.clone(), key.as_deref()),
        KeyCommand::Remove { destination, slot, yes } => remove(context, destination, slot, *yes),
        KeyCommand::Rotate { profile, to, keep_old } => rotate(context, profile, to, *keep_old),
        KeyCommand::Kit { profile, output, private_key, include_secrets, yes } => {
            let kit = Kit { profile, private_key: private_key.as_deref(), include_secrets: *include_secrets, yes: *yes };
            if output.as_os_str() == "-" { kit.to_output(context) } else { kit.to_file(context, output) }
        }
        KeyCommand::ReEncrypt { destination, drop_slots, yes, detach, keys } => {
            re_encrypt(context, destination, *drop_slots, (*yes, *detach), &keys.open()?)
        }
    }
}

fn re_encrypt(context: &Context<'_>, destination: &str, drop_slots: bool, (yes, detach): (bool, bool), keys: &Keys) -> Result<Exit> {
    if !yes {
        let shown = escape(destination);
        context.ask(&format!(
            "read everything at {shown}, seal it anew with a new key (which may take hours) and remove what is there now?"
        ))?;
    }
    let call = start_re_encrypt::In { destination: destination.to_owned(), drop_slots, private_keys: keys.places(0) };
    let started = context.client()?.call_lending::<StartReEncrypt>(&call, keys)?;
    if detach { context.done(&started, &format!("run {}", started.run)) } else { context.work(&started.run, true) }
}

fn list(context: &Context<'_>, destinations: Vec<String>) -> Result<Exit> {
    let found = context.client()?.call::<ListKeys>(&list_keys::In { destinations: destinations.clone() })?;
    let errors = found.destinations.iter().filter(|d| d.error.is_some()).count();
    let exit = match errors {
        0 if found.profiles.iter().all(|p| p.error.is_none() || !is_asked(&found.destinations, &p.name)) => Exit::Good,
        n if n > 0 && n == found.destinations.len() => Exit::Failed,
        _ => Exit::Partial,
    };
    if context.json() {
        print_json(&found)?;
    } else {
        let of = |text: &Option<String>| text.as_deref().map_or_else(|| "-".to_owned(), escape);
        let profiles = found.profiles.iter().filter(|p| destinations.is_empty() || is_asked(&found.destinations, &p.name)).map(|p| {
            let retired = p.retired.iter().map(|r| r.fingerprint.as_ref().map_or_else(|| format!("{}?", escape(&r.file)), |f| escape(f)));
            vec![
                escape(&p.name),
                escape(&p.kind),
                of(&p.fingerprint),
                escape(&p.place),
                of(&p.public_key),
                some_or_dash(retired.collect()),
                some_or_dash(p.destinations.iter().map(|d| escape(d)).collect()),
            ]
        });
        table(&["PROFILE", "KIND", "FINGERPRINT", "KEY", "PUBLIC KEY", "RETIRED", "DESTINATIONS"], profiles.collect())?;
        println!();
        let rows = found.destinations.iter().filter(|d| d.error.is_none()).flat_map(rows);
        table(&["DESTINATION", "SLOT", "CALLED", "METHOD", "FINGERPRINT", "OPENS"], rows.collect())?;
    }
    for profile in found.profiles.iter().filter(|p| is_asked(&found.destinations, &p.name)) {
        if let Some(error) = &profile.error {
            eprintln!("keepctl: encryption profile {}: {}", escape(&profile.name), escape(error));
        }
    }
    for destination in &found.destinations {
        if let Some(error) = &destination.error {
            eprintln!("keepctl: the key slots of {} are not known: {}", escape(&destination.destination), escape(error));
        }
    }
    Ok(exit)
}

fn is_asked(destinations: &[DestinationKeys], profile: &str) -> bool {
    destinations.iter().any(|d| d.profile.as_deref() == Some(profile))
}

fn some_or_dash(list: Vec<String>) -> String {
    if list.is_empty() { "-".into() } else { list.join(", ") }
}

fn rows(d: &DestinationKeys) -> Vec<Vec<String>> {
    let dash = || "-".to_owned();
    let row = |slot: &KeySlot| {
        let opens = match (slot.opens, &d.profile) {
            (KeyOpens::No, _) => "no".to_owned(),
            (KeyOpens::Current, Some(profile)) => format!("yes, with the key of {}", escape(profile)),
            (KeyOpens::Current, None) => "yes, without a key".to_owned(),
            (KeyOpens::Retired, profile) => format!("yes, with a retired key of {}", escape(profile.as_deref().unwrap_or_default())),
        };
        let problem = slot.problem.as_ref().map(|p| format!("; {}", escape(p))).unwrap_or_default();
        let word = |text: &str| if text.is_empty() { dash() } else { escape(text) };
        vec![
            escape(&d.destination),
            escape(&slot.id),
            word(&slot.profile),
            word(&slot.method),
            word(&slot.fingerprint),
            format!("{opens}{problem}"),
        ]
    };
    match (&d.repository, d.slots.is_empty()) {
        (None, _) => vec![vec![escape(&d.destination), dash(), dash(), dash(), dash(), "nothing was backed up to it yet".into()]],
        (Some(_), true) => vec![vec![escape(&d.destination), dash(), dash(), dash(), dash(), "NO KEY SLOT IS THERE".into()]],
        (Some(_), false) => d.slots.iter().map(row).collect(),
    }
}

/// Opens a key file of the caller's.
fn key_file(path: &Path, hint: bool) -> Result<File> {
    let nonblocking = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or_default();
    File::options().read(true).custom_flags(nonblocking).open(path).map_err(|e| {
        let shown = path.display();
        let hint = if hint && e.kind() == io::ErrorKind::NotFound {
            format!("; make it first with: keepd key generate {shown}")
        } else {
            String::new()
        };
        Failure::failed(format!("cannot open the key file {shown}: {e}{hint}"))
    })
}

fn add(context: &Context<'_>, destination: &str, profile: Option<String>, key: Option<&Path>) -> Result<Exit> {
    let file = key.map(|path| key_file(path, true)).transpose()?;
    let label = key.and_then(Path::file_name).map(|name| escape(&name.to_string_lossy()).chars().take(100).collect());
    let call = start_key_add::In { destination: destination.to_owned(), profile, label };
    let descriptors: Vec<_> = file.iter().map(AsFd::as_fd).collect();
    let started = context.client()?.call_with::<StartKeyAdd>(&call, &descriptors)?;
    context.work(&started.run, true)
}

fn remove(context: &Context<'_>, destination: &str, slot: &str, yes: bool) -> Result<Exit> {
    if !yes {
        let found = context.client()?.call::<ListKeys>(&list_keys::In { destinations: vec![destination.to_owned()] })?;
        let listed = found.destinations.first().cloned().unwrap_or_default();
        if let Some(error) = listed.error {
            return Err(Failure::failed(error));
        }
        let (gone, stay): (Vec<_>, Vec<_>) = listed.slots.into_iter().partition(|s| s.id.starts_with(slot));
        if let [gone] = gone.as_slice() {
            let names =
                |slots: Vec<&KeySlot>| some_or_dash(slots.iter().map(|s| format!("{} ({})", escape(&s.id), escape(&s.profile))).collect());
            eprintln!("key slot {} ({}, {}) of {}", escape(&gone.id), escape(&gone.profile), escape(&gone.method), escape(destination));
            eprintln!(
                "what opens it afterwards, with the configured key: {}",
                names(stay.iter().filter(|s| s.opens == KeyOpens::Current).collect())
            );
            eprintln!("other slots that stay: {}", names(stay.iter().filter(|s| s.opens != KeyOpens::Current).collect()));
            context.ask("Remove it?")?;
        }
    }
    let call = start_key_remove::In { destination: destination.to_owned(), slot: slot.to_owned() };
    let started = context.client()?.call::<StartKeyRemove>(&call)?;
    context.work(&started.run, true)
}

/// Says something that is no result.
fn tell(context: &Context<'_>, text: &str) {
    if !context.arguments.quiet {
        eprintln!("{text}");
    }
}

fn rotate(context: &Context<'_>, profile: &str, to: &Path, keep_old: bool) -> Result<Exit> {
    remote::refuse(
        "a key is rotated where its file lies and where the configuration names it, so 'keepctl key rotate' cannot be used with --host",
    )?;
    let file = key_file(to, true)?;
    // As the configuration names it: without `..`, and with links as they are.
    let path = absolute(to)?;
    let shown = path
        .to_str()
        .ok_or_else(|| Failure::failed(format!("the path {} is no text and cannot stand in the configuration", path.display())))?;
    let step = |step: KeyStep| -> Result<(start_key_rotate::Out, keepd_protocol::model::Run)> {
        let call = start_key_rotate::In { profile: profile.to_owned(), file: shown.to_owned(), step };
        let started = context.client()?.call_with::<StartKeyRotate>(&call, &[file.as_fd()])?;
        let run = follow::follow(context.arguments, context.socket, &started.run)?;
        Ok((started, run))
    };
    tell(context, &format!("1. the new key opens every destination of {}", escape(profile)));
    let (started, run) = step(KeyStep::Add)?;
    if run.state != RunState::Good {
        return context.ended(&run, true);
    }
    told(context, &run)?;
    tell(context, &format!("2. the configuration names the new key (fingerprint {})", escape(&started.fingerprint)));
    if !started.configured
        && let Some(exit) = configure(context, profile, shown)?
    {
        return Ok(exit);
    }
    if keep_old {
        tell(context, "3. the key slots of the old key stay, as asked: it goes on opening the destinations");
        return context.ended(&run, false);
    }
    tell(context, "3. the key slots of the old key go");
    let (_, run) = step(KeyStep::Remove)?;
    if run.state == RunState::Good {
        tell(
            context,
            &format!(
                "Recovery kits made before have the old key, which opens these destinations no more. Make a new one: keepctl key kit {} -o FILE",
                escape(profile)
            ),
        );
    }
    context.ended(&run, true)
}

fn told(context: &Context<'_>, run: &keepd_protocol::model::Run) -> Result<()> {
    if !context.json() && !context.arguments.quiet {
        let mut out = io::stdout().lock();
        for message in &run.messages {
            writeln!(out, "{}", crate::render::lines(&message.text))?;
        }
    }
    Ok(())
}

/// Has the configuration name the new key; an exit status when the caller has to do it.
fn configure(context: &Context<'_>, profile: &str, key_file: &str) -> Result<Option<Exit>> {
    let main = PathBuf::from(context.client()?.call::<GetStatus>(&get_status::In::default())?.status.config);
    let by_hand = |file: &Path, why: &str| {
        eprintln!("keepctl: {} cannot be changed by you: {}", file.display(), escape(why));
        eprintln!(
            "put this into it, in the table [encryption.{profile}], and take the key_file, credential, passphrase or pkcs11 away that is there now:"
        );
        eprintln!("    key_file = {}", toml_edit::value(key_file));
        eprintln!("    retired = [ the key_file that was there, and what was in retired ]");
        eprintln!(
            "then run 'keepctl reload' and this command again: it removes the old key slots. Until then both keys open the destinations."
        );
        Ok(Some(Exit::Partial))
    };
    let mut file = match edit::find_profile(&main, profile) {
        Ok(file) => file,
        Err((path, why)) => return by_hand(&path, &why),
    };
    let before = file.text.clone();
    let after = match edit::with_key_file(&before, profile, key_file, main.parent().unwrap_or(Path::new("/"))) {
        // Changed before; the daemon has not read it yet.
        Ok(Change::Nothing) => None,
        Ok(Change::Text(after)) => Some(after),
        Err(why) => return by_hand(&file.path, &why),
    };
    if let Some(after) = &after {
        tell(context, edit::diff(&file.path, &before, after).trim_end());
        if let Err(e) = file.replace(after.clone()) {
            return by_hand(&file.path, &e.to_string());
        }
    }
    if let Err(refused) = context.client()?.call::<Reload>(&reload::In {}) {
        let Some(_) = after else { return Err(refused) };
        let restored = match file.replace(before) {
            Ok(()) => "it is as it was".to_owned(),
            Err(e) => format!("and it could not be put back as it was: {e}"),
        };
        let text = format!("keepd refuses the changed configuration {}, {restored}: {}", file.path.display(), refused.text);
        return Err(Failure::new(refused.exit, text));
    }
    Ok(None)
}

/// Absolute, its directory without links and `..`.
fn absolute(path: &Path) -> Result<PathBuf> {
    let failed = |e: io::Error| Failure::failed(format!("cannot tell where {} is: {e}", path.display()));
    let path = std::path::absolute(path).map_err(failed)?;
    let name = path.file_name().ok_or_else(|| Failure::failed(format!("{} is no file", path.display())))?;
    Ok(path.parent().unwrap_or(Path::new("/")).canonicalize().map_err(failed)?.join(name))
}

struct Kit<'a> {
    profile: &'a str,
    private_key: Option<&'a Path>,
    include_secrets: bool,
    yes: bool,
}

impl Kit<'_> {
    fn start(&self, context: &Context<'_>, out: std::os::fd::BorrowedFd<'_>) -> Result<make_kit::Out> {
        let private = self.private_key.map(|path| key_file(path, false)).transpose()?;
        let call = make_kit::In { profile: self.profile.to_owned(), include_secrets: self.include_secrets, private_key: private.is_some() };
        let descriptors: Vec<_> = std::iter::once(out).chain(private.iter().map(AsFd::as_fd)).collect();
        context.client()?.call_with::<MakeKit>(&call, &descriptors)
    }

    fn to_output(&self, context: &Context<'_>) -> Result<Exit> {
        if context.json() {
            return Err(Failure::new(Exit::Usage, "the kit goes to standard output, where --json would write, too; name a file"));
        }
        let (mut reader, writer) = pipe()?;
        let started = self.start(context, writer.as_fd())?;
        drop(writer);
        let guard = follow::interrupt(context.socket, &started.run)?;
        let copied = to_stdout(&mut reader);
        drop(reader);
        drop(guard);
        copied?;
        let run = quiet_end(context.socket, &started.run)?;
        remote::settle()?;
        Ok(follow::conclude(context.arguments, &run))
    }

    fn to_file(&self, context: &Context<'_>, path: &Path) -> Result<Exit> {
        let path = absolute(path)?;
        let directory = path.parent().unwrap_or(Path::new("/"));
        self.is_safe_place(context, directory, &path)?;
        let file = create(directory, &path)?;
        let made = self.start(context, file.as_fd()).and_then(|started| {
            let run = follow::follow(context.arguments, context.socket, &started.run)?;
            Ok((started, run))
        });
        let is_made = matches!(&made, Ok((_, run)) if run.state == RunState::Good);
        if !is_made {
            // Made by this command just now, and not whole.
            let _ = std::fs::remove_file(&path);
            let (_, run) = made?;
            return context.ended(&run, true);
        }
        if let Err(failure) = remote::settle() {
            let _ = std::fs::remove_file(&path);
            return Err(failure);
        }
        file.sync_all()?;
        File::open(directory)?.sync_all()?;
        let (started, run) = made?;
        if !context.json() && !context.arguments.quiet {
            let key = started.fingerprint.as_ref().map(|f| format!(" with the key {}", escape(f))).unwrap_or_default();
            println!("made the recovery kit {}{key}", path.display());
            if io::stdout().is_terminal() {
                println!("Whoever has it can read the backups. Print it, keep it away from this machine, and remove the file here.");
            }
        }
        context.ended(&run, false)
    }

    /// A kit beside the backups it opens protects nothing.
    fn is_safe_place(&self, context: &Context<'_>, directory: &Path, path: &Path) -> Result<()> {
        // The directories of another machine say nothing of those here.
        if remote::host().is_some() {
            return Ok(());
        }
        let destinations = context.client()?.call::<GetStatus>(&get_status::In::default())?.status.destinations;
        let device = std::fs::metadata(directory)?.dev();
        for destination in destinations {
            let Some(root) = destination.location.strip_prefix("fs:").map(PathBuf::from) else { continue };
            let Ok(found) = std::fs::metadata(&root) else { continue };
            if directory.starts_with(root.canonicalize().unwrap_or(root)) {
                let text = format!(
                    "{} lies in destination {}: whoever gets hold of the backups gets the key with them",
                    path.display(),
                    escape(&destination.name)
                );
                match self.yes {
                    true => eprintln!("warning: {text}"),
                    false => return Err(Failure::failed(format!("{text}; name another place, or say --yes"))),
                }
            } else if found.dev() == device {
                eprintln!(
                    "warning: {} is on the same file system as destination {}: take it away from this machine",
                    path.display(),
                    escape(&destination.name)
                );
            }
        }
        Ok(())
    }
}

/// A new file that nobody else can read.
fn create(directory: &Path, path: &Path) -> Result<File> {
    let about = std::fs::metadata(directory)?;
    let (mode, me) = (about.mode(), rustix::process::geteuid().as_raw());
    if about.uid() != 0 && about.uid() != me {
        let text = format!(
            "the directory {} belongs to another user (uid {}), who could exchange the kit; name another place",
            directory.display(),
            about.uid()
        );
        return Err(Failure::failed(text));
    }
    if mode & 0o022 != 0 && mode & 0o1000 == 0 {
        let text = format!(
            "others can write to the directory {} and could exchange the kit; name another place, or run: chmod go-w",
            directory.display()
        );
        return Err(Failure::failed(text));
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|e| {
        let what = match e.kind() {
            io::ErrorKind::AlreadyExists => "exists already and is never overwritten; name another file".to_owned(),
            _ => format!("cannot be made: {e}"),
        };
        Failure::failed(format!("{} {what}", path.display()))
    })?;
    let found = file.metadata()?;
    if found.mode() & 0o077 != 0 {
        let _ = std::fs::remove_file(path);
        let text = format!(
            "{} would be open to others (mode {:04o}): its directory or its file system gives them the right; name another place",
            path.display(),
            found.mode() & 0o7777
        );
        return Err(Failure::failed(text));
    }
    Ok(file)
}
