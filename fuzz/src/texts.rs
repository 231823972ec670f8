//! What people and other programs write: configuration, cron expressions, JSON that lies at a destination, keys.

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use croner::Cron;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use keepd::archive::{ArchiveName, Companion};
use keepd::attack;
use keepd::config::{Texts, cron as config_cron};
use keepd::crypto::passphrase::Cost;
use keepd::crypto::slot::Slot;
use keepd::crypto::{Key, ProfileKey, key_file, locked::Locked};
use keepd::portable::{Packing, envelope, seal};

/// `keepd.toml`, and behind a zero byte a drop-in.
pub fn configuration(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let main = PathBuf::from("/etc/keepd/keepd.toml");
    let mut files = Vec::new();
    for (n, text) in text.split('\0').take(3).enumerate() {
        let path = if n == 0 { main.clone() } else { PathBuf::from(format!("/etc/keepd/conf.d/{n}.toml")) };
        files.push((path, text.to_owned()));
    }
    let texts = Texts { main, files };
    let _ = (texts.items(), texts.digest());
    match texts.load() {
        Ok(config) => {
            // What was taken is taken again, and the same.
            assert_eq!(format!("{:?}", texts.load().expect("it was taken before").jobs.keys()), format!("{:?}", config.jobs.keys()));
            true
        }
        Err(problems) => {
            assert!(!problems.0.is_empty(), "something is wrong, and what it is is told");
            for problem in &problems.0 {
                assert!(problem.place.is_some() || !problem.key.is_empty(), "a place or a key is named: {problem}");
                assert!(!problem.text.is_empty() && !problem.text.contains("please report this"), "it is told what is wrong: {problem}");
                if let Some(place) = &problem.place
                    && place.line > 0
                {
                    let (_, text) = texts.files.iter().find(|(path, _)| *path == place.file).expect("the place is in one of the files");
                    assert!(place.line <= text.split('\n').count() && place.column >= 1, "the place exists: {problem}");
                }
            }
            assert!(!problems.to_string().contains('\u{1b}'), "nothing plays with the terminal");
            false
        }
    }
}

fn after(cron: &Cron, from: Timestamp) -> Option<Timestamp> {
    let zoned = from.to_zoned(TimeZone::UTC);
    cron.find_next_occurrence(&zoned, false).ok().map(|found| found.timestamp())
}

/// A cron expression.
pub fn cron(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    match config_cron::parse(text) {
        Err(error) => {
            assert!(error.at <= text.len() && text.is_char_boundary(error.at) && !error.text.is_empty(), "the place exists");
            false
        }
        Ok(cron) => {
            let mut at = Timestamp::from_second(1_800_000_000).expect("a time");
            for _ in 0..4 {
                // Far ahead it gives up; what it says before must be right.
                let Some(next) = after(&cron, at) else { return true };
                assert!(next > at, "the next one is later");
                assert_eq!(next.as_second() % 60, 0, "at a whole minute");
                let zoned = next.to_zoned(TimeZone::UTC);
                assert!(cron.is_time_matching(&zoned).expect("it can be asked"), "{text:?} matches the time that it names, {next}");
                at = next;
            }
            true
        }
    }
}

/// A key slot.
pub fn key_slot(data: &[u8]) -> bool {
    static KEY: LazyLock<ProfileKey> = LazyLock::new(|| ProfileKey::Key(Arc::new(Key::new(Locked::take(&mut [5; 32])))));
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(cost) = text.parse::<Cost>()
    {
        assert_eq!(cost.to_string().parse::<Cost>().ok().map(|c| c.to_string()), Some(cost.to_string()));
    }
    let Ok(slot) = serde_json::from_slice::<Slot>(data) else { return false };
    let written = serde_json::to_vec(&slot).expect("it is written");
    assert_eq!(serde_json::from_slice::<Slot>(&written).expect("what was written is read"), slot);
    // Passphrases are not tried: what they may cost is a matter of its own.
    let repository = keepd_id(&slot.repository);
    for key in [None, Some(&*KEY)] {
        if let Err(e) = slot.unwrap(&repository, key) {
            assert!(!e.to_string().is_empty());
        }
    }
    true
}

fn keepd_id(hex: &str) -> [u8; 16] {
    let mut id = [0; 16];
    for (n, byte) in id.iter_mut().enumerate() {
        *byte = hex.get(2 * n..2 * n + 2).and_then(|two| u8::from_str_radix(two, 16).ok()).unwrap_or(0);
    }
    id
}

/// `keepd.json`.
pub fn repository_json(data: &[u8]) -> bool {
    let Ok(again) = attack::repository_json(data) else { return false };
    assert_eq!(attack::repository_json(&again).as_ref(), Ok(&again), "what was read is written and read the same");
    true
}

/// A configuration that was exported.
pub fn meta_backup(data: &[u8]) -> bool {
    static KEY: LazyLock<seal::Keys> = LazyLock::new(|| {
        let key = ProfileKey::Key(Arc::new(Key::new(Locked::take(&mut [5; 32]))));
        seal::Keys { keys: vec![key], ..seal::Keys::default() }
    });
    let opened = match envelope::read(data, &KEY) {
        Ok(opened) => opened,
        Err(e) => {
            assert!(!e.to_string().is_empty());
            return false;
        }
    };
    let _ = opened.envelope.info(opened.sealed, None);
    opened.envelope.items.iter().for_each(|item| {
        let _ = item.kind();
    });
    if opened.envelope.has_secrets() {
        return true;
    }
    for packing in [Packing::None, Packing::Zstd] {
        let Ok(written) = envelope::write(&opened.envelope, Vec::new(), packing, None) else { continue };
        let again = envelope::read(&written[..], &KEY).expect("what was written is read");
        assert_eq!(again.envelope, opened.envelope);
    }
    true
}

/// Keys, private keys, public keys, and recovery kits.
pub fn key_file(data: &[u8]) -> bool {
    let path = Path::new("a key");
    let mut is_taken = false;
    if let Ok((keys, private)) = key_file::all_from_bytes(path, data) {
        assert!(!keys.is_empty() || !private.is_empty());
        for key in &keys {
            let text = key_file::text_of(key);
            let again = key_file::from_text(path, &text).expect("what was written is read");
            assert_eq!(again.bytes(), key.bytes());
        }
        is_taken = true;
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = key_file::from_text(path, text);
        if let Ok(public) = key_file::public_from_text(path, text) {
            let again = key_file::public_from_text(path, &key_file::text_of_public(&public)).expect("what was written is read");
            assert!(*key_file::text_of_public(&again) == *key_file::text_of_public(&public));
            is_taken = true;
        }
    }
    is_taken
}

/// What lies beside an archive, and the archive's name.
pub fn companion(data: &[u8]) -> bool {
    let mut is_taken = false;
    if let Ok(companion) = serde_json::from_slice::<Companion>(data) {
        let written = serde_json::to_vec(&companion).expect("it is written");
        assert_eq!(serde_json::from_slice::<Companion>(&written).expect("what was written is read"), companion);
        is_taken = true;
    }
    if let Ok(text) = std::str::from_utf8(data) {
        is_taken |= ArchiveName::parse(text).is_some();
    }
    is_taken
}
