//! Memory that is lent to whoever sends the stream of a restore, on the same machine: contents are put there instead of going
//! through the pipe, and are written from there without being copied again.

use std::io::{self, PipeWriter, Write};
use std::os::fd::OwnedFd;

use keepd_protocol::restore::BLOCK_BYTES;
use memmap2::{Mmap, MmapOptions};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::process::{Resource, getrlimit};

/// Blocks that are lent: what is sent ahead of the disk.
const BLOCKS: usize = 8;

/// The writer's side of it.
pub struct Memory {
    map: Mmap,
    returned: PipeWriter,
}

/// What the sender gets.
pub struct Offer {
    pub memory: OwnedFd,
    /// From here come the numbers of blocks that may be used again.
    pub returned: OwnedFd,
}

impl Memory {
    /// Makes memory to lend, 32 MiB; an error where the system has none to give, and a pipe has to do.
    pub fn offer() -> io::Result<(Self, Offer)> {
        let bytes = BLOCKS * BLOCK_BYTES;
        // Who may make no file so long would be ended by a signal for this one.
        if getrlimit(Resource::Fsize).current.is_some_and(|most| most < bytes as u64) {
            return Err(rustix::io::Errno::FBIG.into());
        }
        let memory = memfd_create("keepd-restore", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&memory, bytes as u64)?;
        fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        // SAFETY: the file is of memory, as long as the mapping, and sealed to stay so. The sender writes only to blocks that are not the
        // writer's at that time; one that does not keep to that spoils what it sends.
        #[allow(unsafe_code)]
        let map = unsafe { MmapOptions::new().len(bytes).map(&memory) }?;
        let (from, returned) = io::pipe()?;
        Ok((Self { map, returned }, Offer { memory, returned: from.into() }))
    }

    /// The first `len` bytes of a block; None where there are none such.
    pub(crate) fn bytes(&self, block: u32, len: usize) -> Option<&[u8]> {
        let start = (block as usize).checked_mul(BLOCK_BYTES)?;
        self.map.get(start..)?.get(..len).filter(|_| len <= BLOCK_BYTES)
    }

    /// The sender may use it again. One that is gone does not mind.
    pub(crate) fn give_back(&self, block: u32) {
        if let Ok(number) = u8::try_from(block) {
            let _ = (&self.returned).write_all(&[number]);
        }
    }
}
