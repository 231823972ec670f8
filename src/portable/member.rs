//! Entries as members of a tar archive (POSIX.1-2001, with pax headers where they are needed), and back.

use std::collections::BTreeMap;

use data_encoding::BASE64;
use keepd_protocol::model::{BytesPath, EntryKind};
use keepd_protocol::restore::EntryHeader;
use tar::{EntryType, Header};

use super::file_list::{MAX_NAME_BYTES, shown};
use super::{PortableError, Result};

pub const BLOCK: usize = 512;
/// Zeros that end a tar.
pub const END_BYTES: u64 = 2 * BLOCK as u64;
/// Longer names stand in a pax header.
const NAME_BYTES: usize = 100;
/// A pax header is never longer, nor a long name of GNU tar.
pub const MAX_PAX_BYTES: u64 = 1 << 20;
/// Longer targets of symlinks are refused: no system has them.
const MAX_TARGET_BYTES: usize = 4096;
/// What fits into the octal digits of a header.
const MAX_OCTAL_ID: u64 = 0o7_777_777;
const MAX_OCTAL_SIZE: u64 = 0o77_777_777_777;
const XATTR: &[u8] = b"SCHILY.xattr.";

/// The blocks that stand before an entry's contents: its header, and a pax header before it where one is needed.
pub fn blocks(entry: &EntryHeader) -> Result<Vec<u8>> {
    let mut path = entry.path.to_bytes().map_err(PortableError::Damaged)?;
    let wrong = |what: String| PortableError::Damaged(format!("{}: {what}, which an archive cannot hold", shown(&path)));
    let target = entry.target.as_ref().map(|t| t.to_bytes()).transpose().map_err(PortableError::Damaged)?.unwrap_or_default();
    if path.is_empty() || path.len() >= MAX_NAME_BYTES || path.contains(&0) || target.contains(&0) {
        return Err(wrong(format!("its name or target is empty, has a zero byte, or is longer than {MAX_NAME_BYTES} bytes")));
    }
    let mut records = Records::default();
    for (name, value) in &entry.xattrs {
        let value = BASE64
            .decode(value.as_bytes())
            .map_err(|e| wrong(format!("the value of its extended attribute {} is no base64 ({e})", name.path)))?;
        let name = name.to_bytes().map_err(&wrong)?;
        records.0.insert([XATTR, &encoded(&name)].concat(), value);
    }
    if entry.kind == EntryKind::Directory {
        path.push(b'/');
    }
    let mut header = Header::new_ustar();
    header.set_entry_type(match entry.kind {
        EntryKind::File => EntryType::Regular,
        EntryKind::Directory => EntryType::Directory,
        EntryKind::Symlink => EntryType::Symlink,
        EntryKind::Hardlink => EntryType::Link,
    });
    header.set_mode(entry.mode & 0o7777);
    let mut number = |key: &str, value: u64, most: u64| {
        if value <= most {
            return value;
        }
        records.put(key, value.to_string().into_bytes());
        0
    };
    header.set_uid(number("uid", entry.uid.into(), MAX_OCTAL_ID));
    header.set_gid(number("gid", entry.gid.into(), MAX_OCTAL_ID));
    header.set_size(number("size", if entry.kind == EntryKind::File { entry.size } else { 0 }, MAX_OCTAL_SIZE));
    let seconds = u64::try_from(entry.mtime_seconds).unwrap_or(0);
    if entry.mtime_nanoseconds > 0 || entry.mtime_seconds < 0 || seconds > MAX_OCTAL_SIZE {
        records.put("mtime", decimal(entry.mtime_seconds, entry.mtime_nanoseconds).into_bytes());
    }
    header.set_mtime(seconds.min(MAX_OCTAL_SIZE));
    if let Some(name) = entry.user.as_deref().filter(|name| !name.contains('\0'))
        && (!name.is_ascii() || name.len() > 31 || header.set_username(name).is_err())
    {
        records.put("uname", name.as_bytes().to_vec());
    }
    if let Some(name) = entry.group.as_deref().filter(|name| !name.contains('\0'))
        && (!name.is_ascii() || name.len() > 31 || header.set_groupname(name).is_err())
    {
        records.put("gname", name.as_bytes().to_vec());
    }
    let mut name = |field: &mut [u8; NAME_BYTES], key: &str, value: &[u8]| {
        for (to, from) in field.iter_mut().zip(value) {
            *to = *from;
        }
        if value.len() > NAME_BYTES || !value.is_ascii() {
            records.put(key, value.to_vec());
        }
    };
    name(&mut header.as_old_mut().name, "path", &path);
    name(&mut header.as_old_mut().linkname, "linkpath", &target);
    header.set_cksum();
    let mut out = Vec::with_capacity(BLOCK);
    if !records.0.is_empty() {
        let body = records.to_bytes();
        if body.len() as u64 > MAX_PAX_BYTES {
            path.pop_if(|_| entry.kind == EntryKind::Directory);
            let text =
                format!("{}: its name and extended attributes have {} bytes; an archive takes {MAX_PAX_BYTES}", shown(&path), body.len());
            return Err(PortableError::TooMuch(text));
        }
        let mut pax = Header::new_ustar();
        pax.set_entry_type(EntryType::XHeader);
        for (to, from) in pax.as_old_mut().name.iter_mut().zip(b"././@PaxHeader") {
            *to = *from;
        }
        pax.set_mode(0o600);
        pax.set_uid(0);
        pax.set_gid(0);
        pax.set_mtime(0);
        pax.set_size(body.len() as u64);
        pax.set_cksum();
        out.extend_from_slice(pax.as_bytes());
        out.extend_from_slice(&body);
        out.resize(out.len().next_multiple_of(BLOCK), 0);
    }
    out.extend_from_slice(header.as_bytes());
    Ok(out)
}

