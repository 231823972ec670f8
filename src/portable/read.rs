//! Reading an archive, by whomever it was made: what it says is checked before it is believed.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use data_encoding::HEXLOWER;
use keepd_protocol::model::{BytesPath, EntryKind};
use keepd_protocol::restore::EntryHeader;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::bounds;
use super::file_list::{Line, shown};
use super::head::{Contents, HEAD_NAME, TAIL_NAME, Totals};
use super::listing;
use super::member::{self, BLOCK, Before, Block, Records, padding};
use super::order::Order;
use super::seal::Keys;
use super::unpack::{Frame, Unpacked};
use super::{FileList, FileListWriter, Head, PortableError, Result, Tail};
use crate::crypto::{PrivateKey, ProfileKey};

/// How much is read at most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all contents and headers, decompressed. None: 1 GiB and 250 times the bytes of the archive as they are read.
    pub bytes: Option<u64>,
    pub entries: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: None, entries: 20_000_000 }
    }
}

/// How it is opened.
pub struct OpenWith<'a> {
    /// Tried one after the other where it is sealed.
    pub keys: &'a [ProfileKey],
    /// The same where it is sealed to a public key.
    pub private_keys: &'a [Arc<PrivateKey>],
    pub limits: Limits,
    /// Where unnamed files may lie.
    pub work_dir: &'a Path,
    pub cancel: CancellationToken,
    /// A tar that keepd did not make is taken as this source; None: it is refused.
    pub foreign_source: Option<String>,
}

/// Gives the entries of an archive one after the other.
///
/// Of an archive that keepd made: in path order within each source, sources in the order of the head, each directory before what is in it, each path once, the target of a hard
/// link before it, names of the head's sources only, contents as listed. Of another: in the order of the tar, `./` and slashes at the end taken off; among its first
/// million entries each path once and nothing below a file or link: whoever puts them in order sees it of the rest. Directories may be missing there.
/// Absolute paths, `..`, devices, fifos, links that lead out of the source (hard ones; symlinks are never followed, so they may say what they like) are refused either way.
/// Set-user-id and set-group-id bits are kept in the header as they are: it is whoever restores that decides.
pub struct ArchiveReader {
    tar: Unpacked,
    kind: Kind,
    /// Of a tar that keepd did not make, when it was opened.
    first: Option<Named>,
    global: Records,
    open: Option<Open>,
    /// So many zeros follow before the next header.
    padding: u64,
    entries: u64,
    most_entries: u64,
    /// The tail, when it came; then nothing may follow.
    tail: Option<Tail>,
    ended: bool,
}

enum Kind {
    Ours { head: Box<Head>, order: Order, files: Files },
    Foreign { seen: Seen, totals: Totals },
}

enum Files {
    /// What must come.
    First(FileList),
    /// What came.
    Last(FileListWriter),
}

/// A member whose contents come.
struct Open {
    name: Vec<u8>,
    /// Read already, and to be given first.
    front: Vec<u8>,
    size: u64,
    left: u64,
    hash: Sha256,
    /// What the list says, where it stands first.
    wanted: Option<[u8; 32]>,
}

/// Of a manifest.json that may be keepd's so much is looked at.
const SNIFF_BYTES: u64 = 64 << 10;
/// Headers before one member: a pax header, and names of GNU tar.
const MAX_BEFORE: usize = 8;

