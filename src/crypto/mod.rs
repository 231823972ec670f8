//! Keys and sealed objects: AES-256-GCM under subkeys that HKDF-SHA256 derives from a repository's master key.
//!
//! In: plaintext payloads and key material. Out: sealed bytes that carry their own header, and back. `docs/format.md` says
//! why a nonce can never repeat.

pub mod hpke;
pub mod key_file;
mod lent;
pub mod locked;
pub mod master;
pub mod object;
pub mod passphrase;
pub mod profile;
pub mod slot;
mod stack;
pub mod token;
mod written;

pub use hpke::{PrivateKey, PublicKey};
pub use key_file::{Fingerprint, Key};
pub use lent::Lent;
pub use master::{Keyring, MasterKey};
pub use object::{HEADER_BYTES, ObjectCipher, ObjectHeader, ObjectKind, TAG_BYTES};
pub use profile::{Profile, ProfileKey};

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
    #[error("it opens with the other kind of key: it is of the method {method} (fingerprint {fingerprint}), given was {given}")]
    OtherMethod { given: String, method: String, fingerprint: String },
    /// Of a passphrase, which has no fingerprint of its own.
    #[error("the passphrase does not open it")]
    WrongPassphrase,
    /// Why a token could not be asked, or did not answer.
    #[error("the token: {0}")]
    Token(String),
    #[error(
        "it was sealed with master key {found}, this repository is at {known}: it is from before a re-encryption, or from a newer state"
    )]
    Epoch { found: u16, known: u16 },
    #[error("it is no public key that anything can be sealed to")]
    PublicKey,
    #[error("its contents open with the private key {0} alone; give it with --key FILE")]
    NeedsPrivateKey(Fingerprint),
}

/// Fills an array from the operating system's random source.
pub fn random<const N: usize>() -> Result<[u8; N], CryptoError> {
    let mut bytes = [0u8; N];
    getrandom::fill(&mut bytes).map_err(|e| CryptoError::Random(e.to_string()))?;
    Ok(bytes)
}
