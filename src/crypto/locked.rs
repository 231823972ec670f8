//! Memory for keys: pages of their own that are never swapped out, never in a core dump, and empty in a child.

#![allow(unsafe_code)]

use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap_anonymous, munmap};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use zeroize::Zeroize;

/// 32 secret bytes in a page of their own: mlock(2), MADV_DONTDUMP, MADV_WIPEONFORK; zeroed on drop. It has no `Debug`.
///
/// Where the system grants no locked memory (RLIMIT_MEMLOCK) the page is used all the same: keys that could be swapped out are less bad than
/// backups that are not made, and the unit forbids its service to swap at all.
pub struct Locked(NonNull<[u8; Self::BYTES]>);

// SAFETY: the page belongs to this value alone and is only written through `&mut`.
unsafe impl Send for Locked {}
// SAFETY: as above.
unsafe impl Sync for Locked {}

impl Locked {
    pub const BYTES: usize = 32;
    /// Of the mapping; the kernel rounds it up to a page.
    const MAPPED: usize = 4096;

    /// 32 zeros. Without memory for a page this ends the process, as an allocation of Rust's does.
    pub fn zeros() -> Self {
        // SAFETY: a new private mapping; nothing else refers to it, and it is zeroed and aligned to a page.
        let page = unsafe {
            mmap_anonymous(std::ptr::null_mut(), Self::MAPPED, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
                .unwrap_or(std::ptr::null_mut())
        };
        let Some(at) = NonNull::new(page) else { std::alloc::handle_alloc_error(std::alloc::Layout::new::<[u8; Self::MAPPED]>()) };
        // SAFETY: the mapping made above, of this length. What is refused leaves it as it is.
        unsafe {
            let _ = mlock(at.as_ptr(), Self::MAPPED);
            let _ = madvise(at.as_ptr(), Self::MAPPED, Advice::LinuxDontDump);
            let _ = madvise(at.as_ptr(), Self::MAPPED, Advice::LinuxWipeOnFork);
        }
        Self(at.cast())
    }

    /// Moves bytes here; where they were is zeroed.
    pub fn take(bytes: &mut [u8; Self::BYTES]) -> Self {
        let mut locked = Self::zeros();
        locked.bytes_mut().copy_from_slice(bytes);
        bytes.zeroize();
        locked
    }

    /// Of the system's random source.
    pub fn random() -> Result<Self, super::CryptoError> {
        let mut locked = Self::zeros();
        getrandom::fill(locked.bytes_mut()).map_err(|e| super::CryptoError::Random(e.to_string()))?;
        Ok(locked)
    }

    pub fn bytes(&self) -> &[u8; Self::BYTES] {
        // SAFETY: the mapping lives as long as this value.
        unsafe { self.0.as_ref() }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8; Self::BYTES] {
        // SAFETY: as above, and nobody else has it.
        unsafe { self.0.as_mut() }
    }
}

impl Clone for Locked {
    fn clone(&self) -> Self {
        let mut copy = Self::zeros();
        copy.bytes_mut().copy_from_slice(self.bytes());
        copy
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        self.bytes_mut().zeroize();
        // SAFETY: the mapping made in `zeros`, which nothing refers to any more. Unmapping unlocks it.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), Self::MAPPED) };
    }
}

/// Keeps this process's memory from core dumps, and from other processes of its user (ptrace, /proc/PID/mem); what it starts is not touched
/// but for the core dumps. To be called first of all. Returns what the system refused.
pub fn guard_process() -> Vec<String> {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    let limited = setrlimit(Resource::Core, none).map_err(|e| format!("core dumps cannot be turned off: {e}"));
    let hidden =
        set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(|e| format!("its memory cannot be hidden from other processes: {e}"));
    [limited, hidden].into_iter().filter_map(Result::err).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guarded_process_leaves_no_core() {
        assert_eq!(guard_process(), Vec::<String>::new());
        assert_eq!(rustix::process::dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
        assert_eq!(rustix::process::getrlimit(Resource::Core).current, Some(0));
        // A child that runs another program is as any other.
        let status = std::process::Command::new("sh").args(["-c", "test -r /proc/self/environ"]).status().unwrap();
        assert!(status.success());
    }

    /// What the kernel says of the mapping that holds an address.
    fn flags_at(address: usize) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in maps.lines() {
            if let Some((from, to)) = line.split_once(' ').and_then(|(range, _)| range.split_once('-'))
                && let (Ok(from), Ok(to)) = (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16))
            {
                inside = (from..to).contains(&address);
            }
            if inside && line.starts_with("VmFlags:") {
                return line.to_owned();
            }
        }
        panic!("no mapping holds {address:x}");
    }

    #[test]
    fn its_page_is_locked_not_dumped_and_wiped_in_children() {
        let mut bytes = [7; 32];
        let locked = Locked::take(&mut bytes);
        assert_eq!((bytes, locked.bytes()), ([0; 32], &[7; 32]));
        let flags = flags_at(locked.bytes().as_ptr() as usize);
        for flag in ["lo", "dd", "wf"] {
            assert!(flags.split_whitespace().any(|f| f == flag), "{flag} is not in {flags}");
        }
        assert_eq!(locked.clone().bytes(), &[7; 32]);
        assert_ne!(Locked::random().unwrap().bytes(), &[0; 32]);
    }
}
