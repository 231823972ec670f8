//! Write-only backups: made, listed and looked after without the private key, and read with it alone.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use common::*;
use serde_json::Value;

/// A machine with the public key alone, and the place where the private ones are.
struct World {
    keepd: Keepd,
    away: tempfile::TempDir,
}

impl World {
    /// Not started. The job has a database and files, and goes to these destinations: `local` is write-only, `plain` and `third` are not.
    fn prepared(destinations: &[&str], job: &str) -> Self {
        let world = Self { keepd: Keepd::prepared(), away: tempfile::tempdir().unwrap() };
        world.new_pair("read");
        world.use_public("read");
        world.configure(destinations, job);
        drop(make_database(&world.keepd.path("shop.db"), 500));
        fs::create_dir_all(world.keepd.path("files/deep")).unwrap();
        fs::write(world.keepd.path("files/deep/note.txt"), "a note").unwrap();
        fs::write(world.keepd.path("files/big"), noise(3 << 20, 5)).unwrap();
        fs::hard_link(world.keepd.path("files/big"), world.keepd.path("files/same")).unwrap();
        world
    }

    fn started(destinations: &[&str], job: &str) -> Self {
        let mut world = Self::prepared(destinations, job);
        world.keepd.start();
        world
    }

    fn configure(&self, destinations: &[&str], job: &str) {
        let d = self.keepd.dir.path().display();
        let names = destinations.iter().map(|n| format!("\"{n}\"")).collect::<Vec<_>>().join(", ");
        let plain = ["plain", "third"].map(|n| {
            format!("[destination.{n}]\nservice = \"fs\"\nroot = \"{d}/repository-{n}\"\nencryption = \"plain\"\nprune_grace = \"0s\"\n")
        });
        let text = format!(
            "[daemon]\nstate_dir = \"{d}/state\"\nsocket = \"{d}/keepd.sock\"\n\
             [encryption.main]\nkey_file = \"main.key\"\npublic_key = \"read.pub\"\n[encryption.plain]\nkey_file = \"main.key\"\n\
             [destination.local]\nservice = \"fs\"\nroot = \"{d}/repository\"\nencryption = \"main\"\nprune_grace = \"0s\"\n{}\
             [job.shop]\ndestinations = [{names}]\n{job}\n\
             [[job.shop.source]]\nname = \"db\"\nsqlite = \"{d}/shop.db\"\n[[job.shop.source]]\nname = \"files\"\nfiles = \"{d}/files\"\n",
            plain.concat()
        );
        fs::write(self.keepd.path("keepd.toml"), text).unwrap();
    }

    fn new_pair(&self, name: &str) -> Output {
        let made = Command::new(keepd_binary()).args(["key", "generate", "--pair"]).arg(self.away.path().join(name)).output().unwrap();
        assert!(made.status.success(), "{}", text(&made));
        made
    }

    /// From now on backups are written for this pair, once the configuration is read.
    fn use_public(&self, name: &str) {
        fs::copy(self.away.path().join(format!("{name}.pub")), self.keepd.path("read.pub")).unwrap();
    }

    fn private(&self, name: &str) -> String {
        self.away.path().join(name).display().to_string()
    }

    fn fingerprint(&self, name: &str) -> String {
        let text = fs::read_to_string(self.away.path().join(format!("{name}.pub"))).unwrap();
        let (_, rest) = text.split_once("fingerprint ").unwrap();
        rest[..16].to_owned()
    }

    /// What it had just written it could read until now.
    fn restart(&mut self) {
        self.keepd.stop();
        self.keepd.start();
    }

    fn insert(&self, rows: std::ops::Range<i64>) {
        let db = rusqlite::Connection::open(self.keepd.path("shop.db")).unwrap();
        for n in rows {
            db.execute("INSERT INTO account VALUES (?1, 100, ?2)", rusqlite::params![n, "y".repeat(200)]).unwrap();
        }
    }

    /// The sources as they are now, to compare with.
    fn picture(&self, name: &str) -> PathBuf {
        let to = self.away.path().join(name);
        fs::create_dir(&to).unwrap();
        let db = rusqlite::Connection::open(self.keepd.path("shop.db")).unwrap();
        db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
        drop(db);
        fs::copy(self.keepd.path("shop.db"), to.join("shop.db")).unwrap();
        let copied = Command::new("cp").arg("-a").arg(self.keepd.path("files")).arg(&to).status().unwrap();
        assert!(copied.success());
        to
    }

