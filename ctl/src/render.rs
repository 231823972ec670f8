//! Output for people: sizes, times, tables. Control characters of names are always escaped.

use std::io::{self, Write};

use comfy_table::{ContentArrangement, Table, presets};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use keepd_protocol::model::{BytesPath, ChangeKind, EntryInfo, EntryKind, escape};

/// IEC units.
pub fn bytes(n: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ if value < 10.0 => format!("{value:.2} {}", units[unit]),
        _ => format!("{value:.1} {}", units[unit]),
    }
}

/// A text of several lines, what a program said: the lines stay, each escaped, those after the first indented.
pub fn lines(text: &str) -> String {
    text.lines().map(|line| escape(&line.replace('\t', "    "))).collect::<Vec<_>>().join("\n    ")
}

/// The same without the indent: what is escaped already stays as it is.
pub fn escaped(text: &str) -> String {
    text.lines().map(|line| escape(&line.replace('\t', "    "))).collect::<Vec<_>>().join("\n")
}

/// A path as people see it; bytes that are not UTF-8 as \xNN.
pub fn path(path: &BytesPath) -> String {
    match (&path.base64, path.to_bytes()) {
        (Some(_), Ok(bytes)) => bytes
            .utf8_chunks()
            .map(|c| escape(c.valid()) + &c.invalid().iter().map(|b| format!("\\x{b:02x}")).collect::<String>())
            .collect(),
        _ => escape(&path.path),
    }
}

/// A change as `diff` shows it.
pub fn sign(change: ChangeKind) -> char {
    match change {
        ChangeKind::Added => '+',
        ChangeKind::Removed => '-',
        ChangeKind::Modified => 'M',
        ChangeKind::Metadata => 'm',
    }
}

/// Sizes that differ, to stand behind a path.
pub fn sizes(before: Option<u64>, after: Option<u64>) -> String {
    match (before, after) {
        (Some(before), Some(after)) if before != after => format!("  ({} -> {})", bytes(before), bytes(after)),
        _ => String::new(),
    }
}

/// An RFC 3339 time in the local zone.
pub fn time(text: &str) -> String {
    match text.parse::<Timestamp>() {
        Ok(t) => t.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
        Err(_) => escape(text),
    }
}

pub fn time_or(text: Option<&String>, none: &str) -> String {
    text.map_or_else(|| none.to_owned(), |t| time(t))
}

pub fn short(id: &str) -> String {
    escape(id.get(..12).unwrap_or(id))
}

/// A plain table: columns under a header, fitted to the terminal.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> io::Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic).set_header(header.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let text = table.to_string();
    let mut out = io::stdout().lock();
    for line in text.lines() {
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// `name  value` lines.
pub fn pairs(rows: &[(&str, String)]) -> io::Result<()> {
    let width = rows.iter().map(|(n, _)| n.len()).max().unwrap_or_default();
    let mut out = io::stdout().lock();
    for (name, value) in rows.iter().filter(|(_, v)| !v.is_empty()) {
        writeln!(out, "{name:<width$}  {value}")?;
    }
    Ok(())
}

/// As `ls -l` shows it.
pub fn entry(e: &EntryInfo) -> String {
    let kind = match e.kind {
        EntryKind::Directory => 'd',
        EntryKind::Symlink => 'l',
        EntryKind::File | EntryKind::Hardlink => '-',
    };
    let user = e.user.clone().unwrap_or_else(|| e.uid.to_string());
    let group = e.group.clone().unwrap_or_else(|| e.gid.to_string());
    let target =
        e.target.as_ref().map(|t| format!(" {} {}", if e.kind == EntryKind::Symlink { "->" } else { "=" }, path(t))).unwrap_or_default();
    let torn = if e.changed_while_read { "  (changed while it was read)" } else { "" };
    format!(
        "{kind}{} {:<8} {:<8} {:>12} {} {}{target}{torn}",
        mode(e.mode),
        escape(&user),
        escape(&group),
        e.size,
        time(&e.mtime),
        path(&e.path)
    )
}

fn mode(mode: u32) -> String {
    let mut text = String::with_capacity(9);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (false, false) => '-',
            (false, true) => 'x',
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_modes_and_names() {
        assert_eq!([bytes(0), bytes(1023), bytes(1536), bytes(20 << 30)], ["0 B", "1023 B", "1.50 KiB", "20.0 GiB"]);
        assert_eq!([mode(0o755), mode(0o4711), mode(0o1666)], ["rwxr-xr-x", "rws--x--x", "rw-rw-rwT"]);
        assert_eq!(escape("a\x1b[31mb\nc\u{202e}"), "a\\u{1b}[31mb\\nc\\u{202e}");
        assert_eq!(lines("a\tb\nc\x1bd\n"), "a    b\n    c\\u{1b}d");
        assert_eq!(escaped("a\x1b[2J\n  b\u{202e}\\u{1b}"), "a\\u{1b}[2J\n  b\\u{202e}\\u{1b}");
        assert_eq!(path(&BytesPath::from_bytes(b"a\xff\nb")), "a\\xff\\nb");
    }
}
