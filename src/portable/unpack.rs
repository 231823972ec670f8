//! From an archive as it lies there to the bytes of its tar: opened and decompressed on a thread of its own, some blocks ahead.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use flate2::bufread::MultiGzDecoder;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::seal::{self, Keys, Opener};
use super::{PortableError, Result};
use crate::repository::payload::is_frugal_frame;

const BLOCK_BYTES: usize = 1 << 20;
/// Blocks that are read ahead.
const AHEAD: usize = 2;
/// Frames of zstd that need more memory than this power of 2 are refused: `zstd --long=26` makes such.
const MAX_WINDOW_LOG: u32 = 26;
/// What may come out besides [`RATIO`] times what went in.
const FREE_BYTES: u64 = 1 << 30;
const RATIO: u64 = 250;
/// How often it is looked whether the work was cancelled.
const LOOK: Duration = Duration::from_millis(100);

enum Message {
    /// It is sealed, bears this name, and opened with that.
    Archive([u8; 16], String),
    /// What was unpacked, and the zstd frame that it came as, where it is one whole frame.
    Block(Vec<u8>, Option<Vec<u8>>),
    Failed(PortableError),
    End,
}

/// What a zstd frame unpacks to, and the frame.
pub type Frame = (Vec<u8>, Vec<u8>);

/// The bytes of a tar.
pub struct Unpacked {
    from: Receiver<Message>,
    spare: Sender<Vec<u8>>,
    read: Arc<AtomicU64>,
    block: Vec<u8>,
    frame: Option<Vec<u8>>,
    taken: usize,
    came: u64,
    limit: Option<u64>,
    ended: bool,
    archive: Option<([u8; 16], String)>,
    cancel: CancellationToken,
    /// Whoever reads ahead reads no further when this is gone, also where nothing comes out of what is read.
    _stop: DropGuard,
}

impl Unpacked {
    /// `limit`: of decompressed bytes; None: 1 GiB and 250 times what was read.
    pub fn start<R: Read + Send + 'static>(input: R, keys: Keys, limit: Option<u64>, cancel: CancellationToken) -> Result<Self> {
        let (to, from) = bounded(AHEAD);
        let (spare, spares) = bounded(AHEAD + 2);
        let read = Arc::new(AtomicU64::new(0));
        let stop = cancel.child_token();
        let input = Counted { input, read: read.clone(), stop: stop.clone() };
        let pump = move || {
            let end = match pump(input, &keys, &to, &spares) {
                Ok(()) => Message::End,
                Err(e) => Message::Failed(e),
            };
            // Nobody waits for it when the archive was given up.
            let _ = to.send(end);
        };
        let started = thread::Builder::new().name("archive-read".into()).spawn(pump);
        started.map_err(|e| PortableError::Io(io::Error::new(e.kind(), format!("cannot start a thread: {e}"))))?;
        Ok(Self {
            from,
            spare,
            read,
            block: Vec::new(),
            frame: None,
            taken: 0,
            came: 0,
            limit,
            ended: false,
            archive: None,
            cancel,
            _stop: stop.drop_guard(),
        })
    }

    /// Bytes read of the archive as it lies there.
    pub fn position(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Its name, where it was sealed; known with the first bytes.
    pub fn archive(&self) -> Option<[u8; 16]> {
        self.archive.as_ref().map(|(name, _)| *name)
    }

    /// What it opened with, where it was sealed; known with the first bytes.
    pub fn opened_with(&self) -> Option<&str> {
        self.archive.as_ref().map(|(_, with)| with.as_str())
    }

    /// What was not taken of the block that came last; empty at the end alone.
    fn have(&mut self) -> Result<&[u8]> {
        while self.taken == self.block.len() && !self.ended {
            let block = std::mem::take(&mut self.block);
            self.taken = 0;
            if block.capacity() > 0 {
                let _ = self.spare.try_send(block);
            }
            match self.next()? {
                Message::Archive(archive, with) => self.archive = Some((archive, with)),
                Message::Failed(e) => return Err(e),
                Message::End => self.ended = true,
                Message::Block(block, frame) => {
                    self.came += block.len() as u64;
                    let read = self.position();
                    let most = self.limit.unwrap_or_else(|| FREE_BYTES.saturating_add(RATIO.saturating_mul(read)));
                    if self.came > most {
                        return Err(PortableError::TooMuch(format!(
                            "the archive unpacks to more than {most} bytes, of {read} that were read of it; allow more if that is what it should hold"
                        )));
                    }
                    (self.block, self.frame) = (block, frame);
                }
            }
        }
        Ok(self.block.get(self.taken..).unwrap_or_default())
    }

    fn next(&self) -> Result<Message> {
        loop {
            if self.cancel.is_cancelled() {
                return Err(PortableError::Cancelled);
            }
            match self.from.recv_timeout(LOOK) {
                Ok(message) => return Ok(message),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(PortableError::Io(io::Error::other("the archive cannot be read further: the thread that read it is gone")));
                }
            }
        }
    }

    /// As many bytes as are at hand; 0 at the end alone.
    pub fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        let have = self.have()?;
        let n = have.len().min(into.len());
        if let (Some(to), Some(from)) = (into.get_mut(..n), have.get(..n)) {
            to.copy_from_slice(from);
        }
        self.taken += n;
        Ok(n)
    }

    /// The next bytes as a whole zstd frame, with what it unpacks to, 128 KiB to `most` bytes; None where they are not one. What was unpacked may be given back to be
    /// used again ([`Self::recycle`]).
    pub fn frame(&mut self, most: u64) -> Result<Option<Frame>> {
        let len = self.have()?.len();
        if self.taken > 0 || len == 0 || len as u64 > most {
            return Ok(None);
        }
        let Some(frame) = self.frame.take() else { return Ok(None) };
        Ok(Some((std::mem::take(&mut self.block), frame)))
    }

    pub fn recycle(&self, block: Vec<u8>) {
        let _ = self.spare.try_send(block);
    }

    /// Fills it; false where it ended before the first byte.
    pub fn read_exact(&mut self, into: &mut [u8]) -> Result<bool> {
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.read(rest)? {
                0 if done == 0 => return Ok(false),
                0 => return Err(PortableError::Damaged("the archive is cut off: its tar ends within a block".into())),
                n => done += n,
            }
        }
        Ok(true)
    }
}

