//! Checks of what the configuration refers to on this machine: key files, paths of sources, permissions.
//!
//! Apart from reading the configuration, because these answers change without it: asked by `keepd --check` and at start.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ignore::gitignore::GitignoreBuilder;

use super::overlap::is_excluded;
use super::problem::{Problem, Severity, quoted};
use super::source_text::reason;
use super::value::show_duration;
use super::{Config, Encryption, FilesSource, Job, Member, Schedule, SourceKind};
use crate::crypto::key_file::shell_word;

/// What is wrong (errors: what needs it will fail; a check or a reload refuses it) or doubtful (warnings) about what the
/// configuration refers to.
pub fn check_files(config: &Config) -> Vec<Problem> {
    let mut problems = Vec::new();
    config.files.iter().for_each(|file| config_file(file, &mut problems));
    destinations(config, &mut problems);
    config.encryption.values().for_each(|profile| private_key_beside(profile, &mut problems));
    config.jobs.values().for_each(|job| self::job(config, job, &mut problems));
    access(config, &mut problems);
    problems
}

/// Whom the system does not know has no right; a directory service may be away just now, so that is only doubtful.
fn access(config: &Config, problems: &mut Vec<Problem>) {
    let access = &config.access;
    let builtin = [("access.admin", &access.admin), ("access.operator", &access.operator), ("access.viewer", &access.viewer)];
    let own = access.roles.iter().map(|role| (format!("access.role.{}.members", role.name), &role.members));
    for (key, members) in builtin.into_iter().map(|(key, members)| (key.to_owned(), members)).chain(own) {
        for member in members {
            let (what, is_there) = match member {
                Member::User(name) => ("user", uzers::get_user_by_name(name).is_some()),
                Member::Group(name) => ("group", uzers::get_group_by_name(name).is_some()),
                Member::Uid(_) | Member::Gid(_) => continue,
            };
            if !is_there {
                let name = member.to_string();
                let name = quoted(name.trim_start_matches('@'));
                let text = format!("the system knows no {what} {name} now, so this gives nobody a right; 'getent' shows whom it knows");
                problems.push(Problem::of_key(Severity::Warning, key.clone(), text));
            }
        }
    }
}

/// Whoever can write the configuration can have any file of the machine backed up to where they can read it.
fn config_file(file: &Path, problems: &mut Vec<Problem>) {
    let Ok(found) = std::fs::metadata(file) else { return };
    let me = rustix::process::geteuid().as_raw();
    let shown = quoted(&file.to_string_lossy());
    let mut warn = |text: String| problems.push(Problem::of_key(Severity::Warning, "", text));
    if found.mode() & 0o022 != 0 {
        warn(format!("{shown} can be written by others than its owner; run: chmod go-w {}", shell_word(file)));
    }
    if found.uid() != me && found.uid() != 0 {
        warn(format!("{shown} belongs to another user (uid {}), who can change what keepd does", found.uid()));
    }
}

/// A machine that has the private key can read its backups, and so can whoever gets into it.
fn private_key_beside(profile: &Encryption, problems: &mut Vec<Problem>) {
    let Some(public) = profile.public_key.as_ref().filter(|p| p.extension().is_some_and(|e| e == "pub")) else { return };
    let private = public.with_extension("");
    if private.symlink_metadata().is_ok() {
        let text = format!(
            "the private key seems to be on this machine, as {}; move it to where nobody who gets in here reaches it",
            quoted(&private.to_string_lossy())
        );
        problems.push(Problem::of_key(Severity::Warning, format!("encryption.{}.public_key", profile.name), text));
    }
}

