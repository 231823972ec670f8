//! A hostile local user: one who owns the directories that are backed up and restored, one who floods the socket, one who passes descriptors that are
//! none of what is wanted.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::*;
use rustix::fs::{CWD, Mode, OFlags, RenameFlags, Uid};
use serde_json::{Value, json};

/// Of a file that only root may read.
const SECRET: &[u8] = b"the contents of what nobody else may read";
const MALLORY: u32 = 65534;

/// Exchanges pairs of names, again and again, until it is dropped.
struct Swapping {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Swapping {
    fn of(pairs: Vec<(PathBuf, PathBuf)>, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut swapped = 0;
            while !stopped.load(Ordering::Relaxed) {
                for (a, b) in &pairs {
                    swapped += u64::from(rustix::fs::renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).is_ok());
                    if !pause.is_zero() {
                        std::thread::sleep(pause);
                    }
                }
            }
            swapped
        });
        Self { stop, thread: Some(thread) }
    }

    /// How often it was done.
    fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Swapping {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// What is in a directory: names, kinds, modes, owners, times, contents.
fn picture(dir: &Path) -> Vec<String> {
    let mut seen = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(path) = open.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let contents = if meta.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
        let (mode, uid, gid, links, time) = (meta.mode(), meta.uid(), meta.gid(), meta.nlink(), (meta.mtime(), meta.mtime_nsec()));
        seen.push(format!("{} {mode:o} {uid}:{gid} {links} {time:?} {contents:?}", path.display()));
        if meta.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
    }
    seen.sort();
    seen
}

/// A directory of somebody else, with a secret in it.
fn victim(keepd: &Keepd) -> PathBuf {
    let victim = keepd.path("victim");
    fs::create_dir_all(victim.join("below")).unwrap();
    for name in ["f00", "one", "below/f00"] {
        fs::write(victim.join(name), SECRET).unwrap();
    }
    victim
}

/// Directories and files, each beside a symlink to the victim's that it can be exchanged with.
fn with_traps(dir: &Path, victim: &Path) -> Vec<(PathBuf, PathBuf)> {
    let mut pairs = Vec::new();
    for n in 0..12 {
        let (real, trap) = (dir.join(format!("sub{n}")), dir.join(format!("trap{n}")));
        fs::create_dir_all(real.join("below")).unwrap();
        for m in 0..6 {
            fs::write(real.join(format!("f{m:02}")), noise(2000, n * 100 + m)).unwrap();
        }
        fs::write(real.join("below/f00"), noise(3000, n)).unwrap();
        symlink(victim, &trap).unwrap();
        pairs.push((real, trap));
        let (real, trap) = (dir.join(format!("one{n}")), dir.join(format!("lure{n}")));
        fs::write(&real, noise(4000, n + 7)).unwrap();
        symlink(victim.join("one"), &trap).unwrap();
        pairs.push((real, trap));
    }
    pairs
}

fn holds_secret(dir: &Path) -> Option<PathBuf> {
    let holds = |path: &PathBuf| {
        let is_file = fs::symlink_metadata(path).unwrap().is_file();
        is_file && fs::read(path).unwrap().windows(SECRET.len()).any(|w| w == SECRET)
    };
    files_below(dir).into_iter().find(holds)
}

#[test]
fn who_owns_a_directory_cannot_have_others_files_backed_up() {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 50);
    let victim = victim(&keepd);
    let pairs = with_traps(&keepd.path("files"), &victim);
    keepd.configure("", "suspect = { smaller = 0, fewer_files = 0 }");
    keepd.start();
    let swapping = Swapping::of(pairs, Duration::ZERO);
    for _ in 0..12 {
        // What changes meanwhile may be left out, and told.
        let out = keepd.ctl(&["backup", "shop"]);
        assert!(matches!(out.status.code(), Some(0 | 3)), "{}", text(&out));
    }
    assert!(swapping.end() > 1000);
    for backup in keepd.backups() {
        let restored = keepd.restored(&backup);
        assert_eq!(holds_secret(&restored), None);
        fs::remove_dir_all(restored).unwrap();
    }
}

