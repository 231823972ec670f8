//! Servers of PostgreSQL and MySQL: those that jobs name, and those whose sockets or processes are there. Each is asked which databases it has.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use keepd_protocol::model::{CoverageItem, CoverageKind};

use super::processes::{self, Process};
use super::{Failure, Scan, written};
use crate::config::{Databases, SecretSource, ServerSource, SourceKind};
use crate::source::SourceError;
use crate::source::survey::Survey;
use crate::source::{mysql, postgres};

const SOCKETS: &str = "/proc/net/unix";
/// Where sockets are when the kernel's table does not have them: of servers in other network namespaces.
const PLACES: [&str; 6] = ["/run/postgresql", "/var/run/postgresql", "/tmp", "/run/mysqld", "/var/run/mysqld", "/var/lib/mysql"];
const POSTGRES_SOCKET: &str = ".s.PGSQL.";
/// Not those of MySQL's X protocol, to which its tools do not speak.
const MYSQL_SOCKETS: [&str; 4] = ["mysqld.sock", "mysql.sock", "mariadb.sock", "mariadbd.sock"];
/// PostgreSQL's own user.
const POSTGRES_USER: &str = "postgres";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Family {
    Postgres,
    Mysql,
}

impl Family {
    /// As sources call it.
    fn word(self) -> &'static str {
        match self {
            Family::Postgres => "postgres",
            Family::Mysql => "mysql",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Family::Postgres => "PostgreSQL",
            Family::Mysql => "MySQL",
        }
    }

    fn usual_port(self) -> u16 {
        match self {
            Family::Postgres => 5432,
            Family::Mysql => 3306,
        }
    }

    fn processes(self) -> &'static [&'static str] {
        match self {
            Family::Postgres => &["postgres", "postmaster"],
            Family::Mysql => &["mysqld", "mariadbd"],
        }
    }
}

/// A server that was asked, or could not be.
struct Server {
    family: Family,
    survey: Survey,
    /// How it is reached.
    way: ServerSource,
    /// Of this machine.
    local: bool,
    /// The job whose source leads there.
    job: Option<String>,
    /// `JOB/SOURCE` with what it takes.
    takes: Vec<(String, Databases)>,
}

