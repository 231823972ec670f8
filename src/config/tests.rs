//! Whole configurations: the sample, the examples of the documentation, and what is said about faulty ones (tests/config/faulty).

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;

use super::paths::Surroundings;
use super::*;
use crate::crypto::key_file;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn load_in(main: &Path, here: &Surroundings<'_>) -> Result<Config, Problems> {
    Texts::read_in(main, here)?.load_in(here)
}

/// Loads as root without any variable set would.
fn load_as_root(main: &Path) -> Result<Config, Problems> {
    load_in(main, &Surroundings { root: true, variable: &|_| None::<OsString> })
}

fn load_text(text: &str) -> Result<Config, Problems> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("keepd.toml");
    std::fs::write(&path, text).expect("written");
    load_as_root(&path)
}

fn must_load(text: &str) -> Config {
    load_text(text).unwrap_or_else(|problems| panic!("{problems}\nin:\n{text}"))
}

/// What is said about a faulty configuration, with the directory cut off.
fn complaint(main: &Path) -> String {
    let problems = load_as_root(main).err().unwrap_or_else(|| panic!("{} was taken", main.display()));
    let directory = main.parent().expect("a directory").to_string_lossy().into_owned();
    problems.to_string().replace(&format!("{directory}/"), "")
}

fn faulty() -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(repository().join("tests/config/faulty")).expect("fixtures");
    let mut found: Vec<_> = entries
        .map(|entry| {
            let path = entry.expect("listed").path();
            let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
            (name, if path.is_dir() { path.join("keepd.toml") } else { path })
        })
        .collect();
    found.sort();
    found
}

/// All that is wrong with what a configuration refers to.
fn found(config: &Config) -> Vec<Problem> {
    crate::profile::check(config).into_iter().chain(check_files(config)).collect()
}

#[test]
fn faulty_configurations_are_explained() {
    let found = faulty();
    assert!(found.len() >= 15, "{} fixtures", found.len());
    for (name, main) in found {
        let text = complaint(&main);
        insta::with_settings!({ snapshot_path => "../../tests/config/snapshots", prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!(name, text);
        });
    }
}

#[test]
fn no_secret_is_ever_repeated() {
    for (name, main) in faulty() {
        let text = complaint(&main);
        for canary in ["canary", "8899aabbccddeeff"] {
            assert!(!text.contains(canary), "{name}: {text}");
        }
    }
    // Written in all the wrong ways.
    for line in [
        "password = \"canary\"",
        "password = canary",
        "password = \"canary",
        "password \"canary\"",
        "password = { value = \"canary\" }",
        "password = [\"canary\"",
        "password = '''canary",
        "password = \"canary\" \"canary\"",
        "password =\n\"canary\"",
        "secret_access_key = 'canary' # canary",
        "retention = { password = \"canary\" }",
    ] {
        for table in
            ["[destination.a]\nservice = \"s3\"", "[destination.a]\nservice = \"fs\"", "[encryption.a]", "[job.a]", "[[job.a.source]]", ""]
        {
            let problems = load_text(&format!("{table}\n{line}\n")).expect_err("faulty").to_string();
            assert!(!problems.contains("canary"), "{table}\n{line}\n{problems}");
        }
    }
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let main = directory.path().join("keepd.toml");
    assert!(complaint(&main).contains("keepd.toml: cannot be read: there is no such file"), "{}", complaint(&main));
    std::fs::create_dir(&main).expect("made");
    assert!(complaint(&main).contains("not a regular file"), "{}", complaint(&main));
    std::fs::remove_dir(&main).expect("removed");
    std::fs::write(&main, b"[daemon]\n# \xff\n").expect("written");
    assert!(complaint(&main).contains("not UTF-8 (a byte in line 2"), "{}", complaint(&main));
    std::fs::write(&main, "#".repeat(2 << 20)).expect("written");
    assert!(complaint(&main).contains("longer than 1024 KiB"), "{}", complaint(&main));
    std::fs::write(&main, "").expect("written");
    std::fs::create_dir_all(directory.path().join("conf.d/x.toml")).expect("made");
    assert!(complaint(&main).contains("conf.d/x.toml: cannot be read: it is not a regular file"), "{}", complaint(&main));
    std::fs::remove_dir_all(directory.path().join("conf.d")).expect("removed");
    std::fs::write(directory.path().join("conf.d"), "").expect("written");
    assert!(complaint(&main).contains("conf.d: the drop-ins cannot be listed"), "{}", complaint(&main));
}