#[test]
fn who_owns_a_directory_cannot_lead_a_restore_in_place_elsewhere() {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 50);
    let victim = victim(&keepd);
    let files = keepd.path("files");
    let pairs = with_traps(&files, &victim);
    keepd.configure("", "suspect = { smaller = 0, fewer_files = 0 }");
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let good = keepd.backups().remove(0);
    let before = picture(&victim);
    let (mut done, mut failed, mut stuck) = (0, 0, 0);
    for n in 0..24 {
        // Something to be put back in each directory, and something to be removed.
        for (real, _) in pairs.iter().step_by(2).filter(|(real, _)| real.is_dir() && !real.is_symlink()) {
            fs::write(real.join("f00"), noise(500, n)).unwrap();
            fs::write(real.join(format!("more{n}")), b"x").unwrap();
            let _ = fs::remove_file(real.join("f01"));
        }
        // From all of them as fast as it goes to a single one now and then.
        let (some, pause) = match n % 4 {
            0 => (pairs.clone(), Duration::ZERO),
            1 => (pairs.iter().take(2).cloned().collect(), Duration::from_micros(200)),
            2 => (pairs.iter().skip(4).take(1).cloned().collect(), Duration::from_millis(3)),
            _ => (pairs.iter().skip(8).take(2).cloned().collect(), Duration::from_millis(20)),
        };
        let swapping = Swapping::of(some, pause);
        let out = keepd.ctl(&["restore", &good, "--in-place", "--source", "files", "--no-safety-backup", "--yes"]);
        assert!(swapping.end() > 0);
        assert_eq!(picture(&victim), before, "{}", text(&out));
        // Which of each pair has which name is to be what it was.
        for (real, trap) in &pairs {
            if real.is_symlink() {
                rustix::fs::renameat_with(CWD, real, CWD, trap, RenameFlags::EXCHANGE).unwrap();
            }
        }
        match out.status.code() {
            Some(0 | 3) => done += 1,
            Some(1) if text(&out).contains("COULD NOT BE PUT BACK") => {
                // All that is done beneath the directory is noted; quiet again, it is put back.
                stuck += 1;
                keepd.stop();
                keepd.start();
            }
            Some(1) => failed += 1,
            _ => panic!("{}", text(&out)),
        }
    }
    println!("{done} restores were made, {failed} refused to go on, {stuck} were settled at the next start");
    assert!(failed + stuck > 0);
    // What they left behind keeps nobody from a restore once it is quiet.
    keepd.ok(&["restore", &good, "--in-place", "--source", "files", "--no-safety-backup", "--yes"]);
    assert_same(&files, &keepd.restored(&good).join("files"));
    assert_eq!(picture(&victim), before);
}

#[test]
fn who_owns_a_directory_cannot_lead_a_restore_into_it_elsewhere() {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 50);
    let victim = victim(&keepd);
    with_traps(&keepd.path("files"), &victim);
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let before = picture(&victim);
    for n in 0..8 {
        let to = keepd.path(&format!("out{n}"));
        let at = to.join("files");
        let pairs: Vec<(PathBuf, PathBuf)> = (0..12).map(|n| (at.join(format!("sub{n}")), at.join(format!("trap{n}")))).collect();
        let swapping = Swapping::of(pairs, Duration::ZERO);
        let out = keepd.ctl(&["restore", "latest", "--to", to.to_str().unwrap(), "--overwrite"]);
        swapping.end();
        assert!(out.status.code().is_some(), "{}", text(&out));
        assert_eq!(picture(&victim), before, "{}", text(&out));
    }
}

fn is_root() -> bool {
    let is = rustix::process::geteuid().is_root();
    if !is {
        println!("SKIPPED: root is needed to be somebody else");
    }
    is
}

/// Puts a link of this user's in the place of what is there.
fn link(path: &Path, to: &Path, owner: u32) {
    let _ = fs::remove_file(path);
    symlink(to, path).unwrap();
    std::os::unix::fs::lchown(path, Some(owner), Some(owner)).unwrap();
}

