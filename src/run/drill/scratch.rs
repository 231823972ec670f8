//! Where a drill works: a directory of its own, removed at its end, and by a later one or the next start where it could not be.
//!
//! A server's user must be able to come to the server's files, which it cannot in a state directory that is closed to it: those lie in /var/tmp
//! then. What is made is written down in `drills/` of the state directory first, so that nothing that somebody else made is ever removed.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::Drill;

/// Where what the state directory cannot take lies.
const ELSEWHERE: &str = "/var/tmp";
/// The path of a server's socket has no more bytes.
const SOCKET_BYTES: usize = 107;
/// Of a socket's own name, and of the directories between it and the scratch place.
const SOCKET_NAME: usize = "/s00/.s.PGSQL.5432".len();

/// Somebody else who works in the scratch place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Person {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
}

impl Person {
    /// A user of this machine by name; None for the user keepd runs as. The error says that there is none.
    pub fn named(name: &str) -> Result<Option<Self>, String> {
        let user = uzers::get_user_by_name(name).ok_or_else(|| format!("there is no user '{name}' on this machine"))?;
        let person = Self { name: name.to_owned(), uid: user.uid(), gid: user.primary_group_id() };
        Ok((person.uid != rustix::process::geteuid().as_raw()).then_some(person))
    }

    /// The first directory on the way to a path that is closed to this user.
    fn stopped_at(&self, path: &Path) -> Option<PathBuf> {
        let mut ways: Vec<&Path> = path.ancestors().collect();
        ways.reverse();
        let closed = |dir: &&Path| {
            let Ok(stat) = fs::metadata(dir) else { return true };
            let bit = match () {
                () if stat.uid() == self.uid => 0o100,
                () if stat.gid() == self.gid => 0o010,
                () => 0o001,
            };
            stat.mode() & bit == 0
        };
        ways.into_iter().find(closed).map(Path::to_owned)
    }
}

/// The directories of one drill; removed when it is dropped.
pub struct Scratch {
    notes: PathBuf,
    run: String,
    roots: Vec<PathBuf>,
    /// The backup as it is restored.
    pub tree: PathBuf,
    servers: PathBuf,
    made: usize,
}

impl Scratch {
    /// Makes the directories. `servers`: whose servers will run; `reader`: as whom commands look at what was restored.
    pub fn make(state_dir: &Path, settings: &Drill, run: &str, servers: &[Person], reader: Option<&Person>) -> Result<Self, String> {
        let for_tree = base(state_dir, settings, run, &reader.cloned().into_iter().collect::<Vec<_>>(), false)?;
        let for_servers = base(state_dir, settings, run, servers, true)?;
        let root = |base: &Path, open: bool| match base == work(state_dir) {
            true => (base.join(format!("drill-{run}")), open),
            false => (base.join(format!("keepd-drill-{run}")), open),
        };
        let mut wanted = vec![root(&for_tree, reader.is_some())];
        match for_servers == for_tree {
            true => wanted.iter_mut().for_each(|(_, open)| *open |= !servers.is_empty()),
            false => wanted.push(root(&for_servers, true)),
        }
        let notes = notes(state_dir);
        let roots: Vec<PathBuf> = wanted.iter().map(|(path, _)| path.clone()).collect();
        let servers = roots.last().cloned().unwrap_or_default();
        let tree = roots.first().map(|r| r.join("tree")).unwrap_or_default();
        let scratch = Self { notes, run: run.to_owned(), roots, tree, servers, made: 0 };
        let failed = |path: &Path, e: &dyn std::fmt::Display| format!("cannot make the scratch place {}: {e}", path.display());
        scratch.write_down().map_err(|e| failed(&scratch.notes, &e))?;
        for (path, open) in &wanted {
            // Who has to come through may; nobody else can list it.
            let mode = if *open { 0o711 } else { 0o700 };
            fs::DirBuilder::new().mode(0o700).create(path).map_err(|e| failed(path, &e))?;
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|e| failed(path, &e))?;
        }
        fs::DirBuilder::new().mode(0o700).create(&scratch.tree).map_err(|e| failed(&scratch.tree, &e))?;
        if let Some(reader) = reader {
            chown(&scratch.tree, None, Some(reader.gid)).map_err(|e| {
                failed(&scratch.tree, &format!("it cannot be opened to {}: {e} (keepd needs CAP_CHOWN for that)", reader.name))
            })?;
            fs::set_permissions(&scratch.tree, fs::Permissions::from_mode(0o750)).map_err(|e| failed(&scratch.tree, &e))?;
        }
        Ok(scratch)
    }

    fn write_down(&self) -> io::Result<()> {
        crate::durable::make_directories(&self.notes)?;
        let text = serde_json::to_string(&self.roots).map_err(io::Error::other)?;
        // Before anything is made: what no note tells of is never removed.
        let path = self.notes.join(&self.run);
        fs::write(&path, text)?;
        fs::File::open(&path)?.sync_all()?;
        fs::File::open(&self.notes)?.sync_all()
    }

    /// A directory for a server, which belongs to its user.
    pub fn for_server(&mut self, user: Option<&Person>) -> Result<PathBuf, String> {
        let dir = self.servers.join(format!("s{}", self.made));
        self.made += 1;
        let made = fs::DirBuilder::new().mode(0o700).create(&dir);
        made.map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
        if let Some(user) = user {
            chown(&dir, Some(user.uid), Some(user.gid)).map_err(|e| {
                format!("cannot give {} to {}, as whom the server runs: {e} (keepd needs CAP_CHOWN for that)", dir.display(), user.name)
            })?;
        }
        Ok(dir)
    }

    /// Where the tree lies, and where servers' files do.
    pub fn places(&self) -> (&Path, &Path) {
        (&self.tree, &self.servers)
    }

    /// Removes all of it; the error says what stayed.
    pub fn remove(&mut self) -> Result<(), String> {
        let mut errors = Vec::new();
        for root in &self.roots {
            if let Err(e) = remove_tree(root) {
                errors.push(format!("the scratch place {} could not be removed: {e}", root.display()));
            }
        }
        if errors.is_empty() {
            self.roots.clear();
            let _ = fs::remove_file(self.notes.join(&self.run));
            return Ok(());
        }
        Err(format!("{}; the next drill tries again", errors.join("; ")))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.roots.is_empty()
            && let Err(text) = self.remove()
        {
            tracing::error!(run = %self.run, "{text}");
        }
    }
}

