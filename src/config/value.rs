//! The small languages inside strings: durations, sizes, paths and names.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{RoundMode, Timestamp, TimestampRound, Unit, Zoned};

/// A hundred years: longer ones are slips, and would overflow calendars.
pub(super) const LONGEST_SECONDS: u64 = 100 * 365 * 86_400;

const DURATION_UNITS: [(&str, u64); 5] = [("w", 7 * 86_400), ("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)];

const SIZE_UNITS: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1000),
    ("KB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

/// `90s`, `15m`, `6h`, `30d`, `2w`, and several of them from long to short: `1h30m`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    if text.is_empty() {
        return Err("it is empty".into());
    }
    let mut rest = text;
    let mut seconds = 0u64;
    let mut last_unit = u64::MAX;
    while !rest.is_empty() {
        let (digits, after) = split_digits(rest);
        if digits.is_empty() {
            return Err(format!("a number is expected at {}", super::problem::quoted(rest)));
        }
        let letters = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, next) = after.split_at(letters);
        let Some((_, factor)) = DURATION_UNITS.iter().find(|(name, _)| *name == unit) else {
            return Err(match unit {
                "" => "the unit is missing, one of s, m, h, d, w".into(),
                _ => format!("{} is none of the units s, m, h, d, w", super::problem::quoted(unit)),
            });
        };
        if *factor >= last_unit {
            return Err("the units must go from long to short, each once".into());
        }
        last_unit = *factor;
        seconds = digits
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(*factor))
            .and_then(|n| n.checked_add(seconds))
            .filter(|n| *n <= LONGEST_SECONDS)
            .ok_or("it is longer than a hundred years")?;
        rest = next;
    }
    Ok(Duration::from_secs(seconds))
}

/// The shortest way to write a duration of whole seconds.
pub fn show_duration(duration: Duration) -> String {
    let mut seconds = duration.as_secs();
    if seconds == 0 {
        return "0s".into();
    }
    let mut out = String::new();
    for (unit, factor) in DURATION_UNITS {
        if seconds >= factor {
            out.push_str(&format!("{}{unit}", seconds / factor));
            seconds %= factor;
        }
    }
    out
}

/// `64MiB`, `10GB`, `4096`: a whole number of bytes.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let (digits, unit) = split_digits(text);
    if digits.is_empty() {
        return Err("it does not begin with a number".into());
    }
    let factor = match unit {
        "" | "B" => 1,
        _ => match SIZE_UNITS.iter().find(|(name, _)| *name == unit) {
            Some((_, factor)) => *factor,
            None if unit.starts_with('.') => return Err("fractions are not understood, take a smaller unit".into()),
            None => {
                let guess = super::problem::did_you_mean(unit, SIZE_UNITS.iter().map(|(name, _)| *name));
                return Err(format!("{} is none of the units KiB, MiB, GiB, TiB, kB, MB, GB, TB{guess}", super::problem::quoted(unit)));
            }
        },
    };
    digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).ok_or_else(|| "it is too large".into())
}

fn split_digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

/// An absolute path, tidied of `.`, doubled and trailing slashes. `..` is refused: where it leads depends on links, so that two
/// paths could not be told apart by looking at them.
pub(super) fn absolute_path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() {
        return Err("is empty; give an absolute path".into());
    }
    if text.contains('\0') {
        return Err("holds a NUL character, which no path can".into());
    }
    let path = Path::new(text);
    if !path.is_absolute() {
        let hint = if text.starts_with('~') { " ('~' is not expanded)" } else { "" };
        return Err(format!("is not an absolute path{hint}; it must begin with '/'"));
    }
    if path.components().any(|c| c == Component::ParentDir) {
        return Err("must not contain '..'; write the path it leads to".into());
    }
    Ok(path.components().collect())
}

/// What [`moment`] understands.
pub(super) const MOMENT: &str =
    "RFC 3339 such as \"2026-12-24T18:00:00Z\", or without an offset in the job's timezone: \"2026-12-24T18:00\", \"2026-12-24\"";

