//! Which backups to keep, and why: a pure function.
//!
//! In: the backups of one job at one destination, its rules, the time and the zone its days are counted in. Out: a verdict with
//! reasons for each of them. A backup stays when any rule keeps it, as in restic and borg; what is different here is that only good
//! backups count, so that a row of worthless ones never pushes out the last one that can be restored.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};

use crate::config::Retention;

/// A backup as retention sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub id: String,
    pub time: Timestamp,
    /// False when it is suspect.
    pub good: bool,
}

/// What becomes of a backup. There is at least one reason, also for removing it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub id: String,
    pub keep: bool,
    pub reasons: Vec<String>,
}

const DAY_NANOSECONDS: i128 = 86_400 * 1_000_000_000;

/// Decides about all backups, newest first, whatever order they come in.
///
/// - No rule at all keeps everything.
/// - Rules look at good backups only. The newest good one is never removed.
/// - A suspect backup stays until it is older than every good one that is kept.
/// - A backup from more than a day in the future (a clock was wrong) stays and counts for nothing: it would push out good ones.
pub fn decide(backups: &[Candidate], policy: &Retention, now: Timestamp, zone: &TimeZone) -> Vec<Verdict> {
    let mut sorted: Vec<&Candidate> = backups.iter().collect();
    // The id makes the order one and the same when two were made at the same instant.
    sorted.sort_by_key(|c| (Reverse(c.time), Reverse(&c.id)));
    let mut verdicts: Vec<Verdict> = sorted.iter().map(|c| Verdict { id: c.id.clone(), keep: false, reasons: Vec::new() }).collect();

    let mut counted: Vec<Counted<'_>> = Vec::new();
    for (backup, verdict) in sorted.iter().zip(&mut verdicts) {
        if age(backup, now) < -DAY_NANOSECONDS {
            verdict.keep("its time lies in the future, so it is not counted");
        } else if backup.good {
            counted.push(Counted { backup, local: backup.time.to_zoned(zone.clone()), verdict });
        }
    }
    if let Some(newest) = counted.first_mut() {
        newest.verdict.keep("newest good backup");
    }
    if *policy == Retention::default() {
        verdicts.iter_mut().for_each(|v| v.keep("no rule removes anything"));
        return verdicts;
    }
    apply(&mut counted, policy, now);
    let oldest_kept = counted.iter().filter(|c| c.verdict.keep).map(|c| c.backup.time).min();
    drop(counted);

    for (backup, verdict) in sorted.iter().zip(&mut verdicts) {
        if !backup.good && !verdict.keep {
            match oldest_kept {
                Some(oldest) if backup.time < oldest => {
                    verdict.reasons.push("suspect, and older than every good backup that is kept".into());
                }
                Some(_) => verdict.keep("suspect, kept until it is older than every good backup that is kept"),
                None => verdict.keep("suspect, and there is no good backup"),
            }
        } else if !verdict.keep {
            verdict.reasons.push("no rule keeps it".into());
        }
    }
    verdicts
}

/// A good backup that is not from the future, with its verdict.
struct Counted<'a> {
    backup: &'a Candidate,
    local: Zoned,
    verdict: &'a mut Verdict,
}

impl Verdict {
    fn keep(&mut self, reason: impl Into<String>) {
        self.keep = true;
        self.reasons.push(reason.into());
    }
}

