//! The stream of a restore: what the daemon writes into the pipe and keepctl turns into files.
//!
//! A sequence of frames, each `tag: u8, length: u32 little-endian, payload`. The daemon sends entries in path order, so a
//! directory comes before what is in it; hard links and symlinks come where their path stands, and the writer creates
//! them last. The contents of a file follow its entry as `Data` frames in any order of offsets (ranges never overlap;
//! what no range covers is a hole, read as zeros), then `End`; a small file's contents stand in the entry's own
//! frame. `Finish` closes a whole stream: one that ends without it was cut off.
//!
//! A client on the same machine may lend memory: `Shared` frames then tell of contents that were put there instead of into
//! the pipe. It consists of blocks of [`BLOCK_BYTES`]; contents begin at a block's start. A block that was told of is the
//! client's until it gives it back: by writing the block's number, a byte, into the pipe that came along with the memory. To give
//! back what it has not ends the restore.
//!
//! | tag | frame | payload |
//! |---|---|---|
//! | 1 | Entry | `header length: u32 LE`, header as JSON ([`EntryHeader`]), then the whole contents if `inline` |
//! | 2 | Data | `entry: u64 LE`, `offset: u64 LE`, bytes |
//! | 3 | End | `entry: u64 LE` |
//! | 4 | Lost | `entry: u64 LE`: in place of its End; it cannot be had whole, and what came of it is not kept (a rescue alone sends it) |
//! | 5 | Shared | `entry: u64 LE`, `offset: u64 LE`, `block: u32 LE`, `length: u32 LE`: contents at the start of a block of lent memory |
//! | 8 | Error | text: the daemon could not go on |
//! | 9 | Finish | JSON ([`Summary`]) |

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use crate::model::{BytesPath, EntryKind};

/// A frame's payload is at most this long; a longer one is an error of the sender.
pub const MAX_FRAME_BYTES: usize = 4 << 20;
/// Contents up to this size travel inside their entry's frame.
pub const INLINE_BYTES: u64 = 512 << 10;
/// A block of lent memory, in bytes.
pub const BLOCK_BYTES: usize = 4 << 20;
/// So many blocks are lent at most.
pub const MAX_BLOCKS: usize = 16;

const ENTRY: u8 = 1;
const DATA: u8 = 2;
const END: u8 = 3;
const LOST: u8 = 4;
const SHARED: u8 = 5;
const ERROR: u8 = 8;
const FINISH: u8 = 9;

/// What an entry is, but for its contents. `index` counts from 0 in the order sent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EntryHeader {
    pub index: u64,
    /// `<source>` (the source's root) or `<source>/<path>`.
    pub path: BytesPath,
    pub kind: EntryKind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    pub mtime_seconds: i64,
    pub mtime_nanoseconds: u32,
    pub size: u64,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sparse: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub inline: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<BytesPath>,
    /// Extended attributes (ACLs among them): name and value, the value in base64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub xattrs: Vec<(BytesPath, String)>,
}

/// What was sent in all.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub entries: u64,
    pub bytes: u64,
}

/// A frame as read.
#[derive(Debug, Clone, PartialEq)]
pub enum Frame {
    /// The header and, where `inline`, the contents.
    Entry(Box<EntryHeader>, Vec<u8>),
    /// Contents at an offset; its `len` bytes are to be taken with [`FrameReader::data`] before the next frame.
    Data {
        entry: u64,
        offset: u64,
        len: usize,
    },
    End {
        entry: u64,
    },
    Lost {
        entry: u64,
    },
    /// Contents at an offset that lie at the start of a block of lent memory. Whether there is such a block is the caller's to check.
    Shared {
        entry: u64,
        offset: u64,
        block: u32,
        len: u32,
    },
    Error(String),
    Finish(Summary),
}

/// Length of what stands before the bytes in a `Data` payload.
const DATA_PREFIX: usize = 16;

/// Writes frames. The caller brings the buffering.
pub struct FrameWriter<W> {
    out: W,
    head: Vec<u8>,
}

impl<W: Write> FrameWriter<W> {
    pub fn new(out: W) -> Self {
        Self { out, head: Vec::with_capacity(1024) }
    }

