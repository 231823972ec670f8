//! How an archive is compressed: as gzip members or zstd frames of mostly 1 MiB one after the other, which every gzip and zstd reads as one stream, and which
//! several threads can make at once.
//!
//! In: bytes, on the caller's thread. They are cut into blocks, which workers compress in any order and one thread seals and writes in theirs. What is under way is bounded.

use std::io::{self, Write};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, bounded};
use data_encoding::HEXLOWER;
use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::seal::Sealer;
use super::{Made, PortableError, Result};
use crate::crypto::Profile;

/// Plain bytes of a gzip member or zstd frame. Less has the last, and one before a frame that was made elsewhere.
pub const BLOCK_BYTES: usize = 1 << 20;

const GZIP_LEVEL: u32 = 6;
/// A fifth faster than level 3, for 4 % more.
const ZSTD_LEVEL: i32 = 2;
const MAX_WORKERS: usize = 4;

/// How an archive is compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Packing {
    #[default]
    None,
    Gzip,
    Zstd,
}

impl Packing {
    /// What its name ends with: `.tar`, `.tar.gz`, `.tar.zst`.
    pub fn suffix(self) -> &'static str {
        match self {
            Packing::None => ".tar",
            Packing::Gzip => ".tar.gz",
            Packing::Zstd => ".tar.zst",
        }
    }
}

type Packed = io::Result<Vec<u8>>;

/// What comes to the thread that writes, in order.
enum Item {
    Plain(Vec<u8>),
    Packed(Receiver<Packed>),
    /// Compressed before.
    Frame(Arc<Vec<u8>>),
    /// Everything came. Without it nothing is ended.
    End,
}

/// A block for the workers, and whom it goes to.
type Job = (Vec<u8>, Sender<Packed>);

/// From blocks of a tar to the bytes of an archive.
pub(super) struct Pipeline<W> {
    block: Vec<u8>,
    order: Option<Sender<Item>>,
    jobs: Option<Sender<Job>>,
    /// Blocks to be used again.
    spare: (Sender<Vec<u8>>, Receiver<Vec<u8>>),
    thread: Option<JoinHandle<Result<(W, Made)>>>,
    cancel: CancellationToken,
}

impl<W: Write + Send + 'static> Pipeline<W> {
    /// `archive`: its name, where it is sealed.
    pub fn start(out: W, packing: Packing, seal: Option<(&Profile, [u8; 16])>, cancel: CancellationToken) -> Result<Self> {
        let seal = seal.map(|(profile, archive)| (profile.clone(), archive));
        let workers = thread::available_parallelism().map_or(2, usize::from).clamp(2, MAX_WORKERS);
        let (order, ordered) = bounded::<Item>(workers + 2);
        let spare = bounded(2 * workers + 4);
        let jobs = match packing {
            Packing::None => None,
            _ => {
                let (jobs, work) = bounded::<Job>(workers);
                for n in 0..workers {
                    let (work, spare) = (work.clone(), spare.0.clone());
                    spawn(&format!("archive-pack-{n}"), move || pack(packing, &work, &spare))?;
                }
                Some(jobs)
            }
        };
        let back = spare.0.clone();
        let thread = spawn("archive-write", move || write_out(out, seal, &ordered, &back))?;
        Ok(Self { block: Vec::with_capacity(BLOCK_BYTES), order: Some(order), jobs, spare, thread: Some(thread), cancel })
    }

    pub fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let n = bytes.len().min(BLOCK_BYTES - self.block.len());
            let (now, later) = bytes.split_at_checked(n).unwrap_or_default();
            self.block.extend_from_slice(now);
            bytes = later;
            if self.block.len() == BLOCK_BYTES {
                self.pass_on()?;
            }
        }
        Ok(())
    }

    pub fn zeros(&mut self, mut len: u64) -> Result<()> {
        while len > 0 {
            let n = len.min((BLOCK_BYTES - self.block.len()) as u64);
            self.block.resize(self.block.len() + n as usize, 0);
            len -= n;
            if self.block.len() == BLOCK_BYTES {
                self.pass_on()?;
            }
        }
        Ok(())
    }

    /// A zstd frame as it is, behind what was written so far. Only for [`Packing::Zstd`].
    pub fn frame(&mut self, frame: Arc<Vec<u8>>) -> Result<()> {
        if !self.block.is_empty() {
            self.pass_on()?;
        }
        if self.cancel.is_cancelled() {
            return Err(PortableError::Cancelled);
        }
        self.send(Item::Frame(frame))
    }

    fn pass_on(&mut self) -> Result<()> {
        if self.cancel.is_cancelled() {
            return Err(PortableError::Cancelled);
        }
        let mut next = self.spare.1.try_recv().unwrap_or_else(|_| Vec::with_capacity(BLOCK_BYTES));
        next.clear();
        let block = std::mem::replace(&mut self.block, next);
        let item = match &self.jobs {
            None => Item::Plain(block),
            Some(jobs) => {
                let (to, from) = bounded(1);
                if jobs.send((block, to)).is_err() {
                    return Err(self.failed());
                }
                Item::Packed(from)
            }
        };
        self.send(item)
    }

    fn send(&mut self, item: Item) -> Result<()> {
        if self.order.as_ref().is_none_or(|order| order.send(item).is_err()) {
            return Err(self.failed());
        }
        Ok(())
    }

    /// Why nobody takes anything any more.
    fn failed(&mut self) -> PortableError {
        (self.order, self.jobs) = (None, None);
        match self.join() {
            Err(e) => e,
            Ok(_) => PortableError::Io(io::Error::other("the archive was ended before")),
        }
    }

    fn join(&mut self) -> Result<(W, Made)> {
        let Some(thread) = self.thread.take() else {
            return Err(PortableError::Io(io::Error::other("writing the archive failed before")));
        };
        thread.join().unwrap_or_else(|_| Err(PortableError::Io(io::Error::other("the thread that writes the archive panicked"))))
    }

    /// Writes what is left, ends the archive and waits until all is out.
    pub fn finish(mut self) -> Result<(W, Made)> {
        if !self.block.is_empty() {
            self.pass_on()?;
        }
        if self.cancel.is_cancelled() {
            return Err(PortableError::Cancelled);
        }
        self.send(Item::End)?;
        (self.order, self.jobs) = (None, None);
        self.join()
    }
}

