//! Objects of a service beyond this machine, through its OpenDAL operator.
//!
//! Whatever the service: an object appears whole under its name, an operation that fails in passing is tried again after growing
//! pauses, one that does not go on ends, and bytes go at the configured pace. Every object is smaller than what any service takes in
//! one request, so nothing is uploaded in parts, and nothing of such uploads can be left over.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use bytes::{Buf, Bytes};
use futures::{Future, StreamExt, TryStreamExt};
use opendal::{Buffer, Error, ErrorKind, HttpTransporter, OperationContext, Operator};
use tokio::time::timeout;

use super::direct::ReadBuffer;
use super::shared::Shared;
use super::transport::Transport;
use super::{Listed, TEMPORARY, exec, secret, temporary_name, with_causes};
use crate::config::{self, Destination, Retry};

/// How a service can publish an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Publishing {
    /// A request whose object appears whole, on the condition that there is none of its name.
    Conditional,
    /// A request whose object appears whole, on no condition.
    Whole,
    /// Under another name first, then renamed: what is being written can be seen.
    Rename,
}

pub(super) struct Remote {
    operator: Operator,
    publishing: Publishing,
    /// It has directories, each listed by itself, and one that nothing was written to yet is not there.
    has_directories: bool,
    reads_from_start: bool,
    /// keepd deletes here.
    may_delete: bool,
    /// Where transfers are not watched below.
    patience: Option<Duration>,
    retry: Retry,
    #[cfg(feature = "services-common")]
    lock: Option<super::lock::ObjectLock>,
    shared: Arc<Shared>,
}

/// An object that is being written.
pub(super) struct Upload {
    writer: opendal::Writer,
    /// The name that it has until it is whole.
    under: String,
}

const LONGEST_PAUSE: Duration = Duration::from_secs(30);

impl Remote {
    /// Contacts nothing yet.
    pub fn open(destination: &Destination, shared: Arc<Shared>) -> Result<Self, String> {
        let options = secret::resolve(&destination.options)?;
        let transfer = &destination.transfer;
        #[cfg(feature = "services-common")]
        let mut lock = None;
        let (operator, watched) = match destination.service.as_str() {
            // The plugin's side sees to pace and patience by itself.
            "exec" => (exec::operator(&destination.command, options, transfer.timeout, shared.clone()), true),
            service => {
                let operator = config::operator(service, options.clone()).map_err(|e| reason(&e))?;
                match service {
                    "sftp" | "ftp" => (operator, false),
                    _ => {
                        let transport = Transport::new(shared.clone(), transfer.timeout, transfer.ca_file.as_deref())?;
                        let transport = HttpTransporter::new(transport);
                        #[cfg(feature = "services-common")]
                        if let Some(period) = destination.object_lock {
                            lock = Some(super::lock::ObjectLock::new(&options, period, destination.compliance_lock, transport.clone())?);
                        }
                        let context = OperationContext::new().with_http_transport(transport);
                        (operator.with_context(context), true)
                    }
                }
            }
        };
        let able = operator.info().capability();
        // OpenDAL's ftp writes under a name of its own and renames.
        let publishing = match destination.service.as_str() {
            "sftp" | "webdav" => Publishing::Rename,
            _ if able.write_with_if_not_exists => Publishing::Conditional,
            _ => Publishing::Whole,
        };
        Ok(Self {
            has_directories: matches!(destination.service.as_str(), "sftp" | "ftp" | "webdav"),
            reads_from_start: destination.service == "ftp",
            may_delete: !destination.append_only,
            operator,
            publishing,
            patience: (!watched).then_some(transfer.timeout),
            retry: transfer.retry.clone(),
            #[cfg(feature = "services-common")]
            lock,
            shared,
        })
    }