    /// Writes an entry; `contents` are its whole contents when `header.inline`, else empty.
    pub fn entry(&mut self, header: &EntryHeader, contents: &[u8]) -> io::Result<()> {
        let json = serde_json::to_vec(header)?;
        let len = 4 + json.len() + contents.len();
        self.head.clear();
        self.head.push(ENTRY);
        self.head.extend_from_slice(&frame_len(len)?.to_le_bytes());
        self.head.extend_from_slice(&(json.len() as u32).to_le_bytes());
        self.head.extend_from_slice(&json);
        self.out.write_all(&self.head)?;
        self.out.write_all(contents)
    }

    /// Writes contents at an offset; longer than a frame holds, they are split.
    pub fn data(&mut self, entry: u64, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(1 << 20));
            self.head.clear();
            self.head.push(DATA);
            self.head.extend_from_slice(&((DATA_PREFIX + now.len()) as u32).to_le_bytes());
            self.head.extend_from_slice(&entry.to_le_bytes());
            self.head.extend_from_slice(&offset.to_le_bytes());
            self.out.write_all(&self.head)?;
            self.out.write_all(now)?;
            offset += now.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    pub fn end(&mut self, entry: u64) -> io::Result<()> {
        self.small(END, &entry.to_le_bytes())
    }

    pub fn lost(&mut self, entry: u64) -> io::Result<()> {
        self.small(LOST, &entry.to_le_bytes())
    }

    /// Tells of contents that were put into a block of lent memory, and has the client see it at once.
    pub fn shared(&mut self, entry: u64, offset: u64, block: u32, len: u32) -> io::Result<()> {
        let payload = [entry.to_le_bytes().as_slice(), &offset.to_le_bytes(), &block.to_le_bytes(), &len.to_le_bytes()].concat();
        self.small(SHARED, &payload)?;
        self.out.flush()
    }

    pub fn error(&mut self, text: &str) -> io::Result<()> {
        self.small(ERROR, &text.as_bytes()[..text.len().min(64 << 10)])?;
        self.out.flush()
    }

    pub fn finish(mut self, summary: &Summary) -> io::Result<W> {
        let json = serde_json::to_vec(summary)?;
        self.small(FINISH, &json)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn small(&mut self, tag: u8, payload: &[u8]) -> io::Result<()> {
        self.head.clear();
        self.head.push(tag);
        self.head.extend_from_slice(&frame_len(payload.len())?.to_le_bytes());
        self.head.extend_from_slice(payload);
        self.out.write_all(&self.head)
    }
}

/// Reads frames; bounded by [`MAX_FRAME_BYTES`] each.
pub struct FrameReader<R> {
    input: R,
    /// Contents of the last `Data` frame that were not taken yet.
    untaken: usize,
}

impl<R: Read> FrameReader<R> {
    pub fn new(input: R) -> Self {
        Self { input, untaken: 0 }
    }

