//! Manifests: what one backup is, sealed, and the chain that they form.

use minicbor::bytes::ByteArray;
use minicbor::{CborLen, Decode, Encode};

use super::payload;
use crate::config::Compression;
use crate::crypto::{CryptoError, HEADER_BYTES, Keyring, ObjectHeader, ObjectKind};

/// No manifest is longer, sealed or plain.
pub const MAX_MANIFEST_BYTES: u64 = 64 << 20;

/// A backup. Unknown keys are left to later versions; `format` says when an old reader must refuse.
#[derive(Debug, Clone, PartialEq, Encode, Decode, CborLen)]
#[cbor(map)]
pub struct Manifest {
    #[n(0)]
    pub format: u32,
    #[n(1)]
    pub repository: ByteArray<16>,
    /// 1 for the first backup of the repository, one more for each.
    #[n(2)]
    pub sequence: u64,
    /// SHA-256 (the name) of the manifest before, in the order of `sequence`.
    #[n(3)]
    pub predecessor: Option<ByteArray<32>>,
    #[n(4)]
    pub job: String,
    #[n(5)]
    pub run: String,
    /// When the capture began and ended, RFC 3339 in UTC.
    #[n(6)]
    pub started: String,
    #[n(7)]
    pub finished: String,
    /// manual, scheduled …
    #[n(8)]
    pub r#type: String,
    #[n(9)]
    pub outcome: String,
    #[n(10)]
    pub name: Option<String>,
    #[n(11)]
    pub labels: Vec<(String, String)>,
    #[n(12)]
    pub host: String,
    #[n(13)]
    pub keepd_version: String,
    #[n(14)]
    pub sources: Vec<ManifestSource>,
    /// Names of users and groups that the entries' numbers had.
    #[n(15)]
    pub users: Vec<(u32, String)>,
    #[n(16)]
    pub groups: Vec<(u32, String)>,
    /// Things left out or worth telling: level, text.
    #[n(17)]
    pub messages: Vec<(String, String)>,
    #[n(18)]
    pub left_out: u64,
    /// Bytes newly stored for this backup, sealed, the manifest not counted.
    #[n(19)]
    pub added_bytes: u64,
    /// Plaintext of the chunks newly stored for this backup.
    #[n(20)]
    pub new_bytes: Option<u64>,
    /// The backup of the same job it was built upon; None when everything was read.
    #[n(21)]
    pub parent: Option<ByteArray<32>>,
    /// Of a copy: the id of the backup that was captured, in the repository it was captured into.
    #[n(22)]
    pub origin: Option<ByteArray<32>>,
    /// In somebody's words.
    #[n(23)]
    pub description: Option<String>,
    /// Of the application, and of its data.
    #[n(24)]
    pub version: Option<String>,
    #[n(25)]
    pub schema_version: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Encode, Decode, CborLen)]
#[cbor(map)]
pub struct ManifestSource {
    #[n(0)]
    pub name: String,
    /// sqlite, files
    #[n(1)]
    pub kind: String,
    /// Where it was captured from; bytes, for paths that are not UTF-8.
    #[n(2)]
    #[cbor(with = "minicbor::bytes")]
    pub path: Vec<u8>,
    /// The pages of its entries in order: chunk id and the path of the first entry.
    #[n(3)]
    pub pages: Vec<PageRef>,
    #[n(4)]
    pub entries: u64,
    #[n(5)]
    pub files: u64,
    #[n(6)]
    pub directories: u64,
    #[n(7)]
    pub bytes: u64,
    /// JSON object of facts found while capturing.
    #[n(8)]
    pub facts: String,
}

#[derive(Debug, Clone, PartialEq, Encode, Decode, CborLen)]
pub struct PageRef {
    #[n(0)]
    pub chunk: ByteArray<32>,
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub first_path: Vec<u8>,
}

/// Why a manifest or index does not open.
#[derive(Debug, thiserror::Error)]
pub enum SealedError {
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    #[error(transparent)]
    Payload(#[from] payload::PayloadError),
    #[error("its content is no valid CBOR of its kind: {0}")]
    Cbor(String),
    #[error("sealing it and opening it again gave other bytes")]
    ReadBack,
}

/// Seals one body as an object of its own and proves that it opens again to the same.
pub fn seal_object(keys: &Keyring, repository: &[u8; 16], kind: ObjectKind, body: &[u8]) -> Result<Vec<u8>, SealedError> {
    let header = keys.header(kind, repository)?;
    let mut compressor = payload::Compressor::new(Compression::Zstd)?;
    let payload = compressor.compress(body, payload::Texture::Mixed)?;
    let mut object = header.bytes().to_vec();
    keys.cipher(&header)?.seal(0, payload, &mut object)?;
    match open_object(keys, repository, kind, &object, body.len())? == body {
        true => Ok(object),
        false => Err(SealedError::ReadBack),
    }
}

/// Opens an object of one body.
pub fn open_object(keys: &Keyring, repository: &[u8; 16], kind: ObjectKind, object: &[u8], limit: usize) -> Result<Vec<u8>, SealedError> {
    let header = ObjectHeader::expect(object, repository, kind)?;
    let payload = keys.cipher(&header)?.open(0, object.get(HEADER_BYTES..).unwrap_or_default())?;
    Ok(payload::decompress(&payload, limit)?)
}

impl Manifest {
    pub fn seal(&self, keys: &Keyring) -> Result<Vec<u8>, SealedError> {
        let body = minicbor::to_vec(self).map_err(|e| SealedError::Cbor(e.to_string()))?;
        seal_object(keys, &self.repository, ObjectKind::Manifest, &body)
    }

    pub fn open(keys: &Keyring, repository: &[u8; 16], object: &[u8]) -> Result<Self, SealedError> {
        let body = open_object(keys, repository, ObjectKind::Manifest, object, MAX_MANIFEST_BYTES as usize)?;
        let manifest: Manifest = minicbor::decode(&body).map_err(|e| SealedError::Cbor(e.to_string()))?;
        if manifest.format != 1 {
            return Err(CryptoError::Version(manifest.format.to_string()).into());
        }
        Ok(manifest)
    }

    /// What people know the backup by: the id of the one that was captured, where it is a copy or was sealed anew. `id` is its own.
    pub fn known_as(&self, id: &[u8; 32]) -> [u8; 32] {
        self.origin.as_ref().map_or(*id, |origin| **origin)
    }

    /// Bytes of all sources' contents.
    pub fn bytes(&self) -> u64 {
        self.sum(|s| s.bytes)
    }

    pub fn entries(&self) -> u64 {
        self.sum(|s| s.entries)
    }

    /// A number of all sources together. What a manifest says of itself is proven by nothing but its seal: more than fits is the most there is.
    pub fn sum(&self, number: impl Fn(&ManifestSource) -> u64) -> u64 {
        self.sources.iter().map(number).fold(0, u64::saturating_add)
    }
}