#[test]
fn an_empty_file_has_all_the_defaults() {
    let config = must_load("");
    assert_eq!(config.daemon.state_dir, Path::new("/var/lib/keepd"));
    assert_eq!(config.daemon.socket, Path::new("/run/keepd/keepd.sock"));
    assert_eq!(config.daemon.max_parallel_runs, 2);
    assert_eq!(config.daemon.memory, 256 << 20);
    assert!(config.jobs.is_empty());

    let nowhere = load_in(Path::new("/nowhere.toml"), &Surroundings { root: false, variable: &|_| None }).expect_err("no file");
    assert!(nowhere.to_string().contains("neither $HOME nor $XDG_STATE_HOME"), "{nowhere}");
}

#[test]
fn everything_said_arrives() {
    let config = must_load(
        r#"
        [daemon]
        state_dir = "/s/"
        socket = "/run/x.sock"
        max_parallel_runs = 0b11
        memory = 1_00_000_000
        [encryption.main]
        key_file = "keys/main.key"
        [destination.local]
        service = "fs"
        root = "/d//e/"
        encryption = "main"
        compression = "gzip"
        retention = { keep_monthly = 12 }
        [destination.open]
        service = "fs"
        root = "/o"
        encryption = "none"
        [job.shop]
        enabled = false
        schedule = " 30 2  * *\tmon-fri "
        timezone = "Europe/Berlin"
        jitter = "1h30m"
        max_age = "26h"
        destinations = ["open", "local"]
        retention = { keep_last = 1, keep_days = 2, keep_daily = 3, keep_weekly = 4, keep_monthly = 5, keep_hourly = 6, keep_yearly = 7, keep_within = "36h", min_keep = 8 }
        suspect = { fewer_rows = 20, larger = 0 }
        retry = { attempts = 3, backoff = "2m" }
        [[job.shop.source]]
        name = "db"
        sqlite = "/v/shop.db"
        verify = "full"
        [[job.shop.source]]
        files = "/v/uploads/"
        exclude = ["*.tmp", "cache/"]
        one_file_system = true
        exclude_caches = false
        [job.hand]
        destinations = ["local"]
        source = [{ files = "/h" }, { sqlite = "/h.db" }]
        [job.once]
        at = 2026-12-24T18:00
        destinations = ["local"]
        source = [{ files = "/h" }]
        [job.often]
        every = "6h"
        destinations = ["local"]
        source = [{ files = "/h" }]
        "#,
    );
    let directory = config.files[0].parent().expect("a directory").to_owned();
    assert_eq!(config.daemon, Daemon { state_dir: "/s".into(), socket: "/run/x.sock".into(), max_parallel_runs: 3, memory: 100_000_000 });
    assert_eq!(config.encryption["main"].key, KeySource::File(directory.join("keys/main.key")));
    let local = &config.destinations["local"];
    assert_eq!(local.options, [("root".to_owned(), "/d/e".into())].into());
    assert_eq!((local.service.as_str(), local.encryption.as_deref(), local.compression), ("fs", Some("main"), Compression::Gzip));
    assert_eq!(local.retention, Some(Retention { keep_monthly: Some(12), ..Retention::default() }));
    let open = &config.destinations["open"];
    assert_eq!((open.encryption.as_deref(), open.compression, &open.retention), (None, Compression::Zstd, &None));
    assert_eq!(
        config.jobs["shop"],
        Job {
            name: "shop".into(),
            enabled: false,
            paused_until: None,
            schedule: Some(Schedule::Cron("30 2 * * mon-fri".into())),
            timezone: Some("Europe/Berlin".into()),
            jitter: Duration::from_secs(5400),
            max_age: Some(Duration::from_secs(26 * 3600)),
            destinations: vec!["open".into(), "local".into()],
            retention: Retention {
                keep_last: Some(1),
                keep_days: Some(2),
                keep_daily: Some(3),
                keep_weekly: Some(4),
                keep_monthly: Some(5),
                keep_hourly: Some(6),
                keep_yearly: Some(7),
                keep_within: Some(Duration::from_secs(36 * 3600)),
                min_keep: Some(8),
            },
            suspect: Suspect { fewer_rows: 20, larger: 0, ..Suspect::default() },
            retry: Retry { attempts: 3, backoff: Duration::from_secs(120) },
            sources: vec![
                Source {
                    name: "db".into(),
                    kind: SourceKind::Sqlite(SqliteSource { path: "/v/shop.db".into(), verify: Verify::Full }),
                    references: None
                },
                Source {
                    name: "uploads".into(),
                    kind: SourceKind::Files(FilesSource {
                        path: "/v/uploads".into(),
                        exclude: vec!["*.tmp".into(), "cache/".into()],
                        one_file_system: true,
                        exclude_caches: false,
                    }),
                    references: None,
                },
            ],
            services: Vec::new(),
            quiesce: Quiesce::No,
            hooks: Hooks::default(),
            health: None,
            version: None,
            schema_version: None,
            drill: Default::default(),
        }
    );
    let hand = &config.jobs["hand"];
    assert_eq!((hand.enabled, &hand.schedule, hand.jitter, hand.max_age), (true, &None, Duration::ZERO, None));
    assert_eq!(hand.retry, Retry { attempts: 1, backoff: Duration::from_secs(60) });
    assert_eq!(hand.retention, Retention::default());
    assert_eq!(hand.sources[1].name, "h.db");
    assert_eq!(config.jobs["once"].schedule, Some(Schedule::At("2026-12-24T18:00:00".parse().expect("a time"))));
    assert_eq!(config.jobs["often"].schedule, Some(Schedule::Every(Duration::from_secs(6 * 3600))));
}

