//! The archive of `pg_dump --format=custom`, looked at while it goes by: is it whole, and how many rows of which table are in it?
//!
//! The format is that of PostgreSQL's `pg_backup_archiver.c` and `pg_backup_custom.c`: a header, a table of contents, and then for each entry
//! that has data a block of length-prefixed pieces, ended by a piece of no bytes. Written to a pipe there is no end mark of the whole, so that all
//! blocks that the table of contents promises must have come, the last one to its end. Only uncompressed archives can be looked into.

use std::collections::{BTreeMap, HashMap};

use crate::source::dump::Table;

const MAGIC: &[u8] = b"PGDMP";
const NO_ARCHIVE: &str = "it does not begin like an archive of pg_dump";
/// A table of contents is never longer, in bytes.
const MAX_CONTENTS: usize = 512 << 20;
/// What `COPY` writes behind the last row of a table: a line with `\.` and two empty ones.
const LINES_AFTER_ROWS: u64 = 3;

/// Archive versions that can be read: PostgreSQL 12 to 18.
const KNOWN: std::ops::RangeInclusive<(u8, u8)> = (1, 14)..=(1, 16);

/// What an archive says of itself.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct About {
    pub server_version: String,
    pub tool_version: String,
    pub database: String,
    /// How the database was created: `CREATE DATABASE … WITH …;`
    pub create: Option<String>,
    pub owner: Option<String>,
    /// What else belongs to the database as a whole: `ALTER DATABASE … SET …;`
    pub properties: Option<String>,
    /// Grants and comments on it.
    pub grants: Option<String>,
}

/// What came by.
#[derive(Debug, Default)]
pub struct Summary {
    pub about: About,
    /// By `schema.table`.
    pub tables: BTreeMap<String, Table>,
    /// Of large objects.
    pub large_objects: u64,
    /// False: an archive of a later version, of which nothing is known but its first bytes.
    pub understood: bool,
}

/// Looks at an archive as it goes by.
pub struct ArchiveReader {
    state: State,
    /// Bytes of the head, or of a number that is cut off at the end of what came.
    held: Vec<u8>,
    /// Not before so many are held is the head tried again.
    try_at: usize,
    head: Head,
    summary: Summary,
    blocks: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Head,
    /// Between two blocks.
    Block,
    /// The number of the entry that a block belongs to.
    BlockId {
        blobs: bool,
    },
    /// The number of a large object; 0 ends the block.
    BlobId,
    PieceLen,
    Piece {
        left: u64,
    },
    /// Of an archive that is not understood.
    Anything,
}

#[derive(Debug, Default)]
struct Head {
    int_bytes: usize,
    offset_bytes: usize,
    version: (u8, u8),
    /// Entries that have data: number to table.
    promised: HashMap<i64, Option<String>>,
    /// The table that is going by, and whether it is a large object.
    table: Option<String>,
    blobs: bool,
    lines: u64,
    bytes: u64,
}

/// The head is cut off, or it is none.
enum Trouble {
    Short,
    Wrong(String),
}

impl Default for ArchiveReader {
    fn default() -> Self {
        Self { state: State::Head, held: Vec::new(), try_at: 64, head: Head::default(), summary: Summary::default(), blocks: 0 }
    }
}

