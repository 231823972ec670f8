//! A backup out of its repository as a portable archive, into a descriptor or an object.
//!
//! It is read twice: once for the list that stands first in the archive, with the SHA-256 of each file, and once for the archive itself.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use keepd_protocol::model::{ArchiveCompression, Backup, BytesPath, EntryKind, Level};
use keepd_protocol::restore::EntryHeader;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::backup::Environment;
use super::destination;
use super::live::{Failure, Finish, LiveRun};
use super::patient::{PATIENCE, PatientWriter};
use super::repeats::Repeated;
use super::restore::{Another, Broken, Op, Ops, Part, Place, Wanted, next_place, part, unreadable, with_ops};
use super::selection::{Selection, Shown};
use crate::crypto::{self, Key, Profile, ProfileKey, key_file};
use crate::portable::head::{Contents, Origin, Source, Totals};
use crate::portable::{ArchiveWriter, FileLine, FileList, FileListWriter, Head, Made, Packing, PortableError, write};
use crate::repository::{Manifest, Repository};

/// What the slot of a key that was made for one archive is called.
const FRESH: &str = "export";

/// How a backup is exported.
pub struct ExportRequest {
    /// `<source>[/<path>]`; none means all.
    pub paths: Vec<Vec<u8>>,
    pub compression: ArchiveCompression,
    pub seal: SealFor,
}

/// Whom an archive is sealed for.
pub enum SealFor {
    Nobody,
    /// A configured profile.
    Profile(String),
    /// A key made for it, which is written there.
    Fresh(OwnedFd),
}

impl From<PortableError> for Failure {
    fn from(error: PortableError) -> Self {
        match error {
            PortableError::Cancelled => Failure::Cancelled,
            PortableError::Io(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {
                Failure::Failed("whoever took the archive went away before its end".into())
            }
            PortableError::Io(e) => Failure::Failed(format!("the archive cannot be written: {e}")),
            other => Failure::Failed(other.to_string()),
        }
    }
}

pub fn packing(compression: ArchiveCompression) -> Packing {
    match compression {
        ArchiveCompression::None => Packing::None,
        ArchiveCompression::Gzip => Packing::Gzip,
        ArchiveCompression::Zstd => Packing::Zstd,
    }
}

/// Writes a backup into a client's descriptor.
pub fn export(
    env: &Environment,
    place: Place,
    another: Another<'_>,
    backup: &Backup,
    request: ExportRequest,
    out: OwnedFd,
    live: &LiveRun,
) -> Result<Finish, Failure> {
    let profile = match request.seal {
        SealFor::Nobody => None,
        SealFor::Profile(name) => Some(destination::profile_named(&env.config, &name)?),
        SealFor::Fresh(to) => Some(Profile::of(FRESH, fresh_key(File::from(to))?)),
    };
    let work_dir = env.config.daemon.state_dir.join("work");
    std::fs::create_dir_all(&work_dir).map_err(|e| Failure::Failed(format!("cannot make {}: {e}", work_dir.display())))?;
    let to_sync = File::from(out.try_clone().map_err(|e| Failure::Failed(format!("cannot use the client's descriptor: {e}")))?);
    let out = PatientWriter::new(out, PATIENCE, live.cancel.clone())?;
    let options =
        write::Options { packing: packing(request.compression), seal: profile.as_ref(), work_dir: &work_dir, cancel: live.cancel.clone() };
    let (out, made) = into_archive(place, another, backup, &request.paths, out, &options, live)?;
    drop(out);
    if to_sync.metadata().is_ok_and(|m| m.is_file()) {
        to_sync.sync_all().map_err(|e| Failure::Failed(format!("the archive cannot be made durable: {e}")))?;
    }
    live.message(Level::Info, format!("the archive has {} bytes, SHA-256 {}", made.bytes, made.sha256));
    Ok(Finish::Good)
}

/// A new key, durable where it is written to.
fn fresh_key(mut to: File) -> Result<ProfileKey, Failure> {
    let failed = |e: String| Failure::Failed(format!("the archive's key cannot be written: {e}"));
    let key = Key::generate().map_err(|e| failed(e.to_string()))?;
    let text: Zeroizing<String> = key_file::text_of(&key);
    to.write_all(text.as_bytes()).map_err(|e| failed(e.to_string()))?;
    if to.metadata().is_ok_and(|m| m.is_file()) {
        to.sync_all().map_err(|e| failed(e.to_string()))?;
    }
    Ok(ProfileKey::Key(Arc::new(key)))
}

/// Writes what is selected of a backup as an archive. When a place fails, another one goes on where it stopped.
pub fn into_archive<W: Write + Send + 'static>(
    mut place: Place,
    another: Another<'_>,
    backup: &Backup,
    paths: &[Vec<u8>],
    out: W,
    options: &write::Options<'_>,
    live: &LiveRun,
) -> Result<(W, Made), Failure> {
    live.step("reading, to list what is in it");
    let mut repeated = None;
    let (head, files) = loop {
        live.report.restart();
        let mut listing = Listing::new(&place.manifest, options.work_dir)?;
        let read = read(&place, paths, (0, false), &mut repeated, live, |ops| listing.all(ops, live));
        match read {
            Ok(()) => break listing.finish(&place.manifest, backup, !paths.is_empty())?,
            Err(Broken::End(failure)) => return Err(failure),
            Err(Broken::Place(e)) if next_place(&mut place, another, &e, live) => repeated = None,
            Err(Broken::Place(e)) => return Err(unreadable(e)),
        }
    };
    live.report.restart();
    live.step("writing the archive");
    let listed: Arc<Repository> = place.repository.clone();
    let mut writing =
        Writing { archive: ArchiveWriter::create(out, options, &head, Some(files))?, known: true, frames: false, done: 0, open: None };
    loop {
        // Chunks are named by their contents: those of the place that was listed are what was listed. Of another place it is proven.
        writing.known = Arc::ptr_eq(&listed, &place.repository);
        writing.frames = writing.known && options.packing == Packing::Zstd;
        match read(&place, paths, (writing.done, writing.frames), &mut repeated, live, |ops| writing.all(ops, live)) {
            Ok(()) => break,
            Err(Broken::End(failure)) => return Err(failure),
            Err(Broken::Place(e)) if next_place(&mut place, another, &e, live) => repeated = None,
            Err(Broken::Place(e)) => return Err(unreadable(e)),
        }
    }
    Ok(writing.archive.finish(None)?)
}

