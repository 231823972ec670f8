//! Cron expressions: our own check of every field, then croner's parser.
//!
//! croner takes some slips for valid (`*/70`, `1,,2`, names in the wrong field) and does not say which field is wrong, so each
//! field is checked here first. The schedule must parse with [`parse`] as well, so that both mean the same.

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::problem::{did_you_mean, quoted};

/// What is wrong with an expression, and at which byte of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct CronError {
    pub at: usize,
    pub text: String,
}

const WORDS: [&str; 6] = ["@yearly", "@annually", "@monthly", "@weekly", "@daily", "@hourly"];

struct Field {
    name: &'static str,
    min: u16,
    max: u16,
    /// The first one stands for `first_name`, the next for one more.
    names: &'static [&'static str],
    first_name: u16,
}

const FIELDS: [Field; 5] = [
    Field { name: "minute", min: 0, max: 59, names: &[], first_name: 0 },
    Field { name: "hour", min: 0, max: 23, names: &[], first_name: 0 },
    Field { name: "day of month", min: 1, max: 31, names: &[], first_name: 0 },
    Field {
        name: "month",
        min: 1,
        max: 12,
        names: &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
        first_name: 1,
    },
    Field { name: "day of week", min: 0, max: 7, names: &["sun", "mon", "tue", "wed", "thu", "fri", "sat"], first_name: 0 },
];

/// Parses a five-field expression or an @-word that has at least one occurrence from now on.
///
/// As in Vixie cron a day matches when day of month *or* day of week does, but when one of the two begins with `*` both must.
pub fn parse(text: &str) -> Result<Cron, CronError> {
    let fields = split(text);
    let both_days = match fields.as_slice() {
        [(at, word)] if word.starts_with('@') => {
            if !WORDS.iter().any(|w| w.eq_ignore_ascii_case(word)) {
                let guess = did_you_mean(word, WORDS);
                return Err(error(*at, format!("{} is not known; allowed are {}{guess}", quoted(word), WORDS.join(", "))));
            }
            false
        }
        [minute, hour, day, month, weekday] => {
            for ((at, value), field) in [minute, hour, day, month, weekday].into_iter().zip(&FIELDS) {
                check_field(field, *at, value)?;
            }
            day.1.starts_with('*') || weekday.1.starts_with('*')
        }
        other => {
            return Err(error(
                0,
                format!(
                    "has {} {}; allowed are five (minute, hour, day of month, month, day of week) or one of {}",
                    other.len(),
                    if other.len() == 1 { "field" } else { "fields" },
                    WORDS.join(", ")
                ),
            ));
        }
    };
    let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).dom_and_dow(both_days).build();
    let cron = parser.parse(text).map_err(|e| error(0, format!("{} is not understood: {e}", quoted(text))))?;
    // Only dates decide whether there is an occurrence at all, so any zone will do.
    let now = Timestamp::now().to_zoned(TimeZone::UTC);
    if cron.find_next_occurrence(&now, false).is_err() {
        return Err(error(0, format!("{} never happens: there is no such date", quoted(text))));
    }
    Ok(cron)
}

/// Whitespace-separated fields with their byte offsets.
fn split(text: &str) -> Vec<(usize, &str)> {
    text.split_whitespace().map(|field| (field.as_ptr() as usize - text.as_ptr() as usize, field)).collect()
}

fn check_field(field: &Field, at: usize, value: &str) -> Result<(), CronError> {
    let mut at = at;
    for item in value.split(',') {
        if item.is_empty() {
            return Err(field.error(at, format!("{} has an empty place between its commas", quoted(value))));
        }
        check_item(field, at, item)?;
        at += item.len() + 1;
    }
    Ok(())
}

/// `*`, `5`, `1-5`, each of the last two or `*` with `/step`; `L`, `fri#2`, `friL` for days.
fn check_item(field: &Field, at: usize, item: &str) -> Result<(), CronError> {
    let (base, step) = match item.split_once('/') {
        Some((base, step)) => (base, Some(step)),
        None => (item, None),
    };
    if let Some(step) = step {
        let step_at = at + base.len() + 1;
        if !number(step).is_some_and(|n| (1..=field.max).contains(&n)) {
            return Err(error(step_at, format!("{}: step {} must be a whole number from 1 to {}", field.name, quoted(step), field.max)));
        }
    }
    if base == "*" {
        return Ok(());
    }
    if let Some((from, to)) = base.split_once('-') {
        let low = field.value(at, from, false)?;
        let high = field.value(at + from.len() + 1, to, true)?;
        if low > high {
            return Err(field.error(at, format!("range {} runs backwards, write it as two with a comma", quoted(base))));
        }
        return Ok(());
    }
    if step.is_some() {
        let text = format!("{} has a step but no range; write '*/…' or '{base}-{}/…'", quoted(item), field.max);
        return Err(field.error(at, text));
    }
    match field.name {
        "day of month" if base.eq_ignore_ascii_case("L") => return Ok(()),
        "day of week" => {
            if let Some((day, nth)) = base.split_once('#') {
                field.value(at, day, false)?;
                if !number(nth).is_some_and(|n| (1..=5).contains(&n)) {
                    return Err(error(at, format!("{}: {} must be 1 to 5 after '#'", field.name, quoted(nth))));
                }
                return Ok(());
            }
            if let Some(day) = base.strip_suffix(['L', 'l']).filter(|d| !d.is_empty()) {
                field.value(at, day, false)?;
                return Ok(());
            }
        }
        _ => {}
    }
    field.value(at, base, false).map(|_| ())
}

