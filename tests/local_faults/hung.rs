//! Sources that do not answer: a named pipe that nobody writes to, where a file is expected, and a file system whose server is gone.

use keepd_faultfs::{Action, Rule, Verb};

use super::*;

fn fifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// What has to be done within a time that no hang would keep.
fn in_time<T: Send + 'static>(what: &str, patience: Duration, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || tell.send(work()));
    told.recv_timeout(patience).unwrap_or_else(|_| panic!("{what} hangs"))
}

#[test]
fn a_named_pipe_where_a_file_is_expected_holds_nobody_up() {
    let mut keepd = filled(Keepd::prepared());
    let d = keepd.dir.path().display().to_string();
    let job =
        |name: &str, source: &str| format!("[job.{name}]\ndestinations = [\"local\"]\n[[job.{name}.source]]\nname = \"it\"\n{source}\n");
    fifo(&keepd.path("pipe"));
    fifo(&keepd.path("files/pipe"));
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let more = [
        job("root", &format!("files = \"{d}/pipe\"")),
        job("database", &format!("sqlite = \"{d}/pipe\"")),
        job("program", "command = [\"cat\"]\nfile = \"nothing\""),
    ];
    fs::write(keepd.path("keepd.toml"), format!("{text}{}", more.concat())).unwrap();
    keepd.start();
    let run = |arguments: &[&str]| {
        let mut command = keepd.ctl_command(arguments);
        in_time(&format!("keepctl {arguments:?}"), PATIENCE, move || command.output().unwrap())
    };
    // In a directory it is no file, and is told as left out or passed over.
    let out = run(&["backup", "shop"]);
    assert!(out.status.success(), "{}", super::text(&out));
    let restored = keepd.restored("latest");
    assert!(restored.join("files/kept").exists() && !restored.join("files/pipe").exists());
    for name in ["root", "database"] {
        let out = run(&["backup", name]);
        let said = super::text(&out);
        assert!(!out.status.success() && said.contains("pipe"), "{name}: {said}");
    }
    // A program that reads from nobody has nothing to wait for.
    run(&["backup", "program"]);
    // Key file, secret and configuration.
    fifo(&keepd.path("pipe.key"));
    keepd.fails(1, &["key", "add", "local", "--key", keepd.path("pipe.key").to_str().unwrap()]);
    fs::create_dir_all(keepd.path("conf.d")).unwrap();
    fifo(&keepd.path("conf.d/pipe.toml"));
    let out = run(&["reload"]);
    println!("a named pipe among the drop-ins: {:?}: {}", out.status.code(), super::text(&out));
    fs::remove_file(keepd.path("conf.d/pipe.toml")).unwrap();
    let out = run(&["backup", "shop"]);
    assert!(out.status.success(), "{}", super::text(&out));
}

#[test]
fn a_source_that_does_not_answer_holds_up_nobody_elsewhere_and_goes_on_when_it_answers() {
    let mut keepd = filled(Keepd::prepared());
    let d = keepd.dir.path().display().to_string();
    let Some(mounted) = quota::layer(&keepd, "share") else { return };
    fs::write(keepd.path("share/hangs"), noise(3 << 20, 11)).unwrap();
    let text = fs::read_to_string(keepd.path("keepd.toml")).unwrap();
    let more = format!(
        "[destination.other]\nservice = \"fs\"\nroot = \"{d}/other\"\nencryption = \"main\"\n\
         [destination.archives]\nservice = \"fs\"\nroot = \"{d}/archives\"\nencryption = \"main\"\nlayout = \"archive\"\n\
         [job.share]\ndestinations = [\"local\"]\n[[job.share.source]]\nname = \"share\"\nfiles = \"{d}/share\"\n\
         [job.packed]\ndestinations = [\"archives\"]\n[[job.packed.source]]\nname = \"share\"\nfiles = \"{d}/share\"\n\
         [job.mail]\ndestinations = [\"other\"]\n[[job.mail.source]]\nname = \"files\"\nfiles = \"{d}/files\"\n"
    );
    fs::write(keepd.path("keepd.toml"), format!("{text}{more}")).unwrap();
    keepd.start();
    for job in ["shop", "share", "packed", "mail"] {
        keepd.ok(&["backup", job]);
    }
    let before = keepd.backups();
    let mut cases = vec![("share", true), ("packed", true)];
    if is_long() {
        cases.push(("share", false));
    }
    for (job, is_read) in cases {
        let (what, verbs): (&str, &[Verb]) =
            if is_read { ("reading", &[Verb::Read]) } else { ("listing", &[Verb::List, Verb::Stat, Verb::Open]) };
        // So that it has to be read.
        fs::write(keepd.path("behind-share/hangs"), noise(3 << 20, 12 + u64::from(is_read))).unwrap();
        mounted.control().add(Rule::on(verbs, "**").does(Action::Hang));
        let run = keepd.json(&["backup", job, "--detach"])["run"].as_str().unwrap().to_owned();
        let since = Instant::now();
        while mounted.control().fired() == 0 {
            assert!(since.elapsed() < PATIENCE, "{what}: nothing is asked of the share: {}", keepd.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        // Another job, to another destination: at once.
        let mut command = keepd.ctl_command(&["backup", "mail"]);
        let out = in_time("a backup to another destination", PATIENCE, move || command.output().unwrap());
        assert!(out.status.success(), "{what}: {}", super::text(&out));
        keepd.ok(&["status"]);
        // The share answers again: all goes on by itself.
        mounted.control().clear_rules();
        let since = Instant::now();
        while keepd.json(&["run", "show", &run])["state"] != "good" {
            assert!(since.elapsed() < PATIENCE, "{what}: it does not go on: {}", keepd.json(&["run", "show", &run]));
            std::thread::sleep(Duration::from_millis(100));
        }
        let to = keepd.path(&format!("back-{job}-{what}"));
        keepd.ok(&["restore", "latest", "--job", job, "--to", to.to_str().unwrap()]);
        assert_eq!(fs::read(to.join("share/hangs")).unwrap(), fs::read(keepd.path("behind-share/hangs")).unwrap(), "{what}");
        let after = keepd.backups();
        assert!(before.iter().all(|id| after.contains(id)), "{what}: {before:?} became {after:?}");
    }
    for destination in ["local", "other", "archives"] {
        keepd.ok(&["prune", destination]);
        keepd.ok(&["check", destination, "--read-data"]);
    }
    prove(&keepd, keepd.json(&["list", "--job", "shop"])[0]["id"].as_str().unwrap());
    if !is_long() {
        mounted.unmount().unwrap();
        return;
    }
    // keepd ends while one hangs, after it waited a minute for the run, and the next start finds nothing open.
    mounted.control().add(Rule::on(&[Verb::Read], "**").does(Action::Hang));
    fs::write(keepd.path("behind-share/hangs"), noise(3 << 20, 99)).unwrap();
    keepd.ok(&["backup", "share", "--detach"]);
    let since = Instant::now();
    while mounted.control().fired() == 0 {
        assert!(since.elapsed() < PATIENCE, "nothing is asked of the share");
        std::thread::sleep(Duration::from_millis(20));
    }
    let pid = keepd.pid();
    signal(pid, "TERM");
    let since = Instant::now();
    while keepd.is_alive() {
        assert!(since.elapsed() < 3 * PATIENCE, "keepd does not end while a source hangs: {}", keepd.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("a source that hangs: keepd ended {:.1} s after SIGTERM", since.elapsed().as_secs_f64());
    mounted.control().clear_rules();
    keepd.start();
    keepd.ok(&["backup", "share"]);
    keepd.stop();
    mounted.unmount().unwrap();
}
