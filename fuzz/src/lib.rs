//! What is fuzzed: everything in keepd that reads what somebody else wrote. `fuzz_targets/` gives these functions to libFuzzer, `tests/fuzz_corpora.rs` the kept corpora, old
//! crashes, and changes of them by chance.
//!
//! A target panics where what it asks for does not hold. Beside "nothing panics" that is: what was read, written and read again is the same; what comes in pieces is read as if it
//! came whole; nothing unpacks to more than it may; nothing is written outside. Much is asked behind the seal, of bytes that were opened: whoever has the key is no friend for
//! that, and neither is a bug.

mod objects;
mod streams;
mod texts;

// The frames between the two ends of a bridge: their crate is a program.
#[path = "../../ctl/src/remote/frame.rs"]
#[allow(dead_code)]
mod bridge;

/// What a target does with an input; whether it was taken for what it should be. Inputs that never are show nothing but the first check.
pub type Run = fn(&[u8]) -> bool;

/// A target's name, and what it does.
pub type Target = (&'static str, Run);

/// All of them, by name.
pub const TARGETS: &[Target] = &[
    ("archive", streams::archive),
    ("companion", texts::companion),
    ("configuration", texts::configuration),
    ("control_frames", streams::control_frames),
    ("cron", texts::cron),
    ("entry_stream", objects::entry_stream),
    ("footer", objects::footer),
    ("index", objects::index),
    ("key_file", texts::key_file),
    ("key_slot", texts::key_slot),
    ("manifest", objects::manifest),
    ("meta_backup", texts::meta_backup),
    ("mysql_dump", streams::mysql_dump),
    ("pack", objects::pack),
    ("payload", objects::payload),
    ("plugin_answers", streams::plugin_answers),
    ("postgres_archive", streams::postgres_archive),
    ("records", objects::records),
    ("repository_json", texts::repository_json),
    ("restore_stream", streams::restore_stream),
    ("tar_headers", streams::tar_headers),
];

/// The target of a name.
pub fn target(name: &str) -> Option<Run> {
    TARGETS.iter().find(|(known, _)| *known == name).map(|(_, run)| *run)
}
