//! Files that keepctl writes for its caller.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::{Exit, Failure};

type Result<T> = std::result::Result<T, Failure>;

/// A file that is there when it is whole, and not before.
pub struct NewFile {
    pub file: NamedTempFile,
    pub path: PathBuf,
}

impl NewFile {
    /// Mode 0600. An existing file is refused before anything is done.
    pub fn create(path: &Path) -> Result<Self> {
        if path.symlink_metadata().is_ok() {
            return Err(Failure::failed(format!("{} exists already and is not overwritten", path.display())));
        }
        let name = path.file_name().ok_or_else(|| Failure::new(Exit::Usage, format!("{} is no name of a file", path.display())))?;
        let mut prefix = OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        let file = tempfile::Builder::new().prefix(&prefix).tempfile_in(Self::directory(path));
        let file = file.map_err(|e| Failure::failed(format!("cannot make {}: {e}", path.display())))?;
        Ok(Self { file, path: path.to_owned() })
    }

    fn directory(path: &Path) -> &Path {
        path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    /// Gives it its name, durably.
    pub fn publish(self) -> Result<()> {
        // The daemon of another machine may be ahead of its line.
        crate::remote::settle()?;
        let failed = |e: io::Error| Failure::failed(format!("cannot make {}: {e}", self.path.display()));
        self.file.as_file().sync_all().map_err(failed)?;
        self.file.persist_noclobber(&self.path).map_err(|e| match e.error.kind() {
            io::ErrorKind::AlreadyExists => Failure::failed(format!("{} exists already and is not overwritten", self.path.display())),
            _ => failed(e.error),
        })?;
        File::open(Self::directory(&self.path)).and_then(|d| d.sync_all()).map_err(failed)
    }
}
