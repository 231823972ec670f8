//! Packs that nothing needs are not deleted at once. They are listed first, in small sealed objects that are never changed, and deleted
//! a grace period later if no backup has come to need them: a backup that another writer made meanwhile, or a restore that
//! looked them up before, finds them still there. New backups do not build upon them.

use std::collections::BTreeMap;

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use minicbor::bytes::ByteArray;
use minicbor::{CborLen, Decode, Encode};

use super::error::Result;
use super::open::{Repository, ids};
use crate::crypto::{CryptoError, ObjectKind};

/// No list is longer, sealed or plain.
const MAX_LIST_BYTES: u64 = 64 << 20;
/// Packs of one list, about 34 bytes each.
const MAX_PACKS: usize = 1 << 20;

#[derive(Debug, Clone, PartialEq, Encode, Decode, CborLen)]
#[cbor(map)]
pub struct Condemned {
    #[n(0)]
    pub format: u32,
    /// When they were found to be needed by nothing, in seconds since 1970.
    #[n(1)]
    pub time: i64,
    #[n(2)]
    pub packs: Vec<ByteArray<32>>,
}

/// One list as it lies in the repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CondemnedList {
    pub id: [u8; 32],
    pub time: i64,
    pub packs: Vec<[u8; 32]>,
}

impl Repository {
    /// All lists; every one was read or it is an error.
    pub(super) fn condemned_lists(&self) -> Result<Vec<CondemnedList>> {
        let listed: Vec<[u8; 32]> = ids(self.storage.names("condemned/")?);
        let read = |id: [u8; 32]| {
            let name = name(&id);
            let list: Condemned = self.read_record(&name, &id, ObjectKind::Condemned, MAX_LIST_BYTES)?;
            match list.format {
                1 => Ok(CondemnedList { id, time: list.time, packs: list.packs.iter().map(|p| **p).collect() }),
                other => Err(self.sealed_error(&name, CryptoError::Version(other.to_string()).into())),
            }
        };
        listed.into_iter().map(read).collect()
    }

    /// Lists packs as condemned since `time`. Durable when it returns.
    pub(super) fn condemn(&self, time: i64, packs: &[[u8; 32]]) -> Result<()> {
        for some in packs.chunks(MAX_PACKS) {
            let list = Condemned { format: 1, time, packs: some.iter().map(|p| ByteArray::from(*p)).collect() };
            self.write_record("condemned/", ObjectKind::Condemned, &list)?;
        }
        Ok(())
    }

    pub(super) fn delete_condemned_list(&self, id: &[u8; 32]) -> Result<()> {
        Ok(self.storage.delete(&name(id))?)
    }

    /// Tells the local index which packs are condemned, and since when. A list that does not open condemns nothing.
    pub(super) fn sync_condemned(&self, problems: &mut Vec<String>) -> Result<()> {
        let lists = match self.condemned_lists() {
            Ok(lists) => lists,
            Err(e @ super::error::RepositoryError::Storage(_)) => return Err(e),
            Err(e) => {
                problems.push(e.to_string());
                return Ok(());
            }
        };
        self.local.set_condemned(&since(&lists))
    }

    /// Since when something is condemned, in seconds since 1970. As the local index knows it.
    pub fn earliest_condemned(&self) -> Result<Option<i64>> {
        Ok(self.local.condemned()?.values().min().copied())
    }

    /// Whether packs are condemned for longer than the grace period, so that a prune would delete them. As the local index knows it.
    pub fn has_expired(&self, grace: std::time::Duration) -> Result<bool> {
        let now = Timestamp::now().as_second();
        Ok(self.local.condemned()?.values().any(|since| is_over(*since, now, grace)))
    }
}

/// Since when each pack is condemned; the earliest time counts.
pub(super) fn since(lists: &[CondemnedList]) -> BTreeMap<[u8; 32], i64> {
    let mut since = BTreeMap::new();
    for list in lists {
        for pack in &list.packs {
            since.entry(*pack).and_modify(|t: &mut i64| *t = list.time.min(*t)).or_insert(list.time);
        }
    }
    since
}

/// A time far in the future was written by a clock that was wrong; it must not keep anything forever, and nothing is deleted that is
/// needed at the time of deleting.
pub fn is_over(since: i64, now: i64, grace: std::time::Duration) -> bool {
    now.abs_diff(since) >= grace.as_secs()
}

/// `condemned/<id>`
fn name(id: &[u8; 32]) -> String {
    format!("condemned/{}", HEXLOWER.encode(id))
}
