//! Storage: one OpenDAL operator, made durable and honest.
//!
//! In: names and bytes. Out: objects that are whole under their name or not there at all. An object is published by
//! create-if-absent; on `fs` it is written under a temporary name, synced, renamed without replacing, and its directory
//! synced (OpenDAL's own `fs` syncs the file but not the directory, its create-if-absent is a check before a
//! rename, and it copies all bytes once more on their way to another thread; so on `fs` objects are read and written
//! here). A listing is complete or an error.

pub mod direct;
mod exec;
mod fs;
#[cfg(feature = "services-common")]
mod lock;
pub(crate) mod pace;
pub mod probe;
mod remembered;
mod remote;
mod secret;
mod shared;
pub mod stream;
mod transport;

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures::Future;
use opendal::ErrorKind;
use tokio::runtime::Handle;

use self::direct::ReadBuffer;
use self::remote::Remote;
use self::shared::Shared;
use crate::config::{Destination, OptionValue};
use crate::crypto::{self, CryptoError};

pub(crate) use self::exec::read_all as read_of_plugin;
pub use self::shared::Counters;

/// Where objects are written before they get their name.
const TEMPORARY: &str = "tmp/";

fn temporary_name() -> Result<String, CryptoError> {
    let random: [u8; 12] = crypto::random()?;
    Ok(format!("{TEMPORARY}{}", data_encoding::HEXLOWER.encode(&random)))
}

/// Nobody still writes to a temporary object of this age.
const OLD: std::time::Duration = std::time::Duration::from_secs(86_400);

/// Whether a name is one that [`temporary_name`] gives, or one of a stream.
fn is_temporary_name(name: &str) -> bool {
    let random = name.strip_prefix(TEMPORARY).map(|rest| rest.strip_suffix(fs::STREAM).unwrap_or(rest));
    random.is_some_and(|r| r.len() == 24 && r.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
}

/// What was tried, on what, and why it failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StorageError {
    #[error("{location}: {name} is not there")]
    NotFound { location: String, name: String },
    #[error("{location}: {name} exists already")]
    Exists { location: String, name: String },
    #[error("{location}: no space left while writing {name}; free some space or give the destination more")]
    NoSpace { location: String, name: String },
    /// It answers, and has less than was asked for.
    #[error("{location}: cannot read {name}: {reason}")]
    Short { location: String, name: String, reason: String },
    #[error("{location}: cannot {verb} {name}: {reason}")]
    Failed { location: String, verb: &'static str, name: String, reason: String },
}

pub type Result<T, E = StorageError> = std::result::Result<T, E>;

/// An object of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The whole name, e.g. `packs/ab/abcd…`.
    pub name: String,
    pub size: u64,
}

/// The objects of one destination. Methods block and may be called from threads outside the async runtime only.
#[derive(Clone)]
pub struct Storage {
    place: Place,
    runtime: Handle,
    shared: Arc<Shared>,
    location: String,
    /// keepd never deletes here.
    append_only: bool,
    /// Told before each operation, by tests that have something happen between two of them.
    #[cfg(test)]
    pub before_each: Option<std::sync::Arc<dyn Fn() + Send + Sync>>,
}

#[derive(Clone)]
enum Place {
    /// A directory of this machine.
    Directory(PathBuf),
    Remote(Arc<Remote>),
}

impl Storage {
    /// Nothing is contacted yet; secrets are read.
    pub fn open(destination: &Destination, runtime: Handle) -> Result<Self> {
        let location = location(destination);
        let failed = |reason: String| StorageError::Failed { location: location.clone(), verb: "open", name: "the storage".into(), reason };
        let shared = Shared::of(&location, &destination.transfer);
        let place = match (destination.service.as_str(), destination.directory()) {
            ("fs", Some(root)) => {
                // A backup that is found there counts as one, and the next one refers to packs that are: neither may go with the power.
                crate::durable::believe(root.as_ref()).map_err(|e| failed(format!("what is there cannot be synced: {e}")))?;
                Place::Directory(root.into())
            }
            ("fs", None) => return Err(failed("the option root is missing".into())),
            _ => {
                let _inside = runtime.enter();
                Place::Remote(Arc::new(Remote::open(destination, shared.clone()).map_err(failed)?))
            }
        };
        Ok(Self {
            place,
            runtime,
            shared,
            location,
            append_only: destination.append_only,
            #[cfg(test)]
            before_each: None,
        })
    }

    fn begin_operation(&self) {
        #[cfg(test)]
        if let Some(told) = &self.before_each {
            told();
        }
    }

    /// Where it is, without secrets, for messages.
    pub fn location(&self) -> &str {
        &self.location
    }

    /// Whether keepd must not delete here.
    pub fn is_append_only(&self) -> bool {
        self.append_only
    }

