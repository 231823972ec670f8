//! From files to a [`Config`]: the main file, then the drop-ins of `conf.d` beside it in the order of their names.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeTable;

use super::problem::{Problem, Problems};
use super::read::{Source as File, Table, nearest};
use super::types::*;
use super::{cron, default_socket, default_state_dir};

/// No configuration file is longer.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// Reads and checks; all problems of all files come together.
pub fn load(main: &Path) -> Result<Config, Problems> {
    let mut loader = Loader::default();
    let files = match drop_ins(main) {
        Ok(more) => std::iter::once(main.to_owned()).chain(more).collect::<Vec<_>>(),
        Err(problem) => return Err(Problems(vec![problem])),
    };
    for file in &files {
        match read(file) {
            Ok(text) => loader.file(&File { file: file.clone(), text }),
            Err(problem) => loader.problems.push(problem),
        }
    }
    loader.finish(files)
}

fn whole_file(file: &Path, text: String) -> Problem {
    Problem { file: file.to_owned(), line: 0, column: 0, key: String::new(), text }
}

fn read(file: &Path) -> Result<String, Problem> {
    let meta = std::fs::metadata(file).map_err(|e| whole_file(file, format!("cannot be read: {e}")))?;
    if !meta.is_file() || meta.len() > MAX_FILE_BYTES {
        return Err(whole_file(file, "it is no regular file, or longer than 4 MiB".into()));
    }
    let bytes = std::fs::read(file).map_err(|e| whole_file(file, format!("cannot be read: {e}")))?;
    String::from_utf8(bytes).map_err(|e| whole_file(file, format!("it is not UTF-8 (at byte {})", e.utf8_error().valid_up_to())))
}