#[test]
fn the_configuration_itself_is_kept_as_it_is_said() {
    let around = "[encryption.main]\nkey_file = 'k'\n[encryption.other]\nkey_file = 'o'\n\
        [destination.d]\nservice = 'fs'\nroot = '/d'\nencryption = 'main'\n\
        [destination.open]\nservice = 'fs'\nroot = '/o'\nencryption = 'none'\n";
    let load = |text: &str| must_load(&format!("{around}[config_backup]\n{text}")).config_backup.expect("there");
    let plain = load("destination = 'd'\n");
    assert_eq!(
        plain,
        ConfigBackup {
            schedule: None,
            timezone: None,
            destination: "d".into(),
            encryption: Some("main".into()),
            include_secrets: false,
            retention: Retention::default(),
            on_change: false,
        }
    );
    assert_eq!(load("destination = 'd'\nencryption = 'none'\n").encryption, None);
    assert_eq!(load("destination = 'open'\n").encryption, None);
    let whole = load(
        "schedule = '@daily'\ntimezone = 'Europe/Berlin'\ndestination = 'open'\nencryption = 'other'\ninclude_secrets = true\n\
         retention = { keep_last = 3 }\non_change = true\n",
    );
    assert_eq!(
        whole,
        ConfigBackup {
            schedule: Some(Schedule::Cron("@daily".into())),
            timezone: Some("Europe/Berlin".into()),
            destination: "open".into(),
            encryption: Some("other".into()),
            include_secrets: true,
            retention: Retention { keep_last: Some(3), ..Retention::default() },
            on_change: true,
        }
    );
    assert_eq!(whole.zone().iana_name(), Some("Europe/Berlin"));
    assert_eq!(load("every = '6h'\ndestination = 'd'\n").schedule, Some(Schedule::Every(Duration::from_secs(21_600))));
    assert_eq!(must_load(around).config_backup, None);
}

