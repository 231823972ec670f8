//! The way to another machine: the system's ssh, with its configuration, its keys and its questions.

use std::fmt;
use std::process::{Command, Stdio};
use std::str::FromStr;

use clap::Args;
use shell_escape::unix::escape as quoted;

/// Where `--host` leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    user: Option<String>,
    /// A name, an address, or an alias of ssh's configuration.
    machine: String,
    port: Option<u16>,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(user) = &self.user {
            write!(f, "{user}@")?;
        }
        match self.port {
            Some(port) if self.machine.contains(':') => write!(f, "[{}]:{port}", self.machine),
            Some(port) => write!(f, "{}:{port}", self.machine),
            None => f.write_str(&self.machine),
        }
    }
}

impl FromStr for Host {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("{why}; write it as [user@]machine[:port], or ssh://[user@]machine[:port]");
        let (rest, is_url) = match text.strip_prefix("ssh://") {
            Some(rest) => (rest.strip_suffix('/').unwrap_or(rest), true),
            None => (text, false),
        };
        let (user, rest) = match rest.rsplit_once('@') {
            Some((user, rest)) => (Some(user), rest),
            None => (None, rest),
        };
        let (machine, port) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((machine, "")) => (machine, None),
            Some((machine, port)) => (machine, Some(port.strip_prefix(':').ok_or_else(|| wrong("behind ']' stands no port"))?)),
            None => match rest.split_once(':') {
                // An IPv6 address without brackets.
                Some((_, port)) if port.contains(':') && !is_url => (rest, None),
                Some((machine, port)) => (machine, Some(port)),
                None => (rest, None),
            },
        };
        let port = match port {
            None => None,
            Some(digits) => match digits.parse::<u16>() {
                Ok(port) if port > 0 && digits.bytes().all(|b| b.is_ascii_digit()) => Some(port),
                _ => return Err(wrong(&format!("'{}' is no port", digits.escape_debug()))),
            },
        };
        // ssh hands both on to programs of its configuration (ProxyCommand, Match exec), and takes what begins with '-' for an option.
        let fit = |word: &str, more: &str| {
            !word.is_empty() && !word.starts_with('-') && word.chars().all(|c| c.is_alphanumeric() || more.contains(c)) && word.len() <= 255
        };
        if let Some(user) = user
            && !fit(user, "._-+@\\$")
        {
            return Err(wrong(&format!("'{}' is no name of a user", user.escape_debug())));
        }
        if !fit(machine, "._-:%") {
            return Err(wrong(&format!("'{}' is no name of a machine", machine.escape_debug())));
        }
        Ok(Self { user: user.map(str::to_owned), machine: machine.to_owned(), port })
    }
}

/// Where the daemon is.
#[derive(Args, Clone, Default)]
pub struct RemoteArguments {
    /// The daemon of another machine, through ssh, with the rights of the user there (else $KEEPD_HOST): [user@]machine[:port], ssh://…, or a name of ssh's configuration
    #[arg(long, short = 'H', global = true, value_name = "HOST", allow_hyphen_values = true)]
    pub host: Option<String>,
    /// With --host: keepctl there, where the shell does not find it (else $KEEPD_REMOTE_KEEPCTL)
    #[arg(long, global = true, value_name = "PATH")]
    pub remote_command: Option<String>,
    /// With --host: an option for ssh, as its -o takes it; may be repeated
    #[arg(long, global = true, value_name = "OPTION")]
    pub ssh_option: Vec<String>,
}

impl RemoteArguments {
    pub fn host(&self) -> Result<Option<Host>, String> {
        let of_environment = || std::env::var("KEEPD_HOST").ok().filter(|host| !host.is_empty());
        let (text, from) = match (&self.host, of_environment()) {
            (Some(host), _) => (host.clone(), "--host"),
            (None, Some(host)) => (host, "$KEEPD_HOST"),
            (None, None) => return Ok(None),
        };
        text.parse().map(Some).map_err(|why| format!("{from}: {why}"))
    }

