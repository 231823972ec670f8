//! A sealed stream: AES-256-GCM in segments, the last of which says that it is the last.
//!
//! 64 bytes of header, the key slots, then segments of 1 MiB of plaintext each; only the last may be shorter. Each is sealed under the archive's own key with its number and
//! whether it is the last as nonce and the header as associated data: none can be changed, moved, left out or added, and a stream that is cut off shows it.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::Arc;

use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Key as AesKey, Nonce, Tag};
use data_encoding::HEXLOWER;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use super::{PortableError, Result};
use crate::crypto::slot::{METHOD_NONE, METHOD_PASSPHRASE, Slot};
use crate::crypto::{CryptoError, Keyring, PrivateKey, Profile, ProfileKey, TAG_BYTES, master, random};

/// What a sealed archive begins with.
pub const MAGIC: &[u8; 8] = b"KEEPDENC";
pub const HEADER_BYTES: usize = 64;
/// Plaintext of a segment; only the last may have less.
pub const SEGMENT_BYTES: usize = 1 << SEGMENT_LOG;
/// The method of a slot whose master key is sealed to a public key.
pub const METHOD_PUBLIC_KEY: &str = "public-key";

const SEGMENT_LOG: u8 = 20;
const FORMAT: u8 = 1;
const MAX_SLOTS_BYTES: usize = 65_536;
const MAX_SLOTS: usize = 32;
/// Slots of passphrases that are tried: each takes a second, and 64 MiB or more.
const MAX_PASSPHRASES: usize = 4;
const SEALED_SEGMENT: usize = SEGMENT_BYTES + TAG_BYTES;

/// Seals and opens segments.
struct Cipher {
    cipher: Aes256Gcm,
    header: [u8; HEADER_BYTES],
}

impl Cipher {
    fn new(key: &Zeroizing<[u8; 32]>, header: [u8; HEADER_BYTES]) -> Self {
        Self { cipher: Aes256Gcm::new(&AesKey::<Aes256Gcm>::from(**key)), header }
    }

    fn nonce(ordinal: u64, last: bool) -> [u8; 12] {
        let mut nonce = [0; 12];
        nonce[0] = u8::from(last);
        nonce[4..].copy_from_slice(&ordinal.to_le_bytes());
        nonce
    }

    fn seal(&self, ordinal: u64, last: bool, plain: &mut [u8]) -> Result<[u8; TAG_BYTES], CryptoError> {
        let nonce = Nonce::from(Self::nonce(ordinal, last));
        let tag = self.cipher.encrypt_inout_detached(&nonce, &self.header, InOutBuf::from(plain)).map_err(|_| CryptoError::Open)?;
        Ok(tag.into())
    }

    /// Opens it where it stands; the plaintext is all but the last 16 bytes.
    fn open(&self, ordinal: u64, last: bool, sealed: &mut [u8]) -> Result<(), CryptoError> {
        let cut = sealed.len().checked_sub(TAG_BYTES).ok_or(CryptoError::Short)?;
        let (body, tag) = sealed.split_at_mut_checked(cut).ok_or(CryptoError::Short)?;
        let tag = Tag::try_from(&*tag).map_err(|_| CryptoError::Short)?;
        let nonce = Nonce::from(Self::nonce(ordinal, last));
        self.cipher.decrypt_inout_detached(&nonce, &self.header, InOutBuf::from(body), &tag).map_err(|_| CryptoError::Open)
    }
}

/// Seals what is written to it. Without [`Sealer::finish`] what came out opens nowhere.
pub struct Sealer<W> {
    out: W,
    cipher: Cipher,
    ordinal: u64,
    block: Vec<u8>,
}

