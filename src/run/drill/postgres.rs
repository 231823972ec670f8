//! A PostgreSQL server of a drill's own: on a socket in the scratch place, with no way in over the network.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::scratch::Person;
use super::servers::{Programs, version};
use crate::config::{Databases, ServerSource};
use crate::process::{Job, Pipes, Running};
use crate::source::SourceError;

/// Databases that a new server has.
pub const OWN: [&str; 3] = ["postgres", "template0", "template1"];
/// It only names the socket.
pub const PORT: &str = "5432";
const VERSION_WITHIN: Duration = Duration::from_secs(30);
const INSTALL_WITHIN: Duration = Duration::from_secs(300);

/// The newest server that is installed and not older than what the dump was taken from.
pub fn find(config: &ServerSource, server: &str, tool: &str, cancel: &CancellationToken) -> Result<Programs, String> {
    let least = version(server).map_or(0, |(major, _)| major);
    let mut found: Vec<(u32, PathBuf)> = places(config)
        .into_iter()
        .filter(|dir| dir.join("postgres").is_file() && dir.join("initdb").is_file())
        .filter_map(|dir| Some((major(&dir.join("postgres"), cancel)?, dir)))
        .filter(|(major, _)| *major >= least)
        .collect();
    found.sort();
    let (_, dir) =
        found.pop().ok_or_else(|| format!("no PostgreSQL server of version {least} or newer is installed (postgres, initdb)"))?;
    // An archive is read by tools that are not older than those that wrote it.
    let needed = version(tool).map_or(least, |(major, _)| major);
    let fits = dir.join("psql").is_file() && major(&dir.join("pg_restore"), cancel).is_some_and(|major| major >= needed);
    Ok(Programs { server: dir.join("postgres"), install: Some(dir.join("initdb")), tools: fits.then_some(dir) })
}

fn major(program: &Path, cancel: &CancellationToken) -> Option<u32> {
    let output = Job::new([program.as_os_str(), "--version".as_ref()]).run(b"", 4096, VERSION_WITHIN, cancel).ok()?;
    version(&String::from_utf8_lossy(&output)).map(|(major, _)| major)
}

/// Directories that may have a server's programs, each once.
fn places(config: &ServerSource) -> Vec<PathBuf> {
    let mut places: Vec<PathBuf> = config.bin_dir.iter().cloned().collect();
    places.extend(std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect::<Vec<_>>()).unwrap_or_default());
    // A link in PATH leads to the directory with all of them.
    let linked: Vec<PathBuf> =
        places.iter().filter_map(|dir| Some(fs::canonicalize(dir.join("postgres")).ok()?.parent()?.to_owned())).collect();
    places.extend(linked);
    for entry in fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten() {
        places.push(entry.path().join("bin"));
    }
    for entry in fs::read_dir("/usr").into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("pgsql-") {
            places.push(entry.path().join("bin"));
        }
    }
    places.push("/usr/local/pgsql/bin".into());
    places.sort();
    places.dedup();
    places
}

/// How it is reached.
pub fn connection(dir: &Path) -> ServerSource {
    ServerSource {
        host: Some(dir.display().to_string()),
        port: PORT.parse().ok(),
        user: Some("postgres".into()),
        ..ServerSource::plain(Databases::All)
    }
}

/// Makes a cluster in the directory and starts its server.
pub fn start(
    programs: &Programs,
    dir: &Path,
    run_as: Option<&str>,
    memory: u64,
    cancel: &CancellationToken,
) -> Result<Running, SourceError> {
    let data = dir.join("data").display().to_string();
    let environment = || vec![("LC_ALL", "C.UTF-8".into()), ("TZ", "UTC".into())];
    if let Some(initdb) = &programs.install {
        // Whoever can come to the socket may do everything, and only the server's user and root can.
        let words = ["-D", &data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"];
        let command = std::iter::once(initdb.as_os_str()).chain(words.iter().map(AsRef::as_ref));
        let job = Job { environment: environment(), run_as, memory: Some(memory), follows: Some("KILL"), ..Job::new(command) };
        job.run(b"", 1 << 20, INSTALL_WITHIN, cancel).map_err(|e| e.about("a data directory could not be made"))?;
    }
    let part = (memory / 8).clamp(16 << 20, 256 << 20) >> 10;
    let settings = [
        "listen_addresses=".to_owned(),
        "unix_socket_permissions=0700".into(),
        format!("shared_buffers={part}kB"),
        format!("maintenance_work_mem={part}kB"),
        "dynamic_shared_memory_type=mmap".into(),
        "huge_pages=off".into(),
        "max_connections=20".into(),
        // Nothing of it must survive anything.
        "fsync=off".into(),
        "synchronous_commit=off".into(),
        "full_page_writes=off".into(),
        "autovacuum=off".into(),
        "logging_collector=off".into(),
        "log_statement=none".into(),
    ];
    let mut command: Vec<std::ffi::OsString> = vec![programs.server.as_os_str().to_owned()];
    command.extend(["-D", &data, "-p", PORT, "-k"].map(Into::into));
    command.push(dir.as_os_str().to_owned());
    for setting in settings {
        command.extend(["-c".into(), setting.into()]);
    }
    let job = Job { environment: environment(), run_as, memory: Some(memory), follows: Some("QUIT"), ..Job::new(command) };
    let mut running = job.start(Pipes::Input)?;
    drop(running.take_input());
    Ok(running)
}

/// Roles and tablespaces as this server can take them: a tablespace lies in a directory of the drill, never where the live server has it.
pub fn globals(text: &str, dir: &Path, user: Option<&Person>) -> Result<String, String> {
    let mut made = 0;
    let mut out = String::with_capacity(text.len());
    for line in text.lines() {
        let begins = line.trim_start().get(..17).is_some_and(|l| l.eq_ignore_ascii_case("CREATE TABLESPACE"));
        match line.rfind(" LOCATION '").and_then(|at| line.get(..at)) {
            Some(head) if begins => {
                let place = dir.join(format!("t{made}"));
                made += 1;
                let failed = |e: std::io::Error| format!("cannot make {}: {e}", place.display());
                fs::create_dir(&place).map_err(failed)?;
                if let Some(user) = user {
                    std::os::unix::fs::chown(&place, Some(user.uid), Some(user.gid)).map_err(failed)?;
                }
                out.push_str(&format!("{head} LOCATION '{}';\n", place.display().to_string().replace('\'', "''")));
            }
            // Not understood, so left out.
            _ if begins => {}
            _ => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tablespace_never_lies_where_the_live_one_does() {
        let dir = tempfile::tempdir().unwrap();
        let text = "CREATE ROLE shop;\nCREATE TABLESPACE fast OWNER shop LOCATION '/srv/pg';\nCREATE TABLESPACE \"a LOCATION 'b\" OWNER x LOCATION '/srv/b';\n\
                    create tablespace odd;\nALTER ROLE shop WITH LOGIN;\n";
        let now = globals(text, dir.path(), None).unwrap();
        assert!(!now.contains("/srv/") && !now.contains("odd"), "{now}");
        let place = |n: u32| format!("LOCATION '{}/t{n}';", dir.path().display());
        assert!(now.contains(&format!("fast OWNER shop {}", place(0))) && now.contains(&place(1)), "{now}");
        assert!(now.starts_with("CREATE ROLE shop;\n") && now.ends_with("ALTER ROLE shop WITH LOGIN;\n"));
    }
}
