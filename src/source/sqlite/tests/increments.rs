//! What is read and stored again, and what is not.

use super::super::*;
use super::*;

#[test]
fn an_unchanged_database_is_not_read() {
    for journal in ["WAL", "DELETE"] {
        let mut stage = Stage::new();
        let db = stage.open();
        db.execute_batch(&format!("PRAGMA journal_mode = {journal}")).unwrap();
        fill(&db, 2000);
        settle();
        let first = stage.capture().unwrap();
        let stored = stage.sink.stored_bytes;
        let second = stage.capture().unwrap();
        // Whether it was read shows in a page map that was not written again.
        let map = stage.cache().join(pagemap::FILE_NAME).metadata().unwrap().ino();
        let third = stage.capture().unwrap();
        assert_eq!(stage.cache().join(pagemap::FILE_NAME).metadata().unwrap().ino(), map, "{journal}");
        assert_eq!(stage.sink.stored_bytes, stored);
        assert_eq!((&second["changed_pages"], &third["changed_pages"]), (&json!(0), &json!(0)));
        assert_eq!(first["tables"], third["tables"]);
        assert_eq!(stage.sink.entries[0].content, stage.sink.entries[2].content);
        // A stricter check is done.
        stage.verify = Verify::Full;
        assert_eq!(stage.capture().unwrap()["verified"], "full");
        // One row changes: one table page, and the header in rollback mode.
        settle();
        db.execute("UPDATE item SET body = randomblob(200) WHERE id = 1000", []).unwrap();
        let fourth = stage.capture().unwrap()["changed_pages"].as_u64().unwrap();
        assert!((1..=2).contains(&fourth), "{journal}: {fourth}");
        stage.restore();
        // A change right after the capture, in the same tick perhaps, is seen.
        for _ in 0..5 {
            db.execute("UPDATE item SET body = randomblob(200) WHERE id = 1000", []).unwrap();
            assert_ne!(stage.capture().unwrap()["changed_pages"], json!(0));
        }
    }
}

