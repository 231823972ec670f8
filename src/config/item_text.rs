//! An item as the text that somebody edits: its tables with the comments that belong to them, cut out of a file and put back.
//!
//! In: a file's text and the path of a table. Out: the pieces that are the table and those in it. Which comments belong to a table is as in
//! [`super::edit`]: those right above its header, and those right below its last line; what a blank line separates is the file's.

use std::ops::Range;
use std::path::Path;

use toml::de::DeTable;
use toml_edit::{Document, Item, RawString, Table};

use super::ItemName;
use super::line_ends::with_line_ends;
use super::reader::Table as Read;
use super::source_text::SourceText;

const BOM: char = '\u{feff}';

/// A header with what is right above it, up to where what stands below it ends.
struct Section {
    path: Vec<String>,
    /// From the first comment right above the header.
    begin: usize,
    /// Behind the last line, and the comments right below it.
    end: usize,
}

/// The pieces of a text that are the table at `path` and the tables in it, in order; those that follow each other are one.
fn pieces(text: &str, path: &[&str]) -> Result<Vec<Range<usize>>, String> {
    let sections = sections(text)?;
    let is_own = |section: &Section| section.path.len() >= path.len() && section.path.iter().zip(path).all(|(a, b)| a == b);
    let mut pieces: Vec<Range<usize>> = Vec::new();
    let mut before_is_own = false;
    for section in &sections {
        if is_own(section) {
            match pieces.last_mut().filter(|_| before_is_own) {
                Some(piece) => piece.end = section.end,
                None => pieces.push(section.begin..section.end),
            }
        }
        before_is_own = is_own(section);
    }
    Ok(pieces)
}

fn sections(text: &str) -> Result<Vec<Section>, String> {
    let skipped = text.len() - text.trim_start_matches(BOM).len();
    let plain = text.get(skipped..).unwrap_or_default();
    let document = Document::parse(plain).map_err(|e| e.message().to_owned())?;
    let mut headers = Vec::new();
    headers_in(document.as_table(), &mut Vec::new(), &mut headers);
    headers.sort_by_key(|(_, at, _)| *at);
    // Where each ends is said by what stands before the next, or at the end.
    let ends = headers.iter().skip(1).map(|(_, at, above)| above.clone().unwrap_or(*at..*at));
    let trailing = document.trailing().span().unwrap_or(plain.len()..plain.len());
    let ends: Vec<Range<usize>> = ends.chain([trailing]).collect();
    let sections = headers.iter().zip(ends).map(|((path, at, above), below)| {
        let above = above.clone().unwrap_or(*at..*at);
        let attached = attached_above(plain.get(above.start..*at).unwrap_or_default());
        let between = plain.get(below.clone()).unwrap_or_default();
        let is_last = below.end == plain.len();
        let taken = if is_last { 0 } else { attached_above(between) };
        let own = between.get(..between.len() - taken).unwrap_or_default();
        Section { path: path.clone(), begin: skipped + at - attached, end: skipped + below.start + attached_below(own) }
    });
    Ok(sections.collect())
}

type Header = (Vec<String>, usize, Option<Range<usize>>);

/// All headers, with where each begins, and what stands before it.
fn headers_in(table: &Table, path: &mut Vec<String>, found: &mut Vec<Header>) {
    let mut header = |table: &Table, path: &[String]| {
        let above = table.decor().prefix().and_then(RawString::span);
        found.extend(table.span().map(|span| (path.to_vec(), span.start, above)));
    };
    let mut inner: Vec<(String, &Table)> = Vec::new();
    for (key, item) in table.iter() {
        match item {
            Item::Table(table) => inner.push((key.to_owned(), table)),
            Item::ArrayOfTables(list) => inner.extend(list.iter().map(|table| (key.to_owned(), table))),
            _ => {}
        }
    }
    for (key, table) in &inner {
        path.push(key.clone());
        if !table.is_implicit() && !table.is_dotted() {
            header(table, path);
        }
        path.pop();
    }
    for (key, table) in inner {
        path.push(key);
        headers_in(table, path, found);
        path.pop();
    }
}

/// How many bytes at the end are comments without a blank line below them.
fn attached_above(between: &str) -> usize {
    let lines = between.split_inclusive('\n').rev();
    lines.take_while(|line| line.trim_start().starts_with('#')).map(str::len).sum()
}

/// How many bytes at the beginning are comments without a blank line above them.
fn attached_below(between: &str) -> usize {
    between.split_inclusive('\n').take_while(|line| line.trim_start().starts_with('#')).map(str::len).sum()
}