    /// Runs an operation until it succeeds, fails for good, or was tried often enough.
    async fn persistently<T, F: Future<Output = Result<T, Error>>>(&self, operation: impl FnMut() -> F) -> Result<T, Error> {
        let places = self.shared.places();
        // The semaphore is never closed.
        let _place = places.acquire().await;
        self.shared.began();
        let pauses = ExponentialBuilder::default()
            .with_jitter()
            .with_min_delay(self.retry.backoff.max(Duration::from_millis(1)))
            .with_max_delay(LONGEST_PAUSE.max(self.retry.backoff))
            .with_max_times(self.retry.attempts.saturating_sub(1) as usize);
        let result = operation
            .retry(pauses)
            .when(|e| may_pass(e, self.patience.is_none()))
            .notify(|e, pause| {
                self.shared.retried();
                tracing::warn!("{}; tried again in {:.1} s", reason(e), pause.as_secs_f64());
            })
            .await;
        if matches!(&result, Err(e) if !matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConditionNotMatch | ErrorKind::AlreadyExists)) {
            self.shared.failed();
        }
        result
    }

    /// An end for what does not go on.
    async fn patiently<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        match self.patience {
            None => work.await,
            Some(patience) => timeout(patience, work).await.unwrap_or_else(|_| {
                Err(Error::new(ErrorKind::Unexpected, format!("no answer for {} s", patience.as_secs())).set_temporary())
            }),
        }
    }

    /// Publishes an object under a name that must be free; it is free, too, when what is there has these very bytes: then it is what an
    /// attempt wrote whose answer was lost.
    pub async fn publish_new(&self, name: &str, bytes: &Bytes) -> Result<(), Error> {
        self.persistently(|| async {
            if self.publishing == Publishing::Conditional {
                match self.write(name, bytes, true).await {
                    Ok(()) => return self.arrived(name, bytes).await,
                    Err(e) if is_there(&e) => return self.is_ours(name, bytes).await,
                    // Some compatible services refuse the condition instead of ignoring it.
                    Err(e) if is_not_built(&e) => {}
                    other => return other,
                }
            }
            if !self.must_be_free(name, bytes).await? {
                return Ok(());
            }
            self.write_whole(name, bytes).await?;
            match self.publishing {
                Publishing::Whole => self.has_size(name, bytes.len()).await,
                _ => Ok(()),
            }
        })
        .await?;
        self.lock(name).await
    }

    #[cfg(feature = "services-common")]
    async fn lock(&self, name: &str) -> Result<(), Error> {
        match self.lock.as_ref().filter(|_| super::lock::ObjectLock::covers(name)) {
            Some(lock) => self.persistently(|| lock.lock(name)).await,
            None => Ok(()),
        }
    }

    #[cfg(not(feature = "services-common"))]
    async fn lock(&self, _: &str) -> Result<(), Error> {
        Ok(())
    }

    /// Locks objects for another period; one that went meanwhile is fine.
    pub async fn renew_locks(&self, names: &[String]) -> Result<(), Error> {
        let renew = |name: &String| {
            let name = name.clone();
            async move {
                match self.lock(&name).await {
                    Err(_) if matches!(self.operator.exists(&name).await, Ok(false)) => Ok(()),
                    other => other,
                }
            }
        };
        futures::stream::iter(names.iter().map(renew)).map(Ok).try_for_each_concurrent(8, |work| work).await
    }

    /// Writes an object, replacing what is there.
    pub async fn publish(&self, name: &str, bytes: &Bytes) -> Result<(), Error> {
        self.persistently(|| async {
            self.write_whole(name, bytes).await?;
            match self.publishing {
                Publishing::Rename => Ok(()),
                _ => self.has_size(name, bytes.len()).await,
            }
        })
        .await
    }

    /// Writes an object so that it appears whole, whatever is there.
    async fn write_whole(&self, name: &str, bytes: &Bytes) -> Result<(), Error> {
        match self.publishing {
            Publishing::Rename => self.write_and_rename(name, bytes).await,
            _ => self.write(name, bytes, false).await,
        }
    }

    /// True when there is no such object; false when there is one that has these bytes.
    async fn must_be_free(&self, name: &str, bytes: &Bytes) -> Result<bool, Error> {
        match self.patiently(self.operator.stat(name)).await {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(true),
            Err(e) => Err(e),
            Ok(there) => self.has_bytes(name, there.content_length(), bytes).await.map(|()| false),
        }
    }

    /// Whether all of an object is there that was just made. The beginning of it is removed again, for under its name it would be taken for
    /// damage; what is no beginning of it somebody else may have put there at the same time, where the service ignores the condition.
    async fn arrived(&self, name: &str, bytes: &Bytes) -> Result<(), Error> {
        let there = self.patiently(self.operator.stat(name)).await.map_err(is_late)?.content_length();
        if there == bytes.len() as u64 {
            return Ok(());
        }
        let mut found = ReadBuffer::default();
        let is_beginning = match there < bytes.len() as u64 {
            true => self.read_once(name, 0, there, &mut found).await.is_ok_and(|()| bytes.starts_with(&found[..])),
            false => false,
        };
        if is_beginning && self.may_delete {
            let _ = self.patiently(self.operator.delete(name)).await;
        }
        Err(Error::new(ErrorKind::Unexpected, format!("{there} of {} bytes arrived", bytes.len())).set_temporary())
    }

    /// An error unless the object that is there has these bytes.
    async fn is_ours(&self, name: &str, bytes: &Bytes) -> Result<(), Error> {
        let size = self.patiently(self.operator.stat(name)).await.map_err(is_late)?.content_length();
        self.has_bytes(name, size, bytes).await.map_err(is_late)
    }

    /// The same of an object of a known size.
    async fn has_bytes(&self, name: &str, size: u64, bytes: &Bytes) -> Result<(), Error> {
        let taken = || Error::new(ErrorKind::AlreadyExists, "there is another object of this name");
        if size != bytes.len() as u64 {
            return Err(taken());
        }
        let mut there = ReadBuffer::default();
        self.read_once(name, 0, size, &mut there).await?;
        if there[..] == bytes[..] { Ok(()) } else { Err(taken()) }
    }

    async fn write_and_rename(&self, name: &str, bytes: &Bytes) -> Result<(), Error> {
        let temporary = temporary_name().map_err(|e| Error::new(ErrorKind::Unexpected, e.to_string()))?;
        let written = async {
            self.write(&temporary, bytes, false).await?;
            self.has_size(&temporary, bytes.len()).await?;
            match self.patiently(self.operator.rename(&temporary, name)).await {
                Ok(()) => self.has_size(name, bytes.len()).await,
                Err(e) => self.renamed_all_the_same(&temporary, name, bytes).await.unwrap_or(Err(e)),
            }
        };
        let result = written.await;
        if result.is_err() {
            // Best effort: what cannot be removed now is swept by the next prune.
            let _ = self.patiently(self.operator.delete(&temporary)).await;
        }
        result
    }

    /// What a renaming that was told to have failed came to: it is done where its answer was lost. Where a proxy asked twice, the second one found nothing to rename, and
    /// WebDAV removes what is in the way before it looks: then neither is there, and it may be written again. None: it was not done.
    async fn renamed_all_the_same(&self, from: &str, to: &str, bytes: &Bytes) -> Option<Result<(), Error>> {
        if self.is_ours(to, bytes).await.is_ok() {
            return Some(Ok(()));
        }
        let is_gone = matches!(self.patiently(self.operator.stat(from)).await, Err(e) if e.kind() == ErrorKind::NotFound);
        is_gone.then(|| Err(Error::new(ErrorKind::Unexpected, "it was to be renamed, and is gone").set_temporary()))
    }

    async fn has_size(&self, name: &str, size: usize) -> Result<(), Error> {
        let there = self.patiently(self.operator.stat(name)).await.map_err(is_late)?.content_length();
        if there == size as u64 {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unexpected, format!("{there} of {size} bytes arrived")).set_temporary())
    }

    async fn write(&self, name: &str, bytes: &Bytes, if_absent: bool) -> Result<(), Error> {
        if self.patience.is_none() {
            // In one request; the transport sees to the rest.
            return self.operator.write_with(name, Buffer::from(bytes.clone())).if_not_exists(if_absent).await.map(drop);
        }
        let mut writer = self.patiently(async { self.operator.writer_with(name).if_not_exists(if_absent).await }).await?;
        let mut left = bytes.clone();
        while !left.is_empty() {
            let len = self.shared.next_piece(left.len()).await;
            let piece = left.split_to(len);
            self.patiently(writer.write(piece)).await?;
            self.shared.went(len);
        }
        self.patiently(writer.close()).await.map(drop)
    }

    /// Begins an object whose length is not known yet. It counts when [`Remote::finish_upload`] was there.
    pub async fn begin_upload(&self, name: &str) -> Result<Upload, Error> {
        let under = match self.publishing {
            Publishing::Rename => temporary_name().map_err(|e| Error::new(ErrorKind::Unexpected, e.to_string()))?,
            _ => name.to_owned(),
        };
        let writer = self.persistently(|| self.patiently(async { self.operator.writer_with(&under).await })).await?;
        Ok(Upload { writer, under })
    }

    /// The next part of it, tried again where that may help.
    pub async fn send_part(&self, upload: &mut Upload, part: Bytes) -> Result<(), Error> {
        let places = self.shared.places();
        // The semaphore is never closed.
        let _place = places.acquire().await;
        self.shared.began();
        if self.patience.is_some() {
            // A stream: what went cannot be sent again.
            let mut left = part;
            while !left.is_empty() {
                let len = self.shared.next_piece(left.len()).await;
                let piece = left.split_to(len);
                self.patiently(upload.writer.write(piece)).await.inspect_err(|_| self.shared.failed())?;
                self.shared.went(len);
            }
            return Ok(());
        }
        let mut pause = self.retry.backoff.max(Duration::from_millis(1));
        for attempt in 1.. {
            match upload.writer.write(part.clone()).await {
                Err(e) if attempt < self.retry.attempts && may_pass(&e, true) => {
                    self.shared.retried();
                    tracing::warn!("{}; tried again in {:.1} s", reason(&e), pause.as_secs_f64());
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                Err(e) => {
                    self.shared.failed();
                    return Err(e);
                }
                Ok(()) => break,
            }
        }
        Ok(())
    }

    /// Publishes it, unless something of its name came meanwhile.
    pub async fn finish_upload(&self, mut upload: Upload, name: &str, size: u64) -> Result<(), Error> {
        let finished = async {
            let mut pause = self.retry.backoff.max(Duration::from_millis(1));
            let mut attempt = 0;
            loop {
                attempt += 1;
                match self.patiently(upload.writer.close()).await {
                    Err(e) if attempt < self.retry.attempts && self.patience.is_none() && may_pass(&e, true) => {
                        self.shared.retried();
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(LONGEST_PAUSE);
                    }
                    other => break other.map(drop)?,
                }
            }
            if self.publishing != Publishing::Rename {
                return Ok(());
            }
            self.has_size(&upload.under, size as usize).await?;
            match self.patiently(self.operator.stat(name)).await {
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(e),
                Ok(_) => return Err(Error::new(ErrorKind::AlreadyExists, "there is another object of this name")),
            }
            match self.patiently(self.operator.rename(&upload.under, name)).await {
                Ok(()) => Ok(()),
                Err(e) => match self.was_renamed(&upload.under, name, size).await {
                    true => Ok(()),
                    false => Err(e),
                },
            }
        };
        let result = finished.await;
        if result.is_err() {
            self.abort_upload(upload).await;
        }
        result
    }

    /// Whether a renaming that was told to have failed was done: the answer was lost, or a proxy asked twice.
    async fn was_renamed(&self, from: &str, to: &str, size: u64) -> bool {
        let there = self.patiently(self.operator.stat(to)).await;
        there.is_ok_and(|there| there.content_length() == size)
            && matches!(self.patiently(self.operator.stat(from)).await, Err(e) if e.kind() == ErrorKind::NotFound)
    }

    /// Gives it up. Best effort: what cannot be removed now is swept later.
    pub async fn abort_upload(&self, mut upload: Upload) {
        let aborted = self.patiently(upload.writer.abort()).await;
        if self.publishing == Publishing::Rename {
            let _ = self.patiently(upload.writer.close()).await;
            let _ = self.patiently(self.operator.delete(&upload.under)).await;
        } else if let Err(e) = aborted {
            tracing::warn!("an upload could not be given up: {}", reason(&e));
        }
    }

    /// Names and sizes at the top, not in directories. A size of 0 is one that the listing did not bring.
    pub async fn top(&self) -> Result<Vec<Listed>, Error> {
        self.persistently(|| async {
            match self.list_once("", false).await {
                Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
                other => Ok(other?.0),
            }
        })
        .await
    }

    /// OpenDAL's ftp does not notice the end of an object whose length it was not told.
    pub fn can_read_whole(&self) -> bool {
        !self.reads_from_start
    }

    /// All of an object, in one request; an error when it is longer than `limit` bytes.
    pub async fn read_whole(&self, name: &str, limit: u64, into: &mut ReadBuffer) -> Result<(), Error> {
        let read = self.persistently(|| async {
            let mut stream = self.patiently(async { self.operator.reader(name).await?.into_stream(..).await }).await?;
            let (mut pieces, mut len) = (Vec::new(), 0);
            while let Some(buffer) = self.patiently(stream.try_next()).await? {
                len += buffer.len();
                if len as u64 > limit {
                    let text = format!("it is longer than the {limit} bytes such an object may have");
                    return Err(Error::new(ErrorKind::RangeNotSatisfied, text));
                }
                if self.patience.is_some() {
                    self.shared.came(buffer.len()).await;
                }
                pieces.push(buffer);
            }
            Ok((pieces, len))
        });
        let (pieces, len) = read.await?;
        let mut place = into.place(len);
        for piece in pieces.into_iter().flatten() {
            let (part, rest) = place.split_at_mut(piece.len().min(place.len()));
            part.copy_from_slice(piece.get(..part.len()).unwrap_or_default());
            place = rest;
        }
        Ok(())
    }

    /// Exactly `len` bytes from `offset`.
    pub async fn read(&self, name: &str, offset: u64, len: u64, into: &mut ReadBuffer) -> Result<(), Error> {
        let into = tokio::sync::Mutex::new(into);
        self.persistently(|| async { self.read_once(name, offset, len, *into.lock().await).await }).await
    }

    /// What is cut off for good is told apart from what was cut off on its way.
    async fn read_once(&self, name: &str, offset: u64, len: u64, into: &mut ReadBuffer) -> Result<(), Error> {
        let result = self.read_range(name, offset, len, into).await;
        let Err(e) = &result else { return result };
        if e.kind() == ErrorKind::NotFound {
            return result;
        }
        match self.patiently(self.operator.stat(name)).await {
            Ok(there) if there.content_length() < offset + len => Err(Error::new(
                ErrorKind::RangeNotSatisfied,
                format!("it is cut off: {} of {len} bytes at {offset} are there", there.content_length().saturating_sub(offset)),
            )),
            _ => result,
        }
    }

    async fn read_range(&self, name: &str, offset: u64, len: u64, into: &mut ReadBuffer) -> Result<(), Error> {
        let place = into.place(len as usize);
        if place.is_empty() {
            return Ok(());
        }
        // OpenDAL's ftp says where to begin before it opens the data connection, and servers forget it over that.
        let mut skip = if self.reads_from_start { offset as usize } else { 0 };
        let opened = async { self.operator.reader(name).await?.into_stream(offset - skip as u64..offset + len).await };
        let mut stream = self.patiently(opened).await?;
        let mut at = 0;
        while let Some(buffer) = self.patiently(stream.try_next()).await? {
            for mut piece in buffer {
                let skipped = skip.min(piece.len());
                piece.advance(skipped);
                skip -= skipped;
                let Some(part) = place.get_mut(at..at + piece.len()) else {
                    return Err(Error::new(ErrorKind::Unexpected, "more bytes came than were asked for"));
                };
                part.copy_from_slice(&piece);
                at += piece.len();
                if self.patience.is_some() {
                    self.shared.came(piece.len()).await;
                }
            }
        }
        match at == place.len() {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Unexpected, format!("it is cut off: {at} of {len} bytes at {offset} came")).set_temporary()),
        }
    }

    pub async fn size(&self, name: &str) -> Result<u64, Error> {
        self.persistently(|| async { Ok(self.patiently(self.operator.stat(name)).await?.content_length()) }).await
    }

    /// When an object was written, by the service's clock.
    pub async fn modified(&self, name: &str) -> Result<Option<std::time::SystemTime>, Error> {
        self.persistently(|| async { Ok(self.patiently(self.operator.stat(name)).await?.last_modified().map(Into::into)) }).await
    }

    /// Names and sizes below a directory (with its slash, or empty for the top): all of them or an error. A size of 0 is one that the listing did
    /// not bring. Services that list one directory at a time are walked here: OpenDAL's own walk leaves out what fails in a certain way, and
    /// never ends with some.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Listed>, Error> {
        if !self.has_directories {
            return self.persistently(|| async { Ok(self.list_once(prefix, true).await?.0) }).await;
        }
        let (mut found, mut todo) = (Vec::new(), vec![prefix.to_owned()]);
        while let Some(directory) = todo.pop() {
            let listed = self.persistently(|| async {
                match self.list_once(&directory, false).await {
                    Err(e) if e.kind() == ErrorKind::NotFound && self.is_absent(&directory).await? => Ok((Vec::new(), Vec::new())),
                    other => other,
                }
            });
            let (files, directories) = listed.await?;
            found.extend(files);
            todo.extend(directories);
        }
        Ok(found)
    }

    /// Files and directories.
    async fn list_once(&self, directory: &str, recursive: bool) -> Result<(Vec<Listed>, Vec<String>), Error> {
        let mut lister = self.patiently(async { self.operator.lister_with(directory).recursive(recursive).await }).await?;
        let (mut files, mut directories) = (Vec::new(), Vec::new());
        let (mut seen, hasher) = (HashSet::new(), RandomState::new());
        while let Some(entry) = self.patiently(lister.try_next()).await? {
            let name = entry.path();
            if !seen.insert(hasher.hash_one(name)) {
                // One that goes round in circles would never end, and one with a page twice may lack another.
                return Err(Error::new(ErrorKind::Unexpected, format!("the listing has {name} twice")).set_temporary());
            }
            if entry.metadata().is_file() {
                files.push(Listed { name: name.to_owned(), size: entry.metadata().content_length() });
            } else if entry.metadata().is_dir() && name != "/" && name.len() > directory.len() && name.starts_with(directory) {
                directories.push(name.to_owned());
            }
        }
        Ok((files, directories))
    }

    /// Whether a directory that could not be listed is really not there: some servers say the same of one that may not be read.
    async fn is_absent(&self, directory: &str) -> Result<bool, Error> {
        let Some(path) = directory.strip_suffix('/') else { return Ok(true) };
        let parent = path.rsplit_once('/').map(|(parent, _)| format!("{parent}/")).unwrap_or_default();
        match self.list_once(&parent, false).await {
            Ok((_, directories)) => Ok(!directories.iter().any(|d| d == directory)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(true),
            Err(e) => Err(e),
        }
    }

    /// Removes an object; one that is not there is fine.
    pub async fn delete(&self, name: &str) -> Result<(), Error> {
        self.persistently(|| async {
            match self.patiently(self.operator.delete(name)).await {
                Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
                other => other,
            }
        })
        .await
    }

    /// What interrupted writes left: ours, and those of OpenDAL's ftp, which it writes at the top under the object's own name with an
    /// ending of eight characters.
    pub async fn leftovers(&self) -> Result<Vec<Listed>, Error> {
        let mut found = self.list(TEMPORARY).await?;
        if self.operator.info().scheme() == "ftp" {
            let (top, _) = self.persistently(|| self.list_once("", false)).await?;
            found.extend(top.into_iter().filter(|o| {
                let parts = o.name.rsplit_once('.').filter(|(_, ending)| ending.len() == 8);
                parts.is_some_and(|(name, _)| name == "keepd.json" || name == "writer.json" || name.len() == 64)
            }));
        }
        Ok(found)
    }

    /// Whether a writer that finds no object can be sure that no other one makes it at the same time.
    pub fn creates_if_absent(&self) -> bool {
        self.publishing == Publishing::Conditional
    }
}

