//! Two years of a machine that is restarted every day, killed, suspended and switched off, and whose clock goes back an hour, begins in 1970 or leaps
//! ten years ahead and comes back: the real scheduler, ledger, retention and belief in the clock, beside a model that knows nothing of them.
//!
//! The model finds due times by walking all minutes of the years through the zone's offsets ([`Oracle`]). What it says of each look of the scheduler at
//! the clock: one start when something is due, one when a failed run's wait is over, none otherwise. `KEEPD_TEST_SEED` gives other events,
//! `KEEPD_TEST_LONG=1` twenty of them.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use keepd_protocol::model::{Run, RunKind, RunState};

use super::clock::Clock;
use super::scheduler::{Scheduler, Starter, tests};
use crate::believed::Watch;
use crate::config::{self, Job, Retention, Retry, Schedule};
use crate::ledger::Ledger;
use crate::retention::Candidate;
use crate::run::retain::{Now, decision};
use crate::run::{BackupRequest, Error};

const MINUTE: i64 = 60;
const HOUR: i64 = 3600;
const DAY: i64 = 86_400;
const TEN_YEARS: i64 = 3653 * DAY;
const BACKOFF: i64 = 60;
const ATTEMPTS: u32 = 3;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn stamp(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// When a schedule is due, by walking minutes.
struct Oracle {
    /// Minute, hour, day, month, day of the week: which values fit. And whether both day fields must.
    fields: Option<([Vec<bool>; 5], bool)>,
    /// The hour field begins with a star: every real hour counts.
    real: bool,
    every: i64,
    zone: TimeZone,
}

impl Oracle {
    fn new(spec: &str, zone: &str) -> Self {
        let zone = TimeZone::get(zone).unwrap();
        if let Some(hours) = spec.strip_prefix("every ") {
            return Self { fields: None, real: false, every: hours.parse::<i64>().unwrap() * HOUR, zone };
        }
        let texts: Vec<&str> = spec.split(' ').collect();
        let parse = |text: &str, most: usize| -> Vec<bool> {
            let mut fits = vec![false; most + 1];
            for part in text.split(',') {
                let (range, step) = part.split_once('/').map_or((part, 1), |(range, step)| (range, step.parse().unwrap()));
                let (from, to) = match range {
                    "*" => (usize::from(most == 31 || most == 12), most),
                    one => (one.parse().unwrap(), one.parse().unwrap()),
                };
                (from..=to).step_by(step).for_each(|n| fits[n] = true);
            }
            fits
        };
        let fields = [parse(texts[0], 59), parse(texts[1], 23), parse(texts[2], 31), parse(texts[3], 12), parse(texts[4], 6)];
        let both = texts[2].starts_with('*') || texts[4].starts_with('*');
        Self { fields: Some((fields, both)), real: texts[1].starts_with('*'), every: 0, zone }
    }

    /// All due times from `from` up to `to`, both whole minutes, in order. An interval counts from `from`.
    fn all(&self, from: i64, to: i64) -> Vec<i64> {
        let Some((fields, both)) = &self.fields else {
            return (1..).map(|n| from + n * self.every).take_while(|due| *due <= to).collect();
        };
        let mut offsets: Vec<(i64, i64)> = vec![(i64::MIN, i64::from(self.zone.to_offset(stamp(from - 2 * DAY)).seconds()))];
        for change in self.zone.following(stamp(from - 2 * DAY)).take_while(|change| change.timestamp().as_second() <= to) {
            offsets.push((change.timestamp().as_second(), i64::from(change.offset().seconds())));
        }
        // Begun a day early, so that what the first minute repeats is known.
        let (mut time, mut place, mut seen) = (from - DAY, 0, i64::MIN);
        let mut found = Vec::new();
        // The day that was looked at last, and whether it fits: days are long.
        let mut day = (i64::MIN, false);
        let mut fits = |local: i64| -> bool {
            let (date, second) = (local.div_euclid(DAY), local.rem_euclid(DAY));
            if day.0 != date {
                let civil = stamp(local).to_zoned(TimeZone::UTC).date();
                let (dom, dow) = (fields[2][civil.day() as usize], fields[4][civil.weekday().to_sunday_zero_offset() as usize]);
                day = (date, fields[3][civil.month() as usize] && if *both { dom && dow } else { dom || dow });
            }
            day.1 && fields[0][(second / MINUTE % 60) as usize] && fields[1][(second / HOUR) as usize]
        };
        while time <= to {
            while offsets.get(place + 1).is_some_and(|next| next.0 <= time) {
                place += 1;
            }
            let local = time + offsets[place].1;
            let is_due = if self.real {
                fits(local)
            } else if local <= seen {
                false
            } else {
                // Local minutes that the clock skipped are as if they were now.
                let first = if seen == i64::MIN { local } else { seen + MINUTE };
                (first..=local).step_by(MINUTE as usize).any(&mut fits)
            };
            seen = seen.max(local);
            if is_due && time >= from {
                found.push(time);
            }
            time += MINUTE;
        }
        found
    }
}

struct Shared {
    clock: Mutex<i64>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    ledger: Option<Arc<Ledger>>,
    running: Option<Run>,
    /// Attempts of what was asked to be started at this look; 0 while the job ran.
    asked: Vec<u32>,
    kill: Option<Kill>,
    number: u64,
}

/// keepd is killed when it starts something: before the run is written down, or after.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Kill {
    Before,
    After,
}