impl Scan<'_> {
    /// Items for databases of servers, and for servers that cannot be asked.
    pub fn servers(&mut self) -> Result<(), Failure> {
        let processes = match processes::all() {
            Ok(processes) => processes,
            Err(text) => {
                self.found.note(format!("{text}: servers that are only known by their process are missing here"));
                Vec::new()
            }
        };
        let mut servers = self.of_jobs()?;
        // Ports of this machine on which a server is that a job leads to, asked or not.
        let mut known: BTreeSet<(Family, u16)> = BTreeSet::new();
        for server in servers.iter().filter(|s| s.local) {
            let port = server.survey.port.or(server.way.port).unwrap_or(server.family.usual_port());
            known.insert((server.family, port));
        }
        for (family, socket) in self.sockets() {
            self.check()?;
            self.at_socket(family, &socket, &known, &mut servers)?;
        }
        for server in &servers {
            self.served.extend(server.survey.data_dir.clone().filter(|_| server.local).and_then(|dir| dir.canonicalize().ok()));
        }
        for server in &servers {
            self.databases_of(server);
        }
        self.without_socket(&processes, &servers);
        self.other_servers(&processes);
        Ok(())
    }

    /// Asks each server that a job names once.
    fn of_jobs(&mut self) -> Result<Vec<Server>, Failure> {
        let config = self.env.config.clone();
        let mut servers: Vec<Server> = Vec::new();
        // Each way, with its place in `servers`.
        let mut asked: Vec<(Family, ServerSource, usize)> = Vec::new();
        for (job, source) in config.jobs.values().flat_map(|job| job.sources.iter().map(move |source| (job, source))) {
            let (family, server) = match &source.kind {
                SourceKind::Postgres(server) => (Family::Postgres, server),
                SourceKind::Mysql(server) => (Family::Mysql, server),
                _ => continue,
            };
            let name = format!("{}/{}", job.name, source.name);
            let way = ServerSource { databases: Databases::All, globals: false, exclude_tables: Vec::new(), ..server.clone() };
            if let Some((_, _, place)) = asked.iter().find(|(f, w, _)| *f == family && *w == way) {
                if let Some(there) = servers.get_mut(*place) {
                    there.takes.push((name, server.databases.clone()));
                }
                continue;
            }
            let survey = match self.ask(family, server) {
                Ok(survey) => survey,
                Err(SourceError::Cancelled) => return Err(Failure::Cancelled),
                Err(e) => {
                    self.found
                        .note(format!("the server of {name} cannot be asked, so databases that no job names are not known there: {e}"));
                    Survey::default()
                }
            };
            let known =
                servers.iter().position(|s| s.family == family && !survey.identity.is_empty() && s.survey.identity == survey.identity);
            let place = known.unwrap_or(servers.len());
            if known.is_none() {
                let (local, job) = (server.is_local(), Some(job.name.clone()));
                servers.push(Server { family, survey, way: way.clone(), local, job, takes: Vec::new() });
            }
            if let Some(there) = servers.get_mut(place) {
                there.takes.push((name, server.databases.clone()));
            }
            asked.push((family, way, place));
        }
        Ok(servers)
    }

    fn ask(&self, family: Family, way: &ServerSource) -> Result<Survey, SourceError> {
        match family {
            Family::Postgres => postgres::survey(way, &self.live.cancel),
            Family::Mysql => mysql::survey(way, &self.live.cancel),
        }
    }

    /// Asks the server at a socket, unless a job leads to it.
    fn at_socket(
        &mut self,
        family: Family,
        socket: &Path,
        known: &BTreeSet<(Family, u16)>,
        servers: &mut Vec<Server>,
    ) -> Result<(), Failure> {
        let reached = |w: &ServerSource| w.socket.as_deref().is_some_and(|s| s == socket || s.canonicalize().is_ok_and(|s| s == socket));
        if servers.iter().any(|s| s.family == family && reached(&s.way)) {
            return Ok(());
        }
        let mut way = ServerSource::plain(Databases::All);
        match family {
            Family::Postgres => {
                let port = socket.file_name().and_then(|n| n.to_str()?.strip_prefix(POSTGRES_SOCKET)?.parse().ok());
                if port.is_some_and(|port| known.contains(&(family, port))) {
                    return Ok(());
                }
                way.host = socket.parent().map(|dir| dir.to_string_lossy().into_owned());
                way.port = port;
                let may_become = rustix::process::geteuid().is_root() && uzers::get_user_by_name(POSTGRES_USER).is_some();
                way.run_as = may_become.then(|| POSTGRES_USER.to_owned());
            }
            Family::Mysql => way.socket = Some(socket.to_owned()),
        }
        match self.ask(family, &way) {
            Ok(survey) => {
                let is_new = !servers.iter().any(|s| s.family == family && s.survey.identity == survey.identity);
                if is_new {
                    servers.push(Server { family, survey, way, local: true, job: None, takes: Vec::new() });
                }
            }
            Err(SourceError::Cancelled) => return Err(Failure::Cancelled),
            Err(e) => {
                // One that a job reaches over TCP, and that does not let keepd in here.
                let is_reached = servers.iter().any(|s| s.family == family && s.local);
                if family == Family::Mysql && is_reached {
                    return Ok(());
                }
                let shown = super::shown(socket);
                self.found.item(CoverageItem {
                    kind: CoverageKind::Database,
                    what: format!("{} at {shown}", family.word()),
                    r#where: "this machine".into(),
                    gap: true,
                    reason: format!("a {} server listens at {shown} and cannot be asked: {e}; its databases are in no job", family.name()),
                    suggestion: Some(as_source(None, family, &way, "*")),
                    ..CoverageItem::default()
                });
            }
        }
        Ok(())
    }

    fn databases_of(&mut self, server: &Server) {
        let port = server.survey.port.or(server.way.port).unwrap_or(server.family.usual_port());
        let host = if server.local { "localhost" } else { server.way.host.as_deref().unwrap_or("localhost") };
        for _ in 0..server.survey.empty {
            self.found.skip("databases without tables that every server has");
        }
        let mut databases: BTreeMap<&str, (Option<u64>, Option<i64>)> = BTreeMap::new();
        // What a job names is told of even when the server could not be asked.
        let named = server.takes.iter().flat_map(|(_, takes)| if let Databases::Named(names) = takes { names.as_slice() } else { &[] });
        databases.extend(named.map(|name| (name.as_str(), (None, None))));
        databases.extend(server.survey.databases.iter().map(|d| (d.name.as_str(), (d.bytes, d.modified))));
        for (name, (bytes, modified)) in databases {
            let takes = |databases: &Databases| match databases {
                Databases::All => true,
                Databases::Named(names) => names.iter().any(|n| n == name),
            };
            let by: Vec<String> = server.takes.iter().filter(|(_, d)| takes(d)).map(|(source, _)| source.clone()).collect();
            let gap = by.is_empty();
            let place = match (&server.way.socket, port) {
                (Some(socket), 0) => super::shown(socket),
                _ => format!("{host}:{port}"),
            };
            self.found.item(CoverageItem {
                kind: CoverageKind::Database,
                what: format!("{} {name}", server.family.word()),
                r#where: place,
                bytes,
                modified: modified.and_then(written),
                covered_by: by,
                gap,
                reason: if gap { "in no job".into() } else { "captured as a database".into() },
                suggestion: gap.then(|| as_source(server.job.as_deref(), server.family, &server.way, name)),
                ..CoverageItem::default()
            });
        }
    }

    /// Items for servers of which only the process is known.
    fn without_socket(&mut self, processes: &[Process], servers: &[Server]) {
        for process in processes {
            let of = |family: &Family| family.processes().contains(&process.name.as_str());
            let Some(family) = [Family::Postgres, Family::Mysql].into_iter().find(|family| of(family)) else { continue };
            // The server's own children.
            if processes.iter().any(|p| p.pid == process.parent && of(&family) && p.name == process.name) {
                continue;
            }
            let data = process.directory.clone().filter(|d| !process.is_contained && d.parent().is_some());
            if !data.as_ref().map_or(self.is_everywhere(), |data| self.is_meant(data, true)) {
                continue;
            }
            // Another name of one that was found.
            let is_reached = match &data {
                Some(data) => self.served.iter().any(|served| served == data) || self.has_port_of(data, family, servers),
                None => servers.iter().any(|s| s.family == family && s.local),
            };
            let word = family.word();
            if is_reached || self.found.items.iter().any(|i| i.what.starts_with(&format!("{word} at "))) {
                self.served.extend(data);
                continue;
            }
            let place = match (&data, process.is_contained) {
                (Some(data), _) => super::shown(data),
                (None, true) => "a container".to_owned(),
                (None, false) => "this machine".to_owned(),
            };
            let by = self.jobs.of_words(match family {
                Family::Postgres => &["pg_dump", "pg_dumpall", "pg_basebackup"],
                Family::Mysql => &["mysqldump", "mariadb-dump", "mariabackup", "xtrabackup"],
            });
            let gap = by.is_empty();
            self.found.item(CoverageItem {
                kind: CoverageKind::Database,
                what: format!("{word} in {place}"),
                r#where: format!("process {}", process.name),
                covered_by: by,
                gap,
                reason: match gap {
                    true => {
                        format!("a {} server runs, no job names it and no socket leads to it; its databases are in no job", family.name())
                    }
                    false => "a command source saves it".into(),
                },
                suggestion: gap.then(|| as_source(None, family, &ServerSource::plain(Databases::All), "*")),
                ..CoverageItem::default()
            });
            self.served.extend(data);
        }
    }

    /// A server may keep to itself where its data is; PostgreSQL's own file there tells its port.
    fn has_port_of(&self, data: &Path, family: Family, servers: &[Server]) -> bool {
        let text = std::fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
        let port = text.lines().nth(3).and_then(|line| line.trim().parse::<u16>().ok());
        let has =
            |s: &&Server| s.family == family && s.local && s.survey.port.or(s.way.port).unwrap_or(family.usual_port()) == port.unwrap_or(0);
        family == Family::Postgres && servers.iter().any(|s| has(&s))
    }

    /// Sockets of servers that listen, by their real paths.
    fn sockets(&mut self) -> BTreeSet<(Family, PathBuf)> {
        let mut paths: BTreeSet<PathBuf> = BTreeSet::new();
        match std::fs::read(SOCKETS) {
            Ok(table) => paths.extend(listening(&table)),
            Err(e) => self.found.note(format!("{SOCKETS} cannot be read ({e}): only the usual places of sockets are looked at")),
        }
        for place in PLACES {
            let entries = std::fs::read_dir(place).into_iter().flatten().flatten().map(|entry| entry.path());
            // A file may be left of a server that is gone.
            let is_new = |path: &PathBuf| family_of(path).is_some() && !paths.contains(path);
            let others: Vec<PathBuf> = entries.filter(is_new).filter(|path| UnixStream::connect(path).is_ok()).collect();
            paths.extend(others);
        }
        let real = paths.into_iter().filter_map(|path| Some((family_of(&path)?, path.canonicalize().ok()?)));
        real.filter(|(_, path)| self.is_meant(path, false)).collect()
    }
}

