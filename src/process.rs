//! Programs of others: started without a shell, fed, read, and ended in time.
//!
//! A program runs in a process group of its own, so that whatever it starts ends with it; it gets a small environment in which no secret of
//! the daemon stands; what it says on standard error is kept from both ends. Secrets travel as files in memory that it inherits by descriptor.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt, FdMapping};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, Mode};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

/// Of standard error so much is kept from the beginning, and so much from the end.
const KEPT_BYTES: usize = 16 << 10;
/// Between looks whether to stop.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Between asking a program to end and ending it.
const MERCY: Duration = Duration::from_secs(5);
/// The first descriptor of a secret in the child.
const FIRST_SECRET: i32 = 3;
/// Variables that a program gets from the daemon.
pub const PASSED_ON: [&str; 9] = ["PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR", "XDG_RUNTIME_DIR"];

/// What is to be started.
#[derive(Default)]
pub struct Job<'a> {
    /// The program and its arguments.
    pub command: Vec<OsString>,
    /// Beside what every program gets.
    pub environment: Vec<(&'a str, OsString)>,
    /// The user it runs as; None: the daemon's own.
    pub run_as: Option<&'a str>,
    /// Files it can read as [`secret_path`] of their number.
    pub secrets: Vec<Zeroizing<Vec<u8>>>,
    /// Bytes of memory of its own that it, and each process it starts, may have (RLIMIT_DATA): more is refused to it.
    pub memory: Option<u64>,
    /// The signal it gets when keepd dies, for what must not outlive it; in the words of setpriv(1).
    pub follows: Option<&'static str>,
}

/// Where the child finds its secret of this number.
pub fn secret_path(number: i32) -> String {
    format!("/proc/self/fd/{}", FIRST_SECRET + number)
}

/// What went wrong with a program.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("cancelled")]
    Cancelled,
    #[error("{0}")]
    Failed(String),
}

impl ProcessError {
    /// With what it was about before what went wrong.
    pub fn about(self, what: &str) -> Self {
        match self {
            ProcessError::Cancelled => ProcessError::Cancelled,
            ProcessError::Failed(text) => ProcessError::Failed(format!("{what}: {text}")),
        }
    }
}

/// A program that runs.
pub struct Running {
    /// For messages: its first word.
    name: String,
    child: Child,
    ended: Option<ExitStatus>,
    output: Option<OwnedFd>,
    input: Option<OwnedFd>,
    said: Arc<Mutex<Tail>>,
    listener: Option<std::thread::JoinHandle<()>>,
}

/// The beginning and the end of what a program said.
#[derive(Default)]
struct Tail {
    first: Vec<u8>,
    last: Vec<u8>,
    dropped: u64,
}

impl Tail {
    fn add(&mut self, mut bytes: &[u8]) {
        let room = KEPT_BYTES.saturating_sub(self.first.len()).min(bytes.len());
        let (head, rest) = bytes.split_at(room);
        self.first.extend_from_slice(head);
        bytes = rest;
        self.last.extend_from_slice(bytes);
        if self.last.len() > KEPT_BYTES {
            let over = self.last.len() - KEPT_BYTES;
            self.dropped += over as u64;
            self.last.drain(..over);
        }
    }

    fn text(&self) -> String {
        let between = if self.dropped > 0 { format!("\n[{} bytes left out]\n", self.dropped) } else { String::new() };
        printable(&format!("{}{between}{}", String::from_utf8_lossy(&self.first), String::from_utf8_lossy(&self.last)))
    }
}

/// Without control characters, but for the ends of lines.
fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.trim_end().chars() {
        match c {
            '\n' | '\t' => shown.push(c),
            '\r' => {}
            c if c.is_control() => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
    }
    shown
}

/// Which of its pipes a program has; what it has not is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pipes {
    /// Its output is read.
    Output,
    /// It is fed; its output goes where its errors go.
    Input,
    /// Both.
    Both,
}

