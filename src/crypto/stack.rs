//! Overwrites what computing with a secret left behind on the stack.
//!
//! Libraries that wipe their values when dropped pass them about before that, and each call leaves copies in its frame. What is moved to the
//! heap afterwards can take such a frame along, as the bytes of it that nothing is written to, and then it stays.

use zeroize::Zeroize;

/// More than any of our computations with a key takes of the stack, which the tests measure; a small part of a thread's.
const WIPED_BYTES: usize = 64 << 10;

/// Runs a computation and overwrites the stack it used, up to 64 KiB. What it returns is the caller's to wipe.
#[inline(never)]
pub fn wiped<R>(compute: impl FnOnce() -> R) -> R {
    let result = called(compute);
    wipe();
    result
}

/// A frame of its own that begins where that of [`wipe`] will.
#[inline(never)]
fn called<R>(compute: impl FnOnce() -> R) -> R {
    compute()
}

#[inline(never)]
fn wipe() {
    let mut frame = [0_u64; WIPED_BYTES / 8];
    frame.zeroize();
    std::hint::black_box(&mut frame);
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use std::sync::Arc;

    use hpke::kem::X25519HkdfSha256;
    use hpke::{Deserializable, Kem};

    use super::super::hpke::PrivateKey;
    use super::super::key_file;
    use super::super::locked::Locked;
    use super::*;

    /// How far below a frame is looked for what was left: more than is wiped, so that a computation that needs more is found.
    const SEEN_BYTES: usize = 4 * WIPED_BYTES;

    /// Looks at a thread's stack. All that it needs is there before, for to get it would overwrite what it looks for.
    struct Look {
        memory: std::fs::File,
        seen: Vec<u8>,
    }

    impl Look {
        fn new() -> Self {
            Self { memory: std::fs::File::open("/proc/self/mem").unwrap(), seen: vec![0; SEEN_BYTES] }
        }

        /// How often the inner 30 bytes of a secret stand on the stack below the caller; of the 32, X25519 sets bits of the first and the last.
        #[inline(never)]
        fn left(&mut self, secret: &Locked) -> usize {
            let mark = 0_u8;
            let here = std::hint::black_box(&raw const mark) as usize;
            self.memory.read_exact_at(&mut self.seen, (here - SEEN_BYTES) as u64).unwrap();
            self.seen.windows(30).filter(|bytes| *bytes == &secret.bytes()[1..31]).count()
        }
    }

    #[inline(never)]
    fn computed(secret: &Locked) {
        let key = <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(secret.bytes()).unwrap();
        std::hint::black_box(X25519HkdfSha256::sk_to_pk(&key));
    }

    /// In a thread of its own, whose stack nothing else used.
    fn on_a_new_stack(look: impl FnOnce() + Send + 'static) {
        std::thread::Builder::new().stack_size(1 << 20).spawn(look).unwrap().join().unwrap();
    }

    #[test]
    fn nothing_of_a_private_key_is_left_on_the_stack() {
        on_a_new_stack(|| {
            let (mut look, secret) = (Look::new(), Locked::random().unwrap());
            computed(&secret);
            assert!(look.left(&secret) > 0, "without wiping it is found");
            wiped(|| computed(&secret));
            assert_eq!(look.left(&secret), 0, "computed with");
            let private = Arc::new(PrivateKey::new(secret.clone()).unwrap());
            assert_eq!(look.left(&secret), 0, "taken");
            let sealed = private.public().seal(&[7; 32], b"header").unwrap();
            PrivateKey::open_with(&[private], &sealed, b"header").unwrap();
            assert_eq!(look.left(&secret), 0, "opened with");
        });
        on_a_new_stack(|| {
            let (mut look, secret) = (Look::new(), Locked::random().unwrap());
            let line = key_file::line(key_file::Kind::Private, secret.bytes());
            wipe();
            assert_eq!(key_file::all_from_bytes(Path::new("key"), line.as_bytes()).unwrap().1.len(), 1);
            assert_eq!(look.left(&secret), 0, "read");
        });
    }
}
