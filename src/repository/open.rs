//! An open repository: its id, its keys, its storage, its local index.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::entry::ChunkId;
use super::error::{RepositoryError, Result};
use super::index::{Index, IndexedPack, MAX_INDEX_BYTES};
use super::local::{LocalIndex, Location};
use super::lock;
use super::manifest::{MAX_MANIFEST_BYTES, Manifest, SealedError, open_object, seal_object};
use super::pack::{self, BuiltPack, MAX_PACK_BYTES, PackContents, PackError, PackMemory, PackedChunk, SealedChunk};
use super::slots::{self, Patience, Unreadable};
use super::turn;
use crate::config::Compression;
use crate::crypto::slot::Slot;
use crate::crypto::{self, CryptoError, HEADER_BYTES, Keyring, ObjectCipher, ObjectHeader, ObjectKind, Profile};
use crate::storage::{Storage, StorageError};

const CONFIG_NAME: &str = "keepd.json";
pub(super) const MAX_SMALL_OBJECT: u64 = 64 << 10;
/// Slots that a repository gets; opening one may cost a second (a passphrase), so no more are tried with one.
pub(super) const MAX_SLOTS: usize = 32;
/// For what two daemons wrote at the same time.
const SETTLE: Duration = Duration::from_millis(250);

/// `keepd.json`: what any reader needs before it has a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RepositoryConfig {
    format: u32,
    repository: String,
    created: String,
    keepd_version: String,
}

impl RepositoryConfig {
    fn id(&self) -> Option<[u8; 16]> {
        HEXLOWER.decode(self.repository.as_bytes()).ok()?.try_into().ok()
    }
}

/// The id of the repository of a storage; None where there never was one. `known_id` as in [`OpenOptions`].
pub fn identify(storage: &Storage, known_id: Option<&str>) -> Result<Option<[u8; 16]>> {
    let none = |text: String| RepositoryError::NoRepository { location: storage.location().to_owned(), text };
    let config = match storage.get(CONFIG_NAME, MAX_SMALL_OBJECT) {
        Ok(bytes) => parse_config(storage.location(), &bytes)?,
        Err(StorageError::NotFound { .. }) => {
            return match known_id {
                None => Ok(None),
                Some(id) => Err(none(format!(
                    "repository {id} was here and is gone; is the disk mounted? If it is lost for good and a new one shall begin here, give the destination another name in the configuration"
                ))),
            };
        }
        Err(e) => return Err(e.into()),
    };
    if let Some(known) = known_id.filter(|known| *known != config.repository) {
        return Err(none(format!("it holds repository {}, but {known} was here; somebody exchanged it", config.repository)));
    }
    config.id().map(Some).ok_or_else(|| none(format!("the id in {CONFIG_NAME} is not 32 hexadecimal digits")))
}

/// How to open a repository.
pub struct OpenOptions<'a> {
    /// The encryption profile; None for `encryption = "none"`.
    pub profile: Option<&'a Profile>,
    pub compression: Compression,
    /// Where the local caches of all repositories live.
    pub cache_root: &'a Path,
    /// The id (hexadecimal) this destination had when it was last used: an empty storage is then an error, not a new start.
    pub known_id: Option<&'a str>,
    /// Make a repository where there is none.
    pub create: bool,
    /// What one run's buffers may hold, in bytes; a few packs come on top.
    pub memory: u64,
}

pub struct Repository {
    pub(super) storage: Storage,
    pub(super) id: [u8; 16],
    pub(super) keys: Keyring,
    pub(super) chunk_key: Zeroizing<[u8; 32]>,
    pub(super) compression: Compression,
    pub(super) local: LocalIndex,
    cache_dir: PathBuf,
    /// Made by this process, and not looked at again yet.
    fresh: AtomicBool,
    memory: u64,
    /// Ciphers of packs read lately, so that a pack's header is read and its subkey derived once.
    ciphers: Mutex<HashMap<[u8; 32], Arc<ObjectCipher>>>,
    /// How often the repository may still be asked where a chunk lies that is not where the local index has it.
    second_looks: AtomicUsize,
    /// How often its whole index may still be read for that.
    index_looks: AtomicUsize,
    register: Mutex<Option<Register>>,
}

/// In which index objects chunks stand, made once when the local index is not to be believed: 8 bytes a chunk.
#[derive(Default)]
struct Register {
    indexes: Vec<[u8; 32]>,
    /// The first bytes of a chunk's id and the place of an index object, in order.
    chunks: Vec<(u32, u32)>,
    /// The index object that was read last: what lies together is asked for together.
    last: Option<(u32, Arc<Index>)>,
}

impl Register {
    fn key(id: &ChunkId) -> u32 {
        u32::from_be_bytes(id.0.first_chunk().copied().unwrap_or_default())
    }

    /// The places of the index objects that may list a chunk.
    fn places(&self, id: &ChunkId) -> Vec<u32> {
        let key = Self::key(id);
        let from = self.chunks.partition_point(|(other, _)| *other < key);
        self.chunks.iter().skip(from).take_while(|(other, _)| *other == key).map(|(_, place)| *place).collect()
    }
}

/// The packs of the storage, with their sizes.
struct ListedPacks {
    packs: BTreeMap<[u8; 32], u64>,
    /// Where looking at sizes in turn stopped.
    last_sized: Option<[u8; 32]>,
}

