//! Refuses what would eat its own tail: repositories in one another, and jobs that read the repository they write.

use std::path::Path;

use ignore::gitignore::Gitignore;

use super::destination::FsRoot;
use super::problem::quoted;
use super::source::FilesPlace;
use super::{Job, SourceKind};

pub(super) fn check(roots: &[FsRoot<'_>], places: &[FilesPlace<'_>], state_dir: Option<&Path>) {
    for (n, root) in roots.iter().enumerate() {
        for other in roots.iter().take(n) {
            if root.path == other.path {
                root.item.report(format!("is the root of destination '{}' as well; each needs a directory of its own", other.destination));
            } else if root.path.starts_with(&other.path) || other.path.starts_with(&root.path) {
                root.item.report(format!(
                    "and the root of destination '{}', {}, lie inside one another; each needs a directory of its own",
                    other.destination,
                    quoted(&other.path.to_string_lossy())
                ));
            }
        }
        if let Some(state_dir) = state_dir.filter(|s| s.starts_with(&root.path)) {
            let shown = quoted(&state_dir.to_string_lossy());
            root.item.report(format!("holds daemon.state_dir, {shown}; the repository needs a directory of its own"));
        }
    }
    for place in places {
        // What keepd itself knows is in no backup: brought back, it would say that what happened since did not.
        if let Some(state_dir) = state_dir.filter(|s| place.path.starts_with(s)) {
            let shown = quoted(&state_dir.to_string_lossy());
            place.item.report(format!("lies inside daemon.state_dir, {shown}, which is keepd's own and in no backup"));
        }
        for root in roots.iter().filter(|r| place.destinations.iter().any(|d| d == r.destination)) {
            let shown = quoted(&root.path.to_string_lossy());
            if place.path.starts_with(&root.path) {
                place.item.report(format!(
                    "lies inside the root of destination '{}', {shown}: the job would back up its own backups",
                    root.destination
                ));
            } else if let Some(exclude) = &place.exclude
                && let Ok(inside) = root.path.strip_prefix(&place.path)
                && !is_excluded(exclude, inside)
            {
                place.item.report(format!(
                    "holds the root of destination '{}', {shown}: the job would back up its own backups; add exclude = [{}] or move \
                     the destination",
                    root.destination,
                    exclude_literal(inside)
                ));
            }
        }
    }
}

/// Has the sources of a job leave out the state directory.
pub(super) fn leave_out(job: &mut Job, state_dir: &Path) {
    for source in &mut job.sources {
        if let SourceKind::Files(files) = &mut source.kind
            && let Ok(inside) = state_dir.strip_prefix(&files.path)
            && inside != Path::new("")
        {
            // Behind all others, so that none takes it back.
            files.exclude.push(pattern(inside));
        }
    }
}

/// A TOML string with the pattern that matches this path only.
fn exclude_literal(inside: &Path) -> String {
    format!("\"{}\"", pattern(inside).escape_default())
}

/// The pattern that matches this path only.
fn pattern(inside: &Path) -> String {
    let mut pattern = String::from("/");
    for c in inside.to_string_lossy().chars() {
        if matches!(c, '*' | '?' | '[' | ']' | '{' | '}' | '\\' | '!') {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern.push('/');
    pattern
}

/// Whether a walk from the top never comes into this directory, or finds nothing in it to take.
pub(super) fn is_excluded(exclude: &Gitignore, inside: &Path) -> bool {
    let mut so_far = std::path::PathBuf::new();
    for component in inside.components() {
        so_far.push(component);
        if exclude.matched(&so_far, true).is_ignore() {
            return true;
        }
    }
    // `backups/*` leaves the directory itself, empty. The name stands for any.
    exclude.matched(so_far.join("any name"), false).is_ignore() && exclude.matched(so_far.join("any name"), true).is_ignore()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ignore::gitignore::GitignoreBuilder;

    fn excluded(patterns: &[&str], inside: &str) -> bool {
        let mut builder = GitignoreBuilder::new("/srv");
        for pattern in patterns {
            builder.add_line(None, pattern).expect("a pattern");
        }
        is_excluded(&builder.build().expect("patterns"), Path::new(inside))
    }

    #[test]
    fn a_directory_is_excluded_by_itself_a_parent_or_its_contents() {
        assert!(excluded(&["backups/"], "backups"));
        assert!(excluded(&["/backups"], "backups/keepd"));
        assert!(excluded(&["backups/*"], "backups"));
        assert!(excluded(&["backups/**"], "backups"));
        assert!(excluded(&["keepd"], "a/b/keepd"));
        assert!(!excluded(&[], "backups"));
        assert!(!excluded(&["*.tmp"], "backups"));
        assert!(!excluded(&["backups/*.tmp"], "backups"));
        assert!(!excluded(&["backups/", "!backups/"], "backups"));
    }

    #[test]
    fn what_is_advised_works() {
        for inside in ["backups", "a b/c", "we*ird/[x]", "{y}!"] {
            let literal = exclude_literal(Path::new(inside));
            let table: toml::Table = format!("p = {literal}").parse().expect("TOML");
            let pattern = table.get("p").and_then(|v| v.as_str()).expect("a string").to_owned();
            assert!(excluded(&[&pattern], inside), "{pattern}");
        }
    }
}
