//! The decoder for people without keepd: what the daemon writes, what only other writers write yet, and what a tampered repository could hold.
//! In three ways: with the Python packages, with a clean interpreter and the system's libraries, and with neither, on the program zstd alone.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::*;

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// How Python is started, with the options that go with it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Packages,
    Libraries,
    Alone,
}

const WAYS: [Way; 3] = [Way::Packages, Way::Libraries, Way::Alone];

/// A PATH with nothing but zstd.
fn one_program() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let found = std::env::split_paths(&std::env::var_os("PATH").unwrap()).map(|d| d.join("zstd")).find(|p| p.exists());
    symlink(found.expect("zstd is missing: run 'sh tests/install-tools.sh test' first"), dir.path().join("zstd")).unwrap();
    dir
}

fn decode_with(program: &Path, way: Way, directory: &Path, arguments: &[&str]) -> Output {
    let path = one_program();
    let mut command = match way {
        Way::Packages => Command::new(python()),
        // The interpreter that the environment was made of, without it.
        Way::Libraries | Way::Alone => {
            let mut command = Command::new(fs::canonicalize(python()).unwrap());
            command.args(["-I", "-S"]).env_clear().env("PATH", path.path()).env("LC_ALL", "C");
            command
        }
    };
    command.arg(program);
    if way == Way::Alone {
        command.args(["--avoid", "libcrypto,libzstd,compression.zstd"]);
    }
    command.args(arguments).current_dir(directory).stdin(Stdio::null()).output().unwrap()
}

fn decode(way: Way, directory: &Path, arguments: &[&str]) -> Output {
    decode_with(&source("kit/keepd_decoder.py"), way, directory, arguments)
}

/// What it says on standard error: each line named, none of them from Python itself.
fn said(out: &Output) -> String {
    let text = String::from_utf8(out.stderr.clone()).unwrap();
    for line in text.lines() {
        assert!(line.starts_with("keepd_decoder: "), "{text}");
        assert!(!line.contains("Errno") && !line.contains("not as this decoder expects"), "{text}");
    }
    text
}

fn well(out: &Output) -> String {
    assert!(out.status.success(), "{}", text(out));
    said(out);
    String::from_utf8(out.stdout.clone()).unwrap()
}

/// The repositories of tests/kit/writer.py, by name.
fn written(names: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let out = Command::new(python()).arg(source("tests/kit/writer.py")).arg(dir.path()).args(names).output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    dir
}

const KEY: [&str; 3] = ["repository", "--key", "main.key"];
const KEYS: [&str; 5] = ["repository", "--key", "main.key", "--key", "private.key"];

#[test]
fn the_ciphers_are_those_of_their_rfcs() {
    let out = Command::new(python()).arg(source("tests/kit/primitives.py")).arg(source("kit/keepd_decoder.py")).output().unwrap();
    assert!(out.status.success() && text(&out).contains("all as they should be"), "{}", text(&out));
}

