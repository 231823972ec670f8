//! Services of systemd that run, and the directories they write to.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use super::{Failure, Scan, patterns};
use crate::process::{Job as Process, ProcessError};

const WITHIN: Duration = Duration::from_secs(60);
const MOST: usize = 8 << 20;
/// Units asked for at once.
const AT_ONCE: usize = 200;
const PROPERTIES: &str = "--property=Id,MainPID,StateDirectory,WorkingDirectory,ReadWritePaths,BindPaths";
/// Of the base system: what they keep is made again, or belongs to the system's own backup.
const BASE: [&str; 42] = [
    "systemd-*",
    "dbus*",
    "user@*",
    "getty@*",
    "serial-getty@*",
    "console-getty*",
    "ssh*",
    "cron*",
    "atd*",
    "anacron*",
    "rsyslog*",
    "syslog*",
    "NetworkManager*",
    "ModemManager*",
    "wpa_supplicant*",
    "networkd-*",
    "polkit*",
    "udisks2*",
    "upower*",
    "accounts-daemon*",
    "avahi-daemon*",
    "chrony*",
    "ntp*",
    "snapd*",
    "unattended-upgrades*",
    "packagekit*",
    "fwupd*",
    "irqbalance*",
    "acpid*",
    "auditd*",
    "multipathd*",
    "lvm2*",
    "dm-event*",
    "rngd*",
    "tuned*",
    "firewalld*",
    "qemu-guest-agent*",
    "cloud-*",
    "keepd*",
    "containerd*",
    "docker.service",
    "rtkit-daemon*",
];
/// Open files below these tell where a service has its data.
const DATA: [&str; 4] = ["/var/lib", "/srv", "/opt", "/home"];

impl Scan<'_> {
    /// Items for the directories of services, and for the `volumes` of containers.
    pub fn services(&mut self, volumes: Vec<PathBuf>) -> Result<(), Failure> {
        let mut candidates: Vec<(PathBuf, String)> = volumes.into_iter().map(|path| (path.clone(), volume(&path))).collect();
        match self.units() {
            Ok(units) => {
                let (mut hidden, mut first) = (0, String::new());
                for unit in units {
                    let id = unit.get("Id").cloned().unwrap_or_default();
                    candidates.extend(named(&unit).into_iter().map(|path| (path, id.clone())));
                    let Some(pid) = unit.get("MainPID").and_then(|pid| pid.parse().ok()).filter(|pid| *pid > 0u32) else { continue };
                    match written_by(pid) {
                        Ok(paths) => candidates.extend(paths.into_iter().map(|path| (path, id.clone()))),
                        Err(_) => {
                            hidden += 1;
                            first = if first.is_empty() { id } else { first };
                        }
                    }
                }
                if hidden > 0 {
                    self.found.note(format!(
                        "the open files of {hidden} services cannot be seen ({first} is one): only the directories that their units name are known; \
                         docs/coverage.md says which right that takes"
                    ));
                }
            }
            Err(ProcessError::Cancelled) => return Err(Failure::Cancelled),
            Err(ProcessError::Failed(text)) => {
                self.found.note(format!("the services of systemd cannot be listed, so their directories are not known: {text}"));
            }
        }
        self.directories(candidates)
    }

    /// The properties of each service that runs and is not of the base system.
    fn units(&self) -> Result<Vec<BTreeMap<String, String>>, ProcessError> {
        let ask = |words: &[&str]| {
            let command = ["systemctl"].iter().chain(words);
            let output = Process::new(command.copied()).run(b"", MOST, WITHIN, &self.live.cancel)?;
            Ok::<_, ProcessError>(String::from_utf8_lossy(&output).into_owned())
        };
        let listed = ask(&["list-units", "--type=service", "--state=running", "--no-legend", "--plain", "--no-pager", "--full"])?;
        let base = patterns(BASE).map_err(|e| ProcessError::Failed(e.to_string()))?;
        let names = listed.lines().filter_map(|line| line.split_whitespace().next());
        let names: Vec<&str> = names.filter(|name| !base.matched(Path::new("/").join(name), false).is_ignore()).collect();
        let mut units = Vec::new();
        for names in names.chunks(AT_ONCE) {
            let shown = ask(&[&["show", PROPERTIES, "--"][..], names].concat())?;
            units.extend(shown.split("\n\n").map(properties).filter(|unit| !unit.is_empty()));
        }
        Ok(units)
    }
}

