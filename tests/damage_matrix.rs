//! Every byte of what keepd stores, flipped; every object truncated, removed, exchanged, doubled, zeroed: an error that says so, or exactly the right bytes. Never a panic, never
//! other bytes than were backed up, never a check that says good of what does not restore.
//!
//! In `make test` a sample by chance (KEEPD_TEST_SEED begins elsewhere); with KEEPD_TEST_LONG=1 every byte of the repository, of archives and of stored configurations. Most of it goes
//! through the library's own rescue, in memory; a part through the real programs. docs/damage.md has the figures.

mod common;
#[path = "common/seeds.rs"]
mod seeds;

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use common::*;
use keepd::attack::{Seen, look_at};
use keepd::crypto::{Profile, ProfileKey, key_file};
use keepd::portable::read::OpenWith;
use keepd::portable::{ArchiveReader, Limits, Packing, envelope, seal};
use tokio_util::sync::CancellationToken;

fn is_long() -> bool {
    std::env::var_os("KEEPD_TEST_LONG").is_some_and(|v| v == "1")
}

fn seed() -> u64 {
    std::env::var("KEEPD_TEST_SEED").map_or(20_261_122, |text| text.parse().expect("KEEPD_TEST_SEED is a number"))
}

/// By chance, the same for the same seed.
struct Chance(u64);

impl Chance {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n.max(1)
    }
}

/// Panics of any thread, also of those whose panic is caught and told.
fn panics() -> &'static AtomicU64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let told = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // Those of the tests themselves are failures already.
            if info.location().is_none_or(|at| !at.file().starts_with("tests/")) {
                COUNT.fetch_add(1, Ordering::Relaxed);
            }
            told(info);
        }));
    });
    &COUNT
}

/// The most memory that this process ever had, in MiB.
fn most_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
}

/// Where it is quick: nothing of it has to outlive the test.
fn in_memory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("keepd-damage-").tempdir_in(place).unwrap()
}

fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    assert!(Command::new("cp").args(["-a", "--sparse=always"]).arg(from).arg(to).status().unwrap().success());
}

/// All that a restore has to bring back, by path.
type Tree = BTreeMap<PathBuf, String>;

fn tree(root: &Path) -> Tree {
    fn walk(root: &Path, at: &Path, into: &mut Tree) {
        for entry in fs::read_dir(at).into_iter().flatten().flatten() {
            let (path, m) = (entry.path(), fs::symlink_metadata(entry.path()).unwrap());
            let what = match () {
                () if m.is_dir() => "directory".into(),
                () if m.is_symlink() => format!("to {}", fs::read_link(&path).unwrap().display()),
                () => format!("{} bytes {:016x}, {} names", m.len(), seeds::hash(&fs::read(&path).unwrap()), m.nlink()),
            };
            let xattr = if m.is_file() { xattr_of(&path) } else { String::new() };
            into.insert(
                path.strip_prefix(root).unwrap().to_owned(),
                format!("{what}, {:o} {} {} {}{xattr}", m.mode(), m.uid(), m.mtime(), m.mtime_nsec()),
            );
            if m.is_dir() {
                walk(root, &path, into);
            }
        }
    }
    let mut all = Tree::new();
    walk(root, root, &mut all);
    all
}

fn xattr_of(path: &Path) -> String {
    let mut value = [0; 64];
    match rustix::fs::getxattr(path, "user.keepd", &mut value) {
        Ok(len) => format!(", user.keepd {:?}", String::from_utf8_lossy(&value[..len])),
        Err(_) => String::new(),
    }
}

/// A small repository or destination of archives with two backups, and what they restore to.
struct World {
    dir: tempfile::TempDir,
    keepd: Keepd,
    expected: BTreeMap<String, Tree>,
}

impl World {
    fn new(destination: &str) -> Self {
        let dir = in_memory();
        let mut keepd = Keepd::prepared();
        let lines = format!("{destination}\ncompression = \"zstd\"");
        keepd.configure(if destination.is_empty() { "" } else { &lines }, "");
        let mut toml = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
        toml.push_str("[[job.shop.source]]\nname = \"dump\"\ncommand = [\"/bin/cat\", \"");
        toml.push_str(&format!("{}\"]\n", keepd.path("dump.txt").display()));
        fs::write(keepd.path("keepd.toml"), toml).unwrap();
        drop(make_database(&keepd.path("shop.db"), 12));
        fs::create_dir_all(keepd.path("files/deep/empty")).unwrap();
        fs::write(keepd.path("files/deep/note.txt"), "a note").unwrap();
        fs::write(keepd.path("files/noise"), noise(3000, 9)).unwrap();
        fs::hard_link(keepd.path("files/noise"), keepd.path("files/same")).unwrap();
        std::os::unix::fs::symlink("deep/note.txt", keepd.path("files/link")).unwrap();
        let sparse = fs::File::create(keepd.path("files/sparse")).unwrap();
        sparse.set_len(300 << 10).unwrap();
        sparse.write_all_at(b"in the middle", 150 << 10).unwrap();
        let _ = Command::new("setfattr").args(["-n", "user.keepd", "-v", "kept"]).arg(keepd.path("files/noise")).status();
        fs::write(keepd.path("dump.txt"), (0..400).map(|n| format!("insert {n}\n")).collect::<String>()).unwrap();
        keepd.start();
        keepd.ok(&["backup", "shop", "--name", "first"]);
        fs::write(keepd.path("files/deep/note.txt"), "another note").unwrap();
        fs::write(keepd.path("files/new"), noise(500, 11)).unwrap();
        fs::write(keepd.path("dump.txt"), (0..400).map(|n| format!("insert {n}{}\n", if n == 200 { "!" } else { "" })).collect::<String>())
            .unwrap();
        rusqlite::Connection::open(keepd.path("shop.db")).unwrap().execute_batch("UPDATE account SET balance = 7 WHERE id = 3").unwrap();
        keepd.ok(&["backup", "shop", "--name", "second"]);
        keepd.ok(&["pin", "latest", "--job", "shop"]);
        keepd.stop();
        let mut world = Self { dir, keepd, expected: BTreeMap::new() };
        let seen = world.look(&world.keepd.path("repository"), "first").unwrap();
        assert!(seen.check.as_ref().is_ok_and(Vec::is_empty), "{seen:?}");
        for (id, hurt) in &seen.restored {
            assert!(hurt.as_ref().is_ok_and(Vec::is_empty), "{seen:?}");
            world.expected.insert(id.clone(), tree(&world.dir.path().join("first-to").join(id)));
        }
        assert_eq!(world.expected.len(), 2);
        let newest = world.expected.values().find(|t| t.contains_key(Path::new("files/new"))).unwrap();
        assert!(newest.len() > 10 && newest.get(Path::new("files/noise")).unwrap().contains("2 names"), "{newest:#?}");
        assert_same(
            &world.keepd.path("files"),
            &world.dir.path().join("first-to").join(world.expected.iter().find(|(_, t)| *t == newest).unwrap().0).join("files"),
        );
        world
    }

