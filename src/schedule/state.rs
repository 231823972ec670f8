//! What the clock starts, and what is known of it: the ledger's state brought up to the configuration, and to a clock that was moved.
//!
//! A clock that leaps ahead may be wrong, and so may one that goes back. What was begun by it before is therefore kept: when it leaps, the last due time
//! that was begun until then ([`ScheduleState::leaps`]), which holds again when the clock comes back; when it goes back, how far it had come
//! ([`ScheduleState::ahead`]), so that nothing is begun a second time when it comes there again.

use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use keepd_protocol::model::{Run, RunKind};

use super::due::{newest_missed, next_due, words};
use crate::config::{Config, Job, Retry, Schedule};
use crate::ledger::{Leap, ScheduleState, Waiting};

/// What the backup of the configuration is called here and in the ledger; no job's name has a space.
pub const CONFIG_BACKUP: &str = "config backup";
/// As for a job that does not say otherwise.
const CONFIG_RETRY: Retry = Retry { attempts: 3, backoff: Duration::from_secs(60) };

/// A clock that was far ahead and came back leaves due times in the future; more than this is taken for that. One that went on by more than this
/// between two looks leapt, or nobody looked.
pub const AHEAD: SignedDuration = SignedDuration::from_hours(1);
/// A clock that comes back by more was wrong before. By less it may be that it is wrong now, and was set: what ran does not run again then.
const SET_BACK: SignedDuration = SignedDuration::from_hours(24);
/// So many leaps are remembered, the farthest ones.
const MOST_LEAPS: usize = 8;

/// What is started by the clock.
pub struct Entry<'c> {
    /// A job's name, or [`CONFIG_BACKUP`]; the ledger knows its state by it.
    pub key: &'c str,
    pub enabled: bool,
    paused_until: Option<Timestamp>,
    pub schedule: &'c Option<Schedule>,
    timezone: Option<&'c str>,
    zone: TimeZone,
    pub jitter: Duration,
    pub retry: Retry,
}

impl<'c> Entry<'c> {
    pub fn of_job(job: &'c Job) -> Self {
        let Job { name, enabled, paused_until, schedule, timezone, jitter, retry, .. } = job;
        Self {
            key: name,
            enabled: *enabled,
            paused_until: *paused_until,
            schedule,
            timezone: timezone.as_deref(),
            zone: job.zone(),
            jitter: *jitter,
            retry: retry.clone(),
        }
    }

    pub fn of_config(config: &'c Config) -> Option<Self> {
        let backup = config.config_backup.as_ref()?;
        Some(Self {
            key: CONFIG_BACKUP,
            enabled: true,
            paused_until: None,
            schedule: &backup.schedule,
            timezone: backup.timezone.as_deref(),
            zone: backup.zone(),
            jitter: Duration::ZERO,
            retry: CONFIG_RETRY,
        })
    }

    pub fn all(config: &'c Config) -> impl Iterator<Item = Self> {
        config.jobs.values().map(Self::of_job).chain(Self::of_config(config))
    }

    /// What a run was a run of.
    pub fn of_run(run: &Run, config: &'c Config) -> Option<Self> {
        match run.kind {
            RunKind::Backup => config.jobs.get(run.job.as_ref()?).map(Self::of_job),
            RunKind::ConfigBackup => Self::of_config(config),
            _ => None,
        }
    }

    pub fn missed(&self, state: &ScheduleState, now: Timestamp) -> Option<Timestamp> {
        newest_missed(self.schedule.as_ref()?, &self.zone, self.covered(state, now), anchor(state), now)
    }

    pub fn next(&self, state: &ScheduleState, now: Timestamp) -> Option<Timestamp> {
        next_due(self.schedule.as_ref()?, &self.zone, self.covered(state, now), anchor(state))
    }

    /// Up to when nothing is owed: what falls due before the end of a pause is covered by it.
    fn covered(&self, state: &ScheduleState, now: Timestamp) -> Timestamp {
        let last = last_due(state, now);
        self.paused_until.map_or(last, |until| last.max(just_before(until)))
    }

    pub fn is_paused(&self, now: Timestamp) -> bool {
        self.paused_until.is_some_and(|until| now < until)
    }

