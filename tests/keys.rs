//! Keys through the real binaries: slots listed, added and removed, a key exchanged (also interrupted), recovery kits, and what lies in `keys/`
//! that nobody of us put there.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use common::*;
use serde_json::Value;

/// A keepd with two destinations of profile main, and a backup on both.
fn two_places() -> Keepd {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 200);
    fs::write(keepd.path("files/note.txt"), "a note").unwrap();
    configure(&keepd, "# the key\nkey_file = \"main.key\" # since ever\n");
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    keepd
}

/// The configuration with these lines of the profile.
fn configure(keepd: &Keepd, profile: &str) {
    let d = keepd.dir.path().display().to_string();
    let usb = format!("[destination.usb]\nservice = \"fs\"\nroot = \"{d}/usb\"\nencryption = \"main\"");
    keepd.configure(&usb, "");
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let text =
        text.replace("key_file = \"main.key\"\n", profile).replace("destinations = [\"local\"]", "destinations = [\"local\", \"usb\"]");
    fs::write(keepd.path("keepd.toml"), text).unwrap();
}

fn slots(keepd: &Keepd, destination: &str) -> Vec<Value> {
    let found = keepd.json(&["key", "list", destination]);
    found["destinations"][0]["slots"].as_array().unwrap().clone()
}

fn opening(keepd: &Keepd, destination: &str, how: &str) -> Vec<String> {
    let all = slots(keepd, destination);
    all.iter().filter(|s| s["opens"] == how).map(|s| s["id"].as_str().unwrap().to_owned()).collect()
}

fn slot_files(keepd: &Keepd, repository: &str) -> Vec<PathBuf> {
    files_below(&keepd.path(repository).join("keys"))
}

fn fingerprint(keepd: &Keepd, key: &str) -> String {
    let text = fs::read_to_string(keepd.path(key)).unwrap();
    text.split("fingerprint ").nth(1).unwrap()[..16].to_owned()
}

/// Whether a keepd with this key alone opens the destination: it has no state of the first one.
fn opens_with(keepd: &Keepd, key: &str) -> Result<(), String> {
    let mut other = Keepd::prepared();
    let text = fs::read_to_string(other.path("keepd.toml")).unwrap();
    let own = other.path("repository").display().to_string();
    let text = text.replace(&own, &keepd.path("repository").display().to_string());
    let text = text.replace("key_file = \"main.key\"", &format!("key_file = \"{}\"", keepd.path(key).display()));
    fs::write(other.path("keepd.toml"), text).unwrap();
    make_database(&other.path("shop.db"), 1);
    other.start();
    let out = other.ctl(&["check", "local"]);
    other.stop();
    match out.status.success() {
        true => Ok(()),
        false => Err(text_of(&out)),
    }
}

fn text_of(out: &std::process::Output) -> String {
    text(out)
}

fn brings_back(keepd: &Keepd) {
    let to = keepd.restored("latest");
    assert_eq!(fs::read_to_string(to.join("files/note.txt")).unwrap(), "a note");
    assert_eq!(proven_sum(&to.join("db/shop.db")), 20_000);
}

/// No digit of a key in anything that was said.
fn keeps_quiet(keepd: &Keepd, said: &str, keys: &[&str]) {
    for key in keys {
        let text = fs::read_to_string(keepd.path(key)).unwrap();
        let digits = text.lines().find_map(|l| l.strip_prefix("keepd-key-1 ")).unwrap()[..24].to_owned();
        assert!(!said.contains(&digits) && !keepd.log().contains(&digits), "{key} was told: {said}");
    }
}

