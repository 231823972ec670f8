//! Storage: one OpenDAL operator, made durable and honest.
//!
//! In: names and bytes. Out: objects that are whole under their name or not there at all. An object is published by
//! create-if-absent; on `fs` it is written under a temporary name, synced, renamed without replacing, and its directory
//! synced (OpenDAL's own `fs` syncs the file but not the directory, its create-if-absent is a check before a
//! rename, and it copies all bytes once more on their way to another thread; so on `fs` objects are read and written
//! here). A listing is complete or an error.

pub mod direct;
mod fs;

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytes::Bytes;
use futures::TryStreamExt;
use opendal::{ErrorKind, Operator};
use tokio::runtime::Handle;

use self::direct::ReadBuffer;
use crate::config::Destination;

/// What was tried, on what, and why it failed.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("{location}: {name} is not there")]
    NotFound { location: String, name: String },
    #[error("{location}: {name} exists already")]
    Exists { location: String, name: String },
    #[error("{location}: no space left while writing {name}; free some space or give the destination more")]
    NoSpace { location: String, name: String },
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
    operator: Operator,
    runtime: Handle,
    /// The directory of an `fs` destination, for what OpenDAL does not do.
    root: Option<PathBuf>,
    location: String,
    /// Told before each operation, by tests that have something happen between two of them.
    #[cfg(test)]
    pub before_each: Option<std::sync::Arc<dyn Fn() + Send + Sync>>,
}

