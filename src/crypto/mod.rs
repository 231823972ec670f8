//! Keys and sealed objects: AES-256-GCM under subkeys that HKDF-SHA256 derives from a repository's master key.
//!
//! In: plaintext payloads and key material. Out: sealed bytes that carry their own header, and back. `docs/format.md` says
//! why a nonce can never repeat.

pub mod key_file;
pub mod master;
pub mod object;
pub mod slot;

pub use master::MasterKey;
pub use object::{HEADER_BYTES, ObjectCipher, ObjectHeader, ObjectKind, TAG_BYTES};

/// Why something sealed did not open or could not be sealed.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum CryptoError {
    #[error("the operating system gave no random bytes: {0}")]
    Random(String),
    #[error("it is no keepd object (its first bytes are others)")]
    Magic,
    #[error("it is of format {0}, which this version of keepd does not know")]
    Version(String),
    #[error("it is a {found} where a {wanted} is expected")]
    Kind { found: String, wanted: &'static str },
    #[error("it belongs to another repository")]
    OtherRepository,
    #[error("it is cut off or too short")]
    Short,
    #[error("it does not open: the bytes are damaged, or were sealed with another key")]
    Open,
    #[error("a key slot is not readable: {0}")]
    Slot(String),
    #[error(
        "the key does not open this repository: it was made with another key (this key's fingerprint is {given}, the repository has {known})"
    )]
    WrongKey { given: String, known: String },
}

/// Fills an array from the operating system's random source.
pub fn random<const N: usize>() -> Result<[u8; N], CryptoError> {
    let mut bytes = [0u8; N];
    getrandom::fill(&mut bytes).map_err(|e| CryptoError::Random(e.to_string()))?;
    Ok(bytes)
}
