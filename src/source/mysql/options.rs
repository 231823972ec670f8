//! The file of options that the tools read their connection from: the one place where a password may stand.

use zeroize::Zeroizing;

use crate::config::ServerSource;

/// The tools read lines into a buffer of 4096 bytes and take the rest for a line of its own.
const MOST_LINE: usize = 4000;

/// Whose tool it is: they differ in the options they know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    MariaDb,
    /// Oracle's, or Percona's. `statistics`: it knows `--column-statistics` (from 8.0 on) and uses it unless told otherwise.
    MySql {
        statistics: bool,
    },
}

impl Family {
    /// What `--version` says.
    pub fn of(version: &str) -> Self {
        match version.contains("MariaDB") {
            true => Family::MariaDb,
            false => Family::MySql { statistics: !version.contains("Distrib 5.") },
        }
    }
}

/// The file's text. The error says what cannot stand in it.
pub fn text(source: &ServerSource, password: Option<&str>, family: Family) -> Result<Zeroizing<Vec<u8>>, String> {
    let mut out = Zeroizing::new(b"[client]\n".to_vec());
    let mut set = |key: &str, value: &str| {
        let line = Zeroizing::new(format!("{key}={}\n", quoted(key, value)?.as_str()));
        if line.len() > MOST_LINE {
            return Err(format!("{key}: it is longer than MySQL's tools can read"));
        }
        // Not to leave parts of a secret behind where a buffer was.
        let mut longer = Zeroizing::new(Vec::with_capacity(out.len() + line.len()));
        longer.extend_from_slice(&out);
        longer.extend_from_slice(line.as_bytes());
        out = longer;
        Ok(())
    };
    if let Some(user) = &source.user {
        set("user", user)?;
    }
    if let Some(password) = password {
        set("password", password)?;
    }
    if let Some(host) = &source.host {
        set("host", host)?;
    }
    if let Some(socket) = &source.socket {
        set("socket", socket.to_str().ok_or("socket: its path is no text")?)?;
        set("protocol", "socket")?;
    }
    if let Some(port) = source.port {
        set("port", &port.to_string())?;
        // Without this, "localhost" means the socket, whatever the port.
        if source.socket.is_none() {
            set("protocol", "tcp")?;
        }
    }
    let flags: &[u8] = match (source.sslmode.as_deref(), family) {
        (None, _) => b"",
        (Some("disable"), Family::MariaDb) => b"skip-ssl\n",
        // Later clients verify by themselves; to be encrypted is all that is asked for.
        (Some("require"), Family::MariaDb) => b"ssl\nskip-ssl-verify-server-cert\n",
        (Some(_), Family::MariaDb) => b"ssl\nssl-verify-server-cert\n",
        (Some("disable"), _) => b"ssl-mode=DISABLED\n",
        (Some("require"), _) => b"ssl-mode=REQUIRED\n",
        (Some(_), _) => b"ssl-mode=VERIFY_IDENTITY\n",
    };
    out.extend_from_slice(flags);
    Ok(out)
}

/// A value in quotes, so that `#` begins no comment and spaces at its ends count.
fn quoted(key: &str, value: &str) -> Result<Zeroizing<String>, String> {
    let mut out = Zeroizing::new(String::with_capacity(value.len() * 2 + 2));
    out.push('"');
    for c in value.chars() {
        match c {
            '\n' | '\0' => return Err(format!("{key}: it holds a line feed or a NUL, which MySQL's tools cannot be given")),
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            c => out.push(c),
        }
    }
    out.push('"');
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Databases;

    fn source() -> ServerSource {
        ServerSource {
            databases: Databases::All,
            host: None,
            port: None,
            socket: None,
            user: Some("keepd".into()),
            password: None,
            bin_dir: None,
            run_as: None,
            timeout: std::time::Duration::from_secs(1),
            globals: false,
            exclude_tables: Vec::new(),
            sslmode: None,
        }
    }

    fn written(source: &ServerSource, password: &str, family: Family) -> Result<String, String> {
        text(source, Some(password), family).map(|t| String::from_utf8(t.to_vec()).unwrap())
    }

    #[test]
    fn whatever_a_password_holds_is_in_quotes() {
        let file = written(&source(), " a\"b\\c#d'e=[x]\t ", Family::MariaDb).unwrap();
        assert_eq!(file, "[client]\nuser=\"keepd\"\npassword=\" a\\\"b\\\\c#d'e=[x]\\t \"\n");
        for wrong in ["canary\nb", "canary\0b"] {
            let error = written(&source(), wrong, Family::MariaDb).unwrap_err();
            assert!(error.contains("password: it holds a line feed or a NUL") && !error.contains("canary"), "{error}");
        }
        assert!(written(&source(), &"x".repeat(5000), Family::MariaDb).unwrap_err().contains("longer"));
    }

    #[test]
    fn each_family_is_told_in_its_own_words() {
        assert_eq!(Family::of("mariadb-dump  Ver 10.19 Distrib 10.11.19-MariaDB, for debian-linux-gnu (x86_64)"), Family::MariaDb);
        assert_eq!(Family::of("mariadb-dump from 11.4.2-MariaDB, client 10.19 for Linux (x86_64)"), Family::MariaDb);
        let mysql = Family::of("mysqldump  Ver 8.0.36 for Linux on x86_64 (MySQL Community Server - GPL)");
        assert_eq!(mysql, Family::MySql { statistics: true });
        assert_eq!(Family::of("mysqldump  Ver 10.13 Distrib 5.7.44, for linux-glibc2.12 (x86_64)"), Family::MySql { statistics: false });
        let tcp = ServerSource { host: Some("localhost".into()), port: Some(3307), sslmode: Some("verify-full".into()), ..source() };
        let file = written(&tcp, "p", mysql).unwrap();
        assert!(file.ends_with("host=\"localhost\"\nport=\"3307\"\nprotocol=\"tcp\"\nssl-mode=VERIFY_IDENTITY\n"), "{file}");
        let socket = ServerSource { socket: Some("/run/a b.sock".into()), sslmode: Some("require".into()), ..source() };
        let file = written(&socket, "p", Family::MariaDb).unwrap();
        assert!(file.ends_with("socket=\"/run/a b.sock\"\nprotocol=\"socket\"\nssl\nskip-ssl-verify-server-cert\n"), "{file}");
    }
}