impl Field {
    /// A number or name of the field. The end of a range may be Sunday after Saturday.
    fn value(&self, at: usize, text: &str, end_of_range: bool) -> Result<u16, CronError> {
        if let Some(n) = number(text) {
            if (self.min..=self.max).contains(&n) {
                return Ok(n);
            }
            return Err(self.error(at, format!("{} is out of range", quoted(text))));
        }
        if let Some(n) = self.names.iter().position(|name| name.eq_ignore_ascii_case(text)) {
            let n = self.first_name + u16::try_from(n).unwrap_or_default();
            return Ok(if end_of_range && self.max == 7 && n == 0 { 7 } else { n });
        }
        let what = if text.is_empty() { "a value is missing".into() } else { format!("{} is not understood", quoted(text)) };
        Err(self.error(at, format!("{what}{}", did_you_mean(text, self.names.iter().copied()))))
    }

    fn error(&self, at: usize, text: String) -> CronError {
        let names = match (self.names.first(), self.names.last()) {
            (Some(first), Some(last)) => format!(" or {first} to {last}"),
            _ => String::new(),
        };
        error(at, format!("{}: {text}; allowed are {} to {}{names}, '*', ranges, steps and lists", self.name, self.min, self.max))
    }
}

fn number(text: &str) -> Option<u16> {
    (text.len() <= 4 && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok()).flatten()
}

fn error(at: usize, text: String) -> CronError {
    CronError { at, text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn occurrences(text: &str, count: usize) -> Vec<String> {
        let start: jiff::Zoned = "2026-01-01T00:00:00[UTC]".parse().expect("a time");
        let cron = parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        cron.iter_after(start).take(count).map(|t| t.strftime("%Y-%m-%d %H:%M").to_string()).collect()
    }

    #[test]
    fn what_people_write_is_understood() {
        for text in [
            "30 2 * * *",
            "*/15 * * * *",
            "0 8-18/2 * * mon-fri",
            "0 0 1,15 * *",
            "0 0 * JAN,jul SUN",
            "0 0 * * FRI-SUN",
            "0 0 * * 7",
            "@daily",
            "@Hourly",
            "  5   4\t* * *  ",
            "0 0 29 2 *",
            "0 0 L * *",
            "0 0 * * mon#1",
            "0 0 * * friL",
            "59 23 31 12 *",
            "*/59 */23 */31 */12 */7",
        ] {
            if let Err(e) = parse(text) {
                panic!("{text}: {e}");
            }
        }
    }

    #[test]
    fn slips_are_refused_with_field_and_place() {
        for (text, at, part) in [
            ("60 * * * *", 0, "minute: '60' is out of range; allowed are 0 to 59"),
            ("0 24 * * *", 2, "hour: '24' is out of range; allowed are 0 to 23"),
            ("0 0 0 * *", 4, "day of month"),
            ("0 0 * 13 *", 6, "month: '13'"),
            ("0 0 * * 8", 8, "day of week: '8'"),
            ("*/70 * * * *", 2, "step '70' must be a whole number from 1 to 59"),
            ("*/0 * * * *", 2, "step '0'"),
            ("1,,2 * * * *", 2, "empty place"),
            ("jan-mar * * * *", 0, "minute: 'jan' is not understood"),
            ("0 0 * jann *", 6, "did you mean 'jan'?"),
            ("0/15 * * * *", 0, "'*/…' or '0-59/…'"),
            ("0 6-1 * * *", 2, "runs backwards"),
            ("0 0 * * +mon", 8, "day of week"),
            ("0 0 15W * *", 4, "day of month"),
            ("0 0 * * mon#6", 8, "1 to 5"),
            ("0 0 31 2 *", 0, "never happens"),
            ("@dayly", 0, "did you mean '@daily'?"),
            ("@reboot", 0, "allowed are @yearly"),
            ("* * * *", 0, "has 4 fields"),
            ("0 0 0 * * *", 0, "has 6 fields"),
            ("", 0, "has 0 fields"),
            ("0 0 5- * *", 6, "a value is missing"),
            ("٣ 0 * * *", 0, "minute"),
        ] {
            let error = parse(text).err().unwrap_or_else(|| panic!("{text} was taken"));
            assert!(error.text.contains(part), "{text}: {error}");
            assert_eq!(error.at, at, "{text}: {error}");
        }
    }

    #[test]
    fn days_match_as_in_vixie_cron() {
        // Either of the two: 13th or Friday.
        assert_eq!(occurrences("0 0 13 * fri", 4), ["2026-01-02 00:00", "2026-01-09 00:00", "2026-01-13 00:00", "2026-01-16 00:00"]);
        // Begins with a star: both. Odd days that are Mondays.
        assert_eq!(occurrences("0 0 */2 * mon", 3), ["2026-01-05 00:00", "2026-01-19 00:00", "2026-02-09 00:00"]);
        assert_eq!(occurrences("0 0 5 * *", 2), ["2026-01-05 00:00", "2026-02-05 00:00"]);
        assert_eq!(occurrences("0 0 * * sun", 2), ["2026-01-04 00:00", "2026-01-11 00:00"]);
        assert_eq!(occurrences("0 0 * * sat-sun", 2), ["2026-01-03 00:00", "2026-01-04 00:00"]);
        assert_eq!(occurrences("0 0 L * *", 2), ["2026-01-31 00:00", "2026-02-28 00:00"]);
        assert_eq!(occurrences("0 0 * * mon#1", 2), ["2026-01-05 00:00", "2026-02-02 00:00"]);
        assert_eq!(occurrences("0 0 * * friL", 2), ["2026-01-30 00:00", "2026-02-27 00:00"]);
    }
}