/// Whose socket has such a name.
fn family_of(socket: &Path) -> Option<Family> {
    let name = socket.file_name()?.to_str()?;
    let is_port = |port: &str| port.parse::<u16>().is_ok();
    match name.strip_prefix(POSTGRES_SOCKET) {
        Some(port) => is_port(port).then_some(Family::Postgres),
        None => MYSQL_SOCKETS.contains(&name).then_some(Family::Mysql),
    }
}

/// The sockets of servers in the kernel's table: `0000000000000000: 00000002 00000000 00010000 0001 01 12345 /run/x.sock`
fn listening(table: &[u8]) -> Vec<PathBuf> {
    let path = |line: &[u8]| {
        let mut rest = line;
        let mut fields = Vec::new();
        for _ in 0..7 {
            let start = rest.iter().position(|b| *b != b' ')?;
            let (_, from) = rest.split_at(start);
            let end = from.iter().position(|b| *b == b' ')?;
            let (field, after) = from.split_at(end);
            fields.push(field);
            rest = after;
        }
        let accepts = fields.get(3).is_some_and(|flags| *flags == b"00010000");
        let path = Path::new(std::ffi::OsStr::from_bytes(rest.get(1..)?));
        (accepts && path.is_absolute() && family_of(path).is_some()).then(|| path.to_owned())
    };
    table.split(|b| *b == b'\n').filter_map(path).collect()
}