#[test]
fn keys_are_listed_added_and_removed() {
    let keepd = two_places();
    keepd.generate_key("partner.key");
    let (main, partner) = (fingerprint(&keepd, "main.key"), fingerprint(&keepd, "partner.key"));
    let found = keepd.json(&["key", "list"]);
    let profile = &found["profiles"][0];
    assert_eq!((profile["name"].as_str(), profile["kind"].as_str()), (Some("main"), Some("key_file")));
    assert_eq!(profile["fingerprint"].as_str(), Some(main.as_str()));
    assert_eq!(found["destinations"].as_array().unwrap().len(), 2);
    assert_eq!(keepd.json(&["destination", "list"])[0]["fingerprint"].as_str(), Some(main.as_str()));
    assert!(keepd.ok(&["destination", "list"]).contains(&format!("main ({main})")));
    let own = opening(&keepd, "local", "current");
    assert_eq!(own.len(), 1);

    // The last one that opens stays.
    let told = keepd.fails(1, &["key", "remove", "local", &own[0], "--yes"]);
    assert!(told.contains("no other slot opens with the profile's present key"), "{told}");
    assert!(!keepd.json(&["destination", "list"]).to_string().contains("no other slot"), "a refusal is no trouble of the destination");
    let key = keepd.path("partner.key").display().to_string();
    assert!(opens_with(&keepd, "partner.key").unwrap_err().contains(&partner));
    let told = keepd.ok(&["key", "add", "local", "--key", &key]);
    assert!(told.contains("was added, read back and opened"), "{told}");
    let again = keepd.ok(&["key", "add", "local", "--key", &key]);
    assert!(again.contains("is there already"), "{again}");
    opens_with(&keepd, "partner.key").unwrap();
    let table = keepd.ok(&["key", "list", "local"]);
    assert!(table.contains("partner.key") && table.contains(&partner) && table.contains("yes, with the key of main"), "{table}");
    // What is opened by a key of somebody else is no proof.
    let told = keepd.fails(1, &["key", "remove", "local", &own[0], "--yes"]);
    assert!(told.contains("nothing is removed"), "{told}");
    let theirs = opening(&keepd, "local", "no").remove(0);
    assert!(keepd.fails(2, &["key", "remove", "local", &theirs]).contains("--yes"));
    assert!(keepd.fails(1, &["key", "remove", "local", "zz", "--yes"]).contains("no key slot whose id starts with 'zz'"));
    assert!(keepd.fails(1, &["key", "remove", "cellar", "aa", "--yes"]).contains("no destination 'cellar'"));
    let told = keepd.ok(&["key", "remove", "local", &theirs[..6], "--yes"]);
    assert!(told.contains(&format!("{} opens it", own[0])), "{told}");
    assert!(opens_with(&keepd, "partner.key").is_err());
    let runs = keepd.json(&["run", "list"]).to_string();
    assert!(runs.contains("\"key\""), "{runs}");

    // A key file that is none, open to others, cut off, or missing.
    fs::write(keepd.path("half.key"), &fs::read(&key).unwrap()[..150]).unwrap();
    fs::set_permissions(keepd.path("half.key"), fs::Permissions::from_mode(0o600)).unwrap();
    let told = keepd.fails(1, &["key", "add", "local", "--key", keepd.path("half.key").to_str().unwrap()]);
    assert!(told.contains("truncated") || told.contains("not a key file"), "{told}");
    assert!(keepd.fails(1, &["key", "add", "local", "--key", "/nowhere.key"]).contains("keepd key generate /nowhere.key"));
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(keepd.fails(1, &["key", "add", "local", "--key", &key]).contains("chmod 600"));
    keeps_quiet(&keepd, &format!("{told}{table}{again}"), &["main.key", "partner.key"]);
    brings_back(&keepd);

    // One that does not answer is an error, not an empty list.
    fs::rename(keepd.path("usb"), keepd.path("away")).unwrap();
    let out = keepd.ctl(&["key", "list"]);
    assert_eq!(out.status.code(), Some(3), "{}", text_of(&out));
    assert!(text_of(&out).contains("the key slots of usb are not known"), "{}", text_of(&out));
    assert!(keepd.fails(1, &["key", "list", "usb"]).contains("is the disk mounted?"));
}

