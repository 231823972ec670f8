//! Database servers that are known by their process: those without databases that keepd could list, and those that no socket leads to.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use keepd_protocol::model::{CoverageItem, CoverageKind};

use super::{Scan, shown, suggestion};

/// A kind of server.
struct Engine {
    name: &'static str,
    /// The name of its process, of which the kernel keeps 15 bytes.
    process: &'static [&'static str],
    /// What its command line has, where the process is called like its interpreter.
    argument: &'static str,
    /// Options that name its data directory.
    options: &'static [&'static str],
    /// It works in its data directory.
    works_there: bool,
    usual: &'static str,
    /// Words of a command source that would save it.
    tools: &'static [&'static str],
}

const PLAIN: Engine = Engine { name: "", process: &[], argument: "", options: &[], works_there: false, usual: "/nonexistent", tools: &[] };

const ENGINES: [Engine; 14] = [
    Engine {
        name: "redis",
        process: &["redis-server"],
        works_there: true,
        usual: "/var/lib/redis",
        tools: &["redis-cli", "dump.rdb"],
        ..PLAIN
    },
    Engine {
        name: "valkey",
        process: &["valkey-server"],
        works_there: true,
        usual: "/var/lib/valkey",
        tools: &["valkey-cli", "redis-cli"],
        ..PLAIN
    },
    Engine {
        name: "keydb",
        process: &["keydb-server"],
        works_there: true,
        usual: "/var/lib/keydb",
        tools: &["keydb-cli", "redis-cli"],
        ..PLAIN
    },
    Engine {
        name: "mongodb",
        process: &["mongod"],
        options: &["--dbpath"],
        usual: "/var/lib/mongodb",
        tools: &["mongodump", "mongosh", "mongoexport"],
        ..PLAIN
    },
    Engine {
        name: "influxdb",
        process: &["influxd", "influxdb3"],
        options: &["--data-dir", "--engine-path"],
        usual: "/var/lib/influxdb",
        tools: &["influx", "influxd", "influxdb3"],
        ..PLAIN
    },
    Engine { name: "etcd", process: &["etcd"], options: &["--data-dir"], usual: "/var/lib/etcd", tools: &["etcdctl", "etcdutl"], ..PLAIN },
    Engine { name: "ldap", process: &["slapd", "ns-slapd"], usual: "/var/lib/ldap", tools: &["slapcat", "ldapsearch", "dsctl"], ..PLAIN },
    Engine {
        name: "clickhouse",
        process: &["clickhouse-serv", "clickhouse"],
        usual: "/var/lib/clickhouse",
        tools: &["clickhouse-client", "clickhouse", "clickhouse-backup"],
        ..PLAIN
    },
    Engine {
        name: "elasticsearch",
        process: &["java"],
        argument: "org.elasticsearch",
        usual: "/var/lib/elasticsearch",
        tools: &["elasticdump"],
        ..PLAIN
    },
    Engine {
        name: "opensearch",
        process: &["java"],
        argument: "org.opensearch",
        usual: "/var/lib/opensearch",
        tools: &["elasticdump"],
        ..PLAIN
    },
    Engine {
        name: "cassandra",
        process: &["java"],
        argument: "org.apache.cassandra",
        usual: "/var/lib/cassandra",
        tools: &["nodetool"],
        ..PLAIN
    },
    Engine { name: "neo4j", process: &["java"], argument: "org.neo4j", usual: "/var/lib/neo4j", tools: &["neo4j-admin"], ..PLAIN },
    Engine { name: "couchdb", process: &["beam.smp"], argument: "couchdb", usual: "/var/lib/couchdb", tools: &["couchbackup"], ..PLAIN },
    Engine {
        name: "arangodb",
        process: &["arangod"],
        options: &["--database.directory"],
        usual: "/var/lib/arangodb3",
        tools: &["arangodump"],
        ..PLAIN
    },
];

/// A process as `/proc` shows it.
pub struct Process {
    pub pid: u32,
    pub parent: u32,
    pub name: String,
    pub arguments: Vec<String>,
    /// Where it works; None where that may not be seen.
    pub directory: Option<PathBuf>,
    /// It lives among other mounts, so that its paths mean something else here.
    pub is_contained: bool,
}

/// All processes that can be seen; the error says why there are none.
pub fn all() -> Result<Vec<Process>, String> {
    let entries = std::fs::read_dir("/proc").map_err(|e| format!("/proc cannot be listed: {e}"))?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let found: Vec<Process> = pids.filter_map(read).collect();
    if found.is_empty() { Err("/proc shows no processes".into()) } else { Ok(found) }
}

/// None for one that has ended.
fn read(pid: u32) -> Option<Process> {
    let file = |name: &str| std::fs::read(format!("/proc/{pid}/{name}")).ok();
    let stat = String::from_utf8_lossy(&file("stat")?).into_owned();
    // The name stands in parentheses and may hold some.
    let (before, after) = stat.rsplit_once(')')?;
    let name = before.split_once('(')?.1.to_owned();
    let parent = after.split_whitespace().nth(1)?.parse().ok()?;
    let arguments = file("cmdline").unwrap_or_default();
    let arguments = arguments.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
    let link = format!("/proc/{pid}/cwd");
    let directory = std::fs::read_link(&link).ok();
    let is_same = |directory: &PathBuf| {
        let id = |path: &Path| path.metadata().ok().map(|stat| (stat.dev(), stat.ino()));
        id(directory).is_some() && id(directory) == id(Path::new(&link))
    };
    let is_contained = directory.as_ref().is_some_and(|d| !is_same(d));
    Some(Process { pid, parent, name, arguments, directory, is_contained })
}

