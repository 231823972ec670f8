//! Whether a files source captures a path: the rules of the walk, asked of a single path.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ignore::gitignore::Gitignore;
use rustix::fs::Mode;

use super::{excludes, is_cache, walk};
use crate::config::FilesSource;
use crate::source::SourceError;

/// What a source makes of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    Captured,
    /// It lies below the source's directory and is not captured, because of this key of the configuration.
    LeftOut(&'static str),
    Elsewhere,
}

/// A files source with its rules.
pub struct Holder {
    /// With all links resolved.
    pub root: PathBuf,
    excludes: Gitignore,
    device: Option<u64>,
    exclude_caches: bool,
}

impl Holder {
    /// The error is about the patterns.
    pub fn new(source: &FilesSource) -> Result<Self, SourceError> {
        let root = std::fs::canonicalize(&source.path).unwrap_or_else(|_| source.path.clone());
        let device = if source.one_file_system { root.metadata().ok().map(|stat| stat.dev()) } else { None };
        Ok(Self { root, excludes: excludes(source)?, device, exclude_caches: source.exclude_caches })
    }

    /// `path` has no links in it.
    pub fn holds(&self, path: &Path, is_directory: bool) -> Held {
        let Ok(inside) = path.strip_prefix(&self.root) else { return Held::Elsewhere };
        let mut directory = self.root.clone();
        let mut so_far = PathBuf::new();
        let mut parts = inside.components().peekable();
        while let Some(part) = parts.next() {
            if let Some(left_out) = self.leaves_out(&directory) {
                return left_out;
            }
            so_far.push(part);
            if self.excludes.matched(&so_far, is_directory || parts.peek().is_some()).is_ignore() {
                return Held::LeftOut("exclude");
            }
            directory.push(part);
        }
        match is_directory {
            true => self.leaves_out(&directory).unwrap_or(Held::Captured),
            false => Held::Captured,
        }
    }

    /// What is in this directory, as a whole.
    fn leaves_out(&self, directory: &Path) -> Option<Held> {
        let elsewhere = |device| directory.metadata().is_ok_and(|stat| stat.dev() != device);
        if self.device.is_some_and(elsewhere) {
            return Some(Held::LeftOut("one_file_system"));
        }
        let is_tagged = || rustix::fs::open(directory, walk::DIRECTORY_FLAGS, Mode::empty()).is_ok_and(is_cache);
        (self.exclude_caches && directory.join("CACHEDIR.TAG").exists() && is_tagged()).then_some(Held::LeftOut("exclude_caches"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_the_walk_would_do() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("a/cache")).unwrap();
        std::fs::write(root.join("a/cache/CACHEDIR.TAG"), "Signature: 8a477f597d28d172789f06886806bc55\n").unwrap();
        std::fs::create_dir_all(root.join("b")).unwrap();
        std::fs::write(root.join("b/CACHEDIR.TAG"), "Signature: another").unwrap();
        let source = |exclude: &[&str], caches| FilesSource {
            path: dir.path().into(),
            exclude: exclude.iter().map(|e| (*e).to_owned()).collect(),
            one_file_system: true,
            exclude_caches: caches,
        };
        let asked =
            |exclude: &[&str], path: &str, directory| Holder::new(&source(exclude, true)).unwrap().holds(&root.join(path), directory);
        assert_eq!(asked(&[], "x/y.db", false), Held::Captured);
        assert_eq!(asked(&["*.db"], "x/y.db", false), Held::LeftOut("exclude"));
        assert_eq!(asked(&["/x/"], "x/y.db", false), Held::LeftOut("exclude"));
        assert_eq!(asked(&["/x/"], "x", false), Held::Captured, "a pattern for directories");
        assert_eq!(asked(&["*.db", "!y.db"], "x/y.db", false), Held::Captured);
        assert_eq!(asked(&[], "a/cache/y.db", false), Held::LeftOut("exclude_caches"));
        assert_eq!(asked(&[], "a/cache", true), Held::LeftOut("exclude_caches"));
        assert_eq!(asked(&[], "b/y.db", false), Held::Captured, "another tag");
        assert_eq!(asked(&[], "", true), Held::Captured);
        let holder = Holder::new(&source(&[], false)).unwrap();
        assert_eq!(holder.holds(&root.join("a/cache/y.db"), false), Held::Captured);
        assert_eq!(holder.holds(Path::new("/nowhere"), true), Held::Elsewhere);
        assert_eq!(holder.holds(&root.with_extension("other"), true), Held::Elsewhere);
    }
}
