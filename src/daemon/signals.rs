//! The signals keepd answers, with who sent them.

use futures::StreamExt;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::exfiltrator::WithOrigin;
use signal_hook_tokio::SignalsInfo;

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    Reload,
    Stop,
    /// From a keyboard: while the daemon is stopping already it means at once.
    Interrupt,
}

/// A signal and its sender, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signal {
    pub wish: Wish,
    /// `SIGTERM from process 1 of uid 0`
    pub from: String,
    pub uid: Option<u32>,
    pub pid: Option<i32>,
}

/// The stream of signals.
pub struct Signals(SignalsInfo<WithOrigin>);

impl Signals {
    /// Takes the signals over; until then their default applies. Needs the runtime.
    pub fn new() -> std::io::Result<Self> {
        SignalsInfo::<WithOrigin>::new([SIGHUP, SIGTERM, SIGINT]).map(Self)
    }

    /// The next one; cancel-safe.
    pub async fn next(&mut self) -> Signal {
        loop {
            let Some(origin) = self.0.next().await else {
                // Only closing its handle ends the stream, which nobody does.
                std::future::pending::<()>().await;
                continue;
            };
            let (wish, name) = match origin.signal {
                SIGHUP => (Wish::Reload, "SIGHUP"),
                SIGTERM => (Wish::Stop, "SIGTERM"),
                SIGINT => (Wish::Interrupt, "SIGINT"),
                _ => continue,
            };
            let from = match &origin.process {
                Some(process) => format!("{name} from process {} of uid {}", process.pid, process.uid),
                None => name.to_owned(),
            };
            let (uid, pid) = origin.process.map_or((None, None), |process| (Some(process.uid), Some(process.pid)));
            return Signal { wish, from, uid, pid };
        }
    }
}
