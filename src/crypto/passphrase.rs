//! Keys from passphrases: Argon2id (RFC 9106), never cheaper than a floor, so that nobody can have it guessed quickly, and never dearer than a
//! ceiling, so that no slot that somebody put there takes the machine down.

use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use argon2::{Algorithm, Argon2, Params, Version};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::CryptoError;
use super::locked::Locked;

/// What deriving a key costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    pub memory_kib: u32,
    pub passes: u32,
    pub lanes: u32,
}

impl Cost {
    /// The second choice of RFC 9106, section 4.
    pub const USUAL: Self = Self { memory_kib: 65_536, passes: 3, lanes: 4 };
    const FLOOR: Self = Self { memory_kib: 19_456, passes: 2, lanes: 1 };
    const CEILING: Self = Self { memory_kib: 1_048_576, passes: 16, lanes: 16 };
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "argon2id m={} t={} p={}", self.memory_kib, self.passes, self.lanes)
    }
}

impl FromStr for Cost {
    type Err = CryptoError;

    /// Refuses what is outside the bounds.
    fn from_str(text: &str) -> Result<Self, CryptoError> {
        let refuse = |why: &str| CryptoError::Slot(format!("its way from the passphrase to the key is refused: {why}"));
        let mut words = text.split(' ');
        if words.next() != Some("argon2id") {
            return Err(refuse("it is not argon2id"));
        }
        let mut number = |name: &str| {
            let word = words.next().and_then(|w| w.strip_prefix(name)).filter(|w| w.len() <= 9 && w.bytes().all(|b| b.is_ascii_digit()));
            word.and_then(|w| w.parse::<u32>().ok()).ok_or_else(|| refuse("it is not 'argon2id m=KIB t=PASSES p=LANES'"))
        };
        let cost = Cost { memory_kib: number("m=")?, passes: number("t=")?, lanes: number("p=")? };
        if words.next().is_some() {
            return Err(refuse("it is not 'argon2id m=KIB t=PASSES p=LANES'"));
        }
        let parts = |c: &Cost| [c.memory_kib, c.passes, c.lanes];
        let (found, floor, ceiling) = (parts(&cost), parts(&Cost::FLOOR), parts(&Cost::CEILING));
        if found.iter().zip(floor).any(|(f, least)| *f < least) {
            return Err(refuse(&format!("it is cheaper than {}, so that passphrases could be guessed quickly", Cost::FLOOR)));
        }
        if found.iter().zip(ceiling).any(|(f, most)| *f > most) {
            return Err(refuse(&format!("it is dearer than {}", Cost::CEILING)));
        }
        Ok(cost)
    }
}

/// Keys derived lately, each with what it came from (hashed): a daemon opens its repositories many times a day.
static DERIVED: Mutex<Vec<([u8; 32], Locked)>> = Mutex::new(Vec::new());
/// Kept at most; a page of memory each.
const KEPT: usize = 64;

/// The key of a passphrase.
pub fn derive(passphrase: &str, salt: &[u8; 32], cost: Cost) -> Result<Locked, CryptoError> {
    let kept = || DERIVED.lock().unwrap_or_else(PoisonError::into_inner);
    let text = cost.to_string();
    let from: [u8; 32] = Sha256::new().chain_update(salt).chain_update(&text).chain_update([0]).chain_update(passphrase).finalize().into();
    if let Some((_, key)) = kept().iter().find(|(known, _)| *known == from) {
        return Ok(key.clone());
    }
    // One at a time: each takes the memory that its cost says.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let refused = |e: argon2::Error| CryptoError::Slot(format!("no key can be derived from a passphrase with {text}: {e}"));
    let params = Params::new(cost.memory_kib, cost.passes, cost.lanes, Some(32)).map_err(refused)?;
    let mut key = Locked::zeros();
    // What it works on holds much that is derived from the passphrase.
    let mut blocks = Zeroizing::new(vec![argon2::Block::default(); params.block_count()]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into_with_memory(passphrase.as_bytes(), salt, key.bytes_mut(), blocks.as_mut_slice())
        .map_err(refused)?;
    let mut kept = kept();
    if kept.len() >= KEPT {
        kept.remove(0);
    }
    kept.push((from, key.clone()));
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_kept_and_the_format_is_fixed() {
        assert_eq!(Cost::USUAL.to_string().parse::<Cost>().unwrap(), Cost::USUAL);
        for bad in [
            "",
            "argon2id",
            "argon2i m=65536 t=3 p=4",
            "argon2id m=1024 t=3 p=4",
            "argon2id m=65536 t=1 p=4",
            "argon2id m=65536 t=3 p=0",
            "argon2id m=2097152 t=3 p=4",
            "argon2id m=65536 t=17 p=4",
            "argon2id m=65536 t=3 p=4 x=1",
            "argon2id m=+65536 t=3 p=4",
            "argon2id m=99999999999 t=3 p=4",
        ] {
            assert!(bad.parse::<Cost>().is_err(), "{bad}");
        }
    }

    /// The expectation is OpenSSL's, not of this code.
    #[test]
    fn keys_are_those_of_others() {
        let cost = Cost { memory_kib: 19_456, passes: 2, lanes: 1 };
        let key = derive("correct horse battery staple", &[7; 32], cost).unwrap();
        assert_eq!(data_encoding::HEXLOWER.encode(key.bytes()), "c9a2cf1f81a33994e4c9adbce9891c6d9c8cf3708a3f5d754780d5bf0bb6dfe7");
        assert_eq!(derive("correct horse battery staple", &[7; 32], cost).unwrap().bytes(), key.bytes(), "from memory");
        assert_ne!(derive("correct horse battery stable", &[7; 32], cost).unwrap().bytes(), key.bytes());
    }
}