/// Zeros that fill up the last block of contents of this length.
pub fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

/// Seconds with their fraction, also before 1970.
fn decimal(seconds: i64, nanoseconds: u32) -> String {
    let total = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    let sign = if total < 0 { "-" } else { "" };
    format!("{sign}{}.{:09}", total.unsigned_abs() / 1_000_000_000, total.unsigned_abs() % 1_000_000_000)
}

/// Of [`decimal`]; digits beyond nanoseconds are dropped, downwards.
fn from_decimal(text: &str) -> Option<(i64, u32)> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() || !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit()) || whole.len() > 19 || fraction.len() > 100 {
        return None;
    }
    let nanoseconds: i128 = format!("{:0<9.9}", fraction).parse().ok()?;
    let mut total = whole.parse::<i128>().ok()? * 1_000_000_000 + nanoseconds;
    if negative {
        total = -total - i128::from(fraction.bytes().skip(9).any(|b| b != b'0'));
    }
    Some((i64::try_from(total.div_euclid(1_000_000_000)).ok()?, u32::try_from(total.rem_euclid(1_000_000_000)).ok()?))
}

/// The name of an extended attribute as GNU tar has it in a key, which ends at the first `=`.
fn encoded(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    for byte in name {
        match byte {
            b'%' => out.extend_from_slice(b"%25"),
            b'=' => out.extend_from_slice(b"%3D"),
            byte => out.push(*byte),
        }
    }
    out
}

fn decoded(mut name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    loop {
        name = match name {
            [b'%', b'2', b'5', rest @ ..] => {
                out.push(b'%');
                rest
            }
            [b'%', b'3', b'D', rest @ ..] => {
                out.push(b'=');
                rest
            }
            [byte, rest @ ..] => {
                out.push(*byte);
                rest
            }
            [] => return out,
        }
    }
}

/// The records of a pax header, by key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Records(BTreeMap<Vec<u8>, Vec<u8>>);

impl Records {
    fn put(&mut self, key: &str, value: Vec<u8>) {
        self.0.insert(key.as_bytes().to_vec(), value);
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (key, value) in &self.0 {
            let rest = key.len() + value.len() + 3;
            let mut len = rest;
            while len != rest + len.to_string().len() {
                len = rest + len.to_string().len();
            }
            out.extend_from_slice(len.to_string().as_bytes());
            out.push(b' ');
            out.extend_from_slice(key);
            out.push(b'=');
            out.extend_from_slice(value);
            out.push(b'\n');
        }
        out
    }

    /// Of a whole pax header, as it stands.
    pub fn parse(mut body: &[u8]) -> Result<Self> {
        let wrong = || PortableError::Damaged("a pax header of the archive is damaged: its records are not 'LENGTH KEY=VALUE'".into());
        let mut records = Self::default();
        while !body.is_empty() {
            let space = body.iter().take(8).position(|b| *b == b' ').ok_or_else(wrong)?;
            let digits = body.get(..space).filter(|d| !d.is_empty() && d.iter().all(u8::is_ascii_digit)).ok_or_else(wrong)?;
            let len: usize = std::str::from_utf8(digits).ok().and_then(|d| d.parse().ok()).ok_or_else(wrong)?;
            let (record, rest) = body.split_at_checked(len).ok_or_else(wrong)?;
            let record = record.get(space + 1..).and_then(|r| r.strip_suffix(b"\n")).ok_or_else(wrong)?;
            let equals = record.iter().position(|b| *b == b'=').filter(|at| *at > 0).ok_or_else(wrong)?;
            let (key, value) = record.split_at_checked(equals).ok_or_else(wrong)?;
            if records.0.insert(key.to_vec(), value.get(1..).unwrap_or_default().to_vec()).is_some() {
                return Err(PortableError::Hostile(format!(
                    "a pax header of the archive has {} twice, which readers take in different ways",
                    shown(key)
                )));
            }
            body = rest;
        }
        Ok(records)
    }

