//! Who is behind a connection, beside what the kernel vouches for: the command line, who logged in, from where.
//!
//! Read once, when somebody connects, for the audit log alone; no right depends on it. A process chooses its own command line and environment.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use keepd_protocol::model::escape;
use nix::sys::socket::{getsockopt, sockopt};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::access::user_name;
use crate::ledger::audit::bounded;

const MAX_COMMAND: usize = 1 << 10;
/// What is read of a file of /proc.
const MAX_READ: usize = 64 << 10;
/// In /proc/PID/loginuid: nobody logged in.
const NOBODY: u32 = u32::MAX;
/// A directory of users that does not answer is not waited for longer.
const NAMED_WITHIN: Duration = Duration::from_secs(2);
/// A name is that of its number for so long.
const FRESH: Duration = Duration::from_secs(600);
/// Names that are remembered, and questions that may be open at once.
const MOST_NAMES: usize = 256;
const MOST_ASKED: usize = 4;

/// Words for what is not kept of a command line.
const NOT_KEPT: &str = "(not kept)";
/// What holds one of these is followed by a secret.
const SECRET_WORDS: [&str; 6] = ["password", "passphrase", "passwd", "secret", "token", "credential"];

/// What a process was when it connected. None: it is not known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Process {
    pub command: Option<String>,
    /// Who logged in, where that is another one than the process runs as.
    pub login: Option<String>,
    pub origin: Option<String>,
}

/// The same for whoever cannot wait: the number where the directory of users does not answer in time, or is asked too much already.
fn name_in_time(uid: u32) -> String {
    static KNOWN: LazyLock<Mutex<HashMap<u32, (Instant, String)>>> = LazyLock::new(Mutex::default);
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, name)) = known().get(&uid).filter(|(since, _)| since.elapsed() < FRESH) {
        return name.clone();
    }
    let number = format!("uid {uid}");
    if ASKED.fetch_add(1, Ordering::AcqRel) >= MOST_ASKED {
        ASKED.fetch_sub(1, Ordering::AcqRel);
        return number;
    }
    let (answer, answered) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let found = std::panic::catch_unwind(|| user_name(uid));
        ASKED.fetch_sub(1, Ordering::AcqRel);
        let _ = answer.send(found.ok());
    });
    let Ok(Some(name)) = answered.recv_timeout(NAMED_WITHIN) else { return number };
    let mut known = known();
    if known.len() >= MOST_NAMES {
        known.clear();
    }
    known.insert(uid, (Instant::now(), name.clone()));
    name
}

/// The peer's process, held: as long as it has not ended, its number is no other's. None before Linux 6.5.
pub fn hold(peer: impl AsFd) -> Option<OwnedFd> {
    getsockopt(&peer, sockopt::PeerPidfd).ok()
}

fn has_ended(process: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
}

impl Process {
    /// Reads it. Blocks for a moment.
    pub fn of(pid: Option<i32>, uid: u32, held: Option<&OwnedFd>) -> Self {
        let Some(pid) = pid.filter(|pid| *pid > 0) else { return Self::default() };
        let directory = PathBuf::from(format!("/proc/{pid}"));
        let process = Self { command: command(&directory), login: login(&directory, uid), origin: origin(&directory) };
        match held.is_some_and(has_ended) {
            // What was read may be another one's by now.
            true => Self::default(),
            false => process,
        }
    }
}

fn read(path: &Path) -> Option<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(MAX_READ as u64).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

fn command(directory: &Path) -> Option<String> {
    let mut bytes = read(&directory.join("cmdline"))?;
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    let words: Vec<_> = bytes.split(|b| *b == 0).map(String::from_utf8_lossy).collect();
    let text = escape(&without_secrets(words.iter().map(AsRef::as_ref)));
    (!text.is_empty()).then(|| bounded(&text, MAX_COMMAND))
}

/// A command line without what looks like a secret.
fn without_secrets<'w>(words: impl Iterator<Item = &'w str>) -> String {
    let mut kept: Vec<String> = Vec::new();
    let mut hides_next = false;
    for word in words {
        if std::mem::take(&mut hides_next) && !word.starts_with('-') {
            kept.push(NOT_KEPT.into());
            continue;
        }
        // `--password VALUE`
        hides_next = word.starts_with("--") && !word.contains('=') && word != "--include-secrets" && is_secret(word);
        kept.push(without_secret(word));
    }
    kept.join(" ")
}

fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase().replace('-', "_");
    crate::config::is_secret(&name) || SECRET_WORDS.iter().any(|word| name.contains(word))
}

/// `KEY=VALUE` with a key of a secret, `…password = "…"…`, `service://user:password@host`: without the value.
fn without_secret(word: &str) -> String {
    if let Some((key, value)) = word.split_once('=')
        && !value.is_empty()
        && key.rsplit('.').next().is_some_and(|name| is_secret(name.trim()))
    {
        return format!("{key}={NOT_KEPT}");
    }
    let small = word.to_ascii_lowercase();
    let after = |name: &str| {
        let at = small.find(name)? + name.len();
        let rest = small.get(at..)?;
        let sign = rest.find(['=', ':'])?;
        // What stands between belongs to the name.
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '"' | '\'' | ' ');
        rest.get(..sign)?.chars().all(is_name).then_some(at + sign + 1)
    };
    let cut = SECRET_WORDS.iter().filter_map(|name| after(name)).min();
    if let Some(head) = cut.and_then(|at| word.get(..at)) {
        return format!("{head}{NOT_KEPT}");
    }
    let of_place = || {
        let begin = word.find("://")? + 3;
        let place = word.get(begin..)?;
        let end = place.split('/').next()?.rfind('@')?;
        let colon = place.get(..end)?.find(':')?;
        Some(format!("{}{}:{NOT_KEPT}{}", word.get(..begin)?, place.get(..colon)?, place.get(end..)?))
    };
    of_place().unwrap_or_else(|| word.to_owned())
}