#[test]
fn applications_are_configured_as_they_are_documented() {
    let config = must_load(
        r#"
        [destination.local]
        service = "fs"
        root = "/d"
        encryption = "none"
        [job.shop]
        destinations = ["local"]
        services = ["shop.service", "worker@1.service"]
        quiesce = true
        version = ["/usr/bin/shop", "--version"]
        schema_version = { sql = "select max(version) from migrations;", source = "db" }
        [job.shop.hooks]
        before = ["/usr/bin/one", "two words"]
        after = { shell = "a | b", timeout = "30s", run_as = "shop" }
        on_failure = [["/bin/a"], { command = ["/bin/b", "c"] }]
        [[job.shop.source]]
        name = "db"
        postgres = { dbname = "shop", host = "/run/postgresql", port = 5433, user = "shop", password = { file = "/s/pw" }, timeout = "5m", sslmode = "require", globals = false, exclude_tables = ["public.sessions"] }
        references = { sql = "select path from uploads", under = "uploads" }
        [[job.shop.source]]
        mysql = { dbname = ["a", "b"], socket = "/run/m.sock", run_as = "mysql", bin_dir = "/opt/m/bin" }
        [[job.shop.source]]
        name = "all"
        postgres = { dbname = "*" }
        [[job.shop.source]]
        command = ["/usr/bin/redis-cli", "--rdb", "-"]
        restore_command = ["/usr/local/bin/put-back"]
        file = "dump.rdb"
        min_size = "1KiB"
        [[job.shop.source]]
        files = "/v/uploads"
        [job.wiki]
        destinations = ["local"]
        quiesce = { begin = ["/bin/on"], end = { command = ["/bin/off"], timeout = "10s" } }
        version = { sql = "select 1" }
        source = [{ sqlite = "/v/w.db" }]
        "#,
    );
    insta::with_settings!({ snapshot_path => "../../tests/config/snapshots", prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_debug_snapshot!("applications_parsed", (&config.jobs["shop"], &config.jobs["wiki"]));
    });
    assert!(config.jobs["shop"].alone().iter().any(|l| l.contains("shop.service")));
    assert_eq!(config.jobs["wiki"].alone(), ["job wiki", "sqlite /v/w.db"]);
}

#[test]
fn drop_ins_add_tables_in_the_order_of_their_names() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        std::fs::write(&path, text).expect("written");
        path
    };
    let main = file("keepd.toml", "[job.a]\ndestinations = [\"d\"]\nsource = [{ files = \"/a\" }]\n");
    let second = file("conf.d/b.toml", "[destination.d]\nservice = \"fs\"\nroot = \"/d\"\nencryption = \"k\"\n");
    let first = file("conf.d/a.toml", "[encryption.k]\nkey_file = \"k.key\"\n");
    file("conf.d/.c.toml", "nonsense");
    file("conf.d/c.toml~", "nonsense");
    let config = load_as_root(&main).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(config.files, [main.clone(), first, second]);
    // Beside the main file, not beside the drop-in.
    assert_eq!(config.encryption["k"].key, KeySource::File(directory.path().join("k.key")));
    assert_eq!(load_as_root(&main).expect("again"), config);
}

/// The sample with everything that is commented out as an example taken in.
fn sample_with_examples(sample: &str) -> String {
    let example = |line: &str| {
        line.strip_prefix('#').filter(|rest| rest.starts_with(|c: char| c.is_ascii_alphabetic() || c == '[')).map(str::to_owned)
    };
    sample.lines().map(|line| example(line).unwrap_or_else(|| line.to_owned()) + "\n").collect()
}

#[test]
fn the_sample_loads_and_passes_the_check_once_its_key_exists() {
    let path = repository().join("config/keepd.toml");
    let config = load_as_root(&path).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(config.jobs.len(), 1);
    let sample = std::fs::read_to_string(&path).expect("read");

    let whole = must_load(&sample_with_examples(&sample));
    assert_eq!((whole.jobs.len(), whole.destinations.len()), (2, 4));
    assert_eq!(whole.daemon, config.daemon, "examples of [daemon] show the defaults");

    let directory = tempfile::tempdir().expect("a directory");
    let key = directory.path().join("main.key");
    let main = directory.path().join("keepd.toml");
    std::fs::write(&main, sample.replace("/etc/keepd/keys/main.key", &key.to_string_lossy())).expect("written");
    std::fs::set_permissions(&main, std::fs::Permissions::from_mode(0o644)).expect("changed");
    let config = load_as_root(&main).unwrap_or_else(|e| panic!("{e}"));
    let without = found(&config);
    assert!(without.iter().any(|p| p.severity == Severity::Error && p.to_string().contains("keepd key generate")), "{without:?}");
    key_file::generate(&key).expect("generated");
    assert_eq!(found(&config), []);
}

#[test]
fn the_examples_of_the_documentation_load_together() {
    let somewhere = "[destination.local]\nservice = \"fs\"\nroot = \"/d\"\nencryption = \"none\"\n";
    for (document, before, jobs) in
        [("docs/configuration.md", "", 3), ("docs/applications.md", somewhere, 3), ("README.md", "", 1), ("docs/drills.md", somewhere, 1)]
    {
        let text = std::fs::read_to_string(repository().join(document)).expect("read");
        let mut examples = before.to_owned();
        let mut inside = false;
        for line in text.lines() {
            match line {
                "```toml" => inside = true,
                "```" => inside = false,
                _ if inside => examples.push_str(&format!("{line}\n")),
                _ => {}
            }
        }
        assert!(must_load(&examples).jobs.len() >= jobs, "{document}");
    }
}