/// The source that would capture a database, as TOML. A secret stays where it is.
fn as_source(job: Option<&str>, family: Family, way: &ServerSource, database: &str) -> String {
    let text = |value: &str| toml::Value::from(value).to_string();
    let path = |path: &Path| text(&path.to_string_lossy());
    let mut keys = vec![format!("dbname = {}", text(database))];
    keys.extend(way.host.as_deref().map(|host| format!("host = {}", text(host))));
    keys.extend(way.port.map(|port| format!("port = {port}")));
    keys.extend(way.socket.as_deref().map(|socket| format!("socket = {}", path(socket))));
    keys.extend(way.user.as_deref().map(|user| format!("user = {}", text(user))));
    keys.extend(way.password.as_ref().map(|secret| match secret {
        SecretSource::File(file) => format!("password = {{ file = {} }}", path(file)),
        SecretSource::Credential(name) => format!("password = {{ credential = {} }}", text(name)),
        SecretSource::Environment(name) => format!("password = {{ env = {} }}", text(name)),
    }));
    keys.extend(way.bin_dir.as_deref().map(|dir| format!("bin_dir = {}", path(dir))));
    keys.extend(way.run_as.as_deref().map(|user| format!("run_as = {}", text(user))));
    keys.extend(way.sslmode.as_deref().map(|mode| format!("sslmode = {}", text(mode))));
    format!("[[job.{}.source]]\n{} = {{ {} }}\n", job.unwrap_or("NAME"), family.word(), keys.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sockets_that_accept_are_taken() {
        let table = b"Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 22010 /run/postgresql/.s.PGSQL.5432
0000000000000000: 00000003 00000000 00000000 0001 03 22011 /run/postgresql/.s.PGSQL.5433
0000000000000000: 00000002 00000000 00010000 0001 01 22012 /run/a b/mysqld.sock
0000000000000000: 00000002 00000000 00010000 0001 01 22013 @/run/mysqld/mysqld.sock
0000000000000000: 00000002 00000000 00010000 0001 01 22014 /run/other.sock
0000000000000000: 00000002 00000000 00010000 0001 01 22015
short\n";
        assert_eq!(listening(table), [Path::new("/run/postgresql/.s.PGSQL.5432"), Path::new("/run/a b/mysqld.sock")]);
        assert_eq!(family_of(Path::new("/tmp/.s.PGSQL.5432.lock")), None);
        assert_eq!(family_of(Path::new("/run/mysqld/mysqlx.sock")), None);
    }

    #[test]
    fn what_is_suggested_is_a_source_and_holds_no_secret() {
        let way = ServerSource {
            host: Some("db".into()),
            port: Some(5433),
            user: Some("a\"b".into()),
            password: Some(SecretSource::File("/k/pw".into())),
            ..ServerSource::plain(Databases::All)
        };
        let table: toml::Table = as_source(Some("shop"), Family::Postgres, &way, "My 'Shop'").parse().unwrap();
        let source = &table["job"]["shop"]["source"][0]["postgres"];
        assert_eq!((source["dbname"].as_str(), source["user"].as_str()), (Some("My 'Shop'"), Some("a\"b")));
        assert_eq!(source["password"]["file"].as_str(), Some("/k/pw"));
    }
}
