//! What goes over the line between the two ends of a bridge: frames of nine bytes of header (kind, id, length, big-endian) and at most 64 KiB.
//!
//! The far end begins with a line that is found also behind what a login shell prints, and the near end answers with [`Kind::Hello`]. Ids are given by
//! the near end and never used twice. What a side may send without being asked for more is [`WINDOW`] bytes for each id.

use std::io::{self, Read};

use serde::{Deserialize, Serialize};

/// What stands before the version in the far end's first line.
pub const MARK: &[u8] = b"\0keepctl-bridge ";
/// Both ends speak the same.
pub const VERSION: &str = "1";
/// A longer frame is none.
pub const MAX_PAYLOAD: usize = 64 << 10;
/// So many bytes of one channel or stream may be on their way, in each direction.
pub const WINDOW: usize = 4 << 20;
/// Longer files are not held in the memory of the far end. What keepd takes as a file, and not as a stream, is shorter.
pub const MAX_FILE: u64 = 65 << 20;
/// Nor more of them at once.
pub const MAX_FILES: u64 = 128 << 20;
/// Channels and streams that are open at once.
pub const MAX_OPEN: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Near: JSON, [`Hello`].
    Hello = 0,
    /// Near: connect to the daemon, and call the connection by this id.
    Open = 1,
    /// Far: connected.
    Opened = 2,
    /// Far: not connected; an exit status, and why.
    Refused = 3,
    /// Bytes of a channel or of a stream.
    Data = 4,
    /// So many bytes (u32) were taken: as many more may come.
    Credit = 5,
    /// Nothing comes any more; a byte 1 where it was broken off.
    End = 6,
    /// Nothing is taken any more.
    Drop = 7,
    /// All was written to where it belongs, and that is closed; a byte 1 where it was less than all, 2 where nobody wanted the rest.
    Done = 8,
    /// Near: descriptors that go with the next data of a channel, JSON: a list of [`Passed`].
    Pass = 9,
}

impl Kind {
    const ALL: [Self; 10] =
        [Self::Hello, Self::Open, Self::Opened, Self::Refused, Self::Data, Self::Credit, Self::End, Self::Drop, Self::Done, Self::Pass];
}

#[derive(Debug)]
pub struct Frame {
    pub kind: Kind,
    pub id: u32,
    pub payload: Vec<u8>,
}

/// The near end's first frame.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Hello {
    /// Of the bridge, not of keepctl.
    pub version: String,
    /// The daemon's socket there, where it is not the usual one. It leads nowhere: the far end's own command line does, and this has to be the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
}

/// A descriptor that the daemon is to get.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Passed {
    pub id: u32,
    pub way: Way,
}

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// The daemon writes into a pipe.
    Written,
    /// The daemon reads from a pipe.
    Read,
    /// The daemon reads a file, which is whole before it gets the call. The mode is what its rights are judged by, the name is for messages.
    File { mode: u32, name: String },
}

pub fn header(kind: Kind, id: u32, len: usize) -> [u8; 9] {
    let (id, len) = (id.to_be_bytes(), u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    let ([a, b, c, d], [e, f, g, h]) = (id, len);
    [kind as u8, a, b, c, d, e, f, g, h]
}

/// The next frame; None at a clean end.
pub fn read(from: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut first = [0; 1];
    loop {
        match from.read(&mut first) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let (mut id, mut len) = ([0; 4], [0; 4]);
    from.read_exact(&mut id)?;
    from.read_exact(&mut len)?;
    let [number] = first;
    let wrong = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    let kind = Kind::ALL.into_iter().find(|k| *k as u8 == number).ok_or_else(|| wrong(format!("a frame of the unknown kind {number}")))?;
    let len = u32::from_be_bytes(len) as usize;
    if len > MAX_PAYLOAD {
        return Err(wrong(format!("a frame of {len} bytes, where {MAX_PAYLOAD} are the most")));
    }
    let mut payload = vec![0; len];
    from.read_exact(&mut payload)?;
    Ok(Some(Frame { kind, id: u32::from_be_bytes(id), payload }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_and_hostile_ones_do_not() {
        let mut bytes = header(Kind::Data, 7, 3).to_vec();
        bytes.extend_from_slice(b"abc");
        let mut input = bytes.as_slice();
        let frame = read(&mut input).unwrap().unwrap();
        assert_eq!((frame.kind, frame.id, frame.payload.as_slice()), (Kind::Data, 7, &b"abc"[..]));
        assert!(read(&mut input).unwrap().is_none());
        for cut in 1..bytes.len() {
            assert!(read(&mut &bytes[..cut]).is_err(), "{cut}");
        }
        // 4 GiB are refused before anything is set aside for them.
        assert!(read(&mut &header(Kind::Data, 7, usize::MAX)[..]).unwrap_err().to_string().contains("the most"));
        assert!(read(&mut &[99u8, 0, 0, 0, 0, 0, 0, 0, 0][..]).unwrap_err().to_string().contains("unknown kind 99"));
        for kind in Kind::ALL {
            assert_eq!(read(&mut &header(kind, 1, 0)[..]).unwrap().unwrap().kind, kind);
        }
    }
}
