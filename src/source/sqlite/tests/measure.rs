//! Times and memory, by hand.

use super::super::*;
use super::*;

/// Times on a large database: `KEEPD_MEASURE=/path/to.db cargo test sqlite::tests::measure -- --ignored --nocapture`.
#[test]
#[ignore = "takes a large database"]
fn measure() {
    let mut stage = Stage::new();
    std::fs::copy(std::env::var_os("KEEPD_MEASURE").unwrap(), &stage.path).unwrap();
    stage.sink.forget = true;
    stage.tuning = Tuning::default();
    let peak = || std::fs::read_to_string("/proc/self/status").unwrap().lines().find(|l| l.starts_with("VmHWM")).unwrap().to_owned();
    settle();
    let time = |stage: &mut Stage, what: &str| {
        let (start, stored) = (Instant::now(), stage.sink.stored_bytes);
        let facts = stage.capture().unwrap();
        let took = start.elapsed();
        println!(
            "{what}: {took:?}, stored {} MB, {} pages, {}",
            (stage.sink.stored_bytes - stored) / 1_000_000,
            facts["changed_pages"],
            peak()
        );
        println!("    {} segments, verified {}, {}", stage.last().content.segments.len(), facts["verified"], facts["tables"]);
    };
    time(&mut stage, "first, quick");
    time(&mut stage, "unchanged");
    let touch = |stage: &Stage| {
        let now = std::fs::FileTimes::new().set_modified(std::time::SystemTime::now());
        std::fs::File::options().write(true).open(&stage.path).unwrap().set_times(now).unwrap();
        settle();
    };
    touch(&stage);
    time(&mut stage, "touched, quick");
    stage.verify = Verify::Off;
    touch(&stage);
    time(&mut stage, "touched, off");
    stage.verify = Verify::Quick;
    let db = stage.open();
    db.execute_batch("PRAGMA synchronous = OFF; UPDATE events SET payload = payload || 'x' WHERE id % 100 = 7").unwrap();
    settle();
    time(&mut stage, "mutated, quick, connection open");
    stage.verify = Verify::Off;
    db.execute_batch("UPDATE events SET payload = payload || 'x' WHERE id % 100 = 17").unwrap();
    time(&mut stage, "mutated, off, connection open");
    stage.verify = Verify::Quick;
    for (captures, what) in [(0, "alone"), (3, "under captures")] {
        let path = stage.path.clone();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let writer = std::thread::spawn(move || {
            let db = Connection::open(path).unwrap();
            db.execute_batch("PRAGMA synchronous = NORMAL").unwrap();
            let mut times = Vec::new();
            while ended.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                let start = Instant::now();
                db.execute("UPDATE users SET bio = bio || 'y' WHERE id = ?1", [times.len() as u32 * 7 % 160_000 + 1]).unwrap();
                times.push(start.elapsed());
                std::thread::sleep(Duration::from_millis(1));
            }
            times.sort();
            (times[times.len() / 2], times[times.len() * 99 / 100], times[times.len() - 1], times.len())
        });
        std::thread::sleep(Duration::from_secs(if captures == 0 { 2 } else { 0 }));
        for _ in 0..captures {
            time(&mut stage, "under a writer, quick");
        }
        drop(end);
        println!("the writer {what}: median, p99, most, commits {:?}", writer.join().unwrap());
    }
    db.execute_batch("PRAGMA journal_mode = DELETE").unwrap();
    stage.verify = Verify::Quick;
    time(&mut stage, "rollback journal, copied, quick");
    touch(&stage);
    time(&mut stage, "rollback journal, idle, quick");
}