#[test]
fn what_the_daemon_writes_is_decoded_in_every_way() {
    let keepd = Keepd::started();
    for n in 0..100 {
        fs::write(keepd.path(&format!("files/deep/small-{n}")), noise(n * 37, n as u64 + 1)).unwrap();
    }
    fs::write(keepd.path("files/text"), "line after line\n".repeat(100_000)).unwrap();
    fs::hard_link(keepd.path("files/big"), keepd.path("files/zzz")).unwrap();
    fs::File::create(keepd.path("files/sparse")).unwrap().set_len(9 << 20).unwrap();
    let attribute = Command::new("setfattr").args(["-n", "user.keepd", "-v", "kept"]).arg(keepd.path("files/text")).status().unwrap();
    keepd.ok(&["backup", "shop"]);
    let secret = fs::read_to_string(keepd.path("main.key")).unwrap();
    let secret = secret.lines().find(|l| l.starts_with("keepd-key-1")).unwrap().split(' ').nth(1).unwrap().to_owned();
    for way in WAYS {
        let list = well(&decode(way, keepd.dir.path(), &[&KEY[..], &["list"]].concat()));
        let id = keepd.backups().remove(0);
        assert!(list.lines().count() == 1 && list.starts_with(&id[..16]) && list.contains("good"), "{list}");
        let listing = well(&decode(way, keepd.dir.path(), &[&KEY[..], &["ls", &id[..8]]].concat()));
        assert!(listing.contains("files/deep/small-7\n") && listing.contains("db/shop.db\n"), "{listing}");
        let checked = well(&decode(way, keepd.dir.path(), &[&KEY[..], &["verify"]].concat()));
        assert!(checked.contains("are whole"), "{checked}");
        assert_eq!(checked.contains("chunk ids were checked"), way == Way::Packages, "{checked}");
        let to = format!("decoded-{way:?}");
        let restored = decode(way, keepd.dir.path(), &[&KEY[..], &["restore", "latest", &to]].concat());
        well(&restored);
        assert_eq!(said(&restored).contains("deciphering in Python"), way == Way::Alone);
        for out in [list, listing, checked, text(&restored)] {
            assert!(!out.contains(&secret), "the key was shown");
        }
        let to = keepd.path(&to);
        assert_same(&keepd.path("files"), &to.join("files"));
        assert_eq!(proven_sum(&to.join("db/shop.db")), 50_000);
        let meta = |name: &str| fs::metadata(to.join("files").join(name)).unwrap();
        use std::os::unix::fs::MetadataExt;
        assert!(meta("sparse").blocks() * 512 < 1 << 20, "the hole is a hole");
        assert_eq!((meta("zzz").ino(), meta("zzz").nlink()), (meta("big").ino(), 2));
        if attribute.success() {
            let out = Command::new("getfattr").args(["--only-values", "-n", "user.keepd"]).arg(to.join("files/text")).output().unwrap();
            assert_eq!(out.stdout, b"kept");
        }
        let again = decode(way, keepd.dir.path(), &[&KEY[..], &["restore", "latest", to.to_str().unwrap()]].concat());
        assert!(!again.status.success() && said(&again).contains("is not empty, and nothing is overwritten"), "{}", text(&again));
    }
}

#[test]
fn single_paths_come_back_alone() {
    let keepd = Keepd::started();
    fs::hard_link(keepd.path("files/big"), keepd.path("files/zzz")).unwrap();
    keepd.ok(&["backup", "shop"]);
    let decode =
        |to: &str, paths: &[&str]| decode(Way::Packages, keepd.dir.path(), &[&KEY[..], &["restore", "latest", to], paths].concat());
    well(&decode("one", &["files/deep"]));
    assert_eq!(files_below(&keepd.path("one")), [keepd.path("one/files/deep/note.txt")]);
    // The other name of a file whose first name is not asked for.
    well(&decode("two", &["files/zzz", "files/deep/note.txt"]));
    assert_eq!(files_below(&keepd.path("two")), [keepd.path("two/files/deep/note.txt"), keepd.path("two/files/zzz")]);
    assert!(fs::read(keepd.path("two/files/zzz")).unwrap() == fs::read(keepd.path("files/big")).unwrap());
    let out = decode("three", &["files/none", "files/link"]);
    assert!(!out.status.success() && said(&out).contains("nothing called files/none"), "{}", text(&out));
    assert_eq!(files_below(&keepd.path("three")), [keepd.path("three/files/link")]);
}