    fn restore(&self, backup: &str, keys: &[&str]) -> PathBuf {
        let to = self.away.path().join(format!("to-{}", fs::read_dir(self.away.path()).unwrap().count()));
        let keys: Vec<String> = keys.iter().flat_map(|k| ["--key".to_owned(), self.private(k)]).collect();
        let arguments: Vec<&str> =
            ["restore", backup, "--to", to.to_str().unwrap()].into_iter().chain(keys.iter().map(String::as_str)).collect();
        self.keepd.ok(&arguments);
        to
    }

    fn is_same(&self, restored: &Path, picture: &Path) {
        assert_same(&restored.join("files"), &picture.join("files"));
        assert!(fs::read(restored.join("db/shop.db")).unwrap() == fs::read(picture.join("shop.db")).unwrap(), "the database differs");
        let links = |of: &str| std::os::unix::fs::MetadataExt::ino(&fs::metadata(restored.join(of)).unwrap());
        assert_eq!(links("files/big"), links("files/same"));
    }

    /// What a command says that fails for want of this key.
    fn wants(&self, key: &str, arguments: &[&str]) -> String {
        let said = self.keepd.fails(1, arguments);
        assert!(said.contains(&self.fingerprint(key)) && said.contains("--key FILE"), "{arguments:?}: {said}");
        said
    }

    fn run(&self, arguments: &[&str]) -> Value {
        serde_json::from_slice(&self.keepd.ctl(&[arguments, &["--json"]].concat()).stdout).unwrap()
    }

    fn added(&self) -> u64 {
        self.run(&["backup", "shop"])["progress"]["added_bytes"].as_u64().unwrap()
    }
}

/// The packs whose chunks a public key closed.
fn write_only(keepd: &Keepd) -> Vec<PathBuf> {
    keepd.packs().into_iter().filter(|p| fs::read(p).unwrap()[9] == 1).collect()
}

/// Whether these bytes stand in a file anywhere below.
fn holds(dir: &Path, wanted: &[u8]) -> Vec<PathBuf> {
    let is_in = |p: &PathBuf| fs::read(p).is_ok_and(|bytes| bytes.windows(wanted.len()).any(|w| w == wanted));
    files_below(dir).into_iter().filter(is_in).collect()
}

#[test]
fn a_pair_is_made_once_and_says_what_to_do_with_it() {
    let world = World::prepared(&["local"], "");
    let said = text(&world.new_pair("other"));
    for wanted in [world.fingerprint("other").as_str(), "other.pub", "public_key", "stays away", "--key FILE"] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    let mode = |name: &str| fs::metadata(world.away.path().join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("other"), mode("other.pub")), (0o600, 0o644));
    let before = fs::read(world.away.path().join("other")).unwrap();
    let line = String::from_utf8(before.clone()).unwrap();
    let secret = line.lines().find_map(|l| l.strip_prefix("keepd-private-1 ")).unwrap().split(' ').next().unwrap().to_owned();
    assert!(secret.len() == 64 && !said.contains(&secret));
    let again = Command::new(keepd_binary()).args(["key", "generate", "--pair"]).arg(world.away.path().join("other")).output().unwrap();
    assert!(!again.status.success() && fs::read(world.away.path().join("other")).unwrap() == before, "{}", text(&again));
    // Half of a pair is none.
    fs::remove_file(world.away.path().join("other")).unwrap();
    let again = Command::new(keepd_binary()).args(["key", "generate", "--pair"]).arg(world.away.path().join("other")).output().unwrap();
    assert!(!again.status.success() && !world.away.path().join("other").exists(), "{}", text(&again));
}