struct Killed;

impl Clock for Shared {
    fn now(&self) -> Timestamp {
        stamp(*lock(&self.clock))
    }
    fn sleep_until(&self, _: Option<Timestamp>) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(std::future::pending())
    }
}

struct Stand(Arc<Shared>);

impl Starter for Stand {
    fn start_backup(&self, request: BackupRequest) -> Result<String, Error> {
        let now = self.0.now().to_string();
        let mut inner = lock(&self.0.inner);
        if inner.running.is_some() {
            inner.asked.push(0);
            return Err(Error::Busy("it runs".into()));
        }
        let kill = inner.kill.take();
        if kill == Some(Kill::Before) {
            resume_unwind(Box::new(Killed));
        }
        inner.number += 1;
        let run = Run {
            id: format!("{:08}", inner.number),
            kind: RunKind::Backup,
            state: RunState::Running,
            job: Some(request.job),
            attempt: request.attempt,
            queued: now.clone(),
            started: Some(now),
            ..Run::default()
        };
        inner.ledger.as_ref().unwrap().save_run(&run).unwrap();
        inner.asked.push(request.attempt);
        let id = run.id.clone();
        inner.running = Some(run);
        if kill.is_some() {
            resume_unwind(Box::new(Killed));
        }
        Ok(id)
    }

    fn start_config_backup(&self, _: u32) -> Result<String, Error> {
        unreachable!("none is configured")
    }

    fn is_running(&self, _: &str) -> bool {
        lock(&self.0.inner).running.is_some()
    }
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self, from: i64, to: i64) -> i64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        from + (self.0 >> 11) as i64 % (to - from + 1)
    }
}

#[derive(Default, Debug, Clone)]
struct Counts {
    due: usize,
    started: usize,
    /// Due while the job ran, or missed together with a later one.
    covered: usize,
    again: usize,
    by_a_wrong_clock: usize,
    missed: usize,
    doubled: usize,
    restarts: usize,
    kills: usize,
    leaps: usize,
    good: usize,
    fallen: usize,
    good_dropped: usize,
    /// Good ones that retention would have dropped if it believed the clock.
    saved: usize,
}