#[test]
fn damage_is_named_and_the_rest_comes_back() {
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    keepd.damage_a_pack();
    let here = keepd.dir.path();
    let out = decode(Way::Libraries, here, &[&KEY[..], &["verify"]].concat());
    assert!(!out.status.success() && said(&out).contains("its SHA-256 is not its name"), "{}", text(&out));
    let out = decode(Way::Libraries, here, &[&KEY[..], &["restore", "latest", "out"]].concat());
    let told = said(&out);
    assert!(!out.status.success() && told.contains("not restored: files/big: packs/") && told.contains("does not open"), "{told}");
    assert!(!keepd.path("out/files/big").exists());
    assert_eq!(fs::read(keepd.path("out/files/deep/note.txt")).unwrap(), b"a note");
    let out = decode(Way::Libraries, here, &[&KEY[..], &["--damaged", "restore", "latest", "some"]].concat());
    assert!(!out.status.success() && said(&out).contains("are lost and zeros now"), "{}", text(&out));
    let (kept, whole) = (fs::read(keepd.path("some/files/big")).unwrap(), fs::read(keepd.path("files/big")).unwrap());
    let same = kept.iter().zip(&whole).filter(|(a, b)| a == b).count();
    assert!(kept.len() == whole.len() && same > whole.len() / 4 && same < whole.len(), "{same} bytes are the same");
}

#[test]
fn slots_epochs_and_write_only_packs_are_decoded() {
    let good = ["key-file", "token-and-key-file", "planted-beside", "epochs", "write-only", "write-only-unlisted", "twice"];
    let dir = written(&[&good[..], &["passphrase"]].concat());
    for name in good {
        let here = dir.path().join(name);
        for way in WAYS {
            let to = format!("out-{way:?}");
            well(&decode(way, &here, &[&KEYS[..], &["restore", "latest", &to]].concat()));
            assert_same(&here.join("expected"), &here.join(&to));
        }
        let backups = well(&decode(Way::Libraries, &here, &[&KEYS[..], &["list"]].concat())).lines().count();
        assert_eq!(backups, if name == "epochs" || name == "twice" { 2 } else { 1 }, "{name}");
        if name != "twice" {
            well(&decode(Way::Packages, &here, &[&KEYS[..], &["verify"]].concat()));
        }
    }
    let here = dir.path().join("passphrase");
    for way in [Way::Packages, Way::Alone] {
        let to = format!("out-{way:?}");
        let out = decode(way, &here, &["repository", "--passphrase-file", "passphrase", "restore", "latest", &to]);
        well(&out);
        assert_eq!(said(&out).contains("working it out in Python"), way == Way::Alone);
        assert_same(&here.join("expected"), &here.join(&to));
    }
}

#[test]
fn what_cannot_be_opened_says_what_is_wanted() {
    let names = [
        "key-file",
        "passphrase",
        "token",
        "planted-none",
        "planted-beside",
        "changed-slot",
        "falling-epochs",
        "old-epoch",
        "write-only",
        "write-only-forged",
        "passphrase-too-dear",
        "passphrase-too-cheap",
    ];
    let dir = written(&names);
    let given = |file: &'static str| vec!["repository", "--key", file];
    let secret = vec!["repository", "--passphrase-file", "passphrase"];
    let cases: [(&str, Vec<&str>, &str); 16] = [
        ("key-file", given("other.key"), "it wants the key file of profile 'main' with fingerprint 4fb348e6b273874e"),
        ("key-file", vec!["repository"], "it wants the key file of profile 'main'"),
        ("key-file", given("public.key"), "a public key opens nothing"),
        ("key-file", given("passphrase"), "no line in it begins with keepd-key-1"),
        ("key-file", given("none.key"), "cannot read none.key: No such file"),
        ("passphrase", vec!["repository"], "it wants the passphrase of profile 'main'"),
        ("passphrase", vec!["repository", "--passphrase-file", "main.key"], "it wants the passphrase of profile 'main'"),
        ("passphrase-too-dear", secret.clone(), "(argon2id m=1048577 t=2 p=1) is out of bounds and refused"),
        ("passphrase-too-cheap", secret, "(argon2id m=64 t=2 p=1) is out of bounds and refused"),
        ("token", given("main.key"), "cannot ask tokens: it needs another key"),
        ("planted-none", given("main.key"), "says that the repository is not encrypted, but a key was given: refused"),
        ("planted-beside", vec!["repository"], "says that the repository is not encrypted, but others ask for a key: refused"),
        ("changed-slot", given("main.key"), "keys/0000000000000001.json does not open"),
        ("falling-epochs", given("main.key"), "its epochs do not rise"),
        ("old-epoch", given("main.key"), "sealed with the master key of epoch 0; the key slots have [2]"),
        ("write-only-forged", KEYS.to_vec(), "its SHA-256 is not its name"),
    ];
    for (name, arguments, wanted) in cases {
        let out = decode(Way::Packages, &dir.path().join(name), &[&arguments[..], &["restore", "latest", "out"]].concat());
        assert!(!out.status.success() && said(&out).contains(wanted), "{name}: {}", text(&out));
        let came = files_below(&dir.path().join(name).join("out"));
        assert!(!came.iter().any(|p| p.ends_with("a.txt")), "{name}: {came:?}");
    }
    // Names can be read without the private key, contents cannot.
    let here = dir.path().join("write-only");
    assert!(well(&decode(Way::Libraries, &here, &[&KEY[..], &["ls", "latest"]].concat())).contains("files/dir/long"));
    let checked = decode(Way::Packages, &here, &[&KEY[..], &["verify"]].concat());
    assert!(well(&checked).contains("1 write-only packs were not checked") && said(&checked).contains("the private key of fingerprint"));
    let out = decode(Way::Packages, &here, &[&KEY[..], &["restore", "latest", "out"]].concat());
    assert!(!out.status.success() && said(&out).contains("opens with the private key of fingerprint"), "{}", text(&out));
    assert!(!here.join("out/files/a.txt").exists());
    // A slot that says there is no encryption opens when nobody has a key.
    well(&decode(Way::Packages, &dir.path().join("planted-none"), &["repository", "restore", "latest", "plain"]));
}

