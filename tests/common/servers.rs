//! Real servers for destinations, on free ports of the loopback interface; each ends with its test, by its process id.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// rclone; ignores conditions.
    S3,
    Webdav,
    Ftp,
    /// OpenSSH.
    Sftp,
    /// moto: conditions, object lock.
    Moto,
}

pub const SECRET: &str = "canary-7f3a-secret";
const USER: &str = "keeper";

pub struct Server {
    pub kind: Kind,
    pub port: u16,
    /// Its files, its log, its keys.
    dir: PathBuf,
    child: Option<Child>,
}

/// A port that nobody listens on just now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn tool(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin").join(name);
    assert!(path.exists(), "{} is missing: run 'sh tests/install-tools.sh test' first", path.display());
    path
}

impl Server {
    pub fn started(kind: Kind, dir: &Path) -> Self {
        let dir = dir.join(format!("server-{kind:?}-{}", free_port()));
        fs::create_dir_all(dir.join("data/bucket")).unwrap();
        fs::create_dir_all(dir.join("bin")).unwrap();
        let mut server = Self { kind, port: free_port(), dir, child: None };
        if kind == Kind::Sftp {
            server.make_keys();
        }
        server.start();
        if kind == Kind::Moto {
            server.python("client.create_bucket(Bucket='bucket', ObjectLockEnabledForBucket=True)");
        }
        server
    }

