//! Where things are when the configuration does not say: the system's directories for root, the XDG directories for others.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// What the defaults depend on.
pub(super) struct Surroundings<'e> {
    pub root: bool,
    pub variable: &'e dyn Fn(&str) -> Option<OsString>,
}

impl Surroundings<'static> {
    pub fn of_this_process() -> Self {
        Self { root: rustix::process::geteuid().is_root(), variable: &|name| std::env::var_os(name) }
    }
}

impl Surroundings<'_> {
    /// `/etc/keepd/keepd.toml`, or `keepd/keepd.toml` below `$XDG_CONFIG_HOME`.
    pub fn config(&self) -> PathBuf {
        let home = if self.root { None } else { self.directory("XDG_CONFIG_HOME").or_else(|| self.below_home(".config")) };
        home.map_or_else(|| PathBuf::from("/etc/keepd/keepd.toml"), |home| home.join("keepd/keepd.toml"))
    }

    /// `$STATE_DIRECTORY` as systemd sets it, else `/var/lib/keepd`, else `keepd` below `$XDG_STATE_HOME`. None for a user
    /// without a home.
    pub fn state_dir(&self) -> Option<PathBuf> {
        self.directory("STATE_DIRECTORY").or_else(|| {
            if self.root {
                return Some("/var/lib/keepd".into());
            }
            let home = self.directory("XDG_STATE_HOME").or_else(|| self.below_home(".local/state"))?;
            Some(home.join("keepd"))
        })
    }

    /// `keepd.sock` in `$RUNTIME_DIRECTORY` as systemd sets it, else in `/run/keepd`, else in `keepd` below `$XDG_RUNTIME_DIR`,
    /// else in the state directory.
    pub fn socket(&self, state_dir: &Path) -> PathBuf {
        let directory = self
            .directory("RUNTIME_DIRECTORY")
            .or_else(|| if self.root { Some("/run/keepd".into()) } else { self.directory("XDG_RUNTIME_DIR").map(|d| d.join("keepd")) });
        directory.unwrap_or_else(|| state_dir.to_owned()).join("keepd.sock")
    }

    /// An absolute path in a variable, the first one when systemd gives several.
    fn directory(&self, variable: &str) -> Option<PathBuf> {
        use std::os::unix::ffi::{OsStrExt, OsStringExt};
        let value = (self.variable)(variable)?;
        let first = match variable {
            "STATE_DIRECTORY" | "RUNTIME_DIRECTORY" => value.as_bytes().split(|&b| b == b':').next()?,
            _ => value.as_bytes(),
        };
        let path = PathBuf::from(OsString::from_vec(first.to_vec()));
        path.is_absolute().then_some(path)
    }

    fn below_home(&self, directory: &str) -> Option<PathBuf> {
        self.directory("HOME").map(|home| home.join(directory))
    }
}

/// The configuration file when none is named.
pub fn default_path() -> PathBuf {
    Surroundings::of_this_process().config()
}

/// The socket when neither the configuration nor the caller names one; keepctl must look in the same place:
/// for root `/run/keepd/keepd.sock`, for others `$XDG_RUNTIME_DIR/keepd/keepd.sock`, or without that variable
/// `$XDG_STATE_HOME/keepd/keepd.sock` (`~/.local/state/keepd/keepd.sock`). None when there is not even a home.
pub fn default_socket() -> Option<PathBuf> {
    let here = Surroundings::of_this_process();
    match here.state_dir() {
        Some(state_dir) => Some(here.socket(&state_dir)),
        None => here.directory("XDG_RUNTIME_DIR").map(|d| d.join("keepd/keepd.sock")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<T>(root: bool, variables: &[(&str, &str)], ask: impl FnOnce(&Surroundings<'_>) -> T) -> T {
        let variable = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v));
        ask(&Surroundings { root, variable: &variable })
    }

    fn all(root: bool, variables: &[(&str, &str)]) -> (String, Option<String>, String) {
        with(root, variables, |s| {
            let text = |p: PathBuf| p.to_string_lossy().into_owned();
            let state = s.state_dir();
            let socket = s.socket(state.as_deref().unwrap_or(Path::new("/none")));
            (text(s.config()), state.map(text), text(socket))
        })
    }

    #[test]
    fn root_has_the_system_directories() {
        let found = all(true, &[("HOME", "/root"), ("XDG_RUNTIME_DIR", "/run/user/0"), ("XDG_STATE_HOME", "/x")]);
        assert_eq!(found, ("/etc/keepd/keepd.toml".into(), Some("/var/lib/keepd".into()), "/run/keepd/keepd.sock".into()));
    }

    #[test]
    fn systemd_has_the_last_word() {
        let found = all(true, &[("STATE_DIRECTORY", "/var/lib/a:/var/lib/b"), ("RUNTIME_DIRECTORY", "/run/a")]);
        assert_eq!(found, ("/etc/keepd/keepd.toml".into(), Some("/var/lib/a".into()), "/run/a/keepd.sock".into()));
    }

    #[test]
    fn users_have_the_xdg_directories() {
        let found = all(false, &[("HOME", "/home/u"), ("XDG_RUNTIME_DIR", "/run/user/7")]);
        assert_eq!(
            found,
            ("/home/u/.config/keepd/keepd.toml".into(), Some("/home/u/.local/state/keepd".into()), "/run/user/7/keepd/keepd.sock".into())
        );
        let found = all(false, &[("HOME", "/home/u"), ("XDG_CONFIG_HOME", "/c"), ("XDG_STATE_HOME", "/s")]);
        assert_eq!(found, ("/c/keepd/keepd.toml".into(), Some("/s/keepd".into()), "/s/keepd/keepd.sock".into()));
    }

    #[test]
    fn relative_and_missing_ones_do_not_count() {
        assert_eq!(all(false, &[("XDG_STATE_HOME", "s"), ("HOME", "/h")]).1, Some("/h/.local/state/keepd".into()));
        assert_eq!(all(false, &[]).1, None);
    }
}
