//! `keepctl import`: gives the daemon an archive and the keys that it opens with, has it imported, and follows that to its end.
//!
//! keepctl opens what it passes along with its caller's own rights, and reads nothing of it. A directory goes through the system's tar.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use keepd_protocol::methods::*;
use keepd_protocol::model::{BytesPath, Import, ImportPart, ImportState, OnConflict, RunState, escape};

use crate::arguments::{From as Kind, ImportArguments};
use crate::commands::{Context, bytes_path, labels, print_json};
use crate::render::{bytes, short, table, time};
use crate::{Exit, Failure, follow, remote};

type Result<T> = std::result::Result<T, Failure>;

/// Its end says that the archive was whole; kept to be told.
struct Sent {
    tar: Child,
    errors: std::thread::JoinHandle<String>,
}

pub fn run(context: &Context<'_>, arguments: &ImportArguments) -> Result<Exit> {
    if arguments.list {
        return list(context);
    }
    if let Some(id) = &arguments.status {
        let import = context.client()?.call::<GetImport>(&get_import::In { import: id.clone() })?.import;
        return context.done(&import, &told(&import)).map(|_| exit(&import));
    }
    if let Some(id) = &arguments.cancel {
        context.client()?.call::<CancelImport>(&cancel_import::In { import: id.clone() })?;
        return context.done(&serde_json::json!({ "import": id }), "cancelled");
    }
    let file = arguments.file.as_ref().ok_or_else(|| Failure::new(Exit::Usage, "say which archive, or - for standard input"))?;
    send(context, arguments, file)
}

fn send(context: &Context<'_>, arguments: &ImportArguments, file: &Path) -> Result<Exit> {
    let is_directory = arguments.from == Some(Kind::Directory) || (arguments.from.is_none() && file.is_dir());
    let foreign = is_directory || arguments.from == Some(Kind::Tar);
    // What cannot be read is told before the daemon hears of it.
    let archive: Option<OwnedFd> = match (is_directory, file.as_os_str().as_bytes()) {
        (true, _) => None,
        (false, b"-") => Some(io::stdin().as_fd().try_clone_to_owned()?),
        (false, _) => Some(File::open(file).map_err(|e| Failure::failed(format!("cannot read {}: {e}", file.display())))?.into()),
    };
    let keys = arguments.key.iter().map(|path| open_key(path)).collect::<Result<Vec<_>>>()?;
    let request = request(context, arguments, file, foreign)?;
    let mut client = context.client()?;
    let import = client.call::<InitiateImport>(&request)?.import;
    let upload = |part| upload_import::In { import: import.clone(), part, ..upload_import::In::default() };
    let is_remote = remote::host().is_some();
    let mut started = || -> Result<(String, Option<Option<Sent>>)> {
        for key in &keys {
            client.call_with::<UploadImport>(&upload(ImportPart::Key), &[key.as_fd()])?;
        }
        let sent = match &archive {
            Some(archive) => {
                // A line that is lost must not pass for the end of the archive.
                let call = upload_import::In { confirm: is_remote, ..upload(ImportPart::Archive) };
                client.call_with::<UploadImport>(&call, &[archive.as_fd()])?;
                is_remote.then_some(None)
            }
            None => {
                let (end, sent) = tar(file)?;
                let call = upload_import::In { confirm: true, ..upload(ImportPart::Archive) };
                client.call_with::<UploadImport>(&call, &[end.as_fd()])?;
                Some(Some(sent))
            }
        };
        let run = client.call::<StartImport>(&start_import::In { import: import.clone() })?.run;
        Ok((run, sent))
    };
    let (run, sent) = match started() {
        Ok(started) => started,
        Err(e) => {
            // Nothing of it is to wait for its deadline.
            let _ = context.client().and_then(|mut c| c.call::<CancelImport>(&cancel_import::In { import: import.clone() }));
            return Err(e);
        }
    };
    // From here on the daemon alone reads it: whoever writes into the pipe is to learn when it stops.
    drop(archive);
    let is_tar = matches!(sent, Some(Some(_)));
    let mut warned = sent.map(|sent| watch(context, sent, &import));
    if arguments.detach && !is_tar {
        // To another machine it goes through us.
        if let Some((text, true)) = warned.take().map(|thread| thread.join().unwrap_or_default()) {
            return Err(Failure::failed(text));
        }
        let value = serde_json::json!({ "import": import, "run": run });
        return context.done(&value, &format!("import {}, run {}", escape(&import), escape(&run)));
    }
    let ended = follow::follow(context.arguments, context.socket, &run)?;
    let (warning, partial) = warned.map(|thread| thread.join().unwrap_or_default()).unwrap_or_default();
    let exit = context.ended(&ended, true)?;
    // One that the daemon refused made tar fail, and was told.
    if !warning.is_empty() && ended.state != RunState::Failed {
        eprintln!("keepctl: {}", escape(&warning));
        return Ok(if partial && ended.state == RunState::Good { Exit::Partial } else { exit });
    }
    Ok(exit)
}