/// Reads what is wanted, each file from its start to its end; `skip`: so many ops were read before.
fn read(
    place: &Place,
    paths: &[Vec<u8>],
    (skip, frames): (u64, bool),
    repeated: &mut Option<Repeated>,
    live: &LiveRun,
    consume: impl FnOnce(&Ops) -> Result<(), Broken>,
) -> Result<(), Broken> {
    // What is still on its way when a place fails is given up.
    let cancel = live.cancel.child_token();
    if repeated.is_none() {
        let selection = Selection::new(&place.manifest, paths).map_err(|text| Broken::End(Failure::Failed(text)))?;
        *repeated = Some(Repeated::of(&place.repository, &selection, &cancel)?);
    }
    let wanted = Wanted { paths, only: None, skip, sent: None, is_patient: false, in_order: true, frames, repeated: repeated.as_ref() };
    with_ops(&place.repository, &place.manifest, &wanted, &cancel, consume)
}

fn end(error: impl Into<Failure>) -> Broken {
    Broken::End(error.into())
}

/// Reads the contents of a file that an entry brings with it.
fn inline(parts: Vec<Part>, contents: &mut Vec<u8>) -> Result<(), Broken> {
    contents.clear();
    parts.iter().try_for_each(|part| part.append_to(contents))
}

/// Zeros for what a hole takes.
const ZEROS: [u8; 8 << 10] = [0; 8 << 10];

/// What the archive will hold.
struct Listing {
    files: FileListWriter,
    sources: Vec<Source>,
    open: Option<(BytesPath, u64, u64, Sha256)>,
}

impl Listing {
    fn new(manifest: &Manifest, work_dir: &Path) -> Result<Self, Failure> {
        let source = |s: &crate::repository::ManifestSource| Source {
            name: s.name.clone(),
            kind: s.kind.clone(),
            place: BytesPath::from_bytes(&s.path),
            facts: serde_json::from_str(&s.facts).unwrap_or_default(),
            one_file: Shown::new(s).is_one_file(),
            ..Source::default()
        };
        Ok(Self { files: FileListWriter::create(work_dir)?, sources: manifest.sources.iter().map(source).collect(), open: None })
    }

    fn all(&mut self, ops: &Ops, live: &LiveRun) -> Result<(), Broken> {
        let mut contents = Vec::new();
        for op in ops {
            if live.cancel.is_cancelled() {
                return Err(Broken::End(Failure::Cancelled));
            }
            match op? {
                Op::Entry(header, parts) => {
                    live.report.entry();
                    self.count(&header);
                    if header.kind == EntryKind::File {
                        inline(parts, &mut contents)?;
                        let mut hash = Sha256::new();
                        hash.update(&contents);
                        live.report.bytes(contents.len() as u64);
                        self.open = Some((header.path.clone(), header.size, contents.len() as u64, hash));
                        if header.inline {
                            self.close()?;
                        }
                    }
                }
                Op::Data { offset, slot, extent, .. } => {
                    let bytes = slot.wait()?;
                    let bytes = part(&bytes, &extent).map_err(Broken::End)?;
                    if let Some((_, _, at, hash)) = &mut self.open {
                        zeros(offset.saturating_sub(*at), |zeros| hash.update(zeros));
                        hash.update(bytes);
                        *at = offset + bytes.len() as u64;
                        live.report.bytes(bytes.len() as u64);
                    }
                }
                Op::End { .. } => self.close()?,
                Op::Hurt { text, .. } => return Err(Broken::End(Failure::Damaged(text))),
            }
        }
        Ok(())
    }

