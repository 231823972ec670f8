//! The door for attacks: functions that are private to their rooms, and read what somebody else wrote. `fuzz/` and the tests of damage come in here; keepd itself does not.

use keepd_protocol::model::escape;

use crate::repository::open::parse_config;
use crate::repository::pack::{decode_footer, encode_footer};
pub use crate::rescue::attacked::{Seen, look_at};
use crate::source::mysql::DumpReader;
use crate::source::postgres::ArchiveReader;
use crate::storage;

/// The footer of a pack, opened; as it is written again.
pub fn footer(plain: &[u8]) -> Result<Vec<u8>, String> {
    decode_footer(plain).map(|chunks| encode_footer(&chunks)).map_err(|e| e.to_string())
}

/// `keepd.json`; as it is written again.
pub fn repository_json(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let config = parse_config("here", bytes).map_err(|e| e.to_string())?;
    serde_json::to_vec(&config).map_err(|e| e.to_string())
}

/// What a storage plugin printed, taken as an answer with an object behind it, and as a listing of `packs/`: how long the object is, and the names of the listing.
pub fn plugin(printed: &[u8]) -> (Result<usize, String>, Result<Vec<String>, String>) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_time().build() else {
        return (Err("no runtime".into()), Err("no runtime".into()));
    };
    let (object, listing) = runtime.block_on(storage::read_of_plugin(printed));
    let told = |e: opendal::Error| escape(&e.to_string());
    (object.map_err(told), listing.map(|l| l.into_iter().map(|(name, _)| name).collect()).map_err(told))
}

/// A dump of MySQL that comes in pieces of so many bytes: rows by table where it is whole and was followed.
pub fn mysql_dump(dump: &[u8], piece: usize) -> Result<Option<Vec<(String, u64)>>, String> {
    let mut reader = DumpReader::default();
    dump.chunks(piece.max(1)).for_each(|bytes| reader.feed(bytes));
    let summary = reader.finish()?;
    Ok(summary.understood.then(|| summary.tables.into_iter().map(|(name, table)| (name, table.rows)).collect()))
}

/// A custom-format archive of PostgreSQL, likewise.
pub fn postgres_archive(archive: &[u8], piece: usize) -> Result<Option<Vec<(String, u64)>>, String> {
    let mut reader = ArchiveReader::default();
    archive.chunks(piece.max(1)).try_for_each(|bytes| reader.feed(bytes))?;
    let summary = reader.finish()?;
    Ok(summary.understood.then(|| summary.tables.into_iter().map(|(name, table)| (name, table.rows)).collect()))
}
