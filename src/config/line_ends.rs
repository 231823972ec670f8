//! Line ends of a text that is edited; keepctl, which edits one with its caller's rights, takes them from here, too.

/// The changed text with the line ends that it had before (CR LF, or a mixture); new lines have those of most others.
pub fn with_line_ends(before: &str, after: &str) -> String {
    if !before.contains('\r') {
        return after.to_owned();
    }
    let (old, new) = (before.replace("\r\n", "\n"), after.replace("\r\n", "\n"));
    let lines: Vec<&str> = before.split_inclusive('\n').collect();
    let is_most = 2 * lines.iter().filter(|line| line.ends_with("\r\n")).count() >= lines.len();
    let mut text = String::with_capacity(after.len() + lines.len());
    for change in similar::TextDiff::from_lines(old.as_str(), new.as_str()).iter_all_changes() {
        match (change.tag(), change.old_index().and_then(|at| lines.get(at))) {
            (similar::ChangeTag::Delete, _) => {}
            (similar::ChangeTag::Equal, Some(line)) => text.push_str(line),
            _ => match change.value().strip_suffix('\n') {
                Some(line) if is_most => text.extend([line, "\r\n"]),
                _ => text.push_str(change.value()),
            },
        }
    }
    text
}