#[test]
fn what_the_configuration_refers_to_is_checked() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
    std::fs::create_dir_all(at("data/back")).expect("made");
    std::fs::write(at("data/shop.db"), "").expect("written");
    std::fs::write(at("file"), "").expect("written");
    std::os::unix::fs::symlink(at("data/back"), at("link")).expect("a link");
    key_file::generate(Path::new(&at("good.key"))).expect("generated");
    key_file::generate(Path::new(&at("open.key"))).expect("generated");
    std::fs::set_permissions(at("open.key"), std::fs::Permissions::from_mode(0o644)).expect("changed");
    let main = at("keepd.toml");
    let text = format!(
        r#"
        [encryption.good]
        key_file = "good.key"
        [encryption.open]
        key_file = "open.key"
        [encryption.none-there]
        key_file = "missing.key"
        [destination.a]
        service = "fs"
        root = "{back}"
        encryption = "good"
        [destination.b]
        service = "fs"
        root = "{link}"
        encryption = "good"
        [destination.c]
        service = "fs"
        root = "{file}"
        encryption = "good"
        [destination.new]
        service = "fs"
        root = "{new}"
        encryption = "good"
        [job.x]
        every = "6h"
        max_age = "1h"
        destinations = ["new"]
        source = [{{ sqlite = "{db}" }}, {{ files = "{data}" }}, {{ files = "/nowhere/at/all" }}]
        [job.y]
        destinations = ["new"]
        source = [{{ sqlite = "{db}" }}, {{ files = "{data}", exclude = ["*.db", "back/"] }}]
        "#,
        back = at("data/back"),
        link = at("link"),
        file = at("file"),
        new = at("new"),
        db = at("data/shop.db"),
        data = at("data"),
    );
    std::fs::write(&main, text).expect("written");
    std::fs::set_permissions(&main, std::fs::Permissions::from_mode(0o666)).expect("changed");
    let config = load_as_root(Path::new(&main)).unwrap_or_else(|e| panic!("{e}"));
    let found: Vec<String> = found(&config).iter().map(|p| p.to_string().replace(&*directory.path().to_string_lossy(), "DIR")).collect();
    insta::with_settings!({ snapshot_path => "../../tests/config/snapshots", prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!("environment", found.join("\n"));
    });
}

/// Lines out of which configurations are made, right and wrong.
fn line() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        Just("job"),
        Just("destination"),
        Just("encryption"),
        Just("daemon"),
        Just("source"),
        Just("a"),
        Just("none"),
        Just("schedule"),
        Just("every"),
        Just("at"),
        Just("files"),
        Just("sqlite"),
        Just("root"),
        Just("exclude"),
        Just("retention"),
        Just("key_file"),
        Just("service"),
        Just("\"ö.\"")
    ];
    let value = prop_oneof![
        "\"[^\"\\\\]{0,12}\"",
        Just("\"/a/b\"".to_owned()),
        Just("\"fs\"".to_owned()),
        Just("\"0 0 1-5/2 * mon\"".to_owned()),
        Just("[\"a\"]".to_owned()),
        Just("[{ files = \"/a\" }]".to_owned()),
        Just("{ keep_last = 3 }".to_owned()),
        "[-+]?[0-9xob_.e:T-]{1,12}",
        ".{0,12}",
    ];
    (prop::collection::vec(word, 1..4), value, 0..4).prop_map(|(words, value, form)| match form {
        0 => format!("[{}]", words.join(".")),
        1 => format!("[[{}]]", words.join(".")),
        _ => format!("{} = {value}", words.join(".")),
    })
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,200}") {
        let _ = load_text(&text);
    }

    #[test]
    fn no_near_configuration_makes_it_panic(lines in prop::collection::vec(line(), 0..30)) {
        if let Err(problems) = load_text(&lines.join("\n")) {
            prop_assert!(!problems.0.is_empty());
            prop_assert!(problems.0.iter().all(|p| p.place.is_some() && !p.text.is_empty()), "{}", problems);
        }
    }

    #[test]
    fn no_cron_text_makes_it_panic(text in "[-0-9*/,#LW@a-zä ]{0,24}") {
        let _ = cron::parse(&text);
    }
}
