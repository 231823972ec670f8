//! Where the backups are: a URL, a directory, or a destination of a TOML file.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::{Failure, Result};
use crate::config::{self, Destination, OptionValue, SecretSource};

/// The name of a destination that has none.
const NAME: &str = "rescue";

/// What `--destination` says.
pub fn destination(text: &OsStr, name: Option<&str>) -> Result<Destination> {
    let path = Path::new(text);
    if let Some(path) = text.as_bytes().strip_prefix(b"fs:") {
        return directory(Path::new(OsStr::from_bytes(path)));
    }
    let url = text.to_str().and_then(|t| t.split_once("://"));
    match url {
        Some(("s3", rest)) => Ok(s3(rest)),
        Some(("sftp", rest)) => sftp(rest),
        Some((scheme @ ("webdav" | "webdavs"), rest)) => webdav(scheme == "webdavs", rest),
        Some((scheme, _)) => Err(Failure::usage(format!(
            "'{scheme}://' is no scheme known here; allowed are fs:, s3://, sftp://, webdav:// and webdavs://; other services are named by a TOML file with a [destination.NAME]"
        ))),
        None if path.is_file() => of_file(path, name),
        None if path.is_dir() || path.is_absolute() => directory(path),
        None => Err(Failure::usage(format!(
            "--destination {}: there is no such directory or TOML file; give fs:/path, s3://bucket/prefix, sftp://user@host/path, webdavs://host/path or a file",
            path.display()
        ))),
    }
}

/// The directory and the name of an archive, where that is what is named.
pub fn archive(text: &OsStr) -> Option<(std::path::PathBuf, String)> {
    let path = Path::new(OsStr::from_bytes(text.as_bytes().strip_prefix(b"fs:").unwrap_or(text.as_bytes())));
    let name = path.file_name()?.to_str()?;
    if !path.is_file() || !name.contains(".tar") {
        return None;
    }
    let path = std::path::absolute(path).ok()?;
    Some((path.parent()?.to_owned(), name.to_owned()))
}

fn directory(path: &Path) -> Result<Destination> {
    let path = std::path::absolute(path).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
    if !path.is_dir() {
        return Err(Failure::failed(format!("there is no directory {}; is the disk mounted?", path.display())));
    }
    let root = path.to_str().ok_or_else(|| Failure::usage(format!("{}: the path must be UTF-8", path.display())))?;
    Ok(Destination::plain(NAME, "fs", options([("root", Some(root.to_owned()))])))
}

fn options<'a>(list: impl IntoIterator<Item = (&'a str, Option<String>)>) -> BTreeMap<String, OptionValue> {
    list.into_iter().filter_map(|(key, value)| Some((key.to_owned(), OptionValue::Plain(value?)))).collect()
}

fn variable(names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| env::var(name).ok()).filter(|value| !value.is_empty())
}

/// A secret in the environment.
fn secret(name: &str) -> Option<OptionValue> {
    env::var_os(name).filter(|v| !v.is_empty()).map(|_| OptionValue::Secret(SecretSource::Environment(name.to_owned())))
}

fn s3(rest: &str) -> Destination {
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let mut options = options([
        ("bucket", Some(bucket.to_owned())),
        ("root", Some(prefix.trim_matches('/').to_owned()).filter(|p| !p.is_empty())),
        ("endpoint", variable(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])),
        ("region", variable(&["AWS_REGION", "AWS_DEFAULT_REGION"]).or_else(|| Some("us-east-1".into()))),
        ("access_key_id", variable(&["AWS_ACCESS_KEY_ID"])),
    ]);
    for (key, name) in [("secret_access_key", "AWS_SECRET_ACCESS_KEY"), ("session_token", "AWS_SESSION_TOKEN")] {
        options.extend(secret(name).map(|value| (key.to_owned(), value)));
    }
    Destination::plain(NAME, "s3", options)
}