#[test]
fn who_owns_the_directory_above_a_source_cannot_lead_it_elsewhere() {
    if !is_root() {
        return;
    }
    let mut keepd = Keepd::prepared();
    let (d, victim) = (keepd.dir.path().display().to_string(), victim(&keepd));
    make_database(&victim.join("other.db"), 30);
    let (home, files) = (keepd.path("home"), keepd.path("home/files"));
    fs::create_dir_all(&files).unwrap();
    fs::write(files.join("note"), "a note").unwrap();
    make_database(&keepd.path("home/shop.db"), 20);
    std::os::unix::fs::chown(&home, Some(MALLORY), Some(MALLORY)).unwrap();
    let toml = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let toml =
        toml.replace(&format!("{d}/shop.db"), &format!("{d}/home/shop.db")).replace(&format!("{d}/files"), &format!("{d}/home/files"));
    fs::write(keepd.path("keepd.toml"), toml).unwrap();
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let good = keepd.backups().remove(0);
    let in_place = |source: &str| keepd.ctl(&["restore", &good, "--in-place", "--source", source, "--no-safety-backup", "--yes"]);

    // Each source, led to what is another's; a link of root's is what the machine's owner wants.
    let before = picture(&victim);
    fs::rename(&files, keepd.path("home/kept")).unwrap();
    fs::rename(keepd.path("home/shop.db"), keepd.path("home/kept.db")).unwrap();
    for (source, path, to) in [("files", &files, victim.clone()), ("db", &keepd.path("home/shop.db"), victim.join("other.db"))] {
        let other = if source == "files" { keepd.path("home/shop.db") } else { files.clone() };
        link(&other, &keepd.path(if source == "files" { "home/kept.db" } else { "home/kept" }), 0);
        link(path, &to, MALLORY);
        let said = keepd.fails(1, &["backup", "shop"]);
        assert!(said.contains("a link made by") && said.contains(&path.display().to_string()), "{said}");
        let out = in_place(source);
        assert!(out.status.code() == Some(1) && text(&out).contains("a link made by"), "{}", text(&out));
        assert_eq!(picture(&victim), before);
        fs::remove_file(path).unwrap();
    }
    link(&files, &keepd.path("home/kept"), 0);
    link(&keepd.path("home/shop.db"), &keepd.path("home/kept.db"), 0);
    keepd.ok(&["backup", "shop"]);
    keepd.ok(&["restore", &good, "--in-place", "--no-safety-backup", "--yes"]);

    // Not even root's lead into what keepd knows of itself.
    for (path, to) in [
        (&files, keepd.path("state")),
        (&files, keepd.path("state/work")),
        (&keepd.path("home/shop.db"), keepd.path("state/ledger.sqlite")),
    ] {
        let was = fs::read_link(path).unwrap();
        link(path, &to, 0);
        let said = keepd.fails(1, &["backup", "shop"]);
        assert!(said.contains("keepd's own state directory"), "{said}");
        let out = in_place(if path == &files { "files" } else { "db" });
        assert!(out.status.code() == Some(1) && text(&out).contains("keepd's own state directory"), "{}", text(&out));
        link(path, &was, 0);
    }
    keepd.ok(&["audit", "verify"]);
}

#[test]
fn the_state_directory_is_in_no_backup_by_whatever_name() {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 10);
    let d = keepd.dir.path().display().to_string();
    fs::create_dir(keepd.path("above")).unwrap();
    fs::write(keepd.path("above/note"), "a note").unwrap();
    symlink("above", keepd.path("way")).unwrap();
    let toml = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let toml = toml.replace(&format!("{d}/state"), &format!("{d}/above/state")).replace(&format!("{d}/files"), &format!("{d}/way"));
    fs::write(keepd.path("keepd.toml"), toml).unwrap();
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let listed = keepd.ok(&["ls", "latest", "files", "-R", "--job", "shop"]);
    assert!(listed.contains("note") && !listed.contains("state") && !listed.contains("ledger"), "{listed}");
    fs::write(keepd.path("above/note"), "changed").unwrap();
    keepd.ok(&["restore", "latest", "--job", "shop", "--in-place", "--source", "files", "--yes"]);
    assert_eq!(fs::read_to_string(keepd.path("above/note")).unwrap(), "a note");
    keepd.ok(&["audit", "verify"]);
}

