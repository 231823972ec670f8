//! Reading keys: an X25519 pair whose public half seals the keys of write-only packs (HPKE, RFC 9180) and whose private half stays away
//! from the machine that is backed up.

use std::sync::Arc;

use hpke::aead::AesGcm256;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable, single_shot_open, single_shot_seal};
use zeroize::{Zeroize, Zeroizing};

use super::CryptoError;
use super::key_file::{Fingerprint, digest};
use super::locked::Locked;
use super::stack;

type Suite = X25519HkdfSha256;

const INFO: &[u8] = b"keepd/1 pack key";
const ARCHIVE_INFO: &[u8] = b"keepd/1 archive key";
const FINGERPRINT_BYTES: usize = 8;
const ENCAPSULATED_BYTES: usize = 32;
/// A sealed pack key: the fingerprint of the pair, HPKE's encapsulated key, its ciphertext.
pub const SEALED_BYTES: usize = FINGERPRINT_BYTES + ENCAPSULATED_BYTES + 48;

/// Whom packs are sealed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicKey([u8; 32]);

/// Opens what was sealed to its public key; kept in locked memory, zeroed on drop, never printed.
pub struct PrivateKey {
    secret: Locked,
    public: PublicKey,
}

impl PublicKey {
    /// Any 32 bytes are a key; those of low order, to which anybody could read, are refused.
    pub fn new(bytes: [u8; 32]) -> Result<Self, CryptoError> {
        let key = Self(bytes);
        key.seal(&[0; 32], b"").map_err(|_| CryptoError::PublicKey)?;
        Ok(key)
    }

    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint(digest("keepd/1 public key fingerprint", &self.0))
    }

    /// Seals a pack key; `header` is authenticated with it.
    pub fn seal(&self, pack_key: &[u8; 32], header: &[u8]) -> Result<[u8; SEALED_BYTES], CryptoError> {
        self.seal_for(INFO, pack_key, header)
    }

    /// Seals the master key of a portable archive; `header` is authenticated with it.
    pub fn seal_archive(&self, master: &[u8; 32], header: &[u8]) -> Result<[u8; SEALED_BYTES], CryptoError> {
        self.seal_for(ARCHIVE_INFO, master, header)
    }

    fn seal_for(&self, info: &[u8], key: &[u8; 32], header: &[u8]) -> Result<[u8; SEALED_BYTES], CryptoError> {
        // The suite asks the system's random source itself, and would end the process where that fails: so it is asked before.
        super::random::<1>()?;
        let public = <Suite as Kem>::PublicKey::from_bytes(&self.0).map_err(|_| CryptoError::PublicKey)?;
        let (encapsulated, sealed) = single_shot_seal::<AesGcm256, HkdfSha256, Suite>(&OpModeS::Base, &public, info, key, header)
            .map_err(|_| CryptoError::PublicKey)?;
        let bytes = [&self.fingerprint().0[..], &encapsulated.to_bytes(), &sealed].concat();
        bytes.try_into().map_err(|_| CryptoError::Short)
    }
}

impl PrivateKey {
    pub fn generate() -> Result<Self, CryptoError> {
        Self::new(Locked::random()?)
    }

    pub fn new(secret: Locked) -> Result<Self, CryptoError> {
        let public = stack::wiped(|| {
            let key = <Suite as Kem>::PrivateKey::from_bytes(secret.bytes()).map_err(|_| CryptoError::Open)?;
            Ok::<[u8; 32], CryptoError>(Suite::sk_to_pk(&key).to_bytes().into())
        })?;
        Ok(Self { secret, public: PublicKey(public) })
    }

    pub fn public(&self) -> PublicKey {
        self.public
    }

    pub fn bytes(&self) -> &[u8; 32] {
        self.secret.bytes()
    }

    /// Opens a sealed pack key with the one of these keys that it was sealed to.
    pub fn open_with(keys: &[Arc<Self>], sealed: &[u8], header: &[u8]) -> Result<Zeroizing<[u8; 32]>, CryptoError> {
        Self::open_for(INFO, keys, sealed, header)
    }

    /// Opens the sealed master key of a portable archive.
    pub fn open_archive_with(keys: &[Arc<Self>], sealed: &[u8], header: &[u8]) -> Result<Zeroizing<[u8; 32]>, CryptoError> {
        Self::open_for(ARCHIVE_INFO, keys, sealed, header)
    }

    fn open_for(info: &[u8], keys: &[Arc<Self>], sealed: &[u8], header: &[u8]) -> Result<Zeroizing<[u8; 32]>, CryptoError> {
        let (wanted, rest) = sealed.split_first_chunk::<FINGERPRINT_BYTES>().ok_or(CryptoError::Short)?;
        let (encapsulated, sealed) = rest.split_first_chunk::<ENCAPSULATED_BYTES>().ok_or(CryptoError::Short)?;
        let wanted = Fingerprint(*wanted);
        let key = keys.iter().find(|k| k.public.fingerprint() == wanted).ok_or(CryptoError::NeedsPrivateKey(wanted))?;
        stack::wiped(|| key.open(info, encapsulated, sealed, header))
    }

    /// Leaves copies of the key on the stack.
    fn open(
        &self,
        info: &[u8],
        encapsulated: &[u8; ENCAPSULATED_BYTES],
        sealed: &[u8],
        header: &[u8],
    ) -> Result<Zeroizing<[u8; 32]>, CryptoError> {
        let key = <Suite as Kem>::PrivateKey::from_bytes(self.secret.bytes()).map_err(|_| CryptoError::Open)?;
        let encapsulated = <Suite as Kem>::EncappedKey::from_bytes(encapsulated).map_err(|_| CryptoError::Open)?;
        let opened = single_shot_open::<AesGcm256, HkdfSha256, Suite>(&OpModeR::Base, &key, &encapsulated, info, sealed, header);
        let mut opened = opened.map_err(|_| CryptoError::Open)?;
        let pack_key = <[u8; 32]>::try_from(opened.as_slice()).map(Zeroizing::new).map_err(|_| CryptoError::Open);
        opened.zeroize();
        pack_key
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_anybody_could_read_with_are_refused() {
        assert!(matches!(PublicKey::new([0; 32]), Err(CryptoError::PublicKey)));
        let mut one = [0; 32];
        one[0] = 1;
        assert!(matches!(PublicKey::new(one), Err(CryptoError::PublicKey)));
        assert!(PublicKey::new(*PrivateKey::generate().unwrap().public().bytes()).is_ok());
    }
}