#[test]
fn every_broken_key_line_is_noticed() {
    let dir = written(&["key-file"]);
    let here = dir.path().join("key-file");
    let key = fs::read_to_string(here.join("main.key")).unwrap();
    let line = key.lines().find(|l| l.starts_with("keepd")).unwrap();
    let list = |text: &str| {
        fs::write(here.join("a.key"), text).unwrap();
        decode(Way::Libraries, &here, &["repository", "--key", "a.key", "list"])
    };
    for text in [format!("any text\n   {line}\nand more"), line.to_uppercase().replace("KEEPD-KEY-1", "keepd-key-1"), format!("{line}\r\n")]
    {
        well(&list(&text));
    }
    let mut other = line.to_owned();
    other.replace_range(20..21, if &line[20..21] == "0" { "1" } else { "0" });
    for text in [&other, &line[..line.len() - 1], &line[..50], "keepd-key-1"] {
        let out = list(text);
        assert!(!out.status.success() && said(&out).contains("a.key: its keepd-key-1 line is damaged or cut off"), "{}", self::text(&out));
    }
    let out = list(&line.replace("key-1", "key-2"));
    assert!(!out.status.success() && said(&out).contains("newer than this decoder"), "{}", text(&out));
    for text in [format!("x {line}"), format!("# {line}")] {
        let out = list(&text);
        assert!(!out.status.success() && said(&out).contains("no line in it begins with"), "{}", self::text(&out));
    }
}

