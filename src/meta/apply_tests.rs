//! Imports into directories of this machine: whole or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use keepd_protocol::configuration::{Allow, ImportMode, ItemAction, ItemConflict};
use serde_json::json;

use super::apply::{Prepared, prepare};
use super::collect::collect;
use super::plan::Options;
use crate::config::{self, Texts};
use crate::crypto::{Key, Profile, ProfileKey, key_file};
use crate::ledger::{Ledger, ScheduleState};
use crate::portable::Packing;
use crate::portable::envelope::{self, Envelope, SecretKind};
use crate::portable::seal::Keys;

/// A machine with a configuration of its own.
struct World {
    dir: tempfile::TempDir,
    ledger: Ledger,
}

const DAEMON: &str = "[daemon]\nstate_dir = \"/var/lib/keepd-of-tests\"\nsocket = \"/run/keepd-of-tests.sock\"\n";

impl World {
    fn new(main: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("keepd")).unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        fs::write(dir.path().join("keepd/keepd.toml"), main).unwrap();
        Self { ledger: Ledger::open(&dir.path().join("state")).unwrap(), dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("keepd").join(name)
    }

    fn put(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), text).unwrap();
    }

    fn previous(&self) -> PathBuf {
        self.dir.path().join("state/previous")
    }

    fn texts(&self) -> Texts {
        Texts::read(&self.path("keepd.toml")).unwrap()
    }

    fn collect(&self) -> Envelope {
        collect(&self.texts(), Some(&self.ledger), None, true).unwrap()
    }

    fn prepare(&self, envelope: &Envelope, options: &Options) -> Prepared {
        prepare(self.texts(), &self.ledger, envelope, options).unwrap()
    }

    fn apply(&self, envelope: &Envelope, options: &Options) -> Result<(), String> {
        self.prepare(envelope, options).apply(&self.previous(), &self.ledger)
    }

    /// Everything that an import could change: files with their texts, and the ledger's states.
    fn all(&self) -> (BTreeMap<PathBuf, String>, BTreeMap<String, ScheduleState>) {
        let mut found = BTreeMap::new();
        let mut open = vec![self.path("")];
        while let Some(dir) = open.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    found.insert(path.clone(), String::new());
                    open.push(path);
                } else {
                    found.insert(path.clone(), fs::read_to_string(&path).unwrap());
                }
            }
        }
        (found, self.ledger.schedule_states().unwrap())
    }
}

fn options(mode: ImportMode, on_conflict: ItemConflict) -> Options {
    Options { mode, on_conflict, allow: Allow::ALL.iter().copied().collect(), ..Options::default() }
}

fn full() -> Options {
    options(ImportMode::Full, ItemConflict::Skip)
}

/// Sealed, and opened again.
fn travels(envelope: &Envelope) -> Envelope {
    let key = Arc::new(Key::generate().unwrap());
    let profile = Profile::of("main", ProfileKey::Key(key.clone()));
    let bytes = envelope::write(envelope, Vec::new(), Packing::Zstd, Some(&profile)).unwrap();
    envelope::read(bytes.as_slice(), &Keys { keys: vec![ProfileKey::Key(key)], ..Keys::default() }).unwrap().envelope
}

fn key_text() -> String {
    key_file::text_of(&Key::generate().unwrap()).to_string()
}

fn without_time(mut envelope: Envelope) -> Envelope {
    envelope.exported_at = Timestamp::UNIX_EPOCH;
    envelope
}

const SHOP: &str = "
# The key of everything.
[encryption.main]
key_file = 'keys/main.key'
[destination.local]
service = 'fs'
root = '/nowhere/of-tests'
encryption = 'main'
[destination.far]
service = 'webdav'
endpoint = 'https://example.org'
username = 'u'
password = { file = 'secrets/far' }
encryption = 'main'
[job.shop]
destinations = ['local', 'far']
at = 2026-12-24T18:00:00
[[job.shop.source]]
files = '/srv/shop'
";