/// A moment to the second (later where it has a fraction): with an offset, or a civil time that is meant in `zone`.
pub fn moment(text: &str, zone: &TimeZone) -> Result<Timestamp, String> {
    let text = text.trim();
    let found = if text.contains('[') {
        text.parse::<Zoned>().ok().map(|zoned| zoned.timestamp())
    } else {
        text.parse::<Timestamp>().ok().or_else(|| text.parse::<DateTime>().ok()?.to_zoned(zone.clone()).ok().map(|zoned| zoned.timestamp()))
    };
    let rounded = TimestampRound::new().smallest(Unit::Second).mode(RoundMode::Ceil);
    let found = found.and_then(|time| time.round(rounded).ok());
    found.ok_or_else(|| format!("{} is no time that is understood; write it as {MOMENT}", super::problem::quoted(text)))
}

/// The name of a table: `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.
pub fn is_name(name: &str) -> bool {
    name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let seconds = |t| duration(t).map(|d| d.as_secs());
        assert_eq!(seconds("90s"), Ok(90));
        assert_eq!(seconds("15m"), Ok(900));
        assert_eq!(seconds("6h"), Ok(21_600));
        assert_eq!(seconds("30d"), Ok(2_592_000));
        assert_eq!(seconds("2w"), Ok(1_209_600));
        assert_eq!(seconds("1h30m"), Ok(5400));
        assert_eq!(seconds("0s"), Ok(0));
        for wrong in ["", "s", "5", "1.5h", "-1s", "1h1h", "30m1h", "5 m", "1M", "99999999999999999999s", "200000d", "1hm", "١s"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
        for text in ["1w2d3h4m5s", "90d", "0s", "1m30s"] {
            let given = duration(text).expect(text);
            assert_eq!(duration(&show_duration(given)), Ok(given), "{text}");
        }
    }

    #[test]
    fn moments() {
        let berlin = TimeZone::get("Europe/Berlin").unwrap();
        let at = |text: &str| moment(text, &berlin).map(|t| t.to_string()).ok();
        for (text, wanted) in [
            ("2026-12-24T18:00:00Z", "2026-12-24T18:00:00Z"),
            ("2026-12-24T18:00:00+02:00", "2026-12-24T16:00:00Z"),
            ("2026-12-24T18:00", "2026-12-24T17:00:00Z"),
            ("2026-12-24 18:00:30", "2026-12-24T17:00:30Z"),
            ("2026-12-24", "2026-12-23T23:00:00Z"),
            ("2026-12-24T18:00[America/New_York]", "2026-12-24T23:00:00Z"),
            ("2026-12-24T18:00:00.2Z", "2026-12-24T18:00:01Z"),
            ("2026-03-29T02:30", "2026-03-29T01:30:00Z"),
        ] {
            assert_eq!(at(text).as_deref(), Some(wanted), "{text}");
        }
        for wrong in ["", "tomorrow", "18:00", "2026-13-01", "2026-12-24T18:00[Nowhere/Else]", "1766599200"] {
            assert!(moment(wrong, &berlin).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("64MiB"), Ok(64 << 20));
        assert_eq!(size("10GB"), Ok(10_000_000_000));
        assert_eq!(size("1B"), Ok(1));
        for wrong in ["", "MiB", "1.5GiB", "1 MiB", "99999999TiB", "-1", "1mib", "1M"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
        assert!(size("64mib").expect_err("case counts").contains("did you mean 'MiB'"));
    }

    #[test]
    fn paths() {
        assert_eq!(absolute_path("/a//b/./c/"), Ok("/a/b/c".into()));
        assert_eq!(absolute_path("/"), Ok("/".into()));
        for wrong in ["", "a", "~/a", "./a", "/a/../b", "/a\0b"] {
            assert!(absolute_path(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names() {
        for good in ["a", "shop", "a.b-c_d", "0", &"x".repeat(64)] {
            assert!(is_name(good), "{good}");
        }
        for wrong in ["", ".a", "-a", "_a", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(!is_name(wrong), "{wrong}");
        }
    }
}
