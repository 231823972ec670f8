//! Key files: the 32 bytes that open an encryption profile, in a text file that only its owner may read.
//!
//! Comment lines begin with `#`; one line holds `keepd-key-1 <64 hex digits> <8 hex digits>`. The last word is the beginning of
//! SHA-256 over `keepd key check` and the key, so that a truncated or mistyped file is noticed before anything is sealed with it.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// How a file that we made begins.
const HEADER: &str = "# Key file of keepd, fingerprint ";
const WORD: &str = "keepd-key-";
const VERSION: &str = "1";
const KEY_BYTES: usize = 32;
const CHECK_BYTES: usize = 4;
/// A key file is far shorter, with a few lines of comment added as well.
const MAX_FILE_BYTES: u64 = 4096;

/// A key, wiped from memory when dropped. It has no `Debug` nor `Display`, so that it cannot slip into a message.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct Key([u8; KEY_BYTES]);

/// Tells keys apart without telling anything about them: 8 bytes of SHA-256, shown as 16 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 8]);

/// Why a key file could not be made or used. Each text names the file and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    #[error(
        "there is no key file {}; copy it here from where you keep its copy, or, if nothing was ever sealed with it, make one with: \
         keepd key generate {}",
        .0.display(), shell_word(.0)
    )]
    Missing(PathBuf),
    #[error("the key file {} cannot be read: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error(
        "the key file {} can be read or changed by others (mode {mode:04o}) and is refused; run: chmod 600 {}",
        path.display(), shell_word(path)
    )]
    OpenToOthers { path: PathBuf, mode: u32 },
    #[error("the key file {} belongs to another user (uid {owner}) and is refused; run: chown {me} {}", path.display(), shell_word(path))]
    ForeignOwner { path: PathBuf, owner: u32, me: u32 },
    #[error("{} is not a key file of keepd: {why}", path.display())]
    NotAKeyFile { path: PathBuf, why: &'static str },
    #[error("the key file {} is truncated; restore it from your copy of it", .0.display())]
    Truncated(PathBuf),
    #[error("the key file {} is damaged: its key does not fit its check digits; restore it from your copy of it", .0.display())]
    CheckMismatch(PathBuf),
    #[error("the key file {} was made by a newer keepd (its format is {version}, this one reads {VERSION}); update keepd", path.display())]
    NewerVersion { path: PathBuf, version: String },
    #[error("{} exists already and is never overwritten; name another file, or move that one away", .0.display())]
    Exists(PathBuf),
    #[error("the directory {} does not exist; make it with: mkdir -p -m 700 {}", .0.display(), shell_word(.0))]
    NoDirectory(PathBuf),
    #[error("the key file {} cannot be written: {reason}", path.display())]
    Unwritable { path: PathBuf, reason: String },
}

type Result<T, E = KeyFileError> = std::result::Result<T, E>;

impl Key {
    pub fn new(bytes: [u8; KEY_BYTES]) -> Self {
        Self(bytes)
    }

    pub fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint(digest("keepd/1 key fingerprint", &self.0))
    }

    fn check(&self) -> [u8; CHECK_BYTES] {
        digest("keepd key check", &self.0)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

/// The first bytes of SHA-256 over a purpose and a key.
fn digest<const N: usize>(purpose: &str, key: &[u8]) -> [u8; N] {
    const { assert!(N <= 32) };
    let hash: [u8; 32] = Sha256::new().chain_update(purpose).chain_update(key).finalize().into();
    std::array::from_fn(|n| hash[n])
}

/// Makes a new key file, mode 0600, durable when this returns. Its directory must exist, the file must not.
pub fn generate(path: &Path) -> Result<Fingerprint> {
    let failed = |reason: String| KeyFileError::Unwritable { path: path.to_owned(), reason };
    let mut key = Key([0; KEY_BYTES]);
    getrandom::fill(&mut key.0).map_err(|e| failed(format!("the system gives no random bytes: {e}")))?;
    let fingerprint = key.fingerprint();

    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !directory.is_dir() {
        return Err(KeyFileError::NoDirectory(directory.to_owned()));
    }
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path).map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => KeyFileError::Exists(path.to_owned()),
        _ => failed(e.to_string()),
    })?;
    let written = (|| {
        // Also when the umask took something away.
        file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
        file.write_all(text(&key, fingerprint).as_bytes())?;
        file.sync_all()?;
        File::open(directory)?.sync_all()
    })();
    if let Err(error) = written {
        // Ours alone, as it was just created; half a key file is worse than none.
        let _ = std::fs::remove_file(path);
        return Err(failed(error.to_string()));
    }
    Ok(fingerprint)
}

