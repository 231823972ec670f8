//! The next due time of a schedule.

use std::time::Duration;

use croner::Cron;
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{SignedDuration, Span, Timestamp, Zoned};

use crate::config::{Schedule, cron};

/// A search that croner gives up (a civil day that never was) goes on from here.
const AFTER_GAP: SignedDuration = SignedDuration::from_hours(26);

/// The first due time after `after`, None when there is none any more. `anchor` is what an interval counts from.
pub fn next_due(schedule: &Schedule, zone: &TimeZone, after: Timestamp, anchor: Timestamp) -> Option<Timestamp> {
    match schedule {
        Schedule::At(time) => Some(instant(*time, zone)?).filter(|t| *t > after),
        Schedule::Every(every) => next_interval(*every, after, anchor),
        Schedule::Cron(text) => {
            let expression = cron::parse(text).ok()?;
            if every_hour(text) { next_real(&expression, zone, after) } else { next_civil(&expression, zone, after) }
        }
    }
}

/// The hour field begins with a star: the job runs in every real hour, also when the clock is set forward or back.
fn every_hour(text: &str) -> bool {
    let text = text.trim();
    text.eq_ignore_ascii_case("@hourly") || text.split_ascii_whitespace().nth(1).is_some_and(|hour| hour.starts_with('*'))
}

/// The newest due time at or before `now` and after `after`: what was missed, as one.
pub fn newest_missed(schedule: &Schedule, zone: &TimeZone, after: Timestamp, anchor: Timestamp, now: Timestamp) -> Option<Timestamp> {
    let mut newest = next_due(schedule, zone, after, anchor).filter(|t| *t <= now)?;
    // A long time off: whatever lies further back than four years of months need not be walked through, nor all minutes of a month.
    if let Schedule::Every(every) = schedule {
        let last = now.checked_sub(SignedDuration::try_from(*every).ok()?).ok().and_then(|before| next_interval(*every, before, anchor));
        newest = last.filter(|last| *last <= now).unwrap_or(newest).max(newest);
    }
    if let Schedule::Cron(_) = schedule {
        let near = [1i64, 25, 24 * 32, 24 * 400, 24 * 9 * 366].into_iter().find_map(|hours| {
            let start = now.checked_sub(SignedDuration::from_hours(hours)).ok().filter(|s| *s > newest)?;
            next_due(schedule, zone, start, anchor).filter(|t| *t <= now)
        });
        newest = near.unwrap_or(newest);
    }
    while let Some(next) = next_due(schedule, zone, newest, anchor).filter(|t| *t <= now) {
        newest = next;
    }
    Some(newest)
}

fn next_interval(every: Duration, after: Timestamp, anchor: Timestamp) -> Option<Timestamp> {
    let step = i128::from(every.as_secs().max(1));
    let past = i128::from(after.as_second()) - i128::from(anchor.as_second());
    let steps = if past < 0 { 1 } else { past / step + 1 };
    let next = i128::from(anchor.as_second()) + steps * step;
    Timestamp::from_second(i64::try_from(next).ok()?).ok()
}

/// Fixed times of day: civil times one after the other, each once. One that the clock skips runs right after the gap, one
/// that comes twice runs the first time.
fn next_civil(expression: &Cron, zone: &TimeZone, after: Timestamp) -> Option<Timestamp> {
    // A gap may move a time before `after` to behind it, so the search begins a little earlier.
    let begin = after.to_zoned(zone.clone()).datetime().checked_sub(Span::new().hours(26)).ok()?;
    let mut civil = begin.to_zoned(TimeZone::UTC).ok()?;
    for _ in 0..10_000 {
        civil = expression.find_next_occurrence(&civil, false).ok()?;
        match instant(civil.datetime(), zone) {
            Some(t) if t > after => return Some(t),
            _ => {}
        }
    }
    None
}

/// Every hour: in real time, so that no hour is left out or counted twice.
fn next_real(expression: &Cron, zone: &TimeZone, after: Timestamp) -> Option<Timestamp> {
    let mut from: Zoned = after.to_zoned(zone.clone());
    for _ in 0..16 {
        match expression.find_next_occurrence(&from, false) {
            Ok(next) if next.timestamp() > after => return Some(next.timestamp()),
            Ok(next) => from = next,
            Err(_) => from = from.checked_add(AFTER_GAP).ok()?,
        }
    }
    None
}