#[test]
fn a_key_is_exchanged_everywhere_and_the_old_one_opens_nothing() {
    let mut keepd = two_places();
    let new = keepd.path("new.key").display().to_string();
    let before = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    assert!(keepd.fails(1, &["key", "rotate", "main", "--to", &new]).contains(&format!("keepd key generate {new}")));
    keepd.generate_key("new.key");
    assert!(keepd.fails(1, &["key", "rotate", "other", "--to", &new]).contains("no encryption profile 'other'"));

    // A destination that does not answer: nothing is changed in the configuration.
    fs::rename(keepd.path("usb"), keepd.path("away")).unwrap();
    let told = keepd.fails(1, &["key", "rotate", "main", "--to", &new]);
    assert!(told.contains("stays with the old one") && told.contains("destination usb"), "{told}");
    assert_eq!(fs::read_to_string(keepd.path("keepd.toml")).unwrap(), before);
    fs::rename(keepd.path("away"), keepd.path("usb")).unwrap();
    opens_with(&keepd, "main.key").unwrap();

    // A reload that is refused: the text is put back.
    fs::create_dir(keepd.path("conf.d")).unwrap();
    fs::write(keepd.path("conf.d/odd.toml"), "[job.odd]\nshedule = 1\n").unwrap();
    let told = keepd.fails(1, &["key", "rotate", "main", "--to", &new]);
    assert!(told.contains("it is as it was") && told.contains("odd.toml"), "{told}");
    assert_eq!(fs::read_to_string(keepd.path("keepd.toml")).unwrap(), before);
    fs::remove_file(keepd.path("conf.d/odd.toml")).unwrap();

    fs::set_permissions(keepd.path("keepd.toml"), fs::Permissions::from_mode(0o640)).unwrap();
    let out = keepd.ctl(&["key", "rotate", "main", "--to", &new]);
    let told = text_of(&out);
    assert!(out.status.success(), "{told}");
    assert!(
        told.contains("-key_file = \"main.key\" # since ever") && told.contains(&format!("+key_file = \"{new}\" # since ever")),
        "{told}"
    );
    assert!(told.contains("Recovery kits made before have the old key") && told.contains("keepctl key kit main -o FILE"), "{told}");
    let after = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    assert!(after.contains("# the key\nkey_file") && after.contains("retired = [\"main.key\"]"), "{after}");
    assert_eq!(fs::metadata(keepd.path("keepd.toml")).unwrap().permissions().mode() & 0o7777, 0o640);
    for (destination, repository) in [("local", "repository"), ("usb", "usb")] {
        assert_eq!(opening(&keepd, destination, "current").len(), 1);
        assert_eq!(slot_files(&keepd, repository).len(), 1, "the old slot is gone at {destination}");
    }
    let old = opens_with(&keepd, "main.key").unwrap_err();
    assert!(old.contains(&fingerprint(&keepd, "main.key")) && old.contains(&fingerprint(&keepd, "new.key")), "{old}");
    opens_with(&keepd, "new.key").unwrap();
    // Once more: nothing is left to do.
    let again = keepd.ok(&["key", "rotate", "main", "--to", &new]);
    assert!(again.contains("no key slot of the old key is there"), "{again}");
    assert_eq!(fs::read_to_string(keepd.path("keepd.toml")).unwrap(), after);
    keepd.ok(&["backup", "shop"]);
    keepd.stop();
    keepd.start();
    brings_back(&keepd);
    keeps_quiet(&keepd, &told, &["main.key", "new.key"]);

    // --keep-old, and a retired key opens what the present one does not.
    keepd.generate_key("third.key");
    let third = keepd.path("third.key").display().to_string();
    keepd.ok(&["key", "rotate", "main", "--to", &third, "--keep-old"]);
    assert_eq!((opening(&keepd, "local", "current").len(), opening(&keepd, "local", "retired").len()), (1, 1));
    let own = opening(&keepd, "usb", "current").remove(0);
    fs::remove_file(keepd.path("usb/keys").join(format!("{own}.json"))).unwrap();
    keepd.ok(&["check", "usb"]);
    assert!(keepd.ok(&["key", "list", "usb"]).contains("yes, with a retired key of main"));
    keepd.ok(&["key", "add", "usb", "--profile", "main"]);
    assert_eq!(opening(&keepd, "usb", "current").len(), 1);
    keepd.ok(&["key", "rotate", "main", "--to", &third]);
    assert_eq!((slot_files(&keepd, "repository").len(), slot_files(&keepd, "usb").len()), (1, 1));
    brings_back(&keepd);
}

