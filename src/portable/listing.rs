//! `manifest.json` and `contents.json` with their list of files, which is as long as it likes: written and read as a stream, with a bound on everything that is held.

use std::cell::Cell;
use std::fmt;
use std::io::{self, BufRead, Read, Write};
use std::rc::Rc;

use data_encoding::HEXLOWER;
use keepd_protocol::model::BytesPath;
use serde::de::{DeserializeOwned, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::file_list::{FileList, FileListWriter, Line};
use super::{Head, PortableError, Result, Tail};

/// Longer ones, in bytes, are refused.
pub const MAX_LISTING_BYTES: u64 = 8 << 30;
/// Of all but the list of files.
pub const MAX_FACTS_BYTES: u64 = 4 << 20;
/// What the values in it may take of memory, as [`cost`] counts them: a few bytes of JSON make hundreds in memory.
const MAX_FACTS_COST: u64 = 32 << 20;
/// Of a line of the list: a name of 65,536 bytes, escaped.
const MAX_LINE_BYTES: u64 = 512 << 10;
const FILES: &str = "files";

/// A line on its way; as [`super::FileLine`], but without the detour of a flattened struct.
#[derive(Serialize, Deserialize)]
struct Wire {
    path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base64: Option<String>,
    size: u64,
    sha256: String,
}

/// Writes it, with the list of files as its last key if there is one.
pub fn write(out: &mut impl Write, facts: &impl Serialize, files: Option<FileList>) -> Result<()> {
    let mut text = serde_json::to_vec(facts).map_err(|e| PortableError::Io(io::Error::other(e)))?;
    if text.len() as u64 > MAX_FACTS_BYTES {
        return Err(PortableError::TooMuch(format!(
            "what an archive says of its backup has {} bytes without the list of files; {MAX_FACTS_BYTES} are the most",
            text.len()
        )));
    }
    let Some(mut files) = files else {
        text.push(b'\n');
        return out.write_all(&text).map_err(PortableError::Io);
    };
    text.pop();
    text.extend_from_slice(b",\"files\":[");
    let mut separator: &[u8] = b"\n";
    while let Some(Line { name, size, sha256 }) = files.next()? {
        text.extend_from_slice(separator);
        let BytesPath { path, base64 } = BytesPath::from_bytes(&name);
        let line = Wire { path, base64, size, sha256: HEXLOWER.encode(&sha256) };
        serde_json::to_writer(&mut text, &line).map_err(|e| PortableError::Io(e.into()))?;
        if text.len() > 64 << 10 {
            out.write_all(&text).map_err(PortableError::Io)?;
            text.clear();
        }
        separator = b",\n";
    }
    text.extend_from_slice(b"\n]}\n");
    out.write_all(&text).map_err(PortableError::Io)
}

/// Counts bytes instead of writing them.
pub struct Count(pub u64);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How many bytes [`write`] writes.
pub fn len(facts: &impl Serialize, files: Option<FileList>) -> Result<u64> {
    let mut count = Count(0);
    write(&mut count, facts, files)?;
    Ok(count.0)
}

/// Whether a JSON document begins as a head of keepd's: an object with `format` and `archive`. Its format.
pub fn format_of(start: &[u8]) -> Option<u64> {
    struct Keys<'a>(&'a mut Option<u64>, &'a mut bool);
    impl<'de> Visitor<'de> for Keys<'_> {
        type Value = ();
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            while self.0.is_none() || !*self.1 {
                match map.next_key::<String>()?.as_deref() {
                    Some("format") => *self.0 = map.next_value::<Value>()?.as_u64(),
                    Some("archive") => *self.1 = map.next_value::<Value>()?.is_string(),
                    Some(_) => drop(map.next_value::<IgnoredAny>()?),
                    None => break,
                }
            }
            Ok(())
        }
    }
    let (mut format, mut archive) = (None, false);
    // It ends early, as a rule.
    let _ = serde_json::Deserializer::from_slice(start).deserialize_map(Keys(&mut format, &mut archive));
    format.filter(|_| archive)
}

/// Where the lines of a listing go.
pub trait Lines {
    fn line(&mut self, line: Line) -> Result<()>;
}

impl Lines for FileListWriter {
    fn line(&mut self, line: Line) -> Result<()> {
        self.push_line(&line)
    }
}

/// Compares with the lines that are known.
impl Lines for FileList {
    fn line(&mut self, line: Line) -> Result<()> {
        match self.next()? {
            Some(known) if known == line => Ok(()),
            _ => Err(PortableError::Damaged(format!(
                "the list at the end of the archive does not tell what is in it: it differs at {}",
                super::file_list::shown(&line.name)
            ))),
        }
    }
}