    fn count(&mut self, header: &EntryHeader) {
        let path = header.path.to_bytes().unwrap_or_default();
        let name = path.split(|b| *b == b'/').next().unwrap_or_default();
        if let Some(source) = self.sources.iter_mut().find(|s| s.name.as_bytes() == name) {
            source.count(header);
        }
    }

    fn close(&mut self) -> Result<(), Broken> {
        let Some((path, size, at, mut hash)) = self.open.take() else { return Ok(()) };
        zeros(size.saturating_sub(at), |zeros| hash.update(zeros));
        self.files.push(&FileLine { path, size, sha256: HEXLOWER.encode(&hash.finalize()) }).map_err(end)
    }

    fn finish(self, manifest: &Manifest, backup: &Backup, selected: bool) -> Result<(Head, FileList), Failure> {
        let Self { files, mut sources, .. } = self;
        sources.retain(|s| !selected || s.entries > 0);
        let archive: [u8; 16] = crypto::random().map_err(|e| Failure::Failed(e.to_string()))?;
        let head = Head {
            format: 1,
            archive: HEXLOWER.encode(&archive),
            created: Timestamp::now().to_string(),
            keepd_version: env!("CARGO_PKG_VERSION").into(),
            contents: Contents::First,
            origin: Origin {
                backup: backup.id.clone(),
                job: manifest.job.clone(),
                run: manifest.run.clone(),
                host: manifest.host.clone(),
                keepd_version: manifest.keepd_version.clone(),
                started: manifest.started.clone(),
                finished: manifest.finished.clone(),
                r#type: manifest.r#type.clone(),
                outcome: backup.outcome.as_str().into(),
                name: manifest.name.clone(),
                description: manifest.description.clone(),
                labels: manifest.labels.iter().cloned().collect(),
                version: manifest.version.clone(),
                schema_version: manifest.schema_version.clone(),
            },
            totals: Some(Totals::of(&sources)),
            sources,
            users: manifest.users.iter().cloned().collect(),
            groups: manifest.groups.iter().cloned().collect(),
            messages: manifest.messages.clone(),
            left_out: manifest.left_out,
            selected,
        };
        Ok((head, files.finish()?))
    }
}

fn zeros(mut left: u64, mut each: impl FnMut(&[u8])) {
    while left > 0 {
        let n = left.min(ZEROS.len() as u64);
        each(ZEROS.get(..n as usize).unwrap_or_default());
        left -= n;
    }
}

/// The archive, and how far it has come.
struct Writing<W> {
    archive: ArchiveWriter<W>,
    /// It is read where it was listed.
    known: bool,
    /// What is a whole chunk goes into it as its zstd frame.
    frames: bool,
    /// Ops that are in it.
    done: u64,
    /// Of the file whose contents come: its size, and where they are.
    open: Option<(u64, u64)>,
}

impl<W: Write + Send + 'static> Writing<W> {
    fn all(&mut self, ops: &Ops, live: &LiveRun) -> Result<(), Broken> {
        let mut contents = Vec::new();
        for op in ops {
            if live.cancel.is_cancelled() {
                return Err(Broken::End(Failure::Cancelled));
            }
            match op? {
                Op::Entry(header, parts) => {
                    // Whole before anything of it is written: another place would give it once more.
                    inline(parts, &mut contents)?;
                    self.archive.entry(&header).map_err(end)?;
                    if header.kind == EntryKind::File {
                        let whole = header.inline && self.known;
                        let written = if whole { self.archive.known_contents(&contents) } else { self.archive.contents(&contents) };
                        written.map_err(end)?;
                        live.report.bytes(contents.len() as u64);
                        self.open = (!header.inline).then_some((header.size, 0));
                    }
                    live.report.entry();
                }
                Op::Data { offset, slot, extent, .. } => {
                    let frame = if self.frames { slot.wait_frame()?.filter(|_| extent.len == slot.len()) } else { None };
                    let bytes = if frame.is_some() { None } else { Some(slot.wait()?) };
                    if let Some((_, at)) = &mut self.open {
                        self.archive.zeros(offset.saturating_sub(*at)).map_err(end)?;
                        match (frame, &bytes) {
                            (Some(frame), _) => self.archive.zstd_frame(frame, u64::from(extent.len)).map_err(end)?,
                            (None, Some(bytes)) => self.archive.contents(part(bytes, &extent).map_err(Broken::End)?).map_err(end)?,
                            (None, None) => {}
                        }
                        *at = offset + u64::from(extent.len);
                        live.report.bytes(u64::from(extent.len));
                    }
                }
                Op::End { .. } => {
                    if let Some((size, at)) = self.open.take() {
                        self.archive.zeros(size.saturating_sub(at)).map_err(end)?;
                    }
                }
                Op::Hurt { text, .. } => return Err(Broken::End(Failure::Damaged(text))),
            }
            self.done += 1;
        }
        Ok(())
    }
}
