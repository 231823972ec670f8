//! Real database servers of a test's own, on free ports of the loopback interface; each ends with its test, by its process id.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub const PASSWORD: &str = "canary-pg:pass\\word";

/// A PostgreSQL cluster that wants a password over TCP.
pub struct Postgres {
    pub port: u16,
    dir: tempfile::TempDir,
    child: Option<Child>,
}

/// The newest server's directory of tools.
pub fn postgres_tools() -> PathBuf {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| Some((e.file_name().to_str()?.parse().ok()?, e.path().join("bin"))))
        .filter(|(_, bin)| bin.join("postgres").exists())
        .collect();
    found.sort();
    found.pop().expect("no PostgreSQL here: run 'sh tests/install-tools.sh test' first").1
}

/// A command as somebody who is not root, if the tests run as root: PostgreSQL refuses to.
fn unprivileged(program: &Path) -> Command {
    let mut command = Command::new(program);
    if let Some((uid, gid)) = server_user() {
        command.uid(uid).gid(gid);
    }
    command.stdin(Stdio::null()).env("LC_ALL", "C.UTF-8");
    command
}

fn server_user() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd.lines().find(|l| l.starts_with("postgres:")).or_else(|| passwd.lines().find(|l| l.starts_with("nobody:"))).unwrap();
    let numbers: Vec<u32> = line.split(':').skip(2).take(2).map(|n| n.parse().unwrap()).collect();
    Some((numbers[0], numbers[1]))
}

impl Postgres {
    pub fn started() -> Self {
        let dir = tempfile::Builder::new().prefix("keepd-pg-").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let data = dir.path().join("data");
        fs::create_dir(&data).unwrap();
        fs::set_permissions(&data, fs::Permissions::from_mode(0o700)).unwrap();
        let secret = dir.path().join("password");
        fs::write(&secret, format!("{PASSWORD}\n")).unwrap();
        if let Some((uid, gid)) = server_user() {
            for path in [&data, &secret] {
                std::os::unix::fs::chown(path, Some(uid), Some(gid)).unwrap();
            }
        }
        let made = unprivileged(&postgres_tools().join("initdb"))
            .args(["-U", "postgres", "-A", "scram-sha-256", "--no-sync", "--pwfile"])
            .arg(&secret)
            .arg("-D")
            .arg(&data)
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", super::text(&made));
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        let port = super::servers::free_port();
        let log = fs::OpenOptions::new().create(true).append(true).open(dir.path().join("log")).unwrap();
        let child = unprivileged(&postgres_tools().join("postgres"))
            .arg("-D")
            .arg(&data)
            .args(["-p", &port.to_string(), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k"])
            .arg(&data)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let server = Self { port, dir, child: Some(child) };
        let since = Instant::now();
        while !server.try_sql("postgres", "select 1").0 {
            let log = fs::read_to_string(server.dir.path().join("log")).unwrap_or_default();
            assert!(since.elapsed() < Duration::from_secs(60), "PostgreSQL does not answer: {log}");
            std::thread::sleep(Duration::from_millis(50));
        }
        server
    }

    /// A file with the password.
    pub fn password_file(&self) -> PathBuf {
        self.dir.path().join("password")
    }

    /// The keys of a source's table that lead to it.
    pub fn connection(&self) -> String {
        format!(
            "host = \"127.0.0.1\", port = {}, user = \"postgres\", password = {{ file = \"{}\" }}",
            self.port,
            self.password_file().display()
        )
    }

    pub fn psql(&self, database: &str) -> Command {
        let mut command = Command::new(postgres_tools().join("psql"));
        command.env("PGPASSWORD", PASSWORD).args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", "postgres"]);
        command.args(["-p", &self.port.to_string(), "-d", database]);
        command
    }

    pub fn try_sql(&self, database: &str, sql: &str) -> (bool, String) {
        let out = self.psql(database).args(["-c", sql]).output().unwrap();
        (out.status.success(), super::text(&out).trim().to_owned())
    }

    /// Runs SQL; what it printed.
    pub fn sql(&self, database: &str, sql: &str) -> String {
        let (good, text) = self.try_sql(database, sql);
        assert!(good, "{sql}: {text}");
        text
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Fast shutdown: its children end with it.
            super::signal(child.id(), "INT");
            let _ = child.wait();
        }
    }
}

/// Writes a program of a shell's lines.
pub fn script(path: &Path, lines: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("#!/bin/sh\n{lines}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}