impl<W: Write> Sealer<W> {
    /// For those who have the profile's key, or the private key where it has a public one. `archive`: 16 random bytes that name this archive.
    pub fn create(mut out: W, archive: &[u8; 16], profile: &Profile) -> Result<Self> {
        let salt: [u8; 32] = random().map_err(PortableError::Key)?;
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(MAGIC);
        header[8] = FORMAT;
        header[9] = SEGMENT_LOG;
        header[16..32].copy_from_slice(archive);
        header[32..].copy_from_slice(&salt);
        let (slots, key) = match profile.recipient {
            None => {
                let keys = Keyring::generate().map_err(PortableError::Key)?;
                let slot = Slot::wrap(archive, &profile.name, Some(&profile.key), &keys).map_err(PortableError::Key)?;
                let slots = json(&slot)?;
                header[12..16].copy_from_slice(&slots_len(&slots)?);
                (slots, keys.archive_key(&salt))
            }
            Some(recipient) => {
                let keys = Zeroizing::new(random::<32>().map_err(PortableError::Key)?);
                let mut slot = Slot {
                    format: 1,
                    repository: HEXLOWER.encode(archive),
                    slot: HEXLOWER.encode(&random::<8>().map_err(PortableError::Key)?),
                    profile: profile.name.clone(),
                    method: METHOD_PUBLIC_KEY.to_owned(),
                    fingerprint: recipient.fingerprint().to_string(),
                    salt: String::new(),
                    kdf: None,
                    // As long as it will be: the header, which says how long the slots are, is sealed with the key.
                    wrapped: "0".repeat(2 * WRAPPED_BYTES),
                };
                header[12..16].copy_from_slice(&slots_len(&json(&slot)?)?);
                let sealed = recipient.seal_archive(&keys, &header).map_err(PortableError::Key)?;
                // The slot has the fingerprint.
                slot.wrapped = HEXLOWER.encode(sealed.last_chunk::<WRAPPED_BYTES>().unwrap_or(&[0; WRAPPED_BYTES]));
                (json(&slot)?, master::archive_key(&keys, &salt))
            }
        };
        out.write_all(&header).map_err(PortableError::Io)?;
        out.write_all(&slots).map_err(PortableError::Io)?;
        Ok(Self { out, cipher: Cipher::new(&key, header), ordinal: 0, block: Vec::with_capacity(SEALED_SEGMENT) })
    }

    fn segment(&mut self, last: bool) -> io::Result<()> {
        let tag = self.cipher.seal(self.ordinal, last, &mut self.block).map_err(io::Error::other)?;
        self.block.extend_from_slice(&tag);
        self.out.write_all(&self.block)?;
        self.block.clear();
        self.ordinal += 1;
        Ok(())
    }

    /// Seals the last segment.
    pub fn finish(mut self) -> io::Result<W> {
        self.segment(true)?;
        Ok(self.out)
    }
}

impl<W: Write> Write for Sealer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A full one waits: it may be the last.
        if self.block.len() == SEGMENT_BYTES && !bytes.is_empty() {
            self.segment(false)?;
        }
        let n = bytes.len().min(SEGMENT_BYTES - self.block.len());
        self.block.extend_from_slice(bytes.get(..n).unwrap_or_default());
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Of HPKE: encapsulated key, ciphertext and tag.
const WRAPPED_BYTES: usize = crate::crypto::hpke::SEALED_BYTES - 8;

fn json(slot: &Slot) -> Result<Vec<u8>> {
    serde_json::to_vec(std::slice::from_ref(slot)).map_err(|e| PortableError::Io(io::Error::other(e)))
}

fn slots_len(slots: &[u8]) -> Result<[u8; 4]> {
    let len = u32::try_from(slots.len()).ok().filter(|_| slots.len() <= MAX_SLOTS_BYTES);
    let len = len.ok_or_else(|| {
        PortableError::TooMuch(format!("the key slots of an archive have {} bytes; {MAX_SLOTS_BYTES} are the most", slots.len()))
    })?;
    Ok(len.to_le_bytes())
}

/// Whether it begins as a sealed archive does; needs its first 8 bytes.
pub fn is_sealed(start: &[u8]) -> bool {
    start.starts_with(MAGIC)
}

