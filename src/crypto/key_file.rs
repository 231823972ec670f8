//! Key files: 32 bytes in a text file that only its owner may read: the key of an encryption profile, or a private key; and public keys.
//!
//! Comment lines begin with `#`; one line holds `keepd-key-1 <64 hex digits> <8 hex digits>` (`keepd-private-1`, `keepd-public-1`). The last
//! word is the beginning of SHA-256 over `keepd key check` and the key, so that a truncated or mistyped file is noticed before anything is
//! sealed with it. A longer text that has such a line, a recovery kit, may stand in for a key file.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::hpke::{PrivateKey, PublicKey};
use super::locked::Locked;
use super::stack;

const VERSION: &str = "1";
const KEY_BYTES: usize = Locked::BYTES;
const CHECK_BYTES: usize = 4;
/// A key file is far shorter, with a few lines of comment added as well.
const MAX_FILE_BYTES: usize = 4096;
/// A recovery kit is shorter.
const MAX_KIT_BYTES: usize = 1 << 20;

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The key of an encryption profile.
    Profile,
    Private,
    Public,
}

impl Kind {
    const ALL: [Self; 3] = [Kind::Profile, Kind::Private, Kind::Public];

    /// What its line begins with, before the version.
    fn word(self) -> &'static str {
        match self {
            Kind::Profile => "keepd-key-",
            Kind::Private => "keepd-private-",
            Kind::Public => "keepd-public-",
        }
    }

    /// What its check digits are for.
    fn purpose(self) -> &'static str {
        match self {
            Kind::Profile => "keepd key check",
            Kind::Private => "keepd private key check",
            Kind::Public => "keepd public key check",
        }
    }

    /// How a file that we made begins.
    fn header(self) -> &'static str {
        match self {
            Kind::Profile => "# Key file of keepd, fingerprint ",
            Kind::Private => "# Private key file of keepd, fingerprint ",
            Kind::Public => "# Public key file of keepd, fingerprint ",
        }
    }

    fn what(self) -> &'static str {
        match self {
            Kind::Profile => "a key file",
            Kind::Private => "a private key file",
            Kind::Public => "a public key file",
        }
    }
}

/// A key, wiped from memory when dropped. It has no `Debug` nor `Display`, so that it cannot slip into a message.
#[derive(Clone)]
pub struct Key(Locked);

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
    #[error("there is no public key file {}; copy it here from where its pair was made ('keepd key generate --pair')", .0.display())]
    MissingPublic(PathBuf),
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
    #[error("{} is {found} of keepd where {wanted} is wanted", path.display())]
    OtherKind { path: PathBuf, found: &'static str, wanted: &'static str },
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

/// The keys and the private keys of a text.
type Loaded = (Vec<Key>, Vec<PrivateKey>);

type Result<T, E = KeyFileError> = std::result::Result<T, E>;

impl Key {
    pub fn new(key: Locked) -> Self {
        Self(key)
    }

    pub fn generate() -> Result<Self, super::CryptoError> {
        Ok(Self(Locked::random()?))
    }

    pub fn bytes(&self) -> &[u8; KEY_BYTES] {
        self.0.bytes()
    }

    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint(digest("keepd/1 key fingerprint", self.bytes()))
    }

    /// The line of a key file, or of a recovery kit.
    pub fn line(&self) -> Zeroizing<String> {
        line(Kind::Profile, self.bytes())
    }
}

/// `<word>1 <key> <check>`. The text is as large as it gets, so that no copy of the key is left behind by its growth.
pub fn line(kind: Kind, key: &[u8; KEY_BYTES]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(128));
    text.push_str(kind.word());
    text.push_str(VERSION);
    text.push(' ');
    HEXLOWER.encode_append(key, &mut text);
    text.push(' ');
    HEXLOWER.encode_append(&check(kind, key), &mut text);
    text
}

