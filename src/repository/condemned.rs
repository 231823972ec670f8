//! Packs that nothing needs are not deleted at once. They are listed first, in small sealed objects that are never changed, and deleted
//! a grace period later if no backup has come to need them: a backup that another writer made meanwhile, or a restore that
//! looked them up before, finds them still there. New backups do not build upon them.

use std::collections::BTreeMap;

use data_encoding::HEXLOWER;
use minicbor::bytes::ByteArray;
use minicbor::{CborLen, Decode, Encode};

use super::error::Result;
use super::open::{Repository, ids};
use crate::crypto::{CryptoError, ObjectKind};

/// No list is longer, sealed or plain.
const MAX_LIST_BYTES: u64 = 64 << 20;
/// Packs of one list, about 34 bytes each.
const MAX_PACKS: usize = 1 << 20;

/// What time it is, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// As far as the clock is believed: one that leaps ahead must not end a grace period. Where a clock that is right is not believed yet, this lags.
    pub believed: i64,
    pub clock: i64,
}

impl Now {
    /// By the machine's clock, of which `believed` is believed.
    pub fn believing(believed: i64) -> Self {
        Self { believed, clock: jiff::Timestamp::now().as_second() }
    }

    /// Whether a grace period that began at `since` is over. A time far in the future was written by a clock that was wrong; it must not
    /// keep anything forever, and nothing is deleted that is needed at the time of deleting. What is the future is told by the clock: to a
    /// belief that lags every time that was written rightly lies there.
    pub fn is_over(self, since: i64, grace: std::time::Duration) -> bool {
        let over = |span: i64| u64::try_from(span).is_ok_and(|span| span >= grace.as_secs());
        grace.is_zero() || over(self.believed.saturating_sub(since)) || over(since.saturating_sub(self.clock))
    }

    /// The time to write into a new list: where the belief lags, others would take a grace period for over that has just begun, so it is
    /// no earlier than that of the newest list that is not in the future.
    pub(super) fn to_condemn(self, lists: &[CondemnedList]) -> i64 {
        lists.iter().map(|list| list.time).filter(|time| *time <= self.clock).max().map_or(self.believed, |time| time.max(self.believed))
    }
}

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

    /// Whether packs are condemned for longer than the grace period, so that a prune would delete them; `believed` is the time that is
    /// believed, in seconds since 1970. As the local index knows it.
    pub fn has_expired(&self, grace: std::time::Duration, believed: i64) -> Result<bool> {
        Ok(self.local.condemned()?.values().any(|since| is_over(*since, believed, grace)))
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

/// As [`Now::is_over`], by the machine's clock.
pub fn is_over(since: i64, believed: i64, grace: std::time::Duration) -> bool {
    Now::believing(believed).is_over(since, grace)
}

/// `condemned/<id>`
fn name(id: &[u8; 32]) -> String {
    format!("condemned/{}", HEXLOWER.encode(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 86_400;
    const GRACE: std::time::Duration = std::time::Duration::from_secs(DAY as u64);

    #[test]
    fn a_belief_that_lags_ends_no_grace_and_neither_does_a_clock_that_leaps() {
        let right = Now { believed: 100 * DAY, clock: 100 * DAY };
        let lags = Now { believed: 90 * DAY, clock: 100 * DAY };
        let leapt = Now { believed: 100 * DAY, clock: 4000 * DAY };
        for now in [right, lags, leapt] {
            assert!(!now.is_over(100 * DAY - 60, GRACE), "{now:?}: a minute ago");
            assert!(now.is_over(100 * DAY - 60, std::time::Duration::ZERO), "{now:?}: without any");
            assert!(now.is_over(80 * DAY, GRACE) && now.is_over(9000 * DAY, GRACE), "{now:?}");
        }
        assert!(right.is_over(99 * DAY, GRACE) && leapt.is_over(99 * DAY, GRACE));
        assert!(right.is_over(101 * DAY, GRACE), "it must not keep anything forever");
    }

    #[test]
    fn a_grace_that_begins_does_not_look_over_to_others() {
        let list = |time| CondemnedList { id: [0; 32], time, packs: Vec::new() };
        let lags = Now { believed: 90 * DAY, clock: 100 * DAY };
        assert_eq!(lags.to_condemn(&[]), 90 * DAY);
        assert_eq!(lags.to_condemn(&[list(80 * DAY), list(99 * DAY), list(4000 * DAY)]), 99 * DAY);
        assert_eq!(lags.to_condemn(&[list(80 * DAY)]), 90 * DAY);
    }
}
