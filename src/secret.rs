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

fn read_file(path: &Path) -> Result<String, String> {
    use std::io::Read;
    let shown = path.display();
    let file = std::fs::File::open(path).map_err(|e| format!("cannot open {shown}: {e}"))?;
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(|e| format!("cannot read {shown}: {e}"))?;
    if text.len() as u64 > MAX_BYTES {
        return Err(format!("{shown} is longer than any secret"));
    }
    // Editors end a file with a line feed.
    let secret = text.strip_suffix('\n').unwrap_or(&text);
    let secret = secret.strip_suffix('\r').unwrap_or(secret);
    match secret.is_empty() {
        true => Err(format!("{shown} is empty")),
        false => Ok(secret.to_owned()),
    }
}