/// keepctl as somebody who may edit jobs and restore in place, and is no administrator.
fn as_mallory(keepd: &Keepd, arguments: &[&str]) -> std::process::Output {
    use std::os::unix::process::CommandExt;
    fs::set_permissions(keepd.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(keepd.path("keepd.sock"), fs::Permissions::from_mode(0o666)).unwrap();
    let program = keepd.path("keepctl");
    if !program.exists() {
        copy_program(&keepctl_binary(), &program);
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = std::process::Command::new(program);
    command.arg("--socket").arg(keepd.path("keepd.sock")).args(arguments).uid(MALLORY).gid(MALLORY).current_dir("/");
    command.stdin(std::process::Stdio::null()).output().unwrap()
}

#[test]
fn whoever_edits_jobs_and_restores_in_place_does_not_become_an_administrator() {
    if !is_root() {
        return;
    }
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 10);
    let (conf, d) = (keepd.path("conf.d"), keepd.dir.path().display().to_string());
    fs::create_dir(&conf).unwrap();
    let rights = "\"view\", \"browse\", \"backup\", \"restore_in_place\", \"job_edit\"";
    let access = format!("[access.role.ops]\nmembers = [{MALLORY}]\nrights = [{rights}]\n");
    fs::write(conf.join("access.toml"), &access).unwrap();
    fs::write(keepd.path("files/access.toml"), format!("[access]\nadmin = [{MALLORY}]\n")).unwrap();
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let good = keepd.backups().remove(0);
    let in_place = ["restore", &good, "--in-place", "--source", "files", "--yes"];
    // In its own place it may.
    fs::write(keepd.path("files/more"), "x").unwrap();
    let out = as_mallory(&keepd, &in_place);
    assert!(out.status.success() && !keepd.path("files/more").exists(), "{}", text(&out));

    // Where the job has it since: the configuration, or any other place.
    let toml = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::create_dir(keepd.path("other")).unwrap();
    for (place, why) in [("conf.d", "keepd's own"), ("other", "is restored to")] {
        fs::write(keepd.path("keepd.toml"), toml.replace(&format!("{d}/files"), &format!("{d}/{place}"))).unwrap();
        keepd.ok(&["reload"]);
        let before = picture(&keepd.path(place));
        for dry in [&["--dry-run"][..], &[]] {
            let out = as_mallory(&keepd, &[&in_place[..], dry].concat());
            let said = text(&out);
            assert!(out.status.code() == Some(1) && said.contains("takes the role admin") && said.contains(why), "{place}: {said}");
        }
        assert_eq!(picture(&keepd.path(place)), before, "{place}");
    }
    keepd.ok(&in_place);
    assert!(keepd.path("other/access.toml").exists());

    // Nor what was captured there itself.
    fs::write(keepd.path("keepd.toml"), toml.replace(&format!("{d}/files"), &format!("{d}/conf.d"))).unwrap();
    keepd.ok(&["reload"]);
    keepd.ok(&["backup", "shop"]);
    fs::write(conf.join("access.toml"), format!("{access}\n# changed\n")).unwrap();
    keepd.ok(&["reload"]);
    let newest = keepd.backups().into_iter().find(|id| *id != good).unwrap();
    let again = ["restore", "latest", "--job", "shop", "--in-place", "--source", "files", "--no-safety-backup", "--yes"];
    let out = as_mallory(&keepd, &again);
    assert!(out.status.code() == Some(1) && text(&out).contains("keepd's own"), "{newest}: {}", text(&out));
    assert!(fs::read_to_string(conf.join("access.toml")).unwrap().contains("# changed"));
    keepd.ok(&again);
    assert!(!fs::read_to_string(conf.join("access.toml")).unwrap().contains("# changed"));
}

fn connect(keepd: &Keepd) -> UnixStream {
    let stream = UnixStream::connect(keepd.path("keepd.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream
}

/// Sends a call with descriptors and reads the reply; None where the connection was cut.
fn call_with(stream: &mut UnixStream, method: &str, parameters: &Value, descriptors: &[OwnedFd]) -> Option<Value> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut bytes = serde_json::to_vec(&json!({ "method": format!("io.keepd.Control.{method}"), "parameters": parameters })).unwrap();
    bytes.push(0);
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)));
    }
    assert_eq!(sendmsg(&*stream, &[std::io::IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL).unwrap(), bytes.len());
    let (mut reply, mut one) = (Vec::new(), [0u8; 1]);
    loop {
        match stream.read(&mut one) {
            Ok(1) if one[0] == 0 => return Some(serde_json::from_slice(&reply).unwrap()),
            Ok(1) => reply.push(one[0]),
            Ok(_) => return None,
            Err(e) => panic!("no answer to {method}: {e}"),
        }
    }
}

