//! Files that secrets are put into: new ones only, readable by their owner only, durable; all of them or none.

use std::os::fd::OwnedFd;
use std::path::Path;

use keepd_protocol::model::escape;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, fsync, mkdirat, openat, unlinkat};
use rustix::io::Errno;

use super::plan::NewFile;

/// Files that were made. Unless they are kept, they go again.
#[must_use]
pub struct SecretFiles {
    /// The directory and the name of each, files and directories in the order in which they were made.
    made: Vec<(OwnedFd, String, bool)>,
}

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl SecretFiles {
    /// Makes all of them below `directory`, with the directories between. No link is followed, nothing is written over.
    pub fn write(directory: &Path, files: &[NewFile]) -> Result<Self, String> {
        let mut made = Self { made: Vec::new() };
        if !files.is_empty() && !directory.is_dir() {
            return Err(format!("there is no directory {}; make it first", escape(&directory.to_string_lossy())));
        }
        for file in files {
            let shown = escape(&directory.join(&file.name).to_string_lossy());
            made.one(directory, file).map_err(|e| match e {
                Errno::EXIST => format!("the secret file {shown} appeared meanwhile, and none is written over; look at the import anew"),
                Errno::LOOP | Errno::NOTDIR => {
                    format!("the secret file {shown} cannot be made: a link stands in its way, and none is followed")
                }
                error => format!("the secret file {shown} cannot be made: {error}"),
            })?;
        }
        Ok(made)
    }

    fn one(&mut self, directory: &Path, file: &NewFile) -> Result<(), Errno> {
        let names: Vec<&str> = file.name.split('/').collect();
        let (last, between) = names.split_last().ok_or(Errno::INVAL)?;
        if names.iter().any(|name| matches!(*name, "" | "." | "..")) {
            return Err(Errno::INVAL);
        }
        // The configuration's directory itself may be a link.
        let mut parent = openat(CWD, directory, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        for name in between {
            let next = match openat(&parent, *name, DIRECTORY, Mode::empty()) {
                Err(Errno::NOENT) => {
                    mkdirat(&parent, *name, Mode::RWXU)?;
                    self.made.push((parent.try_clone().map_err(|_| Errno::MFILE)?, (*name).to_owned(), true));
                    fsync(&parent)?;
                    openat(&parent, *name, DIRECTORY, Mode::empty())?
                }
                other => other?,
            };
            parent = next;
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = openat(&parent, *last, flags, Mode::RUSR | Mode::WUSR)?;
        self.made.push((parent.try_clone().map_err(|_| Errno::MFILE)?, (*last).to_owned(), false));
        let mut rest = file.text.as_bytes();
        while !rest.is_empty() {
            let n = rustix::io::write(&opened, rest)?;
            rest = rest.get(n..).unwrap_or_default();
        }
        fsync(&opened)?;
        fsync(&parent)
    }

    /// They are needed from now on.
    pub fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for SecretFiles {
    fn drop(&mut self) {
        for (parent, name, is_directory) in self.made.drain(..).rev() {
            let flags = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            // A directory that somebody put something into meanwhile stays.
            match unlinkat(&parent, name.as_str(), flags) {
                Ok(()) | Err(Errno::NOTEMPTY) => drop(fsync(&parent)),
                Err(error) => tracing::warn!("{} was made for an import that was not made, and cannot be removed: {error}", escape(&name)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn file(name: &str, text: &str) -> NewFile {
        NewFile { name: name.into(), text: text.to_owned().into() }
    }

    #[test]
    fn they_are_new_private_and_go_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let files = [file("a", "1"), file("keys/deep/b", "2")];
        drop(SecretFiles::write(dir.path(), &files).expect("written"));
        assert_eq!(std::fs::read_dir(dir.path()).expect("a list").count(), 0, "nothing is left");

        SecretFiles::write(dir.path(), &files).expect("written").keep();
        assert_eq!(std::fs::read_to_string(dir.path().join("keys/deep/b")).expect("a text"), "2");
        let mode = |name: &str| std::fs::metadata(dir.path().join(name)).expect("it is there").permissions().mode() & 0o777;
        assert_eq!((mode("a"), mode("keys"), mode("keys/deep/b")), (0o600, 0o700, 0o600));

        let error = SecretFiles::write(dir.path(), &[file("keys/c", "3"), file("a", "other")]).err().expect("refused");
        assert!(error.contains("none is written over"), "{error}");
        assert_eq!(std::fs::read_to_string(dir.path().join("a")).expect("a text"), "1");
        assert!(!dir.path().join("keys/c").exists(), "the others go, too");
    }

    #[test]
    fn no_link_is_followed() {
        let dir = tempfile::tempdir().expect("a directory");
        let outside = tempfile::tempdir().expect("a directory");
        std::os::unix::fs::symlink(outside.path(), dir.path().join("keys")).expect("a link");
        std::os::unix::fs::symlink(outside.path().join("x"), dir.path().join("a")).expect("a link");
        for name in ["keys/b", "a", "../c", "/d", ""] {
            assert!(SecretFiles::write(dir.path(), &[file(name, "1")]).is_err(), "{name}");
        }
        assert_eq!(std::fs::read_dir(outside.path()).expect("a list").count(), 0);
    }
}
