//! A pass-through file system over a directory (FUSE), for tests that attack what keepd keeps there: the real binaries run on it unmodified.
//!
//! - It gives every operation that changes something, and every listing, a number in one order ([`Operation`]: verb and path).
//! - It ends a process at an operation, before or after it took effect ([`Control::kill_at`]), and refuses everything from then on.
//! - It fails, shortens or delays operations and leaves entries out of listings, by rules ([`Rule`]: verbs, a glob of paths, which of the matching ones).
//! - It keeps a log with all data and of what was made durable when ([`Control::record`]), from which the directory is built as it can be after the power
//!   went out after any operation ([`Record::after_power_loss`]).
//!
//! ```no_run
//! use keepd_faultfs::{Action, Mounted, Rule, Verb, errno};
//! # fn main() -> std::io::Result<()> {
//! if let Some(why) = keepd_faultfs::unavailable() {
//!     eprintln!("skipped: {why}");
//!     return Ok(());
//! }
//! let mounted = Mounted::new("/tmp/backing".as_ref(), "/tmp/at".as_ref())?;
//! // The third fsync beneath repository/ says that the disk is broken, and each one after it.
//! mounted.control().add(Rule::on(&[Verb::Fsync], "repository/**").from(3).fails(errno::EIO));
//! // Listings of packs leave out every pack whose name begins with "a", twice.
//! mounted.control().add(Rule::on(&[Verb::List], "repository/packs").times(2).does(Action::Omit("a*".into())));
//! // … start keepd on /tmp/at …
//! assert!(mounted.control().fired() > 0);
//! mounted.unmount()?;
//! # Ok(()) }
//! ```
//!
//! It needs /dev/fuse and root. Paths in rules and operations are relative to the mount and have no leading slash; the root itself is "".
//! What SQLite keeps in `-shm` files is passed through without a number: it is rebuilt by whoever opens the database first, and the kernel writes it back when it likes.
//! Locks are the kernel's own. Unnamed files (`O_TMPFILE`) are refused as on file systems that have none.
//!
//! The ideas are those of ALICE (Pillai et al., OSDI '14), which showed what applications wrongly expect of file systems, and of CrashMonkey (Mohan et al., OSDI '18),
//! which records once and builds each state of a crash from the record.

mod control;
mod layer;
mod power;
mod rule;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

pub use control::{Control, Operation, When};
pub use power::{Loss, Record};
pub use rule::{Action, Rule, Verb};

/// The errors that rules give, by their names.
pub mod errno {
    pub use rustix::io::Errno;
    pub const EIO: Errno = Errno::IO;
    pub const ENOSPC: Errno = Errno::NOSPC;
    pub const EROFS: Errno = Errno::ROFS;
    pub const EACCES: Errno = Errno::ACCESS;
    pub const EDQUOT: Errno = Errno::DQUOT;
    pub const ENOENT: Errno = Errno::NOENT;
    pub const EMFILE: Errno = Errno::MFILE;
    pub const ESTALE: Errno = Errno::STALE;
}

/// How long an unmounted one is waited for that somebody still has something open in.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why such a file system cannot be mounted here; None where it can. It is tried: a container may have the device and root, and not the right.
pub fn unavailable() -> Option<String> {
    let mounted = || {
        let dir = tempfile::tempdir()?;
        let (behind, at) = (dir.path().join("behind"), dir.path().join("at"));
        std::fs::create_dir(&behind)?;
        std::fs::create_dir(&at)?;
        Mounted::new(&behind, &at)?.unmount()
    };
    mounted().err().map(|e| format!("no file system can be mounted over /dev/fuse here: {e}"))
}

/// Gives the calling thread, and every process and thread that it starts, a view of the file systems of its own, in which `with` lies at `at`: several of them can work at one path,
/// each with files of its own. What such a thread mounts, nobody else sees. For the rest of the thread's life.
pub fn in_a_place_of_its_own(with: &Path, at: &Path) -> io::Result<()> {
    use nix::mount::MsFlags;
    // The safe name for it: what it warns of is to unshare descriptors, and none are.
    #[allow(deprecated)]
    rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNS)?;
    let none: Option<&Path> = None;
    nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    Ok(nix::mount::mount(Some(with), at, none, MsFlags::MS_BIND, none)?)
}

/// A mounted one. Dropped, it is unmounted.
pub struct Mounted {
    at: PathBuf,
    control: Arc<Control>,
    session: Option<fuser::BackgroundSession>,
}

impl Mounted {
    /// Mounts what is in `backing` at `at`; both are directories that exist.
    pub fn new(backing: &Path, at: &Path) -> io::Result<Self> {
        let control = Arc::new(Control::new(backing));
        let layer = layer::Layer::new(backing, control.clone())?;
        let mut config = fuser::Config::default();
        config.mount_options = vec![
            fuser::MountOption::FSName("keepd-faultfs".into()),
            fuser::MountOption::DefaultPermissions,
            fuser::MountOption::NoAtime,
            fuser::MountOption::Suid,
        ];
        config.acl = fuser::SessionACL::All;
        config.n_threads = Some(4);
        let session = fuser::spawn_mount(layer, at, &config)?;
        Ok(Self { at: at.to_owned(), control, session: Some(session) })
    }

    pub fn at(&self) -> &Path {
        &self.at
    }

    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// Unmounts, also where something is still open there: that then gets errors.
    pub fn unmount(mut self) -> io::Result<()> {
        self.end()
    }

    fn end(&mut self) -> io::Result<()> {
        let Some(session) = self.session.take() else { return Ok(()) };
        nix::mount::umount2(&self.at, nix::mount::MntFlags::MNT_DETACH)?;
        // It ends when nothing is open there any more; a thread that waits for ever is better than a test that does.
        let (ended, told) = mpsc::channel();
        std::thread::spawn(move || ended.send(session.join()));
        match told.recv_timeout(PATIENCE) {
            // One of its threads was just about to ask for the next request.
            Ok(Err(e)) if e.kind() == io::ErrorKind::ConnectionAborted => Ok(()),
            Ok(ended) => ended,
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "somebody still has something open there")),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.control.refuse();
        if let Err(e) = self.end() {
            eprintln!("{}: not unmounted: {e}", self.at.display());
        }
    }
}