/// Ciphers remembered at most (about 1 KiB each).
const MAX_CIPHERS: usize = 512;
/// What the local index is compared with.
const COMPARED: [&str; 2] = ["packs/", "index/"];
/// Sizes that are asked for one by one before a backup.
const SIZES_IN_TURN: usize = 256;
/// And those of the packs that came last.
const NEWEST_SIZES: usize = 64;
/// Each reads a pack's footer, and an index object or none.
const SECOND_LOOKS: usize = 1024;
/// Once is enough, unless the storage does not answer.
const INDEX_LOOKS: usize = 3;

impl Repository {
    /// Opens the repository of a storage, or makes one.
    pub fn open(storage: Storage, options: &OpenOptions<'_>) -> Result<Arc<Self>> {
        let location = storage.location().to_owned();
        let none = |text: String| RepositoryError::NoRepository { location: location.clone(), text };
        let mut fresh = false;
        let id = match identify(&storage, options.known_id)? {
            Some(id) => id,
            None if !options.create => return Err(none("nothing was backed up to it yet".into())),
            None => {
                fresh = true;
                let config = create(&storage, options)?;
                config.id().ok_or_else(|| none(format!("the id in {CONFIG_NAME} is not 32 hexadecimal digits")))?
            }
        };
        let keys = unlock(&storage, &id, options)?;
        let cache_dir = options.cache_root.join(HEXLOWER.encode(&id));
        std::fs::create_dir_all(&cache_dir).map_err(|e| RepositoryError::LocalIndex {
            location: location.clone(),
            text: format!("cannot make {}: {e}", cache_dir.display()),
        })?;
        let local = LocalIndex::open(&cache_dir.join("index.sqlite"), &location)?;
        let chunk_key = keys.chunk_id_key();
        Ok(Arc::new(Self {
            storage,
            id,
            keys,
            chunk_key,
            compression: options.compression,
            local,
            cache_dir,
            fresh: AtomicBool::new(fresh),
            memory: options.memory,
            ciphers: Mutex::default(),
            second_looks: AtomicUsize::new(SECOND_LOOKS),
            index_looks: AtomicUsize::new(INDEX_LOOKS),
            register: Mutex::default(),
        }))
    }

    /// Where create-if-absent is ignored, another daemon may have made a repository in the same place at the same time: the last one counts.
    /// An error when it is not this one. To be asked before anything is committed.
    pub(super) fn is_still_this(&self) -> Result<()> {
        if !self.fresh.swap(false, Ordering::AcqRel) || !self.storage.is_remote() {
            return Ok(());
        }
        is_still(&self.storage, &self.id())
    }

    /// Whether it was just made where another daemon may have made one at the same time.
    pub fn may_be_another(&self) -> bool {
        self.storage.is_remote() && self.fresh.load(Ordering::Acquire)
    }

    /// The id in hexadecimal.
    pub fn id(&self) -> String {
        HEXLOWER.encode(&self.id)
    }

    /// How often it was re-encrypted.
    pub fn epoch(&self) -> u16 {
        self.keys.epoch()
    }

    /// Whether a re-encryption was begun and not finished.
    pub fn is_changing_keys(&self) -> bool {
        self.keys.is_changing()
    }

    pub fn raw_id(&self) -> [u8; 16] {
        self.id
    }

    /// Plaintext that may wait to be compressed, in bytes.
    pub(super) fn queue_bytes(&self) -> usize {
        (self.memory / 5).clamp(8 << 20, 64 << 20) as usize
    }

    /// Full packs that may wait to be stored or be under way, on this machine.
    pub(super) fn packs_ahead(&self) -> usize {
        if self.memory < 64 << 20 { 1 } else { 2 }
    }

    /// Plaintext that may be fetched ahead of its use, in bytes.
    pub fn ahead_bytes(&self) -> usize {
        (self.memory / 3).clamp(16 << 20, 128 << 20) as usize
    }

    pub fn location(&self) -> &str {
        self.storage.location()
    }

    /// A directory for caches that belong to this repository.
    pub fn cache_dir(&self) -> &Path {
        &self.cache_dir
    }

    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    pub(super) fn sealed_error(&self, name: &str, error: SealedError) -> RepositoryError {
        let (location, name) = (self.location().to_owned(), name.to_owned());
        match error {
            SealedError::Crypto(source) => RepositoryError::Object { location, name, source },
            SealedError::Payload(source) => RepositoryError::Payload { location, name, source },
            other => RepositoryError::Damaged { location, name, text: other.to_string() },
        }
    }

    pub(super) fn pack_error(&self, pack: &[u8; 32], error: PackError) -> RepositoryError {
        self.damaged(&pack_name(pack), error.to_string())
    }

    /// Of a pack whose key does not come out: that a private key is wanted is no damage.
    pub(super) fn key_error(&self, pack: &[u8; 32], source: CryptoError) -> RepositoryError {
        RepositoryError::Object { location: self.location().to_owned(), name: pack_name(pack), source }
    }

    pub(super) fn damaged(&self, name: &str, text: String) -> RepositoryError {
        RepositoryError::Damaged { location: self.location().to_owned(), name: name.to_owned(), text }
    }

    /// Brings the local index up to date with the repository: index objects that came or went, packs that are gone, and
    /// packs that no index lists (an interrupted run left them, or their index is damaged), from their footers. Returns
    /// what is damaged; a storage that does not answer is an error.
    pub fn sync_index(&self) -> Result<Vec<String>> {
        self.sync_index_with(usize::MAX)
    }

