//! The other ways to a profile's key: PKCS#11 tokens (SoftHSM), credentials of the service manager, passphrases.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Keepd, assert_same, proven_sum, text};

const PIN: &str = "482913";
const WRONG_PIN: &str = "777555";

fn module() -> PathBuf {
    let places = ["/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so"];
    let found = places.iter().map(PathBuf::from).find(|p| p.exists());
    found.expect("SoftHSM is missing: run 'sh tests/install-tools.sh test' first")
}

/// SoftHSM with tokens of its own.
struct Tokens {
    dir: PathBuf,
}

impl Tokens {
    fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir.join("tokens")).unwrap();
        let config = format!("directories.tokendir = {}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n", dir.display());
        fs::write(dir.join("softhsm2.conf"), config).unwrap();
        Self { dir: dir.to_owned() }
    }

    fn environment(&self) -> (String, String) {
        ("SOFTHSM2_CONF".into(), self.dir.join("softhsm2.conf").display().to_string())
    }

    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let out = Command::new(program).args(arguments).envs([self.environment()]).output().unwrap();
        assert!(out.status.success(), "{program} {arguments:?}: {}", text(&out));
        text(&out)
    }

    fn tool(&self, token: &str, arguments: &[&str]) -> String {
        let module = module();
        let module = module.to_str().unwrap();
        self.run("pkcs11-tool", &[&["--module", module, "--token-label", token, "--login", "--pin", PIN], arguments].concat())
    }

    /// A token; gives its serial number.
    fn make(&self, label: &str) -> String {
        let before = self.serials();
        self.run("softhsm2-util", &["--init-token", "--free", "--label", label, "--so-pin", "99999999", "--pin", PIN]);
        self.serials().into_iter().find(|s| !before.contains(s)).unwrap()
    }

    fn serials(&self) -> Vec<String> {
        let slots = self.run("pkcs11-tool", &["--module", module().to_str().unwrap(), "--list-token-slots"]);
        slots.lines().filter_map(|l| Some(l.trim().strip_prefix("serial num")?.trim_start_matches([' ', ':']).to_owned())).collect()
    }

    fn make_key(&self, token: &str, kind: &str, label: &str) {
        self.tool(token, &["--keygen", "--key-type", kind, "--label", label, "--sensitive"]);
    }
}

/// Has the profile another way to its key.
fn configure_key(keepd: &Keepd, key: &str) {
    let path = keepd.path("keepd.toml");
    let lines: Vec<String> = fs::read_to_string(&path).unwrap().lines().map(str::to_owned).collect();
    let at = lines.iter().position(|l| l == "[encryption.main]").unwrap() + 1;
    let mut lines = lines;
    lines[at] = key.to_owned();
    fs::write(path, lines.join("\n") + "\n").unwrap();
}

fn token_key(keepd: &Keepd, token: &str, key: &str) -> String {
    format!(
        "pkcs11 = {{ module = \"{}\", token = \"{token}\", key = \"{key}\", pin = {{ file = \"{}\" }} }}",
        module().display(),
        keepd.path("pin").display()
    )
}

