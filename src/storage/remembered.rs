//! What a directory held when it was listed last: a directory in which nothing came or went since says so by its times, which is one call to ask.
//!
//! Only on file systems of this machine that change a directory's times with what is in it, only for a while, and only for who looks again before anything
//! depends on it; whoever concludes from a listing that something may be deleted, or is whole, lists anew.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::Stat;

/// File systems whose directories can be believed, by their magic numbers (`linux/magic.h`): ext2 to ext4, XFS, Btrfs, F2FS, ZFS, bcachefs, tmpfs.
const LOCAL: [u64; 7] = [0xEF53, 0x5846_5342, 0x9123_683E, 0xF2F5_2010, 0x2FC1_2FC1, 0xCA45_1A4E, 0x0102_1994];
/// So long ago a directory must have changed before it was listed: times have a grain, and what came right after the listing could have the same.
const SETTLED: Duration = Duration::from_secs(2);
/// After that it is listed anew: what changes a directory without telling (a repair of the file system) does not go unseen for ever.
const LASTING: Duration = Duration::from_secs(3600);
/// Bytes of names that are remembered, of all repositories.
const MOST_BYTES: usize = 4 << 20;

static KNOWN: LazyLock<Mutex<Known>> = LazyLock::new(Mutex::default);

#[derive(Default)]
struct Known {
    directories: HashMap<(u64, u64), Held>,
    bytes: usize,
}

struct Held {
    times: [i64; 4],
    listed: Instant,
    names: Names,
}

/// The names in a directory, sorted.
#[derive(Clone, Default)]
pub struct Names {
    pub files: Vec<Box<str>>,
    pub directories: Vec<Box<str>>,
    /// What they are was told by the directory itself; of a link it is told by what it leads to.
    pub is_sure: bool,
}

impl Names {
    fn bytes(&self) -> usize {
        self.files.iter().chain(&self.directories).map(|name| name.len() + size_of::<Box<str>>()).sum()
    }
}

fn times(stat: &Stat) -> [i64; 4] {
    [stat.st_mtime, stat.st_mtime_nsec as i64, stat.st_ctime, stat.st_ctime_nsec as i64]
}

/// The device that `directory` is on, where the directories on it can be believed.
pub fn local_device(directory: impl AsFd) -> Option<u64> {
    let about = rustix::fs::fstatfs(&directory).ok()?;
    LOCAL.contains(&(about.f_type as u64)).then(|| rustix::fs::fstat(directory).ok().map(|stat| stat.st_dev)).flatten()
}

/// Stands for a directory and what is in it.
pub fn mark(stat: &Stat) -> [u8; 48] {
    let mut mark = [0; 48];
    let [a, b, c, d] = times(stat).map(i64::to_le_bytes);
    for (to, from) in mark.chunks_exact_mut(8).zip([stat.st_dev.to_le_bytes(), stat.st_ino.to_le_bytes(), a, b, c, d]) {
        to.copy_from_slice(&from);
    }
    mark
}

/// What the directory held, given to `each` as it is now, when nothing came or went since.
pub fn with<T>(stat: &Stat, each: impl FnOnce(&Names) -> T) -> Option<T> {
    let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let held = known.directories.get(&(stat.st_dev, stat.st_ino))?;
    (held.times == times(stat) && held.listed.elapsed() < LASTING).then(|| each(&held.names))
}

/// Remembers what a directory holds. `before`: what it was when its listing began; `at`: when that was asked.
pub fn put(before: &Stat, at: SystemTime, names: Names) {
    let changed = UNIX_EPOCH + Duration::new(before.st_ctime.max(before.st_mtime).unsigned_abs(), 0) + Duration::from_secs(1);
    let is_settled = at.duration_since(changed).is_ok_and(|since| since >= SETTLED);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (before.st_dev, before.st_ino);
    if let Some(old) = known.directories.remove(&key) {
        known.bytes -= old.names.bytes();
    }
    if is_settled && names.is_sure {
        if known.bytes + names.bytes() > MOST_BYTES {
            *known = Known::default();
        }
        known.bytes += names.bytes();
        known.directories.insert(key, Held { times: times(before), listed: Instant::now(), names });
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn stat(path: &std::path::Path) -> Stat {
        rustix::fs::stat(path).unwrap()
    }

    fn names(files: &[&str]) -> Names {
        Names { files: files.iter().map(|f| Box::from(*f)).collect(), directories: Vec::new(), is_sure: true }
    }

    #[test]
    fn only_what_is_settled_and_unchanged_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        put(&stat(path), SystemTime::now(), names(&["new"]));
        assert!(with(&stat(path), |_| ()).is_none(), "it changed just now");
        // The change time cannot be set, but waited for.
        while stat(path).st_ctime + 4 > SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64 {
            std::thread::sleep(Duration::from_millis(100));
        }
        let long_ago = SystemTime::now() - Duration::from_secs(3);
        put(&stat(path), long_ago, names(&["a"]));
        assert!(with(&stat(path), |_| ()).is_none(), "it was listed right after it changed, and what came then may have the same time");
        put(&stat(path), SystemTime::now(), names(&["a", "b"]));
        assert_eq!(with(&stat(path), |names| names.files.len()), Some(2));
        let before = fs::metadata(path).unwrap();
        fs::write(path.join("c"), "").unwrap();
        // Whoever sets the time of the last change back cannot set that of the last change of the inode.
        fs::File::open(path).unwrap().set_modified(before.modified().unwrap()).unwrap();
        assert_eq!(fs::metadata(path).unwrap().mtime(), before.mtime());
        assert!(with(&stat(path), |_| ()).is_none(), "something came");
        put(&stat(path), SystemTime::now(), names(&["a", "b", "c"]));
        assert!(with(&stat(path), |_| ()).is_none(), "it changed just now, and what was known of it is forgotten");
    }
}