#[test]
fn all_but_reading_goes_without_the_private_key() {
    let mut world = World::started(&["local"], "suspect = { smaller = 0, fewer_files = 0 }\nretention = { keep_last = 3 }");
    let first_picture = world.picture("first");
    let first = world.added();
    assert!(!write_only(&world.keepd).is_empty());
    world.restart();
    world.insert(1000..1100);
    fs::write(world.keepd.path("files/new"), noise(200_000, 9)).unwrap();
    let second_picture = world.picture("second");
    let second = world.added();
    assert!(second < first / 4, "{second} of {first} bytes: what is there is not stored again");
    world.restart();
    world.insert(1100..1200);
    fs::rename(world.keepd.path("files/new"), world.keepd.path("files/deep/moved")).unwrap();
    let third_picture = world.picture("third");
    let third = world.added();
    assert!(third < 200_000, "{third} bytes: a file that was moved is told by its chunks' names");
    world.restart();
    let ids = world.keepd.backups();
    assert_eq!(ids.len(), 3);

    // What is there is known without the key.
    let keepd = &world.keepd;
    assert!(keepd.ok(&["ls", "latest", "-R"]).contains("deep/moved"));
    assert!(keepd.ok(&["show", "latest"]).contains("account"), "table names and rows are facts, not contents");
    let diff = keepd.ok(&["diff", &ids[1], &ids[0]]);
    assert!(diff.contains("+ files/deep/moved") && diff.contains("- files/new"), "{diff}");
    keepd.ok(&["check", "local"]);
    let told = keepd.ok(&["check", "local", "--read-data"]);
    assert!(told.contains("could only be compared with their names") && told.contains("no damage found"), "{told}");
    let compared = keepd.ok(&["compare", "latest"]);
    assert!(compared.contains("nothing differs") || compared.contains("equal"), "{compared}");

    fs::write(keepd.path("files/deep/note.txt"), "b note").unwrap();
    let said = keepd.ok(&["compare", "latest", "files/deep"]);
    assert!(said.contains("M files/deep/note.txt"), "{said}");
    world.insert(9000..9001);
    let said = keepd.fails(3, &["compare", "latest"]);
    assert!(said.contains(&world.fingerprint("read")) && said.contains("source db was not compared"), "what hashes do not tell: {said}");

    // What is in it is not, and that is told before anything is written.
    let to = world.away.path().join("nothing");
    world.wants("read", &["restore", "latest", "--to", to.to_str().unwrap()]);
    assert!(!to.exists(), "not even an empty directory");
    world.wants("read", &["cat", "latest", "files/big"]);
    world.wants("read", &["restore", "latest", "--in-place", "--dry-run"]);
    fs::write(keepd.path("files/deep/note.txt"), "damaged").unwrap();
    let said = world.wants("read", &["restore", "latest", "--in-place", "--yes"]);
    assert!(said.contains("cannot be opened"), "{said}");
    assert_eq!(fs::read(keepd.path("files/deep/note.txt")).unwrap(), b"damaged");
    assert_eq!(keepd.backups().len(), 3, "no safety backup was made");
    let said = world.wants("read", &["drill", "latest"]);
    assert!(said.contains("says nothing of the backup"), "{said}");
    let list = keepd.json(&["list"]);
    assert!(list.as_array().unwrap().iter().all(|b| b["outcome"] == "good" && b["proven"].is_null()), "{list}");

    // With it everything comes back, byte for byte.
    for (id, picture) in ids.iter().zip([&third_picture, &second_picture, &first_picture]) {
        world.is_same(&world.restore(id, &["read"]), picture);
    }
    let private = world.private("read");
    let keepd = &world.keepd;
    let cat = keepd.ctl(&["cat", "latest", "files/big", "--key", &private]);
    assert!(cat.status.success() && cat.stdout == noise(3 << 20, 5), "{}", String::from_utf8_lossy(&cat.stderr));
    let told = keepd.ok(&["check", "local", "--read-data", "--key", &private]);
    assert!(!told.contains("compared with their names") && told.contains("no damage found"), "{told}");
    keepd.ok(&["drill", "latest", "--key", &private]);
    assert!(keepd.json(&["list"])[0]["proven"].is_string());
    let different = keepd.ok(&["compare", "latest", "--key", &private]);
    assert!(different.contains("files/deep/note.txt"), "{different}");
    // A key that was lent is gone with its run.
    world.wants("read", &["cat", "latest", "files/big"]);

    // In place, and back again: what was there is a backup like any other.
    let run = world.run(&["restore", "latest", "--in-place", "--yes", "--key", &private]);
    assert_eq!((run["state"].as_str(), fs::read(world.keepd.path("files/deep/note.txt")).unwrap()), (Some("good"), b"a note".to_vec()));
    world.restart();
    let id = run["id"].as_str().unwrap();
    world.wants("read", &["undo", id, "--yes"]);
    assert_eq!(fs::read(world.keepd.path("files/deep/note.txt")).unwrap(), b"a note");
    world.keepd.ok(&["undo", id, "--yes", "--key", &private]);
    assert_eq!(fs::read(world.keepd.path("files/deep/note.txt")).unwrap(), b"damaged");
}

#[test]
fn a_backup_needs_no_old_contents_even_when_its_caches_are_lost() {
    let mut world = World::started(&["local"], "");
    world.keepd.ok(&["backup", "shop"]);
    world.keepd.stop();
    fs::remove_dir_all(world.keepd.path("state/repositories")).unwrap();
    world.keepd.start();
    world.insert(1000..1010);
    let picture = world.picture("now");
    let run = world.run(&["backup", "shop"]);
    assert_eq!(run["state"], "good", "{run}");
    world.restart();
    world.is_same(&world.restore("latest", &["read"]), &picture);
}

