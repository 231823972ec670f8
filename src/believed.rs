//! What time keepd believes it is, where something would be deleted because of it.
//!
//! A clock that is wrong for a day must not cost the backups of a year. In: the machine's clock, which start of the machine this is and for how
//! long it runs (a clock that nobody sets). Out: the time that is believed, never later than the clock's. A clock that is further ahead than
//! the machine ran, or was plausibly off, is not believed until it proved itself ([`Ahead`]), or somebody says that it is right; until
//! then what is believed is the last time that was, and what the machine ran since.

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::ledger::{Ledger, Result};

const DAY: i64 = 86_400;
/// Further than this a running machine's clock is not set.
const STEP: i64 = 3600;
/// For longer than this a machine is not off without somebody noticing.
const OFF: i64 = 7 * DAY;
/// A clock that went on for so long after a leap is right, in seconds.
pub const SETTLED: i64 = 7 * DAY;
/// Or one that was found to go on by so many starts of the machine (or ends of a pause), each at least a day after the one before.
pub const STARTS: u32 = 3;
/// A clock that went on by more than this while the machine was off, or paused, is another one again.
const AGREES: i64 = 400 * DAY;
/// Before this nobody had this keepd: clocks without a battery begin in 1970, 1980 or 2000. In seconds since 1970.
const FIRST: i64 = 1_000_000_000;
/// Written down at least this often, in seconds.
const WRITE_EVERY: i64 = 600;
const NOTE: &str = "believed time";

/// What was seen of the clock. Times are in seconds since 1970, spans in seconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// When the clock was believed last, by itself.
    seen: i64,
    /// So long the machine ran since, as far as is known.
    ran: i64,
    /// It was started anew since: for how long it was off is not known.
    restarted: bool,
    boot: String,
    uptime: i64,
    /// It is further ahead than it can be; kept while it is behind, as it is at each start of a machine without a battery.
    #[serde(default)]
    ahead: Option<Ahead>,
    /// It is behind: what it said last, and how long the machine ran with it.
    #[serde(default)]
    behind: Option<(i64, i64)>,
}

/// A clock that is ahead. It is right when the machine ran with it for as long as it leapt, at most for [`SETTLED`]; or when [`STARTS`] agreed, the last
/// at least [`SETTLED`] after the leap by the clock itself. That it goes on further than the machine ran (which was off, or paused) does not count
/// against it; that it goes back does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Ahead {
    /// Where it leapt to, and what it said last.
    from: i64,
    last: i64,
    /// So long the machine ran with it.
    ran: i64,
    /// Starts that it was found ahead at, and when that was last.
    starts: u32,
    start: i64,
}

impl Watch {
    /// Begins to watch a clock that is believed.
    pub fn new(now: Timestamp, boot: &str, uptime: i64) -> Self {
        Self { seen: now.as_second(), boot: boot.to_owned(), uptime, ..Self::default() }
    }

    /// The clock says `now`, the machine's start `boot` is `uptime` seconds ago. What is believed.
    pub fn look(&mut self, now: Timestamp, boot: &str, uptime: i64) -> Timestamp {
        let is_same = !boot.is_empty() && self.boot == boot && uptime >= self.uptime;
        let ran = if is_same { uptime - self.uptime } else { 0 };
        (self.boot, self.uptime) = (boot.to_owned(), uptime);
        self.ran = self.ran.saturating_add(ran);
        self.restarted |= !is_same;
        let time = now.as_second();
        let expected = self.seen.saturating_add(self.ran);
        let latest = expected.saturating_add(if self.restarted { OFF } else { STEP });
        let is_right = if self.seen < FIRST || (self.seen - STEP..=latest).contains(&time) {
            true
        } else if time < self.seen {
            self.stays_behind(time, ran)
        } else {
            self.stays_ahead(time, ran, is_same, time.saturating_sub(expected))
        };
        if is_right {
            *self = Self::new(now, boot, uptime);
            return now;
        }
        Timestamp::from_second(expected).unwrap_or(now).min(now)
    }