/// Keys that may open it.
#[derive(Clone, Default)]
pub struct Keys {
    pub keys: Vec<ProfileKey>,
    pub private: Vec<Arc<PrivateKey>>,
    /// Looked at between the slots: trying a passphrase takes a second.
    pub cancel: CancellationToken,
}

impl Keys {
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.private.is_empty()
    }
}

/// An archive's start, read: what its segments open with.
struct Start {
    cipher: Cipher,
    archive: [u8; 16],
    /// Where the first segment begins.
    base: u64,
    /// What opened it, for people.
    opened_with: String,
}

/// What stands before the segments.
struct Head {
    header: [u8; HEADER_BYTES],
    archive: [u8; 16],
    slots: Vec<Slot>,
    /// Where the first segment begins.
    base: u64,
}

/// `magic` was read already.
fn head(input: &mut impl Read) -> Result<Head> {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    let rest = header.get_mut(8..).unwrap_or_default();
    read_exact(input, rest, "its header")?;
    if header[8] != FORMAT {
        let text = format!("the archive is sealed in format {}, this version of keepd knows {FORMAT}; use a newer keepd", header[8]);
        return Err(PortableError::Version(text));
    }
    if header[9] != SEGMENT_LOG || header[10..12] != [0, 0] {
        return Err(PortableError::Damaged("the header of the sealed archive is damaged: it names another size of segments".into()));
    }
    let [a, b, c, d] = [header[12], header[13], header[14], header[15]];
    let len = u32::from_le_bytes([a, b, c, d]) as usize;
    if len > MAX_SLOTS_BYTES {
        return Err(PortableError::Damaged(format!(
            "the header of the sealed archive says that its key slots have {len} bytes; {MAX_SLOTS_BYTES} are the most"
        )));
    }
    let mut slots = vec![0; len];
    read_exact(input, &mut slots, "its key slots")?;
    let slots: Vec<Slot> = serde_json::from_slice(&slots)
        .map_err(|e| PortableError::Damaged(format!("the key slots of the sealed archive are damaged: {e}")))?;
    if slots.len() > MAX_SLOTS {
        return Err(PortableError::Damaged(format!("the sealed archive has {} key slots; {MAX_SLOTS} are the most", slots.len())));
    }
    let archive: [u8; 16] = header[16..32].try_into().unwrap_or_default();
    Ok(Head { header, archive, slots, base: (HEADER_BYTES + len) as u64 })
}

/// The name and the key slots of a sealed archive, as they stand in its first bytes; nothing proves them.
pub fn slots(archive: &[u8]) -> Result<([u8; 16], Vec<Slot>)> {
    let mut rest = archive.strip_prefix(MAGIC).ok_or_else(|| PortableError::Damaged("it is not sealed".into()))?;
    head(&mut rest).map(|head| (head.archive, head.slots))
}

/// `magic` was read already.
fn begin(input: &mut impl Read, keys: &Keys) -> Result<Start> {
    let Head { header, archive, slots, base } = head(input)?;
    let salt: [u8; 32] = header[32..].try_into().unwrap_or_default();
    let (key, opened_with) = open_slots(&slots, &archive, &header, &salt, keys)?;
    Ok(Start { cipher: Cipher::new(&key, header), archive, base, opened_with })
}