/// Reads it from `input`, which ends with it. `name` is that of the member, for errors. False: without a list.
pub fn read<T: Facts>(input: impl Read, name: &str, lines: &mut dyn Lines) -> Result<(T, bool)> {
    let left = Rc::new(Cell::new(MAX_FACTS_BYTES));
    let mut failed = None;
    let cost = Rc::new(Cell::new(MAX_FACTS_COST));
    let bounded = Bounded { input: io::BufReader::with_capacity(64 << 10, input), left: left.clone(), cost: cost.clone() };
    let mut json = serde_json::Deserializer::from_reader(bounded);
    let read = Listing { left: &left, cost: &cost, keys: T::KEYS, lines, failed: &mut failed }
        .deserialize(&mut json)
        .and_then(|found| json.end().map(|()| found));
    let (facts, listed) = match (read, failed) {
        (_, Some(e)) => return Err(e),
        (Err(e), _) if e.is_io() => {
            let e = io::Error::from(e);
            return Err(match PortableError::inside(e) {
                Ok(inside) => inside,
                Err(e) => PortableError::Hostile(format!("{name} of the archive: {e}")),
            });
        }
        (Err(e), _) => return Err(PortableError::Damaged(format!("{name} of the archive is damaged: {e}"))),
        (Ok(found), None) => found,
    };
    let facts = serde_json::from_value(Value::Object(facts))
        .map_err(|e| PortableError::Damaged(format!("{name} of the archive is damaged: {e}")))?;
    Ok((facts, listed))
}

/// What stands before the list of files.
pub trait Facts: DeserializeOwned {
    /// Keys that are kept; others are read past, those of later versions among them. Empty: all are.
    const KEYS: &'static [&'static str];
}

impl Facts for Head {
    const KEYS: &'static [&'static str] = &[
        "format",
        "archive",
        "created",
        "keepd_version",
        "contents",
        "origin",
        "sources",
        "totals",
        "users",
        "groups",
        "messages",
        "left_out",
        "selected",
    ];
}

impl Facts for Tail {
    const KEYS: &'static [&'static str] =
        &["archive", "finished", "outcome", "sources", "totals", "users", "groups", "messages", "left_out", "version", "schema_version"];
}

/// About the bytes of memory that a value takes which begins with this byte, or follows it; it counts within strings, too.
fn cost(byte: u8) -> u64 {
    match byte {
        b'{' => 640,
        b',' | b'[' => 128,
        _ => 0,
    }
}

/// Gives so many bytes, of values that cost so much, and then an error.
struct Bounded<R> {
    input: io::BufReader<R>,
    left: Rc<Cell<u64>>,
    cost: Rc<Cell<u64>>,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = self.left.get();
        if (left == 0 || self.cost.get() == 0) && !into.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a value in it is longer than any that keepd writes"));
        }
        // The parser takes byte by byte.
        if let ([to], [byte, ..]) = (&mut *into, self.input.buffer()) {
            *to = *byte;
            self.input.consume(1);
            self.left.set(left - 1);
            self.cost.set(self.cost.get().saturating_sub(cost(*to)));
            return Ok(1);
        }
        let most = into.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let n = self.input.read(into.get_mut(..most).unwrap_or_default())?;
        self.left.set(left - n as u64);
        let cost = into.iter().take(n).map(|b| cost(*b)).sum();
        self.cost.set(self.cost.get().saturating_sub(cost));
        Ok(n)
    }
}

struct Listing<'a> {
    left: &'a Cell<u64>,
    cost: &'a Cell<u64>,
    keys: &'static [&'static str],
    lines: &'a mut dyn Lines,
    failed: &'a mut Option<PortableError>,
}

impl<'de> DeserializeSeed<'de> for Listing<'_> {
    type Value = (Map<String, Value>, bool);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Listing<'_> {
    type Value = (Map<String, Value>, bool);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut facts = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if key == FILES {
                // Of the list one line is held at a time.
                self.cost.set(u64::MAX);
                map.next_value_seed(Files { left: self.left, lines: self.lines, failed: self.failed })?;
                return match map.next_key::<IgnoredAny>()? {
                    None => Ok((facts, true)),
                    Some(_) => Err(serde::de::Error::custom("something follows its list of files")),
                };
            }
            if facts.contains_key(&key) {
                return Err(serde::de::Error::custom(format_args!("it has '{}' twice", key.escape_debug())));
            }
            if !self.keys.is_empty() && !self.keys.contains(&key.as_str()) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = map.next_value()?;
            facts.insert(key, value);
        }
        Ok((facts, false))
    }
}

struct Files<'a> {
    left: &'a Cell<u64>,
    lines: &'a mut dyn Lines,
    failed: &'a mut Option<PortableError>,
}

