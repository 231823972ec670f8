//! The master key of a repository and what is derived from it.

use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::{Zeroize, Zeroizing};

use super::{CryptoError, random};

/// 32 random bytes from which all other keys of a repository are derived; zeroed on drop, never printed.
pub struct MasterKey(Zeroizing<[u8; 32]>);

impl MasterKey {
    pub fn generate() -> Result<Self, CryptoError> {
        Ok(Self(Zeroizing::new(random()?)))
    }

    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    pub(super) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// HKDF-SHA256 (RFC 5869) with the master key as input keying material.
    pub(super) fn derive(&self, salt: &[u8], info: &[u8]) -> Zeroizing<[u8; 32]> {
        derive(self.0.as_slice(), salt, info)
    }

    /// The key of the keyed BLAKE3 that names chunks.
    pub fn chunk_id_key(&self) -> Zeroizing<[u8; 32]> {
        self.derive(&[], b"keepd/1 chunk id")
    }

    /// The secret gear table of the content-defined chunker, so that chunk boundaries tell nothing about known files.
    pub fn gear(&self) -> Box<[u64; 256]> {
        let mut bytes = Zeroizing::new([0u8; 2048]);
        // 2048 is within HKDF's limit of 255 * 32 bytes, so expand cannot fail.
        let _ = Hkdf::<Sha256>::new(None, self.0.as_slice()).expand(b"keepd/1 gear", bytes.as_mut_slice());
        let mut gear = Box::new([0u64; 256]);
        for (slot, word) in gear.iter_mut().zip(bytes.chunks_exact(8)) {
            *slot = u64::from_le_bytes(word.try_into().unwrap_or_default());
        }
        gear
    }
}

/// HKDF-SHA256: extract with the salt, expand with the info to 32 bytes.
pub(super) fn derive(secret: &[u8], salt: &[u8], info: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut out = Zeroizing::new([0u8; 32]);
    // 32 bytes are within HKDF's limit of 255 * 32, so expand cannot fail.
    if Hkdf::<Sha256>::new(Some(salt), secret).expand(info, out.as_mut_slice()).is_err() {
        out.zeroize();
    }
    out
}