impl Counts {
    fn add(&mut self, o: &Counts) {
        let sum = |a: &mut usize, b: usize| *a += b;
        sum(&mut self.due, o.due);
        sum(&mut self.started, o.started);
        sum(&mut self.covered, o.covered);
        sum(&mut self.again, o.again);
        sum(&mut self.by_a_wrong_clock, o.by_a_wrong_clock);
        sum(&mut self.missed, o.missed);
        sum(&mut self.doubled, o.doubled);
        sum(&mut self.restarts, o.restarts);
        sum(&mut self.kills, o.kills);
        sum(&mut self.leaps, o.leaps);
        sum(&mut self.good, o.good);
        sum(&mut self.fallen, o.fallen);
        sum(&mut self.good_dropped, o.good_dropped);
        sum(&mut self.saved, o.saved);
    }
}

struct Made {
    candidate: Candidate,
    /// In true time; None when the clock was wrong when it was made.
    truth: Option<i64>,
}

struct World {
    spec: &'static str,
    zone: TimeZone,
    rules: Retention,
    dir: tempfile::TempDir,
    config: Arc<config::Current>,
    shared: Arc<Shared>,
    scheduler: Option<Arc<Scheduler>>,
    oracle: Oracle,
    /// In true time.
    dues: Vec<i64>,
    /// Up to which due time, by place, all were begun or covered.
    done: usize,
    jitter: i64,
    /// When it was noted, how long it waits, which attempt.
    retry: Option<(i64, i64, u32)>,
    time: i64,
    /// What the clock says more than the truth.
    error: i64,
    /// When the run that goes on ends, and how.
    end: Option<(i64, RunState)>,
    /// When it began, where the clock was right then.
    began: Option<i64>,
    longest: i64,
    made: Vec<Made>,
    watch: Watch,
    boot: (u32, i64),
    dice: Dice,
    counts: Counts,
    strange: usize,
    trouble: Vec<String>,
}

