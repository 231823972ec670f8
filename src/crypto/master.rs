//! The keys of a repository: its master keys, what is derived from them, and whom write-only packs are sealed to.

use std::sync::{Arc, Mutex, PoisonError};

use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::{Zeroize, Zeroizing};

use super::hpke::{PrivateKey, PublicKey, SEALED_BYTES};
use super::locked::Locked;
use super::object::{ObjectCipher, ObjectHeader, ObjectKind};
use super::{CryptoError, random, written};

/// 32 random bytes from which other keys of a repository are derived; zeroed on drop, never printed.
#[derive(Clone)]
pub struct MasterKey(Locked);

impl MasterKey {
    pub fn generate() -> Result<Self, CryptoError> {
        Ok(Self(Locked::random()?))
    }

    pub fn from_bytes(mut bytes: [u8; 32]) -> Self {
        Self(Locked::take(&mut bytes))
    }

    fn bytes(&self) -> &[u8; 32] {
        self.0.bytes()
    }
}

/// What an open repository seals and opens with.
pub struct Keyring {
    /// The first master key: it names chunks, also when nothing is sealed with it any more.
    first: MasterKey,
    /// Those in force, each with its epoch, rising. At least one; the last seals.
    masters: Vec<(u16, MasterKey)>,
    /// Whom data packs are sealed to, if anybody.
    recipient: Option<PublicKey>,
    /// Private keys, for the time of a call.
    lent: Mutex<Vec<Arc<PrivateKey>>>,
}

impl Keyring {
    /// Of a new repository.
    pub fn generate() -> Result<Self, CryptoError> {
        Ok(Self::of(MasterKey::generate()?))
    }

    /// Of a repository that was never re-encrypted.
    pub fn of(master: MasterKey) -> Self {
        Self { first: master.clone(), masters: vec![(0, master)], recipient: None, lent: Mutex::default() }
    }