/// The contents of a key file. The buffer is as large as it gets, so that no copy of the key is left behind by its growth.
fn text(key: &Key, fingerprint: Fingerprint) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(1024));
    text.push_str(HEADER);
    text.push_str(&fingerprint.to_string());
    text.push_str(".\n# Whoever has it can read every backup sealed with it, and without it nobody can:\n");
    text.push_str("# keep a copy of it in a safe place that is not this machine.\n");
    text.push_str(WORD);
    text.push_str(VERSION);
    text.push(' ');
    HEXLOWER.encode_append(key.bytes(), &mut text);
    text.push(' ');
    HEXLOWER.encode_append(&key.check(), &mut text);
    text.push('\n');
    text
}

/// Reads a key file. Symbolic links are followed; what counts are the owner and mode of the file that was opened.
pub fn load(path: &Path) -> Result<Key> {
    let unreadable = |error: &io::Error| KeyFileError::Unreadable { path: path.to_owned(), reason: reason(error) };
    // Not to hang on a FIFO, nor to take a terminal as the controlling one.
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    let mut options = File::options();
    options.read(true).custom_flags(i32::try_from(flags.bits()).unwrap_or_default());
    let file = options.open(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => KeyFileError::Missing(path.to_owned()),
        _ => unreadable(&e),
    })?;
    let found = file.metadata().map_err(|e| unreadable(&e))?;
    if !found.is_file() {
        return Err(KeyFileError::NotAKeyFile { path: path.to_owned(), why: "it is not a regular file" });
    }
    let mode = found.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::OpenToOthers { path: path.to_owned(), mode });
    }
    let me = rustix::process::geteuid().as_raw();
    if found.uid() != 0 && found.uid() != me {
        return Err(KeyFileError::ForeignOwner { path: path.to_owned(), owner: found.uid(), me });
    }
    let limit = usize::try_from(MAX_FILE_BYTES).unwrap_or(usize::MAX);
    let mut bytes = Zeroizing::new(Vec::with_capacity(limit + 1));
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|e| unreadable(&e))?;
    if bytes.len() > limit {
        return Err(KeyFileError::NotAKeyFile { path: path.to_owned(), why: "it is longer than 4 KiB" });
    }
    parse(path, &bytes)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Key> {
    let not = |why| KeyFileError::NotAKeyFile { path: path.to_owned(), why };
    let truncated = || KeyFileError::Truncated(path.to_owned());
    let text = std::str::from_utf8(bytes).map_err(|_| not("it is not a text"))?;
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let Some(line) = lines.next() else {
        // Nothing, or our comments only, is what a crash or a full disk leaves of a key file.
        return Err(if text.starts_with(HEADER) || HEADER.starts_with(text) { truncated() } else { not("it holds no key") });
    };
    if lines.next().is_some() {
        return Err(not("it holds more than one line beside comments"));
    }
    let mut words = line.split_ascii_whitespace();
    let (word, key, check) = (words.next().unwrap_or_default(), words.next(), words.next());
    let Some(version) = word.strip_prefix(WORD) else {
        return Err(if WORD.starts_with(word) { truncated() } else { not("its line does not begin with keepd-key-1") });
    };
    match version {
        VERSION => {}
        "" => return Err(truncated()),
        _ if version.len() <= 9 && version.bytes().all(|b| b.is_ascii_digit()) && !version.starts_with('0') => {
            return Err(KeyFileError::NewerVersion { path: path.to_owned(), version: version.to_owned() });
        }
        _ => return Err(not("its line does not begin with keepd-key-1")),
    }
    if words.next().is_some() {
        return Err(not("its line has more than three words"));
    }
    let mut found = Key([0; KEY_BYTES]);
    let key = key.unwrap_or_default();
    let check = check.unwrap_or_default();
    if !key.bytes().chain(check.bytes()).all(|b| b.is_ascii_hexdigit()) || key.len() > 2 * KEY_BYTES || check.len() > 2 * CHECK_BYTES {
        return Err(not("its line is not keepd-key-1 with 64 and 8 hexadecimal digits"));
    }
    if key.len() < 2 * KEY_BYTES || check.len() < 2 * CHECK_BYTES {
        return Err(truncated());
    }
    let mut given = [0; CHECK_BYTES];
    let decoded = HEXLOWER_PERMISSIVE.decode_mut(key.as_bytes(), &mut found.0).is_ok()
        && HEXLOWER_PERMISSIVE.decode_mut(check.as_bytes(), &mut given).is_ok();
    if !decoded || found.check() != given {
        return Err(KeyFileError::CheckMismatch(path.to_owned()));
    }
    Ok(found)
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "permission denied".into(),
        _ => error.to_string(),
    }
}