fn work(state_dir: &Path) -> PathBuf {
    state_dir.join("work")
}

fn notes(state_dir: &Path) -> PathBuf {
    state_dir.join("drills")
}

/// The first directory that everybody can come to who must.
fn base(state_dir: &Path, settings: &Drill, run: &str, people: &[Person], sockets: bool) -> Result<PathBuf, String> {
    let work = work(state_dir);
    let candidates = match &settings.dir {
        Some(dir) => vec![dir.clone()],
        None => {
            let made = fs::create_dir_all(&work);
            made.map_err(|e| format!("cannot make {}: {e}", work.display()))?;
            vec![work, PathBuf::from(ELSEWHERE)]
        }
    };
    let mut why = Vec::new();
    for dir in candidates {
        let long = dir.as_os_str().len() + "/keepd-drill-".len() + run.len() + SOCKET_NAME;
        let stopped = people.iter().find_map(|p| Some((p, p.stopped_at(&dir)?)));
        match stopped {
            Some((person, at)) => why.push(format!("user {} cannot enter {}", person.name, at.display())),
            None if sockets && !people.is_empty() && long > SOCKET_BYTES => {
                why.push(format!("{} is too long a path for a server's socket", dir.display()));
            }
            None => return Ok(dir),
        }
    }
    Err(format!(
        "there is no scratch place: {}; name a directory that can be used: drill = {{ dir = \"/srv/drills\" }}",
        why.join(", and ")
    ))
}

/// Removes what drills left that ended with their daemon; `live` is the run whose scratch place stays. What cannot be removed is told.
pub fn clear_dead(state_dir: &Path, live: Option<&str>) -> Vec<String> {
    let notes = notes(state_dir);
    let mut problems = Vec::new();
    for note in fs::read_dir(&notes).into_iter().flatten().flatten() {
        let Some(run) = note.file_name().to_str().map(str::to_owned).filter(|run| live != Some(run)) else { continue };
        let roots: Vec<PathBuf> = fs::read(note.path()).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        let ours = |path: &PathBuf| {
            let names = [format!("drill-{run}"), format!("keepd-drill-{run}")];
            let named = path.file_name().is_some_and(|name| names.iter().any(|n| name == n.as_str()));
            let stat = fs::symlink_metadata(path).ok();
            named && stat.is_some_and(|s| s.is_dir() && s.uid() == rustix::process::geteuid().as_raw())
        };
        let failed: Vec<String> = roots
            .iter()
            .filter(|path| ours(path))
            .filter_map(|path| Some(format!("{} of an earlier drill could not be removed: {}", path.display(), remove_tree(path).err()?)))
            .collect();
        if failed.is_empty() {
            let _ = fs::remove_file(note.path());
        }
        problems.extend(failed);
    }
    problems
}