    /// Brings a state up to the schedule, the pause and the clock as they are now.
    pub fn settle(&self, state: &mut ScheduleState, now: Timestamp) {
        let text = format!("{} {}", words(self.schedule), self.timezone.unwrap_or_default());
        if state.schedule != text || state.first_seen.is_none() {
            state.schedule = text;
            // A new schedule owes nothing from before; what it owes from now on survives restarts.
            state.last_due = Some(now);
            (state.ahead, state.leaps) = (None, Vec::new());
            state.first_seen.get_or_insert(now);
        }
        if state.first_seen.is_some_and(|seen| is_ahead(seen, now)) {
            state.first_seen = Some(now);
        }
        self.settle_clock(state, now);
        if let Some(retry) = &mut state.retry
            && now < retry.since
        {
            // The clock went back: the wait begins anew.
            retry.at = now.checked_add(retry.at.duration_since(retry.since)).unwrap_or(now);
            retry.since = now;
        }
        if state.retry.is_some() && (!self.enabled || self.is_paused(now)) {
            state.retry = None;
        }
        if state.paused_until != self.paused_until {
            // It was paused until then, or until just now; the grid of an interval stays.
            if let (Some(until), Some(schedule)) = (state.paused_until, self.schedule) {
                let until = just_before(until).min(now);
                let covered = newest_missed(schedule, &self.zone, last_due(state, now), anchor(state), until);
                state.last_due = covered.or(state.last_due);
            }
            state.paused_until = self.paused_until;
        }
    }

    fn settle_clock(&self, state: &mut ScheduleState, now: Timestamp) {
        let is_future = |time: Option<Timestamp>| time.is_some_and(|time| is_ahead(time, now));
        let was_wrong = |time: Option<Timestamp>| time.is_some_and(|time| time.duration_since(now) > SET_BACK);
        let before = state.leaps.iter().position(|leap| !is_ahead(leap.due, now) && now < leap.to);
        if let Some(place) = before.filter(|_| was_wrong(state.last_due) || was_wrong(state.ahead)) {
            // It came back from where it had leapt to: what was begun there does not count here.
            tracing::warn!(job = %self.key, "the clock was ahead and came back; the schedule goes on where it was before");
            let before = state.leaps.drain(place..).next().map(|leap| leap.due);
            state.last_due = state.last_due.filter(|due| !is_ahead(*due, now)).max(before);
            state.ahead = None;
        } else if let Some(mark) = state.ahead.filter(|mark| *mark <= now) {
            // It came to where it was before it went back.
            state.last_due = state.last_due.max(Some(mark));
            state.ahead = None;
        } else if is_future(state.last_due) {
            tracing::warn!(job = %self.key, "its last due time lies in the future: the clock went back; counting goes on from now");
            state.ahead = state.ahead.max(state.last_due);
            state.last_due = Some(now);
        } else if state.ahead.is_none() {
            state.leaps.retain(|leap| !is_ahead(leap.to, now));
        }
    }

    /// Notes that the clock is somewhere else than when it was looked at last.
    pub fn leapt(&self, state: &mut ScheduleState, now: Timestamp) {
        let Some(due) = state.last_due.filter(|due| is_ahead(now, *due)) else { return };
        // What was begun before it went back is what holds.
        if state.ahead.is_some() {
            return;
        }
        if let Some(last) = state.leaps.last_mut().filter(|leap| leap.due == due) {
            last.to = last.to.max(now);
            return;
        }
        state.leaps.push(Leap { due, to: now });
        if state.leaps.len() > MOST_LEAPS
            && let Some((place, _)) = state.leaps.iter().enumerate().min_by_key(|(_, leap)| leap.to.duration_since(leap.due))
        {
            state.leaps.remove(place);
        }
    }
}

/// A run that is to be begun `wait` after `now`.
pub fn again(now: Timestamp, wait: SignedDuration, attempt: u32) -> Option<Waiting> {
    Some(Waiting { since: now, at: now.checked_add(wait).ok()?, attempt })
}

/// A time that a clock which is right cannot have seen.
fn is_ahead(time: Timestamp, now: Timestamp) -> bool {
    time.duration_since(now) > AHEAD
}

fn just_before(time: Timestamp) -> Timestamp {
    time.checked_sub(SignedDuration::from_secs(1)).unwrap_or(Timestamp::MIN)
}

fn last_due(state: &ScheduleState, now: Timestamp) -> Timestamp {
    state.last_due.unwrap_or(now)
}

/// An interval counts from its last due time, which is when the job was first seen to begin with.
fn anchor(state: &ScheduleState) -> Timestamp {
    state.last_due.or(state.first_seen).unwrap_or(Timestamp::UNIX_EPOCH)
}