/// What a backup may not do to the machine that restores it, with what is said of it.
#[test]
fn a_tampered_repository_writes_nothing_elsewhere() {
    let wanted = BTreeMap::from([
        ("hostile-up", "refused: the name ../outside leads elsewhere"),
        ("hostile-up-deep", "refused: the name a/../../outside leads elsewhere"),
        ("hostile-absolute", "refused: the name /tmp/keepd-decoder-outside leads elsewhere"),
        ("hostile-nul", "refused: the name a\\x00b leads elsewhere"),
        ("hostile-empty-part", "refused: the name a//b leads elsewhere"),
        ("hostile-through-link", "the link files/sub: File exists"),
        ("hostile-link-then-directory", "the link files/sub: File exists"),
        ("hostile-through-file", "files/sub/outside: refused: it lies in what is no directory"),
        ("hostile-hard-link-up", "refused: it links to ../../../main.key, which leads elsewhere"),
        ("hostile-hard-link-through", "what it links to, s/main.key, is not there"),
        ("hostile-source", "refused: the source name ../outside leads elsewhere"),
        ("hostile-source-dots", "refused: the source name .. leads elsewhere"),
        ("hostile-beyond-chunk", "a piece of it lies outside its chunk"),
        ("hostile-sizes", "its pieces do not sum up to its size"),
        ("hostile-table", "a segment is outside its table"),
        ("hostile-entry", "an entry has another length"),
        ("hostile-shared", "its entry is not as format 1 has it"),
        ("hostile-types", "its entry is not as format 1 has it"),
        ("payload-bomb", "does not decompress to what it should be"),
        ("payload-huge", "claims 4294967295 bytes, more than the 67108864"),
        ("payload-short", "its payload is too short"),
        ("payload-method", "in a way (7) that this decoder does not know"),
        ("payload-zlib", "does not decompress to what it should be"),
        ("payload-zstd", "does not decompress to what it should be"),
        ("payload-zstd-lengths", "its payload's lengths contradict each other"),
        ("payload-zstd-window", "does not decompress to what it should be"),
        ("payload-deep", "nested too deeply"),
        ("payload-array", "its CBOR is cut off"),
        ("payload-indefinite", "of indefinite length"),
        ("payload-tag", "its CBOR has a tag"),
        ("payload-text", "a text that is not UTF-8"),
        ("payload-rest", "bytes follow the end of its CBOR"),
        ("payload-map", "it is of another format"),
        ("payload-empty", "its CBOR is cut off"),
        ("payload-list-key", "a strange or double key"),
        ("lost-chunk", "files/half: chunk 0000000000000000000000000000000000000000000000000000000000000000 is in no pack"),
    ]);
    let dir = written(&wanted.keys().copied().collect::<Vec<_>>());
    for (name, wanted) in wanted {
        let here = dir.path().join(name);
        let before = files_below(&here);
        for way in [Way::Packages, Way::Alone] {
            let to = format!("out-{way:?}");
            // Of what is not readable the backup that is beside it says nothing.
            let out = decode(way, &here, &[&KEY[..], &["restore", "latest", &to]].concat());
            assert!(!out.status.success() && said(&out).contains(wanted), "{name}: {}", text(&out));
            let inside = |p: &PathBuf| p.starts_with(here.join(&to));
            let (came, elsewhere): (Vec<_>, Vec<_>) = files_below(&here).into_iter().filter(|p| !before.contains(p)).partition(inside);
            let elsewhere: Vec<_> = elsewhere.iter().filter(|p| !p.starts_with(here.join("out-Packages"))).collect();
            assert!(elsewhere.is_empty(), "{name}: {elsewhere:?}");
            let all = !name.starts_with("hostile-source");
            let bad_page = ["hostile-entry", "hostile-shared", "hostile-types"].contains(&name);
            assert_eq!(!came.is_empty(), all && !bad_page, "{name}: what is well comes back: {came:?}");
            assert!(files_below(&here.join("outside")).is_empty() && !Path::new("/tmp/keepd-decoder-outside").exists());
        }
    }
}