/// A machine with a shop on it.
fn shop() -> World {
    let world = World::new(&format!("{DAEMON}{SHOP}"));
    world.put("keys/main.key", "");
    fs::remove_file(world.path("keys/main.key")).unwrap();
    key_file::generate(&world.path("keys/main.key")).unwrap();
    world.put("secrets/far", "pass word\n");
    let state = ScheduleState {
        schedule: "at 2026-12-24T18:00 ".into(),
        first_seen: Some("2026-01-01T00:00:00Z".parse().unwrap()),
        runs_good: 3,
        ..ScheduleState::default()
    };
    world.ledger.save_schedule_state("shop", &state).unwrap();
    world
}

#[test]
fn what_this_machine_was_asked_to_do_once_stays() {
    let (old, new) = (shop(), World::new(&format!("{DAEMON}{SHOP}")));
    let at = |time: &str| time.parse().unwrap();
    old.ledger.change_schedule_state("shop", |state| state.once.push(at("2035-01-01T00:00:00Z"))).unwrap();
    new.ledger.change_schedule_state("shop", |state| state.once.push(at("2036-01-01T00:00:00Z"))).unwrap();
    new.apply(&travels(&old.collect()), &options(ImportMode::Full, ItemConflict::Overwrite)).unwrap();
    let state = new.ledger.schedule_state("shop").unwrap();
    // So does all that is known of the job here.
    assert_eq!((state.runs_good, state.once), (0, vec![at("2036-01-01T00:00:00Z")]));
}

#[test]
fn a_machine_is_what_another_was_and_back() {
    let (old, new) = (shop(), World::new(DAEMON));
    let before = new.all();
    let envelope = old.collect();
    let prepared = new.prepare(&travels(&envelope), &full());
    assert_eq!(prepared.plan().problems, [""; 0]);
    assert_eq!(prepared.plan().missing, [""; 0]);
    assert_eq!(prepared.plan().files.len(), 2);
    assert!(prepared.plan().diff.contains("+[job.shop]") && !prepared.plan().diff.contains("pass word"), "{}", prepared.plan().diff);
    assert_eq!(before, new.all(), "to think changes nothing");
    prepared.apply(&new.previous(), &new.ledger).unwrap();
    assert_eq!(without_time(new.collect()), without_time(envelope.clone()));
    // Once more is nothing.
    let again = new.prepare(&envelope, &full());
    assert!(again.is_nothing() && again.plan().items.iter().all(|i| i.action == ItemAction::Same), "{:?}", again.plan().items);
    config::undo(&new.path("keepd.toml"), &new.previous()).unwrap().commit(&new.previous()).unwrap();
    assert_eq!(new.texts().files, [(new.path("keepd.toml"), DAEMON.to_owned())]);
}

