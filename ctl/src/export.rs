//! `keepctl export`: a backup as one file to take along.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use clap::Args;
use keepd_protocol::methods::*;
use keepd_protocol::model::{ArchiveCompression, RunState, escape};

use crate::arguments::BackupArgument;
use crate::commands::{Context, bytes_path, pipe, print_json, quiet_end, to_stdout};
use crate::keys::{KeyArguments, Keys};
use crate::new_file::NewFile;
use crate::render::{bytes, short};
use crate::{Exit, Failure, follow, remote};

type Result<T> = std::result::Result<T, Failure>;

#[derive(Args, Clone)]
pub struct ExportArguments {
    #[command(flatten)]
    pub of: BackupArgument,
    /// Where to; '-' is standard output. Its name says how it is made: shop.tar, shop.tar.gz, shop.tar.zst, and with .enc behind it sealed
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Seal it for this encryption profile ('none': for everybody to read). Without it, a FILE that ends with .enc is sealed with a key of its own, FILE.key
    #[arg(long, value_name = "PROFILE|none")]
    pub encryption: Option<String>,
    /// Where the key goes that is made for it alone
    #[arg(long, value_name = "FILE", conflicts_with = "encryption")]
    pub key_output: Option<PathBuf>,
    /// How it is compressed, where FILE's name does not say it
    #[arg(long, value_name = "none|gzip|zstd", value_parser = compression)]
    pub compression: Option<ArchiveCompression>,
    /// <source> or <source>/<path>; none means all
    pub paths: Vec<OsString>,
    #[command(flatten)]
    pub keys: KeyArguments,
}

fn compression(text: &str) -> std::result::Result<ArchiveCompression, String> {
    text.parse()
}

/// What an archive's name says of it.
#[derive(Debug, PartialEq, Eq)]
struct Named {
    compression: Option<ArchiveCompression>,
    is_sealed: bool,
}

fn named(file: &Path) -> Named {
    let name = file.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let (name, is_sealed) = match name.strip_suffix(".enc") {
        Some(inner) => (inner.to_owned(), true),
        None => (name, false),
    };
    let endings = [
        (".tar", ArchiveCompression::None),
        (".tar.gz", ArchiveCompression::Gzip),
        (".tgz", ArchiveCompression::Gzip),
        (".tar.zst", ArchiveCompression::Zstd),
        (".tar.zstd", ArchiveCompression::Zstd),
        (".tzst", ArchiveCompression::Zstd),
    ];
    let compression = endings.into_iter().find(|(ending, _)| name.ends_with(ending)).map(|(_, compression)| compression);
    Named { compression, is_sealed }
}

/// How an archive is to be made.
#[derive(Debug, PartialEq, Eq)]
struct How {
    compression: ArchiveCompression,
    profile: Option<String>,
    key: Option<PathBuf>,
}

/// What the arguments and the name say together; where they contradict each other nothing is made that is not what its name says.
fn how(arguments: &ExportArguments) -> Result<How> {
    let usage = |text: String| Failure::new(Exit::Usage, text);
    let file = arguments.output.display();
    let named = named(&arguments.output);
    let compression = match (named.compression, arguments.compression) {
        (Some(of_name), Some(given)) if of_name != given => {
            return Err(usage(format!("{file} is to be {given} by --compression and {of_name} by its name; give one of them")));
        }
        (Some(compression), _) | (None, Some(compression)) => compression,
        (None, None) => ArchiveCompression::None,
    };
    let to_output = arguments.output == Path::new("-");
    let is_secret = arguments.key_output.is_some() || arguments.encryption.as_ref().is_some_and(|e| e != "none");
    if named.is_sealed && arguments.encryption.as_deref() == Some("none") {
        return Err(usage(format!("{file} is to be sealed by its name, and --encryption says none; give one of them")));
    }
    if is_secret && !named.is_sealed && named.compression.is_some() {
        return Err(usage(format!("what is sealed is not read by tar: name it {file}.enc")));
    }
    let profile = arguments.encryption.clone().filter(|e| e != "none");
    let key = match (&arguments.key_output, &profile) {
        (Some(key), _) => Some(key.clone()),
        (None, None) if named.is_sealed && !to_output => {
            let mut key = arguments.output.clone().into_os_string();
            key.push(".key");
            Some(PathBuf::from(key))
        }
        _ => None,
    };
    Ok(How { compression, profile, key })
}

pub fn run(context: &Context<'_>, arguments: &ExportArguments) -> Result<Exit> {
    let how = how(arguments)?;
    let keys = arguments.keys.open()?;
    if arguments.output == Path::new("-") { to_output(context, arguments, how, &keys) } else { to_file(context, arguments, how, &keys) }
}