#[test]
fn a_passphrase_is_exchanged_for_a_key_file_and_a_file_that_is_not_ours_is_told() {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 200);
    fs::write(keepd.path("files/note.txt"), "a note").unwrap();
    fs::write(keepd.path("phrase"), "correct horse battery staple\n").unwrap();
    configure(&keepd, "passphrase = { file = \"phrase\" }\n");
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    assert_eq!(keepd.json(&["key", "list"])["profiles"][0]["kind"], "passphrase");
    assert_eq!(opening(&keepd, "local", "current").len(), 1);
    keepd.generate_key("new.key");
    let new = keepd.path("new.key").display().to_string();

    // The daemon's configuration is written by hand where keepctl may not: here a directory that is in the way stands for that.
    fs::create_dir(keepd.path("conf.d")).unwrap();
    fs::write(keepd.path("conf.d/bytes.toml"), [0xff, 0xfe]).unwrap();
    fs::rename(keepd.path("keepd.toml"), keepd.path("elsewhere.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), "[daemon]\n").unwrap();
    let told = keepd.fails(3, &["key", "rotate", "main", "--to", &new]);
    assert!(told.contains(&format!("key_file = \"{new}\"")) && told.contains("this command again"), "{told}");
    fs::remove_file(keepd.path("conf.d/bytes.toml")).unwrap();
    fs::rename(keepd.path("elsewhere.toml"), keepd.path("keepd.toml")).unwrap();
    assert_eq!(slots(&keepd, "local").len(), 2, "both open");

    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    fs::write(keepd.path("keepd.toml"), text.replace("passphrase = { file = \"phrase\" }", &format!("key_file = \"{new}\""))).unwrap();
    // Changed and not read again, as if keepctl was killed in between.
    // The configuration has no word for the passphrase any more; which slots were its is known all the same.
    keepd.ok(&["key", "rotate", "main", "--to", &new]);
    let left = slots(&keepd, "local");
    assert!(left.len() == 1 && left[0]["method"] == "key-file", "{left:?}");
    brings_back(&keepd);
    assert!(!keepd.log().contains("battery"));
}

#[test]
fn killed_anywhere_both_keys_open_and_the_same_command_finishes() {
    let mut keepd = two_places();
    let mut old = "main.key".to_owned();
    let mut killed = 0;
    for point in 1.. {
        assert!(point < 60, "it never ends");
        let new = format!("key-{point}");
        keepd.generate_key(&new);
        let path = keepd.path(&new).display().to_string();
        keepd.stop();
        keepd.environment = vec![("KEEPD_TEST_DIES_AT".into(), point.to_string())];
        keepd.start();
        let out = keepd.ctl(&["key", "rotate", "main", "--to", &path]);
        keepd.environment.clear();
        if out.status.success() {
            break;
        }
        killed += 1;
        keepd.kill();
        let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
        keepd.start();
        // Whatever the configuration names now opens it; what it named before does, too, or the new one does.
        let places = ["local", "usb"];
        assert!(places.iter().all(|d| keepd.ctl(&["check", d]).status.success()), "killed at point {point}: {}", text_of(&out));
        for place in places {
            assert!(!opening(&keepd, place, "current").is_empty(), "killed at point {point}, {place}: {text}");
        }
        keepd.ok(&["key", "rotate", "main", "--to", &path]);
        for place in places {
            assert_eq!(slots(&keepd, place).len(), 1, "killed at point {point}");
        }
        keepd.ok(&["backup", "shop"]);
        // Retired keys grow with each round; the test is not about them.
        let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
        let text: String = text.lines().filter(|l| !l.starts_with("retired")).map(|l| format!("{l}\n")).collect();
        fs::write(keepd.path("keepd.toml"), text).unwrap();
        keepd.ok(&["reload"]);
        old = new;
    }
    println!("killed at {killed} points");
    assert!(killed >= 8, "{killed}");
    assert!(opens_with(&keepd, &old).is_err());
    brings_back(&keepd);
}

#[test]
fn two_keys_of_one_name_and_what_lies_in_keys_are_told_apart() {
    let mut keepd = two_places();
    let main = fingerprint(&keepd, "main.key");
    // Another machine's key under the same name.
    keepd.stop();
    fs::rename(keepd.path("main.key"), keepd.path("first.key")).unwrap();
    keepd.generate_key("main.key");
    let second = fingerprint(&keepd, "main.key");
    keepd.start();
    let told = keepd.fails(1, &["check", "local"]);
    assert!(told.contains("encryption profile main") && told.contains(&main) && told.contains(&second), "{told}");
    let found = keepd.json(&["key", "list", "local"]);
    assert_eq!(found["profiles"][0]["fingerprint"].as_str(), Some(second.as_str()));
    assert_eq!(found["destinations"][0]["slots"][0]["fingerprint"].as_str(), Some(main.as_str()));
    assert_eq!(found["destinations"][0]["slots"][0]["opens"], "no");
    assert!(keepd.fails(1, &["key", "add", "local", "--key", keepd.path("first.key").to_str().unwrap()]).contains(&second));
    // The key file is damaged.
    let whole = fs::read(keepd.path("main.key")).unwrap();
    fs::write(keepd.path("main.key"), &whole[..whole.len() - 4]).unwrap();
    assert!(keepd.fails(1, &["check", "local"]).contains("truncated"));
    let out = keepd.ctl(&["key", "list"]);
    assert_eq!(out.status.code(), Some(3), "{}", text_of(&out));
    keepd.stop();
    fs::rename(keepd.path("first.key"), keepd.path("main.key")).unwrap();
    keepd.start();

    // What somebody put beside our slot.
    let keys = keepd.path("repository/keys");
    let own = slot_files(&keepd, "repository").remove(0);
    let slot = fs::read_to_string(&own).unwrap();
    fs::copy(slot_files(&keepd, "usb").remove(0), keys.join("0000000000000001.json")).unwrap();
    let parsed: Value = serde_json::from_str(&slot).unwrap();
    let mut none = parsed.clone();
    none["method"] = "none".into();
    none["slot"] = "0000000000000002".into();
    none["wrapped"] = "11".repeat(32).into();
    fs::write(keys.join("0000000000000002.json"), none.to_string()).unwrap();
    for n in 3..42 {
        fs::write(keys.join(format!("00000000000000{n:02}.json")), &slot[..n]).unwrap();
    }
    let listed = slots(&keepd, "local");
    assert_eq!(listed.len(), 42);
    let problem = |id: &str| listed.iter().find(|s| s["id"] == id).unwrap()["problem"].as_str().unwrap().to_owned();
    assert!(problem("0000000000000001").contains("another repository"));
    assert!(problem("0000000000000002").contains("somebody put it here"));
    assert!(problem("0000000000000003").contains("not readable"));
    keepd.ok(&["backup", "shop"]);
    keepd.ok(&["check", "local"]);
    keepd.ok(&["key", "remove", "local", "0000000000000002", "--yes"]);
    // Ours is changed by a bit, and then gone: nothing is said but that it does not open.
    for file in slot_files(&keepd, "repository").iter().filter(|f| **f != own) {
        fs::remove_file(file).unwrap();
    }
    let mut wrapped = parsed["wrapped"].as_str().unwrap().to_owned();
    wrapped.replace_range(0..1, if wrapped.starts_with('0') { "1" } else { "0" });
    let mut changed = parsed.clone();
    changed["wrapped"] = wrapped.into();
    fs::write(&own, changed.to_string()).unwrap();
    assert!(keepd.fails(1, &["check", "local"]).contains("it does not open"));
    fs::remove_file(&own).unwrap();
    assert!(keepd.fails(1, &["check", "local"]).contains("no key slot of it is there"));
    assert!(keepd.ok(&["key", "list", "local"]).contains("NO KEY SLOT IS THERE"));
    fs::write(&own, slot).unwrap();
    brings_back(&keepd);
    assert!(!keepd.log().contains("panic"), "{}", keepd.log());
}

#[test]
fn nothing_is_removed_where_nothing_may_be_and_nothing_added_where_nothing_is_secret() {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 10);
    keepd.configure("append_only = true", "");
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    keepd.generate_key("new.key");
    let new = keepd.path("new.key").display().to_string();
    keepd.ok(&["key", "add", "local", "--key", &new]);
    let other = opening(&keepd, "local", "no").remove(0);
    assert!(keepd.fails(1, &["key", "remove", "local", &other, "--yes"]).contains("append_only"));
    let told = keepd.fails(3, &["key", "rotate", "main", "--to", &new]);
    assert!(told.contains("append_only") && told.contains("the old key goes on opening it"), "{told}");
    assert_eq!(slots(&keepd, "local").len(), 2);
    keepd.ok(&["backup", "shop"]);

    let mut plain = Keepd::prepared();
    let text = fs::read_to_string(plain.path("keepd.toml")).unwrap();
    fs::write(plain.path("keepd.toml"), text.replace("encryption = \"main\"", "encryption = \"none\"")).unwrap();
    make_database(&plain.path("shop.db"), 10);
    plain.start();
    assert!(plain.ok(&["key", "list"]).contains("nothing was backed up to it yet"));
    plain.ok(&["backup", "shop"]);
    assert!(plain.ok(&["key", "list"]).contains("yes, without a key"));
    assert!(plain.fails(1, &["key", "add", "local", "--profile", "main"]).contains("is not encrypted"));
}

