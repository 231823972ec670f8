//! What keepd tells the service manager (sd_notify(3)). Without one, nothing happens.

use std::time::Duration;

use sd_notify::NotifyState;

/// Says how the daemon is to whoever started it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Notifier;

/// Longer ones are cut: `systemctl status` shows one line.
const STATUS_CHARS: usize = 300;

impl Notifier {
    pub fn ready(self, status: &str) {
        send(&[NotifyState::Ready, NotifyState::Status(&one_line(status))]);
    }

    pub fn status(self, status: &str) {
        send(&[NotifyState::Status(&one_line(status))]);
    }

    /// Must be followed by `ready`. The time is what tells systemd which reload this answers (Type=notify-reload).
    pub fn reloading(self) {
        let status = NotifyState::Status("Reading the configuration again");
        match NotifyState::monotonic_usec_now() {
            Ok(now) => send(&[NotifyState::Reloading, now, status]),
            Err(error) => {
                tracing::warn!("the service manager is not told of the reload: the monotonic clock cannot be read: {error}");
            }
        }
    }

    pub fn stopping(self, status: &str) {
        send(&[NotifyState::Stopping, NotifyState::Status(&one_line(status))]);
    }

    /// Asks for at least this much time from now before the service manager loses its patience.
    pub fn extend(self, by: Duration) {
        send(&[NotifyState::ExtendTimeoutUsec(u32::try_from(by.as_micros()).unwrap_or(u32::MAX))]);
    }

    pub fn watchdog(self) {
        send(&[NotifyState::Watchdog]);
    }
}

fn send(states: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("the service manager could not be told: {error}");
    }
}

/// A newline would begin a second assignment (`MAINPID=…`), and the text holds names that others chose.
fn one_line(text: &str) -> String {
    let mut line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(STATUS_CHARS).collect();
    if text.chars().nth(STATUS_CHARS).is_some() {
        line.pop();
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_stays_one_assignment() {
        assert_eq!(one_line("job x\nMAINPID=1\r\u{85}\0"), "job x MAINPID=1   ");
    }

    #[test]
    fn a_long_status_is_cut_between_characters() {
        let cut = one_line(&"ü".repeat(1000));
        assert_eq!(cut.chars().count(), STATUS_CHARS);
        assert!(cut.ends_with('…'));
        assert_eq!(one_line(&"ü".repeat(STATUS_CHARS)), "ü".repeat(STATUS_CHARS));
    }
}