#[test]
fn prune_frees_what_is_wholly_dead_and_the_rest_with_the_key() {
    let mut world = World::started(&["local"], "suspect = { smaller = 0, fewer_files = 0, changed = 0 }");
    let keepd = &world.keepd;
    fs::create_dir(keepd.path("files/many")).unwrap();
    for n in 0..8 {
        fs::write(keepd.path(&format!("files/many/{n}")), noise(1 << 20, 100 + n)).unwrap();
    }
    keepd.ok(&["backup", "shop"]);
    fs::write(keepd.path("files/dead"), noise(4 << 20, 7)).unwrap();
    keepd.ok(&["backup", "shop"]);
    fs::remove_file(keepd.path("files/dead")).unwrap();
    (1..8).for_each(|n| fs::remove_file(keepd.path(&format!("files/many/{n}"))).unwrap());
    keepd.ok(&["backup", "shop"]);
    world.restart();
    let ids = world.keepd.backups();
    for id in &ids[1..] {
        world.keepd.ok(&["delete", id, "--yes"]);
    }
    let size = |world: &World| world.keepd.packs().iter().map(|p| fs::metadata(p).unwrap().len()).sum::<u64>();
    let before = size(&world);
    let told = world.keepd.ok(&["prune", "local"]);
    assert!(told.contains("are dead in part") && told.contains("--key FILE"), "{told}");
    let after = size(&world);
    assert!(before - after > 4 << 20, "the pack of {before} bytes that nothing needs is gone, {after} are left");
    let told = world.keepd.ok(&["prune", "local", "--key", &world.private("read")]);
    assert!(told.contains("rewritten") && !told.contains("are dead in part"), "{told}");
    assert!(after - size(&world) > 6 << 20, "{after} {}", size(&world));
    assert!(!write_only(&world.keepd).is_empty(), "what is rewritten is closed again");
    world.restart();
    world.wants("read", &["cat", "latest", "files/many/0"]);
    let restored = world.restore("latest", &["read"]);
    assert_same(&world.keepd.path("files"), &restored.join("files"));
    world.keepd.ok(&["check", "local", "--read-data"]);
}

#[test]
fn another_reading_key_is_for_what_comes_after_it() {
    let mut world = World::started(&["local"], "");
    world.keepd.ok(&["backup", "shop"]);
    world.new_pair("second");
    world.use_public("second");
    fs::write(world.keepd.path("files/later"), noise(300_000, 11)).unwrap();
    world.insert(2000..2100);
    let picture = world.picture("now");
    world.keepd.ok(&["backup", "shop"]);
    world.restart();
    let (old, new) = (world.private("read"), world.private("second"));
    let to = world.away.path().join("nothing");
    let to_words = ["restore", "latest", "--to", to.to_str().unwrap()];
    let said = world.wants("read", &to_words);
    assert!(said.contains(&world.fingerprint("second")), "both are named: {said}");
    let said = world.wants("second", &[&to_words[..], &["--key", &old]].concat());
    assert!(!said.contains(&world.fingerprint("read")), "only the missing one is: {said}");
    let said = world.wants("read", &[&to_words[..], &["--key", &new]].concat());
    assert!(!said.contains(&world.fingerprint("second")), "{said}");
    assert!(!to.exists());
    // What the new key opens by itself does not ask for the old one.
    assert_eq!(world.keepd.ctl(&["cat", "latest", "files/later", "--key", &new]).stdout, noise(300_000, 11));
    world.is_same(&world.restore("latest", &["read", "second"]), &picture);
    // A recovery kit, or any text that has both, stands in for them.
    let kit = world.away.path().join("kit.txt");
    let both = ["read", "second"].map(|n| fs::read_to_string(world.away.path().join(n)).unwrap()).concat();
    fs::write(&kit, format!("What to do when all is lost\n===\n{both}")).unwrap();
    fs::set_permissions(&kit, fs::Permissions::from_mode(0o600)).unwrap();
    world.is_same(&world.restore("latest", &["kit.txt"]), &picture);
    // Without a public key contents are no longer closed, and what is there stays.
    let text = fs::read_to_string(world.keepd.path("keepd.toml")).unwrap();
    fs::write(world.keepd.path("keepd.toml"), text.replace("public_key = \"read.pub\"\n", "")).unwrap();
    world.restart();
    world.wants("second", &["cat", "latest", "files/later"]);
    fs::write(world.keepd.path("files/open"), noise(100_000, 12)).unwrap();
    world.keepd.ok(&["backup", "shop"]);
    world.restart();
    assert_eq!(world.keepd.ctl(&["cat", "latest", "files/open"]).stdout, noise(100_000, 12));
}