impl ArchiveReader {
    /// The next bytes. The error says what is wrong with the archive.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), String> {
        let joined;
        let mut rest = bytes;
        if self.state == State::Head {
            self.held.extend_from_slice(bytes);
            if self.held.len() < self.try_at {
                return Ok(());
            }
            match self.read_head() {
                Ok(used) => {
                    joined = std::mem::take(&mut self.held).split_off(used);
                    rest = &joined;
                }
                Err(Trouble::Short) if self.held.len() > MAX_CONTENTS => return Err("its table of contents does not end".into()),
                Err(Trouble::Short) => {
                    self.try_at = self.held.len() * 2;
                    return Ok(());
                }
                Err(Trouble::Wrong(text)) => return Err(text),
            }
        } else if !self.held.is_empty() {
            self.held.extend_from_slice(bytes);
            joined = std::mem::take(&mut self.held);
            rest = &joined;
        }
        self.go_through(rest)
    }

    fn go_through(&mut self, mut rest: &[u8]) -> Result<(), String> {
        let int = self.head.int_bytes + 1;
        loop {
            match self.state {
                State::Head | State::Anything => return Ok(()),
                State::Piece { left } => {
                    let here = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                    let (piece, after) = rest.split_at(here);
                    self.head.lines += memchr::memchr_iter(b'\n', piece).count() as u64;
                    self.head.bytes += here as u64;
                    rest = after;
                    if (here as u64) < left {
                        self.state = State::Piece { left: left - here as u64 };
                        return Ok(());
                    }
                    self.state = State::PieceLen;
                }
                State::Block => {
                    let Some((kind, after)) = rest.split_first() else { return Ok(()) };
                    rest = after;
                    self.state = match kind {
                        1 => State::BlockId { blobs: false },
                        3 => State::BlockId { blobs: true },
                        other => return Err(format!("a block of the unknown kind {other}")),
                    };
                }
                State::PieceLen => {
                    let Some(number) = rest.get(..int) else { break };
                    rest = rest.get(int..).unwrap_or_default();
                    match signed(number) {
                        0 if self.head.blobs => {
                            self.summary.large_objects += 1;
                            self.state = State::BlobId;
                        }
                        0 => self.end_block(),
                        len => match u64::try_from(len) {
                            Ok(left) => self.state = State::Piece { left },
                            Err(_) => return Err("a piece of a negative length".into()),
                        },
                    }
                }
                State::BlockId { blobs } => {
                    let Some(number) = rest.get(..int) else { break };
                    rest = rest.get(int..).unwrap_or_default();
                    let id = signed(number);
                    let Some(table) = self.head.promised.remove(&id) else {
                        return Err(format!("data of entry {id}, which the table of contents does not promise"));
                    };
                    (self.head.table, self.head.blobs, self.head.lines, self.head.bytes) = (table, blobs, 0, 0);
                    self.state = if blobs { State::BlobId } else { State::PieceLen };
                }
                State::BlobId => {
                    let Some(number) = rest.get(..int) else { break };
                    rest = rest.get(int..).unwrap_or_default();
                    match signed(number) {
                        0 => self.end_block(),
                        _ => self.state = State::PieceLen,
                    }
                }
            }
        }
        self.held.extend_from_slice(rest);
        Ok(())
    }

    fn end_block(&mut self) {
        self.blocks += 1;
        self.state = State::Block;
        if let Some(name) = self.head.table.take() {
            let table = self.summary.tables.entry(name).or_default();
            table.rows += self.head.lines.saturating_sub(LINES_AFTER_ROWS);
            table.bytes += self.head.bytes;
        }
    }

    /// What went by. The error says why it is no whole archive.
    pub fn finish(mut self) -> Result<Summary, String> {
        // It was not tried with the last of what came.
        if self.state == State::Head && !self.held.is_empty() {
            match self.read_head() {
                Ok(used) => {
                    let rest = std::mem::take(&mut self.held).split_off(used);
                    self.go_through(&rest)?;
                }
                Err(Trouble::Wrong(text)) => return Err(text),
                Err(Trouble::Short) => {}
            }
        }
        match self.state {
            State::Anything => return Ok(self.summary),
            State::Head => {
                let begins = self.held.get(..MAGIC.len()).is_some_and(|b| b == MAGIC);
                return Err(match (self.held.is_empty(), begins) {
                    (true, _) => "it is empty".into(),
                    (false, false) => NO_ARCHIVE.into(),
                    (false, true) => "it ends within its table of contents".into(),
                });
            }
            State::Block if self.held.is_empty() && self.head.promised.is_empty() => return Ok(self.summary),
            _ => {}
        }
        let mut missing: Vec<&str> = self.head.promised.values().flatten().map(String::as_str).collect();
        missing.extend(self.head.table.as_deref());
        missing.sort_unstable();
        let named = missing.iter().take(10).copied().collect::<Vec<_>>().join(", ");
        Err(format!("it is cut off: {} of {} tables are whole; missing: {named}", self.blocks, self.blocks as usize + missing.len().max(1)))
    }

    /// Reads header and table of contents; how many of the held bytes they take.
    fn read_head(&mut self) -> Result<usize, Trouble> {
        let mut c = Cursor { bytes: &self.held, at: 0, int_bytes: 4 };
        let mut head = Head::default();
        let mut about = About::default();
        if c.take(MAGIC.len())? != MAGIC {
            return Err(Trouble::Wrong(NO_ARCHIVE.into()));
        }
        let fixed = c.take(6)?;
        let [major, minor, _revision, int_bytes, offset_bytes, format] = <[u8; 6]>::try_from(fixed).unwrap_or_default();
        head.version = (major, minor);
        head.int_bytes = usize::from(int_bytes);
        head.offset_bytes = usize::from(offset_bytes);
        if format != 1 {
            return Err(Trouble::Wrong(format!("it is an archive of format {format}, not of the custom format")));
        }
        if !KNOWN.contains(&head.version) || head.int_bytes == 0 || head.int_bytes > 8 {
            self.state = State::Anything;
            return Ok(self.held.len());
        }
        c.int_bytes = head.int_bytes;
        let compressed = if minor >= 15 { i64::from(c.byte()?) } else { c.int()? };
        if compressed != 0 {
            return Err(Trouble::Wrong("it is compressed, which it should not be".into()));
        }
        for _ in 0..7 {
            c.int()?; // when it was made: second to year, and whether in summer
        }
        about.database = c.text()?.unwrap_or_default();
        about.server_version = c.text()?.unwrap_or_default();
        about.tool_version = c.text()?.unwrap_or_default();
        let entries = c.int()?;
        let mut tables = BTreeMap::new();
        for _ in 0..entries {
            let id = c.int()?;
            let has_data = c.int()? != 0;
            c.text()?; // oids of the catalogue's table and of the object
            c.text()?;
            let tag = c.text()?.unwrap_or_default();
            let what = c.text()?.unwrap_or_default();
            c.int()?; // section
            let definition = c.text()?;
            c.text()?; // how it is dropped, and copied
            c.text()?;
            let namespace = c.text()?.unwrap_or_default();
            c.text()?; // tablespace
            c.text()?; // access method
            if minor >= 16 {
                c.int()?; // kind of relation
            }
            let owner = c.text()?;
            c.text()?; // with oids
            while c.text()?.is_some() {} // what it depends on
            c.take(1 + head.offset_bytes)?; // where its data is: not known in a pipe
            match what.as_str() {
                "DATABASE" => (about.create, about.owner) = (definition, owner.filter(|o| !o.is_empty())),
                "DATABASE PROPERTIES" => about.properties = definition,
                "ACL" | "COMMENT" | "SECURITY LABEL" if tag.starts_with("DATABASE ") => {
                    about.grants.get_or_insert_default().push_str(definition.as_deref().unwrap_or_default());
                }
                _ => {}
            }
            if has_data {
                let table = (what == "TABLE DATA").then(|| format!("{namespace}.{tag}"));
                if let Some(name) = &table {
                    tables.insert(name.clone(), Table::default());
                }
                head.promised.insert(id, table);
            }
        }
        let used = c.at;
        self.summary = Summary { about, tables, understood: true, large_objects: 0 };
        (self.head, self.state) = (head, State::Block);
        Ok(used)
    }
}