fn pump<R: Read>(input: Counted<R>, keys: &Keys, to: &Sender<Message>, spares: &Receiver<Vec<u8>>) -> Result<()> {
    let mut input = BufReader::with_capacity(256 << 10, input);
    let mut start = [0; 8];
    let have = fill(&mut input, &mut start)?;
    let start = start.get(..have).unwrap_or_default();
    if start.is_empty() {
        return Err(PortableError::Damaged("the archive is empty".into()));
    }
    if seal::is_sealed(start) {
        let opener = Opener::open(input, keys)?;
        if to.send(Message::Archive(opener.archive(), opener.opened_with().to_owned())).is_err() {
            return Ok(());
        }
        return unpack(BufReader::with_capacity(64 << 10, opener), to, spares);
    }
    if !keys.is_empty() {
        let text = "the archive is not sealed, and a key was given to open it with; give it without a key if that is what you expect";
        return Err(PortableError::NotOpen(text.into()));
    }
    let start = start.to_vec();
    unpack(BufReader::with_capacity(256 << 10, io::Cursor::new(start).chain(input)), to, spares)
}

fn unpack(mut input: impl BufRead, to: &Sender<Message>, spares: &Receiver<Vec<u8>>) -> Result<()> {
    let start = input.fill_buf().map_err(|e| failed(e, ""))?;
    match start {
        [] => Err(PortableError::Damaged("the archive is empty".into())),
        [0x1f, 0x8b, ..] => send(&mut MultiGzDecoder::new(input), to, spares, "gzip"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let (rest, ended) = send_frames(&mut input, to, spares)?;
            if ended {
                return Ok(());
            }
            let input = BufReader::with_capacity(64 << 10, io::Cursor::new(rest).chain(input));
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input).map_err(PortableError::Io)?;
            decoder.window_log_max(MAX_WINDOW_LOG).map_err(PortableError::Io)?;
            send(&mut decoder, to, spares, "zstd")
        }
        [b'B', b'Z', b'h', ..] => Err(other_packing("bzip2", "bunzip2")),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Err(other_packing("xz", "unxz")),
        [b'P', b'K', 3, 4, ..] => {
            Err(PortableError::Version("it is a zip file; keepd reads tar archives: plain, or compressed with gzip or zstd".into()))
        }
        _ => send(&mut input, to, spares, "tar"),
    }
}

/// Plaintext of a frame that is unpacked as a whole.
const FRAME_BYTES: usize = 4 << 20;
/// A frame of less plaintext is not handed on as one: chunks of so few bytes cost a repository more than they spare.
const FRAME_LEAST: usize = 128 << 10;
/// Of a frame so much is read at least before it is looked whether it is whole.
const FRAME_STEP: usize = 256 << 10;
/// What was unpacked is cut off the front when it is so much.
const FRAMES_HELD: usize = 1 << 20;
/// So many frames without contents may follow each other.
const MAX_EMPTY_FRAMES: usize = 1000;