impl World {
    fn new(case: &Case, seed: u64, days: i64) -> Self {
        let (spec, zone, from, jitter, rules) = (case.spec, case.zone, case.from, case.jitter, case.rules.clone());
        let time = from.parse::<Timestamp>().unwrap().as_second();
        let schedule = match spec.strip_prefix("every ") {
            Some(hours) => Schedule::Every(Duration::from_secs(hours.parse::<u64>().unwrap() * 3600)),
            None => Schedule::Cron(spec.into()),
        };
        let job = Job {
            jitter: Duration::from_secs(jitter),
            max_age: None,
            retention: rules.clone(),
            retry: Retry { attempts: ATTEMPTS, backoff: Duration::from_secs(BACKOFF as u64) },
            ..tests::job(schedule, zone)
        };
        // In memory where there is such a place: tens of thousands of small transactions are not what is tested here.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let config = tests::config(job, dir.path());
        let oracle = Oracle::new(spec, zone);
        let dues = oracle.all(time, time + days * DAY);
        let dues: Vec<i64> = dues.into_iter().filter(|due| *due > time).collect();
        let longest = dues.windows(2).map(|w| w[1] - w[0]).min().unwrap_or(DAY).min(12 * HOUR) * 5 / 4;
        let mut world = Self {
            spec,
            zone: TimeZone::get(zone).unwrap(),
            rules,
            dir,
            config: Arc::new(config::Current::new(config)),
            shared: Arc::new(Shared { clock: Mutex::new(time), inner: Mutex::default() }),
            scheduler: None,
            oracle,
            dues,
            done: 0,
            jitter: 0,
            retry: None,
            time,
            error: 0,
            end: None,
            began: None,
            longest: longest.min(90 * MINUTE),
            made: Vec::new(),
            watch: Watch::new(stamp(time), "0", 0),
            boot: (0, time),
            dice: Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1),
            counts: Counts::default(),
            strange: 0,
            trouble: Vec::new(),
        };
        world.open();
        world.look();
        if jitter > 0 {
            let next = world.scheduler.as_ref().unwrap().next().unwrap().1.as_second();
            world.jitter = next - world.dues[0];
            assert!((0..jitter as i64).contains(&world.jitter));
        }
        world
    }

    /// keepd starts, as the daemon does.
    fn open(&mut self) {
        let ledger = Arc::new(Ledger::open(self.dir.path()).unwrap());
        {
            let mut inner = lock(&self.shared.inner);
            inner.ledger = Some(ledger.clone());
            inner.running = None;
        }
        self.end = None;
        *lock(&self.shared.clock) = self.now();
        let scheduler = Scheduler::new(self.config.clone(), ledger.clone(), Arc::new(Stand(self.shared.clone())), self.shared.clone());
        for run in ledger.close_interrupted_runs("killed", stamp(self.now())).unwrap() {
            scheduler.job_finished(&run);
            let wait = BACKOFF << (run.attempt - 1);
            self.retry = (run.attempt < ATTEMPTS).then_some((self.now(), wait, run.attempt + 1));
        }
        self.scheduler = Some(scheduler);
        self.watch = serde_json::from_str(&serde_json::to_string(&self.watch).unwrap()).unwrap();
    }

    /// keepd ends as a service is stopped: what runs is begun again by the next start.
    fn close(&mut self) {
        let scheduler = self.scheduler.take().unwrap();
        let mut inner = lock(&self.shared.inner);
        if let Some(mut run) = inner.running.take() {
            run.state = RunState::Cancelled;
            self.retry = Some((self.time + self.error, 0, run.attempt));
            scheduler.job_stopped(&run);
            inner.ledger.as_ref().unwrap().save_run(&run).unwrap();
        }
        inner.ledger = None;
    }

    fn now(&self) -> i64 {
        self.time + self.error
    }

    fn is_right(&self) -> bool {
        (-HOUR..=0).contains(&self.error)
    }

    fn believed(&mut self) -> Timestamp {
        let (boot, uptime) = (self.boot.0.to_string(), self.time - self.boot.1);
        self.watch.look(stamp(self.now()), &boot, uptime)
    }

    /// One look of the scheduler, beside what the model says of it. False when keepd was killed at it.
    fn look(&mut self) -> bool {
        let now = self.now();
        *lock(&self.shared.clock) = now;
        self.believed();
        if let Some((since, _, _)) = &mut self.retry {
            *since = now.min(*since);
        }
        let retry = self.retry.filter(|(since, wait, _)| since + wait <= now);
        let mut reached = self.done;
        while self.dues.get(reached).is_some_and(|due| *due <= now) && self.is_right() {
            reached += 1;
        }
        let is_due = self.is_right() && reached > self.done && (self.dues[self.done] + self.jitter <= now || retry.is_some());
        let attempt = retry.map_or(1, |(_, _, attempt)| attempt);
        lock(&self.shared.inner).asked.clear();
        let scheduler = self.scheduler.clone().unwrap();
        let killed = catch_unwind(AssertUnwindSafe(|| scheduler.start_due())).is_err();
        let wake = if killed { None } else { scheduler.wake_at() };
        let (asked, running) = {
            let inner = lock(&self.shared.inner);
            (inner.asked.clone(), inner.running.is_some())
        };
        let at = || format!("{} {}: at {} (clock {})", self.spec, self.zone.iana_name().unwrap_or("?"), stamp(self.time), stamp(now));
        if wake.is_some_and(|wake| wake.as_second() <= now) {
            self.trouble.push(format!("{}: it looks again at once, and again", at()));
        }
        let expected = usize::from(is_due || retry.is_some());
        let begun = asked.len() + usize::from(killed && asked.is_empty());
        if self.is_right() {
            if begun < expected {
                self.counts.missed += 1;
                self.trouble.push(format!("{}: nothing was started, and due were {:?}", at(), self.dues.get(self.done).map(|d| stamp(*d))));
            } else if begun > expected {
                self.counts.doubled += 1;
                self.trouble.push(format!(
                    "{}: started, and nothing is due (done up to {:?})",
                    at(),
                    self.done.checked_sub(1).map(|n| stamp(self.dues[n]))
                ));
            }
            if let Some(asked) = asked.first()
                && *asked != 0
                && begun == expected
                && *asked != attempt
            {
                self.trouble.push(format!("{}: attempt {asked} instead of {attempt}", at()));
            }
        } else if begun > expected {
            self.counts.by_a_wrong_clock += 1;
            self.strange += 1;
        }
        if is_due {
            let ran = asked.first() != Some(&0);
            self.counts.started += usize::from(ran);
            self.counts.covered += reached - self.done - usize::from(ran);
            self.done = reached;
        }
        if retry.is_some() {
            self.counts.again += 1;
        }
        if begun > 0 || expected > 0 {
            self.retry = None;
        }
        if killed {
            // What was noted and not written down is begun a minute later.
            if asked.is_empty() {
                self.retry = Some((now, MINUTE, attempt));
            }
            return false;
        }
        if running && self.end.is_none() && asked.iter().any(|n| *n > 0) {
            let takes = self.dice.roll(20, self.longest.max(MINUTE));
            let outcome = match self.dice.roll(0, 99) {
                0..80 => RunState::Good,
                80..95 => RunState::Failed,
                _ => RunState::Suspect,
            };
            self.end = Some((self.time + takes, outcome));
            self.began = self.is_right().then_some(self.time);
        }
        true
    }

    fn finish(&mut self, outcome: RunState) {
        self.end = None;
        let mut run = lock(&self.shared.inner).running.take().unwrap();
        run.state = outcome;
        let now = self.now();
        *lock(&self.shared.clock) = now;
        lock(&self.shared.inner).ledger.as_ref().unwrap().save_run(&run).unwrap();
        self.scheduler.as_ref().unwrap().job_finished(&run);
        match outcome {
            RunState::Failed if run.attempt < ATTEMPTS => self.retry = Some((now, BACKOFF << (run.attempt - 1), run.attempt + 1)),
            RunState::Failed | RunState::Good => self.retry = None,
            _ => {}
        }
        let good = match outcome {
            RunState::Good => true,
            RunState::Suspect => false,
            _ => return,
        };
        let time = run.started.as_ref().unwrap().parse::<Timestamp>().unwrap();
        let candidate = Candidate { id: run.id, time, good, pinned: false, proven: false, safety: false, imported: false };
        self.made.push(Made { candidate, truth: self.began });
        self.counts.good += usize::from(good);
        self.clean_up();
    }

    fn clean_up(&mut self) {
        let believed = self.believed();
        let now = Now { clock: stamp(self.now()), believed };
        let candidates: Vec<Candidate> = self.made.iter().map(|made| made.candidate.clone()).collect();
        let remove = decision(&candidates, &self.zone, &self.rules, &self.rules, now).remove;
        let naive = decision(&candidates, &self.zone, &self.rules, &self.rules, Now { believed: now.clock, ..now }).remove;
        let kept = self.protected();
        self.counts.saved += naive.difference(&remove).filter(|id| kept.contains(*id)).count();
        for id in remove.intersection(&kept) {
            self.counts.good_dropped += 1;
            self.trouble.push(format!("{}: at {} (clock {}) good backup {id} was dropped", self.spec, stamp(self.time), now.clock));
        }
        self.counts.fallen += remove.len();
        self.made.retain(|made| !remove.contains(&made.candidate.id));
    }

    /// What the rules keep of the backups whose times are true, at the true time: an age, so many of the newest, the newest of days and months.
    fn protected(&self) -> BTreeSet<String> {
        let mut true_ones: Vec<(&Made, i64)> =
            self.made.iter().filter(|made| made.candidate.good).filter_map(|m| Some((m, m.truth?))).collect();
        true_ones.sort_by_key(|(made, _)| std::cmp::Reverse(made.candidate.time));
        let mut kept = BTreeSet::new();
        // A clock that was an hour behind may make a backup look an hour older.
        let young = |days: i64, truth: i64| self.time - truth < days * DAY - HOUR;
        let age = self.rules.keep_days.map(i64::from).or(self.rules.keep_within.map(|within| within.as_secs() as i64 / DAY));
        for (made, truth) in &true_ones {
            if age.is_some_and(|days| young(days, *truth)) {
                kept.insert(made.candidate.id.clone());
            }
        }
        let newest = true_ones.iter().take(self.rules.keep_last.unwrap_or(1) as usize);
        kept.extend(newest.map(|(made, _)| made.candidate.id.clone()));
        for (limit, form) in [(self.rules.keep_daily, "%Y-%m-%d"), (self.rules.keep_monthly, "%Y-%m")] {
            let mut periods: BTreeMap<String, String> = BTreeMap::new();
            for (made, _) in &true_ones {
                let period = made.candidate.time.to_zoned(self.zone.clone()).strftime(form).to_string();
                if periods.len() < limit.unwrap_or(0) as usize || periods.contains_key(&period) {
                    periods.entry(period).or_insert(made.candidate.id.clone());
                }
            }
            kept.extend(periods.into_values());
        }
        kept
    }

    /// keepd runs until then.
    fn run(&mut self, until: i64) {
        while self.time < until {
            let wake = self.scheduler.as_ref().unwrap().wake_at().map_or(i64::MAX, |wake| wake.as_second() - self.error);
            let end = self.end.map_or(i64::MAX, |(end, _)| end);
            self.time = wake.max(self.time + 1).min(end.max(self.time)).min(until);
            if let Some((_, outcome)) = self.end.filter(|(end, _)| *end <= self.time) {
                self.finish(outcome);
            }
            if !self.look() {
                self.killed();
            }
        }
    }

    fn killed(&mut self) {
        self.counts.kills += 1;
        self.scheduler = None;
        lock(&self.shared.inner).ledger = None;
        self.time += self.dice.roll(1, 40);
        self.open();
        if !self.look() {
            self.killed();
        }
    }

    fn first_look(&mut self) {
        if !self.look() {
            self.killed();
        }
    }

    /// The clock is wrong for so long, with restarts of keepd meanwhile.
    fn wrong(&mut self, error: i64, seconds: i64) {
        let from = self.time;
        (self.error, self.strange) = (error, 0);
        self.first_look();
        while self.time < from + seconds {
            let until = (self.time + self.dice.roll(HOUR, 30 * HOUR)).min(from + seconds);
            self.run(until);
            if self.dice.roll(0, 1) == 0 {
                self.restart(30);
            }
        }
        if !self.is_right() {
            // One catch-up, then what is due by that clock.
            let minute = (from + error).div_euclid(MINUTE) * MINUTE;
            let most = match self.oracle.every {
                0 => self.oracle.all(minute, self.now()).len(),
                every => (self.now() - from - error) as usize / every as usize + 1,
            };
            if self.strange > most + 1 {
                self.trouble.push(format!("{}: {} starts by a wrong clock, {most} due by it", self.spec, self.strange));
            }
        }
        self.error = 0;
        self.time += 1;
        self.finish_late();
        self.first_look();
    }

    /// A run that ended while nobody looked is told now.
    fn finish_late(&mut self) {
        if let Some((_, outcome)) = self.end.filter(|(end, _)| *end <= self.time) {
            self.finish(outcome);
        }
    }

    fn restart(&mut self, seconds: i64) {
        self.counts.restarts += 1;
        self.close();
        self.time += seconds;
        self.open();
        self.first_look();
    }

    /// The machine is off for so long; its clock begins in 1970 and is set right after a while.
    fn reboot(&mut self, seconds: i64, in_1970: Option<i64>) {
        self.counts.restarts += 1;
        self.close();
        self.time += seconds;
        self.boot = (self.boot.0 + 1, self.time);
        match in_1970 {
            None => {
                self.open();
                self.first_look();
            }
            Some(seconds) => {
                self.counts.leaps += 1;
                self.error = 20 - self.time;
                self.open();
                self.wrong(20 - self.time, seconds);
            }
        }
    }

    fn live(&mut self, days: i64) {
        let end = self.time + days * DAY;
        while self.time < end - 4 * DAY {
            let until = self.time + self.dice.roll(16 * HOUR, 30 * HOUR);
            self.run(until);
            match self.dice.roll(0, 99) {
                0..58 => {
                    let seconds = self.dice.roll(2, 120);
                    self.restart(seconds);
                }
                58..66 => {
                    let kill = if self.dice.roll(0, 1) == 0 { Kill::Before } else { Kill::After };
                    lock(&self.shared.inner).kill = Some(kill);
                }
                66..74 => {
                    let seconds = self.dice.roll(HOUR, 80 * HOUR);
                    self.reboot(seconds, None);
                }
                74..80 => {
                    // Suspended.
                    self.time += self.dice.roll(HOUR, 60 * HOUR);
                    self.finish_late();
                    self.first_look();
                }
                80..87 => {
                    self.counts.leaps += 1;
                    let seconds = self.dice.roll(10 * MINUTE, 30 * HOUR);
                    self.wrong(-HOUR, seconds);
                }
                87..94 => {
                    self.counts.leaps += 1;
                    let seconds = self.dice.roll(MINUTE, 60 * HOUR);
                    self.wrong(TEN_YEARS, seconds);
                }
                _ => {
                    let (off, seconds) = (self.dice.roll(30, 12 * HOUR), self.dice.roll(5, 3 * HOUR));
                    self.reboot(off, Some(seconds));
                }
            }
        }
        lock(&self.shared.inner).kill = None;
        self.run(end);
        self.counts.due = self.dues.iter().filter(|due| *due + self.jitter <= end).count();
        let left = self.counts.due.saturating_sub(self.done);
        self.counts.missed += left;
    }
}