fn check(kind: Kind, key: &[u8; KEY_BYTES]) -> [u8; CHECK_BYTES] {
    digest(kind.purpose(), key)
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

/// The first bytes of SHA-256 over a purpose and a key.
pub(super) fn digest<const N: usize>(purpose: &str, key: &[u8]) -> [u8; N] {
    const { assert!(N <= 32) };
    let hash: [u8; 32] = Sha256::new().chain_update(purpose).chain_update(key).finalize().into();
    std::array::from_fn(|n| hash[n])
}

/// What stands in the key file of a profile key.
pub fn text_of(key: &Key) -> Zeroizing<String> {
    text(Kind::Profile, key.bytes(), key.fingerprint())
}

/// What stands in the file of a public key.
pub fn text_of_public(key: &PublicKey) -> Zeroizing<String> {
    text(Kind::Public, key.bytes(), key.fingerprint())
}

/// Makes a new key file, mode 0600, durable when this returns. Its directory must exist, the file must not.
pub fn generate(path: &Path) -> Result<Fingerprint> {
    let key = Key::generate().map_err(|e| KeyFileError::Unwritable { path: path.to_owned(), reason: e.to_string() })?;
    let fingerprint = key.fingerprint();
    write(path, 0o600, &text_of(&key))?;
    Ok(fingerprint)
}

/// Makes a new key pair: the private key as a key file is made, the public one beside it with `.pub` behind its name. Neither may exist.
pub fn generate_pair(path: &Path) -> Result<(Fingerprint, PathBuf)> {
    let mut public_path = path.as_os_str().to_owned();
    public_path.push(".pub");
    let public_path = PathBuf::from(public_path);
    let private = PrivateKey::generate().map_err(|e| KeyFileError::Unwritable { path: path.to_owned(), reason: e.to_string() })?;
    let fingerprint = private.public().fingerprint();
    write(path, 0o600, &text(Kind::Private, private.bytes(), fingerprint))?;
    if let Err(error) = write(&public_path, 0o644, &text(Kind::Public, private.public().bytes(), fingerprint)) {
        // Made just now, and nothing was sealed to it.
        let _ = std::fs::remove_file(path);
        return Err(error);
    }
    Ok((fingerprint, public_path))
}

/// Writes a new file, durable when this returns.
pub fn write(path: &Path, mode: u32, text: &str) -> Result<()> {
    let failed = |reason: String| KeyFileError::Unwritable { path: path.to_owned(), reason };
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !directory.is_dir() {
        return Err(KeyFileError::NoDirectory(directory.to_owned()));
    }
    let mut file = File::options().write(true).create_new(true).mode(mode).open(path).map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => KeyFileError::Exists(path.to_owned()),
        _ => failed(e.to_string()),
    })?;
    let written = (|| {
        // Also when the umask took something away.
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        File::open(directory)?.sync_all()
    })();
    if let Err(error) = written {
        // Ours alone, as it was just created; half a key file is worse than none.
        let _ = std::fs::remove_file(path);
        return Err(failed(error.to_string()));
    }
    Ok(())
}

/// The contents of a file. The buffer is as large as it gets, so that no copy of the key is left behind by its growth.
fn text(kind: Kind, key: &[u8; KEY_BYTES], fingerprint: Fingerprint) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(1024));
    text.push_str(kind.header());
    text.push_str(&fingerprint.to_string());
    text.push_str(match kind {
        Kind::Profile => ".\n# Whoever has it can read every backup sealed with it, and without it nobody can:\n# keep a copy of it in a safe place that is not this machine.\n",
        Kind::Private => ".\n# Whoever has it can read the backups written for it, and without it nobody can:\n# keep it in safe places, none of which is the machine that is backed up.\n",
        Kind::Public => ".\n# Backups can be written with it, and not read: name it as public_key of an encryption profile.\n",
    });
    text.push_str(&line(kind, key));
    text.push('\n');
    text
}

/// Reads a key file. Symbolic links are followed; what counts are the owner and mode of the file that was opened.
pub fn load(path: &Path) -> Result<Key> {
    Ok(Key(read(path, &open(path)?, Kind::Profile)?))
}