/// The item's text out of a file; None when it is written in a way that cannot be cut out, dotted or in one line with others. `is_alone`: nothing else
/// stands in the file, and it is wholly the item's.
pub(super) fn cut_out(text: &str, item: &ItemName, is_alone: bool) -> Result<Option<String>, String> {
    let cut = if is_alone {
        text.trim_start_matches(BOM).to_owned()
    } else {
        let pieces = pieces(text, &item.table())?;
        pieces.into_iter().filter_map(|piece| text.get(piece)).map(with_end).collect()
    };
    let plain = cut.replace("\r\n", "\n");
    let whole = said(Path::new(""), text)?;
    let same =
        said(Path::new(""), &plain).is_ok_and(|said| said.as_object().is_some_and(|s| s.len() == 1) && at(&said, item) == at(&whole, item));
    let is_only = is_alone || only(&plain, item);
    Ok((same && is_only && at(&whole, item).is_some()).then_some(plain))
}

fn with_end(piece: &str) -> String {
    if piece.ends_with('\n') { piece.to_owned() } else { format!("{piece}\n") }
}

/// The file with another text in the item's place; everything else stays as it is, byte for byte.
pub(super) fn put_back(text: &str, item: &ItemName, is_alone: bool, new: &str) -> Result<String, String> {
    let new = with_end(new.trim_start_matches(BOM));
    if is_alone {
        let bom = if text.starts_with(BOM) { BOM.to_string() } else { String::new() };
        return Ok(bom + &with_line_ends(text.trim_start_matches(BOM), &new));
    }
    let pieces = pieces(text, &item.table())?;
    let old: String = pieces.iter().filter_map(|piece| text.get(piece.clone())).map(with_end).collect();
    // A piece says of itself how its lines end; one that is new, or short, as the file's do.
    let mut put = with_line_ends(&old, &new);
    let mut out = String::with_capacity(text.len() + put.len());
    let mut from = 0;
    for piece in pieces {
        out.push_str(text.get(from..piece.start).unwrap_or_default());
        out.push_str(&std::mem::take(&mut put));
        from = piece.end;
    }
    out.push_str(text.get(from..).unwrap_or_default());
    Ok(out)
}

/// A new file with an item's text.
pub(super) fn file_of(new: &str) -> String {
    with_end(new.trim_start_matches(BOM))
}

/// What an edited text says of its item; an error names the lines of the text that say something else.
pub(super) fn value_of(item: &ItemName, text: &str) -> Result<serde_json::Map<String, serde_json::Value>, String> {
    let name = format!("the text of {item}");
    let source = SourceText::new(Path::new(&name), text.to_owned());
    let table: DeTable<'_> = source.parse();
    let root = Read::root(&source, &table);
    let header = format!("[{}]", item.table().join("."));
    let wanted = item.table();
    let foreign = |key: &str| format!("belongs to another part of the configuration; here is only {header}: change '{key}' by itself");
    let mut found = None;
    match wanted.as_slice() {
        [one] => {
            for (key, value) in root.items() {
                match key == *one {
                    true => found = value.table(&format!("a table: {header}")),
                    false => value.report(foreign(key)),
                }
            }
        }
        [kind, one] => {
            for (key, value) in root.items() {
                let inner = if key == *kind { value.table(&format!("tables such as {header}")) } else { None };
                if key != *kind {
                    value.report(foreign(key));
                }
                for (key, value) in inner.iter().flat_map(Read::items) {
                    match key == *one {
                        true => found = value.table(&format!("a table: {header}")),
                        false => value.report(format!(
                            "is another one; this is the text of {item}, which keeps its name, and a new one is added by itself"
                        )),
                    }
                }
            }
        }
        _ => return Err(format!("{item} is no part of the configuration's files")),
    }
    let value = found.map(|table| table.json());
    drop(table);
    let problems: Vec<String> = source.into_problems().iter().map(ToString::to_string).collect();
    match value {
        _ if !problems.is_empty() => Err(problems.join("\n")),
        Some(serde_json::Value::Object(value)) => Ok(value),
        _ => {
            Err(format!("{name}: {header} is missing; to take it away remove it by its command, which says what becomes of what needs it"))
        }
    }
}

fn only(text: &str, item: &ItemName) -> bool {
    value_of(item, text).is_ok()
}

fn said(file: &Path, text: &str) -> Result<serde_json::Value, String> {
    let source = SourceText::new(file, text.to_owned());
    let table: DeTable<'_> = source.parse();
    let json = Read::root(&source, &table).json();
    drop(table);
    match source.into_problems().first() {
        None => Ok(json),
        Some(problem) => Err(problem.to_string()),
    }
}

