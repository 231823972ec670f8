//! Cron expressions: five fields as Vixie cron has them, checked field by field before croner reads them.
//!
//! croner's own errors name neither field nor position, and it takes some mistakes for granted (`*/70`, `1,,2`, names in
//! the wrong field); so the form is checked here and its matching is left to croner.

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};

struct Field {
    name: &'static str,
    low: u32,
    high: u32,
    names: &'static [&'static str],
}

const MONTHS: &[&str] = &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const DAYS: &[&str] = &["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
const FIELDS: [Field; 5] = [
    Field { name: "minute", low: 0, high: 59, names: &[] },
    Field { name: "hour", low: 0, high: 23, names: &[] },
    Field { name: "day of month", low: 1, high: 31, names: &[] },
    Field { name: "month", low: 1, high: 12, names: MONTHS },
    // 0 and 7 are Sunday.
    Field { name: "day of week", low: 0, high: 7, names: DAYS },
];

const WORDS: &[(&str, &str)] = &[
    ("@hourly", "0 * * * *"),
    ("@daily", "0 0 * * *"),
    ("@midnight", "0 0 * * *"),
    ("@weekly", "0 0 * * 0"),
    ("@monthly", "0 0 1 * *"),
    ("@yearly", "0 0 1 1 *"),
    ("@annually", "0 0 1 1 *"),
];

/// A checked expression.
#[derive(Debug, Clone)]
pub struct Expression {
    pub cron: Cron,
    /// The hour field starts with a star: it runs in every real hour, also when the clock is set forward or back.
    pub every_hour: bool,
}

/// Parses; an error names the field, its column (in characters, from 1) and what is allowed.
pub fn parse(text: &str) -> Result<Expression, String> {
    let trimmed = text.trim();
    let text = match trimmed.strip_prefix('@') {
        None => trimmed,
        Some(_) => WORDS.iter().find(|(word, _)| *word == trimmed.to_ascii_lowercase()).map(|(_, fields)| *fields).ok_or_else(|| {
            let known = WORDS.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
            format!("'{trimmed}' is no schedule; the words are {known}")
        })?,
    };
    let fields: Vec<&str> = text.split_ascii_whitespace().collect();
    if fields.len() != FIELDS.len() {
        return Err(format!(
            "'{text}' has {} fields, a schedule has five: minute, hour, day of month, month, day of week (e.g. \"30 2 * * *\")",
            fields.len()
        ));
    }
    let mut column = 1;
    let mut at = 0;
    for (field, known) in fields.iter().zip(&FIELDS) {
        let start = text.get(at..).and_then(|rest| rest.find(field)).map_or(at, |n| n + at);
        column += text.get(at..start).unwrap_or_default().chars().count();
        known.check(field).map_err(|what| format!("'{text}': {} (column {column}): {what}", known.name))?;
        column += field.chars().count();
        at = start + field.len();
    }
    let star = |n: usize| fields.get(n).is_some_and(|f| f.starts_with('*'));
    // As in Vixie cron: when both day fields are restricted either may match, when one starts with a star both must.
    let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).dom_and_dow(star(2) || star(4)).build();
    let cron = parser.parse(text).map_err(|e| format!("'{text}' is no schedule: {e}"))?;
    let expression = Expression { cron, every_hour: star(1) };
    let start = jiff::civil::date(2024, 1, 1).to_zoned(jiff::tz::TimeZone::UTC).map_err(|e| e.to_string())?;
    match expression.cron.find_next_occurrence(&start, true) {
        Ok(_) => Ok(expression),
        Err(_) => Err(format!("'{text}' never comes (there is no such day)")),
    }
}

impl Field {
    fn check(&self, text: &str) -> Result<(), String> {
        for part in text.split(',') {
            if part.is_empty() {
                return Err("a list has an empty element".into());
            }
            let (range, step) = match part.split_once('/') {
                None => (part, None),
                Some((range, step)) => (range, Some(step)),
            };
            if let Some(step) = step {
                let n: u32 = step.parse().map_err(|_| format!("the step '{step}' is no number"))?;
                if n == 0 || n > self.high {
                    return Err(format!("the step {n} must be from 1 to {}", self.high));
                }
                if range != "*" && !range.contains('-') {
                    return Err(format!("a step needs a star or a range before it, as in */{n} or {}-{}/{n}", self.low, self.high));
                }
            }
            if range == "*" {
                continue;
            }
            match range.split_once('-') {
                None => drop(self.value(range)?),
                Some((a, b)) => {
                    let (a, b) = (self.value(a)?, self.value(b)?);
                    if a > b {
                        return Err(format!("the range {range} runs backwards; write it as two, as in {a}-{},{}-{b}", self.high, self.low));
                    }
                }
            }
        }
        Ok(())
    }

    fn value(&self, text: &str) -> Result<u32, String> {
        let allowed = || {
            let names = if self.names.is_empty() { String::new() } else { format!(" or {}", self.names.join(", ")) };
            format!("'{text}' must be from {} to {}{names}", self.low, self.high)
        };
        if let Some(n) = self.names.iter().position(|name| name.eq_ignore_ascii_case(text)) {
            return Ok(n as u32 + self.low);
        }
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(allowed());
        }
        text.parse().ok().filter(|n| (self.low..=self.high).contains(n)).ok_or_else(allowed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_ones_parse() {
        for text in ["30 2 * * *", "*/15 * * * *", "0 9-17/2 * * mon-fri", "15,45 2 1,15 jan,JUL 7", "@daily", "0 0 29 2 *", "0 0 */10 * 1"]
        {
            parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        }
    }

    #[test]
    fn mistakes_are_named_by_field_and_column() {
        for (text, part) in [
            ("60 2 * * *", "minute (column 1): '60' must be from 0 to 59"),
            ("0 24 * * *", "hour (column 3)"),
            ("*/70 * * * *", "step 70"),
            ("1,,2 * * * *", "empty element"),
            ("jan 2 * * *", "minute"),
            ("0 0 31 2 *", "never comes"),
            ("0 0 * * 8", "day of week (column 9)"),
            ("0 0 * foo *", "month (column 7)"),
            ("0/15 * * * *", "star or a range"),
            ("22-2 * * * *", "backwards"),
            ("* * * *", "4 fields"),
            ("0 0 0 * * *", "6 fields"),
            ("@fortnightly", "@daily"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