/// Reads a key or a private key from an open file, or all those of a recovery kit; `path` is for messages. Mode and owner count as ever.
pub fn load_all(path: &Path, file: &File) -> Result<Loaded> {
    keys_in(path, &read_bytes(path, file, Kind::Profile)?)
}

/// The same of a text that came from elsewhere.
pub fn all_from_bytes(path: &Path, bytes: &[u8]) -> Result<Loaded> {
    keys_in(path, bytes)
}

/// Like [`load_all`], also from a stick or a disc that knows no owners and no modes: what it would be refused for comes with the keys.
pub fn load_all_however_kept(path: &Path, file: &File) -> Result<(Loaded, Option<KeyFileError>)> {
    let complaint = match check_rights(path, file, Kind::Profile) {
        Ok(_) => None,
        Err(e @ (KeyFileError::OpenToOthers { .. } | KeyFileError::ForeignOwner { .. })) => Some(e),
        Err(e) => return Err(e),
    };
    let len = file.metadata().map_err(|e| unreadable(path, &e))?.len();
    Ok((keys_in(path, &bytes_of(path, file, len)?)?, complaint))
}

fn keys_in(path: &Path, bytes: &[u8]) -> Result<Loaded> {
    let keys = kit_lines(path, bytes, Kind::Profile)?.into_iter().map(Key).collect::<Vec<_>>();
    let private_keys = private_keys_in(path, bytes)?;
    if keys.is_empty() && private_keys.is_empty() {
        // Says best what is wrong with it.
        return Ok((vec![Key(parse(path, bytes, Kind::Profile)?)], Vec::new()));
    }
    Ok((keys, private_keys))
}

fn private_keys_in(path: &Path, bytes: &[u8]) -> Result<Vec<PrivateKey>> {
    kit_lines(path, bytes, Kind::Private)?.into_iter().map(|k| private(path, k)).collect()
}

/// Reads the private keys of an open file: of a private key file, or all those of a recovery kit. `path` is for messages. Mode and owner count as
/// ever.
pub fn load_private_keys(path: &Path, file: &File) -> Result<Vec<PrivateKey>> {
    // A public key file, which everybody may read, is told for what it is.
    let bytes = read_bytes(path, file, Kind::Public)?;
    if parse(path, &bytes, Kind::Public).is_ok() {
        return Err(KeyFileError::OtherKind { path: path.to_owned(), found: Kind::Public.what(), wanted: Kind::Private.what() });
    }
    check_rights(path, file, Kind::Private)?;
    let keys = private_keys_in(path, &bytes)?;
    if keys.is_empty() {
        // Says best what is wrong with it.
        return Ok(vec![private(path, parse(path, &bytes, Kind::Private)?)?]);
    }
    Ok(keys)
}

/// Reads a public key file. Everybody may read it, but nobody else change it: they could have the next backups written for themselves.
pub fn load_public(path: &Path) -> Result<PublicKey> {
    let file = open(path).map_err(|e| match e {
        KeyFileError::Missing(path) => KeyFileError::MissingPublic(path),
        other => other,
    })?;
    let key = read(path, &file, Kind::Public)?;
    PublicKey::new(*key.bytes()).map_err(|_| KeyFileError::NotAKeyFile { path: path.to_owned(), why: "nothing can be sealed to it" })
}

/// Reads a public key that came as a text from elsewhere; `path` is for messages.
pub fn public_from_text(path: &Path, text: &str) -> Result<PublicKey> {
    let key = parse(path, text.as_bytes(), Kind::Public)?;
    PublicKey::new(*key.bytes()).map_err(|_| KeyFileError::NotAKeyFile { path: path.to_owned(), why: "nothing can be sealed to it" })
}

fn private(path: &Path, key: Locked) -> Result<PrivateKey> {
    PrivateKey::new(key).map_err(|_| KeyFileError::NotAKeyFile { path: path.to_owned(), why: "it is no X25519 key" })
}