fn open_key(path: &Path) -> Result<File> {
    File::open(path).map_err(|e| Failure::failed(format!("cannot read the key file {}: {e}", path.display())))
}

fn request(context: &Context<'_>, arguments: &ImportArguments, file: &Path, foreign: bool) -> Result<initiate_import::In> {
    let usage = |text: String| Failure::new(Exit::Usage, text);
    let destination = match &arguments.destination {
        Some(name) => name.clone(),
        None => {
            let all = context.client()?.call::<GetStatus>(&get_status::In { job: None })?.status.destinations;
            match all.as_slice() {
                [one] => one.name.clone(),
                several => {
                    let names = several.iter().map(|d| escape(&d.name)).collect::<Vec<_>>().join(", ");
                    return Err(usage(format!("say to which destination by --destination: {names}")));
                }
            }
        }
    };
    let mut rename_sources = std::collections::BTreeMap::new();
    for pair in &arguments.rename_source {
        let (old, new) = pair.split_once('=').ok_or_else(|| usage(format!("'{pair}' renames nothing; write it as old=new")))?;
        rename_sources.insert(old.to_owned(), new.to_owned());
    }
    let foreign_source = match (foreign, arguments.source.as_slice()) {
        (false, _) => None,
        (true, [name]) => Some(name.clone()),
        (true, []) => {
            let job = arguments.job.clone().ok_or_else(|| usage("say by --job whose backup it is to be".into()))?;
            let job = context.client()?.call::<ShowJob>(&show_job::In { job })?.job;
            match job.sources.iter().filter(|s| s.kind == "files").collect::<Vec<_>>().as_slice() {
                [one] => Some(one.name.clone()),
                _ => return Err(usage("say by --source which of the job's sources it is of".into())),
            }
        }
        (true, _) => return Err(usage("a tar is of one source".into())),
    };
    let conflict = arguments.on_conflict.as_deref().map(str::parse::<OnConflict>).transpose().map_err(usage)?;
    let place = std::path::absolute(file).ok().filter(|_| foreign && file.as_os_str() != "-");
    Ok(initiate_import::In {
        destination,
        job: arguments.job.clone(),
        sources: if foreign { Vec::new() } else { arguments.source.clone() },
        paths: arguments.paths.iter().map(|p| bytes_path(p)).collect::<Vec<BytesPath>>(),
        rename_sources,
        on_conflict: conflict.unwrap_or_default(),
        validate_only: arguments.validate_only,
        bandwidth: arguments.bandwidth,
        timeout_seconds: arguments.timeout,
        foreign_source,
        max_bytes: arguments.max_size,
        time: arguments.time.clone(),
        place: place.map(|p: PathBuf| p.to_string_lossy().into_owned()),
        name: arguments.name.clone(),
        description: arguments.description.clone(),
        labels: labels(&arguments.label)?,
    })
}