    /// The backup that something belongs to: a manifest is named by it, what lies beside an archive names it. None: to none that was made.
    fn owner(&self, file: &Path) -> Option<&str> {
        let name = file.file_name().unwrap().to_str().unwrap();
        let of_archive = || {
            let (stem, _) = name.split_once(".tar")?;
            let companions = files_below(&self.keepd.path("repository")).into_iter().filter(|p| p.extension().is_some_and(|e| e == "json"));
            let mut texts =
                companions.filter(|p| p.to_str().unwrap().contains(&format!("{stem}.tar"))).map(|p| fs::read_to_string(p).unwrap());
            texts.find_map(|text| self.expected.keys().find(|id| text.contains(id.as_str())))
        };
        self.expected.keys().find(|id| id.as_str() == name).or_else(of_archive).map(String::as_str)
    }

    fn key(&self) -> Vec<PathBuf> {
        vec![self.keepd.path("main.key")]
    }

    /// What a rescue makes of it, with nothing remembered.
    fn look(&self, repository: &Path, name: &str) -> Result<Seen, String> {
        let (cache, to) = (self.dir.path().join(format!("{name}-cache")), self.dir.path().join(format!("{name}-to")));
        for place in [&cache, &to] {
            let _ = fs::remove_dir_all(place);
            fs::create_dir(place).unwrap();
        }
        look_at(repository, &self.key(), &cache, &to)
    }
}

/// One thing done to what lies there; it is put right afterwards.
#[derive(Debug, Clone)]
enum Attack {
    Flip { file: PathBuf, at: u64, bit: u8 },
    Put { file: PathBuf, what: &'static str, bytes: Option<Vec<u8>> },
}

impl Attack {
    fn file(&self) -> &Path {
        match self {
            Attack::Flip { file, .. } | Attack::Put { file, .. } => file,
        }
    }

    /// Done to the copy at `root`; what was there before.
    fn on(&self, root: &Path) -> Option<Vec<u8>> {
        let path = root.join(self.file());
        let before = fs::read(&path).ok();
        match self {
            Attack::Flip { at, bit, .. } => {
                let mut bytes = before.clone().unwrap();
                bytes[*at as usize] ^= 1 << bit;
                fs::write(&path, bytes).unwrap();
            }
            Attack::Put { bytes: Some(bytes), .. } => {
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(&path, bytes).unwrap();
            }
            Attack::Put { bytes: None, .. } => fs::remove_file(&path).unwrap(),
        }
        before
    }

    fn undo(&self, root: &Path, before: Option<Vec<u8>>) {
        let path = root.join(self.file());
        match before {
            Some(bytes) => fs::write(path, bytes).unwrap(),
            None => fs::remove_file(path).unwrap(),
        }
    }
}

/// The objects below a directory, by name, with their lengths.
fn objects(root: &Path) -> Vec<(PathBuf, u64)> {
    let all = files_below(root).into_iter();
    all.map(|p| (p.strip_prefix(root).unwrap().to_owned(), fs::metadata(&p).unwrap().len())).filter(|(_, len)| *len > 0).collect()
}

/// Flips: in the long run each byte (KEEPD_TEST_BITS of its bits, 1 where that is not said), else so many, as many in each object.
fn flips(root: &Path, sample: usize) -> Vec<Attack> {
    let mut chance = Chance(seed());
    let all = objects(root);
    let mut flips = Vec::new();
    if is_long() {
        let bits = std::env::var("KEEPD_TEST_BITS").map_or(1, |text| text.parse::<u8>().unwrap().clamp(1, 8));
        for (file, len) in &all {
            for at in 0..*len {
                let first = chance.below(8) as u8;
                flips.extend((0..bits).map(|n| Attack::Flip { file: file.clone(), at, bit: (first + n) % 8 }));
            }
        }
    } else {
        for n in 0..sample {
            let (file, len) = &all[n % all.len()];
            flips.push(Attack::Flip { file: file.clone(), at: chance.below(*len), bit: chance.below(8) as u8 });
        }
    }
    flips
}

/// What else can be done to each object. `older`: the place as it was a backup before.
fn mistreatments(root: &Path) -> Vec<Attack> {
    let mut attacks = Vec::new();
    let all = objects(root);
    for (n, (file, len)) in all.iter().enumerate() {
        let whole = fs::read(root.join(file)).unwrap();
        let mut put =
            |file: &Path, what: &'static str, bytes: Option<Vec<u8>>| attacks.push(Attack::Put { file: file.to_owned(), what, bytes });
        for (what, to) in
            [("truncated to nothing", 0), ("truncated to a byte", 1), ("truncated to half", len / 2), ("without its last byte", len - 1)]
        {
            put(file, what, Some(whole[..to as usize].to_vec()));
        }
        put(file, "longer by a byte", Some([&whole[..], &[0]].concat()));
        put(file, "longer by itself", Some(whole.repeat(2)));
        put(file, "zeroed", Some(vec![0; whole.len()]));
        put(file, "removed", None);
        let kind = file.components().next();
        let others: Vec<&PathBuf> = all.iter().map(|(f, _)| f).filter(|f| *f != file && f.components().next() == kind).collect();
        if let Some(other) = others.get(n % others.len().max(1)) {
            put(file, "exchanged with another of its kind", Some(fs::read(root.join(other)).unwrap()));
        }
        let (other, _) = &all[(n + all.len() / 2) % all.len()];
        put(file, "exchanged with one of another kind", Some(fs::read(root.join(other)).unwrap()));
        // A name like its own: the first digit of its hash, or of its slot, is another one.
        let name = file.file_name().unwrap().to_str().unwrap();
        let doubled = format!("{}{}", if name.starts_with('0') { '1' } else { '0' }, &name[1..]);
        let place = match kind.is_some_and(|kind| kind.as_os_str() == "packs") {
            true => Path::new("packs").join(&doubled[..2]).join(&doubled),
            false => file.with_file_name(&doubled),
        };
        put(&place, "doubled under another name", Some(whole.clone()));
        if place.parent() != file.parent() {
            put(&file.with_file_name(&doubled), "doubled under another name, where that does not belong", Some(whole));
        }
    }
    attacks
}

/// What came of all attacks.
#[derive(Default)]
struct Tally {
    refused: AtomicUsize,
    named: AtomicUsize,
    harmless: AtomicUsize,
    wrong: Mutex<Vec<String>>,
}

/// Has a rescue look at a place under each attack. `must_be_told`: whether a check has to say that something is wrong with this object.
fn assail(world: &World, place: &Path, attacks: &[Attack], must_be_told: &(dyn Fn(&Attack) -> bool + Sync)) -> Tally {
    let tally = Tally::default();
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get()).clamp(1, 4);
    std::thread::scope(|scope| {
        for n in 0..threads {
            let (tally, next) = (&tally, &next);
            scope.spawn(move || {
                let own = world.dir.path().join(format!("copy-{n}"));
                copy(place, &own);
                while let Some(attack) = attacks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let before = attack.on(&own);
                    let name = format!("look-{n}");
                    let seen = world.look(&own, &name);
                    judge(
                        world,
                        attack,
                        reach(attack.file()),
                        seen,
                        &world.dir.path().join(format!("{name}-to")),
                        must_be_told(attack),
                        tally,
                    );
                    attack.undo(&own, before);
                }
            });
        }
    });
    tally
}