    /// Of a global header: refused is what must not be the same of all that follows.
    pub fn check_global(&self) -> Result<()> {
        match self.0.keys().find(|key| {
            ["path", "linkpath", "size"].iter().any(|k| k.as_bytes() == key.as_slice())
                || key.starts_with(b"GNU.sparse.")
                || key.starts_with(XATTR)
        }) {
            Some(key) => {
                Err(PortableError::Hostile(format!("a global pax header of the archive gives every member the same {}", shown(key))))
            }
            None => Ok(()),
        }
    }

    fn get(&self, key: &str) -> Option<&[u8]> {
        // An empty value takes a global one back.
        self.0.get(key.as_bytes()).map(Vec::as_slice).filter(|value| !value.is_empty())
    }
}

/// What stands before a member: of pax and of GNU tar.
#[derive(Debug, Default)]
pub struct Before {
    pub pax: Option<Records>,
    pub name: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
}

/// What a header block is.
pub enum Block {
    /// Two of them end an archive.
    Zeros,
    /// The header of what stands before a member, with so many bytes.
    Pax(u64),
    GlobalPax(u64),
    LongName(u64),
    LongLink(u64),
    Member(Box<Header>),
}

pub fn block(bytes: &[u8; BLOCK]) -> Result<Block> {
    if bytes.iter().all(|b| *b == 0) {
        return Ok(Block::Zeros);
    }
    let header = Header::from_byte_slice(bytes);
    let sum: u32 = bytes.iter().enumerate().map(|(at, b)| if (148..156).contains(&at) { 32 } else { u32::from(*b) }).sum();
    if number(bytes.get(148..156).unwrap_or_default()) != Some(i128::from(sum)) {
        return Err(PortableError::Damaged("a header of the archive is damaged: its checksum does not match (is it a tar at all?)".into()));
    }
    let size = || match number(&header.as_old().size) {
        Some(size) if (0..=i128::from(MAX_PAX_BYTES)).contains(&size) => Ok(size as u64),
        Some(_) => Err(PortableError::Hostile(format!("a pax header or long name of the archive has more than {MAX_PAX_BYTES} bytes"))),
        None => Err(PortableError::Damaged("a header of the archive is damaged: its size is no number".into())),
    };
    Ok(match header.entry_type() {
        EntryType::XHeader => Block::Pax(size()?),
        EntryType::XGlobalHeader => Block::GlobalPax(size()?),
        EntryType::GNULongName => Block::LongName(size()?),
        EntryType::GNULongLink => Block::LongLink(size()?),
        _ => Block::Member(Box::new(header.clone())),
    })
}

/// Octal digits, or the binary form of GNU tar.
fn number(field: &[u8]) -> Option<i128> {
    match field {
        [first, rest @ ..] if first & 0x80 != 0 => {
            // Of 95 bits at most; the second highest bit is the sign.
            let mut value = i128::from(first & 0x3f) - if first & 0x40 != 0 { 0x40 } else { 0 };
            for byte in rest {
                value = value << 8 | i128::from(*byte);
            }
            Some(value)
        }
        _ => {
            let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
            let text = std::str::from_utf8(field.get(..end)?).ok()?.trim_matches(' ');
            if text.is_empty() { Some(0) } else { text.bytes().all(|b| b.is_ascii_digit()).then(|| i128::from_str_radix(text, 8).ok())? }
        }
    }
}