/// Opens a key file, which may be none.
pub fn open(path: &Path) -> Result<File> {
    // To open a device can mean something by itself.
    if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        return Err(KeyFileError::NotAKeyFile { path: path.to_owned(), why: "it is not a regular file" });
    }
    // Not to hang on a FIFO, nor to take a terminal as the controlling one.
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    let mut options = File::options();
    options.read(true).custom_flags(i32::try_from(flags.bits()).unwrap_or_default());
    options.open(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => KeyFileError::Missing(path.to_owned()),
        _ => KeyFileError::Unreadable { path: path.to_owned(), reason: reason(&e) },
    })
}

fn read(path: &Path, file: &File, kind: Kind) -> Result<Locked> {
    parse(path, &read_bytes(path, file, kind)?, kind)
}

fn unreadable(path: &Path, error: &io::Error) -> KeyFileError {
    KeyFileError::Unreadable { path: path.to_owned(), reason: reason(error) }
}

/// Refuses a file that others may read, or, where it holds a public key, change; how long it is.
fn check_rights(path: &Path, file: &File, kind: Kind) -> Result<u64> {
    let found = file.metadata().map_err(|e| unreadable(path, &e))?;
    if !found.is_file() {
        return Err(KeyFileError::NotAKeyFile { path: path.to_owned(), why: "it is not a regular file" });
    }
    let mode = found.mode() & 0o7777;
    if mode & (if kind == Kind::Public { 0o022 } else { 0o077 }) != 0 {
        return Err(KeyFileError::OpenToOthers { path: path.to_owned(), mode });
    }
    let me = rustix::process::geteuid().as_raw();
    if found.uid() != 0 && found.uid() != me {
        return Err(KeyFileError::ForeignOwner { path: path.to_owned(), owner: found.uid(), me });
    }
    Ok(found.len())
}

/// Reads from the start, wherever an open file stands that somebody passed along.
struct FromStart<'f>(&'f File, u64);

impl Read for FromStart<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.0.read_at(into, self.1)?;
        self.1 += n as u64;
        Ok(n)
    }
}

/// Reads a file that nobody else may read, or, where it holds a public key, change.
fn read_bytes(path: &Path, file: &File, kind: Kind) -> Result<Zeroizing<Vec<u8>>> {
    bytes_of(path, file, check_rights(path, file, kind)?)
}

fn bytes_of(path: &Path, file: &File, len: u64) -> Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(len).unwrap_or(0).min(MAX_KIT_BYTES) + 1));
    FromStart(file, 0).take(MAX_KIT_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(|e| unreadable(path, &e))?;
    if bytes.len() > MAX_KIT_BYTES {
        return Err(KeyFileError::NotAKeyFile { path: path.to_owned(), why: "it is longer than any" });
    }
    Ok(bytes)
}

/// The keys of a kind in a text: the whole lines that are one. A line that begins like one and is none is an error.
fn kit_lines(path: &Path, bytes: &[u8], kind: Kind) -> Result<Vec<Locked>> {
    let text = std::str::from_utf8(bytes).map_err(|_| KeyFileError::NotAKeyFile { path: path.to_owned(), why: "it is not a text" })?;
    let lines = text.lines().map(str::trim).filter(|line| {
        let rest = line.strip_prefix(kind.word());
        rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    });
    lines.map(|line| parse_line(path, line, kind)).collect()
}

fn parse(path: &Path, bytes: &[u8], kind: Kind) -> Result<Locked> {
    let not = |why| KeyFileError::NotAKeyFile { path: path.to_owned(), why };
    let truncated = || KeyFileError::Truncated(path.to_owned());
    let text = std::str::from_utf8(bytes).map_err(|_| not("it is not a text"))?;
    if bytes.len() > MAX_FILE_BYTES {
        // A recovery kit, whose other lines are no comments.
        return kit_lines(path, bytes, kind)?.into_iter().next().ok_or_else(|| not("it is longer than 4 KiB, and no line of it is a key"));
    }
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let Some(line) = lines.next() else {
        // Nothing, or our comments only, is what a crash or a full disk leaves of a key file.
        let header = kind.header();
        return Err(if text.starts_with(header) || header.starts_with(text) { truncated() } else { not("it holds no key") });
    };
    if lines.next().is_some() {
        return Err(not("it holds more than one line beside comments"));
    }
    parse_line(path, line, kind)
}

