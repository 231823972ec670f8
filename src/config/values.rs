//! Durations and sizes as people write them.

use std::time::Duration;

/// `90s`, `15m`, `6h`, `30d`, `2w`, and sums of them (`1h30m`). Bounds: more than nothing, at most 100 years.
pub fn duration(text: &str) -> Result<Duration, String> {
    let usage = || format!("'{text}' is no duration; write a number and a unit (s, m, h, d, w), e.g. 90s, 6h, 30d, 1h30m");
    let mut total: u64 = 0;
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(usage());
    }
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, tail) = rest.split_at(digits);
        let number: u64 = number.parse().map_err(|_| usage())?;
        let letters = tail.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, after) = tail.split_at(letters);
        let seconds = match unit {
            "s" | "sec" => 1,
            "m" | "min" => 60,
            "h" => 3600,
            "d" => 86_400,
            "w" => 604_800,
            _ => return Err(usage()),
        };
        total = number.checked_mul(seconds).and_then(|n| total.checked_add(n)).ok_or_else(usage)?;
        rest = after.trim_start();
    }
    match total {
        0 => Err(format!("'{text}' is no time at all; it must be at least 1s")),
        n if n > 100 * 366 * 86_400 => Err(format!("'{text}' is more than 100 years")),
        n => Ok(Duration::from_secs(n)),
    }
}

/// `4096`, `64MiB`, `10GB`: bytes.
pub fn size(text: &str) -> Result<u64, String> {
    let usage = || format!("'{text}' is no size; write a number and a unit (B, KiB, MiB, GiB, TiB, or kB, MB, GB, TB), e.g. 256MiB");
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| usage())?;
    let factor: u64 = match unit.trim() {
        "" | "B" => 1,
        "KiB" | "K" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        "TiB" | "T" => 1 << 40,
        "kB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return Err(usage()),
    };
    number.checked_mul(factor).ok_or_else(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes() {
        for (text, seconds) in [("90s", 90), ("15m", 900), ("6h", 21_600), ("30d", 2_592_000), ("1h30m", 5400), ("2w", 1_209_600)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "5", "h", "1.5h", "-3h", "0s", "1y", "99999999999999999999s", "9999999w", "3h4"] {
            assert!(duration(text).is_err(), "{text}");
        }
        for (text, bytes) in [("4096", 4096), ("64MiB", 64 << 20), ("10GB", 10_000_000_000), ("1 TiB", 1 << 40)] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "MiB", "-1", "1.5GiB", "1XB", "99999999999999999TiB"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
