//! The targets of `fuzz/` with what was kept for them: the corpora, the inputs that once broke something, and changes of both by chance.
//!
//! In `make test` the changes are a few thousand for each target; KEEPD_TEST_SECONDS has each go on for so long, KEEPD_TEST_SEED begins elsewhere. What breaks is written down, so that
//! it can be kept in `fuzz/regressions/`. libFuzzer, which sees what code an input reaches, is `make fuzz` (docs/fuzzing.md).

mod common;
#[path = "../fuzz/src/lib.rs"]
mod fuzz;
#[path = "common/seeds.rs"]
mod seeds;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use common::files_below;

const HOW_TO_WRITE: &str = "KEEPD_WRITE_CORPORA=1 cargo test --test fuzz_corpora -- --ignored";

fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(name)
}

fn kept(directory_name: &str, target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    files_below(&directory(directory_name).join(target)).into_iter().map(|path| (path.clone(), fs::read(&path).unwrap())).collect()
}

/// Changes inputs by chance; the same for the same seed.
struct Mutator(u64);

impl Mutator {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// One to four changes; `other` is what pieces are taken from.
    fn change(&mut self, input: &[u8], other: &[u8]) -> Vec<u8> {
        const ODD: [u64; 12] =
            [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 0x1_0000_0000, 0x7fff_ffff_ffff_ffff, u64::MAX];
        let mut bytes = input.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len().max(1));
            match self.below(9) {
                _ if bytes.is_empty() => bytes.push(self.next() as u8),
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = self.next() as u8,
                2 => bytes.truncate(at),
                3 => {
                    let end = (at + 1 + self.below(16)).min(bytes.len());
                    bytes.drain(at..end);
                }
                4 => {
                    let end = (at + 1 + self.below(64)).min(bytes.len());
                    let piece = bytes[at..end].to_vec();
                    let to = self.below(bytes.len());
                    bytes.splice(to..to, piece);
                }
                5 => {
                    let from = self.below(other.len().max(1)).min(other.len());
                    let end = (from + 1 + self.below(64)).min(other.len());
                    bytes.splice(at..at, other[from..end].iter().copied());
                }
                6 => {
                    // CBOR: the largest number of its kind, or an odd one.
                    let odd = ODD[self.below(ODD.len())].to_be_bytes();
                    bytes.splice(at..(at + 1).min(bytes.len()), [&[0x1b | (self.next() as u8 & 0xe0)][..], &odd].concat());
                }
                7 => {
                    let (odd, width) = (ODD[self.below(ODD.len())].to_le_bytes(), 1 << self.below(4));
                    let end = (at + width).min(bytes.len());
                    bytes.splice(at..end, odd[..width].iter().copied());
                }
                _ => {
                    let odd = ODD[self.below(ODD.len())].to_string();
                    let digits = bytes[at..].iter().take_while(|b| b.is_ascii_digit()).count();
                    bytes.splice(at..at + digits, odd.bytes());
                }
            }
        }
        bytes
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Runs a target: whether it took the input. What broke it is written down.
fn run(name: &str, target: fuzz::Run, input: &[u8], from: &str) -> bool {
    catch_unwind(AssertUnwindSafe(|| target(input))).unwrap_or_else(|_| {
        let path = std::env::temp_dir().join(format!("keepd-broken-{name}-{:016x}", seeds::hash(input)));
        fs::write(&path, input).unwrap();
        panic!("{name} broke on {from}; the input is {} (it belongs into fuzz/regressions/{name})", path.display());
    })
}

/// What the corpora were made of, as it is made today: they may be older than a format.
static SEEDS: LazyLock<seeds::Seeds> = LazyLock::new(seeds::all);

fn attack(only: &[&str]) {
    let (seed, seconds) = (number("KEEPD_TEST_SEED").unwrap_or(20_261_122), number("KEEPD_TEST_SECONDS"));
    for (name, target) in fuzz::TARGETS.iter().filter(|(name, _)| only.contains(name)) {
        let began = Instant::now();
        let (mut corpus, old) = (kept("corpus", name), kept("regressions", name));
        assert!(!corpus.is_empty(), "there is no corpus for {name}: {HOW_TO_WRITE}");
        let count = |inputs: &[(PathBuf, Vec<u8>)]| {
            inputs.iter().filter(|(path, input)| run(name, *target, input, &path.display().to_string())).count()
        };
        let taken = count(&corpus);
        assert!(taken > 0, "no input of the corpus of {name} is taken, changes of them show the first check alone: {HOW_TO_WRITE}");
        let (of_corpus, _) = (corpus.len(), count(&old));
        corpus.extend(SEEDS.iter().filter(|(of, _)| of == name).map(|(_, input)| (PathBuf::from("a seed"), input.clone())));
        let made_taken = count(&corpus[of_corpus..]);
        assert!(made_taken > 0, "no seed of {name} is taken: tests/common/seeds.rs is older than a format");
        corpus.sort_by(|a, b| a.1.cmp(&b.1));
        corpus.dedup_by(|a, b| a.1 == b.1);
        let mut mutator = Mutator(seed ^ seeds::hash(name.as_bytes()) | 1);
        let (mut changed, mut changed_taken) = (0u64, 0u64);
        let most = if matches!(*name, "restore_stream" | "archive" | "meta_backup") { 1500 } else { 15_000 };
        while seconds.map_or(changed < most, |s| began.elapsed() < Duration::from_secs(s)) {
            let (one, other) = (mutator.below(corpus.len()), mutator.below(corpus.len()));
            let input = mutator.change(&corpus[one].1, &corpus[other].1);
            changed_taken += u64::from(run(name, *target, &input, "an input made by chance"));
            changed += 1;
        }
        println!(
            "{name}: {of_corpus} inputs kept, {taken} of them taken; {} that once broke it; {changed} made by chance, {changed_taken} of them taken; {:.1} s",
            old.len(),
            began.elapsed().as_secs_f64()
        );
    }
}

macro_rules! parts { ($($part:ident: $($name:literal),*;)*) => {
    $(#[test] fn $part() { attack(&[$($name),*]); })*
    #[test]
    fn every_target_is_in_a_part() {
        let all: Vec<&str> = [$($($name),*),*].to_vec();
        assert!(fuzz::TARGETS.iter().all(|(name, _)| all.contains(name)) && all.len() == fuzz::TARGETS.len());
        assert!(all.iter().all(|name| fuzz::target(name).is_some()));
    }
}}

parts! {
    objects_of_a_repository_hold: "pack", "footer", "index", "manifest", "records", "payload", "entry_stream", "key_slot", "repository_json";
    archives_and_stored_configurations_hold: "archive", "tar_headers", "companion", "meta_backup", "key_file";
    what_people_write_holds: "configuration", "cron";
    streams_hold: "control_frames", "plugin_answers", "mysql_dump", "postgres_archive";
    a_restore_stream_writes_nowhere_else: "restore_stream";
}

/// The corpora's first inputs, made of real objects. Others came of libFuzzer.
#[test]
#[ignore = "writes into fuzz/corpus"]
fn write_corpora() {
    assert!(std::env::var_os("KEEPD_WRITE_CORPORA").is_some(), "KEEPD_WRITE_CORPORA=1 says that it is meant");
    for path in
        files_below(&directory("corpus")).iter().filter(|p| p.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"seed-")))
    {
        fs::remove_file(path).unwrap();
    }
    for (target, input) in seeds::all() {
        let place = directory("corpus").join(target);
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join(format!("seed-{:016x}", seeds::hash(&input))), input).unwrap();
    }
}
