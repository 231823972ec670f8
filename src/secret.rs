//! Secrets, read where the configuration says they are, when they are needed.

use std::path::{Path, PathBuf};

use crate::config::SecretSource;

/// No secret is longer, in bytes.
const MAX_BYTES: u64 = 64 << 10;

/// A secret; the error names the place, never a value.
pub fn read(source: &SecretSource) -> Result<String, String> {
    match source {
        SecretSource::File(path) => read_file(path),
        SecretSource::Credential(name) => {
            let directory = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from).ok_or_else(|| {
                format!("the service manager gave no credentials; put LoadCredential={name}:/path (or LoadCredentialEncrypted=) into keepd's unit")
            })?;
            read_file(&directory.join(name))
        }
        SecretSource::Environment(name) => {
            std::env::var(name).map_err(|_| format!("the variable {name} is not in keepd's environment, or is no text"))
        }
    }
}

/// Whether the service manager runs this process beside its service and not as it (`ExecReload=`): such a one is told the service's process, and is not given
/// its credentials, so nothing can be said of them here.
pub fn is_beside_service() -> bool {
    std::env::var_os("MAINPID").is_some() && std::env::var_os("CREDENTIALS_DIRECTORY").is_none()
}

/// A file whose contents are a secret as they are, to the last line feed: a private key of ssh.
pub fn read_whole(path: &Path) -> Result<String, String> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let shown = path.display();
    let cannot = |e: std::io::Error| format!("cannot open {shown}: {e}");
    let is_file = |found: &std::fs::Metadata| match found.is_file() {
        true => Ok(()),
        false => Err(format!("{shown} is not a regular file, so no secret is read from it")),
    };
    // To open a device or a FIFO can mean something by itself, or wait for ever.
    is_file(&std::fs::metadata(path).map_err(cannot)?)?;
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    let mut options = std::fs::File::options();
    let file = options.read(true).custom_flags(i32::try_from(flags.bits()).unwrap_or_default()).open(path).map_err(cannot)?;
    is_file(&file.metadata().map_err(cannot)?)?;
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(|e| format!("cannot read {shown}: {e}"))?;
    if text.len() as u64 > MAX_BYTES {
        return Err(format!("{shown} is longer than any secret"));
    }
    match text.is_empty() {
        true => Err(format!("{shown} is empty")),
        false => Ok(text),
    }
}

fn read_file(path: &Path) -> Result<String, String> {
    let text = read_whole(path)?;
    // Editors end a file with a line feed.
    let secret = text.strip_suffix('\n').unwrap_or(&text);
    let secret = secret.strip_suffix('\r').unwrap_or(secret);
    match secret.is_empty() {
        true => Err(format!("{} is empty", path.display())),
        false => Ok(secret.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_read_from_regular_files_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("secret");
        std::fs::write(&path, "s\n").unwrap();
        assert_eq!(read(&SecretSource::File(path)).unwrap(), "s");
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        for path in [fifo.as_path(), Path::new("/dev/zero"), directory.path()] {
            assert!(read(&SecretSource::File(path.to_owned())).unwrap_err().contains("not a regular file"), "{}", path.display());
        }
    }
}