#[test]
fn whatever_fails_leaves_all_as_it_was() {
    let (old, new) = (shop(), World::new(DAEMON));
    let envelope = old.collect();
    let before = new.all();
    let refused = |prepared: Prepared, word: &str| {
        let now = new.all();
        let error = prepared.apply(&new.previous(), &new.ledger).unwrap_err();
        assert!(error.contains(word), "{error}");
        assert_eq!(now, new.all(), "{word}");
    };

    // Not allowed.
    let mut forged = envelope.clone();
    let job = forged.items.iter_mut().find(|i| i.r#type == "job").unwrap();
    job.value["hooks"] = json!({"before": ["/bin/evil"]});
    let all_but = |allow: Allow| Options { allow: Allow::ALL.iter().copied().filter(|a| *a != allow).collect(), ..full() };
    refused(new.prepare(&forged, &all_but(Allow::Commands)), "--allow-commands");
    // Wrong.
    let job = forged.items.iter_mut().find(|i| i.r#type == "job").unwrap();
    job.value["hooks"] = json!("evil");
    refused(new.prepare(&forged, &full()), "hooks");
    // A key that is none in the eyes of the profile.
    let mut short = envelope.clone();
    let profile = short.items.iter_mut().find(|i| i.r#type == "encryption").unwrap();
    profile.value = json!({"passphrase": {"file": "pass"}});
    profile.secrets[0] = envelope::Secret { at: "passphrase".into(), kind: envelope::SecretKind::Secret, value: "short".to_owned().into() };
    refused(new.prepare(&short, &full()), "shorter");
    // Somebody makes the file, or changes the configuration, meanwhile.
    let prepared = new.prepare(&envelope, &full());
    new.put("secrets/far", "mine");
    refused(prepared, "appeared meanwhile");
    fs::remove_dir_all(new.path("secrets")).unwrap();
    let prepared = new.prepare(&envelope, &full());
    new.put("keepd.toml", &format!("{DAEMON}# changed\n"));
    refused(prepared, "meanwhile");
    new.put("keepd.toml", DAEMON);
    assert_eq!(before, new.all());
    new.apply(&envelope, &full()).unwrap();
}

#[test]
fn what_the_machine_lacks_is_said_first() {
    let (old, new) = (shop(), World::new(DAEMON));
    let open = collect(&old.texts(), Some(&old.ledger), None, false).unwrap();
    let before = new.all();
    let prepared = new.prepare(&open, &full());
    let told = prepared.plan().problems.join("\n");
    assert!(told.contains("keys/main.key") && told.contains("import again"), "{told}");
    assert_eq!(prepared.plan().missing.len(), 2, "{:?}", prepared.plan().missing);
    prepared.apply(&new.previous(), &new.ledger).unwrap_err();
    assert_eq!(before, new.all());
    // Where no daemon runs, it is only told.
    let told = new.prepare(&open, &full()).apply_anyway(&new.previous(), &new.ledger).unwrap();
    assert!(told[0].contains("keys/main.key"), "{told:?}");
    assert!(new.texts().load().unwrap().jobs.contains_key("shop"));
    // With the key put there, the rest follows.
    let new = World::new(DAEMON);
    new.put("keys/main.key", &key_text());
    fs::set_permissions(new.path("keys/main.key"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let prepared = new.prepare(&open, &full());
    assert_eq!((prepared.plan().problems.len(), prepared.plan().missing.len()), (0, 1), "{:?}", prepared.plan());
    prepared.apply(&new.previous(), &new.ledger).unwrap();
}

#[test]
fn a_rename_of_a_place_that_is_there_is_what_the_check_refuses() {
    let world = shop();
    let envelope = world.collect();
    world.put(
        "keepd.toml",
        &format!("{DAEMON}{SHOP}")
            .replace("far']", "far']\nenabled = false")
            .replace("[destination.local]", "[destination.local]\ncompression = 'gzip'"),
    );
    let before = world.all();
    let prepared = world.prepare(&envelope, &options(ImportMode::Merge, ItemConflict::Rename));
    let plan = prepared.plan().clone();
    assert!(plan.problems.iter().any(|p| p.contains("each needs a directory of its own")), "{:?}", plan.problems);
    let local = plan.items.iter().find(|i| i.item == "destination.local").unwrap();
    assert!(local.notes.iter().any(|n| n.contains("the same place as destination.local")), "{:?}", local.notes);
    prepared.apply(&world.previous(), &world.ledger).unwrap_err();
    assert_eq!(before, world.all());
    // Elsewhere it comes, with everything that names it.
    let mut elsewhere = envelope;
    elsewhere.items.iter_mut().find(|i| i.name == "local").unwrap().value["root"] = json!("/nowhere/else");
    world.apply(&elsewhere, &options(ImportMode::Merge, ItemConflict::Rename)).unwrap();
    let config = world.texts().load().unwrap();
    assert_eq!(config.jobs["shop-2"].destinations, ["local-2", "far"]);
    assert_eq!(config.jobs["shop"].destinations, ["local", "far"]);
    assert_eq!(world.ledger.schedule_state("shop-2").unwrap().runs_good, 3);
    for (path, text) in before.0 {
        assert_eq!(fs::read_to_string(&path).unwrap_or_default(), text, "{}", path.display());
    }
}

#[test]
fn a_forged_file_writes_nowhere_but_to_new_secret_files() {
    for place in [
        "conf.d/evil.toml",
        "evil.toml",
        ".keepd-change.json",
        "other/x",
        "state/x",
        "../x",
        "/etc/of-tests-never-made",
        "keepd.toml/x",
        "keys/../../x",
    ] {
        let new = World::new(&DAEMON.replace("/var/lib/keepd-of-tests", "STATE"));
        let main = DAEMON.replace("/var/lib/keepd-of-tests", new.path("state").to_str().unwrap());
        new.put("keepd.toml", &main);
        // A directory of somebody else's, who reads what is in it.
        new.put("other/hello", "");
        let mut envelope = shop().collect();
        envelope.items.retain(|i| i.r#type != "settings");
        let far = envelope.items.iter_mut().find(|i| i.name == "far").unwrap();
        far.value["password"] = json!({"file": place});
        far.secrets[0].value = "[job.evil]\nhooks = { before = ['/bin/evil'] }".to_owned().into();
        let merge = options(ImportMode::Merge, ItemConflict::Skip);
        let prepared = new.prepare(&envelope, &merge);
        let files: BTreeSet<&str> = prepared.plan().files.iter().map(String::as_str).collect();
        let wanted = [new.path("keys/main.key"), new.path("secrets/destination.far.password")];
        assert_eq!(files, wanted.iter().map(|p| p.to_str().unwrap()).collect(), "{place}");
        prepared.apply(&new.previous(), &new.ledger).unwrap();
        assert!(!new.path(place).exists() && !Path::new("/etc/of-tests-never-made").exists(), "{place}");
        assert!(!new.texts().load().unwrap().jobs.contains_key("evil"));
    }
}

#[test]
fn the_directory_of_everybody_gets_files_in_directories_of_their_own_only() {
    let mut envelope = shop().collect();
    envelope.items.iter_mut().find(|i| i.name == "far").unwrap().value["password"] = json!({"file": "far.password"});
    let new = World::new(DAEMON);
    let files = new.prepare(&envelope, &full()).plan().files.clone();
    assert!(files.contains(&new.path("secrets/destination.far.password").to_str().unwrap().to_owned()), "{files:?}");
    // As with /etc/keepd.toml.
    let names = ["far.password", "ld.so.preload", "cron.d/x", "cron.d/x.key", "main.key", "pair.pub", "keys/main.key", "secrets/x", "keys"];
    let places = |kind| super::apply::places_of_tests(Path::new("/etc"), kind, &names);
    assert_eq!(places(SecretKind::Secret), ["main.key", "keys/main.key", "secrets/x"]);
    let own = super::apply::places_of_tests(new.path("").as_path(), SecretKind::KeyFile, &["a.key", "deep/er/a", "conf.d/a.key", "a"]);
    assert_eq!(places(SecretKind::KeyFile), ["main.key", "pair.pub", "keys/main.key", "secrets/x"]);
    assert_eq!(own, ["a.key", "deep/er/a"]);
}

#[test]
fn a_key_file_holds_its_key_alone() {
    let mut envelope = shop().collect();
    let profile = envelope.items.iter_mut().find(|i| i.r#type == "encryption").unwrap();
    let text = profile.secrets[0].value.clone();
    profile.secrets[0].value = format!("# * * * * * root evil\n{}", *text).into();
    let new = World::new(DAEMON);
    new.apply(&envelope, &full()).unwrap();
    assert_eq!(fs::read_to_string(new.path("keys/main.key")).unwrap(), *text);
}

#[test]
fn keys_are_given_to_nobody_and_forged_references_are_not_waited_for() {
    let new = shop();
    let mut envelope = new.collect();
    envelope.items.retain(|i| i.name == "far");
    envelope.items[0].name = "evil".into();
    envelope.items[0].value["endpoint"] = json!("https://evil.example.org");
    envelope.items[0].secrets.clear();
    envelope.item_count = 1;
    let merge = options(ImportMode::Merge, ItemConflict::Skip);
    // By another name than the profile's, it is the same key.
    std::os::unix::fs::symlink(new.path("keys/main.key"), new.path("link")).unwrap();
    for place in ["keys/main.key", "link"] {
        envelope.items[0].value["password"] = json!({"file": place});
        let problems = new.prepare(&envelope, &merge).plan().problems.clone();
        assert!(problems.iter().any(|p| p.contains("give away")), "{place}: {problems:?}");
    }
    let fifo = new.path("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
    envelope.items[0].value["password"] = json!({"file": "fifo"});
    let prepared = new.prepare(&envelope, &merge);
    assert!(prepared.plan().missing.iter().any(|m| m.contains("fifo")), "{:?}", prepared.plan());
    // A secret of another destination is told when that is allowed only.
    envelope.items[0].value["password"] = json!({"file": "secrets/far"});
    let plan = new.prepare(&envelope, &Options { allow: BTreeSet::new(), ..merge }).plan().clone();
    assert_eq!(plan.needs, [Allow::KeyChange], "{plan:?}");
}

#[test]
fn a_key_that_differs_gets_a_file_of_its_own_and_none_is_written_over() {
    let (old, new) = (shop(), shop());
    let (envelope, key) = (old.collect(), fs::read_to_string(new.path("keys/main.key")).unwrap());
    let only = Options { allow: BTreeSet::from([Allow::KeyChange]), ..options(ImportMode::Merge, ItemConflict::Overwrite) };
    let refused = new.prepare(&envelope, &Options { allow: BTreeSet::new(), ..only.clone() });
    assert_eq!(refused.plan().needs, [Allow::KeyChange], "{:?}", refused.plan());
    refused.apply(&new.previous(), &new.ledger).unwrap_err();
    new.apply(&envelope, &only).unwrap();
    assert_eq!(fs::read_to_string(new.path("keys/main.key")).unwrap(), key, "the old key stays where it was");
    assert_eq!(
        fs::read_to_string(new.path("secrets/encryption.main.key_file")).unwrap(),
        fs::read_to_string(old.path("keys/main.key")).unwrap()
    );
    assert!(new.texts().files[0].1.contains("# The key of everything."), "comments stay");
}

/// As people have them: 100 jobs that go to 20 destinations.
fn large() -> World {
    let mut text = format!("{DAEMON}[encryption.main]\nkey_file = 'keys/main.key'\n");
    for n in 0..20 {
        text += &format!(
            "[destination.d{n}]\nservice = 's3'\nbucket = 'b{n}'\nregion = 'eu-1'\nencryption = 'main'\naccess_key_id = 'AK'\nsecret_access_key = {{ file = 'secrets/d{n}' }}\n"
        );
    }
    for n in 0..100 {
        text += &format!(
            "[job.j{n}]\ndestinations = ['d{}', 'd{}']\nschedule = '30 2 * * *'\nretention = {{ keep_daily = 7 }}\n[[job.j{n}.source]]\nfiles = '/srv/j{n}'\nexclude = ['*.tmp']\n",
            n % 20,
            (n + 1) % 20
        );
    }
    let world = World::new(&text);
    world.put("secrets/x", "");
    fs::remove_file(world.path("secrets/x")).unwrap();
    fs::create_dir(world.path("keys")).unwrap();
    key_file::generate(&world.path("keys/main.key")).unwrap();
    (0..20).for_each(|n| world.put(&format!("secrets/d{n}"), &format!("secret {n}")));
    let seen = ScheduleState { first_seen: Some("2026-01-01T00:00:00Z".parse().unwrap()), ..ScheduleState::default() };
    (0..100).for_each(|n| world.ledger.save_schedule_state(&format!("j{n}"), &seen).unwrap());
    world
}

#[test]
fn a_large_one_comes_in_quickly() {
    let (old, new) = (large(), World::new(DAEMON));
    let start = std::time::Instant::now();
    let envelope = old.collect();
    let out = start.elapsed();
    let start = std::time::Instant::now();
    let prepared = new.prepare(&envelope, &full());
    let thought = start.elapsed();
    prepared.apply(&new.previous(), &new.ledger).unwrap();
    let made = start.elapsed();
    eprintln!("export {out:?}, thought through {thought:?}, applied {made:?}");
    assert_eq!(without_time(new.collect()), without_time(envelope.clone()));
    let start = std::time::Instant::now();
    assert!(new.prepare(&envelope, &full()).is_nothing());
    eprintln!("again {:?}", start.elapsed());
    assert!(made.as_secs() < 10, "{made:?}");
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    /// A part of a configuration: tables, and the files that they name, those with no text keys.
    type Part = (String, Vec<(String, Option<String>)>);

    fn profile(n: usize) -> impl Strategy<Value = Part> {
        let key =
            (any::<bool>(), any::<bool>(), prop::sample::select(vec!["keys/", "", "deep/er/"])).prop_map(move |(retired, pair, dir)| {
                let mut text = format!("[encryption.p{n}]\nkey_file = '{dir}p{n}.key'\n");
                let mut files = vec![(format!("{dir}p{n}.key"), None)];
                if retired {
                    text += &format!("retired = ['keys/old-{n}.key']\n");
                    files.push((format!("keys/old-{n}.key"), None));
                }
                if pair {
                    text += &format!("public_key = 'pairs/p{n}.pub'\n");
                    files.push((format!("pairs/p{n}.pub"), None));
                }
                (text, files)
            });
        let passphrase = "[a-zäß ]{12,30}[a-z]".prop_map(move |phrase| {
            (format!("[encryption.p{n}]\npassphrase = {{ file = 'secrets/p{n}' }}\n"), vec![(format!("secrets/p{n}"), Some(phrase))])
        });
        prop_oneof![key, passphrase]
    }

    fn retention() -> impl Strategy<Value = String> {
        prop_oneof![
            Just(String::new()),
            (1..9u32, 1..9u32).prop_map(|(a, b)| format!("retention = {{ keep_last = {a}, keep_daily = {b} }}\n"))
        ]
    }

    fn destination(n: usize, profiles: usize) -> impl Strategy<Value = Part> {
        let profile = (0..=profiles).prop_map(move |p| if p == profiles { "none".to_owned() } else { format!("p{p}") });
        (profile, retention(), any::<bool>(), "[ -~]{1,20}").prop_map(move |(profile, retention, far, password)| {
            let common = format!("encryption = '{profile}'\n{retention}");
            match far {
                false => (format!("[destination.d{n}]\nservice = 'fs'\nroot = '/nowhere/d{n}'\n{common}bandwidth = {{ up = '1MiB/s', hours = [{{ from = '08:00', to = '18:00', up = '2MiB/s' }}] }}\n"), vec![]),
                true => {
                    let text = format!("[destination.d{n}]\nservice = 'webdav'\nendpoint = 'https://example.org/{n}'\n{common}password = {{ file = 'secrets/d{n}' }}\n");
                    (text, vec![(format!("secrets/d{n}"), Some(password))])
                }
            }
        })
    }

    fn job(n: usize, destinations: usize) -> impl Strategy<Value = Part> {
        let schedule =
            prop::sample::select(vec!["", "every = '6h'\n", "schedule = '30 2 * * *'\ntimezone = 'UTC'\n", "at = 2026-12-24T18:00:00\n"]);
        let more = prop::sample::select(vec![
            "",
            "hooks = { before = ['/bin/true'], after = [['/bin/a', 'b c'], { shell = 'x \"y\" \\\\ z', timeout = '5m' }] }\n",
            "health = { url = 'http://127.0.0.1:8080/' }\n",
            "drill = { every = '7d', assert = [{ file = 'one/x', min_size = 10 }] }\n",
        ]);
        let to = prop::collection::btree_set(0..destinations, 1..=destinations);
        (schedule, more, to, retention(), any::<bool>(), any::<bool>()).prop_map(move |(schedule, more, to, retention, server, enabled)| {
            let to: Vec<String> = to.into_iter().map(|d| format!("d{d}")).collect();
            let mut text = format!("[job.j{n}]\nenabled = {enabled}\ndestinations = {to:?}\n{schedule}{more}{retention}");
            text += &format!("[[job.j{n}.source]]\nname = 'one'\nfiles = '/srv/j{n}'\nexclude = ['*.tmp', '/ä/\"']\n");
            let mut files = Vec::new();
            if server {
                text += &format!(
                    "[[job.j{n}.source]]\nname = 'db'\npostgres = {{ dbname = ['a', 'b'], password = {{ file = 'secrets/j{n}' }} }}\n"
                );
                files.push((format!("secrets/j{n}"), Some(format!("pg {n}"))));
            }
            (text, files)
        })
    }

    fn configuration() -> impl Strategy<Value = (Vec<Part>, bool)> {
        (1..3usize, 1..4usize, 0..4usize).prop_flat_map(|(p, d, j)| {
            let profiles: Vec<_> = (0..p).map(profile).collect();
            let destinations: Vec<_> = (0..d).map(|n| destination(n, p)).collect();
            let jobs: Vec<_> = (0..j).map(|n| job(n, d)).collect();
            let rest = prop::sample::select(vec![
                "".to_owned(),
                "[coverage]\nexclude = ['/srv/scratch/']\n".to_owned(),
                "[config_backup]\nevery = '1d'\ndestination = 'd0'\nencryption = 'p0'\ninclude_secrets = true\non_change = true\n"
                    .to_owned(),
            ]);
            (profiles, destinations, jobs, rest, any::<bool>()).prop_map(|(p, d, j, rest, split)| {
                let parts = p.into_iter().chain(d).chain(j).chain([(rest, vec![])]);
                (parts.collect(), split)
            })
        })
    }

    fn build((parts, split): &(Vec<Part>, bool)) -> World {
        let world = World::new(DAEMON);
        let mut main = DAEMON.to_owned();
        for (n, (text, files)) in parts.iter().enumerate() {
            match *split && n % 2 == 0 {
                true => world.put(&format!("conf.d/part-{n}.toml"), text),
                false => main += text,
            }
            for (name, text) in files {
                match text {
                    Some(text) => world.put(name, text),
                    None => {
                        world.put(name, "");
                        fs::remove_file(world.path(name)).unwrap();
                        match name.strip_suffix(".pub") {
                            Some(pair) => drop(key_file::generate_pair(&world.path(pair)).unwrap()),
                            None => drop(key_file::generate(&world.path(name)).unwrap()),
                        }
                    }
                }
            }
        }
        world.put("keepd.toml", &main);
        let config = world.texts().load().unwrap_or_else(|wrong| panic!("{wrong}\n{main}"));
        for (n, job) in config.jobs.keys().enumerate() {
            let state = ScheduleState {
                schedule: format!("of {job}"),
                first_seen: Some("2026-01-01T00:00:00Z".parse().unwrap()),
                last_due: (n % 2 == 0).then(|| "2026-01-02T00:00:00Z".parse().unwrap()),
                runs_good: n as u64,
                ..ScheduleState::default()
            };
            world.ledger.save_schedule_state(job, &state).unwrap();
        }
        world
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

        /// Out of one machine, into an empty one, and out of that: the same but for the time.
        #[test]
        fn what_went_out_is_what_came_in(parts in configuration()) {
            let (old, new) = (build(&parts), World::new(DAEMON));
            let envelope = old.collect();
            let prepared = new.prepare(&travels(&envelope), &full());
            prop_assert_eq!(&prepared.plan().problems, &[""; 0]);
            prop_assert_eq!(&prepared.plan().missing, &[""; 0]);
            prepared.apply(&new.previous(), &new.ledger).unwrap();
            prop_assert_eq!(without_time(new.collect()), without_time(envelope.clone()));
            prop_assert!(new.prepare(&envelope, &full()).is_nothing());
            // And into itself nothing is to be done, whatever is said of conflicts.
            for conflict in [ItemConflict::Skip, ItemConflict::Overwrite, ItemConflict::Rename] {
                prop_assert!(old.prepare(&envelope, &options(ImportMode::Merge, conflict)).is_nothing());
            }
        }

        /// Two machines made one: nothing of the one changes, and nothing leads nowhere.
        #[test]
        fn a_merge_changes_nothing_that_is_here(mine in configuration(), theirs in configuration(), rename: bool) {
            let (here, there) = (build(&mine), build(&theirs));
            let before = here.all();
            let items = here.texts().items().unwrap();
            let conflict = if rename { ItemConflict::Rename } else { ItemConflict::Skip };
            let prepared = here.prepare(&travels(&there.collect()), &options(ImportMode::Merge, conflict));
            let problems = prepared.plan().problems.clone();
            match prepared.apply(&here.previous(), &here.ledger) {
                Ok(()) => {
                    let after = here.texts();
                    after.load().unwrap();
                    let after = after.items().unwrap();
                    prop_assert!(items.iter().all(|(name, (_, value))| after.get(name).is_some_and(|(_, v)| v == value)));
                    let (files, states) = here.all();
                    prop_assert!(before.0.iter().filter(|(p, _)| p.extension().is_none_or(|e| e != "toml")).all(|(path, text)| files.get(path) == Some(text)));
                    prop_assert!(before.1.iter().all(|(job, state)| states.get(job) == Some(state)));
                }
                Err(error) => {
                    // One directory for two destinations, of which one came along under another name.
                    prop_assert!(rename && !problems.is_empty(), "{}", error);
                    prop_assert!(problems.iter().all(|p| p.contains("each needs a directory of its own")), "{:?}", problems);
                    prop_assert_eq!(before, here.all());
                }
            }
        }
    }
}