/// Descriptors of every kind, by what they are called.
fn descriptors(dir: &Path) -> Vec<(&'static str, OwnedFd)> {
    let open = |path: &Path, flags| rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).unwrap();
    let fifo = dir.join("fifo");
    if !fifo.exists() {
        rustix::fs::mknodat(CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    }
    let regular = dir.join("regular");
    fs::write(&regular, noise(5000, 3)).unwrap();
    let _ = fs::remove_file(dir.join("listening"));
    let mut sealed = fs::File::from(rustix::fs::memfd_create("sealed", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap());
    sealed.write_all(b"x").unwrap();
    rustix::fs::fcntl_add_seals(&sealed, rustix::fs::SealFlags::WRITE | rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::SEAL)
        .unwrap();
    let huge = dir.join("huge");
    fs::File::create(&huge).unwrap().set_len(1 << 42).unwrap();
    let (silent_reader, _) = rustix::pipe::pipe().unwrap();
    vec![
        ("a directory", open(dir, OFlags::RDONLY | OFlags::DIRECTORY)),
        ("a path", open(&regular, OFlags::PATH)),
        ("/dev/null", open(Path::new("/dev/null"), OFlags::RDWR)),
        ("/dev/zero", open(Path::new("/dev/zero"), OFlags::RDWR)),
        ("a file to read", open(&regular, OFlags::RDONLY)),
        ("a file to write", open(&regular, OFlags::WRONLY)),
        ("a fifo of both ends", open(&fifo, OFlags::RDWR)),
        ("a pipe that has ended", silent_reader),
        ("a listening socket", OwnedFd::from(UnixListener::bind(dir.join("listening")).unwrap())),
        ("an unconnected socket", rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap()),
        ("a datagram socket", rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::DGRAM, None).unwrap()),
        ("an event counter", rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap()),
        ("an epoll", rustix::event::epoll::create(rustix::event::epoll::CreateFlags::empty()).unwrap()),
        ("a sealed memory file", sealed.into()),
        ("four terabytes of nothing", open(&huge, OFlags::RDONLY)),
        ("a file of the kernel", open(Path::new("/proc/self/mem"), OFlags::RDONLY)),
    ]
}

