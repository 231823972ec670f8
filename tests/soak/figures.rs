//! What happened in a life, as counted while it happened.

use std::fmt;
use std::time::Duration;

use super::world::Break;

#[derive(Default, Clone)]
pub struct Figures {
    pub lives: usize,
    pub steps: usize,
    pub lived: Duration,
    pub backups: usize,
    /// Restores compared to the last byte, by whom.
    pub by_daemon: usize,
    pub by_rescue: usize,
    pub by_decoder: usize,
    pub in_parts: usize,
    pub in_place: usize,
    pub undone: usize,
    pub kills: usize,
    pub terms: usize,
    pub servers: usize,
    pub damages: usize,
    pub states_lost: usize,
    pub bootstraps: usize,
    pub rotations: usize,
    pub re_encryptions: usize,
    pub imports: usize,
    pub memory_kib: usize,
    pub threads: usize,
    pub open_files: usize,
    pub slowest_answer: Duration,
}

impl Figures {
    pub fn broken(&mut self, how: Break) {
        match how {
            Break::Kill => self.kills += 1,
            Break::Term => self.terms += 1,
            Break::Server => self.servers += 1,
        }
    }

    pub fn add(&mut self, other: &Self) {
        for (to, from) in [
            (&mut self.lives, other.lives),
            (&mut self.steps, other.steps),
            (&mut self.backups, other.backups),
            (&mut self.by_daemon, other.by_daemon),
            (&mut self.by_rescue, other.by_rescue),
            (&mut self.by_decoder, other.by_decoder),
            (&mut self.in_parts, other.in_parts),
            (&mut self.in_place, other.in_place),
            (&mut self.undone, other.undone),
            (&mut self.kills, other.kills),
            (&mut self.terms, other.terms),
            (&mut self.servers, other.servers),
            (&mut self.damages, other.damages),
            (&mut self.states_lost, other.states_lost),
            (&mut self.bootstraps, other.bootstraps),
            (&mut self.rotations, other.rotations),
            (&mut self.re_encryptions, other.re_encryptions),
            (&mut self.imports, other.imports),
        ] {
            *to += from;
        }
        self.lived += other.lived;
        self.memory_kib = self.memory_kib.max(other.memory_kib);
        self.threads = self.threads.max(other.threads);
        self.open_files = self.open_files.max(other.open_files);
        self.slowest_answer = self.slowest_answer.max(other.slowest_answer);
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let compared = self.by_daemon + self.by_rescue + self.by_decoder + self.in_parts;
        writeln!(f, "| lives, steps, minutes | {}, {}, {:.1} |", self.lives, self.steps, self.lived.as_secs_f64() / 60.0)?;
        writeln!(f, "| backups made | {} |", self.backups)?;
        writeln!(f, "| restores compared to the last byte | {compared} |")?;
        let ways = (self.by_daemon, self.by_rescue, self.by_decoder, self.in_parts);
        writeln!(f, "| of these by the daemon, `keepd rescue`, the decoder, in parts | {}, {}, {}, {} |", ways.0, ways.1, ways.2, ways.3)?;
        writeln!(f, "| restores in place, undone | {}, {} |", self.in_place, self.undone)?;
        writeln!(f, "| imports | {} |", self.imports)?;
        writeln!(f, "| SIGKILL, SIGTERM, dead servers in the middle | {}, {}, {} |", self.kills, self.terms, self.servers)?;
        writeln!(f, "| packs damaged and repaired | {} |", self.damages)?;
        writeln!(f, "| states lost, machines begun anew | {}, {} |", self.states_lost, self.bootstraps)?;
        writeln!(f, "| keys exchanged, re-encryptions | {}, {} |", self.rotations, self.re_encryptions)?;
        writeln!(f, "| memory at most | {:.0} MiB |", self.memory_kib as f64 / 1024.0)?;
        writeln!(f, "| threads, open files at rest, at most | {}, {} |", self.threads, self.open_files)?;
        write!(f, "| slowest answer | {:.2} s |", self.slowest_answer.as_secs_f64())
    }
}
