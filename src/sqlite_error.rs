//! What went wrong with a database of keepd's own, in words that name the cause and what to do.
//!
//! SQLite says "disk I/O error" for a file system without space and "unable to open database file" for a process without descriptors: which of them it
//! is, is asked of the system.

use std::io::Write;
use std::path::Path;

use rusqlite::{Error, ErrorCode};

/// With less than this a file system is full for SQLite, which makes its files longer in steps.
const FULL_BYTES: u64 = 128 << 10;
/// Written to see whether it can be.
const PROBE_BYTES: usize = 64 << 10;

/// The error in words; and whether it comes of the machine and not of what is in the file, which then is as good as it was.
pub fn words(error: &Error, path: &Path) -> (String, bool) {
    let cause = match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => Some("no space left on its file system; free some space".to_owned()),
        // SQLite writes to no file that has another name now, or none.
        Some(ErrorCode::ReadOnly) if !path.exists() => {
            Some("it was removed or exchanged while keepd had it open; restart keepd".to_owned())
        }
        Some(ErrorCode::ReadOnly) => Some("its file system, or the file, is read-only; make it writable".to_owned()),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Some("another program has it locked; end that".to_owned()),
        Some(ErrorCode::SystemIoFailure | ErrorCode::CannotOpen | ErrorCode::FileLockingProtocolFailed) => of_the_system(path),
        _ => None,
    };
    match cause {
        Some(cause) => (format!("{error}: {cause}"), true),
        None => (error.to_string(), false),
    }
}

fn of_the_system(path: &Path) -> Option<String> {
    if let Err(e) = std::fs::File::open("/dev/null") {
        return Some(format!("{e}; raise the limit of open files (LimitNOFILE=)"));
    }
    // Not by opening it: to close it again would let go of every lock that this process has on it.
    if let Err(e @ rustix::io::Errno::ACCESS) = rustix::fs::access(path, rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK) {
        return Some(format!("{e}; give it to the user that keepd runs as"));
    }
    let stat = rustix::fs::statvfs(path.parent()?).ok()?;
    if stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
        return Some("its file system is read-only; make it writable".to_owned());
    }
    let is_full = stat.f_blocks > 0 && stat.f_bavail.saturating_mul(stat.f_frsize) < FULL_BYTES || stat.f_files > 0 && stat.f_favail == 0;
    if is_full {
        return Some("no space left on its file system; free some space".to_owned());
    }
    // A quota is in no count of what is free: it shows itself when something is written.
    let refused = written_beside(path.parent()?).err().and_then(|e| rustix::io::Errno::from_io_error(&e));
    match refused {
        Some(rustix::io::Errno::DQUOT) => Some("the disk quota is used up there; free some space, or raise it".to_owned()),
        Some(rustix::io::Errno::NOSPC) => Some("no space left on its file system; free some space".to_owned()),
        _ => None,
    }
}

/// Whether something can be written in a directory; nothing of it stays.
fn written_beside(directory: &Path) -> std::io::Result<()> {
    let mut file = tempfile::tempfile_in(directory)?;
    file.write_all(&[0; PROBE_BYTES])?;
    file.sync_data()
}
