//! Which backups to keep, and why: a pure function.
//!
//! In: the backups of one job at one destination, its rules, the time and the zone its days are counted in. Out: a verdict with
//! reasons for each of them. A backup stays when any rule keeps it, as in restic and borg; what is different here is that only good
//! backups count, so that a row of worthless ones never pushes out the last one that can be restored.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

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
    /// Somebody wants it kept, whatever the rules say.
    pub pinned: bool,
    /// It was restored and found whole.
    pub proven: bool,
    /// It was made of what was there before a restore in place: see [`SAFETY_DAYS`].
    pub safety: bool,
    /// It was imported: whoever did so deletes it, too.
    pub imported: bool,
}

/// What becomes of a backup. There is at least one reason, also for removing it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub id: String,
    pub keep: bool,
    /// It stays and counts for nothing: something is wrong with it.
    pub quarantined: bool,
    pub reasons: Vec<String>,
}

/// So long a safety copy stays, and no rule counts it: what was about to be replaced must not push out what is good.
pub const SAFETY_DAYS: i128 = 30;

const DAY_NANOSECONDS: i128 = 86_400 * 1_000_000_000;

/// Decides about all backups, newest first, whatever order they come in.
///
/// - No rule at all keeps everything.
/// - Rules look at good backups only. The newest good one is never removed, nor the newest proven one, nor a pinned one.
/// - A safety copy stays for [`SAFETY_DAYS`] and counts for nothing.
/// - An imported backup stays until it is deleted, and counts for nothing.
/// - A suspect backup stays until it is older than every good one that is kept.
/// - A backup from more than a day in the future (a clock was wrong) stays and counts for nothing: it would push out good ones.
pub fn decide(backups: &[Candidate], policy: &Retention, now: Timestamp, zone: &TimeZone) -> Vec<Verdict> {
    let mut sorted: Vec<&Candidate> = backups.iter().collect();
    // The id makes the order one and the same when two were made at the same instant.
    sorted.sort_by_key(|c| (Reverse(c.time), Reverse(&c.id)));
    let verdict = |c: &&Candidate| Verdict { id: c.id.clone(), keep: false, quarantined: false, reasons: Vec::new() };
    let mut verdicts: Vec<Verdict> = sorted.iter().map(verdict).collect();

    let mut counted: Vec<Counted<'_>> = Vec::new();
    for (backup, verdict) in sorted.iter().zip(&mut verdicts) {
        if backup.pinned {
            verdict.keep("pinned");
        }
        if backup.imported {
            verdict.keep("imported: kept until it is deleted");
        } else if age(backup, now) < -DAY_NANOSECONDS {
            verdict.keep("its time lies in the future, so it is not counted");
            verdict.quarantined = true;
        } else if backup.safety {
            if age(backup, now) < SAFETY_DAYS * DAY_NANOSECONDS {
                verdict.keep("made before a restore in place, kept for 30 days");
            }
        } else if backup.good {
            counted.push(Counted { backup, local: backup.time.to_zoned(zone.clone()), verdict });
        }
    }
    if let Some(newest) = counted.first_mut() {
        newest.verdict.keep("newest good backup");
    }
    if let Some(proven) = counted.iter_mut().find(|c| c.backup.proven) {
        proven.verdict.keep("newest proven backup");
    }
    if policy.keeps_everything() {
        verdicts.iter_mut().for_each(|v| v.keep("no rule removes anything"));
        return verdicts;
    }
    apply(&mut counted, policy, now);
    // A pinned one does not hold the suspect ones behind it.
    let kept = counted.iter().filter(|c| c.verdict.keep && !(c.backup.pinned && c.verdict.reasons.len() == 1));
    let oldest_kept = kept.map(|c| c.backup.time).min();
    drop(counted);

    for (backup, verdict) in sorted.iter().zip(&mut verdicts) {
        if !backup.good && !backup.safety && !verdict.keep {
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

/// When backups fall that are kept now, if a good backup is made at each of `ticks` (ascending) and the rules stay as they are.
/// A backup that is not in the answer is kept as far as was looked: `ticks` ended, or it became too much work.
pub fn falls(
    backups: &[Candidate],
    policy: &Retention,
    now: Timestamp,
    zone: &TimeZone,
    ticks: impl Iterator<Item = Timestamp>,
) -> BTreeMap<String, Timestamp> {
    /// Backups looked at in all, to bound the time.
    const WORK: usize = 300_000;
    let kept = |list: &[Candidate], at: Timestamp| -> BTreeSet<String> {
        decide(list, policy, at, zone).into_iter().filter(|v| v.keep).map(|v| v.id).collect()
    };
    let mut fallen = BTreeMap::new();
    let here = kept(backups, now);
    let mut left: Vec<Candidate> = backups.iter().filter(|b| here.contains(&b.id)).cloned().collect();
    let mut real = left.iter().filter(|b| !b.pinned && !b.imported).count();
    let mut work = 0;
    for (n, tick) in ticks.enumerate() {
        work += left.len() + 1;
        if real == 0 || work > WORK {
            break;
        }
        // Names that are no ids of backups.
        left.push(Candidate { id: format!("+{n}"), time: tick, good: true, pinned: false, proven: false, safety: false, imported: false });
        let stay = kept(&left, tick);
        left.retain(|b| {
            let stays = stay.contains(&b.id);
            if !stays && !b.id.starts_with('+') {
                fallen.insert(b.id.clone(), tick);
                real -= 1;
            }
            stays
        });
    }
    fallen
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
    if let Some(within) = policy.keep_within {
        for c in counted.iter_mut().filter(|c| age(c.backup, now) <= within.as_nanos() as i128) {
            c.verdict.keep("keep_within: young enough");
        }
    }
    // The offset is in it: the hour that a clock set back repeats is two hours.
    keep_periods(counted, policy.keep_hourly, "keep_hourly", |t| t.strftime("%Y-%m-%d %Hh%z").to_string());
    keep_periods(counted, policy.keep_daily, "keep_daily", |t| t.strftime("%Y-%m-%d").to_string());
    keep_periods(counted, policy.keep_weekly, "keep_weekly", |t| {
        let week = t.date().iso_week_date();
        format!("{:04}-W{:02}", week.year(), week.week())
    });
    keep_periods(counted, policy.keep_monthly, "keep_monthly", |t| t.strftime("%Y-%m").to_string());
    keep_periods(counted, policy.keep_yearly, "keep_yearly", |t| t.strftime("%Y").to_string());
    if let Some(least) = policy.min_keep {
        let mut missing = count(least).saturating_sub(counted.iter().filter(|c| c.verdict.keep).count());
        for c in counted.iter_mut().filter(|c| !c.verdict.keep) {
            if missing == 0 {
                break;
            }
            c.verdict.keep(format!("min_keep: at least {least}"));
            missing -= 1;
        }
    }
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
        Candidate { id: id.into(), time: at(time), good: true, pinned: false, proven: false, safety: false, imported: false }
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
    fn a_safety_copy_pushes_nothing_out_and_falls_in_time() {
        let safety = |id: &str, time: &str| Candidate { safety: true, ..good(id, time) };
        let backups = [
            safety("s3", "2026-03-10T11:00:00Z"),
            safety("s2", "2026-03-10T10:00:00Z"),
            good("b", "2026-03-09T01:00:00Z"),
            good("a", "2026-03-08T01:00:00Z"),
            safety("s1", "2026-01-10T10:00:00Z"),
        ];
        let policy = Retention { keep_last: Some(1), ..Retention::default() };
        assert_eq!(kept(&backups, policy, NOON, "UTC"), ["s3", "s2", "b"]);
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
    fn a_pinned_one_stays_but_holds_nothing_else() {
        let mut backups = vec![
            good("d", "2026-03-09T00:00:00Z"),
            good("c", "2026-03-08T00:00:00Z"),
            suspect("b", "2026-03-07T00:00:00Z"),
            good("a", "2026-03-06T00:00:00Z"),
        ];
        backups[3].pinned = true;
        let policy = Retention { keep_last: Some(1), ..Retention::default() };
        assert_eq!(kept(&backups, policy.clone(), NOON, "UTC"), ["d", "a"]);
        backups[3].pinned = false;
        backups[1].proven = true;
        assert_eq!(kept(&backups, policy, NOON, "UTC"), ["d", "c"]);
    }

    #[test]
    fn hours_and_years_and_a_least_number() {
        let backups = [
            good("e", "2026-03-10T11:50:00Z"),
            good("d", "2026-03-10T11:10:00Z"),
            good("c", "2026-03-10T10:10:00Z"),
            good("b", "2025-07-01T00:00:00Z"),
            good("a", "2025-01-01T00:00:00Z"),
        ];
        let policy = Retention { keep_hourly: Some(2), ..Retention::default() };
        assert_eq!(kept(&backups, policy.clone(), NOON, "UTC"), ["e", "c"]);
        assert_eq!(kept(&backups, Retention { keep_yearly: Some(9), ..Retention::default() }, NOON, "UTC"), ["e", "b"]);
        assert_eq!(kept(&backups, Retention { min_keep: Some(4), ..policy }, NOON, "UTC"), ["e", "d", "c", "b"]);
        let within = Retention { keep_within: Some(std::time::Duration::from_secs(3600)), ..Retention::default() };
        assert_eq!(kept(&backups, within, NOON, "UTC"), ["e", "d"]);
    }

    #[test]
    fn the_hour_that_a_clock_repeats_is_two() {
        let backups = [good("b", "2026-10-25T01:30:00Z"), good("a", "2026-10-25T00:30:00Z")];
        let policy = Retention { keep_hourly: Some(9), ..Retention::default() };
        assert_eq!(kept(&backups, policy, "2026-10-26T00:00:00Z", "Europe/Berlin"), ["b", "a"]);
    }

    #[test]
    fn when_a_backup_falls() {
        let backups = [good("b", "2026-03-10T00:00:00Z"), good("a", "2026-03-09T00:00:00Z")];
        let policy = Retention { keep_daily: Some(3), ..Retention::default() };
        let days = ["2026-03-11T00:00:00Z", "2026-03-12T00:00:00Z", "2026-03-13T00:00:00Z", "2026-03-14T00:00:00Z"];
        let falls = falls(&backups, &policy, at(NOON), &TimeZone::UTC, days.iter().map(|d| at(d)));
        let expected = BTreeMap::from([("a".to_owned(), at(days[1])), ("b".to_owned(), at(days[2]))]);
        assert_eq!(falls, expected);
    }

    #[test]
    fn the_ends_of_time_are_no_trouble() {
        let ends = [Timestamp::MIN, Timestamp::MAX];
        let zone = TimeZone::get("Pacific/Apia").expect("a zone");
        for now in ends {
            let backups: Vec<_> = ends
                .iter()
                .map(|&time| Candidate {
                    id: time.to_string(),
                    time,
                    good: true,
                    pinned: false,
                    proven: false,
                    safety: false,
                    imported: false,
                })
                .collect();
            let all = Some(u32::MAX);
            let policy = Retention {
                keep_last: all,
                keep_hourly: all,
                keep_daily: all,
                keep_weekly: all,
                keep_monthly: all,
                keep_yearly: all,
                keep_days: all,
                keep_within: Some(std::time::Duration::MAX),
                min_keep: all,
            };
            assert!(decide(&backups, &policy, now, &zone).iter().all(|v| v.keep));
        }
    }

    fn backups() -> impl Strategy<Value = Vec<Candidate>> {
        // Hours over three years, dense enough for ties and shared periods.
        let seldom = || prop::bool::weighted(0.05);
        proptest::collection::vec((0i64..26_280, prop::bool::weighted(0.8), seldom(), seldom(), seldom()), 0..60).prop_map(|found| {
            let start = at("2024-01-01T00:00:00Z").as_second();
            let candidate = |(n, (hours, good, pinned, proven, imported)): (usize, (i64, bool, bool, bool, bool))| Candidate {
                id: format!("{n:02}"),
                time: Timestamp::from_second(start + hours * 3600).expect("in range"),
                good,
                pinned,
                proven,
                safety: false,
                imported,
            };
            found.into_iter().enumerate().map(candidate).collect()
        })
    }

    fn policy() -> impl Strategy<Value = Retention> {
        let rule = || proptest::option::of(1u64..12);
        let days = || proptest::option::of(1u64..800);
        let rules = (rule(), rule(), rule(), rule(), rule(), rule(), days(), days(), rule());
        rules.prop_map(|(last, hourly, daily, weekly, monthly, yearly, days, within, least)| {
            let within = within.map(|d| d * 86_400);
            let numbers = [last, hourly, daily, weekly, monthly, yearly, days, within, least];
            let named = Retention::RULES.into_iter().zip(numbers);
            let numbers = named.filter_map(|(name, n)| Some((name.to_owned(), n?))).collect();
            // min_keep alone is no policy.
            Retention::from_numbers(&numbers).unwrap_or_default()
        })
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
            let newest = backups.iter().filter(|b| b.good && !b.imported && b.time <= now).max_by_key(|b| (b.time, &b.id));
            if let Some(newest) = newest {
                prop_assert!(kept.contains(&newest.id));
            }
            prop_assert!(backups.is_empty() || !kept.is_empty());
        }

        #[test]
        fn an_imported_one_stays_and_changes_nothing(backups in backups(), policy in policy()) {
            let kept = keeps(&backups, &policy);
            prop_assert!(backups.iter().filter(|b| b.imported).all(|b| kept.contains(&b.id)));
            let own: Vec<_> = backups.iter().filter(|b| !b.imported).cloned().collect();
            let own_kept: BTreeSet<_> = kept.into_iter().filter(|id| own.iter().any(|b| b.id == *id)).collect();
            prop_assert_eq!(keeps(&own, &policy), own_kept);
        }

        #[test]
        fn a_higher_number_removes_no_more(backups in backups(), policy in policy(), which in 0usize..9, more in 1u64..10) {
            let mut raised = policy.numbers();
            if let Some(n) = raised.get_mut(Retention::RULES[which]) {
                *n += more;
            }
            let raised = Retention::from_numbers(&raised).expect("the same rules");
            // min_keep counts what the other rules keep already: a rule that keeps more may leave it less to add.
            let (policy, raised) = match Retention::RULES[which] {
                "min_keep" => (policy, raised),
                _ => (Retention { min_keep: None, ..policy }, Retention { min_keep: None, ..raised }),
            };
            prop_assert!(keeps(&backups, &policy).is_subset(&keeps(&backups, &raised)));
        }

        #[test]
        fn pinned_proven_and_enough_stay(backups in backups(), policy in policy()) {
            let kept = keeps(&backups, &policy);
            let now = at("2026-06-02T00:00:00Z");
            for pinned in backups.iter().filter(|b| b.pinned) {
                prop_assert!(kept.contains(&pinned.id));
            }
            let counted: Vec<_> = backups.iter().filter(|b| b.good && !b.imported && b.time <= now).collect();
            if let Some(proven) = counted.iter().filter(|b| b.proven).max_by_key(|b| (b.time, &b.id)) {
                prop_assert!(kept.contains(&proven.id));
            }
            if let Some(least) = policy.min_keep {
                let good = counted.iter().filter(|b| kept.contains(&b.id)).count();
                prop_assert!(good >= counted.len().min(least as usize));
            }
        }

        #[test]
        fn what_falls_is_kept_now_and_never_pinned(backups in backups(), policy in policy()) {
            let now = at("2026-06-01T00:00:00Z");
            let ticks = (1..400).filter_map(|day| now.checked_add(jiff::SignedDuration::from_hours(24 * day)).ok());
            let falls = falls(&backups, &policy, now, &TimeZone::UTC, ticks);
            let verdicts = decide(&backups, &policy, now, &TimeZone::UTC);
            for (id, when) in &falls {
                prop_assert!(*when > now);
                prop_assert!(verdicts.iter().any(|v| v.id == *id && v.keep));
                prop_assert!(backups.iter().any(|b| b.id == *id && !b.pinned && !b.imported));
            }
            prop_assert!(!policy.keeps_everything() || falls.is_empty());
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
