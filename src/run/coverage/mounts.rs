//! The mounts of the machine: which file systems are local and real, and which of them no source lies on.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use keepd_protocol::model::{CoverageItem, CoverageKind};

use super::{Found, Scan, patterns, shown, suggestion};

const TABLE: &str = "/proc/self/mountinfo";
/// File systems on disks of this machine.
const LOCAL: [&str; 18] = [
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "bcachefs", "nilfs2", "vfat", "exfat", "ntfs", "ntfs3",
    "hfsplus", "udf", "ufs",
];
/// On other machines.
const NETWORK: [&str; 13] =
    ["nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre", "afs", "gfs2", "ocfs2", "virtiofs"];
/// Nothing in them outlives the machine's next start, or they show what is elsewhere.
const PASSING: [&str; 8] = ["tmpfs", "ramfs", "overlay", "squashfs", "erofs", "iso9660", "devtmpfs", "aufs"];
/// Mounts that hold the base system, or nothing that lasts.
const BASE: [&str; 9] = ["/boot/", "/efi/", "/usr/", "/nix/", "/var/cache/", "/var/tmp/", "/tmp/", "/recovery/", "/.snapshots/"];

/// A mount as the table has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    device: String,
    /// Which part of the file system.
    root: PathBuf,
    point: PathBuf,
    kind: String,
    source: String,
    options: String,
}

/// What a walk makes of a directory that is a mount point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crossing {
    /// No mount point.
    None,
    /// A local file system, or the part of the parent's that would be there anyway.
    Enter,
    Leave,
}

#[derive(Default)]
pub struct Mounts {
    /// By mount point, each once: the one that is seen.
    mounts: Vec<Mount>,
}

impl Mounts {
    pub fn read(found: &mut Found) -> Self {
        let text = match std::fs::read(TABLE) {
            Ok(text) => text,
            Err(e) => {
                found.note(format!("the mounts cannot be read ({TABLE}: {e}): only the file systems of the roots are looked at"));
                return Self::default();
            }
        };
        let mounts = Self::parse(&text);
        for mount in &mounts.mounts {
            let kind = mount.kind.as_str();
            if NETWORK.contains(&kind) || kind.starts_with("fuse") {
                let text = format!("{} is a {kind} file system and is not looked at: back it up where it is", shown(&mount.point));
                found.note(text);
            } else if kind == "proc" && mount.point == Path::new("/proc") {
                let hidden = ["hidepid=invisible", "hidepid=noaccess", "hidepid=ptraceable", "hidepid=1", "hidepid=2", "hidepid=4"];
                if hidden.iter().any(|word| mount.options.split(',').any(|option| option == *word)) {
                    found.note(
                        "processes of other users are hidden from keepd (ProtectProc= of its unit): servers that are only known by their process, and \
                         files that services have open, are missing here; docs/coverage.md says how to allow it for a scan"
                            .into(),
                    );
                }
            }
        }
        mounts
    }

    fn parse(table: &[u8]) -> Self {
        let mut mounts: Vec<Mount> = Vec::new();
        for mount in table.split(|b| *b == b'\n').filter_map(Mount::parse) {
            // Of several at one place the last is seen.
            mounts.retain(|m| m.point != mount.point);
            mounts.push(mount);
        }
        Self { mounts }
    }

    /// The table could not be read.
    pub fn is_empty(&self) -> bool {
        self.mounts.is_empty()
    }

    fn at(&self, point: &Path) -> Option<&Mount> {
        self.mounts.iter().find(|m| m.point == point)
    }

    /// The mount that a path lies on.
    fn of(&self, path: &Path) -> Option<&Mount> {
        path.ancestors().find_map(|ancestor| self.at(ancestor))
    }

    /// Whether what is mounted there is what would be there without it: sandboxes are made so.
    fn is_itself(&self, mount: &Mount) -> bool {
        let Some(below) = mount.point.parent().and_then(|parent| self.of(parent)) else { return false };
        let inside = mount.point.strip_prefix(&below.point);
        below.device == mount.device && inside.is_ok_and(|inside| below.root.join(inside) == mount.root)
    }

    /// Whether the same is mounted at another place, which comes first.
    fn is_another_name(&self, mount: &Mount) -> bool {
        let comes_first = |other: &&Mount| {
            (other.root != mount.root && mount.root.starts_with(&other.root))
                || (other.root == mount.root
                    && (other.point.as_os_str().len(), &other.point) < (mount.point.as_os_str().len(), &mount.point))
        };
        self.mounts.iter().filter(|other| other.device == mount.device && other.point != mount.point).any(|other| comes_first(&other))
    }

    pub fn crossing(&self, directory: &Path) -> Crossing {
        match self.at(directory) {
            None => Crossing::None,
            Some(mount) if self.is_itself(mount) => Crossing::Enter,
            Some(mount) if LOCAL.contains(&mount.kind.as_str()) && !self.is_another_name(mount) => Crossing::Enter,
            Some(_) => Crossing::Leave,
        }
    }

    /// Local file systems, each once.
    fn local(&self) -> impl Iterator<Item = &Mount> {
        let is_local = |m: &&Mount| LOCAL.contains(&m.kind.as_str());
        self.mounts.iter().filter(is_local).filter(|m| !self.is_itself(m) && !self.is_another_name(m))
    }

    /// Kinds of file systems that are neither known to be local nor known not to hold data.
    fn unknown(&self) -> impl Iterator<Item = &Mount> {
        let is_device = |m: &&Mount| m.source.starts_with("/dev/");
        let is_known = |kind: &str| LOCAL.contains(&kind) || PASSING.contains(&kind) || NETWORK.contains(&kind) || kind.starts_with("fuse");
        self.mounts.iter().filter(is_device).filter(move |m| !is_known(&m.kind))
    }
}

