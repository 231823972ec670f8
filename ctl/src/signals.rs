//! Ctrl-C and Ctrl-\, while somebody else takes them: what catches them stays installed for good, so it is asked each time whether they end keepctl.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use signal_hook::consts::{SIGINT, SIGQUIT};

struct Signal {
    ends_us: Arc<AtomicBool>,
    holders: AtomicUsize,
}

impl Signal {
    fn new(number: i32) -> Self {
        let ends_us = Arc::new(AtomicBool::new(true));
        // Both numbers are known to it.
        let _ = signal_hook::flag::register_conditional_default(number, ends_us.clone());
        Self { ends_us, holders: AtomicUsize::new(0) }
    }
}

static INTERRUPT: LazyLock<Signal> = LazyLock::new(|| Signal::new(SIGINT));
static QUIT: LazyLock<Signal> = LazyLock::new(|| Signal::new(SIGQUIT));

/// As long as it lives, the signal does not end keepctl; then again it does.
pub struct Held(&'static Signal);

impl Held {
    pub fn interrupt() -> Self {
        Self::of(&INTERRUPT)
    }

    pub fn quit() -> Self {
        Self::of(&QUIT)
    }

    fn of(signal: &'static Signal) -> Self {
        signal.holders.fetch_add(1, Ordering::SeqCst);
        signal.ends_us.store(false, Ordering::SeqCst);
        Self(signal)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.0.holders.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.ends_us.store(true, Ordering::SeqCst);
        }
    }
}
