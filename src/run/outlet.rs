//! Where a restore's stream goes to: frames into the client's pipe, and long contents into memory that the client lent, where it did.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use keepd_protocol::restore::{BLOCK_BYTES, EntryHeader, FrameWriter, MAX_BLOCKS, Summary};
use rustix::event::PollFlags;
use rustix::fs::{OFlags, SealFlags};
use tokio_util::sync::CancellationToken;

use super::live::Failure;
use super::patient::{PatientWriter, not_waiting, wait_for};

/// Pieces that follow nothing and are shorter are not worth a block, in bytes.
const SHORT_BYTES: usize = 64 << 10;
/// Where contents end in a file so that those of the next block can go past the page cache.
const ALIGNMENT: u64 = 4096;

/// Descriptors that a client passed for a stream.
pub struct RestoreOut {
    pub frames: OwnedFd,
    pub memory: Option<SharedMemory>,
}

/// Memory of the client. It is written to like a file and not mapped, so that nothing the client does to it can end the daemon.
pub struct SharedMemory {
    memory: File,
    returned: File,
    blocks: u32,
    free: Vec<u32>,
    filling: Option<Filling>,
    /// Contents that went this way, in bytes.
    bytes: u64,
}

/// A block of which the client was not told yet.
struct Filling {
    block: u32,
    entry: u64,
    offset: u64,
    len: usize,
}

impl Filling {
    fn room(&self) -> usize {
        BLOCK_BYTES - (self.offset % ALIGNMENT) as usize - self.len
    }
}

impl SharedMemory {
    /// `memory`: a memfd that stays as long as it is, of some blocks; `returned`: the read end of a pipe, from which the numbers of
    /// blocks come that may be used again. An error says which of them is something else.
    pub fn new(memory: OwnedFd, returned: OwnedFd) -> Result<Self, String> {
        let (fixed, read_only) = (SealFlags::SHRINK | SealFlags::GROW, SealFlags::WRITE | SealFlags::FUTURE_WRITE);
        let is_fit = rustix::fs::fcntl_get_seals(&memory).is_ok_and(|seals| seals.contains(fixed) && !seals.intersects(read_only));
        if !is_fit || !rustix::fs::fcntl_getfl(&memory).is_ok_and(|flags| flags & OFlags::ACCMODE != OFlags::RDONLY) {
            return Err("the memory lent must be a memfd, sealed against shrinking and growing and open for writing".into());
        }
        let stat = rustix::fs::fstat(&memory).map_err(|e| format!("cannot look at the memory lent: {e}"))?;
        let bytes = stat.st_size as u64;
        let blocks = bytes / BLOCK_BYTES as u64;
        if !bytes.is_multiple_of(BLOCK_BYTES as u64) || !(1..=MAX_BLOCKS as u64).contains(&blocks) {
            return Err(format!("the memory lent must be 1 to {MAX_BLOCKS} blocks of {BLOCK_BYTES} bytes; it has {bytes} bytes"));
        }
        // What was not there when it was lent would be reckoned to keepd, which touches it first.
        if (stat.st_blocks as u64).saturating_mul(512) < bytes {
            return Err("the memory lent must be allocated".into());
        }
        let flags = rustix::fs::fcntl_getfl(&returned);
        // Only a pipe has a size, and no file system is asked for it.
        let is_pipe = rustix::pipe::fcntl_getpipe_size(&returned).is_ok();
        if !is_pipe || !flags.is_ok_and(|flags| flags & OFlags::ACCMODE == OFlags::RDONLY) {
            return Err("what blocks of memory are given back by must be a pipe, open for reading".into());
        }
        let returned = not_waiting(returned, OFlags::RDONLY)
            .map_err(|e| format!("cannot use the pipe that blocks of memory are given back by: {e}"))?;
        let blocks = blocks as u32;
        Ok(Self { memory: memory.into(), returned: returned.into(), blocks, free: (0..blocks).rev().collect(), filling: None, bytes: 0 })
    }