/// What the decoder in a kit lists of a repository.
fn decoded(kit: &std::path::Path, repository: &std::path::Path) -> String {
    let out = Command::new(python()).arg(kit).arg(repository).arg("list").stdin(Stdio::null()).output().unwrap();
    assert!(out.status.success(), "{}", text_of(&out));
    text_of(&out)
}

#[test]
fn a_kit_is_for_its_owner_alone_and_opens_the_backups() {
    let keepd = two_places();
    let id = keepd.backups()[0].clone();
    let kits = keepd.path("kits");
    fs::create_dir(&kits).unwrap();
    fs::set_permissions(&kits, fs::Permissions::from_mode(0o755)).unwrap();
    let kit = kits.join("kit.py");
    let path = kit.to_str().unwrap();
    let told = keepd.ok(&["key", "kit", "main", "-o", path]);
    assert!(told.contains(&fingerprint(&keepd, "main.key")), "{told}");
    assert_eq!(fs::metadata(&kit).unwrap().permissions().mode() & 0o7777, 0o600);
    let line = fs::read_to_string(keepd.path("main.key")).unwrap().lines().last().unwrap().to_owned();
    let text = fs::read_to_string(&kit).unwrap();
    assert!(text.contains(&line) && text.contains("[destination.\"local\"]") && text.contains("usb"), "{}", &text[..2000]);
    assert!(decoded(&kit, &keepd.path("repository")).contains(&id[..8]));
    // It may stand in for the key file.
    assert!(keepd.ok(&["key", "add", "usb", "--key", path]).contains("is there already"));
    // To standard output it is the same but for the time.
    let printed = keepd.ok(&["key", "kit", "main", "-o", "-"]);
    assert!(printed.contains(&line) && printed.len().abs_diff(text.len()) < 10);
    keeps_quiet(&keepd, &told, &["main.key"]);

    assert!(keepd.fails(1, &["key", "kit", "main", "-o", path]).contains("exists already and is never overwritten"));
    assert_eq!(fs::read_to_string(&kit).unwrap(), text);
    let inside = keepd.path("repository/kit.py");
    let told = keepd.fails(1, &["key", "kit", "main", "-o", inside.to_str().unwrap()]);
    assert!(told.contains("lies in destination local") && !inside.exists(), "{told}");
    keepd.ok(&["key", "kit", "main", "-o", inside.to_str().unwrap(), "--yes"]);
    fs::remove_file(inside).unwrap();
    fs::set_permissions(&kits, fs::Permissions::from_mode(0o777)).unwrap();
    let told = keepd.fails(1, &["key", "kit", "main", "-o", kits.join("other.py").to_str().unwrap()]);
    assert!(told.contains("others can write to the directory"), "{told}");
    fs::set_permissions(&kits, fs::Permissions::from_mode(0o1777)).unwrap();
    keepd.ok(&["key", "kit", "main", "-o", kits.join("sticky.py").to_str().unwrap()]);
    fs::set_permissions(&kits, fs::Permissions::from_mode(0o755)).unwrap();
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&kits, Some(12_345), None).unwrap();
        let told = keepd.fails(1, &["key", "kit", "main", "-o", kits.join("other.py").to_str().unwrap()]);
        assert!(told.contains("belongs to another user (uid 12345)") && !kits.join("other.py").exists(), "{told}");
        std::os::unix::fs::chown(&kits, Some(0), None).unwrap();
    }
    // What fails leaves no file.
    let failed = kits.join("failed.py");
    assert!(keepd.fails(1, &["key", "kit", "nobody", "-o", failed.to_str().unwrap()]).contains("no encryption profile"));
    let main = keepd.path("main.key").display().to_string();
    let told = keepd.fails(1, &["key", "kit", "main", "-o", failed.to_str().unwrap(), "--private-key", &main]);
    assert!(told.contains("does not hold a private key"), "{told}");
    assert!(!failed.exists());
}