impl<'de> DeserializeSeed<'de> for Files<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Files<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of files")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        loop {
            self.left.set(MAX_LINE_BYTES);
            let Some(Wire { path, base64, size, sha256 }) = seq.next_element()? else { return Ok(()) };
            let name = BytesPath { path, base64 }.to_bytes().map_err(serde::de::Error::custom)?;
            let sha256 = HEXLOWER.decode(sha256.as_bytes()).ok().and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
            let sha256 = sha256.ok_or_else(|| serde::de::Error::custom("a SHA-256 in it is not 64 hexadecimal digits"))?;
            if let Err(e) = self.lines.line(Line { name, size, sha256 }) {
                *self.failed = Some(e);
                return Err(serde::de::Error::custom("a line was refused"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::FileLine;
    use super::*;

    impl Facts for Value {
        const KEYS: &'static [&'static str] = &[];
    }

    fn list(dir: &Path, lines: &[FileLine]) -> FileList {
        let mut writer = FileListWriter::create(dir).unwrap();
        for line in lines {
            writer.push(line).unwrap();
        }
        writer.finish().unwrap()
    }

    fn read_text(text: &[u8]) -> Result<(Value, bool, FileList)> {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = FileListWriter::create(dir.path()).unwrap();
        let (facts, listed) = read(text, "manifest.json", &mut writer)?;
        Ok((facts, listed, writer.finish()?))
    }

    #[test]
    fn a_listing_comes_back_with_one_file_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let lines: Vec<FileLine> = [&b"db/a \"quoted\"\n"[..], b"db/\xff", "db/\u{e4}".as_bytes()]
            .iter()
            .map(|name| FileLine { path: BytesPath::from_bytes(name), size: u64::MAX, sha256: "0a".repeat(32) })
            .collect();
        let facts = serde_json::json!({"format": 1, "archive": "x"});
        let mut out = Vec::new();
        write(&mut out, &facts, Some(list(dir.path(), &lines))).unwrap();
        assert_eq!(out.len() as u64, len(&facts, Some(list(dir.path(), &lines))).unwrap());
        assert_eq!(out.iter().filter(|b| **b == b'\n').count(), 5);
        let whole: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(whole["files"], serde_json::to_value(&lines).unwrap(), "as FileLine is written elsewhere");
        let (again, listed, mut files) = read_text(&out).unwrap();
        assert_eq!((again, listed), (facts.clone(), true));
        for line in lines {
            assert_eq!(files.next_line().unwrap(), Some(line));
        }
        let mut out = Vec::new();
        write(&mut out, &facts, None).unwrap();
        assert!(!read_text(&out).unwrap().1);
    }

    #[test]
    fn what_is_no_listing_is_refused() {
        let long = format!(r#"{{"a":"{}"}}"#, "x".repeat(MAX_FACTS_BYTES as usize));
        let line = format!(r#"{{"files":[{{"path":"{}","size":1,"sha256":""}}]}}"#, "x".repeat(MAX_LINE_BYTES as usize));
        let many = format!(r#"{{"a":[{}0]}}"#, r#"{"":0},"#.repeat(50_000));
        let deep = "[".repeat(100_000);
        let deep = format!(r#"{{"a":{deep}"#);
        for (text, why) in [
            ("", "EOF"),
            ("[]", "an object"),
            (r#"{"a":1,"a":2}"#, "twice"),
            (r#"{"files":[],"files":[]}"#, "follows its list"),
            (r#"{"files":[],"a":1}"#, "follows its list"),
            (r#"{"files":[]}x"#, "trailing"),
            (r#"{"files":[{"path":"a","size":-1,"sha256":""}]}"#, "invalid value"),
            (r#"{"files":[{"path":"a","size":1,"sha256":""}]}"#, "64 hexadecimal digits"),
            (r#"{"files":[{"path":"a","base64":"!","size":1,"sha256":""}]}"#, "base64"),
            (r#"{"files":[1]}"#, "invalid type"),
            (r#"{"files":["#, "EOF"),
            (&long, "longer than any"),
            (&line, "longer than any"),
            (&deep, "recursion"),
            (&many, "longer than any"),
        ] {
            let error = read_text(text.as_bytes()).err().unwrap_or_else(|| panic!("{}", &text[..text.len().min(50)])).to_string();
            assert!(error.contains(why), "{error}");
            assert!(error.starts_with("manifest.json of the archive"), "{error}");
        }
    }

    #[test]
    fn keys_that_are_not_known_are_read_past() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = FileListWriter::create(dir.path()).unwrap();
        let tail = Tail { archive: "x".into(), ..Tail::default() };
        let mut json = serde_json::to_string(&tail).unwrap();
        json.pop();
        json.push_str(r#","later":[{"files":1}],"files":[]}"#);
        assert_eq!(read::<Tail>(json.as_bytes(), "contents.json", &mut writer).unwrap(), (tail, true));
        // None of those that are written is forgotten.
        let keys = |value: Value| value.as_object().unwrap().keys().cloned().collect::<std::collections::BTreeSet<_>>();
        let known = |keys: &[&str]| keys.iter().map(|k| (*k).to_owned()).collect();
        assert_eq!(keys(serde_json::to_value(Head { selected: true, ..Head::default() }).unwrap()), known(Head::KEYS));
        assert_eq!(keys(serde_json::to_value(Tail::default()).unwrap()), known(Tail::KEYS));
    }

    #[test]
    fn a_head_is_known_by_its_first_keys() {
        assert_eq!(format_of(br#"{"format":1,"archive":"00","created":"#), Some(1));
        assert_eq!(format_of(br#" {"archive":"00", "x":[1,{}], "format":7,"#), Some(7));
        for other in [
            &b""[..],
            b"{",
            b"{}",
            b"[]",
            br#"{"format":1}"#,
            br#"{"format":"1","archive":"x"}"#,
            br#"{"name":"app","version":1}"#,
            b"\xff\xff",
        ] {
            assert_eq!(format_of(other), None);
        }
    }
}