    /// Whether a clock that is further ahead than the machine ran, by `leap`, proved itself.
    fn stays_ahead(&mut self, time: i64, ran: i64, is_same: bool, leap: i64) -> bool {
        let mut ahead = match self.ahead.take().filter(|ahead| agrees(ahead.last, time, ran)) {
            None => Ahead { from: time, last: time, ran: 0, starts: 1, start: time },
            Some(mut ahead) => {
                ahead.ran = ahead.ran.saturating_add(ran);
                let was_away = !is_same || time.saturating_sub(ahead.last) > ran.saturating_add(STEP);
                if was_away && time.saturating_sub(ahead.start) >= DAY {
                    (ahead.starts, ahead.start) = (ahead.starts.saturating_add(1), time);
                }
                ahead
            }
        };
        ahead.last = time;
        let is_right = ahead.ran >= SETTLED.min(leap) || ahead.starts >= STARTS && time.saturating_sub(ahead.from) >= SETTLED;
        self.ahead = Some(ahead);
        is_right
    }

    /// Whether a clock that says an earlier time than once was believed is right: what was believed was not, then.
    fn stays_behind(&mut self, time: i64, ran: i64) -> bool {
        let settled = match self.behind {
            Some((last, settled)) if time >= FIRST && agrees(last, time, ran) => settled.saturating_add(ran),
            _ => 0,
        };
        self.behind = Some((time, settled));
        settled >= SETTLED
    }
}

/// Whether a clock that said `before` and now says `now` went on, `ran` seconds later or, when the machine was off or paused, some more.
fn agrees(before: i64, now: i64, ran: i64) -> bool {
    (ran.saturating_sub(STEP)..=ran.saturating_add(AGREES)).contains(&now.saturating_sub(before))
}

