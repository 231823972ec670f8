//! Descriptors that come with a call: where its answer is written to, and private key files that are lent to its run.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use keepd_protocol::call::errors;
use rustix::fs::{FileType, OFlags};
use serde_json::json;

use super::transport::Fault;
use crate::crypto::{Lent, key_file};

type Result<T> = std::result::Result<T, Fault>;

/// What is wrong with what was passed along.
pub fn descriptor(text: impl ToString) -> Fault {
    Fault::new(errors::DESCRIPTOR, json!({ "message": text.to_string() }))
}

/// What came with a call and was not taken yet, each in the place it came in.
pub struct Passed(Vec<Option<OwnedFd>>);

impl From<Vec<OwnedFd>> for Passed {
    fn from(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }
}

impl Passed {
    /// Takes what a parameter of the call names by its place.
    pub fn take(&mut self, place: u32, parameter: &'static str) -> Result<OwnedFd> {
        let fd = usize::try_from(place).ok().and_then(|place| self.0.get_mut(place)?.take());
        fd.ok_or_else(|| Fault::invalid_parameter(parameter))
    }
}

/// Takes the private keys out of what was passed along, by the places that `private_keys` names; what is left comes with them, in order.
pub async fn lent(passed: impl Into<Passed>, private_keys: &[u32]) -> Result<(Lent, Vec<OwnedFd>)> {
    let mut passed = passed.into();
    let mut files = Vec::new();
    for place in private_keys {
        files.push(File::from(passed.take(*place, "private_keys")?));
    }
    let left = passed.0.into_iter().flatten().collect();
    if files.is_empty() {
        return Ok((Lent::default(), left));
    }
    // A file of a network may keep its reader waiting.
    let read = move || {
        let mut keys = Vec::new();
        for file in &files {
            // For messages alone: the caller's word for it is not known.
            let path =
                std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_else(|_| PathBuf::from("the private key"));
            keys.extend(key_file::load_private_keys(&path, file).map_err(descriptor)?);
        }
        Ok(Lent::of(keys))
    };
    let keys: Result<Lent> = tokio::task::spawn_blocking(read).await.map_err(descriptor)?;
    Ok((keys?, left))
}

/// The same for a call that takes nothing else.
pub async fn lent_alone(fds: Vec<OwnedFd>, private_keys: &[u32]) -> Result<Lent> {
    match lent(fds, private_keys).await? {
        (lent, left) if left.is_empty() => Ok(lent),
        _ => Err(descriptor("the call takes no descriptors but private key files, which private_keys names")),
    }
}

/// The one descriptor of a call that writes into it: a pipe, socket or file open for writing.
pub fn writable(fds: Vec<OwnedFd>) -> Result<OwnedFd> {
    let [fd]: [OwnedFd; 1] =
        fds.try_into().map_err(|_| descriptor("the call wants exactly one descriptor passed along: the write end of a pipe"))?;
    let kind = rustix::fs::fstat(&fd).map(|s| FileType::from_raw_mode(s.st_mode)).map_err(descriptor)?;
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(descriptor)?;
    let fit = matches!(kind, FileType::Fifo | FileType::Socket | FileType::RegularFile);
    match fit && (flags & OFlags::ACCMODE) != OFlags::RDONLY {
        true => Ok(fd),
        false => Err(descriptor("the descriptor must be a pipe, a socket or a file, open for writing")),
    }
}
