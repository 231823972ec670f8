//! Sealed objects: a plain header that names kind, repository and salt, then AES-256-GCM sections under one subkey.
//!
//! The subkey is HKDF-SHA256 of a master key with the object's own random 32-byte salt; the nonce of a section is its
//! ordinal; the associated data are the whole header and the ordinal. So a nonce never repeats under a key, and no
//! section can be moved to another place, object, kind or repository.

use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Key, Nonce, Tag};
use zeroize::Zeroizing;

use super::{CryptoError, random};

/// Length of the plain header.
pub const HEADER_BYTES: usize = 64;
/// What sealing adds to a section.
pub const TAG_BYTES: usize = 16;
/// The ordinal of a pack's footer.
pub const FOOTER_ORDINAL: u64 = u64::MAX;

const MAGIC: &[u8; 8] = b"KEEPD\x00\x00\x01";

/// What an object holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectKind {
    DataPack,
    MetaPack,
    Index,
    Manifest,
    Mark,
    Condemned,
}

impl ObjectKind {
    fn code(self) -> u8 {
        match self {
            ObjectKind::DataPack => 1,
            ObjectKind::MetaPack => 2,
            ObjectKind::Index => 3,
            ObjectKind::Manifest => 4,
            ObjectKind::Mark => 5,
            ObjectKind::Condemned => 6,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        use ObjectKind::{Condemned, DataPack, Index, Manifest, Mark, MetaPack};
        [DataPack, MetaPack, Index, Manifest, Mark, Condemned].into_iter().find(|k| k.code() == code)
    }

    /// What the object's key is derived for.
    pub(super) fn info(self) -> &'static [u8] {
        match self {
            ObjectKind::DataPack => b"keepd/1 data pack",
            ObjectKind::MetaPack => b"keepd/1 metadata pack",
            ObjectKind::Index => b"keepd/1 index",
            ObjectKind::Manifest => b"keepd/1 manifest",
            ObjectKind::Mark => b"keepd/1 mark",
            ObjectKind::Condemned => b"keepd/1 condemned",
        }
    }

    pub fn word(self) -> &'static str {
        match self {
            ObjectKind::DataPack => "data pack",
            ObjectKind::MetaPack => "metadata pack",
            ObjectKind::Index => "index",
            ObjectKind::Manifest => "manifest",
            ObjectKind::Mark => "mark",
            ObjectKind::Condemned => "list of condemned packs",
        }
    }
}

/// The plain header of a sealed object, checked for form but not yet authenticated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectHeader {
    pub kind: ObjectKind,
    bytes: [u8; HEADER_BYTES],
}

impl ObjectHeader {
    /// A header with a fresh salt; only data packs are written only.
    pub(super) fn fresh(kind: ObjectKind, repository: &[u8; 16], epoch: u16, is_write_only: bool) -> Result<Self, CryptoError> {
        let salt: [u8; 32] = random()?;
        let mut bytes = [0u8; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8] = kind.code();
        bytes[9] = u8::from(is_write_only);
        bytes[10..12].copy_from_slice(&epoch.to_le_bytes());
        // Bytes 12..16 are reserved and zero.
        bytes[16..32].copy_from_slice(repository);
        bytes[32..].copy_from_slice(&salt);
        Ok(Self { kind, bytes })
    }

    /// Reads the header at the start of an object.
    pub fn parse(object: &[u8], repository: &[u8; 16]) -> Result<Self, CryptoError> {
        let bytes: [u8; HEADER_BYTES] = object.get(..HEADER_BYTES).and_then(|b| b.try_into().ok()).ok_or(CryptoError::Short)?;
        if bytes[..7] != MAGIC[..7] {
            return Err(CryptoError::Magic);
        }
        if bytes[7] != MAGIC[7] || bytes[9] > 1 || bytes[12..16] != [0; 4] {
            return Err(CryptoError::Version(format!("{} (key wrap {})", bytes[7], bytes[9])));
        }
        let kind = ObjectKind::from_code(bytes[8]).ok_or_else(|| CryptoError::Version(format!("1 with object kind {}", bytes[8])))?;
        if bytes[9] == 1 && kind != ObjectKind::DataPack {
            return Err(CryptoError::Version(format!("1 with a {} sealed to a public key", kind.word())));
        }
        if bytes[16..32] != repository[..] {
            return Err(CryptoError::OtherRepository);
        }
        Ok(Self { kind, bytes })
    }

    /// As [`ObjectHeader::parse`], and the kind must be the wanted one.
    pub fn expect(object: &[u8], repository: &[u8; 16], wanted: ObjectKind) -> Result<Self, CryptoError> {
        let header = Self::parse(object, repository)?;
        if header.kind != wanted {
            return Err(CryptoError::Kind { found: header.kind.word().into(), wanted: wanted.word() });
        }
        Ok(header)
    }

    pub fn bytes(&self) -> &[u8; HEADER_BYTES] {
        &self.bytes
    }

    /// Whether its chunks are sealed with a key of their own that stands, sealed to a public key, behind them.
    pub fn is_write_only(&self) -> bool {
        self.bytes[9] == 1
    }

    /// Which master key its own key comes from.
    pub fn epoch(&self) -> u16 {
        u16::from_le_bytes([self.bytes[10], self.bytes[11]])
    }