/// `conf.d/*.toml` beside the main file, by name.
fn drop_ins(main: &Path) -> Result<Vec<PathBuf>, Problem> {
    let dir = main.parent().unwrap_or(Path::new(".")).join("conf.d");
    let failed = |e: std::io::Error| whole_file(&dir, format!("cannot be listed: {e}"));
    let list = match std::fs::read_dir(&dir) {
        Ok(list) => list,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    let mut files = Vec::new();
    for entry in list {
        let path = entry.map_err(failed)?.path();
        let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
        if path.extension().is_some_and(|e| e == "toml") && !hidden {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// A name that one table uses of another, checked when all files are read.
struct Reference {
    problem: Problem,
    name: String,
}

#[derive(Default)]
struct Loader {
    problems: Vec<Problem>,
    /// `job.shop` → where it was defined.
    defined: HashMap<String, String>,
    daemon: Option<Daemon>,
    encryption: BTreeMap<String, Encryption>,
    destinations: BTreeMap<String, Destination>,
    jobs: BTreeMap<String, Job>,
    profiles_used: Vec<Reference>,
    destinations_used: Vec<Reference>,
    roots: Vec<(PathBuf, String, Problem)>,
}

impl Loader {
    fn file(&mut self, file: &File) {
        let (root, errors) = DeTable::parse_recoverable(&file.text);
        for error in errors {
            let at = error.span().map_or(0, |s| s.start);
            self.problems.push(file.problem(at, "", one_line(error.message())));
        }
        let mut top = Table::new(file, root.get_ref(), 0, String::new()).with_later(&["access", "notify", "config_backup", "metrics"]);
        let mut problems = Vec::new();
        if let Some(daemon) = top.table("daemon", &mut problems)
            && self.define("daemon", &daemon, &mut problems)
        {
            self.daemon = Some(read_daemon(daemon, &mut problems));
        }
        for (name, table) in top.named("encryption", &mut problems) {
            if self.define(&format!("encryption.{name}"), &table, &mut problems) {
                self.read_encryption(name, table, &mut problems);
            }
        }
        for (name, table) in top.named("destination", &mut problems) {
            if self.define(&format!("destination.{name}"), &table, &mut problems) {
                self.read_destination(name, table, &mut problems);
            }
        }
        for (name, table) in top.named("job", &mut problems) {
            if self.define(&format!("job.{name}"), &table, &mut problems) {
                self.read_job(name, table, &mut problems);
            }
        }
        top.finish(&mut problems);
        problems.sort_by_key(|p| (p.line, p.column));
        self.problems.extend(problems);
    }

    fn define(&mut self, what: &str, table: &Table<'_>, problems: &mut Vec<Problem>) -> bool {
        let here = table.source.problem(table.at, what, String::new());
        if let Some(first) = self.defined.get(what) {
            problems.push(Problem { text: format!("it is defined already in {first}; each table may stand in one file only"), ..here });
            return false;
        }
        self.defined.insert(what.to_owned(), format!("{}:{}", here.file.display(), here.line));
        true
    }

    fn read_encryption(&mut self, name: String, mut table: Table<'_>, problems: &mut Vec<Problem>) {
        table = table.with_later(&["credential", "passphrase", "pkcs11", "recipient"]);
        if name == "none" {
            problems.push(table.problem(table.at, "", "\"none\" is the word for no encryption; give the profile another name".into()));
        }
        let text = table.string("key_file", problems).map(|(s, at)| (s.to_owned(), at));
        match text {
            Some((text, at)) if text.is_empty() || text.contains('\0') => {
                problems.push(table.problem(at, "key_file", "it is no path".into()))
            }
            Some((text, _)) => {
                let dir = table.source.file.parent().unwrap_or(Path::new("."));
                let key = KeySource::File(dir.join(text));
                self.encryption.insert(name.clone(), Encryption { name, key });
            }
            None if !table.has("key_file") => problems.push(table.problem(
                table.at,
                "key_file",
                "it is missing; make a key with 'keepd key generate FILE' and name the file".into(),
            )),
            None => {}
        }
        table.finish(problems);
    }

    fn read_destination(&mut self, name: String, mut table: Table<'_>, problems: &mut Vec<Problem>) {
        table = table.with_later(&["bandwidth", "append_only", "object_lock", "layout", "max_age", "command", "timeout", "concurrency"]);
        let mut options = BTreeMap::new();
        let service = table.string("service", problems).map(|(s, at)| (s.to_owned(), at));
        match &service {
            Some((service, _)) if service == "fs" => match table.path("root", problems) {
                Some((root, at)) => {
                    let place = table.problem(at, "root", String::new());
                    self.roots.push((root.clone(), name.clone(), place));
                    options.insert("root".to_owned(), root.to_string_lossy().into_owned());
                }
                None if !table.has("root") => {
                    problems.push(table.problem(table.at, "root", "it is missing: the directory that holds the repository".into()))
                }
                None => {}
            },
            Some((service, at)) => {
                let text = format!(
                    "the service '{service}' is not built into this version of keepd; allowed is fs{}",
                    nearest(service, ["fs"].into_iter())
                );
                problems.push(table.problem(*at, "service", text));
                // Its options cannot be judged.
                let keys: Vec<String> = table.entries().map(|(k, _)| k.get_ref().to_string()).collect();
                for key in keys {
                    if !["encryption", "compression", "retention", "service"].contains(&key.as_str()) {
                        table.mark_asked(key);
                    }
                }
            }
            None if !table.has("service") => problems.push(table.problem(table.at, "service", "it is missing; allowed is fs".into())),
            None => {}
        }
        let encryption = match table.string("encryption", problems) {
            Some(("none", _)) => None,
            Some((profile, at)) => {
                self.profiles_used.push(Reference { problem: table.problem(at, "encryption", String::new()), name: profile.to_owned() });
                Some(profile.to_owned())
            }
            None => {
                if !table.has("encryption") {
                    problems.push(table.problem(
                        table.at,
                        "encryption",
                        "it is missing: name an encryption profile, or say \"none\"".into(),
                    ));
                }
                None
            }
        };
        let words = [("zstd", Compression::Zstd), ("gzip", Compression::Gzip), ("none", Compression::None)];
        let compression = table.word("compression", &words, problems).unwrap_or(Compression::Zstd);
        let retention = read_retention(&mut table, problems);
        let service = service.map(|(s, _)| s).unwrap_or_default();
        table.finish(problems);
        self.destinations.insert(name.clone(), Destination { name, service, options, encryption, compression, retention });
    }

    fn read_job(&mut self, name: String, mut table: Table<'_>, problems: &mut Vec<Problem>) {
        table = table.with_later(&["services", "hooks", "health", "quiesce", "drill", "assert", "references", "description", "version"]);
        let schedule = read_schedule(&mut table, problems);
        let timezone = table.string("timezone", problems).map(|(zone, at)| {
            if jiff::tz::TimeZone::get(zone).is_err() {
                problems.push(table.problem(
                    at,
                    "timezone",
                    format!("'{zone}' is no time zone; write its IANA name, e.g. \"Europe/Berlin\" or \"UTC\""),
                ));
            }
            zone.to_owned()
        });
        let mut destinations = Vec::new();
        for (destination, at) in table.strings("destinations", problems).unwrap_or_default() {
            let place = table.problem(at, "destinations", String::new());
            if destinations.contains(&destination) {
                problems.push(Problem { text: format!("'{destination}' is named twice"), ..place });
                continue;
            }
            self.destinations_used.push(Reference { problem: place, name: destination.clone() });
            destinations.push(destination);
        }
        if destinations.is_empty() {
            problems.push(table.problem(table.at, "destinations", "a job needs at least one destination".into()));
        }
        let retry = match table.table("retry", problems) {
            None => Retry { attempts: 1, backoff: Duration::from_secs(60) },
            Some(mut retry) => {
                let attempts = retry.number("attempts", 1, 100, problems).unwrap_or(1);
                let backoff = retry.duration("backoff", problems).unwrap_or(Duration::from_secs(60));
                retry.finish(problems);
                Retry { attempts, backoff }
            }
        };
        let retention = read_retention(&mut table, problems).unwrap_or_default();
        let mut sources: Vec<Source> = Vec::new();
        for source in table.tables("source", problems).unwrap_or_default() {
            let at = source.at;
            let key = source.path.clone();
            let file = source.source;
            if let Some(source) = read_source(source, problems) {
                if sources.iter().any(|s| s.name == source.name) {
                    problems.push(file.problem(
                        at,
                        &key,
                        format!("two sources are named '{}'; give one of them another name = \"…\"", source.name),
                    ));
                }
                sources.push(source);
            }
        }
        if !table.has("source") {
            problems.push(table.problem(
                table.at,
                "source",
                "a job needs at least one [[…source]] with sqlite = \"…\" or files = \"…\"".into(),
            ));
        }
        let job = Job {
            enabled: table.boolean("enabled", problems).unwrap_or(true),
            schedule,
            timezone,
            jitter: table.duration("jitter", problems).unwrap_or_default(),
            max_age: table.duration("max_age", problems),
            destinations,
            retention,
            retry,
            sources,
            name: name.clone(),
        };
        table.finish(problems);
        self.jobs.insert(name, job);
    }

    fn finish(mut self, files: Vec<PathBuf>) -> Result<Config, Problems> {
        let unknown = |reference: Reference, what: &str, known: Vec<&str>, problems: &mut Vec<Problem>| {
            let list = if known.is_empty() { "there is none".to_owned() } else { format!("there are {}", known.join(", ")) };
            let text = format!("there is no {what} '{}'; {list}{}", reference.name, nearest(&reference.name, known.into_iter()));
            problems.push(Problem { text, ..reference.problem });
        };
        for reference in std::mem::take(&mut self.profiles_used) {
            if !self.defined.contains_key(&format!("encryption.{}", reference.name)) {
                unknown(reference, "encryption profile", self.encryption.keys().map(String::as_str).collect(), &mut self.problems);
            }
        }
        for reference in std::mem::take(&mut self.destinations_used) {
            if !self.defined.contains_key(&format!("destination.{}", reference.name)) {
                unknown(reference, "destination", self.destinations.keys().map(String::as_str).collect(), &mut self.problems);
            }
        }
        self.check_roots();
        if !self.problems.is_empty() {
            let order: HashMap<&PathBuf, usize> = files.iter().enumerate().map(|(n, f)| (f, n)).collect();
            self.problems.sort_by_key(|p| (order.get(&p.file).copied(), p.line, p.column));
            return Err(Problems(self.problems));
        }
        let daemon = self.daemon.unwrap_or_else(|| Daemon {
            state_dir: default_state_dir(),
            socket: default_socket(),
            max_parallel_runs: DEFAULT_PARALLEL,
            memory: DEFAULT_MEMORY,
        });
        Ok(Config { files, daemon, encryption: self.encryption, destinations: self.destinations, jobs: self.jobs })
    }

    /// Two repositories in one place would destroy each other; one inside a source would grow with every backup.
    fn check_roots(&mut self) {
        let roots = std::mem::take(&mut self.roots);
        for (n, (root, name, place)) in roots.iter().enumerate() {
            if let Some((_, other, _)) = roots.iter().take(n).find(|(r, _, _)| r.starts_with(root) || root.starts_with(r)) {
                self.problems.push(Problem {
                    text: format!("destinations '{name}' and '{other}' lie in one place; each needs a directory of its own"),
                    ..place.clone()
                });
            }
            for job in self.jobs.values() {
                for source in &job.sources {
                    let SourceKind::Files(files) = &source.kind else { continue };
                    if root.starts_with(&files.path) && !is_excluded(files, root) {
                        let text = format!(
                            "it lies inside {}, which job {} backs up: the repository would back itself up; exclude it there",
                            files.path.display(),
                            job.name
                        );
                        self.problems.push(Problem { text, ..place.clone() });
                    }
                }
            }
        }
    }
}

fn is_excluded(files: &FilesSource, path: &Path) -> bool {
    let mut builder = ignore::gitignore::GitignoreBuilder::new(&files.path);
    for pattern in &files.exclude {
        let _ = builder.add_line(None, pattern);
    }
    builder.build().is_ok_and(|g| g.matched_path_or_any_parents(path, true).is_ignore())
}

const DEFAULT_PARALLEL: usize = 2;
const DEFAULT_MEMORY: u64 = 256 << 20;

fn read_daemon(mut table: Table<'_>, problems: &mut Vec<Problem>) -> Daemon {
    let state_dir = table.path("state_dir", problems).map(|(p, _)| p).unwrap_or_else(default_state_dir);
    let socket = table.path("socket", problems).map(|(p, _)| p).unwrap_or_else(default_socket);
    let max_parallel_runs = table.number("max_parallel_runs", 1, 64, problems).map_or(DEFAULT_PARALLEL, |n| n as usize);
    let memory = match table.size("memory", problems) {
        Some((n, at)) if n < 64 << 20 => {
            problems.push(table.problem(at, "memory", "it must be at least 64MiB".into()));
            DEFAULT_MEMORY
        }
        Some((n, _)) => n,
        None => DEFAULT_MEMORY,
    };
    table.finish(problems);
    Daemon { state_dir, socket, max_parallel_runs, memory }
}

fn read_retention(table: &mut Table<'_>, problems: &mut Vec<Problem>) -> Option<Retention> {
    let mut t = table.table("retention", problems)?.with_later(&["keep_hourly", "keep_yearly", "keep_within", "min_keep"]);
    let at = t.at;
    let mut n = |key| t.number(key, 1, 1_000_000, problems);
    let retention = Retention {
        keep_last: n("keep_last"),
        keep_days: n("keep_days"),
        keep_daily: n("keep_daily"),
        keep_weekly: n("keep_weekly"),
        keep_monthly: n("keep_monthly"),
    };
    if t.entries().next().is_none() {
        problems.push(table.problem(
            at,
            "retention",
            "it is empty; give a rule such as keep_last = 7, or leave it out to keep everything".into(),
        ));
    }
    t.finish(problems);
    Some(retention)
}

fn read_schedule(table: &mut Table<'_>, problems: &mut Vec<Problem>) -> Option<Schedule> {
    let given: Vec<&str> = ["schedule", "every", "at"].into_iter().filter(|k| table.has(k)).collect();
    let cron = table.string("schedule", problems).map(|(s, at)| (s.to_owned(), at));
    let every = table.duration("every", problems);
    let at = table.string("at", problems).map(|(s, at)| (s.to_owned(), at));
    if given.len() > 1 {
        problems.push(table.problem(
            table.at,
            given[1],
            format!("a job has one of schedule, every and at; this one has {}", given.join(" and ")),
        ));
        return None;
    }
    if let Some((text, at)) = cron {
        return match cron::parse(&text) {
            Ok(_) => Some(Schedule::Cron(text)),
            Err(e) => {
                problems.push(table.problem(at, "schedule", e));
                None
            }
        };
    }
    if let Some((text, place)) = at {
        return match text.parse::<jiff::civil::DateTime>() {
            Ok(time) => Some(Schedule::At(time)),
            Err(_) => {
                problems.push(table.problem(
                    place,
                    "at",
                    format!("'{text}' is no time; write it as in 2026-12-24T18:00, in the job's time zone"),
                ));
                None
            }
        };
    }
    every.map(Schedule::Every)
}

fn read_source(mut table: Table<'_>, problems: &mut Vec<Problem>) -> Option<Source> {
    table = table.with_later(&["postgres", "mysql", "command", "references", "assert"]);
    let later = table.has("postgres") || table.has("mysql") || table.has("command");
    let sqlite = table.path("sqlite", problems).map(|(p, _)| p);
    let files = table.path("files", problems).map(|(p, _)| p);
    let kinds = usize::from(table.has("sqlite")) + usize::from(table.has("files"));
    if kinds != 1 && !later {
        let text = if kinds == 0 {
            "it is missing: a source has sqlite = \"…\" or files = \"…\""
        } else {
            "a source is one thing: sqlite or files, not both"
        };
        problems.push(table.problem(table.at, "sqlite", text.into()));
    }
    let is_sqlite = table.has("sqlite");
    let path = sqlite.clone().or_else(|| files.clone());
    let last = path.as_ref().and_then(|p| p.file_name()).map(|n| n.to_string_lossy().into_owned());
    let name = match table.string("name", problems) {
        Some((name, at)) => {
            let bad = name.is_empty()
                || name == "."
                || name == ".."
                || name.len() > 128
                || name.contains(['/', '\0'])
                || name.chars().any(char::is_control);
            if bad {
                problems.push(table.problem(
                    at,
                    "name",
                    format!("'{}' is no name: not empty, no slash, not . or .., at most 128 long", name.escape_debug()),
                ));
            }
            name.to_owned()
        }
        None => last.unwrap_or_else(|| "root".into()),
    };
    let kind = if is_sqlite {
        let words = [("quick", Verify::Quick), ("full", Verify::Full), ("off", Verify::Off)];
        let verify = table.word("verify", &words, problems).unwrap_or(Verify::Quick);
        sqlite.map(|path| SourceKind::Sqlite(SqliteSource { path, verify }))
    } else {
        let exclude = table.strings("exclude", problems).unwrap_or_default();
        for (pattern, at) in &exclude {
            if let Err(e) = ignore::gitignore::GitignoreBuilder::new("/").add_line(None, pattern) {
                problems.push(table.problem(*at, "exclude", format!("'{pattern}' is no pattern: {e}")));
            }
        }
        let one_file_system = table.boolean("one_file_system", problems).unwrap_or(false);
        let exclude_caches = table.boolean("exclude_caches", problems).unwrap_or(true);
        let exclude = exclude.into_iter().map(|(p, _)| p).collect();
        files.map(|path| SourceKind::Files(FilesSource { path, exclude, one_file_system, exclude_caches }))
    };
    table.finish(problems);
    kind.map(|kind| Source { name, kind })
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(text: &str) -> Result<Config, Problems> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keepd.toml");
        std::fs::write(&file, text).unwrap();
        load(&file)
    }

    const GOOD: &str = r#"
[encryption.main]
key_file = "keys/main.key"
[destination.local]
service = "fs"
root = "/var/backups/keepd"
encryption = "main"
[job.shop]
schedule = "30 2 * * *"
timezone = "Europe/Berlin"
destinations = ["local"]
retention = { keep_last = 3, keep_daily = 7 }
retry = { attempts = 3, backoff = "1m" }
[[job.shop.source]]
name = "db"
sqlite = "/var/lib/shop/shop.db"
[[job.shop.source]]
files = "/var/lib/shop/uploads"
exclude = ["*.tmp", "cache/"]
"#;

    #[test]
    fn a_good_one_loads() {
        let config = check(GOOD).unwrap_or_else(|p| panic!("{p}"));
        let job = &config.jobs["shop"];
        assert_eq!(job.sources.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["db", "uploads"]);
        assert_eq!(job.retry, Retry { attempts: 3, backoff: Duration::from_secs(60) });
        assert_eq!(config.destinations["local"].encryption.as_deref(), Some("main"));
        let KeySource::File(key) = &config.encryption["main"].key;
        assert!(key.ends_with("keys/main.key") && key.is_absolute(), "relative to the file");
    }

    #[test]
    fn all_mistakes_come_at_once_with_their_places() {
        let bad = GOOD
            .replace("root =", "rooot =")
            .replace("encryption = \"main\"", "encryption = \"mian\"")
            .replace("30 2 * * *", "30 25 * * *")
            .replace("keep_last = 3", "keep_last = 0")
            .replace("[\"local\"]", "[\"locall\"]")
            .replace("sqlite = \"/var", "sqlite = \"var");
        let problems = check(&bad).unwrap_err();
        let told: Vec<String> = problems.0.iter().map(|p| format!("{}:{}: {}: {}", p.line, p.column, p.key, p.text)).collect();
        insta::assert_snapshot!(told.join("\n"));
    }

    #[test]
    fn single_mistakes() {
        for (from, to, told) in [
            ("[job.shop]", "[job.shop]\nscheduel = 1", "unknown key"),
            ("[job.shop]", "[job.shop]\nscheduel = 1", "did you mean 'schedule'"),
            ("[job.shop]", "[job.shop]\nevery = \"1h\"", "one of schedule, every and at"),
            ("[job.shop]", "[job.shop]\nservices = [\"x\"]", "not built into this version"),
            ("service = \"fs\"", "service = \"s3\"\nbucket = \"b\"", "allowed is fs"),
            ("service = \"fs\"", "", "service: it is missing"),
            ("encryption = \"main\"", "", "say \"none\""),
            ("Europe/Berlin", "Europe/Berlino", "no time zone"),
            ("name = \"db\"", "name = \"uploads\"", "two sources are named"),
            ("name = \"db\"", "name = \"..\"", "no name"),
            ("/var/lib/shop/uploads", "/var", "back itself up"),
            ("[job.shop]", "[jobs.shop]", "unknown key"),
            ("\"1m\"", "\"1 fortnight\"", "no duration"),
            ("[\"*.tmp\", \"cache/\"]", "[\"a{b\"]", "no pattern"),
            ("attempts = 3", "attempts = \"3\"", "where a whole number is wanted"),
            ("[job.shop]", "[job.\"../x\"]", "a name has"),
            ("[job.shop]", "[job.shop", "unclosed table"),
        ] {
            let text = GOOD.replacen(from, to, 1);
            let problems = check(&text).map(|_| ()).expect_err(told).to_string();
            assert!(problems.contains(told), "{to}: wanted '{told}' in\n{problems}");
        }
    }

    #[test]
    fn drop_ins_add_but_never_repeat() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("keepd.toml");
        std::fs::write(&main, GOOD).unwrap();
        std::fs::create_dir(dir.path().join("conf.d")).unwrap();
        let add = "[job.wiki]\nevery = \"6h\"\ndestinations = [\"local\"]\n[[job.wiki.source]]\nfiles = \"/srv/wiki\"\n";
        std::fs::write(dir.path().join("conf.d/10-wiki.toml"), add).unwrap();
        assert_eq!(load(&main).unwrap().jobs.len(), 2);
        std::fs::write(dir.path().join("conf.d/20-again.toml"), add).unwrap();
        let problems = load(&main).unwrap_err().to_string();
        assert!(problems.contains("10-wiki.toml:1") && problems.contains("20-again.toml:1:6"), "{problems}");
    }

    #[test]
    fn the_sample_is_valid() {
        let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/keepd.toml");
        load(&sample).unwrap_or_else(|p| panic!("{p}"));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,200}", at in 0usize..600, cut in "[\\[\\]{}=\"a-z0-9.\n ]{0,12}") {
            let _ = check(&text);
            let mut at = at.min(GOOD.len());
            while !GOOD.is_char_boundary(at) { at -= 1; }
            let _ = check(&format!("{}{cut}{}", &GOOD[..at], &GOOD[at..]));
        }
    }
}