    /// As [`Repository::sync_index`]; where a size costs a call of its own, those of a part of the packs are looked at, another one each time. That a
    /// pack is gone is seen at once, that it is cut off when its turn has come.
    pub fn sync_index_in_turn(&self) -> Result<Vec<String>> {
        self.sync_index_with(SIZES_IN_TURN)
    }

    /// At most this many sizes that cost a call of their own are looked at.
    pub(super) fn sync_index_with(&self, sizes: usize) -> Result<Vec<String>> {
        let mut problems = Vec::new();
        self.sync_condemned(&mut problems)?;
        // Who wants to know all looks at all.
        let remember = sizes != usize::MAX;
        let state = if remember { self.storage.state(&COMPARED) } else { None };
        if state.is_some() && self.local.compared()? == state && self.are_sizes_right(sizes)? {
            return Ok(problems);
        }
        // Whoever changes what is known meanwhile, this run or another one, takes that away.
        let compared = match state {
            Some(state) => Some((state, crypto::random().map_err(|e| RepositoryError::Other(e.to_string()))?)),
            None => None,
        };
        if let Some((_, marked)) = &compared {
            self.local.set_compared(marked)?;
        }
        let condemned = self.local.condemned()?;
        // What is known comes first: what comes meanwhile cannot be missed in the listing then.
        let mut loaded = self.local.loaded()?;
        let listed: BTreeSet<[u8; 32]> =
            self.storage.list_as_it_comes("index/", remember)?.iter().filter_map(|(name, _)| id_of(name)).collect();
        if loaded.iter().any(|id| !listed.contains(id)) {
            let gone = loaded.iter().filter(|id| !listed.contains(*id));
            self.storage.are_gone("index/", gone.map(|id| format!("index/{}", HEXLOWER.encode(id))))?;
            self.local.clear()?;
            loaded.clear();
        }
        let mut indexes = Vec::new();
        let mut superseded: HashSet<[u8; 32]> = HashSet::new();
        for id in listed.iter().filter(|id| !loaded.contains(*id)) {
            let index = match self.read_index(id) {
                Ok(index) => index,
                Err(e @ RepositoryError::Storage(_)) => return Err(e),
                // Its packs say themselves what they hold; they are taken up below and listed anew by the next backup. It is read again the next time: what
                // came damaged may lie there whole.
                Err(e) => {
                    problems.push(e.to_string());
                    continue;
                }
            };
            superseded.extend(index.supersedes.iter().copied());
            indexes.push((*id, index));
        }
        if loaded.iter().any(|id| superseded.contains(id)) {
            // A prune of another daemon was interrupted: what it replaced was loaded before.
            self.local.clear()?;
            return self.sync_index_with(sizes);
        }
        // What an interrupted prune left behind must not count.
        let in_force = |(id, index): ([u8; 32], Index)| (id, if superseded.contains(&id) { Vec::new() } else { index.packs });
        self.local.load(&indexes.into_iter().map(in_force).collect::<Vec<_>>())?;
        let known: BTreeMap<[u8; 32], u64> = self.local.packs(true)?.into_iter().collect();
        let ListedPacks { packs, last_sized } = self.packs_beside(&known, sizes)?;
        self.storage.are_gone("packs/", known.keys().filter(|id| !packs.contains_key(*id)).map(pack_name))?;
        let mut gone = Vec::new();
        for (id, size) in &known {
            match packs.get(id) {
                Some(listed) if listed == size => continue,
                // Nothing needs it; it is being deleted.
                None if condemned.contains_key(id) => {}
                Some(listed) => problems.push(format!("{}: {}: it is {listed} bytes long, not {size}", self.location(), pack_name(id))),
                None => problems.push(format!("{}: {}: it is missing", self.location(), pack_name(id))),
            }
            gone.push(*id);
        }
        if !gone.is_empty() {
            self.local.forget(&gone)?;
        }
        // What was seen of these is kept: it is the next ones' turn.
        if let Some(last) = last_sized {
            turn::stopped_at(&self.id, last);
        }
        let is_as_known = problems.is_empty() && gone.is_empty() && packs.len() == known.len();
        for (id, size) in packs.into_iter().filter(|(id, _)| !known.contains_key(id)) {
            match self.read_footer(&id, size) {
                // Who has the public key can put any contents beside a genuine footer: only what this process wrote, or a private key
                // opens, is what its footer says.
                Ok(contents) if contents.header.is_write_only() && !self.keys.can_read(&contents.header) => problems.push(format!(
                    "{}: {}: no index lists it, and without its private key it cannot be proven; what is in it is stored anew",
                    self.location(),
                    pack_name(&id)
                )),
                Ok(contents) => self.local.add_unindexed(&IndexedPack { id, size, kind: contents.header.kind, chunks: contents.chunks })?,
                Err(e @ RepositoryError::Storage(_)) => return Err(e),
                // One that nobody can read, and it is known.
                Err(_) if condemned.contains_key(&id) => {}
                Err(e) => problems.push(e.to_string()),
            }
        }
        // What was listed is of this state only when nothing came or went since before that.
        if let Some((state, marked)) = compared
            && is_as_known
            && self.storage.state(&COMPARED) == Some(state)
        {
            self.local.confirm_compared(&marked, &state)?;
        }
        Ok(problems)
    }

    /// Whether the local index knows the packs and index objects that are there, and no others; false where that would have to be looked at.
    pub(super) fn is_as_compared(&self) -> Result<bool> {
        let state = self.storage.state(&COMPARED);
        Ok(state.is_some() && self.local.compared()? == state)
    }

