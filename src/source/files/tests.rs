use std::ffi::OsStr;
use std::fs;
use std::io::{Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_util::sync::CancellationToken;

use super::test_sink::{Last, TestSink};
use super::*;
use crate::source::Report;

fn source(path: &Path) -> FilesSource {
    FilesSource { path: path.into(), exclude: vec![], one_file_system: false, exclude_caches: true }
}

fn run(source: &FilesSource, last: Vec<Entry>, sink: &mut TestSink) -> (Result<Facts, SourceError>, Report) {
    let (cancel, report) = (CancellationToken::new(), Report::default());
    let context = Context { cancel: &cancel, report: &report, work_dir: Path::new("/nonexistent"), cache_dir: Path::new("/nonexistent") };
    let facts = capture(source, &mut Last(last.into()), sink, &context);
    (facts, report)
}

fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    fs::create_dir_all(root.join("a/deep")).unwrap();
    fs::write(root.join("a/one"), "one").unwrap();
    fs::write(root.join("a/deep/two"), "two").unwrap();
    fs::write(root.join("a.txt"), "text").unwrap();
    fs::write(root.join("empty"), "").unwrap();
    fs::hard_link(root.join("a/one"), root.join("zlink")).unwrap();
    symlink("../outside", root.join("link")).unwrap();
    fs::write(root.join(OsStr::from_bytes(b"bad\xffname")), "x").unwrap();
    fs::write(root.join("large"), vec![7u8; 300_000]).unwrap();
    fs::set_permissions(root.join("a/one"), fs::Permissions::from_mode(0o4751)).unwrap();
    dir
}

#[test]
fn everything_is_there_as_it_was() {
    let dir = tree();
    rustix::fs::mknodat(rustix::fs::CWD, dir.path().join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    let mut sink = TestSink::default();
    let (facts, report) = run(&source(dir.path()), vec![], &mut sink);
    let facts = facts.unwrap();
    let entries = sink.by_path();
    assert_eq!(entries[""].kind, Kind::Directory);
    assert_eq!(sink.contents(entries["a/deep/two"]), b"two");
    assert_eq!(sink.contents(entries["large"]), vec![7u8; 300_000]);
    assert_eq!((entries["zlink"].kind, entries["zlink"].target.as_slice()), (Kind::Hardlink, &b"a/one"[..]));
    assert_eq!((entries["link"].kind, entries["link"].target.as_slice()), (Kind::Symlink, &b"../outside"[..]));
    assert_eq!(entries["a/one"].mode, 0o4751);
    let meta = fs::metadata(dir.path().join("a/one")).unwrap();
    assert_eq!((entries["a/one"].mtime.seconds, i64::from(entries["a/one"].mtime.nanoseconds)), (meta.mtime(), meta.mtime_nsec()));
    assert!(sink.entries.iter().any(|e| e.path == b"bad\xffname"));
    assert_eq!((facts["skipped_special"].as_u64(), facts["files"].as_u64(), facts["hardlinks"].as_u64()), (Some(2), Some(6), Some(1)));
    assert_eq!(report.left_out_count(), 0);
    assert!(!entries.contains_key("fifo"));
}

#[test]
fn only_what_changed_is_read_again() {
    let dir = tree();
    let mut first = TestSink::default();
    run(&source(dir.path()), vec![], &mut first).0.unwrap();
    let mut second = TestSink { chunks: first.chunks.clone(), ..TestSink::default() };
    let facts = run(&source(dir.path()), first.entries.clone(), &mut second).0.unwrap();
    assert_eq!(second.entries, first.entries);
    assert_eq!(facts["unchanged"].as_u64(), Some(6));
    // The same size and the same mtime: only the ctime tells.
    let path = dir.path().join("a/deep/two");
    let mtime = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(&path, "TWO").unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(mtime).unwrap();
    let mut third = TestSink { chunks: first.chunks.clone(), ..TestSink::default() };
    let facts = run(&source(dir.path()), first.entries.clone(), &mut third).0.unwrap();
    assert_eq!(third.contents(third.by_path()["a/deep/two"]), b"TWO");
    assert_eq!(facts["unchanged"].as_u64(), Some(5));
    // The repository lost a chunk: the file is read again although it did not change.
    let mut fourth = TestSink::default();
    let facts = run(&source(dir.path()), first.entries.clone(), &mut fourth).0.unwrap();
    assert_eq!(facts["unchanged"].as_u64(), Some(1), "only the empty one");
}

#[test]
fn holes_stay_holes() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = fs::File::create(dir.path().join("sparse")).unwrap();
    file.write_all(&[1; 4096]).unwrap();
    file.seek(std::io::SeekFrom::Start(50 << 20)).unwrap();
    file.write_all(&[2; 4096]).unwrap();
    file.set_len(80 << 20).unwrap();
    let mut sink = TestSink::default();
    run(&source(dir.path()), vec![], &mut sink).0.unwrap();
    let entry = sink.by_path()["sparse"].clone();
    assert_eq!(entry.size, 80 << 20);
    assert!(sink.stored_bytes < 1 << 20, "{} bytes stored", sink.stored_bytes);
    assert!(sink.contents(&entry) == fs::read(dir.path().join("sparse")).unwrap());
}