/// Of an object that the service says it has: that it is not found may pass.
fn is_late(error: Error) -> Error {
    match error.kind() {
        ErrorKind::NotFound => {
            Error::new(ErrorKind::Unexpected, "it was written, the storage said that it has it, and it is not there").set_temporary()
        }
        _ => error,
    }
}

fn is_there(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::ConditionNotMatch | ErrorKind::AlreadyExists)
}

/// The service does not know the condition of a request.
fn is_not_built(error: &Error) -> bool {
    error.kind() == ErrorKind::Unsupported || error.to_string().contains("NotImplemented")
}

/// Whether trying again may help. Some services tell; of the others everything may but what names its cause.
fn may_pass(error: &Error, told: bool) -> bool {
    match error.kind() {
        ErrorKind::RateLimited | ErrorKind::Conflict => true,
        // Less, or more, came than was asked for: OpenDAL calls that lasting.
        ErrorKind::Unexpected if told => error.is_temporary() || error.message().starts_with("reader got too "),
        ErrorKind::Unexpected => {
            let text = reason(error);
            const LASTING: [&str; 6] =
                ["Permission denied", "Host key verification failed", "No space left", "Quota", "quota", "Could not resolve hostname"];
            !LASTING.iter().any(|cause| text.contains(cause))
        }
        _ => false,
    }
}