    /// Makes the place where a repository is to begin, if that is a directory of this machine.
    pub fn prepare(&self) -> Result<()> {
        match &self.place {
            Place::Directory(root) => {
                crate::durable::make_directories(root).map_err(|e| self.failed("make", "the directory", e.to_string()))
            }
            Place::Remote(_) => Ok(()),
        }
    }

    /// Packs that were deleted stay away when this returns ([`Storage::delete`] alone does not see to that for packs). Elsewhere a deletion is what the service makes of it.
    pub fn settle(&self) -> Result<()> {
        match &self.place {
            Place::Directory(root) => std::fs::File::open(root)
                .and_then(|root| Ok(keepd_writer::syncfs(&root)?))
                .map_err(|e| self.failed("sync", "the directory", e.to_string())),
            Place::Remote(_) => Ok(()),
        }
    }

    /// Whether it is beyond this machine.
    pub fn is_remote(&self) -> bool {
        matches!(self.place, Place::Remote(_))
    }

    /// Whether another machine may write there as well, a copy of this one among them.
    pub fn may_be_shared(&self) -> bool {
        match &self.place {
            Place::Directory(root) => fs::is_of_a_network(root),
            Place::Remote(_) => true,
        }
    }

    /// False where two writers may both believe that they made an object.
    pub fn creates_if_absent(&self) -> bool {
        match &self.place {
            Place::Directory(_) => true,
            Place::Remote(remote) => remote.creates_if_absent(),
        }
    }

    /// Publishes an object under a name that must be free. When it returns, the object is durable.
    pub fn put_new(&self, name: &str, bytes: impl Into<Bytes>) -> Result<()> {
        let bytes = bytes.into();
        self.begin_operation();
        match &self.place {
            Place::Directory(root) => fs::publish(self, root, name, &bytes, fs::Publish::New),
            Place::Remote(remote) => self.wait("write", name, remote.publish_new(name, &bytes)),
        }
    }

    /// Locks objects that are there for another period, where the destination locks its objects.
    pub fn renew_locks(&self, names: &[String]) -> Result<()> {
        match &self.place {
            Place::Directory(_) => Ok(()),
            Place::Remote(remote) => self.wait("lock", "the objects in use", remote.renew_locks(names)),
        }
    }

    /// Writes an object, replacing what is there (the lease only).
    pub fn put(&self, name: &str, bytes: Vec<u8>) -> Result<()> {
        self.begin_operation();
        match &self.place {
            Place::Directory(root) => fs::publish(self, root, name, &bytes, fs::Publish::Replace),
            Place::Remote(remote) => self.wait("write", name, remote.publish(name, &bytes.into())),
        }
    }

    /// The whole object; an error when it is longer than `limit` bytes.
    pub fn get(&self, name: &str, limit: u64) -> Result<Bytes> {
        let mut buffer = ReadBuffer::default();
        self.get_into(name, limit, &mut buffer)?;
        Ok(buffer.into())
    }

    /// As [`Storage::get`], into memory that is used again.
    pub fn get_into(&self, name: &str, limit: u64, into: &mut ReadBuffer) -> Result<()> {
        if let Place::Remote(remote) = &self.place
            && remote.can_read_whole()
        {
            self.begin_operation();
            return self.wait("read", name, remote.read_whole(name, limit, into));
        }
        let size = self.size(name)?;
        if size > limit {
            return Err(self.failed("read", name, format!("it is {size} bytes long, more than the {limit} such an object may have")));
        }
        self.range_into(name, 0, size, into)
    }

    /// Exactly `len` bytes from `offset`; a shorter object is an error.
    pub fn range(&self, name: &str, offset: u64, len: u64) -> Result<Bytes> {
        let mut buffer = ReadBuffer::default();
        self.range_into(name, offset, len, &mut buffer)?;
        Ok(buffer.into())
    }

    /// As [`Storage::range`], into memory that is used again.
    pub fn range_into(&self, name: &str, offset: u64, len: u64, into: &mut ReadBuffer) -> Result<()> {
        self.begin_operation();
        if offset.checked_add(len).is_none() {
            return Err(self.failed("read", name, "the range is beyond any object".into()));
        }
        match &self.place {
            Place::Directory(root) => fs::read(self, root, name, offset, len, into),
            Place::Remote(remote) => self.runtime.block_on(remote.read(name, offset, len, into)).map_err(|e| match e.kind() {
                ErrorKind::RangeNotSatisfied => self.short(name, remote::reason(&e)),
                _ => self.error("read", name, &e),
            }),
        }
    }

    pub fn size(&self, name: &str) -> Result<u64> {
        match &self.place {
            Place::Directory(root) => fs::size(self, root, name),
            Place::Remote(remote) => self.wait("look at", name, remote.size(name)),
        }
    }