/// How much one thing that was done may cost: "it does not open" is no answer to a byte of one object.
#[derive(Clone, Copy, PartialEq)]
enum Reach {
    /// Without it nothing opens, so that all may be refused.
    All,
    /// The backup that it belongs to may be lost.
    OneBackup,
    /// Paths may, if they are named; every backup is there.
    Paths,
    Nothing,
}

/// Of an object at a destination, by its name there.
fn reach(file: &Path) -> Reach {
    match file.components().next().and_then(|first| first.as_os_str().to_str()) {
        Some("keepd.json" | "keys") => Reach::All,
        Some("backups") => Reach::OneBackup,
        Some("packs") => Reach::Paths,
        _ if file.to_str().is_some_and(|name| name.contains(".tar")) => Reach::OneBackup,
        _ => Reach::Nothing,
    }
}

/// Whether a path that is not there was told: itself, what it stands in, what stands in it, or that what follows an entry before it is lost.
fn is_told(path: &Path, hurt: &[String]) -> bool {
    hurt.iter().any(|text| {
        let Some((named, why)) = text.strip_prefix('\'').and_then(|rest| rest.split_once("': ")) else {
            return text.contains(path.to_str().unwrap());
        };
        let named = Path::new(named);
        let is_behind = path > named && path.components().next() == named.components().next();
        path.starts_with(named) || named.starts_with(path) || (is_behind && why.starts_with("entries behind it are lost"))
    })
}

fn judge(world: &World, attack: &Attack, reach: Reach, seen: Result<Seen, String>, to: &Path, must_be_told: bool, tally: &Tally) {
    let wrong = |text: String| {
        let shown = match attack {
            Attack::Flip { file, at, bit } => format!("{} with bit {bit} of byte {at} flipped", file.display()),
            Attack::Put { file, what, .. } => format!("{} {what}", file.display()),
        };
        tally.wrong.lock().unwrap().push(format!("{shown}: {text}"));
    };
    let seen = match seen {
        Err(text) => {
            tally.refused.fetch_add(1, Ordering::Relaxed);
            if reach != Reach::All {
                wrong(format!("nothing opens any more: '{text}'"));
            }
            if text.trim().is_empty() || text.contains("panicked") {
                wrong(format!("it is refused with '{text}'"));
            }
            return;
        }
        Ok(seen) => seen,
    };
    let mut whole = 0;
    // A backup may be hurt by what was done to something of its own alone.
    let may_be_lost =
        |id: &str| reach == Reach::All || (reach == Reach::OneBackup && world.owner(attack.file()).is_none_or(|owner| owner == id));
    for id in world.expected.keys().filter(|id| !seen.restored.contains_key(*id) && !may_be_lost(id)) {
        wrong(format!("{id} is not there any more"));
    }
    for (id, restored) in &seen.restored {
        let Some(expected) = world.expected.get(id) else {
            wrong(format!("a backup {id} is there that was never made"));
            continue;
        };
        let came = tree(&to.join(id));
        match restored {
            Ok(hurt) if hurt.is_empty() => {
                whole += 1;
                if came != *expected {
                    wrong(format!("{id} is restored as if whole, and differs: {}", difference(expected, &came)));
                }
            }
            // What is not hurt is right; what is hurt is not there at all. A directory above what is missing has another time, a file whose other name is missing one name less.
            Ok(hurt) => {
                if reach != Reach::Paths && !may_be_lost(id) {
                    wrong(format!("{id} is restored in part: {hurt:?}"));
                }
                for path in expected.keys().filter(|path| !came.contains_key(*path) && !is_told(path, hurt)) {
                    wrong(format!("{id} is restored in part, and nobody tells that {} is missing: {hurt:?}", path.display()));
                }
                let plain = |what: &str| what.split(',').next().unwrap_or_default().to_owned();
                for (path, what) in came.iter().filter(|(_, what)| !what.starts_with("directory")) {
                    if expected.get(path).map(|e| plain(e)) != Some(plain(what)) {
                        wrong(format!("{id} is restored in part, and what came differs: {} is {what}", path.display()));
                    }
                }
            }
            Err(text) if text.trim().is_empty() || text.contains("panicked") => wrong(format!("{id} is not restored: '{text}'")),
            Err(text) if !may_be_lost(id) => wrong(format!("{id} is not restored at all: '{text}'")),
            Err(_) => {}
        }
    }
    let is_clean = seen.check.as_ref().is_ok_and(Vec::is_empty);
    if seen.check.as_ref().is_err_and(|text| text.contains("panicked")) {
        wrong(format!("{:?}", seen.check));
    }
    if is_clean && (must_be_told || seen.restored.values().any(|r| r.as_ref().map_or(true, |hurt| !hurt.is_empty()))) {
        wrong(format!("the check says good, and it is not: {:?}", seen.restored));
    }
    let counter = if is_clean && whole == world.expected.len() { &tally.harmless } else { &tally.named };
    counter.fetch_add(1, Ordering::Relaxed);
}