fn open_slots(
    slots: &[Slot],
    archive: &[u8; 16],
    header: &[u8; HEADER_BYTES],
    salt: &[u8; 32],
    keys: &Keys,
) -> Result<(Zeroizing<[u8; 32]>, String)> {
    let mut why = None;
    let mut passphrases = 0;
    for slot in slots {
        if keys.cancel.is_cancelled() {
            return Err(PortableError::Cancelled);
        }
        if slot.method == METHOD_PASSPHRASE {
            passphrases += 1;
            if passphrases > MAX_PASSPHRASES {
                let text = format!("the sealed archive has more than {MAX_PASSPHRASES} key slots of passphrases; only the first are tried");
                why = Some(CryptoError::Slot(text));
                continue;
            }
        }
        if slot.method == METHOD_PUBLIC_KEY {
            match open_public(slot, archive, header, &keys.private) {
                Ok(master) => return Ok((master::archive_key(&master, salt), wanted(slot))),
                Err(CryptoError::NeedsPrivateKey(_)) => {}
                Err(e) => why = Some(e),
            }
            continue;
        }
        if slot.method == METHOD_NONE {
            why = Some(CryptoError::Slot("a key slot of a sealed archive has its key in plain; keepd makes no such archive".into()));
            continue;
        }
        for key in &keys.keys {
            if keys.cancel.is_cancelled() {
                return Err(PortableError::Cancelled);
            }
            match slot.unwrap(archive, Some(key)) {
                Ok(keyring) => return Ok((keyring.archive_key(salt), wanted(slot))),
                Err(CryptoError::WrongKey { .. } | CryptoError::WrongPassphrase | CryptoError::OtherMethod { .. }) => {}
                Err(e) => why = Some(e),
            }
        }
    }
    if let Some(e) = why {
        return Err(PortableError::Key(e));
    }
    let wanted: Vec<String> = slots.iter().map(wanted).collect();
    let wanted = if wanted.is_empty() { "nobody: it has no key slots".to_owned() } else { wanted.join(", or ") };
    if keys.is_empty() {
        return Err(PortableError::NotOpen(format!("the archive is sealed, and no key was given; it is sealed for {wanted}")));
    }
    let given: Vec<String> =
        keys.keys.iter().map(given).chain(keys.private.iter().map(|k| format!("private key {}", k.public().fingerprint()))).collect();
    Err(PortableError::NotOpen(format!("the archive is sealed for {wanted}; given was {}, which does not open it", given.join(", "))))
}

/// Whether an archive opens with a key that a profile no longer seals with: one of its name that is not its own of now, or a retired one.
pub fn is_of_former_key(slots: &[Slot], sealed: &[u8], profile: &Profile) -> Result<bool, CryptoError> {
    let archive: [u8; 16] = sealed.get(16..32).and_then(|raw| raw.try_into().ok()).ok_or(CryptoError::Short)?;
    for slot in slots {
        for key in &profile.retired {
            if key.fingerprint()?.is_some_and(|f| f.to_string() == slot.fingerprint) {
                return Ok(true);
            }
        }
        if slot.profile != profile.name {
            continue;
        }
        let is_present = match slot.method.as_str() {
            METHOD_PUBLIC_KEY => profile.recipient.is_some_and(|r| r.fingerprint().to_string() == slot.fingerprint),
            // Its fingerprint is salted: it must be tried.
            METHOD_PASSPHRASE => match slot.unwrap(&archive, Some(&profile.key)) {
                Ok(_) => true,
                Err(CryptoError::WrongPassphrase | CryptoError::OtherMethod { .. }) => false,
                Err(e) => return Err(e),
            },
            _ => profile.key.fingerprint()?.is_some_and(|f| f.to_string() == slot.fingerprint),
        };
        if !is_present {
            return Ok(true);
        }
    }
    Ok(false)
}

fn wanted(slot: &Slot) -> String {
    let (profile, fingerprint) = (slot.profile.escape_debug(), slot.fingerprint.escape_debug());
    match slot.method.as_str() {
        METHOD_PASSPHRASE => format!("the passphrase of encryption profile '{profile}'"),
        METHOD_PUBLIC_KEY => format!("the private key {fingerprint} of encryption profile '{profile}'"),
        method => format!("the key {fingerprint} ({}) of encryption profile '{profile}'", method.escape_debug()),
    }
}

fn given(key: &ProfileKey) -> String {
    match key.fingerprint() {
        Ok(Some(fingerprint)) => format!("key {fingerprint}"),
        Ok(None) => "a passphrase".to_owned(),
        Err(e) => format!("a key of a token that does not answer ({e})"),
    }
}