/// A member as an entry. Its path is as it stands in the archive, but for slashes at the end: whoever calls looks at it.
pub fn entry(header: &Header, before: &Before, global: &Records) -> Result<(EntryHeader, Vec<u8>, Vec<u8>)> {
    let none = Records::default();
    let pax = before.pax.as_ref().unwrap_or(&none);
    let record = |key: &str| if pax.0.contains_key(key.as_bytes()) { pax.get(key) } else { global.get(key) };
    let mut path = record("path").map(<[u8]>::to_vec).or_else(|| before.name.clone()).unwrap_or_else(|| header.path_bytes().into_owned());
    let of = |path: &[u8], text: &str| format!("{} in the archive {text}", shown(path));
    if path.is_empty() || path.contains(&0) {
        return Err(PortableError::Hostile(of(&path, "has an empty name, or one with a zero byte")));
    }
    if path.len() > MAX_NAME_BYTES {
        return Err(PortableError::Hostile(of(&path, &format!("has a name of {} bytes; {MAX_NAME_BYTES} are the most", path.len()))));
    }
    let slash = path.ends_with(b"/");
    if pax.0.keys().any(|key| key.starts_with(b"GNU.sparse.")) || header.entry_type() == EntryType::GNUSparse {
        let text =
            of(&path, "is stored as a sparse file of GNU tar, which keepd does not read; make the archive again without --sparse (-S)");
        return Err(PortableError::Version(text));
    }
    let kind = match header.entry_type() {
        EntryType::Regular | EntryType::Continuous if slash => EntryKind::Directory,
        EntryType::Regular | EntryType::Continuous => EntryKind::File,
        EntryType::Directory => EntryKind::Directory,
        EntryType::Symlink => EntryKind::Symlink,
        EntryType::Link => EntryKind::Hardlink,
        EntryType::Char | EntryType::Block => {
            return Err(PortableError::Hostile(of(&path, "is a device; archives hold files, directories and links alone")));
        }
        EntryType::Fifo => return Err(PortableError::Hostile(of(&path, "is a fifo; archives hold files, directories and links alone"))),
        other => {
            let text = of(&path, &format!("is of the type '{}', which keepd does not read", char::from(other.as_byte()).escape_debug()));
            return Err(PortableError::Version(text));
        }
    };
    while path.ends_with(b"/") && path.len() > 1 {
        path.pop();
    }
    let field = |field: &[u8], what: &str| {
        number(field).ok_or_else(|| PortableError::Damaged(of(&path, &format!("has a damaged header: its {what} is no number"))))
    };
    let decimal_of = |key: &str| match record(key) {
        None => Ok(None),
        Some(value) => {
            match std::str::from_utf8(value).ok().filter(|v| v.bytes().all(|b| b.is_ascii_digit())).and_then(|v| v.parse::<u64>().ok()) {
                Some(value) => Ok(Some(i128::from(value))),
                None => Err(PortableError::Hostile(of(&path, &format!("has a pax header whose {key} is no number")))),
            }
        }
    };
    let old = header.as_old();
    let in_header = field(&old.size, "size")?;
    let size = match decimal_of("size")? {
        None => in_header,
        Some(size) if in_header == 0 || in_header == size || size > i128::from(MAX_OCTAL_SIZE) => size,
        Some(size) => {
            let text = format!("has {size} bytes by its pax header and {in_header} by its header, which readers take in different ways");
            return Err(PortableError::Hostile(of(&path, &text)));
        }
    };
    let size = u64::try_from(size).ok().filter(|size| *size <= i64::MAX as u64);
    let size = size.ok_or_else(|| PortableError::Hostile(of(&path, "has a size that no file has")))?;
    if kind != EntryKind::File && size != 0 {
        let text = format!("is no regular file and has contents of {size} bytes, which readers take in different ways");
        return Err(PortableError::Hostile(of(&path, &text)));
    }
    let id = |key: &str, bytes: &[u8]| -> Result<u32> {
        let id = match decimal_of(key)? {
            Some(id) => id,
            None => field(bytes, key)?,
        };
        u32::try_from(id).map_err(|_| PortableError::Hostile(of(&path, &format!("has {id} for its {key}, which no user or group has"))))
    };
    let name = |key: &str, bytes: Option<&[u8]>| {
        let name = record(key).or(bytes).unwrap_or_default();
        std::str::from_utf8(name).ok().filter(|n| !n.is_empty() && n.len() <= 256 && !n.contains('\0')).map(str::to_owned)
    };
    let (mtime_seconds, mtime_nanoseconds) = match record("mtime") {
        Some(value) => std::str::from_utf8(value).ok().and_then(from_decimal),
        None => i64::try_from(field(&old.mtime, "time")?).ok().map(|seconds| (seconds, 0)),
    }
    .ok_or_else(|| PortableError::Hostile(of(&path, "has a time that is none")))?;
    let mode = u32::try_from(field(&old.mode, "mode")? & 0o7777).unwrap_or(0);
    let target = match kind {
        EntryKind::File | EntryKind::Directory => Vec::new(),
        _ => {
            let target = record("linkpath").map(<[u8]>::to_vec).or_else(|| before.link.clone());
            target.unwrap_or_else(|| header.link_name_bytes().map(|l| l.into_owned()).unwrap_or_default())
        }
    };
    if matches!(kind, EntryKind::Symlink | EntryKind::Hardlink) {
        let most = if kind == EntryKind::Symlink { MAX_TARGET_BYTES } else { MAX_NAME_BYTES };
        if target.is_empty() || target.contains(&0) || target.len() > most {
            let text = format!("is a link whose target is empty, has a zero byte, or is longer than {most} bytes");
            return Err(PortableError::Hostile(of(&path, &text)));
        }
    }
    let xattrs = |records: &Records| -> BTreeMap<Vec<u8>, Vec<u8>> {
        let found = records.0.iter().filter_map(|(key, value)| Some((decoded(key.strip_prefix(XATTR)?), value.clone())));
        found.collect()
    };
    let all = xattrs(pax);
    if let Some((name, _)) = all.iter().find(|(name, _)| name.is_empty() || name.len() > 255 || name.contains(&0)) {
        return Err(PortableError::Hostile(of(&path, &format!("has an extended attribute {}, which no system has", shown(name)))));
    }
    let entry = EntryHeader {
        index: 0,
        path: BytesPath::from_bytes(&path),
        kind,
        mode,
        uid: id("uid", &old.uid)?,
        gid: id("gid", &old.gid)?,
        user: name("uname", header.username_bytes()),
        group: name("gname", header.groupname_bytes()),
        mtime_seconds,
        mtime_nanoseconds,
        size,
        sparse: false,
        inline: false,
        target: None,
        xattrs: all.iter().map(|(name, value)| (BytesPath::from_bytes(name), BASE64.encode(value))).collect(),
    };
    Ok((entry, path, target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_have_their_sign_once() {
        assert_eq!(decimal(5, 25), "5.000000025");
        assert_eq!(decimal(-1, 750_000_000), "-0.250000000");
        assert_eq!(decimal(-2, 0), "-2.000000000");
    }

    #[test]
    fn times_come_back() {
        for (seconds, nanoseconds) in [(0, 1), (5, 25), (-1, 750_000_000), (-2, 0), (i64::MAX, 999_999_999), (i64::MIN, 1), (i64::MIN, 0)] {
            assert_eq!(from_decimal(&decimal(seconds, nanoseconds)), Some((seconds, nanoseconds)));
        }
        assert_eq!(from_decimal("7"), Some((7, 0)));
        assert_eq!(from_decimal("7.5"), Some((7, 500_000_000)));
        assert_eq!(from_decimal("-0.0000000001"), Some((-1, 999_999_999)));
        for none in ["", "-", ".5", "1e9", "--1", "9223372036854775808", "99999999999999999999", "1.x", "+1"] {
            assert_eq!(from_decimal(none), None, "{none}");
        }
    }

    #[test]
    fn numbers_of_every_form() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(number(b"0000648\0"), None);
        assert_eq!(number(b"-000644\0"), None);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0x40, 0, 0]), Some(1 << 22));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        assert_eq!(number(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe]), Some(-2));
        assert!(number(&[0xbf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]).unwrap() > i128::from(u64::MAX));
    }

    #[test]
    fn records_come_back_whatever_their_length() {
        for len in (0..120).chain(980..1010).chain(99_980..99_999) {
            let mut records = Records::default();
            records.put("path", vec![b'\n'; len]);
            records.put("SCHILY.xattr.user.a%3Db", b"=x=\0\n".to_vec());
            assert_eq!(Records::parse(&records.to_bytes()).unwrap(), records, "{len}");
        }
    }

    #[test]
    fn records_that_are_none_are_refused() {
        for (body, text) in [
            (&b"11 path=abc"[..], "damaged"),
            (b"13 path=abc\n", "damaged"),
            (b"10 path=abc\n", "damaged"),
            (b"99999999999999999999 path=abc\n", "damaged"),
            (b"-1 path=abc\n", "damaged"),
            (b" path=abc\n", "damaged"),
            (b"8 =abcd\n", "damaged"),
            (b"7 abcd\n", "damaged"),
            (b"0 \n", "damaged"),
            (b"11 path=ab\n11 path=cd\n", "twice"),
        ] {
            let error = Records::parse(body).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn names_of_attributes_come_back() {
        for name in [&b"user.a=b"[..], b"user.%3D", b"%", b"%2", b"%25%", b"user.\xff"] {
            assert_eq!(decoded(&encoded(name)), name);
            assert!(!encoded(name).contains(&b'='));
        }
    }
}