/// Starts tar on a directory; the end of the pipe that the daemon reads.
fn tar(directory: &Path) -> Result<(OwnedFd, Sent)> {
    let mut command = Command::new("tar");
    command.arg("-C").arg(directory);
    command.args(["--format=posix", "--xattrs", "--acls", "--numeric-owner", "--sort=name", "-cf", "-", "."]);
    let mut tar = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| Failure::failed(format!("cannot start tar, which reads the directory: {e}")))?;
    let (Some(out), Some(mut errors)) = (tar.stdout.take(), tar.stderr.take()) else { return Err(Failure::failed("tar has no output")) };
    let errors = std::thread::spawn(move || {
        let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
        while let Ok(n) = errors.read(&mut buffer) {
            if n == 0 {
                break;
            }
            // The first words say it; the rest is taken so that tar goes on.
            if text.len() < 4096 {
                text.extend_from_slice(buffer.get(..n).unwrap_or_default());
            }
        }
        String::from_utf8_lossy(&text).trim().replace('\n', "; ")
    });
    Ok((out.into(), Sent { tar, errors }))
}

/// Waits for tar beside the run: the daemon is told that the archive is whole, or that there will be none. What is to be told in the end, and whether
/// the archive is less than the directory.
fn watch(context: &Context<'_>, sent: Option<Sent>, import: &str) -> std::thread::JoinHandle<(String, bool)> {
    let (socket, import) = (context.socket.to_owned(), import.to_owned());
    std::thread::spawn(move || {
        let (code, errors) = match sent {
            Some(mut sent) => {
                let status = sent.tar.wait();
                (status.ok().and_then(|status| status.code()), sent.errors.join().unwrap_or_default())
            }
            None => (Some(0), String::new()),
        };
        let arrived = remote::settle();
        let client = crate::client::Client::connect(&socket);
        // 1: files changed while they were read, and are as they were then.
        let (said, text) = match code {
            _ if arrived.is_err() => (
                false,
                format!(
                    "not all of the archive came there, so nothing was imported: {}",
                    arrived.err().map(|f| f.text).unwrap_or_default()
                ),
            ),
            Some(0) if errors.is_empty() => (true, String::new()),
            Some(0) => (true, format!("tar: {errors}")),
            Some(1) => (true, format!("tar: {errors}")),
            _ => (false, format!("tar failed, so nothing was imported: {errors}")),
        };
        let told = client.and_then(|mut client| match said {
            true => {
                let call = upload_import::In { import, last: true, ..upload_import::In::default() };
                client.call::<UploadImport>(&call).map(drop)
            }
            false => client.call::<CancelImport>(&cancel_import::In { import }).map(drop),
        });
        match told {
            // An import that has ended by itself tells why.
            Ok(()) | Err(_) => (text, !said || code != Some(0)),
        }
    })
}

fn list(context: &Context<'_>) -> Result<Exit> {
    let imports = context.client()?.call::<ListImports>(&list_imports::In {})?.imports;
    if context.json() {
        print_json(&imports)?;
        return Ok(Exit::Good);
    }
    let rows = imports.iter().map(|i| {
        let percent = i.percent.map_or_else(|| "-".to_owned(), |p| format!("{p:.0} %"));
        let what = i.error.as_ref().map_or_else(|| escape(&i.step), |e| escape(e));
        let backup = i.backup.as_ref().map_or_else(|| "-".to_owned(), |b| short(b));
        vec![escape(&i.id), i.state.to_string(), escape(&i.destination), time(&i.deadline), bytes(i.uploaded), percent, backup, what]
    });
    table(&["IMPORT", "STATE", "TO", "DEADLINE", "CAME", "DONE", "BACKUP", "WHAT"], rows.collect())?;
    Ok(Exit::Good)
}

fn told(import: &Import) -> String {
    let step = if import.step.is_empty() { String::new() } else { format!(", {}", escape(&import.step)) };
    let percent = import.percent.map(|p| format!(", {p:.0} %")).unwrap_or_default();
    let backup = import.backup.as_ref().map(|b| format!(", backup {}", short(b))).unwrap_or_default();
    let counts = match import.state {
        ImportState::Completed => format!(": {} files, {}", import.counts.files, bytes(import.counts.bytes)),
        _ => import.error.as_ref().map(|e| format!(": {}", escape(e))).unwrap_or_default(),
    };
    format!("import {} to {} is {}{step}{percent}{backup}{counts}", escape(&import.id), escape(&import.destination), import.state)
}

fn exit(import: &Import) -> Exit {
    match import.state {
        ImportState::Failed | ImportState::Timeout => Exit::Failed,
        _ => Exit::Good,
    }
}
