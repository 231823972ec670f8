//! What the ledger keeps of coverage: the last scan, which gaps were acknowledged, and how things were then.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use keepd_protocol::model::{Coverage, CoverageCounts, CoverageItem, Drift};
use serde::{Deserialize, Serialize};

use super::{Failure, MAX_ITEMS};
use crate::ledger::Ledger;

const SCAN: &str = "coverage";
const COUNTS: &str = "coverage counts";
const ACKNOWLEDGED: &str = "coverage acknowledged";
/// Acknowledged gaps that are kept, those that are gone included.
const MAX_ACKNOWLEDGED: usize = 2 * MAX_ITEMS;
/// Vanished gaps that are listed.
const MAX_VANISHED: usize = 1000;

/// Between reading a note and writing it.
static CHANGING: Mutex<()> = Mutex::new(());

/// What somebody said of gaps.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Acknowledged {
    /// By key, when.
    gaps: BTreeMap<String, String>,
    /// How things were when gaps were last acknowledged.
    base: Option<Base>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Base {
    time: String,
    all: bool,
    gaps: BTreeSet<String>,
    covered: BTreeSet<String>,
}

/// What makes an item the same in the next scan.
pub fn key(item: &CoverageItem) -> String {
    format!("{}\t{}\t{}", item.kind, item.what, item.r#where)
}

/// The `what` of a key.
fn what(key: &str) -> &str {
    key.split('\t').nth(1).unwrap_or_default()
}

fn read<T: for<'d> Deserialize<'d>>(ledger: &Ledger, note: &str) -> Result<Option<T>, Failure> {
    let parse =
        |text: String| serde_json::from_str(&text).map_err(|e| Failure::Failed(format!("the ledger's note '{note}' does not parse: {e}")));
    ledger.note(note)?.map(parse).transpose()
}

fn write(ledger: &Ledger, note: &str, value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(value).map_err(|e| Failure::Failed(format!("the note '{note}' cannot be written: {e}")))?;
    Ok(ledger.set_note(note, &text)?)
}

/// Keeps what a scan found; returns it with what was said of it.
pub fn keep(ledger: &Ledger, mut coverage: Coverage, time: Timestamp) -> Result<Coverage, Failure> {
    let _changing = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
    coverage.counts.time = time.to_string();
    coverage.items.sort_by(|a, b| (!a.gap, a.kind, &a.what).cmp(&(!b.gap, b.kind, &b.what)));
    let mut said: Acknowledged = read(ledger, ACKNOWLEDGED)?.unwrap_or_default();
    // What is covered now is not meant to be a gap when it is one again.
    let before = said.gaps.len();
    for item in coverage.items.iter().filter(|i| !i.gap) {
        said.gaps.remove(&key(item));
    }
    if said.gaps.len() != before {
        write(ledger, ACKNOWLEDGED, &said)?;
    }
    write(ledger, SCAN, &coverage)?;
    judge(&mut coverage, &said);
    write(ledger, COUNTS, &coverage.counts)?;
    Ok(coverage)
}

/// What the last scan found; None before the first one.
pub fn last(ledger: &Ledger) -> Result<Option<Coverage>, Failure> {
    let Some(mut coverage) = read::<Coverage>(ledger, SCAN)? else { return Ok(None) };
    judge(&mut coverage, &read(ledger, ACKNOWLEDGED)?.unwrap_or_default());
    Ok(Some(coverage))
}

/// The same in numbers.
pub fn counts(ledger: &Ledger) -> Result<Option<CoverageCounts>, Failure> {
    read(ledger, COUNTS)
}

/// Says of gaps that they are meant, or takes that back; none named means all. The error names what is no gap. Returns how many changed.
pub fn acknowledge(ledger: &Ledger, named: &[String], undo: bool) -> Result<u64, Unknown> {
    let _changing = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut coverage) = read::<Coverage>(ledger, SCAN)? else { return Err(Unknown::NoScan) };
    let mut said: Acknowledged = read(ledger, ACKNOWLEDGED)?.unwrap_or_default();
    let gaps = || coverage.items.iter().filter(|i| i.gap).map(key);
    let candidates: BTreeSet<String> = if undo { said.gaps.keys().cloned().collect() } else { gaps().collect() };
    let is_meant = |name: &str, key: &str| what(key) == name || (name.ends_with('/') && what(key).starts_with(name));
    if let Some(name) = named.iter().find(|name| !candidates.iter().any(|key| is_meant(name, key))) {
        return Err(Unknown::Item(name.clone()));
    }
    let chosen = candidates.into_iter().filter(|key| named.is_empty() || named.iter().any(|name| is_meant(name, key)));
    let now = Timestamp::now().to_string();
    let mut changed = 0;
    for key in chosen {
        changed += match undo {
            true => u64::from(said.gaps.remove(&key).is_some()),
            false => u64::from(said.gaps.insert(key, now.clone()).is_none()),
        };
    }
    if said.gaps.len() > MAX_ACKNOWLEDGED {
        let text =
            format!("more than {MAX_ACKNOWLEDGED} gaps would be acknowledged; leave directories out with [coverage] exclude instead");
        return Err(Failure::Failed(text).into());
    }
    if !undo {
        let covered = coverage.items.iter().filter(|i| !i.gap).map(key).collect();
        said.base = Some(Base { time: now, all: coverage.all, gaps: gaps().collect(), covered });
    }
    write(ledger, ACKNOWLEDGED, &said)?;
    judge(&mut coverage, &said);
    write(ledger, COUNTS, &coverage.counts)?;
    Ok(changed)
}