    /// Whether the next packs in turn, and the newest, are as long as is known.
    fn are_sizes_right(&self, most: usize) -> Result<bool> {
        let mut packs = self.local.packs_in_turn(&turn::behind(&self.id), most)?;
        let last = packs.last().filter(|_| packs.len() == most).map(|(id, _)| *id);
        if last.is_some() {
            packs.extend(self.local.newest_packs(NEWEST_SIZES)?);
        }
        let names: Vec<String> = packs.iter().map(|(id, _)| pack_name(id)).collect();
        if !self.storage.sizes_if_there(&names)?.into_iter().eq(packs.into_iter().map(|(_, size)| Some(size))) {
            return Ok(false);
        }
        if let Some(last) = last {
            turn::stopped_at(&self.id, last);
        }
        Ok(true)
    }

    /// The packs that the local index knows and that are not condemned, with their sizes.
    pub fn packs(&self) -> Result<Vec<([u8; 32], u64)>> {
        self.local.packs(false)
    }

    /// The packs of the storage with their sizes; a complete list or an error.
    pub fn listed_packs(&self) -> Result<BTreeMap<[u8; 32], u64>> {
        Ok(self.storage.list("packs/")?.into_iter().filter_map(|object| Some((pack_of(&object.name)?, object.size))).collect())
    }

    /// The packs of the storage with their sizes. Where each of these costs a call of its own, at most `most` of the `known` packs' are asked for, in turn, and
    /// the newest ones', which a power cut may have cut off; the others have the size that is known.
    fn packs_beside(&self, known: &BTreeMap<[u8; 32], u64>, most: usize) -> Result<ListedPacks> {
        let remember = most != usize::MAX;
        let listed: BTreeMap<[u8; 32], Option<u64>> = self
            .storage
            .list_as_it_comes("packs/", remember)?
            .into_iter()
            .filter_map(|(name, size)| Some((pack_of(&name)?, size)))
            .collect();
        let asked: Vec<[u8; 32]> = known.keys().filter(|id| listed.get(*id).is_some_and(Option::is_none)).copied().collect();
        let in_turn: Vec<[u8; 32]> = match asked.len() > most {
            false => asked,
            true => {
                let last = turn::behind(&self.id);
                let from = asked.partition_point(|id| *id <= last);
                asked.iter().cycle().skip(from).take(most).copied().collect()
            }
        };
        let last_sized = in_turn.last().filter(|_| in_turn.len() == most).copied();
        let newest = if last_sized.is_some() { self.local.newest_packs(NEWEST_SIZES)? } else { Vec::new() };
        let mut whose_turn: HashSet<[u8; 32]> = newest.into_iter().map(|(id, _)| id).collect();
        whose_turn.extend(in_turn);
        let mut packs = BTreeMap::new();
        for (id, size) in listed {
            let size = match (size, known.get(&id)) {
                (Some(size), _) => Some(size),
                (None, Some(size)) if !whose_turn.contains(&id) => Some(*size),
                // One that went meanwhile is no longer listed.
                (None, _) => self.storage.size_if_there(&pack_name(&id))?,
            };
            packs.extend(size.map(|size| (id, size)));
        }
        Ok(ListedPacks { packs, last_sized })
    }

    /// Locks every object that is in use for another period; returns how many.
    pub fn renew_locks(&self) -> Result<usize> {
        let mut names = vec![CONFIG_NAME.to_owned()];
        for directory in ["keys/", "index/", "backups/", "marks/"] {
            names.extend(self.storage.names(directory)?);
        }
        names.extend(self.local.packs(false)?.iter().map(|(id, _)| pack_name(id)));
        self.storage.renew_locks(&names)?;
        Ok(names.len())
    }

    pub fn listed_backups(&self) -> Result<BTreeSet<[u8; 32]>> {
        Ok(ids(self.storage.names("backups/")?))
    }

    pub(super) fn listed_indexes(&self) -> Result<BTreeSet<[u8; 32]>> {
        Ok(ids(self.storage.names("index/")?))
    }

    pub(super) fn read_index(&self, id: &[u8; 32]) -> Result<Index> {
        let name = format!("index/{}", HEXLOWER.encode(id));
        let object = self.read_named(&name, id, MAX_INDEX_BYTES)?;
        let body = open_object(&self.keys, &self.id, ObjectKind::Index, &object, MAX_INDEX_BYTES as usize)
            .map_err(|e| self.sealed_error(&name, e))?;
        Index::decode(&body).map_err(|e| self.damaged(&name, format!("its content is no valid index: {e}")))
    }

    pub(super) fn write_index(&self, index: &Index) -> Result<[u8; 32]> {
        let object = seal_object(&self.keys, &self.id, ObjectKind::Index, &index.encode()).map_err(|e| self.sealed_error("index", e))?;
        self.put_named("index/", object)
    }

    /// Reads an object whose name is its SHA-256 and proves that.
    pub(super) fn read_named(&self, name: &str, id: &[u8; 32], limit: u64) -> Result<Bytes> {
        let is_it = |object: &Bytes| <[u8; 32]>::from(Sha256::digest(object)) == *id;
        let mut object = self.storage.get(name, limit)?;
        if !is_it(&object) && self.storage.is_remote() {
            // What came damaged may lie there whole.
            object = self.storage.get(name, limit)?;
        }
        match is_it(&object) {
            true => Ok(object),
            false => Err(self.damaged(name, "its SHA-256 is not its name: the bytes are damaged or exchanged".into())),
        }
    }