struct Case {
    spec: &'static str,
    zone: &'static str,
    from: &'static str,
    jitter: u64,
    rules: Retention,
}

fn cases() -> Vec<Case> {
    let days = |n| Retention { keep_days: Some(n), ..Retention::default() };
    let case = |spec, zone, rules| Case { spec, zone, from: "2027-01-01T12:00:00Z", jitter: 0, rules };
    let in_2011 = |case| Case { from: "2011-02-01T12:00:00Z", ..case };
    vec![
        case("30 2 * * *", "Europe/Berlin", days(20)),
        case("30 1,2 * * *", "America/New_York", Retention { keep_daily: Some(14), keep_monthly: Some(6), ..Retention::default() }),
        case(
            "15 2 * * *",
            "Australia/Lord_Howe",
            Retention { keep_within: Some(Duration::from_secs(864_000)), keep_last: Some(3), ..Retention::default() },
        ),
        case("0 0 * * *", "America/Havana", Retention { keep_last: Some(5), ..Retention::default() }),
        case("10 3 31 * *", "Europe/Berlin", days(100)),
        case("0 0 29 2 *", "UTC", Retention { keep_last: Some(1), ..Retention::default() }),
        case("0 4 13 * 5", "America/New_York", days(60)),
        case("0 4 */2 * 5", "Asia/Kathmandu", Retention { keep_daily: Some(3), ..Retention::default() }),
        Case { jitter: 2400, ..case("20 1 * * *", "Europe/London", days(7)) },
        in_2011(case("0 12 * * *", "Pacific/Apia", days(10))),
        in_2011(case("5 */3 * * *", "Pacific/Apia", Retention { keep_daily: Some(7), ..Retention::default() })),
        case("30 * * * *", "Europe/Berlin", Retention { keep_last: Some(24), keep_daily: Some(7), ..Retention::default() }),
        case("every 6", "UTC", days(5)),
        case("every 36", "UTC", days(20)),
    ]
}