fn difference(expected: &Tree, came: &Tree) -> String {
    let missing = expected.iter().find(|(path, what)| came.get(*path) != Some(what));
    let more = came.iter().find(|(path, _)| !expected.contains_key(*path));
    format!("{missing:?}, {more:?}")
}

fn report(of: &str, attacks: &[Attack], tally: &Tally, panicked: u64) {
    let flipped = attacks.iter().filter(|a| matches!(a, Attack::Flip { .. })).count();
    let wrong = tally.wrong.lock().unwrap();
    println!(
        "{of}: bytes flipped: {flipped}, objects mistreated: {}, refused: {}, named: {}, harmless: {}, panics: {panicked}, wrong: {}, most memory: {} MiB",
        attacks.len() - flipped,
        tally.refused.load(Ordering::Relaxed),
        tally.named.load(Ordering::Relaxed),
        tally.harmless.load(Ordering::Relaxed),
        wrong.len(),
        most_memory()
    );
    assert!(wrong.is_empty(), "{}", wrong.iter().take(40).cloned().collect::<Vec<_>>().join("\n"));
    assert_eq!(panicked, 0, "something panicked");
    assert!(most_memory() < 1500, "a length that somebody changed took memory");
}

#[test]
fn no_byte_of_a_repository_changes_without_a_word() {
    let before = panics().load(Ordering::Relaxed);
    let world = World::new("");
    let place = world.keepd.path("repository");
    let attacks = [flips(&place, 900), mistreatments(&place)].concat();
    // What the check looks at; the others tell when they are opened, or do not matter.
    let must_be_told = |attack: &Attack| {
        let first = attack.file().components().next().unwrap().as_os_str().to_str().unwrap();
        match attack {
            Attack::Flip { .. } => ["packs", "index", "backups"].contains(&first),
            // A lost index loses nothing, for packs say what they hold; a backup that is removed whole is not there. A double is one object more.
            Attack::Put { what, .. } => {
                first == "packs" && !what.starts_with("doubled under another name")
                    || ["index", "backups"].contains(&first) && *what != "removed"
            }
        }
    };
    let tally = assail(&world, &place, &attacks, &must_be_told);
    report("repository", &attacks, &tally, panics().load(Ordering::Relaxed) - before);
}

#[test]
fn no_byte_of_a_destination_of_archives_changes_without_a_word() {
    let before = panics().load(Ordering::Relaxed);
    let world = World::new("layout = \"archive\"");
    let place = world.keepd.path("repository");
    let mut attacks = [flips(&place, 160), mistreatments(&place)].concat();
    // Whoever can write there can say any number beside an archive.
    for (file, _) in objects(&place).into_iter().filter(|(file, _)| file.extension().is_some_and(|e| e == "json")) {
        let text = fs::read_to_string(place.join(&file)).unwrap();
        let Ok(mut value) = serde_json::from_str::<serde_json::Value>(&text) else { continue };
        largest(&mut value);
        attacks.push(Attack::Put { file, what: "with the largest numbers there are", bytes: Some(value.to_string().into()) });
    }
    let must_be_told = |attack: &Attack| {
        let is_archive = attack.file().to_str().unwrap().contains(".tar");
        matches!(attack, Attack::Flip { .. }) && is_archive && attack.file().extension().is_none_or(|e| e != "json")
    };
    let tally = assail(&world, &place, &attacks, &must_be_told);
    report("destination of archives", &attacks, &tally, panics().load(Ordering::Relaxed) - before);
}

fn largest(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Number(n) if *n != serde_json::Number::from(1) => *n = u64::MAX.into(),
        serde_json::Value::Array(all) => all.iter_mut().for_each(largest),
        serde_json::Value::Object(all) => all.values_mut().for_each(largest),
        _ => {}
    }
}

/// Everything that an archive has, and of that the contents alone, by path.
type Unpacked = (String, Vec<Vec<u8>>);

fn unpacked(bytes: Vec<u8>, keys: &[ProfileKey], work: &Path) -> Result<Unpacked, String> {
    let with = OpenWith {
        keys,
        private_keys: &[],
        limits: Limits { bytes: Some(8 << 20), entries: 1000 },
        work_dir: work,
        cancel: CancellationToken::new(),
        foreign_source: None,
    };
    let mut reader = ArchiveReader::open(Cursor::new(bytes), &with).map_err(|e| e.to_string())?;
    let (mut all, mut every) = (format!("{:?}\n", reader.head()), Vec::new());
    while let Some(header) = reader.next_entry().map_err(|e| e.to_string())? {
        let mut contents = Vec::new();
        let mut buffer = [0; 4096];
        let is_file = header.kind == keepd_protocol::model::EntryKind::File;
        loop {
            match if is_file { reader.read(&mut buffer).map_err(|e| e.to_string())? } else { 0 } {
                0 => break,
                n => contents.extend_from_slice(&buffer[..n]),
            }
        }
        all.push_str(&format!("{header:?} {contents:?}\n"));
        if !contents.is_empty() {
            every.push(contents);
        }
    }
    let (totals, tail) = reader.finish().map_err(|e| e.to_string())?;
    Ok((format!("{all}{totals:?} {tail:?}"), every))
}