    pub(super) fn salt(&self) -> &[u8; 32] {
        self.bytes.last_chunk().unwrap_or(&[0; 32])
    }
}

/// Seals and opens the sections of one object.
pub struct ObjectCipher {
    cipher: Aes256Gcm,
    header: [u8; HEADER_BYTES],
}

impl ObjectCipher {
    pub(super) fn new(key: Zeroizing<[u8; 32]>, header: &ObjectHeader) -> Self {
        Self { cipher: Aes256Gcm::new(&Key::<Aes256Gcm>::from(*key)), header: header.bytes }
    }

    /// Whether anybody who has the public key could have made what it opens.
    pub fn is_write_only(&self) -> bool {
        self.header[9] == 1
    }

    /// Appends the sealed form of `payload` to `out`: ciphertext, then the tag.
    pub fn seal(&self, ordinal: u64, payload: &[u8], out: &mut Vec<u8>) -> Result<(), CryptoError> {
        let start = out.len();
        out.resize(start + payload.len() + TAG_BYTES, 0);
        self.seal_into(ordinal, payload, out.get_mut(start..).ok_or(CryptoError::Short)?)
    }

    /// Seals `payload` into `out`, which must be longer by [`TAG_BYTES`].
    pub fn seal_into(&self, ordinal: u64, payload: &[u8], out: &mut [u8]) -> Result<(), CryptoError> {
        let (nonce, aad) = self.bind(ordinal);
        let (body, tag_place) = out.split_at_mut_checked(payload.len()).ok_or(CryptoError::Short)?;
        let section = InOutBuf::new(payload, body).map_err(|_| CryptoError::Short)?;
        let tag = self.cipher.encrypt_inout_detached(&nonce, &aad, section).map_err(|_| CryptoError::Open)?;
        match tag_place.len() == tag.len() {
            true => tag_place.copy_from_slice(&tag),
            false => return Err(CryptoError::Short),
        }
        Ok(())
    }

    /// Opens a sealed section.
    pub fn open(&self, ordinal: u64, sealed: &[u8]) -> Result<Vec<u8>, CryptoError> {
        let mut plain = Vec::new();
        self.open_into(ordinal, sealed, &mut plain)?;
        Ok(plain)
    }

    /// Opens a sealed section; `plain` is replaced by what was in it, and of no use after an error.
    pub fn open_into(&self, ordinal: u64, sealed: &[u8], plain: &mut Vec<u8>) -> Result<(), CryptoError> {
        let cut = sealed.len().checked_sub(TAG_BYTES).ok_or(CryptoError::Short)?;
        let (body, tag) = sealed.split_at(cut);
        let tag = Tag::try_from(tag).map_err(|_| CryptoError::Short)?;
        let (nonce, aad) = self.bind(ordinal);
        plain.resize(body.len(), 0);
        let section = InOutBuf::new(body, plain.as_mut_slice()).map_err(|_| CryptoError::Short)?;
        self.cipher.decrypt_inout_detached(&nonce, &aad, section, &tag).map_err(|_| CryptoError::Open)
    }

    /// The nonce is the ordinal (4 zero bytes, then little-endian); the associated data are header and ordinal.
    fn bind(&self, ordinal: u64) -> (Nonce<aes_gcm::aead::consts::U12>, [u8; HEADER_BYTES + 8]) {
        let mut nonce = [0u8; 12];
        nonce[4..].copy_from_slice(&ordinal.to_le_bytes());
        let mut aad = [0u8; HEADER_BYTES + 8];
        aad[..HEADER_BYTES].copy_from_slice(&self.header);
        aad[HEADER_BYTES..].copy_from_slice(&ordinal.to_le_bytes());
        (nonce.into(), aad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::{Keyring, MasterKey};

    fn sealed() -> (Keyring, ObjectHeader, Vec<u8>) {
        let keys = Keyring::of(MasterKey::from_bytes([7; 32]));
        let header = keys.header(ObjectKind::Index, &[1; 16]).unwrap();
        let mut out = Vec::new();
        keys.cipher(&header).unwrap().seal(5, b"payload", &mut out).unwrap();
        (keys, header, out)
    }

    #[test]
    fn opens_only_as_sealed() {
        let (keys, header, section) = sealed();
        let cipher = keys.cipher(&header).unwrap();
        assert_eq!(cipher.open(5, &section).unwrap(), b"payload");
        assert_eq!(cipher.open(6, &section), Err(CryptoError::Open), "another ordinal");
        for at in 0..section.len() {
            let mut bad = section.clone();
            bad[at] ^= 1;
            assert_eq!(cipher.open(5, &bad), Err(CryptoError::Open), "byte {at}");
        }
        for cut in 0..section.len() {
            assert!(cipher.open(5, &section[..cut]).is_err());
        }
        for at in 8..HEADER_BYTES {
            let mut bytes = *header.bytes();
            bytes[at] ^= 1;
            let opened = ObjectHeader::parse(&bytes, &[1; 16]).and_then(|h| keys.cipher(&h)).and_then(|c| c.open(5, &section));
            assert!(opened.is_err(), "header byte {at} changed and it still opens");
        }
        let other = Keyring::of(MasterKey::from_bytes([8; 32]));
        assert!(other.cipher(&header).unwrap().open(5, &section).is_err(), "another key");
    }
}
