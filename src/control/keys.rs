//! The methods about keys. Keys come and go through descriptors, never in a message.

use std::fs::File;
use std::io::Seek;
use std::os::fd::OwnedFd;
use std::path::Path;

use keepd_protocol::methods::*;

use super::handlers::Result;
use super::passed::{descriptor, writable};
use super::service::Control;
use super::transport::Fault;
use crate::access::By;
use crate::crypto::{Key, PrivateKey, key_file};
use crate::run::Error;

/// What a slot is called, in bytes.
const MAX_LABEL: usize = 128;
/// The path of a key file, in bytes.
const MAX_PATH: usize = 4096;

fn one(fds: Vec<OwnedFd>) -> Result<File> {
    let [fd]: [OwnedFd; 1] =
        fds.try_into().map_err(|_| descriptor("the call wants exactly one descriptor passed along: an open key file"))?;
    Ok(File::from(fd))
}

/// What an open key file holds, from its beginning: the caller may have read it, or passed it along before.
fn read(name: &str, mut file: &File) -> std::result::Result<(Vec<Key>, Vec<PrivateKey>), Error> {
    // What cannot be rewound is no regular file, and refused as such.
    let _ = file.rewind();
    key_file::load_all(Path::new(name), file).map_err(|e| Error::Failed(e.to_string()))
}

/// The one key of an open key file; `name` is for messages.
fn one_key(name: &str, file: &File) -> std::result::Result<Key, Error> {
    let (keys, private_keys) = read(name, file)?;
    let [key]: [Key; 1] = keys.try_into().map_err(|keys: Vec<Key>| {
        Error::Failed(match (keys.is_empty(), private_keys.is_empty()) {
            (true, false) => format!("{name} is a private key file: it opens contents that were written for it, not repositories"),
            _ => format!("{name} holds several keys; give a file that holds one"),
        })
    })?;
    Ok(key)
}

/// The one private key of an open private key file.
fn one_private_key(file: &File) -> std::result::Result<PrivateKey, Error> {
    let name = "the private key file";
    let (_, private_keys) = read(name, file)?;
    let [key]: [PrivateKey; 1] =
        private_keys.try_into().map_err(|_| Error::Failed(format!("{name} does not hold a private key, or holds several")))?;
    Ok(key)
}

impl Control {
    pub(super) async fn list_keys(&self, p: list_keys::In) -> Result<list_keys::Out> {
        let (profiles, destinations) = self.ask_runs(move |runs| runs.list_keys(&p.destinations)).await?;
        Ok(list_keys::Out { profiles, destinations })
    }

    pub(super) async fn start_key_add(&self, p: start_key_add::In, fds: Vec<OwnedFd>, by: By) -> Result<start_key_add::Out> {
        if p.label.as_ref().is_some_and(|l| l.is_empty() || l.len() > MAX_LABEL || l.contains(|c: char| c.is_control())) {
            return Err(Fault::invalid_parameter("label"));
        }
        let file = match (&p.profile, fds.is_empty()) {
            (Some(_), true) => None,
            (Some(_), false) => return Err(descriptor("with a profile no descriptor is passed along")),
            (None, _) => Some(one(fds)?),
        };
        let (run, fingerprint) = self
            .ask_runs(move |runs| {
                let label = p.label.unwrap_or_else(|| "key file".into());
                let given = file.map(|file| one_key(&label, &file)).transpose()?;
                runs.start_key_add(&p.destination, p.profile.as_deref(), given.map(|key| (label, key)), &by)
            })
            .await?;
        Ok(start_key_add::Out { run, fingerprint })
    }

    pub(super) async fn start_key_remove(&self, p: start_key_remove::In, by: By) -> Result<start_key_remove::Out> {
        let (run, slot) = self.ask_runs(move |runs| runs.start_key_remove(&p.destination, &p.slot, &by)).await?;
        Ok(start_key_remove::Out { run, slot })
    }

    pub(super) async fn start_key_rotate(&self, p: start_key_rotate::In, fds: Vec<OwnedFd>, by: By) -> Result<start_key_rotate::Out> {
        if !p.file.starts_with('/') || p.file.len() > MAX_PATH {
            return Err(Fault::invalid_parameter("file"));
        }
        let file = one(fds)?;
        let started = self
            .ask_runs(move |runs| {
                let key = one_key(&p.file, &file)?;
                runs.start_key_rotate(&p.profile, &p.file, key, p.step, &by)
            })
            .await?;
        Ok(start_key_rotate::Out { run: started.run, fingerprint: started.fingerprint, configured: started.configured })
    }

    pub(super) async fn make_kit(&self, p: make_kit::In, mut fds: Vec<OwnedFd>, by: By) -> Result<make_kit::Out> {
        let private = match (p.private_key, fds.len()) {
            (true, 2) => fds.pop().map(File::from),
            (false, 1) => None,
            _ => {
                return Err(descriptor(
                    "the call wants the file to write to passed along, and with private_key a private key file after it",
                ));
            }
        };
        let out = writable(fds)?;
        let (run, fingerprint) = self
            .ask_runs(move |runs| {
                let private = private.map(|file| one_private_key(&file)).transpose()?;
                runs.start_kit(&p.profile, p.include_secrets, private, out, &by)
            })
            .await?;
        Ok(make_kit::Out { run, fingerprint })
    }
}