impl Mount {
    /// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|b| *b == b' ');
        let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
        let (device, root, point) = (text(fields.nth(2)?), unescaped(fields.next()?), unescaped(fields.next()?));
        fields.find(|f| *f == b"-")?;
        let (kind, source) = (text(fields.next()?), text(fields.next()?));
        Some(Self { device, root: root.into(), point: point.into(), kind, source, options: text(fields.next().unwrap_or_default()) })
    }
}

/// Spaces and the like stand there as `\040`.
fn unescaped(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(out)
}

impl Scan<'_> {
    /// Items for local file systems that no source lies on, and those that one does.
    pub fn mounted(&mut self) {
        let Ok(base) = patterns(BASE) else { return };
        let destinations: Vec<PathBuf> = self.env.config.destinations.values().filter_map(|d| Some(d.directory()?.into())).collect();
        let mut items = Vec::new();
        for mount in self.mounts.local().filter(|m| self.is_meant(&m.point, true)) {
            let is_here = |path: &Path| self.mounts.of(path).is_some_and(|m| m == mount);
            if mount.point.parent().is_some() && base.matched_path_or_any_parents(&mount.point, true).is_ignore() {
                continue;
            }
            // The place of backups.
            if destinations.iter().any(|d| d.canonicalize().is_ok_and(|d| is_here(&d))) && mount.point.parent().is_some() {
                continue;
            }
            let mut by: Vec<String> = self.jobs.paths().filter(|(path, _)| is_here(path)).map(|(_, source)| source.to_owned()).collect();
            by.extend(self.jobs.of_path(&mount.point, true).captured.iter().map(|d| d.source.clone()));
            let serves = self.served.iter().any(|dir| is_here(dir));
            by.sort();
            by.dedup();
            let gap = by.is_empty() && !serves;
            let reason = match (gap, by.is_empty()) {
                (true, _) => "no source lies on this file system".to_owned(),
                (false, true) => "a database server has its data there, whose databases are listed".to_owned(),
                (false, false) => "sources lie on it".to_owned(),
            };
            items.push(CoverageItem {
                kind: CoverageKind::Mount,
                what: shown(&mount.point),
                r#where: format!("{} on {}", mount.kind, mount.source),
                bytes: used(&mount.point),
                covered_by: by,
                gap,
                reason,
                suggestion: if gap { suggestion(None, "files", &mount.point, "one_file_system = true\n") } else { None },
                ..CoverageItem::default()
            });
        }
        let unknown: Vec<String> = self.mounts.unknown().map(|m| format!("{} ({})", shown(&m.point), m.kind)).collect();
        for what in unknown {
            self.found.note(format!("{what} is of a file system that keepd does not know, and is not looked at"));
        }
        items.into_iter().for_each(|item| self.found.item(item));
    }
}

/// Bytes that are taken on a file system.
fn used(point: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(point).ok()?;
    stat.f_blocks.checked_sub(stat.f_bfree)?.checked_mul(stat.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"22 27 0:21 / /proc rw,relatime - proc proc rw,hidepid=invisible
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
28 27 254:0 /home /home ro,relatime - ext4 /dev/vda rw
29 27 254:0 /srv/data /var/www/data rw - ext4 /dev/vda rw
30 27 8:17 / /mnt/the\\040disk rw - xfs /dev/sdb1 rw
31 27 8:17 / /mnt/the\\040disk\\040again rw - xfs /dev/sdb1 rw
32 27 0:40 / /mnt/far rw - nfs4 server:/x rw
33 27 0:50 /@a /mnt/a rw - btrfs /dev/sdc rw
34 27 0:50 /@b /mnt/b rw - btrfs /dev/sdc rw
35 27 0:60 / /tmp rw - tmpfs tmpfs rw
36 27 8:33 / /odd rw - newfs /dev/sdd1 rw
not a line\n";

    #[test]
    fn each_file_system_is_walked_once() {
        let mounts = Mounts::parse(TABLE);
        let crossing = |path: &str| mounts.crossing(Path::new(path));
        assert_eq!(crossing("/home"), Crossing::Enter, "a sandbox's own name for what is there");
        assert_eq!(crossing("/var/www/data"), Crossing::Leave, "another name of /srv/data");
        assert_eq!(crossing("/mnt/the disk"), Crossing::Enter);
        assert_eq!(crossing("/mnt/the disk again"), Crossing::Leave);
        assert_eq!((crossing("/mnt/a"), crossing("/mnt/b")), (Crossing::Enter, Crossing::Enter));
        assert_eq!((crossing("/mnt/far"), crossing("/tmp"), crossing("/proc")), (Crossing::Leave, Crossing::Leave, Crossing::Leave));
        assert_eq!(crossing("/srv"), Crossing::None);
        let local: Vec<String> = mounts.local().map(|m| shown(&m.point)).collect();
        assert_eq!(local, ["/", "/mnt/the disk", "/mnt/a", "/mnt/b"]);
        assert_eq!(mounts.unknown().map(|m| m.kind.as_str()).collect::<Vec<_>>(), ["newfs"]);
        assert_eq!(mounts.of(Path::new("/mnt/a/x/y")).unwrap().point, Path::new("/mnt/a"));
    }

    #[test]
    fn any_table_is_no_trouble() {
        for text in [&b""[..], b"1", b"1 2 3 4 5 - ", b"1 2 3:4 \\ \\0 rw - ext4", b"1 2 3:4 \\400 \\04 rw - ext4 x"] {
            let _ = Mounts::parse(text).crossing(Path::new("/"));
        }
    }
}
