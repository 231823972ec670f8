//! `[daemon]`.

use super::Daemon;
use super::paths::Surroundings;
use super::reader::Table;

const MIB: u64 = 1 << 20;
const DEFAULT_MEMORY: u64 = 256 * MIB;
const LEAST_MEMORY: u64 = 64 * MIB;
const MOST_PARALLEL_RUNS: u64 = 64;
/// What fits into a socket's address, with the NUL at its end.
const LONGEST_SOCKET_PATH: usize = 107;

/// Reads the table; everything in it has a default.
pub(super) fn daemon(table: &Table<'_>, here: &Surroundings<'_>) -> Option<Daemon> {
    if table.path == "daemon" {
        table.check_keys(&["state_dir", "socket", "max_parallel_runs", "memory"], &[]);
    }
    let state_dir = match table.get("state_dir") {
        Some(item) => item.absolute_path(),
        None => {
            let default = here.state_dir();
            if default.is_none() {
                table.report("daemon.state_dir is missing: neither $HOME nor $XDG_STATE_HOME is set, so there is no default for it");
            }
            default
        }
    };
    let max_parallel_runs = match table.get("max_parallel_runs") {
        Some(item) => item.number(1..=MOST_PARALLEL_RUNS).and_then(|n| usize::try_from(n).ok()),
        None => Some(2),
    };
    let memory = match table.get("memory") {
        Some(item) => item.size().filter(|&size| {
            if size < LEAST_MEMORY {
                item.report("is too little; at least \"64MiB\"");
            }
            size >= LEAST_MEMORY
        }),
        None => Some(DEFAULT_MEMORY),
    };
    let given_socket = match table.get("socket") {
        Some(item) => {
            let path = item.absolute_path()?;
            if path.as_os_str().len() > LONGEST_SOCKET_PATH {
                item.report(format!("is longer than the {LONGEST_SOCKET_PATH} bytes a socket's path can have"));
                return None;
            }
            Some(path)
        }
        None => None,
    };
    let state_dir = state_dir?;
    let socket = given_socket.unwrap_or_else(|| here.socket(&state_dir));
    Some(Daemon { socket, state_dir, max_parallel_runs: max_parallel_runs?, memory: memory? })
}