/// A civil time as an instant: after the gap when it is skipped, the first when it comes twice.
fn instant(civil: DateTime, zone: &TimeZone) -> Option<Timestamp> {
    let ambiguous = zone.to_ambiguous_timestamp(civil);
    match ambiguous.offset() {
        AmbiguousOffset::Unambiguous { .. } | AmbiguousOffset::Fold { .. } => ambiguous.earlier().ok(),
        AmbiguousOffset::Gap { .. } => {
            let before = ambiguous.earlier().ok()?;
            zone.following(before).next().map(|transition| transition.timestamp()).or_else(|| ambiguous.later().ok())
        }
    }
}

/// A schedule in the words of the configuration.
pub fn words(schedule: &Option<Schedule>) -> String {
    match schedule {
        None => String::new(),
        Some(Schedule::Cron(text)) => text.clone(),
        Some(Schedule::At(time)) => format!("at {}", time.strftime("%Y-%m-%dT%H:%M:%S")),
        Some(Schedule::Every(every)) => {
            let mut left = every.as_secs();
            let mut text = String::from("every ");
            for (unit, seconds) in [("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)] {
                if left >= seconds {
                    text.push_str(&format!("{}{unit}", left / seconds));
                    left %= seconds;
                }
            }
            text
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn t(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn all(text: &str, zone: &str, from: &str, to: &str) -> Vec<String> {
        let (zone, schedule) = (TimeZone::get(zone).unwrap(), Schedule::Cron(text.into()));
        let (mut at, end) = (t(from), t(to));
        let mut found = Vec::new();
        while let Some(next) = next_due(&schedule, &zone, at, at).filter(|n| *n < end) {
            assert!(next > at, "time goes on");
            at = next;
            found.push(at.to_zoned(zone.clone()).strftime("%d %H:%M%:z").to_string());
        }
        found
    }

    #[test]
    fn skipped_times_run_once_after_the_gap_and_doubled_ones_once() {
        let spring = |s| all(s, "Europe/Berlin", "2026-03-28T12:00:00Z", "2026-03-29T12:00:00Z");
        assert_eq!(spring("30 2 * * *"), ["29 03:00+02:00"]);
        assert_eq!(spring("15,45 2 * * *"), ["29 03:00+02:00"]);
        assert_eq!(spring("0 3 * * *"), ["29 03:00+02:00"]);
        assert_eq!(spring("*/20 2 * * *"), ["29 03:00+02:00"]);
        let autumn = |s| all(s, "Europe/Berlin", "2026-10-24T22:30:00Z", "2026-10-25T03:30:00Z");
        assert_eq!(autumn("30 2 * * *"), ["25 02:30+02:00"]);
        assert_eq!(autumn("15,45 2 * * *"), ["25 02:15+02:00", "25 02:45+02:00"]);
        assert_eq!(autumn("30 * * * *"), ["25 01:30+02:00", "25 02:30+02:00", "25 02:30+01:00", "25 03:30+01:00"]);
        assert_eq!(
            all("0 0 * * *", "America/Havana", "2026-03-07T12:00:00Z", "2026-03-09T12:00:00Z"),
            ["08 01:00-04:00", "09 00:00-04:00"]
        );
        assert_eq!(all("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T00:00:00Z", "2026-10-04T12:00:00Z"), ["04 02:30+11:00"]);
    }

    #[test]
    fn a_day_that_never_was_does_not_end_the_schedule() {
        for text in ["0 12 * * *", "0 * * * *"] {
            let found = all(text, "Pacific/Apia", "2011-12-29T00:00:00Z", "2012-01-02T00:00:00Z");
            assert!(found.iter().any(|f| f.starts_with("31 12:00")), "{text}: {found:?}");
        }
        assert_eq!(all("0 0 29 2 *", "UTC", "2026-01-01T00:00:00Z", "2033-01-01T00:00:00Z").len(), 2);
    }

    #[test]
    fn both_day_fields_are_as_in_vixie_cron() {
        let count = |s| all(s, "UTC", "2026-06-30T23:59:00Z", "2026-08-01T00:00:00Z").len();
        assert_eq!(count("0 0 13 * 5"), 6, "the 13th, or a Friday (five in July 2026)");
        assert_eq!(count("0 0 * * 5"), 5);
        assert_eq!(count("0 0 13 * *"), 1);
        assert_eq!(count("0 0 */2 * 5"), 3, "a field with a star: an odd day that is a Friday");
    }

    #[test]
    fn intervals_do_not_drift_and_missed_ones_are_one() {
        let every = Schedule::Every(Duration::from_secs(3600));
        let anchor = t("2026-01-01T00:20:00Z");
        assert_eq!(next_due(&every, &TimeZone::UTC, t("2026-01-01T05:00:00Z"), anchor), Some(t("2026-01-01T05:20:00Z")));
        assert_eq!(newest_missed(&every, &TimeZone::UTC, anchor, anchor, t("2026-01-03T00:00:00Z")), Some(t("2026-01-02T23:20:00Z")));
        let cron = Schedule::Cron("30 2 * * *".into());
        assert_eq!(
            newest_missed(&cron, &TimeZone::UTC, t("2016-01-01T00:00:00Z"), anchor, t("2026-01-03T00:00:00Z")),
            Some(t("2026-01-02T02:30:00Z"))
        );
        let minute = Schedule::Every(Duration::from_secs(60));
        let ten_years = newest_missed(&minute, &TimeZone::UTC, anchor, anchor, t("2036-01-03T00:00:30Z"));
        assert_eq!(ten_years, Some(t("2036-01-03T00:00:00Z")), "and at once");
        let at = Schedule::At("2026-12-24T18:00".parse().unwrap());
        assert_eq!(next_due(&at, &TimeZone::UTC, t("2026-12-24T18:00:00Z"), anchor), None);
    }

    /// Minute by minute, with nothing but the definition.
    fn matches(text: &str, time: &jiff::civil::DateTime) -> bool {
        let fields: Vec<&str> = text.split(' ').collect();
        let fits = |field: &str, value: i64, low: i64, high: i64| {
            field.split(',').any(|part| {
                let (range, step) = part.split_once('/').map_or((part, 1), |(r, s)| (r, s.parse().unwrap()));
                let (a, b) = match range.split_once('-') {
                    _ if range == "*" => (low, high),
                    Some((a, b)) => (a.parse().unwrap(), b.parse().unwrap()),
                    None => (range.parse().unwrap(), range.parse().unwrap()),
                };
                (a..=b).contains(&value) && (value - a) % step == 0
            })
        };
        let dow = i64::from(time.date().weekday().to_sunday_zero_offset());
        let day = fits(fields[2], i64::from(time.day()), 1, 31);
        let week = fits(fields[4], dow, 0, 6) || (dow == 0 && fits(fields[4], 7, 0, 7));
        let star = fields[2].starts_with('*') || fields[4].starts_with('*');
        fits(fields[0], i64::from(time.minute()), 0, 59)
            && fits(fields[1], i64::from(time.hour()), 0, 23)
            && fits(fields[3], i64::from(time.month()), 1, 12)
            && if star { day && week } else { day || week }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn agrees_with_a_matcher_minute_by_minute(m in field(0, 59), h in field(0, 23), d in field(1, 31), w in field(0, 6)) {
            let text = format!("{m} {h} {d} * {w}");
            let schedule = Schedule::Cron(text.clone());
            let start = t("2026-02-26T00:00:00Z");
            let mut at = start;
            let mut found = Vec::new();
            while let Some(next) = next_due(&schedule, &TimeZone::UTC, at, at).filter(|n| n.duration_since(start) < SignedDuration::from_hours(24 * 9)) {
                at = next;
                found.push(at);
            }
            let wanted: Vec<Timestamp> = (1..9 * 24 * 60).map(|n| start + SignedDuration::from_mins(n))
                .filter(|t| matches(&text, &t.to_zoned(TimeZone::UTC).datetime())).collect();
            prop_assert_eq!(found, wanted, "{}", text);
        }
    }

    fn field(low: u32, high: u32) -> impl Strategy<Value = String> {
        let number = low..=high;
        prop_oneof![
            3 => Just("*".to_owned()),
            1 => (2u32..7).prop_map(|n| format!("*/{n}")),
            2 => proptest::collection::vec(number.clone(), 1..4).prop_map(|v| v.iter().map(u32::to_string).collect::<Vec<_>>().join(",")),
            1 => (number.clone(), number).prop_map(|(a, b)| format!("{}-{}", a.min(b), a.max(b))),
        ]
    }
}