    /// keepctl, as it is called there.
    pub fn keepctl_there(&self) -> String {
        let of_environment = || std::env::var("KEEPD_REMOTE_KEEPCTL").ok();
        self.remote_command.clone().or_else(of_environment).filter(|c| !c.is_empty()).unwrap_or_else(|| "keepctl".into())
    }

    /// ssh with the bridge to this socket at its other end. Its standard input and output are the line, its errors come through a pipe.
    pub fn command(&self, host: &Host, socket: Option<&str>) -> Result<Command, String> {
        let keepctl = self.keepctl_there();
        if keepctl.starts_with('-') || keepctl.chars().any(char::is_control) {
            return Err(format!("'{}' is no path of keepctl there", keepctl.escape_debug()));
        }
        if socket.is_some_and(|socket| socket.chars().any(char::is_control)) {
            return Err("--socket: this is no path of a socket there".into());
        }
        let line = ssh();
        // What is more than a name may be no command for 'exec' (X=y ssh).
        let exec = if is_simple(&line) { "exec " } else { "" };
        let mut command = Command::new("/bin/sh");
        // Ctrl-C is keepctl's, or its editor's: the run is cancelled through this very line.
        command.arg("-c").arg(format!("trap '' INT QUIT; {exec}{line} \"$@\"")).arg("ssh");
        command.args(["-T", "-a", "-x", "-k", "-o", "ClearAllForwardings=yes", "-o", "Tunnel=no"]);
        command.args(["-o", "RemoteCommand=none", "-o", "PermitLocalCommand=no"]);
        let can_ask = std::fs::File::options().read(true).write(true).open("/dev/tty").is_ok() || std::env::var_os("SSH_ASKPASS").is_some();
        if !can_ask {
            command.args(["-o", "BatchMode=yes"]);
        }
        for option in &self.ssh_option {
            command.arg("-o").arg(option);
        }
        if let Some(port) = host.port {
            command.arg("-p").arg(port.to_string());
        }
        if let Some(user) = &host.user {
            command.arg("-l").arg(user);
        }
        // ssh joins what follows with spaces, and the shell there reads it.
        let socket = socket.map(|socket| format!(" {}", quoted(format!("--socket={socket}").into()))).unwrap_or_default();
        command.arg("--").arg(&host.machine).arg(format!("{}{socket} bridge", quoted(keepctl.into())));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command)
    }
}

/// What runs here, for the shell to read.
fn ssh() -> String {
    std::env::var("KEEPD_SSH_COMMAND").ok().filter(|c| !c.trim().is_empty()).unwrap_or_else(|| "ssh".into())
}

/// The program that a line for the shell runs, where it takes no shell to tell.
fn program(line: &str) -> Option<&str> {
    let is_plain = |word: &&str| word.bytes().all(|b| b.is_ascii_alphanumeric() || b"_./,:@%+-=".contains(&b));
    let word = line.split_ascii_whitespace().find(|word| !is_plain(word) || !word.contains('='))?;
    Some(word).filter(|word| is_plain(word) && !word.starts_with('-'))
}

/// Whether it is one command and nothing before it, which can take the shell's place: signals meant for it then find it.
fn is_simple(line: &str) -> bool {
    let of_the_shell = ["exec", "command", "eval", "builtin", "source", "."];
    let first = line.split_ascii_whitespace().next();
    first.is_some()
        && first == program(line)
        && !first.is_some_and(|word| of_the_shell.contains(&word))
        && !line.contains([';', '&', '|', '<', '>', '\n', '`', '(', ')', '#'])
}

/// Whether there is an ssh on this machine; where the shell alone can tell, it will.
pub fn is_here() -> Result<(), String> {
    let line = ssh();
    let Some(program) = program(&line) else { return Ok(()) };
    let found = Command::new("/bin/sh").args(["-c", "command -v \"$1\"", "sh", program]).stdin(Stdio::null()).output();
    let named = if line == "ssh" { "install OpenSSH's client" } else { "$KEEPD_SSH_COMMAND names it" };
    match found {
        Ok(found) if !found.status.success() => Err(format!("cannot start ssh: there is no program '{program}' on this machine; {named}")),
        _ => Ok(()),
    }
}