impl ArchiveReader {
    /// Reads as far as its head. Finds out by itself whether it is sealed and how it is compressed.
    pub fn open<R: Read + Send + 'static>(input: R, with: &OpenWith<'_>) -> Result<Self> {
        let keys = Keys { keys: with.keys.to_vec(), private: with.private_keys.to_vec(), cancel: with.cancel.clone() };
        let tar = Unpacked::start(input, keys, with.limits.bytes, with.cancel.clone())?;
        let foreign = Kind::Foreign { seen: Seen::new(with.foreign_source.clone().unwrap_or_default()), totals: Totals::default() };
        let mut reader = Self {
            tar,
            kind: foreign,
            first: None,
            global: Records::default(),
            open: None,
            padding: 0,
            entries: 0,
            most_entries: with.limits.entries,
            tail: None,
            ended: false,
        };
        let first = reader.member()?;
        if let Some((header, name, _)) = &first
            && header.kind == EntryKind::File
            && name == HEAD_NAME.as_bytes()
            && let Some(format) = reader.sniff()?
        {
            if format != 1 {
                return Err(PortableError::Version(format!(
                    "the archive is of format {format}, this version of keepd knows 1; use a newer keepd"
                )));
            }
            reader.read_head(with.work_dir)?;
            return Ok(reader);
        }
        if with.foreign_source.is_none() {
            let text = "the archive was not made by keepd: it does not begin with a manifest.json of a backup; say which source it is to be taken as";
            return Err(PortableError::Version(text.into()));
        }
        reader.first = first;
        Ok(reader)
    }

    /// The format of keepd that the member that is open is the head of; None: it is none.
    fn sniff(&mut self) -> Result<Option<u64>> {
        let Some(open) = &mut self.open else { return Ok(None) };
        let mut start = vec![0; open.left.min(SNIFF_BYTES) as usize];
        if !self.tar.read_exact(&mut start)? && !start.is_empty() {
            return Err(cut_off());
        }
        let format = listing::format_of(&start);
        open.front = start;
        Ok(format)
    }

    fn read_head(&mut self, work_dir: &Path) -> Result<()> {
        self.check_listing_size(HEAD_NAME)?;
        let mut files = FileListWriter::create(work_dir)?;
        let (head, listed): (Head, bool) = listing::read(OpenContents(self), HEAD_NAME, &mut files)?;
        self.open = None;
        let damaged = |text: String| Err(PortableError::Damaged(format!("manifest.json of the archive is damaged: {text}")));
        if head.archive.len() != 32 || HEXLOWER.decode(head.archive.as_bytes()).is_err() {
            return damaged("the name of the archive is not 32 hexadecimal digits".into());
        }
        if self.tar.archive().is_some_and(|id| HEXLOWER.encode(&id) != head.archive) {
            return Err(PortableError::Hostile("manifest.json is of another archive than it was sealed as".into()));
        }
        let order = Order::of(&head)?;
        bounds::check_head(&head)?;
        let files = match (head.contents, listed) {
            (Contents::First, true) => Files::First(files.finish()?),
            (Contents::Last, false) => Files::Last(files),
            (Contents::First, false) => return damaged("it has no list of files".into()),
            (Contents::Last, true) => return damaged("it has a list of files, and says that it stands last".into()),
        };
        self.kind = Kind::Ours { head: Box::new(head), order, files };
        Ok(())
    }

    fn check_listing_size(&self, name: &str) -> Result<()> {
        match &self.open {
            Some(open) if open.size > listing::MAX_LISTING_BYTES => Err(PortableError::TooMuch(format!(
                "{name} of the archive has {} bytes; {} are the most",
                open.size,
                listing::MAX_LISTING_BYTES
            ))),
            _ => Ok(()),
        }
    }

    /// None: a tar that keepd did not make.
    pub fn head(&self) -> Option<&Head> {
        match &self.kind {
            Kind::Ours { head, .. } => Some(head),
            Kind::Foreign { .. } => None,
        }
    }

    /// The next entry; what was not read of the one before is read past (and proven, too).
    pub fn next_entry(&mut self) -> Result<Option<EntryHeader>> {
        if let Some(first) = self.first.take() {
            return self.take(first);
        }
        self.skip()?;
        match self.member()? {
            Some(member) => self.take(member),
            None => Ok(None),
        }
    }

    fn take(&mut self, (mut header, mut name, mut target): Named) -> Result<Option<EntryHeader>> {
        let is_tail = matches!(&self.kind, Kind::Ours { files: Files::Last(_), .. })
            && name == TAIL_NAME.as_bytes()
            && header.kind == EntryKind::File;
        if is_tail {
            self.read_tail()?;
            return match self.member()? {
                None => Ok(None),
                Some((_, name, _)) => {
                    Err(PortableError::Hostile(format!("{} in the archive follows {TAIL_NAME}, which is its last", shown(&name))))
                }
            };
        }
        header.index = self.entries;
        self.entries += 1;
        if self.entries > self.most_entries {
            let text = format!("the archive has more than {} entries; allow more if that is what it should hold", self.most_entries);
            return Err(PortableError::TooMuch(text));
        }
        match &mut self.kind {
            Kind::Ours { order, files, .. } => {
                if header.kind == EntryKind::Hardlink || header.kind == EntryKind::Symlink {
                    header.target = Some(BytesPath::from_bytes(&target));
                }
                order.next(&header, &name, &target)?;
                if header.kind == EntryKind::Hardlink {
                    let came = match (order.near(&target), &mut *files) {
                        (None, _) => false,
                        (Some(from), Files::First(files)) => files.finds(&target, from)?,
                        (Some(from), Files::Last(files)) => files.finds(&target, from)?,
                    };
                    if !came {
                        let text = format!(
                            "{} in the archive is a hard link to {}, which is no file that stands before it",
                            shown(&name),
                            shown(&target)
                        );
                        return Err(PortableError::Hostile(text));
                    }
                }
                if header.kind == EntryKind::File {
                    order.mark(
                        &name,
                        match files {
                            Files::First(files) => files.offset(),
                            Files::Last(files) => files.offset(),
                        },
                    );
                }
                if let (EntryKind::File, Files::First(files)) = (header.kind, files) {
                    let listed = files.next()?;
                    if listed.as_ref().is_none_or(|line| line.name != name || line.size != header.size) {
                        return Err(PortableError::Damaged(format!(
                            "{} in the archive is not what its list of files has at this place",
                            shown(&name)
                        )));
                    }
                    if let (Some(open), Some(line)) = (&mut self.open, listed) {
                        open.wanted = Some(line.sha256);
                    }
                }
            }
            Kind::Foreign { seen, totals } => {
                seen.take(&mut header, &mut name, &mut target)?;
                totals.count(&header);
            }
        }
        if let Some(open) = &mut self.open {
            open.name = name;
        }
        Ok(Some(header))
    }

    fn read_tail(&mut self) -> Result<()> {
        self.check_listing_size(TAIL_NAME)?;
        let empty = Kind::Foreign { seen: Seen::new(String::new()), totals: Totals::default() };
        let (tail, order, head, mut files): (Tail, _, _, _) = match std::mem::replace(&mut self.kind, empty) {
            Kind::Ours { head, order, files: Files::Last(files) } => {
                let mut files = files.finish()?;
                let (tail, listed): (Tail, bool) = listing::read(OpenContents(self), TAIL_NAME, &mut files)?;
                bounds::check_tail(&tail)?;
                if !listed {
                    return Err(PortableError::Damaged(format!("{TAIL_NAME} of the archive is damaged: it has no list of files")));
                }
                (tail, order, head, files)
            }
            kind => {
                self.kind = kind;
                return Ok(());
            }
        };
        self.open = None;
        if tail.archive != head.archive {
            return Err(PortableError::Hostile(format!("{TAIL_NAME} is of another archive than manifest.json")));
        }
        if let Some(line) = files.next()? {
            return Err(PortableError::Damaged(format!("{} is in the archive, and not in the list at its end", shown(&line.name))));
        }
        order.check(&tail.sources, Some(&tail.totals), TAIL_NAME)?;
        self.kind = Kind::Ours { head, order, files: Files::First(files) };
        self.tail = Some(tail);
        Ok(())
    }

    /// The next bytes of the file that came last; 0 at its end, when it was proven to be what the list says (if that stands first).
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let n = self.contents(buffer)?;
        if n == 0 && !buffer.is_empty() {
            self.prove()?;
        }
        Ok(n)
    }

    fn contents(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let Some(open) = self.open.as_mut().filter(|open| open.left > 0) else { return Ok(0) };
        let most = buffer.len().min(usize::try_from(open.left).unwrap_or(usize::MAX));
        let into = buffer.get_mut(..most).unwrap_or_default();
        let n = if open.front.is_empty() {
            self.tar.read(into)?
        } else {
            let n = open.front.len().min(most);
            if let Some(to) = into.get_mut(..n) {
                to.copy_from_slice(open.front.get(..n).unwrap_or_default());
            }
            open.front.drain(..n);
            n
        };
        if n == 0 && most > 0 {
            return Err(PortableError::Damaged(format!("the archive is cut off within {}", shown(&open.name))));
        }
        open.hash.update(into.get(..n).unwrap_or_default());
        open.left -= n as u64;
        Ok(n)
    }

    /// The next bytes of the file that came last, where they are a whole zstd frame of the archive: what it unpacks to, and the frame. None: read on with [`Self::read`].
    pub fn frame(&mut self) -> Result<Option<Frame>> {
        let Some(open) = self.open.as_mut().filter(|open| open.left > 0 && open.front.is_empty()) else { return Ok(None) };
        let came = self.tar.frame(open.left)?;
        if let Some((contents, _)) = &came {
            open.hash.update(contents);
            open.left -= contents.len() as u64;
        }
        Ok(came)
    }

    /// Takes memory back that [`Self::frame`] gave.
    pub fn recycle(&self, contents: Vec<u8>) {
        self.tar.recycle(contents);
    }

    /// Of a file that came whole.
    fn prove(&mut self) -> Result<()> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let line = Line { name: open.name, size: open.size, sha256: open.hash.finalize().into() };
        if open.wanted.is_some_and(|wanted| wanted != line.sha256) {
            return Err(PortableError::Damaged(format!(
                "{} in the archive is damaged: its contents are not those that were archived (SHA-256)",
                shown(&line.name)
            )));
        }
        match &mut self.kind {
            Kind::Ours { files: Files::Last(files), .. } => files.push_line(&line),
            _ => Ok(()),
        }
    }

    /// Reads past what was not read of a member.
    fn skip(&mut self) -> Result<()> {
        if self.open.is_some() {
            let mut buffer = vec![0; 64 << 10];
            while self.read(&mut buffer)? > 0 {}
        }
        Ok(())
    }

    /// Bytes read of the archive as it lies there, for progress.
    pub fn position(&self) -> u64 {
        self.tar.position()
    }

    /// After the last entry: proves that all came that the archive lists and nothing else, to its very end. The tail, where there is one.
    pub fn finish(mut self) -> Result<(Totals, Option<Tail>)> {
        while self.next_entry()?.is_some() {}
        match self.kind {
            Kind::Foreign { totals, .. } => Ok((totals, None)),
            Kind::Ours { head, order, files } => {
                match (files, &self.tail) {
                    (Files::First(mut files), None) => {
                        if let Some(line) = files.next()? {
                            return Err(PortableError::Damaged(format!(
                                "{} is in the archive's list of files, and not in the archive",
                                shown(&line.name)
                            )));
                        }
                        order.check(&head.sources, head.totals.as_ref(), HEAD_NAME)?;
                    }
                    (Files::First(_), Some(_)) => {}
                    (Files::Last(_), _) => {
                        return Err(PortableError::Damaged(format!("the archive is not whole: it ends without {TAIL_NAME}")));
                    }
                }
                Ok((order.totals(), self.tail))
            }
        }
    }

    /// The next member; None at the end, which was read to the very last byte.
    fn member(&mut self) -> Result<Option<Named>> {
        if self.ended {
            return Ok(None);
        }
        let mut before = Before::default();
        let mut headers = 0;
        loop {
            let mut block = [0; BLOCK];
            self.pad()?;
            if !self.tar.read_exact(&mut block)? {
                return Err(cut_off());
            }
            headers += 1;
            if headers > MAX_BEFORE {
                return Err(PortableError::Hostile(format!("the archive has more than {MAX_BEFORE} headers before one member")));
            }
            match member::block(&block)? {
                Block::Zeros if headers > 1 && (before.pax.is_some() || before.name.is_some() || before.link.is_some()) => {
                    return Err(PortableError::Damaged("the archive ends after a header that describes another member".into()));
                }
                Block::Zeros => {
                    self.end()?;
                    return Ok(None);
                }
                Block::Pax(size) => {
                    let records = Records::parse(&self.whole(size)?)?;
                    if before.pax.replace(records).is_some() {
                        return Err(PortableError::Hostile("the archive has two pax headers before one member".into()));
                    }
                }
                Block::GlobalPax(size) => {
                    let records = Records::parse(&self.whole(size)?)?;
                    records.check_global()?;
                    self.global = records;
                }
                Block::LongName(size) => {
                    let name = self.long(size)?;
                    if before.name.replace(name).is_some() {
                        return Err(PortableError::Hostile("the archive has two long names before one member".into()));
                    }
                }
                Block::LongLink(size) => {
                    let name = self.long(size)?;
                    if before.link.replace(name).is_some() {
                        return Err(PortableError::Hostile("the archive has two long names before one member".into()));
                    }
                }
                Block::Member(header) => {
                    let named = member::entry(&header, &before, &self.global)?;
                    let (header, name, _) = &named;
                    if header.kind == EntryKind::File {
                        let open = Open {
                            name: name.clone(),
                            front: Vec::new(),
                            size: header.size,
                            left: header.size,
                            hash: Sha256::new(),
                            wanted: None,
                        };
                        self.open = Some(open);
                        self.padding = padding(header.size);
                    }
                    return Ok(Some(named));
                }
            }
        }
    }

    /// Whatever fills up the last block of contents; only zeros do.
    fn pad(&mut self) -> Result<()> {
        let mut block = [0; BLOCK];
        let rest = block.get_mut(..std::mem::take(&mut self.padding) as usize).unwrap_or_default();
        if !rest.is_empty() && !self.tar.read_exact(rest)? {
            return Err(cut_off());
        }
        Ok(())
    }

    fn whole(&mut self, size: u64) -> Result<Vec<u8>> {
        let mut body = vec![0; size.min(member::MAX_PAX_BYTES) as usize];
        if !body.is_empty() && !self.tar.read_exact(&mut body)? {
            return Err(cut_off());
        }
        self.padding = padding(size);
        Ok(body)
    }

    /// A name as GNU tar has it, with a zero byte at its end.
    fn long(&mut self, size: u64) -> Result<Vec<u8>> {
        let mut name = self.whole(size)?;
        while name.pop_if(|b| *b == 0).is_some() {}
        Ok(name)
    }

    /// A block of zeros came: another follows, and then at most zeros.
    fn end(&mut self) -> Result<()> {
        let mut block = vec![0; BLOCK];
        if !self.tar.read_exact(&mut block)? {
            return Err(PortableError::Damaged("the archive is cut off: its end is not whole".into()));
        }
        let mut rest = vec![0; 64 << 10];
        let mut n = BLOCK;
        while n > 0 {
            if block.iter().take(n).any(|b| *b != 0) {
                return Err(PortableError::Damaged("something follows the end of the archive".into()));
            }
            block = std::mem::take(&mut rest);
            n = self.tar.read(&mut block)?;
            rest = vec![0; 64 << 10];
        }
        self.ended = true;
        Ok(())
    }
}

