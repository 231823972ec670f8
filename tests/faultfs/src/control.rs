//! What tests hold in their hands: the count of operations, the point to kill at, the rules, the record. Every operation of the layer comes through here and is
//! alone between [`Control::begin`] and its end, so that there is one order of all.
//!
//! `syncfs` does not reach a FUSE server. A program that wants it seen looks up [`SYNCFS`] in the directory that it synced (keepd's debug builds do, when told to).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::errno::Errno;
use crate::power::{Record, Update};
use crate::rule::{Action, Rule, Verb};

/// The name whose lookup says that a syncfs was done.
pub const SYNCFS: &str = ".keepd-faultfs-syncfs";

/// Between two looks whether what hangs may go on.
const HANGS_FOR: Duration = Duration::from_millis(10);

/// One operation that took place, or was begun when the process was killed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// From 1.
    pub number: u64,
    pub verb: Verb,
    pub path: PathBuf,
    /// The second name of a rename or hard link.
    pub other: Option<PathBuf>,
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} {}", self.number, self.verb, self.path.display())?;
        self.other.as_ref().map_or(Ok(()), |other| write!(f, " -> {}", other.display()))
    }
}

/// On which side of an operation the process is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Before,
    After,
}

#[derive(Default)]
pub(crate) struct State {
    operations: Vec<Operation>,
    kill: Option<(u64, When, Pid)>,
    killed: Option<Operation>,
    refusing: bool,
    rules: Vec<Rule>,
    pub(crate) record: Option<Record>,
}

pub struct Control {
    backing: PathBuf,
    state: Mutex<State>,
}

impl Control {
    pub(crate) fn new(backing: &Path) -> Self {
        Self { backing: backing.to_owned(), state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Numbers begin at 1 again; what was counted is forgotten.
    pub fn count_anew(&self) {
        self.lock().operations.clear();
    }

    /// How many operations there were.
    pub fn count(&self) -> u64 {
        self.lock().operations.len() as u64
    }

    pub fn operations(&self) -> Vec<Operation> {
        self.lock().operations.clone()
    }

    /// Counts anew and kills this process (SIGKILL) at operation `number`; from then on everything is refused (EIO), whoever asks.
    pub fn kill_at(&self, number: u64, when: When, pid: u32) {
        let mut state = self.lock();
        state.operations.clear();
        state.killed = None;
        state.kill = Pid::from_raw(pid.cast_signed()).map(|pid| (number, when, pid));
    }

    /// The operation at which the process was killed.
    pub fn killed(&self) -> Option<Operation> {
        self.lock().killed.clone()
    }

    /// Refuses everything, as after a kill.
    pub fn refuse(&self) {
        self.lock().refusing = true;
    }

    /// Serves again.
    pub fn serve(&self) {
        let mut state = self.lock();
        state.refusing = false;
        state.kill = None;
    }

    /// Adds a rule; of several that apply to one operation the first one added counts.
    pub fn add(&self, mut rule: Rule) {
        if matches!(rule.action, Action::Stale) {
            rule.stale = listings(&self.backing);
        }
        self.lock().rules.push(rule);
    }

    pub fn clear_rules(&self) {
        self.lock().rules.clear();
    }

    /// How often rules took effect, all together.
    pub fn fired(&self) -> u64 {
        self.lock().rules.iter().map(|r| r.fired).sum()
    }

    /// Counts anew and keeps a log with all data from now on. What is there counts as durable; it is copied to `base`, which does not exist yet. To be called while nothing
    /// writes there.
    pub fn record(&self, base: &Path) -> io::Result<()> {
        let record = Record::new(&self.backing, base)?;
        let mut state = self.lock();
        state.operations.clear();
        state.record = Some(record);
        Ok(())
    }

    /// Ends the log and gives it.
    pub fn recorded(&self) -> Option<Record> {
        self.lock().record.take()
    }

    /// An operation begins: it has its number, and is alone until [`Begun`] ends. An error is for whoever asked.
    pub(crate) fn begin(&self, verb: Verb, path: &Path, other: Option<&Path>) -> Result<Begun<'_>, Errno> {
        let mut state = self.lock();
        if state.refusing {
            return Err(Errno::IO);
        }
        let unnumbered = !verb.numbered() || path.as_os_str().as_encoded_bytes().ends_with(b"-shm");
        let mut kill = None;
        if !unnumbered {
            let operation =
                Operation { number: state.operations.len() as u64 + 1, verb, path: path.to_owned(), other: other.map(Path::to_owned) };
            if let Some((_, when, pid)) = state.kill.filter(|k| k.0 == operation.number) {
                state.killed = Some(operation.clone());
                if when == When::Before {
                    state.die(pid);
                    return Err(Errno::IO);
                }
                kill = Some(pid);
            }
            state.operations.push(operation);
        }
        let rule = state.rules.iter_mut().find_map(|r| r.applies(verb, path, other).then(|| r.clone()));
        let number = state.operations.len() as u64;
        match rule.as_ref().map(|r| &r.action) {
            Some(Action::Fail(errno)) => return Err(*errno),
            Some(Action::Delay(for_)) => {
                let for_: Duration = *for_;
                drop(state);
                std::thread::sleep(for_);
                state = self.lock();
            }
            Some(Action::Hang) => {
                while !state.rules.is_empty() {
                    drop(state);
                    std::thread::sleep(HANGS_FOR);
                    state = self.lock();
                }
            }
            _ => {}
        }
        Ok(Begun { state, kill, rule, number })
    }
}

impl State {
    fn die(&mut self, pid: Pid) {
        // It may be gone already: then there is nothing to kill.
        let _ = kill_process(pid, Signal::KILL);
        self.refusing = true;
    }
}

pub(crate) struct Begun<'a> {
    state: MutexGuard<'a, State>,
    kill: Option<Pid>,
    pub(crate) rule: Option<Rule>,
    number: u64,
}

impl Begun<'_> {
    /// The operation took effect (or not): what it changed goes into the record, and this is where the process dies after it.
    pub(crate) fn end<T>(mut self, result: Result<T, Errno>, update: impl FnOnce(&T) -> Option<Update>) -> Result<T, Errno> {
        if let Ok(done) = &result
            && self.state.record.is_some()
            && let Some(update) = update(done)
            && let Some(record) = &mut self.state.record
        {
            record.push(self.number, update);
        }
        if let Some(pid) = self.kill {
            self.state.die(pid);
            return Err(Errno::IO);
        }
        result
    }
}

/// The names in each directory beneath `root`, by their relative paths.
fn listings(root: &Path) -> BTreeMap<PathBuf, Vec<OsString>> {
    let mut found = BTreeMap::new();
    let mut left = vec![PathBuf::new()];
    while let Some(at) = left.pop() {
        let mut names = Vec::new();
        for entry in fs::read_dir(root.join(&at)).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                left.push(at.join(entry.file_name()));
            }
            names.push(entry.file_name());
        }
        found.insert(at, names);
    }
    found
}
