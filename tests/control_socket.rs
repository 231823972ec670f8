//! The control socket against clients that are foreign, slow, greedy or hostile.

mod common;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::*;
use keepd_protocol::restore::{BLOCK_BYTES, Frame, FrameReader};
use rustix::fs::OFlags;
use serde_json::{Value, json};

fn connect(keepd: &Keepd) -> UnixStream {
    let stream = UnixStream::connect(keepd.path("keepd.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

fn send(stream: &mut UnixStream, call: &Value) {
    let mut bytes = serde_json::to_vec(call).unwrap();
    bytes.push(0);
    stream.write_all(&bytes).unwrap();
}

fn receive(stream: &mut UnixStream) -> Option<Value> {
    let mut bytes = Vec::new();
    let mut one = [0u8; 1];
    loop {
        match stream.read(&mut one) {
            Ok(0) | Err(_) => return None,
            Ok(_) if one[0] == 0 => return serde_json::from_slice(&bytes).ok(),
            Ok(_) => bytes.push(one[0]),
        }
    }
}

fn call(stream: &mut UnixStream, method: &str, parameters: Value) -> Value {
    send(stream, &json!({ "method": method, "parameters": parameters }));
    receive(stream).expect("a reply")
}

fn memory_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find_map(|l| l.strip_prefix("VmRSS:")).and_then(|l| l.split_whitespace().next()).unwrap().parse().unwrap()
}

fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

#[test]
fn the_python_client_understands_it() {
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/control/varlink_client.py");
    let out = Command::new(python()).arg(script).arg(format!("unix:{}", keepd.path("keepd.sock").display())).output().unwrap();
    assert!(out.status.success() && text(&out).trim().ends_with("OK"), "{}", text(&out));
}

#[test]
fn errors_name_what_is_wrong() {
    let keepd = Keepd::started();
    let mut s = connect(&keepd);
    let reply = call(&mut s, "io.keepd.Control.Nothing", json!({}));
    assert_eq!(
        (reply["error"].as_str(), reply["parameters"]["method"].as_str()),
        (Some("org.varlink.service.MethodNotFound"), Some("io.keepd.Control.Nothing"))
    );
    let reply = call(&mut s, "io.keepd.Control.ShowJob", json!({ "job": "shop", "jbo": 1 }));
    assert_eq!(
        (reply["error"].as_str(), reply["parameters"]["parameter"].as_str()),
        (Some("org.varlink.service.InvalidParameter"), Some("jbo"))
    );
    let reply = call(&mut s, "io.keepd.Control.ShowJob", json!({}));
    assert_eq!(reply["parameters"]["parameter"].as_str(), Some("job"));
    let reply = call(&mut s, "io.keepd.Control.ShowJob", json!({ "job": 5 }));
    assert_eq!(reply["parameters"]["parameter"].as_str(), Some("job"));
    let reply = call(&mut s, "io.keepd.Control.ShowJob", json!({ "job": "nothing" }));
    assert_eq!((reply["error"].as_str(), reply["parameters"]["what"].as_str()), (Some("io.keepd.Control.NotFound"), Some("job")));
    let reply = call(&mut s, "io.keepd.Control.StartRestore", json!({ "backup": "latest" }));
    assert_eq!(reply["error"].as_str(), Some("io.keepd.Control.Descriptor"));
    let reply = call(&mut s, "io.keepd.Control.Watch", json!({}));
    assert_eq!(reply["error"].as_str(), Some("org.varlink.service.ExpectedMore"));
    // Calls sent at once are answered in order.
    for job in ["shop", "nothing", "shop"] {
        send(&mut s, &json!({ "method": "io.keepd.Control.ShowJob", "parameters": { "job": job } }));
    }
    let errors: Vec<bool> = (0..3).map(|_| receive(&mut s).unwrap().get("error").is_some()).collect();
    assert_eq!(errors, [false, true, false]);
    send(&mut s, &json!({ "method": "io.keepd.Control.ListJobs", "parameters": [5] }));
    assert!(receive(&mut s).unwrap().get("error").is_some());
    // A client that half-closes still gets its reply.
    let mut s = connect(&keepd);
    send(&mut s, &json!({ "method": "io.keepd.Control.ListJobs" }));
    s.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(receive(&mut s).unwrap()["parameters"]["jobs"][0]["name"].as_str(), Some("shop"));
}

#[test]
fn garbage_silence_and_a_gigabyte_hurt_nobody() {
    let keepd = Keepd::started();
    let before = memory_kib(keepd.pid());
    let mut garbage = connect(&keepd);
    garbage.write_all(b"\x16\x03\x01 this is not JSON\0").unwrap();
    assert!(receive(&mut garbage).unwrap().get("error").is_some());
    assert_eq!(receive(&mut garbage), None, "then it is closed");
    let mut deep = connect(&keepd);
    deep.write_all(&[b'['; 400_000]).unwrap();
    deep.write_all(b"\0").unwrap();
    assert!(receive(&mut deep).is_none_or(|r| r.get("error").is_some()));
    let silent: Vec<UnixStream> = (0..20).map(|_| connect(&keepd)).collect();
    let mut greedy = connect(&keepd);
    let piece = vec![b'x'; 1 << 20];
    let mut sent = 0u64;
    for _ in 0..1024 {
        match greedy.write_all(&piece) {
            Ok(()) => sent += piece.len() as u64,
            Err(_) => break,
        }
    }
    assert!(sent < 64 << 20, "{sent} bytes of one message were taken");
    let after = memory_kib(keepd.pid());
    assert!(after < before + 20_000, "memory went from {before} to {after} KiB");
    // Half a message: cut after its deadline; one that has not begun may wait.
    let mut half = connect(&keepd);
    half.write_all(b"{\"method\":").unwrap();
    let since = Instant::now();
    assert!(receive(&mut half).is_none_or(|r| r.get("error").is_some()));
    assert!((3..15).contains(&since.elapsed().as_secs()), "{:?}", since.elapsed());
    drop(silent);
    keepd.ok(&["status"]);
}

#[test]
fn a_slow_watcher_is_cut_and_the_others_get_everything() {
    let keepd = Keepd::started();
    let mut watchers: Vec<UnixStream> = (0..50)
        .map(|_| {
            let mut s = connect(&keepd);
            send(&mut s, &json!({ "method": "io.keepd.Control.Watch", "more": true }));
            s
        })
        .collect();
    // Every watcher listens before the first event when a later call on another connection is answered.
    std::thread::sleep(Duration::from_millis(500));
    keepd.ok(&["backup", "shop"]);
    for s in &mut watchers {
        let mut kinds = Vec::new();
        while kinds.last().map(String::as_str) != Some("run-finished") {
            let reply = receive(s).expect("an event");
            assert_eq!(reply["continues"].as_bool(), Some(true));
            kinds.push(reply["parameters"]["event"]["kind"].as_str().unwrap().to_owned());
        }
        assert_eq!(kinds.first().map(String::as_str), Some("run-queued"), "{kinds:?}");
        assert!(kinds.iter().filter(|k| *k == "run-step").count() >= 4, "{kinds:?}");
    }
}

#[test]
fn descriptors_and_hang_ups_leave_nothing_behind() {
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    let before = descriptors(keepd.pid());
    // Restores whose client goes away at once, and while the data flow.
    for n in 0..6 {
        let mut child =
            keepd.ctl_command(&["restore", "latest", "--to", keepd.path(&format!("gone-{n}")).to_str().unwrap()]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(n * 4));
        let _ = child.kill();
        child.wait().unwrap();
    }
    let since = Instant::now();
    while descriptors(keepd.pid()) > before + 2 {
        assert!(since.elapsed() < Duration::from_secs(20), "{} descriptors before, {} now", before, descriptors(keepd.pid()));
        std::thread::sleep(Duration::from_millis(100));
    }
    let runs = keepd.json(&["status"]);
    assert_eq!(runs["running"].as_array().unwrap().len(), 0);
    keepd.restored("latest");
}

/// Sends bytes with descriptors.
fn send_with(stream: &UnixStream, bytes: &[u8], descriptors: &[std::os::fd::BorrowedFd<'_>]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
    let sent = sendmsg(stream, &[std::io::IoSlice::new(bytes)], &mut ancillary, SendFlags::empty()).unwrap();
    assert_eq!(sent, bytes.len());
}

#[test]
fn descriptors_belong_to_their_message_and_are_not_hoarded() {
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    let before = descriptors(keepd.pid());
    // Many descriptors inside a message that never ends: the connection is cut.
    let null = std::fs::File::open("/dev/null").unwrap();
    let mut hoarder = connect(&keepd);
    send_with(&hoarder, b"{\"method\":", &[null.as_fd(); 4]);
    send_with(&hoarder, b"\"io.keepd", &[null.as_fd(); 4]);
    assert!(receive(&mut hoarder).is_none_or(|r| r.get("error").is_some()));
    drop(hoarder);
    // Two calls sent at once, the pipe belongs to the second.
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let mut s = connect(&keepd);
    let first =
        b"{\"method\":\"io.keepd.Control.StartCat\",\"parameters\":{\"backup\":\"latest\",\"path\":{\"path\":\"files/deep/note.txt\"}}}\0";
    s.write_all(first).unwrap();
    send_with(&s, first, &[writer.as_fd()]);
    drop(writer);
    assert_eq!(receive(&mut s).unwrap()["error"].as_str(), Some("io.keepd.Control.Descriptor"), "the first came without one");
    assert_eq!(receive(&mut s).unwrap()["parameters"]["bytes"].as_u64(), Some(6));
    let mut contents = String::new();
    std::fs::File::from(reader).read_to_string(&mut contents).unwrap();
    assert_eq!(contents, "a note");
    // A descriptor of the wrong kind, or open for reading only.
    send_with(&s, first, &[null.as_fd()]);
    assert_eq!(receive(&mut s).unwrap()["error"].as_str(), Some("io.keepd.Control.Descriptor"));
    drop(s);
    let since = Instant::now();
    while descriptors(keepd.pid()) > before + 1 {
        assert!(since.elapsed() < Duration::from_secs(15), "{before} descriptors before, {} now", descriptors(keepd.pid()));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A memfd of some blocks that stays as long as it is.
fn blocks_to_lend(blocks: u64) -> std::fs::File {
    use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, memfd_create};
    let memory = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    fallocate(&memory, FallocateFlags::empty(), 0, blocks * BLOCK_BYTES as u64).unwrap();
    fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    memory.into()
}

#[test]
fn long_contents_come_in_lent_memory_and_wait_for_it() {
    let keepd = Keepd::started();
    let long = noise(21_000_000, 11);
    std::fs::write(keepd.path("files/long"), &long).unwrap();
    keepd.ok(&["backup", "shop"]);
    let memory = blocks_to_lend(2);
    let begun = |memory: &std::fs::File| {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let (returned, back) = rustix::pipe::pipe().unwrap();
        let mut s = connect(&keepd);
        let call = json!({ "method": "io.keepd.Control.StartRestore",
            "parameters": { "backup": "latest", "paths": [{ "path": "files/long" }], "memory": 1, "returned": 2 } });
        let mut bytes = serde_json::to_vec(&call).unwrap();
        bytes.push(0);
        send_with(&s, &bytes, &[writer.as_fd(), memory.as_fd(), returned.as_fd()]);
        let run = receive(&mut s).unwrap()["parameters"]["run"].as_str().unwrap().to_owned();
        (FrameReader::new(std::fs::File::from(reader)), std::fs::File::from(back), run, returned)
    };
    let begin = |memory: &std::fs::File| {
        let (frames, back, run, _) = begun(memory);
        (frames, back, run)
    };
    let (mut frames, mut back, _) = begin(&memory);
    let (mut contents, mut in_memory, mut held) = (vec![0; long.len()], 0, Vec::new());
    loop {
        match frames.next_frame().unwrap().expect("a whole stream") {
            Frame::Data { offset, len, .. } => frames.data(&mut contents[offset as usize..][..len]).unwrap(),
            Frame::Shared { offset, block, len, .. } => {
                assert!(!held.contains(&block), "a block that was not given back is not used");
                memory.read_exact_at(&mut contents[offset as usize..][..len as usize], u64::from(block) * BLOCK_BYTES as u64).unwrap();
                in_memory += len as usize;
                held.push(block);
                // Both are kept for a while: keepd has none to go on with then.
                if held.len() == 2 {
                    std::thread::sleep(Duration::from_millis(50));
                    // At the end nobody takes them any more.
                    held.drain(..).for_each(|block| drop(back.write_all(&[block as u8])));
                }
            }
            Frame::Finish(_) => break,
            _ => {}
        }
    }
    assert!(contents == long && in_memory == long.len(), "{in_memory} of {} bytes in memory", long.len());

    // Who gives nothing back keeps the run waiting, until it is cancelled or goes away; also who takes from the pipe passed that it does not wait.
    let (_frames, back, run, returned) = begun(&memory);
    for _ in 0..30 {
        rustix::fs::fcntl_setfl(&returned, OFlags::empty()).unwrap();
        std::thread::sleep(Duration::from_millis(10));
    }
    keepd.ok(&["run", "cancel", &run]);
    assert!(text(&keepd.ctl(&["run", "follow", &run, "--json"])).contains("cancelled"));
    drop(back);
    let (_frames, back, run) = begin(&memory);
    drop(back);
    let ended = keepd.ctl(&["run", "follow", &run]);
    assert!(text(&ended).contains("the client went away"), "{}", text(&ended));
    let (_frames, mut back, run) = begin(&memory);
    back.write_all(&[200]).unwrap();
    let ended = keepd.ctl(&["run", "follow", &run]);
    assert!(text(&ended).contains("it gave back block 200 of memory, which it did not have"), "{}", text(&ended));
    keepd.ok(&["backup", "shop"]);
}

#[test]
fn keepctl_lends_memory_where_it_may_make_so_much() {
    let mut keepd = Keepd::prepared();
    make_database(&keepd.path("shop.db"), 5);
    std::fs::create_dir_all(keepd.path("files")).unwrap();
    let long = noise(6_000_000, 12);
    std::fs::write(keepd.path("files/long"), &long).unwrap();
    keepd.environment.push(("RUST_LOG".into(), "keepd=debug".into()));
    keepd.start();
    keepd.ok(&["backup", "shop"]);
    keepd.ok(&["restore", "latest", "files/long", "--to", keepd.path("out").to_str().unwrap()]);
    assert!(std::fs::read(keepd.path("out/files/long")).unwrap() == long);
    assert!(keepd.log().contains("6000000 of 6000000 bytes went through lent memory"), "{}", keepd.log());
    // Files of so many blocks (of 512 or 1,024 bytes) it may make, and none as long as the memory.
    let out = Command::new("sh")
        .args(["-c", "ulimit -f 12000; exec \"$0\" \"$@\""])
        .arg(keepctl_binary())
        .arg("--socket")
        .arg(keepd.path("keepd.sock"))
        .args(["restore", "latest", "files/long", "--to"])
        .arg(keepd.path("through the pipe"))
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", text(&out));
    assert!(std::fs::read(keepd.path("through the pipe/files/long")).unwrap() == long);
    assert_eq!(keepd.log().matches("went through lent memory").count(), 1);
}

#[test]
fn a_client_that_reads_nothing_keeps_nobody_waiting() {
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    // A restore into a pipe that nobody empties (3 MB of contents, a pipe holds 1 MB at the most).
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let mut s = connect(&keepd);
    send_with(&s, b"{\"method\":\"io.keepd.Control.StartRestore\",\"parameters\":{\"backup\":\"latest\"}}\0", &[writer.as_fd()]);
    drop(writer);
    let run = receive(&mut s).unwrap()["parameters"]["run"].as_str().unwrap().to_owned();
    // A hundred questions whose answers nobody takes.
    let mut silent = connect(&keepd);
    silent.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let question = b"{\"method\":\"org.varlink.service.GetInterfaceDescription\",\"parameters\":{\"interface\":\"io.keepd.Control\"}}\0";
    for _ in 0..100 {
        if silent.write_all(question).is_err() {
            break;
        }
    }
    let since = Instant::now();
    for _ in 0..20 {
        let mut other = connect(&keepd);
        assert!(call(&mut other, "io.keepd.Control.ListJobs", json!({})).get("error").is_none());
    }
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    keepd.ok(&["backup", "shop"]);
    keepd.ok(&["run", "cancel", &run]);
    let ended = keepd.ctl(&["run", "follow", &run, "--json"]);
    assert!(text(&ended).contains("cancelled"), "{}", text(&ended));
    drop(reader);
}

#[test]
fn others_are_refused() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: root is needed to be somebody else");
        return;
    }
    use std::os::unix::fs::PermissionsExt;
    let keepd = Keepd::started();
    std::fs::set_permissions(keepd.dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let copy = tempfile::tempdir().unwrap();
    std::fs::set_permissions(copy.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    copy_program(&keepctl_binary(), &copy.path().join("keepctl"));
    let status = |mode: u32| {
        std::fs::set_permissions(keepd.path("keepd.sock"), std::fs::Permissions::from_mode(mode)).unwrap();
        let mut command = Command::new(copy.path().join("keepctl"));
        std::os::unix::process::CommandExt::uid(&mut command, 65534);
        command.arg("--socket").arg(keepd.path("keepd.sock")).arg("status").current_dir("/").output().unwrap()
    };
    assert_eq!(status(0o660).status.code(), Some(5), "the socket's mode keeps them out");
    let said = status(0o666);
    assert_eq!(said.status.code(), Some(5), "{}", text(&said));
    assert!(text(&said).contains("may not look at what there is (right view)"), "{}", text(&said));
}

/// The published text names exactly the methods there are, with their parameters and results.
#[test]
fn the_interface_text_fits_the_methods() {
    use keepd_protocol::methods as m;
    let text = keepd_protocol::INTERFACE;
    let mut told: Vec<(String, Vec<String>, Vec<String>)> = Vec::new();
    for line in text.lines().filter(|l| l.starts_with("method ")) {
        let (head, results) = line.trim_start_matches("method ").split_once(" -> ").unwrap();
        let (name, parameters) = head.split_once('(').unwrap();
        let fields = |list: &str| -> Vec<String> {
            list.trim_matches(['(', ')']).split(',').filter_map(|f| f.split_once(':')).map(|(n, _)| n.trim().to_owned()).collect()
        };
        told.push((name.to_owned(), fields(parameters), fields(results)));
    }
    let mut names: Vec<String> = told.iter().map(|t| format!("io.keepd.Control.{}", t.0)).collect();
    let mut known: Vec<String> = m::ALL.iter().map(|s| (*s).to_owned()).collect();
    names.sort();
    known.sort();
    assert_eq!(names, known);
    fn keys(value: impl serde::Serialize) -> Vec<String> {
        let mut keys: Vec<String> = serde_json::to_value(value).unwrap().as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    }
    let mut seen = 0;
    macro_rules! fits {
        ($($module:ident $name:literal),*) => {$({
            let (_, parameters, results) = told.iter().find(|t| t.0 == $name).unwrap();
            let sorted = |l: &Vec<String>| { let mut l = l.clone(); l.sort(); l };
            assert_eq!(keys(m::$module::In::default()), sorted(parameters), $name);
            assert_eq!(keys(m::$module::Out::default()), sorted(results), $name);
            seen += 1;
        })*};
    }
    fits!(get_status "GetStatus", list_jobs "ListJobs", show_job "ShowJob", start_backup "StartBackup", start_check "StartCheck", start_prune "StartPrune", start_re_encrypt "StartReEncrypt",
        start_delete "StartDelete", mark_backup "MarkBackup", show_retention "ShowRetention", start_retention "StartRetention", start_copy "StartCopy", test_destination "TestDestination", take_over "TakeOver", start_restore "StartRestore", start_load "StartLoad", start_cat "StartCat", start_export "StartExport", follow_run "FollowRun", cancel_run "CancelRun", list_runs "ListRuns",
        show_run "ShowRun", list_backups "ListBackups", show_backup "ShowBackup", list_entries "ListEntries", diff_backups "DiffBackups", watch "Watch", reload "Reload", start_compare "StartCompare",
        start_in_place "StartInPlace", start_undo "StartUndo",
        start_coverage "StartCoverage", get_coverage "GetCoverage", acknowledge_coverage "AcknowledgeCoverage", start_drill "StartDrill",
        list_keys "ListKeys", start_key_add "StartKeyAdd", start_key_remove "StartKeyRemove", start_key_rotate "StartKeyRotate", make_kit "MakeKit",
        initiate_import "InitiateImport", upload_import "UploadImport", start_import "StartImport", get_import "GetImport", list_imports "ListImports", cancel_import "CancelImport",
        show_config "ShowConfig", check_config "CheckConfig", preview_config "PreviewConfig", export_config "ExportConfig", import_config "ImportConfig", undo_config "UndoConfig",
        start_config_backup "StartConfigBackup", list_config_backups "ListConfigBackups", fetch_config_backup "FetchConfigBackup",
        show_access "ShowAccess", list_audit "ListAudit", verify_audit "VerifyAudit", show_item_text "ShowItemText", edit_config "EditConfig", schedule_once "ScheduleOnce");
    assert_eq!(seen, known.len());
}

/// Switches of all threads that gave up the processor by themselves.
fn voluntary_switches(pid: u32) -> u64 {
    let of_thread = |path: std::path::PathBuf| -> Option<u64> {
        let status = std::fs::read_to_string(path.join("status")).ok()?;
        status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?.trim().parse().ok()
    };
    std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().filter_map(|task| of_thread(task.unwrap().path())).sum()
}

#[test]
fn an_idle_daemon_sleeps() {
    let keepd = Keepd::started();
    keepd.ok(&["backup", "shop"]);
    // Threads of the last call end some seconds later; on a busy machine all of it takes longer.
    let began = Instant::now();
    loop {
        let before = voluntary_switches(keepd.pid());
        std::thread::sleep(Duration::from_secs(4));
        let woken = voluntary_switches(keepd.pid()).abs_diff(before);
        if woken <= 2 {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(90), "it still wakes up {woken} times in 4 s");
    }
}

/// Bytes of a process's own program that are mapped to be run.
fn code_resident(pid: u32) -> u64 {
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut lines = maps.lines();
    lines.by_ref().find(|l| l.contains(" r-xp ") && l.ends_with(program.to_str().unwrap())).expect("its code is mapped");
    let resident = lines.find_map(|l| l.strip_prefix("Rss:")).unwrap();
    resident.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn an_idle_daemon_lets_go_of_what_it_does_not_run() {
    let keepd = Keepd::started();
    let lets_go = |tries: u32| {
        keepd.ok(&["backup", "shop"]);
        let busy = code_resident(keepd.pid());
        let began = Instant::now();
        while code_resident(keepd.pid()) * 2 > busy {
            if began.elapsed() > Duration::from_secs(30) {
                // On a machine that stood still it had let go before it was looked at.
                assert!(tries < 3, "{} of {busy} bytes are still mapped", code_resident(keepd.pid()));
                return false;
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        true
    };
    // And again, for it is wanted again.
    for _ in 0..2 {
        assert!((0..).any(lets_go));
    }
    keepd.ok(&["check", "local"]);
}
