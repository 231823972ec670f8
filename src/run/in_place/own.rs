//! What is keepd's own: its configuration, its keys, what it stores backups in. A restore in place changes that for an administrator alone, for
//! whoever could would be one; and its state directory for nobody.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::plan::Found;
use super::targets::{Target, To};
use super::tree::SIDECARS;
use crate::access::{By, Right};
use crate::config::{Config, KeySource, OptionValue, SecretSource, SourceKind};
use crate::repository::{Entry, Kind, ManifestSource};
use crate::run::live::Failure;
use crate::source::way;

/// Where keepd's own files are, each by its name and by what it leads to.
pub fn places(config: &Config) -> Vec<PathBuf> {
    let mut places: Vec<PathBuf> = config.files.clone();
    places.extend(config.files.first().and_then(|main| main.parent()).map(|above| above.join("conf.d")));
    let mut secret = |source: Option<&SecretSource>| {
        if let Some(SecretSource::File(path)) = source {
            places.push(path.clone());
        }
    };
    for profile in config.encryption.values() {
        match &profile.key {
            KeySource::Passphrase(source) => secret(Some(source)),
            KeySource::Token(token) => secret(token.pin.as_ref()),
            KeySource::File(_) | KeySource::Credential(_) => {}
        }
    }
    for destination in config.destinations.values() {
        for option in destination.options.values() {
            secret(if let OptionValue::Secret(source) = option { Some(source) } else { None });
        }
    }
    for source in config.jobs.values().flat_map(|job| &job.sources) {
        if let SourceKind::Postgres(server) | SourceKind::Mysql(server) = &source.kind {
            secret(server.password.as_ref());
        }
    }
    for profile in config.encryption.values() {
        match &profile.key {
            KeySource::File(path) => places.push(path.clone()),
            KeySource::Token(token) => places.push(token.module.clone()),
            KeySource::Passphrase(_) | KeySource::Credential(_) => {}
        }
        places.extend(profile.retired.iter().chain(&profile.public_key).cloned());
    }
    for destination in config.destinations.values() {
        places.extend(destination.directory().map(PathBuf::from));
        places.extend(destination.transfer.ca_file.clone());
        // A plugin is a program that keepd runs.
        places.extend(destination.command.first().map(PathBuf::from).filter(|program| program.is_absolute()));
    }
    let real: Vec<PathBuf> = places.iter().filter_map(|path| path.canonicalize().ok()).collect();
    places.extend(real);
    places.sort();
    places.dedup();
    places
}

/// Whether a directory stays what it is for whoever goes through it.
fn is_kept(backup: Option<&Entry>, live: Option<&Entry>) -> bool {
    match (backup, live) {
        // One that is not in the backup goes only where nothing is in it.
        (None, _) => true,
        (Some(backup), Some(live)) => {
            backup.kind == Kind::Directory
                && live.kind == Kind::Directory
                && (backup.mode, backup.uid, backup.gid, &backup.xattrs) == (live.mode, live.uid, live.gid, &live.xattrs)
        }
        (Some(_), None) => false,
    }
}

/// Of keepd's own what a target would change.
fn touched(places: &[PathBuf], target: &Target<'_>, found: &[Found]) -> Option<PathBuf> {
    let at = |path: &Path| places.iter().any(|own| path.starts_with(own));
    let above = |path: &Path| places.iter().any(|own| own.starts_with(path));
    match &target.to {
        To::File { root, file, .. } => {
            let path = root.join(OsStr::from_bytes(file));
            let beside = SIDECARS.iter().map(|suffix| root.join(OsStr::from_bytes(&[file, suffix.as_bytes()].concat())));
            std::iter::once(path.clone()).chain(beside).find(|path| at(path)).or(Some(path).filter(|path| above(path)))
        }
        To::Directory { root, .. } => found.iter().find_map(|f| {
            let path = if f.path.is_empty() { root.clone() } else { root.join(OsStr::from_bytes(&f.path)) };
            (at(&path) || (above(&path) && !is_kept(f.backup.as_ref(), f.live.as_ref()))).then_some(path)
        }),
        To::Databases { .. } | To::Command { .. } => None,
    }
}

/// What a source of a server is called by, without its databases.
fn server(place: &[u8]) -> &[u8] {
    place.split(|b| *b == b' ').next().unwrap_or_default()
}

/// In words, where a source goes to another place than it was captured from: whoever changed the job would choose what is overwritten.
fn moved(target: &Target<'_>, of: &ManifestSource) -> Option<String> {
    let now = target.source.kind.place();
    let is_same = match &target.source.kind {
        _ if of.path == now => true,
        SourceKind::Sqlite(_) | SourceKind::Files(_) => {
            let to = match &target.to {
                To::File { root, file, .. } => root.join(OsStr::from_bytes(file)),
                To::Directory { root, .. } => root.clone(),
                To::Databases { .. } | To::Command { .. } => return None,
            };
            let then = Path::new(OsStr::from_bytes(&of.path));
            then == to || (then.is_absolute() && way::resolve(then).is_ok_and(|then| then == to))
        }
        SourceKind::Postgres(_) | SourceKind::Mysql(_) => server(&of.path) == server(&now),
        SourceKind::Command(_) => true,
    };
    let shown = |place: &[u8]| String::from_utf8_lossy(place).into_owned();
    (!is_same).then(|| format!("source {} of {} is restored to {}, where the job has it now", target.name, shown(&of.path), shown(&now)))
}

/// An error where only an administrator may have this done.
pub fn may_change(by: &By, config: &Config, target: &Target<'_>, of: &ManifestSource, found: &[Found]) -> Result<(), Failure> {
    let changed = touched(&places(config), target, found).map(|path| format!("{}, which is keepd's own, is changed", path.display()));
    match changed.or_else(|| moved(target, of)) {
        None => Ok(()),
        Some(what) => by.is_admin(Right::RestoreInPlace, &what).map_err(|refusal| Failure::Failed(refusal.text)),
    }
}