    /// Reads what a slot had wrapped.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CryptoError> {
        let wrong = || CryptoError::Slot("what it wraps is not the keys of a repository".into());
        let key = |bytes: &[u8]| -> Result<MasterKey, CryptoError> {
            let mut locked = Locked::zeros();
            locked.bytes_mut().copy_from_slice(bytes.get(..32).filter(|_| bytes.len() == 32).ok_or_else(wrong)?);
            Ok(MasterKey(locked))
        };
        let (first, rest) = bytes.split_at_checked(32).ok_or_else(wrong)?;
        let first = key(first)?;
        if rest.is_empty() {
            return Ok(Self::of(first));
        }
        let mut masters: Vec<(u16, MasterKey)> = Vec::new();
        for part in rest.chunks(34) {
            let (epoch, master) = part.split_first_chunk::<2>().ok_or_else(wrong)?;
            let epoch = u16::from_le_bytes(*epoch);
            if masters.last().is_some_and(|(last, _)| *last >= epoch) || masters.len() > 1 {
                return Err(wrong());
            }
            masters.push((epoch, key(master)?));
        }
        Ok(Self { first, masters, recipient: None, lent: Mutex::default() })
    }

    /// What a slot wraps.
    pub(super) fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(32 + 34 * self.masters.len()));
        bytes.extend_from_slice(self.first.bytes());
        if self.epoch() > 0 {
            for (epoch, master) in &self.masters {
                bytes.extend_from_slice(&epoch.to_le_bytes());
                bytes.extend_from_slice(master.bytes());
            }
        }
        bytes
    }

    /// Whether both know the same master keys.
    pub fn is_same(&self, other: &Self) -> bool {
        *self.to_bytes() == *other.to_bytes()
    }

    /// With whom data packs are sealed to from now on.
    pub fn sealing_to(mut self, recipient: Option<PublicKey>) -> Self {
        self.recipient = recipient;
        self
    }

    /// Takes a private key for as long as this keyring lives: it opens the write-only packs that were sealed to it.
    pub fn lend(&self, key: Arc<PrivateKey>) {
        self.lent.lock().unwrap_or_else(PoisonError::into_inner).push(key);
    }

    /// The epoch that new objects are sealed in; 0 until a repository is re-encrypted.
    pub fn epoch(&self) -> u16 {
        self.masters.last().map_or(0, |(epoch, _)| *epoch)
    }

    /// Of two keyrings of a repository the newer one is greater.
    pub fn age(&self) -> (u16, usize) {
        (self.epoch(), self.masters.len())
    }

    /// Whether a re-encryption is under way: two master keys are in force.
    pub fn is_changing(&self) -> bool {
        self.masters.len() > 1
    }

    /// With a new master key, which all new objects are sealed with; what there is opens as before.
    pub fn with_new_master(&self) -> Result<Self, CryptoError> {
        let epoch = self
            .epoch()
            .checked_add(1)
            .ok_or_else(|| CryptoError::Slot("it has had 65,535 master keys, and there can be no more".into()))?;
        let mut masters = self.masters.clone();
        masters.push((epoch, MasterKey::generate()?));
        Ok(Self { first: self.first.clone(), masters, recipient: self.recipient, lent: Mutex::default() })
    }

    /// With the newest master key alone: what was sealed with another does not open any more.
    pub fn newest_alone(&self) -> Self {
        let masters = self.masters.last().cloned().into_iter().collect();
        Self { first: self.first.clone(), masters, recipient: self.recipient, lent: Mutex::default() }
    }

    /// The key of the keyed BLAKE3 that names chunks.
    pub fn chunk_id_key(&self) -> Zeroizing<[u8; 32]> {
        derive(self.first.bytes(), &[], b"keepd/1 chunk id")
    }

    /// The secret gear table of the content-defined chunker, so that chunk boundaries tell nothing about known files.
    pub fn gear(&self) -> Box<[u64; 256]> {
        let mut bytes = Zeroizing::new([0u8; 2048]);
        // 2048 is within HKDF's limit of 255 * 32 bytes, so expand cannot fail.
        let _ = Hkdf::<Sha256>::new(None, self.first.bytes()).expand(b"keepd/1 gear", bytes.as_mut_slice());
        let mut gear = Box::new([0u64; 256]);
        for (slot, word) in gear.iter_mut().zip(bytes.chunks_exact(8)) {
            *slot = u64::from_le_bytes(word.try_into().unwrap_or_default());
        }
        gear
    }

    /// A header for a new object, with a salt of its own.
    pub fn header(&self, kind: ObjectKind, repository: &[u8; 16]) -> Result<ObjectHeader, CryptoError> {
        let is_write_only = kind == ObjectKind::DataPack && self.recipient.is_some();
        ObjectHeader::fresh(kind, repository, self.epoch(), is_write_only)
    }

    /// The cipher of an object; of a write-only pack that of its footer.
    pub fn cipher(&self, header: &ObjectHeader) -> Result<ObjectCipher, CryptoError> {
        let epoch = header.epoch();
        let master = self.masters.iter().find(|(e, _)| *e == epoch).ok_or(CryptoError::Epoch { found: epoch, known: self.epoch() })?;
        Ok(ObjectCipher::new(derive(master.1.bytes(), header.salt(), header.kind.info()), header))
    }

    /// The cipher of the chunks of a new pack, and for a write-only one its key, sealed.
    pub fn new_pack(&self, header: &ObjectHeader) -> Result<(ObjectCipher, Option<[u8; SEALED_BYTES]>), CryptoError> {
        let Some(recipient) = self.recipient.as_ref().filter(|_| header.is_write_only()) else { return Ok((self.cipher(header)?, None)) };
        let key = Zeroizing::new(random::<32>()?);
        let sealed = recipient.seal(&key, header.bytes())?;
        written::remember(header.salt(), &key);
        Ok((ObjectCipher::new(key, header), Some(sealed)))
    }

    /// The cipher of the chunks of a pack; `sealed` is what [`Keyring::new_pack`] gave, and needed for a write-only pack alone.
    pub fn pack_cipher(&self, header: &ObjectHeader, sealed: &[u8]) -> Result<ObjectCipher, CryptoError> {
        if !header.is_write_only() {
            return self.cipher(header);
        }
        if let Some(key) = written::recall(header.salt()) {
            return Ok(ObjectCipher::new(key, header));
        }
        Ok(ObjectCipher::new(self.open_sealed_key(header, sealed)?, header))
    }

    /// Whether write-only packs can be read: this process wrote it, or a private key was lent.
    pub fn can_read(&self, header: &ObjectHeader) -> bool {
        written::recall(header.salt()).is_some() || !self.lent.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// The key of a portable archive, whose slots wrap this keyring; `salt` is the archive's own.
    pub fn archive_key(&self, salt: &[u8; 32]) -> Zeroizing<[u8; 32]> {
        archive_key(self.first.bytes(), salt)
    }

    /// The key of a write-only pack, by a private key that was lent.
    pub fn open_sealed_key(&self, header: &ObjectHeader, sealed: &[u8]) -> Result<Zeroizing<[u8; 32]>, CryptoError> {
        let lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner).clone();
        PrivateKey::open_with(&lent, sealed, header.bytes())
    }
}