/// Why nothing was acknowledged.
pub enum Unknown {
    NoScan,
    Item(String),
    Failed(Failure),
}

impl From<Failure> for Unknown {
    fn from(failure: Failure) -> Self {
        Unknown::Failed(failure)
    }
}

/// Says of each gap whether it was acknowledged, and what drifted.
fn judge(coverage: &mut Coverage, said: &Acknowledged) {
    let mut counts = CoverageCounts { time: std::mem::take(&mut coverage.counts.time), ..CoverageCounts::default() };
    let mut seen = BTreeSet::new();
    for item in &mut coverage.items {
        let key = key(item);
        item.acknowledged = if item.gap { said.gaps.get(&key).cloned() } else { None };
        item.drift = match &said.base {
            Some(base) if item.gap && item.acknowledged.is_none() => match (base.covered.contains(&key), base.gaps.contains(&key)) {
                (true, _) => Some(Drift::Uncovered),
                (false, false) => Some(Drift::New),
                (false, true) => None,
            },
            _ => None,
        };
        match (item.gap, &item.acknowledged) {
            (false, _) => counts.covered += 1,
            (true, None) => counts.gaps += 1,
            (true, Some(_)) => counts.acknowledged += 1,
        }
        counts.new_gaps += u64::from(item.drift.is_some());
        seen.insert(key);
    }
    coverage.items.sort_by_key(|i| (!i.gap, i.acknowledged.is_some(), i.drift.is_none()));
    if let Some(base) = &said.base {
        counts.since = Some(base.time.clone());
        // A narrower look, or a list that was cut, does not see all that was there.
        let sees_as_much = coverage.cut == 0 && (coverage.all || !base.all);
        let gone = base.gaps.iter().filter(|key| sees_as_much && !seen.contains(*key)).map(|key| what(key).to_owned());
        coverage.vanished = gone.take(MAX_VANISHED).collect();
    }
    coverage.counts = counts;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(what: &str, gap: bool) -> CoverageItem {
        CoverageItem { what: what.into(), gap, ..CoverageItem::default() }
    }

    fn found(ledger: &Ledger, items: &[(&str, bool)]) -> Coverage {
        let items = items.iter().map(|(what, gap)| item(what, *gap)).collect();
        keep(ledger, Coverage { items, ..Coverage::default() }, Timestamp::now()).unwrap()
    }

    fn drift(coverage: &Coverage) -> Vec<(&str, Option<Drift>, bool)> {
        coverage.items.iter().map(|i| (i.what.as_str(), i.drift, i.acknowledged.is_some())).collect()
    }

    fn said(ledger: &Ledger, named: &[&str], undo: bool) -> u64 {
        let named: Vec<String> = named.iter().map(|n| (*n).to_owned()).collect();
        acknowledge(ledger, &named, undo).unwrap_or_else(|_| panic!("{named:?} is not known"))
    }

    #[test]
    fn what_changes_after_an_acknowledgement_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = &Ledger::open(dir.path()).unwrap();
        assert!(last(ledger).unwrap().is_none());
        assert!(matches!(acknowledge(ledger, &[], false), Err(Unknown::NoScan)));
        let first = found(ledger, &[("/a/1", true), ("/a/2", true), ("/b", true), ("/c", false)]);
        assert_eq!((first.counts.gaps, first.counts.new_gaps, first.counts.covered), (3, 0, 1), "nothing is new before anybody looked");
        assert!(matches!(acknowledge(ledger, &["/c".into()], false), Err(Unknown::Item(what)) if what == "/c"), "it is no gap");
        assert_eq!(said(ledger, &["/a/"], false), 2);
        assert_eq!(said(ledger, &["/a/1"], false), 0, "it was already");
        // /c lost its source, /d came, /a/2 went, /b stays as it was.
        let second = found(ledger, &[("/a/1", true), ("/b", true), ("/c", true), ("/d", true)]);
        let expected = [("/c", Some(Drift::Uncovered), false), ("/d", Some(Drift::New), false), ("/b", None, false), ("/a/1", None, true)];
        assert_eq!(drift(&second), expected);
        assert_eq!(second.vanished, ["/a/2"]);
        assert_eq!((second.counts.gaps, second.counts.new_gaps, second.counts.acknowledged), (3, 2, 1));
        assert_eq!(last(ledger).unwrap().unwrap(), second);
        assert_eq!(counts(ledger).unwrap().unwrap(), second.counts);
        assert_eq!(said(ledger, &[], false), 3);
        assert_eq!(counts(ledger).unwrap().unwrap().gaps, 0);
        assert_eq!(said(ledger, &["/b"], true), 1);
        assert_eq!(counts(ledger).unwrap().unwrap().gaps, 1);
        assert!(matches!(acknowledge(ledger, &["/b".into()], true), Err(Unknown::Item(_))));
    }

    #[test]
    fn what_was_covered_meanwhile_must_be_acknowledged_again() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = &Ledger::open(dir.path()).unwrap();
        found(ledger, &[("/a", true)]);
        said(ledger, &[], false);
        found(ledger, &[("/a", false)]);
        let again = found(ledger, &[("/a", true)]);
        assert_eq!((again.counts.gaps, again.counts.acknowledged), (1, 0));
    }

    #[test]
    fn a_narrower_look_makes_nothing_vanish() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = &Ledger::open(dir.path()).unwrap();
        let items = vec![item("/a", true), item("/cache", true)];
        keep(ledger, Coverage { items, all: true, ..Coverage::default() }, Timestamp::now()).unwrap();
        said(ledger, &[], false);
        assert!(found(ledger, &[("/a", true)]).vanished.is_empty());
    }
}