/// Which start of the machine this is; empty where the kernel does not tell.
pub fn boot_id() -> String {
    // A debug build believes a test that the machine was started anew.
    #[cfg(debug_assertions)]
    if let Ok(told) = std::env::var("KEEPD_TEST_BOOT") {
        return told;
    }
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// This start of the machine, and for how long it has been running, sleep included.
fn machine() -> (String, i64) {
    (boot_id(), rustix::time::clock_gettime(rustix::time::ClockId::Boottime).tv_sec)
}

/// What is believed when the clock says `now`. To be asked at least once in a few days, so that a leap is told from a time that went by.
pub fn at(ledger: &Ledger, now: Timestamp) -> Result<Timestamp> {
    // Whoever looks at the same time waits: what was confirmed meanwhile is not written over.
    ledger.change_note(NOTE, |text| {
        let (boot, uptime) = machine();
        let known: Option<Watch> = text.and_then(|text| serde_json::from_str(text).ok());
        let mut watch = known.clone().unwrap_or_else(|| Watch::new(now, &boot, uptime));
        let believed = watch.look(now, &boot, uptime);
        let is_same = known.is_some_and(|known| {
            let state = |watch: &Watch| (watch.ahead.as_ref().map(|a| (a.from, a.starts)), watch.behind.is_some());
            known.boot == watch.boot && state(&known) == state(&watch) && (watch.uptime - known.uptime).abs() < WRITE_EVERY
        });
        (believed, (!is_same).then(|| written(&watch)))
    })
}

/// The same now.
pub fn now(ledger: &Ledger) -> Result<Timestamp> {
    at(ledger, Timestamp::now())
}

/// Somebody says that the clock is right.
pub fn confirm(ledger: &Ledger) -> Result<()> {
    ledger.change_note(NOTE, |_| {
        let (boot, uptime) = machine();
        ((), Some(written(&Watch::new(Timestamp::now(), &boot, uptime))))
    })
}

fn written(watch: &Watch) -> String {
    serde_json::to_string(watch).unwrap_or_default()
}

/// What to say of a clock that is not believed; None when it is.
pub fn doubt(now: Timestamp, believed: Timestamp) -> Option<String> {
    let ahead = now.duration_since(believed);
    (ahead > SignedDuration::from_secs(STEP)).then(|| {
        format!(
            "the clock leapt ahead: it says {}, and by what keepd saw of it it should be about {}",
            now.strftime("%Y-%m-%d %H:%M UTC"),
            believed.strftime("%Y-%m-%d %H:%M UTC")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3600;
    const TEN_YEARS: i64 = 3653 * DAY;
    /// 2027-03-01T12:00:00Z.
    const BEGIN: i64 = 1_803_902_400;

    fn t(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    /// A machine, the time that is true, and what its clock says more.
    struct Machine {
        watch: Watch,
        time: i64,
        error: i64,
        boot: u32,
        uptime: i64,
    }

    impl Machine {
        fn new() -> Self {
            let first = Timestamp::from_second(BEGIN).unwrap();
            assert_eq!(first, t("2027-03-01T12:00:00Z"));
            Self { watch: Watch::new(first, "0", 100), time: BEGIN, error: 0, boot: 0, uptime: 100 }
        }

        /// By how much what is believed is behind the truth.
        fn late(&mut self) -> i64 {
            // As the ledger keeps it.
            self.watch = serde_json::from_str(&serde_json::to_string(&self.watch).unwrap()).unwrap();
            let clock = self.time + self.error;
            let believed = self.watch.look(Timestamp::from_second(clock).unwrap(), &self.boot.to_string(), self.uptime);
            assert!(believed.as_second() <= clock, "never later than the clock");
            self.time - believed.as_second()
        }

        /// It runs, and is looked at every hour. What was believed last.
        fn runs(&mut self, seconds: i64) -> i64 {
            let end = self.time + seconds;
            let mut late = self.late();
            while self.time < end {
                let some = HOUR.min(end - self.time);
                (self.time, self.uptime) = (self.time + some, self.uptime + some);
                late = self.late();
            }
            late
        }

        /// Its host pauses it: no clock of its own goes on, and its time is set when it is awake again.
        fn is_paused(&mut self, seconds: i64) {
            self.time += seconds;
        }

        fn is_off(&mut self, seconds: i64) {
            self.time += seconds;
            (self.boot, self.uptime) = (self.boot + 1, 20);
        }
    }

    #[test]
    fn a_clock_that_is_right_is_believed_whatever_the_machine_does() {
        let mut m = Machine::new();
        for _ in 0..50 {
            assert_eq!(m.runs(9 * HOUR), 0);
            m.is_off(15 * HOUR);
        }
        m.is_off(6 * DAY);
        assert_eq!(m.runs(HOUR), 0, "a holiday");
        (m.time, m.uptime) = (m.time + 30 * DAY, m.uptime + 30 * DAY);
        assert_eq!(m.late(), 0, "asleep: the clock that nobody sets went on");
    }

    #[test]
    fn ten_years_ahead_for_three_days_and_back_is_never_believed() {
        for restarts in 0..6 {
            let mut m = Machine::new();
            m.runs(DAY);
            m.error = TEN_YEARS;
            for n in 0..36 {
                let late = m.runs(2 * HOUR);
                assert!((0..=restarts * 60).contains(&late), "what the machine ran is what went by: {late} with {restarts} restarts");
                if n % 6 == 3 && n / 6 < restarts {
                    m.is_off(60);
                }
            }
            m.error = 0;
            assert_eq!((m.late(), m.watch.ahead.clone()), (0, None), "it is taken back as if nothing had been");
            assert_eq!(m.runs(10 * DAY), 0);
        }
        // Back an hour and ahead again: it begins anew.
        let mut m = Machine::new();
        m.error = TEN_YEARS;
        m.runs(6 * DAY);
        m.error -= 3 * HOUR;
        assert_eq!(m.runs(6 * DAY), 0);
        m.error += 2 * TEN_YEARS;
        assert_eq!(m.runs(6 * DAY), 0, "nor is another leap a proof of the first");
        assert_eq!(m.runs(DAY + HOUR), -m.error, "what stays for a week is right");
    }

    #[test]
    fn a_machine_that_is_off_for_two_weeks_each_time_comes_to_believe_its_clock() {
        let mut m = Machine::new();
        let mut believed = 0;
        for _ in 0..30 {
            m.is_off(14 * DAY);
            let late = m.runs(3 * HOUR);
            assert!(late < 3 * 14 * DAY, "never more than three times behind: {} days", late / DAY);
            believed += usize::from(late == 0);
        }
        assert_eq!(believed, 10, "each third start");
        // Once, and on from then: a week.
        let mut m = Machine::new();
        m.is_off(14 * DAY);
        assert_eq!((m.runs(6 * DAY), m.runs(DAY + HOUR)), (14 * DAY, 0));
        // Once, and then in the evenings only.
        m.is_off(14 * DAY);
        let days = (0..30).position(|_| {
            let late = m.runs(3 * HOUR);
            m.is_off(21 * HOUR);
            late == 0
        });
        assert_eq!(days, Some(7));
    }

    #[test]
    fn a_guest_that_is_paused_each_night_believes_its_clock_by_the_evening() {
        for paused in [2, 8, 12] {
            let mut m = Machine::new();
            for _ in 0..60 {
                assert_eq!(m.runs((24 - paused) * HOUR), 0, "paused for {paused} hours");
                m.is_paused(paused * HOUR);
            }
        }
        // Most of the day: after a week at the latest, for the pauses agree with each other.
        let mut m = Machine::new();
        let (mut most, mut believed) = (0, 0);
        for _ in 0..60 {
            let late = m.runs(3 * HOUR);
            (most, believed) = (most.max(late), believed + usize::from(late == 0));
            m.is_paused(21 * HOUR);
        }
        assert!(most <= 8 * DAY && believed >= 7, "{} hours behind at most, {believed} times believed", most / HOUR);
    }

    #[test]
    fn without_a_battery_it_begins_in_1970_and_is_believed_when_it_is_right() {
        let mut m = Machine::new();
        for _ in 0..5 {
            m.is_off(10 * HOUR);
            m.error = 20 - m.time;
            m.runs(60);
            assert!(m.watch.behind.is_some() && m.watch.ahead.is_none());
            m.error = 0;
            assert_eq!(m.runs(14 * HOUR), 0);
        }
        // Nor is 1970 ever right, however long it stays.
        m.is_off(60);
        m.error = 20 - m.time;
        m.runs(20 * DAY);
        m.error = 0;
        assert_eq!(m.late(), 0);
        // Off for two weeks each time as well.
        let believed = (0..9).filter(|_| {
            m.is_off(14 * DAY);
            m.error = 20 - m.time;
            m.runs(60);
            m.error = 0;
            m.runs(3 * HOUR) == 0
        });
        assert_eq!(believed.count(), 3);
    }

    #[test]
    fn the_first_start_ever_believes_and_one_in_1970_believes_what_comes_after() {
        let mut watch = Watch::new(t("1970-01-01T00:00:20Z"), "a", 20);
        assert_eq!(watch.look(t("1970-01-01T00:01:20Z"), "a", 80), t("1970-01-01T00:01:20Z"));
        assert_eq!(watch.look(t("2027-03-01T12:00:00Z"), "a", 140), t("2027-03-01T12:00:00Z"));
        assert!(watch.look(t("2037-03-01T12:00:00Z"), "a", 200) < t("2027-03-01T12:02:00Z"), "from then on no leap is");
        // Begun ten years ahead: when it is right nothing is later than that, and after a week ten years ahead are a leap.
        let mut m = Machine::new();
        m.watch = Watch::new(Timestamp::from_second(m.time + TEN_YEARS).unwrap(), "0", 100);
        assert_eq!(m.runs(8 * DAY), 0);
        m.error = TEN_YEARS;
        assert_eq!(m.runs(6 * DAY), 0);
    }

    #[test]
    fn what_is_not_believed_is_told() {
        assert!(doubt(t("2027-03-20T12:10:00Z"), t("2027-03-01T12:10:00Z")).unwrap().contains("leapt"));
        assert_eq!(doubt(t("2027-03-20T12:10:00Z"), t("2027-03-20T12:00:00Z")), None);
    }

    #[test]
    fn it_is_kept_in_the_ledger_and_confirmed_by_hand() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        let now = Timestamp::now();
        assert_eq!(at(&ledger, now).unwrap(), now);
        let later = now.checked_add(SignedDuration::from_hours(24 * 3653)).unwrap();
        drop(ledger);
        let ledger = Ledger::open(dir.path()).unwrap();
        assert!(at(&ledger, later).unwrap().duration_since(now) < SignedDuration::from_mins(1));
        assert!(at(&ledger, now).unwrap() == now && at(&ledger, later).unwrap() < later);
        confirm(&ledger).unwrap();
        assert!(at(&ledger, later).unwrap() < later, "what was confirmed is what the clock says then");
    }
}
