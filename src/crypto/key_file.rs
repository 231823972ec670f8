//! Key files: 32 random bytes as one line of text, readable by their owner only.
//!
//! ```text
//! # comment lines
//! keepd-key-1 <64 hexadecimal digits> <8 hexadecimal digits: a check against truncation and typing errors>
//! ```

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::{random, slot};

const WORD: &str = "keepd-key-";
const MAX_BYTES: u64 = 4096;

/// A key; zeroed on drop, without a way to print it.
pub struct Key(Zeroizing<[u8; 32]>);

impl Key {
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Tells keys apart; see [`slot::fingerprint`].
    pub fn fingerprint(&self) -> String {
        slot::fingerprint(&self.0)
    }
}

/// Why there is no key. The texts never hold anything of the file's contents.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KeyFileError {
    #[error("the key file {0} does not exist; make one with 'keepd key generate {0}', or bring the one the backups were made with")]
    Missing(String),
    #[error("the key file {path} can be read by others (mode {mode:04o}); run: chmod 600 {path}")]
    Exposed { path: String, mode: u32 },
    #[error("the key file {path} belongs to user {owner}, neither to root nor to the user keepd runs as; run: chown {us} {path}")]
    ForeignOwner { path: String, owner: u32, us: u32 },
    #[error("{0} is not a keepd key file")]
    NotAKey(String),
    #[error("the key file {0} is cut off or mistyped: its check does not fit; use an intact copy")]
    Damaged(String),
    #[error("the key file {path} is of version {version}, this keepd knows version 1")]
    Newer { path: String, version: String },
    #[error("cannot {verb} the key file {path}: {reason}")]
    Io { verb: &'static str, path: String, reason: String },
}

/// Makes a key file (mode 0600); an existing file is never overwritten. Returns the fingerprint.
pub fn generate(path: &Path) -> Result<String, KeyFileError> {
    let io = |reason: String| KeyFileError::Io { verb: "make", path: path.display().to_string(), reason };
    let key = Key(Zeroizing::new(random().map_err(|e| io(e.to_string()))?));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => io("it exists already and is not overwritten, for backups may depend on it".into()),
        _ => io(e.to_string()),
    })?;
    let text = Zeroizing::new(format!(
        "# keepd key. Without it the backups made with it cannot be read; whoever has it can read them.\n# Keep a copy where a fire here does not reach. Fingerprint: {}\n{WORD}1 {} {}\n",
        key.fingerprint(),
        HEXLOWER.encode(key.bytes()),
        check(key.bytes())
    ));
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    written.map_err(|e| io(e.to_string()))?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent).and_then(|d| d.sync_all()).map_err(|e| io(e.to_string()))?;
    Ok(key.fingerprint())
}

/// Reads a key file; one that others can read is refused.
pub fn load(path: &Path) -> Result<Key, KeyFileError> {
    let name = path.display().to_string();
    let io = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::NotFound => KeyFileError::Missing(name.clone()),
        _ => KeyFileError::Io { verb: "read", path: name.clone(), reason: e.to_string() },
    };
    // O_NONBLOCK: a pipe at this place must not hang the daemon.
    let file = OpenOptions::new().read(true).custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32).open(path).map_err(io)?;
    let meta = file.metadata().map_err(io)?;
    if !meta.is_file() || meta.len() > MAX_BYTES {
        return Err(KeyFileError::NotAKey(name));
    }
    if meta.mode() & 0o077 != 0 {
        return Err(KeyFileError::Exposed { path: name, mode: meta.mode() & 0o7777 });
    }
    let us = rustix::process::geteuid().as_raw();
    if meta.uid() != 0 && meta.uid() != us {
        return Err(KeyFileError::ForeignOwner { path: name, owner: meta.uid(), us });
    }
    let mut text = Zeroizing::new(Vec::with_capacity(MAX_BYTES as usize));
    file.take(MAX_BYTES).read_to_end(&mut text).map_err(io)?;
    parse(&name, &text)
}

fn parse(name: &str, text: &[u8]) -> Result<Key, KeyFileError> {
    let not_a_key = || KeyFileError::NotAKey(name.to_owned());
    let damaged = || KeyFileError::Damaged(name.to_owned());
    let text = std::str::from_utf8(text).map_err(|_| not_a_key())?;
    let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    let line = lines.next().ok_or_else(|| if text.starts_with("# keepd key") { damaged() } else { not_a_key() })?;
    let rest = line.strip_prefix(WORD).ok_or_else(|| if WORD.starts_with(line) { damaged() } else { not_a_key() })?;
    let mut words = rest.split_ascii_whitespace();
    match words.next() {
        Some("1") => {}
        Some(version) if version.bytes().all(|b| b.is_ascii_digit()) => {
            return Err(KeyFileError::Newer { path: name.to_owned(), version: version.to_owned() });
        }
        _ => return Err(damaged()),
    }
    let (Some(key), Some(sum), None, None) = (words.next(), words.next(), words.next(), lines.next()) else { return Err(damaged()) };
    let key = Zeroizing::new(HEXLOWER.decode(key.to_ascii_lowercase().as_bytes()).map_err(|_| damaged())?);
    let key: [u8; 32] = key.as_slice().try_into().map_err(|_| damaged())?;
    match check(&key) == sum.to_ascii_lowercase() {
        true => Ok(Key(Zeroizing::new(key))),
        false => Err(damaged()),
    }
}

/// First 4 bytes of SHA-256 over a label and the key.
fn check(key: &[u8; 32]) -> String {
    let mut hash = Sha256::new();
    hash.update(b"keepd key check");
    hash.update(key);
    HEXLOWER.encode(hash.finalize().get(..4).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_comes_back_and_every_truncation_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("main.key");
        let fingerprint = generate(&path).unwrap();
        assert_eq!(load(&path).unwrap().fingerprint(), fingerprint);
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(matches!(generate(&path), Err(KeyFileError::Io { .. })), "never overwritten");
        let text = std::fs::read(&path).unwrap();
        for cut in 0..text.len() - 1 {
            assert!(parse("k", &text[..cut]).is_err(), "cut at {cut}");
        }
        let digit = text.iter().rposition(|b| *b == b' ').unwrap() - 3;
        let mut typo = text.clone();
        typo[digit] = if typo[digit] == b'0' { b'1' } else { b'0' };
        assert_eq!(parse("k", &typo).err(), Some(KeyFileError::Damaged("k".into())));
    }

    #[test]
    fn what_others_can_read_is_no_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("main.key");
        assert!(matches!(load(&path), Err(KeyFileError::Missing(_))));
        generate(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(load(&path), Err(KeyFileError::Exposed { mode: 0o640, .. })));
        std::fs::write(dir.path().join("x"), "hello").unwrap();
        std::fs::set_permissions(dir.path().join("x"), std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(load(&dir.path().join("x")), Err(KeyFileError::NotAKey(_))));
        assert!(matches!(load(dir.path()), Err(KeyFileError::NotAKey(_) | KeyFileError::Io { .. })));
    }
}
