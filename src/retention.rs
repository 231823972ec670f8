//! Which backups to keep, and why: a pure function of the backups, the policy and the time.
//!
//! Only good backups count for rules. A suspect one stays until it is older than every good one that stays, the newest
//! good one always stays, and one from the future (a clock was wrong) stays and is never counted.

use std::collections::HashSet;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use crate::config::Retention;

/// A backup as retention sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub id: String,
    pub time: Timestamp,
    pub good: bool,
}

/// What becomes of it, with the rules that keep it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub id: String,
    pub keep: bool,
    pub reasons: Vec<String>,
}

/// Later than this from now is no time a backup can have.
const FUTURE: SignedDuration = SignedDuration::from_hours(24);

/// Decides for every backup, newest first. An empty policy keeps all.
pub fn decide(backups: &[Candidate], policy: &Retention, now: Timestamp, zone: &TimeZone) -> Vec<Verdict> {
    let mut order: Vec<&Candidate> = backups.iter().collect();
    order.sort_by(|a, b| b.time.cmp(&a.time).then_with(|| b.id.cmp(&a.id)));
    let mut verdicts: Vec<Verdict> = order.iter().map(|c| Verdict { id: c.id.clone(), keep: false, reasons: Vec::new() }).collect();
    let future = |c: &Candidate| c.time.duration_since(now) > FUTURE;
    let good: Vec<usize> = (0..order.len()).filter(|i| order.get(*i).is_some_and(|c| c.good && !future(c))).collect();
    let mut keep = |i: usize, reason: String| {
        if let Some(v) = verdicts.get_mut(i) {
            v.keep = true;
            v.reasons.push(reason);
        }
    };
    if *policy == Retention::default() {
        (0..order.len()).for_each(|i| keep(i, "no retention is configured".into()));
        return verdicts;
    }
    for (n, &i) in good.iter().enumerate() {
        if n == 0 {
            keep(i, "the newest good backup".into());
        }
        if policy.keep_last.is_some_and(|last| n < last as usize) {
            keep(i, format!("keep_last: {} of {}", n + 1, policy.keep_last.unwrap_or_default()));
        }
        let age = order.get(i).map(|c| now.duration_since(c.time));
        if let (Some(days), Some(age)) = (policy.keep_days, age)
            && age <= SignedDuration::from_hours(24 * i64::from(days))
        {
            keep(i, format!("keep_days: younger than {days} days"));
        }
    }
    type Period = fn(&jiff::Zoned) -> (i16, i16);
    let tiers: [(&str, Option<u32>, Period); 3] = [
        ("keep_daily", policy.keep_daily, |t| (t.year(), t.day_of_year())),
        ("keep_weekly", policy.keep_weekly, |t| (t.date().iso_week_date().year(), i16::from(t.date().iso_week_date().week()))),
        ("keep_monthly", policy.keep_monthly, |t| (t.year(), i16::from(t.month()))),
    ];
    for (name, count, period) in tiers {
        let Some(count) = count else { continue };
        let mut seen = HashSet::new();
        for &i in &good {
            let Some(candidate) = order.get(i) else { continue };
            if seen.len() >= count as usize {
                break;
            }
            if seen.insert(period(&candidate.time.to_zoned(zone.clone()))) {
                keep(i, format!("{name}: {} of {count}", seen.len()));
            }
        }
    }
    let oldest_kept = good.iter().rev().find(|i| verdicts.get(**i).is_some_and(|v| v.keep)).and_then(|i| order.get(*i)).map(|c| c.time);
    for (candidate, verdict) in order.iter().zip(&mut verdicts) {
        let reason = if future(candidate) {
            "its time lies in the future: a clock was wrong; it is never counted"
        } else if !candidate.good && oldest_kept.is_none_or(|t| candidate.time >= t) {
            "not good: it stays until every good one that stays is newer"
        } else {
            continue;
        };
        verdict.keep = true;
        verdict.reasons.push(reason.into());
    }
    verdicts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(days: f64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + (days * 86_400.0) as i64).unwrap()
    }

    fn daily(n: u32) -> Vec<Candidate> {
        (0..n).map(|d| Candidate { id: format!("{d:04}"), time: at(-f64::from(d)), good: true }).collect()
    }

    fn kept(backups: &[Candidate], policy: &Retention) -> Vec<String> {
        decide(backups, policy, at(0.1), &TimeZone::UTC).into_iter().filter(|v| v.keep).map(|v| v.id).collect()
    }

    #[test]
    fn tiers_count_periods_that_hold_a_backup() {
        let policy = Retention { keep_last: Some(2), keep_daily: Some(5), ..Retention::default() };
        assert_eq!(kept(&daily(30), &policy).len(), 5);
        let policy = Retention { keep_monthly: Some(3), ..Retention::default() };
        assert_eq!(kept(&daily(200), &policy).len(), 3);
        assert_eq!(kept(&daily(40), &Retention { keep_days: Some(10), ..Retention::default() }).len(), 10);
        assert_eq!(kept(&daily(40), &Retention::default()).len(), 40);
    }

    #[test]
    fn only_good_displaces_good() {
        let mut backups = daily(3);
        backups.iter_mut().take(2).for_each(|b| b.good = false);
        let policy = Retention { keep_last: Some(1), ..Retention::default() };
        assert_eq!(kept(&backups, &policy).len(), 3, "two suspect ones do not push the good one out");
        backups.push(Candidate { id: "future".into(), time: at(400.0), good: true });
        assert!(kept(&backups, &policy).contains(&"0002".to_owned()), "nor does one from the future");
    }

    fn policy() -> impl Strategy<Value = Retention> {
        let n = || proptest::option::of(1u32..6);
        (n(), n(), n(), n(), n()).prop_map(|(keep_last, keep_days, keep_daily, keep_weekly, keep_monthly)| Retention {
            keep_last,
            keep_days,
            keep_daily,
            keep_weekly,
            keep_monthly,
        })
    }

    fn backups() -> impl Strategy<Value = Vec<Candidate>> {
        proptest::collection::vec((-200.0f64..3.0, any::<bool>()), 0..40).prop_map(|list| {
            list.into_iter().enumerate().map(|(n, (day, good))| Candidate { id: format!("{n:04}"), time: at(day), good }).collect()
        })
    }

    proptest! {
        #[test]
        fn laws(backups in backups(), policy in policy(), more in policy()) {
            let first = kept(&backups, &policy);
            let newest = backups.iter().filter(|b| b.good && b.time <= at(1.1)).max_by_key(|b| (b.time, b.id.clone()));
            if let Some(newest) = newest { prop_assert!(first.contains(&newest.id)); }
            let mut turned = backups.clone();
            turned.reverse();
            prop_assert_eq!(&kept(&turned, &policy), &first, "the order of the input does not matter");
            let again: Vec<Candidate> = backups.iter().filter(|b| first.contains(&b.id)).cloned().collect();
            prop_assert_eq!(&kept(&again, &policy), &first, "deciding again removes nothing more");
            let raise = |a: Option<u32>, b: Option<u32>| a.map(|a| a + b.unwrap_or(0)).or(b);
            if policy != Retention::default() {
                let larger = Retention {
                    keep_last: raise(policy.keep_last, more.keep_last), keep_days: raise(policy.keep_days, more.keep_days),
                    keep_daily: raise(policy.keep_daily, more.keep_daily), keep_weekly: raise(policy.keep_weekly, more.keep_weekly),
                    keep_monthly: raise(policy.keep_monthly, more.keep_monthly) };
                let larger = kept(&backups, &larger);
                let good_or_future = |id: &String| backups.iter().any(|b| &b.id == id);
                prop_assert!(first.iter().filter(|id| good_or_future(id)).all(|id| larger.contains(id)), "a larger policy keeps more");
            }
        }
    }
}
