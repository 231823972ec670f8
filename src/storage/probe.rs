//! What a destination can do, tried step by step; nothing is left behind. For a plugin it is the test of its conformance.

use std::time::{Duration, Instant, SystemTime};

use super::{Place, Result, Storage, StorageError, TEMPORARY, temporary_name};
use crate::crypto;

/// What came of one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Ok,
    /// It will do, and somebody should know.
    Warning,
    Failed,
    /// Not tried, because of what failed before or is not wanted here.
    Skipped,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub step: &'static str,
    pub verdict: Verdict,
    /// In words and numbers.
    pub text: String,
}

/// Objects that the listing must have, every one.
const LISTED: usize = 12;
const SPEED_BYTES: usize = 1 << 20;
/// Where the first went faster than this, more is sent to know it better.
const QUICK: Duration = Duration::from_millis(500);
const MORE_BYTES: usize = 16 << 20;
/// keepd needs no clocks to agree, but times are easier to read when they do.
const CLOCK_SLACK: Duration = Duration::from_secs(60);

/// Tries everything keepd does with a storage.
pub fn probe(storage: &Storage) -> Vec<Finding> {
    let mut probe = Probe { storage, findings: Vec::new(), written: Vec::new() };
    probe.run();
    probe.clean();
    probe.findings
}

struct Probe<'a> {
    storage: &'a Storage,
    findings: Vec<Finding>,
    /// To be removed.
    written: Vec<String>,
}

fn mib_per_second(bytes: usize, time: Duration) -> String {
    format!("{:.1} MiB/s", bytes as f64 / (1 << 20) as f64 / time.as_secs_f64().max(1e-6))
}