fn write_secret(path: &Path, secret: &str) {
    let _ = fs::remove_file(path);
    fs::write(path, format!("{secret}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// A daemon that is not started, with something to back up.
fn prepared() -> Keepd {
    let keepd = Keepd::prepared();
    common::make_database(&keepd.path("shop.db"), 300);
    fs::create_dir_all(keepd.path("files/deep")).unwrap();
    fs::write(keepd.path("files/deep/note.txt"), "a note").unwrap();
    fs::write(keepd.path("files/big"), common::noise(2 << 20, 7)).unwrap();
    keepd
}

fn restart(keepd: &mut Keepd) {
    keepd.stop();
    keepd.start();
}

/// Backs up, restarts, restores, and compares.
fn goes_and_comes_back(keepd: &mut Keepd) {
    keepd.ok(&["backup", "shop"]);
    restart(keepd);
    let restored = keepd.restored("latest");
    assert_same(&keepd.path("files"), &restored.join("files"));
    assert_eq!(proven_sum(&restored.join("db/shop.db")), 300 * 100);
}

fn slot(keepd: &Keepd) -> (PathBuf, serde_json::Value) {
    let slots = common::files_below(&keepd.path("repository/keys"));
    assert_eq!(slots.len(), 1);
    (slots[0].clone(), serde_json::from_slice(&fs::read(&slots[0]).unwrap()).unwrap())
}

fn change_kdf(path: &Path, kdf: &str) {
    let mut slot: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    slot["kdf"] = kdf.into();
    fs::write(path, serde_json::to_vec_pretty(&slot).unwrap()).unwrap();
}

#[test]
fn a_token_wraps_the_keys_of_a_repository() {
    let mut keepd = prepared();
    let tokens = Tokens::new(&keepd.path("hsm"));
    tokens.make("vault");
    tokens.make_key("vault", "aes:32", "backup");
    keepd.environment.push(tokens.environment());
    write_secret(&keepd.path("pin"), PIN);
    configure_key(&keepd, &token_key(&keepd, "vault", "backup"));
    keepd.start();
    goes_and_comes_back(&mut keepd);
    let (path, first) = slot(&keepd);
    assert_eq!(first["method"], "pkcs11");
    // Nonce, master key, tag.
    assert_eq!(first["wrapped"].as_str().unwrap().len(), 2 * (12 + 32 + 16));

    // A rescue asks the token too.
    let rescue = |token: &str, pin: &str| {
        let mut command = Command::new(common::keepd_binary());
        command.args(["rescue", "list", "--json", "--destination"]).arg(keepd.path("repository"));
        command.arg("--pkcs11-module").arg(module()).args(["--token", token, "--token-key", "backup", "--pin-file"]).arg(keepd.path(pin));
        command.envs([tokens.environment()]).stdin(std::process::Stdio::null()).output().unwrap()
    };
    write_secret(&keepd.path("wrong-pin"), WRONG_PIN);
    let out = rescue("vault", "pin");
    assert!(out.status.success() && text(&out).contains("\"shop\""), "{}", text(&out));
    let out = rescue("vault", "wrong-pin");
    assert!(out.status.code() == Some(1) && text(&out).contains("PIN is wrong") && !text(&out).contains(WRONG_PIN), "{}", text(&out));
    let out = rescue("nobody", "pin");
    assert!(out.status.code() == Some(1) && text(&out).contains("no token 'nobody'"), "{}", text(&out));

    // Its key file opens nothing here.
    configure_key(&keepd, "key_file = \"main.key\"");
    restart(&mut keepd);
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("pkcs11") && said.contains(first["fingerprint"].as_str().unwrap()), "{said}");

    // A slot that somebody changed.
    configure_key(&keepd, &token_key(&keepd, "vault", "backup"));
    restart(&mut keepd);
    let whole = fs::read(&path).unwrap();
    let mut changed = first.clone();
    changed["profile"] = "other".into();
    fs::write(&path, changed.to_string()).unwrap();
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("does not open"), "{said}");
    fs::write(&path, whole).unwrap();
    keepd.ok(&["backup", "shop"]);

    // The token goes while keepd runs, and comes back.
    fs::rename(keepd.path("hsm/tokens"), keepd.path("hsm/pulled")).unwrap();
    fs::create_dir(keepd.path("hsm/tokens")).unwrap();
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("vault"), "{said}");
    keepd.ok(&["status"]);
    fs::remove_dir_all(keepd.path("hsm/tokens")).unwrap();
    fs::rename(keepd.path("hsm/pulled"), keepd.path("hsm/tokens")).unwrap();
    keepd.ok(&["backup", "shop"]);

    // A wrong PIN is given once, so that it does not lock the token.
    write_secret(&keepd.path("pin"), WRONG_PIN);
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("PIN is wrong"), "{said}");
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("refused before"), "{said}");
    write_secret(&keepd.path("pin"), PIN);
    keepd.ok(&["backup", "shop"]);
    fs::remove_file(keepd.path("pin")).unwrap();
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("PIN") && said.contains("pin:"), "{said}");
    write_secret(&keepd.path("pin"), PIN);

    // The key is gone.
    tokens.tool("vault", &["--delete-object", "--type", "secrkey", "--label", "backup"]);
    restart(&mut keepd);
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("key 'backup' in token 'vault'") && said.contains("no such secret key"), "{said}");
    // One of another length, and then another key under its name.
    tokens.make_key("vault", "aes:16", "backup");
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("no AES key of 256 bits"), "{said}");
    tokens.make_key("vault", "aes:32", "backup");
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("made with another key") && said.contains(first["fingerprint"].as_str().unwrap()), "{said}");
    tokens.make_key("vault", "aes:32", "backup");
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("2 keys have this label"), "{said}");
    let log = keepd.log();
    assert!(!log.contains(PIN) && !log.contains(WRONG_PIN), "a PIN is in the log");
}

