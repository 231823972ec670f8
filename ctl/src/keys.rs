//! `--key FILE`: private keys that the daemon is lent for the time of a run. keepctl opens the files and passes them along; it reads nothing of them.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use clap::Args;
use keepd_protocol::MAX_DESCRIPTORS;
use rustix::fs::OFlags;

use crate::{Exit, Failure};

#[derive(Args, Clone, Default)]
pub struct KeyArguments {
    /// A private key file, or a recovery kit, that write-only backups open with; may be repeated
    #[arg(long = "key", value_name = "FILE")]
    pub files: Vec<PathBuf>,
}

/// The files, open.
pub struct Keys(Vec<File>);

impl KeyArguments {
    pub fn open(&self) -> Result<Keys, Failure> {
        // One is for what a call writes into.
        if self.files.len() >= MAX_DESCRIPTORS {
            return Err(Failure::new(Exit::Usage, format!("at most {} keys can be given at once", MAX_DESCRIPTORS - 1)));
        }
        // Not to hang on a FIFO, nor to take a terminal as the controlling one.
        let flags = i32::try_from((OFlags::NONBLOCK | OFlags::NOCTTY).bits()).unwrap_or_default();
        let open = |path: &PathBuf| {
            let opened = File::options().read(true).custom_flags(flags).open(path);
            opened.map_err(|e| Failure::failed(format!("cannot read the key file {}: {e}", path.display())))
        };
        self.files.iter().map(open).collect::<Result<_, _>>().map(Keys)
    }
}

impl Keys {
    /// Where they stand among the descriptors of a call, of which `others` come before them.
    pub fn places(&self, others: u32) -> Vec<u32> {
        (others..).take(self.0.len()).collect()
    }

    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd)
    }
}