/// Flips bits of a file in memory: in the long run all of each byte, else one of each `every`. Gives where that changed what is read, and what was read then.
fn flip_all<T: PartialEq>(name: &str, bytes: &[u8], every: usize, read: &dyn Fn(Vec<u8>) -> Result<T, String>) -> Vec<(usize, T)> {
    let whole = read(bytes.to_vec()).unwrap();
    let mut chance = Chance(seed());
    let (mut count, mut refused, mut changed) = (0, 0, Vec::new());
    for at in (0..bytes.len()).filter(|at| is_long() || at % every == 0) {
        let first = chance.below(8) as u8;
        for bit in (0..if is_long() { 8 } else { 1 }).map(|n| (first + n) % 8) {
            let mut other = bytes.to_vec();
            other[at] ^= 1 << bit;
            count += 1;
            match read(other) {
                Err(text) => {
                    assert!(!text.trim().is_empty() && !text.contains("panicked"), "{name}, byte {at}, bit {bit}: '{text}'");
                    refused += 1;
                }
                Ok(came) if came == whole => {}
                Ok(came) => changed.push((at, came)),
            }
        }
    }
    println!(
        "{name}: bytes flipped: {count}, refused: {refused}, harmless: {}, read as something else: {}",
        count - refused - changed.len(),
        changed.len()
    );
    for cut in [0, 1, bytes.len() / 2, bytes.len() - 1] {
        // A line end at the end says nothing.
        assert!(
            read(bytes[..cut].to_vec()).map_or(true, |came| came == whole && bytes[cut..] == *b"\n"),
            "{name}: cut to {cut} bytes it is taken for whole"
        );
    }
    changed
}

fn profile() -> Profile {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden-config/seal.key")).unwrap();
    Profile::of("main", ProfileKey::Key(Arc::new(key_file::from_text(Path::new("seal.key"), &text).unwrap())))
}

#[test]
fn no_byte_of_an_archive_changes_without_a_word() {
    let (before, work, profile) = (panics().load(Ordering::Relaxed), in_memory(), profile());
    let key = [profile.key.clone()];
    for (name, packing, seal) in [
        ("archive, plain", Packing::None, None),
        ("archive, gzip", Packing::Gzip, None),
        ("archive, zstd", Packing::Zstd, None),
        ("archive, zstd and sealed", Packing::Zstd, Some(&profile)),
    ] {
        let bytes = seeds::archive(packing, seal);
        let read = |bytes| unpacked(bytes, if seal.is_some() { &key } else { &[] }, work.path());
        let (_, contents) = read(bytes.clone()).unwrap();
        assert_eq!(contents.iter().map(Vec::len).collect::<Vec<_>>(), [5, 600]);
        let mut changed = flip_all(name, &bytes, 13, &read);
        // Nothing seals what is not sealed: what describes an entry of a plain tar, and manifest.json, can be changed by whoever writes there. The contents cannot.
        if packing == Packing::None {
            // The samples above may miss the few bytes of them, so each of those has its turn.
            for (at, _) in bytes.windows(5).enumerate().filter(|(_, w)| *w == b"hello" || *w == b"ccccc") {
                let mut other = bytes.clone();
                other[at] ^= 1;
                assert!(read(other).is_err(), "{name}: byte {at} of what a file contains was changed, and nobody says so");
            }
            changed.retain(|(_, (_, came))| *came != contents);
        }
        assert!(changed.is_empty(), "{name}: {changed:?}");
    }
    assert_eq!(panics().load(Ordering::Relaxed), before, "something panicked");
}

#[test]
fn no_byte_of_a_stored_configuration_or_a_key_changes_without_a_word() {
    let before = panics().load(Ordering::Relaxed);
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden-config");
    let keys = seal::Keys { keys: vec![profile().key], ..seal::Keys::default() };
    for name in ["1.json", "1.json.gz", "1.json.gz.enc", "1.json.zst.enc"] {
        let bytes = fs::read(golden.join(name)).unwrap();
        let read = |bytes: Vec<u8>| {
            envelope::read(&bytes[..], &keys)
                .map(|o| format!("{:?}", serde_json::to_value(&o.envelope).unwrap()))
                .map_err(|e| e.to_string())
        };
        let changed = flip_all(name, &bytes, 3, &read);
        // Plain JSON is for people to read, and proven by nothing.
        assert!(changed.is_empty() || name == "1.json", "{name}: {changed:?}");
    }
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    let kit = keepd.path("kit.py");
    keepd.ok(&["key", "kit", "main", "-o", kit.to_str().unwrap()]);
    for (name, path, every) in [("key file", keepd.path("main.key"), 1), ("recovery kit", kit, 97)] {
        let bytes = fs::read(path).unwrap();
        let read = |bytes: Vec<u8>| {
            let (keys, private) = key_file::all_from_bytes(Path::new("it"), &bytes).map_err(|e| e.to_string())?;
            if keys.is_empty() {
                return Err("no key is in it".into());
            }
            Ok(format!("{:?} {}", keys.iter().map(|k| k.bytes().to_vec()).collect::<Vec<_>>(), private.len()))
        };
        if name == "key file" {
            assert!(flip_all(name, &bytes, every, &read).is_empty(), "another key was read than the one that was written");
        } else {
            let whole = read(bytes.clone()).unwrap();
            let mut chance = Chance(seed());
            let (mut count, mut refused) = (0, 0);
            for at in (0..bytes.len()).filter(|at| is_long() || at % every == 0) {
                let mut other = bytes.clone();
                other[at] ^= 1 << chance.below(8);
                count += 1;
                match read(other) {
                    Err(text) => {
                        assert!(!text.is_empty());
                        refused += 1;
                    }
                    Ok(came) => assert_eq!(came, whole, "byte {at}: another key was read than the one that was written"),
                }
            }
            println!("{name}: bytes flipped: {count}, refused: {refused}, harmless: {}", count - refused);
        }
    }
    assert_eq!(panics().load(Ordering::Relaxed), before, "something panicked");
}