    /// Reads and opens an object of one CBOR map.
    pub(super) fn read_record<T: for<'b> minicbor::Decode<'b, ()>>(
        &self,
        name: &str,
        id: &[u8; 32],
        kind: ObjectKind,
        limit: u64,
    ) -> Result<T> {
        let object = self.read_named(name, id, limit)?;
        let body = open_object(&self.keys, &self.id, kind, &object, limit as usize).map_err(|e| self.sealed_error(name, e))?;
        minicbor::decode(&body).map_err(|e| self.sealed_error(name, SealedError::Cbor(e.to_string())))
    }

    /// Seals and publishes an object of one CBOR map in a directory (`marks/`); returns its id. Durable when it returns.
    pub(super) fn write_record<T: minicbor::Encode<()>>(&self, directory: &str, kind: ObjectKind, record: &T) -> Result<[u8; 32]> {
        let sealed = minicbor::to_vec(record)
            .map_err(|e| SealedError::Cbor(e.to_string()))
            .and_then(|body| seal_object(&self.keys, &self.id, kind, &body));
        self.put_named(directory, sealed.map_err(|e| self.sealed_error(kind.word(), e))?)
    }

    /// Publishes an object under its SHA-256 in a directory; returns that. Durable when it returns.
    fn put_named(&self, directory: &str, object: Vec<u8>) -> Result<[u8; 32]> {
        let id: [u8; 32] = Sha256::digest(&object).into();
        self.storage.put_new(&format!("{directory}{}", HEXLOWER.encode(&id)), object)?;
        Ok(id)
    }

    pub fn read_manifest(&self, id: &[u8; 32]) -> Result<Manifest> {
        let name = manifest_name(id);
        let object = self.read_named(&name, id, MAX_MANIFEST_BYTES)?;
        Manifest::open(&self.keys, &self.id, &object).map_err(|e| self.sealed_error(&name, e))
    }

    pub(super) fn write_manifest(&self, manifest: &Manifest) -> Result<[u8; 32]> {
        self.put_named("backups/", manifest.seal(&self.keys).map_err(|e| self.sealed_error("manifest", e))?)
    }

    pub fn delete_manifest(&self, id: &[u8; 32]) -> Result<()> {
        Ok(self.storage.delete(&manifest_name(id))?)
    }

    pub(super) fn read_footer(&self, id: &[u8; 32], size: u64) -> Result<PackContents> {
        let name = pack_name(id);
        let short = || self.damaged(&name, "it is cut off".into());
        if size > MAX_PACK_BYTES {
            return Err(self.damaged(&name, format!("it is {size} bytes long, more than any pack")));
        }
        let header = self.storage.range(&name, 0, (HEADER_BYTES as u64).min(size))?;
        let header = ObjectHeader::parse(&header, &self.id).map_err(|e| self.pack_error(id, e.into()))?;
        let trailer = self.storage.range(&name, size.checked_sub(4).ok_or_else(short)?, 4)?;
        let trailer: [u8; 4] = trailer[..].try_into().map_err(|_| short())?;
        let (start, len) = pack::footer_range(size, trailer).map_err(|e| self.pack_error(id, e))?;
        let sealed = self.storage.range(&name, start, len)?;
        pack::open_footer(&self.keys, &header, &sealed, start).map_err(|e| self.pack_error(id, e))
    }

    /// Publishes a pack; its memory goes back to `memory`. Durable when it returns, but in no index yet.
    pub(super) fn store_pack(&self, pack: BuiltPack, memory: &PackMemory) -> Result<IndexedPack> {
        let id: [u8; 32] = Sha256::digest(&pack.bytes).into();
        let size = pack.bytes.len() as u64;
        self.storage.put_new(&pack_name(&id), pack.bytes.clone())?;
        memory.give(pack.bytes);
        Ok(IndexedPack { id, size, kind: pack.kind, chunks: pack.chunks })
    }

    /// A pack with all its chunks, from the local index or, where that is not whole, from its footer.
    pub(super) fn whole_pack(&self, id: &[u8; 32]) -> Result<IndexedPack> {
        if let Some(pack) = self.local.pack(id)? {
            return Ok(pack);
        }
        self.pack_from_footer(id, None)
    }

    /// What a pack says that it holds; its size is asked for where it is not known.
    pub(super) fn pack_from_footer(&self, id: &[u8; 32], size: Option<u64>) -> Result<IndexedPack> {
        let size = match size {
            Some(size) => size,
            None => self.storage.size(&pack_name(id))?,
        };
        let contents = self.read_footer(id, size)?;
        Ok(IndexedPack { id: *id, size, kind: contents.header.kind, chunks: contents.chunks })
    }

    /// A pack that is to be listed in an index object: as this process put it into the local index while that has it so, else from its
    /// footer. The local index is a cache without sums: were a byte of it wrong, it would be wrong in the repository from now on.
    pub(super) fn pack_to_list(&self, id: &[u8; 32], size: Option<u64>) -> Result<IndexedPack> {
        match self.local.pack_as_added(id)? {
            Some(pack) => Ok(pack),
            None => self.pack_from_footer(id, size),
        }
    }

    /// Whether an index object is there whose bytes are not those it was named by, so that nobody can read it any more.
    pub(super) fn is_damaged_index(&self, id: &[u8; 32]) -> Result<bool> {
        match self.read_named(&format!("index/{}", HEXLOWER.encode(id)), id, MAX_INDEX_BYTES) {
            Ok(_) | Err(RepositoryError::Storage(StorageError::NotFound { .. })) => Ok(false),
            Err(RepositoryError::Damaged { .. }) => Ok(true),
            Err(e) => Err(e),
        }
    }

