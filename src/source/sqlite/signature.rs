//! Whether a database is as it was: what its files look like from outside.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::wal_path;

/// Inode, sizes and times of the files, the change counter of the database's header, the salts of the WAL's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    main: FileSignature,
    change_counter: u32,
    wal: Option<(FileSignature, Vec<u8>)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileSignature {
    device: u64,
    inode: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Signature {
    pub fn of(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut counter = [0u8; 4];
        file.read_exact_at(&mut counter, 24)?;
        let wal = match File::open(wal_path(path)) {
            Ok(wal) => {
                let mut header = Vec::new();
                (&wal).take(32).read_to_end(&mut header)?;
                // Opening a database makes an empty WAL where there is none; that changes nothing.
                // As root SQLite also sets its owner whenever it opens it, so its ctime says nothing; salts, size and mtime do.
                let seen = |s| (FileSignature { ctime: (0, 0), ..s }, header.clone());
                (!header.is_empty()).then(|| FileSignature::of(&wal).map(seen)).transpose()?
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(e),
        };
        Ok(Self { main: FileSignature::of(&file)?, change_counter: u32::from_be_bytes(counter), wal })
    }
}

impl FileSignature {
    fn of(file: &File) -> io::Result<Self> {
        let m = file.metadata()?;
        Ok(Self { device: m.dev(), inode: m.ino(), size: m.size(), mtime: (m.mtime(), m.mtime_nsec()), ctime: (m.ctime(), m.ctime_nsec()) })
    }
}