/// OpenDAL's error in one line: the message and its cause, without its context dump (which may hold more than people want to see).
pub(super) fn reason(error: &Error) -> String {
    let mut text = in_words(with_causes(error.message(), std::error::Error::source(error)));
    text.retain(|c| !c.is_control() || c == ' ');
    if text.trim().is_empty() {
        // The answer had no body, as those to HEAD have none: the status is in the context alone.
        let told = error.to_string();
        let status = told.split_once("status: ").map(|(_, rest)| rest.chars().take_while(char::is_ascii_digit).collect::<String>());
        return match status.filter(|status| !status.is_empty()) {
            Some(status) => format!("the storage answered {status}"),
            None => format!("{} without further words", error.kind()),
        };
    }
    text
}

/// `S3Error { code: "X", message: "Y", … }`, as OpenDAL writes what S3 answers, as `Y (X)`.
fn in_words(text: String) -> String {
    let field = |name: &str| Some(text.split_once(&format!("{name}: \""))?.1.split_once("\", ")?.0);
    match (text.split_once("S3Error { "), field("code"), field("message")) {
        (Some((before, rest)), Some(code), Some(message)) => {
            let after = rest.split_once(" }").map_or("", |(_, after)| after);
            let words = if message.is_empty() { code.to_owned() } else { format!("{} ({code})", message.trim_end_matches('.')) };
            format!("{before}{words}{after}")
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_s3_says_is_told_in_words() {
        let said = "S3Error { code: \"SlowDown\", message: \"Please reduce your request rate.\", resource: \"\", request_id: \"7\" }";
        assert_eq!(reason(&Error::new(ErrorKind::Unexpected, said)), "Please reduce your request rate (SlowDown)");
        let silent = "S3Error { code: \"Odd\", message: \"\", resource: \"\", request_id: \"\" }";
        assert_eq!(reason(&Error::new(ErrorKind::Unexpected, silent)), "Odd");
        assert_eq!(reason(&Error::new(ErrorKind::Unexpected, "something else")), "something else");
        let status = Error::new(ErrorKind::Unexpected, "").with_context("response", "Parts { status: 503, version: HTTP/1.1 }");
        assert_eq!(reason(&status), "the storage answered 503");
        assert_eq!(reason(&Error::new(ErrorKind::Unexpected, "")), "Unexpected without further words");
    }
}
