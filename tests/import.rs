//! keepctl import: archives of keepd and of others become backups of a destination, whole or not at all.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::*;
use serde_json::{Value, json};

/// A plain Varlink client.
struct Client(BufReader<UnixStream>);

impl Client {
    fn of(keepd: &Keepd) -> Self {
        let stream = UnixStream::connect(keepd.path("keepd.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        Self(BufReader::new(stream))
    }

    fn send(&mut self, method: &str, parameters: &Value, more: bool) {
        let call = json!({ "method": format!("io.keepd.Control.{method}"), "parameters": parameters, "more": more });
        self.0.get_mut().write_all(&[call.to_string().as_bytes(), b"\0"].concat()).unwrap();
    }

    fn reply(&mut self) -> Value {
        let mut bytes = Vec::new();
        self.0.read_until(0, &mut bytes).unwrap();
        bytes.pop();
        serde_json::from_slice(&bytes).unwrap()
    }

    fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.send(method, &parameters, false);
        let reply = self.reply();
        assert!(reply.get("error").is_none(), "{method} {parameters}: {reply}");
        reply.get("parameters").cloned().unwrap_or_default()
    }

    fn error(&mut self, method: &str, parameters: Value) -> String {
        self.send(method, &parameters, false);
        self.reply()["parameters"]["message"].as_str().unwrap().to_owned()
    }

    /// Watches; call [`Client::completed`] for what comes.
    fn watching(keepd: &Keepd) -> Self {
        let mut client = Self::of(keepd);
        client.send("Watch", &json!({}), true);
        // The daemon has taken the call up when another one is answered after it.
        std::thread::sleep(Duration::from_millis(100));
        client
    }

    /// The next import that ended.
    fn completed(&mut self) -> Value {
        loop {
            let event = self.reply()["parameters"]["event"].clone();
            if event["kind"] == "import_completed" {
                return event["import"].clone();
            }
        }
    }
}

fn state(keepd: &Keepd, import: &str) -> Value {
    Client::of(keepd).call("GetImport", json!({ "import": import }))["import"].clone()
}

fn settled(keepd: &Keepd, import: &str) -> Value {
    let since = Instant::now();
    loop {
        let import = state(keepd, import);
        if ["completed", "failed", "timeout"].contains(&import["state"].as_str().unwrap()) {
            return import;
        }
        assert!(since.elapsed() < Duration::from_secs(120), "{import}\n{}", keepd.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn until(keepd: &Keepd, what: &str, done: impl Fn() -> bool) {
    let since = Instant::now();
    while !done() {
        assert!(since.elapsed() < Duration::from_secs(60), "{what}: {}", keepd.log());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// No import has left anything in the state directory but what it was.
fn nothing_is_left(keepd: &Keepd) {
    assert_eq!(keepd.backups(), Vec::<String>::new());
    let left: Vec<PathBuf> = files_below(&keepd.path("state/imports")).into_iter().filter(|p| !p.ends_with("import.json")).collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(files_below(&keepd.path("state/work")).is_empty());
}

/// A backup of a database that is written to, and of files of every kind; its id.
fn origin() -> (Keepd, String) {
    let keepd = Keepd::started();
    let files = keepd.path("files");
    for n in 0..200 {
        fs::write(files.join(format!("deep/small-{n}")), noise(n * 41, n as u64 + 1)).unwrap();
    }
    fs::write(files.join("long"), noise(9 << 20, 99)).unwrap();
    fs::hard_link(files.join("big"), files.join("zzz")).unwrap();
    let sparse = fs::File::create(files.join("sparse")).unwrap();
    sparse.set_len(20 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"in the middle", 7 << 20).unwrap();
    fs::create_dir(files.join("empty")).unwrap();
    fs::write(files.join("nothing"), "").unwrap();
    fs::write(files.join("deep/with-attribute"), "x").unwrap();
    let set = Command::new("setfattr").args(["-n", "user.colour", "-v", "blue"]).arg(files.join("deep/with-attribute")).status().unwrap();
    assert!(set.success());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let db = rusqlite::Connection::open(keepd.path("shop.db")).unwrap();
            db.busy_timeout(Duration::from_secs(30)).unwrap();
            while !stop.load(Ordering::Relaxed) {
                // The sum stays the same.
                db.execute_batch("BEGIN; UPDATE account SET balance = balance - 1 WHERE id = 1; UPDATE account SET balance = balance + 1 WHERE id = 2; COMMIT").unwrap();
            }
        });
        let made = keepd.ctl(&["backup", "shop", "--name", "one", "--label", "is=it"]);
        stop.store(true, Ordering::Relaxed);
        assert!(made.status.success(), "{}", text(&made));
    });
    let id = keepd.backups().remove(0);
    (keepd, id)
}

fn export(keepd: &Keepd, name: &str, more: &[&str]) -> PathBuf {
    let path = keepd.path(name);
    keepd.ok(&[&["export", "latest", "-o", path.to_str().unwrap()], more].concat());
    path
}

/// Another machine, with a job of its own.
fn another() -> Keepd {
    let mut keepd = Keepd::prepared();
    keepd.start();
    keepd
}

fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_backup_goes_to_another_machine_and_comes_back_in_place() {
    let (there, id) = origin();
    let archive = export(&there, "shop.tar.zst", &[]);
    let mut here = Keepd::prepared();
    let config = fs::read_to_string(here.path("keepd.toml")).unwrap();
    fs::write(here.path("keepd.toml"), config.replace("name = \"db\"", "name = \"data\"").replace("job.shop", "job.store")).unwrap();
    make_database(&here.path("shop.db"), 3);
    here.start();
    let mut watch = Client::watching(&here);
    let said = here.ok(&["import", str(&archive), "--job", "store", "--rename-source", "db=data"]);
    assert!(said.contains(&id[..12]) && said.contains("imported to local"), "{said}");
    let ended = watch.completed();
    assert_eq!((&ended["state"], &ended["backup"], &ended["counts"]["backups"]), (&"completed".into(), &id.clone().into(), &1.into()));
    let list = here.json(&["list"]);
    let backup = &list[0];
    assert_eq!((&backup["id"], &backup["type"], &backup["job"]), (&id.clone().into(), &"imported".into(), &"store".into()));
    assert_eq!((&backup["name"], &backup["labels"]["is"], &backup["outcome"]), (&"one".into(), &"it".into(), &"good".into()));
    assert_eq!(backup["time"], there.json(&["list"])[0]["time"]);
    here.ok(&["check", "local", "--read-data"]);
    let (a, b) = (there.restored(&id), here.restored(&id));
    assert_same(&a.join("files"), &b.join("files"));
    assert!(fs::read(a.join("db/shop.db")).unwrap() == fs::read(b.join("data/shop.db")).unwrap());
    assert_eq!(fs::metadata(b.join("files/zzz")).unwrap().nlink(), 2);
    assert!(fs::metadata(b.join("files/sparse")).unwrap().blocks() < 1 << 12);
    let attribute =
        Command::new("getfattr").args(["--only-values", "-n", "user.colour"]).arg(b.join("files/deep/with-attribute")).output().unwrap();
    assert_eq!(attribute.stdout, b"blue");
    // It goes where the job's sources are here.
    here.ok(&["restore", &id, "--in-place", "--yes"]);
    assert_eq!(proven_sum(&here.path("shop.db")), 50_000);
    assert_same(&there.path("files"), &here.path("files"));
    let imports = here.json(&["import", "--list"]);
    assert_eq!((&imports[0]["state"], &imports[0]["percent"]), (&"completed".into(), &json!(100.0)));
}

#[test]
fn what_is_there_already_is_skipped_renamed_or_replaced() {
    let (there, id) = origin();
    let archive = export(&there, "shop.tar.gz", &[]);
    let here = another();
    here.ok(&["import", str(&archive)]);
    let said = here.ok(&["import", str(&archive)]);
    assert!(said.contains("already; nothing was imported"), "{said}");
    assert_eq!(here.json(&["import", "--list"])[0]["counts"]["skipped"], 1);
    assert_eq!(here.backups(), std::slice::from_ref(&id));
    here.ok(&["pin", &id]);
    let object = |keepd: &Keepd| keepd.json(&["show", &id])["object"].clone();
    let before = object(&here);
    here.ok(&["import", str(&archive), "--on-conflict", "replace"]);
    assert_eq!(here.backups(), std::slice::from_ref(&id));
    assert_ne!(object(&here), before);
    assert_eq!(here.json(&["list"])[0]["pinned"], true);
    assert_eq!(files_below(&here.path("repository/backups")).len(), 1);
    here.ok(&["import", str(&archive), "--on-conflict", "rename"]);
    let list = here.json(&["list"]);
    let other = list.as_array().unwrap().iter().find(|b| b["id"] != json!(id)).unwrap();
    assert_eq!((list.as_array().unwrap().len(), &other["name"]), (2, &"one (imported)".into()));
    here.ok(&["check", "local", "--read-data"]);
    assert_same(&there.path("files"), &here.restored(other["id"].as_str().unwrap()).join("files"));
    let said = here.ok(&["import", str(&archive), "--from", "tar", "--job", "shop", "--source", "files"]);
    assert!(said.contains("imported as what it is"), "{said}");
    // With other sources it is another one, whatever is to become of that which is here.
    let kept = object(&here);
    for (n, conflict) in ["skip", "replace"].into_iter().enumerate() {
        here.ok(&["import", str(&archive), "--rename-source", "db=data", "--on-conflict", conflict]);
        assert_eq!((here.backups().len(), object(&here)), (3 + n, kept.clone()));
    }
    // A pinned one is not deleted; nothing but deleting takes an imported one away.
    here.ok(&["unpin", &id]);
    here.ok(&["delete", &id, "--yes"]);
    assert_eq!(here.backups().len(), 3);
}

#[test]
fn sealed_archives_open_with_their_key_alone() {
    let (there, id) = origin();
    let fresh = export(&there, "fresh.tar.zst.enc", &[]);
    let key = there.path("fresh.tar.zst.enc.key");
    let profile = export(&there, "profile.tar.gz.enc", &["--encryption", "main"]);
    let here = another();
    here.generate_key("wrong.key");
    let mut watch = Client::watching(&here);
    let without = here.fails(1, &["import", str(&fresh)]);
    let with_wrong = here.fails(1, &["import", str(&fresh), "--key", str(&here.path("wrong.key"))]);
    for said in [without, with_wrong] {
        assert!(said.contains("the archive is not imported") && said.contains("key"), "{said}");
        let ended = watch.completed();
        assert_eq!(ended["state"], "failed");
        assert!(ended["error"].as_str().unwrap().contains("key"), "{ended}");
    }
    nothing_is_left(&here);
    let open = export(&there, "open.tar", &[]);
    assert!(here.fails(1, &["import", str(&open), "--key", str(&key)]).contains("not sealed"));
    nothing_is_left(&here);
    here.ok(&["import", str(&fresh), "--key", str(&key)]);
    assert!(here.json(&["import", "--list"])[0]["counts"]["files"].as_u64().unwrap() > 200);
    here.ok(&["delete", &id, "--yes"]);
    here.ok(&["import", str(&profile), "--key", str(&there.path("main.key"))]);
    assert_same(&there.path("files"), &here.restored(&id).join("files"));
    // Where the profile is configured, nobody needs to give its key.
    there.ok(&["delete", &id, "--yes"]);
    there.ok(&["import", str(&profile)]);
    assert_eq!((there.backups(), &there.json(&["list"])[0]["type"]), (vec![id], &"imported".into()));
}

#[test]
fn archives_are_validated_and_chosen_from() {
    let (there, id) = origin();
    let archive = export(&there, "shop.tar.zst", &[]);
    let here = another();
    let said = here.ok(&["import", str(&archive), "--validate-only"]);
    assert!(said.contains("is whole") && said.contains(&id[..12]), "{said}");
    nothing_is_left(&here);
    assert!(!here.path("repository/backups").exists());
    let said = here.fails(1, &["import", str(&archive), "--source", "mail"]);
    assert!(said.contains("no source 'mail'") && said.contains("db, files"), "{said}");
    let said = here.fails(1, &["import", str(&archive), "files/absent"]);
    assert!(said.contains("no 'files/absent'") && said.contains("deep") && said.contains("sparse"), "{said}");
    let said = here.fails(1, &["import", str(&archive), "files/zzz"]);
    assert!(said.contains("another name of 'files/big'"), "{said}");
    nothing_is_left(&here);
    here.ok(&["import", str(&archive), "--source", "db", "files/deep/note.txt", "files/long"]);
    let backup = here.backups().remove(0);
    assert_ne!(backup, id, "it is not the whole backup");
    let to = here.restored(&backup);
    assert_eq!(proven_sum(&to.join("db/shop.db")), 50_000);
    let names: Vec<String> = files_below(&to.join("files")).iter().map(|p| p.strip_prefix(&to).unwrap().display().to_string()).collect();
    assert_eq!(names, ["files/deep/note.txt", "files/long"]);
    assert_eq!(fs::read(to.join("files/long")).unwrap(), noise(9 << 20, 99));
    assert!(here.ok(&["show", &backup]).contains("only"), "what was chosen is told");
    // Only what is below.
    let said = here.fails(1, &["import", str(&archive), "--rename-source", "db=files"]);
    assert!(said.contains("two sources would be called 'files'"), "{said}");
}

#[test]
fn pieces_go_on_where_they_stopped_across_a_restart() {
    let (there, id) = origin();
    let archive = fs::read(export(&there, "shop.tar.zst.enc", &[])).unwrap();
    let key = fs::read(there.path("shop.tar.zst.enc.key")).unwrap();
    let mut here = another();
    let encoded = |bytes: &[u8]| data_encoding::BASE64.encode(bytes);
    let piece = |import: &str, offset: usize, len: usize| {
        let end = (offset + len).min(archive.len());
        let data = encoded(&archive[offset..end]);
        json!({ "import": import, "part": "archive", "offset": offset, "data": data, "last": end == archive.len() })
    };
    let mut client = Client::of(&here);
    let begun = client.call("InitiateImport", json!({ "destination": "local" }));
    let import = begun["import"].as_str().unwrap().to_owned();
    assert!(begun["deadline"].as_str().is_some());
    assert!(client.error("StartImport", json!({ "import": import })).contains("upload its archive first"));
    assert_eq!(client.call("UploadImport", piece(&import, 0, 500_000))["next"], 500_000);
    // One that came before, and one too far ahead, are told where it goes on.
    assert_eq!(client.call("UploadImport", piece(&import, 0, 500_000))["next"], 500_000);
    assert_eq!(client.call("UploadImport", piece(&import, 700_000, 500))["next"], 500_000);
    assert!(
        client
            .error("UploadImport", json!({ "import": import, "data": encoded(&vec![0; 600 << 10]), "offset": 500_000 }))
            .contains("at most")
    );
    assert_eq!(state(&here, &import)["state"], "uploading");
    let spool = here.path(&format!("state/imports/{import}/archive"));
    assert_eq!(fs::metadata(&spool).unwrap().permissions().mode() & 0o777, 0o600);
    here.kill();
    here.start();
    let mut client = Client::of(&here);
    let mut at = client.call("UploadImport", piece(&import, 0, 1))["next"].as_u64().unwrap() as usize;
    assert_eq!(at, 500_000);
    while at < archive.len() {
        at = client.call("UploadImport", piece(&import, at, 512 << 10))["next"].as_u64().unwrap() as usize;
    }
    client.call("UploadImport", json!({ "import": import, "part": "key", "data": encoded(&key) }));
    assert!(
        !here
            .path("state/imports")
            .join(&import)
            .read_dir()
            .unwrap()
            .any(|e| fs::read(e.unwrap().path()).unwrap().windows(10).any(|w| w == &key[key.len() - 40..][..10]))
    );
    let mut watch = Client::watching(&here);
    client.call("StartImport", json!({ "import": import }));
    let ended = watch.completed();
    assert_eq!((&ended["state"], &ended["backup"], &ended["uploaded"]), (&"completed".into(), &id.clone().into(), &archive.len().into()));
    assert!(!spool.exists());
    assert_same(&there.path("files"), &here.restored(&id).join("files"));
    assert!(client.error("StartImport", json!({ "import": import })).contains("is completed"));
    // One that was begun and cancelled is gone.
    let other = client.call("InitiateImport", json!({ "destination": "local" }))["import"].as_str().unwrap().to_owned();
    client.call("UploadImport", piece(&other, 0, 1000));
    here.ok(&["import", "--cancel", &other]);
    assert!(client.error("GetImport", json!({ "import": other })).contains("no import"));
    assert!(!here.path(&format!("state/imports/{other}")).exists());
}

#[test]
fn a_deadline_holds_also_across_a_restart() {
    let mut keepd = another();
    let begin = |keepd: &Keepd| {
        let mut client = Client::of(keepd);
        let import =
            client.call("InitiateImport", json!({ "destination": "local", "timeout_seconds": 1 }))["import"].as_str().unwrap().to_owned();
        client.call("UploadImport", json!({ "import": import, "data": "AAAA", "offset": 0 }));
        import
    };
    let mut watch = Client::watching(&keepd);
    let first = begin(&keepd);
    let ended = watch.completed();
    assert_eq!((&ended["id"], &ended["state"]), (&first.into(), &"timeout".into()));
    let second = begin(&keepd);
    keepd.kill();
    std::thread::sleep(Duration::from_millis(1100));
    keepd.start();
    assert_eq!(state(&keepd, &second)["state"], "timeout");
    nothing_is_left(&keepd);
    let mut client = Client::of(&keepd);
    assert!(client.error("UploadImport", json!({ "import": second, "data": "AAAA", "offset": 3 })).contains("is timeout"));
    assert!(client.error("InitiateImport", json!({ "destination": "local", "timeout_seconds": 0 })).contains("timeout_seconds"));
    // As many as one user may have, and no more.
    for _ in 0..16 {
        client.call("InitiateImport", json!({ "destination": "local" }));
    }
    assert!(client.error("InitiateImport", json!({ "destination": "local" })).contains("16 imports"));
}

/// Begins an import that takes its time; it has stored something when this returns.
fn slowly(keepd: &Keepd, archive: &Path) -> String {
    let before = keepd.packs().len();
    let out: Value = keepd.json(&["import", str(archive), "--bandwidth", "16MiB/s", "--detach"]);
    let import = out["import"].as_str().unwrap().to_owned();
    until(keepd, "it stores", || keepd.packs().len() > before || state(keepd, &import)["state"] != "processing");
    assert_eq!(state(keepd, &import)["state"], "processing", "{}", keepd.log());
    import
}

#[test]
fn what_is_cancelled_or_killed_leaves_nothing() {
    let (there, id) = origin();
    fs::write(there.path("files/longer"), noise(150 << 20, 3)).unwrap();
    there.ok(&["backup", "shop"]);
    let archive = export(&there, "shop.tar", &[]);
    let mut here = Keepd::prepared();
    here.configure("prune_grace = \"0s\"", "");
    here.start();
    let mut watch = Client::watching(&here);
    let import = slowly(&here, &archive);
    let told = state(&here, &import);
    assert_eq!(told["step"], "Importing files");
    assert!(told["percent"].as_f64().unwrap() < 100.0, "{told}");
    here.ok(&["import", "--cancel", &import]);
    let ended = watch.completed();
    assert_eq!((&ended["state"], &ended["error"]), (&"failed".into(), &"cancelled".into()));
    nothing_is_left(&here);

    let import = slowly(&here, &archive);
    here.kill();
    here.start();
    let ended = state(&here, &import);
    assert_eq!(ended["state"], "failed");
    assert!(ended["error"].as_str().unwrap().contains("keepd stopped while it was imported"), "{ended}");
    nothing_is_left(&here);
    here.ok(&["check", "local", "--read-data"]);
    let before: u64 = here.packs().iter().map(|p| fs::metadata(p).unwrap().len()).sum();
    assert!(before > 1 << 20);
    here.ok(&["prune", "local"]);
    here.ok(&["prune", "local"]);
    let after: u64 = here.packs().iter().map(|p| fs::metadata(p).unwrap().len()).sum();
    assert_eq!(after, 0, "what was stored of it is freed");
    // And it can be imported whole after that.
    here.ok(&["import", str(&archive)]);
    assert_same(&there.path("files"), &here.restored("latest").join("files"));
    let _ = id;
}

#[test]
fn several_are_imported_at_once() {
    let (there, id) = origin();
    let archive = export(&there, "shop.tar", &[]);
    let mut here = Keepd::prepared();
    let d = here.dir.path().display();
    here.configure(&format!("[destination.other]\nservice = \"fs\"\nroot = \"{d}/other\"\nencryption = \"main\""), "");
    here.start();
    let begin = |to: &str| {
        here.json(&["import", str(&archive), "--bandwidth", "8MiB/s", "--detach", "--destination", to])["import"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let imports = [begin("local"), begin("other")];
    until(&here, "both work", || imports.iter().all(|i| state(&here, i)["step"] == "Importing files"));
    for import in &imports {
        assert_eq!(settled(&here, import)["state"], "completed");
    }
    let list = here.json(&["list"]);
    assert_eq!((list.as_array().unwrap().len(), &list[0]["id"]), (1, &id.into()));
    assert_eq!(list[0]["destinations"].as_array().unwrap().len(), 2);
    assert!(here.fails(2, &["import", str(&archive)]).contains("--destination"));
}

#[test]
fn damaged_and_hostile_archives_are_named_and_leave_nothing() {
    let (there, _) = origin();
    let plain = fs::read(export(&there, "shop.tar", &[])).unwrap();
    let sealed = fs::read(export(&there, "shop.tar.zst.enc", &[])).unwrap();
    let key = there.path("shop.tar.zst.enc.key");
    let here = another();
    let mut watch = Client::watching(&here);
    let mut refuse = |name: &str, bytes: &[u8], wanted: &[&str], more: &[&str]| {
        fs::write(here.path(name), bytes).unwrap();
        let said = here.fails(1, &[&["import", str(&here.path(name))], more].concat());
        assert!(wanted.iter().any(|w| said.contains(w)), "{name}: {said}");
        let ended = watch.completed();
        assert_eq!(
            (&ended["state"], ended["error"].as_str().is_some_and(|e| said.contains(e))),
            (&"failed".into(), true),
            "{name}: {ended} {said}"
        );
        nothing_is_left(&here);
    };
    refuse("truncated.tar", &plain[..plain.len() / 2], &["cut off"], &[]);
    refuse("without-end.tar", &plain[..plain.len() - 1024], &["cut off"], &[]);
    let find = |wanted: &[u8]| plain.windows(wanted.len()).position(|w| w == wanted).unwrap();
    let mut changed = plain.clone();
    changed[find(&noise(9 << 20, 99)[..64]) + 5_000_000] ^= 1;
    refuse("changed.tar", &changed, &["SHA-256"], &[]);
    let mut other = plain.clone();
    let at = find(b"\"backup\":\"") + 10;
    other[at] = b'x';
    refuse("no-id.tar", &other, &["is no id of a backup", "damaged"], &[]);
    let mut later = plain.clone();
    let at = find(b"\"format\":1") + 9;
    later[at] = b'2';
    refuse("later.tar", &later, &["format 2"], &[]);
    refuse("twice.tar", &[plain.as_slice(), plain.as_slice()].concat(), &["follows the end"], &[]);
    refuse("text.tar", &b"this is no archive at all, it is a text\n".repeat(100), &["tar"], &[]);
    refuse("empty.tar", b"", &["cut off", "archive"], &[]);
    let key = ["--key", str(&key)];
    refuse("truncated.enc", &sealed[..sealed.len() - 100], &["archive"], &key);
    let mut changed = sealed.clone();
    let middle = changed.len() / 2;
    changed[middle] ^= 1;
    refuse("changed.enc", &changed, &["archive"], &key);
    refuse("large.tar", &plain, &["allow"], &["--max-size", "1MiB"]);
    here.ok(&["check", "local"]);
}

fn member(builder: &mut tar::Builder<Vec<u8>>, path: &str, kind: tar::EntryType, contents: &[u8], link: &str) {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(if kind == tar::EntryType::Directory { 0o750 } else { 0o640 });
    header.set_uid(1234);
    header.set_gid(1234);
    header.set_mtime(1_700_000_000);
    header.set_size(contents.len() as u64);
    // As it is, whatever it is.
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    builder.append(&header, contents).unwrap();
}

#[test]
fn any_tar_becomes_a_backup_of_a_job() {
    use tar::EntryType as T;
    let keepd = another();
    let mut tar = tar::Builder::new(Vec::new());
    let large = [noise(300_000, 4), vec![0; 3 << 20], noise(300_000, 5)].concat();
    member(&mut tar, "./z/last", T::Regular, b"z", "");
    member(&mut tar, "./m/large", T::Regular, &large, "");
    member(&mut tar, "./a/first-name", T::Link, b"", "./m/large");
    member(&mut tar, "./a.txt", T::Regular, b"a", "");
    member(&mut tar, "./a", T::Directory, b"", "");
    member(&mut tar, "./link", T::Symlink, b"", "/etc/passwd");
    member(&mut tar, "./empty/", T::Directory, b"", "");
    // As GNU tar has a symlink of several names.
    member(&mut tar, "./link-too", T::Link, b"", "./link");
    member(&mut tar, "./link-three", T::Link, b"", "./link-too");
    let bytes = tar.into_inner().unwrap();
    fs::write(keepd.path("their.tar"), &bytes).unwrap();
    let archive = keepd.path("their.tar");
    let said = keepd.fails(1, &["import", str(&archive), "--job", "shop"]);
    assert!(said.contains("not made by keepd"), "{said}");
    keepd.fails(2, &["import", str(&archive), "--from", "tar"]);
    nothing_is_left(&keepd);
    keepd.ok(&["import", str(&archive), "--from", "tar", "--job", "shop", "--validate-only"]);
    nothing_is_left(&keepd);
    keepd.ok(&["import", str(&archive), "--from", "tar", "--job", "shop", "--time", "2024-02-03T04:05:06Z", "--name", "theirs"]);
    let backup = &keepd.json(&["list"])[0];
    assert_eq!((&backup["type"], &backup["time"], &backup["name"]), (&"imported".into(), &"2024-02-03T04:05:06Z".into(), &"theirs".into()));
    assert_eq!(backup["sources"], json!(["files"]));
    let entries = keepd.json(&["ls", "latest", "files", "--recursive"]);
    let paths: Vec<&str> = entries.as_array().unwrap().iter().map(|e| e["path"]["path"].as_str().unwrap()).collect();
    assert_eq!(
        paths,
        [
            "files",
            "files/a",
            "files/a/first-name",
            "files/a.txt",
            "files/empty",
            "files/link",
            "files/link-three",
            "files/link-too",
            "files/m",
            "files/m/large",
            "files/z",
            "files/z/last"
        ]
    );
    keepd.ok(&["check", "local", "--read-data"]);
    let to = keepd.restored("latest").join("files");
    assert!(fs::read(to.join("m/large")).unwrap() == large && fs::read(to.join("a/first-name")).unwrap() == large);
    assert_eq!(fs::metadata(to.join("m/large")).unwrap().ino(), fs::metadata(to.join("a/first-name")).unwrap().ino());
    assert_eq!(fs::metadata(to.join("a")).unwrap().mode() & 0o7777, 0o750);
    assert_eq!(fs::metadata(to.join("z")).unwrap().mode() & 0o7777, 0o755, "made up");
    for link in ["link", "link-too", "link-three"] {
        assert_eq!(fs::read_link(to.join(link)).unwrap(), Path::new("/etc/passwd"));
    }

    let before = keepd.backups();
    let refuse = |name: &str, wanted: &str, make: &dyn Fn(&mut tar::Builder<Vec<u8>>)| {
        let mut tar = tar::Builder::new(Vec::new());
        member(&mut tar, "fine", T::Regular, b"fine", "");
        make(&mut tar);
        fs::write(keepd.path(name), tar.into_inner().unwrap()).unwrap();
        let said = keepd.fails(1, &["import", str(&keepd.path(name)), "--from", "tar", "--job", "shop"]);
        assert!(said.contains(wanted), "{name}: {said}");
        assert_eq!(keepd.backups(), before, "{name}");
    };
    refuse("twice.tar", "twice", &|t| member(t, "./fine", T::Regular, b"other", ""));
    refuse("up.tar", "..", &|t| member(t, "a/../../up", T::Regular, b"x", ""));
    refuse("absolute.tar", "absolute", &|t| member(t, "/etc/cron.d/x", T::Regular, b"x", ""));
    refuse("device.tar", "device", &|t| member(t, "disk", T::Block, b"", ""));
    refuse("fifo.tar", "fifo", &|t| member(t, "pipe", T::Fifo, b"", ""));
    refuse("out.tar", "hard link", &|t| member(t, "shadow", T::Link, b"", "../../etc/shadow"));
    refuse("later.tar", "hard link", &|t| member(t, "later", T::Link, b"", "not-yet"));
    refuse("below.tar", "no directory", &|t| member(t, "fine/below", T::Regular, b"x", ""));
    // A pipe whose other side stopped in the middle.
    let mut child =
        keepd.ctl_command(&["import", "-", "--from", "tar", "--job", "shop"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&bytes[..bytes.len() - 2000]).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(!out.status.success() && text(&out).contains("cut off"), "{}", text(&out));
    assert_eq!(keepd.backups(), before);
}

#[test]
fn a_directory_is_read_by_tar_which_must_not_fail() {
    let (there, _) = origin();
    let files = there.path("files");
    let keepd = another();
    keepd.ok(&["import", str(&files), "--job", "shop"]);
    assert_same(&files, &keepd.restored("latest").join("files"));
    let before = keepd.backups();
    // It writes a whole archive, and says that something could not be read.
    let bin = keepd.path("bin");
    fs::create_dir(&bin).unwrap();
    let script = |code: u32| {
        fs::write(
            bin.join("tar"),
            format!("#!/bin/sh\n/usr/bin/tar -C \"$2\" -cf - .\necho 'tar: ./secret: Cannot open' >&2\nexit {code}\n"),
        )
        .unwrap();
        fs::set_permissions(bin.join("tar"), fs::Permissions::from_mode(0o755)).unwrap();
    };
    let import = || {
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
        keepd.ctl_command(&["import", str(&files), "--from", "directory", "--job", "shop"]).env("PATH", path).output().unwrap()
    };
    script(2);
    let out = import();
    assert_eq!(out.status.code(), Some(1), "{}", text(&out));
    assert!(text(&out).contains("Cannot open"), "{}", text(&out));
    assert_eq!(keepd.backups(), before);
    script(1);
    let out = import();
    assert_eq!(out.status.code(), Some(3), "{}", text(&out));
    assert!(text(&out).contains("Cannot open") && keepd.backups().len() == before.len() + 1, "{}", text(&out));
    script(0);
    let out = import();
    assert_eq!(out.status.code(), Some(0), "{}", text(&out));
    assert!(text(&out).contains("Cannot open") && keepd.backups().len() == before.len() + 2, "{}", text(&out));
}

#[test]
fn a_snapshot_of_restic_comes_through_a_pipe() {
    let (there, _) = origin();
    let files = there.path("files");
    let restic = |arguments: &[&str]| {
        let mut command = Command::new("restic");
        command
            .args(arguments)
            .env("RESTIC_REPOSITORY", there.path("restic"))
            .env("RESTIC_PASSWORD", "a long password")
            .env("HOME", there.dir.path());
        command
    };
    let run = |arguments: &[&str]| {
        let out = restic(arguments).current_dir(&files).output().expect("restic: run 'sh tests/install-tools.sh test' first");
        assert!(out.status.success(), "{}", text(&out));
    };
    run(&["init"]);
    run(&["backup", "."]);
    let keepd = another();
    let mut dump = restic(&["dump", "--archive", "tar", "latest", "/"]).stdout(Stdio::piped()).spawn().unwrap();
    let out = keepd.ctl_command(&["import", "-", "--job", "shop", "--from", "tar"]).stdin(dump.stdout.take().unwrap()).output().unwrap();
    assert!(dump.wait().unwrap().success() && out.status.success(), "{}", text(&out));
    let to = keepd.restored("latest").join("files");
    for name in ["long", "deep/small-77", "sparse", "zzz"] {
        assert!(fs::read(to.join(name)).unwrap() == fs::read(files.join(name)).unwrap(), "{name}");
    }
    // One that was cut off is none.
    let before = keepd.backups();
    let mut dump = restic(&["dump", "--archive", "tar", "latest", "/"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut first = vec![0; 1 << 20];
    dump.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    dump.kill().unwrap();
    dump.wait().unwrap();
    let mut child =
        keepd.ctl_command(&["import", "-", "--from", "tar", "--job", "shop"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&first).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(!out.status.success() && text(&out).contains("cut off"), "{}", text(&out));
    assert_eq!(keepd.backups(), before);
}

#[test]
fn an_imported_backup_stays_and_counts_for_nothing() {
    let (there, id) = origin();
    let archive = export(&there, "shop.tar.zst", &[]);
    let mut here = Keepd::prepared();
    here.configure(
        "prune_grace = \"0s\"",
        "retention = { keep_last = 1 }\nmax_age = \"1d\"\nsuspect = { smaller = 0, fewer_rows = 0, fewer_files = 0 }",
    );
    make_database(&here.path("shop.db"), 5);
    here.start();
    here.ok(&["import", str(&archive)]);
    let job =
        |keepd: &Keepd| -> Value { serde_json::from_slice::<Value>(&keepd.ctl(&["status", "--json"]).stdout).unwrap()["jobs"][0].clone() };
    assert_eq!(job(&here)["last_good"], Value::Null, "the job itself made none");
    assert_eq!(here.json(&["show", "latest"])["id"], json!(id), "there is no other");
    here.ok(&["backup", "shop"]);
    let own = here.json(&["show", "latest"])["id"].as_str().unwrap().to_owned();
    assert_ne!(own, id);
    assert_eq!(here.json(&["show", "latest"])["parent"], Value::Null, "it is not built upon the imported one");
    here.ok(&["backup", "shop"]);
    let backups = here.backups();
    assert!(backups.len() == 2 && backups.contains(&id) && !backups.contains(&own), "{backups:?}");
    let told = here.ok(&["retention", "shop"]);
    assert!(told.contains("imported: kept until it is deleted"), "{told}");
    here.ok(&["delete", &id, "--yes"]);
    assert_eq!(here.backups().len(), 1);
}

#[test]
fn the_client_of_the_document_imports() {
    let document = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/importing.md")).unwrap();
    let program = document.split("```python\n").nth(1).unwrap().split("```").next().unwrap();
    let (there, id) = origin();
    let archive = export(&there, "shop.tar.gz", &[]);
    let here = another();
    let program = program.replace("/run/keepd/keepd.sock", str(&here.path("keepd.sock"))).replace("shop.tar.gz", str(&archive));
    let out = Command::new(python()).args(["-c", &program]).output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    let said = text(&out);
    assert!(said.contains("'backups': 1"), "{said}");
    assert_eq!(here.backups(), [id]);
}

#[test]
fn an_archive_for_a_public_key_opens_with_the_private_one() {
    let mut there = Keepd::prepared();
    let made = Command::new(keepd_binary()).args(["key", "generate", "--pair"]).arg(there.path("read")).output().unwrap();
    assert!(made.status.success(), "{}", text(&made));
    let config = fs::read_to_string(there.path("keepd.toml")).unwrap();
    let further = "[encryption.away]\nkey_file = \"main.key\"\npublic_key = \"read.pub\"\n[destination.local]";
    fs::write(there.path("keepd.toml"), config.replace("[destination.local]", further)).unwrap();
    make_database(&there.path("shop.db"), 50);
    there.start();
    there.ok(&["backup", "shop"]);
    let archive = export(&there, "shop.tar.zst.enc", &["--encryption", "away"]);
    let here = another();
    for without in [&["import", str(&archive)][..], &["import", str(&archive), "--key", str(&there.path("main.key"))]] {
        let said = here.fails(1, without);
        assert!(said.contains("private key"), "{said}");
        nothing_is_left(&here);
    }
    here.ok(&["import", str(&archive), "--key", str(&there.path("read"))]);
    assert_eq!(proven_sum(&here.restored("latest").join("db/shop.db")), 5_000);
}

/// An archive as it is written while its contents are captured: what is in it stands at its end.
#[test]
fn an_archive_that_was_streamed_is_imported_too() {
    use keepd::crypto::{Profile, ProfileKey, key_file};
    use keepd::portable::head::{Contents, Head, Origin, Source, Tail, Totals};
    use keepd::portable::{ArchiveWriter, Packing, write};
    use keepd_protocol::model::{BytesPath, EntryKind};
    use keepd_protocol::restore::EntryHeader;
    let here = another();
    let key = key_file::load(&here.path("main.key")).unwrap();
    let profile = Profile::of("streamed", ProfileKey::Key(std::sync::Arc::new(key)));
    let source = Source { name: "files".into(), kind: "files".into(), place: BytesPath::from("/srv/files"), ..Source::default() };
    let id = "ab".repeat(32);
    let make = |name: &str, outcome: &str, cut: bool| {
        let options =
            write::Options { packing: Packing::Gzip, seal: Some(&profile), work_dir: here.dir.path(), cancel: Default::default() };
        let head = Head {
            format: 1,
            archive: "0123456789abcdef0123456789abcdef".into(),
            created: "2026-01-01T00:00:00Z".into(),
            contents: Contents::Last,
            origin: Origin {
                backup: id.clone(),
                job: "shop".into(),
                started: "2026-01-01T00:00:00Z".into(),
                r#type: "scheduled".into(),
                ..Origin::default()
            },
            sources: vec![source.clone()],
            ..Head::default()
        };
        let file = fs::File::create(here.path(name)).unwrap();
        let mut writer = ArchiveWriter::create(file, &options, &head, None).unwrap();
        let mut totals = Totals::default();
        let mut entry = |path: &str, kind, size| {
            let header = EntryHeader { path: BytesPath::from(path), kind, mode: 0o755, size, ..EntryHeader::default() };
            totals.count(&header);
            header
        };
        writer.entry(&entry("files", EntryKind::Directory, 0)).unwrap();
        writer.entry(&entry("files/a", EntryKind::File, 3)).unwrap();
        writer.contents(b"abc").unwrap();
        writer.entry(&entry("files/b", EntryKind::File, 300_000)).unwrap();
        writer.zeros(299_999).unwrap();
        writer.contents(b"!").unwrap();
        let Totals { entries, files, directories, bytes } = totals;
        let facts = std::collections::BTreeMap::from([("found".to_owned(), json!("at the end"))]);
        let tail = Tail {
            archive: head.archive.clone(),
            finished: "2026-01-01T00:01:00Z".into(),
            outcome: outcome.into(),
            sources: vec![Source { entries, files, directories, bytes, facts, ..source.clone() }],
            totals,
            left_out: 2,
            version: Some("7.1".into()),
            ..Tail::default()
        };
        if !cut {
            writer.finish(Some(&tail)).unwrap();
        }
        here.path(name)
    };
    // Whoever wrote it died: what is there is no archive.
    let cut = make("cut.tar.gz.enc", "good", true);
    let said = here.fails(1, &["import", str(&cut)]);
    assert!(said.contains("the archive is not imported"), "{said}");
    nothing_is_left(&here);
    here.ok(&["import", str(&make("whole.tar.gz.enc", "suspect", false))]);
    let backup = &here.json(&["list"])[0];
    assert_eq!((&backup["id"], &backup["outcome"], &backup["partial"]), (&id.clone().into(), &"suspect".into(), &true.into()));
    assert_eq!((&backup["version"], &backup["bytes"]), (&"7.1".into(), &300_003.into()));
    let shown: Value = serde_json::from_slice(&here.ctl(&["show", &id, "--json"]).stdout).unwrap();
    assert_eq!(shown["sources"][0]["facts"]["found"], "at the end");
    let to = here.restored(&id);
    assert_eq!(fs::read(to.join("files/b")).unwrap(), [vec![0; 299_999], b"!".to_vec()].concat());
}

/// What came out of a golden archive: paths with their SHA-256, sorted.
fn sums(dir: &Path) -> String {
    let mut lines: Vec<String> = files_below(dir)
        .iter()
        .filter(|path| path.symlink_metadata().unwrap().is_file())
        .map(|path| {
            let sum = Command::new("sha256sum").stdin(fs::File::open(path).unwrap()).output().unwrap().stdout;
            format!("{}  {}", String::from_utf8(sum).unwrap().split(' ').next().unwrap(), path.strip_prefix(dir).unwrap().display())
        })
        .collect();
    lines.sort();
    lines.join("\n") + "\n"
}

/// The archives in tests/golden-archives were made by `make_golden_archives` below with earlier versions; they must be importable forever.
#[test]
fn golden_archives_come_in() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden-archives");
    let expected = fs::read_to_string(golden.join("SHA256SUMS")).unwrap();
    let mut seen = 0;
    for entry in fs::read_dir(&golden).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let Some(kind) = name.strip_suffix(".enc").or(Some(&name)).filter(|n| n.contains(".tar")) else { continue };
        let here = another();
        let key = golden.join(format!("{}.key", kind.split('.').next().unwrap()));
        let mut command = vec!["import".to_owned(), entry.path().display().to_string()];
        if key.exists() {
            let copy = here.path("golden.key");
            fs::copy(&key, &copy).unwrap();
            fs::set_permissions(&copy, fs::Permissions::from_mode(0o600)).unwrap();
            command.extend(["--key".to_owned(), copy.display().to_string()]);
        }
        here.ok(&command.iter().map(String::as_str).collect::<Vec<_>>());
        let out = here.restored(&here.backups()[0]);
        assert_eq!(sums(&out), expected, "{name}");
        let decoded = here.path("decoded");
        let mut decoder = Command::new(python());
        decoder.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("kit/keepd_decoder.py")).arg(entry.path());
        if key.exists() {
            decoder.arg("--key").arg(here.path("golden.key"));
        }
        let said = decoder.arg("restore").arg(&decoded).output().unwrap();
        assert!(said.status.success(), "{name}: {}", text(&said));
        assert_eq!(sums(&decoded), expected, "{name}");
        seen += 1;
    }
    assert!(seen >= 4, "{seen} golden archives");
}

/// Makes new golden archives: `GOLDEN=DIR cargo test --test import make_golden -- --ignored`.
#[test]
#[ignore = "makes fixtures"]
fn make_golden_archives() {
    let to = PathBuf::from(std::env::var_os("GOLDEN").expect("GOLDEN=DIR"));
    fs::create_dir_all(&to).unwrap();
    let mut there = Keepd::prepared();
    make_database(&there.path("shop.db"), 50);
    fs::create_dir_all(there.path("files/deep")).unwrap();
    fs::write(there.path("files/deep/note"), "golden\n").unwrap();
    fs::write(there.path("files/long"), noise(70_000, 3).repeat(3)).unwrap();
    fs::write(there.path("files/\u{fc}ml\u{e4}ut"), "").unwrap();
    fs::hard_link(there.path("files/long"), there.path("files/other")).unwrap();
    std::os::unix::fs::symlink("long", there.path("files/symlink")).unwrap();
    let made = Command::new(keepd_binary()).args(["key", "generate", "--pair"]).arg(there.path("read")).output().unwrap();
    assert!(made.status.success());
    there.start();
    there.ok(&["backup", "shop"]);
    let archive = |name: &str| there.path(name).display().to_string();
    there.ok(&["export", "latest", "-o", &archive("plain.tar.gz")]);
    there.ok(&["export", "latest", "-o", &archive("sealed.tar.zst.enc"), "--key-output", &archive("sealed.key")]);
    fs::write(to.join("SHA256SUMS"), sums(&there.restored("latest"))).unwrap();
    // While they are captured, for a key and for a pair.
    let toml = fs::read_to_string(there.path("keepd.toml")).unwrap();
    let captured = |name: &str, encryption: &str, key: &str| {
        let root = there.path(name).display().to_string();
        let more = format!(
            "[destination.{name}]\nservice = \"fs\"\nroot = \"{root}\"\nlayout = \"archive\"\nencryption = \"{name}\"\n[encryption.{name}]\n{encryption}\n"
        );
        let text = toml.replace("destinations = [\"local\"]", &format!("destinations = [\"{name}\"]")) + &more;
        assert_ne!(text, toml.clone() + &more, "the job goes there");
        fs::write(there.path("keepd.toml"), text).unwrap();
        there.ok(&["reload"]);
        there.ok(&["backup", "shop"]);
        let made = files_below(&there.path(name)).into_iter().find(|p| p.extension().is_some_and(|e| e == "enc")).unwrap();
        fs::copy(made, to.join(format!("{name}.tar.zst.enc"))).unwrap();
        fs::copy(there.path(key), to.join(format!("{name}.key"))).unwrap();
    };
    let main = format!("key_file = \"{}\"", archive("main.key"));
    captured("captured", &main, "main.key");
    captured("pair", &format!("{main}\npublic_key = \"{}\"", archive("read.pub")), "read");
    for name in ["plain.tar.gz", "sealed.tar.zst.enc", "sealed.key"] {
        fs::copy(there.path(name), to.join(name)).unwrap();
    }
}
