//! A MariaDB or MySQL server of a drill's own: on a socket in the scratch place, with no way in over the network.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::servers::{Programs, version};
use crate::config::{Databases, ServerSource};
use crate::process::{Job, Pipes, Running};
use crate::source::SourceError;

/// Databases that a new server has.
pub const OWN: [&str; 4] = ["information_schema", "performance_schema", "sys", "mysql"];
pub const SOCKET: &str = "s.sock";
/// Options that a client reads.
pub const DEFAULTS: &str = "client.cnf";
const VERSION_WITHIN: Duration = Duration::from_secs(30);
const INSTALL_WITHIN: Duration = Duration::from_secs(600);
/// Where servers lie that are not in every PATH.
const PLACES: [&str; 4] = ["/usr/sbin", "/usr/local/sbin", "/usr/libexec", "/usr/local/mysql/bin"];

/// The newest server that is installed, of the dump's family, and not older than what it was taken from.
pub fn find(config: &ServerSource, server: &str, cancel: &CancellationToken) -> Result<Programs, String> {
    let (mariadb, least) = (server.contains("MariaDB"), version(server).unwrap_or_default());
    let mut places: Vec<PathBuf> = config.bin_dir.iter().cloned().collect();
    places.extend(std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect::<Vec<_>>()).unwrap_or_default());
    places.extend(PLACES.iter().map(PathBuf::from));
    let named = |names: &[&str]| {
        names.iter().flat_map(|name| places.iter().map(move |dir| dir.join(name))).filter(|p| p.is_file()).collect::<Vec<_>>()
    };
    let mut found: Vec<((u32, u32), PathBuf)> = named(if mariadb { &["mariadbd", "mysqld"] } else { &["mysqld"] })
        .into_iter()
        .filter_map(|program| {
            let words = [program.as_os_str(), "--no-defaults".as_ref(), "--version".as_ref()];
            let output = Job::new(words).run(b"", 4096, VERSION_WITHIN, cancel).ok()?;
            let text = String::from_utf8_lossy(&output).into_owned();
            let of = text.split("Ver ").nth(1)?;
            (of.contains("MariaDB") == mariadb).then_some((version(of)?, program))
        })
        .filter(|(version, _)| *version >= least)
        .collect();
    found.sort();
    let family = if mariadb { "MariaDB" } else { "MySQL" };
    let (_, program) = found
        .pop()
        .ok_or_else(|| format!("no {family} server of version {}.{} or newer is installed (mariadbd, mysqld)", least.0, least.1))?;
    let install = match mariadb {
        false => None,
        true => {
            let scripts = named(&["mariadb-install-db", "mysql_install_db"]);
            Some(scripts.into_iter().next().ok_or("mariadb-install-db is not installed, which makes a server's data directory")?)
        }
    };
    Ok(Programs { server: program, install, tools: None })
}

/// How it is reached.
pub fn connection(dir: &Path) -> ServerSource {
    ServerSource { socket: Some(dir.join(SOCKET)), user: Some("root".into()), ..ServerSource::plain(Databases::All) }
}

/// Makes a data directory and starts its server.
pub fn start(
    programs: &Programs,
    dir: &Path,
    run_as: Option<&str>,
    memory: u64,
    cancel: &CancellationToken,
) -> Result<Running, SourceError> {
    let path = |name: &str| dir.join(name).display().to_string();
    let (data, tmp, socket) = (format!("--datadir={}", path("data")), format!("--tmpdir={}", path("tmp")), path(SOCKET));
    let job = |words: Vec<String>| Job {
        environment: vec![("LC_ALL", "C.UTF-8".into())],
        run_as,
        memory: Some(memory),
        follows: Some("KILL"),
        ..Job::new(words)
    };
    // By the server's user, to whom the directory belongs.
    job(vec!["mkdir".into(), path("tmp")]).run(b"", 4096, VERSION_WITHIN, cancel)?;
    let server = programs.server.display().to_string();
    let pool = (memory / 8).clamp(16 << 20, 256 << 20);
    let small =
        [format!("--innodb-buffer-pool-size={pool}"), "--key-buffer-size=8M".into(), "--loose-aria-pagecache-buffer-size=8M".into()];
    let mut install = match &programs.install {
        Some(script) => vec![script.display().to_string(), "--no-defaults".into()],
        None => vec![server.clone(), "--no-defaults".into(), "--initialize-insecure".into()],
    };
    if programs.install.is_some() {
        install.extend(["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"].map(str::to_owned));
    }
    install.extend([data.clone(), tmp.clone()].into_iter().chain(small.clone()));
    job(install).run(b"", 1 << 20, INSTALL_WITHIN, cancel).map_err(|e| e.about("a data directory could not be made"))?;
    let options = format!("[client]\nsocket=\"{}\"\nuser=root\n", socket.replace('\\', "\\\\").replace('"', "\\\""));
    job(vec!["tee".into(), path(DEFAULTS)]).run(options.as_bytes(), 64 << 10, VERSION_WITHIN, cancel)?;
    let mut words = vec![server, "--no-defaults".into(), data, tmp, format!("--socket={socket}"), format!("--pid-file={}", path("pid"))];
    words.extend(small);
    words.push(format!("--secure-file-priv={}", path("tmp")));
    words.extend(
        [
            "--skip-networking",
            // Its events would change what is checked.
            "--event-scheduler=OFF",
            "--skip-log-bin",
            "--performance-schema=OFF",
            "--max-allowed-packet=1G",
            "--max-connections=20",
            // Nothing of it must survive anything.
            "--innodb-flush-log-at-trx-commit=0",
            "--loose-innodb-doublewrite=0",
            // What an older server took is taken here, too.
            "--loose-innodb-strict-mode=OFF",
            "--loose-mysqlx=OFF",
        ]
        .map(str::to_owned),
    );
    let mut running = job(words).start(Pipes::Input)?;
    drop(running.take_input());
    Ok(running)
}