#[test]
fn excludes_caches_and_xattrs() {
    let dir = tree();
    let root = dir.path();
    for name in ["cache/x", "a/cache/y", "keep.tmp", "drop.tmp", "tagged/big"] {
        fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        fs::write(root.join(name), "z").unwrap();
    }
    fs::write(root.join("tagged/CACHEDIR.TAG"), "Signature: 8a477f597d28d172789f06886806bc55\n").unwrap();
    let has_xattrs = rustix::fs::setxattr(root.join("a.txt"), "user.note", b"hello", rustix::fs::XattrFlags::empty()).is_ok();
    let exclude = vec!["*.tmp".into(), "!keep.tmp".into(), "/cache/".into()];
    let mut sink = TestSink::default();
    run(&FilesSource { exclude, ..source(root) }, vec![], &mut sink).0.unwrap();
    let entries = sink.by_path();
    for (name, there) in [
        ("keep.tmp", true),
        ("drop.tmp", false),
        ("cache", false),
        ("a/cache/y", true),
        ("tagged/CACHEDIR.TAG", true),
        ("tagged/big", false),
    ] {
        assert_eq!(entries.contains_key(name), there, "{name}");
    }
    if has_xattrs {
        assert_eq!(entries["a.txt"].xattrs, [(b"user.note".to_vec(), b"hello".to_vec())]);
    }
}

#[test]
fn a_missing_or_strange_root_is_an_error_and_one_file_is_fine() {
    let dir = tree();
    let fails =
        |name: &str| matches!(run(&source(&dir.path().join(name)), vec![], &mut TestSink::default()).0, Err(SourceError::Failed(_)));
    assert!(fails("nothing here") && fails("link"));
    let mut sink = TestSink::default();
    run(&source(&dir.path().join("a.txt")), vec![], &mut sink).0.unwrap();
    assert_eq!((sink.entries.len(), sink.contents(&sink.entries[0])), (1, b"text".to_vec()));
}