#[test]
fn keys_that_are_none_are_told_for_what_they_are() {
    let mut world = World::started(&["local"], "");
    world.keepd.ok(&["backup", "shop"]);
    world.restart();
    world.new_pair("wrong");
    let away = |name: &str| world.away.path().join(name);
    let private = fs::read(away("read")).unwrap();
    let secret = String::from_utf8_lossy(&private).lines().find_map(|l| l.strip_prefix("keepd-private-1 ")).unwrap()[..64].to_owned();
    let write = |name: &str, bytes: &[u8], mode: u32| {
        fs::write(away(name), bytes).unwrap();
        fs::set_permissions(away(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    write("open", &private, 0o644);
    write("cut", &private[..private.len() - 20], 0o600);
    write("nothing", b"", 0o600);
    let mut mistyped = private.clone();
    let at = private.len() - 30;
    mistyped[at] = if mistyped[at] == b'0' { b'1' } else { b'0' };
    write("mistyped", &mistyped, 0o600);
    fs::copy(world.keepd.path("main.key"), away("profile")).unwrap();
    fs::set_permissions(away("profile"), fs::Permissions::from_mode(0o600)).unwrap();
    assert!(Command::new("mkfifo").arg(away("fifo")).status().unwrap().success());
    let cases = [
        ("open", "can be read or changed by others"),
        ("cut", "truncated"),
        ("nothing", "truncated"),
        ("mistyped", "check digits"),
        ("read.pub", "is a public key file of keepd where a private key file is wanted"),
        ("profile", "is a key file of keepd where a private key file is wanted"),
        ("fifo", "not a regular file"),
        (".", "not a regular file"),
        ("absent", "No such file"),
        ("wrong", &world.fingerprint("read")),
    ];
    for (name, wanted) in cases {
        let key = away(name).display().to_string();
        for command in
            [vec!["cat", "latest", "files/big"], vec!["check", "local", "--read-data"], vec!["restore", "latest", "--in-place", "--yes"]]
        {
            if name == "wrong" && command[0] == "check" {
                let told = world.keepd.ok(&[&command[..], &["--key", &key]].concat());
                assert!(told.contains("could only be compared with their names"), "{told}");
                continue;
            }
            let said = world.keepd.fails(1, &[&command[..], &["--key", &key]].concat());
            assert!(said.contains(wanted), "{name}: {command:?}: {said}");
            assert!(!said.contains(&secret[..16]), "{name}: {said}");
        }
    }
    let eight: Vec<String> = (0..8).flat_map(|_| ["--key".to_owned(), world.private("read")]).collect();
    let eight: Vec<&str> = ["cat", "latest", "files/big"].into_iter().chain(eight.iter().map(String::as_str)).collect();
    assert!(world.keepd.fails(2, &eight).contains("at most 7 keys"));
    assert_eq!(world.keepd.ctl(&eight[..eight.len() - 2]).stdout, noise(3 << 20, 5), "the same one seven times is no harm");
    assert_eq!(world.keepd.backups().len(), 1);
}

#[test]
fn a_packs_sealed_key_fits_no_other_pack() {
    let mut world = World::started(&["local"], "");
    world.keepd.ok(&["backup", "shop"]);
    fs::write(world.keepd.path("files/later"), noise(300_000, 11)).unwrap();
    world.keepd.ok(&["backup", "shop"]);
    world.restart();
    let packs = write_only(&world.keepd);
    assert!(packs.len() >= 2, "{packs:?}");
    let place = |bytes: &[u8]| {
        let footer = u32::from_le_bytes(bytes[bytes.len() - 4..].try_into().unwrap()) as usize;
        bytes.len() - 4 - footer - 88..bytes.len() - 4 - footer
    };
    let (mut one, mut two) = (fs::read(&packs[0]).unwrap(), fs::read(&packs[1]).unwrap());
    let (a, b) = (place(&one), place(&two));
    assert_eq!(one[a.start..a.start + 8], two[b.start..b.start + 8], "both are for the same key");
    one[a].swap_with_slice(&mut two[b]);
    fs::write(&packs[0], &one).unwrap();
    fs::write(&packs[1], &two).unwrap();
    let to = world.away.path().join("to");
    let said = world.keepd.fails(1, &["restore", "latest", "--to", to.to_str().unwrap(), "--key", &world.private("read")]);
    assert!(said.contains("does not open") && !said.contains("--key FILE"), "{said}");
    let said = world.keepd.fails(1, &["drill", "latest", "--key", &world.private("read")]);
    assert!(said.contains("suspect"), "damage is told from a key that is missing: {said}");
    // Told without the key, for the names are hashes.
    let said = world.keepd.fails(1, &["check", "local", "--read-data"]);
    assert!(said.contains("its SHA-256 is not its name"), "{said}");
}

#[test]
fn copies_are_made_without_the_key_while_it_can_be() {
    let mut world = World::started(&["local", "plain"], "retry = { backoff = \"1s\" }");
    let keepd = &world.keepd;
    let told = keepd.ok(&["backup", "shop"]);
    assert!(told.contains("copied to plain"), "{told}");
    // What comes on top of what was copied is all that is read.
    world.restart();
    fs::write(world.keepd.path("files/later"), noise(300_000, 11)).unwrap();
    world.insert(2000..2100);
    let picture = world.picture("now");
    let told = world.keepd.ok(&["backup", "shop"]);
    assert!(told.contains("copied to plain"), "{told}");
    world.restart();
    // A restore takes the copy that can be read.
    world.is_same(&world.restore("latest", &[]), &picture);

    // Another destination gets it from the one that can be read.
    world.configure(&["local", "plain", "third"], "retry = { backoff = \"1s\" }");
    world.restart();
    let since = std::time::Instant::now();
    while files_below(&world.keepd.path("repository-third/backups")).len() < 2 {
        assert!(since.elapsed() < Duration::from_secs(30), "{}", world.keepd.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    world.keepd.ok(&["check", "third", "--read-data"]);
}

#[test]
fn a_copy_that_wants_the_key_says_so_and_leaves_the_job_alone() {
    let mut world = World::started(&["local"], "retry = { backoff = \"1s\" }");
    let picture = world.picture("now");
    world.keepd.ok(&["backup", "shop"]);
    world.keepd.stop();
    world.configure(&["local", "plain"], "retry = { backoff = \"1s\" }");
    world.keepd.start();
    std::thread::sleep(Duration::from_secs(5));
    let runs = world.keepd.json(&["run", "list"]);
    let copies: Vec<&Value> = runs.as_array().unwrap().iter().filter(|r| r["kind"] == "copy").collect();
    assert_eq!(copies.len(), 1, "it is not tried again and again: {copies:#?}");
    let error = copies[0]["error"].as_str().unwrap();
    let id = world.keepd.backups().remove(0);
    for wanted in [world.fingerprint("read"), format!("keepctl copy {} --to plain --key FILE", &id[..12])] {
        assert!(error.contains(&wanted), "{error}");
    }
    let status = world.keepd.json(&["status"]);
    assert_eq!((&status["jobs"][0]["last_outcome"], &status["jobs"][0]["runs_failed"]), (&"good".into(), &0.into()), "{status}");
    world.wants("read", &["copy", "latest", "--to", "plain"]);
    world.keepd.ok(&["copy", "latest", "--to", "plain", "--key", &world.private("read")]);
    world.is_same(&world.restore("latest", &[]), &picture);
    // From now on it goes by itself again.
    fs::write(world.keepd.path("files/later"), noise(300_000, 11)).unwrap();
    assert!(world.keepd.ok(&["backup", "shop"]).contains("copied to plain"));
}

#[test]
fn drills_of_what_is_all_write_only_are_left_to_people() {
    let mut world = World::started(&["local"], "drill = { every = \"1s\" }");
    let checked = world.keepd.command().arg("--check").output().unwrap();
    let said = text(&checked);
    assert!(
        checked.status.success() && said.contains("job.shop.drill.every") && said.contains("keepctl drill --job shop --key FILE"),
        "{said}"
    );
    world.keepd.ok(&["backup", "shop"]);
    std::thread::sleep(Duration::from_secs(4));
    let drills = |world: &World| world.keepd.json(&["run", "list"]).as_array().unwrap().iter().filter(|r| r["kind"] == "drill").count();
    assert_eq!(drills(&world), 0);
    assert_eq!(world.keepd.log().matches("job.shop.drill.every").count(), 1, "said once: {}", world.keepd.log());
    // With another copy they are tried as ever.
    world.configure(&["local", "plain"], "drill = { every = \"1s\" }");
    let said = text(&world.keepd.command().arg("--check").output().unwrap());
    assert!(!said.contains("drill.every"), "{said}");
    world.keepd.ok(&["reload"]);
    world.keepd.ok(&["backup", "shop"]);
    world.restart();
    let since = std::time::Instant::now();
    while world.keepd.json(&["list"])[0]["proven"].is_null() {
        assert!(since.elapsed() < Duration::from_secs(30), "{}", world.keepd.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    // A private key beside its public one is told.
    fs::copy(world.private("read"), world.keepd.path("read")).unwrap();
    let said = text(&world.keepd.command().arg("--check").output().unwrap());
    assert!(said.contains("the private key seems to be on this machine"), "{said}");
}

#[test]
fn killed_on_its_way_a_restore_in_place_is_settled_without_the_key() {
    let mut world = World::prepared(&["local"], "");
    let d = world.keepd.dir.path().display().to_string();
    let config = fs::read_to_string(world.keepd.path("keepd.toml")).unwrap();
    let command = format!(
        "[[job.shop.source]]\nname = \"cache\"\ncommand = [\"/bin/cat\", \"{d}/cache\"]\n\
         restore_command = [\"/bin/sh\", \"-c\", \"cat >{d}/cache.new && mv {d}/cache.new {d}/cache\"]\n"
    );
    fs::write(world.keepd.path("keepd.toml"), config + &command).unwrap();
    fs::write(world.keepd.path("cache"), "a note").unwrap();
    world.keepd.start();
    world.keepd.ok(&["backup", "shop"]);
    let id = world.keepd.backups().remove(0);
    world.keepd.stop();
    let rows = |world: &World| -> i64 {
        let db = rusqlite::Connection::open(world.keepd.path("shop.db")).unwrap();
        db.query_row("SELECT count(*) FROM account", [], |r| r.get(0)).unwrap()
    };
    let read = |world: &World, name: &str| fs::read_to_string(world.keepd.path(name)).unwrap();
    let (mut undone, mut kept, mut fed, mut point) = (0, 0, 0, 1u64);
    loop {
        world.insert(5000..5003);
        fs::write(world.keepd.path("files/deep/note.txt"), "now").unwrap();
        fs::write(world.keepd.path("cache"), "now").unwrap();
        world.keepd.environment = vec![("KEEPD_TEST_DIES_AT".into(), point.to_string())];
        world.keepd.start();
        let out = world.keepd.ctl(&["restore", &id, "--in-place", "--yes", "--key", &world.private("read")]);
        world.keepd.environment.clear();
        let finished = out.status.success();
        if !finished {
            world.keepd.kill();
            // The command had been fed, and has to be given back what it had.
            let journal = files_below(&world.keepd.path("state/in-place")).into_iter().find(|p| p.extension().is_some_and(|e| e == "json"));
            let journal: Value = journal.and_then(|p| serde_json::from_slice(&fs::read(p).unwrap()).ok()).unwrap_or_default();
            fed += usize::from(journal["phase"] == "Swapping" && journal["commands"][0] == "cache");
            world.keepd.start();
            world.keepd.settled(point);
        }
        match (rows(&world), read(&world, "files/deep/note.txt").as_str(), read(&world, "cache").as_str()) {
            (503, "now", "now") => undone += 1,
            (500, "a note", "a note") => kept += 1,
            other => panic!("killed at point {point} it is neither old nor new: {other:?}\n{}\n{}", text(&out), world.keepd.log()),
        }
        let left: Vec<PathBuf> = files_below(&world.keepd.path("state/in-place"));
        assert!(left.is_empty(), "{left:?}");
        world.keepd.stop();
        if finished {
            break;
        }
        rusqlite::Connection::open(world.keepd.path("shop.db")).unwrap().execute("DELETE FROM account WHERE id >= 5000", []).unwrap();
        point += 1 + point / 12;
    }
    assert!(undone > 10 && kept > 0 && fed > 0, "{undone} undone, {kept} kept, a command had been fed {fed} times");
}

#[test]
fn a_servers_database_comes_back_with_the_key() {
    let server = databases::Postgres::started();
    let mut world = World::prepared(&["local"], "");
    let config = fs::read_to_string(world.keepd.path("keepd.toml")).unwrap();
    let job = format!(
        "[job.app]\ndestinations = [\"local\"]\n[[job.app.source]]\nname = \"pg\"\npostgres = {{ dbname = \"app\", {} }}\n",
        server.connection()
    );
    fs::write(world.keepd.path("keepd.toml"), config + &job).unwrap();
    server.sql("postgres", "CREATE DATABASE app");
    server.sql("app", "CREATE TABLE t AS SELECT g AS id, 'x' || g AS text FROM generate_series(1, 5000) g");
    world.keepd.start();
    world.keepd.ok(&["backup", "app"]);
    world.restart();
    server.sql("app", "INSERT INTO t SELECT g, 'y' || g FROM generate_series(5001, 6000) g");
    let run = world.run(&["backup", "app"]);
    assert_eq!(run["state"], "good", "{run}");
    world.restart();
    let words = ["restore", "latest", "--job", "app", "--to-database", "again"];
    world.wants("read", &words);
    let databases = || server.sql("postgres", "SELECT string_agg(datname, ' ' ORDER BY datname) FROM pg_database WHERE NOT datistemplate");
    assert_eq!(databases(), "app postgres", "nothing was begun");
    let private = world.private("read");
    world.keepd.ok(&[&words[..], &["--key", &private]].concat());
    assert_eq!(server.sql("again", "SELECT count(*) || ' ' || max(text) FROM t"), "6000 y6000");
    world.keepd.ok(&["drill", "latest", "--job", "app", "--key", &private]);
    server.sql("app", "DELETE FROM t");
    world.wants("read", &["restore", "latest", "--job", "app", "--in-place", "--yes"]);
    world.keepd.ok(&["restore", "latest", "--job", "app", "--in-place", "--yes", "--key", &private]);
    assert_eq!(server.sql("app", "SELECT count(*) FROM t"), "6000");
}

#[test]
fn a_private_key_leaves_no_trace() {
    let mut world = World::started(&["local"], "");
    world.keepd.ok(&["backup", "shop"]);
    world.restart();
    let line = fs::read_to_string(world.private("read")).unwrap();
    let hex = line.lines().find_map(|l| l.strip_prefix("keepd-private-1 ")).unwrap()[..64].to_owned();
    let raw: Vec<u8> = (0..32).map(|n| u8::from_str_radix(&hex[2 * n..2 * n + 2], 16).unwrap()).collect();
    let private = world.private("read");
    let pid = world.keepd.pid();
    // While a run has it: nobody takes what it writes.
    let mut reading = world.keepd.ctl_command(&["cat", "latest", "files/big", "--key", &private]);
    let mut reading = reading.stdout(std::process::Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let argv = |pid: u32| fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    let environment = |pid: u32| fs::read(format!("/proc/{pid}/environ")).unwrap();
    for seen in [argv(pid), environment(pid), argv(reading.id()), environment(reading.id())] {
        assert!(!String::from_utf8_lossy(&seen).contains(&hex));
    }
    assert!(in_memory(pid, &raw) > 0, "the run has it");
    // X25519 computes with a copy that has bits of the first and the last byte set.
    let inner = &raw[1..31];
    drop(reading.stdout.take());
    reading.wait().unwrap();
    let mut said = String::new();
    for arguments in [
        vec!["drill", "latest"],
        vec!["restore", "latest", "--in-place", "--yes"],
        vec!["check", "local", "--read-data"],
        vec!["prune", "local"],
        vec!["compare", "latest"],
    ] {
        said.push_str(&text(&world.keepd.ctl(&[&arguments[..], &["--key", &private]].concat())));
        said.push_str(&text(&world.keepd.ctl(&[&arguments[..], &["--json", "--key", &private]].concat())));
    }
    said.push_str(&world.keepd.ok(&["run", "list", "--json"]));
    for run in world.keepd.json(&["run", "list"]).as_array().unwrap() {
        said.push_str(&text(&world.keepd.ctl(&["run", "show", run["id"].as_str().unwrap(), "--json"])));
    }
    assert!(!said.contains(&hex) && !said.contains("keepd-private-1"));
    let since = std::time::Instant::now();
    loop {
        let (times, as_text) = (in_memory(pid, inner), in_memory(pid, hex.as_bytes()));
        if times + as_text == 0 {
            break;
        }
        let is_early = since.elapsed() < Duration::from_secs(10);
        assert!(is_early, "it is still in the daemon's memory, {times} times and {as_text} as a text");
        std::thread::sleep(Duration::from_millis(200));
    }
    world.keepd.stop();
    for wanted in [hex.as_bytes(), &raw] {
        assert_eq!(holds(world.keepd.dir.path(), wanted), Vec::<PathBuf>::new());
    }
    assert!(!holds(world.away.path(), hex.as_bytes()).is_empty(), "where it is it is found");
}

/// How often these bytes stand in a process's memory.
fn in_memory(pid: u32, wanted: &[u8]) -> usize {
    use std::os::unix::fs::FileExt;
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut count = 0;
    for line in maps.lines().filter(|l| l.split(' ').nth(1).is_some_and(|rights| rights.starts_with("rw"))) {
        let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let (from, to) = (u64::from_str_radix(from, 16).unwrap(), u64::from_str_radix(to, 16).unwrap());
        let mut bytes = vec![0; (to - from) as usize];
        if memory.read_exact_at(&mut bytes, from).is_ok() {
            // Quick, for there is a lot of it: the first byte first.
            let mut rest = bytes.as_slice();
            while let Some(at) = rest.iter().position(|b| *b == wanted[0]) {
                count += usize::from(rest[at..].starts_with(wanted));
                rest = &rest[at + 1..];
            }
        }
    }
    count
}