/// An entry, its path and its target as bytes.
type Named = (EntryHeader, Vec<u8>, Vec<u8>);

fn cut_off() -> PortableError {
    PortableError::Damaged("the archive is cut off: it has no end".into())
}

/// The contents of the member that is open, as a reader of std.
struct OpenContents<'a>(&'a mut ArchiveReader);

impl Read for OpenContents<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.contents(into).map_err(io::Error::other)
    }
}

/// The paths of a tar that keepd did not make.
struct Seen {
    source: String,
    /// What stands at a path, by a hash that nobody can foresee.
    paths: HashMap<u64, At>,
    hash: RandomState,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    /// It has something below it, and did not come itself yet.
    Implied,
    Directory,
    File,
    Link,
}

impl Seen {
    /// Of so many paths it is known what they are.
    const MOST: usize = 1_000_000;

    fn new(source: String) -> Self {
        Self { source, paths: HashMap::new(), hash: RandomState::new() }
    }

    /// Puts an entry below the source, and looks whether it can stand there.
    fn take(&mut self, header: &mut EntryHeader, name: &mut Vec<u8>, target: &mut Vec<u8>) -> Result<()> {
        let plain = plain(name).map_err(|why| PortableError::Hostile(format!("{} in the archive {why}", shown(name))))?;
        let wrong = |why: String| Err(PortableError::Hostile(format!("{} in the archive {why}", shown(&plain))));
        if plain.is_empty() && header.kind != EntryKind::Directory {
            return wrong("would stand at the place of the source itself, and is no directory".into());
        }
        for (at, _) in plain.iter().enumerate().filter(|(_, b)| **b == b'/') {
            let parent = self.hash.hash_one(plain.get(..at).unwrap_or_default());
            match self.paths.get(&parent) {
                Some(At::File | At::Link) => return wrong("is below something that is no directory".into()),
                Some(_) => {}
                None if self.paths.len() < Self::MOST => drop(self.paths.insert(parent, At::Implied)),
                None => {}
            }
        }
        let key = self.hash.hash_one(plain.as_slice());
        let kind = match header.kind {
            EntryKind::Directory => At::Directory,
            EntryKind::File => At::File,
            EntryKind::Symlink | EntryKind::Hardlink => At::Link,
        };
        match self.paths.get(&key) {
            Some(At::Implied) if kind == At::Directory => {}
            Some(At::Implied) => return wrong("has something below it, and is no directory".into()),
            Some(_) => return wrong("is there twice".into()),
            None => {}
        }
        if self.paths.len() < Self::MOST {
            self.paths.insert(key, kind);
        }
        let below = |path: &[u8]| match path {
            [] => self.source.clone().into_bytes(),
            path => [self.source.as_bytes(), b"/", path].concat(),
        };
        if header.kind == EntryKind::Hardlink {
            let of = self::plain(target).map_err(|why| {
                PortableError::Hostile(format!("{} in the archive is a hard link to {}, which {why}", shown(&plain), shown(target)))
            })?;
            match self.paths.get(&self.hash.hash_one(of.as_slice())) {
                Some(At::File) => {}
                Some(At::Link) if of != plain => {}
                None if self.paths.len() >= Self::MOST => {}
                _ => return wrong(format!("is a hard link to {}, which is no file that stands before it", shown(target))),
            }
            *target = below(&of);
        }
        *name = below(&plain);
        header.path = BytesPath::from_bytes(name);
        if matches!(header.kind, EntryKind::Hardlink | EntryKind::Symlink) {
            header.target = Some(BytesPath::from_bytes(target));
        }
        Ok(())
    }
}

/// Names of a path of a tar that keepd did not make: each may stand for a directory that nothing else says anything of.
const MAX_DEPTH: usize = 1000;
const MAX_PATH_BYTES: usize = 4096;

/// A path of a tar as names with single slashes between them; `.` and its like is empty.
fn plain(path: &[u8]) -> std::result::Result<Vec<u8>, &'static str> {
    if path.starts_with(b"/") {
        return Err("has an absolute path; make the archive again without -P");
    }
    let mut names: Vec<&[u8]> = Vec::new();
    for name in path.split(|b| *b == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err("leads out of the archive ('..')"),
            name => names.push(name),
        }
        if names.len() > MAX_DEPTH {
            return Err("is more than 1,000 directories deep");
        }
    }
    let plain = names.join(&b'/');
    match plain.len() > MAX_PATH_BYTES {
        true => Err("has a path of more than 4,096 bytes"),
        false => Ok(plain),
    }
}