impl Job<'_> {
    pub fn new<T: Into<OsString>>(command: impl IntoIterator<Item = T>) -> Self {
        Self { command: command.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    fn name(&self) -> String {
        self.command.first().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// The words that start it: limits are set by util-linux's programs, which then become it.
    fn words(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = Vec::new();
        if let Some(bytes) = self.memory {
            words.extend(["prlimit".into(), format!("--data={bytes}:{bytes}").into(), "--core=0".into(), "--".into()]);
        }
        if let Some(signal) = self.follows {
            words.extend(["setpriv", "--pdeathsig", signal, "--"].map(OsString::from));
        }
        words.extend(self.command.iter().cloned());
        words
    }

    /// Starts it.
    pub fn start(&self, pipes: Pipes) -> Result<Running, ProcessError> {
        let name = self.name();
        let failed = |what: &str, e: &dyn fmt::Display| ProcessError::Failed(format!("{what} {name}: {e}"));
        let words = self.words();
        let mut command = Command::new(words.first().map(OsString::as_os_str).unwrap_or(OsStr::new("")));
        command.args(words.iter().skip(1)).env_clear().process_group(0);
        for variable in PASSED_ON {
            if let Some(value) = std::env::var_os(variable) {
                command.env(variable, value);
            }
        }
        let mut owner = None;
        if let Some(user) = self.run_as {
            let known = uzers::get_user_by_name(user)
                .ok_or_else(|| failed("cannot start", &format!("there is no user '{user}' on this machine (run_as)")))?;
            let home = uzers::os::unix::UserExt::home_dir(&known).as_os_str().to_owned();
            command.env("HOME", home).env("USER", user).env("LOGNAME", user).env_remove("XDG_RUNTIME_DIR");
            if known.uid() != rustix::process::geteuid().as_raw() {
                command.uid(known.uid()).gid(known.primary_group_id());
                owner = Some((known.uid(), known.primary_group_id()));
            }
        }
        command.envs(self.environment.iter().map(|(key, value)| (key, value)));
        let mut mappings = Vec::new();
        for (n, secret) in self.secrets.iter().enumerate() {
            let parent_fd = in_memory(secret, owner).map_err(|e| failed("cannot pass a secret to", &e))?;
            mappings.push(FdMapping { parent_fd, child_fd: FIRST_SECRET + n as i32 });
        }
        command.fd_mappings(mappings).map_err(|e| failed("cannot pass a secret to", &e))?;
        let (error_reader, error_writer) = io::pipe().map_err(|e| failed("cannot make a pipe for", &e))?;
        command.stdin(if pipes == Pipes::Output { Stdio::null() } else { Stdio::piped() });
        match pipes {
            Pipes::Input => {
                let also = error_writer.try_clone().map_err(|e| failed("cannot make a pipe for", &e))?;
                command.stdout(also);
            }
            _ => drop(command.stdout(Stdio::piped())),
        }
        command.stderr(error_writer);
        let mut child = command.spawn().map_err(|e| match (e.kind(), self.run_as) {
            (io::ErrorKind::NotFound, _) => failed("cannot start", &format!("{e}; is it installed, and in keepd's PATH?")),
            (io::ErrorKind::PermissionDenied, Some(user)) => failed(
                "cannot start",
                &format!("{e}; to run it as {user} keepd needs the right to become another user (CAP_SETUID, CAP_SETGID)"),
            ),
            _ => failed("cannot start", &e),
        })?;
        // The parent's ends of what the child has are closed with it.
        drop(command);
        let said = Arc::new(Mutex::new(Tail::default()));
        let heard = said.clone();
        let listener = std::thread::Builder::new().name("stderr".into()).spawn(move || listen(error_reader, &heard)).ok();
        let input = child.stdin.take().map(OwnedFd::from);
        let output = child.stdout.take().map(OwnedFd::from);
        Ok(Running { name, child, ended: None, output, input, said, listener })
    }

    /// Runs it to its end: `input` in, at most `most` bytes out. Whatever is not exit status 0 is an error with what it said.
    pub fn run(&self, input: &[u8], most: usize, limit: Duration, cancel: &CancellationToken) -> Result<Vec<u8>, ProcessError> {
        let mut running = self.start(if input.is_empty() { Pipes::Output } else { Pipes::Both })?;
        let deadline = Instant::now() + limit;
        let feeder = running.input.take().map(|fd| {
            let bytes = Zeroizing::new(input.to_vec());
            std::thread::spawn(move || {
                // One that does not want it all has its reasons; its exit status tells.
                let _ = std::fs::File::from(fd).write_all(&bytes);
            })
        });
        let mut output = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match running.read(&mut buffer, left, cancel)? {
                0 => break,
                n => output.extend_from_slice(buffer.get(..n).unwrap_or_default()),
            }
            if output.len() > most {
                return Err(ProcessError::Failed(format!(
                    "{} printed more than {most} bytes, which is not what was asked for",
                    running.name
                )));
            }
        }
        let ended = running.finish(deadline.saturating_duration_since(Instant::now()), cancel)?;
        if let Some(feeder) = feeder {
            let _ = feeder.join();
        }
        ended.good()?;
        Ok(output)
    }
}

/// A file in memory, readable by the owner only.
fn in_memory(bytes: &[u8], owner: Option<(u32, u32)>) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("keepd", MemfdFlags::CLOEXEC)?;
    rustix::fs::fchmod(&fd, Mode::RUSR)?;
    if let Some((uid, gid)) = owner
        && rustix::fs::fchown(&fd, Some(rustix::fs::Uid::from_raw(uid)), Some(rustix::fs::Gid::from_raw(gid))).is_err()
    {
        // Without CAP_CHOWN. Only processes of that user come to it, through the child's descriptors; PostgreSQL's tools refuse it so.
        rustix::fs::fchmod(&fd, Mode::RUSR | Mode::RGRP | Mode::ROTH)?;
    }
    let mut file = std::fs::File::from(fd);
    file.write_all(bytes)?;
    Ok(file.into())
}