    fn make_keys(&self) {
        for name in ["host", "user", "stranger"] {
            let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(self.dir.join(name)).status().unwrap();
            assert!(made.success());
        }
        fs::copy(self.dir.join("user.pub"), self.dir.join("authorized_keys")).unwrap();
        let (dir, port) = (self.dir.display(), self.port);
        let known = format!("[127.0.0.1]:{port} {}", fs::read_to_string(self.dir.join("host.pub")).unwrap());
        fs::write(self.dir.join("known_hosts"), known).unwrap();
        let config = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {dir}/host\nAuthorizedKeysFile {dir}/authorized_keys\nStrictModes no\nUsePAM no\n\
             PidFile none\nPasswordAuthentication no\nMaxStartups 200\nMaxSessions 200\nSubsystem sftp internal-sftp\n"
        );
        fs::write(self.dir.join("sshd_config"), config).unwrap();
        // The daemon's ssh trusts this server and nobody else, whatever the machine's own files say.
        let ssh = format!(
            "#!/bin/sh\nexec /usr/bin/ssh -F /dev/null -o UserKnownHostsFile={dir}/known_hosts -o GlobalKnownHostsFile=/dev/null \"$@\"\n"
        );
        fs::write(self.dir.join("bin/ssh"), ssh).unwrap();
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(self.dir.join("bin/ssh"), fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// What the daemon's environment needs to reach it.
    pub fn environment(&self) -> Vec<(String, String)> {
        let path = format!("{}:{}", self.dir.join("bin").display(), std::env::var("PATH").unwrap());
        vec![("PATH".into(), path), ("XDG_STATE_HOME".into(), self.dir.display().to_string())]
    }

    pub fn start(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.join("log")).unwrap();
        let address = format!("127.0.0.1:{}", self.port);
        let data = self.dir.join("data");
        let mut command = match self.kind {
            Kind::Moto => {
                let mut command = Command::new(tool("moto_server"));
                command.args(["-H", "127.0.0.1", "-p", &self.port.to_string()]);
                command
            }
            Kind::Sftp => {
                // It wants a directory for its unprivileged half.
                let _ = fs::create_dir_all("/run/sshd");
                let mut command = Command::new("/usr/sbin/sshd");
                command.args(["-D", "-e", "-f"]).arg(self.dir.join("sshd_config"));
                command
            }
            rclone => {
                let mut command = Command::new(tool("rclone"));
                command.env("RCLONE_CONFIG", self.dir.join("rclone.conf"));
                match rclone {
                    Kind::S3 => command.args(["serve", "s3", "--auth-key", &format!("{USER},{SECRET}")]),
                    Kind::Webdav => command.args(["serve", "webdav", "--user", USER, "--pass", SECRET]),
                    _ => command.args(["serve", "ftp", "--user", USER, "--pass", SECRET]),
                };
                command.args(["--addr", &address]).arg(&data);
                command
            }
        };
        self.child = Some(command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap());
        let since = Instant::now();
        while TcpStream::connect(&address).is_err() {
            assert!(since.elapsed() < Duration::from_secs(60), "{:?} does not answer: {}", self.kind, self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// As a power cut: every connection ends.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            for pid in descendants(child.id()) {
                let _ = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Where its objects lie, as files (not moto's).
    pub fn data(&self) -> PathBuf {
        match self.kind {
            Kind::S3 => self.dir.join("data/bucket/pre"),
            Kind::Sftp => self.dir.join("data/pre"),
            _ => self.dir.join("data/pre"),
        }
    }

    /// A destination's table for it.
    pub fn destination(&self, name: &str, more: &str) -> String {
        self.destination_at(name, self.port, SECRET, more)
    }

    /// The same through another port, or with another secret (for ssh: the name of another key).
    pub fn destination_at(&self, name: &str, port: u16, secret: &str, more: &str) -> String {
        let dir = self.dir.display();
        let file = self.dir.join(format!("secret-{}", secret.len()));
        fs::write(&file, format!("{secret}\n")).unwrap();
        let file = file.display();
        let options = match self.kind {
            Kind::S3 | Kind::Moto => format!(
                "service = \"s3\"\nbucket = \"bucket\"\nroot = \"pre\"\nendpoint = \"http://127.0.0.1:{port}\"\nregion = \"us-east-1\"\n\
                 access_key_id = \"{USER}\"\nsecret_access_key = {{ file = \"{file}\" }}"
            ),
            Kind::Webdav => format!(
                "service = \"webdav\"\nendpoint = \"http://127.0.0.1:{port}\"\nroot = \"/pre\"\nusername = \"{USER}\"\npassword = {{ file = \"{file}\" }}"
            ),
            Kind::Ftp => format!(
                "service = \"ftp\"\nendpoint = \"ftp://127.0.0.1:{port}\"\nroot = \"/pre\"\nuser = \"{USER}\"\npassword = {{ file = \"{file}\" }}"
            ),
            Kind::Sftp => {
                let key = if secret == SECRET { "user" } else { "stranger" };
                format!(
                    "service = \"sftp\"\nendpoint = \"ssh://127.0.0.1:{port}\"\nuser = \"root\"\nkey = \"{dir}/{key}\"\nroot = \"{dir}/data/pre\""
                )
            }
        };
        format!("[destination.{name}]\n{options}\nencryption = \"main\"\n{more}\n")
    }

    /// Runs Python with a client of the S3 interface; gives what it printed.
    pub fn python(&self, program: &str) -> String {
        let client = format!(
            "import boto3, os\nclient = boto3.client('s3', endpoint_url='http://127.0.0.1:{}', region_name='us-east-1', aws_access_key_id='{USER}', aws_secret_access_key=os.environ['SECRET'])\n",
            self.port
        );
        // Not as an argument: other tests look for the secret in those of all processes.
        let out = Command::new(super::python()).args(["-c", &format!("{client}{program}")]).env("SECRET", SECRET).output().unwrap();
        assert!(out.status.success(), "{}", super::text(&out));
        String::from_utf8(out.stdout).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn descendants(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(child) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
        if parent == Some(pid) {
            found.extend(descendants(child));
            found.push(child);
        }
    }
    found
}

/// A way to a port that can be made to swallow everything.
pub struct Tap {
    pub port: u16,
    pub stalled: Arc<AtomicBool>,
}

impl Tap {
    pub fn before(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let tap = Self { port: listener.local_addr().unwrap().port(), stalled: Arc::default() };
        let stalled = tap.stalled.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else { continue };
                for (from, to) in [(client.try_clone(), server.try_clone()), (server.try_clone(), client.try_clone())] {
                    let (Ok(from), Ok(to), stalled) = (from, to, stalled.clone()) else { continue };
                    std::thread::spawn(move || pass_on(from, to, &stalled));
                }
            }
        });
        tap
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, stalled: &AtomicBool) {
    let mut buffer = [0; 16 << 10];
    while let Ok(n) = from.read(&mut buffer) {
        while stalled.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
        }
        if n == 0 || to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