#[test]
fn two_years_of_wrong_clocks_skip_nothing_double_nothing_and_drop_nothing() {
    let seed: u64 = std::env::var("KEEPD_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let seeds = if std::env::var_os("KEEPD_TEST_LONG").is_some() { 20 } else { 1 };
    let days = 731;
    let work: Mutex<Vec<(Case, u64)>> =
        Mutex::new((seed..seed + seeds).flat_map(|seed| cases().into_iter().map(move |case| (case, seed))).collect());
    let all: Mutex<(Counts, Vec<String>)> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((case, seed)) = { lock(&work).pop() } {
                    let mut world = World::new(&case, seed, days);
                    world.live(days);
                    let c = &world.counts;
                    println!(
                        "{:<13} {:<20} seed {seed}: {} due, {} started, {} covered, {} by a wrong clock; {} good, {} fell",
                        case.spec, case.zone, c.due, c.started, c.covered, c.by_a_wrong_clock, c.good, c.fallen
                    );
                    let mut all = lock(&all);
                    all.0.add(c);
                    all.1.extend(world.trouble.into_iter().take(5));
                }
            });
        }
    });
    let (c, trouble) = all.into_inner().unwrap();
    println!(
        "two years, {} jobs: {} runs due, {} started, {} covered (missed together or while running), missed {}, doubled {}; {} attempts again, \
         {} starts by a wrong clock; {} restarts, {} kills, {} wrong clocks; {} good backups, {} fell by the rules, good dropped {} \
         ({} would have been by a clock that is believed)",
        cases().len() * seeds as usize,
        c.due,
        c.started,
        c.covered,
        c.missed,
        c.doubled,
        c.again,
        c.by_a_wrong_clock,
        c.restarts,
        c.kills,
        c.leaps,
        c.good,
        c.fallen,
        c.good_dropped,
        c.saved
    );
    assert!(trouble.is_empty(), "{}", trouble.join("\n"));
    assert_eq!((c.missed, c.doubled, c.good_dropped), (0, 0, 0));
    assert_eq!(c.started + c.covered, c.due, "each is one of both");
    assert!(c.saved > 100 && c.kills > 20 && c.leaps > 300 && c.again > 300, "the years were not as bad as they should be: {c:?}");
}