fn open_public(
    slot: &Slot,
    archive: &[u8; 16],
    header: &[u8; HEADER_BYTES],
    keys: &[Arc<PrivateKey>],
) -> Result<Zeroizing<[u8; 32]>, CryptoError> {
    if slot.format != 1 {
        return Err(CryptoError::Version(slot.format.to_string()));
    }
    if slot.repository != HEXLOWER.encode(archive) {
        return Err(CryptoError::OtherRepository);
    }
    let hex = |text: &str| {
        HEXLOWER.decode(text.as_bytes()).map_err(|_| CryptoError::Slot("a key slot of a sealed archive is not hexadecimal".into()))
    };
    let sealed = [hex(&slot.fingerprint)?, hex(&slot.wrapped)?].concat();
    PrivateKey::open_archive_with(keys, &sealed, header)
}

fn read_exact(input: &mut impl Read, into: &mut [u8], what: &str) -> Result<()> {
    input.read_exact(into).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => PortableError::Damaged(format!("the sealed archive is cut off within {what}")),
        _ => PortableError::io(e),
    })
}

/// Reads as much as there is.
fn read_full(input: &mut impl Read, into: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match input.read(rest) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Opens a sealed archive as it comes; gives nothing that is not authenticated.
pub struct Opener<R> {
    input: R,
    start: Start,
    ordinal: u64,
    /// Sealed bytes, one more than a segment; then the plaintext.
    block: Vec<u8>,
    /// The byte after the segment, where there is one.
    ahead: Option<u8>,
    plain: usize,
    taken: usize,
    ended: bool,
}

impl<R: Read> Opener<R> {
    /// `input` stands behind the first 8 bytes, which were [`MAGIC`].
    pub fn open(mut input: R, keys: &Keys) -> Result<Self> {
        let start = begin(&mut input, keys)?;
        Ok(Self { input, start, ordinal: 0, block: vec![0; SEALED_SEGMENT + 1], ahead: None, plain: 0, taken: 0, ended: false })
    }

    /// The archive's name, which its head repeats.
    pub fn archive(&self) -> [u8; 16] {
        self.start.archive
    }

    /// What it opened with, in words.
    pub fn opened_with(&self) -> &str {
        &self.start.opened_with
    }

    fn segment(&mut self) -> io::Result<()> {
        let mut have = 0;
        if let (Some(byte), Some(first)) = (self.ahead.take(), self.block.first_mut()) {
            *first = byte;
            have = 1;
        }
        have += read_full(&mut self.input, self.block.get_mut(have..).unwrap_or_default())?;
        let last = have <= SEALED_SEGMENT;
        if !last {
            self.ahead = self.block.last().copied();
            have = SEALED_SEGMENT;
        }
        let sealed = self.block.get_mut(..have).unwrap_or_default();
        open_segment(&self.start.cipher, self.ordinal, last, sealed).map_err(io::Error::other)?;
        (self.plain, self.taken, self.ended) = (have - TAG_BYTES, 0, last);
        self.ordinal += 1;
        Ok(())
    }
}

/// Opens a segment, and says what it is if it does not open.
fn open_segment(cipher: &Cipher, ordinal: u64, last: bool, sealed: &mut [u8]) -> Result<()> {
    if sealed.is_empty() || sealed.len() < TAG_BYTES {
        return Err(PortableError::Damaged(format!("the sealed archive is cut off: segment {ordinal} is missing")));
    }
    // What does not open is left as it stands, but for a failed attempt.
    let copy = sealed.to_vec();
    if cipher.open(ordinal, last, sealed).is_ok() {
        return Ok(());
    }
    let mut other = copy;
    let text = match (cipher.open(ordinal, !last, &mut other).is_ok(), last) {
        (true, true) => format!("the sealed archive is cut off after segment {ordinal}, which is not its last"),
        (true, false) => format!("something follows the end of the sealed archive (segment {ordinal} is its last)"),
        (false, _) => {
            format!("segment {ordinal} of the sealed archive does not open: it is damaged, cut off, or stands where it does not belong")
        }
    };
    Err(PortableError::Damaged(text))
}

impl<R: Read> Read for Opener<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.plain {
            if self.ended {
                return Ok(0);
            }
            self.segment()?;
        }
        let have = self.block.get(self.taken..self.plain).unwrap_or_default();
        let n = have.len().min(into.len());
        if let (Some(to), Some(from)) = (into.get_mut(..n), have.get(..n)) {
            to.copy_from_slice(from);
        }
        self.taken += n;
        Ok(n)
    }
}

