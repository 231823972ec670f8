//! Logs: fields to the journal under systemd, lines to standard error else.

use std::os::unix::fs::MetadataExt;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Sets up logging; `RUST_LOG` chooses what is logged.
pub fn set_up() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    let done = match journal() {
        Some(journal) => registry.with(journal).try_init(),
        None => {
            let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false).with_target(false);
            registry.with(lines).try_init()
        }
    };
    // A second set-up (tests) keeps the first.
    let _ = done;
}

/// The journal, when standard error is connected to it (`$JOURNAL_STREAM` names its device and inode).
fn journal() -> Option<tracing_journald::Layer> {
    let stream = std::env::var("JOURNAL_STREAM").ok()?;
    let (device, inode) = stream.split_once(':')?;
    let meta = std::fs::metadata("/proc/self/fd/2").ok()?;
    if meta.dev().to_string() != device || meta.ino().to_string() != inode {
        return None;
    }
    tracing_journald::layer().ok().map(|layer| layer.with_syslog_identifier("keepd".into()))
}
