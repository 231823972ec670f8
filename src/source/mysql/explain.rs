//! Errors of the tools, in words that tell what to do.

use crate::config::ServerSource;
use crate::process::ProcessError;
use crate::source::SourceError;

/// Numbers of errors, how they are worded (a server may be set to another language), and what to do about them.
const HINTS: [(&[u16], &[&str], &str); 11] = [
    (&[1044, 1142, 1143, 1227, 1370], &["command denied to user", "insufficient privileges", "Access denied; you need"], RIGHTS),
    (&[1049], &["Unknown database"], "the server has no such database, or its user may not see it; check dbname"),
    (
        &[1698],
        &["is not allowed to connect"],
        "the server does not let this user in from here; give a user of keepd's own, or run_as for one that the server knows by its system user",
    ),
    (&[1045], &["Access denied for user"], ""),
    (
        &[2026],
        &["SSL error", "SSL connection error"],
        "the connection cannot be encrypted as sslmode wants it; set up TLS on the server, or change sslmode",
    ),
    (
        &[2002, 2003, 2005],
        &["Can't connect to", "Unknown server host", "Unknown MySQL server host"],
        "the server does not answer; check that it runs, and host and port, or socket",
    ),
    (
        &[2006, 2013],
        &["Lost connection to", "server has gone away"],
        "the server broke off the connection; its error log tells why (it may have been stopped, or run out of memory, or max_allowed_packet may be smaller than a row)",
    ),
    (
        &[1356],
        &["references invalid table(s)"],
        "a view names what is not there any more; repair it or drop it, or leave it out: exclude_tables = [\"NAME\"]",
    ),
    (
        &[1412],
        &["Table definition has changed"],
        "a table was altered while it was dumped; try again, and not during an update of the application",
    ),
    (
        &[1273, 1115],
        &["Unknown collation", "Unknown character set"],
        "this server is older than the one the dump is of, or of another kind",
    ),
    (
        &[1153],
        &["Got a packet bigger than", "packet bigger than 'max_allowed_packet'"],
        "a row is longer than the server takes; raise max_allowed_packet in its configuration",
    ),
];

const RIGHTS: &str = "the user has not all rights that this needs; to dump: GRANT SELECT, SHOW VIEW, TRIGGER, EVENT ON db.* TO user, and for routines \
                      SELECT ON mysql.proc (MariaDB) or SHOW_ROUTINE ON *.* (MySQL); to restore: ALL ON *.*";

/// An error with what to do about it, if that is known.
pub fn told(error: &ProcessError, source: &ServerSource) -> SourceError {
    let ProcessError::Failed(text) = error else { return SourceError::Cancelled };
    let is = |code: &u16| [format!("ERROR {code} "), format!("error: {code}:"), format!("({code})")].iter().any(|form| text.contains(form));
    let found = HINTS.iter().find(|(codes, words, _)| codes.iter().any(is) || words.iter().any(|w| text.contains(w)));
    let hint = match found {
        Some((_, _, "")) if source.password.is_none() => "give the source user and password = { file = \"…\" }",
        Some((_, _, "")) => "user or password is wrong; check both, and that the user may connect from this machine",
        Some((_, _, hint)) => hint,
        None => "",
    };
    let hint = if hint.is_empty() { String::new() } else { format!("{hint}. ") };
    SourceError::Failed(format!("{hint}{text}"))
}