fn listen(mut from: impl Read, said: &Mutex<Tail>) {
    let mut buffer = [0; 4096];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => said.lock().unwrap_or_else(PoisonError::into_inner).add(buffer.get(..n).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// How a program ended.
pub struct Ended {
    name: String,
    pub status: ExitStatus,
    /// What it said on standard error, without control characters.
    pub said: String,
}

impl Ended {
    /// Its first word.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// An error unless it ended with exit status 0.
    pub fn good(&self) -> Result<(), ProcessError> {
        match self.status.success() {
            true => Ok(()),
            false => Err(ProcessError::Failed(self.told())),
        }
    }

    /// How it ended, with what it said.
    pub fn told(&self) -> String {
        let how = match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("{} ended with exit status {code}", self.name),
            (None, Some(signal)) => format!("{} was ended by signal {signal}", self.name),
            (None, None) => format!("{} ended in an unknown way", self.name),
        };
        match self.said.is_empty() {
            true => format!("{how} and said nothing"),
            false => format!("{how}: {}", self.said),
        }
    }
}

impl Running {
    /// Waits at most `patience` for output; 0 at its end.
    pub fn read(&mut self, buffer: &mut [u8], patience: Duration, cancel: &CancellationToken) -> Result<usize, ProcessError> {
        let since = Instant::now();
        loop {
            let Some(output) = &self.output else { return Ok(0) };
            match is_readable(output) {
                Ok(false) => self.go_on(since, patience, "gave nothing", cancel)?,
                Ok(true) => match rustix::io::read(output, &mut *buffer) {
                    Err(rustix::io::Errno::INTR) => {}
                    Err(e) => return Err(self.broken("cannot read from", &e)),
                    Ok(n) => return Ok(n),
                },
                Err(e) => return Err(self.broken("cannot wait for", &e)),
            }
        }
    }

    /// Its standard input, for somebody else to write to. It must be closed before [`Running::finish`] can be waited for.
    pub fn take_input(&mut self) -> Option<OwnedFd> {
        self.input.take()
    }

    /// Sends a signal to the program itself, not to what it started.
    pub fn signal(&self, signal: Signal) {
        // One that has ended hears nothing.
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).filter(|_| self.ended.is_none()) {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// What it said so far.
    pub fn said_so_far(&self) -> String {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).text()
    }

    /// Closes its input, and waits for its end at most so long.
    pub fn finish(mut self, patience: Duration, cancel: &CancellationToken) -> Result<Ended, ProcessError> {
        self.input = None;
        self.output = None;
        let since = Instant::now();
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => {}
                Err(e) => return Err(self.broken("cannot wait for", &e)),
            }
            self.go_on(since, patience, "did not end", cancel)?;
            std::thread::sleep(Duration::from_millis(5));
        };
        self.ended = Some(status);
        Ok(Ended { name: self.name.clone(), status, said: self.said() })
    }

    /// What it said so far on standard error; all of it once it has ended and none of its children lives.
    fn said(&mut self) -> String {
        if let Some(listener) = self.listener.take() {
            let since = Instant::now();
            // A grandchild may have the pipe still.
            while !listener.is_finished() && since.elapsed() < Duration::from_secs(1) {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        self.said.lock().unwrap_or_else(PoisonError::into_inner).text()
    }

    fn go_on(&mut self, since: Instant, patience: Duration, what: &str, cancel: &CancellationToken) -> Result<(), ProcessError> {
        if cancel.is_cancelled() {
            return Err(ProcessError::Cancelled);
        }
        if since.elapsed() < patience {
            return Ok(());
        }
        let said = self.said_so_far();
        let said = if said.is_empty() { String::new() } else { format!("; it said: {said}") };
        Err(ProcessError::Failed(format!("{} {what} for {:.0} s and was ended{said}", self.name, patience.as_secs_f64())))
    }

    fn broken(&self, what: &str, error: &dyn fmt::Display) -> ProcessError {
        ProcessError::Failed(format!("{what} {}: {error}", self.name))
    }
}

/// Whether there is something to read, or its end.
fn is_readable(fd: &impl AsFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: LOOK_EVERY.subsec_nanos().into() };
    match poll(&mut fds, Some(&timeout)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => Ok(false),
        Ok(_) => Ok(true),
        Err(e) => Err(e.into()),
    }
}