    /// What a chunk of these bytes is called here.
    pub fn chunk_id(&self, bytes: &[u8]) -> ChunkId {
        pack::chunk_id(&self.chunk_key, bytes)
    }

    /// The content hash of a small file: the first 16 bytes of the keyed BLAKE3 of its contents.
    pub fn content_hash(&self, contents: &[u8]) -> [u8; 16] {
        self.chunk_id(contents).0.first_chunk().copied().unwrap_or_default()
    }

    pub fn lookup(&self, id: &ChunkId) -> Result<Option<Location>> {
        self.local.lookup(id)
    }

    /// Where a chunk lies; its absence is damage.
    pub fn locate(&self, id: &ChunkId) -> Result<Location> {
        match self.local.lookup(id)? {
            Some(at) => Ok(at),
            None => {
                self.second_look(id, None).ok_or_else(|| self.damaged(&format!("chunk {id}"), "no pack of the repository holds it".into()))
            }
        }
    }

    /// Reads and proves one chunk.
    pub fn read_chunk(&self, id: &ChunkId) -> Result<Vec<u8>> {
        let at = self.locate(id)?;
        let first = match self.read_chunk_at(id, &at) {
            // What came damaged may lie there whole.
            Err(RepositoryError::Damaged { .. }) if self.storage.is_remote() => {
                self.forget_cipher(&at.pack);
                self.read_chunk_at(id, &at)
            }
            other => other,
        };
        first.or_else(|e| match may_be_elsewhere(&e).then(|| self.second_look(id, Some(&at))).flatten() {
            Some(at) => self.read_chunk_at(id, &at),
            None => Err(e),
        })
    }

    /// The header of its pack may have come damaged, too.
    pub(super) fn forget_cipher(&self, pack: &[u8; 32]) {
        self.ciphers.lock().unwrap_or_else(PoisonError::into_inner).remove(pack);
    }

    pub(super) fn read_chunk_at(&self, id: &ChunkId, at: &Location) -> Result<Vec<u8>> {
        let cipher = self.pack_cipher(&at.pack, at.kind)?;
        let sealed = self.storage.range(&pack_name(&at.pack), u64::from(at.offset), u64::from(at.sealed_len))?;
        let sealed = SealedChunk { ordinal: u64::from(at.ordinal), id: *id, len: at.len, bytes: &sealed };
        pack::open_chunk(&cipher, &self.chunk_key, &sealed).map_err(|e| self.pack_error(&at.pack, e))
    }

    /// Where the repository itself says that a chunk lies, when it is not (or does not open) where the local index has it: that is a cache,
    /// and may be what is damaged. None: not elsewhere either, or that was asked too often already. The local index learns it.
    pub(super) fn second_look(&self, id: &ChunkId, not: Option<&Location>) -> Option<Location> {
        let may = |left: &AtomicUsize| left.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(1)).is_ok();
        if !may(&self.second_looks) {
            return None;
        }
        if let Some(not) = not {
            match self.pack_from_footer(&not.pack, None).map(|pack| self.opens_in(id, &pack, Some(not))) {
                Ok(Some(at)) => return Some(at),
                // It does not answer.
                Err(RepositoryError::Storage(e)) if !matches!(e, StorageError::NotFound { .. } | StorageError::Short { .. }) => {
                    return None;
                }
                _ => {}
            }
        }
        let places = {
            let mut register = lock(&self.register);
            if register.is_none() && may(&self.index_looks) {
                *register = self.read_register().ok();
            }
            register.as_ref()?.places(id)
        };
        places
            .into_iter()
            .filter_map(|place| self.index_at(place))
            .find_map(|i| i.packs.iter().find_map(|pack| self.opens_in(id, pack, not)))
    }

    /// The index object that has this place in the register.
    fn index_at(&self, place: u32) -> Option<Arc<Index>> {
        let mut register = lock(&self.register);
        let register = register.as_mut()?;
        if let Some((_, index)) = register.last.as_ref().filter(|(last, _)| *last == place) {
            return Some(index.clone());
        }
        let index = Arc::new(self.read_index(register.indexes.get(place as usize)?).ok()?);
        register.last = Some((place, index.clone()));
        Some(index)
    }

    fn read_register(&self) -> Result<Register> {
        let mut register = Register::default();
        for id in self.listed_indexes()? {
            let index = match self.read_index(&id) {
                Ok(index) => index,
                Err(e @ RepositoryError::Storage(_)) => return Err(e),
                Err(_) => continue,
            };
            let place = register.indexes.len() as u32;
            register.indexes.push(id);
            register.chunks.extend(index.packs.iter().flat_map(|pack| &pack.chunks).map(|c| (Register::key(&c.id), place)));
        }
        register.chunks.sort_unstable();
        register.chunks.dedup();
        Ok(register)
    }

    /// Where a chunk lies in a pack that holds this, when it opens there and that is another place than `not`.
    fn opens_in(&self, id: &ChunkId, pack: &IndexedPack, not: Option<&Location>) -> Option<Location> {
        let ordinal = pack.chunks.iter().position(|c| c.id == *id)?;
        let PackedChunk { offset, sealed_len, len, .. } = *pack.chunks.get(ordinal)?;
        let at = Location { pack: pack.id, kind: pack.kind, ordinal: u32::try_from(ordinal).ok()?, offset, sealed_len, len };
        if not == Some(&at) || self.read_chunk_at(id, &at).is_err() {
            return None;
        }
        tracing::warn!("the local index of {} was wrong about chunk {id}: it is mended", self.location());
        let _ = self.local.correct(id, &at);
        Some(at)
    }

    /// The cipher of a pack, from its header.
    pub(super) fn pack_cipher(&self, pack: &[u8; 32], kind: ObjectKind) -> Result<Arc<ObjectCipher>> {
        let ciphers = || self.ciphers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cipher) = ciphers().get(pack) {
            return Ok(cipher.clone());
        }
        let header = self.storage.range(&pack_name(pack), 0, HEADER_BYTES as u64)?;
        let header = ObjectHeader::expect(&header, &self.id, kind).map_err(|e| self.pack_error(pack, e.into()))?;
        let sealed_key = match pack::sealed_key_len(&header) {
            0 => Bytes::new(),
            len => self.storage.range(&pack_name(pack), pack::chunks_end(&self.whole_pack(pack)?.chunks), len as u64)?,
        };
        let cipher = self.keys.pack_cipher(&header, &sealed_key).map_err(|e| self.key_error(pack, e))?;
        let cipher = Arc::new(cipher);
        let mut ciphers = ciphers();
        if ciphers.len() >= MAX_CIPHERS {
            ciphers.clear();
        }
        ciphers.insert(*pack, cipher.clone());
        Ok(cipher)
    }
}