/// The cache of the index of a repository that is whole, flipped: what is restored is right or an error, and without the cache all is there.
#[test]
fn a_damaged_index_cache_restores_no_other_bytes() {
    let before = panics().load(Ordering::Relaxed);
    let world = World::new("");
    let place = world.keepd.path("repository");
    let (cache, to) = (world.dir.path().join("warm"), world.dir.path().join("warm-to"));
    let fresh = |dir: &Path| {
        let _ = fs::remove_dir_all(dir);
        fs::create_dir(dir).unwrap();
    };
    fresh(&cache);
    fresh(&to);
    look_at(&place, &world.key(), &cache, &to).unwrap();
    let saved = world.dir.path().join("saved");
    copy(&cache, &saved);
    let mut chance = Chance(seed());
    let all: Vec<(PathBuf, u64)> =
        objects(&saved).into_iter().filter(|(file, _)| file.extension().is_some_and(|e| e == "sqlite")).collect();
    assert_eq!(all.len(), 2, "the index, and the list of backups: {all:?}");
    let rounds = if is_long() { 20_000 } else { 250 };
    let tally = Tally::default();
    let mut blamed = Vec::new();
    let mut attacks = Vec::new();
    while attacks.len() < rounds {
        let (file, _) = &all[attacks.len() % all.len()];
        let bytes = fs::read(saved.join(file)).unwrap();
        // Most of a database's pages is empty.
        let at = chance.below(bytes.len() as u64);
        if bytes[at as usize] == 0 && chance.below(16) > 0 {
            continue;
        }
        let attack = Attack::Flip { file: file.clone(), at, bit: chance.below(8) as u8 };
        copy(&saved, &cache);
        attack.on(&cache);
        fresh(&to);
        let seen = look_at(&place, &world.key(), &cache, &to);
        let mut is_blamed = seen.as_ref().is_ok_and(|seen| {
            let texts = seen.restored.values().flat_map(|r| r.as_ref().map_or_else(|text| vec![text.clone()], Clone::clone));
            texts.into_iter().any(|text| !text.contains("local index") && !text.contains("ledger"))
        });
        let one = Tally::default();
        judge(&world, &attack, Reach::All, seen, &to, false, &one);
        // The check reads packs by what they say themselves: of a cache it may say nothing.
        let said = |wrong: &String| wrong.contains("the check says good");
        is_blamed |= one.wrong.lock().unwrap().iter().any(said);
        tally.wrong.lock().unwrap().extend(one.wrong.into_inner().unwrap().into_iter().filter(|wrong| !said(wrong)));
        for (all, one) in [(&tally.refused, &one.refused), (&tally.named, &one.named), (&tally.harmless, &one.harmless)] {
            all.fetch_add(one.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        if is_blamed {
            blamed.push(format!("{attack:?}"));
            // It is the cache alone.
            let seen = world.look(&place, "without").unwrap();
            assert!(
                seen.restored.len() == 2 && seen.restored.values().all(|r| r.as_ref().is_ok_and(Vec::is_empty)),
                "{attack:?}: {seen:?}"
            );
        }
        attacks.push(attack);
    }
    report("index cache", &attacks, &tally, panics().load(Ordering::Relaxed) - before);
    println!("index cache: a restore failed with the cache and not without it: {}: {}", blamed.len(), blamed.join(", "));
    // A cache whose own structure is damaged can still hide what is there; what merely says something wrong must not.
    assert!(blamed.len() * 10 < rounds, "{}", blamed.join("\n"));
}

/// A keepd that does not outlive its test, however that ends.
struct Daemon(std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The daemon's own state, flipped while it stands: the next backup is right, or there is none and it is told why.
#[test]
fn a_damaged_state_makes_no_wrong_backup() {
    let world = World::new("");
    let keepd = &world.keepd;
    let saved = world.dir.path().join("saved");
    fs::create_dir(&saved).unwrap();
    // What stands in a -wal has checksums of its own.
    for path in files_below(&keepd.path("state")).into_iter().filter(|p| p.extension().is_some_and(|e| e == "sqlite")) {
        rusqlite::Connection::open(path).unwrap().execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    }
    for place in ["state", "repository"] {
        copy(&keepd.path(place), &saved.join(place));
    }
    // What changed since the last backup: a page, a line, a file.
    rusqlite::Connection::open(keepd.path("shop.db")).unwrap().execute_batch("UPDATE account SET balance = 8 WHERE id = 5").unwrap();
    fs::write(keepd.path("dump.txt"), (0..400).map(|n| format!("insert {n}{}\n", if n == 100 { "?" } else { "" })).collect::<String>())
        .unwrap();
    fs::write(keepd.path("files/deep/note.txt"), "a third note").unwrap();
    let all: Vec<(PathBuf, u64)> = objects(&saved.join("state"));
    println!("state: {}", all.iter().map(|(f, len)| format!("{} ({len})", f.display())).collect::<Vec<_>>().join(", "));
    assert!(
        ["pagemap", "pieces-", "index.sqlite", "ledger.sqlite"]
            .iter()
            .all(|name| all.iter().any(|(f, _)| f.to_str().unwrap().contains(name)))
    );
    let mut chance = Chance(seed());
    let (rounds, mut refused, mut good) = (if is_long() { 1500 } else { 18 }, 0, 0);
    let mut n = 0;
    while n < rounds {
        let (file, len) = &all[n % all.len()];
        let bytes = fs::read(saved.join("state").join(file)).unwrap();
        let at = chance.below(*len);
        if bytes[at as usize] == 0 && chance.below(16) > 0 {
            continue;
        }
        n += 1;
        for place in ["state", "repository"] {
            copy(&saved.join(place), &keepd.path(place));
        }
        let attack = Attack::Flip { file: file.clone(), at, bit: chance.below(8) as u8 };
        attack.on(&keepd.path("state"));
        let _ = fs::remove_file(keepd.path("keepd.log"));
        let log = fs::File::create(keepd.path("keepd.log")).unwrap();
        let mut daemon = Daemon(keepd.command().stderr(log).spawn().unwrap());
        let answers = (0..1500).any(|_| {
            let ended = daemon.0.try_wait().unwrap().is_some();
            let answers = ended || keepd.ctl(&["status"]).status.success();
            if !answers {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            answers
        });
        assert!(answers, "{attack:?}: it neither answers nor ends: {}", keepd.log());
        let backup = keepd.ctl(&["backup", "shop"]);
        let check = keepd.ctl(&["check", "local", "--read-data"]);
        let prune = keepd.ctl(&["prune", "local"]);
        if daemon.0.try_wait().unwrap().is_none() {
            signal(daemon.0.id(), "TERM");
        }
        let ended = (0..6000).any(|_| {
            let ended = daemon.0.try_wait().unwrap().is_some();
            if !ended {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            ended
        });
        assert!(ended, "{attack:?}: it does not end: {}", keepd.log());
        let said = format!("{}{}{}{}", text(&backup), text(&check), text(&prune), keepd.log());
        assert!(!said.contains("panicked"), "{attack:?}: {said}");
        // Seen without that state: every backup is right.
        let seen = world.look(&keepd.path("repository"), "after").unwrap_or_else(|e| panic!("{attack:?}: {e}"));
        for (id, expected) in &world.expected {
            let came = tree(&world.dir.path().join("after-to").join(id));
            assert_eq!(seen.restored.get(id), Some(&Ok(Vec::new())), "{attack:?}: an older backup is hurt: {said}");
            assert!(came == *expected, "{attack:?}: {id} differs: {}", difference(expected, &came));
        }
        let new: Vec<&String> = seen.restored.keys().filter(|id| !world.expected.contains_key(*id)).collect();
        match (backup.status.success(), new.as_slice()) {
            (true, [id]) => {
                good += 1;
                assert_eq!(seen.restored.get(*id), Some(&Ok(Vec::new())), "{attack:?}: {said}");
                let to = world.dir.path().join("after-to").join(id);
                assert_same(&keepd.path("files"), &to.join("files"));
                let db = rusqlite::Connection::open(to.join("db/shop.db")).unwrap();
                assert_eq!(
                    db.query_row("SELECT sum(balance) FROM account", [], |r| r.get::<_, i64>(0)).unwrap(),
                    10 * 100 + 7 + 8,
                    "{attack:?}"
                );
                let dump = files_below(&to.join("dump")).remove(0);
                assert!(fs::read(dump).unwrap() == fs::read(keepd.path("dump.txt")).unwrap(), "{attack:?}: the dump differs");
            }
            (false, []) => {
                refused += 1;
                assert!(!said.trim().is_empty());
            }
            other => panic!("{attack:?}: {other:?}: {said}"),
        }
        assert!(seen.check.as_ref().is_ok_and(Vec::is_empty), "{attack:?}: what it wrote is damaged: {:?}\n{said}", seen.check);
    }
    println!("state: bytes flipped: {rounds}, backups made: {good}, refused and told: {refused}, panics: 0, wrong bytes: 0");
}

/// A sample through the programs themselves: they say what is wrong and end as they should.
#[test]
fn the_programs_name_what_is_damaged_and_do_not_panic() {
    let world = World::new("");
    let keepd = &world.keepd;
    let place = keepd.path("repository");
    let all: Vec<Attack> = [flips(&place, 60), mistreatments(&place)].concat();
    let mut chance = Chance(seed());
    let rounds = if is_long() { 600 } else { 24 };
    let mut bad = 0;
    for _ in 0..rounds {
        let attack = &all[chance.below(all.len() as u64) as usize];
        let before = attack.on(&place);
        let to = world.dir.path().join("by-program");
        let _ = fs::remove_dir_all(&to);
        let rescue = |arguments: &[&str]| {
            let mut command = Command::new(keepd_binary());
            let destination = format!("fs:{}", place.display());
            command.arg("rescue").args(arguments).args(["--destination", &destination, "--key"]).arg(keepd.path("main.key"));
            command.output().unwrap()
        };
        let check = rescue(&["check", "--read-data"]);
        let restore = rescue(&["restore", "latest", "--to", to.to_str().unwrap()]);
        for out in [&check, &restore] {
            let code = out.status.code().unwrap_or_else(|| panic!("{attack:?}: ended by a signal: {}", text(out)));
            assert!((0..=3).contains(&code) && !text(out).contains("panicked"), "{attack:?}: {code}: {}", text(out));
            assert!(code == 0 || !out.stderr.is_empty(), "{attack:?}: nothing is told");
        }
        if restore.status.success() {
            let came = tree(&to);
            assert!(world.expected.values().any(|t| *t == came), "{attack:?}: other bytes were restored");
        }
        bad += u64::from(!check.status.success());
        attack.undo(&place, before);
    }
    println!("programs: attacks: {rounds}, told by the check: {bad}, panics: 0, wrong bytes: 0");
    assert!(bad > 0);
}

/// The judge of all this, judged: what it must not let pass, it does not.
#[test]
fn wrong_bytes_and_a_check_that_lies_are_noticed() {
    let world = World::new("");
    let place = world.keepd.path("repository");
    let attack = Attack::Put { file: "packs/nothing".into(), what: "at all", bytes: None };
    let to = world.dir.path().join("judged-to");
    let wrong = |spoil: &dyn Fn(&mut Seen)| {
        let mut seen = world.look(&place, "judged").unwrap();
        spoil(&mut seen);
        let tally = Tally::default();
        judge(&world, &attack, reach(attack.file()), Ok(seen), &to, false, &tally);
        tally.wrong.into_inner().unwrap()
    };
    assert_eq!(wrong(&|_| ()), Vec::<String>::new());
    let id = world.expected.keys().next().unwrap();
    let note = to.join(id).join("files/deep/note.txt");
    let spoiled = |bytes: &str| {
        let time = fs::metadata(&note).unwrap().modified().unwrap();
        fs::write(&note, bytes).unwrap();
        fs::File::options().write(true).open(&note).unwrap().set_modified(time).unwrap();
    };
    assert!(wrong(&|_| spoiled("b note")).concat().contains("differs"), "a byte of a file");
    assert!(wrong(&|_| fs::remove_file(&note).unwrap()).concat().contains("differs"), "a file that is missing");
    assert!(
        wrong(&|_| fs::write(to.join(id).join("files/more"), "").unwrap()).concat().contains("differs"),
        "one that was never backed up"
    );
    let in_part = |seen: &mut Seen| drop(seen.restored.insert(id.clone(), Ok(vec!["something".into()])));
    assert!(wrong(&in_part).concat().contains("the check says good"), "a check that does not tell");
    let spoiled_in_part = |seen: &mut Seen| {
        in_part(seen);
        seen.check = Ok(vec!["something".into()]);
        spoiled("b note");
    };
    assert!(wrong(&spoiled_in_part).concat().contains("what came differs"), "wrong bytes beside what is missing");
    let missing_in_part = |named: &'static str| {
        wrong(&|seen| {
            seen.restored.insert(id.clone(), Ok(vec![named.into()]));
            seen.check = Ok(vec!["something".into()]);
            fs::remove_file(&note).unwrap();
        })
    };
    assert_eq!(missing_in_part("'files/deep/note.txt': it is damaged"), Vec::<String>::new());
    assert_eq!(missing_in_part("'files/deep': entries behind it are lost: it is damaged"), Vec::<String>::new());
    assert!(
        missing_in_part("'files/noise': it is damaged").concat().contains("nobody tells"),
        "another file is missing than the one that is named"
    );
    assert!(
        wrong(&|seen| drop(seen.restored.insert(id.clone(), Err("no".into())))).concat().contains("not restored at all"),
        "one pack, a whole backup"
    );
    assert!(wrong(&|seen| drop(seen.restored.remove(id))).concat().contains("not there any more"), "a backup that is gone");
    let of_all = |file: &str| {
        let (attack, tally) = (Attack::Put { file: file.into(), what: "changed", bytes: None }, Tally::default());
        judge(&world, &attack, reach(attack.file()), Err("it does not open".into()), &to, false, &tally);
        tally.wrong.into_inner().unwrap()
    };
    assert!(
        of_all("packs/00/00").concat().contains("nothing opens any more") && of_all("keepd.json").is_empty(),
        "one pack, and nothing opens"
    );
    assert!(
        wrong(&|seen| drop(seen.restored.insert("00".repeat(32), Ok(Vec::new())))).concat().contains("never made"),
        "a backup of nobody"
    );
    assert!(wrong(&|seen| seen.check = Err("a thread panicked".into())).concat().contains("panicked"), "a panic that was caught");
}

/// A cache that is whole as a database, and wrong: no prune believes it, and restores find what they need.
#[test]
fn a_cache_that_has_chunks_elsewhere_loses_nothing() {
    for (damage, is_refused) in [
        // The pack that most of the first backup lies in is needed by nothing, if this is believed.
        ("UPDATE chunk SET pack = (SELECT max(n) FROM pack WHERE kind = 1) WHERE pack = (SELECT min(n) FROM pack WHERE kind = 1)", true),
        ("UPDATE chunk SET start = start + 1 WHERE pack IN (SELECT n FROM pack WHERE kind = 1)", false),
        ("UPDATE chunk SET len = 4000000000 WHERE pack = (SELECT min(n) FROM pack WHERE kind = 1)", false),
        ("UPDATE chunk SET sealed = 4294967295, start = 4294967295 WHERE pack = (SELECT min(n) FROM pack WHERE kind = 1)", false),
        ("UPDATE chunk SET ordinal = ordinal + 1", false),
        ("DELETE FROM chunk WHERE pack = (SELECT min(n) FROM pack WHERE kind = 1)", false),
        ("UPDATE pack SET kind = 3 - kind", false),
    ] {
        let world = World::new("prune_grace = \"1s\"");
        let keepd = &world.keepd;
        let index = files_below(&keepd.path("state/repositories")).into_iter().find(|p| p.ends_with("index.sqlite")).unwrap();
        let db = rusqlite::Connection::open(&index).unwrap();
        assert!(db.execute(damage, []).unwrap() > 0, "{damage}");
        drop(db);
        let packs = keepd.packs();
        let mut world = world;
        world.keepd.start();
        let keepd = &world.keepd;
        for (n, (id, expected)) in world.expected.iter().enumerate() {
            if is_refused {
                break;
            }
            let to = keepd.path(&format!("out-{n}"));
            let out = keepd.ctl(&["restore", id, "--to", to.to_str().unwrap()]);
            assert!(out.status.success(), "{damage}: {}", text(&out));
            let came = tree(&to);
            assert!(came == *expected, "{damage}: {}", difference(expected, &came));
        }
        // What is refused once is mended by that: the cache is made anew.
        for n in 0..2 {
            let said = keepd.ctl(&["prune", "local"]);
            assert!(said.status.success() || text(&said).contains("nothing was pruned"), "{damage}: {}", text(&said));
            let is_told = !said.status.success() && text(&said).contains("the local index");
            assert!(!is_refused || (n == 0) == is_told, "{damage}, prune {n}: {}", text(&said));
            std::thread::sleep(std::time::Duration::from_millis(2100));
        }
        assert!(!keepd.log().contains("panicked"), "{damage}: {}", keepd.log());
        world.keepd.stop();
        assert!(packs.iter().all(|p| p.exists()), "{damage}: a pack that is needed was deleted");
        let seen = world.look(&world.keepd.path("repository"), "after").unwrap();
        assert!(
            seen.check.as_ref().is_ok_and(Vec::is_empty) && seen.restored.values().all(|r| r.as_ref().is_ok_and(Vec::is_empty)),
            "{damage}: {seen:?}"
        );
    }
}