/// A sign and the bytes of a number, the lowest first.
fn signed(bytes: &[u8]) -> i64 {
    let Some((sign, digits)) = bytes.split_first() else { return 0 };
    let number = digits.iter().rev().fold(0i64, |n, b| (n << 8) | i64::from(*b));
    if *sign == 0 { number } else { number.wrapping_neg() }
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    int_bytes: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Trouble> {
        let end = self.at.checked_add(len).ok_or_else(|| Trouble::Wrong("it holds an impossible length".into()))?;
        let taken = self.bytes.get(self.at..end).ok_or(Trouble::Short)?;
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, Trouble> {
        Ok(self.take(1)?.first().copied().unwrap_or_default())
    }

    fn int(&mut self) -> Result<i64, Trouble> {
        Ok(signed(self.take(self.int_bytes + 1)?))
    }

    /// None: there is no text, which is something else than an empty one.
    fn text(&mut self) -> Result<Option<String>, Trouble> {
        let len = self.int()?;
        if len < 0 {
            return Ok(None);
        }
        let len = usize::try_from(len).ok().filter(|l| *l <= MAX_CONTENTS);
        let bytes = self.take(len.ok_or_else(|| Trouble::Wrong("it holds an impossible length".into()))?)?;
        Ok(Some(String::from_utf8_lossy(bytes).into_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `pg_dump` of these versions wrote of one and the same database.
    const REAL: [(&str, &[u8]); 3] = [
        ("15", include_bytes!("../../../tests/postgres/15.dump")),
        ("16", include_bytes!("../../../tests/postgres/16.dump")),
        ("18", include_bytes!("../../../tests/postgres/18.dump")),
    ];

    fn read(archive: &[u8], piece: usize) -> Result<Summary, String> {
        let mut reader = ArchiveReader::default();
        archive.chunks(piece.max(1)).try_for_each(|bytes| reader.feed(bytes))?;
        reader.finish()
    }

    #[test]
    fn real_archives_are_understood_however_they_come() {
        for (version, archive) in REAL {
            for piece in [1, 2, 7, 64, 1000, archive.len()] {
                let summary = read(archive, piece).unwrap_or_else(|e| panic!("{version}, {piece}: {e}"));
                let rows: Vec<(&str, u64)> = summary.tables.iter().map(|(name, t)| (name.as_str(), t.rows)).collect();
                assert_eq!(rows, [("public.Odd.Name", 2), ("public.part1", 2), ("public.users", 250), ("s2.empty", 0)], "{version}");
                assert_eq!((summary.large_objects, summary.understood), (2, true));
                let about = summary.about;
                assert!(about.server_version.starts_with(version) && about.tool_version.starts_with(version));
                assert_eq!((about.database.as_str(), about.owner.as_deref()), ("shop", Some("postgres")));
                assert!(about.create.unwrap().starts_with("CREATE DATABASE shop WITH TEMPLATE = template0"));
                assert!(about.properties.unwrap().contains("SET work_mem TO '7MB'"));
            }
        }
    }

    #[test]
    fn no_part_of_an_archive_passes_for_a_whole_one() {
        for (version, archive) in REAL {
            for len in 0..archive.len() {
                let told = read(&archive[..len], 4096).expect_err("cut off");
                assert!(!told.is_empty(), "{version}, {len}");
            }
            let mut longer = archive.to_vec();
            longer.push(1);
            assert!(read(&longer, 4096).is_err(), "{version}: something behind its end");
        }
    }

    #[test]
    fn no_archive_makes_it_panic() {
        for (_, archive) in REAL {
            for at in 0..archive.len().min(6000) {
                for bit in [1, 0x80] {
                    let mut other = archive.to_vec();
                    other[at] ^= bit;
                    let _ = read(&other, 997);
                }
            }
        }
        let mut later = REAL[2].1.to_vec();
        later[6] = 99;
        assert_eq!(read(&later, 100).map(|s| s.understood), Ok(false), "a later version is only passed on");
        let mut compressed = REAL[1].1.to_vec();
        compressed[11] = 3;
        assert!(read(&compressed, 100).unwrap_err().contains("compressed"));
    }
}