#[test]
fn what_the_target_does_not_take_is_named_and_the_rest_comes_back() {
    let dir = written(&["unwritable", "key-file"]);
    let here = dir.path().join("unwritable");
    let out = decode(Way::Libraries, &here, &[&KEY[..], &["restore", "latest", "out"]].concat());
    let told = said(&out);
    assert_eq!(out.status.code(), Some(1), "{told}");
    let long = "n".repeat(300);
    for wanted in [
        "refused: the source name ../outside leads elsewhere".to_owned(),
        "not restored: alone: refused: the name /srv/.. leads elsewhere".to_owned(),
        format!("not restored: files/dir/{long}: File name too long"),
        format!("not restored: files/dir/{long}/f: File name too long"),
        format!("not restored: files/long-{long}: File name too long"),
        format!("not restored: {}/zz-last: File name too long", "s".repeat(300)),
    ] {
        assert!(told.contains(&wanted), "{wanted}: {told}");
    }
    assert_eq!(files_below(&here.join("out")), [here.join("out/files/zz-last")]);
    // Nothing is written into the repository.
    let here = dir.path().join("key-file");
    let before = files_below(&here);
    symlink("repository", here.join("other-name")).unwrap();
    for to in ["repository", "repository/data", "other-name/packs/data", "repository/../repository/data"] {
        let out = decode(Way::Libraries, &here, &[&KEY[..], &["restore", "latest", to]].concat());
        assert!(!out.status.success() && said(&out).contains("lies in the repository"), "{to}: {}", text(&out));
    }
    fs::remove_file(here.join("other-name")).unwrap();
    assert_eq!(files_below(&here), before);
}

/// Whoever can write to the storage may put a pipe there, at whose other end nobody ever is.
#[test]
fn what_is_no_file_is_not_waited_for() {
    for folder in ["", "keys", "index", "backups", "packs"] {
        let dir = written(&["key-file"]);
        let here = dir.path().join("key-file");
        let all = files_below(&here.join("repository").join(folder));
        let at = all.iter().find(|p| !folder.is_empty() || p.ends_with("keepd.json")).unwrap();
        fs::remove_file(at).unwrap();
        assert!(Command::new("mkfifo").arg(at).status().unwrap().success());
        for command in [&["restore", "latest", "out"][..], &["verify"]] {
            let out = decode(Way::Libraries, &here, &[&KEY[..], command].concat());
            let is_needless = folder == "index" && command.len() == 3;
            assert!(out.status.success() == is_needless && said(&out).contains("it is no regular file"), "{folder}: {}", text(&out));
        }
    }
    // A key may come through one.
    let dir = written(&["key-file"]);
    let script =
        format!("exec {} -I {} repository --key <(cat main.key) list", python().display(), source("kit/keepd_decoder.py").display());
    let out = Command::new("bash").args(["-c", &script]).current_dir(dir.path().join("key-file")).output().unwrap();
    assert_eq!(well(&out).lines().count(), 1);
}

#[test]
fn arguments_that_make_no_sense_are_told() {
    let dir = written(&["key-file"]);
    let here = dir.path().join("key-file");
    for arguments in [&["repository"][..], &["repository", "restore", "latest"], &["repository", "frob"], &["repository", "ls"], &[]] {
        let out = decode(Way::Libraries, &here, arguments);
        assert_eq!(out.status.code(), Some(2), "{}", text(&out));
        assert!(text(&out).contains("restore BACKUP DIR [PATH...]"), "{}", text(&out));
    }
    for (arguments, wanted) in [
        (&["none", "list"][..], "cannot read none/keepd.json: No such file"),
        (&["main.key", "list"], "main.key is no archive of keepd"),
        (&["repository", "--key", "main.key", "ls", "ffffffffffff"], "no backups have an id that begins with ffffffffffff"),
        (&["repository", "--key", "main.key", "--job", "other", "ls", "latest"], "there is no backup of job other"),
    ] {
        let out = decode(Way::Libraries, &here, arguments);
        assert!(out.status.code() == Some(1) && said(&out).contains(wanted), "{}", text(&out));
    }
    // In the directory itself, with the key in the program's own text, as in a recovery kit.
    let program = dir.path().join("kit.py");
    let key = fs::read_to_string(here.join("main.key")).unwrap();
    fs::write(&program, format!("KEYS = \"\"\"\n{key}\"\"\"\n{}", fs::read_to_string(source("kit/keepd_decoder.py")).unwrap())).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o600)).unwrap();
    let list = |arguments: &[&str]| decode_with(&program, Way::Libraries, &here.join("repository"), arguments);
    assert_eq!(well(&list(&["list"])).lines().count(), 1);
    assert!(said(&list(&["--no-key", "list"])).contains("no key that was given opens"));
    let help = list(&["--help"]);
    assert!(text(&help).contains("keepd_decoder.py [REPOSITORY]") && !text(&help).contains(key.lines().last().unwrap()), "{}", text(&help));
}