#[test]
fn the_kit_of_a_passphrase_has_a_key_of_its_own() {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 200);
    fs::write(keepd.path("phrase"), "correct horse battery staple\n").unwrap();
    configure(&keepd, "passphrase = { file = \"phrase\" }\n");
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    let id = keepd.backups()[0].clone();
    let kit = keepd.path("kit.py");
    keepd.ok(&["key", "kit", "main", "-o", kit.to_str().unwrap()]);
    let text = fs::read_to_string(&kit).unwrap();
    assert!(text.contains("keepd-key-1 ") && !text.contains("battery"));
    for (destination, repository) in [("local", "repository"), ("usb", "usb")] {
        let made: Vec<Value> = slots(&keepd, destination).into_iter().filter(|s| s["profile"] == "recovery kit").collect();
        assert!(made.len() == 1 && made[0]["method"] == "key-file", "{made:?}");
        let listed = decoded(&kit, &keepd.path(repository));
        assert!(destination == "usb" || listed.contains(&id[..8]), "{listed}");
    }
    // Where it cannot be added everywhere no kit is made, and no slot stays of a key that nobody has.
    fs::rename(keepd.path("usb"), keepd.path("away")).unwrap();
    let second = keepd.path("second.py");
    let told = keepd.fails(1, &["key", "kit", "main", "-o", second.to_str().unwrap()]);
    assert!(told.contains("usb") && !second.exists(), "{told}");
    assert_eq!(slots(&keepd, "local").len(), 2);
}

