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

/// Unmaps the code of this program: what is wanted of it again is mapped from the page cache, which costs a millisecond or two altogether. The kernel maps far
/// more around each page that was wanted than is ever run (pages of the size it reads files in), and all of it counts as the daemon's resident memory.
///
/// Only code: nothing ever wrote to it, while the loader wrote addresses into what lies beside it. Breakpoints that a debugger set are lost.
pub fn let_go_of_program() {
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return };
    let Some((from, bytes)) = maps.lines().find_map(|line| code_around(line, let_go_of_program as fn() as usize)) else { return };
    // SAFETY: a private mapping of a file that nobody wrote to, as its rights say; each page comes back as it is in the file, at the next access.
    let _ = unsafe { rustix::mm::madvise(std::ptr::with_exposed_provenance_mut(from), bytes, rustix::mm::Advice::LinuxDontNeed) };
}

/// Start and length of the mapping of a line of `/proc/self/maps`, if it holds this address and is code of a file that nobody can have written to.
fn code_around(line: &str, address: usize) -> Option<(usize, usize)> {
    let mut words = line.split_ascii_whitespace();
    let (from, to) = words.next()?.split_once('-')?;
    let (from, to) = (usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?);
    let is_code = words.next()? == "r-xp" && words.nth(2)? != "0";
    (is_code && (from..to).contains(&address)).then(|| (from, to - from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_a_file_is_let_go_of() {
        let line =
            |rights: &str, inode: &str| format!("559e8a0c0000-559e8bbe7000 {rights} 0084c000 fe:00 {inode}    /usr/bin/keepd of mine");
        assert_eq!(code_around(&line("r-xp", "1311"), 0x559e_8a0c_0000), Some((0x559e_8a0c_0000, 0x1b2_7000)));
        for (rights, inode, address) in [
            ("r-xp", "1311", 0x559e_8bbe_7000),
            ("r-xp", "1311", 0x559e_8a0b_ffff),
            ("r--p", "1311", 0x559e_8a0c_0000),
            ("rwxp", "1311", 0x559e_8a0c_0000),
            ("r-xs", "1311", 0x559e_8a0c_0000),
            ("r-xp", "0", 0x559e_8a0c_0000),
        ] {
            assert_eq!(code_around(&line(rights, inode), address), None, "{rights} {inode} {address:x}");
        }
        for line in ["", "x-y r-xp 0 0 1", "559e8a0c0000 r-xp 0 0 1", "559e8a0c0000-559e8bbe7000 r-xp"] {
            assert_eq!(code_around(line, 0x559e_8a0c_0000), None);
        }
    }
}