/// User, host with its port, and path of what stands behind `://`.
fn parts(rest: &str) -> Result<(Option<&str>, &str, &str)> {
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let (user, host) = authority.rsplit_once('@').map_or((None, authority), |(user, host)| (Some(user), host));
    if user.is_some_and(|user| user.contains(':')) {
        return Err(Failure::usage("a password does not belong into --destination, where everybody on this machine can read it"));
    }
    if host.is_empty() {
        return Err(Failure::usage("--destination names no host"));
    }
    Ok((user, host, path))
}

fn sftp(rest: &str) -> Result<Destination> {
    let (user, host, path) = parts(rest)?;
    let options = options([
        ("endpoint", Some(format!("ssh://{host}"))),
        ("user", user.map(str::to_owned)),
        ("root", Some(path.to_owned()).filter(|p| !p.is_empty())),
        ("key", variable(&["SFTP_KEY"])),
    ]);
    Ok(Destination::plain(NAME, "sftp", options))
}

fn webdav(is_sealed: bool, rest: &str) -> Result<Destination> {
    let (user, host, path) = parts(rest)?;
    let scheme = if is_sealed { "https" } else { "http" };
    let mut options = options([
        ("endpoint", Some(format!("{scheme}://{host}"))),
        ("username", user.map(str::to_owned)),
        ("root", Some(path.to_owned()).filter(|p| !p.is_empty())),
    ]);
    options.extend(secret("WEBDAV_PASSWORD").map(|value| ("password".to_owned(), value)));
    Ok(Destination::plain(NAME, "webdav", options))
}

fn of_file(path: &Path, name: Option<&str>) -> Result<Destination> {
    let mut all = config::load_destinations(path).map_err(|problems| Failure::failed(problems.to_string()))?;
    let names = || all.keys().cloned().collect::<Vec<_>>().join(", ");
    let found = match name {
        Some(name) if all.contains_key(name) => name.to_owned(),
        Some(name) => return Err(Failure::usage(format!("{} has no destination '{name}'; it has {}", path.display(), names()))),
        None => match all.len() {
            0 => return Err(Failure::usage(format!("{} has no [destination.NAME]", path.display()))),
            1 => names(),
            _ => return Err(Failure::usage(format!("{} has several destinations; name one with --name: {}", path.display(), names()))),
        },
    };
    all.remove(&found).ok_or_else(|| Failure::usage(format!("there is no destination '{found}'")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn option<'d>(destination: &'d Destination, key: &str) -> Option<&'d str> {
        destination.options.get(key).and_then(OptionValue::plain)
    }

    #[test]
    fn places_are_read() {
        let of = |text: &str| destination(OsStr::new(text), None);
        let s3 = of("s3://bucket/deep/prefix/").unwrap();
        assert_eq!((s3.service.as_str(), option(&s3, "bucket"), option(&s3, "root")), ("s3", Some("bucket"), Some("deep/prefix")));
        assert_eq!(option(&of("s3://bucket").unwrap(), "root"), None);
        let sftp = of("sftp://me@host:2222/srv/backups").unwrap();
        assert_eq!(
            (option(&sftp, "endpoint"), option(&sftp, "user"), option(&sftp, "root")),
            (Some("ssh://host:2222"), Some("me"), Some("/srv/backups"))
        );
        let webdav = of("webdavs://me@host/remote/dav").unwrap();
        assert_eq!((option(&webdav, "endpoint"), option(&webdav, "root")), (Some("https://host"), Some("/remote/dav")));
        let here = std::env::temp_dir();
        assert_eq!(of(here.to_str().unwrap()).unwrap().directory(), of(&format!("fs:{}", here.display())).unwrap().directory());
        for (wrong, exit) in [
            ("webdav://me:secret@host/", super::super::Exit::Usage),
            ("sftp:///path", super::super::Exit::Usage),
            ("gopher://host/", super::super::Exit::Usage),
            ("no-such-thing", super::super::Exit::Usage),
            ("fs:/no/such/directory", super::super::Exit::Failed),
        ] {
            let failure = of(wrong).unwrap_err();
            assert_eq!(failure.exit, exit, "{wrong}: {}", failure.text);
            assert!(!failure.text.contains("secret"), "{}", failure.text);
        }
    }
}