fn at<'v>(tables: &'v serde_json::Value, item: &ItemName) -> Option<&'v serde_json::Value> {
    item.table().iter().try_fold(tables, |tables, key| tables.get(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(name: &str) -> ItemName {
        name.parse().unwrap()
    }

    const FILE: &str = "# the file\n\n[daemon]\nmemory = 1\n# in daemon\n\n# on all jobs\n\n# a's\n[job.a] # ours\nevery = '6h'\n# every = '7h'\n\n# its source\n[[job.a.source]]\nfiles = '/a'\n# tail of a\n\n# far\n\n[job.b]\nevery = '1h'\n[job.c]\n\n# c\n[[job.a.assert]]\nsql = '''\n# no comment\n[job.x]\n'''\n\n# the end\n";

    #[test]
    fn an_item_is_cut_out_with_its_comments_and_put_back() {
        let cut = |name: &str| cut_out(FILE, &item(name), false).unwrap().unwrap();
        assert_eq!(
            cut("job.a"),
            "# a's\n[job.a] # ours\nevery = '6h'\n# every = '7h'\n\n# its source\n[[job.a.source]]\nfiles = '/a'\n# tail of a\n# c\n[[job.a.assert]]\nsql = '''\n# no comment\n[job.x]\n'''\n"
        );
        assert_eq!(cut("job.b"), "[job.b]\nevery = '1h'\n");
        assert_eq!(cut("job.c"), "[job.c]\n");
        assert_eq!(cut("settings.daemon"), "[daemon]\nmemory = 1\n# in daemon\n");
        let put = |name: &str, new: &str| put_back(FILE, &item(name), false, new).unwrap();
        assert_eq!(put("job.b", &cut("job.b")), FILE);
        assert_eq!(put("job.b", "# new\n[job.b]\nevery = '2h'"), FILE.replace("[job.b]\nevery = '1h'\n", "# new\n[job.b]\nevery = '2h'\n"));
        let a = put("job.a", "[job.a]\nx = 1\n");
        assert!(a.contains("# on all jobs\n\n[job.a]\nx = 1\n\n# far\n\n[job.b]") && a.ends_with("[job.c]\n\n\n# the end\n"), "{a}");
    }

    #[test]
    fn line_ends_and_marks_stay() {
        let file = format!("{BOM}{}", FILE.replace('\n', "\r\n"));
        let cut = cut_out(&file, &item("job.b"), false).unwrap().unwrap();
        assert_eq!(cut, "[job.b]\nevery = '1h'\n");
        assert_eq!(put_back(&file, &item("job.b"), false, &cut).unwrap(), file);
        let put = put_back(&file, &item("job.b"), false, "[job.b]\nevery = '1h'\nx = 1\n").unwrap();
        assert_eq!(put, file.replace("every = '1h'\r\n", "every = '1h'\r\nx = 1\r\n"));
        let alone = format!("{BOM}# top\r\n\r\n[job.b]\r\n");
        assert_eq!(cut_out(&alone, &item("job.b"), true).unwrap().as_deref(), Some("# top\n\n[job.b]\n"));
        assert_eq!(
            put_back(&alone, &item("job.b"), true, "# top\n\n[job.b]\nx = 1\n").unwrap(),
            format!("{BOM}# top\r\n\r\n[job.b]\r\nx = 1\r\n")
        );
    }

    #[test]
    fn what_cannot_be_cut_out_is_known() {
        for text in
            ["job.a.x = 1\n", "job = { a = { x = 1 } }\n", "[job]\na.x = 1\n", "[job]\na = { x = 1 }\n", "[job]\na.x = 1\nb.x = 1\n"]
        {
            assert_eq!(cut_out(text, &item("job.a"), false).unwrap(), None, "{text}");
        }
        // Alone in a file of its own it is wholly shown, however it is written.
        assert_eq!(cut_out("job.a.x = 1\n", &item("job.a"), true).unwrap().as_deref(), Some("job.a.x = 1\n"));
    }

    #[test]
    fn what_comes_back_is_the_item_and_nothing_else() {
        let a = item("job.a");
        assert_eq!(value_of(&a, "[job.a]\nx = 1\n[[job.a.source]]\n").unwrap().len(), 2);
        for (text, wanted) in [
            ("[job.a]\nx = \n", "the text of job.a:2:"),
            ("[job.a]\n[job.b]\n", "the text of job.a:2:1: job.b: is another one"),
            ("[job.a]\n[destination.b]\n", "the text of job.a:2:2: destination: belongs to another part"),
            ("x = 1\n[job.a]\n", "x: belongs"),
            ("", "[job.a] is missing"),
            ("[job.b]\n", "job.b: is another one"),
            ("[[job.a]]\n", "must be a table"),
        ] {
            let error = value_of(&a, text).unwrap_err();
            assert!(error.contains(wanted), "{text}: {error}");
        }
        assert!(value_of(&item("settings.daemon"), "[daemon]\n").is_ok());
    }
}