#[test]
fn descriptors_of_every_wrong_kind_are_refused_or_harmless() {
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    let open_files = || fs::read_dir(format!("/proc/{}/fd", keepd.pid())).unwrap().count();
    let before = open_files();
    let import = || {
        let made = call_with(&mut connect(&keepd), "InitiateImport", &json!({ "destination": "local" }), &[]).unwrap();
        made["parameters"]["import"].as_str().unwrap().to_owned()
    };
    let imports = (import(), import());
    let calls: Vec<(&str, Value, usize)> = vec![
        ("StartRestore", json!({ "backup": "latest" }), 1),
        ("StartCat", json!({ "backup": "latest", "path": { "path": "files/deep/note.txt" } }), 1),
        ("StartExport", json!({ "backup": "latest" }), 1),
        ("StartExport", json!({ "backup": "latest", "fresh_key": true }), 2),
        ("StartCompare", json!({ "backup": "latest" }), 1),
        ("StartRestore", json!({ "backup": "latest", "private_keys": [1] }), 2),
        ("StartRestore", json!({ "backup": "latest", "memory": 1, "returned": 2 }), 3),
        ("StartRestore", json!({ "backup": "latest", "memory": 0, "returned": 0 }), 1),
        ("StartRestore", json!({ "backup": "latest", "memory": 4_000_000_000_u32, "returned": 1 }), 3),
        ("StartRestore", json!({ "backup": "latest", "memory": 1 }), 2),
        ("StartPrune", json!({ "destination": "local", "private_keys": [0] }), 1),
        ("StartDrill", json!({ "backup": "latest", "private_keys": [0] }), 1),
        ("StartKeyAdd", json!({ "destination": "local" }), 1),
        ("StartKeyRotate", json!({ "profile": "main", "file": "/nowhere/key", "step": "add" }), 1),
        ("MakeKit", json!({ "profile": "main" }), 1),
        ("MakeKit", json!({ "profile": "main", "private_key": true }), 2),
        ("ExportConfig", json!({ "profile": "main" }), 1),
        ("ImportConfig", json!({ "dry_run": true }), 1),
        ("ImportConfig", json!({ "dry_run": true }), 2),
        ("UploadImport", json!({ "import": imports.0, "part": "key" }), 1),
        ("UploadImport", json!({ "import": imports.1, "part": "archive" }), 1),
        // These take none.
        ("StartBackup", json!({ "job": "none" }), 3),
        ("GetStatus", json!({}), 8),
    ];
    let scratch = tempfile::tempdir().unwrap();
    let kinds: Vec<&str> = descriptors(scratch.path()).into_iter().map(|(kind, _)| kind).collect();
    for (method, parameters, count) in &calls {
        for kind in &kinds {
            // Written to or read, each is a new one.
            let mut passed = Vec::new();
            for _ in 0..*count {
                passed.extend(descriptors(scratch.path()).into_iter().find(|(k, _)| k == kind).map(|(_, fd)| fd));
            }
            let begin = Instant::now();
            let reply = call_with(&mut connect(&keepd), method, parameters, &passed);
            drop(passed);
            let took = begin.elapsed();
            assert!(took < Duration::from_secs(25), "{method} with {kind} took {took:?}");
            let Some(reply) = reply else { panic!("{method} with {kind}: the connection was cut") };
            assert!(reply.get("error").is_none() || reply["error"].as_str().unwrap().contains('.'), "{method} with {kind}: {reply}");
            if let Some(run) = reply["parameters"]["run"].as_str() {
                // What could not be refused ends by itself.
                let _ = keepd.ctl(&["run", "cancel", run]);
                let out = keepd.ctl(&["run", "follow", run]);
                assert!(out.status.code().is_some_and(|code| code != 4), "{method} with {kind}: {}", text(&out));
            }
        }
    }
    let begin = Instant::now();
    while open_files() > before + 4 {
        assert!(begin.elapsed() < Duration::from_secs(30), "{before} descriptors before, {} now", open_files());
        std::thread::sleep(Duration::from_millis(50));
    }
    for import in [imports.0, imports.1] {
        let _ = keepd.ctl(&["import", "--cancel", &import]);
    }
    keepd.ok(&["check", "local", "--read-data"]);
    keepd.ok(&["backup", "shop"]);
}

#[test]
fn ten_thousand_connections_of_one_user_keep_nobody_else_out() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: root is needed to be somebody else");
        return;
    }
    let keepd = Keepd::started();
    fs::set_permissions(keepd.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(keepd.path("keepd.sock"), fs::Permissions::from_mode(0o666)).unwrap();
    let socket = keepd.path("keepd.sock");
    let limit =
        rustix::process::Rlimit { current: Some(12_000), maximum: rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    let descriptors_of = |pid: u32| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let before = descriptors_of(keepd.pid());
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    // Only this thread is somebody else.
    let flood = std::thread::spawn(move || {
        let nobody = Uid::from_raw(MALLORY);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        let (mut held, mut made, mut said) = (Vec::new(), 0u32, 0u32);
        while !stopped.load(Ordering::Relaxed) && made < 10_000 {
            let Ok(mut stream) = UnixStream::connect(&socket) else { continue };
            made += 1;
            // Some say nothing, some half of something, some ask for what they may not.
            said += match made % 3 {
                0 => u32::from(stream.write_all(b"{\"method\":\"io.keepd").is_ok()),
                1 => u32::from(stream.write_all(b"{\"method\":\"io.keepd.Control.GetStatus\"}\0").is_ok()),
                _ => 0,
            };
            held.push(stream);
        }
        (made, said, held)
    });
    let mut slowest = Duration::ZERO;
    let mut most = 0;
    while !flood.is_finished() {
        let begin = Instant::now();
        keepd.ok(&["job", "list"]);
        slowest = slowest.max(begin.elapsed());
        most = most.max(descriptors_of(keepd.pid()));
    }
    stop.store(true, Ordering::Relaxed);
    let (made, said, held) = flood.join().unwrap();
    println!("{made} connections, {said} of them spoke; root waited at most {slowest:?}; keepd held {most} descriptors");
    assert_eq!(made, 10_000);
    assert!(most < before + 100, "{before} descriptors before, {most} at most");
    assert!(slowest < Duration::from_secs(20), "{slowest:?}");
    drop(held);
    keepd.ok(&["backup", "shop"]);
}