/// A path as it can be pasted into a shell.
pub(crate) fn shell_word(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-' | '+' | ':' | '@' | '%' | ',');
    if !text.is_empty() && text.chars().all(plain) && !text.starts_with('-') {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// An expectation spelled by hand, not by the code under test.
    const KNOWN: &str = "keepd-key-1 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
    const KNOWN_CHECK: &str = "d0205972";
    const KNOWN_FINGERPRINT: &str = "4fb348e6b273874e";

    fn error(path: &Path) -> KeyFileError {
        load(path).err().unwrap_or_else(|| panic!("{} was taken", path.display()))
    }

    fn write(directory: &tempfile::TempDir, text: impl AsRef<[u8]>) -> PathBuf {
        let path = directory.path().join("a.key");
        let _ = std::fs::remove_file(&path);
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&path).expect("a new file");
        file.write_all(text.as_ref()).expect("written");
        path
    }

    #[test]
    fn what_is_generated_loads() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("main.key");
        let fingerprint = generate(&path).expect("generated");
        let key = load(&path).expect("loaded");
        assert_eq!(key.fingerprint(), fingerprint);
        assert_ne!(key.bytes(), &[0; 32]);
        assert_eq!(std::fs::metadata(&path).expect("there").mode() & 0o7777, 0o600);
        let text = std::fs::read_to_string(&path).expect("read");
        assert!(text.contains(&fingerprint.to_string()), "{text}");
        let other = generate(&directory.path().join("other.key")).expect("generated");
        assert_ne!(other, fingerprint);
    }

    #[test]
    fn the_format_is_fixed() {
        let directory = tempfile::tempdir().expect("a directory");
        let key = load(&write(&directory, format!("# mine\n\n{KNOWN} {KNOWN_CHECK}\n# end\n"))).expect("loaded");
        assert_eq!(key.bytes(), &std::array::from_fn::<u8, 32, _>(|n| n as u8));
        assert_eq!(key.fingerprint().to_string(), KNOWN_FINGERPRINT);
        let upper = format!("keepd-key-1 {} {}", KNOWN[12..].to_uppercase(), KNOWN_CHECK.to_uppercase());
        assert!(load(&write(&directory, upper)).is_ok());
    }

    #[test]
    fn nothing_is_overwritten() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = write(&directory, "precious");
        assert!(matches!(generate(&path), Err(KeyFileError::Exists(_))));
        let link = directory.path().join("link");
        symlink(directory.path().join("nowhere"), &link).expect("a link");
        assert!(matches!(generate(&link), Err(KeyFileError::Exists(_))));
        assert!(matches!(generate(&directory.path().join("no/such.key")), Err(KeyFileError::NoDirectory(_))));
        assert_eq!(std::fs::read_to_string(&path).expect("read"), "precious");
    }

    #[test]
    fn every_cut_of_a_key_file_is_noticed() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("whole.key");
        generate(&path).expect("generated");
        let whole = std::fs::read(&path).expect("read");
        for cut in 0..whole.len() - 1 {
            let found = error(&write(&directory, &whole[..cut]));
            assert!(matches!(found, KeyFileError::Truncated(_)), "cut at {cut}: {found}");
        }
    }

    #[test]
    fn every_changed_digit_is_noticed() {
        let directory = tempfile::tempdir().expect("a directory");
        let line = format!("{KNOWN} {KNOWN_CHECK}\n");
        for at in (12..line.len() - 1).filter(|&at| line.as_bytes()[at] != b' ') {
            let mut bytes = line.clone().into_bytes();
            bytes[at] = if bytes[at] == b'0' { b'1' } else { b'0' };
            let found = error(&write(&directory, &bytes));
            assert!(matches!(found, KeyFileError::CheckMismatch(_)), "digit {at}: {found}");
        }
    }

    #[test]
    fn other_files_are_named_for_what_they_are() {
        let directory = tempfile::tempdir().expect("a directory");
        let newer = error(&write(&directory, "keepd-key-2 age1xyz\n"));
        assert!(matches!(&newer, KeyFileError::NewerVersion { version, .. } if version == "2"), "{newer}");
        for text in [
            "-----BEGIN PRIVATE KEY-----\nabc\n",
            "# only a comment\n",
            "keepd-key-01 aa bb",
            "keepd-key-x aa bb",
            &format!("{KNOWN} {KNOWN_CHECK} more"),
            &format!("{KNOWN} {KNOWN_CHECK}\n{KNOWN} {KNOWN_CHECK}\n"),
            &format!("{KNOWN}00 {KNOWN_CHECK}"),
            &format!("{} {KNOWN_CHECK}", KNOWN.replace("0a", "0g")),
            &"#".repeat(5000),
        ] {
            let found = error(&write(&directory, text));
            assert!(matches!(found, KeyFileError::NotAKeyFile { .. }), "{text}: {found}");
        }
        assert!(matches!(error(&write(&directory, [0xff, 0xfe, 0])), KeyFileError::NotAKeyFile { .. }));
        assert!(matches!(error(directory.path()), KeyFileError::NotAKeyFile { .. } | KeyFileError::OpenToOthers { .. }));
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).expect("a FIFO");
        assert!(matches!(error(&fifo), KeyFileError::NotAKeyFile { .. }));
        assert!(matches!(error(&directory.path().join("none")), KeyFileError::Missing(_)));
    }

    #[test]
    fn a_file_open_to_others_is_refused_also_through_a_link() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("it's main.key");
        generate(&path).expect("generated");
        let link = directory.path().join("link.key");
        symlink(&path, &link).expect("a link");
        assert!(load(&link).is_ok());
        for mode in [0o640, 0o604, 0o620, 0o601, 0o644] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("changed");
            for path in [&path, &link] {
                let found = error(path);
                assert!(matches!(found, KeyFileError::OpenToOthers { .. }), "{mode:o}: {found}");
            }
            assert!(error(&path).to_string().contains("it'\\''s main.key'"), "{}", error(&path));
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).expect("changed");
        assert!(load(&path).is_ok());
    }

    #[test]
    fn a_file_of_another_user_is_refused() {
        // Only root can give files away.
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("main.key");
        generate(&path).expect("generated");
        std::os::unix::fs::chown(&path, Some(12_345), None).expect("given away");
        let found = error(&path);
        assert!(matches!(found, KeyFileError::ForeignOwner { owner: 12_345, .. }), "{found}");
    }

    #[test]
    fn messages_never_hold_the_key() {
        let directory = tempfile::tempdir().expect("a directory");
        let digits = &KNOWN[12..];
        for text in [
            format!("{KNOWN} 00000000"),
            KNOWN.to_owned(),
            digits.to_owned(),
            format!("keepd-key-{digits} 1 2"),
            format!("{KNOWN} {digits}"),
            format!("{digits} {digits}\n{digits}"),
        ] {
            let message = error(&write(&directory, &text)).to_string();
            assert!(!message.contains("0708090a"), "{message}");
        }
    }
}
