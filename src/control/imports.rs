//! The methods about imports: three steps that any client may take, and what becomes of them.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use data_encoding::BASE64;
use keepd_protocol::call::errors;
use keepd_protocol::methods::*;
use keepd_protocol::model::ImportPart;
use rustix::fs::{FileType, OFlags};
use serde_json::json;
use zeroize::{Zeroize, Zeroizing};

use super::handlers::Result;
use super::service::Control;
use super::transport::Fault;
use crate::access::By;
use crate::crypto::key_file;
use crate::run::{Error, GivenArchive};

fn descriptor(text: &str) -> Fault {
    Fault::new(errors::DESCRIPTOR, json!({ "message": text }))
}

/// A descriptor that can be read as an archive.
fn archive(fd: OwnedFd) -> Result<GivenArchive> {
    const WANTED: &str = "the archive's descriptor must be a file, a pipe or a socket, open for reading";
    let found = rustix::fs::fstat(&fd).map_err(|e| descriptor(&e.to_string()))?;
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(|e| descriptor(&e.to_string()))?;
    if (flags & OFlags::ACCMODE) == OFlags::WRONLY || flags.contains(OFlags::PATH) {
        return Err(descriptor(WANTED));
    }
    match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile => Ok(GivenArchive::File(File::from(fd), u64::try_from(found.st_size).unwrap_or(0))),
        FileType::Fifo | FileType::Socket => Ok(GivenArchive::Stream(fd)),
        _ => Err(descriptor(WANTED)),
    }
}

impl Control {
    pub(super) async fn initiate_import(&self, p: initiate_import::In, by: By) -> Result<initiate_import::Out> {
        let import = self.ask_runs(move |runs| runs.initiate_import(p, &by)).await?;
        Ok(initiate_import::Out { import: import.id, deadline: import.deadline })
    }

    pub(super) async fn upload_import(&self, mut p: upload_import::In, mut fds: Vec<OwnedFd>) -> Result<upload_import::Out> {
        let data = match p.data.take() {
            None => None,
            Some(mut text) => {
                let bytes = BASE64.decode(text.as_bytes()).map(Zeroizing::new).map_err(|_| Fault::invalid_parameter("data"));
                text.zeroize();
                Some(bytes?)
            }
        };
        if fds.len() > 1 || (data.is_some() && !fds.is_empty()) {
            return Err(descriptor("the call wants one descriptor passed along, or data, and not both"));
        }
        let fd = fds.pop();
        let next = match (p.part, fd, data) {
            (ImportPart::Archive, Some(fd), _) => {
                let archive = archive(fd)?;
                self.ask_runs(move |runs| runs.give_import(&p.import, archive, p.confirm)).await?
            }
            (ImportPart::Archive, None, Some(data)) => self.ask_runs(move |runs| runs.import_piece(&p, &data)).await?,
            (ImportPart::Archive, None, None) if p.last => self.ask_runs(move |runs| runs.confirm_import(&p.import)).await?,
            (ImportPart::Key, Some(fd), _) => {
                self.ask_runs(move |runs| {
                    let (keys, private_keys) = key_file::load_all(Path::new("the key file"), &File::from(fd)).map_err(told)?;
                    runs.add_import_keys(&p.import, keys, private_keys).map(|()| 0)
                })
                .await?
            }
            (ImportPart::Key, None, Some(data)) => {
                self.ask_runs(move |runs| {
                    let (keys, private_keys) = key_file::all_from_bytes(Path::new("the key"), &data).map_err(told)?;
                    runs.add_import_keys(&p.import, keys, private_keys).map(|()| 0)
                })
                .await?
            }
            (_, None, None) => return Err(descriptor("the call wants a descriptor passed along, or data")),
        };
        Ok(upload_import::Out { next })
    }

    pub(super) async fn start_import(&self, p: start_import::In, by: By) -> Result<start_import::Out> {
        let run = self.ask_runs(move |runs| runs.start_import(&p.import, &by)).await?;
        Ok(start_import::Out { run })
    }

    pub(super) async fn get_import(&self, p: get_import::In) -> Result<get_import::Out> {
        let import = self.ask_runs(move |runs| runs.import(&p.import)).await?;
        Ok(get_import::Out { import })
    }

    pub(super) async fn list_imports(&self, _: list_imports::In, by: &By) -> Result<list_imports::Out> {
        let of = if self.is_admin(by).await { None } else { by.uid() };
        let imports = self.ask_runs(move |runs| Ok(runs.list_imports(of))).await?;
        Ok(list_imports::Out { imports })
    }

    pub(super) async fn cancel_import(&self, p: cancel_import::In) -> Result<cancel_import::Out> {
        self.ask_runs(move |runs| runs.cancel_import(&p.import)).await?;
        Ok(cancel_import::Out {})
    }
}

fn told(error: key_file::KeyFileError) -> Error {
    Error::Failed(error.to_string())
}
