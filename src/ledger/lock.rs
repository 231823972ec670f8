//! One daemon for one state directory.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use super::LedgerError;

/// Held as long as the daemon lives; the kernel lets go of it when the process ends in any way.
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

impl StateLock {
    /// Locks the state directory; an error names the process that has it.
    pub fn acquire(state_dir: &Path) -> Result<Self, LedgerError> {
        let path = state_dir.join("lock");
        let failed = |e: &dyn std::fmt::Display| LedgerError::Failed(format!("cannot lock the state directory ({}): {e}", path.display()));
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let mut file = open.map_err(|e| failed(&e))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut other = String::new();
                let _ = Read::by_ref(&mut file).take(32).read_to_string(&mut other);
                return Err(LedgerError::Failed(format!(
                    "another keepd (process {}) uses the state directory {}; stop it, or give this one a state_dir of its own",
                    other.trim(),
                    state_dir.display()
                )));
            }
            Err(e) => return Err(failed(&e)),
        }
        let note = |file: &mut File| -> std::io::Result<()> {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        note(&mut file).map_err(|e| failed(&e))?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_refused_with_the_first_ones_number() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateLock::acquire(dir.path()).unwrap();
        let error = StateLock::acquire(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(first);
        StateLock::acquire(dir.path()).unwrap();
    }
}