fn start(
    context: &Context<'_>,
    arguments: &ExportArguments,
    how: &How,
    (out, key): (BorrowedFd<'_>, Option<&NewFile>),
    keys: &Keys,
) -> Result<start_export::Out> {
    let call = start_export::In {
        backup: arguments.of.backup.clone(),
        job: arguments.of.job.clone(),
        paths: arguments.paths.iter().map(|p| bytes_path(p)).collect(),
        compression: how.compression,
        profile: how.profile.clone(),
        fresh_key: key.is_some(),
        private_keys: keys.places(1 + u32::from(key.is_some())),
    };
    let descriptors: Vec<_> = std::iter::once(out).chain(key.map(|key| key.file.as_file().as_fd())).chain(keys.descriptors()).collect();
    context.client()?.call_with::<StartExport>(&call, &descriptors)
}

fn to_output(context: &Context<'_>, arguments: &ExportArguments, how: How, keys: &Keys) -> Result<Exit> {
    if context.json() {
        return Err(Failure::new(Exit::Usage, "standard output cannot take the archive and a JSON document; give -o FILE"));
    }
    if io::stdout().is_terminal() {
        return Err(Failure::new(Exit::Usage, "an archive is nothing for a terminal; give -o FILE, or send it through a pipe"));
    }
    let key = how.key.as_deref().map(NewFile::create).transpose()?;
    let (mut reader, writer) = pipe()?;
    let started = start(context, arguments, &how, (writer.as_fd(), key.as_ref()), keys)?;
    drop(writer);
    let guard = follow::interrupt(context.socket, &started.run)?;
    let copied = to_stdout(&mut reader);
    drop(reader);
    drop(guard);
    let run = quiet_end(context.socket, &started.run)?;
    match copied {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
            return Err(Failure::failed("whoever took the archive went away before its end"));
        }
        other => drop(other?),
    }
    remote::settle()?;
    if run.state == RunState::Good
        && let Some(key) = key
    {
        key.publish()?;
    }
    Ok(follow::conclude(context.arguments, &run))
}

fn to_file(context: &Context<'_>, arguments: &ExportArguments, how: How, keys: &Keys) -> Result<Exit> {
    let archive = NewFile::create(&arguments.output)?;
    let key = how.key.as_deref().map(NewFile::create).transpose()?;
    let started = start(context, arguments, &how, (archive.file.as_file().as_fd(), key.as_ref()), keys)?;
    let run = follow::follow(context.arguments, context.socket, &started.run)?;
    if run.state != RunState::Good {
        return context.ended(&run, true);
    }
    remote::settle()?;
    // The key first: an archive without its key would be none.
    let key_path = key.as_ref().map(|key| key.path.clone());
    key.map(NewFile::publish).transpose()?;
    let size = archive.file.as_file().metadata()?.len();
    if let Err(failure) = archive.publish() {
        if let Some(path) = &key_path {
            // Made just now, for what is not there.
            let _ = std::fs::remove_file(path);
        }
        return Err(failure);
    }
    if context.json() {
        print_json(&run)?;
    } else if !context.arguments.quiet {
        println!("exported backup {} to {}, {}", short(&started.backup), escape(&arguments.output.to_string_lossy()), bytes(size));
        if let Some(path) = &key_path {
            println!(
                "its key is {}: without it nobody can read the archive, with it anybody can; keep them apart",
                escape(&path.to_string_lossy())
            );
        }
    }
    Ok(follow::conclude(context.arguments, &run))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(output: &str) -> ExportArguments {
        ExportArguments {
            of: BackupArgument { backup: "latest".into(), job: None },
            output: output.into(),
            encryption: None,
            key_output: None,
            compression: None,
            paths: Vec::new(),
            keys: KeyArguments::default(),
        }
    }

    #[test]
    fn the_name_says_what_is_made() {
        for (name, compression, key) in [
            ("a.tar", ArchiveCompression::None, None),
            ("dir.x/a.TGZ", ArchiveCompression::Gzip, None),
            ("a.tar.zst", ArchiveCompression::Zstd, None),
            ("a.tar.gz.enc", ArchiveCompression::Gzip, Some("a.tar.gz.enc.key")),
            ("-", ArchiveCompression::None, None),
            ("a", ArchiveCompression::None, None),
        ] {
            let how = how(&arguments(name)).map_err(|f| f.text).unwrap();
            assert_eq!((how.compression, how.key, how.profile), (compression, key.map(PathBuf::from), None), "{name}");
        }
        let with = |name: &str, encryption: Option<&str>, compression| {
            let given = ExportArguments { encryption: encryption.map(str::to_owned), compression, ..arguments(name) };
            how(&given).map_err(|f| f.text)
        };
        assert_eq!(with("a.tar.enc", Some("main"), None).unwrap().profile.as_deref(), Some("main"));
        assert_eq!(with("-", None, Some(ArchiveCompression::Zstd)).unwrap().compression, ArchiveCompression::Zstd);
        assert!(with("a.tar.enc", Some("none"), None).unwrap_err().contains("sealed by its name"));
        assert!(with("a.tar.gz", Some("main"), None).unwrap_err().contains("a.tar.gz.enc"));
        assert!(with("a.tar.gz", None, Some(ArchiveCompression::Zstd)).unwrap_err().contains("gzip by its name"));
    }
}