impl Process {
    fn is(&self, engine: &Engine) -> bool {
        engine.process.contains(&self.name.as_str())
            && (engine.argument.is_empty() || self.arguments.iter().any(|a| a.contains(engine.argument)))
    }

    /// `--option value` and `--option=value`.
    fn option(&self, names: &[&str]) -> Option<PathBuf> {
        let mut arguments = self.arguments.iter().skip(1);
        while let Some(argument) = arguments.next() {
            let (name, value) = argument.split_once('=').map_or((argument.as_str(), None), |(name, value)| (name, Some(value)));
            if names.contains(&name) {
                return value.or_else(|| arguments.next().map(String::as_str)).map(PathBuf::from);
            }
        }
        None
    }

    /// Where its data is on this machine, as far as that can be known.
    fn data(&self, engine: &Engine) -> Option<PathBuf> {
        if self.is_contained {
            return None;
        }
        let working = self.directory.clone().filter(|d| engine.works_there && d.parent().is_some());
        let named = self.option(engine.options).filter(|d| d.is_absolute());
        let found = named.or(working).or_else(|| Some(PathBuf::from(engine.usual)));
        found.and_then(|path| path.canonicalize().ok()).filter(|path| path.is_dir())
    }
}

impl Scan<'_> {
    /// Items for servers that keepd cannot ask.
    pub fn other_servers(&mut self, processes: &[Process]) {
        for process in processes {
            for engine in ENGINES.iter().filter(|engine| process.is(engine)) {
                let data = process.data(engine);
                if !data.as_ref().map_or(self.is_everywhere(), |data| self.is_meant(data, true)) {
                    continue;
                }
                let item = self.server_process(engine, process, data.as_deref());
                self.found.item(item);
                // Its directory is told of once.
                self.served.extend(data);
            }
        }
    }

    fn server_process(&self, engine: &Engine, process: &Process, data: Option<&Path>) -> CoverageItem {
        let mut by = self.jobs.of_words(engine.tools);
        let files: Vec<String> =
            data.map(|data| self.jobs.of_path(data, true).captured.iter().map(|d| d.source.clone()).collect()).unwrap_or_default();
        let reason = match (by.is_empty(), files.is_empty(), data) {
            (false, _, _) => "a command source saves it".to_owned(),
            (true, false, _) => "its directory is captured as plain files while it runs".to_owned(),
            (true, true, Some(_)) => "in no job: save it with its own tool in a command source, or its directory as files".to_owned(),
            (true, true, None) if process.is_contained => "runs in a container, and is in no job by a command source".to_owned(),
            (true, true, None) => "in no job by a command source; where its data is is not known".to_owned(),
        };
        by.extend(files);
        let place = match (data, process.is_contained) {
            (Some(data), _) => shown(data),
            (None, true) => "a container".to_owned(),
            (None, false) => "this machine".to_owned(),
        };
        let gap = by.is_empty();
        CoverageItem {
            kind: CoverageKind::Database,
            what: format!("{} in {place}", engine.name),
            r#where: format!("process {}", process.name),
            covered_by: by,
            gap,
            reason,
            suggestion: data.filter(|_| gap).and_then(|data| suggestion(None, "files", data, "")),
            ..CoverageItem::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(name: &str, arguments: &[&str], directory: Option<&Path>) -> Process {
        let arguments = arguments.iter().map(|a| (*a).to_owned()).collect();
        Process { pid: 1, parent: 1, name: name.into(), arguments, directory: directory.map(Path::to_owned), is_contained: false }
    }

    #[test]
    fn data_is_where_the_server_says_or_works() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        let text = path.to_str().unwrap();
        let engine = |name: &str| ENGINES.iter().find(|e| e.name == name).unwrap();
        assert_eq!(process("redis-server", &[], Some(&path)).data(engine("redis")), Some(path.clone()));
        assert_eq!(process("mongod", &["mongod", "--dbpath", text], None).data(engine("mongodb")), Some(path.clone()));
        assert_eq!(process("etcd", &["etcd", &format!("--data-dir={text}")], None).data(engine("etcd")), Some(path.clone()));
        assert_eq!(process("mongod", &["mongod", "--dbpath"], Some(&path)).option(&["--dbpath"]), None);
        assert!(process("java", &["java", "-cp", "x", "org.neo4j.server.Main"], None).is(engine("neo4j")));
        assert!(!process("java", &["java", "shop.jar"], None).is(engine("neo4j")));
        let contained = Process { is_contained: true, ..process("redis-server", &[], Some(&path)) };
        assert_eq!(contained.data(engine("redis")), None);
    }

    #[test]
    fn this_process_is_seen() {
        let own = all().unwrap().into_iter().find(|p| p.pid == std::process::id()).unwrap();
        assert_eq!(own.directory, std::env::current_dir().ok());
        assert!(!own.is_contained && own.parent > 0);
    }
}