/// Whether a chunk that cannot be had for this reason may lie elsewhere than the local index says.
pub(super) fn may_be_elsewhere(error: &RepositoryError) -> bool {
    match error {
        // One that does not answer says nothing of the local index.
        RepositoryError::Storage(e) => matches!(e, StorageError::NotFound { .. } | StorageError::Short { .. }),
        RepositoryError::Cancelled | RepositoryError::Object { source: CryptoError::NeedsPrivateKey(_), .. } => false,
        _ => true,
    }
}

/// The ids objects are named by.
pub(super) fn ids<T: FromIterator<[u8; 32]>>(names: Vec<String>) -> T {
    names.iter().filter_map(|name| id_of(name)).collect()
}

/// The id an object is named by. Names that are no ids are not ours; they are left alone.
fn id_of(name: &str) -> Option<[u8; 32]> {
    HEXLOWER.decode(name.rsplit('/').next()?.as_bytes()).ok()?.try_into().ok()
}

/// What does not lie where its name belongs is none of ours: it would be asked for where it is not, and nothing would open any more.
fn pack_of(name: &str) -> Option<[u8; 32]> {
    let (directory, hex) = name.strip_prefix("packs/")?.split_once('/')?;
    if directory.len() == 2 && hex.starts_with(directory) && !hex.contains('/') { id_of(hex) } else { None }
}

/// `packs/<2 hex>/<id>`
pub fn pack_name(id: &[u8; 32]) -> String {
    let hex = HEXLOWER.encode(id);
    format!("packs/{}/{hex}", hex.get(..2).unwrap_or_default())
}

pub fn manifest_name(id: &[u8; 32]) -> String {
    format!("backups/{}", HEXLOWER.encode(id))
}

pub(crate) fn parse_config(location: &str, bytes: &[u8]) -> Result<RepositoryConfig> {
    let none = |text: String| RepositoryError::NoRepository { location: location.to_owned(), text };
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let version: Version = serde_json::from_slice(bytes).map_err(|e| none(format!("{CONFIG_NAME} is damaged: {e}")))?;
    if version.format != 1 {
        return Err(none(format!("its format is {}, this keepd knows format 1; use a newer keepd", version.format)));
    }
    serde_json::from_slice(bytes).map_err(|e| none(format!("{CONFIG_NAME} is damaged: {e}")))
}

fn create(storage: &Storage, options: &OpenOptions<'_>) -> Result<RepositoryConfig> {
    let location = storage.location().to_owned();
    storage.prepare()?;
    // A storage with backups but without its keepd.json is damaged, not new.
    let found = storage.names("backups/")?.len();
    if found > 0 {
        return Err(RepositoryError::NoRepository {
            location,
            text: format!("{CONFIG_NAME} is missing, but {found} backups are there; it must not be made anew over them"),
        });
    }
    let crypto = |source| RepositoryError::Object { location: location.clone(), name: CONFIG_NAME.into(), source };
    let id: [u8; 16] = crypto::random().map_err(crypto)?;
    let keys = Keyring::generate().map_err(crypto)?;
    let profile = options.profile;
    let slot = Slot::wrap(&id, profile.map_or("none", |p| &p.name), profile.map(|p| &p.key), &keys).map_err(crypto)?;
    // The key goes first: a repository that says it is one can always be opened.
    let key = to_json(&slot)?;
    let slot = slot_name(&slot.slot);
    storage.put_new(&slot, key)?;
    if storage.is_remote() {
        gives_way(storage, &slot)?;
    }
    let config = RepositoryConfig {
        format: 1,
        repository: HEXLOWER.encode(&id),
        created: jiff::Timestamp::now().to_string(),
        keepd_version: env!("CARGO_PKG_VERSION").into(),
    };
    storage.put_new(CONFIG_NAME, to_json(&config)?)?;
    if storage.is_remote() {
        // Where create-if-absent is ignored another daemon may have made one at the same time; the last one counts. Looked at once more before
        // the first commit.
        std::thread::sleep(SETTLE);
        is_still(storage, &config.repository)?;
    } else if !storage.is_append_only() {
        remove_other_slots(storage, &slot);
    }
    Ok(config)
}

