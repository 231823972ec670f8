//! Where the log goes: to the journal with its fields when standard error is the journal, else to standard error as text.

use std::io::IsTerminal;

use rustix::fs::fstat;
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

/// Starts logging for the whole process. `verbose` is how often `-v` was given; `RUST_LOG` overrides it.
pub fn start(verbose: u8) {
    let (filter, complaint) = filter(verbose);
    let (layer, journal_error) = match journal() {
        Some(Ok(layer)) => (layer, None),
        Some(Err(error)) => (text(), Some(error)),
        None => (text(), None),
    };
    // Fails only when a logger was set before, which tests do.
    let _ = tracing_subscriber::registry().with(layer.with_filter(filter)).try_init();
    if let Some(error) = journal_error {
        tracing::warn!("logging text to standard error: the journal's socket does not answer: {error}");
    }
    if let Some(complaint) = complaint {
        tracing::warn!("{complaint}");
    }
    log_panics();
}

type Boxed = Box<dyn Layer<tracing_subscriber::Registry> + Send + Sync>;

/// The journal's layer when systemd connected standard error to the journal; None when it did not.
fn journal() -> Option<std::io::Result<Boxed>> {
    let stream = std::env::var("JOURNAL_STREAM").ok()?;
    let stderr = fstat(std::io::stderr()).ok()?;
    if !names_stream(&stream, stderr.st_dev, stderr.st_ino) {
        return None;
    }
    let layer = tracing_journald::layer().map(|layer| {
        // Journal priorities with their usual meaning: what is worth a look in the morning is a warning or worse.
        let priorities = PriorityMappings {
            error: Priority::Error,
            warn: Priority::Warning,
            info: Priority::Informational,
            debug: Priority::Debug,
            trace: Priority::Debug,
        };
        layer.with_field_prefix(Some("KEEPD".into())).with_syslog_identifier("keepd".into()).with_priority_mappings(priorities).boxed()
    });
    Some(layer)
}

/// Whether `JOURNAL_STREAM` (`device:inode`) names the file with this device and inode. A child that inherits the variable
/// but not the stream must not log to the journal (systemd.exec(5)).
fn names_stream(variable: &str, dev: u64, ino: u64) -> bool {
    variable.split_once(':').is_some_and(|(d, i)| d.parse() == Ok(dev) && i.parse() == Ok(ino))
}

fn text() -> Boxed {
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    fmt::layer().log_internal_errors(false).with_writer(std::io::stderr).with_ansi(colours).with_target(false).boxed()
}

/// The filter, and what is wrong with `RUST_LOG`.
fn filter(verbose: u8) -> (EnvFilter, Option<String>) {
    // Other crates' chatter helps nobody before the second -v.
    let directives = match verbose {
        0 => "warn,keepd=info",
        1 => "info,keepd=debug",
        _ => "debug,keepd=trace",
    };
    let own = || EnvFilter::builder().with_default_directive(LevelFilter::WARN.into()).parse_lossy(directives);
    match std::env::var("RUST_LOG") {
        Ok(wanted) if !wanted.is_empty() => match EnvFilter::try_new(&wanted) {
            Ok(filter) => (filter, None),
            Err(error) => (own(), Some(format!("RUST_LOG is ignored: {error}"))),
        },
        _ => (own(), None),
    }
}

/// A panic belongs in the log, with the place, not only on a standard error that nobody reads.
fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let text = info.payload_as_str().unwrap_or("no message");
        let place = info.location().map(|l| format!("{}:{}", l.file(), l.line())).unwrap_or_default();
        let thread = std::thread::current().name().unwrap_or("unnamed").to_owned();
        tracing::error!(thread, place, "keepd has a bug; please report it: panic in thread {thread} at {place}: {text}");
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_stream_is_ours_only_when_both_numbers_fit() {
        assert!(names_stream("8:1234", 8, 1234));
        for other in ["8:1235", "9:1234", "81234", "", ":", "8:", "8:1234:5", "-8:1234"] {
            assert!(!names_stream(other, 8, 1234), "{other}");
        }
    }

    #[test]
    fn each_v_logs_more() {
        let levels: Vec<_> = (0..3).map(|v| filter(v).0.max_level_hint()).collect();
        assert_eq!(levels, [Some(LevelFilter::INFO), Some(LevelFilter::DEBUG), Some(LevelFilter::TRACE)]);
    }
}
