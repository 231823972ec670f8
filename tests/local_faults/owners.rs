//! What belongs to somebody else, or is not permitted: a keepd that is not root, beside files of root.

use std::os::unix::fs::{PermissionsExt, chown};

use super::*;

/// Who nobody is.
const NOBODY: u32 = 65534;

/// A keepd that runs as [`NOBODY`] and has all it needs; None where this process is not root.
fn of_nobody() -> Option<Keepd> {
    if !rustix::process::geteuid().is_root() {
        skipped("another user's keepd is started by root alone");
        return None;
    }
    let mut keepd = filled(Keepd::prepared());
    // Where everybody may start it: the directory that it was built in need not be that.
    copy_program(&keepd_binary(), &keepd.path("keepd"));
    let program = format!("shift; exec {}/keepd \"$@\"", keepd.dir.path().display());
    let id = NOBODY.to_string();
    keepd.wrapper =
        ["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups", "--", "sh", "-c", &program, "sh"].map(str::to_owned).to_vec();
    give(keepd.dir.path(), NOBODY);
    Some(keepd)
}

/// All of it to somebody.
fn give(path: &Path, to: u32) {
    if path.is_dir() && !path.is_symlink() {
        fs::read_dir(path).unwrap().flatten().for_each(|entry| give(&entry.path(), to));
    }
    std::os::unix::fs::lchown(path, Some(to), Some(to)).unwrap();
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn what_belongs_to_somebody_else_is_named_and_over_when_it_does_not() {
    let Some(mut keepd) = of_nobody() else { return };
    let mut table = Table::default();
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let first = keepd.backups().remove(0);
    const CAUSE: [&str; 2] = ["permission denied", "not permitted"];

    // What a run needs.
    let index = || files_below(&keepd.path("repository/index")).remove(0);
    let needed = [
        ("the repository", keepd.path("repository")),
        ("its packs", keepd.path("repository/packs")),
        ("its lease", keepd.path("repository/writer.json")),
        ("its name", keepd.path("repository/keepd.json")),
        ("an index object", index()),
        ("the key file", keepd.path("main.key")),
    ];
    for (n, (what, path)) in needed.into_iter().enumerate() {
        change(&keepd, n as u64 + 1);
        give(&keepd.path("files"), NOBODY);
        give(&keepd.path("shop.db"), NOBODY);
        let was = fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
        chown(&path, Some(0), Some(0)).unwrap();
        mode(&path, if path.is_dir() { 0o700 } else { 0o600 });
        let fault = format!("{what} is root's");
        let good = attempt(&keepd, &mut table, &fault, &CAUSE);
        if good.is_none() {
            let said = keepd.log();
            let name = path.file_name().unwrap().to_str().unwrap();
            assert!(
                said.contains(name) || said.contains(keepd.path("repository").to_str().unwrap()),
                "{fault}: what it is, is not named: {said}"
            );
        }
        assert!(keepd.is_alive(), "{fault}");
        chown(&path, Some(NOBODY), Some(NOBODY)).unwrap();
        mode(&path, was);
        recovers(&keepd, &fault, &first, good);
    }

    // What a start needs.
    for what in ["state", "state/ledger.sqlite", "keepd.toml", "main.key"] {
        keepd.stop();
        let path = keepd.path(what);
        let was = fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
        chown(&path, Some(0), Some(0)).unwrap();
        mode(&path, if path.is_dir() { 0o700 } else { 0o600 });
        let fault = format!("{what} is root's at start");
        match keepd.try_start(PATIENCE) {
            Err(said) => {
                table.refused += 1;
                let lower = said.to_lowercase();
                let is_named = CAUSE.iter().any(|cause| lower.contains(cause)) || said.contains("belongs to uid 0");
                assert!(is_named && said.contains(what.rsplit('/').next().unwrap()), "{fault}: {said}");
                table.add(&fault, format!("refused: {}", last_line(&said)));
            }
            Ok(()) => {
                change(&keepd, 77);
                give(&keepd.path("files"), NOBODY);
                give(&keepd.path("shop.db"), NOBODY);
                assert_eq!(attempt(&keepd, &mut table, &fault, &CAUSE), None, "{fault}: it cannot have read that");
            }
        }
        chown(&path, Some(NOBODY), Some(NOBODY)).unwrap();
        mode(&path, was);
        if !keepd.is_alive() {
            keepd.start();
        }
        recovers(&keepd, &fault, &first, None);
    }

    // A state directory that is open to everybody is closed, and told.
    keepd.stop();
    mode(&keepd.path("state"), 0o777);
    keepd.start();
    assert_eq!(fs::metadata(keepd.path("state")).unwrap().permissions().mode() & 0o777, 0o700);
    assert!(keepd.log().contains("was open to others"), "{}", keepd.log());
    table.add("the state directory is open to all", "closed, and told");

    // What of the source may not be read is told, and the rest is there: exit 3.
    let secret = keepd.path("files/secret");
    fs::write(&secret, "root's").unwrap();
    mode(&secret, 0o600);
    let told = keepd.fails(3, &["backup", "shop"]);
    assert!(told.contains("secret") && told.to_lowercase().contains("permission denied"), "{told}");
    let to = keepd.restored("latest");
    assert!(!to.join("files/secret").exists() && to.join("files/kept").exists());
    table.add("a file of the source is root's", "left out, and told (exit 3)");
    table.print("what is somebody else's");
}