#[test]
fn only_changed_pages_are_stored_whatever_happens_to_the_map() {
    let mut stage = Stage::new();
    let db = stage.open();
    db.execute_batch("PRAGMA journal_mode = WAL").unwrap();
    fill(&db, 20_000);
    stage.capture().unwrap();
    let whole = stage.sink.stored_bytes;
    let map = stage.cache().join(pagemap::FILE_NAME);
    let damages: [fn(&mut Vec<u8>); 6] = [
        |_| {},
        |bytes| bytes.clear(),
        |bytes| bytes[100] ^= 1,
        |bytes| *bytes.last_mut().unwrap() ^= 1,
        |bytes| bytes.truncate(bytes.len() / 2),
        |bytes| {
            let at = bytes.len() - 36;
            bytes[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        },
    ];
    for (i, damage) in damages.into_iter().enumerate() {
        let mut bytes = std::fs::read(&map).unwrap();
        damage(&mut bytes);
        std::fs::write(&map, bytes).unwrap();
        db.execute("UPDATE item SET body = randomblob(200) WHERE id % 2000 = ?1", [i as u32]).unwrap();
        let before = (stage.sink.stored_bytes, stage.sink.fetches);
        let changed = stage.capture().unwrap()["changed_pages"].as_u64().unwrap();
        assert!((1..=21).contains(&changed), "{i}: {changed}");
        assert!(stage.sink.stored_bytes - before.0 < whole / 20);
        assert_eq!(stage.sink.fetches > before.1, i > 0, "{i}");
        stage.restore();
    }
    // Neither map nor all chunks: whole.
    std::fs::remove_file(&map).unwrap();
    let gone = stage.sink.entries[0].content.segments.iter().find_map(|s| match s {
        Segment::Data(e) => Some(e.chunk),
        Segment::Hole(_) => None,
    });
    stage.sink.lens.remove(&gone.unwrap());
    stage.capture().unwrap();
    stage.restore();
    // A map, but a chunk is gone: what was in it is stored again, and the rest is used.
    let Segment::Data(gone) = stage.last().content.segments[0] else { panic!() };
    stage.sink.lens.remove(&gone.chunk);
    let before = stage.sink.stored_bytes;
    stage.capture().unwrap();
    assert!(stage.sink.stored_bytes - before < whole / 2);
    stage.restore();
}

#[test]
fn databases_grow_shrink_and_change_their_page_size() {
    let mut stage = Stage::new();
    let db = stage.open();
    db.execute_batch("PRAGMA auto_vacuum = NONE").unwrap();
    fill(&db, 2000);
    stage.capture().unwrap();
    let size = stage.last().size;
    fill(&db, 2000);
    stage.capture().unwrap();
    assert!(stage.last().size > size);
    stage.restore();
    db.execute_batch("DELETE FROM item WHERE id > 500; VACUUM").unwrap();
    stage.capture().unwrap();
    assert!(stage.last().size < size);
    stage.restore();
    db.execute_batch("PRAGMA page_size = 1024; VACUUM").unwrap();
    assert_eq!(stage.capture().unwrap()["page_size"], 1024);
    stage.restore();
    db.execute_batch("PRAGMA secure_delete = ON; DELETE FROM item").unwrap();
    stage.capture().unwrap();
    assert!(stage.last().content.segments.iter().any(|s| matches!(s, Segment::Hole(_))), "zeroed pages take no space");
    stage.restore();
}

#[test]
fn many_increments_do_not_scatter_a_database() {
    let mut stage = Stage::new();
    let db = stage.open();
    db.execute_batch("PRAGMA journal_mode = WAL").unwrap();
    fill(&db, 100_000);
    let mut most = 0.0f64;
    for round in 0..60 {
        db.execute("UPDATE item SET body = randomblob(200) WHERE id % 211 = ?1", [round]).unwrap();
        stage.capture().unwrap();
        let entry = stage.last();
        let chunks: HashSet<_> = entry
            .content
            .segments
            .iter()
            .filter_map(|s| match s {
                Segment::Data(e) => Some(e.chunk),
                Segment::Hole(_) => None,
            })
            .collect();
        let read: u64 = chunks.iter().map(|id| u64::from(stage.sink.lens[id])).sum();
        assert!(read <= 2 * entry.size + (8 << 20), "round {round}: {read} of {}", entry.size);
        most = most.max(read as f64 / entry.size as f64);
        if round % 10 == 9 {
            stage.restore();
        }
    }
    let size = stage.last().size;
    println!("read at most {most:.2} times the size {size}, stored {} times", stage.sink.stored_bytes / size);
    assert!(most > 1.5, "the bound was not tried");
    assert!(stage.sink.stored_bytes < 20 * size, "{} for {size}", stage.sink.stored_bytes);
}

#[test]
fn the_page_that_sqlite_leaves_out_for_locks_is_zeros() {
    let mut stage = Stage::new();
    let db = stage.open();
    db.execute_batch("PRAGMA page_size = 65536; PRAGMA journal_mode = WAL; CREATE TABLE t (a)").unwrap();
    db.close().unwrap();
    // A file above 1 GiB, most of it a hole.
    let pages = (1u32 << 14) + 3;
    let file = std::fs::File::options().read(true).write(true).open(&stage.path).unwrap();
    file.write_all_at(&pages.to_be_bytes(), 28).unwrap();
    file.set_len(u64::from(pages) << 16).unwrap();
    file.write_all_at(b"the last page", u64::from(pages - 1) << 16).unwrap();
    drop(file);
    settle();
    stage.verify = Verify::Off;
    assert_eq!(stage.capture().unwrap()["page_count"], pages);
    assert_eq!(stage.last().size, u64::from(pages) << 16);
    let segments = &stage.last().content.segments;
    assert!(matches!(segments[..], [Segment::Data(_), Segment::Hole(_), Segment::Data(_)]), "{segments:?}");
    assert_eq!(segments[1].len(), u64::from(pages - 3) << 16);
}