impl Probe<'_> {
    fn tell(&mut self, step: &'static str, verdict: Verdict, text: impl Into<String>) {
        self.findings.push(Finding { step, verdict, text: text.into() });
    }

    /// Tells a step; true when it went well.
    fn step(&mut self, step: &'static str, work: impl FnOnce(&mut Self) -> Result<String>) -> bool {
        let done = work(self);
        match done {
            Ok(text) => self.tell(step, Verdict::Ok, text),
            Err(e) => {
                self.tell(step, Verdict::Failed, e.to_string());
                return false;
            }
        }
        true
    }

    fn wrong(&self, verb: &'static str, name: &str, text: &str) -> StorageError {
        self.storage.failed(verb, name, text.to_owned())
    }

    fn name(&mut self) -> Result<String> {
        let name = temporary_name().map_err(|e| self.wrong("write", TEMPORARY, &e.to_string()))?;
        self.written.push(name.clone());
        Ok(name)
    }

    fn noise(&self, len: usize) -> Result<Vec<u8>> {
        let seed: [u8; 32] = crypto::random().map_err(|e| self.wrong("write", TEMPORARY, &e.to_string()))?;
        let mut bytes = vec![0; len];
        blake3::Hasher::new_keyed(&seed).finalize_xof().fill(&mut bytes);
        Ok(bytes)
    }

    fn run(&mut self) {
        let reached = self.step("reach", |p| {
            let since = Instant::now();
            let found = p.storage.exists("keepd.json")?;
            let what = if found { "a repository is there" } else { "no repository is there yet" };
            Ok(format!("{} answers after {} ms; {what}", p.storage.location(), since.elapsed().as_millis()))
        });
        let listed = reached
            && self.step("rights", |p| {
                // A directory that does not exist yet is made by the first backup.
                let backups = match &p.storage.place {
                    Place::Directory(root) if !root.exists() => 0,
                    _ => p.storage.names("backups/")?.len(),
                };
                Ok(format!("listing is permitted; {backups} backups are listed"))
            });
        let Some((name, bytes)) = listed.then(|| self.write()).flatten() else {
            for step in ["create-if-absent", "replace", "read back", "range", "missing", "list", "delete", "clock", "speed"] {
                self.tell(step, Verdict::Skipped, "because of what failed before");
            }
            return;
        };
        self.create_if_absent(&name, &bytes);
        self.step("replace", |p| {
            let name = p.name()?;
            p.storage.put(&name, b"first".to_vec())?;
            p.storage.put(&name, b"the second".to_vec())?;
            match &p.storage.get(&name, 100)?[..] {
                b"the second" => Ok("an object can be replaced (the lease is)".into()),
                _ => Err(p.wrong("write", &name, "it still has what it had before")),
            }
        });
        self.step("read back", |p| match p.storage.get(&name, bytes.len() as u64)?[..] == bytes[..] {
            true => Ok(format!("{} bytes came back as they were written", bytes.len())),
            false => Err(p.wrong("read", &name, "other bytes came back than were written")),
        });
        self.step("range", |p| {
            for (offset, len) in [(0, 1), (1, 4096), (bytes.len() - 4, 4), (bytes.len() / 2, bytes.len() / 4)] {
                if p.storage.range(&name, offset as u64, len as u64)?[..] != bytes[offset..offset + len] {
                    return Err(p.wrong("read", &name, &format!("the {len} bytes from {offset} are not those of the object")));
                }
            }
            match p.storage.range(&name, bytes.len() as u64 - 1, 2) {
                Err(_) => Ok("parts come back, and a part beyond the end is an error".into()),
                Ok(_) => Err(p.wrong("read", &name, "bytes came from beyond its end")),
            }
        });
        self.step("missing", |p| {
            let absent = format!("{name}-absent");
            match (p.storage.get(&absent, 1), p.storage.exists(&absent)) {
                (Err(StorageError::NotFound { .. }), Ok(false)) => Ok("what is not there is told apart from what cannot be read".into()),
                (read, _) => Err(p.wrong("read", &absent, &format!("it is not there, and that is not what the service says: {read:?}"))),
            }
        });
        self.step("list", |p| {
            let mut names = Vec::new();
            for _ in 0..LISTED {
                let name = p.name()?;
                p.storage.put_new(&name, b"x".to_vec())?;
                names.push(name);
            }
            let listed = p.storage.list(TEMPORARY)?;
            let missing = names.iter().filter(|n| !listed.iter().any(|l| l.name == **n && l.size == 1)).count();
            match missing {
                0 => Ok(format!("all of {LISTED} new objects are listed, with their sizes")),
                n => Err(p.wrong("list", TEMPORARY, &format!("{n} of {LISTED} objects that were just written are not listed rightly"))),
            }
        });
        self.delete();
        self.clock();
        self.speed();
    }

    fn write(&mut self) -> Option<(String, Vec<u8>)> {
        let mut made = None;
        self.step("write", |p| {
            let (name, bytes) = (p.name()?, p.noise(100_000)?);
            let since = Instant::now();
            p.storage.put_new(&name, bytes.clone())?;
            made = Some((name, bytes));
            Ok(format!("an object of 100,000 bytes is written in {} ms", since.elapsed().as_millis()))
        });
        made
    }

    fn create_if_absent(&mut self, name: &str, bytes: &[u8]) {
        let step = "create-if-absent";
        let second = self.storage.put_new(name, b"another".to_vec());
        let there = self.storage.get(name, bytes.len() as u64);
        match (second, there) {
            (Err(StorageError::Exists { .. }), Ok(there)) if there[..] == *bytes => match self.storage.creates_if_absent() {
                true => self.tell(step, Verdict::Ok, "a second object of the same name is refused by the service"),
                false => {
                    self.tell(step, Verdict::Ok, "the service has no such condition; keepd looks before it writes, and again afterwards")
                }
            },
            (Ok(()), Ok(_)) => {
                self.tell(
                    step,
                    Verdict::Warning,
                    "the service ignores the condition and overwrites: two daemons that write here at the same time are kept apart by the lease only",
                );
                // What comes now reads the first one.
                if let Err(e) = self.storage.put(name, bytes.to_vec()) {
                    self.tell(step, Verdict::Failed, e.to_string());
                }
            }
            (Err(e), _) | (_, Err(e)) => self.tell(step, Verdict::Failed, e.to_string()),
        }
    }

    fn delete(&mut self) {
        let name = self.written.pop().unwrap_or_default();
        let deleted = self
            .storage
            .delete_even_here(&name)
            .and_then(|()| self.storage.delete_even_here(&name))
            .and_then(|()| self.storage.exists(&name));
        let append_only = self.storage.is_append_only();
        let (verdict, text) = match (deleted, append_only) {
            (Ok(false), false) => (Verdict::Ok, "an object can be deleted, and deleting it again is no error".to_owned()),
            (Ok(false), true) => (
                Verdict::Warning,
                "keepd deletes nothing here (append_only), but its credentials could: whoever takes them can, too. Take that right from them".to_owned(),
            ),
            (Ok(true), _) => (Verdict::Failed, "a deleted object is still there".to_owned()),
            (Err(e), true) => (Verdict::Ok, format!("deleting is refused, as it should be here: {e}")),
            (Err(e), false) => (Verdict::Failed, e.to_string()),
        };
        if verdict != Verdict::Ok || append_only {
            self.written.push(name);
        }
        self.tell("delete", verdict, text);
    }

    fn clock(&mut self) {
        let modified = match &self.storage.place {
            Place::Directory(_) => return self.tell("clock", Verdict::Ok, "it is this machine's own"),
            Place::Remote(remote) => self.name().and_then(|name| {
                self.storage.put_new(&name, b"x".to_vec())?;
                self.storage.wait("look at", &name, remote.modified(&name))
            }),
        };
        match modified {
            Ok(Some(time)) => {
                let now = SystemTime::now();
                let apart = now.duration_since(time).unwrap_or_else(|e| e.duration());
                let verdict = if apart > CLOCK_SLACK { Verdict::Warning } else { Verdict::Ok };
                self.tell("clock", verdict, format!("the service's clock and this machine's are {} s apart", apart.as_secs()));
            }
            Ok(None) => self.tell("clock", Verdict::Skipped, "the service tells no times; keepd needs none"),
            Err(e) => self.tell("clock", Verdict::Failed, e.to_string()),
        }
    }

    fn speed(&mut self) {
        self.step("speed", |p| {
            let mut size = SPEED_BYTES;
            loop {
                let (name, bytes) = (p.name()?, p.noise(size)?);
                let since = Instant::now();
                p.storage.put_new(&name, bytes)?;
                let up = since.elapsed();
                let since = Instant::now();
                drop(p.storage.get(&name, size as u64)?);
                let down = since.elapsed();
                if size < MORE_BYTES && up.max(down) < QUICK {
                    size = MORE_BYTES;
                    continue;
                }
                return Ok(format!(
                    "{} up, {} down, one object of {} MiB",
                    mib_per_second(size, up),
                    mib_per_second(size, down),
                    size >> 20
                ));
            }
        });
    }

    fn clean(&mut self) {
        let left: Vec<String> =
            std::mem::take(&mut self.written).into_iter().filter(|name| self.storage.delete_even_here(name).is_err()).collect();
        if !left.is_empty() {
            let text = format!("{} test objects could not be deleted and are left in {TEMPORARY}: {}", left.len(), left.join(", "));
            self.tell("clean up", Verdict::Warning, text);
        }
    }
}
