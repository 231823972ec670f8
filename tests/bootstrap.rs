//! keepd rescue bootstrap: the machine is gone, with its configuration, its state and its data; a destination and the recovery kit are left.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use keepd::crypto::{Profile, ProfileKey, key_file};
use keepd::portable::Packing;
use keepd::portable::envelope::{self, Envelope};
use keepd::portable::seal::Keys;
use serde_json::{Value, json};

const SCHEDULE: &str = "0 3 1 1 *";

/// A machine with a database, files, two destinations (the second one a plugin whose directory is a secret) and a hook; its configuration is stored
/// at the first of them.
struct Machine {
    keepd: Keepd,
    /// What its sources were.
    truth: tempfile::TempDir,
}

impl Machine {
    fn new(config_backup: &str) -> Self {
        let mut keepd = Keepd::prepared();
        Self::configure(&keepd, config_backup);
        drop(make_database(&keepd.path("shop.db"), 500));
        fs::create_dir_all(keepd.path("files/deep")).unwrap();
        fs::write(keepd.path("files/deep/note.txt"), "a note").unwrap();
        fs::write(keepd.path("files/big"), noise(1 << 20, 5)).unwrap();
        keepd.start();
        keepd.ok(&["backup", "shop"]);
        fs::write(keepd.path("files/later"), "later").unwrap();
        keepd.ok(&["backup", "shop"]);
        let machine = Self { keepd, truth: tempfile::tempdir().unwrap() };
        machine.store();
        machine.keepd.ok(&["key", "kit", "main", "-o", machine.path("kit.py").to_str().unwrap()]);
        machine
    }

    fn configure(keepd: &Keepd, config_backup: &str) {
        let d = keepd.dir.path().display();
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/plugins/directory.py");
        fs::write(
            keepd.path("keepd.toml"),
            format!(
                "# Of the shop's machine.\n[daemon]\nstate_dir = \"{d}/state\"\nsocket = \"{d}/keepd.sock\"\n[encryption.main]\nkey_file = \"main.key\"\n\
                 [destination.local]\nservice = \"fs\"\nroot = \"{d}/repository\"\nencryption = \"main\"\n\
                 [config_backup]\ndestination = \"local\"\non_change = true\n{config_backup}\n\
                 [job.shop]\nschedule = \"{SCHEDULE}\"\ndestinations = [\"local\", \"away\"]\nhooks = {{ before = [\"/bin/true\", \"now\"] }}\n\
                 [[job.shop.source]]\nname = \"db\"\nsqlite = \"{d}/shop.db\"\n[[job.shop.source]]\nname = \"files\"\nfiles = \"{d}/files\"\n"
            ),
        )
        .unwrap();
        fs::create_dir(keepd.path("conf.d")).unwrap();
        fs::write(
            keepd.path("conf.d/away.toml"),
            format!(
                "[destination.away]\nservice = \"exec\"\ncommand = [\"{}\", \"{}\"]\noptions = {{ directory = {{ file = \"secrets/away\" }} }}\nencryption = \"main\"\n",
                python().display(),
                program.display()
            ),
        )
        .unwrap();
        fs::create_dir(keepd.path("secrets")).unwrap();
        fs::write(keepd.path("secrets/away"), format!("{d}/away\n")).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.keepd.path(name)
    }

    /// The stored configurations, the oldest first.
    fn stored(&self) -> Vec<PathBuf> {
        files_below(&self.path("repository/config"))
    }