#[test]
fn the_configuration_comes_back() {
    let golden = source("tests/golden-config");
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    for name in ["1.json", "1.json.gz", "1.json.gz.enc", "1.json.zst.enc", "seal.key"] {
        fs::copy(golden.join(name), here.join(name)).unwrap();
        fs::set_permissions(here.join(name), fs::Permissions::from_mode(0o600)).unwrap();
    }
    let open = fs::read_to_string(here.join("1.json")).unwrap();
    let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    for way in WAYS {
        assert_eq!(well(&decode(way, here, &["1.json", "config"])), open);
        assert_eq!(value(&well(&decode(way, here, &["config", "1.json.gz"]))), value(&open));
        for name in ["1.json.gz.enc", "1.json.zst.enc"] {
            let whole = value(&well(&decode(way, here, &[name, "--key", "seal.key", "config"])));
            assert_eq!((&whole["includes_secrets"], &whole["item_count"]), (&true.into(), &value(&open)["item_count"]));
            assert!(whole.to_string().contains("s3 secret"));
        }
    }
    // The newest of a destination, whatever else lies there; into a new file of one's own.
    fs::create_dir_all(here.join("copy/config")).unwrap();
    fs::write(here.join("copy/config/notes.txt"), "x").unwrap();
    let none = decode(Way::Packages, here, &["copy", "config"]);
    assert!(none.status.code() == Some(1) && said(&none).contains("no configuration is stored in copy"), "{}", text(&none));
    fs::copy(here.join("1.json.gz"), here.join("copy/config/config_backup_20250101T000000Z.json.gz")).unwrap();
    fs::copy(here.join("1.json.gz.enc"), here.join("copy/config/config_backup_20260101T000000Z.json.gz.enc")).unwrap();
    let arguments = ["copy", "--key", "seal.key", "config", "-o", "out.json"];
    assert!(well(&decode(Way::Packages, here, &arguments)).contains("20260101T000000Z.json.gz.enc is in out.json"));
    assert_eq!(fs::metadata(here.join("out.json")).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(value(&fs::read_to_string(here.join("out.json")).unwrap())["includes_secrets"], true);
    let again = decode(Way::Packages, here, &arguments);
    assert!(again.status.code() == Some(1) && text(&again).contains("exists"), "{}", text(&again));

    let sealed = fs::read(here.join("1.json.gz.enc")).unwrap();
    let mut damaged = sealed.clone();
    let at = sealed.len() - 20;
    damaged[at] ^= 1;
    for (bytes, wanted) in [
        (damaged, "does not open"),
        (sealed[..sealed.len() - 1].to_vec(), "does not open"),
        (sealed[..70].to_vec(), "key slots of the configuration are damaged"),
        (b"{\"format_version\": 2, \"items\": []}".to_vec(), "of format 2, this decoder reads 1"),
        (b"{\"format_version\": 1, \"item_count\": 1, \"items\": []}".to_vec(), "not as many items"),
        (open.as_bytes()[..100].to_vec(), "no configuration of keepd"),
        (b"hello".to_vec(), "no configuration of keepd"),
    ] {
        fs::write(here.join("bad"), bytes).unwrap();
        let out = decode(Way::Libraries, here, &["bad", "--key", "seal.key", "config"]);
        assert!(out.status.code() == Some(1) && said(&out).contains(wanted) && out.stdout.is_empty(), "{wanted}: {}", text(&out));
    }
    let closed = decode(Way::Libraries, here, &["1.json.gz.enc", "config"]);
    assert!(closed.status.code() == Some(1) && said(&closed).contains("opens the configuration"), "{}", text(&closed));
}