    pub fn exists(&self, name: &str) -> Result<bool> {
        Ok(self.size_if_there(name)?.is_some())
    }

    /// All objects whose name starts with `prefix` (a directory name with its slash), sorted by name: the complete list or
    /// an error.
    pub fn list(&self, prefix: &str) -> Result<Vec<Listed>> {
        let mut list = Vec::new();
        for (name, size) in self.list_as_it_comes(prefix, false)? {
            // Where a listing brings no sizes they are asked for; an object that went meanwhile is no longer listed.
            let size = match size {
                Some(size) => Some(size),
                None => self.size_if_there(&name)?,
            };
            list.extend(size.map(|size| Listed { name, size }));
        }
        Ok(list)
    }

    /// As [`Storage::list`], with the sizes that the listing itself brings: none where each costs a call of its own.
    /// `remember`: on a file system of this machine a directory that did not change since it was listed last need not be listed again (at most an hour
    /// after that); not for who concludes from the listing that something may go, or is whole.
    pub fn list_as_it_comes(&self, prefix: &str, remember: bool) -> Result<Vec<(String, Option<u64>)>> {
        self.begin_operation();
        let mut list: Vec<_> = match &self.place {
            Place::Directory(root) => return Ok(fs::names(self, root, prefix, remember)?.into_iter().map(|name| (name, None)).collect()),
            Place::Remote(remote) => {
                let listed = self.wait("list", prefix, remote.list(prefix))?.into_iter();
                listed.map(|o| (o.name, Some(o.size).filter(|size| *size > 0))).collect()
            }
        };
        list.sort();
        Ok(list)
    }

    /// What stands for the names of all objects below these prefixes: as long as it is the same nothing came or went. None where that would have to be
    /// listed.
    pub fn state(&self, prefixes: &[&str]) -> Option<[u8; 32]> {
        match &self.place {
            Place::Directory(root) => fs::state(root, prefixes),
            Place::Remote(_) => None,
        }
    }

    /// As [`Storage::list`], the names only, which may cost much less.
    pub fn names(&self, prefix: &str) -> Result<Vec<String>> {
        Ok(self.list_as_it_comes(prefix, false)?.into_iter().map(|(name, _)| name).collect())
    }