    /// Has the configuration stored, by a change of it.
    fn store(&self) {
        let before = self.stored();
        let main = self.path("keepd.toml");
        fs::write(&main, fs::read_to_string(&main).unwrap() + "# changed\n").unwrap();
        self.keepd.ok(&["reload"]);
        let since = Instant::now();
        while self.stored() == before || !self.keepd.json(&["status"])["running"].as_array().is_none_or(Vec::is_empty) {
            assert!(since.elapsed() < Duration::from_secs(30), "no configuration is stored: {}", self.keepd.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Everything goes but the destinations and the kit.
    fn burn(&mut self) {
        self.keepd.stop();
        for name in ["files", "shop.db"] {
            assert!(Command::new("cp").arg("-a").arg(self.path(name)).arg(self.truth.path()).status().unwrap().success());
        }
        for entry in fs::read_dir(self.keepd.dir.path()).unwrap().map(|e| e.unwrap()) {
            let name = entry.file_name().into_string().unwrap();
            match name.as_str() {
                "repository" | "away" | "kit.py" | "keepd.log" => {}
                _ if entry.file_type().unwrap().is_dir() => fs::remove_dir_all(entry.path()).unwrap(),
                _ => fs::remove_file(entry.path()).unwrap(),
            }
        }
        fs::remove_file(self.path("keepd.log")).unwrap();
    }

    fn command(&self, destination: &str, arguments: &[&str]) -> Command {
        let mut run = Command::new(keepd_binary());
        run.args(["rescue", "bootstrap", "--destination", destination, "--config"]).arg(self.path("keepd.toml")).args(arguments);
        run.current_dir(self.keepd.dir.path()).stdin(Stdio::null());
        run
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(&format!("fs:{}", self.path("repository").display()), arguments).output().unwrap()
    }

    fn ends(&self, code: i32, arguments: &[&str]) -> String {
        let out = self.run(arguments);
        assert_eq!(out.status.code(), Some(code), "{arguments:?}: {}", text(&out));
        text(&out)
    }

    fn json(&self, code: i32, arguments: &[&str]) -> Value {
        let out = self.run(&[arguments, &["--kit", "kit.py", "--json"]].concat());
        assert_eq!(out.status.code(), Some(code), "{arguments:?}: {}", text(&out));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// It ends so, and nothing is there that was not there before.
    fn leaves_nothing(&self, code: i32, arguments: &[&str]) -> String {
        let before = everything(self.keepd.dir.path());
        let said = self.ends(code, arguments);
        assert_eq!(everything(self.keepd.dir.path()), before, "{said}");
        said
    }

    fn restores_in_place(&mut self) {
        self.keepd.ok(&["restore", "latest", "--job", "shop", "--in-place", "--yes"]);
        assert_same(&self.truth.path().join("files"), &self.path("files"));
        assert_eq!(fs::read(self.path("shop.db")).unwrap(), fs::read(self.truth.path().join("shop.db")).unwrap());
        assert_eq!(proven_sum(&self.path("shop.db")), 50_000);
    }

    /// Stores another configuration, made of the newest; unsealed where that is wanted.
    fn forge(&self, sealed: bool, change: impl FnOnce(&mut Envelope)) -> PathBuf {
        let key = key_file::all_from_bytes(Path::new("kit.py"), &fs::read(self.path("kit.py")).unwrap()).unwrap().0.remove(0);
        let profile = Profile::of("main", ProfileKey::Key(Arc::new(key)));
        let keys = Keys { keys: profile.keys().cloned().collect(), ..Keys::default() };
        let newest = self.stored().pop().unwrap();
        let mut envelope = envelope::read(&*fs::read(newest).unwrap(), &keys).unwrap().envelope;
        change(&mut envelope);
        let time = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).checked_add(jiff::Span::new().minutes(1)).unwrap();
        let (seal, suffix) = if sealed { (Some(&profile), ".enc") } else { (None, "") };
        let path = self.path(&format!("repository/config/config_backup_{}.json.gz{suffix}", time.strftime("%Y%m%dT%H%M%SZ")));
        fs::write(&path, envelope::write(&envelope, Vec::new(), Packing::Gzip, seal).unwrap()).unwrap();
        path
    }
}

/// Names and modes of all there is.
fn everything(directory: &Path) -> Vec<(PathBuf, u32)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap().map(|e| e.unwrap()) {
        let meta = entry.metadata().unwrap();
        // SQLite removes these when the last one closes it.
        if !["-wal", "-shm"].iter().any(|end| entry.path().to_string_lossy().ends_with(end)) {
            found.push((entry.path(), meta.permissions().mode()));
        }
        if meta.is_dir() {
            found.extend(everything(&entry.path()));
        }
    }
    found.sort();
    found
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn item<'e>(envelope: &'e mut Envelope, kind: &str, name: &str) -> &'e mut envelope::Item {
    envelope.items.iter_mut().find(|i| i.r#type == kind && i.name == name).unwrap()
}

fn without_secrets(envelope: &mut Envelope) {
    envelope.includes_secrets = false;
    envelope.items.iter_mut().flat_map(|i| &mut i.secrets).for_each(|s| s.value = String::new().into());
}

#[test]
fn a_machine_comes_back_from_a_destination_and_the_kit() {
    let mut machine = Machine::new("include_secrets = true");
    let told = machine.keepd.json(&["status"])["jobs"][0].clone();
    let backups = machine.keepd.backups();
    machine.burn();
    let before = everything(&machine.path("repository"));

    let planned = machine.json(0, &["--dry-run"]);
    assert!(planned["dry_run"] == true && planned["missing"] == json!([]) && planned["written"] == json!([]), "{planned}");
    assert!(!machine.path("keepd.toml").exists() && !machine.path("state").exists());

    let said = machine.ends(0, &["--kit", "kit.py"]);
    assert!(said.contains("  the newest there; "), "{said}");
    assert!(said.contains("opened with the key") && said.contains("with its secrets"), "{said}");
    assert!(said.contains("job.shop: hooks = { before = [\"/bin/true\", \"now\"] }"), "{said}");
    assert!(said.contains("destination.away: command = "), "{said}");
    assert!(said.contains("2 backups") && said.contains("restore latest --job shop --in-place"), "{said}");
    assert!(!said.contains("take-over"), "the same machine follows itself: {said}");
    assert_eq!(everything(&machine.path("repository")), before, "nothing was written to the storage");
    assert_eq!(fs::read_to_string(machine.path("secrets/away")).unwrap(), format!("{}\n", machine.path("away").display()));
    for file in ["keepd.toml", "main.key", "secrets/away", "conf.d/job.shop.toml", "state/ledger.sqlite"] {
        assert_eq!(mode(&machine.path(file)) & 0o077, 0, "{file}");
    }
    for directory in ["conf.d", "state"] {
        assert_eq!(mode(&machine.path(directory)), 0o700, "{directory}");
    }
    let left: Vec<String> = fs::read_dir(machine.path("state")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(left.iter().all(|name| !name.starts_with('.')), "{left:?}");

    machine.keepd.start();
    assert_eq!(machine.keepd.backups(), backups);
    let job = machine.keepd.json(&["status"])["jobs"][0].clone();
    for key in ["schedule", "last_good", "runs_good", "next"] {
        assert!(!job[key].is_null() && job[key] == told[key], "{key}: {job} {told}");
    }
    machine.restores_in_place();
    machine.keepd.ok(&["check", "local", "--read-data"]);
    machine.keepd.ok(&["backup", "shop"]);
    assert_eq!(machine.keepd.backups().len(), 3);
    machine.keepd.stop();

    let said = machine.leaves_nothing(1, &["--kit", "kit.py"]);
    assert!(said.contains("keepd.toml exists") && said.contains("keepctl config import"), "{said}");
    fs::rename(machine.path("keepd.toml"), machine.path("old.toml")).unwrap();
    let said = machine.leaves_nothing(1, &["--kit", "kit.py"]);
    assert!(said.contains("conf.d/") && said.contains("is part of a configuration"), "{said}");
    fs::rename(machine.path("conf.d"), machine.path("old.d")).unwrap();
    let said = machine.leaves_nothing(1, &["--kit", "kit.py"]);
    assert!(said.contains("has the state of a keepd that worked here"), "{said}");
}

#[test]
fn the_installed_sample_is_no_configuration() {
    let mut machine = Machine::new("include_secrets = true");
    machine.burn();
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/keepd.toml");
    fs::copy(&sample, machine.path("keepd.toml")).unwrap();
    // What fails puts it back.
    fs::write(machine.path("state"), "").unwrap();
    machine.leaves_nothing(1, &["--kit", "kit.py"]);
    assert_eq!(fs::read(machine.path("keepd.toml")).unwrap(), fs::read(&sample).unwrap());
    fs::remove_file(machine.path("state")).unwrap();
    fs::create_dir_all(machine.path("state")).unwrap();
    machine.ends(0, &["--kit", "kit.py"]);
    assert!(!fs::read_to_string(machine.path("keepd.toml")).unwrap().contains("An application with a live SQLite"));
    assert!(files_below(machine.keepd.dir.path()).iter().all(|f| !f.to_string_lossy().contains("before-bootstrap")));
    machine.keepd.start();
    machine.restores_in_place();
}

#[test]
fn what_is_not_in_it_is_taken_from_the_kit_or_told() {
    let mut machine = Machine::new("");
    machine.burn();
    let said = machine.ends(3, &["--kit", "kit.py"]);
    assert!(said.contains("without secrets"), "{said}");
    let missing: Vec<&str> = said.lines().filter(|line| line.starts_with("missing: ")).collect();
    assert_eq!(missing.len(), 1, "{said}");
    assert!(
        missing[0].contains("destination.away") && missing[0].contains(&format!("put it into {}", machine.path("secrets/away").display())),
        "{said}"
    );
    assert!(said.contains("away (exec:away") && said.contains("could not be looked at"), "{said}");
    assert_eq!(mode(&machine.path("main.key")), 0o600);
    machine.keepd.start();
    machine.restores_in_place();
    fs::create_dir_all(machine.path("secrets")).unwrap();
    fs::write(machine.path("secrets/away"), format!("{}\n", machine.path("away").display())).unwrap();
    machine.keepd.ok(&["backup", "shop"]);
    machine.keepd.stop();
}

#[test]
fn what_opened_the_destination_is_taken_over() {
    let mut machine = Machine::new("");
    machine.burn();
    assert!(Command::new("cp").arg("-a").arg(machine.path("repository/config")).arg(machine.path("away")).status().unwrap().success());
    let kit = fs::read_to_string(machine.path("kit.py")).unwrap();
    let settings: String =
        kit.lines().filter_map(|line| Some(line.strip_prefix("#2: ").or(line.strip_prefix("#1: "))?.to_owned() + "\n")).collect();
    fs::write(machine.path("destinations.toml"), &settings).unwrap();
    let variable = settings.split("env = \"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
    let mut run = machine.command("destinations.toml", &["--name", "away", "--kit", "kit.py", "--json"]);
    let out = run.env(variable, machine.path("away")).output().unwrap();
    assert_eq!(out.status.code(), Some(0), "{}", text(&out));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(report["missing"] == json!([]) && report["asked_elsewhere"] == json!([]), "{report}");
    // Without the variable it is there all the same.
    machine.keepd.start();
    machine.keepd.ok(&["destination", "test", "away"]);
    machine.restores_in_place();
}

#[test]
fn what_cannot_be_believed_is_refused() {
    let mut machine = Machine::new("include_secrets = true");
    std::thread::sleep(Duration::from_millis(1100));
    machine.store();
    machine.burn();
    let newest = machine.stored().pop().unwrap();
    let name = newest.file_name().unwrap().to_str().unwrap().to_owned();
    let whole = fs::read(&newest).unwrap();

    machine.keepd.generate_key("other.key");
    let said = machine.leaves_nothing(1, &["--kit", "other.key"]);
    assert!(said.contains(&name) && said.contains("does not open it"), "{said}");
    let said = machine.leaves_nothing(1, &[]);
    assert!(said.contains("no key was given"), "{said}");
    let said = machine.leaves_nothing(2, &["--kit", "kit.py", "--cache", "cache"]);
    assert!(said.contains("--cache"), "{said}");

    // Cut off, and with another bit.
    fs::write(&newest, &whole[..whole.len() - 20]).unwrap();
    let said = machine.leaves_nothing(1, &["--kit", "kit.py"]);
    assert!(said.contains(&name) && said.contains("cut off") && said.contains("--from NAME"), "{said}");
    let mut other = whole.clone();
    let half = other.len() / 2;
    other[half] ^= 1;
    fs::write(&newest, &other).unwrap();
    assert!(machine.leaves_nothing(1, &["--kit", "kit.py"]).contains("does not open"));
    fs::write(&newest, &whole).unwrap();

    // An older one under a newer name.
    let renamed = machine.path("repository/config/config_backup_20991231T235959Z.json.gz.enc");
    fs::write(&renamed, &whole).unwrap();
    let said = machine.leaves_nothing(1, &["--kit", "kit.py"]);
    assert!(said.contains("2099-12-31") && said.contains("another's name") && said.contains(&name), "{said}");
    let said = machine.leaves_nothing(0, &["--kit", "kit.py", "--dry-run", "--from", "config_backup_20991231T235959Z.json.gz.enc"]);
    assert!(said.contains("warning: ") && said.contains("another's name"), "{said}");
    fs::remove_file(&renamed).unwrap();
    let oldest = machine.stored()[0].file_name().unwrap().to_str().unwrap().to_owned();
    let said = machine.leaves_nothing(0, &["--kit", "kit.py", "--dry-run", "--from", &format!("config/{oldest}")]);
    assert!(said.contains("NOT the newest there"), "{said}");
    let said = machine.leaves_nothing(1, &["--kit", "kit.py", "--from", "none"]);
    assert!(said.contains("there is no 'none'") && said.contains(&name), "{said}");

    // Open to everybody.
    let open = machine.forge(false, without_secrets);
    let said = machine.leaves_nothing(1, &["--kit", "kit.py"]);
    assert!(said.contains("is not sealed") && said.contains("--allow-unsealed"), "{said}");
    let said = machine.leaves_nothing(3, &["--kit", "kit.py", "--allow-unsealed", "--dry-run"]);
    assert!(said.contains("nothing shows who made it") && said.contains("missing: destination.away"), "{said}");
    // As a file that somebody kept.
    fs::rename(&open, machine.path("kept.json.gz")).unwrap();
    machine.leaves_nothing(3, &["--kit", "kit.py", "--allow-unsealed", "--dry-run", "--from", "kept.json.gz"]);
    fs::rename(&newest, machine.path("kept.enc")).unwrap();
    machine.leaves_nothing(0, &["--kit", "kit.py", "--dry-run", "--from", "kept.enc"]);

    fs::remove_dir_all(machine.path("repository/config")).unwrap();
    let said = machine.leaves_nothing(1, &["--kit", "kit.py"]);
    assert!(said.contains("no configuration is stored") && said.contains("keepd rescue restore"), "{said}");
    machine.ends(0, &["--kit", "kit.py", "--from", "kept.enc"]);
}

#[test]
fn what_fails_half_way_leaves_nothing() {
    let mut machine = Machine::new("include_secrets = true");
    machine.burn();
    fs::write(machine.path("file"), "").unwrap();
    let state_dir = format!("{}/file/state", machine.path("").display());
    let forged = machine.forge(true, |envelope| item(envelope, "settings", "daemon").value["state_dir"] = state_dir.as_str().into());
    let said = machine.leaves_nothing(1, &["--kit", "kit.py"]);
    assert!(said.contains("cannot make the state directory"), "{said}");
    fs::remove_file(forged).unwrap();

    // A table that no keepd takes.
    let forged = machine.forge(true, |envelope| item(envelope, "job", "shop").value["schedul"] = "@daily".into());
    let said = machine.leaves_nothing(1, &["--kit", "kit.py"]);
    assert!(said.contains("schedul"), "{said}");
    fs::remove_file(forged).unwrap();

    // When all else is done: a secret has to go where a file stands in the way.
    fs::write(machine.path("secrets"), "").unwrap();
    let forged = machine.forge(true, |envelope| {
        item(envelope, "destination", "away").value["options"]["directory"] = json!({ "env": "KEEPD_TEST_NONE" });
    });
    let said = machine.leaves_nothing(1, &["--kit", "kit.py"]);
    assert!(said.contains("secrets"), "{said}");
    fs::remove_file(machine.path("secrets")).unwrap();
    machine.ends(0, &["--kit", "kit.py"]);
    assert_eq!(mode(&machine.path("secrets/destination.away.options.directory")), 0o600);
    fs::remove_file(forged).unwrap();
    machine.keepd.start();
    machine.restores_in_place();
}

#[test]
fn another_machine_takes_over_when_it_is_told_to() {
    let mut machine = Machine::new("include_secrets = true");
    machine.burn();
    // As if it had been written elsewhere.
    for place in ["repository", "away"] {
        let lease = machine.path(place).join("writer.json");
        let mut record: Value = serde_json::from_slice(&fs::read(&lease).unwrap()).unwrap();
        (record["machine"], record["host"], record["released"]) = ("0123456789abcdef".into(), "burnt".into(), true.into());
        fs::write(&lease, record.to_string()).unwrap();
    }
    let report = machine.json(0, &[]);
    assert!(report["destinations"][1]["writer"].as_str().unwrap().contains("burnt"), "{report}");
    let next = report["next"].to_string();
    assert!(next.contains("destination take-over local") && next.contains("destination take-over away"), "{next}");
    machine.keepd.start();
    // Nothing is there that would have to be saved first.
    machine.restores_in_place();
    assert!(machine.keepd.fails(1, &["backup", "shop"]).contains("take-over"));
    fs::write(machine.path("files/later"), "changed").unwrap();
    let said = machine.keepd.fails(1, &["restore", "latest", "--job", "shop", "--in-place", "--yes"]);
    assert!(said.contains("take-over"), "{said}");
    machine.keepd.ok(&["destination", "take-over", "local"]);
    machine.keepd.ok(&["destination", "take-over", "away"]);
    machine.restores_in_place();
    machine.keepd.stop();

    // The same in one step.
    for name in ["keepd.toml", "main.key", "secrets/away"] {
        fs::remove_file(machine.path(name)).unwrap();
    }
    for name in ["conf.d", "state"] {
        fs::remove_dir_all(machine.path(name)).unwrap();
    }
    let lease = machine.path("repository/writer.json");
    let mut record: Value = serde_json::from_slice(&fs::read(&lease).unwrap()).unwrap();
    (record["machine"], record["instance"]) = ("0123456789abcdef".into(), "other".into());
    fs::write(&lease, record.to_string()).unwrap();
    let report = machine.json(0, &["--take-over"]);
    let local = report["destinations"].as_array().unwrap().iter().find(|d| d["name"] == "local").unwrap();
    assert!(local["taken_over"] == true && local["writer"] == Value::Null, "{report}");
    assert!(!report["next"].to_string().contains("take-over"), "{report}");
    machine.keepd.start();
    machine.keepd.ok(&["backup", "shop"]);
}
