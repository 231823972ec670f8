//! Rules: which operations fail, and how.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use globset::{GlobBuilder, GlobMatcher};

use crate::errno::Errno;

/// What is done. All but the last three have numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verb {
    Create,
    Write,
    Truncate,
    Allocate,
    /// Of a file: fsync and fdatasync.
    Fsync,
    /// Of a directory.
    FsyncDir,
    /// Of all the file system: seen only where the program says so, see [`crate::Control`].
    SyncFs,
    Rename,
    Unlink,
    Rmdir,
    Mkdir,
    /// A hard link.
    Link,
    Symlink,
    /// A device, pipe or socket.
    Mknod,
    /// Mode, owner or times.
    SetAttr,
    SetXattr,
    RemoveXattr,
    /// A directory is listed: one operation from its first entry to its last.
    List,
    Open,
    Read,
    /// A name is looked up, or attributes are read.
    Stat,
}

impl Verb {
    /// Whether such an operation has a number, that is, changes something or lists.
    pub fn numbered(self) -> bool {
        !matches!(self, Self::Open | Self::Read | Self::Stat)
    }

    /// All that can say that a disk is full.
    pub const NEEDING_SPACE: &[Self] = &[Self::Create, Self::Write, Self::Allocate, Self::Mkdir, Self::Symlink, Self::Link, Self::SetXattr];

    /// All that a file system refuses that was mounted read-only.
    pub const CHANGING: &[Self] = &[
        Self::Create,
        Self::Write,
        Self::Truncate,
        Self::Allocate,
        Self::Rename,
        Self::Unlink,
        Self::Rmdir,
        Self::Mkdir,
        Self::Link,
        Self::Symlink,
        Self::Mknod,
        Self::SetAttr,
        Self::SetXattr,
        Self::RemoveXattr,
    ];
}

/// What happens to an operation.
#[derive(Clone, Debug)]
pub enum Action {
    /// It fails and does nothing.
    Fail(Errno),
    /// A write takes this many bytes at the most and says so; others are not touched.
    Short(usize),
    /// It waits first.
    Delay(Duration),
    /// It waits until there are no rules any more, as where a server is gone.
    Hang,
    /// A listing leaves out the entries whose names match this glob.
    Omit(String),
    /// A listing gives what was there when the rule was added.
    Stale,
    /// A write takes effect in its first half, then fails.
    Torn(Errno),
}

/// Which operations, and what happens to them.
#[derive(Clone, Debug)]
pub struct Rule {
    verbs: Vec<Verb>,
    path: GlobMatcher,
    first: u64,
    times: u64,
    pub(crate) action: Action,
    pub(crate) omit: Option<GlobMatcher>,
    pub(crate) stale: BTreeMap<PathBuf, Vec<OsString>>,
    seen: u64,
    /// How often it took effect.
    pub(crate) fired: u64,
}

impl Rule {
    /// Operations of these verbs (none: all that have numbers) on paths that match the glob (`*` stays within a directory, `**` does not; renames and links match by either
    /// name). As long as nothing else is said: each of them, and it fails with EIO.
    pub fn on(verbs: &[Verb], path: &str) -> Self {
        Self {
            verbs: verbs.to_vec(),
            path: glob(path),
            first: 1,
            times: u64::MAX,
            action: Action::Fail(Errno::IO),
            omit: None,
            stale: BTreeMap::new(),
            seen: 0,
            fired: 0,
        }
    }

    /// From the nth matching one on; the first is 1.
    pub fn from(mut self, nth: u64) -> Self {
        self.first = nth;
        self
    }

    /// So often, then no more.
    pub fn times(mut self, times: u64) -> Self {
        self.times = times;
        self
    }

    /// The nth matching one alone.
    pub fn nth(self, nth: u64) -> Self {
        self.from(nth).times(1)
    }

    pub fn fails(self, error: Errno) -> Self {
        self.does(Action::Fail(error))
    }

    pub fn does(mut self, action: Action) -> Self {
        if let Action::Omit(names) = &action {
            self.omit = Some(glob(names));
        }
        self.action = action;
        self
    }

    /// Whether it applies to this operation; counts those that match.
    pub(crate) fn applies(&mut self, verb: Verb, path: &Path, other: Option<&Path>) -> bool {
        let verbs = if self.verbs.is_empty() { verb.numbered() } else { self.verbs.contains(&verb) };
        if !verbs || !(self.path.is_match(path) || other.is_some_and(|p| self.path.is_match(p))) {
            return false;
        }
        self.seen += 1;
        let applies = self.seen >= self.first && self.seen - self.first < self.times;
        self.fired += u64::from(applies);
        applies
    }
}

fn glob(text: &str) -> GlobMatcher {
    match GlobBuilder::new(text).literal_separator(true).build() {
        Ok(glob) => glob.compile_matcher(),
        Err(e) => panic!("{text} is no glob: {e}"),
    }
}