fn properties(block: &str) -> BTreeMap<String, String> {
    let pairs = block.lines().filter_map(|line| line.split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// The directories that a unit names.
fn named(unit: &BTreeMap<String, String>) -> Vec<PathBuf> {
    let values = |name: &str| unit.get(name).map(String::as_str).unwrap_or_default().split_whitespace();
    let mut paths: Vec<PathBuf> = Vec::new();
    // A link may be given after a colon.
    paths.extend(values("StateDirectory").map(|name| Path::new("/var/lib").join(name.split(':').next().unwrap_or(name))));
    let plain = |path: &str| PathBuf::from(path.trim_start_matches(['-', '+', '!', '~']));
    paths.extend(unit.get("WorkingDirectory").map(|path| plain(path)));
    paths.extend(values("ReadWritePaths").map(plain));
    paths.extend(values("BindPaths").filter_map(|bind| bind.split(':').next()).map(plain));
    paths.retain(|path| path.is_absolute());
    paths
}

/// The directories in which a process has files open for writing.
fn written_by(pid: u32) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        // The link's own mode says what the file is open for. A descriptor may be closed meanwhile.
        let (Ok(stat), Ok(target)) = (path.symlink_metadata(), path.read_link()) else { continue };
        if stat.mode() & 0o200 != 0 && target.is_absolute() {
            found.extend(data_directory(&target));
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// Where a service that writes this file has its data: `/var/lib/shop` for all below it; below `/home` the file's own directory.
fn data_directory(file: &Path) -> Option<PathBuf> {
    let base = DATA.iter().find(|base| file.starts_with(base))?;
    let inside = file.strip_prefix(base).ok()?;
    let mut parts = inside.components();
    let (first, second) = (parts.next()?, parts.next()?);
    let Component::Normal(first) = first else { return None };
    match *base {
        "/home" => file.parent().map(Path::to_owned),
        // DynamicUser=
        base if first == "private" => Some(Path::new(base).join(first).join(second)),
        base => Some(Path::new(base).join(first)),
    }
}

/// Whose a volume is.
fn volume(path: &Path) -> String {
    let mut parts = path.components().rev().filter_map(|c| c.as_os_str().to_str()).skip(1);
    let (name, above) = (parts.next().unwrap_or_default(), parts.nth(1).unwrap_or_default());
    format!("volume {name} of {}", if above == "docker" { "Docker" } else { "Podman" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_name_their_directories_in_several_ways() {
        let unit = properties(
            "Id=shop.service\nMainPID=0\nStateDirectory=shop private/x:y\nWorkingDirectory=!/srv/shop\nReadWritePaths=-/data +/more\nBindPaths=/a:/b:rbind /c\n",
        );
        let paths = named(&unit);
        let expected = ["/var/lib/shop", "/var/lib/private/x", "/srv/shop", "/data", "/more", "/a", "/c"];
        assert_eq!(paths, expected.map(PathBuf::from));
        assert!(named(&properties("StateDirectory=\nWorkingDirectory=\n")).is_empty());
    }

    #[test]
    fn open_files_tell_where_data_is() {
        let directory = |path: &str| data_directory(Path::new(path)).map(|p| p.display().to_string());
        assert_eq!(directory("/var/lib/shop/deep/x.db").as_deref(), Some("/var/lib/shop"));
        assert_eq!(directory("/var/lib/private/shop/x").as_deref(), Some("/var/lib/private/shop"));
        assert_eq!(directory("/home/a/app/x").as_deref(), Some("/home/a/app"));
        assert_eq!(directory("/srv/x"), None);
        assert_eq!(directory("/etc/x/y"), None);
        assert_eq!(volume(Path::new("/var/lib/docker/volumes/shop/_data")), "volume shop of Docker");
        assert_eq!(volume(Path::new("/h/.local/share/containers/storage/volumes/y/_data")), "volume y of Podman");
    }

    #[test]
    fn a_process_of_our_own_shows_what_it_writes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(written_by(std::process::id()).is_ok(), "{}", file.path().display());
        assert!(written_by(u32::MAX).is_err());
    }
}