impl Drop for Running {
    /// Whatever still runs of it is asked to end, and ended.
    fn drop(&mut self) {
        if self.ended.is_some() {
            return;
        }
        let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) else { return };
        let _ = kill_process_group(group, Signal::TERM);
        if self.has_ended_within(MERCY) {
            // What it started may go on.
            let _ = kill_process_group(group, Signal::KILL);
            return;
        }
        let killed = kill_process_group(group, Signal::KILL);
        if !self.has_ended_within(MERCY) {
            // Of another user, and without the right to end it: nobody waits for it for ever.
            let why = killed.err().map(|e| format!(" ({e}; with run_as keepd needs CAP_KILL)")).unwrap_or_default();
            tracing::error!("{} could not be ended{why}; it goes on as process {}", self.name, self.child.id());
        }
    }
}

impl Running {
    /// Whether it ends by itself within so long.
    pub fn has_ended_within(&mut self, limit: Duration) -> bool {
        let since = Instant::now();
        loop {
            if let Ok(Some(_)) = self.child.try_wait() {
                return true;
            }
            if since.elapsed() >= limit {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(line: &str) -> Job<'static> {
        Job::new(["/bin/sh", "-c", line])
    }

    fn run(line: &str) -> Result<String, String> {
        let done = shell(line).run(b"", 1000, Duration::from_secs(20), &CancellationToken::new());
        done.map(|out| String::from_utf8_lossy(&out).into_owned()).map_err(|e| e.to_string())
    }

    #[test]
    fn output_status_and_errors_are_told() {
        assert_eq!(run("echo a; echo b >&2"), Ok("a\n".into()));
        assert_eq!(run("printf 'no\\033[31m\\n' >&2; exit 3"), Err("/bin/sh ended with exit status 3: no\\u{1b}[31m".into()));
        assert_eq!(run("kill -9 $$"), Err("/bin/sh was ended by signal 9 and said nothing".into()));
        assert!(run("yes | head -c 2000").unwrap_err().contains("more than 1000 bytes"));
        let missing = Job::new(["/nowhere/at/all"]).run(b"", 10, Duration::from_secs(1), &CancellationToken::new());
        assert!(missing.unwrap_err().to_string().contains("is it installed"));
    }

    #[test]
    fn a_program_that_hangs_ends_with_all_it_started() {
        let since = Instant::now();
        let file = tempfile::NamedTempFile::new().unwrap();
        let line = format!("sleep 300 & echo $! >{}; echo waiting >&2; sleep 300", file.path().display());
        let hangs = shell(&line).run(b"", 10, Duration::from_secs(1), &CancellationToken::new());
        assert_eq!(hangs.unwrap_err().to_string(), "/bin/sh gave nothing for 1 s and was ended; it said: waiting");
        assert!(since.elapsed() < Duration::from_secs(20));
        let child: u32 = std::fs::read_to_string(file.path()).unwrap().trim().parse().unwrap();
        // What was killed ends when the kernel comes to it.
        loop {
            let state = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            if state.is_empty() || state.contains(" Z ") {
                break;
            }
            assert!(since.elapsed() < Duration::from_secs(20), "{state}");
            std::thread::sleep(Duration::from_millis(10));
        }
        let cancel = CancellationToken::new();
        cancel.cancel();
        assert!(matches!(shell("sleep 300").run(b"", 10, Duration::from_secs(100), &cancel), Err(ProcessError::Cancelled)));
    }

    #[test]
    fn secrets_are_files_and_nothing_of_the_environment() {
        let mut job = shell(&format!("cat {}; stat -L -c %a {}; env", secret_path(0), secret_path(1)));
        job.secrets = vec![Zeroizing::new(b"one\n".to_vec()), Zeroizing::new(b"two".to_vec())];
        job.environment = vec![("KEEPD_JOB", "shop".into())];
        let out = job.run(b"", 10_000, Duration::from_secs(20), &CancellationToken::new()).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert!(out.starts_with("one\n400\n"), "{out}");
        assert!(out.contains("KEEPD_JOB=shop") && !out.contains("CARGO"), "{out}");
    }

    #[test]
    fn memory_is_bounded_and_what_follows_is_started() {
        let line = "python3 -c 'x = bytearray(400 << 20); print(len(x))'";
        let mut job = shell(line);
        job.follows = Some("KILL");
        let run = |job: &Job<'_>| job.run(b"", 1000, Duration::from_secs(60), &CancellationToken::new());
        assert_eq!(run(&job).unwrap(), b"419430400\n");
        job.memory = Some(128 << 20);
        assert!(run(&job).unwrap_err().to_string().contains("MemoryError"));
        assert!(run(&Job { memory: Some(1 << 30), ..Job::new(["/nowhere/at/all"]) }).unwrap_err().to_string().contains("/nowhere/at/all"));
    }

    #[test]
    fn what_is_said_is_kept_from_both_ends() {
        let error = run("seq 1 20000 >&2; exit 1").unwrap_err();
        assert!(error.contains(": 1\n2\n3\n") && error.ends_with("\n20000") && error.contains("bytes left out]"), "{error:.200}");
        assert!(error.len() < 3 * KEPT_BYTES);
    }

    #[test]
    fn what_goes_in_comes_out() {
        let bytes = vec![b'x'; 300_000];
        let out = shell("cat").run(&bytes, 1 << 20, Duration::from_secs(20), &CancellationToken::new()).unwrap();
        assert_eq!(out, bytes);
    }
}