    /// A block that is not in use, when the client has given one back.
    fn block(&mut self, patience: Duration, cancel: &CancellationToken) -> io::Result<u32> {
        let since = Instant::now();
        loop {
            if let Some(block) = self.free.pop() {
                return Ok(block);
            }
            if !wait_for(&self.returned, PollFlags::IN, since, patience, cancel)? {
                continue;
            }
            let mut numbers = [0; MAX_BLOCKS];
            match self.returned.read(&mut numbers) {
                Ok(0) => return Err(io::ErrorKind::BrokenPipe.into()),
                Ok(n) => {
                    for block in numbers.iter().take(n).map(|number| u32::from(*number)) {
                        if block >= self.blocks || self.free.contains(&block) {
                            return Err(io::Error::new(
                                io::ErrorKind::InvalidData,
                                format!("it gave back block {block} of memory, which it did not have"),
                            ));
                        }
                        self.free.push(block);
                    }
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// What a stream is written into.
pub(super) struct Outlet {
    frames: FrameWriter<BufWriter<PatientWriter>>,
    memory: Option<SharedMemory>,
    patience: Duration,
    cancel: CancellationToken,
}

impl Outlet {
    pub fn new(out: RestoreOut, patience: Duration, cancel: &CancellationToken) -> Result<Self, Failure> {
        let frames = FrameWriter::new(BufWriter::with_capacity(256 << 10, PatientWriter::new(out.frames, patience, cancel.clone())?));
        Ok(Self { frames, memory: out.memory, patience, cancel: cancel.clone() })
    }

    pub fn entry(&mut self, header: &EntryHeader, contents: &[u8]) -> io::Result<()> {
        self.frames.entry(header, contents)
    }

    /// Contents at an offset. What follows one another of a file is gathered in a block where memory was lent.
    pub fn data(&mut self, entry: u64, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        if !self.goes_on(entry, offset) {
            self.tell()?;
            if bytes.len() < SHORT_BYTES {
                return self.frames.data(entry, offset, bytes);
            }
        }
        let Some(memory) = &mut self.memory else { return self.frames.data(entry, offset, bytes) };
        while !bytes.is_empty() {
            let filling = match &mut memory.filling {
                Some(filling) => filling,
                None => {
                    let block = memory.block(self.patience, &self.cancel)?;
                    memory.filling.insert(Filling { block, entry, offset, len: 0 })
                }
            };
            let (now, rest) = bytes.split_at(bytes.len().min(filling.room()));
            memory.memory.write_all_at(now, u64::from(filling.block) * BLOCK_BYTES as u64 + filling.len as u64)?;
            filling.len += now.len();
            memory.bytes += now.len() as u64;
            offset += now.len() as u64;
            bytes = rest;
            if filling.room() == 0 {
                tell(&mut self.frames, &mut memory.filling)?;
            }
        }
        Ok(())
    }

    pub fn end(&mut self, entry: u64) -> io::Result<()> {
        self.tell()?;
        self.frames.end(entry)
    }

    pub fn error(&mut self, text: &str) -> io::Result<()> {
        self.frames.error(text)
    }

    pub fn finish(mut self, summary: &Summary) -> io::Result<()> {
        self.tell()?;
        if let Some(memory) = &self.memory {
            tracing::debug!("{} of {} bytes went through lent memory", memory.bytes, summary.bytes);
        }
        self.frames.finish(summary).map(drop)
    }

    /// Whether contents follow those in the block that is being filled.
    fn goes_on(&self, entry: u64, offset: u64) -> bool {
        let filling = self.memory.as_ref().and_then(|memory| memory.filling.as_ref());
        filling.is_some_and(|filling| filling.entry == entry && filling.offset + filling.len as u64 == offset)
    }

    fn tell(&mut self) -> io::Result<()> {
        match &mut self.memory {
            Some(memory) => tell(&mut self.frames, &mut memory.filling),
            None => Ok(()),
        }
    }
}

/// Tells the client of what is in the block.
fn tell<W: Write>(frames: &mut FrameWriter<W>, filling: &mut Option<Filling>) -> io::Result<()> {
    match filling.take() {
        Some(Filling { block, entry, offset, len }) => frames.shared(entry, offset, block, len as u32),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use keepd_protocol::model::EntryKind;
    use keepd_writer::{Memory, Offer, Options};
    use proptest::prelude::*;

    use super::*;

    fn made_of(frames: OwnedFd, offer: Offer, patience: Duration, cancel: &CancellationToken) -> Outlet {
        let memory = SharedMemory::new(offer.memory, offer.returned).unwrap();
        Outlet::new(RestoreOut { frames, memory: Some(memory) }, patience, cancel).unwrap_or_else(|e| panic!("{e}"))
    }

    fn header(index: u64, size: u64) -> EntryHeader {
        EntryHeader { index, path: format!("f{index}").as_str().into(), kind: EntryKind::File, mode: 0o600, size, ..EntryHeader::default() }
    }

    /// Files of the lengths of their pieces, which are sent in some order, piece by piece.
    fn come_out_as_sent(files: &[(Vec<usize>, u64)]) {
        let dir = tempfile::tempdir().unwrap();
        let (memory, offer) = Memory::offer().unwrap();
        let (input, out) = io::pipe().unwrap();
        let to = dir.path().join("out");
        let byte = |file: usize, at: usize| (at.wrapping_mul(2_654_435_761) >> 9) as u8 ^ file as u8;
        let contents: Vec<Vec<u8>> =
            files.iter().enumerate().map(|(n, (pieces, _))| (0..pieces.iter().sum()).map(|at| byte(n, at)).collect()).collect();
        std::thread::scope(|scope| {
            let options = Options { numeric_owner: true, memory: Some(memory), ..Options::default() };
            let writer = scope.spawn(|| keepd_writer::write(input, &to, options, &|_, _| {}));
            let mut outlet = made_of(out.into(), offer, Duration::from_secs(60), &CancellationToken::new());
            let mut bytes = 0;
            for (n, (pieces, order)) in files.iter().enumerate() {
                let contents = &contents[n];
                outlet.entry(&header(n as u64, contents.len() as u64), b"").unwrap();
                let mut places = Vec::new();
                let mut at = 0;
                for piece in pieces {
                    places.push((at, *piece));
                    at += piece;
                }
                // Runs of pieces in order, and jumps between them.
                if order % 3 != 0 {
                    let by = (order / 3) as usize % places.len().max(1);
                    places.rotate_left(by);
                }
                for (at, len) in places {
                    outlet.data(n as u64, at as u64, &contents[at..at + len]).unwrap();
                    bytes += len as u64;
                }
                outlet.end(n as u64).unwrap();
            }
            outlet.finish(&Summary { entries: files.len() as u64, bytes }).unwrap();
            writer.join().unwrap().unwrap_or_else(|e| panic!("{}", e.0));
        });
        for (n, contents) in contents.iter().enumerate() {
            assert!(std::fs::read(to.join(format!("f{n}"))).unwrap() == *contents, "file {n}");
        }
    }

    #[test]
    fn more_than_the_memory_holds_goes_through_it() {
        come_out_as_sent(&[(vec![3_000_000; 17], 0), (vec![70_000, 4096, 4_190_208, 100, 9_000_000], 7), (vec![0], 1)]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
        #[test]
        fn pieces_of_any_length_in_any_order_come_out_as_sent(
            files in prop::collection::vec(
                (prop::collection::vec(prop_oneof![1usize..200, 4000usize..4200, 60_000usize..70_000, 1usize..1_500_000, 4_190_000usize..4_200_000], 1..9), any::<u64>()),
                1..4,
            )
        ) {
            come_out_as_sent(&files);
        }
    }

    #[test]
    fn who_gives_nothing_back_is_given_up_and_who_gives_back_what_it_has_not_is_told() {
        let begun = |patience| {
            let (memory, offer) = Memory::offer().unwrap();
            let (input, out) = io::pipe().unwrap();
            let cancel = CancellationToken::new();
            let outlet = made_of(out.into(), offer, patience, &cancel);
            (memory, input, outlet, cancel)
        };
        let fill = |outlet: &mut Outlet| {
            let block = vec![1; BLOCK_BYTES];
            (0..9).try_for_each(|n| outlet.data(0, n * BLOCK_BYTES as u64, &block))
        };
        let (_memory, _input, mut outlet, _) = begun(Duration::ZERO);
        assert!(fill(&mut outlet).unwrap_err().to_string().contains("it took nothing for"));
        let (_memory, _input, mut outlet, cancel) = begun(Duration::from_secs(600));
        cancel.cancel();
        assert!(fill(&mut outlet).unwrap_err().to_string().contains("cancelled"));
        let (memory, _input, mut outlet, _) = begun(Duration::from_secs(600));
        drop(memory);
        assert_eq!(fill(&mut outlet).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        for number in [8, 255, 3] {
            let (_memory, offer) = Memory::offer().unwrap();
            let (from, mut back) = io::pipe().unwrap();
            let (_input, out) = io::pipe().unwrap();
            let offer = Offer { memory: offer.memory, returned: from.into() };
            let mut outlet = made_of(out.into(), offer, Duration::from_secs(600), &CancellationToken::new());
            back.write_all(&[number, 3]).unwrap();
            let told = fill(&mut outlet).unwrap_err().to_string();
            assert!(told.contains("it gave back block") && told.contains("which it did not have"), "{told}");
        }
    }

    #[test]
    fn only_sealed_memory_of_whole_blocks_is_taken() {
        use std::os::fd::AsRawFd;

        use rustix::fs::{FallocateFlags, MemfdFlags, Mode, fallocate, fcntl_add_seals, ftruncate, memfd_create};
        let made = |bytes: u64, seals: SealFlags| -> OwnedFd {
            let memory = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
            if bytes > 0 {
                fallocate(&memory, FallocateFlags::empty(), 0, bytes).unwrap();
            }
            fcntl_add_seals(&memory, seals).unwrap();
            memory
        };
        let why = |memory: OwnedFd| {
            let (from, _back) = io::pipe().unwrap();
            SharedMemory::new(memory, from.into()).err()
        };
        let (fixed, block) = (SealFlags::SHRINK | SealFlags::GROW, BLOCK_BYTES as u64);
        assert_eq!(why(made(block, fixed)), None);
        assert_eq!(why(made(16 * block, fixed)), None);
        let made_open = made(block, fixed);
        // Not allocated, or not to be written to.
        let sparse = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&sparse, block).unwrap();
        fcntl_add_seals(&sparse, fixed).unwrap();
        assert!(why(sparse).is_some_and(|why| why.contains("must be allocated")));
        assert!(why(made(block, fixed | SealFlags::FUTURE_WRITE)).is_some_and(|why| why.contains("open for writing")));
        let by_another_way = format!("/proc/self/fd/{}", made_open.as_raw_fd());
        let to_read = rustix::fs::open(by_another_way, OFlags::RDONLY, Mode::empty()).unwrap();
        assert!(why(to_read).is_some_and(|why| why.contains("open for writing")));
        for (bytes, seals, text) in [
            (block, SealFlags::SHRINK, "sealed"),
            (block, SealFlags::GROW, "sealed"),
            (0, fixed, "it has 0 bytes"),
            (block - 1, fixed, "1 to 16 blocks"),
            (17 * block, fixed, "1 to 16 blocks"),
        ] {
            assert!(why(made(bytes, seals)).is_some_and(|why| why.contains(text)), "{bytes}");
        }
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        assert!(why(file).is_some_and(|why| why.contains("must be a memfd")));
        let (_from, back) = io::pipe().unwrap();
        assert!(SharedMemory::new(made(block, fixed), back.into()).err().is_some_and(|why| why.contains("open for reading")));
    }
}