#[test]
fn tokens_and_their_keys_are_told_apart() {
    let mut keepd = prepared();
    let tokens = Tokens::new(&keepd.path("hsm"));
    let first = tokens.make("vault");
    tokens.make_key("vault", "aes:32", "backup");
    // The same names in another token.
    let other = tokens.make("other");
    tokens.make_key("other", "aes:32", "backup");
    keepd.environment.push(tokens.environment());
    write_secret(&keepd.path("pin"), PIN);
    configure_key(&keepd, &token_key(&keepd, "vault", "backup"));
    keepd.start();
    goes_and_comes_back(&mut keepd);
    configure_key(&keepd, &token_key(&keepd, "other", "backup"));
    restart(&mut keepd);
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("made with another key"), "{said}");
    configure_key(&keepd, &token_key(&keepd, &first, "backup"));
    restart(&mut keepd);
    keepd.ok(&["backup", "shop"]);
    let twin = tokens.make("vault");
    configure_key(&keepd, &token_key(&keepd, "vault", "backup"));
    restart(&mut keepd);
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("2 tokens have the label 'vault'") && said.contains(&first) && said.contains(&twin), "{said}");
    assert!(!said.contains(&other), "{said}");
    configure_key(&keepd, &token_key(&keepd, "nobody", "backup"));
    restart(&mut keepd);
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("no token 'nobody'") && said.contains("'other'"), "{said}");
    // What cannot be right is told before anything runs.
    configure_key(&keepd, &token_key(&keepd, "vault", "backup").replace("libsofthsm2", "libsoft-hsm-3"));
    let out = keepd.command().arg("--check").output().unwrap();
    assert!(!out.status.success() && text(&out).contains("encryption.main.pkcs11: there is no PKCS#11 module"), "{}", text(&out));
}

#[test]
fn a_credential_of_the_service_manager_is_a_key() {
    let mut keepd = prepared();
    let credentials = keepd.path("credentials");
    fs::create_dir(&credentials).unwrap();
    fs::rename(keepd.path("main.key"), credentials.join("main.key")).unwrap();
    // As systemd makes them.
    fs::set_permissions(credentials.join("main.key"), fs::Permissions::from_mode(0o440)).unwrap();
    configure_key(&keepd, "credential = \"main.key\"");
    let out = keepd.command().arg("--check").env_remove("CREDENTIALS_DIRECTORY").output().unwrap();
    assert!(!out.status.success() && text(&out).contains("LoadCredential=main.key"), "{}", text(&out));
    // The check of `systemctl reload`: systemd tells it the service's process and hides the credentials from it. The daemon sees to those.
    let out = keepd.command().arg("--check").env_remove("CREDENTIALS_DIRECTORY").env("MAINPID", "1").output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    keepd.environment.push(("CREDENTIALS_DIRECTORY".into(), credentials.display().to_string()));
    keepd.start();
    goes_and_comes_back(&mut keepd);
    assert_eq!(slot(&keepd).1["method"], "key-file", "it opens with the same key as a file");
    configure_key(&keepd, "credential = \"other.key\"");
    let out = keepd.command().arg("--check").envs(keepd.environment.iter().cloned()).output().unwrap();
    assert!(!out.status.success() && text(&out).contains("other.key"), "{}", text(&out));
    fs::write(credentials.join("other.key"), "keepd-key-1 0011\n").unwrap();
    let out = keepd.command().arg("--check").envs(keepd.environment.iter().cloned()).output().unwrap();
    assert!(!out.status.success() && text(&out).contains("credential other.key"), "{}", text(&out));
}

#[test]
fn a_passphrase_opens_and_nobody_can_make_it_cheap() {
    const PASSPHRASE: &str = "canary horse battery staple";
    let mut keepd = prepared();
    let file = keepd.path("passphrase");
    write_secret(&file, PASSPHRASE);
    configure_key(&keepd, "passphrase = { file = \"passphrase\" }");
    keepd.start();
    goes_and_comes_back(&mut keepd);
    let (path, whole) = slot(&keepd);
    assert_eq!((whole["method"].as_str(), whole["kdf"].as_str()), (Some("passphrase"), Some("argon2id m=65536 t=3 p=4")));
    write_secret(&file, "canary horse battery stapler");
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("the passphrase does not open it"), "{said}");
    write_secret(&file, "short");
    let said = keepd.fails(1, &["backup", "shop"]);
    assert!(said.contains("shorter than 12 characters"), "{said}");
    write_secret(&file, PASSPHRASE);
    for (kdf, why) in [
        ("argon2id m=8 t=1 p=1", "cheaper"),
        ("argon2id m=65536 t=1 p=4", "cheaper"),
        ("argon2id m=4194304 t=3 p=4", "dearer"),
        ("argon2id m=65536 t=1000000 p=4", "dearer"),
        ("scrypt", "not argon2id"),
        ("argon2id m=19456 t=2 p=1", "does not open"),
    ] {
        change_kdf(&path, kdf);
        let since = std::time::Instant::now();
        let said = keepd.fails(1, &["backup", "shop"]);
        assert!(said.contains(why), "{kdf}: {said}");
        assert!(since.elapsed().as_secs() < 20, "{kdf} took {:?}", since.elapsed());
    }
    change_kdf(&path, whole["kdf"].as_str().unwrap());
    keepd.ok(&["backup", "shop"]);
    let log = keepd.log();
    assert!(!log.contains("canary"), "a passphrase is in the log: {log}");
}
