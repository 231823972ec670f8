//! Memory that a run used and nobody will for hours goes back to the system: glibc keeps it otherwise, for each thread that
//! ever ran, and a daemon that idles at hundreds of megabytes takes them from the applications it is there for.
#![allow(unsafe_code)]

/// Gives back what is free. Takes some milliseconds after a large run.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers, and only touches memory that the allocator holds as free, under its own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// How many pools the allocator makes for threads that allocate at the same time. Each keeps a share of free memory, and eight
/// for each processor (the default) are too many for threads that live as long as one run.
pub fn few_pools() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes two numbers; called before there are other threads.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