fn login(directory: &Path, uid: u32) -> Option<String> {
    let text = String::from_utf8(read(&directory.join("loginuid"))?).ok()?;
    let login: u32 = text.trim().parse().ok()?;
    (login != NOBODY && login != uid).then(|| name_in_time(login))
}

/// As logind knows it, else as the process says itself.
fn origin(directory: &Path) -> Option<String> {
    let cgroup = String::from_utf8(read(&directory.join("cgroup"))?).ok()?;
    if let Some(session) = session(&cgroup)
        && let Some(text) = read(&Path::new("/run/systemd/sessions").join(&session)).and_then(|text| String::from_utf8(text).ok())
        && let Some(host) = value(&text, "REMOTE_HOST")
    {
        let service = value(&text, "SERVICE").unwrap_or("login");
        return Some(bounded(&escape(&format!("{service} from {host}, session {session}")), 256));
    }
    let environment = read(&directory.join("environ"))?;
    let connection = environment.split(|b| *b == 0).find_map(|entry| entry.strip_prefix(b"SSH_CONNECTION="))?;
    let host = String::from_utf8_lossy(connection).split(' ').next().map(escape).filter(|host| !host.is_empty())?;
    Some(bounded(&format!("ssh from {host}, as its environment claims"), 256))
}

/// `0::/user.slice/user-1000.slice/session-3.scope`: 3.
fn session(cgroup: &str) -> Option<String> {
    let of = |part: &str| part.strip_prefix("session-")?.strip_suffix(".scope").map(str::to_owned);
    let session = cgroup.lines().flat_map(|line| line.split('/')).find_map(of)?;
    session.bytes().all(|b| b.is_ascii_alphanumeric()).then_some(session)
}

fn value<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_and_environments_are_read() {
        assert_eq!(session("0::/user.slice/user-1000.slice/session-c3.scope\n").as_deref(), Some("c3"));
        assert_eq!(session("0::/user.slice/session-../../etc.scope/x"), None);
        assert_eq!(session("0::/system.slice/ssh.service"), None);
        assert_eq!(value("UID=0\nREMOTE=1\nREMOTE_HOST=192.0.2.7\n", "REMOTE_HOST"), Some("192.0.2.7"));

        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &[u8]| fs::write(dir.path().join(name), text).unwrap();
        put("cgroup", b"0::/\n");
        put("environ", b"HOME=/root\0SSH_CONNECTION=192.0.2.7\x1b[2J 50000 192.0.2.1 22\0");
        put("cmdline", b"keepctl\0backup\nstart\0\xff\0");
        put("loginuid", b"4294967295");
        assert_eq!(origin(dir.path()).unwrap(), "ssh from 192.0.2.7\\u{1b}[2J, as its environment claims");
        assert_eq!(command(dir.path()).unwrap(), "keepctl backup\\nstart \u{fffd}");
        assert_eq!(login(dir.path(), 0), None);
        put("loginuid", b"3999999");
        assert_eq!((login(dir.path(), 0).as_deref(), login(dir.path(), 3999999)), (Some("uid 3999999"), None));
    }

    #[test]
    fn what_looks_like_a_secret_is_not_kept() {
        let all = |text: &str| without_secrets(text.split('|'));
        for (line, kept) in [
            (
                "keepctl|config|set|--set|destination.s3.secret_access_key=hunter2",
                "keepctl config set --set destination.s3.secret_access_key=(not kept)",
            ),
            (
                "keepctl|job|add|--set|source={ user = \"x\", password = \"hunter2\" }",
                "keepctl job add --set source={ user = \"x\", password =(not kept)",
            ),
            ("x|--password|hunter2|--deep", "x --password (not kept) --deep"),
            ("x|--PASSPHRASE=hunter2", "x --PASSPHRASE=(not kept)"),
            ("x|{\"token\": \"hunter2\"}", "x {\"token\":(not kept)"),
            ("x|https://anna:hunter2@host/a", "x https://anna:(not kept)@host/a"),
            ("keepctl|backup|shop|--label|reason=an update", "keepctl backup shop --label reason=an update"),
            ("keepctl|--json|ls|latest|files/passwords.txt", "keepctl --json ls latest files/passwords.txt"),
        ] {
            assert_eq!(all(line), kept);
        }
    }

    #[test]
    fn a_peer_is_known_while_it_lives() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        let held = hold(&a);
        let own = i32::try_from(std::process::id()).unwrap();
        let process = Process::of(Some(own), rustix::process::geteuid().as_raw(), held.as_ref());
        assert!(process.command.unwrap().contains("keepd"));
        assert_eq!(Process::of(None, 0, None), Process::default());
    }
}
