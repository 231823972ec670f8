//! Memory that is lent to whoever sends the stream of a restore, on the same machine: contents are put there instead of going
//! through the pipe, and are written from there without being copied again.

use std::io::{self, PipeWriter, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use keepd_protocol::restore::BLOCK_BYTES;
use memmap2::{Mmap, MmapOptions};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, memfd_create};
use rustix::process::{Resource, getrlimit};

/// Blocks that are lent: what is sent ahead of the disk.
const BLOCKS: usize = 8;

/// The writer's side of it.
pub struct Memory(Arc<Lent>);

struct Lent {
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
        // Now, and not when the sender writes to it: it is ours, and whether there is enough is known here.
        fallocate(&memory, FallocateFlags::empty(), 0, bytes as u64)?;
        fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        // SAFETY: the file is of memory, as long as the mapping, and sealed to stay so. The sender writes only to blocks that are not the
        // writer's at that time; one that does not keep to that spoils what it sends.
        #[allow(unsafe_code)]
        let map = unsafe { MmapOptions::new().len(bytes).map(&memory) }?;
        let (from, returned) = io::pipe()?;
        Ok((Self(Arc::new(Lent { map, returned })), Offer { memory, returned: from.into() }))
    }

    /// The first `len` bytes of a block that the sender told of; None where there are none such.
    pub(crate) fn take(&self, block: u32, len: u32) -> Option<Held> {
        let (block, len) = (usize::try_from(block).ok()?, usize::try_from(len).ok()?);
        (block < BLOCKS && len <= BLOCK_BYTES).then(|| Held { lent: self.0.clone(), block, len })
    }
}

/// A block that is the writer's, until this goes: the sender, who would wait for it, may use it again then, whether it was written or not.
pub(crate) struct Held {
    lent: Arc<Lent>,
    block: usize,
    len: usize,
}

impl Held {
    pub(crate) fn bytes(&self) -> &[u8] {
        let start = self.block * BLOCK_BYTES;
        self.lent.map.get(start..start + self.len).unwrap_or_default()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Ok(number) = u8::try_from(self.block) {
            // A sender that is gone does not mind.
            let _ = (&self.lent.returned).write_all(&[number]);
        }
    }
}