/// Marks what the rules keep; `counted` is newest first.
fn apply(counted: &mut [Counted<'_>], policy: &Retention, now: Timestamp) {
    if let Some(n) = policy.keep_last {
        for (place, c) in counted.iter_mut().take(count(n)).enumerate() {
            c.verdict.keep(format!("keep_last: {} of {n}", place + 1));
        }
    }
    if let Some(n) = policy.keep_days {
        for c in counted.iter_mut().filter(|c| age(c.backup, now) <= i128::from(n) * DAY_NANOSECONDS) {
            c.verdict.keep(format!("keep_days: not older than {n} days"));
        }
    }
    keep_periods(counted, policy.keep_daily, "keep_daily", |t| t.strftime("%Y-%m-%d").to_string());
    keep_periods(counted, policy.keep_weekly, "keep_weekly", |t| {
        let week = t.date().iso_week_date();
        format!("{:04}-W{:02}", week.year(), week.week())
    });
    keep_periods(counted, policy.keep_monthly, "keep_monthly", |t| t.strftime("%Y-%m").to_string());
}

/// Keeps the newest backup of each of the `limit` newest periods that hold one.
fn keep_periods(counted: &mut [Counted<'_>], limit: Option<u32>, rule: &str, period: impl Fn(&Zoned) -> String) {
    let Some(limit) = limit else { return };
    let mut seen = BTreeSet::new();
    for c in counted {
        let name = period(&c.local);
        if seen.contains(&name) {
            continue;
        }
        if seen.len() >= count(limit) {
            break;
        }
        c.verdict.keep(format!("{rule}: newest of {name}, {} of {limit}", seen.len() + 1));
        seen.insert(name);
    }
}

fn age(backup: &Candidate, now: Timestamp) -> i128 {
    now.as_nanosecond() - backup.time.as_nanosecond()
}

fn count(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    fn good(id: &str, time: &str) -> Candidate {
        Candidate { id: id.into(), time: at(time), good: true }
    }

    fn suspect(id: &str, time: &str) -> Candidate {
        Candidate { good: false, ..good(id, time) }
    }

    fn kept(backups: &[Candidate], policy: Retention, now: &str, zone: &str) -> Vec<String> {
        let zone = TimeZone::get(zone).expect("a zone");
        decide(backups, &policy, at(now), &zone).into_iter().filter(|v| v.keep).map(|v| v.id).collect()
    }

    const NOON: &str = "2026-03-10T12:00:00Z";

    #[test]
    fn no_rule_keeps_everything() {
        let backups = [good("a", "2001-01-01T00:00:00Z"), suspect("b", "2000-01-01T00:00:00Z")];
        assert_eq!(kept(&backups, Retention::default(), NOON, "UTC"), ["a", "b"]);
    }

    #[test]
    fn days_are_days_of_the_zone() {
        // In Berlin the first two are of the same day, in UTC the last two.
        let backups = [good("a", "2026-03-09T23:30:00Z"), good("b", "2026-03-10T00:30:00Z"), good("c", "2026-03-09T22:30:00Z")];
        let policy = Retention { keep_daily: Some(5), ..Retention::default() };
        assert_eq!(kept(&backups, policy.clone(), NOON, "Europe/Berlin"), ["b", "c"]);
        assert_eq!(kept(&backups, policy, NOON, "UTC"), ["b", "a"]);
    }

    #[test]
    fn periods_without_a_backup_do_not_count() {
        let backups = [
            good("d", "2026-03-09T01:00:00Z"),
            good("c", "2026-01-15T01:00:00Z"),
            good("b", "2025-06-15T01:00:00Z"),
            good("a", "2024-06-15T01:00:00Z"),
        ];
        let policy = |n| Retention { keep_monthly: Some(n), ..Retention::default() };
        assert_eq!(kept(&backups, policy(3), NOON, "UTC"), ["d", "c", "b"]);
        assert_eq!(kept(&backups, policy(1), NOON, "UTC"), ["d"]);
    }

    #[test]
    fn weeks_are_iso_weeks_across_the_new_year() {
        // Monday 2025-12-29 to Sunday 2026-01-04 is one week, 2026-W01.
        let backups = [good("c", "2026-01-04T12:00:00Z"), good("b", "2025-12-29T12:00:00Z"), good("a", "2025-12-28T12:00:00Z")];
        let policy = Retention { keep_weekly: Some(9), ..Retention::default() };
        assert_eq!(kept(&backups, policy.clone(), NOON, "UTC"), ["c", "a"]);
        let reasons = decide(&backups, &policy, at(NOON), &TimeZone::UTC).into_iter().flat_map(|v| v.reasons).collect::<Vec<_>>();
        assert!(reasons.contains(&"keep_weekly: newest of 2026-W01, 1 of 9".to_owned()), "{reasons:?}");
    }

    #[test]
    fn keep_days_is_an_age() {
        let backups = [good("c", "2026-03-09T12:00:00Z"), good("b", "2026-03-08T12:00:00Z"), good("a", "2026-03-08T11:59:59Z")];
        let policy = Retention { keep_days: Some(2), ..Retention::default() };
        assert_eq!(kept(&backups, policy, NOON, "UTC"), ["c", "b"]);
    }

    #[test]
    fn the_last_good_one_outlives_every_rule() {
        let backups = [
            suspect("d", "2026-03-09T00:00:00Z"),
            suspect("c", "2026-03-08T00:00:00Z"),
            good("b", "2020-01-01T00:00:00Z"),
            good("a", "2019-01-01T00:00:00Z"),
        ];
        let policy = Retention { keep_days: Some(1), ..Retention::default() };
        assert_eq!(kept(&backups, policy, NOON, "UTC"), ["d", "c", "b"]);
    }

    #[test]
    fn suspect_ones_go_when_all_kept_good_ones_are_newer() {
        let backups = [
            good("d", "2026-03-09T00:00:00Z"),
            suspect("c", "2026-03-08T00:00:00Z"),
            good("b", "2026-03-07T00:00:00Z"),
            suspect("a", "2026-03-06T00:00:00Z"),
        ];
        let policy = |n| Retention { keep_last: Some(n), ..Retention::default() };
        assert_eq!(kept(&backups, policy(2), NOON, "UTC"), ["d", "c", "b"]);
        assert_eq!(kept(&backups, policy(1), NOON, "UTC"), ["d"]);
    }

    #[test]
    fn suspect_ones_stay_while_there_is_no_good_one() {
        let backups = [suspect("b", "2026-03-09T00:00:00Z"), suspect("a", "2001-01-01T00:00:00Z")];
        let policy = Retention { keep_last: Some(1), ..Retention::default() };
        assert_eq!(kept(&backups, policy, NOON, "UTC"), ["b", "a"]);
    }

    #[test]
    fn one_from_the_future_pushes_nothing_out() {
        let backups = [
            good("z", "2031-01-01T00:00:00Z"),
            suspect("y", "2030-01-01T00:00:00Z"),
            good("b", "2026-03-09T00:00:00Z"),
            good("a", "2026-03-08T00:00:00Z"),
        ];
        let policy = Retention { keep_last: Some(1), ..Retention::default() };
        assert_eq!(kept(&backups, policy.clone(), NOON, "UTC"), ["z", "y", "b"]);
        let verdicts = decide(&backups, &policy, at(NOON), &TimeZone::UTC);
        assert!(verdicts[0].reasons[0].contains("future"), "{verdicts:?}");
    }

    #[test]
    fn the_ends_of_time_are_no_trouble() {
        let ends = [Timestamp::MIN, Timestamp::MAX];
        let zone = TimeZone::get("Pacific/Apia").expect("a zone");
        for now in ends {
            let backups: Vec<_> = ends.iter().map(|&time| Candidate { id: time.to_string(), time, good: true }).collect();
            let all = Some(u32::MAX);
            let policy = Retention { keep_last: all, keep_days: all, keep_daily: all, keep_weekly: all, keep_monthly: all };
            assert!(decide(&backups, &policy, now, &zone).iter().all(|v| v.keep));
        }
    }

    fn backups() -> impl Strategy<Value = Vec<Candidate>> {
        // Hours over three years, dense enough for ties and shared periods.
        proptest::collection::vec((0i64..26_280, prop::bool::weighted(0.8)), 0..60).prop_map(|found| {
            let start = at("2024-01-01T00:00:00Z").as_second();
            let candidate = |(n, (hours, good)): (usize, (i64, bool))| Candidate {
                id: format!("{n:02}"),
                time: Timestamp::from_second(start + hours * 3600).expect("in range"),
                good,
            };
            found.into_iter().enumerate().map(candidate).collect()
        })
    }

    fn policy() -> impl Strategy<Value = Retention> {
        let rule = || proptest::option::of(1u32..12);
        (rule(), proptest::option::of(1u32..800), rule(), rule(), rule()).prop_map(
            |(keep_last, keep_days, keep_daily, keep_weekly, keep_monthly)| Retention {
                keep_last,
                keep_days,
                keep_daily,
                keep_weekly,
                keep_monthly,
            },
        )
    }

    fn keeps(backups: &[Candidate], policy: &Retention) -> BTreeSet<String> {
        let zone = TimeZone::get("America/New_York").expect("a zone");
        // In the middle of the range, so that some backups are from the future.
        decide(backups, policy, at("2026-06-01T00:00:00Z"), &zone).into_iter().filter(|v| v.keep).map(|v| v.id).collect()
    }

    proptest! {
        #[test]
        fn the_newest_good_one_stays(backups in backups(), policy in policy()) {
            let kept = keeps(&backups, &policy);
            let now = at("2026-06-02T00:00:00Z");
            let newest = backups.iter().filter(|b| b.good && b.time <= now).max_by_key(|b| (b.time, &b.id));
            if let Some(newest) = newest {
                prop_assert!(kept.contains(&newest.id));
            }
            prop_assert!(backups.is_empty() || !kept.is_empty());
        }

        #[test]
        fn a_higher_number_removes_no_more(backups in backups(), policy in policy(), which in 0usize..5, more in 1u32..10) {
            let mut raised = policy.clone();
            let Retention { keep_last, keep_days, keep_daily, keep_weekly, keep_monthly } = &mut raised;
            if let Some(n) = [keep_last, keep_days, keep_daily, keep_weekly, keep_monthly][which] {
                *n += more;
            }
            prop_assert!(keeps(&backups, &policy).is_subset(&keeps(&backups, &raised)));
        }

        #[test]
        fn the_order_they_come_in_does_not_matter(shuffled in backups().prop_flat_map(|b| (Just(b.clone()), Just(b).prop_shuffle())), policy in policy()) {
            let zone = TimeZone::UTC;
            let now = at("2026-06-01T00:00:00Z");
            prop_assert_eq!(decide(&shuffled.0, &policy, now, &zone), decide(&shuffled.1, &policy, now, &zone));
        }

        #[test]
        fn deciding_again_changes_nothing(backups in backups(), policy in policy()) {
            let kept = keeps(&backups, &policy);
            let left: Vec<_> = backups.into_iter().filter(|b| kept.contains(&b.id)).collect();
            prop_assert_eq!(keeps(&left, &policy), kept);
        }

        #[test]
        fn every_verdict_has_a_reason(backups in backups(), policy in policy()) {
            let verdicts = decide(&backups, &policy, at("2026-06-01T00:00:00Z"), &TimeZone::UTC);
            prop_assert_eq!(verdicts.len(), backups.len());
            prop_assert!(verdicts.iter().all(|v| !v.reasons.is_empty()));
        }
    }
}