/// The key of a portable archive.
pub fn archive_key(master: &[u8; 32], salt: &[u8; 32]) -> Zeroizing<[u8; 32]> {
    derive(master, salt, b"keepd/1 archive")
}

/// HKDF-SHA256 (RFC 5869): extract with the salt, expand with the info to 32 bytes.
pub(super) fn derive(secret: &[u8], salt: &[u8], info: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut out = Zeroizing::new([0u8; 32]);
    // 32 bytes are within HKDF's limit of 255 * 32, so expand cannot fail.
    if Hkdf::<Sha256>::new(Some(salt), secret).expand(info, out.as_mut_slice()).is_err() {
        out.zeroize();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_go_into_a_slot_and_come_out() {
        let keys = Keyring::of(MasterKey::from_bytes([1; 32]));
        assert_eq!(keys.to_bytes().as_slice(), [1; 32]);
        let both = keys.with_new_master().unwrap();
        assert_eq!((both.epoch(), both.is_changing(), both.to_bytes().len()), (1, true, 32 + 2 * 34));
        let alone = both.newest_alone();
        assert_eq!((alone.epoch(), alone.is_changing(), alone.to_bytes().len()), (1, false, 32 + 34));
        for keys in [&keys, &both, &alone] {
            let again = Keyring::from_bytes(&keys.to_bytes()).unwrap();
            assert!(again.is_same(keys));
            assert_eq!(again.epoch(), keys.epoch());
            assert_eq!(*again.chunk_id_key(), *keys.chunk_id_key(), "chunks keep their names");
        }
        let bytes = both.to_bytes();
        for cut in (0..bytes.len()).filter(|cut| ![32, 66].contains(cut)) {
            assert!(Keyring::from_bytes(&bytes[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn what_an_old_key_sealed_opens_until_that_key_is_gone() {
        let keys = Keyring::of(MasterKey::from_bytes([1; 32]));
        let seal = |keys: &Keyring| {
            let header = keys.header(ObjectKind::Index, &[2; 16]).unwrap();
            let mut out = Vec::new();
            keys.cipher(&header).unwrap().seal(0, b"index", &mut out).unwrap();
            (header, out)
        };
        let open = |keys: &Keyring, (header, sealed): &(ObjectHeader, Vec<u8>)| keys.cipher(header)?.open(0, sealed);
        let old = seal(&keys);
        let both = keys.with_new_master().unwrap();
        let new = seal(&both);
        let alone = both.newest_alone();
        assert_eq!(open(&both, &old).unwrap(), b"index");
        assert_eq!(open(&alone, &new).unwrap(), b"index");
        assert!(matches!(open(&alone, &old), Err(CryptoError::Epoch { found: 0, known: 1 })));
        assert!(matches!(open(&keys, &new), Err(CryptoError::Epoch { found: 1, known: 0 })), "the old key is useless after");
    }

    #[test]
    fn a_write_only_pack_opens_with_the_private_key_alone() {
        let private = PrivateKey::generate().unwrap();
        let keys = Keyring::of(MasterKey::from_bytes([1; 32])).sealing_to(Some(private.public()));
        let header = keys.header(ObjectKind::DataPack, &[2; 16]).unwrap();
        assert!(header.is_write_only() && !keys.header(ObjectKind::MetaPack, &[2; 16]).unwrap().is_write_only());
        let (cipher, sealed) = keys.new_pack(&header).unwrap();
        let mut chunk = Vec::new();
        cipher.seal(0, b"contents", &mut chunk).unwrap();
        let sealed = sealed.unwrap();
        assert_eq!(keys.pack_cipher(&header, &sealed).unwrap().open(0, &chunk).unwrap(), b"contents", "this process just made it");
        written::forget_all();
        let refused = keys.pack_cipher(&header, &sealed).err().unwrap();
        assert!(refused.to_string().contains(&private.public().fingerprint().to_string()), "{refused}");
        assert!(keys.cipher(&header).unwrap().open(0, &chunk).is_err(), "the master key alone is not enough");
        keys.lend(Arc::new(PrivateKey::generate().unwrap()));
        assert!(keys.pack_cipher(&header, &sealed).is_err(), "another's key is not enough");
        keys.lend(Arc::new(private));
        assert_eq!(keys.pack_cipher(&header, &sealed).unwrap().open(0, &chunk).unwrap(), b"contents");
        for at in 0..sealed.len() {
            let mut bad = sealed;
            bad[at] ^= 1;
            assert!(keys.pack_cipher(&header, &bad).is_err(), "byte {at}");
        }
        assert!(keys.pack_cipher(&header, &sealed[..80]).is_err());
    }
}