/// Removes a directory with all that is in it, also what is closed to its owner, and while what dies there still writes.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match fs::remove_dir_all(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if tries >= 20 => return Err(e),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => open_up(path),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
            Ok(()) => return Ok(()),
        }
        tries += 1;
    }
}

/// Makes directories such that what is in them can be removed, as far as that is possible.
fn open_up(dir: &Path) {
    let Ok(stat) = fs::symlink_metadata(dir) else { return };
    if !stat.is_dir() {
        return;
    }
    let own = rustix::process::geteuid().as_raw();
    if stat.uid() != own {
        let _ = std::os::unix::fs::lchown(dir, Some(own), None);
    }
    let _ = fs::set_permissions(dir, fs::Permissions::from_mode(0o700));
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            open_up(&entry.path());
        }
    }
}

/// Bytes that the files beneath a directory take.
pub fn used(dir: &Path) -> u64 {
    let mut bytes = 0;
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(stat) = entry.metadata() else { continue };
        bytes += if stat.is_dir() { used(&entry.path()) } else { stat.blocks() * 512 };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_closed_to_others_and_gone_when_it_is_dropped() {
        let state = tempfile::tempdir().unwrap();
        let mut scratch = Scratch::make(state.path(), &Drill::default(), "20260101T000000-00aa", &[], None).unwrap();
        assert_eq!(fs::metadata(scratch.tree.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
        let server = scratch.for_server(None).unwrap();
        fs::write(server.join("file"), vec![1; 10_000]).unwrap();
        assert!(used(&server) >= 10_000);
        // As a backup may have it.
        fs::create_dir(scratch.tree.join("closed")).unwrap();
        fs::write(scratch.tree.join("closed/x"), "x").unwrap();
        fs::set_permissions(scratch.tree.join("closed"), fs::Permissions::from_mode(0o500)).unwrap();
        assert!(clear_dead(state.path(), Some("20260101T000000-00aa")).is_empty());
        assert!(server.exists(), "it lives");
        drop(scratch);
        assert!(!server.exists());
        assert_eq!(fs::read_dir(state.path().join("drills")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(state.path().join("work")).unwrap().count(), 0);
    }

    #[test]
    fn what_a_dead_drill_left_is_removed_and_nothing_else() {
        let state = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let settings = Drill { dir: Some(elsewhere.path().to_owned()), ..Drill::default() };
        let scratch = Scratch::make(state.path(), &settings, "r1", &[], None).unwrap();
        let root = scratch.tree.parent().unwrap().to_owned();
        std::mem::forget(scratch);
        let other = elsewhere.path().join("keepd-drill-r2");
        fs::create_dir(&other).unwrap();
        // Notes that lie, and one that is none.
        fs::write(state.path().join("drills/r3"), serde_json::to_string(&[&other, &PathBuf::from("/etc")]).unwrap()).unwrap();
        fs::write(state.path().join("drills/r4"), "what?").unwrap();
        assert_eq!(clear_dead(state.path(), None), [""; 0]);
        assert!(!root.exists() && other.exists());
        assert_eq!(fs::read_dir(state.path().join("drills")).unwrap().count(), 0);
    }

    #[test]
    fn who_cannot_come_there_is_named() {
        let state = tempfile::tempdir().unwrap();
        fs::set_permissions(state.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let person = Person { name: "somebody".into(), uid: 4_000_000, gid: 4_000_000 };
        let settings = Drill { dir: Some(state.path().to_owned()), ..Drill::default() };
        let error = base(state.path(), &settings, "r", std::slice::from_ref(&person), true).unwrap_err();
        assert!(error.contains("user somebody cannot enter") && error.contains("drill = { dir"), "{error}");
        assert_eq!(base(state.path(), &Drill::default(), "r", &[person], true).unwrap(), Path::new(ELSEWHERE));
    }
}