    /// The next frame, or None at the end of the stream between two frames (whether `Finish` came before is the
    /// caller's to check).
    pub fn next_frame(&mut self) -> io::Result<Option<Frame>> {
        if self.untaken > 0 {
            return Err(bad(format!("{} bytes of contents were not taken", self.untaken)));
        }
        let mut head = [0u8; 5];
        match self.input.read(&mut head[..1])? {
            0 => return Ok(None),
            _ => self.input.read_exact(&mut head[1..])?,
        }
        let len = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if len > MAX_FRAME_BYTES {
            return Err(bad(format!("a frame of {len} bytes is over the limit of {MAX_FRAME_BYTES}")));
        }
        if head[0] == DATA {
            let mut prefix = [0u8; DATA_PREFIX];
            self.untaken = len.checked_sub(DATA_PREFIX).ok_or_else(|| bad("a frame is too short".into()))?;
            self.input.read_exact(&mut prefix)?;
            let (entry, offset) = prefix.split_at(8);
            let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
            return Ok(Some(Frame::Data { entry: number(entry), offset: number(offset), len: self.untaken }));
        }
        let mut payload = Vec::with_capacity(len);
        (&mut self.input).take(len as u64).read_to_end(&mut payload)?;
        if payload.len() < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let number = |at: usize| -> io::Result<u64> {
            let bytes = payload.get(at..at + 8).ok_or_else(|| bad("a frame is too short".into()))?;
            Ok(u64::from_le_bytes(bytes.try_into().unwrap_or_default()))
        };
        Ok(Some(match head[0] {
            ENTRY => {
                let n = payload.get(..4).ok_or_else(|| bad("an entry frame is too short".into()))?;
                let n = u32::from_le_bytes([n[0], n[1], n[2], n[3]]) as usize;
                let json = payload.get(4..4usize.saturating_add(n)).ok_or_else(|| bad("an entry header is cut off".into()))?;
                let header: EntryHeader = serde_json::from_slice(json)?;
                payload.drain(..4 + n);
                Frame::Entry(Box::new(header), payload)
            }
            END => Frame::End { entry: number(0)? },
            LOST => Frame::Lost { entry: number(0)? },
            SHARED => {
                let place = number(16)?;
                Frame::Shared { entry: number(0)?, offset: number(8)?, block: place as u32, len: (place >> 32) as u32 }
            }
            ERROR => Frame::Error(String::from_utf8_lossy(&payload).into_owned()),
            FINISH => Frame::Finish(serde_json::from_slice(&payload)?),
            tag => return Err(bad(format!("frame tag {tag} is unknown"))),
        }))
    }
}

impl<R: Read> FrameReader<R> {
    /// Fills `into` with the next contents of the `Data` frame that came last; no more than are left of it.
    pub fn data(&mut self, into: &mut [u8]) -> io::Result<()> {
        self.untaken = self.untaken.checked_sub(into.len()).ok_or_else(|| bad("more contents were wanted than came".into()))?;
        self.input.read_exact(into)
    }
}

fn frame_len(len: usize) -> io::Result<u32> {
    if len > MAX_FRAME_BYTES { Err(bad(format!("a frame of {len} bytes is over the limit of {MAX_FRAME_BYTES}"))) } else { Ok(len as u32) }
}

fn bad(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_written() {
        let mut w = FrameWriter::new(Vec::new());
        let header = EntryHeader { index: 3, path: BytesPath::from_bytes(b"db/\xff"), size: 5, inline: true, ..Default::default() };
        w.entry(&header, b"hello").unwrap();
        w.data(4, 7, &vec![9u8; (1 << 20) + 3]).unwrap();
        w.shared(4, (1 << 40) + 5, 7, 4 << 20).unwrap();
        w.end(4).unwrap();
        let bytes = w.finish(&Summary { entries: 2, bytes: 6 }).unwrap();
        let mut r = FrameReader::new(&bytes[..]);
        assert_eq!(r.next_frame().unwrap().unwrap(), Frame::Entry(Box::new(header), b"hello".to_vec()));
        assert_eq!(r.next_frame().unwrap().unwrap(), Frame::Data { entry: 4, offset: 7, len: 1 << 20 });
        let mut data = vec![0u8; 1 << 20];
        r.data(&mut data[..5]).unwrap();
        assert!(r.data(&mut vec![0u8; 1 << 20]).is_err(), "more than the frame holds");
        let mut r = FrameReader::new(&bytes[..]);
        r.next_frame().unwrap();
        r.next_frame().unwrap();
        r.data(&mut data[..5]).unwrap();
        r.data(&mut data[5..]).unwrap();
        assert!(data.iter().all(|b| *b == 9));
        assert_eq!(r.next_frame().unwrap().unwrap(), Frame::Data { entry: 4, offset: 7 + (1 << 20), len: 3 });
        assert!(r.next_frame().is_err(), "contents that nobody took");
        r = FrameReader::new(&bytes[..]);
        r.next_frame().unwrap();
        for len in [1 << 20, 3] {
            r.next_frame().unwrap();
            r.data(&mut data[..len]).unwrap();
        }
        assert_eq!(r.next_frame().unwrap().unwrap(), Frame::Shared { entry: 4, offset: (1 << 40) + 5, block: 7, len: 4 << 20 });
        assert_eq!(r.next_frame().unwrap().unwrap(), Frame::End { entry: 4 });
        assert_eq!(r.next_frame().unwrap().unwrap(), Frame::Finish(Summary { entries: 2, bytes: 6 }));
        assert!(r.next_frame().unwrap().is_none());
        let mut cut = FrameReader::new(&bytes[..bytes.len() - 1]);
        let error = loop {
            match cut.next_frame() {
                Ok(Some(Frame::Data { len, .. })) => cut.data(&mut data[..len]).unwrap(),
                Ok(Some(_)) => continue,
                Ok(None) => panic!("a cut stream ended like a whole one"),
                Err(e) => break e,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_giant_length_is_refused_before_anything_is_allocated() {
        let mut r = FrameReader::new(&[2u8, 0xff, 0xff, 0xff, 0xff][..]);
        assert_eq!(r.next_frame().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