fn destinations(config: &Config, problems: &mut Vec<Problem>) {
    let mut real: Vec<(&str, PathBuf)> = Vec::new();
    for destination in config.destinations.values() {
        let Some(root) = destination.directory() else { continue };
        let key = format!("destination.{}.root", destination.name);
        match std::fs::metadata(root) {
            Ok(found) if !found.is_dir() => {
                problems.push(Problem::of_key(Severity::Error, key, format!("{} is not a directory", quoted(root))));
            }
            Ok(_) => {
                let path = std::fs::canonicalize(root).unwrap_or_else(|_| root.into());
                if let Some((other, _)) = real.iter().find(|(_, p)| *p == path) {
                    let text = format!("{} is, through a link, the same directory as that of destination '{other}'", quoted(root));
                    problems.push(Problem::of_key(Severity::Error, key, text));
                }
                real.push((&destination.name, path));
            }
            // It is made when the first backup goes there.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                let text = format!("{} cannot be looked at: {}", quoted(root), reason(&error));
                problems.push(Problem::of_key(Severity::Warning, key, text));
            }
        }
    }
}

fn job(config: &Config, job: &Job, problems: &mut Vec<Problem>) {
    let mut warn = |key: String, text: String| problems.push(Problem::of_key(Severity::Warning, key, text));
    if let (Some(max_age), Some(Schedule::Every(every))) = (job.max_age, &job.schedule)
        && max_age < *every
    {
        let text = format!("is shorter than the {} between runs, so the job will be overdue before each of them", show_duration(*every));
        warn(format!("job.{}.max_age", job.name), text);
    }
    if job.drill.every.is_some() && config.are_write_only(job.destinations.iter().map(String::as_str)) {
        let text = format!(
            "is not kept to: all destinations of the job are write-only (public_key), so drills need the private key; run them by hand with \
             'keepctl drill --job {} --key FILE', or add a destination without public_key",
            job.name
        );
        warn(format!("job.{}.drill.every", job.name), text);
    }
    for source in &job.sources {
        let key = format!("job.{} source {}", job.name, quoted(&source.name));
        let Some(path) = source.kind.path() else { continue };
        let shown = quoted(&path.to_string_lossy());
        match (std::fs::metadata(path), &source.kind) {
            (Err(error), _) => warn(key.clone(), format!("{shown} cannot be read now: {}", reason(&error))),
            (Ok(found), SourceKind::Sqlite(_)) if !found.is_file() => warn(key.clone(), format!("{shown} is not a regular file")),
            _ => {}
        }
        let SourceKind::Files(files) = &source.kind else { continue };
        for database in job.sources.iter().filter(|s| matches!(s.kind, SourceKind::Sqlite(_))) {
            let Some(file) = database.kind.path() else { continue };
            if takes(files, file, false) {
                let text = format!(
                    "also takes the database {}, whose copy as plain files may be torn; the source {} takes it rightly, so exclude it here",
                    quoted(&file.to_string_lossy()),
                    quoted(&database.name)
                );
                warn(key.clone(), text);
            }
        }
        // A job's own destinations are refused when the configuration is read.
        for destination in config.destinations.values().filter(|d| !job.destinations.contains(&d.name)) {
            if let Some(root) = destination.directory().filter(|root| takes(files, Path::new(root), true)) {
                let text = format!(
                    "also takes the repository of destination '{}' in {}; exclude it if that is not meant",
                    destination.name,
                    quoted(root)
                );
                warn(key.clone(), text);
            }
        }
    }
}

/// Whether a files source would come upon this path.
fn takes(files: &FilesSource, path: &Path, directory: bool) -> bool {
    let Ok(inside) = path.strip_prefix(&files.path) else { return false };
    let mut builder = GitignoreBuilder::new(&files.path);
    for pattern in &files.exclude {
        let _ = builder.add_line(None, pattern);
    }
    let Ok(exclude) = builder.build() else { return true };
    if directory {
        return !is_excluded(&exclude, inside);
    }
    let outside = inside.parent().is_some_and(|p| !p.as_os_str().is_empty() && is_excluded(&exclude, p));
    !outside && !exclude.matched(inside, false).is_ignore()
}