fn parse_line(path: &Path, line: &str, kind: Kind) -> Result<Locked> {
    let not = |why| KeyFileError::NotAKeyFile { path: path.to_owned(), why };
    let truncated = || KeyFileError::Truncated(path.to_owned());
    let mut words = line.split_ascii_whitespace();
    let (word, key, check) = (words.next().unwrap_or_default(), words.next(), words.next());
    let Some(version) = word.strip_prefix(kind.word()) else {
        let other = Kind::ALL.into_iter().find(|k| word.strip_prefix(k.word()).is_some_and(|v| v == VERSION));
        return Err(match other {
            Some(other) => KeyFileError::OtherKind { path: path.to_owned(), found: other.what(), wanted: kind.what() },
            None if kind.word().starts_with(word) => truncated(),
            None => not(match kind {
                Kind::Profile => "its line does not begin with keepd-key-1",
                Kind::Private => "its line does not begin with keepd-private-1",
                Kind::Public => "its line does not begin with keepd-public-1",
            }),
        });
    };
    match version {
        VERSION => {}
        "" => return Err(truncated()),
        _ if version.len() <= 9 && version.bytes().all(|b| b.is_ascii_digit()) && !version.starts_with('0') => {
            return Err(KeyFileError::NewerVersion { path: path.to_owned(), version: version.to_owned() });
        }
        _ => return Err(not("the version in its line is no number")),
    }
    if words.next().is_some() {
        return Err(not("its line has more than three words"));
    }
    let mut found = Locked::zeros();
    let key = key.unwrap_or_default();
    let given = check.unwrap_or_default();
    if !key.bytes().chain(given.bytes()).all(|b| b.is_ascii_hexdigit()) || key.len() > 2 * KEY_BYTES || given.len() > 2 * CHECK_BYTES {
        return Err(not("its line is not a word with 64 and 8 hexadecimal digits"));
    }
    if key.len() < 2 * KEY_BYTES || given.len() < 2 * CHECK_BYTES {
        return Err(truncated());
    }
    let mut digits = [0; CHECK_BYTES];
    let fits = stack::wiped(|| {
        HEXLOWER_PERMISSIVE.decode_mut(key.as_bytes(), found.bytes_mut()).is_ok()
            && HEXLOWER_PERMISSIVE.decode_mut(given.as_bytes(), &mut digits).is_ok()
            && self::check(kind, found.bytes()) == digits
    });
    if !fits {
        return Err(KeyFileError::CheckMismatch(path.to_owned()));
    }
    Ok(found)
}

/// Reads a key that came as a text from elsewhere: a credential of the service manager; `path` is for messages.
pub fn from_text(path: &Path, text: &str) -> Result<Key> {
    Ok(Key(parse(path, text.as_bytes(), Kind::Profile)?))
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
    fn a_file_from_a_stick_is_taken_with_a_complaint() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = write(&directory, format!("{KNOWN} {KNOWN_CHECK}\n"));
        let load = || load_all_however_kept(&path, &open(&path).expect("opened"));
        let ((keys, _), complaint) = load().unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((keys.len(), complaint.is_none()), (1, true));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("changed");
        let ((keys, private_keys), complaint) = load().unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((keys.len(), private_keys.len()), (1, 0));
        assert!(matches!(complaint, Some(KeyFileError::OpenToOthers { mode: 0o644, .. })));
        std::fs::write(&path, "not a key").expect("written");
        assert!(matches!(load().err(), Some(KeyFileError::NotAKeyFile { .. })));
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
