//! Who has a file open, and what keepd itself may do.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::Mode;
use rustix::io::Errno;

/// Processes that have a database open.
#[derive(Debug, Default)]
pub struct Users {
    /// `name (pid 123)` each.
    pub named: Vec<String>,
    /// Processes that could not be looked at, but for their locks.
    pub hidden: usize,
}

/// Who has a database or what is beside it open: by open files where that may be seen, and by locks, which all may see.
pub fn of(path: &Path) -> Users {
    let mut inodes = Vec::new();
    for suffix in ["", "-wal", "-shm", "-journal"] {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        inodes.extend(Path::new(&name).metadata().map(|m| (m.dev(), m.ino())));
    }
    let mut found: BTreeMap<u32, String> = BTreeMap::new();
    let mut hidden = 0;
    let me = std::process::id();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in processes {
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<u32>().ok()).filter(|pid| *pid != me) else { continue };
        let Ok(files) = std::fs::read_dir(process.path().join("fd")) else {
            hidden += 1;
            continue;
        };
        let is_it = |file: std::fs::DirEntry| std::fs::metadata(file.path()).is_ok_and(|m| inodes.contains(&(m.dev(), m.ino())));
        if files.flatten().any(is_it) {
            found.insert(pid, name(pid));
        }
    }
    // `1: POSIX  ADVISORY  READ 1234 fe:00:5678 0 EOF`
    for line in std::fs::read_to_string("/proc/locks").unwrap_or_default().lines() {
        let words: Vec<&str> = line.split_whitespace().filter(|w| *w != "->").collect();
        let (Some(pid), Some(file)) = (words.get(4).and_then(|p| p.parse::<u32>().ok()), words.get(5)) else { continue };
        let inode = file.rsplit(':').next().and_then(|i| i.parse::<u64>().ok());
        if pid != me
            && inodes.iter().any(|(_, i)| Some(*i) == inode)
            && device_of(file).is_some_and(|d| inodes.iter().any(|(dev, _)| *dev == d))
        {
            found.entry(pid).or_insert_with(|| name(pid));
        }
    }
    Users { named: found.into_iter().map(|(pid, name)| format!("{name} (pid {pid})")).collect(), hidden }
}

/// `fe:00:5678`, the device's numbers in hexadecimal.
fn device_of(file: &str) -> Option<u64> {
    let mut parts = file.split(':').map(|part| u32::from_str_radix(part, 16).ok());
    Some(rustix::fs::makedev(parts.next()??, parts.next()??))
}

fn name(pid: u32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "a process".into() } else { name.escape_debug().to_string() }
}

/// Whether files can be given to other users: root's right, which a unit may have taken away.
pub fn can_give_away() -> bool {
    /// <https://man7.org/linux/man-pages/man7/capabilities.7.html>
    const CAP_CHOWN: u64 = 1;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:")).and_then(|c| u64::from_str_radix(c.trim(), 16).ok());
    effective.map_or(rustix::process::geteuid().is_root(), |c| c & CAP_CHOWN != 0)
}

/// Whether set-user-ID and set-group-ID bits can be set: a unit may forbid it (`RestrictSUIDSGID=`), for directories, too.
pub fn can_set_special_bits() -> bool {
    let tried = rustix::fs::memfd_create(c"keepd-bits", rustix::fs::MemfdFlags::CLOEXEC)
        .and_then(|file| rustix::fs::fchmod(file, Mode::SGID | Mode::RUSR | Mode::WUSR));
    !matches!(tried, Err(Errno::PERM))
}