#[test]
fn secrets_and_a_private_key_come_into_a_kit_only_when_asked_for() {
    let keepd = two_places();
    let pair = keepd.path("read.key");
    let (fingerprint, public) = keepd::crypto::key_file::generate_pair(&pair).unwrap();
    fs::write(keepd.path("hush"), "s3cr3t-c4n4ry\n").unwrap();
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let text = text.replace("# since ever\n", &format!("# since ever\npublic_key = \"{}\"\n", public.display()));
    let s3 = "[destination.far]\nservice = \"s3\"\nbucket = \"b\"\nendpoint = \"http://127.0.0.1:1\"\nregion = \"x\"\naccess_key_id = { file = \"hush\" }\n\
              secret_access_key = { file = \"hush\" }\nencryption = \"main\"\n";
    fs::write(keepd.path("keepd.toml"), format!("{text}{s3}")).unwrap();
    keepd.ok(&["reload"]);
    let profile = keepd.json(&["key", "list", "local"])["profiles"][0].clone();
    assert_eq!(profile["public_key"].as_str(), Some(fingerprint.to_string().as_str()));
    let made = |name: &str, more: &[&str]| {
        let kit = keepd.path(name).display().to_string();
        let out = keepd.ctl(&[&["key", "kit", "main", "-o", &kit], more].concat());
        assert!(out.status.success(), "{}", text_of(&out));
        (fs::read_to_string(kit).unwrap(), text_of(&out))
    };
    let (without, told) = made("without.py", &[]);
    assert!(!without.contains("keepd-private-1 ") && !without.contains("c4n4ry"));
    assert!(without.contains("export KEEPD_FAR_SECRET_ACCESS_KEY=..."), "what must be entered");
    assert!(told.contains(&fingerprint.to_string()) && told.contains("cannot be read") && without.contains("cannot"), "{told}");
    let private = pair.display().to_string();
    let (with, told) = made("with.py", &["--include-secrets", "--private-key", &private]);
    assert!(with.contains("\nkeepd-private-1 ") && with.contains("export KEEPD_FAR_SECRET_ACCESS_KEY='s3cr3t-c4n4ry'"));
    assert!(!told.contains("c4n4ry") && !told.contains("cannot be read"), "{told}");
    // That of another pair.
    let other = keepd.path("other.key");
    keepd::crypto::key_file::generate_pair(&other).unwrap();
    let kit = keepd.path("wrong.py").display().to_string();
    let told = keepd.fails(1, &["key", "kit", "main", "-o", &kit, "--private-key", other.to_str().unwrap()]);
    assert!(told.contains("is not that of the public key"), "{told}");
    assert!(!keepd.path("wrong.py").exists() && !keepd.log().contains("c4n4ry"));
}