/// A sealed archive that can be read anywhere, as its plaintext. The last segment is proven when it is opened: a shorter one does not pass for a whole one.
pub struct SealedFile<R> {
    input: R,
    start: Start,
    segments: u64,
    len: u64,
    at: u64,
    block: Vec<u8>,
    /// Which segment stands in the block.
    held: Option<u64>,
}

impl<R: Read + Seek> SealedFile<R> {
    pub fn open(mut input: R, keys: &Keys) -> Result<Self> {
        let end = input.seek(SeekFrom::End(0)).map_err(PortableError::Io)?;
        input.seek(SeekFrom::Start(0)).map_err(PortableError::Io)?;
        let mut magic = [0; 8];
        read_exact(&mut input, &mut magic, "its first bytes")?;
        if !is_sealed(&magic) {
            return Err(PortableError::NotOpen("the archive is not sealed".into()));
        }
        let start = begin(&mut input, keys)?;
        let sealed = end.checked_sub(start.base).filter(|n| *n >= TAG_BYTES as u64);
        let sealed = sealed.ok_or_else(|| PortableError::Damaged("the sealed archive is cut off: segment 0 is missing".into()))?;
        let segments = sealed.div_ceil(SEALED_SEGMENT as u64);
        let len = sealed.checked_sub(segments * TAG_BYTES as u64);
        let len = len.ok_or_else(|| PortableError::Damaged(format!("the sealed archive is cut off within segment {}", segments - 1)))?;
        let mut file = Self { input, start, segments, len, at: 0, block: Vec::new(), held: None };
        file.load(segments - 1)?;
        Ok(file)
    }

    /// Bytes of plaintext.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn archive(&self) -> [u8; 16] {
        self.start.archive
    }

    fn load(&mut self, segment: u64) -> Result<()> {
        if self.held == Some(segment) {
            return Ok(());
        }
        self.held = None;
        let first = segment * SEGMENT_BYTES as u64;
        let plain = self.len.saturating_sub(first).min(SEGMENT_BYTES as u64) as usize;
        self.block.resize(plain + TAG_BYTES, 0);
        self.input.seek(SeekFrom::Start(self.start.base + segment * SEALED_SEGMENT as u64)).map_err(PortableError::Io)?;
        read_exact(&mut self.input, &mut self.block, "a segment")?;
        open_segment(&self.start.cipher, segment, segment + 1 == self.segments, &mut self.block)?;
        self.block.truncate(plain);
        self.held = Some(segment);
        Ok(())
    }
}

impl<R: Read + Seek> Read for SealedFile<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.len || into.is_empty() {
            return Ok(0);
        }
        self.load(self.at / SEGMENT_BYTES as u64).map_err(|e| match e {
            PortableError::Io(e) => e,
            e => io::Error::other(e),
        })?;
        let have = self.block.get((self.at % SEGMENT_BYTES as u64) as usize..).unwrap_or_default();
        let n = have.len().min(into.len());
        if let (Some(to), Some(from)) = (into.get_mut(..n), have.get(..n)) {
            to.copy_from_slice(from);
        }
        self.at += n as u64;
        Ok(n)
    }
}

impl<R: Read + Seek> Seek for SealedFile<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.len.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