    /// The size of an object; None where there is none.
    pub fn size_if_there(&self, name: &str) -> Result<Option<u64>> {
        match self.size(name) {
            Ok(size) => Ok(Some(size)),
            Err(StorageError::NotFound { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The sizes of objects, in their order; None where there is none. Many at once cost less than one by one.
    pub fn sizes_if_there(&self, names: &[String]) -> Result<Vec<Option<u64>>> {
        match &self.place {
            Place::Directory(root) => fs::sizes_if_there(self, root, names),
            Place::Remote(_) => names.iter().map(|name| self.size_if_there(name)).collect(),
        }
    }

    /// An error when one of these objects is there, which the listing of `prefix` lacks: then that is an old one or not complete, and nothing may be concluded
    /// from it. The first few are looked at; they must have been there before the listing was asked for.
    pub fn are_gone(&self, prefix: &str, names: impl IntoIterator<Item = String>) -> Result<()> {
        const LOOKED_AT: usize = 100;
        for name in names.into_iter().take(LOOKED_AT) {
            if self.exists(&name)? {
                let reason =
                    format!("the listing lacks {name}, which is there: it is old or not complete, and nothing is concluded from it");
                return Err(self.failed("list", prefix, reason));
            }
        }
        Ok(())
    }

    /// Removes an object; one that is not there is fine. An error where nothing may be deleted.
    pub fn delete(&self, name: &str) -> Result<()> {
        if self.append_only {
            return Err(self.failed("delete", name, "the destination is append_only: keepd deletes nothing there".into()));
        }
        self.delete_even_here(name)
    }

    /// As [`Storage::delete`], also where keepd deletes nothing otherwise.
    fn delete_even_here(&self, name: &str) -> Result<()> {
        self.begin_operation();
        match &self.place {
            Place::Directory(root) => fs::delete(self, root, name),
            Place::Remote(remote) => self.wait("delete", name, remote.delete(name)),
        }
    }

    /// Removes temporary objects that an interrupted write left behind. Only while no other writer is at work.
    pub fn sweep_temporaries(&self) -> Result<u64> {
        let list = match &self.place {
            Place::Directory(root) => fs::list(self, root, TEMPORARY)?,
            Place::Remote(remote) => self.wait("list", TEMPORARY, remote.leftovers())?,
        };
        for object in &list {
            self.delete(&object.name)?;
        }
        Ok(list.len() as u64)
    }

    /// Removes what an interrupted [`Storage::writer`], or a write of another kind a day ago, left behind, and nothing that somebody still writes; how many those were.
    pub fn sweep_streams(&self) -> Result<u64> {
        let mut swept = 0;
        match &self.place {
            Place::Directory(root) => swept += fs::sweep_unlocked(self, root)?,
            Place::Remote(remote) => {
                let leftovers = self.wait("list", TEMPORARY, remote.leftovers())?;
                for object in leftovers.into_iter().filter(|o| is_temporary_name(&o.name)) {
                    let modified = self.wait("look at", &object.name, remote.modified(&object.name))?;
                    // Nobody can tell there who still writes.
                    if modified.and_then(|t| t.elapsed().ok()).is_some_and(|age| age > OLD) {
                        self.delete(&object.name)?;
                        swept += 1;
                    }
                }
            }
        }
        Ok(swept)
    }

    fn wait<T>(&self, verb: &'static str, name: &str, work: impl Future<Output = Result<T, opendal::Error>>) -> Result<T> {
        self.runtime.block_on(work).map_err(|e| self.error(verb, name, &e))
    }

    fn failed(&self, verb: &'static str, name: &str, reason: String) -> StorageError {
        StorageError::Failed { location: self.location.clone(), verb, name: name.to_owned(), reason }
    }

    fn short(&self, name: &str, reason: String) -> StorageError {
        StorageError::Short { location: self.location.clone(), name: name.to_owned(), reason }
    }

    fn error(&self, verb: &'static str, name: &str, error: &opendal::Error) -> StorageError {
        let (location, name) = (self.location.clone(), name.to_owned());
        let reason = remote::reason(error);
        match error.kind() {
            // Where an object goes, something else is missing: the bucket, or the directory.
            ErrorKind::NotFound if verb != "write" && verb != "list" => StorageError::NotFound { location, name },
            ErrorKind::ConditionNotMatch | ErrorKind::AlreadyExists => StorageError::Exists { location, name },
            kind if kind == ErrorKind::PermissionDenied || is_denied(&reason) => StorageError::Failed {
                location,
                verb,
                name,
                reason: format!("not permitted; are the credentials right, and their rights? ({reason})"),
            },
            _ if is_no_space(&reason) => StorageError::NoSpace { location, name },
            _ => StorageError::Failed { location, verb, name, reason },
        }
    }
}

/// `fs:/path`, `s3:bucket/prefix at https://host`: the service and where it points, secrets left out.
pub fn location(destination: &Destination) -> String {
    let service = &destination.service;
    let option = |names: &[&str]| names.iter().find_map(|name| destination.options.get(*name).and_then(OptionValue::plain));
    if service == "exec" {
        let program = destination.command.first().map_or("", String::as_str);
        return format!("exec:{} through {program}", destination.name);
    }
    let mut text =
        format!("{service}:{}", option(&["bucket", "container", "filesystem", "share_name", "share", "repo_name"]).unwrap_or_default());
    if let Some(root) = option(&["root"]) {
        if !root.starts_with('/') && !text.ends_with(':') {
            text.push('/');
        }
        text.push_str(root);
    }
    if let Some(endpoint) = option(&["endpoint"]) {
        // A password may stand before the host.
        let (scheme, rest) = endpoint.split_once("://").map_or(("", endpoint), |(s, r)| (s, r));
        let host = rest.rsplit_once('@').map_or(rest, |(user, host)| if user.contains(':') { host } else { rest });
        let scheme = if scheme.is_empty() { String::new() } else { format!("{scheme}://") };
        let at = if text.ends_with(':') { "" } else { " at " };
        text.push_str(&format!("{at}{scheme}{host}"));
    }
    text
}

/// What a place has been used for since the daemon started.
pub fn counters(destination: &Destination) -> Counters {
    Shared::counters(&location(destination))
}

/// An error's text with those of its causes.
pub fn with_causes(text: &str, mut cause: Option<&(dyn std::error::Error + 'static)>) -> String {
    let mut text = text.to_owned();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}

/// What services say of wrong credentials that OpenDAL has no kind for.
fn is_denied(reason: &str) -> bool {
    const WORDS: [&str; 6] = ["401 Unauthorized", "403 Forbidden", "Permission denied (", "NotLoggedIn", "Not logged in", "[530]"];
    WORDS.iter().any(|words| reason.contains(words))
}

fn is_no_space(reason: &str) -> bool {
    const WORDS: [&str; 9] = [
        // Insufficient Storage, from a server that says no more.
        "the storage answered 507",
        "os error 28",
        "os error 122",
        "No space left",
        "QuotaExceeded",
        "InsufficientStorage",
        "Insufficient Storage",
        "quota exceeded",
        "storage limit",
    ];
    WORDS.iter().any(|words| reason.contains(words))
}