/// Unpacks frame by frame, as long as each says that it is not large, and needs no more than any decoder allows: as keepd makes them. What was read and belongs to another
/// kind of frame comes back; or true at the end.
fn send_frames(input: &mut impl BufRead, to: &Sender<Message>, spares: &Receiver<Vec<u8>>) -> Result<(Vec<u8>, bool)> {
    let mut decompressor = zstd::bulk::Decompressor::new().map_err(PortableError::Io)?;
    let most = zstd::zstd_safe::compress_bound(FRAME_BYTES);
    // Its first `at` bytes are unpacked.
    let (mut have, mut at): (Vec<u8>, usize) = (Vec::new(), 0);
    let mut empty = 0;
    let mut more = |have: &mut Vec<u8>| -> Result<bool> {
        let came = input.take(FRAME_STEP as u64).read_to_end(have).map_err(|e| failed(e, "zstd"))?;
        Ok(came > 0)
    };
    loop {
        if at == have.len() || at >= FRAMES_HELD {
            have.drain(..at);
            at = 0;
        }
        if at == have.len() && !more(&mut have)? {
            return Ok((Vec::new(), true));
        }
        // A header has at most 18 bytes.
        while have.len() - at < 18 && more(&mut have)? {}
        let start = have.get(at..).unwrap_or_default();
        let said = match is_frugal_frame(start) {
            true => zstd::zstd_safe::get_frame_content_size(start).ok().flatten(),
            false => None,
        };
        let Some(len) = said.and_then(|len| usize::try_from(len).ok()).filter(|len| *len <= FRAME_BYTES) else {
            return Ok((have.split_off(at), false));
        };
        let size = loop {
            let rest = have.get(at..).unwrap_or_default();
            if let Some(size) = zstd::zstd_safe::find_frame_compressed_size(rest).ok().filter(|size| *size <= rest.len()) {
                break size;
            }
            if rest.len() > most || !more(&mut have)? {
                // Cut off or damaged: the other way says which.
                return Ok((have.split_off(at), false));
            }
        };
        let frame = have.get(at..at + size).unwrap_or_default();
        let mut block = spares.try_recv().unwrap_or_default();
        block.clear();
        block.reserve(len);
        match decompressor.decompress_to_buffer(frame, &mut block) {
            Ok(came) if came == len => {}
            _ => return Err(PortableError::Damaged("the archive's zstd stream is damaged".into())),
        }
        let whole = (len >= FRAME_LEAST).then(|| frame.to_vec());
        at += size;
        empty = if block.is_empty() { empty + 1 } else { 0 };
        if empty > MAX_EMPTY_FRAMES {
            return Err(PortableError::Hostile(format!(
                "the archive's zstd stream has more than {MAX_EMPTY_FRAMES} empty frames in a row"
            )));
        }
        if !block.is_empty() && to.send(Message::Block(block, whole)).is_err() {
            return Ok((Vec::new(), true));
        }
    }
}

fn other_packing(name: &str, program: &str) -> PortableError {
    PortableError::Version(format!(
        "the archive is compressed with {name}; keepd reads plain tar, gzip and zstd: decompress it with '{program}' first"
    ))
}

fn send(input: &mut impl Read, to: &Sender<Message>, spares: &Receiver<Vec<u8>>, what: &str) -> Result<()> {
    loop {
        let mut block = spares.try_recv().unwrap_or_default();
        block.clear();
        // What came before an error is passed on first: the tar in it may say more.
        let read = input.take(BLOCK_BYTES as u64).read_to_end(&mut block);
        if !block.is_empty() && to.send(Message::Block(block, None)).is_err() {
            return Ok(());
        }
        match read {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(e) => return Err(failed(e, what)),
        }
    }
}

/// Says whose error it is: of the place it is read from, of the sealing, or of the compression.
fn failed(e: io::Error, what: &str) -> PortableError {
    match PortableError::inside(e) {
        Ok(inside) => inside,
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            PortableError::Damaged(format!("the archive is cut off: its {what} stream ends early"))
        }
        Err(e) if e.to_string().contains("too much memory") => PortableError::TooMuch(format!(
            "the archive was compressed with a window of more than {} MiB, which is not read; compress it again without --long or --ultra",
            1u64 << (MAX_WINDOW_LOG - 20)
        )),
        Err(e) => PortableError::Damaged(format!("the archive's {what} stream is damaged: {e}")),
    }
}

fn fill(input: &mut impl Read, into: &mut [u8]) -> Result<usize> {
    let mut done = 0;
    while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match input.read(rest).map_err(|e| failed(e, ""))? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}

/// Counts what is read, and marks its errors as those of the place it is read from.
struct Counted<R> {
    input: R,
    read: Arc<AtomicU64>,
    stop: CancellationToken,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.stop.is_cancelled() {
                return Err(io::Error::other(PortableError::Cancelled));
            }
            match self.input.read(into) {
                Ok(n) => {
                    self.read.fetch_add(n as u64, Ordering::Relaxed);
                    return Ok(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(io::Error::other(PortableError::Io(e))),
            }
        }
    }
}