/// What was cut off when it made a repository here left a key slot, which opens nothing. All stay where there is anything that one of them might open. Best effort: they are
/// passed over.
fn remove_other_slots(storage: &Storage, slot: &str) {
    if ["packs/", "index/", "backups/"].iter().all(|kind| storage.names(kind).is_ok_and(|names| names.is_empty())) {
        for other in storage.names("keys/").unwrap_or_default().iter().filter(|name| *name != slot) {
            let _ = storage.delete(other);
        }
    }
}

/// Where create-if-absent is ignored, what is put last counts, also when it was on its way for long: so each one shows itself by its key
/// slot first, then looks for others. Of two that see each other the one whose slot comes first goes on. One that was interrupted here
/// earlier holds nobody up for longer than that.
fn gives_way(storage: &Storage, slot: &str) -> Result<()> {
    let others: Vec<String> = storage.names("keys/")?.into_iter().filter(|name| name != slot).collect();
    if !others.is_empty() {
        let is_first = others.iter().all(|other| slot < other.as_str());
        std::thread::sleep(if is_first { SETTLE } else { 4 * SETTLE });
    }
    match storage.get(CONFIG_NAME, MAX_SMALL_OBJECT) {
        Err(StorageError::NotFound { .. }) => Ok(()),
        Err(e) => Err(e.into()),
        Ok(_) => {
            // A slot of no repository that is there opens nothing and is passed over.
            if !storage.is_append_only() {
                storage.delete(slot)?;
            }
            let text = "another keepd made a repository here at the same time; try again".to_owned();
            Err(RepositoryError::NoRepository { location: storage.location().to_owned(), text })
        }
    }
}

fn is_still(storage: &Storage, id: &str) -> Result<()> {
    let location = storage.location().to_owned();
    let there = parse_config(&location, &storage.get(CONFIG_NAME, MAX_SMALL_OBJECT)?)?;
    match there.repository == id {
        true => Ok(()),
        false => {
            let text = format!("another keepd made repository {} here at the same time; try again", there.repository);
            Err(RepositoryError::NoRepository { location, text })
        }
    }
}

pub(super) fn to_json(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut json = serde_json::to_vec_pretty(value).map_err(|e| RepositoryError::Other(e.to_string()))?;
    json.push(b'\n');
    Ok(json)
}

/// `keys/<slot>.json`
pub fn slot_name(slot: &str) -> String {
    format!("keys/{slot}.json")
}

/// Tries every slot of this repository with every key of the profile; why the best of them does not open is told when none does.
fn unlock(storage: &Storage, id: &[u8; 16], options: &OpenOptions<'_>) -> Result<Keyring> {
    let location = storage.location().to_owned();
    let object = |name: &str, source| RepositoryError::Object { location: location.clone(), name: name.to_owned(), source };
    let (mut found, mut patience, mut unread): (Vec<(CryptoError, String)>, _, _) = (Vec::new(), Patience::default(), None);
    let mut all = Vec::new();
    for (name, slot) in slots::read_all(storage)? {
        match slot {
            Ok(slot) => all.push((name, slot)),
            Err(Unreadable::Slot(e)) => found.push((e, name)),
            // Another one may do.
            Err(Unreadable::Storage(e)) => unread = unread.or(Some(e)),
        }
    }
    // A retired key opens what the profile's own does not: what it opens beside that may have been put there by whoever has it.
    let current = options.profile.map_or_else(|| vec![None], |p| vec![Some(&p.key)]);
    let retired = options.profile.map_or_else(Vec::new, |p| p.retired.iter().map(Some).collect());
    let mut opened: Option<Keyring> = None;
    for keys in [current, retired] {
        if opened.is_some() {
            break;
        }
        for (name, slot) in &all {
            for key in &keys {
                if opened.is_some() && slots::is_dear(slot) {
                    continue;
                }
                if !patience.allows(slot, *key) {
                    found.push((slots::too_many(), name.clone()));
                    continue;
                }
                match slot.unwrap(id, *key) {
                    // While a repository is re-encrypted, and after a crash then, slots of several ages may be there.
                    Ok(keys) => opened = opened.filter(|best| best.age() >= keys.age()).or(Some(keys)),
                    // Left by an interrupted start of another repository here.
                    Err(CryptoError::OtherRepository) => {}
                    Err(source) => found.push((source, name.clone())),
                }
            }
        }
    }
    if let Some(keys) = opened {
        return Ok(keys.sealing_to(options.profile.and_then(|p| p.recipient)));
    }
    if let Some(e) = unread {
        return Err(e.into());
    }
    // What is wrong with a slot, or with a token, says more than that another key is wanted.
    let rank = |e: &CryptoError| match e {
        CryptoError::OtherMethod { .. } => 2,
        CryptoError::WrongKey { .. } | CryptoError::WrongPassphrase => 1,
        _ => 0,
    };
    let known: BTreeSet<String> = found
        .iter()
        .filter_map(|(e, _)| match e {
            CryptoError::WrongKey { known, .. } => Some(known.clone()),
            _ => None,
        })
        .collect();
    let worst = found.into_iter().min_by_key(|(e, _)| rank(e));
    Err(match worst {
        Some((CryptoError::WrongKey { given, .. }, name)) => {
            object(&name, CryptoError::WrongKey { given, known: known.into_iter().collect::<Vec<_>>().join(", ") })
        }
        Some((source, name)) => object(&name, source),
        None => RepositoryError::NoRepository { location, text: "no key slot of it is there (in keys/)".into() },
    })
}