/// What else a shell may mean that does not find a program.
pub fn or_here() -> String {
    let line = ssh();
    match program(&line) {
        Some(_) => String::new(),
        None => format!(" (or $KEEPD_SSH_COMMAND, '{}', names no program of this machine)", line.escape_debug()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_read_as_ssh_reads_them() {
        let host = |user: Option<&str>, machine: &str, port| Host { user: user.map(str::to_owned), machine: machine.into(), port };
        for (text, wanted) in [
            ("web1", host(None, "web1", None)),
            ("root@web1.example.org", host(Some("root"), "web1.example.org", None)),
            ("web1:2222", host(None, "web1", Some(2222))),
            ("ssh://me@web1:22/", host(Some("me"), "web1", Some(22))),
            ("ann@corp.example@web1", host(Some("ann@corp.example"), "web1", None)),
            ("CORP\\ann@web1", host(Some("CORP\\ann"), "web1", None)),
            ("fe80::1%eth0", host(None, "fe80::1%eth0", None)),
            ("root@[::1]:2200", host(Some("root"), "::1", Some(2200))),
            ("[::1]", host(None, "::1", None)),
        ] {
            assert_eq!(text.parse::<Host>().unwrap(), wanted, "{text}");
        }
        for wrong in [
            "",
            "@web1",
            "-oProxyCommand=x",
            "root@-x",
            "-l@web1",
            "web1:",
            "web1:0",
            "web1:+22",
            "web1:99999",
            "web 1",
            "web1;id",
            "$(id)@web1 ",
            "a`id`",
            "web1\n",
            "[::1",
            "[::1]x",
            "a/b",
            "ssh://",
            "ssh://a:b:c",
            "web1'",
            "a\u{1b}[2J",
        ] {
            let why = wrong.parse::<Host>().unwrap_err();
            assert!(!why.chars().any(char::is_control), "{wrong}: {why}");
        }
    }

    #[test]
    fn the_program_of_a_line_is_told_where_it_is_plain() {
        for (line, wanted) in [
            ("ssh", Some("ssh")),
            ("ssh -F '/a b'", Some("ssh")),
            ("X=y Z= /opt/ssh -v", Some("/opt/ssh")),
            ("X='a b' ssh", None),
            ("\"ssh\"", None),
            ("~/ssh", None),
            ("-x", None),
            ("", None),
        ] {
            assert_eq!(program(line), wanted, "{line}");
        }
        for (line, is) in
            [("ssh", true), ("ssh -F '/a b'", true), ("X=y ssh", false), ("exec ssh", false), ("ssh; true", false), ("", false)]
        {
            assert_eq!(is_simple(line), is, "{line}");
        }
    }

    #[test]
    fn nothing_of_a_path_is_read_by_the_shell_there() {
        let arguments = RemoteArguments { remote_command: Some("/opt/it's $(here)/keepctl".into()), ..RemoteArguments::default() };
        let last = |socket| {
            let command = arguments.command(&"web1".parse().unwrap(), socket).unwrap();
            command.get_args().last().unwrap().to_str().unwrap().to_owned()
        };
        assert_eq!(last(None), r"'/opt/it'\''s $(here)/keepctl' bridge");
        assert_eq!(last(Some("/run/a.sock")), r"'/opt/it'\''s $(here)/keepctl' --socket=/run/a.sock bridge");
        assert_eq!(last(Some("/run/`id` x")), r"'/opt/it'\''s $(here)/keepctl' '--socket=/run/`id` x' bridge");
        assert!(arguments.command(&"web1".parse().unwrap(), Some("a\nb")).is_err());
        let wrong = RemoteArguments { remote_command: Some("-x".into()), ..RemoteArguments::default() };
        assert!(wrong.command(&"web1".parse().unwrap(), None).is_err());
    }
}