impl Storage {
    /// An operator for a destination; nothing is contacted yet.
    pub fn open(destination: &Destination, runtime: Handle) -> Result<Self> {
        let location = location(&destination.service, &destination.options);
        let failed = |reason: String| StorageError::Failed { location: location.clone(), verb: "open", name: "the storage".into(), reason };
        if destination.service != "fs" {
            return Err(failed(format!("the service '{}' is not built into this keepd; fs is", destination.service)));
        }
        let root = destination.options.get("root").map(PathBuf::from).ok_or_else(|| failed("the option root is missing".into()))?;
        let builder = opendal::services::Fs::default().root(&root.to_string_lossy());
        let operator = Operator::new(builder).map_err(|e| failed(reason(&e)))?;
        Ok(Self {
            operator,
            runtime,
            root: Some(root),
            location,
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

    /// Publishes an object under a name that must be free. When it returns, the object is durable.
    pub fn put_new(&self, name: &str, bytes: impl Into<Bytes>) -> Result<()> {
        let bytes = bytes.into();
        self.begin_operation();
        match &self.root {
            Some(root) => fs::publish(self, root, name, &bytes, fs::Publish::New),
            None => {
                let write = self.operator.write_with(name, bytes).if_not_exists(true);
                self.runtime.block_on(async { write.await }).map(drop).map_err(|e| self.error("write", name, &e))
            }
        }
    }

    /// Writes an object, replacing what is there (the lease only).
    pub fn put(&self, name: &str, bytes: Vec<u8>) -> Result<()> {
        self.begin_operation();
        match &self.root {
            Some(root) => fs::publish(self, root, name, &bytes, fs::Publish::Replace),
            None => self.write(name, bytes),
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
        let end = offset.checked_add(len).ok_or_else(|| self.failed("read", name, "the range is beyond any object".into()))?;
        if let Some(root) = &self.root {
            return fs::read(self, root, name, offset, len, into);
        }
        let read = self.operator.read_with(name).range(offset..end);
        let bytes = self.runtime.block_on(async { read.await }).map_err(|e| self.error("read", name, &e))?.to_bytes();
        if bytes.len() as u64 != len {
            return Err(self.failed("read", name, format!("it is cut off: {} of {len} bytes at {offset} are there", bytes.len())));
        }
        into.fill(&bytes);
        Ok(())
    }

    pub fn size(&self, name: &str) -> Result<u64> {
        if let Some(root) = &self.root {
            return fs::size(self, root, name);
        }
        let meta = self.runtime.block_on(self.operator.stat(name)).map_err(|e| self.error("look at", name, &e))?;
        Ok(meta.content_length())
    }

    pub fn exists(&self, name: &str) -> Result<bool> {
        match self.size(name) {
            Ok(_) => Ok(true),
            Err(StorageError::NotFound { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// All objects whose name starts with `prefix` (a directory name with its slash), sorted by name: the complete list or
    /// an error.
    pub fn list(&self, prefix: &str) -> Result<Vec<Listed>> {
        self.begin_operation();
        if let Some(root) = &self.root {
            return fs::list(self, root, prefix);
        }
        let mut list = Vec::new();
        for (name, size) in self.lister(prefix)? {
            // Where a listing brings no sizes they are asked for; an object that went meanwhile is no longer listed.
            let size = if size == 0 {
                match self.size(&name) {
                    Ok(size) => size,
                    Err(StorageError::NotFound { .. }) => continue,
                    Err(e) => return Err(e),
                }
            } else {
                size
            };
            list.push(Listed { name, size });
        }
        Ok(list)
    }

    /// As [`Storage::list`], the names only, which may cost much less.
    pub fn names(&self, prefix: &str) -> Result<Vec<String>> {
        self.begin_operation();
        match &self.root {
            Some(root) => fs::names(self, root, prefix),
            None => Ok(self.lister(prefix)?.into_iter().map(|(name, _)| name).collect()),
        }
    }

    /// Names and sizes as the service lists them, sorted by name.
    fn lister(&self, prefix: &str) -> Result<Vec<(String, u64)>> {
        let listing = async {
            let mut lister = self.operator.lister_with(prefix).recursive(true).await?;
            let mut found = Vec::new();
            while let Some(entry) = lister.try_next().await? {
                if entry.metadata().is_file() {
                    let known = entry.metadata().content_length();
                    found.push((entry.path().to_owned(), known));
                }
            }
            Ok::<_, opendal::Error>(found)
        };
        let mut found = match self.runtime.block_on(listing) {
            Ok(found) => found,
            // A directory that was never made holds nothing; a store that cannot be reached says something else.
            Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(self.error("list", prefix, &e)),
        };
        found.sort();
        Ok(found)
    }

    /// Removes an object; one that is not there is fine.
    pub fn delete(&self, name: &str) -> Result<()> {
        self.begin_operation();
        self.runtime.block_on(self.operator.delete(name)).map_err(|e| self.error("delete", name, &e))
    }

    /// Removes temporary objects that an interrupted write left behind. Only while no other writer is at work.
    pub fn sweep_temporaries(&self) -> Result<u64> {
        let list = self.list(fs::TEMPORARY)?;
        for object in &list {
            self.delete(&object.name)?;
        }
        Ok(list.len() as u64)
    }

    fn write(&self, name: &str, bytes: Vec<u8>) -> Result<()> {
        self.runtime.block_on(self.operator.write(name, bytes)).map(drop).map_err(|e| self.error("write", name, &e))
    }

    fn failed(&self, verb: &'static str, name: &str, reason: String) -> StorageError {
        StorageError::Failed { location: self.location.clone(), verb, name: name.to_owned(), reason }
    }

    fn error(&self, verb: &'static str, name: &str, error: &opendal::Error) -> StorageError {
        let (location, name) = (self.location.clone(), name.to_owned());
        match error.kind() {
            ErrorKind::NotFound => StorageError::NotFound { location, name },
            ErrorKind::ConditionNotMatch | ErrorKind::AlreadyExists => StorageError::Exists { location, name },
            _ => {
                let reason = reason(error);
                match is_no_space(&reason) {
                    true => StorageError::NoSpace { location, name },
                    false => StorageError::Failed { location, verb, name, reason },
                }
            }
        }
    }
}

/// `fs:/path`: the service and where it points, secrets left out.
pub fn location(service: &str, options: &BTreeMap<String, String>) -> String {
    let place = ["root", "bucket", "endpoint"].iter().filter_map(|k| options.get(*k)).cloned().collect::<Vec<_>>();
    format!("{service}:{}", place.join(" "))
}

/// OpenDAL's error in one line: the cause, without its context dump (which may hold more than people want to see).
fn reason(error: &opendal::Error) -> String {
    let mut text = std::error::Error::source(error).map(|s| s.to_string()).unwrap_or_else(|| error.to_string());
    text.retain(|c| !c.is_control() || c == ' ');
    text
}

fn is_no_space(reason: &str) -> bool {
    reason.contains("os error 28") || reason.contains("No space left") || reason.contains("os error 122")
}