#[test]
fn the_oracle_knows_what_is_in_the_calendar() {
    let count = |spec, zone, from: &str, to: &str| {
        let at = |text: &str| text.parse::<Timestamp>().unwrap().as_second();
        Oracle::new(spec, zone).all(at(from), at(to)).into_iter().map(|due| stamp(due).to_string()).collect::<Vec<_>>()
    };
    assert_eq!(count("30 2 * * *", "Europe/Berlin", "2027-03-28T00:00:00Z", "2027-03-28T12:00:00Z"), ["2027-03-28T01:00:00Z"]);
    assert_eq!(count("30 2 * * *", "Europe/Berlin", "2027-10-30T22:00:00Z", "2027-10-31T12:00:00Z"), ["2027-10-31T00:30:00Z"]);
    assert_eq!(count("30 * * * *", "Europe/Berlin", "2027-10-30T23:50:00Z", "2027-10-31T02:00:00Z").len(), 2);
    // The noon of the day that was not is right after it; that of the next is as ever.
    assert_eq!(
        count("0 12 * * *", "Pacific/Apia", "2011-12-29T12:00:00Z", "2011-12-31T12:00:00Z"),
        ["2011-12-29T22:00:00Z", "2011-12-30T10:00:00Z", "2011-12-30T22:00:00Z"]
    );
    assert_eq!(count("0 0 29 2 *", "UTC", "2027-01-01T00:00:00Z", "2029-01-01T00:00:00Z"), ["2028-02-29T00:00:00Z"]);
    assert_eq!(count("every 6", "UTC", "2027-01-01T00:00:00Z", "2027-01-02T00:00:00Z").len(), 4);
}