fn spawn<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map_err(|e| PortableError::Io(io::Error::new(e.kind(), format!("cannot start a thread: {e}"))))
}

fn pack(packing: Packing, work: &Receiver<Job>, spare: &Sender<Vec<u8>>) {
    let mut zstd = None;
    for (block, to) in work {
        let packed = pack_block(packing, &mut zstd, &block);
        // Nobody waits for it after a failure.
        let _ = to.send(packed);
        let _ = spare.try_send(block);
    }
}

/// A block as a gzip member, or a zstd frame.
pub(super) fn pack_block(packing: Packing, zstd: &mut Option<zstd::bulk::Compressor<'static>>, block: &[u8]) -> Packed {
    match packing {
        Packing::None => Ok(block.to_vec()),
        Packing::Gzip => {
            let mut encoder = GzEncoder::new(Vec::with_capacity(block.len() / 2), Compression::new(GZIP_LEVEL));
            encoder.write_all(block)?;
            encoder.finish()
        }
        Packing::Zstd => {
            let zstd = match zstd {
                Some(zstd) => zstd,
                None => {
                    let mut new = zstd::bulk::Compressor::new(ZSTD_LEVEL)?;
                    new.set_parameter(zstd::zstd_safe::CParameter::ChecksumFlag(true))?;
                    zstd.insert(new)
                }
            };
            let mut packed = zstd.compress(block)?;
            // It has room for what does not compress at all.
            packed.shrink_to_fit();
            Ok(packed)
        }
    }
}

fn write_out<W: Write>(out: W, seal: Option<(Profile, [u8; 16])>, ordered: &Receiver<Item>, spare: &Sender<Vec<u8>>) -> Result<(W, Made)> {
    let counted = Counted { out, bytes: 0, hash: Sha256::new() };
    let mut out = match seal {
        None => Out::Plain(counted),
        Some((profile, archive)) => Out::Sealed(Box::new(Sealer::create(counted, &archive, &profile)?)),
    };
    for item in ordered {
        match item {
            Item::Plain(block) => {
                out.write_all(&block)?;
                let _ = spare.try_send(block);
            }
            Item::Packed(from) => {
                let packed = from.recv().unwrap_or_else(|_| Err(io::Error::other("a thread that compresses the archive ended")));
                out.write_all(&packed.map_err(PortableError::Io)?)?;
            }
            Item::Frame(frame) => out.write_all(&frame)?,
            Item::End => return out.finish(),
        }
    }
    Err(PortableError::Io(io::Error::other("the archive was given up")))
}

enum Out<W: Write> {
    Plain(Counted<W>),
    Sealed(Box<Sealer<Counted<W>>>),
}

impl<W: Write> Out<W> {
    fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Out::Plain(out) => out.write_all(bytes),
            Out::Sealed(out) => out.write_all(bytes),
        }
        .map_err(PortableError::Io)
    }

    fn finish(self) -> Result<(W, Made)> {
        let mut counted = match self {
            Out::Plain(out) => out,
            Out::Sealed(out) => out.finish().map_err(PortableError::Io)?,
        };
        counted.flush().map_err(PortableError::Io)?;
        Ok((counted.out, Made { bytes: counted.bytes, sha256: HEXLOWER.encode(&counted.hash.finalize()) }))
    }
}

struct Counted<W> {
    out: W,
    bytes: u64,
    hash: Sha256,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.hash.update(bytes.get(..n).unwrap_or(bytes));
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