#[test]
fn what_cannot_be_read_is_listed_and_the_rest_goes_on() {
    // A directory that a foreign user may not list; root may list everything, so the test process must be somebody else.
    if rustix::process::geteuid().is_root() {
        let test = std::env::current_exe().unwrap();
        let name = "source::files::tests::what_cannot_be_read_is_listed_and_the_rest_goes_on";
        let copy = tempfile::tempdir().unwrap();
        fs::set_permissions(copy.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let exe = copy.path().join("test");
        fs::copy(test, &exe).unwrap();
        let status = std::os::unix::process::CommandExt::uid(std::process::Command::new(&exe).args([name, "--exact"]), 65534)
            .current_dir("/")
            .env("TMPDIR", "/tmp")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let dir = tree();
    fs::set_permissions(dir.path().join("a/deep"), fs::Permissions::from_mode(0o000)).unwrap();
    fs::set_permissions(dir.path().join("a.txt"), fs::Permissions::from_mode(0o000)).unwrap();
    let mut sink = TestSink::default();
    let (facts, report) = run(&source(dir.path()), vec![], &mut sink);
    fs::set_permissions(dir.path().join("a/deep"), fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!((facts.unwrap()["left_out"].as_u64(), report.left_out_count()), (Some(2), 2));
    let told: Vec<String> = report.take_messages().into_iter().map(|m| m.1).collect();
    assert!(told.iter().any(|t| t.contains("a.txt")) && told.iter().any(|t| t.contains("a/deep")), "{told:?}");
    assert!(sink.by_path().contains_key("a/one"));
}

#[test]
fn a_tree_that_changes_under_the_walk_is_survived() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    let outside = dir.path().join("outside");
    fs::create_dir_all(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    for d in 0..40 {
        fs::create_dir_all(root.join(format!("d{d:02}"))).unwrap();
        for f in 0..40 {
            fs::write(root.join(format!("d{d:02}/f{f:02}")), vec![1u8; 2000]).unwrap();
        }
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut n = 0u64;
            while !stop.load(Ordering::Relaxed) {
                n = n.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let (d, f) = ((n >> 20) % 40, (n >> 30) % 40);
                let (dir, file) = (root.join(format!("d{d:02}")), root.join(format!("d{d:02}/f{f:02}")));
                let _ = match (n >> 40) % 5 {
                    0 => fs::remove_file(&file),
                    1 => fs::File::options().append(true).create(true).open(&file).and_then(|mut f| f.write_all(&[2; 500])),
                    2 => fs::rename(&dir, root.join("moved")).and_then(|()| symlink(&outside, &dir)),
                    3 => fs::remove_file(&dir).and_then(|()| fs::rename(root.join("moved"), &dir)),
                    _ => fs::remove_file(&file).and_then(|()| symlink(outside.join("secret"), &file)),
                };
            }
        });
        for _ in 0..15 {
            let mut sink = TestSink::default();
            let (facts, _) = run(&source(&root), vec![], &mut sink);
            facts.unwrap();
            assert!(sink.entries.iter().all(|e| !sink.contents(e).starts_with(b"secret")), "a symlink was followed");
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// More than anybody reads ahead, of every kind and length, in many directories.
fn varied(root: &Path) {
    for d in 0..12 {
        let dir = root.join(format!("d{d:02}/sub"));
        fs::create_dir_all(&dir).unwrap();
        for f in 0..d * 9 {
            let path = dir.join(format!("f{f}"));
            let len = [0, 1, 500, 4095, 4096, 4097, 20_000, 300_000][(d + f) % 8];
            fs::write(&path, vec![(d * f) as u8; len]).unwrap();
            match f % 11 {
                3 => fs::hard_link(&path, root.join(format!("d{:02}/l{d}-{f}", d / 2))).unwrap(),
                5 => symlink("f0", dir.join(format!("s{f}"))).unwrap(),
                7 => fs::set_permissions(&path, fs::Permissions::from_mode(0o4701)).unwrap(),
                _ => {}
            }
        }
    }
    rustix::fs::mknodat(rustix::fs::CWD, root.join("d03/fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let value: &[u8] = b"value";
    // Not every file system has them.
    let _ = rustix::fs::setxattr(root.join("d05/sub/f1"), "user.keepd", value, rustix::fs::XattrFlags::empty());
}

#[test]
fn what_is_read_ahead_is_what_is_found_without_that() {
    let dir = tempfile::tempdir().unwrap();
    varied(dir.path());
    let source = FilesSource { exclude: vec!["d04/".into(), "f8".into()], ..source(dir.path()) };
    let mut ahead = TestSink::default();
    let (first, said) = run(&source, vec![], &mut ahead);
    // There was something before, so everything is looked at beside it; it is nowhere any more.
    let before = vec![Entry { path: b"zz".to_vec(), ..Entry::default() }];
    let mut beside = TestSink::default();
    let (second, said_beside) = run(&source, before, &mut beside);
    assert_eq!(first.unwrap(), second.unwrap());
    assert_eq!(said.take_messages(), said_beside.take_messages());
    assert!(ahead.entries.len() > 500, "{}", ahead.entries.len());
    assert_eq!(ahead.entries, beside.entries);
    for (a, b) in ahead.entries.iter().zip(&beside.entries) {
        assert_eq!(ahead.contents(a), beside.contents(b));
    }
    for entry in ahead.entries.iter().filter(|e| e.kind == Kind::File) {
        let path = dir.path().join(OsStr::from_bytes(&entry.path));
        assert_eq!(ahead.contents(entry), fs::read(path).unwrap(), "{}", String::from_utf8_lossy(&entry.path));
    }
}
